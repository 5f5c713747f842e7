//! The barrier: what every rank brings, the one exchange that commits a step, and what all of them read out of it.
//!
//! - **STEP-1** Whoever enters holds its reduced gradients: `step.rs` forwards them before.
//! - **STEP-2** Whoever returns has passed: a step that any survivor has passed is committed.
//! - **DET-2** Norms are summed over fixed blocks, statistics along the lane tree, whichever rank brought them.
//! - **DET-3** An audited lane comes from two ranks; where they differ nobody is past the barrier.

use crate::StepError;
use crate::feeder::StepBatch;
use crate::progress::Phase;
use crate::state::RankState;
use crate::world::World;
use tarazed_domain::{LaneIndex, Mutant, Node, Rank, StepsCompleted};
use tarazed_fabric::{Collective, Tag, TagKind};
use tarazed_kernels::{Device, View};
use tarazed_protocol::data::stats::LaneStats;
use tarazed_protocol::message::{BarrierOutcome, Claim, Dispute, DisputedItem, ItemDigest};

/// What this rank brings to a barrier besides its numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Wishes {
    /// Pause at the boundary after this step.
    pub pause: bool,
    /// Write a checkpoint there.
    pub checkpoint: bool,
    /// Not there, if it can wait: this rank still stores its share of the last one.
    pub busy: bool,
}

/// Wishes as they travel: flags in the first byte, the others are for later.
const WISHES_BYTES: usize = 8;

impl Wishes {
    const fn encode(self) -> u8 {
        self.pause as u8 | (self.checkpoint as u8) << 1 | (self.busy as u8) << 2
    }

    const fn decode(flags: u8) -> Self {
        Self {
            pause: flags & 1 != 0,
            checkpoint: flags & 2 != 0,
            busy: flags & 4 != 0,
        }
    }

    /// What any rank brought to a barrier that is passed: the same on all of them.
    #[must_use]
    pub const fn of_all(passed: &BarrierOutcome) -> Self {
        Self {
            pause: passed.pause,
            checkpoint: passed.checkpoint,
            busy: passed.busy,
        }
    }
}

/// What a rank has to say in an audit: the digest of the audited lane, and that of the same lane computed again. Each is
/// said by one rank.
#[derive(Clone, Copy, Default)]
pub(crate) struct Audit {
    pub lane: Option<LaneIndex>,
    pub own: Option<ItemDigest>,
    pub again: Option<ItemDigest>,
}

/// Bytes of both, each behind a byte that says whether it is there.
const AUDIT_BYTES: usize = 2 * (1 + size_of::<ItemDigest>());

impl Audit {
    fn encode(self, out: &mut Vec<u8>) {
        for digest in [self.own, self.again] {
            out.push(u8::from(digest.is_some()));
            out.extend(digest.unwrap_or_default());
        }
    }

    /// Both digests as some rank says them.
    fn decode(bytes: &[u8]) -> [Option<ItemDigest>; 2] {
        let mut parts = bytes.chunks_exact(1 + size_of::<ItemDigest>());
        std::array::from_fn(|_| {
            let part = parts.next().filter(|part| part[0] == 1)?;
            Some(std::array::from_fn(|byte| part[1 + byte]))
        })
    }
}

/// The all-gather of wishes, lane statistics and gradient-norm partials. Whoever returns from it has passed the barrier.
pub(crate) fn barrier<D: Device>(
    state: &mut RankState<D>,
    world: &World,
    fabric: &mut dyn Collective,
    batch: &StepBatch,
    stats: &[LaneStats],
    wishes: Wishes,
    audit: Audit,
) -> Result<BarrierOutcome, StepError> {
    let step = batch.step.completed();
    let _span = tracing::info_span!("barrier").entered();
    let stats_bytes = LaneStats::encoded_bytes(batch.domain_count());
    let mine = brought(state, world, stats, wishes, audit)?;
    let lengths: Vec<usize> = (0..world.size() as u32)
        .map(|rank| brought_bytes(world, Rank(rank), stats_bytes))
        .collect();
    state.progress.enter(Phase::Barrier);
    let all = fabric.all_gather(Tag::new(TagKind::Barrier, step.0, 0), &mine, &lengths)?;

    let mut heard = Heard {
        partials: vec![0.0; state.layout.block_count()],
        ..Heard::default()
    };
    for (rank, bytes) in all.iter().enumerate() {
        heard.take(world, Rank(rank as u32), bytes, batch.domain_count())?;
    }
    let Heard {
        flags,
        claims,
        lanes,
        partials,
    } = heard;
    settle_audit(state, step, audit.lane, claims)?;
    let total = LaneStats::fold(world.tree, lanes).map_err(|e| malformed_stats(world.rank, &e))?;
    let grad_norm = if Mutant::NormByRank.is_on() {
        norm_by_rank(world, &partials)
    } else {
        sum_over_blocks(partials).sqrt()
    };
    let loss = total.train_total().mean().unwrap_or(f64::NAN);
    if !grad_norm.is_finite() || !loss.is_finite() {
        return Err(StepError::NotFinite { step, loss, grad_norm });
    }
    let wished = Wishes::decode(flags);
    Ok(BarrierOutcome {
        step,
        grad_norm,
        loss,
        stats: total.encode(),
        skipped: batch.directives.skips(total.train(), grad_norm),
        pause: wished.pause,
        checkpoint: wished.checkpoint,
        busy: wished.busy,
    })
}

