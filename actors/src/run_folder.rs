//! Names inside a run folder, its lock, and its committed trace.
//!
//! A run folder belongs to one controller at a time: an advisory lock on `lock` is held as long as it lives and ends with
//! its process, however that ends. A run folder of another config is refused before anything in it changes, and a new run
//! that is refused leaves nothing behind ([`Attempt::undo`]).

mod weights;

pub use weights::{RecalledWeights, recall_weights};

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tarazed_domain::config::{ClusterDevice, Config};
use tarazed_domain::{Mutant, StepsCompleted};
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
    /// What is wrong, for whoever may start the same command again.
    pub trouble: Trouble,
}

/// What keeps a folder from being used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// The folder itself: the same command does no better.
    Unfit,
    /// Its disk is full, which a person must see to.
    Full,
    /// Its disk or network fails: the same command may do better later.
    Failing,
}

impl FolderError {
    /// Refused as it is.
    pub fn new(path: &Path, cause: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            path: path.display().to_string(),
            cause: cause.into(),
            remedy: remedy.into(),
            trouble: Trouble::Unfit,
        }
    }

    pub(crate) fn io(path: &Path, error: &std::io::Error) -> Self {
        let full = is_full(error);
        let remedy = if full {
            "free space on that disk; nothing written so far is lost"
        } else {
            "check the folder's permissions and its disk"
        };
        let trouble = match (full, is_of_the_place(error)) {
            (true, _) => Trouble::Full,
            (_, true) => Trouble::Unfit,
            _ => Trouble::Failing,
        };
        Self {
            trouble,
            ..Self::new(path, error.to_string(), remedy)
        }
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

    /// The weight trajectory.
    #[must_use]
    pub fn weights(&self) -> PathBuf {
        self.0.join("weights.jsonl")
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

    /// Which controller is in charge, for ranks that lost theirs.
    #[must_use]
    pub fn controller(&self) -> PathBuf {
        self.0.join("controller.json")
    }

    /// Which life of each node's process is the newest.
    #[must_use]
    pub fn nodes(&self) -> PathBuf {
        self.0.join("nodes")
    }

    /// Which rank processes were started, for a controller that takes over.
    #[must_use]
    pub fn ranks(&self) -> PathBuf {
        self.0.join("ranks")
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
    attempt: Attempt,
}

impl RunFolder {
    /// Takes the folder for a run of `config`: locks it, compares configs, reads the trace. A torn last line, as a power
    /// loss leaves one, is cut off: it was never acknowledged. Writes nothing else.
    ///
    /// # Errors
    /// A [`FolderError`] where the folder is in use, holds another run, or cannot be read.
    pub fn open(config: &Config, existing: Existing) -> Result<Self, FolderError> {
        Self::open_as(config, existing, Occupied::Refuse)
    }

    /// As [`Self::open`]; where another controller holds the folder, as `occupied` says.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_as(config: &Config, existing: Existing, occupied: Occupied) -> Result<Self, FolderError> {
        let paths = RunPaths::new(&config.run.dir);
        let before = paths.config().exists();
        check_existing(&paths, before, existing)?;
        if before && occupied == Occupied::TakeOver {
            // Before anybody is put out of charge; and again below, when nobody else can change it.
            check_same_run(&paths, config)?;
        }
        let attempt = Attempt::begin(&paths, config, before, occupied)?;
        let lines = before
            .then(|| check_same_run(&paths, config))
            .transpose()
            .map(drop)
            .and_then(|_| match occupied {
                Occupied::Refuse => Ok(()),
                // The trace first: without it nothing else is committed.
                Occupied::TakeOver => move_file(&paths.trace()).and_then(|()| move_file(&paths.weights())),
            })
            .and_then(|()| read_trace(&paths.trace()))
            .inspect_err(|_| attempt.undo())?;
        Ok(Self {
            paths,
            lines,
            resumed: before,
            attempt,
        })
    }

    /// Tells whether this process still owns the folder: another controller may have taken it over.
    #[must_use]
    pub fn tenure(&self) -> Tenure {
        Tenure {
            lock: Arc::clone(&self.attempt.lock),
            path: lock_path(&self.paths),
        }
    }

    /// What is to be undone if the run is refused. It shares the folder's lock.
    #[must_use]
    pub fn attempt(&self) -> Attempt {
        self.attempt.clone()
    }

    /// For a refusal before the run began: see [`Attempt::undo`].
    pub fn give_up(self) {
        self.attempt.undo();
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
        // On the disk before it gets its name, and the name too: a power loss must not leave an empty config, which would
        // refuse the run.
        let fresh = path.with_extension("toml.new");
        File::create(&fresh)
            .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
            .map_err(|e| FolderError::io(&fresh, &e))?;
        std::fs::rename(&fresh, &path)
            .and_then(|()| File::open(self.paths.dir())?.sync_all())
            .map_err(|e| FolderError::io(&path, &e))
    }
}

/// Bytes at a trace's end in which its last whole line is looked for; a line is far shorter.
const TRACE_TAIL_BYTES: u64 = 256 * 1024;

/// Everything that a run puts into its folder but the lock, by name.
const ENTRIES: [&str; 16] = [
    "config.toml",
    "config.toml.new",
    "trace.jsonl",
    "weights.jsonl",
    "metrics.jsonl",
    "events.jsonl",
    "data",
    "store",
    "log",
    "control.sock",
    "control.token",
    "controller.json",
    "ranks",
    "nodes",
    "dashboard.url",
    "dashboard.url.new",
];

/// What a start has changed around the run folder, so that a refusal can undo it.
#[derive(Clone, Debug)]
pub struct Attempt {
    paths: RunPaths,
    /// A run was there before: it keeps everything.
    resumed: bool,
    /// What lay in the folder before.
    before: BTreeSet<OsString>,
    /// Folders that were not there before, the outermost first: the run folder, and a store outside it.
    made: Vec<PathBuf>,
    lock: Arc<File>,
}

impl Attempt {
    fn begin(paths: &RunPaths, config: &Config, resumed: bool, occupied: Occupied) -> Result<Self, FolderError> {
        let mut made = absent(paths.dir());
        made.extend(absent(Path::new(&paths.store_location(config))));
        let entries = std::fs::read_dir(paths.dir()).into_iter().flatten().flatten();
        let before = entries.map(|entry| entry.file_name()).collect();
        let lock = std::fs::create_dir_all(paths.dir())
            .map_err(|e| FolderError::io(paths.dir(), &e))
            .and_then(|()| take_lock(paths, occupied))
            // Whoever holds the lock may just be filling the folders within.
            .inspect_err(|_| made.iter().rev().for_each(|folder| drop(std::fs::remove_dir(folder))))?;
        Ok(Self {
            paths: paths.clone(),
            resumed,
            before,
            made,
            lock: Arc::new(lock),
        })
    }

    /// Removes what a new run has put into its folder, and the folders that were made for it, unless somebody else put
    /// something into them. A run that was there before keeps everything, and so does one that has committed a step.
    pub fn undo(&self) {
        let began = std::fs::metadata(self.paths.trace()).is_ok_and(|trace| trace.len() > 0);
        if self.resumed || began {
            return;
        }
        // Best effort: what stays is no run, and the next start takes it over.
        for name in ENTRIES
            .iter()
            .filter(|name| !self.before.contains(OsString::from(name).as_os_str()))
        {
            let path = self.paths.dir().join(name);
            let _ = std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir_all(&path));
        }
        // Last, so that nobody comes in before; one who waits for this very file sees that it has lost its name.
        if !self.before.contains(OsString::from("lock").as_os_str()) {
            let _ = std::fs::remove_file(lock_path(&self.paths));
        }
        remove_empty(&self.made);
    }
}

