//! The `tarazed` binary's parts: commands, planning, progress lines, telemetry (floor 5).
//!
//! Commands parse, call the floors below and turn what comes back into text and an exit code; they decide nothing about
//! training. [`plan`] and [`progress`] are pure: no clock, no I/O. So is most of [`mixture`], the comparison of mixtures.

pub mod choices;
pub mod cli;
pub mod commands;
pub mod dashboard;
pub mod exit;
pub mod finale;
#[cfg(feature = "cuda")]
pub mod gpu_check;
pub mod hugging_face;
pub mod inference;
pub mod initial;
pub mod mixture;
pub mod outlet;
pub mod output;
pub mod panics;
pub mod plan;
pub mod progress;
pub mod run_folder;
pub mod screen;
pub mod signals;
pub mod source;
pub mod telemetry;
pub mod watch;
