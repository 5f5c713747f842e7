//! From SIGKILL of the controller, or of controller and ranks together, to the first new step of what is started next.
//!
//! The next controller is started at once, as a supervisor of the machine would. The clock starts just before the signal
//! and stops when a line that was not there is seen in `trace.jsonl`. Where the ranks live on, nothing is computed twice;
//! where all are gone, the steps since the newest checkpoint are replayed first.

use std::path::Path;
use std::time::Instant;
use tarazed_tests::figures::{Figures, Summary};
use tarazed_tests::harness::{Project, Run};

/// Steps between the start of a controller and its end.
const STEPS_BETWEEN: u64 = 4;

pub fn measure(config: &Path, ranks: u32, rounds: usize) -> Figures {
    let project = Project::of(config);
    let train = project
        .train("takeover")
        .ranks(ranks)
        .set("evaluation.interval_steps", "0")
        .set("checkpoint.interval_steps", "5");
    let mut run = Run::start(&train);
    let (mut controller_ms, mut everything_ms) = (Vec::new(), Vec::new());
    for round in 0..2 * rounds {
        let whole = run.wait_for_status("a whole cluster", |status| status.all_train(ranks as usize));
        run.wait_for_step(whole.step + STEPS_BETWEEN);
        let (adopted, everything) = (run.events("adopted").len(), round % 2 == 1);
        let began = Instant::now();
        run.signal(rustix::process::Signal::KILL);
        if everything {
            run.processes().kill_all();
        }
        run.finish();
        let written = run.step();
        run.leave();
        run = Run::start(&train);
        run.wait_for_step(written + 1);
        let took_ms = began.elapsed().as_secs_f64() * 1e3;
        let (what, times) = if everything {
            ("everything", &mut everything_ms)
        } else {
            let now = run.events("adopted").len();
            assert_eq!(now, adopted + 1, "the ranks were not found\n{}", run.tail());
            ("the controller", &mut controller_ms)
        };
        times.push(took_ms);
        println!("{what} killed after step {written}: the next new step after {took_ms:.0} ms");
    }
    let steps_ms: Vec<f64> = run
        .json_lines("metrics.jsonl")
        .iter()
        .filter(|line| line["ranks"] == ranks)
        .filter_map(|line| line["step_ms"].as_f64())
        .collect();
    run.signal(rustix::process::Signal::TERM);
    run.finish().assert_code(34);
    let (step, controller, everything) = (
        Summary::of(&steps_ms),
        Summary::of(&controller_ms),
        Summary::of(&everything_ms),
    );
    println!("step                                      {step} ms");
    println!("controller killed to next step            {controller} ms; bound 3000 ms");
    println!("controller and ranks killed to next step  {everything} ms; bound 8000 ms");
    Figures::new("takeover")
        .number("rounds", rounds as f64)
        .summary("step_ms", step)
        .summary("controller_ms", controller)
        .summary("everything_ms", everything)
}
