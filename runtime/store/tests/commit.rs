//! Committing under failures: at every operation of a checkpoint's life, and with controllers racing.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Fault, Faulty, checkpoint, geometries, put_one, restore, upload, writer};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use proptest::prelude::*;
use std::ops::Range;
use std::sync::Arc;
use tarazed_domain::{Generation, StepsCompleted};
use tarazed_store::{
    CheckpointState, CheckpointStore, Depth, Fence, Manifest, RankStore, Retention, Select, ShardGeometry,
    ShardPayload, StoreError,
};

fn open(objects: &Arc<dyn ObjectStore>, number: u8) -> CheckpointStore {
    CheckpointStore::with_object_store(objects.clone(), "runs/a", writer(number))
}

fn memory() -> Arc<dyn ObjectStore> {
    Arc::new(InMemory::new())
}

/// As a caller does: `Retry` means again.
macro_rules! retried {
    ($call:expr) => {{
        let mut last = None;
        for _ in 0..3 {
            match $call.await {
                Err(StoreError::Retry { .. }) => {}
                other => {
                    last = Some(other);
                    break;
                }
            }
        }
        last.expect("one fault fails one call only")
    }};
}

async fn life(store: &CheckpointStore, step: u64) -> Result<(), StoreError> {
    let fence = retried!(store.claim(Generation(0)))?;
    let mut shards = Vec::new();
    for geometry in geometries() {
        shards.push(retried!(put_one(store, step, fence.generation, &geometry))?);
    }
    let manifest = common::manifest(store, step, fence.generation, shards);
    retried!(store.commit(&fence, &manifest)).map(|_| ())
}

async fn life_without_retry(store: &CheckpointStore, step: u64) -> Result<(), StoreError> {
    let fence = store.claim(Generation(0)).await?;
    let mut shards = Vec::new();
    for geometry in geometries() {
        shards.push(put_one(store, step, fence.generation, &geometry).await?);
    }
    let manifest = common::manifest(store, step, fence.generation, shards);
    store.commit(&fence, &manifest).await.map(|_| ())
}

async fn commits_of(store: &CheckpointStore, step: u64) -> usize {
    let listed = store.list().await.unwrap();
    listed
        .iter()
        .filter(|summary| summary.reference.step == StepsCompleted(step))
        .count()
}

const FAULTS: [Fault; 4] = [
    Fault::Before,
    Fault::After,
    Fault::AfterAsConflict,
    Fault::ConflictBefore,
];

// CKPT-1, CKPT-2: whichever operation fails, before or after it took effect, a retry commits once.
#[tokio::test]
async fn any_single_failure_is_survived_by_retrying() {
    for fault in FAULTS {
        for fail_at in 0.. {
            let objects = memory();
            let first = open(&objects, 1);
            let fence = first.claim(Generation(0)).await.unwrap();
            checkpoint(&first, &fence, 10).await;
            let faulty = Faulty::new(objects.clone(), fail_at, fault, false);
            let operations = faulty.operations.clone();
            let second = CheckpointStore::with_object_store(faulty, "runs/a", writer(2));
            life(&second, 20).await.unwrap();
            assert_eq!(restore(&first).await.unwrap(), Some(20), "{fault:?} at {fail_at}");
            assert_eq!(commits_of(&first, 20).await, 1, "{fault:?} at {fail_at}");
            let report = first.verify(Select::All, Depth::Full).await.unwrap();
            assert!(report.is_clean(), "{fault:?} at {fail_at}: {report:?}");
            if operations.load(std::sync::atomic::Ordering::SeqCst) <= fail_at {
                assert!(
                    fail_at > 15,
                    "the fault must have hit every operation of a checkpoint's life"
                );
                break;
            }
        }
    }
}

