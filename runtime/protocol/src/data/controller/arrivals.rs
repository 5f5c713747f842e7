//! Text that enters a run under whoever decides on its mixture.
//!
//! A change of the data ([`DataChange`]) is in the trace before it acts, so all of this is a function of lines and config
//! (LOOP-1). Three things learn of it, each when its own time has come:
//! - the **guards** with the first decision that can act on the step of the change: what they know of each domain (its part
//!   in the configured mixture, its tokens) then speaks of the text that this step trains on;
//! - **controllers** with the first line that has trained on it; until then the engine says for a domain that it claims
//!   nothing, so it keeps its weight;
//! - the **shares** of new domains are settled when the change is asked for, within the guards of its first step where a
//!   controller adapts.
//!
//! A new domain takes its share of the configured mixture as it takes it of the mixture in force, from all others alike.

use super::Ate;
use super::guards::{Guards, share_range};
use crate::data::course::{check_shares, with_shares};
use crate::data::decision::{DataChange, Decision, DecisionAuthor, DecisionId, DecisionKind};
use crate::data::{DomainFacts, LoopConfig};
use std::collections::BTreeMap;
use tarazed_domain::{StepIndex, StepsCompleted};

/// Who decides what the config plans.
pub const PLANNER: &str = "config";

/// A domain whose text is new to a run.
#[derive(Clone, PartialEq, Debug)]
pub struct NewText {
    /// Its place among the domains of the run.
    pub domain: usize,
    /// Training tokens of one epoch.
    pub train_tokens: f64,
    /// Loss of a reference run, where the config gives one.
    pub reference: Option<f64>,
}

/// A change of the data, as whoever decides on the mixture sees it.
#[derive(Clone, PartialEq, Debug)]
pub struct Arrival {
    /// The first step that trains on it.
    pub from: StepIndex,
    /// Domains before it.
    pub before: usize,
    /// Shares of the new domains, in their order; they are the last.
    pub shares: Vec<f64>,
    /// Domains of the run whose text is replaced.
    pub replaced: Vec<NewText>,
    /// Those that are new.
    pub new: Vec<NewText>,
}

impl Arrival {
    /// That of a change which a course has taken over.
    pub(super) fn of(from: StepIndex, change: &DataChange, before: usize, reference: &BTreeMap<String, f64>) -> Self {
        let texts = change.domains.iter().map(|edition| NewText {
            domain: usize::from(edition.domain),
            train_tokens: edition.train_tokens as f64,
            reference: reference.get(&edition.name).copied(),
        });
        let (new, replaced): (Vec<NewText>, Vec<NewText>) = texts.partition(|text| text.domain >= before);
        let shares = change.shares(new.len()).map_or_else(
            || {
                let sum: f64 = change.weights.iter().sum();
                change.weights[before..].iter().map(|weight| weight / sum).collect()
            },
            <[f64]>::to_vec,
        );
        Self {
            from,
            before,
            shares,
            replaced,
            new,
        }
    }

    /// A mixture of the domains before it, with its new ones.
    pub(super) fn share(&self, mixture: &mut Vec<f64>) {
        // Weights that leave the others nothing are a mixture in force, and no configured one.
        if !self.new.is_empty() && self.shares.iter().sum::<f64>() < 1.0 {
            *mixture = with_shares(mixture, &self.shares);
        } else {
            mixture.resize(self.before + self.new.len(), 1.0);
        }
    }
}

/// All changes of the data that are decided, in the order of their steps, and who has heard of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Arrivals {
    all: Vec<Arrival>,
    guarded: usize,
    heard: usize,
}

impl Arrivals {
    pub(super) fn push(&mut self, arrival: Arrival) {
        self.all.push(arrival);
    }

    /// Those that a decision for `effective` must keep to, and no earlier one had to.
    pub(super) fn guard(&mut self, effective: StepIndex) -> &[Arrival] {
        let from = self.guarded;
        self.guarded = from.max(self.all.partition_point(|arrival| arrival.from <= effective));
        &self.all[from..self.guarded]
    }

    /// Those that `line` is the first to have trained on.
    pub(super) fn hear(&mut self, line: StepsCompleted) -> &[Arrival] {
        let from = self.heard;
        self.heard = from.max(self.all.partition_point(|arrival| arrival.from.0 < line.0));
        &self.all[from..self.heard]
    }

    /// Those that no line has trained on yet.
    pub(super) fn unheard(&self) -> &[Arrival] {
        &self.all[self.heard..]
    }
}

