//! A small run without actors: ranks are threads over a [`LocalMesh`], plans are made as the controller makes them, and a
//! rank can be made to die at any exchange.
#![allow(dead_code, clippy::unwrap_used)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use tarazed_domain::config::Config;
use tarazed_domain::{
    DomainIndex, Generation, Incarnation, LaneTree, OptimizerShardIndex, Rank, StepsCompleted, WorkerId,
};
use tarazed_fabric::{
    AbortHandle, Collective, FabricError, LocalMesh, ProgressCounter, Receive, Send as FabricSend, local_mesh,
};
use tarazed_kernels::CpuDevice;
use tarazed_protocol::commit::{self, Resolution};
use tarazed_protocol::data::cursor::{DataCursor, DomainRecipe, Recipe};
use tarazed_protocol::data::decision::{DataChange, DecisionSchedule};
use tarazed_protocol::message::{BeginPlan, Member, RestoreFrom, RosterEntry, StateReport, StepLine};
use tarazed_protocol::placement::{Placement, ShardHolder, ShardOrigin};
use tarazed_protocol::rollback::Rollbacks;
use tarazed_protocol::sharder;
use tarazed_train::StepError;
use tarazed_train::feeder::{FeedRules, Feeder, SampleSource};
use tarazed_train::generation::{self, Means, Paused, Reporter, ShardSource, ShardToSave, Switches};
use tarazed_train::host::HostVisible;
use tarazed_train::snapshot::UploadTicket;
use tarazed_train::state::RankState;
use tarazed_train::world::World;

/// A few thousand parameters, cut into six shards.
const CONFIG: &str = r#"
[run]
name = "test"
seed = 7
steps = 100
[model]
layers = 1
hidden = 16
ffn = 32
heads = 2
kv_heads = 1
context = 8
vocabulary = 264
init_std = 0.02
[batch]
lanes = 4
sequences_per_lane = 1
micro_batch_sequences = 1
[optimizer]
learning_rate = 1e-2
block_elements = 512
shards = 6
[[data.domains]]
name = "a"
path = "a"
language = "en"
weight = 1.0
[[data.domains]]
name = "b"
path = "b"
language = "en"
weight = 2.0
[evaluation]
interval_steps = 2
sequences_per_domain_max = 2
[checkpoint]
interval_steps = 0
"#;

pub fn config() -> Arc<Config> {
    config_with(&[])
}

/// The same, with these keys set.
pub fn config_with(overrides: &[&str]) -> Arc<Config> {
    let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
    Arc::new(Config::parse(CONFIG, "test", &overrides, Path::new("")).unwrap())
}

pub fn member(worker: u32) -> Member {
    Member {
        worker: WorkerId(worker),
        incarnation: Incarnation(0),
    }
}

/// Tokens that are a function of their place and of the data set: 0 for the one that a run begins with.
struct MadeUpTokens(u64);

impl SampleSource for MadeUpTokens {
    fn held_out_sequences(&self, _domain: DomainIndex) -> u64 {
        3
    }

    fn training(&self, domain: DomainIndex, sequence: u64, out: &mut [u32]) -> Result<(), String> {
        for (index, token) in (0..).zip(out) {
            *token = ((sequence * 31 + index * 7 + u64::from(domain.0) + self.0 * 5) % 264) as u32;
        }
        Ok(())
    }

    fn held_out(&self, domain: DomainIndex, sequence: u64, out: &mut [u32]) -> Result<(), String> {
        self.training(domain, sequence + 1_000, out)
    }

    fn open(&self, change: &DataChange) -> Result<Arc<dyn SampleSource>, String> {
        if change.version == ABSENT {
            return Err(format!("data set {ABSENT} is not there"));
        }
        Ok(Arc::new(Self(1)))
    }
}

/// Version of a data set that cannot be opened.
pub const ABSENT: &str = "0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b";

fn cursor(config: &Config) -> (Recipe, DataCursor) {
    let domain = |domain: &tarazed_domain::config::DomainConfig| DomainRecipe {
        name: domain.name.clone(),
        train_sequences: 500,
        weight: domain.weight,
    };
    let recipe = Recipe {
        seed: config.run.seed,
        domains: config.data.domains.iter().map(domain).collect(),
        batch: config.batch_schedule(),
        data_version: [1; 32],
    };
    let cursor = DataCursor::new(recipe.clone(), DecisionSchedule::of(config)).unwrap();
    (recipe, cursor)
}

