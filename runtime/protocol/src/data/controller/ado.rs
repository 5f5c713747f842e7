//! **ado** follows "Adaptive Data Optimization" (arXiv 2410.11820): per domain the law `L = e + b n^-a` is fitted on
//! held-out loss, and the weight follows the fall of loss that a further token promises,
//!
//! `ρ_d ∝ w_d · c_d^½ · a_d (L_d - e_d) / n_d`,
//!
//! with `w` the configured weights and `c` a running average (0.9) of the mixtures decided so far. It departs from that
//! paper's code where that is at fault: `n_d` are the domain's own tokens, not all; small floors are not punished (see
//! `fit`); the old mixture is not averaged in for ever: the step towards the target is limited instead. A domain whose fit
//! is rejected claims nothing.
//!
//! **A new domain** has no curve: it claims nothing until its own fit stands, which takes five evaluations over which its
//! tokens grow by half. Its `w` is the share that it came with, and so is its `c`. **Other text** of a domain begins the
//! curve anew, since a law through two texts is the law of neither; `n` counts on, for the model keeps what it learnt.

use super::curves::Curves;
use super::{Advice, Arrival, Claims, MixtureController, Sight};
use crate::data::signals::Signals;
use tarazed_domain::config::ControllerKind;

/// Decay of the running average of mixtures, per update.
const CREDIT_DECAY: f64 = 0.9;
/// Power of the running average in a domain's claim.
const CREDIT_POWER: f64 = 0.5;

#[derive(Clone, Debug)]
pub(super) struct Ado {
    prior: Vec<f64>,
    curves: Curves,
    credit: Vec<f64>,
}

impl Ado {
    pub(super) fn new(prior: Vec<f64>) -> Self {
        Self {
            curves: Curves::new(prior.len()),
            credit: prior.clone(),
            prior,
        }
    }
}

impl MixtureController for Ado {
    fn kind(&self) -> ControllerKind {
        ControllerKind::Ado
    }

    fn observe(&mut self, signals: &Signals) {
        self.curves.observe(signals);
    }

    fn advise(&mut self, sight: &Sight<'_>) -> Option<Advice> {
        let evaluated = self.curves.news()?;
        let fits = self.curves.fits();
        let domains = fits.iter().zip(&sight.signals.domains);
        let claims = domains.clone().enumerate().map(|(domain, (fit, seen))| {
            let speed = fit.as_ref().ok()?.speed(seen.tokens as f64);
            let claim = self.prior[domain] * libm::pow(self.credit[domain], CREDIT_POWER) * speed;
            (claim.is_finite() && claim > 0.0).then_some(claim)
        });
        let inputs = domains.map(|(fit, seen)| match fit {
            Ok(law) => format!(
                "L={:.4} e={:.3} a={:.3} n={} r2={:.2} ep={:.2}",
                law.loss(seen.tokens as f64),
                law.floor,
                law.exponent,
                seen.tokens,
                law.explained,
                seen.epochs
            ),
            Err(why) => format!("no fit: {why}"),
        });
        Some(Advice::Claims(Claims {
            claims: claims.collect(),
            evidence: format!("held-out at {evaluated}"),
            inputs: inputs.collect(),
        }))
    }

    fn settled(&mut self, weights: &[f64]) {
        self.curves.use_up();
        for (credit, weight) in self.credit.iter_mut().zip(weights) {
            *credit = CREDIT_DECAY * *credit + (1.0 - CREDIT_DECAY) * weight;
        }
    }

    fn arrive(&mut self, arrival: &Arrival) {
        self.curves.arrive(arrival);
        arrival.share(&mut self.prior);
        arrival.share(&mut self.credit);
    }

    fn boxed(&self) -> Box<dyn MixtureController> {
        Box::new(self.clone())
    }
}
