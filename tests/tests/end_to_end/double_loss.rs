//! More ranks lost than copies cover: back to the newest checkpoint, without a person.

use crate::common::assert_undisturbed;
use rustix::process::Signal;
use tarazed_tests::harness::{Project, Run};

const STEPS: u64 = 200;

/// Kills these processes so that none outlives another by a step: all are stopped first.
#[track_caller]
fn kill_together(run: &Run, pids: &[u32]) {
    for signal in [Signal::STOP, Signal::KILL] {
        for &pid in pids {
            assert!(run.processes().signal(pid, signal), "{}", run.tail());
        }
    }
}

/// The base of the one generation that was begun anew after the first.
#[track_caller]
fn restored_base(run: &Run) -> u64 {
    let generations = run.events("generation");
    let restored: Vec<_> = generations[1..].iter().filter(|g| g["restored"] == true).collect();
    assert_eq!(restored.len(), 1, "{generations:?}\n{}", run.tail());
    restored[0]["base"].as_u64().expect("a step")
}

/// The newest checkpoint before the restored generation, as the events tell it in their order. One that was whole
/// already may be committed while the loss is being dealt with; none after the choice.
#[track_caller]
fn newest_checkpoint_to_restore(run: &Run) -> u64 {
    let events = run.json_lines("events.jsonl");
    let lost = events.iter().position(|event| event["kind"] == "state_lost");
    let lost = lost.unwrap_or_else(|| panic!("no state was lost\n{}", run.tail()));
    let restored = events[lost..].iter().position(|event| event["restored"] == true);
    let before = &events[..lost + restored.unwrap_or_else(|| panic!("nothing was restored\n{}", run.tail()))];
    let steps = before.iter().filter_map(|event| event["checkpoint_step"].as_u64());
    steps.max().unwrap_or(0)
}

/// STEP-5, CKPT-4, CKPT-6: the two ranks that hold one optimizer shard die together; the others and two replacements
/// go on from the newest checkpoint, and the steps between are checked against their lines.
#[test]
fn both_holders_of_a_shard_lost_together() {
    let project = Project::tiny();
    let mut run = Run::start(&project.train("pair").ranks(4).steps(STEPS));
    run.wait_for("a checkpoint and steps after it", |run| {
        let newest = run.newest_checkpoint();
        (newest > 0 && run.step() > newest + 3).then_some(())
    });
    let status = run.status();
    let holders = status.shards.first().expect("a shard");
    assert_eq!(holders.len(), 2, "a primary and a copy: {status:?}");
    let pids: Vec<u32> = holders
        .iter()
        .map(|&worker| status.workers[worker as usize].pid)
        .collect();
    kill_together(&run, &pids);
    assert_undisturbed(&mut run, STEPS, "both holders of a shard");
    let lost = run.events("state_lost");
    let missing = lost
        .first()
        .and_then(|event| event["shards_missing"].as_u64())
        .unwrap_or(0);
    assert!(
        (1..8).contains(&missing),
        "some shards are lost, not all: {lost:?}\n{}",
        run.tail()
    );
    let base = restored_base(&run);
    assert!(
        base > 0 && base == newest_checkpoint_to_restore(&run),
        "{base}\n{}",
        run.tail()
    );
    assert_eq!(run.events("rank_lost").len(), 2, "survivors survive\n{}", run.tail());
}

/// STEP-5, CKPT-6: every rank dies at once, twice.
#[test]
fn all_ranks_lost_at_once() {
    let project = Project::tiny();
    let mut run = Run::start(&project.train("all").ranks(4).steps(STEPS));
    for after in [50, 120] {
        run.wait_for_step(after);
        let status = run.wait_for_status("four ranks", |status| status.all_train(4));
        let pids: Vec<u32> = status.workers.iter().map(|worker| worker.pid).collect();
        kill_together(&run, &pids);
    }
    assert_undisturbed(&mut run, STEPS, "all ranks, twice");
    let generations = run.events("generation");
    let restored = generations[1..]
        .iter()
        .filter(|generation| generation["restored"] == true);
    assert_eq!(restored.count(), 2, "{}", run.tail());
    assert_eq!(run.events("rank_lost").len(), 8, "{}", run.tail());
}

/// STEP-5, DET-1: before there is any checkpoint, a run begins again from its seed, and checks what it wrote before.
#[test]
fn all_ranks_lost_before_the_first_checkpoint() {
    let project = Project::tiny_with(&[("checkpoint.interval_steps", "0")]);
    let mut run = Run::start(&project.train("seed").ranks(3).steps(80));
    run.wait_for_step(30);
    let pids: Vec<u32> = run.status().workers.iter().map(|worker| worker.pid).collect();
    kill_together(&run, &pids);
    assert_undisturbed(&mut run, 80, "all ranks, no checkpoint");
    assert_eq!(restored_base(&run), 0);
    assert_eq!(newest_checkpoint_to_restore(&run), 0);
}

/// STEP-5: a run on one rank has no survivors to ask; each loss is a restore.
#[test]
fn a_single_rank_lost_again_and_again() {
    let project = Project::tiny();
    let mut run = Run::start(&project.train("single").ranks(1).steps(120));
    for step in [10, 45, 100] {
        run.wait_for_step(step);
        run.wait_for("the kill", |run| run.kill_rank(0));
    }
    assert_undisturbed(&mut run, 120, "one rank, three kills");
    assert_eq!(run.events("state_lost").len(), 3, "{}", run.tail());
}
