//! First stage: sources are cut into pieces of documents, each judged by itself, in parallel, and written.
//!
//! A piece is three files: `….docs` (Zstandard frames of [`Refined`] documents), `….keys` (a sorted table of the keys by which
//! copies meet) and `….json`, which names and hashes the other two and appears last, by a rename. So a piece whose `….json` is
//! there is whole, and a process that was killed goes on behind the last one. Where pieces begin and end follows the input and
//! the memory alone, never timing.
//!
//! One thread reads ahead by a piece while the others judge.

use super::document::{DocumentId, RECORDS_MAX, Reason, Refined, SOURCES_MAX};
use super::sorted::{self, Entry};
use super::{Progress, Settings};
use crate::error::CorpusError;
use crate::files::{hash_file, sync_folder, write_file};
use crate::manifest::FileManifest;
use crate::prepare::DomainInput;
use crate::refine::{Broken, Dropped, Refiner, Scratch, Verdict, mix};
use crate::source::{RawContent, RawDocument};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use tarazed_domain::config::DuplicateScope;

/// Text of one Zstandard frame, packed by one thread.
const FRAME_BYTES: usize = 1 << 20;
/// The fastest level that is still half the size; pieces are read twice and deleted.
const PACKING_LEVEL: i32 = 1;
/// Characters of a document left out that are kept for the report.
const EXCERPT_CHARACTERS: usize = 240;
/// The highest bit marks keys of exact copies among those of bands.
pub(super) const EXACT: u64 = 1 << 63;

/// What `….json` of a piece says.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Piece {
    documents: FileManifest,
    pub(super) keys: FileManifest,
    /// Documents in it, those left out included.
    count: u64,
    /// UTF-8 bytes of the texts that go on.
    pub(super) kept_bytes: u64,
    kept: u64,
    /// Bytes as they came, and bytes of source files read so far.
    raw_bytes: u64,
    read_bytes: u64,
    /// Its last document; the next piece begins behind it.
    last: u64,
    /// Whether it is the domain's last.
    is_last: bool,
    /// By source file: documents with text, and documents without the text field; the first of these.
    sources: Vec<SourceTally>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SourceTally {
    source: u32,
    texts: u64,
    without: u64,
    first_without: u64,
}

/// The pieces of all domains, made or found.
pub(super) fn judge_all(
    settings: &Settings<'_>,
    inputs: &[DomainInput<'_>],
    progress: &mut Progress<'_>,
) -> Result<Vec<Vec<Piece>>, CorpusError> {
    let mut domains: Vec<Vec<Piece>> = Vec::with_capacity(inputs.len());
    for (domain, input) in inputs.iter().enumerate() {
        check_counts(input)?;
        let found = find_pieces(settings.folder, domain)?;
        found
            .iter()
            .for_each(|piece| progress.found(piece.raw_bytes, piece.count, piece.kept));
        domains.push(found);
    }
    let refiners = inputs
        .iter()
        .map(|input| Refiner::new(settings.config, input.config, &settings.shared))
        .collect::<Result<Vec<_>, _>>()?;
    let starts: Vec<Option<Start>> = domains.iter().map(|pieces| start_behind(pieces)).collect();
    let read = AtomicU64::new(bytes_behind(inputs, &starts));
    progress.begin(read.load(Ordering::Relaxed));
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(0);
        let reader = Reader {
            inputs,
            settings,
            read: &read,
            sender,
        };
        let reading = scope.spawn(move || reader.run(&starts));
        // A failure here drops the receiver, which ends the reader.
        let judged = receiver.into_iter().try_for_each(|batch: Batch| {
            let domain = batch.domain;
            let piece = judge_piece(
                settings,
                &refiners[domain],
                inputs[domain].config.text_field.as_str(),
                batch,
            )?;
            progress.judged(piece.read_bytes, piece.raw_bytes, piece.count, piece.kept);
            domains[domain].push(piece);
            Ok(())
        });
        let reading = reading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        judged.and(reading)
    })?;
    for (input, pieces) in inputs.iter().zip(&domains) {
        refuse_missing_field(input, pieces)?;
    }
    Ok(domains)
}

fn check_counts(input: &DomainInput<'_>) -> Result<(), CorpusError> {
    if input.files.len() as u64 >= SOURCES_MAX {
        return Err(CorpusError::TooMany {
            path: input.config.path.clone(),
            reason: format!(
                "holds {} files, and {SOURCES_MAX} are too many for one domain",
                input.files.len()
            ),
        });
    }
    Ok(())
}

