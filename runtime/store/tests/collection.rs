//! Collection: what goes, what stays (CKPT-5).
#![allow(clippy::unwrap_used)]

mod common;

use common::{Fault, Faulty, checkpoint, restore, upload, writer};
use futures::TryStreamExt;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use proptest::prelude::*;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tarazed_domain::{Generation, StepsCompleted};
use tarazed_store::{CheckpointState, CheckpointStore, Depth, Retention, Select, StoreError};

fn memory() -> Arc<dyn ObjectStore> {
    Arc::new(InMemory::new())
}

fn open(objects: &Arc<dyn ObjectStore>, number: u8) -> CheckpointStore {
    CheckpointStore::with_object_store(objects.clone(), "", writer(number))
}

async fn keys(objects: &Arc<dyn ObjectStore>, prefix: &str) -> Vec<String> {
    let all: Vec<String> = objects
        .list(None)
        .map_ok(|meta| meta.location.to_string())
        .try_collect()
        .await
        .unwrap();
    all.into_iter().filter(|key| key.starts_with(prefix)).collect()
}

fn steps(references: &[tarazed_store::CommitRef]) -> Vec<u64> {
    references.iter().map(|reference| reference.step.0).collect()
}

#[tokio::test]
async fn the_newest_stay_and_the_chain_is_never_cut() {
    let objects = memory();
    let store = open(&objects, 1);
    let fence = store.claim(Generation(0)).await.unwrap();
    for step in [10, 20, 30, 40, 50] {
        checkpoint(&store, &fence, step).await;
    }
    store.pin(StepsCompleted(20), "a result in the paper").await.unwrap();
    let report = store.gc(&fence, Retention::last(2)).await.unwrap();
    assert_eq!(
        (steps(&report.kept), steps(&report.retired)),
        (vec![50, 40, 20], vec![30, 10])
    );
    assert_eq!(report.deleted_objects, 8, "two manifests, six shards");
    assert_eq!(
        keys(&objects, "commits/").await.len(),
        1 + 5 + 1 + 1,
        "fence, commits, pin, retirement"
    );
    assert_eq!(keys(&objects, "manifests/").await.len(), 3);
    assert_eq!(keys(&objects, "shards/").await.len(), 9);
    assert!(store.verify(Select::All, Depth::Full).await.unwrap().is_clean());
    let listed: Vec<_> = store
        .list()
        .await
        .unwrap()
        .into_iter()
        .map(|s| (s.reference.step.0, s.state))
        .collect();
    let (kept, gone) = (CheckpointState::Committed, CheckpointState::Retired);
    assert_eq!(listed, [(50, kept), (40, kept), (30, gone), (20, kept), (10, gone)]);
    // Nothing is left to do; then the pin goes.
    let idle = store.gc(&fence, Retention::last(2)).await.unwrap();
    assert_eq!((idle.retired.len(), idle.deleted_objects), (0, 0));
    store.unpin(StepsCompleted(20)).await.unwrap();
    assert_eq!(
        steps(&store.gc(&fence, Retention::last(2)).await.unwrap().retired),
        [20]
    );
    assert_eq!(restore(&store).await.unwrap(), Some(50));
}

#[tokio::test]
async fn the_first_at_or_after_each_multiple_of_a_step_stays() {
    let objects = memory();
    let store = open(&objects, 1);
    let fence = store.claim(Generation(0)).await.unwrap();
    for step in [10, 20, 30, 40, 55, 65, 70] {
        checkpoint(&store, &fence, step).await;
    }
    let retention = Retention {
        last: 1,
        every_steps: 30,
        ..Retention::last(1)
    };
    let report = store.gc(&fence, retention).await.unwrap();
    assert_eq!(
        (steps(&report.kept), steps(&report.retired)),
        (vec![70, 65, 30], vec![55, 40, 20, 10])
    );
    assert!(store.verify(Select::All, Depth::Full).await.unwrap().is_clean());
    assert_eq!(
        steps(&store.gc(&fence, Retention::last(1)).await.unwrap().retired),
        [65, 30]
    );
}

