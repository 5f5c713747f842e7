//! **excess** follows the domain update of DoReMi (arXiv 2305.10429, Algorithm 1), itself Group DRO (arXiv 1911.08731):
//! weights grow exponentially with how far a domain's loss lies above a reference,
//!
//! `α_d ∝ π_d exp(η · max(L_d - r_d, 0))`, `η = 1`,
//!
//! with `L` the held-out loss in nats and `π` the mixture in force. DoReMi takes `r` from a reference model and runs on a
//! small proxy beforehand; here `mixture.reference` gives the reference run's losses, and a domain that it leaves out is
//! measured against the floor of its own fitted law (what more data cannot take away), so the update runs on the model
//! itself.
//!
//! Known faults. Without a reference run it trusts the fitted floor, which is the least certain number of a fit. Excess is
//! not progress: a domain that is far from its floor and falls slowly gains weight all the same. It minimises the worst
//! domain, not the mean. DoReMi's smoothing by an even mixture is left to the guards' floor.
//!
//! **A new domain** is measured as any other: against the reference that the config gives for its name, or else against the
//! floor of its own law, and without either it claims nothing. So a reference run need not know what comes later. **Other
//! text** of a domain begins its curve anew, and leaves its reference, which is a loss over held-out text that stays.

use super::curves::Curves;
use super::{Advice, Arrival, Claims, MixtureController, Sight};
use crate::data::signals::Signals;
use tarazed_domain::config::ControllerKind;

/// Growth of a weight's logarithm per nat of excess and update.
const RATE: f64 = 1.0;

#[derive(Clone, Debug)]
pub(super) struct Excess {
    reference: Vec<Option<f64>>,
    curves: Curves,
}

impl Excess {
    /// `reference`: losses of a reference run in nats, in domain order, where they are known.
    pub(super) fn new(reference: Vec<Option<f64>>) -> Self {
        Self {
            curves: Curves::new(reference.len()),
            reference,
        }
    }
}

impl MixtureController for Excess {
    fn kind(&self) -> ControllerKind {
        ControllerKind::Excess
    }

    fn observe(&mut self, signals: &Signals) {
        self.curves.observe(signals);
    }

    fn advise(&mut self, sight: &Sight<'_>) -> Option<Advice> {
        let evaluated = self.curves.news()?;
        let fits = self.curves.fits();
        let mut claims = Vec::with_capacity(fits.len());
        let mut inputs = Vec::with_capacity(fits.len());
        for (domain, (fit, seen)) in fits.iter().zip(&sight.signals.domains).enumerate() {
            let reference = self.reference[domain].map_or_else(|| fit.as_ref().map(|law| law.floor), Ok);
            let loss = seen
                .heldout_loss
                .filter(|loss| loss.is_finite())
                .ok_or("no held-out loss");
            let (claim, input) = match (loss, reference) {
                (Ok(loss), Ok(reference)) => {
                    let excess = (loss - reference).max(0.0);
                    let claim = sight.current[domain] * libm::exp(RATE * excess);
                    (Some(claim), format!("L={loss:.4} r={reference:.4} x={excess:.4}"))
                }
                (Err(why), _) => (None, why.to_owned()),
                (_, Err(why)) => (None, format!("no fit: {why}")),
            };
            claims.push(claim.filter(|claim| claim.is_finite() && *claim > 0.0));
            inputs.push(input);
        }
        Some(Advice::Claims(Claims {
            claims,
            evidence: format!("held-out at {evaluated}"),
            inputs,
        }))
    }

    fn settled(&mut self, _: &[f64]) {
        self.curves.use_up();
    }

    fn arrive(&mut self, arrival: &Arrival) {
        self.curves.arrive(arrival);
        self.reference.extend(arrival.new.iter().map(|text| text.reference));
    }

    fn boxed(&self) -> Box<dyn MixtureController> {
        Box::new(self.clone())
    }
}
