//! Single tools over source files: looking for benchmark items, and training a tokenizer.

use crate::documents::{DroppedRecord, NamedItem, NamedPlace};
use crate::error::CorpusError;
use crate::refine::{Benchmarks, Dropped, Scratch, find_item};
use crate::source::{self, RawDocument, SourceFile};
use crate::split::unit;
use crate::tokenizer::Tokenizer;
use rayon::prelude::*;
use serde::Serialize;
use std::sync::atomic::AtomicU64;
use tarazed_domain::config::{DecontaminateConfig, DomainConfig};

/// Text looked through at once, in parallel.
const BATCH_BYTES: usize = 16 << 20;
/// What a record counts for beside its text, about its size in memory: a batch of empty ones ends, too.
const RECORD_BYTES: usize = 64;

/// A document that holds text of a benchmark.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Found {
    /// Its domain.
    pub domain: String,
    /// Its source file, relative to the domain's path.
    pub source: String,
    /// Its line or row in that file, from 1.
    pub record: u64,
    /// The benchmark set.
    pub set: String,
    /// The item's line in the set, from 1.
    pub item: u32,
    /// Groups of the item that it holds.
    pub groups: usize,
    /// Beginning of its text.
    pub text: String,
}

/// What a search found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Contamination {
    /// Documents with text.
    pub documents: u64,
    /// Records without text that could be read.
    pub unreadable: u64,
    /// Items looked for, by set: name, items, items that are too short to be looked for.
    pub sets: Vec<(String, u64, u64)>,
    /// Documents that hold text of a set, in order.
    pub found: Vec<Found>,
}

/// What a search hands on of each record, in order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Searched<'a> {
    /// The text of a document without text of a set.
    Clean(&'a str),
    /// A document with text of a set, or a record that cannot be read.
    Dropped(DroppedRecord),
}

/// Looks through the sources of `domains` for the sets of `config`. Every record is handed to `sink`, in order.
///
/// # Errors
/// A set or a source that cannot be read, [`CorpusError::MissingField`] for a file in which no record has the text field,
/// [`CorpusError::SourceChanged`], or the sink's own.
pub fn decontaminate(
    domains: &[DomainConfig],
    config: &DecontaminateConfig,
    document_bytes_max: u64,
    sink: &mut dyn FnMut(Searched<'_>) -> Result<(), CorpusError>,
) -> Result<Contamination, CorpusError> {
    let benchmarks = Benchmarks::load(config)?;
    let sets = benchmarks
        .sets()
        .iter()
        .map(|set| (set.name.clone(), set.items, set.too_short));
    let mut result = Contamination {
        documents: 0,
        unreadable: 0,
        sets: sets.collect(),
        found: Vec::new(),
    };
    for domain in domains {
        for file in source::list(domain)? {
            let mut search = Search {
                benchmarks: &benchmarks,
                domain,
                file: &file,
                document_bytes_max,
                batch: Vec::new(),
                batch_bytes: 0,
                texts: 0,
                first_without: None,
                result: &mut result,
                sink: &mut *sink,
            };
            search.run()?;
        }
    }
    Ok(result)
}

const fn batch_bytes(raw: &RawDocument) -> usize {
    raw.content.bytes().len() + RECORD_BYTES
}

struct Search<'a> {
    benchmarks: &'a Benchmarks,
    domain: &'a DomainConfig,
    file: &'a SourceFile,
    document_bytes_max: u64,
    batch: Vec<RawDocument>,
    batch_bytes: usize,
    /// Records of the file with text, and the first that lacks the field.
    texts: u64,
    first_without: Option<u64>,
    result: &'a mut Contamination,
    sink: &'a mut dyn FnMut(Searched<'_>) -> Result<(), CorpusError>,
}

