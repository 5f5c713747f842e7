//! What several of the modules need.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tarazed_tests::harness::{Outcome, POLL, Run, WAIT, assert_same_trace, line_count, undisturbed};

/// Fails unless the run ended with code 0 and its first `steps` lines, all it has, are the undisturbed ones.
#[track_caller]
pub fn assert_undisturbed(run: &mut Run, steps: u64, what: &str) {
    let outcome = run.finish();
    assert_eq!(outcome.code, Some(0), "{what}\n{}", run.tail());
    assert_same_trace(&run.trace(), undisturbed(steps), &format!("{what}\n{}", run.tail()));
    assert_eq!(run.processes().ranks(), [0_u32; 0], "{what}: ranks are left");
}

/// Fails unless what the run wrote so far is the beginning of the undisturbed trace; its number of lines.
#[track_caller]
pub fn assert_prefix(run: &Run) -> u64 {
    let trace = run.trace();
    let count = line_count(&trace);
    assert_same_trace(&trace, undisturbed(count), "a trace so far");
    count
}

/// Waits until no rank is left: those whose controller is gone end by themselves where no other comes for a dozen times
/// `fault.timeout_ms`.
#[track_caller]
pub fn wait_for_no_ranks(run: &mut Run) {
    let deadline = Instant::now() + WAIT;
    while !run.processes().ranks().is_empty() {
        assert!(
            Instant::now() < deadline,
            "ranks without a controller stay\n{}",
            run.tail()
        );
        std::thread::sleep(POLL);
    }
}

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

/// Fails unless the program refused: code 2, one message that begins so and holds all `parts`, and no ranks started.
#[track_caller]
pub fn assert_refused(outcome: &Outcome, parts: &[&str]) {
    outcome.assert_code(2);
    assert!(outcome.stderr.starts_with("tarazed: refused: "), "{}", outcome.tail());
    assert_eq!(
        outcome.stderr.matches("tarazed: ").count(),
        1,
        "one message\n{}",
        outcome.tail()
    );
    parts.iter().for_each(|part| outcome.assert_says(part));
    assert!(!outcome.stdout.contains("started as process"), "{}", outcome.tail());
}

/// Fails unless the program halted: code 3, and a diagnosis that holds all `parts`.
#[track_caller]
pub fn assert_halted(outcome: &Outcome, parts: &[&str]) {
    outcome.assert_code(3);
    assert!(outcome.stderr.contains("tarazed: halted: "), "{}", outcome.tail());
    parts.iter().for_each(|part| outcome.assert_says(part));
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
