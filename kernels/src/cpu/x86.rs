//! [`Lanes`] on x86-64: AVX-512, and AVX2 with FMA.
//!
//! Every function here is `#[inline(always)]` and unsound to reach on a machine without the instructions; `multiversion!`
//! names these types only behind a detected [`super::lanes::Isa`]. That is the safety argument of each block below.

use super::lanes::{LANES, Lanes};
use std::arch::x86_64::*;

/// One 512-bit register.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

/// Two 256-bit registers, lanes 0 to 7 and 8 to 15.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256, __m256);

macro_rules! isa {
    ($e:expr) => {
        // SAFETY: see the module's comment; pointers come from references to whole arrays.
        unsafe { $e }
    };
}

/// Folds eight lanes.
#[inline(always)]
fn sum8(x: __m256) -> f32 {
    isa!({
        let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    })
}

#[inline(always)]
fn largest8(x: __m256) -> f32 {
    isa!({
        let four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
    })
}

#[inline(always)]
fn wide_sum4(x: __m256d) -> f64 {
    isa!({
        let two = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd::<1>(x));
        _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
    })
}

#[inline(always)]
fn total4(x: __m256i) -> u64 {
    isa!({
        let two = _mm_add_epi64(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
        (_mm_cvtsi128_si64(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)))) as u64
    })
}

impl Lanes for Avx512 {
    type Words = __m512i;
    type Sums = __m512i;
    type Wide = [__m512d; 2];

