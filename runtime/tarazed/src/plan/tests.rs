//! Plans of the shipped configs against published facts.

use super::hardware::GB;
use super::model::{ParameterCount, flops_per_token};
use super::*;
use std::path::PathBuf;
use tarazed_domain::layout::ShardLayout;

fn shipped(name: &str) -> Config {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../configs")
        .join(name);
    Config::load(&path, &[]).unwrap_or_else(|e| panic!("{name} loads: {e}"))
}

fn gpus(text: &str) -> Hardware {
    text.parse().expect("good hardware")
}

/// arXiv 2408.07410, Table 1, counted exactly.
#[test]
fn parameter_counts_are_the_published_ones() {
    for (name, exact, published) in [
        ("aquila2-7b.toml", 7_295_537_152, "7.30B"),
        ("aquila2-34b.toml", 33_693_554_688, "33.69B"),
        ("aquila2-70b.toml", 70_090_891_264, "70.09B"),
    ] {
        let count = ParameterCount::of(&shipped(name).model).total();
        assert_eq!(count, exact, "{name}");
        assert_eq!(render::parameters(count), published, "{name}");
    }
}

/// Two independent counts: by formula here, tensor by tensor in the model crate.
#[test]
fn the_model_crate_lays_out_as_many_parameters_and_blocks() {
    for name in [
        "quickstart.toml",
        "aquila2-7b.toml",
        "aquila2-34b.toml",
        "aquila2-70b.toml",
    ] {
        let config = shipped(name);
        let layout = tarazed_model::parameter_layout(&config.model, config.optimizer.block_elements);
        assert_eq!(
            layout.parameter_count() as u64,
            ParameterCount::of(&config.model).total(),
            "{name}"
        );
        let shards = ShardLayout::new(&layout, config.optimizer.shards);
        let largest = shards.shards().map(|shard| shards.elements(shard).len() as u64).max();
        assert_eq!(
            largest,
            Some(Shares::of(&config, config.cluster.ranks).shard_elements),
            "{name}"
        );
    }
}

/// The report's own throughput: 34B at 666 tokens/s a GPU on A100 was given as about 43% of 312 TFLOP/s.
#[test]
fn flops_agree_with_the_reported_utilisation() {
    let flops = flops_per_token(&shipped("aquila2-34b.toml").model);
    let utilisation = flops * 666.0 / 312e12;
    assert!((0.42..0.46).contains(&utilisation), "{utilisation}");
}

#[test]
fn the_7b_fits_h200_and_the_larger_ones_say_what_is_missing() {
    for (hardware, ranks, lanes) in [("96xH200-141GB", 96, (1, 1)), ("48xH200-141GB", 48, (2, 2))] {
        let small = plan(&shipped("aquila2-7b.toml"), &gpus(hardware)).expect("a plan");
        assert!(small.fits, "{}", render::text(&small));
        assert_eq!((small.ranks, small.lanes_per_rank), (ranks, lanes));
    }
    for name in ["aquila2-34b.toml", "aquila2-70b.toml"] {
        let large = plan(&shipped(name), &gpus("64xH200-141GB")).expect("a plan");
        assert!(!large.fits, "{name}");
        assert!(large.advice[0].contains("parameter sharding"), "{:?}", large.advice);
    }
}

/// Golden numbers of one small case, worked out by hand, so that no term can change unseen.
#[test]
fn every_term_of_a_small_case() {
    let mut config = shipped("aquila2-7b.toml");
    config.model.layers = 2;
    config.model.hidden = 256;
    config.model.heads = 8;
    config.model.kv_heads = 4;
    config.model.ffn = 512;
    config.model.context = 128;
    config.model.vocabulary = 1024;
    config.data.tokenizer.vocabulary = 0;
    config.batch.lanes = 4;
    config.batch.sequences_per_lane = 2;
    config.batch.micro_batch_sequences = 1;
    config.optimizer.block_elements = 64;
    config.optimizer.shards = 2;
    config.optimizer.replicas = 2;
    config.cluster.ranks = 2;
    config.validate().expect("a good config");
    let hardware = Hardware::Cpu {
        cores: 2,
        memory_bytes: 8 * GB,
    };
    let plan = plan(&config, &hardware).expect("a plan");
    // 2 layers x (2 x 256^2 + 2 x 256 x 128 + 3 x 256 x 512 + 512) + 2 x 1024 x 256 + 256
    let n = 1_705_216;
    assert_eq!(plan.parameters, n);
    let bytes = |name: &str| plan.terms.iter().find(|term| term.name == name).map(|term| term.bytes);
    assert_eq!(bytes("working weights"), Some(n * 4));
    assert_eq!(
        bytes("lane gradients"),
        Some(n * 4 * 2),
        "two lanes a rank: one waits, one is summed"
    );
    let shard = n / 2; // 26,644 blocks of 64, cut in two
    assert_eq!(bytes("master weights"), Some(shard * 4));
    assert_eq!(bytes("moments"), Some(shard * 8));
    assert_eq!(bytes("replicas"), Some(shard * 12));
    assert_eq!(bytes("reduced gradients"), Some(2 * shard * 4));
    assert_eq!(bytes("others' partials"), Some(shard * 4), "one node of the other rank");
    assert_eq!(bytes("checkpoint snapshot"), Some(shard * 12));
    // 128 tokens x (2 x ((6 x 256 + 2 x 128 + 2 x 512) x 4 + 10 x 4) + 256 x 4)
    assert_eq!(bytes("activations"), Some(128 * (2 * (2_816 * 4 + 40) + 1_024)));
    // 128 tokens x (5 x 256 + 2 x 128 + 512) and 128 rows of logits
    assert_eq!(bytes("workspace"), Some((128 * 2_048 + 128 * 1_024) * 4 + 64_000_000));
    assert_eq!(plan.device_bytes, plan.terms.iter().map(|term| term.bytes).sum::<u64>());
    assert_eq!(plan.largest_term, "workspace");
    assert!(plan.fits);
}

