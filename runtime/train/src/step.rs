//! One training step as a straight line (DESIGN.md section 5).
//!
//! ```text
//! compute lanes → reduce to primaries → forward to replicas → barrier → update → gather weights
//!                                        └ STEP-1: all held ┘    └ STEP-2: committed once a survivor is past it
//! ```
//!
//! - **STEP-1** Entering the barrier means: my shards, primary and replica, hold their reduced gradients.
//! - **STEP-2** A step is committed if any surviving rank passed its barrier; `state.passed` remembers it.
//! - **STEP-3** Its line leaves this function only when the step is finished here.
//! - **STEP-4** The state hash is BLAKE3 over block hashes made in the update pass.
//! - **DET-2** Sums across lanes follow the aligned tree; norms are summed over fixed blocks.

use crate::StepError;
use crate::barrier::{Audit, Wishes, barrier};
use crate::compute::{LaneInputs, LaneResults};
use crate::feeder::StepBatch;
use crate::harm::{self, Moment};
use crate::host::{Arriving, HostVisible, Leaving, Shared, Target};
use crate::moments;
use crate::progress::Phase;
use crate::state::{RankState, StepFacts};
use crate::world::World;
use std::ops::Range;
use std::time::Instant;
use tarazed_domain::lanes::TreeFold;
use tarazed_domain::mutant::is_unguarded;
use tarazed_domain::{LaneRange, Mutant, Node, OptimizerShardIndex, Rank, StepsCompleted};
use tarazed_fabric::{Collective, Tag, TagKind};
use tarazed_kernels::{BlockHash, Device, DeviceError, Precision, View, ViewMut};
use tarazed_protocol::data::course::Directives;
use tarazed_protocol::data::stats::LaneStats;
use tarazed_protocol::message::{BarrierOutcome, BeginPlan, Claim, Dispute, DisputedItem, ItemDigest, StepLine};
use tarazed_protocol::placement::{ShardHolder, ShardOrigin};

const HASH_BYTES: usize = size_of::<BlockHash>();

/// Runs one step to its end and returns its line.
///
/// # Errors
/// A [`StepError`]; `state` then holds what a fence reports: a step that passed its barrier is finished in the next
/// generation, one that did not is redone.
pub fn run_step<D: HostVisible>(
    state: &mut RankState<D>,
    world: &World,
    fabric: &mut dyn Collective,
    batch: &StepBatch,
    wishes: Wishes,
) -> Result<StepLine, StepError> {
    let step = batch.step.completed();
    state.facts = Some(StepFacts {
        step: batch.step,
        data: batch.digest,
        mixture: batch.mixture.clone(),
        directives: batch.directives.clone(),
    });

    harm::strike(state, world, batch.step, Moment::Begun)?;
    let (lanes, audit) = compute_lanes(state, world, batch)?;
    let stats = reduce_to_primaries(state, world, fabric, step, lanes)?;
    forward_to_replicas(state, world, fabric, step)?;
    let outcome = barrier(state, world, fabric, batch, &stats, wishes, audit)?;
    state.passed = Some(outcome.clone());
    update(state, &outcome, &batch.directives)?;
    harm::strike(state, world, batch.step, Moment::Updated)?;
    let hash = if outcome.skipped {
        // Working weights stand as they are. No update has looked at the masters, so they are not sent again: a bit that
        // flipped since would be everywhere before anybody saw it (DET-3).
        state_hash(step, &gather_hashes(state, world, fabric, step, None)?)
    } else {
        gather_weights(state, world, fabric, step, None)?
    };

    let weights = moments::gather(state, world, fabric, step)?;

    Ok(state.complete_line(&outcome, hash, weights))
}

/// Forward and backward of the own lanes, folded into the own maximal nodes; and of one lane more where it is audited
/// here.
fn compute_lanes<D: HostVisible>(
    state: &mut RankState<D>,
    world: &World,
    batch: &StepBatch,
) -> Result<(LaneResults<D>, Audit), StepError> {
    let _span = tracing::info_span!("compute").entered();
    state.progress.enter(Phase::Computing);
    let harm = harm::take_due(&mut state.harm, batch.step, Moment::Computed);
    let inputs = LaneInputs {
        device: &state.device,
        model: &state.model,
        weights: &state.weights,
        batch,
        loss_scale: 1.0 / (u64::from(batch.sequences) * batch.context as u64) as f32,
        squares_of: squares_of(state, batch),
        abort: &state.abort,
        progress: &state.progress,
        digest: gradient_digest::<D>,
        harm,
    };
    let began = Instant::now();
    let results = state.engine.run(inputs, world.tree, world.my_lanes())?;
    // In a simulation this clock is not the one that runs.
    if !state.waiting.is_alone() {
        state.progress.computed(world.my_lanes().len(), began.elapsed());
    }
    let again = batch.to_audit.as_ref();
    let audit = Audit {
        lane: batch.audited,
        own: results.audited,
        again: again.map(|samples| state.engine.audit(inputs, samples)).transpose()?,
    };
    Ok((results, audit))
}