/// What this rank brings to the barrier: wishes in eight bytes, audit, its lanes' statistics, and square sums of the blocks of its
/// primary shards.
fn brought<D: Device>(
    state: &mut RankState<D>,
    world: &World,
    stats: &[LaneStats],
    wishes: Wishes,
    audit: Audit,
) -> Result<Vec<u8>, StepError> {
    let mut bytes = vec![0; WISHES_BYTES];
    bytes[0] = wishes.encode();
    audit.encode(&mut bytes);
    for lane in stats {
        bytes.extend_from_slice(&lane.encode());
    }
    for shard in world.primaries_of(world.rank) {
        let mut partials = vec![0.0_f64; world.shards.blocks(shard).len()];
        let reduced = View::from(state.shards[&shard].reduced());
        let block_elements = state.layout.block_elements();
        state
            .device
            .square_sums(&mut state.stream, reduced, block_elements, &mut partials)?;
        bytes.extend(partials.iter().flat_map(|partial| partial.to_le_bytes()));
    }
    Ok(bytes)
}

/// Length of what a rank brings.
fn brought_bytes(world: &World, rank: Rank, stats_bytes: usize) -> usize {
    let (lanes, blocks) = (world.lanes[rank.index()].len(), world.primary_block_count(rank));
    WISHES_BYTES + AUDIT_BYTES + lanes * stats_bytes + blocks * size_of::<f64>()
}

/// What all ranks brought.
#[derive(Default)]
struct Heard {
    flags: u8,
    claims: Vec<Claim>,
    lanes: Vec<(Node, LaneStats)>,
    /// Square sums, by block.
    partials: Vec<f64>,
}

impl Heard {
    /// Takes in what one rank brought, as long as [`brought_bytes`] says.
    fn take(&mut self, world: &World, rank: Rank, bytes: &[u8], domain_count: usize) -> Result<(), StepError> {
        let (wishes, bytes) = bytes.split_at(WISHES_BYTES);
        if !Mutant::PauseUnspread.is_on() || rank == world.rank {
            self.flags |= wishes[0];
        }
        let (audit, bytes) = bytes.split_at(AUDIT_BYTES);
        let digests = Audit::decode(audit).into_iter().flatten();
        self.claims.extend(digests.map(|digest| Claim { rank, digest }));
        let (lanes, stats_bytes) = (world.lanes[rank.index()], LaneStats::encoded_bytes(domain_count));
        let (stats, partials) = bytes.split_at(lanes.len() * stats_bytes);
        for (lane, bytes) in lanes.lanes().zip(stats.chunks_exact(stats_bytes)) {
            let stats = LaneStats::decode(bytes, domain_count).map_err(|e| malformed_stats(rank, &e))?;
            self.lanes.push((Node::leaf(lane), stats));
        }
        let mut partials = partials
            .chunks_exact(size_of::<f64>())
            .map(|word| f64::from_le_bytes(std::array::from_fn(|i| word[i])));
        for block in world.primaries_of(rank).flat_map(|shard| world.shards.blocks(shard)) {
            self.partials[block] = partials.next().unwrap_or(f64::NAN);
        }
        Ok(())
    }
}

fn malformed_stats(from: Rank, error: &dyn std::fmt::Display) -> StepError {
    StepError::Malformed {
        from,
        what: "lane statistics",
        cause: error.to_string(),
    }
}

/// A seeded bug.
fn norm_by_rank(world: &World, partials: &[f64]) -> f64 {
    let of_rank = |rank| world.primaries_of(rank).flat_map(|shard| world.shards.blocks(shard));
    let ranks = (0..world.size() as u32).map(Rank);
    ranks
        .map(|rank| of_rank(rank).map(|block| partials[block]).sum::<f64>())
        .sum::<f64>()
        .sqrt()
}

/// Two ranks computed one lane: they agree, or the step is in dispute before anybody is past its barrier.
fn settle_audit<D: Device>(
    state: &mut RankState<D>,
    step: StepsCompleted,
    lane: Option<LaneIndex>,
    claims: Vec<Claim>,
) -> Result<(), StepError> {
    state.audited = claims.first().map(|claim| claim.digest);
    match lane {
        Some(lane) if claims.iter().any(|claim| Some(claim.digest) != state.audited) => {
            let item = DisputedItem::Lane(lane);
            Err(StepError::Disputed(Dispute { step, item, claims }))
        }
        _ => Ok(()),
    }
}

/// Sums along the aligned tree over block indices: neighbours first, an odd last one passes through (DET-2).
pub(crate) fn sum_over_blocks(mut partials: Vec<f64>) -> f64 {
    while partials.len() > 1 {
        partials = partials
            .chunks(2)
            .map(|pair| pair.iter().copied().reduce(|l, r| l + r).unwrap_or(0.0))
            .collect();
    }
    partials.first().copied().unwrap_or(0.0)
}
