//! `tarazed status`: what outsiders rely on (DESIGN.md section 11).

use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use tarazed_tests::harness::{Project, Run};

fn ask(project: &Project, run: &Run, more: &[&str]) -> tarazed_tests::harness::Outcome {
    let dir = run.dir().to_string_lossy().into_owned();
    let args: Vec<&str> = ["status", "--run-dir", &dir]
        .into_iter()
        .chain(more.iter().copied())
        .collect();
    project.tarazed(&args)
}

#[track_caller]
fn json(project: &Project, run: &Run) -> Value {
    let outcome = ask(project, run, &["--json"]);
    outcome.assert_code(0);
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|e| panic!("{e}: {}", outcome.tail()))
}

/// SUP-2: a live run names generation, step and each worker with rank, process, life, lanes, step and state; the
/// numbers agree with each other, with the processes there are, and with a loss.
#[test]
fn a_live_run_tells_its_generation_and_workers() {
    let project = Project::tiny();
    let mut run = Run::start(&project.train("live").ranks(3).steps(400));
    run.wait_for_step(5);
    let first = json(&project, &run);
    let object = first.as_object().expect("an object");
    for key in ["generation", "step", "workers"] {
        assert!(object.contains_key(key), "{key}: {first}");
    }
    assert_eq!(first["live"], true);
    assert!(first["step"].as_u64() >= Some(5), "{first}");
    let workers = first["workers"].as_array().expect("a list");
    assert_eq!(workers.len(), 3, "{first}");
    let mut lanes_to = 0;
    for (index, worker) in workers.iter().enumerate() {
        let index = index as u64;
        assert_eq!(
            (&worker["worker"], &worker["rank"]),
            (&index.into(), &index.into()),
            "{first}"
        );
        assert_eq!(
            (&worker["incarnation"], &worker["state"]),
            (&0.into(), &"training".into()),
            "{first}"
        );
        assert!(worker["step"].is_u64(), "{first}");
        assert_eq!(worker["lanes"][0], lanes_to, "lanes follow each other: {first}");
        lanes_to = worker["lanes"][1].as_u64().expect("a lane");
    }
    assert_eq!(lanes_to, 8, "{first}");
    let told: BTreeSet<u32> = workers
        .iter()
        .filter_map(|w| w["pid"].as_u64())
        .map(|pid| pid as u32)
        .collect();
    assert_eq!(
        told,
        run.processes().ranks().into_iter().collect(),
        "the processes there are"
    );

    let table = ask(&project, &run, &[]);
    table.assert_code(0);
    assert!(
        table.stdout.contains("live") && table.stdout.contains("training"),
        "{}",
        table.tail()
    );

    assert!(run.kill_rank(1).is_some());
    let later = run.wait_for_status("worker 1's next life", |s| {
        s.all_train(3) && s.workers[1].incarnation == 1
    });
    assert!(
        later.generation > first["generation"].as_u64(),
        "a loss is a new generation"
    );
    assert!(later.workers[1].pid != workers[1]["pid"].as_u64().expect("a pid") as u32);
    let step = run.status().step;
    run.wait_for_step(step + 10);
    assert!(run.status().step >= step + 10, "status keeps up with the trace");
}

/// After its end, whatever that was, a run's status comes from its files.
#[test]
fn a_run_that_ended_tells_where_it_stands() {
    let project = Project::tiny();
    let run = project.train("ended").ranks(2).steps(12).complete();
    let ended = json(&project, &run);
    assert_eq!((&ended["live"], &ended["step"]), (&false.into(), &12.into()), "{ended}");
    assert_eq!(
        (&ended["generation"], &ended["workers"]),
        (&Value::Null, &Value::Array(Vec::new())),
        "{ended}"
    );
    assert_eq!(ended["last_line"]["step"], 12, "{ended}");
    assert!(ended["last_event"]["kind"].is_string(), "{ended}");
    let table = ask(&project, &run, &[]);
    assert!(table.stdout.contains("not live, step 12"), "{}", table.tail());

    let mut killed = Run::start(&project.train("killed").ranks(2).steps(400));
    killed.wait_for_step(8);
    killed.signal(Signal::KILL);
    killed.finish();
    let status = json(&project, &killed);
    assert_eq!(status["live"], false, "a socket that nobody listens to: {status}");
    assert!(status["step"].as_u64() >= Some(8), "{status}");
}

/// The token of a live run is its owner's alone, and no answer is given without it.
#[test]
fn the_control_socket_asks_for_the_token() {
    let project = Project::tiny();
    let mut run = Run::start(&project.train("token").ranks(1).steps(400));
    run.wait_for_step(2);
    let token = run.dir().join("control.token");
    let mode = std::fs::metadata(&token).expect("a token").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
    let good = std::fs::read(&token).expect("a token");
    std::fs::write(&token, "0".repeat(64)).expect("another token");
    let refused = ask(&project, &run, &["--json"]);
    refused.assert_code(2);
    refused.assert_says("token");
    std::fs::write(&token, good).expect("the token");
    assert!(run.status().live);
}

/// Gradient noise and bits per byte are told by a live run, by its metrics when it is over, and at its end.
#[test]
fn signals_are_told_live_afterwards_and_at_the_end() {
    let project = Project::tiny_with(&[("policy.gradient_noise", "true")]);
    let mut run = Run::start(&project.train("signals").ranks(2).steps(400));
    run.wait_for_step(12);
    let check = |told: &Value| {
        let signals = &told["signals"];
        assert!(signals["gradient_noise"]["noise_trace"].as_f64() > Some(0.0), "{told}");
        for domain in ["book-en", "wiki-zh", "code"] {
            for key in ["train_bits_per_byte", "heldout_bits_per_byte"] {
                let bits = signals["domains"][domain][key].as_f64().unwrap_or_default();
                assert!(bits > 0.1 && bits < 16.0, "{domain} {key}: {told}");
            }
        }
        for (language, domain) in [("en", "book-en"), ("zh", "wiki-zh"), ("code", "code")] {
            let bits = |value: &Value| value["heldout_bits_per_byte"].as_f64().expect("a number");
            let (all, own) = (bits(&signals["languages"][language]), bits(&signals["domains"][domain]));
            assert!((all - own).abs() < 1e-9, "one domain is all of its language: {told}");
        }
    };
    let live = run.wait_for("an answer of the live run", |run| {
        let told = ask(&project, run, &["--json"]);
        let told: Value = serde_json::from_str(&told.stdout).ok()?;
        (told["live"] == true).then_some(told)
    });
    check(&live);
    let outcome = run.finish();
    outcome.assert_code(0);
    assert!(outcome.stdout.contains("bits per byte of text"), "{}", outcome.tail());
    let after = json(&project, &run);
    assert_eq!(
        (&after["live"], &after["signals"]["step"]),
        (&false.into(), &400.into())
    );
    check(&after);
    let table = ask(&project, &run, &[]);
    for part in ["gradient noise scale: ", "bits per byte", "wiki-zh"] {
        assert!(table.stdout.contains(part), "'{part}'\n{}", table.tail());
    }
    let lines = run.json_lines("metrics.jsonl");
    let all = lines.iter().filter(|line| line["signals"].is_object()).count();
    assert_eq!(all, 40, "at every evaluation; every hundredth step is one");
    assert!(
        lines
            .iter()
            .all(|line| line.get("gradient_noise_scale_tokens").is_some()),
        "in every line"
    );
}
