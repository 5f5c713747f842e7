//! What the decisions so far have in force, by step.
//!
//! One machine for all who ask: the ledger lets it judge every decision, the cursor plans by it, the controller sees by
//! it what it decides on. It is a function of the configured mixture and of the decisions in their order (DATA-2).
//!
//! - **LOOP-2** A veto is a decision like any other. It acts from its own effective step on: a decision that has not acted
//!   by then never does; one that has is followed by what was in force before it.
//! - **DATA-2** A change of the data holds from its step on and cannot be taken back; it sets the mixture of that step, and
//!   whatever is decided for a step speaks of the domains that this step can train on. Where a change states shares of its
//!   new domains alone, the others have the rest in the proportions in force before it, whatever is decided for those steps
//!   after it.
//! - A domain at its epoch limit has no weight from its step on, whatever mixture is decided for those steps: what is decided
//!   stays as it is, and counts again where a veto or other text frees the domain. Where all with a weight are at theirs, none
//!   is held back.
//! - What contradicts is refused with the reason, never resolved in silence: two settings of one kind for one step, a veto
//!   of what cannot be undone any more, a pin of what is pinned.

use super::decision::{DataChange, Decision, DecisionId, DecisionKind, DomainEdition, SpikeBounds, check_weights};
use super::permutation::SEQUENCES_MAX;
use super::stats::LossSum;
use crate::rollback::{Rollback, Rollbacks};
use std::collections::BTreeSet;
use tarazed_domain::config::Language;
use tarazed_domain::limits::DOMAINS_MAX;
use tarazed_domain::{StepIndex, StepsCompleted};

/// Largest factor of a learning-rate decision, and one over the smallest.
pub const LEARNING_RATE_FACTOR_MAX: f64 = 100.0;

/// A value from a step on.
#[derive(Clone, PartialEq, Debug)]
struct Setting<T> {
    from: StepIndex,
    /// None for what the config says, and for what a veto brought back.
    by: Option<DecisionId>,
    /// First step of the setting that a veto brought back.
    repeats: Option<StepIndex>,
    value: T,
}

/// Values of one kind, by first step; the first one holds from step 0.
#[derive(Clone, PartialEq, Debug)]
struct Settings<T>(Vec<Setting<T>>);

impl<T: Clone> Settings<T> {
    fn new(value: T) -> Self {
        Self(vec![Setting {
            from: StepIndex(0),
            by: None,
            repeats: None,
            value,
        }])
    }

    fn at(&self, step: StepIndex) -> &Setting<T> {
        let after = self.0.partition_point(|setting| setting.from <= step);
        &self.0[after - 1]
    }

    fn holder(&self, from: StepIndex) -> Option<Option<DecisionId>> {
        let found = self.0.iter().find(|setting| setting.from == from);
        found.map(|setting| setting.by)
    }

    fn set(&mut self, decision: &Decision, value: T) -> Result<(), String> {
        let from = decision.effective;
        match self.holder(from) {
            Some(Some(other)) => {
                return Err(format!(
                    "it contradicts decision {other}, which sets the mixture, rate or bounds of the same step {from}"
                ));
            }
            Some(None) => {
                return Err(format!("what is in force at step {from} is set already"));
            }
            None => {}
        }
        let at = self.0.partition_point(|setting| setting.from <= from);
        let setting = Setting {
            from,
            by: Some(decision.id),
            repeats: None,
            value,
        };
        self.0.insert(at, setting);
        Ok(())
    }

    /// Takes back a decision from `from` on; says whether it is one of these.
    fn veto(&mut self, decision: DecisionId, from: StepIndex) -> Option<Result<(), String>> {
        let position = self.0.iter().position(|setting| setting.by == Some(decision))?;
        if self.0[position].from >= from {
            self.0.remove(position);
            return Some(Ok(()));
        }
        let next = self.0.get(position + 1);
        if next.is_some_and(|next| next.from <= from) {
            return Some(Err(format!(
                "decision {decision} is not in force any more at step {from}"
            )));
        }
        // The first setting is the config's, so there is one before any decision's.
        let before = &self.0[position - 1];
        let back = Setting {
            from,
            by: None,
            repeats: before.repeats.or(Some(before.from)),
            value: before.value.clone(),
        };
        self.0.insert(position + 1, back);
        Some(Ok(()))
    }
}

