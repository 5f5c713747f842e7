//! What fault tolerance costs: a step with all of it against a step with none of it.
//!
//! With it: two copies of each optimizer shard, hashes of the state before and after each update, their exchange and
//! comparison. Without: one copy, no hash, nothing exchanged or compared beyond what training itself needs. The latter is no
//! way to run, and no build of the product can: both sides are one program that was built with the feature `mutants`, and
//! one is started with `TARAZED_UNGUARDED` set. The exchange that is the commit's barrier is on both sides, because it carries the norm that
//! gradients are clipped by, which any data-parallel step has to agree on before its update; its time is reported.
//!
//! Sides alternate, and each round gives one ratio. Wall-clock time scatters by more than what is looked for where others share
//! the machine, so the processor time of all ranks is compared as well, read between two steps and divided by the steps
//! between. Audits, one lane computed twice each `fault.audit_interval_steps`, are on on both sides. All runs
//! train on one data set, made before the first.

use anyhow::{Result, ensure};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tarazed_tests::figures::{Figures, Summary};
use tarazed_tests::harness::{Project, Run};

/// Steps at the start of a run that do not count.
const WARM_UP_STEPS: u64 = 5;
/// Steps that a run would go on for after those that count.
const MORE_STEPS: u64 = 1_000;
/// The kernel tells processor time in hundredths of a second (proc(5)).
const MS_PER_TICK: f64 = 10.0;
/// Between looks at the trace.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// Read by a program with the feature `mutants` (`tarazed_domain::mutant::UNGUARDED`).
const UNGUARDED: &str = "TARAZED_UNGUARDED";
/// Phases of a step (docs/FORMATS.md) in which something is done, or waited for, for the sake of fault tolerance.
const PHASES: [&str; 4] = ["forwarding", "barrier", "updating", "gathering"];

/// What the runs have in common.
pub struct Bench {
    project: Project,
    program: PathBuf,
    data: PathBuf,
    ranks: u32,
    steps: u64,
}

/// One run.
pub struct Side {
    pub step_ms: f64,
    /// Processor time of all ranks, per step.
    pub cpu_ms: f64,
    phase_ms: [f64; PHASES.len()],
    /// The first line's state hash and loss.
    first_line: (String, String),
}

pub fn measure(config: &Path, program: &Path, ranks: u32, rounds: usize, steps: u64) -> Result<Figures> {
    let bench = Bench::of(config, program, ranks, steps);
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // The order alternates, so that neither side always meets the warmer machine.
        for guarded in [round.is_multiple_of(2), !round.is_multiple_of(2)] {
            let side = match guarded {
                true => bench.run("with", round, &[("optimizer.replicas", "2")], None),
                false => bench.run("without", round, &[("optimizer.replicas", "1")], Some(UNGUARDED)),
            };
            if guarded { &mut with } else { &mut without }.push(side);
        }
        let (on, off) = (&with[round], &without[round]);
        ensure!(on.first_line.1 == off.first_line.1, "both sides compute the same");
        ensure!(
            on.first_line.0 != off.first_line.0,
            "{} does not know {UNGUARDED}: it needs the feature `mutants`",
            program.display()
        );
        println!(
            "round {}: {:.1} ms with, {:.1} ms without, ratio {:.4}; processor time {:.1} and {:.1} ms, ratio {:.4}",
            round + 1,
            on.step_ms,
            off.step_ms,
            on.step_ms / off.step_ms,
            on.cpu_ms,
            off.cpu_ms,
            on.cpu_ms / off.cpu_ms,
        );
    }
    Ok(report(&with, &without))
}

