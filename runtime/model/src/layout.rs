//! Where Aquila2's tensors lie in the flat parameter space.

use tarazed_domain::ParameterLayout;
use tarazed_domain::config::ModelConfig;

/// The layout of a model: Hugging Face Llama names and `[out, in]` shapes. Norm weights do not decay.
///
/// Order matters to the model: query, key and value projections of a layer lie side by side, so that they are one
/// `[q + k + v, hidden]` matrix to a kernel, and so do gate and up projections.
///
/// # Panics
/// If `block_elements` is zero: the config refuses that before.
#[must_use]
pub fn parameter_layout(model: &ModelConfig, block_elements: usize) -> ParameterLayout {
    let (hidden, ffn, vocabulary) = (model.hidden, model.ffn, model.vocabulary);
    let (q, kv) = (model.heads * model.head_dim(), model.kv_heads * model.head_dim());
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden], true)];
    for layer in 0..model.layers {
        let mut put = |name: &str, shape: Vec<usize>, decays: bool| {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape, decays));
        };
        put("input_layernorm", vec![hidden], false);
        put("self_attn.q_proj", vec![q, hidden], true);
        put("self_attn.k_proj", vec![kv, hidden], true);
        put("self_attn.v_proj", vec![kv, hidden], true);
        put("self_attn.o_proj", vec![hidden, q], true);
        put("post_attention_layernorm", vec![hidden], false);
        put("mlp.gate_proj", vec![ffn, hidden], true);
        put("mlp.up_proj", vec![ffn, hidden], true);
        put("mlp.down_proj", vec![hidden, ffn], true);
    }
    tensors.push(("model.norm.weight".to_owned(), vec![hidden], false));
    tensors.push(("lm_head.weight".to_owned(), vec![vocabulary, hidden], true));
    ParameterLayout::new(tensors, block_elements)
}
