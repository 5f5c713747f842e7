//! Credentials that expire, are forgotten or changed, and clocks that differ: at a start, while a run trains, and when it must
//! restore. On the project's own server alone: no other lets itself be harmed so.

use crate::place::Place;
use rustix::process::Signal;
use tarazed_s3::{Credentials, Server, Standing};
use tarazed_tests::harness::{Project, Run, Train, assert_halted, assert_prefix, assert_refused};

/// Steps that nobody waits for: each run here is stopped.
const STEPS: u64 = 1_200;
const INTERVAL: u64 = 10;
/// A session token, as temporary credentials have one.
const TOKEN: &str = "IQoJb3JpZ2luX2VjEXAMPLEtokenOfASession";

/// A way in which a server stops letting a run in, and comes back.
struct Refusal {
    name: &'static str,
    begin: fn(&Server),
    end: fn(&Server),
    /// What the message must say.
    says: &'static [&'static str],
}

const REFUSALS: [Refusal; 4] = [
    Refusal {
        name: "expired",
        begin: |server| server.set_standing_of_all(Standing::Expired),
        end: |server| server.set_standing_of_all(Standing::Valid),
        says: &["ExpiredToken", "renew them"],
    },
    Refusal {
        name: "unknown",
        begin: |server| server.set_standing_of_all(Standing::Unknown),
        end: |server| server.set_standing_of_all(Standing::Valid),
        says: &["InvalidAccessKeyId", "check the credentials"],
    },
    Refusal {
        name: "clock ahead",
        begin: |server| server.shift_clock(20 * 60),
        end: |server| server.shift_clock(0),
        says: &["RequestTimeTooSkewed", "clock is 20 minutes behind the store's", "NTP"],
    },
    Refusal {
        name: "clock behind",
        begin: |server| server.shift_clock(-2 * 60 * 60),
        end: |server| server.shift_clock(0),
        says: &[
            "RequestTimeTooSkewed",
            "clock is 120 minutes ahead of the store's",
            "NTP",
        ],
    },
];

fn place() -> Place {
    Place::own().clone_with("AWS_SESSION_TOKEN", TOKEN)
}

fn train(project: &Project, run: &str, place: &Place) -> Train {
    train_to(STEPS, project, run, place)
}

fn train_to(steps: u64, project: &Project, run: &str, place: &Place) -> Train {
    let train = project.train(run).ranks(2).steps(steps);
    train
        .set("checkpoint.store", &place.url_of(run))
        .set("checkpoint.interval_steps", &INTERVAL.to_string())
        // All stay, so that what was acknowledged can be looked for.
        .set("checkpoint.keep_last", "1000")
}

/// Waits for a checkpoint after `step`.
fn wait_for_checkpoint_after(run: &mut Run, step: u64) -> u64 {
    run.wait_for("a checkpoint", |run| {
        Some(run.newest_checkpoint()).filter(|&newest| newest > step)
    })
}

/// Both writing and listing say what is wrong, and a difference within S3's bound is none.
#[test]
fn the_store_says_why_it_is_not_let_in() {
    let place = place();
    let server = place.server();
    for (case, refusal) in ["expired", "wrong credentials", "clock behind", "clock ahead"]
        .iter()
        .zip(&REFUSALS)
    {
        (refusal.begin)(server);
        place.run(case);
        (refusal.end)(server);
    }
    server.shift_clock(14 * 60);
    place.run("life");
    server.shift_clock(0);
    let Credentials { key_id, .. } = place.credentials();
    server.admit(&Credentials {
        key_id,
        secret: "another secret of the same key".to_owned(),
    });
    place.run("wrong credentials");
}

/// At a start, a new run and one that resumes: one message with cause and remedy, code 2, and nothing is written.
#[test]
fn a_run_that_is_not_let_in_is_refused() {
    let place = place();
    let server = place.server();
    let project = place.project(Project::tiny());
    let old = train(&project, "old", &place);
    let mut run = Run::start(&old);
    wait_for_checkpoint_after(&mut run, 0);
    run.signal(Signal::TERM);
    run.finish().assert_code(34);
    let (trace, saved) = (run.trace(), project.committed(place.url_of("old")));
    for refusal in &REFUSALS {
        (refusal.begin)(server);
        for train in [train(&project, "new", &place), old.clone()] {
            let outcome = train.finish();
            assert_refused(&outcome, refusal.says);
            place.assert_silent(&outcome.tail());
        }
        assert!(!project.run_dir("new").exists(), "{}: something is left", refusal.name);
        let looked = project.tarazed(&["checkpoint", "ls", &place.url_of("old")]);
        assert_refused(&looked, refusal.says);
        place.assert_silent(&looked.tail());
        (refusal.end)(server);
        assert_eq!(run.trace(), trace, "{}", refusal.name);
        assert_eq!(project.committed(place.url_of("old")), saved, "{}", refusal.name);
    }
    place.assert_untold(run.dir(), &place.url_of("old"), &[]);
}

