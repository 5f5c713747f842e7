//! What the `config.json` of a Hugging Face folder says, as `[model]`: the way back of [`super::config`]. Pure.
//!
//! A model that loads and then computes something else would be worse than none, so whatever `[model]` cannot express is refused by
//! its key. Where a key is absent, the value counts that the `LlamaConfig` of transformers takes.

use serde_json::Value;
use tarazed_domain::config::ModelConfig;

/// A key of `config.json` that says what `[model]` cannot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unfit {
    /// Dotted.
    pub key: String,
    /// What is wrong with it.
    pub cause: String,
}

fn unfit(key: impl Into<String>, cause: impl Into<String>) -> Unfit {
    let (key, cause) = (key.into(), cause.into());
    Unfit { key, cause }
}

/// Keys that have one meaning here, and the values with that meaning as JSON spells them; none at all has it, too.
const PLAIN: [(&str, &[&str]); 11] = [
    ("hidden_act", &["\"silu\"", "\"swish\""]),
    ("tie_word_embeddings", &["false"]),
    ("attention_bias", &["false"]),
    ("mlp_bias", &["false"]),
    ("attention_dropout", &["0", "0.0"]),
    ("partial_rotary_factor", &["1", "1.0"]),
    ("sliding_window", &[]),
    ("use_sliding_window", &["false"]),
    ("num_experts", &["0", "1"]),
    ("num_local_experts", &["0", "1"]),
    ("quantization_config", &[]),
];

/// The model that `config.json` describes; its sizes are looked at by nobody yet ([`ModelConfig::validate`]).
///
/// # Errors
/// The first key that does not fit.
pub fn model(config: &Value) -> Result<ModelConfig, Unfit> {
    let keys = Keys(config);
    keys.check_kind()?;
    keys.check_plain()?;
    let (hidden, heads) = (keys.size("hidden_size", None)?, keys.size("num_attention_heads", None)?);
    let head_dim = keys.size("head_dim", Some((hidden / heads).max(1)))?;
    if heads.checked_mul(head_dim) != Some(hidden) {
        let cause = format!("{heads} heads of {head_dim} elements are no hidden size of {hidden}");
        return Err(unfit("head_dim", cause));
    }
    Ok(ModelConfig {
        layers: keys.size("num_hidden_layers", None)?,
        hidden,
        ffn: keys.size("intermediate_size", None)?,
        heads,
        kv_heads: keys.size("num_key_value_heads", Some(heads))?,
        context: keys.size("max_position_embeddings", Some(2048))?,
        vocabulary: keys.size("vocab_size", None)?,
        rope_theta: keys.rope_theta()?,
        norm_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6),
        init_std: keys.number("initializer_range")?.unwrap_or(0.02),
        norm_init: 1.0,
        initial: None,
    })
}

struct Keys<'a>(&'a Value);

