//! The machine's moves: one function per event, then the moves between phases.

use super::alarm::Alarm;
use super::{Coordinator, Effect, Event, Ground, Incident, Phase, WorkerPhase};
use crate::commit;
use crate::message::{BeginPlan, Member, RestoreFrom, RosterEntry, ShardHolder, ShardOrigin, ToRank};
use crate::restart::Verdict;
use crate::sharder;
use std::collections::{BTreeMap, BTreeSet};
use tarazed_domain::{Rank, StepsCompleted};

/// How long a failed collective waits for its cause to show (a process exit comes within milliseconds) before the
/// generation is renewed with everybody.
const FAILED_GRACE_MS: u64 = 100;

impl Coordinator {
    /// One fact in, effects out.
    pub fn on_event(&mut self, now_ms: u64, event: Event) -> Vec<Effect> {
        if matches!(self.phase, Phase::Done) {
            return Vec::new();
        }
        match event {
            Event::Ready { member, address, pid } => self.on_ready(now_ms, member, address, pid),
            Event::Exited { member, cause, orderly } => self.on_exited(now_ms, member, cause, orderly),
            Event::State {
                member,
                generation,
                report,
            } => {
                if !self.is_current(member, generation) {
                    return Vec::new();
                }
                self.heard(now_ms, member);
                if let Phase::Fencing { awaiting, reports, .. } = &mut self.phase
                    && awaiting.remove(&member)
                {
                    reports.insert(member, report);
                }
                self.settle_fence(now_ms)
            }
            Event::Failed {
                member,
                generation,
                cause,
                suspects,
                corruption,
            } => {
                if !self.is_current(member, generation) {
                    return Vec::new();
                }
                self.on_failed(now_ms, member, cause, &suspects, corruption)
            }
            Event::Paused {
                member,
                generation,
                step,
                saving,
            } => {
                if !self.is_current(member, generation) {
                    return Vec::new();
                }
                self.heard(now_ms, member);
                self.on_paused(now_ms, member, step, saving)
            }
            Event::Heartbeat {
                member,
                generation,
                step,
                progress,
                activity,
            } => {
                if self.knows(member)
                    && let Some(worker) = self.workers.get_mut(&member.worker)
                {
                    worker.heard_ms = now_ms;
                    if generation == self.generation {
                        worker.step = step;
                    }
                    if progress != worker.progress {
                        (worker.progress, worker.progress_ms) = (progress, now_ms);
                    }
                    worker.activity = activity;
                }
                Vec::new()
            }
            Event::LineWritten { step } => self.on_line_written(now_ms, step),
            Event::Located { checkpoint } => self.on_located(now_ms, checkpoint),
            Event::CheckpointCommitted { step } => {
                self.checkpointed = self.checkpointed.max(Some(step));
                self.leave_when_saved(now_ms)
            }
            Event::ShardSaved => {
                if let Phase::Finishing { deadline_ms, .. } = &mut self.phase {
                    *deadline_ms = now_ms + self.options.timeouts.stop_ms;
                }
                Vec::new()
            }
            Event::CheckpointFailed { step, cause } => {
                // Training goes on, and the next checkpoint may succeed; the last one is tried again.
                self.save_failed = Some((step, cause));
                self.save_again(now_ms)
            }
            Event::StopRequested => self.on_stop(now_ms),
            Event::Tick => self.on_tick(now_ms),
        }
    }

    fn heard(&mut self, now_ms: u64, member: Member) {
        if let Some(worker) = self.workers.get_mut(&member.worker) {
            worker.heard_ms = now_ms;
        }
    }

    fn on_ready(&mut self, now_ms: u64, member: Member, address: String, pid: u32) -> Vec<Effect> {
        if !self.knows(member) {
            return vec![Effect::Kill {
                member,
                reason: "a life that was given up".to_owned(),
            }];
        }
        if let Some(worker) = self.workers.get_mut(&member.worker) {
            worker.phase = WorkerPhase::Ready;
            worker.address = address;
            worker.pid = pid;
            worker.heard_ms = now_ms;
        }
        match self.phase {
            Phase::Forming => self.try_form(),
            Phase::Running { .. } => self.ask_to_pause(false),
            _ => Vec::new(),
        }
    }

