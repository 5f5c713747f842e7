//! The order of a domain's sequences in one epoch: a keyed permutation, computed point by point.
//!
//! No shuffled index is stored or sent: any rank computes the place of any sample from (seed, domain, epoch, length).
//! It is a Feistel network on a rectangle `left × right` just large enough, with cycle walking for what is left over
//! (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Round keys come from BLAKE3. The rectangle
//! has at most `left` points too many, so a walk is rare. This orders samples well; it is no cipher.
//!
//! - **DATA-1** A bijection on `0..len`, so every sequence of an epoch comes exactly once.

use tarazed_domain::StepIndex;

/// Sequences of one domain at most.
pub const SEQUENCES_MAX: u64 = 1 << 40;

const ROUNDS: usize = 8;
const CONTEXT: &str = "tarazed sample order v1";

/// A keyed bijection on `0..len`.
#[derive(Clone, Debug)]
pub struct KeyedPermutation {
    len: u64,
    left: u64,
    right: u64,
    keys: [u64; ROUNDS],
}

impl KeyedPermutation {
    /// The order of `domain`'s `len` sequences in `epoch`.
    ///
    /// # Panics
    /// If `len` is 0 or above [`SEQUENCES_MAX`]: the recipe refuses that before.
    #[must_use]
    pub fn new(seed: u64, domain: &str, epoch: u32, len: u64) -> Self {
        assert!((1..=SEQUENCES_MAX).contains(&len), "a permutation of {len} sequences");
        let floor = len.isqrt();
        let left = if floor * floor == len { floor } else { floor + 1 };
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&seed.to_le_bytes());
        hasher.update(&epoch.to_le_bytes());
        hasher.update(&len.to_le_bytes());
        hasher.update(domain.as_bytes());
        let mut bytes = [0; ROUNDS * 8];
        hasher.finalize_xof().fill(&mut bytes);
        let mut keys = [0; ROUNDS];
        for (key, word) in keys.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut le = [0; 8];
            le.copy_from_slice(word);
            *key = u64::from_le_bytes(le);
        }
        Self {
            len,
            left,
            right: len.div_ceil(left),
            keys,
        }
    }

    /// The sequence at place `index` of the epoch.
    ///
    /// # Panics
    /// If `index` is not below the length.
    #[must_use]
    pub fn apply(&self, index: u64) -> u64 {
        assert!(index < self.len, "place {index} of {} sequences", self.len);
        let mut value = self.round_trip(index);
        // Walking the cycle from a point inside must come back inside, so this ends; it almost never turns.
        while value >= self.len {
            value = self.round_trip(value);
        }
        value
    }

    /// Number of sequences.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Never: there is at least one sequence.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        false
    }

    fn round_trip(&self, value: u64) -> u64 {
        let (mut left, mut right) = (value % self.left, value / self.left);
        for pair in self.keys.chunks_exact(2) {
            left = turn(left, mix(right, pair[0]), self.left);
            right = turn(right, mix(left, pair[1]), self.right);
        }
        left + right * self.left
    }
}

/// `value` turned within `0..size` by a hash: the hash is scaled by a multiplication, which is faster than a remainder.
const fn turn(value: u64, hash: u64, size: u64) -> u64 {
    let turned = value + ((hash as u128 * size as u128) >> 64) as u64;
    if turned >= size { turned - size } else { turned }
}

/// How far a step's batch is turned, in `0..sequences`: even over steps, keyed by (seed, step).
#[must_use]
pub(super) fn rotation(seed: u64, step: StepIndex, sequences: u32) -> u32 {
    (mix(step.0, mix(seed, 0x7461_7261_7a65_6421)) % u64::from(sequences.max(1))) as u32
}

/// A keyed 64-bit mixer: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), twice around the key.
const fn mix(value: u64, key: u64) -> u64 {
    finalise(finalise(value ^ key).wrapping_add(key.rotate_left(32)))
}

