use super::*;
use crate::data::decision::{DecisionLedger, LedgerError};
use proptest::prelude::*;

fn ledger() -> DecisionLedger {
    DecisionLedger::new(points(&ado()), vec![0.5, 0.5])
}

fn reason(outcome: Result<bool, LedgerError>) -> String {
    outcome.unwrap_err().to_string()
}

#[test]
fn what_breaks_the_rules_is_refused_and_nothing_of_it_stays() {
    let at = |line: u64| StepsCompleted(line);
    let good = mixture_decision(1, 100, 108, &[0.5, 0.5]);
    let refused = |line: u64, decisions: &[Decision]| {
        let mut ledger = ledger();
        let before = ledger.clone();
        let text = reason(ledger.record(at(line), decisions));
        assert_eq!(ledger, before);
        text
    };
    assert!(refused(60, &[mixture_decision(1, 60, 108, &[0.5, 0.5])]).contains("not a decision point"));
    assert!(refused(50, &[mixture_decision(1, 50, 108, &[0.5, 0.5])]).contains("not a decision point"));
    assert!(refused(100, &[mixture_decision(1, 150, 158, &[0.5, 0.5])]).contains("belongs to line 150"));
    assert!(refused(100, &[mixture_decision(1, 100, 107, &[0.5, 0.5])]).contains("late"));
    assert!(refused(100, &[mixture_decision(1, 100, 108, &[0.5])]).contains("1 weights for 2 domains"));
    assert!(refused(100, &[mixture_decision(1, 100, 108, &[-0.5, 1.5])]).contains("-0.5"));
    assert!(refused(100, &[mixture_decision(1, 100, 108, &[f64::NAN, 1.0])]).contains("NaN"));
    assert!(refused(100, &[mixture_decision(1, 100, 108, &[0.0, 0.0])]).contains("sum to 0"));
    assert!(refused(100, &[good.clone(), mixture_decision(1, 100, 120, &[0.5, 0.5])]).contains("came before"));
    assert!(
        refused(100, &[good.clone(), mixture_decision(2, 100, 108, &[0.4, 0.6])]).contains("contradicts decision 1")
    );
    assert!(refused(150, &[]).contains("record line 100 first"));

    let mut ledger = ledger();
    assert_eq!(
        ledger.record(at(100), &[mixture_decision(1, 100, 158, &[0.5, 0.5])]),
        Ok(true)
    );
    let late_twin = mixture_decision(2, 150, 158, &[0.4, 0.6]);
    assert!(reason(ledger.record(at(150), &[late_twin])).contains("contradicts decision 1"));
    assert_eq!(
        ledger.record(at(150), &[mixture_decision(2, 150, 160, &[0.4, 0.6])]),
        Ok(true)
    );
    assert_eq!(ledger.decisions().len(), 2);
}

/// The same outcome may come again; another one for the same line may not.
#[test]
fn redelivery_is_harmless_and_contradiction_is_not() {
    let mut ledger = ledger();
    let outcome = [mixture_decision(1, 100, 108, &[0.5, 0.5])];
    assert_eq!(ledger.record(StepsCompleted(100), &outcome), Ok(true));
    assert_eq!(ledger.record(StepsCompleted(120), &[]), Ok(true));
    assert_eq!(ledger.record(StepsCompleted(100), &outcome), Ok(false));
    assert_eq!(ledger.record(StepsCompleted(110), &[]), Ok(false));
    let conflict = Err(LedgerError::Conflict {
        line: StepsCompleted(100),
    });
    assert_eq!(ledger.record(StepsCompleted(100), &[]), conflict);
    assert_eq!(
        ledger.record(StepsCompleted(100), &[mixture_decision(1, 100, 108, &[0.4, 0.6])]),
        conflict
    );
}

