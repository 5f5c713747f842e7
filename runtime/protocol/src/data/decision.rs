//! Decisions, and the ledger that orders them.
//!
//! A decision is made on one committed line, written in that line, and takes effect at a stated later step. Decisions are
//! only written in **decision points**: lines whose step is a multiple of `mixture.interval_steps`, from
//! `mixture.start_steps` on. So a rank knows without asking which outcomes it must have before it plans a step, waits
//! only for those (STEP-6), and an empty outcome counts as one.
//!
//! - **LOOP-2** A person's decision is a recorded one: it goes through the same points and the same ledger.
//! - **DATA-2** Together with the committed step, the ledger is all the state of the data order.
//!
//! The ledger refuses what is late, contradictory, out of order or malformed, and says why; it decides nothing itself.

use super::course::Course;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use tarazed_domain::config::{Config, MixtureConfig, PolicyConfig};
use tarazed_domain::{StepIndex, StepsCompleted};

/// Number of a decision, rising through the run from 1.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Debug,
    Default,
    Serialize,
    Deserialize,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
#[serde(transparent)]
pub struct DecisionId(pub u64);

impl fmt::Display for DecisionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

pub use kind::{DataChange, DecisionKind, DiscardedSamples, DomainEdition, SpikeBounds};

mod kind {
    #![allow(
        missing_docs,
        reason = "rkyv generates public twins of the fields without documentation"
    )]

    use super::DecisionId;
    use serde::{Deserialize, Serialize};
    use tarazed_domain::StepsCompleted;

    /// What is decided.
    #[derive(Clone, PartialEq, Debug, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
    #[serde(rename_all = "snake_case", deny_unknown_fields)]
    pub enum DecisionKind {
        /// The mixture from the effective step on, in domain order; non-negative, normalised where it is used.
        Mixture {
            /// One weight per domain.
            weights: Vec<f64>,
        },
        /// The controller decides nothing from this line on; the mixture stays until a person changes or releases it.
        Pin,
        /// The controller decides again.
        Release,
        /// What a controller in the shadow would do; nobody follows it.
        Advice {
            /// One weight per domain.
            weights: Vec<f64>,
        },
        /// An earlier decision does not hold from the effective step on: what was in force before it is in force again.
        Veto {
            /// Which.
            decision: DecisionId,
        },
        /// The learning rate is so many times that of the config, from the effective step on.
        LearningRate {
            /// Positive.
            factor: f64,
        },
        /// The decay of a `wsd` schedule begins at the effective step.
        Decay,
        /// From the effective step on, the update of a step beyond these bounds is left out.
        SpikeBounds(SpikeBounds),
        /// At the effective step the training state is that after `to` steps; data, learning rate and step go on.
        Rollback {
            /// Updates in the state that is gone back to.
            to: StepsCompleted,
            /// What was trained on since, and counts as used: the samples of the steps from `to` to the effective one.
            discarded: Vec<DiscardedSamples>,
        },
        /// The run ends before the effective step.
        Stop,
        /// Other data from the effective step on: domains that the run did not have, or other text for those that it has.
        Data(DataChange),
        /// A rollback at the effective step is to be decided, unless this is vetoed. By itself it does nothing.
        RollbackNotice {
            /// Updates in the state that would be gone back to.
            to: StepsCompleted,
        },
        /// From the effective step on nothing is drawn of a domain that was passed over `mixture.epochs_max` times: the others
        /// have its weight, in their proportions, whatever mixture is in force, until other text comes for it. Where no other
        /// domain has any weight, the mixture stays whole.
        EpochLimit {
            /// Its place among the domains of the run.
            domain: u16,
        },
    }

    /// Domains of one data set that enter a running training. All that the order of samples needs stands in it, so that
    /// the trace alone says what a step trained on.
    #[derive(Clone, PartialEq, Debug, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct DataChange {
        /// The data set: `version` of its `data.json`, a BLAKE3 of 64 hex digits.
        pub version: String,
        /// What enters; at least one.
        pub domains: Vec<DomainEdition>,
        /// The mixture from the effective step on: those that the run had, in their order, then the new ones in theirs. Or,
        /// where there are only as many as new domains, their shares: the others have the rest, in the proportions in
        /// force before.
        pub weights: Vec<f64>,
    }

    /// One domain as a data set holds it.
    #[derive(
        Clone, PartialEq, Eq, Debug, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
    )]
    #[serde(deny_unknown_fields)]
    pub struct DomainEdition {
        /// Its name, in the run as in the data set.
        pub name: String,
        /// Its place among the domains of the run: that of the one whose text it replaces, or the next one for a new one.
        pub domain: u16,
        /// Its place among the domains of the data set.
        pub index: u16,
        /// Its language, as config files name it.
        pub language: String,
        /// Training sequences of one epoch, at the context of the run.
        pub train_sequences: u64,
        /// Training tokens of one epoch.
        pub train_tokens: u64,
    }

    /// What a step is judged by at its barrier. All of it comes from committed lines, so every rank judges alike.
    #[derive(Clone, PartialEq, Debug, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct SpikeBounds {
        /// Expected training loss by domain, in nats; none where nothing is expected.
        pub expected: Vec<Option<f64>>,
        /// The most that the loss may lie above what is expected, in nats.
        pub residual_loss: f64,
        /// The largest gradient norm before clipping.
        pub grad_norm: f64,
    }

    /// Consecutive draws of one domain.
    #[derive(
        Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
    )]
    #[serde(deny_unknown_fields)]
    pub struct DiscardedSamples {
        /// The first, counted over all epochs from 0.
        pub first: u64,
        /// How many.
        pub count: u64,
    }
}

