//! Multiple-choice questions: reading a set, choosing by likelihood, accuracy. Pure but for the scorer that is passed in.
//!
//! A set is a file of JSON lines, `{"question":"…","choices":["…",…],"answer":INDEX}`, the index counted from 0; other keys are
//! ignored. Each choice is scored by its log-likelihood behind the question, and the likeliest is taken, in two ways, as is
//! the field's habit (lm-evaluation-harness, `acc` and a `acc_norm` over bytes):
//!
//! | way | a choice's score |
//! |---|---|
//! | raw | `Σ log p(token)`, which favours short choices |
//! | per byte | the same over the UTF-8 bytes of the choice |
//!
//! Of equal scores the first choice counts. Accuracy `p` is the share of questions whose choice is the answer, its standard
//! error `√(p (1 − p) / (n − 1))`, that of a mean of `n` zeros and ones.

use crate::exit::Failure;
use crate::inference::Scored;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Bytes of a set at most.
const SET_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// Choices of a question at most.
const CHOICES_MAX: usize = 64;

/// A question with its choices.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub struct Question {
    /// What stands before each choice.
    pub question: String,
    /// What may follow it.
    pub choices: Vec<String>,
    /// Place of the right choice, from 0; none where it is not known.
    #[serde(default)]
    pub answer: Option<usize>,
    /// Its line in the file, from 1.
    #[serde(skip)]
    pub line: usize,
}

/// How a choice did.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Choice {
    /// In nats.
    pub log_likelihood: f64,
    /// In nats per UTF-8 byte of the choice.
    pub per_byte: f64,
    /// Tokens scored.
    pub tokens: usize,
}

/// How the model answered a question.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Answered {
    /// Its line in the file.
    pub line: usize,
    /// Every choice, in order.
    pub choices: Vec<Choice>,
    /// The likeliest choice.
    pub raw: usize,
    /// The likeliest per byte.
    pub per_byte: usize,
    /// The right one; none where it is not known.
    pub answer: Option<usize>,
    /// The question was longer than the context: its beginning was left out.
    pub cut: bool,
}

/// A share of right answers.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Accuracy {
    /// Of all questions with an answer.
    pub accuracy: f64,
    /// Its standard error; none of a single question.
    pub standard_error: Option<f64>,
}

/// How the model did on a set.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct SetResult {
    /// Questions.
    pub questions: usize,
    /// Those with an answer, over which accuracy is.
    pub answered: usize,
    /// Those whose beginning was left out.
    pub cut: usize,
    /// By the likelihood; none without answers.
    pub raw: Option<Accuracy>,
    /// By the likelihood per byte.
    pub per_byte: Option<Accuracy>,
    /// What choosing blindly gives on average.
    pub chance: Option<f64>,
    /// Question by question.
    pub results: Vec<Answered>,
}

/// Reads a set.
///
/// # Errors
/// Refused, with the line at fault, where the file cannot be read or a line is no question.
pub fn read(path: &Path) -> Result<Vec<Question>, Failure> {
    let failed = |e: std::io::Error| {
        Failure::refused(
            path.display(),
            format!("cannot be read ({e})"),
            "give a file of JSON lines",
        )
    };
    let length = std::fs::metadata(path).map_err(failed)?.len();
    if length > SET_BYTES_MAX {
        let cause = format!("has {length} bytes, and {SET_BYTES_MAX} are the most");
        return Err(Failure::refused(path.display(), cause, "split it into several sets"));
    }
    parse(&path.display().to_string(), &std::fs::read(path).map_err(failed)?)
}

fn parse(name: &str, bytes: &[u8]) -> Result<Vec<Question>, Failure> {
    let mut questions = Vec::new();
    for (number, line) in (1..).zip(bytes.split(|&byte| byte == b'\n')) {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let refused = |cause: String| {
            let remedy = r#"write {"question":"…","choices":["…","…"],"answer":0}, the answer's place counted from 0"#;
            Failure::refused(format!("{name}, line {number}"), cause, remedy)
        };
        let question: Question = serde_json::from_slice(line).map_err(|e| refused(format!("is no question ({e})")))?;
        let count = question.choices.len();
        if !(2..=CHOICES_MAX).contains(&count) {
            return Err(refused(format!(
                "has {count} choices, where 2 to {CHOICES_MAX} are possible"
            )));
        }
        if let Some(empty) = question.choices.iter().position(|choice| choice.trim().is_empty()) {
            return Err(refused(format!("choice {empty} is empty")));
        }
        if let Some(answer) = question.answer.filter(|answer| *answer >= count) {
            return Err(refused(format!("names choice {answer} of {count} as its answer")));
        }
        questions.push(Question {
            line: number,
            ..question
        });
    }
    if questions.is_empty() {
        let remedy = r#"write one {"question":"…","choices":["…","…"],"answer":0} in each line"#;
        return Err(Failure::refused(name, "holds no question", remedy));
    }
    Ok(questions)
}

