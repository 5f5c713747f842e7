//! Held-out loss of each domain over its own training tokens, kept as far as a fit needs it.

use super::super::fit::{PowerLaw, fit};
use super::super::signals::Signals;
use super::Arrival;
use std::collections::VecDeque;
use tarazed_domain::StepsCompleted;

/// Evaluations older than this share of a domain's tokens are forgotten: early transients are no scaling law.
const HISTORY_SHARE_MIN: f64 = 1.0 / 16.0;
/// Evaluations within this ratio of tokens count as one place on the curve, their losses averaged.
const HISTORY_RATIO: f64 = 1.02;

/// One place on a domain's loss curve.
#[derive(Clone, Copy, Debug)]
struct Observation {
    /// The domain's tokens at the first evaluation of this place.
    tokens: f64,
    loss_sum: f64,
    count: f64,
}

/// The curves of all domains, and which evaluations were looked at.
#[derive(Clone, Debug)]
pub(super) struct Curves {
    curves: Vec<VecDeque<Observation>>,
    observed: Option<StepsCompleted>,
    used: Option<StepsCompleted>,
}

impl Curves {
    pub(super) fn new(domain_count: usize) -> Self {
        Self {
            curves: vec![VecDeque::new(); domain_count],
            observed: None,
            used: None,
        }
    }

    /// Forgets what text was that is replaced, and begins empty curves for new domains.
    pub(super) fn arrive(&mut self, arrival: &Arrival) {
        for text in &arrival.replaced {
            self.curves[text.domain].clear();
        }
        self.curves
            .resize_with(arrival.before + arrival.new.len(), VecDeque::new);
    }

    /// Takes in an evaluation, once.
    pub(super) fn observe(&mut self, signals: &Signals) {
        if signals.evaluated == self.observed || signals.evaluated != Some(signals.step) {
            return;
        }
        self.observed = signals.evaluated;
        for (curve, domain) in self.curves.iter_mut().zip(&signals.domains) {
            let tokens = domain.tokens as f64;
            let Some(loss) = domain.heldout_loss.filter(|loss| loss.is_finite() && tokens >= 1.0) else {
                continue;
            };
            match curve.back_mut().filter(|last| tokens < last.tokens * HISTORY_RATIO) {
                Some(last) => {
                    last.loss_sum += loss;
                    last.count += 1.0;
                }
                None => curve.push_back(Observation {
                    tokens,
                    loss_sum: loss,
                    count: 1.0,
                }),
            }
            while curve
                .front()
                .is_some_and(|first| first.tokens < tokens * HISTORY_SHARE_MIN)
            {
                curve.pop_front();
            }
        }
    }

    /// The newest evaluation, unless a mixture was settled on it already.
    pub(super) fn news(&self) -> Option<StepsCompleted> {
        self.observed.filter(|_| self.observed != self.used)
    }

    /// A mixture was settled on the newest evaluation.
    pub(super) const fn use_up(&mut self) {
        self.used = self.observed;
    }

    /// The law of each domain, or why there is none.
    pub(super) fn fits(&self) -> Vec<Result<PowerLaw, &'static str>> {
        self.curves.iter().map(fit_curve).collect()
    }
}

fn fit_curve(curve: &VecDeque<Observation>) -> Result<PowerLaw, &'static str> {
    let points: Vec<(f64, f64)> = curve
        .iter()
        .map(|place| (place.tokens, place.loss_sum / place.count))
        .collect();
    fit(&points)
}
