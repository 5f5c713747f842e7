//! From SIGKILL of a rank to the first step that the next generation commits; from SIGSTOP to its being noticed.
//!
//! The clock starts just before the signal is sent and stops when the line of that step is seen in `trace.jsonl`. A line
//! that the dying generation still brought out does not count. When the loss was seen, and when all survivors had left
//! what they were waiting in, say the run's own events: `rank_lost`, and `generation`, which is planned when the last
//! survivor has answered.

use rustix::process::Signal;
use std::path::Path;
use std::time::{Duration, Instant};
use tarazed_tests::figures::{self, Figures, Summary, unix_ms};
use tarazed_tests::harness::{Project, Random, Run};

/// Steps between a worker's return and the next kill, so that each kill meets a whole cluster at work.
const STEPS_BETWEEN: u64 = 4;

pub fn measure(config: &Path, ranks: u32, kills: usize) -> Figures {
    let project = Project::of(config);
    let mut run = Run::start(
        &project
            .train("recovery")
            .ranks(ranks)
            .set("mixture.controller", "static")
            .set("evaluation.interval_steps", "0"),
    );
    let seed = Random::seed();
    let mut random = Random::new(seed);
    run.wait_for_step(2 * STEPS_BETWEEN);
    let (mut times_ms, mut back_ms) = (Vec::new(), Vec::new());
    let (mut seen_ms, mut released_ms) = (Vec::new(), Vec::new());
    for kill in 0..kills {
        let whole = run.wait_for_status("a whole cluster", |status| status.all_train(ranks as usize));
        run.wait_for_step(whole.step + STEPS_BETWEEN);
        std::thread::sleep(Duration::from_millis(random.below(1000))); // any moment of a step
        let (generations, losses) = (run.events("generation").len(), run.events("rank_lost").len());
        let worker = random.below(u64::from(ranks)) as u32;
        let (began, began_ms) = (Instant::now(), unix_ms());
        let pid = run.kill_rank(worker);
        assert!(pid.is_some(), "worker {worker} has a process");
        let next = run.wait_for("the next generation", |run| {
            run.events("generation").get(generations).cloned()
        });
        run.wait_for_step(next["base"].as_u64().unwrap_or_default() + 1);
        seen_ms.push(since(began_ms, &run.events("rank_lost")[losses]));
        released_ms.push(since(began_ms, &next));
        times_ms.push(began.elapsed().as_secs_f64() * 1e3);
        run.wait_for_status("the worker's return", |status| status.all_train(ranks as usize));
        back_ms.push(began.elapsed().as_secs_f64() * 1e3);
        println!(
            "kill {:>2}: seen after {:>3.0} ms, all released after {:>3.0} ms, next step after {:>5.0} ms, {ranks} ranks again after {:>5.0} ms",
            kill + 1,
            seen_ms[kill],
            released_ms[kill],
            times_ms[kill],
            back_ms[kill]
        );
    }
    let steps_ms: Vec<f64> = run
        .json_lines("metrics.jsonl")
        .iter()
        .filter(|line| line["ranks"] == ranks)
        .filter_map(|line| line["step_ms"].as_f64())
        .collect();
    let lost: u64 = run
        .events("recovered")
        .iter()
        .filter_map(|event| event["steps_lost"].as_u64())
        .sum();
    run.signal(Signal::TERM);
    run.finish().assert_code(34);

    let (step, next, back) = (Summary::of(&steps_ms), Summary::of(&times_ms), Summary::of(&back_ms));
    let bound_ms = (2.0 * step.median).max(1000.0);
    println!("step                        {step} ms");
    let (seen, released) = (Summary::of(&seen_ms), Summary::of(&released_ms));
    println!("SIGKILL to its being seen   {seen} ms; bound for p99 50 ms");
    println!("SIGKILL to all released     {released} ms; bound for p99 250 ms");
    println!("SIGKILL to next step        {next} ms");
    println!("SIGKILL to all ranks again  {back} ms");
    println!("steps lost {lost}; bound for p50, the larger of 1 s and two steps: {bound_ms:.0} ms");
    Figures::new("recovery")
        .number("kills", kills as f64)
        .number("seed", seed as f64)
        .number("steps_lost", lost as f64)
        .number("bound_p50_ms", bound_ms)
        .summary("step_ms", step)
        .summary("seen_ms", seen)
        .summary("released_ms", released)
        .summary("next_step_ms", next)
        .summary("all_ranks_ms", back)
}

