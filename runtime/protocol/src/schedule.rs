//! When a checkpoint is due by the clock: every so often, or as often as Young and Daly advise.
//!
//! `checkpoint.interval_steps` needs no machine: every rank counts steps. What this machine asks for, the ranks take together
//! at a boundary that the barrier agrees on, so they save one and the same step. Checkpoints change no number of a run, and
//! so may follow a clock.
//!
//! For `interval = "auto"` the interval is Young's and Daly's first-order optimum `sqrt(2 δ M) - δ` (J. T. Daly, A higher order
//! estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer Systems 22, 2006, equation 9).
//! δ is what checkpoints of this run have cost: by how much steps took longer while one was under way. M is the mean time
//! between losses of ranks: those seen in this controller's life, and one more before it, at the rate of Llama 3's training
//! (419 unexpected interruptions in 54 days of 16,384 GPUs; The Llama 3 Herd of Models, section 3.3.4). Most losses cost no
//! restore, because replicas cover them, so it errs towards more checkpoints.

use std::collections::VecDeque;
use tarazed_domain::limits::{CHECKPOINT_AUTO_MS_MAX, CHECKPOINT_AUTO_MS_MIN};
use tarazed_domain::{CheckpointInterval, StepsCompleted};

/// Hours that one processor runs until something fails, before this run has seen anything: 54 days of 16,384 through 419.
const HOURS_PER_LOSS_ASSUMED: f64 = 54.0 * 24.0 * 16_384.0 / 419.0;
/// What a checkpoint is taken to cost at least, also before there was one.
const COST_MS_MIN: f64 = 1.0;
/// Weight of the newest checkpoint's cost against those before.
const COST_WEIGHT: f64 = 0.3;
/// Steps whose mean tells how long one takes without a checkpoint: enough to hold some with an evaluation.
const STEPS_REMEMBERED: usize = 101;

/// A checkpoint on its way.
#[derive(Clone, Copy, Debug)]
struct UnderWay {
    /// The ranks save the first boundary from this one on.
    from: StepsCompleted,
    asked_ms: u64,
    /// By how much steps have taken longer since, or shorter.
    cost_ms: f64,
}

/// Asks for checkpoints by the clock.
#[derive(Debug)]
pub struct CheckpointSchedule {
    interval: CheckpointInterval,
    ranks: u32,
    began_ms: Option<u64>,
    losses: u32,
    /// When the newest whole checkpoint was asked for, or became known.
    newest_ms: u64,
    under_way: Option<UnderWay>,
    /// The newest step given up: ranks have saved it, and do not save it again.
    failed: StepsCompleted,
    /// The newest line of this generation, and when it came.
    line: Option<(StepsCompleted, u64)>,
    steps_ms: VecDeque<u64>,
    cost_ms: Option<f64>,
}

impl CheckpointSchedule {
    /// A schedule for a world of `ranks`.
    #[must_use]
    pub const fn new(interval: CheckpointInterval, ranks: u32) -> Self {
        Self {
            interval,
            ranks,
            began_ms: None,
            losses: 0,
            newest_ms: 0,
            under_way: None,
            failed: StepsCompleted(0),
            line: None,
            steps_ms: VecDeque::new(),
            cost_ms: None,
        }
    }

    /// A line is written through `step`, or replayed and found to be the one that is there. An answer names the first
    /// boundary whose checkpoint all ranks are to be asked for.
    pub fn on_line(&mut self, now_ms: u64, step: StepsCompleted) -> Option<StepsCompleted> {
        if self.began_ms.is_none() {
            self.began_ms = Some(now_ms);
            self.newest_ms = now_ms;
        }
        // Several ranks may send a generation's first line, and old lines may still be on their way.
        if self.line.is_some_and(|(newest, _)| step <= newest) {
            return None;
        }
        self.measure(now_ms, step);
        if self.under_way.is_some() {
            return None;
        }
        let interval_ms = self.interval_ms(now_ms)?;
        if now_ms.saturating_sub(self.newest_ms) < interval_ms {
            return None;
        }
        let from = step.max(self.failed).next().completed();
        self.under_way = Some(UnderWay {
            from,
            asked_ms: now_ms,
            cost_ms: 0.0,
        });
        Some(from)
    }

