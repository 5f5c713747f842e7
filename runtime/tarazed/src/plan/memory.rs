//! Memory of the worst-placed rank, term by term, as the step uses it. Every term carries its formula.

use super::model::{ParameterCount, layer_activation_elements, layer_statistics, temporary_elements};
use serde::Serialize;
use std::convert::Infallible;
use tarazed_domain::config::Config;
use tarazed_domain::lanes::{LaneRange, LaneTree, Node, TreeFold};
use tarazed_domain::layout::{ParameterLayout, ShardLayout};
use tarazed_kernels::cuda::STAGING_BYTES;
use tarazed_kernels::cuda::driver::GEMM_WORKSPACE_BYTES;
use tarazed_kernels::cuda::table::{embed_scratch_bytes, head_gradient_elements, norm_partials};
use tarazed_kernels::{Attention, cpu, cuda};
use tarazed_model::logits_rows;

/// Driver context, libraries and communicator buffers of one GPU, in bytes. Assumed, not computed.
const GPU_CONTEXT_BYTES: u64 = 2_500_000_000;
/// Program, threads' stacks and sockets of one rank process, in bytes. Assumed, not computed.
const PROCESS_BYTES: u64 = 64_000_000;

/// Where a term lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// In the memory that the rank computes in: the GPU's, or the host's for a CPU rank.
    Device,
    /// In host memory beside a GPU.
    Host,
}

/// One use of memory.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Term {
    /// What it is for.
    pub name: &'static str,
    /// Where it lies.
    pub place: Place,
    /// Bytes on the worst-placed rank.
    pub bytes: u64,
    /// How it was computed.
    pub formula: String,
}

/// What the config and the world size make of the state, on the worst-placed rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shares {
    /// Parameters.
    pub parameters: u64,
    /// Lanes of the rank with most.
    pub lanes: u32,
    /// f32 gradient buffers that folding those lanes holds at once.
    pub gradient_buffers: u64,
    /// Partial gradients that a rank ships, at most: its maximal nodes.
    pub own_nodes: u64,
    /// Partial gradients that a rank takes in from the others: their maximal nodes.
    pub foreign_nodes: u64,
    /// Compute threads that work at once, each on a lane of its own.
    pub threads: u64,
    /// Elements of the largest optimizer shard.
    pub shard_elements: u64,
    /// Optimizer shards in all.
    pub shard_count: u64,
    /// Shards a rank is primary of, at most.
    pub primaries: u64,
    /// Shards a rank is a replica of, at most.
    pub replicas: u64,
}

impl Shares {
    /// For `ranks` ranks, all of one speed.
    #[must_use]
    pub fn of(config: &Config, ranks: u32) -> Self {
        let count = ParameterCount::of(&config.model);
        // Blocks depend on the two groups' sizes alone, so one tensor stands for each group.
        let group = |name: &str, elements: u64, decays| (name.to_owned(), vec![elements as usize], decays);
        let layout = ParameterLayout::new(
            [
                group("decaying", count.embedding + count.multiplied, true),
                group("norms", count.norms, false),
            ],
            config.optimizer.block_elements,
        );
        let shards = ShardLayout::new(&layout, config.optimizer.shards);
        let shard_elements = shards
            .shards()
            .map(|shard| shards.elements(shard).len())
            .max()
            .unwrap_or(0);
        let shard_count = shards.shard_count() as u64;
        let copies = u64::from(config.optimizer.replicas.min(ranks));
        let tree = LaneTree::new(config.batch.lanes);
        let ranges = tree.assign(&vec![1; ranks as usize]);
        let nodes: Vec<u64> = ranges
            .iter()
            .map(|&range| tree.maximal_nodes(range).len() as u64)
            .collect();
        let lanes = ranges.iter().map(|range| range.len() as u32).max().unwrap_or(0);
        let threads = u64::from(config.cluster.threads_per_rank.min(lanes));
        Self {
            parameters: count.total(),
            lanes,
            gradient_buffers: ranges.iter().map(|&range| fold_buffers(tree, range)).max().unwrap_or(0)
                + threads.saturating_sub(1),
            own_nodes: nodes.iter().max().copied().unwrap_or(0),
            foreign_nodes: nodes.iter().sum::<u64>() - nodes.iter().min().copied().unwrap_or(0),
            threads,
            shard_elements: shard_elements as u64,
            shard_count,
            primaries: shard_count.div_ceil(u64::from(ranks)),
            replicas: (shard_count * (copies - 1)).div_ceil(u64::from(ranks)),
        }
    }
}

