//! One connection to one peer: frames out, frames in, both in steps that never block.
//!
//! A link reads from its socket only what the running exchange expects, so a peer that is ahead is held back by the
//! socket's own buffer and costs no memory here.

use crate::counters::{ProgressCounter, RefusalCounters};
use crate::frame::{FRAME_BYTES_SENT_MAX, FrameHeader, FrameKind, HEADER_BYTES, payload_checksum};
use crate::judge::{Identity, Judge, OpenPayload};
use crate::{FabricError, Receive, Tag, TagKind};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use tarazed_domain::Rank;

/// Whether a step got anywhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// Bytes moved, and more may move at once.
    Moved,
    /// Bytes moved, but the socket is full or empty now.
    MovedAndBlocked,
    /// The socket is full or empty.
    Blocked,
    /// Nothing left to do.
    Done,
}

/// What is known about the far end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Presence {
    /// Connected.
    Here,
    /// It closed its end, but bytes for later operations are unread: what it was, they will tell.
    ClosedBehindData,
    /// It left in good order.
    Left,
}

/// Messages to one peer in one exchange, in order.
#[derive(Default)]
pub(crate) struct Outgoing<'a> {
    messages: VecDeque<(Tag, &'a [u8])>,
    /// Bytes of the front message in finished frames.
    offset: usize,
    frame: Option<OpenFrame>,
}

struct OpenFrame {
    header: [u8; HEADER_BYTES],
    payload_bytes: usize,
    /// Of header and payload together.
    written: usize,
}

/// Messages from one peer in one exchange, in order.
#[derive(Default)]
pub(crate) struct Incoming<'e, 'a> {
    messages: VecDeque<&'e mut Receive<'a>>,
    /// Bytes of the front message in finished frames.
    offset: usize,
    payload: Option<OpenPayload>,
}

impl<'a> Outgoing<'a> {
    pub(crate) fn push(&mut self, tag: Tag, bytes: &'a [u8]) {
        self.messages.push_back((tag, bytes));
    }

    /// The message under way.
    pub(crate) fn due(&self) -> Option<Tag> {
        self.messages.front().map(|(tag, _)| *tag)
    }
}

impl<'e, 'a> Incoming<'e, 'a> {
    pub(crate) fn push(&mut self, receive: &'e mut Receive<'a>) {
        self.messages.push_back(receive);
    }

    /// The message under way.
    pub(crate) fn due(&self) -> Option<Tag> {
        self.messages.front().map(|receive| receive.tag)
    }
}

/// One peer's connection within one generation.
pub(crate) struct Link {
    socket: OwnedFd,
    own: Identity,
    peer: Rank,
    sent_frames: u64,
    judge: Judge,
    header: [u8; HEADER_BYTES],
    header_filled: usize,
    /// Part of a frame is written: nothing else may be sent before its rest.
    mid_frame: bool,
    presence: Presence,
    progress: Arc<ProgressCounter>,
}

impl Link {
    pub(crate) fn new(
        socket: OwnedFd,
        own: Identity,
        peer: Rank,
        progress: Arc<ProgressCounter>,
        refusals: Arc<RefusalCounters>,
    ) -> Self {
        Self {
            socket,
            own,
            peer,
            sent_frames: 0,
            judge: Judge::new(own, peer, refusals),
            header: [0; HEADER_BYTES],
            header_filled: 0,
            mid_frame: false,
            presence: Presence::Here,
            progress,
        }
    }

    pub(crate) fn presence(&self) -> Presence {
        self.presence
    }

    fn header_to_send(&self, kind: FrameKind, tag: Tag) -> FrameHeader {
        FrameHeader {
            kind,
            generation: self.own.generation,
            source: self.own.rank,
            destination: self.peer,
            sequence: self.sent_frames,
            tag,
            message_bytes: 0,
            offset: 0,
            payload_bytes: 0,
            payload_checksum: payload_checksum(&[]),
        }
    }

