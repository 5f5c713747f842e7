//! When checkpoints are made, which are kept, and that the world that reads one need not be the one that wrote it.

use crate::common::{assert_prefix, assert_undisturbed};
use rustix::process::Signal;
use std::collections::BTreeSet;
use tarazed_tests::harness::{Project, Run};

const WORLD_SIZES: [u32; 6] = [1, 2, 3, 4, 6, 8];

/// Every ordered pair of sizes once, one after the other: a de Bruijn sequence of order two (the Lyndon words of one and two
/// letters in order), closed.
fn every_pair_once() -> Vec<u32> {
    let mut walk = Vec::new();
    for (index, &size) in WORLD_SIZES.iter().enumerate() {
        walk.push(size);
        for &larger in &WORLD_SIZES[index + 1..] {
            walk.extend([size, larger]);
        }
    }
    walk.push(walk[0]);
    walk
}

/// CKPT-6: what 1, 2, 3, 4, 6 or 8 ranks wrote is read by each of 1, 2, 3, 4, 6 and 8 ranks, bit for bit. A resumed run has
/// nothing but the store: its processes are new. Each start restores the checkpoint that the one before ended with: a start
/// from the seed would write the same trace.
#[test]
fn a_checkpoint_of_any_world_size_restores_to_any_other() {
    let walk = every_pair_once();
    let pairs: BTreeSet<_> = walk.windows(2).collect();
    assert_eq!((walk.len(), pairs.len()), (37, 36));
    let project = Project::tiny();
    let (mut generations, mut saved) = (0, 0_u64);
    for (ranks, steps) in walk.iter().zip((3..).step_by(3)) {
        let what = format!("{ranks} ranks from step {saved} to step {steps}");
        let mut run = Run::start(&project.train("walk").ranks(*ranks).steps(steps));
        assert_undisturbed(&mut run, steps, &what);
        // The folder is the same, and so are the events of the starts before.
        let began = run.events("generation").split_off(generations);
        generations += began.len();
        let first = began
            .first()
            .unwrap_or_else(|| panic!("{what}: no generation\n{}", run.tail()));
        assert_eq!(
            (&first["restored"], &first["base"], &first["ranks"]),
            (&true.into(), &saved.into(), &(*ranks).into()),
            "{what}: {began:?}"
        );
        assert!(
            began[1..].iter().all(|later| later["restored"] == false),
            "{what}: {began:?}"
        );
        saved = steps;
    }
}

/// `"auto"`: as often as losses and costs advise, which for a run without a history is minutes. So what is saved here is what a
/// stop and the end save, nothing by steps; a loss, a stop and the restart change no number.
#[test]
fn a_run_that_chooses_its_interval_loses_nothing() {
    let project = Project::tiny_with(&[("checkpoint.interval_steps", "0"), ("checkpoint.interval", "\"auto\"")]);
    let steps = 1_000;
    let train = project.train("auto").ranks(3).steps(steps);
    let mut run = Run::start(&train);
    run.wait_for_step(40);
    assert!(run.kill_rank(1).is_some(), "{}", run.tail());
    run.wait_for("a recovery", |run| (!run.events("recovered").is_empty()).then_some(()));
    let later = run.step() + 20;
    run.wait_for_step(later);
    run.signal(Signal::TERM);
    run.finish().assert_code(34);
    let stopped = assert_prefix(&run);
    assert!(stopped < steps, "it was done before it was stopped");
    assert_eq!(
        project.committed(run.dir()),
        BTreeSet::from([stopped]),
        "{}",
        run.tail()
    );
    let mut again = Run::start(&train);
    again.wait_for_step(stopped + 20);
    assert!(again.kill_rank(0).is_some(), "{}", again.tail());
    assert_undisturbed(&mut again, steps, "an interval that is chosen");
    let restored = again.events("generation").into_iter();
    let bases: Vec<_> = restored
        .filter(|event| event["restored"] == true)
        .filter_map(|event| event["base"].as_u64())
        .collect();
    assert_eq!(bases, [0, stopped], "{}", again.tail());
    assert!(project.committed(again.dir()).contains(&steps), "{}", again.tail());
}

/// Checkpoints by the clock: all ranks save one and the same step, also after a loss; the first one after each multiple that is
/// to be kept stays, beside the newest. None of it reaches a number.
#[test]
fn checkpoints_by_the_clock_are_whole_and_change_nothing() {
    let project = Project::tiny_with(&[
        ("checkpoint.interval_steps", "0"),
        ("checkpoint.interval", "\"1s\""),
        ("checkpoint.keep_last", "1"),
        ("checkpoint.keep_every_steps", "500"),
    ]);
    let mut run = Run::start(&project.train("clock").ranks(3));
    let made = |run: &Run| -> BTreeSet<u64> {
        let events = run.events("checkpoint").into_iter();
        events.filter_map(|event| event["checkpoint_step"].as_u64()).collect()
    };
    run.wait_for("a checkpoint", |run| (!made(run).is_empty()).then_some(()));
    assert!(run.kill_rank(1).is_some(), "{}", run.tail());
    let before = made(&run).len();
    run.wait_for("more after the loss", |run| {
        (made(run).len() > before + 1).then_some(())
    });
    run.signal(Signal::TERM);
    run.finish().assert_code(34);
    let stopped = assert_prefix(&run);
    let kept = project.committed(run.dir());
    let mut expected = BTreeSet::from([stopped]);
    for multiple in (500..=stopped).step_by(500) {
        expected.extend(made(&run).range(multiple..multiple + 500).next());
    }
    assert!(kept == expected, "{kept:?} of {expected:?}\n{}", run.tail());
}
