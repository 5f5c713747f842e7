//! Files of a run that were damaged, and disks that are full: nothing good is lost, and the message says what to do.

use crate::common::{assert_halted, assert_undisturbed, damage, files, files_with_ending, truncate};
use rustix::process::Signal;
use std::path::{Path, PathBuf};
use tarazed_tests::harness::{Project, Run, assert_same_trace, line_count, undisturbed};

/// The folders of checkpoint shards, by step, oldest first.
fn checkpoint_folders(run_dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(run_dir.join("store/shards"))
        .expect("checkpoints")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    found.sort();
    found
}

/// The key of a file of a run's own store.
fn object_key(run_dir: &Path, file: &Path) -> String {
    let key = file.strip_prefix(run_dir.join("store")).expect("a file of the store");
    key.to_str().expect("a plain name").to_owned()
}

/// Fails unless every file of `before` is still there with its bytes, but for the names that a start may change.
#[track_caller]
fn assert_kept(folder: &Path, before: &std::collections::BTreeMap<PathBuf, Vec<u8>>) {
    let after = files(folder);
    for (name, bytes) in before {
        let text = name.to_string_lossy();
        let changes = ["log/", "control", "ranks/"];
        let is_log = changes.iter().any(|start| text.starts_with(start)) || text == "lock" || text == "events.jsonl";
        let kept = after.get(name) == Some(bytes);
        assert!(is_log || kept, "{text} in {} was changed or removed", folder.display());
    }
}

/// DATA-3, DET-1: a token shard with flipped bytes is found at the next start: code 3, the file and what to delete;
/// with that done, the data are made again and the run goes on.
#[test]
fn a_corrupt_token_shard_is_named_and_can_be_rebuilt() {
    let project = Project::tiny();
    let run = project.train("tokens").ranks(2).steps(30).complete();
    let shard = files_with_ending(&run.dir().join("data"), ".tokens").remove(0);
    damage(&shard);
    let before = files(run.dir());
    let train = project.train("tokens").ranks(2).steps(60);
    let outcome = train.finish();
    let (file, folder) = (shard.to_string_lossy(), shard.parent().expect("a folder"));
    assert_halted(&outcome, &[&file, &format!("delete the folder {}", folder.display())]);
    assert!(!outcome.stdout.contains("started as process"), "{}", outcome.tail());
    assert_kept(run.dir(), &before);
    std::fs::remove_dir_all(folder).expect("deleted as told");
    assert_undisturbed(&mut Run::start(&train), 60, "data made again");
}

/// CKPT-4, STEP-5: truncated, damaged and missing objects of the newest checkpoints cost those checkpoints: said aloud,
/// the run goes on from the newest good one, also where that is before the end of a finished trace.
#[test]
fn bad_checkpoints_are_passed_over_aloud() {
    let project = Project::tiny();
    for (name, harm) in [("cut", truncate as fn(&Path)), ("flip", damage), ("gone", remove)] {
        let run = project.train(name).ranks(2).steps(60).complete();
        let mut folders = checkpoint_folders(run.dir());
        let newest = folders.pop().expect("a checkpoint");
        let harmed = files_with_ending(&newest, ".safetensors").swap_remove(3);
        harm(&harmed);
        let key = object_key(run.dir(), &harmed);
        // The trace ends at 60; the checkpoint before is of step 40, or a little later where the disk was slow.
        let before = folders.pop().expect("another checkpoint");
        let before: u64 = before
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok())
            .expect("a step");
        let mut same = Run::start(&project.train(name).ranks(3).steps(60));
        assert_undisturbed(&mut same, 60, name);
        // What is missing or too short the controller sees; what is in it those who read it. Both say which object it is, and
        // what to do about it.
        let told = [same.events("warning"), same.events("checkpoint_refuted")].concat();
        let parts = [
            "checkpoint of step 60",
            &key,
            "use an older checkpoint and find out what",
        ];
        let names_it = |event: &serde_json::Value| {
            let cause = event["cause"].as_str().unwrap_or_default();
            parts.iter().all(|part| cause.contains(part))
        };
        assert!(told.iter().any(names_it), "{name}: {told:?}\n{}", same.tail());
        let bases: Vec<_> = same.events("generation").iter().map(|g| g["base"].clone()).collect();
        assert_eq!(bases.last(), Some(&before.into()), "{name}\n{}", same.tail());
        // It was saved again, so that the next start needs no replay.
        let mut longer = Run::start(&project.train(name).ranks(1).steps(70));
        assert_undisturbed(&mut longer, 70, name);
        let bases: Vec<_> = longer.events("generation").iter().map(|g| g["base"].clone()).collect();
        assert_eq!(bases.last(), Some(&60.into()), "{name}\n{}", longer.tail());
    }
}

