//! From the start of a rank process to its readiness, as the controller's event log has it; all ranks of a run start at
//! once. Beside it one rank that starts alone, after a kill, while the others train.

use std::path::Path;
use tarazed_tests::figures::{Figures, Summary};
use tarazed_tests::harness::{Project, Run};

pub fn measure(config: &Path, ranks: u32, rounds: usize) -> Figures {
    let project = Project::of(config);
    let (mut together_ms, mut again_ms) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let mut run = Run::start(&project.train(&format!("start-{round}")).ranks(ranks));
        run.wait_for_step(2);
        let ready = |run: &Run| -> Vec<f64> {
            let events = run.events("rank_ready");
            events.iter().filter_map(|event| event["ready_ms"].as_f64()).collect()
        };
        together_ms.extend(ready(&run));
        assert!(run.kill_rank(0).is_some(), "worker 0 has a process");
        let all = run.wait_for("the rank that comes back", |run| {
            Some(ready(run)).filter(|ready| ready.len() > ranks as usize)
        });
        again_ms.push(all[ranks as usize]);
        run.signal(rustix::process::Signal::TERM);
        run.finish().assert_code(34);
    }
    let (together, again) = (Summary::of(&together_ms), Summary::of(&again_ms));
    println!("{ranks} ranks started at once    {together} ms");
    println!("one rank while others train {again} ms");
    Figures::new("start")
        .summary("together_ms", together)
        .summary("again_ms", again)
}
