//! The manifest: everything a restore needs to know, and its bytes on disk.
//!
//! rkyv's own validation is memory safety, not integrity, so the archive lies behind a header: magic, schema, length and
//! BLAKE3, all checked before any byte of the archive is interpreted (CKPT-4). The layout of checkpoint shards names
//! blocks, never ranks, so any world size restores it (CKPT-6).
//!
//! ```text
//! 0  magic "TZMANIF1"   8  schema u32   12  reach u32   16  length u64   24  BLAKE3 of the archive   56  archive
//! ```
//!
//! Schema 1 has no reach, and zero in its place; schema 2 is the same with one. So a run that is never rolled back by its own
//! policy writes what older programs read, and theirs are read as they are. The commit record's hash covers the header, too.

use crate::digest::Digest;
use crate::error::StoreError;
use crate::keys;
use crate::limits::MANIFEST_BYTES_MAX;
use crate::shard_file::ShardGeometry;
use crate::writer::WriterId;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use tarazed_domain::limits::{BLOCK_ELEMENTS_MAX, BLOCKS_MAX};
use tarazed_domain::{Generation, OptimizerShardIndex, StepsCompleted};

/// The shape of [`Manifest`] that this binary reads and writes, where it says how far back a rollback may go.
pub const MANIFEST_SCHEMA: u32 = 2;
/// The shape of one that does not.
const MANIFEST_SCHEMA_WITHOUT_REACH: u32 = 1;
const MAGIC: &[u8; 8] = b"TZMANIF1";
const HEADER_BYTES: usize = 56;

/// One stored object: where it is and what it must be.
#[derive(
    Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
)]
pub struct ObjectRecord {
    /// Key under the store's root.
    pub key: String,
    /// Length in bytes.
    pub length: u64,
    /// BLAKE3 of all its bytes.
    pub blake3: Digest,
}

/// One checkpoint shard: the object and the blocks it holds. What `put_shard` returns and a manifest lists.
#[derive(
    Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
)]
pub struct ShardRecord {
    /// Which optimizer shard.
    pub shard: OptimizerShardIndex,
    /// Its first block in the flat parameter space.
    pub first_block: u32,
    /// How many blocks.
    pub block_count: u32,
    /// The object that holds them.
    pub object: ObjectRecord,
}

impl ShardRecord {
    /// The record of an object that holds the blocks of `geometry`.
    #[must_use]
    pub const fn new(geometry: &ShardGeometry, object: ObjectRecord) -> Self {
        Self {
            shard: geometry.shard,
            first_block: geometry.first_block,
            block_count: geometry.block_count,
            object,
        }
    }
}

/// Where the committed trace stood at the checkpoint's step.
#[derive(
    Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
)]
pub struct TraceHead {
    /// Steps in the prefix; the checkpoint's step.
    pub step: StepsCompleted,
    /// Bytes of `trace.jsonl` up to and including that step's line.
    pub length_bytes: u64,
    /// BLAKE3 of those bytes.
    pub blake3: Digest,
    /// The last line, without its newline; empty before the first step.
    pub last_line: String,
}

/// The program that wrote the checkpoint (DET-4).
#[derive(
    Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
)]
pub struct BinaryId {
    /// Version, e.g. `0.1.0`.
    pub version: String,
    /// Build id: tells two builds of one version apart.
    pub build: String,
    /// Libraries whose version decides numbers, e.g. `cublasLt 13.1`; sorted by the caller.
    pub libraries: Vec<String>,
}

/// Names one commit for good: the digest of its record is part of the name.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
)]
pub struct CommitRef {
    /// Position in the chain.
    pub sequence: u64,
    /// Steps done.
    pub step: StepsCompleted,
    /// BLAKE3 of the record's bytes.
    pub record: Digest,
}

/// Where the state comes from (DET-4).
#[derive(
    Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
)]
pub struct Lineage {
    /// The checkpoint before this one in the same line of states.
    pub parent: Option<CommitRef>,
    /// The checkpoint that the present processes were restored from.
    pub restored_from: Option<CommitRef>,
    /// The new lineage that was declared (other binary or device type), as JSON, as in trace lines; empty in the run's first one.
    pub declared: String,
}

