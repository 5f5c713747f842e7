//! Which worker holds which optimizer shard (DESIGN.md section 4).
//!
//! Every shard has `copies` holders on different workers, its primary first. The assignment moves as little as it can:
//! a worker that holds a shard whole keeps it while that leaves the load even. Where workers run on several hosts, the copies of
//! a shard lie on different ones, so that a host may be lost; as long as nobody thereby holds twice an even share. Pure and
//! deterministic: the same holdings and roster give the same map. Placement never shows in a number; it decides only who works.

use std::collections::VecDeque;
use tarazed_domain::{OptimizerShardIndex, Rank};

/// Holders per shard, primary first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardMap {
    holders: Vec<Vec<Rank>>,
}

impl ShardMap {
    /// Holders of one shard, primary first.
    #[must_use]
    pub fn holders(&self, shard: OptimizerShardIndex) -> &[Rank] {
        &self.holders[shard.index()]
    }

    /// All shards' holders.
    #[must_use]
    pub fn all(&self) -> &[Vec<Rank>] {
        &self.holders
    }
}

/// Assigns `shard_count` shards with `copies` holders each (at most the world size) to ranks.
///
/// `whole[shard]` lists the ranks that hold the shard whole now, the present primary first where there is one.
///
/// # Panics
/// If the world is empty or `whole` has another length: programmer's errors.
#[must_use]
pub fn assign(shard_count: usize, world_size: usize, copies: usize, whole: &[Vec<Rank>]) -> ShardMap {
    assert_eq!(whole.len(), shard_count, "one list of whole holders per shard");
    assign_apart(shard_count, world_size, copies, &[], whole)
}

/// As [`assign`], with the host of each rank, by rank; none where all are on one.
#[must_use]
pub fn assign_apart(
    shard_count: usize,
    world_size: usize,
    copies: usize,
    hosts: &[u32],
    whole: &[Vec<Rank>],
) -> ShardMap {
    let placed = place(shard_count, world_size, copies, hosts, |shard| &whole[shard]);
    ShardMap {
        holders: placed.all().map(<[Rank]>::to_vec).collect(),
    }
}

/// No rank yet.
const NOBODY: Rank = Rank(u32::MAX);

/// [`ShardMap`] in one piece of memory: every shard has the same number of holders.
#[derive(Debug)]
pub(crate) struct Placed {
    copies: usize,
    ranks: Vec<Rank>,
}

impl Placed {
    /// Each shard's holders, primary first, in order of shards.
    pub(crate) fn all(&self) -> impl ExactSizeIterator<Item = &[Rank]> {
        self.ranks.chunks_exact(self.copies)
    }

    /// Holders of each shard.
    pub(crate) const fn copies(&self) -> usize {
        self.copies
    }
}

