//! What travels between the controller and the ranks: small, owned, fenced by generation (SUP-2).
//!
//! Bodies are rkyv; the link puts them behind a checked header, because rkyv's validation is about memory safety and
//! says nothing of integrity. Tensors never travel here.

use crate::data::decision::Decision;
use crate::data::trajectory::Moments;
use crate::placement::Placement;
use crate::rollback::Rollbacks;
use rkyv::{Archive, Deserialize, Serialize};
use tarazed_domain::{
    Generation, Incarnation, LaneIndex, LaneRange, OptimizerShardIndex, Rank, StepsCompleted, WorkerId,
};

/// A stable slot and which life of it: the only identity there is (SUP-2).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Archive, Serialize, Deserialize)]
pub struct Member {
    /// The slot.
    pub worker: WorkerId,
    /// Which life of it.
    pub incarnation: Incarnation,
}

impl std::fmt::Display for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "worker {} (incarnation {})", self.worker, self.incarnation)
    }
}

/// What passing a step's barrier gives: enough for any holder of the reduced gradients to finish the step (STEP-2).
#[derive(Clone, PartialEq, Debug, Archive, Serialize, Deserialize)]
pub struct BarrierOutcome {
    /// The count this step completes.
    pub step: StepsCompleted,
    /// Gradient norm before clipping, over all lanes and blocks.
    pub grad_norm: f64,
    /// Mean training loss per token.
    pub loss: f64,
    /// Folded statistics of all lanes (`data::stats`), encoded.
    pub stats: Vec<u8>,
    /// The step is beyond the bounds in force: its update is left out.
    pub skipped: bool,
    /// Some rank was asked to pause at this boundary.
    pub pause: bool,
    /// Some rank was asked for a checkpoint at this boundary.
    pub checkpoint: bool,
    /// Some rank still stores its share of the last checkpoint.
    pub busy: bool,
}

/// What a rank measured in one committed step; the controller makes the trace line of it.
#[derive(Clone, PartialEq, Debug, Archive, Serialize, Deserialize)]
pub struct StepLine {
    /// The count this step completed.
    pub step: StepsCompleted,
    /// Digest of the step's samples.
    pub data: [u8; 32],
    /// Mean training loss per token.
    pub loss: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Hash of the whole training state after the update (STEP-4).
    pub state: [u8; 32],
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Mixture in force, in domain order.
    pub mixture: Vec<f64>,
    /// Folded statistics of all lanes (`data::stats`), encoded.
    pub stats: Vec<u8>,
    /// The update was left out.
    pub skipped: bool,
    /// Moments of every tensor of the weights after the update, in the layout's order; empty where nobody looked at them
    /// (`data::trajectory`).
    pub weights: Vec<Moments>,
}

/// What a survivor holds of one optimizer shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub struct ShardHolding {
    /// The shard.
    pub shard: OptimizerShardIndex,
    /// Its whole state is that after this many steps.
    pub state: StepsCompleted,
    /// Reduced gradients held whole, leading to this count.
    pub reduced: Option<StepsCompleted>,
}

/// A survivor's answer to a fence.
#[derive(Clone, PartialEq, Debug, Default, Archive, Serialize, Deserialize)]
pub struct StateReport {
    /// Shards held whole; one whose copy was cut short is not listed: it is never a donor.
    pub shards: Vec<ShardHolding>,
    /// The newest barrier passed in this life.
    pub passed: Option<BarrierOutcome>,
    /// Complete lines the controller has not acknowledged.
    pub lines: Vec<StepLine>,
    /// The peer that its data plane waited for when the generation was cut short; none if it was at work itself.
    pub waits_for: Option<Rank>,
}

/// Digest of an item under dispute: enough to tell two results apart.
pub type ItemDigest = [u8; 16];

/// What was computed more than once in one step, with different results.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Archive, Serialize, Deserialize)]
pub enum DisputedItem {
    /// The state of an optimizer shard, by its primary and its replicas.
    Shard(OptimizerShardIndex),
    /// The gradient of a lane, by its rank and by the one that computed it again.
    Lane(LaneIndex),
    /// Loss or gradient norm is not a number: every rank sees the same, and none is named.
    Finite,
    /// The whole state that a generation is about to begin from, by the trace and by its ranks.
    Base,
    /// An object of the checkpoint that a generation is about to begin from is not what its manifest says, or not there.
    Checkpoint,
}

