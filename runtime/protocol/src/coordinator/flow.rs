//! The machine's moves: one function per event, then the moves between phases.

use super::alarm::Alarm;
use super::{Coordinator, Effect, Event, Ground, Incident, Phase, WorkerPhase, WorkerSet};
use crate::commit::{Holders, Survey};
use crate::message::{Member, RestoreFrom, StateReport, ToRank};
use crate::restart::Verdict;
use tarazed_domain::{Generation, Mutant, Rank, StepsCompleted, WorkerId};

impl Coordinator {
    /// One fact in, effects out. It is only read: the machine keeps what it needs of it, so a driver of a large world tells
    /// one after the other from the same memory.
    pub fn on_event(&mut self, now_ms: u64, event: &Event) -> Vec<Effect> {
        if matches!(self.phase, Phase::Done) {
            return Vec::new();
        }
        match event {
            &Event::Ready {
                member,
                ref address,
                pid,
                newest,
            } => self.on_ready(now_ms, member, address, pid, newest),
            &Event::Ending { member, ref cause } => self.on_ending(now_ms, member, cause.clone()),
            &Event::Exited {
                member,
                ref cause,
                orderly,
            } => self.on_exited(now_ms, member, cause, orderly),
            &Event::State {
                member,
                generation,
                ref report,
            } => self.on_state(now_ms, member, generation, report),
            &Event::Failed {
                member,
                generation,
                ref cause,
                ref suspects,
                fatal,
                ref dispute,
            } => {
                if !self.is_current(member, generation) {
                    return Vec::new();
                }
                self.heard(now_ms, member);
                match dispute {
                    _ if fatal => self.halt(3, format!("{member}: {cause}")),
                    Some(dispute) => self.on_disputed(now_ms, dispute, cause),
                    None => self.on_failed(now_ms, member, cause, suspects),
                }
            }
            &Event::Settled {
                member,
                generation,
                step,
                digest,
            } => {
                if !self.is_current(member, generation) {
                    return Vec::new();
                }
                self.on_settled(step, digest)
            }
            &Event::Paused {
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
            &Event::Heartbeat {
                member,
                generation,
                step,
                progress,
                ref activity,
                lane_us,
                stored_bytes,
            } => {
                if self.knows(member)
                    && let Some(worker) = self.workers.get_mut(member.worker)
                {
                    worker.heard_ms = now_ms;
                    let stores = std::mem::replace(&mut worker.stored_bytes, stored_bytes) != stored_bytes;
                    if generation == self.generation {
                        worker.step = step;
                        worker.lane_us = lane_us;
                        if worker.progress != progress {
                            worker.progress = progress;
                            self.progressed_ms = now_ms;
                        }
                    }
                    self.workers.set_activity(member.worker, activity);
                    if stores {
                        self.put_off_last_checkpoint(now_ms);
                    }
                }
                Vec::new()
            }
            &Event::LineWritten { step } => self.on_line_written(now_ms, step),
            Event::Located { checkpoint } => self.on_located(now_ms, checkpoint.clone()),
            &Event::CheckpointCommitted { step } => {
                self.checkpointed = self.checkpointed.max(Some(step));
                self.refuted = None;
                self.unreadable.clear();
                self.leave_when_saved(now_ms)
            }
            &Event::CheckpointFailed { step, ref cause, full } => {
                // Training goes on, and the next checkpoint may succeed; the last one is tried again.
                self.save_failed = Some((step, cause.clone(), full));
                self.save_again(now_ms)
            }
            &Event::Resize { ranks } => self.on_resize(now_ms, ranks),
            &Event::EndsAt { step } => {
                self.ends_at = step;
                Vec::new()
            }
            &Event::NodeAway { node } => {
                self.away.insert(node);
                Vec::new()
            }
            &Event::NodeBack { node } => {
                self.on_node_back(now_ms, node);
                Vec::new()
            }
            Event::GoesBack { rollbacks } => {
                self.rollbacks = rollbacks.clone();
                Vec::new()
            }
            Event::StopRequested => self.on_stop(now_ms),
            Event::Tick => self.on_tick(now_ms),
        }
    }

    fn on_state(&mut self, now_ms: u64, member: Member, generation: Generation, report: &StateReport) -> Vec<Effect> {
        if !self.is_current(member, generation) {
            return Vec::new();
        }
        self.heard(now_ms, member);
        let Phase::Fencing { awaiting, survey, .. } = &mut self.phase else {
            return Vec::new();
        };
        if awaiting.remove(member.worker) {
            survey.hear(member, &report.shards, report.passed.as_ref());
            if let Some(worker) = self.workers.get_mut(member.worker) {
                worker.waits_for = report.waits_for;
            }
        }
        // Of many, only the last one settles anything.
        if !awaiting.is_empty() {
            return Vec::new();
        }
        self.settle_fence(now_ms)
    }

    fn heard(&mut self, now_ms: u64, member: Member) {
        if let Some(worker) = self.workers.get_mut(member.worker) {
            worker.heard_ms = now_ms;
        }
    }

    fn on_ready(&mut self, now_ms: u64, member: Member, address: &str, pid: u32, newest: Generation) -> Vec<Effect> {
        if !self.knows(member) {
            let present = self.workers.get(member.worker).map(|worker| worker.incarnation);
            if present < Some(member.incarnation) && present.is_some() && !self.options.hosts.is_empty() {
                // Its node started it for the controller before, after this one had read who is there.
                let word = (member.incarnation, address.to_owned(), pid, newest);
                self.unexpected.insert(member.worker, word);
                return Vec::new();
            }
            return vec![Effect::Kill {
                member,
                reason: "a life that was given up".to_owned(),
            }];
        }
        let phase = self.workers.get(member.worker).map(|worker| &worker.phase);
        if matches!(phase, Some(WorkerPhase::Left | WorkerPhase::Ending { .. })) || self.workers.is_doomed(member) {
            return Vec::new(); // its last words, overtaken by its end
        }
        self.heard(now_ms, member);
        if newest == Generation(0) && !self.is_wanted(member.worker) {
            let mut effects = self.release(vec![member]);
            if let Phase::Adopting { awaiting } = &mut self.phase {
                awaiting.remove(member.worker);
                effects.extend(self.settle_adoption(now_ms));
            }
            return effects;
        }
        if newest != Generation(0) {
            return self.on_back(now_ms, member, address, pid, newest);
        }
        self.workers.set_phase(member.worker, WorkerPhase::Ready);
        self.workers.set_process(member.worker, address, pid);
        match &mut self.phase {
            // It was only just started when its controller died.
            Phase::Adopting { awaiting, .. } => {
                awaiting.remove(member.worker);
                self.settle_adoption(now_ms)
            }
            Phase::Forming => self.try_form(),
            Phase::Running { .. } if self.roster.len() < self.options.ranks as usize => self.ask_to_pause(false),
            _ => Vec::new(), // a spare, or admitted by the generation that is being agreed on
        }
    }

    /// A rank that holds what it held under an earlier controller, or under this one before its session was cut.
    fn on_back(&mut self, now_ms: u64, member: Member, address: &str, pid: u32, newest: Generation) -> Vec<Effect> {
        let Phase::Adopting { awaiting, .. } = &mut self.phase else {
            // What it holds may be of a world that is over, and messages between it and this controller are lost.
            let reason = "its control session was interrupted".to_owned();
            return vec![Effect::Kill { member, reason }];
        };
        if awaiting.remove(member.worker) {
            self.workers.set_phase(member.worker, WorkerPhase::Member);
            self.workers.set_process(member.worker, address, pid);
            // A fence must be newer than all that any of them heard of, or they would take it for an old one.
            self.generation = self.generation.max(newest);
        }
        self.settle_adoption(now_ms)
    }

    /// Once everybody who was left behind is back or has ended: those who are back agree on the step, as survivors do.
    fn settle_adoption(&mut self, now_ms: u64) -> Vec<Effect> {
        if !matches!(&self.phase, Phase::Adopting { awaiting, .. } if awaiting.is_empty()) {
            return Vec::new();
        }
        let members = self.workers.members();
        if members.is_empty() {
            self.phase = Phase::Forming;
            return self.try_form();
        }
        let mut effects = vec![Effect::Note(Incident::Adopted { members })];
        effects.extend(self.fence(now_ms, "a new controller took over".to_owned(), None));
        effects
    }

    pub(super) fn try_form(&mut self) -> Vec<Effect> {
        if self.workers.ready_count() >= self.options.ranks as usize {
            self.phase = Phase::Locating;
            vec![self.find_checkpoint()]
        } else {
            Vec::new()
        }
    }

    /// Asks every member to pause together at the next boundary; the barrier spreads the wish, so one that hears it
    /// late does not run ahead.
    pub(super) fn ask_to_pause(&mut self, checkpoint: bool) -> Vec<Effect> {
        let generation = self.generation;
        let Phase::Running { pause_sent, .. } = &mut self.phase else {
            return Vec::new();
        };
        if *pause_sent && !checkpoint {
            return Vec::new();
        }
        *pause_sent = true;
        let members: Vec<Member> = self.roster.iter().map(|&(member, _)| member).collect();
        let message = ToRank::Pause { generation, checkpoint };
        send_to(members, message).into_iter().collect()
    }

    /// It can do nothing any more, and holds nothing: the others of its generation are fenced now. What became of it, and its next life, wait
    /// for its exit.
    fn on_ending(&mut self, now_ms: u64, member: Member, cause: String) -> Vec<Effect> {
        if !self.knows(member) || matches!(self.phase, Phase::Leaving { .. }) {
            return Vec::new();
        }
        let phase = self.workers.get(member.worker).map(|worker| &worker.phase);
        let holds = matches!(phase, Some(WorkerPhase::Member));
        match phase {
            Some(WorkerPhase::Member | WorkerPhase::Ready) => {}
            Some(WorkerPhase::Starting { .. }) => {
                self.workers.doom(member);
                // One of an earlier controller that is waited for.
                if let Phase::Adopting { awaiting } = &mut self.phase
                    && awaiting.remove(member.worker)
                {
                    return self.settle_adoption(now_ms);
                }
                return Vec::new();
            }
            _ => return Vec::new(),
        }
        let rank = self.rank_of(member);
        let silent_ms = self.silent_ms(now_ms, member);
        self.workers
            .set_phase(member.worker, WorkerPhase::Ending { rank, silent_ms });
        let mut effects = vec![Effect::Note(Incident::RankEnding {
            member,
            rank,
            cause: cause.clone(),
            silent_ms,
        })];
        // A spare is only not admitted any more.
        if holds {
            effects.extend(self.go_on_without(now_ms, member, rank, format!("{member}: {cause}")));
        }
        effects
    }

    /// A life that is asked for now may be there already, and have said so.
    fn hear_unexpected(&mut self, now_ms: u64, member: Member) -> Vec<Effect> {
        match self.unexpected.remove(&member.worker) {
            Some((incarnation, address, pid, newest)) if incarnation == member.incarnation => {
                self.on_ready(now_ms, member, &address, pid, newest)
            }
            _ => Vec::new(),
        }
    }

    /// Whether nobody could start or end this worker's processes now.
    pub(super) fn is_away(&self, worker: WorkerId) -> bool {
        let node = self.options.hosts.get(worker.index());
        node.is_some_and(|node| self.away.contains(node))
    }

    /// Those who waited for their node have the time of a start from now on.
    fn on_node_back(&mut self, now_ms: u64, node: u32) {
        self.away.remove(&node);
        let deadline_ms = now_ms + self.options.timeouts.start_ms;
        for member in self.workers.starting() {
            if self.options.hosts.get(member.worker.index()) == Some(&node) {
                self.workers
                    .set_phase(member.worker, WorkerPhase::Starting { deadline_ms });
            }
        }
    }

    fn silent_ms(&self, now_ms: u64, member: Member) -> u64 {
        let worker = self.workers.get(member.worker);
        worker.map_or(0, |worker| now_ms.saturating_sub(worker.heard_ms))
    }

    fn on_exited(&mut self, now_ms: u64, member: Member, cause: &str, orderly: bool) -> Vec<Effect> {
        if !self.knows(member) {
            return Vec::new();
        }
        if matches!(self.phase, Phase::Leaving { .. }) {
            self.workers.set_phase(member.worker, WorkerPhase::Left);
            return self.settle_leaving();
        }
        if self.workers.is(member.worker, &WorkerPhase::Released) {
            return self.on_released(now_ms, member);
        }
        let cause = if orderly {
            format!("{cause} before it was told to leave")
        } else {
            cause.to_owned()
        };
        let seat = self.rank_of(member);
        let (rank, silent_ms, expected) = match self.workers.get(member.worker).map(|worker| &worker.phase) {
            Some(&WorkerPhase::Ending { rank, silent_ms }) => (rank, silent_ms, true),
            _ => (seat, self.silent_ms(now_ms, member), false),
        };
        let mut effects = vec![Effect::Note(Incident::RankLost {
            member,
            rank,
            cause: cause.clone(),
            silent_ms,
            expected,
        })];
        let start_ms = self.options.timeouts.start_ms;
        match self.workers.on_death(member.worker, format!("{member}: {cause}")) {
            _ if !self.is_wanted(member.worker) => self.workers.set_phase(member.worker, WorkerPhase::Left),
            Verdict::Restart { after_ms } => {
                let deadline_ms = now_ms + after_ms + start_ms;
                let successor = self.workers.restart(now_ms, member.worker, deadline_ms);
                if !Mutant::DeadStayDead.is_on() {
                    effects.push(Effect::Start {
                        member: successor,
                        after_ms,
                    });
                }
                effects.extend(self.hear_unexpected(now_ms, successor));
            }
            Verdict::GiveUp { causes } => {
                self.workers.set_phase(member.worker, WorkerPhase::Left);
                let what = format!(
                    "worker {} died {} times without taking part in a committed step between; causes, oldest first:\n  {}",
                    member.worker,
                    causes.len(),
                    causes.join("\n  ")
                );
                effects.extend(self.give_up(now_ms, what));
            }
        }
        if !expected {
            effects.extend(self.go_on_without(now_ms, member, seat, cause));
        }
        effects
    }

    /// `member`, of this rank in the present roster, is no member any more.
    fn go_on_without(&mut self, now_ms: u64, member: Member, seat: Option<Rank>, cause: String) -> Vec<Effect> {
        match &mut self.phase {
            Phase::Adopting { awaiting, .. } => {
                awaiting.remove(member.worker);
                self.settle_adoption(now_ms)
            }
            Phase::Running { .. } | Phase::Finishing { .. } if seat.is_some() => self.fence(now_ms, cause, None),
            Phase::Fencing {
                awaiting,
                survey,
                alarm,
                ..
            } => {
                awaiting.remove(member.worker);
                survey.forget(member);
                *alarm = None; // here is the cause
                self.settle_fence(now_ms)
            }
            _ => Vec::new(),
        }
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
    pub(super) fn fence(&mut self, now_ms: u64, cause: String, alarm: Option<Alarm>) -> Vec<Effect> {
        if let Verdict::GiveUp { causes } = self.fruitless.on_death(cause) {
            let what = format!(
                "{} generations in a row committed no step; causes, oldest first:\n  {}",
                causes.len(),
                causes.join("\n  ")
            );
            return self.halt(3, what);
        }
        self.begin_fence(now_ms, alarm)
    }

    /// The same, whatever led to it.
    pub(super) fn begin_fence(&mut self, now_ms: u64, alarm: Option<Alarm>) -> Vec<Effect> {
        if !Mutant::FenceKeepsGeneration.is_on() {
            self.generation = self.generation.next();
        }
        let generation = self.generation;
        let survivors = self.workers.members();
        self.phase = Phase::Fencing {
            deadline_ms: now_ms + self.options.timeouts.fence_ms,
            alarm,
            awaiting: WorkerSet::of(&survivors),
            survey: Survey::with_capacity(survivors.len(), self.options.shard_count * self.options.replicas),
        };
        let mut effects: Vec<Effect> = send_to(survivors, ToRank::Fence { generation }).into_iter().collect();
        effects.extend(self.settle_fence(now_ms));
        effects
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
        let acted = self.acted();
        let Phase::Fencing { survey, .. } = &mut self.phase else {
            return Vec::new();
        };
        let survivors = survey.answered().to_vec();
        if survivors.is_empty() {
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
        if self.distrusted {
            if let Some((code, diagnosis)) = self.verdict.take() {
                return self.halt(code, diagnosis);
            }
            self.phase = Phase::Locating;
            return vec![self.find_checkpoint()];
        }
        let left_behind = survey.holds_dead(&acted);
        match survey.resolve(self.options.shard_count, &acted) {
            Ok(agreement) => self.begin(now_ms, agreement.into(), survivors),
            Err(missing) => {
                if let Some((code, diagnosis)) = self.verdict.take() {
                    return self.halt(code, diagnosis);
                }
                self.phase = Phase::Locating;
                let note = match acted.last().filter(|_| left_behind) {
                    Some(rollback) => Incident::RolledBack { rollback },
                    None => Incident::StateLost {
                        shards_missing: missing.len(),
                    },
                };
                vec![Effect::Note(note), self.find_checkpoint()]
            }
        }
    }

    fn on_located(&mut self, now_ms: u64, checkpoint: Option<RestoreFrom>) -> Vec<Effect> {
        if !matches!(self.phase, Phase::Locating) {
            return Vec::new();
        }
        // The line before a rollback's step may have been written since it was looked for: then it may be one left behind.
        if checkpoint.as_ref().is_some_and(|from| !self.acted().is_live(from.step)) {
            return vec![self.find_checkpoint()];
        }
        if checkpoint.is_none()
            && let Some(halt) = self.nothing_to_restore()
        {
            return halt;
        }
        // Survivors may still run an old generation's leftovers: the number they begin with must be new to all.
        if !Mutant::RestoreReusesGeneration.is_on() {
            self.generation = self.generation.next();
        }
        self.checkpointed = checkpoint.as_ref().map(|from| from.step);
        let (base, restore) = (self.checkpointed.unwrap_or_default(), checkpoint);
        let holders = Holders::nobody(self.options.shard_count);
        let ground = Ground {
            base,
            outcome: None,
            holders,
            restore,
        };
        if self.workers.is_deserted() {
            self.phase = Phase::Forming;
            return Vec::new();
        }
        let members = self.workers.members();
        self.begin(now_ms, ground, members)
    }

    fn on_failed(&mut self, now_ms: u64, member: Member, cause: &str, suspects: &[Rank]) -> Vec<Effect> {
        let roster = &self.roster;
        let named = suspects
            .iter()
            .filter_map(|rank| roster.get(rank.index()).map(|&(member, _)| member));
        // The first one names the cause; where all of a large world fail together, the others' words are not even made.
        if let Phase::Running {
            failed,
            suspects: complaints,
            ..
        } = &mut self.phase
        {
            complaints.extend(named);
            failed.get_or_insert_with(|| {
                let named: Vec<String> = suspects.iter().map(|rank| format!("rank {rank}")).collect();
                let named = if named.is_empty() {
                    "no suspect".into()
                } else {
                    named.join(", ")
                };
                (now_ms, format!("{member}: {cause} ({named})"))
            });
        }
        Vec::new()
    }

    fn on_paused(&mut self, now_ms: u64, member: Member, step: StepsCompleted, saving: bool) -> Vec<Effect> {
        let in_roster = self.in_roster(member);
        let Phase::Running { paused, .. } = &mut self.phase else {
            return Vec::new();
        };
        if in_roster {
            paused.insert(member.worker);
        }
        if paused.len() < self.roster.len() {
            return Vec::new();
        }
        let ends_here = step >= self.last_step() || self.stop.is_some();
        if ends_here && (saving || self.is_saved(step)) {
            let deadline_ms = now_ms + self.options.timeouts.stop_ms;
            self.phase = Phase::Finishing { step, deadline_ms };
            let mut effects = self.leave_when_saved(now_ms);
            effects.extend(self.save_again(now_ms));
            return effects;
        }
        if self.rollbacks.acting_at(step).is_some() {
            return self.go_back(now_ms);
        }
        // A pause is no failure. Where the stop came too late for this boundary's checkpoint, the new generation begins
        // with one.
        self.fruitless.on_progress();
        self.fence(now_ms, "paused at a step boundary".to_owned(), None)
    }

    /// All stand at a boundary at which a rollback acts. What they hold leads to its line, and is needed until that is
    /// written: then it is dead, and so it is at the fence.
    fn go_back(&mut self, now_ms: u64) -> Vec<Effect> {
        let Phase::Running { paused, .. } = &self.phase else {
            return Vec::new();
        };
        if paused.len() < self.roster.len() || self.rollbacks.acting_at(self.written).is_none() {
            return Vec::new();
        }
        self.begin_fence(now_ms, None)
    }

    fn on_line_written(&mut self, now_ms: u64, step: StepsCompleted) -> Vec<Effect> {
        // A line that is only checked on a replay is no progress: a death at the same step again and again must end.
        if step <= self.written {
            return self.leave_when_saved(now_ms);
        }
        self.written = step;
        self.progressed_ms = now_ms;
        self.strikes.clear();
        self.fruitless.on_progress();
        let roster = &self.roster;
        self.workers
            .on_progress(|member, seat| roster.get(seat.index()).is_some_and(|(seated, _)| *seated == member));
        let mut effects = self.go_back(now_ms);
        effects.extend(self.leave_when_saved(now_ms));
        effects
    }

    /// Ranks store: a large state takes its time, and nothing new for so long is what counts.
    fn put_off_last_checkpoint(&mut self, now_ms: u64) {
        if let Phase::Finishing { deadline_ms, .. } = &mut self.phase {
            *deadline_ms = now_ms + self.options.timeouts.stop_ms;
            self.stop = self.stop.map(|_| now_ms);
        }
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
        let mut members = self.workers.members();
        members.extend(self.workers.ready());
        let mut effects: Vec<Effect> = send_to(members, ToRank::Shutdown).into_iter().collect();
        for member in self.workers.starting() {
            effects.push(Effect::Kill {
                member,
                reason: "the run is over".to_owned(),
            });
        }
        effects
    }

    fn settle_leaving(&mut self) -> Vec<Effect> {
        if self.workers.is_deserted() {
            self.done()
        } else {
            Vec::new()
        }
    }

    /// Whether nothing of this step is left to be saved; before the first step nothing is.
    pub(super) fn is_saved(&self, step: StepsCompleted) -> bool {
        step == StepsCompleted(0) || self.checkpointed >= Some(step)
    }

    /// The last checkpoint failed: the state is still in the ranks' memory, so a new generation saves it anew.
    pub(super) fn save_again(&mut self, now_ms: u64) -> Vec<Effect> {
        let Phase::Finishing { step, .. } = self.phase else {
            return Vec::new();
        };
        let Some((_, cause, full)) = self.save_failed.take_if(|(failed, ..)| *failed == step) else {
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
                self.halt(if full { 3 } else { 33 }, what)
            }
        }
    }

    pub(super) fn done(&mut self) -> Vec<Effect> {
        if let Some((code, diagnosis)) = self.verdict.take() {
            return self.halt(code, diagnosis);
        }
        self.phase = Phase::Done;
        let finished = self.checkpointed.is_some_and(|step| step >= self.last_step());
        vec![Effect::Done {
            code: if finished { 0 } else { 34 },
        }]
    }

    pub(super) fn halt(&mut self, code: u8, diagnosis: String) -> Vec<Effect> {
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
}

/// One message to all of them, where there is anybody.
fn send_to(members: Vec<Member>, message: ToRank) -> Option<Effect> {
    (!members.is_empty()).then_some(Effect::Send { members, message })
}
