//! The shipped configs of the Aquila2 family against what was published, value by value.
//!
//! Source: the Aquila2 Technical Report, arXiv 2408.07410v1 (shapes: its Table 1), and for what it leaves open BAAI's public
//! training scripts (FlagScale, `examples/aquila/{7B,34B,70B}/pretrain_*.sh`) and released model configs. Where the report
//! contradicts itself (64 heads for 34B in Table 12), its Table 1, the scripts and the configs agree with each other.
//!
//! The warm-up of 7B's first training is not published (its script goes on from an older model); the family's is used.

use std::path::Path;
use tarazed_domain::StepsCompleted;
use tarazed_domain::config::{ClusterDevice, Config, LearningRateSchedule};

/// What was published of one model.
struct Published {
    file: &'static str,
    /// Layers, hidden size, FFN size, query heads, key-value heads, context.
    shape: [usize; 6],
    /// Parameters, in hundredths of 10^9, as the report rounds them.
    parameters_e7: u64,
    learning_rate: f64,
    /// Sequences of the global batch and of a micro-batch.
    batch_sequences: [u64; 2],
    /// Sequences at first, sequences more at each rise, samples until the batch is full.
    ramp: Option<[u64; 3]>,
    /// Tokens of the global batch: the sequences by the context.
    batch_tokens: u64,
    warmup_samples: u64,
    /// Initial standard deviation, and initial value of norm weights.
    initial: [f64; 2],
    /// Tokens trained on, in 10^9.
    trained_tokens_e9: u64,
}

const PUBLISHED: [Published; 3] = [
    Published {
        file: "aquila2-7b.toml",
        shape: [32, 4096, 11008, 32, 32, 2048],
        parameters_e7: 730,
        learning_rate: 2e-4,
        batch_sequences: [1728, 2],
        ramp: None,
        batch_tokens: 3_538_944,
        warmup_samples: 500_000,
        initial: [0.02, 1.0],
        trained_tokens_e9: 2_000,
    },
    Published {
        file: "aquila2-34b.toml",
        shape: [60, 6144, 24576, 48, 8, 4096],
        parameters_e7: 3_369,
        learning_rate: 1.5e-4,
        batch_sequences: [1024, 1],
        ramp: Some([32, 32, 2_000_000]),
        batch_tokens: 4_194_304,
        warmup_samples: 500_000,
        initial: [0.0165, 0.3],
        trained_tokens_e9: 1_870,
    },
    Published {
        file: "aquila2-70b.toml",
        shape: [80, 8192, 28672, 64, 8, 4096],
        parameters_e7: 7_009,
        learning_rate: 1.5e-4,
        batch_sequences: [1056, 2],
        ramp: Some([48, 48, 2_000_000]),
        batch_tokens: 4_325_376,
        warmup_samples: 500_000,
        initial: [0.0149, 0.25],
        trained_tokens_e9: 1_270,
    },
];

fn shipped(file: &str) -> Config {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs").join(file);
    Config::load(&path, &[]).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn shapes_are_the_published_ones() {
    for published in PUBLISHED {
        let file = published.file;
        let m = shipped(file).model;
        let shape = [m.layers, m.hidden, m.ffn, m.heads, m.kv_heads, m.context];
        assert_eq!(shape, published.shape, "{file}");
        assert_eq!(m.vocabulary, 100_008, "{file}: 100,000 entries and 8 specials");
        assert_eq!((m.rope_theta, m.norm_eps), (1e4, 1e-5), "{file}");
        assert_eq!([m.init_std, m.norm_init], published.initial, "{file}");
        let parameters = m.parameter_count().expect("a count");
        assert_eq!(
            (parameters + 5_000_000) / 10_000_000,
            published.parameters_e7,
            "{file}: {parameters}"
        );
    }
}

#[test]
fn optimizer_and_schedule_are_the_published_ones() {
    for published in PUBLISHED {
        let file = published.file;
        let config = shipped(file);
        let o = &config.optimizer;
        assert_eq!(o.learning_rate, published.learning_rate, "{file}");
        assert_eq!([o.beta1, o.beta2, o.eps], [0.9, 0.95, 1e-8], "{file}");
        assert_eq!([o.weight_decay, o.clip_norm], [0.1, 1.0], "{file}");
        // Cosine to a tenth of the peak at the run's end; warm-up in whole steps that hold the published samples.
        let expected = LearningRateSchedule::Cosine {
            warmup_steps: config.batch_schedule().step_after(published.warmup_samples).0,
            decay_steps: config.run.steps,
            final_fraction: 0.1,
        };
        assert_eq!(o.schedule, expected, "{file}");
    }
}

#[test]
fn batches_and_lengths_are_the_published_ones() {
    for published in PUBLISHED {
        let file = published.file;
        let config = shipped(file);
        let b = &config.batch;
        let sequences = u64::from(b.lanes) * u64::from(b.sequences_per_lane);
        let batch = [sequences, u64::from(b.micro_batch_sequences)];
        assert_eq!(batch, published.batch_sequences, "{file}: global batch and micro-batch");
        assert_eq!(config.tokens_per_step(), published.batch_tokens, "{file}");
        let ramp = b.ramp.map(|ramp| {
            [
                u64::from(ramp.start_sequences),
                u64::from(ramp.step_sequences),
                ramp.samples,
            ]
        });
        assert_eq!(ramp, published.ramp, "{file}: start, step, samples");
        let samples = config.batch_schedule().samples(StepsCompleted(config.run.steps));
        let trained = samples * config.model.context as u64;
        let difference = trained.abs_diff(published.trained_tokens_e9 * 1_000_000_000);
        assert!(difference <= config.tokens_per_step(), "{file}: {trained} tokens");
        assert_eq!(
            config.cluster.ranks, b.lanes,
            "{file}: made for the largest world it allows"
        );
        assert_eq!(
            config.optimizer.shards, b.lanes as usize,
            "{file}: a shard for each rank of it"
        );
        assert_eq!(
            config.cluster.device,
            ClusterDevice::Cuda,
            "{file}: trained in bf16 on GPUs"
        );
    }
}
