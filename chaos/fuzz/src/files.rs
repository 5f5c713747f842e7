//! Bytes from files of a run folder, and configs of people.

/// Trace lines.
pub mod trace_line {
    use tarazed_protocol::trace::{TraceLine, parse_whole_lines};

    /// A line, and a trace of several: what is read prints as a line that reads the same.
    ///
    /// # Panics
    /// If it does not.
    pub fn run(data: &[u8]) {
        let _mostly_refused = parse_whole_lines(data);
        let Ok(text) = std::str::from_utf8(data) else {
            return;
        };
        if let Ok(line) = TraceLine::parse(text, 1) {
            let printed = line.print();
            let again = TraceLine::parse(&printed, 1).expect("what was printed can be read");
            assert_eq!(again.first_difference(&line), None);
            assert_eq!(again.print(), printed, "one line, one spelling");
        }
    }

    /// Lines of every shape.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        let digest = "ab".repeat(32);
        let line = |rest: &str| {
            format!(
                r#"{{"step":1,"tokens":512,"data":"{digest}","loss":2.5,"loss_bits":"0x4004000000000000","grad_norm":null,"grad_norm_bits":"0x7ff8000000000000","state":"{digest}","lr":0.001,"mixture":{{"a":0.75,"b":0.25}},"domains":{{"a":{{"loss":2.5,"tokens":512}}}},{rest}}}"#
            )
        };
        let decisions = r#""heldout":{"a":{"loss":null,"tokens":1,"loss_bits":"0x7ff0000000000000"}},"decisions":[{"id":1,"line":1,"effective":9,"kind":{"mixture":{"weights":[1.0,0.5]}},"by":{"controller":"ado"},"reason":"why"},{"id":2,"line":1,"effective":9,"kind":"pin","by":{"person":"p"},"reason":""}]"#;
        let plain = line(r#""decisions":[]"#);
        vec![
            plain.clone().into_bytes(),
            line(decisions).into_bytes(),
            format!("{plain}\n{plain}\n").into_bytes(),
        ]
    }
}

/// Configs and overrides.
pub mod config {
    use std::path::Path;
    use tarazed_domain::config::Config;

    /// A config file and, behind a zero byte, overrides line by line: what is accepted is written as what reads the same.
    ///
    /// # Panics
    /// If it is not.
    pub fn run(data: &[u8]) {
        let Ok(text) = std::str::from_utf8(data) else {
            return;
        };
        let (text, overrides) = text.split_once('\0').unwrap_or((text, ""));
        let overrides: Vec<String> = overrides.lines().map(str::to_owned).collect();
        if let Ok(config) = Config::parse(text, "fuzz", &overrides, Path::new("/data")) {
            // What everything else asks of a config that was accepted.
            let _no_overflow = (
                config.tokens_per_step(),
                config.timeouts(),
                config.model.parameter_count(),
            );
            let written = config.to_toml().expect("an accepted config has a text");
            let again =
                Config::parse(&written, "fuzz", &[], Path::new("/elsewhere")).expect("what was written is accepted");
            assert_eq!(again, config);
            assert_eq!(again.identity(), config.identity());
        }
    }

    /// The shipped configs.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        let quickstart = include_str!("../../../configs/quickstart.toml");
        let overridden = format!("{quickstart}\0run.steps=7\nmodel.layers=2\ndata.domains=[]");
        vec![
            quickstart.into(),
            overridden.into(),
            include_bytes!("../../../configs/aquila2-7b.toml").to_vec(),
        ]
    }
}

/// Headers of token shards.
#[cfg(feature = "all")]
pub mod token_shard {
    use tarazed_corpus::fuzzing::{TOKEN_HEADER_BYTES, token_shard_header, token_shard_seed};

    /// The first bytes of a file.
    pub fn run(data: &[u8]) {
        if let Some(header) = data.first_chunk::<TOKEN_HEADER_BYTES>() {
            token_shard_header(header);
        }
    }

    /// A good one.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        vec![token_shard_seed()]
    }
}

/// `data.json`.
#[cfg(feature = "all")]
pub mod data_manifest {
    use std::path::Path;
    use tarazed_corpus::DataManifest;
    use tarazed_domain::DomainIndex;

