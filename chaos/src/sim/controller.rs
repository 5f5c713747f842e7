//! One life of the controller: the production tree of actors between simulated edges, and its hold on the run folder.

use super::edges::{SimHub, SimNode, SimTrace, carry_down, write_trace};
use super::gate::Gate;
use super::nodes::{NodeHub, Noted, PROGRAM, WayForNodes};
use super::persons::PATIENCE;
use super::process::{Process, exit_of};
use super::world::World;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tarazed_actors::controller::{
    Begun, Claimed, Ear, Edges, End, JsonLines, LoopHarm, LoopMember, LoopRules, Nodes, NodesEnd, NodesParts, Notice,
    Past, RequestAnswer, TENURE_LOOK, TICK, TraceFile, Tree, TreeParts, WhileInCharge,
};
use tarazed_actors::link::{Body, HubEvent, PeerId};
use tarazed_actors::node::{ExitCause, NodeEvent, Processes};
use tarazed_actors::run_folder::{Existing, Occupied, RunFolder, Tenure};
use tarazed_domain::config::Config;
use tarazed_domain::{Generation, StepsCompleted};
use tarazed_protocol::coordinator::PastLife;
use tarazed_protocol::data::controller::Request;
use tarazed_protocol::message::Member;
use tarazed_protocol::trace::TraceLine;
use tokio::sync::{Notify, mpsc, oneshot};

/// Something for the controller's ear.
type Word = Box<dyn FnOnce(&Ear) + Send>;

/// How a life ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LifeEnd {
    /// It ended by itself, with this exit code and diagnosis.
    Code(u8, String),
    /// It was killed.
    Killed,
}

impl LifeEnd {
    /// The same wherever the run folder lies: it has another name in each simulation.
    fn without(self, folder: &Path) -> Self {
        match self {
            Self::Code(code, diagnosis) => Self::Code(code, diagnosis.replace(&folder.display().to_string(), "RUN")),
            Self::Killed => Self::Killed,
        }
    }
}

impl From<End> for LifeEnd {
    fn from(end: End) -> Self {
        Self::Code(end.code, end.diagnosis)
    }
}

/// How a life begins.
pub struct Start {
    /// Which it is, from 1 on.
    pub number: u64,
    /// The world's size.
    pub ranks: u32,
    /// What to do where another holds the run folder.
    pub occupied: Occupied,
    /// The program is started after this time.
    pub after: Duration,
}

/// One life of the controller.
pub struct Life {
    /// Which, from 1 on.
    pub number: u64,
    /// Closed while it stands still.
    pub gate: Arc<Gate>,
    config: Arc<Config>,
    dead: AtomicBool,
    died: Notify,
    /// Its hold on the run folder: none before it took it, and none after its end.
    tenure: Mutex<Option<Tenure>>,
    /// Ends parts of its closed loop, once its tree has begun.
    harm: Mutex<Option<LoopHarm>>,
    words: mpsc::UnboundedSender<Word>,
    connections: Mutex<BTreeMap<PeerId, mpsc::UnboundedSender<Vec<u8>>>>,
    processes: Mutex<BTreeMap<Member, Arc<Process>>>,
    /// Starts that wait for their time.
    waiting: Mutex<BTreeMap<Member, ()>>,
    /// Where nodes dial, once they may.
    nodes: Mutex<Option<Arc<WayForNodes>>>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn peer_of(member: Member) -> PeerId {
    PeerId {
        worker: member.worker,
        incarnation: member.incarnation,
    }
}

impl Life {
    fn new(number: u64, config: &Arc<Config>, words: mpsc::UnboundedSender<Word>) -> Arc<Self> {
        Arc::new(Self {
            number,
            gate: Arc::default(),
            config: Arc::clone(config),
            dead: AtomicBool::new(false),
            died: Notify::new(),
            tenure: Mutex::default(),
            harm: Mutex::default(),
            words,
            connections: Mutex::default(),
            processes: Mutex::default(),
            waiting: Mutex::default(),
            nodes: Mutex::default(),
        })
    }