    fn measure(&mut self, now_ms: u64, step: StepsCompleted) {
        let Some((_, last_ms)) = self.line.replace((step, now_ms)) else {
            return;
        };
        let took_ms = now_ms.saturating_sub(last_ms);
        let usual_ms = self.usual_step_ms();
        match (&mut self.under_way, usual_ms) {
            (Some(under_way), Some(usual_ms)) => under_way.cost_ms += took_ms as f64 - usual_ms,
            _ => {
                if self.steps_ms.len() == STEPS_REMEMBERED {
                    self.steps_ms.pop_front();
                }
                self.steps_ms.push_back(took_ms);
            }
        }
    }

    fn usual_step_ms(&self) -> Option<f64> {
        let sum_ms: u64 = self.steps_ms.iter().sum();
        (!self.steps_ms.is_empty()).then(|| sum_ms as f64 / self.steps_ms.len() as f64)
    }

    /// A checkpoint of `step` is committed, whoever asked for it.
    pub fn on_committed(&mut self, now_ms: u64, step: StepsCompleted) {
        match self.under_way.take_if(|under_way| under_way.from <= step) {
            Some(UnderWay { asked_ms, cost_ms, .. }) => {
                self.newest_ms = asked_ms;
                let cost_ms = cost_ms.max(0.0);
                let before = self.cost_ms.unwrap_or(cost_ms);
                self.cost_ms = Some(before + COST_WEIGHT * (cost_ms - before));
            }
            None => self.newest_ms = self.newest_ms.max(now_ms),
        }
    }

    /// A checkpoint of `step` is given up: the next is due an interval later, so that a store that is away is not asked at
    /// every step.
    pub fn on_failed(&mut self, now_ms: u64, step: StepsCompleted) {
        self.failed = self.failed.max(step);
        if self.under_way.take_if(|under_way| under_way.from <= step).is_some() {
            self.newest_ms = now_ms;
        }
    }

    /// A rank is lost.
    pub const fn on_loss(&mut self) {
        self.losses = self.losses.saturating_add(1);
    }

    /// A generation begins. What was asked of the last one may be lost with it, and is asked for anew.
    pub fn on_generation(&mut self, ranks: u32) {
        self.ranks = ranks;
        self.under_way = None;
        self.failed = StepsCompleted(0);
        // It may go on from an earlier step, and the time without steps says nothing of one.
        self.line = None;
    }

    /// The oldest boundary whose checkpoint may still come because it was asked for.
    #[cfg(test)]
    fn expected_from(&self) -> Option<StepsCompleted> {
        self.under_way.map(|under_way| under_way.from)
    }

    /// The present interval; none where there is no clock.
    #[must_use]
    pub fn interval_ms(&self, now_ms: u64) -> Option<u64> {
        match self.interval {
            CheckpointInterval::Off => None,
            CheckpointInterval::EveryMs(interval_ms) => Some(interval_ms),
            CheckpointInterval::Auto => {
                let cost_ms = self.cost_ms.unwrap_or(COST_MS_MIN).max(COST_MS_MIN);
                let optimum_ms = (2.0 * cost_ms * self.time_between_losses_ms(now_ms)).sqrt() - cost_ms;
                Some((optimum_ms.max(0.0) as u64).clamp(CHECKPOINT_AUTO_MS_MIN, CHECKPOINT_AUTO_MS_MAX))
            }
        }
    }

