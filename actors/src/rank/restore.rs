//! Checkpoint shards for the device thread, which blocks while the actor runtime reads them.
//!
//! - **SUP-4** The wait ends within milliseconds of an abort, whatever the store does: a fence must not find a healthy
//!   rank stuck in a read.
//! - **CKPT-4** What is read is the checkpoint that the controller found, named by its manifest's very bytes, and not
//!   whatever else of that step lies in the store by now. Every byte is hashed before it counts; where one is not as
//!   recorded, the controller hears that the checkpoint is bad.
//! - Where the store asks to try again, it is asked again, a bounded number of times.

use super::initial::InitialWeights;
use std::future::Future;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tarazed_domain::OptimizerShardIndex;
use tarazed_domain::config::Config;
use tarazed_protocol::message::RestoreFrom;
use tarazed_store::{Digest, Manifest, RankStore, StoreError};
use tarazed_train::StepError;
use tarazed_train::generation::{ShardSource, TakeShard, TakeWeights};

/// Tries of one read while the store asks to try again; its client's own retries come on top.
const READ_TRIES_MAX: u32 = 6;
/// Reads of an object after which it counts as bad.
const BAD_READS_MAX: u32 = 3;
/// Wait before the second try; doubles from try to try. Together about six seconds.
pub(super) const READ_BACKOFF_MS: u64 = 200;
/// Threads that read the shards of one restore, beside the one that takes them over.
const READS_AHEAD: usize = 2;
/// How soon an abort is seen.
const ABORT_POLL_MS: u64 = 5;

/// A manifest and the name it was asked for by.
type NamedManifest = (RestoreFrom, Arc<Manifest>);

/// The run's store, opened at the first need: a rank is ready before it has met the store.
#[derive(Clone)]
pub struct StoreSource {
    location: String,
    runtime: tokio::runtime::Handle,
    store: Arc<tokio::sync::OnceCell<RankStore>>,
    /// Where the run begins with given weights.
    initial: Option<Arc<InitialWeights>>,
    /// The manifest read last: all shards of a restore come from one.
    manifest: Arc<Mutex<Option<NamedManifest>>>,
}

impl StoreSource {
    /// The store at `location`.
    #[must_use]
    pub fn new(location: String, runtime: tokio::runtime::Handle) -> Self {
        Self {
            location,
            runtime,
            store: Arc::default(),
            initial: None,
            manifest: Arc::default(),
        }
    }

    /// A store that is open already.
    #[must_use]
    pub fn over(store: RankStore, runtime: tokio::runtime::Handle) -> Self {
        let location = store.location().to_owned();
        Self {
            store: Arc::new(tokio::sync::OnceCell::new_with(Some(store))),
            ..Self::new(location, runtime)
        }
    }

    /// With the weights that a run of this config begins with, where it names any.
    #[must_use]
    pub fn with_initial(self, config: &Config) -> Self {
        Self {
            initial: InitialWeights::of(config).map(Arc::new),
            ..self
        }
    }

    /// The store.
    ///
    /// # Errors
    /// If it cannot be opened; the next call tries again.
    pub async fn store(&self) -> Result<RankStore, StoreError> {
        let open = || RankStore::open(&self.location);
        self.store.get_or_try_init(open).await.cloned()
    }

    async fn manifest(&self, store: &RankStore, from: &RestoreFrom) -> Result<Arc<Manifest>, StoreError> {
        let known = self.manifest.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((_, manifest)) = known.filter(|(name, _)| name == from) {
            return Ok(manifest);
        }
        let key = from.manifest_key.clone();
        let manifest = store.manifest_at(key.clone(), from.length, Digest(from.blake3)).await?;
        let manifest = Arc::new(manifest);
        if manifest.step != from.step {
            let why = format!("it is of step {}, and step {} was asked for", manifest.step, from.step);
            return Err(StoreError::Corrupt { key, why });
        }
        let read = Some((from.clone(), Arc::clone(&manifest)));
        *self.manifest.lock().unwrap_or_else(PoisonError::into_inner) = read;
        Ok(manifest)
    }

    async fn read_shard(
        &self,
        store: &RankStore,
        from: &RestoreFrom,
        shard: OptimizerShardIndex,
    ) -> Result<[Vec<f32>; 3], StoreError> {
        let manifest = self.manifest(store, from).await?;
        let state = store.get_shard(&manifest, shard).await?;
        Ok([state.master, state.exp_avg, state.exp_avg_sq])
    }
}

