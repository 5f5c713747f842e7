//! The index from tokens back to documents (DATA-3): JSON lines, readable with any tool.

use crate::error::CorpusError;
use crate::files::HashingFile;
use crate::manifest::FileManifest;
use crate::refine::Dropped;
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
    /// What refining did; none where the text was taken as it is. Of a document left out, `blake3` and `text_bytes` are those
    /// of the text as it came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refined: Option<RefinedRecord>,
}

/// What refining did to a document.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefinedRecord {
    /// BLAKE3 (hex) of its text as it came, where cleaning changed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_blake3: Option<String>,
    /// The figure that broke a rule, or what is wrong.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// The document that it is a copy of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_of: Option<DocumentPlace>,
}

/// Where a document comes from.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DocumentPlace {
    /// Its domain.
    pub domain: String,
    /// Position of its source file in [`crate::DomainManifest::sources`] of that domain.
    pub source: u32,
    /// Its line or row in that file, from 1.
    pub record: u64,
}

/// One document that was left out where no tokens are made: a line of `….dropped.jsonl`, whole by itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DroppedRecord {
    /// Where it comes from.
    #[serde(flatten)]
    pub place: NamedPlace,
    /// BLAKE3 (hex) of its text as it came, or of its bytes where there was no text.
    pub blake3: String,
    /// Their number.
    pub text_bytes: u64,
    /// Why it was left out.
    pub dropped: Dropped,
    /// The figure that broke a rule, or what is wrong.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// The document that it is a copy of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_of: Option<NamedPlace>,
    /// The benchmark's item of which it holds a piece.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub item: Option<NamedItem>,
}

/// Where a document comes from, by names.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NamedPlace {
    /// Its domain.
    pub domain: String,
    /// Its source file, relative to the domain's path.
    pub source: String,
    /// Its line or row in that file, from 1.
    pub record: u64,
}

/// An item of a benchmark set.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamedItem {
    /// The set.
    pub set: String,
    /// The item's line in it, from 1.
    pub line: u32,
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
    let mut found = None;
    each(path, &mut |record| {
        let holds =
            |kept: &KeptTokens| kept.split == split && (kept.start..kept.start + kept.tokens).contains(&position);
        let is_it = record.kept.as_ref().is_some_and(holds);
        if is_it {
            found = Some(record);
        }
        Ok(!is_it)
    })?;
    Ok(found)
}

/// Hands every line of an index to `sink`, until that says false.
pub(crate) fn each(
    path: &Path,
    sink: &mut dyn FnMut(DocumentRecord) -> Result<bool, CorpusError>,
) -> Result<(), CorpusError> {
    let file = std::fs::File::open(path).map_err(CorpusError::unreadable(path))?;
    for line in std::io::BufReader::new(file).lines() {
        let line = line.map_err(CorpusError::unreadable(path))?;
        let record: DocumentRecord =
            serde_json::from_str(&line).map_err(|e| CorpusError::corrupt(path, format!("cannot be parsed ({e})")))?;
        if !sink(record)? {
            break;
        }
    }
    Ok(())
}
