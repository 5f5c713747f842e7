//! Where the time went. Every millisecond of a run is in exactly one place, and every step of it is committed once.
//!
//! | place | what |
//! |---|---|
//! | `useful` | a step computed for the first time and committed, at the pace of the whole world |
//! | `short_handed` | what such a step took longer because ranks were missing |
//! | `snapshot` | the run stands still for a checkpoint |
//! | `down` | no step is computed; charged to what stopped it |
//! | `partial` | a step begun and not committed; likewise |
//! | `replayed` | a step computed again after a restore; charged to what made it necessary |

use super::causes::CAUSES;

/// What time is charged to: a cause's place in [`CAUSES`], or one of these behind them.
pub const CHARGES: usize = CAUSES.len() + 2;
/// The start of the run.
pub const CHARGE_START: usize = CAUSES.len();
/// Admitting replacements at a step boundary.
pub const CHARGE_ADMISSION: usize = CAUSES.len() + 1;

/// Time charged to one thing (milliseconds).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Charged {
    /// No step is computed.
    pub down_ms: u64,
    /// Begun steps that came to nothing.
    pub partial_ms: u64,
    /// Steps computed again.
    pub replayed_ms: u64,
}

impl Charged {
    /// Altogether.
    #[must_use]
    pub const fn total_ms(&self) -> u64 {
        self.down_ms + self.partial_ms + self.replayed_ms
    }
}

/// The account.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ledger {
    /// Steps committed for the first time, at full pace (milliseconds).
    pub useful_ms: u64,
    /// Their excess (milliseconds).
    pub short_handed_ms: u64,
    /// Standing still for checkpoints (milliseconds).
    pub snapshot_ms: u64,
    /// The rest, by what it is charged to.
    pub charged: [Charged; CHARGES],
    /// Steps committed, each once.
    pub steps: u64,
    /// Steps that had been committed and were given up for a checkpoint.
    pub steps_lost: u64,
    /// Steps computed again.
    pub steps_replayed: u64,
    /// All time before this is accounted for.
    until_ms: u64,
    /// What the present standstill is charged to.
    blame: usize,
    /// What replays are charged to.
    replay_blame: usize,
    /// The step under way when the last stretch was cut: what its time was charged to, that time, and whether it would have
    /// been a replay.
    cut: (usize, u64, bool),
}

/// A stretch of steps as it was computed.
#[derive(Clone, Copy, Debug)]
pub struct Stretch {
    /// Its first step began then.
    pub from_ms: u64,
    /// The state it began with.
    pub base: u64,
    /// A step takes this long in it.
    pub step_ms: u64,
    /// And this long while all are there.
    pub full_step_ms: u64,
    /// A checkpoint is taken behind each multiple of this.
    pub every: u64,
    /// It takes this long.
    pub snapshot_ms: u64,
}

/// How far a stretch got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reached {
    /// Steps completed in it.
    pub steps: u64,
    /// Time spent on snapshots.
    pub snapshot_ms: u64,
    /// Since the last step or snapshot was done.
    pub rest_ms: u64,
}

impl Stretch {
    fn snapshots_within(&self, steps: u64) -> u64 {
        (self.base + steps) / self.every - self.base / self.every
    }

    /// From the beginning until `steps` steps, and the snapshots behind them, are done.
    #[must_use]
    pub fn time_ms(&self, steps: u64) -> u64 {
        steps * self.step_ms + self.snapshots_within(steps) * self.snapshot_ms
    }

    /// When so many steps, at least one, are done; a snapshot behind the last one is not.
    #[must_use]
    pub fn end_ms(&self, steps: u64) -> u64 {
        self.from_ms + self.step_ms + self.time_ms(steps - 1)
    }

