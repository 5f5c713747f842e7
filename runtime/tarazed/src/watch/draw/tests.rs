//! Pages as they come out, for terminals of several sizes.

use super::*;
use crate::watch::{Figures, Language, Notice, Saving};

/// A run of three workers, one of which starts again.
fn view() -> View {
    let worker = |worker, state: &str| Worker {
        worker,
        incarnation: 1,
        state: state.to_owned(),
        ..Worker::default()
    };
    let at_work = |number: u64, lanes| Worker {
        rank: Some(number),
        pid: 4101 + number,
        incarnation: 1 + number,
        lanes: Some(lanes),
        step: 120,
        activity: "compute".to_owned(),
        ..worker(number, "training")
    };
    View {
        now_unix_ms: 100_000,
        dir: "runs/quickstart".to_owned(),
        name: "quickstart".to_owned(),
        stage: Stage::Live,
        generation: Some(3),
        step: 120,
        steps: Some(280),
        figures: Figures {
            at_unix_ms: Some(99_000),
            tokens: None,
            loss: Some(5.43214),
            grad_norm: Some(1.25),
            lr: Some(1.93e-3),
            tokens_per_s: Some(9_120.0),
            mfu_percent: None,
            goodput: Some(0.9987),
            durable_step: Some(100),
            durability_lag_s: Some(12.4),
            eta_s: Some(72.4),
        },
        saving: Some(Saving {
            step: 120,
            stored: 2,
            shards: 8,
            for_ms: 3_900,
        }),
        workers: vec![
            at_work(0, [0, 4]),
            Worker {
                lane_us: Some(8_123),
                ..at_work(1, [4, 8])
            },
            worker(2, "starting"),
        ],
        domains: vec![
            domain("书籍", 0.4, Some(5.614), Some(5.702)),
            domain("wiki-zh", 0.35, Some(5.1), None),
            domain("code", 0.25, None, None),
        ],
        languages: vec![
            Language {
                name: "en".to_owned(),
                loss: Some(5.612),
                bits_per_byte: Some(1.873),
            },
            Language {
                name: "zh".to_owned(),
                loss: Some(6.001),
                bits_per_byte: None,
            },
        ],
        evaluated: Some(100),
        incidents: vec![
            incident(58_000, "recovered", Some(812)),
            incident(57_000, "rank_lost", None),
        ],
        losses: (113..=120).zip([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]).collect(),
        ..View::default()
    }
}

fn domain(name: &str, weight: f64, train_loss: Option<f64>, heldout_loss: Option<f64>) -> Domain {
    Domain {
        name: name.to_owned(),
        weight,
        train_loss,
        heldout_loss,
        ..Domain::default()
    }
}

fn incident(unix_ms: u64, kind: &str, recovery_ms: Option<u64>) -> Incident {
    Incident {
        unix_ms,
        kind: kind.to_owned(),
        what: "worker 1: killed by signal 9".to_owned(),
        recovery_ms,
        ..Incident::default()
    }
}

fn page(view: &View, width: usize, height: usize) -> Vec<String> {
    draw(view, width, height).into_iter().map(|line| line.text).collect()
}

#[test]
fn a_wide_terminal_shows_everything() {
    assert_eq!(
        page(&view(), 100, 40),
        [
            "quickstart  runs/quickstart  generation 3",
            "live",
            "step 120 of 280  1m12s left  loss 5.4321  norm 1.250  lr 1.93e-3  9.1k tok/s  goodput 99.87%",
            "checkpoint of step 100, 12s behind  saving step 120: 2 of 8 shards, 3 s",
            "loss of steps 113 to 120",
            "8.000 █▁",
            "      ██▃",
            "      ███▄",
            "      ████▅",
            "      █████▆",
            "1.000 ███████▁",
            "workers: 1 starting, 2 training",
            "worker  rank   pid  incarnation  lanes  step  state     ms/lane  does",
            "     0     0  4101            1   0..4   120  training        -  compute",
            "     1     1  4102            2   4..8   120  training      8.1  compute",
            "     2     -     -            1      -     0  starting        -",
            "domain   share   loss  held out    domain   share   loss  held out",
            "书籍     40.0%  5.614     5.702    code     25.0%      -         -",
            "wiki-zh  35.0%  5.100         -",
            "held out at step 100:  en 5.612 (1.873 bits per byte)  zh 6.001",
            "ago  incident   recovery  cause",
            "42s  recovered    812 ms  worker 1: killed by signal 9",
            "43s  rank_lost         -  worker 1: killed by signal 9",
        ]
    );
}

