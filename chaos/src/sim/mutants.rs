//! `tarazed-chaos mutants`: puts one bug after another into the product and sees how soon the simulator finds it.
//!
//! Built with the feature `mutants` alone. Each bug has a process of its own, because one may make it spin.

use super::command::campaign;
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
}

/// Seeds between two looks at what was found.
const SEEDS_AT_ONCE: u64 = 20;

/// Carries it out; the exit code is 1 where a bug was not found.
#[must_use]
pub fn run(args: &Args) -> ExitCode {
    match &args.only {
        Some(name) => one(name, args.seeds),
        None => all(args),
    }
}

fn one(name: &str, seeds: u64) -> ExitCode {
    let Some(&mutant) = Mutant::ALL.iter().find(|mutant| format!("{mutant:?}") == name) else {
        eprintln!("no mutant {name}");
        return ExitCode::from(2);
    };
    Mutant::choose(Some(mutant));
    // A bug may show as a panic; the simulator says so, and its own words are not wanted twice.
    std::panic::set_hook(Box::new(|_| {}));
    for from in (0..seeds).step_by(SEEDS_AT_ONCE as usize) {
        let summary = campaign(from, SEEDS_AT_ONCE, true, 2);
        if let Some((seed, failure)) = summary.failures.first() {
            let line = failure.lines().next().unwrap_or_default();
            println!("seed {seed}: {}", line.chars().take(110).collect::<String>());
            return ExitCode::SUCCESS;
        }
    }
    ExitCode::from(1)
}

fn all(args: &Args) -> ExitCode {
    let mut missed = 0;
    println!("| bug | caught by | after |\n|---|---|---|");
    for &mutant in Mutant::ALL {
        let began = Instant::now();
        let found = in_its_own_process(mutant, args);
        missed += u8::from(found.is_none());
        let found = found.unwrap_or_else(|| format!("**not caught** in {} seeds", args.seeds));
        println!(
            "| {}: {} | {found} | {:.1} s |",
            format_args!("{mutant:?}"),
            mutant.what().trim(),
            began.elapsed().as_secs_f64()
        );
    }
    ExitCode::from(u8::from(missed > 0))
}

/// How it was found, if it was.
fn in_its_own_process(mutant: Mutant, args: &Args) -> Option<String> {
    let program = std::env::current_exe().ok()?;
    let (name, seeds) = (format!("{mutant:?}"), args.seeds.to_string());
    let mut child = Command::new(program)
        .args(["mutants", "--only", &name, "--seeds", &seeds])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let deadline = Instant::now() + Duration::from_secs(args.seconds_max);
    loop {
        if child.try_wait().ok()?.is_some() {
            let output = child.wait_with_output().ok()?;
            let text = String::from_utf8_lossy(&output.stdout).trim().replace('|', "/");
            return (!text.is_empty()).then_some(text);
        }
        if Instant::now() > deadline {
            // An error means that it has just ended.
            let _ = child.kill();
            let _ = child.wait();
            return Some("a simulation that never ends".to_owned());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
