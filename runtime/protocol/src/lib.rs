//! Floor 1: every decision of the runtime as a pure state machine, `on_event(now, event) -> effects`.
//!
//! No clock, no I/O, no async, no randomness of its own: time and facts come in as events, and what should be done goes
//! out as effects. The actors are shells around these machines, and a simulator can run the same ones.
//!
//! | module | decides |
//! |---|---|
//! | [`coordinator`] | who is in which generation, fence, begin, pause, stop (SUP-2, DESIGN.md section 6) |
//! | [`commit`] | which step the survivors agree on (STEP-1, STEP-2) |
//! | [`sharder`] | which worker holds which optimizer shard (DESIGN.md section 4); [`placement`] is what it says |
//! | [`restart`] | whether a dead worker or actor is started again (SUP-3) |
//! | [`ledger`] | which trace lines are written and which are only checked (STEP-3, STEP-5, DET-3) |
//! | [`rollback`] | which states training goes on from where it was rolled back |
//! | [`checkpoint`] | when a checkpoint is whole and may be committed (CKPT-1) |
//! | [`schedule`] | when a checkpoint is due by the clock, also after Young and Daly |
//! | [`data`] | samples, mixture, signals and decisions (DATA-1, DATA-2, LOOP-1) |
//! | [`nodes`] | which processes each host is to have, and what became of them (SUP-2, NODE-1) |
//! | [`message`] | what travels between controller and ranks |
//! | [`trace`] | a line of the committed trace |

pub mod checkpoint;
pub mod commit;
pub mod coordinator;
pub mod data;
pub mod ledger;
pub mod message;
pub mod nodes;
pub mod placement;
pub mod restart;
pub mod rollback;
pub mod schedule;
pub mod sharder;
pub mod trace;
