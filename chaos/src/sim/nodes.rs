//! Ranks on several hosts: a node process on each, between the controller and the ranks. Both ends are production actors
//! (`Nodes` in the controller, `HostTree` on a host); simulated are the links between them and the processes.
//!
//! A node process that is gone is started again after a while, as a supervisor of the system would; its ranks live on meanwhile.
//! Whoever ends while no node watches has ended all the same when one comes.

use super::controller::{Life, lock};
use super::process::{Process, exit_of};
use super::random::Random;
use super::world::World;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tarazed_actors::link::{Body, HubEvent, LinkError, PeerId, ToController, ToNodes};
use tarazed_actors::node::host::{HostParts, HostTree, NodeNotice};
use tarazed_actors::node::{ExitCause, NodeCommand, NodeError, NodeEvent, Processes, StartError};
use tarazed_domain::{Incarnation, WorkerId};
use tarazed_protocol::coordinator::PastLife;
use tarazed_protocol::message::Member;
use tokio::sync::{Notify, mpsc, oneshot};

/// What every node and every controller run here.
pub const PROGRAM: [u8; 32] = [1; 32];
/// Hosts have no process id: ways from and to them are cut by these numbers and up.
const HOSTS_FROM: u32 = 1 << 30;
/// Between looks whether one that stays away for long is to come back.
const AWAY_LOOK: Duration = Duration::from_millis(20);
/// Between looks for another controller while a link lasts, at most; as `actors/src/node/host/lookout.rs` has it.
const LOOK_WHEN_LINKED_MAX: Duration = Duration::from_millis(500);

/// A host, and the node process that stands for it, if one does.
pub struct Host {
    /// Which.
    index: u32,
    /// Its workers.
    pub workers: Range<u32>,
    node: Mutex<Option<Arc<Node>>>,
    /// Node processes so far.
    lives: AtomicU64,
}

/// A node process.
struct Node {
    tree: HostTree,
    number: u64,
    dead: AtomicBool,
    died: Notify,
    /// Its link is to be cut.
    cut: Notify,
    released: Arc<AtomicBool>,
    /// The processes that it started or found.
    watched: Mutex<BTreeMap<Member, Arc<Process>>>,
    /// Starts that wait for their time.
    waiting: Mutex<BTreeSet<Member>>,
}

impl Node {
    fn is_alive(&self) -> bool {
        !self.dead.load(Ordering::Relaxed)
    }

    fn kill(&self) {
        self.dead.store(true, Ordering::Relaxed);
        self.tree.kill();
        self.died.notify_waiters();
    }

    async fn until_dead(&self) {
        loop {
            let died = self.died.notified();
            if !self.is_alive() {
                return;
            }
            died.await;
        }
    }

    fn hear(&self, event: NodeEvent) {
        if self.is_alive() {
            self.tree.life(event);
        }
    }
}

impl Host {
    /// One without a node process.
    pub fn new(index: u32, workers: Range<u32>) -> Self {
        Self {
            index,
            workers,
            node: Mutex::default(),
            lives: AtomicU64::new(0),
        }
    }

    /// What ways from and to it are cut by.
    const fn pid(&self) -> u32 {
        HOSTS_FROM + self.index
    }

    fn node(&self) -> Option<Arc<Node>> {
        lock(&self.node).clone().filter(|node| node.is_alive())
    }

    /// SIGKILL to its node process.
    pub fn kill_node(&self) {
        if let Some(node) = self.node() {
            node.kill();
        }
    }

    /// Nothing that its node and the controller say arrives for a while; or their link breaks at once.
    pub fn cut(&self, world: &World, time: Duration, breaks: bool) {
        world.cut(0, self.pid(), time);
        world.cut(self.pid(), 0, time);
        if breaks && let Some(node) = self.node() {
            node.cut.notify_waiters();
        }
    }

    /// A process runs.
    pub fn hear_of_start(&self, process: &Process) {
        let Member { worker, incarnation } = process.member;
        if let Some(node) = self.watcher(process) {
            let pid = process.pid;
            node.hear(NodeEvent::Started {
                worker,
                incarnation,
                pid,
            });
        }
    }

    /// A process begins to end.
    pub fn hear_of_dying(&self, process: &Process, killed: Option<String>) {
        let Member { worker, incarnation } = process.member;
        if let Some(node) = self.watcher(process) {
            node.hear(NodeEvent::Ending {
                worker,
                incarnation,
                killed,
            });
        }
    }

    /// A process has ended.
    pub fn hear_of(&self, process: &Process, cause: ExitCause, killed: Option<String>) {
        let Member { worker, incarnation } = process.member;
        if let Some(node) = self.watcher(process) {
            lock(&node.watched).remove(&process.member);
            let exit = exit_of(cause, killed);
            node.hear(NodeEvent::Exited {
                worker,
                incarnation,
                exit,
            });
        }
    }

