//! The config schema: one TOML file, every key known, every size checked, each refusal naming its key and its remedy.
//!
//! Sections that decide numbers ([`Config::identity`]) are apart from those that only decide when and where.

mod batch;
mod data_file;
mod initial;
mod interval;
mod later;
mod loops;
mod loops_check;
mod model;
mod nodes;
mod reading;
mod refine;
mod sections;
mod validate;

pub use batch::{BatchRamp, BatchSchedule};
pub use data_file::DataFile;
pub use initial::InitialConfig;
pub use interval::CheckpointInterval;
pub use later::LaterConfig;
pub use loops::{ControllerKind, MixtureConfig, MixtureStage, PolicyConfig, SpikePolicy, StageStart, StopRules};
pub use nodes::NodeConfig;
pub use refine::{
    BenchmarkConfig, DecontaminateConfig, DuplicateScope, DuplicatesConfig, LanguageFilterConfig, QualityConfig,
    RefineConfig,
};
pub use sections::{
    BatchConfig, CheckpointConfig, ClusterCollective, ClusterConfig, ClusterDevice, ClusterTransport, DataConfig,
    DecayShape, DomainConfig, EvaluationConfig, FaultConfig, Language, LearningRateSchedule, ModelConfig,
    MonitorConfig, OptimizerConfig, RunConfig, SourceFormat, TelemetryConfig, TokenizerConfig,
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
    /// What else the closed loop decides.
    #[serde(default, skip_serializing_if = "PolicyConfig::is_default")]
    pub policy: PolicyConfig,
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
    /// What is looked at besides.
    #[serde(default, skip_serializing_if = "MonitorConfig::is_default")]
    pub monitor: MonitorConfig,
    /// Traces and metrics.
    #[serde(default)]
    pub telemetry: TelemetryConfig,
}

impl Config {
    /// Reads `path`, applies `key=value` overrides, makes every path absolute, and validates. Sources are relative to the
    /// file's folder; run folder and store, to which a run writes, to the working directory. What is loaded loads back
    /// the same from its [`Config::to_toml`] in any folder.
    ///
    /// # Errors
    /// A [`ConfigError`] naming the key or the file.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        Self::load_for(path, overrides, None)
    }

    /// As [`Config::load`], for a world of so many ranks: shards then have as many copies as fit into it, unless an override
    /// says how many.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load_for(path: &Path, overrides: &[String], ranks: Option<u32>) -> Result<Self, ConfigError> {
        let text = reading::text_of(path, "give the path of a config file")?;
        let folder = path
            .parent()
            .filter(|p| !p.as_os_str().is_empty())
            .unwrap_or_else(|| Path::new("."));
        Self::parse_for(&text, &path.display().to_string(), overrides, folder, ranks)
    }

    /// Like [`Config::load`], from text; `name` stands for the file in messages.
    ///
    /// # Errors
    /// A [`ConfigError`] naming the key.
    pub fn parse(text: &str, name: &str, overrides: &[String], folder: &Path) -> Result<Self, ConfigError> {
        Self::parse_for(text, name, overrides, folder, None)
    }

    fn parse_for(
        text: &str,
        name: &str,
        overrides: &[String],
        folder: &Path,
        ranks: Option<u32>,
    ) -> Result<Self, ConfigError> {
        let mut config: Self = reading::Source::new(text, name, overrides)?.read()?;
        config.resolve(folder)?;
        if let Some(ranks) = ranks {
            config.cluster.ranks = ranks;
            let is_replicas = |item: &String| {
                item.split_once('=')
                    .is_some_and(|(key, _)| key.trim() == "optimizer.replicas")
            };
            if !overrides.iter().any(is_replicas) {
                config.optimizer.replicas = config.optimizer.replicas.min(ranks.max(1));
            }
        }
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
        let later: Vec<String> = self.data.later.iter().map(LaterConfig::identity).collect();
        let later = if later.is_empty() {
            String::new()
        } else {
            format!(";later={later:?}")
        };
        format!(
            "seed={:?};model={};batch={};optimizer=({:?});tokenizer={:?};held_out={:?};domains={:?};mixture={};evaluation={:?}{}{later}",
            self.run.seed,
            self.model.identity(),
            self.batch.identity(),
            self.optimizer.identity(),
            (self.data.tokenizer.vocabulary, self.data.tokenizer.train_bytes_max),
            self.data.held_out_fraction,
            data,
            self.mixture.identity(),
            self.evaluation,
            self.policy.identity(),
        )
    }

    /// Sequences of the global batch, by step.
    #[must_use]
    pub fn batch_schedule(&self) -> BatchSchedule {
        BatchSchedule::of(&self.batch)
    }

    /// Tokens in one full global batch.
    #[must_use]
    pub const fn tokens_per_step(&self) -> u64 {
        self.batch.lanes as u64 * self.batch.sequences_per_lane as u64 * self.model.context as u64
    }

    /// Sets the run folder, as `--run-dir` does.
    ///
    /// # Errors
    /// A [`ConfigError`] naming `run.dir` where the path cannot be made absolute.
    pub fn set_dir(&mut self, dir: &Path) -> Result<(), ConfigError> {
        self.run.dir = absolute("run.dir", dir)?;
        Ok(())
    }

    fn resolve(&mut self, folder: &Path) -> Result<(), ConfigError> {
        self.data.resolve(folder)?;
        if let Some(initial) = &mut self.model.initial {
            initial.resolve(folder)?;
        }
        let steps = self.run.steps;
        self.optimizer.schedule.fill_decay_steps(steps);
        let dir = if self.run.dir.as_os_str().is_empty() {
            Path::new("runs").join(&self.run.name)
        } else {
            self.run.dir.clone()
        };
        self.set_dir(&dir)?;
        let store = self.checkpoint.store.trim();
        self.checkpoint.store = if store.is_empty() || store.contains("://") {
            store.to_owned()
        } else {
            let folder = absolute("checkpoint.store", Path::new(store))?;
            folder.to_string_lossy().into_owned()
        };
        Ok(())
    }
}

/// The path from the root, as a config file can hold it: in UTF-8. Links and `..` stay as they are.
fn absolute(key: &str, path: &Path) -> Result<PathBuf, ConfigError> {
    let remedy = "start in another folder, or give the path from the root";
    let path = std::path::absolute(path)
        .map_err(|e| ConfigError::new(key, format!("cannot be made absolute ({e})"), remedy))?;
    if path.to_str().is_none() {
        let reason = format!("{} is not UTF-8", path.display());
        return Err(ConfigError::new(key, reason, "rename the folder, or name another path"));
    }
    Ok(path)
}
