//! Loading a config, and loading back what was loaded.

use std::path::{Path, PathBuf};
use tarazed_domain::StepsCompleted;
use tarazed_domain::config::{Config, DataFile, LearningRateSchedule};

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

/// Sizes that no machine could hold, and that arithmetic could not either, are refused by their key in one line: none
/// overflows, none is tried.
#[test]
fn impossible_sizes_are_refused_by_key() {
    for (sets, key) in [
        (&["model.layers=1000000000000"][..], "model.layers"),
        (&["model.layers=0"], "model.layers"),
        (&["model.hidden=4611686018427387904"], "model.hidden"),
        (&["model.ffn=9223372036854775807"], "model.ffn"),
        (&["model.hidden=65536", "model.heads=2048"], "model.heads"),
        (&["model.kv_heads=4611686018427387904"], "model.kv_heads"),
        (&["model.context=9223372036854775807"], "model.context"),
        (&["model.vocabulary=4294967297"], "model.vocabulary"),
        (
            &["model.layers=1024", "model.hidden=65536", "model.ffn=262144"],
            "model.layers",
        ),
        (
            &[
                "model.layers=32",
                "model.hidden=8192",
                "model.ffn=8192",
                "optimizer.block_elements=64",
            ],
            "optimizer.block_elements",
        ),
        (
            &["optimizer.block_elements=4611686018427387904"],
            "optimizer.block_elements",
        ),
        (&["optimizer.block_elements=0"], "optimizer.block_elements"),
        (&["optimizer.shards=1000000000000"], "optimizer.shards"),
        (&["optimizer.replicas=4294967295"], "optimizer.replicas"),
        (
            &["optimizer.schedule.warmup_steps=9223372036854775807"],
            "optimizer.schedule.warmup_steps",
        ),
        (
            &["optimizer.schedule.decay_steps=9223372036854775807"],
            "optimizer.schedule.decay_steps",
        ),
        (&["batch.lanes=4294967295"], "batch.lanes"),
        (&["batch.sequences_per_lane=4294967295"], "batch.sequences_per_lane"),
        (
            &["batch.sequences_per_lane=500000", "model.context=1048576"],
            "batch.sequences_per_lane",
        ),
        (
            &[
                "batch.sequences_per_lane=4096",
                "batch.micro_batch_sequences=4096",
                "model.context=8192",
            ],
            "batch.micro_batch_sequences",
        ),
        (&["cluster.ranks=4294967295"], "cluster.ranks"),
        (&["cluster.threads_per_rank=4294967295"], "cluster.threads_per_rank"),
        (&["cluster.collective=nccl"], "cluster.collective"),
        (&["cluster.mesh_port=7000"], "cluster.mesh_port"),
        (&["cluster.control_port=7000"], "cluster.control_port"),
        (
            &["cluster.transport=tcp", "cluster.ranks=2", "cluster.mesh_port=65535"],
            "cluster.mesh_port",
        ),
        (
            &["cluster.transport=tcp", "cluster.mesh_advertise_port=7000"],
            "cluster.mesh_advertise_port",
        ),
        (
            &["cluster.transport=tcp", "cluster.control_advertise_port=7000"],
            "cluster.control_advertise_port",
        ),
        (&["run.steps=9223372036854775807"], "run.steps"),
        (&["run.steps=0"], "run.steps"),
        (&["mixture.start_steps=9223372036854775807"], "mixture.start_steps"),
        (
            &["mixture.interval_steps=9223372036854775807"],
            "mixture.interval_steps",
        ),
        (&["mixture.lag_steps=9223372036854775807"], "mixture.lag_steps"),
        (&["mixture.lag_steps=0"], "mixture.lag_steps"),
        (
            &["evaluation.interval_steps=9223372036854775807"],
            "evaluation.interval_steps",
        ),
        (
            &["evaluation.sequences_per_domain_max=4294967295"],
            "evaluation.sequences_per_domain_max",
        ),
        (
            &["checkpoint.interval_steps=9223372036854775807"],
            "checkpoint.interval_steps",
        ),
        (&["checkpoint.keep_last=4294967295"], "checkpoint.keep_last"),
        (
            &["checkpoint.keep_every_steps=1000000001"],
            "checkpoint.keep_every_steps",
        ),
        (
            &["data.tokenizer.train_bytes_max=9223372036854775807"],
            "data.tokenizer.train_bytes_max",
        ),
        (&["fault.timeout_ms=9223372036854775807"], "fault.timeout_ms"),
        (&["fault.timeout_ms=3600001"], "fault.timeout_ms"),
        (&["fault.restarts_max=4294967295"], "fault.restarts_max"),
        (
            &["fault.restart_backoff_ms=9223372036854775807"],
            "fault.restart_backoff_ms",
        ),
    ] {
        let message = refusal(sets);
        assert!(message.starts_with(&format!("{key}: ")), "{sets:?}: {message}");
        assert!(!message.contains('\n') && message.contains("; "), "{sets:?}: {message}");
    }
    let heavy = TEXT.replace("weight = 0.3", "weight = 1e300");
    let refused = Config::parse(&heavy, "web.toml", &[], Path::new("/configs")).expect_err("refused");
    assert!(refused.to_string().starts_with("data.domains[1].weight: "), "{refused}");
}

