//! `RankRoot`: the parent of a rank process's actors. Whatever of a rank fails, the process ends with the cause (SUP-1).

use super::actor::{DeviceReports, RankActor, RankArguments, RankMessage};
use super::feeder::DataFeeder;
use super::restore::StoreSource;
use super::writer::{CheckpointWriter, WriterArguments};
use super::{RankError, RankExit};
use crate::supervision::death;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::sync::Arc;
use std::sync::mpsc;
use tarazed_domain::ShardLayout;
use tarazed_domain::config::Config;
use tarazed_kernels::CpuDevice;
use tarazed_protocol::data::cursor::Recipe;
use tarazed_protocol::message::Member;
use tarazed_train::device_thread::{DeviceEvents, DeviceThread};
use tarazed_train::feeder::Feeder;
use tarazed_train::progress::Progress;
use tokio::sync::oneshot;

pub type ExitSender = oneshot::Sender<Result<RankExit, RankError>>;

pub struct RootArguments {
    pub member: Member,
    pub config: Arc<Config>,
    pub recipe: Recipe,
    pub feeder: Arc<Feeder>,
    pub progress: Arc<Progress>,
    pub store: StoreSource,
    pub exit: ExitSender,
}

pub enum RootMessage {
    /// The process is to end like this.
    Exit(Result<RankExit, RankError>),
}
impl ractor::Message for RootMessage {}

pub struct RankRoot;

/// Handles on a started rank.
pub struct RankTree {
    pub rank: ActorRef<RankMessage>,
    root: ActorRef<RootMessage>,
}

pub struct Children {
    rank: ActorRef<RankMessage>,
}

impl RankRoot {
    /// Starts the tree; the device thread follows with [`RankTree::start_device`].
    ///
    /// # Errors
    /// If the actor system refuses.
    pub async fn start(arguments: RootArguments) -> Result<RankTree, RankError> {
        let (sender, receiver) = oneshot::channel();
        let (root, _) = Actor::spawn(None, Self, (arguments, sender))
            .await
            .map_err(|e| RankError(format!("actors: {e}")))?;
        let Children { rank } = receiver
            .await
            .map_err(|_| RankError("the rank's root did not start".to_owned()))?;
        Ok(RankTree { rank, root })
    }
}

impl RankTree {
    pub fn cell(&self) -> ActorCell {
        self.root.get_cell()
    }

    pub fn device_events(&self) -> Arc<dyn DeviceEvents<CpuDevice>> {
        Arc::new(DeviceReports(self.rank.clone()))
    }

    /// Starts the device thread, whose end, if it was not told to end, ends the process.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn start_device(&self, device: DeviceThread<CpuDevice>) -> Result<(), RankError> {
        let (sender, receiver) = mpsc::channel();
        let _ = self.rank.cast(RankMessage::DeviceChannel(sender));
        let root = self.root.clone();
        let spawned = std::thread::Builder::new().name("device".to_owned()).spawn(move || {
            let work = std::panic::AssertUnwindSafe(|| device.run(&receiver));
            if let Err(panic) = std::panic::catch_unwind(work) {
                let text = panic
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                    .unwrap_or_default();
                let _ = root.cast(RootMessage::Exit(Err(RankError(format!(
                    "device thread panicked: {text}"
                )))));
            }
        });
        spawned.map(drop).map_err(|e| RankError(format!("device thread: {e}")))
    }
}

impl Actor for RankRoot {
    type Msg = RootMessage;
    type State = Option<ExitSender>;
    type Arguments = (RootArguments, oneshot::Sender<Children>);

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        (arguments, started): Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        let parent = myself.get_cell();
        let (feeder, _) = Actor::spawn_linked(None, DataFeeder, Arc::clone(&arguments.feeder), parent.clone()).await?;
        let layout =
            tarazed_model::parameter_layout(&arguments.config.model, arguments.config.optimizer.block_elements);
        let shards = ShardLayout::new(&layout, arguments.config.optimizer.shards);
        let rank_arguments = RankArguments {
            member: arguments.member,
            config: arguments.config,
            recipe: arguments.recipe,
            feed: arguments.feeder,
            feeder,
            progress: arguments.progress,
            root: myself.clone(),
        };
        let (rank, _) = Actor::spawn_linked(None, RankActor, rank_arguments, parent.clone()).await?;
        let writer_arguments = WriterArguments {
            layout: shards,
            store: arguments.store,
            rank: rank.clone(),
        };
        let (writer, _) = Actor::spawn_linked(None, CheckpointWriter, writer_arguments, parent).await?;
        rank.cast(RankMessage::Writer(writer))?;
        if started.send(Children { rank }).is_err() {
            return Err("nobody waits for this rank".into());
        }
        Ok(Some(arguments.exit))
    }

    async fn handle(
        &self,
        _myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        exit: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let RootMessage::Exit(result) = message;
        leave(exit, result);
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _myself: ActorRef<Self::Msg>,
        event: SupervisionEvent,
        exit: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        if let Some(death) = death(event) {
            leave(exit, Err(RankError(format!("an actor of this rank {}", death.cause))));
        }
        Ok(())
    }
}

fn leave(exit: &mut Option<ExitSender>, result: Result<RankExit, RankError>) {
    if let Some(exit) = exit.take() {
        // An error means that the process ends already.
        let _ = exit.send(result);
    }
}
