//! Domains that are used up: passes are counted as the cursor draws them, and end at `mixture.epochs_max`.

use super::controllers::ask;
use super::*;
use crate::data::controller::{EPOCH_LIMITER, Request, is_limit_of_all};
use crate::data::decision::{DataChange, DomainEdition};
use proptest::prelude::*;
use tarazed_domain::DomainIndex;
use tarazed_domain::config::MixtureStage;

/// Sequences that a domain may be owed, or have in advance, at both ends of a reckoning.
const ROUNDING: u64 = 4;

fn limited(controller: ControllerKind, epochs_max: u64) -> LoopConfig {
    mixture_loop(&MixtureConfig {
        controller,
        start_steps: 10,
        interval_steps: 10,
        lag_steps: 5,
        epochs_max: Some(epochs_max),
        ..MixtureConfig::default()
    })
}

/// Of `code` a pass is 60 sequences, and a step draws 3.2.
fn scarce() -> Vec<Law> {
    let mut laws = laws();
    laws[2].train_sequences = 60;
    laws
}

fn limits(world: &World) -> Vec<Decision> {
    let is_limit = |decision: &&Decision| matches!(decision.kind, DecisionKind::EpochLimit { .. });
    let all = world.lines.iter().flat_map(|line| &line.decisions);
    all.filter(is_limit).cloned().collect()
}

fn share(world: &World, line: u64, name: &str) -> f64 {
    *world.lines[line as usize - 1].mixture.get(name).unwrap()
}

/// Sequences of a domain in the first lines.
fn drawn(world: &World, lines: usize, name: &str) -> u64 {
    let seen = world.lines[..lines].iter().filter_map(|line| line.domains.get(name));
    seen.map(|seen| seen.tokens).sum::<u64>() / CONTEXT_TOKENS
}

/// LOOP-1: from its print alone, a trace leads to its decisions, and these to its mixtures.
fn replays(world: &World, first: &[Law], config: &LoopConfig) {
    let facts = facts(first);
    let (mut tsm, mut ate) = (Tsm::new(facts.clone()), Ate::new(config, &facts));
    let schedule = DecisionSchedule::new(&config.mixture, &config.policy);
    let mut cursor = DataCursor::new(world.cursor.recipe().clone(), schedule).unwrap();
    for (step, line) in world.lines.iter().enumerate() {
        let line = TraceLine::parse(&line.print(), 1).unwrap();
        let plan = cursor.plan(StepIndex(step as u64)).unwrap();
        let shares: Vec<f64> = line.mixture.iter().map(|(_, share)| *share).collect();
        assert_eq!((plan.digest, plan.mixture), (line.data, shares), "line {}", line.step);
        let signals = tsm.on_line(&line).unwrap();
        ate.replay(&line, &signals).unwrap();
        cursor.record(line.step, &line.decisions).unwrap();
        tsm.learn(&line.decisions);
    }
    assert_eq!(ate.course(), cursor.ledger().course());
}

