//! Reading checkpoint shards. Bytes go straight to where they belong while they are hashed; nothing is returned unless
//! the hash is right, and the file's header is parsed only then (CKPT-4).

use crate::error::StoreError;
use crate::limits::{READ_RANGE_BYTES, READS_IN_FLIGHT_MAX, SHARD_READS_MAX};
use crate::manifest::{Manifest, ObjectRecord};
use crate::shard_file;
use crate::store::CheckpointStore;
use futures::{Stream, StreamExt, TryStreamExt};
use object_store::ObjectStoreExt;
use std::ops::Range;
use tarazed_domain::OptimizerShardIndex;

/// The state of one optimizer shard: three tensors of the same length.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct ShardState {
    /// fp32 master weights.
    pub master: Vec<f32>,
    /// First AdamW moment.
    pub exp_avg: Vec<f32>,
    /// Second AdamW moment.
    pub exp_avg_sq: Vec<f32>,
}

/// Where to put the state of one optimizer shard.
#[derive(Debug)]
pub struct ShardStateMut<'a> {
    /// fp32 master weights.
    pub master: &'a mut [f32],
    /// First AdamW moment.
    pub exp_avg: &'a mut [f32],
    /// Second AdamW moment.
    pub exp_avg_sq: &'a mut [f32],
}

/// Master weights of one optimizer shard.
#[derive(Clone, PartialEq, Debug)]
pub struct WeightsPart {
    /// Position of the first value in the flat parameter space.
    pub first_element: u64,
    /// The values, padding included.
    pub values: Vec<f32>,
}

/// Cuts `range` into reads; each but the last is a whole number of elements long.
fn reads(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    range
        .step_by(READ_RANGE_BYTES as usize)
        .map(move |start| start..end.min(start + READ_RANGE_BYTES))
}

