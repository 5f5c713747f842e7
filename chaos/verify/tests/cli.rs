//! The program as a scheduler sees it: exit codes, and what goes where.

use std::process::{Command, Output};

fn run(args: &[&str]) -> Output {
    let program = Command::new(env!("CARGO_BIN_EXE_tarazed-verify")).args(args).output();
    program.expect("the program runs")
}

#[test]
fn what_cannot_be_judged_is_code_2_with_a_reason() {
    let empty = tempfile::tempdir().unwrap();
    let folder = empty.path().to_str().unwrap();
    for (args, part) in [
        (vec!["bucket", folder], "no record under commits/"),
        (vec!["bucket", "/nonexistent/store"], "/nonexistent/store"),
        (vec!["bucket", "ftp://host/x"], "no store speaks ftp://"),
        (vec!["bucket", "s3://"], "s3://"),
        (vec!["trace", folder], "config.toml"),
        (vec!["trace"], "Usage"),
        (vec!["trace", folder, folder, folder], "no more were expected"),
    ] {
        let output = run(&args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains(part), "{args:?}: {said}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

/// A store that holds a fence and nothing else has no checkpoint that could be bad.
#[test]
fn a_claimed_store_without_a_checkpoint_is_well() {
    let store = tempfile::tempdir().unwrap();
    let zeros = "0".repeat(64);
    let writer = "1".repeat(32);
    let line = format!(
        r#"{{"magic":"tarazed-chain","schema":1,"sequence":0,"previous":"{zeros}","writer":"{writer}","generation":1,"kind":{{"fence":{{}}}}}}"#
    );
    let record = format!("{line}\n{{\"blake3\":\"{}\"}}\n", blake3::hash(line.as_bytes()));
    std::fs::create_dir(store.path().join("commits")).unwrap();
    std::fs::write(store.path().join("commits/00000000000000000000.jsonl"), record).unwrap();
    std::fs::write(store.path().join("stray"), "x").unwrap();
    let output = run(&["bucket", store.path().to_str().unwrap(), "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{report}");
    assert_eq!(
        (&report["fences"], &report["acknowledged"], &report["orphans"][0]),
        (&1.into(), &0.into(), &"stray".into())
    );
}