fn report(with: &[Side], without: &[Side]) -> Figures {
    let of = |sides: &[Side], value: &dyn Fn(&Side) -> f64| Summary::of(&sides.iter().map(value).collect::<Vec<_>>());
    let ratio = |value: &dyn Fn(&Side) -> f64| {
        let ratios = with.iter().zip(without).map(|(on, off)| value(on) / value(off));
        Summary::of(&ratios.collect::<Vec<_>>())
    };
    let step = |side: &Side| side.step_ms;
    let cpu = |side: &Side| side.cpu_ms;
    let (on, off) = (of(with, &step), of(without, &step));
    println!("step with fault tolerance     {on} ms");
    println!("step without                  {off} ms");
    for (index, phase) in PHASES.iter().enumerate() {
        let phase_ms: &dyn Fn(&Side) -> f64 = &|side| side.phase_ms[index];
        let (on, off) = (of(with, phase_ms), of(without, phase_ms));
        println!("  {phase:<10} {:.2} ms with, {:.2} ms without", on.median, off.median);
    }
    let (wall, processor) = (ratio(&step), ratio(&cpu));
    for (name, ratio) in [("by the wall", wall), ("by processor time", processor)] {
        println!(
            "fault tolerance, {name:<18} {:+.1}%, {:+.1}% to {:+.1}% by round (n = {})",
            percent(ratio.median),
            percent(ratio.least),
            percent(ratio.most),
            ratio.count
        );
    }
    Figures::new("overhead")
        .number("whole_percent", percent(wall.median))
        .number("whole_cpu_percent", percent(processor.median))
        .summary("with_ms", on)
        .summary("without_ms", off)
        .summary("ratio", wall)
        .summary("cpu_ratio", processor)
        .summary("barrier_ms", of(with, &|side| side.phase_ms[1]))
}

/// What a ratio adds, in percent.
pub fn percent(ratio: f64) -> f64 {
    100.0 * (ratio - 1.0)
}

/// The data folder that all runs share.
fn prepared(project: &Project) -> PathBuf {
    let first = project.train("data").ranks(1).steps(1).complete();
    first.dir().join("data")
}

impl Bench {
    pub fn of(config: &Path, program: &Path, ranks: u32, steps: u64) -> Self {
        let project = Project::of(config);
        Self {
            data: prepared(&project),
            program: program.to_owned(),
            project,
            ranks,
            steps,
        }
    }

    /// The trace of a run that was measured.
    pub fn trace_of(&self, name: &str, round: usize) -> Vec<u8> {
        let folder = self.project.run_dir(&format!("{name}-{round}"));
        std::fs::read(folder.join("trace.jsonl")).expect("a trace")
    }

    /// One run with these settings, and with this variable set.
    pub fn run(&self, name: &str, round: usize, settings: &[(&str, &str)], variable: Option<&str>) -> Side {
        let name = format!("{name}-{round}");
        let folder = self.project.run_dir(&name);
        std::fs::create_dir_all(&folder).expect("a run folder");
        std::os::unix::fs::symlink(&self.data, folder.join("data")).expect("a link to the data");
        let train = self
            .project
            .train(&name)
            .program(&self.program)
            .ranks(self.ranks)
            // The ranks must live when their time is read: the run is ended as it is dropped.
            .set("run.steps", &(self.steps + MORE_STEPS).to_string())
            .set("mixture.controller", "static")
            .set("evaluation.interval_steps", "0")
            .set("checkpoint.interval_steps", "0");
        let train = settings.iter().fold(train, |train, (key, value)| train.set(key, value));
        let train = variable
            .into_iter()
            .fold(train, |train, name| train.variable(name, "1"));
        let mut run = Run::start(&train);
        let (first_step, first_ms) = spent(&mut run, WARM_UP_STEPS);
        let (last_step, last_ms) = spent(&mut run, self.steps);
        let cpu_ms = (last_ms - first_ms) / (last_step - first_step) as f64;
        let metrics = run.json_lines("metrics.jsonl");
        let counted: Vec<_> = metrics
            .iter()
            .filter(|line| (WARM_UP_STEPS + 1..=self.steps).contains(&line["step"].as_u64().unwrap_or_default()))
            .collect();
        let median = |of: &dyn Fn(&serde_json::Value) -> Option<f64>| {
            Summary::of(&counted.iter().filter_map(|line| of(line)).collect::<Vec<_>>()).median
        };
        let first = &run.json_lines("trace.jsonl")[0];
        Side {
            step_ms: median(&|line| line["step_ms"].as_f64()),
            cpu_ms,
            phase_ms: PHASES.map(|phase| median(&|line| line["phase_ms"][phase].as_f64())),
            first_line: (first["state"].to_string(), first["loss"].to_string()),
        }
    }
}

/// Processor time of all ranks as soon as this step, or one after it, is committed, and which one that was.
fn spent(run: &mut Run, step: u64) -> (u64, f64) {
    loop {
        assert!(run.ended().is_none(), "the run ended before step {step}");
        let reached = run.step();
        if reached >= step {
            return (reached, run.processes().ticks() as f64 * MS_PER_TICK);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