impl CheckpointStore {
    /// Reads one checkpoint shard; any process may read any (CKPT-6).
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] or [`StoreError::NotFound`] if the object is not what the manifest says: restore an older
    /// checkpoint, `newest_valid(Some(manifest.step))`. Else by cause.
    pub async fn get_shard(&self, manifest: &Manifest, shard: OptimizerShardIndex) -> Result<ShardState, StoreError> {
        let elements = manifest.geometry(shard)?.elements();
        self.check_length(&manifest.shard(shard)?.object).await?;
        let mut state = ShardState {
            master: zeros(elements)?,
            exp_avg: zeros(elements)?,
            exp_avg_sq: zeros(elements)?,
        };
        let places = [&mut state.master, &mut state.exp_avg, &mut state.exp_avg_sq];
        let places = places.map(|place| Some(place.as_mut_slice()));
        self.read_shard(manifest, shard, places).await?;
        Ok(state)
    }

    /// Reads one checkpoint shard into given slices. After an error their contents mean nothing.
    ///
    /// # Errors
    /// As [`Self::get_shard`]; [`StoreError::Refused`] if a slice has the wrong length.
    pub async fn get_shard_into(
        &self,
        manifest: &Manifest,
        shard: OptimizerShardIndex,
        places: ShardStateMut<'_>,
    ) -> Result<(), StoreError> {
        let places = [Some(places.master), Some(places.exp_avg), Some(places.exp_avg_sq)];
        self.check_length(&manifest.shard(shard)?.object).await?;
        self.read_shard(manifest, shard, places).await
    }

    /// The flat master weights, optimizer shard by optimizer shard in order, for generation and export: at no time more
    /// than one shard is in memory. Each part has passed its hash.
    pub fn read_weights<'a>(
        &'a self,
        manifest: &'a Manifest,
    ) -> impl Stream<Item = Result<WeightsPart, StoreError>> + Send + 'a {
        futures::stream::iter(&manifest.shards)
            .then(move |record| async move { self.get_weights(manifest, record.shard).await })
    }

    /// The master weights of one checkpoint shard; all of its bytes are hashed.
    ///
    /// # Errors
    /// As [`Self::get_shard`].
    pub async fn get_weights(
        &self,
        manifest: &Manifest,
        shard: OptimizerShardIndex,
    ) -> Result<WeightsPart, StoreError> {
        let geometry = manifest.geometry(shard)?;
        self.check_length(&manifest.shard(shard)?.object).await?;
        let mut values = zeros(geometry.elements())?;
        self.read_shard(manifest, shard, [Some(&mut values), None, None])
            .await?;
        Ok(WeightsPart {
            first_element: geometry.first_element(),
            values,
        })
    }

    /// All master weights in one flat vector of `block_count * block_elements` values.
    ///
    /// # Errors
    /// As [`Self::get_shard`].
    pub async fn read_flat_weights(&self, manifest: &Manifest) -> Result<Vec<f32>, StoreError> {
        let mut flat = Vec::new();
        // A manifest says what it likes: too much is an error here, not the end of the process.
        let elements = u64::from(manifest.block_count).checked_mul(manifest.block_elements);
        elements
            .and_then(|count| usize::try_from(count).ok())
            .and_then(|count| flat.try_reserve_exact(count).ok())
            .ok_or_else(|| StoreError::refused("there is no memory for the checkpoint's weights"))?;
        let mut parts = std::pin::pin!(self.read_weights(manifest));
        while let Some(part) = parts.try_next().await? {
            flat.extend_from_slice(&part.values);
        }
        Ok(flat)
    }

    /// Reads a shard whose object was seen to have its length.
    async fn read_shard(
        &self,
        manifest: &Manifest,
        shard: OptimizerShardIndex,
        mut places: [Option<&mut [f32]>; 3],
    ) -> Result<(), StoreError> {
        let geometry = manifest.geometry(shard)?;
        let object = &manifest.shard(shard)?.object;
        for place in places.iter().flatten() {
            if place.len() as u64 != geometry.elements() {
                let (given, needed) = (place.len(), geometry.elements());
                return Err(StoreError::refused(format!(
                    "shard {shard} has {needed} elements, a slice {given}"
                )));
            }
        }
        let corrupt = |why: String| StoreError::corrupt(&object.key, why);
        let header_bytes = shard_file::header_bytes(object.length, &geometry).map_err(corrupt)?;
        let tensor_bytes = geometry.elements() * 4;
        let mut plan = vec![(0..header_bytes, None)];
        for tensor in 0..3 {
            let start = header_bytes + tensor as u64 * tensor_bytes;
            let pieces = reads(start..start + tensor_bytes);
            plan.extend(pieces.map(|range| {
                let at = ((range.start - start) / 4) as usize;
                (range, Some((tensor, at)))
            }));
        }
        let mut header = Vec::new();
        let mut sink = |target: Option<(usize, usize)>, bytes: &[u8]| match target {
            None => header = bytes.to_vec(),
            Some((tensor, at)) => {
                if let Some(place) = &mut places[tensor] {
                    for (value, bytes) in place[at..].iter_mut().zip(bytes.chunks_exact(4)) {
                        *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                    }
                }
            }
        };
        self.read_object(object, &plan, &mut sink).await?;
        shard_file::check_header(&header, manifest.step, &geometry).map_err(corrupt)
    }

    /// Whether an object is there at its length: asked before anybody makes room for its bytes, since a manifest says what it
    /// likes.
    pub(crate) async fn check_length(&self, object: &ObjectRecord) -> Result<(), StoreError> {
        let key = object.key.as_str();
        match self.length_of(key).await? {
            Some(length) if length == object.length => Ok(()),
            Some(length) => Err(StoreError::corrupt(
                key,
                format!("{length} bytes instead of {}", object.length),
            )),
            None => Err(StoreError::NotFound {
                what: format!("{key} in {}", self.location()),
                remedy: "use another checkpoint".to_string(),
            }),
        }
    }

    /// Checks an object's length and hash without keeping a byte.
    pub(crate) async fn hash_object(&self, object: &ObjectRecord) -> Result<(), StoreError> {
        self.check_length(object).await?;
        let plan: Vec<(Range<u64>, ())> = reads(0..object.length).map(|range| (range, ())).collect();
        self.read_object(object, &plan, &mut |(), _| ()).await
    }

    /// Reads a whole object, seen to have its length, by the ranges of `plan`, which tile it in order; `sink` gets each
    /// range's bytes, and gets them again where the hash was wrong: what was garbled on its way costs no checkpoint. What the
    /// sink got last counts, and only if this returns `Ok`: the hash is then as recorded (CKPT-4).
    async fn read_object<T: Copy + Send + Sync>(
        &self,
        object: &ObjectRecord,
        plan: &[(Range<u64>, T)],
        sink: &mut (impl FnMut(T, &[u8]) + Send),
    ) -> Result<(), StoreError> {
        for _ in 1..SHARD_READS_MAX {
            match self.read_once(object, plan, sink).await {
                Err(StoreError::Corrupt { .. }) => {}
                read => return read,
            }
        }
        self.read_once(object, plan, sink).await
    }

    async fn read_once<T: Copy + Send + Sync>(
        &self,
        object: &ObjectRecord,
        plan: &[(Range<u64>, T)],
        sink: &mut (impl FnMut(T, &[u8]) + Send),
    ) -> Result<(), StoreError> {
        let key = object.key.as_str();
        let path = &self.path(key);
        // Owned items: a closure over borrowed ones makes futures that are not `Send` in the compiler's eyes.
        let mut chunks = futures::stream::iter(plan.to_vec())
            .map(|(range, target)| async move {
                let wanted = range.end - range.start;
                let read = self.bounded(self.objects().get_range(path, range)).await;
                let bytes = read.map_err(|failure| self.sort("read", key, failure))?;
                if bytes.len() as u64 != wanted {
                    return Err(StoreError::corrupt(key, "it changed its length while it was read"));
                }
                Ok((target, bytes))
            })
            .buffered(READS_IN_FLIGHT_MAX);
        let mut hasher = blake3::Hasher::new();
        while let Some((target, bytes)) = chunks.try_next().await? {
            hasher.update(&bytes);
            sink(target, &bytes);
            // A range takes milliseconds to hash: whoever waits beside this read, an abort above all, gets its turn.
            tokio::task::yield_now().await;
        }
        if object.blake3 != hasher.finalize().into() {
            let why = "its contents do not have the recorded hash";
            return Err(StoreError::corrupt(key, why));
        }
        Ok(())
    }
}

/// So many zeros; an error where there is no memory for them.
fn zeros(elements: u64) -> Result<Vec<f32>, StoreError> {
    let mut values = Vec::new();
    let count = usize::try_from(elements).ok();
    let count = count.filter(|count| values.try_reserve_exact(*count).is_ok());
    let count = count.ok_or_else(|| {
        let why = format!("there is no memory for {elements} values of a checkpoint shard");
        StoreError::refused(why)
    })?;
    values.resize(count, 0.0);
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_memory_holds_is_an_error_and_not_the_end() {
        assert_eq!(zeros(3), Ok(vec![0.0; 3]));
        for elements in [u64::MAX, isize::MAX as u64, isize::MAX as u64 / 4] {
            assert!(
                matches!(zeros(elements), Err(StoreError::Refused { why }) if why.contains(&elements.to_string())),
                "{elements}"
            );
        }
    }
}
