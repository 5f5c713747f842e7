//! Results as text for people: `report.md`. Pure.

use super::epochs::TextEpochs;
use super::margin::{MARGIN_MAX, MarginVerdict};
use super::measure::DomainFacts;
use super::plan::{Metric, Target};
use super::results::{ArmResults, CaseResults, Comparison, Results, Verdict};
use super::statistics;
use std::fmt::Write as _;

/// Figures of a case, by file name; the names are written down here alone.
pub const CURVES: &str = "curves";
/// See [`CURVES`].
pub const DIFFERENCES: &str = "differences";
/// See [`CURVES`].
pub const MIXTURE: &str = "mixture";

/// File of a figure.
#[must_use]
pub fn figure_file(case: &str, what: &str, arm: &str) -> String {
    let arm = if arm.is_empty() {
        String::new()
    } else {
        format!("-{arm}")
    };
    format!("{case}-{what}{arm}.svg")
}

/// The report; figures are looked for in `figures/` beside it. Writing to a string cannot fail.
#[must_use]
pub fn markdown(results: &Results) -> String {
    let mut text = String::new();
    let plan = &results.plan;
    let _ = writeln!(text, "# Mixtures compared: {}\n", plan.name);
    if results.finished < results.total {
        let _ = writeln!(
            text,
            "**Unfinished: {} of {} runs.** What is missing has no numbers below, and nothing has a verdict without all its \
             seeds.\n",
            results.finished, results.total
        );
    } else {
        let _ = writeln!(text, "All {} runs are finished.\n", results.total);
    }
    let _ = writeln!(
        text,
        "Each run: `{}`{}, {} steps, {} ranks. Chosen on seeds {:?}, judged on seeds {:?}, paired by seed. Programs (BLAKE3): \
         {}.\n",
        plan.base.display(),
        if plan.set.is_empty() {
            String::new()
        } else {
            format!(" with `{}`", plan.set.join("`, `"))
        },
        plan.steps,
        plan.ranks,
        plan.seeds.tuning,
        plan.seeds.judging,
        if results.programs.is_empty() {
            "none yet".to_owned()
        } else {
            short(&results.programs)
        },
    );
    if results.programs.len() > 1 {
        text.push_str(
            "**Runs were done by more than one program: numbers of different programs need not be comparable.**\n\n",
        );
    }
    done_again(&mut text, results);
    verdicts(&mut text, results);
    reading(&mut text, results);
    margins(&mut text, results);
    for case in &results.cases {
        case_text(&mut text, case, results);
    }
    left_out(&mut text, results);
    text
}

fn head(hash: &str) -> &str {
    hash.get(..16).unwrap_or(hash)
}

fn short(programs: &std::collections::BTreeSet<String>) -> String {
    let heads: Vec<&str> = programs.iter().map(|hash| head(hash)).collect();
    heads.join(", ")
}

/// Whole traces were compared, by their hashes; a run whose trace differs halts the bench.
fn done_again(text: &mut String, results: &Results) {
    for again in &results.again {
        for (count, by) in [
            (again.of_others, "another program"),
            (again.of_its_own, "the program that had done them"),
        ] {
            if count > 0 {
                let _ = writeln!(
                    text,
                    "{count} of the {} runs were done again by {by} ({}), with the same trace, bit for bit.\n",
                    results.finished,
                    head(&again.program)
                );
            }
        }
    }
}

const fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Better => "**better**",
        Verdict::Worse => "**worse**",
        Verdict::NotShown => "no difference shown",
        Verdict::Incomplete => "incomplete",
        Verdict::TooFewSeeds => "too few seeds for a verdict",
    }
}

fn judged(case: &CaseResults) -> impl Iterator<Item = &Comparison> {
    case.comparisons
        .iter()
        .filter(|comparison| comparison.verdict.is_some())
}

