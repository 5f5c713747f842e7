//! Checks of sizes and relations; each refusal names its key and its remedy.

use super::{
    ClusterCollective, ClusterDevice, ClusterTransport, Config, ConfigError, DataConfig, LearningRateSchedule,
    ModelConfig,
};
use crate::limits::*;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;

macro_rules! require {
    ($condition:expr, $key:expr, $reason:expr, $remedy:expr) => {
        if !$condition {
            return Err(ConfigError::new($key, $reason, $remedy));
        }
    };
}

/// A size outside its limits: everything computed from sizes inside them fits its type (`limits.rs` proves it).
pub(super) fn within(key: &str, value: u64, range: RangeInclusive<u64>, remedy: &str) -> Result<(), ConfigError> {
    require!(
        range.contains(&value),
        key,
        format!("{value} is not in {}..={}", range.start(), range.end()),
        remedy
    );
    Ok(())
}

pub(super) use require;

pub(super) fn validate(config: &Config) -> Result<(), ConfigError> {
    run(config)?;
    model(&config.model, config.optimizer.block_elements)?;
    batch_and_cluster(config)?;
    optimizer(config)?;
    data(&config.data, config.model.vocabulary)?;
    store(config)?;
    loops(config)
}

/// Kinds of URL that a store may have. Whether there is one behind it, and one that this program was built for, shows when
/// it is opened.
const STORE_SCHEMES: [&str; 4] = ["file", "s3", "gs", "az"];

fn store(config: &Config) -> Result<(), ConfigError> {
    if let Some(initial) = &config.model.initial {
        initial.check()?;
    }
    store_scheme("checkpoint.store", &config.checkpoint.store)
}

pub(super) fn store_scheme(key: &str, store: &str) -> Result<(), ConfigError> {
    if let Some((scheme, _)) = store.split_once("://") {
        // The rest may hold a secret, so it is not repeated.
        require!(
            STORE_SCHEMES.contains(&scheme),
            key,
            format!("no store speaks {scheme}://"),
            "give a folder or a URL such as file:///data/run, s3://bucket/prefix"
        );
    }
    Ok(())
}

fn run(config: &Config) -> Result<(), ConfigError> {
    let name = &config.run.name;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    require!(
        !name.is_empty() && name.chars().all(plain) && !name.starts_with('.'),
        "run.name",
        format!("'{name}' is not a plain name"),
        "use letters, digits, '-', '_' and '.'"
    );
    within(
        "run.steps",
        config.run.steps,
        1..=STEPS_MAX,
        "set the number of updates of the whole run",
    )
}

pub(super) fn model(m: &ModelConfig, block_elements: usize) -> Result<(), ConfigError> {
    for (key, value, most) in [
        ("model.layers", m.layers, LAYERS_MAX),
        ("model.hidden", m.hidden, HIDDEN_MAX),
        ("model.ffn", m.ffn, FFN_MAX),
        ("model.heads", m.heads, HEADS_MAX),
        ("model.kv_heads", m.kv_heads, HEADS_MAX),
        ("model.context", m.context, CONTEXT_TOKENS_MAX),
    ] {
        within(
            key,
            value as u64,
            1..=most,
            "choose the size of a model that can be trained",
        )?;
    }
    require!(
        m.hidden.is_multiple_of(m.heads),
        "model.heads",
        format!("{} heads do not divide model.hidden = {}", m.heads, m.hidden),
        "choose a number of heads that divides the hidden size"
    );
    require!(
        m.heads.is_multiple_of(m.kv_heads),
        "model.kv_heads",
        format!("{} key-value heads do not divide model.heads = {}", m.kv_heads, m.heads),
        "choose a number of key-value heads that divides the query heads"
    );
    require!(
        m.head_dim().is_multiple_of(2),
        "model.heads",
        format!(
            "a head would have {} elements, and RoPE needs an even number",
            m.head_dim()
        ),
        "choose hidden and heads so that hidden / heads is even"
    );
    require!(
        m.vocabulary >= 264,
        "model.vocabulary",
        format!("{} is too small for byte-level BPE", m.vocabulary),
        "set it to at least 264: 256 bytes and the special tokens"
    );
    within(
        "model.vocabulary",
        m.vocabulary as u64,
        264..=VOCABULARY_MAX,
        "set it to the tokenizer's entries",
    )?;
    parameters(m, block_elements)?;
    for (key, value) in [
        ("model.rope_theta", m.rope_theta),
        ("model.norm_eps", m.norm_eps),
        ("model.init_std", m.init_std),
        ("model.norm_init", m.norm_init),
    ] {
        require!(
            value.is_finite() && value > 0.0,
            key,
            format!("{value} is not positive"),
            "set a positive number"
        );
    }
    Ok(())
}

