//! Frames: a fixed, checked header, then raw payload bytes.
//!
//! The header is 88 bytes, written field by field in little-endian order. It is fixed-size and flat, so there is nothing
//! a serialisation library could add: its validation would answer "is this memory-safe", and the question here is "is
//! this what the peer sent, to me, now, and is it due" (integrity, generation, routing, order, length). Field by field
//! also keeps the wire form independent of compilers and of struct layout. Nothing is believed before the header's own
//! checksum matches, and no payload before its checksum, which the header carries, matches too.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic |
//! | 4 | 2 | header version |
//! | 6 | 1 | frame kind |
//! | 7 | 1 | tag kind |
//! | 8 | 8 | generation |
//! | 16 | 4 | source rank |
//! | 20 | 4 | destination rank |
//! | 24 | 8 | sequence: frames sent before on this connection, this way |
//! | 32 | 8 | tag step |
//! | 40 | 8 | tag item (the lost rank, in a fault frame) |
//! | 48 | 8 | bytes of the whole message |
//! | 56 | 8 | offset of this payload in it |
//! | 64 | 8 | bytes of this payload |
//! | 72 | 8 | xxh3 of the payload |
//! | 80 | 8 | xxh3 of bytes 0 to 80, seeded |
//!
//! xxh3 finds accidents, not attackers; the network between authenticated peers is trusted.

use crate::{Corruption, Tag, TagKind};
use tarazed_domain::limits::FRAME_PAYLOAD_BYTES_MAX;
use tarazed_domain::{Generation, Rank};
use twox_hash::XxHash3_64;

/// Bytes of a header on the wire.
pub const HEADER_BYTES: usize = 88;
/// Payload bytes of one sent frame; longer messages are cut. Small enough that the checksum pass leaves the bytes in a
/// core's cache for the copy into the socket, large enough that headers and calls do not matter.
pub const FRAME_BYTES_SENT_MAX: usize = 256 * 1024;

const MAGIC: [u8; 4] = *b"TZDP";
const VERSION: u16 = 1;
/// Keeps header checksums from being valid payload checksums of the same bytes.
const HEADER_SEED: u64 = 0x5461_7261_7a65_6401;

const _: () = assert!(
    FRAME_BYTES_SENT_MAX <= FRAME_PAYLOAD_BYTES_MAX,
    "own frames must pass the receiver's limit"
);

/// What a frame is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum FrameKind {
    /// A piece of a message.
    Data = 1,
    /// The sender leaves in good order.
    Goodbye = 2,
    /// The sender gives up because it lost the rank in the tag's item: so that the blame reaches those who wait for the
    /// sender.
    Fault = 3,
}

impl FrameKind {
    const fn from_wire(value: u8) -> Option<Self> {
        match value {
            1 => Some(Self::Data),
            2 => Some(Self::Goodbye),
            3 => Some(Self::Fault),
            _ => None,
        }
    }
}

/// What stands in front of every payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// What the frame is for.
    pub kind: FrameKind,
    /// The sender's generation.
    pub generation: Generation,
    /// The sender.
    pub source: Rank,
    /// The receiver.
    pub destination: Rank,
    /// Frames sent before on this connection in this direction.
    pub sequence: u64,
    /// The message's tag.
    pub tag: Tag,
    /// Bytes of the whole message.
    pub message_bytes: u64,
    /// Where in the message this payload begins, in bytes.
    pub offset: u64,
    /// Bytes of this payload.
    pub payload_bytes: u64,
    /// Checksum of this payload.
    pub payload_checksum: u64,
}

/// Checksum of a payload.
#[must_use]
pub fn payload_checksum(payload: &[u8]) -> u64 {
    XxHash3_64::oneshot(payload)
}

pub(crate) fn header_checksum(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(HEADER_SEED, bytes)
}

/// Writes or reads consecutive little-endian fields.
struct Cursor<B>(B, usize);

impl Cursor<&mut [u8; HEADER_BYTES]> {
    fn put<const N: usize>(&mut self, field: [u8; N]) {
        self.0[self.1..self.1 + N].copy_from_slice(&field);
        self.1 += N;
    }
}

impl Cursor<&[u8; HEADER_BYTES]> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let field = std::array::from_fn(|i| self.0[self.1 + i]);
        self.1 += N;
        field
    }

    fn take_u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

