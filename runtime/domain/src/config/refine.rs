//! `[data.refine]`: what is done to text before it becomes tokens. A config without the section leaves its text as it is.
//!
//! `memory_bytes_max` decides how the work is cut up and nothing else; all other keys decide which text is kept.

use super::{ConfigError, DomainConfig};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::PathBuf;

/// `[data.refine]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RefineConfig {
    /// Bytes that the pipeline's buffers take together, whatever the size of the input; what does not fit goes through
    /// sorted files.
    pub memory_bytes_max: u64,
    /// A longer document, in UTF-8 bytes, is left out and counted.
    pub document_bytes_max: u64,
    /// Language identification.
    pub language: LanguageFilterConfig,
    /// Quality rules.
    pub quality: QualityConfig,
    /// Exact and near copies.
    pub duplicates: DuplicatesConfig,
    /// Benchmark sets whose text must not be trained on.
    pub decontaminate: DecontaminateConfig,
}

impl Default for RefineConfig {
    fn default() -> Self {
        Self {
            memory_bytes_max: 1 << 30,
            document_bytes_max: 16 << 20,
            language: LanguageFilterConfig::default(),
            quality: QualityConfig::default(),
            duplicates: DuplicatesConfig::default(),
            decontaminate: DecontaminateConfig::default(),
        }
    }
}

/// `[data.refine.language]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LanguageFilterConfig {
    /// Whether documents in another language than their domain's are left out; `code` domains never ask.
    pub enabled: bool,
    /// Share of a document's windows that must be in its domain's language.
    pub share_min: f64,
    /// Domains, by name, that are not asked.
    pub exempt: Vec<String>,
}

impl Default for LanguageFilterConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            share_min: 0.5,
            exempt: Vec::new(),
        }
    }
}

/// `[data.refine.quality]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QualityConfig {
    /// Whether quality rules are applied to `en` and `zh` domains.
    pub enabled: bool,
    /// Domains, by name, that they are not applied to (verse, word lists, tables).
    pub exempt: Vec<String>,
    /// Rules, by name, that are not applied at all.
    pub off: Vec<String>,
}

impl Default for QualityConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            exempt: Vec::new(),
            off: Vec::new(),
        }
    }
}

/// How far a copy may be from its first occurrence to be one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DuplicateScope {
    /// Anywhere in the data set; the first domain in the config keeps it.
    #[default]
    Across,
    /// In the same domain.
    Within,
    /// Copies are not looked for.
    Off,
}

/// `[data.refine.duplicates]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DuplicatesConfig {
    /// Copies of the same normalised text.
    pub exact: DuplicateScope,
    /// Copies by MinHash.
    pub near: DuplicateScope,
    /// MinHash bands. Two documents of Jaccard similarity s meet with probability `1 - (1 - s^rows)^bands`.
    pub bands: u32,
    /// MinHash values in a band.
    pub rows: u32,
    /// Words in a shingle.
    pub words: u32,
    /// Characters in a shingle of text without spaces between words.
    pub characters: u32,
}

impl Default for DuplicatesConfig {
    fn default() -> Self {
        Self {
            exact: DuplicateScope::Across,
            near: DuplicateScope::Across,
            bands: 14,
            rows: 8,
            words: 5,
            characters: 8,
        }
    }
}

/// `[data.refine.decontaminate]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DecontaminateConfig {
    /// Words in a row that give a benchmark's item away.
    pub words: u32,
    /// Han characters in a row that do, in text without spaces.
    pub han_characters: u32,
    /// Letters and digits in a row that do, whatever stands between them: finds words that were joined or cut.
    pub letters: u32,
    /// The benchmark sets.
    pub sets: Vec<BenchmarkConfig>,
}

impl Default for DecontaminateConfig {
    fn default() -> Self {
        Self {
            words: 13,
            han_characters: 20,
            letters: 50,
            sets: Vec::new(),
        }
    }
}