fn verdicts(text: &mut String, results: &Results) {
    let primary = results.plan.metrics.primary;
    let _ = writeln!(text, "## Verdicts\n\nOn the primary metric ({}).\n", primary.title());
    text.push_str("| case | controller | against | mean difference | interval | p, corrected | verdict |\n|---|---|---|---|---|---|---|\n");
    for case in &results.cases {
        for comparison in judged(case) {
            let Some(verdict) = comparison.verdict else { continue };
            let (mean, interval) = difference(comparison);
            let p = comparison
                .p_corrected
                .map_or_else(|| "-".to_owned(), |p| format!("{p:.4}"));
            let _ = writeln!(
                text,
                "| {} | {} | {} | {mean} | {interval} | {p} | {} |",
                case.name,
                comparison.controller,
                comparison.against,
                word(verdict)
            );
        }
    }
    text.push('\n');
}

/// What keeps a reader from taking more out of the numbers than is in them.
fn reading(text: &mut String, results: &Results) {
    let plan = &results.plan;
    let families = results.cases.len() * plan.controllers().count();
    let alpha = 1.0 - plan.statistics.confidence;
    let shown: usize = results.cases.iter().map(|case| case.comparisons.len()).sum();
    let _ = writeln!(
        text,
        "Differences are controller minus other arm with the same seed: below zero the controller is better. Intervals are \
         expanded percentile bootstrap intervals of the mean at {:.0}% ({} resamples, seed {}). The test flips the signs of \
         the differences, all of them exactly; with {} judging seeds no p-value is below {:.4}. It is corrected (Holm) for the \
         three comparisons of its controller and case, so in each such family a difference that is none is called one with a \
         chance of at most {:.0}%. Families: {families}; if no controller differed anywhere, about {:.1} of them would \
         show something. The {shown} comparisons of all pairs and metrics below carry no correction and no verdict: one in \
         {:.0} of such intervals misses by chance. `no difference shown` does not say that there is none.\n",
        plan.statistics.confidence * 100.0,
        plan.statistics.resamples,
        plan.statistics.seed,
        plan.seeds.judging.len(),
        statistics::p_least(plan.seeds.judging.len()),
        alpha * 100.0,
        alpha * families as f64,
        1.0 / alpha,
    );
}

fn margins(text: &mut String, results: &Results) {
    let _ = writeln!(
        text,
        "## Never much worse?\n\nThe best of the mixtures that need no run (natural, uniform, sqrt, unimax) is chosen on the judging \
         seeds themselves, which favours it. Is a controller worse than it by more than {:.0}% of the primary metric? Relative \
         differences, paired by seed, with the same intervals; uncorrected.\n",
        MARGIN_MAX * 100.0
    );
    text.push_str("| case | controller | best prior | mean | interval | |\n|---|---|---|---|---|---|\n");
    for case in &results.cases {
        for margin in &case.margins {
            let (mean, interval) = margin.paired.map_or_else(
                || ("-".to_owned(), "-".to_owned()),
                |paired| {
                    let percent = |value: f64| format!("{:+.2}%", value * 100.0);
                    let (low, high) = (percent(paired.interval.low), percent(paired.interval.high));
                    (percent(paired.mean), format!("{low} to {high}"))
                },
            );
            let said = match margin.verdict {
                MarginVerdict::Within => "within the margin",
                MarginVerdict::Beyond => "**worse by more**",
                MarginVerdict::NotShown => "not shown",
                MarginVerdict::Incomplete => "incomplete",
            };
            let prior = margin.prior.as_deref().unwrap_or("-");
            let _ = writeln!(
                text,
                "| {} | {} | {prior} | {mean} | {interval} | {said} |",
                case.name, margin.controller
            );
        }
    }
    text.push('\n');
}

fn case_text(text: &mut String, case: &CaseResults, results: &Results) {
    let _ = writeln!(text, "## Case {}\n", case.name);
    data_text(text, case);
    arms_text(text, case);
    for what in [CURVES, DIFFERENCES] {
        let _ = writeln!(text, "![{what}](figures/{})\n", figure_file(&case.name, what, ""));
    }
    comparisons_text(text, case, results);
    mixtures_text(text, case);
    epochs_text(text, case);
    for controller in results.plan.controllers() {
        let file = figure_file(&case.name, MIXTURE, &controller.name);
        let _ = writeln!(text, "![mixture of {}](figures/{file})\n", controller.name);
    }
    sweep_text(text, case);
}

