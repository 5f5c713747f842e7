//! `Root`: the parent of the controller's actors. It starts them in order, decides what a death among them means
//! ([`crate::supervision`]), and ends the run.

use super::appender::{JsonLines, TraceAppender};
use super::checkpointer::{self, Checkpointer, CheckpointerArguments, ManifestFacts};
use super::coordinator::{CoordinatorActor, CoordinatorArguments, CoordinatorMessage, Peers};
use super::loops::{Loop, LoopRules};
use super::observatory::{Observatory, ObservatoryArguments};
use super::sharder::OptimizerSharder;
use super::{Notice, Notify, RunError, status};
use crate::link::{Bind, HubConfig, start_hub};
use crate::node::{LaunchSpec, start_node_agent};
use crate::rank::{TOKEN_VARIABLE, recipe};
use crate::run_folder::{RunFolder, RunPaths};
use crate::supervision::death;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tarazed_corpus::{Prepared, TokenStore};
use tarazed_domain::config::Config;
use tarazed_domain::{LaneTree, StepsCompleted};
use tarazed_protocol::checkpoint::CheckpointTracker;
use tarazed_protocol::coordinator::{Coordinator as Machine, Options};
use tarazed_protocol::data::DomainFacts;
use tarazed_protocol::ledger::Ledger;
use tarazed_protocol::restart::{RestartLimiter, Verdict};
use tokio::sync::oneshot;

/// How a run ended.
#[derive(Debug)]
pub struct End {
    pub code: u8,
    pub diagnosis: String,
    pub step: StepsCompleted,
}

pub enum RootMessage {
    /// The coordinator is through.
    Ended(End),
    /// These were started after the root.
    Adopt(Box<Adopt>),
}
impl ractor::Message for RootMessage {}

pub struct RootArguments {
    pub config: Arc<Config>,
    pub program: PathBuf,
    pub last_step: StepsCompleted,
    pub folder: RunFolder,
    pub prepared: Prepared,
    pub notify: Notify,
}

struct Root;

struct RootState {
    end: Option<oneshot::Sender<End>>,
    coordinator: Option<ActorRef<CoordinatorMessage>>,
    closed_loop: Option<(Loop, LoopRules)>,
    limiter: RestartLimiter,
    /// Lines that the loop had seen at its last death: more since then are progress.
    lines_at_death: usize,
    paths: RunPaths,
}

/// A folder for sockets that only this user can enter, removed at the end.
struct SocketFolder(PathBuf);

