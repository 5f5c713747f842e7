//! Roll back and skip: which states of a run its training goes on from.
//!
//! A state is named by the line it stands in: state `n` is what the first `n` lines lead to, and nothing is ever renamed.
//! A rollback says of one step `at` that it starts from an older state `to` instead of from state `at`:
//!
//! ```text
//!   0 ── 1 ── … ── to ── to+1 ── … ── at        lines to+1 … at stay in the trace, and their states are dead
//!                   └────────────────────── at+1 ── at+2 ── …
//! ```
//!
//! - Step numbers, the trace and the data only go on (DATA-1): what steps `to` to `at - 1` trained on is used, and without
//!   effect.
//! - A rollback has *acted* once line `at` is written. Until then the states before it are needed: they lead to that line.
//!   Afterwards they are dead: nobody goes on from them, and a checkpoint of one is not restored.
//! - What is gone back to does not depend on which checkpoints there are. It is restored from any live one, or made from the
//!   seed, by doing the steps again; those are checked as in any replay (STEP-5). Steps whose states are dead are not done
//!   again: their lines are written.
//! - Which rollbacks there are is said by decisions alone, and that they have acted by the trace: a function of the promise.
//! - One of the policy stands in the trace as a *notice* first. That is no rollback: the decision point that can still decide
//!   it in time does so, unless the notice was vetoed, or a person rolled the run back meanwhile. Steps in between are done
//!   like any others, and given up with the rest.

use crate::data::decision::{Decision, DecisionKind};
use rkyv::{Archive, Deserialize, Serialize};
use tarazed_domain::config::{Config, MixtureConfig, PolicyConfig, SpikePolicy};
use tarazed_domain::{StepIndex, StepsCompleted};

/// One step that does not start from the state of the step before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub struct Rollback {
    /// The step.
    pub at: StepIndex,
    /// The state that it starts from.
    pub to: StepsCompleted,
}

impl Rollback {
    /// Whether it leaves a state behind.
    const fn kills(&self, state: StepsCompleted) -> bool {
        self.to.0 < state.0 && state.0 <= self.at.0
    }
}

/// Rollbacks in the order in which they act. Each goes back to a state that is live when it acts.
#[derive(Clone, PartialEq, Eq, Debug, Default, Archive, Serialize, Deserialize)]
pub struct Rollbacks(Vec<Rollback>);

impl FromIterator<Rollback> for Rollbacks {
    fn from_iter<I: IntoIterator<Item = Rollback>>(rollbacks: I) -> Self {
        let mut all: Vec<Rollback> = rollbacks.into_iter().collect();
        all.sort_unstable_by_key(|rollback| rollback.at);
        Self(all)
    }
}

impl Rollbacks {
    /// Those that these decisions have in force, acted or not; the decisions are all of a run so far.
    #[must_use]
    pub fn of(decisions: &[Decision]) -> Self {
        let stands = |made: &Decision| {
            let veto = DecisionKind::Veto { decision: made.id };
            !decisions.iter().any(|decision| decision.kind == veto)
        };
        let rollback = |made: &Decision| match made.kind {
            DecisionKind::Rollback { to, .. } => Some(Rollback { at: made.effective, to }),
            _ => None,
        };
        let standing = decisions.iter().filter(|made| rollback(made).is_some() && stands(made));
        standing.filter_map(rollback).collect()
    }

    /// Those that have acted where the trace is written through this line.
    #[must_use]
    pub fn acted(&self, written: StepsCompleted) -> Self {
        let acted = self.0.iter().filter(|rollback| rollback.at <= written.next());
        Self(acted.copied().collect())
    }

    /// The one that acts at this boundary.
    #[must_use]
    pub fn acting_at(&self, boundary: StepsCompleted) -> Option<Rollback> {
        self.0.iter().copied().find(|rollback| rollback.at == boundary.next())
    }

    /// The oldest state that one of those goes back to that have not acted where the trace is written through this line.
    #[must_use]
    pub fn oldest_to_come(&self, written: StepsCompleted) -> Option<StepsCompleted> {
        let to_come = self.0.iter().filter(|rollback| rollback.at > written.next());
        to_come.map(|rollback| rollback.to).min()
    }

    /// The newest.
    #[must_use]
    pub fn last(&self) -> Option<Rollback> {
        self.0.last().copied()
    }

