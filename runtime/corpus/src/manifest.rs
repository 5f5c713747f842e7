//! `data.json`: what a data set holds, and the hashes that tie all of it together.

use crate::error::CorpusError;
use crate::files::read_checked;
use crate::refine::Dropped;
use crate::split::Split;
use crate::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use tarazed_domain::config::{Language, SourceFormat};
use tarazed_domain::ids::DomainIndex;

/// Name of the manifest in a data set's folder.
pub const MANIFEST_FILE: &str = "data.json";
/// Schema version of [`DataManifest`].
pub(crate) const SCHEMA: u32 = 1;

/// The content of `data.json`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataManifest {
    /// Schema version.
    pub schema: u32,
    /// BLAKE3 (hex) of this manifest with this field empty and without those of the domains: equal versions mean equal tokens,
    /// tokenizer and figures.
    pub version: String,
    /// BLAKE3 (hex) of the inputs: sources, domain list, tokenizer settings, held-out fraction, program. Names the folder.
    pub recipe: String,
    /// The tokenizer.
    pub tokenizer: TokenizerManifest,
    /// Share of documents held out.
    pub held_out_fraction: f64,
    /// How its text was refined; none where it was taken as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refinement: Option<RefinementManifest>,
    /// The domains, in the config's order.
    pub domains: Vec<DomainManifest>,
    /// Figures per language, in the order of [`Language`].
    pub languages: Vec<LanguageManifest>,
}

/// The tokenizer of a data set.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerManifest {
    /// `tokenizer.json`.
    pub file: FileManifest,
    /// Entries, special tokens included; every token id is below it.
    pub vocabulary: usize,
    /// The token that ends each document.
    pub end_of_document: u32,
}

impl TokenizerManifest {
    /// The tokenizer of the data set in `folder`, with the bytes of its `tokenizer.json`, whose hash is right.
    ///
    /// # Errors
    /// [`CorpusError::Unreadable`], [`CorpusError::CorruptCache`] or [`CorpusError::Tokenizer`].
    pub fn load(&self, folder: &Path) -> Result<(Tokenizer, Vec<u8>), CorpusError> {
        let bytes = read_checked(folder, &self.file)?;
        let path = folder.join(&self.file.name);
        let tokenizer = Tokenizer::from_bytes(&path, &bytes, |_| Ok(self.end_of_document))?;
        Ok((tokenizer, bytes))
    }
}

/// One file of a data set.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileManifest {
    /// Name in the data set's folder.
    pub name: String,
    /// Length of the file.
    pub bytes: u64,
    /// BLAKE3 (hex): of the whole file, and for a token shard of its header, which holds the hash of its chunk table.
    pub blake3: String,
}

/// One source file of a domain.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceManifest {
    /// Name relative to the domain's path.
    pub name: String,
    /// How it was read.
    pub format: SourceFormat,
    /// Length.
    pub bytes: u64,
    /// BLAKE3 (hex) of the file.
    pub blake3: String,
}

/// One domain.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DomainManifest {
    /// Name in the config.
    pub name: String,
    /// Language.
    pub language: Language,
    /// BLAKE3 (hex) of what its text was made from: language, text field, sources, and how it was refined. Data sets whose
    /// domains have the same version took in the same text by the same rules, whatever the domain's name, place and share.
    /// Not part of it is what other domains decide: which copies across domains are left out, and a tokenizer that is trained.
    /// None in data sets of older programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Where the text came from, in reading order.
    pub sources: Vec<SourceManifest>,
    /// The training split.
    pub train: SplitManifest,
    /// The held-out split.
    pub held_out: SplitManifest,
    /// Documents left out, by reason.
    pub dropped: BTreeMap<Dropped, u64>,
    /// From tokens back to documents, and the documents left out: one JSON object a line (DATA-3).
    pub documents: FileManifest,
    /// Cross-entropy, in nats per token, of the held-out tokens under the add-one smoothed unigram distribution
    /// `p(t) = (count(t) + 1) / (N + V)` of all training tokens of this domain's language. None without held-out text.
    pub unigram_entropy_nats: Option<f64>,
    /// The same under the training tokens of this domain alone.
    pub unigram_entropy_own_nats: Option<f64>,
}

/// One split of one domain.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitManifest {
    /// Documents.
    pub documents: u64,
    /// Tokens, one end-of-document token per document included.
    pub tokens: u64,
    /// UTF-8 bytes of the text behind them (for bits per byte: `nats / ln 2 * tokens / text_bytes`).
    pub text_bytes: u64,
    /// Token shards, in stream order.
    pub shards: Vec<FileManifest>,
}