    fn watcher(&self, process: &Process) -> Option<Arc<Node>> {
        self.node()
            .filter(|node| lock(&node.watched).contains_key(&process.member))
    }
}

/// One node process after another, for ever.
pub async fn keep_up(world: Arc<World>, host: Arc<Host>) {
    let mut random = world.random("node", u64::from(host.index));
    loop {
        tokio::time::sleep(Duration::from_micros(random.between(500, 20_000))).await;
        live(&world, &host, &mut random).await;
        let stays_away = random.chance(0.2);
        while stays_away && !world.is_calm() {
            tokio::time::sleep(AWAY_LOOK).await;
        }
        let patience_ms = if world.is_calm() {
            50
        } else {
            world.scenario.timeout_ms * 2
        };
        tokio::time::sleep(Duration::from_millis(random.between(1, patience_ms))).await;
    }
}

async fn live(world: &Arc<World>, host: &Arc<Host>, random: &mut Random) {
    let number = host.lives.fetch_add(1, Ordering::Relaxed);
    let (index, history) = (host.index, world.history.clone());
    let (end_sender, end) = oneshot::channel();
    let notify = move |notice: NodeNotice| history.note(&format!("node {index}: {notice:?}"));
    let parts = HostParts {
        end: end_sender,
        notify: Arc::new(notify),
        program: PROGRAM,
        host: format!("host {index}"),
    };
    let tree = match HostTree::start(parts).await {
        Ok(tree) => tree,
        Err(error) => return world.fail(&format!("node {index} cannot start: {error}")),
    };
    let node = Arc::new(Node {
        tree: tree.clone(),
        number,
        dead: AtomicBool::new(false),
        died: Notify::new(),
        cut: Notify::new(),
        released: Arc::default(),
        watched: Mutex::default(),
        waiting: Mutex::default(),
    });
    *lock(&host.node) = Some(Arc::clone(&node));
    let past: Vec<PastLife> = world.past_lives();
    let past = past
        .into_iter()
        .filter(|past| host.workers.contains(&past.member.worker.0));
    let agent = SimAgent {
        world: Arc::clone(world),
        node: Arc::clone(&node),
    };
    tree.begin(Box::new(agent), None, past.collect(), Arc::clone(&node.released));
    world.history.note(&format!("node {index} begins its life {number}"));
    let looking = stay(world, host, &node, random);
    let ended = tokio::select! {
        biased;
        () = node.until_dead() => "is killed".to_owned(),
        ended = end => match ended {
            Ok(ended) => format!("ends: {ended:?}"),
            Err(_) => return world.fail(&format!("the actors of node {index} died")),
        },
        () = looking => "is not linked any more".to_owned(),
    };
    world.history.note(&format!("node {index} {ended}"));
    node.kill();
}

/// What a node says to its controller.
enum Up {
    Message(Vec<u8>),
    Closed(String),
}

/// Keeps a node linked to whoever is in charge.
async fn stay(world: &Arc<World>, host: &Arc<Host>, node: &Arc<Node>, random: &mut Random) {
    let mut number = 0;
    loop {
        let (life, way) = loop {
            tokio::time::sleep(Duration::from_millis(random.between(1, 60))).await;
            let life = world
                .in_charge()
                .filter(|life| life.is_alive() && !life.gate.is_closed());
            if let Some((life, way)) = life.and_then(|life| life.way_for_nodes().map(|way| (life, way))) {
                break (life, way);
            }
        };
        number += 1;
        let peer = PeerId {
            worker: WorkerId(host.index),
            incarnation: Incarnation(node.number as u32),
        };
        let (up, said) = mpsc::unbounded_channel();
        let (down, told) = mpsc::unbounded_channel();
        let (lose, lost) = oneshot::channel();
        let link = way.connect(&life, peer, down);
        let ends = [Arc::clone(node), Arc::clone(node)];
        let [upper, lower] = ends;
        let end = LinkEnd {
            life: Arc::clone(&life),
            way,
            peer,
            link,
        };
        tokio::spawn(carry_up(Arc::clone(world), Arc::clone(host), upper, end, said));
        tokio::spawn(carry_down(
            Arc::clone(world),
            Arc::clone(host),
            lower,
            Arc::clone(&life),
            number,
            told,
            lose,
        ));
        node.tree.linked(Box::new(NodeUplink { up: up.clone() }));
        let why = until_over(world, node, &life, lost).await;
        // An error means that the link is over at the other end, too.
        let _ = up.send(Up::Closed(why.to_owned()));
        node.tree.unlinked();
    }
}

