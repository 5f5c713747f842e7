//! Data that change while a run trains.

use super::*;
use crate::data::catalogue::Origin;
use crate::data::controller::Request;
use crate::data::course::{Course, Directives};
use crate::data::cursor::{SampleRef, StepPlan};
use crate::data::decision::{DataChange, DomainEdition, LedgerError, SpikeBounds, domain_names};
use crate::data::stats::LossSum;
use proptest::prelude::*;
use std::collections::BTreeMap;

const STEPS: u64 = 60;
const BATCH: u32 = 12;

/// Decision points every 5 steps from 5 on, 3 steps of lag.
fn quick() -> MixtureConfig {
    MixtureConfig {
        controller: ControllerKind::Ado,
        start_steps: 5,
        interval_steps: 5,
        lag_steps: 3,
        ..MixtureConfig::default()
    }
}

fn edition(name: &str, domain: u16, index: u16, train_sequences: u64) -> DomainEdition {
    DomainEdition {
        name: name.to_owned(),
        domain,
        index,
        language: "en".to_owned(),
        train_sequences,
        train_tokens: train_sequences * CONTEXT_TOKENS + 1,
    }
}

fn change(id: u64, line: u64, effective: u64, domains: &[DomainEdition], weights: &[f64]) -> Decision {
    let change = DataChange {
        version: format!("{id:064x}"),
        domains: domains.to_vec(),
        weights: weights.to_vec(),
    };
    Decision {
        kind: DecisionKind::Data(change),
        ..mixture_decision(id, line, effective, &[])
    }
}

fn two(first: u64, second: u64) -> Recipe {
    let laws = [
        law("web", 0.6, first, 2.0, 20.0, 0.2),
        law("wiki", 0.4, second, 2.0, 20.0, 0.2),
    ];
    recipe(&laws, BATCH)
}

/// The whole run: every decision is recorded with its line, all other points as empty.
fn straight(recipe: &Recipe, decisions: &[Decision], steps: u64) -> Vec<StepPlan> {
    let mut cursor = DataCursor::new(recipe.clone(), points(&quick())).unwrap();
    (0..steps)
        .map(|step| {
            let known = cursor.needs(StepIndex(step));
            record(&mut cursor, decisions, known);
            cursor.plan(StepIndex(step)).unwrap()
        })
        .collect()
}

fn record(cursor: &mut DataCursor, decisions: &[Decision], through: StepsCompleted) {
    for line in (cursor.ledger().recorded().0 + 1)..=through.0 {
        let here: Vec<Decision> = decisions
            .iter()
            .filter(|decision| decision.line.0 == line)
            .cloned()
            .collect();
        cursor.record(StepsCompleted(line), &here).unwrap();
    }
}

/// What was drawn of a domain, in the order of the draws, by the steps of these plans.
fn drawn(plans: &[StepPlan], domain: u16) -> Vec<(u32, u64)> {
    let samples = plans.iter().flat_map(|plan| &plan.samples);
    let of_domain = samples.filter(|sample| sample.domain.0 == domain);
    of_domain.map(|sample| (sample.epoch, sample.sequence)).collect()
}

/// DATA-1: epochs count up from 0, and hold each sequence once.
fn is_once_each(draws: &[(u32, u64)], sequences: u64) -> bool {
    draws.chunks(sequences as usize).zip(0..).all(|(epoch, number)| {
        let mut seen: Vec<u64> = epoch.iter().map(|(_, sequence)| *sequence).collect();
        seen.sort_unstable();
        seen.dedup();
        epoch
            .iter()
            .all(|(of, sequence)| *of == number && *sequence < sequences)
            && seen.len() == epoch.len()
    })
}