/// Parameters and blocks of the whole model: each size may be good by itself and their product not.
fn parameters(m: &ModelConfig, block_elements: usize) -> Result<(), ConfigError> {
    let count = m.parameter_count();
    let Some(count) = count.filter(|&count| count <= PARAMETERS_MAX) else {
        let count = count.map_or_else(|| "more than 2^64".to_owned(), |count| count.to_string());
        return Err(ConfigError::new(
            "model.layers",
            format!("the model would have {count} parameters, and {PARAMETERS_MAX} are the most"),
            "lower model.layers, model.hidden or model.ffn",
        ));
    };
    let block_elements = block_elements as u64;
    require!(
        block_elements > 0 && block_elements.is_multiple_of(64),
        "optimizer.block_elements",
        format!("{block_elements} is not a positive multiple of 64"),
        "choose e.g. 65536"
    );
    within(
        "optimizer.block_elements",
        block_elements,
        64..=BLOCK_ELEMENTS_MAX,
        "choose e.g. 65536",
    )?;
    // Each of the two groups, those that decay and those that do not, may end in a block that is not full.
    let blocks = count / block_elements + 2;
    require!(
        blocks <= BLOCKS_MAX,
        "optimizer.block_elements",
        format!("{block_elements} cuts {count} parameters into {blocks} blocks, and {BLOCKS_MAX} are the most"),
        "raise it, e.g. to 65536 or 1048576"
    );
    Ok(())
}

fn batch_and_cluster(config: &Config) -> Result<(), ConfigError> {
    let (b, c) = (&config.batch, &config.cluster);
    let lanes = u64::from(b.lanes);
    within(
        "batch.lanes",
        lanes,
        1..=u64::from(LANES_MAX),
        "choose at least the largest world size you will use, e.g. 8",
    )?;
    within(
        "batch.sequences_per_lane",
        u64::from(b.sequences_per_lane),
        1..=GLOBAL_BATCH_SEQUENCES_MAX / lanes,
        "lanes x sequences_per_lane is the global batch: choose a smaller one",
    )?;
    require!(
        b.micro_batch_sequences > 0 && b.sequences_per_lane.is_multiple_of(b.micro_batch_sequences),
        "batch.micro_batch_sequences",
        format!(
            "{} does not divide batch.sequences_per_lane = {}",
            b.micro_batch_sequences, b.sequences_per_lane
        ),
        "choose a divisor"
    );
    let context = config.model.context as u64;
    require!(
        config.tokens_per_step() <= GLOBAL_BATCH_TOKENS_MAX,
        "batch.sequences_per_lane",
        format!(
            "the global batch would have {} tokens, and {GLOBAL_BATCH_TOKENS_MAX} are the most",
            config.tokens_per_step()
        ),
        "lower it, batch.lanes or model.context"
    );
    within(
        "batch.micro_batch_sequences",
        u64::from(b.micro_batch_sequences),
        1..=MICRO_BATCH_TOKENS_MAX / context,
        "a micro-batch is in memory at once: choose a smaller one, or lower model.context",
    )?;
    super::loops_check::ramp(config)?;
    within(
        "cluster.ranks",
        u64::from(c.ranks),
        1..=u64::from(RANKS_MAX),
        "run at least one rank",
    )?;
    require!(
        c.ranks <= b.lanes,
        "cluster.ranks",
        format!("{} ranks are more than batch.lanes = {}", c.ranks, b.lanes),
        "raise batch.lanes (a new run: lanes decide numbers) or run fewer ranks"
    );
    within(
        "cluster.spares",
        u64::from(c.spares),
        0..=u64::from(RANKS_MAX),
        "a few are enough: each is a process that waits",
    )?;
    within(
        "cluster.threads_per_rank",
        u64::from(c.threads_per_rank),
        1..=THREADS_PER_RANK_MAX,
        "choose at most the cores that a rank has to itself",
    )?;
    require!(
        c.collective != ClusterCollective::Nccl || c.device != ClusterDevice::Cpu,
        "cluster.collective",
        "\"nccl\" moves the memory of CUDA devices, and cluster.device is \"cpu\"".to_owned(),
        "set cluster.device = \"cuda\", or leave cluster.collective out"
    );
    ports(config)?;
    super::nodes::check(config)
}

