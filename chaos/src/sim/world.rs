//! What everything in a simulation shares: the scenario, the way between processes, the store, the trace, and the checks.

use super::controller::Life;
use super::history::{Failure, History};
use super::losses::Losses;
use super::mesh::Generational;
use super::nodes::Host;
use super::persons::{self, Persons};
use super::process::Process;
use super::random::Random;
use super::reference::{self, Reference};
use super::scenario::{Fault, Scenario};
use super::store::{Owner, SimStore, Weather};
use object_store::ObjectStore;
use object_store::memory::InMemory;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tarazed_actors::controller::ManifestFacts;
use tarazed_actors::run_folder::RunPaths;
use tarazed_domain::{Generation, StepsCompleted, WorkerId};
use tarazed_protocol::coordinator::PastLife;
use tarazed_protocol::data::DomainFacts;
use tarazed_protocol::data::cursor::Recipe;
use tarazed_protocol::message::Member;
use tarazed_store::{BinaryId, CheckpointStore, WriterId, WriterNonce};
use tarazed_train::feeder::{FeedRules, SampleSource};
use tokio::sync::Notify;
use tokio::time::Instant;

/// Everything shared.
pub struct World {
    /// What this simulation is like.
    pub scenario: Scenario,
    /// What happened.
    pub history: History,
    /// Run folder; only its trace and what goes with it are used.
    pub paths: RunPaths,
    /// The data recipe.
    pub recipe: Recipe,
    /// What is known of each domain.
    pub domains: Vec<DomainFacts>,
    /// What every manifest says.
    pub facts: ManifestFacts,
    /// The undisturbed run.
    pub reference: Reference,
    /// What deaths may have cost.
    pub losses: Losses,
    /// What persons ask for.
    pub persons: Persons,
    /// Controllers that had a successor when they ended.
    pub deposed: AtomicU64,
    /// Deaths in the closed loops of controllers.
    pub loop_deaths: AtomicU64,
    /// Hosts with a node process each; none where the controller starts the ranks itself.
    pub hosts: Vec<Arc<Host>>,
    /// How the store behaves.
    pub weather: Arc<Weather>,
    behind: Arc<dyn ObjectStore>,
    pids: AtomicU32,
    newest: Mutex<BTreeMap<WorkerId, Arc<Process>>>,
    spoiled: AtomicBool,
    cuts: Mutex<BTreeMap<(u32, u32), Instant>>,
    meetings: Mutex<BTreeMap<(u64, Generation), Arc<Generational>>>,
    /// Controllers whose processes are there, and the newest even when it is gone.
    lives: Mutex<Vec<Arc<Life>>>,
    /// The one that the run folder names to ranks.
    in_charge: Mutex<Option<Arc<Life>>>,
    another_wanted: Notify,
    /// Lives of ranks that a controller gave up; where their node was away they may live on.
    given_up: Mutex<BTreeSet<Member>>,
    /// Lives of ranks that were started.
    started: Mutex<BTreeSet<Member>>,
    faults_over: AtomicBool,
    compute: Mutex<Random>,
    loops: Mutex<Random>,
    written: Mutex<StepsCompleted>,
    failure: Arc<Failure>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    /// A world in which nothing has happened yet.
    ///
    /// # Errors
    /// If the scenario's undisturbed run cannot be computed: a bug of the simulator or of the step.
    pub fn new(scenario: Scenario, paths: RunPaths, history: History) -> Result<Arc<Self>, String> {
        let config = scenario
            .config(scenario.ranks, paths.dir())
            .map_err(|e| e.to_string())?;
        let (recipe, domains) = reference::data_of(&config);
        let binary = BinaryId {
            version: "simulated".to_owned(),
            build: "simulated".to_owned(),
            libraries: Vec::new(),
        };
        let facts = ManifestFacts::of_program(&config, "simulated", binary, || 0);
        let reference = Reference::new(&scenario, &paths)?;
        let seed = scenario.seed;
        let failure = Failure::new(history.clone());
        let weather = Weather::new(
            scenario.store_ms_max,
            Random::of(seed, "store", 0),
            Arc::clone(&failure),
        );
        Ok(Arc::new(Self {
            history,
            paths,
            recipe,
            domains,
            facts,
            reference,
            losses: Losses::default(),
            persons: Persons::default(),
            deposed: AtomicU64::new(0),
            loop_deaths: AtomicU64::new(0),
            hosts: (0..)
                .zip(scenario.slots())
                .map(|(index, workers)| Arc::new(Host::new(index, workers)))
                .collect(),
            weather: Arc::new(weather),
            behind: Arc::new(InMemory::new()),
            pids: AtomicU32::new(1),
            newest: Mutex::default(),
            spoiled: AtomicBool::new(false),
            cuts: Mutex::default(),
            meetings: Mutex::default(),
            lives: Mutex::default(),
            in_charge: Mutex::default(),
            another_wanted: Notify::new(),
            given_up: Mutex::default(),
            started: Mutex::default(),
            faults_over: AtomicBool::new(false),
            compute: Mutex::new(Random::of(seed, "compute", 0)),
            loops: Mutex::new(Random::of(seed, "loop deaths", 0)),
            written: Mutex::default(),
            failure,
            scenario,
        }))
    }

