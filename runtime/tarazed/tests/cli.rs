//! Exit codes and messages of the program as a scheduler and a person meet them (DESIGN.md section 11).

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn tarazed(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tarazed"));
    command
        .args(args)
        .current_dir(folder)
        .output()
        .expect("the program runs")
}

fn quickstart() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/quickstart.toml").to_owned()
}

/// One line on standard error that holds `part`, nothing on standard output, and nothing written.
#[track_caller]
fn assert_refused(args: &[&str], part: &str) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = tarazed(folder.path(), args);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
    assert!(
        message.starts_with("tarazed: refused: ") && message.contains(part),
        "{args:?}: {message}"
    );
    assert!(output.stdout.is_empty(), "{args:?}");
    assert_eq!(
        std::fs::read_dir(folder.path()).expect("a folder").count(),
        0,
        "{args:?} wrote something"
    );
}

/// A tiny run of one rank, and its texts, in a folder `project`.
fn tiny(folder: &Path) {
    let project = folder.join("project");
    std::fs::create_dir_all(project.join("text")).expect("a folder");
    let word = |i: usize| ["lane", "step", "rank", "trace", "shard"][i % 5];
    let text: String = (0..400)
        .map(|i| {
            format!(
                "{{\"text\":\"The {} of {} {i} and {}.\"}}\n",
                word(i),
                word(i / 5),
                word(i / 25)
            )
        })
        .collect();
    std::fs::write(project.join("text/web.jsonl"), text).expect("written");
    let config = "[run]\nname = \"tiny\"\nseed = 7\nsteps = 3\n\
        [model]\nlayers = 1\nhidden = 16\nffn = 16\nheads = 2\nkv_heads = 1\ncontext = 16\nvocabulary = 300\ninit_std = 0.02\n\
        [batch]\nlanes = 2\nsequences_per_lane = 1\nmicro_batch_sequences = 1\n\
        [optimizer]\nlearning_rate = 1e-3\nschedule = { kind = \"constant\", warmup_steps = 2 }\nblock_elements = 1024\n\
        [data]\nheld_out_fraction = 0.1\n\
        [[data.domains]]\nname = \"web\"\npath = \"text/web.jsonl\"\nlanguage = \"en\"\nweight = 1.0\n";
    std::fs::write(project.join("tiny.toml"), config).expect("written");
}

/// The files and folders below a folder, by path.
fn names(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).expect("a folder").flatten() {
            let path = entry.path();
            found.push(path.strip_prefix(folder).expect("below it").display().to_string());
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Texts that are not there or no texts, and stores that are none: found after the run folder was opened, and yet nothing
/// stays of it, nor of a store that was made.
#[test]
fn a_new_run_that_is_refused_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    tiny(folder.path());
    let text = folder.path().join("project/text");
    std::fs::create_dir(text.join("empty")).expect("a folder");
    std::fs::write(text.join("blank.jsonl"), "{\"text\":\" \"}\n").expect("written");
    std::fs::write(text.join("latin1.txt"), b"caf\xe9").expect("written");
    let before = names(folder.path());
    let domain =
        |name: &str| format!("data.domains=[{{name=\"web\",path=\"text/{name}\",language=\"en\",weight=1.0}}]");
    for (key, code, part) in [
        (
            domain("nowhere.jsonl"),
            2,
            "nowhere.jsonl: no such file or folder (domain 'web')",
        ),
        (domain("empty"), 2, "domain 'web' holds no document"),
        (domain("blank.jsonl"), 2, "domain 'web' holds no document"),
        (domain("latin1.txt"), 2, "latin1.txt: invalid UTF-8 at byte 3"),
        (
            "checkpoint.store=ftp://host/x".to_owned(),
            2,
            "checkpoint.store: no store speaks ftp://",
        ),
        (
            "checkpoint.store=s3://me:secret@bucket/x".to_owned(),
            2,
            "credentials and endpoint into the environment",
        ),
        ("checkpoint.store=project/tiny.toml".to_owned(), 2, "project/tiny.toml"),
        (
            "telemetry.otlp_endpoint=nonsense://x".to_owned(),
            2,
            "telemetry.otlp_endpoint",
        ),
        // Nothing listens there: that may pass.
        ("checkpoint.store=s3://bucket/x".to_owned(), 33, "self-test"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_tarazed"))
            .args(["train", "project/tiny.toml", "--run-dir", "runs/new", "--set", &key])
            .current_dir(folder.path())
            .envs([
                ("AWS_ACCESS_KEY_ID", "nobody"),
                ("AWS_SECRET_ACCESS_KEY", "nothing"),
                ("AWS_REGION", "here"),
            ])
            .envs([("AWS_ENDPOINT_URL", "http://127.0.0.1:9"), ("AWS_ALLOW_HTTP", "true")])
            .output()
            .expect("the program runs");
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{key}: {message}");
        assert!(
            message.contains(part) && !message.contains("secret@"),
            "{key}: {message}"
        );
        assert_eq!(names(folder.path()), before, "{key}: {message}");
    }
}

/// The config of a run folder is as good as the one the run began with, whatever folder the commands are given in.
#[test]
fn a_run_can_be_used_from_another_folder_and_by_its_own_config() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    tiny(folder.path());
    let elsewhere = folder.path().join("else/where");
    std::fs::create_dir_all(&elsewhere).expect("a folder");
    let expect = |place: &Path, args: &[&str]| {
        let output = tarazed(place, args);
        let (out, err) = (
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        );
        assert_eq!(output.status.code(), Some(0), "{args:?}\n{out}\n{err}");
        out
    };
    let store = "checkpoint.store=checkpoints";
    let out = expect(
        folder.path(),
        &["train", "project/tiny.toml", "--steps", "2", "--set", store],
    );
    assert!(
        out.contains("run: runs/tiny begins") && out.contains("checkpoints in checkpoints"),
        "{out}"
    );
    let run = folder.path().join("runs/tiny");
    let config = run.join("config.toml").display().to_string();
    let first = std::fs::read_to_string(&config).expect("a config");
    let out = expect(&elsewhere, &["train", &config, "--resume"]);
    assert!(out.contains("goes on from step 2"), "{out}");
    assert_eq!(std::fs::read_to_string(&config).expect("a config"), first);
    let run = run.display().to_string();
    for args in [
        &["status", "--run-dir", &run][..],
        &["plan", &config],
        &["trace", "show", &run],
        &["checkpoint", "ls", &run],
        &["generate", &run, "--prompt", "The lane", "--tokens", "2"],
        &[
            "train",
            "../../project/tiny.toml",
            "--run-dir",
            "../../runs/tiny",
            "--set",
            "checkpoint.store=../../checkpoints",
        ],
    ] {
        expect(&elsewhere, args);
    }
    assert_eq!(
        names(&elsewhere),
        [""; 0],
        "a command wrote into the folder it was given in"
    );
}

