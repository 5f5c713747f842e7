//! [`Lanes`] without intrinsics: what other targets run, and the reference for the intrinsics.

use super::lanes::{LANES, Lanes};

/// Sixteen lanes as an array.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

macro_rules! lanewise {
    ($a:expr, $b:expr, $op:expr) => {{
        let mut out = [0.0; LANES];
        let mut lane = 0;
        while lane < LANES {
            out[lane] = $op($a.0[lane], $b.0[lane]);
            lane += 1;
        }
        Portable(out)
    }};
}

macro_rules! wordwise {
    ($a:expr, $b:expr, $op:expr) => {{
        let mut out = [0_u32; LANES];
        let mut lane = 0;
        while lane < LANES {
            out[lane] = $op($a[lane], $b[lane]);
            lane += 1;
        }
        out
    }};
}

impl Lanes for Portable {
    type Words = [u32; LANES];
    type Sums = [u64; LANES / 2];
    type Wide = [f64; LANES];

    const WIDE_TILE: bool = false;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }
    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Self(*from)
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        lanewise!(self, other, |a: f32, b: f32| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        lanewise!(self, other, |a: f32, b: f32| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        lanewise!(self, other, |a: f32, b: f32| a * b)
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        lanewise!(self, other, |a: f32, b: f32| a / b)
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        let mut out = c.0;
        for lane in 0..LANES {
            out[lane] = self.0[lane].mul_add(b.0[lane], c.0[lane]);
        }
        Self(out)
    }
    #[inline(always)]
    fn fnma(self, b: Self, c: Self) -> Self {
        let mut out = c.0;
        for lane in 0..LANES {
            out[lane] = (-self.0[lane]).mul_add(b.0[lane], c.0[lane]);
        }
        Self(out)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        lanewise!(self, other, |a: f32, b: f32| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        lanewise!(self, other, |a: f32, b: f32| if a < b { a } else { b })
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        Self(self.0.map(f32::sqrt))
    }
    #[inline(always)]
    fn round(self) -> Self {
        Self(self.0.map(f32::round_ties_even))
    }
    #[inline(always)]
    fn exp2_integer(self) -> Self {
        Self(
            self.0
                .map(|x| f32::from_bits((((x as i32).wrapping_add(127)) as u32) << 23)),
        )
    }
    #[inline(always)]
    fn zero_below(self, x: Self, limit: Self) -> Self {
        let mut out = self.0;
        for lane in 0..LANES {
            if x.0[lane] < limit.0[lane] {
                out[lane] = 0.0;
            }
        }
        Self(out)
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut lanes = self.0;
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                lanes[lane] += lanes[lane + half];
            }
        }
        lanes[0]
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        let mut lanes = self.0;
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                let (a, b) = (lanes[lane], lanes[lane + half]);
                lanes[lane] = if a > b { a } else { b };
            }
        }
        lanes[0]
    }
    #[inline(always)]
    fn transpose(rows: &mut [Self; LANES]) {
        for row in 0..LANES {
            for column in 0..row {
                let kept = rows[row].0[column];
                rows[row].0[column] = rows[column].0[row];
                rows[column].0[row] = kept;
            }
        }
    }

    #[inline(always)]
    fn words(self) -> Self::Words {
        self.0.map(f32::to_bits)
    }
    #[inline(always)]
    fn splat_word(x: u32) -> Self::Words {
        [x; LANES]
    }
    #[inline(always)]
    fn load_words(from: &[u32; LANES]) -> Self::Words {
        *from
    }
    #[inline(always)]
    fn word_add(a: Self::Words, b: Self::Words) -> Self::Words {
        wordwise!(a, b, u32::wrapping_add)
    }
    #[inline(always)]
    fn word_mul(a: Self::Words, b: Self::Words) -> Self::Words {
        wordwise!(a, b, u32::wrapping_mul)
    }
    #[inline(always)]
    fn word_xor(a: Self::Words, b: Self::Words) -> Self::Words {
        wordwise!(a, b, |x: u32, y: u32| x ^ y)
    }
    #[inline(always)]
    fn word_and(a: Self::Words, b: Self::Words) -> Self::Words {
        wordwise!(a, b, |x: u32, y: u32| x & y)
    }
    #[inline(always)]
    fn word_or(a: Self::Words, b: Self::Words) -> Self::Words {
        wordwise!(a, b, |x: u32, y: u32| x | y)
    }
    #[inline(always)]
    fn word_shift_right<const N: u32>(a: Self::Words) -> Self::Words {
        a.map(|x| x >> N)
    }
    #[inline(always)]
    fn no_sums() -> Self::Sums {
        [0; LANES / 2]
    }
    #[inline(always)]
    fn add_products(mut sums: Self::Sums, words: Self::Words) -> Self::Sums {
        for (index, sum) in sums.iter_mut().enumerate() {
            *sum = sum.wrapping_add(u64::from(words[2 * index]) * u64::from(words[2 * index + 1]));
        }
        sums
    }
    #[inline(always)]
    fn total(sums: Self::Sums) -> u64 {
        sums.iter().fold(0, |total, sum| total.wrapping_add(*sum))
    }

    #[inline(always)]
    fn no_wide() -> Self::Wide {
        [0.0; LANES]
    }
    #[inline(always)]
    fn add_squares(mut sums: Self::Wide, x: Self) -> Self::Wide {
        for (sum, x) in sums.iter_mut().zip(x.0) {
            *sum += f64::from(x) * f64::from(x);
        }
        sums
    }
    #[inline(always)]
    fn wide_total(mut sums: Self::Wide) -> f64 {
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                sums[lane] += sums[lane + half];
            }
        }
        sums[0]
    }
}
