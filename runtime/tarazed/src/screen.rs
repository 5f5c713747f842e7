//! From a run's notices to lines on the terminal and to metrics. The lines themselves are drawn by [`crate::progress`].
//!
//! Notices come from the run's threads and must never wait for a terminal, so an [`Outlet`] writes: behind a terminal that
//! stands still, progress is dropped first. What is said when is decided by [`Lines`], which has no clock and no output
//! of its own.

use crate::exit::Failure;
use crate::outlet::{DRAIN_TIMEOUT_MS, Feed, Outlet};
use crate::output;
use crate::progress::{DomainProgress, Incident, Progress, Style};
use crate::telemetry::{Metrics, StepSample};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};
use tarazed_actors::controller::Notice;
use tarazed_domain::StepsCompleted;
use tarazed_domain::config::{Config, Language};
use tarazed_protocol::checkpoint::SavingProgress;
use tarazed_protocol::data::decision::{Decision, DecisionKind, data_changes};
use tarazed_protocol::trace::{DomainLoss, DomainMap, TraceLine};

/// Least time between two progress lines.
const LINE_INTERVAL: Duration = Duration::from_secs(1);
/// A checkpoint that takes less is told when it is there.
const SAVING_SHOWN_AFTER_MS: u64 = 1_000;
/// Passes over a domain that are told one by one; of further ones only every doubling is, for a tiny domain has many.
const EPOCHS_TOLD: u64 = 4;
/// Least time between two lines of how far one checkpoint is.
const SAVING_LINE_INTERVAL: Duration = Duration::from_secs(5);

/// What the thread that writes is given.
enum Item {
    /// Something happened in the run.
    Notice(Notice),
    /// Something is to be said that no notice tells.
    Said(Incident),
}

/// The thread that writes.
pub struct Screen {
    outlet: Outlet<Item>,
    metrics: Metrics,
}

impl Screen {
    /// Starts it on standard output for a run of `config` that stops at `last_step`.
    ///
    /// # Errors
    /// Transient where no thread can be started.
    pub fn start(config: &Config, last_step: StepsCompleted, metrics: Metrics) -> Result<Self, Failure> {
        let lines = Lines::new(config, last_step, Style::for_stdout());
        Self::start_on(lines, metrics, |text| {
            // A terminal that is gone stops no run; the files hold everything.
            let _ = output::print(text);
        })
    }

    /// Starts it on whatever `print` writes to.
    fn start_on(mut lines: Lines, metrics: Metrics, print: impl Fn(&str) + Send + 'static) -> Result<Self, Failure> {
        let began = Instant::now();
        let write = move |dropped, item| {
            if dropped > 0 {
                print(&(lines.dropped(dropped) + "\n"));
            }
            let said = match item {
                Item::Notice(notice) => lines.on(began.elapsed(), &notice),
                Item::Said(incident) => vec![incident.render(lines.style)],
            };
            for line in said {
                print(&(line + "\n"));
            }
        };
        let outlet = Outlet::start("screen", is_expendable, write).map_err(|e| {
            Failure::transient(
                "threads",
                format!("cannot be started ({e})"),
                "free resources and try again",
            )
        })?;
        Ok(Self { outlet, metrics })
    }

    /// What hears notices; it never blocks.
    pub fn listener(&self) -> impl Fn(Notice) + Send + Sync + use<> {
        let (feed, metrics): (Feed<Item>, Metrics) = (self.outlet.feed(), self.metrics.clone());
        move |notice| {
            measure(&metrics, &notice);
            feed.put(Item::Notice(notice));
        }
    }

    /// Says something between the lines that notices make; it never blocks.
    pub fn say(&self, incident: Incident) {
        self.outlet.feed().put(Item::Said(incident));
    }

    /// Writes what waits and ends, within [`DRAIN_TIMEOUT_MS`]; whether all was written.
    #[must_use]
    pub fn finish(self) -> bool {
        self.outlet.drain(Duration::from_millis(DRAIN_TIMEOUT_MS))
    }
}

