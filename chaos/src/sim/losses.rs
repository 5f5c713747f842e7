//! How many ranks died since the state was last known to be whole: fewer than there are copies must never cost it
//! (DESIGN.md section 4).

use std::sync::{Mutex, MutexGuard, PoisonError};
use tarazed_domain::Generation;

/// Deaths, counted against what they may cost.
#[derive(Default)]
pub struct Losses(Mutex<Count>);

#[derive(Default)]
struct Count {
    generation: Generation,
    copies: usize,
    /// Copies of each shard in the generation in which the state was last whole.
    whole_copies: usize,
    /// Deaths since that generation began, but for those since the newest one did.
    before: usize,
    since: usize,
    /// Nothing is known of the state: the ranks are new.
    unknown: bool,
}

impl Losses {
    fn lock(&self) -> MutexGuard<'_, Count> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A controller begins and no rank holds anything, or what they hold is not believed any more.
    pub fn new_life(&self) {
        *self.lock() = Count {
            unknown: true,
            ..Count::default()
        };
    }

    /// A generation begins, with so many copies of each shard; said once for each of its ranks.
    pub fn begins(&self, generation: Generation, copies: usize) {
        let mut count = self.lock();
        // One that is not in charge any more may be heard a little longer.
        if generation > count.generation {
            (count.generation, count.copies) = (generation, copies);
            count.before += std::mem::take(&mut count.since);
        }
    }

    /// A generation runs: every shard has all its copies.
    pub fn runs(&self, generation: Generation) {
        let mut count = self.lock();
        if count.generation == generation {
            (count.before, count.whole_copies, count.unknown) = (0, count.copies, false);
        }
    }

    /// A rank's process ends.
    pub fn dies(&self) {
        self.lock().since += 1;
    }

    /// Whether so many deaths may have cost the last copy of something.
    pub fn explain(&self) -> Result<(), String> {
        let count = self.lock();
        let (deaths, copies) = (count.before + count.since, count.whole_copies);
        if count.unknown || deaths >= copies {
            Ok(())
        } else {
            Err(format!(
                "{deaths} deaths cost the last copy of a shard, of which there were {copies}"
            ))
        }
    }
}