async fn until_over(world: &World, node: &Node, life: &Life, mut lost: oneshot::Receiver<()>) -> &'static str {
    let look = LOOK_WHEN_LINKED_MAX.min(Duration::from_millis(world.scenario.timeout_ms / 4));
    loop {
        tokio::select! {
            biased;
            () = node.cut.notified() => return "the connection was cut",
            _ = &mut lost => return "the controller closed the connection",
            () = tokio::time::sleep(look) => {}
        }
        if world.in_charge().is_some_and(|other| other.number > life.number) {
            return "another controller is in charge";
        }
    }
}

struct NodeUplink {
    up: mpsc::UnboundedSender<Up>,
}

#[async_trait::async_trait]
impl ToController for NodeUplink {
    fn send(&self, body: Vec<u8>) -> Result<(), LinkError> {
        // An error means that the link is over, which the node hears by itself.
        let _ = self.up.send(Up::Message(body));
        Ok(())
    }

    async fn close(self: Box<Self>) {
        let _ = self.up.send(Up::Closed("it left".to_owned()));
    }
}

/// The controller's end of one link.
struct LinkEnd {
    life: Arc<Life>,
    way: Arc<WayForNodes>,
    peer: PeerId,
    link: u64,
}

async fn carry_up(
    world: Arc<World>,
    host: Arc<Host>,
    node: Arc<Node>,
    end: LinkEnd,
    mut said: mpsc::UnboundedReceiver<Up>,
) {
    let numbers = (end.life.number << 32) + (u64::from(host.index) << 24) + end.link;
    let mut random = world.random("node up", numbers);
    loop {
        let message = tokio::select! {
            biased;
            message = said.recv() => message,
            () = node.until_dead() => None,
        };
        let message = message.unwrap_or_else(|| Up::Closed("the connection was closed".to_owned()));
        tokio::time::sleep(travel(&world, &mut random)).await;
        world.until_open(host.pid(), 0).await;
        match message {
            Up::Message(body) => end.way.deliver(&end, body),
            Up::Closed(reason) => return end.way.disconnected(&end.life, end.peer, Some(end.link), reason),
        }
    }
}

async fn carry_down(
    world: Arc<World>,
    host: Arc<Host>,
    node: Arc<Node>,
    life: Arc<Life>,
    number: u64,
    mut told: mpsc::UnboundedReceiver<Vec<u8>>,
    lose: oneshot::Sender<()>,
) {
    let mut random = world.random(
        "node down",
        (life.number << 32) + (u64::from(host.index) << 24) + node.number,
    );
    loop {
        let message = tokio::select! {
            biased;
            () = life.until_dead() => break,
            message = told.recv() => message,
        };
        let Some(message) = message else { break };
        tokio::time::sleep(travel(&world, &mut random)).await;
        world.until_open(0, host.pid()).await;
        node.tree.heard(number, message);
    }
    tokio::time::sleep(travel(&world, &mut random)).await;
    // An error means that the node's end is over already.
    let _ = lose.send(());
}

fn travel(world: &World, random: &mut Random) -> Duration {
    Duration::from_micros(random.between(20, world.scenario.link_us_max))
}

/// A link's number, and where what goes down it is put.
type Link = (u64, mpsc::UnboundedSender<Vec<u8>>);
/// Who hears what comes from nodes.
type Heard = Arc<dyn Fn(HubEvent) + Send + Sync>;

/// A controller's end of the links to its nodes.
pub struct WayForNodes {
    links: Mutex<BTreeMap<PeerId, Link>>,
    count: AtomicU64,
    heard: Heard,
}

impl WayForNodes {
    /// Whoever is told here what comes from nodes.
    pub fn new(heard: impl Fn(HubEvent) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            links: Mutex::default(),
            count: AtomicU64::new(0),
            heard: Arc::new(heard),
        })
    }

    fn tell(&self, life: &Life, event: HubEvent) {
        let heard = Arc::clone(&self.heard);
        life.say(move |_| heard(event));
    }

    /// A new link, which ends the peer's old one; its number.
    fn connect(&self, life: &Life, peer: PeerId, down: mpsc::UnboundedSender<Vec<u8>>) -> u64 {
        self.disconnected(life, peer, None, "it dials anew".to_owned());
        let link = self.count.fetch_add(1, Ordering::Relaxed);
        lock(&self.links).insert(peer, (link, down));
        self.tell(life, HubEvent::Connected(peer));
        link
    }

    fn deliver(&self, end: &LinkEnd, body: Vec<u8>) {
        let present = lock(&self.links).get(&end.peer).map(|(link, _)| *link);
        if present == Some(end.link) {
            self.tell(&end.life, HubEvent::Message(end.peer, Body::detached(body)));
        }
    }

    /// The link of this number, or whichever there is.
    fn disconnected(&self, life: &Life, peer: PeerId, link: Option<u64>, reason: String) {
        let mut links = lock(&self.links);
        let present = links.get(&peer).map(|(link, _)| *link);
        if present.is_some() && (link.is_none() || link == present) {
            links.remove(&peer);
            drop(links);
            self.tell(life, HubEvent::Disconnected(peer, reason));
        }
    }
}

