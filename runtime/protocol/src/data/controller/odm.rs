//! **odm** follows "Efficient Online Data Mixing for Language Model Pre-Training" (arXiv 2312.02406, Algorithm 1), an
//! EXP3 bandit (Auer et al. 2002) over `K` domains with the training loss as reward. At the `t`-th update, with `π` the
//! mixture in force,
//!
//! ```text
//! R_d ← 0.9 R_d + 0.1 (L_d / 10) / π_d          ε = min(1/K, √(ln K / (K t)))
//! p_d = (1 - K ε) exp(ε R_d) / Σ exp(ε R) + ε
//! ```
//!
//! `L` is the TSM's smoothed training loss in nats; a tenth of it is of the order of one. An update is a decision point, so
//! `t` counts those.
//!
//! Known faults. The reward is the loss, not its fall: a domain that cannot be learnt (noise) keeps the highest. Dividing
//! by the share corrects for domains that a step may not draw; here every step draws them all, and what is left of the
//! correction pulls towards an even mixture. `ε` falls with `t`, so a late change of difficulty is answered slowly. In a
//! pilot on text of this kind an even mixture did as well.
//!
//! **A new domain**, and a domain with other text, begins with the mean reward of the others: the published algorithm begins
//! all rewards at 0, which prefers nobody there, and would put a late domain last here. It claims something from its first
//! training loss on; `t` counts on, so that all others are not explored anew.

use super::{Advice, Arrival, Claims, MixtureController, Sight};
use crate::data::signals::Signals;
use tarazed_domain::config::ControllerKind;

/// Share of the old reward in the new one.
const REWARD_DECAY: f64 = 0.9;
/// Nats of loss for a reward of one.
const REWARD_NATS: f64 = 10.0;
/// Least share that a reward is divided by: a domain without weight is not worth everything.
const SHARE_MIN: f64 = 1e-3;

#[derive(Clone, Debug)]
pub(super) struct Odm {
    rewards: Vec<f64>,
    updates: u64,
}

impl Odm {
    pub(super) fn new(domain_count: usize) -> Self {
        Self {
            rewards: vec![0.0; domain_count],
            updates: 0,
        }
    }
}

impl MixtureController for Odm {
    fn kind(&self) -> ControllerKind {
        ControllerKind::Odm
    }

    fn observe(&mut self, _: &Signals) {}

    fn advise(&mut self, sight: &Sight<'_>) -> Option<Advice> {
        self.updates += 1;
        let losses: Vec<Option<f64>> = sight.signals.domains.iter().map(|domain| domain.train_loss).collect();
        for ((reward, loss), share) in self.rewards.iter_mut().zip(&losses).zip(sight.current) {
            if let Some(loss) = loss {
                let seen = loss / REWARD_NATS / share.max(SHARE_MIN);
                *reward = REWARD_DECAY * *reward + (1.0 - REWARD_DECAY) * seen;
            }
        }
        let count = losses.iter().flatten().count() as f64;
        let exploration = (1.0 / count).min(libm::sqrt(libm::log(count) / (count * self.updates as f64)));
        // The largest exponent is taken off all: none overflows, and the shares are the same.
        let known = self.rewards.iter().zip(&losses).filter(|(_, loss)| loss.is_some());
        let largest = known.map(|(reward, _)| *reward).fold(f64::NEG_INFINITY, f64::max);
        let powers: Vec<Option<f64>> = self
            .rewards
            .iter()
            .zip(&losses)
            .map(|(reward, loss)| loss.map(|_| libm::exp(exploration * (reward - largest))))
            .collect();
        let sum: f64 = powers.iter().flatten().sum();
        let claims = powers
            .iter()
            .map(|power| power.map(|power| (1.0 - count * exploration) * power / sum + exploration))
            .map(|claim| claim.filter(|claim| claim.is_finite() && *claim > 0.0));
        let inputs = losses.iter().zip(&self.rewards).map(|(loss, reward)| match loss {
            Some(loss) => format!("L={loss:.4} R={reward:.4}"),
            None => "no training loss yet".to_owned(),
        });
        Some(Advice::Claims(Claims {
            claims: claims.collect(),
            evidence: format!("update {} eps={exploration:.4}", self.updates),
            inputs: inputs.collect(),
        }))
    }

    fn arrive(&mut self, arrival: &Arrival) {
        let is_replaced = |domain: usize| arrival.replaced.iter().any(|text| text.domain == domain);
        let others = || (0..self.rewards.len()).filter(|domain| !is_replaced(*domain));
        let mean = others().map(|domain| self.rewards[domain]).sum::<f64>() / (others().count() as f64).max(1.0);
        for text in &arrival.replaced {
            self.rewards[text.domain] = mean;
        }
        self.rewards.resize(arrival.before + arrival.new.len(), mean);
    }

    fn boxed(&self) -> Box<dyn MixtureController> {
        Box::new(self.clone())
    }
}
