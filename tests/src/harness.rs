//! Starts real `tarazed` runs on tiny configs, watches them, harms them and reads what they leave.
//!
//! ```no_run
//! use tarazed_tests::harness::{Project, Run};
//!
//! let project = Project::tiny();
//! let mut run = Run::start(&project.train("victim").ranks(4).steps(200));
//! run.wait_for_step(20);
//! run.kill_rank(2);
//! let outcome = run.finish();
//! outcome.assert_code(0);
//! let (disturbed, alone) = (run.trace(), project.train("alone").steps(200).complete().trace());
//! tarazed_tests::harness::assert_same_trace(&disturbed, &alone, "one kill");
//! ```
//!
//! - Nothing here waits for a time that has to be long enough: every wait is for a fact, polled, with a generous limit.
//! - No process outlives its [`Run`]: dropping it kills the controller and whatever ranks its run folder still has.
//! - A failure shows the end of what the run said.
//!
//! It uses the program as a person does, through its command line and its files; it knows nothing of what is inside.

mod claims;
mod collector;
mod node;
mod processes;
mod program;
mod project;
mod run;
mod texts;
mod trace;

pub use claims::{assert_halted, assert_prefix, assert_refused, assert_undisturbed, wait_for_no_ranks};
pub use collector::{Collector, Export};
pub use node::Node;
pub use processes::Processes;
pub use program::{tarazed, verifier};
pub use project::{Project, Train};
pub use run::{Outcome, Run, Status, WorkerStatus};
pub use trace::{assert_same_trace, first_lines, line_count, lines, undisturbed, undisturbed_weights};

use std::time::Duration;

/// Limit of every wait. Far longer than any of them takes, also on a loaded machine.
pub const WAIT: Duration = Duration::from_secs(120);

/// Between two looks at something that is waited for.
pub const POLL: Duration = Duration::from_millis(5);

/// A small generator (SplitMix64). Tests that choose at random print its seed when they fail.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The seed that `TARAZED_TEST_SEED` names; a new one where it is not set.
    ///
    /// # Panics
    /// If the variable is set and holds no number.
    #[must_use]
    pub fn seed() -> u64 {
        match std::env::var("TARAZED_TEST_SEED") {
            Ok(text) => text.parse().expect("TARAZED_TEST_SEED holds a number"),
            Err(_) => std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |since| since.as_nanos() as u64),
        }
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub const fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// One of `items`, which are not none.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }
}
