//! What the controller and the ends of a run's files say, as a [`View`].
//!
//! The controller is asked first, so the files are no older than its answer: a run that ends in between has written all it
//! had. Lines that are cut, mended or of another version are passed over: the files belong to the run, and this is for
//! people.

use super::{Domain, Figures, Incident, Language, Stage, View, WaitsFor, Worker};
use crate::commands::status::{ask, tail};
use crate::exit::Failure;
use crate::output;
use crate::run_folder::RunFolder;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use tarazed_domain::config::Config;
use tarazed_domain::{StepIndex, StepsCompleted};
use tarazed_protocol::data::LoopConfig;
use tarazed_protocol::data::decision::{Decision, DecisionKind, expected_end};
use tarazed_protocol::trace::{DomainLoss, DomainMap};

/// Incidents that are kept.
const INCIDENTS_MAX: usize = 32;
/// Steps of the loss curve.
const CURVE_STEPS_MAX: usize = 400;
/// Lines over which the time left is reckoned.
const RATE_LINES: usize = 32;
/// What takes as long as so many steps is none: the run stood still.
const PAUSE_STEPS: f64 = 50.0;
/// Events of every healthy run.
pub(crate) const ROUTINE: [&str; 4] = ["rank_ready", "generation", "checkpoint", "epoch"];
/// Fields of an event that are shown elsewhere, or say little to a person.
const SHOWN_ELSEWHERE: [&str; 10] = [
    "kind",
    "time_unix_ms",
    "step",
    "worker",
    "incarnation",
    "rank",
    "cause",
    "recovery_ms",
    "detection_ms",
    "expected",
];

/// The run folder that is meant: `dir`, or the newest below `runs`. One that a run is just being begun in counts, too: it has
/// a lock, and no config yet.
///
/// # Errors
/// Refused where there is none.
pub fn choose(dir: Option<&Path>, runs: &Path) -> Result<RunFolder, Failure> {
    let is_run = |folder: &RunFolder| folder.config().is_file() || lock_of(folder).is_file();
    let found = match dir {
        Some(dir) => Some(RunFolder::new(dir)).filter(is_run),
        None => {
            let entries = std::fs::read_dir(runs).into_iter().flatten().flatten();
            let folders = entries.map(|entry| RunFolder::new(entry.path())).filter(is_run);
            folders.max_by_key(|folder| {
                let changed = |path: PathBuf| std::fs::metadata(path).and_then(|m| m.modified()).ok();
                let newest = [folder.trace(), folder.config(), lock_of(folder)].map(changed);
                (newest.into_iter().max(), folder.dir().to_owned())
            })
        }
    };
    found.map_or_else(|| RunFolder::find(dir, runs), Ok)
}

/// The wall's clock, for whoever looks.
#[must_use]
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

fn lock_of(folder: &RunFolder) -> PathBuf {
    folder.dir().join("lock")
}

/// Looks at one run again and again.
#[derive(Debug)]
pub struct Watcher {
    folder: RunFolder,
    view: View,
    /// The last line of the trace.
    line: TraceEnd,
    signals: Signals,
    /// Time for a lane of workers that were found to be slow.
    slow: BTreeMap<u64, u64>,
    /// Stops and vetoes seen so far, by number: the end of a trace may hold them no more.
    stops: BTreeMap<u64, Decision>,
    /// Where whoever started the run ends it before its config does.
    last_step: Option<u64>,
}

/// What a controller says when it is asked.
enum Contact {
    Answer(Value),
    Refusal(String),
    Nobody,
}

impl Watcher {
    /// For the run in `folder`.
    #[must_use]
    pub fn new(folder: RunFolder) -> Self {
        let view = View {
            dir: output::short(folder.dir()).display().to_string(),
            ..View::default()
        };
        Self {
            folder,
            view,
            line: TraceEnd::default(),
            signals: Signals::default(),
            slow: BTreeMap::new(),
            stops: BTreeMap::new(),
            last_step: None,
        }
    }

    /// Of a run that is ended after `last_step`, if not before: that stands in no file.
    #[must_use]
    pub fn ended_after(mut self, last_step: u64) -> Self {
        self.last_step = Some(last_step);
        self
    }

