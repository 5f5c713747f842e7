//! One file per command.

pub mod bench;
pub mod checkpoint;
pub mod data;
pub mod data_add;
pub mod decide;
pub mod eval;
pub mod export;
pub mod generate;
pub mod gpu_check;
pub mod import;
mod left_behind;
pub mod node;
pub mod plan;
pub mod rank;
pub mod resize;
pub mod status;
pub mod tokenizer;
pub mod trace;
pub mod train;
pub mod watch;

use crate::cli::Command;
use crate::exit::{Exit, Failure};

/// Runs a command to its end.
///
/// # Errors
/// The [`Failure`] to print; it carries the exit code.
pub fn dispatch(command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Train(args) => train::run(&args),
        Command::Rank(args) => rank::run(args),
        Command::Node(args) => node::run(&args),
        Command::Resize(args) => resize::run(&args),
        Command::Decide(args) => decide::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Watch(args) => watch::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Checkpoint(command) => checkpoint::run(&command),
        Command::Trace(command) => trace::run(&command),
        Command::Generate(args) => generate::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Bench(command) => bench::run(&command),
        Command::Data(command) => data::run(&command),
        Command::Tokenizer(command) => tokenizer::run(&command),
        Command::GpuCheck(args) => gpu_check::run(&args),
    }
}

/// Threads for the store's requests.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| {
            Failure::transient(
                "threads",
                format!("cannot be started ({e})"),
                "free resources and try again",
            )
        })
}
