//! Tests of the walk.

use super::*;

pub fn config() -> Config {
    Config {
        seed: 7,
        context: 16,
        sequences_per_step: 4,
        ramp: None,
        domains: vec![("a".into(), 3.0), ("b".into(), 1.0)],
        decision_points: Some((4, 4)),
        lag_steps: 2,
        evaluation_interval_steps: 0,
        held_out_sequences_max: 0,
    }
}

pub fn domains() -> Vec<Domain> {
    let domain = |name: &str, train_sequences| Domain {
        name: name.into(),
        train_sequences,
        train_tokens: train_sequences * 16 + 1,
        held_out_sequences: 0,
    };
    vec![domain("a", 10), domain("b", 7)]
}

fn walk() -> Walk {
    Walk::new(&config(), &domains(), [1; 32]).unwrap()
}

#[test]
fn every_sample_of_an_epoch_is_used_once() {
    let (mut walk, mut findings) = (walk(), Findings::default());
    for _ in 0..70 {
        let plan = walk.plan(&mut findings);
        assert_eq!(plan.samples.len(), 4);
        walk.settle(&plan, true, &mut findings);
    }
    assert_eq!(findings.count(), 0);
    let usage = walk.usage();
    assert_eq!(
        (usage[0].samples, usage[0].whole_epochs, usage[0].of_last_epoch),
        (210, 21, 0)
    );
    assert_eq!(
        (usage[1].samples, usage[1].whole_epochs, usage[1].of_last_epoch),
        (70, 10, 0)
    );
}

#[test]
fn a_step_without_proof_and_one_that_comes_twice_are_noticed() {
    let (mut walk, mut findings) = (walk(), Findings::default());
    for step in 0..8 {
        let plan = walk.plan(&mut findings);
        walk.settle(&plan, step != 1, &mut findings);
    }
    assert!(
        findings.to_string().contains("BAD a: epoch 0: 3 of 10 samples"),
        "{findings}"
    );
    let (mut walk, mut findings) = (self::walk(), Findings::default());
    let plan = walk.plan(&mut findings);
    walk.settle(&plan, true, &mut findings);
    walk.settle(&plan, true, &mut findings);
    assert_eq!(
        findings.to_string().matches("is used twice in epoch 0").count(),
        4,
        "{findings}"
    );
}

#[test]
fn decisions_act_when_they_say_and_rules_are_kept() {
    let decision = |id, line, effective, weights: &[f64]| Decision {
        id,
        line,
        effective,
        weights: Some(weights.to_vec()),
        veto: None,
        change: None,
        rollback: None,
        limit: None,
    };
    let (mut walk, mut findings) = (walk(), Findings::default());
    let config = config();
    for _ in 0..4 {
        walk.plan(&mut findings);
    }
    walk.decide(&config, 4, &[decision(1, 4, 7, &[0.0, 1.0])]).unwrap();
    let b_alone: Vec<bool> = (4..9).map(|_| walk.plan(&mut findings).counts == [0, 4]).collect();
    assert_eq!(b_alone, [false, false, false, true, true]);
    let mut refused = |step, decision: Decision, part: &str| {
        let said = walk.decide(&config, step, &[decision]).unwrap_err();
        assert!(said.contains(part), "{said}");
    };
    refused(9, decision(2, 9, 20, &[1.0, 1.0]), "no decision point");
    refused(12, decision(2, 8, 20, &[1.0, 1.0]), "belongs to line 8");
    refused(12, decision(1, 12, 20, &[1.0, 1.0]), "comes behind decision 1");
    refused(12, decision(2, 12, 13, &[1.0, 1.0]), "sooner than 2 steps");
    refused(12, decision(2, 12, 20, &[1.0]), "1 weights for 2 domains");
    walk.decide(&config, 12, &[decision(5, 12, 20, &[1.0, 1.0])]).unwrap();
    assert!(
        walk.decide(&config, 12, &[decision(6, 12, 20, &[1.0, 2.0])])
            .unwrap_err()
            .contains("has a mixture already")
    );
}

