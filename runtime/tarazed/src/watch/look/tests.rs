//! Run folders as they are found: begun, live, cut in the middle of a line, left alone, ended.

use super::*;
use crate::exit::Exit;
use serde_json::json;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;

/// Now, in all of them.
const NOW: u64 = 1_000_000;

/// A folder with the quickstart's config, of 280 steps.
fn run() -> (tempfile::TempDir, RunFolder) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/quickstart.toml");
    let config = Config::load(Path::new(path), &["run.steps=280".to_owned()]).expect("a good config");
    std::fs::write(dir.path().join("config.toml"), config.to_toml().expect("TOML")).expect("written");
    let folder = RunFolder::new(dir.path());
    (dir, folder)
}

fn write(path: PathBuf, lines: &[Value], rest: &str) {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(path, text + rest).expect("written");
}

fn trace_line(step: u64) -> Value {
    json!({
        "step": step, "tokens": step * 2_048, "loss": 5.5, "lr": 1e-3,
        "mixture": {"书籍": 0.75, "web": 0.25}, "domains": {"web": {"loss": 5.25, "tokens": 64}}, "decisions": [],
    })
}

/// A step a second.
fn metrics_line(step: u64) -> Value {
    json!({
        "step": step, "time_unix_ms": step * 1_000, "tokens_per_s": 2_048.0, "loss_metrics/global_avg_loss": 5.5,
        "grad_norm": 1.5, "durable_step": 100, "durability_lag_s": 20.0, "goodput": 0.99,
    })
}

fn signals() -> Value {
    json!({
        "step": 119, "evaluated": 100,
        "domains": {
            "书籍": {"train_loss": 5.75, "heldout_loss": 6.0, "tokens": 704, "tokens_requested": 701.5, "epochs": 0.5},
            "web": {"train_loss": null},
        },
        "languages": {"zh": {"heldout_loss": 6.0, "heldout_bits_per_byte": 1.5}, "code": {"heldout_loss": null}},
    })
}

/// Trace, metrics and events of 120 steps, each cut within its last line.
fn write_files(folder: &RunFolder) {
    write(
        folder.trace(),
        &[trace_line(119), trace_line(120)],
        "{\"step\":121,\"lo",
    );
    let mut lines: Vec<Value> = (101..=120).map(metrics_line).collect();
    lines[10]["signals"] = signals();
    write(folder.metrics(), &lines, "{\"step\":121,\"time_unix_ms\":12");
    let lost = json!({"kind": "rank_lost", "time_unix_ms": 90_000, "worker": 1, "incarnation": 0, "cause": "signal 9"});
    write(folder.events(), &[lost], "{\"kind\":\"recov");
}

fn look(folder: &RunFolder) -> View {
    Watcher::new(folder.clone()).look(NOW).expect("a view")
}

#[test]
fn what_is_whole_is_shown_where_files_are_cut() {
    let (_dir, folder) = run();
    write_files(&folder);
    let view = look(&folder);
    assert_eq!(
        (view.name.as_str(), view.step, view.steps),
        ("quickstart", 120, Some(280))
    );
    assert_eq!((view.stage, view.remark, view.now_unix_ms), (Stage::Ended, None, NOW));
    let figures = Figures {
        at_unix_ms: Some(120_000),
        tokens: Some(120 * 2_048),
        loss: Some(5.5),
        grad_norm: Some(1.5),
        lr: Some(1e-3),
        tokens_per_s: Some(2_048.0),
        mfu_percent: None,
        goodput: Some(0.99),
        durable_step: Some(100),
        durability_lag_s: Some(20.0),
        eta_s: Some(160.0),
    };
    assert_eq!(view.figures, figures);
    assert_eq!(
        view.losses.first().zip(view.losses.last()),
        Some((&(101, 5.5), &(120, 5.5)))
    );
    let domain = |name: &str, weight, train_loss, heldout_loss| Domain {
        name: name.to_owned(),
        weight,
        train_loss,
        heldout_loss,
        ..Domain::default()
    };
    assert_eq!(
        view.domains,
        [
            domain("web", 0.25, Some(5.25), None),
            Domain {
                tokens: Some(704),
                tokens_requested: Some(701.5),
                epochs: Some(0.5),
                ..domain("书籍", 0.75, Some(5.75), Some(6.0))
            }
        ],
        "a domain without signals has the loss of the last step"
    );
    assert_eq!(
        (view.languages.len(), view.languages[0].name.as_str(), view.evaluated),
        (1, "zh", Some(100))
    );
    assert_eq!(view.incidents.len(), 1);
    assert_eq!(
        (view.incidents[0].what.as_str(), view.incidents[0].unix_ms),
        ("worker 1: signal 9", 90_000)
    );
}

