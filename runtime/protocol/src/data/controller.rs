//! ATE: signals, turned into decisions.
//!
//! A decision is made on a decision point's line from nothing but the lines so far and the config (LOOP-1); it acts
//! `mixture.lag_steps` later, or later still. [`Ate::on_line`] returns *all* decisions of the line, those of persons included
//! (LOOP-2); what it returns is what the line must hold, live or replayed, and [`Ate::replay`] checks just that.
//!
//! Mixtures come from a [`MixtureController`], chosen by `mixture.controller`: `ado`, `odm`, `excess`, `schedule`; each
//! module states its formula, source and known faults. Controllers of `mixture.shadow` are asked as well; what they say is
//! written as advice that nobody follows, so that a run shows what another controller would have done from where it stood.
//! Everything else is decided by `policy`.
//!
//! Guards, each in force at every update of a controller that adapts:
//! - the target is drawn to the configured mixture: `¾ ρ + ¼ w`;
//! - no weight below `max(0.01, 1/(5K))` for `K` domains (at most half of an even share);
//! - no `ln p` changes by more than 0.2;
//! - no domain is promised more than four epochs (arXiv 2305.16264 finds further repeats nearly worthless) when the
//!   run doubles its tokens; a domain near that falls below the floor, down to 0.001;
//! - nothing is decided within 64 lines of a spike, nor once the decay of a `wsd` schedule has begun, for then losses fall
//!   by the rate and not by the data; and by held-out losses nothing before a new evaluation;
//! - a domain that claims nothing keeps its weight; with fewer than two claims nothing is decided.
//!
//! A stage of the config is a person's choice, and keeps none of them. The limit of `mixture.epochs_max` (`epochs`) holds for
//! every mixture, whoever set it.
//!
//! Data that enter the run (`arrivals`): a new domain takes the share that whoever brings it states, or else its natural
//! share, within floor and epochs as above; the others keep their proportions. Then it is a domain like any other.
//!
//! The inputs stand in `reason`. The run's length is no input: raising `run.steps` must not change the past.

mod ado;
mod arrivals;
mod curves;
mod epochs;
mod excess;
mod guards;
mod odm;
mod policy;
mod stages;

pub use arrivals::{Arrival, NewText, PLANNER, planned};
pub use epochs::{EPOCH_LIMITER, is_limit_of_all};
pub use guards::{EPOCHS_MAX, LN_CHANGE_MAX, PRIOR_SHARE, SPIKE_FREEZE_LINES, WEIGHT_MIN, weight_floor};
pub use stages::Begins;

use super::course::Course;
use super::decision::{
    DataChange, Decision, DecisionAuthor, DecisionId, DecisionKind, DecisionSchedule, check_weights,
};
use super::signals::Signals;
use super::{DomainFacts, LoopConfig};
use crate::trace::TraceLine;
use arrivals::Arrivals;
use epochs::Limits;
use guards::Guards;
use policy::Policy;
use std::collections::VecDeque;
use std::fmt::Write as _;
use tarazed_domain::config::{ControllerKind, StageStart};
use tarazed_domain::{Mutant, StepIndex, StepsCompleted};

/// Domains named one by one in a reason.
const REASON_DOMAINS_MAX: usize = 16;
/// Requests of persons that may wait for the next decision point.
pub const REQUESTS_MAX: usize = 64;

/// What a controller is asked on.
#[derive(Clone, Copy, Debug)]
pub struct Sight<'a> {
    /// The decision point.
    pub line: StepsCompleted,
    /// The first step that a decision of this line can act on.
    pub effective: StepIndex,
    /// The same of the next decision point.
    pub effective_next: StepIndex,
    /// Signals of the line.
    pub signals: &'a Signals,
    /// The mixture decided for the effective step, normalised, in domain order; domains at their epoch limit have theirs in it.
    pub current: &'a [f64],
}

/// What domains claim, and on what evidence.
#[derive(Clone, PartialEq, Debug)]
pub struct Claims {
    /// Claims, in domain order, of which only the ratios count; none for a domain that keeps its weight.
    pub claims: Vec<Option<f64>>,
    /// What all of it rests on.
    pub evidence: String,
    /// What each claim rests on.
    pub inputs: Vec<String>,
}

