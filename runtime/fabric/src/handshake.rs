//! The handshake of a new connection, as pure values: no sockets and no clock here.
//!
//! ```text
//! dialer                                    acceptor
//!   Hello  {generation, ranks, roster, nonce, mac}  ─►   token, then generation, then roster are checked
//!   ◄─  Reply {Challenge, generation, nonce, mac}        proves that the acceptor knows the token
//!   Proof  {mac over both nonces}  ─►                    proves that the dialer is here now, not a recording
//!   ◄─  Reply {Accepted, …}                              the slot is taken only here
//! ```
//!
//! All MACs are keyed BLAKE3 under a key derived from the run's token, over a label, both nonces and the whole Hello, so
//! generation, ranks and roster are authenticated with them. A stale dialer is told the acceptor's generation (SUP-2).
//! Messages have fixed sizes, so neither side ever reads a byte that belongs to the frames after them.

use std::fmt::Write as _;
use tarazed_domain::{Generation, Rank};

/// Bytes of a dialer's first message.
pub(crate) const HELLO_BYTES: usize = 128;
/// Bytes of an acceptor's answers.
pub(crate) const REPLY_BYTES: usize = 80;
/// Bytes of a dialer's second message.
pub(crate) const PROOF_BYTES: usize = 32;

const MAGIC: [u8; 4] = *b"TZHS";
const VERSION: u16 = 1;
const HELLO_BODY_BYTES: usize = HELLO_BYTES - 32;
const REPLY_BODY_BYTES: usize = REPLY_BYTES - 32;

pub(crate) type Nonce = [u8; 32];

/// The key of all MACs of a run's handshakes.
#[derive(Clone)]
pub(crate) struct HandshakeKey([u8; 32]);

impl HandshakeKey {
    pub(crate) fn derive(run_token: &[u8; 32]) -> Self {
        Self(blake3::derive_key("tarazed data plane handshake, version 1", run_token))
    }

    pub(crate) fn mac(&self, label: &str, parts: &[&[u8]]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(&(label.len() as u64).to_le_bytes());
        hasher.update(label.as_bytes());
        for part in parts {
            hasher.update(part);
        }
        hasher.finalize()
    }
}

/// Digest of the ordered addresses of a generation.
pub(crate) fn roster_digest(roster: &[String]) -> [u8; 32] {
    let mut text = String::new();
    for address in roster {
        // Writing to a string cannot fail; the length makes the list unambiguous.
        let _ = write!(text, "{}:{address};", address.len());
    }
    *blake3::hash(text.as_bytes()).as_bytes()
}

/// What a dialer says about itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Hello {
    pub generation: Generation,
    pub from: Rank,
    pub to: Rank,
    pub world_size: u32,
    pub roster: [u8; 32],
    pub nonce: Nonce,
}

/// Why the bytes of a Hello are not one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum HelloError {
    Garbage,
    Version,
    Unauthenticated,
}

impl Hello {
    pub(crate) fn encode(&self, key: &HandshakeKey) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.generation.0.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.from.0.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.to.0.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.world_size.to_le_bytes());
        bytes[32..64].copy_from_slice(&self.roster);
        bytes[64..96].copy_from_slice(&self.nonce);
        let mac = key.mac("hello", &[&bytes[..HELLO_BODY_BYTES]]);
        bytes[HELLO_BODY_BYTES..].copy_from_slice(mac.as_bytes());
        bytes
    }

    pub(crate) fn decode(key: &HandshakeKey, bytes: &[u8; HELLO_BYTES]) -> Result<Self, HelloError> {
        if bytes[..4] != MAGIC {
            return Err(HelloError::Garbage);
        }
        if bytes[4..6] != VERSION.to_le_bytes() {
            return Err(HelloError::Version);
        }
        // Comparison of hashes is constant-time.
        if key.mac("hello", &[&bytes[..HELLO_BODY_BYTES]]) != field::<32>(bytes, HELLO_BODY_BYTES) {
            return Err(HelloError::Unauthenticated);
        }
        Ok(Self {
            generation: Generation(u64::from_le_bytes(field(bytes, 8))),
            from: Rank(u32::from_le_bytes(field(bytes, 16))),
            to: Rank(u32::from_le_bytes(field(bytes, 20))),
            world_size: u32::from_le_bytes(field(bytes, 24)),
            roster: field(bytes, 32),
            nonce: field(bytes, 64),
        })
    }
}