/// In mid-run, CKPT-1: training goes on, the warning says how far durability lags and what to do, and what is saved stays.
/// When the server lets the run in again, the next checkpoint is made.
#[test]
fn a_run_trains_on_while_it_is_not_let_in() {
    for refusal in &REFUSALS {
        let (place, name) = (place(), refusal.name);
        let server = place.server();
        let project = place.project(Project::tiny());
        let mut run = Run::start(&train(&project, "locked-out", &place));
        wait_for_checkpoint_after(&mut run, 0);
        (refusal.begin)(server);
        let warning = run.wait_for("a warning", |run| {
            let warnings = run.events("warning").into_iter();
            let mut ours = warnings.filter(|warning| {
                let cause = warning["cause"].as_str().unwrap_or_default();
                cause.starts_with("no checkpoint of step") && refusal.says.iter().all(|part| cause.contains(part))
            });
            ours.next()
        });
        let cause = warning["cause"].as_str().unwrap_or_default();
        assert!(cause.contains("the newest one is of step"), "{name}: {cause}");
        assert!(cause.contains("s behind the trace"), "{name}: {cause}");
        let durable = warning["durable_step"].as_u64().unwrap_or_default();
        assert!(durable >= INTERVAL, "{name}: {warning}");
        // Peers feed a rank that is replaced meanwhile: nobody asks the store for it.
        assert!(run.kill_rank(1).is_some(), "{name}: {}", run.tail());
        run.wait_for_status("its next life to train", |status| {
            status.workers[1].incarnation == 1 && status.workers.iter().all(|worker| worker.state == "training")
        });
        let restored: Vec<_> = run
            .events("generation")
            .iter()
            .map(|event| event["restored"].clone())
            .collect();
        assert!(
            restored[1..].iter().all(|restored| restored == false),
            "{name}: {restored:?}"
        );
        let later = run.step() + 2 * INTERVAL;
        run.wait_for_step(later);
        let newest = run.newest_checkpoint();
        assert!(newest < later - INTERVAL, "{name}: who saved that?\n{}", run.tail());
        (refusal.end)(server);
        assert!(
            project.committed(place.url_of("locked-out")).contains(&newest),
            "{name}: what was acknowledged is lost\n{}",
            run.tail()
        );
        let again = wait_for_checkpoint_after(&mut run, newest);
        assert!(again > newest, "{name}");
        // Nothing lags behind any more than it does between two checkpoints.
        run.wait_for("a line that is covered by it", |run| {
            let lines = run.json_lines("metrics.jsonl");
            lines
                .last()
                .and_then(|line| line["durable_step"].as_u64())
                .filter(|&step| step >= again)
        });
        run.signal(Signal::TERM);
        run.finish().assert_code(34);
        let stopped_at = assert_prefix(&run);
        assert!(stopped_at < STEPS, "{name}: it was done before it was stopped");
        assert_eq!(run.newest_checkpoint(), stopped_at, "{name}\n{}", run.tail());
        assert_eq!(
            run.events("rank_lost").len(),
            1,
            "{name}: the one that was killed\n{}",
            run.tail()
        );
        place.assert_silent(&run.tail());
        let url = place.url_of("locked-out");
        place.assert_untold(run.dir(), &url, &[]);
        project.tarazed(&["checkpoint", "verify", &url]).assert_code(0);
    }
}

/// The lag in `metrics.jsonl` grows from line to line while nothing can be saved, and falls back when it can.
#[test]
fn the_lag_of_durability_grows_and_falls_back() {
    const GROWN_S: f64 = 2.5;
    let place = place();
    let (server, project) = (place.server(), place.project(Project::tiny()));
    // It is stopped long before its end, however quick the machine.
    let mut run = Run::start(&train_to(4_000, &project, "lag", &place));
    wait_for_checkpoint_after(&mut run, 0);
    server.set_standing_of_all(Standing::Expired);
    let told = |run: &Run| -> Vec<(Option<u64>, f64)> {
        let lines = run.json_lines("metrics.jsonl").into_iter();
        lines
            .map(|line| {
                (
                    line["durable_step"].as_u64(),
                    line["durability_lag_s"].as_f64().expect("a number"),
                )
            })
            .collect()
    };
    let newest = |run: &Run| told(run).last().copied();
    run.wait_for("a lag", |run| newest(run).filter(|(_, lag_s)| *lag_s > GROWN_S));
    let lines = told(&run);
    let (durable, grown_s) = lines[lines.len() - 1];
    assert!(durable.is_some(), "{}", run.tail());
    let behind: Vec<f64> = lines
        .iter()
        .filter(|line| line.0 == durable)
        .map(|line| line.1)
        .collect();
    let grows = behind.windows(2).all(|pair| pair[0] < pair[1]);
    assert!(behind.len() > 2 && grows, "of step {durable:?}: {behind:?}");
    server.set_standing_of_all(Standing::Valid);
    run.wait_for("a lag as between two checkpoints", |run| {
        newest(run).filter(|(later, lag_s)| *later > durable && *lag_s < grown_s)
    });
    run.signal(Signal::TERM);
    run.finish().assert_code(34);
    assert_prefix(&run);
}

