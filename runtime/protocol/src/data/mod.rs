//! Data cursor, mixture, signals and decisions: pure functions of the committed trace and the config.
//!
//! ```text
//! trace lines ──► signals (TSM) ──► controller (ATE) ──► decision ledger ──► cursor ──► samples of a step
//!      ▲                                                                                     │
//!      └────────────── stats: losses per domain, folded over lanes ◄────────── the step ◄────┘
//! ```
//!
//! - **DATA-1** Every sample of a domain's epoch is in exactly one committed step: [`permutation`] and [`cursor`].
//! - **DATA-2** The cursor is the committed step and the decisions so far; there is no other state: [`cursor`].
//! - **LOOP-1** Same trace, same decisions: [`signals`] and [`controller`] see nothing but trace lines and the config.
//! - **LOOP-2** What a person decides is a recorded decision like any other: [`decision`].
//! - **DET-1**, **DET-2** Loss sums follow the lane tree: [`stats`].
//!
//! Nothing here reads a token, a file or a clock, and no hash map is walked. Logarithms and exponentials come from the
//! `libm` crate, compiled in, so a decision does not depend on the host's C library.

pub mod catalogue;
pub mod composition;
pub mod controller;
pub mod course;
pub mod cursor;
pub mod decision;
mod fit;
pub mod permutation;
mod projection;
pub mod signals;
pub mod stats;
pub mod trajectory;
pub mod weight_log;

use decision::DataChange;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tarazed_domain::config::{BatchSchedule, Config, Language, LearningRateSchedule, MixtureConfig, PolicyConfig};
use tarazed_domain::{StepIndex, StepsCompleted};

/// What the signals and the controller know of a domain before the run: config and data version, nothing measured.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DomainFacts {
    /// Unique name, as in the trace.
    pub name: String,
    /// Language, for reports per language.
    pub language: Language,
    /// Weight in the initial mixture, before normalising.
    pub weight: f64,
    /// Training tokens of one epoch.
    pub train_tokens: u64,
    /// Training sequences of one epoch: whole ones, so a little less than its tokens.
    pub train_sequences: u64,
}

/// What the closed loop is made from besides the data: a function of the config.
#[derive(Clone, PartialEq, Debug)]
pub struct LoopConfig {
    /// Who sets the mixture, and when anything is decided.
    pub mixture: MixtureConfig,
    /// What else is decided.
    pub policy: PolicyConfig,
    /// Course of the learning rate.
    pub rate: LearningRateSchedule,
    /// Sequences of the global batch, by step.
    pub batch: BatchSchedule,
    /// Tokens of one sequence.
    pub context_tokens: u64,
    /// Rollbacks to be decided whatever the loss does, by the decision point's line, with the state that is gone back to: for
    /// rehearsals. No config asks for any.
    pub rehearsed: BTreeMap<StepsCompleted, StepsCompleted>,
    /// Changes of the data that the config plans (`data.later`), by their steps, as the data sets have them.
    pub planned: Vec<(StepIndex, DataChange)>,
}

impl LoopConfig {
    /// That of a run, but for what its data sets say: `planned` is empty.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        Self {
            mixture: config.mixture.clone(),
            policy: config.policy.clone(),
            rate: config.optimizer.schedule.clone(),
            batch: config.batch_schedule(),
            context_tokens: config.model.context as u64,
            rehearsed: BTreeMap::new(),
            planned: Vec::new(),
        }
    }

    /// Training tokens consumed before a step.
    #[must_use]
    pub fn tokens_before(&self, step: StepIndex) -> u64 {
        let samples = self.batch.samples(StepsCompleted(step.0));
        samples.saturating_mul(self.context_tokens)
    }

    /// The first step before which so many training tokens are consumed.
    #[must_use]
    pub fn step_after_tokens(&self, tokens: u64) -> StepIndex {
        self.batch.step_after(tokens.div_ceil(self.context_tokens.max(1)))
    }
}

#[cfg(test)]
pub(crate) mod tests;
