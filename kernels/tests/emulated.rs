//! The CUDA device on the emulator: the conformance suite over the kernels' own sources, and what they promise beyond it.
#![cfg(feature = "emulator")]
#![allow(clippy::unwrap_used)]

use std::hash::{BuildHasher, Hasher};
use std::path::Path;
use tarazed_domain::BlockIndex;
use tarazed_kernels::conformance::{self, Random};
use tarazed_kernels::cuda::emulated::EmulatedDriver;
use tarazed_kernels::cuda::{CudaDevice, bf16};
use tarazed_kernels::*;

use Precision::{Full, Working};

/// Of bf16, the device's working precision.
const BF16_UNIT_ROUNDOFF: f64 = 1.0 / (1_u64 << 8) as f64;

fn device() -> CudaDevice<EmulatedDriver> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let driver = EmulatedDriver::new(folder).unwrap_or_else(|error| panic!("{error}"));
    CudaDevice::new(driver).unwrap_or_else(|error| panic!("{error}"))
}

/// The sources as they are for every architecture, and as they are for Hopper.
fn devices() -> [CudaDevice<EmulatedDriver>; 2] {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let hopper = EmulatedDriver::hopper(folder).unwrap_or_else(|error| panic!("{error}"));
    [
        device(),
        CudaDevice::new(hopper).unwrap_or_else(|error| panic!("{error}")),
    ]
}

/// A seed that is new each time; a failure prints it.
fn fresh() -> u64 {
    std::hash::RandomState::new().build_hasher().finish()
}

#[test]
fn the_cuda_device_conforms_in_every_order() {
    let fresh = fresh();
    for (number, device) in devices().iter().enumerate() {
        for (order, seed) in [(0, 1), (1, 2), (fresh, fresh)] {
            device.driver().set_order(order);
            match conformance::run(device, BF16_UNIT_ROUNDOFF, seed) {
                Ok(measured) => {
                    for kernel in measured {
                        println!("order {order:20} {:40} {:.3} of its bound", kernel.kernel, kernel.share);
                    }
                }
                Err(error) => panic!("device {number}, order {order}: {error}"),
            }
        }
    }
}

/// A device with what tests of one shape need: tensors that begin `offset` elements into their buffers.
struct Lab<D: Device> {
    device: D,
    stream: D::Stream,
    random: Random,
    offset: usize,
}

/// A tensor and its length.
struct Tensor<D: Device> {
    buffer: D::Buffer,
    offset: usize,
    len: usize,
}

impl<D: Device> Tensor<D> {
    fn view(&self) -> View<'_, D::Buffer> {
        View::at(&self.buffer, self.offset)
    }

    fn view_mut(&mut self) -> ViewMut<'_, D::Buffer> {
        ViewMut::at(&mut self.buffer, self.offset)
    }
}

impl<D: Device> Lab<D> {
    fn new(device: D, seed: u64, offset: usize) -> Self {
        let stream = device.stream().unwrap();
        let random = Random::new(seed);
        Self {
            device,
            stream,
            random,
            offset,
        }
    }

    fn put(&mut self, values: &[f32], precision: Precision) -> Tensor<D> {
        let (offset, len) = (self.offset, values.len());
        let mut buffer = self.device.alloc(offset + len, precision).unwrap();
        let to = ViewMut::at(&mut buffer, offset);
        self.device.upload(&mut self.stream, values, to).unwrap();
        Tensor { buffer, offset, len }
    }

    /// Random values that bf16 holds exactly, so that devices of both precisions have the same.
    fn random(&mut self, len: usize, precision: Precision) -> Tensor<D> {
        let values = exact(&self.random.numbers(len));
        self.put(&values, precision)
    }

    fn poisoned(&mut self, len: usize, precision: Precision) -> Tensor<D> {
        self.put(&vec![f32::NAN; len], precision)
    }

    fn tokens(&mut self, ids: &[u32]) -> D::Tokens {
        let mut tokens = self.device.alloc_tokens(ids.len()).unwrap();
        self.device.upload_tokens(&mut self.stream, ids, &mut tokens).unwrap();
        tokens
    }

