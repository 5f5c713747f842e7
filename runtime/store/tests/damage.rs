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
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tarazed_domain::{Generation, StepsCompleted};
use tarazed_store::{
    CheckpointStore, CommitRecord, Depth, Digest, Fence, RecordKind, Retention, Select, StoreError, Verdict,
    WriterNonce,
};

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

    // CKPT-4: any damage to any number of objects ends in the newest checkpoint that it left alone, or in a loud error, never in
    // a loop or a panic. A store that looks empty has lost all that could say otherwise.
    #[test]
    fn any_damage_anywhere_ends(blows in prop::collection::vec((any::<prop::sample::Index>(), damage()), 1..12)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            let written = pinned_and_collected(&objects).await;
            let before = contents(&objects).await;
            for (target, damage) in &blows {
                let all = keys(&objects).await;
                let target = &all[target.index(all.len())];
                spoil(&objects, target, &all[0], &all, damage).await;
                if keys(&objects).await.is_empty() {
                    return;
                }
            }
            let after = contents(&objects).await;
            let is_untouched = |key: &Path| before.get(key) == after.get(key);
            let whole = [30, 10].into_iter().find(|step| written[step].iter().all(is_untouched));
            let reader = CheckpointStore::with_object_store(objects, "", writer(9));
            match restore(&reader).await {
                Ok(found) => assert_eq!(found, whole),
                Err(StoreError::Corrupt { .. }) => assert_eq!(whole, None),
                Err(error) => panic!("{error}"),
            }
            let report = reader.verify(Select::All, Depth::Full).await.unwrap();
            if let Ok(None) = reader.newest_valid(None).await {
                assert!(report.is_clean() && report.checkpoints.is_empty(), "{report:?}");
            }
            let fence = reader.claim(Generation(0)).await.unwrap();
            checkpoint(&reader, &fence, 40).await;
            reader.gc(&fence, Retention::last(1)).await.unwrap();
            assert_eq!(restore(&reader).await.unwrap(), Some(40));
        });
    }
}

/// Three controllers, each with a checkpoint. That of step 10 is pinned, that of 20 was pinned, unpinned and collected. The keys
/// of each checkpoint.
async fn pinned_and_collected(objects: &Arc<dyn ObjectStore>) -> BTreeMap<u64, Vec<Path>> {
    let mut written = BTreeMap::new();
    for (number, step) in [(1, 10), (2, 20), (3, 30)] {
        let store = CheckpointStore::with_object_store(objects.clone(), "", writer(number));
        let fence = store.claim(Generation(0)).await.unwrap();
        let before = keys(objects).await;
        checkpoint(&store, &fence, step).await;
        let mut new = keys(objects).await;
        new.retain(|key| !before.contains(key));
        written.insert(step, new);
        match step {
            10 => {
                store.pin(StepsCompleted(10), "a result in the paper").await.unwrap();
            }
            20 => {
                store.pin(StepsCompleted(20), "for now").await.unwrap();
                store.unpin(StepsCompleted(20)).await.unwrap();
            }
            _ => {
                let report = store.gc(&fence, Retention::last(1)).await.unwrap();
                assert_eq!(report.retired.len(), 1, "{report:?}");
            }
        }
    }
    written
}

/// Places of the records in the chain of [`marked`] that are no fence and no commit.
const PIN_OF_10: u64 = 4;
const RETIREMENT_OF_20: u64 = 7;
const RETIREMENT_OF_30_AND_40: u64 = 10;
const PIN_OF_50: u64 = 11;
const MARKS: [u64; 6] = [PIN_OF_10, 5, 6, RETIREMENT_OF_20, RETIREMENT_OF_30_AND_40, PIN_OF_50];

fn record(sequence: u64) -> Path {
    Path::from(format!("commits/{sequence:020}.jsonl"))
}

/// A chain with records of all kinds. The checkpoints of 10 and 50 are there and pinned, all others are collected.
async fn marked(objects: &Arc<dyn ObjectStore>) -> (CheckpointStore, Fence) {
    let store = CheckpointStore::with_object_store(objects.clone(), "", writer(1));
    let fence = store.claim(Generation(0)).await.unwrap();
    for step in [10, 20, 30] {
        checkpoint(&store, &fence, step).await;
    }
    store.pin(StepsCompleted(10), "a result in the paper").await.unwrap();
    store.pin(StepsCompleted(20), "for now").await.unwrap();
    store.unpin(StepsCompleted(20)).await.unwrap();
    store.gc(&fence, Retention::last(1)).await.unwrap();
    for step in [40, 50] {
        checkpoint(&store, &fence, step).await;
    }
    store.gc(&fence, Retention::last(1)).await.unwrap();
    store.pin(StepsCompleted(50), "another one").await.unwrap();
    for (place, kind) in MARKS
        .into_iter()
        .zip(["pin", "pin", "unpin", "retire", "retire", "pin"])
    {
        let text = String::from_utf8(read(objects, &record(place)).await).unwrap();
        assert!(text.contains(&format!("\"kind\":{{\"{kind}\"")), "{place}: {text}");
    }
    (store, fence)
}

