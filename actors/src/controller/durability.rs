//! How long the trace has waited for a checkpoint: what would have to be done again if all ranks were lost now.
//!
//! It has no clock: times are microseconds by whatever clock its owner keeps, and may lie before that clock's zero, since a
//! checkpoint is often older than the controller that finds it. Lines that came when nobody looked, under a controller
//! before, count as old as the newest checkpoint: never younger than they are.

use std::collections::VecDeque;
use tarazed_domain::StepsCompleted;

/// Entries of lines that no checkpoint has yet.
const ENTRIES_MAX: usize = 4_096;
/// Lines of so long a time share an entry.
const TOGETHER_US: i64 = 1_000_000;

/// The newest checkpoint that the run can go on from, as it was found in the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Newest {
    pub step: StepsCompleted,
    /// Since it was made, by the clock that wrote so into its manifest.
    pub age_ms: u64,
}

#[derive(Default)]
pub struct Durability {
    newest: Option<StepsCompleted>,
    /// Lines behind it, some together: the newest of them, and when the first came.
    waiting: VecDeque<(StepsCompleted, i64)>,
    /// All lines after this one are among those; none before the first word of a line or a checkpoint.
    known_after: Option<StepsCompleted>,
    /// Whether the store, or a checkpoint that was made, has said what there is.
    known: bool,
    /// What counts where every checkpoint is lost: when the oldest line came, as far as is known.
    earliest_us: Option<i64>,
}

impl Durability {
    /// The newest step whose checkpoint is known to exist.
    pub const fn step(&self) -> Option<StepsCompleted> {
        self.newest
    }

    /// Whether more is known than what this controller has written itself.
    pub const fn is_known(&self) -> bool {
        self.known
    }

    /// A line was written. Of those of a second one entry is kept, and where no checkpoint comes for long, of those of several.
    pub fn on_line(&mut self, now_us: i64, step: StepsCompleted) {
        self.earliest_us.get_or_insert(now_us);
        self.known_after.get_or_insert(StepsCompleted(step.0.saturating_sub(1)));
        match self.waiting.back_mut() {
            Some((newest, first_us)) if now_us.saturating_sub(*first_us) < TOGETHER_US => *newest = step,
            _ => self.waiting.push_back((step, now_us)),
        }
        if self.waiting.len() > ENTRIES_MAX {
            let all: Vec<_> = self.waiting.drain(..).collect();
            let together = |pair: &[(StepsCompleted, i64)]| (pair[pair.len() - 1].0, pair[0].1);
            self.waiting.extend(all.chunks(2).map(together));
        }
    }

    /// A checkpoint was made.
    pub fn on_checkpoint(&mut self, step: StepsCompleted) {
        self.known = true;
        self.newest = self.newest.max(Some(step));
        self.known_after = self.known_after.max(Some(step));
        self.cover(step);
    }

    /// What the store has, as it was looked for; none where there is nothing to go on from. The trace is written through
    /// `written`. It may be older than what was known, where that turned out to be bad or was left behind.
    pub fn on_found(&mut self, now_us: i64, found: Option<Newest>, written: StepsCompleted) {
        let made_us = |found: Newest| now_us.saturating_sub_unsigned(found.age_ms.saturating_mul(1_000));
        let mut since_us = found.map(made_us).or(self.earliest_us);
        self.known = true;
        self.newest = found.map(|found| found.step);
        let base = self.newest.unwrap_or(StepsCompleted(0));
        self.cover(base);
        // Through this line nothing is kept of when they came: nobody looked, or a checkpoint covered them.
        let unknown = self.known_after.unwrap_or(written);
        if base < unknown {
            let first_us = self.waiting.front().map_or(now_us, |(_, first_us)| *first_us);
            let oldest_us = since_us.map_or(first_us, |since_us| since_us.min(first_us));
            self.waiting.push_front((unknown, oldest_us));
            since_us = Some(oldest_us);
        }
        self.known_after = Some(base);
        self.earliest_us = [self.earliest_us, since_us].into_iter().flatten().min();
    }

    /// How long the oldest line has waited that no checkpoint covers, in seconds.
    pub fn lag_s(&self, now_us: i64) -> f64 {
        let waited_us = self
            .waiting
            .front()
            .map_or(0, |(_, first_us)| now_us.saturating_sub(*first_us));
        waited_us.max(0) as f64 / 1e6
    }

