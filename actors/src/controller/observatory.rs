//! `Observatory`: measurements and incidents for people: `metrics.jsonl`, `events.jsonl`, notices. It reads the wall clock;
//! nothing that it makes reaches a number of the run.

use super::appender::JsonLines;
use super::durability::{Durability, Newest};
use super::epochs::{self, Told};
use super::{Notice, Notify, shown, unix_ms};
use crate::rank::DevicePeak;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tarazed_domain::config::{BatchSchedule, ModelConfig};
use tarazed_domain::{Generation, Rank, StepIndex, StepsCompleted};
use tarazed_model::flops;
use tarazed_protocol::checkpoint::SavingProgress;
use tarazed_protocol::coordinator::Incident;
use tarazed_protocol::data::decision::{Decision, DecisionKind, expected_end};
use tarazed_protocol::data::signals::Signals;
use tarazed_protocol::message::{DisputedItem, Member};
use tarazed_protocol::rollback::Rollback;
use tarazed_protocol::trace::TraceLine;
use tarazed_train::progress::{PHASES, Phase};
use tokio::time::Instant;

/// Lines over which speed is averaged.
const SPEED_WINDOW_LINES: usize = 16;
/// Lines of `metrics.jsonl` between two that hold all signals; those of an evaluation do besides.
const SIGNALS_INTERVAL_LINES: u64 = 100;
/// Between two notices of how far a checkpoint is.
const SAVING_INTERVAL: Duration = Duration::from_secs(1);
/// Between two notices of how far durability lags.
const DURABILITY_INTERVAL: Duration = Duration::from_secs(1);

pub enum ObservatoryMessage {
    /// A process was started.
    Started(Member, u32),
    /// A process is ready.
    Ready(Member),
    /// The membership machine's remark.
    Incident(Incident),
    /// A line was written.
    Line {
        line: Box<TraceLine>,
        /// What the loop saw in it.
        signals: Option<Arc<Signals>>,
        ranks_alive: usize,
    },
    /// A line was checked on replay.
    Replayed(StepsCompleted),
    /// Time the ranks' first has spent in each phase so far.
    Spent { generation: Generation, spent_us: Vec<u64> },
    /// A rank begins with its share of a checkpoint.
    SavingBegan(StepsCompleted),
    /// A checkpoint is under way.
    Saving(SavingProgress),
    /// A checkpoint exists.
    Checkpoint(StepsCompleted),
    /// A checkpoint could not be made.
    NoCheckpoint { step: StepsCompleted, cause: String },
    /// What the store has, as it was looked for; none where there is nothing to go on from. The trace is written through
    /// `written`.
    Newest {
        newest: Option<Newest>,
        written: StepsCompleted,
    },
    /// For `status`: answered with what is measured here beside what is in there.
    Show(Value, RpcReplyPort<Value>),
    /// Time passed.
    Tick,
    /// Something is wrong and the run goes on.
    Warning(String),
    /// The end was asked for.
    Stopping,
}
impl ractor::Message for ObservatoryMessage {}

pub struct Observatory;

pub struct ObservatoryArguments {
    pub metrics: JsonLines,
    pub events: JsonLines,
    pub notify: Notify,
    pub batch: BatchSchedule,
    pub context_tokens: u64,
    pub model: ModelConfig,
    /// Of the devices that ranks compute on, where it is known.
    pub peak: Option<DevicePeak>,
    pub ending: Ending,
}

/// When the run will be over, as far as is known.
pub struct Ending {
    /// By the config or the command line.
    pub last_step: StepsCompleted,
    /// The step of `policy.stop.tokens`.
    pub stop_at: Option<StepIndex>,
    /// Stops and vetoes so far.
    pub decisions: Vec<Decision>,
}

impl Ending {
    pub fn hear(&mut self, decisions: &[Decision]) {
        let ends = |kind: &DecisionKind| matches!(kind, DecisionKind::Stop | DecisionKind::Veto { .. });
        let heard = decisions.iter().filter(|decision| ends(&decision.kind));
        self.decisions.extend(heard.cloned());
    }

    fn step(&self) -> StepsCompleted {
        expected_end(&self.decisions, self.stop_at, self.last_step)
    }
}