/// Damages the chosen records; the places of those that are damaged in the end.
async fn damage_marks(objects: &Arc<dyn ObjectStore>, blows: &[(prop::sample::Index, Damage)]) -> BTreeSet<u64> {
    let before = contents(objects).await;
    let marks = MARKS.map(record);
    for (target, damage) in blows {
        let target = target.index(marks.len());
        let mut there = keys(objects).await;
        there.retain(|key| key.as_ref().starts_with("commits/"));
        // The next of its like that is still there; itself, if it is the last.
        let mut others = (1..=marks.len()).map(|i| &marks[(target + i) % marks.len()]);
        let other = others.find(|key| there.contains(key));
        if let Some(other) = other.filter(|_| there.contains(&marks[target])) {
            spoil(objects, &marks[target], other, &there, damage).await;
        }
    }
    let after = contents(objects).await;
    let is_damaged = |place: &u64| before.get(&record(*place)) != after.get(&record(*place));
    MARKS.into_iter().filter(is_damaged).collect()
}

fn damaged_marks(blows: &[(prop::sample::Index, Damage)], heir: bool) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let (store, fence) = marked(&objects).await;
        let damaged = damage_marks(&objects, blows).await;
        let records = contents(&objects).await;
        // Nothing shows that a chain was longer: a record lost from its end is as if it had never been written.
        let head = records.keys().filter_map(place_of).max().unwrap();
        let shows = damaged.iter().any(|place| *place <= head);
        let fresh = CheckpointStore::with_object_store(objects.clone(), "", writer(2));
        for reader in [&store, &fresh] {
            // CKPT-4: neither what is pinned nor what is collected is taken for another, and the damage is said.
            assert_eq!(restore(reader).await.unwrap(), Some(50), "{damaged:?}");
            let found = reader.newest_verified(None).await.unwrap().unwrap();
            assert_eq!(found.warnings.is_empty(), !shows, "{damaged:?}: {:?}", found.warnings);
            let report = reader.verify(Select::All, Depth::Full).await.unwrap();
            assert_eq!(report.chain_problems.is_empty(), !shows, "{damaged:?}: {report:?}");
            // What is retired no longer is there again, and known to be gone.
            let mut gone = Vec::new();
            gone.extend(damaged.contains(&RETIREMENT_OF_20).then_some(20));
            gone.extend(
                damaged
                    .contains(&RETIREMENT_OF_30_AND_40)
                    .then_some([30, 40])
                    .into_iter()
                    .flatten(),
            );
            let (whole, bad): (Vec<_>, Vec<_>) = report.checkpoints.iter().partition(|it| it.problems.is_empty());
            assert_eq!(
                (steps(&whole), steps(&bad)),
                (vec![10, 50], gone),
                "{damaged:?}: {report:?}"
            );
        }
        let (next, fence) = if heir {
            let fence = fresh.claim(Generation(0)).await.unwrap();
            (fresh, fence)
        } else {
            (store, fence)
        };
        checkpoint(&next, &fence, 60).await;
        let before = contents(&objects).await;
        next.gc(&fence, Retention::last(1)).await.unwrap();
        // CKPT-5: no record goes, and nothing that is pinned or may have been.
        let after = contents(&objects).await;
        let is_record = |key: &&Path| key.as_ref().starts_with("commits/");
        for key in before.keys().filter(is_record) {
            assert_eq!(after.get(key), before.get(key), "{key}");
        }
        let report = next.verify(Select::All, Depth::Full).await.unwrap();
        let whole: Vec<_> = report.checkpoints.iter().filter(|it| it.problems.is_empty()).collect();
        let forgotten = head < PIN_OF_50;
        assert!(
            steps(&whole) == [10, 50, 60] || forgotten && steps(&whole) == [10, 60],
            "{damaged:?}: {report:?}"
        );
        assert_eq!(restore(&next).await.unwrap(), Some(60));
        let below = next.newest_verified(Some(StepsCompleted(60))).await.unwrap().unwrap();
        assert_eq!(Some(below.manifest.step.0), steps(&whole).into_iter().rev().nth(1));
    });
}

