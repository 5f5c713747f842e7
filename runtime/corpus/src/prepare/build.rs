//! The work: tokenizer, domains, figures, manifest, all into one new folder.

use super::{DomainInput, PrepareEvent, PrepareRequest, resume, trained_vocabulary};
use crate::documents::{DocumentPlace, DocumentRecord, DocumentWriter, KeptTokens, RefinedRecord};
use crate::entropy::Unigram;
use crate::error::CorpusError;
use crate::files::write_file;
use crate::manifest::{
    DataManifest, DomainManifest, FileManifest, LanguageManifest, MANIFEST_FILE, RefinementManifest, SCHEMA,
    SplitManifest, TokenizerManifest,
};
use crate::pipeline::{DocumentId, DomainReport, Pipeline, Refined, Report};
use crate::refine::{self, Dropped};
use crate::shard::{SHARD_TOKENS_MAX, ShardWriter};
use crate::source::SourceFile;
use crate::split::{Split, unit};
use crate::tokenizer::{TOKENIZER_FILE, Tokenizer};
use crate::tokens;
use rayon::prelude::*;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Text encoded at once, in parallel, by document.
const BATCH_BYTES: usize = 8 * 1024 * 1024;
/// What a document takes beside its text, so that many empty ones are no batch without end.
const READ_BYTES: usize = 128;

/// The documents of all domains: as they lie in the sources, or as the pipeline hands them on.
#[derive(Clone, Copy)]
pub(super) struct Text<'a> {
    pub(super) inputs: &'a [DomainInput<'a>],
    /// Their versions.
    pub(super) versions: &'a [String],
    /// The pipeline, and its settings.
    pub(super) refined: Option<(&'a Pipeline, &'a str)>,
}

pub(super) fn build(
    request: &PrepareRequest<'_>,
    text: &Text<'_>,
    recipe: &str,
    folder: &Path,
    progress: &mut dyn FnMut(PrepareEvent),
) -> Result<DataManifest, CorpusError> {
    let (tokenizer, file) = tokenizer(request, text, folder, progress)?;
    progress(PrepareEvent::TokenizerReady {
        vocabulary: tokenizer.vocabulary(),
    });
    let mut domains = Vec::with_capacity(text.inputs.len());
    for index in 0..text.inputs.len() {
        let built = domain(request, text, index, &tokenizer, folder, progress)?;
        progress(finished(&built.manifest));
        domains.push(built);
    }
    let languages = figures(&mut domains, tokenizer.vocabulary());
    let (domains, reports) = domains
        .into_iter()
        .map(|domain| (domain.manifest, domain.report))
        .unzip();
    let mut manifest = DataManifest {
        schema: SCHEMA,
        version: String::new(),
        recipe: recipe.to_owned(),
        tokenizer: TokenizerManifest {
            file,
            vocabulary: tokenizer.vocabulary(),
            end_of_document: tokenizer.end_of_document(),
        },
        held_out_fraction: request.held_out_fraction,
        refinement: refinement(text, reports, folder)?,
        domains,
        languages,
    };
    manifest.version = manifest.compute_version();
    // Strings, numbers and enum-keyed maps always have a JSON form.
    let text = serde_json::to_string_pretty(&manifest).unwrap_or_default();
    write_file(&folder.join(MANIFEST_FILE), text.as_bytes())?;
    Ok(manifest)
}

/// One domain: made, or found as an earlier process left it.
fn domain(
    request: &PrepareRequest<'_>,
    text: &Text<'_>,
    index: usize,
    tokenizer: &Tokenizer,
    folder: &Path,
    progress: &mut dyn FnMut(PrepareEvent),
) -> Result<DomainBuilt, CorpusError> {
    if let Some(work) = text.work() {
        if let Some(built) = resume::domain(work, folder, text, index, tokenizer.vocabulary())? {
            return Ok(built);
        }
        resume::remove(folder, &[&format!("{index:03}-")])?;
    }
    let mut writer = DomainWriter::create(folder, text, index, tokenizer, request.held_out_fraction)?;
    writer.read(progress)?;
    let built = writer.finish()?;
    if let Some(work) = text.work() {
        resume::domain_done(work, index, &built.manifest)?;
    }
    Ok(built)
}

