//! Results that are wrong although nobody says so, as ranks see them: a loss that is no number, a lane computed wrongly (DET-3).
#![allow(clippy::unwrap_used)]

mod common;

use common::{NoStore, Node, Outcome, Wanted, config_with, member, meshes, plan, run};
use std::collections::BTreeMap;
use std::sync::Arc;
use tarazed_domain::config::Config;
use tarazed_domain::{LaneIndex, Rank, StepIndex, StepsCompleted};
use tarazed_protocol::message::{DisputedItem, StepLine};
use tarazed_train::StepError;
use tarazed_train::harm::{Harm, Place};

/// One generation from the seed on so many ranks, with harm done to the last of them.
fn train(config: &Arc<Config>, ranks: u32, harm: Option<Harm>) -> Vec<Outcome> {
    let wanted = Wanted {
        generation: 1,
        members: (0..ranks).map(member).collect(),
        replicas: ranks.min(2) as usize,
        last_step: 6,
        ..Wanted::default()
    };
    let mut nodes: Vec<Node> = (0..ranks).map(|worker| Node::of(worker, config)).collect();
    nodes.last_mut().unwrap().state.harm = harm;
    let plan = plan(&wanted, &BTreeMap::new());
    run(&mut nodes, &plan, &mut meshes(&plan), &NoStore)
}

/// DET-1, DET-3: a loss that is no number ends the step in its barrier, on all ranks and in every world at the same step: nobody
/// passes, nobody is named, no line has it, and the lines before it are the same everywhere.
#[test]
fn a_loss_that_is_no_number_is_passed_by_nobody() {
    // Weights come to be of the order of the rate, and products of theirs leave the range of numbers.
    let config = config_with(&["optimizer.learning_rate=1e15"]);
    let mut seen: Vec<(StepsCompleted, Vec<StepLine>)> = Vec::new();
    for ranks in 1..=3 {
        for outcome in train(&config, ranks, None) {
            let error = outcome.ended.expect_err("no step can follow");
            let StepError::NotFinite { step, loss, .. } = error else {
                panic!("{error}")
            };
            assert!(!loss.is_finite() && step > StepsCompleted(1), "{error}");
            let text = error.to_string();
            assert!(
                text.starts_with(&format!("step {step} gives loss {loss}")) && text.contains("learning rate"),
                "{text}"
            );
            let dispute = error.dispute().expect("the state is in doubt");
            assert_eq!((dispute.step, dispute.item), (step, DisputedItem::Finite));
            assert!(dispute.claims.is_empty() && error.suspects().is_empty());
            assert!(!error.is_own_fault() && !error.is_fatal());
            let passed = outcome.report.passed.map(|passed| passed.step);
            assert_eq!(passed.map(|before| before.0 + 1), Some(step.0));
            seen.push((step, outcome.report.lines));
        }
    }
    let (step, lines) = &seen[0];
    assert_eq!(lines.len() as u64 + 1, step.0);
    assert!(seen.iter().all(|other| *other == seen[0]));
}

/// DET-3: a bit of a lane's gradient flips before anybody has looked at it. Whoever computes the lane again says otherwise, and
/// all hear both in the barrier of that very step; a lone rank watches itself.
#[test]
fn a_flipped_gradient_is_seen_by_the_audit_of_its_lane() {
    let config = config_with(&["fault.audit_interval_steps=1"]);
    for (ranks, own_lane, claimants) in [(1, 3, [Rank(0), Rank(0)]), (2, 1, [Rank(0), Rank(1)])] {
        for outcome in train(&config, ranks, None) {
            assert!(outcome.ended.is_ok(), "undisturbed: {:?}", outcome.ended);
        }
        let harm = Harm {
            step: StepIndex(2), // its audit is that of lane 3 of four
            place: Place::Gradient,
            shard: own_lane,
            element: 70,
            bit: 3,
            stuck: false,
        };
        for outcome in train(&config, ranks, Some(harm)) {
            let Err(StepError::Disputed(dispute)) = outcome.ended else {
                panic!("{:?}", outcome.ended)
            };
            let lane = DisputedItem::Lane(LaneIndex(3));
            assert_eq!((dispute.step, dispute.item), (StepsCompleted(3), lane));
            let named: Vec<Rank> = dispute.claims.iter().map(|claim| claim.rank).collect();
            assert_eq!(named, claimants);
            assert_ne!(dispute.claims[0].digest, dispute.claims[1].digest);
            assert_eq!(outcome.report.lines.len(), 2, "no line of it goes out");
        }
    }
}
