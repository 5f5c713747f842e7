//! Membership: who is in which generation, and what each member does next. A pure machine.
//!
//! ```text
//!  Adopting -- some came back, with what they hold --> Fencing
//!      | nobody left
//!      v      all ready                 state of the run known
//!   Forming ------------> Locating -----------------------------> Running <---------+
//!      ^                     ^                                      |  ^            |
//!      | nobody left         | a shard has no copy left   loss, or  |  | agreed     | begin
//!      |                     |                            paused to |  | (STEP-2)   |
//!      +------------------ Fencing <--------------------- admit ----+  +--- Fencing-+
//!                                                                   |
//!                                            paused at the end -> Finishing -> Leaving -> Done
//! ```
//!
//! - **SUP-2** identity is (worker, incarnation); what comes from another life or generation is refused and counted.
//! - **SUP-3** restarts, and generations that commit nothing, are bounded; then the run halts with the chain of causes.
//! - A hang shows by progress: where no member's device thread has done anything for a while, all are fenced, and the one
//!   that cannot answer is killed. A pair that cannot hear each other shows by what they wait for: one is replaced.
//! - Survivors never wait for a replacement: it is admitted at a later step boundary (DESIGN.md section 6). A spare is there
//!   already, and takes part from the next generation on.
//! - A rollback is a pause at its boundary. Once the line of that boundary is written, what all hold is dead: the state that
//!   is gone back to is restored and made as after a loss, and the same generation goes on behind the boundary.
//! - A world that shrinks keeps those who leave for one more generation, without shards, so that the others copy from them.
//!
//! The machine knows no clock: `now_ms` comes with each event. It sends nothing: effects say what should be sent.

mod alarm;
mod deadlines;
mod events;
mod flow;
mod pace;
mod plan;
mod resize;
#[cfg(test)]
mod tests;
mod trial;
mod workers;

use alarm::Alarm;
pub use events::{Effect, Event, Incident, Options, PastLife};

use crate::commit::{Agreement, Holders, Survey};
use crate::message::{BarrierOutcome, BeginPlan, Member, RestoreFrom};
use crate::placement::Placement;
use crate::restart::RestartLimiter;
use crate::rollback::Rollbacks;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tarazed_domain::{Generation, Incarnation, Mutant, Rank, StepsCompleted, WorkerId};
use trial::Trial;
use workers::{WorkerSet, Workers};

/// Tries of the run's last checkpoint; then the run ends for now, to be started again.
const LAST_SAVES_MAX: u32 = 4;

/// Where one worker stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WorkerPhase {
    /// Told to start, not heard of yet.
    Starting {
        /// Since when; the wait before the start included.
        deadline_ms: u64,
    },
    /// Ready and holding nothing: waits to be admitted.
    Ready,
    /// In the roster of the present generation, or a survivor of it.
    Member,
    /// Killed or crashed, and not gone yet: it is counted on no more.
    Ending {
        /// What it was.
        rank: Option<Rank>,
        /// How long it had not been heard of when its end began.
        silent_ms: u64,
    },
    /// Told to end, because the world has no place for it.
    Released,
    /// It has no process: left in order at the end, given up, or not wanted in a world of the present size.
    Left,
}

/// One worker slot: what every generation touches. The rest of it is in `Workers`.
#[derive(Debug)]
pub struct Worker {
    incarnation: Incarnation,
    phase: WorkerPhase,
    heard_ms: u64,
    step: StepsCompleted,
    /// Work of its device thread, as last heard.
    progress: u64,
    /// Its time for a lane, as last heard; 0 where it is not known.
    lane_us: u64,
    /// What its process has stored of checkpoints, as last heard.
    stored_bytes: u64,
    /// Whom its data plane waited for at the last fence.
    waits_for: Option<Rank>,
}

