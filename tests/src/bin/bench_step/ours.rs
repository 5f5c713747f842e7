//! Our side: the step that training runs, `tarazed_train::step::run_step`, on one rank.
//!
//! The rank is begun as the device thread begins one: a plan that initialises every optimizer shard, a world of one, a
//! mesh to nobody. Feeding lies outside the clock, as it does in a run, where the feeder is steps ahead.

use crate::{BenchConfig, Timed};
use anyhow::{Context, Result, ensure};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use tarazed_domain::config::{Config, LearningRateSchedule};
use tarazed_domain::{
    DomainIndex, Generation, Incarnation, LaneRange, LaneTree, OptimizerShardIndex, ParameterLayout, Rank, StepIndex,
    StepsCompleted, WorkerId,
};
use tarazed_fabric::{LocalMesh, local_mesh};
use tarazed_kernels::CpuDevice;
use tarazed_protocol::data::cursor::{DataCursor, DomainRecipe, Recipe};
use tarazed_protocol::data::decision::DecisionSchedule;
use tarazed_protocol::message::{Addresses, BeginPlan, Member, RestoreFrom, RosterEntry, StepLine};
use tarazed_protocol::placement::{Placement, ShardHolder, ShardOrigin};
use tarazed_protocol::rollback::Rollbacks;
use tarazed_train::StepError;
use tarazed_train::barrier::Wishes;
use tarazed_train::feeder::{FeedRules, Feeder, SampleSource, StepBatch};
use tarazed_train::generation::{self, Means, Reporter, ShardSource, ShardToSave, Switches};
use tarazed_train::state::RankState;
use tarazed_train::step::run_step;
use tarazed_train::waiting::Waiting;
use tarazed_train::world::World;

/// Seed of the initial weights; any would do.
const SEED: u64 = 1;
const GENERATION: Generation = Generation(1);

/// One rank, begun.
pub struct Ours {
    state: RankState<CpuDevice>,
    world: World,
    fabric: LocalMesh,
    batches: Vec<StepBatch>,
    initial: Vec<f32>,
    steps_completed: StepsCompleted,
}

impl Ours {
    /// A rank of `threads` threads with initial weights, and `tokens`, one global batch each, as it is fed them.
    pub fn new(bench: &BenchConfig, threads: usize, tokens: &[Vec<u32>]) -> Result<Self> {
        let config = Arc::new(whole_config(bench, threads)?);
        let tree = LaneTree::new(config.batch.lanes);
        let lanes = LaneRange {
            start: 0,
            end: tree.lane_count(),
        };
        let mut state = RankState::new(Arc::clone(&config), CpuDevice::new(), Arc::default())?;
        let plan = plan(lanes, state.shard_layout.shard_count());
        let world = World::new(&plan, member(), tree, state.shard_layout).context("a world without its only rank")?;
        let mut fabric = local_mesh(1, GENERATION)
            .pop()
            .context("a mesh without its only rank")?;
        let feeder = feeder(&config, tokens)?;
        let mut means = Means {
            fabric: &mut fabric,
            feeder: &feeder,
            source: &Nothing,
            switches: &Switches::default(),
            reporter: &Nothing,
        };
        generation::run(&mut state, &world, &plan, &mut means)?;
        let count = tokens.len() as u64;
        feeder.begin(
            cursor(&config, count)?,
            &BeginPlan {
                last_step: StepsCompleted(count),
                ..plan
            },
            Rank(0),
        );
        let batches = (0..count).map(|step| feeder.next(StepIndex(step), &AtomicBool::new(false)));
        Ok(Self {
            batches: batches
                .map(|batch| batch?.context("the run ends early"))
                .collect::<Result<_>>()?,
            initial: state.weights.to_vec(),
            steps_completed: StepsCompleted(0),
            state,
            world,
            fabric,
        })
    }

    /// Where tensors lie in [`Ours::initial`].
    pub const fn layout(&self) -> &ParameterLayout {
        &self.state.layout
    }

    /// The flat initial weights.
    pub fn initial(&self) -> &[f32] {
        &self.initial
    }

    /// Parameters, padding not counted.
    pub const fn parameter_count(&self) -> usize {
        self.state.layout.parameter_count()
    }

    /// One update on the global batch of that index.
    pub fn step(&mut self, batch: usize) -> Result<Timed> {
        let mut batch = self.batches[batch].clone();
        batch.step = self.steps_completed.next();
        let (start, cpu) = (Instant::now(), cpu_seconds());
        let line = run_step(
            &mut self.state,
            &self.world,
            &mut self.fabric,
            &batch,
            Wishes::default(),
        )?;
        let (seconds, cpu_seconds) = (start.elapsed().as_secs_f64(), cpu_seconds() - cpu);
        self.steps_completed = line.step;
        self.state.acknowledge(line.step);
        Ok(Timed {
            seconds,
            cpu_seconds,
            loss: line.loss,
            gradient_norm: line.grad_norm,
            peak_mib: peak_mib(),
        })
    }
}

