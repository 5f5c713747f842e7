//! `tarazed eval`: multiple-choice questions put to a checkpoint.

use crate::common::assert_refused;
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use tarazed_tests::harness::{Outcome, Project};

/// Sentences as the tiny texts have them, against the same words in an order that they never have.
fn questions() -> Vec<Value> {
    let subjects = ["The old river", "My neighbour", "Her brother", "The night train"];
    let good = [
        "watched the stone bridge before dawn.",
        "carried the first snow once again.",
    ];
    let bad = [
        "bridge dawn the before stone watched.",
        "again the snow carried once first.",
    ];
    let mut questions = Vec::new();
    for (place, subject) in subjects.iter().enumerate() {
        for (good, bad) in good.iter().zip(bad) {
            let answer = place % 2;
            let choices = if answer == 0 { [*good, bad] } else { [bad, *good] };
            questions.push(json!({"question": subject, "choices": choices, "answer": answer, "id": place}));
        }
    }
    questions
}

fn write(project: &Project, name: &str, text: &str) -> PathBuf {
    let path = project.path().join(name);
    std::fs::write(&path, text).expect("a file is written");
    path
}

fn eval(project: &Project, run: &Path, set: &Path, more: &[&str]) -> Outcome {
    let mut args = vec!["eval".as_ref(), run.as_os_str(), "--set".as_ref(), set.as_os_str()];
    args.extend(more.iter().map(OsStr::new));
    project.tarazed(&args)
}

/// A model that has learnt a little tells its texts from the same words in disorder; the same checkpoint gives the same
/// numbers each time, as a table and as JSON, and a longer question than the context is cut and said to be.
#[test]
fn a_checkpoint_answers_multiple_choice_questions() {
    let project = Project::tiny();
    let run = project.train("asked").ranks(2).steps(300).complete();
    let lines: String = questions().iter().map(|question| format!("{question}\n")).collect();
    let set = write(&project, "order.jsonl", &lines);
    let told = eval(&project, run.dir(), &set, &["--json"]);
    told.assert_code(0);
    let told: Value = serde_json::from_str(&told.stdout).unwrap_or_else(|e| panic!("{e}: {}", told.tail()));
    assert_eq!(told["step"], 300);
    let result = &told["sets"][0]["result"];
    assert_eq!(
        (&result["questions"], &result["answered"], &result["cut"]),
        (&8.into(), &8.into(), &0.into())
    );
    assert_eq!(result["chance"], 0.5);
    for way in ["raw", "per_byte"] {
        assert!(result[way]["accuracy"].as_f64() >= Some(0.75), "{way}: {result}");
        assert!(result[way]["standard_error"].is_number(), "{way}: {result}");
    }
    for answered in result["results"].as_array().expect("a list") {
        for choice in answered["choices"].as_array().expect("a list") {
            let likelihood = choice["log_likelihood"].as_f64().expect("a number");
            assert!(likelihood < 0.0 && likelihood > -300.0, "{choice}");
        }
    }
    let again = eval(&project, run.dir(), &set, &["--json"]);
    let again: Value = serde_json::from_str(&again.stdout).expect("JSON");
    assert_eq!(again["sets"], told["sets"], "the same numbers each time");

    let long = json!({"question": "The quiet garden ".repeat(40), "choices": ["one", "two"]});
    let set = write(&project, "long.jsonl", &format!("{long}\n"));
    let table = eval(&project, run.dir(), &set, &[]);
    table.assert_code(0);
    for part in [
        "checkpoint of step 300",
        "longer than the context",
        "1 questions without an answer",
    ] {
        assert!(table.stdout.contains(part), "'{part}'\n{}", table.tail());
    }

    let too_long = json!({"question": "Q", "choices": ["one", "The quiet garden ".repeat(40)]});
    let set = write(&project, "too_long.jsonl", &format!("\n{too_long}\n"));
    assert_refused(
        &eval(&project, run.dir(), &set, &[]),
        &["too_long.jsonl, line 2: ", "fit into the context"],
    );
    let set = write(&project, "bad.jsonl", "{\"question\":\"Q\",\"choices\":[\"a\"]}\n");
    assert_refused(
        &eval(&project, run.dir(), &set, &[]),
        &["bad.jsonl, line 1: ", "counted from 0"],
    );
}
