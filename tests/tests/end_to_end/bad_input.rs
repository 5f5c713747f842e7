//! Configs, data and folders that cannot be used: one message with key or file, cause and remedy; code 2; nothing
//! written.

use crate::common::{assert_refused, assert_undisturbed, assert_untouched, files};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use tarazed_tests::harness::{Project, Run, Train};

/// Refused, and the run folder is not even made.
#[track_caller]
fn assert_refused_untouched(project: &Project, train: &Train, parts: &[&str]) {
    let before = files(project.path());
    let outcome = train.finish();
    assert_refused(&outcome, parts);
    let mut after = files(project.path());
    after.retain(|name, _| !name.to_string_lossy().starts_with("bad.std"));
    let names = |found: &BTreeMap<PathBuf, Vec<u8>>| -> Vec<String> {
        found.keys().map(|name| name.display().to_string()).collect()
    };
    assert_eq!(names(&after), names(&before), "written\n{}", outcome.tail());
    assert!(!train.run_dir().exists(), "{} was made", train.run_dir().display());
}

fn without_logs(mut found: BTreeMap<PathBuf, Vec<u8>>) -> BTreeMap<PathBuf, Vec<u8>> {
    found.retain(|name, _| !name.starts_with("log"));
    found
}

/// A refusal may be logged; else a run folder holds what it held: no file changed, none gone, none new. `before` is without
/// its logs.
#[track_caller]
fn assert_untouched_but_logs(folder: &Path, before: &BTreeMap<PathBuf, Vec<u8>>) {
    let after = without_logs(files(folder));
    let names = before.keys().chain(after.keys()).collect::<BTreeSet<_>>();
    let changed: Vec<_> = names
        .into_iter()
        .filter(|name| before.get(*name) != after.get(*name))
        .collect();
    assert!(changed.is_empty(), "changed in {}: {changed:?}", folder.display());
}

/// Bad configs, in the file itself; `--set` and missing files are the command line's tests.
#[test]
fn bad_configs_are_refused_by_key_and_remedy() {
    let shared = Project::tiny();
    for (key, value, parts) in [
        (
            "model.colour",
            "3",
            &["tiny.toml", "unknown field `colour`", "README.md"][..],
        ),
        ("colours.red", "3", &["tiny.toml", "unknown field `colours`"]),
        ("model.layers", "\"two\"", &["tiny.toml", "layers", "invalid type"]),
        (
            "model.heads",
            "5",
            &[
                "model.heads",
                "do not divide model.hidden = 32",
                "choose a number of heads",
            ],
        ),
        (
            "model.kv_heads",
            "3",
            &["model.kv_heads", "do not divide model.heads = 4"],
        ),
        ("model.vocabulary", "100", &["model.vocabulary", "too small", "264"]),
        (
            "cluster.ranks",
            "9",
            &[
                "cluster.ranks",
                "9 ranks are more than batch.lanes = 8",
                "raise batch.lanes",
            ],
        ),
        (
            "optimizer.replicas",
            "3",
            &["optimizer.replicas", "3 copies", "cluster.ranks is 2", "run more ranks"],
        ),
        (
            "batch.micro_batch_sequences",
            "2",
            &["batch.micro_batch_sequences", "does not divide", "divisor"],
        ),
        (
            "optimizer.learning_rate",
            "nan",
            &["optimizer.learning_rate", "not positive"],
        ),
        ("fault.timeout_ms", "1", &["fault.timeout_ms", "below 200", "raise it"]),
        ("data.domains", "[]", &["data.domains", "name at least one"]),
        (
            "checkpoint.store",
            "\"ftp://nowhere/x\"",
            &["checkpoint.store", "ftp://; give a folder or a URL"],
        ),
    ] {
        let project = Project::tiny_with(&[("cluster.ranks", "2"), (key, value)]);
        assert_refused_untouched(&project, &project.train("bad"), parts);
    }
    std::fs::write(shared.config(), "[run\nname = 3").expect("written");
    assert_refused_untouched(
        &shared,
        &shared.train("bad"),
        &["tiny.toml", "line 1", "correct the file"],
    );
}

