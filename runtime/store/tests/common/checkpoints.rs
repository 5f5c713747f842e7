//! Small checkpoints whose every value is known, written and restored as controllers and ranks do; for any store.
#![allow(dead_code, clippy::unwrap_used)]

use tarazed_domain::{Generation, OptimizerShardIndex, StepsCompleted};
use tarazed_store::{
    BinaryId, CheckpointStore, Committed, Depth, Digest, Fence, Lineage, Manifest, Retention, Select, ShardGeometry,
    ShardPayload, ShardRecord, StoreError, TraceHead, WriterId, WriterNonce,
};

pub const BLOCK_ELEMENTS: u64 = 4;
pub const BLOCKS: [u32; 3] = [2, 2, 1];

pub fn writer(number: u8) -> WriterId {
    WriterId {
        nonce: WriterNonce([number; 16]),
        generation: Generation(1),
    }
}

/// Shards of 2, 2 and 1 blocks.
pub fn geometries() -> Vec<ShardGeometry> {
    let mut first_block = 0;
    (0..)
        .zip(BLOCKS)
        .map(|(index, block_count)| {
            let shard = OptimizerShardIndex(index);
            let geometry = ShardGeometry {
                shard,
                first_block,
                block_count,
                block_elements: BLOCK_ELEMENTS,
            };
            first_block += block_count;
            geometry
        })
        .collect()
}

/// The values of one tensor of a shard at a step: all different.
pub fn values(step: u64, geometry: &ShardGeometry, tensor: u32) -> Vec<f32> {
    let value = |i: u64| (step * 10_000 + u64::from(tensor) * 1000 + geometry.first_element() + i) as f32 / 16.0;
    (0..geometry.elements()).map(value).collect()
}

pub async fn put_one(
    store: &CheckpointStore,
    step: u64,
    generation: Generation,
    geometry: &ShardGeometry,
) -> Result<ShardRecord, StoreError> {
    let state = ShardPayload::new([0, 1, 2].map(|tensor| values(step, geometry, tensor)));
    store.put_shard(StepsCompleted(step), generation, geometry, state).await
}

pub fn manifest(store: &CheckpointStore, step: u64, generation: Generation, shards: Vec<ShardRecord>) -> Manifest {
    Manifest {
        run: Digest::of(b"config"),
        step: StepsCompleted(step),
        generation,
        writer: store.writer(),
        block_elements: BLOCK_ELEMENTS,
        block_count: shards.iter().map(|shard| shard.block_count).sum(),
        shard_count: shards.len() as u32,
        layout: Digest::of(b"layout"),
        data: Digest::of(b"data"),
        shards,
        decisions: step.to_le_bytes().repeat(20),
        trace_head: TraceHead {
            step: StepsCompleted(step),
            length_bytes: step * 100,
            blake3: Digest::of(&step.to_le_bytes()),
            last_line: format!("{{\"step\":{step}}}"),
        },
        binary: BinaryId {
            version: "0.1.0".into(),
            build: "test".into(),
            libraries: vec![],
        },
        device_type: "cpu".into(),
        lineage: Lineage::default(),
        created_unix_ms: step,
        rollback_reach_steps: None,
    }
}

pub async fn upload(store: &CheckpointStore, step: u64, generation: Generation) -> Manifest {
    let mut shards = Vec::new();
    for geometry in geometries() {
        shards.push(put_one(store, step, generation, &geometry).await.unwrap());
    }
    manifest(store, step, generation, shards)
}

pub async fn checkpoint(store: &CheckpointStore, fence: &Fence, step: u64) -> Committed {
    let manifest = upload(store, step, fence.generation).await;
    store.commit(fence, &manifest).await.unwrap()
}

/// Restores as a controller does: the newest valid one, older ones as long as its shards turn out bad. Every value is
/// checked: whatever happened to the objects, a wrong state never comes out.
pub async fn restore(store: &CheckpointStore) -> Result<Option<u64>, StoreError> {
    let mut below = None;
    'older: loop {
        let Some(found) = store.newest_valid(below).await? else {
            return Ok(None);
        };
        let step = found.manifest.step;
        assert!(below.is_none_or(|below| step < below), "a restore only ever goes back");
        assert_eq!(found.manifest.decisions, step.0.to_le_bytes().repeat(20));
        assert_eq!(found.manifest.trace_head.last_line, format!("{{\"step\":{step}}}"));
        for geometry in geometries() {
            match store.get_shard(&found.manifest, geometry.shard).await {
                Ok(state) => {
                    let read = [&state.master, &state.exp_avg, &state.exp_avg_sq];
                    for (tensor, read) in (0..).zip(read) {
                        assert_eq!(read, &values(step.0, &geometry, tensor), "step {step}, {geometry:?}");
                    }
                }
                Err(error) if error.is_bad_object() => {
                    below = Some(step);
                    continue 'older;
                }
                Err(error) => return Err(error),
            }
        }
        return Ok(Some(step.0));
    }
}

/// All that a store at this URL, empty yet, goes through: checked, claimed, written, restored, collected, taken over.
pub async fn life(location: &str) {
    let store = CheckpointStore::open(location, writer(1)).await.unwrap();
    assert_eq!(store.location(), location);
    store.self_test().await.unwrap();
    assert!(store.newest_valid(None).await.unwrap().is_none());
    let fence = store.claim(Generation(0)).await.unwrap();
    for step in [10, 20, 30] {
        checkpoint(&store, &fence, step).await;
    }
    large(&store).await;
    assert_eq!(restore(&store).await.unwrap(), Some(30));
    let report = store.gc(&fence, Retention::last(2)).await.unwrap();
    assert_eq!(
        (report.kept.len(), report.retired.len(), report.deleted_objects),
        (2, 1, 4)
    );
    // CKPT-3
    let other = CheckpointStore::open(location, writer(2)).await.unwrap();
    let pending = upload(&store, 40, fence.generation).await;
    let taken = other.claim(Generation(0)).await.unwrap();
    assert!(matches!(
        store.commit(&fence, &pending).await,
        Err(StoreError::Fenced { .. })
    ));
    checkpoint(&other, &taken, 40).await;
    let report = other.verify(Select::All, Depth::Full).await.unwrap();
    assert!(report.is_clean() && report.checkpoints.len() == 3, "{report:?}");
    assert_eq!(restore(&other).await.unwrap(), Some(40));
}

/// A checkpoint shard that goes up in parts.
async fn large(store: &CheckpointStore) {
    let geometry = ShardGeometry {
        block_elements: 500_000,
        ..geometries()[0]
    };
    let tensors = [0, 1, 2].map(|t| (0..1_000_000).map(|i| (i * 3 + t) as f32).collect::<Vec<_>>());
    let state = ShardPayload::new(tensors.clone());
    let record = store
        .put_shard(StepsCompleted(10), Generation(1), &geometry, state)
        .await
        .unwrap();
    assert!(
        record.object.length > tarazed_store::limits::SINGLE_PUT_BYTES_MAX,
        "{record:?}"
    );
    let mut manifest = manifest(store, 10, Generation(1), vec![record]);
    manifest.block_elements = geometry.block_elements;
    let read = store.get_shard(&manifest, geometry.shard).await.unwrap();
    assert!(read.master == tensors[0] && read.exp_avg == tensors[1] && read.exp_avg_sq == tensors[2]);
}
