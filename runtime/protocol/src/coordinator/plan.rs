//! How a generation begins: lanes and shards spread over survivors and newcomers, in one plan for all of them.

use super::resize::Cast;
use super::{Coordinator, Effect, Ground, Incident, Phase, WorkerSet};
use crate::message::{Addresses, BeginPlan, Member, RosterEntry};
use crate::placement::{Placement, ShardHolder, ShardOrigin};
use crate::sharder;
use std::sync::Arc;
use tarazed_domain::{LaneRange, Mutant, Rank};

/// The memory of the last plan, to be filled anew: a large world's plan has several MiB.
#[derive(Default)]
struct Remains {
    roster: Vec<RosterEntry>,
    addresses: Addresses,
    holders: Vec<ShardHolder>,
}

impl Remains {
    /// Nothing where somebody still holds the plan.
    fn of(plan: Option<Arc<BeginPlan>>) -> Self {
        let Some(mut plan) = plan.and_then(Arc::into_inner) else {
            return Self::default();
        };
        plan.roster.clear();
        plan.addresses.clear();
        Self {
            roster: plan.roster,
            addresses: plan.addresses,
            holders: plan.shards.into_memory(),
        }
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
        self.roster.clear();
        self.roster.extend(members.iter().copied().zip(lanes));
        for (&member, rank) in members.iter().zip(0..) {
            self.workers.set_seat(member.worker, Rank(rank));
        }
        let restored = ground.holders.is_empty();
        let Remains {
            mut roster,
            mut addresses,
            holders: memory,
        } = Remains::of(self.plan.take());
        let (shards, copies) = self.place_shards(&ground, holders, memory);
        roster.extend(self.roster.iter().map(|&(member, lanes)| RosterEntry { member, lanes }));
        self.workers.add_addresses(&members, &mut addresses);

        // A dispute about a step that is not done again stays undecided.
        let rollbacks = self.acted();
        self.trial.take_if(|trial| !rollbacks.is_live(trial.step));
        let ends_here = ground.base >= self.last_step() || self.stop.is_some();
        let plan = BeginPlan {
            generation: self.generation,
            roster,
            addresses,
            base: ground.base,
            outcome: ground.outcome.filter(|_| !Mutant::OutcomeKept.is_on()),
            shards,
            restore: ground.restore,
            acknowledged: self.written,
            decisions: Vec::new(),
            decided: self.written,
            rollbacks,
            last_step: if self.stop.is_some() {
                ground.base
            } else {
                self.last_step()
            },
            checkpoint_at_base: ends_here && !self.is_saved(ground.base),
            checkpointed: self.checkpointed.unwrap_or_default(),
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

    /// Gives every shard its holders among the first ranks of the new roster, and says how many copies that takes.
    fn place_shards(&mut self, ground: &Ground, ranks: usize, mut holders: Vec<ShardHolder>) -> (Placement, usize) {
        let shard_count = self.options.shard_count;
        let whole = self.whole_ranks(ground);
        let hosts = self.hosts_of(ranks);
        let placed = sharder::place(shard_count, ranks, self.options.replicas, &hosts, |shard| {
            whole.of(shard)
        });
        self.primaries.clear();
        holders.reserve(shard_count * placed.copies());
        let mut copies = 0;
        for (shard, ranks) in placed.all().enumerate() {
            let donors = whole.of(shard);
            for &rank in ranks {
                let origin = match donors.first() {
                    Some(_) if donors.contains(&rank) => ShardOrigin::Keep,
                    Some(&donor) => ShardOrigin::CopyFrom(donor),
                    None if ground.restore.is_some() => ShardOrigin::Restore,
                    None => ShardOrigin::Initialise,
                };
                copies += usize::from(matches!(origin, ShardOrigin::CopyFrom(_)));
                holders.push(ShardHolder { rank, origin });
            }
            self.primaries.push(self.roster[ranks[0].index()].0);
        }
        (Placement::new(placed.copies(), holders), copies)
    }

    /// The host of each of the first ranks; none where all of them are on one.
    fn hosts_of(&self, ranks: usize) -> Vec<u32> {
        let host = |&(member, _): &(Member, LaneRange)| self.options.hosts.get(member.worker.index()).copied();
        let hosts: Option<Vec<u32>> = self.roster[..ranks].iter().map(host).collect();
        let several = |hosts: &Vec<u32>| hosts.windows(2).any(|pair| pair[0] != pair[1]);
        hosts.filter(several).unwrap_or_default()
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
