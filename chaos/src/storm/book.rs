//! The book of a storm: each fault, when the runtime saw it, and when the run went on.
//!
//! Times are the wall clock's, which is also that of the run's files (all is one machine). For a fault at `t`:
//!
//! - **detection**: from `t` to the first incident that fits in `events.jsonl`: `rank_ending` or `rank_lost` of the life that was hit, or,
//!   where no process was hit, one of these, `generation`, `state_lost` or `warning` of anybody. For a controller: to its exit, as
//!   whoever started it sees it. A fault that was borne has none.
//! - **recovery**: from `t` to the first line that is *new* and that the generation which answered the incident has computed
//!   (the next controller's first, where the controller was lost). Lines that a replay only checks do not count. Where there
//!   was no incident, or a warning that no generation followed: to the end of the longest pause between new lines that the fault's time overlaps.
//!
//! Faults that fall into each other's recovery share incidents.

use super::kind::{Kind, Weight};
use super::undisturbed::Line;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeSet;

/// A bearable fault is borne if nothing was seen for this long after its end, or when the next one comes.
const BORNE_MS: u64 = 3_000;
/// A lethal one that nothing was seen of for this long is said to be unseen.
const UNSEEN_MS: u64 = 120_000;

/// One life of a worker.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct Victim {
    /// The slot.
    pub worker: u32,
    /// Which life of it.
    pub incarnation: u32,
}

/// One fault.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// Counts up from 0.
    pub number: u64,
    /// What.
    pub kind: Kind,
    /// `pace`, or the phase at whose entry it was done.
    pub trigger: String,
    /// Life of the controller.
    pub life: u64,
    /// Its world size.
    pub world: u32,
    /// When (milliseconds since 1970).
    pub at_ms: u64,
    /// Newest line then.
    pub step: u64,
    /// What was hit, in words.
    pub target: String,
    /// Processes that were hit.
    pub victims: Vec<Victim>,
    /// When the harm ends by itself or is mended.
    pub ends_ms: u64,
    /// Whether it did anything: false for a harm that nothing ran into.
    pub had_effect: bool,
    /// To the incident.
    pub detection_ms: Option<u64>,
    /// Which.
    pub incident: Option<String>,
    /// To the new line.
    pub recovery_ms: Option<u64>,
    /// Nothing more is waited for.
    pub closed: bool,
    /// The controller that it was done under is gone, and whatever it saw.
    #[serde(skip)]
    taken_over: bool,
    /// Base of the first generation that began after the incident: lines up to it were computed before.
    #[serde(skip)]
    answered: Option<u64>,
    /// Length and end of the longest pause so far.
    #[serde(skip)]
    pause: Option<(u64, u64)>,
}

/// A fault as it was just done.
#[derive(Clone, Debug)]
pub struct Entry {
    /// What.
    pub kind: Kind,
    /// Why now.
    pub trigger: String,
    /// Life of the controller.
    pub life: u64,
    /// Its world size.
    pub world: u32,
    /// What was hit.
    pub target: String,
    /// Processes that were hit.
    pub victims: Vec<Victim>,
    /// How long it lasts.
    pub lasts_ms: u64,
}

/// All faults, and the new lines between them.
#[derive(Debug, Default)]
pub struct Book {
    records: Vec<Record>,
    /// Records before this one are closed.
    open_from: usize,
    newest_step: u64,
    newest_line_ms: u64,
    lines: Vec<Line>,
}

impl Book {
    /// Enters a fault; its number.
    pub fn enter(&mut self, now_ms: u64, entry: Entry) -> u64 {
        for record in self.open() {
            if record.kind.weight() == Weight::Bearable && record.detection_ms.is_none() && now_ms > record.ends_ms {
                record.close_borne();
            }
        }
        let number = self.records.len() as u64;
        self.records.push(Record {
            number,
            kind: entry.kind,
            trigger: entry.trigger,
            life: entry.life,
            world: entry.world,
            at_ms: now_ms,
            step: self.newest_step,
            target: entry.target,
            victims: entry.victims,
            ends_ms: now_ms + entry.lasts_ms,
            had_effect: true,
            detection_ms: None,
            incident: None,
            recovery_ms: None,
            closed: false,
            taken_over: false,
            answered: None,
            pause: None,
        });
        number
    }