/// A worker as `status` shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WorkerView {
    /// Identity.
    pub member: Member,
    /// Process id; 0 before it is ready.
    pub pid: u32,
    /// Rank in the present generation.
    pub rank: Option<Rank>,
    /// Lanes it computes.
    pub lanes: Option<tarazed_domain::LaneRange>,
    /// Steps completed, as last heard.
    pub step: StepsCompleted,
    /// `starting`, `ready`, `training`, `recovering`, `paused`, `ending` or `left`.
    pub state: &'static str,
    /// What its device thread does, as last heard.
    pub activity: String,
}

#[derive(Debug)]
enum Phase {
    /// Waits for the ranks that an earlier controller left behind: each comes back, or ends, or is ended when it is late.
    Adopting { awaiting: WorkerSet },
    /// Waits until every worker is ready.
    Forming,
    /// Waits to hear which checkpoint to start from.
    Locating,
    /// Waits for the survivors' reports.
    Fencing {
        deadline_ms: u64,
        /// Why the generation before ended, if by something that its members saw.
        alarm: Option<Alarm>,
        awaiting: WorkerSet,
        survey: Survey,
    },
    /// A generation runs.
    Running {
        paused: WorkerSet,
        pause_sent: bool,
        failed: Option<(u64, String)>,
        /// Those named as silent by others, once for each complaint.
        suspects: Vec<Member>,
    },
    /// All stand at the last step; the last checkpoint is being committed. Shards that come put the deadline off.
    Finishing { step: StepsCompleted, deadline_ms: u64 },
    /// Told to leave.
    Leaving { deadline_ms: u64 },
    /// Over.
    Done,
}

/// The membership machine.
#[derive(Debug)]
pub struct Coordinator {
    options: Options,
    workers: Workers,
    generation: Generation,
    phase: Phase,
    roster: Vec<(Member, tarazed_domain::LaneRange)>,
    primaries: Vec<Member>,
    /// The plan of the present generation, or of the last one.
    plan: Option<Arc<BeginPlan>>,
    written: StepsCompleted,
    checkpointed: Option<StepsCompleted>,
    /// A checkpoint that could not be made, why, and whether the store was full; looked at where it is the last one.
    save_failed: Option<(StepsCompleted, String, bool)>,
    /// Tries of the last checkpoint that failed.
    last_saves: RestartLimiter,
    /// When the last tick came: a gap is this process's own absence.
    ticked_ms: Option<u64>,
    /// A generation has begun in this controller's life.
    begun: bool,
    stop: Option<u64>,
    /// A decision ends the run with this count.
    ends_at: Option<StepsCompleted>,
    /// In force, acted or not.
    rollbacks: Rollbacks,
    /// The run halts with this once its last checkpoint exists.
    verdict: Option<(u8, String)>,
    /// Causes of generations that ended without a line since the last one that wrote one (SUP-3).
    fruitless: RestartLimiter,
    refused_count: u64,
    /// What ranks differ in, until it is settled.
    trial: Option<Trial>,
    /// What the survivors hold is not to be believed: the state comes from a checkpoint.
    distrusted: bool,
    /// Checkpoints of this step and later ones are not to be believed either.
    refuted: Option<StepsCompleted>,
    /// What was wrong with those whose objects could not be read, since a checkpoint was committed.
    unreadable: Vec<String>,
    /// Nodes on which nobody starts or ends processes now.
    away: BTreeSet<u32>,
    /// Newer lives than are known here that said they are ready: which, address, process id and newest generation.
    unexpected: BTreeMap<WorkerId, (Incarnation, String, u32, Generation)>,
    /// Relative speeds of those that are not as fast as the rest.
    slow: BTreeMap<Member, u32>,
    /// Since when other lanes would make steps much shorter, and when that was last looked at.
    uneven_since_ms: Option<u64>,
    looked_at_pace_ms: u64,
    /// When a member's device thread last did anything, as heard.
    progressed_ms: u64,
    /// How long nobody may make any progress before all are asked. Doubles with each alarm that was false.
    stall_ms: u64,
    /// How often each member was named without a line in between.
    strikes: BTreeMap<Member, u32>,
}

impl Coordinator {
    /// The run ends with this count.
    fn last_step(&self) -> StepsCompleted {
        let configured = self.options.last_step;
        self.ends_at.map_or(configured, |step| step.min(configured))
    }

