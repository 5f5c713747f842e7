//! Seeing the end of a killed process when it begins, and not when the system has cleared it away.
//!
//! A pidfd tells of an end once every thread has died and memory is given back. On a machine whose cores all compute, threads
//! that want the processor must each be given some to die with: 20 to 40 ms on two cores. A
//! thread that sleeps is woken by SIGKILL at once, so each rank has one that does nothing else: the *lifeline*. It alone, in a
//! table of files of its own, holds the writing end of a pipe, which came as the process's standard input; when it dies the
//! table goes, and the agent reads the pipe's end (p50 0.3 ms on the same machine).
//!
//! One byte says that it holds, so that a process without one (an old kernel, a sandbox) is not taken for a dead one. Another says
//! that the process ends by itself: then it has last words on other ways, which an early report would overtake. A process that a later
//! agent adopts has its pipe at the one that is gone: its end is seen by the pidfd.

use rustix::fd::OwnedFd;
use std::fs::OpenOptions;
use std::io;
use std::process::Stdio;
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe::Receiver;

/// Argument of a rank whose standard input is a lifeline.
pub(super) const FLAG: &str = "--lifeline";

const HOLDS: u8 = b'h';
const LEAVES: u8 = b'l';

/// The rank's end. Dropping it says that the process ends by itself.
#[derive(Debug)]
pub struct Lifeline {
    /// Dropped to wake the thread.
    leave: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Lifeline {
    /// Takes standard input for the pipe of an agent (`--lifeline` says that it is one), and leaves `/dev/null` in its place.
    /// Where the system refuses what it needs, the process is as it would be without.
    #[must_use]
    pub fn hold() -> Self {
        let (leave, left) = mpsc::channel();
        let (ready, made) = mpsc::channel();
        let body = move || {
            let alone = be_alone_with_stdin();
            let holds = alone.is_ok() && say(HOLDS);
            // An error means that the process ends already.
            let _ = ready.send(alone);
            // Ends, with an error, when the other end is dropped.
            if holds && left.recv().is_err() {
                say(LEAVES);
            }
        };
        let thread = std::thread::Builder::new().name("lifeline".to_owned()).spawn(body);
        let alone = match &thread {
            Ok(_) => made.recv().unwrap_or_else(|_| Err(io::Error::other("the thread died"))),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        if let Err(error) = alone.and_then(|()| stdin_from_null()) {
            tracing::debug!(%error, "no lifeline: the end of this process is seen when it is complete");
        }
        Self {
            leave: Some(leave),
            thread: thread.ok(),
        }
    }
}

impl Drop for Lifeline {
    fn drop(&mut self) {
        drop(self.leave.take());
        if let Some(thread) = self.thread.take() {
            // It cannot panic, and there is nothing to do if it did.
            let _ = thread.join();
        }
    }
}

/// Gives the calling thread a table of files of its own, with standard input as its only one, and lets it hear no signal: a
/// handler may write to a file that is not in there.
fn be_alone_with_stdin() -> io::Result<()> {
    // SAFETY: a signal set is plain data that `sigfillset` writes whole; the mask is this thread's alone, which runs no code
    // that waits for a signal.
    let blocked = unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut())
    };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    // SAFETY: takes three integers. Files are closed in the new table only; this thread holds none of them and opens none.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 1_u32, u32::MAX, libc::CLOSE_RANGE_UNSHARE) };
    if closed == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether it could be said.
fn say(byte: u8) -> bool {
    // Nobody listens once the agent is gone; a rank outlives it.
    rustix::io::write(rustix::stdio::stdin(), &[byte]).is_ok_and(|written| written == 1)
}

/// From here on the lifeline's thread alone holds the pipe.
fn stdin_from_null() -> io::Result<()> {
    let null = OpenOptions::new().read(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(())
}

/// The agent's end.
#[derive(Debug)]
pub(super) struct Watcher(OwnedFd);

impl Watcher {
    /// The agent's end, and what becomes the process's standard input. No child inherits either by accident.
    pub fn new() -> io::Result<(Self, Stdio)> {
        let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        Ok((Self(ours), theirs.into()))
    }

    /// Returns when the process has begun to end without having said so; never, where it holds no lifeline or leaves by itself.
    /// Must be called within a tokio runtime.
    pub async fn unannounced_end(self) {
        if !self.holder_dies().await.unwrap_or(false) {
            std::future::pending::<()>().await;
        }
    }

    /// Whether the pipe ended between the byte for "holds" and the one for "leaves".
    async fn holder_dies(self) -> io::Result<bool> {
        let mut pipe = Receiver::from_owned_fd(self.0)?;
        let (mut held, mut bytes) = (false, [0; 8]);
        loop {
            match pipe.read(&mut bytes).await? {
                0 => return Ok(held),
                some => held = bytes[some - 1] == HOLDS,
            }
        }
    }
}