proptest! {
    /// STEP-6: `needs` names exactly the newest point whose decisions may act on the step.
    #[test]
    fn needs_is_the_newest_point_that_can_act(start in 0_u64..40, interval in 1_u64..20, lag in 1_u64..40, step in 0_u64..200) {
        let schedule = points(&MixtureConfig {
            controller: ControllerKind::Ado, start_steps: start, interval_steps: interval, lag_steps: lag,
            ..MixtureConfig::default()
        });
        let newest = (1..=step)
            .filter(|line| line % interval == 0 && *line >= start && line + lag <= step)
            .max()
            .unwrap_or(0);
        prop_assert_eq!(schedule.needs(StepIndex(step)), StepsCompleted(newest));
        let next = (step + 1..).find(|line| schedule.is_point(StepsCompleted(*line))).unwrap();
        prop_assert_eq!(schedule.next_point(StepsCompleted(step)), Some(StepsCompleted(next)));
    }

    /// DATA-2: a ledger rebuilt from the list of its decisions is the ledger.
    #[test]
    fn rebuilt_ledgers_are_equal(points in prop::collection::vec(any::<bool>(), 1..20), beyond in 0_u64..49) {
        let mut ledger = ledger();
        let mut id = 0;
        let mut line = 50;
        for decides in points {
            line += 50;
            let outcome: Vec<Decision> = decides.then(|| {
                id += 1;
                mixture_decision(id, line, line + 8, &[0.5, 0.5])
            }).into_iter().collect();
            ledger.record(StepsCompleted(line), &outcome).unwrap();
        }
        if beyond > 0 {
            ledger.record(StepsCompleted(line + beyond), &[]).unwrap();
        }
        let rebuilt =
            DecisionLedger::rebuild(*ledger.schedule(), vec![0.5, 0.5], ledger.recorded(), ledger.decisions()).unwrap();
        prop_assert_eq!(rebuilt, ledger);
    }
}

