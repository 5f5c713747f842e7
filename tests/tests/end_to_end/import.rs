//! `tarazed import`, and runs that begin with the weights of another checkpoint (`[model.initial]`).
//!
//! That the weights are those of the folder is what an export of the import shows; that a run begins with them, and nothing else of
//! where they lie, is what its trace shows: the same whether they come by way of a Hugging Face folder or from the store of the run
//! that made them, on one rank or on three, and whoever is killed before there is a checkpoint to go on from.

use crate::common::{
    assert_halted, assert_prefix, assert_refused, assert_untouched, damage, files, files_with_ending, truncate,
    with_small_files,
};
use crate::export::{data_set, document, exported, tensors, text, trained};
use rustix::process::Signal;
use safetensors::Dtype;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tarazed_tests::harness::{Outcome, Project, Run, Train, assert_same_trace, lines, undisturbed};

/// Of the tiny model: rows of embedding and head; elements of a block.
const ROWS: usize = 512;
const BLOCK: [&str; 2] = ["--block-elements", "1024"];
/// Long enough for ranks to be killed on the way.
const STEPS: u64 = 400;

fn import(project: &Project, dir: &Path, store: &str, more: &[&str]) -> Outcome {
    let dir = text(dir);
    project.tarazed(&[&["import", &dir, "--to", store][..], &BLOCK[..], more].concat())
}

/// An import into a store of this name, and the sections that it printed.
#[track_caller]
fn imported(project: &Project, dir: &Path, name: &str, more: &[&str]) -> (PathBuf, toml::Table) {
    let store = project.path().join(name);
    let outcome = import(project, dir, &text(&store), more);
    outcome.assert_code(0);
    let sections = toml::from_str(&outcome.stdout).unwrap_or_else(|e| panic!("{e}\n{}", outcome.tail()));
    (store, sections)
}

/// A run that begins with what these sections say.
fn begun(project: &Project, name: &str, sections: &toml::Table) -> Train {
    let initial = &sections["model"]["initial"];
    let key = |key: &str| initial[key].as_str().expect("text").to_owned();
    given(project.train(name), &key("from"), &key("blake3"))
}

fn given(train: Train, from: &str, blake3: &str) -> Train {
    train
        .set("model.initial.from", from)
        .set("model.initial.blake3", blake3)
}

/// The hash of a checkpoint's manifest, as `checkpoint show` has it.
fn manifest_hash(project: &Project, store: &Path, step: u64) -> String {
    let step = step.to_string();
    let shown = project.tarazed(&["checkpoint", "show", &text(store), "--step", &step, "--json"]);
    shown.assert_code(0);
    let shown: Value = serde_json::from_str(&shown.stdout).expect("JSON");
    shown["manifest"]["blake3"].as_str().expect("a hash").to_owned()
}

fn continued(project: &Project, from: &str, more: &[&str]) -> String {
    let said = ["generate", from, "--prompt", "The old river", "--tokens", "12"];
    let outcome = project.tarazed(&[&said[..], more].concat());
    outcome.assert_code(0);
    outcome.stdout
}

