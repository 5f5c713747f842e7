//! The worker slots, laid out for worlds of a hundred thousand: what every generation touches lies densely together, and
//! who starts, who is ready and whose deaths count are found without looking at everybody.

use super::{Worker, WorkerPhase};
use crate::message::{Addresses, Member};
use crate::restart::{RestartLimiter, Verdict};
use std::collections::{BTreeMap, BTreeSet};
use tarazed_domain::{Incarnation, Rank, StepsCompleted, WorkerId};

/// Every worker slot, by its number.
#[derive(Debug, Default)]
pub(super) struct Workers {
    slots: Vec<Worker>,
    /// Where in the roster each was last; the roster tells whether it still is.
    seats: Vec<Rank>,
    addresses: Addresses,
    /// Those that are not yet put among `addresses`: in one piece of memory, these are changed all at once.
    new_addresses: BTreeMap<WorkerId, String>,
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
    /// The life whose end began before it was ready.
    ending: Option<Incarnation>,
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
            stored_bytes: 0,
            waits_for: None,
        });
        self.seats.push(Rank(u32::MAX));
        self.starting.insert((deadline_ms, worker));
        self.addresses.push("");
        self.lives.push(Life {
            pid: 0,
            activity: String::new(),
            ending: None,
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

    /// Where in the roster it was last.
    pub(super) fn seat(&self, worker: WorkerId) -> Option<Rank> {
        self.seats.get(worker.index()).copied()
    }

    /// `worker`, which exists, has this rank in the roster.
    pub(super) fn set_seat(&mut self, worker: WorkerId, seat: Rank) {
        self.seats[worker.index()] = seat;
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

    /// Adds the addresses of these, which exist.
    pub(super) fn add_addresses(&mut self, members: &[Member], to: &mut Addresses) {
        if !self.new_addresses.is_empty() {
            let mut addresses = Addresses::default();
            for (worker, address) in std::mem::take(&mut self.new_addresses) {
                addresses.extend_from(&self.addresses, addresses.len()..worker.index());
                addresses.push(&address);
            }
            addresses.extend_from(&self.addresses, addresses.len()..self.slots.len());
            self.addresses = addresses;
        }
        // Nearly all are one behind the other.
        for row in members.chunk_by(|one, next| next.worker.index() == one.worker.index() + 1) {
            let first = row[0].worker.index();
            to.extend_from(&self.addresses, first..first + row.len());
        }
    }

    pub(super) fn activity(&self, worker: WorkerId) -> &str {
        &self.lives[worker.index()].activity
    }

    /// A life that is not ready yet ends: it never will be.
    pub(super) fn doom(&mut self, member: Member) {
        self.lives[member.worker.index()].ending = Some(member.incarnation);
    }

    pub(super) fn is_doomed(&self, member: Member) -> bool {
        self.lives[member.worker.index()].ending == Some(member.incarnation)
    }

    pub(super) fn set_process(&mut self, worker: WorkerId, address: &str, pid: u32) {
        self.new_addresses.insert(worker, address.to_owned());
        self.lives[worker.index()].pid = pid;
    }

    pub(super) fn set_activity(&mut self, worker: WorkerId, activity: &str) {
        activity.clone_into(&mut self.lives[worker.index()].activity);
    }

    /// The process is gone: the next life of the slot is told to start.
    pub(super) fn restart(&mut self, now_ms: u64, worker: WorkerId, deadline_ms: u64) -> Member {
        self.set_phase(worker, WorkerPhase::Starting { deadline_ms });
        let slot = &mut self.slots[worker.index()];
        slot.incarnation = slot.incarnation.next();
        slot.heard_ms = now_ms;
        slot.lane_us = 0;
        slot.stored_bytes = 0;
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

    /// Everybody stands back from `absent_ms` of the observer's own absence; `excused` is what a time that is counted from becomes.
    pub(super) fn excuse(&mut self, absent_ms: u64, excused: impl Fn(u64) -> u64) {
        for slot in &mut self.slots {
            slot.heard_ms = excused(slot.heard_ms);
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
    pub(super) fn on_progress(&mut self, took_part: impl Fn(Member, Rank) -> bool) {
        let (slots, seats, lives) = (&self.slots, &self.seats, &mut self.lives);
        self.strained.retain(|&worker| {
            let incarnation = slots[worker.index()].incarnation;
            let took_part = took_part(Member { worker, incarnation }, seats[worker.index()]);
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
    /// All of these, in order.
    pub(super) fn of(members: &[Member]) -> Self {
        let mut has = vec![false; members.last().map_or(0, |last| last.worker.index() + 1)];
        for member in members {
            has[member.worker.index()] = true;
        }
        Self {
            has,
            len: members.len(),
        }
    }

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
