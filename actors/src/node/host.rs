//! The node process: stands for one host of a run whose ranks run on several.
//!
//! A node agent, a link to whichever controller is in charge, and the pure [`NodeDesk`] between them. It outlives controllers,
//! and its ranks outlive it: a node process that is lost is started again, and watches the ranks that it finds.
//!
//! - **SUP-1** `NodeHost` is the parent of the agent and of the uplink. If the agent dies, the process ends with the cause; the
//!   ranks are killed with it, and their controller hears of that when the node is back.
//! - **SUP-4** Reading the run folder runs beside the actors.

mod lookout;

use super::{LaunchSpec, NodeCommand, NodeEvent, Processes, start_node_agent};
use crate::link::ToController;
use crate::run_folder::RunPaths;
use crate::supervision::death;
use lookout::Lookout;
use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tarazed_domain::Incarnation;
use tarazed_domain::config::Config;
use tarazed_protocol::coordinator::PastLife;
use tarazed_protocol::message::Member;
use tarazed_protocol::nodes::desk::{DeskEffect, NodeDesk};
use tarazed_protocol::nodes::{FromNode, LifeState, ToNode};
use tokio::sync::{oneshot, watch};

/// Bytes of the last words of one life.
const WORDS_BYTES_MAX: usize = 4096;
/// How long a node that leaves waits for its ranks: one in an uninterruptible system call takes longer, and is nobody's to wait for.
const LEAVING_LIMIT: Duration = Duration::from_secs(8);

/// How to stand for a host.
pub struct NodeOptions {
    /// The run folder, which this host shares with the controller's.
    pub run_dir: PathBuf,
    /// Which of `cluster.nodes` this host is.
    pub name: String,
    /// Where other hosts reach its ranks; none for what the config says.
    pub address: Option<IpAddr>,
    /// What `ps` calls its rank processes.
    pub program: PathBuf,
    /// How long to wait for a controller while no rank of this host lives.
    pub wait: Duration,
    /// Turns true when a signal asks to leave.
    pub stop: watch::Receiver<bool>,
    /// Who hears; must not block.
    pub notify: NodeNotify,
}

/// Where notices go; must not block.
pub type NodeNotify = Arc<dyn Fn(NodeNotice) + Send + Sync>;

/// Something a person will want to see.
#[derive(Debug)]
pub enum NodeNotice {
    /// No controller is there.
    Waiting,
    /// A controller is there.
    Linked {
        /// Where.
        address: String,
        /// Its generation.
        generation: u64,
    },
    /// It is not there any more.
    Unlinked(String),
    /// Something became of a rank process.
    Life(Member, String),
    /// A signal or the end of the run: all ranks of this host end.
    Leaving(String),
}

/// How a node's process ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NodeEnd {
    /// The run is over; the controller ended with this code.
    RunOver(u8),
    /// A signal asked it to leave, and its ranks have ended.
    Drained,
    /// No controller came.
    Abandoned,
    /// It can be no node of this run.
    Refused(String),
    /// It can be none just now: another process is, or the config has changed since it began.
    GaveWay(String),
}

/// A node that could not begin or go on.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {cause}; {remedy}")]
pub struct NodeFailed {
    /// What failed.
    pub what: String,
    /// Why.
    pub cause: String,
    /// What to do.
    pub remedy: &'static str,
}

impl NodeFailed {
    fn system(what: &str, cause: impl std::fmt::Display) -> Self {
        Self {
            what: what.to_owned(),
            cause: cause.to_string(),
            remedy: "start the node again; its ranks live on meanwhile",
        }
    }
}

/// Stands for the host until the run is over, a signal comes, or nobody does.
///
/// # Errors
/// A [`NodeFailed`] if the machine refuses something.
pub fn run(options: NodeOptions) -> Result<NodeEnd, NodeFailed> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("node")
        .enable_all()
        .build()
        .map_err(|e| NodeFailed::system("actor runtime", e))?;
    let ended = runtime.block_on(serve(options));
    runtime.shutdown_timeout(Duration::from_millis(500));
    ended
}

