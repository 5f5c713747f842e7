//! The course of a whole run in [`POINTS_MAX`] points at most. Pure.
//!
//! Steps are put into **buckets** of `width` steps each, `width` being the smallest power of two with which there are few
//! enough: bucket `b` holds the steps from `b · width + 1` to `(b + 1) · width`. Of losses, gradient norms and speeds a
//! bucket keeps the least, the mean and the greatest, so that no spike is thinned away; of learning rate, tokens, mixture
//! and held-out losses it keeps the last. Where a bucket begins and ends depends on the length of the run alone, and not on
//! when somebody looked; when the run outgrows its buckets, each two of them become one.
//!
//! What is not finite is no part of least, mean and greatest. Memory is bounded by points and domains, not by steps.

use serde_json::{Value, json};

/// Buckets at most; even.
pub const POINTS_MAX: usize = 1_000;

/// What one line of the trace says.
#[derive(Clone, Debug, Default)]
pub struct Line<'a> {
    /// Steps completed, from 1.
    pub step: u64,
    /// Training tokens so far.
    pub tokens: Option<u64>,
    /// Training loss in nats per token.
    pub loss: Option<f64>,
    /// Gradient norm before clipping.
    pub grad_norm: Option<f64>,
    /// Learning rate.
    pub lr: Option<f64>,
    /// Share of each domain, 0 to 1.
    pub mixture: Vec<(&'a str, f64)>,
    /// Held-out losses in nats per token, where the step is an evaluation.
    pub held_out: Vec<(&'a str, f64)>,
}

/// All that is kept of a run.
#[derive(Debug)]
pub struct History {
    width: u64,
    buckets: Vec<Bucket>,
    mixture: Names,
    held_out: Names,
    /// The mixture of the newest line.
    newest_mixture: Row,
    /// The newest steps of trace and of metrics.
    through: [u64; 2],
}

impl Default for History {
    fn default() -> Self {
        Self {
            width: 1,
            buckets: Vec::new(),
            mixture: Names::default(),
            held_out: Names::default(),
            newest_mixture: Row::new(),
            through: [0; 2],
        }
    }
}

/// One value for each name, in their order; fewer where later names were not known yet.
type Row = Vec<Option<f64>>;

#[derive(Debug, Default)]
struct Bucket {
    last_step: u64,
    loss: Spread,
    grad_norm: Spread,
    tokens_per_s: Spread,
    lr: Option<f64>,
    tokens: Option<u64>,
    /// The last change, and its step.
    mixture: Option<(u64, Row)>,
    /// The last evaluation, and its step.
    held_out: Option<(u64, Row)>,
}

impl Bucket {
    /// With what `later` holds, of the steps behind.
    fn take(&mut self, later: Self) {
        self.last_step = self.last_step.max(later.last_step);
        self.loss.take(later.loss);
        self.grad_norm.take(later.grad_norm);
        self.tokens_per_s.take(later.tokens_per_s);
        self.lr = later.lr.or(self.lr);
        self.tokens = later.tokens.or(self.tokens);
        self.mixture = later.mixture.or(self.mixture.take());
        self.held_out = later.held_out.or(self.held_out.take());
    }
}

/// Least, mean and greatest of finite numbers.
#[derive(Clone, Copy, Debug, Default)]
struct Spread {
    count: u64,
    sum: f64,
    least: f64,
    greatest: f64,
}

impl Spread {
    fn add(&mut self, value: Option<f64>) {
        if let Some(value) = value.filter(|value| value.is_finite()) {
            self.take(Self {
                count: 1,
                sum: value,
                least: value,
                greatest: value,
            });
        }
    }

    fn take(&mut self, other: Self) {
        match (self.count, other.count) {
            (_, 0) => {}
            (0, _) => *self = other,
            _ => {
                self.count += other.count;
                self.sum += other.sum;
                self.least = self.least.min(other.least);
                self.greatest = self.greatest.max(other.greatest);
            }
        }
    }

    /// Least, mean, greatest.
    fn told(self) -> Option<[f64; 3]> {
        (self.count > 0).then_some([self.least, self.sum / self.count as f64, self.greatest])
    }
}

/// Names in the order in which they were first seen.
#[derive(Debug, Default)]
struct Names(Vec<String>);

impl Names {
    /// The values by name; later ones of a name count.
    fn row(&mut self, values: &[(&str, f64)]) -> Row {
        let mut row = Row::new();
        for (at, (name, value)) in values.iter().enumerate() {
            // Lines have the names in one order, so the first look finds nearly all.
            let is_here = self.0.get(at).is_some_and(|known| known == name);
            let found = if is_here {
                Some(at)
            } else {
                self.0.iter().position(|known| known == name)
            };
            let index = found.unwrap_or_else(|| {
                self.0.push((*name).to_owned());
                self.0.len() - 1
            });
            row.resize(row.len().max(index + 1), None);
            row[index] = Some(*value).filter(|value| value.is_finite());
        }
        row
    }
}

impl History {
    /// A line of the trace.
    pub fn line(&mut self, line: &Line<'_>) {
        self.through[0] = line.step;
        let mixture = self.mixture.row(&line.mixture);
        let changed = (!mixture.is_empty() && mixture != self.newest_mixture).then(|| {
            self.newest_mixture.clone_from(&mixture);
            (line.step, mixture)
        });
        let held_out = (!line.held_out.is_empty()).then(|| (line.step, self.held_out.row(&line.held_out)));
        let bucket = self.bucket(line.step);
        bucket.loss.add(line.loss);
        bucket.grad_norm.add(line.grad_norm);
        bucket.take(Bucket {
            last_step: line.step,
            lr: line.lr.filter(|lr| lr.is_finite()),
            tokens: line.tokens,
            mixture: changed,
            held_out,
            ..Bucket::default()
        });
    }

    /// Tokens per second, as `metrics.jsonl` has them of a step. A step that is written twice counts twice.
    pub fn speed(&mut self, step: u64, tokens_per_s: Option<f64>) {
        self.through[1] = step;
        let bucket = self.bucket(step);
        bucket.last_step = bucket.last_step.max(step);
        bucket.tokens_per_s.add(tokens_per_s);
    }

    fn bucket(&mut self, step: u64) -> &mut Bucket {
        while self.index(step) >= POINTS_MAX as u64 {
            self.width = self.width.saturating_mul(2);
            let mut wider: Vec<Bucket> = Vec::with_capacity(self.buckets.len().div_ceil(2));
            for (index, bucket) in std::mem::take(&mut self.buckets).into_iter().enumerate() {
                match wider.last_mut() {
                    Some(before) if index % 2 == 1 => before.take(bucket),
                    _ => wider.push(bucket),
                }
            }
            self.buckets = wider;
        }
        let index = self.index(step) as usize;
        if self.buckets.len() <= index {
            self.buckets.resize_with(index + 1, Bucket::default);
        }
        &mut self.buckets[index]
    }

    const fn index(&self, step: u64) -> u64 {
        step.saturating_sub(1) / self.width
    }

    /// The buckets that hold anything of a step after `after`, as docs/FORMATS.md describes them.
    #[must_use]
    pub fn since(&self, after: u64) -> Value {
        let shown = || self.buckets.iter().filter(move |bucket| bucket.last_step > after);
        let spread = |of: fn(&Bucket) -> Spread| {
            let [least, mean, greatest] = [0, 1, 2].map(|which| -> Vec<Option<f64>> {
                shown()
                    .map(|bucket| of(bucket).told().map(|told| told[which]))
                    .collect()
            });
            json!({"min": least, "mean": mean, "max": greatest})
        };
        let rows = |names: &Names, of: fn(&Bucket) -> &Option<(u64, Row)>| {
            let points: Vec<&(u64, Row)> = shown().filter_map(|bucket| of(bucket).as_ref()).collect();
            json!({"names": names.0, "points": points})
        };
        json!({
            "width": self.width,
            // What comes may still change buckets behind the slower of the two files.
            "through": self.through[0].min(self.through[1]),
            "step": shown().map(|bucket| bucket.last_step).collect::<Vec<u64>>(),
            "tokens": shown().map(|bucket| bucket.tokens).collect::<Vec<Option<u64>>>(),
            "lr": shown().map(|bucket| bucket.lr).collect::<Vec<Option<f64>>>(),
            "loss": spread(|bucket| bucket.loss),
            "grad_norm": spread(|bucket| bucket.grad_norm),
            "tokens_per_s": spread(|bucket| bucket.tokens_per_s),
            "mixture": rows(&self.mixture, |bucket| &bucket.mixture),
            "heldout": rows(&self.held_out, |bucket| &bucket.held_out),
        })
    }
}

#[cfg(test)]
mod tests;
