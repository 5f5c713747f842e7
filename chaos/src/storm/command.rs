//! `tarazed-chaos storm`: from a scenario to its report.

use super::calm::{self, Calms};
use super::files::{first_difference, hash_trace};
use super::life::Launch;
use super::machine::{Cage, Disk};
use super::network::Network;
use super::report::{self, Counts, Machine, Report, Traces};
use super::run::{Ground, Outcome, blow};
use super::scenario::{Goal, Scenario};
use super::store::{BUCKET, Store};
use super::undisturbed;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tarazed_domain::config::Config;

/// What to do, and where.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The scenario, e.g. chaos/scenarios/short.toml.
    scenario: PathBuf,
    /// The program; the one beside this one where it is absent.
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Everything is written below this folder; undisturbed runs in it are used again.
    #[arg(long, value_name = "DIR", default_value = "runs/storm")]
    work: PathBuf,
    /// Another seed than the scenario's.
    #[arg(long)]
    seed: Option<u64>,
    /// End after so many faults instead; the scenario's goals that are counts do not hold then.
    #[arg(long)]
    faults: Option<u64>,
    /// End after so many minutes instead; likewise.
    #[arg(long)]
    minutes: Option<f64>,
    /// Leave the fault-free stretches out: no goodput.
    #[arg(long)]
    no_calm: bool,
}

impl Args {
    /// A scenario as it stands, at a program, below a folder.
    #[must_use]
    pub fn new(scenario: &Path, program: &Path, work: &Path) -> Self {
        Self {
            scenario: scenario.to_owned(),
            program: Some(program.to_owned()),
            work: work.to_owned(),
            seed: None,
            faults: None,
            minutes: None,
            no_calm: false,
        }
    }

    /// Another seed.
    #[must_use]
    pub const fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// No fault-free stretches.
    #[must_use]
    pub const fn without_calm(mut self) -> Self {
        self.no_calm = true;
        self
    }
}

/// Carries it out: 0 where the storm passed, 1 where it did not, 2 where it could not begin.
#[must_use]
pub fn run_command(args: &Args) -> ExitCode {
    match run(args) {
        Ok((report, path)) => {
            print!("{}", report.summary());
            println!("  all of it: {}", path.display());
            ExitCode::from(u8::from(!report.failures.is_empty()))
        }
        Err(error) => {
            eprintln!("tarazed-chaos: {error}");
            ExitCode::from(2)
        }
    }
}

/// Runs a scenario; its report, and where that was written.
///
/// # Errors
/// Why the storm could not begin, or its report not be written.
pub fn run(args: &Args) -> Result<(Report, PathBuf), String> {
    let mut scenario = Scenario::load(&args.scenario)?;
    scenario.seed = args.seed.unwrap_or(scenario.seed);
    if args.faults.is_some() || args.minutes.is_some() {
        scenario.until.faults = args.faults;
        scenario.until.minutes = args.minutes;
        // Counts belong to the length that the scenario has; shares and rates do not.
        scenario.goal = Goal {
            goodput_min: scenario.goal.goodput_min,
            per_hour_min: scenario.goal.per_hour_min,
            ..Goal::default()
        };
    }
    let program = program(args)?;
    let absolute = |path: &Path| std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()));
    let all = absolute(&args.work)?;
    let work = all.join(&scenario.name);
    if work.exists() {
        std::fs::remove_dir_all(&work).map_err(|e| format!("{}: {e}", work.display()))?;
    }
    std::fs::create_dir_all(&work).map_err(|e| format!("{}: {e}", work.display()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("proxies")
        .enable_all()
        .build()
        .map_err(|e| format!("proxies: {e}"))?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let heard = Arc::clone(&interrupted);
    runtime.spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            heard.store(true, Ordering::SeqCst);
        }
    });
    let identity = calm::identity(&program, &scenario.config, &scenario.set)?;
    let disk = Disk::mount(&work.join("disk"), scenario.disk_mib).map_err(|e| format!("{}: {e}", work.display()))?;
    let cage = Cage::build(&format!("tarazed-storm-{}", std::process::id()));
    let ranks = u16::try_from(scenario.largest()).map_err(|e| e.to_string())?;
    let run_dir = disk.folder().join("run");
    let network = runtime.block_on(Network::start(&run_dir, ranks))?;
    let store = runtime.block_on(Store::start(scenario.store_upstream.as_deref()))?;
    let launch = Launch {
        program,
        config: scenario.config.clone(),
        set: scenario.set.clone(),
        run_dir,
        ranks: 1,
        steps: None,
        env: store.environment(),
        folder: work.clone(),
        ignores_file_limits: !disk.is_own(),
    };
    let mut place = Place {
        scenario,
        launch,
        network,
        store,
        disk,
        cage,
        all,
        work,
        identity,
    };
    let report = place.storm(args.no_calm, &interrupted)?;
    let path = place.work.join("storm.json");
    let text = serde_json::to_string_pretty(&report).map_err(|e| e.to_string())?;
    std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok((report, path))
}