impl SocketFolder {
    fn create(token: &str) -> std::io::Result<Self> {
        let path = std::env::temp_dir().join(format!("tarazed-{}", &token[..16]));
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for SocketFolder {
    fn drop(&mut self) {
        // What cannot be removed is an empty folder in the system's temporary folder.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn system(what: &'static str, remedy: &'static str) -> impl Fn(String) -> RunError {
    move |cause| RunError::System { what, cause, remedy }
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
        notify,
    } = arguments;
    let lines = std::mem::take(&mut folder.lines);
    let paths = folder.paths.clone();
    let location = paths.store_location(&config);
    let claimed = checkpointer::claim(&location).await?;
    let generation = claimed.fence.generation;
    let facts = ManifestFacts::new(&config, &prepared.manifest.version);
    let tokens = TokenStore::open(&prepared.folder, config.model.context)?;
    let rules = LoopRules {
        mixture: config.mixture.clone(),
        facts: domain_facts(&config, &prepared),
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

    let machine = Machine::new(
        Options {
            workers: config.cluster.ranks,
            lanes: LaneTree::new(config.batch.lanes),
            shard_count: facts.shards.shard_count(),
            replicas: config.optimizer.replicas as usize,
            timeouts: config.timeouts(),
            restarts_max: config.fault.restarts_max,
            restart_backoff_ms: config.fault.restart_backoff_ms,
            last_step,
        },
        generation,
        written,
    );
    let names = config.data.domains.iter().map(|domain| domain.name.clone()).collect();
    let tracker = CheckpointTracker::new(facts.shards.shard_count(), written);
    let (end_sender, end) = oneshot::channel();
    let actors = system("actors", "raise the limits of the process");
    let limiter = RestartLimiter::new(config.fault.restarts_max, 0);
    let state = RootState {
        end: Some(end_sender),
        coordinator: None,
        closed_loop: None,
        limiter,
        lines_at_death: 0,
        paths: paths.clone(),
    };
    let (root, _) = Actor::spawn(None, Root, state)
        .await
        .map_err(|e| actors(e.to_string()))?;
    let parent = root.get_cell();
    let spawned = |e: ractor::SpawnErr| actors(e.to_string());

    let coordinator_arguments = CoordinatorArguments {
        machine,
        ledger: Ledger::new(names, config.tokens_per_step(), lines.clone()),
        tracker,
        root: root.clone(),
        checkpoint_interval_steps: config.checkpoint.interval_steps,
    };
    let (coordinator, _) = Actor::spawn_linked(None, CoordinatorActor, coordinator_arguments, parent.clone())
        .await
        .map_err(spawned)?;
    let observatory_arguments = ObservatoryArguments {
        metrics: JsonLines::open(paths.metrics()),
        events: JsonLines::open(paths.events()),
        notify: Arc::clone(&notify),
        tokens_per_step: config.tokens_per_step(),
        last_step,
    };
    let (observatory, _) = Actor::spawn_linked(None, Observatory, observatory_arguments, parent.clone())
        .await
        .map_err(spawned)?;
    let checkpointer_arguments = CheckpointerArguments {
        claimed,
        trace: paths.trace(),
        facts,
        keep_last: config.checkpoint.keep_last,
        coordinator: coordinator.clone(),
    };
    let (checkpointer, _) = Actor::spawn_linked(None, Checkpointer, checkpointer_arguments, parent.clone())
        .await
        .map_err(spawned)?;
    let sharder_arguments = (config.optimizer.replicas.min(config.cluster.ranks) as usize, notify);
    let (sharder, _) = Actor::spawn_linked(None, OptimizerSharder, sharder_arguments, parent.clone())
        .await
        .map_err(spawned)?;
    let closed_loop = Loop::start(&rules, &lines, coordinator.clone(), parent.clone())
        .await
        .map_err(RunError::Refused)?;
    let entry = closed_loop.entry.clone();
    let adopt = Adopt {
        coordinator: coordinator.clone(),
        closed_loop,
        rules,
    };
    adopt_children(&root, adopt)?;

    let token = random_token().map_err(|e| system("random token", "check /dev/urandom")(e.to_string()))?;
    let text: String = token.iter().map(|byte| format!("{byte:02x}")).collect();
    let sockets = SocketFolder::create(&text)
        .map_err(|e| system("socket folder", "check the system's temporary folder")(e.to_string()))?;
    let hub = start_hub_for(&config, token, &sockets.0, &parent, &coordinator).await?;
    let spec = launch_spec(program, &paths, &prepared, &hub.address(), &sockets.0, &text);
    let heard = coordinator.clone();
    let node = start_node_agent(spec, Some(parent.clone()), move |event| {
        // An error means that the run ends.
        let _ = heard.cast(CoordinatorMessage::Node(event));
    })
    .await
    .map_err(|e| actors(e.to_string()))?;
    let listener = status::open(&paths, &text)
        .map_err(|e| system("control socket", "check the run folder's permissions and its disk")(e.to_string()))?;
    let serving = tokio::spawn(status::serve(listener, text, coordinator.clone(), sharder.clone()));
    let heard = coordinator.clone();
    let trace = TraceAppender::open(paths.trace(), move |appended| {
        let _ = heard.cast(CoordinatorMessage::Appended(appended));
    })
    .map_err(|e| system("trace.jsonl", "check the run folder's permissions and its disk")(e.to_string()))?;
    let peers = Box::new(Peers {
        hub,
        node,
        observatory,
        checkpointer,
        sharder,
        entry,
        trace,
    });
    coordinator
        .cast(CoordinatorMessage::Begin(peers))
        .map_err(|e| actors(e.to_string()))?;

    let told = coordinator.clone();
    let watching = tokio::spawn(async move {
        if stop.wait_for(|stop| *stop).await.is_ok() {
            let _ = told.cast(CoordinatorMessage::Stop);
        }
    });
    let end = end.await.unwrap_or_else(|_| End {
        code: 3,
        diagnosis: "the root actor ended without a word; report this as a bug".to_owned(),
        step: written,
    });
    watching.abort();
    serving.abort();
    // Ends the tree: its node agent kills and reaps what is left of the ranks.
    if coordinator
        .stop_and_wait(None, Some(Duration::from_secs(10)))
        .await
        .is_err()
    {
        tracing::warn!("the coordinator did not stop in time");
    }
    root.stop(None);
    let _ = std::fs::remove_file(paths.control_socket());
    drop(folder);
    Ok(end)
}

pub struct Adopt {
    coordinator: ActorRef<CoordinatorMessage>,
    closed_loop: Loop,
    rules: LoopRules,
}

fn adopt_children(root: &ActorRef<RootMessage>, adopt: Adopt) -> Result<(), RunError> {
    root.cast(RootMessage::Adopt(Box::new(adopt)))
        .map_err(|e| RunError::Refused(e.to_string()))
}

fn domain_facts(config: &Config, prepared: &Prepared) -> Vec<DomainFacts> {
    let domains = config.data.domains.iter().zip(&prepared.manifest.domains);
    domains
        .map(|(domain, made)| DomainFacts {
            name: domain.name.clone(),
            language: domain.language,
            weight: domain.weight,
            train_tokens: made.train.tokens,
        })
        .collect()
}

async fn start_hub_for(
    config: &Config,
    token: [u8; 32],
    sockets: &Path,
    parent: &ActorCell,
    coordinator: &ActorRef<CoordinatorMessage>,
) -> Result<crate::link::Hub, RunError> {
    let heard = coordinator.clone();
    let hub_config = HubConfig {
        token,
        bind: Bind::near(sockets),
        failure: Duration::from_millis(config.timeouts().failure_ms),
        supervisor: Some(parent.clone()),
    };
    let events = move |event| {
        // An error means that the run ends.
        let _ = heard.cast(CoordinatorMessage::Hub(event));
    };
    start_hub(hub_config, events)
        .await
        .map_err(|e| system("control plane", "check the system's temporary folder")(e.to_string()))
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
    LaunchSpec {
        program,
        args: args.into_iter().chain(more).collect(),
        env: vec![(TOKEN_VARIABLE.into(), token.into())],
        log_dir: paths.logs(),
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
            RootMessage::Adopt(adopt) => {
                let Adopt {
                    coordinator,
                    closed_loop,
                    rules,
                } = *adopt;
                state.coordinator = Some(coordinator);
                state.closed_loop = Some((closed_loop, rules));
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
        if state.end.is_none() {
            return Ok(());
        }
        if state
            .closed_loop
            .as_ref()
            .is_some_and(|(closed_loop, _)| closed_loop.holds(&death.child))
        {
            state.renew_loop(&myself, death.cause).await;
        } else if !state.is_old_loop(&death.cause) {
            let diagnosis = format!("an actor of the controller ended: {}", death.cause);
            state.finish(End {
                code: 3,
                diagnosis,
                step: StepsCompleted(0),
            });
        }
        Ok(())
    }
}

impl RootState {
    fn finish(&mut self, end: End) {
        if let Some(sender) = self.end.take() {
            // An error means that nobody waits any more.
            let _ = sender.send(end);
        }
    }

    /// Members of a loop that was made again end with this reason.
    fn is_old_loop(&self, cause: &str) -> bool {
        cause == super::loops::RENEWED
    }

    /// One of the loop's actors died: all three are made again from the committed trace (LOOP-1).
    async fn renew_loop(&mut self, myself: &ActorRef<RootMessage>, cause: String) {
        let (Some((old, rules)), Some(coordinator)) = (self.closed_loop.take(), self.coordinator.clone()) else {
            return;
        };
        old.stop();
        let trace = self.paths.trace();
        let read = move || crate::run_folder::lines_after(&trace, StepsCompleted(0)).map_err(|e| e.to_string());
        let lines = match tokio::task::spawn_blocking(read).await {
            Ok(lines) => lines,
            Err(error) => Err(error.to_string()),
        };
        let seen = lines.as_ref().map_or(0, Vec::len);
        if seen > std::mem::replace(&mut self.lines_at_death, seen) {
            self.limiter.on_progress();
        }
        if let Verdict::GiveUp { causes } = self.limiter.on_death(cause) {
            let diagnosis = format!("the closed loop dies again and again:\n  {}", causes.join("\n  "));
            return self.finish(End {
                code: 3,
                diagnosis,
                step: StepsCompleted(0),
            });
        }
        let renewed = match lines {
            Ok(lines) => Loop::start(&rules, &lines, coordinator.clone(), myself.get_cell()).await,
            Err(error) => Err(error),
        };
        match renewed {
            Ok(renewed) => {
                // An error means that the run ends.
                let _ = coordinator.cast(CoordinatorMessage::LoopReplaced(renewed.entry.clone()));
                self.closed_loop = Some((renewed, rules));
            }
            Err(diagnosis) => self.finish(End {
                code: 3,
                diagnosis,
                step: StepsCompleted(0),
            }),
        }
    }
}