impl DataChange {
    /// Its weights where they are shares of its `new` domains alone.
    #[must_use]
    pub fn shares(&self, new: usize) -> Option<&[f64]> {
        (self.weights.len() == new).then_some(self.weights.as_slice())
    }

    /// Whether it states the whole mixture, not just shares of its new domains. A run has had a domain before.
    #[must_use]
    pub fn states_mixture(&self) -> bool {
        let last = self.domains.iter().map(|edition| usize::from(edition.domain)).max();
        last.is_some_and(|last| self.weights.len() > last)
    }

    /// Those that are new to a run of `before` domains.
    pub fn new_domains(&self, before: usize) -> impl Iterator<Item = &DomainEdition> {
        self.domains
            .iter()
            .filter(move |edition| usize::from(edition.domain) >= before)
    }

    /// Whether its version is the hash of a data set: 64 lower-case hex digits.
    #[must_use]
    pub fn names_hash(&self) -> bool {
        self.version.len() == 64 && self.version.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    }
}

/// Who decided.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecisionAuthor {
    /// A controller of the run, by name.
    Controller(String),
    /// A person, by name: an input of the run like its config (LOOP-2).
    Person(String),
}

impl DecisionAuthor {
    /// Whether a person decided.
    #[must_use]
    pub const fn is_person(&self) -> bool {
        matches!(self, Self::Person(_))
    }
}

/// One decision, as written in the trace.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decision {
    /// Its number.
    pub id: DecisionId,
    /// The trace line it was made on and is written in.
    pub line: StepsCompleted,
    /// The first step it acts on.
    pub effective: StepIndex,
    /// What is decided.
    pub kind: DecisionKind,
    /// Who decided.
    pub by: DecisionAuthor,
    /// Why, with the numbers it used.
    pub reason: String,
}

/// Past spike bounds without a veto that ranks are told: those in force, and those that a veto to come brings back.
const BOUNDS_TOLD: usize = 2;

/// Decisions as ranks need them that begin at `base`: what they do, not why, and without those that act on no step any
/// more, since plans hold all decisions of a run and messages are bounded. Advice acts on none. A veto takes back only what
/// is in force, so of spike bounds no more can act than the newest two past ones that no veto names, what came between and
/// after them, and the vetoes of these.
#[must_use]
pub fn for_ranks(decisions: &[Decision], base: StepsCompleted) -> Vec<Decision> {
    let vetoed: BTreeSet<DecisionId> = decisions.iter().filter_map(Decision::vetoes).collect();
    let mut past: Vec<&Decision> = decisions
        .iter()
        .filter(|decision| matches!(decision.kind, DecisionKind::SpikeBounds(_)) && decision.effective.0 <= base.0)
        .collect();
    past.sort_by_key(|decision| std::cmp::Reverse((decision.effective, decision.id)));
    let mut standing = 0;
    let spent: BTreeSet<DecisionId> = past
        .into_iter()
        .skip_while(|decision| {
            let acts = standing < BOUNDS_TOLD;
            standing += usize::from(!vetoed.contains(&decision.id));
            acts
        })
        .map(|decision| decision.id)
        .collect();
    let acts = |decision: &&Decision| match decision.kind {
        DecisionKind::Advice { .. } => false,
        DecisionKind::Veto { decision: which } => !spent.contains(&which),
        _ => !spent.contains(&decision.id),
    };
    let bare = |decision: &Decision| Decision {
        reason: String::new(),
        ..decision.clone()
    };
    decisions.iter().filter(acts).map(bare).collect()
}

