//! The sections of the closed loop: who sets the mixture, and what else is decided.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Who sets the mixture.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControllerKind {
    /// The configured weights, for the whole run.
    #[default]
    Static,
    /// ADO-style: weight follows the predicted further progress of each domain (arXiv 2410.11820).
    Ado,
    /// The stages of `mixture.stages`, one after another.
    Schedule,
    /// Online Data Mixing: a bandit with the training loss as reward (arXiv 2312.02406).
    Odm,
    /// Group-DRO-style: weight follows the excess of the held-out loss over a reference (arXiv 2305.10429).
    Excess,
}

impl ControllerKind {
    /// The name in config files and in the trace.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Static => "static",
            Self::Ado => "ado",
            Self::Schedule => "schedule",
            Self::Odm => "odm",
            Self::Excess => "excess",
        }
    }

    /// Whether it decides by held-out losses, and so decides nothing without them.
    #[must_use]
    pub const fn needs_held_out(self) -> bool {
        matches!(self, Self::Ado | Self::Excess)
    }
}

/// `[mixture]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MixtureConfig {
    /// The controller.
    pub controller: ControllerKind,
    /// No decision before this many steps.
    pub start_steps: u64,
    /// Steps between decisions.
    pub interval_steps: u64,
    /// Steps between a decision and its effect; ranks wait only where a decision due has not come.
    pub lag_steps: u64,
    /// Stages of the schedule, in order; the domains' weights hold before the first. With `controller = "schedule"`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<MixtureStage>,
    /// Controllers whose advice is written in the trace, and not followed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub shadow: Vec<ControllerKind>,
    /// Loss of a reference run, in nats, by domain: what `excess` measures against. A domain that is left out is measured
    /// against the floor of its own fitted law.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub reference: BTreeMap<String, f64>,
    /// Passes over a domain's text after which nothing more is drawn of it, whoever sets the mixture; none for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs_max: Option<u64>,
}

impl Default for MixtureConfig {
    fn default() -> Self {
        Self {
            controller: ControllerKind::Static,
            start_steps: 100,
            interval_steps: 50,
            lag_steps: 8,
            stages: Vec::new(),
            shadow: Vec::new(),
            reference: BTreeMap::new(),
            epochs_max: None,
        }
    }
}

impl MixtureConfig {
    /// The part that decides numbers: all of it. A key that came later says nothing where it is absent, so that a run
    /// folder of before stays that of its run.
    #[must_use]
    pub fn identity(&self) -> String {
        let Self {
            controller,
            start_steps,
            interval_steps,
            lag_steps,
            stages,
            shadow,
            reference,
            epochs_max,
        } = self;
        let mut text = format!(
            "MixtureConfig {{ controller: {controller:?}, start_steps: {start_steps}, interval_steps: {interval_steps}, \
             lag_steps: {lag_steps}"
        );
        if !stages.is_empty() {
            text += &format!(", stages: {stages:?}");
        }
        if !shadow.is_empty() {
            text += &format!(", shadow: {shadow:?}");
        }
        if !reference.is_empty() {
            text += &format!(", reference: {reference:?}");
        }
        if let Some(epochs) = epochs_max {
            text += &format!(", epochs_max: {epochs}");
        }
        text + " }"
    }

    /// The first line in which decisions may stand: the first multiple of the interval from `start_steps` on.
    #[must_use]
    pub fn first_point(&self) -> Option<u64> {
        self.start_steps
            .max(1)
            .checked_next_multiple_of(self.interval_steps.max(1))
    }

    /// Whether it needs decision points.
    #[must_use]
    pub fn decides(&self) -> bool {
        self.epochs_max.is_some() || self.controllers().any(|kind| kind != ControllerKind::Static)
    }

    /// All controllers that are asked, the one that is followed first.
    pub fn controllers(&self) -> impl Iterator<Item = ControllerKind> {
        std::iter::once(self.controller).chain(self.shadow.iter().copied())
    }
}

/// `[[mixture.stages]]`: a stage of training with a mixture of its own. One of the three keys says when it begins.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixtureStage {
    /// What people call it, e.g. `knowledge`.
    pub name: String,
    /// At this step (from 0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_step: Option<u64>,
    /// At the first step before which so many training tokens are consumed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_tokens: Option<u64>,
    /// Where the loss is on a plateau, at the earliest so many steps into the stage before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_plateau_after_steps: Option<u64>,
    /// Weight by domain; a domain that is left out has none.
    pub weights: BTreeMap<String, f64>,
}

/// When a stage begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StageStart {
    /// At this step (from 0).
    Step(u64),
    /// At the first step before which so many training tokens are consumed.
    Tokens(u64),
    /// At the first decision that sees a plateau, at the earliest so many steps into the stage before.
    PlateauAfter(u64),
}

