//! What a run's files have said so far: its course, its decisions, its incidents. Line by line; no file is opened here.
//!
//! Lines that are damaged, or of another version, are passed over, as `tarazed watch` does: the files belong to the run.
//! Of decisions and incidents the newest are kept, and how many came before.

use super::history::{History, Line};
use crate::screen::{by_language, decided, learn};
use crate::watch::Incident;
use crate::watch::look::{ROUTINE, decides_an_end, incidents};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use tarazed_protocol::data::decision::{Decision, DecisionAuthor};
use tarazed_protocol::trace::{DomainLoss, DomainMap};

/// Decisions that are kept.
const DECISIONS_MAX: usize = 128;
/// Lines of `events.jsonl` that are kept, without what every healthy run has.
const EVENTS_MAX: usize = 256;

/// All of it.
#[derive(Debug, Default)]
pub struct Record {
    history: History,
    decisions: Newest,
    /// Of the decisions, all that say where the run ends.
    ends: Vec<Decision>,
    events: Newest,
    /// Of the domains, by name.
    languages: BTreeMap<String, &'static str>,
}

/// The newest of many, the newest last.
#[derive(Debug, Default)]
struct Newest {
    kept: VecDeque<Value>,
    /// How many came before those.
    older: u64,
}

impl Newest {
    fn put(&mut self, value: Value, most: usize) {
        self.kept.push_back(value);
        if self.kept.len() > most {
            self.kept.pop_front();
            self.older += 1;
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TraceText {
    step: u64,
    tokens: Option<u64>,
    loss: Option<f64>,
    grad_norm: Option<f64>,
    lr: Option<f64>,
    mixture: DomainMap<f64>,
    heldout: Option<DomainMap<DomainLoss>>,
    decisions: Vec<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct MetricsText {
    step: u64,
    tokens_per_s: Option<f64>,
}

impl Record {
    /// Of a run that begins with domains of these languages.
    #[must_use]
    pub fn new(languages: BTreeMap<String, &'static str>) -> Self {
        Self {
            languages,
            ..Self::default()
        }
    }

    /// A line of `trace.jsonl`.
    pub fn trace_line(&mut self, line: &[u8]) {
        let Ok(text) = serde_json::from_slice::<TraceText>(line) else {
            return;
        };
        if text.step == 0 {
            return;
        }
        for raw in &text.decisions {
            if let Ok(decision) = Decision::deserialize(raw) {
                learn(&mut self.languages, std::slice::from_ref(&decision));
                self.decisions.put(shown(&decision, raw), DECISIONS_MAX);
                self.ends.extend(Some(decision).filter(decides_an_end));
            }
        }
        let held_out = text.heldout.as_ref();
        let held_out = held_out.map_or_else(Vec::new, |losses| by_language(losses, &self.languages));
        self.history.line(&Line {
            step: text.step,
            tokens: text.tokens,
            loss: text.loss,
            grad_norm: text.grad_norm,
            lr: text.lr,
            mixture: text.mixture.iter().map(|(name, share)| (name, *share)).collect(),
            held_out: held_out.iter().map(|(name, loss)| (name.as_str(), *loss)).collect(),
        });
    }

    /// A line of `metrics.jsonl`.
    pub fn metrics_line(&mut self, line: &[u8]) {
        match serde_json::from_slice::<MetricsText>(line) {
            Ok(text) if text.step > 0 => self.history.speed(text.step, text.tokens_per_s),
            _ => {}
        }
    }

    /// A line of `events.jsonl`.
    pub fn event_line(&mut self, line: &[u8]) {
        let Ok(event) = serde_json::from_slice::<Value>(line) else {
            return;
        };
        let kind = event.get("kind").and_then(Value::as_str);
        if kind.is_some_and(|kind| !ROUTINE.contains(&kind)) {
            self.events.put(event, EVENTS_MAX);
        }
    }

    /// Its course.
    #[must_use]
    pub const fn history(&self) -> &History {
        &self.history
    }

    /// Stops, and vetoes of them, since this was asked last.
    pub fn ends(&mut self) -> Vec<Decision> {
        std::mem::take(&mut self.ends)
    }

    /// What happened, the newest first, as `tarazed watch` tells it; and how many lines of the file are older.
    #[must_use]
    pub fn incidents(&mut self) -> (Vec<Incident>, u64) {
        let found = incidents(self.events.kept.make_contiguous(), EVENTS_MAX);
        (found, self.events.older)
    }

    /// What was decided, the newest first; and how many decisions are older.
    #[must_use]
    pub fn decisions(&self) -> (Vec<&Value>, u64) {
        (self.decisions.kept.iter().rev().collect(), self.decisions.older)
    }
}

/// A decision, for people; `raw` is how it stands in the trace.
fn shown(decision: &Decision, raw: &Value) -> Value {
    let kind = match raw.get("kind") {
        Some(Value::String(name)) => name.as_str(),
        Some(Value::Object(fields)) => fields.keys().next().map_or("", String::as_str),
        _ => "",
    };
    let (DecisionAuthor::Controller(by) | DecisionAuthor::Person(by)) = &decision.by;
    json!({
        "id": decision.id, "line": decision.line, "from_step": decision.effective.0.saturating_add(1), "kind": kind,
        "what": decided(decision), "by": by, "is_person": decision.by.is_person(), "reason": decision.reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(step: u64, more: Value) -> Vec<u8> {
        let mut line = json!({
            "step": step, "tokens": step * 10, "loss": 5.0, "loss_bits": "0x4014000000000000", "grad_norm": 1.5,
            "lr": 1e-3, "state": "ab", "mixture": {"book": 0.5, "web": 0.5}, "domains": {}, "decisions": [],
        });
        let (into, from) = (line.as_object_mut().expect("fields"), more.as_object().expect("fields"));
        into.extend(from.clone());
        line.to_string().into_bytes()
    }

    fn record() -> Record {
        Record::new(BTreeMap::from([("book".to_owned(), "en"), ("web".to_owned(), "en")]))
    }

    #[test]
    fn the_course_is_that_of_the_lines() {
        let mut record = record();
        let held_out = json!({"book": {"loss": 4.0, "tokens": 10}, "web": {"loss": 6.0, "tokens": 30}});
        record.trace_line(&trace(1, json!({})));
        record.trace_line(&trace(2, json!({"heldout": held_out, "loss": null})));
        record.metrics_line(br#"{"step":1,"tokens_per_s":100.5,"signals":{"step":1}}"#);
        record.metrics_line(br#"{"step":2,"tokens_per_s":null}"#);
        for damaged in ["", "{\"step\":", "7", "null", "{\"step\":\"3\"}", "{}", "\u{0}"] {
            record.trace_line(damaged.as_bytes());
            record.metrics_line(damaged.as_bytes());
            record.event_line(damaged.as_bytes());
        }
        let told = record.history().since(0);
        assert_eq!((&told["step"], &told["through"]), (&json!([1, 2]), &2.into()));
        assert_eq!(told["loss"]["mean"], json!([5.0, null]));
        assert_eq!(told["tokens_per_s"]["mean"], json!([100.5, null]));
        assert_eq!(told["heldout"]["names"], json!(["book", "web", "all en"]));
        assert_eq!(told["heldout"]["points"], json!([[2, [4.0, 6.0, 5.5]]]));
    }

    #[test]
    fn decisions_say_who_what_and_from_when() {
        let mut record = record();
        let made = json!([
            {"id": 1, "line": 5, "effective": 9, "kind": {"mixture": {"weights": [3.0, 1.0]}},
             "by": {"controller": "ado"}, "reason": "slopes"},
            {"id": 2, "line": 5, "effective": 7, "kind": "pin", "by": {"person": "<b>ada</b>"}, "reason": "drift"},
            {"id": 3, "line": 5, "effective": 7, "kind": "something_new", "by": {"person": "ada"}, "reason": "?"},
        ]);
        record.trace_line(&trace(5, json!({"decisions": made})));
        let (newest, older) = record.decisions();
        assert_eq!((newest.len(), older), (2, 0), "one that is not known is passed over");
        assert_eq!(
            newest[0],
            &json!({
                "id": 2, "line": 5, "from_step": 8, "kind": "pin", "what": "mixture pinned", "by": "<b>ada</b>",
                "is_person": true, "reason": "drift",
            })
        );
        assert_eq!(
            (&newest[1]["kind"], &newest[1]["what"], &newest[1]["by"]),
            (&"mixture".into(), &"mixture 75% 25%".into(), &"ado".into())
        );
    }

    #[test]
    fn the_newest_are_kept_and_the_others_counted() {
        let mut record = record();
        for number in 0..EVENTS_MAX as u64 + 5 {
            for kind in ["checkpoint", "warning", "generation"] {
                let event = json!({"kind": kind, "time_unix_ms": number, "step": number, "cause": "c"});
                record.event_line(event.to_string().as_bytes());
            }
        }
        let (found, older) = record.incidents();
        assert_eq!((found.len(), older), (EVENTS_MAX, 5));
        assert_eq!(
            (found[0].step, found[0].kind.as_str()),
            (Some(EVENTS_MAX as u64 + 4), "warning")
        );
    }
}
