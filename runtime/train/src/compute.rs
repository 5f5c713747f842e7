//! Forward and backward of this rank's lanes, each lane on one thread, folded along the lane tree.
//!
//! - **DET-1** A lane is computed by one thread from (weights, its samples) alone; how many threads there are and which one
//!   takes it cannot show.
//! - **DET-2** Lanes are added only as siblings of the aligned tree, `left + right`.

use crate::StepError;
use crate::barrier::sum_over_blocks;
use crate::feeder::{LaneSamples, StepBatch};
use crate::harm::Harm;
use crate::progress::Progress;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use tarazed_domain::lanes::TreeFold;
use tarazed_domain::{DomainIndex, LaneIndex, LaneRange, LaneTree, Mutant, Node};
use tarazed_kernels::{Device, DeviceError, Precision, View, ViewMut};
use tarazed_model::{Model, Workspace};
use tarazed_protocol::data::stats::LaneStats;
use tarazed_protocol::message::ItemDigest;

/// What one compute thread owns. It has one stream, the workspace's: what is asked of another is not in its order.
struct Worker<D: Device> {
    workspace: Workspace<D>,
}

/// The compute threads' memory, kept between steps.
pub struct LaneEngine<D: Device> {
    workers: Vec<Worker<D>>,
    /// Gradient buffers not in use, each of the flat space's length.
    pool: Mutex<Vec<D::Buffer>>,
    flat_elements: usize,
    micro_batch_sequences: usize,
}

/// Gradients of this rank's maximal nodes, left to right, and statistics of each of its lanes.
pub struct LaneResults<D: Device> {
    /// Node and flat gradient.
    pub nodes: Vec<(Node, D::Buffer)>,
    /// One for each lane, in order.
    pub stats: Vec<LaneStats>,
    /// Of the audited lane's gradient, where it is one of these.
    pub audited: Option<ItemDigest>,
}

/// Digests a gradient, when all that the stream was asked for is done.
pub type GradientDigest<D> =
    fn(&D, &mut <D as Device>::Stream, &<D as Device>::Buffer) -> Result<ItemDigest, DeviceError>;

/// Everything a lane is computed from.
pub struct LaneInputs<'a, D: Device> {
    /// The device.
    pub device: &'a D,
    /// The model.
    pub model: &'a Model<D>,
    /// Flat working weights.
    pub weights: &'a D::Buffer,
    /// Samples of this rank's lanes.
    pub batch: &'a StepBatch,
    /// Factor of each token's loss: one over the tokens of the global batch.
    pub loss_scale: f32,
    /// Each lane's gradient is squared, block by block of so many elements.
    pub squares_of: Option<usize>,
    /// Set to give up.
    pub abort: &'a AtomicBool,
    /// Shown to the outside.
    pub progress: &'a Progress,
    /// What two ranks compare of a lane's gradient.
    pub digest: GradientDigest<D>,
    /// Harm to be done to a lane's gradient on purpose.
    pub harm: Option<Harm>,
}

impl<D: Device> Clone for LaneInputs<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for LaneInputs<'_, D> {}

impl<D: Device> LaneEngine<D> {
    /// Memory for `threads` compute threads, and every product of a micro-batch made ready.
    ///
    /// # Errors
    /// If the device has no memory for it, or does not take a shape.
    pub fn new(
        model: &Model<D>,
        flat_elements: usize,
        threads: usize,
        micro_batch_sequences: usize,
    ) -> Result<Self, StepError> {
        model.prepare(micro_batch_sequences)?;
        let workers = (0..threads.max(1))
            .map(|_| {
                Ok(Worker {
                    workspace: model.workspace(micro_batch_sequences)?,
                })
            })
            .collect::<Result<_, StepError>>()?;
        Ok(Self {
            workers,
            pool: Mutex::new(Vec::new()),
            flat_elements,
            micro_batch_sequences,
        })
    }

    /// Gives gradient buffers back for the next step.
    pub fn recycle(&mut self, buffers: impl IntoIterator<Item = D::Buffer>) {
        self.pool
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(buffers);
    }

    /// Computes the lanes of `range`.
    ///
    /// # Errors
    /// `Aborted`, or the device's error.
    pub fn run(
        &mut self,
        inputs: LaneInputs<'_, D>,
        tree: LaneTree,
        range: LaneRange,
    ) -> Result<LaneResults<D>, StepError> {
        let shared = Shared {
            fold: Mutex::new(TreeFold::new(tree, range)),
            next: Mutex::new(range.start),
            stats: Mutex::new(vec![None; range.len()]),
            failed: Mutex::new(None),
            audited: Mutex::new(None),
            pool: &self.pool,
            flat_elements: self.flat_elements,
            range,
            micro_batch_sequences: self.micro_batch_sequences,
        };
        let (first, rest) = self.workers.split_at_mut(1);
        std::thread::scope(|scope| {
            for worker in rest.iter_mut().take(range.len().saturating_sub(1)) {
                let shared = &shared;
                scope.spawn(move || shared.work(worker, inputs));
            }
            shared.work(&mut first[0], inputs);
        });
        if let Some(error) = shared.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let nodes = shared
            .fold
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .into_nodes();
        let stats = shared.stats.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(LaneResults {
            nodes,
            stats: stats.into_iter().flatten().collect(),
            audited: shared.audited.into_inner().unwrap_or_else(PoisonError::into_inner),
        })
    }