/// Where lanes are not alike, their squares say nothing of the noise.
fn squares_of<D: Device>(state: &RankState<D>, batch: &StepBatch) -> Option<usize> {
    let alike = batch.sequences.is_multiple_of(state.config.batch.lanes);
    (alike && state.config.policy.gradient_noise).then(|| state.layout.block_elements())
}

fn gradient_digest<D: HostVisible>(
    device: &D,
    stream: &mut D::Stream,
    gradient: &D::Buffer,
) -> Result<ItemDigest, DeviceError> {
    let elements = device.outgoing(stream, gradient, 0..device.len(gradient))?;
    let whole = blake3::hash(bytemuck::cast_slice(&elements));
    Ok(std::array::from_fn(|byte| whole.as_bytes()[byte]))
}

/// Ships every node's part of every shard to the shard's primary, which folds them along the tree. Returns the own lanes'
/// statistics, which travel in the barrier.
fn reduce_to_primaries<D: HostVisible>(
    state: &mut RankState<D>,
    world: &World,
    fabric: &mut dyn Collective,
    step: StepsCompleted,
    lanes: LaneResults<D>,
) -> Result<Vec<LaneStats>, StepError> {
    let _span = tracing::info_span!("reduce").entered();
    state.progress.enter(Phase::Reducing);
    let sources: Vec<(Rank, Node)> = world
        .others()
        .flat_map(|rank| world.nodes_of(rank).into_iter().map(move |node| (rank, node)))
        .collect();
    let mut staged = take_staging(state, world, sources.len())?;
    exchange_partials(
        (&state.device, &mut state.stream),
        world,
        fabric,
        step,
        &lanes,
        &sources,
        &mut staged,
    )?;

    // Own nodes lie in the flat space, staged ones hold the own primary shards one after another.
    let own_count = lanes.nodes.len();
    let nodes: Vec<Node> = lanes
        .nodes
        .iter()
        .map(|(node, _)| *node)
        .chain(sources.iter().map(|(_, n)| *n))
        .collect();
    let mut parts: Vec<Option<D::Buffer>> = lanes
        .nodes
        .into_iter()
        .map(|(_, buffer)| Some(buffer))
        .chain(staged.into_iter().map(Some))
        .collect();
    let mut staged_offset = 0;
    for shard in world.primaries_of(world.rank) {
        let elements = world.elements(shard);
        let offset_of = |part: usize| {
            if part < own_count {
                elements.start
            } else {
                staged_offset
            }
        };
        let root = fold_parts(state, world, &nodes, &mut parts, elements.len(), offset_of)?;
        let Some(sum) = &parts[root] else {
            unreachable!("the fold puts every part back")
        };
        let held = state
            .shards
            .get_mut(&shard)
            .unwrap_or_else(|| unreachable!("a primary holds its shard"));
        let from = View::at(sum, offset_of(root));
        state.device.copy(
            &mut state.stream,
            from,
            ViewMut::from(held.reduced_mut()),
            elements.len(),
        )?;
        held.mark_reduced(step);
        staged_offset += elements.len();
    }
    state.device.synchronize(&mut state.stream)?;
    let mut buffers = parts.into_iter().flatten();
    state
        .engine
        .recycle(buffers.by_ref().take(own_count).collect::<Vec<_>>());
    state.staging = buffers.collect();
    Ok(lanes.stats)
}

/// Staging buffers, each as long as the own primary shards together.
fn take_staging<D: Device>(state: &mut RankState<D>, world: &World, count: usize) -> Result<Vec<D::Buffer>, StepError> {
    let length: usize = world
        .primaries_of(world.rank)
        .map(|shard| world.elements(shard).len())
        .sum();
    let mut staged = std::mem::take(&mut state.staging);
    staged.retain(|buffer| state.device.len(buffer) == length);
    staged.truncate(count);
    while staged.len() < count {
        staged.push(state.device.alloc(length, Precision::Full)?);
    }
    Ok(staged)
}

