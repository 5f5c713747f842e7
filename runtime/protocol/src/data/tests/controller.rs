use super::*;
use crate::data::controller::{LN_CHANGE_MAX, Request, SPIKE_FREEZE_LINES, weight_floor};

fn decisions_of(lines: &[TraceLine]) -> Vec<Vec<Decision>> {
    lines.iter().map(|line| line.decisions.clone()).collect()
}

/// LOOP-1: the same lines lead to the same decisions: fed again whole, and rebuilt from any prefix.
#[test]
fn same_trace_same_decisions() {
    let mut world = World::new(laws(), &ado());
    world.run(1000);
    let made = decisions_of(&world.lines);
    assert!(
        made.iter().flatten().count() > 8,
        "the loop must have decided something"
    );
    let facts = facts(&world.laws);
    let (mut tsm, mut ate) = (Tsm::new(facts.clone()), engine(&ado(), &facts));
    for (line, made) in world.lines.iter().zip(&made) {
        let mut bare = line.clone();
        bare.decisions.clear();
        let signals = tsm.on_line(&bare).unwrap();
        assert_eq!(&ate.on_line(&bare, &signals), made, "line {}", line.step);
    }
    for prefix in [1, 99, 100, 499, 500, 501, 777] {
        let (mut tsm, mut ate) = (Tsm::new(facts.clone()), engine(&ado(), &facts));
        for line in &world.lines[..prefix] {
            // What a new controller reads: the printed trace.
            let line = TraceLine::parse(&line.print(), 1).unwrap();
            let signals = tsm.on_line(&line).unwrap();
            ate.replay(&line, &signals).unwrap();
        }
        for line in &world.lines[prefix..] {
            let mut bare = line.clone();
            bare.decisions.clear();
            let signals = tsm.on_line(&bare).unwrap();
            assert_eq!(
                ate.on_line(&bare, &signals),
                line.decisions,
                "prefix {prefix}, line {}",
                line.step
            );
        }
    }
}

/// LOOP-1: a trace whose decisions do not follow from it is refused, and the line is named.
#[test]
fn an_edited_trace_is_refused() {
    let mut world = World::new(laws(), &ado());
    world.run(600);
    let at = world.lines.iter().position(|line| !line.decisions.is_empty()).unwrap();
    if let DecisionKind::Mixture { weights } = &mut world.lines[at].decisions[0].kind {
        weights[0] += 1e-6;
    }
    let facts = facts(&world.laws);
    let (mut tsm, mut ate) = (Tsm::new(facts.clone()), engine(&ado(), &facts));
    let mismatch = world.lines.iter().find_map(|line| {
        let signals = tsm.on_line(line).unwrap();
        ate.replay(line, &signals).err()
    });
    assert_eq!(mismatch.unwrap().line, world.lines[at].step);
}

/// Decisions only at decision points, with the stated lag, inside all guards, each saying what it used.
#[test]
fn every_update_keeps_the_guards() {
    let mut world = World::new(laws(), &ado());
    world.run(3000);
    let mut current: Vec<f64> = world.laws.iter().map(|law| law.weight).collect();
    let floor = weight_floor(3);
    for decision in world.mixtures() {
        assert!(decision.line.0 >= 100 && decision.line.0.is_multiple_of(50));
        assert_eq!(decision.effective.0, decision.line.0 + 8);
        assert!(
            decision.reason.contains("L=") && decision.reason.len() < 1000,
            "{}",
            decision.reason
        );
        let DecisionKind::Mixture { weights } = &decision.kind else {
            panic!("{decision:?}");
        };
        assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        for (new, old) in weights.iter().zip(&current) {
            assert!(*new >= floor.min(old * 1.2) - 2e-6, "{weights:?}");
            assert!(
                (new / old).ln().abs() <= LN_CHANGE_MAX + 1e-4,
                "{current:?} -> {weights:?}"
            );
        }
        current.clone_from(weights);
    }
    assert!(
        current[2] > 0.15,
        "the domain that still learns most gains: {current:?}"
    );
}

/// A domain that hardly learns sinks to the floor, and no further.
#[test]
fn no_weight_sinks_below_the_floor() {
    let mut laws = laws();
    (laws[2].floor, laws[2].scale) = (2.0, 0.5);
    let mut world = World::new(laws, &ado());
    world.noise = 0.001;
    world.run(3000);
    let least = world.ate.mixture(StepIndex(u64::MAX))[2];
    assert!((least - weight_floor(3)).abs() < 1e-5, "{least}");
}