/// `N` bytes of `bytes` from `at`; the callers' offsets are constants within fixed-size messages.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

/// An acceptor's answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Status {
    /// Prove yourself.
    Challenge = 1,
    /// The slot is yours.
    Accepted = 2,
    /// The dialer's generation is over.
    Stale = 3,
    /// The acceptor is not there yet: dial again.
    NotYet = 4,
    /// The token is another one.
    Unauthenticated = 5,
    /// The dialer wanted somebody else, or is not in the roster, or has another roster.
    Roster = 6,
    /// Another version of this protocol.
    Version = 7,
}

impl Status {
    fn from_wire(value: u8) -> Option<Self> {
        [
            Self::Challenge,
            Self::Accepted,
            Self::Stale,
            Self::NotYet,
            Self::Unauthenticated,
            Self::Roster,
            Self::Version,
        ]
        .into_iter()
        .find(|status| *status as u8 == value)
    }
}

/// What an acceptor says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Reply {
    pub status: Status,
    pub generation: Generation,
    pub nonce: Nonce,
}

impl Reply {
    /// The wire form; `hello` are the bytes that are answered.
    pub(crate) fn encode(&self, key: &HandshakeKey, hello: &[u8; HELLO_BYTES]) -> [u8; REPLY_BYTES] {
        let mut bytes = [0; REPLY_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = self.status as u8;
        bytes[8..16].copy_from_slice(&self.generation.0.to_le_bytes());
        bytes[16..48].copy_from_slice(&self.nonce);
        let mac = key.mac("reply", &[&bytes[..REPLY_BODY_BYTES], hello]);
        bytes[REPLY_BODY_BYTES..].copy_from_slice(mac.as_bytes());
        bytes
    }

    /// The reply, and whether its MAC is right. A reply without a right MAC may only be used to word a refusal: an
    /// acceptor with another token cannot make a right one.
    pub(crate) fn decode(
        key: &HandshakeKey,
        hello: &[u8; HELLO_BYTES],
        bytes: &[u8; REPLY_BYTES],
    ) -> Option<(Self, bool)> {
        if bytes[..4] != MAGIC {
            return None;
        }
        let status = Status::from_wire(bytes[6])?;
        let authentic = bytes[4..6] == VERSION.to_le_bytes()
            && key.mac("reply", &[&bytes[..REPLY_BODY_BYTES], hello]) == field::<32>(bytes, REPLY_BODY_BYTES);
        let generation = Generation(u64::from_le_bytes(field(bytes, 8)));
        Some((
            Self {
                status,
                generation,
                nonce: field(bytes, 16),
            },
            authentic,
        ))
    }
}

/// What a dialer answers to a challenge.
pub(crate) fn proof(key: &HandshakeKey, hello: &[u8; HELLO_BYTES], challenge: &Nonce) -> [u8; PROOF_BYTES] {
    *key.mac("proof", &[challenge, hello]).as_bytes()
}

/// Whether that answer is right.
pub(crate) fn proof_is_right(
    key: &HandshakeKey,
    hello: &[u8; HELLO_BYTES],
    challenge: &Nonce,
    given: &[u8; PROOF_BYTES],
) -> bool {
    key.mac("proof", &[challenge, hello]) == *given
}

/// An acceptor's judgement of an authentic Hello.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Door {
    pub generation: Generation,
    pub rank: Rank,
    pub world_size: u32,
    pub roster: [u8; 32],
}

