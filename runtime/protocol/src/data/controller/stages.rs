//! **schedule** follows the stages of the config (arXiv 2408.07410, section 2.3: language modelling, then knowledge, then
//! target-oriented data).
//!
//! A stage that begins at a known step is announced in the last decision point that can announce it, and begins at just
//! that step; one that waits for a plateau begins as soon as the decision that sees it can act. A person who pinned the
//! mixture holds stages back; released, the newest one due begins.

use super::{Advice, Arrival, MixtureController, Sight, Stage};
use crate::data::signals::Signals;
use tarazed_domain::StepIndex;
use tarazed_domain::config::ControllerKind;

/// When a stage begins, as far as it is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Begins {
    /// At this step.
    At(StepIndex),
    /// At a plateau, at the earliest so many steps into the stage before.
    OnPlateauAfter(u64),
}

#[derive(Clone, Debug)]
pub(super) struct Stages {
    stages: Vec<Stage>,
    /// Stages announced, and the first step of the newest.
    announced: usize,
    since: StepIndex,
    /// Stages that the last advice would announce.
    advised: usize,
}

impl Stages {
    pub(super) const fn new(stages: Vec<Stage>) -> Self {
        Self {
            stages,
            announced: 0,
            since: StepIndex(0),
            advised: 0,
        }
    }

    /// The first step of a stage if this is the time to announce it.
    fn due(&self, index: usize, sight: &Sight<'_>) -> Option<StepIndex> {
        match self.stages.get(index)?.begins {
            Begins::At(step) => (step < sight.effective_next).then_some(step.max(sight.effective)),
            Begins::OnPlateauAfter(steps) => {
                let old_enough = sight.effective.0 >= self.since.0.saturating_add(steps);
                // What follows a stage that is due itself waits for a plateau of its own.
                let is_next = index == self.announced;
                (is_next && old_enough && sight.signals.plateau == Some(true)).then_some(sight.effective)
            }
        }
    }
}

impl MixtureController for Stages {
    fn kind(&self) -> ControllerKind {
        ControllerKind::Schedule
    }

    fn observe(&mut self, _: &Signals) {}

    fn advise(&mut self, sight: &Sight<'_>) -> Option<Advice> {
        let mut newest = None;
        let mut index = self.announced;
        while let Some(effective) = self.due(index, sight) {
            newest = Some((index, effective));
            index += 1;
        }
        let (index, effective) = newest?;
        self.advised = index + 1;
        let stage = &self.stages[index];
        Some(Advice::Mixture {
            weights: stage.weights.clone(),
            effective,
            reason: match stage.begins {
                Begins::At(step) => format!("stage {} begins, by the config at step {step}", stage.name),
                Begins::OnPlateauAfter(_) => format!("stage {} begins: the loss is on a plateau", stage.name),
            },
        })
    }

    fn decided(&mut self, effective: StepIndex) {
        self.announced = self.advised;
        self.since = effective;
    }

    /// Stages speak of the config's domains, and such a run takes no others.
    fn arrive(&mut self, _: &Arrival) {}

    fn boxed(&self) -> Box<dyn MixtureController> {
        Box::new(self.clone())
    }
}