/// What the controller's actors send by.
pub struct NodeHub {
    /// Whose.
    pub life: Arc<Life>,
    /// Its end of the links.
    pub way: Arc<WayForNodes>,
}

impl ToNodes for NodeHub {
    fn send(&self, peer: PeerId, body: Vec<u8>) -> Result<(), LinkError> {
        match lock(&self.way.links).get(&peer) {
            Some((_, down)) => {
                // An error means that the link is just ending.
                let _ = down.send(body);
                Ok(())
            }
            None => Err(LinkError::Disconnected(peer)),
        }
    }

    fn disconnect(&self, peer: PeerId, reason: &str) {
        self.way.disconnected(&self.life, peer, None, reason.to_owned());
    }
}

/// The node agent of a host.
struct SimAgent {
    world: Arc<World>,
    node: Arc<Node>,
}

impl SimAgent {
    fn start(&self, member: Member, after: Duration) {
        lock(&self.node.waiting).insert(member);
        let (world, node) = (Arc::clone(&self.world), Arc::clone(&self.node));
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            let wanted = lock(&node.waiting).remove(&member);
            let Some(life) = world.in_charge().filter(|_| wanted && node.is_alive()) else {
                return;
            };
            if node.released.load(Ordering::Relaxed) {
                return start_failed(
                    &node,
                    member,
                    StartError::Cancelled("another agent is in charge".to_owned()),
                );
            }
            world.check_started_once(member);
            let process = world.new_process(&life, member);
            lock(&node.watched).insert(member, process);
        });
    }

    fn kill(&self, member: Member, reason: String) {
        if lock(&self.node.waiting).remove(&member) {
            return start_failed(&self.node, member, StartError::Cancelled(reason));
        }
        let process = lock(&self.node.watched).get(&member).cloned();
        if let Some(process) = process {
            self.world.history.note(&format!("a node kills {member}: {reason}"));
            self.world.check_silence(&process, &reason);
            process.end(&self.world, ExitCause::Signal(9), Some(reason));
        }
    }

    fn adopt(&self, member: Member) {
        match self.world.living(member) {
            Some(process) => {
                let pid = process.pid;
                lock(&self.node.watched).insert(member, process);
                let Member { worker, incarnation } = member;
                self.node.hear(NodeEvent::Started {
                    worker,
                    incarnation,
                    pid,
                });
            }
            None => start_failed(&self.node, member, StartError::Refused("it has ended".to_owned())),
        }
    }
}

fn start_failed(node: &Node, member: Member, error: StartError) {
    let Member { worker, incarnation } = member;
    node.hear(NodeEvent::StartFailed {
        worker,
        incarnation,
        error,
    });
}

impl Processes for SimAgent {
    fn command(&self, command: NodeCommand) -> Result<(), NodeError> {
        if !self.node.is_alive() {
            return Ok(());
        }
        match command {
            NodeCommand::Start {
                worker,
                incarnation,
                after,
            } => self.start(Member { worker, incarnation }, after),
            NodeCommand::Adopt { worker, incarnation } => self.adopt(Member { worker, incarnation }),
            NodeCommand::Kill {
                worker,
                incarnation,
                reason,
            } => self.kill(Member { worker, incarnation }, reason),
            NodeCommand::LetGo | NodeCommand::StopAll => {}
        }
        Ok(())
    }
}

/// What a controller asks of its nodes. One that it gives up counts as dead, though its node may be away and its process live on.
pub struct Noted<P> {
    processes: P,
    world: Arc<World>,
    given_up: Mutex<BTreeSet<Member>>,
}

impl<P> Noted<P> {
    /// Counts for the world what is asked of these.
    pub fn new(processes: P, world: &Arc<World>) -> Self {
        Self {
            processes,
            world: Arc::clone(world),
            given_up: Mutex::default(),
        }
    }
}

impl<P: Processes> Processes for Noted<P> {
    fn command(&self, command: NodeCommand) -> Result<(), NodeError> {
        if let &NodeCommand::Kill {
            worker, incarnation, ..
        } = &command
            && lock(&self.given_up).insert(Member { worker, incarnation })
        {
            self.world.losses.dies();
            self.world.gives_up(Member { worker, incarnation });
        }
        self.processes.command(command)
    }
}