/// There and back: every tensor has the bits that it had, the checkpoint is whole in the eyes of both verifiers, and it continues a
/// text as the run's own does. What goes by way of bf16 comes back as it was rounded, rows that were left out are zero again, and a
/// folder may have its weights in many files.
#[test]
fn an_import_is_the_model_that_was_exported() {
    let project = Project::tiny();
    let run = trained(&project);
    let set = data_set(run.dir());
    let tokens = document(&set.join("data.json"))["tokenizer"]["vocabulary"].as_u64();
    assert_eq!(tokens, Some(ROWS as u64), "no row is padding");
    let dir = text(run.dir());
    let folder = exported(&project, &dir, "out", &["--dtype", "f32"]);
    let (store, sections) = imported(&project, &folder, "imported", &[]);
    let (place, hash) = (text(&store), manifest_hash(&project, &store, 0));
    let initial = &sections["model"]["initial"];
    assert_eq!(initial["from"].as_str(), Some(format!("{place}@0").as_str()));
    assert_eq!(initial["blake3"].as_str(), Some(hash.as_str()));
    let shown = project.tarazed(&["checkpoint", "show", &place]);
    shown.assert_code(0);
    assert!(shown.stdout.contains(&format!("manifest {hash}")), "{}", shown.tail());
    project.tarazed(&["checkpoint", "verify", &place]).assert_code(0);
    project.verify(&["bucket", &place]).assert_code(0);
    assert_eq!(project.committed(&store), [0].into());

    // The config of a run whose [model] fits serves, and the folder's tokenizer.
    let (config, tokenizer) = (text(&project.config()), text(&folder.join("tokenizer.json")));
    let files = ["--config", config.as_str(), "--tokenizer", &tokenizer];
    assert_eq!(continued(&project, &place, &files), continued(&project, &dir, &[]));
    let again = exported(
        &project,
        &place,
        "again",
        &[&["--dtype", "f32"][..], &files[..]].concat(),
    );
    let exact = tensors(&folder, Dtype::F32);
    assert_eq!(tensors(&again, Dtype::F32), exact);

    let small = exported(&project, &dir, "small", &["--shard-bytes", "20000"]);
    let config_out = project.path().join("model.toml");
    let more = [
        "--vocabulary",
        "520",
        "--shards",
        "3",
        "--config-out",
        &text(&config_out),
    ];
    let told = import(&project, &small, "rounded", &more);
    told.assert_code(0);
    assert!(told.stdout.contains("added: 8 rows of zeros"), "{}", told.tail());
    let written: toml::Table = toml::from_str(&std::fs::read_to_string(&config_out).expect("a file")).expect("TOML");
    assert_eq!(written["model"]["vocabulary"].as_integer(), Some(520));
    let tokenizer = written["data"]["tokenizer"]["path"].as_str();
    assert_eq!(tokenizer, Some(text(&small.join("tokenizer.json")).as_str()));
    project.set("model.vocabulary", "520");
    let back = exported(&project, "rounded", "back", &files);
    let (back, sent) = (tensors(&back, Dtype::BF16), tensors(&small, Dtype::BF16));
    assert_eq!(back, sent, "the tokenizer has no more rows than it had");
}

/// DET-1, CKPT-4, CKPT-6: a run with given weights is a function of its config, their hash among it: the same trace on one rank and
/// on three of which two are killed with all that they hold, by way of the import and from the store of the run that made them.
#[test]
fn a_run_begins_with_given_weights_whatever_happens() {
    let project = Project::tiny();
    let run = trained(&project);
    let folder = exported(&project, &text(run.dir()), "out", &["--dtype", "f32"]);
    let (store, sections) = imported(&project, &folder, "imported", &["--shards", "3"]);
    let alone = begun(&project, "alone", &sections).ranks(1).steps(STEPS).complete();
    assert!(alone.dir().join("config.toml").is_file());

    let mut three = Run::start(
        &begun(&project, "three", &sections)
            .ranks(3)
            .steps(STEPS)
            .set("checkpoint.interval_steps", "0"),
    );
    three.wait_for_step(5);
    let workers = three
        .wait_for_status("three ranks", |status| status.all_train(3))
        .workers;
    for worker in &workers[1..] {
        assert!(three.processes().signal(worker.pid, Signal::KILL), "{}", three.tail());
    }
    three.finish().assert_code(0);
    assert_same_trace(
        &three.trace(),
        &alone.trace(),
        "two of three ranks lost before the first checkpoint",
    );
    let begun_anew = three.events("generation");
    let from_start = begun_anew
        .iter()
        .filter(|event| event["base"] == 0 && event["restored"] == true);
    assert!(from_start.count() > 1, "{begun_anew:?}\n{}", three.tail());

    let own = run.dir().join("store");
    let hash = manifest_hash(&project, &own, 40);
    let from = format!("{}@40", own.display());
    let direct = given(project.train("direct"), &from, &hash)
        .ranks(2)
        .steps(STEPS)
        .complete();
    assert_same_trace(
        &direct.trace(),
        &alone.trace(),
        "from the store of the run that made them",
    );

    // It begins where the other run stood, and not at the seed.
    let loss = |trace: &[u8]| lines(trace)[0]["loss"].as_f64().expect("a number");
    let (given_loss, seed_loss) = (loss(&alone.trace()), loss(undisturbed(1)));
    assert!(
        given_loss < seed_loss - 0.3,
        "{given_loss} after training, {seed_loss} before"
    );
    let evaluated = |train: Train, every: &str| train.ranks(1).set("evaluation.interval_steps", every);
    let stood = evaluated(project.train("stood"), "41").steps(41).complete();
    let stands = evaluated(begun(&project, "stands", &sections), "1").steps(1).complete();
    let held_out = |run: &Run, step: usize| lines(&run.trace())[step - 1]["heldout"].clone();
    assert!(held_out(&stands, 1).is_object());
    assert_eq!(
        held_out(&stands, 1),
        held_out(&stood, 41),
        "of the weights before that step"
    );

    // Where they lie is no part of the run, and behind the first checkpoint nobody asks for them any more.
    let moved = project.path().join("moved");
    std::fs::rename(&store, &moved).expect("moved");
    let hash = sections["model"]["initial"]["blake3"].as_str().expect("text");
    let longer = given(project.train("three"), &text(&moved), hash)
        .ranks(2)
        .steps(STEPS + 10)
        .complete();
    assert_prefix_of(&alone, &longer);
    let same = begun(&project, "alone", &sections)
        .ranks(3)
        .steps(STEPS + 10)
        .complete();
    assert_same_trace(&same.trace(), &longer.trace(), "gone on with");
    // Another hash is another run.
    let other = given(project.train("three"), &from, &manifest_hash(&project, &own, 20)).steps(STEPS + 20);
    assert_refused(&other.finish(), &["runs/three", "another config", "differs in: model)"]);
}