async fn serve(options: NodeOptions) -> Result<NodeEnd, NodeFailed> {
    let NodeOptions {
        run_dir,
        name,
        address,
        program,
        wait,
        mut stop,
        notify,
    } = options;
    let paths = RunPaths::new(run_dir);
    notify(NodeNotice::Waiting);
    let config = tokio::select! {
        config = lookout::first_config(&paths, wait) => match config {
            Some(config) => config?,
            None => return Ok(NodeEnd::Abandoned),
        },
        _ = stop.wait_for(|stop| *stop) => return Ok(NodeEnd::Drained),
    };
    let found = config.cluster.nodes.iter().position(|node| node.name == name);
    let Some(index) = found else {
        let names: Vec<&str> = config.cluster.nodes.iter().map(|node| node.name.as_str()).collect();
        return Ok(NodeEnd::Refused(format!(
            "--name: the run has no node '{name}'; its nodes are: {}",
            names.join(", ")
        )));
    };
    let node = config.cluster.nodes[index].clone();
    let Some(address) = address.or(node.address) else {
        return Ok(NodeEnd::Refused(format!(
            "--address: the config says no address of node '{name}'; give the one at which other hosts reach this one"
        )));
    };
    let (_lock, incarnation) = match claim(&paths, &name)? {
        Some(claimed) => claimed,
        None => {
            return Ok(NodeEnd::GaveWay(format!(
                "--name: another process stands for node '{name}'; stop it, or name another node"
            )));
        }
    };

    let workers = config.cluster.workers_of(index);
    let past: Vec<PastLife> = super::registry::read(&paths.ranks())
        .map_err(|e| NodeFailed::system("run folder", e))?
        .iter()
        .filter(|entry| workers.contains(&entry.worker))
        .map(|entry| PastLife {
            member: Member {
                worker: entry.worker(),
                incarnation: entry.incarnation(),
            },
            lives: entry.lives(),
        })
        .collect();
    let (end_sender, end) = oneshot::channel();
    let parts = HostParts {
        end: end_sender,
        notify: Arc::clone(&notify),
        program: super::program_digest().map_err(|e| NodeFailed::system("this program", e))?,
        host: host_name(),
    };
    let tree = HostTree::start(parts).await?;
    let spec = launch_spec(&paths, program, &config, address, workers.start);
    let (released, heard) = (Arc::clone(&spec.released), tree.clone());
    let agent = start_node_agent(spec, Some(tree.0.get_cell()), move |event| heard.life(event))
        .await
        .map_err(|e| NodeFailed::system("actors", e))?;
    let id = agent.actor.get_id();
    tree.begin(Box::new(agent), Some(id), past, released);
    let lookout = Lookout {
        paths,
        node,
        index: index as u32,
        workers,
        incarnation,
        timeouts: config.timeouts(),
        tree: tree.clone(),
        wait,
        notify,
    };
    let looking = tokio::spawn(lookout.stay());
    let asked = tree.clone();
    let watching = tokio::spawn(async move {
        if stop.wait_for(|stop| *stop).await.is_ok() {
            asked.leave();
        }
    });
    let ended = end.await;
    looking.abort();
    watching.abort();
    // An error means that it is gone already.
    let _ = tree.0.stop_and_wait(None, Some(Duration::from_secs(10))).await;
    ended.map_err(|_| NodeFailed::system("node agent", "it died; the log says why"))
}

/// Makes this process the one that stands for the node: its lock, and which life of it this is (SUP-2). None where another
/// process of this host does.
fn claim(paths: &RunPaths, name: &str) -> Result<Option<(File, Incarnation)>, NodeFailed> {
    let failed = |e: std::io::Error| NodeFailed::system("run folder", e);
    std::fs::create_dir_all(paths.nodes()).map_err(failed)?;
    let mut lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(paths.nodes().join(name))
        .map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(e)) => return Err(failed(e)),
    }
    let mut text = String::new();
    lock.read_to_string(&mut text).map_err(failed)?;
    let next = text.trim().parse::<u32>().map_or(0, |last| last.saturating_add(1));
    lock.rewind()
        .and_then(|()| lock.write_all(format!("{next}\n").as_bytes()))
        .map_err(failed)?;
    Ok(Some((lock, Incarnation(next))))
}

