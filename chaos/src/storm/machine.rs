//! What the machine gives and takes: a small disk that can be full, and memory that runs out.
//!
//! Both have a way that needs root and one that every user has. Which one a storm took is part of its report.

use super::processes::limit;
use rustix::fs::{FallocateFlags, statvfs};
use rustix::io::Errno;
use rustix::process::Resource;
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bytes that a rank may still have in its cage: fewer than the kernel needs for its next page table.
const CAGE_BYTES: u64 = 64 * 1024;
/// Address space left to a rank where there are no cages: less than any rank has.
const ADDRESS_SPACE_BYTES: u64 = 1024 * 1024;

/// The disk under a run folder.
#[derive(Debug)]
pub struct Disk {
    folder: PathBuf,
    mounted: bool,
}

impl Disk {
    /// A disk in memory of this size, mounted at `folder`; the folder itself, on whatever disk it is, where mounting is
    /// refused.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn mount(folder: &Path, mebibytes: u64) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let size = format!("size={mebibytes}m,mode=700");
        let mounting = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tarazed-storm"])
            .arg(folder)
            .output();
        Ok(Self {
            folder: folder.to_owned(),
            mounted: mounting.is_ok_and(|output| output.status.success()),
        })
    }

    /// Whether it is a disk of its own.
    #[must_use]
    pub const fn is_own(&self) -> bool {
        self.mounted
    }

    /// Its folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// By what means it is filled.
    #[must_use]
    pub const fn means(&self) -> &'static str {
        if self.mounted {
            "ballast on a tmpfs"
        } else {
            "RLIMIT_FSIZE 0 (mounting a tmpfs was refused)"
        }
    }

    fn ballast(&self) -> PathBuf {
        self.folder.join("ballast")
    }

    /// No byte more can be written by these processes.
    ///
    /// # Errors
    /// If it cannot be filled.
    pub fn fill(&self, processes: &[u32]) -> Result<()> {
        if !self.mounted {
            return processes
                .iter()
                .try_for_each(|&process| limit(process, Resource::Fsize, Some(0)));
        }
        let file = File::create(self.ballast())?;
        // What is freed meanwhile is taken too; pages are taken one at a time in the end.
        let mut length = 0;
        let mut piece = statvfs(&self.folder).map(|found| found.f_bavail * found.f_frsize);
        while let Ok(bytes) = piece.as_mut().map_err(|e| *e).map(|bytes| *bytes)
            && bytes >= 4096
        {
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), length, bytes) {
                Ok(()) => length += bytes,
                Err(_) => piece = Ok(bytes / 2),
            }
        }
        piece.map(drop).map_err(Error::from)
    }

    /// Makes room again. Limits on processes end with them.
    pub fn free(&self) {
        // Nothing is there where nothing was filled.
        let _ = std::fs::remove_file(self.ballast());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.mounted {
            // A file that is still open keeps the memory until it is closed; the folder is free at once.
            let _ = Command::new("umount").arg("-l").arg(&self.folder).output();
        }
    }
}

/// A control group whose memory is so small that the kernel ends whoever is put into it.
#[derive(Debug)]
pub struct Cage {
    folder: Option<PathBuf>,
    refused: String,
}

impl Cage {
    /// Makes it, below the group of this process.
    #[must_use]
    pub fn build(name: &str) -> Self {
        match build(name) {
            Ok(folder) => Self {
                folder: Some(folder),
                refused: String::new(),
            },
            Err(refused) => Self { folder: None, refused },
        }
    }

    /// By what means memory runs out.
    #[must_use]
    pub fn means(&self) -> String {
        match &self.folder {
            Some(_) => "the kernel's OOM killer, in a memory control group".to_owned(),
            None => format!("RLIMIT_AS (no control group: {})", self.refused),
        }
    }