fn steps(verdicts: &[&Verdict]) -> Vec<u64> {
    let mut steps: Vec<u64> = verdicts.iter().map(|verdict| verdict.reference.step.0).collect();
    steps.sort_unstable();
    steps
}

fn place_of(key: &Path) -> Option<u64> {
    let name = key.as_ref().strip_prefix("commits/")?.strip_suffix(".jsonl")?;
    name.parse().ok()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    // CKPT-4, CKPT-5, for the records that are no checkpoint: retirements, pins, and their end.
    #[test]
    fn damaged_pins_and_retirements_cost_no_checkpoint(
        blows in prop::collection::vec((any::<prop::sample::Index>(), damage()), 1..5),
        heir in any::<bool>(),
    ) {
        damaged_marks(&blows, heir);
    }
}

// CKPT-4: whoever looks learns of every bad object at once, not of one per look.
#[tokio::test]
async fn every_bad_object_of_a_checkpoint_is_named() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let store = CheckpointStore::with_object_store(objects.clone(), "", writer(1));
    let fence = store.claim(Generation(0)).await.unwrap();
    for step in [10, 20] {
        checkpoint(&store, &fence, step).await;
    }
    let mut shards = keys(&objects).await;
    shards.retain(|key| key.as_ref().starts_with("shards/00000000000000000020/"));
    let [missing, whole, short] = shards.as_slice() else {
        panic!("{shards:?}");
    };
    objects.delete(missing).await.unwrap();
    let mut bytes = read(&objects, short).await;
    bytes.pop();
    objects.put(short, bytes.into()).await.unwrap();
    for depth in [Depth::Quick, Depth::Full] {
        let report = store.verify(Select::All, depth).await.unwrap();
        let [newest, older] = report.checkpoints.as_slice() else {
            panic!("{report:?}");
        };
        assert!(older.problems.is_empty(), "{report:?}");
        let [first, second] = newest.problems.as_slice() else {
            panic!("{depth:?}: {report:?}");
        };
        assert!(
            first.contains(missing.as_ref()) && second.contains(short.as_ref()),
            "{report:?}"
        );
        assert!(!newest.problems.concat().contains(whole.as_ref()), "{report:?}");
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

/// A chain of a claim and the checkpoint of step 10.
async fn one_checkpoint() -> (Arc<dyn ObjectStore>, CheckpointStore) {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let store = CheckpointStore::with_object_store(objects.clone(), "", writer(1));
    let fence = store.claim(Generation(0)).await.unwrap();
    checkpoint(&store, &fence, 10).await;
    (objects, store)
}

/// CKPT-1, CKPT-4: an object whose number no chain reaches is said to be none of its records. It ends no walk, and whoever
/// claims, commits or collects goes on behind the true head.
#[tokio::test]
async fn a_number_that_no_chain_reaches_costs_nothing() {
    for stray in [u64::MAX, u64::MAX - 1, 1_000_000_000_000_000].map(record) {
        let (objects, store) = one_checkpoint().await;
        objects.put(&stray, "anything".into()).await.unwrap();
        let says = |problems: &[String]| {
            let [problem] = problems else {
                panic!("{stray}: {problems:?}");
            };
            assert!(problem.starts_with(stray.as_ref()), "{problem}");
            assert!(problem.contains("move it out of the store"), "{problem}");
        };
        let next = CheckpointStore::with_object_store(objects.clone(), "", writer(2));
        for reader in [&store, &next] {
            let found = reader.newest_valid(None).await.unwrap().unwrap();
            assert_eq!(found.manifest.step, StepsCompleted(10));
            says(&found.warnings);
            let report = reader.verify(Select::All, Depth::Full).await.unwrap();
            says(&report.chain_problems);
            assert_eq!(report.records, 2);
            assert!(report.checkpoints[0].problems.is_empty(), "{report:?}");
        }
        let fence = next.claim(Generation(0)).await.unwrap();
        assert_eq!((fence.sequence, fence.generation), (2, Generation(2)));
        checkpoint(&next, &fence, 20).await;
        let collected = next.gc(&fence, Retention::last(1)).await.unwrap();
        assert_eq!((collected.kept.len(), collected.retired.len()), (1, 1), "{collected:?}");
        assert_eq!(restore(&next).await.unwrap(), Some(20));
    }
}

/// What leaves no place or no generation behind it is refused by its name, and with it out of the way the run goes on. Until
/// then its checkpoints restore.
#[tokio::test]
async fn the_last_place_and_the_highest_generation_are_refused_by_name() {
    let (objects, _) = one_checkpoint().await;
    let previous = Digest::of(&read(&objects, &record(1)).await);
    let highest = Generation(i64::MAX as u64);
    let forged = CommitRecord::new(2, previous, WriterNonce([9; 16]), highest, RecordKind::Fence {});
    for (place, bytes) in [
        (999_999_999_999_999, b"anything".to_vec()),
        (2, forged.encode().unwrap()),
    ] {
        objects.put(&record(place), bytes.into()).await.unwrap();
        let store = CheckpointStore::with_object_store(objects.clone(), "", writer(2));
        let before = keys(&objects).await;
        let refused = store.claim(Generation(0)).await.unwrap_err();
        assert!(matches!(refused, StoreError::Reconfigure { .. }), "{refused:?}");
        let said = refused.to_string();
        assert!(
            said.contains(record(place).as_ref()) && said.contains("move it out of the store"),
            "{said}"
        );
        assert_eq!(keys(&objects).await, before, "nothing is written");
        assert_eq!(restore(&store).await.unwrap(), Some(10));
        objects.delete(&record(place)).await.unwrap();
        let fence = CheckpointStore::with_object_store(objects.clone(), "", writer(3))
            .claim(Generation(0))
            .await
            .unwrap();
        assert_eq!(fence.sequence, 2);
        objects.delete(&record(fence.sequence)).await.unwrap();
    }
}

/// CKPT-4: a manifest may claim what it likes; nobody makes room for more than the store holds.
#[tokio::test]
async fn a_shard_that_is_longer_than_any_memory_is_an_error() {
    let (_, store) = one_checkpoint().await;
    let mut manifest = store.newest_valid(None).await.unwrap().unwrap().manifest;
    manifest.block_elements = 1 << 40;
    for shard in &mut manifest.shards {
        shard.object.length = 1 << 50;
    }
    let shard = manifest.shards[0].shard;
    let whole = store.get_shard(&manifest, shard).await.unwrap_err();
    let weights = std::pin::pin!(store.read_weights(&manifest))
        .try_next()
        .await
        .unwrap_err();
    for error in [whole, weights] {
        assert!(
            matches!(&error, StoreError::Corrupt { why, .. } if why.ends_with("bytes instead of 1125899906842624")),
            "{error}"
        );
    }
}

/// Every object with its bytes.
async fn contents(objects: &Arc<dyn ObjectStore>) -> BTreeMap<Path, Vec<u8>> {
    let mut contents = BTreeMap::new();
    for key in keys(objects).await {
        let bytes = read(objects, &key).await;
        contents.insert(key, bytes);
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

/// CKPT-4: what is garbled once on its way, a record, a manifest or a shard, is read again: it costs no checkpoint, and is no damage
/// in the eyes of a verification.
#[tokio::test]
async fn a_bit_flipped_on_the_way_costs_no_checkpoint() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let store = CheckpointStore::with_object_store(objects.clone(), "", writer(1));
    let fence = store.claim(Generation(0)).await.unwrap();
    for step in [10, 20] {
        checkpoint(&store, &fence, step).await;
    }
    let faulty = |fail_at| {
        let faulty = Faulty::new(objects.clone(), fail_at, Fault::Garbles, false);
        (
            faulty.clone(),
            CheckpointStore::with_object_store(faulty, "", writer(2)),
        )
    };
    for fail_at in 0.. {
        let (garbles, reader) = faulty(fail_at);
        assert_eq!(restore(&reader).await.unwrap(), Some(20), "{fail_at}");
        let (_, reader) = faulty(fail_at);
        let report = reader.verify(Select::All, Depth::Full).await.unwrap();
        assert!(
            report.is_clean() && report.checkpoints.len() == 2,
            "{fail_at}: {report:?}"
        );
        if garbles.struck().is_none() {
            assert!(fail_at > 10, "every operation of a restore");
            return;
        }
    }
}

/// What a verification of [`newest_is_bad`] must find: the steps that are bad.
fn bad_steps(depth: Depth) -> &'static [u64] {
    match depth {
        // The bit that is turned around shows in the hash alone.
        Depth::Quick => &[],
        Depth::Full => &[30],
    }
}

/// An answer that is lost is asked for again, whichever it is, and nobody sees it.
#[tokio::test(start_paused = true)]
async fn one_lost_answer_ends_no_verification() {
    for depth in [Depth::Quick, Depth::Full] {
        for fail_at in 0.. {
            let faulty = Faulty::new(newest_is_bad().await, fail_at, Fault::Before, false);
            let store = CheckpointStore::with_object_store(faulty.clone(), "runs/a", writer(2));
            let report = store.verify(Select::All, depth).await.unwrap();
            let bad: Vec<&Verdict> = report.checkpoints.iter().filter(|it| !it.problems.is_empty()).collect();
            assert_eq!(steps(&bad), bad_steps(depth), "{depth:?} at {fail_at}: {report:?}");
            let unread = report.checkpoints.iter().any(|it| !it.unread.is_empty() || it.retired);
            assert!(
                !unread && report.checkpoints.len() == 3,
                "{depth:?} at {fail_at}: {report:?}"
            );
            if faulty.struck().is_none() {
                assert!(fail_at > 15, "the fault must have hit every operation");
                break;
            }
        }
    }
}

/// CKPT-4: where the store goes silent for good, what was found until then is told, what was not read is told apart from it,
/// and nobody asks for each of the other objects.
#[tokio::test(start_paused = true)]
async fn a_store_that_is_gone_hides_nothing_that_was_found() {
    let undisturbed = CheckpointStore::with_object_store(newest_is_bad().await, "runs/a", writer(2));
    let undisturbed = undisturbed.verify(Select::All, Depth::Full).await.unwrap();
    let whole_bytes = undisturbed.checkpoints[2].bytes_hashed;
    let mut both = false;
    for fail_at in 0.. {
        let faulty = Faulty::new(newest_is_bad().await, fail_at, Fault::Before, true);
        let store = CheckpointStore::with_object_store(faulty.clone(), "runs/a", writer(2));
        let report = match store.verify(Select::All, Depth::Full).await {
            Ok(report) => report,
            Err(error) => {
                assert!(matches!(error, StoreError::Retry { .. }), "{fail_at}: {error}");
                assert!(fail_at < 5, "only of the chain, a listing and four records: {fail_at}");
                continue;
            }
        };
        let [newest, .., oldest] = report.checkpoints.as_slice() else {
            panic!("{fail_at}: {report:?}");
        };
        for verdict in &report.checkpoints {
            let step = verdict.reference.step.0;
            assert!(verdict.problems.is_empty() || step == 30, "{fail_at}: {report:?}");
            let passes = verdict.problems.is_empty() && verdict.unread.is_empty();
            assert_eq!(passes, verdict.bytes_hashed == whole_bytes, "{fail_at}: {report:?}");
        }
        if faulty.struck().is_none() {
            assert!(fail_at > 25, "the store must have gone at every operation: {fail_at}");
            break;
        }
        both |= !newest.problems.is_empty() && !oldest.unread.is_empty();
        let asked = faulty.operations.load(std::sync::atomic::Ordering::SeqCst);
        // Three objects and the chain, four times each, and once more the chain for what is bad.
        assert!(asked.saturating_sub(fail_at) <= 20, "{fail_at}: {asked} operations");
    }
    assert!(both, "some end comes behind the bad shard");
}

/// Objects that cannot be read, however many in a row, are no sign that the store is gone as long as it still lists: the others
/// are verified. In the place of their bytes lie links to themselves, which the system does not open.
#[tokio::test]
async fn objects_that_cannot_be_read_end_no_verification() {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path().to_str().unwrap(), writer(1))
        .await
        .unwrap();
    let fence = store.claim(Generation(0)).await.unwrap();
    for step in [10, 20] {
        checkpoint(&store, &fence, step).await;
    }
    let shards = folder.path().join("shards/00000000000000000020");
    let closed: Vec<_> = std::fs::read_dir(shards)
        .unwrap()
        .map(|it| it.unwrap().path())
        .collect();
    assert_eq!(closed.len(), 3);
    for path in &closed {
        std::fs::remove_file(path).unwrap();
        std::os::unix::fs::symlink(path, path).unwrap();
    }
    for depth in [Depth::Quick, Depth::Full] {
        let report = store.verify(Select::All, depth).await.unwrap();
        let [newest, older] = report.checkpoints.as_slice() else {
            panic!("{report:?}");
        };
        assert_eq!(newest.unread.len(), 3, "{report:?}");
        assert!(newest.problems.is_empty() && !report.is_clean(), "{report:?}");
        assert!(older.problems.is_empty() && older.unread.is_empty(), "{report:?}");
        assert_eq!(older.bytes_hashed > 0, depth == Depth::Full, "{report:?}");
    }
}
