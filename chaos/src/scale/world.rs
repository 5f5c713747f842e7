//! The world in virtual time: a queue of happenings, the runtime's membership machine, and what its effects lead to.
//!
//! Time goes from happening to happening. Between them ranks compute steps, which nobody simulates: how many were
//! committed is arithmetic ([`Stretch`]). Whatever the machine must be told it is told, message by message.

use super::causes::{self, Drawn};
use super::cost::From;
use super::fleet::{Fleet, Stage, Start, Trouble};
use super::holdings::Holdings;
use super::ledger::{CHARGE_ADMISSION, Ledger, Stretch};
use super::report::{FaultRecord, Tally};
use super::saves::Saves;
use super::setup::Setup;
use crate::sim::random::Random;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;
use tarazed_domain::{Generation, LaneTree, StepsCompleted, WorkerId};
use tarazed_protocol::coordinator::{Coordinator, Effect, Event, Incident, Options};
use tarazed_protocol::message::{BeginPlan, Member, RestoreFrom, ToRank};

/// The shell of the machine ticks so often (`actors/src/controller/coordinator.rs`).
const TICK_MS: u64 = 20;
/// The last step is far beyond any horizon: the run ends by a stop.
const LAST_STEP: u64 = tarazed_domain::limits::STEPS_MAX;
/// Processes that are started together are ready within this share of their start of each other.
const START_SPREAD: f64 = 0.1;

/// What happens at a time.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Happening {
    /// Something fails.
    Fault,
    /// A process is ready.
    Ready(Member),
    /// The controller hears of an end.
    Exited(Member, &'static str),
    /// All survivors answer the fence.
    Answers(Generation),
    /// The newest checkpoint is found.
    Located,
    /// Everybody stands at a step's boundary.
    Boundary {
        generation: Generation,
        step: u64,
        saving: bool,
    },
    /// Peers of a member that is cut off cannot connect to it.
    Refused(Generation, u32),
    /// The results of a step are compared, and one is wrong.
    Disputed { generation: Generation, step: u64 },
    /// A disputed step has been done again.
    Settled {
        generation: Generation,
        step: StepsCompleted,
    },
    /// A host is mended.
    Mended(u32),
    /// The controller is started again.
    Controller,
    /// The last checkpoint is whole.
    Saved,
    /// The simulated time is over.
    Horizon,
}

/// A generation between its plan and its end.
#[derive(Debug)]
pub(super) struct Running {
    pub generation: Generation,
    /// None while a member hangs or is cut off: it gets nowhere.
    pub stretch: Option<Stretch>,
}

/// Where the survivors of the last generation stand.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stand {
    pub step: u64,
    /// Gradients of the next step are reduced everywhere, and slots below this passed its barrier.
    pub passed_below: Option<u32>,
}

pub(super) struct World<'a> {
    pub setup: &'a Setup,
    pub machine: Coordinator,
    pub queue: BinaryHeap<Reverse<(u64, u64, Happening)>>,
    queued: u64,
    pub fleet: Fleet,
    pub holdings: Holdings,
    pub saves: Saves,
    pub ledger: Ledger,
    pub tally: Tally,
    pub running: Option<Running>,
    pub stand: Stand,
    /// Faults whose generation has not been followed by one that is whole.
    pub open: Vec<usize>,
    /// The fault that each broken process died, or suffers, of.
    pub faults_of: BTreeMap<u32, usize>,
    /// Those whose host is drained once they end, and how long it is mended.
    pub drains: BTreeMap<u32, u64>,
    /// Those that compute their next step wrong, and the fault that makes them.
    pub wrong: BTreeMap<u32, usize>,
    /// Those that did.
    pub culprits: BTreeSet<Member>,
    /// What the members hold is in dispute, and will be restored.
    pub distrusted: bool,
    pub random: Random,
    every: u64,
    plan_bytes: Option<f64>,
    ticked_ms: u64,
    /// When all processes on a spare host are ready.
    berth_ready: BTreeMap<u32, u64>,
    /// The account as it stood at the horizon, and where the run stood.
    pub closed: Option<(Ledger, u64)>,
    /// The controller is gone with a halt.
    pub is_halted: bool,
    pub end: Option<Result<u8, String>>,
}