/// A run that may be rolled back keeps one checkpoint that is old enough; what a rollback has left behind counts for nothing.
#[tokio::test]
async fn one_that_is_old_enough_stays_and_what_is_left_behind_goes() {
    let objects = memory();
    let store = open(&objects, 1);
    let fence = store.claim(Generation(0)).await.unwrap();
    for step in [10, 20, 30, 40, 50] {
        checkpoint(&store, &fence, step).await;
    }
    let back_to = |step: u64| Retention {
        back_to: Some(StepsCompleted(step)),
        ..Retention::last(1)
    };
    let report = store.gc(&fence, back_to(25)).await.unwrap();
    assert_eq!(
        (steps(&report.kept), steps(&report.retired)),
        (vec![50, 30, 20], vec![40, 10])
    );
    // Rolled back from 55 to 25: the checkpoint of 50 is newer than the one that is made on the way, and not gone on from.
    let live = |step: StepsCompleted| step.0 <= 25 || step.0 > 55;
    let found = store.newest_valid_where(live).await.unwrap().unwrap();
    assert_eq!(found.manifest.step, StepsCompleted(20));
    checkpoint(&store, &fence, 24).await;
    let report = store.gc_of(&fence, Retention::last(2), live).await.unwrap();
    assert_eq!(
        (steps(&report.kept), steps(&report.retired)),
        (vec![24, 50, 30, 20], vec![])
    );
    checkpoint(&store, &fence, 60).await;
    let report = store.gc_of(&fence, back_to(25), live).await.unwrap();
    assert_eq!(
        (steps(&report.kept), steps(&report.retired)),
        (vec![60, 24], vec![50, 30, 20])
    );
    assert!(store.verify(Select::All, Depth::Full).await.unwrap().is_clean());
    assert!(
        store.newest_valid_where(|step| step.0 < 24).await.unwrap().is_none(),
        "it begins from the seed"
    );
}

/// However long the run, there is one that is old enough and not much older than that.
#[tokio::test]
async fn the_old_one_keeps_up_with_the_run() {
    let (objects, reach) = (memory(), 35);
    let store = open(&objects, 1);
    let fence = store.claim(Generation(0)).await.unwrap();
    for step in (10..=400).step_by(10) {
        checkpoint(&store, &fence, step).await;
        let retention = Retention {
            back_to: Some(StepsCompleted(step.saturating_sub(reach))),
            ..Retention::last(1)
        };
        let kept = steps(&store.gc(&fence, retention).await.unwrap().kept);
        assert!(kept.len() <= 3, "{kept:?}");
        let old_enough = kept.iter().copied().find(|kept| kept + reach <= step);
        let due = step >= 2 * reach + 10;
        assert!(
            !due || old_enough.is_some_and(|old| old + 2 * reach + 10 >= step),
            "{kept:?}"
        );
    }
}

#[tokio::test]
async fn the_last_good_checkpoint_stays_however_many_bad_ones_follow() {
    let objects = memory();
    let store = open(&objects, 1);
    let fence = store.claim(Generation(0)).await.unwrap();
    for step in [10, 20, 30, 40] {
        checkpoint(&store, &fence, step).await;
    }
    for step in [30, 40] {
        let shard = keys(&objects, &format!("shards/{step:020}/")).await[0].clone();
        objects.delete(&Path::from(shard)).await.unwrap();
    }
    let report = store.gc(&fence, Retention::last(0)).await.unwrap();
    assert_eq!(
        (steps(&report.kept), steps(&report.retired)),
        (vec![40, 30, 20], vec![10])
    );
    assert_eq!(restore(&store).await.unwrap(), Some(20));
}

#[tokio::test]
async fn uploads_under_way_stay_and_abandoned_ones_go() {
    let objects = memory();
    let store = open(&objects, 1);
    let fence = store.claim(Generation(0)).await.unwrap();
    upload(&store, 10, fence.generation).await;
    let early = upload(&store, 30, fence.generation).await;
    // Without a commit behind this fence nothing says what is abandoned.
    assert_eq!(store.gc(&fence, Retention::last(1)).await.unwrap().deleted_objects, 0);
    checkpoint(&store, &fence, 20).await;
    let late = upload(&store, 15, fence.generation).await;
    let report = store.gc(&fence, Retention::last(1)).await.unwrap();
    assert_eq!(report.deleted_objects, 3, "the shards of step 10");
    // Step 30 is still to come; step 15 came after the commit of 20, as after a roll-back.
    for manifest in [late, early] {
        store.commit(&fence, &manifest).await.unwrap();
        assert!(store.verify(Select::Newest, Depth::Full).await.unwrap().is_clean());
    }
}