fn program(args: &Args) -> Result<PathBuf, String> {
    let beside = || Some(std::env::current_exe().ok()?.parent()?.join("tarazed"));
    let program = args.program.clone().or_else(beside).unwrap_or_default();
    std::fs::canonicalize(&program).map_err(|e| {
        format!(
            "--program {}: {e}; build it with: cargo build --release",
            program.display()
        )
    })
}

struct Place {
    scenario: Scenario,
    launch: Launch,
    network: Network,
    store: Store,
    disk: Disk,
    cage: Cage,
    /// Of all storms.
    all: PathBuf,
    /// Of this one.
    work: PathBuf,
    identity: String,
}

impl Place {
    fn storm(&mut self, no_calm: bool, interrupted: &AtomicBool) -> Result<Report, String> {
        let calm_before = if no_calm { Calms::new() } else { self.calms("before")? };
        println!("storm '{}' begins, seed {}", self.scenario.name, self.scenario.seed);
        let path = self.work.join("faults.jsonl");
        let log = std::fs::File::create(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let config = Config::load(&self.scenario.config, &self.scenario.set).map_err(|e| e.to_string())?;
        let mut launch = self.launch.clone();
        launch.set.push(format!("checkpoint.store=\"s3://{BUCKET}/run\""));
        let outcome = blow(Ground {
            scenario: &self.scenario,
            launch,
            network: &self.network,
            store: &self.store,
            disk: &self.disk,
            cage: &self.cage,
            timeout_ms: config.fault.timeout_ms,
            log,
            interrupted,
        })?;
        self.keep_files();
        let mut failures: Vec<String> = outcome.failure.iter().cloned().collect();
        let calm_after = if no_calm || outcome.failure.is_some() {
            Calms::new()
        } else {
            self.calms("after")?
        };
        let traces = match &outcome.failure {
            Some(_) => None,
            None => Some(self.traces(&mut failures)?),
        };
        let counts = counts(&outcome, calm_before, calm_after);
        let mut report = self.report(&outcome, counts, traces, failures);
        report.judge();
        Ok(report)
    }

    /// One fault-free stretch for each world size, with proxies and disk as in the storm.
    fn calms(&self, when: &str) -> Result<Calms, String> {
        let worlds: BTreeSet<u32> = self.scenario.worlds.iter().copied().collect();
        let mut calms = Calms::new();
        for (number, world) in worlds.into_iter().enumerate() {
            let run_dir = self.disk.folder().join(format!("calm-{when}-{world}"));
            let mut set = self.launch.set.clone();
            set.extend(self.network.lead_to(number as u64, &run_dir));
            set.push(format!("checkpoint.store=\"s3://{BUCKET}/calm-{when}-{world}\""));
            let launch = Launch {
                set,
                ranks: world,
                steps: Some(self.scenario.calm_steps),
                run_dir: run_dir.clone(),
                ..self.launch.clone()
            };
            let found = calm::stretch(&launch)?;
            println!(
                "fault-free step on {world} ranks {when} the storm: {:.2} ms",
                found.step_ms
            );
            calms.insert(world, found);
            // Its room is needed; what cannot be removed is gone with the disk.
            let _ = std::fs::remove_dir_all(&run_dir);
        }
        Ok(calms)
    }

    /// The run's files outlive its disk.
    fn keep_files(&self) {
        for name in [
            "trace.jsonl",
            "events.jsonl",
            "metrics.jsonl",
            "config.toml",
            "log/controller.log",
        ] {
            let kept = self.work.join(Path::new(name).file_name().unwrap_or_default());
            // A file that the run never wrote is missed where it is read.
            let _ = std::fs::copy(self.launch.run_dir.join(name), kept);
        }
    }

    fn traces(&self, failures: &mut Vec<String>) -> Result<Traces, String> {
        let path = self.work.join("trace.jsonl");
        let storm = hash_trace(&path, u64::MAX)?;
        println!("one rank alone computes {} lines", storm.lines);
        let launch = Launch {
            folder: self.all.clone(),
            ..self.launch.clone()
        };
        let alone = calm::reference(&launch, &self.all, &self.identity, storm.lines)?;
        let reference = hash_trace(&alone, storm.lines)?;
        let equal = reference == storm;
        if !equal {
            let difference = first_difference(&alone, &path);
            let (line, left, right) = difference.unwrap_or_default();
            failures.push(format!(
                "line {line} differs\n    one rank: {left}\n    storm:    {right}"
            ));
        }
        Ok(Traces {
            reference,
            storm,
            equal,
        })
    }

    fn report(&self, outcome: &Outcome, counts: Counts, traces: Option<Traces>, failures: Vec<String>) -> Report {
        let kinds = report::by_kind(&outcome.book, &outcome.impossible);
        let (detection, recovery) = report::times(outcome.book.records().iter());
        let store = match &self.scenario.store_upstream {
            None => "the storm's own S3 server".to_owned(),
            Some(upstream) => upstream.clone(),
        };
        Report {
            scenario: self.scenario.clone(),
            machine: Machine {
                processors: std::thread::available_parallelism().map_or(0, usize::from),
                disk: self.disk.means().to_owned(),
                memory: self.cage.means(),
                store,
            },
            identity: self.identity.clone(),
            counts,
            asked: kinds.values().map(|of| of.asked).sum(),
            done: outcome.book.done(),
            kinds,
            detection,
            recovery,
            second: report::seconds(&outcome.book),
            workers_hit: outcome.book.workers_hit(),
            lives: outcome.lives.clone(),
            traces,
            failures,
        }
    }
}

fn counts(outcome: &Outcome, calm_before: Calms, calm_after: Calms) -> Counts {
    let wall_s = outcome.wall.as_secs_f64();
    let shadows: Vec<(u64, u64)> = outcome.book.records().iter().map(undisturbed::shadow).collect();
    let undisturbed = undisturbed::rates(outcome.book.lines(), &shadows);
    let goodput = |step_ms: &dyn Fn(&u32) -> Option<f64>| {
        let worth_ms: Option<f64> = outcome
            .lines_by_world
            .iter()
            .map(|(world, lines)| Some(step_ms(world)? * *lines as f64))
            .sum();
        worth_ms.map(|worth_ms| worth_ms / 1e3 / wall_s.max(1e-9))
    };
    // The machine may have changed its pace meanwhile: the mean of both stretches counts.
    let calm_ms = |world: &u32| {
        let both = [calm_before.get(world), calm_after.get(world)];
        let found: Vec<f64> = both.into_iter().flatten().map(|calm| calm.step_ms).collect();
        (!found.is_empty()).then(|| found.iter().sum::<f64>() / found.len() as f64)
    };
    let killed = outcome
        .book
        .records()
        .iter()
        .filter(|record| record.kind.kills_controller());
    Counts {
        wall_s,
        lines: outcome.lines_by_world.values().sum(),
        lines_replayed: outcome.replayed,
        controllers_killed: killed.count() as u64,
        transient_ends: outcome.transient_ends,
        goodput: goodput(&calm_ms),
        goodput_between_faults: goodput(&|world| undisturbed.get(world).map(|calm| calm.step_ms)),
        undisturbed,
        calm_before,
        calm_after,
    }
}
