//! Whether a frame is believed: integrity first, then generation, routing, order, and whether it is the one that is due.
//!
//! Pure: it sees bytes and keeps a count. The sockets' links and the simulator's mesh ask the same judge.

use crate::counters::{Refusal, RefusalCounters};
use crate::frame::{FrameHeader, FrameKind, HEADER_BYTES, payload_checksum};
use crate::{Corruption, FabricError, Tag};
use std::sync::Arc;
use tarazed_domain::{Generation, Rank};

/// Who a rank is in one generation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The generation.
    pub generation: Generation,
    /// The rank.
    pub rank: Rank,
    /// Ranks in it.
    pub world_size: usize,
}

/// A payload that was announced by a header found good.
#[derive(Clone, Copy, Debug)]
pub struct OpenPayload {
    /// Its length.
    pub bytes: usize,
    /// Bytes of it received so far.
    pub filled: usize,
    /// What its checksum must be.
    pub checksum: u64,
}

/// Judges the frames of one connection, one way.
#[derive(Debug)]
pub struct Judge {
    own: Identity,
    peer: Rank,
    received_frames: u64,
    refusals: Arc<RefusalCounters>,
}

impl Judge {
    /// Of frames from `peer` to `own`.
    #[must_use]
    pub const fn new(own: Identity, peer: Rank, refusals: Arc<RefusalCounters>) -> Self {
        Self {
            own,
            peer,
            received_frames: 0,
            refusals,
        }
    }

    /// What was refused so far, here and elsewhere.
    #[must_use]
    pub fn refusals(&self) -> &RefusalCounters {
        &self.refusals
    }

    /// Decides whether the frame announced by `header` is the one that is due: a piece, from `offset` on, of a message
    /// named `due` of `due_bytes` bytes.
    ///
    /// # Errors
    /// What is wrong with it, or that the peer is lost or left.
    pub fn header(
        &mut self,
        header: &[u8; HEADER_BYTES],
        due: Tag,
        due_bytes: usize,
        offset: usize,
    ) -> Result<OpenPayload, FabricError> {
        let header = FrameHeader::decode(header).map_err(|corruption| self.corrupt(due, corruption))?;
        self.judge_origin(&header, due)?;
        self.received_frames += 1;
        match header.kind {
            FrameKind::Data => {}
            FrameKind::Goodbye => {
                return Err(FabricError::lost(
                    self.peer,
                    format_args!("it left in good order before {}", due),
                ));
            }
            FrameKind::Fault => return Err(self.fault_reported(&header)),
        }
        if header.tag != due {
            self.refusals.count(Refusal::FrameUnexpected);
            return Err(FabricError::TagMismatch {
                peer: self.peer,
                expected: due,
                received: header.tag,
            });
        }
        let expected = due_bytes as u64;
        if header.message_bytes != expected {
            self.refusals.count(Refusal::FrameUnexpected);
            let received = header.message_bytes;
            return Err(FabricError::LengthMismatch {
                peer: self.peer,
                tag: due,
                expected,
                received,
            });
        }
        if header.offset != offset as u64 {
            return Err(self.corrupt(due, Corruption::Sequence));
        }
        let left = expected - header.offset;
        if header.payload_bytes > left || (header.payload_bytes == 0 && left > 0) {
            return Err(self.corrupt(due, Corruption::Oversized));
        }
        let bytes = header.payload_bytes as usize;
        Ok(OpenPayload {
            bytes,
            filled: 0,
            checksum: header.payload_checksum,
        })
    }

    /// Generation first (SUP-2), then routing, then order.
    fn judge_origin(&self, header: &FrameHeader, due: Tag) -> Result<(), FabricError> {
        if header.generation != self.own.generation {
            Err(self.corrupt(due, Corruption::Generation))
        } else if header.source != self.peer || header.destination != self.own.rank {
            Err(self.corrupt(due, Corruption::Misrouted))
        } else if header.sequence != self.received_frames {
            Err(self.corrupt(due, Corruption::Sequence))
        } else {
            Ok(())
        }
    }

    fn corrupt(&self, tag: Tag, corruption: Corruption) -> FabricError {
        self.refusals.count(match corruption {
            Corruption::Generation => Refusal::FrameGeneration,
            Corruption::Sequence => Refusal::FrameSequence,
            Corruption::Oversized => Refusal::FrameOversized,
            Corruption::Magic
            | Corruption::HeaderChecksum
            | Corruption::Field
            | Corruption::PayloadChecksum
            | Corruption::Misrouted => Refusal::FrameCorrupt,
        });
        FabricError::Corrupt {
            peer: self.peer,
            tag,
            corruption,
        }
    }

    /// The peer gave up because of somebody else: the blame belongs there.
    pub(crate) fn fault_reported(&self, header: &FrameHeader) -> FabricError {
        match u32::try_from(header.tag.item) {
            Ok(rank) if Rank(rank) != self.own.rank && Rank(rank).index() < self.own.world_size => {
                FabricError::lost(Rank(rank), format_args!("rank {} reports it", self.peer))
            }
            _ => FabricError::lost(self.peer, "it gave up waiting for this rank"),
        }
    }

    /// The payload that followed a header found good.
    ///
    /// # Errors
    /// `Corrupt` if it is not what was sent.
    pub fn payload(&self, due: Tag, payload: &[u8], checksum: u64) -> Result<(), FabricError> {
        if payload_checksum(payload) == checksum {
            Ok(())
        } else {
            Err(self.corrupt(due, Corruption::PayloadChecksum))
        }
    }
}
