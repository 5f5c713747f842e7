//! From a [`View`] to the JSON that the page shows (docs/FORMATS.md). Pure. Words are those of `tarazed watch`.

use super::record::Record;
use crate::watch::draw::{Tone, stage, tone_of};
use crate::watch::{Incident, Stage, View, Worker};
use serde_json::{Value, json};

/// All that is shown of the present; what is not known is `null`.
#[must_use]
pub fn view(view: &View, record: &mut Record) -> Value {
    let figures = &view.figures;
    let (incidents, older_events) = record.incidents();
    let (decisions, older_decisions) = record.decisions();
    let domains = view.domains.iter().map(|domain| {
        json!({
            "name": domain.name, "share": domain.weight, "train_loss": domain.train_loss,
            "heldout_loss": domain.heldout_loss, "tokens": domain.tokens,
            "tokens_requested": domain.tokens_requested, "epochs": domain.epochs,
        })
    });
    let languages = view.languages.iter().map(|language| {
        json!({
            "name": language.name, "heldout_loss": language.loss, "heldout_bits_per_byte": language.bits_per_byte,
        })
    });
    let saving = view.saving.map(
        |saving| json!({"step": saving.step, "stored": saving.stored, "shards": saving.shards, "for_ms": saving.for_ms}),
    );
    let notice = view
        .notice
        .as_ref()
        .map(|notice| json!({"decision": notice.decision, "at": notice.at, "to": notice.to, "reason": notice.reason}));
    json!({
        "now_unix_ms": view.now_unix_ms, "dir": view.dir, "name": view.name, "stage": told(view),
        "remark": view.remark, "generation": view.generation, "step": view.step, "steps": view.steps,
        "figures": {
            "at_unix_ms": figures.at_unix_ms, "tokens": figures.tokens, "loss": figures.loss,
            "grad_norm": figures.grad_norm, "lr": figures.lr, "tokens_per_s": figures.tokens_per_s,
            "mfu_percent": figures.mfu_percent, "goodput": figures.goodput, "eta_s": figures.eta_s,
        },
        "checkpoint": {"step": figures.durable_step, "lag_s": figures.durability_lag_s, "saving": saving},
        "rollback_notice": notice,
        "workers": view.workers.iter().map(worker).collect::<Vec<Value>>(),
        "domains": domains.collect::<Vec<Value>>(),
        "languages": languages.collect::<Vec<Value>>(),
        "evaluated": view.evaluated,
        "incidents": {"newest": incidents.iter().map(incident).collect::<Vec<Value>>(), "older": older_events},
        "decisions": {"newest": decisions, "older": older_decisions},
    })
}

fn told(view: &View) -> Value {
    let (tone, text) = stage(view);
    json!({"tone": tone_name(tone), "text": text, "has_ended": view.stage == Stage::Ended})
}

const fn tone_name(tone: Tone) -> &'static str {
    match tone {
        Tone::Plain | Tone::Title => "plain",
        Tone::Good => "good",
        Tone::Warning => "warning",
        Tone::Alarm => "alarm",
    }
}

fn worker(worker: &Worker) -> Value {
    json!({
        "worker": worker.worker, "rank": worker.rank, "node": worker.node, "pid": Some(worker.pid).filter(|pid| *pid > 0),
        "incarnation": worker.incarnation, "lanes": worker.lanes, "step": worker.step, "state": worker.state,
        "activity": worker.activity, "lane_us": worker.lane_us,
    })
}

