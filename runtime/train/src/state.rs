//! Everything a rank's device thread owns between steps.

use crate::StepError;
use crate::compute::LaneEngine;
use crate::harm::{Hang, Harm};
use crate::optimizer::{Shard, Update};
use crate::progress::Progress;
use crate::snapshot::{SnapshotGate, Uploads};
use crate::waiting::Waiting;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tarazed_domain::config::Config;
use tarazed_domain::{Mutant, OptimizerShardIndex, ParameterLayout, ShardLayout, StepIndex, StepsCompleted};
use tarazed_kernels::{Device, Precision};
use tarazed_model::Model;
use tarazed_protocol::data::course::Directives;
use tarazed_protocol::data::trajectory::Moments;
use tarazed_protocol::message::{BarrierOutcome, ItemDigest, StateReport, StepLine};

/// What a rank keeps between steps and, while it lives, between generations.
pub struct RankState<D: Device> {
    /// The resolved config.
    pub config: Arc<Config>,
    /// The device.
    pub device: D,
    /// The device thread's own stream.
    pub stream: D::Stream,
    /// The model.
    pub model: Model<D>,
    /// The flat space.
    pub layout: ParameterLayout,
    /// Its cut into optimizer shards.
    pub shard_layout: ShardLayout,
    /// Flat working weights.
    pub weights: D::Buffer,
    /// Optimizer shards held whole. While steps run these are exactly the ones that the generation's map gives this rank,
    /// primary or replica; between two generations, and until the new one is whole, also those that move away.
    pub shards: BTreeMap<OptimizerShardIndex, Shard<D>>,
    /// Compute threads' memory.
    pub engine: LaneEngine<D>,
    /// Staging for other ranks' partial gradients, kept between steps.
    pub staging: Vec<D::Buffer>,
    /// Newest barrier passed.
    pub passed: Option<BarrierOutcome>,
    /// The newest step of this life whose checkpoint was begun here.
    pub saved: StepsCompleted,
    /// Facts of the step last fed, for its line.
    pub facts: Option<StepFacts>,
    /// Complete lines that the controller has not acknowledged.
    pub lines: BTreeMap<StepsCompleted, StepLine>,
    /// Of every shard after the newest step, as all its holders have it.
    pub shard_digests: Vec<ItemDigest>,
    /// Of the lane that was computed again in the newest step, as both have it; none where none was.
    pub audited: Option<ItemDigest>,
    /// Harm to be done to this rank on purpose.
    pub harm: Option<Harm>,
    /// A part of it that is to stand still on purpose.
    pub hang: Option<Hang>,
    /// Shown to the outside.
    pub progress: Arc<Progress>,
    /// Checkpoints of this rank that are being stored, those of earlier generations, too.
    pub uploads: Uploads,
    /// Snapshots that the next update must wait for.
    pub gate: Arc<SnapshotGate>,
    /// How the device thread waits for the rest of its process.
    pub waiting: Waiting,
    /// Set to make compute threads give up; one for each generation.
    pub abort: Arc<AtomicBool>,
}

/// What the line of a step says besides measurements.
#[derive(Clone, PartialEq, Debug)]
pub struct StepFacts {
    /// The step.
    pub step: StepIndex,
    /// Digest of its samples.
    pub data: [u8; 32],
    /// Mixture in force.
    pub mixture: Vec<f64>,
    /// What else was decided for it.
    pub directives: Directives,
}

