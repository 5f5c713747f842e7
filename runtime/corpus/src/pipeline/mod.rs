//! The pipeline: from the sources of all domains to the documents that become tokens, in memory that does not grow with
//! their number, on all threads, and so that a killed process goes on where it was.
//!
//! 1. [`pieces`]: sources are cut into pieces; each document is judged by itself ([`crate::refine`]).
//! 2. [`copies`]: keys of all pieces are merged, and copies marked.
//! 3. [`Pipeline::documents`]: documents in the order of the sources, each with what came of it.
//!
//! What is under way lies in a folder `<recipe>.work` beside the data set, and goes when that is whole. **DET-1**: the outcome
//! is a function of the sources, the domains and the settings; not of memory, threads, clock, or kills.

pub(crate) mod copies;
pub(crate) mod document;
pub(crate) mod pieces;
pub(crate) mod report;
mod sorted;

pub(crate) use document::{DocumentId, Refined};
pub(crate) use report::{DomainReport, Report};

use crate::error::CorpusError;
use crate::prepare::{DomainInput, PrepareEvent, Stage};
use crate::refine::{Shared, check_rules, hash_sets};
use copies::Copies;
use document::Reason;
use pieces::Piece;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use tarazed_domain::config::{DomainConfig, Language, RefineConfig};

/// Text of a piece at most; larger ones save nothing.
const PIECE_BYTES_MAX: u64 = 64 << 20;
/// Parts of the memory that the text of a piece takes: it is read ahead, judged, cleaned, encoded and packed, and each of
/// these holds about as much once, its keys as much again.
const PIECE_SHARE: u64 = 16;
/// Names how a work folder is cut up.
const PLAN_FILE: &str = "plan.json";

/// What the stages share.
pub(crate) struct Settings<'a> {
    config: &'a RefineConfig,
    folder: &'a Path,
    shared: Arc<Shared>,
    piece_bytes: u64,
    piece_documents: usize,
}

/// Settings that are right, with what they name read.
#[derive(Debug)]
pub(crate) struct Checked<'a> {
    config: &'a RefineConfig,
    shared: Arc<Shared>,
    text: String,
}

impl<'a> Checked<'a> {
    /// Checks everything about the settings that can be known without the text of `domains`: before hours are spent on that.
    ///
    /// # Errors
    /// A domain without text, a rule that there is not, or a benchmark set that cannot be read.
    pub(crate) fn new(config: &'a RefineConfig, domains: &[DomainConfig]) -> Result<Self, CorpusError> {
        check_rules(config)?;
        if let Some(domain) = domains.iter().find(|domain| domain.format.is_tokens()) {
            return Err(CorpusError::tokens_to_refine(&domain.path));
        }
        Ok(Self {
            config,
            text: settings_text(config)?,
            shared: Shared::load(config)?,
        })
    }

    /// The settings without paths: what is decided by them, and nothing else, as JSON.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }
}

impl Checked<'_> {
    /// As [`Checked::text`], as far as it decides about the documents of one domain: who else is exempt does not.
    pub(crate) fn text_for(&self, domain: &DomainConfig) -> String {
        let is_prose = domain.language != Language::Code;
        let asks = |is_enabled: bool, exempt: &[String]| is_prose && is_enabled && !exempt.contains(&domain.name);
        let RefineConfig { language, quality, .. } = self.config;
        // The text was made from JSON.
        let mut settings: serde_json::Value = serde_json::from_str(&self.text).unwrap_or_default();
        settings["language"] = asks(language.enabled, &language.exempt)
            .then(|| serde_json::json!(language.share_min))
            .into();
        settings["quality"] = asks(quality.enabled, &quality.exempt)
            .then(|| serde_json::json!(quality.off))
            .into();
        settings.to_string()
    }
}

fn settings_text(config: &RefineConfig) -> Result<String, CorpusError> {
    let decontaminate = &config.decontaminate;
    let settings = serde_json::json!({
        "document_bytes_max": config.document_bytes_max,
        "language": config.language,
        "quality": config.quality,
        "duplicates": config.duplicates,
        "decontaminate": [decontaminate.words, decontaminate.han_characters, decontaminate.letters],
        "benchmarks": hash_sets(decontaminate)?,
    });
    Ok(settings.to_string())
}

/// All documents of all domains, judged and compared.
#[derive(Debug)]
pub(crate) struct Pipeline {
    folder: PathBuf,
    shared: Arc<Shared>,
    domains: Vec<Vec<Piece>>,
    copies: Copies,
}