pub struct ObservatoryState {
    arguments: ObservatoryArguments,
    began: Instant,
    starts: BTreeMap<Member, Instant>,
    lines: VecDeque<(Instant, StepsCompleted)>,
    loss: Option<Loss>,
    written: StepsCompleted,
    /// Checkpoints under way, and when the first rank began.
    saving: BTreeMap<StepsCompleted, Instant>,
    /// When it was last told how far one is.
    saving_told: Option<Instant>,
    durability: Durability,
    /// When it was last told how far that lags.
    durability_told: Option<Instant>,
    spent_us: [u64; PHASES],
    spent_before: (Generation, [u64; PHASES]),
    lost_ms: u64,
}

struct Loss {
    at: Instant,
    /// Open from the loss to the first line after it.
    span: tracing::Span,
    /// Whose; none where a generation got nowhere and nobody was lost.
    worker: Option<u32>,
    rank: Option<Rank>,
    cause: String,
    /// Since the last sign of life, so at most.
    detection_ms: u64,
    began: bool,
    base: StepsCompleted,
    written: StepsCompleted,
}

impl Actor for Observatory {
    type Msg = ObservatoryMessage;
    type State = ObservatoryState;
    type Arguments = ObservatoryArguments;

    async fn pre_start(
        &self,
        _: ActorRef<ObservatoryMessage>,
        arguments: ObservatoryArguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(ObservatoryState {
            arguments,
            began: Instant::now(),
            starts: BTreeMap::new(),
            lines: VecDeque::new(),
            loss: None,
            written: StepsCompleted(0),
            saving: BTreeMap::new(),
            saving_told: None,
            durability: Durability::default(),
            durability_told: None,
            spent_us: [0; PHASES],
            spent_before: (Generation(0), [0; PHASES]),
            lost_ms: 0,
        })
    }

    async fn handle(
        &self,
        _: ActorRef<ObservatoryMessage>,
        message: ObservatoryMessage,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ObservatoryMessage::Started(member, pid) => {
                state.starts.insert(member, Instant::now());
                state.notify(Notice::RankStarted { member, pid });
            }
            ObservatoryMessage::Ready(member) => {
                let started = state.starts.remove(&member);
                let after_ms = started.map_or(0, |at| at.elapsed().as_millis() as u64);
                state.event(
                    "rank_ready",
                    &json!({"worker": member.worker, "incarnation": member.incarnation, "ready_ms": after_ms}),
                );
                state.notify(Notice::RankReady { member, after_ms });
            }
            ObservatoryMessage::Incident(incident) => state.incident(incident),
            ObservatoryMessage::Line {
                line,
                signals,
                ranks_alive,
            } => state.line(line, signals, ranks_alive),
            ObservatoryMessage::Replayed(step) => state.recovered(step),
            ObservatoryMessage::Spent { generation, spent_us } => state.spent(generation, &spent_us),
            ObservatoryMessage::SavingBegan(step) => state.saving_began(step),
            ObservatoryMessage::Saving(progress) => state.saving_goes_on(progress),
            ObservatoryMessage::Checkpoint(step) => state.checkpoint(step),
            ObservatoryMessage::NoCheckpoint { step, cause } => state.no_checkpoint(step, &cause),
            ObservatoryMessage::Newest { newest, written } => state.newest(newest, written),
            ObservatoryMessage::Show(shown, reply) => {
                // An error means that whoever asked is gone.
                let _ = reply.send(state.shown(shown));
            }
            ObservatoryMessage::Tick => state.tick(),
            ObservatoryMessage::Warning(text) => {
                state.event("warning", &json!({"cause": text}));
                state.notify(Notice::Warning(text));
            }
            ObservatoryMessage::Stopping => {
                state.event("stop_requested", &json!({}));
                state.notify(Notice::Stopping);
            }
        }
        Ok(())
    }
}

/// What is said of a lost rank, when its end begins and when it is gone.
fn loss(member: Member, rank: Option<Rank>, cause: &str, silent_ms: u64) -> Value {
    json!({
        "worker": member.worker, "incarnation": member.incarnation, "rank": rank, "cause": cause,
        "detection_ms": silent_ms
    })
}

impl ObservatoryState {
    fn notify(&self, notice: Notice) {
        (self.arguments.notify)(notice);
    }

    fn event(&self, kind: &str, fields: &Value) {
        let mut value = json!({"kind": kind, "time_unix_ms": unix_ms(), "step": self.written});
        if let (Some(into), Some(from)) = (value.as_object_mut(), fields.as_object()) {
            into.extend(from.clone());
        }
        self.arguments.events.append(&value);
    }

