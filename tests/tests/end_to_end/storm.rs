//! Everything at once: ranks, whole clusters and controllers lost, stops and resizes, in random order.

use crate::common::{assert_prefix, assert_undisturbed, wait_for_no_ranks};
use rustix::process::Signal;
use std::time::Duration;
use tarazed_tests::harness::{Project, Random, Run};

const STEPS: u64 = 300;

/// One harmful act; `true` if it ends this life of the controller.
fn harm(run: &mut Run, random: &mut Random) -> bool {
    if run.ended().is_some() {
        return true; // the ranks went on alone to the end of the run
    }
    let pids = run.processes().ranks();
    match random.below(10) {
        0..=3 => {
            if !pids.is_empty() {
                // It may be gone by itself.
                let _ = run.processes().signal(*random.pick(&pids), Signal::KILL);
            }
        }
        4 | 5 => {
            for &pid in pids.iter().take(2) {
                let _ = run.processes().signal(pid, Signal::KILL);
            }
        }
        6 => run.processes().kill_all(),
        7 => {
            if !pids.is_empty() {
                let pid = *random.pick(&pids);
                let _ = run.processes().signal(pid, Signal::STOP);
                std::thread::sleep(Duration::from_micros(random.below(30_000)));
                let _ = run.processes().signal(pid, Signal::CONT);
            }
        }
        8 => {
            // Ranks of the life before may be there while this one is still being loaded and hears nothing yet.
            run.wait_for("its first words", |run| run.has_spoken().then_some(()));
            if run.ended().is_none() {
                run.signal(Signal::TERM);
            }
            return true;
        }
        _ => {
            run.signal(Signal::KILL);
            return true;
        }
    }
    false
}

/// STEP-1, STEP-2, STEP-3, STEP-5, SUP-1, SUP-2, CKPT-1, CKPT-3, CKPT-6, DET-1: lives of the controller at random world
/// sizes, each harmed at random until it is stopped or killed; the next one starts at once, while ranks of the last may
/// still be there. After each life the trace is a prefix of the undisturbed one, and in the end it is all of it.
#[test]
fn any_order_of_losses_stops_and_resizes_leaves_the_same_trace() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let project = Project::tiny_with(&[("fault.restarts_max", "100")]);
    let mut acts = 0;
    for life in 0..10 {
        let ranks = 1 + random.below(8) as u32;
        let what = format!("TARAZED_TEST_SEED={seed}, life {life} on {ranks} ranks");
        let mut run = Run::start(&project.train("storm").ranks(ranks).steps(STEPS));
        run.wait_for("a rank", |run| run.processes().ranks().first().copied());
        loop {
            if random.below(2) == 0 {
                std::thread::sleep(Duration::from_micros(random.below(60_000)));
            } else {
                let later = (run.step() + random.below(16)).min(STEPS - 20);
                run.wait_for_step(later);
            }
            acts += 1;
            if harm(&mut run, &mut random) {
                break;
            }
        }
        let outcome = run.finish();
        let stopped = outcome.signal == Some(9) || [Some(34), Some(0)].contains(&outcome.code);
        assert!(stopped, "{what}\n{}", run.tail());
        assert_prefix(&run);
        // The next life starts while ranks of this one may be there still.
        run.leave();
        if run.step() >= STEPS - 40 {
            break;
        }
    }
    let what = format!("TARAZED_TEST_SEED={seed}, after {acts} acts");
    let mut last = Run::start(&project.train("storm").ranks(2).steps(STEPS));
    last.finish();
    wait_for_no_ranks(&mut last);
    assert_undisturbed(&mut last, STEPS, &what);
    let dir = last.dir().to_string_lossy().into_owned();
    project.tarazed(&["checkpoint", "verify", &dir]).assert_code(0);
}

/// CKPT-3: another run on the same store claims it. The one that was there can commit no more, and halts with a message
/// instead of training on in vain; started again, it claims the store back and loses nothing.
#[test]
fn a_store_claimed_by_another_run_halts_the_first() {
    let project = Project::tiny();
    let store = project.path().join("shared").to_string_lossy().into_owned();
    let first = project
        .train("first")
        .ranks(2)
        .steps(STEPS)
        .set("checkpoint.store", &store);
    let mut run = Run::start(&first);
    run.wait_for("a checkpoint", |run| (run.newest_checkpoint() > 0).then_some(()));
    let second = project
        .train("second")
        .ranks(2)
        .steps(40)
        .set("checkpoint.store", &store);
    // The first collects what a dead writer would have left, and may take the second's probes for such: 33 says try
    // again.
    let foreign = loop {
        let outcome = second.finish();
        if outcome.code != Some(33) {
            break outcome;
        }
    };
    // It has no trace to go with the checkpoints it finds.
    foreign.assert_code(3);
    foreign.assert_says("trace");
    let outcome = run.finish();
    outcome.assert_code(3);
    outcome.assert_says("generation");
    assert_prefix(&run);
    assert_undisturbed(&mut Run::start(&first), STEPS, "claimed back");
}