    /// How many.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The state that a step starts from.
    #[must_use]
    pub fn start_of(&self, step: StepIndex) -> StepsCompleted {
        let rollback = self.0.iter().find(|rollback| rollback.at == step);
        rollback.map_or(StepsCompleted(step.0), |rollback| rollback.to)
    }

    /// The step that goes on from a live state.
    #[must_use]
    pub fn next(&self, state: StepsCompleted) -> StepIndex {
        let mut backs = self.0.iter().rev();
        let back = backs.find(|rollback| rollback.to == state);
        back.map_or(state.next(), |rollback| rollback.at)
    }

    /// Whether training goes on from this state, or from one that it leads to.
    #[must_use]
    pub fn is_live(&self, state: StepsCompleted) -> bool {
        self.left_behind_by(state).is_none()
    }

    /// The first one that has left a state behind.
    #[must_use]
    pub fn left_behind_by(&self, state: StepsCompleted) -> Option<Rollback> {
        self.0.iter().copied().find(|rollback| rollback.kills(state))
    }

    /// The newest live state that is not after this one; the seed's is always one.
    #[must_use]
    pub fn newest_live(&self, mut state: StepsCompleted) -> StepsCompleted {
        // Each turn leads further back.
        while let Some(rollback) = self.0.iter().rev().find(|rollback| rollback.kills(state)) {
            state = rollback.to;
        }
        state
    }
}

/// The newest notice among these decisions, all of a run so far, while it stands: not vetoed, and no rollback decided since.
#[must_use]
pub fn announced(decisions: &[Decision]) -> Option<&Decision> {
    let is_notice = |made: &&Decision| matches!(made.kind, DecisionKind::RollbackNotice { .. });
    let notice = decisions.iter().rev().find(is_notice)?;
    let settles = |made: &Decision| match made.kind {
        DecisionKind::Rollback { .. } => made.id > notice.id,
        DecisionKind::Veto { decision } => decision == notice.id,
        _ => false,
    };
    (!decisions.iter().any(settles)).then_some(notice)
}

/// The newest live state that must stay for rollbacks to come, as the checkpoint of `step` knows it: `reach` is how many steps
/// behind it the policy may still go ([`reach_steps`]), `to_come` where decided ones go that have not acted.
#[must_use]
pub fn must_stay(
    step: StepsCompleted,
    reach: Option<u64>,
    to_come: Option<StepsCompleted>,
    acted: &Rollbacks,
) -> Option<StepsCompleted> {
    let reached = reach.map(|steps| StepsCompleted(step.0.saturating_sub(steps)));
    let oldest = [reached, to_come].into_iter().flatten().min()?;
    Some(acted.newest_live(oldest))
}

/// How many steps before the newest checkpoint a rollback of the policy may go back that is not decided yet, or has not acted
/// yet. A checkpoint that is so old spares it the way from the seed; it is not needed for more than that. Persons may go back
/// further.
#[must_use]
pub fn reach_steps(config: &Config) -> Option<u64> {
    let policy = &config.policy;
    let seen_late = crate::data::signals::DIVERGENCE_LINES as u64;
    let notice = notice_steps(&config.mixture, policy);
    (policy.spikes == SpikePolicy::RollbackAndSkip).then(|| {
        [
            seen_late,
            policy.rollback_margin_steps,
            policy.rollback_grain_steps,
            notice,
        ]
        .into_iter()
        .fold(config.mixture.lag_steps, u64::saturating_add)
    })
}