/// Writes the reports of what was left out.
fn refinement(
    text: &Text<'_>,
    reports: Vec<DomainReport>,
    folder: &Path,
) -> Result<Option<RefinementManifest>, CorpusError> {
    let Some((pipeline, settings)) = text.refined else {
        return Ok(None);
    };
    resume::remove(folder, &["report.", MANIFEST_FILE])?;
    let (report, report_text) = Report::new(pipeline.shared(), reports).write(folder)?;
    Ok(Some(RefinementManifest {
        program: refine::program(),
        settings: settings.to_owned(),
        report,
        report_text,
    }))
}

pub(crate) fn check_vocabulary(path: &Path, vocabulary: usize, model_vocabulary: usize) -> Result<(), CorpusError> {
    if vocabulary > model_vocabulary {
        return Err(CorpusError::VocabularyTooLarge {
            path: path.to_owned(),
            vocabulary,
            model_vocabulary,
        });
    }
    Ok(())
}

/// The given tokenizer, or one trained on the domains' training text; its file is in `folder` afterwards.
fn tokenizer(
    request: &PrepareRequest<'_>,
    text: &Text<'_>,
    folder: &Path,
    progress: &mut dyn FnMut(PrepareEvent),
) -> Result<(Tokenizer, FileManifest), CorpusError> {
    let target = folder.join(TOKENIZER_FILE);
    if let Some(work) = text.work() {
        if let Some(found) = resume::tokenizer(work, folder)? {
            return Ok(found);
        }
        resume::remove(folder, &[TOKENIZER_FILE])?;
    }
    let made = make_tokenizer(request, text, &target, progress)?;
    if let Some(work) = text.work() {
        resume::tokenizer_done(work, &made.0, &made.1)?;
    }
    Ok(made)
}

fn make_tokenizer(
    request: &PrepareRequest<'_>,
    text: &Text<'_>,
    target: &Path,
    progress: &mut dyn FnMut(PrepareEvent),
) -> Result<(Tokenizer, FileManifest), CorpusError> {
    if let Some(path) = &request.tokenizer.path {
        let tokenizer = Tokenizer::load(path)?;
        check_vocabulary(path, tokenizer.vocabulary(), request.model_vocabulary)?;
        let bytes = std::fs::read(path).map_err(CorpusError::unreadable(path))?;
        return Ok((tokenizer, write_file(target, &bytes)?));
    }
    let vocabulary = trained_vocabulary(request);
    check_vocabulary(
        Path::new("data.tokenizer.vocabulary"),
        vocabulary,
        request.model_vocabulary,
    )?;
    let texts = sample(request, text)?;
    progress(PrepareEvent::TokenizerTraining {
        documents: texts.len() as u64,
        bytes: texts.iter().map(|t| t.len() as u64).sum(),
        vocabulary,
    });
    let (tokenizer, json) = Tokenizer::train_bpe(&texts, vocabulary)?;
    Ok((tokenizer, write_file(target, json.as_bytes())?))
}

/// Training text for the tokenizer: all of it where it fits into `train_bytes_max`, else a sample in which no domain takes
/// more than an equal share while another is short of its own. Held-out documents are left out.
fn sample(request: &PrepareRequest<'_>, text: &Text<'_>) -> Result<Vec<String>, CorpusError> {
    let sizes: Vec<u64> = (0..text.inputs.len()).map(|domain| text.bytes(domain)).collect();
    let shares = shares(&sizes, request.tokenizer.train_bytes_max);
    let mut texts = Vec::new();
    for (domain, (size, share)) in sizes.into_iter().zip(shares).enumerate() {
        let fraction = share as f64 / size.max(1) as f64;
        let mut taken = 0;
        text.each_document(domain, None, &mut |read| {
            let wanted = read.dropped.is_none()
                && Split::of(&read.hash, request.held_out_fraction) == Split::Train
                && (share >= size
                    || (taken < share && unit(&read.hash, "tarazed corpus tokenizer sample v1") < fraction));
            if wanted {
                taken += read.content.text().len() as u64;
                texts.push(read.content.into_text());
            }
            Ok(())
        })?;
    }
    Ok(texts)
}

