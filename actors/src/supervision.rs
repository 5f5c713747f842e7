//! The supervision tree: who is whose parent, and what a death means (SUP-1).
//!
//! ```text
//! controller process                                     rank process
//!   Root                                                   RankRoot
//!   ├─ Coordinator       roster, generations, ledger         ├─ Rank              commands in, reports out
//!   ├─ Tsm               signals of each line                │   └─ OptimizerShard × k  snapshots of what is held
//!   ├─ Ate               decisions                           ├─ DataFeeder        samples ahead of time
//!   ├─ Dmu               the data cursor                     ├─ CheckpointWriter  uploads
//!   ├─ Checkpointer      commit, locate, collect             └─ Switchboard       the uplink
//!   ├─ OptimizerSharder  who holds which shard                   └─ SessionHost └─ session
//!   ├─ Observatory       metrics, events, notices          + one device thread: the step as a straight line
//!   ├─ Switchboard       the hub                           + the feeder's thread
//!   │   ├─ Acceptor      callers that prove themselves
//!   │   └─ SessionHost └─ session × n
//!   └─ NodeAgent
//!       └─ RankProcess × n  spawn, pidfd, kill, reap
//!
//! with ranks on several hosts, instead of NodeAgent:      node process, one for each host
//!   └─ Nodes               who is to live where             NodeHost           what lives here
//!       └─ Switchboard     the nodes' hub                     ├─ NodeAgent └─ RankProcess × n
//!           └─ as above                                       └─ Switchboard the uplink
//! ```
//!
//! | who dies | who decides, where | what it means |
//! |---|---|---|
//! | a rank process | the membership machine (`protocol::coordinator`) | survivors go on in a new generation; it is started again within a budget (SUP-3) |
//! | a node process | nobody: its ranks go on, and the next one on its host finds them (`node/host.rs`) | as `Kill`s of its ranks are asked for, they count as ending (`protocol::nodes`) |
//! | an actor of a node process | NodeHost, `node/host.rs` | the agent's: the process ends with the cause, and its ranks with it; the uplink's: the link is made again |
//! | a `RankProcess` | NodeAgent, `node/agent.rs` | its process is killed and reported as an exit of its own kind; then as above |
//! | an actor of a rank process | RankRoot, `rank/root.rs`; for an `OptimizerShard` Rank first, which fails too | the process ends with the cause: a whole rank is replaced, never half of one |
//! | Tsm, Ate or Dmu | Root, `controller/root.rs` | all three are made again from the committed trace, within a budget; they hold nothing else (DATA-2, LOOP-1) |
//! | a session | SessionHost, `link/session.rs` | its peer is disconnected: the membership machine hears of it |
//! | another part of the link | Switchboard, `link/switchboard.rs`, which ends all sessions and fails | as the death of its process's own actor |
//! | any other actor of the controller | Root, `controller/root.rs` | the run halts with the chain of causes; the trace and the checkpoints are whole, and the next start resumes |
//!
//! - **SUP-1** Every actor has a parent that decides what its death means; an unhandled error climbs with its root cause.
//! - **SUP-3** No restart loop spins: budgets are `protocol::restart`.

use ractor::{ActorCell, SupervisionEvent};

/// A child's end, as its parent sees it.
#[derive(Debug)]
pub struct Death {
    /// Who.
    pub child: ActorCell,
    /// Why; an orderly stop without a reason says so.
    pub cause: String,
    /// It stopped by itself or was told to, and did not fail.
    pub orderly: bool,
}

/// Reads a supervision event; none for those that are no death.
#[must_use]
pub fn death(event: SupervisionEvent) -> Option<Death> {
    match event {
        SupervisionEvent::ActorFailed(child, error) => Some(Death {
            child,
            cause: format!("failed: {error}"),
            orderly: false,
        }),
        SupervisionEvent::ActorTerminated(child, _, reason) => Some(Death {
            child,
            cause: reason.unwrap_or_else(|| "stopped".to_owned()),
            orderly: true,
        }),
        _ => None,
    }
}