#[test]
fn a_veto_brings_back_what_was_before() {
    let sets = |id, line, weights: &[f64]| Decision {
        id,
        line,
        effective: line + 2,
        weights: Some(weights.to_vec()),
        veto: None,
        change: None,
        rollback: None,
        limit: None,
    };
    let vetoes = |id, line, which| Decision {
        id,
        line,
        effective: line + 2,
        weights: None,
        veto: Some(which),
        change: None,
        rollback: None,
        limit: None,
    };
    let (mut walk, mut findings) = (walk(), Findings::default());
    let config = config();
    walk.decide(&config, 4, &[sets(1, 4, &[0.0, 1.0])]).unwrap();
    walk.decide(&config, 8, &[vetoes(2, 8, 1)]).unwrap();
    let b_alone: Vec<bool> = (0..12).map(|_| walk.plan(&mut findings).counts == [0, 4]).collect();
    let expected: Vec<bool> = (0..12).map(|step| (6..10).contains(&step)).collect();
    assert_eq!(b_alone, expected);
    walk.decide(&config, 12, &[sets(3, 12, &[0.0, 1.0])]).unwrap();
    walk.decide(&config, 16, &[sets(4, 16, &[1.0, 1.0])]).unwrap();
    let late = walk.decide(&config, 20, &[vetoes(5, 20, 3)]).unwrap_err();
    assert!(late.contains("not in force any more"), "{late}");
    let twice = walk.decide(&config, 20, &[vetoes(6, 20, 1)]).unwrap_err();
    assert!(twice.contains("vetoed already"), "{twice}");
}

fn edition(name: &str, domain: u16, train_sequences: u64, held_out_sequences: u64) -> super::super::line::Edition {
    super::super::line::Edition {
        name: name.into(),
        domain,
        index: 0,
        train_sequences,
        train_tokens: train_sequences * 16 + 1,
        held_out_sequences,
    }
}

fn changes(
    id: u64,
    line: u64,
    effective: u64,
    editions: Vec<super::super::line::Edition>,
    weights: &[f64],
) -> Decision {
    Decision {
        id,
        line,
        effective,
        weights: Some(weights.to_vec()),
        veto: None,
        change: Some(Change {
            version: "0a".repeat(32),
            editions,
        }),
        rollback: None,
        limit: None,
    }
}

#[test]
fn new_text_begins_at_its_first_sample_and_the_rest_goes_on() {
    let (mut walk, mut findings) = (walk(), Findings::default());
    let (mut plain, config) = (self::walk(), config());
    let both = vec![edition("b", 1, 5, 9), edition("c", 2, 6, 3)];
    walk.decide(&config, 4, &[changes(1, 4, 8, both, &[2.0, 1.0, 1.0])])
        .unwrap();
    let mut drawn: Vec<Vec<(u32, u64)>> = vec![Vec::new(); 3];
    let mut of_a = Vec::new();
    for step in 0..60 {
        let (plan, other) = (walk.plan(&mut findings), plain.plan(&mut findings));
        assert_eq!(plan.data == other.data, step < 8, "step {step}");
        assert_eq!(plan.counts.len(), if step < 8 { 2 } else { 3 });
        walk.settle(&plan, true, &mut findings);
        for (domain, epoch, sample) in &plan.samples {
            if *domain == 0 || step >= 8 {
                drawn[usize::from(*domain)].push((*epoch, *sample));
            }
        }
        let a = other.samples.iter().filter(|(domain, ..)| *domain == 0);
        of_a.extend(a.map(|(_, epoch, sample)| (*epoch, *sample)));
    }
    assert_eq!(findings.count(), 0, "{findings}");
    assert_eq!(drawn[0], of_a[..drawn[0].len()]);
    for (domain, samples) in [(1, 5), (2, 6)] {
        let mut first: Vec<(u32, u64)> = drawn[domain][..samples as usize].to_vec();
        first.sort_unstable();
        assert!(first.into_iter().eq((0..samples).map(|sample| (0, sample))));
    }
    let held_out: Vec<(&str, u64)> = walk.held_out().collect();
    assert_eq!(held_out, [("a", 0), ("b", 0), ("c", 3)], "what is held out of b stays");
    let usage = walk.usage();
    assert_eq!((usage.len(), usage[0].name.as_str()), (4, "b, replaced at step 8"));
    assert_eq!(usage.iter().map(|usage| usage.samples).sum::<u64>(), 240);
}

