//! The sections of a config. Units and qualifiers stand last in each name.

use super::{BatchRamp, CheckpointInterval, InitialConfig, LaterConfig, NodeConfig, RefineConfig};
use crate::ids::StepsCompleted;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::path::PathBuf;

/// `[run]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Name of the run; the default run folder is `runs/<name>`.
    pub name: String,
    /// Seed of initial weights and sample order.
    pub seed: u64,
    /// Optimizer updates in all.
    pub steps: u64,
    /// Run folder, relative to the working directory; empty for the default.
    #[serde(default)]
    pub dir: PathBuf,
}

/// `[model]`: an Aquila2-architecture decoder (arXiv 2408.07410, Table 1).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Decoder layers.
    pub layers: usize,
    /// Hidden size.
    pub hidden: usize,
    /// Inner size of the SwiGLU MLP.
    pub ffn: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; equal to `heads` for plain multi-head attention.
    pub kv_heads: usize,
    /// Context length in tokens.
    pub context: usize,
    /// Rows of the embedding and of the head.
    pub vocabulary: usize,
    /// RoPE base.
    #[serde(default = "rope_theta")]
    pub rope_theta: f64,
    /// RMSNorm epsilon.
    #[serde(default = "norm_eps")]
    pub norm_eps: f64,
    /// Standard deviation of initial weights.
    pub init_std: f64,
    /// Initial value of norm weights.
    #[serde(default = "one")]
    pub norm_init: f64,
    /// Weights to begin with, instead of those of the seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial: Option<InitialConfig>,
}

impl ModelConfig {
    /// Elements of one head.
    #[must_use]
    pub const fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// Parameters: untied embeddings, no biases, grouped-query attention, SwiGLU. None where a `u64` does not hold them or
    /// there is no head.
    #[must_use]
    pub fn parameter_count(&self) -> Option<u64> {
        let [layers, hidden, ffn] = [self.layers, self.hidden, self.ffn].map(|size| size as u64);
        let kv_width = (self.kv_heads as u64).checked_mul(hidden.checked_div(self.heads as u64)?)?;
        let attention = hidden.checked_mul(hidden.checked_add(kv_width)?)?.checked_mul(2)?;
        let mlp = hidden.checked_mul(ffn)?.checked_mul(3)?;
        let norms = hidden.checked_mul(2)?;
        let layer = attention.checked_add(mlp)?.checked_add(norms)?;
        let embeddings = (self.vocabulary as u64).checked_mul(hidden)?.checked_mul(2)?;
        layers.checked_mul(layer)?.checked_add(embeddings)?.checked_add(hidden)
    }
}

const fn rope_theta() -> f64 {
    10_000.0
}
const fn norm_eps() -> f64 {
    1e-5
}
const fn one() -> f64 {
    1.0
}

/// `[batch]`: the global batch is `lanes × sequences_per_lane` sequences of `model.context` tokens.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchConfig {
    /// Fixed slices of the global batch; at least the largest world size.
    pub lanes: u32,
    /// Sequences of one lane.
    pub sequences_per_lane: u32,
    /// Sequences of one micro-batch; divides `sequences_per_lane`.
    pub micro_batch_sequences: u32,
    /// The batch begins smaller and grows to its full size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ramp: Option<BatchRamp>,
}

impl BatchConfig {
    /// The part that decides numbers. A key that came later says nothing where it is absent, so that a run folder of before
    /// stays that of its run.
    #[must_use]
    pub fn identity(&self) -> String {
        let Self {
            lanes,
            sequences_per_lane,
            micro_batch_sequences,
            ramp,
        } = self;
        let ramp = ramp.map_or_else(String::new, |ramp| format!(", ramp: {ramp:?}"));
        format!(
            "BatchConfig {{ lanes: {lanes}, sequences_per_lane: {sequences_per_lane}, \
             micro_batch_sequences: {micro_batch_sequences}{ramp} }}"
        )
    }
}

/// `[optimizer]`: AdamW with global-norm clipping.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Its course.
    #[serde(default)]
    pub schedule: LearningRateSchedule,
    /// First-moment decay.
    #[serde(default = "beta1")]
    pub beta1: f64,
    /// Second-moment decay.
    #[serde(default = "beta2")]
    pub beta2: f64,
    /// Denominator epsilon.
    #[serde(default = "adam_eps")]
    pub eps: f64,
    /// Decoupled weight decay; not on norm weights.
    #[serde(default = "weight_decay")]
    pub weight_decay: f64,
    /// Global gradient norm is clipped to this.
    #[serde(default = "one")]
    pub clip_norm: f64,
    /// Elements of a fixed block: the unit of norm partials and hashes.
    #[serde(default = "block_elements")]
    pub block_elements: usize,
    /// Optimizer shards at most; independent of the world size.
    #[serde(default = "shards")]
    pub shards: usize,
    /// Copies of each optimizer shard, its primary included.
    #[serde(default = "replicas")]
    pub replicas: u32,
}

