//! What a line takes in a storm while nothing is wrong: the stretches between faults, on a whole world. The machine is then the
//! storm's own, with whatever else it does in that hour, which stretches before and after cannot know.

use super::book::Record;
use super::calm::{Calm, Calms};

/// A fault's traces are gone this long after it has ended and the run has recovered: lost ranks are back, caches warm.
const SETTLED_MS: u64 = 5_000;
/// Fewer lines than these tell no rate.
pub const LINES_MIN: usize = 500;

/// A new line: when it was written, and by how many ranks it was computed.
#[derive(Clone, Copy, Debug)]
pub struct Line {
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// Ranks of the generation.
    pub ranks: u32,
}

/// When a fault may show: from it to its end or its recovery, and a while longer.
#[must_use]
pub fn shadow(record: &Record) -> (u64, u64) {
    let recovered_ms = record.at_ms + record.recovery_ms.unwrap_or(0);
    (record.at_ms, record.ends_ms.max(recovered_ms) + SETTLED_MS)
}

/// Mean time from line to line of each world, over all pairs of neighbours that no fault's shadow touches.
#[must_use]
pub fn rates(lines: &[Line], shadows: &[(u64, u64)]) -> Calms {
    let mut shadows = shadows.to_vec();
    shadows.sort_unstable();
    // Shadows that began before a line and reach farthest: whoever touches any of them touches that one.
    let mut begun = shadows.iter().copied().peekable();
    let mut reaches_ms = 0;
    let mut found = Calms::new();
    for pair in lines.windows(2) {
        let &[before, line] = pair else { continue };
        while let Some((_, end)) = begun.next_if(|&(start, _)| start < line.time_ms) {
            reaches_ms = reaches_ms.max(end);
        }
        if before.ranks != line.ranks || reaches_ms > before.time_ms || line.time_ms < before.time_ms {
            continue;
        }
        let calm = found.entry(line.ranks).or_insert(Calm { lines: 0, step_ms: 0.0 });
        calm.lines += 1;
        calm.step_ms += (line.time_ms - before.time_ms) as f64;
    }
    for calm in found.values_mut() {
        calm.step_ms /= calm.lines as f64;
    }
    found.retain(|_, calm| calm.lines >= LINES_MIN);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every(step_ms: u64, from_ms: u64, to_ms: u64, ranks: u32) -> Vec<Line> {
        let times = (from_ms..to_ms).step_by(step_ms as usize);
        times.map(|time_ms| Line { time_ms, ranks }).collect()
    }

    #[test]
    fn only_lines_that_no_fault_touches_count() {
        let mut lines = every(10, 0, 10_000, 4);
        // A fault at 10 s, and a slow stretch in its shadow; a world that is not whole; another fault in the first's shadow.
        lines.extend(every(100, 10_000, 16_000, 4));
        lines.extend(every(30, 16_000, 20_000, 3));
        lines.extend(every(20, 20_000, 40_000, 4));
        let rates = rates(&lines, &[(12_000, 15_000), (10_000, 30_000)]);
        let calm = rates[&4];
        let (fast, slow) = (1_000, 499); // to the first fault, and from the end of the longer shadow
        assert_eq!(calm.lines, fast + slow);
        let expected = (fast * 10 + slow * 20) as f64 / (fast + slow) as f64;
        assert!((calm.step_ms - expected).abs() < 1e-9, "{calm:?}");
        assert!(!rates.contains_key(&3), "too few");
    }

    #[test]
    fn a_storm_without_faults_is_all_calm() {
        let rates = rates(&every(7, 0, 7_000, 2), &[]);
        assert_eq!((rates[&2].lines, rates[&2].step_ms), (999, 7.0));
        assert!(super::rates(&[], &[]).is_empty());
    }
}
