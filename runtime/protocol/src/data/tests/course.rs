use super::*;
use crate::data::course::{Course, Directives};
use crate::data::decision::{DiscardedSamples, SpikeBounds};
use crate::data::stats::LossSum;
use proptest::prelude::*;
use std::collections::BTreeSet;

fn decision(id: u64, line: u64, effective: u64, kind: DecisionKind) -> Decision {
    Decision {
        kind,
        ..mixture_decision(id, line, effective, &[])
    }
}

fn veto(id: u64, effective: u64, which: u64) -> Decision {
    let kind = DecisionKind::Veto {
        decision: DecisionId(which),
    };
    decision(id, effective - 8, effective, kind)
}

fn course() -> Course {
    Course::new(vec![0.5, 0.5])
}

/// By the definition: of all settings that hold, the newest one at or before the step. A veto that comes too late for its
/// decision sets again what was in force just before that.
fn slowly(decisions: &[(u64, u64, Option<u64>)], step: u64) -> u64 {
    let mut settings: Vec<(u64, Option<u64>, u64)> = vec![(0, None, 0)];
    for (id, effective, vetoed) in decisions {
        settings.sort_by_key(|(from, ..)| *from);
        match vetoed {
            None => settings.push((*effective, Some(*id), *id)),
            Some(which) => {
                let at = settings.iter().position(|(_, by, _)| *by == Some(*which)).unwrap();
                if settings[at].0 >= *effective {
                    settings.remove(at);
                } else {
                    settings.push((*effective, None, settings[at - 1].2));
                }
            }
        }
    }
    settings.sort_by_key(|(from, ..)| *from);
    settings.iter().rev().find(|(from, ..)| *from <= step).unwrap().2
}

proptest! {
    /// LOOP-2: what is in force at every step is what the decisions that were accepted say, vetoes included.
    #[test]
    fn what_is_in_force_is_what_was_decided(
        script in prop::collection::vec((0_u64..40, prop::option::weighted(0.3, any::<prop::sample::Index>())), 1..20),
    ) {
        let mut course = course();
        let mut accepted: Vec<(u64, u64, Option<u64>)> = Vec::new();
        for (index, (later, vetoed)) in script.into_iter().enumerate() {
            let id = index as u64 + 1;
            let line = id * 10;
            let effective = line + 8 + later;
            let which = vetoed.filter(|_| id > 1).map(|which| which.index(index) as u64 + 1);
            let made = match which {
                Some(which) => decision(id, line, line + 8, DecisionKind::Veto { decision: DecisionId(which) }),
                None => mixture_decision(id, line, effective, &[id as f64, 0.0]),
            };
            let before = course.clone();
            match course.adopt(&made) {
                Ok(()) => accepted.push((id, made.effective.0, which)),
                Err(reason) => {
                    prop_assert_eq!(&course, &before, "a refused decision changes nothing: {}", reason);
                }
            }
        }
        for step in 0..300 {
            let expected = slowly(&accepted, step);
            let weights = if expected == 0 { vec![0.5, 0.5] } else { vec![expected as f64, 0.0] };
            prop_assert_eq!(course.mixture(StepIndex(step)), &weights[..], "step {} of {:?}", step, accepted);
        }
        // Steps that were planned before a decision was known keep what they had.
        let froms: BTreeSet<StepIndex> = course.mixtures().map(|(from, _)| from).collect();
        prop_assert_eq!(froms.len(), course.mixtures().len(), "one mixture for one step");
    }
}

#[test]
fn a_veto_in_time_undoes_and_one_too_late_brings_back() {
    let mut course = course();
    course.adopt(&mixture_decision(1, 100, 108, &[0.6, 0.4])).unwrap();
    course.adopt(&mixture_decision(2, 150, 400, &[0.7, 0.3])).unwrap();
    course.adopt(&veto(3, 208, 2)).unwrap();
    assert_eq!(course.mixture(StepIndex(500)), [0.6, 0.4], "it never acts");
    course.adopt(&veto(4, 258, 1)).unwrap();
    assert_eq!(course.mixture(StepIndex(257)), [0.6, 0.4], "what was planned stands");
    assert_eq!(
        course.mixture(StepIndex(258)),
        [0.5, 0.5],
        "what was before is in force again"
    );
    assert!(
        course.sets_mixture(StepIndex(258)),
        "nobody else sets the mixture of that step"
    );
}

