//! One life of the controller: the production tree of actors between simulated edges.

use super::process::{Process, exit_of};
use super::random::Random;
use super::world::World;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tarazed_actors::controller::{
    Claimed, Ear, Edges, JsonLines, LoopRules, Notice, Past, TraceFile, TraceRequest, TraceSink, Tree, TreeParts,
};
use tarazed_actors::link::{Body, HubEvent, LinkError, PeerId, ToRanks};
use tarazed_actors::node::{ExitCause, NodeCommand, NodeError, NodeEvent, Processes, StartError};
use tarazed_actors::run_folder;
use tarazed_domain::config::Config;
use tarazed_domain::{Generation, StepsCompleted};
use tarazed_protocol::message::{Member, ToRank};
use tokio::sync::{Notify, mpsc};

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

/// One life of the controller.
pub struct Life {
    /// Which, from 1 on.
    pub number: u64,
    config: Arc<Config>,
    dead: AtomicBool,
    died: Notify,
    words: mpsc::UnboundedSender<Word>,
    connections: Mutex<BTreeMap<PeerId, mpsc::UnboundedSender<Vec<u8>>>>,
    processes: Mutex<BTreeMap<Member, Arc<Process>>>,
    /// Starts that wait for their time.
    waiting: Mutex<BTreeMap<Member, ()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn peer_of(member: Member) -> PeerId {
    PeerId {
        worker: member.worker,
        incarnation: member.incarnation,
    }
}

impl Life {
    /// The config of this life.
    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config)
    }

    /// Whether the controller's process is there.
    pub fn is_alive(&self) -> bool {
        !self.dead.load(Ordering::Relaxed)
    }

    /// SIGKILL.
    pub fn kill(&self) {
        self.dead.store(true, Ordering::Relaxed);
        self.died.notify_waiters();
    }

    /// Every rank's process, in order.
    pub fn processes(&self) -> Vec<Arc<Process>> {
        lock(&self.processes)
            .values()
            .filter(|process| process.is_alive())
            .cloned()
            .collect()
    }

    fn say(&self, word: impl FnOnce(&Ear) + Send + 'static) {
        if self.is_alive() {
            // An error means that the life is over.
            let _ = self.words.send(Box::new(word));
        }
    }

    /// Somebody wants another number of ranks.
    pub fn resize(&self, ranks: u32) {
        self.say(move |ear| ear.resize(ranks));
    }

    /// A signal asks for the end.
    pub fn stop(&self) {
        self.say(Ear::stop);
    }

    /// The node agent's word.
    pub fn hear(&self, event: NodeEvent) {
        self.say(move |ear| ear.node(event));
    }

    /// A process has ended.
    pub fn hear_of(&self, process: &Process, cause: ExitCause, killed: Option<String>) {
        let Member { worker, incarnation } = process.member;
        lock(&self.processes).remove(&process.member);
        let exit = exit_of(cause, killed);
        self.hear(NodeEvent::Exited {
            worker,
            incarnation,
            exit,
        });
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

    /// A rank dials; false if nobody is there.
    pub fn connect(self: &Arc<Self>, world: &Arc<World>, process: &Arc<Process>) -> bool {
        if !self.is_alive() {
            return false;
        }
        let (down, messages) = mpsc::unbounded_channel();
        let peer = peer_of(process.member);
        lock(&self.connections).insert(peer, down);
        self.say(move |ear| ear.hub(HubEvent::Connected(peer)));
        tokio::spawn(carry_down(
            Arc::clone(world),
            Arc::clone(self),
            Arc::clone(process),
            messages,
        ));
        true
    }
}

/// Carries messages to a rank: each takes its time, none overtakes another; the end of the controller ends it.
async fn carry_down(
    world: Arc<World>,
    life: Arc<Life>,
    process: Arc<Process>,
    mut messages: mpsc::UnboundedReceiver<Vec<u8>>,
) {
    let mut random = world.random("down", (life.number << 32) + u64::from(process.pid));
    loop {
        let died = life.died.notified();
        if !life.is_alive() {
            break;
        }
        let message = tokio::select! {
            biased;
            () = died => break,
            message = messages.recv() => message,
        };
        let Some(message) = message else { return };
        tokio::time::sleep(travel(&world, &mut random)).await;
        world.until_open(0, process.pid).await;
        process.told(message).await;
    }
    tokio::time::sleep(travel(&world, &mut random)).await;
    process.controller_lost(&world, &life).await;
}

fn travel(world: &World, random: &mut Random) -> Duration {
    Duration::from_micros(random.between(20, world.scenario.link_us_max))
}

