//! What a config needs on given hardware: memory by term, step time, what fits, what to change. Pure: no I/O, no clock.
//!
//! The numbers are for the parallelism that exists: data parallel, with optimizer state cut into shards and replicated
//! (ZeRO-1). Parameter sharding and pipeline stages are not planned for, since they cannot be run.

pub mod advice;
pub mod hardware;
pub mod memory;
pub mod model;
pub mod render;
pub mod time;

#[cfg(test)]
mod tests;

pub use hardware::Hardware;

use memory::{Place, Shares, Term};
use serde::Serialize;
use tarazed_domain::config::{ClusterDevice, Config, ConfigError};
use tarazed_kernels::cuda::shapes;
use time::StepTime;

/// The whole answer.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Plan {
    /// Name of the run.
    pub name: String,
    /// What it would run on.
    pub hardware: Hardware,
    /// Ranks.
    pub ranks: u32,
    /// Parameters of the model.
    pub parameters: u64,
    /// Tokens of one global batch.
    pub tokens_per_step: u64,
    /// Lanes of the rank with most, and of the rank with fewest.
    pub lanes_per_rank: (u32, u32),
    /// Memory of the worst-placed rank.
    pub terms: Vec<Term>,
    /// Sum of its device terms, in bytes.
    pub device_bytes: u64,
    /// Sum of its host terms, in bytes; 0 for CPU ranks, whose terms are all device terms.
    pub host_bytes: u64,
    /// What one rank may use, in bytes: a GPU's memory, or the host's divided by its ranks.
    pub budget_bytes: u64,
    /// Whether it fits.
    pub fits: bool,
    /// The largest device term.
    pub largest_term: &'static str,
    /// Predicted time of a step.
    pub time: StepTime,
    /// Predicted time of the whole run, in seconds, without evaluation, checkpoints and failures.
    pub run_s: f64,
    /// What to change where it does not fit, and what is wasted where it does.
    pub advice: Vec<String>,
}

/// Share of a GPU's memory that may be used: allocators need room.
const GPU_USABLE: f64 = 0.95;
/// Share of a host's memory that may be used: the controller, the page cache and everything else live there.
const HOST_USABLE: f64 = 0.90;

/// Plans `config` on `hardware`: one rank per GPU, or `cluster.ranks` CPU ranks.
///
/// # Errors
/// A [`ConfigError`] where the config cannot run on that many ranks, or GPUs do not take its shapes.
pub fn plan(config: &Config, hardware: &Hardware) -> Result<Plan, ConfigError> {
    let mut config = config.clone();
    if let Hardware::Gpu { count, .. } = hardware {
        config.cluster.ranks = *count;
        config.validate()?;
        shapes::check(&config)?;
    }
    let mut plan = without_advice(&config, hardware);
    plan.advice = advice::advise(&config, &plan);
    Ok(plan)
}

/// What a rank says besides when its device's memory is too small: which term of the plan is the largest, and what makes it
/// smaller. For the world size and the device that the config names; a rank of a smaller world holds more.
#[must_use]
pub fn memory_hint(config: &Config) -> String {
    let (ranks, on_gpu) = (config.cluster.ranks, config.cluster.device == ClusterDevice::Cuda);
    let terms = memory::terms(config, on_gpu, &Shares::of(config, ranks));
    let device = terms.iter().filter(|term| term.place == Place::Device);
    let sum: u64 = device.map(|term| term.bytes).sum();
    let Some(largest) = memory::largest(&terms) else {
        return String::new();
    };
    format!(
        "of the {} that `tarazed plan` counts for the worst-placed of {ranks} ranks, {} are {} ({}): {}",
        render::bytes(sum),
        render::bytes(largest.bytes),
        largest.name,
        largest.formula,
        memory::relief(largest)
    )
}

fn without_advice(config: &Config, hardware: &Hardware) -> Plan {
    let ranks = config.cluster.ranks;
    let shares = Shares::of(config, ranks);
    let terms = memory::terms(config, matches!(hardware, Hardware::Gpu { .. }), &shares);
    let sum = |place| {
        terms
            .iter()
            .filter(|term| term.place == place)
            .map(|term| term.bytes)
            .sum()
    };
    let device_bytes: u64 = sum(Place::Device);
    let budget_bytes = match hardware {
        Hardware::Cpu { memory_bytes, .. } => (*memory_bytes as f64 * HOST_USABLE / f64::from(ranks)) as u64,
        Hardware::Gpu { memory_bytes, .. } => (*memory_bytes as f64 * GPU_USABLE) as u64,
    };
    let largest = memory::largest(&terms);
    let time = time::step_time(config, hardware, &shares, ranks);
    Plan {
        name: config.run.name.clone(),
        hardware: hardware.clone(),
        ranks,
        parameters: shares.parameters,
        tokens_per_step: config.tokens_per_step(),
        lanes_per_rank: (shares.lanes, config.batch.lanes / ranks),
        device_bytes,
        host_bytes: sum(Place::Host),
        budget_bytes,
        fits: device_bytes <= budget_bytes,
        largest_term: largest.map_or("none", |term| term.name),
        run_s: time.step_s * config.run.steps as f64,
        terms,
        time,
        advice: Vec::new(),
    }
}