impl Keys<'_> {
    /// `null` is as good as absent.
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn check_kind(&self) -> Result<(), Unfit> {
        let kind = self.get("model_type").unwrap_or(&Value::Null);
        if kind.as_str() != Some("llama") {
            return Err(unfit("model_type", format!("is {kind}, and \"llama\" alone is read")));
        }
        let Some(names) = self.get("architectures") else {
            return Ok(());
        };
        let is_causal = |name: &Value| name.as_str() == Some("LlamaForCausalLM");
        match names.as_array() {
            Some(names) if !names.is_empty() && names.iter().all(is_causal) => Ok(()),
            _ => {
                let cause = format!("is {names}, and [\"LlamaForCausalLM\"] alone is read");
                Err(unfit("architectures", cause))
            }
        }
    }

    fn check_plain(&self) -> Result<(), Unfit> {
        for (key, plain) in PLAIN {
            let Some(value) = self.get(key) else { continue };
            if !plain.contains(&value.to_string().as_str()) {
                let one = plain.first().map_or_else(
                    || "there is no such thing in [model]".to_owned(),
                    |plain| format!("[model] means {plain}"),
                );
                return Err(unfit(key, format!("is {}, and {one}", short(value))));
            }
        }
        let is_full = |kind: &Value| kind.as_str() == Some("full_attention");
        match self.get("layer_types") {
            Some(kinds) if !kinds.as_array().is_some_and(|kinds| kinds.iter().all(is_full)) => {
                let cause = format!("is {}, and every layer attends to all positions here", short(kinds));
                Err(unfit("layer_types", cause))
            }
            _ => Ok(()),
        }
    }

    /// A whole number from 1 up.
    fn size(&self, key: &str, absent: Option<usize>) -> Result<usize, Unfit> {
        let Some(value) = self.get(key) else {
            return absent.ok_or_else(|| unfit(key, "is not there"));
        };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        size.filter(|&size| size > 0)
            .ok_or_else(|| unfit(key, format!("is {}, and no size", short(value))))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, Unfit> {
        let value = self.get(key);
        value.map(|value| number(key, value)).transpose()
    }

    /// transformers writes `rope_theta` and `rope_scaling` below version 5, `rope_parameters` from there on, and we write both.
    fn rope_theta(&self) -> Result<f64, Unfit> {
        let mut theta = self.number("rope_theta")?;
        for section in ["rope_scaling", "rope_parameters"] {
            let Some(value) = self.get(section) else { continue };
            let Some(rope) = value.as_object() else {
                return Err(unfit(section, format!("is {}, and no object", short(value))));
            };
            for (name, value) in rope.iter().filter(|(_, value)| !value.is_null()) {
                let key = format!("{section}.{name}");
                match name.as_str() {
                    "rope_type" | "type" if value.as_str() == Some("default") => {}
                    "partial_rotary_factor" if value.as_f64() == Some(1.0) => {}
                    "rope_theta" => {
                        let here = number(&key, value)?;
                        if let Some(other) = theta.filter(|other| *other != here) {
                            return Err(unfit(key, format!("is {here}, and elsewhere it is {other}")));
                        }
                        theta = Some(here);
                    }
                    _ => {
                        return Err(unfit(
                            key,
                            format!("is {}, and positions are not scaled here", short(value)),
                        ));
                    }
                }
            }
        }
        Ok(theta.unwrap_or(10_000.0))
    }
}

fn number(key: &str, value: &Value) -> Result<f64, Unfit> {
    value
        .as_f64()
        .ok_or_else(|| unfit(key, format!("is {}, and no number", short(value))))
}

