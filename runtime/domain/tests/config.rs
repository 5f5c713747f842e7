//! Loading a config, and loading back what was loaded.

use std::path::{Path, PathBuf};
use tarazed_domain::config::{Config, LearningRateSchedule};

const TEXT: &str = r#"
[run]
name = "there-and-back"
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
init_std = 0.1

[batch]
lanes = 2
sequences_per_lane = 1
micro_batch_sequences = 1

[optimizer]
learning_rate = 1e-3
schedule = { kind = "cosine", warmup_steps = 7, final_fraction = 0.1 }

[data.tokenizer]
path = "tokenizers/ours.json"

[[data.domains]]
name = "web"
path = "text/web.jsonl"
language = "en"
weight = 0.1

[[data.domains]]
name = "wiki"
path = "../wiki"
language = "zh"
weight = 0.3
"#;

fn load(path: &Path, overrides: &[&str]) -> Config {
    let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
    Config::load(path, &overrides).expect("a good config")
}

/// The resolved config of a run folder is a config like any other: whatever folder it lies in, it means the same run, in
/// the same places.
#[test]
fn the_resolved_config_loads_back_identically_from_anywhere() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (config, run) = (folder.path().join("configs"), folder.path().join("runs/x"));
    std::fs::create_dir_all(&config).expect("a folder");
    std::fs::create_dir_all(&run).expect("a folder");
    std::fs::write(config.join("web.toml"), TEXT).expect("written");
    for overrides in [&[][..], &["checkpoint.store=ckpt", "run.dir=elsewhere", "run.seed=8"]] {
        let resolved = load(&config.join("web.toml"), overrides);
        let text = resolved.to_toml().expect("TOML");
        std::fs::write(run.join("config.toml"), &text).expect("written");
        let back = load(&run.join("config.toml"), &[]);
        assert_eq!(back, resolved);
        assert_eq!(back.identity(), resolved.identity());
        assert_eq!(back.to_toml().expect("TOML"), text);
    }
}

#[test]
fn sources_are_beside_the_file_and_what_is_written_is_in_the_working_directory() {
    let here = std::env::current_dir().expect("a working directory");
    let parse = |overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
        Config::parse(TEXT, "web.toml", &overrides, Path::new("/configs")).expect("a good config")
    };
    let plain = parse(&[]);
    let domains: Vec<&Path> = plain.data.domains.iter().map(|domain| domain.path.as_path()).collect();
    assert_eq!(
        domains,
        [Path::new("/configs/text/web.jsonl"), Path::new("/configs/../wiki")]
    );
    assert_eq!(
        plain.data.tokenizer.path,
        Some(PathBuf::from("/configs/tokenizers/ours.json"))
    );
    assert_eq!(plain.run.dir, here.join("runs/there-and-back"));
    assert_eq!(plain.checkpoint.store, "", "store/ of whatever run folder it is");
    let store = |text: &str| parse(&[&format!("checkpoint.store={text}")]).checkpoint.store;
    assert_eq!(store("ckpt"), here.join("ckpt").to_string_lossy());
    assert_eq!(store("/data/ckpt"), "/data/ckpt");
    assert_eq!(store("s3://bucket/run"), "s3://bucket/run");
    let mut moved = plain;
    moved.set_dir(Path::new("elsewhere")).expect("a good folder");
    assert_eq!(moved.run.dir, here.join("elsewhere"));
}

/// An empty path would mean the config's own folder.
#[test]
fn an_empty_path_is_refused() {
    let text = TEXT.replace("text/web.jsonl", "");
    let refused = Config::parse(&text, "web.toml", &[], Path::new("/configs")).expect_err("refused");
    assert!(
        refused.to_string().starts_with("data.domains[0].path: is empty; "),
        "{refused}"
    );
}

#[test]
fn a_store_that_nobody_speaks_is_refused_without_its_secrets() {
    let store = ["checkpoint.store=ftp://me:secret@host/x".to_owned()];
    let refused = Config::parse(TEXT, "web.toml", &store, Path::new("/configs")).expect_err("refused");
    let message = refused.to_string();
    assert!(
        message.starts_with("checkpoint.store: no store speaks ftp://; "),
        "{message}"
    );
    assert!(!message.contains("secret"), "{message}");
}

/// DET-1: the learning rate stands in the trace, so its cosine may not be the host's. The bits were written down on x86-64
/// with glibc 2.36, whose own cosine gives others at steps 87 and 94.
#[test]
fn the_schedule_is_the_same_everywhere() {
    let schedule = LearningRateSchedule::Cosine {
        warmup_steps: 10,
        decay_steps: 110,
        final_fraction: 0.1,
    };
    let at = |step| schedule.fraction(step);
    assert_eq!((at(0), at(9), at(10)), (0.1, 1.0, 1.0));
    assert_eq!((at(110), at(1_000_000)), (0.1, 0.1));
    assert!((at(60) - 0.55).abs() < 1e-15);
    let hash = (0..200).fold(0xcbf2_9ce4_8422_2325_u64, |hash, step| {
        (hash ^ at(step).to_bits()).wrapping_mul(0x0000_0100_0000_01b3)
    });
    assert_eq!(hash, 0xaca1_a077_9e85_87ce, "{hash:#x}");
}