impl FrameHeader {
    /// The wire form.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut fields = Cursor(&mut bytes, 0);
        fields.put(MAGIC);
        fields.put(VERSION.to_le_bytes());
        fields.put([self.kind as u8]);
        fields.put([self.tag.kind as u8]);
        fields.put(self.generation.0.to_le_bytes());
        fields.put(self.source.0.to_le_bytes());
        fields.put(self.destination.0.to_le_bytes());
        fields.put(self.sequence.to_le_bytes());
        fields.put(self.tag.step.to_le_bytes());
        fields.put(self.tag.item.to_le_bytes());
        fields.put(self.message_bytes.to_le_bytes());
        fields.put(self.offset.to_le_bytes());
        fields.put(self.payload_bytes.to_le_bytes());
        fields.put(self.payload_checksum.to_le_bytes());
        let end = fields.1;
        let checksum = header_checksum(&bytes[..end]);
        bytes[end..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads the wire form; integrity first, meaning second.
    ///
    /// # Errors
    /// `Magic`, `HeaderChecksum`, or `Field` for a value without meaning, of this version or of another one.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Corruption> {
        if bytes[..4] != MAGIC {
            return Err(Corruption::Magic);
        }
        let mut fields = Cursor(bytes, HEADER_BYTES - 8);
        if fields.take_u64() != header_checksum(&bytes[..HEADER_BYTES - 8]) {
            return Err(Corruption::HeaderChecksum);
        }
        let mut fields = Cursor(bytes, MAGIC.len());
        if u16::from_le_bytes(fields.take()) != VERSION {
            return Err(Corruption::Field);
        }
        let [kind, tag_kind] = fields.take();
        let kind = FrameKind::from_wire(kind).ok_or(Corruption::Field)?;
        let tag_kind = TagKind::from_wire(tag_kind).ok_or(Corruption::Field)?;
        let generation = Generation(fields.take_u64());
        let source = Rank(u32::from_le_bytes(fields.take()));
        let destination = Rank(u32::from_le_bytes(fields.take()));
        let sequence = fields.take_u64();
        let tag = Tag::new(tag_kind, fields.take_u64(), fields.take_u64());
        let header = Self {
            kind,
            generation,
            source,
            destination,
            sequence,
            tag,
            message_bytes: fields.take_u64(),
            offset: fields.take_u64(),
            payload_bytes: fields.take_u64(),
            payload_checksum: fields.take_u64(),
        };
        if header.payload_bytes > FRAME_PAYLOAD_BYTES_MAX as u64 {
            return Err(Corruption::Oversized);
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> impl Strategy<Value = FrameHeader> {
        let kinds = prop_oneof![Just(FrameKind::Data), Just(FrameKind::Goodbye), Just(FrameKind::Fault)];
        let tags = (prop::sample::select(TagKind::ALL.to_vec()), any::<u64>(), any::<u64>());
        (
            kinds,
            any::<u64>(),
            any::<(u32, u32, u64)>(),
            tags,
            any::<(u64, u64, u64)>(),
            0..=FRAME_PAYLOAD_BYTES_MAX,
        )
            .prop_map(
                |(kind, generation, (source, destination, sequence), tag, (bytes, offset, checksum), payload)| {
                    FrameHeader {
                        kind,
                        generation: Generation(generation),
                        source: Rank(source),
                        destination: Rank(destination),
                        sequence,
                        tag: Tag::new(tag.0, tag.1, tag.2),
                        message_bytes: bytes,
                        offset,
                        payload_bytes: payload as u64,
                        payload_checksum: checksum,
                    }
                },
            )
    }

    proptest! {
        #[test]
        fn headers_survive_the_wire(header in header()) {
            prop_assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn every_single_bit_flip_of_a_header_is_refused(header in header()) {
            let good = header.encode();
            for bit in 0..HEADER_BYTES * 8 {
                let mut bad = good;
                bad[bit / 8] ^= 1 << (bit % 8);
                prop_assert!(FrameHeader::decode(&bad).is_err(), "bit {}", bit);
            }
        }

        #[test]
        fn noise_is_never_a_header(noise in prop::array::uniform32(any::<u8>())) {
            let mut bytes = [0; HEADER_BYTES];
            for (i, byte) in bytes.iter_mut().enumerate() {
                *byte = noise[i % 32];
            }
            prop_assert!(FrameHeader::decode(&bytes).is_err());
        }
    }

    /// Rewrites one field under a valid checksum: the field itself must be refused.
    fn forged(at: usize, field: &[u8]) -> Result<FrameHeader, Corruption> {
        let header = FrameHeader {
            kind: FrameKind::Data,
            generation: Generation(1),
            source: Rank(0),
            destination: Rank(1),
            sequence: 0,
            tag: Tag::new(TagKind::Probe, 0, 0),
            message_bytes: 8,
            offset: 0,
            payload_bytes: 8,
            payload_checksum: 0,
        };
        let mut bytes = header.encode();
        bytes[at..at + field.len()].copy_from_slice(field);
        let checksum = header_checksum(&bytes[..HEADER_BYTES - 8]);
        bytes[HEADER_BYTES - 8..].copy_from_slice(&checksum.to_le_bytes());
        FrameHeader::decode(&bytes)
    }

    #[test]
    fn fields_without_meaning_are_refused_even_under_a_valid_checksum() {
        assert_eq!(forged(4, &[2, 0]), Err(Corruption::Field), "version");
        assert_eq!(forged(6, &[9]), Err(Corruption::Field), "frame kind");
        assert_eq!(forged(7, &[0]), Err(Corruption::Field), "tag kind");
        let beyond = (FRAME_PAYLOAD_BYTES_MAX as u64 + 1).to_le_bytes();
        assert_eq!(forged(64, &beyond), Err(Corruption::Oversized));
        assert!(forged(4, &[1, 0]).is_ok(), "the forgery itself is sound");
    }
}
