//! What a benchmark reports: medians and spreads, with the machine, the commit and the load they were taken under.

use serde_json::{Map, Value, json};
use std::fmt;
use std::path::Path;
use std::process::Command;

/// A sample in short.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Summary {
    /// Values.
    pub count: usize,
    /// Smallest.
    pub least: f64,
    /// Middle one; of an even number, the mean of the middle two.
    pub median: f64,
    /// The value below which 99 in 100 lie (nearest rank).
    pub p99: f64,
    /// Largest.
    pub most: f64,
}

impl Summary {
    /// Of the finite ones of these values.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn of(values: &[f64]) -> Self {
        let mut sorted: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        assert!(!sorted.is_empty(), "nothing was measured");
        let count = sorted.len();
        let rank99 = (count * 99).div_ceil(100);
        Self {
            count,
            least: sorted[0],
            median: f64::midpoint(sorted[(count - 1) / 2], sorted[count / 2]),
            p99: sorted[rank99 - 1],
            most: sorted[count - 1],
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = if self.median.abs() < 10.0 { 3 } else { 0 };
        write!(
            f,
            "p50 {:.digits$}, p99 {:.digits$}, {:.digits$} to {:.digits$} (n = {})",
            self.median, self.p99, self.least, self.most, self.count
        )
    }
}

/// Milliseconds since the Unix epoch, as `events.jsonl` counts them.
#[must_use]
pub fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// Named results.
#[derive(Clone, Debug)]
pub struct Figures {
    name: &'static str,
    values: Map<String, Value>,
    load_before: String,
}

impl Figures {
    /// Results of a benchmark, none yet.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            values: Map::new(),
            load_before: load_average(),
        }
    }

    /// Adds a number.
    #[must_use]
    pub fn number(mut self, name: &str, value: f64) -> Self {
        self.values.insert(name.to_owned(), json!(value));
        self
    }

    /// Adds a sample.
    #[must_use]
    pub fn summary(mut self, name: &str, summary: Summary) -> Self {
        let Summary {
            count,
            least,
            median,
            p99,
            most,
        } = summary;
        let value = json!({"count": count, "least": least, "median": median, "p99": p99, "most": most});
        self.values.insert(name.to_owned(), value);
        self
    }

    /// The results with machine, commit and load.
    #[must_use]
    pub fn with_context(&self) -> Value {
        json!({
            "benchmark": self.name, "machine": machine(), "commit": commit(), "load_average": self.load_before,
            "values": self.values,
        })
    }
}

/// Processor, number of cores, and the instruction set that the kernels chose.
#[must_use]
pub fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("unknown processor", |rest| rest.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let device = tarazed_kernels::CpuDevice::new();
    format!("{model}, {cores} processors, ours uses {}", device.instruction_set())
}

/// The commit of the project's folder, and whether it was changed since.
#[must_use]
pub fn commit() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let git = |args: &[&str]| {
        let output = Command::new("git").arg("-C").arg(&root).args(args).output().ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let hash = git(&["rev-parse", "--short", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
    match git(&["status", "--porcelain"]) {
        Some(changes) if changes.is_empty() => hash,
        _ => format!("{hash}, with uncommitted changes"),
    }
}

/// Load averages of the last 1, 5 and 15 minutes.
#[must_use]
pub fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_are_those_of_small_samples() {
        let summary = Summary::of(&[3.0, f64::NAN, 1.0, 2.0, 10.0]);
        assert_eq!((summary.count, summary.least, summary.most), (4, 1.0, 10.0));
        assert_eq!((summary.median, summary.p99), (2.5, 10.0));
        assert_eq!(Summary::of(&[5.0]).median, 5.0);
    }
}
