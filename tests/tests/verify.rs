//! The independent verifier on real runs: it agrees with a run in which ranks were killed, and it names what was damaged.
//!
//! `tarazed-verify` shares no code with the program (`tests/tests/tidy/floors.rs`), so its word is a second opinion on CKPT-1,
//! CKPT-4, STEP-4, DATA-1 and DATA-2, made from the documented formats alone.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tarazed_tests::harness::{Outcome, Project, Run};

const STEPS: u64 = 240;

/// A run of three ranks that were killed, one of one rank that was not, of the same config: decisions every few steps,
/// and so little text that domains are passed over several times.
fn runs() -> &'static Project {
    static PROJECT: OnceLock<Project> = OnceLock::new();
    PROJECT.get_or_init(|| {
        let project = Project::tiny_with(&[
            ("mixture.controller", "\"ado\""),
            ("mixture.start_steps", "20"),
            ("mixture.interval_steps", "5"),
            ("mixture.lag_steps", "3"),
        ]);
        let mut killed = Run::start(&project.train("killed").ranks(3).steps(STEPS));
        for (step, worker) in [(15, 1), (60, 0), (61, 2), (140, 1)] {
            killed.wait_for_step(step);
            killed.kill_rank(worker);
        }
        killed.finish().assert_code(0);
        assert!(killed.events("rank_lost").len() >= 3, "{}", killed.tail());
        let _alone = project.train("alone").ranks(1).steps(STEPS).complete();
        project
    })
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn json(outcome: &Outcome) -> Value {
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|e| panic!("{e}: {}", outcome.tail()))
}

/// A copy of a folder of the killed run that a test may damage.
fn copy(part: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a folder");
    copy_into(&runs().run_dir("killed").join(part), copy.path());
    copy
}

fn copy_into(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).expect("a folder").flatten() {
        let target = to.join(entry.file_name());
        let kind = entry.file_type().expect("a type");
        if kind.is_dir() {
            std::fs::create_dir(&target).expect("a folder");
            copy_into(&entry.path(), &target);
        } else if kind.is_file() {
            std::fs::copy(entry.path(), &target).expect("a copy");
        }
    }
}

/// All files below a folder, by key.
fn keys(folder: &Path, prefix: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = vec![folder.join(prefix)];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).expect("a folder").flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
            } else {
                found.push(text(entry.path().strip_prefix(folder).expect("below it")).to_owned());
            }
        }
    }
    found.sort();
    found
}

#[track_caller]
fn assert_bad(outcome: &Outcome, parts: &[&str]) {
    outcome.assert_code(1);
    let bad: Vec<&str> = outcome.stdout.lines().filter(|line| line.starts_with("BAD ")).collect();
    for part in parts {
        assert!(
            bad.iter().any(|line| line.contains(part)),
            "'{part}' is not named\n{}",
            outcome.tail()
        );
    }
}

fn bucket(store: &Path) -> Outcome {
    runs().verify(&["bucket", text(store)])
}

/// CKPT-1, CKPT-4, STEP-4: every acknowledged checkpoint of a run that lost ranks restores to the state of its line.
#[test]
fn the_store_of_a_disturbed_run_is_sound() {
    let store = runs().run_dir("killed").join("store");
    let outcome = runs().verify(&["bucket", text(&store), "--json"]);
    outcome.assert_code(0);
    let report = json(&outcome);
    assert_eq!(report["ok"], true, "{report}");
    let restorable = report["restorable"].as_array().expect("a list");
    assert_eq!(restorable.len(), 3, "checkpoint.keep_last is 3: {report}");
    let lines = std::fs::read_to_string(runs().run_dir("killed").join("trace.jsonl")).expect("a trace");
    for checkpoint in restorable {
        let step = checkpoint["step"].as_u64().expect("a step") as usize;
        let line: Value = serde_json::from_str(lines.lines().nth(step - 1).expect("its line")).expect("JSON");
        assert_eq!(checkpoint["state"], line["state"], "step {step}");
    }
    assert!(report["retired"].as_u64() > Some(5), "{report}");
}

