//! `tarazed-chaos sim`: one seed in detail, or many.

use super::scenario::{Fault, Scenario};
use super::{Report, run_scenario};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What to simulate.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// One seed, with its history.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// How many seeds.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Run each seed twice: both must be the same, event for event.
    #[arg(long)]
    twice: bool,
    /// Threads; each simulation has one.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    #[command(flatten)]
    insist: Insist,
}

/// What every simulation is to have.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Insist {
    /// Kinds of fault, as often as all others together, such as `StandStill,TakeOver`.
    #[arg(long = "often", value_delimiter = ',', value_parser = fault_named)]
    faults: Vec<Fault>,
    /// Persons who decide.
    #[arg(long)]
    persons: bool,
}

fn fault_named(name: &str) -> Result<Fault, String> {
    let found = Fault::ALL.into_iter().find(|fault| format!("{fault:?}") == name);
    found.ok_or_else(|| format!("there is no such kind; there are {:?}", Fault::ALL))
}

impl Insist {
    fn scenario(&self, seed: u64) -> Scenario {
        Scenario::of(seed).insisting(&self.faults, self.persons)
    }
}

/// What a campaign came to.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Seeds that ran.
    pub seeds: u64,
    /// Events of all.
    pub events: u64,
    /// Virtual time of all (milliseconds).
    pub virtual_ms: u64,
    /// Lives of controllers.
    pub lives: u64,
    /// Those of them that had a successor when they ended.
    pub deposed: u64,
    /// Deaths in the closed loops of controllers.
    pub loop_deaths: u64,
    /// What persons decided.
    pub decided: u64,
    /// Seeds that failed, and how.
    pub failures: Vec<(u64, String)>,
}

/// Runs seeds on a number of threads.
#[must_use]
pub fn campaign(from: u64, seeds: u64, twice: bool, jobs: usize) -> Summary {
    campaign_of(&Insist::default(), from, seeds, twice, jobs)
}

fn campaign_of(insist: &Insist, from: u64, seeds: u64, twice: bool, jobs: usize) -> Summary {
    let (next, summary) = (AtomicU64::new(from), Mutex::new(Summary::default()));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= from + seeds {
                return;
            }
            let outcome = std::panic::catch_unwind(|| once_or_twice(insist, seed, twice))
                .unwrap_or_else(|_| Err("the simulation panicked".to_owned()));
            let mut summary = summary.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            summary.seeds += 1;
            match outcome {
                Ok(report) => {
                    summary.events += report.events;
                    summary.virtual_ms += report.virtual_ms;
                    summary.lives += report.lives;
                    summary.deposed += report.deposed;
                    summary.loop_deaths += report.loop_deaths;
                    summary.decided += report.decided;
                }
                Err(failure) => summary.failures.push((seed, failure)),
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(work);
        }
    });
    let mut summary = summary.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    summary.failures.sort();
    summary
}

fn once_or_twice(insist: &Insist, seed: u64, twice: bool) -> Result<Report, String> {
    let run = || run_scenario(insist.scenario(seed), false);
    let report = run()?;
    if let Some(failure) = &report.failure {
        return Err(failure.clone());
    }
    if twice {
        let again = run()?;
        if again.digest != report.digest {
            return Err(format!("two runs differ: {} and {}", report.digest, again.digest));
        }
    }
    Ok(report)
}

/// Carries it out; the exit code is 1 where something failed.
#[must_use]
pub fn run_command(args: &Args) -> ExitCode {
    if let Some(seed) = args.seed {
        return one(&args.insist, seed);
    }
    let began = Instant::now();
    let summary = campaign_of(&args.insist, args.from, args.seeds, args.twice, args.jobs);
    for (seed, failure) in &summary.failures {
        println!("seed {seed}: {failure}");
    }
    println!(
        "{} seeds{}, {} failed; {} events, {:.1} virtual minutes, {} lives of controllers; {:.1} s",
        summary.seeds,
        if args.twice { ", each twice" } else { "" },
        summary.failures.len(),
        summary.events,
        summary.virtual_ms as f64 / 60e3,
        summary.lives,
        began.elapsed().as_secs_f64()
    );
    ExitCode::from(u8::from(!summary.failures.is_empty()))
}

fn one(insist: &Insist, seed: u64) -> ExitCode {
    let report = match run_scenario(insist.scenario(seed), true) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    for line in &report.history {
        println!("{line}");
    }
    println!(
        "seed {seed}: {} events, {} ms of virtual time, {} lives of the controller, digest {}",
        report.events, report.virtual_ms, report.lives, report.digest
    );
    match report.failure {
        Some(failure) => {
            println!("FAILED: {failure}");
            ExitCode::from(1)
        }
        None => ExitCode::SUCCESS,
    }
}