fn exchange_partials<D: HostVisible>(
    (device, stream): (&D, &mut D::Stream),
    world: &World,
    fabric: &mut dyn Collective,
    step: StepsCompleted,
    lanes: &LaneResults<D>,
    sources: &[(Rank, Node)],
    staged: &mut [D::Buffer],
) -> Result<(), StepError> {
    let mut leaving = Vec::new();
    for rank in world.others() {
        for shard in world.primaries_of(rank) {
            for (ordinal, (_, buffer)) in lanes.nodes.iter().enumerate() {
                leaving.push(Leaving {
                    to: vec![rank],
                    tag: partial_tag(step, shard, ordinal),
                    buffer,
                    range: world.elements(shard),
                });
            }
        }
    }
    // Staging buffers hold the own primary shards one after another.
    let lengths = world.primaries_of(world.rank).map(|shard| world.elements(shard).len());
    let ranges = consecutive(lengths);
    let mut arriving = Vec::new();
    // From one rank all nodes of a shard come before the next shard, as that rank sends them.
    for (position, shard) in world.primaries_of(world.rank).enumerate() {
        let mut ordinal = 0;
        for (index, &(from, _)) in sources.iter().enumerate() {
            ordinal = if index > 0 && sources[index - 1].0 == from {
                ordinal + 1
            } else {
                0
            };
            arriving.push(Arriving {
                from,
                tag: partial_tag(step, shard, ordinal),
                range: index * ranges.len() + position,
            });
        }
    }
    let targets = staged
        .iter_mut()
        .map(|buffer| Target {
            buffer,
            ranges: ranges.clone(),
        })
        .collect();
    device.exchange(stream, fabric, &leaving, &arriving, targets)
}

/// Ranges of these lengths, one behind the other.
fn consecutive(lengths: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
    let mut end = 0;
    lengths
        .map(|length| {
            end += length;
            end - length..end
        })
        .collect()
}

fn partial_tag(step: StepsCompleted, shard: OptimizerShardIndex, ordinal: usize) -> Tag {
    Tag::new(
        TagKind::GradientPartial,
        step.0,
        u64::from(shard.0) << 16 | ordinal as u64,
    )
}

/// Folds all nodes' parts of one shard to the root, in place; returns which part holds it.
fn fold_parts<D: Device>(
    state: &mut RankState<D>,
    world: &World,
    nodes: &[Node],
    parts: &mut [Option<D::Buffer>],
    len: usize,
    offset_of: impl Fn(usize) -> usize,
) -> Result<usize, StepError> {
    let all = LaneRange {
        start: 0,
        end: world.tree.lane_count(),
    };
    let mut fold = TreeFold::new(world.tree, all);
    for (part, &node) in nodes.iter().enumerate() {
        fold.insert(node, part, |left: usize, right: usize| -> Result<usize, StepError> {
            if let (Some(mut sum), Some(other)) = (parts[left].take(), &parts[right]) {
                let into = ViewMut::at(&mut sum, offset_of(left));
                state
                    .device
                    .fold(&mut state.stream, into, View::at(other, offset_of(right)), len)?;
                parts[left] = Some(sum);
            }
            Ok(left)
        })?;
    }
    let roots = fold.into_nodes();
    assert_eq!(roots.len(), 1, "the lanes of all ranks are all lanes");
    Ok(roots[0].1)
}

/// Sends reduced gradients to replicas. On return this rank's shards, primary and replica, hold theirs (STEP-1).
fn forward_to_replicas<D: HostVisible>(
    state: &mut RankState<D>,
    world: &World,
    fabric: &mut dyn Collective,
    step: StepsCompleted,
) -> Result<(), StepError> {
    let _span = tracing::info_span!("forward").entered();
    state.progress.enter(Phase::Forwarding);
    let (mut leaving, mut targets, mut arriving) = (Vec::new(), Vec::new(), Vec::new());
    let mine = |shard: &OptimizerShardIndex| world.holds(world.rank, *shard);
    for (&shard, held) in state.shards.iter_mut().filter(|(shard, _)| mine(shard)) {
        let tag = Tag::new(TagKind::ReducedGradient, step.0, u64::from(shard.0));
        let whole = 0..world.elements(shard).len();
        if world.primary(shard) == world.rank {
            leaving.push(Leaving {
                to: world.replicas(shard).to_vec(),
                tag,
                buffer: held.reduced(),
                range: whole,
            });
        } else {
            arriving.push(Arriving {
                from: world.primary(shard),
                tag,
                range: targets.len(),
            });
            targets.push(Target {
                buffer: held.reduced_mut(),
                ranges: vec![whole],
            });
        }
    }
    if !Mutant::BarrierBeforeReplicas.is_on() {
        state
            .device
            .exchange(&mut state.stream, fabric, &leaving, &arriving, targets)?;
    }
    for (_, held) in state.shards.iter_mut().filter(|(shard, _)| mine(shard)) {
        held.mark_reduced(step);
    }
    Ok(())
}

