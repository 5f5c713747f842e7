//! `RankRoot`: the parent of a rank process's actors. Whatever of a rank fails, the process ends with the cause (SUP-1).

use super::actor::{CommandSink, DeviceReports, RankActor, RankArguments, RankMessage};
use super::feeder::DataFeeder;
use super::restore::StoreSource;
use super::writer::{CheckpointWriter, WriterArguments};
use super::{RankError, RankExit};
use crate::link::ToController;
use crate::supervision::death;
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::sync::Arc;
use std::sync::mpsc;
use tarazed_domain::ShardLayout;
use tarazed_domain::config::Config;
use tarazed_protocol::data::cursor::Recipe;
use tarazed_protocol::message::Member;
use tarazed_train::device_thread::{DeviceEvents, DeviceThread};
use tarazed_train::feeder::Feeder;
use tarazed_train::host::HostVisible;
use tarazed_train::progress::Progress;
use tokio::sync::oneshot;

pub type ExitSender = oneshot::Sender<Result<RankExit, RankError>>;

/// What a rank's tree is made of.
pub struct RankParts {
    /// Who it is.
    pub member: Member,
    /// The resolved config.
    pub config: Arc<Config>,
    /// The data recipe.
    pub recipe: Recipe,
    /// Samples.
    pub feeder: Arc<Feeder>,
    /// Shown to the outside.
    pub progress: Arc<Progress>,
    /// The store, for checkpoints.
    pub store: StoreSource,
    /// Hears how the rank ends.
    pub exit: ExitSender,
}

pub enum RootMessage {
    /// The process is to end like this.
    Exit(Result<RankExit, RankError>),
}
impl ractor::Message for RootMessage {}

pub struct RankRoot;

/// Handles on a rank's actors; clones are handles on the same ones.
#[derive(Clone)]
pub struct RankTree {
    rank: ActorRef<RankMessage>,
    root: ActorRef<RootMessage>,
}

pub struct Children {
    rank: ActorRef<RankMessage>,
}

pub struct RankRootState {
    exit: Option<ExitSender>,
    /// Those that live as long as the process. Sessions come and go.
    lasting: [ActorId; 3],
}

impl RankTree {
    /// Starts the actors; the device thread follows.
    ///
    /// # Errors
    /// If the actor system refuses.
    pub async fn start(parts: RankParts) -> Result<Self, RankError> {
        let (sender, receiver) = oneshot::channel();
        let (root, _) = Actor::spawn(None, RankRoot, (parts, sender))
            .await
            .map_err(|e| RankError(format!("actors: {e}")))?;
        let Children { rank } = receiver
            .await
            .map_err(|_| RankError("the rank's root did not start".to_owned()))?;
        Ok(Self { rank, root })
    }

    /// The way to the device thread.
    pub fn attach(&self, device: CommandSink) {
        self.tell(RankMessage::DeviceChannel(device));
    }

    /// A session to the controller is up: the rank says that it is ready, or back.
    pub fn linked(&self, uplink: Box<dyn ToController>, address: String, pid: u32) {
        self.tell(RankMessage::Linked { uplink, address, pid });
    }

    /// The controller said this.
    pub fn told(&self, message: Vec<u8>) {
        self.tell(RankMessage::Told(message));
    }

    /// The session is over.
    pub fn controller_lost(&self, reason: String) {
        self.tell(RankMessage::ControllerLost(reason));
    }

    /// It must end: a controller has replaced it, or runs on without it.
    pub fn dismissed(&self, reason: String) {
        // An error means that the rank ends already.
        let _ = self.root.cast(RootMessage::Exit(Err(RankError(reason))));
    }

    /// Ends it as a crash would: nothing more is handled.
    pub fn kill(&self) {
        self.rank.kill();
        self.root.kill();
    }

    fn tell(&self, message: RankMessage) {
        // An error means that the rank ends already.
        let _ = self.rank.cast(message);
    }

    /// Who becomes the parent of the edges' actors (SUP-1).
    #[must_use]
    pub fn cell(&self) -> ActorCell {
        self.root.get_cell()
    }

    /// What the device thread of this device says goes here.
    #[must_use]
    pub fn device_events<D: HostVisible + Clone>(&self, device: &D) -> Arc<dyn DeviceEvents<D>> {
        self.device_events_with(device, String::new())
    }

    /// The same, with what is said besides where the device's memory is too small.
    #[must_use]
    pub fn device_events_with<D: HostVisible + Clone>(
        &self,
        device: &D,
        memory_hint: String,
    ) -> Arc<dyn DeviceEvents<D>> {
        let (rank, device) = (self.rank.clone(), device.clone());
        Arc::new(DeviceReports {
            rank,
            device,
            memory_hint,
        })
    }

    /// Starts the device thread, whose end, if it was not told to end, ends the process.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn start_device<D: HostVisible + Clone>(&self, device: DeviceThread<D>) -> Result<(), RankError> {
        let (sender, receiver) = mpsc::channel();
        self.attach(Arc::new(move |command| sender.send(command).is_ok()));
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
    type State = RankRootState;
    type Arguments = (RankParts, oneshot::Sender<Children>);

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        (arguments, started): Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        let parent = myself.get_cell();
        let feed = Arc::clone(&arguments.feeder);
        let (data_feeder, _) = Actor::spawn_linked(None, DataFeeder, feed, parent.clone()).await?;
        let layout =
            tarazed_model::parameter_layout(&arguments.config.model, arguments.config.optimizer.block_elements);
        let shards = ShardLayout::new(&layout, arguments.config.optimizer.shards);
        let rank_arguments = RankArguments {
            member: arguments.member,
            config: arguments.config,
            recipe: arguments.recipe,
            feed: arguments.feeder,
            feeder: data_feeder.clone(),
            progress: arguments.progress,
            store: arguments.store.clone(),
            root: myself.clone(),
        };
        let (rank, _) = Actor::spawn_linked(None, RankActor, rank_arguments, parent.clone()).await?;
        let writer_arguments = WriterArguments {
            layout: shards,
            store: arguments.store,
            rank: rank.clone(),
        };
        let (writer, _) = Actor::spawn_linked(None, CheckpointWriter, writer_arguments, parent).await?;
        let lasting = [data_feeder.get_id(), rank.get_id(), writer.get_id()];
        rank.cast(RankMessage::Writer(writer))?;
        if started.send(Children { rank }).is_err() {
            return Err("nobody waits for this rank".into());
        }
        Ok(RankRootState {
            exit: Some(arguments.exit),
            lasting,
        })
    }

    async fn handle(
        &self,
        _myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let RootMessage::Exit(result) = message;
        leave(&mut state.exit, result);
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _myself: ActorRef<Self::Msg>,
        event: SupervisionEvent,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        if let Some(death) = death(event)
            && (!death.orderly || state.lasting.contains(&death.child.get_id()))
        {
            let cause = format!("an actor of this rank {}", death.cause);
            leave(&mut state.exit, Err(RankError(cause)));
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
