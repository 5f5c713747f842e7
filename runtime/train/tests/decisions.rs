//! What decisions and the batch ramp do to a step on real ranks: the same in every world (DET-1, LOOP-1).
#![allow(clippy::unwrap_used)]

mod common;

use common::{ABSENT, NoStore, Node, Outcome, Said, Wanted, agreed, config_with, member, meshes, plan, reports, run};
use std::collections::BTreeMap;
use std::sync::Arc;
use tarazed_domain::config::Config;
use tarazed_domain::{StepIndex, StepsCompleted};
use tarazed_protocol::data::decision::{
    DataChange, Decision, DecisionAuthor, DecisionId, DecisionKind, DomainEdition, SpikeBounds,
};
use tarazed_protocol::data::stats::LaneStats;
use tarazed_protocol::message::StepLine;
use tarazed_train::StepError;
use tarazed_train::harm::{Harm, Place};

/// Every line is a decision point, and what it decides acts on the step behind it.
const OPEN: [&str; 4] = [
    "policy.persons=true",
    "mixture.start_steps=1",
    "mixture.interval_steps=1",
    "mixture.lag_steps=1",
];

fn decision(id: u64, effective: u64, kind: DecisionKind) -> Decision {
    Decision {
        id: DecisionId(id),
        line: StepsCompleted(effective - 1),
        effective: StepIndex(effective),
        kind,
        by: DecisionAuthor::Person("ada".into()),
        reason: String::new(),
    }
}

fn train(config: &Arc<Config>, ranks: u32, last_step: u64, decisions: &[Decision]) -> Vec<Outcome> {
    let wanted = Wanted {
        generation: 1,
        members: (0..ranks).map(member).collect(),
        replicas: ranks.min(2) as usize,
        last_step,
        ..Wanted::default()
    };
    let mut nodes: Vec<Node> = (0..ranks).map(|worker| Node::of(worker, config)).collect();
    let mut plan = plan(&wanted, &BTreeMap::new());
    plan.decisions = decisions.to_vec();
    plan.decided = StepsCompleted(100);
    let outcomes = run(&mut nodes, &plan, &mut meshes(&plan), &NoStore);
    for outcome in &outcomes {
        assert!(outcome.ended.is_ok(), "{:?}", outcome.ended);
    }
    outcomes
}

fn lines(outcomes: &[Outcome]) -> Vec<StepLine> {
    outcomes[0].lines().cloned().collect()
}

/// The lines of every world, which must be one.
fn everywhere(config: &Arc<Config>, last_step: u64, decisions: &[Decision]) -> Vec<StepLine> {
    let alone = lines(&train(config, 1, last_step, decisions));
    for ranks in 2..=4 {
        assert_eq!(
            lines(&train(config, ranks, last_step, decisions)),
            alone,
            "{ranks} ranks"
        );
    }
    alone
}

#[test]
fn a_decided_learning_rate_acts_from_its_step() {
    let config = config_with(&OPEN);
    let plain = everywhere(&config, 6, &[]);
    let halved = everywhere(
        &config,
        6,
        &[decision(1, 3, DecisionKind::LearningRate { factor: 0.5 })],
    );
    for (index, (a, b)) in plain.iter().zip(&halved).enumerate() {
        let factor = if index < 3 { 1.0 } else { 0.5 };
        assert_eq!(b.learning_rate, a.learning_rate * factor);
        assert_eq!(a.state == b.state, index < 3, "the state behind step {index}");
    }
    // Without decision points nothing else changes either.
    let closed = everywhere(&config_with(&[]), 6, &[]);
    assert_eq!(closed, plain);
}

