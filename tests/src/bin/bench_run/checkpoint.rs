//! What a checkpoint costs: how long the update after it waits for its snapshot (the stall), by how much steps are longer
//! while it is uploaded, and how long that takes.
//!
//! Each third step is followed by a checkpoint. The stall is the run's own clock of that phase, of rank 0; the state that all
//! ranks together copy is printed beside it. The step after each checkpoint, which has the stall and the beginning of the
//! upload, is compared with the others of the same run; an upload that takes longer than a step is in those.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;
use tarazed_domain::config::Config;
use tarazed_tests::figures::{Figures, Summary};
use tarazed_tests::harness::{Project, Run, WAIT};

/// Steps from one checkpoint to the next.
const INTERVAL_STEPS: u64 = 3;

pub fn measure(config: &Path, ranks: u32, checkpoints: u64) -> Figures {
    let project = Project::of(config);
    let loaded = Config::load(config, &[]).expect("a config that loads");
    let layout = tarazed_model::parameter_layout(&loaded.model, loaded.optimizer.block_elements);
    let state_mb = (layout.block_count() * layout.block_elements() * 12) as f64 / 1e6;
    let train = project
        .train("checkpoints")
        .ranks(ranks)
        .steps((checkpoints + 2) * INTERVAL_STEPS)
        .set("mixture.controller", "static")
        .set("evaluation.interval_steps", "0")
        .set("checkpoint.interval_steps", &INTERVAL_STEPS.to_string());
    let began = Instant::now();
    let mut run = Run::start(&train);
    run.wait_for_step(INTERVAL_STEPS);
    // As long as it may take: what came so far, with the start, as often as it is asked for, and again as much.
    let limit = began.elapsed() * u32::try_from(2 * (checkpoints + 2)).unwrap_or(u32::MAX) + WAIT;
    run.finish_within(limit).assert_code(0);
    let made: Vec<_> = run.events("checkpoint");
    let steps: BTreeSet<u64> = made
        .iter()
        .filter_map(|event| event["checkpoint_step"].as_u64())
        .collect();
    let took_ms: Vec<f64> = made.iter().filter_map(|event| event["took_ms"].as_f64()).collect();
    let (mut stalls_ms, mut after_ms, mut other_ms) = (Vec::new(), Vec::new(), Vec::new());
    for line in run.json_lines("metrics.jsonl").iter().skip(INTERVAL_STEPS as usize) {
        let (Some(step), Some(step_ms)) = (line["step"].as_u64(), line["step_ms"].as_f64()) else {
            continue;
        };
        if steps.contains(&(step - 1)) {
            stalls_ms.extend(line["phase_ms"]["snapshot"].as_f64());
            after_ms.push(step_ms);
        } else {
            other_ms.push(step_ms);
        }
    }
    let (stall, after, other) = (Summary::of(&stalls_ms), Summary::of(&after_ms), Summary::of(&other_ms));
    let took = Summary::of(&took_ms);
    println!("state {state_mb:.1} MB over {ranks} ranks, {} checkpoints", made.len());
    println!(
        "stall                {stall} ms, {:.3}% of a step",
        100.0 * stall.median / other.median
    );
    println!("step after one       {after} ms");
    println!(
        "other steps          {other} ms, ratio {:.4}",
        after.median / other.median
    );
    println!("first rank begins, to commit {took} ms");
    Figures::new("checkpoint")
        .number("state_mb", state_mb)
        .number("stall_percent", 100.0 * stall.median / other.median)
        .summary("stall_ms", stall)
        .summary("step_after_ms", after)
        .summary("other_steps_ms", other)
        .summary("took_ms", took)
}
