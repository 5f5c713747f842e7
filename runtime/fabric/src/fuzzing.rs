//! Doors for the fuzzer (`chaos/fuzz`) to decoders that are nobody else's affair. No part of the program.

use crate::HEADER_BYTES;
use crate::frame::header_checksum;
use crate::handshake::{
    HELLO_BYTES, HandshakeKey, Hello, PROOF_BYTES, REPLY_BYTES, Reply, Status, proof, proof_is_right,
};
use tarazed_domain::{Generation, Rank};

const TOKEN: [u8; 32] = [7; 32];

/// Gives a header the checksum of its fields, so that what lies behind the checksum is reached.
pub fn seal_header(header: &mut [u8; HEADER_BYTES]) {
    let end = HEADER_BYTES - 8;
    let checksum = header_checksum(&header[..end]);
    header[end..].copy_from_slice(&checksum.to_le_bytes());
}

fn array<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
    bytes.get(..N)?.try_into().ok()
}

/// Any bytes as each message of the handshake: what is believed must say again what it said.
///
/// # Panics
/// If a decoder believes what its encoder would not write.
pub fn handshake(bytes: &[u8]) {
    let key = HandshakeKey::derive(&TOKEN);
    if let Some(bytes) = array::<HELLO_BYTES>(bytes)
        && let Ok(hello) = Hello::decode(&key, &bytes)
    {
        assert_eq!(Hello::decode(&key, &hello.encode(&key)), Ok(hello));
    }
    // The same fields under a right MAC. Reserved bytes are covered by it and mean nothing.
    if let Some(body) = array::<{ HELLO_BYTES - 32 }>(bytes) {
        let mut sealed = [0; HELLO_BYTES];
        sealed[..body.len()].copy_from_slice(&body);
        let mac = key.mac("hello", &[&body]);
        sealed[body.len()..].copy_from_slice(mac.as_bytes());
        if let Ok(hello) = Hello::decode(&key, &sealed) {
            assert_eq!(Hello::decode(&key, &hello.encode(&key)), Ok(hello));
        }
        let (wrong, challenge) = ([0; PROOF_BYTES], [1; 32]);
        assert!(proof_is_right(
            &key,
            &sealed,
            &challenge,
            &proof(&key, &sealed, &challenge)
        ));
        assert!(!proof_is_right(&key, &sealed, &challenge, &wrong));
    }
    if let Some(reply) = array::<REPLY_BYTES>(bytes) {
        let hello = [3; HELLO_BYTES];
        if let Some((reply, true)) = Reply::decode(&key, &hello, &reply) {
            assert_eq!(
                Reply::decode(&key, &hello, &reply.encode(&key, &hello)),
                Some((reply, true))
            );
        }
    }
}

/// Good messages of the handshake.
#[must_use]
pub fn handshake_seeds() -> Vec<Vec<u8>> {
    let key = HandshakeKey::derive(&TOKEN);
    let hello = Hello {
        generation: Generation(3),
        from: Rank(1),
        to: Rank(0),
        world_size: 4,
        roster: [5; 32],
        nonce: [6; 32],
    };
    let reply = |status| Reply {
        status,
        generation: Generation(3),
        nonce: [8; 32],
    };
    let mut seeds = vec![hello.encode(&key).to_vec()];
    for status in [Status::Challenge, Status::Accepted, Status::Stale, Status::Roster] {
        seeds.push(reply(status).encode(&key, &[3; HELLO_BYTES]).to_vec());
    }
    seeds
}
