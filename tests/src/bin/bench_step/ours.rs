//! Our side: one rank whose threads take lanes, fold their gradients along the lane tree, clip and update.

use crate::{BenchConfig, Timed};
use anyhow::{Result, anyhow};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tarazed_domain::config::OptimizerConfig;
use tarazed_domain::lanes::{TreeFold, sum_over_lanes};
use tarazed_domain::{BlockIndex, LaneIndex, LaneRange, LaneTree, Node, ParameterLayout};
use tarazed_kernels::{
    AdamwStep, BlockHash, Blocks, CpuBuffer, CpuDevice, CpuStream, Device, OptimizerState, Precision, View, ViewMut,
};
use tarazed_model::{Model, Workspace, initialise, parameter_layout};

/// Seed of the initial weights; any would do.
const SEED: u64 = 1;

/// The state of a run of one rank.
pub struct Ours {
    device: CpuDevice,
    model: Model<CpuDevice>,
    layout: ParameterLayout,
    optimizer: OptimizerConfig,
    tree: LaneTree,
    /// Tokens of one sequence (context + 1), of one micro-batch, of one lane.
    micro_batch_tokens: usize,
    lane_tokens: usize,
    predictions: usize,
    initial: Vec<f32>,
    weights: CpuBuffer,
    master: CpuBuffer,
    first_moment: CpuBuffer,
    second_moment: CpuBuffer,
    stream: CpuStream,
    workspaces: Vec<Workspace<CpuDevice>>,
    pool: Mutex<Vec<CpuBuffer>>,
    steps_completed: u64,
}

/// What the threads of one step share.
struct Lanes {
    next: AtomicU32,
    fold: Mutex<TreeFold<CpuBuffer>>,
    losses: Mutex<Vec<f64>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ours {
    /// Initial weights and memory for `threads` threads.
    pub fn new(config: &BenchConfig, threads: usize) -> Result<Self> {
        let device = CpuDevice::new();
        let layout = parameter_layout(&config.model, config.optimizer.block_elements);
        let model = Model::new(&config.model, &layout, device)?;
        let mut initial = vec![0.0; layout.flat_elements()];
        initialise(&layout, &config.model, SEED, 0..layout.flat_elements(), &mut initial);
        let mut stream = device.stream()?;
        let zeros = |precision| device.alloc(layout.flat_elements(), precision);
        let (mut weights, mut master) = (zeros(Precision::Working)?, zeros(Precision::Full)?);
        let (first_moment, second_moment) = (zeros(Precision::Full)?, zeros(Precision::Full)?);
        device.upload(&mut stream, &initial, ViewMut::from(&mut weights))?;
        device.upload(&mut stream, &initial, ViewMut::from(&mut master))?;
        let micro_batch = config.batch.micro_batch_sequences as usize;
        let workspaces = (0..threads)
            .map(|_| model.workspace(micro_batch))
            .collect::<Result<_, _>>()?;
        let sequence_tokens = config.model.context + 1;
        Ok(Self {
            tree: LaneTree::new(config.batch.lanes),
            micro_batch_tokens: micro_batch * sequence_tokens,
            lane_tokens: config.batch.sequences_per_lane as usize * sequence_tokens,
            predictions: config.sequences() * config.model.context,
            optimizer: config.optimizer.clone(),
            pool: Mutex::default(),
            steps_completed: 0,
            device,
            model,
            layout,
            initial,
            weights,
            master,
            first_moment,
            second_moment,
            stream,
            workspaces,
        })
    }

    /// Where tensors lie in [`Ours::initial`].
    pub const fn layout(&self) -> &ParameterLayout {
        &self.layout
    }

    /// The flat initial weights.
    pub fn initial(&self) -> &[f32] {
        &self.initial
    }

    /// Parameters, padding not counted.
    pub const fn parameter_count(&self) -> usize {
        self.layout.parameter_count()
    }

    /// One update on the global batch `tokens`.
    pub fn step(&mut self, tokens: &[u32]) -> Result<Timed> {
        let (start, cpu) = (Instant::now(), cpu_seconds());
        let (loss, gradient) = self.gradient(tokens)?;
        let gradient_norm = self.update(&gradient)?;
        lock(&self.pool).push(gradient);
        let seconds = start.elapsed().as_secs_f64();
        Ok(Timed {
            seconds,
            cpu_seconds: cpu_seconds() - cpu,
            loss,
            gradient_norm,
            peak_mib: peak_mib(),
        })
    }

    /// Mean token loss of the global batch and its gradient, folded over the lanes.
    fn gradient(&mut self, tokens: &[u32]) -> Result<(f64, CpuBuffer)> {
        let range = LaneRange {
            start: 0,
            end: self.tree.lane_count(),
        };
        let lanes = Lanes {
            next: AtomicU32::new(0),
            fold: Mutex::new(TreeFold::new(self.tree, range)),
            losses: Mutex::new(vec![0.0; range.len()]),
        };
        let mut workspaces = std::mem::take(&mut self.workspaces);
        let outcome: Result<()> = std::thread::scope(|scope| {
            let threads: Vec<_> = workspaces
                .iter_mut()
                .map(|w| scope.spawn(|| self.take_lanes(&lanes, w, tokens)))
                .collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().map_err(|_| anyhow!("a lane's thread panicked"))?)
        });
        self.workspaces = workspaces;
        outcome?;
        let losses = lanes.losses.into_inner().unwrap_or_else(PoisonError::into_inner);
        let loss = sum_over_lanes(self.tree, losses, |left, right| left + right) / self.predictions as f64;
        let mut nodes = lanes
            .fold
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .into_nodes();
        let (_, gradient) = nodes.pop().ok_or_else(|| anyhow!("no lane was folded"))?;
        Ok((loss, gradient))
    }