#[track_caller]
fn assert_prefix_of(shorter: &Run, longer: &Run) {
    let (shorter, longer) = (shorter.trace(), longer.trace());
    assert!(
        longer.starts_with(&shorter),
        "{} of {} bytes",
        shorter.len(),
        longer.len()
    );
}

/// What is not there, is another checkpoint or another model is refused before anything of the run is written.
#[test]
fn weights_that_are_not_there_begin_no_run() {
    let project = Project::tiny();
    let run = trained(&project);
    let own = run.dir().join("store");
    let (store, hash) = (text(&own), manifest_hash(&project, &own, 40));
    let other = "0a".repeat(32);
    let gone = text(&project.path().join("gone"));
    let (at_20, at_30) = (format!("{store}@20"), format!("{store}@30"));
    let dir = text(run.dir());
    let before = files(project.path());
    for (from, hash, more, parts) in [
        (
            &store,
            &other,
            None,
            &[
                "model.initial.blake3: the newest one there, of step 40",
                &hash,
                "checkpoint show",
            ][..],
        ),
        (
            &at_20,
            &hash,
            None,
            &["model.initial.blake3: the checkpoint, of step 20"],
        ),
        (
            &at_30,
            &hash,
            None,
            &["model.initial.from", "holds no checkpoint of step 30", "checkpoint ls"],
        ),
        (&gone, &hash, None, &["model.initial.from", "gone: not found"]),
        (
            &dir,
            &hash,
            None,
            &["model.initial.from", "is a run's folder", "runs/source/store"],
        ),
        (
            &store,
            &hash,
            Some(("model.ffn", "96")),
            &["model.initial: is another model", "blocks of 1024"],
        ),
        (
            &store,
            &hash,
            Some(("optimizer.block_elements", "4096")),
            &["optimizer.block_elements: is 4096", "blocks of 1024", "set it to 1024"],
        ),
        (
            &store,
            &"0a".to_owned(),
            None,
            &["model.initial.blake3", "64 hex digits"],
        ),
    ] {
        let mut train = given(project.train("new"), from, hash).ranks(2).steps(20);
        if let Some((key, value)) = more {
            train = train.set(key, value);
        }
        let outcome = train.finish();
        assert_refused(&outcome, parts);
        assert!(!train.run_dir().exists(), "{}", outcome.tail());
        for name in ["new.stdout", "new.stderr"] {
            std::fs::remove_file(project.path().join(name)).expect("what it said");
        }
        assert_untouched(project.path(), &before);
    }
    // A store that does not answer says nothing of what it holds: another try may find it.
    let mut away = given(project.train("new"), "s3://bucket/imported", &hash).steps(20);
    for (name, value) in [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "nobody-is-there"),
        ("AWS_SECRET_ACCESS_KEY", "nobody-is-there"),
        ("AWS_REGION", "us-east-1"),
    ] {
        away = away.variable(name, value);
    }
    let outcome = away.finish();
    outcome.assert_code(33);
    outcome.assert_says("tarazed: failed for now: model.initial.from: ");
    assert!(!away.run_dir().exists(), "{}", outcome.tail());
}

