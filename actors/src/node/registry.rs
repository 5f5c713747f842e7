//! Which rank processes were started: one small file a worker, read by a controller that takes over.
//!
//! A pid may come to mean another process, so an entry counts only together with the start time that the kernel gives, and
//! only for a process that runs the very program file of the one that asks: a rank of another binary computes other numbers.

use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use tarazed_domain::{Incarnation, WorkerId};

/// The newest life of one worker.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// The slot.
    pub worker: u32,
    /// Which life.
    pub incarnation: u32,
    /// Its process; 0 where it was only about to be started.
    pub pid: u32,
    /// When that was started, in the kernel's ticks since the machine was.
    pub started_ticks: u64,
    /// Where this life's output begins in the worker's log.
    pub log_start: u64,
}

impl Entry {
    /// The slot.
    #[must_use]
    pub const fn worker(&self) -> WorkerId {
        WorkerId(self.worker)
    }

    /// Which life.
    #[must_use]
    pub const fn incarnation(&self) -> Incarnation {
        Incarnation(self.incarnation)
    }

    /// Whether the very process that was started is still there and runs this program.
    #[must_use]
    pub fn lives(&self) -> bool {
        self.pid != 0
            && started_ticks(self.pid).is_ok_and(|ticks| ticks == self.started_ticks)
            && same_program(self.pid).unwrap_or(false)
    }

    /// Writes it in one piece.
    pub(super) fn write(&self, folder: &Path) -> io::Result<()> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join(format!("worker-{}.json", self.worker));
        let fresh = path.with_extension("json.new");
        std::fs::File::create(&fresh)?.write_all(&serde_json::to_vec(self)?)?;
        std::fs::rename(&fresh, &path)
    }
}

/// Every worker's newest life, in order. Files that hold no entry are left out: their workers begin anew.
///
/// # Errors
/// If the folder is there and cannot be read.
pub fn read(folder: &Path) -> io::Result<Vec<Entry>> {
    let files = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        files => files?,
    };
    let mut entries = Vec::new();
    for file in files {
        let path = file?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            match serde_json::from_slice::<Entry>(&std::fs::read(&path)?) {
                Ok(entry) => entries.push(entry),
                Err(error) => tracing::warn!(%error, path = %path.display(), "no record of a rank process"),
            }
        }
    }
    entries.sort_by_key(|entry| entry.worker);
    Ok(entries)
}

/// When a process was started (proc(5), field 22 of `stat`; the second field may hold spaces and parentheses). A zombie
/// has ended.
pub(super) fn started_ticks(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let mut fields = after_name.split_whitespace();
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "no start time in /proc");
    if matches!(fields.next(), Some("Z" | "X") | None) {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the process has ended"));
    }
    fields
        .nth(18)
        .and_then(|ticks| ticks.parse().ok())
        .ok_or_else(malformed)
}

fn same_program(pid: u32) -> io::Result<bool> {
    let theirs = std::fs::metadata(format!("/proc/{pid}/exe"))?;
    let ours = std::fs::metadata("/proc/self/exe")?;
    Ok((theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Entry {
        let pid = std::process::id();
        Entry {
            worker: 3,
            incarnation: 2,
            pid,
            started_ticks: started_ticks(pid).expect("this process runs"),
            log_start: 0,
        }
    }

    /// A pid alone proves nothing.
    #[test]
    fn only_the_very_process_counts_as_alive() {
        let own = own();
        assert!(own.lives());
        let reused = Entry {
            started_ticks: own.started_ticks + 1,
            ..own.clone()
        };
        assert!(!reused.lives(), "another process of that number");
        let init = Entry {
            pid: 1,
            started_ticks: started_ticks(1).unwrap_or_default(),
            ..own.clone()
        };
        assert!(!Entry { pid: 0, ..own }.lives(), "never started");
        assert!(!init.lives(), "another program");
    }

    #[test]
    fn entries_come_back_as_written_and_rubbish_is_left_out() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(read(&folder.path().join("ranks")).expect("nothing yet"), []);
        own().write(folder.path()).expect("written");
        std::fs::write(folder.path().join("worker-9.json"), "{\"worker\":").expect("written");
        assert_eq!(read(folder.path()).expect("read"), [own()]);
    }
}
