//! Roll back and skip.

use crate::common::{assert_refused, begun_again, wait_for_no_ranks};
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use tarazed_tests::harness::{Outcome, Project, Random, Run, assert_same_trace, lines};

const STEPS: u64 = 420;

/// A run that must diverge: its learning rate rises until nothing can be learnt with it.
fn project() -> Project {
    let rising = "{ kind = \"constant\", warmup_steps = 2000 }";
    Project::tiny_with(&[
        ("optimizer.learning_rate", "2.0"),
        ("optimizer.schedule", rising),
        ("policy.spikes", "\"rollback_and_skip\""),
        ("policy.rollback_grain_steps", "10"),
        ("policy.rollback_margin_steps", "5"),
        ("policy.rollbacks_max", "2"),
        ("policy.rollback_notice_steps", "20"),
        ("mixture.start_steps", "10"),
        ("mixture.interval_steps", "10"),
        ("mixture.lag_steps", "4"),
        ("fault.restarts_max", "100"),
    ])
}

/// A project in which persons decide, every ten lines and five steps ahead.
fn persons() -> Project {
    Project::tiny_with(&[
        ("policy.persons", "true"),
        ("mixture.start_steps", "10"),
        ("mixture.interval_steps", "10"),
        ("mixture.lag_steps", "5"),
        ("fault.restarts_max", "100"),
    ])
}

/// A decision to go back, or the notice of one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Back {
    id: u64,
    line: u64,
    /// The count at which it acts.
    at: u64,
    /// Steps in the state gone back to.
    to: u64,
}

fn backs(trace: &[u8], kind: &str) -> Vec<Back> {
    let lines = lines(trace);
    let decisions = lines.iter().filter_map(|line| line["decisions"].as_array()).flatten();
    let back = |decision: &Value| {
        Some(Back {
            to: decision["kind"][kind]["to"].as_u64()?,
            id: decision["id"].as_u64()?,
            line: decision["line"].as_u64()?,
            at: decision["effective"].as_u64()?,
        })
    };
    decisions.filter_map(back).collect()
}

fn rollbacks(trace: &[u8]) -> Vec<Back> {
    backs(trace, "rollback")
}

fn notices(trace: &[u8]) -> Vec<Back> {
    backs(trace, "rollback_notice")
}

fn decide(project: &Project, run: &str, what: &[&str]) -> Outcome {
    let run_dir = project.run_dir(run);
    let mut args = vec!["decide", run_dir.to_str().expect("UTF-8")];
    args.extend(what);
    args.extend(["--by", "ada", "--reason", "a test"]);
    project.tarazed(&args)
}

/// What `checkpoint ls` says by step of those that stand committed: the step of the rollback that left each behind, if one did.
fn left_behind(project: &Project, run_dir: &Path) -> BTreeMap<u64, Option<u64>> {
    let listed = project.tarazed(&[
        "checkpoint".as_ref(),
        "ls".as_ref(),
        "--json".as_ref(),
        run_dir.as_os_str(),
    ]);
    listed.assert_code(0);
    let listed: Value = serde_json::from_str(&listed.stdout).expect("JSON");
    let committed = listed.as_array().expect("a list").iter();
    committed
        .filter(|checkpoint| checkpoint["state"] == "committed")
        .map(|checkpoint| {
            let step = checkpoint["reference"]["step"].as_u64().expect("a step");
            (step, checkpoint["left_behind_by"]["at"].as_u64())
        })
        .collect()
}

/// The verifier, which shares no code with the runtime, finds trace and store to be whole.
fn assert_verified(project: &Project, run: &str) {
    let run_dir = project.run_dir(run);
    let outcome = project.verify(&["trace".as_ref(), run_dir.as_os_str()]);
    outcome.assert_code(0);
    let outcome = project.verify(&["bucket".as_ref(), run_dir.join("store").as_os_str()]);
    outcome.assert_code(0);
}

/// No generation of a run that went back begins from what it left behind.
fn assert_begins_live(run: &Run, back: Back) {
    for event in run.events("generation") {
        let (written, base) = (
            event["step"].as_u64().expect("a step"),
            event["base"].as_u64().expect("a base"),
        );
        let is_dead = back.to < base && base <= back.at;
        assert!(written <= back.at || !is_dead, "{event}\n{}", run.tail());
    }
}

