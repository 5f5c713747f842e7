//! The `tarazed` command.

use clap::Parser;
use std::process::ExitCode;
use tarazed::{cli::Cli, commands, panics};

fn main() -> ExitCode {
    panics::install();
    // clap prints usage errors itself and exits with 2, the code of a refusal; `--help` and `--version` exit with 0.
    let cli = Cli::parse();
    panics::contain(|| commands::dispatch(cli.command)).exit_code()
}
