//! Records of the commit chain, and their bytes.
//!
//! A record is two lines of JSON, so that anybody can read one with a pager: the record, then the BLAKE3 of the first
//! line. Records are few and small, so a compact form would buy nothing. Every record holds the BLAKE3 of its
//! predecessor's bytes, its own sequence number and its writer's nonce: a copied, moved or altered record is noticed.

use crate::digest::Digest;
use crate::error::StoreError;
use crate::keys::{self, PLACES_MAX};
use crate::limits::COMMIT_RECORD_BYTES_MAX;
use crate::writer::WriterNonce;
use serde::{Deserialize, Serialize};
use tarazed_domain::{Generation, StepsCompleted};

/// The shape of [`CommitRecord`] that this binary reads and writes.
pub const RECORD_SCHEMA: u32 = 1;
const MAGIC: &str = "tarazed-chain";
/// The highest generation of a record. No run comes near it; a made-up record that did would leave none above it to claim.
pub(crate) const GENERATION_MAX: Generation = Generation(i64::MAX as u64);

/// What a record says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RecordKind {
    /// A controller claims the store (CKPT-3). Holds nothing else.
    Fence {},
    /// A checkpoint exists from here on (CKPT-1).
    Commit {
        /// The manifest's key.
        manifest: String,
        /// The manifest's length in bytes.
        length: u64,
        /// BLAKE3 of the manifest's bytes.
        blake3: Digest,
        /// Steps done.
        step: StepsCompleted,
        /// Checkpoint shards.
        shard_count: u32,
        /// Bytes of all checkpoint shards.
        shard_bytes: u64,
        /// Wall clock at creation, for people only.
        created_unix_ms: u64,
    },
    /// These checkpoints may be deleted from now on, and nobody may restore from them. Written before the first deletion,
    /// so an old controller cannot delete (CKPT-3), and nobody trusts a checkpoint that is half gone.
    Retire {
        /// Sequence numbers of their commit records.
        sequences: Vec<u64>,
    },
    /// A person keeps a checkpoint: no collection retires it (CKPT-5).
    Pin {
        /// Sequence number of its commit record.
        sequence: u64,
        /// Why, in the person's words.
        note: String,
    },
    /// The pin is lifted.
    Unpin {
        /// Sequence number of its commit record.
        sequence: u64,
    },
}

/// One link of the chain.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommitRecord {
    magic: String,
    schema: u32,
    /// Position in the chain, from 0; equal to the number in the key.
    pub sequence: u64,
    /// BLAKE3 of the predecessor's bytes; of nothing (all zero) for the first.
    pub previous: Digest,
    /// Who wrote it (CKPT-2).
    pub writer: WriterNonce,
    /// The generation it was written for; never lower than that of the fence it stands behind.
    pub generation: Generation,
    /// What it says.
    pub kind: RecordKind,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Seal {
    blake3: Digest,
}

impl CommitRecord {
    /// A record of the present schema.
    #[must_use]
    pub fn new(sequence: u64, previous: Digest, writer: WriterNonce, generation: Generation, kind: RecordKind) -> Self {
        Self {
            magic: MAGIC.to_string(),
            schema: RECORD_SCHEMA,
            sequence,
            previous,
            writer,
            generation,
            kind,
        }
    }

    /// The step, if this commits a checkpoint.
    #[must_use]
    pub const fn step(&self) -> Option<StepsCompleted> {
        match self.kind {
            RecordKind::Commit { step, .. } => Some(step),
            _ => None,
        }
    }

    /// The record's bytes: the same for the same record, always (CKPT-2 compares them).
    ///
    /// # Errors
    /// [`StoreError::Refused`] if it is too large for a record, or of a generation or place that none can have.
    pub fn encode(&self) -> Result<Vec<u8>, StoreError> {
        self.check_numbers().map_err(StoreError::refused)?;
        let refuse = |error: serde_json::Error| StoreError::refused(format!("a record cannot be written: {error}"));
        let mut bytes = serde_json::to_vec(self).map_err(refuse)?;
        let seal = Seal {
            blake3: Digest::of(&bytes),
        };
        bytes.push(b'\n');
        bytes.extend_from_slice(&serde_json::to_vec(&seal).map_err(refuse)?);
        bytes.push(b'\n');
        if bytes.len() as u64 > COMMIT_RECORD_BYTES_MAX {
            return Err(StoreError::refused(format!(
                "a record of {} bytes is too large",
                bytes.len()
            )));
        }
        Ok(bytes)
    }

