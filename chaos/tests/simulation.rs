//! The short form of the campaign: each seed twice, and both the same.
//!
//! `.ci/run` asks for ten times as many. `TARAZED_SIM_SEEDS` (how many) and `TARAZED_SIM_FROM` (the first) widen it; `tarazed-chaos sim --seed N` shows one.
#![allow(clippy::expect_used, reason = "a failed expectation is a failed test")]

use tarazed_chaos::sim::command::campaign;

/// Seeds in a run of the tests.
const SEEDS: u64 = 1_000;

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
}

/// DET-1, STEP-2, STEP-3, STEP-5, LOOP-1, CKPT-1: whatever happens to a run, its trace is the undisturbed one's, and a
/// seed gives the same history each time.
#[test]
fn whatever_happens_the_trace_is_the_undisturbed_one() {
    let (from, seeds) = (number("TARAZED_SIM_FROM", 0), number("TARAZED_SIM_SEEDS", SEEDS));
    let summary = campaign(from, seeds, true, 2);
    assert_eq!(summary.failures, [], "replay one with: tarazed-chaos sim --seed N");
    assert_eq!(summary.seeds, seeds);
    // What a few seeds may lack, a campaign has.
    let idle = seeds >= SEEDS && (summary.deposed == 0 || summary.decided == 0);
    assert!(
        !idle,
        "nobody was put out of charge, or nobody decided anything: {summary:?}"
    );
    println!("{summary:?}");
}
