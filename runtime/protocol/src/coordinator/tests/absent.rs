//! Controllers that stood still: their own sleep counts against nobody.

use super::*;

const ABSENT_MS: u64 = 60_000;

/// A controller that was stopped for a while does not take its own absence for everybody's silence.
#[test]
fn an_absent_controller_kills_nobody() {
    let mut cluster = Cluster::new();
    cluster.settle(20);
    let ticks = |cluster: &mut Cluster, gap_ms: u64| {
        cluster.now_ms += gap_ms;
        let now_ms = cluster.now_ms;
        cluster.coordinator.on_event(now_ms, &Event::Tick)
    };
    assert_eq!(ticks(&mut cluster, 1), []);
    assert_eq!(ticks(&mut cluster, 60_000), [], "the heartbeats wait behind this tick");
    let mut killed = Vec::new();
    for _ in 0..200 {
        killed.extend(ticks(&mut cluster, 100));
    }
    let silent = killed.iter().any(|effect| matches!(effect, Effect::Kill { .. }));
    assert!(silent, "with ticks in time, silence is silence");
}

/// Whoever is heard right behind the absence, before the first tick, is heard of now and not in the future: one that falls
/// silent then is missed as soon as any.
#[test]
fn a_word_behind_an_absence_is_of_now() {
    let mut cluster = Cluster::new();
    cluster.settle(20);
    let suspect_ms = cluster.coordinator.options.timeouts.suspect_ms;
    let now_ms = cluster.now_ms;
    assert_eq!(cluster.coordinator.on_event(now_ms, &Event::Tick), []);
    let woken_ms = now_ms + ABSENT_MS;
    for worker in 0..WORKERS {
        let member = cluster.member(worker);
        let heartbeat = cluster.heartbeat(member);
        cluster.coordinator.on_event(woken_ms, &heartbeat);
    }
    assert_eq!(cluster.coordinator.on_event(woken_ms, &Event::Tick), []);
    let silent_from_ms = cluster.coordinator.silence_deadline_ms(WorkerId(0));
    assert_eq!(silent_from_ms, Some(woken_ms + suspect_ms + 1));
}

/// The same before its first tick, when it waits for the ranks of the controller before.
#[test]
fn an_absent_controller_kills_none_of_those_that_it_waits_for() {
    let options = Cluster::new().coordinator.options;
    let failure_ms = options.timeouts.failure_ms;
    let mut machine = Coordinator::new(options, Generation(7), StepsCompleted(0));
    let member = Member {
        worker: WorkerId(0),
        incarnation: Incarnation(3),
    };
    let effects = machine.start(1_000, &[PastLife { member, lives: true }]);
    assert!(effects.contains(&Effect::Adopt { member }), "{effects:?}");
    let woken_ms = 1_000 + 10 * failure_ms;
    assert_eq!(machine.on_event(woken_ms, &Event::Tick), [], "they had no time to come");
    let mut killed = Vec::new();
    for passed_ms in (0..2 * failure_ms).step_by(10) {
        killed.extend(machine.on_event(woken_ms + passed_ms, &Event::Tick));
    }
    let late = |effect: &Effect| matches!(effect, Effect::Kill { member: late, .. } if *late == member);
    assert!(killed.iter().any(late), "now they had");
}

/// The grace in which the cause of a failed collective may show is time in which this process runs.
#[test]
fn an_absent_controller_blames_nobody_for_a_failed_collective() {
    for heard_after_ms in [0, ABSENT_MS] {
        fences_in_time(heard_after_ms);
    }
}

/// The failure is heard before the absence, or right behind it, before the first tick.
fn fences_in_time(heard_after_ms: u64) {
    let mut cluster = Cluster::new();
    cluster.settle(20);
    let now_ms = cluster.now_ms;
    let (reporter, suspect) = (cluster.coordinator.roster()[0].0, Rank(1));
    let generation = cluster.coordinator.generation();
    assert_eq!(cluster.coordinator.on_event(now_ms, &Event::Tick), []);
    let failed = Event::Failed {
        member: reporter,
        generation,
        cause: "rank 1 closed the connection".to_owned(),
        suspects: vec![suspect],
        fatal: false,
        dispute: None,
    };
    assert_eq!(cluster.coordinator.on_event(now_ms + heard_after_ms, &failed), []);
    let woken_ms = now_ms + ABSENT_MS;
    assert_eq!(
        cluster.coordinator.on_event(woken_ms, &Event::Tick),
        [],
        "an exit may wait behind this tick"
    );
    let fenced = cluster.coordinator.on_event(woken_ms + 200, &Event::Tick);
    let fences = fenced.iter().any(|effect| {
        matches!(
            effect,
            Effect::Send {
                message: ToRank::Fence { .. },
                ..
            }
        )
    });
    assert!(fences, "{fenced:?}");
}
