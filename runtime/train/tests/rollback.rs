//! Roll back and skip on real ranks: the step goes on from the older state, bit for bit, whoever dies on the way (LOOP-1).
#![allow(clippy::unwrap_used)]

mod common;

use common::{
    Checkpoint, NoStore, Node, Outcome, Wanted, agreed, agreed_after, config_with, member, meshes, plan, reports, run,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use tarazed_domain::config::Config;
use tarazed_domain::{StepIndex, StepsCompleted};
use tarazed_protocol::data::decision::{
    Decision, DecisionAuthor, DecisionId, DecisionKind, DiscardedSamples, SpikeBounds,
};
use tarazed_protocol::message::{BeginPlan, StepLine};
use tarazed_protocol::rollback::Rollbacks;

/// Every line is a decision point, and what it decides acts on the step behind it.
const OPEN: [&str; 4] = [
    "policy.persons=true",
    "mixture.start_steps=1",
    "mixture.interval_steps=1",
    "mixture.lag_steps=1",
];
/// Step 5 starts from the state after two steps.
const AT: u64 = 5;
const TO: u64 = 2;
const LAST: u64 = 8;

type Lines = BTreeMap<StepsCompleted, StepLine>;

fn decision(id: u64, effective: u64, kind: DecisionKind) -> Decision {
    Decision {
        id: DecisionId(id),
        line: StepsCompleted(effective - 1),
        effective: StepIndex(effective),
        kind,
        by: DecisionAuthor::Controller("policy".into()),
        reason: String::new(),
    }
}

fn rollback() -> Vec<Decision> {
    let discarded = vec![DiscardedSamples { first: 0, count: 0 }; 2];
    let to = StepsCompleted(TO);
    vec![decision(1, AT, DecisionKind::Rollback { to, discarded })]
}

fn wanted(generation: u64, ranks: u32, last_step: u64) -> Wanted {
    Wanted {
        generation,
        members: (0..ranks).map(member).collect(),
        replicas: ranks.min(2) as usize,
        last_step,
        ..Wanted::default()
    }
}

fn planned(wanted: &Wanted, outcomes: &[Outcome], decisions: &[Decision]) -> BeginPlan {
    let mut plan = plan(wanted, &reports(outcomes));
    plan.decisions = decisions.to_vec();
    plan.decided = StepsCompleted(100);
    plan
}

fn nodes(config: &Arc<Config>, ranks: u32) -> Vec<Node> {
    (0..ranks).map(|worker| Node::of(worker, config)).collect()
}

fn take(trace: &mut Lines, outcomes: &[Outcome]) {
    for line in outcomes.iter().flat_map(Outcome::lines) {
        let known = trace.entry(line.step).or_insert_with(|| line.clone());
        assert_eq!(known, line, "step {} has one result", line.step);
    }
}

/// What must come, by another way: a run that leaves the updates of steps 2 to 4 out stands, after them, on the weights and
/// moments of two steps, and goes on with the data of step 5.
fn expected(config: &Arc<Config>) -> Lines {
    let bounds = |grad_norm: f64| {
        DecisionKind::SpikeBounds(SpikeBounds {
            expected: vec![None, None],
            residual_loss: 100.0,
            grad_norm,
        })
    };
    let lines_of = |decisions: &[Decision]| {
        let plan = planned(&wanted(1, 1, LAST), &[], decisions);
        let outcomes = run(&mut nodes(config, 1), &plan, &mut meshes(&plan), &NoStore);
        assert!(outcomes[0].ended.is_ok(), "{:?}", outcomes[0].ended);
        outcomes[0].lines().cloned().collect::<Vec<_>>()
    };
    let plain = lines_of(&[]);
    let skipping = lines_of(&[decision(1, TO, bounds(0.0)), decision(2, AT, bounds(1e9))]);
    let skipped: Vec<bool> = skipping.iter().map(|line| line.skipped).collect();
    assert_eq!(skipped, [false, false, true, true, true, false, false, false]);
    let before = plain.into_iter().filter(|line| line.step.0 <= AT);
    let after = skipping.into_iter().filter(|line| line.step.0 > AT);
    before.chain(after).map(|line| (line.step, line)).collect()
}

/// All ranks stop at the boundary: the state that the next step starts from is held by nobody. It comes from a checkpoint of
/// that state, or is made from the seed; the steps in between are not done again.
#[test]
fn ranks_stop_and_go_on_from_the_older_state() {
    let config = config_with(&OPEN);
    let decisions = rollback();
    let expected = expected(&config);
    let first = planned(&wanted(1, 2, TO), &[], &decisions);
    let mut world = nodes(&config, 2);
    let at_two = run(&mut world, &first, &mut meshes(&first), &NoStore);
    let checkpoint = Checkpoint::of(TO, &at_two);
    let second = planned(&wanted(2, 2, LAST), &at_two, &decisions);
    let at_five = run(&mut world, &second, &mut meshes(&second), &NoStore);
    for outcome in &at_five {
        let paused = outcome.ended.as_ref().unwrap();
        assert_eq!((paused.step, paused.saving), (StepsCompleted(AT), false));
        assert!(
            outcome
                .report
                .shards
                .iter()
                .all(|held| held.state == StepsCompleted(AT))
        );
    }
    let mut trace = Lines::new();
    take(&mut trace, &at_two);
    take(&mut trace, &at_five);
    for restore in [Some(checkpoint.name.clone()), None] {
        let back = Wanted {
            restore,
            acknowledged: AT,
            rollbacks: Rollbacks::of(&decisions),
            ..wanted(3, 2, LAST)
        };
        let third = planned(&back, &at_five, &decisions);
        assert_eq!(third.base.0, back.restore.as_ref().map_or(0, |from| from.step.0));
        let ended = run(&mut world, &third, &mut meshes(&third), &checkpoint);
        for outcome in &ended {
            assert_eq!(outcome.ended.as_ref().unwrap().step, StepsCompleted(LAST));
        }
        let done: Vec<u64> = ended[0].lines().map(|line| line.step.0).collect();
        assert_eq!(
            done,
            if back.restore.is_some() {
                vec![6, 7, 8]
            } else {
                vec![1, 2, 6, 7, 8]
            }
        );
        take(&mut trace, &ended);
        assert_eq!(trace, expected);
    }
}

/// Lines of a run in which one rank dies at this exchange of the generation that goes back, and whether it came to that.
fn with_death(config: &Arc<Config>, dies: usize, dies_at: usize) -> (bool, Lines) {
    let decisions = rollback();
    let mut trace = Lines::new();
    let mut nodes = nodes(config, 3);
    let first = planned(&wanted(1, 3, LAST), &[], &decisions);
    let outcomes = run(&mut nodes, &first, &mut meshes(&first), &NoStore);
    take(&mut trace, &outcomes);
    let mut back = Wanted {
        acknowledged: AT,
        rollbacks: Rollbacks::of(&decisions),
        ..wanted(2, 3, LAST - 1)
    };
    let second = planned(&back, &outcomes, &decisions);
    assert_eq!(second.base, StepsCompleted(0), "all that is held is left behind");
    let mut ends = meshes(&second);
    ends[dies].die_at(dies_at);
    let mut outcomes = run(&mut nodes, &second, &mut ends, &NoStore);
    let died = ends[dies].is_dead();
    take(&mut trace, &outcomes);
    if died {
        nodes.remove(dies);
        outcomes.remove(dies);
        back.members.remove(dies);
    }
    (back.generation, back.last_step) = (3, LAST);
    let shards = second.shards.shard_count();
    // Where it dies while the seed's state is being made, nothing may be whole yet.
    if agreed(&reports(&outcomes), shards).is_some() {
        assert!(
            agreed_after(&back.rollbacks, &reports(&outcomes), shards).is_some(),
            "nothing of it is dead"
        );
    }
    let third = planned(&back, &outcomes, &decisions);
    let outcomes = run(&mut nodes, &third, &mut meshes(&third), &NoStore);
    for outcome in &outcomes {
        assert!(outcome.ended.is_ok(), "{:?}", outcome.ended);
    }
    take(&mut trace, &outcomes);
    (died, trace)
}

/// STEP-2: whoever dies whenever on the way back and on, the step behind the boundary is finished from the older state.
#[test]
fn whoever_dies_the_older_state_is_gone_on_from() {
    let config = config_with(&OPEN);
    let expected = expected(&config);
    for dies in 0..3 {
        for dies_at in 0.. {
            let (died, lines) = with_death(&config, dies, dies_at);
            assert_eq!(lines, expected, "rank {dies} dies at exchange {dies_at}");
            if !died {
                assert!(dies_at > 20, "every exchange was tried");
                break;
            }
        }
    }
}
