//! Which configs the kernels take: asked before a run starts, so that a shape that they refuse is not met in its first step.
//!
//! The answer is the kernels' own: [`launches`] asks [`super::table`] for every launch of a training step whose size follows
//! from the config, so no limit is written down twice. Whether the matrix library has an algorithm for each product, only the
//! library knows: `Device::prepare_gemm` asks it when a rank opens its device.

use super::table::{self, Launch};
use crate::device::{Attention, CrossEntropy, DeviceError, Norm, Rope};
use tarazed_domain::config::{Config, ConfigError};

/// A launch of a training step, and the key that decides whether it is possible.
#[derive(Debug)]
pub struct Required {
    /// Dotted key of the config.
    pub key: &'static str,
    /// The key's value.
    pub value: u64,
    /// The launch, at its largest; or why there is none.
    pub launch: Result<Launch, DeviceError>,
}

/// Every launch of a training step of this config, each at the largest size that it has there: a whole micro-batch, all
/// parameters.
#[must_use]
pub fn launches(config: &Config) -> Vec<Required> {
    let (model, batch) = (&config.model, &config.batch);
    let sequences = batch.micro_batch_sequences as usize;
    let rows = sequences * model.context;
    let norm = Norm {
        rows,
        width: model.hidden,
        eps: model.norm_eps as f32,
    };
    let attention = Attention {
        sequences,
        context: model.context,
        heads: model.heads,
        kv_heads: model.kv_heads,
        head_dim: model.head_dim(),
    };
    let rope = Rope {
        rows,
        context: model.context,
        heads: model.heads + model.kv_heads,
        head_dim: model.head_dim(),
        stride: attention.qkv_width(),
    };
    let loss = CrossEntropy {
        rows,
        vocabulary: model.vocabulary,
        target_offset: 0,
        gradient_scale: Some(1.0),
    };
    let heads = |launch| Required::new("model.heads", model.heads, launch);
    let hidden = |launch| Required::new("model.hidden", model.hidden, launch);
    let micro_batch = |launch| Required::new("batch.micro_batch_sequences", sequences, launch);
    // Heads first: with them right, attention can fail for the number of sequences alone.
    let mut all = vec![heads(table::attention(&Attention {
        sequences: 1,
        ..attention
    }))];
    all.extend([
        hidden(table::rms_norm_backward(&norm)),
        hidden(table::rms_norm_weight_gradient(&norm)),
    ]);
    all.extend(
        [
            table::attention(&attention),
            table::attention_delta(&attention),
            table::attention_keys(&attention),
            table::attention_queries(&attention),
            table::attention_group_sums(&attention),
            table::rms_norm(&norm),
            table::rope(&rope),
            table::swiglu(&table::SWIGLU, rows, model.ffn),
            table::swiglu(&table::SWIGLU_BACKWARD, rows, model.ffn),
            table::embed(rows, model.hidden),
            table::embed_sort(rows),
            table::embed_order(rows),
            table::embed_backward(rows, model.hidden),
            table::cross_entropy(&loss),
            table::cross_entropy(&CrossEntropy {
                gradient_scale: None,
                ..loss
            }),
        ]
        .map(micro_batch),
    );
    all.extend(state_launches(config));
    all
}

/// Those over parameters.
fn state_launches(config: &Config) -> Vec<Required> {
    let block = config.optimizer.block_elements;
    // Validation has counted them; a model beyond that has no blocks that anyone could launch over.
    let parameters = config.model.parameter_count().unwrap_or(u64::MAX);
    // The two groups, those that decay and those that do not, each end in a whole block.
    let blocks = (parameters / block.max(1) as u64).saturating_add(2) as usize;
    let elements = blocks.saturating_mul(block);
    let optimizer = |launch| Required::new("optimizer.block_elements", block, launch);
    let flat = |launch| Required::new("model.layers", config.model.layers, launch);
    let mut all = vec![
        optimizer(table::optimizer(&table::ADAMW, blocks, block)),
        optimizer(table::optimizer(&table::BLOCK_HASHES, blocks, block)),
        optimizer(table::square_sums(blocks)),
    ];
    for entry in [
        &table::CONVERT_F32_BF16,
        &table::CONVERT_BF16_F32,
        &table::ADD_F32,
        &table::ADD_BF16,
        &table::ADD_F32_BF16,
    ] {
        all.push(flat(table::elementwise(entry, elements)));
    }
    all
}

impl Required {
    const fn new(key: &'static str, value: usize, launch: Result<Launch, DeviceError>) -> Self {
        Self {
            key,
            value: value as u64,
            launch,
        }
    }
}

