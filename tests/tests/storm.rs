//! A short storm on real processes: every family of faults, and the trace of one undisturbed rank at the end.
//!
//! `docs/CHAOS.md` explains storms; the long ones have a command each.

use std::path::Path;
use tarazed_chaos::storm::command::{Args, run};
use tarazed_tests::harness::{Random, tarazed};

/// DET-1, STEP-2, STEP-3, STEP-5, SUP-1, SUP-2, CKPT-1, CKPT-2, CKPT-3, CKPT-4: processes killed and stopped, connections
/// cut, reset and garbled, a store that fails, a disk and a memory that are full, second faults in the midst of recovery:
/// the trace is the one of a single rank to which nothing happened.
#[test]
fn a_short_storm_leaves_the_trace_of_one_undisturbed_rank() {
    let scenario = Path::new(env!("CARGO_MANIFEST_DIR")).join("../chaos/scenarios/short.toml");
    let work = tempfile::Builder::new()
        .prefix("tarazed-storm-")
        .tempdir()
        .expect("a temporary folder");
    let seed = Random::seed();
    let args = Args::new(&scenario, tarazed(), work.path()).seed(seed).without_calm();
    let (report, _) = run(&args).expect("a storm that begins");
    let failed = !report.failures.is_empty();
    assert!(!failed, "TARAZED_TEST_SEED={seed}\n{}", report.summary());
    println!("{}", report.summary());
}
