//! The controller's tree of actors, without its edges: the same one stands between real processes and in a simulation.
//!
//! The edges are what touches the world outside: the way to the ranks, the processes, the trace's file. They come with
//! [`Tree::begin`], and what happens out there is told to the [`Ear`].

use super::appender::{Appended, JsonLines, TraceSink, heads_from};
use super::checkpointer::{Checkpointer, CheckpointerArguments, CheckpointerMessage, Claimed, ManifestFacts};
use super::coordinator::{CoordinatorActor, CoordinatorArguments, CoordinatorMessage, Peers};
use super::loops::{Loop, LoopMember, LoopMessage, LoopRules, RequestAnswer};
use super::observatory::{Ending, Observatory, ObservatoryArguments, ObservatoryMessage};
use super::root::{Adopt, End, Root, RootMessage, RootState};
use super::sharder::{OptimizerSharder, SharderMessage};
use super::{Notify, RunError, TraceHeads};
use crate::link::{HubEvent, ToRanks};
use crate::node::{NodeEvent, Processes};
use crate::run_folder::{RecalledWeights, RunPaths, recall_weights};
use ractor::{Actor, ActorCell, ActorRef, rpc::CallResult};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tarazed_domain::config::{ClusterConfig, Config};
use tarazed_domain::limits::UNACKNOWLEDGED_LINES_MAX;
use tarazed_domain::{LaneTree, StepsCompleted};
use tarazed_protocol::checkpoint::CheckpointTracker;
use tarazed_protocol::coordinator::{Coordinator as Machine, Options, PastLife};
use tarazed_protocol::data::controller::Request;
use tarazed_protocol::data::signals::Signals;
use tarazed_protocol::data::weight_log::WeightLog;
use tarazed_protocol::ledger::Ledger;
use tarazed_protocol::schedule::CheckpointSchedule;
use tarazed_protocol::trace::TraceLine;
use tarazed_store::Retention;
use tokio::sync::oneshot;
use tokio::time::MissedTickBehavior;

/// Between ticks of the coordinator's machine; a fraction of every timeout.
pub const TICK: Duration = Duration::from_millis(20);

/// What a tree is made of.
pub struct TreeParts {
    /// The resolved config.
    pub config: Arc<Config>,
    /// The run ends with this count.
    pub last_step: StepsCompleted,
    /// The committed trace so far.
    pub lines: Vec<TraceLine>,
    /// Where the trace lies, to be read again after a restore.
    pub paths: RunPaths,
    /// The store, claimed.
    pub claimed: Claimed,
    /// What every manifest says.
    pub facts: ManifestFacts,
    /// What the closed loop is made from.
    pub rules: LoopRules,
    /// Measurements.
    pub metrics: JsonLines,
    /// Incidents.
    pub events: JsonLines,
    /// What people see.
    pub notify: Notify,
}

/// The way to the world outside.
pub struct Edges {
    /// The ranks.
    pub ranks: Box<dyn ToRanks>,
    /// Their processes.
    pub processes: Box<dyn Processes>,
    /// The trace.
    pub trace: Box<dyn TraceSink>,
    /// What an earlier controller left behind.
    pub past: Past,
}

/// What an earlier controller of the same run left behind.
#[derive(Default)]
pub struct Past {
    /// The newest life of each worker that it started.
    pub lives: Vec<PastLife>,
    /// Heads of the trace's last lines, for a checkpoint of what living ranks hold.
    pub heads: TraceHeads,
}

impl Past {
    /// Of these lives, over the trace in `path`.
    ///
    /// # Errors
    /// If the trace cannot be read.
    pub fn new(lives: Vec<PastLife>, path: &Path, lines: &[TraceLine]) -> std::io::Result<Self> {
        let written = lines.last().map_or(0, |line| line.step.0);
        // A rank stands nowhere before these: it waits where it has more lines than that.
        let base = StepsCompleted(written.saturating_sub(UNACKNOWLEDGED_LINES_MAX as u64));
        let heads = match lives.iter().any(|life| life.lives) {
            true => heads_from(path, base, lines)?,
            false => TraceHeads::new(),
        };
        Ok(Self { lives, heads })
    }
}

/// What happens outside is told to it; telling never waits. Clones tell the same controller.
#[derive(Clone)]
pub struct Ear(pub(super) ActorRef<CoordinatorMessage>);

impl Ear {
    /// From the link to the ranks.
    pub fn hub(&self, event: HubEvent) {
        self.tell(CoordinatorMessage::Hub(event));
    }

    /// From the node agent.
    pub fn node(&self, event: NodeEvent) {
        self.tell(CoordinatorMessage::Node(event));
    }

    /// From the trace's writer.
    pub fn appended(&self, appended: Appended) {
        self.tell(CoordinatorMessage::Appended(appended));
    }

    /// The world is to have this many ranks.
    pub fn resize(&self, ranks: u32) {
        self.tell(CoordinatorMessage::Resize(ranks));
    }

    /// Another controller has taken over: this one ends and leaves everything to it.
    pub fn deposed(&self) {
        self.tell(CoordinatorMessage::Deposed);
    }

