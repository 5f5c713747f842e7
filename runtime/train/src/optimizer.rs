//! Optimizer shards: master weights and both moments of one run of blocks, with the reduced gradient that leads onwards.
//!
//! A shard is shared between the device thread, which alone updates it, and whoever copies a snapshot of it. The state is
//! immutable between updates, so a snapshot copies under a read lock while the next forward and backward run, and the
//! update waits only if the copy is not done (DESIGN.md section 7).
//!
//! - **STEP-4** Block hashes are made in the update pass itself.
//! - **DET-3** The same pass hashes what it reads: a block that is not as the last update left it has changed by itself.
//! - Primary and replica apply the same deterministic update, so their hashes agree bit for bit.

use crate::StepError;
use std::ops::Range;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tarazed_domain::config::OptimizerConfig;
use tarazed_domain::mutant::is_unguarded;
use tarazed_domain::{
    BlockIndex, Mutant, OptimizerShardIndex, ParameterLayout, ShardLayout, StepIndex, StepsCompleted,
};
use tarazed_kernels::{AdamwStep, BlockHash, Blocks, Device, DeviceError, OptimizerState, Precision, View, ViewMut};
use tarazed_protocol::data::course::Directives;
use tarazed_protocol::message::{BarrierOutcome, ShardHolding};

/// State of one shard after `steps` updates. Each buffer has the length of the shard.
#[derive(Debug)]
pub struct ShardState<D: Device> {
    /// Updates applied.
    pub steps: StepsCompleted,
    /// Master weights, f32.
    pub master: D::Buffer,
    /// AdamW's first moment.
    pub first_moment: D::Buffer,
    /// AdamW's second moment.
    pub second_moment: D::Buffer,
    /// Hashes of the shard's blocks as they stand.
    pub hashes: Vec<BlockHash>,
}

/// What every shard is updated by.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// AdamW as configured.
    pub optimizer: &'a OptimizerConfig,
    /// What was decided for the step.
    pub directives: &'a Directives,
    /// What its barrier said.
    pub outcome: &'a BarrierOutcome,
}

/// One shard on one rank.
#[derive(Debug)]
pub struct Shard<D: Device> {
    index: OptimizerShardIndex,
    elements: Range<usize>,
    state: Arc<RwLock<ShardState<D>>>,
    /// The sum over all lanes, and the count it leads to once it is whole.
    reduced: D::Buffer,
    reduced_to: Option<StepsCompleted>,
}

