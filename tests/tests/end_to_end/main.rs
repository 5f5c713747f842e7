//! End to end: the program itself on tiny models, killed, stopped, resumed, resized, misled and starved while it
//! trains.
//!
//! One promise (DESIGN.md section 1) stands behind most of it: whatever happens, the committed trace is byte for byte
//! that of a run on one rank in which nothing happened ([`tarazed_tests::harness::undisturbed`]). Each test says which
//! invariants it covers. Tests that choose at random say their seed when they fail; `TARAZED_TEST_SEED` sets it.
//!
//! What this does not do: simulated time and thousands of schedules, larger models, other machines.

mod bad_input;
mod checkpoints;
mod common;
mod corruption;
mod damage;
mod dashboard;
mod double_loss;
mod epochs;
mod eval;
mod export;
mod import;
mod kills;
mod live_data;
mod nodes;
mod quickstart;
mod restart_limit;
mod resume;
mod rollback;
mod status;
mod storm;
mod straggler;
mod surroundings;
mod takeover;
mod telemetry;
mod terminal;
mod weights;
mod worlds;
