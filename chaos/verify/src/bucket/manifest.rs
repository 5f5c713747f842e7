//! A manifest: header, archive, and whether its parts add up.
//!
//! Reads the bytes as `docs/FORMATS.md` describes them. Only what bears on restoring is judged; names of binary and device
//! are decoded, so that a damaged one is seen, and shown.

use super::archive::{Archive, REFERENCE_BYTES};
use crate::json::{Json, to_hex};
use std::collections::HashSet;

pub const MANIFEST_BYTES_MAX: u64 = 256 * 1024 * 1024;
const MAGIC: &[u8; 8] = b"TZMANIF1";
/// Manifests that say how far back a rollback may go, and the same without.
const SCHEMA: u32 = 2;
const SCHEMA_WITHOUT_REACH: u32 = 1;
const HEADER_BYTES: usize = 56;
/// Bytes of the archive's root, which stands at its end, and of one listed shard.
const ROOT_BYTES: usize = 384;
const SHARD_BYTES: usize = 64;
/// Master weight and two moments, four bytes each.
pub const ELEMENT_BYTES: u64 = 12;

/// One listed checkpoint shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ListedShard {
    pub shard: u32,
    pub first_block: u32,
    pub block_count: u32,
    pub key: String,
    pub length: u64,
    pub blake3: [u8; 32],
}

/// Another commit, named by place, step and digest of its record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NamedCommit {
    pub sequence: u64,
    pub step: u64,
    pub record: [u8; 32],
}

#[derive(Debug)]
pub struct Manifest {
    pub step: u64,
    pub generation: u64,
    pub writer_nonce: [u8; 16],
    pub block_elements: u64,
    pub block_count: u32,
    pub shards: Vec<ListedShard>,
    /// The last line of the trace at that step; empty at step 0.
    pub last_line: String,
    pub binary: String,
    pub device_type: String,
    pub parent: Option<NamedCommit>,
    pub restored_from: Option<NamedCommit>,
    /// Steps behind the newest checkpoint that the run's own policy may still go back.
    pub reach_steps: Option<u32>,
}

/// Offsets of the root's fields, in the order in which they stand.
mod field {
    pub const STEP: usize = 32;
    pub const GENERATION: usize = 40;
    pub const WRITER_NONCE: usize = 48;
    pub const BLOCK_ELEMENTS: usize = 72;
    pub const BLOCK_COUNT: usize = 80;
    pub const SHARD_COUNT: usize = 84;
    pub const SHARDS: usize = 152;
    pub const DECISIONS: usize = 160;
    pub const HEAD_STEP: usize = 168;
    pub const HEAD_LENGTH: usize = 176;
    pub const LAST_LINE: usize = 216;
    pub const BINARY_VERSION: usize = 224;
    pub const BINARY_BUILD: usize = 232;
    pub const BINARY_LIBRARIES: usize = 240;
    pub const DEVICE_TYPE: usize = 248;
    pub const PARENT: usize = 256;
    pub const RESTORED_FROM: usize = 312;
    pub const DECLARED: usize = 368;
}

