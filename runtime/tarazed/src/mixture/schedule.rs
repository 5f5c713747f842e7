//! Which runs a plan asks for, given those that are finished: pure, so that a bench that was killed goes on where it stood
//! by looking at what is there.
//!
//! Three stages follow each other in each case. *Tuning*: every static candidate on the tuning seeds; the best by the
//! primary metric is the arm `best-static`. *Judging*, seed by seed: the named static arms, the best static one, each
//! controller. *Freezing*, within a seed: the mean and the last mixture of each controller's run as static mixtures of
//! their own, with that run's seed: what is left of a controller's advantage then is not due to adapting.
//!
//! Candidates whose weights are the same, bit for bit, are one mixture under several names, as UniMax and the uniform one where no
//! domain repeats within the budget: the runs of the first are those of all.
//!
//! Runs that are due are independent of each other, so several may be done at once ([`carry_out`]). Which are due is a function
//! of what is finished, and what a run finds is one of its config, data, seed, program and device type (DET-1): how many are
//! done at once, and which ends first, decides no number.

use super::book::Book;
use super::measure::{Facts, Outcome, target};
use super::plan::{Controller, NamedStatic, Plan};
use super::record::Proof;
use super::{statics, statistics};
use crate::exit::Failure;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Which run.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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

impl RunSpec {
    /// Whether something decides on its mixture while it trains.
    #[must_use]
    pub const fn is_adaptive(&self) -> bool {
        !self.set.is_empty()
    }
}

/// Candidates with the same weights, bit for bit, share their runs: those of the first.
fn first_with<'a>(candidates: &'a [(String, Vec<f64>)], mixture: &[f64]) -> Option<&'a str> {
    let is_it = |(_, other): &&(String, Vec<f64>)| has_same_bits(other, mixture);
    candidates.iter().find(is_it).map(|(name, _)| name.as_str())
}

fn has_same_bits(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
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
    /// What its runs are called: `best-static` is one of the candidates, and one with the weights of another has that one's.
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

    /// Whose runs those of each candidate are: its own, or those of the first with the same weights, bit for bit.
    #[must_use]
    pub fn runs_of_candidates(&self) -> Vec<String> {
        let candidates = self.candidates();
        let runs = candidates.iter().map(|(name, mixture)| {
            let first = first_with(&candidates, mixture);
            first.unwrap_or(name).to_owned()
        });
        runs.collect()
    }

    /// The same of a named mixture, which are the first candidates.
    fn runs_of(&self, named: NamedStatic) -> &'static str {
        let own = self.named(named);
        let first = NamedStatic::ALL
            .into_iter()
            .find(|other| has_same_bits(&self.named(*other), &own));
        first.unwrap_or(named).name()
    }

    /// The candidates that have runs of their own.
    fn distinct(&self) -> Vec<(String, Vec<f64>)> {
        let candidates = self.candidates();
        let has_own = |(name, mixture): &&(String, Vec<f64>)| first_with(&candidates, mixture) == Some(name.as_str());
        candidates.iter().filter(has_own).cloned().collect()
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
            finished
                .get(&self.id(self.runs_of(named), seed))
                .map(Outcome::macro_end)
        })
    }

    /// Mean of the primary metric over the tuning seeds, by candidate; a candidate that misses the target is last. None while
    /// a run is missing.
    #[must_use]
    pub fn tuned(&self, finished: &Finished) -> Option<Vec<(String, f64)>> {
        let primary = self.plan.metrics.primary;
        let candidates = self.candidates();
        let score = |mixture: &[f64]| {
            let runs = first_with(&candidates, mixture)?;
            let values: Option<Vec<f64>> = self
                .plan
                .seeds
                .tuning
                .iter()
                .map(|&seed| {
                    let outcome = finished.get(&self.id(runs, seed))?;
                    let target = self.target(finished, seed)?;
                    Some(outcome.metric(primary, target).unwrap_or(f64::INFINITY))
                })
                .collect();
            values.map(|values| statistics::mean(&values))
        };
        let scored = |(arm, mixture): &(String, Vec<f64>)| score(mixture).map(|score| (arm.clone(), score));
        candidates.iter().map(scored).collect()
    }

    /// The candidate that is best on the tuning seeds, the first of equals, so that it has runs of its own; none while a run is
    /// missing.
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
            .map(|named| arm(named.name(), self.runs_of(*named)))
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
        let mut runs = self.all(finished);
        runs.retain(|run| !finished.contains_key(&run.id));
        runs
    }

    /// The same with those that are finished.
    #[must_use]
    pub fn all(&self, finished: &Finished) -> Vec<RunSpec> {
        let candidates = self.distinct();
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
                if NamedStatic::is_name(arm) || best.as_ref() == Some(arm) {
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
        runs
    }

    /// Runs of the whole case; while the best static mixture is not known, as if it had no other name.
    #[must_use]
    pub fn total(&self, finished: &Finished) -> usize {
        let best = self.best_static(finished).unwrap_or_default();
        let distinct = self.distinct();
        let named = distinct.iter().filter(|(arm, _)| NamedStatic::is_name(arm)).count();
        let judged = named + usize::from(!NamedStatic::is_name(&best));
        self.plan.runs_per_case(distinct.len(), judged)
    }
}