    /// The config of this life.
    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config)
    }

    /// Whether the controller's process is there.
    pub fn is_alive(&self) -> bool {
        !self.dead.load(Ordering::Relaxed)
    }

    /// Whether it is in charge of the run folder.
    pub fn holds(&self) -> bool {
        lock(&self.tenure).as_ref().is_some_and(Tenure::holds)
    }

    /// SIGKILL.
    pub fn kill(&self) {
        self.dead.store(true, Ordering::Relaxed);
        self.died.notify_waiters();
    }

    /// SIGSTOP, and SIGCONT after a while.
    pub fn stand_still(&self, world: &World, time: Duration) {
        let (number, history) = (self.number, world.history.clone());
        let again = move || history.note(&format!("controller {number} goes on"));
        if self.gate.close_for(time, again) {
            world
                .history
                .note(&format!("controller {number} stands still for {} ms", time.as_millis()));
        }
    }

    /// Parts of its closed loop die, if it is at work.
    pub fn end_loop(&self, world: &World, members: &[LoopMember]) {
        if !self.is_alive() || self.gate.is_closed() {
            return;
        }
        let Some(harm) = lock(&self.harm).clone() else { return };
        let died: Vec<LoopMember> = members.iter().copied().filter(|member| harm.kill(*member)).collect();
        if !died.is_empty() {
            let number = self.number;
            world
                .history
                .note(&format!("fault: of the loop of controller {number} die {died:?}"));
            world.persons.loop_dies(number);
            world.loop_deaths.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits for its death.
    pub async fn until_dead(&self) {
        loop {
            let died = self.died.notified();
            if !self.is_alive() {
                return;
            }
            died.await;
        }
    }

    /// Every rank's process, in order.
    pub fn processes(&self) -> Vec<Arc<Process>> {
        lock(&self.processes)
            .values()
            .filter(|process| process.is_alive())
            .cloned()
            .collect()
    }

    /// A process that it started or found is its to watch.
    pub fn watches(&self, process: Arc<Process>) {
        lock(&self.processes).insert(process.member, process);
    }

    /// One of those that it watches.
    pub fn process(&self, member: Member) -> Option<Arc<Process>> {
        lock(&self.processes).get(&member).cloned()
    }

    /// A start waits for its time.
    pub fn will_start(&self, member: Member) {
        lock(&self.waiting).insert(member, ());
    }

    /// A start's time has come, or it is cancelled; false if there is none.
    pub fn starts(&self, member: Member) -> bool {
        lock(&self.waiting).remove(&member).is_some()
    }

    /// It watches nobody any more, and starts nobody.
    pub fn let_go(&self) {
        lock(&self.processes).clear();
        lock(&self.waiting).clear();
    }

    /// Tells it something that it hears as soon as it runs.
    pub fn say(&self, word: impl FnOnce(&Ear) + Send + 'static) {
        if self.is_alive() {
            // An error means that the life is over.
            let _ = self.words.send(Box::new(word));
        }
    }

    /// Somebody wants another number of ranks.
    pub fn resize(&self, ranks: u32) {
        self.say(move |ear| ear.resize(ranks));
    }

    /// A person asks for a decision; what becomes of it is told.
    pub fn ask(&self, request: Request, answered: impl FnOnce(Option<RequestAnswer>) + Send + 'static) {
        self.say(move |ear| {
            let ear = ear.clone();
            tokio::spawn(async move { answered(ear.ask(Box::new(request), PATIENCE).await) });
        });
    }

    /// A signal asks for the end.
    pub fn stop(&self) {
        self.say(Ear::stop);
    }

    /// The node agent's word.
    pub fn hear(&self, event: NodeEvent) {
        self.say(move |ear| ear.node(event));
    }

    /// A process begins to end; whoever watches it hears of it.
    pub fn hear_of_dying(&self, process: &Process, killed: Option<String>) {
        let Member { worker, incarnation } = process.member;
        if lock(&self.processes).contains_key(&process.member) {
            self.hear(NodeEvent::Ending {
                worker,
                incarnation,
                killed,
            });
        }
    }

    /// A process has ended; whoever watches it hears of it.
    pub fn hear_of(&self, process: &Process, cause: ExitCause, killed: Option<String>) {
        let Member { worker, incarnation } = process.member;
        if lock(&self.processes).remove(&process.member).is_some() {
            let exit = exit_of(cause, killed);
            self.hear(NodeEvent::Exited {
                worker,
                incarnation,
                exit,
            });
        }
    }

    /// A rank's message has arrived.
    pub fn deliver(&self, process: &Process, body: Vec<u8>) {
        let peer = peer_of(process.member);
        if lock(&self.connections).contains_key(&peer) {
            self.say(move |ear| ear.hub(HubEvent::Message(peer, Body::detached(body))));
        }
    }

    /// A rank's connection is over.
    pub fn disconnected(&self, process: &Process, reason: String) {
        let peer = peer_of(process.member);
        if lock(&self.connections).remove(&peer).is_some() {
            self.say(move |ear| ear.hub(HubEvent::Disconnected(peer, reason)));
        }
    }

    /// A rank dials; nothing if nobody answers. The receiver hears that the connection is lost.
    pub fn connect(self: &Arc<Self>, world: &Arc<World>, process: &Arc<Process>) -> Option<oneshot::Receiver<()>> {
        if !self.is_alive() || self.gate.is_closed() {
            return None;
        }
        let (down, messages) = mpsc::unbounded_channel();
        let (lose, lost) = oneshot::channel();
        let peer = peer_of(process.member);
        lock(&self.connections).insert(peer, down);
        self.say(move |ear| ear.hub(HubEvent::Connected(peer)));
        let (world, life, process) = (Arc::clone(world), Arc::clone(self), Arc::clone(process));
        tokio::spawn(carry_down(world, life, process, messages, lose));
        Some(lost)
    }

    /// Where nodes dial, if they may.
    pub fn way_for_nodes(&self) -> Option<Arc<WayForNodes>> {
        lock(&self.nodes).clone()
    }

    /// Where messages to a rank go, if it is connected.
    pub fn way_to(&self, peer: PeerId) -> Option<mpsc::UnboundedSender<Vec<u8>>> {
        lock(&self.connections).get(&peer).cloned()
    }

    /// Lets time pass for it, as long as it runs.
    async fn pass_time(self: Arc<Self>, world: Arc<World>, ear: Ear) {
        let mut random = world.random("ticks", self.number);
        while self.is_alive() {
            tokio::time::sleep(TICK).await;
            // Whether the tick or what came meanwhile is handled first, is chance.
            if self.gate.passed().await && random.chance(0.5) {
                tokio::time::sleep(Duration::from_micros(random.between(1, 2_000))).await;
                self.gate.passed().await;
            }
            ear.tick();
        }
    }

    /// Looks whether it is still in charge, as long as it runs.
    async fn look_after_tenure(self: Arc<Self>, ear: Ear) {
        while self.is_alive() {
            tokio::time::sleep(TENURE_LOOK).await;
            self.gate.passed().await;
            if self.is_alive() && !self.holds() {
                return ear.deposed();
            }
        }
    }
}

/// Runs one life from the start of the program to its end.
pub async fn live(world: &Arc<World>, start: Start) -> (u64, LifeEnd) {
    let Start { number, ranks, .. } = start;
    tokio::time::sleep(start.after).await;
    let (words, mut heard) = mpsc::unbounded_channel::<Word>();
    let config = match world.scenario.config(ranks, world.paths.dir()) {
        Ok(config) => Arc::new(config),
        Err(error) => return (number, LifeEnd::Code(2, error.to_string())),
    };
    let life = Life::new(number, &config, words);
    world.begin_life(&life);
    let beside = match start.occupied {
        Occupied::TakeOver => ", in the place of another",
        Occupied::Refuse => "",
    };
    world
        .history
        .note(&format!("controller {number} starts, {ranks} ranks{beside}"));
    let end = tokio::select! {
        biased;
        () = life.until_dead() => LifeEnd::Killed,
        end = run(world, &life, &mut heard, start.occupied) => end.without(world.paths.dir()),
    };
    world.history.note(&format!("controller {number} ends: {end:?}"));
    let holds = life.holds();
    life.kill();
    if end == LifeEnd::Killed && holds && world.random("torn", number).chance(0.3) {
        world.tear_trace();
    }
    if end != LifeEnd::Killed && holds {
        // An orderly end takes along what is left of the ranks; those of a killed one wait for another.
        for process in life.processes() {
            process.end(world, ExitCause::Signal(9), Some("the run is over".to_owned()));
        }
    }
    // The lock ends with its process.
    lock(&life.tenure).take();
    world.end_life(&life);
    (number, end)
}

/// Kills the actors of a life, whichever way it is left.
struct Fall(Begun);

impl Drop for Fall {
    fn drop(&mut self) {
        self.0.kill();
    }
}

async fn run(
    world: &Arc<World>,
    life: &Arc<Life>,
    heard: &mut mpsc::UnboundedReceiver<Word>,
    occupied: Occupied,
) -> LifeEnd {
    let halted = |error: String| LifeEnd::Code(3, error);
    let mut random = world.random("start", life.number);
    tokio::time::sleep(Duration::from_micros(random.between(500, 20_000))).await;
    life.gate.passed().await;
    let mut folder = match RunFolder::open_as(&life.config, Existing::ResumeOrBegin, occupied) {
        Ok(folder) => folder,
        Err(error) => return LifeEnd::Code(2, error.to_string()),
    };
    *lock(&life.tenure) = Some(folder.tenure());
    let lines = std::mem::take(&mut folder.lines);
    let store = world.store_of(life);
    let fence = match store.claim_while(Generation(1), || life.holds()).await {
        Ok(fence) => fence,
        Err(_) if !life.holds() => return End::deposed().into(),
        Err(error) => return LifeEnd::Code(33, error.to_string()),
    };
    if !life.holds() {
        return End::deposed().into();
    }
    let lives = world.past_lives();
    if !lives.iter().any(|past| past.lives) || world.has_one_given_up() {
        world.losses.new_life();
    }
    // Of processes on other hosts the run folder says no more than that they were started.
    let on_hosts = !world.hosts.is_empty();
    let lives = lives.into_iter().map(|past| PastLife {
        lives: past.lives || on_hosts,
        ..past
    });
    let past = match Past::new(lives.collect(), &world.paths.trace(), &lines) {
        Ok(past) => past,
        Err(error) => return halted(error.to_string()),
    };
    let tree = match Tree::start(parts(world, life, lines, Claimed { store, fence })).await {
        Ok(tree) => tree,
        Err(error) => return halted(error.to_string()),
    };
    let trace = match TraceFile::open(&world.paths, tree.weights_bytes()) {
        Ok(file) => file,
        Err(error) => return halted(error.to_string()),
    };
    if !life.holds() {
        return End::deposed().into();
    }
    // From now on ranks find it.
    world.put_in_charge(life);
    let (sink, to_write) = mpsc::unbounded_channel();
    tokio::spawn(write_trace(Arc::clone(world), Arc::clone(life), trace, to_write));
    let ear = tree.ear();
    // Ranks of the life before may be back before the tree has begun.
    while let Ok(word) = heard.try_recv() {
        word(&ear);
    }
    let (processes, nodes_end) = match processes(world, life, &tree, folder.tenure()).await {
        Ok(processes) => processes,
        Err(error) => return halted(error),
    };
    let mut fall = Fall(tree.begin(Edges {
        ranks: Box::new(SimHub::new(world, life)),
        processes,
        trace: Box::new(SimTrace(sink)),
        past,
    }));
    *lock(&life.harm) = Some(fall.0.loop_harm());
    tokio::spawn(Arc::clone(life).pass_time(Arc::clone(world), ear.clone()));
    tokio::spawn(Arc::clone(life).look_after_tenure(ear.clone()));
    let listening = async {
        while let Some(word) = heard.recv().await {
            life.gate.passed().await;
            word(&ear);
        }
        std::future::pending::<()>().await;
    };
    tokio::pin!(listening);
    let end = tokio::select! {
        biased;
        end = fall.0.end() => end.judged(life.holds()),
        () = &mut listening => return LifeEnd::Killed,
    };
    if let Some(nodes) = nodes_end.filter(|_| life.holds()) {
        tokio::select! {
            biased;
            () = nodes.end(end.code) => {}
            () = &mut listening => return LifeEnd::Killed,
        }
    }
    end.into()
}

/// Who starts processes: the node agent of this machine, or the nodes of several hosts.
async fn processes(
    world: &Arc<World>,
    life: &Arc<Life>,
    tree: &Tree,
    tenure: Tenure,
) -> Result<(Box<dyn Processes>, Option<NodesEnd>), String> {
    if world.hosts.is_empty() {
        let processes = SimNode::new(world, life);
        return Ok((Box::new(WhileInCharge { processes, tenure }), None));
    }
    let history = world.history.clone();
    let parts = NodesParts {
        ear: tree.ear(),
        notify: Arc::new(move |notice| history.note(&format!("{notice:?}"))),
        parent: tree.parent(),
        logs: PathBuf::from("simulated"),
        program: PROGRAM,
        patience_ms: world.scenario.timeout_ms,
    };
    let nodes = Nodes::begin(&life.config.cluster, parts).await?;
    let (way, end) = (WayForNodes::new(nodes.heard()), nodes.ending());
    nodes.open(Box::new(NodeHub {
        life: Arc::clone(life),
        way: Arc::clone(&way),
    }));
    *lock(&life.nodes) = Some(way);
    let processes = Noted::new(nodes, world);
    Ok((Box::new(WhileInCharge { processes, tenure }), Some(end)))
}

/// What the production tree of a life is made of.
fn parts(world: &Arc<World>, life: &Arc<Life>, lines: Vec<TraceLine>, claimed: Claimed) -> TreeParts {
    let (shown, checked) = (world.history.clone(), Arc::downgrade(world));
    TreeParts {
        config: life.config(),
        last_step: StepsCompleted(world.scenario.steps),
        lines,
        paths: world.paths.clone(),
        claimed,
        facts: world.facts.clone(),
        rules: LoopRules {
            config: world.scenario.loop_config(&life.config),
            facts: world.domains.clone(),
            bytes: Vec::new(),
            lanes: life.config.batch.lanes,
            recipe: world.recipe.clone(),
        },
        metrics: JsonLines::nowhere(),
        events: JsonLines::nowhere(),
        notify: Arc::new(move |notice| match notice {
            Notice::RankLost { member, cause } => shown.note(&format!("lost {member}: {cause}")),
            Notice::RankEnded { member, cause } => shown.note(&format!("{member} ended: {cause}")),
            Notice::Warning(text) if text.contains("have no copy left") => {
                shown.note(&format!("warning: {text}"));
                if let Some(world) = checked.upgrade() {
                    world.check_loss();
                }
            }
            Notice::Warning(text) => {
                shown.note(&format!("warning: {text}"));
                // What ranks hold is given up on purpose.
                let in_doubt = ["silent data corruption", "another state than the trace", "rolled back"];
                let in_doubt = in_doubt.iter().any(|why| text.contains(why));
                if let Some(world) = checked.upgrade().filter(|_| in_doubt) {
                    world.losses.new_life();
                }
            }
            Notice::Checkpoint { step, .. } => shown.note(&format!("checkpoint of {step}")),
            Notice::Decided(decisions) => shown.note(&format!("{} decisions", decisions.len())),
            _ => {}
        }),
    }
}