    fn get(&mut self, tensor: &Tensor<D>) -> Vec<f32> {
        let mut values = vec![0.0; tensor.len];
        self.device
            .download(&mut self.stream, tensor.view(), &mut values)
            .unwrap();
        values
    }

    fn bits(&mut self, tensor: &Tensor<D>) -> Vec<u32> {
        self.get(tensor).into_iter().map(f32::to_bits).collect()
    }
}

/// The nearest values that bf16 holds.
fn exact(values: &[f64]) -> Vec<f32> {
    values
        .iter()
        .map(|&value| bf16::widen(bf16::round(value as f32)))
        .collect()
}

/// Every kernel that sums, with shapes of several blocks, warps and ragged ends: what it makes, as bits.
fn everything(device: &CudaDevice<EmulatedDriver>, offset: usize, seed: u64) -> Vec<(&'static str, Vec<u32>)> {
    let mut lab = Lab::new(device.clone(), seed, offset);
    let mut made = Vec::new();
    norms(&mut lab, &mut made);
    losses_and_embedding(&mut lab, &mut made);
    attention(&mut lab, &mut made);
    optimizer(&mut lab, &mut made);
    made
}

type Made = Vec<(&'static str, Vec<u32>)>;
type EmulatedLab = Lab<CudaDevice<EmulatedDriver>>;

/// Widths of rows whose norm's gradient has one chunk for each thread, two, and many; and rows for several steps of a run.
const NORM_SHAPES: [(usize, usize); 4] = [(43, 1336), (9, 2064), (5, 8216), (1100, 64)];

fn norms(lab: &mut EmulatedLab, made: &mut Made) {
    for (rows, width) in NORM_SHAPES {
        let call = Norm { rows, width, eps: 1e-5 };
        let len = call.rows * call.width;
        let (x, weight, dy) = (
            lab.random(len, Working),
            lab.random(call.width, Working),
            lab.random(len, Working),
        );
        let (mut y, mut inverse) = (lab.poisoned(len, Working), lab.poisoned(call.rows, Full));
        let (mut dx, mut dw) = (lab.random(len, Working), lab.random(call.width, Full));
        let device = lab.device.clone();
        let s = &mut lab.stream;
        let to = (y.view_mut(), inverse.view_mut());
        device
            .rms_norm(s, &call, x.view(), None, weight.view(), to.0, to.1)
            .unwrap();
        let from = (x.view(), inverse.view(), weight.view(), dy.view());
        device
            .rms_norm_backward(s, &call, from.0, from.1, from.2, from.3, dx.view_mut(), dw.view_mut())
            .unwrap();
        for (name, tensor) in [
            ("norm", &y),
            ("inverse rms", &inverse),
            ("norm gradient", &dx),
            ("norm weight gradient", &dw),
        ] {
            made.push((name, lab.bits(tensor)));
        }
    }
}

fn losses_and_embedding(lab: &mut EmulatedLab, made: &mut Made) {
    let device = lab.device.clone();
    // Of whole runs of eight logits and not, and each longer than what shared memory keeps.
    for vocabulary in [9001, 41_008, 50_257] {
        let call = CrossEntropy {
            rows: 3,
            vocabulary,
            target_offset: 0,
            gradient_scale: Some(0.5),
        };
        let targets = lab.tokens(&[0, vocabulary as u32 - 1, 4711]);
        let (mut logits, mut losses) = (
            lab.random(call.rows * call.vocabulary, Working),
            lab.poisoned(call.rows, Full),
        );
        let to = (logits.view_mut(), losses.view_mut());
        device
            .cross_entropy(&mut lab.stream, &call, &targets, to.0, to.1)
            .unwrap();
        made.push(("loss", lab.bits(&losses)));
        made.push(("loss gradient", lab.bits(&logits)));
    }

    // Several runs of keys, and ids as frequent as a run is long.
    let call = Embedding {
        tokens: 2500,
        vocabulary: 5,
        width: 72,
    };
    let ids: Vec<u32> = (0..call.tokens)
        .map(|_| lab.random.below(call.vocabulary) as u32)
        .collect();
    let tokens = lab.tokens(&ids);
    let dy = lab.random(call.tokens * call.width, Working);
    let mut gradient = lab.random(call.vocabulary * call.width, Full);
    device
        .embed_backward(&mut lab.stream, &call, &tokens, dy.view(), gradient.view_mut())
        .unwrap();
    made.push(("embedding gradient", lab.bits(&gradient)));
}

fn attention(lab: &mut EmulatedLab, made: &mut Made) {
    for (heads, kv_heads, head_dim) in [(4, 2, 32), (2, 1, 64), (2, 1, 128), (2, 2, 44)] {
        let call = Attention {
            sequences: 2,
            context: 150,
            heads,
            kv_heads,
            head_dim,
        };
        let qkv = lab.random(call.rows() * call.qkv_width(), Working);
        let dy = lab.random(call.rows() * call.out_width(), Working);
        let mut out = lab.poisoned(call.rows() * call.out_width(), Working);
        let mut sums = lab.poisoned(call.rows() * heads, Full);
        let mut gradient = lab.poisoned(call.rows() * call.qkv_width(), Working);
        let device = lab.device.clone();
        let s = &mut lab.stream;
        device
            .attention(s, &call, qkv.view(), out.view_mut(), sums.view_mut())
            .unwrap();
        let from = (qkv.view(), out.view(), sums.view(), dy.view());
        device
            .attention_backward(s, &call, from.0, from.1, from.2, from.3, gradient.view_mut())
            .unwrap();
        for (name, tensor) in [
            ("attention", &out),
            ("log-sum-exp", &sums),
            ("attention gradient", &gradient),
        ] {
            made.push((name, lab.bits(tensor)));
        }
    }
}

/// Blocks of several tiles of the kernel, the last a short and odd one.
const BLOCK_ELEMENTS: usize = 2 * 8192 + 1001;

fn optimizer(lab: &mut EmulatedLab, made: &mut Made) {
    let x = lab.random(3 * BLOCK_ELEMENTS, Full);
    let mut sums = [f64::NAN; 3];
    lab.device
        .square_sums(&mut lab.stream, x.view(), BLOCK_ELEMENTS, &mut sums)
        .unwrap();
    let words = sums
        .iter()
        .flat_map(|sum| [sum.to_bits() as u32, (sum.to_bits() >> 32) as u32]);
    made.push(("square sums", words.collect()));
    let (tensors, hashes) = update(lab, 7, BLOCK_ELEMENTS, 3);
    for tensor in tensors {
        made.push(("adamw", lab.bits(&tensor)));
    }
    let words = hashes.iter().flat_map(|hash| hash.as_bytes().map(u32::from));
    made.push(("block hashes", words.collect()));
}

/// An update of random state: master weights, both moments and the working copy, and the new hashes.
fn update<D: Device>(
    lab: &mut Lab<D>,
    number: u64,
    block_elements: usize,
    count: usize,
) -> ([Tensor<D>; 4], Vec<BlockHash>) {
    let len = block_elements * count;
    let step = AdamwStep {
        learning_rate: 3e-4,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        gradient_scale: 0.173,
        step: number,
    };
    let blocks = Blocks {
        first: BlockIndex(5),
        block_elements,
    };
    let mut values = |scale: f64| -> Vec<f32> { lab.random.numbers(len).iter().map(|x| (x * scale) as f32).collect() };
    let mut gradient = values(1e-2);
    // Zeros, a number below the normal ones, and one whose square overflows.
    gradient[0] = 0.0;
    gradient[len / 2] = 1e-41;
    gradient[len - 1] = 3e30;
    let (master, first) = (values(0.02), values(1e-3));
    let second: Vec<f32> = values(1e-3).iter().map(|x| x * x).collect();
    let gradient = lab.put(&gradient, Full);
    let (mut master, mut first, mut second) = (lab.put(&master, Full), lab.put(&first, Full), lab.put(&second, Full));
    let mut working = lab.poisoned(len, Working);
    let mut hashes = vec![BlockHash::default(); count];
    let s = &mut lab.stream;
    let state = (master.view(), first.view(), second.view());
    lab.device
        .block_hashes(s, blocks, state.0, state.1, state.2, &mut hashes)
        .unwrap();
    let state = OptimizerState {
        master: master.view_mut(),
        first_moment: first.view_mut(),
        second_moment: second.view_mut(),
    };
    let copy = Some(working.view_mut());
    let changed = lab
        .device
        .adamw(s, &step, blocks, gradient.view(), state, copy, &mut hashes)
        .unwrap();
    assert_eq!(changed, 0);
    ([master, first, second, working], hashes)
}

/// DET-1, DET-2: neither the order in which blocks and threads run nor where tensors lie decides a bit.
#[test]
fn neither_order_nor_address_decides_a_bit() {
    let seed = fresh();
    for device in devices() {
        let expected = everything(&device, 0, seed);
        // Odd orders run each warp as far as it gets, even ones from 2 on mix the warps.
        for (order, offset) in [(1, 0), (2, 8), (seed | 3, 5), (0, 1)] {
            device.driver().set_order(order);
            for (made, expected) in everything(&device, offset, seed).iter().zip(&expected) {
                assert!(
                    made == expected,
                    "{}: other bits in order {order} at offset {offset}, seed {seed}",
                    expected.0
                );
            }
        }
    }
}

/// The update is the CPU's, bit for bit, hashes included; so are the additions of the embedding's gradient.
#[test]
fn updates_and_embedding_gradients_have_the_cpu_s_bits() {
    let seed = fresh();
    for (number, block_elements, count) in [(1, 1, 2), (2, 77, 3), (1000, 9003, 2)] {
        let mut cpu = Lab::new(CpuDevice::new(), seed, 3);
        let mut gpu = Lab::new(device(), seed, 3);
        let (ours, hashes) = update(&mut gpu, number, block_elements, count);
        let (expected, expected_hashes) = update(&mut cpu, number, block_elements, count);
        assert_eq!(hashes, expected_hashes, "seed {seed}");
        for (tensor, expected) in ours[..3].iter().zip(&expected[..3]) {
            assert_eq!(gpu.bits(tensor), cpu.bits(expected), "seed {seed}");
        }
        let rounded: Vec<u32> = exact(&cpu.get(&expected[3]).iter().map(|&x| f64::from(x)).collect::<Vec<_>>())
            .into_iter()
            .map(f32::to_bits)
            .collect();
        assert_eq!(gpu.bits(&ours[3]), rounded, "seed {seed}");
    }
    fn gradient<D: Device>(lab: &mut Lab<D>, call: &Embedding) -> Vec<u32> {
        // Half of the places have one id, as a text's commonest has many; a sum may begin as -0.
        let ids: Vec<u32> = (0..call.tokens)
            .map(|_| lab.random.below(2 * call.vocabulary).saturating_sub(call.vocabulary) as u32)
            .collect();
        let tokens = lab.tokens(&ids);
        let dy = lab.random(call.tokens * call.width, Working);
        let mut before = lab.random.numbers(call.vocabulary * call.width);
        before[0] = -0.0;
        let mut gradient = lab.put(&exact(&before), Full);
        lab.device
            .embed_backward(&mut lab.stream, call, &tokens, dy.view(), gradient.view_mut())
            .unwrap();
        lab.bits(&gradient)
    }
    for (tokens, vocabulary, width, offset) in [
        (1, 3, 8, 0),
        (600, 9, 2056, 0),
        (1024, 1, 16, 0),
        (1025, 2, 16, 1),
        (2047, 300, 24, 0),
        (3100, 40, 11, 0),
    ] {
        let call = Embedding {
            tokens,
            vocabulary,
            width,
        };
        let cpu = gradient(&mut Lab::new(CpuDevice::new(), seed, offset), &call);
        let ours = gradient(&mut Lab::new(device(), seed, offset), &call);
        assert!(ours == cpu, "{call:?}, seed {seed}");
    }
}

/// Element-wise kernels compute as the CPU's and round once.
fn pointwise<D: Device>(lab: &mut Lab<D>) -> Vec<Vec<f32>> {
    let (rows, width) = (5, 700);
    let wide: Vec<f32> = exact(
        &lab.random
            .numbers(2 * rows * width)
            .iter()
            .map(|x| 6.0 * x)
            .collect::<Vec<_>>(),
    );
    let mut gate_up = lab.put(&wide, Working);
    let (mut out, mut dy) = (lab.poisoned(rows * width, Working), lab.random(rows * width, Working));
    let s = &mut lab.stream;
    lab.device
        .swiglu(s, rows, width, gate_up.view(), out.view_mut())
        .unwrap();
    lab.device
        .swiglu_backward(s, rows, width, gate_up.view_mut(), dy.view_mut())
        .unwrap();
    let call = Rope {
        rows: 6,
        context: 3,
        heads: 3,
        head_dim: 36,
        stride: 3 * 36 + 7,
    };
    let table = lab.random(call.context * call.head_dim, Full);
    let mut x = lab.random(call.rows * call.stride, Working);
    lab.device
        .rope(&mut lab.stream, &call, table.view(), true, x.view_mut())
        .unwrap();
    [out, dy, gate_up, x].iter().map(|tensor| lab.get(tensor)).collect()
}

#[test]
fn pointwise_kernels_have_the_cpu_s_bits_rounded_once() {
    let seed = fresh();
    let ours = pointwise(&mut Lab::new(device(), seed, 0));
    let expected = pointwise(&mut Lab::new(CpuDevice::new(), seed, 0));
    for (index, (ours, expected)) in ours.iter().zip(&expected).enumerate() {
        let rounded = exact(&expected.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
        assert_eq!(ours, &rounded, "output {index}, seed {seed}");
    }
}

/// Ids and targets beyond the vocabulary make NaN, which a loss shows, and touch no memory beyond.
#[test]
fn an_id_beyond_the_vocabulary_makes_nan() {
    let mut lab = Lab::new(device(), 3, 0);
    let call = Embedding {
        tokens: 3,
        vocabulary: 4,
        width: 24,
    };
    let tokens = lab.tokens(&[3, 4, u32::MAX]);
    let table = lab.random(call.vocabulary * call.width, Working);
    let mut out = lab.put(&vec![0.0; call.tokens * call.width], Working);
    let s = &mut lab.stream;
    lab.device
        .embed(s, &call, table.view(), &tokens, out.view_mut())
        .unwrap();
    let values = lab.get(&out);
    assert!(values[..24].iter().all(|x| x.is_finite()) && values[24..].iter().all(|x| x.is_nan()));

    let dy = lab.random(call.tokens * call.width, Working);
    let mut gradient = lab.put(&vec![0.0; call.vocabulary * call.width], Full);
    let s = &mut lab.stream;
    lab.device
        .embed_backward(s, &call, &tokens, dy.view(), gradient.view_mut())
        .unwrap();
    assert!(lab.get(&gradient)[..72].iter().all(|&x| x == 0.0));

    let call = CrossEntropy {
        rows: 2,
        vocabulary: 5,
        target_offset: 1,
        gradient_scale: None,
    };
    let (mut logits, mut losses) = (lab.random(10, Working), lab.poisoned(2, Full));
    let to = (logits.view_mut(), losses.view_mut());
    lab.device
        .cross_entropy(&mut lab.stream, &call, &tokens, to.0, to.1)
        .unwrap();
    let losses = lab.get(&losses);
    assert!(losses[0].is_finite() && losses[1].is_nan(), "{losses:?}");
}

/// A logit that is not a number makes a loss that is none; minus infinity is a probability of zero, even where a thread meets
/// nothing else.
#[test]
fn logits_that_are_no_numbers_show_in_their_row_alone() {
    for offset in [0, 5] {
        let mut lab = Lab::new(device(), 4, offset);
        let call = CrossEntropy {
            rows: 4,
            vocabulary: 9000,
            target_offset: 0,
            gradient_scale: Some(1.0),
        };
        let targets = lab.tokens(&[1, 1, 1, 8999]);
        let mut values = vec![f32::NEG_INFINITY; call.rows * call.vocabulary];
        let mut rows = values.chunks_exact_mut(call.vocabulary);
        let mut row = || rows.next().unwrap();
        // Two logits; one that is no number among thousands; infinity; none at all.
        row()[1..3].copy_from_slice(&[-90.0, -90.0]);
        let second = row();
        second.fill(-3.0);
        second[7000] = f32::NAN;
        row()[5] = f32::INFINITY;
        let (mut logits, mut losses) = (lab.put(&values, Working), lab.poisoned(call.rows, Full));
        let to = (logits.view_mut(), losses.view_mut());
        lab.device
            .cross_entropy(&mut lab.stream, &call, &targets, to.0, to.1)
            .unwrap();
        let losses = lab.get(&losses);
        assert!((losses[0] - std::f32::consts::LN_2).abs() < 1e-6, "{losses:?}");
        assert!(losses[1..].iter().all(|loss| loss.is_nan()), "{losses:?}");
        let gradient = &lab.get(&logits)[..call.vocabulary];
        assert_eq!(gradient[..4], [0.0, -0.5, 0.5, 0.0]);
        assert!(gradient[4..].iter().all(|&slope| slope == 0.0));
    }
}

/// Name, bound on the relative error, values.
type Outputs = Vec<(String, f64, Vec<f32>)>;

/// One call of attention, forward and backward: outputs, log-sum-exp, gradient.
fn attention_outputs<D: Device>(lab: &mut Lab<D>, call: &Attention) -> [Vec<f32>; 3] {
    let qkv = lab.random(call.rows() * call.qkv_width(), Working);
    let dy = lab.random(call.rows() * call.out_width(), Working);
    let mut out = lab.poisoned(call.rows() * call.out_width(), Working);
    let mut sums = lab.poisoned(call.rows() * call.heads, Full);
    let mut gradient = lab.poisoned(call.rows() * call.qkv_width(), Working);
    let s = &mut lab.stream;
    lab.device
        .attention(s, call, qkv.view(), out.view_mut(), sums.view_mut())
        .unwrap();
    let from = (qkv.view(), out.view(), sums.view(), dy.view());
    lab.device
        .attention_backward(s, call, from.0, from.1, from.2, from.3, gradient.view_mut())
        .unwrap();
    [out, sums, gradient].map(|tensor| lab.get(&tensor))
}

/// `|ours - expected| / |expected|`, in Frobenius norms, each expected element counted as `least` at least; an error that is not
/// a number is infinite.
fn relative_error(ours: &[f32], expected: &[f32], least: f64) -> f64 {
    assert_eq!(ours.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut ours.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    let error = difference / norm(&mut expected.iter().map(|&x| f64::from(x).abs().max(least)));
    if error.is_nan() { f64::INFINITY } else { error }
}

/// Any shape that is possible, not only those that tiles were made for.
#[test]
fn attention_of_any_shape_agrees_with_the_cpu_s() {
    let seed = fresh();
    let mut shapes = Random::new(seed);
    let devices = devices();
    for number in 0..24 {
        let kv_heads = 1 + shapes.below(3);
        let call = Attention {
            sequences: 1 + shapes.below(2),
            context: 1 + shapes.below(if number % 4 == 0 { 300 } else { 70 }),
            heads: kv_heads * (1 + shapes.below(3)),
            kv_heads,
            head_dim: 2 + shapes.below(127),
        };
        let offset = shapes.below(9);
        let expected = attention_outputs(&mut Lab::new(CpuDevice::new(), seed, offset), &call);
        for device in &devices {
            device.driver().set_order(shapes.bits());
            let ours = attention_outputs(&mut Lab::new(device.clone(), seed, offset), &call);
            // A log-sum-exp may be zero, and its error is that of the scores.
            for ((ours, expected), (bound, least)) in
                ours.iter().zip(&expected).zip([(3e-3, 0.0), (1e-6, 1.0), (5e-3, 0.0)])
            {
                let error = relative_error(ours, expected, least);
                assert!(
                    error <= bound,
                    "{call:?}, offset {offset}, seed {seed}: {error:e} beyond {bound:e}"
                );
            }
        }
    }
}

/// Kernels whose sums differ from the CPU's, on inputs that bf16 holds exactly, with bounds on `|ours - CPU's| / |CPU's|`
/// (Frobenius norms). Rounding the result to bf16 alone costs about 0.0017; attention's gradients round weights before.
fn summing<D: Device>(lab: &mut Lab<D>) -> Outputs {
    const ROUNDED: f64 = 2.5e-3;
    const WEIGHTS_ROUNDED: f64 = 5e-3;
    const SUMMED: f64 = 1e-6;
    let mut made = Outputs::new();
    for (heads, kv_heads, head_dim) in [(4, 2, 32), (2, 1, 64), (4, 1, 128), (3, 3, 50)] {
        let call = Attention {
            sequences: 2,
            context: 170,
            heads,
            kv_heads,
            head_dim,
        };
        let [out, sums, gradient] = attention_outputs(lab, &call);
        made.push((format!("attention {head_dim}"), ROUNDED, out));
        made.push((format!("log-sum-exp {head_dim}"), SUMMED, sums));
        let (queries, keys) = (heads * head_dim, (heads + kv_heads) * head_dim);
        let width = call.qkv_width();
        for (name, range) in [
            ("queries", 0..queries),
            ("keys", queries..keys),
            ("values", keys..width),
        ] {
            let rows = gradient.chunks_exact(width);
            let values = rows.flat_map(|row| row[range.clone()].to_vec()).collect();
            made.push((format!("gradient of {name} {head_dim}"), WEIGHTS_ROUNDED, values));
        }
    }
    let call = Norm {
        rows: 70,
        width: 520,
        eps: 1e-5,
    };
    let len = call.rows * call.width;
    let (x, weight, dy) = (
        lab.random(len, Working),
        lab.random(call.width, Working),
        lab.random(len, Working),
    );
    let (mut y, mut inverse) = (lab.poisoned(len, Working), lab.poisoned(call.rows, Full));
    let (mut dx, mut dw) = (lab.random(len, Working), lab.random(call.width, Full));
    let s = &mut lab.stream;
    let to = (y.view_mut(), inverse.view_mut());
    lab.device
        .rms_norm(s, &call, x.view(), None, weight.view(), to.0, to.1)
        .unwrap();
    let from = (x.view(), inverse.view(), weight.view(), dy.view());
    lab.device
        .rms_norm_backward(s, &call, from.0, from.1, from.2, from.3, dx.view_mut(), dw.view_mut())
        .unwrap();
    made.push(("norm".to_owned(), ROUNDED, lab.get(&y)));
    made.push(("inverse rms".to_owned(), SUMMED, lab.get(&inverse)));
    made.push(("norm gradient".to_owned(), ROUNDED, lab.get(&dx)));
    made.push(("norm weight gradient".to_owned(), SUMMED, lab.get(&dw)));

    let call = CrossEntropy {
        rows: 4,
        vocabulary: 12_011,
        target_offset: 0,
        gradient_scale: Some(0.25),
    };
    let ids: Vec<u32> = (0..call.rows)
        .map(|_| lab.random.below(call.vocabulary) as u32)
        .collect();
    let targets = lab.tokens(&ids);
    let (mut logits, mut losses) = (
        lab.random(call.rows * call.vocabulary, Working),
        lab.poisoned(call.rows, Full),
    );
    let to = (logits.view_mut(), losses.view_mut());
    lab.device
        .cross_entropy(&mut lab.stream, &call, &targets, to.0, to.1)
        .unwrap();
    made.push(("loss".to_owned(), SUMMED, lab.get(&losses)));
    made.push(("loss gradient".to_owned(), ROUNDED, lab.get(&logits)));
    made
}

#[test]
fn sums_agree_with_the_cpu_s_within_their_bounds() {
    let seed = fresh();
    let expected = summing(&mut Lab::new(CpuDevice::new(), seed, 5));
    for device in devices() {
        let ours = summing(&mut Lab::new(device, seed, 5));
        let mut beyond = Vec::new();
        for ((name, bound, ours), (_, _, expected)) in ours.iter().zip(&expected) {
            let error = relative_error(ours, expected, 0.0);
            println!("{name:28} relative error {error:.2e}, bound {bound:.1e}");
            if error > *bound {
                beyond.push(name);
            }
        }
        assert!(beyond.is_empty(), "beyond their bounds: {beyond:?}, seed {seed}");
    }
}
