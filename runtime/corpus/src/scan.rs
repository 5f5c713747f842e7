//! Single tools over source files: looking for benchmark items, and training a tokenizer.

use crate::error::CorpusError;
use crate::refine::{Benchmarks, Scratch, find_item};
use crate::source::{self, RawDocument, SourceFile};
use crate::split::unit;
use crate::tokenizer::Tokenizer;
use rayon::prelude::*;
use serde::Serialize;
use std::sync::atomic::AtomicU64;
use tarazed_domain::config::{DecontaminateConfig, DomainConfig};

/// Text looked through at once, in parallel.
const BATCH_BYTES: usize = 16 << 20;

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

/// Looks through the sources of `domains` for the sets of `config`. Every document without text of a set is handed to `clean`,
/// in order.
///
/// # Errors
/// A set or a source that cannot be read, or the sink's own.
pub fn decontaminate(
    domains: &[DomainConfig],
    config: &DecontaminateConfig,
    document_bytes_max: u64,
    clean: &mut dyn FnMut(&str) -> Result<(), CorpusError>,
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
                result: &mut result,
                clean: &mut *clean,
            };
            search.run()?;
        }
    }
    Ok(result)
}

struct Search<'a> {
    benchmarks: &'a Benchmarks,
    domain: &'a DomainConfig,
    file: &'a SourceFile,
    document_bytes_max: u64,
    batch: Vec<RawDocument>,
    batch_bytes: usize,
    result: &'a mut Contamination,
    clean: &'a mut dyn FnMut(&str) -> Result<(), CorpusError>,
}

impl Search<'_> {
    fn run(&mut self) -> Result<(), CorpusError> {
        let read = AtomicU64::new(0);
        let (file, field, bytes_max) = (self.file, self.domain.text_field.as_str(), self.document_bytes_max);
        file.raw_documents(field, bytes_max, &read, &mut |raw| {
            self.batch_bytes += raw.content.bytes().len();
            self.batch.push(raw);
            if self.batch_bytes >= BATCH_BYTES {
                self.flush()?;
            }
            Ok(true)
        })?;
        self.flush()
    }

    fn flush(&mut self) -> Result<(), CorpusError> {
        self.batch_bytes = 0;
        let (field, bytes_max) = (self.domain.text_field.as_str(), self.document_bytes_max);
        let searched: Vec<_> = std::mem::take(&mut self.batch)
            .into_par_iter()
            .map_init(Scratch::default, |scratch, raw| {
                let text = raw.content.text(field, bytes_max).ok()?;
                let found = find_item(self.benchmarks, &text, scratch);
                Some((raw.record, text, found))
            })
            .collect();
        for one in searched {
            let Some((record, text, found)) = one else {
                self.result.unreadable += 1;
                continue;
            };
            self.result.documents += 1;
            match found {
                None => (self.clean)(&text)?,
                Some((item, groups)) => self.result.found.push(Found {
                    domain: self.domain.name.clone(),
                    source: self.file.name.clone(),
                    record,
                    set: self.benchmarks.sets()[item.set as usize].name.clone(),
                    item: item.line,
                    groups,
                    text: crate::pipeline::pieces::excerpt(&text),
                }),
            }
        }
        Ok(())
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
