//! The exponential function over lanes.

use super::lanes::Lanes;

/// Arguments are held to this range: above it the result saturates at e^88, below it is zero.
const LARGEST: f32 = 88.0;
const SMALLEST: f32 = -87.0;
const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 in two parts, the first exact in 9 bits, so that `n · LN2_HIGH` is exact (Cody and Waite 1980).
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Minimax coefficients of `(e^r - 1 - r) / r²` on `[-ln 2 / 2, ln 2 / 2]` (Moshier's Cephes library, `expf`).
const COEFFICIENTS: [f32; 6] = [
    1.987_569_1e-4,
    1.398_199_9e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    1.666_666_5e-1,
    0.5,
];

/// `e^x`, relative error at most 2⁻²³ for -87 <= x <= 88 (tested over the whole range); 0 below, e^88 above, NaN for NaN.
#[inline(always)]
pub(crate) fn exp<V: Lanes>(x: V) -> V {
    let held = V::splat(SMALLEST).max(V::splat(LARGEST).min(x));
    let n = held.mul(V::splat(LOG2_E)).round();
    let r = n.fnma(V::splat(LN2_LOW), n.fnma(V::splat(LN2_HIGH), held));
    let mut p = V::splat(COEFFICIENTS[0]);
    p = p.fma(r, V::splat(COEFFICIENTS[1]));
    p = p.fma(r, V::splat(COEFFICIENTS[2]));
    p = p.fma(r, V::splat(COEFFICIENTS[3]));
    p = p.fma(r, V::splat(COEFFICIENTS[4]));
    p = p.fma(r, V::splat(COEFFICIENTS[5]));
    let value = p.fma(r.mul(r), r.add(V::splat(1.0)));
    value.mul(n.exp2_integer()).zero_below(x, V::splat(SMALLEST))
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid<V: Lanes>(x: V) -> V {
    let one = V::splat(1.0);
    one.div(one.add(exp(V::splat(0.0).sub(x))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::lanes::{Isa, LANES, multiversion};

    #[inline(always)]
    fn row_on<V: Lanes>(x: &[f32; LANES], out: &mut [f32; LANES]) {
        exp(V::load(x)).store(out);
    }
    multiversion!(fn row(x: &[f32; LANES], out: &mut [f32; LANES]) = row_on);

    /// The stated error over the whole range, in steps finer than the spacing of large arguments.
    #[test]
    fn error_is_as_stated() {
        let (isa, mut worst) = (Isa::available()[0], 0.0_f64);
        let count = 8_000_000;
        for start in (0..count).step_by(LANES) {
            let mut x = [0.0; LANES];
            for (lane, x) in x.iter_mut().enumerate() {
                *x = -87.0 + 175.0 * ((start + lane) as f32 / count as f32);
            }
            let mut got = [f32::NAN; LANES];
            row(isa, &x, &mut got);
            for (x, got) in x.iter().zip(got) {
                let expected = f64::from(*x).exp();
                worst = worst.max((f64::from(got) / expected - 1.0).abs());
            }
        }
        println!("largest relative error {:.3} · 2^-24", worst * 2.0_f64.powi(24));
        assert!(worst <= 2.0_f64.powi(-23));
    }

    #[test]
    fn ends_of_the_range_agree_on_all_instruction_sets() {
        let x = [
            f32::NEG_INFINITY,
            f32::MIN,
            -87.000_01,
            -87.0,
            -1e-30,
            -0.0,
            0.0,
            1e-30,
            1.0,
            87.99,
            88.0,
            88.5,
            1e30,
            f32::INFINITY,
            f32::NAN,
            -f32::NAN,
        ];
        for isa in Isa::available() {
            let mut got = [f32::NAN; LANES];
            row(isa, &x, &mut got);
            assert_eq!(got[..3], [0.0; 3], "{}", isa.name());
            assert!(got[3] > 0.0 && got[4..8] == [1.0; 4], "{}: {got:?}", isa.name());
            assert!(
                got[10..14].iter().all(|&top| top == got[10] && top > 1e38),
                "{}",
                isa.name()
            );
            assert!(got[14].is_nan() && got[15].is_nan(), "{}", isa.name());
        }
    }
}