/// Under a mixture that stands, and under stages that name the domain again.
#[test]
fn a_domain_at_its_limit_gives_its_weight_to_the_others() {
    let target = MixtureStage {
        name: "target".into(),
        from_step: Some(200),
        from_tokens: None,
        on_plateau_after_steps: None,
        weights: BTreeMap::from([("wiki".to_owned(), 1.0), ("code".to_owned(), 3.0)]),
    };
    for stages in [Vec::new(), vec![target]] {
        let is_staged = !stages.is_empty();
        let kind = if is_staged {
            ControllerKind::Schedule
        } else {
            ControllerKind::Static
        };
        let mut config = limited(kind, 3);
        config.mixture.stages = stages;
        let mut world = World::of(scarce(), &config);
        world.run(300);
        let found = limits(&world);
        let [limit] = &found[..] else {
            panic!("{found:?}");
        };
        assert_eq!(limit.kind, DecisionKind::EpochLimit { domain: 2 });
        assert_eq!(limit.by, DecisionAuthor::Controller(EPOCH_LIMITER.into()));
        assert!(limit.reason.contains("code") && limit.reason.ends_with("the others have its weight"));
        assert!(!is_limit_of_all(limit));
        assert!(
            limit.line.0.is_multiple_of(10) && (limit.line.0 + 5..limit.line.0 + 15).contains(&limit.effective.0),
            "the last point that can decide it: {limit:?}"
        );
        let used = drawn(&world, 300, "code");
        assert!((180 - 4 - ROUNDING..=180 + ROUNDING).contains(&used), "{used}");
        let at = limit.effective.0;
        assert!((share(&world, at, "code") - 0.1).abs() < 1e-12);
        for line in at + 1..=300 {
            assert_eq!(share(&world, line, "code"), 0.0, "line {line}");
            let web = if is_staged && line > 200 { 0.0 } else { 2.0 / 3.0 };
            assert!((share(&world, line, "web") - web).abs() < 1e-12, "line {line}");
        }
        replays(&world, &scarce(), &config);
    }
}

/// LOOP-2: what a person forces keeps the limit, and who vetoes it has the domain trained on: it is not decided again.
#[test]
fn persons_force_within_the_limit_and_may_veto_it() {
    let config = limited(ControllerKind::Static, 3);
    let mut world = World::of(scarce(), &config);
    world.run(100);
    let limit = limits(&world)[0].clone();
    let weights = vec![1.0, 1.0, 8.0];
    world.ate.request(ask(DecisionKind::Mixture { weights })).unwrap();
    world.run(50);
    assert_eq!([share(&world, 116, "web"), share(&world, 116, "code")], [0.5, 0.0]);
    let veto = DecisionKind::Veto { decision: limit.id };
    world.ate.request(ask(veto.clone())).unwrap();
    world.run(100);
    assert_eq!([165, 166].map(|line| share(&world, line, "code")), [0.0, 0.8]);
    assert_eq!(limits(&world).len(), 1);
    let refused = world.ate.request(ask(veto)).unwrap_err();
    assert!(refused.to_string().contains("vetoed already"), "{refused}");
    let own = world.ate.request(ask(limit.kind)).unwrap_err();
    assert!(own.to_string().contains("only the run itself"), "{own}");
    replays(&world, &scarce(), &config);
}

/// DATA-1: other text frees a domain, and its passes count from the first again.
#[test]
fn other_text_frees_a_domain() {
    let config = limited(ControllerKind::Static, 3);
    let mut world = World::of(scarce(), &config);
    world.run(100);
    let edition = DomainEdition {
        name: "code".into(),
        domain: 2,
        index: 0,
        language: "en".into(),
        train_sequences: 50,
        train_tokens: 50 * CONTEXT_TOKENS + 1,
    };
    let change = DataChange {
        version: format!("{:064x}", 7),
        domains: vec![edition],
        weights: Vec::new(),
    };
    let request = Request {
        not_before: Some(StepIndex(150)),
        ..ask(DecisionKind::Data(change))
    };
    world.ate.request(request).unwrap();
    world.run(200);
    let found = limits(&world);
    let [first, second] = &found[..] else {
        panic!("{found:?}");
    };
    assert!(
        first.effective.0 < 100 && second.effective.0 > 180,
        "{first:?} {second:?}"
    );
    let shares = [150, 151, second.effective.0, second.effective.0 + 1].map(|line| share(&world, line, "code"));
    assert_eq!(shares.map(|share| share > 0.0), [false, true, true, false]);
    let used = drawn(&world, 300, "code") - drawn(&world, 150, "code");
    assert!((150 - 4 - ROUNDING..=150 + ROUNDING).contains(&used), "{used}");
    replays(&world, &scarce(), &config);
}