#[test]
fn contradictions_are_refused_with_their_reason() {
    let mut course = course();
    course.adopt(&mixture_decision(1, 100, 108, &[0.6, 0.4])).unwrap();
    course.adopt(&mixture_decision(2, 150, 158, &[0.7, 0.3])).unwrap();
    course.adopt(&decision(3, 150, 158, DecisionKind::Pin)).unwrap();
    course.adopt(&decision(4, 150, 208, DecisionKind::Stop)).unwrap();
    let rate = |factor| DecisionKind::LearningRate { factor };
    course.adopt(&decision(5, 150, 158, rate(0.5))).unwrap();
    let discarded = vec![DiscardedSamples { first: 0, count: 1 }; 2];
    let back = |to: u64, discarded: &[DiscardedSamples]| DecisionKind::Rollback {
        to: StepsCompleted(to),
        discarded: discarded.to_vec(),
    };
    let mut refused = |made: Decision| {
        let before = course.clone();
        let reason = course.adopt(&made).unwrap_err();
        assert_eq!(course, before);
        reason
    };
    assert!(refused(mixture_decision(9, 150, 158, &[0.1, 0.9])).contains("contradicts decision 2"));
    assert!(refused(decision(9, 200, 208, DecisionKind::Pin)).contains("pinned already"));
    assert!(refused(decision(9, 200, 300, DecisionKind::Stop)).contains("by decision 4"));
    assert!(refused(decision(9, 150, 158, rate(0.5))).contains("contradicts decision 5"));
    for factor in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(refused(decision(9, 150, 168, rate(factor))).contains("factor"));
    }
    assert!(refused(veto(9, 208, 1)).contains("not in force any more"));
    assert!(refused(veto(9, 208, 3)).contains("none that sets"));
    assert!(refused(veto(9, 208, 77)).contains("none that sets"));
    assert!(refused(veto(9, 258, 4)).contains("a veto of now from step 258"));
    assert!(refused(decision(9, 200, 208, back(200, &discarded))).contains("not before line 200"));
    assert!(refused(decision(9, 200, 208, back(100, &discarded[..1]))).contains("1 domains"));
    let bounds = SpikeBounds {
        expected: vec![Some(2.0), None],
        residual_loss: f64::INFINITY,
        grad_norm: 1.0,
    };
    assert!(refused(decision(9, 200, 208, DecisionKind::SpikeBounds(bounds))).contains("inf is no bound"));
    course.adopt(&veto(10, 208, 4)).unwrap();
    assert_eq!(course.stop(), None);
    assert!(course.adopt(&veto(11, 208, 4)).unwrap_err().contains("vetoed already"));
    course.adopt(&decision(12, 200, 208, back(100, &discarded))).unwrap();
    assert_eq!(course.directives(StepIndex(208)).rollback_to, Some(StepsCompleted(100)));
    assert_eq!(course.directives(StepIndex(209)).rollback_to, None);
    let rates = [157, 158].map(|step| course.directives(StepIndex(step)).rate_factor);
    assert_eq!(rates, [1.0, 0.5]);
}

/// Nobody can go back to what an earlier rollback has left behind; to the same state again, or further, everybody can.
#[test]
fn a_rollback_goes_back_to_a_state_that_stands() {
    let mut course = course();
    let back = |id: u64, line: u64, to: u64| {
        let kind = DecisionKind::Rollback {
            to: StepsCompleted(to),
            discarded: vec![DiscardedSamples { first: 0, count: 1 }; 2],
        };
        decision(id, line, line + 8, kind)
    };
    course.adopt(&back(1, 200, 100)).unwrap();
    for dead in [101, 208] {
        let reason = course.clone().adopt(&back(2, 250, dead)).unwrap_err();
        assert!(reason.contains("left behind"), "{reason}");
    }
    for live in [0, 60, 100, 209] {
        course.clone().adopt(&back(2, 250, live)).unwrap();
    }
}

/// A step is judged by what was expected of its own domains: the dear domain alone is no spike, a raised loss is one.
#[test]
fn bounds_judge_the_residual_and_the_norm() {
    let directives = Directives {
        bounds: Some(SpikeBounds {
            expected: vec![Some(1.0), Some(6.0), None],
            residual_loss: 0.5,
            grad_norm: 3.0,
        }),
        ..Directives::default()
    };
    let losses = |cheap: (f64, u64), dear: (f64, u64), new: (f64, u64)| {
        [cheap, dear, new].map(|(mean, tokens)| LossSum {
            loss_sum: mean * tokens as f64,
            tokens,
        })
    };
    assert!(!directives.skips(&losses((1.0, 0), (6.2, 100), (0.0, 0)), 1.0));
    assert!(directives.skips(&losses((1.6, 100), (0.0, 0), (0.0, 0)), 1.0));
    assert!(
        !directives.skips(&losses((1.6, 50), (6.0, 50), (0.0, 0)), 1.0),
        "over the whole batch"
    );
    assert!(
        !directives.skips(&losses((1.0, 50), (0.0, 0), (9.0, 50)), 1.0),
        "nothing is expected of it"
    );
    assert!(directives.skips(&losses((1.0, 50), (0.0, 0), (0.0, 0)), 3.1));
    assert!(!Directives::default().skips(&losses((99.0, 50), (0.0, 0), (0.0, 0)), 1e9));
}
