//! Offsets of the model's matrices in the flat parameter space.

use crate::model::ModelError;
use tarazed_domain::config::ModelConfig;
use tarazed_domain::{ParameterLayout, TensorSlot};

/// First elements of one layer's tensors.
pub(crate) struct LayerWeights {
    pub input_norm: usize,
    /// Query, key and value projections, as one `[q + k + v, hidden]` matrix.
    pub qkv: usize,
    pub out: usize,
    pub middle_norm: usize,
    /// Gate and up projections, as one `[2 · ffn, hidden]` matrix.
    pub gate_up: usize,
    pub down: usize,
}

/// First elements of all tensors.
pub(crate) struct Weights {
    pub embedding: usize,
    pub layers: Vec<LayerWeights>,
    pub norm: usize,
    pub head: usize,
}

fn wrong(cause: String) -> ModelError {
    ModelError::input(cause, "make the layout with `parameter_layout` of this same config")
}

fn slot<'a>(layout: &'a ParameterLayout, name: &str, shape: &[usize]) -> Result<&'a TensorSlot, ModelError> {
    match layout.tensor(name) {
        Some(slot) if slot.shape == shape => Ok(slot),
        Some(slot) => Err(wrong(format!("{name} has shape {:?}, not {shape:?}", slot.shape))),
        None => Err(wrong(format!("the layout has no tensor {name}"))),
    }
}

/// The offset of tensors that lie side by side.
fn joined(layout: &ParameterLayout, parts: &[(String, [usize; 2])]) -> Result<usize, ModelError> {
    let mut first = None;
    let mut expected = None;
    for (name, shape) in parts {
        let slot = slot(layout, name, shape)?;
        if expected.is_some_and(|expected| expected != slot.offset) {
            return Err(wrong(format!("{name} does not follow its neighbour")));
        }
        first = first.or(Some(slot.offset));
        expected = Some(slot.offset + slot.len());
    }
    first.ok_or_else(|| wrong("no tensor to join".to_owned()))
}

impl Weights {
    /// Finds and checks every tensor.
    pub fn find(config: &ModelConfig, layout: &ParameterLayout) -> Result<Self, ModelError> {
        let hidden = config.hidden;
        let (q, kv) = (config.heads * config.head_dim(), config.kv_heads * config.head_dim());
        let table = [config.vocabulary, hidden];
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let one = |part: &str, shape: &[usize]| slot(layout, &name(part), shape).map(|slot| slot.offset);
            let matrix = |part: &str, rows: usize| (name(part), [rows, hidden]);
            layers.push(LayerWeights {
                input_norm: one("input_layernorm", &[hidden])?,
                qkv: joined(
                    layout,
                    &[
                        matrix("self_attn.q_proj", q),
                        matrix("self_attn.k_proj", kv),
                        matrix("self_attn.v_proj", kv),
                    ],
                )?,
                out: one("self_attn.o_proj", &[hidden, q])?,
                middle_norm: one("post_attention_layernorm", &[hidden])?,
                gate_up: joined(
                    layout,
                    &[matrix("mlp.gate_proj", config.ffn), matrix("mlp.up_proj", config.ffn)],
                )?,
                down: one("mlp.down_proj", &[hidden, config.ffn])?,
            });
        }
        Ok(Self {
            embedding: slot(layout, "model.embed_tokens.weight", &table)?.offset,
            layers,
            norm: slot(layout, "model.norm.weight", &[hidden])?.offset,
            head: slot(layout, "lm_head.weight", &table)?.offset,
        })
    }
}