    /// Through this line a checkpoint has them all.
    fn cover(&mut self, step: StepsCompleted) {
        while self.waiting.front().is_some_and(|(line, _)| *line <= step) {
            self.waiting.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: i64 = 1_000_000;

    fn lines(durability: &mut Durability, steps: std::ops::RangeInclusive<u64>, from_s: i64) {
        for (step, at_s) in steps.zip(from_s..) {
            durability.on_line(at_s * S, StepsCompleted(step));
        }
    }

    fn newest(step: u64, age_s: u64) -> Option<Newest> {
        Some(Newest {
            step: StepsCompleted(step),
            age_ms: age_s * 1_000,
        })
    }

    /// What is told, at a time in seconds.
    fn told(durability: &Durability, at_s: i64) -> (Option<u64>, f64) {
        (durability.step().map(|step| step.0), durability.lag_s(at_s * S))
    }

    /// A run from its seed: the oldest line that is not covered counts, to the second.
    #[test]
    fn the_oldest_line_behind_the_newest_checkpoint_counts() {
        let mut durability = Durability::default();
        durability.on_found(0, None, StepsCompleted(0));
        assert_eq!(told(&durability, 9), (None, 0.0), "nothing can be lost");
        lines(&mut durability, 1..=5, 10);
        assert_eq!(told(&durability, 14), (None, 4.0));
        assert_eq!(told(&durability, 60), (None, 50.0), "it grows without a line, too");
        durability.on_checkpoint(StepsCompleted(3));
        assert_eq!(told(&durability, 60), (Some(3), 47.0));
        durability.on_checkpoint(StepsCompleted(5));
        assert_eq!(told(&durability, 99), (Some(5), 0.0));
    }

    /// A start that has to replay: the lines behind the checkpoint are in danger although none is new.
    #[test]
    fn a_replay_is_behind_from_its_first_moment() {
        let mut durability = Durability::default();
        durability.on_found(2 * S, newest(400, 3_600), StepsCompleted(500));
        assert_eq!(told(&durability, 2), (Some(400), 3_600.0));
        assert_eq!(told(&durability, 62), (Some(400), 3_660.0));
        durability.on_checkpoint(StepsCompleted(450));
        assert_eq!(
            told(&durability, 62),
            (Some(450), 3_660.0),
            "when line 451 came is not known: not after what it was counted from"
        );
        lines(&mut durability, 501..=502, 70);
        durability.on_checkpoint(StepsCompleted(500));
        assert_eq!(told(&durability, 80), (Some(500), 10.0));
    }

    #[test]
    fn a_start_at_its_checkpoint_is_not_behind() {
        let mut durability = Durability::default();
        durability.on_found(0, newest(400, 3_600), StepsCompleted(400));
        assert_eq!(told(&durability, 60), (Some(400), 0.0));
        lines(&mut durability, 401..=401, 61);
        assert_eq!(told(&durability, 65), (Some(400), 4.0));
    }

    /// A take-over: living ranks go on at once, and the newest checkpoint becomes known while they do.
    #[test]
    fn a_successor_counts_from_the_checkpoint_that_it_finds() {
        for lines_first in [false, true] {
            let mut durability = Durability::default();
            if lines_first {
                lines(&mut durability, 91..=93, 1);
            }
            assert!(!durability.is_known());
            let written = StepsCompleted(if lines_first { 93 } else { 90 });
            durability.on_found(4 * S, newest(80, 30), written);
            if !lines_first {
                lines(&mut durability, 91..=93, 5);
            }
            assert!(durability.is_known());
            assert_eq!(told(&durability, 10), (Some(80), 36.0), "{lines_first}");
            durability.on_checkpoint(StepsCompleted(92));
            let of_93_s = if lines_first { 7.0 } else { 3.0 };
            assert_eq!(told(&durability, 10), (Some(92), of_93_s), "{lines_first}");
        }
    }

    /// An older checkpoint has to do: lines that were covered are not any more.
    #[test]
    fn a_fallback_puts_back_what_was_covered() {
        let mut durability = Durability::default();
        durability.on_found(0, None, StepsCompleted(0));
        lines(&mut durability, 1..=30, 1);
        durability.on_checkpoint(StepsCompleted(10));
        durability.on_checkpoint(StepsCompleted(20));
        assert_eq!(told(&durability, 30), (Some(20), 9.0));
        durability.on_found(40 * S, newest(10, 29), StepsCompleted(30));
        assert_eq!(told(&durability, 40), (Some(10), 29.0));
        durability.on_checkpoint(StepsCompleted(20));
        assert_eq!(
            told(&durability, 40),
            (Some(20), 19.0),
            "what is known of the others is kept"
        );
        // Not one of them can be read: all that was done since the run began is at stake.
        durability.on_found(50 * S, None, StepsCompleted(30));
        assert_eq!(told(&durability, 50), (None, 49.0));
        durability.on_checkpoint(StepsCompleted(30));
        assert_eq!(told(&durability, 50), (Some(30), 0.0));
    }

    /// A clock that was set makes nothing younger than it is, nor older than now.
    #[test]
    fn a_checkpoint_from_the_future_is_of_now() {
        let mut durability = Durability::default();
        lines(&mut durability, 7..=8, 1);
        durability.on_found(5 * S, newest(4, 0), StepsCompleted(8));
        assert_eq!(told(&durability, 5), (Some(4), 4.0));
        assert_eq!(told(&durability, 0), (Some(4), 0.0));
    }

    #[test]
    fn a_long_time_without_a_checkpoint_is_kept_in_few_entries() {
        let mut durability = Durability::default();
        let count = 5 * ENTRIES_MAX as u64;
        lines(&mut durability, 1..=count, 0);
        assert!(durability.waiting.len() <= ENTRIES_MAX);
        assert_eq!(told(&durability, count as i64), (None, count as f64));
        durability.on_checkpoint(StepsCompleted(count - 1));
        assert!(durability.lag_s(count as i64 * S) >= 1.0, "never less than it is");
        durability.on_checkpoint(StepsCompleted(count));
        assert_eq!(told(&durability, count as i64), (Some(count), 0.0));
    }
}