    fn try_form(&mut self) -> Vec<Effect> {
        if self.workers.values().all(|w| w.phase == WorkerPhase::Ready) {
            self.phase = Phase::Locating;
            vec![Effect::FindCheckpoint]
        } else {
            Vec::new()
        }
    }

    /// Asks every member to pause together at the next boundary; the barrier spreads the wish, so one that hears it
    /// late does not run ahead.
    fn ask_to_pause(&mut self, checkpoint: bool) -> Vec<Effect> {
        let generation = self.generation;
        let Phase::Running { pause_sent, .. } = &mut self.phase else {
            return Vec::new();
        };
        if *pause_sent && !checkpoint {
            return Vec::new();
        }
        *pause_sent = true;
        self.roster
            .iter()
            .map(|&(member, _)| Effect::Send {
                member,
                message: ToRank::Pause { generation, checkpoint },
            })
            .collect()
    }

    fn on_exited(&mut self, now_ms: u64, member: Member, cause: String, orderly: bool) -> Vec<Effect> {
        if !self.knows(member) {
            return Vec::new();
        }
        if matches!(self.phase, Phase::Leaving { .. }) {
            if let Some(worker) = self.workers.get_mut(&member.worker) {
                worker.phase = WorkerPhase::Left;
            }
            return self.settle_leaving();
        }
        let cause = if orderly {
            format!("{cause} before it was told to leave")
        } else {
            cause
        };
        let rank = self
            .roster
            .iter()
            .position(|(m, _)| *m == member)
            .map(|rank| Rank(rank as u32));
        let mut effects = vec![Effect::Note(Incident::RankLost {
            member,
            rank,
            cause: cause.clone(),
        })];
        let start_ms = self.options.timeouts.start_ms;
        if let Some(worker) = self.workers.get_mut(&member.worker) {
            match worker.limiter.on_death(format!("{member}: {cause}")) {
                Verdict::Restart { after_ms } => {
                    worker.incarnation = worker.incarnation.next();
                    worker.phase = WorkerPhase::Starting {
                        deadline_ms: now_ms + after_ms + start_ms,
                    };
                    worker.pid = 0;
                    worker.heard_ms = now_ms;
                    let successor = Member {
                        worker: member.worker,
                        incarnation: worker.incarnation,
                    };
                    effects.push(Effect::Start {
                        member: successor,
                        after_ms,
                    });
                }
                Verdict::GiveUp { causes } => {
                    worker.phase = WorkerPhase::Left;
                    let what = format!(
                        "worker {} died {} times without taking part in a committed step between; causes, oldest \
                         first:\n  {}",
                        member.worker,
                        causes.len(),
                        causes.join("\n  ")
                    );
                    effects.extend(self.give_up(now_ms, what));
                }
            }
        }
        match &mut self.phase {
            Phase::Running { .. } if rank.is_some() => effects.extend(self.fence(now_ms, cause, None)),
            Phase::Finishing { .. } if rank.is_some() => effects.extend(self.fence(now_ms, cause, None)),
            Phase::Fencing {
                awaiting,
                reports,
                alarm,
                ..
            } => {
                awaiting.remove(&member);
                reports.remove(&member);
                *alarm = None; // here is the cause
                effects.extend(self.settle_fence(now_ms));
            }
            _ => {}
        }
        effects
    }

    /// SUP-3: the run halts. Where others still hold the state, they save it first, so nothing is lost.
    fn give_up(&mut self, now_ms: u64, diagnosis: String) -> Vec<Effect> {
        match self.phase {
            Phase::Running { .. } | Phase::Fencing { .. } | Phase::Finishing { .. } => {
                self.verdict = Some((3, diagnosis));
                self.on_stop(now_ms)
            }
            _ => self.halt(3, diagnosis),
        }
    }