impl OptimizerConfig {
    /// The part that decides numbers: everything but the number of shards and copies.
    #[must_use]
    pub fn identity(&self) -> String {
        format!(
            "{:?}",
            (
                self.learning_rate,
                &self.schedule,
                self.beta1,
                self.beta2,
                self.eps,
                self.weight_decay,
                self.clip_norm,
                self.block_elements
            )
        )
    }
}

const fn beta1() -> f64 {
    0.9
}
const fn beta2() -> f64 {
    0.95
}
const fn adam_eps() -> f64 {
    1e-8
}
const fn weight_decay() -> f64 {
    0.1
}
const fn block_elements() -> usize {
    65_536
}
const fn shards() -> usize {
    16
}
const fn replicas() -> u32 {
    2
}

/// Course of the learning rate, by step.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "kind", rename_all = "snake_case")]
pub enum LearningRateSchedule {
    /// Linear warm-up, then cosine to `final_fraction` of the peak at `decay_steps`, then level.
    Cosine {
        /// Steps of linear warm-up.
        warmup_steps: u64,
        /// Step at which the cosine ends; `run.steps` of the file where it is absent.
        #[serde(default)]
        decay_steps: u64,
        /// Final over peak rate.
        final_fraction: f64,
    },
    /// Linear warm-up, then level.
    Constant {
        /// Steps of linear warm-up.
        warmup_steps: u64,
    },
    /// Warm-up, stable, decay (arXiv 2404.06395): linear warm-up, then level, and in the end a decay to `final_fraction`
    /// that begins at a step of the config, or where a decision says so.
    Wsd {
        /// Steps of linear warm-up.
        warmup_steps: u64,
        /// The first step of the decay; where it is absent, a decision begins it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        decay_from: Option<u64>,
        /// Steps of the decay.
        decay_steps: u64,
        /// Final over peak rate.
        final_fraction: f64,
        /// Course of the decay.
        #[serde(default)]
        shape: DecayShape,
    },
}

/// Course of the decay of [`LearningRateSchedule::Wsd`], with `x` the share of it that is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecayShape {
    /// `1 - x`.
    #[default]
    Linear,
    /// `1 - √x`: the best of those compared in arXiv 2405.18392, section 3.
    Sqrt,
}

impl Default for LearningRateSchedule {
    fn default() -> Self {
        Self::Cosine {
            warmup_steps: 100,
            decay_steps: 0,
            final_fraction: 0.1,
        }
    }
}

impl LearningRateSchedule {
    pub(crate) fn fill_decay_steps(&mut self, steps: u64) {
        if let Self::Cosine { decay_steps, .. } = self
            && *decay_steps == 0
        {
            *decay_steps = steps;
        }
    }

    /// Whether a decision may begin the decay: where the schedule has one, and the config does not say when.
    #[must_use]
    pub const fn decays_on_demand(&self) -> bool {
        matches!(self, Self::Wsd { decay_from: None, .. })
    }

    /// The first step of the decay of a `wsd` schedule, by the config or else as decided.
    #[must_use]
    pub fn decays_from(&self, decided: Option<u64>) -> Option<u64> {
        match *self {
            Self::Wsd { decay_from, .. } => decay_from.or(decided),
            Self::Cosine { .. } | Self::Constant { .. } => None,
        }
    }

    /// Learning rate over its peak for the step with index `step` (from 0), where no decision changes it.
    #[must_use]
    pub fn fraction(&self, step: u64) -> f64 {
        self.fraction_with(step, None)
    }

    /// The same, where a decision lets the decay begin at step `decided`; a schedule that needs none leaves it alone. It
    /// stands in the trace, so its cosine is compiled in: a C library's differs in its last bits between processors and
    /// versions (DET-1).
    #[must_use]
    pub fn fraction_with(&self, step: u64, decided: Option<u64>) -> f64 {
        let (Self::Cosine { warmup_steps, .. } | Self::Constant { warmup_steps } | Self::Wsd { warmup_steps, .. }) =
            *self;
        if step < warmup_steps {
            return (step + 1) as f64 / warmup_steps as f64;
        }
        match *self {
            Self::Constant { .. } => 1.0,
            Self::Cosine {
                decay_steps,
                final_fraction,
                ..
            } => {
                let span = decay_steps.saturating_sub(warmup_steps).max(1);
                let done = ((step - warmup_steps) as f64 / span as f64).min(1.0);
                final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + libm::cos(std::f64::consts::PI * done))
            }
            Self::Wsd {
                decay_steps,
                final_fraction,
                shape,
                ..
            } => {
                let from = self.decays_from(decided);
                let Some(into) = from.and_then(|from| step.checked_sub(from)) else {
                    return 1.0;
                };
                // The first step of the decay is lower already, and the last one of it the lowest.
                let done = ((into + 1) as f64 / decay_steps.max(1) as f64).min(1.0);
                let left = match shape {
                    DecayShape::Linear => 1.0 - done,
                    DecayShape::Sqrt => 1.0 - libm::sqrt(done),
                };
                final_fraction + (1.0 - final_fraction) * left
            }
        }
    }
}