/// The last one has nobody to give its weight to: all go on as they did, and that is said once.
#[test]
fn where_all_are_at_their_limit_the_mixture_stays() {
    let config = limited(ControllerKind::Static, 1);
    let laws = [law("a", 1.0, 400, 2.0, 20.0, 0.22), law("b", 1.0, 600, 2.0, 20.0, 0.22)];
    let mut world = World::of(laws.to_vec(), &config);
    world.run(200);
    let found = limits(&world);
    let [first, last] = &found[..] else {
        panic!("{found:?}");
    };
    assert_eq!([first, last].map(is_limit_of_all), [false, true]);
    let kinds = [first, last].map(|limit| limit.kind.clone());
    assert_eq!(kinds, [0, 1].map(|domain| DecisionKind::EpochLimit { domain }));
    let (from, to) = (first.effective.0, last.effective.0);
    let shares = [from, from + 1, to, to + 1, 200].map(|line| share(&world, line, "a"));
    assert_eq!(shares, [0.5, 0.0, 0.0, 0.5, 0.5]);
    replays(&world, &laws, &config);
}

/// DATA-1: the pass of a line is that of its newest sample, and each but the first begins in one line.
#[test]
fn passes_are_counted_as_they_are_drawn() {
    let laws = scarce();
    let mut world = World::new(laws.clone(), &MixtureConfig::default());
    world.tsm = Tsm::new(facts(&laws)).with_context(CONTEXT_TOKENS);
    let mut begun = Vec::new();
    for step in 0..100 {
        let plan = world.cursor.clone().plan(StepIndex(step)).unwrap();
        let signals = world.step(|_| ());
        let code = plan.samples.iter().filter(|sample| sample.domain == DomainIndex(2));
        let newest = code.map(|sample| u64::from(sample.epoch) + 1).max();
        let seen = &signals.domains[2];
        assert_eq!(seen.epoch, newest.unwrap_or(seen.epoch), "step {step}");
        begun.extend(seen.epoch_begins.then_some(seen.epoch));
        assert!(!signals.domains[0].epoch_begins);
    }
    assert_eq!(begun, [2, 3, 4, 5, 6], "320 sequences are five passes and a third");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Behind the first decision that can act, no domain is drawn beyond its limit but for rounding, while there is another.
    #[test]
    fn no_domain_is_drawn_beyond_its_limit(
        sizes in prop::collection::vec((20_u64..2_000, 0.05_f64..1.0), 2..5),
        (epochs_max, adapts) in (1_u64..4, any::<bool>()),
        (start_steps, interval_steps, lag_steps) in (0_u64..40, 1_u64..20, 1_u64..12),
    ) {
        let kind = if adapts { ControllerKind::Odm } else { ControllerKind::Static };
        let mut config = limited(kind, epochs_max);
        (config.mixture.start_steps, config.mixture.interval_steps) = (start_steps, interval_steps);
        config.mixture.lag_steps = lag_steps;
        let named = ["a", "b", "c", "d"].into_iter().zip(&sizes);
        let laws: Vec<Law> = named.map(|(name, (size, weight))| law(name, *weight, *size, 2.0, 20.0, 0.22)).collect();
        let mut world = World::of(laws.clone(), &config);
        let schedule = DecisionSchedule::new(&config.mixture, &config.policy);
        let first = schedule.effective(schedule.next_point(StepsCompleted(0)).unwrap());
        world.run(first.0);
        let before: Vec<u64> = laws.iter().map(|law| drawn(&world, first.0 as usize, law.name)).collect();
        for step in first.0..200 {
            let course = world.cursor.ledger().course();
            if (0..laws.len()).all(|domain| course.is_limited(domain, StepIndex(step))) {
                break;
            }
            world.step(|_| ());
            for (law, before) in laws.iter().zip(&before) {
                let most = (*before).max(epochs_max * law.train_sequences) + ROUNDING;
                let used = drawn(&world, step as usize + 1, law.name);
                prop_assert!(used <= most, "{} of at most {} of {} by step {}", used, most, law.name, step);
            }
        }
        replays(&world, &laws, &config);
    }
}