/// What a step must know besides its samples.
#[derive(Clone, PartialEq, Debug)]
pub struct Directives {
    /// Factor of the configured learning rate.
    pub rate_factor: f64,
    /// The first step of a decay that was decided.
    pub decay_from: Option<StepIndex>,
    /// Beyond these bounds its update is left out.
    pub bounds: Option<SpikeBounds>,
    /// It starts from the state after so many steps, not from that of the step before.
    pub rollback_to: Option<StepsCompleted>,
}

impl Default for Directives {
    fn default() -> Self {
        Self {
            rate_factor: 1.0,
            decay_from: None,
            bounds: None,
            rollback_to: None,
        }
    }
}

impl Directives {
    /// Whether the update of a step is left out: its loss, less what was expected of its domains, or its gradient norm is
    /// beyond the bounds. `losses` are the step's training losses, in domain order.
    #[must_use]
    pub fn skips(&self, losses: &[LossSum], grad_norm: f64) -> bool {
        let Some(bounds) = &self.bounds else { return false };
        let (mut residual, mut tokens) = (0.0, 0.0);
        for (seen, expected) in losses.iter().zip(&bounds.expected) {
            if let (Some(loss), Some(expected)) = (seen.mean(), expected) {
                residual += seen.tokens as f64 * (loss - expected);
            }
            tokens += seen.tokens as f64;
        }
        grad_norm > bounds.grad_norm || tokens > 0.0 && residual / tokens > bounds.residual_loss
    }
}

/// A change of the data that is decided.
#[derive(Clone, PartialEq, Debug)]
struct Arrival {
    from: StepIndex,
    by: DecisionId,
    /// Domains that can be trained on from then on.
    domain_count: usize,
    /// Those whose text it replaces.
    replaced: Vec<usize>,
    /// Shares of the new ones, where it states nothing of the others.
    shares: Option<Vec<f64>>,
}

/// A domain at its epoch limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Limit {
    domain: usize,
    from: StepIndex,
    by: DecisionId,
    /// The first step for which a veto or other text frees it.
    until: Option<StepIndex>,
}

/// A rollback that is decided.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Back {
    what: Rollback,
    by: DecisionId,
    is_persons: bool,
}

/// A rollback that is announced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Notice {
    /// What is to happen.
    pub what: Rollback,
    /// The decision that announces it.
    pub by: DecisionId,
    /// It is decided by now, or another in its place.
    is_settled: bool,
}

/// Everything in force, by step.
#[derive(Clone, PartialEq, Debug)]
pub struct Course {
    domain_count: usize,
    arrivals: Vec<Arrival>,
    limits: Vec<Limit>,
    mixtures: Settings<Vec<f64>>,
    rates: Settings<f64>,
    /// With the line that they were decided on.
    bounds: Settings<Option<(StepsCompleted, SpikeBounds)>>,
    decay: Option<(StepIndex, DecisionId)>,
    stop: Option<(StepIndex, DecisionId)>,
    rollbacks: Vec<Back>,
    /// The newest that is not vetoed.
    notice: Option<Notice>,
    pinned: bool,
    vetoed: BTreeSet<DecisionId>,
}

impl Course {
    /// What the config says, and no decision.
    #[must_use]
    pub fn new(weights: Vec<f64>) -> Self {
        Self {
            domain_count: weights.len(),
            arrivals: Vec::new(),
            limits: Vec::new(),
            mixtures: Settings::new(weights),
            rates: Settings::new(1.0),
            bounds: Settings::new(None),
            decay: None,
            stop: None,
            rollbacks: Vec::new(),
            notice: None,
            pinned: false,
            vetoed: BTreeSet::new(),
        }
    }