// CKPT-1, CKPT-3: the process dies at any operation; the checkpoint is whole or not there, and a new controller goes on.
#[tokio::test]
async fn any_death_leaves_a_whole_checkpoint_or_none() {
    for fault in [Fault::Before, Fault::After] {
        let mut seen = [false; 2];
        for fail_at in 0.. {
            let objects = memory();
            let first = open(&objects, 1);
            let fence = first.claim(Generation(0)).await.unwrap();
            checkpoint(&first, &fence, 10).await;
            let faulty = Faulty::new(objects.clone(), fail_at, fault, true);
            let dying = CheckpointStore::with_object_store(faulty, "runs/a", writer(2));
            if life_without_retry(&dying, 20).await.is_ok() {
                break;
            }
            let third = open(&objects, 3);
            let fence = third.claim(Generation(0)).await.unwrap();
            let restored = restore(&third).await.unwrap().unwrap();
            assert!(restored == 10 || restored == 20, "{fault:?} at {fail_at}");
            seen[usize::from(restored == 20)] = true;
            assert_eq!(commits_of(&third, 20).await, usize::from(restored == 20));
            checkpoint(&third, &fence, 30).await;
            let kept = third.gc(&fence, Retention::last(1)).await.unwrap();
            assert_eq!(kept.kept.len(), 1);
            assert!(third.verify(Select::All, Depth::Full).await.unwrap().is_clean());
        }
        assert!(seen[0], "some death comes before the commit record");
        assert!(seen[1] || fault == Fault::Before, "some death comes after it");
    }
}

/// A checkpoint of one shard of 12 MB, so that it goes up in two parts.
async fn large_life_without_retry(store: &CheckpointStore, step: u64, state: ShardPayload) -> Result<(), StoreError> {
    let fence = store.claim(Generation(0)).await?;
    let geometry = large_geometry();
    let shard = store
        .put_shard(StepsCompleted(step), fence.generation, &geometry, state)
        .await?;
    let mut manifest = common::manifest(store, step, fence.generation, vec![shard]);
    manifest.block_elements = geometry.block_elements;
    store.commit(&fence, &manifest).await.map(|_| ())
}

fn large_geometry() -> ShardGeometry {
    ShardGeometry {
        block_elements: 500_000,
        ..geometries()[0]
    }
}

// CKPT-1, CKPT-3: the same where a checkpoint shard goes up in parts, with a death at the upload's beginning, at each of its
// parts, between them and at its completion.
#[tokio::test]
async fn any_death_in_an_upload_of_parts_leaves_a_whole_checkpoint_or_none() {
    let elements = large_geometry().elements() as usize;
    let tensors = [0, 1, 2].map(|t| (0..elements).map(|i| (i * 3 + t) as f32).collect::<Vec<_>>());
    let state = ShardPayload::new(tensors.clone());
    for fault in [Fault::Before, Fault::After] {
        let (mut seen, mut struck) = ([false; 2], Vec::new());
        for fail_at in 0.. {
            let objects = memory();
            let first = open(&objects, 1);
            let fence = first.claim(Generation(0)).await.unwrap();
            checkpoint(&first, &fence, 10).await;
            let faulty = Faulty::new(objects.clone(), fail_at, fault, true);
            let dying = CheckpointStore::with_object_store(faulty.clone(), "runs/a", writer(2));
            let lived = large_life_without_retry(&dying, 20, state.clone()).await.is_ok();
            let Some(operation) = faulty.struck() else {
                assert!(lived, "nothing failed");
                break;
            };
            assert!(!lived, "{fault:?} of {operation} at {fail_at}: a dead process goes on");
            struck.push(operation);
            let third = open(&objects, 3);
            let fence = third.claim(Generation(0)).await.unwrap();
            let found = third.newest_valid(None).await.unwrap().unwrap();
            let restored = found.manifest.step.0;
            assert!(
                restored == 10 || restored == 20,
                "{fault:?} of {operation} at {fail_at}"
            );
            seen[usize::from(restored == 20)] = true;
            assert_eq!(commits_of(&third, 20).await, usize::from(restored == 20));
            if restored == 20 {
                let read = third.get_shard(&found.manifest, large_geometry().shard).await.unwrap();
                assert!([read.master, read.exp_avg, read.exp_avg_sq] == tensors);
            } else {
                assert_eq!(restore(&third).await.unwrap(), Some(10));
            }
            checkpoint(&third, &fence, 30).await;
            third.gc(&fence, Retention::last(1)).await.unwrap();
            assert!(third.verify(Select::All, Depth::Full).await.unwrap().is_clean());
            let mut left = objects_under(&objects).await;
            left.retain(|key| key.as_ref().contains("shards/"));
            assert_eq!(left.len(), geometries().len(), "{fault:?} of {operation}: {left:?}");
        }
        assert!(seen[0], "some death comes before the commit record");
        assert!(seen[1] || fault == Fault::Before, "some death comes after it");
        let hits = |operation: &str| struck.iter().filter(|it| **it == operation).count();
        assert_eq!(
            ["begin upload", "upload part", "complete upload"].map(hits),
            [1, 2, 1],
            "{struck:?}"
        );
        assert!(struck.len() > 15, "every operation of a checkpoint's life: {struck:?}");
    }
}

