//! What fault tolerance costs: a step with replicas against one with a single copy of each optimizer shard, and the parts
//! that both have.
//!
//! Replicas can be switched off (`optimizer.replicas = 1`): no forwarding of reduced gradients, no second update, nothing to
//! compare. Block hashes and the barrier cannot, as the trace needs both; so the hashes are timed by themselves, over the
//! bytes of one rank's shards on one thread, and the barrier by the run's own clock of its phases, waiting for the slowest
//! rank included.

use anyhow::Result;
use std::path::Path;
use std::time::Instant;
use tarazed_domain::BlockIndex;
use tarazed_domain::config::Config;
use tarazed_kernels::{BlockHash, Blocks, CpuDevice, Device, Precision, View};
use tarazed_tests::figures::{Figures, Summary};
use tarazed_tests::harness::{Project, Run};

/// Steps at the start of a run that do not count.
const WARM_UP_STEPS: u64 = 5;

struct Side {
    step_ms: f64,
    barrier_ms: f64,
}

pub fn measure(config: &Path, ranks: u32, rounds: usize, steps: u64) -> Result<Figures> {
    let project = Project::of(config);
    let (mut on_ms, mut off_ms, mut barrier_ms, mut ratios) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let side = |replicas: u32| run(&project, ranks, steps, replicas, round);
        // The order alternates, so that neither side always meets the warmer machine.
        let (on, off) = if round.is_multiple_of(2) {
            let on = side(2);
            (on, side(1))
        } else {
            let off = side(1);
            (side(2), off)
        };
        println!(
            "round {}: {:.1} ms with replicas, {:.1} ms without, ratio {:.4}",
            round + 1,
            on.step_ms,
            off.step_ms,
            on.step_ms / off.step_ms
        );
        ratios.push(on.step_ms / off.step_ms);
        barrier_ms.push(on.barrier_ms);
        on_ms.push(on.step_ms);
        off_ms.push(off.step_ms);
    }
    let hash_ms = hash_ms(&Config::load(config, &[])?, ranks)?;
    let (on, off) = (Summary::of(&on_ms), Summary::of(&off_ms));
    let (ratio, barrier) = (Summary::of(&ratios), Summary::of(&barrier_ms));
    let share = |ms: f64| 100.0 * ms / on.median;
    println!("step with replicas     {on} ms");
    println!("step without           {off} ms");
    println!("ratio                  {ratio}");
    println!(
        "hashes of one rank's two copies {hash_ms:.2} ms, {:.2}% of a step",
        share(hash_ms)
    );
    println!(
        "barrier                {:.2} ms, {:.2}% of a step, waiting included",
        barrier.median,
        share(barrier.median)
    );
    Ok(Figures::new("overhead")
        .number("hash_ms", hash_ms)
        .number("hash_percent", share(hash_ms))
        .number("barrier_percent", share(barrier.median))
        .summary("with_replicas_ms", on)
        .summary("without_replicas_ms", off)
        .summary("ratio", ratio)
        .summary("barrier_ms", barrier))
}

fn run(project: &Project, ranks: u32, steps: u64, replicas: u32, round: usize) -> Side {
    let train = project
        .train(&format!("replicas-{replicas}-{round}"))
        .ranks(ranks)
        .steps(steps)
        .set("optimizer.replicas", &replicas.to_string())
        .set("evaluation.interval_steps", "0")
        .set("checkpoint.interval_steps", "0");
    let mut run = Run::start(&train);
    run.finish().assert_code(0);
    let metrics = run.json_lines("metrics.jsonl");
    let counted = metrics
        .iter()
        .filter(|line| line["step"].as_u64() > Some(WARM_UP_STEPS));
    let (mut step_ms, mut barrier_ms) = (Vec::new(), Vec::new());
    for line in counted {
        step_ms.extend(line["step_ms"].as_f64());
        barrier_ms.extend(line["phase_ms"]["barrier"].as_f64());
    }
    Side {
        step_ms: Summary::of(&step_ms).median,
        barrier_ms: Summary::of(&barrier_ms).median,
    }
}

/// Hashing what one of `ranks` ranks holds: its share of two copies of the state.
fn hash_ms(config: &Config, ranks: u32) -> Result<f64> {
    let layout = tarazed_model::parameter_layout(&config.model, config.optimizer.block_elements);
    let block_count = (2 * layout.block_count()).div_ceil(ranks as usize);
    let device = CpuDevice::new();
    let mut stream = device.stream()?;
    let elements = block_count * layout.block_elements();
    let buffers = [0, 1, 2].map(|_| device.alloc(elements, Precision::Full));
    let [master, first, second] = buffers;
    let (master, first, second) = (master?, first?, second?);
    let blocks = Blocks {
        first: BlockIndex(0),
        block_elements: layout.block_elements(),
    };
    let mut times_ms = Vec::new();
    for _ in 0..15 {
        let mut hashes = vec![BlockHash::default(); block_count];
        let began = Instant::now();
        device.block_hashes(
            &mut stream,
            blocks,
            View::from(&master),
            View::from(&first),
            View::from(&second),
            &mut hashes,
        )?;
        times_ms.push(began.elapsed().as_secs_f64() * 1e3);
    }
    Ok(Summary::of(&times_ms).median)
}
