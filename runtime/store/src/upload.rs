//! Uploading checkpoint shards, in parts when they are large, hashed on the way.

use crate::error::StoreError;
use crate::keys;
use crate::limits::PARTS_MAX;
use crate::manifest::{ObjectRecord, ShardRecord};
use crate::shard_file::{self, ShardGeometry};
use crate::store::{CheckpointStore, Failure, in_time};
use bytes::Bytes;
use object_store::{MultipartUpload, ObjectStoreExt};
use std::ops::Range;
use tarazed_domain::{Generation, StepsCompleted};
use tokio::task::{JoinError, JoinSet};

/// The state of one optimizer shard as it goes up: three tensors of the same length, shared with whoever holds the snapshot.
/// Nothing of it is copied on its way into a request, so an upload costs no memory beside the snapshot. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ShardPayload([Bytes; 3]);

/// Tensors in memory are what the file holds, byte for byte.
const _: () = assert!(cfg!(target_endian = "little"), "checkpoint shards are little-endian");

/// A tensor as bytes.
struct Tensor<T>(T);

impl<T: AsRef<[f32]>> AsRef<[u8]> for Tensor<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(self.0.as_ref())
    }
}

impl ShardPayload {
    /// Takes master weights (fp32), first and second AdamW moment. They are freed with the last clone.
    #[must_use]
    pub fn new<T: AsRef<[f32]> + Send + 'static>(tensors: [T; 3]) -> Self {
        Self(tensors.map(|tensor| Bytes::from_owner(Tensor(tensor))))
    }
}

/// Where a file's bytes come from: its header, then the tensors one after the other.
struct Source([Bytes; 4]);

impl Source {
    fn length(&self) -> u64 {
        self.0.iter().map(|piece| piece.len() as u64).sum()
    }

    /// The file's bytes in `range`, as views of the memory in which they lie.
    fn pieces(&self, range: Range<u64>) -> Vec<Bytes> {
        let mut pieces = Vec::new();
        let mut start = 0;
        for piece in &self.0 {
            let end = start + piece.len() as u64;
            let (from, to) = (range.start.max(start), range.end.min(end));
            if from < to {
                pieces.push(piece.slice((from - start) as usize..(to - start) as usize));
            }
            start = end;
        }
        pieces
    }
}

fn hash(hasher: &mut blake3::Hasher, pieces: &[Bytes]) {
    for piece in pieces {
        hasher.update(piece);
    }
}

/// Part size for an object: larger than `least` where there would be too many parts.
fn part_bytes(length: u64, least: u64) -> u64 {
    least.max(length.div_ceil(PARTS_MAX)).next_multiple_of(4096)
}

impl CheckpointStore {
    /// Whether any checkpoint shard is there, of a checkpoint or of none.
    ///
    /// # Errors
    /// By cause.
    pub async fn holds_shards(&self) -> Result<bool, StoreError> {
        Ok(!self.list_objects(keys::SHARDS).await?.is_empty())
    }

    /// Deletes checkpoint shards that this caller put and that no manifest was ever written of: each has a key of its own, so nobody
    /// else can mean it.
    ///
    /// # Errors
    /// By cause; some may be gone.
    pub async fn discard(&self, shards: &[ShardRecord]) -> Result<(), StoreError> {
        let doomed: Vec<String> = shards.iter().map(|record| record.object.key.clone()).collect();
        self.delete_all(&doomed).await
    }

    /// Uploads one checkpoint shard, straight from the snapshot's memory. The key is new with every call, so a shard uploaded again (after a failure, or by a
    /// rank that is out of date) never touches bytes that a manifest may name. What a failed call leaves behind counts
    /// for nothing and is collected later.
    ///
    /// # Errors
    /// [`StoreError::Refused`] if the tensors do not have the geometry's length; else [`StoreError::Retry`],
    /// [`StoreError::Full`] or [`StoreError::Reconfigure`] by cause.
    pub async fn put_shard(
        &self,
        step: StepsCompleted,
        generation: Generation,
        geometry: &ShardGeometry,
        state: ShardPayload,
    ) -> Result<ShardRecord, StoreError> {
        let [master, exp_avg, exp_avg_sq] = state.0;
        let lengths = [&master, &exp_avg, &exp_avg_sq].map(|tensor| tensor.len() as u64 / 4);
        if geometry.elements() == 0 || lengths.iter().any(|length| *length != geometry.elements()) {
            return Err(StoreError::refused(format!(
                "optimizer shard {} has {} elements, its tensors {lengths:?}",
                geometry.shard,
                geometry.elements(),
            )));
        }
        let header = Bytes::from(shard_file::encode_header(step, generation, geometry)?);
        let source = Source([header, master, exp_avg, exp_avg_sq]);
        let length = source.length();
        let key = keys::shard(
            step,
            generation,
            geometry.shard,
            self.writer().nonce,
            self.next_upload(),
        );
        let mut hasher = blake3::Hasher::new();
        if length <= self.part_bytes() {
            let pieces = source.pieces(0..length);
            hash(&mut hasher, &pieces);
            let _permit = self.upload_permit().await;
            self.put(&key, pieces.into_iter().collect()).await?;
            self.count_stored(length);
        } else {
            self.put_parts(&key, &source, &mut hasher).await?;
        }
        Ok(ShardRecord {
            shard: geometry.shard,
            first_block: geometry.first_block,
            block_count: geometry.block_count,
            object: ObjectRecord {
                key,
                length,
                blake3: hasher.finalize().into(),
            },
        })
    }