    /// A new generation: fences every survivor and waits for what it holds.
    fn fence(&mut self, now_ms: u64, cause: String, alarm: Option<Alarm>) -> Vec<Effect> {
        if let Verdict::GiveUp { causes } = self.fruitless.on_death(cause) {
            let what = format!(
                "{} generations in a row committed no step; causes, oldest first:\n  {}",
                causes.len(),
                causes.join("\n  ")
            );
            return self.halt(3, what);
        }
        self.generation = self.generation.next();
        let generation = self.generation;
        let survivors = self.with_phase(&WorkerPhase::Member);
        let effects = survivors
            .iter()
            .map(|&member| Effect::Send {
                member,
                message: ToRank::Fence { generation },
            })
            .collect::<Vec<_>>();
        self.phase = Phase::Fencing {
            deadline_ms: now_ms + self.options.timeouts.fence_ms,
            alarm,
            awaiting: survivors.into_iter().collect(),
            reports: BTreeMap::new(),
        };
        [effects, self.settle_fence(now_ms)].concat()
    }

    /// Once every survivor has answered: agree (STEP-2) and begin, or look for a checkpoint.
    fn settle_fence(&mut self, now_ms: u64) -> Vec<Effect> {
        let Phase::Fencing { awaiting, .. } = &self.phase else {
            return Vec::new();
        };
        if !awaiting.is_empty() {
            return Vec::new();
        }
        let kills = self.judge_alarm();
        if !kills.is_empty() {
            return kills;
        }
        let Phase::Fencing { reports, .. } = &self.phase else {
            return Vec::new();
        };
        if reports.is_empty() {
            // Nobody is left. The whole cluster forms again; what is ready waits for the others.
            let mut effects = vec![Effect::Note(Incident::StateLost {
                shards_missing: self.options.shard_count,
            })];
            if let Some((code, diagnosis)) = self.verdict.take() {
                effects.extend(self.halt(code, diagnosis));
                return effects;
            }
            self.roster.clear();
            self.phase = Phase::Forming;
            effects.extend(self.try_form());
            return effects;
        }
        match Ground::agreed(commit::resolve(self.options.shard_count, reports)) {
            Ok(ground) => {
                let survivors: BTreeSet<Member> = reports.keys().copied().collect();
                self.begin(now_ms, ground, survivors)
            }
            Err(commit::Resolution::Restore { missing }) => {
                if let Some((code, diagnosis)) = self.verdict.take() {
                    return self.halt(code, diagnosis);
                }
                self.phase = Phase::Locating;
                vec![
                    Effect::Note(Incident::StateLost {
                        shards_missing: missing.len(),
                    }),
                    Effect::FindCheckpoint,
                ]
            }
            Err(commit::Resolution::Continue { .. }) => Vec::new(),
        }
    }

    fn on_located(&mut self, now_ms: u64, checkpoint: Option<RestoreFrom>) -> Vec<Effect> {
        if !matches!(self.phase, Phase::Locating) {
            return Vec::new();
        }
        // Survivors may still run an old generation's leftovers: the number they begin with must be new to all.
        self.generation = self.generation.next();
        self.checkpointed = checkpoint.as_ref().map(|from| from.step);
        let (base, restore) = (self.checkpointed.unwrap_or_default(), checkpoint);
        let holders = vec![Vec::new(); self.options.shard_count];
        let ground = Ground {
            base,
            outcome: None,
            holders,
            restore,
        };
        let members: BTreeSet<Member> = self.with_phase(&WorkerPhase::Member).into_iter().collect();
        if members.is_empty() && self.with_phase(&WorkerPhase::Ready).is_empty() {
            self.phase = Phase::Forming;
            return Vec::new();
        }
        self.begin(now_ms, ground, members)
    }