/// Whether a file could not grow: its disk is full, or a quota or a limit on file sizes is reached. Room is a person's to
/// make, so such an error halts: a scheduler that retries would do so for ever.
#[must_use]
pub fn is_full(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
    )
}

/// Whether an error is of the path that was named, or of who may do what there, which no retry changes.
#[must_use]
pub fn is_of_the_place(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotFound
            | ErrorKind::PermissionDenied
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::AlreadyExists
            | ErrorKind::NotADirectory
            | ErrorKind::IsADirectory
            | ErrorKind::InvalidFilename
            | ErrorKind::InvalidInput
    )
}

/// A folder and those above it that are not there, the outermost first; none for a URL.
fn absent(folder: &Path) -> Vec<PathBuf> {
    let missing = |path: &&Path| !path.as_os_str().is_empty() && !path.exists();
    if folder.to_string_lossy().contains("://") {
        return Vec::new();
    }
    let mut found: Vec<PathBuf> = folder.ancestors().take_while(missing).map(Path::to_owned).collect();
    found.reverse();
    found
}

/// Removes these folders and folders in them where no file is in them.
fn remove_empty(folders: &[PathBuf]) {
    for folder in folders.iter().rev() {
        let inner = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let inner: Vec<PathBuf> = inner
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path())
            .collect();
        remove_empty(&inner);
        let _ = std::fs::remove_dir(folder);
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

fn lock_path(paths: &RunPaths) -> PathBuf {
    paths.dir().join("lock")
}

/// What to do where another controller holds the folder.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Occupied {
    /// Leave it alone.
    Refuse,
    /// It stands still, or is about to be replaced: put it out of charge.
    TakeOver,
}