    /// A stream of random numbers of its own.
    pub fn random(&self, label: &str, number: u64) -> Random {
        Random::of(self.scenario.seed, label, number)
    }

    /// Something that must never happen has happened; the first one counts.
    pub fn fail(&self, what: &str) {
        self.failure.set(what);
    }

    /// What has gone wrong, if anything.
    pub fn failure(&self) -> Option<String> {
        self.failure.get()
    }

    // Data.

    /// How ranks are fed.
    pub fn feed_rules(&self) -> FeedRules {
        reference::feed_rules(self.scenario.lanes)
    }

    /// Where samples come from.
    pub fn samples(&self) -> Arc<dyn SampleSource> {
        reference::samples(&self.scenario)
    }

    // The store.

    /// A rank's own handle on the store.
    pub fn store(&self, writer: u64) -> CheckpointStore {
        self.open_store(writer, None)
    }

    /// A controller's.
    pub fn store_of(&self, life: &Life) -> CheckpointStore {
        let owner = Owner {
            number: life.number,
            gate: Arc::clone(&life.gate),
        };
        self.open_store(1_000_000 + life.number, Some(owner))
    }

    fn open_store(&self, writer: u64, owner: Option<Owner>) -> CheckpointStore {
        let mut nonce = [0; 16];
        nonce[..8].copy_from_slice(&writer.to_be_bytes());
        let writer = WriterId {
            nonce: WriterNonce(nonce),
            generation: Generation(0),
        };
        let handle = SimStore::new(Arc::clone(&self.behind), Arc::clone(&self.weather), owner);
        CheckpointStore::with_object_store(handle, "", writer).in_parts_of(self.scenario.part_bytes)
    }

    /// The store as it is, without the way to it.
    pub fn store_itself(&self) -> CheckpointStore {
        let writer = WriterId {
            nonce: WriterNonce([0xff; 16]),
            generation: Generation(0),
        };
        CheckpointStore::with_object_store(Arc::clone(&self.behind), "", writer)
    }

    // Processes and the way between them.

    /// Starts a rank's process.
    pub fn new_process(self: &Arc<Self>, life: &Arc<Life>, member: Member) -> Arc<Process> {
        let pid = self.pids.fetch_add(1, Ordering::Relaxed);
        let process = Process::start(self, life, pid, member);
        lock(&self.newest).insert(member.worker, Arc::clone(&process));
        process
    }

    /// The newest process of a worker.
    pub fn newest_of(&self, worker: WorkerId) -> Option<Arc<Process>> {
        lock(&self.newest).get(&worker).cloned()
    }

    /// A controller gives a rank up, whether or not anybody can end it.
    pub fn gives_up(&self, member: Member) {
        lock(&self.given_up).insert(member);
    }

    /// Whether one that was given up is there all the same. A new controller goes on with it, and it may stand before the others or
    /// behind them: then copies that are there do not fit together, and the state is restored.
    pub fn has_one_given_up(&self) -> bool {
        let given_up = lock(&self.given_up);
        let newest = lock(&self.newest);
        newest
            .values()
            .any(|process| process.is_alive() && given_up.contains(&process.member))
    }

    /// The rank processes that are there, in order: those that a controller watches, or those of all hosts.
    pub fn processes(&self, life: &Life) -> Vec<Arc<Process>> {
        if self.hosts.is_empty() {
            return life.processes();
        }
        let newest = lock(&self.newest);
        newest.values().filter(|process| process.is_alive()).cloned().collect()
    }

    /// The process of this very life, if it lives.
    pub fn living(&self, member: Member) -> Option<Arc<Process>> {
        let newest = self.newest_of(member.worker);
        newest.filter(|process| process.member == member && process.is_alive())
    }

    /// What a new controller reads in the run folder of those that were started before.
    pub fn past_lives(&self) -> Vec<PastLife> {
        let newest = lock(&self.newest);
        let past = newest.values().map(|process| PastLife {
            member: process.member,
            lives: process.is_alive(),
        });
        past.collect()
    }

    /// A controller's process is there.
    pub fn begin_life(&self, life: &Arc<Life>) {
        let mut lives = lock(&self.lives);
        lives.retain(|other| other.is_alive());
        lives.push(Arc::clone(life));
    }

