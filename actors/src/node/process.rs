//! One operating-system process, from its start to its reaping. Everything here that can block says so.

use super::lifeline::{FLAG, Watcher};
use super::registry::{self, Entry, started_ticks};
use super::{ExitCause, LaunchSpec, StartError, environment};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;
use tarazed_domain::limits::{EXIT_TAIL_BYTES_MAX, EXIT_TAIL_LINES_MAX};
use tarazed_domain::{Incarnation, WorkerId};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A started process. Dropping it kills it, with its process group, and has it reaped; unless it is another agent's by now.
#[derive(Debug)]
pub(super) struct Process {
    pub pid: Pid,
    pub started: Instant,
    pub log: PathBuf,
    /// Where this life's output begins in the log.
    log_start: u64,
    pidfd: Arc<PidFd>,
    /// Of a process that was started here and holds one; for whoever watches it.
    pub lifeline: Option<Watcher>,
    spec: Arc<LaunchSpec>,
    /// Started here, and so to be reaped here.
    is_child: bool,
    reaped: bool,
}

/// A process's own handle: unlike a pid it can never come to mean another process.
#[derive(Debug)]
pub(super) struct PidFd(OwnedFd);

/// Waits, without blocking, for the end of a process that somebody else owns.
#[derive(Debug)]
pub(super) struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    /// Returns when the process has ended (it is then a zombie until reaped).
    pub async fn ended(&self) -> io::Result<()> {
        self.0.readable().await?.retain_ready();
        Ok(())
    }
}

impl Process {
    /// Starts a rank's process as the leader of a group of its own. Blocks: the program's start, and the log file.
    pub fn start(spec: &Arc<LaunchSpec>, worker: WorkerId, incarnation: Incarnation) -> Result<Self, StartError> {
        let log_path = spec.log_dir.join(format!("worker-{worker}.log"));
        let (log, log_start) = open_log(&log_path, worker, incarnation).map_err(|e| {
            let remedy = "choose a log folder that can be written";
            failure(&log_path, "open its log", remedy, e)
        })?;
        let program = |what| {
            let path = spec.shown_as.clone();
            let remedy = "check that the program exists and may be executed";
            move |e| failure(&path, what, remedy, e)
        };
        let mut entry = Entry {
            worker: worker.0,
            incarnation: incarnation.0,
            pid: 0,
            started_ticks: 0,
            log_start,
        };
        let write_down = |entry: &Entry| {
            let remedy = "check the run folder's permissions and its disk";
            entry
                .write(&spec.registry)
                .map_err(|e| failure(&spec.registry, "write it down", remedy, e))
        };
        // Before it is there: an incarnation is never used twice, whenever this process dies (SUP-2).
        write_down(&entry)?;
        let log_again = log.try_clone().map_err(program("duplicate its log"))?;
        let (lifeline, stdin) = match spec.lifeline {
            true => Watcher::new().map(|(watcher, theirs)| (Some(watcher), theirs)),
            false => Ok((None, Stdio::null())),
        }
        .map_err(program("make its lifeline"))?;
        let mut command = Command::new(&spec.program);
        if spec.share_gpus {
            command.envs(environment::sharing_gpus(worker));
        }
        for (name, value) in environment::changes(std::env::vars_os()) {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let mut child = command
            .arg0(&spec.shown_as)
            .args(&spec.args)
            .args(["--worker".to_owned(), worker.to_string()])
            .args(["--incarnation".to_owned(), incarnation.to_string()])
            .args(lifeline.as_ref().map(|_| FLAG))
            .envs(spec.env.iter().map(|(key, value)| (key, value)))
            .stdin(stdin)
            .stdout(log)
            .stderr(log_again)
            // Signals from the terminal are the controller's to interpret, and helpers of the rank end with it.
            .process_group(0)
            .spawn()
            .map_err(program("run the program"))?;
        let pid = Pid::from_child(&child);
        // The child is ours and not reaped, so its pid cannot have come to mean another process.
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(fd) => Arc::new(PidFd(fd)),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(program("watch the process (pidfd_open, Linux 5.10 or newer)")(
                    error.into(),
                ));
            }
        };
        let process = Self {
            pid,
            started: Instant::now(),
            log: log_path,
            log_start,
            pidfd,
            lifeline,
            spec: Arc::clone(spec),
            is_child: true,
            reaped: false,
        };
        entry.pid = pid.as_raw_nonzero().get().unsigned_abs();
        // One that has ended by now is a zombie, and of no use to anybody.
        if let Ok(ticks) = started_ticks(entry.pid) {
            entry.started_ticks = ticks;
            write_down(&entry)?;
        }
        Ok(process)
    }

    /// Watches a process that an earlier agent started. Blocks a little.
    pub fn adopt(spec: &Arc<LaunchSpec>, worker: WorkerId, incarnation: Incarnation) -> Result<Self, StartError> {
        let gone = || StartError::Refused("the process that an earlier controller started has ended".to_owned());
        let entry = registry::read(&spec.registry)
            .unwrap_or_default()
            .into_iter()
            .find(|entry| (entry.worker(), entry.incarnation()) == (worker, incarnation))
            .ok_or_else(gone)?;
        let pid = i32::try_from(entry.pid).ok().and_then(Pid::from_raw).ok_or_else(gone)?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK).map_err(|_| gone())?;
        // Looked at after the pidfd was made: it is this very process that the pidfd stands for.
        if !entry.lives() {
            return Err(gone());
        }
        Ok(Self {
            pid,
            started: Instant::now(),
            log: spec.log_dir.join(format!("worker-{}.log", entry.worker)),
            log_start: entry.log_start,
            pidfd: Arc::new(PidFd(pidfd)),
            lifeline: None,
            spec: Arc::clone(spec),
            is_child: false,
            reaped: false,
        })
    }

    /// Another agent is in charge of it: it is neither killed nor reaped here.
    pub fn let_go(&mut self) {
        self.reaped = true;
    }

    /// Whether no other agent has taken it over.
    pub fn is_ours(&self) -> bool {
        self.spec.is_in_charge()
    }

    /// Must be called within a tokio runtime.
    pub fn watch(&self) -> io::Result<Watch> {
        let fd = self.pidfd.0.try_clone()?;
        // SAFETY: an `OwnedFd` stays open, and the same, for as long as it lives; `AsyncFd` owns it from here on, and
        // `Watch` hands out no reference to it.
        let registered = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        Ok(Watch(registered.map_err(io::Error::from)?))
    }

    /// SIGKILL to exactly this process; does nothing if it has ended, or if it is another agent's by now.
    pub fn kill(&self) {
        if !self.is_ours() {
            return;
        }
        // The only possible failure is that it has ended.
        let _ = rustix::process::pidfd_send_signal(self.pidfd.0.as_fd(), Signal::KILL);
    }

    /// Kills what the rank left in its group, reaps it, and says how it ended. Call it once the pidfd is readable;
    /// before that it would block.
    pub fn reap(&mut self) -> io::Result<ExitCause> {
        if !self.is_child {
            self.reaped = true;
            return Ok(ExitCause::Unknown);
        }
        let ended = reap(self.pid, self.pidfd.0.as_fd());
        self.reaped = true;
        ended
    }

    /// The last lines that this life wrote. Blocks on the file.
    pub fn tail(log: &Path, log_start: u64) -> Vec<String> {
        tail(log, log_start).unwrap_or_else(|error| vec![format!("(its log could not be read: {error})")])
    }

    pub fn log_start(&self) -> u64 {
        self.log_start
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.reaped || !self.is_ours() {
            return;
        }
        self.kill();
        if !self.is_child {
            return;
        }
        let (pid, pidfd) = (self.pid, Arc::clone(&self.pidfd));
        // A process in an uninterruptible system call outlives its SIGKILL; nobody here may wait for that.
        let reaper = std::thread::Builder::new().name("reaper".to_owned());
        if let Err(error) = reaper.spawn(move || reap(pid, pidfd.0.as_fd())) {
            tracing::error!(%error, pid = pid.as_raw_nonzero(), "no thread to reap a killed process");
        }
    }
}

