//! Device memory on its way to other processes: NCCL, and one communicator of it.
//!
//! ```text
//! data plane ── Communicator<D> ── who is inside a call, groups, memory in flight      plain Rust, tested anywhere
//!                    │
//!                  Nccl ─┬─ RealNccl        libnccl.so.2, loaded at run time            feature `cuda`
//!                        └─ RecordingNccl   ranks of one process, writes calls down     for tests
//! ```
//!
//! NCCL moves bytes here and adds nothing up: the order of its own reductions follows channels, mapping and message size
//! (DET-2). So [`Nccl`] has sends and receives, and no reduction that anybody could call.
//!
//! Communicators are non-blocking: a call returns at once, and what came of it is asked for ([`Nccl::state`]). Only so can
//! whoever waits for a peer be told to stop.
//!
//! What this does not do: it chooses no peers, keeps no time and starts no thread; the data plane does.

mod communicator;
#[cfg(feature = "cuda")]
mod real;
pub mod recording;

pub use communicator::{Communicator, CommunicatorError, Direction, Transfer};
#[cfg(feature = "cuda")]
pub use real::RealNccl;

use super::driver::{Address, StreamId};
use std::fmt;

/// The oldest NCCL whose interface is used: 2.18, by which non-blocking communicators, finalisation and remote errors are
/// there.
pub const VERSION_MIN: u32 = 21_800;
/// Bytes of [`UniqueId`].
pub const UNIQUE_ID_BYTES: usize = 128;
/// Sends and receives between a group's start and its end: NCCL's user guide, "Group Calls", allows 2,048 operations.
pub const GROUP_CALLS_MAX: usize = 2_048;
/// Bytes of one send or receive. NCCL itself has no such limit; a longer message is cut, so that no group takes longer than
/// it takes to notice that a peer has died.
pub const CALL_BYTES_MAX: usize = 1 << 30;

/// What the members of a communicator find each other by; made by one of them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UniqueId(pub [u8; UNIQUE_ID_BYTES]);

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It lets its holder into the communicator.
        f.write_str("UniqueId(…)")
    }
}

/// A communicator as the library knows it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct CommunicatorId(pub u64);

/// How far a communicator is with what it was asked for last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// It may be asked for more.
    Ready,
    /// Ask again.
    Busy,
}

/// Whose fault an error is, and so what comes next. The communicator is over in every case: none of them is retried on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// A peer or the way to it is gone: a matter of membership, not of this process.
    Peer,
    /// The system refused something, here or on a peer: another try, in a new generation, may succeed.
    System,
    /// CUDA failed in this process, or the library found its own memory inconsistent: nothing that this process holds on
    /// the device is to be trusted. It must be replaced.
    Process,
    /// The call cannot be right, whoever repeats it: a mistake in this program, or in how ranks are placed on devices.
    Usage,
}

/// Results of NCCL by their numbers (`ncclResult_t`, 2.18 to 2.30), without success (0) and "in progress" (7). One that no
/// version has yet counts as the library's own failure.
#[must_use]
pub const fn fault(code: u32) -> (Fault, &'static str) {
    match code {
        1 => (Fault::Process, "ncclUnhandledCudaError"),
        2 => (Fault::System, "ncclSystemError"),
        3 => (Fault::Process, "ncclInternalError"),
        4 => (Fault::Usage, "ncclInvalidArgument"),
        5 => (Fault::Usage, "ncclInvalidUsage"),
        6 => (Fault::Peer, "ncclRemoteError"),
        8 => (Fault::Peer, "ncclTimeout"),
        _ => (Fault::Process, "an unknown result"),
    }
}

/// A call that failed, or a communicator that did.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{call} gave {name}{}{detail}", if .detail.is_empty() { "" } else { ": " })]
pub struct NcclError {
    /// The foreign function, e.g. `ncclGroupEnd`.
    pub call: &'static str,
    /// Whose fault it is.
    pub fault: Fault,
    /// The library's name of the result.
    pub name: &'static str,
    /// Its last message, where it has one.
    pub detail: String,
}

/// Why NCCL is not used: an ordinary answer, in one line.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NcclAbsence {
    /// It is not on this machine.
    #[error("libnccl.so.2 is not there")]
    Library,
    /// It lacks a function that is called.
    #[error("libnccl.so.2 has no {symbol}")]
    Symbol {
        /// Its name.
        symbol: &'static str,
    },
    /// It is older than the interface used.
    #[error("libnccl.so.2 is {}, and {} is needed", version_text(*.version), version_text(VERSION_MIN))]
    TooOld {
        /// Its version, as [`Nccl::version`] has it.
        version: u32,
    },
    /// It is there and does not answer.
    #[error("libnccl.so.2 cannot be used: {0}")]
    Failed(#[from] NcclError),
}

