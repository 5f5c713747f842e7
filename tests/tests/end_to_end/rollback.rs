//! Roll back and skip.

use crate::common::wait_for_no_ranks;
use serde_json::Value;
use tarazed_tests::harness::{Project, Random, Run, assert_same_trace, lines};

const STEPS: u64 = 420;

/// A run that must diverge: its learning rate rises until nothing can be learnt with it.
fn project() -> Project {
    let rising = "{ kind = \"constant\", warmup_steps = 2000 }";
    Project::tiny_with(&[
        ("optimizer.learning_rate", "2.0"),
        ("optimizer.schedule", rising),
        ("policy.spikes", "\"rollback_and_skip\""),
        ("policy.rollback_grain_steps", "10"),
        ("policy.rollback_margin_steps", "5"),
        ("policy.rollbacks_max", "2"),
        ("mixture.start_steps", "10"),
        ("mixture.interval_steps", "10"),
        ("mixture.lag_steps", "4"),
        ("fault.restarts_max", "100"),
    ])
}

/// The rollbacks of a trace: the count at which each acts, and the steps in the state gone back to.
fn rollbacks(trace: &[u8]) -> Vec<(u64, u64)> {
    let lines = lines(trace);
    let decisions = lines.iter().filter_map(|line| line["decisions"].as_array()).flatten();
    let rollback = |decision: &Value| {
        let to = decision["kind"]["rollback"]["to"].as_u64()?;
        Some((decision["effective"].as_u64()?, to))
    };
    decisions.filter_map(rollback).collect()
}

/// LOOP-1, DET-1, STEP-2, STEP-5: a run that diverges goes back and on, and ranks and controllers that are killed before,
/// on the way back and behind it change nothing; so does a restart from the store behind the rollback. The verifier, which
/// shares no code with the runtime, finds what is discarded to be what was drawn.
#[test]
fn a_run_that_is_rolled_back_is_the_same_whatever_happens() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let what = format!("TARAZED_TEST_SEED={seed}");
    let project = project();
    let alone = project.train("alone").ranks(1).steps(STEPS).complete();
    let expected = alone.trace();
    let found = rollbacks(&expected);
    let Some(&(at, to)) = found.first() else {
        panic!("it does not diverge within {STEPS} steps\n{}", alone.tail());
    };
    assert!(to < at && at < STEPS - 20, "{found:?}");
    assert_eq!(alone.events("rolled_back").len(), found.len(), "{}", alone.tail());

    let mut run = Run::start(&project.train("harmed").ranks(3).steps(STEPS));
    for step in [at / 2, at - 2, at - 1, at, at + 1, at + 10] {
        run.wait_for_step(step);
        let _between_two_lives = run.kill_rank(random.below(3) as u32);
    }
    let outcome = run.finish();
    outcome.assert_code(0);
    wait_for_no_ranks(&mut run);
    assert_same_trace(&run.trace(), &expected, &what);

    // Killed as a whole behind the rollback, and restored; the newest checkpoint may be one that is left behind.
    for (name, stop) in [("ended", at + 1), ("ended at once", at)] {
        drop(project.train(name).ranks(3).steps(stop).complete());
        let resumed = project.train(name).ranks(2).steps(STEPS).arg("--resume").complete();
        assert_same_trace(&resumed.trace(), &expected, &format!("{what}, {name}"));
    }
    for name in ["alone", "harmed", "ended"] {
        let run_dir = project.run_dir(name);
        let verified = project.verify(&["trace".as_ref(), run_dir.as_os_str()]);
        verified.assert_code(0);
        let verified = project.verify(&["bucket".as_ref(), run_dir.join("store").as_os_str()]);
        verified.assert_code(0);
    }
}
