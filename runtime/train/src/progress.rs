//! What the device thread shows of itself while it works: atomics only, read by the rank's actor for heartbeats.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tarazed_domain::StepsCompleted;

macro_rules! phases {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// What the device thread does.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u8)]
        pub enum Phase { $($(#[$doc])* $name = $number,)* }

        impl Phase {
            /// The name in `status` and in errors.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Every phase, in the order of [`Progress::spent_us`].
            pub const ALL: [Self; PHASES] = [$(Self::$name),*];

            const fn from_number(number: u8) -> Self {
                match number { $($number => Self::$name,)* _ => Self::Parked }
            }
        }
    };
}

phases! {
    /// Waits for a command.
    Parked = 0, "parked";
    /// Builds the mesh of a new generation.
    Connecting = 1, "connecting";
    /// Brings shards to the agreed step, copies, restores.
    Recovering = 2, "recovering";
    /// Waits for samples or for a decision due.
    Feeding = 3, "feeding";
    /// Forward and backward.
    Computing = 4, "computing";
    /// Partial gradients travel and are folded.
    Reducing = 5, "reducing";
    /// Reduced gradients go to replicas.
    Forwarding = 6, "forwarding";
    /// In the barrier.
    Barrier = 7, "barrier";
    /// AdamW.
    Updating = 8, "updating";
    /// Working weights travel.
    Gathering = 9, "gathering";
    /// Waits until a snapshot for a checkpoint is copied: what a checkpoint costs a step.
    Snapshotting = 10, "snapshot";
}

/// Shared counters of one device thread.
#[derive(Debug)]
pub struct Progress {
    step: AtomicU64,
    work: AtomicU64,
    phase: AtomicU8,
    began: Instant,
    /// When the present phase began, and how long each phase lasted in all: microseconds since `began`.
    entered_us: AtomicU64,
    spent_us: [AtomicU64; PHASES],
    /// Forward and backward of one lane, as of late; 0 where it is not known.
    lane_us: AtomicU64,
}

/// Number of phases.
pub const PHASES: usize = 11;

impl Default for Progress {
    fn default() -> Self {
        Self {
            step: AtomicU64::new(0),
            work: AtomicU64::new(0),
            phase: AtomicU8::new(0),
            began: Instant::now(),
            entered_us: AtomicU64::new(0),
            spent_us: std::array::from_fn(|_| AtomicU64::new(0)),
            lane_us: AtomicU64::new(0),
        }
    }
}

impl Progress {
    /// Enters a phase.
    pub fn enter(&self, phase: Phase) {
        let now_us = self.began.elapsed().as_micros() as u64;
        let since_us = self.entered_us.swap(now_us, Ordering::Relaxed);
        self.spent_us[self.phase() as usize].fetch_add(now_us - since_us, Ordering::Relaxed);
        self.phase.store(phase as u8, Ordering::Relaxed);
        self.work.fetch_add(1, Ordering::Relaxed);
    }

    /// Some piece of work is done.
    pub fn worked(&self) {
        self.work.fetch_add(1, Ordering::Relaxed);
    }

    /// So many lanes took this long together; the last dozen steps count, the newest most.
    pub fn computed(&self, lanes: usize, took: Duration) {
        let newest = (took.as_micros() as u64 / lanes.max(1) as u64).max(1);
        let before = self.lane_us.load(Ordering::Relaxed);
        let mean = if before == 0 { newest } else { (before * 7 + newest) / 8 };
        self.lane_us.store(mean.max(1), Ordering::Relaxed);
    }

    /// Microseconds of one lane as of late; 0 where it is not known. Who hosts which lanes may depend on it, and no number.
    #[must_use]
    pub fn lane_us(&self) -> u64 {
        self.lane_us.load(Ordering::Relaxed)
    }

    /// Stands at this count.
    pub fn reached(&self, step: StepsCompleted) {
        self.step.store(step.0, Ordering::Relaxed);
    }

    /// Steps completed.
    #[must_use]
    pub fn step(&self) -> StepsCompleted {
        StepsCompleted(self.step.load(Ordering::Relaxed))
    }

    /// Grows with the work done.
    #[must_use]
    pub fn work(&self) -> u64 {
        self.work.load(Ordering::Relaxed)
    }

    /// Time spent in each phase so far, in microseconds; for metrics alone.
    #[must_use]
    pub fn spent_us(&self) -> [u64; PHASES] {
        std::array::from_fn(|phase| self.spent_us[phase].load(Ordering::Relaxed))
    }

    /// The present phase.
    #[must_use]
    pub fn phase(&self) -> Phase {
        Phase::from_number(self.phase.load(Ordering::Relaxed))
    }
}
