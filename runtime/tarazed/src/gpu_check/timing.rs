//! How long kernels take, by the device's own clock, and a step by the wall's. Medians, with least and most beside them.

use super::CheckFailed;
use super::determinism::{Bench, model};
use serde_json::{Value, json};
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use tarazed_domain::config::ModelConfig;
use tarazed_kernels::cuda::driver::Driver;
use tarazed_kernels::cuda::peak::dense_bf16_flops_per_s;
use tarazed_kernels::cuda::{CudaBuffer, CudaDevice, CudaStream};
use tarazed_kernels::{Attention, Device, DeviceError, Gemm, Precision, View, ViewMut};
use tarazed_model::flops;

/// What is timed.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// Matrix products: m, n, k.
    pub products: Vec<[usize; 3]>,
    /// Attention.
    pub attention: Attention,
    /// The model whose forward and backward pass is a step.
    pub model: ModelConfig,
    /// Sequences of its micro-batch.
    pub sequences: usize,
    /// Runs that count; as many before them do not.
    pub repeats: usize,
}

impl Sizes {
    /// Sizes at which a data-centre GPU is busy: products of the published 7B shape at 8,192 tokens, its attention at 2,048,
    /// and a step of a model of about 0.1B parameters.
    #[must_use]
    pub fn standard() -> Self {
        Self {
            products: vec![
                [8192, 12_288, 4096],
                [8192, 4096, 4096],
                [8192, 22_016, 4096],
                [8192, 4096, 11_008],
            ],
            attention: Attention {
                sequences: 4,
                context: 2048,
                heads: 32,
                kv_heads: 32,
                head_dim: 128,
            },
            model: model(12, [768, 2048, 12, 12, 1024, 32_000]),
            sequences: 8,
            repeats: 10,
        }
    }

    /// Sizes that take no time.
    #[must_use]
    pub fn small() -> Self {
        Self {
            products: vec![[8, 16, 24]],
            attention: Attention {
                sequences: 1,
                context: 4,
                heads: 2,
                kv_heads: 1,
                head_dim: 16,
            },
            model: model(1, [32, 48, 2, 1, 8, 50]),
            sequences: 1,
            repeats: 2,
        }
    }
}

const CHECK: &str = "timing";

/// Least, median and most of some times.
pub(super) struct Spread(pub [f64; 3]);

impl Spread {
    pub fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        let at = |index: usize| times.get(index).copied().unwrap_or(f64::NAN);
        Self([at(0), at(times.len() / 2), at(times.len().saturating_sub(1))])
    }

    /// Milliseconds, and what the median makes of an amount of work; none where no time passed.
    fn report(&self, name: &str, work_flops: f64) -> Value {
        let [least, median, most] = self.0;
        let rate = (median > 0.0).then_some(work_flops / (median * 1e9));
        json!({"what": name, "ms_least": least, "ms_median": median, "ms_most": most, "tflops_median": rate})
    }
}

/// Times work on a device.
///
/// # Errors
/// The device's.
pub fn measure<D: Driver>(device: &CudaDevice<D>, sizes: &Sizes) -> Result<Value, CheckFailed> {
    let failed = CheckFailed::because::<DeviceError>(CHECK);
    let mut timings = Vec::new();
    let mut stream = device.stream().map_err(&failed)?;
    for &[m, n, k] in &sizes.products {
        timings.extend(product(device, &mut stream, sizes.repeats, [m, n, k]).map_err(&failed)?);
    }
    timings.extend(attention(device, &mut stream, sizes).map_err(&failed)?);
    drop(stream);
    timings.push(step(device, sizes)?);
    Ok(json!(timings))
}

fn timed<D: Driver>(
    device: &CudaDevice<D>,
    stream: &mut CudaStream<D>,
    repeats: usize,
    mut work: impl FnMut(&mut CudaStream<D>) -> Result<(), DeviceError>,
) -> Result<Spread, DeviceError> {
    for _ in 0..repeats {
        work(stream)?;
    }
    device.synchronize(stream)?;
    let mut times = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        times.push(f64::from(device.measure(stream, &mut work)?));
    }
    Ok(Spread::of(times))
}

