//! Domains that are used up while a run trains: passes over them are told, and end at `mixture.epochs_max`.

use rustix::process::Signal;
use serde_json::Value;
use tarazed_tests::harness::{Project, Run, assert_same_trace};

const STEPS: u64 = 300;
const EPOCHS: u64 = 3;
/// Tokens of a sequence, and sequences of a step.
const CONTEXT: u64 = 32;
const BATCH: u64 = 8;
/// Documents of the domain that is used up.
const DOCUMENTS: usize = 60;

/// A project whose domain `code` is used up within some tens of steps, and no other one is; decisions stand in every tenth line, and
/// act five steps later.
fn project() -> Project {
    let project = Project::tiny_with(&[
        ("mixture.start_steps", "10"),
        ("mixture.interval_steps", "10"),
        ("mixture.lag_steps", "5"),
        ("fault.restarts_max", "100"),
    ]);
    project.set("mixture.epochs_max", &EPOCHS.to_string());
    project.edit(|config| {
        let domains = config["data"]["domains"].as_array_mut().expect("a list");
        let code = domains
            .iter_mut()
            .find(|domain| domain["name"].as_str() == Some("code"));
        code.expect("a domain")["weight"] = toml::Value::Float(6.0);
    });
    for domain in ["book-en", "wiki-zh", "code"] {
        let path = project.text(domain);
        let documents = std::fs::read_to_string(&path).expect("a text");
        let text = if domain == "code" {
            let few: Vec<&str> = documents.split_inclusive('\n').take(DOCUMENTS).collect();
            few.concat()
        } else {
            documents.repeat(4)
        };
        std::fs::write(path, text).expect("a writable file");
    }
    project
}

/// Sequences of one pass over `code`.
fn pass(run: &Run) -> u64 {
    let folders = std::fs::read_dir(run.dir().join("data")).expect("a folder").flatten();
    let mut sets = folders.filter_map(|entry| std::fs::read_to_string(entry.path().join("data.json")).ok());
    let manifest: Value = serde_json::from_str(&sets.next().expect("a data set")).expect("JSON");
    let domains = manifest["domains"].as_array().expect("a list");
    let code = domains.iter().find(|domain| domain["name"] == "code");
    let tokens = code.and_then(|code| code["train"]["tokens"].as_u64());
    (tokens.expect("tokens") - 1) / CONTEXT
}

/// The decision that leaves `code` out.
fn limit(lines: &[Value]) -> Value {
    let all = lines.iter().filter_map(|line| line["decisions"].as_array()).flatten();
    let mut of_code = all.filter(|decision| decision["kind"]["epoch_limit"]["domain"] == 2);
    let found = of_code.next().expect("a decision").clone();
    assert!(of_code.next().is_none(), "it is decided once");
    found
}

/// What was told of `code`: pass and step of each that began.
fn told(run: &Run) -> Vec<(u64, u64)> {
    let events = run.events("epoch").into_iter();
    let of_code = events.filter(|event| event["domain"] == "code");
    of_code
        .map(|event| {
            let number = |key: &str| event[key].as_u64().expect("a number");
            (number("epoch"), number("step"))
        })
        .collect()
}

/// What the decision says is what happens, and was told.
fn assert_limited(run: &Run) -> (u64, u64) {
    let lines = run.json_lines("trace.jsonl");
    assert_eq!(lines.len() as u64, STEPS);
    let decision = limit(&lines);
    assert_eq!(decision["by"]["controller"], "epochs", "{decision}");
    let number = |key: &str| decision[key].as_u64().expect("a number");
    let (line, at) = (number("line"), number("effective"));
    assert!(line.is_multiple_of(10) && at >= line + 5, "{decision}");
    let (mut used, pass) = (0, pass(run));
    for line in &lines {
        let step = line["step"].as_u64().expect("a step");
        let share = line["mixture"]["code"].as_f64().expect("a share");
        assert_eq!(share > 0.0, step <= at, "line {step}: {share}");
        used += line["domains"]["code"]["tokens"].as_u64().unwrap_or(0) / CONTEXT;
    }
    let most = EPOCHS * pass;
    let expected = most.saturating_sub(BATCH + 4)..=most + 4;
    assert!(expected.contains(&used), "{used} sequences, {most} in {EPOCHS} passes");
    let limits = run.events("epoch_limit").into_iter();
    let limits: Vec<Value> = limits.filter(|event| event["domain"] == "code").collect();
    assert_eq!(limits.len(), 1, "{limits:?}");
    assert_eq!(
        [&limits[0]["at"], &limits[0]["step"]],
        [&Value::from(at), &Value::from(line)]
    );
    (line, at)
}

/// DATA-1, LOOP-1: a domain begins its passes and comes to its limit at the same steps on one rank to which nothing happens and in
/// a run whose ranks are killed before and after the decision, and which is stopped and resumed on another number of them. Each
/// is told once, and the verifier agrees with every line.
#[test]
fn a_domain_that_is_used_up_leaves_its_weight_to_the_others() {
    let project = project();
    let mut alone = Run::start(&project.train("alone").ranks(1).steps(STEPS));
    let outcome = alone.finish();
    outcome.assert_code(0);
    let (line, at) = assert_limited(&alone);
    let passes: Vec<u64> = told(&alone).iter().map(|(epoch, _)| *epoch).collect();
    assert_eq!(passes, [2, 3], "{}", alone.tail());
    for part in [
        "code begins epoch 2 at step",
        "code begins epoch 3 at step",
        "epoch limit",
    ] {
        assert!(outcome.stdout.contains(part), "{part}\n{}", outcome.tail());
    }

    let train = |ranks| project.train("live").ranks(ranks).steps(STEPS);
    let mut run = Run::start(&train(3));
    run.wait_for_step(12.min(line));
    run.kill_rank(1);
    run.wait_for_step(line + 1);
    run.kill_rank(0);
    run.wait_for_step(at + 10);
    run.signal(Signal::TERM);
    run.finish().assert_code(34);
    let live = train(2).complete();
    assert_same_trace(&live.trace(), &alone.trace(), "with ranks killed, stopped and resumed");
    assert_eq!(assert_limited(&live), (line, at));
    assert_eq!(told(&live), told(&alone));
    let run_dir = project.run_dir("live");
    project.verify(&["trace".as_ref(), run_dir.as_os_str()]).assert_code(0);
}

/// A limit that is none is refused, and so is one set later: it decides numbers.
#[test]
fn a_limit_is_part_of_the_run() {
    let project = project();
    let train = |limit: &str| project.train("one").ranks(1).steps(4).set("mixture.epochs_max", limit);
    let refused = train("0").finish();
    refused.assert_code(2);
    refused.assert_says("mixture.epochs_max");
    drop(train("3").complete());
    train("4").finish().assert_code(2);
}