fn remove(file: &Path) {
    std::fs::remove_file(file).expect("removed");
}

/// CKPT-1, CKPT-4: where every checkpoint is bad, beginning anew is a person's decision: code 3, which object of each is bad,
/// and what to do; trace and objects stay.
#[test]
fn a_store_of_bad_checkpoints_halts_and_stays() {
    let project = Project::tiny();
    for (name, harm) in [("cut", truncate as fn(&Path)), ("flip", damage)] {
        all_bad(&project, name, harm);
    }
}

fn all_bad(project: &Project, name: &str, harm: fn(&Path)) {
    let run = project.train(name).ranks(2).steps(60).complete();
    let mut keys = Vec::new();
    for folder in checkpoint_folders(run.dir()) {
        let harmed = files_with_ending(&folder, ".safetensors").swap_remove(0);
        harm(&harmed);
        keys.push(object_key(run.dir(), &harmed));
    }
    let before = files(run.dir());
    let mut again = Run::start(&project.train(name).ranks(2).steps(90));
    let outcome = again.finish();
    // Where the disk is slow one of them may have been put off.
    let steps = checkpoint_folders(run.dir());
    let steps = steps
        .iter()
        .filter_map(|path| path.file_name()?.to_str()?.parse::<u64>().ok());
    let steps: Vec<String> = steps.map(|step| format!("step {step}")).collect();
    assert!(steps.len() > 1, "{steps:?}");
    let remedies = ["restore its objects from a copy", "another checkpoint.store"];
    let said = steps.iter().chain(&keys).map(String::as_str);
    assert_halted(&outcome, &said.chain(remedies).collect::<Vec<_>>());
    assert_same_trace(&again.trace(), undisturbed(60), "the trace stays");
    assert_kept(run.dir(), &before);
    let verify = project.tarazed(&["checkpoint".as_ref(), "verify".as_ref(), run.dir().as_os_str()]);
    verify.assert_code(3);
}

/// STEP-3: a trace that ends in half a line, as a power loss leaves it, is whole again after the next start.
#[test]
fn a_torn_trace_line_is_cut_off_and_written_again() {
    let project = Project::tiny();
    let run = project.train("torn").ranks(2).steps(45).complete();
    let trace = run.trace();
    std::fs::write(run.dir().join("trace.jsonl"), &trace[..trace.len() - 100]).expect("torn");
    // The checkpoint of step 45 is now newer than the trace: it is not the run's to say what step 45 held.
    let outcome = project.train("torn").ranks(2).steps(60).finish();
    assert_halted(&outcome, &["step 45", "step 44", "trace.jsonl"]);
    std::fs::write(run.dir().join("trace.jsonl"), &trace).expect("restored as told");
    let torn = [&trace[..], b"{\"step\":46,\"tok"].concat();
    std::fs::write(run.dir().join("trace.jsonl"), torn).expect("torn behind the checkpoint");
    assert_undisturbed(
        &mut Run::start(&project.train("torn").ranks(2).steps(60)),
        60,
        "a torn line",
    );
}

/// A stop whose last checkpoint finds no room needs a person, whatever a scheduler would try again; with room again the
/// run goes on.
#[test]
fn a_last_checkpoint_on_a_full_disk_needs_a_person() {
    let project = Project::tiny_with(&[("checkpoint.interval_steps", "0"), ("optimizer.shards", "2")]);
    let train = project.train("last").ranks(2).steps(400).on_small_disk();
    let mut run = Run::start(&train);
    run.wait_for_step(5);
    // Room for some fifty lines, and none for a shard.
    run.fill_disk(10 * run.trace().len() as u64);
    run.signal(Signal::TERM);
    assert_halted(&run.finish(), &["no space left", "free space"]);
    assert_undisturbed(&mut Run::start(&train), 400, "with room again");
}