/// A feeder with its thread.
pub fn feeder(config: &Config) -> Arc<Feeder> {
    let rules = FeedRules {
        context: config.model.context,
        lane_count: config.batch.lanes,
        evaluation_interval_steps: config.evaluation.interval_steps,
        held_out_sequences_max: config.evaluation.sequences_per_domain_max,
        audit_interval_steps: config.fault.audit_interval_steps,
    };
    let feeder = Feeder::new(cursor(config).1, rules, Arc::new(MadeUpTokens(0)));
    let work = Arc::clone(&feeder);
    std::thread::spawn(move || work.run());
    feeder
}

/// One rank's process, as far as this crate knows it.
pub struct Node<D: HostVisible + Clone = CpuDevice> {
    pub member: Member,
    pub state: RankState<D>,
    /// Of the generation to come.
    pub abort: Arc<AtomicBool>,
    /// Nothing is stored before the line of this step; said on rank 0 alone, so it is for rank 0.
    pub stores_from: StepsCompleted,
    feeder: Arc<Feeder>,
}

impl Node {
    pub fn new(worker: u32) -> Self {
        Self::of(worker, &config())
    }

    /// One that follows this config.
    pub fn of(worker: u32, config: &Arc<Config>) -> Self {
        Self::on_device(worker, config, CpuDevice::new())
    }
}

impl<D: HostVisible + Clone> Node<D> {
    pub fn on(worker: u32, device: D) -> Self {
        Self::on_device(worker, &config(), device)
    }

    fn on_device(worker: u32, config: &Arc<Config>, device: D) -> Self {
        Self {
            member: member(worker),
            state: RankState::new(Arc::clone(config), device, Arc::default()).unwrap(),
            abort: Arc::default(),
            stores_from: StepsCompleted(0),
            feeder: feeder(config),
        }
    }

    /// Runs its part of a generation.
    pub fn run(&mut self, plan: &BeginPlan, fabric: &mut dyn Collective, source: &dyn ShardSource) -> Outcome {
        let config = Arc::clone(&self.state.config);
        let tree = LaneTree::new(config.batch.lanes);
        let world = World::new(plan, self.member, tree, self.state.shard_layout).unwrap();
        let recipe = cursor(&config).0;
        let cursor = DataCursor::restore(recipe, DecisionSchedule::of(&config), plan.decided, &plan.decisions).unwrap();
        self.feeder.begin(cursor, plan, world.rank);
        self.state.abort = Arc::clone(&self.abort);
        let recorder = Recorder {
            device: self.state.device.clone(),
            stores_from: self.stores_from,
            uploads: RefCell::default(),
            said: RefCell::default(),
            saved: RefCell::default(),
        };
        let mut means = Means {
            fabric,
            feeder: &self.feeder,
            source,
            switches: &Switches::default(),
            reporter: &recorder,
        };
        let ended = generation::run(&mut self.state, &world, plan, &mut means);
        Outcome {
            member: self.member,
            ended,
            said: recorder.said.into_inner(),
            saved: recorder.saved.into_inner(),
            report: self.state.report(),
        }
    }
}

impl<D: HostVisible + Clone> Drop for Node<D> {
    fn drop(&mut self) {
        self.feeder.stop();
    }
}

/// What a rank told its actor.
#[derive(Clone, PartialEq, Debug)]
pub enum Said {
    Running(StepsCompleted),
    Line(StepLine),
    Saved(StepsCompleted),
}

/// Master weights and both moments.
pub type Tensors = [Vec<f32>; 3];

/// How a generation went on one rank, and what it holds now.
#[derive(Debug)]
pub struct Outcome {
    pub member: Member,
    pub ended: Result<Paused, StepError>,
    pub said: Vec<Said>,
    pub saved: BTreeMap<OptimizerShardIndex, Tensors>,
    pub report: StateReport,
}

impl Outcome {
    /// Steps whose checkpoint was begun.
    pub fn saved_steps(&self) -> Vec<u64> {
        let saved = self.said.iter().filter_map(|said| match said {
            Said::Saved(step) => Some(step.0),
            _ => None,
        });
        saved.collect()
    }

    pub fn lines(&self) -> impl Iterator<Item = &StepLine> {
        self.said.iter().filter_map(|said| match said {
            Said::Line(line) => Some(line),
            _ => None,
        })
    }
}

struct Recorder<D> {
    device: D,
    stores_from: StepsCompleted,
    /// Uploads that are not done.
    uploads: RefCell<Vec<Arc<UploadTicket>>>,
    said: RefCell<Vec<Said>>,
    saved: RefCell<BTreeMap<OptimizerShardIndex, Tensors>>,
}

