//! Unusual surroundings: long and strange paths, an output that nobody reads.

use crate::common::assert_undisturbed;
use std::process::Command;
use tarazed_tests::harness::{Project, Run, assert_same_trace, tarazed, undisturbed};

/// A run folder with a name in several scripts, with spaces and quotes, and with a path too long for a socket's
/// address, trains, loses a rank, answers `status` and ends like any other.
#[test]
fn strange_and_long_paths_are_ordinary() {
    let project = Project::tiny();
    let long = format!("{}/{}", "l".repeat(120), "m".repeat(60));
    for name in ["天鹰座 η 'quoted' \"run\"", &long] {
        let mut run = Run::start(&project.train(name).ranks(3).steps(60));
        run.wait_for_step(10);
        run.wait_for_status("three ranks", |status| status.all_train(3));
        assert!(run.kill_rank(2).is_some(), "{}", run.tail());
        assert_undisturbed(&mut run, 60, name);
    }
}

/// Nobody reads what the run prints: it trains on, and its code and files are those of any run.
#[test]
fn a_closed_output_stops_no_run() {
    let project = Project::tiny();
    let dir = project.run_dir("piped");
    let script = format!(
        "'{}' train '{}' --run-dir '{}' --ranks 2 --steps 40 | head -n 3 >/dev/null; exit ${{PIPESTATUS[0]}}",
        tarazed().display(),
        project.config().display(),
        dir.display()
    );
    let output = Command::new("bash")
        .args(["-c", &script])
        .env("TMPDIR", project.temporary())
        .output()
        .expect("bash runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let trace = std::fs::read(dir.join("trace.jsonl")).expect("a trace");
    assert_same_trace(&trace, undisturbed(40), &said);
}