/// `[data]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// How text becomes tokens.
    #[serde(default)]
    pub tokenizer: TokenizerConfig,
    /// Share of each domain's documents that is held out of training.
    #[serde(default = "held_out_fraction")]
    pub held_out_fraction: f64,
    /// A folder that `tarazed data prepare` wrote; the domains' own files are not looked at then. Relative to the config
    /// file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepared: Option<PathBuf>,
    /// What is done to text before it becomes tokens; nothing where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refine: Option<RefineConfig>,
    /// The domains, in a fixed order.
    pub domains: Vec<DomainConfig>,
    /// What comes while the run trains, in the order of its steps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub later: Vec<LaterConfig>,
}

const fn held_out_fraction() -> f64 {
    0.03
}

/// `[data.tokenizer]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizerConfig {
    /// A ready `tokenizer.json`; trained on the domains' text where it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Entries of a trained tokenizer, specials included; 0 means `model.vocabulary`.
    pub vocabulary: usize,
    /// Training text is sampled down to this many bytes.
    pub train_bytes_max: u64,
}

impl Default for TokenizerConfig {
    fn default() -> Self {
        Self {
            path: None,
            vocabulary: 0,
            train_bytes_max: 64 * 1024 * 1024,
        }
    }
}

/// `[[data.domains]]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DomainConfig {
    /// Unique name, e.g. `wiki`.
    pub name: String,
    /// File or folder; relative to the config file. Not needed with `data.prepared`.
    #[serde(default)]
    pub path: PathBuf,
    /// How to read it; by file ending where it is absent.
    #[serde(default)]
    pub format: SourceFormat,
    /// Language, for reports per language.
    pub language: Language,
    /// Weight in the initial mixture; weights are normalised.
    pub weight: f64,
    /// JSON or parquet field that holds the text.
    #[serde(default = "text_field")]
    pub text_field: String,
}

fn text_field() -> String {
    "text".to_owned()
}

/// Format of a domain's source.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceFormat {
    /// By file ending: `.jsonl`, `.parquet`, each also with `.gz` or `.zst` behind it but for parquet; anything else in a
    /// folder is text.
    #[default]
    Auto,
    /// One JSON object a line.
    Jsonl,
    /// Apache Parquet with a string column.
    Parquet,
    /// A folder of UTF-8 files, one document each.
    Text,
    /// Tokens as Megatron keeps them: `NAME.bin` with `NAME.idx` beside it.
    Megatron,
    /// Tokens as llm.c keeps them.
    Llmc,
}

impl SourceFormat {
    /// Whether its files hold tokens instead of text.
    #[must_use]
    pub const fn is_tokens(self) -> bool {
        matches!(self, Self::Megatron | Self::Llmc)
    }
}

/// Language of a domain, for reports.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Language {
    /// English.
    En,
    /// Chinese.
    Zh,
    /// Program text.
    Code,
}

impl Language {
    /// The name in config files and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::En => "en",
            Self::Zh => "zh",
            Self::Code => "code",
        }
    }

    /// The language with this name; none where there is none.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::En, Self::Zh, Self::Code]
            .into_iter()
            .find(|language| language.name() == name)
    }
}

/// `[evaluation]`: held-out loss, as part of a step and so of the trace.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluationConfig {
    /// Steps between evaluations; 0 for none. Every line of the trace whose step is a multiple of it holds one, of the
    /// weights before that step.
    pub interval_steps: u64,
    /// Held-out sequences per domain at most.
    pub sequences_per_domain_max: u32,
}

impl Default for EvaluationConfig {
    fn default() -> Self {
        Self {
            interval_steps: 100,
            sequences_per_domain_max: 16,
        }
    }
}

/// `[checkpoint]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Object store URL (`file://…`, `s3://bucket/prefix`, …) or a folder, relative to the working directory; empty for
    /// `store/` in the run folder.
    pub store: String,
    /// Steps between checkpoints; 0 for none but the last.
    pub interval_steps: u64,
    /// How often by the clock, besides: `"off"`, `"auto"` (Young and Daly), or a time such as `"10m"`.
    pub interval: CheckpointInterval,
    /// Newest checkpoints to keep.
    pub keep_last: u32,
    /// The first checkpoint at or after every multiple of this step is kept, too; 0 for none.
    pub keep_every_steps: u64,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self {
            store: String::new(),
            interval_steps: 100,
            interval: CheckpointInterval::Off,
            keep_last: 3,
            keep_every_steps: 0,
        }
    }
}