/// What a controller would do.
#[derive(Clone, PartialEq, Debug)]
pub enum Advice {
    /// Weights by these claims, inside the guards.
    Claims(Claims),
    /// Just this mixture.
    Mixture {
        /// In domain order.
        weights: Vec<f64>,
        /// The first step it holds for.
        effective: StepIndex,
        /// Why.
        reason: String,
    },
}

/// Who proposes mixtures: a pure machine over signals. It sees every line once and in order, and is asked at decision
/// points only; the engine applies the guards and writes the decision.
pub trait MixtureController: std::fmt::Debug + Send {
    /// Which it is.
    fn kind(&self) -> ControllerKind;
    /// Takes in a line's signals.
    fn observe(&mut self, signals: &Signals);
    /// What it would do now; none for nothing.
    fn advise(&mut self, sight: &Sight<'_>) -> Option<Advice>;
    /// Its claims came to this mixture, whether or not it is worth a decision.
    fn settled(&mut self, _weights: &[f64]) {}
    /// Its mixture was decided, from this step on.
    fn decided(&mut self, _effective: StepIndex) {}
    /// The next line is the first that has trained on this: signals are of these domains from it on.
    fn arrive(&mut self, arrival: &Arrival);
    /// A copy.
    fn boxed(&self) -> Box<dyn MixtureController>;
}

impl Clone for Box<dyn MixtureController> {
    fn clone(&self) -> Self {
        self.boxed()
    }
}

/// A stage of the schedule, resolved.
#[derive(Clone, PartialEq, Debug)]
pub struct Stage {
    /// What people call it.
    pub name: String,
    /// When it begins.
    pub begins: Begins,
    /// Its mixture, normalised, in domain order.
    pub weights: Vec<f64>,
}

/// What a person asks for; it becomes a decision in the next decision point's line, a rollback in that of the point which decides its
/// step.
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

/// The Adaptive Training Engine as a pure machine.
#[derive(Clone, Debug)]
pub struct Ate {
    schedule: DecisionSchedule,
    names: Vec<String>,
    guards: Guards,
    limits: Limits,
    controller: Option<Box<dyn MixtureController>>,
    shadows: Vec<Box<dyn MixtureController>>,
    policy: Policy,
    config: LoopConfig,
    next_id: u64,
    course: Course,
    /// What the config plans: in force from the start, and written in the first decision point's line.
    planned: Vec<Decision>,
    arrivals: Arrivals,
    /// Training tokens of one epoch of each domain, by all that is decided.
    sizes: Vec<f64>,
    last_line: StepsCompleted,
    requests: VecDeque<Request>,
}

impl Ate {
    /// An engine that has seen nothing.
    ///
    /// # Panics
    /// If the configured weights are no mixture: the config refuses that before. If a planned change cannot be decided: ask
    /// [`planned`] before.
    #[must_use]
    pub fn new(config: &LoopConfig, facts: &[DomainFacts]) -> Self {
        let weights: Vec<f64> = facts.iter().map(|fact| fact.weight).collect();
        let checked = check_weights(&weights, facts.len());
        assert!(checked.is_ok(), "configured weights: {checked:?}");
        let make = |kind| controller(kind, config, facts);
        let mut engine = Self {
            schedule: DecisionSchedule::new(&config.mixture, &config.policy),
            names: facts.iter().map(|fact| fact.name.clone()).collect(),
            guards: Guards::new(config, facts, normalised(&weights)),
            limits: Limits::new(config, facts),
            controller: make(config.mixture.controller),
            shadows: config.mixture.shadow.iter().copied().filter_map(make).collect(),
            policy: Policy::new(config),
            config: config.clone(),
            next_id: 1,
            course: Course::new(weights),
            planned: Vec::new(),
            arrivals: Arrivals::default(),
            sizes: facts.iter().map(|fact| fact.train_tokens as f64).collect(),
            last_line: StepsCompleted(0),
            requests: VecDeque::new(),
        };
        if !config.planned.is_empty() {
            let planned = planned(config, facts).unwrap_or_else(|why| panic!("{why}"));
            for decision in &planned {
                let adopted = engine.adopt(decision);
                assert!(adopted, "a planned change that cannot stand: {decision:?}");
            }
            engine.planned = planned;
        }
        engine
    }

    /// Takes in the next line and its signals; returns all decisions that this line must hold. Decisions of persons
    /// already in the line are kept, waiting requests join them, the controller's own are computed.
    pub fn on_line(&mut self, line: &TraceLine, signals: &Signals) -> Vec<Decision> {
        let mut persons = persons_in(line);
        if self.schedule.is_point(line.step) {
            self.grant_all(line.step, &mut persons);
        }
        self.decide(line, signals, persons)
    }

