//! Uploading checkpoint shards, in parts when they are large, hashed on the way.

use crate::error::StoreError;
use crate::keys;
use crate::limits::{PART_BYTES, PART_BYTES_MIN, PARTS_IN_FLIGHT_MAX, PARTS_MAX, PARTS_WANTED, SINGLE_PUT_BYTES_MAX};
use crate::manifest::{ObjectRecord, ShardRecord};
use crate::room::Upload;
use crate::shard_file::{self, ShardGeometry};
use crate::store::{CheckpointStore, Failure, in_time};
use bytes::Bytes;
use object_store::{MultipartUpload, ObjectStoreExt};
use std::ops::Range;
use tarazed_domain::{Generation, StepsCompleted};
use tokio::task::JoinSet;

/// The state of one optimizer shard, borrowed from a snapshot: three tensors of the same length.
#[derive(Clone, Copy, Debug)]
pub struct ShardSlices<'a> {
    /// fp32 master weights.
    pub master: &'a [f32],
    /// First AdamW moment.
    pub exp_avg: &'a [f32],
    /// Second AdamW moment.
    pub exp_avg_sq: &'a [f32],
}

impl ShardSlices<'_> {
    const fn tensors(&self) -> [&[f32]; 3] {
        [self.master, self.exp_avg, self.exp_avg_sq]
    }
}

/// Where a shard's bytes come from: its header, then the tensors one after the other.
struct Source<'a> {
    header: Vec<u8>,
    tensors: [&'a [f32]; 3],
    length: u64,
}

impl Source<'_> {
    /// The file's bytes in `range`; ranges are asked for in order, and all but the header's end lie on whole elements.
    fn bytes(&self, range: Range<u64>) -> Bytes {
        let mut bytes = Vec::with_capacity((range.end - range.start) as usize);
        let mut start = 0;
        if range.start < self.header.len() as u64 {
            bytes.extend_from_slice(&self.header[range.start as usize..self.header.len().min(range.end as usize)]);
        }
        start += self.header.len() as u64;
        for tensor in self.tensors {
            let end = start + tensor.len() as u64 * 4;
            let (from, to) = (range.start.max(start), range.end.min(end));
            if from < to {
                shard_file::push_f32(
                    &mut bytes,
                    &tensor[((from - start) / 4) as usize..((to - start) / 4) as usize],
                );
            }
            start = end;
        }
        Bytes::from(bytes)
    }
}

/// Part size for an object: small for a small one, since each part on its way is a copy; larger where there would be too
/// many; a multiple of 4 KiB, so that no part cuts an element.
fn part_bytes(length: u64) -> u64 {
    let wanted = length.div_ceil(PARTS_WANTED).clamp(PART_BYTES_MIN, PART_BYTES);
    wanted.max(length.div_ceil(PARTS_MAX)).next_multiple_of(4096)
}

impl CheckpointStore {
    /// Uploads one checkpoint shard. The key is new with every call, so a shard uploaded again (after a failure, or by a
    /// rank that is out of date) never touches bytes that a manifest may name. What a failed call leaves behind counts
    /// for nothing and is collected later.
    ///
    /// # Errors
    /// [`StoreError::Refused`] if the slices do not have the geometry's length; else [`StoreError::Retry`],
    /// [`StoreError::Full`] or [`StoreError::Reconfigure`] by cause.
    pub async fn put_shard(
        &self,
        step: StepsCompleted,
        generation: Generation,
        geometry: &ShardGeometry,
        state: ShardSlices<'_>,
    ) -> Result<ShardRecord, StoreError> {
        let tensors = state.tensors();
        if geometry.elements() == 0 || tensors.iter().any(|tensor| tensor.len() as u64 != geometry.elements()) {
            return Err(StoreError::refused(format!(
                "optimizer shard {} has {} elements, its slices {:?}",
                geometry.shard,
                geometry.elements(),
                tensors.map(<[f32]>::len)
            )));
        }
        let header = shard_file::encode_header(step, generation, geometry)?;
        let length = header.len() as u64 + geometry.payload_bytes();
        let source = Source {
            header,
            tensors,
            length,
        };
        let key = keys::shard(
            step,
            generation,
            geometry.shard,
            self.writer().nonce,
            self.next_upload(),
        );
        let upload = self.begin_upload(length);
        let blake3 = if length <= SINGLE_PUT_BYTES_MAX {
            let _copy = upload.piece(length).await;
            let bytes = source.bytes(0..length);
            let hash = blake3::hash(&bytes);
            self.put(&key, bytes).await?;
            hash
        } else {
            self.put_parts(&key, &source, &upload).await?
        };
        Ok(ShardRecord {
            shard: geometry.shard,
            first_block: geometry.first_block,
            block_count: geometry.block_count,
            object: ObjectRecord {
                key,
                length,
                blake3: blake3.into(),
            },
        })
    }

