//! Named limits, each with its unit in its name, and every timeout of the system derived from one.

use serde::{Deserialize, Serialize};

/// Lanes in one global batch.
pub const LANES_MAX: u32 = 65_536;
/// Ranks in one generation.
pub const RANKS_MAX: u32 = 65_536;
/// Data domains in one run.
pub const DOMAINS_MAX: usize = 256;
/// Weight of one domain before weights are normalised: their sum stays finite, and the smallest share above zero.
pub const DOMAIN_WEIGHT_MAX: f64 = 1e9;

/// Optimizer updates of one run, and any interval or schedule counted in them.
pub const STEPS_MAX: u64 = 1_000_000_000;
/// Decoder layers.
pub const LAYERS_MAX: u64 = 1_024;
/// Hidden size, in elements.
pub const HIDDEN_MAX: u64 = 65_536;
/// Inner size of the MLP, in elements.
pub const FFN_MAX: u64 = 262_144;
/// Query heads; key-value heads divide them.
pub const HEADS_MAX: u64 = 1_024;
/// Tokens of one sequence.
pub const CONTEXT_TOKENS_MAX: u64 = 1_048_576;
/// Rows of embedding and head.
pub const VOCABULARY_MAX: u64 = 1_048_576;
/// Parameters of one model: 2 x 10^12, thirty times the family's largest.
pub const PARAMETERS_MAX: u64 = 2_000_000_000_000;
/// Sequences of one global batch.
pub const GLOBAL_BATCH_SEQUENCES_MAX: u64 = 1_048_576;
/// Tokens of one global batch.
pub const GLOBAL_BATCH_TOKENS_MAX: u64 = 4_294_967_296;
/// Tokens of one micro-batch: its activations are in memory at once.
pub const MICRO_BATCH_TOKENS_MAX: u64 = 16_777_216;
/// Held-out sequences of one domain in one evaluation.
pub const HELD_OUT_SEQUENCES_MAX: u64 = 65_536;
/// Elements of one block: 256 MiB of f32.
pub const BLOCK_ELEMENTS_MAX: u64 = 67_108_864;
/// Blocks of one model. Every rank holds a hash and a norm partial of each, and a [`crate::BlockIndex`] names it.
pub const BLOCKS_MAX: u64 = 16_777_216;
/// Optimizer shards of one run: one per rank of the largest world.
pub const OPTIMIZER_SHARDS_MAX: u64 = RANKS_MAX as u64;
/// Compute threads of one rank.
pub const THREADS_PER_RANK_MAX: u64 = 1_024;
/// Checkpoints that collection may be told to keep.
pub const CHECKPOINTS_KEPT_MAX: u64 = 1_000_000;
/// The shortest `checkpoint.interval` that a config may give.
pub const CHECKPOINT_EVERY_MS_MIN: u64 = 1_000;
/// The longest.
pub const CHECKPOINT_EVERY_MS_MAX: u64 = 24 * 3_600_000;
/// The shortest interval that `checkpoint.interval = "auto"` chooses: more often, its measure of their cost is noise.
pub const CHECKPOINT_AUTO_MS_MIN: u64 = 10_000;
/// The longest: nobody likes to lose more than an hour, whatever the optimum.
pub const CHECKPOINT_AUTO_MS_MAX: u64 = 3_600_000;
/// Bytes of text that a tokenizer is trained on, held in memory meanwhile.
pub const TOKENIZER_TRAIN_BYTES_MAX: u64 = 1 << 40;
/// Deaths of one worker without progress between them: each leaves a line in the chain of causes.
pub const RESTARTS_WITHOUT_PROGRESS_MAX: u64 = 1_000;
/// Wait before a restart, in milliseconds; doubling goes no further either.
pub const RESTART_BACKOFF_MS_MAX: u64 = 10_000;

/// Bytes of one control-plane message; the cluster layer drops a whole session above 16 MiB.
pub const CONTROL_MESSAGE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Bytes of one data-plane frame's payload.
pub const FRAME_PAYLOAD_BYTES_MAX: usize = 256 * 1024 * 1024;
/// Trace lines a rank keeps while the controller does not acknowledge them; past this it waits (STEP-6, SUP-5).
pub const UNACKNOWLEDGED_LINES_MAX: usize = 4096;
/// Global batches the data feeder holds ready.
pub const PREFETCH_STEPS_MAX: usize = 2;
/// Checkpoints whose upload may be under way at once on one rank: each is a copy of its optimizer shards in memory. Two at
/// once would share the way to the store, and neither would be whole sooner.
pub const CHECKPOINTS_IN_FLIGHT_MAX: usize = 1;

/// Control messages that one side may have sent and the other not yet handled; past this the peer is disconnected
/// (SUP-5).
pub const LINK_UNACKNOWLEDGED_MESSAGES_MAX: u64 = 16_384;
/// Bytes of such messages.
pub const LINK_UNACKNOWLEDGED_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Handled control messages after which their credit goes back to the sender.
pub const LINK_CREDIT_MESSAGES: u64 = 64;
/// Bytes of handled control messages after which their credit goes back.
pub const LINK_CREDIT_BYTES: u64 = 1024 * 1024;
/// A caller must have proved itself by then (milliseconds).
pub const LINK_HANDSHAKE_MS_MAX: u64 = 5_000;
/// Callers that may be proving themselves at once.
pub const LINK_HANDSHAKES_MAX: usize = 1_024;
/// Closing a link waits this long for the other side to handle what was sent (milliseconds).
pub const LINK_CLOSE_MS_MAX: u64 = 2_000;
/// A rank whose session ended without a goodbye has this long to end by itself, with its cause as its last words, before it
/// is killed. Sending its last telemetry takes most of it.
pub const LAST_WORDS_MS_MAX: u64 = 2_500;
/// Lines of a dead rank's output that are reported with its exit.
pub const EXIT_TAIL_LINES_MAX: usize = 20;
/// Bytes of a dead rank's output that are looked at for those lines.
pub const EXIT_TAIL_BYTES_MAX: u64 = 16 * 1024;