/// A controller's hold on its run folder.
#[derive(Clone, Debug)]
pub struct Tenure {
    lock: Arc<File>,
    path: PathBuf,
}

impl Tenure {
    /// Whether the folder's lock is still the one that this process took.
    #[must_use]
    pub fn holds(&self) -> bool {
        is_named(&self.lock, &self.path)
    }
}

#[cfg(test)]
impl Tenure {
    /// That of whoever makes the file at `path`.
    pub(crate) fn of(path: PathBuf) -> std::io::Result<Self> {
        let lock = Arc::new(File::create(&path)?);
        Ok(Self { lock, path })
    }
}

/// Whether `path` names this very file.
pub(crate) fn is_named(file: &File, path: &Path) -> bool {
    let same = |a: std::fs::Metadata, b: std::fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    file.metadata()
        .and_then(|held| Ok(same(held, std::fs::metadata(path)?)))
        .unwrap_or(false)
}

/// The controller in charge of a run folder, as ranks look it up.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct InCharge {
    /// What it claimed the store with: the next controller has a higher one.
    pub generation: u64,
    /// Where it listens.
    pub address: String,
    /// The run's secret. A controller that goes on with living ranks keeps it.
    pub token: [u8; 32],
    /// Folder of the sockets; on the same terms.
    pub sockets: PathBuf,
    /// Device and inode of the run folder: a copy of it says the same of ranks that are not its own.
    #[serde(default)]
    pub folder: [u64; 2],
    /// Digest of what rank processes take from their config besides the run's identity.
    #[serde(default)]
    pub rules: String,
    /// Where the nodes of a run on several hosts dial.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<String>,
    /// Folder of the prepared data set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<PathBuf>,
}

impl InCharge {
    /// Reads it; none where there is none that can be read.
    #[must_use]
    pub fn read(paths: &RunPaths) -> Option<Self> {
        let bytes = std::fs::read(paths.controller()).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Writes it, for this user alone, in one piece.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, paths: &RunPaths) -> std::io::Result<()> {
        let fresh = paths.controller().with_extension("json.new");
        // One that an earlier start left behind may have other permissions.
        let _ = std::fs::remove_file(&fresh);
        let mut file = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        std::fs::rename(&fresh, paths.controller())
    }
}

/// Gives a file's name to a copy, that of the trace or of what goes with it: what a controller that was put out of charge still writes goes into the old file, and
/// [`crate::controller::TraceFile`] acknowledges nothing that was written there since. What it did acknowledge before is
/// in the copy.
fn move_file(path: &Path) -> Result<(), FolderError> {
    let failed = |e: std::io::Error| FolderError::io(path, &e);
    let mut old = match File::open(path) {
        Ok(old) => old,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(e)),
    };
    let fresh = path.with_extension("jsonl.new");
    let mut copy = File::create(&fresh).map_err(|e| FolderError::io(&fresh, &e))?;
    let mut rest = |copy: &mut File| std::io::copy(&mut old, copy);
    rest(&mut copy).and_then(|_| copy.sync_all()).map_err(failed)?;
    std::fs::rename(&fresh, path).map_err(failed)?;
    // Written between the copy and the renaming.
    rest(&mut copy).and_then(|_| copy.sync_all()).map_err(failed)
}

fn take_lock(paths: &RunPaths, occupied: Occupied) -> Result<File, FolderError> {
    let path = lock_path(paths);
    let failed = |e: std::io::Error| FolderError::io(&path, &e);
    loop {
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) if occupied == Occupied::TakeOver => {
                // A new file under the lock's name: whoever holds the old one finds that it has lost its own.
                let fresh = path.with_extension(format!("new-{}", std::process::id()));
                let lock = File::create(&fresh).map_err(failed)?;
                lock.lock().map_err(failed)?;
                std::fs::rename(&fresh, &path).map_err(failed)?;
                if is_named(&lock, &path) {
                    return Ok(lock);
                }
                continue;
            }
            Err(TryLockError::WouldBlock) => {
                return Err(FolderError::new(
                    paths.dir(),
                    "is in use by another run",
                    "wait for it, stop it, name another --run-dir, or put it out of charge with --take-over",
                ));
            }
            Err(TryLockError::Error(e)) => return Err(failed(e)),
        }
        // Its holder before may have given the folder up: a file without a name keeps nobody out.
        if is_named(&lock, &path) {
            return Ok(lock);
        }
    }
}