/// The sections measured, in a config of one rank whose learning rate stays level, as PyTorch's does.
fn whole_config(bench: &BenchConfig, threads: usize) -> Result<Config> {
    let mut config: toml::Table = toml::from_str(&format!(
        "[run]\nname = \"bench\"\nseed = {SEED}\nsteps = 1\n\
         [[data.domains]]\nname = \"tokens\"\npath = \"tokens\"\nlanguage = \"en\"\nweight = 1.0\n\
         [data.tokenizer]\nvocabulary = {}\n\
         [evaluation]\ninterval_steps = 0\n\
         [checkpoint]\ninterval_steps = 0\n\
         [cluster]\nranks = 1\nthreads_per_rank = {threads}\n",
        bench.model.vocabulary
    ))?;
    let mut optimizer = bench.optimizer.clone();
    optimizer.schedule = LearningRateSchedule::Constant { warmup_steps: 0 };
    optimizer.replicas = 1;
    config.insert("model".to_owned(), toml::Value::try_from(&bench.model)?);
    config.insert("batch".to_owned(), toml::Value::try_from(&bench.batch)?);
    config.insert("optimizer".to_owned(), toml::Value::try_from(&optimizer)?);
    Ok(Config::parse(&config.to_string(), "bench", &[], Path::new(""))?)
}

const fn member() -> Member {
    Member {
        worker: WorkerId(0),
        incarnation: Incarnation(0),
    }
}

/// A generation of one rank that holds everything, begun from the seed.
fn plan(lanes: LaneRange, shard_count: usize) -> BeginPlan {
    let holder = ShardHolder {
        rank: Rank(0),
        origin: ShardOrigin::Initialise,
    };
    BeginPlan {
        generation: GENERATION,
        roster: vec![RosterEntry {
            member: member(),
            lanes,
        }],
        addresses: Addresses::from_iter([""]),
        base: StepsCompleted(0),
        outcome: None,
        shards: Placement::same(shard_count, &[holder]),
        restore: None,
        acknowledged: StepsCompleted(0),
        decisions: Vec::new(),
        decided: StepsCompleted(0),
        rollbacks: Rollbacks::default(),
        last_step: StepsCompleted(0),
        checkpoint_at_base: false,
        checkpointed: StepsCompleted(0),
        state: None,
        disputed: None,
    }
}

/// One domain whose only epoch is the batches.
fn cursor(config: &Config, batches: u64) -> Result<DataCursor> {
    let sequences_per_step = config.batch.lanes * config.batch.sequences_per_lane;
    let recipe = Recipe {
        seed: SEED,
        domains: vec![DomainRecipe {
            name: "tokens".to_owned(),
            train_sequences: u64::from(sequences_per_step) * batches,
            weight: 1.0,
        }],
        batch: config.batch_schedule(),
        data_version: [0; 32],
    };
    Ok(DataCursor::new(recipe, DecisionSchedule::of(config))?)
}

/// A feeder whose source undoes the shuffle: batch `b` is `tokens[b]`, in order.
fn feeder(config: &Config, tokens: &[Vec<u32>]) -> Result<Arc<Feeder>> {
    let context = config.model.context;
    let mut shuffled = cursor(config, tokens.len() as u64)?;
    let mut sequences = HashMap::new();
    for (step, batch) in (0..).zip(tokens) {
        let samples = shuffled.plan(StepIndex(step))?.samples;
        ensure!(
            samples.len() * (context + 1) == batch.len(),
            "a batch is not the global batch"
        );
        for (sample, tokens) in samples.iter().zip(batch.chunks(context + 1)) {
            sequences.insert(sample.sequence, tokens.to_vec());
        }
    }
    let rules = FeedRules {
        context,
        lane_count: config.batch.lanes,
        evaluation_interval_steps: 0,
        held_out_sequences_max: 0,
        audit_interval_steps: 0,
    };
    // On this thread: there is nothing to be ahead of.
    let alone = Waiting::GivingWay(Arc::new(|| ()));
    Ok(Feeder::with_waiting(
        shuffled,
        rules,
        Arc::new(Tokens(sequences)),
        alone,
    ))
}

struct Tokens(HashMap<u64, Vec<u32>>);

impl SampleSource for Tokens {
    fn held_out_sequences(&self, _: DomainIndex) -> u64 {
        0
    }

    fn training(&self, _: DomainIndex, sequence: u64, out: &mut [u32]) -> Result<(), String> {
        let tokens = self.0.get(&sequence).ok_or_else(|| format!("no sequence {sequence}"))?;
        out.copy_from_slice(tokens);
        Ok(())
    }

    fn held_out(&self, _: DomainIndex, sequence: u64, _: &mut [u32]) -> Result<(), String> {
        Err(format!("no held-out sequence {sequence}"))
    }
}

/// No store, and nobody to report to.
struct Nothing;

impl ShardSource for Nothing {
    fn read(&self, from: &RestoreFrom, _: OptimizerShardIndex, _: &AtomicBool) -> Result<[Vec<f32>; 3], StepError> {
        Err(StepError::Data(format!("{from:?}: there is no store")))
    }
}

impl Reporter<CpuDevice> for Nothing {
    fn running(&self, _: StepsCompleted) {}
    fn settled(&self, _: StepsCompleted, _: [u8; 16]) {}
    fn line(&self, _: StepLine) {}
    fn save(&self, _: StepsCompleted, _: Vec<ShardToSave<CpuDevice>>) {}
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