/// A file in which no document has the text field was named with the wrong field: an error, and no drop.
fn refuse_missing_field(input: &DomainInput<'_>, pieces: &[Piece]) -> Result<(), CorpusError> {
    let mut sums = vec![(0, 0, u64::MAX); input.files.len()];
    for tally in pieces.iter().flat_map(|piece| &piece.sources) {
        if let Some((texts, without, first)) = sums.get_mut(tally.source as usize) {
            *texts += tally.texts;
            *without += tally.without;
            *first = (*first).min(tally.first_without);
        }
    }
    for (file, (texts, without, first)) in input.files.iter().zip(sums) {
        if texts == 0 && without > 0 {
            return Err(CorpusError::MissingField {
                path: file.path.clone(),
                line: first,
                reason: format!(
                    "no line of the file has a string in the field '{}'",
                    input.config.text_field
                ),
            });
        }
    }
    Ok(())
}

// --- reading ahead --------------------------------------------------------------------------------------------------

/// Where a domain goes on: its next piece, behind a document.
#[derive(Clone, Copy)]
struct Start {
    index: usize,
    after: DocumentId,
}

/// Bytes of the source files that are not read again.
fn bytes_behind(inputs: &[DomainInput<'_>], starts: &[Option<Start>]) -> u64 {
    let done = |(input, start): (&DomainInput<'_>, &Option<Start>)| {
        let files = match start {
            None => input.files.len(),
            Some(start) if start.index == 0 => 0,
            Some(start) => start.after.source() as usize,
        };
        input.files[..files].iter().map(|file| file.bytes).sum::<u64>()
    };
    inputs.iter().zip(starts).map(done).sum()
}

/// None where the domain is done.
fn start_behind(pieces: &[Piece]) -> Option<Start> {
    match pieces.last() {
        Some(last) if last.is_last => None,
        last => Some(Start {
            index: pieces.len(),
            after: DocumentId(last.map_or(0, |last| last.last)),
        }),
    }
}

/// The documents of one piece, as they lie in the sources.
struct Batch {
    domain: usize,
    index: usize,
    documents: Vec<(DocumentId, RawContent)>,
    bytes: u64,
    read_bytes: u64,
    is_last: bool,
}

struct Reader<'a> {
    inputs: &'a [DomainInput<'a>],
    settings: &'a Settings<'a>,
    read: &'a AtomicU64,
    sender: SyncSender<Batch>,
}