fn data_text(text: &mut String, case: &CaseResults) {
    text.push_str("| domain | made | judged | training documents | training tokens | held-out tokens scored | bytes a token |\n|---|---|---|---|---|---|---|\n");
    for domain in &case.facts.domains {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {:.3} |",
            domain.name,
            if domain.made.is_empty() {
                "as it is"
            } else {
                &domain.made
            },
            if domain.judged { "yes" } else { "no" },
            domain.train_documents,
            domain.train_tokens,
            domain.scored_tokens,
            domain.scored_bytes / domain.scored_tokens as f64
        );
        later_text(text, domain);
    }
    let _ = writeln!(
        text,
        "\nOf {} held-out documents {} were left out because they overlap with training text.{}\n",
        case.held_out_documents,
        case.dropped,
        if case.dropped_examples.is_empty() {
            ""
        } else {
            " For example:"
        }
    );
    for example in &case.dropped_examples {
        let _ = writeln!(
            text,
            "- `{}`: {:.0}% of its n-grams, such as some of `{}`",
            example.source,
            example.share * 100.0,
            example.like
        );
    }
    if !case.dropped_examples.is_empty() {
        text.push('\n');
    }
}

/// Its row: what is measured of the domain is in that above.
fn later_text(text: &mut String, domain: &DomainFacts) {
    if let Some(later) = &domain.later {
        let _ = writeln!(
            text,
            "| {} from step {} on | {} | | {} | {} | | |",
            domain.name, later.from_step, later.made, later.train_documents, later.train_tokens
        );
    }
}

fn figure_of(metric: Metric, value: f64) -> String {
    if metric == Metric::TokensToTarget {
        format!("{value:.0}")
    } else {
        format!("{value:.4}")
    }
}

fn arms_text(text: &mut String, case: &CaseResults) {
    text.push_str("Mean and standard deviation over the judging seeds; less is better everywhere.\n\n| arm |");
    for metric in Metric::ALL {
        let _ = write!(text, " {} |", metric.title());
    }
    text.push_str(" seeds |\n|---|---|---|---|---|---|---|\n");
    for ArmResults {
        arm, seeds, metrics, ..
    } in &case.arms
    {
        let runs = if arm.label == arm.runs || arm.runs.is_empty() {
            String::new()
        } else {
            format!(" ({})", arm.runs)
        };
        let _ = write!(text, "| {}{runs} |", arm.label);
        for result in metrics {
            let missed = result.values.iter().filter(|value| value.is_none()).count();
            let cell = match (result.mean, result.deviation) {
                (Some(mean), Some(deviation)) => {
                    format!(
                        "{} ± {}",
                        figure_of(result.metric, mean),
                        figure_of(result.metric, deviation)
                    )
                }
                (Some(mean), None) => figure_of(result.metric, mean),
                _ if missed > 0 => format!("missed by {missed}"),
                _ => "-".to_owned(),
            };
            let _ = write!(text, " {cell} |");
        }
        let _ = writeln!(text, " {} |", seeds.len());
    }
    text.push('\n');
    for twin in case.candidates.iter().filter(|one| one.name != one.runs) {
        let _ = writeln!(
            text,
            "`{}` has the weights of `{}` here, bit for bit: one mixture under two names, whose runs were done once.\n",
            twin.name, twin.runs
        );
    }
}

fn difference(comparison: &Comparison) -> (String, String) {
    let show = |value: f64| {
        if comparison.metric == Metric::TokensToTarget {
            format!("{value:+.0}")
        } else {
            format!("{value:+.4}")
        }
    };
    comparison.paired.map_or_else(
        || {
            let missed = comparison.missed;
            let mean = if missed > 0 {
                format!("{missed} pairs miss it")
            } else {
                "-".to_owned()
            };
            (mean, "-".to_owned())
        },
        |paired| {
            (
                show(paired.mean),
                format!("{} to {}", show(paired.interval.low), show(paired.interval.high)),
            )
        },
    )
}

