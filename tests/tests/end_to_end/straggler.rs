//! A rank that is slow for long, and alive.

use crate::common::assert_undisturbed;
use rustix::process::Signal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tarazed_tests::harness::{Project, Run};

/// DET-1: one rank gets a fraction of a processor. It keeps its place, is named, and computes fewer lanes; no number
/// depends on it.
#[test]
fn a_slow_rank_is_named_and_gets_fewer_lanes() {
    let project = Project::tiny_with(&[("fault.timeout_ms", "1500"), ("checkpoint.interval_steps", "0")]);
    let steps = 1_100;
    let mut run = Run::start(&project.train("slow").ranks(3).steps(steps));
    run.wait_for_status("all ranks", |status| status.all_train(3));
    run.wait_for_step(5);
    let victim = run.status().workers[0].clone();
    let lanes = |lanes: Option<[u32; 2]>| lanes.map_or(0, |[start, end]| end - start);
    assert_eq!(lanes(victim.lanes), 3);
    let over = AtomicBool::new(false);
    let processes = run.processes().clone();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // A tenth of a processor, in pieces far shorter than the timeout.
            while !over.load(Ordering::Relaxed) {
                let stopped = processes.signal(victim.pid, Signal::STOP);
                std::thread::sleep(Duration::from_millis(36));
                if !processes.signal(victim.pid, Signal::CONT) || !stopped {
                    break;
                }
                std::thread::sleep(Duration::from_millis(4));
            }
        });
        let fewer = run.wait_for_status("fewer lanes", |status| lanes(status.workers[0].lanes) == 1);
        over.store(true, Ordering::Relaxed);
        assert_eq!(fewer.workers[0].incarnation, 0, "the same life");
    });
    assert_undisturbed(&mut run, steps, "a slow rank");
    let named: Vec<_> = run
        .events("straggler")
        .iter()
        .map(|event| event["worker"].clone())
        .collect();
    assert!(named.iter().any(|worker| *worker == 0), "{named:?}\n{}", run.tail());
    assert_eq!(run.events("rank_lost").len(), 0, "{}", run.tail());
}
