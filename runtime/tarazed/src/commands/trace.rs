//! `tarazed trace show|diff`: the committed trace of a run, alone or against another's.
//!
//! Lines are compared as bytes, since that is the promise (DET-1): the parsed fields only serve to say what differs.
//! This module never writes into a run folder.

use crate::exit::{Exit, Failure};
use crate::output::print;
use crate::run_folder::RunFolder;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// `tarazed trace …`
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Print the lines of one trace as a table.
    Show {
        /// Run folder, or a trace file.
        run: PathBuf,
        /// Only the last N steps.
        #[arg(long, value_name = "N")]
        last: Option<usize>,
        /// Print the lines as they stand in the file.
        #[arg(long)]
        json: bool,
    },
    /// Compare two traces on their common steps, bit for bit: exit code 0 if they agree, 3 if not.
    Diff {
        /// Run folder or trace file.
        left: PathBuf,
        /// Run folder or trace file.
        right: PathBuf,
    },
}

/// Runs the command.
///
/// # Errors
/// Refused where a file is missing or is no trace, halted where traces differ or a step is lost or repeated.
pub fn run(command: &Command) -> Result<Exit, Failure> {
    match command {
        Command::Show { run, last, json } => show(run, *last, *json),
        Command::Diff { left, right } => {
            let (left, right) = (Trace::read(left)?, Trace::read(right)?);
            print(&diff(&left, &right)?)?;
            Ok(Exit::Done)
        }
    }
}

/// A trace file, by step.
#[derive(Debug)]
struct Trace {
    path: PathBuf,
    steps: BTreeMap<u64, Line>,
    /// Bytes after the last line end: a line that was being written.
    torn_bytes: usize,
}

#[derive(Debug)]
struct Line {
    text: String,
    value: Value,
}

impl Trace {
    fn read(run: &Path) -> Result<Self, Failure> {
        let path = if run.is_dir() {
            RunFolder::new(run).trace()
        } else {
            run.to_owned()
        };
        let bytes = std::fs::read(&path).map_err(|e| {
            Failure::refused(
                path.display(),
                format!("cannot be read ({e})"),
                "give a run folder or its trace.jsonl",
            )
        })?;
        Self::parse(path, &bytes)
    }

    fn parse(path: PathBuf, bytes: &[u8]) -> Result<Self, Failure> {
        let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |last| last + 1);
        let torn_bytes = bytes.len() - whole;
        let mut steps = BTreeMap::new();
        let mut before: Option<u64> = None;
        for (index, raw) in bytes[..whole].split(|&b| b == b'\n').enumerate() {
            if raw.is_empty() {
                continue;
            }
            let place = || format!("{}:{}", path.display(), index + 1);
            let bad = |cause: String| {
                Failure::refused(
                    place(),
                    cause,
                    "the file is damaged or no trace; take it from a backup or resume the run",
                )
            };
            let text = std::str::from_utf8(raw).map_err(|e| bad(format!("is not UTF-8 ({e})")))?;
            let value: Value = serde_json::from_str(text).map_err(|e| bad(format!("is not JSON ({e})")))?;
            let Some(step) = value.get("step") else {
                continue; // a declaration, such as a new lineage, not a step
            };
            let step = step
                .as_u64()
                .ok_or_else(|| bad(format!("has the step {step}, not a count")))?;
            if let Some(before) = before
                && step != before + 1
            {
                let what = if step <= before { "repeated" } else { "lost" };
                return Err(Failure::halted(
                    place(),
                    format!("step {step} follows step {before}: a step was {what}"),
                    "a committed trace counts up by one; keep the run folder and report this",
                ));
            }
            before = Some(step);
            let text = text.to_owned();
            steps.insert(step, Line { text, value });
        }
        if steps.is_empty() {
            return Err(Failure::refused(
                path.display(),
                "holds no committed step",
                "wait until the run has committed one",
            ));
        }
        Ok(Self {
            path,
            steps,
            torn_bytes,
        })
    }
}

fn show(run: &Path, last: Option<usize>, json: bool) -> Result<Exit, Failure> {
    let trace = Trace::read(run)?;
    let skip = trace.steps.len().saturating_sub(last.unwrap_or(usize::MAX));
    let mut text = String::new();
    if !json {
        let _ = writeln!(
            text,
            "{:>8} {:>14} {:>9} {:>9} {:>10}  {:<16} decisions",
            "step", "tokens", "loss", "grad", "lr", "state"
        );
    }
    for line in trace.steps.values().skip(skip) {
        if json {
            text.push_str(&line.text);
        } else {
            row(&mut text, &line.value);
        }
        text.push('\n');
    }
    print(&text)?;
    if trace.torn_bytes > 0 {
        eprintln!(
            "{}: ends in {} bytes of an unfinished line, not shown",
            trace.path.display(),
            trace.torn_bytes
        );
    }
    Ok(Exit::Done)
}

fn row(text: &mut String, value: &Value) {
    let number = |key: &str| value.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN);
    let count = |key: &str| value.get(key).and_then(Value::as_u64).unwrap_or(0);
    let state = value.get("state").and_then(Value::as_str).unwrap_or("-");
    let decisions = value
        .get("decisions")
        .filter(|d| d.as_array().is_some_and(|list| !list.is_empty()));
    let _ = write!(
        text,
        "{:>8} {:>14} {:>9.4} {:>9.3} {:>10.3e}  {:<16} {}",
        count("step"),
        count("tokens"),
        number("loss"),
        number("grad_norm"),
        number("lr"),
        state.get(..16).unwrap_or(state),
        decisions.map(Value::to_string).unwrap_or_default()
    );
    let kept = text.trim_end_matches(' ').len();
    text.truncate(kept);
}