    /// What is known now. What cannot be read is said in the view, and stays as it was.
    ///
    /// # Errors
    /// Refused where the folder is gone.
    pub fn look(&mut self, now_unix_ms: u64) -> Result<View, Failure> {
        let dir = self.folder.dir();
        if !dir.is_dir() {
            return Err(Failure::refused(
                dir.display(),
                "is gone",
                "its run was refused before it began, and `tarazed train` said why; or the folder was moved: name its new place with --run-dir",
            ));
        }
        let contact = match ask(&self.folder, "status") {
            Ok(Some(answer)) => Contact::Answer(answer),
            Ok(None) => Contact::Nobody,
            Err(failure) => Contact::Refusal(failure.message),
        };
        self.view.now_unix_ms = now_unix_ms;
        let read = [
            self.read_trace(),
            self.read_config(),
            self.read_metrics(),
            self.read_events(),
        ];
        self.view.remark = read.into_iter().find_map(Result::err).map(|failure| failure.message);
        (self.view.saving, self.view.notice) = (None, None);
        if let Contact::Answer(answer) = &contact {
            self.hear(answer);
        }
        self.view.stage = self.stage(contact);
        self.merge();
        Ok(self.view.clone())
    }

    /// Stops and vetoes from before the end of the trace that is read here.
    pub fn hear_of_ends(&mut self, decisions: impl IntoIterator<Item = Decision>) {
        let by_number = decisions.into_iter().map(|decision| (decision.id.0, decision));
        self.stops.extend(by_number);
    }

    fn stage(&self, contact: Contact) -> Stage {
        let has_lines = self.view.step > 0;
        match contact {
            Contact::Answer(_) if has_lines => Stage::Live,
            Contact::Answer(_) => Stage::Waits(WaitsFor::FirstStep),
            Contact::Refusal(cause) => Stage::Silent(cause),
            Contact::Nobody => {
                let is_there = |path: PathBuf| path.symlink_metadata().is_ok();
                let marks = Marks {
                    has_lines,
                    has_incidents: !self.view.incidents.is_empty(),
                    left_behind: is_there(self.folder.dir().join("controller.json"))
                        || is_there(self.folder.control_socket()),
                    is_held: is_held(&lock_of(&self.folder)),
                };
                marks.stage()
            }
        }
    }

    fn read_trace(&mut self) -> Result<(), Failure> {
        let end = tail(&self.folder.trace())?;
        let lines = whole_lines(&end);
        // Decisions are rare, and lines many.
        for line in lines.clone().filter(|line| has_decisions(line)) {
            for decision in parse::<TraceEnd>(line).into_iter().flat_map(|line| line.decisions) {
                let Ok(decision) = Decision::deserialize(&decision) else {
                    continue;
                };
                self.hear_of_ends(Some(decision).filter(decides_an_end));
            }
        }
        if let Some(line) = lines.rev().find_map(parse::<TraceEnd>) {
            self.view.step = line.step;
            self.view.figures.lr = line.lr;
            self.view.figures.tokens = line.tokens;
            self.line = line;
        }
        Ok(())
    }

    fn read_config(&mut self) -> Result<(), Failure> {
        let path = self.folder.config();
        if !path.exists() {
            return Ok(());
        }
        let config = Config::load(&path, &[])?;
        let stop_at: Option<StepIndex> = config
            .policy
            .stop
            .tokens
            .map(|tokens| LoopConfig::of(&config).step_after_tokens(tokens));
        let stops: Vec<Decision> = self.stops.values().cloned().collect();
        let last_step = self
            .last_step
            .map_or(config.run.steps, |last| last.min(config.run.steps));
        self.view.steps = Some(expected_end(&stops, stop_at, StepsCompleted(last_step)).0);
        self.view.name = config.run.name;
        Ok(())
    }