/// However little a domain promises, a quarter of its configured weight is left to it.
#[test]
fn the_configured_mixture_holds_on() {
    let mut laws = laws();
    (laws[0].floor, laws[0].scale) = (2.5, 0.5);
    let mut world = World::new(laws, &ado());
    world.noise = 0.001;
    world.run(3000);
    let web = world.ate.mixture(StepIndex(u64::MAX))[0];
    assert!((0.15..0.25).contains(&web), "{web}");
}

/// The reason holds the numbers the decision was made of.
#[test]
fn reasons_hold_the_inputs() {
    let mut world = World::new(laws(), &ado());
    world.noise = 0.001;
    world.run(1000);
    let decision = world.mixtures().into_iter().last().cloned().unwrap();
    let line = &world.lines[decision.line.0 as usize - 1];
    assert!(
        decision.reason.starts_with(&format!("held-out at {};", line.step)),
        "{}",
        decision.reason
    );
    for (part, (name, heldout)) in decision
        .reason
        .split("; ")
        .skip(1)
        .zip(line.heldout.as_ref().unwrap().iter())
    {
        assert!(part.starts_with(name), "{part}");
        let number = |key: &str| -> f64 {
            let field = part.split(' ').find_map(|field| field.strip_prefix(key));
            field.unwrap().parse().unwrap()
        };
        assert!((number("L=") - heldout.loss).abs() < 0.01, "{part}: {}", heldout.loss);
        assert!(number("e=") < heldout.loss && number("a=") > 0.0 && number("n=") > 0.0);
    }
}

/// The controller must move towards what it is told pays most, for either domain.
#[test]
fn weight_follows_progress() {
    let last = |fast: usize| {
        let mut laws = vec![
            law("a", 0.5, 1_000_000, 2.0, 15.0, 0.22),
            law("b", 0.5, 1_000_000, 2.0, 15.0, 0.22),
        ];
        laws[fast].scale = 60.0;
        let mut world = World::new(laws, &ado());
        world.run(2000);
        world.ate.mixture(StepIndex(u64::MAX)).to_vec()
    };
    assert!(last(0)[0] > 0.6 && last(1)[1] > 0.6, "{:?} {:?}", last(0), last(1));
}

/// Domains that learn alike keep an even mixture: no drift without evidence.
#[test]
fn equal_domains_keep_an_even_mixture() {
    let laws = vec![
        law("a", 1.0, 1_000_000, 2.0, 20.0, 0.22),
        law("b", 1.0, 1_000_000, 2.0, 20.0, 0.22),
        law("c", 1.0, 1_000_000, 2.0, 20.0, 0.22),
    ];
    let mut world = World::new(laws, &ado());
    world.noise = 0.01;
    world.run(2000);
    for weight in world.ate.mixture(StepIndex(u64::MAX)) {
        assert!(
            (weight - 1.0 / 3.0).abs() < 0.08,
            "{:?}",
            world.ate.mixture(StepIndex(u64::MAX))
        );
    }
}

/// A small domain, however fast it learns, is not passed over without end.
#[test]
fn repeats_are_bounded() {
    let mut laws = laws();
    laws[2].train_sequences = 600; // 0.1 of the mixture would pass over it 26 times in 5000 steps
    let mut world = World::new(laws, &ado());
    let mut epochs = 0.0;
    for _ in 0..5000 {
        epochs = world.step(|_| ()).domains[2].epochs;
    }
    let share = world.ate.mixture(StepIndex(u64::MAX))[2];
    assert!(epochs < 6.0, "{epochs} epochs");
    assert!(share < 0.01, "it sinks below the floor: {share}");
}

/// Nothing is decided within 64 lines of a spike.
#[test]
fn spikes_freeze_decisions() {
    let mut calm = World::new(laws(), &ado());
    let mut hit = World::new(laws(), &ado());
    calm.run(900);
    for step in 1..=900_u64 {
        hit.step(|line| {
            if step == 640 {
                line.loss += 3.0;
                for (_, domain) in &mut line.domains.0 {
                    domain.loss += 3.0;
                }
            }
        });
    }
    let decided = |world: &World, line: u64| !world.lines[line as usize - 1].decisions.is_empty();
    assert!(decided(&calm, 650) && decided(&calm, 700) && decided(&calm, 750));
    assert!(
        !decided(&hit, 650) && !decided(&hit, 700),
        "lines 640 to {} are frozen",
        640 + SPIKE_FREEZE_LINES
    );
    assert!(decided(&hit, 750));
}

