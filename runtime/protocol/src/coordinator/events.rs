//! What the membership machine hears and what it asks for.

use crate::message::{BeginPlan, Dispute, DisputedItem, ItemDigest, Member, RestoreFrom, StateReport, ToRank};
use crate::rollback::{Rollback, Rollbacks};
use std::sync::Arc;
use tarazed_domain::limits::Timeouts;
use tarazed_domain::{Generation, LaneTree, Rank, StepsCompleted};

/// Fixed facts of a run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Ranks of a whole world.
    pub ranks: u32,
    /// Processes held ready beside them.
    pub spares: u32,
    /// Lanes of the global batch.
    pub lanes: LaneTree,
    /// Optimizer shards.
    pub shard_count: usize,
    /// Copies of each, primary included.
    pub replicas: usize,
    /// All timeouts.
    pub timeouts: Timeouts,
    /// Starts of one worker without progress.
    pub restarts_max: u32,
    /// First wait between them.
    pub restart_backoff_ms: u64,
    /// The run ends with this count.
    pub last_step: StepsCompleted,
    /// The host of each worker, by its number; none where all are on one.
    pub hosts: Vec<u32>,
}

/// The newest life of a worker that an earlier controller started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PastLife {
    /// Who.
    pub member: Member,
    /// Its process is still there, and is waited for.
    pub lives: bool,
}

/// A fact.
#[derive(Clone, Debug)]
pub enum Event {
    /// A process is ready: a new one, or one that an earlier controller started and that holds what it held.
    Ready {
        /// Who.
        member: Member,
        /// Its data plane address.
        address: String,
        /// Process id.
        pid: u32,
        /// The newest generation it heard of; 0 for a new process.
        newest: Generation,
    },
    /// A process was killed or crashed, and is not gone yet; [`Event::Exited`] follows. Not of one that ends by itself: what it
    /// said before is still on its way.
    Ending {
        /// Who.
        member: Member,
        /// What is known of it by now.
        cause: String,
    },
    /// A process ended, or could not be started.
    Exited {
        /// Who.
        member: Member,
        /// Why, as far as one can tell from outside.
        cause: String,
        /// Ended by itself with code 0.
        orderly: bool,
    },
    /// Answer to a fence.
    State {
        /// Who.
        member: Member,
        /// Of which fence.
        generation: Generation,
        /// What it holds.
        report: StateReport,
    },
    /// A device thread met an error.
    Failed {
        /// Who.
        member: Member,
        /// In which generation.
        generation: Generation,
        /// What.
        cause: String,
        /// Peers it names.
        suspects: Vec<Rank>,
        /// No other try can help.
        fatal: bool,
        /// The state itself is in doubt.
        dispute: Option<Dispute>,
    },
    /// A disputed step was done again, and all agree on this result.
    Settled {
        /// Who says so.
        member: Member,
        /// In which generation.
        generation: Generation,
        /// The step.
        step: StepsCompleted,
        /// The result.
        digest: ItemDigest,
    },
    /// A rank stands at a boundary.
    Paused {
        /// Who.
        member: Member,
        /// In which generation.
        generation: Generation,
        /// Where.
        step: StepsCompleted,
        /// A checkpoint of this step is being written.
        saving: bool,
    },
    /// A rank lives.
    Heartbeat {
        /// Who.
        member: Member,
        /// In which generation.
        generation: Generation,
        /// Where.
        step: StepsCompleted,
        /// Grows with every bit of work its device thread does.
        progress: u64,
        /// Doing what.
        activity: String,
        /// Microseconds of one lane as of late; 0 where it is not known.
        lane_us: u64,
        /// Grows with every part of a checkpoint that it stores.
        stored_bytes: u64,
    },
    /// A trace line was written (or checked, on replay).
    LineWritten {
        /// Its step.
        step: StepsCompleted,
    },
    /// The checkpoint to start from, answer to [`Effect::FindCheckpoint`].
    Located {
        /// As it was found; none: begin from the seed.
        checkpoint: Option<RestoreFrom>,
    },
    /// A checkpoint exists.
    CheckpointCommitted {
        /// Its step.
        step: StepsCompleted,
    },
    /// A checkpoint could not be made.
    CheckpointFailed {
        /// Its step.
        step: StepsCompleted,
        /// Why.
        cause: String,
        /// The store has no room left: no retry makes some.
        full: bool,
    },
    /// The world is to have this many ranks from now on (1 to the number of lanes).
    Resize {
        /// How many.
        ranks: u32,
    },
    /// A decision ends the run with this count, or with the configured one again. Said before any rank can have acted by it.
    EndsAt {
        /// Which.
        step: Option<StepsCompleted>,
    },
    /// Rollbacks in force, acted or not. Said before any rank can have acted by a new one.
    GoesBack {
        /// All of them.
        rollbacks: Rollbacks,
    },
    /// Nobody is there who starts and ends processes on this node, of a run on several hosts. So it is with all of them at first.
    NodeAway {
        /// Its number, as in [`Options::hosts`].
        node: u32,
    },
    /// Somebody is again.
    NodeBack {
        /// Its number.
        node: u32,
    },
    /// A signal asks for a last checkpoint and an end.
    StopRequested,
    /// Time passed.
    Tick,
}

