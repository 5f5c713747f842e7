//! Checkpoints on their way into the store. One is whole once every rank's upload is done; the death of any rank takes
//! along those under way.

use super::ledger::Stretch;
use std::collections::VecDeque;

/// What the store holds and what is being written.
#[derive(Debug, Default)]
pub struct Saves {
    newest: Option<u64>,
    /// Step and the time at which it is whole.
    under_way: VecDeque<(u64, u64)>,
}

impl Saves {
    /// The newest that can be restored.
    #[must_use]
    pub const fn newest(&self) -> Option<u64> {
        self.newest
    }

    /// A stretch ended: whatever it snapshot is whole or under way.
    pub fn stretch(&mut self, now_ms: u64, stretch: &Stretch, upload_ms: u64) {
        let whole = now_ms
            .checked_sub(upload_ms)
            .and_then(|then_ms| stretch.newest_snapshot(then_ms));
        self.newest = self.newest.max(whole);
        let Some(mut step) = stretch.newest_snapshot(now_ms) else {
            return;
        };
        let mut recent = Vec::new();
        while step > stretch.base {
            let due_ms = stretch.from_ms + stretch.time_ms(step - stretch.base) + upload_ms;
            if due_ms <= now_ms {
                break;
            }
            recent.push((step, due_ms));
            step = step.saturating_sub(stretch.every);
        }
        self.under_way.extend(recent.into_iter().rev());
    }

    /// A snapshot of `step` will be whole at `due_ms`.
    pub fn begin(&mut self, step: u64, due_ms: u64) {
        self.under_way.push_back((step, due_ms));
    }

    /// Time passed: whether the newest is another one now.
    pub fn settle(&mut self, now_ms: u64) -> bool {
        let before = self.newest;
        while let Some(&(step, due_ms)) = self.under_way.front()
            && due_ms <= now_ms
        {
            self.under_way.pop_front();
            self.newest = self.newest.max(Some(step));
        }
        self.newest != before
    }

    /// A rank died: what it had not stored will not be whole. How many were lost.
    pub fn interrupt(&mut self, now_ms: u64) -> usize {
        self.settle(now_ms);
        let lost = self.under_way.len();
        self.under_way.clear();
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_death_takes_along_what_is_under_way_and_a_pause_does_not() {
        let stretch = Stretch {
            from_ms: 0,
            base: 0,
            step_ms: 100,
            full_step_ms: 100,
            every: 2,
            snapshot_ms: 10,
        };
        for dies in [false, true] {
            let mut saves = Saves::default();
            // Snapshots at 210, 420, 630; each is whole 250 later.
            saves.stretch(700, &stretch, 250);
            assert_eq!(saves.newest(), Some(2));
            if dies {
                assert_eq!(
                    saves.interrupt(700),
                    1,
                    "that of step 4 is whole at 670, that of step 6 is not"
                );
            }
            saves.settle(900);
            assert_eq!(saves.newest(), Some(if dies { 4 } else { 6 }));
        }
    }
}