/// How ranks are started: everything that another controller may change they read in the run folder.
fn launch_spec(paths: &RunPaths, program: PathBuf, config: &Config, address: IpAddr, first_worker: u32) -> LaunchSpec {
    let args: [OsString; 7] = [
        "rank".into(),
        "--run-dir".into(),
        paths.dir().into(),
        "--address".into(),
        address.to_string().into(),
        "--first-worker".into(),
        first_worker.to_string().into(),
    ];
    let own = PathBuf::from(super::OWN_PROGRAM);
    LaunchSpec {
        program: if own.exists() { own } else { program.clone() },
        shown_as: program,
        args: args.into(),
        env: Vec::new(),
        share_gpus: config.cluster.share_gpus,
        lifeline: true,
        log_dir: paths.logs(),
        registry: paths.ranks(),
        tenure: None,
        released: Arc::default(),
    }
}

/// The actors of a node's process, without its edges: the same ones stand between real processes and in a simulation.
#[derive(Clone)]
pub struct HostTree(ActorRef<HostMessage>);

/// What a node's actors know from the start.
pub struct HostParts {
    /// Hears how it ends.
    pub end: oneshot::Sender<NodeEnd>,
    /// Who hears what becomes of it.
    pub notify: NodeNotify,
    /// BLAKE3 of its program.
    pub program: [u8; 32],
    /// Its host's name, for people.
    pub host: String,
}

impl HostTree {
    /// Starts the actors.
    ///
    /// # Errors
    /// If the actor system refuses.
    pub async fn start(parts: HostParts) -> Result<Self, NodeFailed> {
        let spawned = Actor::spawn(None, NodeHost, parts).await;
        spawned
            .map(|(actor, _)| Self(actor))
            .map_err(|e| NodeFailed::system("actors", e))
    }

    /// Who starts processes, which of them were there before, and what says that they are somebody else's. `agent` is the
    /// actor behind it, whose death ends the node's process.
    pub fn begin(
        &self,
        processes: Box<dyn Processes>,
        agent: Option<ActorId>,
        past: Vec<PastLife>,
        released: Arc<AtomicBool>,
    ) {
        let begun = Begun {
            processes,
            agent,
            released,
        };
        self.tell(HostMessage::Begin(begun, past));
    }

    /// From the node agent.
    pub fn life(&self, event: NodeEvent) {
        self.tell(HostMessage::Agent(event));
    }

    /// There is a link to the controller in charge; the first one has number 1, the next ones follow.
    pub fn linked(&self, uplink: Box<dyn ToController>) {
        self.tell(HostMessage::Linked(uplink));
    }

    /// A message of the link of this number.
    pub fn heard(&self, link: u64, body: Vec<u8>) {
        self.tell(HostMessage::Heard(link, body));
    }

    /// The present link is over.
    pub fn unlinked(&self) {
        self.tell(HostMessage::Unlinked);
    }

    /// A signal asks for the end: all ranks of this host first.
    pub fn leave(&self) {
        self.tell(HostMessage::Leave(NodeEnd::Drained));
    }

    /// Ends it as a crash would.
    pub fn kill(&self) {
        self.0.kill();
    }

    fn tell(&self, message: HostMessage) {
        // An error means that the process ends.
        let _ = self.0.cast(message);
    }
}

struct Begun {
    processes: Box<dyn Processes>,
    agent: Option<ActorId>,
    /// That of the agent's processes: set, they are somebody else's.
    released: Arc<AtomicBool>,
}

enum HostMessage {
    /// There is somebody who starts processes.
    Begin(Begun, Vec<PastLife>),
    /// From the agent.
    Agent(NodeEvent),
    /// A link stands.
    Linked(Box<dyn ToController>),
    /// A message of the present link, of this number.
    Heard(u64, Vec<u8>),
    /// The present link is over.
    Unlinked,
    /// All ranks of this host end, and then this process.
    Leave(NodeEnd),
    /// Ends at once, if no rank of this host lives.
    GiveUp(NodeEnd),
    /// Ends at once, and leaves the ranks to whoever is their node by now.
    Yield(String),
    /// Whoever has not ended by now is waited for no longer.
    Overdue,
}
impl ractor::Message for HostMessage {}

struct NodeHost;

struct HostState {
    desk: NodeDesk,
    begun: Option<Begun>,
    uplink: Option<Box<dyn ToController>>,
    /// Number of the present link, from 1; messages of others are late.
    link: u64,
    leaving: Option<NodeEnd>,
    end: Option<oneshot::Sender<NodeEnd>>,
    notify: NodeNotify,
    program: [u8; 32],
    host: String,
}