#[derive(Clone, Debug)]
struct Case {
    recipe: Recipe,
    decisions: Vec<Decision>,
    /// First step of the change of `wiki` and arrival of `code`.
    at: u64,
    new: u64,
    replacement: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let sizes = (1_u64..50, 1_u64..50, 1_u64..50, 1_u64..50);
    (
        sizes,
        any::<u64>(),
        1_u64..8,
        0_u64..12,
        prop::collection::vec(0.01_f64..1.0, 3),
    )
        .prop_map(|((web, wiki, new, replacement), seed, point, later, weights)| {
            let mut recipe = two(web, wiki);
            recipe.seed = seed;
            let (line, at) = (5 * point, 5 * point + 3 + later);
            let both = [edition("code", 2, 1, new), edition("wiki", 1, 0, replacement)];
            let then = (at - 3).next_multiple_of(5) + 5;
            let decisions = vec![
                change(1, line, at, &both, &weights),
                mixture_decision(2, then, then + 3, &[weights[2], weights[0], weights[1]]),
            ];
            Case {
                recipe,
                decisions,
                at,
                new,
                replacement,
            }
        })
}

proptest! {
    /// Before the step of a change a run is the run without it; what the change leaves alone goes on as in that run; what it
    /// brings begins at its first draw, and holds each sequence once an epoch (DATA-1).
    #[test]
    fn a_change_acts_on_what_it_names_and_from_its_step_on(case in case()) {
        let at = case.at as usize;
        let with = straight(&case.recipe, &case.decisions, STEPS + 20);
        let without = straight(&case.recipe, &[], STEPS + 20);
        prop_assert_eq!(&with[..at], &without[..at]);
        prop_assert!(with[at..].iter().zip(&without[at..]).all(|(a, b)| a.digest != b.digest));
        let (web, undisturbed) = (drawn(&with, 0), drawn(&without, 0));
        let common = web.len().min(undisturbed.len());
        prop_assert_eq!(&web[..common], &undisturbed[..common]);
        prop_assert!(is_once_each(&web, case.recipe.domains[0].train_sequences));
        prop_assert!(is_once_each(&drawn(&with[..at], 1), case.recipe.domains[1].train_sequences));
        prop_assert!(is_once_each(&drawn(&with[at..], 1), case.replacement));
        prop_assert_eq!(drawn(&with[..at], 2), vec![]);
        prop_assert!(is_once_each(&drawn(&with[at..], 2), case.new));
        prop_assert!(with.iter().all(|plan| plan.samples.len() == BATCH as usize));
        prop_assert!(with[..at].iter().all(|plan| plan.mixture.len() == 2 && plan.holdings.len() == 2));
        prop_assert!(with[at..].iter().all(|plan| plan.mixture.len() == 3 && plan.counts.len() == 3));
    }

    /// DATA-2: the trace alone says what each step trained on. A cursor that is restored anywhere, asked for any step on
    /// either side of the change, plans what the straight run did; so does one that lives through it.
    #[test]
    fn any_split_into_resumes_gives_the_same_samples(case in case(), walk in prop::collection::vec(0..STEPS, 1..10)) {
        let expected = straight(&case.recipe, &case.decisions, STEPS);
        let mut cursor = DataCursor::new(case.recipe.clone(), points(&quick())).unwrap();
        record(&mut cursor, &case.decisions, StepsCompleted(STEPS));
        for step in walk {
            prop_assert_eq!(&cursor.plan(StepIndex(step)).unwrap(), &expected[step as usize]);
            let known = cursor.needs(StepIndex(step));
            let past: Vec<Decision> = case.decisions.iter().filter(|decision| decision.line <= known).cloned().collect();
            let mut resumed = DataCursor::restore(case.recipe.clone(), points(&quick()), known, &past).unwrap();
            for later in step..STEPS {
                let known = resumed.needs(StepIndex(later));
                record(&mut resumed, &case.decisions, known);
                prop_assert_eq!(&resumed.plan(StepIndex(later)).unwrap(), &expected[later as usize]);
            }
            prop_assert_eq!(resumed.drawn(StepIndex(step)).unwrap().iter().sum::<u64>(), step * u64::from(BATCH));
        }
    }

    /// What is owed to the domains that were there goes on: a new domain without weight changes no sample.
    #[test]
    fn a_domain_without_weight_changes_no_sample(web in 1_u64..50, wiki in 1_u64..50, seed: u64) {
        let mut recipe = two(web, wiki);
        recipe.seed = seed;
        let quiet = change(1, 5, 11, &[edition("code", 2, 0, 7)], &[0.6, 0.4, 0.0]);
        let (with, without) = (straight(&recipe, &[quiet], STEPS), straight(&recipe, &[], STEPS));
        for (a, b) in with.iter().zip(&without) {
            prop_assert_eq!(&a.samples, &b.samples);
            prop_assert_eq!(a.digest == b.digest, a.step < StepIndex(11), "the data are others all the same");
        }
    }
}

