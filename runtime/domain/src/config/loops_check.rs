//! Checks of the closed loop's sections and of the batch ramp.

use super::validate::{require, within};
use super::{Config, ConfigError, ControllerKind, LearningRateSchedule, MixtureStage, StageStart};
use crate::limits::{DOMAIN_WEIGHT_MAX, STEPS_MAX};
use std::collections::BTreeSet;

pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    held_out(config)?;
    shadows(config)?;
    stages(config)?;
    reference(config)?;
    // The number of a pass is of 32 bits (`SampleRef`).
    let epochs = config.mixture.epochs_max.unwrap_or(1);
    let remedy = "leave it out for no limit, or choose e.g. 4";
    within("mixture.epochs_max", epochs, 1..=u64::from(u32::MAX), remedy)?;
    super::later::check(config)?;
    policy(config)
}

/// Some controllers decide by held-out losses and nothing else: without them they would wait for ever.
fn held_out(config: &Config) -> Result<(), ConfigError> {
    let Some(kind) = config.mixture.controllers().find(|kind| kind.needs_held_out()) else {
        return without_held_out_losses(config)
            .filter(|_| config.policy.stop.heldout_loss.is_some())
            .map_or(Ok(()), |(key, remedy)| {
                Err(ConfigError::new(
                    key,
                    "is 0, and policy.stop.heldout_loss stops by held-out losses",
                    format!("{remedy}, or leave that rule out"),
                ))
            });
    };
    without_held_out_losses(config).map_or(Ok(()), |(key, remedy)| {
        let name = kind.name();
        let what = if kind == config.mixture.controller {
            format!("mixture.controller = \"{name}\"")
        } else {
            format!("\"{name}\" of mixture.shadow")
        };
        Err(ConfigError::new(
            key,
            format!("is 0, and {what} decides by held-out losses alone"),
            format!("{remedy}, or set mixture.controller = \"static\""),
        ))
    })
}

/// The key that leaves the run without held-out losses, and what to do about it.
fn without_held_out_losses(config: &Config) -> Option<(&'static str, &'static str)> {
    [
        (
            "evaluation.interval_steps",
            config.evaluation.interval_steps == 0,
            "evaluate, e.g. every 100 steps",
        ),
        (
            "evaluation.sequences_per_domain_max",
            config.evaluation.sequences_per_domain_max == 0,
            "evaluate e.g. 16 sequences of each domain",
        ),
        (
            "data.held_out_fraction",
            config.data.held_out_fraction == 0.0,
            "hold out e.g. 0.03",
        ),
    ]
    .into_iter()
    .find_map(|(key, is_zero, remedy)| is_zero.then_some((key, remedy)))
}

fn shadows(config: &Config) -> Result<(), ConfigError> {
    let mixture = &config.mixture;
    let mut seen = BTreeSet::from([mixture.controller]);
    for kind in &mixture.shadow {
        require!(
            !matches!(kind, ControllerKind::Static | ControllerKind::Schedule),
            "mixture.shadow",
            format!("\"{}\" has no advice to give", kind.name()),
            "name controllers that adapt: \"ado\", \"odm\", \"excess\""
        );
        require!(
            seen.insert(*kind),
            "mixture.shadow",
            format!("\"{}\" is named already", kind.name()),
            "name each controller once, and not the one that is followed"
        );
    }
    Ok(())
}

fn stages(config: &Config) -> Result<(), ConfigError> {
    let mixture = &config.mixture;
    let scheduled = mixture.controller == ControllerKind::Schedule;
    require!(
        scheduled != mixture.stages.is_empty(),
        "mixture.stages",
        format!(
            "{} stages, and mixture.controller is \"{}\"",
            mixture.stages.len(),
            mixture.controller.name()
        ),
        "a schedule needs stages, and nothing else follows them"
    );
    let context = config.model.context as u64;
    let batch = config.batch_schedule();
    // The first step that a decision can act on.
    let mut earliest = mixture
        .first_point()
        .unwrap_or(u64::MAX)
        .saturating_add(mixture.lag_steps);
    let mut names = BTreeSet::new();
    for (index, stage) in mixture.stages.iter().enumerate() {
        let key = |field: &str| format!("mixture.stages[{index}].{field}");
        require!(
            !stage.name.is_empty() && names.insert(&stage.name),
            key("name"),
            format!("'{}' is empty or stands twice", stage.name),
            "give each stage a name of its own, e.g. \"knowledge\""
        );
        weights(config, stage, &key("weights"))?;
        let begins = match stage.start() {
            Some(StageStart::Step(step)) => step,
            Some(StageStart::Tokens(tokens)) => batch.step_after(tokens.div_ceil(context.max(1))).0,
            Some(StageStart::PlateauAfter(steps)) => earliest.saturating_add(steps),
            None => {
                return Err(ConfigError::new(
                    key("from_step"),
                    "it is not said, or said twice, when the stage begins",
                    "give one of from_step, from_tokens and on_plateau_after_steps",
                ));
            }
        };
        require!(
            begins >= earliest,
            key("from_step"),
            format!("it begins at step {begins}, and no decision for it can act before step {earliest}"),
            "begin it later, or lower mixture.start_steps or mixture.interval_steps"
        );
        // One decision point holds one change of stage.
        earliest = begins.saturating_add(mixture.interval_steps);
    }
    Ok(())
}

