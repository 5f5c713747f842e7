//! From SIGKILL of a rank to the first step that the next generation commits.
//!
//! The clock starts just before the signal is sent and stops when the line of that step is seen in `trace.jsonl`. A line
//! that the dying generation still brought out does not count.

use std::path::Path;
use std::time::{Duration, Instant};
use tarazed_tests::figures::{Figures, Summary};
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
    let mut times_ms = Vec::new();
    let mut back_ms = Vec::new();
    for kill in 0..kills {
        let whole = run.wait_for_status("a whole cluster", |status| status.all_train(ranks as usize));
        run.wait_for_step(whole.step + STEPS_BETWEEN);
        std::thread::sleep(Duration::from_millis(random.below(1000))); // any moment of a step
        let generations = run.events("generation").len();
        let worker = random.below(u64::from(ranks)) as u32;
        let began = Instant::now();
        let pid = run.kill_rank(worker);
        assert!(pid.is_some(), "worker {worker} has a process");
        let base = run.wait_for("the next generation", |run| {
            let events = run.events("generation");
            events.get(generations).and_then(|event| event["base"].as_u64())
        });
        run.wait_for_step(base + 1);
        times_ms.push(began.elapsed().as_secs_f64() * 1e3);
        run.wait_for_status("the worker's return", |status| status.all_train(ranks as usize));
        back_ms.push(began.elapsed().as_secs_f64() * 1e3);
        println!(
            "kill {:>2}: next step after {:>5.0} ms, {ranks} ranks again after {:>5.0} ms",
            kill + 1,
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
    run.signal(rustix::process::Signal::TERM);
    run.finish().assert_code(34);

    let (step, next, back) = (Summary::of(&steps_ms), Summary::of(&times_ms), Summary::of(&back_ms));
    let bound_ms = (2.0 * step.median).max(1000.0);
    println!("step                        {step} ms");
    println!("SIGKILL to next step        {next} ms");
    println!("SIGKILL to all ranks again  {back} ms");
    println!("steps lost {lost}; bound for p50, the larger of 1 s and two steps: {bound_ms:.0} ms");
    Figures::new("recovery")
        .number("kills", kills as f64)
        .number("seed", seed as f64)
        .number("steps_lost", lost as f64)
        .number("bound_p50_ms", bound_ms)
        .summary("step_ms", step)
        .summary("next_step_ms", next)
        .summary("all_ranks_ms", back)
}