fn incident(incident: &Incident) -> Value {
    json!({
        "time_unix_ms": incident.unix_ms, "kind": incident.kind, "tone": tone_name(tone_of(&incident.kind)),
        "what": incident.what, "rank": incident.rank, "step": incident.step, "detection_ms": incident.detection_ms,
        "recovery_ms": incident.recovery_ms, "steps_lost": incident.steps_lost,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::{Domain, Figures, Language, Notice, Saving};

    #[test]
    fn a_run_that_nothing_is_known_of_is_nulls_and_empty_lists() {
        let told = view(&View::default(), &mut Record::default());
        assert_eq!(
            told,
            json!({
                "now_unix_ms": 0, "dir": "", "name": "", "remark": null, "generation": null, "step": 0, "steps": null,
                "stage": {
                    "tone": "warning", "has_ended": true,
                    "text": "ended at step 0: `tarazed train` with the same config and folder goes on",
                },
                "figures": {
                    "at_unix_ms": null, "tokens": null, "loss": null, "grad_norm": null, "lr": null,
                    "tokens_per_s": null, "mfu_percent": null, "goodput": null, "eta_s": null,
                },
                "checkpoint": {"step": null, "lag_s": null, "saving": null}, "rollback_notice": null,
                "workers": [], "domains": [], "languages": [], "evaluated": null,
                "incidents": {"newest": [], "older": 0}, "decisions": {"newest": [], "older": 0},
            })
        );
    }

    #[test]
    fn what_is_known_is_told_with_its_words() {
        let known = View {
            now_unix_ms: 100_000,
            dir: "runs/tiny".to_owned(),
            name: "tiny".to_owned(),
            stage: Stage::Live,
            generation: Some(3),
            step: 120,
            steps: Some(280),
            figures: Figures {
                at_unix_ms: Some(40_000),
                tokens: Some(983_040),
                loss: Some(f64::NAN),
                grad_norm: Some(1.25),
                durable_step: Some(100),
                ..Figures::default()
            },
            saving: Some(Saving {
                step: 120,
                stored: 2,
                shards: 4,
                for_ms: 1_500,
            }),
            notice: Some(Notice {
                decision: 3,
                at: 150,
                to: 90,
                reason: "loss".to_owned(),
            }),
            workers: vec![Worker {
                worker: 1,
                rank: Some(0),
                node: Some("a".to_owned()),
                lanes: Some([0, 4]),
                state: "starting".to_owned(),
                ..Worker::default()
            }],
            domains: vec![Domain {
                name: "书籍".to_owned(),
                weight: 1.0,
                train_loss: Some(5.5),
                heldout_loss: None,
                tokens: Some(983_040),
                tokens_requested: Some(983_040.5),
                epochs: Some(1.25),
            }],
            languages: vec![Language {
                name: "zh".to_owned(),
                loss: Some(6.0),
                bits_per_byte: Some(1.5),
            }],
            ..View::default()
        };
        let mut record = Record::default();
        record.event_line(
            br#"{"kind":"recovered","time_unix_ms":9,"step":7,"worker":1,"rank":0,"cause":"signal 9","recovery_ms":812,
                "detection_ms":5,"steps_lost":2}"#,
        );
        let told = view(&known, &mut record);
        assert_eq!(
            told["stage"],
            json!({"tone": "good", "text": "live; last step 1m00s ago", "has_ended": false})
        );
        assert_eq!(
            (&told["figures"]["tokens"], &told["figures"]["loss"]),
            (&983_040.into(), &Value::Null)
        );
        assert_eq!(told["checkpoint"]["saving"]["shards"], 4);
        assert_eq!(told["rollback_notice"]["decision"], 3);
        assert_eq!(
            (
                &told["workers"][0]["pid"],
                &told["workers"][0]["node"],
                &told["workers"][0]["lanes"]
            ),
            (&Value::Null, &"a".into(), &json!([0, 4])),
            "no process yet"
        );
        assert_eq!(
            told["domains"][0],
            json!({
                "name": "书籍", "share": 1.0, "train_loss": 5.5, "heldout_loss": null, "tokens": 983_040,
                "tokens_requested": 983_040.5, "epochs": 1.25,
            })
        );
        assert_eq!(told["languages"][0]["heldout_bits_per_byte"], 1.5);
        assert_eq!(
            told["incidents"]["newest"][0],
            json!({
                "time_unix_ms": 9, "kind": "recovered", "tone": "good", "what": "worker 1: signal 9", "rank": 0,
                "step": 7, "detection_ms": 5, "recovery_ms": 812, "steps_lost": 2,
            })
        );
    }
}
