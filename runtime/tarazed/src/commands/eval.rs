//! `tarazed eval RUN_OR_STORE[@STEP] --set FILE.jsonl`: a checkpoint's answers to multiple-choice questions.

use crate::choices::{self, Accuracy, SetResult};
use crate::exit::{Exit, Failure};
use crate::inference::Inference;
use crate::output::{print, print_json};
use crate::source::Source;
use serde_json::json;
use std::fmt::Write as _;
use std::path::PathBuf;
use tarazed_domain::StepsCompleted;

/// Options of `tarazed eval`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// JSON lines {"question":"…","choices":["…",…],"answer":INDEX}; may be given several times.
    #[arg(long, value_name = "FILE", required = true)]
    set: Vec<PathBuf>,
    /// Print JSON, with the likelihood of every choice.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Refused for a set that is none, with its line; else by what the store says.
pub fn run(args: &Args) -> Result<Exit, Failure> {
    // All sets first: reading a checkpoint may take long.
    let sets: Vec<_> = args
        .set
        .iter()
        .map(|path| Ok((path.display().to_string(), choices::read(path)?)))
        .collect::<Result<_, Failure>>()?;
    let runtime = super::runtime()?;
    let mut inference = runtime.block_on(Inference::open(&args.source))?;
    let mut results = Vec::with_capacity(sets.len());
    for (name, questions) in sets {
        let score = |before: &str, continuation: &str| inference.log_likelihood(before, continuation);
        results.push((name.clone(), choices::evaluate(&name, &questions, score)?));
    }
    if args.json {
        let sets: Vec<_> = results
            .iter()
            .map(|(name, result)| json!({"set": name, "result": result}))
            .collect();
        print_json(&json!({"run": args.source.place()?, "step": inference.step, "sets": sets}))?;
    } else {
        print(&table(inference.step, &results))?;
    }
    Ok(Exit::Done)
}

fn table(step: StepsCompleted, results: &[(String, SetResult)]) -> String {
    let width = results
        .iter()
        .map(|(name, _)| name.chars().count())
        .max()
        .unwrap_or(0)
        .max(3);
    let mut text = format!("checkpoint of step {step}; accuracy ± its standard error, in percent\n");
    let percent = |accuracy: Option<Accuracy>| {
        let Some(accuracy) = accuracy else {
            return "-".to_owned();
        };
        let error = accuracy
            .standard_error
            .map_or_else(|| "?".to_owned(), |error| format!("{:.1}", 100.0 * error));
        format!("{:.1} ± {error}", 100.0 * accuracy.accuracy)
    };
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "{:<width$}  {:>9}  {:>14}  {:>14}  {:>7}",
        "set", "questions", "raw", "per byte", "chance"
    );
    for (name, result) in results {
        let chance = result
            .chance
            .map_or_else(|| "-".to_owned(), |chance| format!("{:.1}", 100.0 * chance));
        let _ = writeln!(
            text,
            "{name:<width$}  {:>9}  {:>14}  {:>14}  {chance:>7}",
            result.questions,
            percent(result.raw),
            percent(result.per_byte)
        );
    }
    for (name, result) in results {
        let unanswered = result.questions - result.answered;
        if unanswered > 0 {
            let _ = writeln!(
                text,
                "{name}: {unanswered} questions without an answer count in no accuracy"
            );
        }
        if result.cut > 0 {
            let _ = writeln!(
                text,
                "{name}: {} questions are longer than the context; their beginning was left out",
                result.cut
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_how_sure_it_is() {
        let accuracy = |accuracy, standard_error| {
            Some(Accuracy {
                accuracy,
                standard_error,
            })
        };
        let result = SetResult {
            questions: 12,
            answered: 10,
            cut: 3,
            raw: accuracy(0.5, Some(1.0 / 6.0)),
            per_byte: accuracy(1.0, None),
            chance: Some(0.25),
            results: Vec::new(),
        };
        let empty = SetResult {
            raw: None,
            per_byte: None,
            chance: None,
            answered: 12,
            cut: 0,
            ..result.clone()
        };
        let text = table(
            StepsCompleted(40),
            &[("a.jsonl".to_owned(), result), ("b".to_owned(), empty)],
        );
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(
            rows[2],
            ["a.jsonl", "12", "50.0", "±", "16.7", "100.0", "±", "?", "25.0"],
            "{text}"
        );
        assert_eq!(rows[3], ["b", "12", "-", "-", "-"], "{text}");
        assert!(
            text.contains("step 40") && text.contains("a.jsonl: 2 questions without"),
            "{text}"
        );
        assert!(
            text.contains("a.jsonl: 3 questions are longer") && !text.contains("b: "),
            "{text}"
        );
    }
}