/// What is scored for a choice: with a space in front where the question's end and the choice's beginning are words of a
/// script that has spaces.
fn continuation(question: &str, choice: &str) -> String {
    let spaced = |character: Option<char>| character.is_some_and(|c| !c.is_whitespace() && !is_unspaced(c));
    if spaced(question.chars().next_back()) && spaced(choice.chars().next()) {
        format!(" {choice}")
    } else {
        choice.to_owned()
    }
}

/// Han characters, and the punctuation that goes with them.
fn is_unspaced(character: char) -> bool {
    tarazed_corpus::is_han(character) || matches!(character, '\u{3000}'..='\u{303f}' | '\u{ff00}'..='\u{ffef}')
}

/// Scores every question. `score` gives the likelihood of a continuation behind a text.
///
/// # Errors
/// Those of `score`, with the question's line.
pub fn evaluate(
    name: &str,
    questions: &[Question],
    mut score: impl FnMut(&str, &str) -> Result<Scored, Failure>,
) -> Result<SetResult, Failure> {
    let mut results = Vec::with_capacity(questions.len());
    for question in questions {
        let mut choices = Vec::with_capacity(question.choices.len());
        let mut cut = false;
        for choice in &question.choices {
            let scored = score(&question.question, &continuation(&question.question, choice)).map_err(|failure| {
                let message = format!("{name}, line {}: {}", question.line, failure.message);
                Failure { message, ..failure }
            })?;
            cut |= scored.cut;
            choices.push(Choice {
                log_likelihood: scored.log_likelihood,
                per_byte: scored.log_likelihood / choice.len() as f64,
                tokens: scored.tokens,
            });
        }
        results.push(Answered {
            line: question.line,
            raw: likeliest(&choices, |choice| choice.log_likelihood),
            per_byte: likeliest(&choices, |choice| choice.per_byte),
            choices,
            answer: question.answer,
            cut,
        });
    }
    Ok(summary(results))
}

/// The first of the greatest.
fn likeliest(choices: &[Choice], score: impl Fn(&Choice) -> f64) -> usize {
    let mut best = 0;
    for (place, choice) in choices.iter().enumerate() {
        if score(choice) > score(&choices[best]) {
            best = place;
        }
    }
    best
}

fn summary(results: Vec<Answered>) -> SetResult {
    let known: Vec<&Answered> = results.iter().filter(|result| result.answer.is_some()).collect();
    let share = |chosen: fn(&Answered) -> usize| {
        let right = known.iter().filter(|result| result.answer == Some(chosen(result)));
        accuracy(right.count(), known.len())
    };
    let chances: f64 = known.iter().map(|result| 1.0 / result.choices.len() as f64).sum();
    SetResult {
        questions: results.len(),
        answered: known.len(),
        cut: results.iter().filter(|result| result.cut).count(),
        raw: share(|result| result.raw),
        per_byte: share(|result| result.per_byte),
        chance: (!known.is_empty()).then(|| chances / known.len() as f64),
        results,
    }
}

