//! Silent data corruption: one bit of one rank's memory flips, and nobody says so. What might be its work and is not, too: a
//! loss that is no number.

use crate::common::{assert_halted, assert_undisturbed};
use tarazed_tests::harness::{Project, Run, assert_same_trace, line_count};

const STEPS: u64 = 160;

/// Bits to flip, as `WORKER.INCARNATION=STEP:PLACE:SHARD:ELEMENT:BIT`.
const FLIP: &str = "TARAZED_CHAOS_FLIP";

/// The workers that events of this kind name, event by event.
fn named(run: &Run, kind: &str) -> Vec<Vec<u64>> {
    let workers = |event: &serde_json::Value| {
        let workers = event["workers"].as_array().expect("a list").iter();
        workers.filter_map(serde_json::Value::as_u64).collect()
    };
    run.events(kind).iter().map(workers).collect()
}

#[track_caller]
fn assert_only_the_culprit_was_replaced(run: &Run, worker: u64, what: &str) {
    let disputed = named(run, "disputed");
    assert_eq!(disputed.len(), 1, "{what}: {disputed:?}\n{}", run.tail());
    assert!(disputed[0].contains(&worker), "{what}: {disputed:?}");
    assert_eq!(named(run, "convicted"), [vec![worker]], "{what}\n{}", run.tail());
    assert_lost_for_corruption(run, worker, what);
}

#[track_caller]
fn assert_lost_for_corruption(run: &Run, worker: u64, what: &str) {
    let lost = run.events("rank_lost");
    assert_eq!(lost.len(), 1, "{what}: {lost:?}");
    assert_eq!(lost[0]["worker"], worker, "{what}: {lost:?}");
    assert!(
        lost[0]["cause"].to_string().contains("silent data corruption"),
        "{lost:?}"
    );
}

/// DET-3: a bit of the optimizer state flips, on a primary or on a replica. Its rank sees it before anybody has used it, and
/// is replaced; the others go on with their copies. No line of the trace shows it.
#[test]
fn a_flipped_bit_of_the_optimizer_state_is_found_and_its_rank_replaced() {
    for (worker, place) in [(0, "master"), (1, "first"), (2, "second")] {
        let project = Project::tiny_with(&[("checkpoint.interval_steps", "0")]);
        let flip = format!("{worker}.0=57:{place}:3:70:22");
        let mut run = Run::start(&project.train(place).ranks(3).steps(STEPS).variable(FLIP, &flip));
        assert_undisturbed(&mut run, STEPS, place);
        assert_eq!(run.events("disputed").len(), 0, "{place}\n{}", run.tail());
        assert_eq!(run.events("state_lost").len(), 0, "{place}\n{}", run.tail());
        assert_lost_for_corruption(&run, worker, place);
    }
}

/// DET-3: the same where nobody has another copy: the state comes from a checkpoint.
#[test]
fn a_flipped_bit_of_the_only_copy_is_found_too() {
    let project = Project::tiny_with(&[("optimizer.replicas", "1")]);
    let train = project.train("single").ranks(2).steps(STEPS);
    let mut run = Run::start(&train.variable(FLIP, "1.0=57:second:3:70:22"));
    assert_undisturbed(&mut run, STEPS, "a single copy");
    assert_eq!(run.events("state_lost").len(), 1, "{}", run.tail());
    assert_lost_for_corruption(&run, 1, "a single copy");
}

/// DET-3: a rank computes an update wrong. The hashes tell at the same step, the steps since the last checkpoint are done
/// again, the result tells whose copy was wrong, and that rank is replaced. No line of the trace shows it.
#[test]
fn a_wrong_update_is_found_and_its_rank_replaced() {
    for worker in [0, 2] {
        let project = Project::tiny();
        let flip = format!("{worker}.0=57:update:3:70:22");
        let mut run = Run::start(&project.train("update").ranks(3).steps(STEPS).variable(FLIP, &flip));
        assert_undisturbed(&mut run, STEPS, "update");
        assert_only_the_culprit_was_replaced(&run, worker, "update");
    }
}

