//! `tarazed data …` and `tarazed tokenizer …` as a person meets them: from raw text to a run, with exit codes and messages.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

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
    let shown = done(here, &["data", "inspect", "ready"]);
    let version = manifest["domains"][0]["version"].as_str().expect("a version");
    assert!(shown.contains(&version[..12]), "{shown}");
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
    let dropped = std::fs::read_to_string(here.join("clean.jsonl.dropped.jsonl")).expect("an index");
    let dropped: Vec<Value> = dropped
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(dropped.len(), 1);
    assert_eq!(
        (&dropped[0]["record"], &dropped[0]["dropped"], &dropped[0]["item"]),
        (&json!(121), &json!("contaminated"), &json!({"set": "test", "line": 1}))
    );
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
    // Every document is in one of both files, and what is not kept says why.
    let dropped = std::fs::read_to_string(here.join("text/000-web.dropped.jsonl")).expect("an index");
    assert_eq!(lines.lines().count() + dropped.lines().count(), 121);
    let last: Value = serde_json::from_str(dropped.lines().last().expect("a line")).expect("JSON");
    assert_eq!(
        (&last["domain"], &last["source"], &last["record"], &last["dropped"]),
        (&json!("web"), &json!("web.jsonl"), &json!(121), &json!("contaminated"))
    );
    assert_eq!(last["item"], json!({"set": "test", "line": 1}));
    let original = std::fs::read_to_string(here.join("web.jsonl")).expect("the source");
    let original: Value = serde_json::from_str(original.lines().nth(120).expect("a line")).expect("JSON");
    assert_eq!(
        last["text_bytes"].as_u64(),
        original["text"].as_str().map(|text| text.len() as u64)
    );
    assert!(here.join("text/report.md").is_file() && !here.join("text.work").exists());
}

/// Domains that come last, with very long names: what is said of them does not fit into a pipe that nobody reads (64 KiB), so a
/// process that is to be killed at a line before them cannot have come to its end by then, however slow whoever kills it is.
const LAST_DOMAINS: usize = 30;

/// A project whose preparation has many stages: two domains that are cut into several pieces, and the last ones.
fn long_project() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| folder.path().join(name);
    let line = |text: &str| json!({ "text": text }).to_string() + "\n";
    let mut config = "[data]\nheld_out_fraction = 0\n[data.tokenizer]\nvocabulary = 300\n\
        [data.refine]\nmemory_bytes_max = 16777216\ndocument_bytes_max = 1048576\n\
        [data.refine.quality]\noff = [\"gopher_repeated_groups\", \"gopher_top_group\"]\n"
        .to_owned();
    let mut add = |name: &str, file: &str, documents: std::ops::Range<usize>| {
        let mut lines: String = documents.clone().map(|i| line(&text(i))).collect();
        lines.push_str(&line(&text(documents.start)));
        std::fs::write(at(file), lines).expect("written");
        config += "[[data.domains]]\nlanguage = \"en\"\nweight = 1.0\n";
        config += &format!("name = \"{name}\"\npath = \"{file}\"\n");
    };
    add("web", "web.jsonl", 0..2_500);
    add("book", "book.jsonl", 5_000..6_500);
    for i in 0..LAST_DOMAINS {
        let name = format!("last-{i}-{}", "x".repeat(4_000));
        add(&name, &format!("last-{i}.jsonl"), 10_000 + i * 10..10_004 + i * 10);
    }
    std::fs::write(at("data.toml"), config).expect("written");
    folder
}

/// Starts `data prepare`, and sends SIGKILL when it says what `is_stage` looks for. Says whether it came to that; if not, it has
/// come to its end and must have done well.
fn killed_at(folder: &Path, out: &str, is_stage: &dyn Fn(&Value) -> bool) -> bool {
    let mut child = Command::new(env!("CARGO_BIN_EXE_tarazed"))
        .args(["data", "prepare", "data.toml", "--out", out, "--json"])
        .current_dir(folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("the program runs");
    let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    for line in lines {
        let event: Value = serde_json::from_str(&line.expect("a line")).expect("JSON");
        if is_stage(&event) {
            child.kill().expect("a signal is sent");
            let status = child.wait().expect("an exit");
            assert_eq!(status.signal(), Some(9), "at {event}: it was still at work");
            return true;
        }
    }
    assert!(child.wait().expect("an exit").success());
    false
}

/// Every file below a folder, by its path in it.
fn tree(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let name = entry.file_name().into_string().expect("UTF-8");
        if entry.path().is_dir() {
            found.extend(
                tree(&entry.path())
                    .into_iter()
                    .map(|(rest, bytes)| (format!("{name}/{rest}"), bytes)),
            );
        } else {
            found.insert(name, std::fs::read(entry.path()).expect("a file"));
        }
    }
    found
}

/// DET-1: killed at any stage and started again, `data prepare` gives the bytes of an undisturbed run, and leaves nothing else.
#[test]
fn a_preparation_that_is_killed_comes_to_the_same_bytes() {
    let project = long_project();
    let here = project.path();
    done(here, &["data", "prepare", "data.toml", "--out", "quiet"]);
    let quiet = tree(&here.join("quiet"));
    assert!(quiet.keys().any(|name| name.ends_with("/data.json")), "{quiet:?}");
    let is = |event: &Value, kind: &str| event["event"] == kind;
    let domain = |event: &Value, name: &str| is(event, "domain_finished") && event["name"] == name;
    // By what it says when it comes to each: behind it, it is at the next.
    type IsStage<'a> = &'a dyn Fn(&Value) -> bool;
    let stages: [(&str, IsStage<'_>); 8] = [
        ("sources are hashed", &|event| is(event, "hashed")),
        ("a piece is judged", &|event| is(event, "refining")),
        ("a later piece is judged", &|event| {
            is(event, "refining") && event["documents"].as_u64() > Some(2_000)
        }),
        ("copies are found", &|event| {
            is(event, "refining") && event["stage"] == "comparing"
        }),
        ("the tokenizer is trained", &|event| is(event, "tokenizer_training")),
        ("the tokenizer is there", &|event| is(event, "tokenizer_ready")),
        ("a domain is written", &|event| domain(event, "web")),
        ("another domain is written", &|event| domain(event, "book")),
    ];
    let same = |out: &str| {
        let found = tree(&here.join(out));
        assert_eq!(
            found.keys().collect::<Vec<_>>(),
            quiet.keys().collect::<Vec<_>>(),
            "{out}"
        );
        let other: Vec<_> = quiet.iter().filter(|(name, bytes)| found[*name] != **bytes).collect();
        assert!(
            other.is_empty(),
            "{out}: {:?}",
            other.iter().map(|(name, _)| name).collect::<Vec<_>>()
        );
    };
    // All of them one after another, in one folder.
    for (name, is_stage) in stages {
        assert!(killed_at(here, "often", is_stage), "{name}");
    }
    done(here, &["data", "prepare", "data.toml", "--out", "often"]);
    same("often");
    // Each by itself.
    for (i, (name, is_stage)) in stages.iter().enumerate().step_by(3) {
        let out = format!("once-{i}");
        assert!(killed_at(here, &out, is_stage), "{name}");
        done(here, &["data", "prepare", "data.toml", "--out", &out]);
        same(&out);
    }
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
