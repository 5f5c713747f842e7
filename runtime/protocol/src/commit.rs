//! The commit rule: which step the survivors of a generation agree on.
//!
//! - **STEP-1** Entering the barrier means: my shards, primary and replica, hold their reduced gradients.
//! - **STEP-2** A step is committed if any surviving rank passed its barrier; by STEP-1 every survivor then holds its
//!   reduced gradients, and the one that passed hands the outcome to the rest. If none passed, it is redone.
//!
//! The rule sees only what survivors report; it does not know time, and a redone step gives the same bits.

use crate::message::{BarrierOutcome, Member, StateReport};
use std::collections::BTreeMap;
use tarazed_domain::{OptimizerShardIndex, StepsCompleted};

/// What the survivors can go on from.
#[derive(Clone, PartialEq, Debug)]
pub enum Resolution {
    /// Every shard reaches this step from what survivors hold.
    Continue {
        /// The agreed count of committed steps.
        base: StepsCompleted,
        /// How to finish it, for holders one step behind and for the line.
        outcome: Option<BarrierOutcome>,
        /// Per shard the members that hold it whole at the base or one reduced gradient before it.
        holders: Vec<Vec<Member>>,
    },
    /// More was lost than the replicas cover, or nothing was there: restore the newest valid checkpoint.
    Restore {
        /// Shards without a usable copy.
        missing: Vec<OptimizerShardIndex>,
    },
}

/// Applies STEP-2 to the survivors' reports.
#[must_use]
pub fn resolve(shard_count: usize, reports: &BTreeMap<Member, StateReport>) -> Resolution {
    let stood = reports
        .values()
        .flat_map(|report| report.shards.iter().map(|holding| holding.state));
    let passed = reports
        .values()
        .filter_map(|report| report.passed.as_ref().map(|outcome| outcome.step));
    let base = stood.chain(passed).max().unwrap_or_default();
    let outcome = reports
        .values()
        .filter_map(|report| report.passed.as_ref())
        .find(|outcome| outcome.step == base)
        .cloned();

    let mut holders: Vec<Vec<Member>> = vec![Vec::new(); shard_count];
    for (member, report) in reports {
        for holding in &report.shards {
            let stands = holding.state == base;
            let can_finish =
                holding.state.next().completed() == base && holding.reduced == Some(base) && outcome.is_some();
            // A shard that the layout does not have is not there, whoever says so.
            if let Some(members) = holders.get_mut(holding.shard.index())
                && (stands || can_finish)
            {
                members.push(*member);
            }
        }
    }
    let missing: Vec<OptimizerShardIndex> = (0..shard_count as u32)
        .map(OptimizerShardIndex)
        .filter(|shard| holders[shard.index()].is_empty())
        .collect();
    if missing.is_empty() {
        Resolution::Continue { base, outcome, holders }
    } else {
        Resolution::Restore { missing }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::ShardHolding;
    use proptest::prelude::*;
    use tarazed_domain::{Incarnation, WorkerId};

    fn member(worker: u32) -> Member {
        Member {
            worker: WorkerId(worker),
            incarnation: Incarnation(0),
        }
    }

    fn outcome(step: u64) -> BarrierOutcome {
        BarrierOutcome {
            step: StepsCompleted(step),
            grad_norm: 1.0,
            loss: 2.0,
            stats: vec![],
            pause: false,
            checkpoint: false,
        }
    }

    /// How far one rank got in step 10 when the world ended.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum Reached {
        Reducing,
        Entered,
        Passed,
        Updated,
    }

    fn report(shards: &[u32], reached: Reached) -> StateReport {
        let state = StepsCompleted(if reached == Reached::Updated { 10 } else { 9 });
        let reduced = (reached >= Reached::Entered).then_some(StepsCompleted(10));
        StateReport {
            shards: shards
                .iter()
                .map(|&s| ShardHolding {
                    shard: OptimizerShardIndex(s),
                    state,
                    reduced,
                })
                .collect(),
            passed: Some(outcome(if reached >= Reached::Passed { 10 } else { 9 })),
            lines: vec![],
            waits_for: None,
        }
    }

    fn reached() -> impl Strategy<Value = Reached> {
        prop_oneof![
            Just(Reached::Reducing),
            Just(Reached::Entered),
            Just(Reached::Passed),
            Just(Reached::Updated)
        ]
    }

    proptest! {
        /// STEP-2, with STEP-1 as the barrier gives it: nobody passes unless everybody entered.
        #[test]
        fn a_step_commits_if_and_only_if_a_survivor_passed(
            mut progress in prop::collection::vec(reached(), 4), dead in prop::collection::vec(any::<bool>(), 4)
        ) {
            if progress.iter().any(|&p| p >= Reached::Passed) {
                for p in &mut progress { *p = (*p).max(Reached::Entered); }
            }
            // Shard s lives on workers s and s + 1.
            let reports: BTreeMap<Member, StateReport> = (0..4u32)
                .filter(|&w| !dead[w as usize])
                .map(|w| (member(w), report(&[w, (w + 3) % 4], progress[w as usize])))
                .collect();
            let covered = (0..4).all(|s| !dead[s] || !dead[(s + 1) % 4]);
            let survivor_passed = (0..4).any(|w| !dead[w] && progress[w] >= Reached::Passed);
            match resolve(4, &reports) {
                Resolution::Continue { base, outcome, holders } => {
                    prop_assert!(covered);
                    prop_assert_eq!(base, StepsCompleted(if survivor_passed { 10 } else { 9 }));
                    prop_assert_eq!(outcome.map(|o| o.step), Some(base), "the one that passed hands the outcome over");
                    for (shard, members) in holders.iter().enumerate() {
                        let alive = [shard, (shard + 1) % 4].iter().filter(|&&w| !dead[w]).count();
                        prop_assert_eq!(members.len(), alive, "by STEP-1 every surviving holder can finish");
                    }
                }
                Resolution::Restore { missing } => {
                    prop_assert!(!covered);
                    prop_assert!(!missing.is_empty());
                }
            }
        }
    }

    #[test]
    fn a_lost_shard_means_restore_and_names_it() {
        let reports = BTreeMap::from([(member(0), report(&[0, 1], Reached::Updated))]);
        assert_eq!(
            resolve(3, &reports),
            Resolution::Restore {
                missing: vec![OptimizerShardIndex(2)]
            }
        );
        assert!(matches!(resolve(1, &BTreeMap::new()), Resolution::Restore { .. }));
    }

    #[test]
    fn a_shard_that_the_layout_does_not_have_is_ignored() {
        let reports = BTreeMap::from([(member(0), report(&[0, 1, 77], Reached::Updated))]);
        assert!(matches!(resolve(2, &reports), Resolution::Continue { holders, .. } if holders.len() == 2));
    }

    #[test]
    fn a_copy_left_behind_by_an_older_step_is_no_donor() {
        let mut stale = report(&[0], Reached::Reducing);
        stale.shards[0].state = StepsCompleted(7);
        let reports = BTreeMap::from([(member(0), stale), (member(1), report(&[0, 1], Reached::Updated))]);
        let Resolution::Continue { holders, .. } = resolve(2, &reports) else {
            panic!("shard 0 lives on worker 1")
        };
        assert_eq!(holders[0], vec![member(1)]);
    }
}
