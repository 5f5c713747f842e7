//! Names inside a run folder, its lock, and its committed trace.
//!
//! A run folder belongs to one controller at a time: an advisory lock on `lock` is held as long as it lives and ends with
//! its process, however that ends. A run folder of another config is refused before anything in it changes.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use tarazed_domain::StepsCompleted;
use tarazed_domain::config::Config;
use tarazed_protocol::trace::{TraceLine, parse_whole_lines};

/// The folder cannot be used as it is: say so and change nothing.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {cause}; {remedy}")]
pub struct FolderError {
    /// File or folder.
    pub path: String,
    /// What is wrong.
    pub cause: String,
    /// What to do.
    pub remedy: String,
}

impl FolderError {
    fn new(path: &Path, cause: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            path: path.display().to_string(),
            cause: cause.into(),
            remedy: remedy.into(),
        }
    }

    fn io(path: &Path, error: &std::io::Error) -> Self {
        let remedy = if error.kind() == std::io::ErrorKind::StorageFull {
            "free space on that disk; nothing written so far is lost"
        } else {
            "check the folder's permissions and its disk"
        };
        Self::new(path, error.to_string(), remedy)
    }
}

/// What to do with a run that is there already.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Existing {
    /// Resume it if there is one, begin otherwise.
    #[default]
    ResumeOrBegin,
    /// There must be one.
    Resume,
    /// There must be none.
    Fresh,
}

/// Names inside a run folder (DESIGN.md section 11).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RunPaths(PathBuf);

impl RunPaths {
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

    /// Wall-clock measurements.
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }

    /// Incidents.
    #[must_use]
    pub fn events(&self) -> PathBuf {
        self.0.join("events.jsonl")
    }

    /// Prepared data sets.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.0.join("data")
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

    /// Its token.
    #[must_use]
    pub fn control_token(&self) -> PathBuf {
        self.0.join("control.token")
    }

    /// Logs of the processes.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.0.join("log")
    }

    /// Location of the checkpoints: as configured, or `store/`.
    #[must_use]
    pub fn store_location(&self, config: &Config) -> String {
        let configured = &config.checkpoint.store;
        if configured.is_empty() {
            self.store().display().to_string()
        } else {
            configured.clone()
        }
    }
}

/// A run folder that this process owns.
#[derive(Debug)]
pub struct RunFolder {
    /// Its names.
    pub paths: RunPaths,
    /// The committed trace so far.
    pub lines: Vec<TraceLine>,
    /// Whether a run was there before.
    pub resumed: bool,
    _lock: File,
}

impl RunFolder {
    /// Takes the folder for a run of `config`: locks it, compares configs, reads the trace. A torn last line, as a power
    /// loss leaves one, is cut off: it was never acknowledged. Writes nothing else.
    ///
    /// # Errors
    /// A [`FolderError`] where the folder is in use, holds another run, or cannot be read.
    pub fn open(config: &Config, existing: Existing) -> Result<Self, FolderError> {
        let paths = RunPaths::new(&config.run.dir);
        let before = paths.config().exists();
        check_existing(&paths, before, existing)?;
        std::fs::create_dir_all(paths.dir()).map_err(|e| FolderError::io(paths.dir(), &e))?;
        let lock = take_lock(&paths)?;
        if before {
            check_same_run(&paths, config)?;
        }
        let lines = read_trace(&paths.trace())?;
        Ok(Self {
            paths,
            lines,
            resumed: before,
            _lock: lock,
        })
    }

    /// Writes the resolved config, for rank processes and for people. A run's first config stays as it was but for what
    /// decides only when and where.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_config(&self, config: &Config) -> Result<(), FolderError> {
        let path = self.paths.config();
        let text = config
            .to_toml()
            .map_err(|e| FolderError::new(&path, e.to_string(), "report this as a bug"))?;
        let fresh = path.with_extension("toml.new");
        std::fs::write(&fresh, text).map_err(|e| FolderError::io(&fresh, &e))?;
        std::fs::rename(&fresh, &path).map_err(|e| FolderError::io(&path, &e))
    }
}

fn check_existing(paths: &RunPaths, before: bool, existing: Existing) -> Result<(), FolderError> {
    match existing {
        Existing::Resume if !before => Err(FolderError::new(
            paths.dir(),
            "holds no run to resume",
            "leave --resume out to begin one, or name another --run-dir",
        )),
        Existing::Fresh if before => Err(FolderError::new(
            paths.dir(),
            "holds a run already, and --fresh never overwrites one",
            "name another --run-dir, or move this folder away",
        )),
        _ => Ok(()),
    }
}

fn take_lock(paths: &RunPaths) -> Result<File, FolderError> {
    let path = paths.dir().join("lock");
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| FolderError::io(&path, &e))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(FolderError::new(
            paths.dir(),
            "is in use by another run",
            "wait for it, stop it, or name another --run-dir",
        )),
        Err(TryLockError::Error(e)) => Err(FolderError::io(&path, &e)),
    }
}

fn check_same_run(paths: &RunPaths, config: &Config) -> Result<(), FolderError> {
    let path = paths.config();
    let theirs = Config::load(&path, &[]).map_err(|e| {
        FolderError::new(
            &path,
            format!("cannot be read back ({e})"),
            "restore the file or name another --run-dir",
        )
    })?;
    let (ours, theirs) = (config.identity(), theirs.identity());
    if ours == theirs {
        return Ok(());
    }
    let section = |text: &str| text.split(';').map(str::to_owned).collect::<Vec<_>>();
    let changed: Vec<String> = section(&ours)
        .iter()
        .zip(&section(&theirs))
        .filter(|(a, b)| a != b)
        .filter_map(|(a, _)| a.split('=').next().map(str::to_owned))
        .collect();
    Err(FolderError::new(
        paths.dir(),
        format!("holds a run of another config (differs in: {})", changed.join(", ")),
        "name another --run-dir for the new config, or give the config this run began with",
    ))
}

/// The whole lines of a trace; a torn last one is cut off the file.
fn read_trace(path: &Path) -> Result<Vec<TraceLine>, FolderError> {
    let mut file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(FolderError::io(path, &e)),
    };
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|e| FolderError::io(path, &e))?;
    let (lines, whole_bytes) = parse_whole_lines(&bytes)
        .map_err(|e| FolderError::new(path, e.to_string(), "restore the file, or begin in another --run-dir"))?;
    if whole_bytes < bytes.len() {
        file.set_len(whole_bytes as u64)
            .map_err(|e| FolderError::io(path, &e))?;
        file.seek(SeekFrom::End(0)).map_err(|e| FolderError::io(path, &e))?;
    }
    Ok(lines)
}

/// Lines after `step`, read back for a replay to be checked against.
///
/// # Errors
/// If the trace cannot be read.
pub fn lines_after(path: &Path, step: StepsCompleted) -> Result<Vec<TraceLine>, FolderError> {
    let bytes = std::fs::read(path).map_err(|e| FolderError::io(path, &e))?;
    let (lines, _) = parse_whole_lines(&bytes)
        .map_err(|e| FolderError::new(path, e.to_string(), "restore the file, or begin in another --run-dir"))?;
    Ok(lines.into_iter().filter(|line| line.step > step).collect())
}