impl std::fmt::Display for DisputedItem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shard(shard) => write!(f, "optimizer shard {shard}"),
            Self::Lane(lane) => write!(f, "the gradient of lane {lane}"),
            Self::Finite => write!(f, "a loss or gradient norm that is not a number"),
            Self::Base => write!(f, "the state to begin from"),
            Self::Checkpoint => write!(f, "the checkpoint to begin from"),
        }
    }
}

/// Silent data corruption as the ranks see it (DET-3): they differ, and only a recomputation can tell who is wrong.
#[derive(Clone, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub struct Dispute {
    /// After this step.
    pub step: StepsCompleted,
    /// On what.
    pub item: DisputedItem,
    /// Who has which result.
    pub claims: Vec<Claim>,
}

/// One rank's result.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub struct Claim {
    /// Whose.
    pub rank: Rank,
    /// What it has.
    pub digest: ItemDigest,
}

/// The checkpoint to restore from: the manifest's object as the commit record names it. What the controller found and
/// what the ranks read are the same bytes, whatever else of that step is in the store.
#[derive(Clone, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub struct RestoreFrom {
    /// The checkpoint's step.
    pub step: StepsCompleted,
    /// Key of the manifest under the store's root.
    pub manifest_key: String,
    /// Length of the manifest in bytes.
    pub length: u64,
    /// BLAKE3 of the manifest's bytes.
    pub blake3: [u8; 32],
}

/// One member of a generation's roster.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub struct RosterEntry {
    /// Identity.
    pub member: Member,
    /// Lanes it computes.
    pub lanes: LaneRange,
}

/// Addresses of all ranks' data plane listeners, in order of ranks and in one piece of memory.
#[derive(Clone, PartialEq, Eq, Debug, Default, Archive, Serialize, Deserialize)]
pub struct Addresses {
    text: String,
    ends: Vec<u32>,
}

impl Addresses {
    /// Adds the next rank's.
    ///
    /// # Panics
    /// If all of them have 4 GiB: a programmer's error.
    pub fn push(&mut self, address: &str) {
        self.text.push_str(address);
        self.ends
            .push(u32::try_from(self.text.len()).expect("addresses are short"));
    }

    /// Adds some of others, which belong to ranks in a row.
    ///
    /// # Panics
    /// If there are no such others, or as [`Self::push`]: programmer's errors.
    pub fn extend_from(&mut self, others: &Self, ranks: std::ops::Range<usize>) {
        let start_of = |rank: usize| rank.checked_sub(1).map_or(0, |before| others.ends[before]);
        let (start, end) = (start_of(ranks.start), start_of(ranks.end));
        let shift = self.text.len();
        self.text.push_str(&others.text[start as usize..end as usize]);
        assert!(u32::try_from(self.text.len()).is_ok(), "addresses are short");
        let ends = others.ends[ranks].iter();
        self.ends.extend(ends.map(|&end| end - start + shift as u32));
    }

    /// Each rank's, in order. What came over a wire damaged has none.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let address = |(start, end): (u32, &u32)| self.text.get(start as usize..*end as usize);
        starts
            .zip(&self.ends)
            .map(move |range| address(range).unwrap_or_default())
    }

    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// None, with the memory kept.
    pub fn clear(&mut self) {
        self.text.clear();
        self.ends.clear();
    }
}

impl<T: AsRef<str>> FromIterator<T> for Addresses {
    fn from_iter<I: IntoIterator<Item = T>>(addresses: I) -> Self {
        let mut all = Self::default();
        addresses.into_iter().for_each(|address| all.push(address.as_ref()));
        all
    }
}

/// Everything a rank needs to start a generation.
#[derive(Clone, PartialEq, Debug, Archive, Serialize, Deserialize)]
pub struct BeginPlan {
    /// The new generation.
    pub generation: Generation,
    /// Its members by rank.
    pub roster: Vec<RosterEntry>,
    /// Their addresses on the data plane.
    pub addresses: Addresses,
    /// Every holder first brings its shards to this count.
    pub base: StepsCompleted,
    /// The outcome of the base step's barrier, for holders one step behind; and for a line not yet complete.
    pub outcome: Option<BarrierOutcome>,
    /// Per optimizer shard its holders, primary first.
    pub shards: Placement,
    /// The checkpoint to restore from, where some origin says so; of the base step.
    pub restore: Option<RestoreFrom>,
    /// Lines written so far; a rank keeps only later ones.
    pub acknowledged: StepsCompleted,
    /// Every decision so far.
    pub decisions: Vec<Decision>,
    /// Decisions are known through this line.
    pub decided: StepsCompleted,
    /// Rollbacks that have acted: from which state each step goes on. One that is only decided ends the generation at its
    /// boundary.
    pub rollbacks: Rollbacks,
    /// Run to this count, checkpoint, and pause.
    pub last_step: StepsCompleted,
    /// Save the base itself first: the run ends there.
    pub checkpoint_at_base: bool,
    /// The newest checkpoint that there is; 0 for none. What was due since then and is not there is due still.
    pub checkpointed: StepsCompleted,
    /// Hash of the whole state at the base as its line has it, where the line is written: from another one nobody begins
    /// (DET-3).
    pub state: Option<[u8; 32]>,
    /// What was disputed before the state was restored: rank 0 tells how it is once the step is done again.
    pub disputed: Option<(StepsCompleted, DisputedItem)>,
}