#[tokio::test]
async fn an_interrupted_collection_is_finished_by_the_next() {
    for fail_at in 0.. {
        let objects = memory();
        let store = open(&objects, 1);
        let fence = store.claim(Generation(0)).await.unwrap();
        for step in [10, 20, 30] {
            checkpoint(&store, &fence, step).await;
        }
        let faulty = Faulty::new(objects.clone(), fail_at, Fault::After, true);
        let dying = CheckpointStore::with_object_store(faulty, "", writer(1));
        let finished = dying.gc(&fence, Retention::last(1)).await.is_ok();
        // CKPT-5: at no moment is anything missing from what still counts.
        let heir = open(&objects, 2);
        let fence = heir.claim(Generation(0)).await.unwrap();
        assert!(
            heir.verify(Select::All, Depth::Full).await.unwrap().is_clean(),
            "death at {fail_at}"
        );
        assert_eq!(restore(&heir).await.unwrap(), Some(30));
        heir.gc(&fence, Retention::last(1)).await.unwrap();
        assert_eq!(keys(&objects, "manifests/").await.len(), 1, "death at {fail_at}");
        assert_eq!(keys(&objects, "shards/").await.len(), 3, "death at {fail_at}");
        if finished {
            assert!(
                fail_at > 20,
                "death at each of a collection's operations, the last of 8 deletions included: {fail_at}"
            );
            break;
        }
    }
}

/// CKPT-2, CKPT-5: the same where the collector lives on, whichever answer is lost, or whatever was not done: it is told to try again or
/// notices nothing, nothing that counts is ever missing, and the next call of the same collector leaves what one in peace leaves.
#[tokio::test]
async fn a_collection_that_loses_an_answer_is_finished_by_itself() {
    for fault in [Fault::Before, Fault::After, Fault::AfterAsConflict] {
        for fail_at in 0.. {
            let objects = memory();
            let store = open(&objects, 1);
            let fence = store.claim(Generation(0)).await.unwrap();
            for step in [10, 20, 30] {
                checkpoint(&store, &fence, step).await;
            }
            let faulty = Faulty::new(objects.clone(), fail_at, fault, false);
            let collector = CheckpointStore::with_object_store(faulty.clone(), "", writer(1));
            match collector.gc(&fence, Retention::last(1)).await {
                Ok(_) | Err(StoreError::Retry { .. }) => {}
                Err(error) => panic!("{fault:?} at {fail_at}: {error}"),
            }
            let clean = open(&objects, 2);
            let report = clean.verify(Select::All, Depth::Full).await.unwrap();
            assert!(report.is_clean(), "{fault:?} at {fail_at}: {report:?}");
            assert_eq!(restore(&clean).await.unwrap(), Some(30));
            if faulty.struck().is_none() {
                assert!(fail_at > 20, "each of a collection's operations: {fail_at}");
                break;
            }
            collector.gc(&fence, Retention::last(1)).await.unwrap();
            assert_eq!(keys(&objects, "manifests/").await.len(), 1, "{fault:?} at {fail_at}");
            assert_eq!(keys(&objects, "shards/").await.len(), 3, "{fault:?} at {fail_at}");
        }
    }
}

#[tokio::test]
async fn what_is_older_than_damage_in_the_chain_is_kept() {
    let objects = memory();
    let store = open(&objects, 1);
    let fence = store.claim(Generation(0)).await.unwrap();
    for step in [10, 20] {
        checkpoint(&store, &fence, step).await;
    }
    store.pin(StepsCompleted(10), "keep").await.unwrap();
    for step in [30, 40, 50] {
        checkpoint(&store, &fence, step).await;
    }
    objects
        .put(&Path::from("commits/00000000000000000003.jsonl"), "rotten".into())
        .await
        .unwrap();
    let report = store.gc(&fence, Retention::last(1)).await.unwrap();
    assert_eq!(steps(&report.retired), [40, 30], "the lost record was a pin");
    assert!(!report.warnings.is_empty());
    assert!(store.at_step(StepsCompleted(10)).await.is_ok());
}