impl<D: Device + Clone> RankState<D> {
    /// A rank that holds nothing yet.
    ///
    /// # Errors
    /// If the device has no memory for working weights and compute threads.
    pub fn new(config: Arc<Config>, device: D, progress: Arc<Progress>) -> Result<Self, StepError> {
        let layout = tarazed_model::parameter_layout(&config.model, config.optimizer.block_elements);
        let shard_layout = ShardLayout::new(&layout, config.optimizer.shards);
        let model = Model::new(&config.model, &layout, device.clone())?;
        let threads = config.cluster.threads_per_rank as usize;
        let micro_batch = config.batch.micro_batch_sequences as usize;
        let engine = LaneEngine::new(&model, layout.flat_elements(), threads, micro_batch)?;
        let weights = device.alloc(layout.flat_elements(), Precision::Working)?;
        let stream = device.stream()?;
        Ok(Self {
            config,
            device,
            stream,
            model,
            layout,
            shard_layout,
            weights,
            shards: BTreeMap::new(),
            engine,
            staging: Vec::new(),
            passed: None,
            saved: StepsCompleted(0),
            facts: None,
            lines: BTreeMap::new(),
            shard_digests: Vec::new(),
            audited: None,
            harm: None,
            hang: None,
            progress,
            uploads: Uploads::default(),
            gate: Arc::default(),
            waiting: Waiting::default(),
            abort: Arc::new(AtomicBool::new(false)),
        })
    }
}

impl<D: Device> RankState<D> {
    /// The same, waiting in another way.
    #[must_use]
    pub fn with_waiting(mut self, waiting: Waiting) -> Self {
        self.gate = Arc::new(SnapshotGate::new(waiting.clone()));
        self.waiting = waiting;
        self
    }

    /// The same, with harm to be done to it on purpose.
    #[must_use]
    pub fn harmed(mut self, harm: Option<Harm>) -> Self {
        self.harm = harm;
        self
    }

    /// The same, with a part of it that is to stand still on purpose.
    #[must_use]
    pub fn hanging(mut self, hang: Option<Hang>) -> Self {
        self.hang = hang;
        self
    }

    /// The answer to a fence.
    #[must_use]
    pub fn report(&self) -> StateReport {
        StateReport {
            shards: self.shards.values().map(Shard::holding).collect(),
            passed: self.passed.clone(),
            lines: if Mutant::LinesForgotten.is_on() {
                Vec::new()
            } else {
                self.lines.values().cloned().collect()
            },
            waits_for: None,
        }
    }

    /// What is held belongs to a course that is given up, or is wrong: no fence may hear of it again.
    pub fn forget(&mut self) {
        self.shards.clear();
        self.passed = None;
        self.saved = StepsCompleted(0);
        self.facts = None;
        self.lines.clear();
    }

    /// Lines through this one are written and need not be kept.
    pub fn acknowledge(&mut self, through: StepsCompleted) {
        self.lines = self.lines.split_off(&through.next().completed());
    }

    /// The line of a finished step; also kept until it is acknowledged (STEP-6). `weights` are the moments of
    /// [`crate::moments::gather`].
    ///
    /// # Panics
    /// If no step was fed: one that is finished was.
    pub fn complete_line(&mut self, outcome: &BarrierOutcome, hash: [u8; 32], weights: Vec<Moments>) -> StepLine {
        let facts = self
            .facts
            .as_ref()
            .unwrap_or_else(|| unreachable!("a step's facts are noted when it begins"));
        let line = StepLine {
            step: outcome.step,
            data: facts.data,
            loss: outcome.loss,
            grad_norm: outcome.grad_norm,
            state: hash,
            learning_rate: crate::optimizer::learning_rate(&self.config.optimizer, facts.step, &facts.directives),
            mixture: facts.mixture.clone(),
            stats: outcome.stats.clone(),
            skipped: outcome.skipped,
            weights,
        };
        self.lines.insert(line.step, line.clone());
        line
    }

    /// Finishes a passed step on this rank: every shard held applies its reduced gradient. A purely local act that is
    /// never cut short, so all shards of a rank stand at one count.
    ///
    /// # Errors
    /// If the device fails.
    pub fn apply(&mut self, outcome: &BarrierOutcome, directives: &Directives) -> Result<(), StepError> {
        for shard in self
            .shards
            .values_mut()
            .filter(|shard| shard.read_steps() < outcome.step)
        {
            let update = Update {
                optimizer: &self.config.optimizer,
                directives,
                outcome,
            };
            shard.apply(&self.device, &mut self.stream, &self.layout, update, &mut self.weights)?;
        }
        Ok(())
    }
}