/// A checkpoint's table of contents.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Manifest {
    /// BLAKE3 of the config's identity: the sections that decide numbers.
    pub run: Digest,
    /// Steps done.
    pub step: StepsCompleted,
    /// The generation that wrote it.
    pub generation: Generation,
    /// The controller that commits it.
    pub writer: WriterId,
    /// Elements of one block.
    pub block_elements: u64,
    /// Blocks of the flat parameter space.
    pub block_count: u32,
    /// Optimizer shards that the blocks are cut into.
    pub shard_count: u32,
    /// Digest of the parameter layout: names, shapes, offsets.
    pub layout: Digest,
    /// Hash of the data manifest: versions of every domain's token shards.
    pub data: Digest,
    /// All checkpoint shards, in order, together every block once.
    pub shards: Vec<ShardRecord>,
    /// Ledger of mixture and other decisions, opaque here; with `step` it is the data cursor (DATA-2).
    pub decisions: Vec<u8>,
    /// Where the committed trace stood.
    pub trace_head: TraceHead,
    /// The program.
    pub binary: BinaryId,
    /// Device type, e.g. `cpu` or `sm_90`.
    pub device_type: String,
    /// Where the state comes from.
    pub lineage: Lineage,
    /// Wall clock at creation, for people only.
    pub created_unix_ms: u64,
    /// How many steps behind the newest checkpoint the run's own policy may still go back; none where it never does. It stands
    /// in the header, so that the archive is that of older programs. From 1 up; beyond 32 bits the greatest.
    #[rkyv(with = rkyv::with::Skip)]
    pub rollback_reach_steps: Option<u32>,
}

impl Manifest {
    /// The record of a checkpoint shard.
    ///
    /// # Errors
    /// [`StoreError::Refused`] if there is no such shard.
    pub fn shard(&self, shard: OptimizerShardIndex) -> Result<&ShardRecord, StoreError> {
        self.shards.get(shard.index()).ok_or_else(|| {
            StoreError::refused(format!(
                "the checkpoint has {} shards, not shard {shard}",
                self.shards.len()
            ))
        })
    }

    /// The blocks of a checkpoint shard.
    ///
    /// # Errors
    /// [`StoreError::Refused`] if there is no such shard.
    pub fn geometry(&self, shard: OptimizerShardIndex) -> Result<ShardGeometry, StoreError> {
        let record = self.shard(shard)?;
        Ok(ShardGeometry {
            shard,
            first_block: record.first_block,
            block_count: record.block_count,
            block_elements: self.block_elements,
        })
    }

    /// Bytes of all checkpoint shards.
    #[must_use]
    pub fn shard_bytes(&self) -> u64 {
        self.shards.iter().map(|record| record.object.length).sum()
    }

