//! A rank process: its actors around one device thread.
//!
//! `RankRoot` is the parent of all. A rank is replaced as a whole: whatever of it fails ends the process with the cause on
//! standard error, where the node agent picks it up (SUP-1). The process holds no state that outlives it; it outlives its
//! controller for a while (`rank/home.rs`), so that a new one may go on with what it holds.

mod actor;
mod device;
mod feeder;
mod hang;
mod home;
mod initial;
mod restore;
mod root;
mod shard;
mod writer;

use crate::later_data;
use crate::link::PeerId;
use crate::run_folder::{InCharge, RunPaths};
pub use actor::CommandSink;
use actor::explained;
pub use device::{DeviceChoice, DevicePeak, DeviceRefused, device_type, peak};
use home::Home;
pub use restore::StoreSource;
pub use root::{RankParts, RankTree};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tarazed_corpus::{Split, TokenStore};
use tarazed_domain::config::{ClusterTransport, Config};
use tarazed_domain::{DomainIndex, Incarnation, WorkerId};
use tarazed_fabric::{Listener, Transport};
use tarazed_kernels::CpuDevice;
use tarazed_protocol::data::cursor::{DataCursor, DomainRecipe, Recipe};
use tarazed_protocol::data::decision::{DataChange, DecisionSchedule};
use tarazed_protocol::message::Member;
use tarazed_train::device_thread::{DataPlane, DeviceThread, Sockets};
use tarazed_train::feeder::{FeedRules, Feeder, SampleSource};
pub use tarazed_train::harm::{Hang, Harm};
use tarazed_train::host::HostVisible;
use tarazed_train::progress::Progress;
use tarazed_train::state::RankState;

/// Environment variable with the run's token in hex; an argument would be visible to every user of the machine.
pub const TOKEN_VARIABLE: &str = "TARAZED_RUN_TOKEN";

/// How a rank process is started; made by the controller, not by people.
#[derive(Clone, Debug)]
pub struct RankArgs {
    /// Run folder.
    pub run_dir: PathBuf,
    /// Folder of the prepared data set; none for the one that the run folder names.
    pub data: Option<PathBuf>,
    /// Address of the controller's hub; none for the one that the run folder names.
    pub controller: Option<String>,
    /// Folder for the data plane's sockets; none where it talks over TCP.
    pub sockets: Option<PathBuf>,
    /// Where other hosts reach this one; none for loopback.
    pub address: Option<IpAddr>,
    /// The first worker of this host: it takes the first GPU.
    pub first_worker: u32,
    /// Which slot this process fills.
    pub worker: u32,
    /// Which life of it.
    pub incarnation: u32,
    /// Harm to be done to it on purpose.
    pub harm: Option<Harm>,
    /// A part of it that is to stand still on purpose.
    pub hang: Option<Hang>,
    /// What is said besides where the device's memory is too small, of the run's config; the caller's plan knows.
    pub memory_hint: fn(&Config) -> String,
}

/// A rank that could not start or could not go on.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct RankError(pub String);

impl RankError {
    fn because(what: &str) -> impl Fn(&dyn std::fmt::Display) -> Self + '_ {
        move |error| Self(format!("{what}: {error}"))
    }
}

/// Exit codes of a rank process; the controller reads only whether it was told to leave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RankExit {
    /// Told to leave.
    Left,
    /// The controller is gone and no other has come: nothing more can be committed in this life.
    ControllerLost,
}

struct TokenSamples {
    tokens: TokenStore,
    /// Where the run keeps its data sets.
    data: PathBuf,
}

impl SampleSource for TokenSamples {
    fn held_out_sequences(&self, domain: DomainIndex) -> u64 {
        self.tokens.sequences(domain, Split::HeldOut)
    }

    fn training(&self, domain: DomainIndex, sequence: u64, out: &mut [u32]) -> Result<(), String> {
        self.tokens
            .fill(domain, Split::Train, sequence, out)
            .map_err(|e| e.to_string())
    }

    fn held_out(&self, domain: DomainIndex, sequence: u64, out: &mut [u32]) -> Result<(), String> {
        self.tokens
            .fill(domain, Split::HeldOut, sequence, out)
            .map_err(|e| e.to_string())
    }