/// One sentence where the traces agree on their common steps.
fn diff(left: &Trace, right: &Trace) -> Result<String, Failure> {
    let mut common = 0_u64;
    let mut last = 0;
    for (step, line) in &left.steps {
        let Some(other) = right.steps.get(step) else { continue };
        if line.text != other.text && !differ_in_lineage_alone(&line.value, &other.value) {
            return Err(Failure::halted(
                format!("step {step}"),
                format!(
                    "{} and {} differ in {} after {common} equal steps",
                    left.path.display(),
                    right.path.display(),
                    differing_fields(&line.value, &other.value)
                ),
                "same config, data, seed, binary and device type must give the same bits (DET-1): compare the two \
                 config.toml, then replay that step",
            ));
        }
        common += 1;
        last = *step;
    }
    if common == 0 {
        return Err(Failure::refused(
            format!("{} and {}", left.path.display(), right.path.display()),
            "have no step in common",
            "compare runs that overlap",
        ));
    }
    let only = |trace: &Trace| trace.steps.len() as u64 - common;
    Ok(format!(
        "equal on {common} common steps, the last of them {last} ({} steps only left, {} only right)\n",
        only(left),
        only(right)
    ))
}

/// Who computed a line is no part of what it holds (DET-4).
fn differ_in_lineage_alone(left: &Value, right: &Value) -> bool {
    if left.get("lineage") == right.get("lineage") {
        return false;
    }
    let without = |value: &Value| {
        let mut value = value.clone();
        value.as_object_mut().map(|fields| fields.remove("lineage"));
        value
    };
    without(left) == without(right)
}

fn differing_fields(left: &Value, right: &Value) -> String {
    let empty = serde_json::Map::new();
    let (left, right) = (left.as_object().unwrap_or(&empty), right.as_object().unwrap_or(&empty));
    let keys: std::collections::BTreeSet<&String> = left.keys().chain(right.keys()).collect();
    let text = |value: Option<&Value>| value.map_or_else(|| "absent".to_owned(), Value::to_string);
    let fields: Vec<String> = keys
        .into_iter()
        .filter(|key| left.get(*key) != right.get(*key))
        .map(|key| format!("{key} ({} against {})", text(left.get(key)), text(right.get(key))))
        .collect();
    if fields.is_empty() {
        "their bytes, though not in their values".to_owned()
    } else {
        fields.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(lines: &str) -> Result<Trace, Failure> {
        Trace::parse(PathBuf::from("trace.jsonl"), lines.as_bytes())
    }

    fn line(step: u64, state: &str) -> String {
        format!("{{\"step\":{step},\"tokens\":8,\"loss\":1.5,\"state\":\"{state}\"}}\n")
    }

    /// DET-1: traces are compared bit for bit, on their common steps.
    #[test]
    fn equal_common_steps_agree() {
        let long = trace(&(line(1, "a") + &line(2, "b") + &line(3, "c"))).expect("a trace");
        let resumed = trace(&(line(2, "b") + &line(3, "c") + &line(4, "d"))).expect("a trace");
        let verdict = diff(&long, &resumed).expect("they agree");
        assert_eq!(
            verdict,
            "equal on 2 common steps, the last of them 3 (1 steps only left, 1 only right)\n"
        );
    }

    #[test]
    fn one_changed_bit_is_a_halt_that_names_step_and_field() {
        let left = trace(&(line(1, "a") + &line(2, "b"))).expect("a trace");
        let right = trace(&(line(1, "a") + &line(2, "x"))).expect("a trace");
        let failure = diff(&left, &right).expect_err("they differ");
        assert_eq!(failure.exit, Exit::Halted);
        assert!(failure.message.starts_with("step 2: "), "{failure}");
        assert!(
            failure
                .message
                .contains(r#"state ("b" against "x") after 1 equal steps"#),
            "{failure}"
        );
    }

    #[test]
    fn bytes_count_where_values_agree() {
        let left = trace("{\"step\":1,\"loss\":1.5}\n").expect("a trace");
        let right = trace("{\"step\":1, \"loss\":1.5}\n").expect("a trace");
        assert!(diff(&left, &right).is_err());
    }

    #[test]
    fn nothing_in_common_is_no_agreement() {
        let left = trace(&line(1, "a")).expect("a trace");
        let right = trace(&line(2, "a")).expect("a trace");
        assert_eq!(diff(&left, &right).expect_err("nothing to compare").exit, Exit::Refused);
    }

    #[test]
    fn lost_and_repeated_steps_are_told_apart() {
        let lost = trace(&(line(1, "a") + &line(3, "c"))).expect_err("a gap");
        let repeated = trace(&(line(1, "a") + &line(1, "a"))).expect_err("a repeat");
        assert!(lost.message.contains("a step was lost"), "{lost}");
        assert!(repeated.message.contains("a step was repeated"), "{repeated}");
        assert_eq!((lost.exit, repeated.exit), (Exit::Halted, Exit::Halted));
    }

    #[test]
    fn a_torn_last_line_is_set_aside_and_damage_is_refused() {
        let torn = trace(&(line(1, "a") + "{\"step\":2,\"lo")).expect("a trace");
        assert_eq!((torn.steps.len(), torn.torn_bytes), (1, 13));
        for damaged in ["not json\n", "{\"step\":-1}\n", "", "{\"lineage\":1}\n"] {
            assert_eq!(trace(damaged).expect_err(damaged).exit, Exit::Refused);
        }
        let not_utf8 = Trace::parse(PathBuf::from("t"), b"\xff\xfe\n").expect_err("not UTF-8");
        assert_eq!(not_utf8.exit, Exit::Refused);
    }
}