impl Search<'_> {
    fn run(&mut self) -> Result<(), CorpusError> {
        let read = AtomicU64::new(0);
        let (file, field, bytes_max) = (self.file, self.domain.text_field.as_str(), self.document_bytes_max);
        file.check_unchanged()?;
        file.raw_documents(field, bytes_max, &read, &mut |raw| {
            self.batch_bytes += batch_bytes(&raw);
            self.batch.push(raw);
            if self.batch_bytes >= BATCH_BYTES {
                self.flush()?;
            }
            Ok(true)
        })?;
        self.flush()?;
        file.check_unchanged()?;
        match self.first_without {
            // The file was named with the wrong field: that nothing was found in it says nothing.
            Some(line) if self.texts == 0 => Err(CorpusError::MissingField {
                path: file.path.clone(),
                line,
                reason: format!("no line of the file has a string in the field '{field}'"),
            }),
            _ => Ok(()),
        }
    }

    fn flush(&mut self) -> Result<(), CorpusError> {
        self.batch_bytes = 0;
        let (field, bytes_max) = (self.domain.text_field.as_str(), self.document_bytes_max);
        let searched: Vec<_> = std::mem::take(&mut self.batch)
            .into_par_iter()
            .map_init(Scratch::default, |scratch, raw| {
                let (hash, bytes) = (blake3::hash(raw.content.bytes()), raw.content.bytes().len() as u64);
                let unread = |(rule, detail)| (rule, detail, hash, bytes);
                let text = raw.content.text(field, bytes_max).map_err(unread);
                let found = text
                    .as_ref()
                    .ok()
                    .and_then(|text| find_item(self.benchmarks, text, scratch));
                (raw.record, text, found)
            })
            .collect();
        for (record, text, found) in searched {
            let text = match text {
                Ok(text) => text,
                Err((rule, detail, hash, bytes)) => {
                    self.result.unreadable += 1;
                    if rule == Dropped::NoText {
                        self.first_without.get_or_insert(record);
                    }
                    let dropped = self.dropped(record, (hash, bytes), rule, detail);
                    (self.sink)(Searched::Dropped(dropped))?;
                    continue;
                }
            };
            self.texts += 1;
            self.result.documents += 1;
            let Some((item, groups)) = found else {
                (self.sink)(Searched::Clean(&text))?;
                continue;
            };
            let set = self.benchmarks.sets()[item.set as usize].name.clone();
            let hashed = (blake3::hash(text.as_bytes()), text.len() as u64);
            let detail = format!("{set}, line {}: {groups} groups", item.line);
            let mut dropped = self.dropped(record, hashed, Dropped::Contaminated, detail);
            dropped.item = Some(NamedItem {
                set: set.clone(),
                line: item.line,
            });
            (self.sink)(Searched::Dropped(dropped))?;
            self.result.found.push(Found {
                domain: self.domain.name.clone(),
                source: self.file.name.clone(),
                record,
                set,
                item: item.line,
                groups,
                text: crate::pipeline::pieces::excerpt(&text),
            });
        }
        Ok(())
    }

    fn dropped(&self, record: u64, (hash, bytes): (blake3::Hash, u64), rule: Dropped, detail: String) -> DroppedRecord {
        DroppedRecord {
            place: NamedPlace {
                domain: self.domain.name.clone(),
                source: self.file.name.clone(),
                record,
            },
            blake3: hash.to_hex().to_string(),
            text_bytes: bytes,
            dropped: rule,
            detail,
            copy_of: None,
            item: None,
        }
    }
}

