//! The node agent: starts, watches and kills the rank processes of one machine.
//!
//! It acts and reports; it decides nothing. Whether, when and how often a worker is started again (back-off, the
//! SUP-3 budget) is the membership machine's decision in `tarazed-protocol`.
//!
//! Invariants
//! - **SUP-1** One `RankProcess` actor stands for each living process, as a child of the agent. If it dies, its process
//!   is killed and the agent reports [`ExitCause::Unsupervised`] with the root cause.
//! - **SUP-2** A worker has at most one life. Starting an incarnation that is not newer than the last one, or while
//!   another lives, is refused and counted; so is killing an incarnation that does not live.
//! - **SUP-4** Spawning and reading logs run on the blocking pool, never in a handler.
//! - **NODE-1** Every `Start` is answered by exactly one `StartFailed`, or one `Started` and later one `Exited`; between
//!   these at most one `Ending`.
//! - **NODE-2** No process is left behind and none becomes a zombie: signals go through a pidfd (a pid may be reused, a
//!   pidfd is not), each rank leads a process group that ends with it, and each is reaped. This holds for an orderly
//!   stop, a killed agent and a panic; if the whole controller process dies, a rank notices by its lost uplink, waits for
//!   another controller, and ends itself where none comes.
//!
//! Ranks are *not* killed by the kernel when the controller dies (no PDEATHSIG): the next agent finds them in the
//! [`registry`] and watches them as its own, but for their exit codes, which only a parent learns. Their output goes straight into a file, so a slow or dead controller never blocks a rank
//! that prints. The file is not rotated.

mod agent;
mod environment;
pub mod host;
mod lifeline;
mod process;
mod rank_process;
pub mod registry;
#[cfg(test)]
mod tests;

pub use agent::{NodeAgent, start_node_agent};
pub use lifeline::Lifeline;

use crate::run_folder::Tenure;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tarazed_domain::{Incarnation, WorkerId};

/// How rank processes are started: `program args… --worker N --incarnation M`, and `--lifeline` where `lifeline` says so.
#[derive(Clone, Debug)]
pub struct LaunchSpec {
    /// The program.
    pub program: PathBuf,
    /// What `ps` calls it.
    pub shown_as: PathBuf,
    /// Arguments before the two that name the worker. They show in `ps`: pass secrets in `env`.
    pub args: Vec<OsString>,
    /// Variables added to the inherited environment, in which `TARAZED_RANK_NAME` is `NAME` for ranks.
    pub env: Vec<(OsString, OsString)>,
    /// They may share GPUs (`cluster.share_gpus`).
    pub share_gpus: bool,
    /// The program holds a [`Lifeline`]: an end that it did not announce is reported when it begins.
    pub lifeline: bool,
    /// Output goes to `worker-N.log` in here, after that of earlier incarnations. Created if missing.
    pub log_dir: PathBuf,
    /// Who was started is written down in here, for an agent that comes after this one. Created if missing.
    pub registry: PathBuf,
    /// Nobody is started or killed once this is lost: the processes are another agent's then. Without one they are this
    /// agent's alone.
    pub tenure: Option<Tenure>,
    /// Set where another agent takes these processes over: they are neither killed nor started any more.
    pub released: Arc<AtomicBool>,
}

impl LaunchSpec {
    /// Whether its processes are this agent's to start and to end.
    fn is_in_charge(&self) -> bool {
        !self.released.load(Ordering::SeqCst) && self.tenure.as_ref().is_none_or(Tenure::holds)
    }
}

/// What the agent is told to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NodeCommand {
    /// Start a worker's next life.
    Start {
        /// The slot.
        worker: WorkerId,
        /// Which life.
        incarnation: Incarnation,
        /// How long to wait first (back-off).
        after: Duration,
    },
    /// Watch a life that an earlier agent started; answered as a `Start` is.
    Adopt {
        /// The slot.
        worker: WorkerId,
        /// Which life.
        incarnation: Incarnation,
    },
    /// Kill one life (SIGKILL), or cancel its start.
    Kill {
        /// The slot.
        worker: WorkerId,
        /// Which life; if another one lives, nothing happens.
        incarnation: Incarnation,
        /// Told in the exit's report.
        reason: String,
    },
    /// Kill all and cancel all starts; [`NodeEvent::AllStopped`] follows when the last has ended.
    StopAll,
    /// Another agent is in charge of these processes: forget them, kill none. Nothing is reported any more.
    LetGo,
}

/// What the agent reports, from one actor and in order.
#[derive(Debug)]
pub enum NodeEvent {
    /// The process runs.
    Started {
        /// The slot.
        worker: WorkerId,
        /// Which life.
        incarnation: Incarnation,
        /// Its process id.
        pid: u32,
    },
    /// The process has begun to end without announcing it: it was killed, or crashed. `Exited` follows when it is gone.
    Ending {
        /// The slot.
        worker: WorkerId,
        /// Which life.
        incarnation: Incarnation,
        /// The reason given with [`NodeCommand::Kill`], if this agent killed it.
        killed: Option<String>,
    },
    /// The process ended and has been reaped.
    Exited {
        /// The slot.
        worker: WorkerId,
        /// Which life.
        incarnation: Incarnation,
        /// How and why.
        exit: Exit,
    },
    /// The process did not come to be.
    StartFailed {
        /// The slot.
        worker: WorkerId,
        /// Which life.
        incarnation: Incarnation,
        /// Why, and what to do.
        error: StartError,
    },
    /// After [`NodeCommand::StopAll`]: no process is left.
    AllStopped,
    /// Nobody watches these workers' processes: what becomes of them is told when their node is back. Of a run on several hosts.
    NodeAway {
        /// Which node.
        node: u32,
        /// Its workers.
        workers: Range<u32>,
    },
    /// Somebody does again.
    NodeBack {
        /// Which node.
        node: u32,
    },
}

