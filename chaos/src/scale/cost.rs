//! What things take: the cost model, stated once, in formulas with named parameters.
//!
//! With `n` ranks, `P` bytes of one encoded plan, and times in milliseconds:
//!
//! | what | formula |
//! |---|---|
//! | a step | `step · most lanes of a rank / lanes per rank`: survivors of a loss compute its lanes |
//! | answers to a fence, all of them | `round trip + n · message` |
//! | a plan reaches all | `n · P / controller's link`: the controller sends each rank its own copy |
//! | meshes connect | `(n - 1) · connect` |
//! | copies of shards | `most copies of one rank · state / shards / rank's link` |
//! | finding the checkpoint | `(4 + shards / requests at once) · request`: manifest, and a look at every object |
//! | restore | `replicas · state / store` |
//! | weights gather | `weights / rank's link` |
//!
//! A generation starts with plan, mesh, copies or restore, and gather, one after the other. Constants are round figures of
//! present hardware, not measurements; each can be set. The shape is that of `aquila2-7b`: 7.3 billion parameters, 12
//! bytes of optimizer state and 4 of working weights each.

use super::causes::{CAUSES, Reach, Seen, total_per_million_hours};
use super::young_daly::Terms;
use tarazed_domain::limits::Timeouts;

/// Ranks on one host.
pub const RANKS_PER_HOST: u32 = 8;
/// Hosts on one switch.
pub const HOSTS_PER_SWITCH: u32 = 32;

const MS_PER_SECOND: f64 = 1e3;
const MS_PER_HOUR: f64 = 3.6e6;

/// The parameters.
#[derive(Clone, Debug)]
pub struct Cost {
    /// Lanes of a rank while all are there.
    pub lanes_per_rank: u32,
    /// A step while all are there (milliseconds).
    pub step_ms: u64,
    /// End of each step in which some ranks may have passed its barrier and others not (milliseconds).
    pub barrier_ms: u64,
    /// To a rank and back (milliseconds).
    pub round_trip_ms: u64,
    /// The controller handles one message (microseconds).
    pub message_us: u64,
    /// A rank connects to one peer (microseconds).
    pub connect_us: u64,
    /// Optimizer state, one copy (bytes).
    pub state_bytes: f64,
    /// Working weights (bytes).
    pub weights_bytes: f64,
    /// A rank's and the controller's network (bytes per second).
    pub link_bytes_per_s: f64,
    /// The object store to all ranks together (bytes per second).
    pub store_bytes_per_s: f64,
    /// One request to the object store that carries little (milliseconds), and how many the controller has under way at once.
    pub request_ms: u64,
    /// See above.
    pub requests_at_once: u64,
    /// A process on a host that is there, start to ready (milliseconds).
    pub process_start_ms: u64,
    /// A process on a spare host (milliseconds).
    pub spare_start_ms: u64,
    /// An exit, or a kill, until the controller hears of it (milliseconds).
    pub exit_ms: u64,
    /// A person, or a scheduler, starts a halted run again (milliseconds).
    pub person_ms: u64,
    /// A host is mended and a spare again (milliseconds).
    pub host_repair_ms: u64,
    /// A switch is (milliseconds).
    pub switch_repair_ms: u64,
    /// Share of "switch or cable" that takes the whole switch.
    pub switch_share: f64,
    /// All timeouts of the runtime.
    pub timeouts: Timeouts,
}

impl Default for Cost {
    fn default() -> Self {
        let parameters = 7.3e9;
        Self {
            lanes_per_rank: 4,
            step_ms: 5_000,
            barrier_ms: 50,
            round_trip_ms: 20,
            message_us: 10,
            connect_us: 20,
            state_bytes: parameters * 12.0,
            weights_bytes: parameters * 4.0,
            link_bytes_per_s: 50e9,
            store_bytes_per_s: 200e9,
            request_ms: 20,
            requests_at_once: 32,
            process_start_ms: 5_000,
            spare_start_ms: 30_000,
            exit_ms: 10,
            person_ms: 600_000,
            host_repair_ms: 12 * 3_600_000,
            switch_repair_ms: 2 * 3_600_000,
            switch_share: 0.1,
            timeouts: Timeouts::derive(20_000),
        }
    }
}

/// How a generation comes by its state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum From {
    /// From copies on living ranks; the most that one rank sends or takes.
    Copies(u32),
    /// From the checkpoint.
    Checkpoint,
    /// From the seed.
    Seed,
}

fn ms(bytes: f64, bytes_per_s: f64) -> u64 {
    (bytes / bytes_per_s * MS_PER_SECOND).ceil() as u64
}