impl Manifest {
    /// Reads and judges a manifest's bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let (header, archive) = bytes
            .split_at_checked(HEADER_BYTES)
            .ok_or("it is shorter than its header")?;
        let header = Archive(header);
        if header.bytes(0, 8)? != MAGIC {
            return Err("it does not begin with TZMANIF1".into());
        }
        let reach_steps = match (header.u32(8)?, header.u32(12)?) {
            (SCHEMA_WITHOUT_REACH, 0) => None,
            (SCHEMA, steps @ 1..) => Some(steps),
            (schema @ (SCHEMA_WITHOUT_REACH | SCHEMA), reach) => {
                return Err(format!("it has a reach of {reach} steps in schema {schema}"));
            }
            (schema, _) => return Err(format!("it has schema {schema}, this verifier reads up to {SCHEMA}")),
        };
        if header.u64(16)? != archive.len() as u64 {
            return Err(format!(
                "its archive has {} bytes instead of {}",
                archive.len(),
                header.u64(16)?
            ));
        }
        if header.array::<32>(24)? != *blake3::hash(archive).as_bytes() {
            return Err("its archive does not have the BLAKE3 of its header".into());
        }
        let root = archive.len().checked_sub(ROOT_BYTES).filter(|root| root % 8 == 0);
        let root = root.ok_or_else(|| format!("an archive of {} bytes has no place for its root", archive.len()))?;
        let manifest = Self {
            reach_steps,
            ..Self::root(Archive(archive), root)?
        };
        manifest.adds_up()?;
        Ok(manifest)
    }

    fn root(archive: Archive<'_>, root: usize) -> Result<Self, String> {
        let step = archive.u64(root + field::STEP)?;
        let mut shards = Vec::new();
        for at in archive.list(root + field::SHARDS, SHARD_BYTES)? {
            shards.push(listed_shard(archive, at)?);
        }
        if archive.u32(root + field::SHARD_COUNT)? as usize != shards.len() {
            return Err(format!(
                "it announces another number of shards than the {} it lists",
                shards.len()
            ));
        }
        if archive.u64(root + field::HEAD_STEP)? != step {
            return Err("its trace head is of another step".into());
        }
        let last_line = archive.text(root + field::LAST_LINE)?.to_owned();
        if (last_line.len() as u64) > archive.u64(root + field::HEAD_LENGTH)? {
            return Err("its trace head has a line longer than the trace".into());
        }
        decisions(archive, root + field::DECISIONS)?;
        for at in archive.list(root + field::BINARY_LIBRARIES, REFERENCE_BYTES)? {
            archive.text(at)?;
        }
        archive.text(root + field::DECLARED)?;
        Ok(Self {
            step,
            generation: archive.u64(root + field::GENERATION)?,
            writer_nonce: archive.array(root + field::WRITER_NONCE)?,
            block_elements: archive.u64(root + field::BLOCK_ELEMENTS)?,
            block_count: archive.u32(root + field::BLOCK_COUNT)?,
            shards,
            last_line,
            binary: [field::BINARY_VERSION, field::BINARY_BUILD]
                .map(|at| archive.text(root + at))
                .into_iter()
                .collect::<Result<Vec<_>, _>>()?
                .join(" "),
            device_type: archive.text(root + field::DEVICE_TYPE)?.to_owned(),
            parent: named_commit(archive, root + field::PARENT)?,
            restored_from: named_commit(archive, root + field::RESTORED_FROM)?,
            reach_steps: None,
        })
    }

    /// Shards in order hold every block exactly once; each object can hold its blocks, at a key of this step of its own.
    fn adds_up(&self) -> Result<(), String> {
        let mut next = 0_u64;
        let mut keys = HashSet::new();
        for (index, listed) in self.shards.iter().enumerate() {
            let what = format!("shard {index}");
            if listed.shard as usize != index {
                return Err(format!("{what} is listed as shard {}", listed.shard));
            }
            if u64::from(listed.first_block) != next || listed.block_count == 0 {
                return Err(format!("{what} begins at block {}, not at {next}", listed.first_block));
            }
            next += u64::from(listed.block_count);
            let payload = self.payload_bytes(listed);
            if payload.is_none_or(|payload| listed.length <= payload) {
                return Err(format!("{what} has {} bytes, too few for its blocks", listed.length));
            }
            if !listed.key.starts_with(&format!("shards/{:020}/", self.step)) {
                return Err(format!("{what} lies at {}, no key of step {}", listed.key, self.step));
            }
            if !keys.insert(&listed.key) {
                return Err(format!("{what} shares {} with another shard", listed.key));
            }
        }
        if self.block_elements == 0 || next == 0 || next != u64::from(self.block_count) {
            return Err(format!("its shards hold {next} blocks of {}", self.block_count));
        }
        Ok(())
    }

    pub fn payload_bytes(&self, listed: &ListedShard) -> Option<u64> {
        let elements = u64::from(listed.block_count).checked_mul(self.block_elements)?;
        elements.checked_mul(ELEMENT_BYTES)
    }

    pub fn shard_bytes(&self) -> u64 {
        self.shards
            .iter()
            .fold(0, |sum, listed| sum.saturating_add(listed.length))
    }

    pub fn key(&self, digest: &[u8; 32]) -> String {
        format!(
            "manifests/{:020}/{:020}-{}.manifest",
            self.step,
            self.generation,
            to_hex(digest)
        )
    }
}

fn listed_shard(archive: Archive<'_>, at: usize) -> Result<ListedShard, String> {
    Ok(ListedShard {
        shard: archive.u32(at)?,
        first_block: archive.u32(at + 4)?,
        block_count: archive.u32(at + 8)?,
        key: archive.text(at + 16)?.to_owned(),
        length: archive.u64(at + 24)?,
        blake3: archive.array(at + 32)?,
    })
}

