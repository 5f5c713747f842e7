//! Power-law fit of a domain's held-out loss: `L(n) = e + b n^-a`.
//!
//! For a given floor `e` the law is a line in `ln n, ln (L - e)`, which least squares solves in closed form; `e` runs
//! over a fixed grid below the smallest loss, and the fit with the least squared error in `L` itself wins. No iteration,
//! no start value, no tolerance: the same points give the same fit. (ADO fits the same law by gradient descent from
//! many starts and penalises floors under half a nat, arXiv 2410.11820, section 3; small floors are real on easy
//! domains, so here they are not penalised.)

/// Points a fit needs at least.
pub(super) const POINTS_MIN: usize = 5;
/// The largest `n` must be this many times the smallest.
pub(super) const SPAN_MIN: f64 = 1.5;
/// Exponents above this are no scaling law but a transient.
const EXPONENT_MAX: f64 = 2.0;
/// Least share of the variance of `L` that the law explains.
const EXPLAINED_MIN: f64 = 0.5;
const GRID: u32 = 64;

/// A fitted law.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct PowerLaw {
    /// Irreducible loss, in nats.
    pub floor: f64,
    /// Exponent, positive.
    pub exponent: f64,
    /// `ln b`.
    pub ln_scale: f64,
    /// Share of the variance of the loss that the law explains.
    pub explained: f64,
}

impl PowerLaw {
    /// Loss after `n` tokens, in nats.
    pub(super) fn loss(&self, n: f64) -> f64 {
        self.floor + libm::exp(self.ln_scale - self.exponent * libm::log(n))
    }

    /// Fall of the loss per further token, `a (L - e) / n`, in nats.
    pub(super) fn speed(&self, n: f64) -> f64 {
        self.exponent * (self.loss(n) - self.floor) / n
    }
}

/// Fits the law to `(n, L)` points.
///
/// # Errors
/// Why there is no fit that can be trusted.
pub(super) fn fit(points: &[(f64, f64)]) -> Result<PowerLaw, &'static str> {
    if points.len() < POINTS_MIN {
        return Err("too few evaluations");
    }
    if points
        .iter()
        .any(|(n, loss)| !(loss.is_finite() && *loss > 0.0 && *n >= 1.0))
    {
        return Err("an evaluation is not a finite positive loss");
    }
    let smallest = points.iter().map(|point| point.0).fold(f64::INFINITY, f64::min);
    let largest = points.iter().map(|point| point.0).fold(0.0, f64::max);
    if largest < SPAN_MIN * smallest {
        return Err("too short a span of tokens");
    }
    let loss_min = points.iter().map(|point| point.1).fold(f64::INFINITY, f64::min);
    let best = (0..GRID)
        .filter_map(|index| fit_at(points, loss_min * f64::from(index) / f64::from(GRID)))
        .min_by(|a, b| a.0.total_cmp(&b.0)) // the first of equals: the lowest floor
        .map(|(_, law)| law)
        .ok_or("the points lie on one place")?;
    if best.exponent <= 0.0 {
        return Err("the held-out loss does not fall");
    }
    if best.exponent > EXPONENT_MAX {
        return Err("the loss falls faster than a scaling law");
    }
    if best.explained < EXPLAINED_MIN {
        return Err("the law explains too little of the loss");
    }
    Ok(best)
}

/// The law with this floor, and its squared error in the loss.
fn fit_at(points: &[(f64, f64)], floor: f64) -> Option<(f64, PowerLaw)> {
    let count = points.len() as f64;
    let logs = || points.iter().map(|(n, loss)| (libm::log(*n), libm::log(loss - floor)));
    let (sum_x, sum_y) = logs().fold((0.0, 0.0), |sum, (x, y)| (sum.0 + x, sum.1 + y));
    let (mean_x, mean_y) = (sum_x / count, sum_y / count);
    let (sxx, sxy) = logs().fold((0.0, 0.0), |sum, (x, y)| {
        (sum.0 + (x - mean_x) * (x - mean_x), sum.1 + (x - mean_x) * (y - mean_y))
    });
    if sxx <= 0.0 {
        return None;
    }
    let exponent = -sxy / sxx;
    let mean_loss = points.iter().map(|point| point.1).sum::<f64>() / count;
    let mut law = PowerLaw {
        floor,
        exponent,
        ln_scale: mean_y + exponent * mean_x,
        explained: 0.0,
    };
    let (error, spread) = points.iter().fold((0.0, 0.0), |sum, (n, loss)| {
        let miss = loss - law.loss(*n);
        (sum.0 + miss * miss, sum.1 + (loss - mean_loss) * (loss - mean_loss))
    });
    law.explained = if spread > 0.0 { 1.0 - error / spread } else { 0.0 };
    error.is_finite().then_some((error, law))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn points(floor: f64, scale: f64, exponent: f64) -> Vec<(f64, f64)> {
        (1..=40)
            .map(|k| {
                let n = 1e5 * f64::from(k);
                (n, floor + scale * n.powf(-exponent))
            })
            .collect()
    }

    proptest! {
        /// A clean law comes back: its loss everywhere, its speed within a third (the grid limits the floor).
        #[test]
        fn recovers_a_clean_law(floor in 0.0_f64..2.5, scale in 20.0_f64..80.0, exponent in 0.15_f64..0.45) {
            let points = points(floor, scale, exponent);
            let law = fit(&points).expect("a clean law is fitted");
            for (n, loss) in &points {
                prop_assert!((law.loss(*n) - loss).abs() < 0.02 * loss, "{law:?} at {n}");
            }
            let (n, loss) = points[39];
            let speed = exponent * (loss - floor) / n;
            prop_assert!((law.speed(n) / speed - 1.0).abs() < 0.34, "{} for {speed}", law.speed(n));
        }
    }

    /// A floor under half a nat is not punished.
    #[test]
    fn small_floors_are_found() {
        let law = fit(&points(0.1, 30.0, 0.3)).expect("fits");
        assert!(law.floor < 0.2, "{law:?}");
    }

    #[test]
    fn bad_fits_are_rejected_with_a_reason() {
        let clean = points(1.0, 30.0, 0.3);
        assert_eq!(fit(&clean[..4]), Err("too few evaluations"));
        assert_eq!(fit(&clean[30..]), Err("too short a span of tokens"));
        let rising: Vec<_> = clean.iter().map(|(n, loss)| (*n, 10.0 - loss)).collect();
        assert_eq!(fit(&rising), Err("the held-out loss does not fall"));
        let noise: Vec<_> = (0..40_u32)
            .map(|k| {
                (
                    1e5 * f64::from(k + 1),
                    3.0 + f64::from(k % 2) / 2.0 - 0.004 * f64::from(k),
                )
            })
            .collect();
        assert_eq!(fit(&noise), Err("the law explains too little of the loss"));
        let mut poisoned = clean;
        poisoned[3].1 = f64::NAN;
        assert_eq!(fit(&poisoned), Err("an evaluation is not a finite positive loss"));
    }
}
