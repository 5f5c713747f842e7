//! The work: tokenizer, domains, figures, manifest, all into one new folder.

use super::{DomainInput, PrepareEvent, PrepareRequest, trained_vocabulary};
use crate::documents::{DocumentRecord, DocumentWriter, KeptTokens};
use crate::entropy::Unigram;
use crate::error::CorpusError;
use crate::files::write_file;
use crate::manifest::{
    DataManifest, DomainManifest, Dropped, FileManifest, LanguageManifest, MANIFEST_FILE, SCHEMA, SplitManifest,
    TokenizerManifest,
};
use crate::shard::{SHARD_TOKENS_MAX, ShardWriter};
use crate::source::Document;
use crate::split::{Split, unit};
use crate::tokenizer::{TOKENIZER_FILE, Tokenizer};
use rayon::prelude::*;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

/// Text encoded at once, in parallel, by document.
const BATCH_BYTES: usize = 8 * 1024 * 1024;

pub(super) fn build(
    request: &PrepareRequest<'_>,
    inputs: &[DomainInput<'_>],
    recipe: &str,
    folder: &Path,
    progress: &mut dyn FnMut(PrepareEvent),
) -> Result<DataManifest, CorpusError> {
    let (tokenizer, file) = tokenizer(request, inputs, folder, progress)?;
    progress(PrepareEvent::TokenizerReady {
        vocabulary: tokenizer.vocabulary(),
    });
    let mut domains = Vec::with_capacity(inputs.len());
    for (index, input) in inputs.iter().enumerate() {
        let mut writer =
            DomainWriter::create(folder, index, &input.config.name, &tokenizer, request.held_out_fraction)?;
        writer.read(input, progress)?;
        let built = writer.finish(input)?;
        progress(finished(&built.manifest));
        domains.push(built);
    }
    let languages = figures(&mut domains, tokenizer.vocabulary());
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
        domains: domains.into_iter().map(|d| d.manifest).collect(),
        languages,
    };
    manifest.version = manifest.compute_version();
    // Strings, numbers and enum-keyed maps always have a JSON form.
    let text = serde_json::to_string_pretty(&manifest).unwrap_or_default();
    write_file(&folder.join(MANIFEST_FILE), text.as_bytes())?;
    Ok(manifest)
}

