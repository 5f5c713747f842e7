//! A rank's way to the store: it writes checkpoint shards and reads them back, and can do nothing else. What deletes,
//! commits or claims is the controller's handle alone, so no defect of a rank can lose a checkpoint.

use crate::digest::Digest;
use crate::download::{ShardState, WeightsPart};
use crate::error::StoreError;
use crate::manifest::{Manifest, ObjectRecord, ShardRecord};
use crate::shard_file::ShardGeometry;
use crate::store::CheckpointStore;
use crate::upload::ShardPayload;
use crate::writer::WriterId;
use tarazed_domain::{Generation, OptimizerShardIndex, StepsCompleted};

/// A store of checkpoints as ranks see it. Cheap to clone; all clones are one writer.
#[derive(Clone, Debug)]
pub struct RankStore(CheckpointStore);

impl RankStore {
    /// Opens the store at a folder or URL that the controller opened before.
    ///
    /// # Errors
    /// As [`CheckpointStore::open_existing`].
    pub async fn open(location: &str) -> Result<Self, StoreError> {
        let writer = WriterId::fresh(Generation(0));
        CheckpointStore::open_existing(location, writer).await.map(Self)
    }

    /// Folder or URL, without credentials.
    #[must_use]
    pub fn location(&self) -> &str {
        self.0.location()
    }

    /// Bytes that this process has stored of checkpoint shards; grows with each part of an upload.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.0.stored_bytes()
    }

    /// Stores one checkpoint shard; see [`CheckpointStore::put_shard`].
    ///
    /// # Errors
    /// As there.
    pub async fn put_shard(
        &self,
        step: StepsCompleted,
        generation: Generation,
        geometry: &ShardGeometry,
        state: ShardPayload,
    ) -> Result<ShardRecord, StoreError> {
        self.0.put_shard(step, generation, geometry, state).await
    }

    /// The manifest of exactly these bytes; see [`CheckpointStore::manifest_at`].
    ///
    /// # Errors
    /// As there.
    pub async fn manifest_at(&self, key: String, length: u64, blake3: Digest) -> Result<Manifest, StoreError> {
        self.0.manifest_at(&ObjectRecord { key, length, blake3 }).await
    }

    /// The state of one checkpoint shard; see [`CheckpointStore::get_shard`].
    ///
    /// # Errors
    /// As there.
    pub async fn get_shard(&self, manifest: &Manifest, shard: OptimizerShardIndex) -> Result<ShardState, StoreError> {
        self.0.get_shard(manifest, shard).await
    }

    /// The manifest of exactly these bytes, wherever it lies; see [`CheckpointStore::manifest_named`].
    ///
    /// # Errors
    /// As there.
    pub async fn manifest_named(&self, blake3: Digest, step: Option<StepsCompleted>) -> Result<Manifest, StoreError> {
        self.0.manifest_named(blake3, step).await
    }

    /// The master weights of one checkpoint shard; see [`CheckpointStore::get_weights`].
    ///
    /// # Errors
    /// As there.
    pub async fn get_weights(
        &self,
        manifest: &Manifest,
        shard: OptimizerShardIndex,
    ) -> Result<WeightsPart, StoreError> {
        self.0.get_weights(manifest, shard).await
    }
}

impl From<CheckpointStore> for RankStore {
    fn from(store: CheckpointStore) -> Self {
        Self(store)
    }
}