impl Reader<'_> {
    fn run(self, starts: &[Option<Start>]) -> Result<(), CorpusError> {
        for (domain, start) in starts.iter().enumerate() {
            if let Some(start) = start
                && !self.domain(domain, *start)?
            {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Says false where nobody listens any more.
    fn domain(&self, domain: usize, start: Start) -> Result<bool, CorpusError> {
        let input = &self.inputs[domain];
        let mut batch = self.batch(domain, start.index);
        let mut last = start.after;
        for (source, file) in input.files.iter().enumerate() {
            let source = source as u32;
            let begun = start.index > 0;
            if begun && source < start.after.source() {
                continue;
            }
            file.check_unchanged()?;
            let mut is_heard = true;
            file.raw_documents(
                &input.config.text_field,
                self.settings.config.document_bytes_max,
                self.read,
                &mut |RawDocument { content, record }| {
                    if record > RECORDS_MAX {
                        return Err(CorpusError::TooMany {
                            path: file.path.clone(),
                            reason: format!("holds more than {RECORDS_MAX} records"),
                        });
                    }
                    let id = DocumentId::new(domain, source, record);
                    if begun && id <= start.after {
                        return Ok(true);
                    }
                    if batch.bytes >= self.settings.piece_bytes
                        || batch.documents.len() >= self.settings.piece_documents
                    {
                        let next = self.batch(domain, batch.index + 1);
                        is_heard = self.send(std::mem::replace(&mut batch, next));
                    }
                    batch.bytes += content.bytes().len() as u64;
                    batch.documents.push((id, content));
                    last = id;
                    Ok(is_heard)
                },
            )?;
            if !is_heard {
                return Ok(false);
            }
            file.check_unchanged()?;
        }
        batch.is_last = true;
        Ok(self.send(batch))
    }

    const fn batch(&self, domain: usize, index: usize) -> Batch {
        Batch {
            domain,
            index,
            documents: Vec::new(),
            bytes: 0,
            read_bytes: 0,
            is_last: false,
        }
    }

    fn send(&self, mut batch: Batch) -> bool {
        batch.read_bytes = self.read.load(Ordering::Relaxed);
        self.sender.send(batch).is_ok()
    }
}

// --- judging and writing --------------------------------------------------------------------------------------------

/// A document judged, with the keys by which copies meet.
struct Judged {
    document: Refined,
    keys: Vec<Entry>,
}

fn judge_piece(settings: &Settings<'_>, refiner: &Refiner, field: &str, batch: Batch) -> Result<Piece, CorpusError> {
    let Batch {
        domain,
        index,
        documents,
        bytes,
        read_bytes,
        is_last,
    } = batch;
    let last = documents.last().map_or(DocumentId::new(domain, 0, 0), |(id, _)| *id);
    let judged: Vec<Judged> = documents
        .into_par_iter()
        .map_init(Scratch::default, |scratch, (id, content)| {
            judge(settings, refiner, field, id, content, scratch)
        })
        .collect();
    let stem = stem(domain, index);
    let mut keys: Vec<Entry> = judged.iter().flat_map(|judged| judged.keys.iter().copied()).collect();
    let keys = sorted::write_sorted(&settings.folder.join(format!("{stem}.keys")), &mut keys)?;
    let piece = Piece {
        documents: write_documents(&settings.folder.join(format!("{stem}.docs")), &judged)?,
        keys,
        count: judged.len() as u64,
        kept_bytes: judged
            .iter()
            .filter(|j| j.document.dropped.is_none())
            .map(|j| j.document.text.len() as u64)
            .sum(),
        kept: judged.iter().filter(|judged| judged.document.dropped.is_none()).count() as u64,
        raw_bytes: bytes,
        read_bytes,
        last: last.0,
        is_last,
        sources: tally(&judged),
    };
    // Numbers and strings: this has a JSON form.
    let text = serde_json::to_vec(&piece).unwrap_or_default();
    put(settings.folder, &format!("{stem}.json"), &text)?;
    Ok(piece)
}

fn judge(
    settings: &Settings<'_>,
    refiner: &Refiner,
    field: &str,
    id: DocumentId,
    content: RawContent,
    scratch: &mut Scratch,
) -> Judged {
    let raw_hash = blake3::hash(content.bytes());
    let (raw_bytes, raw_excerpt) = (
        content.bytes().len() as u64,
        String::from_utf8_lossy(excerpt_bytes(content.bytes())),
    );
    let raw_excerpt = excerpt(&raw_excerpt);
    let text = match content.text(field, settings.config.document_bytes_max) {
        Ok(text) => text,
        Err((rule, detail)) => {
            let reason = reason(Broken { rule, detail }, None);
            let document = Refined {
                id,
                text: raw_excerpt,
                original: *raw_hash.as_bytes(),
                original_bytes: raw_bytes,
                is_changed: false,
                dropped: Some(reason),
            };
            return Judged {
                document,
                keys: Vec::new(),
            };
        }
    };
    let mut document = Refined {
        id,
        text: String::new(),
        original: *blake3::hash(text.as_bytes()).as_bytes(),
        original_bytes: text.len() as u64,
        is_changed: false,
        dropped: None,
    };
    let mut keys = Vec::new();
    match refiner.judge(&text, scratch) {
        Verdict::Kept(kept) => {
            keys = keys_of(settings, id, kept.exact, &kept.bands);
            document.is_changed = kept.is_changed;
            document.text = kept.text;
        }
        Verdict::Dropped(broken, item) => {
            document.text = excerpt(&text);
            document.dropped = Some(reason(broken, item));
        }
    }
    Judged { document, keys }
}

fn reason(broken: Broken, item: Option<crate::refine::BenchmarkItem>) -> Reason {
    Reason {
        rule: broken.rule,
        detail: broken.detail,
        item,
        copy_of: None,
    }
}

/// The keys of a document; where copies are looked for within a domain, it is part of them.
fn keys_of(settings: &Settings<'_>, id: DocumentId, exact: u128, bands: &[u64]) -> Vec<Entry> {
    let copies = &settings.config.duplicates;
    let salt = |scope| match scope {
        DuplicateScope::Within => mix(id.domain() as u64 + 1),
        DuplicateScope::Across | DuplicateScope::Off => 0,
    };
    let mut keys = Vec::with_capacity(1 + bands.len());
    if copies.exact != DuplicateScope::Off {
        keys.push([(exact >> 64) as u64 | EXACT, exact as u64 ^ salt(copies.exact), id.0]);
    }
    let near = salt(copies.near);
    keys.extend(
        bands
            .iter()
            .enumerate()
            .map(|(band, key)| [band as u64, key ^ near, id.0]),
    );
    keys
}

fn write_documents(path: &Path, judged: &[Judged]) -> Result<FileManifest, CorpusError> {
    // Frames end where their text is long enough, whatever the number of threads.
    let mut frames: Vec<&[Judged]> = Vec::new();
    let (mut from, mut bytes) = (0, 0);
    for (at, one) in judged.iter().enumerate() {
        bytes += one.document.text.len();
        if bytes >= FRAME_BYTES {
            frames.push(&judged[from..=at]);
            (from, bytes) = (at + 1, 0);
        }
    }
    frames.push(&judged[from..]);
    let pack = |frame: &&[Judged]| {
        let mut bytes = Vec::with_capacity(FRAME_BYTES + FRAME_BYTES / 4);
        frame.iter().for_each(|judged| judged.document.encode(&mut bytes));
        zstd::bulk::compress(&bytes, PACKING_LEVEL)
    };
    let packed = frames
        .par_iter()
        .map(pack)
        .collect::<Result<Vec<_>, _>>()
        .map_err(CorpusError::write(path))?;
    let mut file = sorted::create(path)?;
    for frame in packed {
        file.write(&frame)?;
    }
    file.finish()
}

fn tally(judged: &[Judged]) -> Vec<SourceTally> {
    let mut tallies: Vec<SourceTally> = Vec::new();
    for Judged { document, .. } in judged {
        let source = document.id.source();
        if tallies.last().is_none_or(|last| last.source != source) {
            tallies.push(SourceTally {
                source,
                texts: 0,
                without: 0,
                first_without: u64::MAX,
            });
        }
        let Some(tally) = tallies.last_mut() else { continue };
        match document.dropped.as_ref().map(|reason| reason.rule) {
            Some(Dropped::NoText) => {
                tally.without += 1;
                tally.first_without = tally.first_without.min(document.id.record());
            }
            Some(Dropped::BadRecord | Dropped::InvalidUtf8 | Dropped::TooLarge) => {}
            _ => tally.texts += 1,
        }
    }
    tallies
}

/// The beginning of a text, for people.
pub(crate) fn excerpt(text: &str) -> String {
    text.chars().take(EXCERPT_CHARACTERS).collect()
}

fn excerpt_bytes(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len().min(4 * EXCERPT_CHARACTERS)]
}

// --- pieces on disk -------------------------------------------------------------------------------------------------

fn stem(domain: usize, index: usize) -> String {
    format!("piece-{domain:04}-{index:08}")
}

/// Writes a small file so that it is there whole or not at all.
pub(crate) fn put(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), CorpusError> {
    let partial = folder.join(format!("{name}.partial"));
    let _ = std::fs::remove_file(&partial);
    write_file(&partial, bytes)?;
    let path = folder.join(name);
    std::fs::rename(&partial, &path).map_err(CorpusError::write(&path))?;
    sync_folder(folder)
}

/// The whole pieces of a domain, up to the first that is missing or is not what it should be.
fn find_pieces(folder: &Path, domain: usize) -> Result<Vec<Piece>, CorpusError> {
    let mut found = Vec::new();
    loop {
        let path = folder.join(format!("{}.json", stem(domain, found.len())));
        let Ok(bytes) = std::fs::read(&path) else {
            return Ok(found);
        };
        let Ok(piece) = serde_json::from_slice::<Piece>(&bytes) else {
            return Ok(found);
        };
        if !(is_whole(folder, &piece.documents)? && is_whole(folder, &piece.keys)?) {
            return Ok(found);
        }
        let is_last = piece.is_last;
        found.push(piece);
        if is_last {
            return Ok(found);
        }
    }
}

/// Whether a file is there as it was written.
pub(crate) fn is_whole(folder: &Path, file: &FileManifest) -> Result<bool, CorpusError> {
    let path = folder.join(&file.name);
    if std::fs::metadata(&path).map(|m| m.len()).ok() != Some(file.bytes) {
        return Ok(false);
    }
    Ok(hash_file(&path)?.1.to_hex().as_str() == file.blake3)
}

/// Hands the documents of a piece to `sink`, in order.
pub(super) fn read(
    folder: &Path,
    piece: &Piece,
    sink: &mut dyn FnMut(Refined) -> Result<(), CorpusError>,
) -> Result<(), CorpusError> {
    let path: PathBuf = folder.join(&piece.documents.name);
    let file = std::fs::File::open(&path).map_err(CorpusError::unreadable(&path))?;
    let unpacked = zstd::stream::read::Decoder::new(file).map_err(CorpusError::unreadable(&path))?;
    let mut reader = BufReader::with_capacity(FRAME_BYTES, unpacked);
    for _ in 0..piece.count {
        sink(Refined::decode(&path, &mut reader)?)?;
    }
    Ok(())
}
