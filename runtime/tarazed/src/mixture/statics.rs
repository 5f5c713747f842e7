//! Static mixtures: the controls that an adaptive one has to beat.

use super::random::Random;

/// A mixture in proportion to `sizes`.
///
/// # Panics
/// If all sizes are 0: a data set refuses empty domains before.
#[must_use]
pub fn natural(sizes: &[u64]) -> Vec<f64> {
    temperature(sizes, 1.0)
}

/// `p_d ∝ size_d^power`: 1 is the natural mixture, ½ the square root of size, 0 the uniform one (temperature sampling with
/// `T = 1 / power`, as in mT5, arXiv 2010.11934). Below 0 small domains are preferred.
///
/// # Panics
/// If a size is 0 where the power is not positive, or all are 0.
#[must_use]
pub fn temperature(sizes: &[u64], power: f64) -> Vec<f64> {
    normalised(sizes.iter().map(|size| libm::pow(*size as f64, power)).collect())
}

/// UniMax (Chung et al. 2023, arXiv 2304.09151, its algorithm): a budget is dealt out as evenly as a cap on
/// epochs allows. Domains are visited from the smallest on; each gets an even share of what is left of the budget, or
/// `epochs_max` passes over its text where that is less; `p_d` is its share of all that was dealt out:
///
/// `U_d = min(left / domains left, epochs_max · size_d)`, `p_d = U_d / Σ U`.
///
/// The paper counts characters; here `sizes` and `budget` are tokens. What no domain can take within the cap is left undealt,
/// as in the paper. Where the cap binds nowhere, it is the uniform mixture, bit for bit: the same runs do for both.
///
/// # Panics
/// If nothing is dealt out: a budget and a cap are positive.
#[must_use]
pub fn unimax(sizes: &[u64], budget: u64, epochs_max: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&domain| (sizes[domain], domain));
    let mut shares = vec![0.0; sizes.len()];
    let mut left = budget as f64;
    for (done, &domain) in order.iter().enumerate() {
        let even = left / (sizes.len() - done) as f64;
        let most = epochs_max * sizes[domain] as f64;
        if even <= most {
            // Larger domains reach their caps no more than this one: all that are left have the same, to the last bit.
            if done == 0 {
                return temperature(sizes, 0.0);
            }
            order[done..].iter().for_each(|&other| shares[other] = even);
            break;
        }
        shares[domain] = most;
        left -= most;
    }
    normalised(shares)
}

/// Point `index` of a sweep over all mixtures of `domains` domains, uniform on the simplex: normalised exponential draws
/// (the Dirichlet distribution with all parameters 1). A function of its arguments alone.
#[must_use]
pub fn simplex_point(domains: usize, seed: u64, index: usize) -> Vec<f64> {
    let mut random = Random::of(seed, &format!("sweep point {index}"));
    normalised((0..domains).map(|_| -libm::log(1.0 - random.unit())).collect())
}

/// Weights that sum to 1.
///
/// # Panics
/// If they are no mixture.
#[must_use]
pub fn normalised(weights: Vec<f64>) -> Vec<f64> {
    let sum: f64 = weights.iter().sum();
    assert!(sum.is_finite() && sum > 0.0, "weights that sum to {sum}");
    weights.into_iter().map(|weight| weight / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn close(found: &[f64], expected: &[f64]) -> bool {
        found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12)
    }

    #[test]
    fn powers_of_size_are_the_known_mixtures() {
        let sizes = [100, 400, 900];
        assert!(close(
            &natural(&sizes),
            &[100.0 / 1400.0, 400.0 / 1400.0, 900.0 / 1400.0]
        ));
        assert!(close(&temperature(&sizes, 0.5), &[1.0 / 6.0, 2.0 / 6.0, 3.0 / 6.0]));
        assert!(close(&temperature(&sizes, 0.0), &[1.0 / 3.0; 3]));
    }

    /// By hand: a budget of 900 over sizes 50, 200, 1000 with two epochs at most. Even shares are 300; the smallest takes
    /// 100 and leaves 800; the next could have 400 and takes 400 = two epochs; the largest takes the other 400.
    #[test]
    fn unimax_deals_as_the_paper_does() {
        let expected = [100.0 / 900.0, 400.0 / 900.0, 400.0 / 900.0];
        assert!(close(&unimax(&[50, 200, 1000], 900, 2.0), &expected));
        // The order of the domains does not matter, each keeps its place.
        assert!(close(
            &unimax(&[1000, 50, 200], 900, 2.0),
            &[expected[2], expected[0], expected[1]]
        ));
        // Without a cap in reach it is uniform to the last bit, by which runs are shared; where all are capped it is natural.
        for domains in 1..30_u64 {
            let sizes: Vec<u64> = (0..domains).map(|domain| 1_000 + 37 * domain).collect();
            assert_eq!(unimax(&sizes, 999, 4.0), temperature(&sizes, 0.0));
        }
        // Those below the cap are alike to the last bit, too.
        let most = unimax(&[1, 200, 1000, 300, 7000], 1_000, 2.0);
        assert!(most[1..].iter().all(|weight| weight.to_bits() == most[1].to_bits()));
        assert!(close(
            &unimax(&[50, 200, 1000], 1_000_000, 2.0),
            &natural(&[50, 200, 1000])
        ));
    }

    proptest! {
        /// No domain is given more than its cap of what is dealt, and whoever is below its cap has as much as the largest.
        #[test]
        fn unimax_is_even_up_to_the_cap(
            sizes in prop::collection::vec(1..10_000_u64, 1..12),
            budget in 1..200_000_u64,
            epochs in 0.5..8.0_f64,
        ) {
            let weights = unimax(&sizes, budget, epochs);
            prop_assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-9);
            let all: f64 = sizes.iter().map(|size| epochs * *size as f64).sum();
            let dealt = (budget as f64).min(all);
            let most = weights.iter().copied().fold(0.0, f64::max);
            for (weight, size) in weights.iter().zip(&sizes) {
                let cap = epochs * *size as f64 / dealt;
                prop_assert!(*weight <= cap * (1.0 + 1e-9));
                prop_assert!(*weight >= cap.min(most) * (1.0 - 1e-9));
            }
        }

        #[test]
        fn sweep_points_are_mixtures_of_their_own(domains in 1..20_usize, seed: u64, index in 0..50_usize) {
            let point = simplex_point(domains, seed, index);
            prop_assert_eq!(point.len(), domains);
            prop_assert!(point.iter().all(|weight| (0.0..=1.0).contains(weight)));
            prop_assert!((point.iter().sum::<f64>() - 1.0).abs() < 1e-9);
            prop_assert_eq!(&point, &simplex_point(domains, seed, index));
            if domains > 1 {
                prop_assert_ne!(point, simplex_point(domains, seed, index + 1));
            }
        }
    }
}