/// STEP-3, CKPT-1: a disk that fills up costs checkpoints, said aloud, and at last halts the run with the file and the
/// remedy; what was acknowledged is whole, and with room again the run goes on. A start on a full disk needs a person,
/// too, and harms nothing.
#[test]
fn a_full_disk_loses_nothing() {
    // Two shards instead of eight: large ones, so that the trace of some hundred steps is smaller.
    let project = Project::tiny_with(&[("checkpoint.interval_steps", "10"), ("optimizer.shards", "2")]);
    let train = project.train("disk").ranks(2).steps(1_000).on_small_disk();
    let mut run = Run::start(&train);
    run.wait_for_step(30);
    run.wait_for("a checkpoint", |run| (run.newest_checkpoint() > 0).then_some(()));
    let shards = files_with_ending(&run.dir().join("store"), ".safetensors");
    let sizes = shards
        .iter()
        .map(|shard| std::fs::metadata(shard).map_or(u64::MAX, |file| file.len()));
    let smallest = sizes.min();
    // The trace has room for some fifteen more lines, a shard of a checkpoint has none.
    let written = run.trace();
    let length = written.len() as u64;
    let limit = length + 15 * length / line_count(&written);
    run.fill_disk(limit);
    assert!(smallest > Some(limit), "every shard is larger than {limit} bytes");
    let outcome = run.finish();
    assert_halted(&outcome, &["runs/disk/trace.jsonl", "start again"]);
    assert_eq!(run.processes().ranks(), [0_u32; 0]);
    let warnings = run.events("warning");
    let told = warnings
        .iter()
        .any(|w| w["cause"].to_string().contains("no checkpoint of step"));
    assert!(told, "{warnings:?}\n{}", run.tail());
    let trace = run.trace();
    assert_same_trace(&trace, undisturbed(line_count(&trace)), "what was written is whole");
    let full = train.finish_on_full_disk();
    assert_halted(&full, &["runs/disk", "free space"]);
    assert_same_trace(&run.trace(), &trace, "a start on a full disk");
    let fresh = project.train("new").ranks(2).steps(10);
    assert_halted(&fresh.finish_on_full_disk(), &["runs/new", "free space"]);
    assert!(!fresh.run_dir().exists(), "a new run that cannot begin leaves nothing");
    assert_undisturbed(&mut Run::start(&train), 1_000, "with room again");
}

/// CKPT-4: the newest checkpoint names the trace that it was made with, and is not gone on from with another one. With its own
/// trace back the run goes on.
#[test]
fn a_trace_that_is_not_the_checkpoints_halts() {
    let project = Project::tiny();
    let train = project.train("edited").ranks(2);
    Run::start(&train.clone().steps(40)).finish().assert_code(0);
    let path = project.run_dir("edited").join("trace.jsonl");
    let own = std::fs::read_to_string(&path).expect("a trace");
    // The state of a step long before the checkpoint, which nothing else in its line repeats.
    let fifth = own.match_indices("\"state\":\"").nth(4);
    let at = fifth.map(|(at, key)| at + key.len()).expect("a hash");
    let other = if own[at..].starts_with('0') { "1" } else { "0" };
    let mut edited = own.clone();
    edited.replace_range(at..=at, other);
    std::fs::write(&path, &edited).expect("written");
    let refused = train.clone().steps(60).finish();
    assert_halted(&refused, &["trace.jsonl", "checkpoint of step 40", "--run-dir"]);
    assert_eq!(
        std::fs::read_to_string(&path).expect("a trace"),
        edited,
        "nothing is written"
    );
    std::fs::write(&path, &own).expect("written");
    assert_undisturbed(&mut Run::start(&train.steps(60)), 60, "with its own trace");
}
