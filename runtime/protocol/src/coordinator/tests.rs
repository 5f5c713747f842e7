//! The machine against a small cluster in which every order of events can happen: ranks advance one at a time through the
//! phases of a step, messages to a rank keep their order, and ranks are killed anywhere.

mod absent;
mod dying;
mod ending;
mod nodes;
mod pace;
mod rollback;
mod trial;
mod world;

use super::*;
use crate::message::{BeginPlan, Claim, Dispute, DisputedItem, ShardHolding, StateReport, ToRank};
use crate::placement::ShardOrigin;
use crate::rollback::Rollbacks;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use tarazed_domain::limits::Timeouts;
use tarazed_domain::{LaneTree, OptimizerShardIndex, StepIndex, WorkerId};

const SHARDS: usize = 6;
const WORKERS: u32 = 4;
/// Those that a world which grows comes to have.
const SLOTS: u32 = 6;
const LAST: u64 = 12;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reached {
    Waiting,
    Computing,
    Entered,
    Passed,
    Updated,
}

#[derive(Debug)]
struct Process {
    incarnation: Incarnation,
    /// The newest generation it heard of.
    newest: Generation,
    inbox: VecDeque<ToRank>,
    plan: Option<Box<BeginPlan>>,
    shards: BTreeMap<u32, (u64, Option<u64>)>,
    passed: u64,
    step: u64,
    reached: Reached,
    /// Asked to pause, asked for a checkpoint.
    asked: (bool, bool),
    /// What it brought to the barrier of its present step, then what the barrier gave.
    wish: (bool, bool),
}

struct Cluster {
    coordinator: Coordinator,
    now_ms: u64,
    processes: BTreeMap<u32, Process>,
    saved: Option<u64>,
    /// Every checkpoint that there is.
    saves: BTreeSet<u64>,
    /// What is decided.
    rollbacks: Rollbacks,
    /// Where there are rollbacks: lines and checkpoints on their way to the machine, which may hear of a pause before.
    later: VecDeque<Event>,
    lines: Vec<u64>,
    /// Newest line finished since the state was last restored.
    floor: u64,
    end: Option<Effect>,
    pending: VecDeque<Event>,
    /// The newest life of each worker that was ever started.
    started: BTreeMap<u32, Incarnation>,
}

fn options() -> Options {
    Options {
        ranks: WORKERS,
        spares: 0,
        lanes: LaneTree::new(8),
        shard_count: SHARDS,
        replicas: 2,
        timeouts: Timeouts::derive(10_000),
        restarts_max: 1000,
        restart_backoff_ms: 1,
        last_step: StepsCompleted(LAST),
        hosts: Vec::new(),
    }
}

impl Cluster {
    fn new() -> Self {
        let mut coordinator = Coordinator::new(options(), Generation(0), StepsCompleted(0));
        let first = coordinator.start(0, &[]);
        let mut cluster = Self {
            coordinator,
            now_ms: 0,
            processes: BTreeMap::new(),
            saved: None,
            saves: BTreeSet::new(),
            rollbacks: Rollbacks::default(),
            later: VecDeque::new(),
            lines: Vec::new(),
            floor: 0,
            end: None,
            pending: VecDeque::new(),
            started: BTreeMap::new(),
        };
        cluster.act(first);
        cluster
    }

    fn event(&mut self, event: Event) {
        self.now_ms += 1;
        let effects = self.coordinator.on_event(self.now_ms, &event);
        self.act(effects);
    }

