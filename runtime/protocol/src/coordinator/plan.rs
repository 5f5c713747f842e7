//! How a generation begins: lanes and shards spread over survivors and newcomers, in one plan for all of them.

use super::resize::Cast;
use super::{Coordinator, Effect, Ground, Incident, Phase, WorkerSet};
use crate::message::{BeginPlan, Member, RosterEntry, ShardHolder, ShardOrigin};
use crate::sharder;
use std::sync::Arc;
use tarazed_domain::{LaneRange, Mutant, Rank};

/// What of the last plan can be filled anew: a large world's plan is a few hundred thousand small pieces of memory.
#[derive(Default)]
struct Remains {
    roster: Vec<RosterEntry>,
    shards: Vec<Vec<ShardHolder>>,
}

impl Remains {
    /// Nothing where somebody still holds the plan.
    fn of(plan: Option<Arc<BeginPlan>>) -> Self {
        let plan = plan.and_then(Arc::into_inner);
        plan.map_or_else(Self::default, |BeginPlan { roster, shards, .. }| Self {
            roster,
            shards,
        })
    }
}

/// Per shard the ranks that hold it whole, its primary first; in one piece of memory.
struct Whole {
    starts: Vec<u32>,
    ranks: Vec<Rank>,
}

impl Whole {
    fn of(&self, shard: usize) -> &[Rank] {
        &self.ranks[self.starts[shard] as usize..self.starts[shard + 1] as usize]
    }
}

impl Coordinator {
    /// Spreads lanes and shards over survivors and newcomers, and starts the generation.
    pub(super) fn begin(&mut self, now_ms: u64, ground: Ground, survivors: Vec<Member>) -> Vec<Effect> {
        let Cast {
            staying: mut members,
            leaving,
            released,
        } = self.cast(&ground, survivors);
        let holders = members.len();
        members.extend(&leaving);
        let mut lanes = self.options.lanes.assign(&self.speeds(&members));
        if Mutant::LaneLost.is_on()
            && members.len() > 1
            && let Some(last) = lanes.last_mut()
        {
            last.end -= 1;
        }
        self.roster = members.iter().copied().zip(lanes).collect();
        for (seat, &member) in members.iter().enumerate().rev() {
            if let Some(worker) = self.workers.get_mut(member.worker) {
                worker.seat = seat;
            }
        }
        let restored = ground.holders.is_empty();
        let Remains { roster, mut shards } = Remains::of(self.plan.take());
        let copies = self.place_shards(&ground, holders, &mut shards);
        let roster = self.fill_roster(roster);

        let ends_here = ground.base >= self.options.last_step || self.stop.is_some();
        let plan = BeginPlan {
            generation: self.generation,
            roster,
            base: ground.base,
            outcome: ground.outcome.filter(|_| !Mutant::OutcomeKept.is_on()),
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
            state: None,
            disputed: self.trial.as_ref().map(|trial| (trial.step, trial.item)),
        };
        for &member in &members {
            self.workers.admit(now_ms, member.worker, ground.base);
        }
        self.begun = true;
        self.phase = Phase::Running {
            paused: WorkerSet::default(),
            pause_sent: false,
            failed: None,
            suspects: Vec::new(),
        };
        self.progressed_ms = now_ms;
        let note = Incident::GenerationBegan {
            generation: self.generation,
            members,
            base: ground.base,
            restored,
            copies,
        };
        let plan = Arc::new(plan);
        self.plan = Some(Arc::clone(&plan));
        let mut effects = vec![Effect::Note(note), Effect::Begin { plan }];
        effects.extend(self.release(released));
        if !leaving.is_empty() {
            effects.extend(self.ask_to_pause(false));
        }
        effects
    }

    /// Entries of the last plan are moved, not compared: both rosters are in order, and an address belongs to a life.
    fn fill_roster(&self, last: Vec<RosterEntry>) -> Vec<RosterEntry> {
        let mut last = last.into_iter().peekable();
        let entry = |&(member, lanes): &(Member, LaneRange)| {
            while last.next_if(|entry| entry.member < member).is_some() {}
            let address = last.next_if(|entry| entry.member == member).map_or_else(
                || self.workers.address(member.worker).to_owned(),
                |RosterEntry { address, .. }| address,
            );
            RosterEntry { member, address, lanes }
        };
        self.roster.iter().map(entry).collect()
    }

    /// Gives every shard its holders among the first ranks of the new roster, and says how many copies that takes.
    fn place_shards(&mut self, ground: &Ground, holders: usize, shards: &mut Vec<Vec<ShardHolder>>) -> usize {
        let shard_count = self.options.shard_count;
        let whole = self.whole_ranks(ground);
        let placed = sharder::place(shard_count, holders, self.options.replicas, |shard| whole.of(shard));
        shards.resize_with(shard_count, Vec::new);
        self.primaries.clear();
        let mut copies = 0;
        for (shard, (holders, ranks)) in shards.iter_mut().zip(placed.all()).enumerate() {
            let donors = whole.of(shard);
            holders.clear();
            holders.extend(ranks.iter().map(|&rank| {
                let origin = match donors.first() {
                    Some(_) if donors.contains(&rank) => ShardOrigin::Keep,
                    Some(&donor) => ShardOrigin::CopyFrom(donor),
                    None if ground.restore.is_some() => ShardOrigin::Restore,
                    None => ShardOrigin::Initialise,
                };
                copies += usize::from(matches!(origin, ShardOrigin::CopyFrom(_)));
                ShardHolder { rank, origin }
            }));
            self.primaries.push(self.roster[ranks[0].index()].0);
        }
        copies
    }

    fn whole_ranks(&self, ground: &Ground) -> Whole {
        let shard_count = self.options.shard_count;
        let mut starts = Vec::with_capacity(shard_count + 1);
        let mut ranks = Vec::with_capacity(ground.holders.len());
        starts.push(0);
        for shard in 0..shard_count {
            let holders = ground.holders.of(shard);
            let primary = self.primaries.get(shard);
            let first = ranks.len();
            for member in holders {
                let Some(rank) = self.rank_of(*member) else { continue };
                if Some(member) == primary {
                    ranks.insert(first, rank);
                } else {
                    ranks.push(rank);
                }
            }
            starts.push(ranks.len() as u32);
        }
        Whole { starts, ranks }
    }
}
