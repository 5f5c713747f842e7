use super::*;
use crate::data::controller::{LN_CHANGE_MAX, Request, weight_floor};
use std::collections::BTreeMap;
use tarazed_domain::config::{BatchRamp, MixtureStage, SpikePolicy, StopRules};

pub(super) fn with(controller: ControllerKind) -> MixtureConfig {
    MixtureConfig { controller, ..ado() }
}

pub(super) fn ask(kind: DecisionKind) -> Request {
    Request {
        person: "ada".into(),
        kind,
        not_before: None,
        reason: "by hand".into(),
    }
}

pub(super) fn raise(line: &mut TraceLine, nats: f64) {
    line.loss += nats;
    for (_, domain) in &mut line.domains.0 {
        domain.loss += nats;
    }
}

/// LOOP-1: live, and replayed from the printed trace, decisions and all.
pub(super) fn check_replay(world: &World, config: &LoopConfig) {
    let facts = facts(&world.laws);
    let (mut tsm, mut ate) = (Tsm::new(facts.clone()), Ate::new(config, &facts));
    let schedule = DecisionSchedule::new(&config.mixture, &config.policy);
    let mut cursor = DataCursor::new(world.cursor.recipe().clone(), schedule).unwrap();
    for line in &world.lines {
        let line = TraceLine::parse(&line.print(), 1).unwrap();
        let signals = tsm.on_line(&line).unwrap();
        ate.replay(&line, &signals).unwrap();
        cursor.record(line.step, &line.decisions).unwrap();
    }
    assert_eq!(ate.course(), cursor.ledger().course());
}

/// Every controller that adapts keeps the same guards, gives its inputs, and decides the same again.
#[test]
fn all_controllers_keep_the_guards() {
    for kind in [ControllerKind::Ado, ControllerKind::Odm, ControllerKind::Excess] {
        let config = mixture_loop(&with(kind));
        let mut world = World::of(laws(), &config);
        world.run(2000);
        let floor = weight_floor(3);
        let mut current: Vec<f64> = world.laws.iter().map(|law| law.weight).collect();
        let made = world.mixtures();
        assert!(made.len() > 5, "{kind:?} decided {} times", made.len());
        for decision in made {
            assert_eq!(decision.by, DecisionAuthor::Controller(kind.name().into()));
            assert!(decision.reason.contains("L="), "{}", decision.reason);
            let DecisionKind::Mixture { weights } = &decision.kind else {
                panic!("{decision:?}");
            };
            assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-9);
            for (new, old) in weights.iter().zip(&current) {
                assert!(*new >= floor.min(old * 1.2) - 2e-6, "{kind:?}: {weights:?}");
                assert!(
                    (new / old).ln().abs() <= LN_CHANGE_MAX + 1e-4,
                    "{kind:?}: {current:?} -> {weights:?}"
                );
            }
            current.clone_from(weights);
        }
        check_replay(&world, &config);
    }
}

/// The bandit's second update, by hand: rewards are running means of a tenth of the loss over the share.
#[test]
fn odm_is_the_published_formula() {
    let laws = vec![
        law("a", 0.5, 1_000_000, 4.0, 0.0, 0.2),
        law("b", 0.5, 1_000_000, 2.0, 0.0, 0.2),
    ];
    let mut world = World::of(laws, &mixture_loop(&with(ControllerKind::Odm)));
    world.noise = 0.0;
    world.run(100);
    assert!(
        world.mixtures().is_empty(),
        "at the first update all is exploration: even, as the mixture is"
    );
    world.run(50);
    let mut rewards = [0.0; 2];
    for _ in 0..2 {
        rewards = [(rewards[0], 4.0), (rewards[1], 2.0)].map(|(old, loss)| 0.9 * old + 0.1 * (loss / 10.0 / 0.5));
    }
    let eps = 0.5_f64.min((2.0_f64.ln() / (2.0 * 2.0)).sqrt());
    let powers = rewards.map(|reward: f64| (eps * reward).exp());
    let share = (1.0 - 2.0 * eps) * powers[0] / (powers[0] + powers[1]) + eps;
    let expected = 0.75 * share + 0.25 * 0.5;
    let weights = world.ate.mixture(StepIndex(158));
    assert!(
        (weights[0] - expected).abs() < 2e-6 && expected > 0.5005,
        "{weights:?}, not {expected}"
    );
    world.run(1850);
    let weights = world.ate.mixture(StepIndex(u64::MAX));
    assert!(weights[0] > 0.5, "the higher loss is the higher reward: {weights:?}");
}