/// Progress, but for the rare line that carries held-out losses.
fn is_expendable(item: &Item) -> bool {
    match item {
        Item::Notice(Notice::Line { line, .. }) => line.heldout.is_none(),
        Item::Notice(Notice::Saving(_) | Notice::Durability { .. }) => true,
        _ => false,
    }
}

fn measure(metrics: &Metrics, notice: &Notice) {
    match notice {
        Notice::Line {
            line,
            signals,
            tokens_per_s,
            step_ms,
            durability_lag_s,
            ..
        } => {
            metrics.step(&StepSample {
                step: line.step.0,
                step_ms: *step_ms,
                tokens_per_s: tokens_per_s.unwrap_or(f64::NAN),
                loss: line.loss,
                grad_norm: line.grad_norm,
                durability_lag_s: *durability_lag_s,
            });
            if let Some(signals) = signals {
                metrics.signals(signals);
            }
        }
        Notice::Recovered { recovery_ms, .. } => metrics.recovery(*recovery_ms as f64),
        Notice::Checkpoint { took_ms, .. } => metrics.checkpoint(*took_ms as f64),
        Notice::Durability { lag_s } => metrics.durability_lag(*lag_s),
        _ => {}
    }
}

/// Which lines a notice makes.
pub struct Lines {
    style: Style,
    steps: u64,
    ranks: u32,
    languages: BTreeMap<String, &'static str>,
    /// Last training loss of each domain.
    losses: BTreeMap<String, f64>,
    generation: u64,
    generation_ranks: u32,
    /// What step 0 begins from.
    beginning: &'static str,
    shown_at: Option<Duration>,
    /// The checkpoint whose progress was shown last, and when.
    saving_shown: Option<(StepsCompleted, Duration)>,
    /// The domain that the next report begins with where not all fit.
    next_domain: usize,
}

impl Lines {
    /// For a run of `config` that stops at `last_step`.
    #[must_use]
    pub fn new(config: &Config, last_step: StepsCompleted, style: Style) -> Self {
        Self {
            style,
            steps: last_step.0,
            ranks: config.cluster.ranks,
            languages: languages_of(config),
            losses: BTreeMap::new(),
            generation: 0,
            generation_ranks: 0,
            beginning: match config.model.initial {
                Some(_) => "from the weights that model.initial names",
                None => "from the seed",
            },
            shown_at: None,
            saving_shown: None,
            next_domain: 0,
        }
    }

    /// The line that says how much was not shown.
    fn dropped(&self, count: u64) -> String {
        let text = format!("{count} lines were not shown while the terminal stood still: see events.jsonl");
        Incident::Warning(text).render(self.style)
    }

    /// The lines for `notice`, heard `now` after the start.
    pub fn on(&mut self, now: Duration, notice: &Notice) -> Vec<String> {
        if let Notice::Line {
            line,
            tokens_per_s,
            mfu,
            ranks_alive,
            eta_s,
            ..
        } = notice
        {
            let speed = (*tokens_per_s, *mfu);
            return self.progress(now, line, speed, *ranks_alive as u32, *eta_s);
        }
        let incidents = match notice {
            Notice::Decided(decisions) => {
                learn(&mut self.languages, decisions);
                decisions.iter().map(decision).collect()
            }
            Notice::Saving(progress) => self.saving(now, progress).into_iter().collect(),
            other => self.incident(other).into_iter().collect::<Vec<_>>(),
        };
        incidents.iter().map(|incident| incident.render(self.style)).collect()
    }

