//! What came of a storm, for people and as JSON.

use super::book::{Book, Record, Times};
use super::calm::Calms;
use super::files::TraceHash;
use super::kind::Kind;
use super::scenario::Scenario;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// Faults of one kind.
#[derive(Clone, Debug, Default, Serialize)]
pub struct OfKind {
    /// Tried, or impossible.
    pub asked: u64,
    /// That did something.
    pub done: u64,
    /// That nothing ran into.
    pub without_effect: u64,
    /// Impossible here, and why.
    pub impossible: Option<String>,
    /// Borne: no incident, no loss.
    pub borne: u64,
    /// Done, and the end of the storm came before their outcome was known.
    pub open: u64,
    /// To the incident.
    pub detection: Option<Times>,
    /// To the new line.
    pub recovery: Option<Times>,
}

/// One life of the controller.
#[derive(Clone, Debug, Serialize)]
pub struct LifeReport {
    /// `--ranks`
    pub world: u32,
    /// New lines.
    pub lines: u64,
    /// How it ended.
    pub end: String,
}

/// Both traces.
#[derive(Clone, Debug, Serialize)]
pub struct Traces {
    /// Of the single rank that nothing happened to.
    pub reference: TraceHash,
    /// Of the storm.
    pub storm: TraceHash,
    /// Whether they are the same bytes.
    pub equal: bool,
}

/// The machine and the means.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Processors.
    pub processors: usize,
    /// How the disk was filled.
    pub disk: String,
    /// How memory ran out.
    pub memory: String,
    /// The store behind the proxy.
    pub store: String,
}

/// What was counted while the storm went on.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Counts {
    /// From the first start to the last fault's end.
    pub wall_s: f64,
    /// Lines that were new in that time.
    pub lines: u64,
    /// Lines computed again behind the newest one.
    pub lines_replayed: u64,
    /// Controllers killed (SIGKILL).
    pub controllers_killed: u64,
    /// Lives that ended with 33.
    pub transient_ends: u64,
    /// Time that as many fault-free lines take, over the wall time; none where no fault-free stretch was made.
    pub goodput: Option<f64>,
    /// The same by the lines of the storm itself while nothing was wrong; none where such times were too short.
    pub goodput_between_faults: Option<f64>,
    /// Rates between the faults of the storm itself.
    pub undisturbed: Calms,
    /// Rates of the stretches before and after.
    pub calm_before: Calms,
    /// After.
    pub calm_after: Calms,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The scenario as it was read.
    pub scenario: Scenario,
    /// Where.
    pub machine: Machine,
    /// Identity of config and program.
    pub identity: String,
    /// Counts.
    pub counts: Counts,
    /// Faults asked for: tried, or impossible here.
    pub asked: u64,
    /// Faults done.
    pub done: u64,
    /// By kind.
    pub kinds: BTreeMap<Kind, OfKind>,
    /// Of all.
    pub detection: Option<Times>,
    /// Of all.
    pub recovery: Option<Times>,
    /// Faults done at the entry of a phase, by phase.
    pub second: BTreeMap<String, u64>,
    /// Workers whose process was hit.
    pub workers_hit: BTreeSet<u32>,
    /// Lives.
    pub lives: Vec<LifeReport>,
    /// Both traces; none where the storm did not come to an end.
    pub traces: Option<Traces>,
    /// Why it failed; empty where it passed.
    pub failures: Vec<String>,
}

/// Adds up the faults of a book.
#[must_use]
pub fn by_kind(book: &Book, impossible: &BTreeMap<Kind, String>) -> BTreeMap<Kind, OfKind> {
    let mut kinds: BTreeMap<Kind, OfKind> = BTreeMap::new();
    for record in book.records() {
        let of = kinds.entry(record.kind).or_default();
        of.asked += 1;
        of.done += u64::from(record.had_effect);
        of.without_effect += u64::from(!record.had_effect);
        of.borne += u64::from(record.had_effect && record.closed && record.detection_ms.is_none());
        of.open += u64::from(record.had_effect && !record.closed);
    }
    for (kind, why) in impossible {
        let of = kinds.entry(*kind).or_default();
        of.asked += 1;
        of.impossible = Some(why.clone());
    }
    for (kind, of) in &mut kinds {
        (of.detection, of.recovery) = times(book.records().iter().filter(|record| record.kind == *kind));
    }
    kinds
}

/// Detection and recovery of some faults.
pub fn times<'a>(records: impl Iterator<Item = &'a Record> + Clone) -> (Option<Times>, Option<Times>) {
    let done = records.filter(|record| record.had_effect);
    let detection = done.clone().filter_map(|record| record.detection_ms).collect();
    let recovery = done.filter_map(|record| record.recovery_ms).collect();
    (Times::of(detection), Times::of(recovery))
}

/// Faults that came with a phase, by phase.
#[must_use]
pub fn seconds(book: &Book) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    for record in book
        .records()
        .iter()
        .filter(|record| record.trigger != "pace" && record.had_effect)
    {
        *found.entry(record.trigger.clone()).or_default() += 1;
    }
    found
}

