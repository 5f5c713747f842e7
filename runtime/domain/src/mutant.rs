//! Seeded bugs, to see whether the tests that guard against them would notice.
//!
//! Each is one condition at the place where the bug would be made. Without the feature `mutants`, which no build of the
//! product has, [`Mutant::is_on`] is a constant `false` and nothing of them is left. With it, one of them at a time can be
//! switched on for the whole process, by its program or by the variable `TARAZED_MUTANT`.

#[cfg(feature = "mutants")]
use std::sync::LazyLock;
#[cfg(feature = "mutants")]
use std::sync::atomic::{AtomicUsize, Ordering};

/// Names the bug that a program has from its start.
#[cfg(feature = "mutants")]
pub const VARIABLE: &str = "TARAZED_MUTANT";

macro_rules! mutants {
    ($($(#[doc = $what:literal])* $name:ident,)*) => {
        /// A bug that somebody could make.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub enum Mutant { $($(#[doc = $what])* $name,)* }

        impl Mutant {
            /// Every one.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// What is wrong with it, in words.
            #[must_use]
            pub const fn what(self) -> &'static str {
                match self { $(Self::$name => concat!($($what),*),)* }
            }
        }
    };
}

mutants! {
    /// A fence does not raise the generation.
    FenceKeepsGeneration,
    /// A restored run begins in a generation that was there before.
    RestoreReusesGeneration,
    /// Messages of a worker's former life are believed.
    IncarnationUnchecked,
    /// Messages of a former generation are believed.
    GenerationUnchecked,
    /// A dead worker is not started again.
    DeadStayDead,
    /// Nobody minds that no rank makes any progress.
    StallIgnored,
    /// Nobody minds that nothing is heard from a rank.
    SilenceIgnored,
    /// The last lane belongs to nobody.
    LaneLost,
    /// Plans do not hand the outcome of the agreed step to those one step behind (STEP-2).
    OutcomeKept,
    /// Whoever is one step behind counts as a holder, reduced gradient or not (STEP-1).
    StaleHolder,
    /// State that a rollback has left behind counts as held.
    DeadStateKept,
    /// Primary and replica of a shard are not compared (DET-3).
    ReplicasUncompared,
    /// State that changed by itself is believed (DET-3).
    RotBelieved,
    /// What survivors hold after a dispute is believed all the same (DET-3).
    DisputedStateKept,
    /// Those who leave a smaller world leave before the others have copied from them.
    LeaversDropped,
    /// A rank whose result was wrong is not replaced (DET-3).
    CulpritKept,
    /// The barrier is entered before replicas hold the reduced gradient (STEP-1).
    BarrierBeforeReplicas,
    /// A shard whose copy was cut short is reported as whole.
    PoisonedDonor,
    /// Shards that move away are dropped before the new holder is whole.
    DroppedBeforeCopied,
    /// Working weights of shards that came from elsewhere are not published.
    WeightsUnpublished,
    /// The update does not wait for snapshots.
    SnapshotTorn,
    /// A rank that shares its work forgets the last micro-batch of each lane.
    MicroBatchLost,
    /// Gradient norms are summed rank by rank (DET-2).
    NormByRank,
    /// Held-out sequences are dealt to the ranks that are there, not to lanes (DET-1).
    EvaluationByRank,
    /// Lines that were not acknowledged are not sent again after a fence.
    LinesForgotten,
    /// A line that comes again is written again (STEP-3).
    LineRepeated,
    /// Lines are written in the order in which they come.
    LineOutOfOrder,
    /// Plans do not say which decisions were made (LOOP-1).
    DecisionsForgotten,
    /// A frame's payload is not checked.
    PayloadUnchecked,
    /// A frame that is doubled, lost or swapped is not noticed.
    SequenceUnchecked,
    /// A wish to pause stays with the rank that heard it.
    PauseUnspread,
    /// A checkpoint is committed before its line is written.
    CommitBeforeLine,
    /// A checkpoint is committed without its last shard (CKPT-1).
    CommitPartial,
    /// A conditional write that failed counts as done, without reading back (CKPT-2).
    BlindRetry,
    /// The collector keeps one checkpoint less than it should (CKPT-5).
    GreedyCollector,
    /// A checkpoint's objects are deleted before its record says that it is retired: who restores it meanwhile trusts it (CKPT-5).
    DeletedBeforeRetired,
    /// A checkpoint that was pinned while the collector looked is retired all the same (CKPT-5).
    PinOvertaken,
    /// A line that a crash cut short stays in the trace.
    TornLineKept,
    /// The time in which the controller stood still counts against its ranks.
    AbsenceCounted,
    /// A controller that has been put out of charge starts and kills ranks.
    DeposedCommands,
    /// Lines in a trace that has lost its name are acknowledged.
    DeposedWrites,
    /// Another controller's claim is not looked for before a commit or a collection (CKPT-3).
    FenceIgnored,
    /// What a person asked for and was granted is not written (LOOP-2).
    PersonUnheard,
    /// A node starts a life that has been there before (SUP-2).
    NodeStartsTwice,
    /// A node starts a worker's next life beside the one that is there (SUP-2).
    NodeStartsBeside,
    /// Whoever is to end on a node that is away is waited for.
    AwayAwaited,
    /// A node that is back is not told what is wanted of it.
    BackUntold,
}

/// Turns off what guards the state, from a program's start.
#[cfg(feature = "mutants")]
pub const UNGUARDED: &str = "TARAZED_UNGUARDED";

/// Whether optimizer state is neither hashed nor compared: so that a benchmark can tell what that costs, with the feature
/// `mutants` alone.
#[cfg(feature = "mutants")]
#[must_use]
pub fn is_unguarded() -> bool {
    static SET: LazyLock<bool> = LazyLock::new(|| std::env::var_os(UNGUARDED).is_some());
    *SET
}

/// Whether optimizer state is neither hashed nor compared: never.
#[cfg(not(feature = "mutants"))]
#[must_use]
#[inline(always)]
pub const fn is_unguarded() -> bool {
    false
}

#[cfg(feature = "mutants")]
static CHOSEN: LazyLock<AtomicUsize> = LazyLock::new(|| {
    let name = std::env::var(VARIABLE).unwrap_or_default();
    let chosen = Mutant::ALL.iter().position(|mutant| format!("{mutant:?}") == name);
    AtomicUsize::new(chosen.unwrap_or(usize::MAX))
});

impl Mutant {
    /// Whether this bug is in the program now.
    #[cfg(feature = "mutants")]
    #[must_use]
    pub fn is_on(self) -> bool {
        CHOSEN.load(Ordering::Relaxed) == self as usize
    }

    /// Whether this bug is in the program: never.
    #[cfg(not(feature = "mutants"))]
    #[must_use]
    #[inline(always)]
    pub const fn is_on(self) -> bool {
        false
    }

    /// Puts this bug, or none, into the program.
    #[cfg(feature = "mutants")]
    pub fn choose(mutant: Option<Self>) {
        CHOSEN.store(mutant.map_or(usize::MAX, |mutant| mutant as usize), Ordering::Relaxed);
    }
}
