//! Counting hashed things of one document after another, in one piece of memory.
//!
//! The rules of repetition ask a dozen times for each document which of its lines, paragraphs and word groups came before.
//! A fresh hash map for each would spend its time in the allocator and in clearing.

/// How often each key came since [`Counter::reset`]. Keys are hashes already.
#[derive(Debug, Default)]
pub(super) struct Counter {
    slots: Vec<Slot>,
    mask: usize,
    /// Slots of other stamps are empty.
    stamp: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    key: u64,
    stamp: u32,
    count: u32,
}

impl Counter {
    /// Forgets everything, with room for this many different keys.
    pub(super) fn reset(&mut self, keys_max: usize) {
        let slots = (keys_max * 2).next_power_of_two().max(64);
        if self.slots.len() < slots {
            self.slots = vec![Slot::default(); slots];
            self.stamp = 0;
        }
        self.mask = slots - 1;
        self.stamp = self.stamp.wrapping_add(1);
        if self.stamp == 0 {
            self.slots.fill(Slot::default());
            self.stamp = 1;
        }
    }

    /// Counts one more of `key`, and says how often it came before. More keys than [`Counter::reset`] was told of are a
    /// programmer's error.
    pub(super) fn add(&mut self, key: u64) -> u32 {
        let mut at = (mix(key) as usize) & self.mask;
        loop {
            let slot = &mut self.slots[at];
            if slot.stamp != self.stamp {
                *slot = Slot {
                    key,
                    stamp: self.stamp,
                    count: 1,
                };
                return 0;
            }
            if slot.key == key {
                slot.count += 1;
                return slot.count - 1;
            }
            at = (at + 1) & self.mask;
        }
    }

    /// Bytes held.
    pub(super) const fn bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>()
    }
}

/// A bijection of 64 bits in which every bit of the result depends on every bit of the argument (Steele, Lea and Flood, "Fast
/// splittable pseudorandom number generators", OOPSLA 2014, section 5, `mix64variant13`).
pub(crate) const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Hashes of all runs of a length in a row of hashed units, each in constant time: polynomials modulo 2⁶⁴ over the units'
/// hashes (Rabin and Karp). Two runs of the same units have the same hash wherever they stand.
#[derive(Debug, Default)]
pub(super) struct Runs {
    /// `prefixes[i]` is the polynomial of the first `i` units.
    prefixes: Vec<u64>,
}

const BASE: u64 = 0x9E37_79B9_7F4A_7C15;

impl Runs {
    /// Takes the units of a text.
    pub(super) fn set(&mut self, units: impl Iterator<Item = u64>) {
        self.prefixes.clear();
        self.prefixes.push(0);
        let mut sum = 0_u64;
        for unit in units {
            sum = sum.wrapping_mul(BASE).wrapping_add(unit);
            self.prefixes.push(sum);
        }
    }

    /// Units there are.
    pub(super) const fn len(&self) -> usize {
        self.prefixes.len().saturating_sub(1)
    }

    /// Hash of the `length` units from `start` on; `power` is [`power`] of that length.
    pub(super) fn hash(&self, start: usize, length: usize, power: u64) -> u64 {
        mix(self.prefixes[start + length].wrapping_sub(self.prefixes[start].wrapping_mul(power)))
    }

    /// Bytes held.
    pub(super) const fn bytes(&self) -> usize {
        self.prefixes.capacity() * size_of::<u64>()
    }
}

/// The base to the power of `length`.
pub(super) const fn power(length: usize) -> u64 {
    BASE.wrapping_pow(length as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        /// As a map would, over several documents in the same memory.
        #[test]
        fn counts_are_those_of_a_map(documents in prop::collection::vec(prop::collection::vec(0..40_u64, 0..200), 1..6)) {
            let mut counter = Counter::default();
            for keys in documents {
                counter.reset(keys.len());
                let mut counts: HashMap<u64, u32> = HashMap::new();
                for key in keys {
                    let count = counts.entry(key).or_default();
                    prop_assert_eq!(counter.add(key), *count);
                    *count += 1;
                }
            }
        }

        /// Runs are equal exactly where their units are.
        #[test]
        fn runs_are_equal_where_their_units_are(units in prop::collection::vec(0..3_u64, 0..60), length in 1..6_usize) {
            let mut runs = Runs::default();
            runs.set(units.iter().map(|&unit| mix(unit + 1)));
            prop_assert_eq!(runs.len(), units.len());
            let power = power(length);
            for a in 0..units.len().saturating_sub(length - 1) {
                for b in 0..units.len().saturating_sub(length - 1) {
                    let same = units[a..a + length] == units[b..b + length];
                    prop_assert_eq!(runs.hash(a, length, power) == runs.hash(b, length, power), same);
                }
            }
        }
    }
}