    /// Takes a decision over.
    ///
    /// # Errors
    /// Why it cannot stand beside those before it; nothing is changed then.
    pub fn adopt(&mut self, decision: &Decision) -> Result<(), String> {
        match &decision.kind {
            DecisionKind::Mixture { weights } => {
                check_weights(weights, self.domains_at(decision.effective))?;
                self.mixtures.set(decision, weights.clone())?;
                self.share_again();
                Ok(())
            }
            DecisionKind::Advice { weights } => check_weights(weights, self.domains_at(decision.effective)),
            DecisionKind::Data(change) => self.arrive(decision, change),
            DecisionKind::EpochLimit { domain } => self.limit(decision, usize::from(*domain)),
            DecisionKind::Pin if self.pinned => Err("the mixture is pinned already".into()),
            DecisionKind::Pin => {
                self.pinned = true;
                Ok(())
            }
            DecisionKind::Release if !self.pinned => Err("the mixture is not pinned".into()),
            DecisionKind::Release => {
                self.pinned = false;
                Ok(())
            }
            DecisionKind::Veto { decision: which } => self.veto(*which, decision.effective),
            DecisionKind::LearningRate { factor } => {
                let range = 1.0 / LEARNING_RATE_FACTOR_MAX..=LEARNING_RATE_FACTOR_MAX;
                if !range.contains(factor) {
                    return Err(format!(
                        "the factor {factor} is not in {}..={}",
                        range.start(),
                        range.end()
                    ));
                }
                self.rates.set(decision, *factor)
            }
            DecisionKind::SpikeBounds(bounds) => {
                Self::check_bounds(bounds, self.domains_at(decision.effective))?;
                self.bounds.set(decision, Some((decision.line, bounds.clone())))
            }
            DecisionKind::Decay => once(&mut self.decay, decision, "the decay begins"),
            DecisionKind::Stop => once(&mut self.stop, decision, "the run stops"),
            DecisionKind::Rollback { to, discarded } => {
                self.check_discarded(decision, discarded.len())?;
                self.check_rollback(decision, *to)?;
                self.rollbacks.push(Back {
                    what: rollback(decision, *to),
                    by: decision.id,
                    is_persons: decision.by.is_person(),
                });
                if let Some(notice) = &mut self.notice {
                    notice.is_settled = true;
                }
                Ok(())
            }
            DecisionKind::RollbackNotice { to } => {
                self.check_rollback(decision, *to)?;
                if let Some(other) = self.notice() {
                    return Err(format!("decision {} announces a rollback already", other.by));
                }
                self.notice = Some(Notice {
                    what: rollback(decision, *to),
                    by: decision.id,
                    is_settled: false,
                });
                Ok(())
            }
        }
    }

    fn arrive(&mut self, decision: &Decision, change: &DataChange) -> Result<(), String> {
        let from = decision.effective;
        // What is decided for a later step speaks of the domains as they were.
        if let Some(later) = self
            .mixtures
            .0
            .last()
            .filter(|last| last.from >= from && last.from.0 > 0)
        {
            return Err(format!(
                "the mixture of step {} is decided already, and the data cannot change before it",
                later.from
            ));
        }
        if let Some(back) = self.rollbacks.last().filter(|back| back.what.at >= from) {
            return Err(format!(
                "training goes back at step {}, and the data cannot change before the step behind it any more",
                back.what.at
            ));
        }
        let before = self.domain_count();
        let (domain_count, replaced) = check_editions(change, before)?;
        let shares = change.shares(domain_count - before);
        let weights = match shares {
            Some(shares) => {
                check_shares(shares)?;
                with_shares(self.mixture(from), shares)
            }
            None => {
                check_weights(&change.weights, domain_count)?;
                change.weights.clone()
            }
        };
        let shares = shares.map(<[f64]>::to_vec);
        self.mixtures.set(decision, weights)?;
        let frees =
            |limit: &&mut Limit| replaced.contains(&limit.domain) && limit.until.is_none_or(|until| until > from);
        for limit in self.limits.iter_mut().filter(frees) {
            limit.until = Some(from);
        }
        self.arrivals.push(Arrival {
            from,
            by: decision.id,
            domain_count,
            replaced,
            shares,
        });
        Ok(())
    }

    fn limit(&mut self, decision: &Decision, domain: usize) -> Result<(), String> {
        let from = decision.effective;
        let there = self.domains_at(from);
        if domain >= there {
            return Err(format!("it limits domain {domain}, and there are {there}"));
        }
        if self.is_limited(domain, from) {
            return Err(format!("domain {domain} is at its epoch limit already"));
        }
        let frees = |arrival: &&Arrival| arrival.from > from && arrival.replaced.contains(&domain);
        self.limits.push(Limit {
            domain,
            from,
            by: decision.id,
            until: self.arrivals.iter().find(frees).map(|arrival| arrival.from),
        });
        Ok(())
    }