    /// Takes a process's memory away.
    ///
    /// # Errors
    /// If the process has ended or the system refuses.
    pub fn put(&self, process: u32) -> Result<()> {
        let Some(folder) = &self.folder else {
            return limit(process, Resource::As, Some(ADDRESS_SPACE_BYTES));
        };
        let moved = std::fs::write(folder.join("cgroup.procs"), process.to_string());
        moved.map_err(|e| match Errno::from_io_error(&e) {
            Some(Errno::SRCH) => ErrorKind::NotFound.into(),
            _ => e,
        })
    }

    /// Gives a process its memory back.
    pub fn free(&self, process: u32) {
        // One that has ended meanwhile needs none.
        match self.folder.as_ref().and_then(|folder| folder.parent()) {
            Some(parent) => drop(std::fs::write(parent.join("cgroup.procs"), process.to_string())),
            None => drop(limit(process, Resource::As, None)),
        }
    }

    /// Processes that the kernel has ended in it so far; none where there is no such count.
    #[must_use]
    pub fn kills(&self) -> Option<u64> {
        let folder = self.folder.as_ref()?;
        let text = ["memory.oom_control", "memory.events"].map(|name| std::fs::read_to_string(folder.join(name)).ok());
        let text = text.into_iter().flatten().next()?;
        text.lines()
            .find_map(|line| line.strip_prefix("oom_kill "))?
            .parse()
            .ok()
    }
}

impl Drop for Cage {
    fn drop(&mut self) {
        if let Some(folder) = &self.folder {
            // A group that still has a process stays, empty of memory, until a reboot.
            let _ = std::fs::remove_dir(folder);
        }
    }
}

fn build(name: &str) -> std::result::Result<PathBuf, String> {
    let own = std::fs::read_to_string("/proc/self/cgroup").map_err(|e| e.to_string())?;
    let of = |controller: &str| {
        own.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let named = controllers.split(',').any(|found| found == controller);
            named.then(|| path.trim_start_matches('/').to_owned())
        })
    };
    let (root, path, limit) = match of("memory") {
        Some(path) => ("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes"),
        None => ("/sys/fs/cgroup", of("").ok_or("no memory control group")?, "memory.max"),
    };
    let folder = Path::new(root).join(path).join(name);
    std::fs::create_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let limited = std::fs::write(folder.join(limit), CAGE_BYTES.to_string());
    limited.map_err(|e| {
        // Without its limit it would be no cage.
        let _ = std::fs::remove_dir(&folder);
        format!("{limit}: {e}")
    })?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_full_disk_takes_no_byte_and_a_freed_one_does() {
        let folder = tempfile::tempdir().expect("a folder");
        let disk = Disk::mount(&folder.path().join("disk"), 8).expect("a folder");
        if !disk.is_own() {
            let checks_all = ["CI", "TARAZED_CI"].iter().any(|name| std::env::var_os(name).is_some());
            let may_mount = rustix::process::geteuid().is_root();
            assert!(
                !checks_all || !may_mount,
                "root cannot mount here, so nothing is checked"
            );
            eprintln!("skipped: mounting is refused here, {}", disk.means());
            return;
        }
        let mut file = File::create(disk.folder().join("file")).expect("a file");
        disk.fill(&[]).expect("filled");
        assert!(file.write_all(&[1; 8192]).is_err());
        disk.free();
        file.write_all(&[1; 8192]).expect("room");
    }

    #[test]
    fn memory_runs_out_by_one_means_or_the_other() {
        let cage = Cage::build(&format!("tarazed-storm-test-{}", std::process::id()));
        // A shell that needs ever more.
        let mut child = Command::new("sh")
            .args(["-c", "x=0123456789; while :; do x=\"$x$x\"; done"])
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("a shell");
        cage.put(child.id()).expect("put in");
        let status = child.wait().expect("waited for");
        assert!(!status.success(), "{}", cage.means());
        assert!(cage.kills().is_none_or(|kills| kills >= 1), "{}", cage.means());
    }
}