/// Buffers that a rank with `range` holds at most while its lanes finish in order: the one being summed and those waiting.
fn fold_buffers(tree: LaneTree, range: LaneRange) -> u64 {
    let mut fold = TreeFold::new(tree, range);
    let mut peak = 0;
    for lane in range.lanes() {
        peak = peak.max(fold.held_count() + 1);
        let added: Result<(), Infallible> = fold.insert(Node::leaf(lane), (), |(), ()| Ok(()));
        match added {
            Ok(()) => {}
        }
    }
    peak as u64
}

/// The largest of the terms that lie where the rank computes.
#[must_use]
pub fn largest(terms: &[Term]) -> Option<&Term> {
    let device = terms.iter().filter(|term| term.place == Place::Device);
    device.max_by_key(|term| term.bytes)
}

/// What makes a term smaller, as keys of the config.
#[must_use]
pub fn relief(term: &Term) -> &'static str {
    match term.name {
        "activations" | "workspace" => {
            "lower cluster.threads_per_rank, or batch.micro_batch_sequences (a new run: it changes rounding)"
        }
        "products and partial sums" => "lower cluster.threads_per_rank",
        "lane gradients" => {
            "use more ranks, so that each folds fewer lanes, or lower cluster.threads_per_rank or batch.lanes (a new run: lanes decide \
             numbers)"
        }
        "master weights" | "moments" | "reduced gradients" | "checkpoint snapshot" => {
            "use more ranks, with as many optimizer.shards, so that each holds a smaller part of the state"
        }
        "replicas" => "use more ranks, or set optimizer.replicas to 1: a lost rank then costs a restore",
        "others' partials" => {
            "use more ranks with as many optimizer.shards, or a world size that divides batch.lanes, which ships one node a rank"
        }
        // Every rank holds them whole.
        _ => "use a device with more memory or a smaller model",
    }
}

/// The terms, in a fixed order; for a rank that computes on a GPU, or on processors.
#[must_use]
pub fn terms(config: &Config, on_gpu: bool, shares: &Shares) -> Vec<Term> {
    let mut terms = state_terms(shares, on_gpu);
    terms.extend(working_terms(config, shares, on_gpu));
    if on_gpu {
        terms.extend(gpu_terms(config, shares));
    }
    terms
}

/// What a CUDA device needs besides, as its streams and the data plane's way over the host use it.
fn gpu_terms(config: &Config, shares: &Shares) -> [Term; 3] {
    let (model, threads) = (&config.model, shares.threads);
    let tokens = config.batch.micro_batch_sequences as usize * model.context;
    let (partials, _) = norm_partials(tokens);
    let of_heads = head_gradient_elements(&Attention {
        sequences: config.batch.micro_batch_sequences as usize,
        context: model.context,
        heads: model.heads,
        kv_heads: model.kv_heads,
        head_dim: model.head_dim(),
    });
    let sums = (partials * model.hidden).max(tokens * model.heads) * 4;
    let sums = sums.max(embed_scratch_bytes(tokens)) as u64 + of_heads as u64 * element_bytes(true);
    let workspace = GEMM_WORKSPACE_BYTES as u64;
    let streams = threads + 1;
    let (staging, n) = (STAGING_BYTES as u64, shares.parameters);
    let (own, foreign) = (shares.own_nodes, shares.foreign_nodes);
    let primary = shares.primaries * shares.shard_elements;
    [
        Term {
            name: "products and partial sums",
            place: Place::Device,
            bytes: threads * (workspace + sums),
            formula: format!("{threads} threads x ({workspace} B of product workspace + {sums} B of partial sums)"),
        },
        Term {
            name: "pinned staging",
            place: Place::Host,
            bytes: streams * staging,
            formula: format!("{streams} streams x {staging} B"),
        },
        Term {
            name: "exchange staging",
            place: Place::Host,
            bytes: (own * n.saturating_sub(primary) + foreign * primary) * 4,
            formula: format!(
                "({own} own nodes x ({n} parameters - {primary} of primary shards) + {foreign} nodes of other ranks x {primary}) \
                 x 4 B"
            ),
        },
    ]
}