    fn read_metrics(&mut self) -> Result<(), Failure> {
        let end = tail(&self.folder.metrics())?;
        let mut lines: Vec<MetricsLine> = whole_lines(&end).filter_map(parse).collect();
        let Some(last) = lines.last() else { return Ok(()) };
        self.view.step = self.view.step.max(last.step);
        self.view.figures = Figures {
            at_unix_ms: Some(last.time_unix_ms),
            loss: last.loss,
            grad_norm: last.grad_norm,
            lr: self.view.figures.lr,
            tokens: self.view.figures.tokens,
            tokens_per_s: last.tokens_per_s,
            mfu_percent: last.mfu_percent,
            goodput: last.goodput,
            durable_step: last.durable_step,
            durability_lag_s: last.durability_lag_s,
            eta_s: self.view.steps.and_then(|steps| time_left_s(&lines, steps)),
        };
        // A step that was written twice counts as it was last.
        let losses: BTreeMap<u64, f64> = lines
            .iter()
            .filter_map(|line| Some((line.step, line.loss?)))
            .filter(|(_, loss)| loss.is_finite())
            .collect();
        let too_many = losses.len().saturating_sub(CURVE_STEPS_MAX);
        self.view.losses = losses.into_iter().skip(too_many).collect();
        if let Some(signals) = lines.iter_mut().rev().find_map(|line| line.signals.take()) {
            self.signals = signals;
        }
        Ok(())
    }

    fn read_events(&mut self) -> Result<(), Failure> {
        let end = tail(&self.folder.events())?;
        let events: Vec<Value> = whole_lines(&end).filter_map(parse).collect();
        self.view.incidents = incidents(&events, INCIDENTS_MAX);
        self.hear_of_checkpoint(&events);
        self.slow = slow_lanes(&events);
        Ok(())
    }

    /// Checkpoints come behind the line that is the last in the metrics, the last one always.
    fn hear_of_checkpoint(&mut self, events: &[Value]) {
        let figures = &mut self.view.figures;
        let made =
            |event: &&Value| event["kind"] == "checkpoint" && event["time_unix_ms"].as_u64() >= figures.at_unix_ms;
        let newest = events.iter().rev().find(made);
        if let Some(step) = newest.and_then(|event| event["checkpoint_step"].as_u64()) {
            figures.durable_step = Some(step);
            // How old the lines behind it are no file says.
            figures.durability_lag_s = (step >= self.view.step).then_some(0.0);
        }
    }

    /// A live controller's answer.
    fn hear(&mut self, answer: &Value) {
        let workers = answer.get("workers").and_then(Value::as_array).into_iter().flatten();
        self.view.workers = workers.filter_map(|worker| Worker::deserialize(worker).ok()).collect();
        for worker in &mut self.view.workers {
            worker.lane_us = worker.lane_us.or_else(|| self.slow.get(&worker.worker).copied());
        }
        self.view.generation = field(answer, "generation").or(self.view.generation);
        self.view.step = field(answer, "step").unwrap_or(self.view.step);
        self.view.saving = field(answer, "saving");
        self.view.notice = field(answer, "rollback_notice");
        if let Some(lag_s) = field(answer, "durability_lag_s") {
            self.view.figures.durability_lag_s = Some(lag_s);
            self.view.figures.durable_step = field(answer, "durable_step");
        }
        if let Some(signals) = field(answer, "signals") {
            self.signals = signals;
        }
    }

    /// Mixture and losses, from the trace's last line and the newest signals.
    fn merge(&mut self) {
        let loss_of = |name: &str| self.line.domains.get(name).map(|domain| domain.loss);
        let domain = |(name, weight): (&str, &f64)| {
            let signals = self.signals.domains.get(name);
            Domain {
                name: name.to_owned(),
                weight: *weight,
                train_loss: signals.and_then(|signals| signals.train_loss).or_else(|| loss_of(name)),
                heldout_loss: signals.and_then(|signals| signals.heldout_loss),
                tokens: signals.and_then(|signals| signals.tokens),
                tokens_requested: signals.and_then(|signals| signals.tokens_requested),
                epochs: signals.and_then(|signals| signals.epochs),
            }
        };
        self.view.domains = self.line.mixture.iter().map(domain).collect();
        let languages = self.signals.languages.iter();
        self.view.languages = languages
            .map(|(name, language)| Language {
                name: name.clone(),
                loss: language.heldout_loss,
                bits_per_byte: language.heldout_bits_per_byte,
            })
            .filter(|language| language.loss.is_some() || language.bits_per_byte.is_some())
            .collect();
        self.view.evaluated = self.signals.evaluated;
    }
}

