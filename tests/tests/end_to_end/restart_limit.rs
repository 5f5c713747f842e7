//! What dies at every start is given up, with its chain of causes.

use crate::common::{assert_halted, assert_undisturbed, damage, files_with_ending};
use tarazed_tests::harness::{Project, Run, lines};

/// Starts a run, damages its prepared data under it, which running ranks have read and checked already, kills the given
/// ranks, and returns the run and the bytes that were there.
#[track_caller]
fn with_damaged_data(project: &Project, kill: &[u32]) -> (Run, std::path::PathBuf, Vec<u8>) {
    let mut run = Run::start(&project.train("limit").ranks(4).steps(1_100));
    run.wait_for_step(25);
    let shard = files_with_ending(&run.dir().join("data"), ".tokens").remove(0);
    let good = std::fs::read(&shard).expect("a token shard");
    damage(&shard);
    for &worker in kill {
        assert!(run.kill_rank(worker).is_some(), "{}", run.tail());
    }
    (run, shard, good)
}

/// SUP-1, SUP-3, DATA-3: a worker that dies at every start halts the run after a bounded number of tries, with code 3
/// and every cause down to the file at fault; nothing is lost, and with the file repaired the run goes on.
#[test]
fn a_worker_that_dies_at_every_start_halts_the_run() {
    let project = Project::tiny();
    let (mut run, shard, good) = with_damaged_data(&project, &[1]);
    let outcome = run.finish();
    let file = shard.file_name().expect("a name").to_string_lossy().into_owned();
    assert_halted(
        &outcome,
        &[
            "worker 1 died 5 times",
            "SIGKILL",
            "exit code",
            &file,
            "delete the folder",
        ],
    );
    let lost = run.events("rank_lost");
    assert!((4..=5).contains(&lost.len()), "bounded: {lost:?}\n{}", run.tail());
    assert!(lost.iter().all(|event| event["worker"] == 1), "{lost:?}");
    assert_eq!(run.processes().ranks(), [0_u32; 0], "ranks are left\n{}", run.tail());
    assert!(!lines(&run.trace()).is_empty());

    std::fs::write(&shard, good).expect("repaired");
    let mut again = Run::start(&project.train("limit").ranks(4).steps(1_100));
    assert_undisturbed(&mut again, 1_100, "after the repair");
}

/// SUP-3: the same where no rank survives that could make progress meanwhile.
#[test]
fn a_whole_cluster_that_dies_at_every_start_halts_the_run() {
    let project = Project::tiny_with(&[("fault.restarts_max", "3")]);
    let (mut run, shard, _) = with_damaged_data(&project, &[0, 1, 2, 3]);
    let file = shard.file_name().expect("a name").to_string_lossy().into_owned();
    assert_halted(&run.finish(), &["died 3 times", &file]);
    let lost = run.events("rank_lost");
    assert!(lost.len() <= 4 * 3, "bounded: {lost:?}");
    assert_eq!(run.processes().ranks(), [0_u32; 0], "ranks are left\n{}", run.tail());
}

/// SUP-1: a rank that fails in the middle of its work ends with its own cause as last words; nobody kills it before it has
/// spoken. Here it can open no socket for the generation that a peer's death makes necessary.
#[test]
fn a_rank_that_fails_at_work_says_why() {
    let project = Project::tiny();
    let mut run = Run::start(&project.train("words").ranks(2).steps(1_100));
    run.wait_for_step(25);
    run.wait_for("a worker to starve", |run| run.starve_of_descriptors(0).then_some(()));
    run.wait_for("a worker to kill", |run| run.kill_rank(1));
    assert_undisturbed(&mut run, 600, "after a rank without descriptors");
    let lost = run.events("rank_lost");
    let starved = lost
        .iter()
        .find(|event| event["worker"] == 0 && event["incarnation"] == 0)
        .expect("it fails");
    let cause = starved["cause"].as_str().expect("text");
    assert!(cause.contains("last words") && cause.contains("open files"), "{cause}");
}
