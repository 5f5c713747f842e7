//! Data that change while a run trains (`tarazed data add`).

use crate::common::{assert_refused, begun_again, wait_for_no_ranks};
use rustix::process::Signal;
use serde_json::Value;
use std::path::{Path, PathBuf};
use tarazed_tests::harness::{Outcome, Project, Run, assert_same_trace};

const STEPS: u64 = 480;

/// A project in which persons decide, every ten lines and five steps ahead.
fn project() -> Project {
    Project::tiny_with(&[
        ("policy.persons", "true"),
        ("mixture.start_steps", "10"),
        ("mixture.interval_steps", "10"),
        ("mixture.lag_steps", "5"),
    ])
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The only data set that a run has made.
fn data_set(run_dir: &Path) -> PathBuf {
    let folders = std::fs::read_dir(run_dir.join("data")).expect("a folder").flatten();
    let mut sets = folders
        .map(|entry| entry.path())
        .filter(|path| path.join("data.json").exists());
    sets.next().expect("a data set")
}

/// A data set of other text: a domain `late`, and another edition of `code`. It is made by a run of its own, with the
/// tokenizer of `like` or one that it trains.
fn other_data(like: Option<&Path>) -> (Project, PathBuf) {
    let other = project();
    other.edit(|config| {
        let data = config["data"].as_table_mut().expect("a section");
        if let Some(like) = like {
            let path = like.join("tokenizer.json");
            let tokenizer = toml::Table::from_iter([("path".to_owned(), text(&path).into())]);
            data.insert("tokenizer".to_owned(), tokenizer.into());
        }
        let domains = data["domains"].as_array_mut().expect("a list");
        domains.retain(|domain| domain["name"].as_str() != Some("wiki-zh"));
        domains[0]["name"] = "late".into();
    });
    for domain in ["book-en", "code"] {
        let path = other.text(domain);
        let documents = std::fs::read_to_string(&path).expect("a text");
        let changed = documents.replace("\"text\":\"", "\"text\":\"Once more: ");
        assert_ne!(documents, changed);
        std::fs::write(path, changed).expect("a writable file");
    }
    let made = other.train("made").ranks(1).steps(1).complete();
    let set = data_set(made.dir());
    drop(made);
    (other, set)
}

fn add(project: &Project, run: &str, set: &Path, rest: &[&str]) -> Outcome {
    let run_dir = project.run_dir(run);
    let mut args = vec!["data", "add", text(&run_dir), "--prepared", text(set)];
    args.extend(["--by", "ada", "--reason", "a test"]);
    args.extend(rest);
    project.tarazed(&args)
}

/// `late` enters and `code` is replaced, at the first step that is late enough whenever the run hears of it.
fn add_soon(project: &Project, run: &mut Run, set: &Path) -> u64 {
    loop {
        let at = run.step() + 60;
        assert!(at + 60 < STEPS, "the run is too fast to be asked\n{}", run.tail());
        let step = at.to_string();
        let mut rest = vec!["--replace", "code", "--at-step", &step];
        for weight in ["book-en=2", "wiki-zh=1", "code=2", "late=3"] {
            rest.extend(["--weight", weight]);
        }
        let outcome = add(project, "live", set, &rest);
        if outcome.code == Some(2) && outcome.stderr.contains("any more") {
            continue;
        }
        outcome.assert_code(0);
        assert!(
            outcome.stdout.contains(&format!("from step {at} on")),
            "{}",
            outcome.tail()
        );
        return at;
    }
}

/// DATA-1, DATA-2, LOOP-1, LOOP-2: a domain enters and another gets other text at a stated step, while ranks are killed, and
/// the controller stopped and all of it resumed at other world sizes. The verifier agrees with every line; a run that has only
/// the lines up to the decision, and one rank to which nothing happens, computes the same trace; and without the data set
/// nothing goes on, by name.
#[test]
fn data_enter_a_disturbed_run_as_they_enter_an_undisturbed_one() {
    let project = project();
    let first = project.train("first").ranks(1).steps(1).complete();
    let (_other, set) = other_data(Some(&data_set(first.dir())));
    drop(first);

    let train = |ranks| project.train("live").ranks(ranks).steps(STEPS);
    let mut run = Run::start(&train(3));
    run.wait_for_step(12);
    let at = add_soon(&project, &mut run, &set);
    run.kill_rank(1);
    run.wait_for_step(at + 2);
    run.kill_rank(0);
    run.wait_for_step(at + 12);
    run.signal(Signal::TERM);
    run.finish().assert_code(34);
    let mut resumed = Run::start(&train(2));
    resumed.wait_for_step(at + 40);
    resumed.signal(Signal::KILL);
    resumed.finish();
    resumed.processes().kill_all();
    wait_for_no_ranks(&mut resumed);
    let resumed = train(4).complete();
    let trace = resumed.trace();
    let lines = resumed.json_lines("trace.jsonl");
    assert_eq!(lines.len() as u64, STEPS);

    // It stands in the trace before it acts, and acts from the stated step on.
    let holds = |line: &&Value| line["decisions"][0]["kind"]["data"].is_object();
    let line = lines.iter().find(holds).expect("a line with the decision");
    let decision = &line["decisions"][0];
    assert_eq!(decision["effective"], at);
    assert!(line["step"].as_u64() < Some(at), "{line}");
    for line in &lines {
        let step = line["step"].as_u64().expect("a step");
        assert_eq!(line["mixture"].get("late").is_some(), step > at, "line {step}");
        if let Some(heldout) = line.get("heldout") {
            assert_eq!(heldout.get("late").is_some(), step > at, "line {step}");
        }
    }

    let live = project.run_dir("live");
    let outcome = project.verify(&["trace", text(&live), "--json"]);
    outcome.assert_code(0);
    let report: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    let domains = report["runs"][0]["domains"].as_array().expect("domains");
    let used: u64 = domains.iter().filter_map(|domain| domain["samples"].as_u64()).sum();
    assert_eq!((domains.len(), used), (5, STEPS * 8), "{report}");

    let again = project.run_dir("again");
    begun_again(&live, &again, line["step"].as_u64().expect("a step") as usize);
    let again = project.train("again").ranks(1).steps(STEPS).complete();
    assert_same_trace(&again.trace(), &trace, "from the decision on, on one rank");

    let version = decision["kind"]["data"]["version"].as_str().expect("a version");
    let link = live.join("data").join(version);
    std::fs::remove_file(&link).expect("a link");
    let lacking = project.train("live").ranks(1).steps(STEPS + 10).finish();
    assert_refused(&lacking, &[version, "late"]);
    let outcome = project.verify(&["trace", text(&live)]);
    outcome.assert_code(1);
    assert!(outcome.stdout.contains(version), "{}", outcome.tail());
}

/// A project in which `controller` adapts the mixture every ten lines, the other two advise, and `late` comes as planned.
fn adaptive(controller: &str, set: &Path, at: u64) -> Project {
    let project = project();
    project.set("policy.persons", "false");
    project.set("mixture.controller", &format!("\"{controller}\""));
    let others = ["ado", "odm", "excess"]
        .into_iter()
        .filter(|other| *other != controller);
    let shadow: Vec<String> = others.map(|other| format!("\"{other}\"")).collect();
    project.set("mixture.shadow", &format!("[{}]", shadow.join(", ")));
    project.set("evaluation.interval_steps", "5");
    project.edit(|config| {
        let later = toml::Table::from_iter([
            ("step".to_owned(), toml::Value::Integer(at as i64)),
            ("prepared".to_owned(), text(set).into()),
            ("domains".to_owned(), vec![toml::Value::from("late")].into()),
        ]);
        let data = config["data"].as_table_mut().expect("a section");
        data.insert("later".to_owned(), vec![toml::Value::from(later)].into());
    });
    project
}

/// `code` gets other text, at the first step that is late enough whenever the run hears of it.
fn replace_soon(project: &Project, run: &mut Run, set: &Path) -> u64 {
    loop {
        // Behind the step that is planned.
        let at = run.step() + 61;
        assert!(at + 120 < STEPS, "the run is too fast to be asked\n{}", run.tail());
        let rest = ["--domain", "code", "--replace", "code", "--at-step", &at.to_string()];
        let outcome = add(project, "live", set, &rest);
        if outcome.code == Some(2) && outcome.stderr.contains("any more") {
            continue;
        }
        outcome.assert_code(0);
        return at;
    }
}

/// Decisions of a run by who made them, with their lines.
fn decided<'a>(lines: &'a [Value], by: &str) -> Vec<(u64, &'a Value)> {
    let all = lines
        .iter()
        .flat_map(|line| line["decisions"].as_array().into_iter().flatten());
    all.filter(|decision| decision["by"]["controller"] == by)
        .map(|decision| (decision["line"].as_u64().expect("a line"), decision))
        .collect()
}