/// TOML ends at 2^63; a config made in the program may hold more.
#[test]
fn the_largest_integers_are_refused_too() {
    /// What makes a good config a bad one.
    type Change = fn(&mut Config);
    let changes: [(&str, Change); 6] = [
        ("model.layers", |config| config.model.layers = usize::MAX),
        ("model.hidden", |config| config.model.hidden = usize::MAX),
        ("optimizer.block_elements", |config| {
            config.optimizer.block_elements = usize::MAX - 63
        }),
        ("run.steps", |config| config.run.steps = u64::MAX),
        ("fault.timeout_ms", |config| config.fault.timeout_ms = u64::MAX),
        ("fault.restart_backoff_ms", |config| {
            config.fault.restart_backoff_ms = u64::MAX
        }),
    ];
    let written = ["fault.timeout_ms=18446744073709551615".to_owned()];
    let refused = Config::parse(TEXT, "web.toml", &written, Path::new("/configs")).expect_err("refused");
    assert!(refused.to_string().contains("timeout_ms"), "{refused}");
    for (key, change) in changes {
        let mut config = Config::parse(TEXT, "web.toml", &[], Path::new("/configs")).expect("a good config");
        change(&mut config);
        let message = config.validate().expect_err("refused").to_string();
        assert!(message.starts_with(&format!("{key}: ")), "{message}");
    }
}

/// The limits themselves are good: what is derived from the largest sizes fits.
#[test]
fn the_largest_accepted_sizes_are_accepted() {
    for sets in [
        &["run.steps=1000000000", "mixture.interval_steps=1000000000"][..],
        &["fault.timeout_ms=3600000", "fault.restart_backoff_ms=10000"],
        &["model.layers=1024", "model.context=1048576"],
        &[
            "model.hidden=65536",
            "model.ffn=262144",
            "model.heads=1024",
            "model.vocabulary=1048576",
        ],
        &[
            "batch.lanes=65536",
            "batch.sequences_per_lane=16",
            "cluster.ranks=65536",
        ],
        &[
            "batch.sequences_per_lane=16",
            "batch.micro_batch_sequences=16",
            "model.context=1048576",
        ],
    ] {
        let overrides: Vec<String> = sets.iter().map(|item| (*item).to_owned()).collect();
        let config = Config::parse(TEXT, "web.toml", &overrides, Path::new("/configs")).expect("a good config");
        assert!(config.timeouts().stop_ms > config.timeouts().failure_ms);
        assert!(config.model.parameter_count().is_some() && config.tokens_per_step() > 0);
    }
}

