//! One checkpoint shard, read as a stream: a safetensors file of three flat f32 tensors.
//!
//! Memory does not grow with the file: a header, and sixteen bytes per block for its hash.

use super::manifest::{ELEMENT_BYTES, ListedShard, Manifest};
use super::state::{BlockSeeds, BlockSums};
use crate::json::Json;

pub const HEADER_BYTES_MAX: u64 = 64 * 1024;
const FORMAT: &str = "tarazed-optimizer-shard-1";
const TENSORS: [&str; 3] = ["master", "exp_avg", "exp_avg_sq"];
const WORD_BYTES: usize = 4;

/// Checks the bytes of one object as they come.
pub struct ShardCheck {
    step: u64,
    shard: u32,
    first_block: u32,
    block_count: u32,
    block_elements: u64,
    expected_length: u64,
    expected_digest: [u8; 32],
    header_length: usize,
    header: Vec<u8>,
    hasher: blake3::Hasher,
    seen: u64,
    /// Bytes of a word that lay across two pieces.
    cut_word: Vec<u8>,
    /// Where the next word belongs: tensor, block within the shard, position in the block.
    next: (usize, u32, u64),
    /// The first of two words that are hashed together.
    left: u32,
    blocks: Vec<BlockSums>,
    problem: Option<String>,
}

impl ShardCheck {
    /// Fails if no object of that length can hold the shard.
    pub fn new(manifest: &Manifest, listed: &ListedShard) -> Result<Self, String> {
        let payload = manifest
            .payload_bytes(listed)
            .ok_or("its blocks need more than 2^64 bytes")?;
        let header = listed
            .length
            .checked_sub(payload)
            .filter(|bytes| (8..=HEADER_BYTES_MAX).contains(bytes));
        let header = header.ok_or_else(|| format!("{} bytes cannot hold its blocks and a header", listed.length))?;
        Ok(Self {
            step: manifest.step,
            shard: listed.shard,
            first_block: listed.first_block,
            block_count: listed.block_count,
            block_elements: manifest.block_elements,
            expected_length: listed.length,
            expected_digest: listed.blake3,
            header_length: header as usize,
            header: Vec::new(),
            hasher: blake3::Hasher::new(),
            seen: 0,
            cut_word: Vec::new(),
            next: (0, 0, 0),
            left: 0,
            // Grows as blocks come: an absurd count in a manifest must not ask for memory.
            blocks: Vec::new(),
            problem: None,
        })
    }

