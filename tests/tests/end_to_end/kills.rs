//! Ranks lost one at a time, at every kind of moment.

use crate::common::assert_undisturbed;
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;
use tarazed_tests::harness::{Project, Random, Run};

/// STEP-1, STEP-2, STEP-3, SUP-2, CKPT-1: at least twenty SIGKILLs at random moments leave the trace of an undisturbed
/// run, no step repeated or lost, and sound checkpoints; every killed worker comes back as its next life, and every
/// loss is told.
#[test]
fn twenty_kills_at_random_moments_change_nothing() {
    let (kills_wanted, steps) = (24, 1_000);
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let what = format!("TARAZED_TEST_SEED={seed}");
    // Kills in quick succession may leave no step between two deaths of a worker; the budget is another test's matter.
    let project = Project::tiny_with(&[("fault.restarts_max", "100")]);
    let mut run = Run::start(&project.train("kills").ranks(4).steps(steps));
    run.wait_for_step(1);
    let mut kills: BTreeMap<u32, u32> = BTreeMap::new();
    while kills.values().sum::<u32>() < kills_wanted && run.step() < steps - 50 {
        if random.below(3) > 0 {
            let later = run.step() + random.below(24);
            run.wait_for_step(later.min(steps - 50));
        }
        std::thread::sleep(Duration::from_micros(random.below(8_000)));
        let worker = random.below(4) as u32;
        if run.kill_rank(worker).is_some() {
            *kills.entry(worker).or_default() += 1;
        }
    }
    let total = kills.values().sum::<u32>();
    let back = run.wait_for_status("all four ranks back", |status| {
        let killed = |worker: u32| kills.get(&worker).copied().unwrap_or(0);
        status.all_train(4) && status.workers.iter().all(|w| w.incarnation >= killed(w.worker))
    });
    assert_undisturbed(&mut run, steps, &what);
    assert!(total >= 20, "{what}: only {total} kills\n{}", run.tail());
    let lost = run.events("rank_lost");
    assert_eq!(lost.len(), total as usize, "{what}: {lost:?}\n{}", run.tail());
    for event in &lost {
        let cause = event["cause"].as_str().unwrap_or_default();
        assert!(cause.starts_with("signal 9 (SIGKILL) after"), "{what}: {event}");
        assert!(
            !cause.contains("control session"),
            "{what}: who killed it is not told: {event}"
        );
    }
    for worker in back.workers {
        let killed = kills.get(&worker.worker).copied().unwrap_or(0);
        assert_eq!(worker.incarnation, killed, "{what}: {worker:?}, killed {kills:?}");
    }
    assert!(!run.events("recovered").is_empty(), "{what}\n{}", run.tail());
    let ranks: Vec<_> = run
        .json_lines("metrics.jsonl")
        .iter()
        .map(|line| line["ranks"].as_u64())
        .collect();
    assert!(
        ranks.contains(&Some(3)),
        "{what}: no step was committed by survivors alone"
    );
}