    /// Whether the parts add up: every block in exactly one shard, every object plausible, the trace at the same step.
    ///
    /// # Errors
    /// What does not add up, in words.
    pub fn check(&self) -> Result<(), String> {
        if self.shard_count as usize != self.shards.len() {
            return Err(format!(
                "{} shards announced, {} listed",
                self.shard_count,
                self.shards.len()
            ));
        }
        if self.trace_head.step != self.step {
            return Err(format!(
                "trace head at step {}, state at step {}",
                self.trace_head.step, self.step
            ));
        }
        if self.block_elements == 0 || self.shards.is_empty() {
            return Err("no block or no shard".to_string());
        }
        if u64::from(self.block_count) > BLOCKS_MAX || self.block_elements > BLOCK_ELEMENTS_MAX {
            return Err(format!(
                "{} blocks of {} elements are more than any model has",
                self.block_count, self.block_elements
            ));
        }
        let mut next_block = 0_u32;
        let mut total_bytes = 0_u64;
        let mut keys_seen = HashSet::new();
        for (index, record) in self.shards.iter().enumerate() {
            let what = format!("shard {}", record.shard);
            if record.shard.index() != index {
                return Err(format!("{what} listed at place {index}"));
            }
            if record.first_block != next_block || record.block_count == 0 {
                return Err(format!(
                    "{what} begins at block {}, not {next_block}",
                    record.first_block
                ));
            }
            next_block = next_block
                .checked_add(record.block_count)
                .ok_or("more than 2^32 blocks")?;
            let payload = u64::from(record.block_count)
                .checked_mul(self.block_elements)
                .and_then(|elements| elements.checked_mul(crate::shard_file::BYTES_PER_ELEMENT))
                .ok_or("a shard longer than 2^64 bytes")?;
            if record.object.length <= payload {
                return Err(format!(
                    "{what} has {} bytes, its blocks need more than {payload}",
                    record.object.length
                ));
            }
            total_bytes = total_bytes
                .checked_add(record.object.length)
                .ok_or("shards of more than 2^64 bytes in all")?;
            match keys::step_and_generation_of(&record.object.key) {
                Some((step, _)) if step == self.step => {}
                _ => {
                    return Err(format!(
                        "{what} lies at {}, no key of step {}",
                        record.object.key, self.step
                    ));
                }
            }
            if !keys_seen.insert(record.object.key.as_str()) {
                return Err(format!("{what} shares its object with another shard"));
            }
        }
        if next_block != self.block_count {
            return Err(format!("shards hold {next_block} blocks of {}", self.block_count));
        }
        Ok(())
    }

    /// The manifest's bytes.
    ///
    /// # Errors
    /// [`StoreError::Refused`] if the parts do not add up or the result is too large.
    pub fn encode(&self) -> Result<Vec<u8>, StoreError> {
        self.check().map_err(StoreError::refused)?;
        let archive = rkyv::to_bytes::<rkyv::rancor::Error>(self)
            .map_err(|error| StoreError::refused(format!("the manifest cannot be serialised: {error}")))?;
        if archive.len() as u64 > MANIFEST_BYTES_MAX {
            return Err(StoreError::refused(format!(
                "a manifest of {} bytes, above the limit of {MANIFEST_BYTES_MAX}: the decision ledger is too large",
                archive.len()
            )));
        }
        let mut bytes = Vec::with_capacity(HEADER_BYTES + archive.len());
        let (schema, reach) = match self.rollback_reach_steps {
            Some(steps) => (MANIFEST_SCHEMA, steps),
            None => (MANIFEST_SCHEMA_WITHOUT_REACH, 0),
        };
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&schema.to_le_bytes());
        bytes.extend_from_slice(&reach.to_le_bytes());
        bytes.extend_from_slice(&(archive.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&Digest::of(&archive).0);
        bytes.extend_from_slice(&archive);
        Ok(bytes)
    }

