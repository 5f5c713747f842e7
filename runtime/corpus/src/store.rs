//! Reading sequences back.

mod scored;

pub use scored::ScoredText;

use crate::chunks::{CACHED_CHUNKS_MAX, ChunkCache};
use crate::documents::{self, DocumentRecord};
use crate::error::CorpusError;
use crate::files::hash_file;
use crate::manifest::{DataManifest, MANIFEST_FILE};
use crate::shard::ShardReader;
use crate::split::Split;
use crate::tokenizer::Tokenizer;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tarazed_domain::ids::DomainIndex;

/// Payload up to which every hash is checked when the store is opened (a tenth of a second), so that a bad file is named
/// before training begins. Whether or not it was, a chunk is checked again whenever it is read.
const CHECK_AT_OPEN_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// The token shards of a data set, open for reading from any thread.
#[derive(Debug)]
pub struct TokenStore {
    folder: PathBuf,
    context: usize,
    manifest: DataManifest,
    /// By domain, then by split: the stream's shards with the position of their first token.
    streams: Vec<[Vec<(u64, ShardReader)>; 2]>,
}

impl TokenStore {
    /// Opens the data set in `folder` ([`crate::Prepared::folder`]) for sequences of `context` tokens.
    ///
    /// # Errors
    /// [`CorpusError::CorruptCache`] if any file is not what the manifest says, [`CorpusError::TooShort`] if a split holds
    /// no sequence of this length.
    pub fn open(folder: &Path, context: usize) -> Result<Self, CorpusError> {
        assert!(context > 0, "a sequence has at least one token");
        let manifest = DataManifest::load(folder)?;
        manifest.check_context(context)?;
        let mut streams = Vec::with_capacity(manifest.domains.len());
        let cache = Arc::new(ChunkCache::new(CACHED_CHUNKS_MAX));
        for domain in &manifest.domains {
            let [train, held_out] = Split::ALL.map(|split| {
                let mut shards = Vec::new();
                let mut position = 0;
                for file in &domain.split(split).shards {
                    let shard = ShardReader::open(folder, file, &cache)?;
                    let start = position;
                    position += shard.tokens();
                    if shard.vocabulary() as usize != manifest.tokenizer.vocabulary {
                        return Err(CorpusError::corrupt(
                            &folder.join(&file.name),
                            "was made with another tokenizer",
                        ));
                    }
                    shards.push((start, shard));
                }
                if position != domain.split(split).tokens {
                    let reason = format!(
                        "the {} shards of '{}' hold {position} tokens",
                        split.name(),
                        domain.name
                    );
                    return Err(CorpusError::corrupt(&folder.join(MANIFEST_FILE), reason));
                }
                Ok(shards)
            });
            streams.push([train?, held_out?]);
        }
        let store = Self {
            folder: folder.to_owned(),
            context,
            manifest,
            streams,
        };
        if store.shards().map(ShardReader::payload_bytes).sum::<u64>() <= CHECK_AT_OPEN_BYTES_MAX {
            store.check_all()?;
        }
        Ok(store)
    }

    fn shards(&self) -> impl Iterator<Item = &ShardReader> {
        self.streams.iter().flatten().flatten().map(|(_, shard)| shard)
    }

    /// Checks the hash of every token shard now.
    ///
    /// # Errors
    /// [`CorpusError::CorruptCache`].
    pub fn check_all(&self) -> Result<(), CorpusError> {
        self.shards().try_for_each(ShardReader::check_all)
    }

    /// Whole sequences of a split.
    #[must_use]
    pub fn sequences(&self, domain: DomainIndex, split: Split) -> u64 {
        self.manifest.domain(domain).split(split).sequences(self.context)
    }

    /// Writes sequence `index` into `out`: `context + 1` tokens, of which the first `context` are inputs and the last
    /// `context` their targets.
    ///
    /// # Errors
    /// [`CorpusError::CorruptCache`] if the bytes cannot be read or fail their hash.
    ///
    /// # Panics
    /// If `out` has another length or there is no such sequence.
    pub fn fill(&self, domain: DomainIndex, split: Split, index: u64, out: &mut [u32]) -> Result<(), CorpusError> {
        assert_eq!(out.len(), self.context + 1, "a sequence and its last target");
        assert!(
            index < self.sequences(domain, split),
            "sequence {index} of domain {domain} does not exist"
        );
        read_across(
            &self.streams[domain.index()][split.index()],
            index * self.context as u64,
            out,
        )
    }

