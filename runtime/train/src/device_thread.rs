//! The command loop of a rank's one device thread (SUP-4): it alone touches the device and the data plane.
//!
//! Commands come through a channel, answers go through [`DeviceEvents`], which must not block. A generation can be
//! aborted from any thread through its [`GenerationControl`].

use crate::StepError;
use crate::feeder::Feeder;
use crate::generation::{self, Means, Paused, Reporter, ShardSource, ShardToSave, Switches};
use crate::host::HostVisible;
use crate::progress::Phase;
use crate::state::RankState;
use crate::world::World;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use tarazed_domain::limits::Timeouts;
use tarazed_domain::{Generation, LaneTree, Rank, StepsCompleted};
use tarazed_fabric::nccl::{DeviceMeans, connect_device_mesh};
use tarazed_fabric::{AbortHandle, Collective, FabricError, Listener, SocketMesh, connect_mesh};
use tarazed_kernels::Device;
use tarazed_kernels::cuda::driver::Driver;
use tarazed_protocol::message::{BeginPlan, ItemDigest, Member, StateReport, StepLine};

/// Ends one generation from outside, for good.
#[derive(Clone, Debug)]
pub struct GenerationControl {
    /// Which.
    pub generation: Generation,
    /// The data plane's switch.
    pub fabric: AbortHandle,
    /// The compute threads' switch.
    pub compute: Arc<AtomicBool>,
    /// Pause, checkpoint, acknowledgements.
    pub switches: Arc<Switches>,
}

impl GenerationControl {
    /// Switches for a generation about to begin.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn new(generation: Generation) -> Result<Self, FabricError> {
        Ok(Self {
            generation,
            fabric: AbortHandle::new(generation)?,
            compute: Arc::new(AtomicBool::new(false)),
            switches: Arc::default(),
        })
    }

    /// Makes the device thread leave this generation.
    pub fn abort(&self) {
        self.compute.store(true, Ordering::SeqCst);
        self.fabric.abort();
    }
}

/// Makes the data plane of a generation.
pub trait DataPlane: Send {
    /// Connects this rank with all others of `plan`; blocks until it is done or aborted through `control`.
    ///
    /// # Errors
    /// `Aborted`, or the peer that is to blame.
    fn connect(
        &mut self,
        plan: &BeginPlan,
        rank: Rank,
        control: &GenerationControl,
        timeouts: &Timeouts,
    ) -> Result<Box<dyn Collective>, FabricError>;
}

/// The data plane of real runs: sockets between processes.
pub struct Sockets {
    /// The own ear.
    pub listener: Listener,
    /// Secret of the run, for the handshake.
    pub run_token: [u8; 32],
}

impl Sockets {
    fn mesh(
        &self,
        plan: &BeginPlan,
        rank: Rank,
        control: &GenerationControl,
        timeouts: &Timeouts,
    ) -> Result<SocketMesh, FabricError> {
        // Here, because a generation that had to be renewed is where such things matter.
        if let Some(refused) = self.listener.refusals().told() {
            tracing::info!(
                refused,
                "connections and frames that were refused since this process began"
            );
        }
        let roster: Vec<String> = plan.addresses.iter().map(str::to_owned).collect();
        connect_mesh(
            &self.listener,
            plan.generation,
            rank,
            &roster,
            self.run_token,
            timeouts,
            &control.fabric,
        )
    }
}

impl DataPlane for Sockets {
    fn connect(
        &mut self,
        plan: &BeginPlan,
        rank: Rank,
        control: &GenerationControl,
        timeouts: &Timeouts,
    ) -> Result<Box<dyn Collective>, FabricError> {
        Ok(Box::new(self.mesh(plan, rank, control, timeouts)?))
    }
}

/// The data plane of ranks on CUDA devices: NCCL beside the sockets, in a generation whose ranks all have it.
pub struct DeviceSockets<D: Driver> {
    /// For all but device memory, and for that, too, where a rank has no NCCL.
    pub sockets: Sockets,
    /// What this rank has.
    pub means: DeviceMeans<D>,
    /// A generation without NCCL is an error.
    pub required: bool,
}

impl<D: Driver> DataPlane for DeviceSockets<D> {
    fn connect(
        &mut self,
        plan: &BeginPlan,
        rank: Rank,
        control: &GenerationControl,
        timeouts: &Timeouts,
    ) -> Result<Box<dyn Collective>, FabricError> {
        let sockets = self.sockets.mesh(plan, rank, control, timeouts)?;
        connect_device_mesh(sockets, &self.means, self.required, timeouts)
    }
}

/// What the device thread is told.
pub enum Command {
    /// Start this generation and run it.
    Begin {
        /// The plan.
        plan: Box<BeginPlan>,
        /// Its switches.
        control: GenerationControl,
    },
    /// Say what is held, for the fence of this generation.
    Report {
        /// The coming generation.
        generation: Generation,
    },
    /// Leave.
    Exit,
}

