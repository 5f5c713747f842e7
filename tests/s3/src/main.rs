//! Serves a folder as S3 until it is told to stop: `cargo run --release -p tarazed-s3 -- --folder DIR`.

use anyhow::Context;
use clap::Parser;
use std::path::PathBuf;
use tarazed_s3::{Credentials, Server};
use tokio::signal::unix::{SignalKind, signal};

/// A small S3 server on 127.0.0.1, for trying `checkpoint.store = "s3://…"`.
#[derive(Parser)]
#[command(name = "tarazed-s3", version)]
struct Arguments {
    /// Where the objects are kept; made where it is missing
    #[arg(long)]
    folder: PathBuf,
    /// Port to listen at; 0 for any free one
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Bucket to make
    #[arg(long, default_value = "tarazed")]
    bucket: String,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    // Before anything is said: whoever has read it may signal.
    let mut terminate = signal(SignalKind::terminate()).context("signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("signals")?;
    let credentials = match Credentials::from_environment() {
        Some(given) => given,
        None => Credentials::random().context("random credentials")?,
    };
    let server = Server::start_at(&arguments.folder, credentials, arguments.port)
        .with_context(|| format!("cannot serve {} at port {}", arguments.folder.display(), arguments.port))?;
    let bucket = &arguments.bucket;
    server.create_bucket(bucket)?;
    let (folder, endpoint) = (arguments.folder.display(), server.endpoint());
    println!("# Serves {folder} at {endpoint} until it is stopped. In another shell:");
    for (name, value) in server.environment() {
        println!("export {name}={value}");
    }
    println!("# Keys of its own for the ranks, which may not delete:");
    for (name, value) in server.environment_of_ranks() {
        println!("export {name}={value}");
    }
    println!(
        "cargo run --release -- train configs/quickstart.toml --run-dir runs/s3 \\\n    \
         --set checkpoint.store=s3://{bucket}/quickstart\n\
         cargo run --release -- checkpoint ls s3://{bucket}/quickstart"
    );
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