impl<D: HostVisible> Reporter<D> for Recorder<D> {
    fn running(&self, base: StepsCompleted) {
        self.said.borrow_mut().push(Said::Running(base));
    }

    fn settled(&self, _: StepsCompleted, _: [u8; 16]) {}

    fn line(&self, line: StepLine) {
        if line.step >= self.stores_from {
            self.uploads.borrow_mut().clear();
        }
        self.said.borrow_mut().push(Said::Line(line));
    }

    fn save(&self, step: StepsCompleted, shards: Vec<ShardToSave<D>>) {
        self.said.borrow_mut().push(Said::Saved(step));
        for save in shards {
            let state = save.state.read().unwrap();
            let buffers = [&state.master, &state.first_moment, &state.second_moment];
            let tensors = self.device.copies(buffers).unwrap().map(|copy| copy.to_vec());
            self.saved.borrow_mut().insert(save.shard, tensors);
            if step < self.stores_from {
                self.uploads.borrow_mut().push(save.upload);
            }
        }
    }
}

/// A store that no plan of the test should ask.
pub struct NoStore;

impl ShardSource for NoStore {
    fn read(&self, from: &RestoreFrom, _: OptimizerShardIndex, _: &AtomicBool) -> Result<Tensors, StepError> {
        panic!("nothing is restored here, least of all {from:?}");
    }
}

/// One checkpoint.
pub struct Checkpoint {
    pub name: RestoreFrom,
    pub shards: BTreeMap<OptimizerShardIndex, Tensors>,
    /// Which shards were read, in order.
    pub read: Mutex<Vec<OptimizerShardIndex>>,
}

impl Checkpoint {
    /// What the ranks of a generation saved at its end.
    pub fn of(step: u64, outcomes: &[Outcome]) -> Self {
        let saved = outcomes.iter().flat_map(|outcome| outcome.saved.clone());
        Self {
            name: RestoreFrom {
                step: StepsCompleted(step),
                manifest_key: format!("manifests/{step}"),
                length: 1,
                blake3: [9; 32],
            },
            shards: saved.collect(),
            read: Mutex::default(),
        }
    }
}

impl ShardSource for Checkpoint {
    fn read(&self, from: &RestoreFrom, shard: OptimizerShardIndex, _: &AtomicBool) -> Result<Tensors, StepError> {
        assert_eq!(from, &self.name, "the checkpoint that the plan names is asked for");
        self.read.lock().unwrap().push(shard);
        Ok(self.shards[&shard].clone())
    }
}

/// What survivors agree on; nothing if a shard has no copy left.
pub fn agreed(reports: &BTreeMap<Member, StateReport>, shard_count: usize) -> Option<Resolution> {
    agreed_after(&Rollbacks::default(), reports, shard_count)
}

/// The same, where these rollbacks have acted.
pub fn agreed_after(
    rollbacks: &Rollbacks,
    reports: &BTreeMap<Member, StateReport>,
    shard_count: usize,
) -> Option<Resolution> {
    match commit::resolve(shard_count, rollbacks, reports) {
        agreed @ Resolution::Continue { .. } => Some(agreed),
        Resolution::Restore { .. } => None,
    }
}

pub fn reports(outcomes: &[Outcome]) -> BTreeMap<Member, StateReport> {
    outcomes.iter().map(|o| (o.member, o.report.clone())).collect()
}

/// What a plan is made from, besides the reports of survivors.
#[derive(Clone, Default)]
pub struct Wanted {
    pub generation: u64,
    pub members: Vec<Member>,
    pub replicas: usize,
    pub last_step: u64,
    pub acknowledged: u64,
    pub restore: Option<RestoreFrom>,
    /// Those that have acted.
    pub rollbacks: Rollbacks,
}