    /// What was asked for becomes decisions of this decision point, behind those of persons that it has.
    fn grant_all(&mut self, line: StepsCompleted, persons: &mut Vec<Decision>) {
        let effective = self.schedule.effective(line);
        let (later, due): (VecDeque<Request>, VecDeque<Request>) = std::mem::take(&mut self.requests)
            .into_iter()
            .partition(|request| waits_for(request).is_some_and(|step| step > effective));
        self.requests = later;
        let first_id = persons.last().map_or(self.next_id, |last| last.id.0 + 1);
        let mut course = self.course.clone();
        for decision in persons.iter() {
            let _ = course.adopt(decision); // as `decide` does; what is refused is left out there
        }
        for (id, request) in (first_id..).zip(due) {
            let mut granted = self.grant(line, DecisionId(id), request);
            discard_nothing(&mut granted.kind, course.domains_at(granted.effective));
            let _ = course.adopt(&granted);
            if !Mutant::PersonUnheard.is_on() {
                persons.push(granted);
            }
        }
    }

    /// Takes in a line that is committed, decisions and all, and checks that it holds what the trace leads to. What a
    /// rollback discards is the cursor's to check.
    ///
    /// # Errors
    /// A [`ReplayMismatch`].
    pub fn replay(&mut self, line: &TraceLine, signals: &Signals) -> Result<(), ReplayMismatch> {
        let expected = self.decide(line, signals, persons_in(line));
        let same = expected.len() == line.decisions.len()
            && expected.iter().zip(&line.decisions).all(|(a, b)| a.is_as_decided(b));
        if same {
            return Ok(());
        }
        Err(ReplayMismatch {
            line: line.step,
            expected,
            found: line.decisions.clone(),
        })
    }

    /// Lines up a person's request for the next decision point (LOOP-2). Returns the line that will hold it, and the step
    /// from which it acts.
    ///
    /// # Errors
    /// A [`RequestError`] saying why it cannot be granted: it contradicts the config, what is decided, or a request that
    /// waits already.
    pub fn request(&mut self, mut request: Request) -> Result<(StepsCompleted, StepIndex), RequestError> {
        let Some(line) = self.point_for(&request) else {
            return Err(RequestError(
                "this run has no decision points, so nothing can be decided in it; \
                 start one with policy.persons = true, or with a mixture.controller that decides"
                    .into(),
            ));
        };
        if self.requests.len() >= REQUESTS_MAX {
            return Err(RequestError(format!(
                "{REQUESTS_MAX} requests wait for line {line} already; ask again after it"
            )));
        }
        if matches!(
            request.kind,
            DecisionKind::Advice { .. } | DecisionKind::RollbackNotice { .. } | DecisionKind::EpochLimit { .. }
        ) {
            return Err(RequestError("only the run itself can decide that".into()));
        }
        if let DecisionKind::Veto { decision } = request.kind
            && decision.0 >= self.next_id
        {
            return Err(RequestError(format!(
                "decision {decision} is not decided yet; what waits in line {line} cannot be vetoed before it stands there"
            )));
        }
        if request.kind == DecisionKind::Decay && !self.config.rate.decays_on_demand() {
            return Err(RequestError(
                "optimizer.schedule has no decay that waits for a decision (kind = \"wsd\" without decay_from has)"
                    .into(),
            ));
        }
        // As it will be on that line, if nobody else asks for anything.
        let mut course = self.course.clone();
        for (id, waiting) in (self.next_id..).zip(&self.requests) {
            // Each was tried like this when it came, on the same course or an earlier one.
            let point = self.point_for(waiting).unwrap_or(line);
            let mut granted = self.grant(point, DecisionId(id), waiting.clone());
            discard_nothing(&mut granted.kind, course.domains_at(granted.effective));
            let _ = course.adopt(&granted);
        }
        let id = DecisionId(self.next_id + self.requests.len() as u64);
        let effective = self.grant(line, id, request.clone()).effective;
        match &mut request.kind {
            DecisionKind::Mixture { weights } => leave_out_later(weights, course.domains_at(effective)),
            DecisionKind::Data(change) => *change = self.with_waiting().with_shares(change, effective),
            _ => {}
        }
        discard_nothing(&mut request.kind, course.domains_at(effective));
        let granted = self.grant(line, id, request.clone());
        course.adopt(&granted).map_err(RequestError)?;
        if let DecisionKind::Data(change) = &request.kind {
            self.check_change(change)?;
            let asked = request.not_before.unwrap_or_default();
            if granted.effective != asked {
                return Err(RequestError(format!(
                    "the data cannot change at step {asked} any more: line {line} would hold it, and the first step that \
                     this line can decide is {}; ask for that one or a later one",
                    granted.effective
                )));
            }
        }
        self.requests.push_back(request);
        Ok((line, granted.effective))
    }

