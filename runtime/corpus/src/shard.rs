//! Token shards: a checked header, the tokens, and a table of chunk hashes.
//!
//! ```text
//! 0    magic "TZTOKENS"            40   vocabulary u32 (every id is below it)
//! 8    version u32                 44   zero
//! 12   bytes per token u16 (2, 4)  64   BLAKE3 of the chunk table
//! 14   zero u16                    96   BLAKE3 of bytes 0..96
//! 16   tokens u64                  128  payload: tokens, little-endian
//! 24   payload bytes u64           …    chunk table: BLAKE3 of each CHUNK_BYTES of the payload
//! 32   chunk bytes u32
//! 36   chunks u32
//! ```
//! The header's hash covers the table's, which covers the payload, so the header's hash stands for the file. A reader
//! checks header and table when it opens the file, so opening costs the same for a terabyte as for a megabyte, but for the
//! table (0.01% of the payload). Tokens are decoded from the buffer whose hash was checked and from nothing else: no byte is
//! used unchecked, whatever happens to the file between two reads. [`ChunkCache`] keeps the last such buffers.
//!
//! Read with positioned reads, not through a memory map: a disk that fails or a file that shrinks must be an error here,
//! and not a SIGBUS in the middle of a step.

use crate::chunks::{ChunkCache, ShardKey};
use crate::error::CorpusError;
use crate::files::file_name;
use crate::manifest::FileManifest;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: &[u8; 8] = b"TZTOKENS";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 128;
/// Unit of checking; whole tokens of either width fill it, so none lies in two chunks.
pub(crate) const CHUNK_BYTES: usize = 256 * 1024;
/// A longer stream goes on in another file.
pub(crate) const SHARD_TOKENS_MAX: u64 = 512 * 1024 * 1024;

/// Bytes of one stored token.
pub(crate) const fn token_bytes(vocabulary: usize) -> usize {
    if vocabulary <= 1 << 16 { 2 } else { 4 }
}

/// Writes one token shard; nothing reads it before [`ShardWriter::finish`] has returned.
pub(crate) struct ShardWriter {
    file: BufWriter<File>,
    path: PathBuf,
    vocabulary: usize,
    tokens: u64,
    chunk: Vec<u8>,
    table: Vec<u8>,
}