    /// Computes another rank's lane again and says what its gradient is; nothing of it is kept (DET-3).
    ///
    /// # Errors
    /// `Aborted`, or the device's error.
    pub fn audit(&mut self, inputs: LaneInputs<'_, D>, samples: &LaneSamples) -> Result<ItemDigest, StepError> {
        let pooled = self.pool.get_mut().unwrap_or_else(PoisonError::into_inner).pop();
        let mut gradient = match pooled {
            Some(pooled) => pooled,
            None => inputs.device.alloc(self.flat_elements, Precision::Full)?,
        };
        let worker = &mut self.workers[0];
        let len = self.flat_elements;
        inputs
            .device
            .zero(worker.workspace.stream(), ViewMut::from(&mut gradient), len)?;
        train_on(
            self.micro_batch_sequences,
            worker,
            inputs,
            samples,
            &mut gradient,
            0,
            |_, _| {},
        )?;
        let digest = (inputs.digest)(inputs.device, worker.workspace.stream(), &gradient)?;
        self.recycle([gradient]);
        Ok(digest)
    }
}

/// What the threads of one step share. No number depends on who takes which lane.
struct Shared<'a, D: Device> {
    fold: Mutex<TreeFold<D::Buffer>>,
    next: Mutex<u32>,
    stats: Mutex<Vec<Option<LaneStats>>>,
    failed: Mutex<Option<StepError>>,
    audited: Mutex<Option<ItemDigest>>,
    pool: &'a Mutex<Vec<D::Buffer>>,
    range: LaneRange,
    flat_elements: usize,
    micro_batch_sequences: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<D: Device> Shared<'_, D> {
    fn work(&self, worker: &mut Worker<D>, inputs: LaneInputs<'_, D>) {
        while let Some(lane) = self.take_lane() {
            if let Err(error) = self.one_lane(worker, inputs, lane) {
                lock(&self.failed).get_or_insert(error);
                return;
            }
        }
    }

    fn take_lane(&self) -> Option<LaneIndex> {
        if lock(&self.failed).is_some() {
            return None;
        }
        let mut next = lock(&self.next);
        let lane = *next;
        (lane < self.range.end).then(|| {
            *next += 1;
            LaneIndex(lane)
        })
    }

    fn one_lane(&self, worker: &mut Worker<D>, inputs: LaneInputs<'_, D>, lane: LaneIndex) -> Result<(), StepError> {
        let mut gradient = self.take_buffer(worker, inputs)?;
        let stats = self.compute_lane(worker, inputs, lane, &mut gradient)?;
        if let Some(harm) = inputs.harm.filter(|harm| harm.lane(self.range) == Some(lane)) {
            harm.flip(inputs.device, worker.workspace.stream(), &mut gradient);
        }
        if inputs.batch.audited == Some(lane) {
            let digest = (inputs.digest)(inputs.device, worker.workspace.stream(), &gradient)?;
            *lock(&self.audited) = Some(digest);
        }
        // From here on other streams may add to the gradient or read it. A lane that trained was waited for with its losses;
        // of one without sequences the zeroes may still stand in this stream alone.
        inputs.device.synchronize(worker.workspace.stream())?;
        lock(&self.stats)[(lane.0 - self.range.start) as usize] = Some(stats);
        let (mut node, mut value) = (Node::leaf(lane), gradient);
        loop {
            // The lock is held for the look-up only; the addition runs outside it.
            let offered = lock(&self.fold).offer(node, value);
            let Some((mut left, right, parent)) = offered else {
                return Ok(());
            };
            let len = inputs.device.len(&left);
            inputs.device.fold(
                worker.workspace.stream(),
                ViewMut::from(&mut left),
                View::from(&right),
                len,
            )?;
            inputs.device.synchronize(worker.workspace.stream())?;
            lock(self.pool).push(right);
            (node, value) = (parent, left);
        }
    }

    fn take_buffer(&self, worker: &mut Worker<D>, inputs: LaneInputs<'_, D>) -> Result<D::Buffer, StepError> {
        let elements = self.flat_elements;
        let pooled = lock(self.pool).pop();
        let Some(mut buffer) = pooled else {
            return Ok(inputs.device.alloc(elements, Precision::Full)?);
        };
        inputs
            .device
            .zero(worker.workspace.stream(), ViewMut::from(&mut buffer), elements)?;
        Ok(buffer)
    }

    /// Micro-batches left to right into one gradient; held-out sequences forward only.
    fn compute_lane(
        &self,
        worker: &mut Worker<D>,
        inputs: LaneInputs<'_, D>,
        lane: LaneIndex,
        gradient: &mut D::Buffer,
    ) -> Result<LaneStats, StepError> {
        let mut stats = LaneStats::new(inputs.batch.domain_count());
        let samples = inputs.batch.lane(lane);
        let forgets = Mutant::MicroBatchLost.is_on() && inputs.batch.is_shared();
        let (per_chunk, context) = (self.micro_batch_sequences, inputs.batch.context as u64);
        train_on(
            per_chunk,
            worker,
            inputs,
            samples,
            gradient,
            usize::from(forgets),
            |domain, loss| {
                stats.add_train(domain, loss, context);
            },
        )?;
        if let Some(block_elements) = inputs.squares_of {
            let mut sums = vec![0.0; self.flat_elements / block_elements];
            let all = View::from(&*gradient);
            inputs
                .device
                .square_sums(worker.workspace.stream(), all, block_elements, &mut sums)?;
            stats.set_squares(sum_over_blocks(sums));
        }
        for chunk in samples
            .held_out
            .chunks(self.micro_batch_sequences, inputs.batch.sequence_tokens())
        {
            let losses = inputs
                .model
                .losses(inputs.weights, &mut worker.workspace, chunk.tokens, inputs.abort)?;
            for (&domain, loss) in chunk.domains.iter().zip(losses) {
                stats.add_heldout(domain, loss, inputs.batch.context as u64);
            }
            inputs.progress.worked();
        }
        if inputs.abort.load(Ordering::Relaxed) {
            return Err(StepError::Aborted);
        }
        Ok(stats)
    }
}