/// A line that a crash cut is ended by the next start; it is no JSON, and neither is the first of a file's end.
#[test]
fn lines_that_are_no_json_are_passed_over() {
    assert_eq!(
        whole_lines(b"5}\n{\"a\":1}\n{\"a\":\n{\"a\":2}\n{\"a\":3")
            .filter_map(parse::<Value>)
            .count(),
        2
    );
    assert_eq!(whole_lines(b"{\"a\":1}").filter_map(parse::<Value>).count(), 0);
    assert_eq!(whole_lines(b"").filter_map(parse::<Value>).count(), 0);
    assert_eq!(whole_lines(b"\n\xff\xfe\n").filter_map(parse::<Value>).count(), 0);
}

#[test]
fn missing_files_are_a_run_that_has_not_begun() {
    let (dir, folder) = run();
    let view = look(&folder);
    assert_eq!(
        (view.stage, view.step, view.steps),
        (Stage::Waits(WaitsFor::Controller), 0, Some(280))
    );
    std::fs::remove_file(folder.config()).expect("removed");
    let view = look(&folder);
    assert_eq!((view.steps, view.remark), (None, None), "before the config is written");
    std::fs::write(folder.config(), "[run").expect("written");
    let remark = look(&folder).remark.expect("what is wrong");
    assert!(remark.contains("config.toml"), "{remark}");
    dir.close().expect("removed");
    let gone = Watcher::new(folder).look(NOW).expect_err("no folder");
    assert_eq!(gone.exit, Exit::Refused);
}

/// A file that is no file is said, and the others are shown.
#[test]
fn what_cannot_be_read_is_said_beside_the_rest() {
    let (_dir, folder) = run();
    write_files(&folder);
    std::fs::remove_file(folder.events()).expect("removed");
    std::fs::create_dir(folder.events()).expect("a folder");
    let view = look(&folder);
    assert_eq!(view.step, 120);
    let remark = view.remark.expect("what is wrong");
    assert!(
        remark.contains("events.jsonl") && remark.contains("permissions"),
        "{remark}"
    );
}

#[test]
fn a_run_folder_says_who_is_in_charge() {
    let stage = |has_lines, has_incidents, left_behind, is_held| {
        let marks = Marks {
            has_lines,
            has_incidents,
            left_behind,
            is_held,
        };
        marks.stage()
    };
    assert_eq!(stage(false, false, false, false), Stage::Waits(WaitsFor::Controller));
    assert_eq!(stage(false, false, false, true), Stage::Waits(WaitsFor::Preparation));
    assert_eq!(stage(true, true, true, true), Stage::Held, "the next one starts");
    assert_eq!(stage(true, false, true, false), Stage::Gone);
    assert_eq!(stage(false, true, true, false), Stage::Gone, "before its first step");
    assert_eq!(stage(true, false, false, false), Stage::Ended);
    assert_eq!(
        stage(false, true, false, false),
        Stage::Ended,
        "halted before its first step"
    );
}

/// A run's last checkpoint comes behind its last line.
#[test]
fn a_checkpoint_behind_the_last_line_is_the_newest() {
    let (_dir, folder) = run();
    write_files(&folder);
    let checkpoint = |step: u64, at_ms: u64| json!({"kind": "checkpoint", "time_unix_ms": at_ms, "checkpoint_step": step, "took_ms": 5});
    for (step, at_ms, expected) in [
        (90, 110_000, (Some(100), Some(20.0))),
        (110, 120_001, (Some(110), None)),
        (120, 120_002, (Some(120), Some(0.0))),
    ] {
        write(folder.events(), &[checkpoint(step, at_ms)], "");
        let figures = look(&folder).figures;
        assert_eq!(
            (figures.durable_step, figures.durability_lag_s),
            expected,
            "step {step}"
        );
    }
}