fn state_terms(shares: &Shares, on_gpu: bool) -> Vec<Term> {
    let Shares {
        parameters: n,
        lanes,
        gradient_buffers: buffers,
        foreign_nodes: foreign,
        shard_elements: e,
        primaries: p,
        replicas: r,
        ..
    } = *shares;
    let width = element_bytes(on_gpu);
    let device = |name, bytes, formula| Term {
        name,
        place: Place::Device,
        bytes,
        formula,
    };
    vec![
        device("working weights", n * width, format!("{n} parameters x {width} B")),
        device(
            "lane gradients",
            n * 4 * buffers,
            format!("{n} parameters x 4 B x {buffers} buffers to fold {lanes} lanes in tree order"),
        ),
        device("master weights", p * e * 4, format!("{p} primary shards x {e} x 4 B")),
        device(
            "moments",
            p * e * 8,
            format!("{p} primary shards x {e} x 2 moments x 4 B"),
        ),
        device("replicas", r * e * 12, format!("{r} replica shards x {e} x 12 B")),
        device(
            "reduced gradients",
            (p + r) * e * 4,
            format!("({p} + {r} shards) x {e} x 4 B, held to the barrier and past it"),
        ),
        device(
            "others' partials",
            foreign * p * e * 4,
            format!("{foreign} nodes of other ranks x {p} primary shards x {e} x 4 B"),
        ),
        Term {
            name: "checkpoint snapshot",
            place: if on_gpu { Place::Host } else { Place::Device },
            bytes: p * e * 12,
            formula: format!(
                "{p} primary shards x {e} x 12 B, while a checkpoint is written; twice where a run ends then"
            ),
        },
    ]
}

fn working_terms(config: &Config, shares: &Shares, on_gpu: bool) -> Vec<Term> {
    let model = &config.model;
    let (width, threads) = (element_bytes(on_gpu), shares.threads);
    let tokens = u64::from(config.batch.micro_batch_sequences) * model.context as u64;
    let (layers, hidden, vocabulary) = (model.layers as u64, model.hidden as u64, model.vocabulary as u64);
    let (elements, statistics, temporary) = (
        layer_activation_elements(model),
        layer_statistics(model),
        temporary_elements(model),
    );
    let logits = if on_gpu {
        cuda::LOGITS_ELEMENTS
    } else {
        cpu::LOGITS_ELEMENTS
    };
    let rows = logits_rows(logits, model, config.batch.micro_batch_sequences as usize) as u64;
    let fixed = if on_gpu { GPU_CONTEXT_BYTES } else { PROCESS_BYTES };
    vec![
        Term {
            name: "activations",
            place: Place::Device,
            bytes: threads * tokens * (layers * (elements * width + statistics * 4) + hidden * width),
            formula: format!(
                "{threads} threads x {tokens} tokens of a micro-batch x ({layers} layers x ({elements} x {width} B + {statistics} x 4 \
                 B) + {hidden} x {width} B); elements = 6 hidden + 2 kv + 2 ffn"
            ),
        },
        Term {
            name: "workspace",
            place: Place::Device,
            bytes: threads * (tokens * temporary + rows * vocabulary) * width + fixed,
            formula: format!(
                "{threads} threads x ({tokens} tokens x {temporary} + {rows} rows of logits x {vocabulary}) x {width} B + {} assumed \
                 for {}; elements = 5 hidden + 2 kv + ffn",
                super::render::bytes(fixed),
                if on_gpu {
                    "driver, libraries and communicator"
                } else {
                    "the process"
                }
            ),
        },
    ]
}

const fn element_bytes(on_gpu: bool) -> u64 {
    if on_gpu { 2 } else { 4 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folding_holds_log2_of_the_range_and_one() {
        let tree = LaneTree::new(64);
        let buffers = |start, end| fold_buffers(tree, LaneRange { start, end });
        assert_eq!(buffers(0, 1), 1);
        assert_eq!(buffers(0, 2), 2);
        assert_eq!(buffers(0, 4), 3);
        assert_eq!(buffers(0, 64), 7);
        assert_eq!(buffers(3, 6), 3, "an unaligned range keeps its first lane apart");
        assert_eq!(buffers(5, 5), 0);
    }
}