/// Against a reference run, the domain that lags behind it gains; without one, the fitted floors stand in.
#[test]
fn excess_follows_the_reference() {
    let laws = || {
        vec![
            law("a", 0.5, 1_000_000, 2.0, 15.0, 0.22),
            law("b", 0.5, 1_000_000, 2.0, 15.0, 0.22),
        ]
    };
    let last = |reference: &[(&str, f64)]| {
        let mut config = with(ControllerKind::Excess);
        config.reference = reference
            .iter()
            .map(|(name, loss)| ((*name).to_owned(), *loss))
            .collect();
        let mut world = World::of(laws(), &mixture_loop(&config));
        world.run(1500);
        world.ate.mixture(StepIndex(u64::MAX))
    };
    assert!(last(&[("a", 1.0), ("b", 9.0)])[0] > 0.7);
    assert!(last(&[("a", 9.0), ("b", 1.0)])[1] > 0.7);
    assert!((last(&[])[0] - 0.5).abs() < 0.1);
}

/// Advice of the shadow stands in the trace and changes nothing that is trained on.
#[test]
fn shadows_advise_and_nobody_follows() {
    for followed in [ControllerKind::Static, ControllerKind::Ado] {
        let mut config = with(followed);
        let mut plain = World::new(laws(), &config);
        config.shadow = vec![ControllerKind::Odm, ControllerKind::Excess];
        let config = mixture_loop(&config);
        let mut shadowed = World::of(laws(), &config);
        plain.run(800);
        shadowed.run(800);
        let mut seen = BTreeMap::new();
        for (a, b) in plain.lines.iter().zip(&shadowed.lines) {
            assert_eq!((a.data, &a.mixture, a.loss), (b.data, &b.mixture, b.loss));
            let is_advice = |decision: &&Decision| matches!(decision.kind, DecisionKind::Advice { .. });
            for advice in b.decisions.iter().filter(is_advice) {
                assert!(advice.reason.starts_with("not followed: "), "{}", advice.reason);
                *seen.entry(format!("{:?}", advice.by)).or_insert(0) += 1;
            }
            let followed = |line: &TraceLine| -> Vec<DecisionKind> {
                let kinds = line.decisions.iter().filter(|decision| !is_advice(decision));
                kinds.map(|decision| decision.kind.clone()).collect()
            };
            assert_eq!(followed(a), followed(b));
        }
        assert!(seen.len() == 2 && seen.values().all(|count| *count > 3), "{seen:?}");
        check_replay(&shadowed, &config);
    }
}

fn stage(name: &str, weights: [f64; 3]) -> MixtureStage {
    let names = ["web", "wiki", "code"].map(str::to_owned);
    MixtureStage {
        name: name.into(),
        from_step: None,
        from_tokens: None,
        on_plateau_after_steps: None,
        weights: names
            .into_iter()
            .zip(weights)
            .filter(|(_, weight)| *weight > 0.0)
            .collect(),
    }
}

fn shares(line: &TraceLine) -> Vec<f64> {
    line.mixture.iter().map(|(_, share)| *share).collect()
}

/// Stages begin at just the step that the config says, by step or by tokens, on a ramp too, and are announced before.
#[test]
fn stages_begin_on_time() {
    let mut config = mixture_loop(&MixtureConfig {
        controller: ControllerKind::Schedule,
        stages: vec![
            MixtureStage {
                from_step: Some(333),
                ..stage("knowledge", [1.0, 3.0, 0.0])
            },
            MixtureStage {
                from_tokens: Some(32 * CONTEXT_TOKENS * 600 - 5),
                ..stage("target", [0.0, 1.0, 1.0])
            },
        ],
        ..ado()
    });
    for ramped in [false, true] {
        if ramped {
            config.batch = BatchSchedule::of(&tarazed_domain::config::BatchConfig {
                lanes: 8,
                sequences_per_lane: 4,
                micro_batch_sequences: 1,
                ramp: Some(BatchRamp {
                    start_sequences: 8,
                    step_sequences: 8,
                    samples: 2_000,
                }),
            });
        }
        let mut world = World::of(laws(), &config);
        world.run(800);
        let by_tokens = world
            .lines
            .iter()
            .position(|line| line.tokens >= 32 * CONTEXT_TOKENS * 600 - 5)
            .unwrap()
            + 1;
        assert_eq!(by_tokens == 600, !ramped);
        assert_eq!(
            shares(&world.lines[332]),
            [0.6, 0.3, 0.1].map(|w: f64| w / (0.6 + 0.3 + 0.1))
        );
        assert_eq!(shares(&world.lines[333]), [0.25, 0.75, 0.0]);
        assert_eq!(shares(&world.lines[by_tokens - 1]), [0.25, 0.75, 0.0]);
        assert_eq!(shares(&world.lines[by_tokens]), [0.0, 0.5, 0.5]);
        let made = world.mixtures();
        assert_eq!(made.len(), 2);
        assert!(
            made[0].line == StepsCompleted(300) && made[0].reason.contains("knowledge"),
            "{:?}",
            made[0]
        );
        check_replay(&world, &config);
    }
}