/// What the processes of a run talk over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClusterTransport {
    /// Unix sockets in a folder that only the run's user can enter.
    #[default]
    Unix,
    /// TCP: on loopback, where a proxy can stand between, or between hosts.
    Tcp,
}

/// What ranks compute on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClusterDevice {
    /// A CUDA device where this machine has one that can be used, else the processors. Resolved when a run starts.
    Auto,
    /// The processors, in f32. The default as long as no run on a GPU has been seen.
    #[default]
    Cpu,
    /// CUDA devices, in bf16; refused where there is none.
    Cuda,
}

/// What carries the memory of CUDA devices between ranks. Small messages, and everything between ranks on processors, go over
/// [`ClusterTransport`] whatever this says; it decides no number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClusterCollective {
    /// NCCL in a generation whose ranks all have it and a GPU of their own, else sockets.
    Auto,
    /// Sockets, through the host. The default until a GPU has run NCCL for us.
    #[default]
    Sockets,
    /// NCCL; a generation in which a rank has none, or shares its GPU, is an error.
    Nccl,
}

/// `[cluster]`: placement, which decides no number, but for `device`: the device's type is part of what a run's numbers
/// follow from, and is declared where it changes (DET-4).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterConfig {
    /// Rank processes.
    pub ranks: u32,
    /// Processes held ready beside them, to take a lost rank's place at once.
    pub spares: u32,
    /// Compute threads of each rank; results do not depend on it.
    pub threads_per_rank: u32,
    /// What ranks compute on. Worker k takes the CUDA device of number k modulo their count.
    pub device: ClusterDevice,
    /// What carries the memory of CUDA devices between ranks.
    pub collective: ClusterCollective,
    /// Lets several ranks on one GPU use NCCL, which refuses them otherwise: slow, and meant for tests.
    pub share_gpus: bool,
    /// Sockets of the data plane and of the control plane.
    pub transport: ClusterTransport,
    /// Worker k's data plane listens at this TCP port plus k; 0 for ports that the system chooses.
    pub mesh_port: u16,
    /// The ports that other ranks dial instead, where something forwards them; 0 for those listened at.
    pub mesh_advertise_port: u16,
    /// The controller listens for its ranks at this TCP port; 0 for one that the system chooses.
    pub control_port: u16,
    /// The port that ranks dial instead; 0 for the one listened at.
    pub control_advertise_port: u16,
    /// Where the controller's host is found by the others; needed where there are `nodes`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// The controller listens for its nodes at this TCP port; 0 for one that the system chooses.
    pub node_port: u16,
    /// The hosts that ranks run on, in order of workers. None: all of them on this machine, started by the controller itself.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<NodeConfig>,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            ranks: 1,
            spares: 0,
            threads_per_rank: 1,
            device: ClusterDevice::Cpu,
            collective: ClusterCollective::default(),
            share_gpus: false,
            transport: ClusterTransport::Unix,
            mesh_port: 0,
            mesh_advertise_port: 0,
            control_port: 0,
            control_advertise_port: 0,
            address: None,
            node_port: 0,
            nodes: Vec::new(),
        }
    }
}

/// `[fault]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FaultConfig {
    /// The one timeout; all others derive from it.
    pub timeout_ms: u64,
    /// Starts of one worker without a committed step between them, before the run halts (SUP-3).
    pub restarts_max: u32,
    /// First wait before a restart; doubles with each further one.
    pub restart_backoff_ms: u64,
    /// Steps between audits: another rank computes one lane again and compares (DET-3); 0 for none.
    pub audit_interval_steps: u64,
}

impl Default for FaultConfig {
    fn default() -> Self {
        Self {
            timeout_ms: 10_000,
            restarts_max: 5,
            restart_backoff_ms: 100,
            audit_interval_steps: 50,
        }
    }
}

/// `[monitor]`: what is looked at besides. It decides no number and belongs to no run's identity.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MonitorConfig {
    /// Steps between lines of `weights.jsonl`, the spread of the weights by layer; 0 for none.
    pub weights_interval_steps: u64,
}

impl Default for MonitorConfig {
    fn default() -> Self {
        Self {
            weights_interval_steps: 100,
        }
    }
}

impl MonitorConfig {
    /// Whether nothing of it is set.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the weights after so many updates are looked at.
    #[must_use]
    pub const fn weighs(&self, step: StepsCompleted) -> bool {
        self.weights_interval_steps > 0 && step.0 > 0 && step.0.is_multiple_of(self.weights_interval_steps)
    }
}

/// `[telemetry]`
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// OTLP endpoint, e.g. `http://127.0.0.1:4317`; empty for none. `OTEL_EXPORTER_OTLP_ENDPOINT` counts too.
    pub otlp_endpoint: String,
}