    fn open(&mut self) -> impl Iterator<Item = &mut Record> {
        while self.records.get(self.open_from).is_some_and(|record| record.closed) {
            self.open_from += 1;
        }
        self.records[self.open_from..]
            .iter_mut()
            .filter(|record| !record.closed)
    }

    /// The harm of a fault is over.
    pub fn mended(&mut self, number: u64, now_ms: u64, had_effect: bool) {
        let record = usize::try_from(number)
            .ok()
            .and_then(|number| self.records.get_mut(number));
        if let Some(record) = record {
            record.ends_ms = record.ends_ms.min(now_ms).max(record.at_ms);
            record.had_effect = had_effect;
            if !had_effect && record.detection_ms.is_none() {
                record.closed = true;
            }
        }
    }

    /// A line of `events.jsonl`.
    pub fn event(&mut self, event: &Value) {
        let kind = event["kind"].as_str().unwrap_or_default();
        let Some(time) = event["time_unix_ms"].as_u64() else {
            return;
        };
        if !matches!(
            kind,
            "rank_ending" | "rank_lost" | "alarm" | "generation" | "state_lost" | "warning"
        ) {
            return;
        }
        let victim = event["worker"].as_u64().zip(event["incarnation"].as_u64());
        for record in self.open() {
            if time < record.at_ms {
                continue;
            }
            let hit = |found: &Victim| victim == Some((u64::from(found.worker), u64::from(found.incarnation)));
            let fits = match kind {
                // The exit behind an end that was seen to begin is nobody else's news.
                "rank_lost" if event["expected"] == true => record.victims.iter().any(hit),
                "rank_ending" | "rank_lost" => record.victims.is_empty() || record.victims.iter().any(hit),
                _ => record.victims.is_empty(),
            };
            if fits && record.detection_ms.is_none() && !record.kind.is_of_controller() {
                record.detection_ms = Some(time - record.at_ms);
                let cause = event["cause"]
                    .as_str()
                    .map(|cause| format!(": {cause}"))
                    .unwrap_or_default();
                record.incident = Some(format!("{kind}{cause}"));
            }
            let seen = record.taken_over || record.detection_ms.is_some_and(|ms| time >= record.at_ms + ms);
            if kind == "generation" && seen && record.answered.is_none() {
                record.answered = event["base"].as_u64();
            }
        }
    }

    /// The controller has ended.
    pub fn controller_ended(&mut self, now_ms: u64, how: &str) {
        for record in self.open() {
            if record.kind.is_of_controller() || record.kind == Kind::DiskFull {
                record.detection_ms.get_or_insert(now_ms.saturating_sub(record.at_ms));
                record.incident.get_or_insert_with(|| format!("exit: {how}"));
            }
        }
    }

    /// A controller was started. What was under way with the last one ends with this one's first new line.
    pub fn controller_started(&mut self) {
        for record in self.open() {
            record.taken_over = true;
        }
    }

    /// A line of `metrics.jsonl`; whether it is new.
    pub fn line(&mut self, line: &Value) -> bool {
        let (Some(step), Some(time)) = (line["step"].as_u64(), line["time_unix_ms"].as_u64()) else {
            return false;
        };
        if step <= self.newest_step {
            return false;
        }
        let before = std::mem::replace(&mut self.newest_line_ms, time);
        self.newest_step = step;
        let ranks = line["ranks"].as_u64().and_then(|ranks| u32::try_from(ranks).ok());
        self.lines.push(Line {
            time_ms: time,
            ranks: ranks.unwrap_or(0),
        });
        for record in self.open().filter(|record| time >= record.at_ms) {
            if record.answered.is_some_and(|base| step > base) {
                record.recovery_ms = Some(time - record.at_ms);
                record.closed = true;
                continue;
            }
            let pause = time.saturating_sub(before);
            if before <= record.ends_ms && record.pause.is_none_or(|(longest, _)| pause > longest) {
                record.pause = Some((pause, time));
            }
        }
        true
    }

