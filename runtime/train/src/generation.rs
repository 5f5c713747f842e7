//! The start of a generation, and its life: step after step until it pauses, ends or is aborted.
//!
//! ```text
//! finish the agreed step → copy, restore or initialise shards → gather weights → drop what is no longer mine → steps
//! ```
//!
//! - **STEP-2** A survivor one reduced gradient behind the base applies it with the outcome that the plan hands over.
//! - **SUP-4** The start can be aborted at every shard and at every read of the store, as a step can at every micro-batch.
//! - A rank that joins is no donor before it is whole: a shard enters `state.shards` only once all of it has come.
//! - A shard that moves away stays with its donor until everybody is whole: whoever dies in between, the donor still
//!   reports it.
//! - A rollback that has acted is a step that goes on from an older state, in the middle of a generation or at its base. One
//!   that is only decided ends the generation at its boundary: that state is held by nobody.
//! - **STEP-6** Between steps nothing waits for the controller, but where a decision due is missing or too many lines are
//!   not acknowledged.

use crate::StepError;
use crate::barrier::Wishes;
use crate::feeder::Feeder;
use crate::host::{Arriving, HostVisible, Leaving, Target};
use crate::moments;
use crate::optimizer::Shard;
use crate::progress::Phase;
use crate::snapshot::{SnapshotTicket, UploadTicket};
use crate::state::RankState;
use crate::step;
use crate::world::World;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tarazed_domain::limits::{CHECKPOINTS_IN_FLIGHT_MAX, UNACKNOWLEDGED_LINES_MAX};
use tarazed_domain::{BlockIndex, Mutant, OptimizerShardIndex, Rank, StepIndex, StepsCompleted};
use tarazed_fabric::{Collective, Tag, TagKind};
use tarazed_kernels::{Blocks, Device, ViewMut};
use tarazed_protocol::message::{BeginPlan, DisputedItem, ItemDigest, RestoreFrom, StepLine};
use tarazed_protocol::placement::ShardOrigin;

/// Reads checkpoint shards; blocks, but never past an abort (SUP-4).
pub trait ShardSource: Sync {
    /// Master weights and both moments of a shard of exactly this checkpoint.
    ///
    /// # Errors
    /// `Aborted` within milliseconds of `abort` being set; `BadCheckpoint`, naming the object and what is wrong with it;
    /// `Restore`, naming object, cause and remedy.
    fn read(
        &self,
        from: &RestoreFrom,
        shard: OptimizerShardIndex,
        abort: &AtomicBool,
    ) -> Result<[Vec<f32>; 3], StepError>;

    /// The same of several, each given to `take` once it is there, in any order; a source may read ahead meanwhile.
    ///
    /// # Errors
    /// As [`Self::read`], and what `take` says.
    fn read_each(
        &self,
        from: &RestoreFrom,
        shards: &[OptimizerShardIndex],
        abort: &AtomicBool,
        take: &mut TakeShard<'_>,
    ) -> Result<(), StepError> {
        shards
            .iter()
            .try_for_each(|&shard| take(shard, self.read(from, shard, abort)?))
    }

    /// Master weights of these optimizer shards, by their elements in the flat parameter space, as the checkpoint has them that the
    /// config's `model.initial` names; each given to `take` once it is there, in any order.
    ///
    /// # Errors
    /// `Aborted` within milliseconds of `abort` being set; `Restore`, naming object, cause and remedy. Never `BadCheckpoint`: it is
    /// none of the run's own, and whatever is wrong with it refutes none of those. And what `take` says.
    #[expect(unused_variables, reason = "a source that knows of no such checkpoint reads none")]
    fn read_initial(
        &self,
        shards: &[(OptimizerShardIndex, Range<usize>)],
        abort: &AtomicBool,
        take: &mut TakeWeights<'_>,
    ) -> Result<(), StepError> {
        let cause = "the config names weights to begin with, and this rank has no way to them";
        Err(StepError::Restore(cause.to_owned()))
    }
}

/// Hears of a shard that was read: master weights and both moments.
pub type TakeShard<'a> = dyn FnMut(OptimizerShardIndex, [Vec<f32>; 3]) -> Result<(), StepError> + 'a;

/// Hears of a shard's master weights.
pub type TakeWeights<'a> = dyn FnMut(OptimizerShardIndex, Vec<f32>) -> Result<(), StepError> + 'a;

