//! Worlds that change: controllers that take over, sizes, spares.

use super::*;

impl Cluster {
    fn roster(&self) -> Vec<u32> {
        let mut workers: Vec<u32> = self
            .coordinator
            .roster()
            .iter()
            .map(|(member, _)| member.worker.0)
            .collect();
        workers.sort_unstable();
        workers
    }
}

/// STEP-6: a new controller goes on with the living ranks, from where they stand; nothing is restored or replayed.
#[test]
fn living_ranks_are_adopted_with_what_they_hold() {
    let mut cluster = Cluster::new();
    cluster.settle(12);
    let (written, lives) = (cluster.coordinator.written, cluster.started.clone());
    assert!(written > StepsCompleted(0) && cluster.end.is_none());
    cluster.saved = None; // a restore would begin from nothing
    cluster.take_over();
    cluster.settle(200);
    assert_eq!(cluster.end, Some(Effect::Done { code: 0 }));
    assert_eq!(cluster.started, lives, "nobody was started anew");
    let lines: BTreeSet<u64> = cluster.lines.iter().copied().collect();
    assert_eq!(
        cluster.lines.len(),
        lines.len(),
        "no line came twice: {:?}",
        cluster.lines
    );
}

/// A rank that does not come back in time is ended, and the others go on without waiting longer.
#[test]
fn a_rank_that_does_not_come_back_is_replaced() {
    let mut cluster = Cluster::new();
    cluster.settle(12);
    let before = cluster.member(2);
    cluster.take_over();
    cluster
        .pending
        .retain(|event| !matches!(event, Event::Ready { member, .. } if *member == before));
    cluster.settle(3);
    assert!(!cluster.coordinator.is_running(), "it is waited for");
    // Tick by tick: a controller that jumped there would have been away itself.
    for _ in 0..=Timeouts::derive(10_000).failure_ms / 100 {
        cluster.now_ms += 100;
        cluster.event(Event::Tick);
    }
    cluster.settle(200);
    assert_eq!(cluster.end, Some(Effect::Done { code: 0 }));
    assert_eq!(cluster.started[&2], before.incarnation.next());
}

/// Nobody leaves before the others hold what it held, and nobody comes before it is whole.
#[test]
fn a_world_shrinks_and_grows_at_step_boundaries() {
    let mut cluster = Cluster::new();
    cluster.coordinator.options.last_step = StepsCompleted(10_000);
    cluster.settle(12);
    cluster.saved = None;
    for (ranks, expected) in [
        (2, vec![0, 1]),
        (1, vec![0]),
        (6, vec![0, 1, 2, 3, 4, 5]),
        (3, vec![0, 1, 2]),
    ] {
        cluster.event(Event::Resize { ranks });
        cluster.settle(60);
        assert_eq!(cluster.roster(), expected, "of {ranks}");
        assert_eq!(cluster.processes.len(), ranks as usize);
        assert!(cluster.coordinator.is_running() && cluster.end.is_none());
    }
}

/// A decision ends the run before its configured end: all pause there, and a checkpoint is the last thing; a veto takes the
/// end back.
#[test]
fn a_decision_ends_the_run() {
    for vetoed in [false, true] {
        let mut cluster = Cluster::new();
        cluster.coordinator.options.last_step = StepsCompleted(10_000);
        cluster.event(Event::EndsAt {
            step: Some(StepsCompleted(LAST)),
        });
        if vetoed {
            cluster.event(Event::EndsAt { step: None });
        }
        cluster.settle(200);
        let ended = Some(Effect::Done { code: 0 });
        assert_eq!(cluster.end == ended, !vetoed, "{:?}", cluster.end);
        // Those that end do so by the checkpoint of that boundary; with the end taken back they go on beyond it.
        assert_eq!(cluster.saved == Some(LAST), !vetoed, "{:?}", cluster.saved);
    }
}

/// A spare takes a dead rank's place in the very next generation; the dead one comes back as the spare.
#[test]
fn a_spare_takes_the_place_of_a_dead_rank() {
    let mut cluster = Cluster::new();
    cluster.coordinator.options.last_step = StepsCompleted(10_000);
    cluster.coordinator.options.spares = 1;
    cluster.event(Event::Resize { ranks: WORKERS });
    cluster.settle(12);
    assert_eq!(cluster.roster(), [0, 1, 2, 3]);
    let generation = cluster.coordinator.generation();
    cluster.kill(1);
    let late = cluster.pending.pop_back().expect("it is started again"); // and a start takes its time
    cluster.settle(6);
    assert_eq!(cluster.roster(), [0, 2, 3, 4]);
    assert_eq!(
        cluster.coordinator.generation(),
        generation.next(),
        "no second generation to admit it"
    );
    cluster.event(late);
    cluster.settle(20);
    assert_eq!(cluster.roster(), [0, 2, 3, 4]);
    assert_eq!(cluster.coordinator.workers()[1].state, "ready");
}

/// Events of a process's end may overtake its last words: one that has left is not waited for again (found by the
/// simulator).
#[test]
fn last_words_of_one_that_has_left_change_nothing() {
    let mut cluster = Cluster::new();
    cluster.coordinator.options.last_step = StepsCompleted(10_000);
    cluster.settle(12);
    let leaver = cluster.member(2);
    cluster.event(Event::Resize { ranks: 2 });
    cluster.settle(60);
    assert_eq!(cluster.roster(), [0, 1]);
    cluster.event(Event::Ready {
        member: leaver,
        address: "gone".to_owned(),
        pid: 1,
        newest: Generation(0),
    });
    cluster.event(Event::Resize { ranks: 3 });
    cluster.settle(60);
    assert_eq!(cluster.roster(), [0, 1, 2]);
    assert_eq!(cluster.started[&2], leaver.incarnation.next());
}