#[tokio::test]
async fn a_full_disk_loses_nothing_and_collection_makes_room() {
    let objects = memory();
    let store = open(&objects, 1);
    let fence = store.claim(Generation(0)).await.unwrap();
    upload(&store, 5, fence.generation).await;
    for step in [10, 20] {
        checkpoint(&store, &fence, step).await;
    }
    let full = Faulty::new(objects.clone(), 0, Fault::Full, false);
    let full = CheckpointStore::with_object_store(full, "", writer(1));
    let geometry = &common::geometries()[0];
    let error = common::put_one(&full, 30, fence.generation, geometry)
        .await
        .unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    // Even the record of what is to go does not fit, but what failed uploads left needs none.
    let error = full.gc(&fence, Retention::last(1)).await.unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    assert_eq!(
        keys(&objects, "shards/").await.len(),
        6,
        "the shards of step 5 went, no others"
    );
    assert!(store.verify(Select::All, Depth::Full).await.unwrap().is_clean());
    assert_eq!(
        steps(&store.gc(&fence, Retention::last(1)).await.unwrap().retired),
        [10]
    );
    assert_eq!(restore(&store).await.unwrap(), Some(20));
}

/// CKPT-5: beside a run that collects its own store. What it retires while it is verified is no damage, however the two take
/// turns; what is damaged in a checkpoint that stays is.
#[tokio::test]
async fn what_is_retired_while_it_is_verified_is_no_damage() {
    let mut excused = 0;
    for (schedule, depth) in (1_u64..=100).flat_map(|schedule| [(schedule, Depth::Quick), (schedule, Depth::Full)]) {
        let objects = memory();
        let [run, person] = [(1, schedule), (2, !schedule)].map(|(number, schedule)| {
            let interleaved = Faulty::interleaved(objects.clone(), schedule);
            CheckpointStore::with_object_store(interleaved, "", writer(number))
        });
        let fence = run.claim(Generation(0)).await.unwrap();
        for step in [10, 20, 30, 40, 50] {
            checkpoint(&run, &fence, step).await;
        }
        let shard = keys(&objects, "shards/00000000000000000050/").await.remove(0);
        objects.delete(&Path::from(shard.as_str())).await.unwrap();
        let (collected, verified) = tokio::join!(run.gc(&fence, Retention::last(1)), person.verify(Select::All, depth));
        let gone = steps(&collected.unwrap().retired);
        assert_eq!(gone, [30, 20, 10], "{schedule}");
        let report = verified.unwrap();
        assert!(report.chain_problems.is_empty(), "{schedule}: {report:?}");
        for verdict in &report.checkpoints {
            let step = verdict.reference.step.0;
            let damaged = if step == 50 { vec![shard.as_str()] } else { vec![] };
            let named: Vec<&str> = verdict.problems.iter().filter_map(|it| it.split(' ').next()).collect();
            assert_eq!(named, damaged, "{schedule}, {depth:?}: {report:?}");
            assert!(verdict.unread.is_empty(), "{schedule}, {depth:?}: {report:?}");
            assert!(
                !verdict.retired || gone.contains(&step),
                "{schedule}, {depth:?}: {report:?}"
            );
            excused += usize::from(verdict.retired);
        }
    }
    assert!(excused > 0, "no collection came in between");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    // CKPT-5: a person's pin and a collection at the same moment: the pin holds, or is refused.
    #[test]
    fn a_pin_holds_against_a_collection_under_way(schedules in prop::array::uniform2(1_u64..)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let objects = memory();
            let [collector, person] = [0, 1].map(|i| {
                let interleaved = Faulty::interleaved(objects.clone(), schedules[i]);
                CheckpointStore::with_object_store(interleaved, "", writer(i as u8 + 1))
            });
            let fence = collector.claim(Generation(0)).await.unwrap();
            for step in [10, 20, 30] {
                checkpoint(&collector, &fence, step).await;
            }
            let (collected, pinned) = tokio::join!(collector.gc(&fence, Retention::last(1)), person.pin(StepsCompleted(10), "mine"));
            let gone = steps(&collected.unwrap().retired);
            match pinned {
                Ok(_) => assert_eq!(gone, [20]),
                Err(StoreError::NotFound { .. }) => assert_eq!(gone, [20, 10]),
                Err(error) => panic!("{error}"),
            }
            let report = open(&objects, 3).verify(Select::All, Depth::Full).await.unwrap();
            assert!(report.is_clean() && report.checkpoints.len() == 3 - gone.len(), "{report:?}");
        });
    }
}

