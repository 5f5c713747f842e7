//! The shell around the roster of nodes: a hub that nodes dial, and commands and reports in between.
//!
//! It has the place of the node agent in a run whose ranks run on several hosts. Nodes have a hub of their own, with a key of its
//! own: a node is no rank, and a rank is no node.

use super::tree::Ear;
use super::{Notice, Notify};
use crate::link::{Bind, HubConfig, HubEvent, PeerId, ToNodes, start_hub};
use crate::node::{Exit, ExitCause, NodeCommand, NodeError, NodeEvent, Processes, StartError};
use crate::supervision::death;
use ractor::rpc::CallResult;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tarazed_domain::config::{ClusterConfig, Config};
use tarazed_domain::{Incarnation, WorkerId};
use tarazed_protocol::message::Member;
use tarazed_protocol::nodes::roster::{LifeReport, NodeFacts, NodeRoster, RosterEffect};
use tarazed_protocol::nodes::{FromNode, ToNode};
use tokio::time::Instant;

/// How long an end waits for the nodes to have left.
const LEAVING_LIMIT: Duration = Duration::from_secs(8);

/// The secret that nodes prove: not that of ranks, who would else be taken for nodes.
#[must_use]
pub fn node_token(run_token: &[u8; 32]) -> [u8; 32] {
    blake3::derive_key("tarazed 2026 node link v1", run_token)
}

/// The controller's way to all rank processes of a run on several hosts. Dropping it ends nothing on them.
pub struct Nodes(ActorRef<NodesMessage>);

impl Processes for Nodes {
    fn command(&self, command: NodeCommand) -> Result<(), NodeError> {
        let sent = self.0.cast(NodesMessage::Command(command));
        sent.map_err(|_| NodeError("of the nodes has ended".to_owned()))
    }
}

/// A second handle, which ends the nodes with the run.
pub struct NodesEnd(ActorRef<NodesMessage>);

impl NodesEnd {
    /// Tells the nodes that the run is over with this exit code, and waits until they have left, or for a while.
    pub async fn end(self, code: u8) {
        let ended = self.0.call(|reply| NodesMessage::End(code, reply), Some(LEAVING_LIMIT));
        if !matches!(ended.await, Ok(CallResult::Success(()))) {
            tracing::warn!(
                "a node has not left in time: it ends its ranks by itself, or they end when nobody comes for them"
            );
        }
        // An error means that it is gone already.
        let _ = self.0.stop_and_wait(None, Some(LEAVING_LIMIT)).await;
    }
}

pub(super) enum NodesMessage {
    Command(NodeCommand),
    /// There is a way to the nodes.
    Opened(Box<dyn ToNodes>),
    Hub(HubEvent),
    /// The run is over; answered once no node is linked any more.
    End(u8, RpcReplyPort<()>),
}
impl ractor::Message for NodesMessage {}

/// What the nodes of a run are told by, and who hears of them.
pub struct NodesParts {
    /// Who hears what becomes of ranks.
    pub ear: Ear,
    /// Who hears what becomes of nodes.
    pub notify: Notify,
    /// Parent of its actors (SUP-1).
    pub parent: ActorCell,
    /// Folder of the ranks' logs.
    pub logs: PathBuf,
    /// BLAKE3 of the program that nodes must run.
    pub program: [u8; 32],
    /// How long a node may take to end a life (`fault.timeout_ms`).
    pub patience_ms: u64,
}

impl Nodes {
    /// The nodes of a run, of which none is linked, and to which there is no way yet.
    ///
    /// # Errors
    /// If the actor system refuses.
    pub async fn begin(cluster: &ClusterConfig, parts: NodesParts) -> Result<Self, String> {
        let facts = cluster.nodes.iter().enumerate().map(|(index, node)| NodeFacts {
            name: node.name.clone(),
            workers: cluster.workers_of(index),
        });
        let state = NodesState {
            roster: NodeRoster::new(parts.program, parts.patience_ms, facts.collect()),
            hub: None,
            early: Vec::new(),
            linked: BTreeMap::new(),
            leaving: None,
        };
        let shell = NodesShell {
            began: Instant::now(),
            ear: parts.ear,
            notify: parts.notify,
            logs: parts.logs,
        };
        let spawned = Actor::spawn_linked(None, shell, state, parts.parent).await;
        spawned.map(|(actor, _)| Self(actor)).map_err(|e| e.to_string())
    }