    fn open_frame(&self, tag: Tag, message: &[u8], offset: usize) -> OpenFrame {
        let payload = &message[offset..message.len().min(offset + FRAME_BYTES_SENT_MAX)];
        let header = FrameHeader {
            message_bytes: message.len() as u64,
            offset: offset as u64,
            payload_bytes: payload.len() as u64,
            payload_checksum: payload_checksum(payload),
            ..self.header_to_send(FrameKind::Data, tag)
        };
        OpenFrame {
            header: header.encode(),
            payload_bytes: payload.len(),
            written: 0,
        }
    }

    /// Sends at most one frame.
    pub(crate) fn send_step(&mut self, out: &mut Outgoing<'_>) -> Result<Step, FabricError> {
        let Some(&(tag, message)) = out.messages.front() else {
            return Ok(Step::Done);
        };
        let offset = out.offset;
        let frame = out.frame.get_or_insert_with(|| self.open_frame(tag, message, offset));
        let payload = &message[offset..offset + frame.payload_bytes];
        let header_left = &frame.header[frame.written.min(HEADER_BYTES)..];
        let payload_left = &payload[frame.written.saturating_sub(HEADER_BYTES)..];
        let parts = [IoSlice::new(header_left), IoSlice::new(payload_left)];
        let mut no_control = SendAncillaryBuffer::default();
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let moved = match rustix::net::sendmsg(&self.socket, &parts, &mut no_control, flags) {
            Ok(moved) => moved,
            Err(Errno::AGAIN) => return Ok(Step::Blocked),
            Err(Errno::INTR) => return Ok(Step::Moved),
            Err(cause) => return Err(self.lost_while_sending(cause)),
        };
        self.progress.sent(moved.saturating_sub(header_left.len()));
        frame.written += moved;
        self.mid_frame = frame.written < HEADER_BYTES + frame.payload_bytes;
        if self.mid_frame {
            return Ok(Step::MovedAndBlocked);
        }
        out.offset += frame.payload_bytes;
        out.frame = None;
        self.sent_frames += 1;
        if out.offset == message.len() {
            out.messages.pop_front();
            out.offset = 0;
        }
        Ok(Step::Moved)
    }

    /// Receives at most the rest of one header or of one payload.
    pub(crate) fn receive_step(&mut self, incoming: &mut Incoming<'_, '_>) -> Result<Step, FabricError> {
        let Some(receive) = incoming.messages.front_mut() else {
            return Ok(Step::Done);
        };
        let offset = incoming.offset;
        let Some(payload) = &mut incoming.payload else {
            let step = self.receive_header(receive.tag)?;
            if self.header_filled == HEADER_BYTES {
                self.header_filled = 0;
                let opened = self
                    .judge
                    .header(&self.header, receive.tag, receive.bytes.len(), offset)?;
                incoming.payload = Some(opened);
                if opened.bytes == 0 {
                    self.close_frame(incoming)?;
                }
            }
            return Ok(step);
        };
        let wanted = &mut receive.bytes[offset + payload.filled..offset + payload.bytes];
        let room = wanted.len();
        let moved = match rustix::net::recv(&self.socket, wanted, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => {
                return Err(FabricError::lost(
                    self.peer,
                    "it closed the connection inside a message",
                ));
            }
            Ok((_, moved)) => moved,
            Err(Errno::AGAIN) => return Ok(Step::Blocked),
            Err(Errno::INTR) => return Ok(Step::Moved),
            Err(cause) => return Err(FabricError::lost(self.peer, cause)),
        };
        payload.filled += moved;
        self.progress.received(moved);
        if payload.filled == payload.bytes {
            self.close_frame(incoming)?;
        }
        Ok(if moved < room {
            Step::MovedAndBlocked
        } else {
            Step::Moved
        })
    }

