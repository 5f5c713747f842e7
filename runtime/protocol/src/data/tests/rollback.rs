//! Roll back and skip, as it is decided: by the policy behind a notice, and by persons.

use super::controllers::{ask, check_replay, raise, with};
use super::*;
use crate::data::controller::Request;
use crate::data::course::Course;
use crate::data::decision::{DataChange, DiscardedSamples, DomainEdition};
use crate::rollback::{Rollbacks, announced};
use proptest::prelude::*;
use tarazed_domain::config::SpikePolicy;

fn diverging(notice_steps: u64) -> LoopConfig {
    let mut config = mixture_loop(&with(ControllerKind::Ado));
    config.policy.spikes = SpikePolicy::RollbackAndSkip;
    config.policy.rollback_grain_steps = 50;
    config.policy.rollback_notice_steps = notice_steps;
    config
}

/// A loss that rises from line 600 on and is down again behind line 658. A spike of one line, at 400, is none.
fn run(world: &mut World, lines: std::ops::RangeInclusive<u64>) {
    for step in lines {
        world.step(|line| match step {
            400 => raise(line, 2.0),
            600..=658 => raise(line, 0.02 * (step - 590) as f64),
            _ => (),
        });
    }
}

/// The same, where it stays up.
fn run_and_stay_up(world: &mut World, lines: std::ops::RangeInclusive<u64>) {
    for step in lines {
        world.step(|line| {
            if step >= 600 {
                raise(line, 0.02 * (step.min(658) - 590) as f64);
            }
        });
    }
}

/// Notices and rollbacks of the trace.
fn backs(world: &World) -> Vec<Decision> {
    let is_back = |decision: &&&Decision| {
        matches!(
            decision.kind,
            DecisionKind::Rollback { .. } | DecisionKind::RollbackNotice { .. }
        )
    };
    world.mixtures().iter().filter(is_back).copied().cloned().collect()
}

const fn to_of(decision: &Decision) -> Option<StepsCompleted> {
    match decision.kind {
        DecisionKind::Rollback { to, .. } | DecisionKind::RollbackNotice { to } => Some(to),
        _ => None,
    }
}

fn discarded(decision: &Decision) -> Vec<DiscardedSamples> {
    match &decision.kind {
        DecisionKind::Rollback { discarded, .. } => discarded.clone(),
        other => panic!("{other:?}"),
    }
}

/// A decision by its line, the state gone back to and the step at which that happens.
fn places(decision: &Decision) -> (u64, Option<u64>, u64) {
    (decision.line.0, to_of(decision).map(|to| to.0), decision.effective.0)
}

/// What these lines drew, counted line by line.
fn used(world: &World, lines: std::ops::Range<usize>) -> Vec<u64> {
    let mut used = vec![0_u64; world.laws.len()];
    for line in &world.lines[lines] {
        for (used, (_, seen)) in used.iter_mut().zip(line.domains.iter()) {
            *used += seen.tokens / CONTEXT_TOKENS;
        }
    }
    used
}

fn counts(decision: &Decision) -> Vec<u64> {
    discarded(decision).iter().map(|samples| samples.count).collect()
}

fn veto(decision: &Decision) -> Request {
    ask(DecisionKind::Veto { decision: decision.id })
}

fn back_to(to: u64, not_before: Option<u64>) -> Request {
    let kind = DecisionKind::Rollback {
        to: StepsCompleted(to),
        discarded: Vec::new(),
    };
    Request {
        not_before: not_before.map(StepIndex),
        ..ask(kind)
    }
}

/// A loss that rises and stays up is answered by going back behind it, once, with the samples since named. Without notice at
/// once.
#[test]
fn a_divergence_is_rolled_back() {
    let config = diverging(0);
    let mut world = World::of(laws(), &config);
    run(&mut world, 1..=1000);
    let back = backs(&world);
    assert_eq!(back.iter().map(places).collect::<Vec<_>>(), [(650, Some(500), 658)]);
    assert_eq!(counts(&back[0]), used(&world, 500..658));
    assert_eq!(counts(&back[0]).iter().sum::<u64>(), 158 * 32);
    check_replay(&world, &config);
    // Whoever changes what is discarded is found out.
    let mut cursor = DataCursor::new(world.cursor.recipe().clone(), *world.cursor.ledger().schedule()).unwrap();
    let mut refused = None;
    for line in &mut world.lines {
        for decision in &mut line.decisions {
            if let DecisionKind::Rollback { discarded, .. } = &mut decision.kind {
                discarded[1].first += 1;
            }
        }
        refused = refused.or(cursor.record(line.step, &line.decisions).err());
        if refused.is_some() {
            break;
        }
    }
    assert!(refused.unwrap().to_string().contains("does not discard"));
}

