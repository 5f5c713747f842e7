//! Who does what in one generation, as plain tables made from the plan; nothing here changes while it runs.

use std::ops::Range;
use tarazed_domain::{Generation, LaneRange, LaneTree, Node, OptimizerShardIndex, Rank, ShardLayout};
use tarazed_protocol::message::{BeginPlan, Member};

/// One generation, seen from one of its ranks.
#[derive(Clone, Debug)]
pub struct World {
    /// The generation.
    pub generation: Generation,
    /// The own rank.
    pub rank: Rank,
    /// Lanes by rank.
    pub lanes: Vec<LaneRange>,
    /// The tree over all lanes.
    pub tree: LaneTree,
    /// Holders by shard, primary first.
    pub holders: Vec<Vec<Rank>>,
    /// Where shards lie in the flat space.
    pub shards: ShardLayout,
}

impl World {
    /// The tables of `plan` for `member`; none if it is not in the roster.
    #[must_use]
    pub fn new(plan: &BeginPlan, member: Member, tree: LaneTree, shards: ShardLayout) -> Option<Self> {
        let rank = plan.roster.iter().position(|entry| entry.member == member)?;
        Some(Self {
            generation: plan.generation,
            rank: Rank(rank as u32),
            lanes: plan.roster.iter().map(|entry| entry.lanes).collect(),
            tree,
            holders: plan
                .shards
                .iter()
                .map(|holders| holders.iter().map(|holder| holder.rank).collect())
                .collect(),
            shards,
        })
    }

    /// Number of ranks.
    #[must_use]
    pub fn size(&self) -> usize {
        self.lanes.len()
    }

    /// The own lanes.
    #[must_use]
    pub fn my_lanes(&self) -> LaneRange {
        self.lanes[self.rank.index()]
    }

    /// All ranks but the own.
    pub fn others(&self) -> impl Iterator<Item = Rank> + '_ {
        (0..self.size() as u32).map(Rank).filter(|&rank| rank != self.rank)
    }

    /// The tree nodes that a rank ships, left to right.
    #[must_use]
    pub fn nodes_of(&self, rank: Rank) -> Vec<Node> {
        self.tree.maximal_nodes(self.lanes[rank.index()])
    }

    /// The primary of a shard.
    #[must_use]
    pub fn primary(&self, shard: OptimizerShardIndex) -> Rank {
        self.holders[shard.index()][0]
    }

    /// The replicas of a shard.
    #[must_use]
    pub fn replicas(&self, shard: OptimizerShardIndex) -> &[Rank] {
        &self.holders[shard.index()][1..]
    }

    /// Whether a rank holds a shard, as primary or replica.
    #[must_use]
    pub fn holds(&self, rank: Rank, shard: OptimizerShardIndex) -> bool {
        self.holders[shard.index()].contains(&rank)
    }

    /// The shards whose primary is `rank`, in order.
    pub fn primaries_of(&self, rank: Rank) -> impl Iterator<Item = OptimizerShardIndex> + '_ {
        self.shards.shards().filter(move |&shard| self.primary(shard) == rank)
    }

    /// The shards of which `rank` is a replica, in order.
    pub fn replicas_of(&self, rank: Rank) -> impl Iterator<Item = OptimizerShardIndex> + '_ {
        self.held_by(rank).filter(move |&shard| self.primary(shard) != rank)
    }

    /// The shards that `rank` holds, in order.
    pub fn held_by(&self, rank: Rank) -> impl Iterator<Item = OptimizerShardIndex> + '_ {
        self.shards.shards().filter(move |&shard| self.holds(rank, shard))
    }

    /// Blocks of all shards whose primary is `rank`.
    #[must_use]
    pub fn primary_block_count(&self, rank: Rank) -> usize {
        self.primaries_of(rank)
            .map(|shard| self.shards.blocks(shard).len())
            .sum()
    }

    /// The elements of a shard in the flat space.
    #[must_use]
    pub fn elements(&self, shard: OptimizerShardIndex) -> Range<usize> {
        self.shards.elements(shard)
    }
}