/// A stage may wait for a plateau; a pin holds it back, and a release lets it begin.
#[test]
fn a_stage_waits_for_a_plateau() {
    let config = mixture_loop(&MixtureConfig {
        controller: ControllerKind::Schedule,
        stages: vec![MixtureStage {
            on_plateau_after_steps: Some(200),
            ..stage("knowledge", [1.0, 3.0, 0.0])
        }],
        ..ado()
    });
    let flat = || {
        let mut laws = laws();
        laws.iter_mut().for_each(|law| law.scale = 0.0);
        laws
    };
    let mut falling = World::of(laws(), &config);
    falling.run(600);
    assert!(falling.mixtures().is_empty());
    let mut world = World::of(flat(), &config);
    world.ate.request(ask(DecisionKind::Pin)).unwrap();
    world.run(500);
    assert_eq!(world.mixtures().len(), 1, "the pin alone");
    world.ate.request(ask(DecisionKind::Release)).unwrap();
    world.run(100);
    let began = world.mixtures().last().copied().cloned().unwrap();
    assert_eq!((began.line, began.effective), (StepsCompleted(550), StepIndex(558)));
    check_replay(&world, &config);
}

/// Bounds follow the losses, and a step beyond them would be skipped by every rank, whatever the mixture.
#[test]
fn skip_bounds_come_from_committed_lines() {
    let mut config = mixture_loop(&with(ControllerKind::Static));
    config.policy.spikes = SpikePolicy::Skip;
    let mut world = World::of(laws(), &config);
    world.run(400);
    assert_eq!(world.mixtures().len(), 7, "at 100, 150 and so on");
    let plan = world.cursor.plan(StepIndex(400)).unwrap();
    let bounds = plan.directives.bounds.clone().unwrap();
    assert_eq!(world.cursor.plan(StepIndex(107)).unwrap().directives.bounds, None);
    let losses = |more: f64| -> Vec<crate::data::stats::LossSum> {
        let counts = plan.counts.iter().zip(&bounds.expected);
        counts
            .map(|(count, expected)| crate::data::stats::LossSum {
                loss_sum: f64::from(*count) * 64.0 * (expected.unwrap() + more),
                tokens: u64::from(*count) * 64,
            })
            .collect()
    };
    assert!(!plan.directives.skips(&losses(0.05), 1.1));
    assert!(plan.directives.skips(&losses(0.5), 1.1) && plan.directives.skips(&losses(0.0), 5.0));
    check_replay(&world, &config);
}

/// Each rule ends the run in time for a person to object, and speaks once.
#[test]
fn the_run_stops_by_its_rules() {
    let stop = |rules: StopRules, laws: Vec<Law>, objects: bool| {
        let mut config = mixture_loop(&with(ControllerKind::Static));
        config.policy.stop = rules;
        let mut world = World::of(laws, &config);
        for _ in 0..900 {
            world.step(|_| ());
            let stop = world.lines.last().unwrap().decisions.first().cloned();
            if let Some(stop) = stop.filter(|stop| objects && stop.kind == DecisionKind::Stop) {
                world
                    .ate
                    .request(ask(DecisionKind::Veto { decision: stop.id }))
                    .unwrap();
            }
        }
        check_replay(&world, &config);
        let made = world
            .mixtures()
            .into_iter()
            .map(|decision| (decision.line.0, decision.effective.0))
            .collect();
        (made, world.ate.course().stop())
    };
    let tokens = StopRules {
        tokens: Some(700 * 32 * CONTEXT_TOKENS + 1),
        ..StopRules::default()
    };
    let made: (Vec<(u64, u64)>, _) = stop(tokens, laws(), false);
    assert_eq!(made, (vec![(650, 701)], Some(StepIndex(701))));
    let plateau = || StopRules {
        plateau_after_steps: Some(300),
        ..StopRules::default()
    };
    let flat = || {
        let mut laws = laws();
        laws.iter_mut().for_each(|law| law.scale = 0.0);
        laws
    };
    assert_eq!(stop(plateau(), laws(), false), (vec![], None));
    assert_eq!(stop(plateau(), flat(), false), (vec![(300, 358)], Some(StepIndex(358))));
    // The veto is decided at line 350 and acts from 358 on: just in time.
    assert_eq!(stop(plateau(), flat(), true), (vec![(300, 358), (350, 358)], None));
    let loss = StopRules {
        heldout_loss: Some(4.0),
        ..StopRules::default()
    };
    let (made, at) = stop(loss, laws(), false);
    assert!(
        made.len() == 1 && at.is_some_and(|at| at.0 == made[0].0 + 58),
        "{made:?}"
    );
}