/// DATA-1, DATA-2, LOOP-1: every line's samples follow from the recipe, each is used once, and both runs agree.
#[test]
fn the_traces_of_both_runs_use_every_sample_once() {
    let (killed, alone) = (runs().run_dir("killed"), runs().run_dir("alone"));
    let outcome = runs().verify(&["trace", text(&killed), text(&alone), "--json"]);
    outcome.assert_code(0);
    let report = json(&outcome);
    assert_eq!(report["common_lines"], STEPS, "{report}");
    for run in report["runs"].as_array().expect("two runs") {
        assert_eq!(
            (&run["lines"], &run["finding_count"]),
            (&STEPS.into(), &0.into()),
            "{report}"
        );
        let domains = run["domains"].as_array().expect("domains");
        let sum = |key: &str| domains.iter().filter_map(|domain| domain[key].as_u64()).sum::<u64>();
        assert_eq!(sum("samples"), STEPS * 8, "{report}");
        assert!(sum("whole_epochs") >= 2, "epochs end within the run: {report}");
    }
    let trace = std::fs::read_to_string(killed.join("trace.jsonl")).expect("a trace");
    assert!(
        trace.contains("\"mixture\":{\"weights\":"),
        "the mixture was changed by decisions"
    );
}

/// CKPT-1, CKPT-4: one flipped bit in any record, manifest or shard that a checkpoint needs is found, and named.
#[test]
fn no_byte_of_any_object_changes_unseen() {
    let whole = copy("store");
    let needed = |prefix| keys(whole.path(), prefix);
    let report = json(&runs().verify(&["bucket", text(whole.path()), "--json"]));
    let orphans = report["orphans"].as_array().expect("a list");
    let mut damaged = 0;
    for key in ["commits", "manifests", "shards"].into_iter().flat_map(needed) {
        if orphans.iter().any(|orphan| *orphan == key.as_str()) {
            continue;
        }
        let path = whole.path().join(&key);
        let good = std::fs::read(&path).expect("an object");
        let mut bad = good.clone();
        let at = (damaged * 7919) % bad.len();
        bad[at] ^= 1 << (damaged % 8);
        std::fs::write(&path, &bad).expect("a write");
        assert_bad(&bucket(whole.path()), &[&key]);
        std::fs::write(&path, &good).expect("a write");
        damaged += 1;
    }
    assert!(
        damaged > 3 + 3 * 8,
        "records, manifests, and eight shards each: {damaged}"
    );
    bucket(whole.path()).assert_code(0);
}

/// CKPT-1: what is lost or cut is named; what nobody needs is listed, and is no error.
#[test]
fn lost_and_cut_objects_are_named_and_strays_are_listed() {
    let whole = copy("store");
    let last = |prefix| keys(whole.path(), prefix).pop().expect("an object");
    let first_record = keys(whole.path(), "commits").swap_remove(0);
    for key in [first_record, last("manifests"), last("shards")] {
        let path = whole.path().join(&key);
        let good = std::fs::read(&path).expect("an object");
        std::fs::remove_file(&path).expect("gone");
        assert_bad(&bucket(whole.path()), &[&key, "missing"]);
        std::fs::write(&path, &good[..good.len() - 1]).expect("a write");
        assert_bad(&bucket(whole.path()), &[&key]);
        std::fs::write(&path, &good).expect("a write");
    }
    std::fs::write(whole.path().join("shards/stray"), "x").expect("a write");
    let outcome = bucket(whole.path());
    outcome.assert_code(0);
    assert!(outcome.stdout.contains("orphan  shards/stray"), "{}", outcome.tail());
}

/// A run folder as `trace` reads it, with its trace changed.
fn with_trace(change: impl FnOnce(&mut Vec<String>)) -> (tempfile::TempDir, Outcome) {
    let run = copy("");
    let path = run.path().join("trace.jsonl");
    let mut lines: Vec<String> = std::fs::read_to_string(&path)
        .expect("a trace")
        .lines()
        .map(str::to_owned)
        .collect();
    change(&mut lines);
    std::fs::write(&path, lines.join("\n") + "\n").expect("a write");
    let outcome = runs().verify(&["trace", text(run.path())]);
    (run, outcome)
}