impl BeginPlan {
    /// Whether its parts fit each other. The hash of a message says that it is as it was sent, not that it makes sense.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(&self) -> Result<(), Malformed> {
        let ranks = self.roster.len();
        if self.addresses.iter().count() != ranks {
            return Err(Malformed(format!(
                "a plan for {ranks} ranks with {} addresses",
                self.addresses.iter().count()
            )));
        }
        if !self.shards.is_sound(ranks) {
            return Err(Malformed(format!("a plan whose shards are not on its {ranks} ranks")));
        }
        if !self.rollbacks.is_live(self.base) {
            return Err(Malformed(format!(
                "a plan that begins from step {}, which a rollback has left behind",
                self.base
            )));
        }
        Ok(())
    }
}

pub use envelopes::{FromRank, ToRank};

mod envelopes {
    #![allow(
        missing_docs,
        reason = "rkyv generates public twins of the fields without documentation"
    )]

    use super::{BeginPlan, Decision, Dispute, ItemDigest, StateReport, StepLine};
    use rkyv::{Archive, Deserialize, Serialize};
    use tarazed_domain::{Generation, OptimizerShardIndex, Rank, StepsCompleted};

    /// Controller to rank.
    #[derive(Clone, PartialEq, Debug, Archive, Serialize, Deserialize)]
    pub enum ToRank {
        /// Abort every generation before this one and report what you hold.
        Fence {
            /// The coming generation.
            generation: Generation,
        },
        /// Start a generation.
        Begin(Box<BeginPlan>),
        /// Pause after the step being run, all together; with a checkpoint where asked.
        Pause {
            /// Of this generation.
            generation: Generation,
            /// Also write a checkpoint there.
            checkpoint: bool,
        },
        /// Write a checkpoint of the first boundary from this one on that all agree on.
        Checkpoint {
            /// Of this generation.
            generation: Generation,
            /// A checkpoint of this step, or of a later one, is what was asked for.
            from: StepsCompleted,
        },
        /// Lines through this one are written; these decisions stand in them.
        Acknowledge {
            /// Newest written line.
            through: StepsCompleted,
            /// Decisions of lines newly written.
            decisions: Vec<Decision>,
        },
        /// Leave in order: nothing more is to be done.
        Shutdown,
    }

    /// Rank to controller.
    #[derive(Clone, PartialEq, Debug, Archive, Serialize, Deserialize)]
    pub enum FromRank {
        /// The session is new: a new process is ready and holds nothing yet, or one that lost its controller is back.
        Ready {
            /// Address of its data plane listener.
            address: String,
            /// Process id, for people.
            pid: u32,
            /// The newest generation it took part in or heard of; 0 for a new process.
            newest: Generation,
        },
        /// Answer to a fence.
        State {
            /// The generation of the fence.
            generation: Generation,
            /// What it holds.
            report: StateReport,
        },
        /// The generation is whole and runs; sent by rank 0.
        Running {
            /// Which.
            generation: Generation,
            /// The count it starts from.
            base: StepsCompleted,
        },
        /// A committed step's measurements; sent by rank 0, kept by all, and sent by all at a fence.
        Line {
            /// Of this generation.
            generation: Generation,
            /// The measurements.
            line: StepLine,
            /// Microseconds this rank has spent in each phase so far, for metrics alone.
            spent_us: Vec<u64>,
        },
        /// The device thread met an error that is not its own: a peer is gone, slow or wrong.
        Failed {
            /// Of this generation.
            generation: Generation,
            /// What happened, for the chain of causes.
            cause: String,
            /// Peers it names.
            suspects: Vec<Rank>,
            /// Two programs do not understand each other: the run halts.
            fatal: bool,
            /// The state itself is in doubt, not only a peer (DET-3).
            dispute: Option<Dispute>,
        },
        /// The disputed step was done again, and this is how it is; sent by rank 0.
        Settled {
            /// Of this generation.
            generation: Generation,
            /// The step.
            step: StepsCompleted,
            /// The item, on which all agree.
            digest: ItemDigest,
        },
        /// This rank's share of a checkpoint is on its way to the store.
        Saving {
            /// Of this generation.
            generation: Generation,
            /// The checkpoint's step.
            step: StepsCompleted,
        },
        /// Stands at a step boundary and waits.
        Paused {
            /// Of this generation.
            generation: Generation,
            /// Steps completed.
            step: StepsCompleted,
            /// Whether a checkpoint of this step is being written.
            saving: bool,
        },
        /// Liveness with the device thread's own progress.
        Heartbeat {
            /// Of this generation.
            generation: Generation,
            /// Steps completed.
            step: StepsCompleted,
            /// Grows with every bit of work the device thread does.
            progress: u64,
            /// What it does now.
            phase: String,
            /// Microseconds of one lane as of late; 0 where it is not known.
            lane_us: u64,
            /// Bytes of checkpoints that this process has stored: grows with each part of an upload.
            stored_bytes: u64,
        },
        /// One checkpoint shard lies in the store.
        ShardSaved {
            /// The checkpoint's step.
            step: StepsCompleted,
            /// The shard.
            shard: OptimizerShardIndex,
            /// Its object.
            key: String,
            /// Length in bytes.
            length: u64,
            /// BLAKE3 of the object.
            blake3: [u8; 32],
        },
        /// One checkpoint shard could not be stored.
        ShardLost {
            /// The generation that saved it.
            generation: Generation,
            /// The checkpoint's step.
            step: StepsCompleted,
            /// The shard.
            shard: OptimizerShardIndex,
            /// Why.
            cause: String,
            /// The store has no room left: only a person can help.
            full: bool,
        },
    }
}