#[tokio::test]
async fn a_fenced_controller_can_neither_commit_nor_delete() {
    // CKPT-3
    let objects = memory();
    let (old, new) = (open(&objects, 1), open(&objects, 2));
    let old_fence = old.claim(Generation(0)).await.unwrap();
    for step in [10, 20, 30] {
        checkpoint(&old, &old_fence, step).await;
    }
    let pending = upload(&old, 40, old_fence.generation).await;
    let new_fence = new.claim(Generation(0)).await.unwrap();
    assert!(new_fence.generation > old_fence.generation);
    let fenced = StoreError::Fenced {
        key: format!("commits/{:020}.jsonl", new_fence.sequence),
        by: new_fence.generation.0,
    };
    let before = objects_under(&objects).await;
    assert_eq!(old.commit(&old_fence, &pending).await.unwrap_err(), fenced);
    assert_eq!(old.gc(&old_fence, Retention::last(1)).await.unwrap_err(), fenced);
    assert_eq!(
        objects_under(&objects).await,
        before,
        "a fenced controller changes nothing"
    );
    checkpoint(&new, &new_fence, 40).await;
    assert_eq!(restore(&new).await.unwrap(), Some(40));
}

// CKPT-3: whoever is replaced while it waits for the store fences nobody, not even where its first try was overtaken.
#[tokio::test]
async fn a_claim_that_is_not_wanted_any_more_fences_nobody() {
    let mut refused_late = false;
    for fail_at in 0..12 {
        let objects = memory();
        let new = open(&objects, 2);
        let fence = new.claim(Generation(0)).await.unwrap();
        let before = objects_under(&objects).await;
        let faulty = Faulty::new(objects.clone(), fail_at, Fault::ConflictBefore, false);
        let old = CheckpointStore::with_object_store(faulty, "runs/a", writer(1));
        let asked = std::sync::atomic::AtomicU64::new(0);
        let once = || asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0;
        let late = matches!(
            old.claim_while(Generation(0), once).await,
            Err(StoreError::Refused { .. })
        );
        let mut refused = old.claim_while(Generation(0), || false).await.unwrap_err();
        if !matches!(refused, StoreError::Refused { .. }) {
            // The fault hit this one: it comes once.
            refused = old.claim_while(Generation(0), || false).await.unwrap_err();
        }
        assert!(matches!(refused, StoreError::Refused { .. }), "{refused}");
        if late {
            refused_late = true;
            assert_eq!(objects_under(&objects).await, before);
            checkpoint(&new, &fence, 10).await;
        }
    }
    assert!(refused_late, "some fault hits the claim's own write");
}

async fn objects_under(objects: &Arc<dyn ObjectStore>) -> Vec<Path> {
    use futures::TryStreamExt;
    let mut keys: Vec<Path> = objects
        .list(None)
        .map_ok(|meta| meta.location)
        .try_collect()
        .await
        .unwrap();
    keys.sort();
    keys
}

#[tokio::test]
async fn a_generation_is_above_all_that_wrote_and_all_that_is_asked_for() {
    let objects = memory();
    let store = open(&objects, 1);
    let fence = store.claim(Generation(0)).await.unwrap();
    assert_eq!(fence.generation, Generation(1));
    // A world reconfigured without a new controller commits under a later generation.
    let manifest = upload(&store, 10, Generation(5)).await;
    store.commit(&fence, &manifest).await.unwrap();
    assert_eq!(
        open(&objects, 2).claim(Generation(0)).await.unwrap().generation,
        Generation(6)
    );
    assert_eq!(
        open(&objects, 3).claim(Generation(40)).await.unwrap().generation,
        Generation(40)
    );
}

