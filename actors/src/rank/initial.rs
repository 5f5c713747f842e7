//! The weights that a run begins with, where `model.initial` names a checkpoint for them.
//!
//! It may be another run's, cut into other optimizer shards than this run's (CKPT-6): each of its shards that is needed is read
//! once, and handed on in pieces.
//!
//! - **SUP-4** As a restore, a read ends within milliseconds of an abort.
//! - **CKPT-4** What is read is the checkpoint whose manifest has the configured hash, and each object has the hash in there. One that
//!   has not refutes no checkpoint of the run: it is an error of this rank, which ends and is started again within its budget.

use super::restore::{READ_BACKOFF_MS, read_ahead, retried, unless_aborted};
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tarazed_domain::OptimizerShardIndex;
use tarazed_domain::config::{Config, InitialConfig};
use tarazed_store::{Digest, Manifest, RankStore, StoreError, WeightsPart};
use tarazed_train::StepError;
use tarazed_train::generation::TakeWeights;
use tokio::runtime::Handle;
use tokio::sync::OnceCell;

/// The checkpoint that `model.initial` names, opened at the first need.
pub(super) struct InitialWeights {
    initial: InitialConfig,
    /// Of the run's own parameter layout.
    layout: Digest,
    store: OnceCell<RankStore>,
    manifest: OnceCell<Arc<Manifest>>,
}

impl InitialWeights {
    /// None where the run begins from its seed.
    pub(super) fn of(config: &Config) -> Option<Self> {
        let initial = config.model.initial.clone()?;
        let layout = tarazed_model::parameter_layout(&config.model, config.optimizer.block_elements);
        Some(Self {
            initial,
            layout: Digest::of(layout.described().as_bytes()),
            store: OnceCell::new(),
            manifest: OnceCell::new(),
        })
    }

    /// As [`tarazed_train::generation::ShardSource::read_initial`].
    pub(super) fn read(
        &self,
        runtime: &Handle,
        shards: &[(OptimizerShardIndex, Range<usize>)],
        abort: &AtomicBool,
        take: &mut TakeWeights<'_>,
    ) -> Result<(), StepError> {
        let manifest = runtime.block_on(self.tried(abort, || self.manifest()))?;
        let mut pieces = Pieces::new(shards, &manifest, take)?;
        let needed = pieces.needed(&manifest);
        let read = |shard: OptimizerShardIndex| {
            let attempt = || async { self.store().await?.get_weights(&manifest, shard).await };
            runtime.block_on(self.tried(abort, attempt))
        };
        read_ahead(&needed, &read, &mut |_, part: WeightsPart| {
            pieces.add(part.first_element as usize, &part.values, take)
        })
    }

    async fn store(&self) -> Result<&RankStore, StoreError> {
        let open = || RankStore::open(self.initial.place().0);
        self.store.get_or_try_init(open).await
    }

    async fn manifest(&self) -> Result<Arc<Manifest>, StoreError> {
        let read = || async {
            let (_, step) = self.initial.place();
            let blake3 = Digest(self.initial.blake3);
            let manifest = self.store().await?.manifest_named(blake3, step).await?;
            if manifest.layout != self.layout {
                let why = "its checkpoint holds another model, or blocks of another size";
                return Err(StoreError::Refused { why: why.to_owned() });
            }
            Ok(Arc::new(manifest))
        };
        self.manifest.get_or_try_init(read).await.cloned()
    }

    /// Tries as a restore does; whatever fails names the key of the config.
    async fn tried<T, F>(&self, abort: &AtomicBool, attempt: impl Fn() -> F) -> Result<T, StepError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let read = async {
            let read = retried(Duration::from_millis(READ_BACKOFF_MS), attempt).await;
            read.map_err(|error| StepError::Restore(format!("the weights that model.initial names: {error}")))
        };
        unless_aborted(abort, read).await
    }
}

/// Shards of this run that come together from those of another cut.
struct Pieces {
    /// By their elements.
    shards: Vec<Piece>,
}

struct Piece {
    shard: OptimizerShardIndex,
    elements: Range<usize>,
    /// Padding is zero, and stays so where nothing comes.
    values: Vec<f32>,
    /// Elements that are still to come.
    missing: usize,
}

impl Pieces {
    /// Of these shards, in the order of their elements. One behind the end of the checkpoint's flat space is padding alone, which is
    /// cut by the size of a block: it is handed on as it is.
    fn new(
        shards: &[(OptimizerShardIndex, Range<usize>)],
        manifest: &Manifest,
        take: &mut TakeWeights<'_>,
    ) -> Result<Self, StepError> {
        let end = element(u64::from(manifest.block_count), manifest.block_elements);
        let mut pieces = Vec::with_capacity(shards.len());
        for (shard, elements) in shards.iter().cloned() {
            let missing = elements.end.min(end).saturating_sub(elements.start);
            if missing == 0 {
                take(shard, vec![0.0; elements.len()])?;
                continue;
            }
            pieces.push(Piece {
                shard,
                elements,
                values: Vec::new(),
                missing,
            });
        }
        Ok(Self { shards: pieces })
    }

