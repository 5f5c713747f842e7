//! `Root`: the parent of the controller's actors. It starts them in order, decides what a death among them means
//! ([`crate::supervision`]), and ends the run.

use super::appender::{JsonLines, TraceAppender};
use super::checkpointer::{self, ManifestFacts};
use super::coordinator::CoordinatorMessage;
use super::loops::{Loop, LoopRules};
use super::nodes::{Nodes, NodesParts};
use super::tree::{Ear, Edges, Past, Tree, TreeParts};
use super::{Notice, Notify, RunError, status};
use crate::link::{Bind, HubConfig, start_hub};
use crate::node::{LaunchSpec, NodeCommand, NodeError, OWN_PROGRAM, Processes, registry, start_node_agent};
use crate::rank::{TOKEN_VARIABLE, recipe};
use crate::run_folder::{FolderError, InCharge, RunFolder, RunPaths, Tenure};
use crate::supervision::{Death, death};
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tarazed_corpus::{Prepared, TokenStore};
use tarazed_domain::config::{ClusterTransport, Config};
use tarazed_domain::{Mutant, StepIndex, StepsCompleted};
use tarazed_protocol::coordinator::PastLife;
use tarazed_protocol::data::decision::DataChange;
use tarazed_protocol::data::signals::BytesPerToken;
use tarazed_protocol::data::{DomainFacts, LoopConfig};
use tarazed_protocol::message::Member;
use tarazed_protocol::restart::{RestartLimiter, Verdict};
use tokio::sync::oneshot;

/// Between looks whether this controller is still in charge.
pub const TENURE_LOOK: Duration = Duration::from_millis(50);

/// How a run ended.
#[derive(Debug)]
pub struct End {
    /// 0, 3, 33 or 34 (DESIGN.md section 11).
    pub code: u8,
    /// For people, where the code is not 0.
    pub diagnosis: String,
}

impl End {
    /// That of a controller which has been put out of charge before it began.
    #[must_use]
    pub fn deposed() -> Self {
        Self {
            code: 33,
            diagnosis: DEPOSED.to_owned(),
        }
    }

    /// As it is to be understood: what one ended of that is not in charge any more may be a consequence of just that, such
    /// as a trace that is not its own any more.
    #[must_use]
    pub fn judged(self, holds: bool) -> Self {
        if holds || self.code == 0 {
            return self;
        }
        Self {
            code: 33,
            diagnosis: format!("{DEPOSED}; {}", self.diagnosis),
        }
    }
}

pub enum RootMessage {
    /// The coordinator is through.
    Ended(End),
    /// These were started after the root; answered once it knows them.
    Adopt(Box<Adopt>, RpcReplyPort<()>),
}
impl ractor::Message for RootMessage {}

pub struct RootArguments {
    pub config: Arc<Config>,
    pub program: PathBuf,
    pub last_step: StepsCompleted,
    pub folder: RunFolder,
    pub prepared: Prepared,
    /// What `data.later` plans.
    pub planned: Vec<(StepIndex, DataChange)>,
    pub notify: Notify,
}

pub struct Root;

pub struct RootState {
    end: Option<oneshot::Sender<End>>,
    coordinator: Option<ActorRef<CoordinatorMessage>>,
    closed_loop: Option<(Loop, LoopRules)>,
    /// Members of loops that were made again, whose ends have not been heard of yet: whatever they say, they mean nothing more.
    retired: Vec<ActorId>,
    limiter: RestartLimiter,
    /// Lines that the loop had seen at its last death: more since then are progress.
    lines_at_death: usize,
    paths: RunPaths,
}

/// A folder for sockets that only this user can enter, removed at the end by the controller that is then in charge.
struct SocketFolder {
    path: PathBuf,
    tenure: Tenure,
    /// Living ranks of the controller before have their ears in here: until this one has run, it stays.
    removable: bool,
}

impl SocketFolder {
    fn create(token: &str, tenure: Tenure) -> std::io::Result<Self> {
        let path = std::env::temp_dir().join(socket_folder_name(token));
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self {
            path,
            tenure,
            removable: true,
        })
    }
}