/// A run that is whole.
#[derive(Clone, PartialEq, Debug)]
pub struct Whole {
    /// What is judged.
    pub outcome: Outcome,
    /// How it was done.
    pub proof: Proof,
}

/// Who does runs: processes, or a stand-in for tests. Several are done at once, so it is shared.
pub trait Runner {
    /// The run, where it is there already and whole.
    ///
    /// # Errors
    /// If what is there cannot be of this run.
    fn find(&self, run: &RunSpec) -> Result<Option<Whole>, Failure>;

    /// BLAKE3 of the identity of the run's config.
    ///
    /// # Errors
    /// As a config is refused.
    fn config_digest(&self, run: &RunSpec) -> Result<String, Failure>;

    /// Does a run, or what is missing of it.
    ///
    /// # Errors
    /// The bench ends with it; a later one goes on.
    fn run(&self, run: &RunSpec) -> impl Future<Output = Result<Whole, Failure>>;
}

/// Takes over what is there already of these cases: what the book's file holds, and what the runner finds.
///
/// # Errors
/// As [`Runner::find`], and where the file holds what these cases do not ask for.
pub fn recall(cases: &[CaseRuns<'_>], runner: &impl Runner, book: &mut Book) -> Result<(), Failure> {
    // What is found may show which runs come next: until nothing more is.
    loop {
        let before = book.finished().len();
        for case in cases {
            for run in case.due(book.finished()) {
                if book.holds(&run.id) {
                    book.take_up(&run, &runner.config_digest(&run)?, case.facts)?;
                } else if let Some(whole) = runner.find(&run)? {
                    book.add(&run.id, whole)?;
                }
            }
        }
        if book.finished().len() == before {
            return book.expect_no_more();
        }
    }
}

/// Does all that is missing, up to `parallel` runs at once: always the first that are due over all cases in order, so that no
/// processor idles at the end of a case. `told` hears of each run when it is finished.
///
/// # Errors
/// The first of [`Runner::run`] or of `told`.
pub async fn carry_out(
    cases: &[CaseRuns<'_>],
    runner: &impl Runner,
    parallel: usize,
    book: &mut Book,
    told: &mut dyn FnMut(&RunId, &Book) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let due = |book: &Book, begun: &BTreeSet<RunId>| {
        let mut due = cases.iter().flat_map(|case| case.due(book.finished()));
        due.find(|run| !begun.contains(&run.id))
    };
    let mut done = |book: &mut Book, run: &RunId, whole: Whole| {
        book.add(run, whole)?;
        told(run, book)
    };
    side_by_side(runner, parallel, book, &due, &mut done).await
}

/// Does the runs that `due` names next, given those that are begun, up to `parallel` at once, and hands each to `done`.
///
/// After a failure no run is begun; those under way come to their ends, and what they finish is kept.
///
/// # Errors
/// The first of [`Runner::run`] or `done`.
pub(super) async fn side_by_side(
    runner: &impl Runner,
    parallel: usize,
    book: &mut Book,
    due: &dyn Fn(&Book, &BTreeSet<RunId>) -> Option<RunSpec>,
    done: &mut dyn FnMut(&mut Book, &RunId, Whole) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut begun = BTreeSet::new();
    let mut running = FuturesUnordered::new();
    let mut ended = Ok(());
    loop {
        // What has just ended may have made others due.
        while ended.is_ok() && running.len() < parallel.max(1) {
            let Some(run) = due(book, &begun) else {
                break;
            };
            begun.insert(run.id.clone());
            running.push(async move {
                let whole = runner.run(&run).await;
                (run.id, whole)
            });
        }
        let Some((id, whole)) = running.next().await else {
            return ended;
        };
        // The first failure is the cause of others.
        ended = ended.and(whole.and_then(|whole| done(book, &id, whole)));
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::measure::tests::{facts, line};
    use super::super::plan::tests::plan;
    use super::super::random::Random;
    use super::*;
    use std::cell::{Cell, RefCell};
    use std::task::Poll;

    /// How good a run is, is a function of its mixture and seed. A run takes a few turns, so that runs which are begun together
    /// end in another order. Stops after so many.
    #[derive(Default)]
    pub(crate) struct Fake {
        pub(crate) disk: RefCell<Finished>,
        pub(crate) done: RefCell<Vec<RunId>>,
        pub(crate) patience: Option<usize>,
        pub(crate) program: &'static str,
        /// A run whose trace it computes otherwise than the others.
        pub(crate) wrong: Option<RunId>,
        pub(crate) running: Cell<usize>,
        pub(crate) running_most: Cell<usize>,
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

    impl Fake {
        pub(crate) fn of(program: &'static str) -> Self {
            Self {
                program,
                ..Self::default()
            }
        }

        fn whole(&self, run: &RunSpec, outcome: Outcome) -> Whole {
            let is_wrong = self.wrong.as_ref() == Some(&run.id);
            let trace = format!("{is_wrong} {outcome:?}");
            Whole {
                outcome,
                proof: Proof {
                    config: digest_of(run),
                    data_version: facts().data_version,
                    program: self.program.to_owned(),
                    device: "cpu".to_owned(),
                    seconds: 1.0,
                    trace: blake3::hash(trace.as_bytes()).to_hex().to_string(),
                },
            }
        }
    }

    fn digest_of(run: &RunSpec) -> String {
        blake3::hash(format!("{run:?}").as_bytes()).to_hex().to_string()
    }

    impl Runner for Fake {
        fn find(&self, run: &RunSpec) -> Result<Option<Whole>, Failure> {
            Ok(self
                .disk
                .borrow()
                .get(&run.id)
                .map(|outcome| self.whole(run, outcome.clone())))
        }

        fn config_digest(&self, run: &RunSpec) -> Result<String, Failure> {
            Ok(digest_of(run))
        }

        async fn run(&self, run: &RunSpec) -> Result<Whole, Failure> {
            self.running.set(self.running.get() + 1);
            self.running_most.set(self.running_most.get().max(self.running.get()));
            for _ in 0..Random::of(run.id.seed, &run.id.to_string()).index(0..9) {
                turn().await;
            }
            self.running.set(self.running.get() - 1);
            if self
                .patience
                .is_some_and(|patience| patience <= self.done.borrow().len())
            {
                return Err(Failure::transient("the bench", "was killed", "start it again"));
            }
            let outcome = outcome_of(run);
            self.done.borrow_mut().push(run.id.clone());
            self.disk.borrow_mut().insert(run.id.clone(), outcome.clone());
            Ok(self.whole(run, outcome))
        }
    }

    /// Lets the others have a turn.
    async fn turn() {
        let mut had = false;
        std::future::poll_fn(|context| {
            context.waker().wake_by_ref();
            match std::mem::replace(&mut had, true) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
    }

    /// Does all of it on this thread.
    pub(crate) fn do_all(cases: &[CaseRuns<'_>], fake: &Fake, parallel: usize, book: &mut Book) -> Result<(), Failure> {
        futures::executor::block_on(carry_out(cases, fake, parallel, book, &mut |_, _| Ok(())))
    }

    pub(crate) fn runs<'a>(plan: &'a Plan, name: &'a str, facts: &'a Facts) -> CaseRuns<'a> {
        CaseRuns {
            plan,
            name,
            facts,
            // So many that UniMax caps a domain, and no two candidates are the same.
            run_tokens: 6_000,
        }
    }

    /// UniMax is uniform where no domain repeats: its runs are done once, and named for both.
    #[test]
    fn candidates_with_the_same_weights_share_their_runs() {
        let (plan, facts) = (plan(), facts());
        let case = CaseRuns {
            run_tokens: 2_000,
            ..runs(&plan, "plain", &facts)
        };
        assert_eq!(case.named(NamedStatic::Unimax), case.named(NamedStatic::Uniform));
        let names: Vec<String> = case.candidates().into_iter().map(|(name, _)| name).collect();
        let differ: Vec<(String, String)> = names
            .into_iter()
            .zip(case.runs_of_candidates())
            .filter(|(name, runs)| name != runs)
            .collect();
        assert_eq!(differ, [("unimax".to_owned(), "uniform".to_owned())]);
        let mut book = Book::default();
        do_all(&[case], &Fake::default(), 2, &mut book).expect("done");
        let finished = book.finished();
        assert!(finished.keys().all(|run| run.arm != "unimax"), "{finished:?}");
        assert_eq!(finished.len(), case.total(finished));
        let other = runs(&plan, "plain", &facts);
        let mut book_of_other = Book::default();
        do_all(&[other], &Fake::default(), 2, &mut book_of_other).expect("done");
        let without = other.total(book_of_other.finished());
        assert_eq!(without - finished.len(), 2 + 2, "a run less a seed");
        // Both are judged, by the same runs; and the sweep has both.
        let tuned = case.tuned(finished).expect("all are there");
        let score = |name: &str| tuned.iter().find(|(arm, _)| arm == name).expect("a candidate").1;
        assert_eq!(score("unimax").to_bits(), score("uniform").to_bits());
        let arms = case.arms(&case.best_static(finished).expect("a best one"));
        let unimax = arms.iter().find(|arm| arm.label == "unimax").expect("an arm");
        assert_eq!(unimax.runs, "uniform");
    }

    #[test]
    fn a_plan_is_carried_out_to_its_end_in_three_stages() {
        let (plan, facts) = (plan(), facts());
        let cases = [runs(&plan, "plain", &facts), runs(&plan, "noise", &facts)];
        let fake = Fake::default();
        let mut book = Book::default();
        do_all(&cases, &fake, 1, &mut book).expect("done");
        let finished = book.finished();
        assert_eq!(
            finished.len(),
            cases.iter().map(|case| case.total(finished)).sum::<usize>()
        );
        assert!(cases.iter().all(|case| case.due(finished).is_empty()));
        // Nothing is judged before all is tuned, and every judged run is on another seed than every tuned one.
        let done = fake.done.borrow();
        let of_case: Vec<&RunId> = done.iter().filter(|run| run.case == "plain").collect();
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

    /// How many runs are done at once decides no number, and no run is begun before what it is made of is there.
    #[test]
    fn runs_side_by_side_find_the_same() {
        let (plan, facts) = (plan(), facts());
        let cases = [runs(&plan, "plain", &facts), runs(&plan, "noise", &facts)];
        let outcomes = |parallel: usize| {
            let fake = Fake::default();
            let mut book = Book::default();
            do_all(&cases, &fake, parallel, &mut book).expect("done");
            assert_eq!(fake.running_most.get(), parallel.min(book.finished().len()));
            let done = fake.done.take();
            assert_eq!(done.len(), book.finished().len(), "each once");
            (done, book.finished().clone())
        };
        let ((one, expected), (three, found), (all, found_at_once)) = (outcomes(1), outcomes(3), outcomes(7));
        assert_eq!(found, expected);
        assert_eq!(found_at_once, expected);
        assert!(one != three && three != all, "runs ended in another order");
        let place = |arm: &str| {
            let is_it = |run: &RunId| (run.case.as_str(), run.arm.as_str(), run.seed) == ("noise", arm, 2);
            all.iter().position(is_it).expect("done")
        };
        assert!(place("ado") < place("ado-mean").min(place("ado-final")));
    }

    /// A run that fails ends the bench; those beside it come to their ends, and are kept.
    #[test]
    fn what_runs_beside_a_failure_is_kept() {
        struct Failing(Fake);
        impl Runner for Failing {
            fn find(&self, run: &RunSpec) -> Result<Option<Whole>, Failure> {
                self.0.find(run)
            }
            fn config_digest(&self, run: &RunSpec) -> Result<String, Failure> {
                self.0.config_digest(run)
            }
            async fn run(&self, run: &RunSpec) -> Result<Whole, Failure> {
                match run.id.arm.as_str() {
                    "uniform" => Err(Failure::halted(run.id.to_string(), "is broken", "look at it")),
                    _ => self.0.run(run).await,
                }
            }
        }
        let (plan, facts) = (plan(), facts());
        let cases = [runs(&plan, "plain", &facts)];
        let (runner, mut book) = (Failing(Fake::default()), Book::default());
        let ended = futures::executor::block_on(carry_out(&cases, &runner, 3, &mut book, &mut |_, _| Ok(())));
        let failure = ended.expect_err("a failure");
        assert_eq!(failure.exit, crate::exit::Exit::Halted);
        assert!(failure.message.contains("plain / uniform / seed 101"), "{failure}");
        let kept: BTreeSet<&str> = book.finished().keys().map(|run| run.arm.as_str()).collect();
        assert!(kept.iter().eq(&["natural", "sqrt"]), "begun with it: {kept:?}");
        assert_eq!(runner.0.running.get(), 0);
    }

    /// Killed after any number of runs, a bench that is started again does what is missing, once each.
    #[test]
    fn a_killed_bench_goes_on_where_it_stood() {
        let (plan, facts) = (plan(), facts());
        let cases = [runs(&plan, "plain", &facts), runs(&plan, "noise", &facts)];
        let (all, mut expected) = (Fake::default(), Book::default());
        do_all(&cases, &all, 1, &mut expected).expect("done");
        for (lives, parallel) in [(1, 1), (7, 1), (40, 1), (1, 3), (7, 3), (40, 3)] {
            let mut disk = Finished::new();
            let mut done = Vec::new();
            loop {
                let fake = Fake {
                    disk: RefCell::new(std::mem::take(&mut disk)),
                    patience: Some(lives),
                    ..Fake::default()
                };
                let mut book = Book::default();
                recall(&cases, &fake, &mut book).expect("what is there");
                assert_eq!(book.finished().len(), done.len(), "all that was done is found");
                let ended = do_all(&cases, &fake, parallel, &mut book);
                done.append(&mut fake.done.borrow_mut());
                disk = fake.disk.take();
                if ended.is_ok() {
                    assert_eq!(book.finished(), expected.finished());
                    break;
                }
            }
            if parallel == 1 {
                assert_eq!(done, *all.done.borrow(), "{lives} runs a life");
            }
            done.sort();
            assert!(done.iter().eq(expected.finished().keys()), "each once");
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
