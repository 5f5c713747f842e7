//! What a killed process had already turned into tokens: found again, checked, and not made anew.
//!
//! For the tokenizer and for each domain a marker lies in the pipeline's work folder, put there when the files that it names are
//! on disk. Files without a marker are half written and go. Counts and reports are made again from what the files hold.

use super::build::{DomainBuilt, Text};
use crate::chunks::ChunkCache;
use crate::entropy::Unigram;
use crate::error::CorpusError;
use crate::manifest::{DomainManifest, FileManifest, TokenizerManifest};
use crate::pipeline::DomainReport;
use crate::pipeline::pieces::{is_whole, put};
use crate::shard::ShardReader;
use crate::split::Split;
use crate::tokenizer::Tokenizer;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::Path;
use std::sync::Arc;

const TOKENIZER: &str = "tokenizer.done";
/// Tokens counted at once.
const BLOCK_TOKENS: u64 = 64 * 1024;

fn name_of(domain: usize) -> String {
    format!("domain-{domain:04}.done")
}

fn marker<T: DeserializeOwned>(work: &Path, name: &str) -> Option<T> {
    let bytes = std::fs::read(work.join(name)).ok()?;
    serde_json::from_slice(&bytes).ok()
}

fn set_marker(work: &Path, name: &str, value: &impl Serialize) -> Result<(), CorpusError> {
    // Numbers, strings and maps with names for keys: this has a JSON form.
    put(work, name, &serde_json::to_vec(value).unwrap_or_default())
}

/// The tokenizer in `folder`, if it is done.
pub(super) fn tokenizer(work: &Path, folder: &Path) -> Result<Option<(Tokenizer, FileManifest)>, CorpusError> {
    let Some(done) = marker::<TokenizerManifest>(work, TOKENIZER) else {
        return Ok(None);
    };
    if !is_whole(folder, &done.file)? {
        return Ok(None);
    }
    let path = folder.join(&done.file.name);
    let bytes = std::fs::read(&path).map_err(CorpusError::unreadable(&path))?;
    let tokenizer = Tokenizer::from_bytes(&path, &bytes, |_| Ok(done.end_of_document))?;
    Ok(Some((tokenizer, done.file)))
}

/// Notes that the tokenizer is done.
pub(super) fn tokenizer_done(work: &Path, tokenizer: &Tokenizer, file: &FileManifest) -> Result<(), CorpusError> {
    let done = TokenizerManifest {
        file: file.clone(),
        vocabulary: tokenizer.vocabulary(),
        end_of_document: tokenizer.end_of_document(),
    };
    set_marker(work, TOKENIZER, &done)
}

/// The files of a domain in `folder`, if they are done.
pub(super) fn domain(
    work: &Path,
    folder: &Path,
    text: &Text<'_>,
    index: usize,
    vocabulary: usize,
) -> Result<Option<DomainBuilt>, CorpusError> {
    let Some(manifest) = marker::<DomainManifest>(work, &name_of(index)) else {
        return Ok(None);
    };
    if !is_whole(folder, &manifest.documents)? {
        return Ok(None);
    }
    let mut counts = [Unigram::new(vocabulary), Unigram::new(vocabulary)];
    for split in Split::ALL {
        for shard in &manifest.split(split).shards {
            match count(folder, shard, vocabulary, &mut counts[split.index()]) {
                // Not as it was written, so it is made anew.
                Err(CorpusError::CorruptCache { .. }) => return Ok(None),
                other => other?,
            }
        }
    }
    let mut report = DomainReport::new(&manifest.name);
    text.report(index, &mut report)?;
    let [train, held_out] = counts;
    Ok(Some(DomainBuilt {
        manifest,
        report,
        train,
        held_out,
    }))
}

/// Notes that a domain is done.
pub(super) fn domain_done(work: &Path, index: usize, manifest: &DomainManifest) -> Result<(), CorpusError> {
    set_marker(work, &name_of(index), manifest)
}

/// Reads, checks and counts every token of a shard.
fn count(folder: &Path, file: &FileManifest, vocabulary: usize, counts: &mut Unigram) -> Result<(), CorpusError> {
    let shard = ShardReader::open(folder, file, &Arc::new(ChunkCache::new(1)))?;
    if shard.vocabulary() as usize != vocabulary {
        return Err(CorpusError::corrupt(
            &folder.join(&file.name),
            "was made with another tokenizer",
        ));
    }
    let mut at = 0;
    while at < shard.tokens() {
        let mut tokens = vec![0; BLOCK_TOKENS.min(shard.tokens() - at) as usize];
        shard.read(at, &mut tokens)?;
        counts.add(&tokens);
        at += tokens.len() as u64;
    }
    Ok(())
}

/// Removes the files in `folder` whose names begin so.
pub(super) fn remove(folder: &Path, beginnings: &[&str]) -> Result<(), CorpusError> {
    for entry in std::fs::read_dir(folder).map_err(CorpusError::write(folder))? {
        let path = entry.map_err(CorpusError::write(folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if beginnings.iter().any(|beginning| name.starts_with(beginning)) {
            std::fs::remove_file(&path).map_err(CorpusError::write(&path))?;
        }
    }
    Ok(())
}