/// A `wsd` schedule decays where a plateau or a person says so, and at no other time.
#[test]
fn decay_begins_on_demand() {
    let mut config = mixture_loop(&with(ControllerKind::Static));
    config.policy.decay_on_plateau = true;
    config.rate = LearningRateSchedule::Wsd {
        warmup_steps: 10,
        decay_from: None,
        decay_steps: 100,
        final_fraction: 0.0,
        shape: tarazed_domain::config::DecayShape::Linear,
    };
    let mut laws = laws();
    laws.iter_mut().for_each(|law| law.scale = 0.0);
    let mut world = World::of(laws, &config);
    world.run(400);
    let from = world.ate.course().decay().unwrap();
    assert_eq!(
        from,
        StepIndex(358),
        "a plateau is seen at 256 lines, at 300 it is decided"
    );
    let rate = |step: u64| config.rate.fraction_with(step, Some(from.0));
    assert!(rate(357) == 1.0 && rate(358) == 0.99 && rate(457) == 0.0 && rate(9999) == 0.0);
    check_replay(&world, &config);
    let refused = world.ate.request(ask(DecisionKind::Decay)).unwrap_err().to_string();
    assert!(refused.contains("already"), "{refused}");
    let mut constant = World::new(self::laws(), &ado());
    let refused = constant.ate.request(ask(DecisionKind::Decay)).unwrap_err().to_string();
    assert!(refused.contains("wsd"), "{refused}");
}

/// Once the rate decays, the mixture stands.
#[test]
fn mixtures_are_frozen_in_the_decay() {
    let mut config = mixture_loop(&ado());
    config.rate = LearningRateSchedule::Wsd {
        warmup_steps: 10,
        decay_from: Some(700),
        decay_steps: 300,
        final_fraction: 0.1,
        shape: tarazed_domain::config::DecayShape::Sqrt,
    };
    let mut world = World::of(laws(), &config);
    world.run(1000);
    let last = world.mixtures().last().map(|decision| decision.effective.0);
    assert!(last.is_some_and(|last| (600..700).contains(&last)), "{last:?}");
    check_replay(&world, &config);
}

/// LOOP-2: with `policy.persons` a static run has decision points, and what contradicts is refused when it is asked.
#[test]
fn persons_decide_in_a_static_run() {
    let mut config = mixture_loop(&with(ControllerKind::Static));
    config.policy.persons = true;
    let mut world = World::of(laws(), &config);
    world.run(120);
    let force = |weights: [f64; 3]| {
        ask(DecisionKind::Mixture {
            weights: weights.to_vec(),
        })
    };
    let due = world.ate.request(force([0.2, 0.2, 0.6])).unwrap();
    assert_eq!(due, (StepsCompleted(150), StepIndex(158)));
    let twice = world.ate.request(force([0.1, 0.1, 0.8])).unwrap_err().to_string();
    assert!(twice.contains("contradicts decision 1"), "{twice}");
    let veto = |id| {
        ask(DecisionKind::Veto {
            decision: DecisionId(id),
        })
    };
    assert!(world.ate.request(veto(7)).is_err());
    assert!(
        world.ate.request(ask(DecisionKind::Release)).is_err(),
        "nothing is pinned"
    );
    let advice = DecisionKind::Advice { weights: vec![1.0; 3] };
    assert!(world.ate.request(ask(advice)).is_err());
    world
        .ate
        .request(ask(DecisionKind::LearningRate { factor: 0.5 }))
        .unwrap();
    world.run(80);
    world.ate.request(veto(1)).unwrap();
    world.run(100);
    assert_eq!(shares(&world.lines[158]), [0.2, 0.2, 0.6]);
    assert_eq!(shares(&world.lines[258]), shares(&world.lines[100]));
    assert_eq!(world.cursor.plan(StepIndex(200)).unwrap().directives.rate_factor, 0.5);
    check_replay(&world, &config);
}
