//! Floor 0: the words every other crate speaks.
//!
//! Ids, lanes and their aligned tree, the block and shard layout of the flat parameter space, limits with their units,
//! and the config schema. This crate starts no thread, reads no clock and writes nothing; [`config::Config::load`] alone
//! reads a file, and asks for the working directory.

pub mod config;
pub mod ids;
pub mod lanes;
pub mod layout;
pub mod limits;
pub mod mutant;

pub use config::CheckpointInterval;
pub use ids::{
    BlockIndex, DomainIndex, Generation, Incarnation, LaneIndex, OptimizerShardIndex, Rank, StepIndex, StepsCompleted,
    WorkerId,
};
pub use lanes::{LaneRange, LaneTree, Node};
pub use layout::{ParameterLayout, ShardLayout, TensorSlot};
pub use mutant::Mutant;