    /// Reads a manifest from `bytes` found at `key`; the header and hash are checked first (CKPT-4).
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if anything is not as written; [`StoreError::Reconfigure`] for another schema.
    pub fn decode(key: &str, bytes: &[u8]) -> Result<Self, StoreError> {
        let header = bytes
            .get(..HEADER_BYTES)
            .ok_or_else(|| StoreError::corrupt(key, format!("{} bytes are too few for a manifest", bytes.len())))?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let archive = &bytes[HEADER_BYTES..];
        if &header[..8] != MAGIC {
            return Err(StoreError::corrupt(key, "it does not begin like a manifest"));
        }
        let length = u64::from(word(16)) | u64::from(word(20)) << 32;
        if length != archive.len() as u64 || length > MANIFEST_BYTES_MAX {
            return Err(StoreError::corrupt(
                key,
                format!("{} bytes instead of {length}", archive.len()),
            ));
        }
        if header[24..56] != Digest::of(archive).0 {
            return Err(StoreError::corrupt(
                key,
                "its contents do not have the hash in its header",
            ));
        }
        let rollback_reach_steps = match (word(8), word(12)) {
            (MANIFEST_SCHEMA_WITHOUT_REACH, 0) => None,
            (MANIFEST_SCHEMA, steps @ 1..) => Some(steps),
            (schema @ (MANIFEST_SCHEMA_WITHOUT_REACH | MANIFEST_SCHEMA), reach) => {
                return Err(StoreError::corrupt(
                    key,
                    format!("a reach of {reach} steps in schema {schema}"),
                ));
            }
            (schema, _) => {
                return Err(StoreError::Reconfigure {
                    location: key.to_string(),
                    cause: format!("a manifest of schema {schema}, this binary reads up to {MANIFEST_SCHEMA}"),
                    remedy: "use the version of the program that wrote it".to_string(),
                });
            }
        };
        let mut aligned = rkyv::util::AlignedVec::<16>::with_capacity(archive.len());
        aligned.extend_from_slice(archive);
        let archived = rkyv::from_bytes::<Self, rkyv::rancor::Error>(&aligned)
            .map_err(|error| StoreError::corrupt(key, format!("not a manifest of this schema: {error}")))?;
        let manifest = Self {
            rollback_reach_steps,
            ..archived
        };
        manifest.check().map_err(|why| StoreError::corrupt(key, why))?;
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::writer::WriterNonce;

    /// Shards of one block each, of these lengths.
    fn manifest(block_elements: u64, lengths: &[u64]) -> Manifest {
        let shard = |(index, length): (u32, &u64)| ShardRecord {
            shard: OptimizerShardIndex(index),
            first_block: index,
            block_count: 1,
            object: ObjectRecord {
                key: format!("shards/{:020}/{:020}-w-{index:06}-000000.safetensors", 4, 1),
                length: *length,
                blake3: Digest::of(b"shard"),
            },
        };
        let step = StepsCompleted(4);
        let trace_head = TraceHead {
            step,
            ..TraceHead::default()
        };
        Manifest {
            run: Digest::of(b"run"),
            step,
            generation: Generation(1),
            writer: WriterId {
                nonce: WriterNonce([7; 16]),
                generation: Generation(1),
            },
            block_elements,
            block_count: lengths.len() as u32,
            shard_count: lengths.len() as u32,
            layout: Digest::of(b"layout"),
            data: Digest::of(b"data"),
            shards: (0..).zip(lengths).map(shard).collect(),
            decisions: Vec::new(),
            trace_head,
            binary: BinaryId::default(),
            device_type: "cpu".into(),
            lineage: Lineage::default(),
            created_unix_ms: 1,
            rollback_reach_steps: None,
        }
    }

    /// The reach stands in the header alone: the archive is the same with it and without, and so are manifests of before.
    #[test]
    fn a_manifest_with_a_reach_differs_in_its_header_alone() {
        let plain = manifest(4, &[100, 100]);
        let reaching = Manifest {
            rollback_reach_steps: Some(290),
            ..plain.clone()
        };
        let (before, after) = (plain.encode().expect("encoded"), reaching.encode().expect("encoded"));
        assert_eq!(before[16..], after[16..]);
        assert_eq!((before[8], before[12..16].iter().max()), (1, Some(&0)));
        assert_eq!((after[8], &after[12..16]), (2, &290_u32.to_le_bytes()[..]));
        assert_eq!(Manifest::decode("m", &before).expect("read"), plain);
        assert_eq!(Manifest::decode("m", &after).expect("read"), reaching);
        for (schema, reach, bad) in [(1, 290_u32, "in schema 1"), (2, 0, "in schema 2"), (3, 0, "schema 3")] {
            let mut other = before.clone();
            other[8] = schema;
            other[12..16].copy_from_slice(&reach.to_le_bytes());
            let refused = Manifest::decode("m", &other).expect_err("refused").to_string();
            assert!(refused.contains(bad), "{refused}");
        }
    }

    /// CKPT-4: sizes that no store holds are refused where the manifest is read, before anybody adds them up.
    #[test]
    fn sizes_beyond_all_bounds_are_refused() {
        assert_eq!(manifest(4, &[100, 100]).check(), Ok(()));
        let over = manifest(4, &[u64::MAX, 100]);
        assert!(over.check().is_err_and(|why| why.contains("2^64 bytes in all")));
        let wide = manifest(BLOCK_ELEMENTS_MAX + 1, &[u64::MAX]);
        assert!(wide.check().is_err_and(|why| why.contains("more than any model has")));
    }
}
