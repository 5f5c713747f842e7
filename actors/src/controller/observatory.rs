//! `Observatory`: measurements and incidents for people: `metrics.jsonl`, `events.jsonl`, notices. It reads the wall clock;
//! nothing that it makes reaches a number of the run.

use super::appender::JsonLines;
use super::{Notice, Notify, shown, unix_ms};
use crate::rank::DevicePeak;
use ractor::{Actor, ActorProcessingErr, ActorRef};
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
use tarazed_protocol::message::Member;
use tarazed_protocol::rollback::Rollback;
use tarazed_protocol::trace::TraceLine;
use tarazed_train::progress::{PHASES, Phase};
use tokio::time::Instant;

/// Entries of lines that no checkpoint has yet.
const NOT_DURABLE_MAX: usize = 4_096;
/// Lines over which speed is averaged.
const SPEED_WINDOW_LINES: usize = 16;
/// Lines of `metrics.jsonl` between two that hold all signals; those of an evaluation do besides.
const SIGNALS_INTERVAL_LINES: u64 = 100;
/// Between two notices of how far a checkpoint is.
const SAVING_INTERVAL: Duration = Duration::from_secs(1);

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
    /// The first shard of a checkpoint is stored.
    SavingBegan(StepsCompleted),
    /// A checkpoint is under way.
    Saving(SavingProgress),
    /// A checkpoint exists.
    Checkpoint(StepsCompleted),
    /// A checkpoint could not be made.
    NoCheckpoint { step: StepsCompleted, cause: String },
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
    saving: BTreeMap<StepsCompleted, Instant>,
    /// When it was last told how far one is.
    saving_told: Option<Instant>,
    /// The newest step whose checkpoint exists.
    durable: Option<StepsCompleted>,
    /// Lines after it, some together: the newest of them, and when the first came.
    not_durable: VecDeque<(StepsCompleted, Instant)>,
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
            durable: None,
            not_durable: VecDeque::new(),
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
            ObservatoryMessage::SavingBegan(step) => {
                state.saving.entry(step).or_insert_with(Instant::now);
            }
            ObservatoryMessage::Saving(progress) => state.saving_goes_on(progress),
            ObservatoryMessage::Checkpoint(step) => state.checkpoint(step),
            ObservatoryMessage::NoCheckpoint { step, cause } => state.no_checkpoint(step, &cause),
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
                if restored && base > StepsCompleted(0) {
                    self.durable = Some(base);
                }
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
                self.notify(Notice::Warning(format!(
                    "{item} differs between ranks after step {step}: silent data corruption; doing it again"
                )));
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
        self.not_durable(line.step, now);
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
        let durability_lag_s = self.durability_lag(now).as_secs_f64();
        let mut metrics = json!({
            "step": line.step, "time_unix_ms": unix_ms(), "step_ms": step_ms, "tokens_per_s": tokens_per_s,
            "throughput(tps)": tokens_per_s, "loss_metrics/global_avg_loss": line.loss, "grad_norm": line.grad_norm,
            "ranks": ranks_alive, "phase_ms": phases, "durable_step": self.durable,
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

    /// Of the lines of a second one entry is kept, and where no checkpoint comes for long, of those of several.
    fn not_durable(&mut self, step: StepsCompleted, now: Instant) {
        match self.not_durable.back_mut() {
            Some((newest, first)) if now - *first < Duration::from_secs(1) => *newest = step,
            _ => self.not_durable.push_back((step, now)),
        }
        if self.not_durable.len() > NOT_DURABLE_MAX {
            let all: Vec<_> = self.not_durable.drain(..).collect();
            let together = |pair: &[(StepsCompleted, Instant)]| (pair[pair.len() - 1].0, pair[0].1);
            self.not_durable.extend(all.chunks(2).map(together));
        }
    }

    /// How long the oldest line has waited that no checkpoint covers.
    fn durability_lag(&self, now: Instant) -> Duration {
        self.not_durable
            .front()
            .map_or(Duration::ZERO, |(_, since)| now - *since)
    }

    /// Training goes on without it: whoever reads this wants to know what would have to be done again if all ranks were lost
    /// now.
    fn no_checkpoint(&mut self, step: StepsCompleted, cause: &str) {
        let lag_s = self.durability_lag(Instant::now()).as_secs_f64();
        let behind = match self.durable {
            Some(durable) => {
                let steps = self.written.0.saturating_sub(durable.0);
                format!("the newest one is of step {durable}, {steps} steps and {lag_s:.0} s behind the trace")
            }
            None => format!("none has been made since this start, {lag_s:.0} s of training ago"),
        };
        let text = format!("no checkpoint of step {step}: {cause}; {behind}");
        let fields = json!({"cause": text, "durable_step": self.durable, "durability_lag_s": lag_s});
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

    fn checkpoint(&mut self, step: StepsCompleted) {
        let began = self.saving.remove(&step);
        self.saving = self.saving.split_off(&step);
        self.durable = self.durable.max(Some(step));
        while self.not_durable.front().is_some_and(|(line, _)| *line <= step) {
            self.not_durable.pop_front();
        }
        let took_ms = began.map_or(0, |at| at.elapsed().as_millis() as u64);
        self.event("checkpoint", &json!({"checkpoint_step": step, "took_ms": took_ms}));
        self.notify(Notice::Checkpoint { step, took_ms });
    }
}