/// Trains byte-level BPE on the text of `domains`: all of it where it fits into `train_bytes_max`, else an even sample. Returns
/// the tokenizer, its `tokenizer.json`, and the bytes it was trained on.
///
/// # Errors
/// A source that cannot be read, or [`CorpusError::Tokenizer`].
pub fn train_tokenizer(
    domains: &[DomainConfig],
    vocabulary: usize,
    train_bytes_max: u64,
) -> Result<(Tokenizer, String, u64), CorpusError> {
    let mut files = Vec::new();
    for domain in domains {
        files.extend(source::list(domain)?.into_iter().map(|file| (domain, file)));
    }
    let all: u64 = files.iter().map(|(_, file)| file.text_bytes_about()).sum();
    let fraction = train_bytes_max as f64 / all.max(1) as f64;
    let (mut texts, mut taken) = (Vec::new(), 0_u64);
    for (domain, file) in &files {
        file.documents(&domain.text_field, &mut |document| {
            let text = document.text;
            let room = taken + text.len() as u64 <= train_bytes_max;
            let hash = blake3::hash(text.as_bytes());
            if room
                && !text.is_empty()
                && (fraction >= 1.0 || unit(&hash, "tarazed corpus tokenizer sample v1") < fraction)
            {
                taken += text.len() as u64;
                texts.push(text);
            }
            Ok(())
        })?;
    }
    let (tokenizer, json) = Tokenizer::train_bpe(&texts, vocabulary)?;
    Ok((tokenizer, json, taken))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::RawContent;
    use std::path::Path;
    use tarazed_domain::config::{BenchmarkConfig, Language, SourceFormat};

    const ITEM: &str = "A merchant buys thirty apples for sixty pence and sells each of them for three pence.";

    fn search(
        folder: &Path,
        field: &str,
        sink: &mut dyn FnMut(Searched<'_>) -> Result<(), CorpusError>,
    ) -> Result<Contamination, CorpusError> {
        let set = folder.join("set.txt");
        std::fs::write(&set, ITEM).unwrap();
        let config = DecontaminateConfig {
            sets: vec![BenchmarkConfig {
                name: "test".to_owned(),
                path: set,
                fields: Vec::new(),
            }],
            ..DecontaminateConfig::default()
        };
        let domain = DomainConfig {
            name: "web".to_owned(),
            path: folder.join("in"),
            format: SourceFormat::Auto,
            language: Language::En,
            weight: 1.0,
            text_field: field.to_owned(),
        };
        decontaminate(&[domain], &config, 1 << 20, sink)
    }

    /// One file of two has another field: that is no clean file.
    #[test]
    fn a_file_without_the_field_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("in")).unwrap();
        std::fs::write(folder.path().join("in/a.jsonl"), "{\"text\":\"clean\"}\n{\"no\":1}\n").unwrap();
        let found = search(folder.path(), "text", &mut |_| Ok(())).unwrap();
        assert_eq!((found.documents, found.unreadable), (1, 1));
        let line = serde_json::json!({ "content": ITEM });
        std::fs::write(folder.path().join("in/b.jsonl"), format!("not JSON\n{line}\n")).unwrap();
        let error = search(folder.path(), "text", &mut |_| Ok(())).unwrap_err();
        assert!(matches!(error, CorpusError::MissingField { line: 2, .. }), "{error}");
        assert!(
            error.to_string().contains("b.jsonl:2") && error.to_string().contains("--text-field"),
            "{error}"
        );
        std::fs::remove_file(folder.path().join("in/a.jsonl")).unwrap();
        let mut dropped = Vec::new();
        let found = search(folder.path(), "content", &mut |searched| {
            match searched {
                Searched::Clean(text) => panic!("{text}"),
                Searched::Dropped(record) => dropped.push(record),
            }
            Ok(())
        });
        let found = found.unwrap();
        assert_eq!((found.documents, found.found.len(), found.unreadable), (1, 1, 1));
        let [unread, contaminated] = &dropped[..] else {
            panic!("two records: {dropped:?}")
        };
        assert_eq!((unread.dropped, unread.place.record), (Dropped::BadRecord, 1));
        assert_eq!(unread.blake3, blake3::hash(b"not JSON\n").to_hex().as_str());
        assert_eq!(
            (contaminated.dropped, contaminated.place.source.as_str()),
            (Dropped::Contaminated, "b.jsonl")
        );
        assert_eq!(contaminated.blake3, blake3::hash(ITEM.as_bytes()).to_hex().as_str());
        let item = contaminated.item.as_ref().unwrap();
        assert_eq!((item.set.as_str(), item.line), ("test", 1));
    }

    #[test]
    fn a_file_that_changes_meanwhile_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in");
        std::fs::write(&path, "one").unwrap();
        let error = search(folder.path(), "text", &mut |_| {
            std::fs::write(&path, "another").unwrap();
            Ok(())
        });
        assert!(matches!(error, Err(CorpusError::SourceChanged { .. })), "{error:?}");
    }

    /// Nulls of a parquet file have no bytes; a batch of them ends all the same.
    #[test]
    fn a_batch_of_nothing_ends() {
        let null = RawDocument {
            content: RawContent::Text(Vec::new()),
            record: 1,
        };
        assert!(batch_bytes(&null) >= size_of::<RawDocument>());
        assert!(BATCH_BYTES / batch_bytes(&null) < 1 << 20);
    }
}
