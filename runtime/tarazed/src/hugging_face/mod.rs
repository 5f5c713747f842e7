//! A model as a Hugging Face folder that loads as `LlamaForCausalLM`: what its files say. Pure; the weights are in [`weights`]. The way
//! back: [`model`] and [`tensors`].
//!
//! Aquila2 (arXiv 2408.07410) has the architecture of Llama, and tensors have the names, the shapes `[out, in]`, the order of
//! rotated pairs (element `i` of a head with `i + head_dim / 2`) and the norm of Hugging Face's Llama here: nothing is
//! transposed, permuted or scaled on its way out. Left out are the embedding's and the head's rows behind the tokenizer's last
//! token: they stand for no token.
//!
//! Every key is written that some reader takes a default for: transformers below version 5 looks for `rope_theta` and
//! `torch_dtype`, from 5 on for `rope_parameters` and `dtype`, and without its own takes 10,000 and f32 in silence.

pub mod header;
pub mod model;
pub mod tensors;
pub mod weights;

use serde_json::{Value, json};
use tarazed_corpus::Tokenizer;
use tarazed_domain::config::ModelConfig;

/// What a weight is written as.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Dtype {
    /// As the checkpoint has it.
    F32,
    /// Rounded to the nearest bf16, ties to even.
    Bf16,
}

impl Dtype {
    /// Bytes of one value.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// Its name in a safetensors header.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
        }
    }

    /// PyTorch's name of it.
    #[must_use]
    pub const fn torch(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        }
    }
}

/// `config.json`.
#[must_use]
pub fn config(model: &ModelConfig, tokenizer: &Tokenizer, dtype: Dtype) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.vocabulary(),
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim(),
        "hidden_act": "silu",
        "max_position_embeddings": model.context,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": false,
        "attention_dropout": 0.0,
        "mlp_bias": false,
        "tie_word_embeddings": false,
        "use_cache": true,
        "bos_token_id": tokenizer.end_of_document(),
        "eos_token_id": tokenizer.end_of_document(),
        "pad_token_id": tokenizer.pad(),
        "torch_dtype": dtype.torch(),
        "dtype": dtype.torch(),
    })
}

/// `generation_config.json`: where a text begins and ends.
#[must_use]
pub fn generation_config(tokenizer: &Tokenizer) -> Value {
    json!({
        "bos_token_id": tokenizer.end_of_document(),
        "eos_token_id": tokenizer.end_of_document(),
        "pad_token_id": tokenizer.pad(),
    })
}

/// `tokenizer_config.json`. A text begins behind the token that ends one, as in training: Aquila2's own `[CLS]` was never seen.
/// Text that spells a special token is text, as in training.
#[must_use]
pub fn tokenizer_config(model: &ModelConfig, tokenizer: &Tokenizer) -> Value {
    let end = tokenizer.name(tokenizer.end_of_document());
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.context,
        "bos_token": end,
        "eos_token": end,
        "clean_up_tokenization_spaces": false,
        "split_special_tokens": true,
    });
    if let Some(pad) = tokenizer.pad().and_then(|id| tokenizer.name(id)) {
        config["pad_token"] = pad.into();
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_generations_of_readers_find_their_keys() {
        let model = ModelConfig {
            layers: 3,
            hidden: 48,
            ffn: 64,
            heads: 6,
            kv_heads: 2,
            context: 16,
            vocabulary: 400,
            rope_theta: 5e5,
            norm_eps: 1e-5,
            init_std: 0.02,
            norm_init: 1.0,
            initial: None,
        };
        let texts = ["The lane holds.".to_owned(), "训练".to_owned()];
        let (tokenizer, _) = Tokenizer::train_bpe(&texts, 300).expect("a tokenizer");
        let said = config(&model, &tokenizer, Dtype::Bf16);
        let end = tokenizer.end_of_document();
        for (key, value) in [
            ("vocab_size", json!(tokenizer.vocabulary())),
            ("head_dim", json!(8)),
            ("num_key_value_heads", json!(2)),
            ("rope_theta", json!(5e5)),
            ("torch_dtype", json!("bfloat16")),
            ("dtype", json!("bfloat16")),
            ("tie_word_embeddings", json!(false)),
            ("eos_token_id", json!(end)),
            ("pad_token_id", json!(0)),
        ] {
            assert_eq!(said[key], value, "{key}");
        }
        assert_eq!(said["rope_parameters"]["rope_theta"], said["rope_theta"]);
        let words = tokenizer_config(&model, &tokenizer);
        assert_eq!(
            (&words["eos_token"], &words["bos_token"], &words["pad_token"]),
            (&json!("</s>"), &json!("</s>"), &json!("<|endoftext|>"))
        );
    }
}
