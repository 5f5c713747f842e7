//! AdamW with its block hashes, before and after, in one pass, and the partials of the gradient norm.

use super::lanes::{LANES, Lanes, multiversion};
use super::pointwise::{for_lanes, get, set};
use crate::device::AdamwStep;
use crate::hash::{
    BlockHash, KEY_FACTORS, KEY_MASK_FIRST, KEY_MASK_SECOND, MIX_FACTOR_1, MIX_FACTOR_2, POSITION_FACTOR, block_seeds,
};
use tarazed_domain::BlockIndex;
use tarazed_domain::mutant::is_unguarded;

/// The step's scalars, rounded once from f64.
#[derive(Clone, Copy)]
pub(crate) struct AdamwScalars {
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    /// `1 - learning_rate · weight_decay`.
    keep: f32,
    /// `learning_rate / (1 - beta1^step)`.
    step_size: f32,
    /// `1 / sqrt(1 - beta2^step)`.
    inverse_root_correction: f32,
    eps: f32,
    gradient_scale: f32,
}

impl AdamwScalars {
    /// # Panics
    /// If the step is 0: updates are numbered from 1.
    pub fn new(step: &AdamwStep) -> Self {
        assert!(step.step > 0, "AdamW updates are numbered from 1");
        let power = |base: f64| libm::pow(base, step.step as f64);
        Self {
            beta1: step.beta1 as f32,
            one_minus_beta1: (1.0 - step.beta1) as f32,
            beta2: step.beta2 as f32,
            one_minus_beta2: (1.0 - step.beta2) as f32,
            keep: (1.0 - step.learning_rate * step.weight_decay) as f32,
            step_size: (step.learning_rate / (1.0 - power(step.beta1))) as f32,
            inverse_root_correction: (1.0 / libm::sqrt(1.0 - power(step.beta2))) as f32,
            eps: step.eps as f32,
            gradient_scale: step.gradient_scale,
        }
    }

    /// In the order in which the CUDA kernel takes them.
    pub const fn in_order(&self) -> [f32; 9] {
        [
            self.beta1,
            self.one_minus_beta1,
            self.beta2,
            self.one_minus_beta2,
            self.keep,
            self.step_size,
            self.inverse_root_correction,
            self.eps,
            self.gradient_scale,
        ]
    }
}

/// One block of optimizer state.
pub(super) struct BlockState<'a> {
    pub gradient: &'a [f32],
    pub master: &'a mut [f32],
    pub first_moment: &'a mut [f32],
    pub second_moment: &'a mut [f32],
    pub working: Option<&'a mut [f32]>,
}

/// The keys of a block's elements, sixteen at a time.
struct Keys<V: Lanes> {
    /// `position · POSITION_FACTOR + seed` of sixteen positions.
    positions: V::Words,
    seed: V::Words,
}

/// What all keys of sixteen elements derive from, and which of them there are where not all.
struct Key<V: Lanes> {
    key: V::Words,
    present: Option<V::Words>,
}

impl<V: Lanes> Keys<V> {
    #[inline(always)]
    fn new(block: BlockIndex) -> Self {
        let seeds = block_seeds(block);
        let mut positions = [0_u32; LANES];
        let mut lane = 0;
        while lane < LANES {
            positions[lane] = (lane as u32).wrapping_mul(POSITION_FACTOR).wrapping_add(seeds[0]);
            lane += 1;
        }
        Self {
            positions: V::load_words(&positions),
            seed: V::splat_word(seeds[1]),
        }
    }

    /// Of the next sixteen elements; of a last, shorter run, `len` elements.
    #[inline(always)]
    fn next(&mut self, len: usize) -> Key<V> {
        let z = self.positions;
        self.positions = V::word_add(z, V::splat_word(POSITION_FACTOR.wrapping_mul(LANES as u32)));
        let z = V::word_xor(z, V::word_shift_right::<16>(z));
        let z = V::word_xor(V::word_mul(z, V::splat_word(MIX_FACTOR_1)), self.seed);
        let z = V::word_xor(z, V::word_shift_right::<15>(z));
        let z = V::word_mul(z, V::splat_word(MIX_FACTOR_2));
        let key = V::word_xor(z, V::word_shift_right::<16>(z));
        // Words beyond the block count neither with a key nor with a value; a last odd word keeps its keyed partner.
        let present = if len == LANES {
            None
        } else {
            let mut mask = [0_u32; LANES];
            mask[..len.next_multiple_of(2)].fill(u32::MAX);
            Some(V::load_words(&mask))
        };
        Key { key, present }
    }
}

/// Both sums of a block's hash.
struct Hasher<V: Lanes> {
    sums: [V::Sums; 2],
}

impl<V: Lanes> Hasher<V> {
    #[inline(always)]
    fn new() -> Self {
        Self {
            sums: [V::no_sums(); 2],
        }
    }

