//! Randomness from a seed alone: the output of BLAKE3, which stays the same for ever and on every machine.
//!
//! Each use has a stream of its own, named by a label, so that one more draw in one does not change another.

use std::ops::Range;

const CONTEXT: &str = "tarazed bench mixture v1";

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Random(blake3::OutputReader);

impl Random {
    /// The stream of a seed and a label.
    #[must_use]
    pub fn of(seed: u64, label: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&seed.to_le_bytes());
        hasher.update(label.as_bytes());
        Self(hasher.finalize_xof())
    }

    /// Sixty-four random bits.
    pub fn bits(&mut self) -> u64 {
        let mut word = [0; 8];
        self.0.fill(&mut word);
        u64::from_le_bytes(word)
    }

    /// A number in `[0, 1)`.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// A number in `range`; numbers differ in chance by at most their count over `2^64`.
    ///
    /// # Panics
    /// If the range is empty: a programmer's error.
    pub fn index(&mut self, range: Range<usize>) -> usize {
        assert!(!range.is_empty(), "a number in an empty range");
        let width = (range.end - range.start) as u128;
        range.start + ((u128::from(self.bits()) * width) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_its_seed_and_label() {
        let draws = |seed, label: &str| {
            let mut random = Random::of(seed, label);
            [random.bits(), random.bits()]
        };
        assert_eq!(draws(1, "noise"), draws(1, "noise"));
        assert_ne!(draws(1, "noise"), draws(2, "noise"));
        assert_ne!(draws(1, "noise"), draws(1, "sweep"));
        assert_ne!(draws(1, "noise")[0], draws(1, "noise")[1]);
    }

    #[test]
    fn numbers_are_spread_over_their_range() {
        let mut random = Random::of(3, "test");
        let mut counts = [0_u32; 7];
        for _ in 0..7_000 {
            counts[random.index(10..17) - 10] += 1;
            assert!((0.0..1.0).contains(&random.unit()));
        }
        // 1,000 expected of each, standard deviation 29.
        assert!(counts.iter().all(|count| (850..1_150).contains(count)), "{counts:?}");
    }
}