/// Code 34 soon, also while data are being prepared; what is prepared appears whole or not at all.
#[test]
fn a_signal_is_heard_while_data_are_being_prepared() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    tiny(folder.path());
    let data = folder.path().join("runs/tiny/data");
    std::fs::create_dir_all(&data).expect("a folder");
    // Somebody else prepares there, for ever.
    let other = std::fs::File::open(&data).expect("the folder");
    other.lock().expect("locked");
    let mut child: Child = Command::new(env!("CARGO_BIN_EXE_tarazed"))
        .args(["train", "project/tiny.toml"])
        .current_dir(folder.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program runs");
    let waits = BufReader::new(child.stdout.take().expect("its output"))
        .lines()
        .any(|line| line.expect("text").contains("another process is preparing"));
    assert!(waits);
    let began = Instant::now();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("sent");
    let status = child.wait().expect("its end");
    let mut message = String::new();
    let mut stderr = child.stderr.take().expect("its messages");
    stderr.read_to_string(&mut message).expect("text");
    assert_eq!(status.code(), Some(34), "{message}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert!(
        message.starts_with("tarazed: stopped: by a signal before training began"),
        "{message}"
    );
    assert_eq!(names(&data), [""; 0]);
}

#[test]
fn bad_input_is_refused_with_code_2_and_nothing_is_written() {
    let config = quickstart();
    assert_refused(&["train", "no-such.toml"], "no-such.toml: cannot be read");
    assert_refused(&["train", &config, "--set", "model.colour=3"], "unknown field `colour`");
    assert_refused(
        &["train", &config, "--set", "model.heads=7"],
        "model.heads: 7 heads do not divide",
    );
    assert_refused(&["train", &config, "--ranks", "9"], "cluster.ranks: 9 ranks");
    assert_refused(
        &["train", &config, "--set", "optimizer.replicas=5"],
        "optimizer.replicas: 5 copies",
    );
    assert_refused(&["train", &config, "--resume"], "holds no run to resume");
    assert_refused(&["plan", &config, "--gpus", "8xTPU"], "--gpus: ");
    assert_refused(&["plan", &config, "--gpus", "64xH200-141GB"], "batch.lanes = 8");
    assert_refused(&["status"], "runs: holds no run folder");
    assert_refused(&["status", "--run-dir", "nowhere"], "--run-dir nowhere: holds no run");
    assert_refused(&["trace", "show", "nowhere"], "nowhere: cannot be read");
    assert_refused(&["export", "nowhere", "--to", "out"], "nowhere: not found");
    assert_refused(&["generate", "nowhere@7", "--prompt", "x"], "nowhere: not found");
    assert_refused(
        &["bench", "mixture", "no.toml", "--work", "w"],
        "no.toml: cannot be read",
    );
    assert_refused(&["bench", "mixture", &config, "--work", "w"], "unknown field");
}

/// The file does not hold what an override says, so it is not blamed for it, nor shown.
#[test]
fn a_bad_override_is_named_as_it_was_given() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = quickstart();
    for (item, key) in [
        ("model.colour=3", "model.colour: unknown field `colour`"),
        ("model.heads=abc", "model.heads: invalid type: string \"abc\""),
    ] {
        for command in ["train", "plan"] {
            let output = tarazed(folder.path(), &[command, &config, "--set", item]);
            let message = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{message}");
            let start = format!("tarazed: refused: --set {item}: {key}");
            assert!(message.starts_with(&start), "{message}");
            let blames = ["quickstart.toml", "line ", "the file"].map(|part| message.contains(part));
            assert_eq!(blames, [false; 3], "{message}");
        }
    }
}

