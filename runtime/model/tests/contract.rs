//! Layout, initial weights, refusals, abort, and that the whole learns.

mod common;

use proptest::prelude::*;
use std::sync::atomic::AtomicBool;
use tarazed_domain::BlockIndex;
use tarazed_domain::config::ModelConfig;
use tarazed_kernels::{
    AdamwStep, BlockHash, Blocks, CpuBuffer, CpuDevice, Device, DeviceError, OptimizerState, View, ViewMut,
};
use tarazed_model::{Model, ModelError, initialise, parameter_layout};

#[test]
fn tensors_have_llama_s_names_and_shapes() {
    let layout = parameter_layout(&common::config(), common::BLOCK_ELEMENTS);
    let shape = |name: &str| layout.tensor(name).map(|slot| (slot.shape.clone(), slot.decays));
    assert_eq!(shape("model.embed_tokens.weight"), Some((vec![31, 24], true)));
    assert_eq!(shape("model.layers.0.input_layernorm.weight"), Some((vec![24], false)));
    assert_eq!(
        shape("model.layers.1.self_attn.q_proj.weight"),
        Some((vec![24, 24], true))
    );
    assert_eq!(
        shape("model.layers.1.self_attn.k_proj.weight"),
        Some((vec![12, 24], true))
    );
    assert_eq!(
        shape("model.layers.1.self_attn.v_proj.weight"),
        Some((vec![12, 24], true))
    );
    assert_eq!(
        shape("model.layers.1.self_attn.o_proj.weight"),
        Some((vec![24, 24], true))
    );
    assert_eq!(shape("model.layers.1.mlp.gate_proj.weight"), Some((vec![40, 24], true)));
    assert_eq!(shape("model.layers.1.mlp.up_proj.weight"), Some((vec![40, 24], true)));
    assert_eq!(shape("model.layers.1.mlp.down_proj.weight"), Some((vec![24, 40], true)));
    assert_eq!(
        shape("model.layers.1.post_attention_layernorm.weight"),
        Some((vec![24], false))
    );
    assert_eq!(shape("model.norm.weight"), Some((vec![24], false)));
    assert_eq!(shape("lm_head.weight"), Some((vec![31, 24], true)));
    assert_eq!(layout.tensors().len(), 3 + 2 * 9);
}

#[test]
fn aquila2_7b_has_its_published_size() {
    let config = ModelConfig {
        layers: 32,
        hidden: 4096,
        ffn: 11008,
        heads: 32,
        kv_heads: 32,
        context: 2048,
        vocabulary: 100_008,
        ..common::config()
    };
    let count = parameter_layout(&config, 65_536).parameter_count();
    assert!(
        (7.29e9..7.31e9).contains(&(count as f64)),
        "{count} parameters, published 7.30B"
    );
}

proptest! {
    /// DET-1: any range of the flat space holds the same initial weights, whoever makes it.
    #[test]
    fn initial_weights_of_any_range_agree(start in 0_usize..12_000, len in 0_usize..3_000, seed in any::<u64>()) {
        let config = common::config();
        let layout = parameter_layout(&config, common::BLOCK_ELEMENTS);
        let flat = layout.flat_elements();
        let range = start.min(flat)..(start + len).min(flat);
        let mut whole = vec![f32::NAN; flat];
        initialise(&layout, &config, seed, 0..flat, &mut whole);
        let mut part = vec![f32::NAN; range.len()];
        initialise(&layout, &config, seed, range.clone(), &mut part);
        prop_assert_eq!(&part[..], &whole[range]);
    }
}

#[test]
fn initial_weights_are_normal_and_padding_is_zero() {
    let config = ModelConfig {
        vocabulary: 5000,
        ..common::config()
    };
    let layout = parameter_layout(&config, common::BLOCK_ELEMENTS);
    let mut flat = vec![f32::NAN; layout.flat_elements()];
    initialise(&layout, &config, 42, 0..flat.len(), &mut flat);
    let mut covered = vec![false; flat.len()];
    for slot in layout.tensors() {
        covered[slot.range()].fill(true);
        if slot.shape.len() == 1 {
            assert!(flat[slot.range()].iter().all(|&w| w == 0.7));
        }
    }
    assert!(flat.iter().zip(&covered).all(|(w, covered)| *covered || *w == 0.0));
    let head = &flat[layout.tensor("lm_head.weight").unwrap().range()];
    let moment = |power: i32| {
        head.iter()
            .map(|&w| (f64::from(w) / config.init_std).powi(power))
            .sum::<f64>()
            / head.len() as f64
    };
    // 120,000 draws: standard errors are 0.003, 0.004, 0.007 and 0.03.
    assert!(moment(1).abs() < 0.012 && (moment(2) - 1.0).abs() < 0.018);
    assert!(moment(3).abs() < 0.04 && (moment(4) - 3.0).abs() < 0.12);
    let embedding = &flat[layout.tensor("model.embed_tokens.weight").unwrap().range()];
    assert_ne!(head[..50], embedding[..50], "two tensors start alike");
    let mut other = vec![0.0; flat.len()];
    initialise(&layout, &config, 43, 0..flat.len(), &mut other);
    assert_ne!(flat, other, "the seed does not matter");
}