    const WIDE_TILE: bool = true;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self(isa!(_mm512_set1_ps(x)))
    }
    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Self(isa!(_mm512_loadu_ps(from.as_ptr())))
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        isa!(_mm512_storeu_ps(to.as_mut_ptr(), self.0));
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(isa!(_mm512_add_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(isa!(_mm512_sub_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(isa!(_mm512_mul_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(isa!(_mm512_div_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        Self(isa!(_mm512_fmadd_ps(self.0, b.0, c.0)))
    }
    #[inline(always)]
    fn fnma(self, b: Self, c: Self) -> Self {
        Self(isa!(_mm512_fnmadd_ps(self.0, b.0, c.0)))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(isa!(_mm512_max_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(isa!(_mm512_min_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        Self(isa!(_mm512_sqrt_ps(self.0)))
    }
    #[inline(always)]
    fn round(self) -> Self {
        Self(isa!(_mm512_roundscale_ps::<0x08>(self.0)))
    }
    #[inline(always)]
    fn exp2_integer(self) -> Self {
        isa!({
            let exponent = _mm512_add_epi32(_mm512_cvttps_epi32(self.0), _mm512_set1_epi32(127));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent)))
        })
    }
    #[inline(always)]
    fn zero_below(self, x: Self, limit: Self) -> Self {
        isa!({
            let kept = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, limit.0);
            Self(_mm512_maskz_mov_ps(kept, self.0))
        })
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        sum8(isa!(_mm256_add_ps(
            _mm512_castps512_ps256(self.0),
            _mm512_extractf32x8_ps::<1>(self.0)
        )))
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        largest8(isa!(_mm256_max_ps(
            _mm512_castps512_ps256(self.0),
            _mm512_extractf32x8_ps::<1>(self.0)
        )))
    }
    #[inline(always)]
    fn transpose(rows: &mut [Self; LANES]) {
        isa!({
            // 4x4 transposes inside each 128-bit quarter, then two shuffles of whole quarters.
            let mut quarters = [_mm512_setzero_ps(); LANES];
            let mut group = 0;
            while group < 4 {
                let r = 4 * group;
                let (a, b) = (rows[r].0, rows[r + 1].0);
                let (c, d) = (rows[r + 2].0, rows[r + 3].0);
                let (ab_low, ab_high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let (cd_low, cd_high) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                let pd = |x| _mm512_castps_pd(x);
                quarters[r] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(ab_low), pd(cd_low)));
                quarters[r + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(ab_low), pd(cd_low)));
                quarters[r + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(ab_high), pd(cd_high)));
                quarters[r + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(ab_high), pd(cd_high)));
                group += 1;
            }
            let mut column = 0;
            while column < 4 {
                let (q0, q1) = (quarters[column], quarters[4 + column]);
                let (q2, q3) = (quarters[8 + column], quarters[12 + column]);
                let even01 = _mm512_shuffle_f32x4::<0x88>(q0, q1);
                let odd01 = _mm512_shuffle_f32x4::<0xDD>(q0, q1);
                let even23 = _mm512_shuffle_f32x4::<0x88>(q2, q3);
                let odd23 = _mm512_shuffle_f32x4::<0xDD>(q2, q3);
                rows[column].0 = _mm512_shuffle_f32x4::<0x88>(even01, even23);
                rows[column + 8].0 = _mm512_shuffle_f32x4::<0xDD>(even01, even23);
                rows[column + 4].0 = _mm512_shuffle_f32x4::<0x88>(odd01, odd23);
                rows[column + 12].0 = _mm512_shuffle_f32x4::<0xDD>(odd01, odd23);
                column += 1;
            }
        });
    }

    #[inline(always)]
    fn words(self) -> Self::Words {
        isa!(_mm512_castps_si512(self.0))
    }
    #[inline(always)]
    fn splat_word(x: u32) -> Self::Words {
        isa!(_mm512_set1_epi32(x as i32))
    }
    #[inline(always)]
    fn load_words(from: &[u32; LANES]) -> Self::Words {
        isa!(_mm512_loadu_si512(from.as_ptr().cast()))
    }
    #[inline(always)]
    fn word_add(a: Self::Words, b: Self::Words) -> Self::Words {
        isa!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn word_mul(a: Self::Words, b: Self::Words) -> Self::Words {
        isa!(_mm512_mullo_epi32(a, b))
    }
    #[inline(always)]
    fn word_xor(a: Self::Words, b: Self::Words) -> Self::Words {
        isa!(_mm512_xor_si512(a, b))
    }
    #[inline(always)]
    fn word_and(a: Self::Words, b: Self::Words) -> Self::Words {
        isa!(_mm512_and_si512(a, b))
    }
    #[inline(always)]
    fn word_or(a: Self::Words, b: Self::Words) -> Self::Words {
        isa!(_mm512_or_si512(a, b))
    }
    #[inline(always)]
    fn word_shift_right<const N: u32>(a: Self::Words) -> Self::Words {
        isa!(_mm512_srli_epi32::<N>(a))
    }
    #[inline(always)]
    fn no_sums() -> Self::Sums {
        isa!(_mm512_setzero_si512())
    }
    #[inline(always)]
    fn add_products(sums: Self::Sums, words: Self::Words) -> Self::Sums {
        isa!(_mm512_add_epi64(
            sums,
            _mm512_mul_epu32(words, _mm512_srli_epi64::<32>(words))
        ))
    }
    #[inline(always)]
    fn total(sums: Self::Sums) -> u64 {
        total4(isa!(_mm256_add_epi64(
            _mm512_castsi512_si256(sums),
            _mm512_extracti64x4_epi64::<1>(sums)
        )))
    }

    #[inline(always)]
    fn no_wide() -> Self::Wide {
        [isa!(_mm512_setzero_pd()); 2]
    }
    #[inline(always)]
    fn add_squares(sums: Self::Wide, x: Self) -> Self::Wide {
        isa!({
            let low = _mm512_cvtps_pd(_mm512_castps512_ps256(x.0));
            let high = _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(x.0));
            // Squares of f32 are exact in f64, so fusing changes nothing.
            [_mm512_fmadd_pd(low, low, sums[0]), _mm512_fmadd_pd(high, high, sums[1])]
        })
    }
    #[inline(always)]
    fn wide_total(sums: Self::Wide) -> f64 {
        isa!({
            let eight = _mm512_add_pd(sums[0], sums[1]);
            wide_sum4(_mm256_add_pd(
                _mm512_castpd512_pd256(eight),
                _mm512_extractf64x4_pd::<1>(eight),
            ))
        })
    }
}

/// Transposes 8 rows of 8.
#[inline(always)]
fn transpose8(r: [__m256; 8]) -> [__m256; 8] {
    isa!({
        let t = [
            _mm256_unpacklo_ps(r[0], r[1]),
            _mm256_unpackhi_ps(r[0], r[1]),
            _mm256_unpacklo_ps(r[2], r[3]),
            _mm256_unpackhi_ps(r[2], r[3]),
            _mm256_unpacklo_ps(r[4], r[5]),
            _mm256_unpackhi_ps(r[4], r[5]),
            _mm256_unpacklo_ps(r[6], r[7]),
            _mm256_unpackhi_ps(r[6], r[7]),
        ];
        let u = [
            _mm256_shuffle_ps::<0x44>(t[0], t[2]),
            _mm256_shuffle_ps::<0xEE>(t[0], t[2]),
            _mm256_shuffle_ps::<0x44>(t[1], t[3]),
            _mm256_shuffle_ps::<0xEE>(t[1], t[3]),
            _mm256_shuffle_ps::<0x44>(t[4], t[6]),
            _mm256_shuffle_ps::<0xEE>(t[4], t[6]),
            _mm256_shuffle_ps::<0x44>(t[5], t[7]),
            _mm256_shuffle_ps::<0xEE>(t[5], t[7]),
        ];
        [
            _mm256_permute2f128_ps::<0x20>(u[0], u[4]),
            _mm256_permute2f128_ps::<0x20>(u[1], u[5]),
            _mm256_permute2f128_ps::<0x20>(u[2], u[6]),
            _mm256_permute2f128_ps::<0x20>(u[3], u[7]),
            _mm256_permute2f128_ps::<0x31>(u[0], u[4]),
            _mm256_permute2f128_ps::<0x31>(u[1], u[5]),
            _mm256_permute2f128_ps::<0x31>(u[2], u[6]),
            _mm256_permute2f128_ps::<0x31>(u[3], u[7]),
        ]
    })
}

impl Lanes for Avx2 {
    type Words = [__m256i; 2];
    type Sums = [__m256i; 2];
    type Wide = [__m256d; 4];

    const WIDE_TILE: bool = false;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        let half = isa!(_mm256_set1_ps(x));
        Self(half, half)
    }
    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        isa!(Self(
            _mm256_loadu_ps(from.as_ptr()),
            _mm256_loadu_ps(from.as_ptr().add(8))
        ))
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        isa!({
            _mm256_storeu_ps(to.as_mut_ptr(), self.0);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), self.1);
        });
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        isa!(Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        isa!(Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        isa!(Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)))
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        isa!(Self(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)))
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        isa!(Self(
            _mm256_fmadd_ps(self.0, b.0, c.0),
            _mm256_fmadd_ps(self.1, b.1, c.1)
        ))
    }
    #[inline(always)]
    fn fnma(self, b: Self, c: Self) -> Self {
        isa!(Self(
            _mm256_fnmadd_ps(self.0, b.0, c.0),
            _mm256_fnmadd_ps(self.1, b.1, c.1)
        ))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        isa!(Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        isa!(Self(_mm256_min_ps(self.0, other.0), _mm256_min_ps(self.1, other.1)))
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        isa!(Self(_mm256_sqrt_ps(self.0), _mm256_sqrt_ps(self.1)))
    }
    #[inline(always)]
    fn round(self) -> Self {
        isa!(Self(_mm256_round_ps::<0x08>(self.0), _mm256_round_ps::<0x08>(self.1)))
    }
    #[inline(always)]
    fn exp2_integer(self) -> Self {
        isa!({
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvttps_epi32(self.0), bias));
            let high = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvttps_epi32(self.1), bias));
            Self(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
        })
    }
    #[inline(always)]
    fn zero_below(self, x: Self, limit: Self) -> Self {
        isa!(Self(
            _mm256_and_ps(self.0, _mm256_cmp_ps::<_CMP_NLT_UQ>(x.0, limit.0)),
            _mm256_and_ps(self.1, _mm256_cmp_ps::<_CMP_NLT_UQ>(x.1, limit.1))
        ))
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        sum8(isa!(_mm256_add_ps(self.0, self.1)))
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        largest8(isa!(_mm256_max_ps(self.0, self.1)))
    }
    #[inline(always)]
    fn transpose(rows: &mut [Self; LANES]) {
        let r = *rows;
        let top_left = transpose8([r[0].0, r[1].0, r[2].0, r[3].0, r[4].0, r[5].0, r[6].0, r[7].0]);
        let top_right = transpose8([r[0].1, r[1].1, r[2].1, r[3].1, r[4].1, r[5].1, r[6].1, r[7].1]);
        let low_left = transpose8([r[8].0, r[9].0, r[10].0, r[11].0, r[12].0, r[13].0, r[14].0, r[15].0]);
        let low_right = transpose8([r[8].1, r[9].1, r[10].1, r[11].1, r[12].1, r[13].1, r[14].1, r[15].1]);
        let mut row = 0;
        while row < 8 {
            rows[row] = Self(top_left[row], low_left[row]);
            rows[row + 8] = Self(top_right[row], low_right[row]);
            row += 1;
        }
    }

    #[inline(always)]
    fn words(self) -> Self::Words {
        isa!([_mm256_castps_si256(self.0), _mm256_castps_si256(self.1)])
    }
    #[inline(always)]
    fn splat_word(x: u32) -> Self::Words {
        [isa!(_mm256_set1_epi32(x as i32)); 2]
    }
    #[inline(always)]
    fn load_words(from: &[u32; LANES]) -> Self::Words {
        isa!([
            _mm256_loadu_si256(from.as_ptr().cast()),
            _mm256_loadu_si256(from.as_ptr().add(8).cast())
        ])
    }
    #[inline(always)]
    fn word_add(a: Self::Words, b: Self::Words) -> Self::Words {
        isa!([_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])])
    }
    #[inline(always)]
    fn word_mul(a: Self::Words, b: Self::Words) -> Self::Words {
        isa!([_mm256_mullo_epi32(a[0], b[0]), _mm256_mullo_epi32(a[1], b[1])])
    }
    #[inline(always)]
    fn word_xor(a: Self::Words, b: Self::Words) -> Self::Words {
        isa!([_mm256_xor_si256(a[0], b[0]), _mm256_xor_si256(a[1], b[1])])
    }
    #[inline(always)]
    fn word_and(a: Self::Words, b: Self::Words) -> Self::Words {
        isa!([_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])])
    }
    #[inline(always)]
    fn word_or(a: Self::Words, b: Self::Words) -> Self::Words {
        isa!([_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])])
    }
    #[inline(always)]
    fn word_shift_right<const N: u32>(a: Self::Words) -> Self::Words {
        isa!({
            let count = _mm_cvtsi32_si128(N as i32);
            [_mm256_srl_epi32(a[0], count), _mm256_srl_epi32(a[1], count)]
        })
    }
    #[inline(always)]
    fn no_sums() -> Self::Sums {
        [isa!(_mm256_setzero_si256()); 2]
    }
    #[inline(always)]
    fn add_products(sums: Self::Sums, words: Self::Words) -> Self::Sums {
        isa!([
            _mm256_add_epi64(sums[0], _mm256_mul_epu32(words[0], _mm256_srli_epi64::<32>(words[0]))),
            _mm256_add_epi64(sums[1], _mm256_mul_epu32(words[1], _mm256_srli_epi64::<32>(words[1])))
        ])
    }
    #[inline(always)]
    fn total(sums: Self::Sums) -> u64 {
        total4(isa!(_mm256_add_epi64(sums[0], sums[1])))
    }

    #[inline(always)]
    fn no_wide() -> Self::Wide {
        [isa!(_mm256_setzero_pd()); 4]
    }
    #[inline(always)]
    fn add_squares(sums: Self::Wide, x: Self) -> Self::Wide {
        isa!({
            let quarters = [
                _mm256_cvtps_pd(_mm256_castps256_ps128(x.0)),
                _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(x.0)),
                _mm256_cvtps_pd(_mm256_castps256_ps128(x.1)),
                _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(x.1)),
            ];
            [
                _mm256_fmadd_pd(quarters[0], quarters[0], sums[0]),
                _mm256_fmadd_pd(quarters[1], quarters[1], sums[1]),
                _mm256_fmadd_pd(quarters[2], quarters[2], sums[2]),
                _mm256_fmadd_pd(quarters[3], quarters[3], sums[3]),
            ]
        })
    }
    #[inline(always)]
    fn wide_total(sums: Self::Wide) -> f64 {
        isa!({
            let low = _mm256_add_pd(sums[0], sums[2]);
            let high = _mm256_add_pd(sums[1], sums[3]);
            wide_sum4(_mm256_add_pd(low, high))
        })
    }
}
