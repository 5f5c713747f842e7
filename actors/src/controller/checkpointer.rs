//! `Checkpointer`: locates, commits and collects checkpoints; the only one that writes commit records (CKPT-1, CKPT-3).

use super::appender::heads_from;
use super::coordinator::CoordinatorMessage;
use super::durability::Newest;
use super::root::{End, RootMessage};
use super::{RunError, TraceHeads, unix_ms};
use crate::run_folder::{self, Tenure};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tarazed_domain::config::Config;
use tarazed_domain::{Generation, OptimizerShardIndex, ShardLayout, StepsCompleted};
use tarazed_protocol::checkpoint::StoredShard;
use tarazed_protocol::data::decision::Decision;
use tarazed_protocol::message::RestoreFrom;
use tarazed_protocol::rollback::{Rollbacks, must_stay};
use tarazed_protocol::trace::{NewLineage, Program, TraceLine, writer_of};
use tarazed_store::{
    BinaryId, CheckpointStore, CommitRef, Digest, Fence, Lineage, Manifest, ObjectRecord, Restorable, Retention,
    ShardGeometry, ShardRecord, StoreError, TraceHead, WriterId,
};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Tries of an operation that the store may grant later; the store's own retries come on top.
const STORE_TRIES_MAX: u32 = 5;
/// Listings asked for where none gives a checkpoint that can be used.
const LISTING_TRIES_MAX: u32 = 3;
/// The wait before the second try; it doubles with each further one.
const STORE_RETRY_WAIT_MS: u64 = 500;
/// A run that is over waits so long for its last collection.
const LAST_COLLECTION_MS_MAX: u64 = 10_000;

/// What to go on from.
pub struct Located {
    /// The newest good checkpoint; none to begin from the seed.
    pub from: Option<RestoreFrom>,
    /// Lines of the trace from its step on, for the replay to be checked against.
    pub lines: Vec<TraceLine>,
    /// Heads of the trace after its step, for checkpoints made in the replay.
    pub heads: TraceHeads,
    /// To be declared in the next line: another program computed the trace so far (DET-4).
    pub lineage: Option<NewLineage>,
}

pub enum CheckpointerMessage {
    /// Find the newest checkpoint whose manifest is right and whose objects are there, of a step before `below` and of a
    /// state that `rollbacks` have not left behind.
    Locate {
        below: Option<StepsCompleted>,
        rollbacks: Rollbacks,
    },
    /// Ranks of the controller before live on: so does their lineage. These rollbacks have acted.
    Inherit(Rollbacks),
    /// Everything is stored: make it a checkpoint.
    Commit {
        step: StepsCompleted,
        generation: Generation,
        shards: Vec<StoredShard>,
        head: Box<TraceHead>,
        decisions: Vec<Decision>,
        /// Those that have acted.
        rollbacks: Rollbacks,
        /// The oldest state that one goes back to that is decided and has not acted.
        back_to: Option<StepsCompleted>,
    },
    /// The run is over: what is being collected may go first, for a while; then the root hears of the end.
    Close(End, ActorRef<RootMessage>),
}
impl ractor::Message for CheckpointerMessage {}

/// The run's store, claimed.
pub struct Claimed {
    /// Open.
    pub store: CheckpointStore,
    /// What shows that it is ours.
    pub fence: Fence,
}

/// Opens and claims the store, and tests it where nobody has before. One that is not in charge of the run folder any more
/// claims nothing: it would fence its successor.
///
/// # Errors
/// If it cannot be reached, ignores conditional writes, or is claimed by somebody newer; or if the folder is in other hands.
pub async fn claim(location: &str, tenure: &Tenure) -> Result<Claimed, RunError> {
    let store = CheckpointStore::open(location, WriterId::fresh(Generation(0))).await?;
    store.self_test().await?;
    let fence = store.claim_while(Generation(1), || tenure.holds()).await?;
    Ok(Claimed { store, fence })
}

/// What every manifest of this run says.
#[derive(Clone)]
pub struct ManifestFacts {
    run: Digest,
    layout: Digest,
    data: Digest,
    pub(super) shards: ShardLayout,
    block_elements: u64,
    block_count: u32,
    binary: BinaryId,
    device_type: String,
    /// Milliseconds since 1970.
    clock: fn() -> u64,
}

impl ManifestFacts {
    /// Of this config, these data, this program and this device type.
    #[must_use]
    pub fn new(config: &Config, data_version: &str) -> Self {
        Self::of_program(config, data_version, binary_id(), unix_ms)
    }

