//! A deterministic simulator: whole runs on one thread, in virtual time, from a seed.
//!
//! ```text
//! seed → scenario → undisturbed run (one rank, no actor)                         the lines that must come
//!                 → lives of a controller, each with its ranks ← faults          the lines that come
//!                   until the fault phase is over, then to the end of the run
//!                 → checks                                                       after each line, and at the end
//! ```
//!
//! What runs is production code: the pure machines, the actors around them (`tarazed-actors`: the controller's tree and
//! each rank's), the start of a generation and the step itself (`tarazed-train`), on a tiny model whose every parameter
//! depends on every micro-batch before it; the store's protocol over an object store in memory. Simulated are the
//! processes (`process`), the ways between them (`mesh`, `controller`), the store's behaviour ([`store`]) and time: a
//! paused tokio clock, on which nothing waits in earnest. A device thread is a coroutine ([`coroutine`]).
//!
//! Safety is checked while faults happen: each line once, in order, and bit for bit that of the undisturbed run. Liveness
//! after: once nothing is done to the run any more, it comes to its end, with a last checkpoint that restores.
//!
//! A controller that stands still hears nothing, no time passes for it, and each request to the store, each line and each
//! start waits until it goes on (`gate`); meanwhile another may be put in charge of the real run folder. Messages are
//! handled to their end: it never stops within one handler.
//!
//! What it does not show: real sockets, signals, disks and clocks (end-to-end tests have those), and threads inside a step.

pub mod command;
pub mod coroutine;
pub mod history;
#[cfg(feature = "mutants")]
pub mod mutants;
pub mod random;
pub mod scenario;
pub mod store;
#[cfg(feature = "mutants")]
mod suite;

mod controller;
mod edges;
mod faults;
mod gate;
mod lives;
mod losses;
mod mesh;
mod nodes;
mod persons;
mod process;
mod reference;
mod world;

use history::History;
use scenario::Scenario;
use std::path::Path;
use std::time::Duration;
use tarazed_actors::run_folder::RunPaths;
use tarazed_store::{Depth, Select};
use world::World;

/// After the last fault the run must end within this many of its timeouts, whatever was done to it.
const LIVENESS_TIMEOUTS: u64 = 120;
/// And within this many times the time that its steps take alone.
const LIVENESS_STEPS: u64 = 40;

/// How a simulation ended.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its seed.
    pub seed: u64,
    /// What must never happen and did; none: all is well.
    pub failure: Option<String>,
    /// Hash of everything that happened: the same for each run of a seed.
    pub digest: String,
    /// How many events that was.
    pub events: u64,
    /// Virtual time from the first start to the end (milliseconds).
    pub virtual_ms: u64,
    /// Lives of the controller.
    pub lives: u64,
    /// Those of them that had a successor when they ended.
    pub deposed: u64,
    /// Deaths in the closed loops of controllers.
    pub loop_deaths: u64,
    /// What persons decided.
    pub decided: u64,
    /// The events as lines, where they were asked for.
    pub history: Vec<String>,
}

/// Runs the simulation of a seed.
///
/// # Errors
/// If it cannot be set up; what goes wrong in it stands in the report.
pub fn run(seed: u64, keep_history: bool) -> Result<Report, String> {
    run_scenario(Scenario::of(seed), keep_history)
}

/// Runs a simulation.
///
/// # Errors
/// As [`run`].
pub fn run_scenario(scenario: Scenario, keep_history: bool) -> Result<Report, String> {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() {
        tempfile::tempdir_in(memory)
    } else {
        tempfile::tempdir()
    };
    let folder = folder.map_err(|e| format!("no temporary folder: {e}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .map_err(|e| format!("no runtime: {e}"))?;
    let paths = RunPaths::new(folder.path());
    runtime.block_on(simulate(scenario, paths, keep_history))
}

async fn simulate(scenario: Scenario, paths: RunPaths, keep_history: bool) -> Result<Report, String> {
    let history = History::new(keep_history);
    history.note(&format!("{scenario:?}"));
    let world = World::new(scenario, paths, history.clone())?;
    let disturbing = tokio::spawn(faults::disturb(world.clone()));
    let deciding = tokio::spawn(persons::decide(world.clone()));
    let hosts = world
        .hosts
        .iter()
        .map(|host| tokio::spawn(nodes::keep_up(world.clone(), host.clone())));
    let hosts: Vec<_> = hosts.collect();
    let scenario = &world.scenario;
    let alone_ms = scenario.steps * u64::from(scenario.lanes) * scenario.lane_ms;
    let bound_ms = scenario.fault_phase_ms + LIVENESS_TIMEOUTS * scenario.timeout_ms + LIVENESS_STEPS * alone_ms;
    let mut lives = 0;
    if tokio::time::timeout(Duration::from_millis(bound_ms), lives::live_on(&world, &mut lives))
        .await
        .is_err()
    {
        world.fail(&format!("the run did not come to its end within {bound_ms} ms"));
    }
    disturbing.abort();
    deciding.abort();
    hosts.iter().for_each(tokio::task::JoinHandle::abort);
    if world.failure().is_none() {
        check_end(&world).await;
    }
    let (digest, events) = history.digest();
    Ok(Report {
        seed: scenario.seed,
        failure: world.failure(),
        digest,
        events,
        virtual_ms: history.now_ms(),
        lives,
        deposed: world.deposed.load(std::sync::atomic::Ordering::Relaxed),
        loop_deaths: world.loop_deaths.load(std::sync::atomic::Ordering::Relaxed),
        decided: world.persons.recorded_count(),
        history: history.lines(),
    })
}

/// The trace is that of the undisturbed run, whole, and so is the weight trajectory, and the store holds a checkpoint of its end that restores.
async fn check_end(world: &World) {
    let last = world.reference.last();
    if !world.reference.is_over() {
        world.fail(&format!("the run ends after step {last}, and is not over"));
    }
    let lines = match std::fs::read_to_string(world.paths.trace()) {
        Ok(text) => text,
        Err(error) => return world.fail(&format!("no trace: {error}")),
    };
    if lines != world.reference.trace() {
        world.fail("the trace's file is not that of the undisturbed run");
    }
    match std::fs::read_to_string(world.paths.weights()) {
        Ok(weights) if weights == world.reference.weights() => {}
        Ok(_) => world.fail("weights.jsonl is not that of the undisturbed run"),
        Err(error) => world.fail(&format!("no weights.jsonl: {error}")),
    }
    let store = world.store_itself();
    match store.verify(Select::All, Depth::Full).await {
        Ok(report) if report.is_clean() => {
            if report.checkpoints.is_empty() {
                world.fail("no checkpoint is left");
            }
        }
        Ok(report) => world.fail(&format!("the store is not clean: {report:?}")),
        Err(error) => world.fail(&format!("the store cannot be verified: {error}")),
    }
    match store.newest_verified(None).await {
        Ok(Some(found)) if found.manifest.step == last => {}
        Ok(found) => {
            let step = found.map(|found| found.manifest.step);
            world.fail(&format!("the newest checkpoint is {step:?}, not of step {last}"));
        }
        Err(error) => world.fail(&format!("the newest checkpoint cannot be read: {error}")),
    }
}