    fn act(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Start { member, .. } => {
                    let before = self.started.insert(member.worker.0, member.incarnation);
                    assert!(before < Some(member.incarnation), "SUP-2: no life is used twice");
                    let process = Process {
                        incarnation: member.incarnation,
                        newest: Generation(0),
                        inbox: VecDeque::new(),
                        plan: None,
                        shards: BTreeMap::new(),
                        passed: 0,
                        step: 0,
                        reached: Reached::Waiting,
                        asked: (false, false),
                        wish: (false, false),
                    };
                    self.processes.insert(member.worker.0, process);
                    self.pending.push_back(Event::Ready {
                        member,
                        address: String::new(),
                        pid: 1,
                        newest: Generation(0),
                    });
                }
                Effect::Adopt { member } => {
                    let newest = self.processes[&member.worker.0].newest;
                    self.pending.push_back(Event::Ready {
                        member,
                        address: String::new(),
                        pid: 1,
                        newest,
                    });
                }
                Effect::Kill { member, .. } => self.kill(member.worker.0),
                Effect::Send { members, message } => {
                    for member in members {
                        self.deliver(member, message.clone());
                    }
                }
                Effect::Begin { plan } => {
                    for entry in &plan.roster {
                        self.deliver(entry.member, ToRank::Begin(Box::new(BeginPlan::clone(&plan))));
                    }
                }
                Effect::FindCheckpoint { rollbacks, .. } => {
                    self.floor = 0;
                    let mut live = self.saves.iter().rev();
                    let found = match self.rollbacks.last() {
                        Some(_) => live.find(|&&step| rollbacks.is_live(StepsCompleted(step))).copied(),
                        None => self.saved,
                    };
                    let checkpoint = found.map(|step| RestoreFrom {
                        step: StepsCompleted(step),
                        manifest_key: "manifest".to_owned(),
                        length: 0,
                        blake3: [0; 32],
                    });
                    self.pending.push_back(Event::Located { checkpoint });
                }
                Effect::Note(_) => {}
                end @ (Effect::Halt { .. } | Effect::Done { .. }) => self.end = Some(end),
            }
        }
    }

    fn deliver(&mut self, member: Member, message: ToRank) {
        if let Some(process) = self.processes.get_mut(&member.worker.0)
            && process.incarnation == member.incarnation
        {
            process.inbox.push_back(message);
        }
    }

    fn kill(&mut self, worker: u32) {
        if let Some(process) = self.processes.remove(&worker) {
            let member = Member {
                worker: WorkerId(worker),
                incarnation: process.incarnation,
            };
            self.pending
                .retain(|event| !matches!(event, Event::Ready { member: m, .. } if *m == member));
            self.event(Event::Exited {
                member,
                cause: "killed".to_owned(),
                orderly: false,
            });
        }
    }

    /// The controller dies, and another one takes over: it knows the trace, and who was started. Its claim may be far
    /// below the generations that the one before went through.
    fn take_over(&mut self) {
        self.pending.clear();
        self.processes.retain(|_, process| process.newest != Generation(0));
        self.processes.values_mut().for_each(|process| process.inbox.clear());
        let written = self.coordinator.written;
        let ranks = self.coordinator.options.ranks;
        self.coordinator = Coordinator::new(Options { ranks, ..options() }, Generation(1), written);
        let past: Vec<PastLife> = self
            .started
            .iter()
            .map(|(&worker, &incarnation)| PastLife {
                member: Member {
                    worker: WorkerId(worker),
                    incarnation,
                },
                lives: self.processes.contains_key(&worker),
            })
            .collect();
        self.tell_rollbacks();
        let effects = self.coordinator.start(self.now_ms, &past);
        self.act(effects);
    }

    fn tell_rollbacks(&mut self) {
        let rollbacks = self.rollbacks.clone();
        self.coordinator.on_event(self.now_ms, &Event::GoesBack { rollbacks });
    }

    /// A fact that comes from the trace or the store.
    fn hear(&mut self, event: Event) {
        if self.rollbacks.last().is_some() {
            self.later.push_back(event);
        } else {
            self.event(event);
        }
    }

    /// The next of these facts.
    fn hear_later(&mut self) -> bool {
        let Some(event) = self.later.pop_front() else {
            return false;
        };
        if let Event::CheckpointCommitted { step } = &event {
            self.saves.insert(step.0);
        }
        self.event(event);
        true
    }

    /// Whether a rank of this plan stops at this count, to be rolled back.
    fn stops_at(&self, plan: &BeginPlan, step: u64) -> bool {
        let state = StepsCompleted(step);
        self.rollbacks.start_of(plan.rollbacks.next(state)) != state
    }

    /// One rank reads its next message.
    fn read(&mut self, worker: u32) {
        let Some(process) = self.processes.get_mut(&worker) else {
            return;
        };
        let member = Member {
            worker: WorkerId(worker),
            incarnation: process.incarnation,
        };
        match process.inbox.pop_front() {
            Some(ToRank::Fence { generation }) => {
                assert!(
                    generation > process.newest,
                    "a fence is newer than all that was heard of"
                );
                process.newest = generation;
                process.reached = Reached::Waiting;
                process.plan = None;
                let shards = process
                    .shards
                    .iter()
                    .map(|(&shard, &(state, reduced))| ShardHolding {
                        shard: OptimizerShardIndex(shard),
                        state: StepsCompleted(state),
                        reduced: reduced.map(StepsCompleted),
                    })
                    .collect();
                let passed = (process.passed > 0).then(|| outcome(process.passed));
                let report = StateReport {
                    shards,
                    passed,
                    lines: vec![],
                    waits_for: None,
                };
                self.event(Event::State {
                    member,
                    generation,
                    report,
                });
            }
            Some(ToRank::Begin(plan)) => self.begin(worker, plan),
            Some(ToRank::Pause { checkpoint, .. }) => process.asked = (true, process.asked.1 || checkpoint),
            Some(ToRank::Shutdown) => {
                self.processes.remove(&worker);
                self.event(Event::Exited {
                    member,
                    cause: "left".to_owned(),
                    orderly: true,
                });
            }
            Some(ToRank::Checkpoint { .. } | ToRank::Acknowledge { .. }) | None => {}
        }
    }

    fn begin(&mut self, worker: u32, plan: Box<BeginPlan>) {
        let fresh = plan
            .shards
            .holders()
            .iter()
            .any(|h| !matches!(h.origin, ShardOrigin::Keep | ShardOrigin::CopyFrom(_)));
        assert!(
            fresh || plan.base.0 >= self.floor,
            "STEP-2: a finished step is never lost to a live agreement"
        );
        let Some(process) = self.processes.get_mut(&worker) else {
            return;
        };
        let base = plan.base.0;
        let rank = plan
            .roster
            .iter()
            .position(|e| e.member.worker.0 == worker)
            .expect("a member gets the plan");
        let held = std::mem::take(&mut process.shards);
        let rollbacks = &self.rollbacks;
        let start_of = |count: u64| rollbacks.start_of(StepIndex(count - 1)).0;
        for (shard, holders) in plan.shards.iter().enumerate() {
            for holder in holders.iter().filter(|holder| holder.rank.index() == rank) {
                if holder.origin == ShardOrigin::Keep {
                    let (state, reduced) = held[&(shard as u32)];
                    assert!(
                        state == base || (start_of(base) == state && reduced == Some(base)),
                        "STEP-1 makes it finishable"
                    );
                    assert!(state == base || plan.outcome.as_ref().is_some_and(|o| o.step.0 == base));
                }
                process.shards.insert(shard as u32, (base, None));
            }
        }
        process.newest = plan.generation;
        process.passed = plan.outcome.as_ref().map_or(0, |outcome| outcome.step.0);
        process.step = base;
        process.asked = (false, false);
        process.reached = Reached::Computing;
        let member = plan.roster[rank].member;
        let generation = plan.generation;
        let (saving, ends) = (plan.checkpoint_at_base, plan.base >= plan.last_step);
        let process_plan = plan.clone();
        process.plan = Some(plan);
        let (processes, roster) = (&self.processes, &process_plan.roster);
        let everybody = roster.iter().all(|entry| {
            let theirs = processes
                .get(&entry.member.worker.0)
                .and_then(|process| process.plan.as_ref());
            theirs.is_some_and(|theirs| theirs.generation == generation)
        });
        if everybody && !fresh && base > 0 && !self.lines.contains(&base) {
            // Whoever holds the base's outcome completes its line, newcomers too: the one that had it may be dead. The
            // all-gather of the hashes before it has heard everybody, so all have applied the outcome.
            self.lines.push(base);
            self.floor = base;
            self.hear(Event::LineWritten {
                step: StepsCompleted(base),
            });
        }
        let stops = ends || self.stops_at(&process_plan, base);
        let Some(process) = self.processes.get_mut(&worker) else {
            return;
        };
        if stops {
            process.reached = Reached::Waiting;
            if saving {
                self.saved = Some(base);
                self.hear(Event::LineWritten {
                    step: StepsCompleted(base),
                });
            }
            self.event(Event::Paused {
                member,
                generation,
                step: StepsCompleted(base),
                saving,
            });
            if saving {
                self.hear(Event::CheckpointCommitted {
                    step: StepsCompleted(base),
                });
            }
        }
    }

    /// One rank does its next piece of a step, if its peers allow it.
    fn advance(&mut self, worker: u32) {
        let Some(process) = self.processes.get(&worker) else {
            return;
        };
        let Some(plan) = process.plan.clone() else { return };
        let peers: Vec<(Reached, u64, (bool, bool))> = plan
            .roster
            .iter()
            .filter_map(|e| {
                self.processes
                    .get(&e.member.worker.0)
                    .filter(|p| p.incarnation == e.member.incarnation)
            })
            .filter(|p| p.plan.as_ref().is_some_and(|q| q.generation == plan.generation))
            .map(|p| (p.reached, p.step, p.wish))
            .collect();
        let step = process.step;
        let done = plan.rollbacks.next(StepsCompleted(step)).completed().0;
        let all = |needed: Reached| {
            peers.len() == plan.roster.len() && peers.iter().all(|&(r, s, _)| s > step || (s == step && r >= needed))
        };
        let next = match process.reached {
            Reached::Computing if all(Reached::Computing) => Reached::Entered,
            Reached::Entered if all(Reached::Entered) => Reached::Passed,
            Reached::Passed => Reached::Updated,
            Reached::Updated if all(Reached::Updated) => Reached::Computing,
            _ => return,
        };
        let member = Member {
            worker: WorkerId(worker),
            incarnation: process.incarnation,
        };
        let process = self.processes.get_mut(&worker).expect("looked up above");
        process.reached = next;
        match next {
            Reached::Entered => {
                process.wish = process.asked;
                process.shards.values_mut().for_each(|shard| shard.1 = Some(done));
            }
            Reached::Passed => {
                // The barrier gathers everybody's wishes, so all that pass it agree on them.
                let given = peers
                    .iter()
                    .fold((false, false), |all, &(_, _, wish)| (all.0 || wish.0, all.1 || wish.1));
                process.wish = given;
                process.passed = done;
            }
            Reached::Updated => {
                let from = self.rollbacks.start_of(StepIndex(done - 1)).0;
                for shard in process.shards.values_mut() {
                    assert_eq!(shard.0, from, "step {done} goes on from the state that is decided");
                    shard.0 = done;
                }
            }
            _ => {
                process.step = done;
                let first = plan.roster[0].member == member;
                let (pause, checkpoint) = process.wish;
                let saving = checkpoint || done.is_multiple_of(5) || done == LAST;
                if first {
                    self.lines.push(done);
                    self.floor = done;
                    self.hear(Event::LineWritten {
                        step: StepsCompleted(done),
                    });
                    if saving {
                        self.saved = Some(done);
                        self.hear(Event::CheckpointCommitted {
                            step: StepsCompleted(done),
                        });
                    }
                }
                if pause || done == LAST || self.stops_at(&plan, done) {
                    let process = self.processes.get_mut(&worker).expect("looked up above");
                    process.reached = Reached::Waiting;
                    let event = Event::Paused {
                        member,
                        generation: plan.generation,
                        step: StepsCompleted(done),
                        saving,
                    };
                    self.event(event);
                }
            }
        }
    }
}

