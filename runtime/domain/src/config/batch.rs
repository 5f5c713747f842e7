//! The global batch by step: fixed, or growing along a ramp.
//!
//! Lanes never change: they decide the order of every sum (DET-2). A ramp changes how many sequences each lane holds, in its
//! beginning none for some, so any world size computes the same numbers on it as without one.
//!
//! With start `s`, step `d` and full batch `G` the ramp has `k = (G - s) / d` rises; a step before which `c` samples
//! (sequences) were consumed has `min(G, s + d ⌊c k / samples⌋)` sequences. That is the `--rampup-batch-size s d samples`
//! of the published 34B and 70B recipes (arXiv 2408.07410), in whole numbers.

use super::BatchConfig;
use crate::ids::{StepIndex, StepsCompleted};
use serde::{Deserialize, Serialize};

/// `batch.ramp`: the global batch begins small and grows to its full size.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchRamp {
    /// Sequences of the first global batches; they may be fewer than lanes.
    pub start_sequences: u32,
    /// Sequences more at each rise; it divides the way to the full batch.
    pub step_sequences: u32,
    /// Samples (sequences) after which the batch is full.
    pub samples: u64,
}

/// A run of steps with one batch size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct BatchStage {
    from: StepIndex,
    sequences: u32,
    samples_before: u64,
}

/// Sequences of each step's global batch: a function of the config alone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BatchSchedule {
    /// By first step, which of the first one is 0.
    stages: Vec<BatchStage>,
}

impl BatchSchedule {
    /// The same batch at every step.
    #[must_use]
    pub fn fixed(sequences: u32) -> Self {
        Self {
            stages: vec![BatchStage {
                from: StepIndex(0),
                sequences,
                samples_before: 0,
            }],
        }
    }

    /// What a validated config says.
    #[must_use]
    pub fn of(batch: &BatchConfig) -> Self {
        let full = batch.lanes.saturating_mul(batch.sequences_per_lane);
        match batch.ramp {
            Some(ramp) => Self::ramped(full, ramp),
            None => Self::fixed(full),
        }
    }

    fn ramped(full: u32, ramp: BatchRamp) -> Self {
        let rises = full.saturating_sub(ramp.start_sequences) / ramp.step_sequences.max(1);
        let mut stage = BatchStage {
            from: StepIndex(0),
            sequences: ramp.start_sequences,
            samples_before: 0,
        };
        let mut stages = vec![stage];
        for rise in 1..=u64::from(rises) {
            // The first step before which ⌊c k / samples⌋ has reached this rise.
            let due = (u128::from(ramp.samples) * u128::from(rise)).div_ceil(u128::from(rises)) as u64;
            let missing = due.saturating_sub(stage.samples_before);
            let steps = missing.div_ceil(u64::from(stage.sequences.max(1)));
            let next = BatchStage {
                from: StepIndex(stage.from.0 + steps),
                sequences: ramp.start_sequences + ramp.step_sequences * rise as u32,
                samples_before: stage.samples_before + steps * u64::from(stage.sequences),
            };
            // One large step may pass several rises at once.
            if steps == 0 {
                stages.pop();
            }
            stages.push(next);
            stage = next;
        }
        Self { stages }
    }

    /// Sequences of one step's global batch.
    #[must_use]
    pub fn sequences(&self, step: StepIndex) -> u32 {
        self.stage(step).sequences
    }

    /// The largest of them.
    #[must_use]
    pub fn sequences_max(&self) -> u32 {
        self.stages.iter().map(|stage| stage.sequences).max().unwrap_or(0)
    }

    /// Samples (sequences) consumed by this many steps.
    #[must_use]
    pub fn samples(&self, steps: StepsCompleted) -> u64 {
        let stage = self.stage(StepIndex(steps.0));
        let more = (steps.0 - stage.from.0).saturating_mul(u64::from(stage.sequences));
        stage.samples_before.saturating_add(more)
    }