    /// Starts the hub that nodes dial, and says where.
    ///
    /// # Errors
    /// If the address cannot be listened at, or the machine refuses.
    pub async fn listen(&self, config: &Config, run_token: &[u8; 32]) -> Result<String, String> {
        let address = config.cluster.address.ok_or("cluster.address is not set")?;
        let hub_config = HubConfig {
            token: node_token(run_token),
            bind: Bind::Tcp(SocketAddr::new(address, config.cluster.node_port)),
            failure: Duration::from_millis(config.timeouts().failure_ms),
            supervisor: Some(self.0.get_cell()),
        };
        let hub = start_hub(hub_config, self.heard()).await.map_err(|e| e.to_string())?;
        let address = hub.address();
        self.open(Box::new(hub));
        Ok(address)
    }

    /// Where its hub tells what it hears.
    pub fn heard(&self) -> impl Fn(HubEvent) + Send + Sync + use<> {
        let actor = self.0.clone();
        move |event| {
            // An error means that the run ends.
            let _ = actor.cast(NodesMessage::Hub(event));
        }
    }

    /// There is a way to the nodes.
    pub fn open(&self, hub: Box<dyn ToNodes>) {
        // An error means that the run ends.
        let _ = self.0.cast(NodesMessage::Opened(hub));
    }

    /// Ends the nodes with the run.
    #[must_use]
    pub fn ending(&self) -> NodesEnd {
        NodesEnd(self.0.clone())
    }
}

struct NodesShell {
    began: Instant,
    ear: Ear,
    notify: Notify,
    logs: PathBuf,
}

struct NodesState {
    roster: NodeRoster,
    hub: Option<Box<dyn ToNodes>>,
    /// What came before the hub's handle.
    early: Vec<HubEvent>,
    /// The process that stands for each node that is linked.
    linked: BTreeMap<usize, PeerId>,
    /// The run is over, with this exit code: whoever comes leaves again.
    leaving: Option<(u8, RpcReplyPort<()>)>,
}

impl NodesShell {
    fn act(&self, state: &mut NodesState, effects: Vec<RosterEffect>) {
        for effect in effects {
            match effect {
                RosterEffect::Send { node, message } => state.send(node, &message),
                RosterEffect::Report { member, report } => self.ear.node(self.event(member, report)),
                RosterEffect::Back {
                    index,
                    node,
                    host,
                    lives,
                } => {
                    self.ear.node(NodeEvent::NodeBack { node: index as u32 });
                    (self.notify)(Notice::NodeBack { node, host, lives });
                }
                RosterEffect::Away {
                    index,
                    node,
                    workers,
                    cause,
                    lives,
                } => {
                    let away = NodeEvent::NodeAway {
                        node: index as u32,
                        workers,
                    };
                    self.ear.node(away);
                    (self.notify)(Notice::Warning(format!(
                        "node '{node}' is away ({cause}) with {lives} ranks: those that live train on, and none is watched or \
                         started until `tarazed node` runs there again"
                    )));
                }
                RosterEffect::TurnedAway { node, reason } => {
                    (self.notify)(Notice::Warning(format!(
                        "a process was turned away that would be node '{node}': {reason}"
                    )));
                }
            }
        }
    }

    /// What the node agent of one machine would say.
    fn event(&self, member: Member, report: LifeReport) -> NodeEvent {
        let Member { worker, incarnation } = member;
        match report {
            LifeReport::Started { pid } => NodeEvent::Started {
                worker,
                incarnation,
                pid,
            },
            LifeReport::Ending { killed } => NodeEvent::Ending {
                worker,
                incarnation,
                killed,
            },
            LifeReport::Exited { cause, orderly } => NodeEvent::Exited {
                worker,
                incarnation,
                exit: Exit {
                    cause: ExitCause::OnNode { words: cause, orderly },
                    killed: None,
                    tail: Vec::new(),
                    log: self.logs.join(format!("worker-{worker}.log")),
                    at: std::time::Instant::now(),
                    ran: Duration::ZERO,
                },
            },
            LifeReport::StartFailed { cause } => NodeEvent::StartFailed {
                worker,
                incarnation,
                error: StartError::OnNode(cause),
            },
        }
    }

