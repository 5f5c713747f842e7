//! Who holds which optimizer shard in a generation, and from where: what [`crate::sharder`] decides, as plans carry it.

use rkyv::{Archive, Deserialize, Serialize};
use tarazed_domain::{OptimizerShardIndex, Rank};

/// Where a holder takes its shard from at the start of a generation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub enum ShardOrigin {
    /// It is there, at the base step or one reduced gradient before it.
    Keep,
    /// From this rank, once that rank stands at the base step.
    CopyFrom(Rank),
    /// From the seed, or the weights that the config names: the run begins.
    Initialise,
    /// From the checkpoint named in the plan.
    Restore,
}

impl ShardOrigin {
    /// Whether the run begins here.
    #[must_use]
    pub const fn is_seed(self) -> bool {
        matches!(self, Self::Initialise)
    }
}

/// One holder of one optimizer shard; the first holder of a shard is its primary.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub struct ShardHolder {
    /// Who.
    pub rank: Rank,
    /// From where.
    pub origin: ShardOrigin,
}

/// The holders of every optimizer shard, in one piece of memory: each shard has the same number of them, and a large
/// world's plan would else be a few hundred thousand small pieces, at the controller and at every rank.
#[derive(Clone, PartialEq, Eq, Debug, Default, Archive, Serialize, Deserialize)]
pub struct Placement {
    copies: u32,
    holders: Vec<ShardHolder>,
}

impl Placement {
    /// `copies` holders of each shard, shard by shard, the primary first.
    ///
    /// # Panics
    /// If the holders are not `copies` for each shard: a programmer's error.
    #[must_use]
    pub fn new(copies: usize, holders: Vec<ShardHolder>) -> Self {
        assert!(
            copies > 0 && holders.len().is_multiple_of(copies),
            "every shard has {copies} holders"
        );
        Self {
            copies: u32::try_from(copies).expect("a world has fewer ranks"),
            holders,
        }
    }

    /// The same holders for each of `shard_count` shards.
    ///
    /// # Panics
    /// As [`Self::new`].
    #[must_use]
    pub fn same(shard_count: usize, holders: &[ShardHolder]) -> Self {
        Self::new(holders.len(), holders.repeat(shard_count))
    }

    /// How many ranks hold each shard.
    #[must_use]
    pub const fn copies(&self) -> usize {
        self.copies as usize
    }

    /// How many shards there are.
    #[must_use]
    pub fn shard_count(&self) -> usize {
        self.iter().len()
    }

    /// The holders of one shard, its primary first.
    ///
    /// # Panics
    /// If there is no such shard: a programmer's error.
    #[must_use]
    pub fn of(&self, shard: OptimizerShardIndex) -> &[ShardHolder] {
        &self.holders[shard.index() * self.copies()..][..self.copies()]
    }

    /// As [`Self::of`], to be changed.
    ///
    /// # Panics
    /// As [`Self::of`].
    pub fn of_mut(&mut self, shard: OptimizerShardIndex) -> &mut [ShardHolder] {
        let copies = self.copies();
        &mut self.holders[shard.index() * copies..][..copies]
    }

    /// Each shard's holders, in order of shards.
    pub fn iter(&self) -> std::slice::ChunksExact<'_, ShardHolder> {
        // One that came over a wire may say anything.
        self.holders.chunks_exact(self.copies().max(1))
    }

    /// The holders of all shards, one after the other.
    #[must_use]
    pub fn holders(&self) -> &[ShardHolder] {
        &self.holders
    }

    /// Whether every shard has its holders, and all of them are among so many ranks: what came over a wire may say anything.
    #[must_use]
    pub fn is_sound(&self, ranks: usize) -> bool {
        let whole = self.copies > 0 && self.holders.len().is_multiple_of(self.copies());
        let is_there = |rank: Rank| rank.index() < ranks;
        let can_be = |holder: &ShardHolder| match holder.origin {
            ShardOrigin::CopyFrom(donor) => is_there(holder.rank) && is_there(donor),
            _ => is_there(holder.rank),
        };
        whole && self.holders.iter().all(can_be)
    }

    /// The memory, to be filled again.
    pub(crate) fn into_memory(mut self) -> Vec<ShardHolder> {
        self.holders.clear();
        self.holders
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shard_has_its_holders_in_order() {
        let holder = |rank, origin| ShardHolder {
            rank: Rank(rank),
            origin,
        };
        let all = [
            holder(0, ShardOrigin::Keep),
            holder(1, ShardOrigin::CopyFrom(Rank(0))),
            holder(1, ShardOrigin::Restore),
            holder(2, ShardOrigin::Initialise),
        ];
        let mut placement = Placement::new(2, all.to_vec());
        assert_eq!((placement.shard_count(), placement.copies()), (2, 2));
        assert_eq!(placement.of(OptimizerShardIndex(1)), &all[2..]);
        assert!(placement.iter().eq([&all[..2], &all[2..]]));
        placement.of_mut(OptimizerShardIndex(0))[0] = all[3];
        assert_eq!(placement.holders()[0], all[3]);
        assert_eq!(Placement::same(3, &all[..2]).of(OptimizerShardIndex(2)), &all[..2]);
        assert_eq!(Placement::default().shard_count(), 0);
        assert!(placement.is_sound(4) && !placement.is_sound(2) && !Placement::default().is_sound(4));
        placement.copies = 3;
        assert!(!placement.is_sound(4));
    }
}
