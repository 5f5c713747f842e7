//! `Rank`: passes commands to the device thread and its reports to the controller. It translates; it does not decide.
//!
//! - **SUP-2** Messages of an older generation than the newest heard of are dropped.
//! - **SUP-4** The device thread does the work; this actor can abort it at any time.

use super::feeder::{self, FeederMessage};
use super::restore::StoreSource;
use super::root::RootMessage;
use super::shard::{OnDevice, OptimizerShard, Saving, ShardMessage};
use super::writer::WriterMessage;
use super::{RankError, RankExit};
use crate::link::{LinkError, ToController};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tarazed_domain::config::Config;
use tarazed_domain::{Generation, OptimizerShardIndex, Rank, StepsCompleted};
use tarazed_protocol::data::cursor::Recipe;
use tarazed_protocol::data::decision::{Decision, DecisionSchedule};
use tarazed_protocol::message::{BeginPlan, FromRank, ItemDigest, Member, StateReport, StepLine, ToRank};
use tarazed_protocol::placement::ShardHolder;
use tarazed_train::StepError;
use tarazed_train::device_thread::{Command, DeviceEvents, GenerationControl};
use tarazed_train::feeder::Feeder;
use tarazed_train::generation::{Paused, ShardToSave};
use tarazed_train::host::HostVisible;
use tarazed_train::progress::Progress;

/// The way to the device thread; says whether it is still there.
pub type CommandSink = Arc<dyn Fn(Command) -> bool + Send + Sync>;

pub enum RankMessage {
    /// The device thread listens here.
    DeviceChannel(CommandSink),
    /// The writer of checkpoints.
    Writer(ActorRef<WriterMessage>),
    /// A session to a controller is up: the first one, or that of the controller that took over.
    Linked {
        uplink: Box<dyn ToController>,
        /// Of the data plane's listener.
        address: String,
        pid: u32,
    },
    /// The controller said this.
    Told(Vec<u8>),
    /// The controller is gone.
    ControllerLost(String),
    /// No new one has come since the session of this number.
    Orphaned(u64),
    /// Tell the controller.
    Tell(FromRank),
    /// The device thread finished a step.
    Line(Generation, Box<StepLine>),
    /// The device thread wants these shards saved.
    Save(Generation, StepsCompleted, Vec<Box<dyn Saving>>),
    /// The rank itself is broken.
    Broken(String),
    /// Time for a heartbeat.
    Beat,
}
impl ractor::Message for RankMessage {}

/// What the device thread says, as messages to the actor.
pub struct DeviceReports<D> {
    pub rank: ActorRef<RankMessage>,
    /// Where the state lies that is to be saved.
    pub device: D,
    /// What is said besides where the device's memory is too small.
    pub memory_hint: String,
}

/// An error that ends the process, with what is known of the device's memory where that is why.
pub fn explained(error: &StepError, memory_hint: &str) -> String {
    match error.shortage() {
        Some(shortage) if !memory_hint.is_empty() => format!("{shortage}; {memory_hint}"),
        _ => error.to_string(),
    }
}

impl<D> DeviceReports<D> {
    fn tell(&self, message: FromRank) {
        self.cast(RankMessage::Tell(message));
    }

    fn cast(&self, message: RankMessage) {
        // An error means that the process ends already.
        let _ = self.rank.cast(message);
    }
}

impl<D: HostVisible + Clone> DeviceEvents<D> for DeviceReports<D> {
    fn running(&self, generation: Generation, base: StepsCompleted) {
        self.tell(FromRank::Running { generation, base });
    }

    fn line(&self, generation: Generation, line: StepLine) {
        self.cast(RankMessage::Line(generation, Box::new(line)));
    }

    fn save(&self, generation: Generation, step: StepsCompleted, shards: Vec<ShardToSave<D>>) {
        let on_device = |shard| -> Box<dyn Saving> {
            let device = self.device.clone();
            Box::new(OnDevice { device, shard })
        };
        let shards = shards.into_iter().map(on_device).collect();
        self.cast(RankMessage::Save(generation, step, shards));
    }