/// Cuts `total` up over sources of these sizes: equal shares, and what a small source leaves goes to the others.
fn shares(sizes: &[u64], total: u64) -> Vec<u64> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&i| sizes[i]);
    let mut shares = vec![0; sizes.len()];
    let mut left = total;
    for (done, &i) in order.iter().enumerate() {
        shares[i] = sizes[i].min(left / (sizes.len() - done) as u64);
        left -= shares[i];
    }
    shares
}

/// A document as read, with what decides its fate.
struct Read {
    source: u32,
    record: u64,
    /// Of its text; of a document that refining left out, of the text as it came.
    hash: blake3::Hash,
    dropped: Option<Dropped>,
    content: Content,
}

/// What a document is read as.
enum Content {
    /// Text as it lies in the source.
    Text(String),
    /// Text as the pipeline hands it on.
    Refined(Refined),
    /// Tokens, with the text that they stand for.
    Tokens(Vec<u32>, String),
}

impl Content {
    fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Tokens(_, text) => text,
            Self::Refined(document) => &document.text,
        }
    }

    fn into_text(self) -> String {
        match self {
            Self::Text(text) | Self::Tokens(_, text) => text,
            Self::Refined(document) => document.text,
        }
    }
}

impl Text<'_> {
    /// Where the pipeline's work lies, if there is any.
    fn work(&self) -> Option<&Path> {
        self.refined.map(|(pipeline, _)| pipeline.folder())
    }

    /// Counts the documents of a refined domain into its report.
    pub(super) fn report(&self, domain: usize, report: &mut DomainReport) -> Result<(), CorpusError> {
        self.each_document(domain, None, &mut |read| {
            if let Content::Refined(document) = &read.content {
                report.add(document, &|id| place_text(self.inputs, id));
            }
            Ok(())
        })
    }

    /// Bytes of a domain's text, or about so many.
    fn bytes(&self, domain: usize) -> u64 {
        match self.refined {
            Some((pipeline, _)) => pipeline.kept_bytes(domain),
            None => self.inputs[domain].files.iter().map(SourceFile::text_bytes_about).sum(),
        }
    }

    /// Every document of a domain in order, those to be left out marked. Domains of tokens need the tokenizer that they were
    /// made with.
    fn each_document(
        &self,
        domain: usize,
        tokenizer: Option<&Tokenizer>,
        sink: &mut dyn FnMut(Read) -> Result<(), CorpusError>,
    ) -> Result<(), CorpusError> {
        match self.refined {
            Some((pipeline, _)) => pipeline.documents(domain, &mut |document| {
                let dropped = document.dropped.as_ref().map(|reason| reason.rule);
                let hash = match dropped {
                    None => blake3::hash(document.text.as_bytes()),
                    Some(_) => blake3::Hash::from_bytes(document.original),
                };
                sink(Read {
                    source: document.id.source(),
                    record: document.id.record(),
                    hash,
                    dropped,
                    content: Content::Refined(document),
                })
            }),
            None => each_source_document(&self.inputs[domain], tokenizer, sink),
        }
    }
}

/// Every document of a domain's sources in order, exact duplicates and empty ones marked.
fn each_source_document(
    input: &DomainInput<'_>,
    tokenizer: Option<&Tokenizer>,
    sink: &mut dyn FnMut(Read) -> Result<(), CorpusError>,
) -> Result<(), CorpusError> {
    // Half a hash: at a billion documents the chance of any false match is 1e-21. Only ever asked, never iterated (DET-1).
    let mut seen: HashSet<[u8; 16]> = HashSet::new();
    for (source, file) in input.files.iter().enumerate() {
        file.check_unchanged()?;
        let mut take = |record: u64, content: Content| {
            let text = content.text();
            let hash = blake3::hash(text.as_bytes());
            let mut half = [0; 16];
            half.copy_from_slice(&hash.as_bytes()[..16]);
            let dropped = if text.trim().is_empty() {
                Some(Dropped::Empty)
            } else {
                (!seen.insert(half)).then_some(Dropped::Duplicate)
            };
            sink(Read {
                source: source as u32,
                record,
                hash,
                dropped,
                content,
            })
        };
        match tokenizer.filter(|_| file.format.is_tokens()) {
            Some(tokenizer) => tokens::documents(file, tokenizer, &mut |record, ids| {
                let text = tokenizer.decode(&ids)?;
                take(record, Content::Tokens(ids, text))
            })?,
            None => file.documents(&input.config.text_field, &mut |document| {
                take(document.record, Content::Text(document.text))
            })?,
        }
        file.check_unchanged()?;
    }
    Ok(())
}

