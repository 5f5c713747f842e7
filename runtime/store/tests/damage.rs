//! Damage to any object of the newest checkpoint, in memory and on disk: the next older one serves, never a wrong state.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Fault, Faulty, checkpoint, restore, writer};
use futures::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use proptest::prelude::*;
use std::sync::Arc;
use tarazed_domain::{Generation, StepsCompleted};
use tarazed_store::{CheckpointStore, Depth, Retention, Select, StoreError};

#[derive(Clone, Debug)]
enum Damage {
    Flip(prop::sample::Index),
    Truncate(prop::sample::Index),
    Extend(u8),
    Drop,
    /// The bytes of the older checkpoint's object of the same kind.
    Older,
    /// The bytes of another object of the same checkpoint.
    Neighbour(prop::sample::Index),
    Empty,
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        4 => any::<prop::sample::Index>().prop_map(Damage::Flip),
        2 => any::<prop::sample::Index>().prop_map(Damage::Truncate),
        1 => any::<u8>().prop_map(Damage::Extend),
        1 => Just(Damage::Drop),
        2 => Just(Damage::Older),
        2 => any::<prop::sample::Index>().prop_map(Damage::Neighbour),
        1 => Just(Damage::Empty),
    ]
}

async fn keys(objects: &Arc<dyn ObjectStore>) -> Vec<Path> {
    let mut keys: Vec<Path> = objects
        .list(None)
        .map_ok(|meta| meta.location)
        .try_collect()
        .await
        .unwrap();
    keys.sort();
    keys
}

async fn read(objects: &Arc<dyn ObjectStore>, key: &Path) -> Vec<u8> {
    objects.get(key).await.unwrap().bytes().await.unwrap().to_vec()
}

/// Carries the damage out; whether anything changed.
async fn spoil(objects: &Arc<dyn ObjectStore>, target: &Path, older: &Path, newest: &[Path], damage: &Damage) -> bool {
    let before = read(objects, target).await;
    let mut after = before.clone();
    if before.is_empty() {
        return false;
    }
    match damage {
        Damage::Flip(at) => {
            let bit = at.index(before.len() * 8);
            after[bit / 8] ^= 1 << (bit % 8);
        }
        Damage::Truncate(at) => after.truncate(at.index(before.len())),
        Damage::Extend(byte) => after.push(*byte),
        Damage::Older => after = read(objects, older).await,
        Damage::Neighbour(at) => after = read(objects, &newest[at.index(newest.len())]).await,
        Damage::Empty => after.clear(),
        Damage::Drop => {
            objects.delete(target).await.unwrap();
            return true;
        }
    }
    objects.put(target, after.clone().into()).await.unwrap();
    before != after
}

