//! Paired comparisons of a few runs: interval, exact test, correction for many.
//!
//! Runs are paired by seed: same initial weights, same order of each domain's text. What is left to compare is a handful
//! of differences, so small-sample methods are used throughout:
//! - **interval**: the bootstrap's percentile interval of the mean, *expanded*. The plain one is too narrow for few
//!   pairs: of five, a nominal 95% covers about 85%. Its tails are therefore taken at `Φ(-√(n/(n-1)) t)`, with `t` Student's
//!   quantile of `n - 1` degrees of freedom (Hesterberg, "What Teachers Should Know about the Bootstrap", arXiv
//!   1411.5279, the section on the percentile interval and its expansion).
//! - **test**: exact sign flips of the differences, two-sided (Fisher's randomisation test for pairs). With `n` pairs no
//!   p-value is below `2 / 2^n`.
//! - **many comparisons**: Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979).
//!
//! Pure: the same differences and seed give the same bits.

use super::random::Random;
use serde::Serialize;

/// Pairs at most: the exact test looks at `2^n` assignments of signs.
pub const PAIRS_MAX: usize = 20;
/// Bisections of a quantile: far below a float's own precision.
const BISECTIONS: usize = 200;

/// From, to.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Interval {
    /// Whether zero is outside.
    #[must_use]
    pub fn excludes_zero(&self) -> bool {
        self.low > 0.0 || self.high < 0.0
    }
}

/// What paired differences say about their mean.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Paired {
    /// Number of differences.
    pub pairs: usize,
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation (`n - 1`).
    pub deviation: f64,
    /// Bootstrap interval of the mean.
    pub interval: Interval,
    /// Two-sided p-value of the exact sign-flip test.
    pub p_sign_flip: f64,
}

/// How intervals are made.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Bootstrap {
    /// Coverage asked for, in 0..1.
    pub confidence: f64,
    /// Resamples.
    pub resamples: usize,
    /// Seed of the resampling.
    pub seed: u64,
}

/// Mean of `values`; NaN of none.
#[must_use]
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Sample standard deviation; none for fewer than two values.
#[must_use]
pub fn deviation(values: &[f64]) -> Option<f64> {
    if values.len() < 2 {
        return None;
    }
    let centre = mean(values);
    let squares: f64 = values.iter().map(|value| (value - centre) * (value - centre)).sum();
    Some((squares / (values.len() - 1) as f64).sqrt())
}

/// Judges differences of pairs. `label` names the comparison: it has its own random stream.
///
/// None for fewer than two or more than [`PAIRS_MAX`] differences, or where one is not finite: nothing can be said then.
#[must_use]
pub fn paired(differences: &[f64], bootstrap: &Bootstrap, label: &str) -> Option<Paired> {
    let fit = differences.len() <= PAIRS_MAX && differences.iter().all(|value| value.is_finite());
    let deviation = deviation(differences).filter(|_| fit)?;
    Some(Paired {
        pairs: differences.len(),
        mean: mean(differences),
        deviation,
        interval: expanded_percentile(differences, bootstrap, label),
        p_sign_flip: sign_flip(differences),
    })
}

fn expanded_percentile(differences: &[f64], bootstrap: &Bootstrap, label: &str) -> Interval {
    let count = differences.len();
    let mut random = Random::of(bootstrap.seed, label);
    let mut means: Vec<f64> = (0..bootstrap.resamples.max(1))
        .map(|_| {
            let sum: f64 = (0..count).map(|_| differences[random.index(0..count)]).sum();
            sum / count as f64
        })
        .collect();
    means.sort_by(f64::total_cmp);
    let tail = expanded_tail(count, bootstrap.confidence);
    let skip = ((tail * means.len() as f64) as usize).min((means.len() - 1) / 2);
    Interval {
        low: means[skip],
        high: means[means.len() - 1 - skip],
    }
}

/// Share of resamples below the interval of `count` pairs, and above it.
#[must_use]
pub fn expanded_tail(count: usize, confidence: f64) -> f64 {
    let n = count as f64;
    let quantile = student_quantile((1.0 - confidence) / 2.0, count as u32 - 1);
    normal_below(-(n / (n - 1.0)).sqrt() * quantile)
}

/// `Φ(x)`, the standard normal distribution.
fn normal_below(x: f64) -> f64 {
    0.5 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2)
}