/// STEP-2, SUP-2: the survivors of a loss commit many steps while the replacement is not ready, and it joins later
/// without a restart of anybody. Its peers feed it: nobody goes back to a checkpoint.
#[test]
fn survivors_do_not_wait_for_the_replacement() {
    let project = Project::tiny();
    let steps = 1_100;
    let mut run = Run::start(&project.train("slow").ranks(4).steps(steps));
    run.wait_for_step(5);
    let mut incarnation = 0;
    // The replacement is stopped as soon as it is seen. If it was ready by then, this was no test; it is tried again.
    let held = loop {
        assert!(run.kill_rank(2).is_some(), "{}", run.tail());
        incarnation += 1;
        let pid = run.wait_for("a replacement", |run| run.processes().rank(2, incarnation));
        assert!(run.processes().signal(pid, Signal::STOP));
        if run.status().workers[2].state == "starting" {
            break pid;
        }
        assert!(run.processes().signal(pid, Signal::CONT));
        run.wait_for_status("all four ranks", |status| status.all_train(4));
    };
    let from = run.status().step;
    run.wait_for_step(from + 100);
    let status = run.status();
    for worker in &status.workers {
        let expected = if worker.worker == 2 { "starting" } else { "training" };
        assert_eq!(worker.state, expected, "{status:?}\n{}", run.tail());
    }
    let lanes: Vec<_> = status.workers.iter().filter_map(|w| w.lanes).collect();
    assert_eq!(
        lanes.iter().map(|[start, end]| end - start).sum::<u32>(),
        8,
        "{status:?}"
    );
    assert!(run.processes().signal(held, Signal::CONT));
    let whole = run.wait_for_status("the replacement's part", |status| status.all_train(4));
    assert_eq!(
        whole.workers[2].incarnation, incarnation,
        "the same life, held up and no more"
    );
    assert_undisturbed(&mut run, steps, "a slow replacement");
    assert_eq!(run.events("rank_lost").len(), incarnation as usize, "{}", run.tail());
    let generations = run.events("generation");
    let (from_seed, later) = generations.split_first().expect("a generation");
    assert_eq!(from_seed["restored"], true, "{from_seed}");
    let restored: Vec<_> = later.iter().filter(|event| event["restored"] != false).collect();
    assert!(restored.is_empty(), "{restored:?}");
    let joined = later.last().expect("a generation after the loss");
    assert_eq!(joined["ranks"], 4, "{joined}");
    assert!(
        joined["base"].as_u64() > Some(from),
        "{joined}, and step {from} was before it came"
    );
}

/// STEP-2, SUP-2: a rank that stands still is evicted after `fault.timeout_ms` and replaced; what it says after it
/// wakes up can harm nothing, because it never does.
#[test]
fn a_rank_that_hangs_is_replaced() {
    let project = Project::tiny_with(&[("fault.timeout_ms", "2000")]);
    let steps = 150;
    let mut run = Run::start(&project.train("hang").ranks(3).steps(steps));
    run.wait_for_step(40);
    let victim = run.status().workers[1].pid;
    assert!(run.processes().signal(victim, Signal::STOP), "{}", run.tail());
    assert_undisturbed(&mut run, steps, "a stopped rank");
    let lost = run.events("rank_lost");
    let told = lost
        .iter()
        .any(|event| event["worker"] == 1 && event["cause"].to_string().contains("no heartbeat"));
    assert!(told, "{lost:?}");
}

/// What of a rank is to stand still, as `WORKER.INCARNATION=STEP:PART`.
const HANG: &str = "TARAZED_CHAOS_HANG";
/// The step at which it does, and `fault.timeout_ms` meanwhile.
const HANGS_AT: u64 = 40;
const HANG_TIMEOUT_MS: u64 = 2_000;

/// A run of which this part of worker 1 hangs: that worker is replaced, nobody else, and no line shows it. Returns how it was
/// lost, and the alarms.
#[track_caller]
fn with_hanging(part: &str) -> (Value, Vec<Value>) {
    let timeout = HANG_TIMEOUT_MS.to_string();
    // A device thread that goes on without its actors waits for them at step 60 at the latest: its snapshot is not taken.
    let keys = [
        ("fault.timeout_ms", timeout.as_str()),
        ("checkpoint.interval_steps", "60"),
    ];
    let project = Project::tiny_with(&keys);
    let steps = 1_100;
    let train = project.train(part).ranks(3).steps(steps);
    let mut run = Run::start(&train.variable(HANG, &format!("1.0={HANGS_AT}:{part}")));
    run.wait_for_status("a replacement that trains", |status| {
        status.all_train(3) && status.workers[1].incarnation == 1
    });
    assert_undisturbed(&mut run, steps, part);
    let mut lost = run.events("rank_lost");
    assert_eq!(lost.len(), 1, "{part}: {lost:?}\n{}", run.tail());
    let lost = lost.remove(0);
    assert!(lost["worker"] == 1 && lost["incarnation"] == 0, "{lost}");
    assert_eq!(run.events("state_lost").len(), 0, "{}", run.tail());
    let alarms = run.events("alarm");
    for seen in alarms.iter().chain([&lost]) {
        assert!(seen_after_ms(seen) <= 2 * HANG_TIMEOUT_MS, "{seen}");
    }
    (lost, alarms)
}