/// DATA-2, LOOP-1: a controller adapts the mixture and two advise, while a domain comes as planned and another gets other text
/// because somebody asks; a rank is killed, then the controller, whose ranks the next one takes over, then all of it, and it is
/// resumed at another world size. A run with the same changes to which nothing happens computes the same trace.
fn a_controller_adapts_while_data_come(controller: &str) {
    const AT: u64 = 90;
    let first = project();
    let first_run = first.train("first").ranks(1).steps(1).complete();
    let (_other, set) = other_data(Some(&data_set(first_run.dir())));
    drop(first_run);
    let project = adaptive(controller, &set, AT);

    let train = |ranks| project.train("live").ranks(ranks).steps(STEPS);
    let mut run = Run::start(&train(3));
    run.wait_for_step(30);
    let replaced = replace_soon(&project, &mut run, &set);
    run.kill_rank(1);
    run.wait_for_step(AT.max(replaced) + 2);
    run.signal(Signal::KILL);
    run.finish();
    run.leave();
    let mut second = Run::start(&train(3));
    second.wait_for_step(AT.max(replaced) + 60);
    assert!(
        !second.events("adopted").is_empty(),
        "it goes on with the living ranks\n{}",
        second.tail()
    );
    second.signal(Signal::KILL);
    second.finish();
    second.processes().kill_all();
    wait_for_no_ranks(&mut second);
    let resumed = train(2).complete();
    let trace = resumed.trace();
    let lines = resumed.json_lines("trace.jsonl");
    assert_eq!(lines.len() as u64, STEPS);

    let planned = decided(&lines, "config");
    assert_eq!(
        (planned.len(), planned[0].0, &planned[0].1["effective"]),
        (1, 10, &Value::from(AT))
    );
    for line in &lines {
        let step = line["step"].as_u64().expect("a step");
        assert_eq!(line["mixture"].get("late").is_some(), step > AT, "line {step}");
        let shares = line["mixture"].as_object().expect("shares").values();
        let sum: f64 = shares.map(|share| share.as_f64().expect("a share")).sum();
        assert!((sum - 1.0).abs() < 1e-9, "line {step}: {sum}");
    }
    let mixtures = decided(&lines, controller);
    assert!(
        mixtures.iter().any(|(line, _)| *line > AT),
        "{controller} decides behind the change, too"
    );
    for (_, decision) in mixtures {
        let weights = decision["kind"]["mixture"]["weights"].as_array().expect("weights");
        let count = 3 + usize::from(decision["effective"].as_u64() >= Some(AT));
        assert_eq!(weights.len(), count, "{decision}");
    }
    let live = project.run_dir("live");
    project.verify(&["trace", text(&live)]).assert_code(0);

    let is_asked = |line: &&Value| {
        let mut decisions = line["decisions"].as_array().into_iter().flatten();
        decisions.any(|decision| decision["by"]["person"].is_string())
    };
    let asked = lines.iter().find(is_asked).and_then(|line| line["step"].as_u64());
    begun_again(&live, &project.run_dir("again"), asked.expect("a line") as usize);
    let again = project.train("again").ranks(1).steps(STEPS).complete();
    assert_same_trace(&again.trace(), &trace, "to which nothing happened");
}

