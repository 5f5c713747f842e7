//! ATE: signals, turned into decisions on the mixture.
//!
//! A decision is made on a decision point's line from nothing but the lines so far and the config (LOOP-1); it acts
//! `mixture.lag_steps` later. [`Ate::on_line`] returns *all* decisions of the line, those of persons included (LOOP-2);
//! what it returns is what the line must hold, live or replayed, and [`Ate::replay`] checks just that.
//!
//! **ado** follows "Adaptive Data Optimization" (arXiv 2410.11820): per domain the law `L = e + b n^-a` is fitted on
//! held-out loss, and the weight follows the fall of loss that a further token promises,
//!
//! `ρ_d ∝ w_d · c_d^½ · a_d (L_d - e_d) / n_d`,
//!
//! with `w` the configured weights and `c` a running average (0.9) of the mixtures decided so far. It departs from that
//! paper's code where that is at fault: `n_d` are the domain's own tokens, not all; small floors are not punished (see
//! `fit`); the old mixture is not averaged in for ever: the step towards the target is limited instead.
//!
//! Guards, each in force at every update:
//! - the target is drawn to the configured mixture: `¾ ρ + ¼ w`;
//! - no weight below `max(0.01, 1/(5K))` for `K` domains (at most half of an even share);
//! - no `ln p` changes by more than 0.2;
//! - no domain is promised more than four epochs (arXiv 2305.16264 finds further repeats nearly worthless) when the
//!   run doubles its tokens; a domain near that falls below the floor, down to 0.001;
//! - nothing is decided within 64 lines of a spike, nor before a new evaluation;
//! - a domain whose fit is rejected keeps its weight; with fewer than two good fits nothing is decided.
//!
//! The inputs stand in `reason`. The run's length is no input: raising `run.steps` must not change the past.

use super::DomainFacts;
use super::decision::{Decision, DecisionAuthor, DecisionId, DecisionKind, DecisionSchedule, check_weights};
use super::fit::{PowerLaw, fit};
use super::projection::{project, round};
use super::signals::Signals;
use crate::trace::TraceLine;
use std::collections::VecDeque;
use std::fmt::Write as _;
use tarazed_domain::config::{ControllerKind, MixtureConfig};
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
/// Decay of the running average of mixtures, per update.
const CREDIT_DECAY: f64 = 0.9;
/// Power of the running average in a domain's claim.
const CREDIT_POWER: f64 = 0.5;
/// Changes of all weights below this are not worth a decision.
const CHANGE_MIN: f64 = 1e-4;
/// Evaluations older than this share of a domain's tokens are forgotten: early transients are no scaling law.
const HISTORY_SHARE_MIN: f64 = 1.0 / 16.0;
/// Evaluations within this ratio of tokens count as one place on the curve, their losses averaged.
const HISTORY_RATIO: f64 = 1.02;
/// Domains named one by one in a reason.
const REASON_DOMAINS_MAX: usize = 16;

/// Least weight of one of `domain_count` domains.
#[must_use]
pub fn weight_floor(domain_count: usize) -> f64 {
    let count = domain_count.max(1) as f64;
    (1.0 / (5.0 * count)).max(0.01).min(1.0 / (2.0 * count))
}

/// What a person asks for; it becomes a decision in the next decision point's line.
#[derive(Clone, PartialEq, Debug)]
pub struct Request {
    /// Who asks.
    pub person: String,
    /// For what.
    pub kind: DecisionKind,
    /// From which step on, at the earliest; none for as soon as possible.
    pub not_before: Option<StepIndex>,
    /// Why.
    pub reason: String,
}

/// A refused request: tell the person, change nothing.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the request is refused: {0}")]
pub struct RequestError(pub String);

/// A replayed line holds other decisions than its trace leads to. Halt: LOOP-1 is broken, or the file was edited.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
#[error(
    "line {line} holds {found:?} where the trace leads to {expected:?}; the binary, the config or the trace was changed"
)]
pub struct ReplayMismatch {
    /// The line.
    pub line: StepsCompleted,
    /// The decisions that follow from the trace.
    pub expected: Vec<Decision>,
    /// The decisions in the line.
    pub found: Vec<Decision>,
}

