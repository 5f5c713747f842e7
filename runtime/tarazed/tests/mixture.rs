//! `tarazed bench mixture` as a person meets it, on runs of a second: stopped, gone on with, whole.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Of four static candidates one has the weights of another, and shares its runs: no domain repeats, so UniMax is uniform.
const RUNS: usize = 3 + 2 * (3 + 3);

/// A plan of four static candidates, one controller, two judging seeds and one case, on two small domains.
fn project(folder: &Path) {
    let write = |name: &str, text: String| std::fs::write(folder.join(name), text).expect("written");
    let word = |i: usize| ["lane", "step", "rank", "trace", "shard"][i % 5];
    let line = |text: String| serde_json::json!({ "text": text }).to_string() + "\n";
    let web = |i: usize| {
        (0..14)
            .map(|at| format!("{} {} ", word(i + at * at), (i * 31 + at * 17) % 97))
            .collect()
    };
    let book = |i: usize| {
        format!(
            "chapter {i} of the {} says that {} is {}",
            word(i),
            word(i / 5),
            word(i / 25)
        )
    };
    write("web.jsonl", (0..400).map(|i| line(web(i))).collect());
    write("book.jsonl", (0..120).map(|i| line(book(i))).collect());
    write(
        "model.toml",
        "[run]\nname = \"tiny\"\nseed = 7\nsteps = 3\n\
        [model]\nlayers = 1\nhidden = 16\nffn = 16\nheads = 2\nkv_heads = 1\ncontext = 16\nvocabulary = 300\ninit_std = 0.02\n\
        [batch]\nlanes = 2\nsequences_per_lane = 1\nmicro_batch_sequences = 1\n\
        [optimizer]\nlearning_rate = 1e-2\nschedule = { kind = \"constant\", warmup_steps = 2 }\nblock_elements = 1024\n\
        [data]\nheld_out_fraction = 0.2\n\
        [[data.domains]]\nname = \"web\"\npath = \"web.jsonl\"\nlanguage = \"en\"\nweight = 1\n\
        [[data.domains]]\nname = \"book\"\npath = \"book.jsonl\"\nlanguage = \"en\"\nweight = 1\n\
        [evaluation]\ninterval_steps = 2\nsequences_per_domain_max = 8\n"
            .to_owned(),
    );
    write(
        "plan.toml",
        "name = \"tiny\"\nbase = \"model.toml\"\nsteps = 24\nranks = 1\nexpected_seconds_per_run = 1.0\n\
        [seeds]\ntuning = [9]\njudging = [1, 2]\n[statistics]\nresamples = 1000\n[static]\npoints = 0\n\
        [[controllers]]\nname = \"ado\"\nset = [\"mixture.controller=ado\", \"mixture.start_steps=10\", \
        \"mixture.interval_steps=2\", \"mixture.lag_steps=1\"]\n\
        [[cases]]\nname = \"plain\"\nchange = { kind = \"none\" }\n"
            .to_owned(),
    );
}

fn command(folder: &Path, work: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tarazed"));
    command
        .args(["bench", "mixture", "plan.toml", "--work", work])
        .current_dir(folder);
    command
}

fn whole(folder: &Path, work: &str) -> (Output, String) {
    to_its_end(command(folder, work))
}