/// A message body that does not decode.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed(pub String);

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "malformed control message: {}", self.0)
    }
}

macro_rules! codec {
    ($type:ty) => {
        impl $type {
            /// The message as bytes.
            ///
            /// # Errors
            /// If rkyv cannot serialise it (out of memory).
            pub fn encode(&self) -> Result<Vec<u8>, $crate::message::Malformed> {
                rkyv::to_bytes::<rkyv::rancor::Error>(self)
                    .map(|bytes| bytes.to_vec())
                    .map_err(|e| $crate::message::Malformed(e.to_string()))
            }

            /// The message in `bytes`, whatever their alignment.
            ///
            /// # Errors
            /// If they hold no such message.
            pub fn decode(bytes: &[u8]) -> Result<Self, $crate::message::Malformed> {
                let mut aligned = rkyv::util::AlignedVec::<16>::with_capacity(bytes.len());
                aligned.extend_from_slice(bytes);
                rkyv::from_bytes::<Self, rkyv::rancor::Error>(&aligned)
                    .map_err(|e| $crate::message::Malformed(e.to_string()))
            }
        }
    };
}
pub(crate) use codec;
codec!(ToRank);
codec!(FromRank);

#[cfg(test)]
mod tests {
    use super::Addresses;

    #[test]
    fn addresses_come_back_as_they_went_in() {
        let texts = ["unix:/tmp/a", "", "tcp:127.0.0.1:9", "unix:/tmp/\u{4e2d}"];
        let mut addresses = Addresses::from_iter(texts);
        assert_eq!(addresses.iter().collect::<Vec<_>>(), texts);
        addresses.clear();
        assert_eq!(addresses.iter().count(), 0);
        addresses.push("again");
        assert_eq!(addresses.iter().collect::<Vec<_>>(), ["again"]);
    }

    #[test]
    fn addresses_in_a_row_are_added_at_once() {
        let others = Addresses::from_iter(["a", "", "bc", "d"]);
        let mut addresses = Addresses::from_iter(["first"]);
        addresses.extend_from(&others, 1..3);
        addresses.extend_from(&others, 0..1);
        addresses.extend_from(&others, 2..2);
        addresses.extend_from(&others, 3..4);
        assert_eq!(addresses, Addresses::from_iter(["first", "", "bc", "a", "d"]));
    }

    #[test]
    fn damaged_addresses_are_none_and_no_panic() {
        let damaged = Addresses {
            text: "\u{4e2d}b".to_owned(),
            ends: vec![1, 4, 3, 9],
        };
        assert_eq!(damaged.iter().collect::<Vec<_>>(), ["", "", "", ""]);
    }
}