/// Domains that hold no usable text: file, place and remedy, and no run folder.
#[test]
fn bad_domains_are_refused_by_file_and_remedy() {
    /// Name, what the domain's file holds (none: no file), and parts of the message.
    type Case = (&'static str, Option<&'static [u8]>, &'static [&'static str]);
    let cases: [Case; 7] = [
        ("missing", None, &["code.jsonl", "no such file", "data.domains"]),
        ("empty", Some(b""), &["code.jsonl", "domain 'code'", "no document"]),
        (
            "blank",
            Some(b"{\"text\":\"  \"}\n"),
            &["code.jsonl", "domain 'code'", "no document"],
        ),
        (
            "short",
            Some(b"{\"text\":\"a\"}\n{\"text\":\"b\"}\n"),
            &["domain 'code'", "tokens", "model.context"],
        ),
        (
            "utf8",
            Some(b"{\"text\":\"ok\"}\n{\"text\":\"\xff\xfe\"}\n"),
            &["code.jsonl", "invalid UTF-8 at byte 23", "convert"],
        ),
        (
            "json",
            Some(b"{\"text\":\"ok\"}\n{\"text\":\n"),
            &["code.jsonl:2", "not a JSON object"],
        ),
        (
            "field",
            Some(b"{\"body\":\"ok\"}\n"),
            &["code.jsonl:1", "text", "data.domains.text_field"],
        ),
    ];
    for (name, bytes, parts) in cases {
        let project = Project::tiny();
        match bytes {
            Some(bytes) => std::fs::write(project.text("code"), bytes).expect("written"),
            None => std::fs::remove_file(project.text("code")).expect("removed"),
        }
        eprintln!("case {name}");
        assert_refused_untouched(&project, &project.train("bad").ranks(2), parts);
    }
}

/// A run folder holds one run: another config, whatever decides numbers in it, is refused by name of what differs, and
/// the run is as good as before.
#[test]
fn a_run_folder_of_another_config_is_refused() {
    let project = Project::tiny();
    let run = project.train("mine").ranks(2).steps(20).complete();
    let before = files(run.dir());
    for (key, value, section) in [
        ("run.seed", "8", "seed"),
        ("model.layers", "3", "model"),
        ("batch.lanes", "16", "batch"),
        ("optimizer.learning_rate", "0.1", "optimizer"),
        ("evaluation.interval_steps", "7", "evaluation"),
        ("mixture.controller", "ado", "mixture"),
        ("data.held_out_fraction", "0.2", "held_out"),
    ] {
        let outcome = project.train("mine").ranks(2).steps(30).set(key, value).finish();
        let differs = format!("differs in: {section})");
        assert_refused(&outcome, &["runs/mine", "another config", &differs, "--run-dir"]);
        assert_untouched(run.dir(), &before);
    }
    let mut longer = Run::start(&project.train("mine").ranks(3).steps(30));
    assert_undisturbed(&mut longer, 30, "after the refusals");
}

/// A run folder whose texts are not those it began with is refused before anything in it changes; with the old texts
/// back, the run goes on. Both with a checkpoint and before the first.
#[test]
fn a_run_folder_of_other_data_is_refused() {
    for (interval, steps) in [("5", 20), ("0", 20)] {
        let project = Project::tiny_with(&[("checkpoint.interval_steps", interval)]);
        let train = project.train("data").ranks(2).steps(60);
        let mut run = Run::start(&train);
        run.wait_for_step(steps);
        run.signal(rustix::process::Signal::KILL);
        run.finish();
        run.processes().kill_all();
        let before = without_logs(files(run.dir()));
        let good = std::fs::read(project.text("book-en")).expect("a text");
        let mut text = std::fs::OpenOptions::new()
            .append(true)
            .open(project.text("book-en"))
            .expect("a text");
        writeln!(text, "{{\"text\":\"One more sentence.\"}}").expect("written");
        let outcome = train.finish();
        assert_refused(&outcome, &["runs/data", "other data", "--run-dir"]);
        assert_untouched_but_logs(run.dir(), &before);
        std::fs::write(project.text("book-en"), good).expect("written");
        assert_undisturbed(&mut Run::start(&train), 60, "with the old texts back");
    }
}

/// CKPT-3, SUP-2: a second controller on a live run's folder is refused, and the first does not notice.
#[test]
fn a_run_folder_in_use_is_refused() {
    let project = Project::tiny();
    let train = project.train("busy").ranks(2).steps(150);
    let mut run = Run::start(&train);
    run.wait_for_step(10);
    for ranks in [2, 3] {
        let second = project.tarazed(&[
            "train".as_ref(),
            project.config().as_os_str(),
            "--run-dir".as_ref(),
            run.dir().as_os_str(),
            "--ranks".as_ref(),
            ranks.to_string().as_ref(),
        ]);
        assert_refused(&second, &["runs/busy", "in use by another run", "--run-dir"]);
    }
    assert!(run.ended().is_none(), "the first run goes on\n{}", run.tail());
    assert_undisturbed(&mut run, 150, "two refused controllers");
    assert_eq!(run.events("rank_lost").len(), 0);
}

/// A run folder that cannot be written is refused by name.
#[test]
fn a_run_folder_that_cannot_be_made_is_refused() {
    let project = Project::tiny();
    std::fs::write(project.run_dir("file"), "not a folder").expect("written");
    let outcome = project.train("file").ranks(1).steps(2).finish();
    assert_refused(&outcome, &["runs/file"]);
    assert_eq!(std::fs::read(project.run_dir("file")).expect("a file"), b"not a folder");
}