fn outcome(step: u64) -> BarrierOutcome {
    BarrierOutcome {
        step: StepsCompleted(step),
        grad_norm: 1.0,
        loss: 1.0,
        stats: vec![],
        skipped: false,
        pause: false,
        checkpoint: false,
        busy: false,
    }
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Advance(u32),
    Read(u32),
    Fact,
    Kill(u32),
    KillSlowly(u32),
    Resize(u32),
    TakeOver,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        48 => (0..SLOTS).prop_map(Act::Advance),
        24 => (0..SLOTS).prop_map(Act::Read),
        12 => Just(Act::Fact),
        3 => (0..SLOTS).prop_map(Act::Kill),
        3 => (0..SLOTS).prop_map(Act::KillSlowly),
        1 => (1..=SLOTS).prop_map(Act::Resize),
        1 => Just(Act::TakeOver),
    ];
    prop::collection::vec(act, 100..600)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// STEP-1..3 and SUP-2 under random kills, changes of the world's size, and controllers that take over: the run always
    /// ends, every line is finished, and no live agreement goes back behind a finished step.
    #[test]
    fn any_kills_in_any_order_end_in_the_same_lines(acts in acts()) {
        let mut cluster = Cluster::new();
        cluster.live_through(acts);
        prop_assert_eq!(&cluster.end, &Some(Effect::Done { code: 0 }), "phase {:?}", cluster.coordinator.phase);
        let lines: BTreeSet<u64> = cluster.lines.iter().copied().collect();
        prop_assert_eq!(lines, (1..=LAST).collect::<BTreeSet<u64>>());
    }
}

