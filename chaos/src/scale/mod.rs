//! Worlds of a hundred thousand ranks over weeks: the runtime's membership machine alone, without actors, processes or
//! any I/O, in virtual time.
//!
//! ```text
//! seed, published failure rates (causes) -> faults -> fleet of processes, hosts, spares --events--> Coordinator
//!                 cost model (cost)                         ^----------------------------effects-------'
//! ```
//!
//! What decides is production code: `tarazed_protocol::coordinator::Coordinator`, and through it the agreement, the sharder
//! and the restart limits. It hears every message that it would hear: each exit, each answer to each fence, each pause.
//! What is modelled, and only that, is what the machine does not do: how long things take ([`cost`]), what fails
//! ([`causes`]), and the steps between two events, which are counted and not computed ([`ledger`]).
//!
//! Checked in every run, and an error of the run if not so:
//!
//! - a plan keeps and copies only shards that their holder has whole, gives each shard distinct holders and each lane one;
//! - no committed step is given up while a copy of every shard lives, and no restore comes without need (STEP-2);
//! - nobody is replaced for a result that it had right (DET-3);
//! - every millisecond is accounted for once, and every step given up is computed again or still to be;
//! - the same setup gives the same digest (tests run it twice).
//!
//! What it does not show: the data plane (a full mesh of so many ranks is no option), the control link (whose largest
//! message a plan for so many ranks may not fit into: the report says so), the controller's own death, stragglers, and
//! corruption that no replica shows. Several hosts are not built yet: spares, draining and the node agent's word for a
//! host that is gone are assumptions, stated in [`causes`] and [`fleet`].

pub mod causes;
pub mod command;
pub mod cost;
pub mod figure;
pub mod fleet;
pub mod ledger;
pub mod report;
pub mod setup;
pub mod sweep;
pub mod young_daly;

mod doubt;
mod holdings;
mod play;
mod saves;
mod world;

use report::Report;
use setup::Setup;

/// Simulates a world.
///
/// # Errors
/// If the setup makes no world; what goes wrong in it stands in the report.
pub fn run(setup: Setup) -> Result<Report, String> {
    setup.check()?;
    let finished = world::World::new(&setup).run();
    Ok(Report::of(setup, finished))
}