impl MixtureStage {
    /// When it begins; none where the config says nothing or more than one thing.
    #[must_use]
    pub const fn start(&self) -> Option<StageStart> {
        match (self.from_step, self.from_tokens, self.on_plateau_after_steps) {
            (Some(step), None, None) => Some(StageStart::Step(step)),
            (None, Some(tokens), None) => Some(StageStart::Tokens(tokens)),
            (None, None, Some(steps)) => Some(StageStart::PlateauAfter(steps)),
            _ => None,
        }
    }
}

/// What is done about a step whose loss or gradient norm is a spike.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpikePolicy {
    /// The gradient is clipped, as always.
    #[default]
    Clip,
    /// The update is left out (OLMo 2, arXiv 2501.00656).
    Skip,
    /// Training goes back to a state before the spike, and on behind the data since (PaLM, arXiv 2204.02311, section 5.1).
    RollbackAndSkip,
}

/// `[policy]`: what the closed loop decides besides the mixture.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyConfig {
    /// Decision points also where nothing else of the config needs them, so that persons can decide.
    pub persons: bool,
    /// What is done about spikes.
    pub spikes: SpikePolicy,
    /// A rollback goes back to a multiple of this many steps; best a multiple of `checkpoint.interval_steps`.
    pub rollback_grain_steps: u64,
    /// And at least so many steps before the spike.
    pub rollback_margin_steps: u64,
    /// Rollbacks that the policy decides in one run at most.
    pub rollbacks_max: u32,
    /// A rollback of the policy is announced so many steps before it could act at the earliest, rounded up to whole
    /// decision intervals, so that a person can veto it; 0 for no notice.
    pub rollback_notice_steps: u64,
    /// The decay of a `wsd` schedule begins where the loss is on a plateau.
    pub decay_on_plateau: bool,
    /// Every line holds the sum of the squares of the lanes' gradients, which the gradient noise scale is made of.
    pub gradient_noise: bool,
    /// When the run ends before `run.steps`.
    pub stop: StopRules,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            persons: false,
            spikes: SpikePolicy::Clip,
            rollback_grain_steps: 100,
            rollback_margin_steps: 100,
            rollbacks_max: 3,
            rollback_notice_steps: 50,
            decay_on_plateau: false,
            gradient_noise: false,
            stop: StopRules::default(),
        }
    }
}

impl PolicyConfig {
    /// Whether nothing of it is set.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it needs decision points.
    #[must_use]
    pub fn decides(&self) -> bool {
        self.persons || self.spikes != SpikePolicy::Clip || self.decay_on_plateau || self.stop.decides()
    }

    /// The part that decides numbers: all of it; nothing where nothing is set. The notice came later: it stands there where
    /// there is one, so that a run of before stays that run without.
    #[must_use]
    pub fn identity(&self) -> String {
        let Self {
            persons,
            spikes,
            rollback_grain_steps,
            rollback_margin_steps,
            rollbacks_max,
            rollback_notice_steps,
            decay_on_plateau,
            gradient_noise,
            stop,
        } = self;
        let unannounced = Self {
            rollback_notice_steps: Self::default().rollback_notice_steps,
            ..self.clone()
        };
        if unannounced.is_default() {
            return String::new();
        }
        let mut text = format!(
            ";policy=PolicyConfig {{ persons: {persons:?}, spikes: {spikes:?}, rollback_grain_steps: {rollback_grain_steps}, \
             rollback_margin_steps: {rollback_margin_steps}, rollbacks_max: {rollbacks_max}, \
             decay_on_plateau: {decay_on_plateau:?}, gradient_noise: {gradient_noise:?}, stop: {stop:?}"
        );
        if *spikes == SpikePolicy::RollbackAndSkip && *rollback_notice_steps > 0 {
            text += &format!(", rollback_notice_steps: {rollback_notice_steps}");
        }
        text + " }"
    }
}

/// `[policy.stop]`: each rule that is set ends the run by a decision.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StopRules {
    /// At this many training tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Where the mean of the domains' held-out losses, in nats, is at or below this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heldout_loss: Option<f64>,
    /// Where the training loss is on a plateau, at the earliest at this many steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plateau_after_steps: Option<u64>,
}

impl StopRules {
    /// Whether any rule is set.
    #[must_use]
    pub fn decides(&self) -> bool {
        *self != Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run of before the key stays that run.
    #[test]
    fn a_limit_of_passes_is_part_of_a_run_that_has_one() {
        let without = MixtureConfig::default();
        let limited = |epochs| MixtureConfig {
            epochs_max: Some(epochs),
            ..MixtureConfig::default()
        };
        assert!(!without.identity().contains("epochs_max") && !without.decides());
        assert!(limited(4).decides());
        assert_ne!(limited(4).identity(), limited(5).identity());
        assert!(!toml::to_string(&without).unwrap_or_default().contains("epochs_max"));
    }
}