fn to_its_end(mut command: Command) -> (Output, String) {
    let output = command.output().expect("the program runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    (output, said)
}

fn read(folder: &Path, file: &str) -> String {
    std::fs::read_to_string(folder.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

fn stop_after_the_third_run(mut command: Command) {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program runs");
    let mut lines = BufReader::new(child.stdout.take().expect("its output")).lines();
    // Whether the best static mixture has a name, and so the number of runs, is not known yet.
    let third = "[3/";
    assert!(lines.any(|line| line.expect("text").starts_with(third)));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("sent");
    lines.for_each(|line| drop(line.expect("text")));
    assert_eq!(child.wait().expect("its end").code(), Some(34));
}

/// Runs that a call finished, as it said.
fn finished(said: &str) -> usize {
    said.lines().filter(|line| line.starts_with('[')).count()
}

/// What is finished outlives the work folder: a bench that does two runs at once, is stopped and loses its folder, goes on from
/// the file of outcomes alone and finds what one finds that has neither (DET-1). Runs that are done again have the same traces,
/// and where one has not, that is said.
#[test]
fn outcomes_outlive_the_work_folder() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    project(folder);
    let with = |more: &[&str]| {
        let mut command = command(folder, "work");
        command
            .args(["--outcomes", "kept/tiny.jsonl", "--parallel", "2"])
            .args(more);
        command
    };
    stop_after_the_third_run(with(&[]));
    let kept = read(folder, "kept/tiny.jsonl");
    let before = kept.lines().count() - 1;
    assert!((3..RUNS).contains(&before), "{kept}");
    std::fs::remove_dir_all(folder.join("work")).expect("removed");
    let (_, said) = to_its_end(with(&[]));
    assert!(said.contains(&format!("{before} done before")), "{said}");
    assert_eq!(finished(&said), RUNS - before, "{said}");
    whole(folder, "undisturbed");
    assert_eq!(
        read(folder, "work/report.json"),
        read(folder, "undisturbed/report.json")
    );
    let all = read(folder, "kept/tiny.jsonl");
    assert!(all.starts_with(&kept) && all.lines().count() == 1 + RUNS, "{all}");

    // Again, also twice: the second call finds that it is done.
    std::fs::remove_dir_all(folder.join("work")).expect("removed");
    for before in [0, 3] {
        let (_, said) = to_its_end(with(&["--again", "3"]));
        let part = format!("3 of {RUNS} finished runs to do again, {before} of them done again before");
        assert!(said.contains(&part), "{said}");
        assert_eq!(finished(&said), 0, "{said}");
        let text = read(folder, "kept/tiny.jsonl");
        assert_eq!(text.strip_prefix(&all).expect("added to").lines().count(), 3, "{text}");
        let report = read(folder, "work/report.md");
        let part = format!("3 of the {RUNS} runs were done again by the program that had done them");
        assert!(report.contains(&part), "{report}");
    }
    assert!(folder.join("work/again/runs/plain").exists() && !folder.join("work/runs").exists());

    // A record that says what no run finds, and one of another plan.
    let planted: String = all
        .lines()
        .map(|line| {
            line.split_once("\"trace\":\"").map_or_else(
                || format!("{line}\n"),
                |(before, after)| format!("{before}\"trace\":\"{}{}\n", "0".repeat(64), &after[64..]),
            )
        })
        .collect();
    std::fs::write(folder.join("kept/tiny.jsonl"), planted).expect("written");
    let output = with(&["--again", "1"]).output().expect("the program runs");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{message}");
    assert!(
        message.contains("it has another trace") && message.contains(&"0".repeat(64)),
        "{message}"
    );
    let plan = read(folder, "plan.toml").replacen("judging = [1, 2]", "judging = [1, 3]", 1);
    std::fs::write(folder.join("plan.toml"), plan).expect("written");
    let output = with(&[]).output().expect("the program runs");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(
        message.contains("tiny.jsonl line 1: says that all is of another plan"),
        "{message}"
    );
}

/// Stopped after its third run and gone on with, a bench finds what one finds that nothing happened to (DET-1), and does
/// nothing twice.
#[test]
fn a_stopped_bench_goes_on_and_finds_the_same() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    project(folder);
    stop_after_the_third_run(command(folder, "stopped"));
    assert!(read(folder, "stopped/report.md").contains("**Unfinished: "));

    let (_, said) = whole(folder, "stopped");
    assert!(
        said.contains("done before") && !said.contains(" 0 done before"),
        "{said}"
    );
    let (_, undisturbed) = whole(folder, "undisturbed");
    assert_eq!(
        undisturbed.lines().filter(|line| line.starts_with('[')).count(),
        RUNS,
        "{undisturbed}"
    );
    let report = read(folder, "undisturbed/report.json");
    assert_eq!(read(folder, "stopped/report.json"), report);
    let shared = "`unimax` has the weights of `uniform` here";
    assert!(read(folder, "stopped/report.md").contains(shared));
    assert!(!folder.join("undisturbed/runs/plain/unimax").exists());
    assert!(read(folder, "stopped/report.md").contains(&format!("All {RUNS} runs are finished.")));
    let decided = read(folder, "undisturbed/runs/plain/ado/seed-1/trace.jsonl");
    assert!(
        decided.contains("\"controller\":\"ado\""),
        "the adaptive arm decides something"
    );

    // Nothing is left to do, and nothing changes.
    let (_, said) = whole(folder, "undisturbed");
    assert!(said.contains(&format!("{RUNS} done before, 0 to do")), "{said}");
    assert!(!said.lines().any(|line| line.starts_with('[')), "{said}");
    assert_eq!(read(folder, "undisturbed/report.json"), report);

    // A work folder belongs to its plan and its corpus.
    for (file, from, to, part) in [
        ("plan.toml", "steps = 24", "steps = 22", "remove the run's folder"),
        ("web.jsonl", "lane", "lanes", "one of them has changed since"),
        ("plan.toml", "judging = [1, 2]", "judging = [1, 3]", "is another plan"),
        ("plan.toml", "resamples = 1000", "resamples = 1001", "is another plan"),
        ("model.toml", "[data]", "[data]\nrefine = {}", "data.refine"),
    ] {
        let text = read(folder, file);
        std::fs::write(folder.join(file), text.replacen(from, to, 1)).expect("written");
        let output = command(folder, "undisturbed").output().expect("the program runs");
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(part), "{message}");
        std::fs::write(folder.join(file), text).expect("written");
    }
}