fn options(setup: &Setup) -> Options {
    Options {
        ranks: setup.ranks,
        spares: 0,
        lanes: LaneTree::new(setup.ranks * setup.cost.lanes_per_rank),
        shard_count: setup.ranks as usize,
        replicas: setup.protection.replicas as usize,
        timeouts: setup.cost.timeouts,
        restarts_max: setup.restarts_max,
        restart_backoff_ms: setup.restart_backoff_ms,
        last_step: StepsCompleted(LAST_STEP),
        hosts: Vec::new(),
    }
}

/// What is left when all is over.
pub(super) struct Finished {
    pub tally: Tally,
    pub ledger: Ledger,
    /// The step at which the run stood at the horizon.
    pub stood: u64,
    /// Bytes of the first plan, with everybody in it.
    pub plan_bytes: f64,
    pub end: Result<u8, String>,
}

impl<'a> World<'a> {
    pub fn new(setup: &'a Setup) -> Self {
        let mut world = Self {
            setup,
            machine: Coordinator::new(options(setup), Generation(0), StepsCompleted(0)),
            queue: BinaryHeap::new(),
            queued: 0,
            fleet: Fleet::new(setup.ranks, setup.spare_hosts, setup.protection.layout),
            holdings: Holdings::new(setup.ranks, setup.ranks as usize),
            saves: Saves::default(),
            ledger: Ledger::new(),
            tally: Tally::new(),
            running: None,
            stand: Stand::default(),
            open: Vec::new(),
            faults_of: BTreeMap::new(),
            drains: BTreeMap::new(),
            wrong: BTreeMap::new(),
            culprits: BTreeSet::new(),
            distrusted: false,
            random: Random::of(setup.seed, "scale", 0),
            every: setup.every_steps(),
            plan_bytes: None,
            ticked_ms: 0,
            berth_ready: BTreeMap::new(),
            closed: None,
            is_halted: false,
            end: None,
        };
        world.at(setup.horizon_ms, Happening::Horizon);
        let first_ms = world.next_fault_ms(0);
        world.at(first_ms, Happening::Fault);
        let effects = world.machine.start(0, &[]);
        world.act(0, effects);
        world
    }

    /// Until the run has ended behind the horizon, or something is wrong.
    pub fn run(mut self) -> Finished {
        loop {
            if let Some(end) = self.end.take() {
                let (ledger, stood) = self.closed.unwrap_or((self.ledger, self.stand.step));
                return Finished {
                    plan_bytes: self.plan_bytes.unwrap_or_default(),
                    tally: self.tally,
                    ledger,
                    stood,
                    end,
                };
            }
            let due_ms = self.queue.peek().map(|Reverse((at_ms, ..))| *at_ms);
            let tick_ms = self.next_tick_ms();
            match (due_ms, tick_ms) {
                (Some(due_ms), Some(tick_ms)) if tick_ms < due_ms => self.tick(tick_ms),
                (None, Some(tick_ms)) => self.tick(tick_ms),
                (Some(_), _) => {
                    if let Some(Reverse((now_ms, _, happening))) = self.queue.pop() {
                        self.tally.note(now_ms, &happening);
                        self.happen(now_ms, happening);
                    }
                }
                (None, None) => self.end = Some(Err("nothing is left to happen".to_owned())),
            }
        }
    }

    pub fn at(&mut self, at_ms: u64, happening: Happening) {
        self.queued += 1;
        self.queue.push(Reverse((at_ms, self.queued, happening)));
    }

    fn next_fault_ms(&mut self, now_ms: u64) -> u64 {
        let unit = self.random.unit().max(f64::MIN_POSITIVE);
        now_ms + (-libm::log(unit) * self.setup.mtbf_ms()).ceil() as u64
    }

    fn happen(&mut self, now_ms: u64, happening: Happening) {
        match happening {
            Happening::Fault if self.closed.is_some() => {}
            Happening::Fault => {
                let next_ms = self.next_fault_ms(now_ms);
                self.at(next_ms, Happening::Fault);
                let drawn: Drawn = causes::draw(&mut self.random, self.setup.cost.switch_share);
                self.fault(now_ms, drawn);
            }
            Happening::Ready(member) => self.ready(now_ms, member),
            Happening::Exited(member, cause) => {
                self.known(now_ms, member.worker.0);
                // What the controller counts on until now.
                self.holdings.lose(member.worker.0);
                let (cause, orderly) = (cause.to_owned(), false);
                self.tell(now_ms, &Event::Exited { member, cause, orderly });
            }
            Happening::Answers(generation) => self.answer(now_ms, generation),
            Happening::Located => {
                if std::mem::take(&mut self.distrusted) {
                    self.give_up_steps();
                }
                let checkpoint = self.saves.newest().map(restore_from);
                self.tell(now_ms, &Event::Located { checkpoint });
            }
            Happening::Boundary {
                generation,
                step,
                saving,
            } => self.boundary(now_ms, generation, step, saving),
            Happening::Refused(generation, slot) => self.refuse(now_ms, generation, slot),
            Happening::Disputed { generation, step } => self.dispute(now_ms, generation, step),
            Happening::Settled { generation, step } => self.settle(now_ms, generation, step),
            Happening::Mended(host) => {
                if let Some(berth) = self.fleet.mended(host) {
                    for slot in self.fleet.starting(berth) {
                        let member = self.fleet.member(slot);
                        self.start_process(now_ms, member);
                    }
                }
            }
            Happening::Controller => self.start_controller(now_ms),
            Happening::Saved => self.settle_saves(now_ms),
            Happening::Horizon => self.horizon(now_ms),
        }
    }