/// Switches that other threads set on a running generation.
#[derive(Debug, Default)]
pub struct Switches {
    /// Pause at the next boundary, all together.
    pub pause: AtomicBool,
    /// Write a checkpoint there.
    pub checkpoint: AtomicBool,
    /// Write a checkpoint of a boundary from this one on, unless there was one; 0 for none.
    pub checkpoint_from: AtomicU64,
    /// Lines acknowledged so far.
    pub acknowledged: AtomicU64,
}

/// What the device thread tells the rank's actor; must not block.
pub trait Reporter<D: Device> {
    /// The generation is whole and runs from `base`. Said on rank 0 alone, and after the base's line where that was still to
    /// come.
    fn running(&self, base: StepsCompleted);
    /// A disputed step was done again, with this result. Said on rank 0 alone.
    fn settled(&self, step: StepsCompleted, digest: ItemDigest);
    /// A step is finished: rank 0 says so. The line of a generation's base, where it is not acknowledged, comes from every
    /// rank.
    fn line(&self, line: StepLine);
    /// These shards, of which this rank is primary, are to be saved as they stand; each comes with its ticket.
    fn save(&self, step: StepsCompleted, shards: Vec<ShardToSave<D>>);
}

/// A shard to copy and upload.
pub struct ShardToSave<D: Device> {
    /// Which.
    pub shard: OptimizerShardIndex,
    /// Its blocks: what is copied must hash to what the state says (DET-3).
    pub blocks: Blocks,
    /// Its state; immutable until the ticket is dropped.
    pub state: Arc<std::sync::RwLock<crate::optimizer::ShardState<D>>>,
    /// Drop when the copy is made.
    pub ticket: SnapshotTicket,
    /// Drop when the copy is stored, or given up.
    pub upload: Arc<UploadTicket>,
}

/// How a generation ended in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Paused {
    /// Stands at this count.
    pub step: StepsCompleted,
    /// Its checkpoint is being written.
    pub saving: bool,
}

/// What a generation works with.
pub struct Means<'a, D: Device> {
    /// The data plane.
    pub fabric: &'a mut dyn Collective,
    /// Samples.
    pub feeder: &'a Feeder,
    /// Checkpoint shards.
    pub source: &'a dyn ShardSource,
    /// Set from outside.
    pub switches: &'a Switches,
    /// The actor.
    pub reporter: &'a dyn Reporter<D>,
}

/// Starts a generation and runs it until it pauses.
///
/// # Errors
/// A [`StepError`]; the state then holds what a fence reports.
pub fn run<D: HostVisible>(
    state: &mut RankState<D>,
    world: &World,
    plan: &BeginPlan,
    means: &mut Means<'_, D>,
) -> Result<Paused, StepError> {
    start(state, world, plan, means)?;
    if world.rank == Rank(0) {
        means.reporter.running(plan.base);
        // The step in dispute may have been cut short when it was done again, and be finished here.
        if let Some((step, item @ DisputedItem::Shard(_))) = plan.disputed.filter(|(step, _)| *step == plan.base) {
            means.reporter.settled(step, digest_of(state, item));
        }
    }
    let mut at = Paused {
        step: plan.base,
        saving: false,
    };
    if plan.checkpoint_at_base {
        save(state, world, means, plan.base);
        at.saving = true;
    }
    let mut is_due = was_missed(state, plan);
    while at.step < plan.last_step {
        wait_for_acknowledgement(state, means.switches)?;
        state.progress.enter(Phase::Feeding);
        let Some(batch) = means.feeder.next(plan.rollbacks.next(at.step), &state.abort)? else {
            // A decision ends the run here, and may have become known only behind this boundary.
            if !at.saving {
                save(state, world, means, at.step);
                at.saving = true;
            }
            break;
        };
        if batch.directives.rollback_to.is_some_and(|to| to != at.step) {
            break;
        }
        let wishes = Wishes {
            pause: means.switches.pause.load(Ordering::Relaxed),
            checkpoint: means.switches.checkpoint.load(Ordering::Relaxed)
                || is_asked_for(batch.step.completed(), state.saved, means.switches),
            busy: state.uploads.count() >= CHECKPOINTS_IN_FLIGHT_MAX,
        };
        let span = tracing::info_span!("step", step = batch.step.completed().0, generation = plan.generation.0);
        let line = span.in_scope(|| step::run_step(state, world, means.fabric, &batch, wishes))?;
        at = Paused {
            step: line.step,
            saving: false,
        };
        let wishes = state.passed.as_ref().map_or_else(Wishes::default, Wishes::of_all);
        if world.rank == Rank(0) {
            means.reporter.line(line);
            if let Some((step, item)) = plan.disputed.filter(|(step, _)| *step == at.step) {
                means.reporter.settled(step, digest_of(state, item));
            }
        }
        is_due |= wishes.checkpoint || is_multiple(state, at.step);
        if is_taken(is_due, at.step == plan.last_step, wishes) {
            save(state, world, means, at.step);
            (is_due, at.saving) = (false, true);
        }
        if wishes.pause {
            break;
        }
    }
    state.progress.enter(Phase::Parked);
    Ok(at)
}