/// A domain that comes late comes in all arms alike: at its step, with its share of the arm's mixture over all domains; before
/// that the others have theirs among themselves, since a static mixture does not know when it comes. A run that was stopped
/// goes on, and a second bench finds the same.
#[test]
fn a_late_domain_comes_to_all_arms_alike() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    project(folder);
    let plan = read(folder, "plan.toml").replace(
        "name = \"plain\"\nchange = { kind = \"none\" }",
        "name = \"late\"\nchange = { kind = \"late\", of = \"web\", from_step = 13 }",
    );
    std::fs::write(folder.join("plan.toml"), &plan).expect("written");
    let (_, said) = whole(folder, "work");
    assert_eq!(
        said.lines().filter(|line| line.starts_with('[')).count(),
        RUNS,
        "{said}"
    );

    let mixtures = |arm: &str| -> Vec<(f64, Option<f64>)> {
        let trace = read(folder, &format!("work/runs/late/{arm}/seed-1/trace.jsonl"));
        let lines = trace
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
        let share = |line: &serde_json::Value, name: &str| line["mixture"][name].as_f64();
        lines
            .map(|line| (share(&line, "book").expect("a share"), share(&line, "web")))
            .collect()
    };
    let report: serde_json::Value = serde_json::from_str(&read(folder, "work/report.json")).expect("JSON");
    let facts = &report["cases"][0]["facts"]["domains"];
    let tokens = |at: usize| facts[at]["train_tokens"].as_f64().expect("a number");
    assert_eq!(
        (&facts[1]["name"], &facts[1]["from_step"]),
        (&"web".into(), &13.into()),
        "{facts}"
    );
    let natural = tokens(1) / (tokens(0) + tokens(1));
    for (arm, share) in [("uniform", 0.5), ("natural", natural), ("ado", natural)] {
        let steps = mixtures(arm);
        assert_eq!(steps.len(), 24);
        assert!(
            steps[..13].iter().all(|(book, web)| (*book, *web) == (1.0, None)),
            "{arm}: {steps:?}"
        );
        let (book, web) = steps[13];
        let web = web.expect("it has come");
        // A controller begins inside its guards: of two domains each has a tenth at least.
        let expected = if arm == "ado" {
            f64::clamp(share, 0.1, 0.9)
        } else {
            share
        };
        assert!(
            (web - expected).abs() < 1e-9 && (book + web - 1.0).abs() < 1e-9,
            "{arm}: {web}, not {expected}"
        );
        let stays = steps[13..].iter().all(|step| *step == steps[13]);
        assert!(stays || arm == "ado", "{arm}: {steps:?}");
    }
    let report = read(folder, "work/report.json");
    let (_, again) = whole(folder, "again");
    assert_eq!(again.lines().filter(|line| line.starts_with('[')).count(), RUNS);
    assert_eq!(read(folder, "again/report.json"), report);
}

