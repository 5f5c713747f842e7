//! `tarazed-verify`: judges what a run left behind, by code of its own.
//!
//! `bucket` reads only an object store and says whether every acknowledged checkpoint restores. `trace` reads only traces
//! and data and says whether every sample was used exactly once. Formats are decoded from their description in
//! `docs/FORMATS.md`.
//!
//! - It shares no code with the runtime: no crate of the workspace, no serializer of its formats. A bug that writes and
//!   reads back the same wrong thing shows here.
//! - It writes nothing.
//! - Exit codes: 0 all well; 1 something is bad, named on standard output; 2 the input cannot be judged.

mod bucket;
mod json;
mod report;
mod trace;

use clap::{Parser, Subcommand};
use report::Unusable;
use std::path::PathBuf;
use std::process::ExitCode;

/// Judges what a run left behind, by code that the run does not share.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Does every acknowledged checkpoint restore, to the very state its trace line names? Reads only the store.
    Bucket {
        /// A folder, `file://…` or `s3://bucket/prefix`; credentials come from the environment.
        location: String,
        /// One JSON document instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Was every sample used exactly once, and do two runs agree? Reads only traces, configs and data sets.
    Trace {
        /// One run folder, or two.
        #[arg(required = true, num_args = 1..=2)]
        run_dirs: Vec<PathBuf>,
        /// One JSON document instead of text.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let judged = match Arguments::parse().command {
        Command::Bucket { location, json } => bucket(&location, json),
        Command::Trace { run_dirs, json } => trace(&run_dirs, json),
    };
    match judged {
        Ok((text, true)) => {
            say(&text);
            ExitCode::SUCCESS
        }
        Ok((text, false)) => {
            say(&text);
            ExitCode::from(1)
        }
        Err(Unusable(why)) => {
            eprintln!("tarazed-verify: {why}");
            ExitCode::from(2)
        }
    }
}

fn bucket(location: &str, json: bool) -> Result<(String, bool), Unusable> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|why| Unusable(format!("no runtime: {why}")))?;
    let report = runtime.block_on(bucket::verify(location))?;
    let text = if json {
        report.json().to_string()
    } else {
        report.print()
    };
    Ok((text, report.is_clean()))
}

fn trace(run_dirs: &[PathBuf], json: bool) -> Result<(String, bool), Unusable> {
    let report = trace::verify(run_dirs)?;
    let text = if json {
        report.json().to_string()
    } else {
        report.print()
    };
    Ok((text, report.is_clean()))
}

/// A reader that went away (`| head`) changes no verdict.
fn say(text: &str) {
    use std::io::Write;
    let _gone = std::io::stdout()
        .write_all(text.trim_end().as_bytes())
        .and_then(|()| std::io::stdout().write_all(b"\n"));
}