/// A decision travels as text and as rkyv without a change.
#[test]
fn decisions_travel_unchanged() {
    let mut decision = mixture_decision(3, 100, 108, &[0.1, 0.2 + 0.1]);
    for kind in [decision.kind.clone(), DecisionKind::Pin, DecisionKind::Release] {
        decision.kind = kind;
        let text = serde_json::to_string(&decision).unwrap();
        assert_eq!(serde_json::from_str::<Decision>(&text).unwrap(), decision);
        let bytes = rkyv::to_bytes::<rkyv::rancor::Error>(&decision).unwrap();
        assert_eq!(
            rkyv::from_bytes::<Decision, rkyv::rancor::Error>(&bytes).unwrap(),
            decision
        );
    }
    assert!(serde_json::from_str::<Decision>(r#"{"id":1,"line":2,"effective":3,"kind":"halt"}"#).is_err());
}

/// Ranks are told what acts on a step of theirs, and their ledgers make the same of it.
#[test]
fn ranks_are_told_what_acts() {
    use crate::data::decision::{SpikeBounds, for_ranks, stop_of};
    let of = |id: u64, line: u64, kind: DecisionKind| Decision {
        kind,
        ..mixture_decision(id, line, line + 8, &[])
    };
    let bounds = |grad_norm: f64| {
        DecisionKind::SpikeBounds(SpikeBounds {
            expected: vec![None, None],
            residual_loss: 1.0,
            grad_norm,
        })
    };
    let advice = DecisionKind::Advice {
        weights: vec![0.4, 0.6],
    };
    let veto = |id| DecisionKind::Veto {
        decision: DecisionId(id),
    };
    let all = [
        of(1, 100, bounds(1.0)),
        of(2, 100, advice),
        of(3, 150, bounds(2.0)),
        of(4, 150, DecisionKind::Stop),
        of(5, 200, bounds(3.0)),
        mixture_decision(6, 250, 258, &[0.5, 0.5]),
        of(7, 250, bounds(4.0)),
    ];
    let told = |base: u64| -> Vec<u64> {
        let told = for_ranks(&all, StepsCompleted(base));
        assert!(told.iter().all(|decision| decision.reason.is_empty()));
        told.iter().map(|decision| decision.id.0).collect()
    };
    assert_eq!(told(0), [1, 3, 4, 5, 6, 7]);
    assert_eq!(told(158), [1, 3, 4, 5, 6, 7], "a veto of 3 would bring back 1");
    assert_eq!(told(207), [1, 3, 4, 5, 6, 7], "in force until step 208");
    assert_eq!(told(1000), [4, 5, 6, 7]);
    let full = DecisionLedger::rebuild(points(&ado()), vec![0.5, 0.5], StepsCompleted(300), &all).unwrap();
    for base in [0, 158, 207, 208, 260, 1000] {
        let told = for_ranks(&all, StepsCompleted(base));
        let short = DecisionLedger::rebuild(points(&ado()), vec![0.5, 0.5], StepsCompleted(300), &told).unwrap();
        for step in (base..base + 300).map(StepIndex) {
            assert_eq!(short.course().directives(step), full.course().directives(step));
            assert_eq!(short.course().mixture(step), full.course().mixture(step));
        }
    }
    assert_eq!(stop_of(&all), Some(StepIndex(158)));
    let back: Vec<Decision> = all.iter().cloned().chain([of(8, 300, veto(7))]).collect();
    let told: Vec<u64> = for_ranks(&back, StepsCompleted(1000))
        .iter()
        .map(|decision| decision.id.0)
        .collect();
    assert_eq!(
        told,
        [3, 4, 5, 6, 7, 8],
        "5 is in force again, and 3 would be after a veto of it"
    );
    let vetoed: Vec<Decision> = all[..4].iter().cloned().chain([of(5, 150, veto(4))]).collect();
    assert_eq!(stop_of(&vetoed), None);
}

/// What people are told of the end: decided stops, those that are due, and none that was vetoed.
#[test]
fn the_end_is_expected_where_it_will_be() {
    use crate::data::decision::expected_end;
    let of = |id: u64, line: u64, effective: u64, kind: DecisionKind| Decision {
        kind,
        by: DecisionAuthor::Controller("stop".to_owned()),
        ..mixture_decision(id, line, effective, &[])
    };
    let person = |decision: Decision| Decision {
        by: DecisionAuthor::Person("ada".to_owned()),
        ..decision
    };
    let veto = |id: u64, line: u64, which: u64| {
        let decision = DecisionId(which);
        person(of(id, line, line + 8, DecisionKind::Veto { decision }))
    };
    let end =
        |decisions: &[Decision], at: Option<u64>| expected_end(decisions, at.map(StepIndex), StepsCompleted(500)).0;
    assert_eq!(
        (end(&[], None), end(&[], Some(300)), end(&[], Some(900))),
        (500, 300, 500)
    );
    let stop = of(1, 250, 300, DecisionKind::Stop);
    assert_eq!(end(std::slice::from_ref(&stop), Some(300)), 300);
    let vetoed = [stop, veto(2, 260, 1)];
    assert_eq!(end(&vetoed, Some(300)), 500, "it is not decided again");
    // A person's stop that was vetoed, or an earlier one by the loss, leaves the one for the tokens.
    let early = [of(1, 50, 66, DecisionKind::Stop), veto(2, 52, 1)];
    assert_eq!((end(&early[..1], Some(300)), end(&early, Some(300))), (66, 300));
    let by_person = [person(of(1, 50, 400, DecisionKind::Stop)), veto(2, 60, 1)];
    assert_eq!((end(&by_person[..1], None), end(&by_person, Some(300))), (400, 300));
}

proptest! {
    /// DET-1, LOOP-1: a rank that begins anywhere, from what it is told there, and hears what is decided later as all others
    /// do, knows of every step of its own what they know.
    #[test]
    fn whoever_begins_later_knows_the_same(
        acts in prop::collection::vec((any::<bool>(), prop::option::of(0_usize..6)), 1..14),
        known in any::<prop::sample::Index>(),
        begins in any::<prop::sample::Index>(),
    ) {
        use crate::data::decision::{SpikeBounds, for_ranks};
        let mut full = ledger();
        let mut lines: Vec<(StepsCompleted, Vec<Decision>)> = Vec::new();
        let mut id = 0;
        for (line, (sets, vetoes)) in (2..).map(|point| point * 50).zip(acts) {
            let mut made = Vec::new();
            let mut kinds = Vec::new();
            if let Some(back) = vetoes {
                let bounds = full.decisions().iter().rev().filter(|d| matches!(d.kind, DecisionKind::SpikeBounds(_)));
                kinds.extend(bounds.map(|d| DecisionKind::Veto { decision: d.id }).nth(back));
            }
            if sets {
                kinds.push(DecisionKind::SpikeBounds(SpikeBounds {
                    expected: vec![None, None],
                    residual_loss: 1.0,
                    grad_norm: line as f64,
                }));
            }
            for kind in kinds {
                id += 1;
                let decision = Decision { kind, ..mixture_decision(id, line, line + 8, &[]) };
                let mut with: Vec<Decision> = made.clone();
                with.push(decision);
                // What the engine would not decide, because it contradicts, is left out.
                if full.clone().record(StepsCompleted(line), &with).is_ok() {
                    made = with;
                }
            }
            full.record(StepsCompleted(line), &made).unwrap();
            lines.push((StepsCompleted(line), made));
        }
        let (first, later) = lines.split_at(known.index(lines.len() + 1));
        let decided = first.last().map_or(StepsCompleted(0), |(line, _)| *line);
        let base = StepsCompleted(begins.index(decided.0 as usize + 1) as u64);
        let so_far: Vec<Decision> = first.iter().flat_map(|(_, made)| made.clone()).collect();
        let told = for_ranks(&so_far, base);
        let mut rank = DecisionLedger::rebuild(points(&ado()), vec![0.5, 0.5], decided, &told).unwrap();
        for (line, made) in later {
            rank.record(*line, made).unwrap();
        }
        for step in (base.0..1000).map(StepIndex) {
            prop_assert_eq!(rank.course().directives(step), full.course().directives(step), "step {}", step);
        }
    }
}
