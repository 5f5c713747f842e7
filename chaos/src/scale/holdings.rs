//! Which slots hold which shards: what the runtime's plans said, looked up by shard when a plan is checked, and by slot
//! when a fence is answered.

use super::cost::From;
use tarazed_protocol::message::BeginPlan;
use tarazed_protocol::placement::ShardOrigin;

/// The slots that hold each shard, its primary first; every shard has the same number of them.
#[derive(Debug, Default)]
struct ByShard {
    copies: usize,
    slots: Vec<u32>,
}

impl ByShard {
    fn of(&self, shard: u32) -> &[u32] {
        let from = shard as usize * self.copies;
        self.slots.get(from..from + self.copies).unwrap_or_default()
    }
}

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

    /// The same as `held`, counted first and then put in their places.
    fn fill(&mut self, held: &ByShard, slots: usize) {
        self.starts.clear();
        self.starts.resize(slots + 1, 0);
        for &slot in &held.slots {
            self.starts[slot as usize] += 1;
        }
        // Each slot's end; filled from the back, it moves to the start.
        let mut end = 0;
        for start in &mut self.starts {
            end += *start;
            *start = end;
        }
        self.shards.clear();
        self.shards.resize(held.slots.len(), 0);
        for (shard, slots) in held.slots.chunks_exact(held.copies.max(1)).enumerate().rev() {
            for &slot in slots {
                let start = &mut self.starts[slot as usize];
                *start -= 1;
                self.shards[*start as usize] = shard as u32;
            }
        }
    }
}

/// What is held, and what the generation that begins will hold once it is whole.
#[derive(Debug)]
pub struct Holdings {
    held: ByShard,
    /// The same as `held`.
    held_by_slot: BySlot,
    coming: ByShard,
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
            held: ByShard::default(),
            held_by_slot: BySlot::default(),
            coming: ByShard::default(),
            whole: vec![false; slots as usize],
            shard_count,
            slot_of_rank: Vec::new(),
        }
    }

    /// Shards that the slot's process holds whole.
    #[must_use]
    pub fn of(&self, slot: u32) -> &[u32] {
        if self.whole[slot as usize] {
            self.held_by_slot.of(slot)
        } else {
            &[]
        }
    }

    /// Slots whose process holds the shard whole.
    pub fn holders(&self, shard: u32) -> impl Iterator<Item = u32> {
        let slots = self.held.of(shard).iter().copied();
        slots.filter(|&slot| self.whole[slot as usize])
    }

    /// Its process is gone.
    pub fn lose(&mut self, slot: u32) {
        self.whole[slot as usize] = false;
    }

    /// Shards that nobody holds.
    #[must_use]
    pub fn missing(&self) -> usize {
        let shards = 0..self.shard_count as u32;
        shards.filter(|&shard| self.holders(shard).next().is_none()).count()
    }

    /// A generation begins. A plan that keeps what is not there, or copies from one that has nothing, is refused.
    ///
    /// # Errors
    /// What is wrong with the plan.
    pub fn begin(&mut self, plan: &BeginPlan) -> Result<Begun, String> {
        if plan.shards.shard_count() != self.shard_count {
            return Err(format!("a plan for {} shards", plan.shards.shard_count()));
        }
        // Each holder is looked up by rank, and a plan's entries lie far apart.
        self.slot_of_rank.clear();
        self.slot_of_rank
            .extend(plan.roster.iter().map(|entry| entry.member.worker.0));
        self.coming.copies = plan.shards.copies();
        self.coming.slots.clear();
        self.coming.slots.reserve(plan.shards.holders().len());
        // Both ends of each copy.
        let (mut takes, mut gives) = (Vec::new(), Vec::new());
        let mut begun = Begun::default();
        let mut held = self.held.slots.chunks_exact(self.held.copies.max(1));
        for (holders, shard) in plan.shards.iter().zip(0_u32..) {
            let held = held.next().unwrap_or_default();
            let has = |slot: u32| held.contains(&slot) && self.whole[slot as usize];
            for (at, holder) in holders.iter().enumerate() {
                let rank = holder.rank;
                let slot = self.slot_of_rank[rank.index()];
                match holder.origin {
                    ShardOrigin::Keep if !has(slot) => {
                        return Err(format!("rank {rank} keeps shard {shard} without holding it"));
                    }
                    ShardOrigin::Keep => {}
                    ShardOrigin::CopyFrom(donor) => {
                        if !has(self.slot_of_rank[donor.index()]) {
                            return Err(format!("shard {shard} is copied from rank {donor}, which has it not"));
                        }
                        takes.push(rank);
                        gives.push(donor);
                        begun.copies += 1;
                    }
                    ShardOrigin::Restore => begun.restored = true,
                    ShardOrigin::Initialise => begun.initialised = true,
                }
                if holders[..at].iter().any(|other| other.rank == rank) {
                    return Err(format!("shard {shard} has the same holder twice"));
                }
                self.coming.slots.push(slot);
            }
            if holders.is_empty() {
                return Err(format!("shard {shard} has nobody"));
            }
        }
        begun.most_copies = most_alike(takes).max(most_alike(gives));
        if begun.restored || begun.initialised {
            // Whatever is held belongs to a course that is given up.
            self.whole.fill(false);
        }
        Ok(begun)
    }

    /// The generation that began is whole.
    pub fn all_whole(&mut self, members: impl Iterator<Item = u32>) {
        std::mem::swap(&mut self.held, &mut self.coming);
        self.held_by_slot.fill(&self.held, self.whole.len());
        self.whole.fill(false);
        for slot in members {
            self.whole[slot as usize] = true;
        }
    }
}

/// How often the one that comes most often does.
fn most_alike<T: Ord>(mut all: Vec<T>) -> u32 {
    all.sort_unstable();
    let counts = all.chunk_by(|a, b| a == b).map(<[T]>::len);
    counts.max().unwrap_or_default() as u32
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