    /// Spreads lanes and shards over survivors and newcomers, and starts the generation.
    fn begin(&mut self, now_ms: u64, ground: Ground, survivors: BTreeSet<Member>) -> Vec<Effect> {
        let mut members: Vec<Member> = survivors
            .iter()
            .copied()
            .chain(self.with_phase(&WorkerPhase::Ready))
            .collect();
        members.sort_unstable();
        let lanes = self.options.lanes.assign(&vec![1; members.len()]);
        self.roster = members.iter().copied().zip(lanes).collect();
        let restored = ground.holders.iter().all(Vec::is_empty);
        let (shards, copies) = self.place_shards(&ground, &members);
        self.primaries = shards.iter().map(|holders| members[holders[0].rank.index()]).collect();

        self.placement.clone_from(&shards);
        let ends_here = ground.base >= self.options.last_step || self.stop.is_some();
        let roster: Vec<RosterEntry> = self
            .roster
            .iter()
            .map(|&(member, lanes)| RosterEntry {
                member,
                address: self.workers[&member.worker].address.clone(),
                lanes,
            })
            .collect();
        let plan = BeginPlan {
            generation: self.generation,
            roster,
            base: ground.base,
            outcome: ground.outcome,
            shards,
            restore: ground.restore,
            acknowledged: self.written,
            decisions: Vec::new(),
            decided: self.written,
            last_step: if self.stop.is_some() {
                ground.base
            } else {
                self.options.last_step
            },
            checkpoint_at_base: ends_here && !self.is_saved(ground.base),
        };
        for &member in &members {
            if let Some(worker) = self.workers.get_mut(&member.worker) {
                worker.phase = WorkerPhase::Member;
                worker.heard_ms = now_ms;
                worker.progress_ms = now_ms;
                worker.step = ground.base;
            }
        }
        self.begun = true;
        self.phase = Phase::Running {
            paused: BTreeMap::new(),
            pause_sent: false,
            failed: None,
            suspicions: BTreeSet::new(),
        };
        let note = Incident::GenerationBegan {
            generation: self.generation,
            members: members.clone(),
            base: ground.base,
            restored,
            copies,
        };
        let begin = members.into_iter().map(|member| Effect::Begin {
            member,
            plan: Box::new(plan.clone()),
        });
        std::iter::once(Effect::Note(note)).chain(begin).collect()
    }

    fn place_shards(&self, ground: &Ground, members: &[Member]) -> (Vec<Vec<ShardHolder>>, usize) {
        let rank_of = |member: &Member| members.iter().position(|m| m == member).map(|rank| Rank(rank as u32));
        let whole: Vec<Vec<Rank>> = ground
            .holders
            .iter()
            .enumerate()
            .map(|(shard, holders)| {
                let primary = self.primaries.get(shard);
                let mut ordered = holders.clone();
                ordered.sort_by_key(|member| Some(member) != primary);
                ordered.iter().filter_map(rank_of).collect()
            })
            .collect();
        let map = sharder::assign(self.options.shard_count, members.len(), self.options.replicas, &whole);
        let mut copies = 0;
        let shards = map
            .all()
            .iter()
            .zip(&whole)
            .map(|(holders, donors)| {
                let origin = |rank: &Rank| match donors.first() {
                    Some(_) if donors.contains(rank) => ShardOrigin::Keep,
                    Some(&donor) => ShardOrigin::CopyFrom(donor),
                    None if ground.restore.is_some() => ShardOrigin::Restore,
                    None => ShardOrigin::Initialise,
                };
                holders
                    .iter()
                    .map(|rank| {
                        let origin = origin(rank);
                        copies += usize::from(matches!(origin, ShardOrigin::CopyFrom(_)));
                        ShardHolder { rank: *rank, origin }
                    })
                    .collect()
            })
            .collect();
        (shards, copies)
    }

    fn on_failed(
        &mut self,
        now_ms: u64,
        member: Member,
        cause: String,
        suspects: &[Rank],
        corruption: bool,
    ) -> Vec<Effect> {
        self.heard(now_ms, member);
        if corruption {
            return self.halt(3, format!("{member}: {cause}"));
        }
        let named: Vec<String> = suspects.iter().map(|rank| format!("rank {rank}")).collect();
        let cause = format!(
            "{member}: {cause} ({})",
            if named.is_empty() {
                "no suspect".into()
            } else {
                named.join(", ")
            }
        );
        let members: Vec<Member> = suspects
            .iter()
            .filter_map(|rank| self.roster.get(rank.index()).map(|(suspect, _)| *suspect))
            .collect();
        if let Phase::Running { failed, suspicions, .. } = &mut self.phase {
            failed.get_or_insert((now_ms, cause));
            suspicions.extend(members.into_iter().map(|suspect| (member, suspect)));
        }
        Vec::new()
    }