#[test]
fn unfit_input_is_refused_by_name() {
    let small = common::small();
    let mut workspace = small.model.workspace(2).unwrap();
    let abort = AtomicBool::new(false);
    let mut losses = |tokens: &[u32]| small.model.losses(&small.weights, &mut workspace, tokens, &abort);
    for tokens in [vec![], vec![0; 9], vec![0; 11], vec![0; 30]] {
        assert!(
            matches!(losses(&tokens), Err(ModelError::Input { .. })),
            "{} ids",
            tokens.len()
        );
    }
    let mut tokens = common::tokens(&small.config, 2, 1);
    tokens[13] = 31;
    let error = losses(&tokens).unwrap_err().to_string();
    assert!(error.contains("token id 31"), "{error}");
    for tokens in [vec![], vec![0; 10], vec![31]] {
        let refused = small.model.next_logits(&small.weights, &mut workspace, &tokens);
        assert!(matches!(refused, Err(ModelError::Input { .. })));
    }
    for tokens in [vec![], vec![0], vec![0; 12], vec![0, 31]] {
        let refused = small.model.token_losses(&small.weights, &mut workspace, &tokens);
        assert!(matches!(refused, Err(ModelError::Input { .. })), "{tokens:?}");
    }
}

#[test]
fn another_model_s_layout_is_refused() {
    let config = common::config();
    let other = ModelConfig {
        ffn: 48,
        ..common::config()
    };
    let layout = parameter_layout(&other, common::BLOCK_ELEMENTS);
    let refused = Model::new(&config, &layout, CpuDevice::new());
    assert!(matches!(refused, Err(ModelError::Input { .. })));
}

#[test]
fn a_workspace_that_does_not_fit_says_how_much_it_needed() {
    let small = common::small();
    let refused = small.model.workspace(1 << 48);
    let Err(ModelError::Device(DeviceError::OutOfMemory { needed_bytes, .. })) = refused else {
        panic!("a workspace of petabytes was granted");
    };
    assert!(needed_bytes > 1 << 48);
}

/// SUP-4: the abort flag ends a pass.
#[test]
fn an_aborted_pass_says_so() {
    let small = common::small();
    let mut workspace = small.model.workspace(2).unwrap();
    let tokens = common::tokens(&small.config, 2, 1);
    let mut gradients = CpuBuffer::zeroed(small.weights.len()).unwrap();
    let abort = AtomicBool::new(true);
    let model = &small.model;
    let aborted = model.forward_backward(&small.weights, &mut gradients, &mut workspace, &tokens, 1.0, &abort);
    assert!(matches!(aborted, Err(ModelError::Aborted)));
    let aborted = model.losses(&small.weights, &mut workspace, &tokens, &abort);
    assert!(matches!(aborted, Err(ModelError::Aborted)));
}

#[test]
fn it_learns_two_sequences_by_heart() {
    let mut small = common::small();
    let device = CpuDevice::new();
    let mut stream = device.stream().unwrap();
    let tokens = common::tokens(&small.config, 2, 12);
    let mut workspace = small.model.workspace(2).unwrap();
    let flat = small.weights.len();
    let [mut gradients, mut first_moment, mut second_moment] = [(); 3].map(|()| CpuBuffer::zeroed(flat).unwrap());
    let mut hashes = vec![BlockHash::default(); small.layout.block_count()];
    let abort = AtomicBool::new(false);
    let mut course = Vec::new();
    for number in 1..=60 {
        gradients.fill(0.0);
        let model = &small.model;
        let losses = model
            .forward_backward(
                &small.weights,
                &mut gradients,
                &mut workspace,
                &tokens,
                1.0 / 18.0,
                &abort,
            )
            .unwrap();
        course.push(losses.iter().sum::<f64>() / 18.0);
        let step = AdamwStep {
            learning_rate: 1e-2,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            gradient_scale: 1.0,
            step: number,
        };
        let blocks = Blocks {
            first: BlockIndex(0),
            block_elements: common::BLOCK_ELEMENTS,
        };
        let state = OptimizerState {
            master: ViewMut::from(&mut small.weights),
            first_moment: ViewMut::from(&mut first_moment),
            second_moment: ViewMut::from(&mut second_moment),
        };
        let gradient = View::from(&gradients);
        device
            .adamw(&mut stream, &step, blocks, gradient, state, None, &mut hashes)
            .unwrap();
    }
    assert!(
        course[0] > 3.0 && course[59] < 0.3,
        "loss went from {} to {}",
        course[0],
        course[59]
    );
}
