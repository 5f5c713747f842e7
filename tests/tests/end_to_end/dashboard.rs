//! The dashboard of a live run: what it shows is what the files hold, and it can cost a run nothing.

use crate::common::{assert_refused, assert_undisturbed};
use rustix::process::Signal;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;
use tarazed_tests::harness::{Project, Run};

/// Longest wait for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Status and body of what lies at `address`, `http://HOST:PORT/PATH`; none where nobody answers.
fn get(address: &str) -> Option<(u16, String)> {
    let (host, path) = address.strip_prefix("http://")?.split_once('/')?;
    let mut stream = TcpStream::connect(host).ok()?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT)).ok()?;
    stream
        .write_all(format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes())
        .ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}

#[track_caller]
fn json(address: &str) -> Value {
    let (status, body) = get(address).unwrap_or_else(|| panic!("{address}: nobody answers"));
    assert_eq!(status, 200, "{address}: {body}");
    serde_json::from_str(&body).unwrap_or_else(|e| panic!("{address}: {e}: {body}"))
}

/// The address of the run's page, from its folder.
fn address(run: &mut Run) -> String {
    let file = run.dir().join("dashboard.url");
    let text = run.wait_for("an address", |_| std::fs::read_to_string(&file).ok());
    let mode = std::fs::metadata(&file).expect("a file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
    text.trim_end().to_owned()
}

/// Fails unless each point of a series is what the trace has of its step. Floats went through text twice.
#[track_caller]
fn assert_points(history: &Value, series: &Value, trace: &[Value], key: &str) {
    let steps = history["step"].as_array().expect("steps");
    assert!(!steps.is_empty(), "{history}");
    for (at, step) in steps.iter().enumerate() {
        let line = &trace[step.as_u64().expect("a step") as usize - 1];
        assert_eq!(&line["step"], step);
        let (told, written) = (
            series[at].as_f64().expect("a number"),
            line[key].as_f64().expect("a number"),
        );
        assert!(
            (told - written).abs() <= written.abs() * 1e-12,
            "{key} of step {step}: {told}, {written}"
        );
    }
}

/// Page, present and course of a run while it trains agree with its trace and its status, a loss is an incident there with
/// cause and recovery, and all of it ends with the run.
#[test]
fn a_live_run_is_shown_as_its_files_tell() {
    let project = Project::tiny();
    let mut run = Run::start(&project.train("shown").ranks(3).steps(1_200));
    run.wait_for_step(30);
    let url = address(&mut run);
    let (status, page) = get(&url).expect("a page");
    assert_eq!(status, 200, "{page}");
    assert!(page.starts_with("<!doctype html>"), "{page}");

    let view = json(&format!("{url}view.json"));
    assert_eq!(
        (&view["stage"]["tone"], &view["steps"]),
        (&"good".into(), &1_200.into()),
        "{view}"
    );
    assert!(view["step"].as_u64() >= Some(30), "{view}");
    let workers = view["workers"].as_array().expect("workers");
    let pids: Vec<Option<u64>> = workers.iter().map(|worker| worker["pid"].as_u64()).collect();
    let known: Vec<Option<u64>> = run
        .status()
        .workers
        .iter()
        .map(|worker| Some(u64::from(worker.pid)))
        .collect();
    assert_eq!(pids, known, "{view}");
    let names: Vec<&Value> = view["domains"]
        .as_array()
        .expect("domains")
        .iter()
        .map(|d| &d["name"])
        .collect();
    assert_eq!(names, ["book-en", "wiki-zh", "code"]);
    assert!(view["domains"][0]["heldout_loss"].as_f64() > Some(0.0), "{view}");

    let history = json(&format!("{url}history.json?after=0"));
    let trace = run.json_lines("trace.jsonl");
    assert_eq!(history["width"], 1, "a short run is shown step by step");
    for which in ["min", "mean", "max"] {
        assert_points(&history, &history["loss"][which], &trace, "loss");
        assert_points(&history, &history["grad_norm"][which], &trace, "grad_norm");
    }
    assert_points(&history, &history["lr"], &trace, "lr");
    assert_points(&history, &history["tokens"], &trace, "tokens");
    let evaluated = &history["heldout"]["points"][0];
    assert_eq!(evaluated[0], 10, "{history}");
    let names = history["heldout"]["names"].as_array().expect("names").len();
    assert_eq!(
        (names, evaluated[1].as_array().map(Vec::len)),
        (6, Some(6)),
        "three domains, three languages"
    );

    let killed = run.wait_for("a rank to kill", |run| run.kill_rank(1));
    let recovered = run.wait_for("a recovery", |run| run.events("recovered").into_iter().next());
    let shown = run.wait_for("the recovery on the page", |_| {
        let view = json(&format!("{url}view.json"));
        let newest = view["incidents"]["newest"].as_array().expect("incidents").clone();
        newest
            .iter()
            .any(|incident| incident["kind"] == "recovered")
            .then_some(newest)
    });
    let of_kind = |kind: &str| shown.iter().find(|incident| incident["kind"] == kind);
    let told = of_kind("recovered").expect("it was waited for");
    for key in [
        "recovery_ms",
        "detection_ms",
        "steps_lost",
        "rank",
        "step",
        "time_unix_ms",
    ] {
        assert_eq!(told[key], recovered[key], "{key}: {told} and {recovered}");
    }
    let lost = of_kind("rank_lost").or_else(|| of_kind("rank_ending")).expect("a loss");
    assert!(
        lost["what"].as_str().is_some_and(|what| what.starts_with("worker 1: ")),
        "{killed}: {lost}"
    );

    run.signal(Signal::TERM);
    let outcome = run.finish();
    outcome.assert_code(34);
    assert!(
        outcome.stdout.starts_with(&format!("dashboard {url}\n")),
        "{}",
        outcome.tail()
    );
    assert!(get(&url).is_none(), "it ends with the run");
    assert!(!run.dir().join("dashboard.url").exists());
}

/// A controller that is killed leaves its address behind; the next one has another, and the old token is worth nothing.
#[test]
fn the_next_controller_has_another_address() {
    let project = Project::tiny();
    let train = project.train("next").ranks(2).steps(1_200);
    let mut first = Run::start(&train);
    first.wait_for_step(5);
    let old = address(&mut first);
    first.signal(Signal::KILL);
    first.finish();
    first.leave();
    assert!(get(&old).is_none(), "nobody listens");
    assert!(first.dir().join("dashboard.url").exists());
    let mut second = Run::start(&train);
    let new = second.wait_for("another address", |run| {
        let text = std::fs::read_to_string(run.dir().join("dashboard.url")).ok()?;
        Some(text.trim_end().to_owned()).filter(|new| *new != old)
    });
    let (_, old_path) = old.trim_start_matches("http://").split_once('/').expect("a path");
    let (host, _) = new.trim_start_matches("http://").split_once('/').expect("a path");
    let asked = get(&format!("http://{host}/{old_path}view.json")).expect("an answer");
    assert_eq!(asked.0, 404, "{}", asked.1);
    assert_eq!(get(&new).map(|(status, _)| status), Some(200));

    // One without a page leaves no address of another's.
    second.signal(Signal::KILL);
    second.finish();
    second.leave();
    let file = second.dir().join("dashboard.url");
    assert!(file.exists());
    let mut third = Run::start(&train.arg("--dashboard").arg("off"));
    third.wait_for("the old address to go", |_| (!file.exists()).then_some(()));
}

/// A run that is stopped before it trains takes the address of its page along.
#[test]
fn a_run_that_is_stopped_early_leaves_no_address() {
    let project = Project::tiny();
    let mut run = Run::start(&project.train("early").ranks(2).steps(1_200));
    address(&mut run);
    run.signal(Signal::TERM);
    let outcome = run.finish();
    outcome.assert_code(34);
    assert!(!run.dir().join("dashboard.url").exists(), "{}", outcome.tail());
}

/// Whether there is a page, or none, or none can be, a run is the same.
#[test]
fn a_page_that_cannot_be_is_a_warning_and_none_is_none() {
    let project = Project::tiny();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let place = taken.local_addr().expect("an address").to_string();
    let mut run = Run::start(&project.train("taken").ranks(2).steps(20).arg("--dashboard").arg(&place));
    assert_undisturbed(&mut run, 20, "a port that is taken");
    let outcome = run.finish();
    let warnings: Vec<&str> = outcome
        .stdout
        .lines()
        .filter(|line| line.contains("dashboard"))
        .collect();
    let [warning] = warnings.as_slice() else {
        panic!("one line\n{}", outcome.tail())
    };
    let begin = format!("! no dashboard: --dashboard {place}: cannot be served (");
    assert!(
        warning.starts_with(&begin) && warning.contains("; name another address or port"),
        "{warning}"
    );
    assert!(!run.dir().join("dashboard.url").exists());

    let mut run = Run::start(&project.train("off").ranks(2).steps(20).arg("--dashboard").arg("off"));
    assert_undisturbed(&mut run, 20, "no page");
    let outcome = run.finish();
    assert!(!outcome.stdout.contains("dashboard"), "{}", outcome.tail());

    let refused = project.train("bad").steps(20).arg("--dashboard").arg("8080");
    assert_refused(
        &refused.finish(),
        &["--dashboard 8080: is no IP address with a port", "127.0.0.1:0"],
    );
    assert!(!refused.run_dir().exists(), "nothing is written");
}