/// Ports belong to TCP; one that is dialed stands for one that is known, or nothing could forward it.
fn ports(config: &Config) -> Result<(), ConfigError> {
    let c = &config.cluster;
    // A world may grow to as many ranks as there are lanes.
    let workers_max = config.batch.lanes.max(c.ranks).saturating_add(c.spares);
    for (key, port, workers) in [
        ("cluster.mesh_port", c.mesh_port, workers_max),
        ("cluster.mesh_advertise_port", c.mesh_advertise_port, workers_max),
        ("cluster.control_port", c.control_port, 1),
        ("cluster.control_advertise_port", c.control_advertise_port, 1),
        ("cluster.node_port", c.node_port, 1),
    ] {
        require!(
            port == 0 || c.transport == ClusterTransport::Tcp,
            key,
            format!("{port} is a TCP port, and cluster.transport is \"unix\""),
            "set cluster.transport = \"tcp\", or leave the port out"
        );
        require!(
            port == 0 || u32::from(port).saturating_add(workers.saturating_sub(1)) <= u32::from(u16::MAX),
            key,
            format!(
                "{port} and one port more for each further lane and spare go beyond {}",
                u16::MAX
            ),
            "choose a lower one"
        );
    }
    for (key, advertised, listened, other) in [
        (
            "cluster.mesh_advertise_port",
            c.mesh_advertise_port,
            c.mesh_port,
            "cluster.mesh_port",
        ),
        (
            "cluster.control_advertise_port",
            c.control_advertise_port,
            c.control_port,
            "cluster.control_port",
        ),
    ] {
        require!(
            advertised == 0 || listened != 0,
            key,
            format!("{advertised} forwards to a port that {other} = 0 leaves to the system"),
            format!("set {other}")
        );
    }
    Ok(())
}