impl Cluster {
    /// What is done to it; then, left alone, it must come to its end.
    fn live_through(&mut self, acts: Vec<Act>) {
        for act in acts {
            match act {
                Act::Advance(worker) => self.advance(worker),
                Act::Read(worker) => self.read(worker),
                Act::Kill(worker) => self.kill(worker),
                Act::KillSlowly(worker) => self.kill_slowly(worker),
                Act::Resize(ranks) => self.event(Event::Resize { ranks }),
                Act::TakeOver if self.end.is_none() => self.take_over(),
                Act::TakeOver => {}
                Act::Fact if self.hear_later() => {}
                Act::Fact => {
                    if let Some(event) = self.pending.pop_front() {
                        self.event(event);
                    }
                }
            }
        }
        for _ in 0..20_000 {
            if self.end.is_some() {
                break;
            }
            self.settle(1);
            self.event(Event::Tick);
        }
    }

    /// Lets everything that waits happen, so many times.
    fn settle(&mut self, rounds: usize) {
        for _ in 0..rounds {
            while self.hear_later() {}
            while let Some(event) = self.pending.pop_front() {
                self.event(event);
            }
            for worker in 0..SLOTS {
                self.read(worker);
                self.advance(worker);
            }
        }
    }

    fn member(&self, worker: u32) -> Member {
        Member {
            worker: WorkerId(worker),
            incarnation: self.processes[&worker].incarnation,
        }
    }

