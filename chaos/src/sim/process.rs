//! A rank's process: the production actors and device thread, with a life that can be ended, stopped or made to hang.
//!
//! What a dead process would have done no longer reaches anybody: its ways out are closed at the moment of its death. A
//! stopped process keeps running inside, unseen, but nothing comes in or out until it goes on; its device thread stands
//! still.

use super::controller::Life;
use super::coroutine::{Coroutine, wait_for};
use super::faults::{flip, strike_loop};
use super::mesh::{Generational, SimPlane};
use super::world::World;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tarazed_actors::link::{LinkError, ToController};
use tarazed_actors::node::{Exit, ExitCause, NodeEvent};
use tarazed_actors::rank::{RankError, RankExit, RankParts, RankTree, StoreSource};
use tarazed_domain::OptimizerShardIndex;
use tarazed_kernels::CpuDevice;
use tarazed_protocol::data::cursor::DataCursor;
use tarazed_protocol::data::decision::DecisionSchedule;
use tarazed_protocol::message::{FromRank, Member, RestoreFrom};
use tarazed_train::StepError;
use tarazed_train::device_thread::{Command, DeviceThread};
use tarazed_train::feeder::Feeder;
use tarazed_train::generation::ShardSource;
use tarazed_train::state::RankState;
use tarazed_train::waiting::{GiveWay, Waiting};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Between two looks at something that does not announce itself.
const GIVE_WAY: Duration = Duration::from_millis(1);
/// Between two tries to reach a controller that stands still.
const DIAL_AGAIN: Duration = Duration::from_millis(50);
/// Between looks for another controller while a session lasts, at most; as `actors/src/rank/home.rs` has it.
const LOOK_WHEN_LINKED_MAX: Duration = Duration::from_millis(500);

/// Where a process stands.
#[derive(Default)]
struct State {
    stopped: bool,
    dead: bool,
    tree: Option<RankTree>,
    tasks: Vec<JoinHandle<()>>,
    device_waker: Option<Arc<Notify>>,
    parts: Vec<(Weak<Generational>, usize)>,
    up: Option<mpsc::UnboundedSender<Up>>,
    /// The controller that its session is to: what another one says is not heard.
    linked: u64,
    /// What it said and the controller has not read is lost with it.
    unheard: bool,
}

/// A session to a controller.
struct Session {
    /// Which controller.
    life: u64,
    /// Says that it is lost.
    lost: oneshot::Receiver<()>,
}

/// One rank's process.
pub struct Process {
    /// Its number, as the system would give it.
    pub pid: u32,
    /// Whose life it is.
    pub member: Member,
    /// The controller that started it, or to which it has found since.
    life: Mutex<Arc<Life>>,
    /// Its device thread hangs.
    stuck: Arc<AtomicBool>,
    /// Something was done to it for which it may have been silent.
    disturbed: AtomicBool,
    state: Mutex<State>,
    /// Something about the above changed.
    changed: Notify,
}

/// What goes up to the controller.
enum Up {
    Message(Vec<u8>),
    Closed(String),
}