/// What was asked of a domain stands beside what it gave, and goes first where there is no room.
#[test]
fn tokens_are_shown_beside_those_that_were_asked_for() {
    let mut view = view();
    (view.domains[0].tokens, view.domains[0].tokens_requested) = (Some(983_040), Some(1_234_567.8));
    (view.domains[2].tokens, view.domains[2].tokens_requested) = (Some(0), Some(512.4));
    let row = |width| page(&view, width, 40).into_iter().find(|line| line.starts_with("书籍"));
    let head = |width| {
        page(&view, width, 40)
            .into_iter()
            .find(|line| line.starts_with("domain "))
    };
    let wide = "domain   share   loss  held out  tokens/asked";
    assert_eq!(head(60).as_deref(), Some(wide));
    assert_eq!(
        row(60).as_deref(),
        Some("书籍     40.0%  5.614     5.702  983.0k/1.23M")
    );
    assert_eq!(head(44).as_deref(), Some("domain   share   loss  held out"));
}

/// With several hosts, a process is named with its own.
#[test]
fn workers_are_shown_with_their_nodes() {
    let mut view = view();
    view.workers[0].node = Some("a".to_owned());
    view.workers[1].node = Some("rack-2".to_owned());
    let shown = page(&view, 110, 40);
    let head = shown
        .iter()
        .position(|line| line.starts_with("worker "))
        .expect("a table");
    assert_eq!(
        shown[head..head + 4],
        [
            "worker  rank  node     pid  incarnation  lanes  step  state     ms/lane  does",
            "     0     0  a       4101            1   0..4   120  training        -  compute",
            "     1     1  rack-2  4102            2   4..8   120  training      8.1  compute",
            "     2     -  -          -            1      -     0  starting        -",
        ]
    );
}

/// What matters most stays: columns go before rows, the curve before workers.
#[test]
fn a_narrow_terminal_shows_what_matters_most() {
    assert_eq!(
        page(&view(), 40, 20),
        [
            "quickstart  runs/quickstart",
            "generation 3",
            "live",
            "step 120 of 280  1m12s left  loss 5.4321",
            "norm 1.250  lr 1.93e-3  9.1k tok/s",
            "goodput 99.87%",
            "checkpoint of step 100, 12s behind",
            "saving step 120: 2 of 8 shards, 3 s",
            "workers: 1 starting, 2 training",
            "worker  rank  lanes  step  state",
            "     0     0   0..4   120  training",
            "     1     1   4..8   120  training",
            "     2     -      -     0  starting",
            "domain   share   loss  held out",
            "书籍     40.0%  5.614     5.702",
            "… 2 more",
            "held out at step 100:  en 5.612 (1.873 …",
            "ago  incident   recovery  cause",
            "42s  recovered    812 ms  worker 1: kil…",
            "43s  rank_lost         -  worker 1: kil…",
        ]
    );
}

#[test]
fn no_terminal_is_too_small() {
    let mut view = view();
    view.notice = Some(Notice {
        decision: 7,
        at: 150,
        to: 90,
        reason: "mean loss of 32 lines above that of the 128 before".to_owned(),
    });
    for width in 0..=130 {
        for height in 0..=45 {
            let lines = page(&view, width, height);
            assert!(lines.len() <= height, "{width} x {height}: {lines:?}");
            for line in lines {
                assert!(columns(&line) <= width, "{width} x {height}: {line}");
            }
        }
    }
}

/// Two columns for each character: what stands behind a name is where it is behind others.
#[test]
fn chinese_names_are_two_columns_a_character() {
    let lines = page(&view(), 40, 40);
    let row = |name: &str| {
        lines
            .iter()
            .find(|line| line.starts_with(name))
            .expect("its row")
            .clone()
    };
    let before = |row: &str, part: &str| columns(&row[..row.find(part).expect("its share")]);
    assert_eq!(before(&row("书籍"), "40.0%"), before(&row("wiki-zh"), "35.0%"));
    assert_eq!(cut("维基百科", 8), "维基百科");
    assert_eq!(cut("维基百科", 7), "维基百…");
    assert_eq!(cut("维基百科", 6), "维基…", "half a character is none");
}

#[test]
fn without_workers_the_page_closes_up() {
    let mut view = view();
    view.workers.clear();
    view.stage = Stage::Gone;
    let lines = page(&view, 100, 40);
    assert!(!lines.iter().any(|line| line.contains("worker  ")), "{lines:?}");
    assert_eq!(
        lines[1],
        "the controller is gone without a word: `tarazed train` with the same config and folder goes on"
    );
    assert!(!lines.concat().contains("left"), "nobody works on the rest: {lines:?}");
}

