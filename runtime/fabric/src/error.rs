//! What can go wrong on the data plane, and what the caller does next.

use crate::Tag;
use tarazed_domain::{Generation, Rank};
use thiserror::Error;

/// What the caller does about a [`FabricError`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Remedy {
    /// Nothing: the mesh was given up on purpose.
    Fenced,
    /// Report the named peer; the generation ends and the next one leaves it out, or takes it in again.
    Reconfigure,
    /// Another try may succeed without any change of the roster.
    Retry,
    /// This process must end and be replaced: what it holds on its device is not to be trusted, or cannot be let go of.
    Replace,
    /// Two binaries, configs or programs disagree, or the machine refuses: a person is needed.
    Halt,
}

/// What a failed communicator of GPUs means for the ranks of it. It is over in every case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CommunicatorFault {
    /// A peer or the way to it is gone, and nobody says which.
    Peer,
    /// The system refused something, here or on a peer.
    System,
    /// This process is broken.
    Process,
    /// It can never work like this.
    Usage,
}

impl CommunicatorFault {
    const fn advice(self) -> &'static str {
        match self {
            Self::Peer => "a peer is gone or hangs; reconfigure",
            Self::System => "reconfigure; look at limits on files, locked and shared memory (`/dev/shm`) if it recurs",
            Self::Process => "this process must be replaced",
            Self::Usage => {
                "set cluster.collective to \"sockets\", or give each rank a GPU of its own and the same NCCL"
            }
        }
    }
}

/// In which way received bytes were wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum Corruption {
    /// The header does not begin with the magic number.
    #[error("no frame header where one must be")]
    Magic,
    /// The header's own checksum does not match.
    #[error("the header's checksum does not match")]
    HeaderChecksum,
    /// The header's checksum matches, but a field has no meaning.
    #[error("a header field has no meaning")]
    Field,
    /// The payload's checksum does not match.
    #[error("the payload's checksum does not match")]
    PayloadChecksum,
    /// The frame is addressed to another rank, or says it is from another one.
    #[error("the frame belongs to another pair of ranks")]
    Misrouted,
    /// The frame is of another generation.
    #[error("the frame is of another generation (SUP-2)")]
    Generation,
    /// A frame was repeated or is missing.
    #[error("the frame is a repetition, or one before it is missing")]
    Sequence,
    /// The payload is longer than the limit or than the message has bytes left.
    #[error("the payload is longer than allowed")]
    Oversized,
}