    /// Shards of the checkpoint that hold any element of these.
    fn needed(&self, manifest: &Manifest) -> Vec<OptimizerShardIndex> {
        let is_needed = |first: u32, count: u32| {
            let place = |block: u64| element(block, manifest.block_elements);
            let first = u64::from(first);
            self.behind(place(first))
                .next()
                .is_some_and(|(_, piece)| piece.elements.start < place(first + u64::from(count)))
        };
        let records = manifest.shards.iter();
        records
            .filter(|record| is_needed(record.first_block, record.block_count))
            .map(|record| record.shard)
            .collect()
    }

    /// Those that end behind this element, with their places.
    fn behind(&self, element: usize) -> impl Iterator<Item = (usize, &Piece)> {
        let first = self.shards.partition_point(|piece| piece.elements.end <= element);
        self.shards.iter().enumerate().skip(first)
    }

    /// Lays values where they belong, from this element on; a shard that is whole is handed on.
    fn add(&mut self, first: usize, values: &[f32], take: &mut TakeWeights<'_>) -> Result<(), StepError> {
        let end = first + values.len();
        let touched = self.behind(first).take_while(|(_, piece)| piece.elements.start < end);
        for at in touched.map(|(at, _)| at).collect::<Vec<_>>() {
            let piece = &mut self.shards[at];
            let (start, stop) = (piece.elements.start.max(first), piece.elements.end.min(end));
            if piece.values.is_empty() {
                piece.values = vec![0.0; piece.elements.len()];
            }
            let into = &mut piece.values[start - piece.elements.start..stop - piece.elements.start];
            into.copy_from_slice(&values[start - first..stop - first]);
            piece.missing = piece.missing.saturating_sub(stop - start);
            if piece.missing == 0 {
                take(piece.shard, std::mem::take(&mut piece.values))?;
            }
        }
        Ok(())
    }
}