/// Heads do not show in shapes, nor does how positions turn: the weights of an import begin no run whose model means something else by
/// them.
#[test]
fn imported_weights_begin_no_run_of_another_meaning() {
    let project = Project::tiny();
    let run = trained(&project);
    let folder = exported(&project, &text(run.dir()), "out", &["--dtype", "f32"]);
    let (store, sections) = imported(&project, &folder, "imported", &[]);
    for changes in [
        &[("model.heads", "2"), ("model.kv_heads", "1")][..],
        &[("model.rope_theta", "500000.0")],
        &[("model.norm_eps", "1e-6")],
    ] {
        let train = begun(&project, "new", &sections).ranks(1).steps(5);
        let train = changes.iter().fold(train, |train, (key, value)| train.set(key, value));
        let outcome = train.finish();
        assert_refused(
            &outcome,
            &["model.initial: its [model] is not that of the imported weights"],
        );
        assert!(!train.run_dir().exists(), "{changes:?}: {}", outcome.tail());
    }
    // A run's data set has a tokenizer of its own, and nobody knows whether it is that of these weights.
    let config = text(&project.config());
    let (place, dir) = (text(&store), text(run.dir()));
    let said = ["generate", &place, "--prompt", "The"];
    let asked = [&said[..], &["--config", &config, "--run-dir", &dir]].concat();
    assert_refused(&project.tarazed(&asked), &["add --tokenizer FILE"]);
}

/// CKPT-4, SUP-3: weights that were damaged behind the look-up are met by ranks: no checkpoint of the run is blamed, the object is
/// named, and after a bounded number of tries the run halts. With the object mended, the same command begins.
#[test]
fn damaged_weights_halt_the_run_by_the_objects_name() {
    let project = Project::tiny_with(&[("fault.restarts_max", "2")]);
    let run = trained(&project);
    let folder = exported(&project, &text(run.dir()), "out", &["--dtype", "f32"]);
    let (store, sections) = imported(&project, &folder, "imported", &[]);
    let shard = files_with_ending(&store, ".safetensors").swap_remove(2);
    let good = std::fs::read(&shard).expect("a shard");
    damage(&shard);
    let key = text(shard.strip_prefix(&store).expect("an object of the store"));
    let train = begun(&project, "new", &sections).ranks(2).steps(20);
    let mut halted = Run::start(&train);
    let outcome = halted.finish();
    assert_halted(&outcome, &["model.initial", &key, "do not have the recorded hash"]);
    assert!(halted.events("checkpoint_refuted").is_empty(), "{}", halted.tail());
    assert_eq!(halted.step(), 0);
    std::fs::write(&shard, good).expect("mended");
    let mut mended = Run::start(&train);
    mended.finish().assert_code(0);
    assert_eq!(lines(&mended.trace()).len(), 20);

    // What the look-up sees, it says.
    truncate(&shard);
    let fresh = begun(&project, "fresh", &sections).ranks(2).steps(20);
    let outcome = fresh.finish();
    assert_halted(&outcome, &["model.initial.from", &key]);
    assert!(!fresh.run_dir().exists(), "{}", outcome.tail());
    std::fs::remove_file(&shard).expect("removed");
    assert_refused(&fresh.finish(), &["model.initial.from", &key, "not found"]);
    assert!(!fresh.run_dir().exists());
}