    /// The same, of a program that is known already, by a clock that people read.
    #[must_use]
    pub fn of_program(config: &Config, data_version: &str, binary: BinaryId, clock: fn() -> u64) -> Self {
        let layout = tarazed_model::parameter_layout(&config.model, config.optimizer.block_elements);
        Self {
            run: Digest::of(config.identity().as_bytes()),
            layout: Digest::of(layout.described().as_bytes()),
            data: Digest::of(data_version.as_bytes()),
            shards: ShardLayout::new(&layout, config.optimizer.shards),
            block_elements: layout.block_elements() as u64,
            block_count: layout.block_count() as u32,
            binary,
            clock,
            device_type: crate::rank::device_type(config),
        }
    }

    /// Whether a checkpoint belongs to this run; the reason if it does not.
    pub fn refuses(&self, manifest: &Manifest) -> Option<String> {
        let what = match () {
            () if manifest.run != self.run => "another config",
            () if manifest.layout != self.layout || manifest.shard_count as usize != self.shards.shard_count() => {
                "another model or another number of optimizer shards"
            }
            () if manifest.data != self.data => "other data",
            () => return None,
        };
        Some(format!(
            "the checkpoint of step {} in the store was made with {what}",
            manifest.step
        ))
    }

    /// What this program is in a trace.
    fn program(&self) -> Program {
        program_of(&self.binary, &self.device_type)
    }

    /// What is declared where binary or device type changed (DET-4).
    fn lineage_change(&self, manifest: &Manifest) -> Option<NewLineage> {
        let (from, to) = (maker_of(manifest), self.program());
        (from != to).then_some(NewLineage { from, to })
    }
}

/// The program that made a checkpoint.
fn maker_of(manifest: &Manifest) -> Program {
    program_of(&manifest.binary, &manifest.device_type)
}

fn program_of(binary: &BinaryId, device_type: &str) -> Program {
    Program {
        binary: format!("{} {}", binary.version, binary.build),
        device: device_type.to_owned(),
        libraries: binary.libraries.clone(),
    }
}

/// Version and BLAKE3 of the running program.
#[must_use]
pub fn binary_id() -> BinaryId {
    // Of nothing, where it cannot be read.
    let digest = crate::node::program_digest().map_or_else(|_| blake3::hash(&[]), blake3::Hash::from);
    let build = digest.to_hex()[..16].to_owned();
    BinaryId {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        build,
        libraries: Vec::new(),
    }
}

pub struct Checkpointer;

pub struct CheckpointerArguments {
    pub claimed: Claimed,
    /// `trace.jsonl`.
    pub trace: PathBuf,
    pub facts: ManifestFacts,
    pub retention: Retention,
    /// A checkpoint as old as this is kept beside those: a rollback may go back so far. None where there are none.
    pub reach_steps: Option<u64>,
    pub coordinator: ActorRef<CoordinatorMessage>,
}

pub struct CheckpointerState {
    arguments: CheckpointerArguments,
    lineage: Lineage,
    /// From the first commit on.
    collector: Option<Collector>,
}

impl Actor for Checkpointer {
    type Msg = CheckpointerMessage;
    type State = CheckpointerState;
    type Arguments = CheckpointerArguments;

    async fn pre_start(
        &self,
        _: ActorRef<CheckpointerMessage>,
        arguments: CheckpointerArguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(CheckpointerState {
            arguments,
            lineage: Lineage::default(),
            collector: None,
        })
    }

    async fn handle(
        &self,
        _: ActorRef<CheckpointerMessage>,
        message: CheckpointerMessage,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let answer = match message {
            CheckpointerMessage::Locate { below, rollbacks } => {
                CoordinatorMessage::Located(Box::new(state.locate(below, &rollbacks).await))
            }
            CheckpointerMessage::Inherit(rollbacks) => {
                state.inherit(&rollbacks).await;
                return Ok(());
            }
            CheckpointerMessage::Commit {
                step,
                generation,
                shards,
                head,
                decisions,
                rollbacks,
                back_to,
            } => {
                let manifest = state.manifest(step, generation, shards, *head, &decisions)?;
                state.commit(manifest, rollbacks, back_to).await
            }
            CheckpointerMessage::Close(end, root) => {
                if let Some(collector) = state.collector.take() {
                    collector.finish().await;
                }
                root.cast(RootMessage::Ended(end))?;
                return Ok(());
            }
        };
        state.arguments.coordinator.cast(answer)?;
        Ok(())
    }
}