pub(super) fn check_vocabulary(path: &Path, vocabulary: usize, model_vocabulary: usize) -> Result<(), CorpusError> {
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
    inputs: &[DomainInput<'_>],
    folder: &Path,
    progress: &mut dyn FnMut(PrepareEvent),
) -> Result<(Tokenizer, FileManifest), CorpusError> {
    let target = folder.join(TOKENIZER_FILE);
    if let Some(path) = &request.tokenizer.path {
        let tokenizer = Tokenizer::load(path)?;
        check_vocabulary(path, tokenizer.vocabulary(), request.model_vocabulary)?;
        let bytes = std::fs::read(path).map_err(CorpusError::unreadable(path))?;
        return Ok((tokenizer, write_file(&target, &bytes)?));
    }
    let vocabulary = trained_vocabulary(request);
    check_vocabulary(
        Path::new("data.tokenizer.vocabulary"),
        vocabulary,
        request.model_vocabulary,
    )?;
    let texts = sample(request, inputs)?;
    progress(PrepareEvent::TokenizerTraining {
        documents: texts.len() as u64,
        bytes: texts.iter().map(|t| t.len() as u64).sum(),
        vocabulary,
    });
    let (tokenizer, json) = Tokenizer::train_bpe(&texts, vocabulary)?;
    Ok((tokenizer, write_file(&target, json.as_bytes())?))
}

/// Training text for the tokenizer: all of it where it fits into `train_bytes_max`, else a sample in which no domain takes
/// more than an equal share while another is short of its own. Held-out documents are left out.
fn sample(request: &PrepareRequest<'_>, inputs: &[DomainInput<'_>]) -> Result<Vec<String>, CorpusError> {
    let sizes: Vec<u64> = inputs.iter().map(|i| i.files.iter().map(|f| f.bytes).sum()).collect();
    let shares = shares(&sizes, request.tokenizer.train_bytes_max);
    let mut texts = Vec::new();
    for ((input, size), share) in inputs.iter().zip(sizes).zip(shares) {
        let fraction = share as f64 / size.max(1) as f64;
        let mut taken = 0;
        each_document(input, &mut |read| {
            let wanted = read.dropped.is_none()
                && Split::of(&read.hash, request.held_out_fraction) == Split::Train
                && (share >= size
                    || (taken < share && unit(&read.hash, "tarazed corpus tokenizer sample v1") < fraction));
            if wanted {
                taken += read.document.text.len() as u64;
                texts.push(read.document.text);
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
    document: Document,
    hash: blake3::Hash,
    dropped: Option<Dropped>,
}

/// Every document of a domain in order, exact duplicates and empty ones marked.
fn each_document(
    input: &DomainInput<'_>,
    sink: &mut dyn FnMut(Read) -> Result<(), CorpusError>,
) -> Result<(), CorpusError> {
    // Half a hash: at a billion documents the chance of any false match is 1e-21. Only ever asked, never iterated (DET-1).
    let mut seen: HashSet<[u8; 16]> = HashSet::new();
    for (source, file) in input.files.iter().enumerate() {
        file.check_unchanged()?;
        file.documents(&input.config.text_field, &mut |document| {
            let hash = blake3::hash(document.text.as_bytes());
            let mut half = [0; 16];
            half.copy_from_slice(&hash.as_bytes()[..16]);
            let dropped = if document.text.trim().is_empty() {
                Some(Dropped::Empty)
            } else {
                (!seen.insert(half)).then_some(Dropped::Duplicate)
            };
            sink(Read {
                source: source as u32,
                document,
                hash,
                dropped,
            })
        })?;
        file.check_unchanged()?;
    }
    Ok(())
}

/// One domain while it is written.
struct DomainWriter<'a> {
    folder: &'a Path,
    stem: String,
    tokenizer: &'a Tokenizer,
    held_out_fraction: f64,
    streams: [Stream; 2],
    documents: DocumentWriter,
    dropped: BTreeMap<Dropped, u64>,
    batch: Vec<Read>,
    batch_bytes: usize,
}

/// One split while it is written.
struct Stream {
    shard: Option<ShardWriter>,
    figures: SplitManifest,
    counts: Unigram,
}

struct DomainBuilt {
    manifest: DomainManifest,
    train: Unigram,
    held_out: Unigram,
}

impl<'a> DomainWriter<'a> {
    fn create(
        folder: &'a Path,
        index: usize,
        name: &str,
        tokenizer: &'a Tokenizer,
        held_out_fraction: f64,
    ) -> Result<Self, CorpusError> {
        // Any name is allowed in a config; a file name is not so free.
        let plain: String = name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' })
            .take(64)
            .collect();
        let stem = format!("{index:03}-{plain}");
        let stream = || Stream {
            shard: None,
            figures: SplitManifest::default(),
            counts: Unigram::new(tokenizer.vocabulary()),
        };
        Ok(Self {
            folder,
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

    fn read(&mut self, input: &DomainInput<'_>, progress: &mut dyn FnMut(PrepareEvent)) -> Result<(), CorpusError> {
        each_document(input, &mut |read| {
            self.batch_bytes += read.document.text.len();
            self.batch.push(read);
            if self.batch_bytes >= BATCH_BYTES {
                self.encode_batch()?;
                progress(PrepareEvent::DomainProgress {
                    name: input.config.name.clone(),
                    documents: self.streams.iter().map(|s| s.figures.documents).sum(),
                    text_bytes: self.streams.iter().map(|s| s.figures.text_bytes).sum(),
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
            .map(|read| {
                if read.dropped.is_some() {
                    Ok(Vec::new())
                } else {
                    self.tokenizer.encode(&read.document.text)
                }
            })
            .collect();
        for (read, tokens) in batch.iter().zip(encoded) {
            self.write(read, tokens?)?;
        }
        Ok(())
    }

    fn write(&mut self, read: &Read, mut tokens: Vec<u32>) -> Result<(), CorpusError> {
        let mut record = DocumentRecord {
            source: read.source,
            record: read.document.record,
            blake3: read.hash.to_hex().to_string(),
            text_bytes: read.document.text.len() as u64,
            kept: None,
            dropped: read.dropped,
        };
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

    fn finish(self, input: &DomainInput<'_>) -> Result<DomainBuilt, CorpusError> {
        let [mut train, mut held_out] = self.streams;
        train.close()?;
        held_out.close()?;
        if train.figures.documents + held_out.figures.documents == 0 {
            let left_out: u64 = self.dropped.values().sum();
            return Err(CorpusError::EmptyDomain {
                domain: input.config.name.clone(),
                path: input.config.path.clone(),
                found: format!("{} files, {left_out} empty records", input.files.len()),
                remedy: "add text or leave the domain out",
            });
        }
        Ok(DomainBuilt {
            manifest: DomainManifest {
                name: input.config.name.clone(),
                language: input.config.language,
                sources: input.sources.clone(),
                train: train.figures,
                held_out: held_out.figures,
                dropped: self.dropped,
                documents: self.documents.finish()?,
                unigram_entropy_nats: None,
                unigram_entropy_own_nats: None,
            },
            train: train.counts,
            held_out: held_out.counts,
        })
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
