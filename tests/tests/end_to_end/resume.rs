//! Stopped or lost controllers: the run goes on where it was, at any world size.

use crate::common::{
    assert_halted, assert_prefix, assert_refused, assert_undisturbed, assert_untouched, files, wait_for_no_ranks,
};
use rustix::process::Signal;
use std::time::Duration;
use tarazed_tests::harness::{Project, Random, Run, assert_same_trace, undisturbed};

const STEPS: u64 = 120;

/// The step from which the newest start of a run went on, and whether from a checkpoint.
#[track_caller]
fn last_base(run: &Run) -> u64 {
    let generations = run.events("generation");
    let restored: Vec<_> = generations.iter().filter(|g| g["restored"] == true).collect();
    let newest = restored
        .last()
        .unwrap_or_else(|| panic!("nothing began\n{}", run.tail()));
    newest["base"].as_u64().expect("a step")
}

/// CKPT-6, STEP-5: each of the three signals ends a run with a checkpoint of the very step it stopped at and code 34;
/// the run goes on from there at another world size, and repeats nothing.
#[test]
fn a_signal_saves_and_the_run_goes_on_at_another_world_size() {
    let project = Project::tiny();
    for (signal, name, before, after) in [
        (Signal::TERM, "term", 4, 3),
        (Signal::INT, "int", 3, 8),
        (Signal::USR1, "usr1", 2, 1),
    ] {
        let mut run = Run::start(&project.train(name).ranks(before).steps(STEPS));
        run.wait_for_step(26);
        run.signal(signal);
        let outcome = run.finish();
        outcome.assert_code(34);
        let stopped_at = assert_prefix(&run);
        assert!((26..STEPS).contains(&stopped_at), "{stopped_at}\n{}", run.tail());
        assert_eq!(run.newest_checkpoint(), stopped_at, "{}", run.tail());
        assert_eq!(run.processes().ranks(), [0_u32; 0], "ranks are left");
        let mut resumed = Run::start(&project.train(name).ranks(after).steps(STEPS).arg("--resume"));
        assert_undisturbed(&mut resumed, STEPS, name);
        assert_eq!(
            last_base(&resumed),
            stopped_at,
            "nothing is repeated\n{}",
            resumed.tail()
        );
    }
}

/// STEP-5, CKPT-1: a signal at an inconvenient moment: before the first step, as soon as a resumed run has ranks, while
/// it replays, and again and again. Each ends with 34, and the run is none the worse.
#[test]
fn signals_at_inconvenient_moments_lose_nothing() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let project = Project::tiny_with(&[("checkpoint.interval_steps", "40")]);
    let train = project.train("often").ranks(3).steps(STEPS);
    let mut steps = 0;
    for round in 0..8 {
        let what = format!("TARAZED_TEST_SEED={seed}, round {round}");
        let mut run = Run::start(&train);
        run.wait_for("a rank", |run| run.processes().ranks().first().copied());
        match round {
            // A run that lost its controller replays first.
            3 => {
                run.wait_for_step(steps + 10);
                run.signal(Signal::KILL);
                run.finish();
                lose_ranks(&mut run);
                steps = assert_prefix(&run);
                continue;
            }
            0 => {}
            _ => std::thread::sleep(Duration::from_micros(random.below(120_000))),
        }
        run.signal(Signal::TERM);
        let outcome = run.finish();
        assert_eq!(outcome.code, Some(34), "{what}\n{}", run.tail());
        let count = assert_prefix(&run);
        assert!(count >= steps, "{what}: {count} lines after {steps}\n{}", run.tail());
        steps = count;
    }
    assert_undisturbed(&mut Run::start(&train), STEPS, &format!("TARAZED_TEST_SEED={seed}"));
}

/// The ranks are lost with their controller, as with their machine.
fn lose_ranks(run: &mut Run) {
    run.processes().kill_all();
    wait_for_no_ranks(run);
}

/// STEP-5, DET-3, SUP-1, CKPT-3: controller and ranks are killed three times; each start, at another world size, checks
/// what it replays and goes on.
#[test]
fn a_run_goes_on_after_all_of_it_was_lost() {
    let project = Project::tiny();
    let mut replayed = 0;
    for (ranks, step) in [(4, 31), (2, 55), (3, 93)] {
        let mut run = Run::start(&project.train("lost").ranks(ranks).steps(STEPS));
        run.wait_for_step(step);
        run.signal(Signal::KILL);
        assert_eq!(run.finish().signal, Some(9));
        lose_ranks(&mut run);
        assert!(!run.status().live, "nobody answers any more");
        let written = assert_prefix(&run);
        assert!((step..STEPS).contains(&written), "{written}");
        replayed += written - project.committed(run.dir()).last().copied().unwrap_or(0);
    }
    let mut last = Run::start(&project.train("lost").ranks(1).steps(STEPS));
    assert_undisturbed(&mut last, STEPS, "three lost runs");
    assert!(replayed > 0, "each kill hit a checkpoint exactly");
}