    /// How far it is at `now_ms`.
    #[must_use]
    pub fn at(&self, now_ms: u64) -> Reached {
        let spent_ms = now_ms.saturating_sub(self.from_ms);
        let (mut low, mut high) = (0, spent_ms / self.step_ms);
        // The most steps whose own end, snapshots before them included, has come.
        let end_ms =
            |steps: u64| steps * self.step_ms + self.snapshots_within(steps.saturating_sub(1)) * self.snapshot_ms;
        while low < high {
            let middle = (low + high).div_ceil(2);
            if end_ms(middle) <= spent_ms {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        let behind_ms = spent_ms - low * self.step_ms;
        let whole_ms = self.snapshots_within(low) * self.snapshot_ms;
        let snapshot_ms = whole_ms.min(behind_ms);
        Reached {
            steps: low,
            snapshot_ms,
            rest_ms: behind_ms - snapshot_ms,
        }
    }

    /// The newest checkpoint whose snapshot was done at `now_ms`, if this stretch took one.
    #[must_use]
    pub fn newest_snapshot(&self, now_ms: u64) -> Option<u64> {
        let reached = self.at(now_ms);
        let last = (self.base + reached.steps) / self.every * self.every;
        let newest = if now_ms.saturating_sub(self.from_ms) >= self.time_ms(last.saturating_sub(self.base)) {
            last
        } else {
            last.saturating_sub(self.every)
        };
        (newest > self.base).then_some(newest)
    }
}

impl Ledger {
    /// An empty account; the start is being charged.
    #[must_use]
    pub fn new() -> Self {
        Self {
            useful_ms: 0,
            short_handed_ms: 0,
            snapshot_ms: 0,
            charged: [Charged::default(); CHARGES],
            steps: 0,
            steps_lost: 0,
            steps_replayed: 0,
            until_ms: 0,
            blame: CHARGE_START,
            replay_blame: CHARGE_START,
            cut: (CHARGE_START, 0, false),
        }
    }

    /// The standstill until now is charged as before; from now on to `blame`.
    pub fn down(&mut self, now_ms: u64, blame: usize) {
        self.charged[self.blame].down_ms += now_ms - self.until_ms;
        self.until_ms = now_ms;
        self.blame = blame;
    }

    /// A run that stood at `stood` goes on from the checkpoint at `base`. That may be the later one: its upload went on behind
    /// a dispute whose restore never got whole. Then some steps that had been given up are there again.
    pub fn restore(&mut self, base: u64, stood: u64) {
        self.steps_lost = (self.steps_lost + stood).saturating_sub(base);
        self.replay_blame = self.blame;
    }

    /// A stretch ran until now; then `blame` stopped it.
    pub fn stretch(&mut self, now_ms: u64, stretch: &Stretch, blame: usize) {
        self.down(stretch.from_ms, blame);
        let reached = stretch.at(now_ms);
        let old = self.steps.saturating_sub(stretch.base).min(reached.steps);
        let new = reached.steps - old;
        self.steps_replayed += old;
        self.steps += new;
        self.charged[self.replay_blame].replayed_ms += old * stretch.step_ms;
        self.useful_ms += new * stretch.full_step_ms;
        self.short_handed_ms += new * (stretch.step_ms - stretch.full_step_ms);
        self.snapshot_ms += reached.snapshot_ms;
        self.charged[blame].partial_ms += reached.rest_ms;
        self.cut = (blame, reached.rest_ms, stretch.base + reached.steps < self.steps);
        self.until_ms = now_ms;
    }

    /// The survivors agreed that the step under way when the last stretch was cut is committed.
    pub fn finish_cut_step(&mut self) {
        let (blame, rest_ms, replay) = std::mem::take(&mut self.cut);
        self.charged[blame].partial_ms -= rest_ms;
        if replay {
            self.charged[self.replay_blame].replayed_ms += rest_ms;
            self.steps_replayed += 1;
        } else {
            self.useful_ms += rest_ms;
            self.steps += 1;
        }
    }

    /// The present standstill's charge.
    #[must_use]
    pub const fn blame(&self) -> usize {
        self.blame
    }

    /// Everything accounted for, added up (milliseconds).
    #[must_use]
    pub fn sum_ms(&self) -> u64 {
        let charged: u64 = self.charged.iter().map(Charged::total_ms).sum();
        self.useful_ms + self.short_handed_ms + self.snapshot_ms + charged
    }
}

impl Default for Ledger {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRETCH: Stretch = Stretch {
        from_ms: 1_000,
        base: 3,
        step_ms: 100,
        full_step_ms: 80,
        every: 5,
        snapshot_ms: 30,
    };

    #[test]
    fn a_stretch_is_what_stepping_gives() {
        let (mut now_ms, mut steps) = (STRETCH.from_ms, 0);
        let mut ends = vec![];
        let mut taken = vec![];
        while steps < 40 {
            now_ms += STRETCH.step_ms;
            steps += 1;
            ends.push(now_ms);
            assert_eq!(STRETCH.end_ms(steps), now_ms);
            if (STRETCH.base + steps).is_multiple_of(STRETCH.every) {
                now_ms += STRETCH.snapshot_ms;
                taken.push((now_ms, STRETCH.base + steps));
            }
            assert_eq!(STRETCH.time_ms(steps), now_ms - STRETCH.from_ms);
        }
        for at_ms in STRETCH.from_ms..4_000 {
            let reached = STRETCH.at(at_ms);
            let done = ends.iter().filter(|&&end| end <= at_ms).count() as u64;
            assert_eq!(reached.steps, done, "at {at_ms}");
            let spent = reached.steps * STRETCH.step_ms + reached.snapshot_ms + reached.rest_ms;
            assert_eq!(spent, at_ms - STRETCH.from_ms);
            let newest = taken.iter().rev().find(|(end, _)| *end <= at_ms).map(|&(_, step)| step);
            assert_eq!(STRETCH.newest_snapshot(at_ms), newest, "at {at_ms}");
        }
    }

    #[test]
    fn every_millisecond_is_in_one_place() {
        let first = Stretch { base: 0, ..STRETCH };
        let mut ledger = Ledger::new();
        ledger.stretch(2_050, &first, 4);
        assert_eq!(ledger.sum_ms(), 2_050);
        assert_eq!(ledger.charged[CHARGE_START].down_ms, 1_000);
        let done = ledger.steps;
        assert_eq!(done, first.at(2_050).steps);
        ledger.down(3_000, 4);
        ledger.restore(done - 2, done);
        let (from_ms, base) = (3_000, done - 2);
        let again = Stretch {
            from_ms,
            base,
            ..STRETCH
        };
        ledger.stretch(3_150, &again, 2);
        ledger.finish_cut_step();
        assert_eq!(
            ledger.charged[2],
            Charged::default(),
            "its cut step is committed, as a replay"
        );
        ledger.down(3_200, 2);
        let on = Stretch {
            from_ms: 3_200,
            base: done,
            ..STRETCH
        };
        ledger.stretch(3_350, &on, 2);
        assert_eq!(ledger.sum_ms(), 3_350);
        assert_eq!((ledger.steps_lost, ledger.steps_replayed), (2, 2));
        assert_eq!(ledger.steps, done + 1);
    }
}