/// The Adaptive Training Engine's mixture loop as a pure machine.
#[derive(Clone, Debug)]
pub struct Ate {
    schedule: DecisionSchedule,
    controller: MixtureController,
    domain_count: usize,
    next_id: u64,
    /// Mixtures decided, by effective step; the first is the configured one.
    mixtures: Vec<(StepIndex, Vec<f64>)>,
    pinned: bool,
    requests: VecDeque<Request>,
}

/// Who proposes mixtures.
#[derive(Clone, Debug)]
enum MixtureController {
    Static,
    Ado(Ado),
}

impl Ate {
    /// An engine that has seen nothing.
    ///
    /// # Panics
    /// If the configured weights are no mixture: the config refuses that before.
    #[must_use]
    pub fn new(config: &MixtureConfig, facts: &[DomainFacts]) -> Self {
        let weights: Vec<f64> = facts.iter().map(|fact| fact.weight).collect();
        let checked = check_weights(&weights, facts.len());
        assert!(checked.is_ok(), "configured weights: {checked:?}");
        let prior = normalised(&weights);
        Self {
            schedule: DecisionSchedule::new(config),
            controller: match config.controller {
                ControllerKind::Static => MixtureController::Static,
                ControllerKind::Ado => MixtureController::Ado(Ado::new(facts, prior.clone())),
            },
            domain_count: facts.len(),
            next_id: 1,
            mixtures: vec![(StepIndex(0), prior)],
            pinned: false,
            requests: VecDeque::new(),
        }
    }

    /// Takes in the next line and its signals; returns all decisions that this line must hold. Decisions of persons
    /// already in the line are kept, waiting requests join them, the controller's own are computed.
    pub fn on_line(&mut self, line: &TraceLine, signals: &Signals) -> Vec<Decision> {
        let mut persons = persons_in(line);
        if self.schedule.is_point(line.step) {
            let first_id = persons.last().map_or(self.next_id, |last| last.id.0 + 1);
            let requests = std::mem::take(&mut self.requests);
            let granted = (first_id..)
                .zip(requests)
                .map(|(id, request)| self.grant(line.step, DecisionId(id), request));
            persons.extend(granted);
        }
        self.decide(line, signals, persons)
    }

    /// Takes in a line that is committed, decisions and all, and checks that it holds what the trace leads to.
    ///
    /// # Errors
    /// A [`ReplayMismatch`].
    pub fn replay(&mut self, line: &TraceLine, signals: &Signals) -> Result<(), ReplayMismatch> {
        let expected = self.decide(line, signals, persons_in(line));
        if expected == line.decisions {
            return Ok(());
        }
        Err(ReplayMismatch {
            line: line.step,
            expected,
            found: line.decisions.clone(),
        })
    }

    /// Lines up a person's request for the next decision point (LOOP-2).
    ///
    /// # Errors
    /// A [`RequestError`] saying why it cannot be granted.
    pub fn request(&mut self, request: Request) -> Result<(), RequestError> {
        if self.schedule.next_point(StepsCompleted(0)).is_none() {
            return Err(RequestError(
                "a static mixture has no decision points; set mixture.controller to one that decides".into(),
            ));
        }
        if let DecisionKind::Mixture { weights } = &request.kind {
            check_weights(weights, self.domain_count).map_err(RequestError)?;
        }
        self.requests.push_back(request);
        Ok(())
    }

    /// The mixture that will be in force at `step` by what is decided so far, normalised, in domain order.
    #[must_use]
    pub fn mixture(&self, step: StepIndex) -> &[f64] {
        let after = self.mixtures.partition_point(|(from, _)| *from <= step);
        &self.mixtures[after - 1].1 // the first holds from step 0
    }

    /// Whether a person pinned the mixture.
    #[must_use]
    pub const fn is_pinned(&self) -> bool {
        self.pinned
    }