#[tokio::test]
async fn what_does_not_add_up_is_refused_before_anything_is_written() {
    let objects = memory();
    let (store, other) = (open(&objects, 1), open(&objects, 2));
    let fence = store.claim(Generation(0)).await.unwrap();
    let good = upload(&store, 10, fence.generation).await;
    type Spoil = fn(&mut Manifest);
    let spoiled: [(&str, Spoil); 6] = [
        ("a shard less", |m| drop(m.shards.pop())),
        ("shards exchanged", |m| m.shards.swap(0, 1)),
        ("one object twice", |m| m.shards[1].object = m.shards[0].object.clone()),
        ("a gap", |m| m.shards[1].first_block += 1),
        ("the trace elsewhere", |m| m.trace_head.step = StepsCompleted(9)),
        ("an old generation", |m| m.generation = Generation(0)),
    ];
    let before = objects_under(&objects).await;
    for (what, spoil) in spoiled {
        let mut manifest = good.clone();
        spoil(&mut manifest);
        let error = store.commit(&fence, &manifest).await.unwrap_err();
        assert!(matches!(error, StoreError::Refused { .. }), "{what}: {error}");
    }
    let foreign = other.commit(&fence, &good).await.unwrap_err();
    assert!(matches!(foreign, StoreError::Refused { .. }), "{foreign}");
    let mut missing = good.clone();
    missing.shards[2].object.key = good.shards[2]
        .object
        .key
        .replace("-000000.", "-999999.")
        .replace("-000002.", "-999999.");
    let error = store.commit(&fence, &missing).await.unwrap_err();
    assert!(error.is_bad_object(), "{error}");
    assert_eq!(objects_under(&objects).await, before);
    store.commit(&fence, &good).await.unwrap();
    let again = store.commit(&fence, &good).await.unwrap();
    assert_eq!(commits_of(&store, 10).await, 1, "a repeated commit is the same commit");
    assert_eq!(again.reference.step, StepsCompleted(10));
}

async fn rival(store: CheckpointStore, step: u64) -> (Fence, Result<u64, StoreError>) {
    let fence = store.claim(Generation(0)).await.unwrap();
    let manifest = upload(&store, step, fence.generation).await;
    let committed = store.commit(&fence, &manifest).await;
    (fence, committed.map(|committed| committed.reference.sequence))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    // CKPT-3: however two controllers interleave, the one that claimed last commits, and the other at most before that.
    #[test]
    fn racing_controllers_never_both_hold_the_store(schedules in prop::array::uniform2(1_u64..)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let objects = memory();
            let rivals = [0, 1].map(|i| {
                let interleaved = Faulty::interleaved(objects.clone(), schedules[i]);
                CheckpointStore::with_object_store(interleaved, "runs/a", writer(i as u8 + 1))
            });
            let [a, b] = rivals;
            let (a, b) = tokio::join!(rival(a, 10), rival(b, 20));
            let (earlier, later) = if a.0.sequence < b.0.sequence { (a, b) } else { (b, a) };
            assert!(earlier.0.generation < later.0.generation);
            assert!(later.1.is_ok(), "the last to claim commits: {later:?}");
            match earlier.1 {
                Ok(sequence) => assert!(sequence < later.0.sequence, "committed behind a later fence"),
                Err(error) => assert!(matches!(error, StoreError::Fenced { .. }), "{error}"),
            }
            let reader = open(&objects, 9);
            assert!(reader.verify(Select::All, Depth::Full).await.unwrap().is_clean());
            assert!(restore(&reader).await.unwrap().is_some());
        });
    }
}

