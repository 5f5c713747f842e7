//! The short form of the campaign: each seed twice, and both the same.
//!
//! `.ci/run` asks for ten times as many. `TARAZED_SIM_SEEDS` (how many) and `TARAZED_SIM_FROM` (the first) widen it; `tarazed-chaos sim --seed N` shows one.
#![allow(clippy::expect_used, reason = "a failed expectation is a failed test")]

use tarazed_chaos::sim::command::campaign;
use tarazed_chaos::sim::run_scenario;
use tarazed_chaos::sim::scenario::{Fault, Scenario};

/// Seeds in a run of the tests.
const SEEDS: u64 = 1_000;

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
}

/// DET-1, STEP-2, STEP-3, STEP-5, LOOP-1, CKPT-1, SUP-1: whatever happens to a run, its trace is the undisturbed one's, and a
/// seed gives the same history each time.
#[test]
fn whatever_happens_the_trace_is_the_undisturbed_one() {
    let (from, seeds) = (number("TARAZED_SIM_FROM", 0), number("TARAZED_SIM_SEEDS", SEEDS));
    let summary = campaign(from, seeds, true, 2);
    assert_eq!(summary.failures, [], "replay one with: tarazed-chaos sim --seed N");
    assert_eq!(summary.seeds, seeds);
    // What a few seeds may lack, a campaign has.
    let idle = seeds >= SEEDS && (summary.deposed == 0 || summary.decided == 0 || summary.loop_deaths == 0);
    assert!(
        !idle,
        "nobody was put out of charge, nobody decided anything, or no closed loop died: {summary:?}"
    );
    println!("{summary:?}");
}

/// `checkpoint.interval = "auto"`: a run of ten minutes whose ranks are killed now and then asks for checkpoints by itself, none
/// of them earlier than Young and Daly advise for the losses there were, and all of them restore.
#[test]
fn a_run_asks_for_checkpoints_as_often_as_its_losses_advise() {
    const STEP_MS: u64 = 800;
    let scenario = Scenario {
        lanes: 8,
        ranks: 4,
        spares: 0,
        nodes: 0,
        steps: 600_000 / STEP_MS,
        replicas: 2,
        checkpoint_interval_steps: 0,
        checkpoint_interval: "auto",
        keep_every_steps: 0,
        keep_last: 100,
        adaptive: false,
        skips_spikes: false,
        stop_tokens: None,
        ramp: None,
        rollbacks: Vec::new(),
        persons: false,
        timeout_ms: 2_000,
        lane_ms: STEP_MS / 2,
        faults: vec![Fault::KillRank],
        wrong_update: false,
        fault_every_ms: 60_000.0,
        fault_phase_ms: 400_000,
        ..Scenario::of(0)
    };
    let report = run_scenario(scenario, true).expect("a simulation");
    assert_eq!(report.failure, None);
    let at = |what: &str| -> Vec<f64> {
        let lines = report.history.iter().filter(|line| line.contains(what));
        let times = lines.filter_map(|line| line.split_whitespace().next()?.parse().ok());
        times.collect()
    };
    let (losses, checkpoints) = (at("  lost ").len(), at("  checkpoint of "));
    assert!(losses > 2, "{losses} losses");
    // 54 days of 16,384 processors with 419 losses, four processors, a checkpoint that costs a millisecond.
    let between_losses_ms = 54.0 * 86_400_000.0 * 16_384.0 / 419.0 / 4.0;
    let advised_ms = (2.0 * between_losses_ms / (losses + 1) as f64).sqrt();
    let (_last, by_itself) = checkpoints.split_last().expect("the last checkpoint");
    assert!(by_itself.len() > 1, "{checkpoints:?}, advised every {advised_ms} ms");
    let mut before_ms = 0.0;
    for &now_ms in by_itself {
        assert!(
            now_ms - before_ms > advised_ms - 2.0 * STEP_MS as f64,
            "{checkpoints:?}, advised every {advised_ms} ms"
        );
        before_ms = now_ms;
    }
}