/// Held-out text stays that of a domain's first edition; training text is that of its newest.
#[test]
fn text_is_looked_for_where_it_came_from() {
    let first = change(
        1,
        5,
        8,
        &[edition("wiki", 1, 3, 9), edition("code", 2, 0, 9)],
        &[1.0; 3],
    );
    let second = change(2, 10, 13, &[edition("code", 2, 5, 9)], &[1.0; 3]);
    let plans = straight(&two(50, 50), &[first, second], 20);
    let at = |origin: &Origin| {
        (
            origin.change.as_ref().map(|change| change.version.clone()),
            origin.domain.0,
        )
    };
    let version = |id: u64| Some(format!("{id:064x}"));
    let of = |step: usize, domain: usize| {
        let held = &plans[step].holdings[domain];
        (at(&held.training), at(&held.held_out))
    };
    assert_eq!(of(7, 1), ((None, 1), (None, 1)));
    assert_eq!(of(8, 1), ((version(1), 3), (None, 1)));
    assert_eq!(of(8, 2), ((version(1), 0), (version(1), 0)));
    assert_eq!(of(13, 2), ((version(2), 5), (version(1), 0)));
    assert_eq!(of(13, 0), ((None, 0), (None, 0)));
}

/// Another text is at another level: that is no divergence, as the same rise would be without a word.
#[test]
fn another_text_is_no_divergence() {
    for is_said in [true, false] {
        let level = |wiki: f64| {
            [("web", 0.6, 2.0), ("wiki", 0.4, wiki)]
                .map(|(name, weight, at)| law(name, weight, 1_000_000, at, 0.0, 0.2))
        };
        let mut world = World::new(level(2.0).to_vec(), &MixtureConfig::default());
        world.run(600);
        if is_said {
            let wiki = edition("wiki", 1, 0, 1_000_000);
            world.tsm.learn(&[change(1, 592, 600, &[wiki], &[0.6, 0.4])]);
        }
        world.laws = level(4.0).to_vec();
        let diverged = (0..200).filter(|_| world.step(|_| ()).divergence.is_some()).count();
        assert_eq!(diverged == 0, is_said, "{diverged} of 200 lines");
    }
}

/// The order of an edition is its own, and its samples are part of the promise.
#[test]
fn digests_after_a_change_are_pinned() {
    let decisions = [change(
        1,
        5,
        8,
        &[edition("wiki", 1, 0, 50), edition("code", 2, 1, 50)],
        &[1.0; 3],
    )];
    let plans = straight(&two(50, 50), &decisions, 40);
    let of_first = |plans: &[StepPlan], domain| drawn(plans, domain)[..10].to_vec();
    assert_ne!(of_first(&plans[8..], 1), of_first(&plans, 1));
    assert_ne!(of_first(&plans[8..], 1), of_first(&plans[8..], 2));
    assert_eq!(hex::encode(plans[30].digest), PINNED);
}
/// Computed apart from this code, by docs/FORMATS.md.
const PINNED: &str = "2a99a7d866eaa794759e38587e6d9e4b222e86f2017d8e143a9ff0807a55cda8";

