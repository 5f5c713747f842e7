//! How fast a store takes and gives checkpoints: `store_throughput FOLDER_OR_URL [MIB_PER_SHARD] [COMMITS]`.
//!
//! Prints MB/s of one shard up and down (hashes and fsync included), milliseconds of a commit, and how long the first and
//! the second look at a chain of that many commits take. Stops at the first error, e.g. a full disk, and prints it.

use std::time::{Duration, Instant};
use tarazed_domain::{Generation, OptimizerShardIndex, StepsCompleted};
use tarazed_store::{
    BYTES_PER_ELEMENT, BinaryId, CheckpointStore, Digest, Fence, Lineage, Manifest, Retention, ShardGeometry,
    ShardPayload, ShardRecord, StoreError, TraceHead, WriterId,
};

const BLOCK_ELEMENTS: u64 = 1024;

fn manifest(
    store: &CheckpointStore,
    fence: &Fence,
    step: u64,
    geometry: &ShardGeometry,
    shard: ShardRecord,
) -> Manifest {
    let step = StepsCompleted(step);
    Manifest {
        run: Digest::of(b"run"),
        step,
        generation: fence.generation,
        writer: store.writer(),
        block_elements: BLOCK_ELEMENTS,
        block_count: geometry.block_count,
        shard_count: 1,
        layout: Digest::of(b"layout"),
        data: Digest::of(b"data"),
        shards: vec![shard],
        decisions: Vec::new(),
        trace_head: TraceHead {
            step,
            ..TraceHead::default()
        },
        binary: BinaryId::default(),
        device_type: "none".to_string(),
        lineage: Lineage::default(),
        created_unix_ms: 0,
        rollback_reach_steps: None,
    }
}

fn geometry(block_count: u32) -> ShardGeometry {
    ShardGeometry {
        shard: OptimizerShardIndex(0),
        first_block: 0,
        block_count,
        block_elements: BLOCK_ELEMENTS,
    }
}

async fn put(
    store: &CheckpointStore,
    fence: &Fence,
    step: u64,
    geometry: &ShardGeometry,
) -> Result<Manifest, StoreError> {
    let tensor: Vec<f32> = (0..geometry.elements()).map(|i| i as f32).collect();
    let state = ShardPayload::new([tensor.clone(), tensor.clone(), tensor]);
    let shard = store
        .put_shard(StepsCompleted(step), fence.generation, geometry, state)
        .await?;
    Ok(manifest(store, fence, step, geometry, shard))
}

fn rate(bytes: u64, elapsed: Duration) -> f64 {
    bytes as f64 / elapsed.as_secs_f64() / 1e6
}

async fn measure(location: &str, mib: u64, commits: u64) -> Result<(), StoreError> {
    let store = CheckpointStore::open(location, WriterId::fresh(Generation(0))).await?;
    let start = Instant::now();
    store.self_test().await?;
    println!("self-test       {:8.1} ms", start.elapsed().as_secs_f64() * 1e3);
    let fence = store.claim(Generation(1)).await?;

    let large = geometry((mib << 20).div_ceil(BLOCK_ELEMENTS * BYTES_PER_ELEMENT) as u32);
    let start = Instant::now();
    let checkpoint = put(&store, &fence, 1, &large).await?;
    println!(
        "shard up        {:8.1} MB/s of {mib} MiB",
        rate(large.payload_bytes(), start.elapsed())
    );
    store.commit(&fence, &checkpoint).await?;
    let start = Instant::now();
    let read = store.get_shard(&checkpoint, large.shard).await?;
    println!(
        "shard down      {:8.1} MB/s",
        rate(large.payload_bytes(), start.elapsed())
    );
    assert_eq!(read.master.len() as u64, large.elements());
    drop(read);

    let small = geometry(1);
    let start = Instant::now();
    for step in 2..2 + commits {
        let checkpoint = put(&store, &fence, step, &small).await?;
        store.commit(&fence, &checkpoint).await?;
    }
    println!(
        "small commit    {:8.1} ms on average of {commits}",
        start.elapsed().as_secs_f64() * 1e3 / commits as f64
    );
    let fresh = CheckpointStore::open(location, WriterId::fresh(Generation(0))).await?;
    for look in ["first look", "second look"] {
        let start = Instant::now();
        let found = fresh.newest_valid(None).await?;
        assert!(found.is_some());
        println!("{look:15} {:8.1} ms", start.elapsed().as_secs_f64() * 1e3);
    }
    let start = Instant::now();
    let report = store.gc(&fence, Retention::last(2)).await?;
    println!(
        "collection      {:8.1} ms, {} objects",
        start.elapsed().as_secs_f64() * 1e3,
        report.deleted_objects
    );
    Ok(())
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u64| arguments.get(at).and_then(|text| text.parse().ok()).unwrap_or(default);
    let Some(location) = arguments.first() else {
        eprintln!("usage: store_throughput FOLDER_OR_URL [MIB_PER_SHARD] [COMMITS]");
        std::process::exit(2);
    };
    if let Err(error) = measure(location, number(1, 256), number(2, 200)).await {
        println!("{error}");
        std::process::exit(1);
    }
}
