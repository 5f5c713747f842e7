//! What is known of the runs that are finished: their outcomes, and how they were done.

use super::schedule::{Finished, RunId, Whole};
use std::collections::BTreeSet;

/// The finished runs.
#[derive(Default, Debug)]
pub struct Book {
    finished: Finished,
    seconds: Vec<f64>,
    programs: BTreeSet<String>,
}

impl Book {
    /// What is judged.
    #[must_use]
    pub const fn finished(&self) -> &Finished {
        &self.finished
    }

    /// Times of runs, for estimates.
    #[must_use]
    pub fn seconds(&self) -> &[f64] {
        &self.seconds
    }

    /// Hashes of the programs that ended runs.
    #[must_use]
    pub const fn programs(&self) -> &BTreeSet<String> {
        &self.programs
    }

    /// Takes up a run that is finished.
    pub fn add(&mut self, run: &RunId, whole: Whole) {
        self.finished.insert(run.clone(), whole.outcome);
        self.seconds.push(whole.seconds);
        self.programs.insert(whole.program);
    }
}
