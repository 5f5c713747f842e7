//! A store that does not answer: no operation outlives its limit, the error says so, and the same call made again goes on.
//!
//! The clock stands still and jumps to the next limit whenever nothing else is left to do, so nothing here is waited for.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Fault, Faulty, checkpoint, geometries, manifest, put_one, restore, writer};
use object_store::ObjectStore;
use object_store::memory::InMemory;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tarazed_domain::{Generation, StepsCompleted};
use tarazed_store::limits::OPERATION_TIMEOUT_MS;
use tarazed_store::{CheckpointStore, Depth, Retention, Select, ShardGeometry, ShardPayload, StoreError};
use tokio::time::Instant;

const LIMIT: Duration = Duration::from_millis(OPERATION_TIMEOUT_MS);
/// Timers go by whole milliseconds.
const TICKS: Duration = Duration::from_millis(5);

fn open(objects: Arc<dyn ObjectStore>, number: u8) -> CheckpointStore {
    CheckpointStore::with_object_store(objects, "", writer(number))
}

#[track_caller]
fn expect_no_answer(error: &StoreError) {
    let named = format!("within {OPERATION_TIMEOUT_MS} ms");
    assert!(
        matches!(error, StoreError::Retry { cause, .. } if cause.contains("no answer from") && cause.contains(&named)),
        "{error}"
    );
}

/// The call, and once more where it was not answered: one operation of all is silent.
async fn again<T, F: Future<Output = Result<T, StoreError>>>(call: impl Fn() -> F) -> T {
    match call().await {
        Ok(done) => done,
        Err(error) => {
            expect_no_answer(&error);
            call().await.unwrap()
        }
    }
}

// CKPT-1, CKPT-2: whichever operation is never answered, carried out or not, the calls of a checkpoint's life end at its limit,
// and made again they commit once.
#[tokio::test(start_paused = true)]
async fn no_operation_outlives_its_limit() {
    for fault in [Fault::Silent, Fault::SilentAfter] {
        let mut struck = Vec::new();
        for fail_at in 0.. {
            let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            let first = open(objects.clone(), 1);
            let fence = first.claim(Generation(0)).await.unwrap();
            checkpoint(&first, &fence, 10).await;
            let faulty = Faulty::new(objects.clone(), fail_at, fault, false);
            let second = open(faulty.clone(), 2);
            let began = Instant::now();
            let fence = again(|| second.claim(Generation(0))).await;
            let mut shards = Vec::new();
            for geometry in geometries() {
                shards.push(again(|| put_one(&second, 20, fence.generation, &geometry)).await);
            }
            let manifest = manifest(&second, 20, fence.generation, shards);
            again(|| second.commit(&fence, &manifest)).await;
            assert_eq!(again(|| restore(&second)).await, Some(20), "{fault:?} at {fail_at}");
            again(|| second.gc(&fence, Retention::last(1))).await;
            let took = began.elapsed();
            let clean = open(objects, 3);
            let report = clean.verify(Select::All, Depth::Full).await.unwrap();
            assert!(report.is_clean() && report.checkpoints.len() == 1, "{report:?}");
            let Some(operation) = faulty.struck() else {
                assert_eq!(took, Duration::ZERO, "nothing was silent");
                break;
            };
            struck.push(operation);
            assert!(
                took >= LIMIT && took < LIMIT + TICKS,
                "{fault:?} of {operation} at {fail_at}: {took:?}"
            );
        }
        for operation in ["write", "read", "list", "delete"] {
            assert!(struck.contains(&operation), "{struck:?}");
        }
        assert!(struck.len() > 30, "every operation of a checkpoint's life: {struck:?}");
    }
}

// The same for a shard that goes up in parts; and where the store is silent from there on, abort included, the call still ends.
#[tokio::test(start_paused = true)]
async fn an_upload_in_parts_ends_wherever_the_store_falls_silent() {
    let geometry = ShardGeometry {
        block_elements: 500_000,
        ..geometries()[0]
    };
    let tensor: Arc<[f32]> = vec![1.0; geometry.elements() as usize].into();
    let state = ShardPayload::new([tensor.clone(), tensor.clone(), tensor]);
    let (step, generation) = (StepsCompleted(10), Generation(1));
    for (fault, dies) in [
        (Fault::Silent, false),
        (Fault::SilentAfter, false),
        (Fault::Silent, true),
    ] {
        let mut struck = Vec::new();
        for fail_at in 0..4 {
            let faulty = Faulty::new(Arc::new(InMemory::new()), fail_at, fault, dies);
            let store = open(faulty.clone(), 1);
            let put = || store.put_shard(step, generation, &geometry, state.clone());
            let began = Instant::now();
            expect_no_answer(&put().await.unwrap_err());
            let took = began.elapsed();
            // Behind a beginning that was not answered there is nothing to abort.
            let silences = if dies && fail_at > 0 { 2 } else { 1 };
            assert!(
                took >= LIMIT * silences && took < LIMIT * silences + TICKS,
                "{fault:?} at {fail_at}: {took:?}"
            );
            struck.extend(faulty.struck());
            if !dies {
                put().await.unwrap();
            }
        }
        assert_eq!(
            struck,
            ["begin upload", "upload part", "upload part", "complete upload"],
            "{fault:?}"
        );
    }
}
