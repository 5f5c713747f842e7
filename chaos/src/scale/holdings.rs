//! Which rank holds which shards: what the runtime's plans said, kept by slot, and looked up when a fence is answered.

use super::cost::From;
use tarazed_protocol::message::BeginPlan;
use tarazed_protocol::placement::ShardOrigin;

/// Shards by slot, in one piece of memory.
#[derive(Debug, Default)]
struct BySlot {
    starts: Vec<u32>,
    shards: Vec<u32>,
}

impl BySlot {
    fn of(&self, slot: u32) -> &[u32] {
        match self.starts.get(slot as usize..slot as usize + 2) {
            Some(&[start, end]) => &self.shards[start as usize..end as usize],
            _ => &[],
        }
    }

    /// Those of a plan, counted first and then put in their places.
    fn fill(&mut self, plan: &BeginPlan, slot_of_rank: &[u32], slots: usize) {
        self.starts.clear();
        self.starts.resize(slots + 1, 0);
        let slot_of = |rank: usize| slot_of_rank[rank] as usize;
        for holder in plan.shards.holders() {
            self.starts[slot_of(holder.rank.index()) + 1] += 1;
        }
        for slot in 0..slots {
            self.starts[slot + 1] += self.starts[slot];
        }
        self.shards.clear();
        self.shards.resize(self.starts[slots] as usize, 0);
        // Filled from the back: each list's end moves to its start, and the starts are right again.
        for (shard, holders) in plan.shards.iter().enumerate().rev() {
            for holder in holders {
                let start = &mut self.starts[slot_of(holder.rank.index()) + 1];
                *start -= 1;
                self.shards[*start as usize] = shard as u32;
            }
        }
        self.starts.remove(0);
        self.starts.push(self.shards.len() as u32);
    }
}

/// What is held, and what the generation that begins will hold once it is whole.
#[derive(Debug)]
pub struct Holdings {
    held: BySlot,
    coming: BySlot,
    /// Whether the slot's process has what `held` says.
    whole: Vec<bool>,
    shard_count: usize,
    slot_of_rank: Vec<u32>,
}

impl Holdings {
    /// Nothing yet.
    #[must_use]
    pub fn new(slots: u32, shard_count: usize) -> Self {
        Self {
            held: BySlot::default(),
            coming: BySlot::default(),
            whole: vec![false; slots as usize],
            shard_count,
            slot_of_rank: Vec::new(),
        }
    }

    /// Shards that the slot's process holds whole.
    #[must_use]
    pub fn of(&self, slot: u32) -> &[u32] {
        if self.whole[slot as usize] {
            self.held.of(slot)
        } else {
            &[]
        }
    }

    /// Its process is gone.
    pub fn lose(&mut self, slot: u32) {
        self.whole[slot as usize] = false;
    }

    /// Shards that nobody holds.
    #[must_use]
    pub fn missing(&self) -> usize {
        let mut there = vec![false; self.shard_count];
        for slot in 0..self.whole.len() as u32 {
            for &shard in self.of(slot) {
                there[shard as usize] = true;
            }
        }
        there.iter().filter(|&&there| !there).count()
    }

    /// A generation begins. A plan that keeps what is not there, or copies from one that has nothing, is refused.
    ///
    /// # Errors
    /// What is wrong with the plan.
    pub fn begin(&mut self, plan: &BeginPlan) -> Result<Begun, String> {
        // Each holder is looked up by rank, and a plan's entries lie far apart.
        self.slot_of_rank.clear();
        self.slot_of_rank
            .extend(plan.roster.iter().map(|entry| entry.member.worker.0));
        let slot_of = |rank: usize| self.slot_of_rank[rank];
        let (mut takes, mut gives) = (vec![0_u32; plan.roster.len()], vec![0_u32; plan.roster.len()]);
        let mut begun = Begun::default();
        if plan.shards.shard_count() != self.shard_count {
            return Err(format!("a plan for {} shards", plan.shards.shard_count()));
        }
        for (shard, holders) in plan.shards.iter().enumerate() {
            let has = |rank: usize| self.of(slot_of(rank)).contains(&(shard as u32));
            for holder in holders {
                let rank = holder.rank.index();
                match holder.origin {
                    ShardOrigin::Keep if !has(rank) => {
                        return Err(format!("rank {rank} keeps shard {shard} without holding it"));
                    }
                    ShardOrigin::Keep => {}
                    ShardOrigin::CopyFrom(donor) => {
                        if !has(donor.index()) {
                            return Err(format!("shard {shard} is copied from rank {donor}, which has it not"));
                        }
                        takes[rank] += 1;
                        gives[donor.index()] += 1;
                        begun.copies += 1;
                    }
                    ShardOrigin::Restore => begun.restored = true,
                    ShardOrigin::Initialise => begun.initialised = true,
                }
            }
            let repeats = |at: usize| holders[..at].iter().any(|other| other.rank == holders[at].rank);
            if holders.is_empty() || (1..holders.len()).any(repeats) {
                return Err(format!("shard {shard} has nobody, or the same holder twice"));
            }
        }
        begun.most_copies = takes.iter().chain(&gives).copied().max().unwrap_or_default();
        self.coming.fill(plan, &self.slot_of_rank, self.whole.len());
        if begun.restored || begun.initialised {
            // Whatever is held belongs to a course that is given up.
            self.whole.fill(false);
        }
        Ok(begun)
    }

    /// The generation that began is whole.
    pub fn all_whole(&mut self, members: impl Iterator<Item = u32>) {
        std::mem::swap(&mut self.held, &mut self.coming);
        self.whole.fill(false);
        for slot in members {
            self.whole[slot as usize] = true;
        }
    }
}

/// How a generation comes by its state.
#[derive(Clone, Copy, Debug, Default)]
pub struct Begun {
    /// Shard copies between ranks.
    pub copies: u32,
    /// The most that one rank sends or takes.
    pub most_copies: u32,
    /// From the checkpoint.
    pub restored: bool,
    /// From the seed.
    pub initialised: bool,
}

impl Begun {
    /// For the cost model.
    #[must_use]
    pub const fn source(&self) -> From {
        match (self.restored, self.initialised) {
            (true, _) => From::Checkpoint,
            (false, true) => From::Seed,
            _ => From::Copies(self.most_copies),
        }
    }
}