    /// One event into the machine, and what comes of it.
    pub fn tell(&mut self, now_ms: u64, event: &Event) {
        self.tally.events += 1;
        let effects = self.machine.on_event(now_ms, event);
        if !effects.is_empty() {
            self.act(now_ms, effects);
        }
    }

    fn act(&mut self, now_ms: u64, effects: Vec<Effect>) {
        self.tally.effects += effects.len() as u64;
        let (mut fence, mut pause, mut leaving) = (None, None, Vec::new());
        for effect in &effects {
            match effect {
                &Effect::Start { member, after_ms } => self.start(now_ms, member, after_ms),
                Effect::Adopt { .. } => {} // its controllers leave nobody behind
                &Effect::Kill { member, .. } => self.kill(now_ms, member),
                Effect::Send { members, message } => match message {
                    &ToRank::Fence { generation } => fence = Some(generation),
                    &ToRank::Pause { generation, checkpoint } => pause = Some((generation, checkpoint)),
                    ToRank::Shutdown => leaving.extend(members),
                    ToRank::Begin(_) | ToRank::Checkpoint { .. } | ToRank::Acknowledge { .. } => {}
                },
                Effect::Begin { plan } => self.begin(now_ms, plan),
                Effect::FindCheckpoint { .. } => {
                    let locate_ms = self
                        .saves
                        .newest()
                        .map_or(1, |_| self.setup.cost.locate_ms(u64::from(self.setup.ranks)));
                    self.at(now_ms + locate_ms, Happening::Located);
                }
                &Effect::Note(Incident::StateLost { shards_missing }) => self.state_lost(shards_missing),
                Effect::Note(Incident::Disputed { .. }) => {
                    self.tally.disputes += 1;
                    self.distrusted = true;
                }
                Effect::Note(Incident::Convicted { members, .. }) => self.convicted(members),
                Effect::Note(_) => {}
                Effect::Halt { code, diagnosis } => self.halted(now_ms, *code, diagnosis.clone()),
                &Effect::Done { code } => self.end = Some(Ok(code)),
            }
        }
        if let Some(generation) = fence {
            // Whatever was running is over, whoever was the reason.
            let blame = self.ledger.blame();
            self.freeze(now_ms, blame);
            self.running = None;
            let answers_ms = self.setup.cost.answers_ms(self.fleet.member_count());
            self.at(now_ms + answers_ms, Happening::Answers(generation));
        }
        if let Some((generation, saving)) = pause {
            self.plan_boundary(now_ms, generation, saving);
        }
        self.leave(now_ms, leaving);
    }

    fn start(&mut self, now_ms: u64, member: Member, after_ms: u64) {
        // The wait before a start is short beside it; a host is taken at once.
        self.start_process(now_ms + after_ms, member);
    }

    fn start_process(&mut self, from_ms: u64, member: Member) {
        let cost = &self.setup.cost;
        let spread = 1.0 + START_SPREAD * self.random.unit();
        let ready_ms = match self.fleet.start(member) {
            Start::Waits => {
                self.tally.waits_for_spare += 1;
                return;
            }
            Start::InPlace => from_ms + (cost.process_start_ms as f64 * spread) as u64,
            Start::OnSpare { berth } => {
                let ready_ms = from_ms + (cost.spare_start_ms as f64 * spread) as u64;
                let known = self.berth_ready.entry(berth).or_insert(ready_ms);
                if *known < from_ms {
                    *known = ready_ms;
                }
                *known
            }
        };
        self.at(ready_ms, Happening::Ready(member));
    }

