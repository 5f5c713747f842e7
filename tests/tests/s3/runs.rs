//! The program itself with its checkpoints on S3.

use crate::place::Place;
use rustix::process::Signal;
use std::path::Path;
use tarazed_tests::harness::{Project, Run, Train, assert_prefix, assert_refused, assert_undisturbed};

/// Enough that a busy machine is still training when the run is stopped.
const STEPS: u64 = 400;

fn on_store(train: Train, url: &str) -> Train {
    train.steps(STEPS).set("checkpoint.store", url)
}

/// All that a run leaves on its machine, but its config, its trace and what goes with the trace.
fn lose(run_dir: &Path) {
    for entry in std::fs::read_dir(run_dir).expect("the run folder") {
        let entry = entry.expect("an entry");
        let name = entry.file_name();
        if name == "config.toml" || name == "trace.jsonl" || name == "weights.jsonl" {
            continue;
        }
        let removed = match entry.file_type().expect("a file type").is_dir() {
            true => std::fs::remove_dir_all(entry.path()),
            false => std::fs::remove_file(entry.path()),
        };
        removed.expect("removed");
    }
}

/// STEP-2, CKPT-1, CKPT-6: a run whose checkpoints are in a bucket loses a rank, is stopped, loses all that its machine held
/// but config, trace and weight trajectory, and goes on from the bucket at another world size; its trace is that of an undisturbed run.
#[test]
fn a_run_goes_on_from_its_bucket() {
    for place in Place::all() {
        let (name, url) = (place.name(), place.url());
        let project = place.project(Project::tiny());
        let mut run = Run::start(&on_store(project.train("bucket").ranks(2), &url));
        run.wait_for_step(25);
        assert!(run.kill_rank(1).is_some(), "{name}\n{}", run.tail());
        run.wait_for("a recovery", |run| (!run.events("recovered").is_empty()).then_some(()));
        let later = run.step() + 10;
        run.wait_for_step(later);
        run.signal(Signal::TERM);
        run.finish().assert_code(34);
        let stopped_at = assert_prefix(&run);
        assert!(stopped_at < STEPS, "{name}: it was done before it was stopped");
        assert_eq!(run.newest_checkpoint(), stopped_at, "{name}\n{}", run.tail());
        place.assert_silent(&run.tail());
        place.assert_untold(run.dir(), &url, &[]);
        assert!(!run.dir().join("store").exists(), "{name}: a folder besides the bucket");
        lose(run.dir());
        let again = on_store(project.train("bucket").ranks(3), &url).arg("--resume");
        let mut again = Run::start(&again);
        assert_undisturbed(&mut again, STEPS, name);
        let restored = again.events("generation");
        let base = restored.iter().find(|event| event["restored"] == true);
        assert_eq!(
            base.map(|event| &event["base"]),
            Some(&stopped_at.into()),
            "{name}\n{}",
            again.tail()
        );
        place.assert_untold(again.dir(), &url, &[]);
        look_at(&project, &url, name);
        export_from(&project, &url, again.dir(), name);
    }
}

/// While the shards of a checkpoint are on their way, `status` and the terminal say how many are there, and since when; the run
/// trains on. Once it is committed nothing is said of it any more.
#[test]
fn a_checkpoint_on_its_way_is_told() {
    const STORED: usize = 3;
    let place = Place::own();
    let (server, project) = (place.server(), place.project(Project::tiny()));
    let (train, url) = (project.train("told").ranks(2), place.url());
    let dir = project.run_dir("told").display().to_string();
    server.hold_shards_after(Some(STORED));
    let mut run = Run::start(&train.set("checkpoint.store", &url));
    let ask = |more: &[&str]| project.tarazed(&[&["status", "--run-dir", dir.as_str()][..], more].concat());
    let saving = || {
        let answer = ask(&["--json"]);
        let answer = (answer.code == Some(0)).then_some(answer.stdout)?;
        let answer: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
        Some(answer["saving"].clone())
    };
    let held = run.wait_for("three shards in the store", |_| {
        saving().filter(|saving| saving["stored"] == STORED)
    });
    assert_eq!(held["shards"], 8, "{held}");
    let step = held["step"].as_u64().expect("a step");
    let told = format!("saving step {step}: {STORED} of 8 shards, ");
    run.wait_for("a line of it", |run| {
        run.tail().contains(&format!("* {told}")).then_some(())
    });
    let later = run.step() + 10;
    run.wait_for_step(later);
    let table = ask(&[]);
    assert!(table.stdout.contains(&told), "{}", table.tail());
    let still = saving().expect("a live run");
    assert_eq!((&still["step"], &still["stored"]), (&held["step"], &held["stored"]));
    assert!(still["for_ms"].as_u64() >= Some(1_000), "{still}");
    assert_eq!(run.newest_checkpoint(), 0, "a part is none\n{}", run.tail());
    server.hold_shards_after(None);
    run.wait_for("the checkpoint", |run| (run.newest_checkpoint() >= step).then_some(()));
    run.wait_for("an answer without it", |_| {
        saving().filter(|saving| saving["step"] != held["step"])
    });
    run.signal(Signal::TERM);
    run.finish().assert_code(34);
    assert_eq!(run.newest_checkpoint(), assert_prefix(&run), "{}", run.tail());
    assert_eq!(saving(), Some(serde_json::Value::Null), "it is over");
}

