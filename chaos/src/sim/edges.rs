//! Where a simulated controller touches the world: ways to the ranks, their processes, the trace.

use super::controller::{Life, lock};
use super::process::Process;
use super::random::Random;
use super::world::World;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tarazed_actors::controller::{Appended, TraceFile, TraceRequest, TraceSink};
use tarazed_actors::link::{LinkError, PeerId, ToRanks};
use tarazed_actors::node::{ExitCause, NodeCommand, NodeError, NodeEvent, Processes, StartError};
use tarazed_domain::{Incarnation, Mutant, WorkerId};
use tarazed_protocol::message::{Member, ToRank};
use tokio::sync::{mpsc, oneshot};

/// Carries messages to a rank: each takes its time, none overtakes another; the end of the controller ends it.
pub async fn carry_down(
    world: Arc<World>,
    life: Arc<Life>,
    process: Arc<Process>,
    mut messages: mpsc::UnboundedReceiver<Vec<u8>>,
    lose: oneshot::Sender<()>,
) {
    let mut random = world.random("down", (life.number << 32) + u64::from(process.pid));
    loop {
        let message = tokio::select! {
            biased;
            () = life.until_dead() => break,
            message = messages.recv() => message,
        };
        let Some(message) = message else { return };
        tokio::time::sleep(travel(&world, &mut random)).await;
        world.until_open(0, process.pid).await;
        process.told(&life, message).await;
    }
    tokio::time::sleep(travel(&world, &mut random)).await;
    // An error means that the rank is gone, or has a session to another controller.
    let _ = lose.send(());
}

fn travel(world: &World, random: &mut Random) -> Duration {
    Duration::from_micros(random.between(20, world.scenario.link_us_max))
}

/// The way to the ranks.
pub struct SimHub {
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
        match self.life.way_to(peer) {
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
    /// That of a life.
    pub fn new(world: &Arc<World>, life: &Arc<Life>) -> Self {
        Self {
            world: Arc::clone(world),
            life: Arc::clone(life),
            random: Mutex::new(world.random("hub", life.number)),
        }
    }

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

/// The node agent. Who is told to do nothing any more is not asked here: see `WhileInCharge`.
pub struct SimNode {
    world: Arc<World>,
    life: Arc<Life>,
}

impl SimNode {
    /// That of a life.
    pub fn new(world: &Arc<World>, life: &Arc<Life>) -> Self {
        Self {
            world: Arc::clone(world),
            life: Arc::clone(life),
        }
    }

    fn start(&self, member: Member, after: Duration) {
        self.life.will_start(member);
        let (world, life) = (Arc::clone(&self.world), Arc::clone(&self.life));
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            life.gate.passed().await;
            if !life.starts(member) || !life.is_alive() {
                return;
            }
            if life.holds() || Mutant::DeposedCommands.is_on() {
                world.check_start(&life, member);
                let process = world.new_process(&life, member);
                life.watches(process);
            } else {
                start_failed(
                    &life,
                    member,
                    StartError::Cancelled("another agent is in charge".to_owned()),
                );
            }
        });
    }

    fn kill(&self, member: Member, reason: String) {
        if self.life.starts(member) {
            start_failed(&self.life, member, StartError::Cancelled(reason));
        } else if let Some(process) = self.life.process(member) {
            self.world
                .history
                .note(&format!("the controller kills {member}: {reason}"));
            self.world.check_kill(&self.life, &process, &reason);
            process.end(&self.world, ExitCause::Signal(9), Some(reason));
        }
    }

    fn adopt(&self, worker: WorkerId, incarnation: Incarnation) {
        let member = Member { worker, incarnation };
        match self.world.living(member) {
            Some(process) => {
                let pid = process.pid;
                self.life.watches(process);
                self.life.hear(NodeEvent::Started {
                    worker,
                    incarnation,
                    pid,
                });
            }
            None => start_failed(&self.life, member, StartError::Refused("it has ended".to_owned())),
        }
    }
}

fn start_failed(life: &Life, member: Member, error: StartError) {
    let Member { worker, incarnation } = member;
    life.hear(NodeEvent::StartFailed {
        worker,
        incarnation,
        error,
    });
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
            } => self.start(Member { worker, incarnation }, after),
            NodeCommand::Kill {
                worker,
                incarnation,
                reason,
            } => self.kill(Member { worker, incarnation }, reason),
            NodeCommand::Adopt { worker, incarnation } => self.adopt(worker, incarnation),
            NodeCommand::LetGo => self.life.let_go(),
            NodeCommand::StopAll => {}
        }
        Ok(())
    }
}

/// The trace's writer: it writes the real file, a moment later, and each line is compared with the undisturbed run's.
pub struct SimTrace(pub mpsc::UnboundedSender<TraceRequest>);

impl TraceSink for SimTrace {
    fn request(&self, request: TraceRequest) {
        let _ = self.0.send(request);
    }
}

/// The thread behind it.
pub async fn write_trace(
    world: Arc<World>,
    life: Arc<Life>,
    mut file: TraceFile,
    mut requests: mpsc::UnboundedReceiver<TraceRequest>,
) {
    let mut random = world.random("trace", life.number);
    while let Some(request) = requests.recv().await {
        tokio::time::sleep(Duration::from_micros(random.between(20, 3_000))).await;
        life.gate.passed().await;
        if !life.is_alive() {
            return;
        }
        let line = match &request {
            TraceRequest::Append(step, text) => Some((*step, text.clone())),
            _ => None,
        };
        match file.perform(request) {
            Ok(done) => {
                if let Some((step, text)) = line {
                    world.check_line(&life, step, &text);
                }
                if let Some(appended) = done {
                    life.say(move |ear| ear.appended(appended));
                }
            }
            // It has a successor, whose trace this is not.
            Err(cause) if !life.holds() => return life.say(move |ear| ear.appended(Appended::Failed(cause))),
            Err(cause) => return world.fail(&format!("the trace cannot be written: {cause}")),
        }
    }
}