/// What should be done.
#[derive(Clone, PartialEq, Debug)]
pub enum Effect {
    /// Start a process.
    Start {
        /// As whom.
        member: Member,
        /// Wait first.
        after_ms: u64,
    },
    /// Watch a process that an earlier controller started; its exit comes as an event.
    Adopt {
        /// Who.
        member: Member,
    },
    /// End a process; its exit comes back as an event.
    Kill {
        /// Which.
        member: Member,
        /// Why.
        reason: String,
    },
    /// Send a message, the same to all of them.
    Send {
        /// To whom; somebody.
        members: Vec<Member>,
        /// What.
        message: ToRank,
    },
    /// Send the plan of a new generation to everybody in its roster. The shell fills in what the ledger knows, once for
    /// all of them: lines written and decisions.
    Begin {
        /// The plan.
        plan: Arc<BeginPlan>,
    },
    /// Find the newest valid checkpoint; comes back as [`Event::Located`].
    FindCheckpoint {
        /// Of a step before this one, whose own turned out to be bad.
        below: Option<StepsCompleted>,
        /// Of a state that these have not left behind.
        rollbacks: Rollbacks,
    },
    /// Something people will want to know.
    Note(Incident),
    /// End the run with this exit code and diagnosis; kill what is left.
    Halt {
        /// 3 for a person, 33 to retry.
        code: u8,
        /// The chain of causes.
        diagnosis: String,
    },
    /// The run is over: 0 done, 34 stopped after a last checkpoint.
    Done {
        /// Exit code.
        code: u8,
    },
}

/// For the event log and the console.
#[derive(Clone, PartialEq, Debug)]
pub enum Incident {
    /// The process of a rank has begun to end, and the others go on without it; [`Incident::RankLost`] follows with the cause.
    RankEnding {
        /// Who.
        member: Member,
        /// Its rank, if it had one.
        rank: Option<Rank>,
        /// What is known by now.
        cause: String,
        /// How long ago it was last heard of: it cannot have failed before.
        silent_ms: u64,
    },
    /// A rank is gone.
    RankLost {
        /// Who.
        member: Member,
        /// Its rank, if it had one.
        rank: Option<Rank>,
        /// Why.
        cause: String,
        /// How long ago it was last heard of when its end was seen: it cannot have failed before.
        silent_ms: u64,
        /// [`Incident::RankEnding`] said it before.
        expected: bool,
    },
    /// A generation gets nowhere: its members are asked what they wait for.
    Alarm {
        /// What is wrong with it.
        cause: String,
        /// How long ago any of its members did something.
        silent_ms: u64,
    },
    /// Ranks that an earlier controller left behind are back, with what they hold.
    Adopted {
        /// Who.
        members: Vec<Member>,
    },
    /// A generation begins.
    GenerationBegan {
        /// Which.
        generation: Generation,
        /// With whom.
        members: Vec<Member>,
        /// From where.
        base: StepsCompleted,
        /// From a checkpoint or the seed, and not from live copies.
        restored: bool,
        /// Shard copies made to get there.
        copies: usize,
    },
    /// A rank is slow, and lanes move to others; it is not replaced for it.
    Straggler {
        /// Who.
        member: Member,
        /// Its time for a lane.
        lane_us: u64,
        /// The others' (their median).
        usual_us: u64,
    },
    /// Ranks differ in what they computed: the state is restored, and the step done again.
    Disputed {
        /// After which step.
        step: StepsCompleted,
        /// In what.
        item: DisputedItem,
        /// Who takes part in the dispute.
        members: Vec<Member>,
    },
    /// The step was done again: these had it wrong, and are replaced; none where nobody can be named.
    Convicted {
        /// After which step.
        step: StepsCompleted,
        /// In what.
        item: DisputedItem,
        /// Who.
        members: Vec<Member>,
    },
    /// A checkpoint's state is not what the trace says, or its bytes are not as recorded: an older one is looked for.
    CheckpointRefuted {
        /// Its step.
        step: StepsCompleted,
        /// How it shows.
        diagnosis: String,
    },
    /// What ranks hold is left behind: the state before a step is made anew, from a checkpoint or the seed.
    RolledBack {
        /// Which step, and the state that it starts from.
        rollback: Rollback,
    },
    /// The state must come from a checkpoint.
    StateLost {
        /// How many shards have no copy left.
        shards_missing: usize,
    },
}
