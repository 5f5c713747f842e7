//! `Checkpointer`: locates, commits and collects checkpoints; the only one that writes commit records (CKPT-1, CKPT-3).

use super::coordinator::CoordinatorMessage;
use super::{RunError, unix_ms};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tarazed_domain::config::Config;
use tarazed_domain::{Generation, OptimizerShardIndex, ShardLayout, StepsCompleted};
use tarazed_kernels::{CpuDevice, Device};
use tarazed_protocol::checkpoint::StoredShard;
use tarazed_protocol::data::decision::Decision;
use tarazed_store::{
    BinaryId, CheckpointStore, CommitRef, Digest, Fence, Lineage, Manifest, ObjectRecord, ShardGeometry, ShardRecord,
    StoreError, TraceHead, WriterId,
};

pub enum CheckpointerMessage {
    /// Find the newest checkpoint whose every byte is good.
    Locate,
    /// Everything is stored: make it a checkpoint.
    Commit {
        step: StepsCompleted,
        generation: Generation,
        shards: Vec<StoredShard>,
        head: Box<TraceHead>,
        decisions: Vec<Decision>,
    },
}
impl ractor::Message for CheckpointerMessage {}

/// The run's store, claimed.
pub struct Claimed {
    pub store: CheckpointStore,
    pub fence: Fence,
}

/// Opens and claims the store, and tests it where nobody has before.
///
/// # Errors
/// If it cannot be reached, ignores conditional writes, or is claimed by somebody newer.
pub async fn claim(location: &str) -> Result<Claimed, RunError> {
    let store = CheckpointStore::open(location, WriterId::fresh(Generation(0))).await?;
    store.self_test().await?;
    let fence = store.claim(Generation(1)).await?;
    Ok(Claimed { store, fence })
}

/// What every manifest of this run says.
#[derive(Clone)]
pub struct ManifestFacts {
    pub run: Digest,
    pub layout: Digest,
    pub data: Digest,
    pub shards: ShardLayout,
    pub block_elements: u64,
    pub block_count: u32,
    pub binary: BinaryId,
    pub device_type: String,
}

impl ManifestFacts {
    pub fn new(config: &Config, data_version: &str) -> Self {
        let layout = tarazed_model::parameter_layout(&config.model, config.optimizer.block_elements);
        let mut described = String::new();
        for slot in layout.tensors() {
            described.push_str(&format!("{} {:?} {}\n", slot.name, slot.shape, slot.offset));
        }
        Self {
            run: Digest::of(config.identity().as_bytes()),
            layout: Digest::of(described.as_bytes()),
            data: Digest::of(data_version.as_bytes()),
            shards: ShardLayout::new(&layout, config.optimizer.shards),
            block_elements: layout.block_elements() as u64,
            block_count: layout.block_count() as u32,
            binary: binary_id(),
            device_type: CpuDevice::new().device_type(),
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

    /// What is declared where binary or device type changed (DET-4); empty otherwise.
    fn lineage_change(&self, manifest: &Manifest) -> String {
        let mut changes = Vec::new();
        if manifest.binary != self.binary {
            changes.push(format!("binary {} became {}", manifest.binary.build, self.binary.build));
        }
        if manifest.device_type != self.device_type {
            changes.push(format!(
                "device type {} became {}",
                manifest.device_type, self.device_type
            ));
        }
        changes.join("; ")
    }
}

/// Version and BLAKE3 of the running program.
fn binary_id() -> BinaryId {
    let bytes = std::env::current_exe().and_then(std::fs::read).unwrap_or_default();
    let build = blake3::hash(&bytes).to_hex()[..16].to_owned();
    BinaryId {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        build,
        libraries: Vec::new(),
    }
}

pub struct Checkpointer;

pub struct CheckpointerArguments {
    pub claimed: Claimed,
    pub facts: ManifestFacts,
    pub keep_last: u32,
    pub coordinator: ActorRef<CoordinatorMessage>,
}

pub struct CheckpointerState {
    arguments: CheckpointerArguments,
    lineage: Lineage,
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
        })
    }

    async fn handle(
        &self,
        _: ActorRef<CheckpointerMessage>,
        message: CheckpointerMessage,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let answer = match message {
            CheckpointerMessage::Locate => state.locate().await,
            CheckpointerMessage::Commit {
                step,
                generation,
                shards,
                head,
                decisions,
            } => {
                let manifest = state.manifest(step, generation, shards, *head, &decisions)?;
                state.commit(manifest).await
            }
        };
        state.arguments.coordinator.cast(answer)?;
        Ok(())
    }
}

impl CheckpointerState {
    #[tracing::instrument(name = "locate", skip_all)]
    async fn locate(&mut self) -> CoordinatorMessage {
        match self.arguments.claimed.store.newest_verified(None).await {
            Ok(None) => CoordinatorMessage::Located(Ok(None)),
            Ok(Some(found)) => {
                for warning in found.warnings {
                    // An error means that the run ends already.
                    let _ = self.arguments.coordinator.cast(CoordinatorMessage::Warn(warning));
                }
                if let Some(reason) = self.arguments.facts.refuses(&found.manifest) {
                    return CoordinatorMessage::Located(Err(reason));
                }
                let declared = self.arguments.facts.lineage_change(&found.manifest);
                if !declared.is_empty() {
                    let text = format!("new lineage from step {}: {declared}", found.manifest.step);
                    let _ = self.arguments.coordinator.cast(CoordinatorMessage::Warn(text));
                }
                self.restored_from(&found.reference, declared);
                CoordinatorMessage::Located(Ok(Some(found.manifest.step)))
            }
            Err(error) => CoordinatorMessage::Located(Err(error.to_string())),
        }
    }

    fn restored_from(&mut self, reference: &CommitRef, declared: String) {
        self.lineage.parent = Some(reference.clone());
        self.lineage.restored_from = Some(reference.clone());
        if !declared.is_empty() {
            self.lineage.declared = declared;
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
            created_unix_ms: unix_ms(),
        })
    }

    #[tracing::instrument(name = "commit", skip_all, fields(step = manifest.step.0))]
    async fn commit(&mut self, manifest: Manifest) -> CoordinatorMessage {
        let CheckpointerArguments {
            claimed,
            keep_last,
            coordinator,
            ..
        } = &self.arguments;
        let step = manifest.step;
        match claimed.store.commit(&claimed.fence, &manifest).await {
            Ok(committed) => {
                self.lineage.parent = Some(committed.reference);
                if let Err(error) = claimed.store.gc(&claimed.fence, (*keep_last).max(1)).await {
                    let _ = coordinator.cast(CoordinatorMessage::Warn(format!("old checkpoints stay: {error}")));
                }
                CoordinatorMessage::Committed(step)
            }
            Err(error @ StoreError::Fenced { .. }) => CoordinatorMessage::Fatal(error.to_string()),
            Err(error) => CoordinatorMessage::CommitFailed(step, error.to_string()),
        }
    }
}
