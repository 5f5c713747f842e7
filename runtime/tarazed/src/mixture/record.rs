//! Finished runs as lines of text, for the file of `--outcomes`. Pure: [`super::book`] opens it.
//!
//! The first line says of which plan and which data all others are; then a line for each run that was finished, in that order,
//! and for each that was done again. A run's line holds what is judged, and by what anybody can check it who does the run
//! again: the hash of its whole trace.
//!
//! Numbers stand as the shortest decimals that read back to the same bits, and by their bits where they are not finite. What is
//! the same in many places of a curve stands once.

use super::measure::{Evaluation, Outcome};
use super::plan::Plan;
use super::schedule::{CaseRuns, RunId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Of the lines' format.
pub const VERSION: u32 = 1;

/// A line.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Line {
    /// The first.
    Plan(Header),
    /// A run that was finished.
    Run(Box<Recorded>),
    /// A run that was done once more; one whose trace is another ends the comparison.
    Again(Again),
}

impl Line {
    /// As text, with its line end.
    ///
    /// # Errors
    /// None that this program could cause.
    pub fn print(&self) -> Result<String, serde_json::Error> {
        Ok(serde_json::to_string(self)? + "\n")
    }
}

/// What all lines are of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// Of the format.
    pub version: u32,
    /// BLAKE3 of what the plan holds fixed ([`Plan::fixed`]), as JSON.
    pub plan: String,
    /// Data versions by case.
    pub cases: BTreeMap<String, String>,
}

impl Header {
    /// The one of a plan and the data of its cases.
    ///
    /// # Errors
    /// As [`Plan::fixed`].
    pub fn of(plan: &Plan, cases: &[CaseRuns<'_>]) -> Result<Self, serde_json::Error> {
        let fixed = serde_json::to_vec(&plan.fixed()?)?;
        let versions = cases
            .iter()
            .map(|case| (case.name.to_owned(), case.facts.data_version.clone()));
        Ok(Self {
            version: VERSION,
            plan: blake3::hash(&fixed).to_hex().to_string(),
            cases: versions.collect(),
        })
    }
}

/// A run that was finished.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recorded {
    /// Which.
    pub run: RunId,
    /// How it was done.
    pub proof: Proof,
    /// What is judged.
    pub outcome: Outcome,
}

/// How a run was done, and what whoever does it again compares. Hashes are BLAKE3.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proof {
    /// Hash of the config's identity: of all in it that decides numbers.
    pub config: String,
    /// Version of the data that it was trained on.
    pub data_version: String,
    /// Hash of the program that ended it.
    pub program: String,
    /// What it computed on: `cpu`, or the type of the GPU as manifests name it.
    pub device: String,
    /// Its time from start to end; less where an earlier life did a part.
    pub seconds: f64,
    /// Hash of its whole trace.
    pub trace: String,
}

/// A run that was done once more; one whose trace is another ends the comparison.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Again {
    /// Which.
    pub run: RunId,
    /// Hash of the program that did it again.
    pub program: String,
    /// What that computed on.
    pub device: String,
    /// Hash of the trace.
    pub trace: String,
}

/// A number that reads back to the same bits.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(into = "NumberText", try_from = "NumberText")]
struct Number(f64);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum NumberText {
    Finite(f64),
    Bits(String),
}

impl From<Number> for NumberText {
    fn from(Number(number): Number) -> Self {
        match number.is_finite() {
            true => Self::Finite(number),
            false => Self::Bits(format!("{:016x}", number.to_bits())),
        }
    }
}

impl TryFrom<NumberText> for Number {
    type Error = String;

    fn try_from(text: NumberText) -> Result<Self, String> {
        match text {
            NumberText::Finite(number) => Ok(Self(number)),
            NumberText::Bits(bits) => u64::from_str_radix(&bits, 16)
                .map(|bits| Self(f64::from_bits(bits)))
                .map_err(|_| format!("'{bits}' is no number's bits")),
        }
    }
}

fn numbers(values: &[f64]) -> Vec<Number> {
    values.iter().copied().map(Number).collect()
}

fn values(numbers: Vec<Number>) -> Vec<f64> {
    numbers.into_iter().map(|Number(value)| value).collect()
}

/// An [`Outcome`] as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OutcomeText {
    /// Tokens and the mean over the judged domains, by evaluation.
    curve: Vec<(u64, Number)>,
    /// Mixtures, each with the evaluation (from 0) that it is in force from.
    mixtures: Vec<(usize, Vec<Number>)>,
    end: Vec<Number>,
    mean_mixture: Vec<Number>,
    final_mixture: Vec<Number>,
    decisions: usize,
    natural: Number,
    worst: Number,
    area: Number,
}