/// What a run folder shows of a run whose controller does not listen.
#[derive(Clone, Copy, Debug)]
struct Marks {
    /// A step is done.
    has_lines: bool,
    has_incidents: bool,
    /// What a controller removes when it ends in order.
    left_behind: bool,
    /// A process has the folder's lock.
    is_held: bool,
}

impl Marks {
    const fn stage(self) -> Stage {
        match self {
            Self {
                is_held: true,
                has_lines: true,
                ..
            } => Stage::Held,
            Self { is_held: true, .. } => Stage::Waits(WaitsFor::Preparation),
            Self { left_behind: true, .. } => Stage::Gone,
            Self {
                has_lines: false,
                has_incidents: false,
                ..
            } => Stage::Waits(WaitsFor::Controller),
            _ => Stage::Ended,
        }
    }
}

/// Whether a process of this machine holds a lock on the file. Taking it to find out would refuse a run that starts in that
/// moment. A holder that this process may not see counts as none.
fn is_held(lock: &Path) -> bool {
    let Ok(file) = std::fs::metadata(lock) else {
        return false;
    };
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    names_lock(&locks, file.dev(), file.ino())
}

/// Whether a line of `/proc/locks` is of this file.
fn names_lock(locks: &str, device: u64, inode: u64) -> bool {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let file = format!("{major:02x}:{minor:02x}:{inode}");
    locks
        .lines()
        .any(|line| line.split_ascii_whitespace().any(|field| field == file))
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TraceEnd {
    step: u64,
    tokens: Option<u64>,
    lr: Option<f64>,
    mixture: DomainMap<f64>,
    domains: DomainMap<DomainLoss>,
    decisions: Vec<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct MetricsLine {
    step: u64,
    time_unix_ms: u64,
    tokens_per_s: Option<f64>,
    #[serde(rename = "loss_metrics/global_avg_loss")]
    loss: Option<f64>,
    grad_norm: Option<f64>,
    goodput: Option<f64>,
    durable_step: Option<u64>,
    durability_lag_s: Option<f64>,
    #[serde(rename = "mfu(%)")]
    mfu_percent: Option<f64>,
    signals: Option<Signals>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Signals {
    evaluated: Option<u64>,
    domains: BTreeMap<String, DomainSignals>,
    languages: BTreeMap<String, LanguageSignals>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct DomainSignals {
    train_loss: Option<f64>,
    heldout_loss: Option<f64>,
    tokens: Option<u64>,
    tokens_requested: Option<f64>,
    epochs: Option<f64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LanguageSignals {
    heldout_loss: Option<f64>,
    heldout_bits_per_byte: Option<f64>,
}

/// Lines that have their end; the first may have lost its beginning.
fn whole_lines(end: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> + Clone {
    let whole = end.iter().rposition(|&byte| byte == b'\n').unwrap_or(0);
    end[..whole].split(|&byte| byte == b'\n')
}

fn parse<T: DeserializeOwned>(line: &[u8]) -> Option<T> {
    serde_json::from_slice(line).ok()
}

fn has_decisions(line: &[u8]) -> bool {
    std::str::from_utf8(line).is_ok_and(|line| line.contains("\"decisions\":[{"))
}

fn field<T: DeserializeOwned>(answer: &Value, key: &str) -> Option<T> {
    answer.get(key).and_then(|value| T::deserialize(value).ok())
}

/// Whether a decision says where the run ends, or that it does not end there.
pub(crate) fn decides_an_end(decision: &Decision) -> bool {
    matches!(decision.kind, DecisionKind::Stop | DecisionKind::Veto { .. })
}

/// By the pace of the newest lines. The time in which there was no controller is no pace.
fn time_left_s(lines: &[MetricsLine], steps: u64) -> Option<f64> {
    let last = lines.last()?;
    let newest = &lines[lines.len().saturating_sub(RATE_LINES)..];
    let between = newest.windows(2).map(|pair| {
        let done = pair[1].step.checked_sub(pair[0].step).filter(|done| *done > 0)?;
        let took_ms = pair[1].time_unix_ms.checked_sub(pair[0].time_unix_ms)?;
        Some((took_ms as f64 / done as f64, done))
    });
    // Steps that were done again and clocks that were set back are no pace either.
    let mut paces: Vec<(f64, u64)> = between.flatten().collect();
    paces.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (median_ms, _) = *paces.get(paces.len() / 2)?;
    let paces = paces.iter().filter(|(step_ms, _)| *step_ms <= median_ms * PAUSE_STEPS);
    let (took_ms, done) = paces.fold((0.0, 0), |(took_ms, all), (step_ms, done)| {
        (took_ms + step_ms * *done as f64, all + done)
    });
    Some(steps.saturating_sub(last.step) as f64 * took_ms / done as f64 / 1e3)
}

/// The newest first, so many at most. A rank whose end was seen to begin is told once: when it is gone, with the cause. By then
/// its end is expected, which that of others is who were told to leave.
pub(crate) fn incidents(events: &[Value], most: usize) -> Vec<Incident> {
    let of_life = |event: &Value| {
        let number = |key: &str| event.get(key).and_then(Value::as_u64);
        (number("worker"), number("incarnation"))
    };
    let mut told: Vec<Option<Incident>> = Vec::new();
    // Places of those whose end was seen to begin, and is not over.
    let mut ending = BTreeMap::new();
    for event in events {
        let kind = event.get("kind").and_then(Value::as_str).unwrap_or_default();
        let is_expected = event.get("expected").and_then(Value::as_bool).unwrap_or(false);
        if kind.is_empty() || ROUTINE.contains(&kind) {
            continue;
        }
        let is_told = match kind {
            "rank_ending" => {
                ending.insert(of_life(event), told.len());
                true
            }
            "rank_lost" => match ending.remove(&of_life(event)) {
                Some(begun) => {
                    told[begun] = None;
                    true
                }
                None => !is_expected,
            },
            _ => true,
        };
        told.extend(is_told.then(|| Some(incident(kind, event))));
    }
    told.into_iter().rev().flatten().take(most).collect()
}

fn incident(kind: &str, event: &Value) -> Incident {
    let number = |key: &str| event.get(key).and_then(Value::as_u64);
    let mut what = Vec::new();
    what.extend(number("worker").map(|worker| format!("worker {worker}")));
    match event.get("cause").and_then(Value::as_str) {
        Some(cause) => what.push(cause.to_owned()),
        None => {
            let fields = event.as_object().into_iter().flatten();
            let others = fields.filter(|(name, _)| !SHOWN_ELSEWHERE.contains(&name.as_str()));
            let others: Vec<String> = others.map(|(name, value)| said(name, value)).collect();
            what.extend(Some(others.join(", ")).filter(|text| !text.is_empty()));
        }
    }
    Incident {
        unix_ms: number("time_unix_ms").unwrap_or_default(),
        kind: kind.to_owned(),
        what: what.join(": "),
        recovery_ms: number("recovery_ms"),
        detection_ms: number("detection_ms"),
        steps_lost: number("steps_lost"),
        rank: number("rank"),
        step: number("step"),
    }
}

fn said(name: &str, value: &Value) -> String {
    let name = name.replace('_', " ");
    match value {
        Value::String(text) => format!("{name} {text}"),
        other => format!("{name} {other}"),
    }
}

/// Time for a lane of workers that were found to be slow, and live on.
fn slow_lanes(events: &[Value]) -> BTreeMap<u64, u64> {
    let mut slow = BTreeMap::new();
    for event in events {
        let number = |key: &str| event.get(key).and_then(Value::as_u64);
        let Some(worker) = number("worker") else { continue };
        match (event.get("kind").and_then(Value::as_str), number("lane_us")) {
            (Some("straggler"), Some(lane_us)) => {
                slow.insert(worker, lane_us);
            }
            (Some("rank_lost" | "rank_ready"), _) => {
                slow.remove(&worker);
            }
            _ => {}
        }
    }
    slow
}

#[cfg(test)]
mod tests;