    /// Somebody asks for a last checkpoint and the end.
    pub fn stop(&self) {
        self.tell(CoordinatorMessage::Stop);
    }

    /// A person asks for a decision (LOOP-2): the line that will hold it and the step from which it acts, or why it is
    /// refused. None where nobody answers in time: the controller starts or ends, or its loop is made again.
    pub async fn ask(&self, request: Box<Request>, patience: Duration) -> Option<RequestAnswer> {
        let asked = self
            .0
            .call(|reply| CoordinatorMessage::Ask(request, reply), Some(patience));
        match asked.await {
            Ok(CallResult::Success(answer)) => Some(answer),
            _ => None,
        }
    }

    /// Time has passed. A process that stands still hears of none, so that a long time between two is its own absence.
    pub fn tick(&self) {
        self.tell(CoordinatorMessage::Tick);
    }

    /// Lets time pass, for ever.
    pub async fn pass_time(self) {
        let mut timer = tokio::time::interval(TICK);
        // What was missed is one absence.
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            timer.tick().await;
            self.tick();
        }
    }

    fn tell(&self, message: CoordinatorMessage) {
        // An error means that the run ends.
        let _ = self.0.cast(message);
    }
}

/// A tree that stands and has not begun.
pub struct Tree {
    root: ActorRef<RootMessage>,
    pub(super) coordinator: ActorRef<CoordinatorMessage>,
    observatory: ActorRef<ObservatoryMessage>,
    checkpointer: ActorRef<CheckpointerMessage>,
    pub(super) sharder: ActorRef<SharderMessage>,
    entry: ActorRef<LoopMessage>,
    signals: Option<Arc<Signals>>,
    weights_bytes: u64,
    end: oneshot::Receiver<End>,
}

/// A tree that runs.
pub struct Begun {
    root: ActorRef<RootMessage>,
    coordinator: ActorRef<CoordinatorMessage>,
    end: oneshot::Receiver<End>,
}

/// Ends members of a controller's closed loop, as a mistake of their own would.
#[derive(Clone)]
pub struct LoopHarm(ActorCell);

impl LoopHarm {
    /// Ends one; false where it is not there: the loop is being made again, or the tree is gone.
    pub fn kill(&self, member: LoopMember) -> bool {
        self.member(member).inspect(ActorCell::kill).is_some()
    }

    pub(super) fn member(&self, member: LoopMember) -> Option<ActorCell> {
        member.of(&self.0)
    }
}

impl Tree {
    /// Starts all actors but those of the edges.
    ///
    /// # Errors
    /// A [`RunError`] if one cannot be started, or the trace does not fit the closed loop.
    pub async fn start(parts: TreeParts) -> Result<Self, RunError> {
        let actors = |e: ractor::SpawnErr| RunError::actors(&e);
        let (machine, ledger, tracker) = machines(&parts);
        let (weights, weights_bytes) = weight_log(&parts)?;
        let TreeParts {
            config, lines, rules, ..
        } = parts;
        let (end_sender, end) = oneshot::channel();
        let state = RootState::new(end_sender, config.fault.restarts_max, parts.paths.clone());
        let (root, _) = Actor::spawn(None, Root, state).await.map_err(actors)?;
        let parent = root.get_cell();
        let coordinator_arguments = CoordinatorArguments {
            machine,
            ledger,
            weights,
            tracker,
            root: root.clone(),
            schedule: CheckpointSchedule::new(config.checkpoint.interval, config.cluster.ranks),
        };
        let (coordinator, _) = Actor::spawn_linked(None, CoordinatorActor, coordinator_arguments, parent.clone())
            .await
            .map_err(actors)?;
        let stop = rules.config.policy.stop.tokens;
        let mut ending = Ending {
            last_step: parts.last_step,
            stop_at: stop.map(|tokens| rules.config.step_after_tokens(tokens)),
            decisions: Vec::new(),
        };
        lines.iter().for_each(|line| ending.hear(&line.decisions));
        let observatory_arguments = ObservatoryArguments {
            metrics: parts.metrics,
            events: parts.events,
            notify: Arc::clone(&parts.notify),
            batch: config.batch_schedule(),
            context_tokens: config.model.context as u64,
            peak: crate::rank::peak(&config),
            model: config.model.clone(),
            ending,
        };
        let (observatory, _) = Actor::spawn_linked(None, Observatory, observatory_arguments, parent.clone())
            .await
            .map_err(actors)?;
        let checkpointer_arguments = CheckpointerArguments {
            claimed: parts.claimed,
            trace: parts.paths.trace(),
            facts: parts.facts,
            retention: Retention {
                last: config.checkpoint.keep_last,
                every_steps: config.checkpoint.keep_every_steps,
                back_to: None,
            },
            reach_steps: tarazed_protocol::rollback::reach_steps(&config),
            coordinator: coordinator.clone(),
        };
        let (checkpointer, _) = Actor::spawn_linked(None, Checkpointer, checkpointer_arguments, parent.clone())
            .await
            .map_err(actors)?;
        let copies = config.optimizer.replicas.min(config.cluster.ranks) as usize;
        let (sharder, _) = Actor::spawn_linked(None, OptimizerSharder, (copies, parts.notify), parent.clone())
            .await
            .map_err(actors)?;
        let closed_loop = Loop::start(&rules, &lines, coordinator.clone(), parent)
            .await
            .map_err(RunError::Refused)?;
        let (entry, signals) = (closed_loop.entry.clone(), closed_loop.signals.clone());
        let adopt = Adopt {
            coordinator: coordinator.clone(),
            closed_loop,
            rules,
        };
        // A death before the root knows the loop would end the run.
        let adopted = root.call(|reply| RootMessage::Adopt(Box::new(adopt), reply), None);
        if !matches!(adopted.await, Ok(CallResult::Success(()))) {
            return Err(RunError::Refused(
                "an actor ended before the run began; report this as a bug".to_owned(),
            ));
        }
        Ok(Self {
            root,
            coordinator,
            observatory,
            checkpointer,
            sharder,
            entry,
            signals,
            weights_bytes,
            end,
        })
    }