/// Figures of one language over its domains.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LanguageManifest {
    /// The language.
    pub language: Language,
    /// Training tokens.
    pub train_tokens: u64,
    /// Held-out tokens.
    pub held_out_tokens: u64,
    /// UTF-8 bytes of the held-out text.
    pub held_out_bytes: u64,
    /// As in [`DomainManifest::unigram_entropy_nats`], over all held-out tokens of the language.
    pub unigram_entropy_nats: Option<f64>,
}

/// How the text of a data set was refined.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefinementManifest {
    /// Version of the rules and of what they rest on.
    pub program: String,
    /// The settings as JSON, benchmark sets by their hashes: equal settings are equal texts.
    pub settings: String,
    /// What was left out and why, as JSON.
    pub report: FileManifest,
    /// The same for people.
    pub report_text: FileManifest,
}

impl SplitManifest {
    /// Whole sequences of `context` inputs with their shifted targets: sequence `i` is tokens `i * context ..= (i + 1) *
    /// context`, so neighbours share one token and the rest past the last whole one is left unused.
    #[must_use]
    pub const fn sequences(&self, context: usize) -> u64 {
        self.tokens.saturating_sub(1) / context as u64
    }
}

impl DomainManifest {
    /// The figures of one split.
    #[must_use]
    pub const fn split(&self, split: Split) -> &SplitManifest {
        match split {
            Split::Train => &self.train,
            Split::HeldOut => &self.held_out,
        }
    }
}

impl DataManifest {
    /// One domain's figures.
    ///
    /// # Panics
    /// If the domain is not in the data set (a programmer error: the config and the data set come together).
    #[must_use]
    pub fn domain(&self, domain: DomainIndex) -> &DomainManifest {
        &self.domains[domain.index()]
    }

    /// Refuses a split that does not hold one sequence of `context` tokens; the held-out split only where one was asked
    /// for.
    ///
    /// # Errors
    /// [`CorpusError::TooShort`].
    pub fn check_context(&self, context: usize) -> Result<(), CorpusError> {
        for domain in &self.domains {
            for split in Split::ALL {
                let part = domain.split(split);
                let wanted = split == Split::Train || self.held_out_fraction > 0.0;
                if wanted && part.sequences(context) == 0 {
                    return Err(CorpusError::TooShort {
                        domain: domain.name.clone(),
                        split: split.name(),
                        tokens: part.tokens,
                        documents: part.documents,
                        needed: context as u64 + 1,
                        remedy: match split {
                            Split::Train => "add text, or lower model.context",
                            Split::HeldOut => {
                                "add documents (cut long ones up), raise data.held_out_fraction, or set it to 0"
                            }
                        },
                    });
                }
            }
        }
        Ok(())
    }

    /// The version this content must have.
    pub(crate) fn compute_version(&self) -> String {
        let mut bare = self.clone();
        bare.version = String::new();
        // They follow from what the sources' hashes say, decide nothing, and older programs do not write them.
        for domain in &mut bare.domains {
            domain.version = None;
        }
        // A struct of strings, numbers and enum-keyed maps always has a JSON form.
        let text = serde_json::to_vec(&bare).unwrap_or_default();
        blake3::hash(&text).to_hex().to_string()
    }

    /// Reads and checks `data.json` of a data set; its shards are checked by [`crate::TokenStore::open`].
    ///
    /// # Errors
    /// [`CorpusError::Unreadable`] or [`CorpusError::CorruptCache`].
    pub fn load(folder: &Path) -> Result<Self, CorpusError> {
        let path = folder.join(MANIFEST_FILE);
        let bytes = std::fs::read(&path).map_err(CorpusError::unreadable(&path))?;
        Self::decode(&path, &bytes)
    }

    /// Reads and checks the bytes of `data.json`; `path` stands in the error.
    ///
    /// # Errors
    /// [`CorpusError::CorruptCache`].
    pub fn decode(path: &Path, bytes: &[u8]) -> Result<Self, CorpusError> {
        let manifest: Self =
            serde_json::from_slice(bytes).map_err(|e| CorpusError::corrupt(path, format!("cannot be parsed ({e})")))?;
        if manifest.schema != SCHEMA {
            let reason = format!("has schema {}, and this program reads {SCHEMA}", manifest.schema);
            return Err(CorpusError::corrupt(path, reason));
        }
        if manifest.version != manifest.compute_version() {
            return Err(CorpusError::corrupt(path, "its hash does not match its content"));
        }
        Ok(manifest)
    }
}