    async fn put_parts(&self, key: &str, source: &Source, hasher: &mut blake3::Hasher) -> Result<(), StoreError> {
        let path = self.path(key);
        let begun = self.bounded(self.objects().put_multipart(&path)).await;
        let mut upload = begun.map_err(|failure| self.sort("begin upload of", key, failure))?;
        let mut parts = JoinSet::new();
        let outcome = self.send_parts(source, hasher, upload.as_mut(), &mut parts).await;
        let error = match outcome {
            Ok(()) => return Ok(()),
            Err(failure) => self.sort("upload", key, failure),
        };
        parts.shutdown().await;
        // The object is not there whatever becomes of this; a remote store may keep parts until its lifecycle rule acts.
        if let Err(failure) = self.bounded(upload.abort()).await {
            let left = self.sort("abort upload of", key, failure);
            tracing::warn!(error = %left, "an incomplete upload may occupy space until the bucket's lifecycle rule removes it");
        }
        Err(error)
    }

    async fn send_parts(
        &self,
        source: &Source,
        hasher: &mut blake3::Hasher,
        upload: &mut dyn MultipartUpload,
        parts: &mut JoinSet<Result<(), Failure>>,
    ) -> Result<(), Failure> {
        let length = source.length();
        let part = part_bytes(length, self.part_bytes());
        let mut start = 0;
        while start < length {
            let end = length.min(start + part);
            let permit = self.upload_permit().await;
            // One that failed ends the upload here, and not behind all the others.
            while let Some(joined) = parts.try_join_next() {
                part_done(joined)?;
            }
            let pieces = source.pieces(start..end);
            hash(hasher, &pieces);
            let put = upload.put_part(pieces.into_iter().collect());
            let store = self.clone();
            parts.spawn(async move {
                let _permit = permit;
                in_time(put).await?;
                store.count_stored(end - start);
                Ok(())
            });
            start = end;
        }
        while let Some(joined) = parts.join_next().await {
            part_done(joined)?;
        }
        self.bounded(upload.complete()).await?;
        Ok(())
    }
}

fn part_done(joined: Result<Result<(), Failure>, JoinError>) -> Result<(), Failure> {
    joined.map_err(|error| Failure::Store(error.into()))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::PART_BYTES;
    use proptest::prelude::*;

    #[test]
    fn parts_stay_within_the_stores_limits() {
        for length in [1, 5 << 20, 100 << 30, 5 << 40] {
            let part = part_bytes(length, PART_BYTES);
            assert!(part >= PART_BYTES);
            assert!(length.div_ceil(part) <= PARTS_MAX, "{length}");
        }
    }

    proptest! {
        // However a file is cut into parts, the parts make up the same file; and nothing of it is copied.
        #[test]
        fn parts_add_up(elements in 1_usize..40, part in 1_u64..80) {
            let values: Vec<f32> = (0..elements * 3).map(|i| i as f32).collect();
            let tensor = |at: usize| values[at * elements..(at + 1) * elements].to_vec();
            let ShardPayload([master, exp_avg, exp_avg_sq]) = ShardPayload::new([tensor(0), tensor(1), tensor(2)]);
            let header: Vec<u8> = (0..24).collect();
            let mut whole = header.clone();
            values.iter().for_each(|value| whole.extend_from_slice(&value.to_le_bytes()));
            let source = Source([header.into(), master, exp_avg, exp_avg_sq]);
            let length = source.length();
            prop_assert_eq!(length, whole.len() as u64);
            let mut glued = Vec::new();
            let mut start = 0;
            while start < length {
                let end = length.min(start + part);
                for piece in source.pieces(start..end) {
                    let within = |whole: &Bytes| whole.as_ptr_range().start <= piece.as_ptr() && piece.as_ptr() < whole.as_ptr_range().end;
                    prop_assert!(source.0.iter().any(within));
                    glued.extend_from_slice(&piece);
                }
                start = end;
            }
            prop_assert_eq!(glued, whole);
        }
    }
}