    fn incident(&mut self, incident: Incident) {
        match incident {
            Incident::RankEnding {
                member,
                rank,
                cause,
                silent_ms,
            } => {
                self.event("rank_ending", &loss(member, rank, &cause, silent_ms));
                if rank.is_some() {
                    self.recovery_begins(Some((member, rank)), &cause, silent_ms);
                }
                self.notify(Notice::RankLost { member, cause });
            }
            Incident::RankLost {
                member,
                rank,
                cause,
                silent_ms,
                expected,
            } => {
                let mut fields = loss(member, rank, &cause, silent_ms);
                fields["expected"] = expected.into();
                self.event("rank_lost", &fields);
                if rank.is_some() && !expected {
                    self.recovery_begins(Some((member, rank)), &cause, silent_ms);
                }
                self.notify(match expected {
                    true => Notice::RankEnded { member, cause },
                    false => Notice::RankLost { member, cause },
                });
            }
            Incident::Alarm { cause, silent_ms } => {
                self.event("alarm", &json!({"cause": cause, "detection_ms": silent_ms}));
                self.recovery_begins(None, &cause, silent_ms);
            }
            Incident::GenerationBegan {
                generation,
                members,
                base,
                restored,
                copies,
            } => {
                let fields = json!({
                    "generation": generation, "ranks": members.len(), "base": base, "restored": restored,
                    "shard_copies": copies
                });
                self.event("generation", &fields);
                if let Some(loss) = &mut self.loss {
                    loss.began = true;
                    loss.base = base;
                }
                // Whoever was at work on another state may be gone, and a step that is done again is saved anew.
                self.saving.retain(|step, _| !restored && *step <= base);
                self.notify(Notice::Generation {
                    generation,
                    ranks: members.len(),
                    base,
                    restored,
                });
            }
            Incident::Adopted { members } => {
                let workers: Vec<u32> = members.iter().map(|member| member.worker.0).collect();
                self.event("adopted", &json!({"workers": workers}));
                self.notify(Notice::Adopted { ranks: members.len() });
            }
            Incident::Straggler {
                member,
                lane_us,
                usual_us,
            } => {
                let fields = json!({"worker": member.worker, "lane_us": lane_us, "usual_us": usual_us});
                self.event("straggler", &fields);
                self.notify(Notice::Warning(format!(
                    "{member} takes {lane_us} us for a lane, the others {usual_us}: it gets fewer lanes"
                )));
            }
            Incident::Disputed { step, item, members } => {
                let workers: Vec<u32> = members.iter().map(|member| member.worker.0).collect();
                let fields = json!({"after_step": step, "item": item.to_string(), "workers": workers});
                self.event("disputed", &fields);
                self.notify(Notice::Warning(match item {
                    DisputedItem::Finite => {
                        format!("after step {step} the loss or the gradient norm is no number; doing it again")
                    }
                    _ => format!(
                        "{item} differs between ranks after step {step}: silent data corruption; doing it again"
                    ),
                }));
            }
            Incident::Convicted { step, item, members } => {
                let workers: Vec<u32> = members.iter().map(|member| member.worker.0).collect();
                let fields = json!({"after_step": step, "item": item.to_string(), "workers": workers});
                self.event("convicted", &fields);
                let names: Vec<String> = members.iter().map(ToString::to_string).collect();
                let who = if names.is_empty() {
                    "nobody can be named".to_owned()
                } else {
                    names.join(", ")
                };
                self.notify(Notice::Warning(format!("{item} was wrong after step {step} on: {who}")));
            }
            Incident::CheckpointRefuted { step, diagnosis } => {
                self.event("checkpoint_refuted", &json!({"of_step": step, "cause": diagnosis}));
                self.notify(Notice::Warning(format!(
                    "the checkpoint of step {step} is passed over for an older one: {diagnosis}"
                )));
            }
            Incident::RolledBack { rollback } => {
                let Rollback { at, to } = rollback;
                self.event("rolled_back", &json!({"at": at, "to": to}));
                self.notify(Notice::Warning(format!(
                    "rolled back: step {} goes on from the state after step {to}; what was trained on since is skipped",
                    at.completed()
                )));
            }
            Incident::StateLost { shards_missing } => {
                self.event("state_lost", &json!({"shards_missing": shards_missing}));
                self.notify(Notice::Warning(format!(
                    "{shards_missing} optimizer shards have no copy left: restoring the newest checkpoint"
                )));
            }
        }
    }

