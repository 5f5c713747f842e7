//! A terminal that stands still (Ctrl-S, a paused pager) takes nothing: neither training nor its end waits for it.

use crate::common::{assert_prefix, assert_undisturbed};
use rustix::process::Signal;
use tarazed_tests::harness::{Project, Run};

/// SUP-4, CKPT-6: with both outputs in a full pipe that nobody reads, a run trains, loses a rank (a loss is said at once),
/// goes on, and a signal still ends it with a checkpoint and code 34.
#[test]
fn a_terminal_that_stands_still_stops_neither_a_run_nor_its_end() {
    let project = Project::tiny();
    let train = project.train("unheard").ranks(2).steps(1_200);
    let mut run = Run::start_unheard(&train);
    run.wait_for_step(20);
    run.wait_for("a rank to kill", |run| run.kill_rank(1));
    run.wait_for("a recovery", |run| (!run.events("recovered").is_empty()).then_some(()));
    run.signal(Signal::TERM);
    run.finish().assert_code(34);
    let stopped_at = assert_prefix(&run);
    assert_eq!(run.newest_checkpoint(), stopped_at, "{}", run.tail());
    assert_eq!(run.processes().ranks(), [0_u32; 0], "ranks are left");
}

/// A run that ends by itself ends with 0, shown or not.
#[test]
fn a_run_that_nobody_hears_is_done_all_the_same() {
    let project = Project::tiny();
    let mut run = Run::start_unheard(&project.train("done").ranks(2).steps(30));
    assert_undisturbed(&mut run, 30, "unheard");
}