    fn ready(&mut self, now_ms: u64, member: Member) {
        let starting = self.fleet.stage(member.worker.0) == Stage::Starting;
        if !starting || self.fleet.member(member.worker.0) != member {
            return;
        }
        self.fleet.ready(member);
        let berth = self.fleet.berth_of(member.worker.0);
        let address = format!("10.{}.{}.{}:29500", berth >> 16, (berth >> 8) & 255, berth & 255);
        let pid = member.worker.0 + 1;
        let newest = Generation(0);
        self.tell(
            now_ms,
            &Event::Ready {
                member,
                address,
                pid,
                newest,
            },
        );
    }

    /// SIGKILL by the node agent, or the end of a host that is given up.
    fn kill(&mut self, now_ms: u64, member: Member) {
        if self.fleet.lives(member) {
            self.tally.kills += 1;
            self.die(now_ms, member.worker.0, "killed");
        }
    }

    /// A process ends; the controller hears of it a moment later. One whose host is drained for it takes all along.
    pub fn die(&mut self, now_ms: u64, slot: u32, cause: &'static str) {
        if self.fleet.stage(slot) == Stage::Gone {
            return;
        }
        if self.fleet.stage(slot) == Stage::Member {
            let blame = self.faults_of.get(&slot).copied();
            let blame = blame.map_or(self.ledger.blame(), |fault| self.tally.faults[fault].cause);
            self.freeze(now_ms, blame);
            self.tally.saves_lost += self.saves.interrupt(now_ms) as u64;
        }
        let member = self.fleet.member(slot);
        self.fleet.end(slot);
        self.wrong.remove(&slot);
        self.at(now_ms + self.setup.cost.exit_ms, Happening::Exited(member, cause));
        if let Some(repair_ms) = self.drains.remove(&slot) {
            self.drain(now_ms, self.fleet.berth_of(slot), repair_ms);
        }
    }

    /// A host is taken out with all that runs there.
    pub fn drain(&mut self, now_ms: u64, berth: u32, repair_ms: u64) {
        if let Some(host) = self.fleet.drain(berth) {
            self.berth_ready.remove(&berth);
            self.at(now_ms + repair_ms, Happening::Mended(host));
        }
        for slot in self.fleet.living(berth) {
            self.die(now_ms, slot, "its host is taken out");
        }
    }

    /// Steps stop now. What was committed until then is counted and told.
    pub fn freeze(&mut self, now_ms: u64, blame: usize) {
        let stretch = self.running.as_mut().and_then(|running| running.stretch.take());
        let Some(stretch) = stretch else {
            if self.ledger.blame() != blame {
                self.ledger.down(now_ms, blame);
            }
            return;
        };
        if now_ms < stretch.from_ms {
            // It never was whole: whoever held a shard before holds it still.
            self.ledger.down(now_ms, blame);
            self.stand = Stand {
                step: stretch.base,
                passed_below: None,
            };
            return;
        }
        self.holdings.all_whole(self.fleet.members());
        let faults = &mut self.tally.faults;
        self.open.retain(|&fault| {
            let record = &mut faults[fault];
            let recovered_ms = stretch.from_ms.checked_sub(record.at_ms);
            record.recovered_ms = record.recovered_ms.or(recovered_ms);
            recovered_ms.is_none()
        });
        let before = self.ledger.steps;
        self.ledger.stretch(now_ms, &stretch, blame);
        self.saves.stretch(now_ms, &stretch, self.setup.protection.upload_ms);
        let reached = stretch.at(now_ms);
        let step = stretch.base + reached.steps;
        let at_barrier = reached.rest_ms + self.setup.cost.barrier_ms >= stretch.step_ms;
        let passed_below = (at_barrier && blame != CHARGE_ADMISSION)
            .then(|| self.random.between(0, u64::from(self.setup.ranks)) as u32);
        self.stand = Stand { step, passed_below };
        if self.ledger.steps > before {
            let step = StepsCompleted(self.ledger.steps);
            self.tell(now_ms, &Event::LineWritten { step });
        }
        self.settle_saves(now_ms);
    }

    fn settle_saves(&mut self, now_ms: u64) {
        let before = self.tally.saved;
        self.saves.settle(now_ms);
        if self.saves.newest() != before
            && let Some(step) = self.saves.newest()
        {
            self.tally.saved = Some(step);
            let step = StepsCompleted(step);
            self.tell(now_ms, &Event::CheckpointCommitted { step });
        }
    }