/// LOOP-2: with a notice it is decided at the point that the notice names, whatever the loss does meanwhile.
#[test]
fn a_rollback_is_announced_and_then_decided() {
    for (notice_steps, line) in [(1, 700), (50, 700), (51, 750), (200, 850)] {
        let config = diverging(notice_steps);
        let mut world = World::of(laws(), &config);
        run(&mut world, 1..=1100);
        let back = backs(&world);
        let at = line + 8;
        assert_eq!(
            back.iter().map(places).collect::<Vec<_>>(),
            [(650, Some(500), at), (line, Some(500), at)]
        );
        assert_eq!(back[1].reason, format!("announced by decision {}", back[0].id));
        assert!(back[0].reason.contains("diverged since"), "{}", back[0].reason);
        assert_eq!(counts(&back[1]), used(&world, 500..at as usize));
        assert_eq!(world.ate.course().rollbacks_of_its_own(), 1);
        assert_eq!(world.ate.course().notice(), None);
        check_replay(&world, &config);
    }
}

/// LOOP-2: a veto that stands no later than the line of the decision takes it back for good: the run does not ask again while
/// what it compares is of that time.
#[test]
fn a_veto_in_time_takes_the_notice_back() {
    let config = diverging(100);
    for asked_on in [650, 699, 700, 749] {
        let mut world = World::of(laws(), &config);
        run_and_stay_up(&mut world, 1..=asked_on);
        let notice = backs(&world)[0].clone();
        assert_eq!(places(&notice), (650, Some(500), 758));
        world.ate.request(veto(&notice)).unwrap();
        run_and_stay_up(&mut world, asked_on + 1..=1400);
        assert_eq!(backs(&world), [notice]);
        assert_eq!(world.ate.course().rollbacks(), Rollbacks::default());
        check_replay(&world, &config);
    }
}

/// A veto that comes later is refused with the reason, of the notice as of the rollback.
#[test]
fn a_veto_too_late_is_refused() {
    let config = diverging(50);
    let mut world = World::of(laws(), &config);
    run(&mut world, 1..=700);
    let back = backs(&world);
    let refusal = |world: &mut World, of: &Decision| world.ate.request(veto(of)).unwrap_err().to_string();
    let late = refusal(&mut world, &back[0]);
    assert!(late.contains("announced for step 708 is decided"), "{late}");
    let late = refusal(&mut world, &back[1]);
    assert!(
        late.contains("acts at step 708, and a veto of now from step 758 on"),
        "{late}"
    );
    run(&mut world, 701..=1000);
    assert_eq!(backs(&world), back);
    check_replay(&world, &config);
}

/// A person's own rollback takes the place of one that is announced; it counts for no limit of the policy.
#[test]
fn a_person_goes_first() {
    let config = diverging(50);
    let mut world = World::of(laws(), &config);
    run(&mut world, 1..=650);
    let notice = backs(&world)[0].clone();
    let (line, at) = world.ate.request(back_to(300, None)).unwrap();
    assert_eq!((line, at), (StepsCompleted(700), StepIndex(708)));
    run(&mut world, 651..=1000);
    let back = backs(&world);
    assert_eq!(back.len(), 2, "{back:?}");
    assert_eq!((&back[0], places(&back[1])), (&notice, (700, Some(300), 708)));
    assert_eq!(counts(&back[1]), used(&world, 300..708));
    assert_eq!(world.ate.course().rollbacks_of_its_own(), 0);
    check_replay(&world, &config);
    let late = world.ate.request(veto(&notice)).unwrap_err().to_string();
    assert!(late.contains("or another in its place"), "{late}");
}

/// A person's rollback waits for the decision point that is just before its step; what cannot be gone back to is refused.
#[test]
fn a_person_rolls_the_run_back() {
    let mut config = mixture_loop(&with(ControllerKind::Ado));
    config.policy.persons = true;
    let mut world = World::of(laws(), &config);
    world.run(420);
    let refusal = |world: &mut World, request: Request| world.ate.request(request).unwrap_err().to_string();
    assert!(refusal(&mut world, back_to(450, None)).contains("not before line 450"));
    let told = world.ate.request(back_to(200, Some(640))).unwrap();
    assert_eq!(told, (StepsCompleted(650), StepIndex(658)));
    assert!(refusal(&mut world, back_to(100, None)).contains("training goes back at step 658 already"));
    let unknown = ask(DecisionKind::Veto {
        decision: DecisionId(1_000_000),
    });
    assert!(refusal(&mut world, unknown).contains("not decided yet"));
    let notice = DecisionKind::RollbackNotice { to: StepsCompleted(1) };
    assert!(refusal(&mut world, ask(notice)).contains("only the run itself"));
    world.run(300);
    let back = backs(&world);
    assert_eq!(back.iter().map(places).collect::<Vec<_>>(), [(650, Some(200), 658)]);
    assert_eq!(counts(&back[0]), used(&world, 200..658));
    assert!(refusal(&mut world, back_to(400, None)).contains("left behind"));
    world.ate.request(back_to(0, None)).unwrap();
    world.run(100);
    assert_eq!(places(&backs(&world)[1]), (750, Some(0), 758));
    check_replay(&world, &config);
}

