//! The controller's process: `Root` and its children, from the first start to the exit code.
//!
//! Everything a person sees goes out as a [`Notice`]; this crate prints nothing.

mod appender;
mod checkpointer;
mod coordinator;
mod durability;
mod epochs;
mod loops;
mod nodes;
mod observatory;
mod root;
mod sharder;
mod shown;
#[doc(hidden)]
pub mod status;
mod tree;

pub use appender::{Appended, JsonLines, TraceFile, TraceRequest, TraceSink};
pub use checkpointer::{Claimed, ManifestFacts, binary_id};
pub use loops::{LoopMember, LoopRules, RequestAnswer};
pub use nodes::{Nodes, NodesEnd, NodesParts, node_token};
pub use root::{DEPOSED, End, TENURE_LOOK, WhileInCharge};
pub use tree::{Begun, Ear, Edges, LoopHarm, Past, TICK, Tree, TreeParts};

use crate::later_data;
use crate::rank::recipe;
use crate::run_folder::{self, FolderError, RunFolder};
use root::{RootArguments, domain_facts};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use tarazed_corpus::{PrepareEvent, PrepareRequest, Prepared, TokenStore};
use tarazed_domain::config::Config;
use tarazed_domain::{Generation, StepIndex, StepsCompleted};
use tarazed_protocol::checkpoint::SavingProgress;
use tarazed_protocol::data::cursor::DataCursor;
use tarazed_protocol::data::decision::{DataChange, Decision, DecisionAuthor, DecisionSchedule, data_changes};
use tarazed_protocol::data::signals::Signals;
use tarazed_protocol::data::{LoopConfig, controller};
use tarazed_protocol::message::Member;
use tarazed_protocol::trace::TraceLine;
use tarazed_store::{CheckpointStore, StoreError, WriterId};