/// What a rollback discards is counted over all editions, and of a domain that came since all.
#[test]
fn draws_are_counted_over_editions() {
    let decisions = [change(
        1,
        5,
        8,
        &[edition("wiki", 1, 0, 50), edition("code", 2, 1, 50)],
        &[1.0; 3],
    )];
    let mut cursor = DataCursor::new(two(50, 50), points(&quick())).unwrap();
    record(&mut cursor, &decisions, StepsCompleted(20));
    let discarded = cursor.discarded(StepsCompleted(4), StepIndex(14)).unwrap();
    assert_eq!(
        discarded.iter().map(|samples| samples.count).sum::<u64>(),
        10 * u64::from(BATCH)
    );
    assert_eq!((discarded.len(), discarded[2].first), (3, 0));
}

#[test]
fn what_does_not_fit_is_refused() {
    let code = edition("code", 2, 0, 9);
    let mut cursor = DataCursor::new(two(50, 50), points(&quick())).unwrap();
    let mut refused = |decision: Decision, part: &str| {
        let Err(LedgerError::Refused { reason, .. }) = cursor.record(StepsCompleted(5), &[decision]) else {
            panic!("taken, and should lack: {part}")
        };
        assert!(reason.contains(part), "{reason}");
    };
    let of = |domains: &[DomainEdition], weights: &[f64]| change(1, 5, 8, domains, weights);
    refused(of(std::slice::from_ref(&code), &[1.0; 2]), "2 weights for 3 domains");
    refused(of(&[], &[1.0; 2]), "brings no domain");
    refused(of(&[edition("code", 3, 0, 9)], &[1.0; 4]), "cannot be domain 3");
    refused(of(&[edition("web", 2, 0, 9)], &[1.0; 3]), "'web' is domain 0 already");
    refused(of(&[edition("code", 1, 0, 9)], &[1.0; 2]), "domain 1 is 'wiki'");
    refused(
        of(&[edition("wiki", 1, 0, 9), edition("wiki", 1, 0, 9)], &[1.0; 2]),
        "cannot be domain 1",
    );
    refused(of(&[edition("code", 2, 0, 0)], &[1.0; 3]), "0 training sequences");
    refused(change(1, 5, 7, std::slice::from_ref(&code), &[1.0; 3]), "it is late");
    let mut nameless = of(std::slice::from_ref(&code), &[1.0; 3]);
    if let DecisionKind::Data(change) = &mut nameless.kind {
        change.version = "../0".into();
    }
    refused(nameless, "no version of a data set");
    let mut foreign = code;
    foreign.language = "la".into();
    refused(of(&[foreign], &[1.0; 3]), "no language");
}

/// A mixture speaks of the domains of its step, and a change stands: neither can pull the other from under it.
#[test]
fn mixtures_and_changes_keep_to_their_order() {
    let arrival = || change(3, 10, 30, &[edition("code", 2, 0, 9)], &[1.0, 1.0, 2.0]);
    let mut course = Course::new(vec![0.5, 0.5]);
    course.adopt(&mixture_decision(1, 5, 20, &[0.9, 0.1])).unwrap();
    course.adopt(&mixture_decision(2, 5, 40, &[0.2, 0.8])).unwrap();
    assert!(course.adopt(&arrival()).unwrap_err().contains("mixture of step 40"));
    let veto = |id: u64, effective, which| Decision {
        kind: DecisionKind::Veto {
            decision: DecisionId(which),
        },
        ..mixture_decision(id, effective - 8, effective, &[])
    };
    course.adopt(&veto(3, 30, 2)).unwrap();
    course.adopt(&arrival()).unwrap();
    assert_eq!(
        (course.domains_at(StepIndex(29)), course.domains_at(StepIndex(30))),
        (2, 3)
    );
    assert_eq!(course.mixture(StepIndex(30)), [1.0, 1.0, 2.0]);
    assert!(
        course.adopt(&mixture_decision(4, 20, 35, &[0.5, 0.5])).is_err(),
        "two weights for three domains"
    );
    course.adopt(&mixture_decision(4, 20, 35, &[0.0, 0.0, 1.0])).unwrap();
    assert!(
        course
            .adopt(&veto(5, 50, 3))
            .unwrap_err()
            .contains("cannot be taken back")
    );
    // What is brought back is of as many domains as there are.
    course.adopt(&veto(5, 50, 4)).unwrap();
    assert_eq!(course.mixture(StepIndex(60)), [1.0, 1.0, 2.0]);
    // One that acts before the change speaks of two domains still.
    course.adopt(&mixture_decision(6, 15, 25, &[0.3, 0.7])).unwrap();
    assert_eq!(course.mixture(StepIndex(29)), [0.3, 0.7]);
}

