//! What the textbook expects of a run that restores its checkpoint after every failure (Young 1974, Daly 2006), to first
//! order in one over the mean time between failures. Below about 80 % goodput it is wrong, and drawn as such.

/// The formula's terms, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// The run stands still for a checkpoint (C).
    pub checkpoint_ms: f64,
    /// From there until the checkpoint may be restored (L).
    pub latency_ms: f64,
    /// Until a failure is known (D).
    pub detect_ms: f64,
    /// From there until all is as before (R).
    pub restart_ms: f64,
}

/// Above this goodput the formula is taken for right.
pub const GOODPUT_VALID_MIN: f64 = 0.8;

impl Terms {
    /// The best interval between checkpoints: `max(sqrt(2 C M), L)`.
    #[must_use]
    pub fn best_interval_ms(&self, mtbf_ms: f64) -> f64 {
        (2.0 * self.checkpoint_ms * mtbf_ms).sqrt().max(self.latency_ms)
    }

    /// `1 - C/tau - (tau/2 + L + D + R)/M`, not below zero.
    #[must_use]
    pub fn goodput(&self, interval_ms: f64, mtbf_ms: f64) -> f64 {
        let lost_ms = interval_ms / 2.0 + self.latency_ms + self.detect_ms + self.restart_ms;
        (1.0 - self.checkpoint_ms / interval_ms - lost_ms / mtbf_ms).max(0.0)
    }

    /// Goodput at the best interval.
    #[must_use]
    pub fn best_goodput(&self, mtbf_ms: f64) -> f64 {
        self.goodput(self.best_interval_ms(mtbf_ms), mtbf_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::Terms;

    #[test]
    fn no_other_interval_is_better() {
        let terms = Terms {
            checkpoint_ms: 60_000.0,
            latency_ms: 0.0,
            detect_ms: 5_000.0,
            restart_ms: 90_000.0,
        };
        let mtbf_ms = 4.0 * 3_600_000.0;
        let best = terms.best_interval_ms(mtbf_ms);
        assert!((best - 1_314_534.0).abs() < 1.0, "{best}");
        for factor in [0.5, 0.9, 1.1, 2.0] {
            assert!(terms.goodput(best * factor, mtbf_ms) < terms.best_goodput(mtbf_ms));
        }
    }
}
