//! Which runs a plan asks for, given those that are finished: pure, so that a bench that was killed goes on where it stood
//! by looking at what is there.
//!
//! Three stages follow each other in each case. *Tuning*: every static candidate on the tuning seeds; the best by the
//! primary metric is the arm `best-static`. *Judging*, seed by seed: the named static arms, the best static one, each
//! controller. *Freezing*, within a seed: the mean and the last mixture of each controller's run as static mixtures of
//! their own, with that run's seed: what is left of a controller's advantage then is not due to adapting.

use super::measure::{Facts, Outcome, target};
use super::plan::{Controller, NamedStatic, Plan};
use super::{statics, statistics};
use crate::exit::Failure;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Which run.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct RunId {
    /// The case.
    pub case: String,
    /// The mixture or the controller.
    pub arm: String,
    /// The seed.
    pub seed: u64,
}

impl RunId {
    /// Its folder, below the work folder.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        ["runs", &self.case, &self.arm, &format!("seed-{}", self.seed)]
            .iter()
            .collect()
    }
}

impl std::fmt::Display for RunId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} / {} / seed {}", self.case, self.arm, self.seed)
    }
}

/// A run to be done.
#[derive(Clone, PartialEq, Debug)]
pub struct RunSpec {
    /// Which.
    pub id: RunId,
    /// Weights that it begins with, by domain; a static run keeps them.
    pub mixture: Vec<f64>,
    /// Config keys of its controller; none for a static run.
    pub set: Vec<String>,
}

/// Outcomes so far.
pub type Finished = BTreeMap<RunId, Outcome>;

/// A case as the schedule needs it.
#[derive(Clone, Copy, Debug)]
pub struct CaseRuns<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// Name of the case.
    pub name: &'a str,
    /// Its data.
    pub facts: &'a Facts,
    /// Training tokens of one run.
    pub run_tokens: u64,
}

/// An arm of the judging.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Arm {
    /// What reports call it.
    pub label: String,
    /// What its runs are called; `best-static` is one of the candidates.
    pub runs: String,
}

/// Name of the arm that the sweep chooses.
pub const BEST_STATIC: &str = "best-static";