    fn grant(&self, line: StepsCompleted, id: DecisionId, request: Request) -> Decision {
        let earliest = self.schedule.effective(line);
        Decision {
            id,
            line,
            effective: request.not_before.map_or(earliest, |step| step.max(earliest)),
            kind: request.kind,
            by: DecisionAuthor::Person(request.person),
            reason: request.reason,
        }
    }

    fn decide(&mut self, line: &TraceLine, signals: &Signals, persons: Vec<Decision>) -> Vec<Decision> {
        let mut decisions: Vec<Decision> = Vec::new();
        for decision in persons {
            // The ledger holds one mixture per step: of two persons' for one step the first stands.
            if self.is_taken(&decision) {
                continue;
            }
            self.adopt(&decision);
            decisions.push(decision);
        }
        let effective = self.schedule.effective(line.step);
        let current = self.mixture(effective).to_vec();
        let MixtureController::Ado(ado) = &mut self.controller else {
            return decisions;
        };
        ado.observe(signals);
        let taken = self.mixtures.iter().any(|(from, _)| *from == effective);
        if self.schedule.is_point(line.step)
            && !self.pinned
            && !taken
            && let Some((weights, reason)) = ado.propose(line.step, signals, &current)
        {
            let decision = Decision {
                id: DecisionId(self.next_id),
                line: line.step,
                effective,
                kind: DecisionKind::Mixture { weights },
                by: DecisionAuthor::Controller("ado".into()),
                reason,
            };
            self.adopt(&decision);
            decisions.push(decision);
        }
        decisions
    }

    fn is_taken(&self, decision: &Decision) -> bool {
        matches!(decision.kind, DecisionKind::Mixture { .. })
            && self.mixtures.iter().any(|(from, _)| *from == decision.effective)
    }

    fn adopt(&mut self, decision: &Decision) {
        self.next_id = decision.id.0 + 1;
        match &decision.kind {
            DecisionKind::Mixture { weights } => {
                let at = self.mixtures.partition_point(|(from, _)| *from <= decision.effective);
                self.mixtures.insert(at, (decision.effective, normalised(weights)));
            }
            DecisionKind::Pin => self.pinned = true,
            DecisionKind::Release => self.pinned = false,
        }
    }
}

fn persons_in(line: &TraceLine) -> Vec<Decision> {
    line.decisions
        .iter()
        .filter(|decision| decision.by.is_person())
        .cloned()
        .collect()
}

