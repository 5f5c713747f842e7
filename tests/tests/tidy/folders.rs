//! What lies in the root folder, and how long files may be.

use super::source::{SourceFile, files};
use super::{assert_tidy, root};
use std::collections::BTreeSet;

/// Entries of the root folder that must be there.
const ROOT_REQUIRED: [&str; 17] = [
    ".ci",
    ".gitignore",
    "ARCHITECTURE.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "actors",
    "chaos",
    "clippy.toml",
    "configs",
    "deny.toml",
    "docs",
    "kernels",
    "runtime",
    "rustfmt.toml",
    "tests",
];
/// Entries that may be there: what git ignores, git itself, and what is to come.
const ROOT_ALLOWED: [&str; 5] = [".git", ".gitattributes", "deploy", "runs", "target"];

/// Lines of one source file.
const FILE_LINES_MAX: usize = 800;

fn root_complaints(entries: &BTreeSet<String>) -> Vec<String> {
    let missing = ROOT_REQUIRED.iter().filter(|name| !entries.contains(**name));
    let extra = entries.iter().filter(|name| {
        let known = ROOT_REQUIRED.contains(&name.as_str()) || ROOT_ALLOWED.contains(&name.as_str());
        let hidden_file = name.starts_with('.') && root().join(name).is_file();
        !known && !hidden_file
    });
    missing
        .map(|name| format!("{name} is missing from the root folder"))
        .chain(extra.map(|name| format!("{name} does not belong into the root folder (DESIGN.md section 12)")))
        .collect()
}

fn root_entries() -> BTreeSet<String> {
    let entries = std::fs::read_dir(root()).expect("a readable root folder");
    entries
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect()
}

#[test]
fn the_root_folder_holds_what_the_design_says() {
    assert_tidy(&root_complaints(&root_entries()));
}

#[test]
fn a_missing_or_strange_folder_is_found() {
    let mut entries = root_entries();
    entries.remove("kernels");
    entries.insert("utils".to_owned());
    let complaints = root_complaints(&entries).join("\n");
    assert!(
        complaints.contains("kernels is missing") && complaints.contains("utils does not belong"),
        "{complaints}"
    );
}

fn length_complaints(files: &[SourceFile]) -> Vec<String> {
    let long = files.iter().filter(|file| file.text.lines().count() > FILE_LINES_MAX);
    long.map(|file| {
        format!(
            "{} has more than {FILE_LINES_MAX} lines: split it by what its parts are about",
            file.path
        )
    })
    .collect()
}

#[test]
fn files_stay_short() {
    assert_tidy(&length_complaints(&files(&[".rs", ".py", ".cu", ".cuh", ".sh", "run"])));
    assert_eq!(
        length_complaints(&[SourceFile::made_up("long.rs", &"\n".repeat(FILE_LINES_MAX + 1))]).len(),
        1
    );
}