/// `t` with `P(T > t) = tail` for Student's distribution of `degrees` of freedom (at least 1); `tail` in 0..½.
fn student_quantile(tail: f64, degrees: u32) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    while student_within(high, degrees) < 1.0 - 2.0 * tail {
        high *= 2.0;
    }
    for _ in 0..BISECTIONS {
        let middle = f64::midpoint(low, high);
        if student_within(middle, degrees) < 1.0 - 2.0 * tail {
            low = middle;
        } else {
            high = middle;
        }
    }
    f64::midpoint(low, high)
}

/// `P(|T| <= t)` (Abramowitz and Stegun, 26.7.3 and 26.7.4: finite sums for whole degrees of freedom).
fn student_within(t: f64, degrees: u32) -> f64 {
    let angle = libm::atan(t / f64::from(degrees).sqrt());
    let (sine, cosine) = (libm::sin(angle), libm::cos(angle));
    let is_odd = degrees % 2 == 1;
    // Terms cosθ, (2/3) cos³θ, … for odd degrees; 1, (1/2) cos²θ, … for even ones; each from the one before.
    let mut term = if is_odd { cosine } else { 1.0 };
    let mut power = u32::from(is_odd);
    let mut sum = 0.0;
    while power + 2 <= degrees {
        sum += term;
        term *= cosine * cosine * f64::from(power + 1) / f64::from(power + 2);
        power += 2;
    }
    if is_odd {
        std::f64::consts::FRAC_2_PI * (angle + sine * sum)
    } else {
        sine * sum
    }
}

/// Two-sided p-value: share of sign assignments whose sum is at least as far from zero as the one seen, which counts too.
fn sign_flip(differences: &[f64]) -> f64 {
    let seen = differences.iter().sum::<f64>().abs();
    let size: f64 = differences.iter().map(|value| value.abs()).sum();
    // Sums of the same numbers in other groupings differ by rounding: a hair less counts as the same.
    let least = seen - size * 1e-12;
    let assignments = 1_u32 << differences.len();
    let extreme = (0..assignments)
        .filter(|signs| {
            let flipped = differences.iter().enumerate();
            let sum: f64 = flipped.map(|(at, d)| if signs >> at & 1 == 1 { -d } else { *d }).sum();
            sum.abs() >= least
        })
        .count();
    extreme as f64 / f64::from(assignments)
}

/// The smallest p-value that `pairs` differences can have.
#[must_use]
pub fn p_least(pairs: usize) -> f64 {
    2.0 / libm::exp2(pairs as f64)
}

