//! Names inside a run folder, and finding the run a command means.

use crate::exit::Failure;
use std::path::{Path, PathBuf};

/// A run folder (DESIGN.md section 11). Names only: nothing here creates or changes a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunFolder(PathBuf);

impl RunFolder {
    /// The folder at `dir`.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.0
    }

    /// The config as resolved.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.0.join("config.toml")
    }

    /// The committed trace.
    #[must_use]
    pub fn trace(&self) -> PathBuf {
        self.0.join("trace.jsonl")
    }

    /// Incidents.
    #[must_use]
    pub fn events(&self) -> PathBuf {
        self.0.join("events.jsonl")
    }

    /// Measurements by the wall's clock, and signals.
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }

    /// The default object store.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.0.join("store")
    }

    /// Socket of a live controller.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    /// Token that the socket asks for; readable by the owner alone.
    #[must_use]
    pub fn control_token(&self) -> PathBuf {
        self.0.join("control.token")
    }

    /// Address of a live run's page; readable by the owner alone.
    #[must_use]
    pub fn dashboard_url(&self) -> PathBuf {
        self.0.join("dashboard.url")
    }

    /// The log of one process, e.g. `controller` or `worker-3`.
    #[must_use]
    pub fn log(&self, process: &str) -> PathBuf {
        self.0.join("log").join(format!("{process}.log"))
    }

    /// The given folder, or the newest run below `runs`.
    ///
    /// # Errors
    /// Refused where the folder holds no run, or where there is none below `runs`.
    pub fn find(dir: Option<&Path>, runs: &Path) -> Result<Self, Failure> {
        if let Some(dir) = dir {
            let folder = Self::new(dir);
            return if folder.holds_run() {
                Ok(folder)
            } else {
                Err(Failure::refused(
                    format!("--run-dir {}", dir.display()),
                    "holds no run (no config.toml)",
                    "give the folder that `tarazed train` printed",
                ))
            };
        }
        let newest = std::fs::read_dir(runs)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| Self::new(entry.path()))
            .filter(Self::holds_run)
            .max_by_key(|folder| {
                let changed = |path: PathBuf| std::fs::metadata(path).and_then(|m| m.modified()).ok();
                (changed(folder.trace()).max(changed(folder.config())), folder.0.clone())
            });
        newest.ok_or_else(|| {
            Failure::refused(
                runs.display(),
                "holds no run folder",
                "start a run, or name its folder with --run-dir",
            )
        })
    }

    fn holds_run(&self) -> bool {
        self.config().is_file()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    #[test]
    fn the_newest_run_is_meant_where_none_is_named() {
        let runs = tempfile::tempdir().expect("a temporary folder");
        for name in ["first", "second", "no-run"] {
            std::fs::create_dir(runs.path().join(name)).expect("a folder");
        }
        let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        let file = std::fs::File::create(runs.path().join("first/config.toml")).expect("a file");
        file.set_modified(old).expect("a changed time");
        std::fs::write(runs.path().join("second/config.toml"), "").expect("a file");
        let found = RunFolder::find(None, runs.path()).expect("a run");
        assert_eq!(found.dir(), runs.path().join("second"));
    }

    #[test]
    fn a_folder_without_a_run_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let refused = RunFolder::find(Some(dir.path()), Path::new("runs")).expect_err("no run there");
        assert_eq!(refused.exit, Exit::Refused);
        assert!(RunFolder::find(None, dir.path()).is_err());
    }
}
