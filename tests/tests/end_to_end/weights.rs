//! `weights.jsonl`: the weight trajectory of a real run, whatever happens to it.
//!
//! That it is byte for byte that of an undisturbed run is also part of [`assert_undisturbed`], so every storm says it.

use crate::common::{assert_prefix, assert_undisturbed};
use rustix::process::Signal;
use std::io::Write;
use tarazed_tests::harness::{Project, Run, undisturbed_weights};

/// The report's section 3.2.3: a curve over the layers for each of nine parameter kinds, and from the second line on how far
/// each has moved.
#[test]
fn a_line_holds_nine_kinds_by_layer_and_how_far_they_moved() {
    let project = Project::tiny();
    let mut run = project.train("curves").ranks(2).steps(40).complete();
    let lines = run.json_lines("weights.jsonl");
    let steps: Vec<_> = lines.iter().map(|line| line["step"].as_u64()).collect();
    assert_eq!(steps, [Some(15), Some(30)]);
    let kinds = lines[0]["std"].as_object().expect("an object");
    assert_eq!(kinds.len(), 9, "{kinds:?}");
    for (kind, curve) in kinds {
        let curve = curve.as_array().expect("a curve");
        assert_eq!(curve.len(), 2, "{kind}: one value for each layer");
        let spread = |value: &serde_json::Value| value.as_f64().expect("a number");
        let is_norm = kind.contains("layernorm");
        assert!(
            curve.iter().all(|std| spread(std) > if is_norm { 0.0 } else { 1e-3 }),
            "{kind}: {curve:?}"
        );
        assert!(lines[1]["distance"][kind].as_f64() > Some(0.0), "{kind}: {}", lines[1]);
    }
    assert!(lines[0].get("distance").is_none(), "nothing is before the first line");
    assert_eq!(lines[1]["tokens"], run.json_lines("trace.jsonl")[29]["tokens"]);
    assert_undisturbed(&mut run, 40, "two ranks");
}

/// A controller and a rank killed, another world size, a torn line, a line behind the trace's end, and a file whose end a
/// power loss took: no line twice, none missing, none of a step that is not committed.
#[test]
fn lives_that_end_anyhow_leave_one_trajectory() {
    let project = Project::tiny_with(&[("fault.restarts_max", "100"), ("checkpoint.interval_steps", "100")]);
    let file = project.run_dir("lives").join("weights.jsonl");
    let mut step = 0;
    for (ranks, harm) in [(3, "tear"), (2, "run ahead"), (4, "shorten")] {
        let mut run = Run::start(&project.train("lives").ranks(ranks).steps(600));
        run.wait_for_step(step + 40);
        assert!(run.kill_rank(0).is_some(), "{}", run.tail());
        run.wait_for_step(step + 80);
        run.signal(Signal::KILL);
        run.finish();
        // No rank lives on: the next life begins from a checkpoint.
        run.processes().kill_all();
        step = assert_prefix(&run);
        let written = undisturbed_weights(step).to_vec();
        assert!(
            run.weights().starts_with(&written),
            "committed with its line\n{}",
            run.tail()
        );
        let checkpoint = run.newest_checkpoint();
        run.leave();
        harm_file(&file, harm, &written, checkpoint);
    }
    let mut last = Run::start(&project.train("lives").ranks(1).steps(600));
    assert_undisturbed(&mut last, 600, "three lives");
}

fn harm_file(file: &std::path::Path, harm: &str, written: &[u8], checkpoint: u64) {
    let append = |bytes: &[u8]| {
        let opened = std::fs::OpenOptions::new().append(true).open(file);
        opened
            .and_then(|mut file| file.write_all(bytes))
            .expect("a writable file");
    };
    match harm {
        "tear" => append(b"{\"step\":9"),
        "run ahead" => {
            std::fs::write(file, written).expect("a writable file");
            append(b"{\"step\":100000,\"tokens\":25600000,\"std\":{\"mlp.up_proj\":[0.5,0.5]}}\n");
        }
        // A checkpoint is committed only when the lines before it lie on the disk: these and no others can be lost.
        _ => std::fs::write(file, undisturbed_weights(checkpoint)).expect("a writable file"),
    }
}