/// Beginning of the names of a domain's files. Any name is allowed in a config; a file name is not so free.
pub(crate) fn domain_stem(index: usize, name: &str) -> String {
    let plain: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' })
        .take(64)
        .collect();
    format!("{index:03}-{plain}")
}

/// One domain while it is written.
struct DomainWriter<'a> {
    folder: &'a Path,
    text: &'a Text<'a>,
    domain: usize,
    stem: String,
    tokenizer: &'a Tokenizer,
    held_out_fraction: f64,
    streams: [Stream; 2],
    documents: DocumentWriter,
    dropped: BTreeMap<Dropped, u64>,
    report: DomainReport,
    batch: Vec<Read>,
    batch_bytes: usize,
}

/// One split while it is written.
struct Stream {
    shard: Option<ShardWriter>,
    figures: SplitManifest,
    counts: Unigram,
}

pub(super) struct DomainBuilt {
    pub(super) manifest: DomainManifest,
    pub(super) report: DomainReport,
    pub(super) train: Unigram,
    pub(super) held_out: Unigram,
}

impl<'a> DomainWriter<'a> {
    fn create(
        folder: &'a Path,
        text: &'a Text<'a>,
        index: usize,
        tokenizer: &'a Tokenizer,
        held_out_fraction: f64,
    ) -> Result<Self, CorpusError> {
        let name = &text.inputs[index].config.name;
        let stem = domain_stem(index, name);
        let stream = || Stream {
            shard: None,
            figures: SplitManifest::default(),
            counts: Unigram::new(tokenizer.vocabulary()),
        };
        Ok(Self {
            folder,
            text,
            domain: index,
            report: DomainReport::new(name),
            documents: DocumentWriter::create(&folder.join(format!("{stem}.documents.jsonl")))?,
            stem,
            tokenizer,
            held_out_fraction,
            streams: [stream(), stream()],
            dropped: BTreeMap::new(),
            batch: Vec::new(),
            batch_bytes: 0,
        })
    }

    fn read(&mut self, progress: &mut dyn FnMut(PrepareEvent)) -> Result<(), CorpusError> {
        let (text, domain) = (self.text, self.domain);
        let total_bytes = text.bytes(domain).max(1);
        // For people: nothing that is written depends on the time.
        let begun = Instant::now();
        text.each_document(domain, Some(self.tokenizer), &mut |read| {
            self.batch_bytes += read.content.text().len() + READ_BYTES;
            self.batch.push(read);
            if self.batch_bytes >= BATCH_BYTES {
                self.encode_batch()?;
                let text_bytes: u64 = self.streams.iter().map(|s| s.figures.text_bytes).sum();
                progress(PrepareEvent::DomainProgress {
                    name: text.inputs[domain].config.name.clone(),
                    documents: self.streams.iter().map(|s| s.figures.documents).sum(),
                    text_bytes,
                    percent: (100.0 * text_bytes as f64 / total_bytes as f64).min(100.0),
                    mb_per_s: text_bytes as f64 / 1e6 / begun.elapsed().as_secs_f64().max(1e-6),
                });
            }
            Ok(())
        })?;
        self.encode_batch()
    }

    /// Encodes in parallel, writes in order (DET-1).
    fn encode_batch(&mut self) -> Result<(), CorpusError> {
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        let encoded: Vec<Result<Vec<u32>, CorpusError>> = batch
            .par_iter()
            .map(|read| match &read.content {
                _ if read.dropped.is_some() => Ok(Vec::new()),
                Content::Tokens(ids, _) => Ok(ids.clone()),
                content => self.tokenizer.encode(content.text()),
            })
            .collect();
        for (read, tokens) in batch.iter().zip(encoded) {
            self.write(read, tokens?)?;
        }
        Ok(())
    }