    /// Adds one array's words, under the keys derived from `key`.
    #[inline(always)]
    fn add<const ARRAY: usize>(&mut self, &Key { key, present }: &Key<V>, words: V::Words) {
        let first = V::word_and(
            V::word_mul(key, V::splat_word(KEY_FACTORS[ARRAY][0])),
            V::splat_word(KEY_MASK_FIRST),
        );
        let second = V::word_or(
            V::word_mul(key, V::splat_word(KEY_FACTORS[ARRAY][1])),
            V::splat_word(KEY_MASK_SECOND),
        );
        let (mut a, mut b) = (V::word_add(words, first), V::word_add(words, second));
        if let Some(present) = present {
            a = V::word_and(a, present);
            b = V::word_and(b, present);
        }
        self.sums[0] = V::add_products(self.sums[0], a);
        self.sums[1] = V::add_products(self.sums[1], b);
    }

    /// Adds sixteen elements of the three arrays.
    #[inline(always)]
    fn update(&mut self, key: &Key<V>, [master, first_moment, second_moment]: [V; 3]) {
        self.add::<0>(key, master.words());
        self.add::<1>(key, first_moment.words());
        self.add::<2>(key, second_moment.words());
    }

    #[inline(always)]
    fn finish(self) -> BlockHash {
        BlockHash::from_sums([V::total(self.sums[0]), V::total(self.sums[1])])
    }
}

/// A block's hash as it stood before an update, and as it stands after it.
pub(super) struct Hashes {
    pub before: BlockHash,
    pub after: BlockHash,
}

#[inline(always)]
fn adamw_on<V: Lanes>(scalars: &AdamwScalars, block: BlockIndex, state: BlockState<'_>) -> Hashes {
    let BlockState {
        gradient,
        master,
        first_moment,
        second_moment,
        mut working,
    } = state;
    let s = scalars;
    let (beta1, rest1) = (V::splat(s.beta1), V::splat(s.one_minus_beta1));
    let (beta2, rest2) = (V::splat(s.beta2), V::splat(s.one_minus_beta2));
    let (keep, step_size) = (V::splat(s.keep), V::splat(s.step_size));
    let (correction, eps) = (V::splat(s.inverse_root_correction), V::splat(s.eps));
    let scale = V::splat(s.gradient_scale);
    let mut keys = Keys::<V>::new(block);
    let (mut before, mut after) = (Hasher::<V>::new(), Hasher::<V>::new());
    let guarded = !is_unguarded();
    for_lanes!(gradient.len(), |range, whole| {
        let g = get::<V>(gradient, &range, whole).mul(scale);
        let old_m = get::<V>(first_moment, &range, whole);
        let old_v = get::<V>(second_moment, &range, whole);
        let old_p = get::<V>(master, &range, whole);
        let key = keys.next(range.len());
        if guarded {
            before.update(&key, [old_p, old_m, old_v]);
        }
        let m = g.fma(rest1, old_m.mul(beta1));
        let v = g.mul(rest2).fma(g, old_v.mul(beta2));
        let decayed = old_p.mul(keep);
        let denominator = v.sqrt().fma(correction, eps);
        let p = step_size.fnma(m.div(denominator), decayed);
        set(m, first_moment, &range, whole);
        set(v, second_moment, &range, whole);
        set(p, master, &range, whole);
        if let Some(working) = &mut working {
            set(p, working, &range, whole);
        }
        // Zero lanes beyond a short end stay zero: every lane's inputs there are zero.
        if guarded {
            after.update(&key, [p, m, v]);
        }
    });
    Hashes {
        before: before.finish(),
        after: after.finish(),
    }
}
multiversion!(
    /// One block's update, with its hashes before and after.
    pub(super) fn adamw(scalars: &AdamwScalars, block: BlockIndex, state: BlockState<'_>) -> Hashes = adamw_on
);

#[inline(always)]
fn block_hash_on<V: Lanes>(
    block: BlockIndex,
    master: &[f32],
    first_moment: &[f32],
    second_moment: &[f32],
) -> BlockHash {
    let (mut keys, mut hasher) = (Keys::<V>::new(block), Hasher::<V>::new());
    for_lanes!(master.len(), |range, whole| {
        // No closure: it would not have this function's instruction set.
        let p = get::<V>(master, &range, whole);
        let m = get::<V>(first_moment, &range, whole);
        let v = get::<V>(second_moment, &range, whole);
        hasher.update(&keys.next(range.len()), [p, m, v]);
    });
    hasher.finish()
}
multiversion!(
    /// One block's hash; `crate::hash::block_hash` is its definition.
    pub(super) fn block_hash(
        block: BlockIndex,
        master: &[f32],
        first_moment: &[f32],
        second_moment: &[f32],
    ) -> BlockHash = block_hash_on
);

#[inline(always)]
fn square_sum_on<V: Lanes>(x: &[f32]) -> f64 {
    let mut sums = V::no_wide();
    for_lanes!(x.len(), |range, whole| {
        sums = V::add_squares(sums, get(x, &range, whole));
    });
    V::wide_total(sums)
}
multiversion!(
    /// Sum of squares, in f64.
    pub(super) fn square_sum(x: &[f32]) -> f64 = square_sum_on
);
