//! The undisturbed runs that a storm is held against: one rank alone, whose trace is the only right one, and a fault-free
//! stretch of each world, whose rate is what goodput is a share of.

use super::files::Tail;
use super::life::Launch;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tarazed_domain::config::Config;

/// An undisturbed run that takes longer hangs.
const COMPLETE_MAX: Duration = Duration::from_secs(12 * 3600);
/// Lines at the beginning of a stretch that do not count: processes warm up.
const WARM_UP_LINES: usize = 10;

/// What identifies the numbers of a run: its config's identity and the program.
///
/// # Errors
/// If config or program cannot be read.
pub fn identity(program: &Path, config: &Path, set: &[String]) -> Result<String, String> {
    let config = Config::load(config, set).map_err(|e| e.to_string())?;
    let bytes = std::fs::read(program).map_err(|e| format!("{}: {e}", program.display()))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(config.identity().as_bytes());
    hasher.update(blake3::hash(&bytes).as_bytes());
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}

/// Makes, or goes on with, the single-rank run up to `steps`; its trace.
///
/// # Errors
/// If it does not end with code 0.
pub fn reference(launch: &Launch, folder: &Path, identity: &str, steps: u64) -> Result<PathBuf, String> {
    let run_dir = folder.join(format!("reference-{identity}"));
    let trace = run_dir.join("trace.jsonl");
    let have = std::fs::read(&trace).unwrap_or_default();
    let have = have.iter().filter(|&&byte| byte == b'\n').count() as u64;
    if have < steps {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut set = launch.set.clone();
        set.push(format!("cluster.threads_per_rank={cores}"));
        let alone = Launch {
            set,
            run_dir,
            ranks: 1,
            steps: Some(steps),
            env: Vec::new(),
            ignores_file_limits: false,
            ..launch.clone()
        };
        alone.complete(COMPLETE_MAX)?;
    }
    Ok(trace)
}

/// The rate of a world without faults.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Calm {
    /// Lines that were counted.
    pub lines: usize,
    /// Mean time from line to line, evaluations and checkpoints included.
    pub step_ms: f64,
}

/// Rates by world size.
pub type Calms = BTreeMap<u32, Calm>;

/// Runs a fresh run to its end and reads its rate.
///
/// # Errors
/// If it does not end with code 0, or is too short.
pub fn stretch(launch: &Launch) -> Result<Calm, String> {
    launch.complete(COMPLETE_MAX)?;
    let mut tail = Tail::of(launch.run_dir.join("metrics.jsonl"));
    let times: Vec<u64> = tail
        .look()
        .iter()
        .filter_map(|line| line["time_unix_ms"].as_u64())
        .collect();
    let counted = times.get(WARM_UP_LINES..).unwrap_or_default();
    let (Some(first), Some(last)) = (counted.first(), counted.last()) else {
        return Err(format!("{} lines are too few to tell a rate", times.len()));
    };
    let lines = counted.len() - 1;
    Ok(Calm {
        lines,
        step_ms: (last - first) as f64 / lines.max(1) as f64,
    })
}