/// What a killed controller said last stays, but for what only a live one knows.
#[test]
fn a_live_controller_is_heard_and_its_last_word_kept() {
    let (_dir, folder) = run();
    write_files(&folder);
    let straggler = json!({"kind": "straggler", "time_unix_ms": 95_000, "worker": 0, "lane_us": 8_000});
    write(folder.events(), &[straggler], "");
    std::fs::write(folder.control_token(), "secret\n").expect("written");
    let listener = UnixListener::bind(folder.control_socket()).expect("a socket");
    let answer = json!({
        "live": true, "generation": 2, "step": 121, "durable_step": 110, "durability_lag_s": 3.5,
        "saving": {"step": 120, "stored": 1, "shards": 8, "for_ms": 10},
        "rollback_notice": {"decision": 3, "at": 150, "to": 90, "reason": "loss"},
        "workers": [
            {"worker": 0, "rank": 0, "pid": 9, "incarnation": 1, "lanes": [0, 4], "step": 121, "state": "training", "activity": "a"},
            {"worker": "damaged"},
        ],
        "signals": {"evaluated": 120, "domains": {}, "languages": {"en": {"heldout_loss": 5.0}}},
    });
    let server = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a connection");
        let mut request = String::new();
        BufReader::new(&stream).read_line(&mut request).expect("a request");
        (&stream)
            .write_all(format!("{answer}\n").as_bytes())
            .expect("an answer");
    });
    let mut watcher = Watcher::new(folder);
    let view = watcher.look(NOW).expect("a view");
    server.join().expect("the server ends");
    assert_eq!((&view.stage, view.step, view.generation), (&Stage::Live, 121, Some(2)));
    assert_eq!(
        (view.figures.durable_step, view.figures.durability_lag_s),
        (Some(110), Some(3.5))
    );
    assert_eq!(view.saving.map(|saving| saving.stored), Some(1));
    assert_eq!(view.notice.as_ref().map(|notice| notice.decision), Some(3));
    assert_eq!(view.languages[0].name, "en");
    let [worker] = view.workers.as_slice() else {
        panic!("one can be read: {:?}", view.workers)
    };
    assert_eq!(
        (worker.pid, worker.lanes, worker.lane_us),
        (9, Some([0, 4]), Some(8_000))
    );

    // Nobody listens any more, and the socket is still there.
    let after = watcher.look(NOW + 1_000).expect("a view");
    assert_eq!(after.stage, Stage::Gone);
    assert_eq!(after.workers, view.workers);
    assert_eq!((after.saving, after.notice), (None, None));
}

#[test]
fn a_controller_that_answers_nonsense_is_no_end() {
    let (_dir, folder) = run();
    write_files(&folder);
    std::fs::write(folder.control_token(), "secret\n").expect("written");
    let listener = UnixListener::bind(folder.control_socket()).expect("a socket");
    let server = std::thread::spawn(move || drop(listener.accept().expect("a connection")));
    let stage = look(&folder).stage;
    server.join().expect("the server ends");
    assert!(
        matches!(&stage, Stage::Silent(cause) if cause.contains("control.sock")),
        "{stage:?}"
    );
}

/// Ends of files alone, however long they are.
#[test]
fn of_a_long_file_the_end_is_read() {
    let (_dir, folder) = run();
    let line = |step: u64| {
        let mut line = metrics_line(step);
        line["filler"] = "x".repeat(300).into();
        line
    };
    let lines: Vec<Value> = (1..=4_000).map(line).collect();
    write(folder.metrics(), &lines, "");
    let view = look(&folder);
    assert_eq!(view.losses.len(), CURVE_STEPS_MAX);
    assert_eq!(view.losses.last(), Some(&(4_000, 5.5)));
}