    fn check_numbers(&self) -> Result<(), String> {
        if self.sequence >= PLACES_MAX {
            return Err(format!(
                "a record in place {}, and no chain is that long",
                self.sequence
            ));
        }
        if self.generation > GENERATION_MAX {
            return Err(format!("generation {}, which no run reaches", self.generation));
        }
        Ok(())
    }

    /// Reads the record found in place `sequence`; the hash is checked before the body is interpreted (CKPT-4).
    ///
    /// # Errors
    /// What is wrong with the bytes, in words.
    pub fn decode(sequence: u64, bytes: &[u8]) -> Result<Self, String> {
        let body = bytes.strip_suffix(b"\n").ok_or("it is cut short")?;
        let at = body
            .iter()
            .position(|byte| *byte == b'\n')
            .ok_or("it has no line with its hash")?;
        let (line, seal) = (&body[..at], &body[at + 1..]);
        let seal: Seal = serde_json::from_slice(seal).map_err(|_| "its hash cannot be read")?;
        if Digest::of(line) != seal.blake3 {
            return Err("its contents do not have the hash it states".to_string());
        }
        let record: Self =
            serde_json::from_slice(line).map_err(|error| format!("no record of this schema: {error}"))?;
        if record.magic != MAGIC || record.schema != RECORD_SCHEMA {
            return Err(format!("schema {}, this binary reads {RECORD_SCHEMA}", record.schema));
        }
        record.check_numbers()?;
        // One record, one spelling: also a change that would read as the same is a change.
        if record.encode().ok().as_deref() != Some(bytes) {
            return Err("it is not spelt as this program spells records".to_string());
        }
        if record.sequence != sequence {
            return Err(format!(
                "it is record {} in the place of {}",
                record.sequence,
                keys::record(sequence)
            ));
        }
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> CommitRecord {
        let kind = RecordKind::Commit {
            manifest: "manifests/x".into(),
            length: 9,
            blake3: Digest::of(b"manifest"),
            step: StepsCompleted(40),
            shard_count: 2,
            shard_bytes: 800,
            created_unix_ms: 1,
        };
        CommitRecord::new(3, Digest::of(b"before"), WriterNonce([7; 16]), Generation(2), kind)
    }

    #[test]
    fn a_record_reads_back_in_its_place_only() {
        let record = sample();
        let bytes = record.encode().unwrap();
        assert_eq!(CommitRecord::decode(3, &bytes), Ok(record));
        assert!(
            CommitRecord::decode(4, &bytes)
                .unwrap_err()
                .contains("record 3 in the place of")
        );
        let text = String::from_utf8(bytes).unwrap();
        assert_eq!(text.lines().count(), 2, "readable with a pager: {text}");
    }

    /// CKPT-4: a generation that leaves none above it is no run's, whatever hash the record states.
    #[test]
    fn numbers_that_no_run_reaches_are_refused() {
        let highest = CommitRecord {
            generation: GENERATION_MAX,
            ..sample()
        };
        let bytes = highest.encode().unwrap();
        assert_eq!(CommitRecord::decode(3, &bytes), Ok(highest.clone()));
        let over = CommitRecord {
            generation: Generation(u64::MAX),
            ..highest.clone()
        };
        let far = CommitRecord {
            sequence: PLACES_MAX,
            ..highest
        };
        for (record, why) in [(over, "generation"), (far, "no chain is that long")] {
            let refused = record.encode().unwrap_err();
            assert!(
                matches!(&refused, StoreError::Refused { why: said } if said.contains(why)),
                "{refused}"
            );
            let mut bytes = serde_json::to_vec(&record).unwrap();
            let blake3 = Digest::of(&bytes);
            bytes.push(b'\n');
            bytes.extend(serde_json::to_vec(&Seal { blake3 }).unwrap());
            bytes.push(b'\n');
            let said = CommitRecord::decode(record.sequence, &bytes).unwrap_err();
            assert!(said.contains(why), "{said}");
        }
    }

    proptest! {
        // CKPT-4: no flip of any bit and no truncation passes for a record.
        #[test]
        fn damage_is_always_noticed(bit in 0_usize.., cut in 0_usize..) {
            let bytes = sample().encode().unwrap();
            let mut flipped = bytes.clone();
            let bit = bit % (bytes.len() * 8);
            flipped[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(CommitRecord::decode(3, &flipped).is_err());
            prop_assert!(CommitRecord::decode(3, &bytes[..cut % bytes.len()]).is_err());
        }
    }
}