/// A plan, as the membership machine makes it: from what survivors hold, else from a checkpoint or the seed.
pub fn plan(wanted: &Wanted, reports: &BTreeMap<Member, StateReport>) -> BeginPlan {
    let Wanted {
        members,
        replicas,
        restore,
        ..
    } = wanted;
    let shard_count = Node::new(0).state.shard_layout.shard_count();
    let (base, outcome, holders) = match agreed_after(&wanted.rollbacks, reports, shard_count) {
        Some(Resolution::Continue { base, outcome, holders }) => (base, outcome, holders),
        _ => {
            let base = restore.as_ref().map_or(StepsCompleted(0), |from| from.step);
            (base, None, vec![Vec::new(); shard_count])
        }
    };
    let rank_of = |member: &Member| members.iter().position(|m| m == member).map(|rank| Rank(rank as u32));
    let whole: Vec<Vec<Rank>> = holders
        .iter()
        .map(|holders| holders.iter().filter_map(rank_of).collect())
        .collect();
    let map = sharder::assign(shard_count, members.len(), *replicas, &whole);
    let origin = |donors: &[Rank], rank: Rank| match donors.first() {
        Some(_) if donors.contains(&rank) => ShardOrigin::Keep,
        Some(&donor) => ShardOrigin::CopyFrom(donor),
        None if restore.is_some() => ShardOrigin::Restore,
        None => ShardOrigin::Initialise,
    };
    let shards = map.all().iter().zip(&whole).flat_map(|(holders, donors)| {
        let holder = |&rank: &Rank| ShardHolder {
            rank,
            origin: origin(donors, rank),
        };
        holders.iter().map(holder)
    });
    let lanes = LaneTree::new(config().batch.lanes).assign(&vec![1; members.len()]);
    let roster = members
        .iter()
        .zip(lanes)
        .map(|(&member, lanes)| RosterEntry { member, lanes });
    BeginPlan {
        generation: Generation(wanted.generation),
        roster: roster.collect(),
        addresses: members.iter().map(|_| "").collect(),
        base,
        outcome,
        shards: Placement::new(map.all()[0].len(), shards.collect()),
        restore: restore.clone(),
        acknowledged: StepsCompleted(wanted.acknowledged),
        decisions: Vec::new(),
        decided: base,
        rollbacks: wanted.rollbacks.clone(),
        last_step: StepsCompleted(wanted.last_step),
        checkpoint_at_base: false,
        checkpointed: StepsCompleted(0),
        state: None,
        disputed: None,
    }
}

/// Meshes for a generation in which nobody dies.
pub fn meshes(plan: &BeginPlan) -> Vec<Mortal> {
    local_mesh(plan.roster.len(), plan.generation)
        .into_iter()
        .map(|mesh| Mortal::new(mesh, usize::MAX))
        .collect()
}

/// Runs one generation with one thread for each node, in the order of the roster. All meshes stay open to its end, as
/// those of living ranks do.
pub fn run<D: HostVisible + Clone, M: Collective>(
    nodes: &mut [Node<D>],
    plan: &BeginPlan,
    meshes: &mut [M],
    source: &dyn ShardSource,
) -> Vec<Outcome> {
    assert_eq!(nodes.len(), plan.roster.len(), "one node for each rank");
    std::thread::scope(|scope| {
        let threads: Vec<_> = nodes
            .iter_mut()
            .zip(meshes)
            .map(|(node, mesh)| scope.spawn(move || node.run(plan, mesh, source)))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A mesh whose rank dies at a chosen exchange.
pub struct Mortal {
    mesh: Option<LocalMesh>,
    exchanges_left: usize,
    rank: Rank,
    world_size: usize,
    generation: Generation,
    abort: AbortHandle,
    progress: Arc<ProgressCounter>,
}

impl Mortal {
    pub fn new(mesh: LocalMesh, exchanges_left: usize) -> Self {
        Self {
            exchanges_left,
            rank: mesh.rank(),
            world_size: mesh.world_size(),
            generation: mesh.generation(),
            abort: mesh.abort_handle(),
            progress: mesh.progress(),
            mesh: Some(mesh),
        }
    }

    pub fn die_at(&mut self, exchange: usize) {
        self.exchanges_left = exchange;
    }

    pub fn is_dead(&self) -> bool {
        self.mesh.is_none()
    }
}

impl Collective for Mortal {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn generation(&self) -> Generation {
        self.generation
    }

    fn exchange(&mut self, sends: &[FabricSend<'_>], receives: &mut [Receive<'_>]) -> Result<(), FabricError> {
        if self.exchanges_left == 0 {
            self.mesh = None;
        }
        let Some(mesh) = &mut self.mesh else {
            return Err(FabricError::PeerLost {
                peer: self.rank,
                cause: "this rank is dead".to_owned(),
            });
        };
        self.exchanges_left -= 1;
        mesh.exchange(sends, receives)
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    fn progress(&self) -> Arc<ProgressCounter> {
        Arc::clone(&self.progress)
    }

    fn leave(&mut self) {
        if let Some(mesh) = &mut self.mesh {
            mesh.leave();
        }
    }
}