    fn open(&self, change: &DataChange) -> Result<Arc<dyn SampleSource>, String> {
        let tokens = later_data::open(&self.data, self.tokens.context(), change)?;
        Ok(Arc::new(Self {
            tokens,
            data: self.data.clone(),
        }))
    }
}

/// The data recipe of a run: a function of config and data alone.
#[must_use]
pub fn recipe(config: &Config, tokens: &TokenStore) -> Recipe {
    let domain = |(index, domain): (usize, &tarazed_domain::config::DomainConfig)| DomainRecipe {
        name: domain.name.clone(),
        train_sequences: tokens.sequences(DomainIndex(index as u16), Split::Train),
        weight: domain.weight,
    };
    Recipe {
        seed: config.run.seed,
        domains: config.data.domains.iter().enumerate().map(domain).collect(),
        batch: config.batch_schedule(),
        data_version: *blake3::hash(tokens.manifest().version.as_bytes()).as_bytes(),
    }
}

/// The run's secret: given by a controller that is this process's parent, or read in the run folder.
fn run_token(named: Option<&InCharge>) -> Result<[u8; 32], RankError> {
    let text = match (std::env::var(TOKEN_VARIABLE), named) {
        (Ok(text), _) => text,
        (Err(_), Some(named)) => return Ok(named.token),
        (Err(_), None) => {
            return Err(RankError(format!(
                "{TOKEN_VARIABLE} is not set, and no controller is in charge of the run: rank processes are started by \
                 `tarazed train` and `tarazed node`"
            )));
        }
    };
    let mut token = [0; 32];
    let whole = text.len() == 64
        && token.iter_mut().zip(text.as_bytes().chunks(2)).all(|(byte, hex)| {
            let parsed = std::str::from_utf8(hex)
                .ok()
                .and_then(|hex| u8::from_str_radix(hex, 16).ok());
            parsed.is_some_and(|value| {
                *byte = value;
                true
            })
        });
    if whole {
        Ok(token)
    } else {
        Err(RankError(format!("{TOKEN_VARIABLE} is not 64 hex digits")))
    }
}

/// Runs a rank process until it is told to leave.
///
/// # Errors
/// A [`RankError`] with the cause; the caller prints it and ends with a code other than 0.
pub fn run(args: &RankArgs) -> Result<RankExit, RankError> {
    let paths = RunPaths::new(&args.run_dir);
    let named = InCharge::read(&paths);
    let token = run_token(named.as_ref())?;
    let data = args.data.clone().or_else(|| named?.data);
    let data = data.ok_or_else(|| RankError("data: neither --data nor the run folder names any".to_owned()))?;
    let config = Config::load(&paths.config(), &[]).map_err(|e| RankError::because("config")(&e))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("actors")
        .enable_all()
        .build()
        .map_err(|e| RankError::because("actor runtime")(&e))?;
    let exit = runtime.block_on(serve(
        args,
        paths,
        &data,
        Arc::new(config),
        token,
        runtime.handle().clone(),
    ));
    runtime.shutdown_timeout(Duration::from_millis(200));
    exit
}

/// Where the data plane of this worker listens. Config validation keeps the ports of all workers within range.
fn transport(config: &Config, args: &RankArgs) -> Result<Transport, RankError> {
    let cluster = &config.cluster;
    let of_worker = |port: u16| match port {
        0 => 0,
        first => first.saturating_add(u16::try_from(args.worker).unwrap_or(u16::MAX)),
    };
    let here = args.address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    Ok(match cluster.transport {
        ClusterTransport::Unix => Transport::Unix {
            dir: args
                .sockets
                .clone()
                .ok_or_else(|| RankError("data plane: --sockets is not given".to_owned()))?,
        },
        ClusterTransport::Tcp => Transport::TcpAt {
            at: SocketAddr::new(here, of_worker(cluster.mesh_port)),
            advertised_port: of_worker(cluster.mesh_advertise_port),
        },
    })
}