    /// A controller's process is gone.
    pub fn end_life(&self, life: &Life) {
        let mut lives = lock(&self.lives);
        let newest = lives.last().map_or(0, |newest| newest.number);
        lives.retain(|other| other.number != life.number || other.number == newest);
    }

    /// The newest controller, alive or not.
    pub fn life(&self) -> Option<Arc<Life>> {
        lock(&self.lives).last().cloned()
    }

    /// All that are there.
    pub fn lives(&self) -> Vec<Arc<Life>> {
        lock(&self.lives).clone()
    }

    /// Ranks find this one from now on.
    pub fn put_in_charge(&self, life: &Arc<Life>) {
        *lock(&self.in_charge) = Some(Arc::clone(life));
    }

    /// Whom ranks find.
    pub fn in_charge(&self) -> Option<Arc<Life>> {
        lock(&self.in_charge).clone()
    }

    /// A person starts another controller in the place of the one that is there, after a while.
    pub fn want_another(self: &Arc<Self>, after: Duration) {
        let world = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            world.another_wanted.notify_one();
        });
    }

    /// Waits until somebody does.
    pub async fn until_another_is_wanted(&self) {
        self.another_wanted.notified().await;
    }

    /// The meeting point of a generation's ranks.
    pub fn meet(&self, process: &Process, generation: Generation, world_size: usize) -> Arc<Generational> {
        let mut meetings = lock(&self.meetings);
        let life = process.life().number;
        let key = (life, generation);
        let numbers = (life << 32) + generation.0;
        let random = self.random("mesh", numbers);
        Arc::clone(
            meetings
                .entry(key)
                .or_insert_with(|| Generational::new(generation, world_size, random)),
        )
    }

    /// A process is gone: nothing is cut off from it any more.
    pub fn forget(&self, process: &Process) {
        lock(&self.cuts).retain(|&(from, to), _| from != process.pid && to != process.pid);
    }

    /// From now on, and for a while, nothing that one process sends reaches another; 0 is the controller.
    pub fn cut(&self, from: u32, to: u32, time: Duration) {
        let until = Instant::now() + time;
        let mut cuts = lock(&self.cuts);
        let cut = cuts.entry((from, to)).or_insert(until);
        *cut = until.max(*cut);
    }

    fn cut_until(&self, from: u32, to: u32) -> Option<Instant> {
        let until = lock(&self.cuts).get(&(from, to)).copied();
        until.filter(|until| *until > Instant::now())
    }

    /// Waits until something sent from one process to another arrives again.
    pub async fn until_open(&self, from: u32, to: u32) {
        while let Some(until) = self.cut_until(from, to) {
            tokio::time::sleep_until(until).await;
        }
    }

    /// Whether nothing comes from one rank to another.
    pub fn is_cut(&self, shared: &Generational, from: usize, to: usize) -> bool {
        let pair = shared.pair(from, to);
        pair.is_some_and(|(from, to)| self.cut_until(from.pid, to.pid).is_some())
    }

    /// When a frame arrives that would have arrived at this time.
    pub fn arrival(&self, shared: &Generational, from: usize, to: usize, arrives: Instant) -> Instant {
        let until = shared
            .pair(from, to)
            .and_then(|(from, to)| self.cut_until(from.pid, to.pid));
        until.map_or(arrives, |until| until.max(arrives))
    }

    /// How long a rank of a world of this size computes in a step.
    pub fn compute_time(&self, world_size: usize) -> Duration {
        let lanes = u64::from(self.scenario.lanes).div_ceil(world_size as u64);
        let usual_us = lanes * self.scenario.lane_ms * 1000;
        Duration::from_micros(lock(&self.compute).between(usual_us * 7 / 10, usual_us * 13 / 10))
    }

    /// Whether frames are being spoiled.
    pub fn spoils_frames(&self) -> bool {
        self.spoiled.load(Ordering::Relaxed)
    }

    /// Whether frames are spoiled from now on.
    pub fn spoil_frames(&self, spoil: bool) {
        self.spoiled.store(spoil, Ordering::Relaxed);
    }

    /// From now on nothing is done to the run any more.
    pub fn calm_down(&self) {
        self.faults_over.store(true, Ordering::Relaxed);
        self.weather.clear();
        self.spoil_frames(false);
        lock(&self.cuts).clear();
    }

    /// Whether nothing is done to the run any more.
    pub fn is_calm(&self) -> bool {
        self.faults_over.load(Ordering::Relaxed)
    }

    /// A recovery takes its next move: the moment for a second fault.
    pub fn in_recovery(self: &Arc<Self>, life: &Arc<Life>, random: &mut Random) {
        let strikes = self.scenario.has(Fault::KillInRecovery) && random.chance(0.06);
        if !strikes || self.faults_over.load(Ordering::Relaxed) {
            return;
        }
        let after = Duration::from_micros(random.between(0, 30_000));
        let choice = random.bits();
        let (world, life) = (Arc::clone(self), Arc::clone(life));
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            let processes = world.processes(&life);
            if let Some(process) = processes.get(choice as usize % processes.len().max(1)) {
                world
                    .history
                    .note(&format!("fault: {} is killed in a recovery", process.member));
                process.end(&world, tarazed_actors::node::ExitCause::Signal(9), None);
            }
        });
    }

    /// How a closed loop dies, if it does now.
    pub fn draw_loop_death<T>(&self, how: impl FnOnce(&mut Random) -> T) -> Option<T> {
        if !self.scenario.has(Fault::KillLoop) || self.is_calm() {
            return None;
        }
        let mut random = lock(&self.loops);
        random.chance(0.1).then(|| how(&mut random))
    }

    /// A crash cut the line short that was being written.
    pub fn tear_trace(&self) {
        use std::io::Write;
        let torn = std::fs::OpenOptions::new()
            .append(true)
            .open(self.paths.trace())
            .and_then(|mut file| file.write_all(b"{\"step\":"));
        let what = if torn.is_ok() { "is torn" } else { "is not there yet" };
        self.history.note(&format!("the trace {what}"));
    }

    // Checks.

    /// The last copy of a shard is gone: that takes as many deaths as there were copies.
    pub fn check_loss(&self) {
        if let Err(failure) = self.losses.explain() {
            self.fail(&failure);
        }
    }

    /// A life of a rank is started once, and only by the controller in charge (SUP-2).
    pub fn check_start(&self, life: &Life, member: Member) {
        if !life.holds() {
            let number = life.number;
            self.fail(&format!("controller {number} starts {member}, and is not in charge"));
        }
        self.check_started_once(member);
    }

    /// A life of a rank is started once (SUP-2), and beside no other of its worker.
    pub fn check_started_once(&self, member: Member) {
        if !lock(&self.started).insert(member) {
            self.fail(&format!("{member} is started twice"));
        }
        let other = self.newest_of(member.worker);
        if let Some(other) = other.filter(|other| other.is_alive()) {
            self.fail(&format!("{member} is started while {} lives", other.member));
        }
    }

    /// Only the controller in charge kills, and nobody is silent because its controller stood still.
    pub fn check_kill(&self, life: &Life, process: &Process, reason: &str) {
        let (number, member) = (life.number, process.member);
        if !life.holds() {
            self.fail(&format!("controller {number} kills {member}, and is not in charge"));
        }
        self.check_silence(process, reason);
    }

    /// Nobody is killed for silence who was never silent.
    pub fn check_silence(&self, process: &Process, reason: &str) {
        let member = process.member;
        let for_silence = ["no heartbeat for", "not back within", "of its start"];
        // One that takes its time to be gone is dead, and may be killed once more.
        if for_silence.iter().any(|why| reason.contains(why)) && !process.is_disturbed() && process.is_alive() {
            self.fail(&format!("{member} is killed ({reason}), and was never silent"));
        }
    }

    /// Each line once, in order, and exactly that of the undisturbed run (STEP-3, STEP-5, DET-1, LOOP-1); acknowledged by
    /// the controller in charge alone.
    pub fn check_line(&self, life: &Life, step: StepsCompleted, text: &str) {
        self.history.note(&format!("line {step}"));
        if !life.holds() {
            let number = life.number;
            self.fail(&format!("controller {number} writes line {step}, and is not in charge"));
        }
        let mut written = lock(&self.written);
        if step != written.next().completed() {
            self.fail(&format!("line {step} follows line {written}", written = *written));
        }
        *written = step;
        let decisions = match self.scenario.persons.then(|| persons::decisions_in(text)).transpose() {
            Ok(decisions) => decisions.unwrap_or_default(),
            Err(cause) => return self.fail(&cause),
        };
        if let Err(failure) = self.persons.recorded(life.number, step, &decisions) {
            self.fail(&failure);
        }
        let persons = decisions.into_iter().filter(|decision| decision.by.is_person());
        match self.reference.line(step, persons.collect()) {
            Ok(Some(expected)) if expected == text => {}
            Ok(expected) => {
                let expected = expected.as_deref().unwrap_or("none");
                self.fail(&format!(
                    "line {step} differs:\n  undisturbed {expected}\n  here        {text}"
                ));
            }
            Err(cause) => self.fail(&format!("the undisturbed run cannot go on to line {step}: {cause}")),
        }
    }
}