    /// The next bytes of the object.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        self.hasher.update(bytes);
        self.seen += bytes.len() as u64;
        if self.header.len() < self.header_length {
            let count = bytes.len().min(self.header_length - self.header.len());
            self.header.extend_from_slice(&bytes[..count]);
            bytes = &bytes[count..];
            if self.header.len() == self.header_length
                && let Err(why) = self.check_header()
            {
                self.note(why);
            }
        }
        if !self.cut_word.is_empty() {
            let count = bytes.len().min(WORD_BYTES - self.cut_word.len());
            self.cut_word.extend_from_slice(&bytes[..count]);
            bytes = &bytes[count..];
            if self.cut_word.len() < WORD_BYTES {
                return;
            }
            let word = std::mem::take(&mut self.cut_word);
            self.words_of(&word);
        }
        let whole = bytes.len() / WORD_BYTES * WORD_BYTES;
        self.words_of(&bytes[..whole]);
        self.cut_word.extend_from_slice(&bytes[whole..]);
    }

    /// The sums of its blocks, in order; or all that is wrong, the most telling first.
    pub fn finish(mut self) -> Result<Vec<BlockSums>, String> {
        if self.seen != self.expected_length {
            return Err(format!("{} bytes instead of {}", self.seen, self.expected_length));
        }
        if *self.hasher.finalize().as_bytes() != self.expected_digest {
            return Err("its bytes do not have the BLAKE3 in the manifest".into());
        }
        match self.problem.take() {
            Some(problem) => Err(problem),
            None => Ok(self.blocks),
        }
    }

    fn note(&mut self, problem: String) {
        self.problem.get_or_insert(problem);
    }

    fn elements(&self) -> u64 {
        u64::from(self.block_count) * self.block_elements
    }

    fn words_of(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks_exact(WORD_BYTES) {
            let word = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
            let (array, block, position) = self.next;
            if array == TENSORS.len() {
                return;
            }
            let value = f32::from_bits(word);
            if !value.is_finite() || (array == 2 && value < 0.0) {
                let element = u64::from(block) * self.block_elements + position;
                self.note(format!("element {element} of {} is {value}", TENSORS[array]));
            }
            let last = position + 1 == self.block_elements;
            if position % 2 == 1 {
                self.hash_pair(array, block, position / 2, [self.left, word]);
            } else if last {
                self.hash_pair(array, block, position / 2, [word, 0]);
            } else {
                self.left = word;
            }
            self.next = match (last, block + 1 == self.block_count) {
                (false, _) => (array, block, position + 1),
                (true, false) => (array, block + 1, 0),
                (true, true) => (array + 1, 0, 0),
            };
        }
    }

    fn hash_pair(&mut self, array: usize, block: u32, pair: u64, words: [u32; 2]) {
        if self.blocks.len() <= block as usize {
            self.blocks.push(BlockSums::default());
        }
        let seeds = BlockSeeds::of(self.first_block + block);
        self.blocks[block as usize].add(seeds, array, pair as u32, words);
    }

    /// The header says step, shard and blocks, and where the three tensors lie; nothing else.
    fn check_header(&self) -> Result<(), String> {
        let (length, text) = self.header.split_at_checked(8).ok_or("it has no header")?;
        let stated = length.iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
        if stated != text.len() as u64 {
            return Err(format!("its header says it has {stated} bytes, not {}", text.len()));
        }
        let json = Json::parse(text).map_err(|why| format!("its header: {why}"))?;
        if json.object()?.len() != 1 + TENSORS.len() {
            return Err("its header lists other tensors".into());
        }
        let bytes = self.elements() * (ELEMENT_BYTES / 3);
        for (index, name) in (0..).zip(TENSORS) {
            let tensor = json.get(name)?;
            let shape = tensor.get("shape")?.list()?;
            let offsets = tensor.get("data_offsets")?.list()?;
            let numbers = |list: &[Json]| list.iter().map(Json::count).collect::<Result<Vec<_>, _>>();
            let right = tensor.object()?.len() == 3
                && tensor.get("dtype")?.text()? == "F32"
                && numbers(shape)? == [self.elements()]
                && numbers(offsets)? == [index * bytes, (index + 1) * bytes];
            if !right {
                return Err(format!("its header describes another tensor {name}"));
            }
        }
        self.check_metadata(json.get("__metadata__")?)
    }

    fn check_metadata(&self, metadata: &Json) -> Result<(), String> {
        let expected = [
            ("format", FORMAT.to_owned()),
            ("step", self.step.to_string()),
            ("shard", self.shard.to_string()),
            ("first_block", self.first_block.to_string()),
            ("block_count", self.block_count.to_string()),
            ("block_elements", self.block_elements.to_string()),
        ];
        for (key, value) in expected {
            let found = metadata.get(key)?.text()?;
            if found != value {
                return Err(format!("its header says {key} {found}, its manifest {value}"));
            }
        }
        // Which generation uploaded it is no part of the state; that it is a number is.
        let generation = metadata.get("generation")?.text()?;
        generation
            .parse::<u64>()
            .map_err(|_| format!("its header names generation '{generation}'"))?;
        if metadata.object()?.len() != 7 {
            return Err("its header has other metadata".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of shard 1: blocks 2 and 3 of three elements each.
    fn handmade(values: &[f32], metadata: &str, shape: u64) -> Vec<u8> {
        let mut header = format!("{{\"__metadata__\":{{{metadata}}}");
        for (index, name) in TENSORS.iter().enumerate() {
            let (from, to) = (index * 24, index * 24 + 24);
            header += &format!(",\"{name}\":{{\"dtype\":\"F32\",\"shape\":[{shape}],\"data_offsets\":[{from},{to}]}}");
        }
        header.push('}');
        while header.len() % 8 > 0 {
            header.push(' ');
        }
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        bytes
    }

    const METADATA: &str = r#""format":"tarazed-optimizer-shard-1","step":"20","generation":"3","shard":"1","first_block":"2","block_count":"2","block_elements":"3""#;

    fn values() -> Vec<f32> {
        (0..18_u8).map(f32::from).collect()
    }

    fn check(bytes: &[u8], digest: Option<[u8; 32]>, piece: usize) -> Result<Vec<BlockSums>, String> {
        let listed = ListedShard {
            shard: 1,
            first_block: 2,
            block_count: 2,
            key: "k".into(),
            length: bytes.len() as u64,
            blake3: digest.unwrap_or(*blake3::hash(bytes).as_bytes()),
        };
        let manifest = Manifest {
            step: 20,
            generation: 3,
            writer_nonce: [0; 16],
            block_elements: 3,
            block_count: 4,
            shards: Vec::new(),
            last_line: String::new(),
            binary: String::new(),
            device_type: String::new(),
            parent: None,
            restored_from: None,
            reach_steps: None,
        };
        let mut check = ShardCheck::new(&manifest, &listed)?;
        bytes.chunks(piece).for_each(|piece| check.feed(piece));
        check.finish()
    }

    #[test]
    fn pieces_of_any_size_give_the_same_hashes() {
        let bytes = handmade(&values(), METADATA, 6);
        let whole: Vec<_> = check(&bytes, None, bytes.len())
            .unwrap()
            .iter()
            .map(|sums| sums.bytes())
            .collect();
        assert_eq!(whole.len(), 2);
        for piece in 1..20 {
            let pieces: Vec<_> = check(&bytes, None, piece)
                .unwrap()
                .iter()
                .map(|sums| sums.bytes())
                .collect();
            assert_eq!(pieces, whole, "pieces of {piece}");
        }
        // Block 3 by the definition: words 3, 4, 5 of each tensor, the last alone.
        let mut sums = BlockSums::default();
        for array in 0..3 {
            let word = |at: usize| (values()[array * 6 + at]).to_bits();
            sums.add(BlockSeeds::of(3), array, 0, [word(3), word(4)]);
            sums.add(BlockSeeds::of(3), array, 1, [word(5), 0]);
        }
        assert_eq!(whole[1], sums.bytes());
    }

    #[test]
    fn what_is_wrong_is_said() {
        let good = handmade(&values(), METADATA, 6);
        let digest = *blake3::hash(&good).as_bytes();
        for at in 0..good.len() {
            let mut damaged = good.clone();
            damaged[at] ^= 1;
            assert!(
                check(&damaged, Some(digest), 7).unwrap_err().contains("BLAKE3"),
                "byte {at}"
            );
        }
        let says = |bytes: &[u8], part: &str| {
            let said = check(bytes, None, 7).unwrap_err();
            assert!(said.contains(part), "{said}");
        };
        let with = |at: usize, value: f32| {
            let mut values = values();
            values[at] = value;
            handmade(&values, METADATA, 6)
        };
        says(&with(4, f32::NAN), "element 4 of master is NaN");
        says(&with(7, f32::INFINITY), "element 1 of exp_avg is inf");
        says(&with(12, -1.0), "element 0 of exp_avg_sq is -1");
        says(
            &handmade(&values(), &METADATA.replace("\"20\"", "\"21\""), 6),
            "says step 21",
        );
        says(
            &handmade(
                &values(),
                &METADATA.replace("\"2\",\"block_elements\"", "\"9\",\"block_elements\""),
                6,
            ),
            "block_count 9",
        );
        says(&handmade(&values(), METADATA, 5), "another tensor master");
        says(
            &handmade(&values(), &format!("{METADATA},\"more\":\"x\""), 6),
            "other metadata",
        );
        says(&good[..good.len() - 40], "its header says it has");
        says(&good[..60], "cannot hold");
    }
}