#[test]
fn changes_of_the_data_keep_the_rules() {
    let config = config();
    let refused = |decision: Decision, part: &str| {
        let said = walk().decide(&config, 4, &[decision]).unwrap_err();
        assert!(said.contains(part), "{said}");
    };
    let of = |editions, weights: &[f64]| changes(1, 4, 8, editions, weights);
    refused(of(vec![edition("c", 2, 6, 0)], &[1.0; 2]), "2 weights for 3 domains");
    refused(of(vec![edition("c", 3, 6, 0)], &[1.0; 4]), "cannot be domain 3");
    refused(of(vec![edition("a", 2, 6, 0)], &[1.0; 3]), "cannot be domain 2");
    refused(of(vec![edition("c", 1, 6, 0)], &[1.0; 2]), "cannot be domain 1");
    refused(
        of(vec![edition("b", 1, 6, 0), edition("b", 1, 6, 0)], &[1.0; 2]),
        "cannot be domain 1",
    );
    refused(of(vec![edition("c", 2, 0, 0)], &[1.0; 3]), "cannot be domain 2");
    refused(of(vec![edition("c", 2, 1 << 40, 0)], &[1.0; 3]), "above the limit");
    refused(of(vec![], &[1.0; 2]), "brings no domain");
    let mut walk = walk();
    walk.decide(&config, 4, &[of(vec![edition("c", 2, 6, 0)], &[1.0; 3])])
        .unwrap();
    let veto = |which| Decision {
        id: 2,
        line: 8,
        effective: 20,
        weights: None,
        veto: Some(which),
        change: None,
        rollback: None,
        limit: None,
    };
    assert!(
        walk.decide(&config, 8, &[veto(1)])
            .unwrap_err()
            .contains("cannot be taken back")
    );
    let earlier = changes(3, 12, 14, vec![edition("d", 3, 6, 0)], &[1.0; 4]);
    walk.decide(&config, 12, &[earlier]).unwrap();
    let before = changes(4, 12, 14, vec![edition("e", 4, 6, 0)], &[1.0; 5]);
    assert!(
        walk.decide(&config, 12, &[before])
            .unwrap_err()
            .contains("decided already")
    );
}

/// A domain at its limit is not drawn whatever is decided, until other text comes for it; where nothing is left, all are.
#[test]
fn a_domain_at_its_limit_leaves_its_weight_to_the_others() {
    let mut config = config();
    config.decision_points = Some((1, 1));
    let mut walk = Walk::new(&config, &domains(), [1; 32]).unwrap();
    let mixture = |id, line, effective, weights: &[f64]| Decision {
        change: None,
        ..changes(id, line, effective, Vec::new(), weights)
    };
    let limit = |id, line, effective, domain| Decision {
        weights: None,
        limit: Some(domain),
        ..mixture(id, line, effective, &[])
    };
    let mut decide = |decision: Decision| walk.decide(&config, decision.line, &[decision]);
    decide(limit(1, 1, 6, 0)).unwrap();
    decide(mixture(2, 2, 8, &[1.0, 1.0])).unwrap();
    decide(changes(3, 3, 10, vec![edition("a", 0, 9, 0)], &[1.0, 1.0])).unwrap();
    decide(limit(4, 4, 12, 0)).unwrap();
    decide(limit(5, 5, 14, 1)).unwrap();
    assert!(decide(limit(6, 6, 15, 1)).unwrap_err().contains("at its limit already"));
    assert!(decide(limit(7, 7, 15, 2)).unwrap_err().contains("is none"));
    let veto = Decision {
        limit: None,
        veto: Some(4),
        ..limit(8, 8, 16, 0)
    };
    decide(veto).unwrap();
    let mut findings = Findings::default();
    let shares: Vec<Vec<f64>> = (0..17)
        .map(|_| {
            let shares = walk.mixture().shares;
            let plan = walk.plan(&mut findings);
            walk.settle(&plan, true, &mut findings);
            shares
        })
        .collect();
    let in_force = [
        (0..6, [0.75, 0.25]),
        (6..10, [0.0, 1.0]),
        (10..12, [0.5, 0.5]),
        (12..14, [0.0, 1.0]),
        (14..16, [0.5, 0.5]),
        (16..17, [1.0, 0.0]),
    ];
    for (steps, expected) in in_force {
        for step in steps {
            assert_eq!(shares[step], expected, "step {step}");
        }
    }
    assert_eq!(findings.count(), 0, "{findings}");
}