#[track_caller]
fn seen_after_ms(event: &Value) -> u64 {
    event["detection_ms"].as_u64().expect("a number")
}

/// SUP-4, SUP-2: a device thread never comes back while its process's heartbeats go on. The others wait for it in a collective;
/// that nobody makes progress raises the alarm, and the one that does not answer the fence is replaced.
#[test]
fn a_device_thread_that_hangs_is_found_although_its_heart_beats() {
    let (lost, alarms) = with_hanging("device");
    let cause = lost["cause"].to_string();
    assert!(cause.contains("its device thread hangs"), "{lost}");
    assert!(seen_after_ms(&lost) < HANG_TIMEOUT_MS, "its heart beat on: {lost}");
    let stalled = alarms
        .iter()
        .any(|alarm| alarm["cause"].to_string().contains("no rank has made any progress"));
    assert!(stalled, "{alarms:?}");
}

/// SUP-4, STEP-6: the actors of a rank stand still, so no heartbeat comes, while its device thread computes on with the others:
/// steps go on until the rank is replaced.
#[test]
fn a_rank_whose_actors_hang_is_found_although_it_computes() {
    let (lost, _) = with_hanging("runtime");
    assert!(lost["cause"].to_string().contains("no heartbeat"), "{lost}");
    assert!(lost["step"].as_u64() > Some(HANGS_AT + 5), "it computed on: {lost}");
}

/// STEP-6: ranks compute on while their controller stands still, and nobody is taken for lost when it wakes up.
#[test]
fn a_controller_that_stands_still_stalls_nobody() {
    let project = Project::tiny();
    let steps = 400;
    let mut run = Run::start(&project.train("still").ranks(2).steps(steps));
    run.wait_for_step(20);
    run.hold_still();
    let (step, ticks) = (run.step(), run.processes().ticks());
    // Half a second of work, which is fifty steps or so.
    run.wait_for("work of the ranks", |run| {
        (run.processes().ticks() >= ticks + 50).then_some(())
    });
    assert_eq!(run.step(), step, "who writes the trace stands still");
    run.signal(Signal::CONT);
    assert_undisturbed(&mut run, steps, "a controller that stood still");
    assert_eq!(run.events("rank_lost").len(), 0, "{}", run.tail());
    assert_eq!(run.events("generation").len(), 1, "{}", run.tail());
}

/// STEP-2, STEP-3: one kill anywhere in a short life, from the first process to the last checkpoint: start, first
/// generation, last steps and leaving are the moments that long runs rarely see.
#[test]
fn a_kill_at_any_moment_of_a_short_run_changes_nothing() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let project = Project::tiny();
    let steps = 24;
    let mut hits = 0;
    for round in 0..14 {
        let what = format!("TARAZED_TEST_SEED={seed}, round {round}");
        let mut run = Run::start(&project.train(&format!("short{round}")).ranks(3).steps(steps));
        let worker = random.below(3) as u32;
        let first = run.wait_for("a process", |run| run.processes().rank(worker, 0));
        if round % 2 == 0 {
            std::thread::sleep(Duration::from_micros(random.below(150_000)));
        } else {
            run.wait_for_step(steps - random.below(4));
            std::thread::sleep(Duration::from_micros(random.below(20_000)));
        }
        hits += u32::from(run.processes().signal(first, Signal::KILL));
        assert_undisturbed(&mut run, steps, &what);
    }
    assert!(hits >= 5, "TARAZED_TEST_SEED={seed}: only {hits} of 14 kills hit");
}