    /// Mixtures that changes of the data share out, from those that came to be in force before them.
    fn share_again(&mut self) {
        let settings = &mut self.mixtures.0;
        for arrival in &self.arrivals {
            let Some(shares) = &arrival.shares else { continue };
            let Some(at) = settings.iter().position(|setting| setting.by == Some(arrival.by)) else {
                continue; // each has one, for ever
            };
            let shared = with_shares(&settings[at - 1].value, shares);
            let repeat = |setting: &&mut Setting<Vec<f64>>| setting.repeats == Some(arrival.from);
            for again in settings.iter_mut().filter(repeat) {
                again.value.clone_from(&shared);
            }
            settings[at].value = shared;
        }
    }

    fn check_bounds(bounds: &SpikeBounds, domains: usize) -> Result<(), String> {
        if bounds.expected.len() != domains {
            return Err(format!(
                "it expects something of {} domains, and there are {domains}",
                bounds.expected.len(),
            ));
        }
        let mut numbers = bounds
            .expected
            .iter()
            .flatten()
            .chain([&bounds.residual_loss, &bounds.grad_norm]);
        match numbers.find(|number| !number.is_finite()) {
            Some(number) => Err(format!("{number} is no bound")),
            None => Ok(()),
        }
    }

    fn check_discarded(&self, decision: &Decision, domains: usize) -> Result<(), String> {
        let there = self.domains_at(decision.effective);
        if domains != there {
            return Err(format!(
                "it discards samples of {domains} domains, and there are {there}"
            ));
        }
        Ok(())
    }

    fn check_rollback(&self, decision: &Decision, to: StepsCompleted) -> Result<(), String> {
        if to >= decision.line {
            return Err(format!(
                "it goes back to {to} steps, which is not before line {}",
                decision.line
            ));
        }
        match self.rollbacks.last() {
            Some(other) if other.what.at >= decision.effective => {
                Err(format!("training goes back at step {} already", other.what.at))
            }
            _ if !self.rollbacks().is_live(to) => Err(format!(
                "it goes back to the state after {to} steps, which an earlier rollback has left behind"
            )),
            _ => Ok(()),
        }
    }

    fn veto(&mut self, which: DecisionId, from: StepIndex) -> Result<(), String> {
        if self.vetoed.contains(&which) {
            return Err(format!("decision {which} is vetoed already"));
        }
        if self.arrivals.iter().any(|arrival| arrival.by == which) {
            return Err(format!(
                "decision {which} changes the data, which cannot be taken back; force a mixture without them instead"
            ));
        }
        let settled = self
            .mixtures
            .veto(which, from)
            .or_else(|| self.rates.veto(which, from))
            .or_else(|| self.bounds.veto(which, from))
            .or_else(|| retract(&mut self.decay, which, from))
            .or_else(|| retract(&mut self.stop, which, from))
            .or_else(|| self.veto_limit(which, from))
            .or_else(|| self.veto_rollback(which, from))
            .or_else(|| self.veto_notice(which, from));
        settled.ok_or_else(|| format!("decision {which} is none that sets anything"))??;
        self.share_again();
        self.vetoed.insert(which);
        Ok(())
    }

    fn veto_limit(&mut self, which: DecisionId, from: StepIndex) -> Option<Result<(), String>> {
        let limit = self.limits.iter_mut().find(|limit| limit.by == which)?;
        if limit.until.is_some_and(|until| until <= from) {
            return Some(Err(format!("decision {which} is not in force any more at step {from}")));
        }
        limit.until = Some(from.max(limit.from));
        Some(Ok(()))
    }

    fn veto_rollback(&mut self, which: DecisionId, from: StepIndex) -> Option<Result<(), String>> {
        let position = self.rollbacks.iter().position(|back| back.by == which)?;
        let at = self.rollbacks[position].what.at;
        if at < from {
            return Some(Err(too_late(which, at, from)));
        }
        self.rollbacks.remove(position);
        Some(Ok(()))
    }

    fn veto_notice(&mut self, which: DecisionId, from: StepIndex) -> Option<Result<(), String>> {
        let notice = self.notice.filter(|notice| notice.by == which)?;
        let at = notice.what.at;
        if notice.is_settled {
            return Some(Err(format!(
                "the rollback that decision {which} announced for step {at} is decided, or another in its place"
            )));
        }
        if at < from {
            return Some(Err(too_late(which, at, from)));
        }
        self.notice = None;
        Some(Ok(()))
    }