    fn paused(&self, generation: Generation, paused: Paused) {
        self.tell(FromRank::Paused {
            generation,
            step: paused.step,
            saving: paused.saving,
        });
    }

    fn failed(&self, generation: Generation, error: &StepError) {
        self.tell(FromRank::Failed {
            generation,
            cause: error.to_string(),
            suspects: error.suspects(),
            fatal: error.is_fatal(),
            dispute: error.dispute(),
        });
    }

    fn settled(&self, generation: Generation, step: StepsCompleted, digest: ItemDigest) {
        self.tell(FromRank::Settled {
            generation,
            step,
            digest,
        });
    }

    fn report(&self, generation: Generation, mut report: StateReport) {
        // Each line goes by itself: thousands of them may be too large for one message.
        for line in std::mem::take(&mut report.lines) {
            let spent_us = Vec::new();
            self.tell(FromRank::Line {
                generation,
                line,
                spent_us,
            });
        }
        self.tell(FromRank::State { generation, report });
    }

    fn broken(&self, error: &StepError) {
        self.cast(RankMessage::Broken(explained(error, &self.memory_hint)));
    }
}

pub struct RankArguments {
    pub member: Member,
    pub config: Arc<Config>,
    pub recipe: Recipe,
    pub feed: Arc<Feeder>,
    pub feeder: ActorRef<FeederMessage>,
    pub progress: Arc<Progress>,
    pub store: StoreSource,
    pub root: ActorRef<RootMessage>,
}

pub struct RankActorState {
    arguments: RankArguments,
    device: Option<CommandSink>,
    writer: Option<ActorRef<WriterMessage>>,
    uplink: Option<Box<dyn ToController>>,
    /// Sessions so far.
    links: u64,
    control: Option<GenerationControl>,
    newest: Generation,
    shards: BTreeMap<OptimizerShardIndex, ActorRef<ShardMessage>>,
}

pub struct RankActor;

