//! What is decided besides the mixture: spikes, the end of a `wsd` schedule, the end of the run.
//!
//! - **skip** At every decision point the bounds of a spike are decided, from committed lines: the expected loss of each
//!   domain, and mean + 6 σ of residual loss and gradient norm (the rule of OLMo 2, arXiv 2501.00656). They act like any
//!   decision, so all ranks judge a step by the same numbers, whenever they joined; a step beyond them leaves the update
//!   out. By domain, because a change of mixture is no spike.
//! - **rollback and skip** Where the loss diverges, the state goes back to that of a line before, and everything else goes
//!   on: step, learning rate, and data, so the samples since are not seen again (the remedy of PaLM, arXiv 2204.02311,
//!   section 5.1, which skipped 200 to 500 batches). Nothing of the trace is taken back: it says what happened. It is
//!   announced `policy.rollback_notice_steps` ahead, so that a person can veto; whatever becomes of it, nothing is announced
//!   again before all lines that are compared are of the time behind it.
//! - **stop**, **decay** Announced one decision point ahead, so that a person can veto; each rule speaks once.

use super::super::LoopConfig;
use super::super::course::Course;
use super::super::decision::{DecisionKind, DecisionSchedule, DiscardedSamples, SpikeBounds};
use super::super::signals::{DIVERGENCE_LINES, DIVERGENCE_REFERENCE_LINES, Signals};
use crate::rollback::notice_steps;
use std::collections::BTreeMap;
use tarazed_domain::config::{PolicyConfig, SpikePolicy};
use tarazed_domain::{StepIndex, StepsCompleted};

/// A decision to be: what, from which step on, and why.
pub(super) type Proposal = (DecisionKind, StepIndex, String);

/// A rule that ends something, once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rule {
    StopAtTokens,
    StopAtLoss,
    StopOnPlateau,
    DecayOnPlateau,
}

#[derive(Clone, Debug)]
pub(super) struct Policy {
    config: PolicyConfig,
    stop_at: Option<StepIndex>,
    interval_steps: u64,
    /// Steps between the notice of a rollback and the line that decides it.
    notice_steps: u64,
    /// No rollback is announced before this line: the lines compared must all be of the time behind the last one.
    quiet_until: StepsCompleted,
    rehearsed: BTreeMap<StepsCompleted, StepsCompleted>,
    spoken: Vec<Rule>,
}

impl Policy {
    pub(super) fn new(config: &LoopConfig) -> Self {
        Self {
            stop_at: config.policy.stop.tokens.map(|tokens| config.step_after_tokens(tokens)),
            interval_steps: config.mixture.interval_steps,
            notice_steps: notice_steps(&config.mixture, &config.policy),
            quiet_until: StepsCompleted(0),
            config: config.policy.clone(),
            rehearsed: config.rehearsed.clone(),
            spoken: Vec::new(),
        }
    }

    /// What is to be decided on a decision point's line.
    pub(super) fn propose(
        &mut self,
        line: StepsCompleted,
        signals: &Signals,
        course: &Course,
        schedule: &DecisionSchedule,
    ) -> Vec<Proposal> {
        let effective = schedule.effective(line);
        let spikes = match self.config.spikes {
            SpikePolicy::Clip => None,
            SpikePolicy::Skip => {
                bounds(signals, course.domains_at(effective)).map(|(kind, reason)| (kind, effective, reason))
            }
            SpikePolicy::RollbackAndSkip => None,
        };
        let rehearsed = self.rehearsed.get(&line).map(|&to| {
            let kind = rollback_to(to, course.domains_at(effective));
            (kind, effective, "a rehearsal".to_owned())
        });
        let back = rehearsed.or_else(|| self.rollback(line, signals, course, effective));
        let mut proposals: Vec<Proposal> = spikes.or(back).into_iter().collect();
        proposals.extend(self.stop(line, signals, course, effective));
        proposals.extend(self.decay(signals, course, effective));
        proposals
    }