/// Past the barrier: every shard held takes the step, its hashes made in the same pass.
fn update<D: HostVisible>(
    state: &mut RankState<D>,
    outcome: &BarrierOutcome,
    directives: &Directives,
) -> Result<(), StepError> {
    let _span = tracing::info_span!("update").entered();
    if !Mutant::SnapshotTorn.is_on() {
        state.progress.enter(Phase::Snapshotting);
        state.gate.wait(); // a snapshot of the state that this changes
    }
    state.progress.enter(Phase::Updating);
    state.apply(outcome, directives)?;
    state.progress.reached(outcome.step);
    Ok(())
}

/// All-gathers working weights and block hashes; compares every replica with its primary, and returns the hash of the
/// whole state (STEP-4). A replica has updated its own copy of the weights, so only non-holders are sent them.
///
/// At the start of a generation, by its plan, every rank that still holds a copy from before is compared too: where a step
/// was cut short of its comparison, the only right copy may be one that the plan gives up.
pub(crate) fn gather_weights<D: HostVisible>(
    state: &mut RankState<D>,
    world: &World,
    fabric: &mut dyn Collective,
    step: StepsCompleted,
    start: Option<&BeginPlan>,
) -> Result<[u8; 32], StepError> {
    let _span = tracing::info_span!("gather").entered();
    let hashes = gather_hashes(state, world, fabric, step, start)?;
    exchange_weights(state, world, fabric, step)?;
    Ok(state_hash(step, &hashes))
}

/// Every rank hears every holder's claim, so all leave the step with the same dispute, and no line of it goes out.
fn gather_hashes<D: Device>(
    state: &mut RankState<D>,
    world: &World,
    fabric: &mut dyn Collective,
    step: StepsCompleted,
    start: Option<&BeginPlan>,
) -> Result<Vec<BlockHash>, StepError> {
    state.progress.enter(Phase::Gathering);
    if is_unguarded() {
        return Ok(vec![BlockHash::default(); state.layout.block_count()]);
    }
    let mut mine = Vec::new();
    for shard in world.primaries_of(world.rank) {
        mine.extend(state.shards[&shard].read().hashes.iter().flat_map(|hash| hash.0));
    }
    for shard in world.replicas_of(world.rank) {
        mine.extend(shard_digest(&state.shards[&shard].read().hashes));
    }
    let given_up = start.map_or(0, |_| world.holders.len());
    for shard in world.shards.shards().take(given_up) {
        let held = state.shards.get(&shard).filter(|_| !world.holds(world.rank, shard));
        mine.extend(held.map_or(NO_DIGEST, |held| shard_digest(&held.read().hashes)));
    }
    let lengths: Vec<usize> = (0..world.size() as u32)
        .map(|rank| world.primary_block_count(Rank(rank)) + world.replicas_of(Rank(rank)).count())
        .map(|hashes| (hashes + given_up) * HASH_BYTES)
        .collect();
    let all = fabric.all_gather(Tag::new(TagKind::ShardHash, step.0, 0), &mine, &lengths)?;

    let mut hashes = vec![BlockHash::default(); state.layout.block_count()];
    let mut claims: Vec<Vec<Claim>> = vec![Vec::new(); world.holders.len()];
    for (rank, bytes) in all.iter().enumerate() {
        let rank = Rank(rank as u32);
        let mut words = bytes
            .chunks_exact(HASH_BYTES)
            .map(|word| std::array::from_fn(|i| word[i]));
        for shard in world.primaries_of(rank) {
            let blocks = world.shards.blocks(shard);
            for block in blocks.clone() {
                hashes[block] = BlockHash(words.next().unwrap_or_default());
            }
            let digest = shard_digest(&hashes[blocks]);
            claims[shard.index()].push(Claim { rank, digest });
        }
        let given_up = world.shards.shards().take(given_up);
        for (shard, digest) in world.replicas_of(rank).chain(given_up).zip(words) {
            if digest != NO_DIGEST {
                claims[shard.index()].push(Claim { rank, digest });
            }
        }
    }
    state.shard_digests = claims.iter().map(|claims| claims[0].digest).collect();
    for (shard, claims) in world.shards.shards().zip(claims) {
        if claims.iter().any(|claim| claim.digest != claims[0].digest) && !Mutant::ReplicasUncompared.is_on() {
            let item = DisputedItem::Shard(shard);
            let claims = independent(claims, start.map_or(&[][..], |plan| plan.shards.of(shard)));
            return Err(StepError::Disputed(Dispute { step, item, claims }));
        }
    }
    Ok(hashes)
}

