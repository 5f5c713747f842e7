//! Committed traces as bytes: comparing them, cutting them, and the one that every disturbed run is held to.

use super::Project;
use serde_json::Value;
use std::sync::OnceLock;

/// Steps of the shared undisturbed run.
const UNDISTURBED_STEPS: u64 = 2_000;

/// The first `steps` lines of the trace that the tiny config writes on one rank, undisturbed. Made once per test
/// program.
///
/// # Panics
/// If that run fails.
#[must_use]
pub fn undisturbed(steps: u64) -> &'static [u8] {
    let (trace, _) = undisturbed_run();
    assert_eq!(
        line_count(trace),
        UNDISTURBED_STEPS,
        "an undisturbed run writes every line"
    );
    first_lines(trace, steps)
}

/// The lines of `weights.jsonl` that the same run wrote in its first `steps` steps.
///
/// # Panics
/// If that run fails.
#[must_use]
pub fn undisturbed_weights(steps: u64) -> &'static [u8] {
    let (_, weights) = undisturbed_run();
    let within = lines(weights)
        .iter()
        .filter(|line| line["step"].as_u64() <= Some(steps))
        .count();
    first_lines(weights, within as u64)
}

/// Trace and weight trajectory of that run.
fn undisturbed_run() -> &'static (Vec<u8>, Vec<u8>) {
    static RUN: OnceLock<(Vec<u8>, Vec<u8>)> = OnceLock::new();
    RUN.get_or_init(|| {
        let project = Project::tiny();
        let run = project.train("alone").ranks(1).steps(UNDISTURBED_STEPS).complete();
        (run.trace(), run.weights())
    })
}

/// Whole lines.
#[must_use]
pub fn line_count(trace: &[u8]) -> u64 {
    trace.iter().filter(|&&byte| byte == b'\n').count() as u64
}

/// The first `count` lines.
///
/// # Panics
/// If there are fewer.
#[must_use]
pub fn first_lines(trace: &[u8], count: u64) -> &[u8] {
    if count == 0 {
        return &[];
    }
    let ends = trace.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
    match ends.map(|(at, _)| at + 1).take(count as usize).enumerate().last() {
        Some((last, end)) if last as u64 + 1 == count => &trace[..end],
        _ => panic!("the trace has {} lines, not {count}", line_count(trace)),
    }
}

/// Its lines as JSON.
///
/// # Panics
/// If one is not JSON.
#[must_use]
pub fn lines(trace: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(trace).expect("a trace is UTF-8");
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect()
}

/// Fails unless two traces are the same bytes; says which line differs first, and how.
#[track_caller]
pub fn assert_same_trace(trace: &[u8], expected: &[u8], what: &str) {
    if trace == expected {
        return;
    }
    let split = |bytes: &[u8]| -> Vec<String> {
        let text = String::from_utf8_lossy(bytes);
        text.split_inclusive('\n').map(str::to_owned).collect()
    };
    let (left, right) = (split(trace), split(expected));
    let differs = left.iter().zip(&right).position(|(a, b)| a != b);
    match differs {
        Some(at) => panic!(
            "{what}: line {} differs\n  here:     {}  expected: {}",
            at + 1,
            left[at],
            right[at]
        ),
        None => panic!("{what}: {} lines here, {} expected", left.len(), right.len()),
    }
}