    /// A plan leaves the controller.
    fn begin(&mut self, now_ms: u64, plan: &Arc<BeginPlan>) {
        self.tally.generations += 1;
        let finished =
            plan.base.0 == self.stand.step + 1 && plan.restore.is_none() && self.stand.passed_below.is_some();
        if finished {
            self.ledger.finish_cut_step();
            self.tally.finished_steps += 1;
        }
        let begun = match self
            .wrong_with(plan, finished)
            .map_or_else(|| self.holdings.begin(plan), Err)
        {
            Ok(begun) => begun,
            Err(wrong) => {
                self.end = Some(Err(format!("generation {}: {wrong}", plan.generation)));
                return;
            }
        };
        self.stand = Stand {
            step: plan.base.0,
            passed_below: None,
        };
        self.tally.copies += u64::from(begun.copies);
        // One that answered the fence may be dead by now; the controller is about to hear of it.
        let mut stuck = false;
        for entry in &plan.roster {
            if self.fleet.lives(entry.member) {
                self.fleet.admit(entry.member.worker.0);
            } else {
                stuck = true;
            }
        }
        self.tally.note_generation(now_ms, plan, &begun);
        let stretch = self.stretch_of(now_ms, plan, begun.source());
        stuck |= self.fleet.is_stuck();
        self.running = Some(Running {
            generation: plan.generation,
            stretch: (!stuck).then_some(stretch),
        });
        if finished {
            let step = StepsCompleted(self.ledger.steps);
            self.tell(now_ms, &Event::LineWritten { step });
        }
        if stuck {
            self.watch(now_ms);
            self.expect_refusals(now_ms, plan.generation);
            return;
        }
        self.expect_verdict(plan, &stretch);
        if plan.last_step > plan.base {
            self.expect_dispute(stretch.from_ms);
        } else {
            let (generation, step, saving) = (plan.generation, plan.base.0, plan.checkpoint_at_base);
            self.at(
                stretch.from_ms,
                Happening::Boundary {
                    generation,
                    step,
                    saving,
                },
            );
        }
    }

    /// The steps of a generation whose plan leaves the controller now, as long as nothing happens.
    fn stretch_of(&mut self, now_ms: u64, plan: &Arc<BeginPlan>, from: From) -> Stretch {
        let bytes = *self.plan_bytes.get_or_insert_with(|| encoded_bytes(plan));
        let ranks = plan.roster.len();
        let bytes = bytes * ranks as f64 / f64::from(self.setup.ranks);
        let replicas = self.setup.protection.replicas as usize;
        let cost = &self.setup.cost;
        let lanes = plan.roster.iter().map(|entry| entry.lanes.len());
        Stretch {
            from_ms: now_ms + cost.begin_ms(ranks, bytes, from, plan.shards.shard_count(), replicas),
            base: plan.base.0,
            step_ms: cost.step_with_ms(lanes.max().unwrap_or_default() as u32),
            full_step_ms: cost.step_ms,
            every: self.every,
            snapshot_ms: self.setup.protection.snapshot_ms,
        }
    }

    /// STEP-2, seen from outside: no committed step is given up while a copy of every shard lives, and no restore comes
    /// without need.
    fn wrong_with(&self, plan: &BeginPlan, finished: bool) -> Option<String> {
        let lanes: u32 = plan.roster.iter().map(|entry| entry.lanes.len() as u32).sum();
        if lanes != self.setup.ranks * self.setup.cost.lanes_per_rank {
            return Some(format!("{lanes} lanes are computed"));
        }
        let base = plan.base.0;
        let from_copies = plan.restore.is_none() && base > 0;
        if from_copies && base != self.stand.step + u64::from(finished) {
            return Some(format!(
                "begins with {base}, its survivors stand at {}",
                self.stand.step
            ));
        }
        if !from_copies && plan.restore.as_ref().map_or(0, |from| from.step.0) != self.saves.newest().unwrap_or(0) {
            return Some(format!("restores {base}, the store has {:?}", self.saves.newest()));
        }
        None
    }

    /// These had it wrong, and are replaced. Where that is known at once, the others' state is believed.
    fn convicted(&mut self, members: &[Member]) {
        self.distrusted = false;
        self.tally.convicted += members.len() as u64;
        if let Some(innocent) = members.iter().find(|member| !self.culprits.contains(member)) {
            self.end = Some(Err(format!("{innocent} is replaced for a result that it had right")));
        }
    }