    /// Unless one is under way: what fails meanwhile is part of it.
    fn recovery_begins(&mut self, lost: Option<(Member, Option<Rank>)>, cause: &str, detection_ms: u64) {
        let worker = lost.map(|(member, _)| member.worker.0);
        self.loss.get_or_insert_with(|| Loss {
            span: tracing::info_span!(parent: None, "recovery", worker, steps_lost = tracing::field::Empty),
            at: Instant::now(),
            worker,
            rank: lost.and_then(|(_, rank)| rank),
            cause: cause.to_owned(),
            detection_ms,
            began: false,
            base: self.written,
            written: self.written,
        });
    }

    /// The first step committed (or replayed) by a new generation ends a recovery.
    fn recovered(&mut self, step: StepsCompleted) {
        let Some(loss) = self.loss.take_if(|loss| loss.began && step > loss.base) else {
            return;
        };
        let recovery_ms = loss.at.elapsed().as_millis() as u64;
        self.lost_ms += recovery_ms;
        let steps_lost = loss.written.0.saturating_sub(loss.base.0);
        loss.span.record("steps_lost", steps_lost);
        let fields = json!({
            "cause": loss.cause, "worker": loss.worker, "rank": loss.rank, "recovery_ms": recovery_ms, "steps_lost": steps_lost,
            "detection_ms": loss.detection_ms
        });
        self.event("recovered", &fields);
        self.notify(Notice::Recovered {
            recovery_ms,
            steps_lost,
        });
    }

    fn line(&mut self, line: Box<TraceLine>, signals: Option<Arc<Signals>>, ranks_alive: usize) {
        let now = Instant::now();
        self.written = line.step;
        self.recovered(line.step);
        self.durability.on_line(self.since_began_us(now), line.step);
        self.lines.push_back((now, line.step));
        if self.lines.len() > SPEED_WINDOW_LINES + 1 {
            self.lines.pop_front();
        }
        let step_ms = self
            .lines
            .iter()
            .rev()
            .nth(1)
            .map_or(f64::NAN, |(at, _)| (now - *at).as_secs_f64() * 1e3);
        let since = self.lines.front().filter(|(at, _)| now - *at > Duration::ZERO);
        let per_s = |count: u64, at: &Instant| count as f64 / (now - *at).as_secs_f64();
        let rate = since.map(|(at, first)| per_s(line.step.0.saturating_sub(first.0), at));
        // Batches of a ramp differ.
        let batch = &self.arguments.batch;
        let samples = |first: StepsCompleted| batch.samples(line.step).saturating_sub(batch.samples(first));
        let tokens_per_s = since
            .map(|(at, first)| per_s(samples(*first).saturating_mul(self.arguments.context_tokens), at))
            .filter(|rate| *rate > 0.0);
        let mfu = self.arguments.peak.zip(tokens_per_s).map(|(peak, tokens_per_s)| {
            flops::utilisation(&self.arguments.model, tokens_per_s, peak.of_ranks(ranks_alive))
        });
        self.arguments.ending.hear(&line.decisions);
        let left = self.arguments.ending.step().0.saturating_sub(line.step.0) as f64;
        let eta_s = rate.filter(|rate| *rate > 0.0).map(|rate| left / rate);
        let wall_s = self.began.elapsed().as_secs_f64();
        let phases: serde_json::Map<String, Value> = Phase::ALL
            .iter()
            .map(|phase| {
                (
                    phase.name().to_owned(),
                    json!(self.spent_us[*phase as usize] as f64 / 1e3),
                )
            })
            .collect();
        let durability_lag_s = self.durability_lag_s(now);
        let mut metrics = json!({
            "step": line.step, "time_unix_ms": unix_ms(), "step_ms": step_ms, "tokens_per_s": tokens_per_s,
            "throughput(tps)": tokens_per_s, "loss_metrics/global_avg_loss": line.loss, "grad_norm": line.grad_norm,
            "ranks": ranks_alive, "phase_ms": phases, "durable_step": self.durability.step(),
            "durability_lag_s": durability_lag_s,
            "goodput": 1.0 - (self.lost_ms as f64 / 1e3 / wall_s.max(1e-9)).min(1.0),
        });
        // Where no peak is known there is nothing to be a share of, and no such key.
        if let Some(mfu) = mfu {
            metrics["mfu(%)"] = json!(mfu * 100.0);
        }
        if let Some(signals) = &signals {
            let noise = signals.gradient_noise.and_then(|noise| noise.scale_tokens);
            metrics["gradient_noise_scale_tokens"] = noise.into();
            // By domain, which may be many: not in every line.
            if line.heldout.is_some() || line.step.0.is_multiple_of(SIGNALS_INTERVAL_LINES) {
                metrics["signals"] = shown::signals(signals);
            }
        }
        self.arguments.metrics.append(&metrics);
        if !line.decisions.is_empty() {
            self.notify(Notice::Decided(line.decisions.clone()));
        }
        for Told { kind, fields, notice } in epochs::told(&line, signals.as_deref()) {
            self.event(kind, &fields);
            notice.into_iter().for_each(|notice| self.notify(notice));
        }
        self.notify(Notice::Line {
            line,
            signals,
            tokens_per_s,
            mfu,
            step_ms,
            ranks_alive,
            durability_lag_s,
            eta_s,
        });
    }

