//! The programs under test: those beside the running test, built first where they are missing or old.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

/// A test of each program's own package: building them builds the programs, and with all of the workspace's tests
/// selected they are the very build of `cargo test --workspace`.
const PROGRAM_TEST: &str = "cli";

/// A program of the workspace.
struct Program {
    name: &'static str,
    /// Names another program to test, e.g. an installed one.
    variable: &'static str,
    /// Where the sources of the crates lie that it is made of.
    folders: &'static [&'static str],
}

/// Path of `tarazed`. `cargo test --workspace` has built it; a run of one package's tests builds it here, once.
///
/// # Panics
/// If it cannot be built.
#[must_use]
pub fn tarazed() -> &'static Path {
    static PROGRAM: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let program = Program {
        name: "tarazed",
        variable: "TARAZED_TEST_PROGRAM",
        folders: &["actors", "kernels", "runtime"],
    };
    program.path(&PROGRAM)
}

/// Path of `tarazed-verify`, as [`tarazed`].
///
/// # Panics
/// If it cannot be built.
#[must_use]
pub fn verifier() -> &'static Path {
    static PROGRAM: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let program = Program {
        name: "tarazed-verify",
        variable: "TARAZED_TEST_VERIFIER",
        folders: &["chaos/verify"],
    };
    program.path(&PROGRAM)
}

impl Program {
    fn path(&self, found: &'static OnceLock<Result<PathBuf, String>>) -> &'static Path {
        match found.get_or_init(|| self.find()) {
            Ok(program) => program,
            Err(cause) => panic!("{cause}"),
        }
    }

    fn find(&self) -> Result<PathBuf, String> {
        if let Some(named) = std::env::var_os(self.variable) {
            return std::fs::canonicalize(&named).map_err(|e| format!("{}: {}: {e}", self.variable, named.display()));
        }
        let profile_dir = profile_dir();
        let program = profile_dir.join(self.name);
        if !is_current(&program, self.folders) {
            build(&profile_dir)?;
        }
        if program.is_file() {
            Ok(program)
        } else {
            Err(format!("{} was not built", program.display()))
        }
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
fn is_current(program: &Path, folders: &[&str]) -> bool {
    let Some(built) = modified(program) else { return false };
    let mut folders: Vec<PathBuf> = folders.iter().map(|name| root().join(name)).collect();
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
    let mut cargo = Command::new(env!("CARGO"));
    // Cargo tells a test which package it is of. Build scripts look at the same names (ring's does), and with these set they,
    // and all that depends on them, would be built anew: here, and again when a person builds next.
    let of_package = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(of_package)) {
        cargo.env_remove(name);
    }
    let output = cargo
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
    Err(format!("the programs cannot be built:\n{said}"))
}