    fn state_lost(&mut self, shards_missing: usize) {
        let missing = self.holdings.missing();
        if missing == 0 || (self.fleet.member_count() > 0 && missing != shards_missing) {
            self.end = Some(Err(format!(
                "{shards_missing} shards are said to be lost, {missing} are"
            )));
        }
        self.distrusted = false;
        self.give_up_steps();
    }

    /// What the checkpoint does not have is computed again.
    pub fn give_up_steps(&mut self) {
        let blame = self.ledger.blame();
        self.tally.restores[blame] += 1;
        let base = self.saves.newest().unwrap_or_default();
        self.ledger.restore(base, self.stand.step);
        self.stand = Stand {
            step: base,
            passed_below: None,
        };
    }

    fn plan_boundary(&mut self, now_ms: u64, generation: Generation, saving: bool) {
        let Some(Running {
            stretch: Some(stretch), ..
        }) = &self.running
        else {
            return;
        };
        let heard_ms = (now_ms + self.setup.cost.round_trip_ms).max(stretch.from_ms);
        let steps = stretch.at(heard_ms).steps + 1;
        let (step, at_ms) = (stretch.base + steps, stretch.from_ms + stretch.time_ms(steps));
        self.at(
            at_ms,
            Happening::Boundary {
                generation,
                step,
                saving,
            },
        );
    }

    fn next_tick_ms(&self) -> Option<u64> {
        let failure_ms = self.setup.cost.timeouts.failure_ms;
        let stalled = self.machine.is_running() && self.fleet.is_stuck();
        let of_stall = stalled.then(|| self.ticked_ms + failure_ms / 2);
        let silent = self
            .fleet
            .troubles()
            .iter()
            .filter(|(_, trouble)| **trouble == Trouble::Silent);
        let of_silence = if self.fleet.has_silent() {
            silent
                .filter_map(|(&slot, _)| self.machine.silence_deadline_ms(WorkerId(slot)))
                .min()
        } else {
            None
        };
        let due_ms = [self.machine.next_deadline_ms(), of_stall, of_silence]
            .into_iter()
            .flatten()
            .min()?;
        Some(due_ms.max(self.ticked_ms + 1).next_multiple_of(TICK_MS))
    }

    /// Until now somebody was at work; from now on ticks look for a stall.
    pub fn watch(&mut self, now_ms: u64) {
        self.machine.skip_idle_ticks(now_ms);
        self.ticked_ms = now_ms;
    }

    fn tick(&mut self, now_ms: u64) {
        self.tally.ticks += 1;
        if !(self.machine.is_running() && self.fleet.is_stuck()) {
            self.machine.skip_idle_ticks(now_ms);
        }
        self.ticked_ms = now_ms;
        self.heartbeats(now_ms);
        self.tell(now_ms, &Event::Tick);
    }

    /// Another life of the controller, behind a halt; everything starts anew.
    fn start_controller(&mut self, now_ms: u64) {
        self.is_halted = false;
        let generation = self.machine.generation().next();
        let written = StepsCompleted(self.ledger.steps);
        self.machine = Coordinator::new(options(self.setup), generation, written);
        self.watch(now_ms);
        let effects = self.machine.start(now_ms, &[]);
        self.act(now_ms, effects);
    }

    pub fn record(&mut self, now_ms: u64, drawn: Drawn, struck: usize) -> usize {
        self.tally.faults.push(FaultRecord {
            cause: drawn.cause,
            seen: drawn.seen,
            at_ms: now_ms,
            struck,
            detected_ms: None,
            recovered_ms: None,
        });
        self.tally.faults.len() - 1
    }

    /// The controller knows of it.
    pub fn known(&mut self, now_ms: u64, slot: u32) {
        if let Some(fault) = self.faults_of.remove(&slot) {
            let record = &mut self.tally.faults[fault];
            record.detected_ms.get_or_insert(now_ms - record.at_ms);
        }
    }
}

fn restore_from(step: u64) -> RestoreFrom {
    RestoreFrom {
        step: StepsCompleted(step),
        manifest_key: format!("manifests/{step}"),
        length: 0,
        blake3: [0; 32],
    }
}

/// Bytes of the plan as it goes to each rank; none where it cannot be encoded.
fn encoded_bytes(plan: &Arc<BeginPlan>) -> f64 {
    let message = ToRank::Begin(Box::new(BeginPlan::clone(plan)));
    message.encode().map_or(0.0, |bytes| bytes.len() as f64)
}