    fn write(&mut self, read: &Read, mut tokens: Vec<u32>) -> Result<(), CorpusError> {
        let inputs = self.text.inputs;
        let mut record = DocumentRecord {
            source: read.source,
            record: read.record,
            blake3: read.hash.to_hex().to_string(),
            text_bytes: read.content.text().len() as u64,
            kept: None,
            dropped: read.dropped,
            refined: None,
        };
        if let Content::Refined(document) = &read.content {
            self.report.add(document, &|id| place_text(inputs, id));
            record.refined = Some(refined_record(inputs, document));
            if document.dropped.is_some() {
                record.text_bytes = document.original_bytes;
            }
        }
        if let Some(reason) = read.dropped {
            *self.dropped.entry(reason).or_default() += 1;
            return self.documents.push(&record);
        }
        tokens.push(self.tokenizer.end_of_document());
        let split = Split::of(&read.hash, self.held_out_fraction);
        let stream = &mut self.streams[split.index()];
        record.kept = Some(KeptTokens {
            split,
            start: stream.figures.tokens,
            tokens: tokens.len() as u64,
        });
        stream.figures.documents += 1;
        stream.figures.tokens += tokens.len() as u64;
        stream.figures.text_bytes += record.text_bytes;
        stream.counts.add(&tokens);
        let part = format!("{}.{}", self.stem, split.file_part());
        stream.push(
            self.folder,
            &part,
            self.tokenizer.vocabulary(),
            &tokens,
            SHARD_TOKENS_MAX,
        )?;
        self.documents.push(&record)
    }

    fn finish(self) -> Result<DomainBuilt, CorpusError> {
        let input = &self.text.inputs[self.domain];
        let [mut train, mut held_out] = self.streams;
        train.close()?;
        held_out.close()?;
        if train.figures.documents + held_out.figures.documents == 0 {
            let left_out: u64 = self.dropped.values().sum();
            let found = match self.text.refined {
                Some(_) if left_out > 0 => self.report.main_reasons(),
                _ => format!("{} files, {left_out} empty records", input.files.len()),
            };
            return Err(CorpusError::EmptyDomain {
                domain: input.config.name.clone(),
                path: input.config.path.clone(),
                found,
                remedy: "add text or leave the domain out",
            });
        }
        Ok(DomainBuilt {
            manifest: DomainManifest {
                name: input.config.name.clone(),
                language: input.config.language,
                version: Some(self.text.versions[self.domain].clone()),
                sources: input.sources.clone(),
                train: train.figures,
                held_out: held_out.figures,
                dropped: self.dropped,
                documents: self.documents.finish()?,
                unigram_entropy_nats: None,
                unigram_entropy_own_nats: None,
            },
            report: self.report,
            train: train.counts,
            held_out: held_out.counts,
        })
    }
}