    fn time_between_losses_ms(&self, now_ms: u64) -> f64 {
        let assumed_ms = HOURS_PER_LOSS_ASSUMED * 3_600_000.0 / f64::from(self.ranks.max(1));
        let seen_ms = self.began_ms.map_or(0, |began_ms| now_ms.saturating_sub(began_ms));
        (assumed_ms + seen_ms as f64) / f64::from(self.losses + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STEP_MS: u64 = 100;

    fn run(schedule: &mut CheckpointSchedule, steps: std::ops::Range<u64>) -> Vec<u64> {
        let asked = steps.filter_map(|step| schedule.on_line(step * STEP_MS, StepsCompleted(step)));
        asked.map(|step| step.0).collect()
    }

    #[test]
    fn a_checkpoint_is_due_once_an_interval_is_over_and_not_again_while_it_is_under_way() {
        let mut schedule = CheckpointSchedule::new(CheckpointInterval::EveryMs(1_000), 4);
        assert_eq!(run(&mut schedule, 1..11), [0_u64; 0]);
        assert_eq!(run(&mut schedule, 11..40), [12], "an interval after the first line");
        assert_eq!(schedule.expected_from(), Some(StepsCompleted(12)));
        schedule.on_committed(4_000, StepsCompleted(12));
        assert_eq!(
            run(&mut schedule, 40..60),
            [41],
            "counted from where the last was asked for"
        );
        schedule.on_failed(6_000, StepsCompleted(41));
        assert_eq!(
            run(&mut schedule, 60..80),
            [71],
            "a lost one is not tried at every step"
        );
        schedule.on_generation(3);
        assert_eq!(run(&mut schedule, 80..90), [81], "a new generation is asked anew");
        schedule.on_committed(9_000, StepsCompleted(75));
        assert_eq!(
            schedule.expected_from(),
            Some(StepsCompleted(81)),
            "an older one is another"
        );
    }

    /// Ranks do not save a step again that they have saved: after a failure a later one is asked for.
    #[test]
    fn what_failed_is_not_asked_for_again() {
        let mut schedule = CheckpointSchedule::new(CheckpointInterval::EveryMs(1_000), 4);
        assert_eq!(run(&mut schedule, 1..13), [12]);
        schedule.on_failed(1_300, StepsCompleted(40));
        assert_eq!(run(&mut schedule, 13..30), [41], "lines lag behind what was saved");
    }

    /// Every rank sends a generation's first line; old lines may come after it.
    #[test]
    fn lines_that_come_again_say_nothing() {
        let mut schedule = CheckpointSchedule::new(CheckpointInterval::EveryMs(1_000), 4);
        assert_eq!(run(&mut schedule, 1..11), [0_u64; 0]);
        for step in [10, 10, 4] {
            assert_eq!(schedule.on_line(5_000, StepsCompleted(step)), None);
        }
        assert_eq!(schedule.on_line(5_000, StepsCompleted(11)), Some(StepsCompleted(12)));
        // Another generation begins behind: its replayed lines count.
        schedule.on_generation(4);
        assert_eq!(schedule.on_line(6_100, StepsCompleted(5)), Some(StepsCompleted(6)));
    }

    #[test]
    fn without_a_clock_nothing_is_asked_for() {
        let mut schedule = CheckpointSchedule::new(CheckpointInterval::Off, 4);
        assert_eq!(run(&mut schedule, 1..10_000), [0_u64; 0]);
    }

    #[test]
    fn checkpoints_by_steps_count_for_the_clock() {
        let mut schedule = CheckpointSchedule::new(CheckpointInterval::EveryMs(1_000), 4);
        assert_eq!(run(&mut schedule, 1..10), [0_u64; 0]);
        schedule.on_committed(900, StepsCompleted(8));
        assert_eq!(run(&mut schedule, 10..25), [20]);
    }

    #[test]
    fn auto_follows_young_and_daly() {
        let mut schedule = CheckpointSchedule::new(CheckpointInterval::Auto, 16_384);
        run(&mut schedule, 1..100);
        // Nothing seen yet: 54 days / 419 between losses, and a checkpoint that costs a millisecond.
        assert_eq!(schedule.interval_ms(9_900), Some(CHECKPOINT_AUTO_MS_MIN));
        assert_eq!(run(&mut schedule, 100..1_000), [102]);
        // Ten steps are longer, by five seconds in all; the many others before the commit are not.
        let mut now_ms = 999 * STEP_MS;
        for step in 1_000..1_010 {
            now_ms += STEP_MS + 500;
            assert_eq!(schedule.on_line(now_ms, StepsCompleted(step)), None);
        }
        schedule.on_committed(now_ms, StepsCompleted(102));
        let seen_ms = (now_ms - STEP_MS) as f64;
        let mean_ms: f64 = 54.0 * 86_400_000.0 / 419.0 + seen_ms;
        let expected_ms = (2.0 * 5_000.0 * mean_ms).sqrt() - 5_000.0;
        let interval_ms = schedule.interval_ms(now_ms).unwrap() as f64;
        assert!(
            (interval_ms / expected_ms - 1.0).abs() < 0.01,
            "{interval_ms} and {expected_ms}"
        );
        // Four times the losses, half the interval.
        let before_ms = interval_ms + 5_000.0;
        (0..3).for_each(|_| schedule.on_loss());
        let after_ms = schedule.interval_ms(now_ms).unwrap() as f64 + 5_000.0;
        assert!((after_ms / before_ms - 0.5).abs() < 0.01, "{after_ms} and {before_ms}");
    }

    #[derive(Clone, Debug)]
    enum Happens {
        Line(u64),
        Committed(u64),
        Failed(u64),
        Loss,
        Generation(u32),
    }

    fn happens() -> impl Strategy<Value = Happens> {
        prop_oneof![
            8 => (0_u64..100_000).prop_map(Happens::Line),
            1 => (0_u64..50).prop_map(Happens::Committed),
            1 => (0_u64..50).prop_map(Happens::Failed),
            1 => Just(Happens::Loss),
            1 => (0_u32..9).prop_map(Happens::Generation),
        ]
    }

    proptest! {
        /// Whatever happens: never two under way, never before an interval is over since the newest that counts, never of a
        /// step that ranks have saved already, and the interval within its bounds.
        #[test]
        fn no_history_confuses_it(auto: bool, all in prop::collection::vec(happens(), 1..200)) {
            let interval = if auto { CheckpointInterval::Auto } else { CheckpointInterval::EveryMs(30_000) };
            let mut schedule = CheckpointSchedule::new(interval, 4);
            let (mut now_ms, mut step, mut failed) = (0, 0, 0);
            // When the newest checkpoint was asked for or became known; the first line counts as one.
            let (mut newest_ms, mut asked_ms) = (None, 0);
            for happens in all {
                let expected = schedule.expected_from();
                match happens {
                    Happens::Line(after_ms) => {
                        now_ms += after_ms;
                        step += 1;
                        let newest_ms = *newest_ms.get_or_insert(now_ms);
                        let due_ms = schedule.interval_ms(now_ms).unwrap();
                        prop_assert!(auto || due_ms == 30_000);
                        prop_assert!((CHECKPOINT_AUTO_MS_MIN..=CHECKPOINT_AUTO_MS_MAX).contains(&due_ms));
                        if let Some(from) = schedule.on_line(now_ms, StepsCompleted(step)) {
                            prop_assert_eq!(expected, None);
                            prop_assert_eq!(from, StepsCompleted(step.max(failed) + 1));
                            prop_assert_eq!(schedule.expected_from(), Some(from));
                            prop_assert!(now_ms - newest_ms >= schedule.interval_ms(now_ms).unwrap());
                            asked_ms = now_ms;
                        }
                    }
                    Happens::Committed(back) => {
                        let of = StepsCompleted(step.saturating_sub(back));
                        schedule.on_committed(now_ms, of);
                        newest_ms = match expected.filter(|from| *from <= of) {
                            Some(_) => Some(asked_ms),
                            None => newest_ms.map(|newest_ms: u64| newest_ms.max(now_ms)),
                        };
                    }
                    Happens::Failed(back) => {
                        let of = step.saturating_sub(back);
                        schedule.on_failed(now_ms, StepsCompleted(of));
                        failed = failed.max(of);
                        if expected.is_some_and(|from| from.0 <= of) {
                            newest_ms = Some(now_ms);
                        }
                    }
                    Happens::Loss => schedule.on_loss(),
                    Happens::Generation(ranks) => {
                        schedule.on_generation(ranks);
                        failed = 0;
                        prop_assert_eq!(schedule.expected_from(), None);
                    }
                }
            }
        }
    }
}
