//! The size of the world: it grows by new workers, and shrinks without losing what those who leave hold.
//!
//! Whoever leaves may hold the last copy of a shard. So a world that shrinks runs one more generation with everybody, in
//! which those who leave compute lanes and hold no shard: the others copy from them. At its first boundary all pause, and
//! the next generation begins without them.

use super::{Coordinator, Effect, Ground, Phase, WorkerPhase};
use crate::message::Member;
use tarazed_domain::{Incarnation, Mutant, WorkerId};

/// Who takes part in a generation.
pub(super) struct Cast {
    /// Those who hold shards, in order.
    pub(super) staying: Vec<Member>,
    /// Those who leave after this generation, and hold none.
    pub(super) leaving: Vec<Member>,
    /// Those who are not in it any more.
    pub(super) released: Vec<Member>,
}

impl Coordinator {
    /// From now on the world is to have this many ranks.
    pub(super) fn on_resize(&mut self, now_ms: u64, ranks: u32) -> Vec<Effect> {
        if self.stop.is_some() || matches!(self.phase, Phase::Leaving { .. }) {
            return Vec::new(); // it ends as it is
        }
        self.options.ranks = ranks.clamp(1, self.options.lanes.lane_count());
        let mut effects = Vec::new();
        let deadline_ms = now_ms + self.options.timeouts.start_ms;
        for worker in (0..self.slots_wanted()).map(WorkerId) {
            if worker.index() >= self.workers.slot_count() {
                let member = self.new_worker(now_ms, deadline_ms, Incarnation(0));
                effects.push(Effect::Start { member, after_ms: 0 });
            } else if self.workers.is(worker, &WorkerPhase::Left) {
                let member = self.workers.restart(now_ms, worker, deadline_ms);
                effects.push(Effect::Start { member, after_ms: 0 });
            }
        }
        let idle = self.workers.starting().into_iter().chain(self.workers.ready());
        // Those of an earlier controller that are still waited for hold what nobody else may hold.
        let awaited = |worker| matches!(&self.phase, Phase::Adopting { awaiting } if awaiting.contains(worker));
        let unwanted: Vec<Member> = idle
            .filter(|member| !self.is_wanted(member.worker) && !awaited(member.worker))
            .collect();
        effects.extend(self.release(unwanted));
        match self.phase {
            Phase::Forming => effects.extend(self.try_form()),
            Phase::Running { .. } if self.is_of_another_size() => effects.extend(self.ask_to_pause(false)),
            _ => {} // the generation that is being agreed on has the new size
        }
        effects
    }

    /// Whether a generation that begins now would have other members.
    fn is_of_another_size(&self) -> bool {
        let (has, wants) = (self.roster.len(), self.options.ranks as usize);
        has > wants || (has < wants && self.workers.ready_count() > 0)
    }

    /// One that the world has no place for has ended. Where a spare is wanted, it begins anew as one.
    pub(super) fn on_released(&mut self, now_ms: u64, member: Member) -> Vec<Effect> {
        self.workers.set_phase(member.worker, WorkerPhase::Left);
        if !self.is_wanted(member.worker) {
            return Vec::new();
        }
        let deadline_ms = now_ms + self.options.timeouts.start_ms;
        let member = self.workers.restart(now_ms, member.worker, deadline_ms);
        vec![Effect::Start { member, after_ms: 0 }]
    }

    /// Spreads the parts: as many as the world should have stay, survivors first; the rest leaves at once where nothing
    /// would be missed.
    pub(super) fn cast(&self, ground: &Ground, survivors: Vec<Member>) -> Cast {
        let wants = self.options.ranks as usize;
        let mut staying = survivors;
        // Those that the world has no slot for are the highest: they go first. Stable, since nearly all are in order already.
        staying.sort();
        let mut leaving = staying.split_off(wants.min(staying.len()));
        let room = wants - staying.len();
        staying.extend(self.workers.ready().take(room));
        // Stable: it makes use of what is in order already, and that is nearly all.
        staying.sort();
        let mut released = Vec::new();
        let nothing_missed = || self.holds_all(ground, &staying) || Mutant::LeaversDropped.is_on();
        if !leaving.is_empty() && nothing_missed() {
            released = std::mem::take(&mut leaving);
        }
        Cast {
            staying,
            leaving,
            released,
        }
    }

    /// Whether these hold everything that is held at all.
    fn holds_all(&self, ground: &Ground, members: &[Member]) -> bool {
        let holds = |shard| {
            let holders = ground.holders.of(shard);
            holders.is_empty() || holders.iter().any(|holder| members.binary_search(holder).is_ok())
        };
        (0..self.options.shard_count).all(holds)
    }

    /// They end, and what they held is held by others.
    pub(super) fn release(&mut self, members: Vec<Member>) -> Vec<Effect> {
        let release = |member: Member| {
            self.workers.set_phase(member.worker, WorkerPhase::Released);
            Effect::Kill {
                member,
                reason: "the world has shrunk".to_owned(),
            }
        };
        members.into_iter().map(release).collect()
    }
}
