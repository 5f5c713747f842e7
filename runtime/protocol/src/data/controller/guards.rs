//! What every adaptive controller is held to, whatever it claims.

use super::super::projection::{project, round};
use super::super::signals::Signals;
use super::super::{DomainFacts, LoopConfig};
use tarazed_domain::{StepIndex, StepsCompleted};

/// Largest change of a weight's logarithm in one update.
pub const LN_CHANGE_MAX: f64 = 0.2;
/// Share of the configured mixture in every target.
pub const PRIOR_SHARE: f64 = 0.25;
/// Passes over a domain at most.
pub const EPOCHS_MAX: f64 = 4.0;
/// Least weight of a domain whose data is used up.
pub const WEIGHT_MIN: f64 = 1e-3;
/// Lines without decisions after a spike.
pub const SPIKE_FREEZE_LINES: u64 = 64;
/// Changes of all weights below this are not worth a decision.
const CHANGE_MIN: f64 = 1e-4;

/// Least weight of one of `domain_count` domains.
#[must_use]
pub fn weight_floor(domain_count: usize) -> f64 {
    let count = domain_count.max(1) as f64;
    (1.0 / (5.0 * count)).max(0.01).min(1.0 / (2.0 * count))
}

/// Passes over a domain at most, in a run whose config may say fewer.
fn epochs_max(config: &LoopConfig) -> f64 {
    let limit = config.mixture.epochs_max;
    limit.map_or(EPOCHS_MAX, |limit| EPOCHS_MAX.min(limit as f64))
}

/// The most that a domain may have after so many tokens of the run, with so many of its own text left.
fn supply(left: f64, tokens: u64) -> f64 {
    (left / (tokens as f64).max(1.0)).max(WEIGHT_MIN)
}

/// Least and largest share that a domain of this size begins with, as one of `domain_count`, after so many tokens of the run.
pub(super) fn share_range(config: &LoopConfig, domain_count: usize, train_tokens: f64, tokens: u64) -> (f64, f64) {
    let supply = supply(epochs_max(config) * train_tokens, tokens);
    (weight_floor(domain_count).min(supply), supply)
}

/// The guards of a run, as of the newest step that something was decided for.
#[derive(Clone, Debug)]
pub(super) struct Guards {
    /// Part of each domain in the configured mixture.
    pub(super) prior: Vec<f64>,
    /// Training tokens of one epoch of each.
    pub(super) train_tokens: Vec<f64>,
    /// First step of the text that each has; none for that of the start.
    pub(super) since: Vec<Option<StepIndex>>,
    epochs_max: f64,
}

impl Guards {
    pub(super) fn new(config: &LoopConfig, facts: &[DomainFacts], prior: Vec<f64>) -> Self {
        Self {
            epochs_max: epochs_max(config),
            train_tokens: facts.iter().map(|fact| fact.train_tokens as f64).collect(),
            since: vec![None; facts.len()],
            prior,
        }
    }

    /// Whether a spike is too near.
    pub(super) fn is_frozen(line: StepsCompleted, signals: &Signals) -> bool {
        let spike = signals.last_spike;
        spike.is_some_and(|spike| line.0.saturating_sub(spike.0) < SPIKE_FREEZE_LINES)
    }

    /// The mixture nearest to what domains claim that keeps all guards; none if there is none.
    pub(super) fn settle(&self, claims: &[Option<f64>], signals: &Signals, current: &[f64]) -> Option<Vec<f64>> {
        let target = self.target(claims, current);
        let (low, high) = self.range(claims, signals, current);
        Some(round(&project(&target, &low, &high)?))
    }

    /// Whether two mixtures differ by more than is worth a decision.
    pub(super) fn is_change(weights: &[f64], current: &[f64]) -> bool {
        let change = weights
            .iter()
            .zip(current)
            .map(|(new, old)| (new - old).abs())
            .fold(0.0, f64::max);
        change >= CHANGE_MIN
    }

    /// The unguarded target. Domains without a claim keep their weight; the others share the rest.
    fn target(&self, claims: &[Option<f64>], current: &[f64]) -> Vec<f64> {
        let of_claimants = |values: &[f64]| -> f64 {
            let claimants = values.iter().zip(claims).filter(|(_, claim)| claim.is_some());
            claimants.map(|(value, _)| value).sum()
        };
        let (mass, prior_mass) = (of_claimants(current), of_claimants(&self.prior));
        let claim_sum: f64 = claims.iter().flatten().sum();
        claims
            .iter()
            .zip(current.iter().zip(&self.prior))
            .map(|(claim, (current, prior))| match claim {
                Some(claim) => mass * ((1.0 - PRIOR_SHARE) * claim / claim_sum + PRIOR_SHARE * prior / prior_mass),
                None => *current,
            })
            .collect()
    }

    /// Least and largest weight of each domain at this update.
    fn range(&self, claims: &[Option<f64>], signals: &Signals, current: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let floor = weight_floor(current.len());
        let step = libm::exp(LN_CHANGE_MAX);
        let mut low = Vec::with_capacity(current.len());
        let mut high = Vec::with_capacity(current.len());
        for (domain, weight) in current.iter().enumerate() {
            let left = (self.epochs_max * self.train_tokens[domain] - self.used(domain, signals)).max(0.0);
            let supply = supply(left, signals.tokens);
            // A weight below the floor climbs to it, one above its supply sinks to it, each at the permitted pace.
            let lowest = (weight / step).max(floor.min(supply)).min(weight * step);
            let highest = (weight * step).min(supply).max(lowest);
            let kept = weight.clamp(lowest, highest);
            low.push(if claims[domain].is_some() { lowest } else { kept });
            high.push(if claims[domain].is_some() { highest } else { kept });
        }
        (low, high)
    }

    /// Tokens of a domain's present text so far: none of one that no line has trained on yet.
    fn used(&self, domain: usize, signals: &Signals) -> f64 {
        let is_seen = self.since[domain].is_none_or(|since| since.0 < signals.step.0);
        let seen = signals.domains.get(domain).filter(|_| is_seen);
        seen.map_or(0.0, |seen| seen.edition_tokens as f64)
    }
}
