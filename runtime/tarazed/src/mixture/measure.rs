//! From a committed trace to the numbers that a run is judged by. Pure.
//!
//! A domain's held-out loss in nats per token becomes **bits per byte**, `loss / ln 2 · tokens / bytes`, with tokens and
//! bytes of the very text that is scored: a number that does not depend on the tokenizer. An evaluation in line `s` is of
//! the weights before step `s`, so it stands at the tokens of line `s - 1`.

use super::plan::{Metric, NamedStatic, Plan, Target};
use super::record::OutcomeText;
use serde::{Deserialize, Serialize};
use std::f64::consts::LN_2;
use tarazed_protocol::trace::TraceLine;

/// The data of a case, in numbers.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Facts {
    /// Its data version.
    pub data_version: String,
    /// Its domains, in order.
    pub domains: Vec<DomainFacts>,
}

/// One domain of a case.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct DomainFacts {
    /// Its name.
    pub name: String,
    /// Whether runs are judged by it.
    pub judged: bool,
    /// The first step (from 0) that can train on it.
    pub from_step: u64,
    /// How it was made; empty where it is the corpus' own.
    pub made: String,
    /// Training documents.
    pub train_documents: u64,
    /// Training tokens.
    pub train_tokens: u64,
    /// Bytes of the training text.
    pub train_bytes: u64,
    /// Other training text, which takes the place of that one while runs train.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub later: Option<LaterText>,
    /// Held-out tokens that an evaluation scores.
    pub scored_tokens: u64,
    /// Bytes of the text behind them.
    pub scored_bytes: f64,
}

/// Training text that takes the place of another.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct LaterText {
    /// The first step (from 0) that trains on it.
    pub from_step: u64,
    /// How it was made.
    pub made: String,
    /// Training documents.
    pub train_documents: u64,
    /// Training tokens.
    pub train_tokens: u64,
    /// Bytes of the training text.
    pub train_bytes: u64,
}

impl DomainFacts {
    /// Training tokens of all of its texts.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.train_tokens + self.later.as_ref().map_or(0, |later| later.train_tokens)
    }

    /// Bytes of all of its training texts.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.train_bytes + self.later.as_ref().map_or(0, |later| later.train_bytes)
    }

    /// Whether the step of this line can train on it.
    const fn is_there(&self, line: &TraceLine) -> bool {
        self.from_step < line.step.0
    }

    /// Whether the step of this line is the first that trains on a text of it. Weights are divided up anew there, which may touch
    /// their last bits even where nobody has decided anything.
    fn brings_text(&self, line: &TraceLine) -> bool {
        let later = self.later.as_ref().map(|later| later.from_step);
        let mut first_steps = std::iter::once(self.from_step).chain(later);
        first_steps.any(|first| first + 1 == line.step.0)
    }
}

impl Facts {
    /// Training tokens by domain, of all texts that it has in the course of a run: no arm knows when one takes another's place.
    #[must_use]
    pub fn sizes(&self) -> Vec<u64> {
        self.domains.iter().map(DomainFacts::tokens).collect()
    }
}

/// One evaluation.
#[derive(Clone, PartialEq, Debug)]
pub struct Evaluation {
    /// Training tokens that the weights have seen.
    pub tokens: u64,
    /// Mean over the judged domains.
    pub macro_mean: f64,
    /// Mixture in force, by domain.
    pub mixture: Vec<f64>,
}

/// What a finished run leaves to judge.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(into = "OutcomeText", try_from = "OutcomeText")]
pub struct Outcome {
    /// Evaluations, in order.
    pub curve: Vec<Evaluation>,
    /// Bits per byte by domain at the end, those that are not judged too.
    pub end: Vec<f64>,
    /// Mean over all steps of the mixture in force.
    pub mean_mixture: Vec<f64>,
    /// Mixture of the last step.
    pub final_mixture: Vec<f64>,
    /// Decisions that changed the mixture.
    pub decisions: usize,
    /// See [`Metric::Natural`].
    pub natural: f64,
    /// See [`Metric::Worst`].
    pub worst: f64,
    /// See [`Metric::Area`].
    pub area: f64,
}