    /// Every new line.
    #[must_use]
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// Closes what nothing more will come of.
    pub fn settle(&mut self, now_ms: u64) {
        let newest = self.newest_line_ms;
        for record in self.open() {
            let limit = match record.kind.weight() {
                Weight::Bearable => BORNE_MS,
                Weight::Lethal => UNSEEN_MS,
            };
            if now_ms > record.ends_ms + limit && record.needs_no_answer() && newest > record.ends_ms {
                record.close_borne();
            }
        }
    }

    /// Whether every fault's outcome is known.
    pub fn is_settled(&mut self) -> bool {
        self.open().next().is_none()
    }

    /// All faults so far.
    #[must_use]
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Faults that did something.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.records.iter().filter(|record| record.had_effect).count() as u64
    }

    /// The newest line's step.
    #[must_use]
    pub const fn newest_step(&self) -> u64 {
        self.newest_step
    }

    /// Workers that were hit.
    #[must_use]
    pub fn workers_hit(&self) -> BTreeSet<u32> {
        let victims = self.records.iter().filter(|record| record.had_effect);
        victims
            .flat_map(|record| &record.victims)
            .map(|victim| victim.worker)
            .collect()
    }
}

impl Record {
    /// Nothing was seen of it; or it was warned of, and no generation followed.
    fn needs_no_answer(&self) -> bool {
        let is_warning = |incident: &String| incident.starts_with("warning");
        self.answered.is_none() && (self.detection_ms.is_none() || self.incident.as_ref().is_some_and(is_warning))
    }

    fn close_borne(&mut self) {
        self.recovery_ms = self.pause.map(|(_, end)| end.saturating_sub(self.at_ms));
        self.closed = true;
    }
}

/// Nearest-rank percentiles of a number of times.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Times {
    /// How many.
    pub count: usize,
    /// Half are at most this.
    pub p50_ms: u64,
    /// Ninety-nine of a hundred are.
    pub p99_ms: u64,
    /// All are.
    pub max_ms: u64,
}

