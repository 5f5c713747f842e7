//! The live view of a run (`tarazed watch`).
//!
//! | part | holds |
//! |---|---|
//! | [`look`] | what the controller and the ends of the run's files say |
//! | [`draw`] | from that to lines for a terminal of some size: pure, no clock |
//!
//! A [`View`] keeps what was last known of what cannot be known now, and says by its [`Stage`] which of the two it is.
//!
//! Deliberately absent: anything that writes, and any read of a whole file but the config.

pub mod draw;
pub mod look;

use serde::Deserialize;

/// Where a run stands, for a person.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct View {
    /// When this is looked at.
    pub now_unix_ms: u64,
    /// The run folder, as a person would write it.
    pub dir: String,
    /// `run.name`; empty before there is a config.
    pub name: String,
    /// Whether anybody is in charge of the run.
    pub stage: Stage,
    /// What could not be read, and what to do about it.
    pub remark: Option<String>,
    /// Number of the world.
    pub generation: Option<u64>,
    /// Steps completed.
    pub step: u64,
    /// Where the run ends, as far as config and trace say. That `--steps` ends it before stands in no file.
    pub steps: Option<u64>,
    /// The newest step's figures.
    pub figures: Figures,
    /// A checkpoint under way.
    pub saving: Option<Saving>,
    /// A rollback that is announced.
    pub notice: Option<Notice>,
    /// All of them, in order; of a run without a controller, as they were last.
    pub workers: Vec<Worker>,
    /// In the trace's order.
    pub domains: Vec<Domain>,
    /// Held-out losses, and the step of the evaluation.
    pub languages: Vec<Language>,
    /// Step of the newest evaluation.
    pub evaluated: Option<u64>,
    /// The newest first, without what every healthy run has.
    pub incidents: Vec<Incident>,
    /// Training losses by step, the newest last.
    pub losses: Vec<(u64, f64)>,
}

/// Whether anybody is in charge of a run.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Stage {
    /// No step is done yet.
    Waits(WaitsFor),
    /// The controller answers.
    Live,
    /// A controller listens and gives no answer: why.
    Silent(String),
    /// A controller holds the run folder and does not listen.
    Held,
    /// The controller ended without a word: killed, or its machine is gone. Its ranks look for the next one.
    Gone,
    /// A controller ended the run in order.
    #[default]
    Ended,
}

/// What a run without a step waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WaitsFor {
    /// Somebody to start it.
    Controller,
    /// Data and store.
    Preparation,
    /// Ranks, and their first step.
    FirstStep,
}

/// What a step says of itself; what is not known is absent.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Figures {
    /// When its line was written.
    pub at_unix_ms: Option<u64>,
    /// Training tokens so far.
    pub tokens: Option<u64>,
    /// Training loss in nats per token.
    pub loss: Option<f64>,
    /// Gradient norm before clipping.
    pub grad_norm: Option<f64>,
    /// Learning rate.
    pub lr: Option<f64>,
    /// Of all ranks.
    pub tokens_per_s: Option<f64>,
    /// Model FLOPs utilisation in percent.
    pub mfu_percent: Option<f64>,
    /// 0 to 1.
    pub goodput: Option<f64>,
    /// Step of the newest checkpoint.
    pub durable_step: Option<u64>,
    /// How long the oldest line has waited that no checkpoint covers.
    pub durability_lag_s: Option<f64>,
    /// Time left.
    pub eta_s: Option<f64>,
}

/// How far a checkpoint is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
pub struct Saving {
    /// Steps completed in it.
    pub step: u64,
    /// Its shards in the store.
    pub stored: u64,
    /// All its shards.
    pub shards: u64,
    /// Since the first rank began with it.
    pub for_ms: u64,
}

/// A rollback that will be decided unless somebody vetoes it.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub struct Notice {
    /// Number to veto.
    pub decision: u64,
    /// The step at which training goes back.
    pub at: u64,
    /// To the state after this one.
    pub to: u64,
    /// Why.
    pub reason: String,
}

/// One worker, as the controller shows it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Worker {
    /// Slot.
    pub worker: u64,
    /// Rank in the present world.
    pub rank: Option<u64>,
    /// Name of the node whose process starts and ends it, where there are several.
    pub node: Option<String>,
    /// Process; 0 before it is ready.
    pub pid: u64,
    /// Which life of the slot.
    pub incarnation: u64,
    /// First lane, and the one after the last.
    pub lanes: Option<[u64; 2]>,
    /// Steps completed.
    pub step: u64,
    /// `training`, `starting`, …
    pub state: String,
    /// What its device thread does.
    pub activity: String,
    /// Time for a lane, where it is known.
    pub lane_us: Option<u64>,
}

/// One domain.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Domain {
    /// Name.
    pub name: String,
    /// Share of the mixture, 0 to 1.
    pub weight: f64,
    /// Training loss in nats per token, smoothed where the run's signals are known.
    pub train_loss: Option<f64>,
    /// Held-out loss, as last evaluated.
    pub heldout_loss: Option<f64>,
    /// Training tokens so far.
    pub tokens: Option<u64>,
    /// Those that the mixtures in force asked for.
    pub tokens_requested: Option<f64>,
    /// Passes over its text so far.
    pub epochs: Option<f64>,
}

/// One language's held-out text.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Language {
    /// Name.
    pub name: String,
    /// In nats per token.
    pub loss: Option<f64>,
    /// The same in bits per byte of text.
    pub bits_per_byte: Option<f64>,
}

/// One line of `events.jsonl`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Incident {
    /// When.
    pub unix_ms: u64,
    /// `rank_lost`, `recovered`, …
    pub kind: String,
    /// Whose, and why.
    pub what: String,
    /// Since the failure was seen.
    pub recovery_ms: Option<u64>,
    /// From the last sign of life to its being seen, so at most.
    pub detection_ms: Option<u64>,
    /// Steps that had to be done again.
    pub steps_lost: Option<u64>,
    /// Rank in the world of that time.
    pub rank: Option<u64>,
    /// Steps completed when it was written.
    pub step: Option<u64>,
}