/// Why a trace is no outcome of its plan.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unfit {
    /// Go on with the run: it has not come to its end.
    #[error("it has {have} of {want} steps")]
    Unfinished {
        /// Lines.
        have: u64,
        /// Lines of the whole run.
        want: u64,
    },
    /// Refuse it: it is another run's, or its data is another.
    #[error("{0}")]
    Other(String),
}

impl Outcome {
    /// Reads a whole run.
    ///
    /// # Errors
    /// [`Unfit`].
    pub fn read(lines: &[TraceLine], facts: &Facts, steps: u64) -> Result<Self, Unfit> {
        let have = lines.last().map_or(0, |line| line.step.0);
        if have < steps {
            return Err(Unfit::Unfinished { have, want: steps });
        }
        if have > steps || lines.len() as u64 != steps {
            return Err(Unfit::Other(format!(
                "{} lines up to step {have}, not {steps}",
                lines.len()
            )));
        }
        let mixtures: Vec<Vec<f64>> = lines
            .iter()
            .map(|line| mixture(line, facts))
            .collect::<Result<_, _>>()?;
        let (mut curve, mut end) = (Vec::new(), Vec::new());
        let mut tokens_before = 0;
        for (line, mixture) in lines.iter().zip(&mixtures) {
            // Before all domains are there, there is no mean over them that later ones could be compared with.
            let is_whole = facts.domains.iter().all(|domain| domain.is_there(line));
            if line.heldout.is_some() && is_whole {
                end = bits_per_byte(line, facts)?;
                curve.push(Evaluation {
                    tokens: tokens_before,
                    macro_mean: macro_mean(&end, facts),
                    mixture: mixture.clone(),
                });
            }
            tokens_before = line.tokens;
        }
        let last_is_measured = lines.last().is_some_and(|line| line.heldout.is_some());
        if curve.is_empty() || !last_is_measured {
            return Err(Unfit::Other("its last line holds no evaluation".to_owned()));
        }
        let judged = || facts.domains.iter().zip(&end).filter(|(domain, _)| domain.judged);
        let bytes: f64 = judged().map(|(domain, _)| domain.bytes() as f64).sum();
        let weighted: f64 = judged().map(|(domain, bits)| domain.bytes() as f64 * bits).sum();
        let arrives = |line: &TraceLine| facts.domains.iter().any(|domain| domain.brings_text(line));
        let changes = mixtures.windows(2).zip(&lines[1..]);
        Ok(Self {
            mean_mixture: mean_mixture(&mixtures, facts),
            final_mixture: mixtures.last().cloned().unwrap_or_default(),
            decisions: changes
                .filter(|(pair, line)| pair[0] != pair[1] && !arrives(line))
                .count(),
            natural: weighted / bytes,
            worst: judged().map(|(_, bits)| *bits).fold(f64::NEG_INFINITY, f64::max),
            area: area(&curve),
            curve,
            end,
        })
    }

    /// Mean over the judged domains at the end.
    #[must_use]
    pub fn macro_end(&self) -> f64 {
        self.curve.last().map_or(f64::NAN, |end| end.macro_mean)
    }

    /// The number of a metric; none where the target is not reached. `target` is in bits per byte.
    #[must_use]
    pub fn metric(&self, metric: Metric, target: f64) -> Option<f64> {
        match metric {
            Metric::Macro => Some(self.macro_end()),
            Metric::Natural => Some(self.natural),
            Metric::Worst => Some(self.worst),
            Metric::Area => Some(self.area),
            Metric::TokensToTarget => self.tokens_to(target),
        }
    }

    /// Tokens at which the curve is first at or below `target`, between evaluations on a straight line.
    #[must_use]
    pub fn tokens_to(&self, target: f64) -> Option<f64> {
        let at = self.curve.iter().position(|place| place.macro_mean <= target)?;
        let here = &self.curve[at];
        let Some(before) = at.checked_sub(1).map(|before| &self.curve[before]) else {
            return Some(here.tokens as f64);
        };
        let share = (before.macro_mean - target) / (before.macro_mean - here.macro_mean);
        Some(before.tokens as f64 + share * (here.tokens - before.tokens) as f64)
    }
}