    fn incident(&mut self, notice: &Notice) -> Option<Incident> {
        let stage = |text: String| Some(Incident::Stage(text));
        match notice {
            Notice::Preparing(event) => stage(event.to_string()),
            Notice::DataReady {
                folder,
                domains,
                vocabulary,
            } => {
                let (train, held_out) = domains.iter().fold((0, 0), |sum, d| (sum.0 + d.2, sum.1 + d.3));
                stage(format!(
                    "data: {} domains, {train} training and {held_out} held-out tokens, vocabulary {vocabulary}, in {}",
                    domains.len(),
                    output::short(folder).display()
                ))
            }
            Notice::Opened {
                dir,
                resumed_at,
                store,
                parameters,
            } => {
                let how = resumed_at.map_or_else(|| "begins".to_owned(), |step| format!("goes on from step {step}"));
                let size = crate::plan::render::parameters(*parameters as u64);
                stage(format!(
                    "run: {} {how}; {size} parameters; checkpoints in {}",
                    output::short(dir).display(),
                    output::short(Path::new(store)).display()
                ))
            }
            Notice::AwaitingNodes { nodes, address } => stage(format!(
                "ranks run on the nodes {}: start `tarazed node --run-dir DIR --name NAME` on each; they dial {address}",
                nodes.join(", ")
            )),
            Notice::NodeBack { node, host, lives } => {
                stage(format!("node {node} is there (host {host}, {lives} ranks alive)"))
            }
            Notice::RankStarted { member, pid } => stage(format!("{member}: started as process {pid}")),
            Notice::RankReady { member, after_ms } => stage(format!("{member}: ready after {after_ms} ms")),
            Notice::RankLost { member, cause } => Some(Incident::RankLost {
                worker: member.worker.0,
                incarnation: member.incarnation.0,
                cause: cause.clone(),
            }),
            Notice::RankEnded { member, cause } => stage(format!("{member} ended: {cause}")),
            Notice::Generation {
                generation,
                ranks,
                base,
                restored,
            } => {
                (self.generation, self.generation_ranks) = (generation.0, *ranks as u32);
                let from = match (restored, base.0) {
                    (true, 0) => self.beginning,
                    (true, _) => "from a checkpoint",
                    (false, _) => "from the ranks' own state",
                };
                stage(format!("generation {generation}: {ranks} ranks at step {base}, {from}"))
            }
            Notice::Recovered {
                recovery_ms,
                steps_lost,
            } => Some(Incident::Recovered {
                recovery_ms: *recovery_ms as f64,
                generation: self.generation,
                ranks: self.generation_ranks,
                steps_lost: *steps_lost,
            }),
            Notice::Adopted { ranks } => stage(format!(
                "{ranks} ranks of the controller before are back, with what they hold"
            )),
            Notice::Checkpoint { step, took_ms } => Some(Incident::CheckpointCommitted {
                step: step.0,
                checkpoint_ms: *took_ms as f64,
            }),
            Notice::Warning(text) => Some(Incident::Warning(text.clone())),
            Notice::Epoch { domain, epoch, step } => {
                let is_told = *epoch <= EPOCHS_TOLD || epoch.is_power_of_two();
                let text = format!("{domain} begins epoch {epoch} at step {step}");
                is_told.then_some(Incident::Stage(text))
            }
            Notice::Stopping => stage("stopping: a last checkpoint, then the end".to_owned()),
            Notice::Line { .. } | Notice::Decided(_) | Notice::Saving(_) | Notice::Durability { .. } => None,
        }
    }

    /// Nothing of one that is quick; of one that is not, a line now and then.
    fn saving(&mut self, now: Duration, progress: &SavingProgress) -> Option<Incident> {
        let lately = |(step, shown): (StepsCompleted, Duration)| {
            step == progress.step && now.saturating_sub(shown) < SAVING_LINE_INTERVAL
        };
        if progress.for_ms < SAVING_SHOWN_AFTER_MS || self.saving_shown.is_some_and(lately) {
            return None;
        }
        self.saving_shown = Some((progress.step, now));
        Some(Incident::Saving {
            step: progress.step.0,
            stored: progress.stored as u64,
            shards: progress.shards as u64,
            for_ms: progress.for_ms,
        })
    }

