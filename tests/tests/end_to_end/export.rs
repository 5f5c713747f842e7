//! `tarazed export`: a checkpoint as a Hugging Face folder, against the checkpoint's own bytes.
//!
//! What the folder must hold is written down here once more, names, shapes and places in the flat space, and compared with what
//! the store gives. That these names, shapes and orders mean what Hugging Face's Llama means by them is what the parity with
//! PyTorch tests (`tests/tests/parity.rs`); `tests/parity/check_export.py` loads a folder outside.

use crate::common::{
    assert_halted, assert_refused, assert_untouched, damage, files, files_with_ending, with_small_files,
};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tarazed_domain::{Generation, StepsCompleted};
use tarazed_store::{CheckpointStore, WriterId};
use tarazed_tests::harness::{Outcome, Project, Run};

/// Of the tiny model: rows of embedding and head, those of padding included; elements of a block.
const ROWS: usize = 512;
const BLOCK: usize = 1024;

/// Shape and bytes of each tensor.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

/// A run with checkpoints of steps 20 and 40.
pub fn trained(project: &Project) -> Run {
    project.train("source").ranks(2).steps(40).complete()
}

pub fn text(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_owned()
}

fn export(project: &Project, from: &str, to: &Path, more: &[&str]) -> Outcome {
    let to = text(to);
    project.tarazed(&[&["export", from, "--to", &to][..], more].concat())
}

#[track_caller]
pub fn exported(project: &Project, from: &str, name: &str, more: &[&str]) -> PathBuf {
    let to = project.path().join(name);
    export(project, from, &to, more).assert_code(0);
    to
}

/// The folder of the run's data set.
pub fn data_set(run: &Path) -> PathBuf {
    let mut sets = std::fs::read_dir(run.join("data")).expect("a folder").flatten();
    let found = sets.find(|set| set.path().join("data.json").is_file());
    found.expect("a data set").path()
}

pub fn document(path: &Path) -> Value {
    let bytes = std::fs::read(path).expect("a file");
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// All tensors of the folder's files, which are all of this type.
pub fn tensors(folder: &Path, dtype: Dtype) -> Tensors {
    let mut found = Tensors::new();
    for file in files_with_ending(folder, ".safetensors") {
        let bytes = std::fs::read(&file).expect("a file");
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("a header");
        assert_eq!(header.metadata().as_ref().expect("metadata")["format"], "pt");
        for (name, view) in SafeTensors::deserialize(&bytes).expect("safetensors").tensors() {
            assert_eq!(view.dtype(), dtype, "{name}");
            let twice = found.insert(name, (view.shape().to_vec(), view.data().to_vec()));
            assert!(twice.is_none(), "{}: a tensor twice", file.display());
        }
    }
    found
}

fn f32s(bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
    bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().expect("four bytes")))
}

/// Names and shapes of the tiny model in the order of the flat space: what decays, then the norms.
fn shapes() -> [Vec<(String, Vec<usize>)>; 2] {
    let mut decaying = vec![("model.embed_tokens.weight".to_owned(), vec![ROWS, 32])];
    let mut norms = Vec::new();
    for layer in 0..2 {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        norms.push((name("input_layernorm"), vec![32]));
        for (part, shape) in [
            ("self_attn.q_proj", [32, 32]),
            ("self_attn.k_proj", [16, 32]),
            ("self_attn.v_proj", [16, 32]),
            ("self_attn.o_proj", [32, 32]),
            ("mlp.gate_proj", [64, 32]),
            ("mlp.up_proj", [64, 32]),
            ("mlp.down_proj", [32, 64]),
        ] {
            decaying.push((name(part), shape.to_vec()));
        }
        norms.push((name("post_attention_layernorm"), vec![32]));
    }
    norms.push(("model.norm.weight".to_owned(), vec![32]));
    decaying.push(("lm_head.weight".to_owned(), vec![ROWS, 32]));
    [decaying, norms]
}

/// The master weights of a checkpoint as tensors, as they must be exported in f32.
fn expected(run: &Path, step: u64, tokens: usize) -> Tensors {
    let location = text(&run.join("store"));
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let flat = runtime.block_on(async {
        let writer = WriterId::fresh(Generation(0));
        let store = CheckpointStore::open_existing(&location, writer)
            .await
            .expect("a store");
        let found = store.at_step(StepsCompleted(step)).await.expect("a checkpoint");
        store.read_flat_weights(&found.manifest).await.expect("weights")
    });
    let mut at = 0;
    let mut found = Tensors::new();
    for group in shapes() {
        for (name, mut shape) in group {
            let values = &flat[at..at + shape.iter().product::<usize>()];
            at += values.len();
            if shape[0] == ROWS {
                shape[0] = tokens;
            }
            let kept = &values[..shape.iter().product()];
            let bytes = kept.iter().flat_map(|value| value.to_le_bytes()).collect();
            found.insert(name, (shape, bytes));
        }
        at = at.next_multiple_of(BLOCK);
    }
    assert_eq!(at, flat.len(), "all of the flat space is accounted for");
    found
}