/// Mean over all steps. Of a domain that comes late, over those since; the others then share the rest by their means over
/// all steps: a static run of this mixture, in which the others have all before, treats each as this one did on average.
fn mean_mixture(mixtures: &[Vec<f64>], facts: &Facts) -> Vec<f64> {
    let mean = |domain: usize, steps: &[Vec<f64>]| {
        steps.iter().map(|mixture| mixture[domain]).sum::<f64>() / steps.len().max(1) as f64
    };
    let all = 0..facts.domains.len();
    let is_late = |domain: usize| facts.domains[domain].from_step > 0;
    if !all.clone().any(is_late) {
        return all.map(|domain| mean(domain, mixtures)).collect();
    }
    let proportions: Vec<Vec<f64>> = mixtures
        .iter()
        .map(|mixture| {
            let early: f64 = all
                .clone()
                .filter(|&domain| !is_late(domain))
                .map(|domain| mixture[domain])
                .sum();
            mixture.iter().map(|weight| weight / early).collect()
        })
        .collect();
    let since = |domain: usize| {
        let from = usize::try_from(facts.domains[domain].from_step).unwrap_or(usize::MAX);
        mean(domain, mixtures.get(from..).unwrap_or_default())
    };
    let rest = 1.0 - all.clone().filter(|&domain| is_late(domain)).map(since).sum::<f64>();
    all.map(|domain| match is_late(domain) {
        true => since(domain),
        false => rest * mean(domain, &proportions),
    })
    .collect()
}

/// The mixture of a line; a domain that has not come yet has nothing.
fn mixture(line: &TraceLine, facts: &Facts) -> Result<Vec<f64>, Unfit> {
    let there = || facts.domains.iter().filter(|domain| domain.is_there(line));
    let names = || there().map(|domain| domain.name.as_str());
    if !line.mixture.iter().map(|(name, _)| name).eq(names()) {
        return Err(Unfit::Other(format!(
            "line {} has other domains than its case",
            line.step
        )));
    }
    let weight = |domain: &DomainFacts| line.mixture.get(&domain.name).copied().unwrap_or(0.0);
    Ok(facts.domains.iter().map(weight).collect())
}

/// By domain, those that are not judged too.
fn bits_per_byte(line: &TraceLine, facts: &Facts) -> Result<Vec<f64>, Unfit> {
    let of = |domain: &DomainFacts| {
        let loss = line.heldout.as_ref().and_then(|losses| losses.get(&domain.name));
        let Some(loss) = loss.filter(|loss| loss.loss.is_finite() && loss.tokens == domain.scored_tokens) else {
            let cause = format!(
                "line {} has no loss over the held-out text of '{}'",
                line.step, domain.name
            );
            return Err(Unfit::Other(cause));
        };
        Ok(loss.loss / LN_2 * domain.scored_tokens as f64 / domain.scored_bytes)
    };
    facts.domains.iter().map(of).collect()
}

/// Over the judged domains.
fn macro_mean(bits_per_byte: &[f64], facts: &Facts) -> f64 {
    let domains = facts.domains.iter().zip(bits_per_byte);
    let judged: Vec<f64> = domains
        .filter(|(domain, _)| domain.judged)
        .map(|(_, bits)| *bits)
        .collect();
    judged.iter().sum::<f64>() / judged.len() as f64
}

/// Mean height of the curve over tokens, by trapezoids; of a single evaluation, that one's.
fn area(curve: &[Evaluation]) -> f64 {
    let (Some(first), Some(last)) = (curve.first(), curve.last()) else {
        return f64::NAN;
    };
    if first.tokens == last.tokens {
        return last.macro_mean;
    }
    let trapezoids: f64 = curve
        .windows(2)
        .map(|pair| f64::midpoint(pair[0].macro_mean, pair[1].macro_mean) * (pair[1].tokens - pair[0].tokens) as f64)
        .sum();
    trapezoids / (last.tokens - first.tokens) as f64
}

