//! What came of a simulation: counts while it runs, and the report at its end.

use super::causes::Seen;
use super::holdings::Begun;
use super::ledger::{CHARGES, Ledger};
use super::setup::Setup;
use super::world::{Finished, Happening};
use tarazed_protocol::message::BeginPlan;

/// One failure.
#[derive(Clone, Copy, Debug)]
pub struct FaultRecord {
    /// Place in [`super::causes::CAUSES`].
    pub cause: usize,
    /// How it showed.
    pub seen: Seen,
    /// When.
    pub at_ms: u64,
    /// Processes that it struck.
    pub struck: usize,
    /// From there until the controller heard the first of them end, or of its wrong result.
    pub detected_ms: Option<u64>,
    /// From there until steps were computed again; none where it cost no step.
    pub recovered_ms: Option<u64>,
}

/// Counts.
#[derive(Debug)]
pub struct Tally {
    /// Events the machine handled.
    pub events: u64,
    /// Effects it gave.
    pub effects: u64,
    /// Ticks among the events.
    pub ticks: u64,
    /// Every failure that struck a process.
    pub faults: Vec<FaultRecord>,
    /// Failures whose place was empty.
    pub struck_nothing: u64,
    /// Generations begun.
    pub generations: u64,
    /// Those that began from a checkpoint, by what made it necessary.
    pub restores: [u64; CHARGES],
    /// Pauses at a boundary.
    pub pauses: u64,
    /// Shards copied between ranks.
    pub copies: u64,
    /// Processes killed by the machine.
    pub kills: u64,
    /// Starts for which no host was free.
    pub waits_for_spare: u64,
    /// Checkpoints lost on their way into the store.
    pub saves_lost: u64,
    /// The newest checkpoint that the machine knows of.
    pub saved: Option<u64>,
    /// Steps that survivors finished for the dead.
    pub finished_steps: u64,
    /// Results that differed, and those who were named for it.
    pub disputes: u64,
    /// See above.
    pub convicted: u64,
    /// Halts: what they are charged to, exit code, diagnosis.
    pub halts: Vec<(usize, u8, String)>,
    digest: blake3::Hasher,
}

impl Tally {
    pub(super) fn new() -> Self {
        Self {
            events: 0,
            effects: 0,
            ticks: 0,
            faults: Vec::new(),
            struck_nothing: 0,
            generations: 0,
            restores: [0; CHARGES],
            pauses: 0,
            copies: 0,
            kills: 0,
            waits_for_spare: 0,
            saves_lost: 0,
            saved: None,
            finished_steps: 0,
            disputes: 0,
            convicted: 0,
            halts: Vec::new(),
            digest: blake3::Hasher::new(),
        }
    }

    pub(super) fn note(&mut self, now_ms: u64, happening: &Happening) {
        self.digest.update(&now_ms.to_le_bytes());
        self.digest.update(format!("{happening:?}").as_bytes());
    }

    pub(super) fn note_generation(&mut self, now_ms: u64, plan: &BeginPlan, begun: &Begun) {
        let (generation, base, ranks) = (plan.generation, plan.base, plan.roster.len());
        let line = format!("{now_ms} generation {generation} at {base}, {ranks} ranks, {begun:?}");
        self.digest.update(line.as_bytes());
    }
}

/// What came of it.
#[derive(Debug)]
pub struct Report {
    /// What was simulated.
    pub setup: Setup,
    /// Counts.
    pub tally: Tally,
    /// Where the time went, until the horizon.
    pub ledger: Ledger,
    /// Steps that were still to be computed again at the horizon.
    pub replay_left: u64,
    /// Bytes of a plan with everybody in it, encoded for one rank.
    pub plan_bytes: f64,
    /// How the run ended behind the horizon.
    pub exit_code: Option<u8>,
    /// What must never happen and did.
    pub failure: Option<String>,
    /// Hash of everything that happened.
    pub digest: String,
}

impl Report {
    pub(super) fn of(setup: Setup, finished: Finished) -> Self {
        let Finished {
            mut tally,
            ledger,
            stood,
            plan_bytes,
            end,
        } = finished;
        tally.digest.update(format!("{ledger:?} {end:?}").as_bytes());
        let (exit_code, failure) = match end {
            Ok(code) => (Some(code), None),
            Err(failure) => (None, Some(failure)),
        };
        let mut report = Self {
            replay_left: ledger.steps - stood.min(ledger.steps),
            digest: tally.digest.finalize().to_hex().to_string(),
            setup,
            tally,
            ledger,
            plan_bytes,
            exit_code,
            failure,
        };
        if report.failure.is_none() {
            report.failure = report.unbalanced();
        }
        report
    }

    /// Every millisecond in one place, and every step that was given up computed again, or still to be.
    fn unbalanced(&self) -> Option<String> {
        let (sum_ms, horizon_ms) = (self.ledger.sum_ms(), self.setup.horizon_ms);
        if sum_ms != horizon_ms {
            return Some(format!("{sum_ms} of {horizon_ms} ms are accounted for"));
        }
        let Ledger {
            steps_lost,
            steps_replayed,
            ..
        } = self.ledger;
        (steps_lost != steps_replayed + self.replay_left).then(|| {
            format!(
                "{steps_lost} steps were given up, {steps_replayed} computed again, {} are left",
                self.replay_left
            )
        })
    }

    /// Committed useful time over all time.
    #[must_use]
    pub fn goodput(&self) -> f64 {
        (self.ledger.steps * self.setup.cost.step_ms) as f64 / self.setup.horizon_ms as f64
    }

    /// Mean time between failures as it was drawn (milliseconds).
    #[must_use]
    pub fn mtbf_ms(&self) -> f64 {
        let count = self.tally.faults.len() as u64 + self.tally.struck_nothing;
        self.setup.horizon_ms as f64 / count.max(1) as f64
    }
}