    fn progress(
        &mut self,
        now: Duration,
        line: &TraceLine,
        (tokens_per_s, mfu): (Option<f64>, Option<f64>),
        ranks_alive: u32,
        eta_s: Option<f64>,
    ) -> Vec<String> {
        for (name, domain) in line.domains.iter() {
            self.losses.insert(name.to_owned(), domain.loss);
        }
        let due = self
            .shown_at
            .is_none_or(|shown| now.saturating_sub(shown) >= LINE_INTERVAL);
        let mut lines = Vec::new();
        if due || line.step.0 == self.steps || line.heldout.is_some() {
            self.shown_at = Some(now);
            let domain = |(name, weight): (&str, &f64)| DomainProgress {
                name: name.to_owned(),
                weight: *weight,
                loss: self.losses.get(name).copied(),
            };
            let progress = Progress {
                step: line.step.0,
                steps: self.steps,
                loss: line.loss,
                grad_norm: line.grad_norm,
                lr: line.lr,
                tokens_per_s,
                mfu,
                domains: line.mixture.iter().map(domain).collect(),
                ranks_alive,
                ranks: self.ranks,
                eta_s,
            };
            let (report, next) = progress.render(self.style, self.next_domain);
            self.next_domain = next;
            lines.extend(report);
        }
        if let Some(held_out) = &line.heldout {
            let losses = by_language(held_out, &self.languages);
            lines.push(
                Incident::Evaluated {
                    step: line.step.0,
                    losses,
                }
                .render(self.style),
            );
        }
        lines
    }
}

fn decision(decision: &Decision) -> Incident {
    Incident::Decision {
        effective_step: decision.effective.completed().0,
        what: format!("{} ({})", decided(decision), decision.reason),
    }
}

/// What a decision says, in words, without its reason.
pub(crate) fn decided(decision: &Decision) -> String {
    match &decision.kind {
        DecisionKind::Mixture { weights } => format!("mixture {}", shares(weights)),
        DecisionKind::Advice { weights } => format!("advice: mixture {}", shares(weights)),
        DecisionKind::Pin => "mixture pinned".to_owned(),
        DecisionKind::Release => "mixture released".to_owned(),
        DecisionKind::Veto { decision } => format!("veto of decision {decision}"),
        DecisionKind::LearningRate { factor } => format!("learning rate times {factor}"),
        DecisionKind::Decay => "learning rate decays".to_owned(),
        DecisionKind::SpikeBounds(bounds) => format!("spikes above gradient norm {:.3}", bounds.grad_norm),
        DecisionKind::Rollback { to, .. } => format!("back to the state after step {to}"),
        DecisionKind::RollbackNotice { to } => {
            format!(
                "notice: back to the state after step {to}, unless decision {} is vetoed in time",
                decision.id
            )
        }
        DecisionKind::EpochLimit { domain } => format!("domain {domain} is at its epoch limit"),
        DecisionKind::Stop => "the run stops".to_owned(),
        DecisionKind::Data(change) => {
            let names: Vec<&str> = change.domains.iter().map(|edition| edition.name.as_str()).collect();
            let mixture = match change.weights.as_slice() {
                weights if change.states_mixture() => format!("; mixture {}", shares(weights)),
                [] => String::new(),
                new => {
                    let percent = new.iter().map(|share| format!("{:.1}%", 100.0 * share));
                    format!("; shares of new domains {}", percent.collect::<Vec<_>>().join(" "))
                }
            };
            let version = change.version.get(..16).unwrap_or_default();
            format!("data set {version} brings {}{mixture}", names.join(", "))
        }
    }
}

/// Languages of the domains that a run of `config` begins with.
pub(crate) fn languages_of(config: &Config) -> BTreeMap<String, &'static str> {
    let domains = config.data.domains.iter();
    domains
        .map(|domain| (domain.name.clone(), domain.language.name()))
        .collect()
}