/// In a restore: all copies are lost while the store lets nobody in. The run halts and says why; let in again, it goes on from
/// its newest checkpoint as if nothing had been.
#[test]
fn a_restore_that_is_not_let_in_halts_and_loses_nothing() {
    for refusal in &REFUSALS {
        let (place, name) = (place(), refusal.name);
        let server = place.server();
        let project = place.project(Project::tiny());
        let restoring = train(&project, "restoring", &place);
        let mut run = Run::start(&restoring);
        let saved = wait_for_checkpoint_after(&mut run, 0);
        (refusal.begin)(server);
        let pids = run.processes().ranks();
        assert_eq!(pids.len(), 2, "{name}\n{}", run.tail());
        for pid in pids {
            assert!(
                run.processes().signal(pid, Signal::KILL),
                "{name}: {pid} has ended by itself"
            );
        }
        let outcome = run.finish();
        assert_halted(&outcome, refusal.says);
        place.assert_silent(&run.tail());
        assert_prefix(&run);
        (refusal.end)(server);
        let mut again = Run::start(&restoring.arg("--resume"));
        wait_for_checkpoint_after(&mut again, saved);
        again.signal(Signal::TERM);
        again.finish().assert_code(34);
        // The run's first generation began from the seed, which is a restore, too.
        let mut began = again.events("generation").into_iter();
        let base = began.rfind(|event| event["restored"] == true);
        let base = base.and_then(|event| event["base"].as_u64());
        assert!(base >= Some(saved), "{name}: {base:?}\n{}", again.tail());
        assert_prefix(&again);
        place.assert_untold(again.dir(), &place.url_of("restoring"), &[]);
    }
}

/// Keys of a profile's file that expire and are renewed there, as `aws sso login` and the like do it: the run takes the new
/// ones, controller and ranks, and is not started again.
#[test]
fn keys_that_are_renewed_in_a_profile_reach_a_run_that_goes_on() {
    let own = Place::own();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("credentials");
    let write = |keys: &Credentials| {
        let (next, text) = (
            folder.path().join("next"),
            format!(
                "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\naws_session_token = {TOKEN}\n",
                keys.key_id, keys.secret
            ),
        );
        std::fs::write(&next, text).expect("written");
        std::fs::rename(&next, &file).expect("renamed");
    };
    let old = own.credentials();
    write(&old);
    let place = own
        .without_keys()
        .clone_with("AWS_SHARED_CREDENTIALS_FILE", &file.display().to_string());
    let server = place.server();
    let project = place.project(Project::tiny());
    let mut run = Run::start(&train(&project, "renewed", &place));
    wait_for_checkpoint_after(&mut run, 0);
    server.set_standing(&old.key_id, Standing::Expired);
    run.wait_for("a warning", |run| {
        let warnings = run.events("warning");
        warnings
            .iter()
            .any(|warning| warning["cause"].to_string().contains("renew them"))
            .then_some(())
    });
    let newest = run.newest_checkpoint();
    let new = Credentials::random().expect("random numbers");
    server.admit(&new);
    write(&new);
    wait_for_checkpoint_after(&mut run, newest);
    run.signal(Signal::TERM);
    run.finish().assert_code(34);
    let stopped_at = assert_prefix(&run);
    assert!(stopped_at < STEPS, "it was done before it was stopped");
    assert_eq!(run.newest_checkpoint(), stopped_at, "{}", run.tail());
    for secret in [&old.secret, &new.secret] {
        assert!(!run.tail().contains(secret.as_str()), "a secret was printed");
    }
    place.assert_silent(&run.tail());
    // Who searches the bucket has the old keys.
    server.set_standing(&old.key_id, Standing::Valid);
    own.assert_untold(run.dir(), &place.url_of("renewed"), &[&new.secret, TOKEN]);
}