/// Waits for the end, kills the group while the zombie still holds its number, then reaps.
fn reap(pid: Pid, pidfd: BorrowedFd<'_>) -> io::Result<ExitCause> {
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    wait(pidfd, look)?;
    // The group may be empty.
    let _ = rustix::process::kill_process_group(pid, Signal::KILL);
    let status = wait(pidfd, WaitIdOptions::EXITED)?;
    if let Some(code) = status.exit_status() {
        return Ok(ExitCause::Code(code));
    }
    match status.terminating_signal() {
        Some(signal) => Ok(ExitCause::Signal(signal)),
        None => Err(io::Error::other("waitid reported neither a code nor a signal")),
    }
}

/// A pidfd opened with NONBLOCK makes `waitid` answer "try again" where it would wait; poll waits instead.
fn wait(pidfd: BorrowedFd<'_>, options: WaitIdOptions) -> io::Result<WaitIdStatus> {
    loop {
        match rustix::process::waitid(WaitId::PidFd(pidfd), options) {
            Ok(Some(status)) => return Ok(status),
            Ok(None) | Err(rustix::io::Errno::AGAIN) => {
                let mut polled = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
                match rustix::event::poll(&mut polled, None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn failure(path: &Path, what: &'static str, remedy: &'static str, source: io::Error) -> StartError {
    let path = path.to_owned();
    let passing = [
        rustix::io::Errno::AGAIN,
        rustix::io::Errno::NOMEM,
        rustix::io::Errno::MFILE,
        rustix::io::Errno::NFILE,
        // The program is being written just now.
        rustix::io::Errno::TXTBSY,
    ];
    if passing.iter().any(|e| source.raw_os_error() == Some(e.raw_os_error())) {
        return StartError::Retry { path, what, source };
    }
    StartError::Reconfigure {
        path,
        what,
        remedy,
        source,
    }
}

fn open_log(path: &Path, worker: WorkerId, incarnation: Incarnation) -> io::Result<(File, u64)> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut log = OpenOptions::new().create(true).append(true).open(path)?;
    writeln!(log, "=== worker {worker} incarnation {incarnation}")?;
    let start = log.seek(SeekFrom::End(0))?;
    Ok((log, start))
}

fn tail(log: &Path, log_start: u64) -> io::Result<Vec<String>> {
    let mut file = File::open(log)?;
    let end = file.seek(SeekFrom::End(0))?;
    let start = log_start.max(end.saturating_sub(EXIT_TAIL_BYTES_MAX));
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(EXIT_TAIL_BYTES_MAX).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let mut lines: Vec<String> = text
        .lines()
        .rev()
        .take(EXIT_TAIL_LINES_MAX)
        .map(str::to_owned)
        .collect();
    lines.reverse();
    Ok(lines)
}