/// A controller that decides by held-out losses is not started where there will be none: it could never decide, and the
/// run would be a static one by another name.
#[test]
fn an_adaptive_mixture_without_held_out_losses_is_refused() {
    for (set, key) in [
        ("evaluation.interval_steps=0", "evaluation.interval_steps"),
        (
            "evaluation.sequences_per_domain_max=0",
            "evaluation.sequences_per_domain_max",
        ),
        ("data.held_out_fraction=0.0", "data.held_out_fraction"),
    ] {
        let message = refusal(&["mixture.controller=ado", set]);
        assert!(
            message.starts_with(&format!("{key}: is 0, and mixture.controller = \"ado\" ")),
            "{message}"
        );
        let fixed = [set.to_owned()];
        Config::parse(TEXT, "web.toml", &fixed, Path::new("/configs")).expect("a static mixture needs none");
    }
    let adaptive = ["mixture.controller=ado".to_owned()];
    Config::parse(TEXT, "web.toml", &adaptive, Path::new("/configs")).expect("a good config");
}

fn refusal(sets: &[&str]) -> String {
    let overrides: Vec<String> = sets.iter().map(|item| (*item).to_owned()).collect();
    match Config::parse(TEXT, "web.toml", &overrides, Path::new("/configs")) {
        Err(refused) => refused.to_string(),
        Ok(_) => panic!("{sets:?} were accepted"),
    }
}

/// What is checked is the world that was asked for, not the file's.
#[test]
fn a_world_size_that_is_given_counts_before_the_checks() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/quickstart.toml");
    let load = |overrides: &[&str], ranks| {
        let overrides: Vec<String> = overrides.iter().map(|&item| item.to_owned()).collect();
        Config::load_for(&path, &overrides, Some(ranks))
    };
    let world = |config: Config| (config.cluster.ranks, config.optimizer.replicas);
    assert_eq!(
        world(load(&["optimizer.replicas=5"], 8).unwrap()),
        (8, 5),
        "the file has 4 ranks"
    );
    assert_eq!(world(load(&["cluster.ranks=1000"], 2).unwrap()), (2, 2));
    assert_eq!(world(load(&[], 1).unwrap()), (1, 1), "as many copies as fit");
    for replicas in ["optimizer.replicas=3", " optimizer.replicas = 3"] {
        let refused = load(&[replicas], 2).unwrap_err();
        assert_eq!(refused.key, "optimizer.replicas");
    }
}

/// A run folder made before a key existed stays that of its run: where the key is absent, neither identity nor
/// `config.toml` says anything of it.
#[test]
fn absent_keys_leave_no_trace() {
    let parse = |overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
        Config::parse(TEXT, "web.toml", &overrides, Path::new("/configs"))
    };
    let plain = parse(&[]).expect("a good config");
    let identity = plain.identity();
    for part in [
        ";batch=BatchConfig { lanes: 2, sequences_per_lane: 1, micro_batch_sequences: 1 };optimizer=",
        ";mixture=MixtureConfig { controller: Static, start_steps: 100, interval_steps: 50, lag_steps: 8 };evaluation=",
    ] {
        assert!(identity.contains(part), "{identity}");
    }
    assert!(
        identity.ends_with("EvaluationConfig { interval_steps: 100, sequences_per_domain_max: 16 }"),
        "{identity}"
    );
    let text = plain.to_toml().expect("TOML");
    for key in ["policy", "ramp", "stages", "shadow", "reference"] {
        assert!(!text.contains(key), "{key} in {text}");
    }
    for more in [
        "policy.persons=true",
        "policy.stop.tokens=1000",
        "mixture.shadow=[\"odm\"]",
        "mixture.controller=\"odm\"",
    ] {
        let set = parse(&[more]).expect("a good config");
        assert_ne!(set.identity(), identity, "{more} decides numbers");
        let back = Config::parse(&set.to_toml().expect("TOML"), "back.toml", &[], Path::new("/")).expect("itself");
        assert_eq!((back.identity(), &back), (set.identity(), &set));
    }
    // The notice of a rollback came later, and decides numbers only where there is one.
    let rolled = |steps: u64| {
        let notice = format!("policy.rollback_notice_steps={steps}");
        let set = parse(&["policy.spikes=\"rollback_and_skip\"", &notice]);
        set.expect("a good config").identity()
    };
    let before = ";policy=PolicyConfig { persons: false, spikes: RollbackAndSkip, rollback_grain_steps: 100, \
                  rollback_margin_steps: 100, rollbacks_max: 3, decay_on_plateau: false, gradient_noise: false, \
                  stop: StopRules { tokens: None, heldout_loss: None, plateau_after_steps: None } }";
    assert!(rolled(0).ends_with(before), "{}", rolled(0));
    assert_ne!(rolled(0), rolled(50));
    let unused = parse(&["policy.rollback_notice_steps=7"]).expect("a good config");
    assert_eq!(unused.identity(), identity);
}