impl CheckpointerState {
    /// The checkpoint's step and the trace as it was then must be of one run: from another state the replay would go astray at
    /// the first line, and with an edited or exchanged trace its lines would vouch for nothing.
    fn compare_trace(head: &TraceHead, heads: &TraceHeads) -> Result<(), (u8, String)> {
        match heads.get(&head.step) {
            // A trace that ends before the checkpoint is refused by whoever knows where it ends.
            Some(found) if found.blake3 != head.blake3 => Err((
                3,
                format!(
                    "the first {} lines of trace.jsonl are not those that the checkpoint of step {} was made with; put the \
                     run folder's own trace.jsonl back, or begin in another --run-dir with another checkpoint.store",
                    head.step, head.step
                ),
            )),
            _ => Ok(()),
        }
    }

    #[tracing::instrument(name = "locate", skip_all)]
    async fn locate(&mut self, below: Option<StepsCompleted>, rollbacks: &Rollbacks) -> Result<Located, (u8, String)> {
        if let Some(collector) = self.collector.take() {
            collector.break_off().await;
        }
        let store = &self.arguments.claimed.store;
        let wanted = |step| below.is_none_or(|below| step < below) && rollbacks.is_live(step);
        let found = newest(store, wanted).await.map_err(judge)?;
        self.tell_newest(found.as_ref());
        let (mut from, mut head, mut checkpoint) = (None, None, None);
        if let Some(found) = found {
            for warning in found.warnings {
                self.warn(warning);
            }
            if let Some(reason) = self.arguments.facts.refuses(&found.manifest) {
                return Err((2, reason));
            }
            let change = self.arguments.facts.lineage_change(&found.manifest);
            if let Some(change) = &change {
                self.warn(format!("new lineage from step {}: {change}", found.manifest.step));
            }
            from = Some(RestoreFrom {
                step: found.manifest.step,
                manifest_key: found.object.key,
                length: found.object.length,
                blake3: found.object.blake3.0,
            });
            let before = serde_json::from_str(&found.manifest.lineage.declared).ok();
            checkpoint = Some((maker_of(&found.manifest), before));
            self.restored_from(&found.reference, change);
            head = Some(found.manifest.trace_head);
        }
        let base = from.as_ref().map_or(StepsCompleted(0), |from| from.step);
        let trace = self.arguments.trace.clone();
        let (lines, heads, writer) = crate::blocking::run(move || trace_from(&trace, base, checkpoint))
            .await
            .and_then(|read| read)
            .map_err(|e| (3, e))?;
        if let Some(head) = head {
            Self::compare_trace(&head, &heads)?;
        }
        let own = self.arguments.facts.program();
        let lineage = writer
            .filter(|writer| *writer != own)
            .map(|from| NewLineage { from, to: own });
        Ok(Located {
            from,
            lines,
            heads,
            lineage,
        })
    }

    /// What the newest checkpoint says of the processes that made it is true of these ranks. How much of the trace is durable,
    /// the newest one of a live state says.
    async fn inherit(&mut self, rollbacks: &Rollbacks) {
        let store = &self.arguments.claimed.store;
        let newest = match patiently(|| store.newest_valid(None)).await {
            Ok(newest) => newest.filter(|newest| self.arguments.facts.refuses(&newest.manifest).is_none()),
            Err(error) => return self.warn(format!("the lineage of the next checkpoints begins anew: {error}")),
        };
        let is_live = |step| rollbacks.is_live(step);
        let durable = match &newest {
            Some(left_behind) if !is_live(left_behind.manifest.step) => {
                patiently(|| store.newest_valid_where(is_live)).await
            }
            _ => Ok(newest.clone()),
        };
        match durable {
            Ok(durable) => self.tell_newest(durable.as_ref()),
            Err(error) => self.warn(format!(
                "how far durability lags behind is not known before the next checkpoint: {error}"
            )),
        }
        if let Some(newest) = newest {
            self.lineage = Lineage {
                parent: Some(newest.reference),
                ..newest.manifest.lineage
            };
        }
    }

    /// How much of the trace is durable.
    fn tell_newest(&self, found: Option<&Restorable>) {
        let now_unix_ms = (self.arguments.facts.clock)();
        let newest = found.map(|Restorable { manifest, .. }| Newest {
            step: manifest.step,
            age_ms: now_unix_ms.saturating_sub(manifest.created_unix_ms),
        });
        self.tell(CoordinatorMessage::Newest(newest));
    }