struct SimHub {
    world: Arc<World>,
    life: Arc<Life>,
    random: Mutex<Random>,
}

impl ToRanks for SimHub {
    fn send(&self, peer: PeerId, body: Vec<u8>) -> Result<(), LinkError> {
        if !self.life.is_alive() {
            return Ok(());
        }
        self.note(peer, &body);
        match lock(&self.life.connections).get(&peer) {
            Some(down) => {
                // An error means that the connection is just ending.
                let _ = down.send(body);
                Ok(())
            }
            None => Err(LinkError::Disconnected(peer)),
        }
    }
}

impl SimHub {
    fn note(&self, peer: PeerId, body: &[u8]) {
        let (what, recovery) = match ToRank::decode(body) {
            Ok(ToRank::Fence { generation }) => (format!("fence {generation}"), true),
            Ok(ToRank::Begin(plan)) => {
                let copies = plan.shards.copies();
                self.world.losses.begins(plan.generation, copies);
                let ranks = plan.roster.len();
                (
                    format!("begin {} at {} with {ranks} ranks", plan.generation, plan.base),
                    true,
                )
            }
            Ok(ToRank::Pause { checkpoint, .. }) => (format!("pause, checkpoint: {checkpoint}"), true),
            Ok(ToRank::Checkpoint { from, .. }) => (format!("checkpoint from {from} on"), false),
            Ok(ToRank::Acknowledge { through, .. }) => (format!("acknowledge {through}"), false),
            Ok(ToRank::Shutdown) => ("shutdown".to_owned(), false),
            Err(error) => (error.to_string(), false),
        };
        self.world.history.note(&format!("to {peer}: {what}"));
        if recovery {
            self.world.in_recovery(&self.life, &mut lock(&self.random));
        }
    }
}

struct SimNode {
    world: Arc<World>,
    life: Arc<Life>,
}

impl Processes for SimNode {
    fn command(&self, command: NodeCommand) -> Result<(), NodeError> {
        if !self.life.is_alive() {
            return Ok(());
        }
        match command {
            NodeCommand::Start {
                worker,
                incarnation,
                after,
            } => {
                let member = Member { worker, incarnation };
                lock(&self.life.waiting).insert(member, ());
                let (world, life) = (Arc::clone(&self.world), Arc::clone(&self.life));
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    if lock(&life.waiting).remove(&member).is_some() && life.is_alive() {
                        let process = world.new_process(&life, member);
                        lock(&life.processes).insert(member, process);
                    }
                });
            }
            NodeCommand::Kill {
                worker,
                incarnation,
                reason,
            } => {
                let member = Member { worker, incarnation };
                if lock(&self.life.waiting).remove(&member).is_some() {
                    let error = StartError::Cancelled(reason);
                    self.life.hear(NodeEvent::StartFailed {
                        worker,
                        incarnation,
                        error,
                    });
                } else if let Some(process) = lock(&self.life.processes).get(&member).cloned() {
                    self.world
                        .history
                        .note(&format!("the controller kills {member}: {reason}"));
                    process.end(&self.world, ExitCause::Signal(9), Some(reason));
                }
            }
            NodeCommand::Adopt { worker, incarnation } => {
                let member = Member { worker, incarnation };
                let found = self.world.newest_of(worker);
                match found.filter(|process| process.member == member && process.is_alive()) {
                    Some(process) => {
                        process.adopted_by(&self.life);
                        let pid = process.pid;
                        lock(&self.life.processes).insert(member, process);
                        self.life.hear(NodeEvent::Started {
                            worker,
                            incarnation,
                            pid,
                        });
                    }
                    None => self.life.hear(NodeEvent::StartFailed {
                        worker,
                        incarnation,
                        error: StartError::Refused("it has ended".to_owned()),
                    }),
                }
            }
            NodeCommand::StopAll | NodeCommand::LetGo => {}
        }
        Ok(())
    }
}

/// The trace's writer: it writes the real file, a moment later, and each line is compared with the undisturbed run's.
struct SimTrace(mpsc::UnboundedSender<TraceRequest>);

impl TraceSink for SimTrace {
    fn request(&self, request: TraceRequest) {
        let _ = self.0.send(request);
    }
}

async fn write_trace(
    world: Arc<World>,
    life: Arc<Life>,
    mut file: TraceFile,
    mut requests: mpsc::UnboundedReceiver<TraceRequest>,
) {
    let mut random = world.random("trace", life.number);
    while let Some(request) = requests.recv().await {
        tokio::time::sleep(Duration::from_micros(random.between(20, 3_000))).await;
        if !life.is_alive() {
            return;
        }
        if let TraceRequest::Append(step, text) = &request {
            world.check_line(*step, text);
        }
        match file.perform(request) {
            Ok(Some(appended)) => life.say(move |ear| ear.appended(appended)),
            Ok(None) => {}
            Err(cause) => return world.fail(&format!("the trace cannot be written: {cause}")),
        }
    }
}