fn comparisons_text(text: &mut String, case: &CaseResults, results: &Results) {
    if case.comparisons.is_empty() {
        return;
    }
    let _ = writeln!(
        text,
        "All pairs, mean difference and interval; uncorrected. The target of `{}` is {}.\n",
        Metric::TokensToTarget.title(),
        match results.plan.metrics.target {
            Target::BitsPerByte(bits) => format!("{bits} bits per byte"),
            Target::EndOf(arm) => format!("where the {} mixture ends with the same seed", arm.name()),
        }
    );
    text.push_str("| controller | against |");
    for metric in Metric::ALL {
        let _ = write!(text, " {} |", metric.title());
    }
    text.push_str("\n|---|---|---|---|---|---|---|\n");
    // Comparisons come pair by pair, all metrics of a pair in order.
    for pair in case.comparisons.chunks(Metric::ALL.len()) {
        let _ = write!(text, "| {} | {} |", pair[0].controller, pair[0].against);
        for comparison in pair {
            let (mean, interval) = difference(comparison);
            let cell = if comparison.paired.is_some() {
                format!("{mean} ({interval})")
            } else {
                mean
            };
            let _ = write!(text, " {cell} |");
        }
        text.push('\n');
    }
    text.push('\n');
}

fn mixtures_text(text: &mut String, case: &CaseResults) {
    text.push_str("Mean mixture of each arm, in percent.\n\n| arm |");
    for domain in &case.facts.domains {
        let _ = write!(text, " {} |", domain.name);
    }
    let _ = writeln!(text, "\n|---|{}", "---|".repeat(case.facts.domains.len()));
    for arm in case.arms.iter().filter(|arm| !arm.mean_mixture.is_empty()) {
        let _ = write!(text, "| {} |", arm.arm.label);
        for weight in &arm.mean_mixture {
            let _ = write!(text, " {:.1} |", weight * 100.0);
        }
        text.push('\n');
    }
    text.push('\n');
}

/// Which arms repeat which texts: a mixture that repeats a text is judged for that, too.
fn epochs_text(text: &mut String, case: &CaseResults) {
    let Some(first) = case.epochs.first().filter(|first| !first.arms.is_empty()) else {
        return;
    };
    text.push_str("Passes over each training text, by the mean mixture (share times budget over tokens).\n\n| arm |");
    for epochs in &case.epochs {
        let _ = match epochs.from_step {
            0 => write!(text, " {} |", epochs.domain),
            from_step => write!(text, " {} from step {from_step} on |", epochs.domain),
        };
    }
    let _ = writeln!(text, "\n|---|{}", "---|".repeat(case.epochs.len()));
    for (at, arm) in first.arms.iter().enumerate() {
        let _ = write!(text, "| {} |", arm.arm);
        for epochs in &case.epochs {
            let _ = write!(text, " {:.2} |", epochs.arms[at].epochs);
        }
        text.push('\n');
    }
    let repeats = |epochs: &TextEpochs| {
        let arms = epochs.arms.iter().filter(|arm| arm.epochs > 1.0);
        let arms: Vec<String> = arms.map(|arm| format!("{} ({:.1})", arm.arm, arm.epochs)).collect();
        (!arms.is_empty()).then(|| format!("`{}` under {}", epochs.domain, arms.join(", ")))
    };
    let repeated: Vec<String> = case.epochs.iter().filter_map(repeats).collect();
    let _ = match repeated.as_slice() {
        [] => writeln!(text, "\nNo arm passes over a text more than once.\n"),
        repeated => writeln!(text, "\nPassed over more than once: {}.\n", repeated.join("; ")),
    };
}

fn sweep_text(text: &mut String, case: &CaseResults) {
    let Some(best) = &case.best_static else {
        text.push_str("The sweep is not finished.\n\n");
        return;
    };
    let _ = writeln!(
        text,
        "The sweep chose `{best}`. On the tuning seeds, primary metric:\n\n| candidate | mean |\n|---|---|"
    );
    let mut order: Vec<_> = case.candidates.iter().collect();
    order.sort_by(|a, b| a.tuned.unwrap_or(f64::NAN).total_cmp(&b.tuned.unwrap_or(f64::NAN)));
    for candidate in order {
        let mean = candidate.tuned.filter(|mean| mean.is_finite());
        let mean = mean.map_or_else(|| "misses the target".to_owned(), |mean| format!("{mean:.4}"));
        let _ = writeln!(text, "| {} | {mean} |", candidate.name);
    }
    text.push('\n');
}