/// DATA-1: lines dropped, repeated, swapped or edited are named.
#[test]
fn a_changed_trace_is_found() {
    let bad = |change: fn(&mut Vec<String>), parts: &[&str]| assert_bad(&with_trace(change).1, parts);
    bad(
        |lines| drop(lines.remove(99)),
        &[
            "line 100: step 101 where step 100 must stand",
            "are in no line that proves",
        ],
    );
    bad(
        |lines| lines.insert(100, lines[99].clone()),
        &["line 101: step 100 stands again"],
    );
    bad(
        |lines| lines.swap(99, 100),
        &["line 100: step 101", "line 101: step 100"],
    );
    // A step that trained on another step's samples.
    bad(
        |lines| {
            let line: Value = serde_json::from_str(&lines[120]).expect("JSON");
            let other: Value = serde_json::from_str(&lines[99]).expect("JSON");
            let (from, to) = (
                other["data"].as_str().expect("text"),
                line["data"].as_str().expect("text"),
            );
            lines[99] = lines[99].replace(from, to);
        },
        &["line 100: data is", "are in no line that proves"],
    );
    bad(
        |lines| lines[99] = lines[99].replace("\"loss\":", "\"loss\":1"),
        &["line 100: loss"],
    );
    bad(
        |lines| lines[99] = lines[99].replace("\"tokens\":25600,", "\"tokens\":25601,"),
        &["line 100: 25601 tokens"],
    );
    bad(
        |lines| {
            lines[99].pop();
        },
        &["line 100: not JSON"],
    );
    // A decision that was not the one the ranks followed.
    bad(
        |lines| {
            let at = lines
                .iter()
                .position(|line| line.contains("\"weights\":[0."))
                .expect("a decision");
            lines[at] = lines[at].replacen("\"weights\":[0.", "\"weights\":[0.9", 1);
        },
        &["data is", "mixture"],
    );
    let (run, outcome) = with_trace(|_| {});
    outcome.assert_code(0);
    let path = run.path().join("trace.jsonl");
    let bytes = std::fs::read(&path).expect("a trace");
    std::fs::write(&path, &bytes[..bytes.len() - 1]).expect("a write");
    assert_bad(&runs().verify(&["trace", text(run.path())]), &["breaks off"]);
}

/// DATA-2, DATA-3: another seed, another byte of the tokens or of `data.json` do not pass; two runs that differ in what
/// neither recipe nor arithmetic of a line gives away are told apart.
#[test]
fn changed_data_configs_and_states_are_found() {
    let run = copy("");
    let config = std::fs::read_to_string(run.path().join("config.toml")).expect("a config");
    assert!(config.contains("seed = 7\n"));
    std::fs::write(
        run.path().join("config.toml"),
        config.replace("seed = 7\n", "seed = 8\n"),
    )
    .expect("a write");
    let verify = || runs().verify(&["trace", text(run.path())]);
    assert_bad(&verify(), &["line 1: data is", "line 240: data is"]);
    std::fs::write(run.path().join("config.toml"), config).expect("a write");
    verify().assert_code(0);
    for key in keys(run.path(), "data")
        .iter()
        .filter(|key| !key.ends_with("/lock") && !key.ends_with(".lock"))
    {
        let path = run.path().join(key);
        let good = std::fs::read(&path).expect("a file");
        if good.is_empty() {
            continue;
        }
        let mut bad = good.clone();
        bad[good.len() / 2] ^= 1;
        std::fs::write(&path, &bad).expect("a write");
        let outcome = verify();
        let name = key.rsplit('/').next().unwrap_or_default();
        if name == "data.json" {
            outcome.assert_code(2);
            outcome.assert_says("data.json");
        } else {
            assert_bad(&outcome, &[name]);
        }
        std::fs::write(&path, &good).expect("a write");
    }
    let (other, outcome) = with_trace(|lines| {
        let line: Value = serde_json::from_str(&lines[49]).expect("JSON");
        let state = line["state"].as_str().expect("text");
        lines[49] = lines[49].replace(state, &"0".repeat(64));
    });
    outcome.assert_code(0); // the state alone says nothing that a trace could refute
    let outcome = runs().verify(&["trace", text(other.path()), text(&runs().run_dir("alone"))]);
    assert_bad(&outcome, &["line 50 is the first that differs"]);
}