    /// Rollbacks that have acted: the line before their step is written, and the run does not end with it.
    #[must_use]
    pub fn acted(&self) -> Rollbacks {
        let before_end = StepsCompleted(self.last_step().0.saturating_sub(1));
        self.rollbacks.acted(self.written.min(before_end))
    }

    /// A machine for a run whose trace is written through `written`, and whose previous controller ended with
    /// `generation`.
    #[must_use]
    pub fn new(options: Options, generation: Generation, written: StepsCompleted) -> Self {
        let fruitless = RestartLimiter::new(options.restarts_max.saturating_mul(4).max(8), 0);
        let stall_ms = options.timeouts.suspect_ms;
        let away = options.hosts.iter().copied().collect();
        Self {
            options,
            workers: Workers::default(),
            generation,
            phase: Phase::Forming,
            roster: Vec::new(),
            primaries: Vec::new(),
            plan: None,
            written,
            checkpointed: None,
            save_failed: None,
            last_saves: RestartLimiter::new(LAST_SAVES_MAX, 0),
            ticked_ms: None,
            begun: false,
            stop: None,
            ends_at: None,
            rollbacks: Rollbacks::default(),
            verdict: None,
            fruitless,
            refused_count: 0,
            trial: None,
            distrusted: false,
            refuted: None,
            unreadable: Vec::new(),
            away,
            unexpected: BTreeMap::new(),
            slow: BTreeMap::new(),
            uneven_since_ms: None,
            looked_at_pace_ms: 0,
            progressed_ms: 0,
            stall_ms,
            strikes: BTreeMap::new(),
        }
    }

    /// The first effects: start every worker but those whose `past` life is still there. Those are waited for, since they
    /// hold the state, and a worker's next life is one after its past one (SUP-2).
    pub fn start(&mut self, now_ms: u64, past: &[PastLife]) -> Vec<Effect> {
        // Whoever stands still before the first tick was absent, too.
        self.ticked_ms = Some(now_ms);
        let timeouts = self.options.timeouts;
        let past_slots = past.iter().map(|past| past.member.worker.0 + 1).max();
        let slots = past_slots.unwrap_or(0).max(self.slots_wanted());
        let mut newest: BTreeMap<WorkerId, PastLife> = BTreeMap::new();
        newest.extend(past.iter().map(|past| (past.member.worker, *past)));
        let mut awaiting = WorkerSet::default();
        let mut effects = Vec::new();
        for worker in (0..slots).map(WorkerId) {
            let past = newest.get(&worker);
            let lives = past.is_some_and(|past| past.lives);
            let incarnation = past.map_or(Incarnation(0), |past| match past.lives {
                true => past.member.incarnation,
                false => past.member.incarnation.next(),
            });
            let patience_ms = if lives { timeouts.failure_ms } else { timeouts.start_ms };
            let member = self.new_worker(now_ms, now_ms + patience_ms, incarnation);
            if lives {
                awaiting.insert(worker);
                effects.push(Effect::Adopt { member });
            } else if self.is_wanted(worker) {
                effects.push(Effect::Start { member, after_ms: 0 });
            } else {
                self.workers.set_phase(worker, WorkerPhase::Left);
            }
        }
        if !awaiting.is_empty() {
            self.phase = Phase::Adopting { awaiting };
        }
        effects
    }

    fn new_worker(&mut self, now_ms: u64, deadline_ms: u64, incarnation: Incarnation) -> Member {
        let limiter = RestartLimiter::new(self.options.restarts_max, self.options.restart_backoff_ms);
        self.workers.push(now_ms, deadline_ms, incarnation, limiter)
    }

    /// Processes of a whole world: its ranks, and the spares.
    const fn slots_wanted(&self) -> u32 {
        self.options.ranks + self.options.spares
    }

    /// Whether a world of the present size has this worker, as a rank or a spare.
    const fn is_wanted(&self, worker: WorkerId) -> bool {
        worker.0 < self.slots_wanted()
    }

    /// How many ranks the world should have.
    #[must_use]
    pub const fn ranks_wanted(&self) -> u32 {
        self.options.ranks
    }