/// The values that both readers of `config.json`, of transformers below 5 and from 5 on, go by.
fn assert_described(folder: &Path, tokens: usize, end: u64, dtype: &str) {
    let config = document(&folder.join("config.json"));
    for (key, value) in [
        ("architectures", json!(["LlamaForCausalLM"])),
        ("model_type", json!("llama")),
        ("vocab_size", json!(tokens)),
        ("hidden_size", json!(32)),
        ("intermediate_size", json!(64)),
        ("num_hidden_layers", json!(2)),
        ("num_attention_heads", json!(4)),
        ("num_key_value_heads", json!(2)),
        ("head_dim", json!(8)),
        ("hidden_act", json!("silu")),
        ("max_position_embeddings", json!(32)),
        ("rms_norm_eps", json!(1e-5)),
        ("rope_theta", json!(10000.0)),
        (
            "rope_parameters",
            json!({"rope_type": "default", "rope_theta": 10000.0}),
        ),
        ("attention_bias", json!(false)),
        ("mlp_bias", json!(false)),
        ("tie_word_embeddings", json!(false)),
        ("bos_token_id", json!(end)),
        ("eos_token_id", json!(end)),
        ("pad_token_id", json!(0)),
        ("torch_dtype", json!(dtype)),
        ("dtype", json!(dtype)),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    let generation = document(&folder.join("generation_config.json"));
    assert_eq!(generation["eos_token_id"], json!(end));
    let words = document(&folder.join("tokenizer_config.json"));
    for (key, value) in [
        ("tokenizer_class", json!("PreTrainedTokenizerFast")),
        ("eos_token", json!("</s>")),
        ("bos_token", json!("</s>")),
        ("pad_token", json!("<|endoftext|>")),
        ("model_max_length", json!(32)),
    ] {
        assert_eq!(words[key], value, "{key}");
    }
}

fn entries(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder").flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// In f32 nothing is changed: of the newest checkpoint and of an older one, every tensor has the bits of the master weights, in
/// Hugging Face's names and shapes; only rows that stand for no token are left out.
#[test]
fn an_export_is_the_checkpoint_bit_for_bit() {
    let project = Project::tiny_with(&[("data.tokenizer", "{ vocabulary = 500 }")]);
    let run = trained(&project);
    let set = data_set(run.dir());
    let manifest = document(&set.join("data.json"));
    let of_tokenizer = |key: &str| manifest["tokenizer"][key].as_u64().expect("a number");
    let (tokens, end) = (of_tokenizer("vocabulary") as usize, of_tokenizer("end_of_document"));
    assert!(tokens < ROWS, "{tokens} tokens: no row is padding");
    let mut seen = Vec::new();
    for (step, from) in [(40, text(run.dir())), (20, format!("{}@20", run.dir().display()))] {
        let to = project.path().join(format!("out-{step}"));
        let told = export(&project, &from, &to, &["--dtype", "f32"]);
        told.assert_code(0);
        let padding = format!("left out: {} rows", ROWS - tokens);
        assert!(told.stdout.contains(&padding), "{}", told.tail());
        let found = tensors(&to, Dtype::F32);
        assert_eq!(found, expected(run.dir(), step, tokens), "step {step}");
        assert_described(&to, tokens, end, "float32");
        assert_eq!(
            entries(&to),
            [
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json"
            ]
        );
        let tokenizer = |folder: &Path| std::fs::read(folder.join("tokenizer.json")).expect("a tokenizer");
        assert_eq!(tokenizer(&to), tokenizer(&set));
        seen.push(found);
    }
    assert_ne!(seen[0], seen[1], "two steps, two models");
    assert!(entries(project.path()).iter().all(|name| !name.contains("partial")));
}

/// The default: every value is a nearest bf16, and of two that are as near the even one.
#[test]
fn bf16_is_the_nearest() {
    let project = Project::tiny();
    let run = trained(&project);
    let from = text(run.dir());
    let exact = tensors(&exported(&project, &from, "exact", &["--dtype", "f32"]), Dtype::F32);
    let folder = exported(&project, &from, "rounded", &[]);
    let rounded = tensors(&folder, Dtype::BF16);
    assert_eq!(document(&folder.join("config.json"))["dtype"], "bfloat16");
    assert_eq!(exact.len(), rounded.len());
    for (name, (shape, bytes)) in &exact {
        let (other, halves) = &rounded[name];
        assert_eq!(shape, other, "{name}");
        let halves = halves
            .chunks_exact(2)
            .map(|b| u16::from_le_bytes(b.try_into().expect("two bytes")));
        assert_eq!(bytes.len() / 2, 2 * halves.len());
        for (value, half) in f32s(bytes).zip(halves) {
            let wide = |half: u16| f64::from(f32::from_bits(u32::from(half) << 16));
            let below = (value.to_bits() >> 16) as u16;
            let distance = |half: u16| (wide(half) - f64::from(value)).abs();
            let nearest = match distance(below).total_cmp(&distance(below + 1)) {
                std::cmp::Ordering::Less => below,
                std::cmp::Ordering::Greater => below + 1,
                std::cmp::Ordering::Equal => below + (below & 1),
            };
            assert_eq!(half, nearest, "{name}: {value:e}");
        }
    }
}

/// Above the limit there are several files, none above it but where one tensor is, and an index that names each tensor's.
/// Together they hold what one file holds.
#[test]
fn a_large_model_is_cut_into_files_with_an_index() {
    const LIMIT: usize = 30_000;
    let project = Project::tiny();
    let run = trained(&project);
    let from = text(run.dir());
    let whole = tensors(&exported(&project, &from, "whole", &["--dtype", "f32"]), Dtype::F32);
    // An empty folder may be there.
    std::fs::create_dir(project.path().join("cut")).expect("a folder");
    let limit = LIMIT.to_string();
    let more = ["--dtype", "f32", "--shard-bytes", &limit];
    let folder = exported(&project, &from, "cut", &more);
    assert_eq!(tensors(&folder, Dtype::F32), whole);

    let index = document(&folder.join("model.safetensors.index.json"));
    let sizes = whole.values().map(|(_, bytes)| bytes.len());
    assert_eq!(index["metadata"]["total_size"], json!(sizes.sum::<usize>()));
    let places = index["weight_map"].as_object().expect("a map");
    assert_eq!(places.keys().collect::<Vec<_>>(), whole.keys().collect::<Vec<_>>());
    let cut = files_with_ending(&folder, ".safetensors");
    assert!(cut.len() > 3, "{cut:?}");
    for (number, file) in (1..).zip(&cut) {
        let name = file.file_name().expect("a name").to_string_lossy().into_owned();
        assert_eq!(name, format!("model-{number:05}-of-{:05}.safetensors", cut.len()));
        let bytes = std::fs::read(file).expect("a file");
        let held = SafeTensors::deserialize(&bytes).expect("safetensors");
        let size: usize = held.tensors().iter().map(|(_, view)| view.data().len()).sum();
        assert!(size <= LIMIT || held.len() == 1, "{name}: {size} bytes");
        for tensor in held.names() {
            assert_eq!(places[tensor], name.as_str(), "{tensor}");
        }
    }
}

/// A checkpoint is named by its run's folder or by its store: the folder inside the run, one elsewhere, or a URL; config and
/// tokenizer then come from the run's folder or from two files. Whichever way, `export`, `generate` and `eval` do the same.
#[test]
fn a_store_serves_as_well_as_its_run() {
    let project = Project::tiny();
    let run = trained(&project);
    let (dir, own) = (text(run.dir()), text(&run.dir().join("store")));
    let elsewhere = project.path().join("elsewhere");
    for (name, bytes) in files(&run.dir().join("store")) {
        let path = elsewhere.join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        std::fs::write(path, bytes).expect("written");
    }
    let set = project.path().join("order.jsonl");
    let question = json!({"question": "The old river", "choices": ["watched the stone bridge.", "bridge the stone."]});
    std::fs::write(&set, format!("{question}\n")).expect("written");
    let (config, tokenizer) = (
        text(&run.dir().join("config.toml")),
        text(&data_set(run.dir()).join("tokenizer.json")),
    );
    let url = format!("file://{}@20", elsewhere.display());
    let (own, elsewhere) = (format!("{own}@20"), format!("{}@20", elsewhere.display()));
    let mut seen = Vec::new();
    for (number, (from, more)) in [
        (format!("{dir}@20"), &[][..]),
        (own, &[]),
        (elsewhere.clone(), &["--run-dir", dir.as_str()]),
        (url, &["--run-dir", &dir]),
        (elsewhere, &["--config", &config, "--tokenizer", &tokenizer]),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = exported(&project, &from, &format!("out-{number}"), more);
        let said = |args: &[&str]| {
            let outcome = project.tarazed(&[&[args[0], &from][..], &args[1..], more].concat());
            outcome.assert_code(0);
            outcome.stdout
        };
        let told = said(&["generate", "--prompt", "The old", "--tokens", "6"]);
        let scored = said(&["eval", "--set", &text(&set), "--json"]);
        let scored: Value = serde_json::from_str(&scored).expect("JSON");
        assert_eq!(scored["step"], 20);
        seen.push((files(&folder), told, scored["sets"].clone()));
        assert_eq!(seen[number], seen[0], "{from}");
    }
}

/// What cannot be exported is refused with its cause and its remedy, and nothing is written, or written over.
#[test]
fn what_cannot_be_exported_is_refused() {
    let project = Project::tiny();
    let run = trained(&project);
    let dir = text(run.dir());
    let apart = project.path().join("apart");
    std::fs::create_dir(project.path().join("empty")).expect("a folder");
    std::fs::rename(run.dir().join("store"), &apart).expect("moved");
    std::os::unix::fs::symlink(&apart, run.dir().join("store")).expect("linked");
    let apart = text(&apart);
    let config = run.dir().join("config.toml");
    let own = std::fs::read_to_string(&config).expect("a config");
    let other = project.path().join("other.toml");
    std::fs::write(&other, own.replace("seed = 7", "seed = 8")).expect("written");
    let (config, other) = (text(&config), text(&other));
    let (before, names) = (files(project.path()), entries(project.path()));
    let step = |step: &str| format!("{dir}@{step}");
    for (from, to, more, parts) in [
        (
            dir.clone(),
            "text",
            &[][..],
            &["text: is there already", "another folder"][..],
        ),
        (dir.clone(), "tiny.toml", &[], &["tiny.toml: is there already"]),
        (dir.clone(), "nowhere/out", &[], &["nowhere", "in one that is there"]),
        (step("7"), "out", &[], &["step 7", "not found"]),
        (step("last"), "out", &[], &["'last' is no step"]),
        (
            "absent".to_owned(),
            "out",
            &[],
            &["absent: not found", "check the path"],
        ),
        ("empty".to_owned(), "out", &[], &["empty: holds no checkpoint yet"]),
        (
            apart.clone(),
            "out",
            &[],
            &["does not hold its run's config", "--run-dir"],
        ),
        (
            apart.clone(),
            "out",
            &["--config", config.as_str()],
            &["does not hold its run's tokenizer", "--tokenizer"],
        ),
        (
            apart.clone(),
            "out",
            &["--run-dir", &dir, "--config", &other],
            &["other.toml: the checkpoint of step 40 was made with another config"],
        ),
        (
            apart,
            "out",
            &["--run-dir", "absent"],
            &["absent/config.toml: cannot be read"],
        ),
    ] {
        let refused = export(&project, &from, Path::new(to), more);
        assert_refused(&refused, parts);
        assert_untouched(project.path(), &before);
        assert_eq!(entries(project.path()), names, "{from}");
    }
    // One file of no bytes would hold nothing.
    let none = export(&project, &dir, Path::new("out"), &["--shard-bytes", "0"]);
    none.assert_code(2);
}

/// CKPT-4: damaged weights are in no export.
#[test]
fn damaged_weights_are_not_exported() {
    let project = Project::tiny();
    let run = trained(&project);
    let shards = files_with_ending(&run.dir().join("store"), ".safetensors");
    damage(shards.last().expect("a shard of the newest checkpoint"));
    let names = entries(project.path());
    let halted = export(&project, &text(run.dir()), Path::new("out"), &[]);
    assert_halted(&halted, &["shards/", "do not have the recorded hash"]);
    assert_eq!(entries(project.path()), names, "nothing is left");
    exported(&project, &format!("{}@20", run.dir().display()), "out", &[]);
}

/// A disk that is full in the middle halts, as everywhere, and nothing stays. A limit on file sizes stands in for it.
#[test]
fn a_full_disk_halts_an_export() {
    let project = Project::tiny();
    let run = trained(&project);
    let names = entries(project.path());
    let output = with_small_files(
        &project,
        64,
        &["export", &text(run.dir()), "--to", "out", "--dtype", "f32"],
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(
        said.contains("tarazed: halted: ") && said.contains("model.safetensors: cannot be written"),
        "{said}"
    );
    assert_eq!(entries(project.path()), names, "nothing is left");
}
