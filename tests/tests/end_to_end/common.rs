//! What several of the modules need.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tarazed_tests::harness::{Project, tarazed};
pub use tarazed_tests::harness::{assert_halted, assert_prefix, assert_refused, assert_undisturbed, wait_for_no_ranks};

/// Every file below a folder, by its path in there; one that a live run removes meanwhile is none.
pub fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).into_iter().flatten().flatten() {
            let path = entry.path();
            let kind = entry.file_type().expect("a file type");
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() {
                let name = path.strip_prefix(folder).expect("below it").to_owned();
                match std::fs::read(&path) {
                    Ok(bytes) => _ = found.insert(name, bytes),
                    Err(gone) if gone.kind() == std::io::ErrorKind::NotFound => {}
                    Err(cause) => panic!("{} should be readable: {cause}", path.display()),
                }
            }
        }
    }
    found
}

/// What the program says where no file can grow beyond so many blocks of 512 bytes: a disk that is full in the middle.
pub fn with_small_files(project: &Project, blocks: u64, args: &[&str]) -> Output {
    Command::new("sh")
        .args([
            "-c",
            "trap '' XFSZ && ulimit -S -f \"$0\" && exec \"$@\"",
            &blocks.to_string(),
        ])
        .arg(tarazed())
        .args(args)
        .current_dir(project.path())
        .output()
        .expect("the program runs")
}

/// Fails unless a folder holds what it held before: same names, same bytes.
#[track_caller]
pub fn assert_untouched(folder: &Path, before: &BTreeMap<PathBuf, Vec<u8>>) {
    let after = files(folder);
    let changed: Vec<&PathBuf> = before
        .iter()
        .filter(|(name, bytes)| after.get(*name) != Some(*bytes))
        .map(|(name, _)| name)
        .chain(after.keys().filter(|name| !before.contains_key(*name)))
        .collect();
    assert!(changed.is_empty(), "changed in {}: {changed:?}", folder.display());
}

/// Puts another file into this one's place, with bytes in its middle turned around. Who has it open keeps the good one.
pub fn damage(file: &Path) {
    let mut bytes = std::fs::read(file).expect("a readable file");
    let middle = bytes.len() / 2;
    for byte in &mut bytes[middle..middle + 4] {
        *byte = !*byte;
    }
    let other = file.with_extension("damaged");
    std::fs::write(&other, bytes).expect("a writable folder");
    std::fs::rename(&other, file).expect("a file to replace");
}

/// Cuts a file in half.
pub fn truncate(file: &Path) {
    let file = std::fs::OpenOptions::new().write(true).open(file).expect("a file");
    let length = file.metadata().expect("a file").len();
    file.set_len(length / 2).expect("a shorter file");
}

/// The files below a folder with this ending, in order of their names.
pub fn files_with_ending(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let names = files(folder).into_keys();
    names
        .filter(|name| name.to_string_lossy().ends_with(ending))
        .map(|name| folder.join(name))
        .collect()
}

/// A run as its trace began, without a checkpoint: all of it is computed again, and the lines that are there are checked.
pub fn begun_again(from: &Path, to: &Path, lines: usize) {
    std::fs::create_dir_all(to.join("data")).expect("a folder");
    std::fs::copy(from.join("config.toml"), to.join("config.toml")).expect("a copy");
    for entry in std::fs::read_dir(from.join("data")).expect("a folder").flatten() {
        let set = std::fs::canonicalize(entry.path()).expect("a data set");
        if set.is_dir() {
            std::os::unix::fs::symlink(set, to.join("data").join(entry.file_name())).expect("a link");
        }
    }
    let trace = std::fs::read_to_string(from.join("trace.jsonl")).expect("a trace");
    let kept: Vec<&str> = trace.lines().take(lines).collect();
    std::fs::write(to.join("trace.jsonl"), kept.join("\n") + "\n").expect("a writable folder");
}