impl From<Outcome> for OutcomeText {
    fn from(outcome: Outcome) -> Self {
        let bits = |mixture: &[f64]| mixture.iter().map(|weight| weight.to_bits()).collect::<Vec<_>>();
        let mut mixtures: Vec<(usize, Vec<Number>)> = Vec::new();
        let mut before = None;
        for (at, place) in outcome.curve.iter().enumerate() {
            let now = bits(&place.mixture);
            if before.as_ref() != Some(&now) {
                mixtures.push((at, numbers(&place.mixture)));
                before = Some(now);
            }
        }
        Self {
            curve: outcome
                .curve
                .iter()
                .map(|place| (place.tokens, Number(place.macro_mean)))
                .collect(),
            mixtures,
            end: numbers(&outcome.end),
            mean_mixture: numbers(&outcome.mean_mixture),
            final_mixture: numbers(&outcome.final_mixture),
            decisions: outcome.decisions,
            natural: Number(outcome.natural),
            worst: Number(outcome.worst),
            area: Number(outcome.area),
        }
    }
}

impl TryFrom<OutcomeText> for Outcome {
    type Error = String;

    fn try_from(text: OutcomeText) -> Result<Self, String> {
        let mut changes = text.mixtures.into_iter().peekable();
        let mut mixture = None;
        let mut curve = Vec::with_capacity(text.curve.len());
        for (at, (tokens, Number(macro_mean))) in text.curve.into_iter().enumerate() {
            if let Some((_, new)) = changes.next_if(|(from, _)| *from == at) {
                mixture = Some(values(new));
            }
            curve.push(Evaluation {
                tokens,
                macro_mean,
                mixture: mixture.clone().ok_or("its first evaluation has no mixture")?,
            });
        }
        if changes.next().is_some() {
            return Err("a mixture is of no evaluation, or out of order".to_owned());
        }
        let outcome = Self {
            curve,
            end: values(text.end),
            mean_mixture: values(text.mean_mixture),
            final_mixture: values(text.final_mixture),
            decisions: text.decisions,
            natural: text.natural.0,
            worst: text.worst.0,
            area: text.area.0,
        };
        let has_all = |mixture: &Vec<f64>| mixture.len() == outcome.end.len();
        let ends = [&outcome.mean_mixture, &outcome.final_mixture];
        if outcome.curve.is_empty()
            || !outcome.curve.iter().all(|place| has_all(&place.mixture))
            || !ends.into_iter().all(has_all)
        {
            return Err("it has no evaluation, or not the same domains everywhere".to_owned());
        }
        if !outcome.curve.is_sorted_by(|a, b| a.tokens < b.tokens) {
            return Err("tokens do not grow from evaluation to evaluation".to_owned());
        }
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::super::measure::tests::facts;
    use super::super::plan::tests::plan;
    use super::super::schedule::tests::runs;
    use super::*;
    use proptest::prelude::*;

    /// Any bits at all, and often the ends of what there is.
    fn number() -> impl Strategy<Value = f64> {
        let extreme = [
            0.0,
            -0.0,
            f64::MAX,
            f64::MIN,
            f64::MIN_POSITIVE,
            f64::from_bits(1),
            f64::EPSILON,
            0.1 + 0.2,
            f64::INFINITY,
            f64::NEG_INFINITY,
            f64::NAN,
        ];
        prop_oneof![
            any::<u64>().prop_map(f64::from_bits),
            proptest::sample::select(extreme.to_vec()),
            0.0..1.0_f64,
        ]
    }

    prop_compose! {
        fn outcome()(domains in 1..5_usize, places in 1..6_usize)(
            tokens in proptest::collection::btree_set(any::<u64>(), places),
            macro_means in proptest::collection::vec(number(), places),
            mixtures in proptest::collection::vec(proptest::collection::vec(number(), domains), 3),
            which in proptest::collection::vec(0..2_usize, places),
            end in proptest::collection::vec(number(), domains),
            rest in proptest::collection::vec(number(), 3),
            decisions in any::<usize>(),
        ) -> Outcome {
            let places = tokens.into_iter().zip(macro_means).zip(which);
            Outcome {
                curve: places
                    .map(|((tokens, macro_mean), which)| Evaluation { tokens, macro_mean, mixture: mixtures[which].clone() })
                    .collect(),
                end,
                mean_mixture: mixtures[2].clone(),
                final_mixture: mixtures[1].clone(),
                decisions,
                natural: rest[0],
                worst: rest[1],
                area: rest[2],
            }
        }
    }

    /// All that is in it, floats by their bits.
    fn bits(outcome: &Outcome) -> Vec<u64> {
        let curve = outcome.curve.iter();
        let mut all: Vec<u64> = curve.clone().map(|place| place.tokens).collect();
        let floats = curve
            .flat_map(|place| place.mixture.iter().chain([&place.macro_mean]))
            .chain(&outcome.end)
            .chain(&outcome.mean_mixture)
            .chain(&outcome.final_mixture)
            .chain([&outcome.natural, &outcome.worst, &outcome.area]);
        all.extend(floats.map(|number| number.to_bits()));
        all.push(outcome.decisions as u64);
        all
    }

    proptest! {
        #[test]
        fn outcomes_read_back_to_the_same_bits(outcome in outcome(), seconds in 0.0..1e9_f64, seed in any::<u64>()) {
            let run = RunId { case: "plain".to_owned(), arm: "ado".to_owned(), seed };
            let text = |letter: char| letter.to_string().repeat(64);
            let proof = Proof {
                config: text('a'),
                data_version: text('b'),
                program: text('c'),
                device: "cpu".to_owned(),
                seconds,
                trace: text('d'),
            };
            let line = Line::Run(Box::new(Recorded { run, proof, outcome: outcome.clone() }));
            let printed = line.print().expect("a text");
            prop_assert_eq!(printed.matches('\n').count(), 1);
            let Line::Run(read) = serde_json::from_str(&printed).expect("a line") else { panic!("another kind") };
            prop_assert_eq!(bits(&read.outcome), bits(&outcome));
            prop_assert_eq!(read.proof.seconds.to_bits(), seconds.to_bits());
            prop_assert_eq!(read.run.seed, seed);
            prop_assert_eq!(Line::Run(read).print().expect("a text"), printed);
        }
    }

    #[test]
    fn what_is_no_outcome_is_refused() {
        let good = r#"{"curve":[[1,2.0],[5,1.0]],"mixtures":[[0,[0.5,0.5]]],"end":[1.0,1.0],"mean_mixture":[0.5,0.5],
            "final_mixture":[0.5,0.5],"decisions":0,"natural":1.0,"worst":1.0,"area":1.5}"#;
        let read = |text: &str| serde_json::from_str::<Outcome>(text);
        assert_eq!(read(good).expect("an outcome").curve[1].mixture, [0.5, 0.5]);
        for (from, to, part) in [
            ("[[0,[0.5,0.5]]]", "[]", "no mixture"),
            ("[[0,[0.5,0.5]]]", "[[1,[0.5,0.5]]]", "no mixture"),
            ("[[0,[0.5,0.5]]]", "[[0,[0.5,0.5]],[2,[1.0,0.0]]]", "of no evaluation"),
            ("[[0,[0.5,0.5]]]", "[[0,[0.5]]]", "not the same domains"),
            ("\"end\":[1.0,1.0]", "\"end\":[1.0]", "not the same domains"),
            ("[[1,2.0],[5,1.0]]", "[[5,2.0],[5,1.0]]", "tokens do not grow"),
            ("[[1,2.0],[5,1.0]]", "[]", "of no evaluation"),
            ("\"worst\":1.0", "\"worst\":null", "NumberText"),
            ("\"worst\":1.0", "\"worst\":\"nan\"", "no number's bits"),
            ("\"decisions\":0", "\"decisions\":0,\"other\":0", "unknown field"),
        ] {
            assert!(good.contains(from), "{from}");
            let refused = read(&good.replace(from, to)).expect_err(part).to_string();
            assert!(refused.contains(part), "{to}: {refused}");
        }
    }

    /// A digest stands in files that are kept: what it is made of stays.
    #[test]
    fn the_digest_of_a_plan_is_of_what_it_holds_fixed() {
        let facts = facts();
        let digest = |plan: &Plan| Header::of(plan, &[runs(plan, "plain", &facts)]).expect("a header").plan;
        let plan = plan();
        let same = Plan {
            base: "elsewhere.toml".into(),
            ranks: 2,
            expected_seconds_per_run: 9.0,
            ..plan.clone()
        };
        assert_eq!(digest(&plan), digest(&same));
        let other = Plan {
            steps: 41,
            ..plan.clone()
        };
        assert_ne!(digest(&plan), digest(&other));
        assert_eq!(
            digest(&plan),
            "0a07c7e2949196977371c20a98697c481aea68625fd92bf05618ecf833b40fb2"
        );
    }
}
