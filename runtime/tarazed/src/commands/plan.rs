//! `tarazed plan`: what a config needs. Reads the config and this machine's size; trains and writes nothing.

use crate::exit::{Exit, Failure};
use crate::output::{print, print_json};
use crate::plan::{self, Hardware, render};
use std::path::PathBuf;
use tarazed_domain::config::Config;

/// Options of `tarazed plan`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Config file.
    config: PathBuf,
    /// Override a key, e.g. --set batch.lanes=16.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// GPUs to plan for, e.g. 64xH200-141GB; this machine's processors where it is absent.
    #[arg(long, value_name = "COUNTxNAME-MEMORYGB")]
    gpus: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command. A plan that does not fit is an answer, not a failure.
///
/// # Errors
/// Refused where the config or the hardware cannot be read.
pub fn run(args: &Args) -> Result<Exit, Failure> {
    let config = Config::load(&args.config, &args.set)?;
    let hardware = match &args.gpus {
        Some(text) => text.parse().map_err(|error| {
            Failure::refused("--gpus", error, "or leave it out to plan for this machine's processors")
        })?,
        None => this_machine()?,
    };
    let plan = plan::plan(&config, &hardware)?;
    if args.json {
        print_json(&plan)?;
    } else {
        print(&render::text(&plan))?;
    }
    Ok(Exit::Done)
}

fn this_machine() -> Result<Hardware, Failure> {
    let cores = std::thread::available_parallelism().map_or(1, |count| count.get() as u32);
    let remedy = "name GPUs with --gpus, e.g. 64xH200-141GB";
    let text = std::fs::read_to_string("/proc/meminfo")
        .map_err(|e| Failure::refused("/proc/meminfo", format!("cannot be read ({e})"), remedy))?;
    let memory_bytes =
        memory_total_bytes(&text).ok_or_else(|| Failure::refused("/proc/meminfo", "names no total memory", remedy))?;
    Ok(Hardware::Cpu { cores, memory_bytes })
}

fn memory_total_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn total_memory_is_read() {
        let text = "MemTotal:       24618812 kB\nMemFree:        1 kB\n";
        assert_eq!(memory_total_bytes(text), Some(24_618_812 * 1024));
        assert_eq!(memory_total_bytes("MemFree: 1 kB\n"), None);
    }
}
