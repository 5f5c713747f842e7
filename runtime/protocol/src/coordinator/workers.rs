//! The worker slots, laid out for worlds of a hundred thousand: what every generation touches lies densely together, and
//! who starts, who is ready and whose deaths count are found without looking at everybody.

use super::{Worker, WorkerPhase};
use crate::message::Member;
use crate::restart::{RestartLimiter, Verdict};
use std::collections::BTreeSet;
use tarazed_domain::{Incarnation, StepsCompleted, WorkerId};

/// Every worker slot, by its number.
#[derive(Debug, Default)]
pub(super) struct Workers {
    slots: Vec<Worker>,
    addresses: Vec<String>,
    lives: Vec<Life>,
    /// Those told to start, by deadline.
    starting: BTreeSet<(u64, WorkerId)>,
    ready: BTreeSet<WorkerId>,
    member_count: usize,
    /// Those whose limiter counts a death.
    strained: BTreeSet<WorkerId>,
}

/// What only people and the restart policy look at.
#[derive(Debug)]
struct Life {
    pid: u32,
    activity: String,
    limiter: RestartLimiter,
}

impl Workers {
    /// One more slot, whose present life is `incarnation`: it is told to start, or is there already.
    pub(super) fn push(
        &mut self,
        now_ms: u64,
        deadline_ms: u64,
        incarnation: Incarnation,
        limiter: RestartLimiter,
    ) -> Member {
        let worker = WorkerId(self.slots.len() as u32);
        self.slots.push(Worker {
            incarnation,
            phase: WorkerPhase::Starting { deadline_ms },
            heard_ms: now_ms,
            step: StepsCompleted(0),
            progress: 0,
            lane_us: 0,
            waits_for: None,
            seat: usize::MAX,
        });
        self.starting.insert((deadline_ms, worker));
        self.addresses.push(String::new());
        self.lives.push(Life {
            pid: 0,
            activity: String::new(),
            limiter,
        });
        self.member(worker)
    }

    pub(super) fn get(&self, worker: WorkerId) -> Option<&Worker> {
        self.slots.get(worker.index())
    }

    /// Phases are changed by [`Self::set_phase`] alone.
    pub(super) fn get_mut(&mut self, worker: WorkerId) -> Option<&mut Worker> {
        self.slots.get_mut(worker.index())
    }

    /// The present life of a slot that exists.
    pub(super) fn member(&self, worker: WorkerId) -> Member {
        let incarnation = self.slots[worker.index()].incarnation;
        Member { worker, incarnation }
    }