/// Every timeout, derived from the one that is configured (DESIGN.md section 6).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Timeouts {
    /// A peer that has stood still for this long is suspected (milliseconds). The configured one.
    pub failure_ms: u64,
    /// So long nothing has been heard of it by then: whoever stands still may have done so right behind a heartbeat, and what one
    /// told may be as old as the one before.
    pub suspect_ms: u64,
    /// Between heartbeats of a rank.
    pub heartbeat_ms: u64,
    /// Waiting for a peer that moves nothing inside one collective operation. The last resort: the controller sees a stall
    /// much earlier, by every rank's progress, and tells a rank that is slow (or restores) from one that hangs.
    pub collective_ms: u64,
    /// Connecting to a peer of a new generation.
    pub connect_ms: u64,
    /// A new process must have registered by then.
    pub start_ms: u64,
    /// A survivor must have answered a fence by then.
    pub fence_ms: u64,
    /// The last checkpoint must have come along within this time, again and again until it is committed.
    pub stop_ms: u64,
    /// A rank that lost its controller holds what it holds for this long, for a new one to come.
    pub orphan_ms: u64,
}

/// Lowest accepted `fault.timeout_ms`: below it a loaded machine would raise false alarms.
pub const FAILURE_TIMEOUT_MS_MIN: u64 = 200;
/// Highest accepted `fault.timeout_ms`, an hour: beyond it nobody would be told of a failure the same day.
pub const FAILURE_TIMEOUT_MS_MAX: u64 = 3_600_000;

impl Timeouts {
    /// Derives all from the configured failure timeout.
    #[must_use]
    pub const fn derive(failure_ms: u64) -> Self {
        Self {
            failure_ms,
            suspect_ms: failure_ms - failure_ms / 8,
            heartbeat_ms: failure_ms / 10,
            collective_ms: failure_ms * 30,
            connect_ms: failure_ms,
            start_ms: failure_ms * 3,
            fence_ms: failure_ms,
            stop_ms: failure_ms * 6,
            orphan_ms: failure_ms * 12,
        }
    }
}

const _: () = {
    assert!(
        LINK_CREDIT_MESSAGES < LINK_UNACKNOWLEDGED_MESSAGES_MAX / 2
            && LINK_CREDIT_BYTES < LINK_UNACKNOWLEDGED_BYTES_MAX / 2,
        "credits must go back long before the sender runs out of them"
    );
    assert!(
        CONTROL_MESSAGE_BYTES_MAX as u64 * 2 <= LINK_UNACKNOWLEDGED_BYTES_MAX,
        "the largest message must fit behind another one"
    );
};

// What is computed from accepted sizes fits into its type, so that code past the config's checks may use plain arithmetic.
const _: () = {
    assert!(
        STEPS_MAX.checked_mul(GLOBAL_BATCH_TOKENS_MAX).is_some(),
        "the tokens of a whole run are counted in a u64"
    );
    let layer = 4 * HIDDEN_MAX * HIDDEN_MAX + 3 * HIDDEN_MAX * FFN_MAX + 2 * HIDDEN_MAX;
    assert!(
        LAYERS_MAX * layer + 2 * VOCABULARY_MAX * HIDDEN_MAX < u64::MAX / 1_024,
        "a model's parameters, and their bytes in every copy, are counted in a u64"
    );
    let activations = LAYERS_MAX * (8 * HIDDEN_MAX + 2 * FFN_MAX) + VOCABULARY_MAX;
    assert!(
        MICRO_BATCH_TOKENS_MAX.checked_mul(activations * 16).is_some(),
        "the bytes of a micro-batch's activations are counted in a u64"
    );
    assert!(BLOCKS_MAX <= u32::MAX as u64, "a BlockIndex holds a u32");
    assert!(
        FAILURE_TIMEOUT_MS_MAX.checked_mul(1_000_000_000).is_some(),
        "every derived timeout is counted in nanoseconds too"
    );
};

// Relations that must hold between the derived values, for any configured one above the minimum.
const _: () = {
    let t = Timeouts::derive(FAILURE_TIMEOUT_MS_MIN);
    assert!(
        t.heartbeat_ms * 5 <= t.suspect_ms,
        "several heartbeats must fit into the time in which nothing is heard"
    );
    assert!(
        t.suspect_ms + t.heartbeat_ms < t.failure_ms,
        "what stands still must be seen in time, though its last heartbeat told of progress"
    );
    assert!(
        t.collective_ms > t.failure_ms,
        "the controller must notice a dead peer before the collective gives up"
    );
    assert!(t.start_ms > t.connect_ms, "a start includes a connect");
    assert!(
        t.orphan_ms > t.start_ms + t.failure_ms,
        "a new controller must find the ranks before they give up on it"
    );
};