/// STEP-5, CKPT-1: the controller dies between the last line and the last checkpoint. The next start replays the end of
/// the run, and saves it after all.
#[test]
fn a_controller_killed_at_the_very_end_can_be_resumed() {
    let project = Project::tiny();
    let seed = Random::seed();
    let mut random = Random::new(seed);
    for round in 0..6 {
        let train = project.train(&format!("end{round}")).ranks(2).steps(50);
        let mut run = Run::start(&train);
        run.wait_for_step(50);
        std::thread::sleep(Duration::from_micros(random.below(4_000)));
        if run.ended().is_none() {
            run.signal(Signal::KILL);
            run.finish();
            if round % 2 == 0 {
                lose_ranks(&mut run);
            }
            run.leave();
        }
        let what = format!("TARAZED_TEST_SEED={seed}, round {round}");
        let mut again = Run::start(&train);
        assert_undisturbed(&mut again, 50, &what);
        // Its events may not tell: a controller can be killed between a checkpoint's commit and its line there.
        let saved = project.committed(again.dir());
        assert!(saved.contains(&50), "{what}: {saved:?}\n{}", again.tail());
    }
}

/// DET-3, STEP-5: a recorded line that the replay does not reproduce halts the run with the step, the field and the ranks that
/// computed it, and the trace stays as it is.
#[test]
fn a_replay_that_differs_from_its_line_halts() {
    let project = Project::tiny_with(&[("checkpoint.interval_steps", "0")]);
    let train = project.train("tampered").ranks(2).steps(STEPS);
    let mut run = Run::start(&train);
    run.wait_for_step(20);
    run.signal(Signal::KILL);
    run.finish();
    lose_ranks(&mut run);
    let trace = String::from_utf8(run.trace()).expect("UTF-8");
    let state = trace.match_indices("\"state\":\"").nth(11).expect("line 12").0 + 9;
    let digit = if &trace[state..=state] == "a" { "b" } else { "a" };
    let tampered = format!("{}{digit}{}", &trace[..state], &trace[state + 1..]);
    std::fs::write(run.dir().join("trace.jsonl"), &tampered).expect("written");
    let mut again = Run::start(&train);
    let (first, second) = ("worker 0 (incarnation ", "worker 1 (incarnation ");
    let named = [first, ", lanes 0..4)", second, ", lanes 4..8)"];
    let outcome = again.finish();
    assert_halted(&outcome, &["step 12", "state", "DET-3", "computed by worker"]);
    assert_halted(&outcome, &named);
    assert_eq!(String::from_utf8(again.trace()).expect("UTF-8"), tampered);
    assert_eq!(again.processes().ranks(), [0_u32; 0]);
}

/// `--steps` stops with code 0 and the schedule aims at `run.steps` all the same; a larger one goes on, an equal or
/// smaller one has nothing to do and says 0 at once, and so does a finished run.
#[test]
fn steps_can_be_raised_and_a_finished_run_stays_finished() {
    let project = Project::tiny_with(&[("run.steps", "4000")]);
    for (ranks, steps, lines) in [(2, 30, 30), (3, 75, 75), (3, 75, 75), (1, 40, 75), (4, 100, 100)] {
        let mut run = Run::start(&project.train("longer").ranks(ranks).steps(steps));
        let what = format!("--steps {steps} on {ranks} ranks\n{}", run.tail());
        assert_undisturbed(&mut run, lines, &what);
    }
}

/// What was asked for and cannot be is refused, and the run folder stays as it was.
#[test]
fn fresh_and_resume_mean_what_they_say() {
    let project = Project::tiny();
    let run = project.train("there").ranks(2).steps(10).arg("--fresh").complete();
    let before = files(run.dir());
    let fresh = project.train("there").ranks(2).steps(20).arg("--fresh").finish();
    assert_refused(&fresh, &["runs/there", "holds a run already", "--run-dir"]);
    assert_untouched(run.dir(), &before);
    let resume = project.train("nowhere").ranks(2).steps(20).arg("--resume").finish();
    assert_refused(&resume, &["runs/nowhere", "holds no run to resume", "--resume"]);
    assert!(!project.run_dir("nowhere").exists());
}

