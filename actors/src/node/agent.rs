//! The agent's actor: a roster of lives, and their reports passed on in order.

use super::rank_process::{LifeMessage, RankProcess};
use super::{Exit, ExitCause, LaunchSpec, NodeCommand, NodeError, NodeEvent, StartError};
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tarazed_domain::{Incarnation, WorkerId};

/// Longer than one rank's own limit for its stop, so that no rank is left to the reaper threads.
const STOP_LIMIT: Duration = Duration::from_secs(6);

/// The node agent's handle. Dropping it ends the agent and kills its processes, without waiting for them.
pub struct NodeAgent {
    pub(super) actor: ActorRef<NodeMessage>,
    refused: Arc<AtomicU64>,
}

pub(super) enum NodeMessage {
    Command(NodeCommand),
    Started {
        worker: WorkerId,
        incarnation: Incarnation,
        pid: u32,
    },
    Ending {
        worker: WorkerId,
        incarnation: Incarnation,
        killed: Option<String>,
    },
    Exited {
        worker: WorkerId,
        incarnation: Incarnation,
        exit: Exit,
    },
    StartFailed {
        worker: WorkerId,
        incarnation: Incarnation,
        error: StartError,
    },
    /// A child's actor is over. Supervision events overtake messages, so this goes the messages' way, behind the
    /// child's own last report.
    ChildEnded {
        child: ActorId,
        cause: String,
    },
}
impl ractor::Message for NodeMessage {}

/// Starts the agent. `events` is called from its actor, in order, and must not block: it should post a message.
/// `supervisor` becomes its parent (SUP-1).
///
/// # Errors
/// If the actor system refuses to start it.
pub async fn start_node_agent(
    spec: LaunchSpec,
    supervisor: Option<ActorCell>,
    events: impl Fn(NodeEvent) + Send + Sync + 'static,
) -> Result<NodeAgent, NodeError> {
    let refused = Arc::new(AtomicU64::new(0));
    let agent = Agent {
        spec: Arc::new(spec),
        events: Box::new(events),
        refused: Arc::clone(&refused),
    };
    let spawned = match supervisor {
        Some(parent) => Actor::spawn_linked(None, agent, (), parent).await,
        None => Actor::spawn(None, agent, ()).await,
    };
    let (actor, _) = spawned.map_err(|e| NodeError(format!("could not start: {e}")))?;
    Ok(NodeAgent { actor, refused })
}

impl NodeAgent {
    /// Queues a command; never waits.
    ///
    /// # Errors
    /// If the agent has ended.
    pub fn command(&self, command: NodeCommand) -> Result<(), NodeError> {
        self.actor
            .cast(NodeMessage::Command(command))
            .map_err(|_| NodeError("has ended".to_owned()))
    }

    /// Commands refused as stale or doubled (SUP-2).
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Kills all processes and waits until they are reaped. No event follows.
    pub async fn stop(self) {
        // An error means that it is gone already.
        let _ = self.actor.stop_and_wait(None, Some(STOP_LIMIT * 2)).await;
    }
}

impl Drop for NodeAgent {
    fn drop(&mut self) {
        self.actor.stop(None);
    }
}

struct Agent {
    spec: Arc<LaunchSpec>,
    events: Box<dyn Fn(NodeEvent) + Send + Sync>,
    refused: Arc<AtomicU64>,
}

struct Life {
    actor: ActorRef<LifeMessage>,
    started: bool,
}

#[derive(Default)]
struct Worker {
    /// The newest life ever commanded.
    newest: Option<Incarnation>,
    life: Option<Life>,
}

#[derive(Default)]
struct AgentState {
    workers: BTreeMap<WorkerId, Worker>,
    stopping_all: bool,
}

impl AgentState {
    fn life(&self, worker: WorkerId, incarnation: Incarnation) -> Option<&Life> {
        let slot = self.workers.get(&worker)?;
        slot.life.as_ref().filter(|_| slot.newest == Some(incarnation))
    }
}

impl Agent {
    async fn start(
        &self,
        myself: &ActorRef<NodeMessage>,
        state: &mut AgentState,
        (worker, incarnation, after): (WorkerId, Incarnation, Duration),
        adopted: bool,
    ) {
        let slot = state.workers.entry(worker).or_default();
        let error = match slot.newest {
            Some(newest) if incarnation <= newest => Some(format!("incarnation {newest} was started before")),
            Some(newest) if slot.life.is_some() => Some(format!("incarnation {newest} still lives")),
            _ => None,
        };
        if let Some(error) = error {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return (self.events)(NodeEvent::StartFailed {
                worker,
                incarnation,
                error: StartError::Refused(error),
            });
        }
        let process = RankProcess {
            worker,
            incarnation,
            spec: Arc::clone(&self.spec),
            agent: myself.clone(),
            adopted,
        };
        slot.newest = Some(incarnation);
        match Actor::spawn_linked(None, process, after, myself.get_cell()).await {
            Ok((actor, _)) => slot.life = Some(Life { actor, started: false }),
            Err(error) => (self.events)(NodeEvent::StartFailed {
                worker,
                incarnation,
                error: StartError::Unsupervised(error.to_string()),
            }),
        }
    }

    fn kill(&self, state: &AgentState, worker: WorkerId, incarnation: Incarnation, reason: String) {
        match state.life(worker, incarnation) {
            // If the actor is just ending, its report is on the way.
            Some(life) => drop(life.actor.cast(LifeMessage::Kill(reason))),
            None => drop(self.refused.fetch_add(1, Ordering::Relaxed)),
        }
    }