/// A step beyond the bounds leaves weights and moments as they are, counts, and is said in its line.
#[test]
fn a_spike_is_skipped_by_everybody() {
    let config = config_with(&OPEN);
    let bounds = |grad_norm: f64| {
        DecisionKind::SpikeBounds(SpikeBounds {
            expected: vec![Some(5.0), None],
            residual_loss: 100.0,
            grad_norm,
        })
    };
    let decisions = [decision(1, 2, bounds(0.0)), decision(2, 4, bounds(1e9))];
    let skipping = everywhere(&config, 6, &decisions);
    let skipped: Vec<bool> = skipping.iter().map(|line| line.skipped).collect();
    assert_eq!(skipped, [false, false, true, true, false, false]);
    let plain = everywhere(&config, 6, &[]);
    assert_eq!(plain[..2], skipping[..2]);
    for (a, b) in plain.iter().zip(&skipping) {
        assert_eq!(a.data, b.data, "samples of a skipped step are used");
    }
    let saved = |last_step: u64| train(&config, 2, last_step, &decisions).remove(0).saved;
    assert_eq!(saved(2), saved(4), "two steps that change nothing");
    assert_ne!(saved(4), saved(5));
    assert_ne!(skipping[1].state, skipping[2].state, "the count is part of the state");
}

/// DET-3: a step that is skipped reads no state, but the weight trajectory may; what changed by itself is in no line (found by
/// the simulator).
#[test]
fn no_line_tells_of_weights_that_changed_during_a_skipped_step() {
    let config = config_with(&[&OPEN[..], &["monitor.weights_interval_steps=3"]].concat());
    let bounds = DecisionKind::SpikeBounds(SpikeBounds {
        expected: vec![Some(5.0), None],
        residual_loss: 100.0,
        grad_norm: 0.0,
    });
    let wanted = Wanted {
        generation: 1,
        members: vec![member(0)],
        replicas: 1,
        last_step: 4,
        ..Wanted::default()
    };
    let mut plan = plan(&wanted, &BTreeMap::new());
    plan.decisions = vec![decision(1, 2, bounds)];
    plan.decided = StepsCompleted(100);
    let mut nodes = vec![Node::of(0, &config)];
    nodes[0].state.harm = Some(Harm {
        step: StepIndex(2), // skipped, and its line has the weights
        place: Place::Master,
        shard: 1,
        element: 70,
        bit: 3,
        stuck: false,
    });
    let outcome = run(&mut nodes, &plan, &mut meshes(&plan), &NoStore).remove(0);
    assert!(
        matches!(outcome.ended, Err(StepError::Rotten { .. })),
        "{:?}",
        outcome.ended
    );
    assert_eq!(outcome.lines().count(), 2);
}

/// A domain that comes, and another text of the second one.
fn other_data(version: &str) -> DecisionKind {
    let edition = |name: &str, domain, index| DomainEdition {
        name: name.to_owned(),
        domain,
        index,
        language: "en".to_owned(),
        train_sequences: 40,
        train_tokens: 1_000,
    };
    let second = config_with(&OPEN).data.domains[1].name.clone();
    DecisionKind::Data(DataChange {
        version: version.to_owned(),
        domains: vec![edition("late", 2, 0), edition(&second, 1, 1)],
        weights: vec![1.0; 3],
    })
}

/// DATA-1, DATA-2, DET-1: data that change do so at one step in every world, with statistics of the new domain from there on.
#[test]
fn other_data_come_at_one_step_everywhere() {
    let config = config_with(&[&OPEN[..], &["evaluation.interval_steps=2"]].concat());
    let plain = everywhere(&config, 6, &[]);
    let changed = everywhere(&config, 6, &[decision(1, 3, other_data(&"0a".repeat(32)))]);
    assert_eq!(plain[..3], changed[..3]);
    for (index, (a, b)) in plain.iter().zip(&changed).enumerate().skip(3) {
        assert_ne!((&a.data, &a.state), (&b.data, &b.state), "step {index}");
        let stats = LaneStats::decode(&b.stats, 3).expect("three domains");
        assert!(stats.train()[2].tokens > 0, "step {index} trains on it");
        assert_eq!(
            stats.heldout()[2].tokens > 0,
            b.step.0 % 2 == 0,
            "and is measured by it"
        );
    }
}