/// Something a person will want to see.
#[derive(Debug)]
pub enum Notice {
    /// Data are being prepared.
    Preparing(PrepareEvent),
    /// Data are ready: domains with language, training and held-out sequences.
    DataReady {
        /// Folder of the data set.
        folder: PathBuf,
        /// Name, language, training tokens, held-out tokens.
        domains: Vec<(String, &'static str, u64, u64)>,
        /// Vocabulary of the tokenizer.
        vocabulary: usize,
    },
    /// The run begins or goes on.
    Opened {
        /// Run folder.
        dir: PathBuf,
        /// Goes on from this line; none for a new run.
        resumed_at: Option<StepsCompleted>,
        /// Where checkpoints lie.
        store: String,
        /// Parameters of the model.
        parameters: usize,
    },
    /// Ranks run on these hosts, whose nodes dial this address.
    AwaitingNodes {
        /// Their names.
        nodes: Vec<String>,
        /// Where they dial.
        address: String,
    },
    /// A node is there.
    NodeBack {
        /// Its name.
        node: String,
        /// Its host's name.
        host: String,
        /// How many rank processes it has already.
        lives: usize,
    },
    /// A rank process was started.
    RankStarted {
        /// Who.
        member: Member,
        /// Process id.
        pid: u32,
    },
    /// A rank is ready.
    RankReady {
        /// Who.
        member: Member,
        /// Since its start was asked for.
        after_ms: u64,
    },
    /// A rank is gone.
    RankLost {
        /// Who.
        member: Member,
        /// Why.
        cause: String,
    },
    /// The process of a rank that was lost before is gone.
    RankEnded {
        /// Who.
        member: Member,
        /// How it ended.
        cause: String,
    },
    /// Ranks of an earlier controller are back.
    Adopted {
        /// How many.
        ranks: usize,
    },
    /// A generation begins.
    Generation {
        /// Which.
        generation: Generation,
        /// How many ranks.
        ranks: usize,
        /// From where.
        base: StepsCompleted,
        /// From a checkpoint or the seed.
        restored: bool,
    },
    /// The first line after a loss.
    Recovered {
        /// Since the loss was seen.
        recovery_ms: u64,
        /// Steps computed again.
        steps_lost: u64,
    },
    /// A line was written.
    Line {
        /// The line.
        line: Box<TraceLine>,
        /// What the closed loop saw in it.
        signals: Option<Arc<Signals>>,
        /// Over the last steps.
        tokens_per_s: Option<f64>,
        /// Model FLOPs utilisation, 0 to 1, of the same steps; none where the devices' peak is not known.
        mfu: Option<f64>,
        /// Since the line before.
        step_ms: f64,
        /// Ranks that train.
        ranks_alive: usize,
        /// How long the oldest line has waited that no checkpoint covers; none before the store has said what is durable.
        durability_lag_s: Option<f64>,
        /// Time left.
        eta_s: Option<f64>,
    },
    /// Decisions were made.
    Decided(Vec<Decision>),
    /// A domain begins another pass over its text.
    Epoch {
        /// Its name.
        domain: String,
        /// Which pass, from 2.
        epoch: u64,
        /// The line whose step has its first sample.
        step: StepsCompleted,
    },
    /// A checkpoint is on its way to the store; said about once a second while it is.
    Saving(SavingProgress),
    /// A checkpoint exists.
    Checkpoint {
        /// Its step.
        step: StepsCompleted,
        /// From the first rank's word that it saves to the commit record; 0 where that word went to another controller.
        took_ms: u64,
    },
    /// How far durability lags behind; said about once a second, whether or not anything is committed.
    Durability {
        /// How long the oldest line has waited that no checkpoint covers.
        lag_s: f64,
    },
    /// Something is wrong, and the run goes on.
    Warning(String),
    /// A signal asked for the end.
    Stopping,
}

/// Where notices go; must not block.
pub type Notify = Arc<dyn Fn(Notice) + Send + Sync>;

/// How to run.
pub struct RunOptions {
    /// The resolved config; `run.dir` is the run folder.
    pub config: Config,
    /// The `tarazed` program, for rank processes.
    pub program: PathBuf,
    /// Stop at this count, if before `run.steps`.
    pub last_step: StepsCompleted,
    /// The run folder, owned.
    pub folder: RunFolder,
    /// Who hears.
    pub notify: Notify,
    /// Resolves when a signal asks for a last checkpoint and the end.
    pub stop: tokio::sync::watch::Receiver<bool>,
}

/// How a run ended.
#[derive(Clone, PartialEq, Debug)]
pub struct Outcome {
    /// 0, 3, 33 or 34 (DESIGN.md section 11).
    pub code: u8,
    /// For people, where the code is not 0.
    pub diagnosis: String,
    /// Newest line.
    pub step: StepsCompleted,
    /// Folder of the data set used.
    pub data: PathBuf,
}

/// A run that was refused before it began; nothing was overwritten.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The run folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The data.
    #[error(transparent)]
    Data(#[from] tarazed_corpus::CorpusError),
    /// The store.
    #[error(transparent)]
    Store(#[from] tarazed_store::StoreError),
    /// Replicas, lanes or data do not fit.
    #[error("{0}")]
    Refused(String),
    /// The machine.
    #[error("{what}: {cause}; {remedy}")]
    System {
        /// What failed.
        what: &'static str,
        /// Why.
        cause: String,
        /// What to do.
        remedy: &'static str,
    },
}

impl RunError {
    fn actors(error: &ractor::SpawnErr) -> Self {
        Self::System {
            what: "actors",
            cause: error.to_string(),
            remedy: "raise the limits of the process",
        }
    }
}

/// Prepares data, opens the store, starts the tree, and waits for the end.
///
/// # Errors
/// A [`RunError`] if the run cannot begin.
pub fn run(options: RunOptions) -> Result<Outcome, RunError> {
    let RunOptions {
        config,
        program,
        last_step,
        folder,
        notify,
        stop,
    } = options;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("controller")
        .enable_all()
        .build()
        .map_err(|e| RunError::System {
            what: "actor runtime",
            cause: e.to_string(),
            remedy: "raise the limit of threads",
        })?;
    let location = folder.paths.store_location(&config);
    let prepared = runtime
        .block_on(check_store(&location))
        .and_then(|()| prepare(&config, &folder, &notify));
    let planned = prepared.and_then(|prepared| Ok((plan_later(&config, &folder, &prepared)?, prepared)));
    let (planned, prepared) = match planned {
        Ok(ready) => ready,
        Err(error) => {
            folder.give_up();
            return Err(error);
        }
    };
    folder.write_config(&config)?;
    let domains = prepared.manifest.domains.iter();
    notify(Notice::DataReady {
        folder: prepared.folder.clone(),
        domains: domains
            .map(|d| (d.name.clone(), d.language.name(), d.train.tokens, d.held_out.tokens))
            .collect(),
        vocabulary: prepared.manifest.tokenizer.vocabulary,
    });
    let (data, trace) = (prepared.folder.clone(), folder.paths.trace());
    let arguments = RootArguments {
        config: Arc::new(config),
        program,
        last_step,
        folder,
        prepared,
        planned,
        notify,
    };
    let outcome = runtime.block_on(root::serve(arguments, stop));
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    outcome.map(|end| Outcome {
        code: end.code,
        diagnosis: end.diagnosis,
        step: run_folder::newest_step(&trace),
        data,
    })
}

/// Refuses what can be no store, before anything is made for the run. A folder that is not there yet will be.
async fn check_store(location: &str) -> Result<(), RunError> {
    match CheckpointStore::open_existing(location, WriterId::fresh(Generation(0))).await {
        Err(error @ StoreError::Reconfigure { .. }) => Err(error.into()),
        _ => Ok(()),
    }
}

/// Data ready, and those that the run began with.
fn prepare(config: &Config, folder: &RunFolder, notify: &Notify) -> Result<Prepared, RunError> {
    let request = PrepareRequest {
        domains: &config.data.domains,
        tokenizer: &config.data.tokenizer,
        model_vocabulary: config.model.vocabulary,
        held_out_fraction: config.data.held_out_fraction,
        context: config.model.context,
    };
    let mut heard = |event| notify(Notice::Preparing(event));
    let (out_dir, refine) = (folder.paths.data(), config.data.refine.as_ref());
    let prepared = match &config.data.prepared {
        Some(ready) => tarazed_corpus::adopt(&request, ready, folder.resumed, &out_dir, &mut heard),
        None => tarazed_corpus::prepare_refined(&request, refine, folder.resumed, &out_dir, &mut heard),
    }?;
    check_same_data(config, folder, &prepared)?;
    check_later_data(config, folder, &prepared)?;
    Ok(prepared)
}

/// What `data.later` plans, as decisions will have it: the data sets are linked into the run folder, and looked at.
fn plan_later(
    config: &Config,
    folder: &RunFolder,
    prepared: &Prepared,
) -> Result<Vec<(StepIndex, DataChange)>, RunError> {
    let mut names: Vec<String> = config.data.domains.iter().map(|domain| domain.name.clone()).collect();
    let mut planned = Vec::with_capacity(config.data.later.len());
    for later in &config.data.later {
        let data = folder.paths.data();
        let manifest = tarazed_corpus::adopt_later(&later.prepared, &prepared.manifest, config.model.context, &data)?;
        let change = later_data::planned(&manifest, config.model.context, &names, later).map_err(|reason| {
            let path = later.prepared.display();
            RunError::Refused(format!("data.later at step {}: {path}: {reason}", later.step))
        })?;
        names.extend(change.new_domains(names.len()).map(|edition| edition.name.clone()));
        planned.push((StepIndex(later.step), change));
    }
    let rules = LoopConfig {
        planned: planned.clone(),
        ..LoopConfig::of(config)
    };
    let decisions = controller::planned(&rules, &domain_facts(config, prepared)).map_err(RunError::Refused)?;
    check_same_plan(folder, &decisions)?;
    Ok(planned)
}

/// Without this check, a planned data set that was changed since would show as a trace that was.
fn check_same_plan(folder: &RunFolder, planned: &[Decision]) -> Result<(), RunError> {
    let written = folder.lines.iter().flat_map(|line| &line.decisions);
    let is_planned = |decision: &&Decision| decision.by == DecisionAuthor::Controller(controller::PLANNER.to_owned());
    for (written, planned) in written.filter(is_planned).zip(planned) {
        if written != planned {
            return Err(RunError::Folder(FolderError::new(
                folder.paths.dir(),
                format!(
                    "holds a run for whose step {} other data were planned: a data set of data.later has changed since it began",
                    written.effective
                ),
                "put it back as it was, or name another --run-dir for a new run",
            )));
        }
    }
    Ok(())
}

/// What came later is needed again: by every step since, and by every replay.
fn check_later_data(config: &Config, folder: &RunFolder, prepared: &Prepared) -> Result<(), RunError> {
    let tokenizer = Some(&prepared.manifest.tokenizer);
    let changes = folder.lines.iter().flat_map(|line| data_changes(&line.decisions));
    for (from, change) in changes {
        later_data::check(&folder.paths.data(), config.model.context, tokenizer, change)
            .map_err(|e| RunError::Refused(format!("from step {from} on the run trains on other data: {e}")))?;
    }
    Ok(())
}

/// The first line of the trace names the samples of its step and the version of their data. Without this check, other
/// data would show as a replay that differs, and look like corruption.
fn check_same_data(config: &Config, folder: &RunFolder, prepared: &Prepared) -> Result<(), RunError> {
    let Some(first) = folder.lines.first().filter(|line| line.step == StepsCompleted(1)) else {
        return Ok(());
    };
    let tokens = TokenStore::open(&prepared.folder, config.model.context)?;
    let refused = |e: String| RunError::Refused(e);
    let mut cursor =
        DataCursor::new(recipe(config, &tokens), DecisionSchedule::of(config)).map_err(|e| refused(e.to_string()))?;
    let plan = cursor.plan(StepIndex(0)).map_err(|e| refused(e.to_string()))?;
    if plan.digest == first.data {
        return Ok(());
    }
    Err(RunError::Folder(FolderError::new(
        folder.paths.dir(),
        "holds a run of other data: the texts or the tokenizer have changed since it began",
        "put them back as they were, or name another --run-dir for a new run",
    )))
}

/// Wall-clock milliseconds since 1970, for people and files that no number depends on.
fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    since.as_millis() as u64
}

/// Trace heads by step, for manifests.
type TraceHeads = BTreeMap<StepsCompleted, tarazed_store::TraceHead>;
