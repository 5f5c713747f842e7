//! Silent corruption: a rank computes a step wrong, and it is told by what others have (DET-3).
//!
//! The wrong result is that of the first step which the process completes from then on. It is compared when the step is
//! done: a shard's holders against each other, or, where a shard has one holder alone, a lane against the rank that computed
//! it again (in every step here; the product audits one lane now and then). Two that differ do not say who is wrong: the
//! state is restored, the step done again, and the one that had it wrong is replaced. Where most holders agree, that is
//! known at once. The same process is not wrong again when the step is done again.

use super::fleet::Stage;
use super::ledger::Stretch;
use super::world::{Happening, Running, World};
use tarazed_domain::{Generation, LaneIndex, OptimizerShardIndex, Rank, StepsCompleted};
use tarazed_protocol::coordinator::Event;
use tarazed_protocol::message::{BeginPlan, Claim, Dispute, DisputedItem, ItemDigest};

/// What all have that are not wrong.
const RIGHT: ItemDigest = [0; 16];

impl World<'_> {
    /// The next step that this process completes is wrong; its host is taken out once it is known.
    pub fn corrupt(&mut self, now_ms: u64, slot: u32, fault: usize, repair_ms: u64) {
        if self.fleet.stage(slot) == Stage::Member {
            self.drains.insert(slot, repair_ms);
            self.wrong.insert(slot, fault);
            self.expect_dispute(now_ms);
        } else if self.faults_of.get(&slot) == Some(&fault) {
            self.faults_of.remove(&slot); // it computes nothing that could be wrong
        }
    }

    /// Where somebody computes the step under way wrong, that shows in its last moment.
    pub fn expect_dispute(&mut self, now_ms: u64) {
        if let Some(Running {
            generation,
            stretch: Some(stretch),
        }) = self.running
            && !self.wrong.is_empty()
        {
            let steps = stretch.at(now_ms).steps + 1;
            let (at_ms, step) = (stretch.end_ms(steps) - 1, stretch.base + steps);
            self.at(at_ms, Happening::Disputed { generation, step });
        }
    }

    /// Results of a step are compared.
    pub fn dispute(&mut self, now_ms: u64, generation: Generation, step: u64) {
        let is_this = |stretch: &Stretch| stretch.base + stretch.at(now_ms).steps + 1 == step;
        let stretch = self.running.as_ref().filter(|running| running.generation == generation);
        if !stretch
            .and_then(|running| running.stretch)
            .is_some_and(|stretch| is_this(&stretch))
        {
            return;
        }
        let Some((slot, fault)) = self.wrong.pop_first() else {
            return;
        };
        let Some(rank) = self.rank_of(slot).filter(|_| self.machine.roster().len() > 1) else {
            return; // nobody else has what it has
        };
        self.culprits.insert(self.fleet.member(slot));
        self.freeze(now_ms, self.tally.faults[fault].cause);
        // Results are compared behind the barrier.
        self.stand.passed_below = Some(self.setup.ranks);
        let (item, claims) = self.claims(slot, rank, fault);
        let record = &mut self.tally.faults[fault];
        record.detected_ms.get_or_insert(now_ms - record.at_ms);
        let dispute = Dispute {
            step: StepsCompleted(step),
            item,
            claims,
        };
        // All say the same, and the first one is enough.
        self.tell(
            now_ms,
            &Event::Failed {
                member: self.machine.roster()[0].0,
                generation,
                cause: format!("{item} differs"),
                suspects: Vec::new(),
                fatal: false,
                dispute: Some(dispute),
            },
        );
    }

    /// What the one that is wrong differs in, and from whom.
    fn claims(&self, slot: u32, rank: Rank, fault: usize) -> (DisputedItem, Vec<Claim>) {
        let wrong: ItemDigest = (fault as u128 + 1).to_le_bytes();
        let claim = |of: Rank| Claim {
            rank: of,
            digest: if of == rank { wrong } else { RIGHT },
        };
        let of_shard = |&shard: &u32| {
            let holders = self.holdings.holders(shard).filter_map(|slot| self.rank_of(slot));
            let claims: Vec<Claim> = holders.map(claim).collect();
            (claims.len() > 1).then_some((DisputedItem::Shard(OptimizerShardIndex(shard)), claims))
        };
        let of_lane = || {
            let roster = self.machine.roster();
            let next = Rank((rank.index() + 1) as u32 % roster.len() as u32);
            let lane = LaneIndex(roster[rank.index()].1.start);
            (DisputedItem::Lane(lane), [rank, next].map(claim).to_vec())
        };
        self.holdings.of(slot).iter().find_map(of_shard).unwrap_or_else(of_lane)
    }

    /// In a generation that does a disputed step again, its result is said when it is done.
    pub fn expect_verdict(&mut self, plan: &BeginPlan, stretch: &Stretch) {
        let Some((step, item)) = plan.disputed.filter(|(step, _)| *step <= plan.last_step) else {
            return;
        };
        let at_ms = match step.0.checked_sub(plan.base.0) {
            // It was cut short when it was done again, and is finished at the start.
            Some(0) if matches!(item, DisputedItem::Shard(_)) => stretch.from_ms,
            Some(steps) if steps > 0 => stretch.end_ms(steps),
            _ => return,
        };
        let generation = plan.generation;
        self.at(at_ms, Happening::Settled { generation, step });
    }

    /// The disputed step was done again.
    pub fn settle(&mut self, now_ms: u64, generation: Generation, step: StepsCompleted) {
        let running = self.running.as_ref().filter(|running| running.generation == generation);
        if running.is_some_and(|running| running.stretch.is_some()) {
            let (member, digest) = (self.machine.roster()[0].0, RIGHT);
            self.tell(
                now_ms,
                &Event::Settled {
                    member,
                    generation,
                    step,
                    digest,
                },
            );
        }
    }
}