impl Drop for SocketFolder {
    fn drop(&mut self) {
        if self.removable && self.tenure.holds() {
            remove_sockets(&self.path);
        }
    }
}

fn socket_folder_name(token: &str) -> String {
    format!("tarazed-{}", &token[..16])
}

fn remove_sockets(folder: &Path) {
    // What cannot be removed is an empty folder in the system's temporary folder.
    let _ = std::fs::remove_dir_all(folder);
}

/// What the controller before left behind, and the secret and the sockets that its living ranks know.
struct Legacy {
    lives: Vec<PastLife>,
    token: [u8; 32],
    sockets: SocketFolder,
}

impl Legacy {
    /// Looks for ranks that are still there. Without any, secret and sockets are new, and what is left of the old ones goes.
    fn find(paths: &RunPaths, config: &Config, tenure: Tenure) -> Result<Self, RunError> {
        let entries = registry::read(&paths.ranks()).map_err(disk(paths.ranks()))?;
        let has_nodes = !config.cluster.nodes.is_empty();
        let known = InCharge::read(paths).filter(|before| {
            // Named by a file: nothing else is ever removed.
            let name = socket_folder_name(&hex(&before.token));
            // The controller before may have run on another host.
            (before.sockets.is_dir() || has_nodes)
                && before.sockets.file_name().is_some_and(|found| found == name.as_str())
        });
        // Ranks of the folder that this one is a copy of are not this run's; those that follow other rules would disagree
        // with newcomers on what is due.
        let before = known
            .filter(|before| before.folder == folder_identity(paths, config) && before.rules == rules_of_ranks(config));
        let lives: Vec<PastLife> = entries
            .iter()
            .map(|entry| PastLife {
                member: Member {
                    worker: entry.worker(),
                    incarnation: entry.incarnation(),
                },
                // Of a process on another host its node says what became of it.
                lives: before.is_some() && (has_nodes || entry.lives()),
            })
            .collect();
        if let Some(InCharge { token, sockets, .. }) = before {
            if lives.iter().any(|life| life.lives) {
                if has_nodes && !sockets.is_dir() {
                    std::fs::DirBuilder::new()
                        .mode(0o700)
                        .recursive(true)
                        .create(&sockets)
                        .map_err(disk(sockets.clone()))?;
                }
                let sockets = SocketFolder {
                    path: sockets,
                    tenure,
                    removable: false,
                };
                return Ok(Self { lives, token, sockets });
            }
            remove_sockets(&sockets);
        }
        let token = random_token().map_err(|e| system("random token", "check /dev/urandom")(e.to_string()))?;
        let sockets = SocketFolder::create(&hex(&token), tenure)
            .map_err(|e| system("socket folder", "check the system's temporary folder")(e.to_string()))?;
        Ok(Self { lives, token, sockets })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn system(what: &'static str, remedy: &'static str) -> impl Fn(String) -> RunError {
    move |cause| RunError::System { what, cause, remedy }
}

fn disk(path: PathBuf) -> impl Fn(std::io::Error) -> RunError {
    move |e| FolderError::io(&path, &e).into()
}

/// What a controller says that has been put out of charge.
pub const DEPOSED: &str = "the run folder is in other hands: another controller took over, or it was moved";

/// Which folder the run lies in, whatever its name. Hosts that share one number its device as they like.
fn folder_identity(paths: &RunPaths, config: &Config) -> [u64; 2] {
    let is_shared = !config.cluster.nodes.is_empty();
    std::fs::metadata(paths.dir()).map_or([0, 0], |folder| {
        let device = if is_shared { 0 } else { folder.dev() };
        [device, folder.ino()]
    })
}

/// What rank processes take from their config besides the run's identity: ranks that follow others cannot train together.
fn rules_of_ranks(config: &Config) -> String {
    let collective = config.cluster.collective;
    let mut rules = format!(
        "{:?} {:?} {:?} {collective:?}",
        config.fault, config.checkpoint, config.monitor
    );
    if !config.cluster.nodes.is_empty() {
        // Ranks on other hosts are adopted without a look at their processes: another program's must not be (DET-4).
        rules += &format!(" {:?} {:?}", config.cluster.nodes, crate::node::program_digest().ok());
    }
    blake3::hash(rules.as_bytes()).to_string()
}

/// The node agent, as long as this controller is in charge: a kill or a start by one that has just woken up would hit
/// its successor's ranks.
pub struct WhileInCharge<P> {
    /// The node agent.
    pub processes: P,
    /// Whether it is to be listened to.
    pub tenure: Tenure,
}

impl<P: Processes> Processes for WhileInCharge<P> {
    fn command(&self, command: NodeCommand) -> Result<(), NodeError> {
        if self.tenure.holds() || command == NodeCommand::LetGo || Mutant::DeposedCommands.is_on() {
            self.processes.command(command)
        } else {
            Ok(()) // it is about to hear that it is deposed
        }
    }
}

/// Runs the tree until the run ends.
///
/// # Errors
/// A [`RunError`] if something cannot be started.
pub async fn serve(arguments: RootArguments, mut stop: tokio::sync::watch::Receiver<bool>) -> Result<End, RunError> {
    let RootArguments {
        config,
        program,
        last_step,
        mut folder,
        prepared,
        planned,
        notify,
    } = arguments;
    let lines = std::mem::take(&mut folder.lines);
    let paths = folder.paths.clone();
    let location = paths.store_location(&config);
    let tenure = folder.tenure();
    let claimed = match checkpointer::claim(&location, &tenure).await {
        Ok(claimed) => claimed,
        // Data may have been prepared for hours, and the store may have been slow.
        Err(_) if !tenure.holds() => return Ok(End::deposed()),
        Err(error) => return Err(error),
    };
    let generation = claimed.fence.generation;
    if !tenure.holds() {
        return Ok(End::deposed()); // sockets that nobody used may be its successor's now
    }
    let Legacy {
        lives,
        token,
        mut sockets,
    } = Legacy::find(&paths, &config, tenure.clone())?;
    let text = hex(&token);
    let past = Past::new(lives, &paths.trace(), &lines).map_err(disk(paths.trace()))?;
    let facts = ManifestFacts::new(&config, &prepared.manifest.version);
    let tokens = TokenStore::open(&prepared.folder, config.model.context)?;
    let rules = LoopRules {
        config: LoopConfig {
            planned,
            ..LoopConfig::of(&config)
        },
        facts: domain_facts(&config, &prepared),
        bytes: bytes_per_token(&config, &prepared, &tokens, &notify),
        lanes: config.batch.lanes,
        recipe: recipe(&config, &tokens),
    };
    let layout = tarazed_model::parameter_layout(&config.model, config.optimizer.block_elements);
    let written = lines.last().map_or(StepsCompleted(0), |line| line.step);
    notify(Notice::Opened {
        dir: paths.dir().to_owned(),
        resumed_at: folder.resumed.then_some(written),
        store: location,
        parameters: layout.parameter_count(),
    });

    let notify_nodes = Arc::clone(&notify);
    let tree = Tree::start(TreeParts {
        config: Arc::clone(&config),
        last_step,
        lines,
        paths: paths.clone(),
        claimed,
        facts,
        rules,
        metrics: JsonLines::open(paths.metrics()),
        events: JsonLines::open(paths.events()),
        notify,
    })
    .await?;
    let (parent, ear) = (tree.parent(), tree.ear());

    // A name of its own: one that stands still may hold that of the controller before.
    let name = format!("link-{generation}.sock");
    let hub = start_hub_for(&config, token, bind_of(&config, &sockets.path, &name), &parent, &ear).await?;
    let address = dialed(&config, &hub);
    let spec = LaunchSpec {
        tenure: Some(tenure.clone()),
        share_gpus: config.cluster.share_gpus,
        ..launch_spec(program, &paths, &prepared, &address, &sockets.path, &text)
    };
    let nodes = start_nodes(&config, &token, &tree, &notify_nodes, paths.logs()).await?;
    let (nodes, node_address) = nodes.unzip();
    let nodes_end = nodes.as_ref().map(Nodes::ending);
    let in_charge = InCharge {
        generation: generation.0,
        address,
        token,
        sockets: sockets.path.clone(),
        folder: folder_identity(&paths, &config),
        rules: rules_of_ranks(&config),
        nodes: node_address,
        data: Some(prepared.folder.clone()),
    };
    let heard = ear.clone();
    let trace = TraceAppender::open(&paths, tree.weights_bytes(), move |appended| heard.appended(appended))
        .map_err(disk(paths.trace()))?;
    if !tenure.holds() {
        // What was opened may be its successor's trace, whom ranks and people are to find.
        return Ok(End::deposed());
    }
    in_charge.write(&paths).map_err(disk(paths.controller()))?;
    let processes: Box<dyn Processes> = match nodes {
        Some(nodes) => Box::new(WhileInCharge {
            processes: nodes,
            tenure: tenure.clone(),
        }),
        None => {
            let heard = ear.clone();
            let node = start_node_agent(spec, Some(parent), move |event| heard.node(event))
                .await
                .map_err(|e| system("actors", "raise the limits of the process")(e.to_string()))?;
            Box::new(WhileInCharge {
                processes: node,
                tenure: tenure.clone(),
            })
        }
    };
    let listener = status::open(&paths, &text).map_err(disk(paths.control_socket()))?;
    let serving = tokio::spawn(status::serve(
        listener,
        text,
        status::Desk {
            ranks_max: ranks_max(&config),
            cluster: config.cluster.clone(),
            data: paths.data(),
            context: config.model.context,
            tokenizer: prepared.manifest.tokenizer.clone(),
            coordinator: tree.coordinator.clone(),
            sharder: tree.sharder.clone(),
        },
    ));
    let mut begun = tree.begin(Edges {
        ranks: Box::new(hub),
        processes,
        trace: Box::new(trace),
        past,
    });

    let ticking = tokio::spawn(ear.clone().pass_time());
    let (deposed, watched) = (ear.clone(), tenure.clone());
    let guarding = tokio::spawn(async move {
        while watched.holds() {
            tokio::time::sleep(TENURE_LOOK).await;
        }
        deposed.deposed();
    });
    let watching = tokio::spawn(async move {
        if stop.wait_for(|stop| *stop).await.is_ok() {
            ear.stop();
        }
    });
    let end = begun.end().await.judged(tenure.holds());
    sockets.removable = true;
    ticking.abort();
    watching.abort();
    guarding.abort();
    serving.abort();
    if let Some(nodes) = nodes_end.filter(|_| tenure.holds()) {
        nodes.end(end.code).await;
    }
    begun.close().await;
    if tenure.holds() {
        let _ = std::fs::remove_file(paths.control_socket());
        let _ = std::fs::remove_file(paths.controller());
    }
    drop(folder);
    Ok(end)
}

pub struct Adopt {
    pub coordinator: ActorRef<CoordinatorMessage>,
    pub closed_loop: Loop,
    pub rules: LoopRules,
}

pub(super) fn domain_facts(config: &Config, prepared: &Prepared) -> Vec<DomainFacts> {
    let domains = config.data.domains.iter().zip(&prepared.manifest.domains);
    domains
        .map(|(domain, made)| DomainFacts {
            name: domain.name.clone(),
            language: domain.language,
            weight: domain.weight,
            train_tokens: made.train.tokens,
            train_sequences: made.train.sequences(config.model.context),
        })
        .collect()
}

/// Bytes of text behind one token, by domain: of the training part as the data's manifest counts it, of the held-out text
/// that evaluations score as the index of documents does. Where that cannot be read, held-out bytes are not known, which is
/// said.
fn bytes_per_token(config: &Config, prepared: &Prepared, tokens: &TokenStore, notify: &Notify) -> Vec<BytesPerToken> {
    let of = |bytes: f64, tokens: u64| bytes / tokens.max(1) as f64;
    let scored = tokens.scored_text_so_far(u64::from(config.evaluation.sequences_per_domain_max));
    let scored = scored.unwrap_or_else(|error| {
        notify(Notice::Warning(format!(
            "held-out losses are not shown in bits per byte: {error}"
        )));
        Vec::new()
    });
    let domains = prepared.manifest.domains.iter().enumerate();
    domains
        .map(|(index, domain)| BytesPerToken {
            train: of(domain.train.text_bytes as f64, domain.train.tokens),
            heldout: scored
                .get(index)
                .map_or(0.0, |scored| of(scored.text_bytes, scored.tokens)),
        })
        .collect()
}

async fn start_hub_for(
    config: &Config,
    token: [u8; 32],
    bind: Bind,
    parent: &ActorCell,
    ear: &Ear,
) -> Result<crate::link::Hub, RunError> {
    let heard = ear.clone();
    let hub_config = HubConfig {
        token,
        bind,
        failure: Duration::from_millis(config.timeouts().failure_ms),
        supervisor: Some(parent.clone()),
    };
    start_hub(hub_config, move |event| heard.hub(event)).await.map_err(|e| {
        system(
            "control plane",
            "check the system's temporary folder and cluster.control_port",
        )(e.to_string())
    })
}

/// Where ranks run on several hosts: their nodes, and where those dial.
async fn start_nodes(
    config: &Config,
    token: &[u8; 32],
    tree: &Tree,
    notify: &Notify,
    logs: PathBuf,
) -> Result<Option<(Nodes, String)>, RunError> {
    if config.cluster.nodes.is_empty() {
        return Ok(None);
    }
    let parts = NodesParts {
        ear: tree.ear(),
        notify: Arc::clone(notify),
        parent: tree.parent(),
        logs,
        program: crate::node::program_digest().map_err(disk(OWN_PROGRAM.into()))?,
        patience_ms: config.timeouts().failure_ms,
    };
    let failed = system("nodes", "check cluster.address and cluster.node_port");
    let nodes = Nodes::begin(&config.cluster, parts).await.map_err(&failed)?;
    let address = nodes.listen(config, token).await.map_err(&failed)?;
    notify(Notice::AwaitingNodes {
        nodes: config.cluster.nodes.iter().map(|node| node.name.clone()).collect(),
        address: address.clone(),
    });
    Ok(Some((nodes, address)))
}

/// As many ranks as a world may have: one for each lane, as far as the nodes have room beside the spares.
fn ranks_max(config: &Config) -> u32 {
    let room = config
        .cluster
        .slots()
        .map(|slots| slots.saturating_sub(config.cluster.spares));
    config.batch.lanes.min(room.unwrap_or(u32::MAX))
}

/// Where the hub listens: at the configured port, or at a socket of this name.
fn bind_of(config: &Config, sockets: &Path, name: &str) -> Bind {
    match config.cluster.transport {
        ClusterTransport::Unix => Bind::near(sockets, name),
        ClusterTransport::Tcp => Bind::Tcp(SocketAddr::new(host_of(config), config.cluster.control_port)),
    }
}

/// What ranks dial: the hub, or what forwards to it.
fn dialed(config: &Config, hub: &crate::link::Hub) -> String {
    match config.cluster.control_advertise_port {
        0 => hub.address(),
        port => format!("tcp:{}", SocketAddr::new(host_of(config), port)),
    }
}

/// Where the controller's host is found.
fn host_of(config: &Config) -> IpAddr {
    config.cluster.address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

fn launch_spec(
    program: PathBuf,
    paths: &RunPaths,
    prepared: &Prepared,
    hub: &str,
    sockets: &Path,
    token: &str,
) -> LaunchSpec {
    let args = [
        "rank".into(),
        "--run-dir".into(),
        paths.dir().into(),
        "--data".into(),
        prepared.folder.clone().into(),
    ];
    let more = ["--controller".into(), hub.into(), "--sockets".into(), sockets.into()];
    // A file that is replaced while the run goes on is not the program that began it: ranks to come are this very one (DET-4).
    let own = PathBuf::from(OWN_PROGRAM);
    LaunchSpec {
        program: if own.exists() { own } else { program.clone() },
        shown_as: program,
        args: args.into_iter().chain(more).collect(),
        env: vec![(TOKEN_VARIABLE.into(), token.into())],
        share_gpus: false,
        lifeline: true,
        log_dir: paths.logs(),
        registry: paths.ranks(),
        tenure: None,
        released: Arc::default(),
    }
}

fn random_token() -> std::io::Result<[u8; 32]> {
    use std::io::Read;
    let mut token = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut token)?;
    Ok(token)
}

impl Actor for Root {
    type Msg = RootMessage;
    type State = RootState;
    type Arguments = RootState;

    async fn pre_start(&self, _: ActorRef<RootMessage>, state: RootState) -> Result<RootState, ActorProcessingErr> {
        Ok(state)
    }

    async fn handle(
        &self,
        _: ActorRef<RootMessage>,
        message: RootMessage,
        state: &mut RootState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RootMessage::Ended(end) => state.finish(end),
            RootMessage::Adopt(adopt, reply) => {
                let Adopt {
                    coordinator,
                    closed_loop,
                    rules,
                } = *adopt;
                state.coordinator = Some(coordinator);
                state.closed_loop = Some((closed_loop, rules));
                // An error means that nobody starts the run any more.
                let _ = reply.send(());
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<RootMessage>,
        event: SupervisionEvent,
        state: &mut RootState,
    ) -> Result<(), ActorProcessingErr> {
        let Some(death) = death(event) else { return Ok(()) };
        if state.end.is_none() || state.is_retired(death.child.get_id()) {
            return Ok(());
        }
        if state
            .closed_loop
            .as_ref()
            .is_some_and(|(closed_loop, _)| closed_loop.holds(&death.child))
        {
            state.renew_loop(&myself, death).await;
        } else {
            let diagnosis = format!("an actor of the controller ended: {}", death.cause);
            state.finish(End { code: 3, diagnosis });
        }
        Ok(())
    }
}

impl RootState {
    /// A root whose end is told to `end`.
    pub const fn new(end: oneshot::Sender<End>, restarts_max: u32, paths: RunPaths) -> Self {
        Self {
            end: Some(end),
            coordinator: None,
            closed_loop: None,
            retired: Vec::new(),
            limiter: RestartLimiter::new(restarts_max, 0),
            lines_at_death: 0,
            paths,
        }
    }

    fn finish(&mut self, end: End) {
        if let Some(sender) = self.end.take() {
            // An error means that nobody waits any more.
            let _ = sender.send(end);
        }
    }

    /// Whether it belongs to a loop that was made again. Each ends once.
    fn is_retired(&mut self, ended: ActorId) -> bool {
        let found = self.retired.iter().position(|&id| id == ended);
        found.map(|at| self.retired.swap_remove(at)).is_some()
    }

    /// One of the loop's actors died: all three are made again from the committed trace (LOOP-1). The others may have died of the
    /// same cause, or of its death.
    async fn renew_loop(&mut self, myself: &ActorRef<RootMessage>, Death { child, cause, .. }: Death) {
        let (Some((old, rules)), Some(coordinator)) = (self.closed_loop.take(), self.coordinator.clone()) else {
            return;
        };
        old.stop().await;
        self.retired
            .extend(old.ids().into_iter().filter(|id| *id != child.get_id()));
        let trace = self.paths.trace();
        let read = move || crate::run_folder::lines_after(&trace, StepsCompleted(0)).map_err(|e| e.to_string());
        let lines = crate::blocking::run(read).await.and_then(|lines| lines);
        let seen = lines.as_ref().map_or(0, Vec::len);
        if seen > std::mem::replace(&mut self.lines_at_death, seen) {
            self.limiter.on_progress();
        }
        let why = cause.clone();
        if let Verdict::GiveUp { causes } = self.limiter.on_death(cause) {
            let diagnosis = format!("the closed loop dies again and again:\n  {}", causes.join("\n  "));
            return self.finish(End { code: 3, diagnosis });
        }
        let renewed = match &lines {
            Ok(lines) => Loop::start(&rules, lines, coordinator.clone(), myself.get_cell()).await,
            Err(error) => Err(error.clone()),
        };
        match renewed {
            Ok(renewed) => {
                let newest = lines.ok().and_then(|lines| lines.last().map(|line| line.step));
                let replaced = CoordinatorMessage::LoopReplaced(renewed.entry.clone(), newest.unwrap_or_default());
                // An error means that the run ends.
                let _ = coordinator.cast(replaced);
                self.closed_loop = Some((renewed, rules));
            }
            Err(error) => {
                let diagnosis = format!("the closed loop ended ({why}) and cannot be made again: {error}");
                self.finish(End { code: 3, diagnosis });
            }
        }
    }
}

#[cfg(test)]
mod tests;