    /// It lives, and does nothing new.
    fn heartbeat(&self, member: Member) -> Event {
        Event::Heartbeat {
            member,
            generation: self.coordinator.generation(),
            step: StepsCompleted(0),
            progress: 0,
            activity: String::new(),
            lane_us: 0,
            stored_bytes: 0,
        }
    }

    fn with_restarts(restarts_max: u32) -> Self {
        let mut cluster = Self::new();
        cluster.coordinator.options.restarts_max = restarts_max;
        for limiter in cluster.coordinator.workers.limiters_mut() {
            *limiter = RestartLimiter::new(restarts_max, 1);
        }
        cluster
    }
}

/// SUP-3: lines that are only checked again are no progress.
#[test]
fn a_crash_that_every_replay_comes_back_to_ends_the_run() {
    let mut cluster = Cluster::with_restarts(4);
    cluster.settle(40);
    let reached = cluster.coordinator.written;
    assert!(reached > StepsCompleted(0) && cluster.end.is_none());
    for round in 0..8 {
        (0..SLOTS).for_each(|worker| cluster.kill(worker));
        if cluster.end.is_some() {
            break;
        }
        assert!(round < 4, "it never ends");
        // All come back, and replay to where they died without a new line.
        while let Some(event) = cluster.pending.pop_front() {
            cluster.event(event);
        }
        cluster.event(Event::LineWritten { step: reached });
    }
    assert!(
        matches!(&cluster.end, Some(Effect::Halt { code: 3, .. })),
        "{:?}",
        cluster.end
    );
}

/// SUP-3: the others save the state before a run with a hopeless worker halts.
#[test]
fn a_worker_given_up_halts_the_run_behind_a_last_checkpoint() {
    let mut cluster = Cluster::with_restarts(3);
    cluster.settle(20);
    assert!(cluster.coordinator.is_running());
    for _ in 0..3 {
        cluster.kill(2);
    }
    assert!(cluster.end.is_none(), "the state is saved first");
    cluster.settle(200);
    let Some(Effect::Halt { code: 3, diagnosis }) = &cluster.end else {
        panic!("{:?}", cluster.end)
    };
    assert!(diagnosis.contains("worker 2 died 3 times"), "{diagnosis}");
    assert_eq!(cluster.saved, cluster.lines.iter().max().copied());
}