/// Of many workers those that do not train are shown, and how many are not.
#[test]
fn of_many_workers_the_troubled_ones_are_shown() {
    let mut view = view();
    view.workers = (0..100)
        .map(|worker| Worker {
            worker,
            state: if worker == 77 { "starting" } else { "training" }.to_owned(),
            ..Worker::default()
        })
        .collect();
    let lines = draw(&view, 100, 20);
    let at = lines
        .iter()
        .position(|line| line.text.starts_with("workers: 1 starting, 99 training"));
    let row = &lines[at.expect("the title") + 2];
    assert!(row.text.trim_start().starts_with("77 "), "{lines:?}");
    assert_eq!(row.tone, Tone::Warning);
    let left_out = lines
        .iter()
        .find_map(|line| line.text.strip_prefix("… ")?.strip_suffix(" more"));
    let left_out: usize = left_out.expect("what is left out").parse().expect("a count");
    let shown = lines
        .iter()
        .filter(|line| line.text.contains("ing  ") || line.text.ends_with("ing"));
    assert_eq!(
        left_out + shown.count() - 1,
        100,
        "the title is none of them: {lines:?}"
    );
}

#[test]
fn a_run_that_has_not_begun_says_what_it_waits_for() {
    let begin = |waits, workers: &[Worker]| View {
        name: "tiny".to_owned(),
        stage: Stage::Waits(waits),
        steps: Some(3),
        workers: workers.to_vec(),
        ..View::default()
    };
    assert_eq!(
        page(&begin(WaitsFor::Controller, &[]), 100, 40),
        [
            "tiny",
            "waits for a controller: start the run with `tarazed train`",
            "step 0 of 3"
        ]
    );
    assert_eq!(
        page(&begin(WaitsFor::Preparation, &[]), 100, 40)[1],
        "waits for the controller, which prepares data and store"
    );
    assert_eq!(
        page(&begin(WaitsFor::FirstStep, &view().workers), 100, 40)[1],
        "waits for the first step; workers: 1 starting, 2 training"
    );
}

#[test]
fn an_end_says_whether_it_is_the_whole_run() {
    let mut view = view();
    view.stage = Stage::Ended;
    view.now_unix_ms += 3_600_000;
    assert_eq!(
        page(&view, 100, 40)[1],
        "ended at step 120 of 280: `tarazed train` with the same config and folder goes on"
    );
    view.step = 280;
    assert_eq!(page(&view, 100, 40)[1], "done: step 280 of 280");
}

/// As where a controller is stopped or busy.
#[test]
fn figures_that_are_old_are_said_to_be() {
    let mut view = view();
    view.now_unix_ms = 99_000 + 42_000;
    assert_eq!(page(&view, 100, 40)[1], "live; last step 42s ago");
    view.stage = Stage::Silent("control.sock: the controller does not answer".to_owned());
    let line = &draw(&view, 120, 40)[1];
    assert_eq!(
        line.text,
        "the controller cannot be asked: control.sock: the controller does not answer; last step 42s ago"
    );
    assert_eq!(line.tone, Tone::Alarm);
}

/// Names and causes come from files.
#[test]
fn text_from_files_cannot_move_the_cursor() {
    let mut view = view();
    view.incidents[0].what = "a\u{1b}[2Jb\nc\td".to_owned();
    view.domains[0].name = "we\rb".to_owned();
    view.workers[0].state = "\u{7}training".to_owned();
    view.remark = Some("events\u{9b}31m".to_owned());
    for line in page(&view, 100, 40) {
        assert!(!line.chars().any(char::is_control), "{line:?}");
    }
}

#[test]
fn the_curve_averages_what_has_no_column_of_its_own() {
    let losses: Vec<(u64, f64)> = (1..=400).map(|step| (step, f64::from(step as u32))).collect();
    assert_eq!(bins(&losses, 4), [50.5, 150.5, 250.5, 350.5]);
    assert_eq!(bins(&losses, 0), [200.5]);
    assert_eq!(bins(&losses[..2], 80), [1.0, 2.0]);
    let flat = curve(&[(1, 2.0), (2, 2.0)], 80, 3);
    let flat: Vec<&str> = flat.iter().map(|line| line.text.as_str()).collect();
    assert_eq!(flat, ["loss of steps 1 to 2", "2.000", "2.000 ▁▁"]);
}

/// The least of each part first, in their order; then row by row.
#[test]
fn rows_are_shared_out() {
    assert_eq!(share(20, [(3, 5), (2, 4), (1, 1)]), [5, 4, 1], "all fit");
    assert_eq!(share(8, [(3, 9), (2, 9), (1, 1)]), [4, 3, 1]);
    assert_eq!(
        share(4, [(3, 9), (2, 9), (1, 1)]),
        [3, 0, 1],
        "what has not its least has none"
    );
    assert_eq!(share(0, [(3, 9)]), [0]);
    assert_eq!(share(9, [(3, 0)]), [0]);
}