impl<D: Device> Shard<D> {
    /// A shard with zeroed state at step 0.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn new(device: &D, layout: ShardLayout, index: OptimizerShardIndex) -> Result<Self, DeviceError> {
        let elements = layout.elements(index);
        let length = elements.len();
        let alloc = || device.alloc(length, Precision::Full);
        let state = ShardState {
            steps: StepsCompleted(0),
            master: alloc()?,
            first_moment: alloc()?,
            second_moment: alloc()?,
            hashes: vec![BlockHash::default(); layout.blocks(index).len()],
        };
        Ok(Self {
            index,
            elements,
            state: Arc::new(RwLock::new(state)),
            reduced: alloc()?,
            reduced_to: None,
        })
    }

    /// Which shard it is.
    #[must_use]
    pub const fn index(&self) -> OptimizerShardIndex {
        self.index
    }

    /// Its elements in the flat space.
    #[must_use]
    pub fn elements(&self) -> Range<usize> {
        self.elements.clone()
    }

    /// The state, to read.
    pub fn read(&self) -> RwLockReadGuard<'_, ShardState<D>> {
        self.state.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Updates applied.
    #[must_use]
    pub fn read_steps(&self) -> StepsCompleted {
        self.read().steps
    }

    /// The state, to write; waits for snapshots that still copy.
    pub fn write(&mut self) -> RwLockWriteGuard<'_, ShardState<D>> {
        self.state.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A handle for a snapshot.
    #[must_use]
    pub fn shared(&self) -> Arc<RwLock<ShardState<D>>> {
        Arc::clone(&self.state)
    }

    /// The reduced gradient, to fill; it counts once [`Shard::mark_reduced`] is called.
    pub fn reduced_mut(&mut self) -> &mut D::Buffer {
        self.reduced_to = None;
        &mut self.reduced
    }

    /// The reduced gradient.
    #[must_use]
    pub const fn reduced(&self) -> &D::Buffer {
        &self.reduced
    }

    /// The reduced gradient is whole and leads to this count (STEP-1).
    pub const fn mark_reduced(&mut self, step: StepsCompleted) {
        self.reduced_to = Some(step);
    }

    /// What a fence hears of it.
    #[must_use]
    pub fn holding(&self) -> ShardHolding {
        ShardHolding {
            shard: self.index,
            state: self.read().steps,
            reduced: self.reduced_to,
        }
    }

    /// Applies the reduced gradient: AdamW with clipping, block hashes in the same pass (STEP-4), and the new master
    /// weights into `weights` (the flat working weights). Where the step is to be skipped, only its count is taken.
    ///
    /// # Panics
    /// If the reduced gradient does not lead to the outcome's step: the commit rule excludes it.
    ///
    /// # Errors
    /// [`StepError::Rotten`] if the state is not as its hashes say: it is spoilt now, and must not be used. Or if the device
    /// fails.
    pub fn apply(
        &mut self,
        device: &D,
        stream: &mut D::Stream,
        layout: &ParameterLayout,
        update: Update<'_>,
        weights: &mut D::Buffer,
    ) -> Result<(), StepError> {
        let Update {
            optimizer,
            directives,
            outcome,
        } = update;
        assert_eq!(
            self.reduced_to,
            Some(outcome.step),
            "STEP-1: the reduced gradient of shard {} is whole",
            self.index
        );
        let step = StepIndex(outcome.step.0 - 1);
        let first = self.elements.start / layout.block_elements();
        let mut state = self.state.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let from = directives.rollback_to.unwrap_or(StepsCompleted(step.0));
        assert_eq!(state.steps, from, "shard {} takes every step once", self.index);
        if outcome.skipped {
            // Nothing is read, so nothing is hashed: the next update finds what changed by itself.
            state.steps = outcome.step;
            return Ok(());
        }
        let ShardState {
            master,
            first_moment,
            second_moment,
            hashes,
            ..
        } = &mut *state;
        let mut changed = 0;
        for run in decay_runs(layout, first, hashes.len()) {
            let offset = (run.start - first) * layout.block_elements();
            let call = AdamwStep {
                learning_rate: learning_rate(optimizer, step, directives),
                beta1: optimizer.beta1,
                beta2: optimizer.beta2,
                eps: optimizer.eps,
                weight_decay: if layout.block_decays(BlockIndex(run.start as u32)) {
                    optimizer.weight_decay
                } else {
                    0.0
                },
                gradient_scale: clip_scale(optimizer.clip_norm, outcome.grad_norm),
                step: outcome.step.0,
            };
            let blocks = Blocks {
                first: BlockIndex(run.start as u32),
                block_elements: layout.block_elements(),
            };
            changed += device.adamw(
                stream,
                &call,
                blocks,
                View::at(&self.reduced, offset),
                OptimizerState {
                    master: ViewMut::at(master, offset),
                    first_moment: ViewMut::at(first_moment, offset),
                    second_moment: ViewMut::at(second_moment, offset),
                },
                Some(ViewMut::at(weights, run.start * layout.block_elements())),
                &mut hashes[run.start - first..run.end - first],
            )?;
        }
        if changed > 0 && !Mutant::RotBelieved.is_on() && !is_unguarded() {
            return Err(StepError::Rotten {
                shard: self.index,
                step: state.steps,
            });
        }
        state.steps = outcome.step;
        Ok(())
    }

    /// Hashes the state again, between two updates: it must be as the last one left it (DET-3).
    ///
    /// # Errors
    /// [`StepError::Rotten`] if it has changed by itself; if the device fails.
    pub fn check_memory(
        &mut self,
        device: &D,
        stream: &mut D::Stream,
        layout: &ParameterLayout,
    ) -> Result<(), StepError> {
        let (step, before) = (self.read_steps(), self.read().hashes.clone());
        self.rehash(device, stream, layout)?;
        if self.read().hashes != before {
            return Err(StepError::Rotten {
                shard: self.index,
                step,
            });
        }
        Ok(())
    }

    /// Hashes the state as it stands, after it came from the seed, a peer or a checkpoint.
    ///
    /// # Errors
    /// If the device fails.
    pub fn rehash(&mut self, device: &D, stream: &mut D::Stream, layout: &ParameterLayout) -> Result<(), StepError> {
        let first = BlockIndex((self.elements.start / layout.block_elements()) as u32);
        let mut state = self.write();
        let ShardState {
            master,
            first_moment,
            second_moment,
            hashes,
            ..
        } = &mut *state;
        let blocks = Blocks {
            first,
            block_elements: layout.block_elements(),
        };
        let (master, first_moment, second_moment) = (&*master, &*first_moment, &*second_moment);
        device.block_hashes(
            stream,
            blocks,
            master.into(),
            first_moment.into(),
            second_moment.into(),
            hashes,
        )?;
        Ok(())
    }
}

/// Learning rate of a step.
#[must_use]
pub fn learning_rate(optimizer: &OptimizerConfig, step: StepIndex, directives: &Directives) -> f64 {
    let decay_from = directives.decay_from.map(|from| from.0);
    optimizer.learning_rate * optimizer.schedule.fraction_with(step.0, decay_from) * directives.rate_factor
}

/// Factor that brings the gradient's norm down to `clip_norm`.
#[must_use]
pub fn clip_scale(clip_norm: f64, grad_norm: f64) -> f32 {
    if grad_norm > clip_norm {
        (clip_norm / grad_norm) as f32
    } else {
        1.0
    }
}

/// Cuts blocks `[first, first + count)` where weight decay changes.
fn decay_runs(layout: &ParameterLayout, first: usize, count: usize) -> Vec<Range<usize>> {
    let end = first + count;
    let split = (first..end)
        .find(|&block| !layout.block_decays(BlockIndex(block as u32)))
        .unwrap_or(end);
    [first..split, split..end]
        .into_iter()
        .filter(|run| !run.is_empty())
        .collect()
}