impl CaseRuns<'_> {
    /// A named static mixture of this case.
    #[must_use]
    pub fn named(&self, named: NamedStatic) -> Vec<f64> {
        let sizes = self.facts.sizes();
        match named {
            NamedStatic::Natural => statics::natural(&sizes),
            NamedStatic::Uniform => statics::temperature(&sizes, 0.0),
            NamedStatic::Sqrt => statics::temperature(&sizes, 0.5),
            NamedStatic::Unimax => statics::unimax(&sizes, self.run_tokens, self.plan.statics.unimax_epochs_max),
        }
    }

    /// All static candidates, the named ones first.
    #[must_use]
    pub fn candidates(&self) -> Vec<(String, Vec<f64>)> {
        let statics = &self.plan.statics;
        let sizes = self.facts.sizes();
        let named = NamedStatic::ALL.map(|named| (named.name().to_owned(), self.named(named)));
        let powers = statics
            .powers
            .iter()
            .map(|power| (format!("power-{power}"), statics::temperature(&sizes, *power)));
        let points = (0..statics.points).map(|index| {
            (
                format!("sweep-{index:02}"),
                statics::simplex_point(sizes.len(), statics.seed, index),
            )
        });
        named.into_iter().chain(powers).chain(points).collect()
    }

    fn id(&self, arm: &str, seed: u64) -> RunId {
        RunId {
            case: self.name.to_owned(),
            arm: arm.to_owned(),
            seed,
        }
    }

    /// The target of runs with this seed, in bits per byte.
    #[must_use]
    pub fn target(&self, finished: &Finished, seed: u64) -> Option<f64> {
        target(self.plan, |named| {
            finished.get(&self.id(named.name(), seed)).map(Outcome::macro_end)
        })
    }

    /// Mean of the primary metric over the tuning seeds, by candidate; a candidate that misses the target is last. None while
    /// a run is missing.
    #[must_use]
    pub fn tuned(&self, finished: &Finished) -> Option<Vec<(String, f64)>> {
        let primary = self.plan.metrics.primary;
        let score = |arm: &str| {
            let values: Option<Vec<f64>> = self
                .plan
                .seeds
                .tuning
                .iter()
                .map(|&seed| {
                    let outcome = finished.get(&self.id(arm, seed))?;
                    let target = self.target(finished, seed)?;
                    Some(outcome.metric(primary, target).unwrap_or(f64::INFINITY))
                })
                .collect();
            values.map(|values| statistics::mean(&values))
        };
        let scored = |(arm, _): (String, Vec<f64>)| score(&arm).map(|score| (arm, score));
        self.candidates().into_iter().map(scored).collect()
    }

    /// The candidate that is best on the tuning seeds, the first of equals; none while a run is missing.
    #[must_use]
    pub fn best_static(&self, finished: &Finished) -> Option<String> {
        let tuned = self.tuned(finished)?;
        tuned.into_iter().min_by(|a, b| a.1.total_cmp(&b.1)).map(|(arm, _)| arm)
    }

    /// The arms that are judged, in the order of reports.
    #[must_use]
    pub fn arms(&self, best_static: &str) -> Vec<Arm> {
        let arm = |label: &str, runs: &str| Arm {
            label: label.to_owned(),
            runs: runs.to_owned(),
        };
        let mut arms: Vec<Arm> = NamedStatic::ALL
            .iter()
            .map(|named| arm(named.name(), named.name()))
            .collect();
        arms.push(arm(BEST_STATIC, best_static));
        for Controller { name, .. } in self.plan.controllers() {
            for label in [name.clone(), format!("{name}-mean"), format!("{name}-final")] {
                arms.push(arm(&label, &label));
            }
        }
        arms
    }

    /// All runs that can be done now and are not finished, in order; none when the case is done.
    #[must_use]
    pub fn due(&self, finished: &Finished) -> Vec<RunSpec> {
        let candidates = self.candidates();
        let spec = |arm: &str, seed, mixture: &[f64], set: &[String]| RunSpec {
            id: self.id(arm, seed),
            mixture: mixture.to_vec(),
            set: set.to_vec(),
        };
        let seeds = &self.plan.seeds;
        let mut runs: Vec<RunSpec> = Vec::new();
        for &seed in &seeds.tuning {
            runs.extend(candidates.iter().map(|(arm, mixture)| spec(arm, seed, mixture, &[])));
        }
        let best = self.best_static(finished);
        for &seed in &seeds.judging {
            for (arm, mixture) in &candidates {
                let is_named = NamedStatic::ALL.iter().any(|named| named.name() == arm);
                if is_named || best.as_ref() == Some(arm) {
                    runs.push(spec(arm, seed, mixture, &[]));
                }
            }
            for controller in self.plan.controllers() {
                let initial = self.named(controller.initial);
                runs.push(spec(&controller.name, seed, &initial, &controller.set));
                if let Some(outcome) = finished.get(&self.id(&controller.name, seed)) {
                    let frozen = [("mean", &outcome.mean_mixture), ("final", &outcome.final_mixture)];
                    for (end, mixture) in frozen {
                        runs.push(spec(&format!("{}-{end}", controller.name), seed, mixture, &[]));
                    }
                }
            }
        }
        runs.retain(|run| !finished.contains_key(&run.id));
        runs
    }

    /// Runs of the whole case; while the best static mixture is not known, as if it had no other name.
    #[must_use]
    pub fn total(&self, finished: &Finished) -> usize {
        let best = self.best_static(finished).unwrap_or_default();
        let is_named = NamedStatic::ALL.iter().any(|named| named.name() == best);
        self.plan.runs_per_case(is_named)
    }
}

/// Who does runs: processes, or a stand-in for tests.
pub trait Runner {
    /// The outcome of a run that is there already, whole.
    ///
    /// # Errors
    /// If what is there cannot be of this run.
    fn find(&mut self, run: &RunSpec) -> Result<Option<Outcome>, Failure>;