fn optimizer(config: &Config) -> Result<(), ConfigError> {
    let o = &config.optimizer;
    require!(
        o.learning_rate.is_finite() && o.learning_rate > 0.0,
        "optimizer.learning_rate",
        format!("{} is not positive", o.learning_rate),
        "set a positive number"
    );
    for (key, value) in [("optimizer.beta1", o.beta1), ("optimizer.beta2", o.beta2)] {
        require!(
            (0.0..1.0).contains(&value),
            key,
            format!("{value} is not in 0..1"),
            "choose e.g. 0.9 and 0.95"
        );
    }
    for (key, value) in [("optimizer.eps", o.eps), ("optimizer.clip_norm", o.clip_norm)] {
        require!(
            value.is_finite() && value > 0.0,
            key,
            format!("{value} is not positive"),
            "set a positive number"
        );
    }
    require!(
        o.weight_decay.is_finite() && o.weight_decay >= 0.0,
        "optimizer.weight_decay",
        format!("{} is negative", o.weight_decay),
        "set 0 or a positive number"
    );
    within(
        "optimizer.shards",
        o.shards as u64,
        1..=OPTIMIZER_SHARDS_MAX,
        "set it to at least the world size",
    )?;
    within(
        "optimizer.replicas",
        u64::from(o.replicas),
        1..=u64::from(RANKS_MAX),
        "set 1 for the primary alone, 2 to survive the loss of any one rank",
    )?;
    require!(
        o.replicas <= config.cluster.ranks || config.cluster.ranks == 1,
        "optimizer.replicas",
        format!(
            "{} copies need as many ranks, and cluster.ranks is {}",
            o.replicas, config.cluster.ranks
        ),
        "lower optimizer.replicas or run more ranks (a single rank always keeps one copy)"
    );
    schedule(&o.schedule)
}

fn schedule(schedule: &LearningRateSchedule) -> Result<(), ConfigError> {
    let (warmup_steps, decay) = match *schedule {
        LearningRateSchedule::Cosine {
            warmup_steps,
            decay_steps,
            final_fraction,
        } => (warmup_steps, Some((decay_steps, final_fraction))),
        LearningRateSchedule::Wsd {
            warmup_steps,
            decay_from,
            decay_steps,
            final_fraction,
            ..
        } => return stable_and_decay(warmup_steps, decay_from, decay_steps, final_fraction),
        LearningRateSchedule::Constant { warmup_steps } => (warmup_steps, None),
    };
    within(
        "optimizer.schedule.warmup_steps",
        warmup_steps,
        0..=STEPS_MAX,
        "warm up for fewer steps",
    )?;
    let Some((decay_steps, final_fraction)) = decay else {
        return Ok(());
    };
    within(
        "optimizer.schedule.decay_steps",
        decay_steps,
        0..=STEPS_MAX,
        "leave it out for the run's steps",
    )?;
    require!(
        warmup_steps <= decay_steps,
        "optimizer.schedule.warmup_steps",
        format!("{warmup_steps} is more than decay_steps = {decay_steps}"),
        "warm up for fewer steps"
    );
    fraction(final_fraction)
}

fn fraction(final_fraction: f64) -> Result<(), ConfigError> {
    require!(
        (0.0..=1.0).contains(&final_fraction),
        "optimizer.schedule.final_fraction",
        format!("{final_fraction} is not in 0..=1"),
        "choose e.g. 0.1"
    );
    Ok(())
}

fn stable_and_decay(
    warmup_steps: u64,
    decay_from: Option<u64>,
    decay_steps: u64,
    final_fraction: f64,
) -> Result<(), ConfigError> {
    for (key, value, least, remedy) in [
        (
            "optimizer.schedule.warmup_steps",
            warmup_steps,
            0,
            "warm up for fewer steps",
        ),
        (
            "optimizer.schedule.decay_steps",
            decay_steps,
            1,
            "choose e.g. a tenth of the run's steps",
        ),
        (
            "optimizer.schedule.decay_from",
            decay_from.unwrap_or(warmup_steps),
            warmup_steps,
            "begin the decay behind the warm-up, or leave it out for a decision to begin it",
        ),
    ] {
        within(key, value, least..=STEPS_MAX, remedy)?;
    }
    fraction(final_fraction)
}