/// What a rollback discards speaks of the domains of its step, so these are not changed behind it.
#[test]
fn data_do_not_change_before_a_rollback_that_is_decided() {
    let decision = |id: u64, line: u64, effective: u64, kind: DecisionKind| Decision {
        kind,
        ..mixture_decision(id, line, effective, &[])
    };
    let back = DecisionKind::Rollback {
        to: StepsCompleted(100),
        discarded: vec![DiscardedSamples { first: 0, count: 1 }; 2],
    };
    let arrival = DecisionKind::Data(DataChange {
        version: "a".repeat(64),
        domains: vec![DomainEdition {
            name: "late".into(),
            domain: 2,
            index: 0,
            language: "en".into(),
            train_sequences: 10,
            train_tokens: 1000,
        }],
        weights: vec![1.0; 3],
    });
    let mut course = Course::new(vec![0.5, 0.5]);
    course.adopt(&decision(1, 200, 208, back)).unwrap();
    let refused = course.adopt(&decision(2, 200, 208, arrival.clone())).unwrap_err();
    assert!(refused.contains("goes back at step 208"), "{refused}");
    course.adopt(&decision(2, 200, 209, arrival)).unwrap();
}

#[derive(Clone, Debug)]
enum Act {
    Back(prop::sample::Index, Option<u64>),
    VetoNewest,
    Veto(prop::sample::Index),
    Rate(f64),
    Mixture(Vec<f64>),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (any::<prop::sample::Index>(), prop::option::of(0_u64..200)).prop_map(|(to, later)| Act::Back(to, later)),
        2 => Just(Act::VetoNewest),
        1 => any::<prop::sample::Index>().prop_map(Act::Veto),
        1 => (0.5_f64..2.0).prop_map(Act::Rate),
        1 => prop::collection::vec(0.1_f64..1.0, 3).prop_map(Act::Mixture),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// LOOP-1, LOOP-2, DATA-1: whatever persons ask for and whenever, in a run whose policy rolls back with any notice: what is
    /// granted stands, nothing that is granted stops the run, the trace alone leads to the same decisions again, and each
    /// rollback goes back to a state that is live when it acts.
    #[test]
    fn whatever_persons_ask_for_the_trace_leads_there_again(
        notice_steps in prop_oneof![Just(0_u64), 1_u64..200],
        raised_from in 250_u64..500,
        acts in prop::collection::vec((1_u64..80, act()), 0..12),
    ) {
        let config = diverging(notice_steps);
        let mut world = World::of(laws(), &config);
        let mut due = 150_u64;
        let mut acts = acts.into_iter().map(|(gap, act)| { due += gap; (due, act) }).peekable();
        for step in 1..=900_u64 {
            world.step(|line| if step >= raised_from { raise(line, 0.02 * (step - raised_from).min(100) as f64) });
            while let Some((_, act)) = acts.next_if(|(at, _)| *at <= step) {
                let kinds: Vec<Decision> = world.mixtures().into_iter().cloned().collect();
                let request = match act {
                    Act::Back(to, later) => back_to(to.index(step as usize) as u64, later.map(|later| step + later)),
                    Act::VetoNewest => match backs(&world).last() { Some(newest) => veto(newest), None => continue },
                    Act::Veto(which) if kinds.is_empty() => { let _ = which; continue }
                    Act::Veto(which) => veto(&kinds[which.index(kinds.len())]),
                    Act::Rate(factor) => ask(DecisionKind::LearningRate { factor }),
                    Act::Mixture(weights) => ask(DecisionKind::Mixture { weights }),
                };
                // Refused with a reason, or granted.
                let _ = world.ate.request(request);
            }
        }
        check_replay(&world, &config);
        let decisions: Vec<Decision> = world.mixtures().into_iter().cloned().collect();
        let all = Rollbacks::of(&decisions);
        prop_assert_eq!(&all, &world.ate.course().rollbacks());
        let notice = world.ate.course().notice().map(|notice| notice.by);
        prop_assert_eq!(announced(&decisions).map(|decision| decision.id), notice);
        for back in backs(&world) {
            let acts = |acted: &Rollbacks| acted.acting_at(StepsCompleted(back.effective.0)).is_some();
            if matches!(back.kind, DecisionKind::Rollback { .. }) && acts(&all) {
                let before = all.acted(StepsCompleted(back.effective.0 - 1));
                prop_assert!(before.is_live(to_of(&back).unwrap()));
            }
        }
    }
}