    /// What of a change of the data the course does not know: who else decides on the mixture, and names.
    fn check_change(&self, change: &DataChange) -> Result<(), RequestError> {
        let refuse = |reason: String| Err(RequestError(reason));
        if self.config.mixture.controller == ControllerKind::Schedule {
            return refuse(
                "the data of a run change only where its mixture is not that of stages, which speak of the domains of the \
                 config (mixture.controller = \"schedule\")"
                    .into(),
            );
        }
        let names = self.with_waiting().names;
        let mut then = names.clone();
        for edition in &change.domains {
            let at = usize::from(edition.domain);
            match then.iter().position(|name| *name == edition.name) {
                Some(found) if found != at => {
                    return refuse(format!("'{}' is domain {found} already", edition.name));
                }
                None if at < then.len() => {
                    return refuse(format!("domain {at} is '{}', not '{}'", then[at], edition.name));
                }
                Some(_) => {}
                None => then.push(edition.name.clone()),
            }
        }
        let new = change.weights.get(names.len()..).unwrap_or_default();
        let sum: f64 = change.weights.iter().sum();
        if self.adapts() && new.iter().any(|weight| *weight < WEIGHT_MIN * sum) {
            return refuse(format!(
                "a controller that adapts has nothing to begin with where a new domain has less than {WEIGHT_MIN} of the \
                 mixture; state its share, or leave that out for its natural one"
            ));
        }
        Ok(())
    }

    /// What of domains is known once all that waits is decided.
    fn with_waiting(&self) -> Self {
        let mut then = self.clone();
        for waiting in &self.requests {
            then.take_domains(&waiting.kind);
        }
        then
    }

    /// Whether a controller that adapts is followed.
    fn adapts(&self) -> bool {
        !matches!(
            self.config.mixture.controller,
            ControllerKind::Static | ControllerKind::Schedule
        )
    }

    /// The mixture that will be in force at `step` by what is decided so far, normalised, in domain order.
    #[must_use]
    pub fn mixture(&self, step: StepIndex) -> Vec<f64> {
        normalised(&self.course.in_force(step))
    }

    /// What is in force, by step.
    #[must_use]
    pub const fn course(&self) -> &Course {
        &self.course
    }

    /// Whether a person pinned the mixture.
    #[must_use]
    pub const fn is_pinned(&self) -> bool {
        self.course.is_pinned()
    }

    /// The decision point that will hold what is asked for, if nobody asks for anything else.
    fn point_for(&self, request: &Request) -> Option<StepsCompleted> {
        let next = self.schedule.next_point(self.last_line)?;
        match waits_for(request) {
            Some(step) => self.schedule.point_deciding(step).map(|point| point.max(next)),
            None => Some(next),
        }
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
        self.last_line = line.step;
        let mut decisions: Vec<Decision> = Vec::new();
        if self.schedule.next_point(StepsCompleted(0)) == Some(line.step) {
            decisions.clone_from(&self.planned);
        }
        for decision in persons {
            // What contradicts an earlier decision is refused when it is asked for; of two that came to contradict each
            // other since, the first stands.
            if self.adopt(&decision) {
                decisions.push(decision);
            }
        }
        self.hear(line.step);
        for controller in self.controller.iter_mut().chain(&mut self.shadows) {
            controller.observe(signals);
        }
        if self.schedule.is_point(line.step) {
            decisions.extend(self.decide_mixture(line.step, signals));
            decisions.extend(self.take_advice(line.step, signals));
            decisions.extend(self.limit_epochs(line.step, signals));
            let proposals = self.policy.propose(line.step, signals, &self.course, &self.schedule);
            for (kind, effective, reason) in proposals {
                let decision = self.decision(line.step, effective, kind, "policy", reason);
                if self.adopt(&decision) {
                    decisions.push(decision);
                }
            }
        }
        decisions
    }