impl Process {
    /// Starts a process: in a while it is there, and later it says that it is ready.
    pub fn start(world: &Arc<World>, life: &Arc<Life>, pid: u32, member: Member) -> Arc<Self> {
        let process = Arc::new(Self {
            pid,
            member,
            life: Mutex::new(Arc::clone(life)),
            stuck: Arc::default(),
            disturbed: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Notify::new(),
        });
        let boot = tokio::spawn(boot(Arc::clone(world), Arc::clone(&process)));
        process.lock().tasks.push(boot);
        process
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The controller that it listens to.
    pub fn life(&self) -> Arc<Life> {
        Arc::clone(&self.life.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// It may be silent from now on, by no fault of its own.
    pub fn disturb(&self) {
        self.disturbed.store(true, Ordering::Relaxed);
    }

    /// Whether it may have been silent.
    pub fn is_disturbed(&self) -> bool {
        self.disturbed.load(Ordering::Relaxed)
    }

    /// Whether it is there at all.
    pub fn is_alive(&self) -> bool {
        !self.lock().dead
    }

    /// Notes that it is a rank of a generation, whose others must hear of its death.
    pub fn takes_part(&self, shared: &Arc<Generational>, rank: usize) {
        self.lock().parts.push((Arc::downgrade(shared), rank));
    }

    /// Its device thread hangs from now on; the rest of it lives.
    pub fn hang(&self) {
        self.stuck.store(true, Ordering::Relaxed);
    }

    /// SIGSTOP, and SIGCONT after a while.
    pub fn stand_still(self: &Arc<Self>, time: Duration) {
        self.disturb();
        if std::mem::replace(&mut self.lock().stopped, true) {
            return;
        }
        let was_stuck = self.stuck.swap(true, Ordering::Relaxed);
        let me = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(time).await;
            me.lock().stopped = false;
            me.stuck.store(was_stuck, Ordering::Relaxed);
            me.changed.notify_waiters();
            if let Some(device) = me.lock().device_waker.clone() {
                device.notify_one();
            }
        });
    }

    /// Waits while it is stopped.
    async fn until_it_runs(&self) {
        loop {
            let changed = self.changed.notified();
            if !self.lock().stopped {
                return;
            }
            changed.await;
        }
    }

    /// It ends, as the system sees it, and its controller hears of it.
    pub fn end(self: &Arc<Self>, world: &Arc<World>, cause: ExitCause, killed: Option<String>) {
        let mut state = self.lock();
        if std::mem::replace(&mut state.dead, true) {
            return;
        }
        let (tree, tasks) = (state.tree.take(), std::mem::take(&mut state.tasks));
        let (parts, up) = (std::mem::take(&mut state.parts), state.up.take());
        drop(state);
        world.history.note(&format!("{} ends: {cause}", self.member));
        world.losses.dies();
        for task in tasks {
            task.abort();
        }
        if let Some(tree) = tree {
            tree.kill();
        }
        self.stuck.store(true, Ordering::Relaxed);
        let (mut random, me, world) = (
            world.random("death", u64::from(self.pid)),
            Arc::clone(self),
            Arc::clone(world),
        );
        self.lock().unheard = random.chance(0.5);
        // Its lifeline breaks first; then it may take its time to be gone, as with a device to give back.
        let lifeline = matches!(cause, ExitCause::Signal(_)) && random.chance(0.5);
        let gone_us = match lifeline && random.chance(0.2) {
            true => random.between(3_000, 2_000_000),
            false => random.between(50, 3_000),
        };
        if let Some(up) = up {
            let _ = up.send(Up::Closed("the connection was closed".to_owned()));
        }
        tokio::spawn(async move {
            if lifeline {
                tokio::time::sleep(Duration::from_micros(random.between(20, 300))).await;
                for life in world.lives() {
                    life.hear_of_dying(&me, killed.clone());
                }
                for host in &world.hosts {
                    host.hear_of_dying(&me, killed.clone());
                }
            }
            tokio::time::sleep(Duration::from_micros(random.between(50, 1_500))).await;
            for (shared, rank) in parts {
                if let Some(shared) = shared.upgrade() {
                    shared.lose(rank);
                }
            }
            tokio::time::sleep(Duration::from_micros(gone_us)).await;
            world.forget(&me);
            for life in world.lives() {
                life.hear_of(&me, cause.clone(), killed.clone());
            }
            for host in &world.hosts {
                host.hear_of(&me, cause.clone(), killed.clone());
            }
        });
    }

    /// What a controller said arrives.
    pub async fn told(&self, life: &Life, message: Vec<u8>) {
        self.until_it_runs().await;
        let state = self.lock();
        let tree = state.tree.clone().filter(|_| state.linked == life.number);
        drop(state);
        if let Some(tree) = tree {
            tree.told(message);
        }
    }

    /// Stays linked to whoever is in charge, as the run folder names it, until it ends.
    async fn stay(self: Arc<Self>, world: Arc<World>, tree: RankTree, mut session: Session) {
        let mut random = world.random("look", u64::from(self.pid));
        while let Some(reason) = self.until_over(&world, &mut session).await {
            tree.controller_lost(reason);
            session = loop {
                tokio::time::sleep(Duration::from_millis(random.between(1, 100))).await;
                self.until_it_runs().await;
                let found = world.in_charge().and_then(|life| self.link(&world, &life, &tree));
                if let Some(found) = found {
                    break found;
                }
            };
        }
    }

    /// Waits until the session is lost, or another controller is in charge; none where this process ended it.
    async fn until_over(&self, world: &World, session: &mut Session) -> Option<String> {
        let look = LOOK_WHEN_LINKED_MAX.min(Duration::from_millis(world.scenario.timeout_ms / 4));
        loop {
            tokio::select! {
                biased;
                lost = &mut session.lost => {
                    self.until_it_runs().await;
                    return lost.is_ok().then(|| "the controller closed the connection".to_owned());
                }
                () = tokio::time::sleep(look) => {}
            }
            self.until_it_runs().await;
            if world.in_charge().is_some_and(|life| life.number > session.life) {
                let mut state = self.lock();
                state.linked = 0;
                if let Some(up) = state.up.take() {
                    let _ = up.send(Up::Closed("another controller is in charge".to_owned()));
                }
                return Some("another controller is in charge".to_owned());
            }
        }
    }

    /// The first session, to the controller that started it; none if that does not answer in time.
    async fn first(self: &Arc<Self>, world: &Arc<World>, life: &Arc<Life>, tree: &RankTree) -> Option<Session> {
        let until = Instant::now() + Duration::from_millis(world.scenario.timeout_ms);
        loop {
            let session = self.link(world, life, tree);
            if session.is_some() || !life.is_alive() || Instant::now() >= until {
                return session;
            }
            // Another may be in charge by now, and waits for it in vain.
            self.disturb();
            tokio::time::sleep(DIAL_AGAIN).await;
            self.until_it_runs().await;
        }
    }

    /// Opens a session to a controller; none if nobody answers.
    fn link(self: &Arc<Self>, world: &Arc<World>, life: &Arc<Life>, tree: &RankTree) -> Option<Session> {
        let lost = life.connect(world, self)?;
        let (up, messages) = mpsc::unbounded_channel();
        let mut state = self.lock();
        (state.up, state.linked) = (Some(up.clone()), life.number);
        drop(state);
        *self.life.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(life);
        tokio::spawn(carry_up(
            Arc::clone(world),
            Arc::clone(self),
            Arc::clone(life),
            messages,
        ));
        let uplink = SimUplink {
            world: Arc::clone(world),
            process: Arc::clone(self),
            up,
        };
        tree.linked(Box::new(uplink), format!("process {}", self.pid), self.pid);
        let life = life.number;
        Some(Session { life, lost })
    }
}

/// From the program's start to its end.
async fn boot(world: Arc<World>, process: Arc<Process>) {
    let mut random = world.random("boot", u64::from(process.pid));
    let (life, member) = (process.life(), process.member);
    tokio::time::sleep(Duration::from_micros(random.between(500, 2_000))).await;
    if world.hosts.is_empty() {
        life.hear(NodeEvent::Started {
            worker: member.worker,
            incarnation: member.incarnation,
            pid: process.pid,
        });
    }
    for host in &world.hosts {
        host.hear_of_start(&process);
    }
    let start_us_max = world.scenario.start_ms_max * 1000;
    tokio::time::sleep(Duration::from_micros(random.between(1_000, start_us_max))).await;
    process.until_it_runs().await;
    let (exit_sender, exit) = oneshot::channel();
    let tree = match assemble(&world, &process, exit_sender).await {
        Ok(tree) => tree,
        Err(error) => return world.fail(&format!("{member} could not start: {error}")),
    };
    process.lock().tree = Some(tree.clone());
    let Some(session) = process.first(&world, &life, &tree).await else {
        return process.end(&world, ExitCause::Code(1), None);
    };
    let stays = tokio::spawn(Arc::clone(&process).stay(Arc::clone(&world), tree, session));
    process.lock().tasks.push(stays);
    let cause = match exit.await {
        Ok(Ok(RankExit::Left)) => ExitCause::Code(0),
        Ok(Ok(RankExit::ControllerLost)) => ExitCause::Code(1),
        Ok(Err(RankError(cause))) => {
            if cause.contains("panicked") {
                world.fail(&format!("{member}: {cause}"));
            }
            world.history.note(&format!("{member} fails: {cause}"));
            ExitCause::Code(1)
        }
        Err(_) => ExitCause::Code(1),
    };
    process.end(&world, cause, None);
}

/// The tree and the device thread of a rank, as `tarazed rank` puts them together.
async fn assemble(
    world: &Arc<World>,
    process: &Arc<Process>,
    exit: oneshot::Sender<Result<RankExit, RankError>>,
) -> Result<RankTree, String> {
    let config = process.life().config();
    let give_way: GiveWay = Arc::new(|| wait_for(tokio::time::sleep(GIVE_WAY)));
    let waiting = Waiting::GivingWay(give_way);
    let cursor = DataCursor::new(world.recipe.clone(), DecisionSchedule::of(&config)).map_err(|e| e.to_string())?;
    let feeder = Feeder::with_waiting(cursor, world.feed_rules(), world.samples(), waiting.clone());
    let store = StoreSource::over(
        world.store(u64::from(process.pid)).into(),
        tokio::runtime::Handle::current(),
    );
    let parts = RankParts {
        member: process.member,
        config: Arc::clone(&config),
        recipe: world.recipe.clone(),
        feeder: Arc::clone(&feeder),
        progress: Arc::default(),
        store: store.clone(),
        exit,
    };
    let progress = Arc::clone(&parts.progress);
    let tree = RankTree::start(parts).await.map_err(|e| e.to_string())?;
    let device = CpuDevice::new();
    let state = RankState::new(config, device, progress).map_err(|e| e.to_string())?;
    let device = DeviceThread {
        state: state
            .with_waiting(waiting)
            .harmed(flip(world, process.pid, process.member)),
        member: process.member,
        data_plane: Box::new(SimPlane {
            world: Arc::clone(world),
            process: Arc::clone(process),
        }),
        feeder,
        source: Box::new(SimSource(store)),
        events: tree.device_events(&device),
    };
    start_device(world, process, &tree, device);
    Ok(tree)
}

fn start_device(world: &Arc<World>, process: &Arc<Process>, tree: &RankTree, device: DeviceThread<CpuDevice>) {
    let commands: Arc<Mutex<VecDeque<Command>>> = Arc::default();
    let arrived = Arc::new(Notify::new());
    let (sink, rings) = (Arc::clone(&commands), Arc::clone(&arrived));
    tree.attach(Arc::new(move |command| {
        sink.lock().unwrap_or_else(PoisonError::into_inner).push_back(command);
        rings.notify_one();
        true
    }));
    let next = move || {
        wait_for(async {
            loop {
                let command = commands.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                if command.is_some() {
                    return command;
                }
                arrived.notified().await;
            }
        })
    };
    let freed = Arc::new(Notify::new());
    let coroutine = Coroutine::new(Arc::clone(&process.stuck), move || device.serve(next));
    let (world, member, on_thaw) = (Arc::clone(world), process.member, Arc::clone(&freed));
    let task = tokio::spawn(async move {
        let work = tokio::spawn(thawed(coroutine, on_thaw));
        let ends_with_this = AbortOnDrop(work.abort_handle());
        if work.await.is_err_and(|error| error.is_panic()) {
            world.fail(&format!("the device thread of {member} panicked"));
        }
        drop(ends_with_this);
    });
    let mut state = process.lock();
    state.tasks.push(task);
    state.device_waker = Some(freed);
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Runs the coroutine, and looks at it again whenever its process goes on after a stop.
async fn thawed(coroutine: Coroutine, freed: Arc<Notify>) {
    let mut coroutine = std::pin::pin!(coroutine);
    loop {
        tokio::select! {
            biased;
            () = &mut coroutine => return,
            () = freed.notified() => {}
        }
    }
}

struct SimSource(StoreSource);

impl ShardSource for SimSource {
    fn read(
        &self,
        from: &RestoreFrom,
        shard: OptimizerShardIndex,
        abort: &AtomicBool,
    ) -> Result<[Vec<f32>; 3], StepError> {
        wait_for(self.0.fetch(from, shard, abort))
    }
}

/// A rank's way to its controller.
struct SimUplink {
    world: Arc<World>,
    process: Arc<Process>,
    up: mpsc::UnboundedSender<Up>,
}

#[async_trait::async_trait]
impl ToController for SimUplink {
    fn send(&self, body: Vec<u8>) -> Result<(), LinkError> {
        if self.process.is_alive() {
            if let Ok(FromRank::Running { generation, .. }) = FromRank::decode(&body) {
                self.world.losses.runs(generation);
            }
            // An error means that the connection is over, which the rank hears by itself.
            let _ = self.up.send(Up::Message(body));
        }
        Ok(())
    }

    async fn close(self: Box<Self>) {
        let way = Duration::from_micros(self.world.scenario.link_us_max * 2);
        let _ = self.up.send(Up::Closed("it left".to_owned()));
        tokio::time::sleep(way).await;
    }
}

/// Carries messages to the controller: each takes its time, none overtakes another.
async fn carry_up(
    world: Arc<World>,
    process: Arc<Process>,
    life: Arc<Life>,
    mut messages: mpsc::UnboundedReceiver<Up>,
) {
    let member = process.member;
    let mut random = world.random("up", (life.number << 32) + u64::from(process.pid));
    while let Some(message) = messages.recv().await {
        process.until_it_runs().await;
        tokio::time::sleep(Duration::from_micros(random.between(20, world.scenario.link_us_max))).await;
        world.until_open(process.pid, 0).await;
        match message {
            Up::Message(_) if process.lock().unheard => {}
            Up::Message(body) => {
                world.history.note(&format!("{member} says {}", name_of(&body)));
                let is_line = matches!(FromRank::decode(&body), Ok(FromRank::Line { .. }));
                life.deliver(&process, body);
                if is_line {
                    strike_loop(&world, &life);
                }
            }
            Up::Closed(reason) => return life.disconnected(&process, reason),
        }
    }
}

/// What kind of message it is, for the history: its bytes hold times of the real world.
fn name_of(body: &[u8]) -> String {
    match FromRank::decode(body) {
        Ok(FromRank::Line { generation, line, .. }) => format!("line {} of generation {generation}", line.step),
        Ok(FromRank::Heartbeat { step, .. }) => format!("heartbeat at {step}"),
        Ok(FromRank::State { generation, report }) => {
            let passed = report.passed.map(|outcome| outcome.step.0);
            format!(
                "state for {generation}: {} shards, passed {passed:?}",
                report.shards.len()
            )
        }
        Ok(FromRank::Ready { .. }) => "ready".to_owned(),
        Ok(FromRank::Running { generation, base, .. }) => format!("generation {generation} runs from {base}"),
        Ok(FromRank::Failed { generation, cause, .. }) => format!("failed in {generation}: {cause}"),
        Ok(FromRank::Settled { step, .. }) => format!("step {step} settled"),
        Ok(FromRank::Saving { step, .. }) => format!("saves {step}"),
        Ok(FromRank::Paused { step, saving, .. }) => format!("paused at {step}, saving: {saving}"),
        Ok(FromRank::ShardSaved { step, shard, .. }) => format!("shard {shard} of {step} saved"),
        Ok(FromRank::ShardLost { step, shard, cause, .. }) => format!("shard {shard} of {step} lost: {cause}"),
        Err(error) => error.to_string(),
    }
}

/// How an end looks to the node agent.
pub fn exit_of(cause: ExitCause, killed: Option<String>) -> Exit {
    Exit {
        cause,
        killed,
        tail: Vec::new(),
        log: std::path::PathBuf::from("simulated"),
        at: std::time::Instant::now(),
        ran: Duration::ZERO,
    }
}