fn damaged_newest(objects: Arc<dyn ObjectStore>, target: prop::sample::Index, damage: &Damage) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let store = CheckpointStore::with_object_store(objects.clone(), "", writer(1));
        let fence = store.claim(Generation(0)).await.unwrap();
        checkpoint(&store, &fence, 10).await;
        let older = keys(&objects).await;
        checkpoint(&store, &fence, 20).await;
        let newest: Vec<Path> = keys(&objects)
            .await
            .into_iter()
            .filter(|key| !older.contains(key))
            .collect();
        assert_eq!(newest.len(), 5, "record, manifest, three shards");
        let target = &newest[target.index(newest.len())];
        let kind = |key: &&Path| key.parts().next() == target.parts().next();
        let twin = older.iter().rev().find(kind).unwrap();
        let spoiled = spoil(&objects, target, twin, &newest, damage).await;
        let expected = if spoiled { 10 } else { 20 };
        // The process that wrote it, and one that never saw it whole.
        for reader in [
            store,
            CheckpointStore::with_object_store(objects.clone(), "", writer(2)),
        ] {
            assert_eq!(restore(&reader).await.unwrap(), Some(expected), "{target}");
            let found = reader.newest_verified(None).await.unwrap().unwrap();
            assert_eq!(found.manifest.step, StepsCompleted(expected));
            let hidden = matches!(damage, Damage::Drop) && target.as_ref().contains("commits/");
            assert_eq!(
                found.warnings.is_empty(),
                !spoiled || hidden,
                "damage is said loudly: {:?}",
                found.warnings
            );
            let report = reader.verify(Select::All, Depth::Full).await.unwrap();
            assert_eq!(report.is_clean(), !spoiled || hidden, "{report:?}");
        }
        // And the run goes on.
        let next = CheckpointStore::with_object_store(objects, "", writer(3));
        let fence = next.claim(Generation(0)).await.unwrap();
        assert!(fence.generation > Generation(1));
        checkpoint(&next, &fence, 30).await;
        assert_eq!(restore(&next).await.unwrap(), Some(30));
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    // CKPT-4
    #[test]
    fn a_damaged_newest_checkpoint_gives_the_older_one(target: prop::sample::Index, damage in damage()) {
        damaged_newest(Arc::new(InMemory::new()), target, &damage);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    // CKPT-4, on files.
    #[test]
    fn the_same_in_a_folder(target: prop::sample::Index, damage in damage()) {
        let folder = tempfile::tempdir().unwrap();
        damaged_newest(Arc::new(LocalFileSystem::new_with_prefix(folder.path()).unwrap()), target, &damage);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    // CKPT-4: any damage to any number of objects ends in a whole state or in a loud error, never in a loop or a panic.
    #[test]
    fn any_damage_anywhere_ends(blows in prop::collection::vec((any::<prop::sample::Index>(), damage()), 1..12)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            for (number, step) in [(1, 10), (2, 20), (3, 30)] {
                let store = CheckpointStore::with_object_store(objects.clone(), "", writer(number));
                let fence = store.claim(Generation(0)).await.unwrap();
                checkpoint(&store, &fence, step).await;
            }
            for (target, damage) in &blows {
                let all = keys(&objects).await;
                let target = &all[target.index(all.len())];
                spoil(&objects, target, &all[0], &all, damage).await;
                if keys(&objects).await.is_empty() {
                    return;
                }
            }
            let reader = CheckpointStore::with_object_store(objects, "", writer(9));
            match restore(&reader).await {
                Ok(Some(step)) => assert!([10, 20, 30].contains(&step)),
                Ok(None) | Err(StoreError::Corrupt { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            reader.verify(Select::All, Depth::Full).await.unwrap();
            let fence = reader.claim(Generation(0)).await.unwrap();
            checkpoint(&reader, &fence, 40).await;
            reader.gc(&fence, Retention::last(1)).await.unwrap();
            assert_eq!(restore(&reader).await.unwrap(), Some(40));
        });
    }
}

#[tokio::test]
async fn all_checkpoints_bad_is_an_error_and_not_an_empty_store() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let store = CheckpointStore::with_object_store(objects.clone(), "", writer(1));
    let fence = store.claim(Generation(0)).await.unwrap();
    checkpoint(&store, &fence, 10).await;
    for key in keys(&objects)
        .await
        .into_iter()
        .filter(|key| key.as_ref().starts_with("manifests/"))
    {
        objects.delete(&key).await.unwrap();
    }
    let error = store.newest_valid(None).await.unwrap_err();
    assert!(
        matches!(&error, StoreError::Corrupt { why, .. } if why.contains("step 10")),
        "{error}"
    );
    let record = Path::from("commits/00000000000000000001.jsonl");
    objects.put(&record, "?".into()).await.unwrap();
    let error = store.newest_valid(None).await.unwrap_err();
    assert!(
        matches!(error, StoreError::Corrupt { .. }),
        "an unreadable record may have been a checkpoint: {error}"
    );
}

#[tokio::test]
async fn records_lost_in_the_middle_cost_no_checkpoint_around_them() {
    // CKPT-1, as chain.rs defines it: a lifecycle rule that eats old records does not end the run.
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let store = CheckpointStore::with_object_store(objects.clone(), "", writer(1));
    let fence = store.claim(Generation(0)).await.unwrap();
    for step in [10, 20, 30] {
        checkpoint(&store, &fence, step).await;
    }
    for lost in [0, 2] {
        objects
            .delete(&Path::from(format!("commits/{lost:020}.jsonl")))
            .await
            .unwrap();
    }
    let reader = CheckpointStore::with_object_store(objects.clone(), "", writer(2));
    let found = reader.newest_valid(None).await.unwrap().unwrap();
    assert_eq!(found.manifest.step, StepsCompleted(30));
    assert_eq!(found.warnings.len(), 2, "{:?}", found.warnings);
    assert_eq!(
        reader
            .newest_valid(Some(StepsCompleted(30)))
            .await
            .unwrap()
            .unwrap()
            .manifest
            .step,
        StepsCompleted(10)
    );
}

/// CKPT-1: a record that is garbled on its way once is read again. Believed, it would be named by its successor as it was
/// read, and the record in the store would never stand again.
#[tokio::test]
async fn a_bit_flipped_on_the_way_costs_no_record() {
    for fail_at in 0.. {
        let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let first = CheckpointStore::with_object_store(objects.clone(), "", writer(1));
        let fence = first.claim(Generation(0)).await.unwrap();
        checkpoint(&first, &fence, 10).await;
        let faulty = Faulty::new(objects.clone(), fail_at, Fault::Garbles, false);
        let second = CheckpointStore::with_object_store(faulty.clone(), "", writer(2));
        second.self_test().await.unwrap();
        let fence = second.claim(Generation(0)).await.unwrap();
        checkpoint(&second, &fence, 20).await;
        let clean = CheckpointStore::with_object_store(objects.clone(), "", writer(3));
        let report = clean.verify(Select::All, Depth::Full).await.unwrap();
        assert!(
            report.is_clean() && report.checkpoints.len() == 2,
            "{fail_at}: {report:?}"
        );
        if faulty.operations.load(std::sync::atomic::Ordering::SeqCst) <= fail_at {
            assert!(fail_at > 5, "the loop went through all operations");
            return;
        }
    }
}

/// Every object with its bytes.
async fn contents(objects: &Arc<dyn ObjectStore>) -> Vec<(Path, Vec<u8>)> {
    let mut contents = Vec::new();
    for key in keys(objects).await {
        let bytes = read(objects, &key).await;
        contents.push((key, bytes));
    }
    contents
}

/// Checkpoints of the steps 10, 20 and 30; a shard of the newest is damaged, so a restore has to go back to 20.
async fn newest_is_bad() -> Arc<dyn ObjectStore> {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let store = CheckpointStore::with_object_store(objects.clone(), "runs/a", writer(1));
    let fence = store.claim(Generation(0)).await.unwrap();
    for step in [10, 20, 30] {
        checkpoint(&store, &fence, step).await;
    }
    let shards = keys(&objects).await;
    let shard = shards
        .iter()
        .rev()
        .find(|key| key.as_ref().contains("shards/"))
        .unwrap();
    let mut bytes = read(&objects, shard).await;
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    objects.put(shard, bytes.into()).await.unwrap();
    objects
}

// CKPT-4: whoever restores dies at any operation, or one operation of its fails: it never takes the failure for a bad
// checkpoint and goes back further than it must, it changes nothing, and the next one restores what it would have.
#[tokio::test]
async fn a_restore_that_is_cut_short_anywhere_harms_nothing() {
    for (fault, dies) in [(Fault::Before, true), (Fault::Before, false), (Fault::After, false)] {
        for fail_at in 0.. {
            let objects = newest_is_bad().await;
            let before = contents(&objects).await;
            let faulty = Faulty::new(objects.clone(), fail_at, fault, dies);
            let operations = faulty.operations.clone();
            let restoring = CheckpointStore::with_object_store(faulty, "runs/a", writer(2));
            match restore(&restoring).await {
                Ok(found) => assert_eq!(found, Some(20), "{fault:?} at {fail_at}"),
                Err(error) => assert!(
                    matches!(error, StoreError::Retry { .. }),
                    "{fault:?} at {fail_at}: {error}"
                ),
            }
            assert_eq!(
                contents(&objects).await,
                before,
                "a restore only reads ({fault:?} at {fail_at})"
            );
            let next = CheckpointStore::with_object_store(objects, "runs/a", writer(3));
            assert_eq!(restore(&next).await.unwrap(), Some(20), "{fault:?} at {fail_at}");
            if operations.load(std::sync::atomic::Ordering::SeqCst) <= fail_at {
                assert!(fail_at > 10, "the fault must have hit every operation of a restore");
                break;
            }
        }
    }
}