/// A value as a message has room for.
fn short(value: &Value) -> String {
    const CHARS: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// What transformers 4 writes of a model with grouped-query attention.
    fn plain() -> Value {
        json!({
            "_name_or_path": "somewhere",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": [2, 3],
            "hidden_act": "silu",
            "hidden_size": 48,
            "initializer_range": 0.01,
            "intermediate_size": 64,
            "max_position_embeddings": 16,
            "mlp_bias": false,
            "model_type": "llama",
            "num_attention_heads": 6,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": null,
            "rope_theta": 500000,
            "tie_word_embeddings": false,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.40.0",
            "use_cache": true,
            "vocab_size": 400,
        })
    }

    fn with(key: &str, value: Value) -> Value {
        let mut config = plain();
        config[key] = value;
        config
    }

    fn without(key: &str) -> Value {
        let mut config = plain();
        config.as_object_mut().expect("an object").remove(key);
        config
    }

    #[test]
    fn sizes_and_bases_are_read() {
        let read = model(&plain()).expect("a plain model");
        let expected = ModelConfig {
            layers: 3,
            hidden: 48,
            ffn: 64,
            heads: 6,
            kv_heads: 2,
            context: 16,
            vocabulary: 400,
            rope_theta: 5e5,
            norm_eps: 1e-5,
            init_std: 0.01,
            norm_init: 1.0,
            initial: None,
        };
        assert_eq!(read, expected);
        // As from version 5 on.
        let mut newer = without("rope_theta");
        newer["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 5e5});
        newer["head_dim"] = json!(8);
        newer["dtype"] = json!("bfloat16");
        newer["layer_types"] = json!(["full_attention", "full_attention", "full_attention"]);
        assert_eq!(model(&newer), Ok(expected.clone()));
        for (key, value) in [
            ("rope_scaling", json!({"type": "default"})),
            ("rope_parameters", json!({"rope_theta": 500000.0, "factor": null})),
            ("hidden_act", json!("swish")),
            ("sliding_window", Value::Null),
            ("partial_rotary_factor", json!(1.0)),
        ] {
            assert_eq!(model(&with(key, value)), Ok(expected.clone()), "{key}");
        }
    }

    #[test]
    fn what_is_absent_is_what_transformers_takes() {
        type Of = fn(&ModelConfig) -> f64;
        let cases: [(&str, Of, f64); 5] = [
            ("num_key_value_heads", |model| model.kv_heads as f64, 6.0),
            ("max_position_embeddings", |model| model.context as f64, 2048.0),
            ("rope_theta", |model| model.rope_theta, 1e4),
            ("rms_norm_eps", |model| model.norm_eps, 1e-6),
            ("initializer_range", |model| model.init_std, 0.02),
        ];
        for (key, of, value) in cases {
            assert_eq!(of(&model(&without(key)).expect("a model")), value, "{key}");
        }
        for key in ["architectures", "tie_word_embeddings", "hidden_act", "mlp_bias"] {
            model(&without(key)).expect(key);
        }
    }

    #[test]
    fn what_the_model_cannot_be_is_refused_by_its_key() {
        for (key, value) in [
            ("model_type", json!("mistral")),
            ("model_type", Value::Null),
            ("architectures", json!(["LlamaForSequenceClassification"])),
            ("architectures", json!([])),
            ("architectures", json!("LlamaForCausalLM")),
            ("tie_word_embeddings", json!(true)),
            ("attention_bias", json!(true)),
            ("mlp_bias", json!(true)),
            ("attention_dropout", json!(0.1)),
            ("hidden_act", json!("gelu")),
            ("sliding_window", json!(4096)),
            ("use_sliding_window", json!(true)),
            ("partial_rotary_factor", json!(0.5)),
            ("num_local_experts", json!(8)),
            ("quantization_config", json!({"bits": 4})),
            ("layer_types", json!(["full_attention", "sliding_attention"])),
            ("layer_types", json!("full_attention")),
            ("head_dim", json!(16)),
            ("hidden_size", json!(0)),
            ("hidden_size", json!(-48)),
            ("hidden_size", json!(48.0)),
            ("hidden_size", json!("48")),
            ("vocab_size", json!(u64::MAX as f64)),
            ("rope_theta", json!("500000")),
            ("rms_norm_eps", json!([])),
        ] {
            let refused = model(&with(key, value.clone())).expect_err(key);
            assert_eq!(refused.key, key, "{value}: {refused:?}");
        }
        for key in [
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        ] {
            assert_eq!(model(&without(key)), Err(unfit(key, "is not there")));
        }
        for config in [json!([]), json!("llama"), Value::Null] {
            assert_eq!(model(&config).expect_err("no object").key, "model_type");
        }
        let mut odd = plain();
        odd["num_attention_heads"] = json!(7);
        assert_eq!(model(&odd).expect_err("no divisor").key, "head_dim");
    }

    #[test]
    fn scaled_positions_are_refused() {
        for (section, rope, key) in [
            (
                "rope_scaling",
                json!({"type": "linear", "factor": 2.0}),
                "rope_scaling.",
            ),
            (
                "rope_scaling",
                json!({"rope_type": "llama3", "factor": 8.0}),
                "rope_scaling.",
            ),
            ("rope_scaling", json!("linear"), "rope_scaling"),
            (
                "rope_parameters",
                json!({"rope_type": "yarn"}),
                "rope_parameters.rope_type",
            ),
            (
                "rope_parameters",
                json!({"rope_type": "default", "rope_theta": 1e4}),
                "rope_parameters.rope_theta",
            ),
            (
                "rope_parameters",
                json!({"partial_rotary_factor": 0.25}),
                "rope_parameters.partial_rotary_factor",
            ),
        ] {
            let refused = model(&with(section, rope.clone())).expect_err(section);
            assert!(refused.key.starts_with(key), "{rope}: {refused:?}");
        }
    }

    #[test]
    fn a_long_value_is_cut() {
        let long = json!("ä".repeat(100));
        assert_eq!(short(&long).chars().count(), 61);
        assert_eq!(short(&json!(true)), "true");
    }
}
