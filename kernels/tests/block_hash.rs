//! STEP-4: the block hash sees every change.

use proptest::prelude::*;
use tarazed_domain::BlockIndex;
use tarazed_kernels::BlockHash;
use tarazed_kernels::conformance::Random;
use tarazed_kernels::hash::block_hash;

const LEN: usize = 96;

fn state(seed: u64) -> [Vec<f32>; 3] {
    let mut random = Random::new(seed);
    [(); 3].map(|()| (0..LEN).map(|_| f32::from_bits(random.bits() as u32)).collect())
}

fn hash(block: u32, state: &[Vec<f32>; 3]) -> BlockHash {
    block_hash(BlockIndex(block), [&state[0], &state[1], &state[2]])
}

/// STEP-4: any single bit, in any array, at any place, always; the states that training really has among them.
#[test]
fn every_single_bit_counts() {
    let ordinary = [1.0_f32, 0.0, 1e-6].map(|value| vec![value; LEN]);
    let zero = [(); 3].map(|()| vec![0.0; LEN]);
    for mut state in [state(1), state(2), ordinary, zero] {
        let before = hash(3, &state);
        for array in 0..3 {
            for index in 0..LEN {
                for bit in 0..32 {
                    let kept = state[array][index];
                    state[array][index] = f32::from_bits(kept.to_bits() ^ (1 << bit));
                    assert_ne!(hash(3, &state), before, "array {array}, element {index}, bit {bit}");
                    state[array][index] = kept;
                }
            }
        }
    }
}

proptest! {
    /// STEP-4: several flipped bits, swapped elements, swapped arrays, another block.
    #[test]
    fn other_changes_count(
        seed in any::<u64>(),
        block in any::<u32>(),
        flips in prop::collection::btree_set((0_usize..3, 0_usize..LEN, 0_u32..32), 2..6),
        (left, right) in (0_usize..LEN, 0_usize..LEN),
        (one, other) in (0_usize..3, 0_usize..3),
    ) {
        let original = state(seed);
        let before = hash(block, &original);
        prop_assert_eq!(hash(block, &original), before);
        prop_assert_ne!(hash(block.wrapping_add(1), &original), before);

        let mut flipped = original.clone();
        for (array, index, bit) in flips {
            flipped[array][index] = f32::from_bits(flipped[array][index].to_bits() ^ (1 << bit));
        }
        prop_assert_ne!(hash(block, &flipped), before);

        let mut swapped = original.clone();
        swapped[one].swap(left, right);
        let differs = swapped[one][left].to_bits() != original[one][left].to_bits();
        prop_assert_eq!(hash(block, &swapped) != before, differs);

        let mut arrays = original.clone();
        arrays.swap(one, other);
        prop_assert_eq!(hash(block, &arrays) != before, one != other);
    }
}

/// The definition does not drift: traces and checkpoints hold these values.
#[test]
fn known_values() {
    let zero = [(); 3].map(|()| vec![0.0; 4]);
    let ramp = [0.5_f32, -1.0, 3.0].map(|base| (0..5).map(|i| base * i as f32).collect());
    assert_eq!(hash(0, &zero).to_string(), "5b59c698050c7c6aa3738ed360502093");
    assert_eq!(hash(7, &ramp).to_string(), "08f36da97ff68500c84529eab62a1899");
}

/// Low words of a thousand neighbouring blocks of zeros: no two alike, and bits about half set.
#[test]
fn neighbouring_blocks_of_zeros_differ() {
    let zero = [(); 3].map(|()| vec![0.0; LEN]);
    let hashes: std::collections::BTreeSet<[u8; 16]> = (0..1000).map(|block| hash(block, &zero).0).collect();
    assert_eq!(hashes.len(), 1000);
    let ones: u32 = hashes.iter().flatten().map(|byte| byte.count_ones()).sum();
    assert!((62_500..65_500).contains(&ones), "{ones} of 128,000 bits are set");
}