/// A failed operation of the data plane. Each variant says whom to blame and what comes next.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum FabricError {
    /// The mesh was aborted, or left; its generation is over for this rank.
    #[error("aborted: generation {generation} is over for this rank")]
    Aborted {
        /// The generation that is over.
        generation: Generation,
    },
    /// The connection to a peer is closed or broken.
    #[error("rank {peer} is lost ({cause}); reconfigure without it")]
    PeerLost {
        /// Who is lost.
        peer: Rank,
        /// How it was seen.
        cause: String,
    },
    /// A peer moved no byte for the whole time allowed.
    #[error("rank {peer} made no progress for {waited_ms} ms in {tag}; reconfigure without it if it hangs")]
    TimedOut {
        /// Whom this rank waited for. It may itself be waiting for another one: the reports of all ranks together tell.
        peer: Rank,
        /// How long, in milliseconds.
        waited_ms: u64,
        /// The message that was due.
        tag: Tag,
    },
    /// Bytes from a peer are not what it sent.
    #[error("corrupt bytes from rank {peer} in {tag}: {corruption}; reconfigure, and check the network if it recurs")]
    Corrupt {
        /// From whom.
        peer: Rank,
        /// The message that was due.
        tag: Tag,
        /// In which way.
        corruption: Corruption,
    },
    /// A peer sent another message than the one that is due: the programs of the two ranks differ.
    #[error("rank {peer} sent {received} where {expected} was due; the ranks do not run the same program")]
    TagMismatch {
        /// From whom.
        peer: Rank,
        /// What was due.
        expected: Tag,
        /// What came.
        received: Tag,
    },
    /// A peer's message is longer or shorter than expected.
    #[error(
        "rank {peer} sent {received} bytes for {tag} where {expected} were due; the ranks do not agree on the layout"
    )]
    LengthMismatch {
        /// From whom.
        peer: Rank,
        /// Of which message.
        tag: Tag,
        /// Bytes expected.
        expected: u64,
        /// Bytes announced.
        received: u64,
    },
    /// This rank is behind: a peer is already in a newer generation.
    #[error("generation {ours} is over: rank {peer} is in generation {theirs}; wait for the new roster")]
    StaleGeneration {
        /// Who said so.
        peer: Rank,
        /// The generation this rank tried to build.
        ours: Generation,
        /// The generation the peer is in.
        theirs: Generation,
    },
    /// A peer refused this rank, or could not prove who it is.
    #[error("rank {peer} at {address}: {reason}")]
    Refused {
        /// Which peer.
        peer: Rank,
        /// Where it was looked for.
        address: String,
        /// Cause and remedy.
        reason: String,
    },
    /// Not all peers were connected in time.
    #[error(
        "no connection with rank(s) {missing:?} within {waited_ms} ms (last cause: {cause}); reconfigure without them"
    )]
    ConnectTimedOut {
        /// The ranks that are missing.
        missing: Vec<Rank>,
        /// How long, in milliseconds.
        waited_ms: u64,
        /// The last thing that went wrong.
        cause: String,
    },
    /// The communicator of the GPUs failed.
    #[error("data plane of the GPUs: {cause}; {}", .fault.advice())]
    Communicator {
        /// What it means.
        fault: CommunicatorFault,
        /// What went wrong.
        cause: String,
    },
    /// An address or a socket folder cannot be used as written.
    #[error("address {address}: {reason}")]
    Address {
        /// The address as given.
        address: String,
        /// Cause and remedy.
        reason: String,
    },
    /// The operating system refused a call on this machine.
    #[error("{call} failed on this machine: {cause}")]
    System {
        /// Which call.
        call: &'static str,
        /// What it said.
        cause: String,
    },
}

impl FabricError {
    /// What the caller does next.
    #[must_use]
    pub const fn remedy(&self) -> Remedy {
        match self {
            Self::Aborted { .. } | Self::StaleGeneration { .. } => Remedy::Fenced,
            Self::PeerLost { .. } | Self::TimedOut { .. } | Self::Corrupt { .. } | Self::ConnectTimedOut { .. } => {
                Remedy::Reconfigure
            }
            Self::System { .. } => Remedy::Retry,
            Self::Communicator { fault, .. } => match fault {
                CommunicatorFault::Peer | CommunicatorFault::System => Remedy::Reconfigure,
                CommunicatorFault::Process => Remedy::Replace,
                CommunicatorFault::Usage => Remedy::Halt,
            },
            Self::TagMismatch { .. } | Self::LengthMismatch { .. } | Self::Refused { .. } | Self::Address { .. } => {
                Remedy::Halt
            }
        }
    }

    /// The peer to blame, if one is.
    #[must_use]
    pub const fn peer(&self) -> Option<Rank> {
        match self {
            Self::PeerLost { peer, .. }
            | Self::TimedOut { peer, .. }
            | Self::Corrupt { peer, .. }
            | Self::TagMismatch { peer, .. }
            | Self::LengthMismatch { peer, .. }
            | Self::StaleGeneration { peer, .. }
            | Self::Refused { peer, .. } => Some(*peer),
            Self::Aborted { .. }
            | Self::ConnectTimedOut { .. }
            | Self::Communicator { .. }
            | Self::Address { .. }
            | Self::System { .. } => None,
        }
    }

    pub(crate) fn system(call: &'static str, cause: impl std::fmt::Display) -> Self {
        Self::System {
            call,
            cause: cause.to_string(),
        }
    }

    pub(crate) fn lost(peer: Rank, cause: impl std::fmt::Display) -> Self {
        Self::PeerLost {
            peer,
            cause: cause.to_string(),
        }
    }
}