/// A text that is new is no spike: nothing is expected of it until a line has seen it.
#[test]
fn bounds_expect_nothing_of_new_text() {
    let mut course = Course::new(vec![0.5, 0.5]);
    let bounds = |id, line, domains| Decision {
        kind: DecisionKind::SpikeBounds(SpikeBounds {
            expected: vec![Some(2.0); domains],
            residual_loss: 0.5,
            grad_norm: 10.0,
        }),
        ..mixture_decision(id, line, line + 3, &[])
    };
    course.adopt(&bounds(1, 5, 2)).unwrap();
    let both = [edition("wiki", 1, 0, 9), edition("code", 2, 1, 9)];
    course.adopt(&change(2, 10, 14, &both, &[1.0; 3])).unwrap();
    let expected = |directives: Directives| directives.bounds.map(|bounds| bounds.expected);
    assert_eq!(expected(course.directives(StepIndex(13))), Some(vec![Some(2.0); 2]));
    assert_eq!(
        expected(course.directives(StepIndex(14))),
        Some(vec![Some(2.0), None, None])
    );
    let high = LossSum {
        loss_sum: 900.0,
        tokens: 100,
    };
    let calm = LossSum {
        loss_sum: 200.0,
        tokens: 100,
    };
    assert!(!course.directives(StepIndex(14)).skips(&[calm, high, high], 1.0));
    assert!(course.directives(StepIndex(13)).skips(&[calm, high], 1.0));
    // Decided on line 15, the first that has seen step 14.
    course.adopt(&bounds(3, 15, 3)).unwrap();
    assert_eq!(expected(course.directives(StepIndex(20))), Some(vec![Some(2.0); 3]));
}

#[test]
fn names_come_with_their_step() {
    let first = ["web".to_owned(), "wiki".to_owned()];
    let decisions = [
        change(
            1,
            5,
            8,
            &[edition("wiki", 1, 0, 9), edition("code", 2, 1, 9)],
            &[1.0; 3],
        ),
        change(
            2,
            10,
            13,
            &[edition("code", 2, 0, 9), edition("book", 3, 1, 9)],
            &[1.0; 4],
        ),
    ];
    let at = |step| domain_names(&first, &decisions, StepIndex(step)).join(",");
    assert_eq!(
        (at(7).as_str(), at(8).as_str(), at(13).as_str()),
        ("web,wiki", "web,wiki,code", "web,wiki,code,book")
    );
}

fn persons() -> LoopConfig {
    let mixture = MixtureConfig {
        controller: ControllerKind::Static,
        start_steps: 10,
        interval_steps: 10,
        lag_steps: 4,
        ..MixtureConfig::default()
    };
    let mut config = mixture_loop(&mixture);
    config.policy.persons = true;
    config
}

fn ask(change: &Decision, at: u64) -> Request {
    Request {
        person: "ada".into(),
        kind: change.kind.clone(),
        not_before: Some(StepIndex(at)),
        reason: "a test".into(),
    }
}