    async fn put_parts(&self, key: &str, source: &Source<'_>, room: &Upload) -> Result<blake3::Hash, StoreError> {
        let path = self.path(key);
        let begun = self.bounded(self.objects().put_multipart(&path)).await;
        let mut upload = begun.map_err(|failure| self.sort("begin upload of", key, failure))?;
        let mut parts = JoinSet::new();
        let outcome = self.send_parts(source, room, upload.as_mut(), &mut parts).await;
        let error = match outcome {
            Ok(hash) => return Ok(hash),
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
        source: &Source<'_>,
        room: &Upload,
        upload: &mut dyn MultipartUpload,
        parts: &mut JoinSet<Result<(), Failure>>,
    ) -> Result<blake3::Hash, Failure> {
        let mut hasher = blake3::Hasher::new();
        let part = part_bytes(source.length);
        let mut start = 0;
        while start < source.length {
            let end = source.length.min(start + part);
            while parts.len() >= PARTS_IN_FLIGHT_MAX {
                part_done(parts).await?;
            }
            let copy = room.piece(end - start).await;
            let bytes = source.bytes(start..end);
            hasher.update(&bytes);
            let put = upload.put_part(bytes.into());
            parts.spawn(async move {
                // Whoever waits for this one's room waits no longer than for a request.
                let _copy = copy;
                in_time(put).await
            });
            start = end;
        }
        while !parts.is_empty() {
            part_done(parts).await?;
        }
        self.bounded(upload.complete()).await?;
        Ok(hasher.finalize())
    }
}

async fn part_done(parts: &mut JoinSet<Result<(), Failure>>) -> Result<(), Failure> {
    match parts.join_next().await {
        Some(joined) => joined.map_err(|error| Failure::Store(error.into()))?,
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parts_stay_within_the_stores_limits() {
        for length in [1, 5 << 20, 100 << 30, 5 << 40] {
            let part = part_bytes(length);
            assert!(part >= PART_BYTES_MIN && part.is_multiple_of(4));
            assert!(length.div_ceil(part) <= PARTS_MAX, "{length}");
        }
        for (mebibytes, part) in [(20, 5), (80, 5), (112, 7), (128, 8), (10_000, 8)] {
            assert_eq!(part_bytes(mebibytes << 20), part << 20);
        }
    }

    proptest! {
        // However a file is cut into parts, the parts make up the same file.
        #[test]
        fn parts_add_up(elements in 1_usize..40, words in 1_u64..20) {
            let values: Vec<f32> = (0..elements * 3).map(|i| i as f32).collect();
            let tensors = [&values[..elements], &values[elements..2 * elements], &values[2 * elements..]];
            let header: Vec<u8> = (0..24).collect();
            let length = 24 + elements as u64 * 12;
            let source = Source { header, tensors, length };
            let whole = source.bytes(0..length);
            prop_assert_eq!(whole.len() as u64, length);
            let mut glued = Vec::new();
            let mut start = 0;
            while start < length {
                let end = length.min(start + words * 4);
                glued.extend_from_slice(&source.bytes(start..end));
                start = end;
            }
            prop_assert_eq!(&glued[..], &whole[..]);
        }
    }
}