/// Shares of new domains are of the mixture that comes to be in force before their step, whatever is decided or taken back for it
/// since; so is what a veto brings back of them.
#[test]
fn new_domains_share_the_mixture_before_them() {
    let mut config = config();
    config.decision_points = Some((1, 1));
    let mut walk = Walk::new(&config, &domains(), [1; 32]).unwrap();
    let decide = |walk: &mut Walk, decision: Decision| walk.decide(&config, decision.line, &[decision]).unwrap();
    let mixture = |id, line, effective, weights: &[f64]| Decision {
        change: None,
        ..changes(id, line, effective, Vec::new(), weights)
    };
    let veto = |id, line, effective, which| Decision {
        weights: None,
        veto: Some(which),
        ..mixture(id, line, effective, &[])
    };
    let at = |walk: &Walk, step: u64, expected: &[f64]| {
        let (_, setting) = walk.mixtures.range(..=step).next_back().unwrap();
        let shares = &setting.mixture.shares;
        assert!(
            shares.len() == expected.len() && shares.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12),
            "step {step}: {shares:?}, not {expected:?}"
        );
    };
    decide(&mut walk, changes(1, 1, 30, vec![edition("c", 2, 6, 0)], &[0.2]));
    at(&walk, 30, &[0.6, 0.2, 0.2]);
    decide(&mut walk, mixture(2, 2, 40, &[1.0, 1.0, 2.0]));
    decide(&mut walk, veto(3, 3, 50, 2));
    decide(&mut walk, mixture(4, 4, 20, &[1.0, 1.0]));
    at(&walk, 29, &[0.5, 0.5]);
    at(&walk, 30, &[0.4, 0.4, 0.2]);
    at(&walk, 40, &[0.25, 0.25, 0.5]);
    at(&walk, 50, &[0.4, 0.4, 0.2]);
    decide(&mut walk, veto(5, 5, 20, 4));
    at(&walk, 50, &[0.6, 0.2, 0.2]);
    let none = changes(6, 6, 60, vec![edition("d", 3, 6, 0)], &[1.0]);
    assert!(walk.decide(&config, 6, &[none]).unwrap_err().contains("leave nothing"));
}

#[test]
fn batches_grow_along_a_ramp() {
    let mut config = config();
    config.ramp = Some(super::super::config::Ramp {
        start: 1,
        step: 3,
        samples: 5,
    });
    let mut walk = Walk::new(&config, &domains(), [1; 32]).unwrap();
    let mut findings = Findings::default();
    let mut tokens = Vec::new();
    let sizes: Vec<usize> = (0..7)
        .map(|_| {
            tokens.push(walk.tokens_with_next(&config));
            walk.plan(&mut findings).samples.len()
        })
        .collect();
    assert_eq!(sizes, [1, 1, 1, 1, 1, 4, 4]);
    assert_eq!(tokens, [16, 32, 48, 64, 80, 144, 208]);
}

#[test]
fn the_data_hash_depends_on_the_version_and_the_samples() {
    let mut findings = Findings::default();
    let mut other = Walk::new(&config(), &domains(), [2; 32]).unwrap();
    let (mut first, second) = (walk(), other.plan(&mut findings).data);
    let own = first.plan(&mut findings).data;
    assert_ne!(own, second);
    assert_ne!(own, first.plan(&mut findings).data);
    let mut names = domains();
    names.swap(0, 1);
    assert!(Walk::new(&config(), &names, [1; 32]).is_err());
}
