//! Ranks on several hosts: what the controller wants of each node, and what each node has.
//!
//! Each side says *all* of it whenever something changes, and nothing is ever said as a difference. So a message that is lost
//! with a link, or an end that starts anew, costs one more message and no rule: whoever meets again tells everything, and what
//! was done already is seen to be done. [`roster`] is the controller's side, [`desk`] a node's; both are pure.
//!
//! - **SUP-2** A worker has at most one life at a time, and no incarnation is started twice, whichever end is lost in between.
//! - **NODE-1** Every life that is asked for is answered by one `StartFailed`, or by one `Started` and later one `Exited`;
//!   between these at most one `Ending`. A life whose node is away is answered when the node is back.
//! - A node that is away is no death of its ranks: they have their own way to the controller. One that is to be killed there
//!   counts as ending from then on, since it can do nothing any more (it is fenced), and its next life waits for its node.

pub mod desk;
pub mod roster;
#[cfg(test)]
mod tests;

use crate::message::{Member, codec};
use rkyv::{Archive, Deserialize, Serialize};

/// A life that the controller wants to know of.
#[derive(Clone, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub struct WantedLife {
    /// Who.
    pub member: Member,
    /// How long to wait before its start (back-off).
    pub after_ms: u64,
    /// An earlier controller started it: it is there, or has ended.
    pub adopt: bool,
    /// It is to end, for this reason.
    pub kill: Option<String>,
}

/// One life on a node.
#[derive(Clone, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub struct HeldLife {
    /// Who.
    pub member: Member,
    /// How it is.
    pub state: LifeState,
}

pub use wire::{FromNode, LifeState, ToNode};

mod wire {
    #![allow(
        missing_docs,
        reason = "rkyv generates public twins of the fields without documentation"
    )]

    use super::{HeldLife, WantedLife};
    use rkyv::{Archive, Deserialize, Serialize};

    /// What a node knows of a life.
    #[derive(Clone, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
    pub enum LifeState {
        /// Told to start.
        Starting,
        /// Its process runs.
        Running {
            /// Process id on its host.
            pid: u32,
        },
        /// Its process was killed or crashed, and is not gone yet.
        Ending {
            /// Process id on its host.
            pid: u32,
            /// The reason for which its node killed it, if that did.
            killed: Option<String>,
        },
        /// Its process is gone.
        Over {
            /// How it ended, and its last words.
            cause: String,
            /// By itself, with code 0.
            orderly: bool,
        },
        /// It never came to be.
        NotStarted {
            /// Why.
            cause: String,
        },
    }

    /// The controller to a node.
    #[derive(Clone, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
    pub enum ToNode {
        /// All lives that it wants to know of.
        Want(Vec<WantedLife>),
        /// This node can be none of this run, for this reason.
        Refused(String),
        /// The run is over, or its controller ends in order: end what is left, and leave.
        End {
            /// The controller's exit code.
            code: u8,
        },
    }

    /// A node to the controller.
    #[derive(Clone, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
    pub enum FromNode {
        /// The first word on every link.
        Hello {
            /// BLAKE3 of its program: another one computes other numbers (DET-4).
            binary: [u8; 32],
            /// Its host's name, for people.
            host: String,
            /// All lives that it knows of.
            lives: Vec<HeldLife>,
        },
        /// All lives that it knows of.
        Have(Vec<HeldLife>),
    }
}

impl LifeState {
    /// Whether there is, or may come to be, a process of it.
    #[must_use]
    pub const fn is_alive(&self) -> bool {
        matches!(self, Self::Starting | Self::Running { .. } | Self::Ending { .. })
    }
}

codec!(ToNode);
codec!(FromNode);