/// Holm's adjusted p-values, in the order given.
#[must_use]
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]).then(a.cmp(&b)));
    let mut adjusted = vec![0.0; p.len()];
    let mut highest = 0.0_f64;
    for (rank, &at) in order.iter().enumerate() {
        highest = highest.max(p[at] * (p.len() - rank) as f64).min(1.0);
        adjusted[at] = highest;
    }
    adjusted
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOOTSTRAP: Bootstrap = Bootstrap {
        confidence: 0.95,
        resamples: 200_000,
        seed: 1,
    };

    #[test]
    fn students_quantiles_are_those_of_the_tables() {
        for (degrees, expected) in [
            (1, 12.706_204_7),
            (2, 4.302_652_7),
            (3, 3.182_446_3),
            (4, 2.776_445_1),
            (7, 2.364_624_3),
            (19, 2.093_024_1),
        ] {
            let found = student_quantile(0.025, degrees);
            assert!((found - expected).abs() < 1e-6, "{degrees}: {found}");
        }
        assert!((normal_below(-1.959_963_985) - 0.025).abs() < 1e-9);
    }

    /// All `n^n` resamples of four differences, counted one by one, against the seeded ones.
    #[test]
    fn the_bootstrap_is_that_of_all_resamples() {
        let differences = [0.3, -0.1, 0.8, 0.45];
        let mut means = Vec::new();
        for mut code in 0..256_usize {
            let sum: f64 = (0..4)
                .map(|_| {
                    let at = code % 4;
                    code /= 4;
                    differences[at]
                })
                .sum();
            means.push(sum / 4.0);
        }
        means.sort_by(f64::total_cmp);
        // A coverage whose expanded tail is 1 in 10: 25.6 of 256 resamples lie beyond.
        let mut confidence = 0.5;
        while expanded_tail(4, confidence) > 0.1 {
            confidence += 1e-4;
        }
        let found = expanded_percentile(
            &differences,
            &Bootstrap {
                confidence,
                ..BOOTSTRAP
            },
            "exact",
        );
        assert!((found.low - means[25]).abs() < 1e-12, "{found:?} {}", means[25]);
        assert!((found.high - means[230]).abs() < 1e-12, "{found:?} {}", means[230]);
    }

    /// The expansion makes up for what the plain interval lacks: of normal differences, about 95 in 100 intervals hold the
    /// true mean, five pairs or eight.
    #[test]
    fn the_interval_covers_what_it_says() {
        let bootstrap = Bootstrap {
            resamples: 4_000,
            ..BOOTSTRAP
        };
        for pairs in [5, 8] {
            let mut random = Random::of(9, "coverage");
            let mut normal = || {
                let radius = (-2.0 * libm::log(1.0 - random.unit())).sqrt();
                radius * libm::cos(std::f64::consts::TAU * random.unit())
            };
            let held = (0..400)
                .filter(|_| {
                    let differences: Vec<f64> = (0..pairs).map(|_| normal()).collect();
                    !expanded_percentile(&differences, &bootstrap, "coverage").excludes_zero()
                })
                .count();
            // 380 expected of a true 95%, standard deviation 4.4; the plain interval of five has 338.
            assert!((362..=396).contains(&held), "{pairs} pairs: {held} of 400");
        }
    }

    #[test]
    fn sign_flips_are_counted_exactly() {
        // Of 8 assignments only the one seen and its mirror are as far from zero.
        assert_eq!(sign_flip(&[1.0, 2.0, 3.0]), 0.25);
        // |1 + 1 - 1| = 1 is reached by all assignments but the two of equal signs... and those are farther: all count.
        assert_eq!(sign_flip(&[1.0, 1.0, -1.0]), 1.0);
        assert_eq!(sign_flip(&[0.0, 0.0]), 1.0);
        assert_eq!(sign_flip(&[0.1; 8]), p_least(8));
        assert_eq!(p_least(8), 0.007_812_5);
    }

    #[test]
    fn holm_steps_down() {
        let adjusted = holm(&[0.01, 0.04, 0.03, 0.5]);
        let expected = [0.04, 0.09, 0.09, 0.5];
        assert!(
            adjusted.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12),
            "{adjusted:?}"
        );
        assert_eq!(holm(&[0.9, 0.8]), [1.0, 1.0]);
        assert!(holm(&[]).is_empty());
    }

    #[test]
    fn what_cannot_be_judged_is_not() {
        assert_eq!(paired(&[0.1], &BOOTSTRAP, "one"), None);
        assert_eq!(paired(&[0.1, f64::NAN], &BOOTSTRAP, "nan"), None);
        assert_eq!(paired(&[0.1; PAIRS_MAX + 1], &BOOTSTRAP, "many"), None);
        let same = paired(&[0.25; 6], &BOOTSTRAP, "same").expect("a judgement");
        assert_eq!((same.mean, same.deviation), (0.25, 0.0));
        assert_eq!(same.interval, Interval { low: 0.25, high: 0.25 });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// Turning the differences around turns the interval around, up to chance; shifting shifts it exactly.
        #[test]
        fn intervals_move_with_their_differences(
            differences in prop::collection::vec(-1.0..1.0_f64, 2..10),
            shift in -2.0..2.0_f64,
        ) {
            let bootstrap = Bootstrap { resamples: 2_000, ..BOOTSTRAP };
            let plain = paired(&differences, &bootstrap, "x").expect("a judgement");
            let moved: Vec<f64> = differences.iter().map(|d| d + shift).collect();
            let moved = paired(&moved, &bootstrap, "x").expect("a judgement");
            prop_assert!((moved.interval.low - plain.interval.low - shift).abs() < 1e-9);
            prop_assert!((moved.interval.high - plain.interval.high - shift).abs() < 1e-9);
            prop_assert!(plain.interval.low <= plain.mean + 1e-9 && plain.mean <= plain.interval.high + 1e-9);
            let turned: Vec<f64> = differences.iter().map(|d| -d).collect();
            let turned = paired(&turned, &bootstrap, "x").expect("a judgement");
            prop_assert_eq!(turned.p_sign_flip, plain.p_sign_flip);
            prop_assert!((turned.mean + plain.mean).abs() < 1e-12);
        }
    }
}
