//! Doors for the fuzzer (`chaos/fuzz`) to the link's decoders. No part of the program.

use super::envelope::{self, FOOTER_BYTES, Footer, Kind};
use super::{PeerId, handshake};
use tarazed_domain::{Incarnation, WorkerId};
use xxhash_rust::xxh3::xxh3_64;

const TOKEN: [u8; 32] = [7; 32];

/// Any bytes as a frame of the link, as they are and under a right checksum: what is opened is sealed as it was.
///
/// # Panics
/// If a frame is believed that nobody would seal.
pub fn envelope(bytes: &[u8]) {
    check(bytes.to_vec());
    let mut sealed = bytes.to_vec();
    if let Some(body) = sealed.len().checked_sub(FOOTER_BYTES) {
        // A right length and a right hash; connection, sequence, kind, schema and magic are the fuzzer's.
        let length = u32::try_from(body).unwrap_or(u32::MAX);
        sealed[body + 16..body + 20].copy_from_slice(&length.to_le_bytes());
        let end = sealed.len() - 8;
        let hash = xxh3_64(&sealed[..end]);
        sealed[end..].copy_from_slice(&hash.to_le_bytes());
        check(sealed);
    }
}

fn check(frame: Vec<u8>) {
    if let Ok((footer, body)) = envelope::open(frame.clone()) {
        assert_eq!(envelope::seal(body, footer), frame, "one frame, one spelling");
    }
}

/// Good frames.
#[must_use]
pub fn envelope_seeds() -> Vec<Vec<u8>> {
    let kinds = [Kind::Data, Kind::Handled, Kind::Closing, Kind::Closed];
    let footer = |kind| Footer {
        connection: 9,
        sequence: 4,
        kind,
    };
    kinds.map(|kind| envelope::seal(vec![1; 16], footer(kind))).to_vec()
}

/// Any bytes as what the other side of a handshake sends, for both sides. It has no key, so nobody may believe it.
///
/// # Panics
/// If it is believed.
pub async fn handshake(bytes: &[u8]) {
    let mut stream = tokio::io::join(bytes, tokio::io::sink());
    let caller = handshake::receive(&mut stream, &TOKEN, 1).await;
    assert!(caller.is_err(), "a caller without the token was believed");
    let peer = PeerId {
        worker: WorkerId(1),
        incarnation: Incarnation(0),
    };
    let mut stream = tokio::io::join(bytes, tokio::io::sink());
    let hub = handshake::call(&mut stream, &TOKEN, peer, 1).await;
    assert!(hub.is_err(), "a hub without the token was believed");
}

/// The beginning of what a caller sends, and of what a hub sends.
#[must_use]
pub fn handshake_seeds() -> Vec<Vec<u8>> {
    let mut hello = handshake::MAGIC.to_vec();
    hello.resize(handshake::HELLO_BYTES + 32, 1);
    vec![hello, vec![2; 512]]
}