    /// Does a run, or what is missing of it.
    ///
    /// # Errors
    /// The bench ends with it; a later one goes on.
    fn run(&mut self, run: &RunSpec) -> Result<Outcome, Failure>;
}

/// Takes over what is there already of these cases.
///
/// # Errors
/// As [`Runner::find`].
pub fn recall(cases: &[CaseRuns<'_>], runner: &mut dyn Runner) -> Result<Finished, Failure> {
    let mut finished = Finished::new();
    // What is found may show which runs come next: until nothing more is.
    loop {
        let before = finished.len();
        for case in cases {
            for run in case.due(&finished) {
                if let Some(outcome) = runner.find(&run)? {
                    finished.insert(run.id, outcome);
                }
            }
        }
        if finished.len() == before {
            return Ok(finished);
        }
    }
}

/// Does all that is missing, case by case. `done` hears of each run when it is finished.
///
/// # Errors
/// As [`Runner::run`]; what was finished before stays in `finished`.
pub fn carry_out(
    cases: &[CaseRuns<'_>],
    runner: &mut dyn Runner,
    finished: &mut Finished,
    done: &mut dyn FnMut(&RunId, &Finished) -> Result<(), Failure>,
) -> Result<(), Failure> {
    for case in cases {
        while let Some(run) = case.due(finished).into_iter().next() {
            let outcome = runner.run(&run)?;
            finished.insert(run.id.clone(), outcome);
            done(&run.id, finished)?;
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::measure::tests::{facts, line};
    use super::super::plan::tests::plan;
    use super::*;
    use std::collections::BTreeSet;

    /// Does runs at once: how good one is, is a function of its mixture and seed. Stops after so many.
    #[derive(Default)]
    pub(crate) struct Fake {
        pub(crate) disk: Finished,
        pub(crate) done: Vec<RunId>,
        pub(crate) patience: Option<usize>,
    }

    fn outcome_of(run: &RunSpec) -> Outcome {
        let even = [0.4, 0.4, 0.2];
        let start = [run.mixture[0], run.mixture[1], run.mixture[2]];
        let end = if run.set.is_empty() { start } else { even };
        let distance: f64 = end.iter().zip(even).map(|(a, b)| (a - b).abs()).sum();
        let bits = 2.0 + distance + run.id.seed as f64 / 1_000.0;
        let lines = [line(1, start, Some([4.0, 4.0])), line(2, end, Some([bits, bits]))];
        Outcome::read(&lines, &facts(), 2).expect("an outcome")
    }

    impl Runner for Fake {
        fn find(&mut self, run: &RunSpec) -> Result<Option<Outcome>, Failure> {
            Ok(self.disk.get(&run.id).cloned())
        }

        fn run(&mut self, run: &RunSpec) -> Result<Outcome, Failure> {
            if self.patience == Some(self.done.len()) {
                return Err(Failure::transient("the bench", "was killed", "start it again"));
            }
            let outcome = outcome_of(run);
            self.done.push(run.id.clone());
            self.disk.insert(run.id.clone(), outcome.clone());
            Ok(outcome)
        }
    }

    pub(crate) fn runs<'a>(plan: &'a Plan, name: &'a str, facts: &'a Facts) -> CaseRuns<'a> {
        CaseRuns {
            plan,
            name,
            facts,
            run_tokens: 2_000,
        }
    }

    #[test]
    fn a_plan_is_carried_out_to_its_end_in_three_stages() {
        let (plan, facts) = (plan(), facts());
        let cases = [runs(&plan, "plain", &facts), runs(&plan, "noise", &facts)];
        let mut fake = Fake::default();
        let mut finished = Finished::new();
        carry_out(&cases, &mut fake, &mut finished, &mut |_, _| Ok(())).expect("done");
        assert_eq!(
            finished.len(),
            cases.iter().map(|case| case.total(&finished)).sum::<usize>()
        );
        assert!(cases.iter().all(|case| case.due(&finished).is_empty()));
        // Nothing is judged before all is tuned, and every judged run is on another seed than every tuned one.
        let of_case: Vec<&RunId> = fake.done.iter().filter(|run| run.case == "plain").collect();
        let tuned = of_case
            .iter()
            .position(|run| plan.seeds.judging.contains(&run.seed))
            .expect("judged");
        assert!(
            of_case[tuned..]
                .iter()
                .all(|run| plan.seeds.judging.contains(&run.seed))
        );
        assert_eq!(tuned, cases[0].candidates().len() * 2);
        // A frozen run has the mean of its own controller's run of the same seed.
        let mean = &finished[&RunId {
            case: "plain".into(),
            arm: "ado-mean".into(),
            seed: 2,
        }];
        let adaptive = &finished[&RunId {
            case: "plain".into(),
            arm: "ado".into(),
            seed: 2,
        }];
        assert_eq!(mean.final_mixture, adaptive.mean_mixture);
    }

    #[test]
    fn the_best_static_mixture_is_chosen_on_the_tuning_seeds() {
        let (plan, facts) = (plan(), facts());
        let case = runs(&plan, "plain", &facts);
        let mut finished = Finished::new();
        assert_eq!(case.best_static(&finished), None);
        let due = case.due(&finished);
        for run in due.iter().filter(|run| plan.seeds.tuning.contains(&run.id.seed)) {
            let mut outcome = outcome_of(run);
            let bits = if run.id.arm == "sweep-01" { 1.0 } else { 3.0 };
            outcome.curve.iter_mut().for_each(|place| place.macro_mean = bits);
            finished.insert(run.id.clone(), outcome);
        }
        assert_eq!(case.best_static(&finished).as_deref(), Some("sweep-01"));
        let arms = case.arms("sweep-01");
        assert!(
            arms.iter()
                .any(|arm| arm.label == BEST_STATIC && arm.runs == "sweep-01")
        );
        let judged: BTreeSet<String> = case.due(&finished).into_iter().map(|run| run.id.arm).collect();
        let expected = ["ado", "natural", "sqrt", "sweep-01", "uniform", "unimax"];
        assert!(judged.iter().eq(expected), "{judged:?}");
    }

    /// Killed after any number of runs, a bench that is started again does what is missing, once each.
    #[test]
    fn a_killed_bench_goes_on_where_it_stood() {
        let (plan, facts) = (plan(), facts());
        let cases = [runs(&plan, "plain", &facts), runs(&plan, "noise", &facts)];
        let mut whole = Fake::default();
        let mut expected = Finished::new();
        carry_out(&cases, &mut whole, &mut expected, &mut |_, _| Ok(())).expect("done");
        for lives in [1, 7, 40] {
            let mut disk = Finished::new();
            let mut done = Vec::new();
            loop {
                let mut fake = Fake {
                    disk: std::mem::take(&mut disk),
                    patience: Some(lives),
                    ..Fake::default()
                };
                let mut finished = recall(&cases, &mut fake).expect("what is there");
                assert_eq!(finished.len(), done.len(), "all that was done is found");
                let ended = carry_out(&cases, &mut fake, &mut finished, &mut |_, _| Ok(()));
                done.append(&mut fake.done);
                disk = fake.disk;
                if ended.is_ok() {
                    assert_eq!(finished, expected);
                    break;
                }
            }
            assert_eq!(done, whole.done, "{lives} runs a life");
        }
    }

    #[test]
    fn candidates_have_names_of_their_own_and_are_mixtures() {
        let (plan, facts) = (plan(), facts());
        let candidates = runs(&plan, "plain", &facts).candidates();
        let names: BTreeSet<&String> = candidates.iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), candidates.len());
        assert_eq!(candidates.len(), 4 + 1 + 2);
        assert_eq!(candidates.len(), plan.candidates());
        for (name, mixture) in &candidates {
            assert!((mixture.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{name}");
        }
    }
}