#[test]
fn more_gpus_than_lanes_are_refused_by_key() {
    let error = plan(&shipped("aquila2-7b.toml"), &gpus("128xH200-141GB")).expect_err("96 lanes");
    assert_eq!(error.key, "cluster.ranks");
    assert!(error.reason.contains("batch.lanes = 96"), "{error}");
}

#[test]
fn advice_is_planned_before_it_is_given() {
    let mut config = shipped("aquila2-7b.toml");
    config.optimizer.shards = 1;
    config.batch.micro_batch_sequences = 1;
    let tight = plan(&config, &gpus("64xH200-141GB")).expect("a plan");
    assert!(!tight.fits, "one rank would hold the whole optimizer state");
    assert!(
        tight
            .advice
            .iter()
            .any(|line| line.starts_with("fits with optimizer.shards = 64")),
        "{:?}",
        tight.advice
    );
}

#[test]
fn uneven_lanes_are_called_waste() {
    let uneven = plan(&shipped("aquila2-7b.toml"), &gpus("64xH200-141GB")).expect("a plan");
    assert_eq!(uneven.lanes_per_rank, (2, 1));
    assert!(
        uneven
            .advice
            .iter()
            .any(|line| line.contains("48 ranks divide them evenly")),
        "{:?}",
        uneven.advice
    );
}

#[test]
fn the_quickstart_fits_a_small_machine() {
    let hardware = Hardware::Cpu {
        cores: 2,
        memory_bytes: 4 * GB,
    };
    let plan = plan(&shipped("quickstart.toml"), &hardware).expect("a plan");
    assert!(plan.fits, "{}", render::text(&plan));
    assert!(
        (2_000_000..=4_500_000).contains(&plan.parameters),
        "{}",
        plan.parameters
    );
}

#[test]
fn numbers_are_said_as_people_say_them() {
    assert_eq!(render::bytes(999), "999 B");
    assert_eq!(render::bytes(1_500), "1.5 kB");
    assert_eq!(render::bytes(141 * GB), "141 GB");
    assert_eq!(render::bytes(999_900_000), "1.0 GB");
    assert_eq!(render::seconds(0.0123), "12.3 ms");
    assert_eq!(render::seconds(86_400.0 * 30.0), "30.0 days");
}

/// What kernels do not take is said by key, value and what is possible; processors take any shape.
#[test]
fn shapes_that_gpus_do_not_take_are_refused_by_key() {
    let mut config = shipped("aquila2-7b.toml");
    (config.model.heads, config.model.kv_heads) = (16, 16);
    let error = plan(&config, &gpus("96xH200-141GB")).expect_err("heads of 256 elements");
    assert_eq!(error.key, "model.heads");
    assert!(
        error.reason.contains("heads of 256 elements, where 128 are possible") && error.remedy.contains("at least 32"),
        "{error}"
    );
    let hardware = Hardware::Cpu {
        cores: 96,
        memory_bytes: 2_000 * GB,
    };
    plan(&config, &hardware).expect("processors take it");
}