/// A buffer of pseudo-random values from -1 to 1. Zeros switch few bits, and may let a GPU keep a higher clock than what a
/// model holds does.
fn random<D: Driver>(
    device: &CudaDevice<D>,
    stream: &mut CudaStream<D>,
    len: usize,
) -> Result<CudaBuffer<D>, DeviceError> {
    let mut buffer = device.alloc(len, Precision::Working)?;
    device.upload(stream, &pseudo_random(len), ViewMut::from(&mut buffer))?;
    Ok(buffer)
}

/// The same for the same length: a linear congruential generator (Knuth, The Art of Computer Programming, volume 2, section
/// 3.3.4, line 26), of whose state the upper bits count.
fn pseudo_random(len: usize) -> Vec<f32> {
    let mut state = len as u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// The three products of a linear layer of one shape.
fn product<D: Driver>(
    device: &CudaDevice<D>,
    stream: &mut CudaStream<D>,
    repeats: usize,
    [m, n, k]: [usize; 3],
) -> Result<Vec<Value>, DeviceError> {
    let working = |len| device.alloc(len, Precision::Working);
    let (input, weight) = (random(device, stream, m * k)?, random(device, stream, n * k)?);
    let mut output = working(m * n)?;
    let (mut into_input, mut into_weight) = (working(m * k)?, device.alloc(n * k, Precision::Full)?);
    let flops = 2.0 * m as f64 * n as f64 * k as f64;
    let forward = timed(device, stream, repeats, |stream| {
        let to = ViewMut::from(&mut output);
        device.gemm(stream, &Gemm::forward(m, n, k), (&input).into(), (&weight).into(), to)
    })?;
    let backward = timed(device, stream, repeats, |stream| {
        let call = Gemm::input_gradient(m, k, n);
        let to = ViewMut::from(&mut into_input);
        device.gemm(stream, &call, (&output).into(), (&weight).into(), to)
    })?;
    let update = timed(device, stream, repeats, |stream| {
        let call = Gemm::weight_gradient(n, k, m);
        let to = ViewMut::from(&mut into_weight);
        device.gemm(stream, &call, (&output).into(), (&input).into(), to)
    })?;
    let name = |what: &str| format!("{what}, {m} x {n} x {k}");
    Ok(vec![
        forward.report(&name("linear layer forward"), flops),
        backward.report(&name("linear layer, gradient of the input"), flops),
        update.report(&name("linear layer, gradient of the weight, added in f32"), flops),
    ])
}

fn attention<D: Driver>(
    device: &CudaDevice<D>,
    stream: &mut CudaStream<D>,
    sizes: &Sizes,
) -> Result<[Value; 2], DeviceError> {
    let call = sizes.attention;
    let working = |width: usize| device.alloc(call.rows() * width, Precision::Working);
    let qkv = random(device, stream, call.rows() * call.qkv_width())?;
    let out_gradient = random(device, stream, call.rows() * call.out_width())?;
    let mut out = working(call.out_width())?;
    let mut gradient = working(call.qkv_width())?;
    let mut log_sum_exp = device.alloc(call.rows() * call.heads, Precision::Full)?;
    // Two products over half of all pairs, each of two operations; backward there are five.
    let pairs = call.sequences as f64 * (call.context as f64).powi(2) / 2.0;
    let product = 2.0 * pairs * (call.heads * call.head_dim) as f64;
    let forward = timed(device, stream, sizes.repeats, |stream| {
        let to = (ViewMut::from(&mut out), ViewMut::from(&mut log_sum_exp));
        device.attention(stream, &call, View::from(&qkv), to.0, to.1)
    })?;
    let backward = timed(device, stream, sizes.repeats, |stream| {
        let kept = (View::from(&out), View::from(&log_sum_exp));
        let to = ViewMut::from(&mut gradient);
        device.attention_backward(
            stream,
            &call,
            View::from(&qkv),
            kept.0,
            kept.1,
            (&out_gradient).into(),
            to,
        )
    })?;
    Ok([
        forward.report(&format!("attention forward, {call:?}"), 2.0 * product),
        backward.report(&format!("attention backward, {call:?}"), 5.0 * product),
    ])
}

/// Forward and backward of one micro-batch, uploads and the losses' download included.
fn step<D: Driver>(device: &CudaDevice<D>, sizes: &Sizes) -> Result<Value, CheckFailed> {
    let failed = CheckFailed::because::<DeviceError>(CHECK);
    let bench = Bench::new(device, &sizes.model)?;
    let mut workspace = bench
        .model
        .workspace(sizes.sequences)
        .map_err(CheckFailed::because(CHECK))?;
    let mut gradient = device
        .alloc(bench.layout.flat_elements(), Precision::Full)
        .map_err(&failed)?;
    let tokens = bench.tokens(&sizes.model, sizes.sequences, 0);
    let abort = AtomicBool::new(false);
    let mut times = Vec::new();
    for run in 0..2 * sizes.repeats {
        let began = Instant::now();
        bench
            .model
            .forward_backward(&bench.weights, &mut gradient, &mut workspace, &tokens, 1.0, &abort)
            .map_err(CheckFailed::because(CHECK))?;
        if run >= sizes.repeats {
            times.push(began.elapsed().as_secs_f64() * 1e3);
        }
    }
    let Spread([least, median, most]) = Spread::of(times);
    let trained = sizes.sequences * sizes.model.context;
    let tokens_per_s = (median > 0.0).then_some(trained as f64 / (median / 1e3));
    let peak = dense_bf16_flops_per_s(&device.facts().name);
    let mfu = tokens_per_s
        .zip(peak)
        .map(|(rate, peak)| flops::utilisation(&sizes.model, rate, peak) * 100.0);
    Ok(json!({
        "what": format!("forward and backward of {} sequences, {} parameters, by the wall's clock",
            sizes.sequences, bench.layout.parameter_count()),
        "model": sizes.model.identity(),
        "ms_least": least, "ms_median": median, "ms_most": most,
        "tokens_per_second_median": tokens_per_s,
        // Of the two passes alone: a whole step has exchanges and an update besides.
        "mfu_percent_of_the_passes": mfu,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tarazed_kernels::cuda::recording::RecordingDriver;

    #[test]
    fn everything_is_timed_once_and_a_rate_needs_time() {
        let device = CudaDevice::new(RecordingDriver::new()).expect("a device");
        let timings = measure(&device, &Sizes::small()).expect("runs");
        let timings = timings.as_array().expect("a list");
        assert_eq!(timings.len(), 3 + 2 + 1);
        // The recorder's clock stands still.
        assert!(
            timings[..5]
                .iter()
                .all(|timing| timing["tflops_median"].is_null() && timing["ms_median"] == 0.0)
        );
        assert!(timings[5]["ms_median"].as_f64().is_some_and(|ms| ms > 0.0));
        assert!(
            timings[5]["mfu_percent_of_the_passes"].is_null(),
            "the recorder has no known peak"
        );
    }

    /// What is multiplied is not zeros: both signs, no two halves alike.
    #[test]
    fn operands_are_spread_over_their_range() {
        let values = pseudo_random(10_000);
        assert!(values.iter().all(|x| (-1.0..1.0).contains(x)));
        let mean = values.iter().sum::<f32>() / 10_000.0;
        let squares = values.iter().map(|x| x * x).sum::<f32>() / 10_000.0;
        assert!(
            mean.abs() < 0.02 && (squares - 1.0 / 3.0).abs() < 0.02,
            "{mean} {squares}"
        );
        assert_eq!(values, pseudo_random(10_000));
    }

    #[test]
    fn a_spread_has_its_middle() {
        let Spread(spread) = Spread::of(vec![3.0, 1.0, 2.0]);
        assert_eq!(spread, [1.0, 2.0, 3.0]);
        assert!(Spread::of(Vec::new()).0[1].is_nan());
        assert_eq!(Spread([1.0, 2.0, 3.0]).report("x", 4e9)["tflops_median"], 2.0);
    }
}
