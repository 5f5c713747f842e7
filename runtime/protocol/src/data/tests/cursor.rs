use super::*;
use crate::data::cursor::{PlanError, SampleRef, StepPlan};
use crate::data::decision::LedgerError;
use proptest::prelude::*;
use std::collections::BTreeMap;
use tarazed_domain::LaneIndex;

const STEPS: u64 = 60;

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

fn small_laws(sizes: &[u64]) -> Vec<Law> {
    const NAMES: [&str; 4] = ["web", "wiki", "code", "book"];
    sizes
        .iter()
        .zip(NAMES)
        .enumerate()
        .map(|(index, (size, name))| law(name, 1.0 + index as f64, *size, 2.0, 20.0, 0.2))
        .collect()
}

/// One decision per decision point, at some of them.
fn script(mixtures: &[Option<Vec<f64>>], domains: usize) -> Vec<(StepsCompleted, Vec<Decision>)> {
    let mut id = 0;
    (1..=STEPS / 5)
        .map(|point| {
            let line = 5 * point;
            let weights = mixtures.get(point as usize - 1).cloned().flatten();
            let decisions = weights.map(|weights| {
                id += 1;
                mixture_decision(id, line, line + 3, &weights[..domains])
            });
            (StepsCompleted(line), decisions.into_iter().collect())
        })
        .collect()
}

fn record_through(cursor: &mut DataCursor, script: &[(StepsCompleted, Vec<Decision>)], line: StepsCompleted) {
    for (point, decisions) in script.iter().filter(|(point, _)| *point <= line) {
        cursor.record(*point, decisions).unwrap();
    }
}

fn straight(recipe: &Recipe, script: &[(StepsCompleted, Vec<Decision>)]) -> Vec<StepPlan> {
    let mut cursor = DataCursor::new(recipe.clone(), points(&quick())).unwrap();
    (0..STEPS)
        .map(|step| {
            let needs = cursor.needs(StepIndex(step));
            record_through(&mut cursor, script, needs);
            cursor.plan(StepIndex(step)).unwrap()
        })
        .collect()
}

fn setting() -> impl Strategy<Value = (Recipe, Vec<(StepsCompleted, Vec<Decision>)>)> {
    (
        prop::collection::vec(1_u64..60, 1..5),
        prop::collection::vec(prop::option::of(prop::collection::vec(0.01_f64..1.0, 4)), 12),
        any::<u64>(),
    )
        .prop_map(|(sizes, mixtures, seed)| {
            let mut recipe = recipe(&small_laws(&sizes), 24);
            recipe.seed = seed;
            (recipe, script(&mixtures, sizes.len()))
        })
}

proptest! {
    /// DATA-1: each sequence of each finished epoch in exactly one step, at any split into lanes and ranks, where each
    /// rank has a cursor of its own, plans ahead, and now and then dies and is rebuilt from the committed past.
    #[test]
    fn every_sample_of_an_epoch_once_at_any_split(
        (recipe, script) in setting(),
        lanes in prop::sample::select(vec![1_u32, 2, 3, 5, 7, 8, 12, 24, 40]),
        ranks in 1_u32..5,
        dies in prop::collection::vec(any::<bool>(), STEPS as usize),
    ) {
        let expected = straight(&recipe, &script);
        let mut seen: BTreeMap<SampleRef, u32> = BTreeMap::new();
        for rank in 0..ranks {
            let mut cursor = DataCursor::new(recipe.clone(), points(&quick())).unwrap();
            for step in 0..STEPS {
                let known = cursor.needs(StepIndex(step));
                if dies[step as usize] {
                    let past: Vec<Decision> = script.iter().filter(|(line, _)| *line <= known)
                        .flat_map(|(_, decisions)| decisions.clone()).collect();
                    cursor = DataCursor::restore(recipe.clone(), points(&quick()), known, &past).unwrap();
                }
                record_through(&mut cursor, &script, known);
                let plan = cursor.plan(StepIndex(step)).unwrap();
                prop_assert_eq!(plan.digest, expected[step as usize].digest);
                for lane in (0..lanes).filter(|lane| lane % ranks == rank) {
                    for sample in plan.lane(LaneIndex(lane), lanes) {
                        *seen.entry(*sample).or_default() += 1;
                    }
                }
                // A prefetch of the next step, whose outcome may still be open, changes nothing.
                let _open = cursor.plan(StepIndex(step + 1));
            }
        }
        prop_assert!(seen.values().all(|times| *times == 1));
        prop_assert_eq!(seen.len() as u64, STEPS * 24);
        for (index, domain) in recipe.domains.iter().enumerate() {
            let mut by_epoch: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
            for sample in seen.keys().filter(|sample| sample.domain.index() == index) {
                by_epoch.entry(sample.epoch).or_default().push(sample.sequence);
            }
            let last = by_epoch.keys().last().copied();
            for (epoch, sequences) in by_epoch {
                prop_assert!(sequences.iter().all(|sequence| *sequence < domain.train_sequences));
                if Some(epoch) != last {
                    prop_assert_eq!(sequences.len() as u64, domain.train_sequences, "epoch {} is whole", epoch);
                }
            }
        }
    }

    /// DATA-2: step and decisions are all there is. Any walk over steps, back and forth, on any clone or restored
    /// cursor, gives the plans of the straight run.
    #[test]
    fn replay_from_any_prefix_is_the_straight_run(
        (recipe, script) in setting(),
        walk in prop::collection::vec(0..STEPS, 1..12),
    ) {
        let expected = straight(&recipe, &script);
        let mut cursor = DataCursor::new(recipe.clone(), points(&quick())).unwrap();
        record_through(&mut cursor, &script, StepsCompleted(STEPS));
        for step in walk {
            prop_assert_eq!(&cursor.clone().plan(StepIndex(step)).unwrap(), &expected[step as usize]);
            prop_assert_eq!(&cursor.plan(StepIndex(step)).unwrap(), &expected[step as usize]);
            let known = cursor.needs(StepIndex(step));
            let past: Vec<Decision> = cursor.ledger().decisions().iter()
                .filter(|decision| decision.line <= known).cloned().collect();
            let mut restored = DataCursor::restore(recipe.clone(), points(&quick()), known, &past).unwrap();
            prop_assert_eq!(&restored.plan(StepIndex(step)).unwrap(), &expected[step as usize]);
            let drawn = restored.drawn(StepIndex(step)).unwrap();
            prop_assert_eq!(drawn.iter().sum::<u64>(), step * 24);
        }
    }
}

