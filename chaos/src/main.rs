//! `tarazed-chaos`: harm done on purpose, and what came of it.

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use tarazed_chaos::{scale, sim, storm};

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
    /// Simulates a hundred thousand ranks over weeks: the membership machine alone, failures by published rates.
    Scale(scale::command::Args),
    /// Harms real processes as a scenario says, and compares the trace with that of one undisturbed rank.
    Storm(storm::command::Args),
    /// Puts seeded bugs into the product and sees whether the simulator finds them.
    #[cfg(feature = "mutants")]
    Mutants(sim::mutants::Args),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Sim(args) => sim::command::run_command(&args),
        Command::Scale(args) => scale::command::run_command(&args),
        Command::Storm(args) => storm::command::run_command(&args),
        #[cfg(feature = "mutants")]
        Command::Mutants(args) => sim::mutants::run(&args),
    }
}
