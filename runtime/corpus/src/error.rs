//! What can go wrong with data, each case with its place and its remedy.
//!
//! Three groups, by what the caller does next: *reconfigure* (the input or the config must change: never retry),
//! *rebuild* (the cache is corrupt: delete it, prepare again) and *retry* (storage failed: free space, run again).

use std::path::{Path, PathBuf};

/// Why text could not become tokens, or tokens could not be read back.
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    /// Reconfigure: the source does not exist.
    #[error("{}: no such file or folder (domain '{domain}'); correct data.domains.path", path.display())]
    MissingPath {
        /// Domain that names it.
        domain: String,
        /// The path as resolved.
        path: PathBuf,
    },
    /// Reconfigure: a source, or a tokenizer, cannot be read.
    #[error("{}: cannot be read ({source}); check the file and its permissions", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Reconfigure: a domain without any text.
    #[error("{}: domain '{domain}' holds no document ({found}); {remedy}", path.display())]
    EmptyDomain {
        /// The domain.
        domain: String,
        /// Its path.
        path: PathBuf,
        /// What was found instead.
        found: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Reconfigure: a split that does not fill one sequence.
    #[error(
        "domain '{domain}': its {split} split has {tokens} tokens in {documents} documents, and one sequence needs \
         {needed} (model.context + 1); {remedy}"
    )]
    TooShort {
        /// The domain.
        domain: String,
        /// `training` or `held-out`.
        split: &'static str,
        /// Tokens there are.
        tokens: u64,
        /// Documents there are.
        documents: u64,
        /// Tokens one sequence needs.
        needed: u64,
        /// What to do.
        remedy: &'static str,
    },
    /// Reconfigure: text that is not UTF-8.
    #[error("{}: invalid UTF-8 at byte {offset}; convert the file to UTF-8 (e.g. with iconv) or leave it out", path.display())]
    InvalidUtf8 {
        /// The file.
        path: PathBuf,
        /// Offset in bytes from the file's start (in a parquet file: from the value's start, after its row).
        offset: String,
    },
    /// Reconfigure: a line that is not a JSON object.
    #[error("{}:{line}: not a JSON object ({reason}); correct or remove the line", path.display())]
    BadRecord {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: u64,
        /// What the parser says.
        reason: String,
    },
    /// Reconfigure: a JSON object without the text.
    #[error(
        "{}:{line}: {reason}; set data.domains.text_field (or --text-field) to the field that holds the text",
        path.display()
    )]
    MissingField {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: u64,
        /// Which field is missing, or is no string.
        reason: String,
    },
    /// Reconfigure: a parquet file without the column.
    #[error(
        "{}: no string column '{column}' (its columns: {columns}); set data.domains.text_field (or --text-field) to one of them",
        path.display()
    )]
    MissingColumn {
        /// The file.
        path: PathBuf,
        /// Column asked for.
        column: String,
        /// Columns there are.
        columns: String,
    },
    /// Reconfigure: a parquet file that cannot be decoded.
    #[error("{}: not a readable parquet file ({reason}); write it again, or leave it out", path.display())]
    BadParquet {
        /// The file.
        path: PathBuf,
        /// What the decoder says.
        reason: String,
    },
    /// Reconfigure: one document beyond the limit.
    #[error("{}: {place} holds a document of more than {limit_bytes} bytes; split it", path.display())]
    DocumentTooLarge {
        /// The file.
        path: PathBuf,
        /// Line or row.
        place: String,
        /// The limit.
        limit_bytes: u64,
    },
    /// Reconfigure: a file of tokens where text is needed.
    #[error("{}: holds tokens, and no text {purpose}; {remedy}", path.display())]
    TokensWithoutText {
        /// The file.
        path: PathBuf,
        /// What text was asked for.
        purpose: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// Reconfigure: a file of tokens that is not what its header says.
    #[error("{}: not a readable token file ({reason}); write it again, or leave it out", path.display())]
    BadTokens {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Reconfigure: a benchmark set that cannot be used.
    #[error("{}: not a usable benchmark set ({reason}); correct it, or data.refine.decontaminate.sets", path.display())]
    Benchmark {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Reconfigure: a quality rule that there is not.
    #[error("data.refine.quality.off: '{name}' is no quality rule; their names are in docs/DATA.md")]
    UnknownRule {
        /// The name.
        name: String,
    },
    /// Reconfigure: more files or records than a document's place can name.
    #[error("{}: {reason}; merge files, or cut this one up", path.display())]
    TooMany {
        /// The file or folder.
        path: PathBuf,
        /// What there are too many of.
        reason: String,
    },
    /// Reconfigure: a folder without a data set, or with several.
    #[error("{}: {reason}", path.display())]
    NoDataSet {
        /// The folder.
        path: PathBuf,
        /// What was found, and what to do.
        reason: String,
    },
    /// Reconfigure: a data set that cannot enter a run that began with other data.
    #[error("{}: {reason}; {remedy}", path.display())]
    Unfit {
        /// The data set.
        path: PathBuf,
        /// In what they do not fit each other.
        reason: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Reconfigure: a prepared folder of other domains.
    #[error(
        "{}: holds the domains {found}, and the config names {wanted}; list the same names and languages in the same order, or \
         name another data.prepared",
        path.display()
    )]
    OtherDomains {
        /// The folder.
        path: PathBuf,
        /// What it holds.
        found: String,
        /// What the config has.
        wanted: String,
    },
    /// Reconfigure: a run would go on with other data than it began with.
    #[error(
        "{}: holds other data than the config's sources give now: texts, domains or tokenizer have changed since the run \
         began; put them back as they were, or name another --run-dir for a new run",
        folder.display()
    )]
    OtherData {
        /// Where the run's data sets lie.
        folder: PathBuf,
    },
    /// Retry: a source was written to while it was read.
    #[error("{}: changed while it was being read; run again when nobody writes to it", path.display())]
    SourceChanged {
        /// The file.
        path: PathBuf,
    },
    /// Reconfigure: a tokenizer that cannot be loaded, trained or used.
    #[error("{}: {reason}; {remedy}", path.display())]
    Tokenizer {
        /// The file, or the place it was to be written to.
        path: PathBuf,
        /// What is wrong.
        reason: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Reconfigure: token ids that the model has no rows for.
    #[error(
        "{}: the tokenizer has {vocabulary} entries and the model {model_vocabulary} rows; raise model.vocabulary or lower \
         data.tokenizer.vocabulary",
        path.display()
    )]
    VocabularyTooLarge {
        /// The tokenizer.
        path: PathBuf,
        /// Its entries.
        vocabulary: usize,
        /// `model.vocabulary`.
        model_vocabulary: usize,
    },
    /// Rebuild: a prepared file is not what its manifest says.
    #[error("{}: {reason}; delete the folder {} to rebuild it", path.display(), folder.display())]
    CorruptCache {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// The data set's folder.
        folder: PathBuf,
    },
    /// Retry: the data set cannot be written. Nothing half written is taken for one.
    #[error(
        "{}: cannot be written ({source}); free space or choose another folder, then run again (nothing half written is used)",
        path.display()
    )]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
}

impl CorpusError {
    /// Whether the same call may do better later.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::SourceChanged { .. })
    }

    /// Whether what is finished is kept for the next call. A read that fails may be the disk's or the network's failing, which
    /// passes, or a permission, which is given: neither changes the inputs' names, so the hours of work are gone on with.
    pub(crate) const fn keeps_work(&self) -> bool {
        self.is_transient() || matches!(self, Self::Unreadable { .. })
    }

    /// Tokens where text is to be refined or searched.
    pub(crate) fn tokens_to_refine(path: &Path) -> Self {
        Self::TokensWithoutText {
            path: path.to_owned(),
            purpose: "to refine or to search",
            remedy: "give its domain text, or prepare the domains of tokens by a config of their own, without data.refine and \
                     with data.tokenizer.path",
        }
    }

    pub(crate) fn unreadable(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Unreadable { path, source }
    }

    pub(crate) fn write(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Write { path, source }
    }

    /// A prepared file at fault; the folder to delete is the one it lies in.
    pub(crate) fn corrupt(path: &Path, reason: impl Into<String>) -> Self {
        Self::CorruptCache {
            path: path.to_owned(),
            reason: reason.into(),
            folder: path.parent().unwrap_or(path).to_owned(),
        }
    }
}