/// Changes that the config plans, as the decisions of the first decision point.
///
/// # Errors
/// Why one cannot be decided there.
pub fn planned(config: &LoopConfig, facts: &[DomainFacts]) -> Result<Vec<Decision>, String> {
    // An engine without plans says what each would be.
    let mut engine = Ate::new(
        &LoopConfig {
            planned: Vec::new(),
            ..config.clone()
        },
        facts,
    );
    let mut decisions = Vec::with_capacity(config.planned.len());
    for (id, (step, change)) in (1..).zip(&config.planned) {
        let at = |reason: String| format!("data.later at step {step}: {reason}");
        let line = engine
            .schedule
            .next_point(StepsCompleted(0))
            .ok_or_else(|| at("the run has no decision points".to_owned()))?;
        let earliest = engine.schedule.effective(line);
        if *step < earliest {
            return Err(at(format!("the first step that can be decided is {earliest}")));
        }
        engine.check_change(change).map_err(|refused| at(refused.0))?;
        let decision = Decision {
            id: DecisionId(id),
            line,
            effective: *step,
            kind: DecisionKind::Data(engine.with_shares(change, *step)),
            by: DecisionAuthor::Controller(PLANNER.to_owned()),
            reason: "planned by the config".to_owned(),
        };
        engine.course.adopt(&decision).map_err(at)?;
        engine.take(&decision);
        decisions.push(decision);
    }
    Ok(decisions)
}

impl Ate {
    /// A change with shares for its new domains: those that it states, or those by size, each within the guards of its first
    /// step where a controller adapts. A whole mixture stays what it is: whoever states one forces it.
    pub(super) fn with_shares(&self, change: &DataChange, from: StepIndex) -> DataChange {
        let before = self.sizes.len();
        let new: Vec<f64> = change
            .new_domains(before)
            .map(|edition| edition.train_tokens as f64)
            .collect();
        let stated = change.shares(new.len()).map(<[f64]>::to_vec);
        let mut shares = match stated {
            // For the course to refuse.
            Some(shares) if check_shares(&shares).is_err() => return change.clone(),
            Some(shares) => shares,
            None if change.weights.is_empty() => self.natural_shares(change, &new),
            None => return change.clone(),
        };
        if self.adapts() {
            let count = before + new.len();
            let tokens = self.config.tokens_before(from);
            let range = |train_tokens: &f64| share_range(&self.config, count, *train_tokens, tokens);
            let ranges: Vec<(f64, f64)> = new.iter().map(range).collect();
            for (share, (low, high)) in shares.iter_mut().zip(&ranges) {
                *share = share.clamp(*low, *high);
            }
            // What is left is enough for the floors of the others; it is taken from what is above the new ones' own.
            let most = 1.0 - super::weight_floor(count) * before as f64;
            let (sum, floors) = (
                shares.iter().sum::<f64>(),
                ranges.iter().map(|(low, _)| low).sum::<f64>(),
            );
            if sum > most {
                let kept = ((most - floors) / (sum - floors)).max(0.0);
                for (share, (low, _)) in shares.iter_mut().zip(&ranges) {
                    *share = low + (*share - low) * kept;
                }
            }
        }
        DataChange {
            weights: shares,
            ..change.clone()
        }
    }

    /// Shares in proportion to training tokens, of all domains that there are then.
    fn natural_shares(&self, change: &DataChange, new: &[f64]) -> Vec<f64> {
        let mut sizes = self.sizes.clone();
        for edition in &change.domains {
            if let Some(size) = sizes.get_mut(usize::from(edition.domain)) {
                *size = edition.train_tokens as f64;
            }
        }
        let all: f64 = sizes.iter().chain(new).sum();
        new.iter().map(|tokens| tokens / all.max(1.0)).collect()
    }

    /// Guards and controllers hear of what has come.
    pub(super) fn hear(&mut self, line: StepsCompleted) {
        for arrival in self.arrivals.hear(line) {
            for controller in self.controller.iter_mut().chain(&mut self.shadows) {
                controller.arrive(arrival);
            }
        }
        if self.schedule.is_point(line) {
            let effective = self.schedule.effective(line);
            self.arrivals
                .guard(effective)
                .iter()
                .for_each(|arrival| self.guards.arrive(arrival));
        }
    }

    /// Claims as many as there are domains at the effective step. What no line has trained on yet claims nothing.
    pub(super) fn fill(&self, claims: &mut super::Claims, effective: StepIndex) {
        let due = self
            .arrivals
            .unheard()
            .iter()
            .filter(|arrival| arrival.from <= effective);
        for arrival in due {
            let note = |what: &str| format!("{what} from step {} on", arrival.from);
            for text in &arrival.replaced {
                // A domain that has not come itself may have other text already.
                if let (Some(claim), Some(input)) =
                    (claims.claims.get_mut(text.domain), claims.inputs.get_mut(text.domain))
                {
                    *claim = None;
                    *input = note("other text");
                }
            }
            let count = arrival.before + arrival.new.len();
            claims.claims.resize(count, None);
            claims.inputs.resize(count, note("trained on"));
        }
    }
}

impl Guards {
    fn arrive(&mut self, arrival: &Arrival) {
        arrival.share(&mut self.prior);
        self.train_tokens.resize(self.prior.len(), 0.0);
        self.since.resize(self.prior.len(), None);
        for text in arrival.replaced.iter().chain(&arrival.new) {
            self.train_tokens[text.domain] = text.train_tokens;
            self.since[text.domain] = Some(arrival.from);
        }
    }
}