fn normalised(weights: &[f64]) -> Vec<f64> {
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

/// One place on a domain's loss curve.
#[derive(Clone, Copy, Debug)]
struct Observation {
    /// The domain's tokens at the first evaluation of this place.
    tokens: f64,
    loss_sum: f64,
    count: f64,
}

/// What the ADO controller remembers.
#[derive(Clone, Debug)]
struct Ado {
    names: Vec<String>,
    prior: Vec<f64>,
    train_tokens: Vec<f64>,
    curves: Vec<VecDeque<Observation>>,
    credit: Vec<f64>,
    observed: Option<StepsCompleted>,
    decided_on: Option<StepsCompleted>,
}

impl Ado {
    fn new(facts: &[DomainFacts], prior: Vec<f64>) -> Self {
        Self {
            names: facts.iter().map(|fact| fact.name.clone()).collect(),
            train_tokens: facts.iter().map(|fact| fact.train_tokens as f64).collect(),
            curves: vec![VecDeque::new(); facts.len()],
            credit: prior.clone(),
            prior,
            observed: None,
            decided_on: None,
        }
    }

    /// Takes in an evaluation, once.
    fn observe(&mut self, signals: &Signals) {
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

    /// A new mixture and the numbers behind it, or none.
    fn propose(&mut self, line: StepsCompleted, signals: &Signals, current: &[f64]) -> Option<(Vec<f64>, String)> {
        let frozen = signals
            .last_spike
            .is_some_and(|spike| line.0.saturating_sub(spike.0) < SPIKE_FREEZE_LINES);
        if frozen || self.observed.is_none() || self.observed == self.decided_on {
            return None;
        }
        let fits: Vec<Result<PowerLaw, &'static str>> = self.curves.iter().map(fit_curve).collect();
        let claims = self.claims(&fits, signals);
        if claims.iter().flatten().count() < 2 {
            return None;
        }
        let target = self.target(&claims, current);
        let (low, high) = self.guards(&claims, signals, current);
        let weights = round(&project(&target, &low, &high)?);
        self.decided_on = self.observed;
        for (credit, weight) in self.credit.iter_mut().zip(&weights) {
            *credit = CREDIT_DECAY * *credit + (1.0 - CREDIT_DECAY) * weight;
        }
        let change = weights
            .iter()
            .zip(current)
            .map(|(new, old)| (new - old).abs())
            .fold(0.0, f64::max);
        (change >= CHANGE_MIN).then(|| {
            let reason = self.reason(&fits, signals, current, &weights);
            (weights, reason)
        })
    }

    /// What each domain has to claim; nothing without a good fit.
    fn claims(&self, fits: &[Result<PowerLaw, &'static str>], signals: &Signals) -> Vec<Option<f64>> {
        fits.iter()
            .zip(&signals.domains)
            .enumerate()
            .map(|(domain, (fit, seen))| {
                let speed = fit.as_ref().ok()?.speed(seen.tokens as f64);
                let claim = self.prior[domain] * libm::pow(self.credit[domain], CREDIT_POWER) * speed;
                (claim.is_finite() && claim > 0.0).then_some(claim)
            })
            .collect()
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
    fn guards(&self, claims: &[Option<f64>], signals: &Signals, current: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let floor = weight_floor(current.len());
        let step = libm::exp(LN_CHANGE_MAX);
        let mut low = Vec::with_capacity(current.len());
        let mut high = Vec::with_capacity(current.len());
        for (domain, (weight, seen)) in current.iter().zip(&signals.domains).enumerate() {
            let left = (EPOCHS_MAX * self.train_tokens[domain] - seen.tokens as f64).max(0.0);
            let supply = (left / (signals.tokens as f64).max(1.0)).max(WEIGHT_MIN);
            // A weight below the floor climbs to it, one above its supply sinks to it, each at the permitted pace.
            let lowest = (weight / step).max(floor.min(supply)).min(weight * step);
            let highest = (weight * step).min(supply).max(lowest);
            let kept = weight.clamp(lowest, highest);
            low.push(if claims[domain].is_some() { lowest } else { kept });
            high.push(if claims[domain].is_some() { highest } else { kept });
        }
        (low, high)
    }

    fn reason(
        &self,
        fits: &[Result<PowerLaw, &'static str>],
        signals: &Signals,
        current: &[f64],
        weights: &[f64],
    ) -> String {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        if order.len() > REASON_DOMAINS_MAX {
            let moved = |domain: usize| (weights[domain] - current[domain]).abs();
            order.sort_by(|&a, &b| moved(b).total_cmp(&moved(a)).then(a.cmp(&b)));
            order.truncate(REASON_DOMAINS_MAX);
            order.sort_unstable();
        }
        let mut text = format!("held-out at {}", self.observed.map_or(0, |step| step.0));
        for domain in order {
            let seen = &signals.domains[domain];
            let _infallible = match &fits[domain] {
                Ok(law) => write!(
                    text,
                    "; {} {:.4}->{:.4} L={:.4} e={:.3} a={:.3} n={} r2={:.2} ep={:.2}",
                    self.names[domain],
                    current[domain],
                    weights[domain],
                    law.loss(seen.tokens as f64),
                    law.floor,
                    law.exponent,
                    seen.tokens,
                    law.explained,
                    seen.epochs
                ),
                Err(why) => write!(
                    text,
                    "; {} {:.4}->{:.4} no fit: {why}",
                    self.names[domain], current[domain], weights[domain]
                ),
            };
        }
        if weights.len() > REASON_DOMAINS_MAX {
            let _infallible = write!(text, "; {} more", weights.len() - REASON_DOMAINS_MAX);
        }
        text
    }
}

fn fit_curve(curve: &VecDeque<Observation>) -> Result<PowerLaw, &'static str> {
    let points: Vec<(f64, f64)> = curve
        .iter()
        .map(|place| (place.tokens, place.loss_sum / place.count))
        .collect();
    fit(&points)
}
