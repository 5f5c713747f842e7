//! The processes of one run folder, found in `/proc` by their command line and never by a bare number.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// Finds and signals the rank processes of a run folder, whether or not its controller lives.
#[derive(Clone, Debug)]
pub struct Processes {
    run_dir: PathBuf,
}

impl Processes {
    /// Of the run in `run_dir`, as its controller was told it.
    #[must_use]
    pub fn of(run_dir: &Path) -> Self {
        Self {
            run_dir: run_dir.to_owned(),
        }
    }

    /// Process ids of all living ranks.
    ///
    /// # Panics
    /// If there is no `/proc`.
    #[must_use]
    pub fn ranks(&self) -> Vec<u32> {
        let entries = std::fs::read_dir("/proc").expect("/proc");
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|&pid| self.is_rank(pid))
            .collect()
    }

    /// The process that is this life of this worker, if it lives.
    #[must_use]
    pub fn rank(&self, worker: u32, incarnation: u32) -> Option<u32> {
        let wanted = [
            ("--worker", worker.to_string()),
            ("--incarnation", incarnation.to_string()),
        ];
        let is_it = |pid: &u32| {
            let line = command_line(*pid);
            wanted.iter().all(|(option, value)| follows(&line, option, value))
        };
        self.ranks().into_iter().find(is_it)
    }

    /// The living ranks that were started with this option.
    #[must_use]
    pub fn ranks_with(&self, option: &str, value: &str) -> Vec<u32> {
        let mut found = self.ranks();
        found.retain(|&pid| follows(&command_line(pid), option, value));
        found
    }

    /// Processor time of all living ranks so far, in clock ticks.
    #[must_use]
    pub fn ticks(&self) -> u64 {
        let spent = |pid: &u32| -> Option<u64> {
            let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // Behind the name, which may hold anything: state, then ten numbers, then user and system time.
            let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(11);
            Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
        };
        self.ranks().iter().filter_map(spent).sum()
    }

    fn is_rank(&self, pid: u32) -> bool {
        let line = command_line(pid);
        line.get(1).is_some_and(|word| word == "rank") && follows(&line, "--run-dir", &self.run_dir.to_string_lossy())
    }

    /// Sends a signal to a rank of this run; `false` if it is not there any more.
    #[must_use]
    pub fn signal(&self, pid: u32, signal: Signal) -> bool {
        // The descriptor is opened before the look: what was looked at is what gets the signal.
        let Some(process) = Pid::from_raw(pid as i32).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else {
            return false;
        };
        self.is_rank(pid) && pidfd_send_signal(process.as_fd(), signal).is_ok()
    }

    /// SIGKILL to every rank that is left.
    pub fn kill_all(&self) {
        for pid in self.ranks() {
            // One that is gone by now is what was wanted.
            let _ = self.signal(pid, Signal::KILL);
        }
    }
}

/// Words of a process's command line; none if it is gone or a zombie.
fn command_line(pid: u32) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    bytes
        .split(|&byte| byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect()
}

fn follows(line: &[String], option: &str, value: &str) -> bool {
    line.windows(2).any(|pair| pair[0] == option && pair[1] == value)
}