    fn on_paused(&mut self, now_ms: u64, member: Member, step: StepsCompleted, saving: bool) -> Vec<Effect> {
        let in_roster = self.in_roster(member);
        let Phase::Running { paused, .. } = &mut self.phase else {
            return Vec::new();
        };
        if in_roster {
            paused.insert(member, step);
        }
        if paused.len() < self.roster.len() {
            return Vec::new();
        }
        let ends_here = step >= self.options.last_step || self.stop.is_some();
        if ends_here && (saving || self.is_saved(step)) {
            let deadline_ms = now_ms + self.options.timeouts.stop_ms;
            self.phase = Phase::Finishing { step, deadline_ms };
            let effects = self.leave_when_saved(now_ms);
            return [effects, self.save_again(now_ms)].concat();
        }
        // A pause is no failure. Where the stop came too late for this boundary's checkpoint, the new generation begins
        // with one.
        self.fruitless.on_progress();
        self.fence(now_ms, "paused at a step boundary".to_owned(), None)
    }

    fn on_line_written(&mut self, now_ms: u64, step: StepsCompleted) -> Vec<Effect> {
        // A line that is only checked on a replay is no progress: a death at the same step again and again must end.
        if step <= self.written {
            return self.leave_when_saved(now_ms);
        }
        self.written = step;
        self.strikes.clear();
        self.fruitless.on_progress();
        for (member, _) in &self.roster {
            if let Some(worker) = self.workers.get_mut(&member.worker)
                && worker.incarnation == member.incarnation
            {
                worker.limiter.on_progress();
            }
        }
        self.leave_when_saved(now_ms)
    }

    fn leave_when_saved(&mut self, now_ms: u64) -> Vec<Effect> {
        let Phase::Finishing { step, .. } = self.phase else {
            return Vec::new();
        };
        if !self.is_saved(step) || self.written < step {
            return Vec::new();
        }
        self.phase = Phase::Leaving {
            deadline_ms: now_ms + self.options.timeouts.failure_ms,
        };
        let alive: Vec<Member> = [
            self.with_phase(&WorkerPhase::Member),
            self.with_phase(&WorkerPhase::Ready),
        ]
        .concat();
        let mut effects: Vec<Effect> = alive
            .into_iter()
            .map(|member| Effect::Send {
                member,
                message: ToRank::Shutdown,
            })
            .collect();
        for member in self.with_phase(&WorkerPhase::Starting { deadline_ms: 0 }) {
            effects.push(Effect::Kill {
                member,
                reason: "the run is over".to_owned(),
            });
        }
        effects
    }

    fn settle_leaving(&mut self) -> Vec<Effect> {
        let left = self
            .workers
            .values()
            .all(|w| matches!(w.phase, WorkerPhase::Left | WorkerPhase::Starting { .. }));
        if left { self.done() } else { Vec::new() }
    }

    /// Whether nothing of this step is left to be saved; before the first step nothing is.
    fn is_saved(&self, step: StepsCompleted) -> bool {
        step == StepsCompleted(0) || self.checkpointed >= Some(step)
    }

    /// The last checkpoint failed: the state is still in the ranks' memory, so a new generation saves it anew.
    fn save_again(&mut self, now_ms: u64) -> Vec<Effect> {
        let Phase::Finishing { step, .. } = self.phase else {
            return Vec::new();
        };
        let Some((_, cause)) = self.save_failed.take_if(|(failed, _)| *failed == step) else {
            return Vec::new();
        };
        match self.last_saves.on_death(cause.clone()) {
            Verdict::Restart { .. } => self.fence(now_ms, cause, None),
            Verdict::GiveUp { causes } => {
                let what = format!(
                    "the last checkpoint, of step {step}, could not be written in {} tries: {}; mend the store and start \
                     again: the run resumes from the checkpoint before",
                    causes.len(),
                    causes.join("; ")
                );
                self.halt(33, what)
            }
        }
    }

    fn done(&mut self) -> Vec<Effect> {
        if let Some((code, diagnosis)) = self.verdict.take() {
            return self.halt(code, diagnosis);
        }
        self.phase = Phase::Done;
        let finished = self.checkpointed.is_some_and(|step| step >= self.options.last_step);
        vec![Effect::Done {
            code: if finished { 0 } else { 34 },
        }]
    }

    fn halt(&mut self, code: u8, diagnosis: String) -> Vec<Effect> {
        self.phase = Phase::Done;
        vec![Effect::Halt { code, diagnosis }]
    }