    /// What was announced for the step that this line decides on, or a rollback to announce.
    fn rollback(
        &mut self,
        line: StepsCompleted,
        signals: &Signals,
        course: &Course,
        effective: StepIndex,
    ) -> Option<Proposal> {
        if self.config.spikes != SpikePolicy::RollbackAndSkip {
            return None;
        }
        let kind = |to| rollback_to(to, course.domains_at(effective));
        if let Some(notice) = course.notice() {
            // A point between is for whoever vetoes.
            return (notice.what.at == effective).then(|| {
                (
                    kind(notice.what.to),
                    effective,
                    format!("announced by decision {}", notice.by),
                )
            });
        }
        let divergence = signals.divergence?;
        let before = course.rollbacks();
        if course.rollbacks_of_its_own() >= self.config.rollbacks_max as usize {
            return None;
        }
        let settled = |at: StepIndex| {
            let compared = (DIVERGENCE_LINES + DIVERGENCE_REFERENCE_LINES) as u64;
            StepsCompleted(at.0.saturating_add(compared))
        };
        if line < self.quiet_until || before.last().is_some_and(|last| line < settled(last.at)) {
            return None;
        }
        let grain = self.config.rollback_grain_steps.max(1);
        let calm = divergence.since.0.saturating_sub(self.config.rollback_margin_steps);
        // Not into what an earlier one left behind: then to the state before that once more, with other data.
        let to = before.newest_live(StepsCompleted(calm - calm % grain));
        let reason = format!(
            "diverged since line {}: loss {:.4} above the {:.4} of before",
            divergence.since, divergence.rise, divergence.before
        );
        if to == StepsCompleted(0) {
            return None;
        }
        let at = StepIndex(effective.0.saturating_add(self.notice_steps));
        self.quiet_until = settled(at);
        let kind = match self.notice_steps {
            0 => kind(to),
            _ => DecisionKind::RollbackNotice { to },
        };
        Some((kind, at, reason))
    }

    fn stop(
        &mut self,
        line: StepsCompleted,
        signals: &Signals,
        course: &Course,
        effective: StepIndex,
    ) -> Option<Proposal> {
        if course.stop().is_some() {
            return None;
        }
        let stop = &self.config.stop;
        let notice = StepIndex(effective.0.saturating_add(self.interval_steps));
        let at_tokens = self.stop_at.filter(|at| *at <= notice).map(|at| {
            (
                Rule::StopAtTokens,
                at.max(effective),
                "the tokens of the run".to_owned(),
            )
        });
        let at_loss = stop
            .heldout_loss
            .zip(signals.heldout_macro)
            .filter(|(wanted, loss)| loss <= wanted);
        let at_loss = at_loss.map(|(wanted, loss)| {
            let reason = format!("held-out loss {loss:.4} has reached {wanted}");
            (Rule::StopAtLoss, notice, reason)
        });
        let late_enough = stop.plateau_after_steps.is_some_and(|steps| line.0 >= steps);
        let on_plateau = (late_enough && signals.plateau == Some(true))
            .then(|| (Rule::StopOnPlateau, notice, "the loss is on a plateau".to_owned()));
        let rules = [at_tokens, at_loss, on_plateau].into_iter().flatten();
        let (rule, at, reason) = rules
            .filter(|(rule, ..)| !self.spoken.contains(rule))
            .min_by_key(|(_, at, _)| *at)?;
        self.spoken.push(rule);
        Some((DecisionKind::Stop, at, reason))
    }

    fn decay(&mut self, signals: &Signals, course: &Course, effective: StepIndex) -> Option<Proposal> {
        let due = self.config.decay_on_plateau && course.decay().is_none() && signals.plateau == Some(true);
        if !due || self.spoken.contains(&Rule::DecayOnPlateau) {
            return None;
        }
        self.spoken.push(Rule::DecayOnPlateau);
        let notice = StepIndex(effective.0.saturating_add(self.interval_steps));
        Some((DecisionKind::Decay, notice, "the loss is on a plateau".to_owned()))
    }
}

/// What it discards is the data cursor's to say.
pub(super) fn rollback_to(to: StepsCompleted, domain_count: usize) -> DecisionKind {
    DecisionKind::Rollback {
        to,
        discarded: vec![DiscardedSamples { first: 0, count: 0 }; domain_count],
    }
}

/// The bounds of a spike as of this line; none before there are enough lines. Of domains that come later nothing is expected.
fn bounds(signals: &Signals, domain_count: usize) -> Option<(DecisionKind, String)> {
    let mut expected: Vec<Option<f64>> = signals.domains.iter().map(|domain| domain.train_loss).collect();
    expected.resize(domain_count, None);
    let bounds = SpikeBounds {
        expected,
        residual_loss: signals.residual_loss.threshold?,
        grad_norm: signals.grad_norm.threshold?,
    };
    let lines = signals.residual_loss.window.count.min(signals.grad_norm.window.count);
    Some((
        DecisionKind::SpikeBounds(bounds),
        format!("mean + 6 sigma of {lines} lines"),
    ))
}