fn accuracy(right: usize, of: usize) -> Option<Accuracy> {
    if of == 0 {
        return None;
    }
    let accuracy = right as f64 / of as f64;
    let standard_error = (of > 1).then(|| (accuracy * (1.0 - accuracy) / (of - 1) as f64).sqrt());
    Some(Accuracy {
        accuracy,
        standard_error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = r#"{"question":"Q","choices":["a","b"],"answer":1}"#;

    #[test]
    fn a_set_is_read_line_by_line() {
        let text = format!("{GOOD}\r\n\n  {{\"id\":7,\"question\":\"\",\"choices\":[\"天\",\"b\",\"c\"]}}");
        let questions = parse("set", text.as_bytes()).expect("a good set");
        let seen: Vec<_> = questions.iter().map(|q| (q.line, q.choices.len(), q.answer)).collect();
        assert_eq!(seen, [(1, 2, Some(1)), (3, 3, None)]);
    }

    #[test]
    fn what_is_no_question_is_refused_with_its_line() {
        for (line, cause) in [
            ("{", "is no question"),
            (r#"{"question":"Q","choices":["a","b"],"answer":-1}"#, "is no question"),
            (r#"{"question":"Q","choices":["a","b"],"answer":"B"}"#, "is no question"),
            (r#"{"choices":["a","b"]}"#, "missing field `question`"),
            (r#"{"question":"Q","choices":["a"],"answer":0}"#, "has 1 choices"),
            (
                r#"{"question":"Q","choices":["a"," "],"answer":0}"#,
                "choice 1 is empty",
            ),
            (
                r#"{"question":"Q","choices":["a","b"],"answer":2}"#,
                "names choice 2 of 2",
            ),
        ] {
            let refused = parse("set", format!("{GOOD}\n{line}\n").as_bytes()).expect_err(line);
            assert_eq!(refused.exit, crate::exit::Exit::Refused);
            assert!(refused.message.starts_with("set, line 2: "), "{refused}");
            assert!(
                refused.message.contains(cause) && refused.message.contains("counted from 0"),
                "{refused}"
            );
        }
        let refused = parse("set", b"{\"question\":\"\xff\",\"choices\":[\"a\",\"b\"]}").expect_err("no UTF-8");
        assert!(refused.message.starts_with("set, line 1: "), "{refused}");
        let refused = parse("set", b"\n \n").expect_err("nothing in it");
        assert!(refused.message.contains("holds no question"), "{refused}");
        assert_eq!(
            read(Path::new("/nowhere/set")).expect_err("no file").exit,
            crate::exit::Exit::Refused
        );
    }

    #[test]
    fn words_are_parted_by_a_space_where_their_script_does() {
        for (question, choice, expected) in [
            ("Sky is", "blue", " blue"),
            ("Sky is ", "blue", "blue"),
            ("Sky is", " blue", " blue"),
            ("Answer:", "blue", " blue"),
            ("天空是", "蓝色", "蓝色"),
            ("天空是：", "蓝色", "蓝色"),
            ("天空是", "blue", "blue"),
            ("", "blue", "blue"),
        ] {
            assert_eq!(continuation(question, choice), expected, "{question:?} {choice:?}");
        }
    }

    fn question(choices: &[&str], answer: Option<usize>) -> Question {
        Question {
            question: "Q ".to_owned(),
            choices: choices.iter().map(|&choice| choice.to_owned()).collect(),
            answer,
            line: 1,
        }
    }

    /// Every byte costs a nat, but each "x" costs two: raw takes the shortest, per byte the one with the fewest "x".
    fn by_bytes(_: &str, continuation: &str) -> Result<Scored, Failure> {
        let cost = continuation
            .bytes()
            .map(|byte| if byte == b'x' { 2.0 } else { 1.0 })
            .sum::<f64>();
        Ok(Scored {
            log_likelihood: -cost,
            tokens: continuation.len(),
            cut: continuation.len() > 5,
        })
    }

    #[test]
    fn raw_and_per_byte_scores_choose_by_themselves() {
        let questions = [
            question(&["x", "aaaa"], Some(1)),
            question(&["aaaa", "aax"], Some(1)),
            question(&["b", "b"], Some(0)),
            question(&["aaaaaa", "x"], None),
        ];
        let result = evaluate("set", &questions, by_bytes).expect("scored");
        let chosen: Vec<_> = result.results.iter().map(|r| (r.raw, r.per_byte)).collect();
        assert_eq!(chosen, [(0, 1), (0, 0), (0, 0), (1, 0)], "of equal ones the first");
        assert_eq!((result.questions, result.answered, result.cut), (4, 3, 1));
        let raw = result.raw.expect("answers");
        assert!((raw.accuracy - 1.0 / 3.0).abs() < 1e-12);
        let error = (2.0 / 9.0 / 2.0_f64).sqrt();
        assert!((raw.standard_error.expect("three questions") - error).abs() < 1e-12);
        assert!((result.per_byte.expect("answers").accuracy - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(result.chance, Some(0.5));
        let first = &result.results[0].choices[0];
        assert_eq!((first.log_likelihood, first.per_byte, first.tokens), (-2.0, -2.0, 1));

        let unknown = evaluate("set", &questions[3..], by_bytes).expect("scored");
        assert_eq!((unknown.raw, unknown.per_byte, unknown.chance), (None, None, None));
        let one = evaluate("set", &questions[..1], by_bytes).expect("scored");
        assert_eq!(one.raw.expect("an answer").standard_error, None);
    }

    #[test]
    fn a_choice_that_cannot_be_scored_names_its_line() {
        let refuse = |_: &str, _: &str| Err(Failure::refused("a continuation", "9 tokens", "shorten it"));
        let mut asked = question(&["a", "b"], None);
        asked.line = 17;
        let refused = evaluate("set", &[asked], refuse).expect_err("refused");
        assert!(
            refused.message.starts_with("set, line 17: a continuation: 9 tokens"),
            "{refused}"
        );
    }

    proptest! {
        /// The standard error is that of the mean of zeros and ones, by its definition.
        #[test]
        fn the_standard_error_is_that_of_a_mean(right in 0_usize..40, wrong in 0_usize..40) {
            prop_assume!(right + wrong > 1);
            let count = (right + wrong) as f64;
            let found = accuracy(right, right + wrong).expect("some");
            let mean = right as f64 / count;
            let squares = right as f64 * (1.0 - mean) * (1.0 - mean) + wrong as f64 * mean * mean;
            let expected = (squares / (count - 1.0)).sqrt() / count.sqrt();
            prop_assert!((found.standard_error.expect("some") - expected).abs() < 1e-12);
        }
    }
}