    fn tell(&self, message: CoordinatorMessage) {
        // An error means that the run ends already.
        let _ = self.arguments.coordinator.cast(message);
    }

    fn warn(&self, text: String) {
        self.tell(CoordinatorMessage::Warn(text));
    }

    fn restored_from(&mut self, reference: &CommitRef, change: Option<NewLineage>) {
        self.lineage.parent = Some(*reference);
        self.lineage.restored_from = Some(*reference);
        if let Some(change) = change {
            self.lineage.declared = json!(change).to_string();
        }
    }

    fn manifest(
        &self,
        step: StepsCompleted,
        generation: Generation,
        shards: Vec<StoredShard>,
        trace_head: TraceHead,
        decisions: &[Decision],
    ) -> Result<Manifest, ActorProcessingErr> {
        let CheckpointerArguments { claimed, facts, .. } = &self.arguments;
        let shards = shards.into_iter().enumerate().map(|(index, stored)| {
            let geometry = ShardGeometry::of(&facts.shards, OptimizerShardIndex(index as u32));
            ShardRecord {
                shard: geometry.shard,
                first_block: geometry.first_block,
                block_count: geometry.block_count,
                object: ObjectRecord {
                    key: stored.key,
                    length: stored.length,
                    blake3: Digest(stored.blake3),
                },
            }
        });
        Ok(Manifest {
            run: facts.run,
            step,
            generation,
            writer: claimed.store.writer(),
            block_elements: facts.block_elements,
            block_count: facts.block_count,
            shard_count: facts.shards.shard_count() as u32,
            layout: facts.layout,
            data: facts.data,
            shards: shards.collect(),
            decisions: serde_json::to_vec(decisions)?,
            trace_head,
            binary: facts.binary.clone(),
            device_type: facts.device_type.clone(),
            lineage: self.lineage.clone(),
            created_unix_ms: (facts.clock)(),
            rollback_reach_steps: self
                .arguments
                .reach_steps
                .map(|steps| u32::try_from(steps).unwrap_or(u32::MAX).max(1)),
        })
    }

    #[tracing::instrument(name = "commit", skip_all, fields(step = manifest.step.0))]
    async fn commit(
        &mut self,
        manifest: Manifest,
        rollbacks: Rollbacks,
        back_to: Option<StepsCompleted>,
    ) -> CoordinatorMessage {
        let CheckpointerArguments {
            claimed,
            retention,
            reach_steps,
            ..
        } = &self.arguments;
        let step = manifest.step;
        let back_to = must_stay(step, *reach_steps, back_to, &rollbacks);
        let collection = Collection {
            step,
            retention: Retention { back_to, ..*retention },
            rollbacks,
        };
        // A commit whose outcome is unknown is resolved by reading back, so a further try is no second checkpoint (CKPT-2).
        match patiently(|| claimed.store.commit(&claimed.fence, &manifest)).await {
            Ok(committed) => {
                self.lineage.parent = Some(committed.reference);
                self.collect(collection);
                CoordinatorMessage::Committed(step)
            }
            Err(error @ StoreError::Fenced { .. }) => CoordinatorMessage::Fatal(error.to_string()),
            Err(error) => CoordinatorMessage::CommitFailed {
                step,
                full: matches!(error, StoreError::Full { .. }),
                cause: error.to_string(),
            },
        }
    }

    /// Nobody waits for it: the checkpoint exists.
    fn collect(&mut self, collection: Collection) {
        // One whose task is gone has panicked, which was said.
        let collector = match self.collector.take() {
            Some(collector) if !collector.wanted.is_closed() => collector,
            _ => Collector::start(&self.arguments.claimed, &self.arguments.coordinator),
        };
        collector.wanted.send_replace(Some(collection));
        self.collector = Some(collector);
    }
}

/// What a commit leaves to be collected.
#[derive(Clone)]
struct Collection {
    step: StepsCompleted,
    retention: Retention,
    rollbacks: Rollbacks,
}

/// Collects behind the commits, however long the store takes: one collection at a time, and always that of the newest commit.
/// It ends with the checkpointer, so that nothing is deleted for a controller that is gone.
///
/// CKPT-5: a commit may come meanwhile, because it names objects of a later step than any that is collected. The search for a
/// checkpoint may not: what was found could go while ranks read it. So that breaks a collection off, wherever it stands. What
/// it has retired by then is no checkpoint any more, what it has not stays whole, and the next one finishes it.
struct Collector {
    wanted: watch::Sender<Option<Collection>>,
    task: JoinSet<()>,
}

