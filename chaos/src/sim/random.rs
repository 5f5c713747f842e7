//! Randomness from a seed alone: xoshiro256** seeded by SplitMix64 (Blackman and Vigna, 2018).
//!
//! Each part of a simulation draws from a stream of its own, named by a label, so that one more draw in one part does not
//! change what the others do.

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Random([u64; 4]);

fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Random {
    /// The stream of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut state = seed;
        Self(std::array::from_fn(|_| split_mix(&mut state)))
    }

    /// The stream of a part of a simulation: a function of the seed and the labels alone.
    #[must_use]
    pub fn of(seed: u64, label: &str, number: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.update(&number.to_le_bytes());
        hasher.update(label.as_bytes());
        let digest = hasher.finalize();
        let word: [u8; 8] = std::array::from_fn(|i| digest.as_bytes()[i]);
        Self::new(u64::from_le_bytes(word))
    }

    /// Sixty-four random bits.
    pub fn bits(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.0;
        let result = b.wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let shifted = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= shifted;
        *d = d.rotate_left(45);
        result
    }

    /// A number in `[0, 1)`.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// A number in `[low, high]`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        let width = high.saturating_sub(low).saturating_add(1);
        low + ((u128::from(self.bits()) * u128::from(width)) >> 64) as u64
    }

    /// True with this probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    /// One of several, each as likely.
    ///
    /// # Panics
    /// If there is none: a programmer's error.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.between(0, from.len() as u64 - 1) as usize]
    }

    /// A time with this mean, exponentially distributed and cut at eight times the mean (milliseconds, at least one).
    pub fn waiting_ms(&mut self, mean_ms: f64) -> u64 {
        let unit = self.unit().max(f64::MIN_POSITIVE);
        let time = -libm::log(unit) * mean_ms;
        time.min(mean_ms * 8.0).max(1.0) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn streams_depend_on_seed_and_label_alone() {
        let first = Random::of(7, "links", 3).bits();
        assert_eq!(Random::of(7, "links", 3).bits(), first);
        assert_ne!(Random::of(8, "links", 3).bits(), first);
        assert_ne!(Random::of(7, "links", 4).bits(), first);
        assert_ne!(Random::of(7, "store", 3).bits(), first);
    }

    #[test]
    fn ranges_are_whole_and_within() {
        let mut random = Random::new(1);
        let mut seen = [0; 4];
        for _ in 0..4000 {
            seen[random.between(3, 6) as usize - 3] += 1;
            assert!((0.0..1.0).contains(&random.unit()));
        }
        assert!(seen.iter().all(|&count| count > 800), "{seen:?}");
        assert_eq!(random.between(u64::MAX, u64::MAX), u64::MAX);
    }
}
