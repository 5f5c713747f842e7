//! What the finished runs say: per arm its numbers, per controller its paired comparisons, and a verdict by a rule that was
//! fixed before. Pure; `report.json` is this, written out.
//!
//! The rule. In each case each controller is compared with three arms on the primary metric: the natural mixture, the best
//! static one of the sweep, and its own mean mixture frozen. It is *better* than one of them where the interval of the
//! mean difference is below zero and the exact p-value, corrected for the three comparisons (Holm), is at most
//! `1 - confidence`; *worse* likewise. Everything else, and every other pair and metric, is shown without a verdict.

use super::book::Book;
use super::cases::{Overlapping, Ready};
use super::epochs::{self, Length, TextEpochs};
use super::margin::{self, Margin};
use super::measure::{Facts, Outcome};
use super::plan::{Metric, NamedStatic, Plan};
use super::schedule::{Arm, BEST_STATIC, CaseRuns, Finished, RunId};
use super::statistics::{self, Paired};
use serde::Serialize;
use std::collections::BTreeSet;

/// A whole comparison, as far as it has come.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Results {
    /// The plan.
    pub plan: Plan,
    /// Hashes of the programs that did the runs: more than one is a reason for doubt.
    pub programs: BTreeSet<String>,
    /// Runs that were done once more, with the same traces, by the program that did them again.
    pub again: Vec<DoneAgain>,
    /// Finished runs.
    pub finished: usize,
    /// Runs in all.
    pub total: usize,
    /// By case.
    pub cases: Vec<CaseResults>,
}

/// Runs that one program did again, with the same traces, bit for bit.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct DoneAgain {
    /// Its hash.
    pub program: String,
    /// Those that another program had done first.
    pub of_others: usize,
    /// Those that it had done first itself.
    pub of_its_own: usize,
}

/// One case.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct CaseResults {
    /// Its name.
    pub name: String,
    /// Its data.
    pub facts: Facts,
    /// Held-out documents before those that overlap with training text were left out.
    pub held_out_documents: usize,
    /// Held-out documents that were left out.
    pub dropped: usize,
    /// The first few of them.
    pub dropped_examples: Vec<Overlapping>,
    /// Static candidates with their mixture, and their mean on the tuning seeds once all are there.
    pub candidates: Vec<Candidate>,
    /// The best of them.
    pub best_static: Option<String>,
    /// The arms, judged.
    pub arms: Vec<ArmResults>,
    /// How often they pass over each text.
    pub epochs: Vec<TextEpochs>,
    /// Controllers against other arms.
    pub comparisons: Vec<Comparison>,
    /// Controllers against the best mixture that needs no run.
    pub margins: Vec<Margin>,
}

/// A static candidate.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Candidate {
    /// Its name.
    pub name: String,
    /// Whose runs are its: its own name, or that of the first candidate with the same weights, bit for bit.
    pub runs: String,
    /// Its mixture, by domain.
    pub mixture: Vec<f64>,
    /// Mean of the primary metric on the tuning seeds.
    pub tuned: Option<f64>,
}

/// An arm on the judging seeds.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct ArmResults {
    /// Which.
    pub arm: Arm,
    /// Its finished seeds.
    pub seeds: Vec<u64>,
    /// By metric, in the order of [`Metric::ALL`].
    pub metrics: Vec<MetricResults>,
    /// Mean over the seeds of the mean mixture, by domain.
    pub mean_mixture: Vec<f64>,
}

/// A metric of an arm.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct MetricResults {
    /// Which.
    pub metric: Metric,
    /// By finished seed; none where the target is not reached.
    pub values: Vec<Option<f64>>,
    /// Mean; none where a value is missing.
    pub mean: Option<f64>,
    /// Standard deviation over seeds; likewise.
    pub deviation: Option<f64>,
}

/// A controller against another arm. Differences are controller minus other: less than zero is good.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Comparison {
    /// The controller.
    pub controller: String,
    /// The other arm.
    pub against: String,
    /// The metric.
    pub metric: Metric,
    /// What the pairs say; none where there are fewer than two, or one of a pair misses the target.
    pub paired: Option<Paired>,
    /// Pairs of which one or both miss the target.
    pub missed: usize,
    /// For the comparisons that verdicts are made of: p-value corrected for all of its controller and case.
    pub p_corrected: Option<f64>,
    /// Likewise.
    pub verdict: Option<Verdict>,
}

/// What may be said.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The controller is better.
    Better,
    /// The controller is worse.
    Worse,
    /// No difference is shown: which is not to say that there is none.
    NotShown,
    /// Not all seeds are there yet, or runs miss the target.
    Incomplete,
    /// No outcome on so few seeds could be significant.
    TooFewSeeds,
}