#[tokio::test]
async fn half_written_files_of_a_dead_process_are_swept_from_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path().to_str().unwrap(), writer(1))
        .await
        .unwrap();
    store.self_test().await.unwrap();
    let fence = store.claim(Generation(0)).await.unwrap();
    checkpoint(&store, &fence, 10).await;
    let torn = |step: u64| {
        folder
            .path()
            .join(format!("shards/{step:020}/{:020}-x-000000-000000.safetensors#1", 1))
    };
    let make = |path: &std::path::Path, age_s: u64| {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let file = std::fs::File::create(path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age_s))
            .unwrap();
    };
    make(&torn(5), 3600);
    make(&torn(90), 3600);
    let probe = |name: &str| folder.path().join("self-test").join(name);
    make(&probe("young-create"), 60);
    make(&probe("old-create"), 7200);
    assert!(
        store.verify(Select::All, Depth::Full).await.unwrap().is_clean(),
        "half-written objects never count"
    );
    store.gc(&fence, Retention::last(1)).await.unwrap();
    assert!(
        !torn(5).exists() && !torn(5).parent().unwrap().exists(),
        "passed by a commit"
    );
    assert!(torn(90).exists(), "may still be an upload under way");
    assert!(
        probe("young-create").exists(),
        "may be part of another controller's self-test"
    );
    assert!(!probe("old-create").exists(), "left by a self-test that failed");
    assert_eq!(restore(&store).await.unwrap(), Some(10));
}

#[derive(Clone, Debug)]
enum Act {
    Checkpoint,
    Gc(u32),
    Pin(prop::sample::Index),
    Unpin(prop::sample::Index),
    NewController,
    Abandon,
    RollBack(prop::sample::Index),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => Just(Act::Checkpoint),
        2 => (0_u32..4).prop_map(Act::Gc),
        1 => any::<prop::sample::Index>().prop_map(Act::Pin),
        1 => any::<prop::sample::Index>().prop_map(Act::Unpin),
        1 => Just(Act::NewController),
        1 => Just(Act::Abandon),
        1 => any::<prop::sample::Index>().prop_map(Act::RollBack),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    // CKPT-5: through any history, every commit that is not retired is whole, pinned ones are never retired, no record of
    // the chain goes, and an upload that is committed later is still there.
    #[test]
    fn collection_never_takes_what_is_needed(acts in prop::collection::vec(act(), 1..30)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let objects = memory();
            let mut controller = 1;
            let mut store = open(&objects, controller);
            let mut fence = store.claim(Generation(0)).await.unwrap();
            let (mut step, mut records) = (0, 0);
            for act in acts {
                let live: Vec<_> = store.list().await.unwrap().into_iter()
                    .filter(|summary| summary.state == CheckpointState::Committed).collect();
                let pick = |index: prop::sample::Index| (!live.is_empty()).then(|| live[index.index(live.len())].reference.step);
                match act {
                    Act::Checkpoint => {
                        step += 10;
                        let manifest = upload(&store, step, fence.generation).await;
                        store.gc(&fence, Retention::last(1)).await.unwrap();
                        store.commit(&fence, &manifest).await.unwrap();
                    }
                    Act::Gc(keep) => {
                        let report = store.gc(&fence, Retention::last(keep)).await.unwrap();
                        assert!(live.is_empty() || !report.kept.is_empty());
                    }
                    Act::Pin(index) => if let Some(step) = pick(index) {
                        store.pin(step, "kept").await.unwrap();
                    },
                    Act::Unpin(index) => if let Some(step) = pick(index) {
                        store.unpin(step).await.unwrap();
                    },
                    Act::NewController => {
                        controller += 1;
                        store = open(&objects, controller);
                        fence = store.claim(Generation(0)).await.unwrap();
                    }
                    Act::Abandon => drop(upload(&store, step + 10, fence.generation).await),
                    Act::RollBack(index) => if let Some(target) = pick(index) {
                        step = target.0;
                    },
                }
                let pinned: Vec<_> = store.list().await.unwrap().into_iter().filter(|s| s.pinned.is_some()).collect();
                assert!(pinned.iter().all(|summary| summary.state == CheckpointState::Committed));
                let report = store.verify(Select::All, Depth::Full).await.unwrap();
                assert!(report.is_clean(), "{report:?}");
                let now = keys(&objects, "commits/").await.len();
                assert!(now >= records, "a record of the chain went");
                records = now;
            }
        });
    }
}