/// `[[data.refine.decontaminate.sets]]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BenchmarkConfig {
    /// Name in reports.
    pub name: String,
    /// JSON lines, or text with an item a line; relative to the config file.
    pub path: PathBuf,
    /// JSON fields that hold text, each looked for by itself; every string of the object where none is named.
    #[serde(default)]
    pub fields: Vec<String>,
}

/// Least memory that the pipeline runs in.
const MEMORY_BYTES_MIN: u64 = 16 << 20;
/// Documents in flight, in documents of the largest size: raw and refined, being read, worked on and written.
const DOCUMENTS_IN_MEMORY: u64 = 8;
/// MinHash values of a document.
const HASHES_MAX: u64 = 1024;

impl RefineConfig {
    /// Checks every size and name; `domains` are those of the config.
    pub(super) fn validate(&self, domains: &[DomainConfig]) -> Result<(), ConfigError> {
        let key = |name: &str| format!("data.refine.{name}");
        let within = |name: &str, value: u64, range: std::ops::RangeInclusive<u64>, remedy: &str| {
            if range.contains(&value) {
                return Ok(());
            }
            let reason = format!("{value} is not in {}..={}", range.start(), range.end());
            Err(ConfigError::new(key(name), reason, remedy))
        };
        within(
            "document_bytes_max",
            self.document_bytes_max,
            1..=256 << 20,
            "choose e.g. 16777216",
        )?;
        let memory_min = MEMORY_BYTES_MIN.max(DOCUMENTS_IN_MEMORY * self.document_bytes_max);
        within(
            "memory_bytes_max",
            self.memory_bytes_max,
            memory_min..=1 << 44,
            "raise it, or lower data.refine.document_bytes_max, of which it holds eight",
        )?;
        if !(0.0..=1.0).contains(&self.language.share_min) {
            let reason = format!("{} is not in 0..=1", self.language.share_min);
            return Err(ConfigError::new(key("language.share_min"), reason, "choose e.g. 0.5"));
        }
        for (name, exempt) in [
            ("language.exempt", &self.language.exempt),
            ("quality.exempt", &self.quality.exempt),
        ] {
            if let Some(unknown) = exempt.iter().find(|name| domains.iter().all(|d| d.name != **name)) {
                let reason = format!("'{unknown}' is no domain");
                return Err(ConfigError::new(key(name), reason, "name domains of data.domains"));
            }
        }
        let copies = &self.duplicates;
        let hashes = u64::from(copies.bands) * u64::from(copies.rows);
        let remedy = "choose e.g. 14 bands of 8 rows: half of the pairs of similarity 0.68 meet";
        within("duplicates.bands", copies.bands.into(), 1..=HASHES_MAX, remedy)?;
        within("duplicates.rows", copies.rows.into(), 1..=HASHES_MAX, remedy)?;
        within(
            "duplicates.bands * data.refine.duplicates.rows",
            hashes,
            1..=HASHES_MAX,
            remedy,
        )?;
        within("duplicates.words", copies.words.into(), 1..=64, "choose e.g. 5")?;
        within(
            "duplicates.characters",
            copies.characters.into(),
            1..=64,
            "choose e.g. 8",
        )?;
        let clean = &self.decontaminate;
        within("decontaminate.words", clean.words.into(), 8..=64, "choose e.g. 13")?;
        within(
            "decontaminate.han_characters",
            clean.han_characters.into(),
            12..=256,
            "choose e.g. 20",
        )?;
        within(
            "decontaminate.letters",
            clean.letters.into(),
            30..=256,
            "choose e.g. 50",
        )?;
        let mut seen = BTreeSet::new();
        for set in &clean.sets {
            if set.name.is_empty() || !seen.insert(&set.name) {
                let reason = format!("'{}' is empty, or names two sets", set.name);
                let remedy = "give each set a name of its own";
                return Err(ConfigError::new(key("decontaminate.sets.name"), reason, remedy));
            }
        }
        Ok(())
    }
}