    /// Who becomes the parent of the edges' actors (SUP-1).
    #[must_use]
    pub fn parent(&self) -> ActorCell {
        self.root.get_cell()
    }

    /// Where to tell what happens outside.
    #[must_use]
    pub fn ear(&self) -> Ear {
        Ear(self.coordinator.clone())
    }

    /// Bytes of `weights.jsonl` that are committed.
    #[must_use]
    pub const fn weights_bytes(&self) -> u64 {
        self.weights_bytes
    }

    /// Everybody is there: the run begins.
    #[must_use]
    pub fn begin(self, edges: Edges) -> Begun {
        let peers = Peers {
            hub: edges.ranks,
            node: edges.processes,
            observatory: self.observatory,
            checkpointer: self.checkpointer,
            sharder: self.sharder,
            entry: self.entry,
            signals: self.signals,
            trace: edges.trace,
            past: edges.past,
        };
        // An error means that the coordinator died already, which the root says.
        let _ = self.coordinator.cast(CoordinatorMessage::Begin(Box::new(peers)));
        Begun {
            root: self.root,
            coordinator: self.coordinator,
            end: self.end,
        }
    }
}

impl Begun {
    /// Waits until the run ends.
    pub async fn end(&mut self) -> End {
        (&mut self.end).await.unwrap_or_else(|_| End {
            code: 3,
            diagnosis: "the root actor ended without a word; report this as a bug".to_owned(),
        })
    }

    /// Ends the tree in order: its node agent kills and reaps what is left of the ranks.
    pub async fn close(self) {
        let patience = Some(Duration::from_secs(10));
        if self.coordinator.stop_and_wait(None, patience).await.is_err() {
            tracing::warn!("the coordinator did not stop in time");
        }
        self.root.stop(None);
    }

    /// A way to end members of its closed loop.
    #[must_use]
    pub fn loop_harm(&self) -> LoopHarm {
        LoopHarm(self.root.get_cell())
    }

    /// Ends it as a crash would: nothing more is handled.
    pub fn kill(&self) {
        self.coordinator.kill();
        self.root.kill();
    }
}

/// The node of each worker that there may ever be, by its number.
fn hosts(cluster: &ClusterConfig) -> Vec<u32> {
    let nodes = cluster.nodes.iter().zip(0..);
    nodes
        .flat_map(|(node, index)| std::iter::repeat_n(index, node.slots as usize))
        .collect()
}

/// The pure machines of a run whose trace so far is known.
fn machines(parts: &TreeParts) -> (Machine, Ledger, CheckpointTracker) {
    let config = &parts.config;
    let written = parts.lines.last().map_or(StepsCompleted(0), |line| line.step);
    let shard_count = parts.facts.shards.shard_count();
    let options = Options {
        ranks: config.cluster.ranks,
        spares: config.cluster.spares,
        lanes: LaneTree::new(config.batch.lanes),
        shard_count,
        replicas: config.optimizer.replicas as usize,
        timeouts: config.timeouts(),
        restarts_max: config.fault.restarts_max,
        restart_backoff_ms: config.fault.restart_backoff_ms,
        last_step: parts.last_step,
        hosts: hosts(&config.cluster),
    };
    let machine = Machine::new(options, parts.claimed.fence.generation, written);
    let names = config.data.domains.iter().map(|domain| domain.name.clone()).collect();
    let ledger = Ledger::new(
        names,
        config.batch_schedule(),
        config.model.context as u64,
        parts.lines.clone(),
    );
    (machine, ledger, CheckpointTracker::new(shard_count, written))
}

/// The weight trajectory of a run whose trace so far is known, and how many bytes of its file are committed.
fn weight_log(parts: &TreeParts) -> Result<(WeightLog, u64), RunError> {
    let config = &parts.config;
    let written = parts.lines.last().map_or(StepsCompleted(0), |line| line.step);
    let RecalledWeights { last, bytes } = recall_weights(&parts.paths.weights(), written)?;
    let layout = tarazed_model::parameter_layout(&config.model, config.optimizer.block_elements);
    let log = WeightLog::new(layout, config.batch_schedule(), config.model.context as u64, last);
    Ok((log, bytes))
}
