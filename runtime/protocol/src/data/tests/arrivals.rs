//! Data that enter a run whose mixture a controller adapts.

use super::*;
use crate::data::controller::{EPOCHS_MAX, LN_CHANGE_MAX, PLANNER, Request, planned, weight_floor};
use crate::data::course::Course;
use crate::data::decision::{DataChange, DomainEdition};
use proptest::prelude::*;

const ADAPTIVE: [ControllerKind; 3] = [ControllerKind::Ado, ControllerKind::Odm, ControllerKind::Excess];
/// Sequences of the domain that comes: much of the run's text.
const LATE_SEQUENCES: u64 = 400_000;

fn config(controller: ControllerKind, shadow: &[ControllerKind]) -> LoopConfig {
    mixture_loop(&MixtureConfig {
        controller,
        start_steps: 40,
        interval_steps: 20,
        lag_steps: 4,
        shadow: shadow.to_vec(),
        ..MixtureConfig::default()
    })
}

fn edition(name: &str, domain: u16, train_sequences: u64) -> DomainEdition {
    DomainEdition {
        name: name.to_owned(),
        domain,
        index: 0,
        language: "en".to_owned(),
        train_sequences,
        train_tokens: train_sequences * CONTEXT_TOKENS,
    }
}

fn change(domains: &[DomainEdition], weights: &[f64]) -> DataChange {
    DataChange {
        version: format!("{:064x}", 7),
        domains: domains.to_vec(),
        weights: weights.to_vec(),
    }
}

fn late(weights: &[f64]) -> DataChange {
    change(&[edition("late", 3, LATE_SEQUENCES)], weights)
}

fn ask(change: DataChange, at: u64) -> Request {
    Request {
        person: "ada".into(),
        kind: DecisionKind::Data(change),
        not_before: Some(StepIndex(at)),
        reason: "a test".into(),
    }
}

/// A domain whose loss falls fast when it comes.
fn late_law() -> Law {
    law("late", 0.0, LATE_SEQUENCES, 1.0, 25.0, 0.25)
}

fn world(config: &LoopConfig) -> World {
    let mut world = World::of(laws(), config);
    world.evaluation_interval_steps = 10;
    world
}

/// Runs to `steps`; the domain that comes is there from step `at` on.
fn through(world: &mut World, at: u64, steps: u64) {
    let now = world.lines.len() as u64;
    world.run(at.saturating_sub(now));
    if now <= at {
        world.laws.push(late_law());
        world.grow();
    }
    world.run(steps - world.lines.len() as u64);
}

/// A run in which the domain comes as planned.
fn planned_run(mut config: LoopConfig, weights: &[f64], at: u64, steps: u64) -> (LoopConfig, World) {
    config.planned = vec![(StepIndex(at), late(weights))];
    let mut world = world(&config);
    through(&mut world, at, steps);
    (config, world)
}

fn shares(line: &TraceLine) -> Vec<f64> {
    line.mixture.iter().map(|(_, share)| *share).collect()
}

/// LOOP-1: engine, signals and cursor as of the first `prefix` lines, made from their print alone; then each line again, by
/// what was measured and what persons decided.
fn replays_from(world: &World, config: &LoopConfig, prefix: usize) {
    let facts = facts(&laws());
    let (mut tsm, mut ate) = (Tsm::new(facts.clone()), Ate::new(config, &facts));
    let schedule = DecisionSchedule::new(&config.mixture, &config.policy);
    let mut cursor = DataCursor::new(world.cursor.recipe().clone(), schedule).unwrap();
    for (at, line) in world.lines.iter().enumerate() {
        let line = TraceLine::parse(&line.print(), 1).unwrap();
        let signals = tsm.on_line(&line).unwrap();
        if at < prefix {
            ate.replay(&line, &signals).unwrap();
        } else {
            let plan = cursor.plan(StepIndex(at as u64)).unwrap();
            assert_eq!(
                (plan.digest, &plan.mixture),
                (line.data, &shares(&line)),
                "line {}",
                line.step
            );
            let mut measured = line.clone();
            measured.decisions.retain(|decision| decision.by.is_person());
            assert_eq!(ate.on_line(&measured, &signals), line.decisions, "line {}", line.step);
        }
        cursor.record(line.step, &line.decisions).unwrap();
        tsm.learn(&line.decisions);
    }
    // What is planned is in force from the start: a ledger hears of it in the first point's line.
    if world.lines.len() >= 40 {
        assert_eq!(ate.course(), cursor.ledger().course());
    }
}

