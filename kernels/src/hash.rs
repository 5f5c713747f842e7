//! The 128-bit hash of one block of training state (STEP-4).
//!
//! Two sums of products modulo 2⁶⁴ over the words of a block's master weights and both moments, in the manner of NH
//! (Black et al. 1999, UMAC): `sum += ((w + k) mod 2³²) · ((w' + k') mod 2³²)` over neighbouring words `w, w'`, with keys
//! `k` that depend on block, array, position and sum. Addition modulo 2⁶⁴ has no order, so any number of threads, in any
//! order, on any device, make the same integer; it costs no second pass over the state.
//!
//! What it sees: **every** change confined to one word. Such a change alters a product by a non-zero difference below 2³²
//! times the partner factor, and goes unseen only where that factor is zero; the partner's keys for the two sums differ
//! in their lowest bit, so it is not zero in both. Any other change (several words, a swap of words, arrays or blocks) is
//! missed with probability about 2⁻⁶⁴, the keys taken as random. It is no defence against an adversary: the keys are public, and BLAKE3
//! over the block hashes does not change that. The digest of stored objects is BLAKE3 over their bytes.

use std::fmt;
use tarazed_domain::BlockIndex;

/// Hash of one block of training state.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct BlockHash(pub [u8; 16]);

impl BlockHash {
    /// Joins the two sums, little-endian.
    #[must_use]
    pub fn from_sums(sums: [u64; 2]) -> Self {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&sums[0].to_le_bytes());
        bytes[8..].copy_from_slice(&sums[1].to_le_bytes());
        Self(bytes)
    }

    /// The bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Multiplies an element's position before mixing.
pub(crate) const POSITION_FACTOR: u32 = 0x9E37_79B1;
/// First multiplier of the mixer.
pub(crate) const MIX_FACTOR_1: u32 = 0x7FEB_352D;
/// Second multiplier of the mixer.
pub(crate) const MIX_FACTOR_2: u32 = 0x846C_A68B;
/// Key multiplier per array (master, first moment, second moment) and sum; all odd, so each key stream is a permutation.
pub(crate) const KEY_FACTORS: [[u32; 2]; 3] = [
    [0x2C1B_3C6D, 0x297A_2D39],
    [0x9ACD_5B91, 0xC2B2_AE35],
    [0x85EB_CA6B, 0xCC9E_2D51],
];
/// Keys of the first sum have a clear highest bit, those of the second a set one: they never coincide.
pub(crate) const KEY_MASK_FIRST: u32 = 0x7FFF_FFFF;
/// See [`KEY_MASK_FIRST`].
pub(crate) const KEY_MASK_SECOND: u32 = 0x8000_0000;

/// The two key seeds of a block.
pub(crate) const fn block_seeds(block: BlockIndex) -> [u32; 2] {
    let mut z = (block.0 as u64).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    [z as u32, (z >> 32) as u32]
}

/// What all keys of element `position` of a block derive from.
pub(crate) const fn position_key(seeds: [u32; 2], position: u32) -> u32 {
    let mut z = position.wrapping_mul(POSITION_FACTOR).wrapping_add(seeds[0]);
    z = (z ^ (z >> 16)).wrapping_mul(MIX_FACTOR_1) ^ seeds[1];
    z = (z ^ (z >> 15)).wrapping_mul(MIX_FACTOR_2);
    z ^ (z >> 16)
}

/// The keys of both sums for one word.
pub(crate) const fn word_keys(position_key: u32, array: usize) -> [u32; 2] {
    [
        position_key.wrapping_mul(KEY_FACTORS[array][0]) & KEY_MASK_FIRST,
        position_key.wrapping_mul(KEY_FACTORS[array][1]) | KEY_MASK_SECOND,
    ]
}

/// The hash of a block by its definition: the reference that every device must match.
///
/// The arrays are master weights, first and second moment, of equal length. A last word without a partner pairs with zero.
///
/// # Panics
/// If the arrays differ in length.
#[must_use]
pub fn block_hash(block: BlockIndex, arrays: [&[f32]; 3]) -> BlockHash {
    let seeds = block_seeds(block);
    let len = arrays[0].len();
    assert!(
        arrays.iter().all(|array| array.len() == len),
        "arrays of one block differ in length"
    );
    let mut sums = [0_u64; 2];
    for (index, array) in arrays.iter().enumerate() {
        for (pair, words) in array.chunks(2).enumerate() {
            let word = |lane: usize| words.get(lane).map_or(0, |value| value.to_bits());
            let keys = |lane: usize| word_keys(position_key(seeds, (2 * pair + lane) as u32), index);
            let (left, right) = (keys(0), keys(1));
            for (sum, (l, r)) in sums.iter_mut().zip(left.into_iter().zip(right)) {
                let product = u64::from(word(0).wrapping_add(l)) * u64::from(word(1).wrapping_add(r));
                *sum = sum.wrapping_add(product);
            }
        }
    }
    BlockHash::from_sums(sums)
}
