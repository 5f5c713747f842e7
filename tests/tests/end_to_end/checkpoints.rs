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
/// nothing but the store: its processes are new.
#[test]
fn a_checkpoint_of_any_world_size_restores_to_any_other() {
    let walk = every_pair_once();
    let pairs: BTreeSet<_> = walk.windows(2).collect();
    assert_eq!((walk.len(), pairs.len()), (37, 36));
    let project = Project::tiny();
    for (ranks, steps) in walk.iter().zip((3..).step_by(3)) {
        let mut run = Run::start(&project.train("walk").ranks(*ranks).steps(steps));
        assert_undisturbed(&mut run, steps, &format!("{ranks} ranks at step {steps}"));
    }
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
