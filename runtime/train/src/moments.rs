//! Sums over the updated weights, for the weight trajectory (arXiv 2408.07410, section 3.2.3).
//!
//! Every `monitor.weights_interval_steps` steps each rank sums the master weights of the shards of which it is primary,
//! piece by piece, and all hear all sums, so that every rank's line of the step has them: whoever survives can tell.
//!
//! - **DET-2** A piece is the part of a tensor in one block; it is summed in f64 from left to right, and the pieces of a tensor
//!   along a tree of neighbours. Nobody's share has a part in the order.

use crate::StepError;
use crate::host::HostVisible;
use crate::progress::Phase;
use crate::state::RankState;
use crate::world::World;
use std::ops::Range;
use std::sync::atomic::Ordering;
use tarazed_domain::{OptimizerShardIndex, Rank, StepsCompleted};
use tarazed_fabric::{Collective, Tag, TagKind};
use tarazed_protocol::data::trajectory::{self, Moments, Piece};

/// Sum and sum of squares of one piece.
const MOMENTS_BYTES: usize = 2 * size_of::<f64>();

/// Moments of each tensor of the weights after `step`, in the layout's order, the same on all ranks; none where nobody looks
/// at the weights of this step. All ranks of a world must call it alike.
///
/// # Errors
/// If the device fails, a peer is gone, or the generation is aborted.
pub fn gather<D: HostVisible>(
    state: &mut RankState<D>,
    world: &World,
    fabric: &mut dyn Collective,
    step: StepsCompleted,
) -> Result<Vec<Moments>, StepError> {
    if !state.config.monitor.weighs(step) {
        return Ok(Vec::new());
    }
    let _span = tracing::info_span!("moments").entered();
    state.progress.enter(Phase::Gathering);
    let pieces = &*trajectory::pieces(&state.layout);
    let mut mine = Vec::new();
    for shard in world.primaries_of(world.rank) {
        if state.abort.load(Ordering::Relaxed) {
            return Err(StepError::Aborted);
        }
        let own = &pieces[pieces_of(pieces, world, shard)];
        for moments in sum_pieces(state, world, shard, own)? {
            mine.extend(moments.sum.to_le_bytes());
            mine.extend(moments.square_sum.to_le_bytes());
        }
        // Nothing else vouches for what was just read: the next update would find a changed word, and the line be told by then.
        if let Some(held) = state.shards.get_mut(&shard) {
            held.check_memory(&state.device, &mut state.stream, &state.layout)?;
        }
    }
    let ranks = || (0..world.size() as u32).map(Rank);
    let of_rank = |rank| {
        let shards = world.primaries_of(rank);
        shards.flat_map(move |shard| pieces_of(pieces, world, shard))
    };
    let lengths: Vec<usize> = ranks().map(|rank| of_rank(rank).count() * MOMENTS_BYTES).collect();
    let all = fabric.all_gather(Tag::new(TagKind::Auxiliary, step.0, 0), &mine, &lengths)?;

    let mut moments = vec![Moments::default(); pieces.len()];
    for (rank, bytes) in ranks().zip(&all) {
        for (piece, numbers) in of_rank(rank).zip(bytes.chunks_exact(MOMENTS_BYTES)) {
            let number = |at: usize| f64::from_le_bytes(std::array::from_fn(|byte| numbers[at * 8 + byte]));
            moments[piece] = Moments {
                count: pieces[piece].within.len() as u64,
                sum: number(0),
                square_sum: number(1),
            };
        }
    }
    Ok(trajectory::fold_tensors(pieces, &moments))
}

/// Places of a shard's pieces among all: they come by block, as tensors lie by offset.
fn pieces_of(pieces: &[Piece], world: &World, shard: OptimizerShardIndex) -> Range<usize> {
    let blocks = world.shards.blocks(shard);
    let before = |block: usize| pieces.partition_point(|piece| piece.block.index() < block);
    before(blocks.start)..before(blocks.end)
}

/// Moments of the pieces that lie in one shard, of its master weights.
fn sum_pieces<D: HostVisible>(
    state: &mut RankState<D>,
    world: &World,
    shard: OptimizerShardIndex,
    pieces: &[Piece],
) -> Result<Vec<Moments>, StepError> {
    let held = state.shards[&shard].read();
    let first = world.shards.blocks(shard).start;
    let whole = 0..world.elements(shard).len();
    let master = state.device.outgoing(&mut state.stream, &held.master, whole)?;
    let block_elements = state.layout.block_elements();
    let sums = pieces.iter().map(|piece| {
        let start = (piece.block.index() - first) * block_elements;
        Moments::of(&master[start + piece.within.start..start + piece.within.end])
    });
    Ok(sums.collect())
}
