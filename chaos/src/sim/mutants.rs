//! `tarazed-chaos mutants`: puts one bug after another into the product and sees how soon the simulator finds it.
//!
//! Built with the feature `mutants` alone. Each bug has a process of its own, because one may make it spin. What the
//! simulator does not find, the runtime's own tests are tried on.

use super::command::campaign;
use super::suite::Suite;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use tarazed_domain::Mutant;

/// What to try.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// This one only, in this process; prints the first seed that finds it.
    #[arg(long)]
    only: Option<String>,
    /// Seeds tried at most.
    #[arg(long, default_value_t = 3000)]
    seeds: u64,
    /// Seconds for each.
    #[arg(long, default_value_t = 240)]
    seconds_max: u64,
    /// The simulator alone; otherwise cargo builds the runtime's tests, too.
    #[arg(long)]
    simulator_only: bool,
}

/// Seeds between two looks at what was found, and at the time.
const SEEDS_AT_ONCE: u64 = 20;
/// A process that is this much beyond its time hangs in a simulation.
const GRACE: Duration = Duration::from_secs(60);

/// Said by a process that has not found its bug.
const NOT_FOUND: &str = "not in";

/// Carries it out; the exit code is 1 where a bug was not found.
#[must_use]
pub fn run(args: &Args) -> ExitCode {
    match &args.only {
        Some(name) => one(name, args),
        None => all(args),
    }
}

fn one(name: &str, args: &Args) -> ExitCode {
    let Some(&mutant) = Mutant::ALL.iter().find(|mutant| format!("{mutant:?}") == name) else {
        eprintln!("no mutant {name}");
        return ExitCode::from(2);
    };
    Mutant::choose(Some(mutant));
    // A bug may show as a panic; the simulator says so, and its own words are not wanted twice.
    std::panic::set_hook(Box::new(|_| {}));
    let began = Instant::now();
    for from in (0..args.seeds).step_by(SEEDS_AT_ONCE as usize) {
        if began.elapsed() > Duration::from_secs(args.seconds_max) {
            println!("{NOT_FOUND} {from} seeds");
            return ExitCode::from(1);
        }
        let summary = campaign(from, SEEDS_AT_ONCE, true, 2);
        if let Some((seed, failure)) = summary.failures.first() {
            let line = failure.lines().next().unwrap_or_default();
            println!("seed {seed}: {}", line.chars().take(110).collect::<String>());
            return ExitCode::SUCCESS;
        }
    }
    println!("{NOT_FOUND} {} seeds", args.seeds);
    ExitCode::from(1)
}

fn all(args: &Args) -> ExitCode {
    let limit = Duration::from_secs(args.seconds_max);
    let suite = match (!args.simulator_only).then(|| Suite::new(limit)).transpose() {
        Ok(suite) => suite,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let mut missed = 0;
    println!("| bug | what it does | simulator | after | test | after |\n|---|---|---|---|---|---|");
    for &mutant in Mutant::ALL {
        let began = Instant::now();
        let found = in_its_own_process(mutant, args);
        let after = began.elapsed().as_secs_f64();
        let (Ok(by_simulator) | Err(by_simulator)) = &found;
        let began = Instant::now();
        let failure = suite
            .as_ref()
            .filter(|_| found.is_err())
            .and_then(|suite| suite.first_failure(&format!("{mutant:?}"), limit));
        let and_tests = if found.is_ok() {
            "| |".to_owned()
        } else {
            missed += u8::from(failure.is_none());
            let by_tests = failure.as_deref().unwrap_or("**not caught**");
            format!("{by_tests} | {:.1} s |", began.elapsed().as_secs_f64())
        };
        println!(
            "| `{mutant:?}` | {} | {by_simulator} | {after:.1} s | {and_tests}",
            mutant.what().trim()
        );
    }
    ExitCode::from(u8::from(missed > 0))
}

/// How it was found; or how many seeds did not find it.
fn in_its_own_process(mutant: Mutant, args: &Args) -> Result<String, String> {
    let because = |error: std::io::Error| error.to_string();
    let program = std::env::current_exe().map_err(because)?;
    let mut child = Command::new(program)
        .args(["mutants", "--only", &format!("{mutant:?}")])
        .args(["--seeds", &args.seeds.to_string()])
        .args(["--seconds-max", &args.seconds_max.to_string()])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(because)?;
    let deadline = Instant::now() + Duration::from_secs(args.seconds_max) + GRACE;
    while child.try_wait().map_err(because)?.is_none() {
        if Instant::now() > deadline {
            // An error means that it has just ended.
            let _ = child.kill();
            let _ = child.wait();
            return Ok("a simulation that never ends".to_owned());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().map_err(because)?;
    let text = String::from_utf8_lossy(&output.stdout).trim().replace('|', "/");
    match text.is_empty() {
        true => Ok(format!("the simulator's process ends: {}", output.status)),
        false if text.starts_with(NOT_FOUND) => Err(text),
        false => Ok(text),
    }
}
