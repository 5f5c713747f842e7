//! What of `[model]` makes a run itself, and its checks on their own: an import has a model and no run.

use super::{ConfigError, ModelConfig, validate};

impl ModelConfig {
    /// The part that decides numbers. Initial weights are named by their hash, wherever they lie; where there are none, nothing is
    /// said of them, so that a run folder of before stays that of its run.
    #[must_use]
    pub fn identity(&self) -> String {
        let Self {
            layers,
            hidden,
            ffn,
            heads,
            kv_heads,
            context,
            vocabulary,
            rope_theta,
            norm_eps,
            init_std,
            norm_init,
            initial,
        } = self;
        let initial = initial
            .as_ref()
            .map_or_else(String::new, |initial| format!(", initial: {}", initial.digest()));
        format!(
            "ModelConfig {{ layers: {layers}, hidden: {hidden}, ffn: {ffn}, heads: {heads}, kv_heads: {kv_heads}, \
             context: {context}, vocabulary: {vocabulary}, rope_theta: {rope_theta:?}, norm_eps: {norm_eps:?}, \
             init_std: {init_std:?}, norm_init: {norm_init:?}{initial} }}"
        )
    }

    /// Checks sizes and relations, with so many elements in a block.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn validate(&self, block_elements: usize) -> Result<(), ConfigError> {
        validate::model(self, block_elements)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use std::path::Path;

    const TEXT: &str = r#"
[run]
name = "given"
seed = 7
steps = 1000
[model]
layers = 1
hidden = 8
ffn = 8
heads = 2
kv_heads = 1
context = 8
vocabulary = 300
rope_theta = 500000.0
norm_eps = 1e-6
init_std = 0.1
[batch]
lanes = 2
sequences_per_lane = 1
micro_batch_sequences = 1
[optimizer]
learning_rate = 1e-3
[[data.domains]]
name = "web"
path = "web.jsonl"
language = "en"
weight = 0.1
"#;
    const HASH: &str = "00112233445566778899aabbccddeeff00112233445566778899AABBCCDDEEFF";

    fn parse(overrides: &[String]) -> Result<Config, ConfigError> {
        Config::parse(TEXT, "given.toml", overrides, Path::new("/configs"))
    }

    fn given(from: &str, blake3: &str) -> Config {
        let initial = [
            format!("model.initial.from={from}"),
            format!("model.initial.blake3={blake3}"),
        ];
        parse(&initial).expect("a good config")
    }

    /// Word for word what it was before there were initial weights: run folders and checkpoints of then stay their run's.
    #[test]
    fn without_given_weights_a_model_is_what_it_was() {
        let plain = parse(&[]).expect("a good config");
        let before = "ModelConfig { layers: 1, hidden: 8, ffn: 8, heads: 2, kv_heads: 1, context: 8, vocabulary: 300, \
                      rope_theta: 500000.0, norm_eps: 1e-6, init_std: 0.1, norm_init: 1.0 }";
        assert_eq!(plain.model.identity(), before);
        assert!(plain.identity().starts_with(&format!("seed=7;model={before};batch=")));
        assert!(!plain.to_toml().expect("TOML").contains("initial"));
        // That is how it was made then.
        let derived = format!("{:?}", plain.model);
        assert_eq!(derived.replace(", initial: None }", " }"), before);
    }

    /// A run begins with what its hash says, wherever that lies.
    #[test]
    fn given_weights_are_named_by_their_hash_alone() {
        let plain = parse(&[]).expect("a good config").identity();
        let one = given("../imported@0", HASH);
        let initial = one.model.initial.as_ref().expect("given");
        assert_eq!(initial.from, "/configs/../imported@0");
        assert_eq!(initial.digest(), HASH.to_lowercase());
        assert_ne!(one.identity(), plain);
        assert_eq!(
            given("s3://bucket/elsewhere", &HASH.to_lowercase()).identity(),
            one.identity()
        );
        let other = HASH.replacen("00", "01", 1);
        assert_ne!(given("../imported@0", &other).identity(), one.identity());
        let back = Config::parse(&one.to_toml().expect("TOML"), "back.toml", &[], Path::new("/")).expect("itself");
        assert_eq!((back.identity(), &back), (one.identity(), &one));
    }

    #[test]
    fn what_names_no_weights_is_refused() {
        let refused = |overrides: &[(&str, &str)]| {
            let overrides: Vec<String> = overrides
                .iter()
                .map(|(key, value)| format!("model.initial.{key}={value}"))
                .collect();
            parse(&overrides).expect_err("refused").to_string()
        };
        for blake3 in [
            "\"\"",
            "\"0011\"",
            &format!("\"{HASH}00\""),
            &format!("\"{}g\"", &HASH[1..]),
            "\"é\"",
            "7",
        ] {
            let said = refused(&[("from", "a"), ("blake3", blake3)]);
            assert!(said.contains("model.initial"), "{blake3}: {said}");
        }
        let hash = format!("\"{HASH}\"");
        assert!(refused(&[("from", "\" \""), ("blake3", &hash)]).starts_with("model.initial.from: is empty; "));
        assert!(refused(&[("from", "a")]).contains("missing key `model.initial.blake3`"));
        assert!(refused(&[("blake3", &hash)]).contains("missing key `model.initial.from`"));
        let more = refused(&[("from", "a"), ("blake3", &hash), ("step", "3")]);
        assert!(more.contains("unknown field `step`"), "{more}");
    }
}