fn left_out(text: &mut String, results: &Results) {
    let plan = &results.plan;
    let cases = plan
        .cases
        .iter()
        .filter(|case| !case.enabled)
        .map(|case| ("case", &case.name, &case.reason));
    let controllers = plan
        .controllers
        .iter()
        .filter(|c| !c.enabled)
        .map(|c| ("controller", &c.name, &c.reason));
    let lines: Vec<String> = cases
        .chain(controllers)
        .map(|(what, name, reason)| format!("- {what} `{name}`: {reason}\n"))
        .collect();
    if !lines.is_empty() {
        let _ = write!(text, "## Left out\n\n{}", lines.concat());
    }
}

#[cfg(test)]
mod tests {
    use super::super::measure::LaterText;
    use super::super::results::DoneAgain;
    use super::super::results::tests::{plan_of, whole};
    use super::*;

    #[test]
    fn a_whole_comparison_is_told_with_its_verdicts_and_its_limits() {
        let (results, _) = whole(&plan_of("[1, 2, 3, 4, 5, 6, 7, 8]"));
        let text = markdown(&results);
        for part in [
            "All ",
            "| plain | ado | natural | -",
            "| **better** |",
            "| within the margin |",
            "Families: 2;",
            "no p-value is below 0.0078",
            "Of 9 held-out documents 1 were left out",
            "figures/noise-curves.svg",
            "figures/plain-mixture-ado.svg",
            "The sweep chose `",
            "Passed over more than once: `web` under natural (1.7), uniform (2.0), ",
            "; `zh` under ",
            "- case `late`: not in every test",
        ] {
            assert!(text.contains(part), "{part} is missing from\n{text}");
        }
        // Tables are whole: every row has as many cells as its head.
        let mut cells = None;
        for line in text.lines() {
            let count = line.starts_with('|').then(|| line.matches('|').count());
            assert!(count.is_none() || cells.is_none() || count == cells, "{line}");
            cells = count;
        }
    }

    #[test]
    fn runs_that_were_done_again_are_told_by_program() {
        let (mut results, _) = whole(&plan_of("[1, 2]"));
        assert!(!markdown(&results).contains("done again"));
        let of = |program: &str, of_others, of_its_own| DoneAgain {
            program: program.repeat(64),
            of_others,
            of_its_own,
        };
        results.again = vec![of("a", 5, 0), of("b", 0, 2)];
        let (text, runs) = (markdown(&results), results.finished);
        let (a, b) = ("a".repeat(16), "b".repeat(16));
        for said in [
            format!("5 of the {runs} runs were done again by another program ({a}), with the same trace, bit for bit."),
            format!(
                "2 of the {runs} runs were done again by the program that had done them ({b}), with the same trace"
            ),
        ] {
            assert!(text.contains(&said), "{said} is missing from\n{text}");
        }
    }

    /// Two names of one mixture, and a text that takes another's place, are told; tables stay whole.
    #[test]
    fn shared_runs_and_later_texts_are_told() {
        let (mut results, _) = whole(&plan_of("[1, 2]"));
        assert!(!markdown(&results).contains("one mixture under two names"));
        let case = &mut results.cases[0];
        case.candidates[3].runs = "uniform".to_owned();
        case.facts.domains[0].later = Some(LaterText {
            from_step: 20,
            made: "the hard half of web".to_owned(),
            train_documents: 8,
            train_tokens: 900,
            train_bytes: 3_600,
        });
        for text in &mut case.epochs {
            text.arms.iter_mut().for_each(|arm| arm.epochs = 0.5);
        }
        let text = markdown(&results);
        for part in [
            "`unimax` has the weights of `uniform` here, bit for bit",
            "| web from step 20 on | the hard half of web | | 8 | 900 | | |",
            "No arm passes over a text more than once.",
        ] {
            assert!(text.contains(part), "{part} is missing from\n{text}");
        }
        let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("| web")).collect();
        assert!(rows.len() > 1 && rows.iter().all(|row| row.matches('|').count() == 8));
    }

    #[test]
    fn an_unfinished_one_says_so_first() {
        let (mut results, _) = whole(&plan_of("[1, 2]"));
        results.finished -= 1;
        let text = markdown(&results);
        assert!(text.contains(&format!(
            "**Unfinished: {} of {} runs.**",
            results.finished, results.total
        )));
        assert!(text.contains("too few seeds for a verdict"));
        assert!(!text.contains("**better**"));
    }
}