/// How a disputed item is, now that all agree on it.
fn digest_of<D: Device>(state: &RankState<D>, item: DisputedItem) -> ItemDigest {
    match item {
        DisputedItem::Shard(shard) => state.shard_digests.get(shard.index()).copied(),
        DisputedItem::Lane(_) => state.audited,
        DisputedItem::Finite | DisputedItem::Base | DisputedItem::Checkpoint => None,
    }
    .unwrap_or_default()
}

/// Whether a checkpoint of this boundary is what was asked for: it has come so far, and nothing was saved since.
fn is_asked_for(step: StepsCompleted, saved: StepsCompleted, switches: &Switches) -> bool {
    let from = switches.checkpoint_from.load(Ordering::Relaxed);
    from > 0 && step.0 >= from && saved.0 < from
}

fn is_multiple<D: Device>(state: &RankState<D>, step: StepsCompleted) -> bool {
    let interval = state.config.checkpoint.interval_steps;
    interval > 0 && step.0.is_multiple_of(interval)
}

/// Whether a checkpoint was due before this generation and is not there: put off, or lost with a rank.
fn was_missed<D: Device>(state: &RankState<D>, plan: &BeginPlan) -> bool {
    let due = |step: StepsCompleted| step.0.checked_div(state.config.checkpoint.interval_steps);
    due(plan.base) > due(plan.checkpointed)
}

/// Whether a checkpoint is begun at this boundary. One that is due waits for a boundary at which no rank still stores its
/// share of the last one: memory stays bounded, and under lasting overload checkpoints get rarer instead of torn. The last of
/// all waits for nothing. All ranks ask with the same arguments, from the barrier and the config, so all take it or none.
const fn is_taken(is_due: bool, is_last: bool, all: Wishes) -> bool {
    is_last || (is_due && (!all.busy || all.pause))
}

fn save<D: Device>(state: &mut RankState<D>, world: &World, means: &Means<'_, D>, step: StepsCompleted) {
    let upload = state.uploads.begin();
    let shards = world
        .primaries_of(world.rank)
        .map(|shard| ShardToSave {
            shard,
            blocks: Blocks {
                first: BlockIndex(world.shards.blocks(shard).start as u32),
                block_elements: state.layout.block_elements(),
            },
            state: state.shards[&shard].shared(),
            ticket: state.gate.ticket(),
            upload: Arc::clone(&upload),
        })
        .collect();
    state.saved = step;
    means.reporter.save(step, shards);
}

fn wait_for_acknowledgement<D: Device>(state: &mut RankState<D>, switches: &Switches) -> Result<(), StepError> {
    loop {
        state.acknowledge(StepsCompleted(switches.acknowledged.load(Ordering::Relaxed)));
        if state.lines.len() < UNACKNOWLEDGED_LINES_MAX {
            return Ok(());
        }
        check_abort(state)?;
        state.waiting.a_moment(std::time::Duration::from_millis(10));
    }
}