fn weights(config: &Config, stage: &MixtureStage, key: &str) -> Result<(), ConfigError> {
    for (name, weight) in &stage.weights {
        require!(
            config.data.domains.iter().any(|domain| domain.name == *name),
            key,
            format!("'{name}' is no domain"),
            "name domains of [[data.domains]]"
        );
        require!(
            (0.0..=DOMAIN_WEIGHT_MAX).contains(weight),
            key,
            format!("the weight {weight} of '{name}' is not in 0..={DOMAIN_WEIGHT_MAX}"),
            "weights are normalised: only their ratios count"
        );
    }
    require!(
        stage.weights.values().any(|weight| *weight > 0.0),
        key,
        "no domain has any weight",
        "give at least one a positive weight"
    );
    Ok(())
}

fn reference(config: &Config) -> Result<(), ConfigError> {
    let mixture = &config.mixture;
    require!(
        mixture.reference.is_empty() || mixture.controllers().any(|kind| kind == ControllerKind::Excess),
        "mixture.reference",
        "only the controller \"excess\" measures against it",
        "leave it out, or ask \"excess\""
    );
    let later = || config.data.later.iter().flat_map(|later| &later.domains);
    for (name, loss) in &mixture.reference {
        require!(
            config.data.domains.iter().any(|domain| domain.name == *name) || later().any(|later| later == name),
            "mixture.reference",
            format!("'{name}' is no domain"),
            "name domains of [[data.domains]] or [[data.later]]"
        );
        require!(
            loss.is_finite() && *loss >= 0.0,
            "mixture.reference",
            format!("the loss {loss} of '{name}' is no loss"),
            "give nats per token of a reference run"
        );
    }
    Ok(())
}

fn policy(config: &Config) -> Result<(), ConfigError> {
    let policy = &config.policy;
    for (key, value, least) in [
        ("policy.rollback_grain_steps", policy.rollback_grain_steps, 1),
        ("policy.rollback_margin_steps", policy.rollback_margin_steps, 0),
        ("policy.rollbacks_max", u64::from(policy.rollbacks_max), 0),
        ("policy.rollback_notice_steps", policy.rollback_notice_steps, 0),
        ("policy.stop.tokens", policy.stop.tokens.unwrap_or(1).min(STEPS_MAX), 1),
        (
            "policy.stop.plateau_after_steps",
            policy.stop.plateau_after_steps.unwrap_or(0),
            0,
        ),
    ] {
        within(key, value, least..=STEPS_MAX, "choose a number of steps of a run")?;
    }
    require!(
        !policy.decay_on_plateau || config.optimizer.schedule.decays_on_demand(),
        "policy.decay_on_plateau",
        "optimizer.schedule has no decay that waits for a decision",
        "set optimizer.schedule.kind = \"wsd\" without decay_from"
    );
    require!(
        policy
            .stop
            .heldout_loss
            .is_none_or(|loss| loss.is_finite() && loss > 0.0),
        "policy.stop.heldout_loss",
        "is no loss that can be reached",
        "give nats per token"
    );
    let on_demand = matches!(
        config.optimizer.schedule,
        LearningRateSchedule::Wsd { decay_from: None, .. }
    );
    require!(
        !on_demand || policy.decides() || config.mixture.decides(),
        "optimizer.schedule.decay_from",
        "a decision is to begin the decay, and this run has no decision points",
        "give the step, or set policy.decay_on_plateau or policy.persons"
    );
    Ok(())
}

/// A ramp leads to the full batch. Its batches need not fill all lanes: they are dealt as evenly as can be.
pub(super) fn ramp(config: &Config) -> Result<(), ConfigError> {
    let batch = &config.batch;
    let Some(ramp) = batch.ramp else { return Ok(()) };
    let full = u64::from(batch.lanes) * u64::from(batch.sequences_per_lane);
    for (key, sequences) in [
        ("batch.ramp.start_sequences", ramp.start_sequences),
        ("batch.ramp.step_sequences", ramp.step_sequences),
    ] {
        within(key, u64::from(sequences), 1..=full, "choose a part of the full batch")?;
    }
    let (start, step) = (u64::from(ramp.start_sequences), u64::from(ramp.step_sequences));
    require!(
        start < full && (full - start).is_multiple_of(step),
        "batch.ramp.step_sequences",
        format!("steps of {step} do not lead from {start} to the {full} sequences of the full batch"),
        "choose a divisor of the way"
    );
    within(
        "batch.ramp.samples",
        ramp.samples,
        1..=crate::limits::GLOBAL_BATCH_SEQUENCES_MAX * STEPS_MAX,
        "give the samples of the whole ramp",
    )
}
