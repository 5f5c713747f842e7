//! Exit codes and messages of the program as a scheduler and a person meet them (DESIGN.md section 11).

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
    for command in ["train", "status", "plan", "checkpoint", "trace"] {
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