/// A config for GPUs is planned for this machine's own where it has enough of them, else refused with a `--gpus` that is
/// answered; never planned for processors. `auto` takes those where there is no card.
#[test]
fn a_config_for_gpus_is_not_planned_for_processors() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let plan = |name: &str, more: &[&str]| {
        let config = format!("{}/../../configs/{name}.toml", env!("CARGO_MANIFEST_DIR"));
        let output = tarazed(folder.path(), &[&["plan", &config][..], more].concat());
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let mut has_card = true;
    for (name, ranks) in [
        ("gpu-124m", 1),
        ("aquila2-7b", 96),
        ("aquila2-34b", 128),
        ("aquila2-70b", 264),
    ] {
        let (code, out, message) = plan(name, &[]);
        let example = format!("{ranks}xH200-141GB");
        if code == Some(0) {
            let is_of_gpus = out.contains(&format!(", {ranks} x ")) && !out.contains("CPU ranks");
            assert!(is_of_gpus, "{name}: {out}");
            continue;
        }
        assert_eq!((code, out.as_str()), (Some(2), ""), "{name}: {message}");
        let names_both =
            message.starts_with("tarazed: refused: cluster.") && message.ends_with(&format!("e.g. --gpus {example}\n"));
        assert!(names_both, "{message}");
        has_card &= !message.contains("no CUDA device");
        let (code, out, message) = plan(name, &["--gpus", &example]);
        let is_answered = code == Some(0) && out.contains(&format!(", {ranks} x H200 with 141 GB"));
        assert!(is_answered, "{name}: {out}{message}");
    }
    if !has_card {
        let (code, out, message) = plan("quickstart", &["--set", "cluster.device=auto"]);
        assert!(code == Some(0) && out.contains("4 CPU ranks"), "{out}{message}");
        let (code, _, message) = plan("quickstart", &["--set", "cluster.device=cuda"]);
        assert!(code == Some(2) && message.contains("--gpus 4xH200-141GB"), "{message}");
    }
}

#[test]
fn usage_errors_have_code_2_too() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for args in [
        &["train"][..],
        &["train", "a", "--resume", "--fresh"],
        &["fly"],
        &["plan", "a", "--fast"],
    ] {
        assert_eq!(tarazed(folder.path(), args).status.code(), Some(2), "{args:?}");
    }
    assert_eq!(tarazed(folder.path(), &["--help"]).status.code(), Some(0));
}

#[test]
fn help_lists_what_works_and_hides_what_is_internal() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let help = String::from_utf8(tarazed(folder.path(), &["--help"]).stdout).expect("text");
    for command in ["train", "status", "plan", "checkpoint", "trace", "generate", "export"] {
        assert!(help.contains(&format!("\n  {command} ")), "{help}");
    }
    assert!(!help.contains("\n  rank"), "{help}");
}

#[test]
fn trace_diff_tells_equal_from_different_by_its_code() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).expect("written");
    write(
        "a.jsonl",
        "{\"step\":1,\"state\":\"aa\"}\n{\"step\":2,\"state\":\"bb\"}\n",
    );
    write("b.jsonl", "{\"step\":1,\"state\":\"aa\"}\n");
    write("c.jsonl", "{\"step\":1,\"state\":\"ab\"}\n");
    let code = |right| {
        tarazed(folder.path(), &["trace", "diff", "a.jsonl", right])
            .status
            .code()
    };
    assert_eq!(
        (code("b.jsonl"), code("c.jsonl"), code("d.jsonl")),
        (Some(0), Some(3), Some(2))
    );
}

#[test]
fn a_closed_pipe_is_an_ordinary_end() {
    let script = format!(
        "{} plan {} | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}",
        env!("CARGO_BIN_EXE_tarazed"),
        quickstart()
    );
    let output = Command::new("bash").args(["-c", &script]).output().expect("bash runs");
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.stderr.is_empty());
}

/// A full disk behind standard output needs a person, as everywhere.
#[test]
fn a_full_disk_behind_the_output_halts() {
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .expect("Linux has a full device");
    let output = Command::new(env!("CARGO_BIN_EXE_tarazed"))
        .args(["plan", &quickstart()])
        .stdout(full)
        .output()
        .expect("the program runs");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{message}");
    assert!(
        message.starts_with("tarazed: halted: standard output: ") && message.contains("free space"),
        "{message}"
    );
}

#[test]
fn a_plan_can_be_read_by_a_program() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = tarazed(folder.path(), &["plan", &quickstart(), "--json"]);
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let sum: u64 = plan["terms"]
        .as_array()
        .expect("terms")
        .iter()
        .filter_map(|term| term["bytes"].as_u64())
        .sum();
    assert_eq!(plan["device_bytes"].as_u64(), Some(sum));
    assert_eq!(plan["fits"], true);
}