impl Actor for RankActor {
    type Msg = RankMessage;
    type State = RankActorState;
    type Arguments = RankArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        arguments: RankArguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        let heartbeat = Duration::from_millis(arguments.config.timeouts().heartbeat_ms.max(10));
        myself.send_interval(heartbeat, || RankMessage::Beat);
        Ok(RankActorState {
            arguments,
            device: None,
            writer: None,
            uplink: None,
            links: 0,
            control: None,
            newest: Generation(0),
            shards: BTreeMap::new(),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RankMessage::DeviceChannel(sink) => state.device = Some(sink),
            RankMessage::Writer(writer) => state.writer = Some(writer),
            RankMessage::Linked { uplink, address, pid } => {
                state.uplink = Some(uplink);
                state.links += 1;
                let newest = state.newest;
                state.tell(&FromRank::Ready { address, pid, newest })?;
            }
            RankMessage::Told(bytes) => state.told(&myself, &bytes).await?,
            RankMessage::ControllerLost(reason) => {
                tracing::warn!(reason, "the controller is gone");
                state.uplink = None;
                if state.newest == Generation(0) {
                    state.end_without_controller()?; // it holds nothing that a new one could use
                } else {
                    // The step and the lines are held, and the data plane goes on by itself (STEP-6).
                    let (links, patience_ms) = (state.links, state.arguments.config.timeouts().orphan_ms);
                    myself.send_after(Duration::from_millis(patience_ms), move || RankMessage::Orphaned(links));
                }
            }
            RankMessage::Orphaned(links) => {
                if state.uplink.is_none() && state.links == links {
                    state.end_without_controller()?;
                }
            }
            RankMessage::Tell(message) => state.tell(&message)?,
            RankMessage::Line(generation, line) => {
                let spent_us = state.arguments.progress.spent_us().to_vec();
                state.tell(&FromRank::Line {
                    generation,
                    line: *line,
                    spent_us,
                })?;
            }
            RankMessage::Save(generation, step, shards) => state.save(generation, step, shards)?,
            RankMessage::Broken(cause) => state.arguments.root.cast(RootMessage::Exit(Err(RankError(cause))))?,
            RankMessage::Beat => state.beat()?,
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _myself: ActorRef<Self::Msg>,
        event: SupervisionEvent,
        _state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match crate::supervision::death(event) {
            Some(death) if !death.orderly => Err(format!("an optimizer shard's actor {}", death.cause).into()),
            _ => Ok(()),
        }
    }
}

impl RankActorState {
    /// Tells the controller, if there is one; what is lost with a session is asked for again by the next fence.
    fn tell(&self, message: &FromRank) -> Result<(), ActorProcessingErr> {
        let Some(uplink) = &self.uplink else {
            return Ok(());
        };
        match uplink.send(message.encode().map_err(|e| e.to_string())?) {
            Ok(()) => Ok(()),
            // That the session is over is about to be said.
            Err(LinkError::Disconnected(_) | LinkError::Overrun { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn end_without_controller(&self) -> Result<(), ActorProcessingErr> {
        self.abort();
        self.arguments
            .root
            .cast(RootMessage::Exit(Ok(RankExit::ControllerLost)))?;
        Ok(())
    }

    fn device(&self, command: Command) -> Result<(), ActorProcessingErr> {
        let device = self.device.as_ref().ok_or("the device thread is not started")?;
        if device(command) {
            Ok(())
        } else {
            Err("the device thread is gone".into())
        }
    }

    fn abort(&self) {
        if let Some(control) = &self.control {
            control.abort();
        }
    }

    async fn told(&mut self, myself: &ActorRef<RankMessage>, bytes: &[u8]) -> Result<(), ActorProcessingErr> {
        match ToRank::decode(bytes).map_err(|e| e.to_string())? {
            ToRank::Fence { generation } if generation > self.newest => {
                self.newest = generation;
                self.abort();
                self.device(Command::Report { generation })?;
            }
            ToRank::Begin(plan) if plan.generation >= self.newest => {
                plan.check().map_err(|e| e.to_string())?;
                self.begin(myself, plan).await?;
            }
            ToRank::Pause { generation, checkpoint } => {
                if let Some(control) = self.control.as_ref().filter(|control| control.generation == generation) {
                    control.switches.checkpoint.fetch_or(checkpoint, Ordering::Relaxed);
                    control.switches.pause.store(true, Ordering::Relaxed);
                }
            }
            ToRank::Checkpoint { generation, from } => {
                if let Some(control) = self.control.as_ref().filter(|control| control.generation == generation) {
                    control.switches.checkpoint_from.store(from.0, Ordering::Relaxed);
                }
            }
            ToRank::Acknowledge { through, decisions } => self.acknowledge(through, decisions)?,
            ToRank::Shutdown => self.leave().await?,
            ToRank::Fence { .. } | ToRank::Begin(_) => {} // of a generation that is over
        }
        Ok(())
    }

    async fn begin(&mut self, myself: &ActorRef<RankMessage>, plan: Box<BeginPlan>) -> Result<(), ActorProcessingErr> {
        self.newest = plan.generation;
        self.abort();
        let control = GenerationControl::new(plan.generation)?;
        control
            .switches
            .acknowledged
            .store(plan.acknowledged.0, Ordering::Relaxed);
        self.control = Some(control.clone());
        let rank = plan
            .roster
            .iter()
            .position(|entry| entry.member == self.arguments.member)
            .ok_or("the plan's roster does not name this rank")?;
        feeder::begin(
            &self.arguments.feed,
            &self.arguments.recipe,
            DecisionSchedule::of(&self.arguments.config),
            &plan,
            Rank(rank as u32),
        )?;
        let held = |holders: &[ShardHolder]| holders.iter().any(|holder| holder.rank.index() == rank);
        let mine: Vec<OptimizerShardIndex> = (0..)
            .map(OptimizerShardIndex)
            .zip(plan.shards.iter())
            .filter_map(|(shard, holders)| held(holders).then_some(shard))
            .collect();
        self.hold(myself, &mine).await?;
        self.device(Command::Begin { plan, control })
    }

    /// One actor for each shard held, no more.
    async fn hold(
        &mut self,
        myself: &ActorRef<RankMessage>,
        mine: &[OptimizerShardIndex],
    ) -> Result<(), ActorProcessingErr> {
        self.shards.retain(|shard, actor| {
            let stays = mine.contains(shard);
            if !stays {
                actor.stop(Some("the shard moved to another rank".to_owned()));
            }
            stays
        });
        let writer = self.writer.clone().ok_or("the checkpoint writer is not started")?;
        for &shard in mine {
            if let Entry::Vacant(vacant) = self.shards.entry(shard) {
                let arguments = (shard, writer.clone());
                let (actor, _) = Actor::spawn_linked(None, OptimizerShard, arguments, myself.get_cell()).await?;
                vacant.insert(actor);
            }
        }
        Ok(())
    }

    fn acknowledge(&self, through: StepsCompleted, decisions: Vec<Decision>) -> Result<(), ActorProcessingErr> {
        if let Some(control) = &self.control {
            control.switches.acknowledged.fetch_max(through.0, Ordering::Relaxed);
        }
        self.arguments
            .feeder
            .cast(FeederMessage::Record { through, decisions })?;
        Ok(())
    }

    /// The generation is the one that saved, not the newest heard of: a fence may have come in between.
    fn save(
        &self,
        generation: Generation,
        step: StepsCompleted,
        shards: Vec<Box<dyn Saving>>,
    ) -> Result<(), ActorProcessingErr> {
        if !shards.is_empty() {
            self.tell(&FromRank::Saving { generation, step })?;
        }
        for shard in shards {
            let index = shard.shard();
            match self.shards.get(&index) {
                Some(actor) => actor.cast(ShardMessage::Snapshot {
                    step,
                    generation,
                    shard,
                })?,
                // Dropping the ticket lets the device thread go on.
                None => self.tell(&FromRank::ShardLost {
                    generation,
                    step,
                    shard: index,
                    cause: "the shard has moved to another rank".to_owned(),
                    full: false,
                })?,
            }
        }
        Ok(())
    }

    fn beat(&self) -> Result<(), ActorProcessingErr> {
        let progress = &self.arguments.progress;
        self.tell(&FromRank::Heartbeat {
            generation: self
                .control
                .as_ref()
                .map_or(Generation(0), |control| control.generation),
            step: progress.step(),
            progress: progress.work(),
            phase: progress.phase().name().to_owned(),
            lane_us: progress.lane_us(),
            stored_bytes: self.arguments.store.stored_bytes(),
        })
    }

    async fn leave(&mut self) -> Result<(), ActorProcessingErr> {
        self.device(Command::Exit)?;
        if let Some(uplink) = self.uplink.take() {
            uplink.close().await;
        }
        self.arguments.root.cast(RootMessage::Exit(Ok(RankExit::Left)))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tarazed_kernels::DeviceError;

    /// The hint takes the place of the general remedy; other errors are told as they are.
    #[test]
    fn a_shortage_of_memory_is_told_with_what_is_known_of_the_plan() {
        let short = StepError::Device(DeviceError::OutOfMemory {
            needed_bytes: 5,
            memory: None,
        });
        assert_eq!(
            explained(&short, "the largest is x"),
            "out of device memory: 5 bytes more were needed; the largest is x"
        );
        assert_eq!(explained(&short, ""), short.to_string());
        let other = StepError::Data("gone".to_owned());
        assert_eq!(explained(&other, "the largest is x"), "data: gone");
    }
}
