//! `tarazed resize`: asks a live run for another number of ranks.

use super::status::ask_for;
use crate::exit::{Exit, Failure};
use crate::output::print;
use crate::run_folder::RunFolder;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Options of `tarazed resize`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Rank processes from now on: 1 to batch.lanes.
    ranks: u32,
    /// Run folder; the newest below runs/ where it is absent.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Refused where no controller is live or the number is none that it can have.
pub fn run(args: &Args) -> Result<Exit, Failure> {
    let folder = RunFolder::find(args.run_dir.as_deref(), Path::new("runs"))?;
    let request = json!({"command": "resize", "ranks": args.ranks});
    if ask_for(&folder, request)?.is_none() {
        return Err(Failure::refused(
            folder.dir().display(),
            "is no live run",
            "start it with `tarazed train … --ranks N`",
        ));
    }
    print(&format!(
        "{} ranks from one of the next step boundaries on; `tarazed status` shows them\n",
        args.ranks
    ))?;
    Ok(Exit::Done)
}
