//! What a run's `config.toml`, as resolved, says about the order of its data.

use crate::report::Unusable;
use std::path::Path;
use toml::{Table, Value};

#[derive(Clone, Debug)]
pub struct Config {
    pub seed: u64,
    pub context: u64,
    /// Sequences of a full batch.
    pub sequences_per_step: u32,
    /// How batches grow to that.
    pub ramp: Option<Ramp>,
    /// Name and weight of each domain, in order.
    pub domains: Vec<(String, f64)>,
    /// Lines in which decisions may stand: the first, and every so many; none for a static mixture.
    pub decision_points: Option<(u64, u64)>,
    pub lag_steps: u64,
    pub evaluation_interval_steps: u64,
    pub held_out_sequences_max: u64,
}

/// Batches begin with so many sequences, and grow by so many at each rise, until so many samples are consumed.
#[derive(Clone, Copy, Debug)]
pub struct Ramp {
    pub start: u32,
    pub step: u32,
    pub samples: u64,
}

/// Sequences of one batch at most.
const SEQUENCES_MAX: u64 = 1 << 24;
const DOMAINS_MAX: usize = 256;

impl Config {
    pub fn load(path: &Path) -> Result<Self, Unusable> {
        let unusable = |why: String| Unusable(format!("{}: {why}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|why| unusable(why.to_string()))?;
        let table: Table = text.parse().map_err(|why: toml::de::Error| unusable(why.to_string()))?;
        Self::read(&table).map_err(unusable)
    }

    fn read(table: &Table) -> Result<Self, String> {
        let lanes = whole(table, "batch.lanes")?;
        let per_lane = whole(table, "batch.sequences_per_lane")?;
        let sequences = lanes
            .checked_mul(per_lane)
            .filter(|count| (1..=SEQUENCES_MAX).contains(count));
        let mut domains = Vec::new();
        for domain in value(table, "data.domains")?
            .as_array()
            .ok_or("data.domains is no list")?
        {
            let domain = domain.as_table().ok_or("a domain is no table")?;
            let name = value(domain, "name")?.as_str().ok_or("a domain's name is no text")?;
            if domains.iter().any(|(other, _)| other == name) {
                return Err(format!("the domain '{name}' stands twice"));
            }
            domains.push((
                name.to_owned(),
                float(value(domain, "weight")?).ok_or("a domain's weight is no number")?,
            ));
        }
        if !(1..=DOMAINS_MAX).contains(&domains.len()) {
            return Err(format!("{} domains", domains.len()));
        }
        let interval = whole(table, "mixture.interval_steps")?.max(1);
        let first = whole(table, "mixture.start_steps")?.max(1).next_multiple_of(interval);
        Ok(Self {
            seed: whole(table, "run.seed")?,
            context: whole(table, "model.context")?.max(1),
            sequences_per_step: sequences.ok_or("the batch has no size")? as u32,
            domains,
            ramp: ramp(table)?,
            decision_points: decides(table)?.then_some((first, interval)),
            lag_steps: whole(table, "mixture.lag_steps")?,
            evaluation_interval_steps: whole(table, "evaluation.interval_steps")?,
            held_out_sequences_max: whole(table, "evaluation.sequences_per_domain_max")?,
        })
    }

    /// Sequences of a step before which so many samples were consumed.
    pub fn sequences(&self, consumed: u64) -> u32 {
        let Some(ramp) = self.ramp else {
            return self.sequences_per_step;
        };
        let rises = u128::from((self.sequences_per_step - ramp.start) / ramp.step);
        let rise = (u128::from(consumed) * rises / u128::from(ramp.samples)).min(rises);
        ramp.start + ramp.step * rise as u32
    }

    /// Whether decisions may stand in the line of this step.
    pub fn is_decision_point(&self, step: u64) -> bool {
        self.decision_points
            .is_some_and(|(first, interval)| step >= first && step.is_multiple_of(interval))
    }

    pub const fn is_evaluation(&self, step: u64) -> bool {
        self.evaluation_interval_steps > 0 && step.is_multiple_of(self.evaluation_interval_steps)
    }
}

/// Whether anything of the run is decided while it runs.
fn decides(table: &Table) -> Result<bool, String> {
    let followed = match value(table, "mixture.controller")?.as_str() {
        Some("static") => false,
        Some("ado" | "odm" | "excess" | "schedule") => true,
        other => {
            return Err(format!(
                "mixture.controller is {other:?}, which this verifier does not know"
            ));
        }
    };
    let advised =
        value(table, "mixture.shadow").is_ok_and(|shadow| shadow.as_array().is_some_and(|all| !all.is_empty()));
    let is_true = |path: &str| value(table, path).is_ok_and(|value| value.as_bool() == Some(true));
    let acts_on_spikes = value(table, "policy.spikes").is_ok_and(|spikes| spikes.as_str() != Some("clip"));
    let stops = value(table, "policy.stop").is_ok_and(|stop| stop.as_table().is_some_and(|rules| !rules.is_empty()));
    let limited = value(table, "mixture.epochs_max").is_ok();
    let asked = limited || is_true("policy.persons") || is_true("policy.decay_on_plateau");
    Ok(followed || advised || acts_on_spikes || stops || asked)
}

fn ramp(table: &Table) -> Result<Option<Ramp>, String> {
    if value(table, "batch.ramp").is_err() {
        return Ok(None);
    }
    let full = whole(table, "batch.lanes")?.saturating_mul(whole(table, "batch.sequences_per_lane")?);
    let (start, step) = (
        whole(table, "batch.ramp.start_sequences")?,
        whole(table, "batch.ramp.step_sequences")?,
    );
    let samples = whole(table, "batch.ramp.samples")?;
    let leads = start > 0 && step > 0 && start < full && (full - start).is_multiple_of(step) && samples > 0;
    if !leads || full > SEQUENCES_MAX {
        return Err("batch.ramp does not lead to the full batch".into());
    }
    Ok(Some(Ramp {
        start: start as u32,
        step: step as u32,
        samples,
    }))
}

fn value<'a>(table: &'a Table, path: &str) -> Result<&'a Value, String> {
    let mut parts = path.split('.');
    let first = parts.next().and_then(|name| table.get(name));
    parts
        .fold(first, |value, name| value?.get(name))
        .ok_or_else(|| format!("{path} is missing"))
}

fn whole(table: &Table, path: &str) -> Result<u64, String> {
    let number = value(table, path)?
        .as_integer()
        .and_then(|number| u64::try_from(number).ok());
    number.ok_or_else(|| format!("{path} is no whole number from 0 up"))
}

fn float(value: &Value) -> Option<f64> {
    value
        .as_float()
        .or_else(|| value.as_integer().map(|whole| whole as f64))
}