/// As [`assign_apart`], with `whole` as a function, so that a large world needs no list per shard. It may name ranks past the
/// world, which hold a shard now and are to hold none.
pub(crate) fn place<'a>(
    shard_count: usize,
    world_size: usize,
    copies: usize,
    hosts: &[u32],
    whole: impl Fn(usize) -> &'a [Rank],
) -> Placed {
    assert!(world_size > 0, "a world has ranks");
    let copies = copies.clamp(1, world_size);
    let mut placed = Placed {
        copies,
        ranks: vec![NOBODY; shard_count * copies],
    };

    // Keep the primaries that stand, then promote whole holders, then take whoever has room. A shard with a single
    // whole holder goes before one with a choice, so that promotion does not force a copy.
    let order = scarcest_first(shard_count, |shard| whole(shard).len());
    let mut primaries = Quota::new(shard_count, world_size);
    let mut left = Vec::new();
    for &shard in &order {
        match whole(shard as usize).first() {
            Some(&rank) if primaries.has_room(rank) => {
                primaries.take(rank);
                placed.ranks[shard as usize * copies] = rank;
            }
            _ => left.push(shard),
        }
    }
    left.retain(|&shard| {
        let candidates = whole(shard as usize).iter().copied();
        let candidate = primaries.least_loaded_of(candidates);
        if let Some(rank) = candidate {
            primaries.take(rank);
            placed.ranks[shard as usize * copies] = rank;
        }
        candidate.is_none()
    });
    for shard in left {
        placed.ranks[shard as usize * copies] = primaries.take_least_loaded(&[]);
    }

    for copy in 1..copies {
        let mut replicas = Quota::new(shard_count, world_size);
        let mut left = Vec::new();
        for &shard in &order {
            let holders = &mut placed.ranks[shard as usize * copies..][..=copy];
            let candidates = whole(shard as usize).iter().copied();
            let is_free = |rank: &Rank| !holders[..copy].contains(rank) && is_apart(hosts, *rank, &holders[..copy]);
            let candidate = replicas.least_loaded_of(candidates.filter(is_free));
            match candidate {
                Some(rank) => {
                    replicas.take(rank);
                    holders[copy] = rank;
                }
                None => left.push(shard),
            }
        }
        for shard in left {
            let holders = &mut placed.ranks[shard as usize * copies..][..=copy];
            holders[copy] = match replicas.least_loaded_apart(hosts, &holders[..copy]) {
                Some(rank) => {
                    replicas.take(rank);
                    rank
                }
                None => replicas.take_least_loaded(&holders[..copy]),
            };
        }
    }
    placed
}

/// Whether a rank's host is none of the `holders`'; a rank past the world has none.
fn is_apart(hosts: &[u32], rank: Rank, holders: &[Rank]) -> bool {
    let host = |rank: Rank| hosts.get(rank.index());
    hosts.is_empty() || holders.iter().all(|&holder| host(holder) != host(rank))
}

/// Shards in order of how many hold them whole, none counted as one; of equals the first first.
fn scarcest_first(shard_count: usize, whole_count: impl Fn(usize) -> usize) -> Vec<u32> {
    // Sorted by counting: of a large world nearly all have the same few.
    let whole_count = |shard| whole_count(shard).max(1);
    let mut ends: Vec<u32> = Vec::new();
    for count in (0..shard_count).map(whole_count) {
        if ends.len() <= count {
            ends.resize(count + 1, 0);
        }
        ends[count] += 1;
    }
    let mut before = 0;
    for end in &mut ends {
        before += std::mem::replace(end, before);
    }
    let mut order = vec![0; shard_count];
    for shard in 0..shard_count {
        let end = &mut ends[whole_count(shard)];
        order[*end as usize] = shard as u32;
        *end += 1;
    }
    order
}

/// How many shards each rank has taken, against an even share.
struct Quota {
    loads: Vec<u32>,
    share: u32,
    /// Twice an even share, rounded up.
    cap: u32,
    /// How many ranks may still take one more than the even share.
    extra: usize,
    /// No rank has a smaller load. Loads only grow, so a search goes on where the last one ended.
    least: u32,
    /// Ranks before this one have more than the least load, besides those in `passed_over`.
    searched: usize,
    /// Ranks that a search came by and could not use, in order. Those that have more by now are left out at the front at
    /// once, and elsewhere when they come to the front.
    passed_over: VecDeque<Rank>,
}

impl Quota {
    fn new(shard_count: usize, world_size: usize) -> Self {
        Self {
            loads: vec![0; world_size],
            share: (shard_count / world_size) as u32,
            cap: 2 * shard_count.div_ceil(world_size) as u32,
            extra: shard_count % world_size,
            least: 0,
            searched: 0,
            passed_over: VecDeque::new(),
        }
    }

    fn load(&self, rank: Rank) -> (u32, Rank) {
        (self.loads[rank.index()], rank)
    }

    /// None has room that is past the world: it may be a donor, and is no holder.
    fn has_room(&self, rank: Rank) -> bool {
        let Some(&load) = self.loads.get(rank.index()) else {
            return false;
        };
        load < self.share || (load == self.share && self.extra > 0)
    }

    fn take(&mut self, rank: Rank) {
        if self.loads[rank.index()] == self.share {
            self.extra = self.extra.saturating_sub(1);
        }
        self.loads[rank.index()] += 1;
    }