/// As a config says it.
const fn device_name(device: ClusterDevice) -> &'static str {
    match device {
        ClusterDevice::Auto => "auto",
        ClusterDevice::Cpu => "cpu",
        ClusterDevice::Cuda => "cuda",
    }
}

fn check_same_run(paths: &RunPaths, config: &Config) -> Result<(), FolderError> {
    let path = paths.config();
    // A run that was begun before there were notices of rollbacks goes on without.
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let unannounced = "policy.rollback_notice_steps=0".to_owned();
    let before: &[String] = match text.contains("rollback_notice_steps") {
        true => &[],
        false => &[unannounced],
    };
    let theirs = Config::load(&path, before).map_err(|e| {
        FolderError::new(
            &path,
            format!("cannot be read back ({e})"),
            "restore the file or name another --run-dir",
        )
    })?;
    let shards = (config.optimizer.shards, theirs.optimizer.shards);
    let devices = (config.cluster.device, theirs.cluster.device);
    let (ours, theirs) = (config.identity(), theirs.identity());
    if ours == theirs && shards.0 != shards.1 {
        return Err(FolderError::new(
            paths.dir(),
            format!(
                "holds a run with optimizer.shards = {}, not {}: its checkpoints are cut so",
                shards.1, shards.0
            ),
            "put the number back, or name another --run-dir for a new run",
        ));
    }
    if ours == theirs && devices.0 != devices.1 {
        // Both are resolved: `auto` is what this machine had when the run began, and has now.
        let (ours, theirs) = (device_name(devices.0), device_name(devices.1));
        return Err(FolderError::new(
            paths.dir(),
            format!(
                "holds a run with cluster.device = \"{theirs}\", not \"{ours}\": its numbers are those of such a device"
            ),
            format!("set it to \"{theirs}\" where such a device can be used, or name another --run-dir for a new run"),
        ));
    }
    if ours == theirs {
        return Ok(());
    }
    // By name: some sections are there only where something of them is set.
    let sections = |text: &str| -> BTreeMap<String, String> {
        let parts = text.split(';').map(|part| part.split_once('=').unwrap_or((part, "")));
        parts.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    };
    let (ours, theirs) = (sections(&ours), sections(&theirs));
    let names: BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
    let changed: Vec<&str> = names
        .into_iter()
        .filter(|name| ours.get(*name) != theirs.get(*name))
        .map(String::as_str)
        .collect();
    Err(FolderError::new(
        paths.dir(),
        format!("holds a run of another config (differs in: {})", changed.join(", ")),
        "name another --run-dir for the new config, or give the config this run began with",
    ))
}

/// The whole lines of a trace; a torn last one is cut off the file.
///
/// # Errors
/// If it cannot be read, or is no trace.
pub fn read_trace(path: &Path) -> Result<Vec<TraceLine>, FolderError> {
    let mut file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(FolderError::io(path, &e)),
    };
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|e| FolderError::io(path, &e))?;
    let (lines, whole_bytes) = parse_whole_lines(&bytes)
        .map_err(|e| FolderError::new(path, e.to_string(), "restore the file, or begin in another --run-dir"))?;
    if whole_bytes < bytes.len() && !Mutant::TornLineKept.is_on() {
        file.set_len(whole_bytes as u64)
            .map_err(|e| FolderError::io(path, &e))?;
        file.seek(SeekFrom::End(0)).map_err(|e| FolderError::io(path, &e))?;
    }
    Ok(lines)
}

/// The newest whole line's step; 0 where there is none that can be read. For messages, at the end of a run.
#[must_use]
pub fn newest_step(path: &Path) -> StepsCompleted {
    let tail = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TRACE_TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TRACE_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = tail().unwrap_or_default();
    let newest = text.lines().rev().find_map(|line| TraceLine::parse(line, 0).ok());
    newest.map_or(StepsCompleted(0), |line| line.step)
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

#[cfg(test)]
mod tests;