    fn hub(&self, state: &mut NodesState, event: HubEvent) {
        match event {
            HubEvent::Connected(peer) => {
                let node = peer.worker.index();
                if state.roster.has(node) {
                    state.linked.insert(node, peer);
                } else if let Some(hub) = &state.hub {
                    hub.disconnect(peer, "the config names no such node");
                }
            }
            HubEvent::Disconnected(peer, reason) => {
                let node = peer.worker.index();
                if state.linked.get(&node) == Some(&peer) {
                    state.linked.remove(&node);
                    let effects = state.roster.on_lost(node, &reason);
                    self.act(state, effects);
                    state.has_left();
                }
            }
            HubEvent::Message(peer, body) => {
                let node = peer.worker.index();
                if state.linked.get(&node) != Some(&peer) {
                    return;
                }
                match FromNode::decode(&body.into_vec()) {
                    Ok(FromNode::Hello { .. }) if state.leaving.is_some() => {
                        let code = state.leaving.as_ref().map_or(0, |(code, _)| *code);
                        state.send(node, &ToNode::End { code });
                    }
                    Ok(message) => {
                        let effects = state.roster.on_message(node, message);
                        self.act(state, effects);
                    }
                    Err(error) => {
                        tracing::warn!(%error, node, "a node's message does not decode");
                        if let Some(hub) = &state.hub {
                            hub.disconnect(peer, "a message does not decode");
                        }
                    }
                }
            }
        }
    }

    fn command(&self, state: &mut NodesState, command: NodeCommand) {
        let member = |worker: WorkerId, incarnation: Incarnation| Member { worker, incarnation };
        let effects = match command {
            NodeCommand::Start {
                worker,
                incarnation,
                after,
            } => {
                let after_ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
                state.roster.start(member(worker, incarnation), after_ms, false)
            }
            NodeCommand::Adopt { worker, incarnation } => state.roster.start(member(worker, incarnation), 0, true),
            NodeCommand::Kill {
                worker,
                incarnation,
                reason,
            } => {
                let now_ms = self.began.elapsed().as_millis() as u64;
                state.roster.kill(now_ms, member(worker, incarnation), &reason)
            }
            NodeCommand::LetGo => {
                state.roster.let_go();
                Vec::new()
            }
            // Told by `NodesEnd::end`, which ends the nodes themselves.
            NodeCommand::StopAll => Vec::new(),
        };
        self.act(state, effects);
    }
}

impl NodesState {
    fn send(&self, node: usize, message: &ToNode) {
        let (Some(hub), Some(&peer)) = (&self.hub, self.linked.get(&node)) else {
            return; // it has just been lost, and hears everything when it is back
        };
        let sent = message.encode().map_err(|e| e.to_string());
        if let Err(error) = sent.and_then(|body| hub.send(peer, body).map_err(|e| e.to_string())) {
            // Whatever was lost is said again on the next link.
            tracing::warn!(%error, node, "a node does not hear");
            hub.disconnect(peer, &error);
        }
    }

    fn has_left(&mut self) {
        if self.linked.is_empty()
            && let Some((_, reply)) = self.leaving.take()
        {
            // An error means that nobody waits any more.
            let _ = reply.send(());
        }
    }
}

impl Actor for NodesShell {
    type Msg = NodesMessage;
    type State = NodesState;
    type Arguments = NodesState;

    async fn pre_start(&self, _: ActorRef<NodesMessage>, state: NodesState) -> Result<NodesState, ActorProcessingErr> {
        Ok(state)
    }

    async fn handle(
        &self,
        _: ActorRef<NodesMessage>,
        message: NodesMessage,
        state: &mut NodesState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            NodesMessage::Command(command) => self.command(state, command),
            NodesMessage::Opened(hub) => {
                state.hub = Some(hub);
                for event in std::mem::take(&mut state.early) {
                    self.hub(state, event);
                }
            }
            NodesMessage::Hub(event) if state.hub.is_none() => state.early.push(event),
            NodesMessage::Hub(event) => self.hub(state, event),
            NodesMessage::End(code, reply) => {
                if state.roster.is_in_charge() {
                    let nodes: Vec<usize> = state.linked.keys().copied().collect();
                    // From here on nothing that a node says is anybody's business.
                    state.roster.let_go();
                    for node in nodes {
                        state.send(node, &ToNode::End { code });
                    }
                    state.leaving = Some((code, reply));
                    state.has_left();
                } else {
                    let _ = reply.send(());
                }
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<NodesMessage>,
        event: SupervisionEvent,
        _: &mut NodesState,
    ) -> Result<(), ActorProcessingErr> {
        match death(event) {
            // Its hub: nobody would hear of the nodes any more.
            Some(death) => Err(format!("the nodes' link ended: {}", death.cause).into()),
            None => Ok(()),
        }
    }
}
