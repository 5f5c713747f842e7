//! The house rules that a machine can check: floors, folders, sizes, invariants cited by tests, no stubs, no arithmetic of
//! the host's, no handler that waits for a disk.
//!
//! Each rule is a function from plain data to a list of complaints. It runs on the project, where it must find nothing, and
//! on a made-up violation, where it must find something: a check that cannot fail is no check.

mod floors;
mod folders;
mod handlers;
mod invariants;
mod numbers;
mod promises;
mod source;
mod stubs;

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    root.canonicalize().expect("the project's root folder")
}

#[track_caller]
fn assert_tidy(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}