    fn let_go(&self, state: &mut AgentState) {
        // Without a life there is nothing to report.
        for life in state.workers.values_mut().filter_map(|worker| worker.life.take()) {
            let _ = life.actor.cast(LifeMessage::LetGo);
        }
    }

    fn stop_all(&self, state: &mut AgentState) {
        state.stopping_all = true;
        for life in state.workers.values().filter_map(|worker| worker.life.as_ref()) {
            let _ = life
                .actor
                .cast(LifeMessage::Kill("all ranks were told to stop".to_owned()));
        }
        self.all_stopped(state);
    }

    fn all_stopped(&self, state: &mut AgentState) {
        if state.stopping_all && state.workers.values().all(|worker| worker.life.is_none()) {
            state.stopping_all = false;
            (self.events)(NodeEvent::AllStopped);
        }
    }

    /// Passes a life's last report on, once (NODE-1).
    fn over(&self, state: &mut AgentState, worker: WorkerId, incarnation: Incarnation, event: NodeEvent) {
        if state.life(worker, incarnation).is_none() {
            return;
        }
        if let Some(slot) = state.workers.get_mut(&worker) {
            slot.life = None;
        }
        (self.events)(event);
        self.all_stopped(state);
    }

    /// SUP-1: an actor that ends without its last report is an exit of its own kind.
    fn child_ended(&self, state: &mut AgentState, id: ActorId, cause: String) {
        let found = state.workers.iter().find_map(|(worker, slot)| {
            let life = slot.life.as_ref().filter(|life| life.actor.get_id() == id)?;
            Some((*worker, slot.newest?, life.started))
        });
        let Some((worker, incarnation, started)) = found else {
            return;
        };
        tracing::error!(%worker, %incarnation, %cause, "the actor of a rank's process died");
        let event = if started {
            let log = self.spec.log_dir.join(format!("worker-{worker}.log"));
            NodeEvent::Exited {
                worker,
                incarnation,
                exit: ExitCause::unsupervised(cause, log),
            }
        } else {
            NodeEvent::StartFailed {
                worker,
                incarnation,
                error: StartError::Unsupervised(cause),
            }
        };
        self.over(state, worker, incarnation, event);
    }
}

impl Actor for Agent {
    type Msg = NodeMessage;
    type State = AgentState;
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<Self::Msg>, (): ()) -> Result<AgentState, ActorProcessingErr> {
        Ok(AgentState::default())
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: NodeMessage,
        state: &mut AgentState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            NodeMessage::Command(NodeCommand::Start {
                worker,
                incarnation,
                after,
            }) => self.start(&myself, state, (worker, incarnation, after), false).await,
            NodeMessage::Command(NodeCommand::Adopt { worker, incarnation }) => {
                let life = (worker, incarnation, Duration::ZERO);
                self.start(&myself, state, life, true).await;
            }
            NodeMessage::Command(NodeCommand::LetGo) => self.let_go(state),
            NodeMessage::Command(NodeCommand::Kill {
                worker,
                incarnation,
                reason,
            }) => self.kill(state, worker, incarnation, reason),
            NodeMessage::Command(NodeCommand::StopAll) => self.stop_all(state),
            NodeMessage::Started {
                worker,
                incarnation,
                pid,
            } => {
                if let Some(life) = state.workers.get_mut(&worker).and_then(|slot| slot.life.as_mut()) {
                    life.started = true;
                }
                (self.events)(NodeEvent::Started {
                    worker,
                    incarnation,
                    pid,
                });
            }
            NodeMessage::Ending {
                worker,
                incarnation,
                killed,
            } => {
                // One that was let go is another agent's.
                if state.life(worker, incarnation).is_some() {
                    (self.events)(NodeEvent::Ending {
                        worker,
                        incarnation,
                        killed,
                    });
                }
            }
            NodeMessage::Exited {
                worker,
                incarnation,
                exit,
            } => {
                let event = NodeEvent::Exited {
                    worker,
                    incarnation,
                    exit,
                };
                self.over(state, worker, incarnation, event);
            }
            NodeMessage::StartFailed {
                worker,
                incarnation,
                error,
            } => {
                let event = NodeEvent::StartFailed {
                    worker,
                    incarnation,
                    error,
                };
                self.over(state, worker, incarnation, event);
            }
            NodeMessage::ChildEnded { child, cause } => self.child_ended(state, child, cause),
        }
        Ok(())
    }

    async fn post_stop(&self, myself: ActorRef<Self::Msg>, _: &mut AgentState) -> Result<(), ActorProcessingErr> {
        // Stopped, not killed: each child waits for its process to be reaped.
        myself.stop_children_and_wait(None, Some(STOP_LIMIT)).await;
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<Self::Msg>,
        event: SupervisionEvent,
        _: &mut AgentState,
    ) -> Result<(), ActorProcessingErr> {
        let (actor, cause) = match event {
            SupervisionEvent::ActorFailed(actor, cause) => (actor, cause.to_string()),
            SupervisionEvent::ActorTerminated(actor, _, reason) => (
                actor,
                reason.unwrap_or_else(|| "it stopped without a report".to_owned()),
            ),
            SupervisionEvent::ActorStarted(_)
            | SupervisionEvent::ProcessGroupChanged(_)
            | SupervisionEvent::PidLifecycleEvent(_) => return Ok(()),
        };
        let child = actor.get_id();
        myself.cast(NodeMessage::ChildEnded { child, cause })?;
        Ok(())
    }
}