/// A lane's training samples, micro-batch after micro-batch, into one gradient; `heard` is told each sequence's loss.
fn train_on<D: Device>(
    micro_batch_sequences: usize,
    worker: &mut Worker<D>,
    inputs: LaneInputs<'_, D>,
    samples: &LaneSamples,
    gradient: &mut D::Buffer,
    skipped: usize,
    mut heard: impl FnMut(DomainIndex, f64),
) -> Result<(), StepError> {
    let chunks = samples
        .training
        .chunks(micro_batch_sequences, inputs.batch.sequence_tokens());
    for chunk in chunks.skip(skipped) {
        let losses = inputs.model.forward_backward(
            inputs.weights,
            gradient,
            &mut worker.workspace,
            chunk.tokens,
            inputs.loss_scale,
            inputs.abort,
        )?;
        for (&domain, loss) in chunk.domains.iter().zip(losses) {
            heard(domain, loss);
        }
        inputs.progress.worked();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use tarazed_domain::config::ModelConfig;
    use tarazed_kernels::cuda::CudaDevice;
    use tarazed_kernels::cuda::recording::{Call, RecordingDriver};
    use tarazed_model::parameter_layout;

    type Recorded = CudaDevice<RecordingDriver>;

    fn model(recorder: &RecordingDriver) -> (Model<Recorded>, usize) {
        let config = ModelConfig {
            layers: 1,
            hidden: 32,
            ffn: 48,
            heads: 2,
            kv_heads: 1,
            context: 8,
            vocabulary: 50,
            rope_theta: 10_000.0,
            norm_eps: 1e-5,
            init_std: 0.02,
            norm_init: 1.0,
            initial: None,
        };
        let layout = parameter_layout(&config, 1024);
        let device = CudaDevice::new(recorder.clone()).unwrap();
        (Model::new(&config, &layout, device).unwrap(), layout.flat_elements())
    }

    /// A lane without sequences asks its stream for nothing but zeroes, and whoever adds to them works on another stream: they
    /// are there before the gradient is handed on.
    #[test]
    fn the_zeroes_of_an_empty_lane_are_waited_for() {
        let recorder = RecordingDriver::new();
        let (model, elements) = model(&recorder);
        let device = model.device();
        let mut engine = LaneEngine::new(&model, elements, 1, 1).unwrap();
        // Used once, so that it is zeroed on the lane's own stream.
        engine.recycle([device.alloc(elements, Precision::Full).unwrap()]);
        let weights = device.alloc(elements, Precision::Working).unwrap();
        let range = LaneRange { start: 0, end: 1 };
        let batch = StepBatch::without_sequences(8, range);
        let inputs = LaneInputs {
            device,
            model: &model,
            weights: &weights,
            batch: &batch,
            loss_scale: 1.0,
            squares_of: None,
            abort: &AtomicBool::new(false),
            progress: &Progress::default(),
            digest: |_, _, _| unreachable!("no lane is audited"),
            harm: None,
        };
        drop(recorder.take());
        let results = engine.run(inputs, LaneTree::new(1), range).unwrap();
        assert_eq!(results.nodes.len(), 1);
        let calls = recorder.take();
        let stream = calls.iter().find_map(|call| match call {
            Call::SetBytes(stream, _, 0, bytes) if *bytes == elements * 4 => Some(*stream),
            _ => None,
        });
        let last = calls
            .iter()
            .rev()
            .find(|call| call.is_work() || matches!(call, Call::Synchronize(_)));
        assert_eq!(
            last,
            Some(&Call::Synchronize(stream.expect("zeroed on a stream"))),
            "{calls:?}"
        );
    }
}
