//! The epoch limit, `mixture.epochs_max`: a domain that was passed over so often gives its weight to the others, whoever sets
//! the mixture.
//!
//! At every decision point, and behind all else that this line decides of the mixture, the tokens of each domain are reckoned
//! ahead: those of the lines so far, and its share of every step up to the first that the next decision point can act on. The
//! mixtures of these steps are decided by then, so what is left open is the rounding to whole sequences, of which a domain is
//! owed, or has in advance, fewer than two. From the step in which it would pass its limit on, a domain is left out.
//!
//! - **DATA-1** Its passes are of whole sequences, as the cursor counts them, and begin anew with other text.
//! - **LOOP-1** Nothing but lines, decisions and the config is asked.
//! - The decision is a limit on whatever mixture is in force (`Course::in_force`), and none of these: persons, stages and
//!   controllers go on deciding. It is made once for a text, so whoever vetoes it has the domain trained on.
//! - Before the first decision point nothing can be left out: a text that is used up by then is left out from the first step that
//!   this point can act on.

use super::{Ate, Claims, normalised};
use crate::data::decision::{DataChange, Decision, DecisionKind};
use crate::data::signals::Signals;
use crate::data::{DomainFacts, LoopConfig};
use tarazed_domain::{StepIndex, StepsCompleted};

/// Who decides that a domain is at its limit.
pub const EPOCH_LIMITER: &str = "epochs";

/// How the reason ends where the weight of a domain can go nowhere.
const NOTHING_LEFT: &str = "no other domain has any weight, so the mixture stays as it is";

/// Whether a decision leaves out a domain and no other has any weight: the run goes on, and somebody should know.
#[must_use]
pub fn is_limit_of_all(decision: &Decision) -> bool {
    matches!(decision.kind, DecisionKind::EpochLimit { .. }) && decision.reason.ends_with(NOTHING_LEFT)
}

/// What a domain may be passed over.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    epochs_max: Option<u64>,
    context_tokens: u64,
    /// Of each domain, the tokens of one pass by the first step of each text.
    passes: Vec<Vec<(StepIndex, u64)>>,
}

impl Limits {
    pub(super) fn new(config: &LoopConfig, facts: &[DomainFacts]) -> Self {
        let context_tokens = config.context_tokens;
        let first = |fact: &DomainFacts| vec![(StepIndex(0), fact.train_sequences.saturating_mul(context_tokens))];
        Self {
            epochs_max: config.mixture.epochs_max,
            context_tokens,
            passes: facts.iter().map(first).collect(),
        }
    }

    /// Takes over a change of the data that is decided.
    pub(super) fn arrive(&mut self, from: StepIndex, change: &DataChange) {
        for edition in &change.domains {
            let pass = (from, edition.train_sequences.saturating_mul(self.context_tokens));
            match self.passes.get_mut(usize::from(edition.domain)) {
                Some(passes) => passes.push(pass),
                None => self.passes.push(vec![pass]),
            }
        }
    }

    /// The first step of the text that a domain has at a step, and the tokens of a pass over it.
    fn pass(&self, domain: usize, step: StepIndex) -> Option<(StepIndex, u64)> {
        let passes = self.passes.get(domain)?;
        passes.iter().rfind(|(from, _)| *from <= step).copied()
    }
}

impl Ate {
    /// Domains that come to their limit before the next decision point could act.
    pub(super) fn limit_epochs(&mut self, line: StepsCompleted, signals: &Signals) -> Vec<Decision> {
        let mut decisions = Vec::new();
        let Some(epochs_max) = self.limits.epochs_max else {
            return decisions;
        };
        // Each leaves more to the others.
        while let Some((domain, step)) = self.first_at_limit(epochs_max, line, signals) {
            let from = step.max(self.schedule.effective(line));
            let mixture = self.course.in_force(from);
            let mut others = mixture.iter().enumerate().filter(|(other, _)| *other != domain);
            let rest = match others.any(|(_, weight)| *weight > 0.0) {
                true => "the others have its weight",
                false => NOTHING_LEFT,
            };
            let name = self.names.get(domain).map_or("", String::as_str);
            let reached = step.completed();
            let reason = format!("{name}: mixture.epochs_max = {epochs_max} is reached in step {reached}; {rest}");
            let kind = DecisionKind::EpochLimit { domain: domain as u16 };
            let decision = self.decision(line, from, kind, EPOCH_LIMITER, reason);
            if !self.adopt(&decision) {
                break;
            }
            decisions.push(decision);
        }
        decisions
    }

    /// A domain at its limit claims nothing: it is not drawn, so there is no news of it.
    pub(super) fn silence_limited(&self, claims: &mut Claims, effective: StepIndex) {
        let all = claims.claims.iter_mut().zip(&mut claims.inputs).enumerate();
        for (_, (claim, input)) in all.filter(|(domain, _)| self.course.is_limited(*domain, effective)) {
            *claim = None;
            "at its epoch limit".clone_into(input);
        }
    }

    /// The domain that passes its limit first, and in which step, by what is decided so far.
    fn first_at_limit(&self, epochs_max: u64, line: StepsCompleted, signals: &Signals) -> Option<(usize, StepIndex)> {
        let effective = self.schedule.effective(line);
        let next = self.schedule.next_point(line).map(|next| self.schedule.effective(next));
        let until = next.unwrap_or(effective);
        let tokens = |domain: usize| signals.domains.get(domain).map_or(0, |seen| seen.edition_tokens);
        let domains = 0..self.limits.passes.len();
        let mut used: Vec<f64> = domains.map(|domain| tokens(domain) as f64).collect();
        for step in (line.0..until.0).map(StepIndex) {
            let batch_tokens = f64::from(self.config.batch.sequences(step)) * self.limits.context_tokens as f64;
            for (domain, share) in normalised(&self.course.in_force(step)).into_iter().enumerate() {
                let (begun, pass_tokens) = self.limits.pass(domain, step)?;
                if begun == step {
                    used[domain] = 0.0;
                }
                used[domain] += share * batch_tokens;
                let is_beyond = used[domain] > epochs_max as f64 * pass_tokens as f64;
                // Other text may come before anything can act.
                let then = self.limits.pass(domain, effective.max(step));
                let stays = then.is_some_and(|(at, _)| at == begun);
                if is_beyond && share > 0.0 && stays && !self.course.has_limit(domain, step) {
                    return Some((domain, step));
                }
            }
        }
        None
    }
}
