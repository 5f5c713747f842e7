//! The checked envelope around every message.
//!
//! The check stands *behind* the body, so that sealing appends and opening truncates: no copy of the body either way.
//! Little-endian: connection u64, sequence u64, length u32, kind u16, schema u16, magic u32, XXH3-64 of all before it.
//! The hash guards against faults, not against an enemy: the handshake does that.

use tarazed_domain::limits::CONTROL_MESSAGE_BYTES_MAX;
use xxhash_rust::xxh3::xxh3_64;

/// Bytes that an envelope adds.
pub(super) const FOOTER_BYTES: usize = 36;
const MAGIC: u32 = u32::from_le_bytes(*b"TZLK");
/// Raised with every change of this layout or of the meaning of a kind.
const SCHEMA: u16 = 3;

/// What a frame is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// A message of the caller.
    Data = 1,
    /// Credit: how many data messages (u64) and bytes (u64) have been handled in all.
    Handled = 2,
    /// The sender has said all it has to say, and closes when it is told that all of it has been handled.
    Closing = 3,
    /// The answer to `Closing`: all has been handled.
    Closed = 4,
}

/// The envelope's fields.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Footer {
    pub connection: u64,
    pub sequence: u64,
    pub kind: Kind,
}

/// Why a frame was refused. `connection` is what the frame claims, where it is long enough to claim anything.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{reason}")]
pub(super) struct EnvelopeError {
    pub connection: Option<u64>,
    pub reason: String,
}

/// Appends the footer to a body.
pub(super) fn seal(mut body: Vec<u8>, footer: Footer) -> Vec<u8> {
    assert!(body.len() <= CONTROL_MESSAGE_BYTES_MAX, "send checks the size");
    let length = u32::try_from(body.len()).expect("the limit is below 4 GiB");
    body.reserve_exact(FOOTER_BYTES);
    body.extend_from_slice(&footer.connection.to_le_bytes());
    body.extend_from_slice(&footer.sequence.to_le_bytes());
    body.extend_from_slice(&length.to_le_bytes());
    body.extend_from_slice(&(footer.kind as u16).to_le_bytes());
    body.extend_from_slice(&SCHEMA.to_le_bytes());
    body.extend_from_slice(&MAGIC.to_le_bytes());
    let hash = xxh3_64(&body);
    body.extend_from_slice(&hash.to_le_bytes());
    body
}

/// Checks a frame and takes the footer off. Nothing of the body is interpreted.
pub(super) fn open(mut frame: Vec<u8>) -> Result<(Footer, Vec<u8>), EnvelopeError> {
    let refuse = |connection, reason: String| Err(EnvelopeError { connection, reason });
    let total = frame.len();
    let Some((rest, footer)) = frame.split_last_chunk::<FOOTER_BYTES>() else {
        return refuse(None, format!("a frame of {total} bytes is shorter than an envelope"));
    };
    let body_len = rest.len();
    let connection = u64::from_le_bytes(field(footer, 0));
    let sequence = u64::from_le_bytes(field(footer, 8));
    let length = u32::from_le_bytes(field(footer, 16));
    let kind = u16::from_le_bytes(field(footer, 20));
    let schema = u16::from_le_bytes(field(footer, 22));
    let magic = u32::from_le_bytes(field(footer, 24));
    let hash = u64::from_le_bytes(field(footer, 28));
    if body_len > CONTROL_MESSAGE_BYTES_MAX {
        return refuse(
            Some(connection),
            format!("a message of {body_len} bytes is above the limit"),
        );
    }
    if magic != MAGIC {
        return refuse(
            Some(connection),
            format!("wrong magic {magic:#010x}: not a control message"),
        );
    }
    if schema != SCHEMA {
        return refuse(
            Some(connection),
            format!("message schema {schema} where this binary speaks {SCHEMA}: run one version of the program"),
        );
    }
    if length as usize != body_len {
        return refuse(
            Some(connection),
            format!("length says {length}, the frame holds {body_len}"),
        );
    }
    if hash != xxh3_64(&frame[..total - 8]) {
        return refuse(Some(connection), "checksum mismatch".to_owned());
    }
    let kind = match kind {
        1 => Kind::Data,
        2 => Kind::Handled,
        3 => Kind::Closing,
        4 => Kind::Closed,
        other => return refuse(Some(connection), format!("unknown message kind {other}")),
    };
    frame.truncate(body_len);
    Ok((
        Footer {
            connection,
            sequence,
            kind,
        },
        frame,
    ))
}

fn field<const N: usize>(footer: &[u8; FOOTER_BYTES], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&footer[at..at + N]);
    bytes
}