/// The commands for people who look after checkpoints, and the second opinion, take the URL.
fn look_at(project: &Project, url: &str, name: &str) {
    let listed = project.tarazed(&["checkpoint", "ls", url]);
    listed.assert_code(0);
    assert!(listed.stdout.contains(&STEPS.to_string()), "{name}\n{}", listed.tail());
    project.tarazed(&["checkpoint", "verify", url]).assert_code(0);
    project.verify(&["bucket", url]).assert_code(0);
}

/// A bucket exports what its run does; config and tokenizer are the run's.
fn export_from(project: &Project, url: &str, run: &Path, name: &str) {
    let dir = run.to_str().expect("UTF-8");
    let exported = |to: &str, from: &[&str]| {
        let outcome = project.tarazed(&[&["export", "--to", to][..], from].concat());
        outcome.assert_code(0);
        std::fs::read(project.path().join(to).join("model.safetensors")).expect("weights")
    };
    let by_url = exported("by-url", &[url, "--run-dir", dir]);
    assert_eq!(by_url, exported("by-run", &[dir]), "{name}");
    let alone = project.tarazed(&["export", url, "--to", "alone"]);
    assert_refused(&alone, &[url, "does not hold its run's config"]);
}

/// A run that cannot use its bucket is refused before anything starts, with the remedy and without the secret.
#[test]
fn a_run_without_its_bucket_is_refused() {
    for place in Place::all() {
        let wrong = place.clone_with("AWS_SECRET_ACCESS_KEY", "wrong-horse-battery-staple");
        let missing = place.in_bucket("tarazed-no-such-bucket");
        for (place, remedy) in [(wrong, "check the credentials"), (missing, "create the bucket")] {
            let project = place.project(Project::tiny());
            let outcome = on_store(project.train("refused").ranks(2), &place.url()).finish();
            assert_refused(&outcome, &["s3://", remedy]);
            place.assert_silent(&outcome.tail());
            let looked = project.tarazed(&["checkpoint", "ls", &place.url()]);
            assert_refused(&looked, &["s3://", remedy]);
            place.assert_silent(&looked.tail());
            assert!(
                !project.run_dir("refused").exists(),
                "{}: something is left",
                place.name()
            );
        }
    }
}

/// CKPT-5: only the controller deletes. Ranks whose credentials do not allow it train, save and restore, and old checkpoints go.
#[test]
fn ranks_need_no_right_to_delete() {
    for place in Place::all() {
        let Some(of_ranks) = place.of_ranks() else { continue };
        of_ranks.run("no deletion");
        let project = place.project(Project::tiny());
        let url = place.url();
        let train = project.train("rights").ranks(2).steps(40);
        let train = train
            .set("checkpoint.store", &url)
            .set("checkpoint.interval_steps", "10");
        let mut run = Run::start(&train.set("checkpoint.keep_last", "1"));
        let first = run.wait_for("a checkpoint", |run| {
            Some(run.newest_checkpoint()).filter(|&step| step > 0)
        });
        assert!(run.kill_rank(0).is_some(), "{}", run.tail());
        assert_undisturbed(&mut run, 40, place.name());
        let listed = project.tarazed(&["checkpoint", "ls", &url, "--json"]);
        listed.assert_code(0);
        let listed: serde_json::Value = serde_json::from_str(&listed.stdout).expect("JSON");
        let of_state = |state: &str| {
            let all = listed.as_array().into_iter().flatten();
            let state = state.to_owned();
            all.filter(move |one| one["state"].as_str().is_some_and(|is| is.eq_ignore_ascii_case(&state)))
                .filter_map(|one| one["reference"]["step"].as_u64())
                .collect::<Vec<_>>()
        };
        assert!(of_state("committed").contains(&40), "{listed}");
        assert!(of_state("retired").contains(&first), "{listed}");
        place.assert_silent(&run.tail());
        place.assert_untold(run.dir(), &url, &[]);
    }
}

/// Ranks have other credentials than the controller, and these are wrong: the run says so where it cannot save.
#[test]
fn a_rank_that_may_not_write_is_heard_of() {
    for place in Place::all() {
        let place = place.clone_with("TARAZED_RANK_AWS_SECRET_ACCESS_KEY", "wrong-horse-battery-staple");
        let project = place.project(Project::tiny());
        let train = project.train("unheard").ranks(2).steps(12);
        let url = place.url();
        let outcome = train.set("checkpoint.store", &url).finish();
        assert_ne!(outcome.code, Some(0), "{}", outcome.tail());
        assert!(outcome.tail().contains("check the credentials"), "{}", outcome.tail());
        place.assert_silent(&outcome.tail());
        place.assert_untold(&project.run_dir("unheard"), &url, &[]);
    }
}
