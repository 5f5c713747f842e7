//! Randomness from a seed alone: the output of BLAKE3, which stays the same for ever and on every machine.
//!
//! Each use has a stream of its own, named by a label, so that one more draw in one does not change another.

use std::ops::Range;

const CONTEXT: &str = "tarazed bench mixture v1";

/// Bytes of the stream that are made at a time.
const CHUNK_BYTES: usize = 1024;

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Random {
    stream: blake3::OutputReader,
    chunk: [u8; CHUNK_BYTES],
    /// Bytes of the chunk that are used up.
    used: usize,
}

impl Random {
    /// The stream of a seed and a label.
    #[must_use]
    pub fn of(seed: u64, label: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&seed.to_le_bytes());
        hasher.update(label.as_bytes());
        Self {
            stream: hasher.finalize_xof(),
            chunk: [0; CHUNK_BYTES],
            used: CHUNK_BYTES,
        }
    }

    /// Sixty-four random bits.
    pub fn bits(&mut self) -> u64 {
        if self.used == CHUNK_BYTES {
            self.stream.fill(&mut self.chunk);
            self.used = 0;
        }
        let mut word = [0; 8];
        word.copy_from_slice(&self.chunk[self.used..self.used + 8]);
        self.used += 8;
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

    /// Read in chunks, it is the stream as BLAKE3 gives it.
    #[test]
    fn no_part_of_the_stream_is_lost_between_chunks() {
        let mut random = Random::of(5, "test");
        let drawn: Vec<u8> = (0..300).flat_map(|_| random.bits().to_le_bytes()).collect();
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&5_u64.to_le_bytes()).update(b"test");
        let mut expected = vec![0; drawn.len()];
        hasher.finalize_xof().fill(&mut expected);
        assert_eq!(drawn, expected);
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