/// A copy of a folder with one file changed.
fn changed(project: &Project, folder: &Path, file: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> PathBuf {
    let copy = project.path().join("changed");
    let _ = std::fs::remove_dir_all(&copy);
    std::fs::create_dir(&copy).expect("a folder");
    for (name, bytes) in files(folder) {
        std::fs::write(copy.join(name), bytes).expect("written");
    }
    let path = copy.join(file);
    std::fs::write(&path, change(std::fs::read(&path).expect("a file"))).expect("written");
    copy
}

/// With this key of `config.json`.
fn configured(key: &str, value: Value) -> impl FnOnce(Vec<u8>) -> Vec<u8> {
    move |text| {
        let mut config: Value = serde_json::from_slice(&text).expect("JSON");
        config[key] = value;
        config.to_string().into_bytes()
    }
}

/// With another header, of the same length.
fn renamed(from: &'static str, to: &'static str) -> impl FnOnce(Vec<u8>) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    move |bytes| {
        let at = bytes.windows(from.len()).position(|part| part == from.as_bytes());
        let at = at.expect("in its header");
        [&bytes[..at], to.as_bytes(), &bytes[at + from.len()..]].concat()
    }
}

/// A folder that this program's model cannot be, or that is not as it was made, is refused by the key or the tensor, and nothing is
/// written.
#[test]
fn what_cannot_be_imported_is_refused_by_name() {
    type Change = Box<dyn FnOnce(Vec<u8>) -> Vec<u8>>;
    let project = Project::tiny();
    let run = trained(&project);
    let folder = exported(&project, &text(run.dir()), "out", &["--dtype", "f32"]);
    let (config, weights) = ("config.json", "model.safetensors");
    let cases: Vec<(&str, Change, &[&str])> = vec![
        (
            config,
            Box::new(configured("tie_word_embeddings", json!(true))),
            &["config.json: tie_word_embeddings: is true"],
        ),
        (
            config,
            Box::new(configured("attention_bias", json!(true))),
            &["config.json: attention_bias: is true"],
        ),
        (
            config,
            Box::new(configured("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}))),
            &["config.json: rope_scaling."],
        ),
        (
            config,
            Box::new(configured("model_type", json!("mistral"))),
            &["config.json: model_type: is \"mistral\""],
        ),
        (
            config,
            Box::new(configured("sliding_window", json!(16))),
            &["config.json: sliding_window: is 16"],
        ),
        (
            config,
            Box::new(configured("num_key_value_heads", json!(3))),
            &["config.json: model.kv_heads"],
        ),
        (
            config,
            Box::new(configured("vocab_size", json!(511))),
            &["model.embed_tokens.weight has the shape [512, 32]", "[511, 32]"],
        ),
        (config, Box::new(|_| b"{".to_vec()), &["config.json: is no JSON"]),
        (
            weights,
            Box::new(|bytes| bytes[..bytes.len() - 1].to_vec()),
            &["model.safetensors", "it is not whole"],
        ),
        (
            weights,
            Box::new(|bytes| [&bytes[..], b"more"].concat()),
            &["its header speaks of"],
        ),
        (
            weights,
            Box::new(|bytes| [&u64::MAX.to_le_bytes()[..], &bytes[8..]].concat()),
            &["a header of 18446744073709551615 bytes"],
        ),
        (
            weights,
            Box::new(renamed("lm_head.weight", "lm_head.wrongs")),
            &["missing: lm_head.weight"],
        ),
        (
            weights,
            Box::new(renamed("[512,32]", "[512,31]")),
            &["are not those of the shape [512, 31]"],
        ),
        (weights, Box::new(renamed("\"F32\"", "\"I32\"")), &["is of type I32"]),
        (
            weights,
            Box::new(|mut bytes| {
                let end = bytes.len();
                bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
                bytes
            }),
            &["of tensor model.norm.weight is NaN"],
        ),
    ];
    for (file, change, parts) in cases {
        let copy = changed(&project, &folder, file, change);
        let before = files(project.path());
        assert_refused(&import(&project, &copy, "store", &[]), parts);
        assert_untouched(project.path(), &before);
        assert!(!project.path().join("store").exists(), "{parts:?}");
    }
    std::fs::remove_file(project.path().join("changed").join(weights)).expect("removed");
    let before = files(project.path());
    for (dir, more, parts) in [
        ("changed", &[][..], &["holds neither model.safetensors nor"][..]),
        ("nowhere", &[], &["nowhere/config.json: cannot be read"]),
        (
            "out",
            &["--vocabulary", "511"],
            &["--vocabulary: is 511", "vocab_size 512"],
        ),
        ("out", &["--vocabulary", "2000000"], &["--vocabulary: "]),
        ("out", &["--config-out", "tiny.toml"], &["tiny.toml: is there already"]),
        ("out", &["--config-out", "nowhere/x.toml"], &["its folder is not there"]),
    ] {
        assert_refused(&import(&project, &project.path().join(dir), "store", more), parts);
        assert_untouched(project.path(), &before);
        assert!(!project.path().join("store").exists(), "{parts:?}");
    }
    let odd = project.tarazed(&["import", "out", "--to", "store", "--block-elements", "100"]);
    assert_refused(&odd, &["--block-elements: 100 is not a positive multiple of 64"]);
    assert_untouched(project.path(), &before);
}

/// A disk that is full in the middle halts an import, and what had gone up is gone: with room, the same command does it. A limit on
/// file sizes stands in for it, which all shards but the largest keep to.
#[test]
fn a_full_disk_halts_an_import_and_leaves_nothing_in_its_way() {
    let project = Project::tiny();
    let run = trained(&project);
    let folder = exported(&project, &text(run.dir()), "out", &["--dtype", "f32"]);
    let (good, _) = imported(&project, &folder, "good", &[]);
    let sizes: Vec<u64> = files_with_ending(&good, ".safetensors")
        .iter()
        .map(|shard| std::fs::metadata(shard).expect("a shard").len())
        .collect();
    let (first, largest) = (sizes[0], sizes.iter().copied().max().unwrap_or_default());
    assert!(first + 1024 < largest, "{sizes:?}");
    let store = project.path().join("store");
    let (dir, place) = (text(&folder), text(&store));
    let asked = [&["import", &dir, "--to", &place][..], &BLOCK[..]].concat();
    let output = with_small_files(&project, first.div_ceil(512) + 1, &asked);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(
        said.contains("tarazed: halted: ") && said.contains("no space left"),
        "{said}"
    );
    assert_eq!(files(&store).len(), 0, "{:?}", files(&store).keys());
    import(&project, &folder, &text(&store), &[]).assert_code(0);
    assert_eq!(project.committed(&store), [0].into());
}

/// CKPT-3: a store with a chain is some run's, and an import would put it out of charge.
#[test]
fn a_store_in_use_is_not_imported_into() {
    let project = Project::tiny();
    let run = trained(&project);
    let folder = exported(&project, &text(run.dir()), "out", &["--dtype", "f32"]);
    let (store, _) = imported(&project, &folder, "imported", &[]);
    let own = text(&run.dir().join("store"));
    let url = format!("file://{own}");
    // As imports leave them that are killed: while shards go up, and between the claim and the commit.
    let (going_up, claimed) = (project.path().join("going-up"), project.path().join("claimed"));
    for (left, kind, count) in [(&going_up, "shards", 3), (&claimed, "commits", 1)] {
        let names: Vec<PathBuf> = files(&store).into_keys().collect();
        for name in names.iter().filter(|name| name.starts_with(kind)).take(count) {
            std::fs::create_dir_all(left.join(name).parent().expect("a folder")).expect("made");
            std::fs::copy(store.join(name), left.join(name)).expect("copied");
        }
    }
    let before = files(project.path());
    for (place, part) in [
        (text(&going_up), "holds shards of no checkpoint"),
        (text(&claimed), "is claimed already"),
        (text(&store), "holds a chain of checkpoints already"),
        (own, "holds a chain of checkpoints already"),
        (url, "holds a chain of checkpoints already"),
        (text(run.dir()), "is a run's folder"),
        (text(&project.config()), "is no folder"),
    ] {
        assert_refused(&import(&project, &folder, &place, &[]), &[part, "--to"]);
        assert_untouched(project.path(), &before);
    }
    let mut longer = Run::start(&project.train("source").ranks(2).steps(60));
    longer.finish().assert_code(0);
    assert_prefix(&longer);
}
