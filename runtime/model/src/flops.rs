//! Model FLOPs utilisation (MFU): the share of a device's peak rate that the model's own arithmetic takes.
//!
//! The count is that of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): `6N + 12·L·H·Q·T` FLOPs a trained token.
//!
//! - `6N`: each multiplied parameter is two FLOPs forward and four backward. `N` counts the matrices of the layers and of the
//!   head; not the input embedding, which is looked up, and not the norms' weights.
//! - `12·L·H·Q·T`: scores and values of attention, for `L` layers of `H` query heads of `Q` elements over `T` tokens of
//!   context, forward and backward. All `T²` pairs count, as in the paper, although a causal kernel computes about half.
//! - Nothing else counts: not what is computed a second time, not the optimizer, not an evaluation.
//!
//! `MFU = tokens per second · FLOPs per token / (peak of one device · devices)`.

use tarazed_domain::config::ModelConfig;

/// FLOPs of one trained token as MFU counts them.
#[must_use]
pub fn mfu_flops_per_token(model: &ModelConfig) -> f64 {
    let (hidden, ffn, layers) = (model.hidden as f64, model.ffn as f64, model.layers as f64);
    let (heads, head_dim) = (model.heads as f64, model.head_dim() as f64);
    let kv_width = model.kv_heads as f64 * head_dim;
    let layer = 2.0 * hidden * heads * head_dim + 2.0 * hidden * kv_width + 3.0 * hidden * ffn;
    let multiplied = layers * layer + model.vocabulary as f64 * hidden;
    6.0 * multiplied + 12.0 * layers * heads * head_dim * model.context as f64
}

/// MFU, from 0 to 1, of so many tokens a second on devices of together so many FLOP/s.
#[must_use]
pub fn utilisation(model: &ModelConfig, tokens_per_s: f64, peak_flops_per_s: f64) -> f64 {
    tokens_per_s * mfu_flops_per_token(model) / peak_flops_per_s
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: one layer of 8 x (8 + 8 + 4 + 4 + 3 x 16), a head of 10 x 8; attention of 4 heads of 2 over 5 tokens.
    #[test]
    fn every_term_is_counted_once() {
        let model = ModelConfig {
            layers: 1,
            hidden: 8,
            ffn: 16,
            heads: 4,
            kv_heads: 2,
            context: 5,
            vocabulary: 10,
            rope_theta: 1e4,
            norm_eps: 1e-5,
            init_std: 0.02,
            norm_init: 1.0,
            initial: None,
        };
        let matrices = 6.0 * (8.0 * (8.0 + 8.0 + 4.0 + 4.0 + 3.0 * 16.0) + 80.0);
        let attention = 12.0 * 1.0 * 4.0 * 2.0 * 5.0;
        assert_eq!(mfu_flops_per_token(&model), matrices + attention);
        assert_eq!(utilisation(&model, 1e3, (matrices + attention) * 4e3), 0.25);
    }
}