/// The mixture of a decision holds from its effective step on, not before.
#[test]
fn a_decision_acts_from_its_effective_step() {
    let recipe = recipe(&small_laws(&[1000, 1000]), 10);
    let mut cursor = DataCursor::new(recipe, points(&quick())).unwrap();
    cursor
        .record(StepsCompleted(5), &[mixture_decision(1, 5, 9, &[0.9, 0.1])])
        .unwrap();
    cursor.record(StepsCompleted(10), &[]).unwrap();
    assert_eq!(cursor.plan(StepIndex(8)).unwrap().mixture, [1.0 / 3.0, 2.0 / 3.0]);
    let plan = cursor.plan(StepIndex(9)).unwrap();
    assert_eq!(plan.mixture, [0.9, 0.1]);
    assert_eq!(plan.counts, [9, 1]);
}

/// STEP-6: a step waits for the one outcome that can reach it, and says which; nothing else holds it.
#[test]
fn a_missing_outcome_is_named() {
    let recipe = recipe(&small_laws(&[100, 100]), 8);
    let mut cursor = DataCursor::new(recipe.clone(), points(&quick())).unwrap();
    for step in 0..8 {
        assert_eq!(cursor.needs(StepIndex(step)), StepsCompleted(0));
        cursor.plan(StepIndex(step)).unwrap();
    }
    let missing = |line| PlanError::DecisionMissing {
        line: StepsCompleted(line),
    };
    assert_eq!(cursor.plan(StepIndex(8)), Err(missing(5)));
    assert_eq!(
        cursor.record(StepsCompleted(10), &[]),
        Err(LedgerError::Skipped {
            line: StepsCompleted(10),
            missing: StepsCompleted(5)
        })
    );
    cursor.record(StepsCompleted(5), &[]).unwrap();
    cursor.plan(StepIndex(12)).unwrap();
    assert_eq!(cursor.plan(StepIndex(13)), Err(missing(10)));
    let mut fixed = DataCursor::new(recipe, points(&MixtureConfig::default())).unwrap();
    assert_eq!(fixed.needs(StepIndex(1_000_000)), StepsCompleted(0));
    fixed.plan(StepIndex(10_000)).unwrap();
}

/// Over some tens of steps every lane trains on every domain, however small its weight.
#[test]
fn every_lane_sees_every_domain() {
    let mut laws = small_laws(&[1000, 1000, 1000, 1000]);
    laws[3].weight = 0.15; // one sequence in about 41
    let mut cursor = DataCursor::new(recipe(&laws, 16), points(&MixtureConfig::default())).unwrap();
    let mut seen = [[0_u32; 4]; 8];
    for step in 0..400 {
        let plan = cursor.plan(StepIndex(step)).unwrap();
        for lane in 0..8 {
            for sample in plan.lane(LaneIndex(lane), 8) {
                seen[lane as usize][sample.domain.index()] += 1;
            }
        }
    }
    let fair = 400.0 * 2.0 * 0.15 / 6.15;
    for lane in seen {
        assert!(lane.iter().all(|count| f64::from(*count) > fair / 3.0), "{seen:?}");
    }
}

/// The samples of a run are part of its promise: they must not change from one version to the next unsaid.
#[test]
fn digests_are_pinned() {
    let mut cursor = DataCursor::new(recipe(&laws(), 32), points(&MixtureConfig::default())).unwrap();
    assert_eq!(hex::encode(cursor.plan(StepIndex(100)).unwrap().digest), PINNED);
}
const PINNED: &str = "c8526e00833215c03da96ceb921225732fd3457872091e73e071d817fc4ef487";

#[test]
fn bad_recipes_are_refused_with_a_reason() {
    let refused = |change: fn(&mut Recipe)| {
        let mut recipe = recipe(&laws(), 8);
        change(&mut recipe);
        DataCursor::new(recipe, points(&MixtureConfig::default()))
            .unwrap_err()
            .to_string()
    };
    assert!(refused(|recipe| recipe.domains.clear()).contains("0 domains"));
    assert!(refused(|recipe| recipe.batch = BatchSchedule::fixed(0)).contains("batch of 0"));
    assert!(refused(|recipe| recipe.domains[1].train_sequences = 0).contains("'wiki' has 0 training sequences"));
    assert!(refused(|recipe| recipe.domains[1].name = "web".into()).contains("'web' stands twice"));
    assert!(refused(|recipe| recipe.domains[1].weight = f64::NAN).contains("NaN"));
}