/// The target in bits per byte of a pair of runs; `named` gives the end of the static arm that a plan may name.
#[must_use]
pub fn target(plan: &Plan, named: impl FnOnce(NamedStatic) -> Option<f64>) -> Option<f64> {
    match plan.metrics.target {
        Target::BitsPerByte(bits) => Some(bits),
        Target::EndOf(arm) => named(arm),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use tarazed_domain::StepsCompleted;
    use tarazed_protocol::trace::{DomainLoss, DomainMap};

    pub(crate) fn facts() -> Facts {
        let domain = |name: &str, judged, train_bytes, scored_bytes| DomainFacts {
            name: name.to_owned(),
            judged,
            from_step: 0,
            made: String::new(),
            train_documents: 10,
            train_tokens: train_bytes / 4,
            train_bytes,
            later: None,
            scored_tokens: 100,
            scored_bytes,
        };
        Facts {
            data_version: "v".to_owned(),
            domains: vec![
                domain("web", true, 4_000, 400.0),
                domain("zh", true, 1_000, 200.0),
                domain("noise", false, 9_000, 100.0),
            ],
        }
    }

    /// A line whose held-out losses, where it has them, are `bits` bits per byte in every judged domain; 9 in noise.
    pub(crate) fn line(step: u64, mixture: [f64; 3], bits: Option<[f64; 2]>) -> TraceLine {
        let facts = facts();
        let names = || facts.domains.iter().map(|domain| domain.name.clone());
        let heldout = bits.map(|[web, zh]| {
            let losses = facts.domains.iter().zip([web, zh, 9.0]);
            DomainMap(
                losses
                    .map(|(domain, bits)| {
                        let loss = bits * LN_2 * domain.scored_bytes / domain.scored_tokens as f64;
                        (
                            domain.name.clone(),
                            DomainLoss {
                                loss,
                                tokens: domain.scored_tokens,
                            },
                        )
                    })
                    .collect(),
            )
        });
        TraceLine {
            step: StepsCompleted(step),
            tokens: step * 1_000,
            data: [0; 32],
            loss: 1.0,
            grad_norm: 1.0,
            state: [0; 32],
            lr: 1e-3,
            mixture: DomainMap(names().zip(mixture).collect()),
            domains: DomainMap::default(),
            heldout,
            lane_squares: None,
            skipped: false,
            lineage: None,
            decisions: Vec::new(),
        }
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn numbers_are_those_of_a_curve_by_hand() {
        let (even, moved) = ([0.25, 0.25, 0.5], [0.5, 0.25, 0.25]);
        let lines = [
            line(1, even, None),
            line(2, even, Some([4.0, 6.0])),
            line(3, moved, None),
            line(4, moved, Some([2.0, 3.0])),
        ];
        let outcome = Outcome::read(&lines, &facts(), 4).expect("an outcome");
        assert!(close(outcome.macro_end(), 2.5));
        assert!(close(outcome.natural, (2.0 * 4.0 + 3.0) / 5.0));
        assert!(close(outcome.worst, 3.0));
        assert!(close(outcome.area, 3.75));
        let tokens: Vec<u64> = outcome.curve.iter().map(|place| place.tokens).collect();
        assert_eq!(tokens, [1_000, 3_000], "the weights before the step");
        assert!(
            outcome
                .mean_mixture
                .iter()
                .zip([0.375, 0.25, 0.375])
                .all(|(a, b)| close(*a, b))
        );
        assert_eq!(outcome.final_mixture, moved);
        assert_eq!(outcome.decisions, 1);
        // From 5 to 2.5 over 2,000 tokens: 4 after 800 of them.
        assert!(outcome.tokens_to(4.0).is_some_and(|tokens| close(tokens, 1_800.0)));
        assert!(outcome.tokens_to(5.5).is_some_and(|tokens| close(tokens, 1_000.0)));
        assert_eq!(outcome.tokens_to(2.4), None);
    }

    /// A domain that comes is measured and averaged from its step on; the others keep their means among themselves.
    #[test]
    fn a_late_domain_counts_from_its_step_on() {
        let mut late = facts();
        late.domains[2].from_step = 2;
        late.domains[2].judged = true;
        let (even, moved) = ([0.25, 0.25, 0.5], [0.6, 0.2, 0.2]);
        let lines = [
            line(1, [0.5, 0.5, 0.0], None),
            line(2, [0.5, 0.5, 0.0], Some([1.0, 1.0])),
            line(3, even, Some([4.0, 6.0])),
            line(4, moved, Some([2.0, 3.0])),
        ];
        let without = |mut line: TraceLine| {
            line.mixture.0.truncate(2);
            if let Some(heldout) = &mut line.heldout {
                heldout.0.truncate(2);
            }
            line
        };
        let refused = Outcome::read(&lines, &late, 4).expect_err("it names what has not come");
        assert!(refused.to_string().contains("line 1 has other domains"), "{refused}");
        let lines = [
            without(lines[0].clone()),
            without(lines[1].clone()),
            lines[2].clone(),
            lines[3].clone(),
        ];
        let outcome = Outcome::read(&lines, &late, 4).expect("an outcome");
        assert_eq!(outcome.curve.len(), 2, "from line 3 on");
        assert!(close(outcome.macro_end(), (2.0 + 3.0 + 9.0) / 3.0));
        // The others: 1/2, 1/2, 1/2 and 3/4 of what is theirs.
        let expected = [0.65 * 0.5625, 0.65 * 0.4375, 0.35];
        assert!(
            outcome.mean_mixture.iter().zip(expected).all(|(a, b)| close(*a, b)),
            "{:?}",
            outcome.mean_mixture
        );
        assert_eq!(outcome.decisions, 1, "that it comes is no decision of an arm");
    }

    /// Of a domain whose text changes, all text counts for its size and its weight in the natural mean; nothing else does.
    #[test]
    fn a_text_that_takes_anothers_place_counts_for_size_alone() {
        let mut shifted = facts();
        shifted.domains[1].later = Some(LaterText {
            from_step: 1,
            made: "the hard half".to_owned(),
            train_documents: 9,
            train_tokens: 750,
            train_bytes: 3_000,
        });
        assert_eq!(shifted.sizes(), [1_000, 1_000, 2_250]);
        let (even, almost) = ([0.25, 0.25, 0.5], [0.25, 0.25, 0.5_f64.next_up()]);
        let lines = [line(1, even, None), line(2, almost, Some([2.0, 3.0]))];
        let read = |facts: &Facts| Outcome::read(&lines, facts, 2).expect("an outcome");
        let (plain, with) = (read(&facts()), read(&shifted));
        assert!(close(plain.natural, 2.2) && close(with.natural, 2.5));
        assert_eq!((plain.decisions, with.decisions), (1, 0), "it comes by itself");
        let (natural, decisions) = (plain.natural, plain.decisions);
        assert_eq!(
            Outcome {
                natural,
                decisions,
                ..with
            },
            plain
        );
    }

    #[test]
    fn a_trace_of_another_run_is_no_outcome() {
        let even = [0.25, 0.25, 0.5];
        let lines = [line(1, even, None), line(2, even, Some([1.0, 1.0]))];
        let read = |lines: &[TraceLine], steps| Outcome::read(lines, &facts(), steps).expect_err("unfit");
        assert_eq!(read(&lines, 3), Unfit::Unfinished { have: 2, want: 3 });
        assert_eq!(read(&[], 3), Unfit::Unfinished { have: 0, want: 3 });
        for (lines, part) in [
            (vec![lines[0].clone()], "holds no evaluation"),
            (lines.to_vec(), "2 lines up to step 2, not 1"),
        ] {
            assert!(read(&lines, 1).to_string().contains(part), "{part}");
        }
        let mut other = lines.clone();
        other[1].mixture.0[0].0 = "book".to_owned();
        assert!(read(&other, 2).to_string().contains("other domains"));
        let mut short = lines;
        if let Some(heldout) = &mut short[1].heldout {
            heldout.0[1].1.tokens = 99;
        }
        assert!(read(&short, 2).to_string().contains("held-out text of 'zh'"));
    }
}