    fn on_stop(&mut self, now_ms: u64) -> Vec<Effect> {
        if self.stop.is_some() {
            return Vec::new();
        }
        self.stop = Some(now_ms);
        match self.phase {
            Phase::Running { .. } => self.ask_to_pause(true),
            // Nothing was computed in this life of the run, so nothing is to be saved.
            Phase::Forming if !self.begun => {
                self.phase = Phase::Done;
                vec![Effect::Done { code: 34 }]
            }
            _ => Vec::new(), // the generation being agreed on begins, saves its base and ends
        }
    }

    fn on_tick(&mut self, now_ms: u64) -> Vec<Effect> {
        self.excuse_own_absence(now_ms);
        let timeouts = self.options.timeouts;
        let mut effects = self.kill_the_silent(now_ms);
        match &self.phase {
            Phase::Fencing {
                deadline_ms, awaiting, ..
            } if now_ms > *deadline_ms => {
                let reason = format!(
                    "no answer to a fence within {} ms: its device thread hangs",
                    timeouts.fence_ms
                );
                effects.extend(awaiting.iter().map(|&member| Effect::Kill {
                    member,
                    reason: reason.clone(),
                }));
            }
            Phase::Running {
                failed: Some((since, cause)),
                suspicions,
                ..
            } if now_ms >= since + FAILED_GRACE_MS => {
                let (cause, alarm) = (cause.clone(), Alarm::Named(suspicions.clone()));
                effects.extend(self.fence(now_ms, cause, Some(alarm)));
            }
            Phase::Running { failed: None, .. } if self.is_stalled(now_ms) => {
                let cause = format!("no rank has made any progress for {} ms", self.stall_ms);
                effects.extend(self.fence(now_ms, cause, Some(Alarm::Stall)));
            }
            &Phase::Finishing { step, deadline_ms } if now_ms > deadline_ms => {
                let cause = format!("nothing of it was stored for {} ms", timeouts.stop_ms);
                self.save_failed = Some((step, cause));
                effects.extend(self.save_again(now_ms));
            }
            Phase::Leaving { deadline_ms } if now_ms > *deadline_ms => effects.extend(self.done()),
            _ => {}
        }
        if let Some(since) = self.stop
            && now_ms > since + timeouts.stop_ms
            && !matches!(self.phase, Phase::Done)
        {
            let late = format!("no last checkpoint within {} ms of the stop", timeouts.stop_ms);
            return match self.verdict.take() {
                Some((code, diagnosis)) => self.halt(code, format!("{diagnosis}\n{late}")),
                None => self.halt(33, late),
            };
        }
        effects
    }

    /// Where this process was stopped or starved, what came meanwhile waits behind this tick: nobody was silent.
    fn excuse_own_absence(&mut self, now_ms: u64) {
        let absent_ms = now_ms.saturating_sub(self.ticked_ms.replace(now_ms).unwrap_or(now_ms));
        if absent_ms <= self.options.timeouts.failure_ms / 2 {
            return;
        }
        for worker in self.workers.values_mut() {
            worker.heard_ms += absent_ms;
            worker.progress_ms += absent_ms;
            if let WorkerPhase::Starting { deadline_ms } = &mut worker.phase {
                *deadline_ms += absent_ms;
            }
        }
        match &mut self.phase {
            Phase::Fencing { deadline_ms, .. }
            | Phase::Finishing { deadline_ms, .. }
            | Phase::Leaving { deadline_ms } => {
                *deadline_ms += absent_ms;
            }
            _ => {}
        }
        self.stop = self.stop.map(|since| since + absent_ms);
    }

    fn kill_the_silent(&self, now_ms: u64) -> Vec<Effect> {
        let timeouts = self.options.timeouts;
        let mut effects = Vec::new();
        for (&worker, w) in &self.workers {
            let member = Member {
                worker,
                incarnation: w.incarnation,
            };
            match w.phase {
                WorkerPhase::Starting { deadline_ms } if now_ms > deadline_ms => {
                    let reason = format!("not ready within {} ms of its start", timeouts.start_ms);
                    effects.push(Effect::Kill { member, reason });
                }
                WorkerPhase::Member | WorkerPhase::Ready
                    if !matches!(self.phase, Phase::Leaving { .. }) && now_ms > w.heard_ms + timeouts.failure_ms =>
                {
                    let reason = format!("no heartbeat for {} ms", timeouts.failure_ms);
                    effects.push(Effect::Kill { member, reason });
                }
                _ => {}
            }
        }
        effects
    }
}