    /// The first of these with the least load, if one of them has room.
    fn least_loaded_of(&self, ranks: impl Iterator<Item = Rank>) -> Option<Rank> {
        let with_room = ranks.filter(|&rank| self.has_room(rank));
        with_room.min_by_key(|&rank| self.load(rank))
    }

    /// The first of the ranks with the least load on other hosts than the `holders`', unless it has twice an even share. Nobody
    /// where all are on one host.
    fn least_loaded_apart(&self, hosts: &[u32], holders: &[Rank]) -> Option<Rank> {
        let ranks = (0..hosts.len() as u32).map(Rank);
        let apart = ranks.filter(|&rank| is_apart(hosts, rank, holders) && self.loads[rank.index()] < self.cap);
        apart.min_by_key(|&rank| self.load(rank))
    }

    /// Takes the first of the ranks with the least load, besides those in `not`.
    fn take_least_loaded(&mut self, not: &[Rank]) -> Rank {
        let rank = self.find_least_loaded(not);
        self.take(rank);
        rank
    }

    /// See above: whom it finds must be taken, for the search goes on behind it.
    fn find_least_loaded(&mut self, not: &[Rank]) -> Rank {
        loop {
            let (loads, least) = (&self.loads, self.least);
            let has_least = |rank: &Rank| loads[rank.index()] == least;
            while self.passed_over.front().is_some_and(|rank| !has_least(rank)) {
                self.passed_over.pop_front();
            }
            let mut passed_over = self.passed_over.iter().filter(|rank| has_least(rank));
            if let Some(&rank) = passed_over.find(|rank| !not.contains(rank)) {
                return rank;
            }
            while let Some(&load) = self.loads.get(self.searched) {
                let rank = Rank(self.searched as u32);
                self.searched += 1;
                if load == self.least {
                    if !not.contains(&rank) {
                        return rank;
                    }
                    self.passed_over.push_back(rank);
                }
            }
            if !self.passed_over.is_empty() {
                // Those with the least load are all in `not`: the next best, for once.
                let others = (0..self.loads.len() as u32)
                    .map(Rank)
                    .filter(|rank| !not.contains(rank));
                return others.min_by_key(|&rank| self.load(rank)).unwrap_or_default();
            }
            self.least += 1;
            self.searched = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Whom [`Quota::take_least_loaded`] takes, said plainly.
    fn plain_least_loaded(loads: &[u32], not: &[Rank]) -> Rank {
        let ranks = (0..loads.len() as u32).map(Rank).filter(|rank| !not.contains(rank));
        ranks
            .min_by_key(|rank| (loads[rank.index()], *rank))
            .unwrap_or_default()
    }

    /// What [`place`] means, said plainly: shard by shard in one order, pass by pass, all loads counted anew.
    fn plain_place(world_size: usize, copies: usize, whole: &[Vec<Rank>]) -> Vec<Vec<Rank>> {
        let (share, extra) = (whole.len() / world_size, whole.len() % world_size);
        let mut order: Vec<usize> = (0..whole.len()).collect();
        order.sort_by_key(|&shard| whole[shard].len().max(1));
        let mut placed: Vec<Vec<Rank>> = vec![Vec::new(); whole.len()];
        for copy in 0..copies.min(world_size) {
            for pass in 0..3 {
                for &shard in order.iter() {
                    if placed[shard].len() > copy {
                        continue;
                    }
                    let mut loads = vec![0; world_size];
                    placed
                        .iter()
                        .filter_map(|holders| holders.get(copy))
                        .for_each(|rank| loads[rank.index()] += 1);
                    let beyond = loads.iter().filter(|&&load| load > share as u32).count();
                    let has_room = |rank: &Rank| match loads.get(rank.index()) {
                        Some(&load) => (load as usize) < share || (load as usize == share && beyond < extra),
                        None => false,
                    };
                    let taken = &placed[shard];
                    let free = |rank: &Rank| has_room(rank) && !taken.contains(rank);
                    let rank = match (pass, copy) {
                        (0, 0) => whole[shard].first().copied().filter(free),
                        (0 | 1, _) => whole[shard]
                            .iter()
                            .copied()
                            .filter(free)
                            .min_by_key(|r| (loads[r.index()], *r)),
                        _ => Some(plain_least_loaded(&loads, taken)),
                    };
                    placed[shard].extend(rank);
                }
            }
        }
        placed
    }

    fn check(map: &ShardMap, world_size: usize, copies: usize) -> (Vec<usize>, Vec<usize>) {
        let mut primaries = vec![0; world_size];
        let mut all = vec![0; world_size];
        for holders in map.all() {
            assert_eq!(holders.len(), copies.min(world_size));
            let mut distinct = holders.clone();
            distinct.sort();
            distinct.dedup();
            assert_eq!(
                distinct.len(),
                holders.len(),
                "holders of one shard are different ranks"
            );
            primaries[holders[0].index()] += 1;
            for rank in holders {
                all[rank.index()] += 1;
            }
        }
        (primaries, all)
    }

    proptest! {
        /// Holders that are past the world, that are many, or none.
        #[test]
        fn placing_quickly_is_placing_plainly(
            world in 1usize..7, copies in 1usize..4,
            whole in prop::collection::vec(prop::collection::btree_set(0u32..9, 0..4), 1..24), order in any::<u64>(),
        ) {
            let rotated = |ranks: std::collections::BTreeSet<u32>| {
                let mut ranks: Vec<Rank> = ranks.into_iter().map(Rank).collect();
                let by = order as usize % ranks.len().max(1);
                ranks.rotate_left(by);
                ranks
            };
            let whole: Vec<Vec<Rank>> = whole.into_iter().map(rotated).collect();
            let map = assign(whole.len(), world, copies, &whole);
            prop_assert_eq!(map.all(), plain_place(world, copies, &whole));
        }

        /// Any order of takings, the least loaded or another, and sets of ranks to leave out.
        #[test]
        fn a_search_that_goes_on_finds_what_a_new_one_would(
            world in 1usize..6,
            calls in prop::collection::vec((prop::collection::vec(0u32..6, 0..6), prop::option::of(0usize..6)), 1..60),
        ) {
            let mut quota = Quota::new(calls.len(), world);
            for (not, elsewhere) in calls {
                let not: Vec<Rank> = not.into_iter().map(Rank).collect();
                if let Some(rank) = elsewhere {
                    quota.take(Rank((rank % world) as u32));
                }
                let expected = plain_least_loaded(&quota.loads, &not);
                prop_assert_eq!(quota.take_least_loaded(&not), expected);
            }
        }

        #[test]
        fn every_shard_has_its_copies_and_primaries_are_even(
            shards in 1usize..40, world in 1usize..9, copies in 1usize..4
        ) {
            let map = assign(shards, world, copies, &vec![vec![]; shards]);
            let (primaries, _) = check(&map, world, copies);
            let most = primaries.iter().max().copied().unwrap_or(0);
            let least = primaries.iter().min().copied().unwrap_or(0);
            prop_assert!(most - least <= 1);
        }

        #[test]
        fn losing_one_rank_copies_little_and_keeps_the_load_even(shards in 1usize..40, world in 2usize..9, lost in 0usize..8) {
            let lost = lost % world;
            let before = assign(shards, world, 2, &vec![vec![]; shards]);
            // The survivors are renumbered densely, as in a new generation.
            let renumber = |rank: Rank| (rank.index() != lost).then(|| Rank(rank.0 - u32::from(rank.index() > lost)));
            let whole: Vec<Vec<Rank>> =
                before.all().iter().map(|holders| holders.iter().copied().filter_map(renumber).collect()).collect();
            prop_assert!(whole.iter().all(|holders: &Vec<Rank>| !holders.is_empty()), "two copies survive one loss");
            let after = assign(shards, world - 1, 2, &whole);
            let (primaries, _) = check(&after, world - 1, 2);
            prop_assert!(primaries.iter().max().unwrap() - primaries.iter().min().unwrap() <= 1);
            let copies: usize = after.all().iter().zip(&whole)
                .map(|(now, held)| now.iter().filter(|rank| !held.contains(rank)).count()).sum();
            let lost_copies = before.all().iter().flatten().filter(|rank| rank.index() == lost).count();
            // What was lost, plus at most an even share moved to keep the load even.
            prop_assert!(copies <= lost_copies + 2 * shards.div_ceil(world), "{copies} copies for {lost_copies} lost");
        }

        #[test]
        fn the_same_holdings_give_the_same_map(shards in 1usize..20, world in 1usize..6) {
            let first = assign(shards, world, 2, &vec![vec![]; shards]);
            prop_assert_eq!(&assign(shards, world, 2, first.all()), &first, "a map is stable under itself");
        }

        /// Losing a host loses no shard, whoever held what before: as long as two hosts are there, and of one size.
        #[test]
        fn copies_lie_on_different_hosts(
            shards in 1usize..40, count in 2usize..5, per_host in 1usize..5, lost in 0usize..4, scattered in any::<bool>(),
        ) {
            let (world, lost) = (count * per_host, (lost % count) as u32);
            let host_of = |rank: usize| (if scattered { rank % count } else { rank / per_host }) as u32;
            let hosts: Vec<u32> = (0..world).map(host_of).collect();
            let apart = |map: &ShardMap, hosts: &[u32]| map.all().iter().all(|holders| {
                hosts[holders[0].index()] != hosts[holders[1].index()]
            });
            let before = assign_apart(shards, world, 2, &hosts, &vec![vec![]; shards]);
            let (primaries, all) = check(&before, world, 2);
            prop_assert!(apart(&before, &hosts));
            prop_assert!(primaries.iter().max().unwrap() - primaries.iter().min().unwrap() <= 1);
            prop_assert!(*all.iter().max().unwrap() <= 3 * shards.div_ceil(world), "{all:?}");
            prop_assert_eq!(&assign_apart(shards, world, 2, &hosts, before.all()), &before, "stable");

            // The others go on, renumbered densely; then the host is back, and holds nothing.
            let left: Vec<usize> = (0..world).filter(|&rank| hosts[rank] != lost).collect();
            let renumber = |rank: &Rank| left.iter().position(|&old| old == rank.index()).map(|new| Rank(new as u32));
            let whole: Vec<Vec<Rank>> =
                before.all().iter().map(|holders| holders.iter().filter_map(renumber).collect()).collect();
            prop_assert!(whole.iter().all(|holders| !holders.is_empty()), "nothing is lost with a host");
            let left_hosts: Vec<u32> = left.iter().map(|&rank| hosts[rank]).collect();
            let alone = count == 2;
            let during = assign_apart(shards, left.len(), 2, if alone { &[] } else { &left_hosts }, &whole);
            check(&during, left.len(), 2);
            prop_assert!(alone || apart(&during, &left_hosts));
            let whole: Vec<Vec<Rank>> = during.all().iter()
                .map(|holders| holders.iter().map(|rank| Rank(left[rank.index()] as u32)).collect()).collect();
            let after = assign_apart(shards, world, 2, &hosts, &whole);
            prop_assert!(apart(&after, &hosts), "it is used again");
        }

        /// Searching on finds whom searching all ranks finds.
        #[test]
        fn the_least_loaded_is_the_first_of_all_with_the_least(
            world in 1usize..12, acts in prop::collection::vec((0u32..12, 0u32..12, any::<bool>()), 0..80)
        ) {
            let mut quota = Quota::new(world, world);
            for (taken, not, search) in acts {
                if search {
                    let not = [Rank(not)];
                    let expected = (0..world as u32).map(Rank).filter(|rank| !not.contains(rank)).min_by_key(|&rank| quota.load(rank));
                    prop_assert_eq!(quota.take_least_loaded(&not), expected.unwrap_or_default());
                } else {
                    quota.take(Rank(taken % world as u32));
                }
            }
        }
    }
}
