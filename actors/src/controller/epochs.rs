//! What a line says of passes over the data, for people: a domain begins another one, or comes to its limit. Each stands in the
//! line in which it came, and a line is written once, so it is told once in a run at most, however often that is resumed: a controller
//! that dies between the line and its event takes the event along.

use super::Notice;
use serde_json::{Value, json};
use tarazed_protocol::data::controller::is_limit_of_all;
use tarazed_protocol::data::decision::{Decision, DecisionKind};
use tarazed_protocol::data::signals::Signals;
use tarazed_protocol::trace::TraceLine;

/// An event of `events.jsonl`, and what else hears of it.
pub struct Told {
    pub kind: &'static str,
    pub fields: Value,
    /// Decisions are told as such.
    pub notice: Option<Notice>,
}

/// What `line`, in which the loop saw these signals, says of them.
pub fn told(line: &TraceLine, signals: Option<&Signals>) -> Vec<Told> {
    let begun = signals.into_iter().flat_map(|signals| &signals.domains);
    let begun = begun.filter(|domain| domain.epoch_begins).map(|domain| Told {
        kind: "epoch",
        fields: json!({"domain": domain.name, "epoch": domain.epoch}),
        notice: Some(Notice::Epoch {
            domain: domain.name.clone(),
            epoch: domain.epoch,
            step: line.step,
        }),
    });
    begun
        .chain(line.decisions.iter().filter_map(|made| limit(made, signals)))
        .collect()
}

fn limit(made: &Decision, signals: Option<&Signals>) -> Option<Told> {
    let DecisionKind::EpochLimit { domain } = made.kind else {
        return None;
    };
    let known = signals.and_then(|signals| signals.domains.get(usize::from(domain)));
    let fields = json!({
        "domain": known.map(|known| &known.name), "decision": made.id, "at": made.effective, "cause": made.reason,
    });
    Some(Told {
        kind: "epoch_limit",
        fields,
        notice: is_limit_of_all(made).then(|| Notice::Warning(made.reason.clone())),
    })
}