/// Stages, ramp, schedule and policy are refused where they contradict each other, with the key at fault.
#[test]
fn contradictions_of_the_loop_name_their_key() {
    let refused = |overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
        let answer = Config::parse(TEXT, "web.toml", &overrides, Path::new("/configs"));
        answer
            .err()
            .unwrap_or_else(|| panic!("{overrides:?} was accepted"))
            .to_string()
    };
    let schedule = "mixture.controller=\"schedule\"";
    let stages = |stages: &str| format!("mixture.stages=[{stages}]");
    let good = r#"{name = "k", from_step = 200, weights = {web = 1}}"#;
    for (overrides, key) in [
        (vec![schedule.to_owned()], "mixture.stages"),
        (vec![stages(good)], "mixture.stages"),
        (
            vec![schedule.into(), stages(r#"{name = "k", weights = {web = 1}}"#)],
            "mixture.stages[0].from_step",
        ),
        (
            vec![
                schedule.into(),
                stages(r#"{name = "k", from_step = 107, weights = {web = 1}}"#),
            ],
            "mixture.stages[0].from_step",
        ),
        (
            vec![
                schedule.into(),
                stages(r#"{name = "k", from_step = 200, weights = {book = 1}}"#),
            ],
            "mixture.stages[0].weights",
        ),
        (
            vec![
                schedule.into(),
                stages(&format!(
                    r#"{good}, {{name = "t", from_step = 210, weights = {{web = 1}}}}"#
                )),
            ],
            "mixture.stages[1].from_step",
        ),
        (vec!["mixture.shadow=[\"static\"]".into()], "mixture.shadow"),
        (vec!["mixture.shadow=[\"odm\", \"odm\"]".into()], "mixture.shadow"),
        (
            vec!["mixture.shadow=[\"ado\"]".into(), "evaluation.interval_steps=0".into()],
            "evaluation.interval_steps",
        ),
        (vec!["mixture.reference={web = 2.0}".into()], "mixture.reference"),
        (vec!["policy.decay_on_plateau=true".into()], "policy.decay_on_plateau"),
        (vec!["policy.stop.heldout_loss=-1.0".into()], "policy.stop.heldout_loss"),
        (
            vec![
                "optimizer.schedule={kind = \"wsd\", warmup_steps = 5, decay_steps = 10, final_fraction = 0.1}".into(),
            ],
            "optimizer.schedule.decay_from",
        ),
        (
            vec!["batch.ramp={start_sequences = 0, step_sequences = 1, samples = 10}".into()],
            "batch.ramp.start_sequences",
        ),
        (
            vec!["batch.ramp={start_sequences = 2, step_sequences = 2, samples = 10}".into()],
            "batch.ramp.step_sequences",
        ),
    ] {
        let overrides: Vec<&str> = overrides.iter().map(String::as_str).collect();
        let message = refused(&overrides);
        assert!(message.starts_with(&format!("{key}: ")), "{overrides:?}: {message}");
    }
    let parsed = Config::parse(
        TEXT,
        "web.toml",
        &[schedule.to_owned(), stages(good)],
        Path::new("/configs"),
    );
    let back = parsed.expect("a schedule").to_toml().expect("TOML");
    Config::parse(&back, "back.toml", &[], Path::new("/")).expect("itself");
    let ramp = "batch.ramp={start_sequences = 2, step_sequences = 2, samples = 10}".to_owned();
    let parsed = Config::parse(
        TEXT,
        "web.toml",
        &["batch.sequences_per_lane=4".to_owned(), ramp],
        Path::new("/configs"),
    );
    assert_eq!(parsed.expect("a ramp").batch_schedule().stages().len(), 4);
}

/// What is only looked at decides no number: a run stays itself whatever is set, and its folder says it only where it is.
#[test]
fn the_monitor_belongs_to_no_identity() {
    let parse = |overrides: &[String]| Config::parse(TEXT, "web.toml", overrides, Path::new("/configs"));
    let plain = parse(&[]).expect("a good config");
    let set = parse(&["monitor.weights_interval_steps=7".to_owned()]).expect("a good config");
    assert_eq!(set.identity(), plain.identity());
    assert!(!plain.to_toml().expect("TOML").contains("monitor"));
    let text = set.to_toml().expect("TOML");
    let back = Config::parse(&text, "back.toml", &[], Path::new("/")).expect("itself");
    assert_eq!(back.monitor, set.monitor);
    let weighed = |config: &Config| {
        (0..=14)
            .filter(|&step| config.monitor.weighs(StepsCompleted(step)))
            .collect::<Vec<_>>()
    };
    assert_eq!(weighed(&set), [7, 14]);
    let none = parse(&["monitor.weights_interval_steps=0".to_owned()]).expect("a good config");
    assert_eq!(weighed(&none), [0_u64; 0]);
    let refused = parse(&["monitor.weights_interval_steps=9223372036854775807".to_owned()]).expect_err("refused");
    assert_eq!(refused.key, "monitor.weights_interval_steps");
}

/// `tarazed data prepare` takes any run's config: it knows every section that a run may have.
#[test]
fn data_are_prepared_by_a_config_with_every_section() {
    let overrides = ["policy.persons=true", "monitor.weights_interval_steps=7"].map(str::to_owned);
    let parsed = DataFile::parse(TEXT, "web.toml", &overrides, Path::new("/configs"));
    assert_eq!(parsed.expect("a good file").data.domains.len(), 2);
}

/// What is said of a text with overrides that are refused.
fn said(text: &str, overrides: &[&str]) -> String {
    let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
    let refused = Config::parse(text, "web.toml", &overrides, Path::new("/configs"));
    refused.expect_err("refused").to_string()
}

/// A key that is missing is named with its section, and a section without lines of its own by its key.
#[test]
fn missing_keys_are_named_with_their_section() {
    for (line, key) in [
        ("layers = 1\n", "model.layers"),
        ("lanes = 2\n", "batch.lanes"),
        ("name = \"there-and-back\"\n", "run.name"),
        ("language = \"en\"\n", "data.domains.language"),
    ] {
        let message = said(&TEXT.replace(line, ""), &[]);
        let missing = format!("missing key `{key}`; correct the file");
        assert!(
            message.starts_with("web.toml: ") && message.contains(&missing),
            "{message}"
        );
        assert!(message.contains("at line "), "{message}");
    }
    let schedule = TEXT.replace(", final_fraction = 0.1", "");
    let message = said(&schedule, &[]);
    assert!(
        message.contains("missing key `optimizer.schedule.final_fraction`"),
        "{message}"
    );
    let (before, _) = TEXT.split_once("[[data.domains]]").expect("domains");
    for text in [
        before,
        &before.replace("[data.tokenizer]\npath = \"tokenizers/ours.json\"\n", ""),
    ] {
        let message = said(text, &[]);
        assert!(message.contains("missing key `data"), "{message}");
        assert!(message.ends_with("; name at least one [[data.domains]]"), "{message}");
    }
    assert!(said(before, &[]).contains("missing key `data.domains`"));
}

/// Whoever brought a fault is named: an override as it was given, or the file with its own line, whatever else was set.
#[test]
fn a_fault_is_its_overrides_or_its_files() {
    for (item, rest) in [
        ("model.colour=3", "model.colour: unknown field `colour`, expected"),
        ("model.heads=abc", "model.heads: invalid type: string \"abc\""),
        ("colours.red=3", "colours: unknown field `colours`"),
        ("cluster.device=gpu", "cluster.device: unknown variant `gpu`"),
        (
            "optimizer.schedule.kind=foo",
            "optimizer.schedule.kind: unknown variant `foo`",
        ),
        ("optimizer.schedule.warmup_steps=abc", "optimizer.schedule"),
        ("batch.ramp.samples=3", "missing key `batch.ramp.start_sequences`"),
        ("model={layers=1}", "missing key `model."),
        ("data.domains=[{name=\"web\"}]", "missing key `data.domains."),
    ] {
        let message = said(TEXT, &["run.seed=8", item, "run.steps=900"]);
        let start = format!("--set {item}: {rest}");
        assert!(message.starts_with(&start), "{message}");
        assert!(!message.contains("web.toml") && !message.contains("line "), "{message}");
        assert!(
            message.ends_with("; correct the override; README.md explains each key"),
            "{message}"
        );
    }
    // Of two for one key the newest counts.
    let message = said(TEXT, &["model.heads=abc", "model.heads=def"]);
    assert!(message.starts_with("--set model.heads=def: "), "{message}");

    let colour = TEXT.replace("layers = 1\n", "layers = 1\ncolour = 3\n");
    let alone = said(&colour, &[]);
    let line = colour.lines().position(|line| line == "colour = 3").expect("a line") + 1;
    assert!(
        alone.contains(&format!("line {line}, ")) && alone.contains("correct the file"),
        "{alone}"
    );
    assert_eq!(said(&colour, &["run.seed=8", "model.ffn=16"]), alone);
    let missing = TEXT.replace("layers = 1\n", "");
    assert_eq!(said(&missing, &["model.ffn=16"]), said(&missing, &[]));
    let two = TEXT
        .replace("name = \"there-and-back\"\n", "")
        .replace("layers = 1\n", "");
    let message = said(&two, &["run.name=\"here\"", "model.ffn=16"]);
    assert!(
        message.starts_with("web.toml: ") && message.contains("missing key `model.layers`"),
        "{message}"
    );
}

/// A section that data do not have is its override's fault or its file's, too.
#[test]
fn an_unknown_section_of_data_is_blamed_on_whoever_has_it() {
    let said = |text: &str, overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
        let refused = DataFile::parse(text, "web.toml", &overrides, Path::new("/configs"));
        refused.expect_err("refused").to_string()
    };
    let message = said(TEXT, &["dat.x=1"]);
    assert!(
        message.starts_with("--set dat.x=1: dat: unknown section 'dat'; correct the override"),
        "{message}"
    );
    let message = said(&format!("{TEXT}[dat]\nx = 1\n"), &["run.seed=8"]);
    assert!(
        message.starts_with("web.toml: dat: unknown section 'dat'; correct the file"),
        "{message}"
    );
}

/// The path is right, so the remedy is not another one.
#[test]
fn a_file_that_is_not_utf8_is_to_be_converted() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("latin1.toml");
    let text = [TEXT.as_bytes(), b"# caf\xe9\n"].concat();
    std::fs::write(&path, text).expect("written");
    let expected = format!(
        "{}: invalid UTF-8 at byte {}; convert it to UTF-8",
        path.display(),
        TEXT.len() + 5
    );
    assert_eq!(Config::load(&path, &[]).expect_err("refused").to_string(), expected);
    assert_eq!(DataFile::load(&path, &[]).expect_err("refused").to_string(), expected);
    let absent = Config::load(&folder.path().join("no.toml"), &[]).expect_err("refused");
    assert!(
        absent.to_string().ends_with("; give the path of a config file"),
        "{absent}"
    );
}