/// Brings this rank to the plan's base.
fn start<D: HostVisible>(
    state: &mut RankState<D>,
    world: &World,
    plan: &BeginPlan,
    means: &mut Means<'_, D>,
) -> Result<(), StepError> {
    let _span = tracing::info_span!("begin", generation = plan.generation.0, base = plan.base.0).entered();
    state.progress.enter(Phase::Recovering);
    state.gate.wait();
    forget_old_course(state, plan);
    // What was saved in the last generation may have been lost with it.
    state.saved = StepsCompleted(0);
    check_memory(state)?;
    // A rank that was given up while it lived, since nobody could end it, and was found again by a new controller may stand further
    // behind: nobody counts on what it holds, and it cannot finish the step (STEP-2).
    let base = plan.base;
    state
        .shards
        .retain(|_, shard| shard.read_steps() == base || shard.holding().reduced == Some(base));
    if let Some(outcome) = &plan.outcome {
        let step = StepIndex(outcome.step.0 - 1);
        let directives = match state.facts.as_ref().filter(|facts| facts.step == step) {
            Some(facts) => facts.directives.clone(),
            None => means.feeder.facts(step)?.directives,
        };
        state.apply(outcome, &directives)?;
        state.passed = Some(outcome.clone());
    }
    state.shards.retain(|_, shard| shard.read_steps() == plan.base);
    if Mutant::DroppedBeforeCopied.is_on() {
        let donates = |shard: OptimizerShardIndex| {
            let holders = plan.shards.of(shard);
            holders
                .iter()
                .any(|holder| holder.origin == ShardOrigin::CopyFrom(world.rank))
        };
        state
            .shards
            .retain(|&shard, _| world.holds(world.rank, shard) || donates(shard));
    }
    let arrived = copy_shards(state, world, plan, means.fabric)?;
    let made = make_shards(state, world, plan, means.source)?;
    state
        .shards
        .extend(arrived.into_iter().chain(made).map(|shard| (shard.index(), shard)));
    if !Mutant::WeightsUnpublished.is_on() {
        publish_own_weights(state, world)?;
    }
    state.progress.reached(plan.base);
    let hash = step::gather_weights(state, world, means.fabric, plan.base, Some(plan))?;
    // All see the same, and none of them takes a step from it: a controller that knows may die before it can say so.
    if let Some(recorded) = plan.state.filter(|recorded| *recorded != hash) {
        return Err(StepError::OtherBase {
            step: plan.base,
            recorded: hex(&recorded),
            found: hex(&hash),
        });
    }
    // Only now: its all-gather has heard everybody, and a rank speaks in it once its own shards are whole. Until then what
    // moves away may have no other copy, for a new holder can die with it half received.
    state.shards.retain(|&shard, _| world.holds(world.rank, shard));
    complete_base_line(state, world, plan, hash, means)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Begun from the seed or a checkpoint: whatever is held belongs to a course that is given up, and may be wrong. It goes
/// before anything else is tried: a start that is cut short must not report it again.
pub(crate) fn forget_old_course<D: Device>(state: &mut RankState<D>, plan: &BeginPlan) {
    let from_elsewhere = |origin| matches!(origin, ShardOrigin::Initialise | ShardOrigin::Restore);
    if plan.shards.holders().iter().any(|holder| from_elsewhere(holder.origin)) {
        state.forget();
    }
}

/// A survivor's memory is hashed again before anybody copies from it: a bit that flipped since the last update would spread
/// (DET-3).
fn check_memory<D: Device>(state: &mut RankState<D>) -> Result<(), StepError> {
    for shard in state.shards.values_mut() {
        if state.abort.load(Ordering::Relaxed) {
            return Err(StepError::Aborted);
        }
        shard.check_memory(&state.device, &mut state.stream, &state.layout)?;
    }
    Ok(())
}

fn check_abort<D: Device>(state: &RankState<D>) -> Result<(), StepError> {
    if state.abort.load(Ordering::Relaxed) {
        Err(StepError::Aborted)
    } else {
        Ok(())
    }
}

/// The base step's line, where the end of the last generation cut it short of its hash. Newcomers complete it too: those
/// that ran the step may die before they send it, and nobody would run it again.
fn complete_base_line<D: HostVisible>(
    state: &mut RankState<D>,
    world: &World,
    plan: &BeginPlan,
    hash: [u8; 32],
    means: &mut Means<'_, D>,
) -> Result<(), StepError> {
    state.acknowledge(plan.acknowledged);
    let Some(outcome) = plan.outcome.as_ref().filter(|_| plan.base > plan.acknowledged) else {
        return Ok(());
    };
    // By the plan alone, so that all ranks do it or none: also those that have the line already.
    let weights = moments::gather(state, world, means.fabric, plan.base)?;
    if let Some(line) = state.lines.get(&plan.base) {
        means.reporter.line(line.clone());
        return Ok(());
    }
    state.facts = Some(means.feeder.facts(StepIndex(plan.base.0 - 1))?);
    let line = state.complete_line(outcome, hash, weights);
    means.reporter.line(line);
    Ok(())
}

/// Moves shards from their donors to new holders; all copies of the generation progress together.
fn copy_shards<D: HostVisible>(
    state: &mut RankState<D>,
    world: &World,
    plan: &BeginPlan,
    fabric: &mut dyn Collective,
) -> Result<Vec<Shard<D>>, StepError> {
    let mut copies: Vec<(OptimizerShardIndex, Rank, Rank)> = Vec::new();
    for (shard, holders) in world.shards.shards().zip(plan.shards.iter()) {
        for holder in holders {
            if let ShardOrigin::CopyFrom(donor) = holder.origin {
                copies.push((shard, donor, holder.rank));
            }
        }
    }
    let mut arrived = Vec::new();
    for &(shard, _, to) in &copies {
        if to == world.rank {
            check_abort(state)?;
            if Mutant::PoisonedDonor.is_on() {
                let mut empty = Shard::new(&state.device, world.shards, shard)?;
                empty.write().steps = plan.base;
                state.shards.insert(shard, empty);
            }
            arrived.push(Shard::new(&state.device, world.shards, shard)?);
        }
    }
    {
        let donated: Vec<_> = copies
            .iter()
            .filter(|(_, donor, _)| *donor == world.rank)
            .map(|&(shard, _, to)| (shard, to, state.shards[&shard].read()))
            .collect();
        let mut leaving = Vec::new();
        for (shard, to, guard) in &donated {
            let whole = 0..world.elements(*shard).len();
            for (part, buffer) in [&guard.master, &guard.first_moment, &guard.second_moment]
                .into_iter()
                .enumerate()
            {
                leaving.push(Leaving {
                    to: vec![*to],
                    tag: copy_tag(plan.base, *shard, part),
                    buffer,
                    range: whole.clone(),
                });
            }
        }
        let mut filling: Vec<_> = arrived
            .iter_mut()
            .map(|shard: &mut Shard<D>| (shard.index(), shard.write()))
            .collect();
        let (mut targets, mut arriving) = (Vec::new(), Vec::new());
        let mine = copies.iter().filter(|(_, _, to)| *to == world.rank);
        for ((shard, guard), &(_, from, _)) in filling.iter_mut().zip(mine) {
            let state = &mut **guard;
            let parts = [&mut state.master, &mut state.first_moment, &mut state.second_moment];
            for (part, buffer) in parts.into_iter().enumerate() {
                arriving.push(Arriving {
                    from,
                    tag: copy_tag(plan.base, *shard, part),
                    range: targets.len(),
                });
                let whole = 0..world.elements(*shard).len();
                targets.push(Target {
                    buffer,
                    ranges: vec![whole],
                });
            }
        }
        let stream = &mut state.stream;
        state.device.exchange(stream, fabric, &leaving, &arriving, targets)?;
    }
    settle(state, plan.base, arrived)
}

fn copy_tag(base: StepsCompleted, shard: OptimizerShardIndex, part: usize) -> Tag {
    Tag::new(TagKind::StateCopy, base.0, u64::from(shard.0) << 2 | part as u64)
}

/// Shards from the seed, from the checkpoint that the config begins with, or from the run's own.
fn make_shards<D: HostVisible>(
    state: &mut RankState<D>,
    world: &World,
    plan: &BeginPlan,
    source: &dyn ShardSource,
) -> Result<Vec<Shard<D>>, StepError> {
    let (mut made, mut begun, mut restored) = (Vec::new(), Vec::new(), Vec::new());
    for (index, holders) in world.shards.shards().zip(plan.shards.iter()) {
        let Some(mine) = holders.iter().find(|holder| holder.rank == world.rank) else {
            continue;
        };
        match mine.origin {
            ShardOrigin::Initialise if state.config.model.initial.is_some() => {
                begun.push((index, world.elements(index)));
            }
            ShardOrigin::Initialise => {
                check_abort(state)?;
                let tensors = initial(state, world.elements(index));
                made.push(shard_of(state, world, index, tensors)?);
            }
            ShardOrigin::Restore => restored.push(index),
            ShardOrigin::Keep | ShardOrigin::CopyFrom(_) => {}
        }
    }
    let abort = Arc::clone(&state.abort);
    if !begun.is_empty() {
        source.read_initial(&begun, &abort, &mut |index, master| {
            check_abort(state)?;
            let zeros = vec![0.0; master.len()];
            made.push(shard_of(state, world, index, [master, zeros.clone(), zeros])?);
            Ok(())
        })?;
    }
    if !restored.is_empty() {
        source.read_each(checkpoint_of(plan)?, &restored, &abort, &mut |index, tensors| {
            check_abort(state)?;
            made.push(shard_of(state, world, index, tensors)?);
            Ok(())
        })?;
    }
    settle(state, plan.base, made)
}

/// The state that a run begins with by its seed, of these elements.
fn initial<D: Device>(state: &RankState<D>, elements: Range<usize>) -> [Vec<f32>; 3] {
    let (config, length) = (&state.config, elements.len());
    let mut master = vec![0.0; length];
    tarazed_model::initialise(&state.layout, &config.model, config.run.seed, elements, &mut master);
    [master, vec![0.0; length], vec![0.0; length]]
}

/// A shard with this state; it counts once it is settled.
fn shard_of<D: Device>(
    state: &mut RankState<D>,
    world: &World,
    index: OptimizerShardIndex,
    [master, first, second]: [Vec<f32>; 3],
) -> Result<Shard<D>, StepError> {
    let length = world.elements(index).len();
    let mut shard = Shard::new(&state.device, world.shards, index)?;
    {
        let mut inner = shard.write();
        let inner = &mut *inner;
        for (values, buffer) in [
            (master, &mut inner.master),
            (first, &mut inner.first_moment),
            (second, &mut inner.second_moment),
        ] {
            if values.len() != length {
                let cause = format!("shard {index} has {} elements, not {length}", values.len());
                return Err(StepError::Restore(cause));
            }
            state.device.upload(&mut state.stream, &values, ViewMut::from(buffer))?;
        }
    }
    state.progress.worked();
    Ok(shard)
}

/// The checkpoint that a plan restores from: that of its base, or the plan is not to be believed.
fn checkpoint_of(plan: &BeginPlan) -> Result<&RestoreFrom, StepError> {
    let from = plan.restore.as_ref().filter(|from| from.step == plan.base);
    from.ok_or_else(|| {
        StepError::Restore(format!(
            "the plan of generation {} names no checkpoint of its base, step {}",
            plan.generation, plan.base
        ))
    })
}

/// Marks shards that have come whole.
fn settle<D: Device>(
    state: &mut RankState<D>,
    base: StepsCompleted,
    mut shards: Vec<Shard<D>>,
) -> Result<Vec<Shard<D>>, StepError> {
    for shard in &mut shards {
        check_abort(state)?;
        shard.write().steps = base;
        shard.rehash(&state.device, &mut state.stream, &state.layout)?;
    }
    Ok(shards)
}

/// Working weights of the shards held here, where they came from elsewhere than an update.
fn publish_own_weights<D: Device>(state: &mut RankState<D>, world: &World) -> Result<(), StepError> {
    for shard in world.held_by(world.rank) {
        check_abort(state)?;
        let elements = world.elements(shard);
        let guard = state.shards[&shard].read();
        let into = ViewMut::at(&mut state.weights, elements.start);
        state
            .device
            .copy(&mut state.stream, (&guard.master).into(), into, elements.len())?;
    }
    state.device.synchronize(&mut state.stream)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A checkpoint waits for the store, but for the last one and for one at which all stop.
    #[test]
    fn a_due_checkpoint_waits_for_the_store() {
        let wishes = |pause, busy| Wishes {
            pause,
            checkpoint: false,
            busy,
        };
        let (due, last) = (true, true);
        for (pause, busy) in [(false, false), (false, true), (true, false), (true, true)] {
            let all = wishes(pause, busy);
            assert_eq!(is_taken(due, !last, all), pause || !busy);
            assert!(!is_taken(!due, !last, all), "nobody asked");
            assert!(is_taken(due, last, all) && is_taken(!due, last, all));
        }
    }

    /// A checkpoint that was asked for is made once, not before its step, and not again by one that hears of it late.
    #[test]
    fn what_is_asked_for_is_saved_once() {
        let switches = Switches::default();
        let asked = |step: u64, saved: u64| is_asked_for(StepsCompleted(step), StepsCompleted(saved), &switches);
        assert!(!asked(5, 0), "nobody has asked");
        switches.checkpoint_from.store(7, Ordering::Relaxed);
        assert!(!asked(6, 0), "the run is still on its way there");
        assert!(asked(7, 0) && asked(8, 6));
        assert!(!asked(8, 7) && !asked(9, 8), "it is saved");
        switches.checkpoint_from.store(12, Ordering::Relaxed);
        assert!(!asked(9, 8) && asked(12, 8));
    }
}