    fn take_lanes(&self, lanes: &Lanes, workspace: &mut Workspace<CpuDevice>, tokens: &[u32]) -> Result<()> {
        loop {
            let lane = lanes.next.fetch_add(1, Ordering::Relaxed);
            if lane >= self.tree.lane_count() {
                return Ok(());
            }
            let mut gradient = self.zeroed(workspace)?;
            let mut loss = 0.0;
            let samples = &tokens[lane as usize * self.lane_tokens..][..self.lane_tokens];
            for part in samples.chunks(self.micro_batch_tokens) {
                let scale = 1.0 / self.predictions as f32;
                let abort = AtomicBool::new(false);
                let losses =
                    self.model
                        .forward_backward(&self.weights, &mut gradient, workspace, part, scale, &abort)?;
                loss += losses.iter().sum::<f64>();
            }
            lock(&lanes.losses)[lane as usize] = loss;
            self.fold(lanes, workspace, Node::leaf(LaneIndex(lane)), gradient)?;
        }
    }

    fn zeroed(&self, workspace: &mut Workspace<CpuDevice>) -> Result<CpuBuffer> {
        let elements = self.layout.flat_elements();
        let pooled = lock(&self.pool).pop();
        let Some(mut buffer) = pooled else {
            return Ok(self.device.alloc(elements, Precision::Full)?);
        };
        self.device
            .zero(workspace.stream(), ViewMut::from(&mut buffer), elements)?;
        Ok(buffer)
    }

    fn fold(&self, lanes: &Lanes, workspace: &mut Workspace<CpuDevice>, node: Node, gradient: CpuBuffer) -> Result<()> {
        let (mut node, mut value) = (node, gradient);
        loop {
            let offered = lock(&lanes.fold).offer(node, value);
            let Some((mut left, right, parent)) = offered else {
                return Ok(());
            };
            let len = self.device.len(&left);
            self.device
                .fold(workspace.stream(), ViewMut::from(&mut left), View::from(&right), len)?;
            lock(&self.pool).push(right);
            (node, value) = (parent, left);
        }
    }

    /// Clips and updates; returns the norm before clipping.
    fn update(&mut self, gradient: &CpuBuffer) -> Result<f64> {
        let block_elements = self.layout.block_elements();
        let block_count = self.layout.block_count();
        let mut sums = vec![0.0; block_count];
        self.device
            .square_sums(&mut self.stream, View::from(gradient), block_elements, &mut sums)?;
        let gradient_norm = sums.iter().sum::<f64>().sqrt();
        self.steps_completed += 1;
        let decays = |block: &usize| self.layout.block_decays(BlockIndex(*block as u32));
        let decayed = (0..block_count).filter(decays).count();
        for (run, weight_decay) in [(0..decayed, self.optimizer.weight_decay), (decayed..block_count, 0.0)] {
            let offset = run.start * block_elements;
            let call = AdamwStep {
                learning_rate: self.optimizer.learning_rate,
                beta1: self.optimizer.beta1,
                beta2: self.optimizer.beta2,
                eps: self.optimizer.eps,
                weight_decay,
                gradient_scale: (self.optimizer.clip_norm / gradient_norm).min(1.0) as f32,
                step: self.steps_completed,
            };
            let state = OptimizerState {
                master: ViewMut::at(&mut self.master, offset),
                first_moment: ViewMut::at(&mut self.first_moment, offset),
                second_moment: ViewMut::at(&mut self.second_moment, offset),
            };
            let blocks = Blocks {
                first: BlockIndex(run.start as u32),
                block_elements,
            };
            let working = Some(ViewMut::at(&mut self.weights, offset));
            let mut hashes = vec![BlockHash::default(); run.len()];
            let gradient = View::at(gradient, offset);
            self.device
                .adamw(&mut self.stream, &call, blocks, gradient, state, working, &mut hashes)?;
        }
        Ok(gradient_norm)
    }
}

/// Processor time of this process and its threads, in ticks of a hundredth of a second (proc(5), fields 14 and 15).
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks = after_name.split_whitespace().skip(11).take(2);
    ticks.filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Peak resident memory of this process.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .unwrap_or(0)
        / 1024
}