/// The first element of a block, in a flat space whose blocks have so many; a manifest's numbers were checked when it was read.
fn element(block: u64, block_elements: u64) -> usize {
    usize::try_from(block.saturating_mul(block_elements)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::collections::BTreeMap;
    use std::sync::atomic::Ordering;
    use tarazed_domain::{Generation, StepsCompleted};
    use tarazed_store::{BinaryId, CheckpointStore, Lineage, ShardGeometry, ShardPayload, TraceHead, WriterId};

    const BLOCK: usize = 4;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    }

    /// A checkpoint of step 3 in shards of so many blocks, whose master weights are their places, and its moments none of them.
    async fn checkpoint(location: &str, cut: &[u32]) -> (Digest, Manifest) {
        let store = CheckpointStore::open(location, WriterId::fresh(Generation(1)))
            .await
            .unwrap();
        let fence = store.claim(Generation(0)).await.unwrap();
        let step = StepsCompleted(3);
        let (mut shards, mut first_block) = (Vec::new(), 0);
        for (shard, &block_count) in (0..).zip(cut) {
            let geometry = ShardGeometry {
                shard: OptimizerShardIndex(shard),
                first_block,
                block_count,
                block_elements: BLOCK as u64,
            };
            first_block += block_count;
            let first = geometry.first_element();
            let values: Vec<f32> = (first..first + geometry.elements()).map(|at| at as f32).collect();
            let moment = vec![-1.0; values.len()];
            let state = ShardPayload::new([values, moment.clone(), moment]);
            let put = store.put_shard(step, fence.generation, &geometry, state);
            shards.push(put.await.unwrap());
        }
        let manifest = Manifest {
            run: Digest::of(b"another run"),
            step,
            generation: fence.generation,
            writer: store.writer(),
            block_elements: BLOCK as u64,
            block_count: first_block,
            shard_count: cut.len() as u32,
            layout: Digest::of(b"layout"),
            data: Digest::of(b"data"),
            shards,
            decisions: vec![],
            trace_head: TraceHead {
                step,
                ..TraceHead::default()
            },
            binary: BinaryId::default(),
            device_type: "cpu".to_owned(),
            lineage: Lineage::default(),
            created_unix_ms: 0,
            rollback_reach_steps: None,
        };
        store.commit(&fence, &manifest).await.unwrap();
        (store.at_step(step).await.unwrap().object.blake3, manifest)
    }

    fn weights(from: &str, blake3: Digest, layout: &[u8]) -> InitialWeights {
        InitialWeights {
            initial: InitialConfig {
                from: from.to_owned(),
                blake3: blake3.0,
            },
            layout: Digest::of(layout),
            store: OnceCell::new(),
            manifest: OnceCell::new(),
        }
    }

    type Read = (Result<(), StepError>, BTreeMap<u32, Vec<f32>>);

    fn read(weights: &InitialWeights, ranges: &[[usize; 2]], abort: &AtomicBool) -> Read {
        let runtime = runtime();
        let mut taken = BTreeMap::new();
        let ranges = ranges.iter().map(|&[start, end]| start..end);
        let shards: Vec<_> = (0..).map(OptimizerShardIndex).zip(ranges).collect();
        let ended = weights.read(runtime.handle(), &shards, abort, &mut |shard, values| {
            assert!(taken.insert(shard.0, values).is_none(), "shard {shard} twice");
            Ok(())
        });
        (ended, taken)
    }

    /// CKPT-6: however the checkpoint and the run are cut into shards, each gets its own; what is behind the checkpoint's end is
    /// padding.
    #[test]
    fn any_cut_serves_any_other() {
        let go = AtomicBool::new(false);
        for cut in [&[7][..], &[1; 7], &[2, 4, 1]] {
            let folder = tempfile::tempdir().unwrap();
            let location = folder.path().to_str().unwrap();
            let (digest, _) = runtime().block_on(checkpoint(location, cut));
            let weights = weights(&format!("{location}@3"), digest, b"layout");
            for ranges in [
                &[[0, 28]][..],
                &[[0, 8], [8, 16], [16, 28]],
                // A rank that holds some of them.
                &[[4, 12], [20, 24]],
                // Blocks of another size: the end of the flat space is elsewhere.
                &[[0, 16], [16, 32], [32, 48]],
            ] {
                let (ended, taken) = read(&weights, ranges, &go);
                ended.unwrap();
                assert_eq!(taken.len(), ranges.len());
                for (&[start, end], values) in ranges.iter().zip(taken.values()) {
                    let value = |at: usize| if at < 28 { at as f32 } else { 0.0 };
                    let expected: Vec<f32> = (start..end).map(value).collect();
                    assert_eq!(*values, expected, "{cut:?}: {start}");
                }
            }
        }
    }

    /// CKPT-4: whatever is wrong with it is no fault of a checkpoint of the run; what is wrong is named.
    #[test]
    fn a_bad_checkpoint_of_others_is_named_and_refutes_none_of_the_runs() {
        let folder = tempfile::tempdir().unwrap();
        let location = folder.path().to_str().unwrap();
        let (digest, manifest) = runtime().block_on(checkpoint(location, &[3, 3]));
        let key = manifest.shards[1].object.key.clone();
        let path = folder.path().join(&key);
        let mut bytes = std::fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let go = AtomicBool::new(false);
        let nowhere = folder.path().join("nowhere");
        for (from, digest, layout, part) in [
            (location, digest, &b"layout"[..], key.as_str()),
            (location, digest, b"other", "another model"),
            (location, Digest::of(b"other"), b"layout", "a manifest with the BLAKE3"),
            (
                &format!("{location}@4"),
                digest,
                b"layout",
                "a manifest with the BLAKE3",
            ),
            (nowhere.to_str().unwrap(), digest, b"layout", "not found"),
        ] {
            let (ended, _) = read(&weights(from, digest, layout), &[[0, 12], [12, 24]], &go);
            let error = ended.unwrap_err();
            assert!(
                matches!(error, StepError::Restore(_)) && error.is_own_fault(),
                "{error:?}"
            );
            let said = error.to_string();
            assert!(said.contains("model.initial") && said.contains(part), "{said}");
        }
        // What is not needed is not read.
        let (ended, taken) = read(&weights(location, digest, b"layout"), &[[0, 12]], &go);
        ended.unwrap();
        assert_eq!(taken.len(), 1);
    }

    /// SUP-4
    #[test]
    fn an_abort_ends_a_read_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let location = folder.path().to_str().unwrap();
        let (digest, _) = runtime().block_on(checkpoint(location, &[2, 2]));
        let weights = weights(location, digest, b"layout");
        let (ended, taken) = read(&weights, &[[0, 16]], &AtomicBool::new(true));
        assert!(
            matches!(ended, Err(StepError::Aborted)) && taken.is_empty(),
            "{ended:?}"
        );
        // While it waits to try again.
        let abort = AtomicBool::new(false);
        let gone = self::weights(location, Digest::of(b"gone"), b"layout");
        let ended = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(50));
                abort.store(true, Ordering::Relaxed);
            });
            read(&gone, &[[0, 16]], &abort).0
        });
        assert!(matches!(ended, Err(StepError::Aborted)), "{ended:?}");
    }
}