/// A rank that must feed what it cannot open stops there, by name, and needs nothing of it before.
#[test]
fn a_data_set_that_is_not_there_is_named_at_its_step() {
    let config = config_with(&OPEN);
    let wanted = Wanted {
        generation: 1,
        members: vec![member(0)],
        replicas: 1,
        last_step: 6,
        ..Wanted::default()
    };
    let mut plan = plan(&wanted, &BTreeMap::new());
    plan.decisions = vec![decision(1, 4, other_data(ABSENT))];
    plan.decided = StepsCompleted(100);
    let mut nodes = vec![Node::of(0, &config)];
    let outcome = run(&mut nodes, &plan, &mut meshes(&plan), &NoStore).remove(0);
    let error = outcome.ended.as_ref().expect_err("it cannot go on");
    assert!(error.is_own_fault());
    let text = error.to_string();
    assert!(text.contains("step 4") && text.contains(ABSENT), "{text}");
    assert!(outcome.lines().all(|line| line.step.0 <= 4));
}

/// Lines of a run in which one rank dies at this exchange of a generation that a newcomer has joined, and whether it came to
/// that.
fn with_death(config: &Arc<Config>, decisions: &[Decision], dies: usize, dies_at: usize) -> (bool, Vec<StepLine>) {
    let mut trace: BTreeMap<StepsCompleted, StepLine> = BTreeMap::new();
    let mut take = |outcomes: &[Outcome]| {
        for line in outcomes.iter().flat_map(Outcome::lines) {
            let known = trace.entry(line.step).or_insert_with(|| line.clone());
            assert_eq!(known, line, "step {} has one result", line.step);
        }
        trace.keys().next_back().map_or(0, |step| step.0)
    };
    let mut wanted = Wanted {
        generation: 1,
        members: vec![member(0), member(1)],
        replicas: 2,
        last_step: 2,
        ..Wanted::default()
    };
    let decided = |wanted: &Wanted, outcomes: &[Outcome]| {
        let mut plan = plan(wanted, &reports(outcomes));
        plan.decisions = decisions.to_vec();
        plan.decided = StepsCompleted(100);
        plan
    };
    let mut nodes: Vec<Node> = (0..2).map(|worker| Node::of(worker, config)).collect();
    let first = decided(&wanted, &[]);
    let outcomes = run(&mut nodes, &first, &mut meshes(&first), &NoStore);
    wanted.acknowledged = take(&outcomes);

    (wanted.generation, wanted.last_step) = (2, 6);
    wanted.members.push(member(2));
    nodes.push(Node::of(2, config));
    let second = decided(&wanted, &outcomes);
    let mut ends = meshes(&second);
    ends[dies].die_at(dies_at);
    let mut outcomes = run(&mut nodes, &second, &mut ends, &NoStore);
    let died = ends[dies].is_dead();
    wanted.acknowledged = take(&outcomes);
    if died {
        nodes.remove(dies);
        outcomes.remove(dies);
        wanted.members.remove(dies);
    }

    (wanted.generation, wanted.last_step) = (3, 8);
    assert!(
        agreed(&reports(&outcomes), second.shards.shard_count()).is_some(),
        "two copies cover one death"
    );
    let third = decided(&wanted, &outcomes);
    let outcomes = run(&mut nodes, &third, &mut meshes(&third), &NoStore);
    for outcome in &outcomes {
        assert!(outcome.ended.is_ok(), "{:?}", outcome.ended);
    }
    take(&outcomes);
    (died, trace.into_values().collect())
}

