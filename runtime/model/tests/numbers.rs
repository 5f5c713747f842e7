//! The model against the same model in f64: losses, logits, every gradient tensor.

mod common;

use std::sync::atomic::AtomicBool;
use tarazed_domain::config::ModelConfig;
use tarazed_kernels::conformance::Random;
use tarazed_kernels::{CpuBuffer, CpuDevice, Device, head_rows, head_rows_most};
use tarazed_model::{Model, initialise, parameter_layout};

#[test]
fn losses_and_logits_match_the_oracle() {
    let small = common::small();
    let wide: Vec<f64> = small.weights.iter().map(|&w| f64::from(w)).collect();
    let tokens = common::tokens(&small.config, 3, 1);
    let mut workspace = small.model.workspace(3).unwrap();
    let abort = AtomicBool::new(false);
    let got = small
        .model
        .losses(&small.weights, &mut workspace, &tokens, &abort)
        .unwrap();
    let expected = common::losses(&small.config, &small.layout, &wide, &tokens);
    for (got, expected) in got.iter().zip(&expected) {
        assert!(
            (got - expected).abs() <= 2e-6 * expected,
            "loss {got}, expected {expected}"
        );
    }
    for length in 1..=small.config.context {
        let ids = &tokens[..length];
        let got = small.model.next_logits(&small.weights, &mut workspace, ids).unwrap();
        let all = common::logits(&small.config, &small.layout, &wide, ids);
        let expected = &all[(length - 1) * small.config.vocabulary..];
        for (got, expected) in got.iter().zip(expected) {
            assert!(
                (f64::from(*got) - expected).abs() <= 1e-5,
                "logit {got}, expected {expected}"
            );
        }
    }
}

/// A token's loss is that of the oracle whatever follows it, and all of a whole sequence sum to what training sums, bit for
/// bit.
#[test]
fn token_losses_are_the_parts_of_a_sequence_s_loss() {
    let small = common::small();
    let wide: Vec<f64> = small.weights.iter().map(|&w| f64::from(w)).collect();
    let tokens = common::tokens(&small.config, 1, 5);
    let mut workspace = small.model.workspace(1).unwrap();
    let abort = AtomicBool::new(false);
    let whole = small
        .model
        .losses(&small.weights, &mut workspace, &tokens, &abort)
        .unwrap();
    for length in 2..=tokens.len() {
        let ids = &tokens[..length];
        let got = small.model.token_losses(&small.weights, &mut workspace, ids).unwrap();
        assert_eq!(got.len(), length - 1);
        let logits = common::logits(&small.config, &small.layout, &wide, &ids[..length - 1]);
        for ((row, &target), got) in logits.chunks(small.config.vocabulary).zip(&ids[1..]).zip(&got) {
            let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = row.iter().map(|logit| (logit - most).exp()).sum();
            let expected = most + sum.ln() - row[target as usize];
            assert!(
                (f64::from(*got) - expected).abs() <= 1e-5,
                "loss {got}, expected {expected}"
            );
        }
        if length == tokens.len() {
            let sum = got.iter().fold(0.0, |sum, &loss| sum + f64::from(loss));
            assert_eq!(sum.to_bits(), whole[0].to_bits());
        }
    }
}

#[test]
fn every_gradient_tensor_matches_slopes_of_the_oracle() {
    let small = common::small();
    let tokens = common::tokens(&small.config, 2, 2);
    let scale = 0.25;
    let mut workspace = small.model.workspace(2).unwrap();
    // The gradient is added to what is there.
    let mut gradients = CpuBuffer::zeroed(small.weights.len()).unwrap();
    gradients.fill(1.0);
    let abort = AtomicBool::new(false);
    small
        .model
        .forward_backward(&small.weights, &mut gradients, &mut workspace, &tokens, scale, &abort)
        .unwrap();

    let mut wide: Vec<f64> = small.weights.iter().map(|&w| f64::from(w)).collect();
    let mut random = Random::new(3);
    for slot in small.layout.tensors() {
        let gradient = &gradients[slot.range()];
        let largest = gradient
            .iter()
            .fold(0.0_f64, |largest, g| largest.max((f64::from(*g) - 1.0).abs()));
        assert!(largest > 1e-3, "{} has no gradient", slot.name);
        for _ in 0..30 {
            let index = random.below(slot.len());
            let at = slot.offset + index;
            let kept = wide[at];
            let step = 1e-4;
            let mut value = |weight: f64| {
                wide[at] = weight;
                let losses = common::losses(&small.config, &small.layout, &wide, &tokens);
                losses.iter().sum::<f64>() * f64::from(scale)
            };
            let slope = (value(kept + step) - value(kept - step)) / (2.0 * step);
            wide[at] = kept;
            let got = f64::from(gradient[index]) - 1.0;
            let allowed = 2e-5 * largest.max(1.0);
            assert!(
                (got - slope).abs() <= allowed,
                "{}[{index}]: {got}, slope {slope}",
                slot.name
            );
        }
    }
    let padding = small.layout.tensors().iter().map(|slot| slot.len()).sum::<usize>();
    let untouched = gradients.iter().filter(|&&g| g == 1.0).count();
    assert!(untouched >= small.weights.len() - padding, "padding got a gradient");
}

#[test]
fn losses_are_those_of_the_training_pass_bit_for_bit() {
    let small = common::small();
    let tokens = common::tokens(&small.config, 2, 4);
    let mut workspace = small.model.workspace(2).unwrap();
    let mut gradients = small
        .model
        .device()
        .alloc(small.weights.len(), tarazed_kernels::Precision::Full)
        .unwrap();
    let abort = AtomicBool::new(false);
    let trained = small
        .model
        .forward_backward(&small.weights, &mut gradients, &mut workspace, &tokens, 1.0, &abort)
        .unwrap();
    let held_out = small
        .model
        .losses(&small.weights, &mut workspace, &tokens, &abort)
        .unwrap();
    assert_eq!(trained, held_out);
}

/// A text that is shorter than the context may be one longer chunk of logits than a whole one's are: it has its place.
#[test]
fn token_losses_of_any_length_have_room() {
    let config = ModelConfig {
        layers: 1,
        hidden: 8,
        ffn: 8,
        heads: 2,
        kv_heads: 1,
        context: 256,
        vocabulary: 5000,
        ..common::config()
    };
    let most = head_rows_most(CpuDevice::new().logits_elements(), config.vocabulary);
    assert!(
        head_rows(CpuDevice::new().logits_elements(), config.vocabulary, config.context) < most
            && most < config.context,
        "a whole sequence has shorter chunks than a part of it"
    );
    let layout = parameter_layout(&config, common::BLOCK_ELEMENTS);
    let model = Model::new(&config, &layout, CpuDevice::new()).unwrap();
    let mut weights = CpuBuffer::zeroed(layout.flat_elements()).unwrap();
    initialise(&layout, &config, 1, 0..layout.flat_elements(), &mut weights);
    let mut workspace = model.workspace(1).unwrap();
    let tokens: Vec<u32> = (0..=config.context as u32).map(|i| i * 37 % 5000).collect();
    let whole = model.token_losses(&weights, &mut workspace, &tokens).unwrap();
    for length in [2, 129, 130, most, most + 1, most + 2, 256] {
        let part = model.token_losses(&weights, &mut workspace, &tokens[..length]).unwrap();
        // How rows are cut decides no row's own loss.
        assert_eq!(part, whole[..length - 1], "{length} tokens");
    }
}
