//! What a checkpoint costs a rank in memory: the peak of its process while it trains and saves against the peak of one that
//! trains and saves nothing.
//!
//! Each rank saves one optimizer shard and holds a replica of another. Peaks are the kernel's (`VmHWM`), reset when the run is
//! warm, so that start and data do not count, and read when some checkpoints are there. Rounds alternate between the two
//! sides. What a checkpoint adds should be the snapshot, which is as large as the shard, and what the store's client needs for
//! itself: 1.25 times the shard at most.

use std::path::Path;
use tarazed_domain::config::Config;
use tarazed_domain::{OptimizerShardIndex, ShardLayout};
use tarazed_store::ShardGeometry;
use tarazed_tests::figures::{Figures, Summary};
use tarazed_tests::harness::{Project, Run};

/// Steps before peaks count.
const WARM_UP_STEPS: u64 = 4;
/// Steps from one checkpoint to the next, and how many count.
const INTERVAL_STEPS: u64 = 5;
const CHECKPOINTS: u64 = 4;
/// More than any run here does: it is ended when the peaks are read.
const STEPS: u64 = 4_000;
const BYTES_PER_ELEMENT: u64 = 12;
/// Width of the model, and weights of one of its layers and of its two embeddings.
const HIDDEN: u64 = 256;
const FFN: u64 = 1_024;
const VOCABULARY: u64 = 512;
const LAYER_ELEMENTS: u64 = 3 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN;

pub fn measure(ranks: u32, megabytes: &[u64], rounds: usize, store: Option<&str>) -> Figures {
    let mut figures = Figures::new("memory");
    for &wanted in megabytes {
        let project = project(ranks, wanted);
        let shard_mb = largest_shard_bytes(&project.config()) as f64 / 1e6;
        let (mut with, mut without, mut added) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..rounds {
            let saving = peaks_mb(&project, ranks, store, &format!("with-{round}"), true);
            let idle = peaks_mb(&project, ranks, store, &format!("without-{round}"), false);
            added.extend(saving.iter().zip(&idle).map(|(saving, idle)| saving - idle));
            with.extend(saving);
            without.extend(idle);
        }
        let (with, without, added) = (Summary::of(&with), Summary::of(&without), Summary::of(&added));
        println!("optimizer shard        {shard_mb:.1} MB, {ranks} ranks with one each, {rounds} rounds");
        println!("peak with checkpoints  {with} MB");
        println!("peak without           {without} MB");
        println!(
            "added, by rank         {added} MB, {:.2} to {:.2} of a shard",
            added.least / shard_mb,
            added.most / shard_mb
        );
        figures = figures
            .number(&format!("shard_{wanted}_mb"), shard_mb)
            .number(&format!("added_{wanted}_of_shard_most"), added.most / shard_mb)
            .summary(&format!("with_{wanted}_mb"), with)
            .summary(&format!("without_{wanted}_mb"), without)
            .summary(&format!("added_{wanted}_mb"), added);
    }
    figures
}

/// A model whose state, cut into one shard for each rank, makes shards of about so many MB; few tokens a step.
fn project(ranks: u32, shard_megabytes: u64) -> Project {
    let elements = shard_megabytes * 1_000_000 * u64::from(ranks) / BYTES_PER_ELEMENT;
    let layers = (elements.saturating_sub(2 * VOCABULARY * HIDDEN) / LAYER_ELEMENTS).max(1);
    let numbers = [
        ("model.layers", layers),
        ("model.hidden", HIDDEN),
        ("model.ffn", FFN),
        ("model.heads", 8),
        ("model.kv_heads", 4),
        ("batch.lanes", u64::from(ranks)),
        ("optimizer.shards", u64::from(ranks)),
        ("optimizer.block_elements", 16_384),
        ("evaluation.interval_steps", 0),
        ("monitor.weights_interval_steps", 0),
    ];
    let project = Project::tiny();
    for (key, value) in numbers {
        project.set(key, &value.to_string());
    }
    let of_store = std::env::vars().filter(|(name, _)| name.starts_with("AWS_"));
    of_store.fold(project, |project, (name, value)| project.variable(&name, &value))
}

fn largest_shard_bytes(config: &Path) -> u64 {
    let config = Config::load(config, &[]).expect("a config that loads");
    let layout = tarazed_model::parameter_layout(&config.model, config.optimizer.block_elements);
    let layout = ShardLayout::new(&layout, config.optimizer.shards);
    let shards = 0..layout.shard_count() as u32;
    let bytes = shards.map(|shard| ShardGeometry::of(&layout, OptimizerShardIndex(shard)).payload_bytes());
    bytes.max().unwrap_or_default()
}

/// Peaks of all ranks, in MB, by worker.
fn peaks_mb(project: &Project, ranks: u32, store: Option<&str>, name: &str, is_saving: bool) -> Vec<f64> {
    let interval = if is_saving { INTERVAL_STEPS } else { 0 };
    let mut train = project
        .train(name)
        .ranks(ranks)
        .steps(STEPS)
        .set("checkpoint.keep_last", "1")
        .set("checkpoint.interval_steps", &interval.to_string());
    if let Some(store) = store {
        let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let nanos = nanos.map_or(0, |since| since.as_nanos());
        train = train.set("checkpoint.store", &format!("{store}/{nanos}"));
    }
    let mut run = Run::start(&train);
    run.wait_for_step(WARM_UP_STEPS);
    let status = run.status();
    let mut workers: Vec<_> = status
        .workers
        .iter()
        .map(|worker| (worker.worker, worker.pid))
        .collect();
    workers.sort_unstable();
    for (_, pid) in &workers {
        std::fs::write(format!("/proc/{pid}/clear_refs"), "5").expect("a peak may be reset");
    }
    for checkpoint in 1..=CHECKPOINTS {
        run.wait_for_step(checkpoint * INTERVAL_STEPS);
    }
    if is_saving {
        run.wait_for("the checkpoints", |run| {
            (run.events("checkpoint").len() as u64 >= CHECKPOINTS - 1).then_some(())
        });
    }
    workers.iter().map(|(_, pid)| peak_mb(*pid)).collect()
    // The run ends as it is dropped.
}

/// The largest resident set of a process since it was reset.
fn peak_mb(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a rank that lives");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = peak.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    kibibytes.expect("the kernel's word for it") * 1024.0 / 1e6
}
