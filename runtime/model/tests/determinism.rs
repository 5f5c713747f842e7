//! DET-1: results follow from weights and tokens alone.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::AtomicBool;
use tarazed_kernels::{CpuBuffer, CpuDevice};

/// Bits of losses and gradients of one micro-batch.
fn pass(small: &common::Small, sequences: usize, tokens: &[u32], scale: f32) -> (Vec<u64>, Vec<u32>) {
    let mut workspace = small.model.workspace(sequences).unwrap();
    let mut gradients = CpuBuffer::zeroed(small.weights.len()).unwrap();
    let abort = AtomicBool::new(false);
    let losses = small
        .model
        .forward_backward(&small.weights, &mut gradients, &mut workspace, tokens, scale, &abort)
        .unwrap();
    (
        losses.iter().map(|loss| loss.to_bits()).collect(),
        gradients.iter().map(|g| g.to_bits()).collect(),
    )
}

/// DET-1: every instruction set gives the same bits.
#[test]
fn instruction_sets_agree() {
    let results: Vec<_> = CpuDevice::all_instruction_sets()
        .into_iter()
        .map(|device| {
            let small = common::small_on(device);
            let tokens = common::tokens(&small.config, 2, 6);
            pass(&small, 2, &tokens, 1.0)
        })
        .collect();
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
}

/// DET-1: threads that run at the same time do not touch each other's results.
#[test]
fn threads_agree() {
    let small = common::small();
    let tokens = common::tokens(&small.config, 2, 7);
    let alone = pass(&small, 2, &tokens, 1.0);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4).map(|_| scope.spawn(|| pass(&small, 2, &tokens, 1.0))).collect();
        for worker in workers {
            assert_eq!(worker.join().unwrap(), alone);
        }
    });
}

/// DET-1: a sequence's loss does not depend on its neighbours, on its place, or on the size of the workspace.
#[test]
fn sequences_do_not_touch_each_other() {
    let small = common::small();
    let run = small.config.context + 1;
    let tokens = common::tokens(&small.config, 3, 8);
    let (together, _) = pass(&small, 5, &tokens, 1.0);
    for (index, expected) in together.iter().enumerate() {
        let (alone, _) = pass(&small, 1, &tokens[index * run..(index + 1) * run], 1.0);
        assert_eq!(alone, [*expected]);
    }
}

/// DET-1: a workspace keeps nothing from one pass to the next.
#[test]
fn a_used_workspace_gives_the_same_bits() {
    let small = common::small();
    let tokens = common::tokens(&small.config, 2, 9);
    let (_, fresh) = pass(&small, 2, &tokens, 1.0);
    let mut workspace = small.model.workspace(2).unwrap();
    let abort = AtomicBool::new(false);
    let other = common::tokens(&small.config, 2, 10);
    let mut gradients = CpuBuffer::zeroed(small.weights.len()).unwrap();
    let model = &small.model;
    model
        .forward_backward(&small.weights, &mut gradients, &mut workspace, &other, 3.0, &abort)
        .unwrap();
    model.next_logits(&small.weights, &mut workspace, &other[..4]).unwrap();
    // Even a pass whose numbers went wrong leaves nothing behind.
    let mut broken = CpuBuffer::zeroed(small.weights.len()).unwrap();
    broken.fill(f32::NAN);
    let losses = model
        .forward_backward(&broken, &mut gradients, &mut workspace, &other, 1.0, &abort)
        .unwrap();
    assert!(
        losses.iter().all(|loss| loss.is_nan()),
        "a pass over NaN weights hid it"
    );
    gradients.fill(0.0);
    model
        .forward_backward(&small.weights, &mut gradients, &mut workspace, &tokens, 1.0, &abort)
        .unwrap();
    let used: Vec<u32> = gradients.iter().map(|g| g.to_bits()).collect();
    assert_eq!(used, fresh);
}

/// A power of two as loss scale moves exponents only.
#[test]
fn loss_scale_is_linear() {
    let small = common::small();
    let tokens = common::tokens(&small.config, 2, 11);
    let (_, one) = pass(&small, 2, &tokens, 1.0);
    let (_, eight) = pass(&small, 2, &tokens, 8.0);
    for (one, eight) in one.iter().zip(&eight) {
        assert_eq!((f32::from_bits(*one) * 8.0).to_bits(), *eight);
    }
}