/// Whether CUDA devices take a config's shapes.
///
/// # Errors
/// The first key whose value the kernels refuse, with what they take.
pub fn check(config: &Config) -> Result<(), ConfigError> {
    for required in launches(config) {
        if let Err(refused) = required.launch {
            return Err(refusal(config, required.key, required.value, &refused));
        }
    }
    Ok(())
}

fn refusal(config: &Config, key: &str, value: u64, refused: &DeviceError) -> ConfigError {
    let cause = match refused {
        DeviceError::Unsupported { cause, .. } => cause.clone(),
        other => other.to_string(),
    };
    let hidden = config.model.hidden;
    let remedy = match key {
        "model.heads" => {
            let least = hidden.div_ceil(table::HEAD_ELEMENTS_MAX);
            format!(
                "choose at least {least} heads, so that model.hidden / model.heads is at most {}",
                table::HEAD_ELEMENTS_MAX
            )
        }
        "model.hidden" => format!("choose at most {}", table::NORM_ELEMENTS_MAX),
        _ => "lower it".to_owned(),
    };
    ConfigError {
        key: key.to_owned(),
        reason: format!("{value} is not possible on a CUDA device: it makes {cause}"),
        remedy: format!("{remedy}, or set cluster.device to \"cpu\""),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::path::Path;

    fn config() -> Config {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/aquila2-7b.toml");
        Config::load(&path, &[]).unwrap()
    }

    fn refused(edit: impl FnOnce(&mut Config)) -> String {
        let mut config = config();
        edit(&mut config);
        check(&config).unwrap_err().to_string()
    }

    #[test]
    fn every_entry_is_asked_for() {
        let asked: BTreeSet<&str> = launches(&config())
            .into_iter()
            .map(|r| r.launch.unwrap().entry.name)
            .collect();
        // Attention has kernels for heads of three sizes, and norms for rows of two, of which one model uses one.
        let other_sizes = |name: &str| ["_32", "_64", "_wide"].iter().any(|size| name.ends_with(size));
        for entry in table::ENTRIES {
            assert!(asked.contains(entry.name) || other_sizes(entry.name), "{}", entry.name);
        }
    }

    /// One message: key, value, what is possible.
    #[test]
    fn a_refusal_names_key_value_and_what_is_possible() {
        assert_eq!(
            refused(|c| c.model.heads = 16),
            "model.heads: 16 is not possible on a CUDA device: it makes heads of 256 elements, where 128 are possible; \
             choose at least 32 heads, so that model.hidden / model.heads is at most 128, or set cluster.device to \"cpu\""
        );
        assert_eq!(
            refused(|c| (c.model.hidden, c.model.heads, c.model.kv_heads) = (25_600, 200, 200)),
            "model.hidden: 25600 is not possible on a CUDA device: it makes rows of 25600 elements, where 25344 are possible; \
             choose at most 25344, or set cluster.device to \"cpu\""
        );
        let text = refused(|c| c.batch.micro_batch_sequences = 70_000);
        assert!(
            text.starts_with(
                "batch.micro_batch_sequences: 70000 is not possible on a CUDA device: it makes 70000 sequences"
            ),
            "{text}"
        );
        assert!(text.contains("where 65535 are possible; lower it"), "{text}");
    }

    /// The published shapes are possible, and so is each limit itself.
    #[test]
    fn limits_themselves_are_possible() {
        for name in ["quickstart", "aquila2-7b", "aquila2-34b", "aquila2-70b"] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../configs/{name}.toml"));
            check(&Config::load(&path, &[]).unwrap()).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        let mut widest = config();
        (widest.model.hidden, widest.model.heads, widest.model.kv_heads) = (25_344, 198, 198);
        widest.batch.micro_batch_sequences = 65_535;
        check(&widest).unwrap();
    }

    proptest! {
        /// What is refused is what a kernel refuses, and nothing else: a head's width and a row's are the kernels' own limits.
        #[test]
        fn exactly_what_kernels_refuse_is_refused(
            head_dim in 1_usize..140, heads in 1_usize..220, sequences in 1_u32..80_000,
        ) {
            let mut config = config();
            (config.model.hidden, config.model.heads, config.model.kv_heads) = (2 * head_dim * heads, heads, 1);
            (config.model.context, config.batch.micro_batch_sequences) = (16, sequences);
            let call = Attention {
                sequences: sequences as usize, context: 16, heads, kv_heads: 1, head_dim: 2 * head_dim,
            };
            let norm = Norm { rows: 16 * sequences as usize, width: config.model.hidden, eps: 1e-5 };
            let taken = table::attention(&call).is_ok() && table::attention_keys(&call).is_ok()
                && table::attention_queries(&call).is_ok() && table::attention_delta(&call).is_ok()
                && table::rms_norm_backward(&norm).is_ok();
            prop_assert_eq!(check(&config).is_ok(), taken, "{:?}", check(&config));
        }
    }
}
