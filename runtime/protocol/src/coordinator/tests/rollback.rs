//! Roll back and skip: ranks that are taken back to an older state, whatever happens meanwhile.

use super::*;
use crate::message::RestoreFrom;
use crate::rollback::Rollback;

impl Cluster {
    fn rolled_back(pairs: &[(u64, u64)]) -> Self {
        let mut cluster = Self::new();
        let rollback = |&(at, to): &(u64, u64)| Rollback {
            at: StepIndex(at),
            to: StepsCompleted(to),
        };
        cluster.rollbacks = pairs.iter().map(rollback).collect();
        cluster.tell_rollbacks();
        cluster
    }

    /// Bases of the generations to come are noted by the effects of these rounds.
    fn bases(&mut self, rounds: usize) -> Vec<(u64, usize)> {
        let mut bases = Vec::new();
        for _ in 0..rounds {
            self.settle(1);
            if let Some(plan) = &self.coordinator.plan {
                let base = (plan.base.0, plan.rollbacks.count());
                if bases.last() != Some(&base) {
                    bases.push(base);
                }
            }
        }
        bases
    }
}

/// Without failures: one restore, from the newest checkpoint that is not left behind, and no generation more than that.
#[test]
fn ranks_go_back_once_and_on_behind_the_boundary() {
    // Checkpoints are made every five steps: that of step 5 is live, that of step 10 is not.
    let mut cluster = Cluster::rolled_back(&[(11, 7)]);
    assert_eq!(cluster.bases(200), [(0, 0), (5, 1)]);
    assert_eq!(cluster.end, Some(Effect::Done { code: 0 }));
    assert_eq!(cluster.lines, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 6, 7, 12]);
    // There is none before step 3: it is made from the seed.
    let mut cluster = Cluster::rolled_back(&[(6, 3)]);
    assert_eq!(cluster.bases(200), [(0, 0), (0, 1)]);
    assert_eq!(cluster.lines, [1, 2, 3, 4, 5, 6, 1, 2, 3, 7, 8, 9, 10, 11, 12]);
}

/// A rank may stand at the boundary before the line of that boundary is written: what it holds is needed until then.
#[test]
fn what_is_held_is_dead_only_once_its_line_is_written() {
    let mut cluster = Cluster::rolled_back(&[(4, 2)]);
    while !cluster.lines.contains(&4) {
        while let Some(event) = cluster.pending.pop_front() {
            cluster.event(event);
        }
        for worker in 0..SLOTS {
            cluster.read(worker);
            cluster.advance(worker);
        }
    }
    let generation = cluster.coordinator.generation();
    for _ in 0..20 {
        (0..SLOTS).for_each(|worker| cluster.advance(worker));
    }
    assert_eq!(cluster.coordinator.generation(), generation, "all wait for the line");
    assert!(cluster.coordinator.is_running() && cluster.coordinator.written < StepsCompleted(4));
    // One is lost there: the others go on from what they hold, and stop at the same boundary.
    cluster.kill(1);
    for _ in 0..20 {
        while let Some(event) = cluster.pending.pop_front() {
            cluster.event(event);
        }
        (0..SLOTS).for_each(|worker| cluster.read(worker));
    }
    let plan = cluster.coordinator.plan.as_ref().expect("a generation has begun");
    assert_eq!((plan.base.0, plan.rollbacks.count()), (4, 0));
    cluster.settle(200);
    assert_eq!(cluster.end, Some(Effect::Done { code: 0 }));
}

/// The line that kills a state may be written while a checkpoint of that state is on its way as the answer.
#[test]
fn a_checkpoint_that_is_left_behind_meanwhile_is_not_restored() {
    let mut cluster = Cluster::rolled_back(&[(4, 2)]);
    let found = |step| {
        Some(RestoreFrom {
            step: StepsCompleted(step),
            manifest_key: "a key".to_owned(),
            length: 1,
            blake3: [0; 32],
        })
    };
    let machine = &mut cluster.coordinator;
    machine.phase = Phase::Locating;
    machine.written = StepsCompleted(4);
    let generation = machine.generation();
    for dead in [3, 4] {
        let effects = machine.on_event(
            0,
            &Event::Located {
                checkpoint: found(dead),
            },
        );
        let again = matches!(&effects[..], [Effect::FindCheckpoint { rollbacks, .. }] if rollbacks.count() == 1);
        assert!(again && matches!(machine.phase, Phase::Locating), "{effects:?}");
    }
    assert_eq!(machine.generation(), generation);
    let effects = machine.on_event(0, &Event::Located { checkpoint: found(2) });
    let again = |effect: &Effect| matches!(effect, Effect::FindCheckpoint { .. });
    assert!(!effects.iter().any(again), "{effects:?}");
    assert!(machine.generation() > generation);
}

/// A rollback whose step is not run any more changes nothing.
#[test]
fn at_the_end_of_the_run_nobody_goes_back() {
    let mut cluster = Cluster::rolled_back(&[(LAST, 7)]);
    assert_eq!(cluster.bases(200), [(0, 0)]);
    assert_eq!(cluster.end, Some(Effect::Done { code: 0 }));
    assert_eq!(cluster.saved, Some(LAST));
}

fn rollbacks() -> impl Strategy<Value = Vec<(u64, u64)>> {
    prop::collection::vec((1_u64..6, any::<prop::sample::Index>()), 1..4).prop_map(|draws| {
        let mut pairs: Vec<(u64, u64)> = Vec::new();
        let mut at = 0;
        for (steps, index) in draws {
            at += steps;
            let before = Cluster::rolled_back(&pairs).rollbacks;
            let live: Vec<u64> = (0..at).filter(|&state| before.is_live(StepsCompleted(state))).collect();
            pairs.push((at, live[index.index(live.len())]));
        }
        pairs
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// LOOP-1, STEP-2: with rollbacks anywhere, through kills, changes of the world's size and controllers that take over,
    /// every step starts from the state that is decided (which the cluster asserts), and the run ends with every line.
    #[test]
    fn any_kills_around_rollbacks_end_in_the_same_lines(acts in acts(), pairs in rollbacks()) {
        let mut cluster = Cluster::rolled_back(&pairs);
        cluster.live_through(acts);
        prop_assert_eq!(&cluster.end, &Some(Effect::Done { code: 0 }), "phase {:?}", cluster.coordinator.phase);
        let lines: BTreeSet<u64> = cluster.lines.iter().copied().collect();
        prop_assert_eq!(lines, (1..=LAST).collect::<BTreeSet<u64>>());
        prop_assert_eq!(cluster.saved, Some(LAST));
    }
}
