//! The `tarazed` program under test: the one beside the running test, built first where it is missing or old.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

/// A test of the program's own package: building it builds the program, and with all of the workspace's tests selected
/// it is the very build of `cargo test --workspace`.
const PROGRAM_TEST: &str = "cli";

/// Names another program to test, e.g. an installed one.
const PROGRAM_VARIABLE: &str = "TARAZED_TEST_PROGRAM";

/// Path of the program. `cargo test --workspace` has built it; a run of one package's tests builds it here, once.
///
/// # Panics
/// If it cannot be built.
#[must_use]
pub fn tarazed() -> &'static Path {
    static PROGRAM: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    match PROGRAM.get_or_init(find) {
        Ok(program) => program,
        Err(cause) => panic!("{cause}"),
    }
}

fn find() -> Result<PathBuf, String> {
    if let Some(named) = std::env::var_os(PROGRAM_VARIABLE) {
        return std::fs::canonicalize(&named).map_err(|e| format!("{PROGRAM_VARIABLE}: {}: {e}", named.display()));
    }
    let profile_dir = profile_dir();
    let program = profile_dir.join("tarazed");
    if !is_current(&program) {
        build(&profile_dir)?;
    }
    if program.is_file() {
        Ok(program)
    } else {
        Err(format!("{} was not built", program.display()))
    }
}

/// The folder of the running test's profile, e.g. `target/release`: tests lie in its `deps`, other programs in it.
fn profile_dir() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let dir = test.parent().expect("a test lies in a folder");
    if dir.ends_with("deps") {
        dir.parent().expect("deps lies in a profile's folder").to_owned()
    } else {
        dir.to_owned()
    }
}

/// Whether the program is newer than every source of the crates it is made of.
fn is_current(program: &Path) -> bool {
    let Some(built) = modified(program) else { return false };
    let mut folders: Vec<PathBuf> = ["actors", "kernels", "runtime"].map(|name| root().join(name)).to_vec();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a readable folder").flatten() {
            let path = entry.path();
            let is_test = path
                .file_name()
                .is_some_and(|name| name == "tests" || name == "tests.rs");
            if is_test {
                continue;
            } else if path.is_dir() {
                folders.push(path);
            } else if modified(&path).is_none_or(|changed| changed > built) {
                return false;
            }
        }
    }
    true
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|found| found.modified()).ok()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn build(profile_dir: &Path) -> Result<(), String> {
    let target_dir = profile_dir
        .parent()
        .ok_or("a profile's folder lies in the target folder")?;
    let profile = match profile_dir.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(name) => name,
    };
    let output = Command::new(env!("CARGO"))
        .args(["test", "--quiet", "--workspace", "--no-run", "--test", PROGRAM_TEST])
        .args(["--profile", profile])
        .arg("--target-dir")
        .arg(target_dir)
        .current_dir(root())
        .output()
        .map_err(|e| format!("cargo: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("tarazed cannot be built:\n{said}"))
}
