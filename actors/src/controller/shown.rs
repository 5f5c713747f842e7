//! What `status` and `metrics.jsonl` show of the controller, as JSON.

use serde_json::{Map, Value, json};
use tarazed_protocol::checkpoint::SavingProgress;
use tarazed_protocol::coordinator::Coordinator as Machine;
use tarazed_protocol::data::decision::{Decision, DecisionKind};
use tarazed_protocol::data::signals::Signals;
use tarazed_protocol::ledger::Ledger;
use tarazed_protocol::rollback::announced;

/// The answer of a live controller to `status`.
pub fn status(machine: &Machine, ledger: &Ledger, saving: Option<SavingProgress>, signals: Option<&Signals>) -> Value {
    let workers: Vec<Value> = machine
        .workers()
        .into_iter()
        .map(|view| {
            json!({
                "worker": view.member.worker, "rank": view.rank, "pid": view.pid,
                "incarnation": view.member.incarnation,
                "lanes": view.lanes.map(|lanes| [lanes.start, lanes.end]),
                "step": view.step, "state": view.state, "activity": view.activity,
            })
        })
        .collect();
    json!({
        "live": true, "generation": machine.generation(), "ranks_wanted": machine.ranks_wanted(),
        "step": ledger.written(), "refused": machine.refused_count(), "workers": workers,
        "saving": saving.map(self::saving),
        "rollback_notice": announced(ledger.decisions()).and_then(notice), "signals": signals.map(self::signals),
    })
}

fn saving(progress: SavingProgress) -> Value {
    let SavingProgress {
        step,
        stored,
        shards,
        for_ms,
    } = progress;
    json!({"step": step, "stored": stored, "shards": shards, "for_ms": for_ms})
}

fn notice(made: &Decision) -> Option<Value> {
    let DecisionKind::RollbackNotice { to } = made.kind else {
        return None;
    };
    Some(json!({"decision": made.id, "at": made.effective, "to": to, "reason": made.reason}))
}

/// Gradient noise; tokens, passes and losses by domain; losses by language. What is not known is `null`.
pub fn signals(signals: &Signals) -> Value {
    let domains: Map<String, Value> = signals
        .domains
        .iter()
        .map(|domain| {
            let shown = json!({
                "tokens": domain.tokens, "tokens_requested": domain.tokens_requested, "epochs": domain.epochs,
                "train_loss": domain.train_loss, "train_bits_per_byte": domain.train_bits_per_byte,
                "heldout_loss": domain.heldout_loss, "heldout_bits_per_byte": domain.heldout_bits_per_byte,
            });
            (domain.name.clone(), shown)
        })
        .collect();
    let languages: Map<String, Value> = signals
        .languages
        .iter()
        .map(|language| {
            let shown = json!({
                "heldout_loss": language.heldout_loss, "heldout_bits_per_byte": language.heldout_bits_per_byte,
            });
            (language.language.name().to_owned(), shown)
        })
        .collect();
    json!({
        "step": signals.step, "tokens": signals.tokens, "evaluated": signals.evaluated,
        "gradient_noise": signals.gradient_noise.map(|noise| json!({
            "scale_tokens": noise.scale_tokens, "gradient_square": noise.gradient_square,
            "noise_trace": noise.noise_trace,
        })),
        "domains": domains, "languages": languages,
    })
}