impl StoreSource {
    /// Bytes of checkpoints that this process has stored; grows with each part of an upload.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.store.get().map_or(0, RankStore::stored_bytes)
    }

    /// Master weights and both moments of a shard of exactly this checkpoint.
    ///
    /// # Errors
    /// As [`ShardSource::read`].
    pub async fn fetch(
        &self,
        from: &RestoreFrom,
        shard: OptimizerShardIndex,
        abort: &AtomicBool,
    ) -> Result<[Vec<f32>; 3], StepError> {
        let read = async {
            // A store that is not there says nothing of what is in it.
            let store = self
                .store()
                .await
                .map_err(|error| StepError::Restore(error.to_string()))?;
            let attempt = || self.read_shard(&store, from, shard);
            let read = retried(Duration::from_millis(READ_BACKOFF_MS), attempt).await;
            read.map_err(|error| {
                let cause = error.to_string();
                match error.is_bad_object() {
                    true => StepError::BadCheckpoint { step: from.step, cause },
                    false => StepError::Restore(cause),
                }
            })
        };
        unless_aborted(abort, read).await
    }
}

impl ShardSource for StoreSource {
    fn read(
        &self,
        from: &RestoreFrom,
        shard: OptimizerShardIndex,
        abort: &AtomicBool,
    ) -> Result<[Vec<f32>; 3], StepError> {
        self.runtime.block_on(self.fetch(from, shard, abort))
    }

    /// On threads of their own, beside each other and beside `take`; each ends with an abort.
    fn read_each(
        &self,
        from: &RestoreFrom,
        shards: &[OptimizerShardIndex],
        abort: &AtomicBool,
        take: &mut TakeShard<'_>,
    ) -> Result<(), StepError> {
        read_ahead(shards, &|shard| self.read(from, shard, abort), take)
    }

    fn read_initial(
        &self,
        shards: &[(OptimizerShardIndex, Range<usize>)],
        abort: &AtomicBool,
        take: &mut TakeWeights<'_>,
    ) -> Result<(), StepError> {
        let initial = self.initial.as_ref().ok_or_else(|| {
            let cause = "the run's config names no weights to begin with";
            StepError::Restore(cause.to_owned())
        })?;
        initial.read(&self.runtime, shards, abort, take)
    }
}

/// Reads each of these on threads of their own, beside each other and beside `take`: what is read is hashed and laid into fresh
/// memory, which would hold up the actors on theirs. Each ends with an abort, with its first error, or when nobody takes what it has.
pub(super) fn read_ahead<I: Copy + Send + Sync, T: Send>(
    items: &[I],
    read: &(dyn Fn(I) -> Result<T, StepError> + Sync),
    take: &mut (dyn FnMut(I, T) -> Result<(), StepError> + '_),
) -> Result<(), StepError> {
    let next = &AtomicUsize::new(0);
    let (give, taken) = sync_channel(0);
    std::thread::scope(|scope| {
        for _ in 0..READS_AHEAD.min(items.len()) {
            let give = give.clone();
            let work = move || {
                while let Some(&item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let read = read(item);
                    let is_last = read.is_err();
                    if give.send((item, read)).is_err() || is_last {
                        return;
                    }
                }
            };
            let name = "restore".to_owned();
            let spawned = std::thread::Builder::new().name(name).spawn_scoped(scope, work);
            spawned.map_err(|e| StepError::Restore(format!("no thread to read with: {e}")))?;
        }
        drop(give);
        for (item, read) in taken {
            take(item, read?)?;
        }
        Ok(())
    })
}

/// What `read` gives, or `Aborted` as soon as the flag is set; the read is then given up where it stands.
pub(super) async fn unless_aborted<T>(
    abort: &AtomicBool,
    read: impl Future<Output = Result<T, StepError>>,
) -> Result<T, StepError> {
    // The flag has no waker of its own: it is the one that compute threads look at between kernels.
    let aborted = async {
        while !abort.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(ABORT_POLL_MS)).await;
        }
    };
    tokio::select! {
        biased;
        () = aborted => Err(StepError::Aborted),
        read = read => read,
    }
}

