//! The whole model on the CUDA device, its kernels run by the emulator: loss and gradients, their bits, and that it learns.
#![cfg(feature = "emulator")]
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::atomic::AtomicBool;
use tarazed_domain::BlockIndex;
use tarazed_kernels::cuda::emulated::EmulatedDriver;
use tarazed_kernels::cuda::{CudaBuffer, CudaDevice, bf16};
use tarazed_kernels::{AdamwStep, BlockHash, Blocks, CpuBuffer, Device, OptimizerState, Precision, View, ViewMut};
use tarazed_model::Model;

type Emulated = CudaDevice<EmulatedDriver>;

const SEQUENCES: usize = 2;
/// On the relative error of the gradient as a whole (Frobenius norm): every activation and every weight is rounded to 8 bits.
const GRADIENT_ERROR_MAX: f64 = 0.02;
/// On the relative error of a sequence's loss.
const LOSS_ERROR_MAX: f64 = 0.005;

/// The small model of the other tests on the emulated device, with its weights rounded to bf16.
struct Emulation {
    device: Emulated,
    model: Model<Emulated>,
    small: common::Small,
    weights: CudaBuffer<EmulatedDriver>,
    tokens: Vec<u32>,
}

fn emulation() -> Emulation {
    let driver = EmulatedDriver::new(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap_or_else(|error| panic!("{error}"));
    let device = CudaDevice::new(driver).unwrap();
    let mut small = common::small();
    for weight in small.weights.iter_mut() {
        *weight = bf16::widen(bf16::round(*weight));
    }
    let model = Model::new(&small.config, &small.layout, device.clone()).unwrap();
    let weights = upload(&device, &small.weights, Precision::Working);
    let tokens = common::tokens(&small.config, SEQUENCES, 21);
    Emulation {
        device,
        model,
        small,
        weights,
        tokens,
    }
}

fn upload(device: &Emulated, values: &[f32], precision: Precision) -> CudaBuffer<EmulatedDriver> {
    let mut stream = device.stream().unwrap();
    let mut buffer = device.alloc(values.len(), precision).unwrap();
    device.upload(&mut stream, values, ViewMut::from(&mut buffer)).unwrap();
    device.synchronize(&mut stream).unwrap();
    buffer
}

/// Losses and gradients of one micro-batch.
fn pass(emulation: &Emulation) -> (Vec<f64>, Vec<f32>) {
    let flat = emulation.small.weights.len();
    let mut gradients = upload(&emulation.device, &vec![0.0; flat], Precision::Full);
    let mut workspace = emulation.model.workspace(SEQUENCES).unwrap();
    let abort = AtomicBool::new(false);
    let losses = emulation
        .model
        .forward_backward(
            &emulation.weights,
            &mut gradients,
            &mut workspace,
            &emulation.tokens,
            1.0,
            &abort,
        )
        .unwrap();
    let mut host = vec![0.0; flat];
    let mut stream = emulation.device.stream().unwrap();
    emulation
        .device
        .download(&mut stream, View::from(&gradients), &mut host)
        .unwrap();
    (losses, host)
}

#[test]
fn loss_and_gradient_are_the_cpu_s_within_rounding() {
    let emulation = emulation();
    let (losses, gradient) = pass(&emulation);
    let small = &emulation.small;
    let exact: Vec<f64> = small.weights.iter().map(|&weight| f64::from(weight)).collect();
    let expected = common::losses(&small.config, &small.layout, &exact, &emulation.tokens);
    for (loss, expected) in losses.iter().zip(&expected) {
        let error = (loss / expected - 1.0).abs();
        println!("loss {loss}, exactly {expected}: relative error {error:.2e}");
        assert!(error <= LOSS_ERROR_MAX);
    }
    let mut on_cpu = CpuBuffer::zeroed(small.weights.len()).unwrap();
    let mut workspace = small.model.workspace(SEQUENCES).unwrap();
    let abort = AtomicBool::new(false);
    small
        .model
        .forward_backward(
            &small.weights,
            &mut on_cpu,
            &mut workspace,
            &emulation.tokens,
            1.0,
            &abort,
        )
        .unwrap();
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let size = norm(&mut on_cpu.iter().map(|&x| f64::from(x)));
    let error = norm(
        &mut gradient
            .iter()
            .zip(on_cpu.iter())
            .map(|(a, b)| f64::from(*a) - f64::from(*b)),
    );
    println!("gradient: relative error {:.2e}", error / size);
    assert!(size > 0.0 && error / size <= GRADIENT_ERROR_MAX);
}

/// DET-1, DET-2: the order in which blocks and threads run decides nothing.
#[test]
fn order_decides_no_bit_of_a_pass() {
    let emulation = emulation();
    let bits = || {
        let (losses, gradient) = pass(&emulation);
        let losses: Vec<u64> = losses.into_iter().map(f64::to_bits).collect();
        (losses, gradient.into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    let expected = bits();
    for order in [1, 2024] {
        emulation.device.driver().set_order(order);
        assert!(bits() == expected, "other bits in order {order}");
    }
}

#[test]
fn it_learns_two_sequences_by_heart() {
    let mut emulation = emulation();
    let flat = emulation.small.weights.len();
    let device = emulation.device.clone();
    let mut master = upload(&device, &emulation.small.weights, Precision::Full);
    let [mut gradients, mut first, mut second] = [(); 3].map(|()| upload(&device, &vec![0.0; flat], Precision::Full));
    let blocks = Blocks {
        first: BlockIndex(0),
        block_elements: common::BLOCK_ELEMENTS,
    };
    let mut hashes = vec![BlockHash::default(); emulation.small.layout.block_count()];
    let mut stream = device.stream().unwrap();
    let state = (View::from(&master), View::from(&first), View::from(&second));
    device
        .block_hashes(&mut stream, blocks, state.0, state.1, state.2, &mut hashes)
        .unwrap();
    let mut workspace = emulation.model.workspace(SEQUENCES).unwrap();
    let abort = AtomicBool::new(false);
    let count = (SEQUENCES * emulation.small.config.context) as f64;
    let mut course = Vec::new();
    for number in 1..=60 {
        device.zero(&mut stream, ViewMut::from(&mut gradients), flat).unwrap();
        device.synchronize(&mut stream).unwrap();
        let (weights, tokens) = (&emulation.weights, &emulation.tokens);
        let losses = emulation
            .model
            .forward_backward(
                weights,
                &mut gradients,
                &mut workspace,
                tokens,
                (1.0 / count) as f32,
                &abort,
            )
            .unwrap();
        course.push(losses.iter().sum::<f64>() / count);
        let step = AdamwStep {
            learning_rate: 1e-2,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            gradient_scale: 1.0,
            step: number,
        };
        let state = OptimizerState {
            master: ViewMut::from(&mut master),
            first_moment: ViewMut::from(&mut first),
            second_moment: ViewMut::from(&mut second),
        };
        let working = Some(ViewMut::from(&mut emulation.weights));
        let changed = device
            .adamw(
                &mut stream,
                &step,
                blocks,
                View::from(&gradients),
                state,
                working,
                &mut hashes,
            )
            .unwrap();
        assert_eq!(changed, 0, "memory changed by itself before update {number}");
    }
    println!("loss went from {} to {}", course[0], course[59]);
    assert!(
        course[0] > 3.0 && course[59] < 0.3,
        "loss went from {} to {}",
        course[0],
        course[59]
    );
}
