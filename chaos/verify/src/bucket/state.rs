//! Hashes of the training state, from the stored numbers: the proof that a checkpoint restores to the state that its trace
//! line names (STEP-4).
//!
//! A block's hash is two sums modulo 2⁶⁴. Each adds, over neighbouring words of each of three arrays, the product of both
//! words after a key of its own was added to each modulo 2³²; keys are made of block, array and position. A sum has no
//! order, so the arrays may come one after the other, as they lie in a file. `docs/FORMATS.md` has the constants.

const STATE_CONTEXT: &str = "tarazed 2026 training state hash";
/// Per array (master weights, first moment, second moment): what a position's key is multiplied by for each sum.
const ARRAY_FACTORS: [(u32, u32); 3] = [
    (0x2C1B_3C6D, 0x297A_2D39),
    (0x9ACD_5B91, 0xC2B2_AE35),
    (0x85EB_CA6B, 0xCC9E_2D51),
];
const HIGHEST_BIT: u32 = 1 << 31;

/// Two sums under way.
#[derive(Clone, Copy, Default, Debug)]
pub struct BlockSums(u64, u64);

impl BlockSums {
    /// Adds words `2 * pair` and `2 * pair + 1` of one array of a block; a word without a partner pairs with zero.
    pub fn add(&mut self, seeds: BlockSeeds, array: usize, pair: u32, words: [u32; 2]) {
        let keys = [0, 1].map(|lane| seeds.keys(2 * pair + lane, array));
        let product = |a: u32, b: u32| u64::from(words[0].wrapping_add(a)) * u64::from(words[1].wrapping_add(b));
        self.0 = self.0.wrapping_add(product(keys[0].0, keys[1].0));
        self.1 = self.1.wrapping_add(product(keys[0].1, keys[1].1));
    }

    pub const fn bytes(self) -> [u8; 16] {
        (self.0 as u128 | (self.1 as u128) << 64).to_le_bytes()
    }
}

/// What all keys of a block derive from.
#[derive(Clone, Copy)]
pub struct BlockSeeds(u32, u32);

impl BlockSeeds {
    pub const fn of(block: u32) -> Self {
        let mut mixed = (block as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        Self(mixed as u32, (mixed >> 32) as u32)
    }

    const fn keys(self, position: u32, array: usize) -> (u32, u32) {
        let mut mixed = position.wrapping_mul(0x9E37_79B1).wrapping_add(self.0);
        mixed = (mixed ^ mixed >> 16).wrapping_mul(0x7FEB_352D) ^ self.1;
        mixed = (mixed ^ mixed >> 15).wrapping_mul(0x846C_A68B);
        mixed ^= mixed >> 16;
        let (first, second) = ARRAY_FACTORS[array];
        (
            mixed.wrapping_mul(first) & !HIGHEST_BIT,
            mixed.wrapping_mul(second) | HIGHEST_BIT,
        )
    }
}

/// BLAKE3 over step and block hashes, in block order.
pub struct StateHash(blake3::Hasher);

impl StateHash {
    pub fn at(step: u64) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(STATE_CONTEXT);
        hasher.update(&step.to_le_bytes());
        Self(hasher)
    }

    pub fn block(&mut self, sums: BlockSums) {
        self.0.update(&sums.bytes());
    }

    pub fn finish(&self) -> [u8; 32] {
        *self.0.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(block: u32, arrays: &[[u32; 3]; 3]) -> [u8; 16] {
        let mut sums = BlockSums::default();
        for (array, words) in arrays.iter().enumerate() {
            sums.add(BlockSeeds::of(block), array, 0, [words[0], words[1]]);
            sums.add(BlockSeeds::of(block), array, 1, [words[2], 0]);
        }
        sums.bytes()
    }

    #[test]
    fn every_word_its_place_its_array_and_its_block_count() {
        let arrays = [[1, 2, 3], [4, 5, 6], [7, 8, 9]];
        let base = hash(0, &arrays);
        let mut others = vec![hash(1, &arrays)];
        for array in 0..3 {
            for word in 0..3 {
                for bit in 0..32 {
                    let mut changed = arrays;
                    changed[array][word] ^= 1 << bit;
                    others.push(hash(0, &changed));
                }
            }
        }
        others.push(hash(0, &[[2, 1, 3], arrays[1], arrays[2]]));
        others.push(hash(0, &[arrays[1], arrays[0], arrays[2]]));
        assert!(others.iter().all(|other| *other != base));
        let mut states = [StateHash::at(1), StateHash::at(2), StateHash::at(1)].map(|mut state| {
            state.block(BlockSums(1, 2));
            state
        });
        states[2].block(BlockSums(0, 0));
        let hashes: Vec<_> = states.iter().map(StateHash::finish).collect();
        assert!(hashes[0] != hashes[1] && hashes[0] != hashes[2]);
    }
}