    /// A manifest as it is, and with the version that its content must have.
    ///
    /// # Panics
    /// If something that must hold does not.
    pub fn run(data: &[u8]) {
        let path = Path::new("data.json");
        let _mostly_refused = DataManifest::decode(path, data);
        let Ok(mut manifest) = serde_json::from_slice::<DataManifest>(data) else {
            return;
        };
        manifest.version = String::new();
        let text = serde_json::to_vec(&manifest).expect("a manifest has a text");
        manifest.version = blake3::hash(&text).to_hex().to_string();
        let text = serde_json::to_vec(&manifest).expect("a manifest has a text");
        if let Ok(manifest) = DataManifest::decode(path, &text) {
            let _either = manifest.check_context(128);
            for index in 0..manifest.domains.len().min(8) {
                let domain = manifest.domain(DomainIndex(index as u16));
                let _no_overflow = domain.train.sequences(128) + domain.held_out.sequences(128);
            }
        }
    }

    /// One domain.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        let digest = "ab".repeat(32);
        let file = |name: &str| format!(r#"{{"name":"{name}","bytes":9,"blake3":"{digest}"}}"#);
        let split = |tokens: u64| {
            format!(
                r#"{{"documents":3,"tokens":{tokens},"text_bytes":400,"shards":[{}]}}"#,
                file("a.tokens")
            )
        };
        let domain = format!(
            r#"{{"name":"a","language":"en","sources":[{{"name":"a.jsonl","format":"jsonl","bytes":9,"blake3":"{digest}"}}],"train":{},"held_out":{},"dropped":{{"empty":1,"duplicate":2}},"documents":{},"unigram_entropy_nats":5.5,"unigram_entropy_own_nats":null}}"#,
            split(1_000),
            split(100),
            file("a.documents.jsonl")
        );
        let text = format!(
            r#"{{"schema":1,"version":"","recipe":"{digest}","tokenizer":{{"file":{},"vocabulary":512,"end_of_document":1}},"held_out_fraction":0.1,"domains":[{domain}],"languages":[{{"language":"en","train_tokens":1000,"held_out_tokens":100,"held_out_bytes":400,"unigram_entropy_nats":5.5}}]}}"#,
            file("tokenizer.json")
        );
        vec![text.into_bytes()]
    }
}

/// What strangers' folders begin with: the header of a safetensors file, and `config.json`.
#[cfg(feature = "all")]
pub mod hugging_face {
    use tarazed::hugging_face::{header, model};

    /// Where values begin in a file.
    const START: u64 = 8;

    /// A header of a file with so many values, or a config: what is believed lies in the file, all of it and once.
    ///
    /// # Panics
    /// If it does not.
    pub fn run(data: &[u8]) {
        let Some(([way, low, high], text)) = data.split_first_chunk() else {
            return;
        };
        if way % 2 == 0 {
            let length = u64::from(u16::from_le_bytes([*low, *high]));
            if let Ok(found) = header::entries(text, START, length) {
                let bytes = |entry: &header::Entry| entry.shape.iter().product::<usize>() as u64 * entry.stored.bytes();
                assert_eq!(found.iter().map(bytes).sum::<u64>(), length);
                for entry in &found {
                    assert!(
                        entry.at >= START && entry.at + bytes(entry) <= START + length,
                        "{entry:?}"
                    );
                }
            }
        } else if let Ok(config) = serde_json::from_slice(text)
            && let Ok(model) = model::model(&config)
            && model.validate(64).is_ok()
        {
            let _no_overflow = model.parameter_count();
        }
    }

    /// A header of three tensors, and a config.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        let header = br#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[4,28]},"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"c":{"dtype":"F16","shape":[],"data_offsets":[28,30]}}"#;
        let config = br#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":32,"intermediate_size":64,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"max_position_embeddings":64,"vocab_size":512,"rms_norm_eps":1e-05,"rope_theta":10000.0,"hidden_act":"silu","tie_word_embeddings":false,"attention_bias":false,"mlp_bias":false,"initializer_range":0.02}"#;
        vec![[&[0, 30, 0], &header[..]].concat(), [&[1, 0, 0], &config[..]].concat()]
    }
}
