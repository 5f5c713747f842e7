//! Sizes that follow from a model's shape alone.

use tarazed_domain::config::ModelConfig;

/// Parameters of a model, by what happens to them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ParameterCount {
    /// Input embedding: `vocabulary × hidden`, looked up, not multiplied.
    pub embedding: u64,
    /// Matrices of the layers and the head: each is multiplied once a token.
    pub multiplied: u64,
    /// Norm weights: the only ones that do not decay.
    pub norms: u64,
}

impl ParameterCount {
    /// Of a model: untied embeddings, no biases, GQA, SwiGLU (arXiv 2408.07410, Table 1).
    #[must_use]
    pub const fn of(model: &ModelConfig) -> Self {
        let (hidden, ffn, layers) = (model.hidden as u64, model.ffn as u64, model.layers as u64);
        let kv_width = kv_width(model) as u64;
        let attention = 2 * hidden * hidden + 2 * hidden * kv_width;
        let mlp = 3 * hidden * ffn;
        let embedding = model.vocabulary as u64 * hidden;
        Self {
            embedding,
            multiplied: layers * (attention + mlp) + embedding,
            norms: layers * 2 * hidden + hidden,
        }
    }

    /// All of them.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.embedding + self.multiplied + self.norms
    }
}

/// FLOPs of one training token, forward and backward: `6 × multiplied parameters + 6 × layers × context × hidden`.
///
/// A multiplication by a matrix of `n` elements is `2n` forward and `4n` backward. Causal attention does `2 × context ×
/// hidden` a layer forward (scores and values, half of each masked away) and twice that backward.
#[must_use]
pub fn flops_per_token(model: &ModelConfig) -> f64 {
    let matrices = 6.0 * ParameterCount::of(model).multiplied as f64;
    let attention = 6.0 * model.layers as f64 * model.context as f64 * model.hidden as f64;
    matrices + attention
}

/// Elements of one layer's activations that its backward pass reads, per token: `6 × hidden + 2 × kv width + 2 × ffn`.
///
/// The input, its norm, q, the attention's output, the sum after attention and its norm (`6 × hidden`), k and v, gate and
/// up (`2 × ffn`); their product is made again in the backward pass. Attention keeps no score matrix.
#[must_use]
pub const fn layer_activation_elements(model: &ModelConfig) -> u64 {
    (6 * model.hidden + 2 * kv_width(model) + 2 * model.ffn) as u64
}

/// f32 statistics of one layer that its backward pass reads, per token: one a head and one for each of two norms.
#[must_use]
pub const fn layer_statistics(model: &ModelConfig) -> u64 {
    (model.heads + 2) as u64
}

/// Elements of the backward pass's temporaries, per token: `5 × hidden + 2 × kv width + ffn`.
#[must_use]
pub const fn temporary_elements(model: &ModelConfig) -> u64 {
    (5 * model.hidden + 2 * kv_width(model) + model.ffn) as u64
}

const fn kv_width(model: &ModelConfig) -> usize {
    model.kv_heads * model.head_dim()
}
