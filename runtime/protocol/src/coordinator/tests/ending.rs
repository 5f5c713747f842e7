//! How a run ends: stopped, saved, or over already.

use super::*;

/// The last checkpoint may fail before all stand still; it is then saved again, and given up for now after some tries.
#[test]
fn a_last_checkpoint_that_fails_is_saved_again() {
    for (failures, full, expected) in [(1, false, 33), (LAST_SAVES_MAX, false, 33), (LAST_SAVES_MAX, true, 3)] {
        let mut cluster = Cluster::new();
        cluster.settle(20);
        let members: Vec<Member> = (0..WORKERS).map(|worker| cluster.member(worker)).collect();
        let last = StepsCompleted(LAST);
        cluster.event(Event::LineWritten { step: last });
        for failure in 0..failures {
            let generation = cluster.coordinator.generation();
            let paused = |member| Event::Paused {
                member,
                generation,
                step: last,
                saving: true,
            };
            cluster.event(paused(members[0]));
            cluster.event(Event::CheckpointFailed {
                step: last,
                cause: format!("disk full {failure}"),
                full,
            });
            assert!(cluster.end.is_none() && cluster.coordinator.is_running());
            members[1..].iter().for_each(|&member| cluster.event(paused(member)));
            let generation = cluster.coordinator.generation();
            for &member in &members {
                let shards = (0..SHARDS as u32).map(|shard| ShardHolding {
                    shard: OptimizerShardIndex(shard),
                    state: last,
                    reduced: None,
                });
                let report = StateReport {
                    shards: shards.collect(),
                    passed: Some(outcome(LAST)),
                    lines: vec![],
                    waits_for: None,
                };
                cluster.event(Event::State {
                    member,
                    generation,
                    report,
                });
            }
        }
        if failures == LAST_SAVES_MAX {
            assert!(
                matches!(&cluster.end, Some(Effect::Halt { code, diagnosis })
                    if *code == expected && diagnosis.contains("disk full 0")),
                "{:?}",
                cluster.end
            );
        } else {
            let begun = cluster.processes[&0].inbox.back();
            assert!(
                matches!(begun, Some(ToRank::Begin(plan)) if plan.checkpoint_at_base),
                "{begun:?}"
            );
        }
    }
}

/// A stop signal ends in a checkpoint and code 34, also when it comes while a generation is being agreed on.
#[test]
fn a_stop_signal_saves_and_leaves() {
    for kill_first in [false, true] {
        let mut cluster = Cluster::new();
        cluster.settle(40);
        assert!(cluster.end.is_none() && cluster.coordinator.is_running());
        if kill_first {
            cluster.kill(1);
        }
        cluster.event(Event::StopRequested);
        cluster.settle(2000);
        assert_eq!(
            cluster.end,
            Some(Effect::Done { code: 34 }),
            "{:?}",
            cluster.coordinator.phase
        );
    }
}

/// A run that is whole already is neither computed nor saved again (STEP-5).
#[test]
fn a_finished_run_started_again_ends_at_once() {
    let mut cluster = Cluster::new();
    cluster.saved = Some(LAST);
    cluster.coordinator.written = StepsCompleted(LAST);
    cluster.settle(20);
    assert_eq!(
        cluster.end,
        Some(Effect::Done { code: 0 }),
        "{:?}",
        cluster.coordinator.phase
    );
    assert!(cluster.lines.is_empty(), "computed again: {:?}", cluster.lines);
}

/// A last checkpoint is given up when nothing of it was stored for the time that is stated, and not while it comes along: by parts,
/// which all its shards may be waiting for the last of.
#[test]
fn a_large_last_checkpoint_may_take_its_time() {
    for stored in [0, 5] {
        let mut cluster = Cluster::new();
        cluster.settle(40);
        let stop_ms = cluster.coordinator.options.timeouts.stop_ms;
        let began_ms = cluster.now_ms;
        cluster.coordinator.on_event(began_ms, &Event::StopRequested);
        let (generation, step) = (cluster.coordinator.generation(), StepsCompleted(LAST));
        for worker in 0..WORKERS {
            let member = cluster.member(worker);
            let paused = Event::Paused {
                member,
                generation,
                step,
                saving: true,
            };
            cluster.coordinator.on_event(began_ms, &paused);
        }
        assert!(matches!(cluster.coordinator.phase, Phase::Finishing { .. }));
        let mut now_ms = began_ms;
        let mut pass = |cluster: &mut Cluster, until_ms: u64, parts: u64| {
            let mut ended = Vec::new();
            while now_ms < until_ms {
                now_ms += 100;
                for worker in 0..WORKERS {
                    let mut heartbeat = cluster.heartbeat(cluster.member(worker));
                    if let Event::Heartbeat { stored_bytes, .. } = &mut heartbeat {
                        *stored_bytes = parts << 23;
                    }
                    cluster.coordinator.on_event(now_ms, &heartbeat);
                }
                ended.extend(cluster.coordinator.on_event(now_ms, &Event::Tick));
            }
            ended
        };
        for part in 1..=stored {
            let at_ms = began_ms + part * (stop_ms - 200);
            assert_eq!(pass(&mut cluster, at_ms, part - 1), [], "{part}");
        }
        let end_ms = began_ms + stored * (stop_ms - 200) + stop_ms + 500;
        let ended = pass(&mut cluster, end_ms, stored);
        assert!(
            ended.iter().any(
                |effect| matches!(effect, Effect::Halt { code: 33, diagnosis } if diagnosis.contains("last checkpoint"))
            ),
            "{ended:?}"
        );
    }
}