/// Runs one life from the start of the program to its end.
pub async fn live(world: &Arc<World>, number: u64, ranks: u32) -> LifeEnd {
    let (words, mut heard) = mpsc::unbounded_channel::<Word>();
    let config = match world.scenario.config(ranks, world.paths.dir()) {
        Ok(config) => Arc::new(config),
        Err(error) => return LifeEnd::Code(2, error.to_string()),
    };
    let life = Arc::new(Life {
        number,
        config: Arc::clone(&config),
        dead: AtomicBool::new(false),
        died: Notify::new(),
        words,
        connections: Mutex::default(),
        processes: Mutex::default(),
        waiting: Mutex::default(),
    });
    world.begin_life(&life);
    world
        .history
        .note(&format!("controller {number} starts, {ranks} ranks"));
    let end = tokio::select! {
        biased;
        () = until_dead(&life) => LifeEnd::Killed,
        end = run(world, &life, &mut heard) => end,
    };
    world.history.note(&format!("controller {number} ends: {end:?}"));
    life.kill();
    if end == LifeEnd::Killed && world.random("torn", number).chance(0.3) {
        world.tear_trace();
    }
    if end != LifeEnd::Killed {
        // An orderly end takes along what is left of the ranks; those of a killed one wait for another.
        for process in life.processes() {
            process.end(world, ExitCause::Signal(9), Some("the run is over".to_owned()));
        }
    }
    end
}

async fn until_dead(life: &Life) {
    loop {
        let died = life.died.notified();
        if !life.is_alive() {
            return;
        }
        died.await;
    }
}

/// Kills the actors of a life, whichever way it is left.
struct Fall(tarazed_actors::controller::Begun);

impl Drop for Fall {
    fn drop(&mut self) {
        self.0.kill();
    }
}

async fn run(world: &Arc<World>, life: &Arc<Life>, heard: &mut mpsc::UnboundedReceiver<Word>) -> LifeEnd {
    let lines = match run_folder::read_trace(&world.paths.trace()) {
        Ok(lines) => lines,
        Err(error) => return LifeEnd::Code(3, error.to_string()),
    };
    let lives = world.past_lives();
    if !lives.iter().any(|past| past.lives) {
        world.losses.new_life();
    }
    let past = match Past::new(lives, &world.paths.trace(), &lines) {
        Ok(past) => past,
        Err(error) => return LifeEnd::Code(3, error.to_string()),
    };
    let store = world.store(1_000_000 + life.number);
    let fence = match store.claim(Generation(1)).await {
        Ok(fence) => fence,
        Err(error) => return LifeEnd::Code(33, error.to_string()),
    };
    let (shown, checked) = (world.history.clone(), Arc::downgrade(world));
    let parts = TreeParts {
        config: life.config(),
        last_step: StepsCompleted(world.scenario.steps),
        lines,
        paths: world.paths.clone(),
        claimed: Claimed { store, fence },
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
    };
    let tree = match Tree::start(parts).await {
        Ok(tree) => tree,
        Err(error) => return LifeEnd::Code(3, error.to_string()),
    };
    let trace = match TraceFile::open(&world.paths, tree.weights_bytes()) {
        Ok(file) => file,
        Err(error) => return LifeEnd::Code(3, error.to_string()),
    };
    let (sink, to_write) = mpsc::unbounded_channel();
    tokio::spawn(write_trace(Arc::clone(world), Arc::clone(life), trace, to_write));
    let ear = tree.ear();
    // Ranks of the life before may be back before the tree has begun.
    while let Ok(word) = heard.try_recv() {
        word(&ear);
    }
    let begun = tree.begin(Edges {
        ranks: Box::new(SimHub {
            world: Arc::clone(world),
            life: Arc::clone(life),
            random: Mutex::new(world.random("hub", life.number)),
        }),
        processes: Box::new(SimNode {
            world: Arc::clone(world),
            life: Arc::clone(life),
        }),
        trace: Box::new(SimTrace(sink)),
        past,
    });
    let mut fall = Fall(begun);
    let listening = async {
        while let Some(word) = heard.recv().await {
            word(&ear);
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        end = fall.0.end() => LifeEnd::Code(end.code, end.diagnosis),
        () = listening => LifeEnd::Killed,
    }
}
