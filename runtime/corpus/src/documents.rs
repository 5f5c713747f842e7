//! The index from tokens back to documents (DATA-3): JSON lines, readable with any tool.

use crate::error::CorpusError;
use crate::files::HashingFile;
use crate::manifest::{Dropped, FileManifest};
use crate::split::Split;
use serde::{Deserialize, Serialize};
use std::io::BufRead;
use std::path::Path;

/// One document of a domain: where it came from, and where its tokens are or why it has none.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DocumentRecord {
    /// Position of its source file in [`crate::DomainManifest::sources`].
    pub source: u32,
    /// Its line or row in that file, from 1.
    pub record: u64,
    /// BLAKE3 (hex) of its text.
    pub blake3: String,
    /// UTF-8 bytes of its text.
    pub text_bytes: u64,
    /// Its split and tokens; none if it was left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<KeptTokens>,
    /// Why it was left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropped: Option<Dropped>,
}

/// The tokens of a document in its split's stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptTokens {
    /// The split.
    pub split: Split,
    /// First token's position in the split's stream.
    pub start: u64,
    /// Tokens, the end-of-document token included.
    pub tokens: u64,
}

/// Writes the index of one domain.
pub(crate) struct DocumentWriter(HashingFile);

impl DocumentWriter {
    pub(crate) fn create(path: &Path) -> Result<Self, CorpusError> {
        HashingFile::create(path).map(Self)
    }

    pub(crate) fn push(&mut self, record: &DocumentRecord) -> Result<(), CorpusError> {
        // Numbers, strings and plain enums: this has a JSON form.
        let mut line = serde_json::to_vec(record).unwrap_or_default();
        line.push(b'\n');
        self.0.write(&line)
    }

    pub(crate) fn finish(self) -> Result<FileManifest, CorpusError> {
        self.0.finish()
    }
}

/// The document that holds token `position` of a split: a scan of the index, for questions and not for training.
pub(crate) fn find(path: &Path, split: Split, position: u64) -> Result<Option<DocumentRecord>, CorpusError> {
    let file = std::fs::File::open(path).map_err(CorpusError::unreadable(path))?;
    for line in std::io::BufReader::new(file).lines() {
        let line = line.map_err(CorpusError::unreadable(path))?;
        let record: DocumentRecord =
            serde_json::from_str(&line).map_err(|e| CorpusError::corrupt(path, format!("cannot be parsed ({e})")))?;
        if let Some(kept) = record.kept
            && kept.split == split
            && (kept.start..kept.start + kept.tokens).contains(&position)
        {
            return Ok(Some(record));
        }
    }
    Ok(None)
}