    /// The present generation.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// Messages of other lives or generations refused so far (SUP-2).
    #[must_use]
    pub const fn refused_count(&self) -> u64 {
        self.refused_count
    }

    /// Whether a generation runs.
    #[must_use]
    pub const fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running { .. })
    }

    /// Whether the run is over and ranks are being told to leave.
    #[must_use]
    pub const fn is_leaving(&self) -> bool {
        matches!(self.phase, Phase::Leaving { .. } | Phase::Done)
    }

    /// Holders of each optimizer shard in the present generation, primary first.
    #[must_use]
    pub fn placement(&self) -> Option<&Placement> {
        self.plan.as_ref().map(|plan| &plan.shards)
    }

    /// The roster of the present generation, by rank.
    #[must_use]
    pub fn roster(&self) -> &[(Member, tarazed_domain::LaneRange)] {
        &self.roster
    }

    /// Every worker, for `status`.
    #[must_use]
    pub fn workers(&self) -> Vec<WorkerView> {
        self.workers
            .iter()
            .map(|(member, w)| {
                let state = match (&w.phase, &self.phase) {
                    (WorkerPhase::Starting { .. }, _) => "starting",
                    (WorkerPhase::Ready, _) => "ready",
                    (WorkerPhase::Ending { .. }, _) => "ending",
                    (WorkerPhase::Released | WorkerPhase::Left, _) => "left",
                    (WorkerPhase::Member, Phase::Running { paused, .. }) if paused.contains(member.worker) => "paused",
                    (WorkerPhase::Member, Phase::Running { .. }) => "training",
                    (WorkerPhase::Member, Phase::Finishing { .. } | Phase::Leaving { .. } | Phase::Done) => "paused",
                    (WorkerPhase::Member, _) => "recovering",
                };
                let rank = self.rank_of(member);
                WorkerView {
                    member,
                    pid: self.workers.pid(member.worker),
                    rank,
                    lanes: rank.map(|rank| self.roster[rank.index()].1),
                    step: w.step,
                    state,
                    activity: self.workers.activity(member.worker).to_owned(),
                }
            })
            .collect()
    }

    /// Whether a message of `member` counts; one of another life is refused and counted (SUP-2).
    pub fn admits(&mut self, member: Member) -> bool {
        self.knows(member)
    }

    fn knows(&mut self, member: Member) -> bool {
        let known = self
            .workers
            .get(member.worker)
            .is_some_and(|w| w.incarnation == member.incarnation || Mutant::IncarnationUnchecked.is_on());
        if !known {
            self.refused_count += 1;
        }
        known
    }

    /// Whether a message of `member` in `generation` counts; else it is refused and counted (SUP-2).
    pub fn is_current(&mut self, member: Member, generation: Generation) -> bool {
        let fresh = generation == self.generation || Mutant::GenerationUnchecked.is_on();
        let current = fresh && self.knows(member);
        if !current && generation != self.generation {
            self.refused_count += 1;
        }
        current
    }

    /// Its rank in the present roster, if it has one.
    fn rank_of(&self, member: Member) -> Option<Rank> {
        let rank = self.workers.seat(member.worker)?;
        let seated = self
            .roster
            .get(rank.index())
            .is_some_and(|(seated, _)| *seated == member);
        seated.then_some(rank)
    }

    fn in_roster(&self, member: Member) -> bool {
        self.rank_of(member).is_some()
    }
}

/// What a generation starts from, before it is spread over a roster.
#[derive(Debug)]
pub(crate) struct Ground {
    pub(crate) base: StepsCompleted,
    pub(crate) outcome: Option<BarrierOutcome>,
    /// Per shard the members that hold it whole; nobody where the state is restored or initialised.
    pub(crate) holders: Holders,
    pub(crate) restore: Option<RestoreFrom>,
}

impl From<Agreement> for Ground {
    fn from(Agreement { base, outcome, holders }: Agreement) -> Self {
        Self {
            base,
            outcome,
            holders,
            restore: None,
        }
    }
}
