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
    /// Part of the sources is hashed.
    Hashing {
        /// Bytes so far.
        bytes: u64,
        /// All of them.
        bytes_all: u64,
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
    /// Part of the keys by which copies meet is merged.
    Merging {
        /// Keys read so far; with many pieces each is read several times.
        keys: u64,
        /// Keys that will have been read at the end.
        keys_all: u64,
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
            Self::Hashing { bytes, bytes_all } => write!(
                f,
                "data: {:.0}% hashed, {:.1} of {:.1} MB",
                percent(*bytes, *bytes_all),
                mega(*bytes),
                mega(*bytes_all)
            ),
            Self::Merging { keys, keys_all } => {
                write!(
                    f,
                    "refine: {:.0}% of the keys of copies merged",
                    percent(*keys, *keys_all)
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

fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

/// When a long count is worth a word: at every twentieth of the whole, but not more often than after `step_min`. By what is
/// done and not by a clock, so that the same work says the same.
#[derive(Debug)]
pub(crate) struct Milestones {
    done: u64,
    whole: u64,
    step: u64,
    next: u64,
}

impl Milestones {
    pub(crate) fn new(whole: u64, step_min: u64) -> Self {
        let step = (whole / 20).max(step_min).max(1);
        Self {
            done: 0,
            whole,
            step,
            next: step,
        }
    }

    /// So much more is done; says how much there is by now where that is worth a word. The end is not: it has a word of its own.
    pub(crate) fn add(&mut self, more: u64) -> Option<u64> {
        self.done += more;
        if self.done < self.next || self.done >= self.whole {
            return None;
        }
        self.next = self.done - self.done % self.step + self.step;
        Some(self.done)
    }
}

fn short(version: &str) -> &str {
    version.get(..12).unwrap_or(version)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// However the work is cut up, about twenty words at most are said, in order, and none of what is not done or is over.
        #[test]
        fn long_work_speaks_now_and_then(parts in prop::collection::vec(0..5_000_u64, 0..200), step_min in 0..20_000_u64) {
            let whole: u64 = parts.iter().sum();
            let mut milestones = Milestones::new(whole, step_min);
            let said: Vec<u64> = parts.iter().filter_map(|&part| milestones.add(part)).collect();
            prop_assert!(said.is_sorted_by(|a, b| a < b));
            prop_assert!(said.iter().all(|&done| done < whole && done >= step_min));
            prop_assert!(said.len() as u64 <= whole / step_min.max(whole / 20).max(1));
        }
    }

    #[test]
    fn twentieths_are_said() {
        let mut milestones = Milestones::new(1_000, 0);
        let said: Vec<u64> = (0..1_000).filter_map(|_| milestones.add(1)).collect();
        assert_eq!(said, (1..20).map(|i| i * 50).collect::<Vec<_>>());
        let hashing = PrepareEvent::Hashing {
            bytes: 50_000_000,
            bytes_all: 200_000_000,
        };
        assert_eq!(hashing.to_string(), "data: 25% hashed, 50.0 of 200.0 MB");
    }
}