const fn finalise(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn image(permutation: &KeyedPermutation) -> Vec<u64> {
        (0..permutation.len()).map(|index| permutation.apply(index)).collect()
    }

    /// DATA-1: every sequence of an epoch exactly once, for all small lengths.
    #[test]
    fn bijection_for_all_small_lengths() {
        for len in 1..=400 {
            for epoch in 0..3 {
                let mut image = image(&KeyedPermutation::new(7, "web", epoch, len));
                image.sort_unstable();
                assert!(image.into_iter().eq(0..len), "length {len}, epoch {epoch}");
            }
        }
    }

    #[test]
    fn seed_domain_epoch_and_length_each_change_the_order() {
        let base = image(&KeyedPermutation::new(7, "web", 0, 1000));
        for other in [
            KeyedPermutation::new(8, "web", 0, 1000),
            KeyedPermutation::new(7, "wiki", 0, 1000),
            KeyedPermutation::new(7, "web", 1, 1000),
            KeyedPermutation::new(7, "web", 0, 1001),
        ] {
            let same = base.iter().zip(image(&other)).filter(|(a, b)| **a == *b).count();
            assert!(same < 12, "{same} of 1000 places agree; 1 is expected by chance");
        }
    }

    /// The order is part of what makes a run: it must never change silently.
    #[test]
    fn order_is_pinned() {
        let order: Vec<u64> = (0..8)
            .map(|place| KeyedPermutation::new(1, "web", 0, 1_000_000).apply(place))
            .collect();
        assert_eq!(order, PINNED);
    }
    const PINNED: [u64; 8] = [264781, 97248, 776563, 20857, 407965, 537136, 522965, 209697];

    /// Neighbours in an epoch are not neighbours in the source: documents cut into several sequences are torn apart, and
    /// each tenth of an epoch draws from every tenth of the source.
    #[test]
    fn order_is_well_mixed() {
        const LEN: u64 = 10_000;
        for epoch in 0..20 {
            let image = image(&KeyedPermutation::new(3, "web", epoch, LEN));
            let near = image.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) <= 5).count();
            assert!(near < 40, "{near} neighbours stayed together; 10 are expected");
            let mut cells = [[0_f64; 10]; 10];
            for (place, sequence) in image.iter().enumerate() {
                cells[place / 1000][(sequence / 1000) as usize] += 1.0;
            }
            let chi2: f64 = cells.iter().flatten().map(|n| (n - 100.0) * (n - 100.0) / 100.0).sum();
            // 81 degrees of freedom: mean 81, standard deviation 12.7.
            assert!((30.0..160.0).contains(&chi2), "chi-square {chi2} in epoch {epoch}");
        }
    }

    /// Small domains are shuffled like large ones: any place goes anywhere, and one place stays on average.
    #[test]
    fn small_permutations_are_fair() {
        for len in [2_u64, 3, 5, 12, 50] {
            let (mut fixed, mut first) = (0.0, vec![0.0; len as usize]);
            for seed in 0..2000 {
                let image = image(&KeyedPermutation::new(seed, "web", 0, len));
                fixed += image
                    .iter()
                    .zip(0..)
                    .filter(|(sequence, place)| **sequence == *place)
                    .count() as f64;
                first[image[0] as usize] += 1.0;
            }
            assert!((fixed / 2000.0_f64 - 1.0).abs() < 0.12, "length {len}: {fixed}");
            let fair = 2000.0 / len as f64;
            let chi2: f64 = first.iter().map(|n| (n - fair) * (n - fair) / fair).sum();
            let freedom = len as f64 - 1.0;
            assert!(
                chi2 < freedom + 5.0 * (2.0 * freedom).sqrt() + 5.0,
                "length {len}: {chi2}"
            );
        }
    }

    proptest! {
        /// DATA-1 at any length up to 2^40: inside the range, and no two of a sample of places meet.
        #[test]
        fn injective_at_any_length(seed: u64, epoch: u32, bits in 1_u32..=40, start: u64, length: u64) {
            let len = (length % (1 << bits)).max(1);
            let permutation = KeyedPermutation::new(seed, "code", epoch, len);
            let first = start % len;
            let mut seen: Vec<u64> = (first..len.min(first + 200)).map(|index| permutation.apply(index)).collect();
            prop_assert!(seen.iter().all(|sequence| *sequence < len));
            let count = seen.len();
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len(), count);
        }
    }
}
