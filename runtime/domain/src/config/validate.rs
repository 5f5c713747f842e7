//! Checks of sizes and relations; each refusal names its key and its remedy.

use super::{Config, ConfigError, LearningRateSchedule};
use crate::limits::{DOMAINS_MAX, FAILURE_TIMEOUT_MS_MIN, LANES_MAX, RANKS_MAX};
use std::collections::BTreeSet;

macro_rules! require {
    ($condition:expr, $key:expr, $reason:expr, $remedy:expr) => {
        if !$condition {
            return Err(ConfigError::new($key, $reason, $remedy));
        }
    };
}

pub(super) fn validate(config: &Config) -> Result<(), ConfigError> {
    run(config)?;
    model(config)?;
    batch_and_cluster(config)?;
    optimizer(config)?;
    data(config)?;
    store(config)?;
    loops(config)
}

/// Kinds of URL that a store may have. Whether there is one behind it, and one that this program was built for, shows when
/// it is opened.
const STORE_SCHEMES: [&str; 4] = ["file", "s3", "gs", "az"];

fn store(config: &Config) -> Result<(), ConfigError> {
    if let Some((scheme, _)) = config.checkpoint.store.split_once("://") {
        // The rest may hold a secret, so it is not repeated.
        require!(
            STORE_SCHEMES.contains(&scheme),
            "checkpoint.store",
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
    require!(config.run.steps > 0, "run.steps", "is 0", "set it to at least 1");
    Ok(())
}

fn model(config: &Config) -> Result<(), ConfigError> {
    let m = &config.model;
    for (key, value) in [
        ("model.layers", m.layers),
        ("model.hidden", m.hidden),
        ("model.ffn", m.ffn),
        ("model.heads", m.heads),
        ("model.kv_heads", m.kv_heads),
        ("model.context", m.context),
    ] {
        require!(value > 0, key, "is 0", "set it to at least 1");
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

fn batch_and_cluster(config: &Config) -> Result<(), ConfigError> {
    let (b, c) = (&config.batch, &config.cluster);
    require!(
        (1..=LANES_MAX).contains(&b.lanes),
        "batch.lanes",
        format!("{} is not in 1..={LANES_MAX}", b.lanes),
        "choose at least the largest world size you will use, e.g. 8"
    );
    require!(
        b.sequences_per_lane > 0,
        "batch.sequences_per_lane",
        "is 0",
        "set it to at least 1"
    );
    require!(
        b.micro_batch_sequences > 0 && b.sequences_per_lane.is_multiple_of(b.micro_batch_sequences),
        "batch.micro_batch_sequences",
        format!(
            "{} does not divide batch.sequences_per_lane = {}",
            b.micro_batch_sequences, b.sequences_per_lane
        ),
        "choose a divisor"
    );
    require!(
        (1..=RANKS_MAX).contains(&c.ranks),
        "cluster.ranks",
        format!("{} is not in 1..={RANKS_MAX}", c.ranks),
        "run at least one rank"
    );
    require!(
        c.ranks <= b.lanes,
        "cluster.ranks",
        format!("{} ranks are more than batch.lanes = {}", c.ranks, b.lanes),
        "raise batch.lanes (a new run: lanes decide numbers) or run fewer ranks"
    );
    require!(
        c.threads_per_rank > 0,
        "cluster.threads_per_rank",
        "is 0",
        "set it to at least 1"
    );
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
    require!(
        o.block_elements > 0 && o.block_elements.is_multiple_of(64),
        "optimizer.block_elements",
        format!("{} is not a positive multiple of 64", o.block_elements),
        "choose e.g. 65536"
    );
    require!(
        o.shards > 0,
        "optimizer.shards",
        "is 0",
        "set it to at least the world size"
    );
    require!(
        o.replicas >= 1,
        "optimizer.replicas",
        "is 0",
        "set 1 for the primary alone, 2 to survive the loss of any one rank"
    );
    require!(
        o.replicas <= config.cluster.ranks || config.cluster.ranks == 1,
        "optimizer.replicas",
        format!(
            "{} copies need as many ranks, and cluster.ranks is {}",
            o.replicas, config.cluster.ranks
        ),
        "lower optimizer.replicas or run more ranks (a single rank always keeps one copy)"
    );
    if let LearningRateSchedule::Cosine {
        warmup_steps,
        decay_steps,
        final_fraction,
    } = o.schedule
    {
        require!(
            warmup_steps <= decay_steps,
            "optimizer.schedule.warmup_steps",
            format!("{warmup_steps} is more than decay_steps = {decay_steps}"),
            "warm up for fewer steps"
        );
        require!(
            (0.0..=1.0).contains(&final_fraction),
            "optimizer.schedule.final_fraction",
            format!("{final_fraction} is not in 0..=1"),
            "choose e.g. 0.1"
        );
    }
    Ok(())
}

fn data(config: &Config) -> Result<(), ConfigError> {
    let d = &config.data;
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
    }
    require!(
        d.tokenizer.vocabulary <= config.model.vocabulary,
        "data.tokenizer.vocabulary",
        format!(
            "{} is more than model.vocabulary = {}",
            d.tokenizer.vocabulary, config.model.vocabulary
        ),
        "lower it or raise model.vocabulary"
    );
    Ok(())
}

fn loops(config: &Config) -> Result<(), ConfigError> {
    let (m, f) = (&config.mixture, &config.fault);
    require!(
        m.interval_steps > 0,
        "mixture.interval_steps",
        "is 0",
        "set it to at least 1"
    );
    require!(
        m.lag_steps > 0,
        "mixture.lag_steps",
        "is 0",
        "a decision takes effect at a later step: at least 1"
    );
    require!(
        f.timeout_ms >= FAILURE_TIMEOUT_MS_MIN,
        "fault.timeout_ms",
        format!("{} is below {FAILURE_TIMEOUT_MS_MIN}", f.timeout_ms),
        "a loaded machine would raise false alarms: raise it"
    );
    require!(f.restarts_max > 0, "fault.restarts_max", "is 0", "set it to at least 1");
    Ok(())
}