/// LOOP-1, DET-1, STEP-2, STEP-5: a run that diverges goes back and on, and ranks and controllers that are killed before,
/// on the way back and behind it change nothing; so does a restart from the store behind the rollback. The verifier, which
/// shares no code with the runtime, finds what is discarded to be what was drawn.
#[test]
fn a_run_that_is_rolled_back_is_the_same_whatever_happens() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let what = format!("TARAZED_TEST_SEED={seed}");
    let project = project();
    let alone = project.train("alone").ranks(1).steps(STEPS).complete();
    let expected = alone.trace();
    let found = rollbacks(&expected);
    let Some(&back) = found.first() else {
        panic!("it does not diverge within {STEPS} steps\n{}", alone.tail());
    };
    let at = back.at;
    assert!(back.to < at && at < STEPS - 20, "{found:?}");
    assert_eq!(alone.events("rolled_back").len(), found.len(), "{}", alone.tail());
    // Each is announced two decision points ahead, for the same step and state.
    let announced = notices(&expected);
    assert!(
        announced.len() >= found.len(),
        "{found:?} were announced as {announced:?}"
    );
    for (notice, back) in announced.iter().zip(&found) {
        assert_eq!((notice.at, notice.to, notice.line + 20), (back.at, back.to, back.line));
    }
    let notice = announced[0].line;

    let mut run = Run::start(&project.train("harmed").ranks(3).steps(STEPS));
    for step in [at / 2, notice + 1, notice + 11, at - 2, at - 1, at, at + 1, at + 10] {
        run.wait_for_step(step);
        let _between_two_lives = run.kill_rank(random.below(3) as u32);
    }
    let outcome = run.finish();
    outcome.assert_code(0);
    wait_for_no_ranks(&mut run);
    assert_same_trace(&run.trace(), &expected, &what);

    // Killed as a whole behind the rollback, and restored; the newest checkpoint may be one that is left behind.
    for (name, stop) in [("announced", notice), ("ended", at + 1), ("ended at once", at)] {
        drop(project.train(name).ranks(3).steps(stop).complete());
        let resumed = project.train(name).ranks(2).steps(STEPS).arg("--resume").complete();
        assert_same_trace(&resumed.trace(), &expected, &format!("{what}, {name}"));
    }
    for name in ["alone", "harmed", "announced", "ended"] {
        assert_verified(&project, name);
    }
    // With a checkpoint behind the rollback the bucket tells which ones it left behind, and only those.
    for (step, by) in left_behind(&project, alone.dir()) {
        let dead = found.iter().find(|back| back.to < step && step <= back.at);
        assert_eq!(by, dead.map(|back| back.at), "step {step}: {found:?}");
    }
}

/// LOOP-1, LOOP-2: a person vetoes a rollback that is announced. In time it never comes, and the trace with the veto in it leads
/// any run there; once it is decided the veto is refused, with the reason, and it comes.
#[test]
fn a_notice_is_vetoed_in_time_or_too_late() {
    let project = project();
    project.set("policy.rollback_notice_steps", "100");
    let mut run = Run::start(&project.train("vetoed").ranks(2).steps(100_000));
    let notice = run.wait_for("a notice", |run| notices(&run.trace()).first().copied());
    let veto = |run: &str, id: u64| decide(&project, run, &["veto", &id.to_string()]);
    veto("vetoed", notice.id).assert_code(0);
    run.kill_rank(0);
    run.wait_for_step(notice.at + 20);
    run.signal(Signal::TERM);
    run.finish().assert_code(34);
    wait_for_no_ranks(&mut run);
    let trace = run.trace();
    assert_eq!(rollbacks(&trace), [], "{}", run.tail());
    assert_eq!(notices(&trace), [notice]);
    assert_verified(&project, "vetoed");
    let lines = lines(&trace);
    let is_veto = |line: &&Value| line["decisions"].to_string().contains("\"veto\"");
    let vetoed = lines.iter().find(is_veto).expect("a line with the veto");
    let vetoed = vetoed["step"].as_u64().expect("a step") as usize;
    begun_again(run.dir(), &project.run_dir("again"), vetoed);
    let again = project.train("again").ranks(1).steps(lines.len() as u64).complete();
    assert_same_trace(&again.trace(), &trace, "from the veto on, on one rank");

    let mut late = Run::start(&project.train("late").ranks(2).steps(100_000));
    let back = late.wait_for("a rollback", |run| rollbacks(&run.trace()).first().copied());
    assert_refused(
        &veto("late", notice.id),
        &[&format!("announced for step {} is decided", back.at)],
    );
    assert_refused(&veto("late", back.id), &[&format!("acts at step {}", back.at)]);
    late.wait_for_step(back.at + 20);
    late.signal(Signal::TERM);
    late.finish().assert_code(34);
    assert_eq!(rollbacks(&late.trace()), [back]);
    assert_eq!(late.events("rolled_back").len(), 1, "{}", late.tail());
    assert_verified(&project, "late");
}

