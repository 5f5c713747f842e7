//! Which lines of `weights.jsonl` are written: each once and in order, however often ranks tell of a step.
//!
//! - A line is written just before the trace line of its step, and what lies behind the trace's end is cut off with the first
//!   line that the next controller writes. So together they say: a line up to the trace's end is there if and only if its step
//!   is committed.
//! - Replayed steps write nothing that is there. A line that a power loss took from the file's end, and that the trace still
//!   has, comes back with the replay of its step.
//! - It never ends a run: what cannot be a state's moments is refused with its reason, and no line comes of it.

use super::trajectory::{Moments, WeightLine};
use crate::message::StepLine;
use std::collections::BTreeMap;
use tarazed_domain::config::BatchSchedule;
use tarazed_domain::{ParameterLayout, StepsCompleted};

/// The end of `weights.jsonl`, and what ranks have told beyond it.
#[derive(Debug)]
pub struct WeightLog {
    layout: ParameterLayout,
    batch: BatchSchedule,
    context_tokens: u64,
    last: Option<WeightLine>,
    /// Of steps whose line is not written yet; not more than ranks may be ahead.
    waiting: BTreeMap<StepsCompleted, Vec<Moments>>,
}

impl WeightLog {
    /// At the end of a file whose last line is `last`, of a run with these tensors and global batches of sequences of so
    /// many tokens.
    #[must_use]
    pub const fn new(
        layout: ParameterLayout,
        batch: BatchSchedule,
        context_tokens: u64,
        last: Option<WeightLine>,
    ) -> Self {
        Self {
            layout,
            batch,
            context_tokens,
            last,
            waiting: BTreeMap::new(),
        }
    }

    /// A rank finished a step.
    ///
    /// # Errors
    /// What is wrong with its moments, for people; nothing of them is kept.
    pub fn on_line(&mut self, line: &StepLine) -> Result<(), String> {
        if line.weights.is_empty() || self.has(line.step) {
            return Ok(());
        }
        let tensors = self.layout.tensors();
        let fits = tensors.len() == line.weights.len()
            && tensors
                .iter()
                .zip(&line.weights)
                .all(|(slot, moments)| moments.count == slot.len() as u64);
        if !fits {
            return Err(format!(
                "no line of weights.jsonl for step {}: a rank summed the weights of another model",
                line.step
            ));
        }
        let finite = |moments: &Moments| moments.sum.is_finite() && moments.square_sum.is_finite();
        if let Some(wrong) = line.weights.iter().position(|moments| !finite(moments)) {
            return Err(format!(
                "no line of weights.jsonl for step {}: {} holds a weight that is not a number",
                line.step, tensors[wrong].name
            ));
        }
        self.waiting.insert(line.step, line.weights.clone());
        Ok(())
    }

    /// The trace line of a step is about to be written, or stands there already: the line that comes with it, unless it is
    /// there.
    pub fn on_step(&mut self, step: StepsCompleted) -> Option<WeightLine> {
        let told = self.waiting.remove(&step);
        let moments = told.filter(|_| !self.has(step))?;
        self.waiting.retain(|later, _| *later > step);
        let tokens = self.batch.samples(step) * self.context_tokens;
        let line = WeightLine::new(step, tokens, &self.layout, &moments).after(self.last.as_ref());
        self.last = Some(line.clone());
        Some(line)
    }

    fn has(&self, step: StepsCompleted) -> bool {
        self.last.as_ref().is_some_and(|last| last.step >= step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout() -> ParameterLayout {
        let tensors = (0..3).flat_map(|layer| {
            ["self_attn.q_proj", "mlp.up_proj"]
                .map(|kind| (format!("model.layers.{layer}.{kind}.weight"), vec![4, 2], true))
        });
        ParameterLayout::new(tensors, 8)
    }

    fn log(last: Option<WeightLine>) -> WeightLog {
        WeightLog::new(layout(), BatchSchedule::fixed(2), 5, last)
    }

    fn told(step: u64) -> StepLine {
        let moments = |tensor: usize| Moments {
            count: 8,
            sum: 1.0,
            square_sum: (step * 7 + tensor as u64) as f64,
        };
        StepLine {
            step: StepsCompleted(step),
            data: [1; 32],
            loss: 1.0,
            grad_norm: 1.0,
            state: [2; 32],
            learning_rate: 1e-3,
            mixture: vec![1.0],
            stats: Vec::new(),
            skipped: false,
            weights: (0..layout().tensors().len()).map(moments).collect(),
        }
    }

    /// Steps told, written, replayed and lost again in any order of lives: the file is that of a run without any of it.
    fn file_of(lives: &[(u64, u64)], end: u64) -> Vec<WeightLine> {
        let mut file: Vec<WeightLine> = Vec::new();
        let mut written = 0;
        // A last life goes from wherever the others stood to the end.
        for (back, further) in lives.iter().copied().chain([(written, end)]) {
            let base = written.saturating_sub(back);
            let mut log = log(file.last().cloned());
            let to = (base + further).min(end);
            for step in base + 1..=to {
                for _ in 0..2 {
                    log.on_line(&told(step)).expect("moments of this model");
                }
                file.extend(log.on_step(StepsCompleted(step)));
                assert!(log.on_step(StepsCompleted(step)).is_none(), "no line twice");
            }
            written = written.max(to);
        }
        file
    }

    proptest! {
        #[test]
        fn the_file_does_not_depend_on_what_happened(lives in prop::collection::vec((0_u64..9, 0_u64..9), 0..6)) {
            let whole = file_of(&[], 30);
            prop_assert_eq!(whole.len(), 30);
            prop_assert_eq!(file_of(&lives, 30), whole);
        }
    }

    #[test]
    fn a_line_knows_its_tokens_and_how_far_it_is_from_the_one_before() {
        let file = file_of(&[], 2);
        assert_eq!((file[1].step, file[1].tokens), (StepsCompleted(2), 20));
        assert_eq!(file[0].distance, None);
        let expected = file[1].distances(&file[0]).expect("tokens between them");
        assert!(expected.iter().all(|(_, distance)| distance > &0.0), "{expected:?}");
        assert_eq!(file[1].distance, Some(expected));
        let text = serde_json::to_string(&file[0]).expect("text");
        assert!(!text.contains("distance"), "{text}");
    }

    #[test]
    fn what_can_be_no_moments_is_refused_and_ends_nothing() {
        let mut log = log(None);
        let mut short = told(1);
        short.weights.pop();
        let mut wrong = told(1);
        wrong.weights[2].square_sum = f64::INFINITY;
        for (line, cause) in [(short, "another model"), (wrong, "model.layers.1.self_attn.q_proj")] {
            let refused = log.on_line(&line).expect_err("refused");
            assert!(refused.contains(cause), "{refused}");
            assert_eq!(log.on_step(StepsCompleted(1)), None);
        }
        log.on_line(&told(1)).expect("good ones still count");
        assert!(log.on_step(StepsCompleted(1)).is_some());
    }
}