/// The whole loop: a person asks, the line holds it, signals follow, and a loop that is made again from the lines is the same.
#[test]
fn the_loop_goes_on_with_other_data() {
    let config = persons();
    let laws = laws();
    let mut world = World::of(laws[..2].to_vec(), &config);
    world.run(15);
    let arrival = change(
        1,
        20,
        45,
        &[edition("code", 2, 0, 90), edition("wiki", 1, 1, 80)],
        &[1.0, 1.0, 2.0],
    );
    let soon = world.ate.request(ask(&arrival, 23)).unwrap_err().to_string();
    assert!(
        soon.contains("line 20 would hold it") && soon.contains("is 24"),
        "{soon}"
    );
    let taken = change(1, 20, 45, &[edition("web", 2, 0, 9)], &[1.0; 3]);
    assert!(world.ate.request(ask(&taken, 45)).unwrap_err().0.contains("already"));
    assert_eq!(
        world.ate.request(ask(&arrival, 45)).unwrap(),
        (StepsCompleted(20), StepIndex(45))
    );
    // A second one that waits is judged by the first.
    assert!(
        world
            .ate
            .request(ask(&arrival, 25))
            .unwrap_err()
            .0
            .contains("mixture of step 45")
    );
    world.run(5);
    assert!(matches!(
        world.lines[19].decisions[..],
        [Decision {
            kind: DecisionKind::Data(_),
            ..
        }]
    ));
    // Before the change a mixture is one of two domains; a third one may be named, with nothing.
    let force = |weights: &[f64]| Request {
        person: "ada".into(),
        kind: mixture_decision(9, 0, 0, weights).kind,
        not_before: None,
        reason: "a test".into(),
    };
    assert!(world.ate.clone().request(force(&[1.0, 1.0, 1.0])).is_err());
    assert_eq!(
        world.ate.clone().request(force(&[1.0, 1.0, 0.0])).unwrap().1,
        StepIndex(34)
    );
    world.run(25);
    world.laws.push(laws[2].clone());
    world.grow();
    world.run(80);
    assert!(world.lines[..45].iter().all(|line| line.mixture.0.len() == 2));
    assert!(world.lines[45..].iter().all(|line| line.mixture.0.len() == 3));

    let facts = facts(&laws[..2]);
    let (mut tsm, mut ate) = (Tsm::new(facts.clone()), Ate::new(&config, &facts));
    let mut signals = None;
    for line in &world.lines {
        let seen = tsm.on_line(line).unwrap();
        ate.replay(line, &seen).unwrap();
        tsm.learn(&line.decisions);
        signals = Some(seen);
    }
    let signals = signals.unwrap();
    assert_eq!(signals.domains.len(), 3);
    assert_eq!(signals.last_spike, None, "new text is no spike");
    let since: u64 = world.lines[45..]
        .iter()
        .filter_map(|line| line.domains.get("wiki"))
        .map(|seen| seen.tokens)
        .sum();
    assert_eq!(
        signals.domains[1].epochs,
        since as f64 / (80 * CONTEXT_TOKENS + 1) as f64
    );
}

/// Stages speak of the config's domains; beside them the data do not change.
#[test]
fn stages_keep_their_domains() {
    let arrival = change(1, 100, 200, &[edition("book", 3, 0, 9)], &[1.0; 4]);
    let stages = vec![tarazed_domain::config::MixtureStage {
        name: "late".into(),
        from_step: Some(300),
        from_tokens: None,
        on_plateau_after_steps: None,
        weights: BTreeMap::from([("web".to_owned(), 1.0)]),
    }];
    let scheduled = MixtureConfig {
        controller: ControllerKind::Schedule,
        stages,
        ..ado()
    };
    let refused = engine(&scheduled, &facts(&laws()))
        .request(ask(&arrival, 200))
        .unwrap_err();
    assert!(refused.0.contains("mixture.controller"), "{refused}");
}

/// Every sample of the changed run, by edition: the marks of two ranks that plan apart meet without a gap.
#[test]
fn samples_of_editions_are_told_apart() {
    let decisions = [change(1, 5, 8, &[edition("wiki", 1, 0, 5)], &[1.0; 2])];
    let plans = straight(&two(5, 5), &decisions, 30);
    let mut seen: BTreeMap<(bool, SampleRef), u32> = BTreeMap::new();
    for plan in &plans {
        for sample in &plan.samples {
            let is_new = plan.holdings[sample.domain.index()].training.change.is_some();
            *seen.entry((is_new, *sample)).or_default() += 1;
        }
    }
    assert!(seen.values().all(|times| *times == 1));
}
