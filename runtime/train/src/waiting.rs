//! How the device thread waits for another part of its process.
//!
//! Threads wait on their conditions. A simulator that runs every rank on one thread cannot: what it waits for would never
//! run. There the wait gives way to the others and looks again. No number depends on which of the two it is (DET-1).

use std::sync::{Arc, Condvar, MutexGuard, PoisonError};
use std::time::Duration;

/// Lets everything else of the process run for a moment, then returns.
pub type GiveWay = Arc<dyn Fn() + Send + Sync>;

/// One of the two ways to wait.
#[derive(Clone, Default)]
pub enum Waiting {
    /// Other threads do the work that is waited for.
    #[default]
    ForThreads,
    /// Everything runs on this thread: it gives way instead of blocking.
    GivingWay(GiveWay),
}

impl Waiting {
    /// Whether work that a thread of its own does elsewhere must be done in place.
    #[must_use]
    pub const fn is_alone(&self) -> bool {
        matches!(self, Self::GivingWay(_))
    }

    /// Waits until `changed` is signalled, for `at_most` at the longest; may return earlier.
    pub fn until_changed<'a, T>(
        &self,
        changed: &Condvar,
        lock: impl Fn() -> MutexGuard<'a, T>,
        guard: MutexGuard<'a, T>,
        at_most: Duration,
    ) -> MutexGuard<'a, T> {
        match self {
            Self::ForThreads => {
                let waited = changed.wait_timeout(guard, at_most);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            Self::GivingWay(give_way) => {
                drop(guard);
                give_way();
                lock()
            }
        }
    }

    /// Waits for `at_most`, or until this thread is unparked.
    pub fn a_moment(&self, at_most: Duration) {
        match self {
            Self::ForThreads => std::thread::park_timeout(at_most),
            Self::GivingWay(give_way) => give_way(),
        }
    }
}

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::ForThreads => "ForThreads",
            Self::GivingWay(_) => "GivingWay",
        })
    }
}
