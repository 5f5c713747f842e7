//! `tarazed-chaos`: harm done on purpose, and what came of it.

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use tarazed_chaos::sim;

/// Proves by harm that a run computes what it would have computed in peace.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Simulates whole runs in virtual time, one for each seed.
    Sim(sim::command::Args),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Sim(args) => sim::command::run_command(&args),
    }
}