impl HostState {
    fn act(&mut self, effects: Vec<DeskEffect>) -> Result<(), ActorProcessingErr> {
        for effect in effects {
            let command = match effect {
                DeskEffect::Start { member, after_ms } => NodeCommand::Start {
                    worker: member.worker,
                    incarnation: member.incarnation,
                    after: Duration::from_millis(after_ms),
                },
                DeskEffect::Adopt { member } => NodeCommand::Adopt {
                    worker: member.worker,
                    incarnation: member.incarnation,
                },
                DeskEffect::Kill { member, reason } => NodeCommand::Kill {
                    worker: member.worker,
                    incarnation: member.incarnation,
                    reason,
                },
                DeskEffect::Report => {
                    self.say(&FromNode::Have(self.desk.have()));
                    continue;
                }
            };
            let begun = self.begun.as_ref().ok_or("a life before the node has begun")?;
            begun.processes.command(command)?;
        }
        Ok(())
    }

    /// What is lost with a link is said again on the next one.
    fn say(&self, message: &FromNode) {
        let Some(uplink) = &self.uplink else { return };
        let sent = message.encode().map_err(|e| e.to_string());
        if let Err(error) = sent.and_then(|body| uplink.send(body).map_err(|e| e.to_string())) {
            tracing::warn!(%error, "the controller does not hear");
        }
    }

    fn agent(&mut self, event: NodeEvent) -> Result<(), ActorProcessingErr> {
        let (member, state) = match event {
            NodeEvent::Started {
                worker,
                incarnation,
                pid,
            } => (Member { worker, incarnation }, LifeState::Running { pid }),
            NodeEvent::Ending {
                worker,
                incarnation,
                killed,
            } => {
                let member = Member { worker, incarnation };
                let pid = self.desk.pid(member);
                (member, LifeState::Ending { pid, killed })
            }
            NodeEvent::Exited {
                worker,
                incarnation,
                exit,
            } => {
                let orderly = exit.cause.is_orderly();
                let cause = shortened(exit.to_string());
                (Member { worker, incarnation }, LifeState::Over { cause, orderly })
            }
            NodeEvent::StartFailed {
                worker,
                incarnation,
                error,
            } => {
                let cause = shortened(error.to_string());
                (Member { worker, incarnation }, LifeState::NotStarted { cause })
            }
            NodeEvent::AllStopped | NodeEvent::NodeAway { .. } | NodeEvent::NodeBack { .. } => return Ok(()),
        };
        if let Some(text) = told(&state) {
            (self.notify)(NodeNotice::Life(member, text));
        }
        let effects = self.desk.on_life(member, state);
        self.act(effects)
    }

    fn controller(&mut self, bytes: &[u8]) -> Result<(), ActorProcessingErr> {
        match ToNode::decode(bytes) {
            Ok(ToNode::Want(wanted)) => {
                let effects = self.desk.on_want(&wanted);
                self.act(effects)
            }
            Ok(ToNode::Refused(reason)) => {
                self.give_way(NodeEnd::Refused(reason));
                Ok(())
            }
            Ok(ToNode::End { code }) => self.leave(NodeEnd::RunOver(code)),
            Err(error) => {
                // The next link begins with everything.
                tracing::error!(%error, "a message of the controller does not decode");
                self.uplink = None;
                Ok(())
            }
        }
    }

    fn give_way(&mut self, end: NodeEnd) {
        if let Some(begun) = &self.begun {
            begun.released.store(true, Ordering::SeqCst);
        }
        self.finish(end);
    }

    fn leave(&mut self, end: NodeEnd) -> Result<(), ActorProcessingErr> {
        if self.leaving.is_some() {
            return Ok(());
        }
        let reason = match &end {
            NodeEnd::RunOver(_) => "the run is over",
            _ => "its node was told to stop",
        };
        (self.notify)(NodeNotice::Leaving(reason.to_owned()));
        self.leaving = Some(end);
        let effects = self.desk.leave(reason);
        self.act(effects)
    }

    /// Nobody is left, and the controller knows.
    async fn leave_when_deserted(&mut self) {
        if self.desk.is_deserted()
            && let Some(end) = self.leaving.clone()
        {
            if let Some(uplink) = self.uplink.take() {
                uplink.close().await;
            }
            self.finish(end);
        }
    }