    /// The first step before which at least this many samples are consumed.
    #[must_use]
    pub fn step_after(&self, samples: u64) -> StepIndex {
        let after = self.stages.partition_point(|stage| stage.samples_before < samples);
        let stage = self.stages[after.saturating_sub(1)];
        let steps = samples
            .saturating_sub(stage.samples_before)
            .div_ceil(u64::from(stage.sequences.max(1)));
        StepIndex(stage.from.0.saturating_add(steps))
    }

    /// First steps and batch sizes, in order.
    pub fn stages(&self) -> impl ExactSizeIterator<Item = (StepIndex, u32)> {
        self.stages.iter().map(|stage| (stage.from, stage.sequences))
    }

    fn stage(&self, step: StepIndex) -> BatchStage {
        let after = self.stages.partition_point(|stage| stage.from <= step);
        self.stages[after - 1] // the first begins at step 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(lanes: u32, per_lane: u32, ramp: Option<BatchRamp>) -> BatchSchedule {
        BatchSchedule::of(&BatchConfig {
            lanes,
            sequences_per_lane: per_lane,
            micro_batch_sequences: 1,
            ramp,
        })
    }

    /// The definition, step by step.
    fn slowly(full: u32, ramp: BatchRamp, steps: u64) -> Vec<u32> {
        let rises = u128::from((full - ramp.start_sequences) / ramp.step_sequences);
        let mut consumed = 0_u64;
        (0..steps)
            .map(|_| {
                let rise = (u128::from(consumed) * rises / u128::from(ramp.samples)).min(rises) as u32;
                let sequences = (ramp.start_sequences + ramp.step_sequences * rise).min(full);
                consumed += u64::from(sequences);
                sequences
            })
            .collect()
    }

    #[test]
    fn the_ramp_is_that_of_its_definition() {
        for (full, start, step, samples, lanes) in [
            (1024, 32, 32, 20_000, 32),
            (1056, 48, 48, 20_000, 24),
            (64, 8, 8, 7, 8),
            (64, 8, 56, 1_000, 8),
            (64, 8, 8, 1_001, 8),
        ] {
            let ramp = BatchRamp {
                start_sequences: start,
                step_sequences: step,
                samples,
            };
            let schedule = batch(lanes, full / lanes, Some(ramp));
            let expected = slowly(full, ramp, 400);
            let mut samples = 0;
            for (index, sequences) in expected.iter().enumerate() {
                let step = StepIndex(index as u64);
                assert_eq!(schedule.sequences(step), *sequences, "{ramp:?} at step {step}");
                assert_eq!(
                    schedule.samples(StepsCompleted(step.0)),
                    samples,
                    "{ramp:?} before step {step}"
                );
                assert_eq!(schedule.step_after(samples), step);
                samples += u64::from(*sequences);
                assert_eq!(schedule.step_after(samples - 1), StepIndex(step.0 + 1));
            }
            assert_eq!(schedule.sequences_max(), full);
        }
    }

    /// The published recipe of the 34B model: 31 rises of 32 sequences over two million samples.
    #[test]
    fn the_published_ramp_takes_two_million_samples() {
        let ramp = BatchRamp {
            start_sequences: 32,
            step_sequences: 32,
            samples: 2_000_000,
        };
        let schedule = batch(32, 32, Some(ramp));
        assert_eq!(schedule.stages().len(), 32);
        let (full_from, sequences) = schedule.stages().last().expect("stages");
        assert_eq!(sequences, 1024);
        let consumed = schedule.samples(StepsCompleted(full_from.0));
        assert!((2_000_000..2_001_024).contains(&consumed), "{consumed}");
    }

    #[test]
    fn without_a_ramp_the_batch_stands() {
        let schedule = batch(8, 2, None);
        assert_eq!(schedule, BatchSchedule::fixed(16));
        assert_eq!(schedule.sequences(StepIndex(1_000_000)), 16);
        assert_eq!(schedule.samples(StepsCompleted(10)), 160);
        assert_eq!(schedule.step_after(160), StepIndex(10));
        assert_eq!(schedule.step_after(161), StepIndex(11));
        assert_eq!(schedule.step_after(0), StepIndex(0));
    }
}
