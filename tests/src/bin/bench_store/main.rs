//! Checkpoints up to a store and back, against other tools with the same bytes, to the same place, in the same run.
//!
//! On S3 the peer is boto3's transfer manager, a plain multipart copy of the same files with parts of the same size; in a
//! folder it is PyTorch's distributed checkpoint, at once and in the background. Sides alternate; medians count. Ours makes and
//! checks BLAKE3 hashes, writes the manifest and commits; the peers do not.

mod ours;
mod peer;

use anyhow::{Context, Result};
use clap::Parser;
use ours::Ours;
use peer::Other;
use std::path::PathBuf;
use tarazed_tests::figures::{self, Figures, Summary};

#[derive(Parser)]
#[command(about = "Times checkpoints up and down against other tools")]
struct Arguments {
    /// A folder, or `s3://bucket/prefix` with credentials and endpoint in the environment.
    #[arg(long)]
    store: String,
    /// Python with boto3 (for S3) or torch (for a folder); without it ours alone is timed.
    #[arg(long)]
    python: Option<PathBuf>,
    /// State in MB, all shards together.
    #[arg(long, default_value_t = 100)]
    megabytes: u64,
    /// Shards, all stored and fetched at once.
    #[arg(long, default_value_t = 4)]
    shards: u32,
    /// Timed rounds, after one that warms up.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Write the results here as JSON, too.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Seconds of one side.
#[derive(Default)]
struct Side {
    up: Vec<f64>,
    down: Vec<f64>,
    background: Vec<f64>,
    stall: Vec<f64>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    println!("{}", figures::machine());
    println!("commit {}, load average {}", figures::commit(), figures::load_average());
    let (mut ours, mut theirs) = (Side::default(), Side::default());
    let mut store = Ours::open(&arguments.store, arguments.megabytes, arguments.shards).await?;
    let inputs = tempfile::tempdir().context("no folder for the inputs")?;
    let mut peer = match &arguments.python {
        Some(python) => {
            store.write_files(inputs.path())?;
            Some(Other::start(python, inputs.path(), &arguments.store, arguments.shards)?)
        }
        None => None,
    };
    for round in 0..=arguments.rounds {
        let counts = round > 0;
        let (up, down) = (store.put(round as u64 + 1).await?, store.get().await?);
        if counts {
            ours.up.push(up);
            ours.down.push(down);
        }
        let Some(peer) = &mut peer else { continue };
        let (up, down) = (peer.run("put", round)?, peer.run("get", round)?);
        let background = peer.has_background().then(|| peer.run("async", round)).transpose()?;
        if counts {
            theirs.up.push(up.seconds);
            theirs.down.push(down.seconds);
            theirs
                .background
                .extend(background.as_ref().map(|answer| answer.seconds));
            theirs.stall.extend(background.and_then(|answer| answer.stall));
        }
    }
    let figures = report(
        &ours,
        &theirs,
        store.bytes(),
        peer.as_ref().map_or("nobody", |peer| peer.version()),
    );
    println!("load average at the end {}", figures::load_average());
    if let Some(path) = arguments.json {
        std::fs::write(path, serde_json::to_string_pretty(&figures.with_context())?)?;
    }
    Ok(())
}

fn report(ours: &Side, theirs: &Side, bytes: u64, peer: &str) -> Figures {
    let mut figures = Figures::new("store").number("megabytes", bytes as f64 / 1e6);
    println!("{:.1} MB against {peer}", bytes as f64 / 1e6);
    for (what, ours, theirs) in [("up", &ours.up, &theirs.up), ("down", &ours.down, &theirs.down)] {
        let mine = Summary::of(ours);
        let rate = |seconds: f64| bytes as f64 / seconds / 1e6;
        println!("{what:<5} ours   {:>7.1} MB/s  (seconds {mine})", rate(mine.median));
        figures = figures.summary(if what == "up" { "ours_up_s" } else { "ours_down_s" }, mine);
        if theirs.is_empty() {
            continue;
        }
        let peers = Summary::of(theirs);
        let ratios: Vec<f64> = theirs.iter().zip(ours).map(|(theirs, ours)| theirs / ours).collect();
        let ratio = Summary::of(&ratios);
        println!("{what:<5} theirs {:>7.1} MB/s  (seconds {peers})", rate(peers.median));
        println!("{what:<5} throughput of ours over theirs, by round: {ratio}");
        figures = figures
            .summary(if what == "up" { "theirs_up_s" } else { "theirs_down_s" }, peers)
            .summary(if what == "up" { "ratio_up" } else { "ratio_down" }, ratio);
    }
    if !theirs.background.is_empty() {
        let (background, stall) = (Summary::of(&theirs.background), Summary::of(&theirs.stall));
        println!("theirs in the background: {background} s, of which the caller waits {stall} s");
        figures = figures
            .summary("theirs_background_s", background)
            .summary("theirs_stall_s", stall);
    }
    figures
}
