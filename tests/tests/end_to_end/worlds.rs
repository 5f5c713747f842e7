//! Nothing about the cluster reaches a number: world size, threads, shards, copies, and the loop on top of them.

use crate::common::assert_undisturbed;
use std::io::Write;
use tarazed_tests::harness::{Project, Run, assert_same_trace, first_lines, lines, undisturbed};

const STEPS: u64 = 60;

/// DET-1, DET-2, STEP-4: 1, 2, 3, 4, 5 and 8 ranks, so with lanes that do and do not divide, write the same bytes:
/// loss, norm and the hash of the whole state.
#[test]
fn every_world_size_writes_the_same_trace() {
    let project = Project::tiny();
    for ranks in [1, 2, 3, 4, 5, 8] {
        let mut run = Run::start(&project.train(&format!("r{ranks}")).ranks(ranks).steps(STEPS));
        assert_undisturbed(&mut run, STEPS, &format!("{ranks} ranks"));
        assert_eq!(run.events("rank_lost").len(), 0, "{}", run.tail());
        let steps: Vec<_> = run
            .json_lines("metrics.jsonl")
            .iter()
            .map(|line| line["step"].as_u64())
            .collect();
        assert_eq!(
            steps,
            (1..=STEPS).map(Some).collect::<Vec<_>>(),
            "a measurement of each step"
        );
        let left: Vec<_> = std::fs::read_dir(project.temporary())
            .expect("a folder")
            .flatten()
            .collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
    // What was compared is worth comparing.
    let lines = lines(undisturbed(STEPS));
    let mut states = std::collections::BTreeSet::new();
    for (index, line) in lines.iter().enumerate() {
        assert_eq!(line["step"], index as u64 + 1);
        assert_eq!(line["tokens"], (index as u64 + 1) * 8 * 32);
        let state = line["state"].as_str().expect("a hash");
        assert!(state.len() == 64 && states.insert(state.to_owned()), "{line}");
        assert_eq!(line["heldout"].is_object(), (index + 1).is_multiple_of(10), "{line}");
    }
    let loss = |index: usize| lines[index]["loss"].as_f64().expect("a number");
    assert!(loss(59) < loss(0) - 1.0, "it learns: {} to {}", loss(0), loss(59));
}

/// DET-1, DET-2: compute threads of a rank, the number of optimizer shards and of their copies decide no number.
#[test]
fn threads_shards_and_copies_decide_no_number() {
    let project = Project::tiny();
    for (name, ranks, keys) in [
        (
            "t1",
            2,
            &[("cluster.threads_per_rank", "1"), ("optimizer.replicas", "1")][..],
        ),
        ("t2", 1, &[("cluster.threads_per_rank", "2")]),
        ("t3", 3, &[("cluster.threads_per_rank", "3"), ("optimizer.shards", "3")]),
        ("s1", 4, &[("optimizer.shards", "1"), ("optimizer.replicas", "4")]),
        ("s50", 3, &[("optimizer.shards", "50"), ("optimizer.replicas", "3")]),
    ] {
        let train = project.train(name).ranks(ranks).steps(STEPS);
        let train = keys.iter().fold(train, |train, (key, value)| train.set(key, value));
        assert_undisturbed(&mut Run::start(&train), STEPS, name);
    }
}

/// DET-1, the other way round: seed and data do decide numbers, from the first step on.
#[test]
fn seed_and_data_decide_numbers() {
    let project = Project::tiny();
    let seeded = project.train("seed").set("run.seed", "8").steps(2).complete().trace();
    let mut text = std::fs::OpenOptions::new()
        .append(true)
        .open(project.text("code"))
        .expect("a text");
    writeln!(text, "{{\"text\":\"fn one_more() {{}}\"}}").expect("written");
    let appended = project.train("data").steps(2).complete().trace();
    for (trace, what) in [(seeded, "seed"), (appended, "data")] {
        assert_ne!(first_lines(&trace, 1), undisturbed(1), "{what}");
    }
}

/// LOOP-1, DATA-2: a run whose mixture adapts is as reproducible as a static one, at another world size and through a
/// loss; each decision stands in the trace before it takes effect.
#[test]
fn an_adaptive_mixture_is_reproducible() {
    let project = Project::tiny_with(&[
        ("mixture.controller", "\"ado\""),
        ("mixture.start_steps", "60"),
        ("mixture.interval_steps", "20"),
        ("mixture.lag_steps", "3"),
    ]);
    let steps = 240;
    let alone = project.train("one").ranks(1).steps(steps).complete().trace();
    let mut run = Run::start(&project.train("three").ranks(3).steps(steps));
    for step in [70, 90, 130] {
        run.wait_for_step(step);
        assert!(run.kill_rank(step as u32 % 3).is_some(), "{}", run.tail());
    }
    run.finish().assert_code(0);
    assert_same_trace(&run.trace(), &alone, "adaptive mixture");
    assert_eq!(run.events("rank_lost").len(), 3, "{}", run.tail());

    let lines = lines(&alone);
    let mut decisions = 0;
    for (index, line) in lines.iter().enumerate() {
        for decision in line["decisions"].as_array().expect("a list") {
            decisions += 1;
            let effective = decision["effective"].as_u64().expect("a step") as usize;
            assert!(effective > index, "{decision} takes effect before its line");
            let mixture = |at: usize| lines.get(at).map(|line| line["mixture"].clone());
            if effective < lines.len() {
                assert_ne!(mixture(effective), mixture(effective - 1), "{decision} has no effect");
            }
        }
    }
    assert!(decisions >= 3, "only {decisions} decisions in {steps} steps");
}

/// `tarazed trace diff` on run folders: 0 where common steps agree, 3 and the place where one digit differs.
#[test]
fn trace_diff_compares_run_folders() {
    let project = Project::tiny();
    let short = project.train("short").ranks(1).steps(12).complete();
    let long = project.train("long").ranks(2).steps(20).complete();
    let diff = || {
        let (left, right) = (short.dir().as_os_str(), long.dir().as_os_str());
        project.tarazed(&["trace".as_ref(), "diff".as_ref(), left, right])
    };
    let equal = diff();
    equal.assert_code(0);
    assert!(equal.stdout.starts_with("equal on 12 common steps"), "{}", equal.tail());
    let trace = String::from_utf8(long.trace()).expect("UTF-8");
    let bits = trace.match_indices("\"loss_bits\":\"0x").nth(6).expect("line 7").0 + 15;
    let digit = if &trace[bits..=bits] == "3" { "4" } else { "3" };
    let changed = format!("{}{digit}{}", &trace[..bits], &trace[bits + 1..]);
    std::fs::write(long.dir().join("trace.jsonl"), changed).expect("written");
    let differs = diff();
    differs.assert_code(3);
    differs.assert_says("step 7: ");
    differs.assert_says("loss_bits");
}
