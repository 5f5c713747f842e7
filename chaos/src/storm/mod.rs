//! Storms: real processes, harmed in real ways, and held to the trace of a run that nothing happened to.
//!
//! `tarazed-chaos storm SCENARIO` starts the real program as a scheduler would, with a proxy in front of every rank's data
//! plane, of the controller's hub and of the object store, and its run folder on a small disk. It does faults as the scenario
//! says, starts the controller again whenever it ends in a way that asks for it, and at the end compares the trace with that
//! of one undisturbed rank, byte for byte.
//!
//! - A fault counts as done when something ran into it: a cut that swallowed nothing, or an outage that nobody noticed
//!   because nobody asked, does not.
//! - A kind that this machine cannot do is named in the report, and the storm fails.
//! - What is drawn is a function of the seed; what it meets is not, for real processes run at their own times.
//!
//! It knows nothing of the insides of the program: it uses command line, files, exit codes and the bytes on the wire, of
//! which it reads the greeting alone. What the simulator beside it does in virtual time is not repeated here.

pub mod book;
pub mod calm;
pub mod command;
mod deck;
mod deed;
pub mod files;
pub mod kind;
mod life;
mod machine;
mod network;
mod processes;
pub mod report;
mod run;
pub mod scenario;
mod store;
pub mod undisturbed;