    /// The mixture that the controller decides on, if it does.
    fn decide_mixture(&mut self, line: StepsCompleted, signals: &Signals) -> Option<Decision> {
        let earliest = self.schedule.effective(line);
        if self.course.is_pinned() || self.course.sets_mixture(earliest) {
            return None;
        }
        let mut controller = self.controller.take()?;
        let proposal = self.propose(controller.as_mut(), line, signals);
        let decision = proposal.and_then(|(weights, effective, reason)| {
            let kind = DecisionKind::Mixture { weights };
            let decision = self.decision(line, effective, kind, controller.kind().name(), reason);
            self.adopt(&decision).then_some(decision)
        });
        if let Some(decision) = &decision {
            controller.decided(decision.effective);
        }
        self.controller = Some(controller);
        decision
    }

    /// What controllers in the shadow would do; written down, and not followed.
    fn take_advice(&mut self, line: StepsCompleted, signals: &Signals) -> Vec<Decision> {
        let mut shadows = std::mem::take(&mut self.shadows);
        let mut advice = Vec::new();
        for shadow in &mut shadows {
            if let Some((weights, effective, reason)) = self.propose(shadow.as_mut(), line, signals) {
                let kind = DecisionKind::Advice { weights };
                let reason = format!("not followed: in the shadow; {reason}");
                let decision = self.decision(line, effective, kind, shadow.kind().name(), reason);
                if self.adopt(&decision) {
                    shadow.decided(effective);
                    advice.push(decision);
                }
            }
        }
        self.shadows = shadows;
        advice
    }

    /// A controller's mixture inside the guards, with its first step and its reason.
    fn propose(
        &self,
        controller: &mut dyn MixtureController,
        line: StepsCompleted,
        signals: &Signals,
    ) -> Option<(Vec<f64>, StepIndex, String)> {
        let effective = self.schedule.effective(line);
        // A limit is no reason to decide another mixture: other text may come.
        let current = normalised(self.course.mixture(effective));
        let next = self.schedule.next_point(line).unwrap_or(StepsCompleted(u64::MAX));
        let sight = Sight {
            line,
            effective,
            effective_next: self.schedule.effective(next),
            signals,
            current: &current,
        };
        let adapts = controller.kind() != ControllerKind::Schedule;
        let decays = self.config.rate.decays_from(self.course.decay().map(|from| from.0));
        let is_frozen = Guards::is_frozen(line, signals) || decays.is_some_and(|from| from <= effective.0);
        if adapts && is_frozen {
            return None;
        }
        match controller.advise(&sight)? {
            Advice::Mixture {
                weights,
                effective,
                reason,
            } => Some((weights, effective, reason)),
            Advice::Claims(mut claims) => {
                self.fill(&mut claims, effective);
                self.silence_limited(&mut claims, effective);
                if claims.claims.iter().flatten().count() < 2 {
                    return None;
                }
                let weights = self.guards.settle(&claims.claims, signals, &current)?;
                controller.settled(&weights);
                let reason = || self.reason(&claims, &current, &weights);
                Guards::is_change(&weights, &current).then(|| (weights.clone(), effective, reason()))
            }
        }
    }

    fn decision(
        &self,
        line: StepsCompleted,
        effective: StepIndex,
        kind: DecisionKind,
        by: &str,
        reason: String,
    ) -> Decision {
        Decision {
            id: DecisionId(self.next_id),
            line,
            effective,
            kind,
            by: DecisionAuthor::Controller(by.to_owned()),
            reason,
        }
    }

    /// Takes a decision over; says whether it can stand.
    fn adopt(&mut self, decision: &Decision) -> bool {
        let stands = self.course.adopt(decision).is_ok();
        if stands {
            self.take(decision);
        }
        stands
    }

    /// What follows of a decision that the course has taken over.
    fn take(&mut self, decision: &Decision) {
        self.next_id = decision.id.0 + 1;
        if let DecisionKind::Data(change) = &decision.kind {
            let reference = &self.config.mixture.reference;
            let arrival = Arrival::of(decision.effective, change, self.sizes.len(), reference);
            self.arrivals.push(arrival);
            self.limits.arrive(decision.effective, change);
        }
        self.take_domains(&decision.kind);
    }