/// Languages of domains that come while a run is watched; of one that nobody told of, "other" is said.
pub(crate) fn learn(languages: &mut BTreeMap<String, &'static str>, decisions: &[Decision]) {
    for edition in data_changes(decisions).flat_map(|(_, change)| &change.domains) {
        if let Some(language) = Language::from_name(&edition.language) {
            languages.insert(edition.name.clone(), language.name());
        }
    }
}

/// Held-out loss of each domain, then of each language, weighted by tokens.
pub(crate) fn by_language(
    held_out: &DomainMap<DomainLoss>,
    languages: &BTreeMap<String, &'static str>,
) -> Vec<(String, f64)> {
    let mut sums: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    let mut losses: Vec<(String, f64)> = Vec::new();
    for (name, domain) in held_out.iter() {
        losses.push((name.to_owned(), domain.loss));
        let sum = sums.entry(languages.get(name).copied().unwrap_or("other")).or_default();
        sum.0 += domain.loss * domain.tokens as f64;
        sum.1 += domain.tokens as f64;
    }
    losses.extend(
        sums.into_iter()
            .map(|(language, (sum, tokens))| (format!("all {language}"), sum / tokens)),
    );
    losses
}

/// Shares of a mixture in percent, in domain order.
fn shares(weights: &[f64]) -> String {
    let total: f64 = weights.iter().sum();
    let shares: Vec<String> = weights.iter().map(|w| format!("{:.0}%", 100.0 * w / total)).collect();
    shares.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use tarazed_domain::{Generation, Incarnation, WorkerId};
    use tarazed_protocol::message::Member;

    fn lines() -> Lines {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../configs/quickstart.toml");
        Lines::new(
            &Config::load(&path, &[]).expect("a good config"),
            StepsCompleted(600),
            Style::default(),
        )
    }

    fn line(step: u64, heldout: Option<DomainMap<DomainLoss>>) -> Notice {
        let line = TraceLine {
            step: StepsCompleted(step),
            tokens: 0,
            data: [0; 32],
            loss: 5.0,
            grad_norm: 1.0,
            state: [0; 32],
            lr: 1e-3,
            mixture: DomainMap(vec![("book-en".to_owned(), 0.5), ("book-zh".to_owned(), 0.5)]),
            domains: DomainMap(vec![("book-en".to_owned(), DomainLoss { loss: 4.0, tokens: 8 })]),
            heldout,
            lane_squares: None,
            skipped: false,
            lineage: None,
            decisions: Vec::new(),
        };
        Notice::Line {
            line: Box::new(line),
            signals: None,
            tokens_per_s: None,
            mfu: None,
            step_ms: 1.0,
            ranks_alive: 4,
            durability_lag_s: Some(0.0),
            eta_s: None,
        }
    }

    /// A terminal that takes nothing keeps neither a run's threads nor its end waiting; what it shows later leaves out
    /// progress, and no loss.
    #[test]
    fn a_terminal_that_stands_still_holds_up_nothing() {
        let (go, gate) = std::sync::mpsc::channel::<()>();
        let (written, shown) = std::sync::mpsc::channel();
        let print = move |text: &str| {
            // Errors mean that the terminal goes on, and that the test is over.
            let _ = gate.recv();
            let _ = written.send(text.to_owned());
        };
        let screen = Screen::start_on(lines(), Metrics::default(), print).expect("a thread");
        let hear = screen.listener();
        for step in 1..10_000 {
            hear(line(step, None));
            if step % 1_000 == 0 {
                hear(Notice::Warning(format!("warning {step}")));
            }
        }
        assert!(!screen.finish(), "nothing could be written");
        drop(go);
        let shown: Vec<String> = shown.iter().collect();
        let warnings: Vec<&String> = shown.iter().filter(|line| line.starts_with('!')).collect();
        assert_eq!(warnings.len(), 9, "{shown:?}");
        assert!(shown.len() < 100, "{} lines", shown.len());
    }

    #[test]
    fn progress_is_shown_once_a_second_and_at_the_end() {
        let mut lines = lines();
        let steps = lines.steps;
        let mut shown = |ms, step| lines.on(Duration::from_millis(ms), &line(step, None)).len();
        assert_eq!(
            (shown(0, 1), shown(400, 2), shown(999, 3), shown(1_000, 4)),
            (1, 0, 0, 1)
        );
        assert_eq!(shown(1_001, steps), 1);
    }

    /// A checkpoint that takes long is told now and then; one that is quick only when it is there.
    #[test]
    fn a_checkpoint_that_takes_long_is_told_on_its_way() {
        let mut lines = lines();
        let mut say = |now_ms, step, stored, for_ms| {
            let progress = SavingProgress {
                step: StepsCompleted(step),
                stored,
                shards: 4,
                for_ms,
            };
            lines
                .on(Duration::from_millis(now_ms), &Notice::Saving(progress))
                .join("|")
        };
        assert_eq!(say(10_000, 120, 0, 999), "");
        assert_eq!(say(12_100, 120, 2, 3_099), "* saving step 120: 2 of 4 shards, 3 s");
        assert_eq!(say(17_000, 120, 3, 7_999), "", "lately said");
        assert_eq!(say(17_100, 120, 4, 8_099), "* saving step 120: 4 of 4 shards, 8 s");
        assert_eq!(say(17_200, 140, 0, 100), "");
        assert_eq!(say(18_200, 140, 0, 1_100), "* saving step 140: 0 of 4 shards, 1 s");
    }

    /// A tiny domain is passed over many times: the first are told, then every doubling.
    #[test]
    fn passes_over_a_domain_are_told_and_not_all_of_them() {
        let mut lines = lines();
        let mut say = |epoch| {
            let (domain, step) = ("web".to_owned(), StepsCompleted(7));
            let notice = Notice::Epoch { domain, epoch, step };
            lines.on(Duration::ZERO, &notice).join("|")
        };
        assert!(say(2).ends_with("web begins epoch 2 at step 7"));
        let told: Vec<u64> = (2..20).filter(|epoch| !say(*epoch).is_empty()).collect();
        assert_eq!(told, [2, 3, 4, 8, 16]);
    }

    #[test]
    fn held_out_losses_are_told_by_domain_and_language() {
        let loss = |loss, tokens| DomainLoss { loss, tokens };
        let held_out = DomainMap(vec![
            ("book-en".to_owned(), loss(4.0, 10)),
            ("help-en".to_owned(), loss(5.0, 30)),
            ("book-zh".to_owned(), loss(6.0, 10)),
        ]);
        let shown = lines().on(Duration::ZERO, &line(3, Some(held_out)));
        assert_eq!(
            shown[1],
            "* held out at step 3: book-en 4.000  help-en 5.000  book-zh 6.000  all en 4.750  all zh 6.000"
        );
    }

    #[test]
    fn a_loss_and_its_recovery_are_told() {
        let mut lines = lines();
        let member = Member {
            worker: WorkerId(2),
            incarnation: Incarnation(0),
        };
        let cause = "killed by signal 9".to_owned();
        let mut say = |notice| lines.on(Duration::ZERO, &notice).join("|");
        assert_eq!(
            say(Notice::RankLost { member, cause }),
            "! lost worker 2 (incarnation 0): killed by signal 9"
        );
        say(Notice::Generation {
            generation: Generation(2),
            ranks: 3,
            base: StepsCompleted(7),
            restored: false,
        });
        let recovered = Notice::Recovered {
            recovery_ms: 84,
            steps_lost: 0,
        };
        assert_eq!(
            say(recovered),
            "! recovered in 84 ms: generation 2, 3 ranks, no step lost"
        );
    }
}