impl Times {
    /// Of these.
    #[must_use]
    pub fn of(mut times: Vec<u64>) -> Option<Self> {
        times.sort_unstable();
        let at = |percent: usize| times[(times.len() * percent).div_ceil(100).max(1) - 1];
        (!times.is_empty()).then(|| Self {
            count: times.len(),
            p50_ms: at(50),
            p99_ms: at(99),
            max_ms: at(100),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn entry(kind: Kind, victims: &[(u32, u32)], lasts_ms: u64) -> Entry {
        let victim = |&(worker, incarnation): &(u32, u32)| Victim { worker, incarnation };
        Entry {
            kind,
            trigger: "pace".to_owned(),
            life: 0,
            world: 2,
            target: String::new(),
            victims: victims.iter().map(victim).collect(),
            lasts_ms,
        }
    }

    fn line(book: &mut Book, step: u64, time: u64) -> bool {
        book.line(&json!({"step": step, "time_unix_ms": time}))
    }

    fn event(book: &mut Book, kind: &str, time: u64, worker: u32) {
        book.event(&json!({"kind": kind, "time_unix_ms": time, "worker": worker, "incarnation": 0, "cause": "x"}));
    }

    #[test]
    fn a_kill_is_recovered_with_the_first_new_line_of_the_next_generation() {
        let mut book = Book::default();
        line(&mut book, 1, 900);
        book.enter(1_000, entry(Kind::KillRank, &[(1, 0)], 0));
        assert!(line(&mut book, 2, 1_001), "in flight");
        event(&mut book, "rank_lost", 1_002, 0);
        assert_eq!(book.records()[0].detection_ms, None, "another's");
        event(&mut book, "rank_lost", 1_004, 1);
        line(&mut book, 3, 1_005);
        book.event(&json!({"kind": "generation", "time_unix_ms": 1_020, "base": 4}));
        assert!(!line(&mut book, 3, 1_030), "a replay");
        line(&mut book, 4, 1_030);
        assert!(!book.is_settled(), "computed before");
        line(&mut book, 5, 1_040);
        let record = &book.records()[0];
        assert_eq!((record.detection_ms, record.recovery_ms), (Some(4), Some(40)));
        assert!(book.is_settled());
    }

    #[test]
    fn a_fault_that_is_borne_costs_its_longest_pause() {
        let mut book = Book::default();
        line(&mut book, 1, 990);
        book.enter(1_000, entry(Kind::StopController, &[], 500));
        for (step, time) in [(2, 1_010), (3, 1_510), (4, 1_520)] {
            line(&mut book, step, time);
        }
        book.settle(1_600);
        assert!(!book.is_settled());
        line(&mut book, 5, 4_600);
        book.settle(4_700);
        assert_eq!(book.records()[0].recovery_ms, Some(510));
        assert_eq!(book.records()[0].detection_ms, None);
    }

    /// What somebody is warned of half a minute before another fault is not recovered by what answers that one.
    #[test]
    fn a_warning_that_no_generation_follows_costs_its_longest_pause() {
        let mut book = Book::default();
        line(&mut book, 1, 990);
        book.enter(1_000, entry(Kind::StoreUnavailable, &[], 500));
        event(&mut book, "warning", 1_400, 0);
        for (step, time) in [(2, 1_010), (3, 1_600), (4, 5_000)] {
            line(&mut book, step, time);
        }
        book.settle(5_100);
        book.event(&json!({"kind": "generation", "time_unix_ms": 40_000, "base": 4}));
        line(&mut book, 5, 40_100);
        let record = &book.records()[0];
        assert_eq!((record.detection_ms, record.recovery_ms), (Some(400), Some(600)));
    }

    #[test]
    fn a_controller_is_recovered_by_the_next_ones_new_line() {
        let mut book = Book::default();
        line(&mut book, 7, 500);
        book.enter(1_000, entry(Kind::KillController, &[], 0));
        book.controller_ended(1_003, "signal 9");
        book.controller_started();
        book.event(&json!({"kind": "generation", "time_unix_ms": 1_200, "base": 5}));
        assert!(!line(&mut book, 6, 1_300));
        line(&mut book, 8, 1_400);
        let record = &book.records()[0];
        assert_eq!((record.detection_ms, record.recovery_ms), (Some(3), Some(400)));
    }

    #[test]
    fn a_harm_that_nothing_ran_into_is_not_done() {
        let mut book = Book::default();
        let number = book.enter(1_000, entry(Kind::StoreUnavailable, &[], 100));
        book.enter(1_010, entry(Kind::KillAllRanks, &[(0, 0), (3, 1)], 0));
        book.mended(number, 1_100, false);
        assert_eq!((book.done(), book.records().len()), (1, 2));
        assert_eq!(book.workers_hit().into_iter().collect::<Vec<_>>(), [0, 3]);
    }

    #[test]
    fn percentiles_are_times_that_were_measured() {
        assert_eq!(Times::of(Vec::new()), None);
        let times = Times::of((1..=200).rev().collect()).expect("some");
        assert_eq!(
            (times.count, times.p50_ms, times.p99_ms, times.max_ms),
            (200, 100, 198, 200)
        );
        assert_eq!(Times::of(vec![5]).expect("one").p99_ms, 5);
    }
}
