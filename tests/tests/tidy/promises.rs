//! What the README promises, and what no file may promise: a registry's address.

use super::source::{SourceFile, files};
use super::{assert_tidy, root};
use std::collections::BTreeSet;
use tarazed_domain::config::Config;

/// Dotted keys of a config; a list of tables counts once.
fn keys(prefix: &str, value: &toml::Value, found: &mut BTreeSet<String>) {
    match value {
        toml::Value::Table(table) => {
            for (name, inner) in table {
                let key = if prefix.is_empty() {
                    name.clone()
                } else {
                    format!("{prefix}.{name}")
                };
                keys(&key, inner, found);
            }
        }
        toml::Value::Array(list) if list.iter().all(toml::Value::is_table) => {
            list.iter().for_each(|inner| keys(prefix, inner, found));
        }
        _ => {
            found.insert(prefix.to_owned());
        }
    }
}

#[test]
fn the_readme_explains_every_config_key() {
    let config = Config::load(&root().join("configs/aquila2-7b.toml"), &[]).expect("a good config");
    let resolved: toml::Value = toml::from_str(&config.to_toml().expect("TOML")).expect("TOML");
    let mut found = BTreeSet::new();
    keys("", &resolved, &mut found);
    assert!(found.len() > 40, "{found:?}");
    let readme = std::fs::read_to_string(root().join("README.md")).expect("README.md");
    let unexplained: Vec<String> = found
        .iter()
        .filter(|key| !readme.contains(&format!("| `{key}` |")))
        .map(|key| format!("README.md does not explain the config key {key}"))
        .collect();
    assert_tidy(&unexplained);
}

#[test]
fn the_readme_begins_with_the_commands_that_ci_runs() {
    let readme = std::fs::read_to_string(root().join("README.md")).expect("README.md");
    let ci = std::fs::read_to_string(root().join(".ci/run")).expect(".ci/run");
    let commands: Vec<&str> = readme
        .lines()
        .filter(|line| line.starts_with("cargo "))
        .take(2)
        .collect();
    assert_eq!(
        commands,
        [
            "cargo run --release -- train configs/quickstart.toml",
            "cargo test --release --workspace"
        ]
    );
    assert!(
        ci.lines().any(|line| line.trim() == commands[1]),
        ".ci/run runs the README's test command"
    );
}

/// Host names of package registries: builds take whatever source the user's tools are set to.
fn registry_hosts() -> Vec<String> {
    let hosts = [
        ["index.", "crates.io"],
        ["static.", "crates.io"],
        ["pypi", ".org"],
        ["pythonhosted", ".org"],
        ["deb.", "debian.org"],
        ["registry.", "npmjs.org"],
        ["proxy.", "golang.org"],
    ];
    hosts.iter().map(|parts| parts.concat()).collect()
}

fn host_complaints(files: &[SourceFile], lock: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files {
        for host in registry_hosts().iter().filter(|host| file.text.contains(host.as_str())) {
            complaints.push(format!("{} names the registry host {host}", file.path));
        }
    }
    let official = format!(
        "source = \"registry+https://github.com/rust-lang/{}\"",
        "crates.io-index"
    );
    for (index, line) in lock.lines().enumerate() {
        if line.starts_with("source = ") && line != official {
            complaints.push(format!("Cargo.lock:{}: {line} is not the official registry", index + 1));
        }
    }
    complaints
}

#[test]
fn no_registry_host_is_named() {
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).expect("Cargo.lock");
    assert!(
        lock.lines().any(|line| line.starts_with("source = ")),
        "the lock file names sources"
    );
    let ends = [".rs", ".toml", ".md", ".py", ".sh", ".json", "run"];
    assert_tidy(&host_complaints(&files(&ends), &lock));
    let made_up = SourceFile::made_up("a.md", &format!("see https://{}/x", registry_hosts()[2]));
    assert_eq!(
        host_complaints(&[made_up], "source = \"registry+https://elsewhere\"\n").len(),
        2
    );
}
