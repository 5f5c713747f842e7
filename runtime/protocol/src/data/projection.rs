//! The nearest mixture inside the guards.

/// Halvings of the search for the scale: past them the bracket is narrower than one unit in the last place.
const HALVINGS: u32 = 200;
/// Weights are written as multiples of this: short in the trace, and deaf to the last bits of a logarithm.
pub(super) const WEIGHT_GRAIN: f64 = 1e-6;

/// Scales `target` (positive) to sum 1 with every weight held inside `[low, high]`: `clamp(s t, low, high)` for the one
/// `s` that fits. None if no mixture lies inside.
pub(super) fn project(target: &[f64], low: &[f64], high: &[f64]) -> Option<Vec<f64>> {
    let at = |ln_scale: f64| -> Vec<f64> {
        let scale = libm::exp(ln_scale);
        target
            .iter()
            .zip(low.iter().zip(high))
            .map(|(target, (low, high))| (target * scale).clamp(*low, *high))
            .collect()
    };
    let sum = |weights: &[f64]| weights.iter().sum::<f64>();
    if sum(low) > 1.0 || sum(high) < 1.0 {
        return None;
    }
    let (mut below, mut above) = (-60.0, 60.0);
    for _ in 0..HALVINGS {
        let middle = 0.5 * (below + above);
        if sum(&at(middle)) < 1.0 {
            below = middle;
        } else {
            above = middle;
        }
    }
    Some(at(above))
}

/// Rounds a mixture to the grain; the largest weight takes up the rest, so the sum stays 1 up to rounding.
pub(super) fn round(weights: &[f64]) -> Vec<f64> {
    let grains = libm::round(1.0 / WEIGHT_GRAIN) as i64;
    let mut counts: Vec<i64> = weights
        .iter()
        .map(|weight| libm::round(weight / WEIGHT_GRAIN) as i64)
        .collect();
    let rest = grains - counts.iter().sum::<i64>();
    if let Some(largest) = counts.iter_mut().rev().max_by_key(|count| **count) {
        *largest += rest;
    }
    counts.iter().map(|count| *count as f64 / grains as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Inside the guards, sum 1, and in the order of the target where the guards are the same.
        #[test]
        fn stays_inside(target in prop::collection::vec(1e-9_f64..1.0, 2..20), width in 0.1_f64..2.0) {
            let count = target.len() as f64;
            let low = vec![1.0 / count / (1.0 + width); target.len()];
            let high = vec![1.0 / count * (1.0 + width); target.len()];
            let weights = project(&target, &low, &high).expect("the even mixture lies inside");
            prop_assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-9);
            for ((weight, low), high) in weights.iter().zip(&low).zip(&high) {
                prop_assert!(low <= weight && weight <= high);
            }
            let rounded = round(&weights);
            prop_assert!((rounded.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            for (a, b) in rounded.iter().zip(&weights) {
                prop_assert!((a - b).abs() <= WEIGHT_GRAIN * count);
            }
        }
    }

    #[test]
    fn impossible_guards_have_no_mixture() {
        assert_eq!(project(&[0.5, 0.5], &[0.6, 0.6], &[0.7, 0.7]), None);
        assert_eq!(project(&[0.5, 0.5], &[0.1, 0.1], &[0.4, 0.4]), None);
    }
}