    /// Every slot and its present life, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Member, &Worker)> {
        self.slots.iter().zip(0..).map(|(slot, worker)| {
            let (worker, incarnation) = (WorkerId(worker), slot.incarnation);
            (Member { worker, incarnation }, slot)
        })
    }

    pub(super) fn pid(&self, worker: WorkerId) -> u32 {
        self.lives[worker.index()].pid
    }

    pub(super) fn address(&self, worker: WorkerId) -> &str {
        &self.addresses[worker.index()]
    }

    pub(super) fn activity(&self, worker: WorkerId) -> &str {
        &self.lives[worker.index()].activity
    }

    pub(super) fn set_process(&mut self, worker: WorkerId, address: String, pid: u32) {
        self.addresses[worker.index()] = address;
        self.lives[worker.index()].pid = pid;
    }

    pub(super) fn set_activity(&mut self, worker: WorkerId, activity: String) {
        self.lives[worker.index()].activity = activity;
    }

    /// The process is gone: the next life of the slot is told to start.
    pub(super) fn restart(&mut self, now_ms: u64, worker: WorkerId, deadline_ms: u64) -> Member {
        self.set_phase(worker, WorkerPhase::Starting { deadline_ms });
        let slot = &mut self.slots[worker.index()];
        slot.incarnation = slot.incarnation.next();
        slot.heard_ms = now_ms;
        slot.lane_us = 0;
        self.lives[worker.index()].pid = 0;
        self.member(worker)
    }

    pub(super) fn set_phase(&mut self, worker: WorkerId, phase: WorkerPhase) {
        let before = std::mem::replace(&mut self.slots[worker.index()].phase, phase);
        match before {
            WorkerPhase::Starting { deadline_ms } => drop(self.starting.remove(&(deadline_ms, worker))),
            WorkerPhase::Ready => drop(self.ready.remove(&worker)),
            WorkerPhase::Member => self.member_count -= 1,
            WorkerPhase::Ending { .. } | WorkerPhase::Released | WorkerPhase::Left => {}
        }
        match self.slots[worker.index()].phase {
            WorkerPhase::Starting { deadline_ms } => drop(self.starting.insert((deadline_ms, worker))),
            WorkerPhase::Ready => drop(self.ready.insert(worker)),
            WorkerPhase::Member => self.member_count += 1,
            WorkerPhase::Ending { .. } | WorkerPhase::Released | WorkerPhase::Left => {}
        }
    }

    /// `worker` is a member of the generation that begins.
    pub(super) fn admit(&mut self, now_ms: u64, worker: WorkerId, step: StepsCompleted) {
        if self.slots[worker.index()].phase != WorkerPhase::Member {
            self.set_phase(worker, WorkerPhase::Member);
        }
        let slot = &mut self.slots[worker.index()];
        slot.heard_ms = now_ms;
        slot.step = step;
    }

    /// Everybody stands back from `absent_ms` of the observer's own absence.
    pub(super) fn excuse(&mut self, absent_ms: u64) {
        for slot in &mut self.slots {
            slot.heard_ms += absent_ms;
            if let WorkerPhase::Starting { deadline_ms } = &mut slot.phase {
                *deadline_ms += absent_ms;
            }
        }
        let starting = std::mem::take(&mut self.starting).into_iter();
        self.starting = starting
            .map(|(deadline_ms, worker)| (deadline_ms + absent_ms, worker))
            .collect();
    }

    pub(super) fn on_death(&mut self, worker: WorkerId, cause: String) -> Verdict {
        self.strained.insert(worker);
        self.lives[worker.index()].limiter.on_death(cause)
    }

    /// A step was committed: deaths of those that `took_part` (present life, last seat) no longer count (SUP-3).
    pub(super) fn on_progress(&mut self, took_part: impl Fn(Member, usize) -> bool) {
        let (slots, lives) = (&self.slots, &mut self.lives);
        self.strained.retain(|&worker| {
            let slot = &slots[worker.index()];
            let incarnation = slot.incarnation;
            let took_part = took_part(Member { worker, incarnation }, slot.seat);
            if took_part {
                lives[worker.index()].limiter.on_progress();
            }
            !took_part
        });
    }

    pub(super) fn is(&self, worker: WorkerId, phase: &WorkerPhase) -> bool {
        self.get(worker).is_some_and(|slot| slot.phase == *phase)
    }

    /// Those in the roster of the present generation and the survivors of it, in order.
    pub(super) fn members(&self) -> Vec<Member> {
        let mut members = Vec::with_capacity(self.member_count);
        members.extend(
            self.iter()
                .filter(|(_, slot)| slot.phase == WorkerPhase::Member)
                .map(|(member, _)| member),
        );
        members
    }

    /// Those that wait to be admitted, in order.
    pub(super) fn ready(&self) -> impl Iterator<Item = Member> {
        self.ready.iter().map(|&worker| self.member(worker))
    }

    /// Those told to start, in order.
    pub(super) fn starting(&self) -> Vec<Member> {
        let mut starting: Vec<Member> = self.starting.iter().map(|&(_, worker)| self.member(worker)).collect();
        starting.sort_unstable();
        starting
    }

    /// When the first of those that start is late.
    pub(super) fn start_deadline_ms(&self) -> Option<u64> {
        self.starting.first().map(|&(deadline_ms, _)| deadline_ms)
    }

    /// Whether nobody is a member or waits to be one.
    pub(super) fn is_deserted(&self) -> bool {
        self.member_count == 0 && self.ready.is_empty()
    }

    pub(super) fn ready_count(&self) -> usize {
        self.ready.len()
    }

    pub(super) fn slot_count(&self) -> usize {
        self.slots.len()
    }

    #[cfg(test)]
    pub(super) fn limiters_mut(&mut self) -> impl Iterator<Item = &mut RestartLimiter> {
        self.lives.iter_mut().map(|life| &mut life.limiter)
    }
}

/// A set of workers that holds most of them, or none.
#[derive(Debug, Default)]
pub(super) struct WorkerSet {
    has: Vec<bool>,
    len: usize,
}

impl WorkerSet {
    pub(super) fn contains(&self, worker: WorkerId) -> bool {
        self.has.get(worker.index()).is_some_and(|&has| has)
    }

    /// Whether it was not there before.
    pub(super) fn insert(&mut self, worker: WorkerId) -> bool {
        if self.has.len() <= worker.index() {
            self.has.resize(worker.index() + 1, false);
        }
        let new = !std::mem::replace(&mut self.has[worker.index()], true);
        self.len += usize::from(new);
        new
    }

    /// Whether it was there.
    pub(super) fn remove(&mut self, worker: WorkerId) -> bool {
        let old = self.has.get_mut(worker.index()).is_some_and(std::mem::take);
        self.len -= usize::from(old);
        old
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl FromIterator<WorkerId> for WorkerSet {
    fn from_iter<I: IntoIterator<Item = WorkerId>>(workers: I) -> Self {
        let mut set = Self::default();
        for worker in workers {
            set.insert(worker);
        }
        set
    }
}