/// The arms that a controller has to beat, as its reports call them.
fn opponents(controller: &str) -> [String; 3] {
    [
        NamedStatic::Natural.name().to_owned(),
        BEST_STATIC.to_owned(),
        format!("{controller}-mean"),
    ]
}

impl Results {
    /// Judges what is finished. `cases` and `ready` are in the plan's order.
    #[must_use]
    pub fn of(plan: &Plan, cases: &[CaseRuns<'_>], ready: &[&Ready], book: &Book) -> Self {
        let finished = book.finished();
        let judged = cases
            .iter()
            .zip(ready)
            .map(|(case, ready)| judge(case, ready, finished));
        Self {
            plan: plan.clone(),
            programs: book.programs(),
            again: done_again(book),
            finished: finished.len(),
            total: cases.iter().map(|case| case.total(finished)).sum(),
            cases: judged.collect(),
        }
    }
}

fn done_again(book: &Book) -> Vec<DoneAgain> {
    let lines: BTreeSet<(&String, &RunId)> = book.again().iter().map(|line| (&line.program, &line.run)).collect();
    let programs: BTreeSet<&String> = lines.iter().map(|(program, _)| *program).collect();
    let of = |program: &String| {
        let runs = lines.iter().filter(|(by, _)| *by == program);
        let is_own = |run: &RunId| book.proof(run).is_some_and(|proof| proof.program == *program);
        let (own, others): (Vec<&RunId>, Vec<&RunId>) = runs.map(|(_, run)| *run).partition(|run| is_own(run));
        DoneAgain {
            program: program.clone(),
            of_others: others.len(),
            of_its_own: own.len(),
        }
    };
    programs.into_iter().map(of).collect()
}

fn judge(case: &CaseRuns<'_>, ready: &Ready, finished: &Finished) -> CaseResults {
    let tuned = case.tuned(finished);
    let best_static = case.best_static(finished);
    let candidates = case.candidates().into_iter().enumerate();
    let runs = case.runs_of_candidates();
    let arms = case.arms(best_static.as_deref().unwrap_or_default());
    let judged: Vec<ArmResults> = arms.iter().map(|arm| judge_arm(case, arm, finished)).collect();
    CaseResults {
        name: case.name.to_owned(),
        facts: case.facts.clone(),
        held_out_documents: ready.held_out_documents,
        dropped: ready.dropped,
        dropped_examples: ready.dropped_examples.clone(),
        candidates: candidates
            .map(|(at, (name, mixture))| Candidate {
                name,
                runs: runs[at].clone(),
                mixture,
                tuned: tuned.as_ref().map(|tuned| tuned[at].1),
            })
            .collect(),
        comparisons: compare(case, &arms, finished),
        margins: margin::margins(case, &arms, finished),
        epochs: passes(case, &judged),
        arms: judged,
        best_static,
    }
}

fn passes(case: &CaseRuns<'_>, arms: &[ArmResults]) -> Vec<TextEpochs> {
    let mixtures: Vec<(&str, &[f64])> = arms
        .iter()
        .filter(|arm| !arm.mean_mixture.is_empty())
        .map(|arm| (arm.arm.label.as_str(), arm.mean_mixture.as_slice()))
        .collect();
    let length = Length {
        steps: case.plan.steps,
        tokens: case.run_tokens,
    };
    epochs::epochs(case.facts, &mixtures, length)
}

/// A run of the judging, by arm and seed.
#[must_use]
pub fn run<'a>(case: &CaseRuns<'_>, arm: &Arm, seed: u64, finished: &'a Finished) -> Option<&'a Outcome> {
    finished.get(&RunId {
        case: case.name.to_owned(),
        arm: arm.runs.clone(),
        seed,
    })
}

/// The number of a run; none where it misses the target, or the target itself is not known.
fn value(case: &CaseRuns<'_>, outcome: &Outcome, metric: Metric, seed: u64, finished: &Finished) -> Option<f64> {
    let target = case.target(finished, seed).unwrap_or(f64::NAN);
    outcome.metric(metric, target)
}

/// The number of an arm's run; none where it is not finished, too.
pub(super) fn value_of(case: &CaseRuns<'_>, arm: &Arm, metric: Metric, seed: u64, finished: &Finished) -> Option<f64> {
    value(case, run(case, arm, seed, finished)?, metric, seed, finished)
}

fn judge_arm(case: &CaseRuns<'_>, arm: &Arm, finished: &Finished) -> ArmResults {
    let judging = &case.plan.seeds.judging;
    let runs: Vec<(u64, &Outcome)> = judging
        .iter()
        .filter_map(|&seed| Some((seed, run(case, arm, seed, finished)?)))
        .collect();
    let metrics = Metric::ALL.map(|metric| {
        let values: Vec<Option<f64>> = runs
            .iter()
            .map(|(seed, outcome)| value(case, outcome, metric, *seed, finished))
            .collect();
        let known: Option<Vec<f64>> = values.iter().copied().collect();
        let known = known.filter(|known| !known.is_empty());
        MetricResults {
            metric,
            mean: known.as_deref().map(statistics::mean),
            deviation: known.as_deref().and_then(statistics::deviation),
            values,
        }
    });
    let domains = case.facts.domains.len();
    let mean = |domain: usize| {
        let weights: Vec<f64> = runs.iter().map(|(_, outcome)| outcome.mean_mixture[domain]).collect();
        statistics::mean(&weights)
    };
    ArmResults {
        arm: arm.clone(),
        seeds: runs.iter().map(|(seed, _)| *seed).collect(),
        metrics: metrics.into(),
        mean_mixture: if runs.is_empty() {
            Vec::new()
        } else {
            (0..domains).map(mean).collect()
        },
    }
}

fn compare(case: &CaseRuns<'_>, arms: &[Arm], finished: &Finished) -> Vec<Comparison> {
    let mut all = Vec::new();
    for controller in case.plan.controllers() {
        let Some(own) = arms.iter().find(|arm| arm.label == controller.name) else {
            continue;
        };
        let opponents = opponents(&controller.name);
        let frozen = ["mean", "final"].map(|end| format!("{}-{end}", controller.name));
        // Other controllers are compared with static arms, too, and not with each other.
        let others = arms.iter().filter(|arm| {
            let is_named = NamedStatic::ALL.iter().any(|named| named.name() == arm.label);
            is_named || arm.label == BEST_STATIC || frozen.contains(&arm.label)
        });
        let mut comparisons: Vec<Comparison> = others
            .flat_map(|other| Metric::ALL.map(|metric| pair(case, own, other, metric, finished)))
            .collect();
        let primary = case.plan.metrics.primary;
        let mut family: Vec<&mut Comparison> = comparisons
            .iter_mut()
            .filter(|comparison| comparison.metric == primary && opponents.contains(&comparison.against))
            .collect();
        give_verdicts(case.plan, &mut family);
        all.append(&mut comparisons);
    }
    all
}

fn pair(case: &CaseRuns<'_>, own: &Arm, other: &Arm, metric: Metric, finished: &Finished) -> Comparison {
    let mut differences = Vec::new();
    let mut missed = 0;
    for &seed in &case.plan.seeds.judging {
        let (Some(a), Some(b)) = (run(case, own, seed, finished), run(case, other, seed, finished)) else {
            continue;
        };
        let number = |outcome| value(case, outcome, metric, seed, finished);
        match (number(a), number(b)) {
            (Some(a), Some(b)) => differences.push(a - b),
            _ => missed += 1,
        }
    }
    let label = format!("{} {} {} {metric:?}", case.name, own.label, other.label);
    let bootstrap = case.plan.statistics.bootstrap();
    Comparison {
        controller: own.label.clone(),
        against: other.label.clone(),
        metric,
        // A pair that misses the target says something, but no number: a mean without it would flatter.
        paired: statistics::paired(&differences, &bootstrap, &label).filter(|_| missed == 0),
        missed,
        p_corrected: None,
        verdict: None,
    }
}

fn give_verdicts(plan: &Plan, family: &mut [&mut Comparison]) {
    let alpha = 1.0 - plan.statistics.confidence;
    let seeds = plan.seeds.judging.len();
    let p: Vec<f64> = family
        .iter()
        .map(|c| c.paired.map_or(1.0, |paired| paired.p_sign_flip))
        .collect();
    let corrected = statistics::holm(&p);
    // The best that all of a family can have together.
    let too_few = statistics::p_least(seeds) * family.len() as f64 > alpha;
    for (comparison, corrected) in family.iter_mut().zip(corrected) {
        comparison.verdict = Some(match comparison.paired.filter(|paired| paired.pairs == seeds) {
            _ if too_few => Verdict::TooFewSeeds,
            None => Verdict::Incomplete,
            Some(paired) if paired.interval.excludes_zero() && corrected <= alpha => {
                if paired.mean < 0.0 {
                    Verdict::Better
                } else {
                    Verdict::Worse
                }
            }
            Some(_) => Verdict::NotShown,
        });
        comparison.p_corrected = comparison.paired.map(|_| corrected);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::measure::tests::facts;
    use super::super::plan::tests::TEXT;
    use super::super::schedule::tests::{Fake, do_all, runs};
    use super::*;
    use std::path::PathBuf;

    pub(crate) fn ready(facts: &Facts) -> Ready {
        Ready {
            domains: Vec::new(),
            tokenizer: PathBuf::new(),
            data: PathBuf::new(),
            late: None,
            facts: facts.clone(),
            dropped: 1,
            dropped_examples: Vec::new(),
            held_out_documents: 9,
        }
    }

    pub(crate) fn plan_of(judging: &str) -> Plan {
        let text = TEXT.replace("judging = [1, 2]", &format!("judging = {judging}"));
        Plan::parse(&text, "test.toml").expect("a good plan")
    }

    /// Results of the whole plan, done by the fake runner: the adaptive arm ends at the best mixture, frozen ones do not.
    pub(crate) fn whole(plan: &Plan) -> (Results, Finished) {
        let facts = facts();
        let cases = [runs(plan, "plain", &facts), runs(plan, "noise", &facts)];
        let mut book = Book::default();
        do_all(&cases, &Fake::default(), 3, &mut book).expect("done");
        let ready = ready(&facts);
        (
            Results::of(plan, &cases, &[&ready, &ready], &book),
            book.finished().clone(),
        )
    }

    fn verdicts(results: &Results) -> Vec<(&str, Verdict)> {
        let found = results.cases[0].comparisons.iter();
        found.filter_map(|c| Some((c.against.as_str(), c.verdict?))).collect()
    }

    #[test]
    fn a_clear_difference_on_enough_seeds_is_a_verdict() {
        let (results, finished) = whole(&plan_of("[1, 2, 3, 4, 5, 6, 7, 8]"));
        assert_eq!((results.finished, results.total), (finished.len(), finished.len()));
        let expected = ["natural", "best-static", "ado-mean"].map(|arm| (arm, Verdict::Better));
        assert_eq!(verdicts(&results), expected);
        let comparison = results.cases[0]
            .comparisons
            .iter()
            .find(|c| c.against == "natural" && c.metric == Metric::Macro)
            .expect("compared");
        let paired = comparison.paired.expect("eight pairs");
        assert_eq!((paired.pairs, comparison.missed), (8, 0));
        assert!(paired.mean < 0.0 && paired.interval.high < 0.0);
        assert!(comparison.p_corrected.is_some_and(|p| p > paired.p_sign_flip));
    }

    #[test]
    fn few_seeds_give_numbers_and_no_verdict() {
        let (results, _) = whole(&plan_of("[1, 2]"));
        assert!(
            verdicts(&results)
                .iter()
                .all(|(_, verdict)| *verdict == Verdict::TooFewSeeds)
        );
        assert!(results.cases[0].comparisons.iter().any(|c| c.paired.is_some()));
    }

    #[test]
    fn arms_that_miss_the_target_are_counted_and_not_averaged() {
        let (results, _) = whole(&plan_of("[1, 2, 3, 4, 5, 6, 7, 8]"));
        let arms = &results.cases[0].arms;
        let metric = |label: &str| {
            let arm = arms.iter().find(|arm| arm.arm.label == label).expect("an arm");
            arm.metrics
                .iter()
                .find(|m| m.metric == Metric::TokensToTarget)
                .expect("a metric")
                .clone()
        };
        // The natural arm reaches its own end at the end.
        assert_eq!(metric("natural").mean, Some(1_000.0));
        assert!(metric("ado").mean.is_some_and(|tokens| tokens < 1_000.0));
        let missing: Vec<&str> = arms
            .iter()
            .filter(|arm| arm.metrics[4].mean.is_none())
            .map(|arm| arm.arm.label.as_str())
            .collect();
        for label in missing {
            let comparison = results.cases[0]
                .comparisons
                .iter()
                .find(|c| c.against == label && c.metric == Metric::TokensToTarget)
                .expect("compared");
            assert!(comparison.missed > 0 && comparison.paired.is_none(), "{label}");
        }
    }

    #[test]
    fn an_unfinished_bench_says_so() {
        let plan = plan_of("[1, 2, 3, 4, 5, 6, 7, 8]");
        let facts = facts();
        let cases = [runs(&plan, "plain", &facts)];
        let fake = Fake {
            patience: Some(30),
            ..Fake::default()
        };
        let mut book = Book::default();
        assert!(do_all(&cases, &fake, 1, &mut book).is_err());
        let ready = ready(&facts);
        let results = Results::of(&plan, &cases, &[&ready], &book);
        assert_eq!(results.finished, 30);
        assert!(results.total > 30);
        assert!(
            verdicts(&results)
                .iter()
                .all(|(_, verdict)| *verdict == Verdict::Incomplete),
            "{results:?}"
        );
    }
}