/// LOOP-1, LOOP-2, DATA-1: a person rolls a run back, while ranks are killed before, on the way back and behind it, and
/// controller and ranks together, too. A run that has only the lines up to the decision, and one rank to which nothing happens,
/// computes the same trace. Nothing begins from a state that was left behind, and the bucket tells which those are.
#[test]
fn a_person_rolls_a_disturbed_run_back_like_an_undisturbed_one() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let what = format!("TARAZED_TEST_SEED={seed}");
    let project = persons();
    let (steps, at) = (260, 145);
    let mut run = Run::start(&project.train("live").ranks(3).steps(steps));
    run.wait_for_step(12);
    let asked = |what: &[&str]| decide(&project, "live", what);
    let refused = asked(&["force", "rollback", "--to", "10000"]);
    assert_refused(&refused, &["not before line"]);
    let decided = asked(&["force", "rollback", "--to", "73", "--from-step", "145"]);
    decided.assert_code(0);
    assert!(decided.stdout.contains("line 140"), "{}", decided.tail());
    run.kill_rank(random.below(3) as u32);
    for step in [at - 1, at, at + 1] {
        run.wait_for_step(step);
        let _between_two_lives = run.kill_rank(random.below(3) as u32);
    }
    run.wait_for_step(at + 10);
    run.signal(Signal::KILL);
    run.finish();
    run.processes().kill_all();
    wait_for_no_ranks(&mut run);
    let resumed = project.train("live").ranks(2).steps(steps).complete();
    let trace = resumed.trace();
    let back = rollbacks(&trace);
    assert_eq!(back.len(), 1, "{what}\n{}", resumed.tail());
    assert_eq!((back[0].line, back[0].at, back[0].to), (140, at, 73), "{what}");
    assert_begins_live(&resumed, back[0]);
    assert_verified(&project, "live");

    begun_again(resumed.dir(), &project.run_dir("again"), 140);
    let again = project.train("again").ranks(1).steps(steps).complete();
    assert_same_trace(
        &again.trace(),
        &trace,
        &format!("{what}: from the decision on, on one rank"),
    );
    // By the bucket alone; `generate` takes a live one, too.
    for (step, by) in left_behind(&project, again.dir()) {
        assert_eq!(by, (73 < step && step <= at).then_some(at), "step {step}");
    }
}

/// To the newest checkpoint at or before a step: no step is done again.
#[test]
fn a_person_rolls_a_run_back_to_a_checkpoint() {
    let project = persons();
    let mut run = Run::start(&project.train("live").ranks(2).steps(100_000));
    run.wait_for("two checkpoints", |run| (run.newest_checkpoint() >= 40).then_some(()));
    let none = decide(&project, "live", &["force", "rollback", "--to", "3", "--at-checkpoint"]);
    assert_refused(&none, &["names no checkpoint"]);
    let newest = run.newest_checkpoint();
    let last = newest + 5;
    let decided = decide(
        &project,
        "live",
        &["force", "rollback", "--to", &last.to_string(), "--at-checkpoint"],
    );
    decided.assert_code(0);
    let back = rollbacks(&run.trace())[0];
    assert_eq!(back.to, newest, "{back:?}");
    run.wait_for_step(back.at + 5);
    run.signal(Signal::TERM);
    run.finish().assert_code(34);
    assert_begins_live(&run, back);
    assert_verified(&project, "live");
}

/// CKPT-5: collection by hand, between the notice of a rollback and its step, keeps what that needs: the run goes on from a
/// checkpoint, to the same trace.
#[test]
fn collection_by_hand_keeps_what_a_rollback_may_need() {
    let project = project();
    project.set("policy.rollback_notice_steps", "100");
    let alone = project.train("alone").ranks(1).steps(STEPS).complete();
    let expected = alone.trace();
    let Some(&back) = rollbacks(&expected).first() else {
        panic!("it does not diverge within {STEPS} steps\n{}", alone.tail());
    };
    let stop = back.line - 10;
    drop(project.train("collected").ranks(2).steps(stop).complete());
    let store = project.run_dir("collected").join("store");
    let store = store.to_str().expect("UTF-8");
    let collected = project.tarazed(&["checkpoint", "gc", store, "--keep-last", "1", "--claim"]);
    collected.assert_code(0);
    assert!(
        collected.stdout.contains("may still be rolled back"),
        "{}",
        collected.tail()
    );
    let kept = project.committed(store);
    let Some(old_enough) = kept.iter().rev().find(|step| **step <= back.to) else {
        panic!("{kept:?} and {back:?}");
    };
    assert!(
        old_enough + 150 >= back.to,
        "{kept:?} and {back:?}: no older than it must be"
    );
    let resumed = project
        .train("collected")
        .ranks(3)
        .steps(STEPS)
        .arg("--resume")
        .complete();
    assert_same_trace(&resumed.trace(), &expected, "collected by hand");
    assert_begins_live(&resumed, back);
    let events = resumed.json_lines("events.jsonl");
    let acted = events
        .iter()
        .position(|event| event["kind"] == "rolled_back")
        .expect("it went back");
    let begins = events
        .iter()
        .skip(acted)
        .find(|event| event["kind"] == "generation")
        .expect("a generation");
    // From the seed, too, it would be the same trace.
    let base = begins["base"].as_u64();
    assert!(
        base.is_some_and(|base| 0 < base && base <= back.to),
        "{begins} and {back:?}"
    );
    // The run has ended: no more is kept than was asked for.
    let collected = project.tarazed(&["checkpoint", "gc", store, "--keep-last", "1", "--ended", "--claim"]);
    collected.assert_code(0);
    assert_eq!(project.committed(store).len(), 1, "{}", collected.tail());
}
