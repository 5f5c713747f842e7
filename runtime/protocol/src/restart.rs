//! Whether something that died is started again: one-for-one, with back-off and a budget (SUP-3).
//!
//! - **SUP-3** No-progress restart loops stop after a bounded number of tries with the chain of causes; they never spin.
//!
//! Progress clears the budget: what died once a day for a month is started again each time.

/// What to do about a death.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Start it again after this wait.
    Restart {
        /// Milliseconds to wait first.
        after_ms: u64,
    },
    /// Give up: the causes, oldest first.
    GiveUp {
        /// One line per death since there was progress.
        causes: Vec<String>,
    },
}

/// Budget and back-off of one worker or actor.
#[derive(Clone, Debug)]
pub struct RestartLimiter {
    starts_max: u32,
    backoff_ms: u64,
    causes: Vec<String>,
}

/// The back-off doubles up to this.
pub const BACKOFF_MS_MAX: u64 = tarazed_domain::limits::RESTART_BACKOFF_MS_MAX;

impl RestartLimiter {
    /// Allows `starts_max` starts without progress between them; the first retry waits nothing, the next `backoff_ms`,
    /// then twice that, and so on.
    #[must_use]
    pub const fn new(starts_max: u32, backoff_ms: u64) -> Self {
        Self {
            starts_max,
            backoff_ms,
            causes: Vec::new(),
        }
    }

    /// It did what it is there for: earlier deaths no longer count.
    pub fn on_progress(&mut self) {
        self.causes.clear();
    }

    /// It died of `cause`.
    pub fn on_death(&mut self, cause: String) -> Verdict {
        self.causes.push(cause);
        let deaths = self.causes.len() as u32;
        if deaths >= self.starts_max {
            return Verdict::GiveUp {
                causes: self.causes.clone(),
            };
        }
        let doublings = deaths.saturating_sub(2).min(20);
        let after_ms = if deaths == 1 {
            0
        } else {
            (self.backoff_ms << doublings).min(BACKOFF_MS_MAX)
        };
        Verdict::Restart { after_ms }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SUP-3
    #[test]
    fn a_restart_loop_ends_with_the_chain_of_causes() {
        let mut limiter = RestartLimiter::new(4, 100);
        assert_eq!(limiter.on_death("first".into()), Verdict::Restart { after_ms: 0 });
        assert_eq!(limiter.on_death("second".into()), Verdict::Restart { after_ms: 100 });
        assert_eq!(limiter.on_death("third".into()), Verdict::Restart { after_ms: 200 });
        let Verdict::GiveUp { causes } = limiter.on_death("fourth".into()) else {
            panic!("the budget is spent")
        };
        assert_eq!(causes, ["first", "second", "third", "fourth"]);
    }

    /// SUP-3
    #[test]
    fn progress_clears_the_budget_and_back_off_is_bounded() {
        let mut limiter = RestartLimiter::new(100, 100);
        for _ in 0..60 {
            let Verdict::Restart { after_ms } = limiter.on_death("x".into()) else {
                panic!("within budget")
            };
            assert!(after_ms <= BACKOFF_MS_MAX);
        }
        limiter.on_progress();
        assert_eq!(limiter.on_death("y".into()), Verdict::Restart { after_ms: 0 });
    }
}
