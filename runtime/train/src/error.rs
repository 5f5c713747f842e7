//! Why a device thread left a step, and what its caller does next.

use tarazed_domain::{OptimizerShardIndex, Rank, StepsCompleted};
use tarazed_fabric::FabricError;
use tarazed_kernels::DeviceError;
use tarazed_model::ModelError;

/// A step, or the start of a generation, that did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The generation is over for this rank: wait for the next plan.
    #[error("aborted: the generation is over for this rank")]
    Aborted,
    /// A peer is gone, slow or wrong: report it and wait for the next plan.
    #[error("data plane: {0}")]
    Fabric(FabricError),
    /// The state of this rank or of a peer is wrong (DET-3): halt.
    #[error(
        "optimizer shard {shard} differs between its primary, rank {primary}, and its replica, rank {replica}, after \
         step {step}: silent data corruption on one of the two"
    )]
    Diverged {
        /// The shard.
        shard: OptimizerShardIndex,
        /// Its primary.
        primary: Rank,
        /// The replica that compared.
        replica: Rank,
        /// After which step.
        step: StepsCompleted,
    },
    /// Loss or gradient norm is not a number (or infinite): halt, the same would come again.
    #[error("step {step} gives loss {loss} and gradient norm {grad_norm}; lower the learning rate or look at its data")]
    NotFinite {
        /// The step.
        step: StepsCompleted,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
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
    /// Samples could not be read or planned: this rank must be replaced; halt if it comes again.
    #[error("data: {0}")]
    Data(String),
    /// A checkpoint shard could not be read back.
    #[error("restore: {0}")]
    Restore(String),
}

impl StepError {
    /// Peers the error names, if any.
    #[must_use]
    pub fn suspects(&self) -> Vec<Rank> {
        match self {
            Self::Fabric(error) => error.peer().into_iter().collect(),
            Self::Diverged { primary, replica, .. } => vec![*primary, *replica],
            Self::Malformed { from, .. } => vec![*from],
            _ => Vec::new(),
        }
    }

    /// Whether the state itself is in doubt, so that going on would be wrong.
    #[must_use]
    pub const fn is_corruption(&self) -> bool {
        matches!(
            self,
            Self::Diverged { .. } | Self::NotFinite { .. } | Self::Malformed { .. }
        )
    }

    /// Whether this process must end and be replaced.
    #[must_use]
    pub const fn is_own_fault(&self) -> bool {
        matches!(self, Self::Device(_) | Self::Data(_) | Self::Restore(_))
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
