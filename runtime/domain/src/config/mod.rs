//! The config schema: one TOML file, every key known, every size checked, each refusal naming its key and its remedy.
//!
//! Sections that decide numbers ([`Config::identity`]) are apart from those that only decide when and where.

mod sections;
mod validate;

pub use sections::{
    BatchConfig, CheckpointConfig, ClusterConfig, ControllerKind, DataConfig, DomainConfig, EvaluationConfig,
    FaultConfig, Language, LearningRateSchedule, MixtureConfig, ModelConfig, OptimizerConfig, RunConfig, SourceFormat,
    TelemetryConfig, TokenizerConfig,
};

use crate::limits::Timeouts;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A refused config: which key, why, and what to do. The caller reconfigures; it never retries.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {reason}; {remedy}")]
pub struct ConfigError {
    /// Dotted key, file or option at fault.
    pub key: String,
    /// What is wrong with it.
    pub reason: String,
    /// What to do about it.
    pub remedy: String,
}

impl ConfigError {
    pub(crate) fn new(key: impl Into<String>, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            reason: reason.into(),
            remedy: remedy.into(),
        }
    }
}

/// A whole run, as configured.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name, seed, length.
    pub run: RunConfig,
    /// The model's shape.
    pub model: ModelConfig,
    /// The global batch.
    pub batch: BatchConfig,
    /// AdamW, its schedule and its shards.
    pub optimizer: OptimizerConfig,
    /// Domains and tokenizer.
    pub data: DataConfig,
    /// Who sets the mixture.
    #[serde(default)]
    pub mixture: MixtureConfig,
    /// Held-out evaluation.
    #[serde(default)]
    pub evaluation: EvaluationConfig,
    /// Where and how often to checkpoint.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// Ranks and threads.
    #[serde(default)]
    pub cluster: ClusterConfig,
    /// Failure handling.
    #[serde(default)]
    pub fault: FaultConfig,
    /// Traces and metrics.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
}

impl Config {
    /// Reads `path`, applies `key=value` overrides, resolves relative paths against the file's folder, and validates.
    ///
    /// # Errors
    /// A [`ConfigError`] naming the key or the file.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            ConfigError::new(
                path.display().to_string(),
                format!("cannot be read ({e})"),
                "give the path of a config file",
            )
        })?;
        let folder = path
            .parent()
            .filter(|p| !p.as_os_str().is_empty())
            .unwrap_or_else(|| Path::new("."));
        Self::parse(&text, &path.display().to_string(), overrides, folder)
    }

    /// Like [`Config::load`], from text; `name` stands for the file in messages.
    ///
    /// # Errors
    /// A [`ConfigError`] naming the key.
    pub fn parse(text: &str, name: &str, overrides: &[String], folder: &Path) -> Result<Self, ConfigError> {
        let remedy = "correct the file; README.md explains each key";
        let mut table: toml::Table =
            toml::from_str(text).map_err(|e| ConfigError::new(name, e.to_string().trim_end().to_owned(), remedy))?;
        for item in overrides {
            apply_override(&mut table, item)?;
        }
        let source = if overrides.is_empty() {
            text.to_owned()
        } else {
            table.to_string()
        };
        let mut config: Self =
            toml::from_str(&source).map_err(|e| ConfigError::new(name, e.to_string().trim_end().to_owned(), remedy))?;
        config.resolve(folder);
        config.validate()?;
        Ok(config)
    }

    /// Checks every size and relation.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn validate(&self) -> Result<(), ConfigError> {
        validate::validate(self)
    }

    /// The resolved config as TOML, as written to `config.toml` of the run folder.
    ///
    /// # Errors
    /// If a value has no TOML form (it always has, for a validated config).
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        toml::to_string_pretty(self).map_err(|e| {
            ConfigError::new(
                "config",
                format!("cannot be written as TOML ({e})"),
                "report this as a bug",
            )
        })
    }

    /// All timeouts, derived from `fault.timeout_ms`.
    #[must_use]
    pub const fn timeouts(&self) -> Timeouts {
        Timeouts::derive(self.fault.timeout_ms)
    }

    /// The sections that decide numbers, as canonical JSON-like text: two runs with equal identity, data, binary and
    /// device type write the same trace. Paths, placement, checkpoint cadence and stop point are left out.
    #[must_use]
    pub fn identity(&self) -> String {
        let data: Vec<_> = self
            .data
            .domains
            .iter()
            .map(|d| format!("{}:{:?}:{}", d.name, d.language, d.weight))
            .collect();
        format!(
            "seed={:?};model={:?};batch={:?};optimizer=({:?});tokenizer={:?};held_out={:?};domains={:?};mixture={:?};evaluation={:?}",
            self.run.seed,
            self.model,
            self.batch,
            self.optimizer.identity(),
            (self.data.tokenizer.vocabulary, self.data.tokenizer.train_bytes_max),
            self.data.held_out_fraction,
            data,
            self.mixture,
            self.evaluation,
        )
    }

    /// Tokens in one global batch.
    #[must_use]
    pub const fn tokens_per_step(&self) -> u64 {
        self.batch.lanes as u64 * self.batch.sequences_per_lane as u64 * self.model.context as u64
    }

    fn resolve(&mut self, folder: &Path) {
        for domain in &mut self.data.domains {
            domain.path = folder.join(&domain.path);
        }
        if let Some(path) = &mut self.data.tokenizer.path {
            *path = folder.join(&*path);
        }
        let steps = self.run.steps;
        self.optimizer.schedule.fill_decay_steps(steps);
        if self.run.dir.as_os_str().is_empty() {
            self.run.dir = PathBuf::from("runs").join(&self.run.name);
        }
    }
}

fn apply_override(table: &mut toml::Table, item: &str) -> Result<(), ConfigError> {
    let remedy = "write --set section.key=value";
    let Some((key, value)) = item.split_once('=') else {
        return Err(ConfigError::new(format!("--set {item}"), "has no '='", remedy));
    };
    let value = parse_value(value.trim());
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let last = parts.pop().filter(|part| !part.is_empty());
    let Some(last) = last else {
        return Err(ConfigError::new(format!("--set {item}"), "names no key", remedy));
    };
    let mut here = table;
    for part in parts {
        let entry = here
            .entry(part)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()));
        let toml::Value::Table(inner) = entry else {
            return Err(ConfigError::new(
                format!("--set {item}"),
                format!("'{part}' is not a section"),
                remedy,
            ));
        };
        here = inner;
    }
    here.insert(last.to_owned(), value);
    Ok(())
}

/// A TOML value where the text is one, a string otherwise.
fn parse_value(text: &str) -> toml::Value {
    toml::from_str::<toml::Table>(&format!("v = {text}"))
        .ok()
        .and_then(|mut table| table.remove("v"))
        .unwrap_or_else(|| toml::Value::String(text.to_owned()))
}
