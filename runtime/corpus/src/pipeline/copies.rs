//! Second stage: which documents are copies. The tables of keys of all pieces are merged; where documents have the same key,
//! all but the first are copies of it. The result is a table of copies in the order of documents.
//!
//! Memory is bounded whatever the number of documents: there is no map of documents, and no set of clusters.

use super::document::DocumentId;
use super::pieces::{EXACT, Piece, is_whole, put};
use super::sorted::{ENTRY_BYTES, EntryReader, EntryWriter, Sorter, merge, readings};
use super::{Progress, Settings};
use crate::error::CorpusError;
use crate::manifest::FileManifest;
use crate::prepare::Milestones;
use crate::refine::Dropped;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

const DONE_FILE: &str = "copies.json";
const TABLE_FILE: &str = "copies.table";
/// Keys merged between two words of it, at least.
const KEYS_TOLD: u64 = 16 << 20;
/// Share of the memory that sorting takes: beside it there are only read buffers.
const MEMORY_SHARE: u64 = 4;
/// Kinds of copies, in the order in which they count: an exact copy is not a near one, too.
const KINDS: [Dropped; 2] = [Dropped::Duplicate, Dropped::NearDuplicate];

/// The table of copies: a row is (document, kind, the document it is a copy of).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Copies {
    table: FileManifest,
    /// Rows of each domain; they follow each other in the table.
    by_domain: Vec<u64>,
}

/// Finds copies, or finds the table of an earlier process.
pub(super) fn find(
    settings: &Settings<'_>,
    domains: &[Vec<Piece>],
    progress: &mut Progress<'_>,
) -> Result<Copies, CorpusError> {
    let folder = settings.folder;
    if let Some(copies) = found(folder)? {
        return Ok(copies);
    }
    let tables: Vec<PathBuf> = domains
        .iter()
        .flatten()
        .map(|piece| folder.join(&piece.keys.name))
        .collect();
    let count: u64 = domains
        .iter()
        .flatten()
        .map(|piece| piece.keys.bytes / ENTRY_BYTES)
        .sum();
    let keys_all = count * readings(tables.len());
    let mut milestones = Milestones::new(keys_all, KEYS_TOLD);
    let mut read = || {
        if let Some(keys) = milestones.add(1) {
            progress.merged(keys, keys_all);
        }
    };
    let mut keys = merge(tables, folder, &mut read)?;
    let mut sorter = Sorter::new(folder, "copies", settings.config.memory_bytes_max / MEMORY_SHARE);
    let mut first: Option<[u64; 3]> = None;
    while let Some([table, key, document]) = keys.next()? {
        read();
        match first {
            Some([t, k, witness]) if (t, k) == (table, key) => {
                sorter.push([document, u64::from(table & EXACT == 0), witness])?;
            }
            _ => first = Some([table, key, document]),
        }
    }
    let mut rows = sorter.finish()?;
    let mut writer = EntryWriter::create(&folder.join(TABLE_FILE))?;
    let mut by_domain = vec![0; domains.len()];
    let mut written = None;
    while let Some(row) = rows.next()? {
        // Of several reasons the first counts: exact before near, then the earliest witness.
        if written != Some(row[0]) {
            writer.push(&row)?;
            by_domain[DocumentId(row[0]).domain()] += 1;
            written = Some(row[0]);
        }
    }
    let copies = Copies {
        table: writer.finish()?,
        by_domain,
    };
    put(folder, DONE_FILE, &serde_json::to_vec(&copies).unwrap_or_default())?;
    progress.compared(copies.by_domain.iter().sum());
    Ok(copies)
}

fn found(folder: &Path) -> Result<Option<Copies>, CorpusError> {
    let Ok(bytes) = std::fs::read(folder.join(DONE_FILE)) else {
        return Ok(None);
    };
    let Ok(copies) = serde_json::from_slice::<Copies>(&bytes) else {
        return Ok(None);
    };
    Ok(is_whole(folder, &copies.table)?.then_some(copies))
}

/// The copies of one domain, asked for in the order of its documents.
pub(super) struct CopiesOf {
    rows: EntryReader,
    next: Option<[u64; 3]>,
}

impl Copies {
    pub(super) fn of(&self, folder: &Path, domain: usize) -> Result<CopiesOf, CorpusError> {
        let first = self.by_domain[..domain].iter().sum();
        let mut rows = EntryReader::open_at(&folder.join(&self.table.name), first, self.by_domain[domain])?;
        let next = rows.next()?;
        Ok(CopiesOf { rows, next })
    }
}

impl CopiesOf {
    /// What a document is a copy of, and how.
    pub(super) fn get(&mut self, document: DocumentId) -> Result<Option<(Dropped, DocumentId)>, CorpusError> {
        while let Some([id, kind, witness]) = self.next {
            if id > document.0 {
                break;
            }
            self.next = self.rows.next()?;
            if id == document.0 {
                return Ok(Some((KINDS[usize::from(kind != 0)], DocumentId(witness))));
            }
        }
        Ok(None)
    }
}