/// Without those who have a result from another: a copy that has just arrived is no second witness for its donor.
fn independent(claims: Vec<Claim>, holders: &[ShardHolder]) -> Vec<Claim> {
    let claimed = |rank: Rank| claims.iter().find(|claim| claim.rank == rank).map(|claim| claim.digest);
    let is_own = |claim: &&Claim| {
        !holders.iter().any(|holder| match holder.origin {
            ShardOrigin::CopyFrom(donor) => holder.rank == claim.rank && claimed(donor) == Some(claim.digest),
            _ => false,
        })
    };
    claims.iter().filter(is_own).copied().collect()
}

/// Said of a shard that is not held.
const NO_DIGEST: ItemDigest = [0; size_of::<ItemDigest>()];

/// What two holders of a shard compare.
fn shard_digest(hashes: &[BlockHash]) -> ItemDigest {
    let mut hasher = blake3::Hasher::new_derive_key("tarazed 2026 optimizer shard digest");
    for hash in hashes {
        hasher.update(&hash.0);
    }
    let whole = hasher.finalize();
    std::array::from_fn(|byte| whole.as_bytes()[byte])
}

fn exchange_weights<D: HostVisible>(
    state: &mut RankState<D>,
    world: &World,
    fabric: &mut dyn Collective,
    step: StepsCompleted,
) -> Result<(), StepError> {
    let tag = |shard: OptimizerShardIndex| Tag::new(TagKind::WorkingWeights, step.0, u64::from(shard.0));
    let published = |shard| Shared {
        from: world.primary(shard),
        to: world.others().filter(|&rank| !world.holds(rank, shard)).collect(),
        tag: tag(shard),
        range: world.elements(shard),
    };
    let mine: Vec<Shared> = world.primaries_of(world.rank).map(published).collect();
    let missing = world.shards.shards().filter(|&shard| !world.holds(world.rank, shard));
    let missing: Vec<Shared> = missing.map(published).collect();
    // A primary's own working weights are what a receiver would round its masters to.
    let (stream, weights) = (&mut state.stream, &mut state.weights);
    if state.device.exchange_stored(stream, fabric, weights, &mine, &missing)? {
        return Ok(());
    }

    // What is sent are the master weights; a receiver rounds them to working weights, as the update does on a holder.
    let guards: Vec<_> = world
        .primaries_of(world.rank)
        .map(|shard| state.shards[&shard].read())
        .collect();
    let leaving: Vec<Leaving<'_, D>> = mine
        .into_iter()
        .zip(&guards)
        .map(|(part, guard)| Leaving {
            to: part.to,
            tag: part.tag,
            buffer: &guard.master,
            range: 0..part.range.len(),
        })
        .collect();
    let arriving: Vec<Arriving> = missing
        .iter()
        .enumerate()
        .map(|(range, part)| Arriving {
            from: part.from,
            tag: part.tag,
            range,
        })
        .collect();
    let target = Target {
        buffer: &mut state.weights,
        ranges: missing.into_iter().map(|part| part.range).collect(),
    };
    state
        .device
        .exchange(&mut state.stream, fabric, &leaving, &arriving, vec![target])
}

/// BLAKE3 over the step and all block hashes in block order (STEP-4).
fn state_hash(step: StepsCompleted, hashes: &[BlockHash]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("tarazed 2026 training state hash");
    hasher.update(&step.0.to_le_bytes());
    for hash in hashes {
        hasher.update(&hash.0);
    }
    *hasher.finalize().as_bytes()
}