/// A version as people write it: 22809 is 2.28.9.
#[must_use]
pub fn version_text(version: u32) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// The library, as far as it is used. All calls return at once, but for those that give a communicator back.
///
/// A thread is inside at most one call; [`Communicator`] sees to it that no two threads call for one communicator.
pub trait Nccl: Send + Sync + 'static {
    /// Its version: 22809 is 2.28.9.
    fn version(&self) -> u32;

    /// A fresh id, for one communicator.
    ///
    /// # Errors
    /// As every call: a [`NcclError`].
    fn unique_id(&self) -> Result<UniqueId, NcclError>;

    /// Begins to build a communicator of `ranks` members, non-blocking, on the calling thread's current device. Where one
    /// came to be, also on an error, it is in `made`, and must be given back.
    ///
    /// # Errors
    /// A [`NcclError`].
    fn init(&self, id: &UniqueId, ranks: u32, rank: u32, made: &mut Option<CommunicatorId>) -> Result<(), NcclError>;

    /// How far it is, or why it failed.
    ///
    /// # Errors
    /// A [`NcclError`], also of work that was asked for long before.
    fn state(&self, communicator: CommunicatorId) -> Result<State, NcclError>;

    /// What this thread asks for from now on, until the group's end, progresses together.
    ///
    /// # Errors
    /// A [`NcclError`]; there is no group then.
    fn group_start(&self) -> Result<(), NcclError>;

    /// Ends the group, whatever comes of it.
    ///
    /// # Errors
    /// A [`NcclError`].
    fn group_end(&self) -> Result<(), NcclError>;

    /// Sends bytes, in a queue's order.
    ///
    /// # Safety
    /// The range is allocated on the communicator's device until the queue is idle or the communicator is given back.
    ///
    /// # Errors
    /// A [`NcclError`].
    unsafe fn send(
        &self,
        communicator: CommunicatorId,
        to: u32,
        from: Address,
        bytes: usize,
        stream: StreamId,
    ) -> Result<(), NcclError>;

    /// Receives bytes, in a queue's order.
    ///
    /// # Safety
    /// As [`Nccl::send`], and nobody else reads or writes the range meanwhile.
    ///
    /// # Errors
    /// A [`NcclError`].
    unsafe fn receive(
        &self,
        communicator: CommunicatorId,
        from: u32,
        to: Address,
        bytes: usize,
        stream: StreamId,
    ) -> Result<(), NcclError>;

    /// Begins to leave in good order; done when [`Nccl::state`] says so.
    ///
    /// # Errors
    /// A [`NcclError`].
    fn finalize(&self, communicator: CommunicatorId) -> Result<(), NcclError>;

    /// Gives a finalised communicator back. May wait.
    ///
    /// # Errors
    /// A [`NcclError`].
    fn destroy(&self, communicator: CommunicatorId) -> Result<(), NcclError>;

    /// Ends what is under way and gives the communicator back. May wait, and in some versions for ever.
    ///
    /// # Errors
    /// A [`NcclError`].
    fn abort(&self, communicator: CommunicatorId) -> Result<(), NcclError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_result_has_an_owner() {
        for (code, owner) in [
            (1, Fault::Process),
            (2, Fault::System),
            (3, Fault::Process),
            (4, Fault::Usage),
            (5, Fault::Usage),
            (6, Fault::Peer),
            (8, Fault::Peer),
            (77, Fault::Process),
        ] {
            assert_eq!(fault(code).0, owner, "{code}");
        }
    }

    #[test]
    fn absence_and_errors_are_one_clear_line() {
        assert_eq!(
            NcclAbsence::TooOld { version: 21_602 }.to_string(),
            "libnccl.so.2 is 2.16.2, and 2.18.0 is needed"
        );
        let mut error = NcclError {
            call: "ncclGroupEnd",
            fault: Fault::Peer,
            name: "ncclRemoteError",
            detail: String::new(),
        };
        assert_eq!(error.to_string(), "ncclGroupEnd gave ncclRemoteError");
        error.detail = "socket closed".to_owned();
        assert_eq!(error.to_string(), "ncclGroupEnd gave ncclRemoteError: socket closed");
    }
}