/// What the device thread says. Implementations hand over and return at once.
pub trait DeviceEvents<D: Device>: Send + Sync {
    /// A generation is whole and runs from `base`; said on rank 0 alone.
    fn running(&self, generation: Generation, base: StepsCompleted);
    /// A disputed step was done again, with this result.
    fn settled(&self, generation: Generation, step: StepsCompleted, digest: ItemDigest);
    /// A committed step's line.
    fn line(&self, generation: Generation, line: StepLine);
    /// Shards to save, as they stand in this generation.
    fn save(&self, generation: Generation, step: StepsCompleted, shards: Vec<ShardToSave<D>>);
    /// Stands at a boundary.
    fn paused(&self, generation: Generation, paused: Paused);
    /// Left a generation with an error that is not the rank's own.
    fn failed(&self, generation: Generation, error: &StepError);
    /// What is held.
    fn report(&self, generation: Generation, report: StateReport);
    /// The rank itself is broken; the process must end.
    fn broken(&self, error: &StepError);
}

/// What a device thread is made of.
pub struct DeviceThread<D: Device> {
    /// The rank's state.
    pub state: RankState<D>,
    /// Who this is.
    pub member: Member,
    /// The way to the other ranks.
    pub data_plane: Box<dyn DataPlane>,
    /// Samples.
    pub feeder: Arc<Feeder>,
    /// Checkpoint shards.
    pub source: Box<dyn ShardSource + Send>,
    /// Who hears.
    pub events: Arc<dyn DeviceEvents<D>>,
}

struct GenerationReporter<'a, D: Device> {
    generation: Generation,
    events: &'a dyn DeviceEvents<D>,
}

impl<D: Device> Reporter<D> for GenerationReporter<'_, D> {
    fn running(&self, base: StepsCompleted) {
        self.events.running(self.generation, base);
    }

    fn settled(&self, step: StepsCompleted, digest: ItemDigest) {
        self.events.settled(self.generation, step, digest);
    }

    fn line(&self, line: StepLine) {
        self.events.line(self.generation, line);
    }

    fn save(&self, step: StepsCompleted, shards: Vec<ShardToSave<D>>) {
        self.events.save(self.generation, step, shards);
    }
}

impl<D: HostVisible + Clone> DeviceThread<D> {
    /// Serves commands until told to leave or until the other side is gone.
    pub fn run(self, commands: &Receiver<Command>) {
        self.serve(|| commands.recv().ok());
    }

    /// The same, with commands from anywhere; `next` waits for one, and gives none when the other side is gone.
    pub fn serve(mut self, mut next: impl FnMut() -> Option<Command>) {
        // A failed or paused mesh stays open until the next generation: closing it would look like a lost rank.
        let mut mesh: Option<Box<dyn Collective>> = None;
        while let Some(command) = next() {
            match command {
                Command::Begin { plan, control } => {
                    if let Err(error) = self.generation(&plan, &control, &mut mesh) {
                        self.state.progress.enter(Phase::Parked);
                        match &error {
                            StepError::Aborted => {}
                            error if error.is_own_fault() => {
                                self.state.forget(); // a fence may come before this process has ended
                                self.events.broken(error);
                            }
                            error => self.events.failed(plan.generation, error),
                        }
                    }
                }
                Command::Report { generation } => {
                    let waits_for = mesh.as_ref().and_then(|mesh| mesh.waits_for());
                    let report = StateReport {
                        waits_for,
                        ..self.state.report()
                    };
                    self.events.report(generation, report);
                }
                Command::Exit => {
                    if let Some(mesh) = &mut mesh {
                        mesh.leave();
                    }
                    break;
                }
            }
        }
        self.feeder.stop();
    }

    fn generation(
        &mut self,
        plan: &BeginPlan,
        control: &GenerationControl,
        mesh: &mut Option<Box<dyn Collective>>,
    ) -> Result<(), StepError> {
        let tree = LaneTree::new(self.state.config.batch.lanes);
        let Some(world) = World::new(plan, self.member, tree, self.state.shard_layout) else {
            return Err(StepError::Data(format!(
                "{} is not in the roster it was sent",
                self.member
            )));
        };
        self.state.abort = Arc::clone(&control.compute);
        self.state.progress.enter(Phase::Connecting);
        let timeouts: Timeouts = self.state.config.timeouts();
        generation::forget_old_course(&mut self.state, plan);
        // Ours of the generation before; everybody is past it.
        if let Some(mut old) = mesh.take() {
            old.retire()?;
        }
        let fabric = mesh.insert(self.data_plane.connect(plan, world.rank, control, &timeouts)?);
        let reporter = GenerationReporter {
            generation: plan.generation,
            events: &*self.events,
        };
        let mut means = Means {
            fabric: &mut **fabric,
            feeder: &self.feeder,
            source: &*self.source,
            switches: &control.switches,
            reporter: &reporter,
        };
        let paused = generation::run(&mut self.state, &world, plan, &mut means)?;
        self.events.paused(plan.generation, paused);
        Ok(())
    }
}