/// What a device thread is made of, before its device is known.
struct DeviceWork {
    config: Arc<Config>,
    member: Member,
    harm: Option<Harm>,
    hang: Option<Hang>,
    progress: Arc<Progress>,
    data_plane: Sockets,
    feeder: Arc<Feeder>,
    source: StoreSource,
    memory_hint: String,
}

impl DeviceWork {
    fn start<D: HostVisible + Clone>(
        self,
        tree: &RankTree,
        device: D,
        data_plane: impl FnOnce(Sockets, &D) -> Box<dyn DataPlane>,
    ) -> Result<(), RankError> {
        let data_plane = data_plane(self.data_plane, &device);
        let events = tree.device_events_with(&device, self.memory_hint.clone());
        let state = RankState::new(self.config, device, self.progress)
            .map_err(|e| RankError::because("device")(&explained(&e, &self.memory_hint)))?;
        tree.start_device(DeviceThread {
            state: state.harmed(self.harm).hanging(self.hang),
            member: self.member,
            data_plane,
            feeder: self.feeder,
            source: Box::new(self.source),
            events,
        })
    }
}

async fn serve(
    args: &RankArgs,
    paths: RunPaths,
    data: &Path,
    config: Arc<Config>,
    token: [u8; 32],
    handle: tokio::runtime::Handle,
) -> Result<RankExit, RankError> {
    let member = Member {
        worker: WorkerId(args.worker),
        incarnation: Incarnation(args.incarnation),
    };
    let tokens = TokenStore::open(data, config.model.context).map_err(|e| RankError::because("data")(&e))?;
    let recipe = recipe(&config, &tokens);
    let cursor =
        DataCursor::new(recipe.clone(), DecisionSchedule::of(&config)).map_err(|e| RankError::because("data")(&e))?;
    let rules = FeedRules {
        context: config.model.context,
        lane_count: config.batch.lanes,
        evaluation_interval_steps: config.evaluation.interval_steps,
        held_out_sequences_max: config.evaluation.sequences_per_domain_max,
        audit_interval_steps: config.fault.audit_interval_steps,
    };
    let samples = TokenSamples {
        tokens,
        data: paths.data(),
    };
    let feeder = Feeder::new(cursor, rules, Arc::new(samples));
    let listener = Listener::bind(&transport(&config, args)?).map_err(|e| RankError::because("data plane")(&e))?;
    let address = listener.address();
    let progress: Arc<Progress> = Arc::default();
    hang::arm(args.hang, &progress, &handle)?;
    let store = StoreSource::new(paths.store_location(&config), handle).with_initial(&config);

    let (exit_sender, exit) = tokio::sync::oneshot::channel();
    let parts = RankParts {
        member,
        config: Arc::clone(&config),
        recipe,
        feeder: Arc::clone(&feeder),
        progress: Arc::clone(&progress),
        store: store.clone(),
        exit: exit_sender,
    };
    let tree = RankTree::start(parts).await?;
    let work = DeviceWork {
        config: Arc::clone(&config),
        member,
        harm: args.harm,
        hang: args.hang,
        progress,
        data_plane: Sockets {
            listener,
            run_token: token,
        },
        feeder,
        source: store,
        memory_hint: (args.memory_hint)(&config),
    };
    match DeviceChoice::of(&config).map_err(|e| RankError::because("device")(&e))? {
        DeviceChoice::Cpu => work.start(&tree, CpuDevice::new(), |sockets, _| Box::new(sockets))?,
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda { count } => {
            let device = device::open(args.worker.saturating_sub(args.first_worker) % count)?;
            work.start(&tree, device, |sockets, device| {
                device::data_plane(&config, sockets, device)
            })?;
        }
    }
    let home = Home {
        paths,
        token,
        peer: PeerId {
            worker: member.worker,
            incarnation: member.incarnation,
        },
        timeouts: config.timeouts(),
        listener: address,
        tree,
    };
    let linked = home.first(args.controller.as_deref()).await?;
    let staying = tokio::spawn(home.stay(linked));
    let result = exit.await;
    staying.abort();
    result.unwrap_or_else(|_| Err(RankError("the rank's root ended without a word".to_owned())))
}