pub(super) fn data(d: &DataConfig, model_vocabulary: usize) -> Result<(), ConfigError> {
    require!(
        (1..=DOMAINS_MAX).contains(&d.domains.len()),
        "data.domains",
        format!("{} domains are not in 1..={DOMAINS_MAX}", d.domains.len()),
        "name at least one [[data.domains]]"
    );
    require!(
        (0.0..0.5).contains(&d.held_out_fraction),
        "data.held_out_fraction",
        format!("{} is not in 0..0.5", d.held_out_fraction),
        "choose e.g. 0.03"
    );
    let mut seen = BTreeSet::new();
    for (index, domain) in d.domains.iter().enumerate() {
        let key = |field: &str| format!("data.domains[{index}].{field}");
        require!(
            !domain.name.is_empty(),
            key("name"),
            "is empty",
            "name the domain, e.g. \"wiki\""
        );
        require!(
            seen.insert(&domain.name),
            key("name"),
            format!("'{}' names two domains", domain.name),
            "give each domain a name of its own"
        );
        require!(
            domain.weight.is_finite() && domain.weight > 0.0,
            key("weight"),
            format!("{} is not positive", domain.weight),
            "set a positive weight or leave the domain out"
        );
        require!(
            (0.0..=DOMAIN_WEIGHT_MAX).contains(&domain.weight),
            key("weight"),
            format!("{} is more than {DOMAIN_WEIGHT_MAX}", domain.weight),
            "weights are normalised: only their ratios count"
        );
    }
    if let Some(refine) = &d.refine {
        refine.validate(&d.domains)?;
    }
    within(
        "data.tokenizer.train_bytes_max",
        d.tokenizer.train_bytes_max,
        0..=TOKENIZER_TRAIN_BYTES_MAX,
        "the text is held in memory: choose e.g. 67108864",
    )?;
    require!(
        d.tokenizer.vocabulary <= model_vocabulary,
        "data.tokenizer.vocabulary",
        format!(
            "{} is more than model.vocabulary = {model_vocabulary}",
            d.tokenizer.vocabulary
        ),
        "lower it or raise model.vocabulary"
    );
    Ok(())
}

fn loops(config: &Config) -> Result<(), ConfigError> {
    let (m, e, f) = (&config.mixture, &config.evaluation, &config.fault);
    for (key, value, least) in [
        ("mixture.start_steps", m.start_steps, 0),
        ("mixture.interval_steps", m.interval_steps, 1),
        ("mixture.lag_steps", m.lag_steps, 1),
        ("evaluation.interval_steps", e.interval_steps, 0),
        ("checkpoint.interval_steps", config.checkpoint.interval_steps, 0),
        ("checkpoint.keep_every_steps", config.checkpoint.keep_every_steps, 0),
        (
            "monitor.weights_interval_steps",
            config.monitor.weights_interval_steps,
            0,
        ),
    ] {
        within(key, value, least..=STEPS_MAX, "choose a number of steps of a run")?;
    }
    within(
        "evaluation.sequences_per_domain_max",
        u64::from(e.sequences_per_domain_max),
        0..=HELD_OUT_SEQUENCES_MAX,
        "an evaluation is part of a step: choose e.g. 16",
    )?;
    within(
        "checkpoint.keep_last",
        u64::from(config.checkpoint.keep_last),
        0..=CHECKPOINTS_KEPT_MAX,
        "choose e.g. 3",
    )?;
    require!(
        f.timeout_ms >= FAILURE_TIMEOUT_MS_MIN,
        "fault.timeout_ms",
        format!("{} is below {FAILURE_TIMEOUT_MS_MIN}", f.timeout_ms),
        "a loaded machine would raise false alarms: raise it"
    );
    require!(
        f.timeout_ms <= FAILURE_TIMEOUT_MS_MAX,
        "fault.timeout_ms",
        format!("{} is above {FAILURE_TIMEOUT_MS_MAX}", f.timeout_ms),
        "a dead rank would be waited for that long: lower it"
    );
    within(
        "fault.restarts_max",
        u64::from(f.restarts_max),
        1..=RESTARTS_WITHOUT_PROGRESS_MAX,
        "choose e.g. 5",
    )?;
    within(
        "fault.restart_backoff_ms",
        f.restart_backoff_ms,
        0..=RESTART_BACKOFF_MS_MAX,
        "choose e.g. 100",
    )?;
    super::loops_check::check(config)
}
