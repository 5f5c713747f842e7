//! Identities. Index, count and size are different types; identity is (worker, incarnation), never an address (SUP-2).

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default,
            Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The value as an array index.
            #[must_use]
            pub const fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(/// A stable slot in the cluster; it outlives the processes that fill it.
    WorkerId(u32));
id!(/// Which life of a worker: 0 for the first process, one more for each replacement.
    Incarnation(u32));
id!(/// Number of the agreed world. It fences every message, communicator and object key.
    Generation(u64));
id!(/// Dense position in one generation's roster.
    Rank(u32));
id!(/// One fixed slice of the global batch.
    LaneIndex(u32));
id!(/// One optimizer shard: master weights and both moments of one range of blocks.
    OptimizerShardIndex(u32));
id!(/// One fixed block of the flat parameter space.
    BlockIndex(u32));
id!(/// Position of a data domain in the config.
    DomainIndex(u16));
id!(/// The optimizer update being run, from 0.
    StepIndex(u64));
id!(/// A count of optimizer updates done; the `step` of a trace line and of a checkpoint.
    StepsCompleted(u64));

impl StepIndex {
    /// The count once this step is done.
    #[must_use]
    pub const fn completed(self) -> StepsCompleted {
        StepsCompleted(self.0 + 1)
    }
}

impl StepsCompleted {
    /// The step to run next.
    #[must_use]
    pub const fn next(self) -> StepIndex {
        StepIndex(self.0)
    }
}

impl Generation {
    /// The generation after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Incarnation {
    /// The life after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}