    /// Domains that a step can train on.
    #[must_use]
    pub fn domains_at(&self, step: StepIndex) -> usize {
        let after = self.arrivals.partition_point(|arrival| arrival.from <= step);
        let newest = after.checked_sub(1).map(|newest| self.arrivals[newest].domain_count);
        newest.unwrap_or(self.domain_count)
    }

    /// Domains by all that is decided.
    #[must_use]
    pub fn domain_count(&self) -> usize {
        self.arrivals
            .last()
            .map_or(self.domain_count, |newest| newest.domain_count)
    }

    /// Spike bounds of a step. They expect nothing of text that was not there yet when they were decided.
    fn bounds_at(&self, step: StepIndex) -> Option<SpikeBounds> {
        let (line, mut bounds) = self.bounds.at(step).value.clone()?;
        bounds.expected.resize(self.domains_at(step), None);
        // The newest step that a line knows of is the one before its number.
        let unseen = |arrival: &&Arrival| arrival.from <= step && line.0 <= arrival.from.0;
        for arrival in self.arrivals.iter().filter(unseen) {
            arrival
                .replaced
                .iter()
                .for_each(|domain| bounds.expected[*domain] = None);
        }
        Some(bounds)
    }

    /// Whether nothing is to be drawn of a domain at a step, since it is at its epoch limit.
    #[must_use]
    pub fn is_limited(&self, domain: usize, step: StepIndex) -> bool {
        let holds = |limit: &Limit| limit.from <= step && limit.until.is_none_or(|until| step < until);
        self.limits.iter().any(|limit| limit.domain == domain && holds(limit))
    }

    /// Whether it was decided that a domain comes to its epoch limit, of the text that it has at a step; vetoed or not.
    #[must_use]
    pub fn has_limit(&self, domain: usize, step: StepIndex) -> bool {
        let begins = |arrival: &&Arrival| arrival.from <= step && arrival.replaced.contains(&domain);
        let newest = self.arrivals.iter().rfind(begins);
        let since = newest.map_or(StepIndex(0), |newest| newest.from);
        self.limits
            .iter()
            .any(|limit| limit.domain == domain && limit.from >= since)
    }

    /// The mixture in force at a step, not normalised: what is decided, without the domains at their limit.
    #[must_use]
    pub fn in_force(&self, step: StepIndex) -> Vec<f64> {
        let decided = self.mixture(step);
        let kept = |(domain, weight): (usize, &f64)| if self.is_limited(domain, step) { 0.0 } else { *weight };
        let limited: Vec<f64> = decided.iter().enumerate().map(kept).collect();
        if limited.iter().any(|weight| *weight > 0.0) {
            limited
        } else {
            decided.to_vec()
        }
    }

    /// All that is in force by first step, as far as it is decided; some may be as the one before.
    #[must_use]
    pub fn segments(&self) -> Vec<(StepIndex, Vec<f64>)> {
        let mut froms: BTreeSet<StepIndex> = self.mixtures().map(|(from, _)| from).collect();
        froms.extend(self.limits.iter().map(|limit| limit.from));
        froms.extend(self.limits.iter().filter_map(|limit| limit.until));
        froms.into_iter().map(|from| (from, self.in_force(from))).collect()
    }

    /// The mixture decided for a step, not normalised, whether or not a domain is at its limit; in domain order.
    #[must_use]
    pub fn mixture(&self, step: StepIndex) -> &[f64] {
        &self.mixtures.at(step).value
    }

    /// All mixtures by first step, as far as they are decided, limits aside.
    pub fn mixtures(&self) -> impl ExactSizeIterator<Item = (StepIndex, &[f64])> {
        self.mixtures
            .0
            .iter()
            .map(|setting| (setting.from, setting.value.as_slice()))
    }

    /// Whether something sets the mixture of just this step.
    #[must_use]
    pub fn sets_mixture(&self, step: StepIndex) -> bool {
        self.mixtures.holder(step).is_some()
    }

    /// Whether the controller is to decide nothing.
    #[must_use]
    pub const fn is_pinned(&self) -> bool {
        self.pinned
    }

    /// The first step that is not run any more.
    #[must_use]
    pub fn stop(&self) -> Option<StepIndex> {
        self.stop.map(|(step, _)| step)
    }

    /// The first step of a decay that was decided.
    #[must_use]
    pub fn decay(&self) -> Option<StepIndex> {
        self.decay.map(|(step, _)| step)
    }

    /// All rollbacks, those that have not acted yet, too.
    #[must_use]
    pub fn rollbacks(&self) -> Rollbacks {
        self.rollbacks.iter().map(|back| back.what).collect()
    }