    fn since_began_us(&self, now: Instant) -> i64 {
        i64::try_from((now - self.began).as_micros()).unwrap_or(i64::MAX)
    }

    /// None before anything is known of it: what this controller has written itself would be too little.
    fn durability_lag_s(&self, now: Instant) -> Option<f64> {
        let durability = &self.durability;
        durability
            .is_known()
            .then(|| durability.lag_s(self.since_began_us(now)))
    }

    fn newest(&mut self, newest: Option<Newest>, written: StepsCompleted) {
        let now_us = self.since_began_us(Instant::now());
        self.durability.on_found(now_us, newest, written);
        // Lines before the first of this life.
        self.written = self.written.max(written);
    }

    /// The answer to `status`, with the figures that `metrics.jsonl` has of a line.
    fn shown(&self, mut status: Value) -> Value {
        status["durable_step"] = json!(self.durability.step());
        status["durability_lag_s"] = json!(self.durability_lag_s(Instant::now()));
        status
    }

    /// Training goes on without it: whoever reads this wants to know what would have to be done again if all ranks were lost
    /// now.
    fn no_checkpoint(&mut self, step: StepsCompleted, cause: &str) {
        // The step may be saved once more, and that begins then.
        self.saving.remove(&step);
        let lag_s = self.durability_lag_s(Instant::now());
        let durable = self.durability.step();
        let behind = match (durable, lag_s) {
            (Some(durable), Some(lag_s)) => {
                let steps = self.written.0.saturating_sub(durable.0);
                format!("the newest one is of step {durable}, {steps} steps and {lag_s:.0} s behind the trace")
            }
            (None, Some(lag_s)) => format!("none has been made since this start, {lag_s:.0} s of training ago"),
            (_, None) => "which one is the newest the store has not said yet".to_owned(),
        };
        let text = format!("no checkpoint of step {step}: {cause}; {behind}");
        let fields = json!({"cause": text, "durable_step": durable, "durability_lag_s": lag_s});
        self.event("warning", &fields);
        self.notify(Notice::Warning(text));
    }

    /// Time by phase since the report before, of one rank in one generation.
    fn spent(&mut self, generation: Generation, spent_us: &[u64]) {
        let Ok(now) = <[u64; PHASES]>::try_from(spent_us) else {
            return;
        };
        let (before_in, before) = self.spent_before;
        if before_in == generation {
            self.spent_us = std::array::from_fn(|phase| now[phase].saturating_sub(before[phase]));
        }
        self.spent_before = (generation, now);
    }

    fn saving_goes_on(&mut self, progress: SavingProgress) {
        let now = Instant::now();
        if self.saving_told.is_none_or(|told| now - told >= SAVING_INTERVAL) {
            self.saving_told = Some(now);
            self.notify(Notice::Saving(progress));
        }
    }

    /// A stall commits no line to come with: the lag grows all the same.
    fn tick(&mut self) {
        let now = Instant::now();
        let is_due = |told| now - told >= DURABILITY_INTERVAL;
        if let Some(lag_s) = self
            .durability_lag_s(now)
            .filter(|_| self.durability_told.is_none_or(is_due))
        {
            self.durability_told = Some(now);
            self.notify(Notice::Durability { lag_s });
        }
    }