/// A rank without memory names the largest term of its plan, and keys that make that one smaller.
#[test]
fn a_rank_without_memory_says_what_needs_most() {
    let mut config = shipped("aquila2-7b.toml");
    assert_eq!(config.cluster.device, ClusterDevice::Cuda);
    let said = memory_hint(&config);
    let planned = plan(&config, &gpus("96xH200-141GB")).expect("a plan");
    let expected = format!(
        "of the {} that `tarazed plan` counts for the worst-placed of 96 ranks",
        render::bytes(planned.device_bytes)
    );
    assert!(said.starts_with(&expected), "{said}");
    assert_eq!(planned.largest_term, "lane gradients");
    assert!(
        said.contains("29.2 GB are lane gradients (") && said.contains("use more ranks"),
        "{said}"
    );

    config.batch.micro_batch_sequences = 18;
    let said = memory_hint(&config);
    assert!(
        said.contains("are activations (") && said.contains("or batch.micro_batch_sequences (a new run"),
        "{said}"
    );
}

#[test]
fn every_term_but_the_weights_has_keys_that_make_it_smaller() {
    let config = shipped("aquila2-7b.toml");
    for on_gpu in [false, true] {
        let terms = memory::terms(&config, on_gpu, &Shares::of(&config, 2));
        for term in terms.iter().filter(|term| term.place == Place::Device) {
            let names_a_key = ["batch.", "cluster.", "optimizer."]
                .iter()
                .any(|section| memory::relief(term).contains(section));
            assert_eq!(names_a_key, term.name != "working weights", "{}", term.name);
        }
    }
}

/// Two counts of what MFU counts, each by its own formula; and attention without its mask, as the paper has it.
#[test]
fn utilisation_counts_what_the_plan_multiplies() {
    for name in ["aquila2-7b.toml", "gpu-1b.toml", "quickstart.toml"] {
        let model = shipped(name).model;
        let causal = (6 * model.layers * model.context * model.hidden) as f64;
        let matrices = 6.0 * ParameterCount::of(&model).multiplied as f64;
        let whole = tarazed_model::flops::mfu_flops_per_token(&model);
        assert_eq!(whole, matrices + 2.0 * causal, "{name}");
        assert_eq!(flops_per_token(&model), matrices + causal, "{name}");
    }
}

/// Shapes against their sources (each config names its own), and what one GPU needs for them.
#[test]
fn the_configs_for_one_gpu_have_the_shapes_that_they_name() {
    // File, parameters, layers, hidden, inner, heads, key heads, context, and tokens of a batch.
    let cases = [
        ("gpu-124m.toml", 162_220_800, [12, 768, 2048, 12, 12, 1024], 524_288),
        ("gpu-1b.toml", 1_100_048_384, [22, 2048, 5632, 32, 4, 2048], 2_097_152),
        (
            "gpu-7b-slice.toml",
            1_628_803_072,
            [4, 4096, 11008, 32, 32, 2048],
            294_912,
        ),
    ];
    for (name, parameters, shape, tokens) in cases {
        let config = shipped(name);
        let m = &config.model;
        assert_eq!(
            [m.layers, m.hidden, m.ffn, m.heads, m.kv_heads, m.context],
            shape,
            "{name}"
        );
        assert_eq!(config.tokens_per_step(), tokens, "{name}");
        assert_eq!(config.cluster.device, ClusterDevice::Cuda, "{name}");
        for hardware in ["1xH100-80GB", "1xH200-141GB"] {
            let plan = plan(&config, &gpus(hardware)).expect("a plan");
            assert_eq!(plan.parameters, parameters, "{name}");
            assert!(plan.fits, "{name} on {hardware}: {}", render::text(&plan));
        }
    }
    // The slice is the published 7B but for layers, batch and length.
    let (slice, whole) = (shipped("gpu-7b-slice.toml"), shipped("aquila2-7b.toml"));
    let mut model = slice.model.clone();
    model.layers = whole.model.layers;
    assert_eq!(model, whole.model);
    assert_eq!(slice.batch.micro_batch_sequences, whole.batch.micro_batch_sequences);
    // GPT-2's own count: the layers' matrices, 12 x hidden² each.
    let small = shipped("gpu-124m.toml").model;
    let head = small.vocabulary * small.hidden;
    let layers = ParameterCount::of(&small).multiplied as usize - head;
    assert_eq!(layers, small.layers * 12 * small.hidden * small.hidden);
}

#[test]
fn sizes_that_gpus_multiply_slowly_are_named() {
    let mut config = shipped("gpu-124m.toml");
    let advised = |config: &Config| {
        let advice = plan(config, &gpus("1xH100-80GB")).expect("a plan").advice;
        advice
            .into_iter()
            .filter(|line| line.contains("16 bytes"))
            .collect::<Vec<_>>()
    };
    assert_eq!(advised(&config), [""; 0]);
    config.model.vocabulary = 50_257;
    config.data.tokenizer.vocabulary = 50_257;
    let advice = advised(&config);
    assert_eq!(advice.len(), 1, "{advice:?}");
    assert!(
        advice[0].starts_with("model.vocabulary = 50257 ") && advice[0].ends_with("50264 is"),
        "{advice:?}"
    );
}