#[test]
fn ado_adapts_while_data_come() {
    a_controller_adapts_while_data_come("ado");
}

#[test]
fn odm_adapts_while_data_come() {
    a_controller_adapts_while_data_come("odm");
}

#[test]
fn excess_adapts_while_data_come() {
    a_controller_adapts_while_data_come("excess");
}

/// A planned data set that has changed, or is gone, is said before anything begins.
#[test]
fn a_plan_that_does_not_hold_is_refused() {
    let first = project();
    let first_run = first.train("first").ranks(1).steps(1).complete();
    let (_other, set) = other_data(Some(&data_set(first_run.dir())));
    let (_alien, alien) = other_data(None);
    drop(first_run);
    let refused = |set: &Path, parts: &[&str]| {
        let project = adaptive("ado", set, 90);
        assert_refused(&project.train("live").ranks(1).steps(20).finish(), parts);
        assert!(!project.run_dir("live").join("trace.jsonl").exists());
    };
    refused(&alien, &["another tokenizer"]);
    refused(&set.join("nothing"), &["nothing"]);
    let project = adaptive("ado", &set, 90);
    project.edit(|config| config["data"]["later"][0]["domains"] = vec![toml::Value::from("web")].into());
    let outcome = project.train("live").ranks(1).steps(20).finish();
    assert_refused(&outcome, &["data.later", "'web' is not in the data set"]);
}

