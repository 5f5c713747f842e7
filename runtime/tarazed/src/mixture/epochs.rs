//! How often a run passes over each text: its share of the budget over its tokens. Pure.
//!
//! A number for the reader, by which a domain that repeats is seen; nothing is judged by it. It goes by the mean mixture, so of
//! a static arm it is exact but for whole sequences, and of a controller as near as its mixture is to its mean.

use super::measure::Facts;
use serde::Serialize;
use std::ops::Range;

/// Passes over one text.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct TextEpochs {
    /// Its domain.
    pub domain: String,
    /// The first step (from 0) that can train on it.
    pub from_step: u64,
    /// Its training tokens.
    pub train_tokens: u64,
    /// Passes by arm, in the order of reports; of arms with finished runs.
    pub arms: Vec<ArmEpochs>,
}

/// Passes of one arm.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct ArmEpochs {
    /// What reports call it.
    pub arm: String,
    /// Mean over its finished runs.
    pub epochs: f64,
}

/// How long runs are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Length {
    /// Optimizer updates.
    pub steps: u64,
    /// Training tokens.
    pub tokens: u64,
}

/// Passes over each text of a case, by domain and in the order in which a domain has them. `mixtures` has the mean mixture of
/// each arm.
#[must_use]
pub fn epochs(facts: &Facts, mixtures: &[(&str, &[f64])], length: Length) -> Vec<TextEpochs> {
    let mut texts = Vec::new();
    for (at, domain) in facts.domains.iter().enumerate() {
        let later = domain.later.as_ref().map(|later| (later.from_step, later.train_tokens));
        let end = later.map_or(length.steps, |(from_step, _)| from_step);
        let first = (domain.from_step..end, domain.train_tokens);
        let second = later.map(|(from_step, tokens)| (from_step..length.steps, tokens));
        for (steps, train_tokens) in std::iter::once(first).chain(second) {
            let of = |mixture: &[f64]| {
                let trained = steps_of(facts, mixture, at, &steps) * length.tokens as f64 / length.steps as f64;
                trained / train_tokens as f64
            };
            texts.push(TextEpochs {
                domain: domain.name.clone(),
                from_step: steps.start,
                train_tokens,
                arms: mixtures
                    .iter()
                    .map(|(arm, mixture)| ArmEpochs {
                        arm: (*arm).to_owned(),
                        epochs: of(mixture),
                    })
                    .collect(),
            });
        }
    }
    texts
}

/// How many whole steps would train on a domain as much as these do: until a late domain comes, the others share its weight.
fn steps_of(facts: &Facts, mixture: &[f64], domain: usize, steps: &Range<u64>) -> f64 {
    let weights = || facts.domains.iter().zip(mixture);
    let late = || weights().filter(|(domain, _)| domain.from_step > 0);
    let arrives = late().map(|(domain, _)| domain.from_step).max().unwrap_or(0);
    let others = (1.0 - late().map(|(_, weight)| weight).sum::<f64>()).max(f64::EPSILON);
    let count = |steps: Range<u64>| steps.end.saturating_sub(steps.start) as f64;
    let before = count(steps.start..steps.end.min(arrives));
    let since = count(steps.start.max(arrives)..steps.end);
    mixture[domain] * (before / others + since)
}

#[cfg(test)]
mod tests {
    use super::super::measure::LaterText;
    use super::super::measure::tests::facts;
    use super::*;

    const LENGTH: Length = Length {
        steps: 10,
        tokens: 10_000,
    };

    fn of(facts: &Facts, mixture: [f64; 3]) -> Vec<(String, u64, f64)> {
        let texts = epochs(facts, &[("uniform", &mixture[..])], LENGTH);
        texts
            .into_iter()
            .map(|text| (text.domain, text.from_step, text.arms[0].epochs))
            .collect()
    }

    fn assert_are(found: &[(String, u64, f64)], expected: &[(&str, u64, f64)]) {
        let is_it = |(found, expected): (&(String, u64, f64), &(&str, u64, f64))| {
            found.0 == expected.0 && found.1 == expected.1 && (found.2 - expected.2).abs() < 1e-9
        };
        assert_eq!(found.len(), expected.len(), "{found:?}");
        assert!(found.iter().zip(expected).all(is_it), "{found:?}");
    }

    /// Texts of 1,000, 250 and 2,250 tokens.
    #[test]
    fn passes_are_share_times_budget_over_tokens() {
        let found = of(&facts(), [0.25, 0.5, 0.25]);
        let noise = 2_500.0 / 2_250.0;
        assert_are(&found, &[("web", 0, 2.5), ("zh", 0, 20.0), ("noise", 0, noise)]);
        assert!(epochs(&facts(), &[], LENGTH).iter().all(|text| text.arms.is_empty()));
    }

    /// Each text of a domain has the steps that are its own.
    #[test]
    fn a_text_that_takes_anothers_place_is_counted_by_itself() {
        let mut shifted = facts();
        shifted.domains[0].later = Some(LaterText {
            from_step: 4,
            made: String::new(),
            train_documents: 1,
            train_tokens: 500,
            train_bytes: 2_000,
        });
        let found = of(&shifted, [0.25, 0.5, 0.25]);
        let noise = 2_500.0 / 2_250.0;
        assert_are(
            &found,
            &[("web", 0, 1.0), ("web", 4, 3.0), ("zh", 0, 20.0), ("noise", 0, noise)],
        );
    }

    /// Until it comes the others have all, in their proportions; together they have the whole budget.
    #[test]
    fn a_late_domain_leaves_its_weight_to_the_others_until_it_comes() {
        let mut late = facts();
        late.domains[2].from_step = 4;
        let found = of(&late, [0.25, 0.25, 0.5]);
        // 4,000 tokens at a half, then 6,000 at a quarter.
        let expected = [("web", 0, 3.5), ("zh", 0, 14.0), ("noise", 4, 3_000.0 / 2_250.0)];
        assert_are(&found, &expected);
        let texts = found.iter().zip(late.sizes());
        let tokens: f64 = texts.map(|(text, size)| text.2 * size as f64).sum();
        assert!((tokens - LENGTH.tokens as f64).abs() < 1e-6, "{tokens}");
    }
}