/// The load average of the last minute.
fn newest_load() -> f64 {
    let text = figures::load_average();
    let first = text.split_whitespace().next().and_then(|first| first.parse().ok());
    first.unwrap_or(f64::NAN)
}

/// Milliseconds from then to an event.
fn since(began_ms: u64, event: &serde_json::Value) -> f64 {
    event["time_unix_ms"].as_u64().unwrap_or_default() as f64 - began_ms as f64
}

/// More than any machine computes while somebody looks on.
const PEACE_STEPS: &str = "10000000";

/// Stops ranks for good, one after another, with `fault.timeout_ms` as given, and then trains for a while to see whether
/// anybody is suspected who is well.
pub fn measure_stops(config: &Path, ranks: u32, stops: usize, timeout_ms: u64, calm: Duration) -> Figures {
    let project = Project::of(config);
    let train = project
        .train("stops")
        .ranks(ranks)
        .set("run.steps", PEACE_STEPS)
        .set("mixture.controller", "static")
        .set("evaluation.interval_steps", "0")
        // After Young and Daly: a checkpoint each few minutes of such a run, which only a run as long as this one has time for.
        .set("checkpoint.interval_steps", "0")
        .set("checkpoint.interval", "auto")
        .set("fault.timeout_ms", &timeout_ms.to_string());
    let mut run = Run::start(&train);
    let mut random = Random::new(Random::seed());
    run.wait_for_step(2 * STEPS_BETWEEN);
    let mut seen_ms = Vec::new();
    for stop in 0..stops {
        let whole = run.wait_for_status("a whole cluster", |status| status.all_train(ranks as usize));
        run.wait_for_step(whole.step + STEPS_BETWEEN);
        let losses = run.events("rank_lost").len();
        let worker = random.below(u64::from(ranks)) as u32;
        let found = run
            .status()
            .workers
            .into_iter()
            .find(|candidate| candidate.worker == worker);
        let began_ms = unix_ms();
        let stopped = found.is_some_and(|found| run.processes().signal(found.pid, Signal::STOP));
        assert!(stopped, "worker {worker} has a process");
        let lost = run.wait_for("its loss", |run| run.events("rank_lost").get(losses).cloned());
        assert_eq!(lost["worker"], worker, "{lost}");
        seen_ms.push(since(began_ms, &lost));
        println!("stop {:>2}: seen after {:>5.0} ms", stop + 1, seen_ms[stop]);
    }
    run.wait_for_status("a whole cluster", |status| status.all_train(ranks as usize));
    let suspected = |run: &Run| run.events("rank_lost").len() + run.events("alarm").len();
    let (before, until) = (suspected(&run), Instant::now() + calm);
    let mut loads = Vec::new();
    while Instant::now() < until && run.ended().is_none() {
        std::thread::sleep(Duration::from_secs(1).min(calm));
        loads.push(newest_load());
    }
    let alarms = suspected(&run) - before;
    let asked: Vec<f64> = run
        .events("checkpoint")
        .iter()
        .filter_map(|event| event["time_unix_ms"].as_f64())
        .collect();
    run.signal(Signal::TERM);
    run.finish().assert_code(34);
    let seen = Summary::of(&seen_ms);
    println!("SIGSTOP to its being seen  {seen} ms, with fault.timeout_ms = {timeout_ms}");
    println!(
        "false alarms in {} s of peace: {alarms}, at load {}",
        calm.as_secs(),
        Summary::of(&loads)
    );
    let apart_s: Vec<f64> = asked.windows(2).map(|pair| (pair[1] - pair[0]) / 1e3).collect();
    match apart_s.is_empty() {
        true => println!("checkpoints that \"auto\" asked for: {}", asked.len()),
        false => println!(
            "checkpoints that \"auto\" asked for: {}, {} s apart",
            asked.len(),
            Summary::of(&apart_s)
        ),
    }
    Figures::new("stops")
        .number("timeout_ms", timeout_ms as f64)
        .number("calm_s", calm.as_secs_f64())
        .number("false_alarms", alarms as f64)
        .number("auto_checkpoints", asked.len() as f64)
        .summary("load", Summary::of(&loads))
        .summary("seen_ms", seen)
}
