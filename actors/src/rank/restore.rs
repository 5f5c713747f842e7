//! Checkpoint shards for the device thread, which blocks while the actor runtime reads them.

use crate::rank::RankError;
use std::sync::{Arc, Mutex, PoisonError};
use tarazed_domain::{Generation, OptimizerShardIndex, StepsCompleted};
use tarazed_store::{CheckpointStore, Manifest, WriterId};
use tarazed_train::generation::ShardSource;

/// The run's store, opened at the first need: a rank is ready before it has met the store.
#[derive(Clone)]
pub struct StoreSource {
    location: String,
    runtime: tokio::runtime::Handle,
    store: Arc<tokio::sync::OnceCell<CheckpointStore>>,
    manifest: Arc<Mutex<Option<Arc<Manifest>>>>,
}

impl StoreSource {
    pub fn new(location: String, runtime: tokio::runtime::Handle) -> Self {
        Self {
            location,
            runtime,
            store: Arc::default(),
            manifest: Arc::default(),
        }
    }

    /// The store.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub async fn store(&self) -> Result<CheckpointStore, RankError> {
        let open = || CheckpointStore::open_existing(&self.location, WriterId::fresh(Generation(0)));
        let store = self
            .store
            .get_or_try_init(open)
            .await
            .map_err(|e| RankError(e.to_string()))?;
        Ok(store.clone())
    }

    async fn read_shard(&self, step: StepsCompleted, shard: OptimizerShardIndex) -> Result<[Vec<f32>; 3], RankError> {
        let store = self.store().await?;
        let known = self.manifest.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let manifest = match known.filter(|manifest| manifest.step == step) {
            Some(manifest) => manifest,
            None => {
                let found = store.at_step(step).await.map_err(|e| RankError(e.to_string()))?;
                let manifest = Arc::new(found.manifest);
                *self.manifest.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&manifest));
                manifest
            }
        };
        let state = store
            .get_shard(&manifest, shard)
            .await
            .map_err(|e| RankError(e.to_string()))?;
        Ok([state.master, state.exp_avg, state.exp_avg_sq])
    }
}

impl ShardSource for StoreSource {
    fn read(&self, step: StepsCompleted, shard: OptimizerShardIndex) -> Result<[Vec<f32>; 3], String> {
        self.runtime
            .block_on(self.read_shard(step, shard))
            .map_err(|e| e.to_string())
    }
}