    fn finish(&mut self, end: NodeEnd) {
        if let Some(sender) = self.end.take() {
            // An error means that nobody waits any more.
            let _ = sender.send(end);
        }
    }
}

/// All lives' last words go in one message.
fn shortened(mut words: String) -> String {
    if words.len() > WORDS_BYTES_MAX {
        let end = (0..=WORDS_BYTES_MAX).rev().find(|&at| words.is_char_boundary(at));
        words.truncate(end.unwrap_or(0));
        words += " …";
    }
    words
}

/// What a person hears of a life.
fn told(state: &LifeState) -> Option<String> {
    match state {
        LifeState::Starting | LifeState::Ending { .. } => None,
        LifeState::Running { pid } => Some(format!("runs as process {pid}")),
        LifeState::Over { cause, .. } => Some(format!("ended: {cause}")),
        LifeState::NotStarted { cause } => Some(format!("was not started: {cause}")),
    }
}

impl Actor for NodeHost {
    type Msg = HostMessage;
    type State = HostState;
    type Arguments = HostParts;

    async fn pre_start(&self, _: ActorRef<HostMessage>, parts: HostParts) -> Result<HostState, ActorProcessingErr> {
        Ok(HostState {
            desk: NodeDesk::default(),
            begun: None,
            uplink: None,
            link: 0,
            leaving: None,
            end: Some(parts.end),
            notify: parts.notify,
            program: parts.program,
            host: parts.host,
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<HostMessage>,
        message: HostMessage,
        state: &mut HostState,
    ) -> Result<(), ActorProcessingErr> {
        let was_leaving = state.leaving.is_some();
        match message {
            HostMessage::Begin(begun, past) => {
                state.begun = Some(begun);
                let (desk, effects) = NodeDesk::new(&past);
                state.desk = desk;
                state.act(effects)?;
            }
            HostMessage::Agent(event) => state.agent(event)?,
            HostMessage::Linked(uplink) => {
                state.link += 1;
                state.uplink = Some(uplink);
                state.say(&FromNode::Hello {
                    binary: state.program,
                    host: state.host.clone(),
                    lives: state.desk.have(),
                });
            }
            HostMessage::Heard(link, body) => {
                // What an old link still brings is another controller's business by now.
                if link == state.link && state.uplink.is_some() && state.leaving.is_none() {
                    state.controller(&body)?;
                }
            }
            HostMessage::Unlinked => state.uplink = None,
            HostMessage::Leave(end) => state.leave(end)?,
            HostMessage::Yield(reason) => state.give_way(NodeEnd::GaveWay(reason)),
            HostMessage::Overdue => {
                tracing::error!("a killed rank has not ended; it hangs in the kernel and ends when it returns");
                if let Some(end) = state.leaving.clone() {
                    state.finish(end);
                }
            }
            HostMessage::GiveUp(end) => {
                if state.desk.is_deserted() {
                    state.finish(end);
                }
            }
        }
        if state.leaving.is_some() && !was_leaving {
            // An error means that it is over by then.
            drop(myself.send_after(LEAVING_LIMIT, || HostMessage::Overdue));
        }
        state.leave_when_deserted().await;
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<HostMessage>,
        event: SupervisionEvent,
        state: &mut HostState,
    ) -> Result<(), ActorProcessingErr> {
        match death(event) {
            Some(death) if Some(death.child.get_id()) == state.begun.as_ref().and_then(|begun| begun.agent) => {
                Err(format!("the node agent ended: {}", death.cause).into())
            }
            // A link that is over; the lookout sees it, too.
            _ => Ok(()),
        }
    }
}

/// For people; empty where the system does not say.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SUP-2: a node's next process is a newer life of it, and two at once are refused.
    #[test]
    fn one_process_at_a_time_stands_for_a_node() {
        let folder = tempfile::tempdir().expect("a folder");
        let paths = RunPaths::new(folder.path());
        let (first, life) = claim(&paths, "a").expect("claimed").expect("free");
        assert_eq!(life, Incarnation(0));
        assert!(claim(&paths, "a").expect("looked").is_none(), "it is taken");
        let (_other, life) = claim(&paths, "b").expect("claimed").expect("free");
        assert_eq!(life, Incarnation(0));
        drop(first);
        let (_second, life) = claim(&paths, "a").expect("claimed").expect("free again");
        assert_eq!(life, Incarnation(1));
    }
}