/// Steps from the line of a rollback's notice to the one that decides it: whole decision intervals, so that there is such a
/// line, and a decision point before it in which a veto can stand.
#[must_use]
pub fn notice_steps(mixture: &MixtureConfig, policy: &PolicyConfig) -> u64 {
    let interval = mixture.interval_steps.max(1);
    policy.rollback_notice_steps.div_ceil(interval).saturating_mul(interval)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rollbacks(pairs: &[(u64, u64)]) -> Rollbacks {
        let rollback = |&(at, to): &(u64, u64)| Rollback {
            at: StepIndex(at),
            to: StepsCompleted(to),
        };
        pairs.iter().map(rollback).collect()
    }

    fn live(rollbacks: &Rollbacks, through: u64) -> Vec<u64> {
        (0..=through)
            .filter(|&state| rollbacks.is_live(StepsCompleted(state)))
            .collect()
    }

    #[test]
    fn what_lies_between_is_dead_once_a_rollback_has_acted() {
        let all = rollbacks(&[(8, 5)]);
        assert_eq!(live(&all.acted(StepsCompleted(7)), 8), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
        let acted = all.acted(StepsCompleted(8));
        assert_eq!(live(&acted, 10), [0, 1, 2, 3, 4, 5, 9, 10]);
        assert_eq!(acted.next(StepsCompleted(5)), StepIndex(8));
        assert_eq!(acted.start_of(StepIndex(8)), StepsCompleted(5));
        assert_eq!(acted.next(StepsCompleted(9)), StepIndex(9));
        assert_eq!(acted.newest_live(StepsCompleted(7)), StepsCompleted(5));
        assert_eq!(all.acting_at(StepsCompleted(8)), all.last());
        assert_eq!(all.acting_at(StepsCompleted(7)), None);
        assert_eq!(acted.left_behind_by(StepsCompleted(7)), all.last());
        let oldest = [6, 7, 8].map(|written| all.oldest_to_come(StepsCompleted(written)));
        assert_eq!(oldest, [Some(StepsCompleted(5)), Some(StepsCompleted(5)), None]);
    }

    /// To the same state again, and to an older one: what leads there is what is walked.
    #[test]
    fn a_second_rollback_takes_the_first_ones_place() {
        let again = rollbacks(&[(8, 5), (12, 5)]);
        assert_eq!(again.next(StepsCompleted(5)), StepIndex(12));
        assert_eq!(live(&again, 14), [0, 1, 2, 3, 4, 5, 13, 14]);
        let deeper = rollbacks(&[(8, 5), (12, 3)]);
        assert_eq!(live(&deeper, 14), [0, 1, 2, 3, 13, 14]);
        assert_eq!(deeper.newest_live(StepsCompleted(11)), StepsCompleted(3));
    }

    /// A notice lasts whole decision intervals, and a checkpoint that a rollback may need is older by it.
    #[test]
    fn a_notice_lasts_whole_intervals() {
        let mixture = MixtureConfig::default();
        for (steps, lasts) in [(0, 0), (1, 50), (50, 50), (51, 100), (u64::MAX, u64::MAX)] {
            let policy = PolicyConfig {
                rollback_notice_steps: steps,
                ..PolicyConfig::default()
            };
            assert_eq!(notice_steps(&mixture, &policy), lasts);
        }
    }

    #[test]
    fn a_veto_takes_a_rollback_back() {
        let decision = |id: u64, effective: u64, kind: DecisionKind| Decision {
            id: crate::data::decision::DecisionId(id),
            line: StepsCompleted(4),
            effective: StepIndex(effective),
            kind,
            by: crate::data::decision::DecisionAuthor::Controller("ate".to_owned()),
            reason: String::new(),
        };
        let back = |to: u64| DecisionKind::Rollback {
            to: StepsCompleted(to),
            discarded: Vec::new(),
        };
        let first = crate::data::decision::DecisionId(1);
        let mut decisions = vec![decision(1, 8, back(2)), decision(2, 12, back(3))];
        assert_eq!(Rollbacks::of(&decisions), rollbacks(&[(8, 2), (12, 3)]));
        decisions.push(decision(3, 8, DecisionKind::Veto { decision: first }));
        assert_eq!(Rollbacks::of(&decisions), rollbacks(&[(12, 3)]));
    }

    proptest! {
        /// Walked from the seed, the steps lead to the newest state through exactly the live ones, each from the one that
        /// its step says; and every dead one lies behind a live one.
        #[test]
        fn the_walk_and_the_rule_agree(draws in prop::collection::vec((1_u64..6, any::<prop::sample::Index>()), 0..6)) {
            let mut pairs: Vec<(u64, u64)> = Vec::new();
            let mut at = 0;
            for (steps, index) in draws {
                at += steps;
                let choices = live(&rollbacks(&pairs), at - 1);
                pairs.push((at, choices[index.index(choices.len())]));
            }
            let written = at + 3;
            let all = rollbacks(&pairs);
            prop_assert_eq!(&all.acted(StepsCompleted(written)), &all);
            let mut walked = vec![0];
            let mut state = StepsCompleted(0);
            while state.0 < written {
                let step = all.next(state);
                prop_assert_eq!(all.start_of(step), state);
                state = step.completed();
                walked.push(state.0);
            }
            prop_assert_eq!(&walked, &live(&all, written));
            for state in 0..=written {
                let newest = all.newest_live(StepsCompleted(state));
                prop_assert_eq!(Some(&newest.0), walked.iter().rev().find(|&&live| live <= state));
            }
        }
    }
}