/// As a run whose trace lost its end in a power loss writes them, and computes them again.
#[test]
fn steps_that_are_written_twice_count_once() {
    let (_dir, folder) = run();
    let mut again = metrics_line(3);
    again["loss_metrics/global_avg_loss"] = 4.0.into();
    let mut lost = metrics_line(5);
    lost["loss_metrics/global_avg_loss"] = Value::Null;
    write(
        folder.metrics(),
        &[metrics_line(3), metrics_line(4), again, metrics_line(4), lost],
        "",
    );
    let view = look(&folder);
    assert_eq!(view.losses, [(3, 4.0), (4, 5.5)], "what is not finite is not drawn");
    assert_eq!((view.step, view.figures.loss), (5, None));
}

#[test]
fn a_stop_that_is_decided_is_the_end() {
    let (_dir, folder) = run();
    let mut line = trace_line(120);
    line["decisions"] = json!([
        {"id": 1, "line": 120, "effective": 150, "kind": "stop", "by": {"person": "ada"}, "reason": "enough"},
        {"id": 2, "line": 120, "effective": 150, "kind": "something_new", "by": {"person": "ada"}, "reason": "?"},
    ]);
    write(folder.trace(), &[line, trace_line(121)], "");
    let mut watcher = Watcher::new(folder.clone());
    assert_eq!(watcher.look(NOW).expect("a view").steps, Some(150));
    // It has left the end of the file.
    write(folder.trace(), &[trace_line(122)], "");
    assert_eq!(watcher.look(NOW).expect("a view").steps, Some(150));
}

/// `--steps` stands in no file: whoever started the run knows of it, and an earlier end stays one.
#[test]
fn an_end_that_was_asked_for_is_the_end() {
    let (_dir, folder) = run();
    write_files(&folder);
    for (asked_for, expected) in [(200, 200), (280, 280), (999, 280)] {
        let view = Watcher::new(folder.clone()).ended_after(asked_for).look(NOW);
        assert_eq!(view.expect("a view").steps, Some(expected), "{asked_for}");
    }
}

#[test]
fn incidents_are_what_is_not_routine() {
    let of = |kind: &str, more: Value| {
        let mut event = json!({"kind": kind, "time_unix_ms": 1_000, "step": 7});
        let (into, from) = (
            event.as_object_mut().expect("fields"),
            more.as_object().expect("fields"),
        );
        into.extend(from.clone());
        event
    };
    let life = json!({"worker": 1, "incarnation": 0, "rank": 1, "cause": "signal 9", "detection_ms": 5});
    let events = [
        of("rank_ending", life.clone()),
        of("rank_lost", life),
        of("generation", json!({"generation": 2})),
        of("rank_ready", json!({"worker": 1, "incarnation": 1})),
        of(
            "recovered",
            json!({"cause": "signal 9", "worker": 1, "recovery_ms": 812, "steps_lost": 0}),
        ),
        of("checkpoint", json!({"checkpoint_step": 7, "took_ms": 9})),
        of(
            "rank_lost",
            json!({"worker": 2, "cause": "no rank any more", "expected": true}),
        ),
        of(
            "rank_ending",
            json!({"worker": 1, "incarnation": 1, "cause": "silence"}),
        ),
        of("rolled_back", json!({"at": 90, "to": 60})),
        of(
            "rank_ending",
            json!({"worker": 3, "incarnation": 0, "cause": "crashed"}),
        ),
        of(
            "rank_lost",
            json!({"worker": 3, "incarnation": 0, "cause": "signal 9", "expected": true}),
        ),
        json!({"no": "kind"}),
        json!(7),
    ];
    let found = incidents(&events, INCIDENTS_MAX);
    let told: Vec<(&str, &str, Option<u64>)> = found
        .iter()
        .map(|incident| (incident.kind.as_str(), incident.what.as_str(), incident.recovery_ms))
        .collect();
    assert_eq!(
        told,
        [
            ("rank_lost", "worker 3: signal 9", None),
            ("rolled_back", "at 90, to 60", None),
            ("rank_ending", "worker 1: silence", None),
            ("recovered", "worker 1: signal 9", Some(812)),
            ("rank_lost", "worker 1: signal 9", None),
        ],
        "the newest first"
    );
    let many: Vec<Value> = (0..100).map(|_| of("alarm", json!({"cause": "silence"}))).collect();
    assert_eq!(incidents(&many, INCIDENTS_MAX).len(), INCIDENTS_MAX);
}