/// The guards, at every decision of the controller that is followed.
fn keeps_the_guards(world: &World, at: u64) {
    for line in &world.lines {
        let current = shares(line);
        assert!((current.iter().sum::<f64>() - 1.0).abs() < 1e-9, "line {}", line.step);
        assert_eq!(
            current.len(),
            if line.step.0 > at { 4 } else { 3 },
            "line {}",
            line.step
        );
    }
    for decision in world.mixtures() {
        let DecisionKind::Mixture { weights } = &decision.kind else {
            continue;
        };
        assert_ne!(
            decision.effective,
            StepIndex(at),
            "that step has the mixture of its change"
        );
        let Some(before) = world.lines.get(decision.effective.0 as usize - 1) else {
            continue;
        };
        let before = shares(before);
        assert_eq!(before.len(), weights.len());
        let floor = weight_floor(weights.len());
        for (new, old) in weights.iter().zip(&before) {
            assert!(*new >= floor.min(old * 1.2) - 2e-6, "{before:?} -> {weights:?}");
            assert!(
                (new / old).ln().abs() <= LN_CHANGE_MAX + 1e-4,
                "{before:?} -> {weights:?}"
            );
        }
    }
}

fn kinds() -> impl Strategy<Value = (ControllerKind, Vec<ControllerKind>)> {
    (0..3_usize, any::<bool>()).prop_map(|(which, advised)| {
        let others = ADAPTIVE.into_iter().filter(|kind| *kind != ADAPTIVE[which]);
        (ADAPTIVE[which], if advised { others.collect() } else { Vec::new() })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A domain that comes leaves the past alone, comes with its share, and is inside the guards from its first step on; and
    /// whoever begins at any line decides the same from there (LOOP-1, DATA-2).
    #[test]
    fn a_domain_comes_under_any_controller(
        (kind, shadow) in kinds(),
        share in prop::option::of(0.001_f64..0.6),
        at in 44_u64..200,
        prefix in 0_usize..300,
    ) {
        let without = {
            let mut world = world(&config(kind, &shadow));
            world.run(at);
            world
        };
        let weights: Vec<f64> = share.into_iter().collect();
        let (config, world) = planned_run(config(kind, &shadow), &weights, at, 300);
        for (line, same) in world.lines.iter().zip(&without.lines) {
            prop_assert_eq!((line.data, &line.mixture, line.loss), (same.data, &same.mixture, same.loss));
        }
        let (before, after) = (shares(&world.lines[at as usize - 1]), shares(&world.lines[at as usize]));
        let supply = EPOCHS_MAX * (LATE_SEQUENCES * CONTEXT_TOKENS) as f64 / config.tokens_before(StepIndex(at)) as f64;
        let floor = weight_floor(4);
        let natural = 4.0 / 20.0; // of 1,600,000 sequences before
        let expected = share.unwrap_or(natural).clamp(floor, supply.max(floor)).min(1.0 - 3.0 * floor);
        prop_assert!((after[3] - expected).abs() < 1e-12, "{} is not {}", after[3], expected);
        for (new, old) in after.iter().zip(&before) {
            prop_assert!((new - old * (1.0 - expected)).abs() < 1e-12, "the others keep their proportions");
        }
        keeps_the_guards(&world, at);
        replays_from(&world, &config, prefix);
    }

    /// The same where a person asks while the run goes on, with a share or with a whole mixture, far ahead or at once.
    #[test]
    fn a_person_brings_a_domain_under_any_controller(
        (kind, shadow) in kinds(),
        asked in 0_u64..150,
        ahead in 0_u64..100,
        is_whole: bool,
        prefix in 0_usize..300,
    ) {
        let config = config(kind, &shadow);
        let mut world = world(&config);
        world.run(asked);
        let at = (asked.max(20) / 20 + 1) * 20 + 4 + ahead;
        let weights: &[f64] = if is_whole { &[3.0, 1.0, 2.0, 2.0] } else { &[0.15] };
        prop_assert_eq!(world.ate.request(ask(late(weights), at)).unwrap().1, StepIndex(at));
        through(&mut world, at, 300);
        let after = shares(&world.lines[at as usize]);
        prop_assert!((after[3] - if is_whole { 0.25 } else { 0.15 }).abs() < 1e-12, "{:?}", after);
        keeps_the_guards(&world, at);
        replays_from(&world, &config, prefix);
    }
}

/// Shares that are too large for the floors of the others are cut down to their own floors at most, and none to more than four
/// epochs of its text.
#[test]
fn shares_of_two_are_brought_within_the_guards() {
    for (tiny_sequences, tiny) in [(LATE_SEQUENCES, 0.04), (8, 4.0 * 8.0 / 6_400.0)] {
        let mut config = config(ControllerKind::Ado, &[]);
        let editions = [edition("late", 3, LATE_SEQUENCES), edition("tiny", 4, tiny_sequences)];
        config.planned = vec![(StepIndex(200), change(&editions, &[0.9, 0.04]))];
        let mut world = world(&config);
        world.run(200);
        world.laws.push(late_law());
        world.laws.push(law("tiny", 0.0, tiny_sequences, 1.0, 25.0, 0.25));
        world.grow();
        world.run(5);
        let shares = shares(world.lines.last().unwrap());
        // A fifth is for floors, divided among five.
        assert!((shares[3] + shares[4] - 0.88).abs() < 1e-9, "{shares:?}");
        assert!((shares[4] - tiny).abs() < 1e-9, "{shares:?} and not {tiny}");
    }
}

/// Each controller decides on a new domain by evidence of its own, which begins empty; ADO gives it more where it learns fast.
#[test]
fn what_learns_fast_is_given_more() {
    for kind in [ControllerKind::Ado, ControllerKind::Excess] {
        let (_, world) = planned_run(config(kind, &[]), &[0.1], 200, 900);
        let last = shares(world.lines.last().unwrap());
        // Excess is not progress: there `code` takes most.
        assert!(kind == ControllerKind::Excess || last[3] > 0.1, "{last:?}");
        let decided = |at: usize| {
            let of_line = world.lines[at].decisions.iter();
            of_line
                .filter(|decision| matches!(decision.kind, DecisionKind::Mixture { .. }))
                .count()
        };
        assert!((300..900).any(|at| decided(at) > 0), "{kind:?}");
        let reasons: Vec<&str> = world
            .mixtures()
            .iter()
            .map(|decision| decision.reason.as_str())
            .collect();
        assert!(
            reasons
                .iter()
                .any(|reason| reason.contains("late") && reason.contains("no fit: too ")),
            "its curve begins empty: {reasons:?}"
        );
    }
}

/// ODM: a late domain begins with the mean reward of the others, and claims something from its first loss on.
#[test]
fn odm_begins_with_the_mean_reward() {
    let (_, world) = planned_run(config(ControllerKind::Odm, &[]), &[0.2], 101, 400);
    let rewards = |decision: &Decision| -> Vec<f64> {
        let parts = decision.reason.split(" R=").skip(1);
        parts
            .map(|part| part.split(';').next().unwrap().parse().unwrap())
            .collect()
    };
    let decisions = world.mixtures();
    let first = decisions
        .iter()
        .find(|decision| decision.line.0 == 120)
        .expect("a decision");
    let (with, loss) = (rewards(first), first.reason.split("late ").nth(1).unwrap());
    assert_eq!(with.len(), 4, "{}", first.reason);
    assert!(loss.contains("L="), "{loss}");
    let mean = with[..3].iter().sum::<f64>() / 3.0;
    assert!((with[3] / mean - 1.0).abs() < 0.5, "{with:?}");
}

/// A reference for a domain that comes later is taken from the config by its name.
#[test]
fn excess_measures_a_late_domain_against_its_reference() {
    let last = |late_reference: f64| {
        let mut config = config(ControllerKind::Excess, &[]);
        let known = [("web", 4.0), ("wiki", 4.0), ("code", 4.0), ("late", late_reference)];
        config.mixture.reference = known.map(|(name, loss)| (name.to_owned(), loss)).into();
        let (_, world) = planned_run(config, &[0.2], 100, 600);
        let told = world
            .mixtures()
            .iter()
            .any(|decision| decision.reason.contains(&format!("r={late_reference:.4}")));
        assert!(told, "it is among the inputs");
        shares(world.lines.last().unwrap())[3]
    };
    assert!(last(0.5) > 0.4 && last(9.0) < 0.2, "{} {}", last(0.5), last(9.0));
}

/// Other text of a domain: it keeps its weight at first, and what was inferred from the old text is forgotten.
#[test]
fn other_text_begins_its_evidence_anew() {
    for kind in ADAPTIVE {
        let mut config = config(kind, &[]);
        config.planned = vec![(StepIndex(401), change(&[edition("wiki", 1, 300_000)], &[]))];
        let mut world = world(&config);
        world.run(800);
        let (before, after) = (shares(&world.lines[400]), shares(&world.lines[401]));
        assert_eq!(before.len(), after.len());
        assert!(before.iter().zip(&after).all(|(a, b)| (a - b).abs() < 1e-12));
        let at = |line: u64| {
            world
                .mixtures()
                .into_iter()
                .find(move |decision| decision.line.0 == line)
                .cloned()
        };
        if kind != ControllerKind::Odm {
            let next = (420..500).find_map(at).unwrap_or_else(|| panic!("{kind:?} decides"));
            let DecisionKind::Mixture { weights } = &next.kind else {
                panic!()
            };
            assert!(
                (weights[1] - after[1]).abs() < 2e-6,
                "{kind:?}: {after:?} -> {weights:?}"
            );
            assert!(next.reason.contains("no fit: too "), "{}", next.reason);
        }
        replays_from(&world, &config, 410);
    }
}

/// A share is of the mixture that comes to be in force before its step, whatever is decided for it since; so is what a veto
/// brings back of it.
#[test]
fn shares_are_of_the_mixture_before() {
    let arrival = Decision {
        kind: DecisionKind::Data(change(&[edition("late", 2, 9)], &[0.2])),
        ..mixture_decision(1, 5, 30, &[])
    };
    let mut course = Course::new(vec![1.0, 3.0]);
    course.adopt(&arrival).unwrap();
    let is = |course: &Course, step: u64, expected: &[f64]| {
        let found = course.mixture(StepIndex(step));
        assert!(
            found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12),
            "{found:?}, not {expected:?}"
        );
    };
    is(&course, 30, &[0.2, 0.6, 0.2]);
    course.adopt(&mixture_decision(2, 6, 40, &[1.0, 1.0, 2.0])).unwrap();
    let veto = Decision {
        kind: DecisionKind::Veto {
            decision: DecisionId(2),
        },
        ..mixture_decision(3, 7, 50, &[])
    };
    course.adopt(&veto).unwrap();
    course.adopt(&mixture_decision(4, 10, 20, &[0.5, 0.5])).unwrap();
    is(&course, 29, &[0.5, 0.5]);
    is(&course, 30, &[0.4, 0.4, 0.2]);
    is(&course, 40, &[1.0, 1.0, 2.0]);
    is(&course, 50, &[0.4, 0.4, 0.2]);
    let veto = Decision {
        kind: DecisionKind::Veto {
            decision: DecisionId(4),
        },
        ..mixture_decision(5, 12, 20, &[])
    };
    course.adopt(&veto).unwrap();
    is(&course, 30, &[0.2, 0.6, 0.2]);
    is(&course, 50, &[0.2, 0.6, 0.2]);
    // A second one shares out what the first has made.
    let second = Decision {
        kind: DecisionKind::Data(change(&[edition("later", 3, 9)], &[0.5])),
        ..mixture_decision(6, 20, 60, &[])
    };
    course.adopt(&second).unwrap();
    is(&course, 60, &[0.1, 0.3, 0.1, 0.5]);
}

#[test]
fn shares_that_are_none_are_refused() {
    for (weights, part) in [
        (&[0.0][..], "0 is no share"),
        (&[-0.5], "no share"),
        (&[f64::NAN], "no share"),
        (&[1.0], "leave nothing to the others"),
    ] {
        let mut course = Course::new(vec![0.5, 0.5]);
        let arrival = Decision {
            kind: DecisionKind::Data(change(&[edition("late", 2, 9)], weights)),
            ..mixture_decision(1, 5, 30, &[])
        };
        let refused = course.adopt(&arrival).unwrap_err();
        assert!(refused.contains(part), "{refused}");
    }
}

/// What a controller could not go on with is refused, and what is planned is in the way of whoever asks for the same.
#[test]
fn what_a_controller_cannot_begin_with_is_refused() {
    let mut engine = Ate::new(&config(ControllerKind::Ado, &[]), &facts(&laws()));
    let refused = engine.request(ask(late(&[1.0, 1.0, 1.0, 0.001]), 100)).unwrap_err().0;
    assert!(refused.contains("nothing to begin with"), "{refused}");
    let refused = engine.request(ask(late(&[1.0; 2]), 100)).unwrap_err().0;
    assert!(refused.contains("2 weights for 4 domains"), "{refused}");
    for none in [-0.5, 0.0, 5.0] {
        let refused = engine.request(ask(late(&[none]), 100)).unwrap_err().0;
        assert!(
            refused.contains("share"),
            "{none} is no share to be brought into range: {refused}"
        );
    }

    let mut plan = config(ControllerKind::Ado, &[]);
    plan.planned = vec![(StepIndex(90), late(&[0.2]))];
    let mut engine = Ate::new(&plan, &facts(&laws()));
    let refused = engine.request(ask(late(&[0.2]), 100)).unwrap_err().0;
    assert!(refused.contains("1 weights for 4 domains"), "{refused}");
    let refused = engine
        .request(ask(change(&[edition("book", 4, 9)], &[0.2]), 80))
        .unwrap_err()
        .0;
    assert!(refused.contains("mixture of step 90"), "{refused}");
    engine
        .request(ask(change(&[edition("book", 4, 9)], &[0.2]), 100))
        .unwrap();

    plan.planned[0].0 = StepIndex(43);
    let refused = planned(&plan, &facts(&laws())).unwrap_err();
    assert!(refused.contains("step 43") && refused.contains("is 44"), "{refused}");
    plan.planned[0] = (StepIndex(90), change(&[edition("web", 3, 9)], &[]));
    assert!(planned(&plan, &facts(&laws())).unwrap_err().contains("already"));
}

/// A plan is written down once, in the first decision point's line, before whatever persons ask for there.
#[test]
fn a_plan_is_written_before_what_persons_ask() {
    let mut config = config(ControllerKind::Static, &[]);
    config.policy.persons = true;
    config.planned = vec![(StepIndex(90), late(&[0.2]))];
    let mut world = world(&config);
    let pin = Request {
        person: "ada".into(),
        kind: DecisionKind::Pin,
        not_before: None,
        reason: "a test".into(),
    };
    world.ate.request(pin).unwrap();
    through(&mut world, 90, 120);
    let made = world.mixtures();
    assert_eq!(made.len(), 2);
    assert_eq!(
        (made[0].id, made[0].line.0, &made[0].by),
        (DecisionId(1), 40, &DecisionAuthor::Controller(PLANNER.into()))
    );
    assert_eq!((made[1].id, &made[1].kind), (DecisionId(2), &DecisionKind::Pin));
    // Nobody adapts: a share is taken as it is stated.
    let shares = shares(world.lines.last().unwrap());
    assert!(
        (shares[3] - 0.2).abs() < 1e-12 && (shares[0] - 0.48).abs() < 1e-12,
        "{shares:?}"
    );
    replays_from(&world, &config, 60);
}