/// A document's place for people.
pub(crate) fn place_text(inputs: &[DomainInput<'_>], id: DocumentId) -> String {
    let input = &inputs[id.domain()];
    let source = &input.sources[id.source() as usize].name;
    format!("{}/{source}:{}", input.config.name, id.record())
}

/// What refining did to a document, for the index.
fn refined_record(inputs: &[DomainInput<'_>], document: &Refined) -> RefinedRecord {
    let reason = document.dropped.as_ref();
    let original = blake3::Hash::from_bytes(document.original);
    RefinedRecord {
        original_blake3: document.is_changed.then(|| original.to_hex().to_string()),
        detail: reason.map_or_else(String::new, |reason| reason.detail.clone()),
        copy_of: reason.and_then(|reason| reason.copy_of).map(|id| DocumentPlace {
            domain: inputs[id.domain()].config.name.clone(),
            source: id.source(),
            record: id.record(),
        }),
    }
}

impl Stream {
    /// Appends to the last token shard, and opens the next one where it is full: all but the last hold `limit` tokens.
    fn push(
        &mut self,
        folder: &Path,
        part: &str,
        vocabulary: usize,
        tokens: &[u32],
        limit: u64,
    ) -> Result<(), CorpusError> {
        let mut rest = tokens;
        while !rest.is_empty() {
            let shard = match &mut self.shard {
                Some(shard) => shard,
                none => {
                    let name: PathBuf = folder.join(format!("{part}.{:05}.tokens", self.figures.shards.len()));
                    none.insert(ShardWriter::create(&name, vocabulary)?)
                }
            };
            let room = (limit - shard.tokens()).min(rest.len() as u64) as usize;
            let (now, later) = rest.split_at(room);
            shard.push(now)?;
            let full = shard.tokens() == limit;
            rest = later;
            if full {
                self.close()?;
            }
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), CorpusError> {
        if let Some(shard) = self.shard.take() {
            self.figures.shards.push(shard.finish()?);
        }
        Ok(())
    }
}

/// Fills in the entropies and sums the domains up by language.
fn figures(domains: &mut [DomainBuilt], vocabulary: usize) -> Vec<LanguageManifest> {
    let mut languages: BTreeMap<_, (LanguageManifest, Unigram, Unigram)> = BTreeMap::new();
    for domain in &*domains {
        let language = domain.manifest.language;
        let (sum, train, held_out) = languages.entry(language).or_insert_with(|| {
            let none = LanguageManifest {
                language,
                train_tokens: 0,
                held_out_tokens: 0,
                held_out_bytes: 0,
                unigram_entropy_nats: None,
            };
            (none, Unigram::new(vocabulary), Unigram::new(vocabulary))
        });
        sum.train_tokens += domain.manifest.train.tokens;
        sum.held_out_tokens += domain.manifest.held_out.tokens;
        sum.held_out_bytes += domain.manifest.held_out.text_bytes;
        train.merge(&domain.train);
        held_out.merge(&domain.held_out);
    }
    for domain in domains {
        let train = &languages[&domain.manifest.language].1;
        domain.manifest.unigram_entropy_nats = train.cross_entropy_nats(&domain.held_out);
        domain.manifest.unigram_entropy_own_nats = domain.train.cross_entropy_nats(&domain.held_out);
    }
    languages
        .into_values()
        .map(|(mut sum, train, held_out)| {
            sum.unigram_entropy_nats = train.cross_entropy_nats(&held_out);
            sum
        })
        .collect()
}

fn finished(domain: &DomainManifest) -> PrepareEvent {
    PrepareEvent::DomainFinished {
        name: domain.name.clone(),
        language: domain.language,
        documents: domain.train.documents + domain.held_out.documents,
        dropped: domain.dropped.values().sum(),
        train_tokens: domain.train.tokens,
        held_out_tokens: domain.held_out.tokens,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunks::ChunkCache;
    use crate::shard::ShardReader;
    use proptest::prelude::*;
    use std::sync::Arc;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// A stream cut into shards is the stream, and all but the last shard are full.
        #[test]
        fn shards_of_a_stream_are_the_stream(pieces in prop::collection::vec(0..40_usize, 1..20), limit in 1..50_u64) {
            let folder = tempfile::tempdir().unwrap();
            let mut stream = Stream { shard: None, figures: SplitManifest::default(), counts: Unigram::new(300) };
            let mut tokens: Vec<u32> = Vec::new();
            for length in pieces {
                let piece: Vec<u32> = (tokens.len()..tokens.len() + length).map(|i| i as u32 % 300).collect();
                stream.push(folder.path(), "part", 300, &piece, limit).unwrap();
                tokens.extend(piece);
            }
            stream.close().unwrap();
            let mut read = Vec::new();
            let cache = Arc::new(ChunkCache::new(1));
            for file in &stream.figures.shards {
                let shard = ShardReader::open(folder.path(), file, &cache).unwrap();
                let mut part = vec![0; shard.tokens() as usize];
                shard.read(0, &mut part).unwrap();
                prop_assert!((read.len() as u64).is_multiple_of(limit) && part.len() as u64 <= limit);
                read.extend(part);
            }
            prop_assert_eq!(read, tokens);
        }

        /// Shares never exceed sizes or the total, and use the total up where the sources allow it.
        #[test]
        fn shares_use_the_total_up(sizes in prop::collection::vec(0..1000_u64, 1..8), total in 0..5000_u64) {
            let shares = shares(&sizes, total);
            prop_assert!(shares.iter().zip(&sizes).all(|(share, size)| share <= size));
            let (used, there) = (shares.iter().sum::<u64>(), sizes.iter().sum::<u64>());
            prop_assert!(used <= total.min(there));
            prop_assert!(total.min(there) - used < sizes.len() as u64);
        }
    }
}