/// DET-3: with three copies two of them agree, and the run goes on without a restore.
#[test]
fn two_of_three_copies_overrule_the_third() {
    let project = Project::tiny_with(&[("optimizer.replicas", "3"), ("checkpoint.interval_steps", "0")]);
    let train = project.train("three").ranks(4).steps(STEPS);
    let mut run = Run::start(&train.variable(FLIP, "2.0=57:update:1:70:22"));
    assert_undisturbed(&mut run, STEPS, "three copies");
    assert_eq!(named(&run, "convicted"), [vec![2]], "{}", run.tail());
    assert_eq!(run.events("state_lost").len(), 0, "{}", run.tail());
    let restored: Vec<_> = run.events("generation").iter().map(|g| g["restored"].clone()).collect();
    assert!(restored[1..].iter().all(|restored| restored == false), "{restored:?}");
}

/// DET-3: a bit of a working weight flips, so that a rank computes wrong gradients, which primaries and replicas agree on.
/// An audit finds it: another rank computes the lane again.
#[test]
fn a_flipped_working_weight_is_found_by_an_audit() {
    let project = Project::tiny_with(&[("fault.audit_interval_steps", "1")]);
    // Eight lanes on eight ranks, audited in turn: step 59 audits lane 3. The element is of a layer's weights.
    let train = project.train("weight").ranks(8).steps(STEPS);
    let mut run = Run::start(&train.variable(FLIP, "3.0=58:weight:0:20000:29"));
    assert_undisturbed(&mut run, STEPS, "a wrong lane");
    assert_only_the_culprit_was_replaced(&run, 3, "a wrong lane");
}

/// DET-3: a bit of a lane's gradient flips after it was computed, before it is added to others and sent. The audit of that lane
/// finds it.
#[test]
fn a_flipped_gradient_is_found_by_an_audit() {
    let project = Project::tiny_with(&[("fault.audit_interval_steps", "1")]);
    // Step 61 audits lane 5, which is all that worker 5 computes.
    let train = project.train("gradient").ranks(8).steps(STEPS);
    let mut run = Run::start(&train.variable(FLIP, "5.0=60:gradient:0:20000:29"));
    assert_undisturbed(&mut run, STEPS, "a wrong gradient");
    assert_only_the_culprit_was_replaced(&run, 5, "a wrong gradient");
}

/// DET-1, DET-3: a loss that is no number is in no line. It may be one rank's accident, so the step is done again from a
/// restored state; what comes again is of the run itself, and halts it with the step named: at the same step in every world,
/// with the same lines before it, and nobody is replaced.
#[test]
fn a_loss_that_is_no_number_halts_the_run_at_its_step() {
    // Weights come to be of the order of the rate, and products of theirs leave the range of numbers.
    let project = Project::tiny_with(&[("optimizer.learning_rate", "1e15")]);
    let mut traces = Vec::new();
    for ranks in [1, 3] {
        let mut run = Run::start(&project.train(&format!("ranks{ranks}")).ranks(ranks).steps(STEPS));
        let outcome = run.finish();
        let lines = line_count(&run.trace());
        assert!(lines > 0, "the first step is sound\n{}", run.tail());
        let step = format!("step {} gives loss ", lines + 1);
        assert_halted(
            &outcome,
            &["lower the learning rate", &step, "done again, with the same result"],
        );
        assert_eq!(run.events("disputed").len(), 1, "{}", run.tail());
        assert_eq!(run.events("rank_lost").len(), 0, "{}", run.tail());
        assert_eq!(run.processes().ranks(), [0_u32; 0], "ranks are left\n{}", run.tail());
        traces.push(run.trace());
    }
    assert_same_trace(&traces[1], &traces[0], "three ranks and one");
}

/// DET-3: what comes again each time that the step is done was no accident: the run halts, with the ranks named.
#[test]
fn corruption_that_comes_again_halts_the_run() {
    let project = Project::tiny_with(&[("fault.restarts_max", "100")]);
    let train = project.train("again").ranks(2).steps(STEPS);
    // A plus: each time that the step is done.
    let outcome = train.variable(FLIP, "1.0=57+:update:0:70:22").finish();
    assert_halted(&outcome, &["differs each time", "worker 1", "look at their machines"]);
}