// CKPT-3 on real files, from many threads: claims never share a place or a generation.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_claims_in_a_folder_are_all_different() {
    let folder = tempfile::tempdir().unwrap();
    let mut claims = tokio::task::JoinSet::new();
    for number in 0..8 {
        let location = folder.path().to_str().unwrap().to_string();
        claims.spawn(async move {
            let store = CheckpointStore::open(&location, writer(number)).await.unwrap();
            store.claim(Generation(0)).await.unwrap()
        });
    }
    let mut fences = claims.join_all().await;
    fences.sort_by_key(|fence| fence.sequence);
    let places: Vec<_> = fences
        .iter()
        .map(|fence| (fence.sequence, fence.generation.0))
        .collect();
    assert_eq!(places, (0..8).map(|i| (i, i + 1)).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_sleeper_that_wins_a_deleted_place_is_found_out() {
    // CKPT-1, CKPT-3: somebody deletes a record; an old controller that was asleep creates it again.
    let objects = memory();
    let old = open(&objects, 1);
    let old_fence = old.claim(Generation(0)).await.unwrap();
    let stale = upload(&old, 10, old_fence.generation).await;
    // What the sleeper would write at place 1, prepared in a copy of the store.
    let copy = memory();
    copy_all(&objects, &copy).await;
    open(&copy, 1).commit(&old_fence, &stale).await.unwrap();
    let record = Path::from("runs/a/commits/00000000000000000001.jsonl");
    let stale_record = copy.get(&record).await.unwrap().bytes().await.unwrap();

    let new = open(&objects, 2);
    let fence = new.claim(Generation(0)).await.unwrap();
    checkpoint(&new, &fence, 20).await;
    objects.delete(&record).await.unwrap();
    let error = old.commit(&old_fence, &stale).await.unwrap_err();
    assert!(
        matches!(error, StoreError::Fenced { .. }),
        "the other's commit betrays it even without its fence: {error}"
    );
    objects.put(&record, stale_record.into()).await.unwrap();
    let reader = open(&objects, 3);
    assert_eq!(restore(&reader).await.unwrap(), Some(20));
    assert_eq!(commits_of(&reader, 10).await, 0, "contradicted by its successor");
    let report = reader.verify(Select::All, Depth::Full).await.unwrap();
    assert!(
        report
            .chain_problems
            .iter()
            .any(|problem| problem.contains("successor")),
        "{report:?}"
    );
}

async fn copy_all(from: &Arc<dyn ObjectStore>, to: &Arc<dyn ObjectStore>) {
    for key in objects_under(from).await {
        let bytes = from.get(&key).await.unwrap().bytes().await.unwrap();
        to.put(&key, bytes.into()).await.unwrap();
    }
}

#[tokio::test]
async fn a_controller_whose_own_record_rots_goes_on_and_one_that_cannot_know_stops() {
    let objects = memory();
    let store = open(&objects, 1);
    let fence = store.claim(Generation(0)).await.unwrap();
    checkpoint(&store, &fence, 10).await;
    let record = Path::from("runs/a/commits/00000000000000000001.jsonl");
    objects.put(&record, "rotten".into()).await.unwrap();
    checkpoint(&store, &fence, 20).await;
    assert_eq!(restore(&store).await.unwrap(), Some(20));
    // A record that this process never saw whole may have been another's claim.
    let unseen = Path::from("runs/a/commits/00000000000000000003.jsonl");
    objects.put(&unseen, "rotten from the start".into()).await.unwrap();
    let manifest = upload(&store, 30, fence.generation).await;
    let error = store.commit(&fence, &manifest).await.unwrap_err();
    assert!(
        matches!(&error, StoreError::Corrupt { why, .. } if why.contains("claim the store again")),
        "{error}"
    );
    let fence = store.claim(fence.generation).await.unwrap();
    let manifest = upload(&store, 30, fence.generation).await;
    store.commit(&fence, &manifest).await.unwrap();
    assert_eq!(restore(&store).await.unwrap(), Some(30));
}

// Large shards go up in parts; a failed part leaves nothing behind that counts (CKPT-1).
#[tokio::test]
async fn large_shards_go_up_in_parts_and_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let local: Arc<dyn ObjectStore> = Arc::new(
        LocalFileSystem::new_with_prefix(folder.path())
            .unwrap()
            .with_fsync(true),
    );
    let geometry = large_geometry();
    let elements = geometry.elements() as usize;
    let tensors = [0, 1, 2].map(|t| (0..elements).map(|i| (i * 3 + t) as f32).collect::<Vec<_>>());
    let state = ShardPayload::new(tensors.clone());
    let (step, generation) = (StepsCompleted(10), Generation(1));
    for objects in [memory(), local] {
        for fault in [Fault::Before, Fault::After] {
            // Begin, two parts, completion: 12 MB in parts of 8 MiB.
            for fail_at in 0..4 {
                let faulty = Faulty::new(objects.clone(), fail_at, fault, false);
                let store = CheckpointStore::with_object_store(faulty, "x", writer(1));
                let put = || store.put_shard(step, generation, &geometry, state.clone());
                let error = put().await.unwrap_err();
                assert!(matches!(error, StoreError::Retry { .. }), "{error}");
                put().await.unwrap();
            }
        }
        let store = CheckpointStore::with_object_store(objects, "x", writer(1));
        let record = store
            .put_shard(step, generation, &geometry, state.clone())
            .await
            .unwrap();
        assert!(record.object.length > tarazed_store::limits::SINGLE_PUT_BYTES_MAX);
        let mut manifest = common::manifest(&store, 10, generation, vec![record]);
        manifest.block_elements = geometry.block_elements;
        let fence = store.claim(generation).await.unwrap();
        manifest.generation = fence.generation;
        store.commit(&fence, &manifest).await.unwrap();
        let read = store.get_shard(&manifest, geometry.shard).await.unwrap();
        assert!(read.master == tensors[0] && read.exp_avg == tensors[1] && read.exp_avg_sq == tensors[2]);
        assert_eq!(store.read_flat_weights(&manifest).await.unwrap(), tensors[0]);
    }
    let left: Vec<_> = walk(folder.path())
        .into_iter()
        .filter(|name| name.contains('#'))
        .collect();
    assert!(left.is_empty(), "aborted uploads clean up after themselves: {left:?}");
}