/// SUP-3
#[test]
fn a_rank_that_dies_at_every_start_halts_the_run_with_the_chain_of_causes() {
    let mut cluster = Cluster::with_restarts(3);
    for _ in 0..3 {
        cluster.kill(2);
    }
    let Some(Effect::Halt { code: 3, diagnosis }) = &cluster.end else {
        panic!("{:?}", cluster.end)
    };
    assert!(diagnosis.contains("worker 2 died 3 times"), "{diagnosis}");
}

/// SUP-2
#[test]
fn messages_of_other_lives_and_generations_are_refused_and_counted() {
    let mut cluster = Cluster::new();
    let stranger = Member {
        worker: WorkerId(1),
        incarnation: Incarnation(7),
    };
    let ready = Event::Ready {
        member: stranger,
        address: String::new(),
        pid: 9,
        newest: Generation(0),
    };
    let effects = cluster.coordinator.on_event(1, &ready);
    assert!(matches!(effects[..], [Effect::Kill { member, .. }] if member == stranger));
    let member = Member {
        worker: WorkerId(1),
        incarnation: Incarnation(0),
    };
    let report = StateReport::default();
    let stale = Event::State {
        member,
        generation: Generation(99),
        report,
    };
    assert!(cluster.coordinator.on_event(2, &stale).is_empty());
    assert_eq!(cluster.coordinator.refused_count(), 2);
}

/// A driver in virtual time goes from deadline to deadline: a tick before one does nothing, and a tick at it does.
#[test]
fn ticks_between_deadlines_do_nothing() {
    let mut cluster = Cluster::new();
    let late = cluster
        .coordinator
        .next_deadline_ms()
        .expect("everybody is told to start");
    assert_eq!(late, Timeouts::derive(10_000).start_ms + 1);
    cluster.settle(20);
    assert!(cluster.coordinator.is_running());
    assert_eq!(
        cluster.coordinator.next_deadline_ms(),
        None,
        "silence aside, nothing is due"
    );
    cluster.kill(1);
    // One that hangs reads nothing, so the fence has to run out.
    let fence = cluster
        .coordinator
        .next_deadline_ms()
        .expect("a fence is answered in time");
    cluster.coordinator.skip_idle_ticks(fence - 1);
    for worker in 0..WORKERS {
        let member = cluster.member(worker);
        let (generation, activity) = (cluster.coordinator.generation(), String::new());
        let step = StepsCompleted(0);
        let heartbeat = Event::Heartbeat {
            member,
            generation,
            step,
            progress: 0,
            activity,
            lane_us: 0,
            stored_bytes: 0,
        };
        assert_eq!(cluster.coordinator.on_event(fence - 1, &heartbeat), []);
    }
    assert_eq!(cluster.coordinator.on_event(fence - 1, &Event::Tick), []);
    let killed = cluster.coordinator.on_event(fence, &Event::Tick);
    assert_eq!(killed.len(), 3, "{killed:?}");
    let silent = cluster.coordinator.silence_deadline_ms(WorkerId(0)).expect("a member");
    assert_eq!(silent, fence - 1 + Timeouts::derive(10_000).suspect_ms + 1);
    assert_eq!(cluster.coordinator.silence_deadline_ms(WorkerId(1)), None, "it starts");
    assert_eq!(cluster.coordinator.silence_deadline_ms(WorkerId(99)), None);
}

/// All members of a generation get the very same plan.
#[test]
fn a_plan_is_made_once_for_everybody() {
    let mut cluster = Cluster::new();
    while let Some(event) = cluster.pending.pop_front() {
        cluster.now_ms += 1;
        let effects = cluster.coordinator.on_event(cluster.now_ms, &event);
        let plans: Vec<usize> = effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Begin { plan } => Some(plan.roster.len()),
                _ => None,
            })
            .collect();
        if !plans.is_empty() {
            assert_eq!(plans, [WORKERS as usize]);
            return;
        }
        cluster.act(effects);
    }
    panic!("a generation begins once everybody is ready");
}