/// Steps that a run will have done at its end, as far as is known: `last_step`, or before it a stop that these decisions decide,
/// or the step `stop_at` of `policy.stop.tokens`, whose stop is decided only shortly before. Where that one was vetoed it is not
/// decided again. For people: nothing is decided by it.
#[must_use]
pub fn expected_end(decisions: &[Decision], stop_at: Option<StepIndex>, last_step: StepsCompleted) -> StepsCompleted {
    // A stop of the policy at or behind that step is the one for the tokens: of several due at once the earliest is decided.
    let is_vetoed = |at: StepIndex| {
        let is_it = |stop: &Decision| stop.kind == DecisionKind::Stop && !stop.by.is_person() && stop.effective >= at;
        decisions.iter().any(is_it)
    };
    let stop = stop_of(decisions).or_else(|| stop_at.filter(|&at| !is_vetoed(at)));
    stop.map_or(last_step, |stop| last_step.min(StepsCompleted(stop.0)))
}

/// Changes of the data among these decisions, in order, with the first step of each. None can be taken back.
pub fn data_changes(decisions: &[Decision]) -> impl Iterator<Item = (StepIndex, &DataChange)> {
    decisions.iter().filter_map(|decision| match &decision.kind {
        DecisionKind::Data(change) => Some((decision.effective, change)),
        _ => None,
    })
}

/// Names of the domains that `step` can train on, in domain order, in a run that began with those named `first`.
#[must_use]
pub fn domain_names(first: &[String], decisions: &[Decision], step: StepIndex) -> Vec<String> {
    let mut names = first.to_vec();
    let changes = data_changes(decisions).filter(|(from, _)| *from <= step);
    for edition in changes.flat_map(|(_, change)| &change.domains) {
        if usize::from(edition.domain) == names.len() {
            names.push(edition.name.clone());
        }
    }
    names
}

/// The first step that is not run any more by these decisions, in order.
#[must_use]
pub fn stop_of(decisions: &[Decision]) -> Option<StepIndex> {
    let stands = |stop: &&Decision| {
        let veto = DecisionKind::Veto { decision: stop.id };
        stop.kind == DecisionKind::Stop && !decisions.iter().any(|decision| decision.kind == veto)
    };
    decisions.iter().rev().find(stands).map(|stop| stop.effective)
}

impl Decision {
    /// What it takes back.
    const fn vetoes(&self) -> Option<DecisionId> {
        match self.kind {
            DecisionKind::Veto { decision } => Some(decision),
            _ => None,
        }
    }

    /// Whether the other is the same decision, up to what its author does not know: the samples that a rollback discards,
    /// which the data cursor fills in and checks.
    #[must_use]
    pub fn is_as_decided(&self, other: &Self) -> bool {
        let DecisionKind::Rollback { to, discarded } = &self.kind else {
            return self == other;
        };
        match &other.kind {
            DecisionKind::Rollback {
                to: other_to,
                discarded: other_discarded,
            } => {
                let with = |kind: DecisionKind| Self { kind, ..other.clone() };
                let blank = DecisionKind::Rollback {
                    to: *to,
                    discarded: discarded.clone(),
                };
                to == other_to && discarded.len() == other_discarded.len() && *self == with(blank)
            }
            _ => false,
        }
    }
}

/// Where decision points lie and how long a decision takes: a function of the config alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DecisionSchedule {
    first_point: Option<u64>,
    interval_steps: u64,
    lag_steps: u64,
}

