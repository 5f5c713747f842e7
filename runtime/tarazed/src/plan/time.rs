//! Predicted time of a step: a stated formula over stated assumptions, not a measurement.

use super::hardware::Hardware;
use super::memory::Shares;
use super::model::flops_per_token;
use serde::Serialize;
use tarazed_domain::config::Config;

/// Share of a GPU's dense bf16 rate that training reaches. Published runs of dense models: 33-53%.
const GPU_MFU: f64 = 0.40;
/// f32 rate of one CPU thread in training, in FLOP/s. Small matrices on a thread with AVX-512; half of that with AVX2.
const CPU_FLOPS_PER_THREAD: f64 = 50e9;
/// Bytes per second that one rank sends or receives: within one host of GPUs (NVLink, 450 GB/s, 70% of it).
const NVLINK_BYTES_PER_S: f64 = 315e9;
/// The same between hosts (one 400 Gb/s adapter a GPU, 80% of it).
const NETWORK_BYTES_PER_S: f64 = 40e9;
/// The same between processes of one CPU host, over sockets.
const SOCKET_BYTES_PER_S: f64 = 0.7e9;
/// GPUs of one host.
const GPUS_PER_HOST: u32 = 8;
/// Memory bandwidth of one CPU host, in bytes per second.
const HOST_BYTES_PER_S: f64 = 20e9;
/// Share of the memory bandwidth that the update pass reaches.
const UPDATE_EFFICIENCY: f64 = 0.7;
/// Bytes the update pass moves per element: gradient, master weight and moments read, the last three written, the working
/// weight written.
const UPDATE_BYTES_PER_ELEMENT: f64 = 30.0;

/// A step's predicted time, in seconds.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct StepTime {
    /// Forward and backward of the rank with most lanes.
    pub compute_s: f64,
    /// Partial gradients to the primaries, and reduced ones on to the replicas.
    pub reduce_s: f64,
    /// Update of primary and replica shards.
    pub update_s: f64,
    /// All-gather of the working weights.
    pub gather_s: f64,
    /// Sum of the four.
    pub step_s: f64,
    /// Tokens per second of all ranks.
    pub tokens_per_s: f64,
    /// FLOPs of one token, forward and backward.
    pub flops_per_token: f64,
    /// What was assumed.
    pub assumptions: Vec<String>,
}

struct Rates {
    flops_per_s: f64,
    link_bytes_per_s: f64,
    update_bytes_per_s: f64,
    element_bytes: f64,
    assumptions: Vec<String>,
}

fn rates(config: &Config, hardware: &Hardware, ranks: u32) -> Rates {
    match hardware {
        Hardware::Cpu { cores, .. } => {
            let threads = f64::from(config.cluster.threads_per_rank).min(f64::from(*cores) / f64::from(ranks));
            Rates {
                flops_per_s: threads * CPU_FLOPS_PER_THREAD,
                link_bytes_per_s: SOCKET_BYTES_PER_S,
                update_bytes_per_s: HOST_BYTES_PER_S / f64::from(ranks),
                element_bytes: 4.0,
                assumptions: vec![
                    format!(
                        "{:.0} GFLOP/s a thread in f32, {threads:.2} threads a rank",
                        CPU_FLOPS_PER_THREAD / 1e9
                    ),
                    format!("{:.1} GB/s a rank between processes", SOCKET_BYTES_PER_S / 1e9),
                    format!(
                        "{:.0} GB/s memory bandwidth, shared by the ranks",
                        HOST_BYTES_PER_S / 1e9
                    ),
                ],
            }
        }
        Hardware::Gpu {
            peak_tflops,
            bandwidth_gb_per_s,
            ..
        } => {
            let link = if ranks <= GPUS_PER_HOST {
                NVLINK_BYTES_PER_S
            } else {
                NETWORK_BYTES_PER_S
            };
            Rates {
                flops_per_s: *peak_tflops as f64 * 1e12 * GPU_MFU,
                link_bytes_per_s: link,
                update_bytes_per_s: *bandwidth_gb_per_s as f64 * 1e9 * UPDATE_EFFICIENCY,
                element_bytes: 2.0,
                assumptions: vec![
                    format!("{:.0}% of {peak_tflops} TFLOP/s (dense bf16)", GPU_MFU * 100.0),
                    format!("{:.0} GB/s a rank between GPUs", link / 1e9),
                    format!(
                        "{:.0}% of {bandwidth_gb_per_s} GB/s memory bandwidth in the update",
                        UPDATE_EFFICIENCY * 100.0
                    ),
                ],
            }
        }
    }
}

/// Predicts a step with `ranks` ranks.
///
/// `step = compute + reduce + update + gather`: the exchanges follow the backward pass, they do not overlap it.
/// `compute = tokens of the rank with most lanes × FLOPs per token / rate`; `reduce = (others' partials of the own primary
/// shards + own replicas' reduced gradients) / link`; `gather = working bytes × (1 - 1/ranks) / link`.
#[must_use]
pub fn step_time(config: &Config, hardware: &Hardware, shares: &Shares, ranks: u32) -> StepTime {
    let rates = rates(config, hardware, ranks);
    let flops = flops_per_token(&config.model);
    let lane_tokens = f64::from(config.batch.sequences_per_lane) * config.model.context as f64;
    let compute_s = f64::from(shares.lanes) * lane_tokens * flops / rates.flops_per_s;
    let taken_in = (shares.foreign_nodes * shares.primaries + shares.replicas) * shares.shard_elements;
    let reduce_s = taken_in as f64 * 4.0 / rates.link_bytes_per_s;
    let updated = ((shares.primaries + shares.replicas) * shares.shard_elements) as f64;
    let update_s = updated * UPDATE_BYTES_PER_ELEMENT / rates.update_bytes_per_s;
    let elsewhere = 1.0 - 1.0 / f64::from(ranks);
    let gather_s = shares.parameters as f64 * rates.element_bytes * elsewhere / rates.link_bytes_per_s;
    let step_s = compute_s + reduce_s + update_s + gather_s;
    StepTime {
        compute_s,
        reduce_s,
        update_s,
        gather_s,
        step_s,
        tokens_per_s: config.tokens_per_step() as f64 / step_s,
        flops_per_token: flops,
        assumptions: rates.assumptions,
    }
}