/// What is known of a [`NodeEvent::Ending`].
#[must_use]
pub fn why_ending(killed: Option<String>) -> String {
    killed.map_or_else(
        || "its process was killed, or crashed".to_owned(),
        |reason| format!("killed: {reason}"),
    )
}

/// How a process ended.
#[derive(Clone, Debug)]
pub struct Exit {
    /// Code or signal.
    pub cause: ExitCause,
    /// The reason given with [`NodeCommand::Kill`], if this agent killed it.
    pub killed: Option<String>,
    /// Last lines that this life wrote, oldest first (at most [`EXIT_TAIL_LINES_MAX`]).
    ///
    /// [`EXIT_TAIL_LINES_MAX`]: tarazed_domain::limits::EXIT_TAIL_LINES_MAX
    pub tail: Vec<String>,
    /// Where the rest is.
    pub log: PathBuf,
    /// When the end was seen.
    pub at: Instant,
    /// How long it ran.
    pub ran: Duration,
}

/// The system's word on how a process ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ExitCause {
    /// It returned this exit code.
    Code(i32),
    /// A signal of this number ended it.
    Signal(i32),
    /// Its supervising actor died, for this reason; the process was killed with it.
    Unsupervised(String),
    /// It ended, and only the process that started it could learn how.
    Unknown,
    /// As its node tells it.
    OnNode {
        /// How, with its last words.
        words: String,
        /// By itself, with code 0.
        orderly: bool,
    },
}

impl ExitCause {
    /// Whether it ended by itself with code 0.
    #[must_use]
    pub const fn is_orderly(&self) -> bool {
        matches!(self, Self::Code(0) | Self::OnNode { orderly: true, .. })
    }
}

impl fmt::Display for ExitCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(number) => match signal_name(*number) {
                Some(name) => write!(f, "signal {number} ({name})"),
                None => write!(f, "signal {number}"),
            },
            Self::Unsupervised(cause) => write!(f, "killed because its supervisor died: {cause}"),
            Self::Unknown => write!(f, "ended; an earlier controller started it, so how is not known,"),
            Self::OnNode { words, .. } => f.write_str(words),
        }
    }
}

/// The signals that end ranks in practice.
fn signal_name(number: i32) -> Option<&'static str> {
    Some(match number {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        15 => "SIGTERM",
        _ => return None,
    })
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if matches!(self.cause, ExitCause::OnNode { .. }) {
            return write!(f, "{}", self.cause);
        }
        write!(f, "{} after {} ms", self.cause, self.ran.as_millis())?;
        if let Some(reason) = &self.killed {
            write!(f, "; killed: {reason}")?;
        }
        if !self.tail.is_empty() {
            write!(
                f,
                "; its last words ({}):\n  {}",
                self.log.display(),
                self.tail.join("\n  ")
            )?;
        }
        Ok(())
    }
}

/// Why a process did not start, by what to do next.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It can never work like this: change the settings.
    #[error("cannot start {}: {what}: {source}; {remedy}", path.display())]
    Reconfigure {
        /// The program, or the log file.
        path: PathBuf,
        /// The operation.
        what: &'static str,
        /// What to change.
        remedy: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The machine is short of something: try again later.
    #[error("cannot start {}: {what}: {source}; the machine is short of processes, memory or file descriptors", path.display())]
    Retry {
        /// The program, or the log file.
        path: PathBuf,
        /// The operation.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Stale or doubled (SUP-2): the command is ignored.
    #[error("refused to start this incarnation: {0}")]
    Refused(String),
    /// Killed or stopped before it started.
    #[error("cancelled before it started: {0}")]
    Cancelled(String),
    /// Its supervising actor died first, for this reason.
    #[error("its supervisor died before it started: {0}")]
    Unsupervised(String),
    /// As its node tells it.
    #[error("{0}")]
    OnNode(String),
}

/// Starts and kills rank processes; what becomes of them comes back as [`NodeEvent`]s.
pub trait Processes: Send + Sync {
    /// Queues a command; never waits.
    ///
    /// # Errors
    /// If nobody is there to carry it out.
    fn command(&self, command: NodeCommand) -> Result<(), NodeError>;
}

impl Processes for NodeAgent {
    fn command(&self, command: NodeCommand) -> Result<(), NodeError> {
        Self::command(self, command)
    }
}

/// BLAKE3 of the program that this process runs, whatever has its name by now.
pub(crate) fn program_digest() -> io::Result<[u8; 32]> {
    let bytes = std::fs::read(OWN_PROGRAM)?;
    Ok(*blake3::hash(&bytes).as_bytes())
}

/// The file that this process runs, whatever has its name by now.
pub(crate) const OWN_PROGRAM: &str = "/proc/self/exe";

/// The agent is gone or could not start.
#[derive(Debug, thiserror::Error)]
#[error("the node agent {0}; the controller must end and start again")]
pub struct NodeError(pub(crate) String);
