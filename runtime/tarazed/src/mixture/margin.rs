//! Is a controller ever much worse than what a person would have set without knowing better? Pure.
//!
//! The *prior* mixtures are those that need no run: the named static ones. The best of them is chosen **on the judging seeds
//! themselves**, which favours it, so a margin that holds against it holds against each prior that one could have picked.
//! Differences are relative, `(controller - prior) / prior`, paired by seed; less is better.

use super::plan::{Metric, NamedStatic};
use super::results::value_of;
use super::schedule::{Arm, CaseRuns, Finished};
use super::statistics::{self, Paired};
use serde::Serialize;

/// A controller is to be worse than the best prior by no more than this share of the primary metric.
pub const MARGIN_MAX: f64 = 0.01;

/// A controller against the best prior of its case.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Margin {
    /// The controller.
    pub controller: String,
    /// The prior with the least mean on the judging seeds; none while seeds are missing, or where runs miss the target.
    pub prior: Option<String>,
    /// Relative differences; none likewise.
    pub paired: Option<Paired>,
    /// What may be said.
    pub verdict: MarginVerdict,
}

/// What may be said about a margin.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MarginVerdict {
    /// The whole interval is at or below the margin.
    Within,
    /// The whole interval is above it.
    Beyond,
    /// The margin lies in the interval.
    NotShown,
    /// Not all seeds are there yet, runs miss the target, or one seed alone gives no interval.
    Incomplete,
}

/// Judges the controllers of a case, in the plan's order.
#[must_use]
pub fn margins(case: &CaseRuns<'_>, arms: &[Arm], finished: &Finished) -> Vec<Margin> {
    let primary = case.plan.metrics.primary;
    let numbers = |label: &str| -> Option<Vec<f64>> {
        let arm = arms.iter().find(|arm| arm.label == label)?;
        let seeds = case.plan.seeds.judging.iter();
        seeds
            .map(|&seed| value_of(case, arm, primary, seed, finished))
            .collect()
    };
    // All of them, or the best is not known.
    let priors: Option<Vec<(&str, Vec<f64>)>> = NamedStatic::ALL
        .iter()
        .map(|prior| Some((prior.name(), numbers(prior.name())?)))
        .collect();
    let best = priors.and_then(|priors| {
        priors
            .into_iter()
            .min_by(|(_, a), (_, b)| statistics::mean(a).total_cmp(&statistics::mean(b)))
    });
    case.plan
        .controllers()
        .map(|controller| {
            let own = numbers(&controller.name);
            let paired = best.as_ref().zip(own).and_then(|((prior, theirs), own)| {
                let relative: Vec<f64> = own.iter().zip(theirs).map(|(a, b)| (a - b) / b).collect();
                let label = format!("margin {} {} {prior} {}", case.name, controller.name, name_of(primary));
                statistics::paired(&relative, &case.plan.statistics.bootstrap(), &label)
            });
            Margin {
                controller: controller.name.clone(),
                prior: best.as_ref().map(|(prior, _)| (*prior).to_owned()),
                verdict: paired.map_or(MarginVerdict::Incomplete, judge),
                paired,
            }
        })
        .collect()
}

fn name_of(metric: Metric) -> String {
    format!("{metric:?}")
}

fn judge(paired: Paired) -> MarginVerdict {
    match paired.interval {
        interval if interval.high <= MARGIN_MAX => MarginVerdict::Within,
        interval if interval.low > MARGIN_MAX => MarginVerdict::Beyond,
        _ => MarginVerdict::NotShown,
    }
}

#[cfg(test)]
mod tests {
    use super::super::results::tests::{plan_of, whole};
    use super::super::statistics::Interval;
    use super::*;

    fn of(low: f64, high: f64) -> MarginVerdict {
        judge(Paired {
            pairs: 8,
            mean: f64::midpoint(low, high),
            deviation: 0.1,
            interval: Interval { low, high },
            p_sign_flip: 1.0,
        })
    }

    #[test]
    fn a_margin_holds_fails_or_is_not_shown_by_its_whole_interval() {
        assert_eq!(of(-0.02, -0.01), MarginVerdict::Within);
        assert_eq!(of(0.002, 0.01), MarginVerdict::Within);
        assert_eq!(of(0.002, 0.011), MarginVerdict::NotShown);
        assert_eq!(of(0.011, 0.02), MarginVerdict::Beyond);
    }

    /// The fake's adaptive arm ends at the best mixture of all, so it is within any margin of the best prior; the prior that is
    /// named is the one with the least mean.
    #[test]
    fn the_best_prior_is_the_one_with_the_least_mean() {
        let (results, _) = whole(&plan_of("[1, 2, 3, 4, 5, 6, 7, 8]"));
        let case = &results.cases[0];
        let margin = &case.margins[0];
        assert_eq!(
            (margin.controller.as_str(), margin.verdict),
            ("ado", MarginVerdict::Within)
        );
        let mean = |label: &str| {
            let arm = case.arms.iter().find(|arm| arm.arm.label == label).expect("an arm");
            arm.metrics[0].mean.expect("a mean")
        };
        assert_eq!(case.arms[0].metrics[0].metric, results.plan.metrics.primary);
        let prior = margin.prior.as_deref().expect("a prior");
        assert!(
            NamedStatic::ALL.iter().all(|named| mean(prior) <= mean(named.name())),
            "{prior}"
        );
        // The mean of ratios is near the ratio of means where seeds differ little.
        let expected = (mean("ado") - mean(prior)) / mean(prior);
        assert!(
            (margin.paired.expect("paired").mean - expected).abs() < 0.01,
            "{margin:?} {expected}"
        );
    }

    #[test]
    fn without_all_seeds_nothing_is_said() {
        let (results, mut finished) = whole(&plan_of("[1, 2, 3, 4, 5, 6, 7, 8]"));
        let gone = finished
            .keys()
            .find(|run| run.case == "plain" && run.arm == "sqrt" && run.seed == 3)
            .expect("there")
            .clone();
        finished.remove(&gone);
        let facts = super::super::measure::tests::facts();
        let case = super::super::schedule::tests::runs(&results.plan, "plain", &facts);
        let arms = case.arms(case.best_static(&finished).as_deref().unwrap_or_default());
        let margins = margins(&case, &arms, &finished);
        assert!(
            margins
                .iter()
                .all(|margin| margin.verdict == MarginVerdict::Incomplete && margin.prior.is_none()),
            "{margins:?}"
        );
    }
}