impl DecisionSchedule {
    /// The schedule of a config. A run in which nothing is decided has no decision points: its ranks never wait for the
    /// controller.
    ///
    /// # Panics
    /// If the interval or the lag is 0: the config refuses that before.
    #[must_use]
    pub fn new(mixture: &MixtureConfig, policy: &PolicyConfig) -> Self {
        assert!(mixture.interval_steps > 0, "mixture.interval_steps is at least 1");
        assert!(mixture.lag_steps > 0, "mixture.lag_steps is at least 1");
        let first_point = mixture.first_point().filter(|_| mixture.decides() || policy.decides());
        Self {
            first_point,
            interval_steps: mixture.interval_steps,
            lag_steps: mixture.lag_steps,
        }
    }

    /// The schedule of a run's config.
    ///
    /// # Panics
    /// As [`DecisionSchedule::new`].
    #[must_use]
    pub fn of(config: &Config) -> Self {
        Self::new(&config.mixture, &config.policy)
    }

    /// Whether decisions may be written in this line.
    #[must_use]
    pub fn is_point(&self, line: StepsCompleted) -> bool {
        self.first_point
            .is_some_and(|first| line.0 >= first && line.0.is_multiple_of(self.interval_steps))
    }

    /// The first step a decision written in this line may act on.
    #[must_use]
    pub const fn effective(&self, line: StepsCompleted) -> StepIndex {
        StepIndex(line.0.saturating_add(self.lag_steps))
    }

    /// The newest decision point whose outcome must be known before `step` can be planned; 0 if there is none.
    #[must_use]
    pub fn needs(&self, step: StepIndex) -> StepsCompleted {
        let newest = step
            .0
            .checked_sub(self.lag_steps)
            .map(|line| line - line % self.interval_steps);
        match (self.first_point, newest) {
            (Some(first), Some(newest)) if newest >= first => StepsCompleted(newest),
            _ => StepsCompleted(0),
        }
    }

    /// The first decision point whose decisions can act no earlier than at this step.
    #[must_use]
    pub fn point_deciding(&self, step: StepIndex) -> Option<StepsCompleted> {
        let behind = self.lag_steps.saturating_add(1);
        self.next_point(StepsCompleted(step.0.saturating_sub(behind)))
    }

    /// The first decision point after this line.
    #[must_use]
    pub fn next_point(&self, line: StepsCompleted) -> Option<StepsCompleted> {
        let first = self.first_point?;
        let next = (line.0 / self.interval_steps)
            .checked_add(1)?
            .checked_mul(self.interval_steps)?;
        Some(StepsCompleted(next.max(first)))
    }
}

/// A refused record. Nothing of it was taken over.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LedgerError {
    /// Retry: an earlier outcome is still missing.
    #[error("line {line} came before the outcome of decision point {missing}; record line {missing} first")]
    Skipped {
        /// The line offered.
        line: StepsCompleted,
        /// The decision point not recorded yet.
        missing: StepsCompleted,
    },
    /// Halt: two outcomes for one line (LOOP-1 is broken, or the record is another run's).
    #[error("line {line} was recorded with other decisions; compare both traces with `tarazed trace diff`")]
    Conflict {
        /// The line.
        line: StepsCompleted,
    },
    /// Halt or drop: the decision breaks the rules of the ledger.
    #[error("decision {id} in line {line} is refused: {reason}")]
    Refused {
        /// Its number.
        id: DecisionId,
        /// The line offered.
        line: StepsCompleted,
        /// What is wrong with it.
        reason: String,
    },
}

/// All decisions so far, in order, and how far the trace is known.
#[derive(Clone, PartialEq, Debug)]
pub struct DecisionLedger {
    schedule: DecisionSchedule,
    recorded: StepsCompleted,
    decisions: Vec<Decision>,
    course: Course,
}

impl DecisionLedger {
    /// An empty ledger over the configured mixture.
    #[must_use]
    pub fn new(schedule: DecisionSchedule, weights: Vec<f64>) -> Self {
        Self {
            schedule,
            recorded: StepsCompleted(0),
            decisions: Vec::new(),
            course: Course::new(weights),
        }
    }

