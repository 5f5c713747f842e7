//! What to change: each suggestion is planned before it is made, so none is a guess.

use super::{Hardware, Plan, render, without_advice};
use tarazed_domain::config::Config;

/// Suggestions for `plan`, the plan of `config`.
#[must_use]
pub fn advise(config: &Config, plan: &Plan) -> Vec<String> {
    let mut advice = Vec::new();
    if !plan.fits {
        advice.extend(to_fit(config, plan));
    }
    advice.extend(waste(config, plan));
    if matches!(plan.hardware, Hardware::Gpu { .. }) {
        advice.extend(misaligned(config));
        advice.push(
            "times on GPUs are assumptions: one H100 has been timed alone (docs/BENCHMARKS.md), exchanges between GPUs never"
                .to_owned(),
        );
    }
    advice
}

/// Elements of bf16 in 16 bytes.
const ALIGNED_ELEMENTS: usize = 8;

/// Sizes that GPUs take, and multiply slowly: NVIDIA's "Matrix multiplication background user's guide" asks for dimensions that
/// are multiples of 16 bytes.
fn misaligned(config: &Config) -> Vec<String> {
    let model = &config.model;
    let sizes = [
        ("model.hidden", model.hidden),
        ("model.ffn", model.ffn),
        ("model.vocabulary", model.vocabulary),
    ];
    let odd = sizes
        .into_iter()
        .filter(|(_, size)| !size.is_multiple_of(ALIGNED_ELEMENTS));
    let advice = |(key, size): (&str, usize)| {
        format!(
            "{key} = {size} is not a multiple of {ALIGNED_ELEMENTS}, so rows of bf16 do not begin at multiples of 16 bytes and \
             products are slower: {} is",
            size.next_multiple_of(ALIGNED_ELEMENTS)
        )
    };
    odd.map(advice).collect()
}

/// One changed key, and whether it alters numbers (and so needs a new run).
struct Change {
    text: String,
    config: Config,
}

fn changes(config: &Config) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut add = |text: String, edit: &dyn Fn(&mut Config)| {
        let mut changed = config.clone();
        edit(&mut changed);
        changes.push(Change { text, config: changed });
    };
    let (batch, ranks) = (&config.batch, config.cluster.ranks);
    if batch.micro_batch_sequences > 1 {
        add(
            "batch.micro_batch_sequences = 1 (a new run: it changes rounding)".to_owned(),
            &|c| {
                c.batch.micro_batch_sequences = 1;
            },
        );
    }
    if config.optimizer.shards < ranks as usize {
        add(
            format!("optimizer.shards = {ranks}, so that every rank holds a part of the state"),
            &|c| {
                c.optimizer.shards = ranks as usize;
            },
        );
    }
    if batch.lanes > ranks && (batch.lanes * batch.sequences_per_lane).is_multiple_of(ranks) {
        let sequences = batch.lanes * batch.sequences_per_lane / ranks;
        add(
            format!(
                "batch.lanes = {ranks} with batch.sequences_per_lane = {sequences} (a new run: lanes decide numbers), so that a \
                 rank folds a single lane"
            ),
            &|c| {
                c.batch.lanes = ranks;
                c.batch.sequences_per_lane = sequences;
                c.batch.micro_batch_sequences = largest_divisor(sequences, c.batch.micro_batch_sequences);
            },
        );
    }
    if config.optimizer.replicas > 1 && ranks > 1 {
        add(
            "optimizer.replicas = 1 (a lost rank then costs a restore from the last checkpoint)".to_owned(),
            &|c| c.optimizer.replicas = 1,
        );
    }
    changes
}

fn largest_divisor(of: u32, at_most: u32) -> u32 {
    (1..=at_most).rev().find(|&d| of.is_multiple_of(d)).unwrap_or(1)
}

/// The single changes that fit; else all of them together; else the least that is needed whatever is changed.
fn to_fit(config: &Config, plan: &Plan) -> Vec<String> {
    let changes = changes(config);
    let need = |config: &Config| without_advice(config, &plan.hardware);
    let mut advice: Vec<String> = Vec::new();
    for change in &changes {
        let changed = need(&change.config);
        if changed.fits {
            advice.push(format!(
                "fits with {}: {}",
                change.text,
                render::bytes(changed.device_bytes)
            ));
        }
    }
    if !advice.is_empty() {
        return advice;
    }
    let mut all = config.clone();
    for change in &changes {
        let (from, to) = (&change.config, &mut all);
        if from.batch != config.batch {
            let micro = to.batch.micro_batch_sequences.min(from.batch.micro_batch_sequences);
            to.batch.lanes = from.batch.lanes.min(to.batch.lanes);
            to.batch.sequences_per_lane = from.batch.sequences_per_lane.max(to.batch.sequences_per_lane);
            to.batch.micro_batch_sequences = micro;
        }
        to.optimizer.shards = to.optimizer.shards.max(from.optimizer.shards);
        to.optimizer.replicas = to.optimizer.replicas.min(from.optimizer.replicas);
    }
    let least = need(&all);
    let texts: Vec<&str> = changes.iter().map(|change| change.text.as_str()).collect();
    if least.fits {
        return vec![format!(
            "fits with all of: {}: {}",
            texts.join("; "),
            render::bytes(least.device_bytes)
        )];
    }
    let whole: u64 = least
        .terms
        .iter()
        .filter(|term| matches!(term.name, "working weights" | "lane gradients" | "others' partials"))
        .map(|term| term.bytes)
        .sum();
    vec![format!(
        "no key makes it fit: at the least a rank needs {}, of which {} are working weights and gradients, which every rank \
         holds or takes in whole; dividing those takes parameter sharding, which this version does not have: use devices with more memory or a \
         smaller model",
        render::bytes(least.device_bytes),
        render::bytes(whole)
    )]
}

fn waste(config: &Config, plan: &Plan) -> Vec<String> {
    let mut advice = Vec::new();
    let (most, fewest) = plan.lanes_per_rank;
    if most > fewest {
        let mean = f64::from(config.batch.lanes) / f64::from(plan.ranks);
        let even = (1..=plan.ranks)
            .rev()
            .find(|&ranks| config.batch.lanes.is_multiple_of(ranks));
        advice.push(format!(
            "{} lanes on {} ranks are uneven: ranks wait {:.0}% of the computing time; {} ranks divide them evenly",
            config.batch.lanes,
            plan.ranks,
            (1.0 - mean / f64::from(most)) * 100.0,
            even.unwrap_or(1)
        ));
    }
    if config.optimizer.shards < plan.ranks as usize {
        advice.push(format!(
            "optimizer.shards = {} leaves ranks without a part of the optimizer state: raise it to {} or a multiple",
            config.optimizer.shards, plan.ranks
        ));
    }
    if config.optimizer.replicas == 1 && plan.ranks > 1 {
        advice.push(
            "optimizer.replicas = 1: losing a rank costs a restore from the last checkpoint; 2 makes it lossless"
                .to_owned(),
        );
    }
    advice
}
