//! Brain floating point on the host: the upper half of an f32.
//!
//! Rounding is to nearest, ties to even, as the device's own conversion does it; a NaN stays a NaN.

/// Rounds to bf16, as bits.
#[must_use]
pub const fn round(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        // Its payload may lie in the lower half alone; a set quiet bit keeps it a NaN.
        return (bits >> 16) as u16 | 0x0040;
    }
    // Half a unit of the last place that stays, less one where that place is even. No finite value's bits wrap around.
    let half = 0x7FFF + ((bits >> 16) & 1);
    ((bits + half) >> 16) as u16
}

/// The value of bf16 bits, exactly.
#[must_use]
pub const fn widen(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_bf16_comes_back() {
        for bits in 0..=u16::MAX {
            let value = widen(bits);
            if value.is_nan() {
                assert!(widen(round(value)).is_nan());
            } else {
                assert_eq!(round(value), bits);
            }
        }
    }

    #[test]
    fn ties_go_to_even_and_overflow_to_infinity() {
        assert_eq!(widen(round(f32::from_bits(0x3F80_8000))), 1.0);
        assert_eq!(round(f32::from_bits(0x3F81_8000)), 0x3F82);
        assert_eq!(widen(round(f32::MAX)), f32::INFINITY);
        assert_eq!(widen(round(f32::MIN)), f32::NEG_INFINITY);
        assert!(widen(round(f32::from_bits(0x7F80_0001))).is_nan());
    }

    proptest! {
        #[test]
        fn what_is_rounded_is_a_nearest_neighbour(bits: u32) {
            let value = f32::from_bits(bits);
            prop_assume!(value.is_finite() && value.abs() < widen(0x7F7F));
            let rounded = f64::from(widen(round(value)));
            // Neighbours in magnitude; the sign stays.
            let below = f64::from(f32::from_bits(bits & 0xFFFF_0000));
            let above = f64::from(f32::from_bits((bits & 0xFFFF_0000).wrapping_add(0x1_0000)));
            let (value, nearest) = (f64::from(value), |other: f64| (f64::from(value) - other).abs());
            prop_assert!(rounded == below || rounded == above);
            prop_assert!((rounded - value).abs() <= nearest(below).min(nearest(above)));
        }
    }
}