/// Tries until the store gives an answer other than "try again", or [`READ_TRIES_MAX`] times. What comes back damaged may
/// have been damaged on its way: it is read again, too, [`BAD_READS_MAX`] times in all.
pub(super) async fn retried<T, F>(first_wait: Duration, attempt: impl Fn() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let mut wait = first_wait;
    let mut bad_reads = 0;
    for _ in 1..READ_TRIES_MAX {
        let answer = attempt().await;
        bad_reads += u32::from(answer.as_ref().is_err_and(StoreError::is_bad_object));
        match answer {
            Err(error)
                if matches!(error, StoreError::Retry { .. }) || error.is_bad_object() && bad_reads < BAD_READS_MAX =>
            {
                let wait_ms = wait.as_millis() as u64;
                tracing::warn!(%error, wait_ms, "a checkpoint could not be read; trying again");
                tokio::time::sleep(wait).await;
                wait *= 2;
            }
            answer => return answer,
        }
    }
    attempt().await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::cell::Cell;
    use std::time::Instant;
    use tarazed_domain::{Generation, StepsCompleted};
    use tarazed_store::{BinaryId, CheckpointStore, Lineage, ShardGeometry, ShardPayload, TraceHead, WriterId};

    const STEP: StepsCompleted = StepsCompleted(7);
    const SHARD: OptimizerShardIndex = OptimizerShardIndex(0);

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    }

    fn busy() -> StoreError {
        StoreError::Retry {
            operation: "read",
            key: "shards/x".to_owned(),
            cause: "503 slow down".to_owned(),
        }
    }

    /// A checkpoint whose every value is `value` plus its shard's number, and its name.
    async fn checkpoint(store: &CheckpointStore, value: f32, shard_count: u32) -> RestoreFrom {
        let fence = store.claim(Generation(0)).await.unwrap();
        let mut shards = Vec::new();
        for shard in 0..shard_count {
            let geometry = ShardGeometry {
                shard: OptimizerShardIndex(shard),
                first_block: shard,
                block_count: 1,
                block_elements: 4,
            };
            let state = ShardPayload::new([[value + shard as f32; 4]; 3]);
            let stored = store.put_shard(STEP, fence.generation, &geometry, state).await;
            shards.push(stored.unwrap());
        }
        let manifest = Manifest {
            run: Digest::of(b"run"),
            step: STEP,
            generation: fence.generation,
            writer: store.writer(),
            block_elements: 4,
            block_count: shard_count,
            shard_count,
            layout: Digest::of(b"layout"),
            data: Digest::of(b"data"),
            shards,
            decisions: vec![],
            trace_head: TraceHead {
                step: STEP,
                ..TraceHead::default()
            },
            binary: BinaryId::default(),
            device_type: "cpu".to_owned(),
            lineage: Lineage::default(),
            created_unix_ms: 0,
            rollback_reach_steps: None,
        };
        store.commit(&fence, &manifest).await.unwrap();
        let found = store.newest_verified(None).await.unwrap().unwrap();
        RestoreFrom {
            step: STEP,
            manifest_key: found.object.key,
            length: found.object.length,
            blake3: found.object.blake3.0,
        }
    }

    /// CKPT-4: two checkpoints of one step, as a step that is redone after a restore leaves them.
    #[test]
    fn the_checkpoint_that_is_named_is_read_and_no_other_of_its_step() {
        let folder = tempfile::tempdir().unwrap();
        let location = folder.path().to_str().unwrap().to_owned();
        let runtime = runtime();
        let (first, second) = runtime.block_on(async {
            let store = CheckpointStore::open(&location, WriterId::fresh(Generation(1)))
                .await
                .unwrap();
            (checkpoint(&store, 1.0, 1).await, checkpoint(&store, 2.0, 1).await)
        });
        let source = StoreSource::new(location, runtime.handle().clone());
        let go = AtomicBool::new(false);
        for (name, value) in [(&first, 1.0), (&second, 2.0), (&first, 1.0)] {
            let tensors = source.read(name, SHARD, &go).unwrap();
            assert_eq!(tensors, std::array::from_fn(|_| vec![value; 4]));
        }

        let mut other_bytes = first.clone();
        other_bytes.blake3 = second.blake3;
        let mut other_step = first.clone();
        other_step.step = StepsCompleted(8);
        for name in [other_bytes, other_step] {
            let error = source.read(&name, SHARD, &go).unwrap_err();
            assert!(matches!(error, StepError::BadCheckpoint { .. }), "{error}");
            assert!(error.to_string().contains(&name.manifest_key), "{error}");
        }
    }

    /// CKPT-4, SUP-4: shards of one restore are read beside each other, each once; one that is bad ends it, and so do an abort and
    /// whoever takes them.
    #[test]
    fn all_shards_of_a_restore_are_read_and_a_bad_one_ends_it() {
        const SHARDS: u32 = 7;
        let folder = tempfile::tempdir().unwrap();
        let location = folder.path().to_str().unwrap().to_owned();
        let runtime = runtime();
        let (name, bad) = runtime.block_on(async {
            let store = CheckpointStore::open(&location, WriterId::fresh(Generation(1)))
                .await
                .unwrap();
            let name = checkpoint(&store, 1.0, SHARDS).await;
            let found = store.newest_verified(None).await.unwrap().unwrap();
            (name, found.manifest.shards[4].object.key.clone())
        });
        let source = StoreSource::new(location, runtime.handle().clone());
        let all: Vec<_> = (0..SHARDS).map(OptimizerShardIndex).collect();
        let read = |abort: &AtomicBool, shards: &[OptimizerShardIndex]| {
            let mut taken = Vec::new();
            let ended = source.read_each(&name, shards, abort, &mut |shard, tensors| {
                assert_eq!(tensors, std::array::from_fn(|_| vec![1.0 + shard.0 as f32; 4]));
                taken.push(shard);
                Ok(())
            });
            taken.sort_unstable();
            (ended, taken)
        };
        let go = AtomicBool::new(false);
        for wanted in [&all[..0], &all] {
            let (ended, taken) = read(&go, wanted);
            ended.unwrap();
            assert_eq!(taken, wanted);
        }
        let (ended, taken) = read(&AtomicBool::new(true), &all);
        assert!(
            matches!(ended, Err(StepError::Aborted)) && taken.is_empty(),
            "{ended:?}"
        );
        let refused = source.read_each(&name, &all, &go, &mut |_, _| Err(StepError::Aborted));
        assert!(matches!(refused, Err(StepError::Aborted)), "{refused:?}");

        std::fs::write(folder.path().join(&bad), b"not what was stored").unwrap();
        let (ended, taken) = read(&go, &all);
        let error = ended.unwrap_err();
        assert!(
            matches!(&error, StepError::BadCheckpoint { cause, .. } if cause.contains(&bad)),
            "{error}"
        );
        assert!(!taken.contains(&all[4]));
    }

    /// SUP-4: the rank must be able to answer a fence, whatever the store does.
    #[test]
    fn a_read_that_never_comes_ends_with_the_abort() {
        let runtime = runtime();
        let abort = AtomicBool::new(false);
        let began = Instant::now();
        let ended = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(50));
                abort.store(true, Ordering::Relaxed);
            });
            runtime.block_on(unless_aborted(&abort, std::future::pending::<Result<(), StepError>>()))
        });
        assert!(matches!(ended, Err(StepError::Aborted)), "{ended:?}");
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());

        // Nor does it begin where the abort came first, or wait between two tries.
        let source = StoreSource::new("/nowhere".to_owned(), runtime.handle().clone());
        let name = RestoreFrom {
            step: STEP,
            manifest_key: String::new(),
            length: 0,
            blake3: [0; 32],
        };
        assert!(matches!(source.read(&name, SHARD, &abort), Err(StepError::Aborted)));
        let absent = source.read(&name, SHARD, &AtomicBool::new(false));
        assert!(matches!(absent, Err(StepError::Restore(_))), "{absent:?}");
        let waiting = retried(Duration::from_secs(3600), || async { Err::<(), _>(busy()) });
        let abort_soon = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            abort.store(true, Ordering::Relaxed);
        };
        abort.store(false, Ordering::Relaxed);
        let waiting = async { waiting.await.map_err(|error| StepError::Restore(error.to_string())) };
        let ended = runtime.block_on(async { tokio::join!(unless_aborted(&abort, waiting), abort_soon).0 });
        assert!(matches!(ended, Err(StepError::Aborted)), "{ended:?}");
    }

    #[test]
    fn a_busy_store_is_asked_again_but_not_for_ever() {
        let runtime = runtime();
        let tries = Cell::new(0);
        let answers_after = |busy_tries: u32| {
            tries.set(0);
            let attempt = || async {
                tries.set(tries.get() + 1);
                if tries.get() > busy_tries { Ok(()) } else { Err(busy()) }
            };
            runtime.block_on(retried(Duration::from_millis(1), attempt))
        };
        assert_eq!(answers_after(0), Ok(()));
        assert_eq!(tries.get(), 1);
        assert_eq!(answers_after(READ_TRIES_MAX - 1), Ok(()));
        assert_eq!(tries.get(), READ_TRIES_MAX);
        assert_eq!(answers_after(u32::MAX), Err(busy()));
        assert_eq!(tries.get(), READ_TRIES_MAX);

        let gone = StoreError::Refused { why: "no".to_owned() };
        let attempt = || async {
            tries.set(tries.get() + 1);
            Err::<(), _>(gone.clone())
        };
        tries.set(0);
        assert_eq!(
            runtime.block_on(retried(Duration::from_secs(3600), attempt)),
            Err(gone.clone())
        );
        assert_eq!(tries.get(), 1, "any other answer is final");

        let bad = StoreError::NotFound {
            what: "shards/x".to_owned(),
            remedy: "use another checkpoint".to_owned(),
        };
        let attempt = || async {
            tries.set(tries.get() + 1);
            Err::<(), _>(bad.clone())
        };
        tries.set(0);
        assert_eq!(
            runtime.block_on(retried(Duration::from_millis(1), attempt)),
            Err(bad.clone())
        );
        assert_eq!(tries.get(), BAD_READS_MAX, "one bad read may be the network's");
    }
}
