//! What the training state monitor costs a step: the weight trajectory, the gradient noise scale, the signals of a line.
//!
//! Runs alternate: one with neither, one with the trajectory at every step, one with the noise scale. Each round gives one ratio to
//! the run with neither. The trajectory's is divided by the interval that is the default, since it costs the steps that have one alone.
//! Signals are computed by the controller, beside the ranks: here again, from the lines of the last run, and timed in this process.

use super::overhead::{Bench, Side, percent};
use anyhow::{Context, Result};
use std::path::Path;
use std::time::Instant;
use tarazed_domain::config::{Config, Language};
use tarazed_protocol::data::DomainFacts;
use tarazed_protocol::data::signals::Tsm;
use tarazed_protocol::trace::{TraceLine, parse_whole_lines};
use tarazed_tests::figures::{Figures, Summary};

const INTERVAL: &str = "monitor.weights_interval_steps";
const NOISE: &str = "policy.gradient_noise";
/// Name and config of each side; the first is what the others are compared with.
const SIDES: [(&str, [(&str, &str); 2]); 3] = [
    ("neither", [(INTERVAL, "0"), (NOISE, "false")]),
    ("trajectory", [(INTERVAL, "1"), (NOISE, "false")]),
    ("noise scale", [(INTERVAL, "0"), (NOISE, "true")]),
];
/// A line is taken in so often, so that the clock does not count.
const REPETITIONS: u32 = 200;

pub fn measure(config: &Path, ranks: u32, rounds: usize, steps: u64) -> Result<Figures> {
    let bench = Bench::of(config, tarazed_tests::harness::tarazed(), ranks, steps);
    let mut sides: [Vec<Side>; SIDES.len()] = Default::default();
    for round in 0..rounds {
        for turn in 0..SIDES.len() {
            // Nobody is always first.
            let at = (round + turn) % SIDES.len();
            let (name, settings) = SIDES[at];
            sides[at].push(bench.run(&name.replace(' ', "-"), round, &settings, None));
        }
        let step_ms = |at: usize| sides[at][round].step_ms;
        println!(
            "round {}: {:.1} ms with neither, {:.1} ms with the trajectory at every step, {:.1} ms with the noise scale",
            round + 1,
            step_ms(0),
            step_ms(1),
            step_ms(2)
        );
    }
    let default_interval = Config::load(config, &[])?.monitor.weights_interval_steps;
    let [neither, trajectory, noise] = &sides;
    let mut figures = Figures::new("monitor");
    for (name, side, every) in [("trajectory", trajectory, default_interval), ("noise", noise, 1)] {
        let ratio = |value: &dyn Fn(&Side) -> f64| {
            let ratios = side
                .iter()
                .zip(neither)
                .map(|(with, without)| value(with) / value(without));
            Summary::of(&ratios.collect::<Vec<_>>())
        };
        let (wall, cpu) = (ratio(&|side| side.step_ms), ratio(&|side| side.cpu_ms));
        println!(
            "{name}: {:+.2}% of a step by the wall, {:+.2}% by processor time; one step in {every}: {:+.3}%, {:+.3}%",
            percent(wall.median),
            percent(cpu.median),
            percent(wall.median) / every as f64,
            percent(cpu.median) / every as f64,
        );
        figures = figures
            .summary(&format!("{name}_ratio"), wall)
            .summary(&format!("{name}_cpu_ratio"), cpu);
    }
    let last = bench.trace_of("neither", rounds.saturating_sub(1));
    let (lines, _) = parse_whole_lines(&last).context("the trace of a run")?;
    let line_us = signals_us(&lines);
    let step = Summary::of(&neither.iter().map(|side| side.step_ms).collect::<Vec<_>>());
    println!(
        "signals of a line: {line_us:.1} us, {:.4}% of a step of {:.1} ms",
        line_us / 10.0 / step.median,
        step.median
    );
    Ok(figures.number("signals_us", line_us).summary("step_ms", step))
}

/// Microseconds for the signals of one line.
fn signals_us(lines: &[TraceLine]) -> f64 {
    let facts = |line: &TraceLine| -> Vec<DomainFacts> {
        let facts = line.mixture.iter().map(|(name, weight)| DomainFacts {
            name: name.to_owned(),
            language: Language::En,
            weight: *weight,
            train_tokens: 1_000_000,
            train_sequences: 1_000,
        });
        facts.collect()
    };
    let Some(first) = lines.first() else { return 0.0 };
    let facts = facts(first);
    let began = Instant::now();
    for _ in 0..REPETITIONS {
        let mut monitor = Tsm::new(facts.clone());
        for line in lines {
            let taken = monitor.on_line(line);
            assert!(taken.is_ok(), "{taken:?}");
        }
    }
    began.elapsed().as_secs_f64() * 1e6 / f64::from(REPETITIONS) / lines.len() as f64
}
