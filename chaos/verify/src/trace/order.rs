//! The order of a domain's samples in one epoch: which sample stands at which place.
//!
//! A rectangle of `rows × columns` places, just large enough; eight keyed turns, alternately of row and column; a point
//! that falls outside is sent round again. Keys are the first 64 bytes of BLAKE3 in its key-derivation mode over seed,
//! epoch, length and the domain's name (`docs/FORMATS.md`).

const ORDER_CONTEXT: &str = "tarazed sample order v1";
const TURNS: usize = 8;

pub struct EpochOrder {
    samples: u64,
    rows: u64,
    columns: u64,
    keys: [u64; TURNS],
}

impl EpochOrder {
    /// `samples` is at least 1.
    pub fn new(seed: u64, domain: &str, epoch: u32, samples: u64) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(ORDER_CONTEXT);
        hasher.update(&seed.to_le_bytes()).update(&epoch.to_le_bytes());
        hasher.update(&samples.to_le_bytes()).update(domain.as_bytes());
        let mut output = hasher.finalize_xof();
        let keys = std::array::from_fn(|_| {
            let mut word = [0; 8];
            output.fill(&mut word);
            u64::from_le_bytes(word)
        });
        let root = samples.isqrt();
        let rows = root + u64::from(root * root < samples);
        Self {
            samples,
            rows,
            columns: samples.div_ceil(rows),
            keys,
        }
    }

    /// The sample at a place below the number of samples.
    pub fn sample(&self, place: u64) -> u64 {
        let mut point = place;
        loop {
            let (mut row, mut column) = (point % self.rows, point / self.rows);
            for (turn, key) in self.keys.iter().enumerate() {
                if turn % 2 == 0 {
                    row = (row + scaled(mix(column, *key), self.rows)) % self.rows;
                } else {
                    column = (column + scaled(mix(row, *key), self.columns)) % self.columns;
                }
            }
            point = row + column * self.rows;
            if point < self.samples {
                return point;
            }
        }
    }
}

/// A hash scaled to `0..size`: the high half of the product.
const fn scaled(hash: u64, size: u64) -> u64 {
    ((hash as u128 * size as u128) >> 64) as u64
}

/// By how many places the batch of a step (from 0) is turned.
pub const fn batch_turn(seed: u64, step: u64, sequences: u32) -> u64 {
    mix(step, mix(seed, 0x7461_7261_7A65_6421)) % sequences as u64
}

const fn mix(value: u64, key: u64) -> u64 {
    split_mix(split_mix(value ^ key).wrapping_add(key.rotate_left(32)))
}

/// The output function of SplitMix64.
const fn split_mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ z >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_comes_once() {
        for samples in (1..60).chain([997, 1_000, 1_024]) {
            let order = EpochOrder::new(7, "web", 2, samples);
            let mut seen: Vec<u64> = (0..samples).map(|place| order.sample(place)).collect();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..samples), "{samples} samples");
        }
    }

    #[test]
    fn the_order_depends_on_everything_it_is_made_of() {
        let order = |seed, domain: &str, epoch, samples| -> Vec<u64> {
            let order = EpochOrder::new(seed, domain, epoch, samples);
            (0..100).map(|place| order.sample(place)).collect()
        };
        let base = order(1, "web", 0, 1_000);
        for other in [
            order(2, "web", 0, 1_000),
            order(1, "wiki", 0, 1_000),
            order(1, "web", 1, 1_000),
            order(1, "web", 0, 1_001),
        ] {
            assert_ne!(base, other);
        }
    }
}