fn named_commit(archive: Archive<'_>, at: usize) -> Result<Option<NamedCommit>, String> {
    let Some(at) = archive.option(at, 8)? else {
        return Ok(None);
    };
    Ok(Some(NamedCommit {
        sequence: archive.u64(at)?,
        step: archive.u64(at + 8)?,
        record: archive.array(at + 16)?,
    }))
}

/// The decisions are JSON, a list as in trace lines; what they decide is the trace verifier's affair.
fn decisions(archive: Archive<'_>, at: usize) -> Result<(), String> {
    let places = archive.list(at, 1)?;
    let length = places.len();
    let bytes = archive.bytes(places.into_iter().next().unwrap_or(0), length)?;
    Json::parse(bytes)
        .and_then(|decisions| decisions.list().map(drop))
        .map_err(|why| format!("its decisions cannot be read: {why}"))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A manifest of `shards` at step 20, made by hand. `last_line` is longer than eight bytes.
    pub fn handmade(shards: &[ListedShard], block_elements: u64, block_count: u32, last_line: &str) -> Vec<u8> {
        let mut archive = Vec::new();
        let texts: Vec<usize> = shards
            .iter()
            .map(|shard| push(&mut archive, shard.key.as_bytes(), 1))
            .collect();
        let line_at = push(&mut archive, last_line.as_bytes(), 1);
        let decisions_at = push(&mut archive, b"[]", 1);
        let list_at = push(&mut archive, &[], 8);
        for (shard, text) in shards.iter().zip(texts) {
            let at = archive.len();
            let mut entry = vec![0; SHARD_BYTES];
            entry[..4].copy_from_slice(&shard.shard.to_le_bytes());
            entry[4..8].copy_from_slice(&shard.first_block.to_le_bytes());
            entry[8..12].copy_from_slice(&shard.block_count.to_le_bytes());
            refer_text(&mut entry, 16, at, text, shard.key.len());
            entry[24..32].copy_from_slice(&shard.length.to_le_bytes());
            entry[32..].copy_from_slice(&shard.blake3);
            archive.extend_from_slice(&entry);
        }
        let at = push(&mut archive, &[], 8);
        let mut root = vec![0; ROOT_BYTES];
        root[field::STEP] = 20;
        root[field::GENERATION] = 3;
        root[field::WRITER_NONCE..field::WRITER_NONCE + 16].fill(7);
        root[field::BLOCK_ELEMENTS..][..8].copy_from_slice(&block_elements.to_le_bytes());
        root[field::BLOCK_COUNT..][..4].copy_from_slice(&block_count.to_le_bytes());
        root[field::SHARD_COUNT..][..4].copy_from_slice(&(shards.len() as u32).to_le_bytes());
        refer_list(&mut root, field::SHARDS, at, list_at, shards.len());
        refer_list(&mut root, field::DECISIONS, at, decisions_at, 2);
        root[field::HEAD_STEP] = 20;
        root[field::HEAD_LENGTH..][..8].copy_from_slice(&9_999_u64.to_le_bytes());
        refer_text(&mut root, field::LAST_LINE, at, line_at, last_line.len());
        root[field::BINARY_VERSION..][..6].copy_from_slice(b"0.1.0\xff");
        root[field::BINARY_BUILD..][..2].copy_from_slice(b"b\xff");
        root[field::DEVICE_TYPE..][..8].copy_from_slice(b"cpu-f32\xff");
        root[field::DECLARED] = 0xff;
        archive.extend_from_slice(&root);
        seal(&archive)
    }

    pub fn seal(archive: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&SCHEMA_WITHOUT_REACH.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&(archive.len() as u64).to_le_bytes());
        bytes.extend_from_slice(blake3::hash(archive).as_bytes());
        bytes.extend_from_slice(archive);
        bytes
    }

    fn push(archive: &mut Vec<u8>, bytes: &[u8], alignment: usize) -> usize {
        archive.resize(archive.len().next_multiple_of(alignment), 0);
        let at = archive.len();
        archive.extend_from_slice(bytes);
        at
    }

    fn refer_text(part: &mut [u8], offset: usize, part_at: usize, target: usize, length: usize) {
        assert!(
            (9..1 << 30).contains(&length),
            "texts of a reference are longer than eight bytes"
        );
        let length = length as u32;
        let stored = (length & 0x3f) | 0x80 | (length & !0x3f) << 2;
        part[offset..offset + 4].copy_from_slice(&stored.to_le_bytes());
        let distance = target as i32 - (part_at + offset) as i32;
        part[offset + 4..offset + 8].copy_from_slice(&distance.to_le_bytes());
    }

    fn refer_list(part: &mut [u8], offset: usize, part_at: usize, target: usize, count: usize) {
        let distance = target as i32 - (part_at + offset) as i32;
        part[offset..offset + 4].copy_from_slice(&distance.to_le_bytes());
        part[offset + 4..offset + 8].copy_from_slice(&(count as u32).to_le_bytes());
    }

    fn shards() -> Vec<ListedShard> {
        let shard = |shard: u32, first_block, block_count| ListedShard {
            shard,
            first_block,
            block_count,
            key: format!("shards/{:020}/x-{shard}.safetensors", 20),
            length: 1_000,
            blake3: [shard as u8; 32],
        };
        vec![shard(0, 0, 2), shard(1, 2, 1)]
    }

    #[test]
    fn a_handmade_manifest_is_read_whole() {
        let line = "a line of the trace that is far longer than the sixty-three bytes that six bits can tell of";
        let manifest = Manifest::decode(&handmade(&shards(), 4, 3, line)).unwrap();
        assert_eq!((manifest.step, manifest.generation, manifest.block_count), (20, 3, 3));
        assert_eq!(manifest.shards, shards());
        assert_eq!(manifest.last_line, line);
        assert_eq!(
            (manifest.binary.as_str(), manifest.device_type.as_str()),
            ("0.1.0 b", "cpu-f32")
        );
        assert_eq!((manifest.writer_nonce, manifest.parent), ([7; 16], None));
    }

    #[test]
    fn the_second_schema_says_how_far_back_a_run_may_go() {
        let mut bytes = handmade(&shards(), 4, 3, "a last line");
        assert_eq!(Manifest::decode(&bytes).unwrap().reach_steps, None);
        bytes[8] = 2;
        assert!(
            Manifest::decode(&bytes)
                .unwrap_err()
                .contains("a reach of 0 steps in schema 2")
        );
        bytes[12..16].copy_from_slice(&290_u32.to_le_bytes());
        assert_eq!(Manifest::decode(&bytes).unwrap().reach_steps, Some(290));
        bytes[8] = 1;
        assert!(Manifest::decode(&bytes).unwrap_err().contains("in schema 1"));
        bytes[8] = 3;
        assert!(Manifest::decode(&bytes).unwrap_err().contains("schema 3"));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let bytes = handmade(&shards(), 4, 3, "a last line");
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            assert!(Manifest::decode(&damaged).is_err(), "byte {at}");
            assert!(Manifest::decode(&bytes[..at]).is_err(), "{at} bytes");
        }
    }

    /// Behind a right hash, too, whatever the archive says is checked before it is followed.
    #[test]
    fn an_archive_of_any_bytes_is_an_error_and_no_panic() {
        let bytes = handmade(&shards(), 4, 3, "a last line");
        let archive = &bytes[HEADER_BYTES..];
        for at in 0..archive.len() {
            for value in [0x00, 0x7f, 0x80, 0xff] {
                let mut damaged = archive.to_vec();
                damaged[at] = value;
                let _either = Manifest::decode(&seal(&damaged));
            }
        }
    }

    #[test]
    fn blocks_that_overlap_or_lack_are_noticed() {
        let with = |change: fn(&mut Vec<ListedShard>)| {
            let mut shards = shards();
            change(&mut shards);
            Manifest::decode(&handmade(&shards, 4, 3, "a last line")).unwrap_err()
        };
        assert!(with(|shards| shards[1].first_block = 1).contains("begins at block 1, not at 2"));
        assert!(with(|shards| shards[1].block_count = 2).contains("hold 4 blocks of 3"));
        assert!(with(|shards| drop(shards.pop())).contains("hold 2 blocks of 3"));
        assert!(with(|shards| shards[1].key = shards[0].key.clone()).contains("shares"));
        assert!(with(|shards| shards[1].key = "shards/elsewhere".into()).contains("no key of step 20"));
        assert!(with(|shards| shards[0].length = 96).contains("too few"));
        assert!(with(|shards| shards.swap(0, 1)).contains("is listed as"));
    }
}