/// The text of a domain becomes harder in all arms alike: from its step on, with no change of anybody's weight. What is measured
/// stays what it was, and a second bench finds the same.
#[test]
fn a_shift_comes_to_all_arms_alike() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    project(folder);
    let plan = read(folder, "plan.toml").replace(
        "name = \"plain\"\nchange = { kind = \"none\" }",
        "name = \"shift\"\nchange = { kind = \"shift\", of = \"web\", from_step = 13 }",
    );
    std::fs::write(folder.join("plan.toml"), &plan).expect("written");
    let (_, said) = whole(folder, "work");
    assert_eq!(finished(&said), RUNS, "{said}");

    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).expect("JSON");
    let trace = |arm: &str| -> Vec<serde_json::Value> {
        let text = read(folder, &format!("work/runs/shift/{arm}/seed-1/trace.jsonl"));
        text.lines().map(json).collect()
    };
    for arm in ["uniform", "natural", "ado", "ado-mean"] {
        let lines = trace(arm);
        assert_eq!(lines.len(), 24);
        let decided = lines.iter().filter_map(|line| line["decisions"].as_array()).flatten();
        let changes: Vec<&serde_json::Value> = decided.filter(|decision| !decision["kind"]["data"].is_null()).collect();
        assert_eq!(changes.len(), 1, "{arm}: {changes:?}");
        assert_eq!(changes[0]["effective"], 13, "{arm}: {changes:?}");
        let domains = &changes[0]["kind"]["data"]["domains"];
        assert_eq!(domains.as_array().map(Vec::len), Some(1), "{arm}");
        assert_eq!(domains[0]["name"], "web");
        assert_eq!(domains[0]["domain"], 0);
        // Whoever does not adapt keeps its weights over the step.
        let share = |line: &serde_json::Value| line["mixture"]["web"].as_f64().expect("a share");
        let stays = lines.iter().all(|line| (share(line) - share(&lines[0])).abs() < 1e-12);
        assert!(stays || arm == "ado", "{arm}");
    }
    let report = json(&read(folder, "work/report.json"));
    let case = &report["cases"][0];
    let web = &case["facts"]["domains"][0];
    assert_eq!(web["name"], "web");
    assert_eq!(web["later"]["from_step"], 13, "{web}");
    assert!(case["facts"]["domains"][1]["later"].is_null());
    // 24 steps of 32 tokens, half of them web's: 13 steps of the easy text, then 11 of the hard one.
    let passes = |at: usize| case["epochs"][at]["arms"][1]["epochs"].as_f64().expect("a number");
    for (at, steps, tokens) in [
        (0, 13.0, &web["train_tokens"]),
        (1, 11.0, &web["later"]["train_tokens"]),
    ] {
        let expected = 0.5 * steps * 32.0 / tokens.as_f64().expect("a number");
        assert!((passes(at) - expected).abs() < 1e-9, "{at}: {} {expected}", passes(at));
    }
    let text = read(folder, "work/report.md");
    assert!(text.contains("| web from step 13 on | the hard half of web"), "{text}");
    whole(folder, "again");
    assert_eq!(read(folder, "again/report.json"), read(folder, "work/report.json"));
}
