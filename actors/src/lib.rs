//! Floor 4: the shells around the state machines, and the supervision tree. Begin at [`supervision`].
//!
//! Actors translate between messages and the machines of `tarazed-protocol`; they do not decide. Tensors never pass
//! through a mailbox, and no handler blocks (SUP-4).

pub mod blocking;
pub mod controller;
pub mod later_data;
pub mod link;
pub mod node;
pub mod rank;
pub mod run_folder;
pub mod supervision;