/// However many shards go up at once, large or small: every byte of a tensor is read by its request where it lies in the
/// snapshot, so uploads need no memory beside it; and only so many requests share the link.
#[tokio::test]
async fn uploads_copy_nothing() {
    let objects = Faulty::interleaved(memory(), 7);
    let carried = objects.carried.clone();
    let store = CheckpointStore::with_object_store(objects, "x", writer(1));
    let uploads = (0..24_u32).map(|index| {
        let geometry = ShardGeometry {
            shard: tarazed_domain::OptimizerShardIndex(index),
            block_elements: if index.is_multiple_of(2) { 500_000 } else { 200_000 },
            ..geometries()[0]
        };
        let tensor: Arc<[f32]> = vec![index as f32; geometry.elements() as usize].into();
        let state = ShardPayload::new([tensor.clone(), tensor.clone(), tensor.clone()]);
        let store = store.clone();
        let upload = tokio::spawn(async move {
            store
                .put_shard(StepsCompleted(1), Generation(1), &geometry, state)
                .await
        });
        (tensor, upload)
    });
    let mut tensors = Vec::new();
    for (tensor, upload) in uploads.collect::<Vec<_>>() {
        upload.await.unwrap().unwrap();
        tensors.push(tensor);
    }
    let places: Vec<_> = tensors
        .iter()
        .map(|tensor| {
            let floats = tensor.as_ptr_range();
            floats.start.addr()..floats.end.addr()
        })
        .collect();
    let is_in_a_snapshot = |piece: &Range<usize>| {
        let within = |place: &Range<usize>| place.start <= piece.start && piece.end <= place.end;
        places.iter().any(within)
    };
    let (in_place, copied): (Vec<_>, Vec<_>) = carried.pieces().into_iter().partition(is_in_a_snapshot);
    let bytes = |pieces: &[Range<usize>]| pieces.iter().map(ExactSizeIterator::len).sum::<usize>();
    let of_tensors: usize = places.iter().map(|place| 3 * place.len()).sum();
    assert_eq!(bytes(&in_place), of_tensors, "all of the tensors");
    assert!(bytes(&copied) <= 24 * 1024, "headers alone: {copied:?}");
    let most = carried.most();
    assert_eq!(
        most,
        tarazed_store::limits::UPLOADS_IN_FLIGHT_MAX as u64,
        "requests at once"
    );
}

fn walk(folder: &std::path::Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        if entry.path().is_dir() {
            names.extend(walk(&entry.path()));
        } else {
            names.push(entry.path().display().to_string());
        }
    }
    names
}