    fn receive_header(&mut self, due: Tag) -> Result<Step, FabricError> {
        let wanted = &mut self.header[self.header_filled..];
        match rustix::net::recv(&self.socket, wanted, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Err(FabricError::lost(
                self.peer,
                format_args!("it closed the connection before {due}"),
            )),
            Ok((_, moved)) => {
                self.header_filled += moved;
                Ok(Step::Moved)
            }
            Err(Errno::AGAIN) => Ok(Step::Blocked),
            Err(Errno::INTR) => Ok(Step::Moved),
            Err(cause) => Err(FabricError::lost(self.peer, cause)),
        }
    }

    /// A complete payload: its checksum, and the end of the message if it was the last.
    fn close_frame(&self, incoming: &mut Incoming<'_, '_>) -> Result<(), FabricError> {
        let (Some(payload), Some(receive)) = (incoming.payload.take(), incoming.messages.front()) else {
            unreachable!("a frame is closed after it was opened")
        };
        let end = incoming.offset + payload.bytes;
        self.judge
            .payload(receive.tag, &receive.bytes[incoming.offset..end], payload.checksum)?;
        incoming.offset = end;
        if end == receive.bytes.len() {
            incoming.messages.pop_front();
            incoming.offset = 0;
        }
        Ok(())
    }

    /// A failed send says only that the peer is gone; what it said last may say why.
    fn lost_while_sending(&mut self, cause: Errno) -> FabricError {
        match self.look_at_hangup() {
            Err(error) => error,
            Ok(()) => FabricError::lost(self.peer, cause),
        }
    }

    /// The peer closed its end and nothing is due from it: finds out whether that is a loss.
    pub(crate) fn look_at_hangup(&mut self) -> Result<(), FabricError> {
        if self.header_filled > 0 {
            return Ok(());
        }
        let mut bytes = [0; HEADER_BYTES];
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        match rustix::net::recv(&self.socket, &mut bytes[..], flags) {
            Ok((_, HEADER_BYTES)) => {}
            Ok((_, 0)) => return Err(FabricError::lost(self.peer, "it closed the connection")),
            Ok(_) => return Err(FabricError::lost(self.peer, "it closed the connection inside a frame")),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(cause) => return Err(FabricError::lost(self.peer, cause)),
        }
        let sound = FrameHeader::decode(&bytes).ok().filter(|header| {
            header.generation == self.own.generation
                && header.source == self.peer
                && header.destination == self.own.rank
        });
        match sound {
            Some(header) if header.kind == FrameKind::Fault => return Err(self.judge.fault_reported(&header)),
            Some(header) if header.kind == FrameKind::Goodbye => self.presence = Presence::Left,
            _ => self.presence = Presence::ClosedBehindData,
        }
        Ok(())
    }

    /// Tells the peer that this rank gives up because of `cause`, if the socket takes it.
    pub(crate) fn send_fault(&mut self, cause: Rank) {
        if !self.mid_frame {
            let tag = Tag::new(TagKind::Auxiliary, 0, u64::from(cause.0));
            // Best effort: the peer will see the connection close in any case.
            let _ = self.send_bare(FrameKind::Fault, tag);
        }
    }

    /// Tells the peer that this rank leaves in good order. `Blocked` if the socket is full: try again.
    pub(crate) fn send_goodbye(&mut self) -> Step {
        match self.send_bare(FrameKind::Goodbye, Tag::new(TagKind::Auxiliary, 0, 0)) {
            Err(Errno::AGAIN | Errno::INTR) => Step::Blocked,
            // Gone already: nobody is left to be told.
            Ok(()) | Err(_) => {
                let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
                Step::Done
            }
        }
    }

    fn send_bare(&mut self, kind: FrameKind, tag: Tag) -> Result<(), Errno> {
        let bytes = self.header_to_send(kind, tag).encode();
        let sent = rustix::net::send(&self.socket, &bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
        self.sent_frames += 1;
        self.mid_frame = sent < HEADER_BYTES;
        Ok(())
    }
}

#[cfg(test)]
mod tests;

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
