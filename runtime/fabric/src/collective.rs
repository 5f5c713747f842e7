//! The trait of the data plane.
//!
//! Its shape is that of grouped point-to-point calls on a GPU communicator: all sends and receives of one
//! [`Collective::exchange`] progress together, so no order of them can deadlock. An all-gather is one such exchange.
//! No arithmetic (DET-2): whoever needs a sum receives the parts and adds them in tree order.

use crate::{AbortHandle, DevicePlane, FabricError, ProgressCounter};
use std::fmt;
use std::sync::Arc;
use tarazed_domain::{Generation, Rank};

macro_rules! tag_kinds {
    ($($(#[$doc:meta])* $name:ident = $value:literal,)*) => {
        /// What kind of message this is. The number is the wire form.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u8)]
        pub enum TagKind { $($(#[$doc])* $name = $value,)* }

        impl TagKind {
            /// Every kind, in wire order.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The kind with this wire number, if there is one.
            #[must_use]
            pub const fn from_wire(value: u8) -> Option<Self> {
                match value { $($value => Some(Self::$name),)* _ => None }
            }
        }
    };
}

tag_kinds! {
    /// A rank's maximal aligned nodes of one bucket of gradients, to the primary of its optimizer shard.
    GradientPartial = 1,
    /// The reduced gradient of an optimizer shard, from its primary to its replicas.
    ReducedGradient = 2,
    /// Entering the barrier: gradient-norm partials and loss (STEP-1).
    Barrier = 3,
    /// Updated working weights.
    WorkingWeights = 4,
    /// Hashes of optimizer shards, compared between primary and replica.
    ShardHash = 5,
    /// State that moves to another owner: repartition, or a rank that joins.
    StateCopy = 6,
    /// What survivors tell each other about the last step of the generation before (STEP-2).
    Agreement = 7,
    /// Inputs or statistics that belong to no other kind.
    Auxiliary = 8,
    /// Measurements and tests.
    Probe = 9,
}

/// What a message is. Both sides name it; a mismatch on receipt is a protocol error that names both.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Tag {
    /// What kind of message.
    pub kind: TagKind,
    /// The step it belongs to.
    pub step: u64,
    /// Which one of its kind in the step: a bucket, a shard, a block range; the caller's choice.
    pub item: u64,
}

impl Tag {
    /// A tag from its parts.
    #[must_use]
    pub const fn new(kind: TagKind, step: u64, item: u64) -> Self {
        Self { kind, step, item }
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of step {}, item {}", self.kind, self.step, self.item)
    }
}

/// One outgoing message of an exchange.
#[derive(Clone, Copy, Debug)]
pub struct Send<'a> {
    /// To which rank; the own rank is allowed and copied.
    pub to: Rank,
    /// What it is.
    pub tag: Tag,
    /// The payload; may be empty.
    pub bytes: &'a [u8],
}

/// One expected message of an exchange.
#[derive(Debug)]
pub struct Receive<'a> {
    /// From which rank; the own rank is allowed and needs a matching send in the same exchange.
    pub from: Rank,
    /// What it must be.
    pub tag: Tag,
    /// Where the payload goes; its length is the expected length. Holds unspecified bytes after an error.
    pub bytes: &'a mut [u8],
}

/// The data plane of one rank in one generation.
///
/// Used by one thread (SUP-4). Calls are matched between two ranks in program order: the nth message that `a` sends to
/// `b` is the nth that `b` receives from `a`, and tag and length must agree. A peer may be ahead: what it sent early
/// waits in the transport's own bounded buffers, never in memory of ours.
///
/// After an error other than [`FabricError::Aborted`], every later call returns the same error. Keep a failed mesh until
/// the next generation is announced: dropping it makes this rank look lost to its peers.
pub trait Collective: std::marker::Send {
    /// The own rank.
    fn rank(&self) -> Rank;

    /// Ranks in this generation.
    fn world_size(&self) -> usize;

    /// The generation this mesh belongs to, for its whole life.
    fn generation(&self) -> Generation;

    /// Grouped send and receive: returns when all sends are handed to the transport and all receives are complete and
    /// verified.
    ///
    /// # Errors
    /// `Aborted`; `PeerLost`, `TimedOut`, `Corrupt`, `TagMismatch`, `LengthMismatch`, each naming the peer.
    ///
    /// # Panics
    /// If a rank is outside the world: that is the caller's mistake.
    fn exchange(&mut self, sends: &[Send<'_>], receives: &mut [Receive<'_>]) -> Result<(), FabricError>;

    /// Aborts this mesh from any thread (SUP-4).
    fn abort_handle(&self) -> AbortHandle;

    /// The peer that the call under way, or the one cut short last, waits for: whoever moved nothing for the longest time.
    fn waits_for(&self) -> Option<Rank> {
        None
    }

    /// Bytes moved and operations completed, for hang detection.
    fn progress(&self) -> Arc<ProgressCounter>;

    /// The way of device memory, where this mesh has one: the same on all ranks. Without, memory travels through the host.
    fn device_plane(&mut self) -> Option<&mut dyn DevicePlane> {
        None
    }

    /// Lets go of what a mesh holds outside of this program, after its generation and before it is dropped.
    ///
    /// # Errors
    /// `Communicator` if something cannot be let go of: the process must be replaced.
    fn retire(&mut self) -> Result<(), FabricError> {
        Ok(())
    }

    /// Leaves in good order, at the end of a run: peers that still finish operations among themselves are not alarmed.
    /// A mesh that is dropped without it looks like a lost rank. Every later call returns an error.
    fn leave(&mut self);

    /// Everyone's equally-named contribution, by rank. `lengths[rank]` is the length of each one's contribution in
    /// bytes, the same list on every rank.
    ///
    /// # Errors
    /// As [`Collective::exchange`].
    ///
    /// # Panics
    /// If `lengths` does not fit the world or the own contribution.
    fn all_gather(&mut self, tag: Tag, mine: &[u8], lengths: &[usize]) -> Result<Vec<Vec<u8>>, FabricError> {
        let own = self.rank().index();
        assert_eq!(lengths.len(), self.world_size(), "one length per rank");
        assert_eq!(lengths[own], mine.len(), "own length");
        let mut gathered: Vec<Vec<u8>> = lengths.iter().map(|&length| vec![0; length]).collect();
        gathered[own].copy_from_slice(mine);
        let sends = sends_to_others(own, lengths.len(), tag, mine);
        let mut receives: Vec<Receive<'_>> = gathered
            .iter_mut()
            .enumerate()
            .filter(|(rank, _)| *rank != own)
            .map(|(rank, bytes)| Receive {
                from: Rank(rank as u32),
                tag,
                bytes,
            })
            .collect();
        self.exchange(&sends, &mut receives)?;
        Ok(gathered)
    }

    /// The same into one flat buffer, in rank order, without a copy: on entry the own part of `buffer` holds the own
    /// contribution, on return all parts are filled. `lengths` as in [`Collective::all_gather`].
    ///
    /// # Errors
    /// As [`Collective::exchange`].
    ///
    /// # Panics
    /// If `lengths` does not fit the world or `buffer`.
    fn all_gather_in_place(&mut self, tag: Tag, buffer: &mut [u8], lengths: &[usize]) -> Result<(), FabricError> {
        let own = self.rank().index();
        assert_eq!(lengths.len(), self.world_size(), "one length per rank");
        assert_eq!(
            lengths.iter().sum::<usize>(),
            buffer.len(),
            "the lengths must fill the buffer"
        );
        let mut mine: &[u8] = &[];
        let mut receives = Vec::with_capacity(lengths.len());
        let mut rest = buffer;
        for (rank, &length) in lengths.iter().enumerate() {
            let (part, tail) = rest.split_at_mut(length);
            rest = tail;
            if rank == own {
                mine = part;
            } else {
                receives.push(Receive {
                    from: Rank(rank as u32),
                    tag,
                    bytes: part,
                });
            }
        }
        let sends = sends_to_others(own, lengths.len(), tag, mine);
        self.exchange(&sends, &mut receives)
    }
}

/// The same bytes to every other rank, starting behind the own one so that ranks do not all begin with rank 0.
fn sends_to_others(own: usize, world_size: usize, tag: Tag, bytes: &[u8]) -> Vec<Send<'_>> {
    (1..world_size)
        .map(|distance| Send {
            to: Rank(((own + distance) % world_size) as u32),
            tag,
            bytes,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::TagKind;

    #[test]
    fn every_tag_kind_survives_the_wire_and_no_other_number_does() {
        let known: Vec<u8> = TagKind::ALL.iter().map(|&kind| kind as u8).collect();
        for value in 0..=u8::MAX {
            assert_eq!(
                TagKind::from_wire(value).map(|kind| kind as u8),
                known.contains(&value).then_some(value)
            );
        }
    }
}
