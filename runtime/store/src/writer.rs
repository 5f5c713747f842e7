//! Who writes: a nonce that no other process shares, and the generation it writes for (CKPT-2, CKPT-3).

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::time::{SystemTime, UNIX_EPOCH};
use tarazed_domain::Generation;

/// 128 bits that tell one writing process from every other; never an input of any number (DET-1).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct WriterNonce(pub [u8; 16]);

impl WriterNonce {
    /// A fresh nonce, from the operating system's entropy (by way of the standard hasher's keys), process and clock.
    #[must_use]
    pub fn fresh() -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("tarazed checkpoint writer nonce");
        for round in 0_u64..4 {
            hasher.update(&RandomState::new().hash_one(round).to_le_bytes());
        }
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        hasher.update(&since_epoch.as_nanos().to_le_bytes());
        hasher.update(&std::process::id().to_le_bytes());
        let mut nonce = [0; 16];
        nonce.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Self(nonce)
    }
}

impl fmt::Display for WriterNonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for WriterNonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for WriterNonce {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for WriterNonce {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut nonce = [0; 16];
        hex::decode_to_slice(&text, &mut nonce)
            .map_err(|_| serde::de::Error::custom("a writer's nonce is 32 hex digits"))?;
        Ok(Self(nonce))
    }
}

/// The identity under which a process opens the store.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
)]
pub struct WriterId {
    /// Told apart by this.
    pub nonce: WriterNonce,
    /// The generation the process knew when it opened the store; a claim asks for a later one.
    pub generation: Generation,
}

impl WriterId {
    /// A writer with a fresh nonce.
    #[must_use]
    pub fn fresh(generation: Generation) -> Self {
        Self {
            nonce: WriterNonce::fresh(),
            generation,
        }
    }
}