#[tokio::test]
async fn a_checkpoint_is_found_by_its_step_and_read_in_order() {
    use futures::TryStreamExt;
    let objects = memory();
    let store = open(&objects, 1);
    assert_eq!(restore(&store).await.unwrap(), None);
    let fence = store.claim(Generation(0)).await.unwrap();
    for step in [10, 20] {
        checkpoint(&store, &fence, step).await;
    }
    let found = store.at_step(StepsCompleted(10)).await.unwrap();
    assert!(found.warnings.is_empty());
    // CKPT-6: parts in block order make up the flat space, whoever uploaded them.
    let parts: Vec<_> = store.read_weights(&found.manifest).try_collect().await.unwrap();
    let flat: Vec<f32> = geometries()
        .iter()
        .flat_map(|geometry| common::values(10, geometry, 0))
        .collect();
    assert_eq!(
        parts.iter().map(|part| part.first_element).collect::<Vec<_>>(),
        [0, 8, 16]
    );
    assert_eq!(parts.into_iter().flat_map(|part| part.values).collect::<Vec<_>>(), flat);
    assert_eq!(store.read_flat_weights(&found.manifest).await.unwrap(), flat);
    assert!(matches!(
        store.at_step(StepsCompleted(15)).await,
        Err(StoreError::NotFound { .. })
    ));
    let below = store.newest_valid(Some(StepsCompleted(20))).await.unwrap().unwrap();
    assert_eq!(below.manifest.step, StepsCompleted(10));
    assert!(store.newest_valid(Some(StepsCompleted(10))).await.unwrap().is_none());
    let states: Vec<_> = store
        .list()
        .await
        .unwrap()
        .into_iter()
        .map(|s| (s.reference.step.0, s.state))
        .collect();
    assert_eq!(
        states,
        [(20, CheckpointState::Committed), (10, CheckpointState::Committed)]
    );
}

// CKPT-4: whom a controller tells what it verified reads that checkpoint, whatever else of its step is there by then.
#[tokio::test]
async fn a_manifest_is_read_by_its_very_bytes_and_not_by_its_step() {
    let objects = memory();
    let (older, newer) = (open(&objects, 1), open(&objects, 2));
    checkpoint(&older, &older.claim(Generation(0)).await.unwrap(), 5).await;
    let verified = older.newest_verified(None).await.unwrap().unwrap();
    checkpoint(&newer, &newer.claim(Generation(0)).await.unwrap(), 5).await;

    let reader = open(&objects, 3);
    let of_the_step = reader.at_step(StepsCompleted(5)).await.unwrap().manifest;
    assert_ne!(of_the_step, verified.manifest, "the step alone names the newer one");
    assert_eq!(reader.manifest_at(&verified.object).await.unwrap(), verified.manifest);

    let mut longer = verified.object.clone();
    longer.length += 1;
    let mut other = verified.object.clone();
    other.blake3 = tarazed_store::Digest::of(b"other");
    let mut gone = verified.object.clone();
    gone.key.push('x');
    for wrong in [longer, other, gone] {
        let error = reader.manifest_at(&wrong).await.unwrap_err();
        assert!(
            error.is_bad_object() && error.to_string().contains(&wrong.key),
            "{error}"
        );
    }
}

// CKPT-4: a checkpoint is found by the digest of its manifest, as long as it stands; whoever is told the digest needs no record, and
// nothing else passes for it.
#[tokio::test]
async fn a_checkpoint_is_found_by_the_digest_of_its_manifest() {
    let objects = memory();
    let store = open(&objects, 1);
    let fence = store.claim(Generation(0)).await.unwrap();
    for step in [5, 10, 15] {
        checkpoint(&store, &fence, step).await;
    }
    let wanted = store.at_step(StepsCompleted(10)).await.unwrap();
    let digest = wanted.object.blake3;
    let found = store.by_manifest(digest).await.unwrap().unwrap();
    assert_eq!((found.reference, &found.manifest), (wanted.reference, &wanted.manifest));
    let other = tarazed_store::Digest::of(b"other");
    assert!(store.by_manifest(other).await.unwrap().is_none());

    let reader = RankStore::from(open(&objects, 2));
    for step in [None, Some(StepsCompleted(10))] {
        assert_eq!(reader.manifest_named(digest, step).await.unwrap(), wanted.manifest);
    }
    for (digest, step) in [(digest, Some(StepsCompleted(5))), (other, None)] {
        let error = reader.manifest_named(digest, step).await.unwrap_err();
        assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
    }
    let geometry = geometries()[1];
    let part = reader.get_weights(&wanted.manifest, geometry.shard).await.unwrap();
    assert_eq!(part.first_element, geometry.first_element());
    assert_eq!(part.values, common::values(10, &geometry, 0));

    store.gc(&fence, Retention::last(1)).await.unwrap();
    assert!(
        store.by_manifest(digest).await.unwrap().is_none(),
        "a retired one is none"
    );
}
