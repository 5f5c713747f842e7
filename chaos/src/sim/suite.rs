//! The runtime's own tests, with a bug in the program: what the simulator does not find they may.

use serde_json::Value;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tarazed_domain::mutant::VARIABLE;

/// Packages whose tests are run, lowest floor first.
const PACKAGES: [&str; 6] = [
    "tarazed-domain",
    "tarazed-protocol",
    "tarazed-fabric",
    "tarazed-store",
    "tarazed-train",
    "tarazed-actors",
];
/// Between two looks at a test program.
const LOOK: Duration = Duration::from_millis(20);

/// One test program of a package.
struct Program {
    package: String,
    path: PathBuf,
    /// Tests run in their package's folder.
    folder: PathBuf,
}

/// All test programs of the packages above.
pub struct Suite(Vec<Program>);

impl Suite {
    /// Builds them, with the bugs, and sees that they pass as long as none is chosen.
    ///
    /// # Errors
    /// If they do not build, or one fails without any bug.
    pub fn new(limit: Duration) -> Result<Self, String> {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
        let output = Command::new(cargo)
            .args(["test", "--locked", "--release", "--workspace", "--no-run"])
            .args(["--features", "tarazed-chaos/mutants", "--message-format", "json"])
            .stderr(Stdio::inherit())
            .output()
            .map_err(|e| format!("cargo test: {e}"))?;
        if !output.status.success() {
            return Err(format!("cargo test --no-run: {}", output.status));
        }
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut programs: Vec<Program> = lines
            .lines()
            .filter_map(|line| program(&serde_json::from_str(line).ok()?))
            .collect();
        programs.sort_by_key(|program| PACKAGES.iter().position(|package| *package == program.package));
        let suite = Self(programs);
        match suite.first_failure("", limit) {
            None => Ok(suite),
            Some(failure) => Err(format!("{failure} fails without any bug")),
        }
    }

    /// The first test that fails with this bug, and how.
    pub fn first_failure(&self, mutant: &str, limit: Duration) -> Option<String> {
        self.0.iter().find_map(|program| program.failure(mutant, limit))
    }
}

/// What one of cargo's messages says of a test program that is wanted here.
fn program(message: &Value) -> Option<Program> {
    let path = message["executable"].as_str()?;
    let manifest = PathBuf::from(message["manifest_path"].as_str()?);
    let package = PACKAGES.iter().find(|package| {
        // A package's id ends with `/folder#name@version`, or with `/name#version`.
        let id = message["package_id"].as_str().unwrap_or_default();
        let name = id
            .rsplit(['/', '#'])
            .any(|part| part.split('@').next() == Some(package));
        name && message["profile"]["test"] == true
    })?;
    Some(Program {
        package: (*package).to_owned(),
        path: PathBuf::from(path),
        folder: manifest.parent()?.to_owned(),
    })
}

impl Program {
    fn failure(&self, mutant: &str, limit: Duration) -> Option<String> {
        let mut child = Command::new(&self.path)
            .current_dir(&self.folder)
            .env(VARIABLE, mutant)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut pipe = child.stdout.take()?;
        // Read as it comes: a full pipe would hold the tests up.
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            // What cannot be read names no test, and the exit status still counts.
            let _ = pipe.read_to_string(&mut text);
            text
        });
        let deadline = Instant::now() + limit;
        let status = loop {
            match child.try_wait().ok()? {
                Some(status) => break Some(status),
                None if Instant::now() > deadline => {
                    // An error means that it has just ended.
                    let _ = child.kill();
                    let _ = child.wait();
                    break None;
                }
                None => std::thread::sleep(LOOK),
            }
        };
        let text = reader.join().unwrap_or_default();
        let Some(status) = status else {
            return Some(format!("a test of `{}` that never ends", self.package));
        };
        if status.success() {
            return None;
        }
        let failed = |line: &str| Some(line.strip_prefix("test ")?.strip_suffix(" ... FAILED")?.to_owned());
        let name = text.lines().find_map(failed).unwrap_or_else(|| status.to_string());
        Some(format!("`{}`: `{name}`", self.package))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_program_is_known_by_cargos_message() {
        let mut message = serde_json::json!({
            "reason": "compiler-artifact",
            "package_id": "path+file:///somewhere/runtime/store#tarazed-store@0.1.0",
            "manifest_path": "/somewhere/runtime/store/Cargo.toml",
            "profile": {"test": true},
            "executable": "/target/commit-1234",
        });
        let found = program(&message).expect("a test program");
        assert_eq!(
            (found.package.as_str(), found.folder.to_str()),
            ("tarazed-store", Some("/somewhere/runtime/store"))
        );
        message["package_id"] = "path+file:///somewhere/tarazed-fabric#0.1.0".into();
        assert_eq!(program(&message).expect("a test program").package, "tarazed-fabric");
        message["profile"]["test"] = false.into();
        assert!(program(&message).is_none(), "an example");
    }
}
