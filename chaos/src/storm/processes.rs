//! The rank processes of one run folder, found in `/proc` by their command line and harmed through a descriptor of their own.
//!
//! A signal goes through a pidfd that is opened before the command line is looked at: it can never reach a process that got
//! the number later.

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal, getrlimit, pidfd_open, pidfd_send_signal, prlimit};
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// One living rank process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Rank {
    /// The slot it fills.
    pub worker: u32,
    /// Which life of it.
    pub incarnation: u32,
    /// Its process id.
    pub pid: u32,
}

/// The processes of a run folder, whether or not its controller lives.
#[derive(Clone, Debug)]
pub struct Processes {
    run_dir: PathBuf,
}

/// A process that signals reach, and only it.
#[derive(Debug)]
pub struct Handle(OwnedFd);

impl Handle {
    /// Sends a signal; false where the process has ended.
    pub fn signal(&self, signal: Signal) -> bool {
        pidfd_send_signal(self.0.as_fd(), signal).is_ok()
    }
}

impl Processes {
    /// Of the run in `run_dir`, as its controller was told it.
    #[must_use]
    pub fn of(run_dir: &Path) -> Self {
        Self {
            run_dir: run_dir.to_owned(),
        }
    }

    /// All living ranks, by worker.
    #[must_use]
    pub fn ranks(&self) -> Vec<Rank> {
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let mut ranks: Vec<Rank> = pids.filter_map(|pid| self.look(pid)).collect();
        ranks.sort_unstable();
        ranks
    }

    fn look(&self, pid: u32) -> Option<Rank> {
        let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words: Vec<_> = bytes.split(|&byte| byte == 0).map(String::from_utf8_lossy).collect();
        let after = |option: &str| words.windows(2).find(|pair| pair[0] == option).map(|pair| &pair[1]);
        if words.get(1)? != "rank" || **after("--run-dir")? != *self.run_dir.to_string_lossy() {
            return None;
        }
        Some(Rank {
            worker: after("--worker")?.parse().ok()?,
            incarnation: after("--incarnation")?.parse().ok()?,
            pid,
        })
    }

    /// A handle of exactly this life; none where it has ended.
    #[must_use]
    pub fn handle(&self, rank: Rank) -> Option<Handle> {
        let process = pidfd_open(pid(rank.pid)?, PidfdFlags::empty()).ok()?;
        (self.look(rank.pid) == Some(rank)).then_some(Handle(process))
    }

    /// Sends a signal to exactly this life; false where it has ended.
    pub fn signal(&self, rank: Rank, signal: Signal) -> bool {
        self.handle(rank).is_some_and(|handle| handle.signal(signal))
    }

    /// SIGKILL to whatever is left; how many were hit.
    pub fn kill_all(&self) -> usize {
        let ranks = self.ranks().into_iter();
        ranks.filter(|&rank| self.signal(rank, Signal::KILL)).count()
    }

    /// The worker whose process holds the socket that this loopback port is bound to.
    #[must_use]
    pub fn owner_of_port(&self, port: u16) -> Option<Rank> {
        let wanted = format!("socket:[{}]", inode_of_port(port)?);
        self.ranks().into_iter().find(|rank| {
            let entries = std::fs::read_dir(format!("/proc/{}/fd", rank.pid))
                .into_iter()
                .flatten();
            let mut links = entries
                .flatten()
                .filter_map(|entry| std::fs::read_link(entry.path()).ok());
            links.any(|link| link.as_os_str() == wanted.as_str())
        })
    }
}

/// The socket that is bound to a port of 127.0.0.1, by its number in the kernel's table.
fn inode_of_port(port: u16) -> Option<u64> {
    let table = std::fs::read_to_string("/proc/net/tcp").ok()?;
    inode_in(&table, port)
}

fn inode_in(table: &str, port: u16) -> Option<u64> {
    let local = format!("0100007F:{port:04X}");
    // Slot, local address, remote address, state, and then some; the tenth field is the inode.
    let mut rows = table
        .lines()
        .skip(1)
        .map(|row| row.split_whitespace().collect::<Vec<_>>());
    let row = rows.find(|fields| fields.get(1) == Some(&local.as_str()))?;
    row.get(9)?.parse().ok().filter(|inode| *inode != 0)
}

/// A process's number in the system's type.
#[must_use]
pub fn pid(number: u32) -> Option<Pid> {
    i32::try_from(number).ok().and_then(Pid::from_raw)
}

/// Sets the soft limit of another process.
///
/// # Errors
/// If the process has ended (`NotFound`) or the system refuses.
pub fn limit(process: u32, resource: Resource, most: Option<u64>) -> std::io::Result<()> {
    let limit = Rlimit {
        current: most,
        maximum: getrlimit(resource).maximum,
    };
    match prlimit(pid(process), resource, limit) {
        Ok(_) => Ok(()),
        Err(Errno::SRCH) => Err(ErrorKind::NotFound.into()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_has_its_row_in_the_kernels_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 0100007F:1F90 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0        0 4242 1 0\n";
        assert_eq!(inode_in(table, 8080), Some(4242));
        assert_eq!(inode_in(table, 8081), None);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        assert!(inode_of_port(port).is_some());
    }

    #[test]
    fn a_stranger_is_no_rank() {
        let processes = Processes::of(Path::new("/nowhere"));
        assert!(processes.ranks().is_empty());
        let own = Rank {
            worker: 0,
            incarnation: 0,
            pid: std::process::id(),
        };
        assert!(processes.handle(own).is_none());
    }
}