/// A domain with a loss that follows no law keeps its weight; the others still move.
#[test]
fn a_domain_without_a_fit_keeps_its_weight() {
    let mut world = World::new(laws(), &ado());
    for step in 1..=1500_u64 {
        world.step(|line| {
            if let Some((_, wiki)) = line.heldout.as_mut().map(|map| &mut map.0[1]) {
                wiki.loss = 5.0 + 0.001 * step as f64;
            }
        });
    }
    let weights = world.ate.mixture(StepIndex(u64::MAX));
    assert!((weights[1] - 0.3).abs() < 0.01, "{weights:?}");
    assert!((weights[2] - 0.1).abs() > 0.02, "{weights:?}");
    let reason = &world.mixtures().last().unwrap().reason;
    assert!(
        reason.contains("wiki 0.3000->0.3000 no fit: the held-out loss does not fall"),
        "{reason}"
    );
}

/// Non-finite held-out losses are no evidence, and never reach a weight.
#[test]
fn poisoned_evaluations_decide_nothing() {
    let mut world = World::new(laws(), &ado());
    for _ in 0..800 {
        world.step(|line| {
            for (_, domain) in line.heldout.iter_mut().flat_map(|map| &mut map.0) {
                domain.loss = f64::NAN;
            }
        });
    }
    assert!(world.mixtures().is_empty());
}

/// LOOP-2: a person pins, forces and releases; each is a recorded decision, and a replay takes it from the trace.
#[test]
fn persons_pin_force_and_release() {
    let ask = |kind: DecisionKind, not_before: Option<u64>| Request {
        person: "ada".into(),
        kind,
        not_before: not_before.map(StepIndex),
        reason: "by hand".into(),
    };
    let forced = vec![0.2, 0.2, 0.6];
    let mut world = World::new(laws(), &ado());
    world.run(510);
    world.ate.request(ask(DecisionKind::Pin, None)).unwrap();
    let force = DecisionKind::Mixture {
        weights: forced.clone(),
    };
    world.ate.request(ask(force, Some(600))).unwrap();
    world.run(300);
    let in_line = |world: &World, line: usize| world.lines[line - 1].decisions.clone();
    assert_eq!(in_line(&world, 550).len(), 2);
    assert!(in_line(&world, 550).iter().all(|decision| decision.by.is_person()));
    assert_eq!(world.lines[599].mixture, world.lines[560].mixture);
    assert_eq!(
        world.lines[600].mixture.0.iter().map(|pair| pair.1).collect::<Vec<_>>(),
        forced
    );
    assert!(
        (600..=800).step_by(50).all(|line| in_line(&world, line).is_empty()),
        "pinned"
    );
    world.ate.request(ask(DecisionKind::Release, None)).unwrap();
    world.run(200);
    assert_eq!(in_line(&world, 850)[0].kind, DecisionKind::Release);
    assert!(
        in_line(&world, 850).len() == 2 && in_line(&world, 900).len() == 1,
        "decides again"
    );
    let facts = facts(&world.laws);
    let (mut tsm, mut ate) = (Tsm::new(facts.clone()), engine(&ado(), &facts));
    let mut ids = Vec::new();
    for line in &world.lines {
        let signals = tsm.on_line(line).unwrap();
        ate.replay(line, &signals).unwrap();
        ids.extend(line.decisions.iter().map(|decision| decision.id.0));
    }
    assert!(ids.iter().copied().eq(1..=ids.len() as u64), "{ids:?}");
}

#[test]
fn static_never_decides_and_refuses_requests() {
    let config = MixtureConfig::default();
    let mut world = World::new(laws(), &config);
    world.run(600);
    assert!(world.mixtures().is_empty());
    let refused = world.ate.request(Request {
        person: "ada".into(),
        kind: DecisionKind::Pin,
        not_before: None,
        reason: String::new(),
    });
    assert!(refused.unwrap_err().to_string().contains("no decision points"));
}