    /// How many of them the run itself decided.
    #[must_use]
    pub fn rollbacks_of_its_own(&self) -> usize {
        self.rollbacks.iter().filter(|back| !back.is_persons).count()
    }

    /// A rollback that is announced: neither vetoed nor decided, and no other decided since.
    #[must_use]
    pub fn notice(&self) -> Option<Notice> {
        self.notice.filter(|notice| !notice.is_settled)
    }

    /// What a step must know.
    #[must_use]
    pub fn directives(&self, step: StepIndex) -> Directives {
        Directives {
            rate_factor: self.rates.at(step).value,
            decay_from: self.decay(),
            bounds: self.bounds_at(step),
            rollback_to: self
                .rollbacks()
                .acting_at(StepsCompleted(step.0))
                .map(|rollback| rollback.to),
        }
    }
}

/// Whether a change of the data fits a run of so many domains: how many there are then, and which are replaced.
fn check_editions(change: &DataChange, before: usize) -> Result<(usize, Vec<usize>), String> {
    if !change.names_hash() {
        return Err(format!("'{}' is no version of a data set", change.version));
    }
    if change.domains.is_empty() {
        return Err("it brings no domain".into());
    }
    let (mut domain_count, mut replaced) = (before, Vec::new());
    for edition in &change.domains {
        let at = usize::from(edition.domain);
        if at < before && !replaced.contains(&at) {
            replaced.push(at);
        } else if at == domain_count && at < DOMAINS_MAX {
            domain_count += 1;
        } else {
            return Err(format!(
                "'{}' cannot be domain {at} of {domain_count}, of at most {DOMAINS_MAX}",
                edition.name
            ));
        }
        check_edition(edition)?;
    }
    Ok((domain_count, replaced))
}

/// Shares leave something to the domains that were there: they could not be divided up otherwise.
pub(super) fn check_shares(shares: &[f64]) -> Result<(), String> {
    if let Some(share) = shares.iter().find(|share| !(share.is_finite() && **share > 0.0)) {
        return Err(format!("{share} is no share of a new domain"));
    }
    let sum: f64 = shares.iter().sum();
    if sum >= 1.0 {
        return Err(format!(
            "new domains with shares of {sum} in all leave nothing to the others"
        ));
    }
    Ok(())
}

/// The mixture of these domains and of new ones with these shares: the others have the rest, in their proportions.
pub(super) fn with_shares(before: &[f64], shares: &[f64]) -> Vec<f64> {
    let sum: f64 = before.iter().sum();
    let rest = 1.0 - shares.iter().sum::<f64>();
    let others = before.iter().map(|weight| weight / sum * rest);
    others.chain(shares.iter().copied()).collect()
}

fn check_edition(edition: &DomainEdition) -> Result<(), String> {
    let name = &edition.name;
    if name.is_empty() {
        return Err("a domain without a name".into());
    }
    if Language::from_name(&edition.language).is_none() {
        return Err(format!("'{}' of '{name}' is no language", edition.language));
    }
    if !(1..=SEQUENCES_MAX).contains(&edition.train_sequences) {
        return Err(format!(
            "'{name}' has {} training sequences, not 1..=2^40",
            edition.train_sequences
        ));
    }
    Ok(())
}

const fn rollback(decision: &Decision, to: StepsCompleted) -> Rollback {
    Rollback {
        at: decision.effective,
        to,
    }
}

/// Of what happens once in a run.
fn once(slot: &mut Option<(StepIndex, DecisionId)>, decision: &Decision, what: &str) -> Result<(), String> {
    if let Some((step, other)) = slot {
        return Err(format!("by decision {other}, {what} at step {step} already"));
    }
    *slot = Some((decision.effective, decision.id));
    Ok(())
}

fn retract(
    slot: &mut Option<(StepIndex, DecisionId)>,
    which: DecisionId,
    from: StepIndex,
) -> Option<Result<(), String>> {
    let (at, _) = (*slot).filter(|(_, id)| *id == which)?;
    if at < from {
        return Some(Err(too_late(which, at, from)));
    }
    *slot = None;
    Some(Ok(()))
}

fn too_late(which: DecisionId, at: StepIndex, from: StepIndex) -> String {
    format!("decision {which} acts at step {at}, and a veto of now from step {from} on")
}
