//! Initial weights: a function of (seed, tensor, element) alone.
//!
//! Each element is drawn by its own counter, so any rank makes any range of the flat space without the rest (DET-1). The
//! arithmetic is f64 with the `libm` crate's functions, not the system's, whose last bits differ between versions.

use std::ops::Range;
use tarazed_domain::ParameterLayout;
use tarazed_domain::config::ModelConfig;

/// Writes the initial weights of `elements` of the flat space to `out`: normal with mean 0 and deviation `init_std`, norm
/// weights `norm_init`, padding 0.
///
/// # Panics
/// If `out` is not as long as the range, or the range leaves the flat space.
pub fn initialise(layout: &ParameterLayout, model: &ModelConfig, seed: u64, elements: Range<usize>, out: &mut [f32]) {
    assert_eq!(out.len(), elements.len(), "one output for each element");
    assert!(elements.end <= layout.flat_elements(), "range leaves the flat space");
    out.fill(0.0);
    for (index, slot) in layout.tensors().iter().enumerate() {
        let range = slot.range();
        let (start, end) = (range.start.max(elements.start), range.end.min(elements.end));
        if start >= end {
            continue;
        }
        let out = &mut out[start - elements.start..end - elements.start];
        if slot.shape.len() == 1 {
            out.fill(model.norm_init as f32);
            continue;
        }
        let key = mix(mix(seed) ^ (index as u64 + 1));
        for (value, element) in out.iter_mut().zip(start - range.start..) {
            *value = (model.init_std * normal(key, element as u64)) as f32;
        }
    }
}

/// A standard normal number for one counter of one key (Box and Muller 1958).
fn normal(key: u64, counter: u64) -> f64 {
    let pair = mix(key.wrapping_add((counter / 2).wrapping_mul(0x9E37_79B9_7F4A_7C15)));
    let second = mix(pair ^ 0xD1B5_4A32_D192_ED03);
    let uniform = |bits: u64| ((bits >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    let radius = libm::sqrt(-2.0 * libm::log(uniform(pair)));
    let angle = std::f64::consts::TAU * uniform(second);
    if counter.is_multiple_of(2) {
        radius * libm::cos(angle)
    } else {
        radius * libm::sin(angle)
    }
}

/// SplitMix64's output function (Steele, Lea and Flood 2014).
const fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
