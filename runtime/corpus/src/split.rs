//! Which documents are held out of training: a pure function of a document's text.
//!
//! Not of the run's seed: runs that differ in seed alone must be measured on the same held-out text. A text that occurs
//! twice, in one domain or two, lands on the same side, so no document is both trained on and measured.

use serde::{Deserialize, Serialize};

/// The two sides of a domain.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Seen in training.
    Train,
    /// Measured only.
    HeldOut,
}

impl Split {
    /// Both, in the order in which they are stored.
    pub const ALL: [Self; 2] = [Self::Train, Self::HeldOut];

    /// The name in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Train => "training",
            Self::HeldOut => "held-out",
        }
    }

    pub(crate) const fn index(self) -> usize {
        match self {
            Self::Train => 0,
            Self::HeldOut => 1,
        }
    }

    /// The part of a file name.
    pub(crate) const fn file_part(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::HeldOut => "held-out",
        }
    }

    /// The side of the document whose text has this BLAKE3 hash, if `held_out_fraction` (in 0..1) is held out.
    #[must_use]
    pub fn of(document: &blake3::Hash, held_out_fraction: f64) -> Self {
        if unit(document, "tarazed corpus held-out split v1") < held_out_fraction {
            Self::HeldOut
        } else {
            Self::Train
        }
    }
}

/// A number in 0..1, uniform over documents and independent between purposes.
pub(crate) fn unit(document: &blake3::Hash, purpose: &str) -> f64 {
    let key = blake3::derive_key(purpose, document.as_bytes());
    let mut head = [0_u8; 8];
    head.copy_from_slice(&key[..8]);
    (u64::from_le_bytes(head) >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The held-out set only grows with the fraction, so a larger one never moves text into training.
        #[test]
        fn a_larger_fraction_keeps_what_was_held_out(text in ".*", a in 0.0..0.5_f64, b in 0.0..0.5_f64) {
            let hash = blake3::hash(text.as_bytes());
            let (low, high) = if a < b { (a, b) } else { (b, a) };
            if Split::of(&hash, low) == Split::HeldOut {
                prop_assert_eq!(Split::of(&hash, high), Split::HeldOut);
            }
            prop_assert_eq!(Split::of(&hash, 0.0), Split::Train);
        }
    }

    #[test]
    fn the_share_held_out_is_the_fraction() {
        let held = (0..20_000_u32)
            .filter(|i| Split::of(&blake3::hash(&i.to_le_bytes()), 0.03) == Split::HeldOut)
            .count();
        // 600 expected, standard deviation 24.
        assert!((500..700).contains(&held), "{held}");
    }
}