    /// Names and sizes of the domains that a decision brings.
    fn take_domains(&mut self, kind: &DecisionKind) {
        let DecisionKind::Data(change) = kind else { return };
        for edition in &change.domains {
            let tokens = edition.train_tokens as f64;
            if let Some(size) = self.sizes.get_mut(usize::from(edition.domain)) {
                *size = tokens;
            } else {
                self.sizes.push(tokens);
                self.names.push(edition.name.clone());
            }
        }
    }

    fn reason(&self, claims: &Claims, current: &[f64], weights: &[f64]) -> String {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        if order.len() > REASON_DOMAINS_MAX {
            let moved = |domain: usize| (weights[domain] - current[domain]).abs();
            order.sort_by(|&a, &b| moved(b).total_cmp(&moved(a)).then(a.cmp(&b)));
            order.truncate(REASON_DOMAINS_MAX);
            order.sort_unstable();
        }
        let mut text = claims.evidence.clone();
        for domain in order {
            let _infallible = write!(
                text,
                "; {} {:.4}->{:.4} {}",
                self.names[domain], current[domain], weights[domain], claims.inputs[domain]
            );
        }
        if weights.len() > REASON_DOMAINS_MAX {
            let _infallible = write!(text, "; {} more", weights.len() - REASON_DOMAINS_MAX);
        }
        text
    }
}

/// The controller of that kind; none for a mixture that stands.
fn controller(kind: ControllerKind, config: &LoopConfig, facts: &[DomainFacts]) -> Option<Box<dyn MixtureController>> {
    let weights: Vec<f64> = facts.iter().map(|fact| fact.weight).collect();
    match kind {
        ControllerKind::Static => None,
        ControllerKind::Ado => Some(Box::new(ado::Ado::new(normalised(&weights)))),
        ControllerKind::Odm => Some(Box::new(odm::Odm::new(facts.len()))),
        ControllerKind::Excess => {
            let reference = &config.mixture.reference;
            let known = facts.iter().map(|fact| reference.get(&fact.name).copied());
            Some(Box::new(excess::Excess::new(known.collect())))
        }
        ControllerKind::Schedule => Some(Box::new(stages::Stages::new(resolve_stages(config, facts)))),
    }
}

/// Stages with their first steps, as far as these are known.
///
/// # Panics
/// If a stage does not say when it begins or has no weights: the config refuses that before.
fn resolve_stages(config: &LoopConfig, facts: &[DomainFacts]) -> Vec<Stage> {
    let stages = config.mixture.stages.iter();
    let resolved = stages.map(|stage| {
        let of = |fact: &DomainFacts| stage.weights.get(&fact.name).copied().unwrap_or(0.0);
        let weights: Vec<f64> = facts.iter().map(of).collect();
        let checked = check_weights(&weights, facts.len());
        assert!(checked.is_ok(), "weights of stage {}: {checked:?}", stage.name);
        let begins = match stage.start() {
            Some(StageStart::Step(step)) => Begins::At(StepIndex(step)),
            Some(StageStart::Tokens(tokens)) => Begins::At(config.step_after_tokens(tokens)),
            Some(StageStart::PlateauAfter(steps)) => Begins::OnPlateauAfter(steps),
            None => panic!("stage {} says when it begins", stage.name),
        };
        Stage {
            name: stage.name.clone(),
            begins,
            weights: normalised(&weights),
        }
    });
    resolved.collect()
}

fn persons_in(line: &TraceLine) -> Vec<Decision> {
    line.decisions
        .iter()
        .filter(|decision| decision.by.is_person())
        .cloned()
        .collect()
}

/// The step that a rollback waits for in memory. What it discards is known where all is that acts before it, so it stands in
/// the trace no earlier than just before it acts; other decisions stand there as soon as they can.
fn waits_for(request: &Request) -> Option<StepIndex> {
    let is_rollback = matches!(request.kind, DecisionKind::Rollback { .. });
    request.not_before.filter(|_| is_rollback)
}

/// What a rollback discards is the data cursor's to say: until then nothing, of each domain.
fn discard_nothing(kind: &mut DecisionKind, domain_count: usize) {
    if let DecisionKind::Rollback { to, .. } = kind {
        *kind = policy::rollback_to(*to, domain_count);
    }
}

/// Whoever asks for a mixture may give those domains nothing that come only after its step.
fn leave_out_later(weights: &mut Vec<f64>, domain_count: usize) {
    while weights.len() > domain_count && weights.last() == Some(&0.0) {
        weights.pop();
    }
}

fn normalised(weights: &[f64]) -> Vec<f64> {
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}
