//! Tokens per second of a training step, by thread CPU time and by wall clock, with the time of each phase.
//!
//! `cargo run --release -p tarazed-model --example step_speed -- [threads] [micro-batches] [layers hidden ffn heads kv_heads context vocabulary sequences]`

use std::error::Error;
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use tarazed_domain::BlockIndex;
use tarazed_domain::config::ModelConfig;
use tarazed_kernels::{AdamwStep, BlockHash, Blocks, CpuDevice, Device, OptimizerState, Precision, View, ViewMut};
use tarazed_model::{Model, initialise, parameter_layout};

const BLOCK_ELEMENTS: usize = 65_536;

fn main() -> Result<(), Box<dyn Error>> {
    let mut sizes = [1, 8, 6, 256, 688, 8, 4, 128, 4096, 4];
    for (size, argument) in sizes.iter_mut().zip(std::env::args().skip(1)) {
        *size = argument.parse()?;
    }
    let [
        threads,
        micro_batches,
        layers,
        hidden,
        ffn,
        heads,
        kv_heads,
        context,
        vocabulary,
        sequences,
    ] = sizes;
    let config = ModelConfig {
        layers,
        hidden,
        ffn,
        heads,
        kv_heads,
        context,
        vocabulary,
        rope_theta: 10_000.0,
        norm_eps: 1e-5,
        init_std: 0.02,
        norm_init: 1.0,
        initial: None,
    };
    let layout = parameter_layout(&config, BLOCK_ELEMENTS);
    let model = Model::new(&config, &layout, CpuDevice::new())?;
    let device = *model.device();
    let mut weights = device.alloc(layout.flat_elements(), Precision::Working)?;
    initialise(&layout, &config, 1, 0..layout.flat_elements(), &mut weights);
    println!(
        "{} parameters, {threads} thread(s), {micro_batches} micro-batches of {sequences} x {context} tokens each, {}",
        layout.parameter_count(),
        device.instruction_set()
    );
    let tokens: Vec<u32> = (0..sequences * (context + 1))
        .map(|index| ((index as u64 * 2_654_435_761) % vocabulary as u64) as u32)
        .collect();
    let threads_done: Vec<Result<[f64; 3], String>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| lane(&model, &weights, &tokens, micro_batches, sequences).map_err(|e| e.to_string()))
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|_| Err("a lane panicked".to_owned())))
            .collect()
    });
    let lane_tokens = (micro_batches * sequences * context) as f64;
    let mut rate = 0.0;
    for times in threads_done {
        let [forward, both, forward_wall] = times?;
        println!(
            "lane: forward {:.1} ms, backward {:.1} ms a micro-batch (thread CPU time), {:.0} tokens/s CPU, {:.0} tokens/s wall",
            forward * 1e3,
            (both - forward) * 1e3,
            lane_tokens / micro_batches as f64 / both,
            lane_tokens / micro_batches as f64 / forward_wall,
        );
        rate += lane_tokens / micro_batches as f64 / both;
    }
    let update = update_seconds(&device, layout.flat_elements())?;
    println!(
        "update with hashes: {:.1} ms for all parameters on one thread",
        update * 1e3
    );
    println!("all lanes: {rate:.0} tokens/s before the update");
    Ok(())
}

/// Seconds of thread CPU time a micro-batch: forward alone, and both passes; then wall-clock seconds of both.
fn lane(
    model: &Model<CpuDevice>,
    weights: &<CpuDevice as Device>::Buffer,
    tokens: &[u32],
    micro_batches: usize,
    sequences: usize,
) -> Result<[f64; 3], Box<dyn Error>> {
    let abort = AtomicBool::new(false);
    let mut workspace = model.workspace(sequences)?;
    let mut gradients = model.device().alloc(weights.len(), Precision::Full)?;
    let mut run = |backward: bool| -> Result<(), Box<dyn Error>> {
        if backward {
            model.forward_backward(weights, &mut gradients, &mut workspace, tokens, 1.0, &abort)?;
        } else {
            model.losses(weights, &mut workspace, tokens, &abort)?;
        }
        Ok(())
    };
    run(true)?;
    let mut best = [f64::MAX; 3];
    for _ in 0..micro_batches {
        let start = thread_seconds();
        run(false)?;
        best[0] = best[0].min(thread_seconds() - start);
        let (start, wall) = (thread_seconds(), Instant::now());
        run(true)?;
        best[1] = best[1].min(thread_seconds() - start);
        best[2] = best[2].min(wall.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn update_seconds(device: &CpuDevice, elements: usize) -> Result<f64, Box<dyn Error>> {
    let mut stream = device.stream()?;
    let mut buffers = Vec::new();
    for _ in 0..5 {
        buffers.push(device.alloc(elements, Precision::Full)?);
    }
    let [gradient, master, first_moment, second_moment, working] = &mut buffers[..] else {
        return Err("five buffers".into());
    };
    gradient.fill(0.01);
    let step = AdamwStep {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        gradient_scale: 1.0,
        step: 10,
    };
    let blocks = Blocks {
        first: BlockIndex(0),
        block_elements: BLOCK_ELEMENTS,
    };
    let mut hashes = vec![BlockHash::default(); elements / BLOCK_ELEMENTS];
    device.block_hashes(
        &mut stream,
        blocks,
        View::from(&*master),
        View::from(&*first_moment),
        View::from(&*second_moment),
        &mut hashes,
    )?;
    let mut best = f64::MAX;
    for _ in 0..5 {
        let start = thread_seconds();
        let state = OptimizerState {
            master: ViewMut::from(&mut *master),
            first_moment: ViewMut::from(&mut *first_moment),
            second_moment: ViewMut::from(&mut *second_moment),
        };
        let working = Some(ViewMut::from(&mut *working));
        device.adamw(
            &mut stream,
            &step,
            blocks,
            View::from(&*gradient),
            state,
            working,
            &mut hashes,
        )?;
        best = best.min(thread_seconds() - start);
    }
    Ok(best)
}

/// Seconds of CPU time of this thread: other load on the machine does not count.
fn thread_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place to write.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