impl Collector {
    fn start(claimed: &Claimed, coordinator: &ActorRef<CoordinatorMessage>) -> Self {
        let (wanted, mut newest) = watch::channel(None::<Collection>);
        let (store, fence, coordinator) = (claimed.store.clone(), claimed.fence, coordinator.clone());
        let mut task = JoinSet::new();
        task.spawn(async move {
            while newest.changed().await.is_ok() {
                let Some(collection) = newest.borrow_and_update().clone() else {
                    continue;
                };
                if let Err(error) = collection.run(&store, &fence).await {
                    // An error means that the run ends already.
                    let _ = coordinator.cast(CoordinatorMessage::Warn(format!("old checkpoints stay: {error}")));
                }
            }
        });
        Self { wanted, task }
    }

    async fn break_off(mut self) {
        self.task.shutdown().await;
    }

    /// Lets it end what it has, within [`LAST_COLLECTION_MS_MAX`].
    async fn finish(self) {
        let Self { wanted, mut task } = self;
        drop(wanted);
        let limit = Duration::from_millis(LAST_COLLECTION_MS_MAX);
        if tokio::time::timeout(limit, task.join_next()).await.is_err() {
            tracing::warn!("old checkpoints stay: the run is over, and the store is slow; the next collection goes on");
        }
    }
}

impl Collection {
    #[tracing::instrument(name = "collect", skip_all, fields(step = self.step.0))]
    async fn run(self, store: &CheckpointStore, fence: &Fence) -> Result<(), StoreError> {
        let live = |step| self.rollbacks.is_live(step);
        store.gc_of(fence, self.retention, live).await.map(|_| ())
    }
}

/// Tries again what the store may grant later.
async fn patiently<T, F: Future<Output = Result<T, StoreError>>>(operation: impl Fn() -> F) -> Result<T, StoreError> {
    let mut tries = 1;
    loop {
        match operation().await {
            Err(error @ StoreError::Retry { .. }) if tries < STORE_TRIES_MAX => {
                tracing::warn!(tries, "{error}");
                tokio::time::sleep(Duration::from_millis(STORE_RETRY_WAIT_MS << (tries - 1))).await;
                tries += 1;
            }
            answer => return answer,
        }
    }
}

/// The newest checkpoint whose manifest is right and whose objects are all there; their bytes are hashed by the ranks that
/// read them. Where objects are not as they should be, the listing is asked for again: one that
/// is old names what has been collected since, and not what took its place.
async fn newest(
    store: &CheckpointStore,
    wanted: impl Fn(StepsCompleted) -> bool,
) -> Result<Option<Restorable>, StoreError> {
    let mut tries = 1;
    loop {
        match patiently(|| store.newest_valid_where(&wanted)).await {
            Err(error @ StoreError::Corrupt { .. }) if tries < LISTING_TRIES_MAX => {
                tracing::warn!(tries, "{error}");
                tokio::time::sleep(Duration::from_millis(STORE_RETRY_WAIT_MS << (tries - 1))).await;
                tries += 1;
            }
            answer => return answer,
        }
    }
}

/// The exit code for a store that cannot be read: by what the next start could change.
fn judge(error: StoreError) -> (u8, String) {
    let code = match error {
        StoreError::Retry { .. } => 33,
        _ => 3, // a full store, too: only a person makes room
    };
    // Each bad object's message advises an older checkpoint, and there is none.
    let remedy = match error {
        StoreError::Corrupt { .. } => {
            "; where there is none, restore its objects from a copy, or begin anew in another --run-dir with another \
             checkpoint.store"
        }
        _ => "",
    };
    (code, format!("{error}{remedy}"))
}

/// Lines of the trace from `base` on, its own included, their heads, and who wrote the last.
fn trace_from(
    trace: &Path,
    base: StepsCompleted,
    checkpoint: Option<(Program, Option<NewLineage>)>,
) -> Result<(Vec<TraceLine>, TraceHeads, Option<Program>), String> {
    let mut lines = run_folder::lines_after(trace, StepsCompleted(0)).map_err(|e| e.to_string())?;
    let heads = heads_from(trace, base, &lines).map_err(|e| format!("{}: {e}", trace.display()))?;
    let writer = writer_of(&lines, base, checkpoint);
    lines.retain(|line| line.step >= base);
    Ok((lines, heads, writer))
}

#[cfg(test)]
mod tests;