impl ShardWriter {
    pub(crate) fn create(path: &Path, vocabulary: usize) -> Result<Self, CorpusError> {
        let mut file = BufWriter::with_capacity(CHUNK_BYTES, File::create_new(path).map_err(CorpusError::write(path))?);
        // A file that is never finished keeps this empty header, which no reader accepts.
        file.write_all(&[0; HEADER_BYTES]).map_err(CorpusError::write(path))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            vocabulary,
            tokens: 0,
            chunk: Vec::with_capacity(CHUNK_BYTES),
            table: Vec::new(),
        })
    }

    pub(crate) const fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Appends tokens.
    ///
    /// # Panics
    /// If an id is not below the vocabulary: the tokenizer was asked for it just before.
    pub(crate) fn push(&mut self, tokens: &[u32]) -> Result<(), CorpusError> {
        let width = token_bytes(self.vocabulary);
        for &token in tokens {
            assert!(
                (token as usize) < self.vocabulary,
                "token {token} outside the vocabulary"
            );
            self.chunk.extend_from_slice(&token.to_le_bytes()[..width]);
            if self.chunk.len() == CHUNK_BYTES {
                self.flush_chunk()?;
            }
        }
        self.tokens += tokens.len() as u64;
        Ok(())
    }

    fn flush_chunk(&mut self) -> Result<(), CorpusError> {
        self.table.extend_from_slice(blake3::hash(&self.chunk).as_bytes());
        self.file
            .write_all(&self.chunk)
            .map_err(CorpusError::write(&self.path))?;
        self.chunk.clear();
        Ok(())
    }

    /// Writes table and header and syncs.
    pub(crate) fn finish(mut self) -> Result<FileManifest, CorpusError> {
        if !self.chunk.is_empty() {
            self.flush_chunk()?;
        }
        let header = Header {
            token_bytes: token_bytes(self.vocabulary),
            tokens: self.tokens,
            vocabulary: self.vocabulary as u32,
        };
        let bytes = header.encode(&self.table);
        let hash = blake3::hash(&bytes[..96]).to_hex().to_string();
        let mut finish = || -> std::io::Result<()> {
            self.file.write_all(&self.table)?;
            self.file.seek(SeekFrom::Start(0))?;
            self.file.write_all(&bytes)?;
            self.file.flush()?;
            self.file.get_ref().sync_all()
        };
        finish().map_err(CorpusError::write(&self.path))?;
        Ok(FileManifest {
            name: file_name(&self.path),
            bytes: header.file_bytes(),
            blake3: hash,
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Header {
    token_bytes: usize,
    tokens: u64,
    vocabulary: u32,
}

impl Header {
    const fn payload_bytes(&self) -> u64 {
        self.tokens * self.token_bytes as u64
    }

    const fn chunks(&self) -> u64 {
        self.payload_bytes().div_ceil(CHUNK_BYTES as u64)
    }

    const fn file_bytes(&self) -> u64 {
        HEADER_BYTES as u64 + self.payload_bytes() + self.chunks() * 32
    }

    fn encode(&self, table: &[u8]) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..14].copy_from_slice(&(self.token_bytes as u16).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.payload_bytes().to_le_bytes());
        bytes[32..36].copy_from_slice(&(CHUNK_BYTES as u32).to_le_bytes());
        bytes[36..40].copy_from_slice(&(self.chunks() as u32).to_le_bytes());
        bytes[40..44].copy_from_slice(&self.vocabulary.to_le_bytes());
        bytes[64..96].copy_from_slice(blake3::hash(table).as_bytes());
        let hash = blake3::hash(&bytes[..96]);
        bytes[96..].copy_from_slice(hash.as_bytes());
        bytes
    }

    /// The header and its table's hash, or what is wrong. The hash has been checked, so the fields are ours.
    fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<(Self, [u8; 32]), String> {
        if &bytes[..8] != MAGIC {
            return Err("is not a token shard (wrong magic)".to_owned());
        }
        if blake3::hash(&bytes[..96]).as_bytes()[..] != bytes[96..] {
            return Err("its header does not match the header's hash".to_owned());
        }
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if u32_at(8) != VERSION {
            return Err(format!("has version {}, and this program reads {VERSION}", u32_at(8)));
        }
        let header = Self {
            token_bytes: usize::from(bytes[12]),
            tokens: u64_at(16),
            vocabulary: u32_at(40),
        };
        let known = matches!(header.token_bytes, 2 | 4)
            && header.tokens <= SHARD_TOKENS_MAX
            && u32_at(32) as usize == CHUNK_BYTES
            && u64::from(u32_at(36)) == header.chunks()
            && u64_at(24) == header.payload_bytes();
        if !known {
            return Err("its header holds impossible sizes".to_owned());
        }
        let mut table = [0; 32];
        table.copy_from_slice(&bytes[64..96]);
        Ok((header, table))
    }
}

/// A token shard opened for reading.
#[derive(Debug)]
pub(crate) struct ShardReader {
    file: File,
    path: PathBuf,
    header: Header,
    table: Vec<u8>,
    cache: Arc<ChunkCache>,
    key: ShardKey,
}

impl ShardReader {
    /// Opens a shard and checks header, length, table and that it is the one its manifest means. Chunks that it checks
    /// are kept in `cache`.
    pub(crate) fn open(folder: &Path, described: &FileManifest, cache: &Arc<ChunkCache>) -> Result<Self, CorpusError> {
        let path = folder.join(&described.name);
        let corrupt = |reason: String| CorpusError::corrupt(&path, reason);
        let file = File::open(&path).map_err(|e| corrupt(format!("cannot be opened ({e})")))?;
        let length = file.metadata().map_err(CorpusError::unreadable(&path))?.len();
        if length != described.bytes || length < HEADER_BYTES as u64 {
            return Err(corrupt(format!("has {length} bytes instead of {}", described.bytes)));
        }
        let read = |bytes: &mut [u8], at: u64| {
            file.read_exact_at(bytes, at)
                .map_err(|e| corrupt(format!("cannot be read at byte {at} ({e})")))
        };
        let mut bytes = [0; HEADER_BYTES];
        read(&mut bytes, 0)?;
        let (header, table_hash) = Header::decode(&bytes).map_err(corrupt)?;
        if blake3::hash(&bytes[..96]).to_hex().as_str() != described.blake3 {
            return Err(corrupt("is another shard than data.json names".to_owned()));
        }
        if header.file_bytes() != length {
            return Err(corrupt(format!(
                "has {length} bytes instead of {}",
                header.file_bytes()
            )));
        }
        let chunks = header.chunks() as usize;
        let mut table = vec![0; chunks * 32];
        read(&mut table, HEADER_BYTES as u64 + header.payload_bytes())?;
        if blake3::hash(&table).as_bytes() != &table_hash {
            return Err(corrupt("its chunk table does not match its hash".to_owned()));
        }
        Ok(Self {
            file,
            path,
            header,
            table,
            key: cache.shard(),
            cache: Arc::clone(cache),
        })
    }

    pub(crate) const fn tokens(&self) -> u64 {
        self.header.tokens
    }

    pub(crate) const fn vocabulary(&self) -> u32 {
        self.header.vocabulary
    }

    pub(crate) const fn payload_bytes(&self) -> u64 {
        self.header.payload_bytes()
    }

    /// Reads and checks every chunk, whatever the cache holds.
    pub(crate) fn check_all(&self) -> Result<(), CorpusError> {
        (0..self.header.chunks() as usize).try_for_each(|chunk| self.read_chunk(chunk).map(drop))
    }

    /// A chunk whose hash was right in this very buffer.
    fn chunk(&self, chunk: usize) -> Result<Arc<Vec<u8>>, CorpusError> {
        match self.cache.get(self.key, chunk) {
            Some(bytes) => Ok(bytes),
            None => self.read_chunk(chunk),
        }
    }

    /// Reads a chunk, checks it and puts it into the cache.
    fn read_chunk(&self, chunk: usize) -> Result<Arc<Vec<u8>>, CorpusError> {
        let start = chunk * CHUNK_BYTES;
        let length = CHUNK_BYTES.min(self.header.payload_bytes() as usize - start);
        let at = (HEADER_BYTES + start) as u64;
        let mut bytes = vec![0; length];
        self.file
            .read_exact_at(&mut bytes, at)
            .map_err(|e| CorpusError::corrupt(&self.path, format!("cannot be read at byte {at} ({e})")))?;
        if blake3::hash(&bytes).as_bytes()[..] != self.table[chunk * 32..chunk * 32 + 32] {
            let reason = format!(
                "the hash of its tokens does not match (payload bytes {start}..{})",
                start + length
            );
            return Err(CorpusError::corrupt(&self.path, reason));
        }
        let bytes = Arc::new(bytes);
        self.cache.put(self.key, chunk, &bytes);
        Ok(bytes)
    }

    /// Tokens `start..start + out.len()`, decoded from checked chunks.
    ///
    /// # Panics
    /// If the range is not inside the shard.
    pub(crate) fn read(&self, start: u64, out: &mut [u32]) -> Result<(), CorpusError> {
        assert!(
            start + out.len() as u64 <= self.header.tokens,
            "range outside the shard"
        );
        let width = self.header.token_bytes;
        let mut at = start as usize * width;
        let mut rest = out;
        while !rest.is_empty() {
            let chunk = self.chunk(at / CHUNK_BYTES)?;
            let bytes = &chunk[at % CHUNK_BYTES..];
            let count = rest.len().min(bytes.len() / width);
            let (now, later) = rest.split_at_mut(count);
            decode(&bytes[..count * width], width, now);
            at += count * width;
            rest = later;
        }
        Ok(())
    }
}

/// Little-endian tokens of `width` bytes each.
fn decode(bytes: &[u8], width: usize, out: &mut [u32]) {
    for (token, raw) in out.iter_mut().zip(bytes.chunks_exact(width)) {
        *token = match *raw {
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => unreachable!("two or four bytes, by the header"),
        };
    }
}

/// Doors for the fuzzer (`chaos/fuzz`). No part of the program.
#[doc(hidden)]
pub mod fuzzing {
    use super::{HEADER_BYTES, Header, SHARD_TOKENS_MAX};

    /// Bytes of a token shard's header.
    pub const TOKEN_HEADER_BYTES: usize = HEADER_BYTES;

    /// Any bytes as a header, as they are and under a right hash: what is believed asks for bounded memory, and is
    /// written again as it was read.
    ///
    /// # Panics
    /// If the decoder believes what the encoder would not write.
    pub fn token_shard_header(bytes: &[u8; HEADER_BYTES]) {
        let _mostly_refused = Header::decode(bytes);
        let mut sealed = *bytes;
        let hash = blake3::hash(&sealed[..96]);
        sealed[96..].copy_from_slice(hash.as_bytes());
        if let Ok((header, table)) = Header::decode(&sealed) {
            assert!(header.tokens <= SHARD_TOKENS_MAX && header.file_bytes() < 1 << 32);
            let mut again = header.encode(&[]);
            again[64..96].copy_from_slice(&table);
            let hash = blake3::hash(&again[..96]);
            again[96..].copy_from_slice(hash.as_bytes());
            assert_eq!(again, sealed, "one header, one spelling");
        }
    }

    /// A good header.
    #[must_use]
    pub fn token_shard_seed() -> Vec<u8> {
        let header = Header {
            token_bytes: 2,
            tokens: 1_000,
            vocabulary: 4_096,
        };
        header.encode(&[0; 32]).to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(folder: &Path, tokens: &[u32], vocabulary: usize) -> FileManifest {
        let mut writer = ShardWriter::create(&folder.join("a.tokens"), vocabulary).unwrap();
        for piece in tokens.chunks(1000) {
            writer.push(piece).unwrap();
        }
        writer.finish().unwrap()
    }

    fn open(folder: &Path, described: &FileManifest, chunks_max: usize) -> Result<ShardReader, CorpusError> {
        ShardReader::open(folder, described, &Arc::new(ChunkCache::new(chunks_max)))
    }

    fn flip(path: &Path, at: usize, bit: u32) {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at as u64).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << bit], at as u64).unwrap();
    }

    fn read_all(folder: &Path, described: &FileManifest) -> Result<Vec<u32>, CorpusError> {
        let shard = open(folder, described, 1)?;
        let mut out = vec![0; shard.tokens() as usize];
        shard.read(0, &mut out)?;
        Ok(out)
    }

    #[test]
    fn round_trip_in_both_widths_and_across_chunks() {
        for (vocabulary, count) in [
            (300_usize, 0_u32),
            (300, 1),
            (300, 140_000),
            (70_000, 300_000),
            (65_536, 131_072),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let tokens: Vec<u32> = (0..count)
                .map(|i| i.wrapping_mul(2_654_435_761) % vocabulary as u32)
                .collect();
            let described = write(folder.path(), &tokens, vocabulary);
            assert_eq!(read_all(folder.path(), &described).unwrap(), tokens);
            let shard = open(folder.path(), &described, 2).unwrap();
            for start in (0..count).step_by(9_973) {
                let mut out = vec![0; (count - start).min(257) as usize];
                shard.read(u64::from(start), &mut out).unwrap();
                assert_eq!(out, tokens[start as usize..start as usize + out.len()]);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        /// No byte is used unchecked: one bit changed anywhere, and the shard is refused.
        #[test]
        fn any_flipped_bit_is_refused(place in 0.0..1.0_f64, bit in 0..8_u32, count in 1..5_000_u32) {
            let folder = tempfile::tempdir().unwrap();
            let tokens: Vec<u32> = (0..count).map(|i| i % 300).collect();
            let described = write(folder.path(), &tokens, 300);
            let path = folder.path().join("a.tokens");
            let mut bytes = std::fs::read(&path).unwrap();
            let at = (place * bytes.len() as f64) as usize;
            bytes[at] ^= 1 << bit;
            std::fs::write(&path, &bytes).unwrap();
            let refused = matches!(read_all(folder.path(), &described), Err(CorpusError::CorruptCache { .. }));
            prop_assert!(refused, "byte {} of {}", at, bytes.len());
        }

        #[test]
        fn any_other_length_is_refused(cut in 1..500_usize, grow in any::<bool>()) {
            let folder = tempfile::tempdir().unwrap();
            let described = write(folder.path(), &[7; 400], 300);
            let path = folder.path().join("a.tokens");
            let mut bytes = std::fs::read(&path).unwrap();
            if grow {
                bytes.extend(vec![0; cut]);
            } else {
                bytes.truncate(bytes.len() - cut);
            }
            std::fs::write(&path, &bytes).unwrap();
            let refused = matches!(read_all(folder.path(), &described), Err(CorpusError::CorruptCache { .. }));
            prop_assert!(refused);
        }
    }

    /// No byte is used unchecked, the second time no less than the first: a file that changes under an open reader gives an
    /// error or the tokens that were checked, never others.
    #[test]
    fn a_bit_flipped_between_two_reads_gives_no_other_tokens() {
        let chunk_tokens = CHUNK_BYTES / 2;
        let tokens: Vec<u32> = (0..3 * chunk_tokens as u32 + 5).map(|i| i % 300).collect();
        for (chunks_max, kept) in [(0, 0), (2, 2), (9, 4)] {
            let folder = tempfile::tempdir().unwrap();
            let described = write(folder.path(), &tokens, 300);
            let shard = open(folder.path(), &described, chunks_max).unwrap();
            let mut out = vec![0; tokens.len()];
            shard.read(0, &mut out).unwrap();
            assert_eq!(out, tokens);
            for chunk in 0..4 {
                flip(
                    &folder.path().join("a.tokens"),
                    HEADER_BYTES + chunk * CHUNK_BYTES + 3,
                    5,
                );
            }
            for chunk in 0..4 {
                let mut out = [0; 5];
                let read = shard.read((chunk * chunk_tokens) as u64, &mut out);
                if chunk >= 4 - kept {
                    read.unwrap();
                    assert_eq!(out, tokens[chunk * chunk_tokens..][..5]);
                } else {
                    let refused = matches!(read, Err(CorpusError::CorruptCache { .. }));
                    assert!(refused, "chunk {chunk} of {kept} kept");
                    assert_eq!(out, [0; 5]);
                }
            }
            assert!(
                shard.check_all().is_err(),
                "asked for the disk, the cache does not answer"
            );
        }
    }

    #[test]
    fn an_unfinished_shard_and_a_swapped_one_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let described = write(folder.path(), &[1, 2, 3], 300);
        let other = tempfile::tempdir().unwrap();
        write(other.path(), &[3, 2, 1], 300);
        let error = read_all(other.path(), &described).unwrap_err().to_string();
        assert!(
            error.contains("another shard") && error.contains("delete the folder"),
            "{error}"
        );

        let mut writer = ShardWriter::create(&folder.path().join("b.tokens"), 300).unwrap();
        writer.push(&[1; 200_000]).unwrap();
        drop(writer);
        let bytes = std::fs::metadata(folder.path().join("b.tokens")).unwrap().len();
        let claimed = FileManifest {
            name: "b.tokens".to_owned(),
            bytes,
            blake3: String::new(),
        };
        assert!(
            read_all(folder.path(), &claimed)
                .unwrap_err()
                .to_string()
                .contains("magic")
        );
    }
}