/// Until the worker lives another life.
#[test]
fn a_slow_worker_has_its_time_for_a_lane() {
    let slow = |worker: u64| json!({"kind": "straggler", "worker": worker, "lane_us": 8_000 + worker});
    let of = |kind: &str, worker: u64| json!({"kind": kind, "worker": worker});
    let events = [
        slow(0),
        slow(1),
        slow(2),
        of("rank_lost", 1),
        of("rank_ready", 2),
        of("checkpoint", 0),
    ];
    assert_eq!(slow_lanes(&events), BTreeMap::from([(0, 8_000)]));
}

#[test]
fn the_time_left_is_by_the_pace_of_the_last_lines() {
    let line = |step, time_unix_ms| MetricsLine {
        step,
        time_unix_ms,
        ..MetricsLine::default()
    };
    assert_eq!(time_left_s(&[line(10, 1_000), line(20, 6_000)], 30), Some(5.0));
    assert_eq!(time_left_s(&[line(10, 1_000)], 30), None, "one line has no pace");
    assert_eq!(
        time_left_s(&[line(10, 6_000), line(20, 1_000)], 30),
        None,
        "a clock that was set back"
    );
    assert_eq!(
        time_left_s(&[line(20, 1_000), line(10, 6_000)], 30),
        None,
        "steps done again"
    );
    let again = [line(19, 500), line(20, 1_000), line(10, 6_000), line(11, 6_500)];
    assert_eq!(time_left_s(&again, 30), Some(9.5), "by the others");
    let outage: Vec<_> = [1_000, 1_500, 2_000, 90_000_000, 90_000_500, 90_001_500]
        .into_iter()
        .enumerate()
        .map(|(done, at)| line(done as u64, at))
        .collect();
    assert_eq!(
        time_left_s(&outage, 25),
        Some(12.5),
        "a day without a controller; a step that took twice as long counts"
    );
    assert_eq!(time_left_s(&[line(10, 1_000), line(40, 6_000)], 30), Some(0.0));
    assert_eq!(time_left_s(&[], 30), None);
}

#[test]
fn a_lock_is_known_by_device_and_inode() {
    let locks =
        "1: FLOCK  ADVISORY  WRITE 27555 fe:00:10010699 0 EOF\n1: -> FLOCK  ADVISORY  WRITE 3 00:1b:241651 0 EOF\n";
    let device = rustix::fs::makedev(254, 0);
    assert!(names_lock(locks, device, 10_010_699));
    assert!(!names_lock(locks, device, 1_001_069));
    assert!(!names_lock(locks, rustix::fs::makedev(253, 0), 10_010_699));
    assert!(names_lock(locks, rustix::fs::makedev(0, 27), 241_651));
    assert!(!names_lock("", device, 1));
    assert!(!is_held(Path::new("/nowhere/lock")));
}

#[test]
fn a_folder_that_a_run_is_begun_in_counts() {
    let runs = tempfile::tempdir().expect("a temporary folder");
    assert_eq!(choose(None, runs.path()).expect_err("no run").exit, Exit::Refused);
    let make = |name: &str, file: &str, age_s: u64| {
        let dir = runs.path().join(name);
        std::fs::create_dir(&dir).expect("a folder");
        let file = std::fs::File::create(dir.join(file)).expect("a file");
        let changed = std::time::SystemTime::now() - std::time::Duration::from_secs(age_s);
        file.set_modified(changed).expect("a changed time");
        dir
    };
    let (begun, other) = (make("begun", "lock", 10), make("other", "notes.txt", 1));
    make("older", "config.toml", 60);
    assert_eq!(choose(None, runs.path()).expect("a run").dir(), begun);
    assert_eq!(choose(Some(&begun), runs.path()).expect("a run").dir(), begun);
    let refused = choose(Some(&other), runs.path()).expect_err("no run");
    assert!(
        refused.message.contains("give the folder that `tarazed train` printed"),
        "{refused}"
    );
}