/// CKPT-1, STEP-5: a store that is slower than the checkpoint interval costs checkpoints on the way, never the last
/// one, be it at the end or at a stop.
#[test]
fn checkpoints_faster_than_the_store_cost_none_of_the_last() {
    let steps = 400; // a busy machine may be slow to send the signal
    let project = Project::tiny_with(&[("checkpoint.interval_steps", "1"), ("checkpoint.keep_last", "2")]);
    let train = project.train("eager").ranks(2).steps(steps);
    let mut run = Run::start(&train);
    run.wait_for_step(30);
    run.signal(Signal::TERM);
    run.finish().assert_code(34);
    let stopped_at = assert_prefix(&run);
    assert_eq!(run.newest_checkpoint(), stopped_at, "{}", run.tail());
    let mut rest = Run::start(&train);
    assert_undisturbed(&mut rest, steps, "a checkpoint each step");
    assert_eq!(last_base(&rest), stopped_at);
    assert_eq!(rest.newest_checkpoint(), steps);
}

/// DET-4: a resumed run whose program has changed says so, its first line declares both, and all that it computes is the same.
#[test]
fn another_program_is_a_declared_lineage() {
    let project = Project::tiny();
    let run = project.train("lineage").ranks(2).steps(20).complete();
    // A program that differs in nothing but its bytes.
    let other = project.path().join("tarazed-other");
    let mut bytes = std::fs::read(tarazed_tests::harness::tarazed()).expect("the program");
    bytes.extend_from_slice(b"another build");
    std::fs::write(&other, bytes).expect("written");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&other, mode).expect("executable");
    let warnings = |run: &Run| {
        let mut found = run.events("warning");
        found.retain(|event| event["cause"].to_string().contains("new lineage from step 20"));
        found.len()
    };
    assert_eq!(warnings(&run), 0);
    let mut resumed = Run::start(&project.train("lineage").ranks(2).steps(40).program(&other));
    resumed.finish().assert_code(0);
    assert_eq!(warnings(&resumed), 1, "{}", resumed.tail());
    let trace = String::from_utf8(resumed.trace()).expect("text");
    let mut undeclared = String::new();
    for (line, step) in trace.lines().zip(1..) {
        let declared = line.split_once(r#""lineage":{"#).map(|(before, rest)| {
            let (lineage, after) = rest.split_once(r#"}},"#).expect("its end");
            (lineage, format!("{before}{after}"))
        });
        assert_eq!(declared.is_some(), step == 21, "line {step}: {line}");
        undeclared.push_str(declared.as_ref().map_or(line, |(_, rest)| rest));
        undeclared.push('\n');
        if let Some((lineage, _)) = declared {
            let builds: Vec<&str> = lineage
                .split(r#""binary":""#)
                .skip(1)
                .filter_map(|rest| rest.split('"').next())
                .collect();
            assert!(builds.len() == 2 && builds[0] != builds[1], "{lineage}");
        }
    }
    assert_same_trace(undeclared.as_bytes(), undisturbed(40), "another program");
    // A run by one program alone is its equal for people, too.
    let alone = project.train("alone").ranks(2).steps(40).complete();
    let dirs = [resumed.dir().as_os_str(), alone.dir().as_os_str()];
    let compared = project.tarazed(&["trace".as_ref(), "diff".as_ref(), dirs[0], dirs[1]]);
    compared.assert_code(0);
    // The first program again: the trace says whose lines it goes on from.
    let mut back = Run::start(&project.train("lineage").ranks(2).steps(60));
    back.finish().assert_code(0);
    let trace = String::from_utf8(back.trace()).expect("text");
    let declares: Vec<usize> = (1..)
        .zip(trace.lines())
        .filter(|(_, line)| line.contains("lineage"))
        .map(|(step, _)| step)
        .collect();
    assert_eq!(declares, [21, 41]);
    project
        .verify(&["trace".as_ref(), back.dir().as_os_str()])
        .assert_code(0);
}

/// DET-4: the program's file is replaced while the run goes on. A rank that is replaced then is the program that began it.
#[test]
fn a_program_replaced_on_disk_changes_nothing_in_a_run() {
    let project = Project::tiny();
    let copy = project.path().join("tarazed-copy");
    std::fs::copy(tarazed_tests::harness::tarazed(), &copy).expect("copied");
    let mut run = Run::start(&project.train("upgrade").ranks(2).steps(60).program(&copy));
    run.wait_for_step(10);
    let upgrade = project.path().join("tarazed-upgrade");
    std::fs::write(&upgrade, "#!/bin/false\n").expect("written");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&upgrade, mode).expect("executable");
    std::fs::rename(&upgrade, &copy).expect("replaced");
    assert!(run.kill_rank(1).is_some(), "{}", run.tail());
    assert_undisturbed(&mut run, 60, "another program has the name");
    assert!(!run.events("recovered").is_empty(), "{}", run.tail());
}