/// What does not fit is refused with the reason, and the run does not hear of it.
#[test]
fn data_that_do_not_fit_are_refused() {
    let project = project();
    let first = project.train("first").ranks(1).steps(1).complete();
    let (_other, set) = other_data(Some(&data_set(first.dir())));
    let (_alien, alien) = other_data(None);
    drop(first);
    let late = ["--domain", "late", "--at-step", "100000", "--weight", "late=1"];
    assert_refused(&add(&project, "first", &set, &late), &["no live run"]);
    let mut run = Run::start(&project.train("live").ranks(1).steps(100_000));
    run.wait_for_step(1);
    let refused = |set: &Path, rest: &[&str], part: &str| {
        let mut all = vec!["--weight", "late=1"];
        all.extend(rest);
        assert_refused(&add(&project, "live", set, &all), &[part]);
    };
    refused(
        &alien,
        &["--domain", "late", "--at-step", "100000"],
        "another tokenizer",
    );
    refused(&set, &["--at-step", "100000"], "--replace code");
    refused(
        &set,
        &["--domain", "web", "--at-step", "100000"],
        "'web' is not in the data set",
    );
    refused(
        &set,
        &["--domain", "late", "--replace", "late", "--at-step", "100000"],
        "cannot be replaced",
    );
    refused(&set, &["--domain", "late", "--at-step", "1"], "any more");
    refused(
        &set,
        &["--domain", "late", "--at-step", "100000", "--weight", "wiki=1"],
        "no domain",
    );
    let unweighted = |rest: &[&str], part: &str| {
        let all = [&["--domain", "late", "--at-step", "100000"], rest].concat();
        assert_refused(&add(&project, "live", &set, &all), &[part]);
    };
    unweighted(&["--share", "late=1"], "leave nothing to the others");
    unweighted(&["--share", "late=0"], "says nothing of 'late'");
    unweighted(&["--share", "code=0.1"], "names no domain");
    run.signal(Signal::TERM);
    run.finish().assert_code(34);
    assert!(
        !String::from_utf8_lossy(&run.trace()).contains("\"data\":{"),
        "nothing was decided"
    );
}
