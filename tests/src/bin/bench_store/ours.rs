//! Our side: shards through the store crate. Written all at once, as the checkpoint writers of all ranks do it. Read all at once,
//! as by one rank for each shard: a rank of a run that restores several reads them one after the other.

use anyhow::{Context, Result, ensure};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tarazed_domain::{Generation, OptimizerShardIndex, StepsCompleted};
use tarazed_store::{
    BYTES_PER_ELEMENT, BinaryId, CheckpointStore, Digest, Fence, Lineage, Manifest, ShardGeometry, ShardPayload,
    TraceHead, WriterId,
};

const BLOCK_ELEMENTS: u64 = 4096;

pub struct Ours {
    store: CheckpointStore,
    fence: Fence,
    geometries: Vec<ShardGeometry>,
    /// Master weights and moments of each shard.
    state: Vec<(ShardPayload, [Arc<[f32]>; 3])>,
    newest: Option<Arc<Manifest>>,
}

impl Ours {
    pub async fn open(location: &str, megabytes: u64, shards: u32) -> Result<Self> {
        let store = CheckpointStore::open(location, WriterId::fresh(Generation(0))).await?;
        store.self_test().await?;
        let fence = store.claim(Generation(0)).await?;
        let shard_bytes = megabytes * 1_000_000 / u64::from(shards.max(1));
        let block_count = shard_bytes.div_ceil(BLOCK_ELEMENTS * BYTES_PER_ELEMENT).max(1) as u32;
        let geometries: Vec<ShardGeometry> = (0..shards)
            .map(|shard| ShardGeometry {
                shard: OptimizerShardIndex(shard),
                first_block: shard * block_count,
                block_count,
                block_elements: BLOCK_ELEMENTS,
            })
            .collect();
        // Numbers that do not compress, so that nobody on the way can be quick with them.
        let mut word = 0x9e37_79b9_7f4a_7c15_u64;
        let mut value = || {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            (word >> 40) as f32 / 1e6
        };
        let mut tensor = |geometry: &ShardGeometry| (0..geometry.elements()).map(|_| value()).collect::<Arc<[f32]>>();
        let state = geometries
            .iter()
            .map(|geometry| {
                let tensors = [0, 1, 2].map(|_| tensor(geometry));
                (ShardPayload::new(tensors.clone()), tensors)
            })
            .collect();
        Ok(Self {
            store,
            fence,
            geometries,
            state,
            newest: None,
        })
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.geometries.iter().map(ShardGeometry::payload_bytes).sum()
    }

    /// The same bytes as files, for whoever copies files.
    pub fn write_files(&self, folder: &Path) -> Result<()> {
        for (index, (_, tensors)) in self.state.iter().enumerate() {
            let mut file = std::fs::File::create(folder.join(format!("shard-{index}")))?;
            for tensor in tensors {
                let bytes: Vec<u8> = tensor.iter().flat_map(|value| value.to_le_bytes()).collect();
                file.write_all(&bytes)?;
            }
        }
        Ok(())
    }

    /// A whole checkpoint, to its commit; seconds.
    pub async fn put(&mut self, step: u64) -> Result<f64> {
        let (step, generation) = (StepsCompleted(step), self.fence.generation);
        let started = Instant::now();
        // A task each, as ranks have: what a shard needs of a processor is not in line behind the others.
        let uploads = self.geometries.iter().zip(&self.state).map(|(geometry, (payload, _))| {
            let (store, geometry, payload) = (self.store.clone(), *geometry, payload.clone());
            tokio::spawn(async move { store.put_shard(step, generation, &geometry, payload).await })
        });
        let uploads = futures::future::try_join_all(uploads).await?;
        let shards = uploads.into_iter().collect::<Result<Vec<_>, _>>()?;
        let manifest = Manifest {
            run: Digest::of(b"bench"),
            step,
            generation,
            writer: self.store.writer(),
            block_elements: BLOCK_ELEMENTS,
            block_count: self.geometries.iter().map(|geometry| geometry.block_count).sum(),
            shard_count: self.geometries.len() as u32,
            layout: Digest::of(b"layout"),
            data: Digest::of(b"data"),
            shards,
            decisions: Vec::new(),
            trace_head: TraceHead {
                step,
                ..TraceHead::default()
            },
            binary: BinaryId::default(),
            device_type: "none".to_owned(),
            lineage: Lineage::default(),
            created_unix_ms: 0,
            rollback_reach_steps: None,
        };
        self.store.commit(&self.fence, &manifest).await?;
        let seconds = started.elapsed().as_secs_f64();
        self.newest = Some(Arc::new(manifest));
        Ok(seconds)
    }

    /// Every shard of the newest checkpoint, hashes checked; seconds.
    pub async fn get(&self) -> Result<f64> {
        let manifest = self.newest.as_ref().context("nothing was stored")?;
        let started = Instant::now();
        let downloads = self.geometries.iter().map(|geometry| {
            let (store, manifest, shard) = (self.store.clone(), Arc::clone(manifest), geometry.shard);
            tokio::spawn(async move { store.get_shard(&manifest, shard).await })
        });
        let downloads = futures::future::try_join_all(downloads).await?;
        let shards = downloads.into_iter().collect::<Result<Vec<_>, _>>()?;
        let seconds = started.elapsed().as_secs_f64();
        for (shard, (_, tensors)) in shards.iter().zip(&self.state) {
            let [master, first, second] = tensors;
            let same = shard.master[..] == **master && shard.exp_avg[..] == **first && shard.exp_avg_sq[..] == **second;
            ensure!(same, "what came back is not what was stored");
        }
        Ok(seconds)
    }
}
