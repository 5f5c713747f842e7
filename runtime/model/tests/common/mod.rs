//! A small model, random tokens, and the whole model in f64.
#![allow(dead_code, clippy::unwrap_used)]

use tarazed_domain::ParameterLayout;
use tarazed_domain::config::ModelConfig;
use tarazed_kernels::conformance::{Random, reference};
use tarazed_kernels::{Attention, CpuBuffer, CpuDevice, Gemm};
use tarazed_model::{Model, initialise, parameter_layout};

pub const BLOCK_ELEMENTS: usize = 256;

pub fn config() -> ModelConfig {
    ModelConfig {
        layers: 2,
        hidden: 24,
        ffn: 40,
        heads: 4,
        kv_heads: 2,
        context: 9,
        vocabulary: 31,
        rope_theta: 10_000.0,
        norm_eps: 1e-5,
        init_std: 0.2,
        norm_init: 0.7,
        initial: None,
    }
}

pub struct Small {
    pub config: ModelConfig,
    pub layout: ParameterLayout,
    pub model: Model<CpuDevice>,
    pub weights: CpuBuffer,
}

pub fn small_on(device: CpuDevice) -> Small {
    let config = config();
    let layout = parameter_layout(&config, BLOCK_ELEMENTS);
    let model = Model::new(&config, &layout, device).unwrap();
    let mut weights = CpuBuffer::zeroed(layout.flat_elements()).unwrap();
    initialise(&layout, &config, 5, 0..layout.flat_elements(), &mut weights);
    Small {
        config,
        layout,
        model,
        weights,
    }
}

pub fn small() -> Small {
    small_on(CpuDevice::new())
}

pub fn tokens(config: &ModelConfig, sequences: usize, seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..sequences * (config.context + 1))
        .map(|_| random.below(config.vocabulary) as u32)
        .collect()
}

fn matrix(rows: usize, from: &[f64], weight: &[f64], width: usize) -> Vec<f64> {
    reference::gemm(&Gemm::forward(rows, weight.len() / width, width), from, weight, &[]).0
}

/// Logits `[ids, vocabulary]` of one sequence, in f64.
pub fn logits(config: &ModelConfig, layout: &ParameterLayout, weights: &[f64], ids: &[u32]) -> Vec<f64> {
    let tensor = |name: &str| &weights[layout.tensor(&format!("{name}.weight")).unwrap().range()];
    let (rows, hidden, depth) = (ids.len(), config.hidden, config.head_dim());
    let mut table = Vec::new();
    for position in 0..rows {
        let angle = |i: usize| position as f64 * config.rope_theta.powf(-2.0 * i as f64 / depth as f64);
        table.extend((0..depth / 2).map(|i| angle(i).cos()));
        table.extend((0..depth / 2).map(|i| angle(i).sin()));
    }
    let embedding = tensor("model.embed_tokens");
    let mut x: Vec<f64> = ids
        .iter()
        .flat_map(|&id| embedding[id as usize * hidden..(id as usize + 1) * hidden].to_vec())
        .collect();
    let call = Attention {
        sequences: 1,
        context: rows,
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: depth,
    };
    for layer in 0..config.layers {
        let tensor = |name: &str| tensor(&format!("model.layers.{layer}.{name}"));
        let norm = |x: &[f64], name: &str| reference::rms_norm(hidden, config.norm_eps, x, tensor(name)).0;
        let normed = norm(&x, "input_layernorm");
        let parts = ["q_proj", "k_proj", "v_proj"]
            .map(|part| matrix(rows, &normed, tensor(&format!("self_attn.{part}")), hidden));
        let mut qkv = Vec::new();
        for row in 0..rows {
            for part in &parts {
                let width = part.len() / rows;
                qkv.extend(&part[row * width..(row + 1) * width]);
            }
        }
        reference::rope(
            rows,
            config.heads + config.kv_heads,
            depth,
            call.qkv_width(),
            &table,
            1.0,
            &mut qkv,
        );
        let (attended, _) = reference::attention(&call, &qkv);
        let branch = matrix(rows, &attended, tensor("self_attn.o_proj"), call.out_width());
        x.iter_mut().zip(branch).for_each(|(x, y)| *x += y);
        let normed = norm(&x, "post_attention_layernorm");
        let gate = matrix(rows, &normed, tensor("mlp.gate_proj"), hidden);
        let up = matrix(rows, &normed, tensor("mlp.up_proj"), hidden);
        let mut gate_up = Vec::new();
        for row in 0..rows {
            gate_up.extend(&gate[row * config.ffn..(row + 1) * config.ffn]);
            gate_up.extend(&up[row * config.ffn..(row + 1) * config.ffn]);
        }
        let inner = reference::swiglu(config.ffn, &gate_up);
        let branch = matrix(rows, &inner, tensor("mlp.down_proj"), config.ffn);
        x.iter_mut().zip(branch).for_each(|(x, y)| *x += y);
    }
    let normed = reference::rms_norm(hidden, config.norm_eps, &x, tensor("model.norm")).0;
    matrix(rows, &normed, tensor("lm_head"), hidden)
}

/// Sum of token losses of each sequence, in f64.
pub fn losses(config: &ModelConfig, layout: &ParameterLayout, weights: &[f64], tokens: &[u32]) -> Vec<f64> {
    tokens
        .chunks_exact(config.context + 1)
        .map(|run| {
            let logits = logits(config, layout, weights, &run[..config.context]);
            reference::cross_entropy(config.vocabulary, 1.0, &run[1..], &logits)
                .0
                .iter()
                .sum()
        })
        .collect()
}
