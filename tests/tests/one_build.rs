//! The README's two commands share one build: `cargo run` and `cargo test --workspace` resolve every package they have in
//! common with the same features.
//!
//! Cargo compiles a package once per set of features, and all that depends on it with it. One feature that only a test asks
//! for, of a package far down, and a newcomer builds most of the tree twice.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

/// Feature sets by package, as `cargo tree` prints them: `NAME VERSION|FEATURES`, a repeated one with a mark.
type Resolved = BTreeMap<String, BTreeSet<String>>;

fn read(tree: &str) -> Resolved {
    let mut found = Resolved::new();
    for line in tree.lines() {
        let line = line.trim_end_matches(" (*)");
        if let Some((package, features)) = line.split_once('|') {
            found.entry(package.to_owned()).or_default().insert(features.to_owned());
        }
    }
    found
}

/// What the first command builds in a way that the tests do not.
fn complaints(run: &Resolved, tests: &Resolved) -> Vec<String> {
    let none = BTreeSet::new();
    let mut found = Vec::new();
    for (package, sets) in run {
        let theirs = tests.get(package).unwrap_or(&none);
        for set in sets.difference(theirs) {
            found.push(format!(
                "{package}: `cargo run` builds it with [{set}], the tests with {theirs:?}"
            ));
        }
    }
    found
}

fn tree(arguments: &[&str]) -> Resolved {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .args(["tree", "--locked", "--prefix", "none", "--format", "{p}|{f}", "--edges"])
        .args(arguments)
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    read(&String::from_utf8_lossy(&output.stdout))
}

#[test]
fn the_first_command_and_the_tests_share_one_build() {
    let run = tree(&["normal,build"]);
    let tests = tree(&["normal,build,dev", "--workspace"]);
    assert!(
        run.len() > 100 && tests.len() > run.len(),
        "{} and {}",
        run.len(),
        tests.len()
    );
    let found = complaints(&run, &tests);
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}

#[test]
fn a_feature_that_only_a_test_asks_for_is_found() {
    let run = read("a v1.0.0|std\nb v1.0.0|\nb v1.0.0| (*)\nc v2.0.0 (proc-macro)|x,y\n");
    assert!(complaints(&run, &run).is_empty());
    let tests = read("a v1.0.0|default,std\nb v1.0.0|\nc v2.0.0 (proc-macro)|x,y\nd v1.0.0|\n");
    let found = complaints(&run, &tests);
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("a v1.0.0: "), "{found:?}");
}