    /// The ledger as of line `recorded`, from all decisions up to it (e.g. out of a manifest), in order.
    ///
    /// # Errors
    /// As [`DecisionLedger::record`].
    pub fn rebuild(
        schedule: DecisionSchedule,
        weights: Vec<f64>,
        recorded: StepsCompleted,
        decisions: &[Decision],
    ) -> Result<Self, LedgerError> {
        let mut ledger = Self::new(schedule, weights);
        for group in decisions.chunk_by(|a, b| a.line == b.line) {
            let line = group[0].line;
            if line > recorded {
                return Err(refused(
                    &group[0],
                    line,
                    format!("it is later than the last recorded line {recorded}"),
                ));
            }
            // Points without decisions leave no trace in the list: all before this one are known to be empty.
            ledger.recorded = ledger.recorded.max(StepsCompleted(line.0.saturating_sub(1)));
            ledger.record(line, group)?;
        }
        ledger.recorded = recorded;
        Ok(ledger)
    }

    /// Takes over the outcome of one committed line: its decisions, possibly none. Every decision point must come, in
    /// order; other lines may be left out. The same outcome may come again; the answer is then `false`.
    ///
    /// # Errors
    /// A [`LedgerError`]; the ledger is then unchanged.
    pub fn record(&mut self, line: StepsCompleted, decisions: &[Decision]) -> Result<bool, LedgerError> {
        if line <= self.recorded {
            let known = self.in_line(line);
            return if known == decisions {
                Ok(false)
            } else {
                Err(LedgerError::Conflict { line })
            };
        }
        if let Some(missing) = self.schedule.next_point(self.recorded).filter(|point| *point < line) {
            return Err(LedgerError::Skipped { line, missing });
        }
        let mut course = self.course.clone();
        let mut last = self.decisions.last().map(|decision| decision.id);
        for decision in decisions {
            self.check(line, decision, last)?;
            course
                .adopt(decision)
                .map_err(|reason| refused(decision, line, reason))?;
            last = Some(decision.id);
        }
        self.course = course;
        self.decisions.extend_from_slice(decisions);
        self.recorded = line;
        Ok(true)
    }

    fn check(&self, line: StepsCompleted, decision: &Decision, last: Option<DecisionId>) -> Result<(), LedgerError> {
        let refuse = |reason: String| Err(refused(decision, line, reason));
        if !self.schedule.is_point(line) {
            return refuse("the line is not a decision point of this config".into());
        }
        if decision.line != line {
            return refuse(format!("it says it belongs to line {}", decision.line));
        }
        let earliest = self.schedule.effective(line);
        if decision.effective < earliest {
            return refuse(format!(
                "it is late: it names step {}, and ranks may have planned up to step {} without it",
                decision.effective, earliest
            ));
        }
        match last {
            Some(last) if decision.id <= last => refuse(format!("decision {last} came before it")),
            _ => Ok(()),
        }
    }

    fn in_line(&self, line: StepsCompleted) -> &[Decision] {
        let start = self.decisions.partition_point(|decision| decision.line < line);
        let end = self.decisions.partition_point(|decision| decision.line <= line);
        &self.decisions[start..end]
    }

    /// What is in force, by step.
    #[must_use]
    pub const fn course(&self) -> &Course {
        &self.course
    }

    /// The rules of the ledger.
    #[must_use]
    pub const fn schedule(&self) -> &DecisionSchedule {
        &self.schedule
    }

    /// The newest line whose outcome is known.
    #[must_use]
    pub const fn recorded(&self) -> StepsCompleted {
        self.recorded
    }

    /// All decisions, in order of line and number.
    #[must_use]
    pub fn decisions(&self) -> &[Decision] {
        &self.decisions
    }
}

fn refused(decision: &Decision, line: StepsCompleted, reason: String) -> LedgerError {
    LedgerError::Refused {
        id: decision.id,
        line,
        reason,
    }
}

/// Whether `weights` is a mixture of `domain_count` domains: as many, finite, not negative, not all zero.
pub(crate) fn check_weights(weights: &[f64], domain_count: usize) -> Result<(), String> {
    if weights.len() != domain_count {
        return Err(format!("it has {} weights for {domain_count} domains", weights.len()));
    }
    if let Some(weight) = weights.iter().find(|weight| !weight.is_finite() || **weight < 0.0) {
        return Err(format!("the weight {weight} is not a finite number from 0 up"));
    }
    let sum: f64 = weights.iter().sum();
    if !sum.is_finite() || sum <= 0.0 {
        return Err(format!("the weights sum to {sum}"));
    }
    Ok(())
}