impl Cost {
    /// All survivors have answered a fence.
    #[must_use]
    pub fn answers_ms(&self, ranks: usize) -> u64 {
        self.round_trip_ms + (ranks as u64 * self.message_us).div_ceil(1_000)
    }

    /// The newest checkpoint is found: the chain's end and the manifest are read, and every object is looked up. Its bytes are
    /// hashed by the ranks that read them.
    #[must_use]
    pub const fn locate_ms(&self, shards: u64) -> u64 {
        self.request_ms * (4 + shards.div_ceil(self.requests_at_once))
    }

    /// The plan has reached every rank.
    #[must_use]
    pub fn plan_ms(&self, ranks: usize, plan_bytes: f64) -> u64 {
        ms(ranks as f64 * plan_bytes, self.link_bytes_per_s)
    }

    /// A generation's plan leaves the controller until its first step begins.
    #[must_use]
    pub fn begin_ms(&self, ranks: usize, plan_bytes: f64, from: From, shards: usize, replicas: usize) -> u64 {
        let state_ms = match from {
            From::Copies(most) => ms(
                f64::from(most) * self.state_bytes / shards as f64,
                self.link_bytes_per_s,
            ),
            From::Checkpoint => ms(replicas as f64 * self.state_bytes, self.store_bytes_per_s),
            From::Seed => 0,
        };
        let connect_ms = (ranks.saturating_sub(1) as u64 * self.connect_us).div_ceil(1_000);
        let gather_ms = ms(self.weights_bytes, self.link_bytes_per_s);
        self.round_trip_ms + self.plan_ms(ranks, plan_bytes) + connect_ms + state_ms + gather_ms
    }

    /// A step where some rank has so many lanes.
    #[must_use]
    pub fn step_with_ms(&self, most_lanes: u32) -> u64 {
        self.step_ms * u64::from(most_lanes) / u64::from(self.lanes_per_rank)
    }

    /// Mean time between failures of a whole world, its rates multiplied by `rate_factor` (milliseconds).
    #[must_use]
    pub fn mtbf_ms(ranks: u32, rate_factor: f64) -> f64 {
        1e6 * MS_PER_HOUR / (total_per_million_hours() * f64::from(ranks) * rate_factor)
    }

    /// The terms of Young's and Daly's formula for a world that restores its checkpoint after every failure: means over
    /// the causes, from the parameters alone.
    #[must_use]
    pub fn terms(&self, ranks: usize, plan_bytes: f64, replicas: usize, snapshot_ms: u64, upload_ms: u64) -> Terms {
        let t = &self.timeouts;
        let answers = self.answers_ms(ranks);
        let begin = |from| self.begin_ms(ranks, plan_bytes, from, ranks, replicas);
        let admission = answers + begin(From::Copies(2));
        let (mut detect_ms, mut restart_ms) = (0.0, 0.0);
        for cause in &CAUSES {
            let stalled = t.suspect_ms + t.fence_ms + self.exit_ms;
            let detect = match cause.seen {
                Seen::Exit => self.exit_ms,
                Seen::Silence => t.suspect_ms + self.exit_ms,
                Seen::Hang => stalled,
                // Two rounds: stalled, agreed, begun, and at the second refusal replaced.
                Seen::Connection => t.suspect_ms + 2 * answers + t.connect_ms + self.exit_ms,
                Seen::Corruption => self.step_ms / 2,
            };
            let detect = cause.hang_share * stalled as f64 + (1.0 - cause.hang_share) * detect as f64;
            let back = self.locate_ms(ranks as u64) + begin(From::Checkpoint);
            // The state is restored for the dispute, and again when the culprit is replaced. What steps since the checkpoint
            // that costs once more is left out: corruption is a seventieth of all failures.
            let disputed = if cause.seen == Seen::Corruption {
                answers + back
            } else {
                0
            };
            let restart = disputed + answers + back + admission + self.short_handed_ms(cause.reach, back);
            let share = cause.per_million_hours / total_per_million_hours();
            detect_ms += share * detect;
            restart_ms += share * restart as f64;
        }
        Terms {
            checkpoint_ms: snapshot_ms as f64,
            latency_ms: upload_ms as f64,
            detect_ms,
            restart_ms,
        }
    }

    /// What slower steps cost until the replacement is admitted.
    fn short_handed_ms(&self, reach: Reach, back_ms: u64) -> u64 {
        let start_ms = if reach == Reach::Rank {
            self.process_start_ms
        } else {
            self.spare_start_ms
        };
        let slower_ms = start_ms.saturating_sub(back_ms) + self.step_ms / 2;
        slower_ms / u64::from(self.lanes_per_rank + 1)
    }
}
