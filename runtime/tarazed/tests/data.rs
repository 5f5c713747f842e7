//! `tarazed data …` and `tarazed tokenizer …` as a person meets them: from raw text to a run, with exit codes and messages.

use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};

fn tarazed(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tarazed"));
    command
        .args(args)
        .current_dir(folder)
        .output()
        .expect("the program runs")
}

#[track_caller]
fn done(folder: &Path, args: &[&str]) -> String {
    let output = tarazed(folder, args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {errors}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[track_caller]
fn refused(folder: &Path, args: &[&str], part: &str) {
    let output = tarazed(folder, args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {errors}");
    let last = errors.lines().last().unwrap_or_default();
    assert!(
        last.starts_with("tarazed: refused: ") && last.contains(part),
        "{args:?}: {errors}"
    );
}

const QUESTION: &str = "A merchant buys thirty apples for sixty pence and sells each of them for three pence. How much does he gain in all?";

/// A number for each pair, as if drawn.
fn draw(i: usize, salt: usize) -> usize {
    let mut z = (i as u64 * 1_000_003 + salt as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (z >> 33) as usize
}

fn text(i: usize) -> String {
    let nouns = [
        "farmer", "garden", "harbour", "island", "journey", "kitchen", "letter", "mountain", "ocean", "painter",
        "river", "soldier", "teacher", "village", "winter",
    ];
    let verbs = [
        "admires",
        "builds",
        "carries",
        "describes",
        "enjoys",
        "follows",
        "gathers",
        "hears",
        "keeps",
        "notices",
        "paints",
    ];
    let pick = |list: &[&'static str], salt: usize| list[draw(i, salt) % list.len()];
    (0..9)
        .map(|j| {
            format!(
                "The {} of the {} {} a {} and {} that {} with the {}. ",
                pick(&nouns, j * 8),
                pick(&nouns, j * 8 + 1),
                pick(&verbs, j * 8 + 2),
                pick(&nouns, j * 8 + 3),
                pick(&verbs, j * 8 + 4),
                pick(&nouns, j * 8 + 5),
                pick(&nouns, j * 8 + 6)
            )
        })
        .collect()
}

/// A project with one domain in which a benchmark's question was planted, and a config for three steps on it.
fn project() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| folder.path().join(name);
    let line = |text: &str| json!({ "text": text }).to_string() + "\n";
    let mut lines: String = (0..120).map(|i| line(&text(i))).collect();
    lines.push_str(&line(&format!(
        "{} {}",
        text(500),
        QUESTION.replace(", ", " - ").to_uppercase()
    )));
    std::fs::write(at("web.jsonl"), lines).expect("written");
    std::fs::write(at("test.jsonl"), json!({ "question": QUESTION }).to_string()).expect("written");
    let data = "[data]\nheld_out_fraction = 0.1\n\
        [data.tokenizer]\nvocabulary = 300\n\
        [[data.domains]]\nname = \"web\"\npath = \"web.jsonl\"\nlanguage = \"en\"\nweight = 1.0\n\
        [data.refine.quality]\noff = [\"gopher_repeated_groups\", \"gopher_top_group\"]\n\
        [[data.refine.decontaminate.sets]]\nname = \"test\"\npath = \"test.jsonl\"\n";
    std::fs::write(at("data.toml"), data).expect("written");
    let run = "[run]\nname = \"tiny\"\nseed = 7\nsteps = 3\n\
        [model]\nlayers = 1\nhidden = 16\nffn = 16\nheads = 2\nkv_heads = 1\ncontext = 16\nvocabulary = 300\ninit_std = 0.02\n\
        [batch]\nlanes = 2\nsequences_per_lane = 1\nmicro_batch_sequences = 1\n\
        [optimizer]\nlearning_rate = 1e-3\nschedule = { kind = \"constant\", warmup_steps = 2 }\nblock_elements = 1024\n\
        [cluster]\nranks = 1\n\
        [data]\nheld_out_fraction = 0.1\nprepared = \"ready\"\n\
        [[data.domains]]\nname = \"web\"\nlanguage = \"en\"\nweight = 1.0\n";
    std::fs::write(at("run.toml"), run).expect("written");
    folder
}

/// From raw text to a trained step: prepared once, found again, looked into, trained on and gone on with.
#[test]
fn raw_text_becomes_a_run() {
    let project = project();
    let here = project.path();
    let first = done(here, &["data", "prepare", "data.toml", "--out", "ready"]);
    assert!(first.contains("contaminated 1") && first.contains("web"), "{first}");
    let again = done(here, &["data", "prepare", "data.toml", "--out", "ready", "--json"]);
    let last: Value = serde_json::from_str(again.lines().last().expect("a line")).expect("JSON");
    let manifest: Value =
        serde_json::from_str(&done(here, &["data", "inspect", "ready", "--json", "--check"])).expect("JSON");
    assert_eq!(last["version"], manifest["version"]);
    assert_eq!(manifest["domains"][0]["dropped"]["contaminated"], 1);
    // DATA-3: a token leads to its line, version and filters.
    let origin: Value = serde_json::from_str(&done(
        here,
        &[
            "data", "inspect", "ready", "--domain", "web", "--token", "700", "--json",
        ],
    ))
    .expect("JSON");
    assert_eq!(origin["source"], "web.jsonl");
    assert_eq!(origin["data_version"], manifest["version"]);
    let record = origin["document"]["record"].as_u64().expect("a number");
    let lines = std::fs::read_to_string(here.join("web.jsonl")).expect("the source");
    let source: Value = serde_json::from_str(lines.lines().nth(record as usize - 1).expect("the line")).expect("JSON");
    let around = origin["text"].as_str().expect("a text");
    assert!(
        source["text"].as_str().expect("a text").contains(around.trim()),
        "{around}"
    );
    let text = done(
        here,
        &[
            "data",
            "inspect",
            "ready",
            "--domain",
            "web",
            "--token",
            "0",
            "--held-out",
        ],
    );
    assert!(
        text.contains("held-out split of 'web'") && text.contains("web.jsonl, record"),
        "{text}"
    );
    // A run on it, and one that goes on.
    done(
        here,
        &["train", "run.toml", "--ranks", "1", "--run-dir", "out", "--steps", "2"],
    );
    done(
        here,
        &["train", "run.toml", "--ranks", "1", "--run-dir", "out", "--resume"],
    );
    let trace = std::fs::read_to_string(here.join("out/trace.jsonl")).expect("a trace");
    assert_eq!(trace.lines().count(), 3);
    // Megatron's files hold as many tokens as the split.
    let export = done(here, &["data", "export", "ready", "--domain", "web", "--to", "web"]);
    let tokens = manifest["domains"][0]["train"]["tokens"].as_u64().expect("a number");
    assert!(export.contains(&format!("{tokens} tokens")), "{export}");
    assert_eq!(
        std::fs::metadata(here.join("web.bin")).expect("tokens").len(),
        2 * tokens
    );
}

/// What Megatron reads is read back as it is: the same documents give the same tokens.
#[test]
fn exported_tokens_are_a_domain() {
    let project = project();
    let here = project.path();
    done(here, &["data", "prepare", "data.toml", "--out", "ready"]);
    done(here, &["data", "export", "ready", "--domain", "web", "--to", "web"]);
    let tokenizer = std::fs::read_dir(here.join("ready"))
        .expect("a folder")
        .flatten()
        .next()
        .expect("a data set")
        .path();
    std::fs::copy(tokenizer.join("tokenizer.json"), here.join("tokenizer.json")).expect("copied");
    let config = "[data]\nheld_out_fraction = 0\n[data.tokenizer]\npath = \"tokenizer.json\"\n\
        [[data.domains]]\nname = \"web\"\npath = \"web.bin\"\nformat = \"megatron\"\nlanguage = \"en\"\nweight = 1.0\n";
    std::fs::write(here.join("tokens.toml"), config).expect("written");
    done(here, &["data", "prepare", "tokens.toml", "--out", "again"]);
    // Settings that would do nothing are refused: nobody takes these tokens for free of a benchmark's text.
    let set = "[[data.refine.decontaminate.sets]]\nname = \"test\"\npath = \"test.jsonl\"\n";
    std::fs::write(here.join("refined.toml"), config.to_owned() + set).expect("written");
    refused(
        here,
        &["data", "prepare", "refined.toml", "--out", "refined"],
        "data.refine: every domain holds tokens",
    );
    let text = "[[data.domains]]\nname = \"more\"\npath = \"web.jsonl\"\nlanguage = \"en\"\nweight = 1.0\n";
    std::fs::write(here.join("mixed.toml"), config.to_owned() + text).expect("written");
    refused(
        here,
        &["data", "prepare", "mixed.toml", "--out", "refined"],
        "web.bin: holds tokens, and no text to refine or to search; give its domain text",
    );
    assert!(!here.join("refined").exists());
    let of = |folder: &str| -> Value {
        serde_json::from_str(&done(here, &["data", "inspect", folder, "--json"])).expect("JSON")
    };
    let (first, second) = (of("ready"), of("again"));
    for key in ["tokens", "documents", "text_bytes"] {
        assert_eq!(
            second["domains"][0]["train"][key], first["domains"][0]["train"][key],
            "{key}"
        );
    }
    // The payload's hash is in the shard's header, whose hash stands in data.json.
    assert_eq!(
        second["domains"][0]["train"]["shards"][0]["blake3"],
        first["domains"][0]["train"]["shards"][0]["blake3"]
    );
}

#[test]
fn benchmark_text_is_found_in_any_file() {
    let project = project();
    let here = project.path();
    let told = done(
        here,
        &[
            "data",
            "decontaminate",
            "web.jsonl",
            "--against",
            "test=test.jsonl",
            "--out",
            "clean.jsonl",
        ],
    );
    assert!(
        told.contains("web.jsonl:121: test line 1") && told.contains("121 documents, 1 with benchmark text"),
        "{told}"
    );
    let clean = std::fs::read_to_string(here.join("clean.jsonl")).expect("a file");
    assert_eq!(clean.lines().count(), 120);
    let told = done(
        here,
        &[
            "data",
            "decontaminate",
            "clean.jsonl",
            "--against",
            "test=test.jsonl",
            "--json",
        ],
    );
    let told: Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!(
        (told["documents"].as_u64(), told["found"].as_array().map(Vec::len)),
        (Some(120), Some(0))
    );
    refused(
        here,
        &["data", "decontaminate", "web.jsonl", "--against", "test.jsonl"],
        "is no NAME=FILE",
    );
    refused(
        here,
        &[
            "data",
            "decontaminate",
            "web.jsonl",
            "--against",
            "test=test.jsonl",
            "--text-field",
            "txt",
            "--out",
            "none.jsonl",
        ],
        "web.jsonl:1: no line of the file has a string in the field 'txt'",
    );
    let left = ["none.jsonl", "none.jsonl.partial"];
    assert!(left.iter().all(|name| !here.join(name).exists()));
    refused(
        here,
        &["data", "decontaminate", "web.jsonl", "--against", "a=none.jsonl"],
        "none.jsonl: cannot be read",
    );
}

#[test]
fn text_can_be_refined_without_tokens() {
    let project = project();
    let here = project.path();
    let told = done(here, &["data", "refine", "data.toml", "--out", "text"]);
    assert!(
        told.contains("web: 1") && told.contains("of 121 documents kept"),
        "{told}"
    );
    let lines = std::fs::read_to_string(here.join("text/000-web.jsonl")).expect("a file");
    assert!(lines.lines().count() >= 100 && !lines.contains("APPLES"), "{told}");
    assert!(here.join("text/report.md").is_file() && !here.join("text.work").exists());
}

#[test]
fn a_tokenizer_is_trained_from_files() {
    let project = project();
    let here = project.path();
    let told = done(
        here,
        &[
            "tokenizer",
            "train",
            "web.jsonl",
            "--vocabulary",
            "400",
            "--out",
            "t.json",
        ],
    );
    assert!(told.starts_with("t.json: 400 entries"), "{told}");
    assert!(here.join("t.json").is_file() && !here.join("t.json.partial").exists());
    refused(
        here,
        &[
            "tokenizer",
            "train",
            "web.jsonl",
            "--vocabulary",
            "400",
            "--out",
            "t.json",
        ],
        "t.json: is there already",
    );
    refused(
        here,
        &[
            "tokenizer",
            "train",
            "web.jsonl",
            "--vocabulary",
            "9",
            "--out",
            "u.json",
        ],
        "too few",
    );
}

#[test]
fn what_is_wrong_is_said_once_and_nothing_is_left() {
    let project = project();
    let here = project.path();
    refused(
        here,
        &["data", "prepare", "none.toml", "--out", "d"],
        "none.toml: cannot be read",
    );
    refused(
        here,
        &["data", "prepare", "run.toml", "--out", "d"],
        "data.prepared: names data that are prepared already",
    );
    refused(
        here,
        &[
            "data",
            "prepare",
            "data.toml",
            "--out",
            "d",
            "--set",
            "data.refine.quality.off=[\"x\"]",
        ],
        "'x' is no quality rule",
    );
    refused(here, &["data", "inspect", "."], "holds no data.json");
    refused(
        here,
        &["train", "run.toml", "--ranks", "1", "--run-dir", "out"],
        "ready: cannot be read",
    );
    assert!(!here.join("out").exists() && !here.join("d/data.json").exists());
    done(here, &["data", "prepare", "data.toml", "--out", "ready"]);
    refused(
        here,
        &["data", "inspect", "ready", "--domain", "wbe"],
        "name one of: web",
    );
    refused(
        here,
        &["data", "inspect", "ready", "--domain", "web", "--token", "99999999"],
        "--token: is 99999999",
    );
    let other = std::fs::read_to_string(here.join("run.toml"))
        .expect("a config")
        .replace("name = \"web\"", "name = \"wiki\"");
    std::fs::write(here.join("other.toml"), other).expect("written");
    refused(
        here,
        &["train", "other.toml", "--ranks", "1", "--run-dir", "out"],
        "holds the domains web (en)",
    );
    assert!(!here.join("out").exists());
}
