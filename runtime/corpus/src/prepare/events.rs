//! What a person is told while a data set is made.

use serde::Serialize;
use std::fmt;
use std::path::PathBuf;
use tarazed_domain::config::Language;

/// A stage of refining.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Each document is judged by itself.
    Judging,
    /// Documents have been compared with each other.
    Comparing,
}

/// One stage of preparing; its `Display` is a line to print.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum PrepareEvent {
    /// Another process prepares in the same folder.
    Waiting {
        /// The folder.
        folder: PathBuf,
    },
    /// All sources are hashed.
    Hashed {
        /// Their number.
        files: u64,
        /// Their bytes.
        bytes: u64,
    },
    /// The data set was there.
    Reused {
        /// Its folder.
        folder: PathBuf,
        /// Its version.
        version: String,
    },
    /// Part of the text is refined.
    Refining {
        /// The stage.
        stage: Stage,
        /// Share of the source files' bytes that are read, in percent.
        percent: f64,
        /// Documents so far.
        documents: u64,
        /// Documents that go on.
        kept: u64,
        /// Bytes of text so far, as they came.
        text_bytes: u64,
        /// Text refined by this process in a second, in 10^6 bytes.
        mb_per_s: f64,
    },
    /// Tokenizer training begins.
    TokenizerTraining {
        /// Documents trained on.
        documents: u64,
        /// Their UTF-8 bytes.
        bytes: u64,
        /// Entries asked for.
        vocabulary: usize,
    },
    /// The tokenizer is there.
    TokenizerReady {
        /// Its entries.
        vocabulary: usize,
    },
    /// Part of a domain is encoded.
    DomainProgress {
        /// The domain.
        name: String,
        /// Documents so far.
        documents: u64,
        /// Their UTF-8 bytes.
        text_bytes: u64,
        /// Share of the domain's text, about, in percent: source files also hold what is no text.
        percent: f64,
        /// Text encoded in a second, in 10^6 bytes.
        mb_per_s: f64,
    },
    /// A domain is encoded.
    DomainFinished {
        /// The domain.
        name: String,
        /// Its language.
        language: Language,
        /// Documents kept.
        documents: u64,
        /// Documents left out.
        dropped: u64,
        /// Training tokens.
        train_tokens: u64,
        /// Held-out tokens.
        held_out_tokens: u64,
    },
    /// The data set is whole and durable.
    Finished {
        /// Its folder.
        folder: PathBuf,
        /// Its version.
        version: String,
    },
}

impl fmt::Display for PrepareEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mega = |bytes: u64| bytes as f64 / 1e6;
        match self {
            Self::Waiting { folder } => {
                write!(
                    f,
                    "data: another process is preparing {}; waiting for it",
                    folder.display()
                )
            }
            Self::Hashed { files, bytes } => write!(f, "data: {files} source files, {:.1} MB", mega(*bytes)),
            Self::Reused { folder, version } => {
                write!(
                    f,
                    "data: {} is up to date (version {})",
                    folder.display(),
                    short(version)
                )
            }
            Self::Refining {
                stage,
                percent,
                documents,
                kept,
                text_bytes,
                mb_per_s,
            } => {
                let done = match stage {
                    Stage::Judging => "refined",
                    Stage::Comparing => "compared",
                };
                write!(
                    f,
                    "refine: {percent:.0}% {done}: {documents} documents, {:.1} MB, {mb_per_s:.1} MB/s; {kept} go on",
                    mega(*text_bytes)
                )
            }
            Self::TokenizerTraining {
                documents,
                bytes,
                vocabulary,
            } => write!(
                f,
                "tokenizer: training {vocabulary} entries on {documents} documents, {:.1} MB",
                mega(*bytes)
            ),
            Self::TokenizerReady { vocabulary } => write!(f, "tokenizer: {vocabulary} entries"),
            Self::DomainProgress {
                name,
                documents,
                text_bytes,
                percent,
                mb_per_s,
            } => {
                write!(
                    f,
                    "domain {name}: {percent:.0}%: {documents} documents, {:.1} MB so far, {mb_per_s:.1} MB/s",
                    mega(*text_bytes)
                )
            }
            Self::DomainFinished {
                name,
                language,
                documents,
                dropped,
                train_tokens,
                held_out_tokens,
            } => write!(
                f,
                "domain {name} ({}): {documents} documents, {train_tokens} training and {held_out_tokens} held-out \
                 tokens, {dropped} documents left out",
                language.name()
            ),
            Self::Finished { folder, version } => {
                write!(f, "data: {} written (version {})", folder.display(), short(version))
            }
        }
    }
}

fn short(version: &str) -> &str {
    version.get(..12).unwrap_or(version)
}