    /// Writes tokens `position..position + out.len()` of a split's stream into `out`.
    ///
    /// # Errors
    /// [`CorpusError::CorruptCache`] if the bytes cannot be read or fail their hash.
    ///
    /// # Panics
    /// If the stream ends before.
    pub fn tokens(&self, domain: DomainIndex, split: Split, position: u64, out: &mut [u32]) -> Result<(), CorpusError> {
        let there = self.manifest.domain(domain).split(split).tokens;
        assert!(
            position + out.len() as u64 <= there,
            "tokens past the end of the stream"
        );
        read_across(&self.streams[domain.index()][split.index()], position, out)
    }

    /// Hands every line of a domain's index to `sink`, in order, until that says false. The index is checked first.
    ///
    /// # Errors
    /// [`CorpusError::CorruptCache`] or [`CorpusError::Unreadable`], or the sink's own.
    pub fn documents(
        &self,
        domain: DomainIndex,
        sink: &mut dyn FnMut(DocumentRecord) -> Result<bool, CorpusError>,
    ) -> Result<(), CorpusError> {
        documents::each(&self.checked_index(domain)?, sink)
    }

    fn checked_index(&self, domain: DomainIndex) -> Result<PathBuf, CorpusError> {
        let described = &self.manifest.domain(domain).documents;
        let path = self.folder.join(&described.name);
        let (bytes, hash) = hash_file(&path)?;
        if bytes != described.bytes || hash.to_hex().as_str() != described.blake3 {
            return Err(CorpusError::corrupt(
                &path,
                "its length or hash is not what data.json says",
            ));
        }
        Ok(path)
    }

    /// The data set's manifest.
    #[must_use]
    pub const fn manifest(&self) -> &DataManifest {
        &self.manifest
    }

    /// The context length the store was opened for.
    #[must_use]
    pub const fn context(&self) -> usize {
        self.context
    }

    /// Loads the data set's tokenizer.
    ///
    /// # Errors
    /// [`CorpusError::CorruptCache`] or [`CorpusError::Tokenizer`].
    pub fn tokenizer(&self) -> Result<Tokenizer, CorpusError> {
        let (tokenizer, _) = self.manifest.tokenizer.load(&self.folder)?;
        Ok(tokenizer)
    }

    /// The document that token `position` of a split's stream belongs to, with its source (DATA-3). Sequence `i` starts at
    /// position `i * context`. Reads the whole index: for questions, not for training.
    ///
    /// # Errors
    /// [`CorpusError::CorruptCache`] or [`CorpusError::Unreadable`].
    pub fn document_at(
        &self,
        domain: DomainIndex,
        split: Split,
        position: u64,
    ) -> Result<Option<DocumentRecord>, CorpusError> {
        let path = self.checked_index(domain)?;
        documents::find(&path, split, position)
    }
}

/// Tokens `position..position + out.len()` of a stream, which may lie in several of its shards.
fn read_across(shards: &[(u64, ShardReader)], mut position: u64, out: &mut [u32]) -> Result<(), CorpusError> {
    let mut rest = out;
    let mut at = shards.partition_point(|(start, shard)| start + shard.tokens() <= position);
    while !rest.is_empty() {
        let (start, shard) = &shards[at];
        let here = (start + shard.tokens() - position).min(rest.len() as u64) as usize;
        let (now, later) = rest.split_at_mut(here);
        shard.read(position - start, now)?;
        position += here as u64;
        rest = later;
        at += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::ShardWriter;

    #[test]
    fn a_sequence_may_lie_in_several_shards() {
        let folder = tempfile::tempdir().unwrap();
        let tokens: Vec<u32> = (0..1000).map(|i| i * 7 % 500).collect();
        let cache = Arc::new(ChunkCache::new(3));
        let mut shards = Vec::new();
        let mut start = 0;
        for (index, piece) in [&tokens[..3], &tokens[3..4], &tokens[4..300], &tokens[300..]]
            .iter()
            .enumerate()
        {
            let mut writer = ShardWriter::create(&folder.path().join(format!("{index}.tokens")), 500).unwrap();
            writer.push(piece).unwrap();
            let described = writer.finish().unwrap();
            let shard = ShardReader::open(folder.path(), &described, &cache).unwrap();
            shards.push((start as u64, shard));
            start += piece.len();
        }
        for length in [0, 1, 2, 5, 299, 1000] {
            for position in 0..=tokens.len() - length {
                let mut out = vec![u32::MAX; length];
                read_across(&shards, position as u64, &mut out).unwrap();
                assert_eq!(out, tokens[position..position + length]);
            }
        }
    }
}