impl Report {
    /// Judges the storm against its scenario; what is missing.
    pub fn judge(&mut self) {
        let (goal, counts) = (&self.scenario.goal, &self.counts);
        let mut failures = Vec::new();
        match &self.traces {
            None => failures.push("the storm did not come to an end of its own".to_owned()),
            Some(traces) if !traces.equal => failures.push("the traces differ".to_owned()),
            Some(_) => {}
        }
        let mut least = |what: &str, reached: f64, wanted: f64| {
            if reached < wanted {
                failures.push(format!("{what}: {reached:.3}, and {wanted} were wanted"));
            }
        };
        let asked = self.scenario.until.faults.unwrap_or(0).max(goal.faults_min);
        least("faults done", self.done as f64, asked as f64);
        let kinds = self.kinds.values().filter(|of| of.done > 0).count();
        least("kinds done", kinds as f64, goal.kinds_min as f64);
        least(
            "controllers killed",
            counts.controllers_killed as f64,
            goal.controller_kills_min as f64,
        );
        least(
            "goodput",
            counts.goodput.unwrap_or(0.0),
            goal.goodput_min.unwrap_or(0.0),
        );
        let per_hour = self.done as f64 * 3600.0 / counts.wall_s.max(1.0);
        least("faults an hour", per_hour, goal.per_hour_min.unwrap_or(0.0));
        if goal.no_rank_immune {
            let workers = self.workers_hit.len();
            least("workers hit", workers as f64, f64::from(self.scenario.largest()));
        }
        let impossible = self
            .kinds
            .iter()
            .filter_map(|(kind, of)| Some((kind, of.impossible.as_ref()?)));
        for (kind, why) in impossible {
            failures.push(format!("{kind} could not be done: {why}"));
        }
        self.failures.extend(failures);
    }

    /// The summary, as it is printed.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut text = String::new();
        self.write_summary(&mut text).unwrap_or_default();
        text
    }

    fn write_summary(&self, out: &mut String) -> std::fmt::Result {
        let counts = &self.counts;
        let per_hour = self.done as f64 * 3600.0 / counts.wall_s.max(1.0);
        let kinds = self.kinds.values().filter(|of| of.done > 0).count();
        writeln!(out, "storm '{}', seed {}", self.scenario.name, self.scenario.seed)?;
        writeln!(
            out,
            "  {} faults of {kinds} kinds done, {} asked, in {:.0} s ({per_hour:.0} an hour)",
            self.done, self.asked, counts.wall_s
        )?;
        writeln!(
            out,
            "  {} lives of the controller ({} killed, {} ended with 33), worlds {:?}, workers hit {:?}",
            self.lives.len(),
            counts.controllers_killed,
            counts.transient_ends,
            self.scenario.worlds,
            self.workers_hit
        )?;
        let share =
            |goodput: Option<f64>| goodput.map_or("not measured".to_owned(), |share| format!("{:.1} %", share * 100.0));
        writeln!(
            out,
            "  {} new lines, {} computed again; goodput {} of fault-free steps; by the storm's own times between faults {}",
            counts.lines,
            counts.lines_replayed,
            share(counts.goodput),
            share(counts.goodput_between_faults)
        )?;
        for (world, calm) in &counts.undisturbed {
            writeln!(
                out,
                "    step between faults on {world}: {:.2} ms ({} of them)",
                calm.step_ms, calm.lines
            )?;
        }
        for (world, calm) in &counts.calm_before {
            let after = counts.calm_after.get(world).map_or(f64::NAN, |calm| calm.step_ms);
            writeln!(
                out,
                "    fault-free step on {world}: {:.2} ms before, {after:.2} ms after",
                calm.step_ms
            )?;
        }
        if !self.second.is_empty() {
            writeln!(out, "  second faults on entry of a phase: {:?}", self.second)?;
        }
        writeln!(
            out,
            "  disk full by {}; memory by {}",
            self.machine.disk, self.machine.memory
        )?;
        self.write_table(out)?;
        match &self.traces {
            None => writeln!(out, "  no end, so no traces to compare")?,
            Some(traces) => {
                let side = |hash: &TraceHash| format!("{} ({} lines)", hash.blake3, hash.lines);
                writeln!(out, "  trace, one rank undisturbed  {}", side(&traces.reference))?;
                writeln!(out, "  trace, storm                 {}", side(&traces.storm))?;
                writeln!(out, "  {}", if traces.equal { "the same" } else { "DIFFERENT" })?;
            }
        }
        for failure in &self.failures {
            writeln!(out, "  FAILED: {failure}")?;
        }
        Ok(())
    }

    fn write_table(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "  {:<24} {:>5} {:>5} {:>6}   detection p50/p99/max ms   recovery p50/p99/max ms",
            "kind", "asked", "done", "borne"
        )?;
        let show = |times: &Option<Times>| match times {
            None => "-".to_owned(),
            Some(times) => format!("{}/{}/{}", times.p50_ms, times.p99_ms, times.max_ms),
        };
        for (kind, of) in &self.kinds {
            writeln!(
                out,
                "  {:<24} {:>5} {:>5} {:>6}   {:>24}   {:>23}",
                kind.name(),
                of.asked,
                of.done,
                of.borne,
                show(&of.detection),
                show(&of.recovery)
            )?;
        }
        let all = ("all", self.asked, self.done, "");
        writeln!(
            out,
            "  {:<24} {:>5} {:>5} {:>6}   {:>24}   {:>23}",
            all.0,
            all.1,
            all.2,
            all.3,
            show(&self.detection),
            show(&self.recovery)
        )
    }
}