/// STEP-2, LOOP-1: whoever dies whenever, steps that were cut short are finished as decided: skipped, or with the decided
/// rate, also by those who were not there when they were begun.
#[test]
fn whoever_dies_decisions_hold() {
    let config = config_with(&OPEN);
    let bounds = |grad_norm: f64| {
        DecisionKind::SpikeBounds(SpikeBounds {
            expected: vec![None, None],
            residual_loss: 100.0,
            grad_norm,
        })
    };
    let decisions = [
        decision(1, 3, bounds(0.0)),
        decision(2, 4, DecisionKind::LearningRate { factor: 0.5 }),
        decision(3, 5, bounds(1e9)),
    ];
    let undisturbed = lines(&train(&config, 1, 8, &decisions));
    let skipped: Vec<bool> = undisturbed.iter().map(|line| line.skipped).collect();
    assert_eq!(skipped, [false, false, false, true, true, false, false, false]);
    for dies in 0..3 {
        for dies_at in 0.. {
            let (died, lines) = with_death(&config, &decisions, dies, dies_at);
            assert_eq!(lines, undisturbed, "rank {dies} dies at exchange {dies_at}");
            if !died {
                assert!(dies_at > 20, "every exchange was tried");
                break;
            }
        }
    }
}

/// The run ends before the step that a decision names, and saves what it has.
#[test]
fn a_stop_ends_the_run_with_a_checkpoint() {
    let config = config_with(&OPEN);
    let plain = lines(&train(&config, 2, 6, &[]));
    let outcomes = train(&config, 2, 6, &[decision(1, 4, DecisionKind::Stop)]);
    assert_eq!(lines(&outcomes), plain[..4]);
    for outcome in &outcomes {
        let paused = outcome.ended.as_ref().unwrap();
        assert_eq!((paused.step, paused.saving), (StepsCompleted(4), true));
        let saved: Vec<&Said> = outcome
            .said
            .iter()
            .filter(|said| matches!(said, Said::Saved(_)))
            .collect();
        assert_eq!(saved, [&Said::Saved(StepsCompleted(4))]);
    }
}

/// The batch grows on the same lanes: means are over the tokens of each step, and no world shows.
#[test]
fn a_ramp_grows_the_batch_on_the_same_lanes() {
    // At first one lane of four has nothing to do.
    let ramp = "batch.ramp={start_sequences = 3, step_sequences = 9, samples = 9}";
    let config = config_with(&["batch.sequences_per_lane=3", "batch.micro_batch_sequences=1", ramp]);
    let lines = everywhere(&config, 6, &[]);
    let batch = config.batch_schedule();
    let mut sequences = Vec::new();
    for (index, line) in (0..).zip(&lines) {
        let stats = LaneStats::decode(&line.stats, 2).unwrap();
        sequences.push(stats.train_total().tokens / 8);
        assert_eq!(sequences[index as usize], u64::from(batch.sequences(StepIndex(index))));
        assert_eq!(stats.train_total().mean(), Some(line.loss));
    }
    assert_eq!(sequences, [3, 3, 3, 12, 12, 12]);
    // A gradient is a mean: four times the sequences are not four times the norm.
    assert!(
        lines[3].grad_norm < 2.0 * lines[2].grad_norm,
        "{} {}",
        lines[2].grad_norm,
        lines[3].grad_norm
    );
}

/// Squares of the lanes' parts: the same in every world, and at least what parts of a gradient of that norm must have.
#[test]
fn lanes_say_the_squares_of_their_gradients() {
    let config = config_with(&["policy.gradient_noise=true"]);
    let with = everywhere(&config, 4, &[]);
    let without = everywhere(&config_with(&[]), 4, &[]);
    for (a, b) in with.iter().zip(&without) {
        assert_eq!((a.state, a.grad_norm, a.loss), (b.state, b.grad_norm, b.loss));
        let squares = LaneStats::decode(&a.stats, 2).unwrap().lane_squares().unwrap();
        assert!(
            4.0 * squares >= a.grad_norm * a.grad_norm * (1.0 - 1e-9) && squares.is_finite(),
            "{squares}"
        );
        assert_eq!(LaneStats::decode(&b.stats, 2).unwrap().lane_squares(), None);
    }
}