    fn saving_began(&mut self, step: StepsCompleted) {
        self.saving.entry(step).or_insert_with(Instant::now);
    }

    fn checkpoint(&mut self, step: StepsCompleted) {
        let began = self.saving.remove(&step);
        self.saving = self.saving.split_off(&step);
        self.durability.on_checkpoint(step);
        // Its beginning was told to the controller before, perhaps.
        let took_ms = began.map(|at| at.elapsed().as_millis() as u64);
        self.event("checkpoint", &json!({"checkpoint_step": step, "took_ms": took_ms}));
        let took_ms = took_ms.unwrap_or(0);
        self.notify(Notice::Checkpoint { step, took_ms });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::path::Path;
    use tarazed_domain::config::Config;
    use tarazed_protocol::trace::{DomainLoss, DomainMap};
    use tokio::sync::mpsc;
    use tokio::time::advance;

    /// An observatory whose clock stands still but for what a test lets pass.
    struct Bench {
        observatory: ActorRef<ObservatoryMessage>,
        heard: mpsc::UnboundedReceiver<Notice>,
    }

    impl Bench {
        async fn new() -> Self {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/quickstart.toml");
            let config = Config::load(Path::new(path), &[]).unwrap();
            let (told, heard) = mpsc::unbounded_channel();
            let arguments = ObservatoryArguments {
                metrics: JsonLines::nowhere(),
                events: JsonLines::nowhere(),
                notify: Arc::new(move |notice| {
                    // An error means that the test is over.
                    let _ = told.send(notice);
                }),
                batch: config.batch_schedule(),
                context_tokens: config.model.context as u64,
                model: config.model.clone(),
                peak: None,
                ending: Ending {
                    last_step: StepsCompleted(1_000),
                    stop_at: None,
                    decisions: Vec::new(),
                },
            };
            let (observatory, _) = Actor::spawn(None, Observatory, arguments).await.unwrap();
            Self { observatory, heard }
        }

        /// What `status` says is durable, and how far that lags behind; all that was told before has been heard.
        async fn durable(&self) -> (Option<u64>, Option<f64>) {
            let shown = self
                .observatory
                .call(|reply| ObservatoryMessage::Show(json!({"step": 7}), reply), None)
                .await;
            let shown = shown.unwrap().unwrap();
            assert_eq!(shown["step"], 7, "beside what was there");
            (shown["durable_step"].as_u64(), shown["durability_lag_s"].as_f64())
        }

        async fn tell(&self, message: ObservatoryMessage) {
            self.observatory.cast(message).unwrap();
            self.durable().await;
        }

        async fn found(&self, newest: Option<(u64, u64)>, written: u64) {
            let newest = newest.map(|(step, age_ms)| Newest {
                step: StepsCompleted(step),
                age_ms,
            });
            let written = StepsCompleted(written);
            self.tell(ObservatoryMessage::Newest { newest, written }).await;
        }

        async fn saving(&self, step: u64) {
            self.tell(ObservatoryMessage::SavingBegan(StepsCompleted(step))).await;
        }

        /// How long a checkpoint took that exists now.
        async fn made(&mut self, step: u64) -> u64 {
            self.tell(ObservatoryMessage::Checkpoint(StepsCompleted(step))).await;
            loop {
                if let Notice::Checkpoint { step: of, took_ms } = self.heard.recv().await.unwrap() {
                    assert_eq!(of.0, step);
                    return took_ms;
                }
            }
        }

        /// The lag that comes with a line, as in `metrics.jsonl`.
        async fn line(&mut self, step: u64) -> Option<f64> {
            let line = TraceLine {
                step: StepsCompleted(step),
                tokens: 0,
                data: [0; 32],
                loss: 5.0,
                grad_norm: 1.0,
                state: [0; 32],
                lr: 1e-3,
                mixture: DomainMap(vec![("one".to_owned(), 1.0)]),
                domains: DomainMap(vec![("one".to_owned(), DomainLoss { loss: 5.0, tokens: 8 })]),
                heldout: None,
                lane_squares: None,
                skipped: false,
                lineage: None,
                decisions: Vec::new(),
            };
            let line = ObservatoryMessage::Line {
                line: Box::new(line),
                signals: None,
                ranks_alive: 2,
            };
            self.tell(line).await;
            loop {
                if let Notice::Line { durability_lag_s, .. } = self.heard.recv().await.unwrap() {
                    return durability_lag_s;
                }
            }
        }
    }

    /// A checkpoint takes from the first rank's word that it saves to the commit; a try that failed is no part of the next.
    #[tokio::test(start_paused = true)]
    async fn a_checkpoint_takes_from_the_first_word_of_it_to_its_commit() {
        let mut bench = Bench::new().await;
        bench.saving(10).await;
        advance(Duration::from_secs(1)).await;
        bench.saving(10).await;
        advance(Duration::from_secs(2)).await;
        assert_eq!(bench.made(10).await, 3_000, "the first rank's word counts");

        bench.saving(20).await;
        advance(Duration::from_secs(5)).await;
        let (step, cause) = (StepsCompleted(20), "no answer".to_owned());
        bench.tell(ObservatoryMessage::NoCheckpoint { step, cause }).await;
        advance(Duration::from_secs(1)).await;
        bench.saving(20).await;
        advance(Duration::from_secs(2)).await;
        assert_eq!(bench.made(20).await, 2_000, "saved again after a failure");

        assert_eq!(bench.made(30).await, 0, "its beginning was told to another controller");
    }

    /// Those at work on a step that is done again are gone; uploads of a state before it go on.
    #[tokio::test(start_paused = true)]
    async fn a_new_generation_saves_its_steps_anew() {
        let mut bench = Bench::new().await;
        for (restored, of_before_s) in [(false, 4), (true, 0)] {
            let base = StepsCompleted(if restored { 60 } else { 50 });
            let (before, after) = (base.0 - 5, base.0 + 5);
            bench.saving(before).await;
            bench.saving(after).await;
            advance(Duration::from_secs(3)).await;
            let began = Incident::GenerationBegan {
                generation: Generation(2),
                members: Vec::new(),
                base,
                restored,
                copies: 0,
            };
            bench.tell(ObservatoryMessage::Incident(began)).await;
            bench.saving(after).await;
            advance(Duration::from_secs(1)).await;
            assert_eq!(bench.made(before).await, of_before_s * 1_000, "{restored}");
            assert_eq!(bench.made(after).await, 1_000, "{restored}");
        }
    }

    /// Without a line, too, and not at every tick.
    #[tokio::test(start_paused = true)]
    async fn a_stall_is_told_of_once_a_second() {
        let mut bench = Bench::new().await;
        // Nobody knows yet, so that 0 would be a lie.
        bench.tell(ObservatoryMessage::Tick).await;
        bench.found(Some((400, 3_600_000)), 500).await;
        for _ in 0..100 {
            bench.tell(ObservatoryMessage::Tick).await;
            advance(Duration::from_millis(20)).await;
        }
        let mut told = Vec::new();
        while let Ok(notice) = bench.heard.try_recv() {
            if let Notice::Durability { lag_s } = notice {
                told.push(lag_s);
            }
        }
        assert_eq!(told, [3_600.0, 3_601.0]);
    }

    /// `status` and the lines have one figure, from the first moment of a replay on and without a line.
    #[tokio::test(start_paused = true)]
    async fn status_tells_the_lag_that_lines_do() {
        let mut bench = Bench::new().await;
        let told = |step, lag_s| (Some(step), Some(lag_s));
        assert_eq!(bench.durable().await, (None, None), "the store has not been asked");
        assert_eq!(bench.line(500).await, None, "nor does a line say more than is known");
        bench.found(Some((400, 3_600_000)), 500).await;
        assert_eq!(bench.durable().await, told(400, 3_600.0));
        advance(Duration::from_secs(60)).await;
        assert_eq!(bench.durable().await, told(400, 3_660.0));
        assert_eq!(bench.line(501).await, Some(3_660.0));
        assert_eq!(bench.durable().await, told(400, 3_660.0));
        advance(Duration::from_secs(5)).await;
        bench.made(500).await;
        assert_eq!(bench.durable().await, told(500, 5.0), "of the new line alone");
        bench.found(Some((400, 3_700_000)), 501).await;
        assert_eq!(bench.durable().await, told(400, 3_700.0), "an older one has to do");
        bench.made(501).await;
        assert_eq!(bench.durable().await, told(501, 0.0));
    }
}
