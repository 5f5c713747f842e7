//! What whole runs take: recovery from a killed rank, controller or cluster, the cost of fault tolerance, the start of a rank,
//! memory for a checkpoint.
//!
//! Each part starts real runs of a config, as a person does, and reads their files. Numbers of one part come from runs that
//! alternate, so that a machine that slows down slows both sides. See `tests/bench/README.md`.

mod checkpoint;
mod memory;
mod monitor;
mod overhead;
mod recovery;
mod start;
mod takeover;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;
use tarazed_tests::figures::{self, Figures};

#[derive(Parser)]
#[command(about = "Times recovery, fault tolerance and start of whole runs")]
struct Arguments {
    /// Config to run.
    #[arg(long, global = true, default_value = "configs/quickstart.toml")]
    config: PathBuf,
    /// Rank processes.
    #[arg(long, global = true, default_value_t = 4)]
    ranks: u32,
    /// Write the results here as JSON, too.
    #[arg(long, global = true)]
    json: Option<PathBuf>,
    /// Processes that do nothing but compute, beside the run.
    #[arg(long, global = true, default_value_t = 0)]
    load: usize,
    #[command(subcommand)]
    part: Part,
}

/// Other work on the machine, until dropped.
struct Load(Vec<Child>);

impl Load {
    fn of(count: usize) -> Result<Self> {
        let busy = || Command::new("sh").args(["-c", "while :; do :; done"]).spawn();
        Ok(Self((0..count).map(|_| busy()).collect::<std::io::Result<_>>()?))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // An error means that somebody else has ended it.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[derive(Subcommand)]
enum Part {
    /// SIGKILL of a rank to the next step committed by the generation after it.
    Recovery {
        /// Kills.
        #[arg(long, default_value_t = 21)]
        kills: usize,
    },
    /// SIGSTOP of a rank to its loss, then peace in which nobody must be suspected.
    Stops {
        /// Stops.
        #[arg(long, default_value_t = 9)]
        stops: usize,
        /// `fault.timeout_ms` of the run.
        #[arg(long, default_value_t = 2000)]
        timeout_ms: u64,
        /// Minutes of peace after them.
        #[arg(long, default_value_t = 60.0)]
        minutes: f64,
    },
    /// SIGKILL of the controller, and of everything at once, to the next step committed by what is started after it.
    Takeover {
        /// Rounds; each kills the controller once, and everything once.
        #[arg(long, default_value_t = 9)]
        rounds: usize,
    },
    /// A step with fault tolerance against one without.
    Overhead {
        /// `tarazed` built with `--features tarazed-domain/mutants`: the product cannot do without.
        #[arg(long)]
        program: PathBuf,
        /// Rounds; each runs both sides once.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Steps of each run.
        #[arg(long, default_value_t = 40)]
        steps: u64,
    },
    /// What the training state monitor costs a step.
    Monitor {
        /// Rounds; each runs every side once.
        #[arg(long, default_value_t = 7)]
        rounds: usize,
        /// Steps of each run.
        #[arg(long, default_value_t = 60)]
        steps: u64,
    },
    /// What a checkpoint costs the steps around it.
    Checkpoint {
        /// Checkpoints.
        #[arg(long, default_value_t = 100)]
        checkpoints: u64,
    },
    /// What a checkpoint adds to the peak of a rank's memory. Takes models of its own, not `--config`.
    Memory {
        /// Sizes of the optimizer shard that each rank saves, in MB.
        #[arg(long, value_delimiter = ',', default_value = "40,160")]
        megabytes: Vec<u64>,
        /// Rounds; each runs both sides once.
        #[arg(long, default_value_t = 3)]
        rounds: usize,
        /// `s3://bucket/prefix` with credentials and endpoint in the environment; a folder of the run where it is left out.
        #[arg(long)]
        store: Option<String>,
    },
    /// Start of a rank process to its readiness.
    Start {
        /// Runs; each starts all ranks.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let (config, ranks) = (arguments.config.canonicalize()?, arguments.ranks);
    println!("{}", figures::machine());
    println!("commit {}, load average {}", figures::commit(), figures::load_average());
    let _load = Load::of(arguments.load)?;
    let figures: Figures = match arguments.part {
        Part::Recovery { kills } => recovery::measure(&config, ranks, kills),
        Part::Stops {
            stops,
            timeout_ms,
            minutes,
        } => {
            let calm = Duration::from_secs_f64(minutes * 60.0);
            recovery::measure_stops(&config, ranks, stops, timeout_ms, calm)
        }
        Part::Takeover { rounds } => takeover::measure(&config, ranks, rounds),
        Part::Overhead { program, rounds, steps } => {
            overhead::measure(&config, &program.canonicalize()?, ranks, rounds, steps)?
        }
        Part::Monitor { rounds, steps } => monitor::measure(&config, ranks, rounds, steps)?,
        Part::Checkpoint { checkpoints } => checkpoint::measure(&config, ranks, checkpoints),
        Part::Memory {
            megabytes,
            rounds,
            store,
        } => memory::measure(ranks, &megabytes, rounds, store.as_deref()),
        Part::Start { rounds } => start::measure(&config, ranks, rounds),
    };
    println!("load average at the end {}", figures::load_average());
    if let Some(path) = arguments.json {
        std::fs::write(path, serde_json::to_string_pretty(&figures.with_context())?)?;
    }
    Ok(())
}
