//! What tests of the program claim about a run or a command that has ended.

use super::{Outcome, POLL, Run, WAIT, assert_same_trace, line_count, undisturbed, undisturbed_weights};
use std::time::Instant;

/// Fails unless the run ended with code 0 and its first `steps` lines, all it has, are the undisturbed ones, as is what it
/// wrote of its weights.
///
/// # Panics
/// If it did not.
#[track_caller]
pub fn assert_undisturbed(run: &mut Run, steps: u64, what: &str) {
    let outcome = run.finish();
    assert_eq!(outcome.code, Some(0), "{what}\n{}", run.tail());
    assert_same_trace(&run.trace(), undisturbed(steps), &format!("{what}\n{}", run.tail()));
    let weights = format!("{what}: weights.jsonl\n{}", run.tail());
    assert_same_trace(&run.weights(), undisturbed_weights(steps), &weights);
    assert_eq!(run.processes().ranks(), [0_u32; 0], "{what}: ranks are left");
}

/// Fails unless what the run wrote so far is the beginning of the undisturbed trace; its number of lines.
///
/// # Panics
/// If it is not.
#[track_caller]
pub fn assert_prefix(run: &Run) -> u64 {
    let trace = run.trace();
    let count = line_count(&trace);
    assert_same_trace(&trace, undisturbed(count), "a trace so far");
    count
}

/// Waits until no rank is left: those whose controller is gone end by themselves where no other comes for a dozen times
/// `fault.timeout_ms`.
///
/// # Panics
/// If some are left after [`WAIT`].
#[track_caller]
pub fn wait_for_no_ranks(run: &mut Run) {
    let deadline = Instant::now() + WAIT;
    while !run.processes().ranks().is_empty() {
        assert!(
            Instant::now() < deadline,
            "ranks without a controller stay\n{}",
            run.tail()
        );
        std::thread::sleep(POLL);
    }
}

/// Fails unless the program refused: code 2, one message that begins so and holds all `parts`, and no ranks started.
///
/// # Panics
/// If it did not.
#[track_caller]
pub fn assert_refused(outcome: &Outcome, parts: &[&str]) {
    outcome.assert_code(2);
    assert!(outcome.stderr.starts_with("tarazed: refused: "), "{}", outcome.tail());
    assert_eq!(
        outcome.stderr.matches("tarazed: ").count(),
        1,
        "one message\n{}",
        outcome.tail()
    );
    parts.iter().for_each(|part| outcome.assert_says(part));
    assert!(!outcome.stdout.contains("started as process"), "{}", outcome.tail());
}

/// Fails unless the program halted: code 3, and a diagnosis that holds all `parts`.
///
/// # Panics
/// If it did not.
#[track_caller]
pub fn assert_halted(outcome: &Outcome, parts: &[&str]) {
    outcome.assert_code(3);
    assert!(outcome.stderr.contains("tarazed: halted: "), "{}", outcome.tail());
    parts.iter().for_each(|part| outcome.assert_says(part));
}
