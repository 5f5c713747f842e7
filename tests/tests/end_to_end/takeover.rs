//! A controller is lost or stands still, its ranks live on, and the next one goes on with them.

use crate::common::{assert_prefix, assert_undisturbed, wait_for_no_ranks};
use rustix::process::Signal;
use std::collections::BTreeSet;
use tarazed_tests::harness::{Project, Run};

fn pids(run: &Run) -> BTreeSet<u32> {
    run.processes().ranks().into_iter().collect()
}

/// STEP-6, CKPT-3, SUP-2: the controller is killed; its ranks compute on without it, and the next one finds them: no rank
/// is started, nothing is restored, no step is computed twice.
#[test]
fn a_new_controller_goes_on_with_the_living_ranks() {
    // Without checkpoints, a restore would begin from the seed.
    let project = Project::tiny_with(&[("checkpoint.interval_steps", "0")]);
    let steps = 1_100;
    let train = project.train("orphans").ranks(3).steps(steps);
    let mut first = Run::start(&train);
    first.wait_for_step(40);
    first.wait_for_status("all ranks", |status| status.all_train(3));
    let before = pids(&first);
    first.signal(Signal::KILL);
    assert_eq!(first.finish().signal, Some(9));
    let ticks = first.processes().ticks();
    let mut look = 0;
    while first.processes().ticks() < ticks + 20 {
        look += 1;
        assert!(look < 10_000, "the ranks do not compute on\n{}", first.tail());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let written = assert_prefix(&first);
    first.leave();
    let mut second = Run::start(&train);
    second.wait_for_step(written + 1);
    assert_eq!(pids(&second), before, "the same processes\n{}", second.tail());
    let status = second.wait_for_status("all ranks", |status| status.all_train(3));
    assert!(
        status.workers.iter().all(|worker| worker.incarnation == 0),
        "{status:?}"
    );
    assert_undisturbed(&mut second, steps, "a killed controller");
    assert_eq!(second.events("adopted").len(), 1, "{}", second.tail());
    for kind in ["state_lost", "rank_lost"] {
        assert_eq!(second.events(kind).len(), 0, "{kind}\n{}", second.tail());
    }
    let restored: Vec<_> = second
        .events("generation")
        .iter()
        .map(|g| g["restored"].clone())
        .collect();
    assert_eq!(restored, [true, false], "only the first began from the seed");
}

/// A controller that is killed again and again, each time with a rank: the survivors are adopted, the dead one is started
/// as its next life, and fewer ranks than there are shrink the world.
#[test]
fn ranks_that_died_meanwhile_are_replaced_and_the_world_takes_its_new_size() {
    let project = Project::tiny_with(&[("checkpoint.interval_steps", "0")]);
    let steps = 1_100;
    let mut step = 0;
    for (ranks, victims) in [(4, 1), (4, 1), (2, 0), (5, 1), (3, 0)] {
        let mut run = Run::start(&project.train("again").ranks(ranks).steps(steps));
        run.wait_for_step(step + 30);
        run.wait_for_status("its size", |status| {
            let training = status
                .workers
                .iter()
                .filter(|worker| worker.state == "training")
                .count();
            training == ranks as usize
        });
        run.signal(Signal::KILL);
        run.finish();
        let living = run.processes().ranks();
        for &pid in living.iter().take(victims) {
            assert!(run.processes().signal(pid, Signal::KILL));
        }
        step = assert_prefix(&run);
        run.leave();
    }
    let mut last = Run::start(&project.train("again").ranks(3).steps(steps));
    assert_undisturbed(&mut last, steps, "five killed controllers");
    assert_eq!(last.events("adopted").len(), 5, "{}", last.tail());
    assert_eq!(last.events("state_lost").len(), 0, "{}", last.tail());
}

/// CKPT-3, SUP-2: two controllers at once. One stands still, another is put in charge and goes on with its ranks; the
/// first wakes up, ends without touching anything, and its successor does not notice.
#[test]
fn a_controller_that_wakes_up_finds_itself_replaced() {
    let project = Project::tiny();
    let steps = 1_100;
    let train = project.train("two").ranks(3).steps(steps);
    let mut first = Run::start(&train);
    first.wait_for_step(40);
    first.wait_for_status("all ranks", |status| status.all_train(3));
    let before = pids(&first);
    first.signal(Signal::STOP);
    let refused = project.tarazed(&[
        "train".as_ref(),
        project.config().as_os_str(),
        "--run-dir".as_ref(),
        first.dir().as_os_str(),
    ]);
    refused.assert_code(2);
    refused.assert_says("--take-over");
    let mut second = Run::start(&train.arg("--take-over"));
    let written = first.step();
    second.wait_for_step(written + 20);
    assert_eq!(pids(&second), before, "the same processes\n{}", second.tail());
    first.signal(Signal::CONT);
    let outcome = first.finish();
    assert_eq!(outcome.code, Some(33), "{}", second.tail());
    first.leave();
    drop(first);
    assert_undisturbed(&mut second, steps, "a controller that woke up");
    assert_eq!(pids(&second), BTreeSet::new());
    assert_eq!(second.events("rank_lost").len(), 0, "{}", second.tail());
    let dir = second.dir().to_string_lossy().into_owned();
    project.tarazed(&["checkpoint", "verify", &dir]).assert_code(0);
}

/// SUP-1: ranks that no controller comes for end by themselves, and the run goes on from its checkpoints.
#[test]
fn ranks_that_nobody_comes_for_end() {
    let project = Project::tiny_with(&[("fault.timeout_ms", "200")]);
    let train = project.train("alone").ranks(3).steps(300);
    let mut run = Run::start(&train);
    run.wait_for("a checkpoint", |run| (run.newest_checkpoint() > 0).then_some(()));
    run.signal(Signal::KILL);
    run.finish();
    wait_for_no_ranks(&mut run);
    assert!(!run.status().live, "nobody answers any more");
    assert_undisturbed(&mut Run::start(&train), 300, "ranks that ended alone");
}

/// DET-1, STEP-2: a live run is asked for other numbers of ranks; nothing is lost, restored or computed twice.
#[test]
fn a_live_run_grows_and_shrinks() {
    let project = Project::tiny_with(&[("checkpoint.interval_steps", "0"), ("cluster.spares", "1")]);
    let steps = 1_100;
    let mut run = Run::start(&project.train("sizes").ranks(2).steps(steps));
    run.wait_for_step(10);
    let dir = run.dir().to_string_lossy().into_owned();
    let ask = |ranks: &str| project.tarazed(&["resize", ranks, "--run-dir", &dir]);
    for ranks in ["0", "9"] {
        let refused = ask(ranks);
        refused.assert_code(2);
        refused.assert_says("1 to 8 ranks");
    }
    for ranks in [5, 1, 8, 3, 4] {
        ask(&ranks.to_string()).assert_code(0);
        run.wait_for_status(&format!("{ranks} ranks"), |status| {
            let training = status.workers.iter().filter(|worker| worker.state == "training");
            training.count() == ranks
        });
        let step = run.step();
        run.wait_for_step(step + 10);
    }
    assert_undisturbed(&mut run, steps, "a run of many sizes");
    for kind in ["state_lost", "rank_lost"] {
        assert_eq!(run.events(kind).len(), 0, "{kind}\n{}", run.tail());
    }
    let refused = ask("2");
    refused.assert_code(2);
    refused.assert_says("no live run");
}

/// CKPT-3, SUP-2: a controller at work is replaced. It ends and leaves its ranks to its successor, whatever it notices
/// first.
#[test]
fn a_controller_at_work_can_be_replaced() {
    let project = Project::tiny_with(&[("checkpoint.interval_steps", "0")]);
    let steps = 1_100;
    let train = project.train("at work").ranks(3).steps(steps);
    let mut run = Run::start(&train);
    for _ in 0..3 {
        let step = run.step();
        run.wait_for_step(step + 30);
        run.wait_for_status("all ranks", |status| status.all_train(3));
        let before = pids(&run);
        let mut next = Run::start(&train.clone().arg("--take-over"));
        let outcome = run.finish();
        assert_eq!(outcome.code, Some(33), "{}", next.tail());
        outcome.assert_says("in other hands");
        run.leave();
        let written = next.step();
        next.wait_for_step(written + 20);
        assert_eq!(pids(&next), before, "the same processes\n{}", next.tail());
        run = next;
    }
    assert_undisturbed(&mut run, steps, "three controllers replaced at work");
    for kind in ["state_lost", "rank_lost"] {
        assert_eq!(run.events(kind).len(), 0, "{kind}\n{}", run.tail());
    }
}

/// SUP-2: a copy of a run folder names ranks that are not the copy's: they are left alone.
#[test]
fn a_copied_run_folder_takes_nobody_over() {
    let project = Project::tiny();
    let steps = 600;
    let mut first = Run::start(&project.train("original").ranks(2).steps(steps));
    first.wait_for("a checkpoint", |run| (run.newest_checkpoint() > 0).then_some(()));
    first.wait_for_status("all ranks", |status| status.all_train(2));
    first.hold_still(); // nothing changes while it is copied
    let copy = project.run_dir("copy");
    let copied = std::process::Command::new("cp")
        .arg("-r")
        .arg(first.dir())
        .arg(&copy)
        .status();
    assert!(copied.is_ok_and(|status| status.success()));
    first.signal(Signal::CONT);
    let mut second = Run::start(&project.train("copy").ranks(2).steps(steps));
    assert_undisturbed(&mut second, steps, "the copy");
    assert_eq!(second.events("adopted").len(), 0, "{}", second.tail());
    assert_undisturbed(&mut first, steps, "the original");
    assert_eq!(first.events("rank_lost").len(), 0, "{}", first.tail());
}

/// DET-3: ranks that follow another `[fault]` or `[checkpoint]` than newcomers would are not gone on with.
#[test]
fn ranks_of_other_rules_are_replaced() {
    let project = Project::tiny();
    let steps = 300;
    let train = project.train("rules").ranks(3).steps(steps);
    let mut first = Run::start(&train);
    first.wait_for("a checkpoint", |run| (run.newest_checkpoint() > 0).then_some(()));
    first.signal(Signal::KILL);
    first.finish();
    first.leave();
    let mut second = Run::start(&train.set("fault.audit_interval_steps", "7"));
    assert_undisturbed(&mut second, steps, "other rules");
    assert_eq!(second.events("adopted").len(), 0, "{}", second.tail());
    for kind in ["disputed", "convicted"] {
        assert_eq!(second.events(kind).len(), 0, "{kind}\n{}", second.tail());
    }
}