impl Pipeline {
    /// Runs both stages, or what of them is not done in `folder`. `identity` names sources and settings: what lies in the folder
    /// for another one is not gone on with.
    ///
    /// # Errors
    /// A source that cannot be read, a disk that cannot be written; what is done stays for the next try.
    pub(crate) fn run_for(
        identity: &str,
        checked: &Checked<'_>,
        inputs: &[DomainInput<'_>],
        folder: &Path,
        progress: &mut dyn FnMut(PrepareEvent),
    ) -> Result<Self, CorpusError> {
        let Checked { config, shared, .. } = checked;
        let keys_bytes = 2 * sorted::ENTRY_BYTES * (1 + u64::from(config.duplicates.bands));
        let settings = Settings {
            config,
            folder,
            shared: Arc::clone(shared),
            piece_bytes: (config.memory_bytes_max / PIECE_SHARE).min(PIECE_BYTES_MAX),
            piece_documents: (config.memory_bytes_max / PIECE_SHARE / keys_bytes).max(16) as usize,
        };
        open_folder(identity, &settings)?;
        let total_bytes = inputs
            .iter()
            .flat_map(|input| &input.files)
            .map(|file| file.bytes)
            .sum();
        let mut progress = Progress::new(progress, total_bytes);
        let domains = pieces::judge_all(&settings, inputs, &mut progress)?;
        let copies = copies::find(&settings, &domains, &mut progress)?;
        Ok(Self {
            folder: folder.to_owned(),
            shared: Arc::clone(shared),
            domains,
            copies,
        })
    }

    /// Where what is under way lies.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Bytes of the texts of a domain that go on, copies included.
    pub(crate) fn kept_bytes(&self, domain: usize) -> u64 {
        self.domains[domain].iter().map(|piece| piece.kept_bytes).sum()
    }

    /// The benchmark sets that were looked for.
    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Every document of a domain, in the order of its sources, with what came of it.
    ///
    /// # Errors
    /// [`CorpusError::CorruptCache`], or the sink's own.
    pub(crate) fn documents(
        &self,
        domain: usize,
        sink: &mut dyn FnMut(Refined) -> Result<(), CorpusError>,
    ) -> Result<(), CorpusError> {
        let mut copies = self.copies.of(&self.folder, domain)?;
        for piece in &self.domains[domain] {
            pieces::read(&self.folder, piece, &mut |mut document| {
                if let Some((rule, witness)) = copies.get(document.id)? {
                    document.dropped = Some(Reason {
                        rule,
                        detail: String::new(),
                        item: None,
                        copy_of: Some(witness),
                    });
                }
                sink(document)
            })?;
        }
        Ok(())
    }
}

/// Makes the work folder, or goes on in it; one of something else, or that was cut up otherwise, is emptied.
fn open_folder(identity: &str, settings: &Settings<'_>) -> Result<(), CorpusError> {
    let folder = settings.folder;
    let plan = serde_json::json!({
        "identity": blake3::hash(identity.as_bytes()).to_hex().as_str(),
        "piece_bytes": settings.piece_bytes,
        "piece_documents": settings.piece_documents,
    });
    let plan = plan.to_string();
    if std::fs::read_to_string(folder.join(PLAN_FILE)).is_ok_and(|found| found == plan) {
        return Ok(());
    }
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(CorpusError::write(folder)(e)),
        _ => std::fs::create_dir(folder).map_err(CorpusError::write(folder))?,
    }
    pieces::put(folder, PLAN_FILE, plan.as_bytes())
}

/// Counts what is done, and tells it. Its clock is for people: nothing that is written depends on it.
pub(crate) struct Progress<'a> {
    tell: &'a mut dyn FnMut(PrepareEvent),
    total_bytes: u64,
    read_bytes: u64,
    /// Bytes of text, of this process and in all.
    text_bytes_now: u64,
    text_bytes: u64,
    documents: u64,
    kept: u64,
    begun: Instant,
}

impl<'a> Progress<'a> {
    fn new(tell: &'a mut dyn FnMut(PrepareEvent), total_bytes: u64) -> Self {
        Self {
            tell,
            total_bytes,
            read_bytes: 0,
            text_bytes_now: 0,
            text_bytes: 0,
            documents: 0,
            kept: 0,
            begun: Instant::now(),
        }
    }

    /// A piece of an earlier process.
    fn found(&mut self, text_bytes: u64, documents: u64, kept: u64) {
        self.text_bytes += text_bytes;
        self.documents += documents;
        self.kept += kept;
    }

    /// What was found has been found.
    fn begin(&mut self, read_bytes: u64) {
        self.begun = Instant::now();
        self.read_bytes = read_bytes;
        if self.documents > 0 {
            self.tell(Stage::Judging);
        }
    }

    fn judged(&mut self, read_bytes: u64, text_bytes: u64, documents: u64, kept: u64) {
        self.found(text_bytes, documents, kept);
        self.text_bytes_now += text_bytes;
        self.read_bytes = read_bytes.min(self.total_bytes);
        self.tell(Stage::Judging);
    }

    fn merged(&mut self, keys: u64, keys_all: u64) {
        (self.tell)(PrepareEvent::Merging { keys, keys_all });
    }

    fn compared(&mut self, copies: u64) {
        self.kept -= copies.min(self.kept);
        self.read_bytes = self.total_bytes;
        self.tell(Stage::Comparing);
    }

    fn tell(&mut self, stage: Stage) {
        let seconds = self.begun.elapsed().as_secs_f64();
        (self.tell)(PrepareEvent::Refining {
            stage,
            percent: 100.0 * self.read_bytes as f64 / self.total_bytes.max(1) as f64,
            documents: self.documents,
            kept: self.kept,
            text_bytes: self.text_bytes,
            mb_per_s: self.text_bytes_now as f64 / 1e6 / seconds.max(1e-6),
        });
    }
}
