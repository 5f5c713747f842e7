//! Why a device thread left a step, and what its caller does next.

use tarazed_domain::{OptimizerShardIndex, Rank, StepsCompleted};
use tarazed_fabric::{CommunicatorFault, FabricError, Remedy};
use tarazed_kernels::DeviceError;
use tarazed_model::ModelError;
use tarazed_protocol::message::{Dispute, DisputedItem};

/// A step, or the start of a generation, that did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The generation is over for this rank: wait for the next plan.
    #[error("aborted: the generation is over for this rank")]
    Aborted,
    /// A peer is gone, slow or wrong: report it and wait for the next plan.
    #[error("data plane: {0}")]
    Fabric(FabricError),
    /// The state of this rank or of a peer is wrong (DET-3): every rank sees the same claims. Restore, and do it again.
    #[error("{} differs between ranks after step {}: silent data corruption on one of them", .0.item, .0.step)]
    Disputed(Dispute),
    /// Loss or gradient norm is not a number (or infinite): restore, and do it again; where the same comes again, halt.
    #[error("step {step} gives loss {loss} and gradient norm {grad_norm}; lower the learning rate or look at its data")]
    NotFinite {
        /// The step.
        step: StepsCompleted,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
    },
    /// What a generation is about to begin from is not what the trace says of its step: restore, from another checkpoint if
    /// it comes from one (DET-3).
    #[error(
        "the state that was restored or copied for step {step} is not the one its trace line names: state was {recorded}, \
         now {found} (DET-3)"
    )]
    OtherBase {
        /// The step.
        step: StepsCompleted,
        /// The state's hash in the line.
        recorded: String,
        /// And here.
        found: String,
    },
    /// A peer's message does not decode: halt, two programs differ.
    #[error("rank {from} sent {what} that does not decode: {cause}")]
    Malformed {
        /// From whom.
        from: Rank,
        /// What.
        what: &'static str,
        /// Why.
        cause: String,
    },
    /// The device failed: this rank must be replaced.
    #[error("device: {0}")]
    Device(#[from] DeviceError),
    /// This rank's own memory has changed by itself: it must be replaced (DET-3).
    #[error(
        "silent data corruption in this process: optimizer shard {shard}, as of step {step}, has changed by itself"
    )]
    Rotten {
        /// The shard.
        shard: OptimizerShardIndex,
        /// As of which step.
        step: StepsCompleted,
    },
    /// Samples could not be read or planned: this rank must be replaced; halt if it comes again.
    #[error("data: {0}")]
    Data(String),
    /// A checkpoint shard could not be read, or is bad and none of the run's own but one that it begins with: this rank must be
    /// replaced.
    #[error("restore: {0}")]
    Restore(String),
    /// A checkpoint shard is not what its manifest says, or is not there: restore from an older checkpoint (CKPT-4).
    #[error("the checkpoint of step {step} is bad: {cause}")]
    BadCheckpoint {
        /// Its step.
        step: StepsCompleted,
        /// What is wrong with it.
        cause: String,
    },
}

impl StepError {
    /// Peers the error names, if any.
    #[must_use]
    pub fn suspects(&self) -> Vec<Rank> {
        match self {
            Self::Fabric(error) => error.peer().into_iter().collect(),
            Self::Disputed(dispute) => dispute.claims.iter().map(|claim| claim.rank).collect(),
            Self::Malformed { from, .. } => vec![*from],
            _ => Vec::new(),
        }
    }

    /// The state itself is in doubt, so that going on would be wrong.
    #[must_use]
    pub fn dispute(&self) -> Option<Dispute> {
        match self {
            Self::Disputed(dispute) => Some(dispute.clone()),
            Self::NotFinite { step, .. } => Some(Dispute {
                step: *step,
                item: DisputedItem::Finite,
                claims: Vec::new(),
            }),
            Self::OtherBase { step, .. } => Some(Dispute {
                step: *step,
                item: DisputedItem::Base,
                claims: Vec::new(),
            }),
            Self::BadCheckpoint { step, .. } => Some(Dispute {
                step: *step,
                item: DisputedItem::Checkpoint,
                claims: Vec::new(),
            }),
            _ => None,
        }
    }

    /// Whether no other try can help.
    #[must_use]
    pub const fn is_fatal(&self) -> bool {
        match self {
            Self::Malformed { .. } => true,
            Self::Fabric(FabricError::Communicator { fault, .. }) => matches!(fault, CommunicatorFault::Usage),
            _ => false,
        }
    }

    /// What the device's memory was too small for, without a remedy: a plan knows which helps most.
    #[must_use]
    pub fn shortage(&self) -> Option<String> {
        match self {
            Self::Device(error) => error.shortage(),
            _ => None,
        }
    }

    /// Whether this process must end and be replaced.
    #[must_use]
    pub const fn is_own_fault(&self) -> bool {
        match self {
            Self::Device(_) | Self::Data(_) | Self::Restore(_) | Self::Rotten { .. } => true,
            Self::Fabric(error) => matches!(error.remedy(), Remedy::Replace),
            _ => false,
        }
    }
}

impl From<FabricError> for StepError {
    fn from(error: FabricError) -> Self {
        if matches!(error, FabricError::Aborted { .. }) {
            Self::Aborted
        } else {
            Self::Fabric(error)
        }
    }
}

impl From<ModelError> for StepError {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Aborted => Self::Aborted,
            ModelError::Device(error) => Self::Device(error),
            error @ ModelError::Input { .. } => Self::Data(error.to_string()),
        }
    }
}