impl Door {
    /// `Challenge` for a peer that belongs here, else the refusal. Generation comes before everything else (SUP-2): a
    /// stale dialer's roster is of no interest.
    pub(crate) fn judge(&self, hello: &Hello) -> Status {
        if hello.generation < self.generation {
            Status::Stale
        } else if hello.generation > self.generation {
            Status::NotYet
        } else if hello.to != self.rank
            || hello.from <= self.rank
            || hello.from.0 >= self.world_size
            || hello.world_size != self.world_size
            || hello.roster != self.roster
        {
            Status::Roster
        } else {
            Status::Challenge
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            generation: Generation(7),
            from: Rank(2),
            to: Rank(1),
            world_size: 3,
            roster: roster_digest(&["a".into(), "b".into(), "c".into()]),
            nonce: [9; 32],
        }
    }

    fn door() -> Door {
        Door {
            generation: Generation(7),
            rank: Rank(1),
            world_size: 3,
            roster: hello().roster,
        }
    }

    #[test]
    fn messages_survive_the_wire_and_no_bit_flip_passes() {
        let key = HandshakeKey::derive(&[1; 32]);
        let bytes = hello().encode(&key);
        assert_eq!(Hello::decode(&key, &bytes), Ok(hello()));
        for bit in 0..HELLO_BYTES * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Hello::decode(&key, &bad).is_err(), "bit {bit}");
        }
        let reply = Reply {
            status: Status::Challenge,
            generation: Generation(7),
            nonce: [4; 32],
        };
        let wire = reply.encode(&key, &bytes);
        assert_eq!(Reply::decode(&key, &bytes, &wire), Some((reply, true)));
        for bit in 0..REPLY_BYTES * 8 {
            let mut bad = wire;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(
                !Reply::decode(&key, &bytes, &bad).is_some_and(|(_, authentic)| authentic),
                "bit {bit}"
            );
        }
    }

    #[test]
    fn another_token_opens_nothing() {
        let (ours, theirs) = (HandshakeKey::derive(&[1; 32]), HandshakeKey::derive(&[2; 32]));
        let bytes = hello().encode(&theirs);
        assert_eq!(Hello::decode(&ours, &bytes), Err(HelloError::Unauthenticated));
        assert!(!proof_is_right(
            &ours,
            &bytes,
            &[3; 32],
            &proof(&theirs, &bytes, &[3; 32])
        ));
    }

    #[test]
    fn a_recorded_proof_fails_under_a_new_challenge() {
        let key = HandshakeKey::derive(&[1; 32]);
        let bytes = hello().encode(&key);
        let recorded = proof(&key, &bytes, &[3; 32]);
        assert!(proof_is_right(&key, &bytes, &[3; 32], &recorded));
        assert!(!proof_is_right(&key, &bytes, &[4; 32], &recorded));
    }

    // SUP-2: the generation decides first.
    #[test]
    fn the_door_opens_to_this_generation_and_roster_only() {
        assert_eq!(door().judge(&hello()), Status::Challenge);
        let stranger = [0; 32];
        assert_eq!(
            door().judge(&Hello {
                generation: Generation(6),
                roster: stranger,
                ..hello()
            }),
            Status::Stale
        );
        assert_eq!(
            door().judge(&Hello {
                generation: Generation(8),
                ..hello()
            }),
            Status::NotYet
        );
        assert_eq!(
            door().judge(&Hello {
                roster: stranger,
                ..hello()
            }),
            Status::Roster
        );
        assert_eq!(door().judge(&Hello { to: Rank(0), ..hello() }), Status::Roster);
        assert_eq!(
            door().judge(&Hello {
                from: Rank(3),
                ..hello()
            }),
            Status::Roster
        );
        assert_eq!(
            door().judge(&Hello {
                from: Rank(0),
                ..hello()
            }),
            Status::Roster,
            "lower ranks are dialed"
        );
    }
}
