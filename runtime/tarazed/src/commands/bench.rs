//! `tarazed bench mixture`: compares mixtures, adaptive against static, as a plan says (docs/MIXTURE.md).
//!
//! This file puts the parts of [`crate::mixture`] together; what is due, what it is worth and what may be said of it is
//! decided there.

use crate::exit::{Exit, Failure};
use crate::mixture::again::{again, choose, is_done};
use crate::mixture::book::Book;
use crate::mixture::cases::{self, Ready};
use crate::mixture::plan::Plan;
use crate::mixture::record::Header;
use crate::mixture::results::Results;
use crate::mixture::runner::{Processes, listen};
use crate::mixture::schedule::{Arm, CaseRuns, Finished, RunId, carry_out, recall};
use crate::mixture::{figure, report};
use crate::output::{print, short};
use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use tarazed_domain::config::{Config, ConfigError};

/// `tarazed bench …`
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Train many small models on mixtures of the same data, adaptive and static, and judge them; goes on where it stood.
    Mixture(Args),
}

/// Options of `tarazed bench mixture`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Plan file, e.g. configs/mixture/small.toml.
    plan: PathBuf,
    /// Folder for data, runs and report.
    #[arg(long, value_name = "DIR")]
    work: PathBuf,
    /// Make the data and say what is due and how long it takes; train nothing.
    #[arg(long)]
    dry_run: bool,
    /// Keep what is finished in this file (JSON lines): its runs are not done again, even where the work folder is gone.
    #[arg(long, value_name = "FILE")]
    outcomes: Option<PathBuf>,
    /// First do N of the finished runs again, and halt where a trace is another; which, is decided by hashes.
    #[arg(long, value_name = "N", requires = "outcomes")]
    again: Option<NonZeroUsize>,
    /// Runs to do at once; decides no number [default: the processors over cluster.threads_per_rank times ranks].
    #[arg(long, value_name = "N")]
    parallel: Option<NonZeroUsize>,
}

/// Runs the command.
///
/// # Errors
/// Refused where plan, corpus or work folder do not fit together; as a run ends that does not end well; 34 after a signal.
pub fn run(command: &Command) -> Result<Exit, Failure> {
    match command {
        Command::Mixture(args) => mixture(args),
    }
}

fn mixture(args: &Args) -> Result<Exit, Failure> {
    let plan = Plan::load(&args.plan)?;
    let base = base(&plan)?;
    let work = std::path::absolute(&args.work).map_err(|e| {
        let cause = format!("cannot be made absolute ({e})");
        Failure::refused(
            "--work",
            cause,
            "start in another folder, or give the path from the root",
        )
    })?;
    let _lock = lock(&work)?;
    let parallel = args.parallel.map_or_else(|| fitting(&base), NonZeroUsize::get);
    print(&whole_plan(&plan, parallel))?;
    let ready = data(&plan, &base, &work)?;
    let runs: Vec<CaseRuns<'_>> = plan
        .cases()
        .map(|case| CaseRuns {
            plan: &plan,
            name: &case.name,
            facts: &ready[&case.name].facts,
            run_tokens: plan.steps * base.tokens_per_step(),
        })
        .collect();
    let (runtime, stop) = listen()?;
    let processes = Processes::new(&plan, &base, &ready, &work, stop)?;
    check_configs(&runs, &processes)?;
    let mut book = match &args.outcomes {
        Some(path) => Book::open(path, Header::of(&plan, &runs).map_err(|e| damaged(path, &e))?)?,
        None => Book::default(),
    };
    recall(&runs, &processes, &mut book)?;
    hold_to(&plan, &work)?;
    print(&estimate(&plan, &runs, &book, parallel))?;
    if args.dry_run {
        return Ok(Exit::Done);
    }
    book.begin()?;
    let ended = runtime.block_on(async {
        if let Some(count) = args.again {
            do_again(&runs, &processes, count.get(), parallel, &mut book).await?;
        }
        go(&runs, &processes, parallel, &mut book).await
    });
    if book.is_contradicted() {
        return ended.map(|()| Exit::Halted);
    }
    // Otherwise what is there is worth a report, however the bench ended; its end says more than a report that failed after it.
    let in_order: Vec<&Ready> = runs.iter().map(|case| &ready[case.name]).collect();
    let results = Results::of(&plan, &runs, &in_order, &book);
    let written = write_report(&work, &runs, &results, book.finished());
    ended.and(written)?;
    print(&format!("report: {}\n", short(&work.join("report.md")).display()))?;
    Ok(Exit::Done)
}

/// The config of all runs, with what the comparison asks of it.
fn base(plan: &Plan) -> Result<Config, Failure> {
    let mut set = plan.set.clone();
    set.push(format!("run.steps={}", plan.steps));
    let base = Config::load_for(&plan.base, &set, Some(plan.ranks))?;
    let refuse = |key: &str, reason: String, remedy: &str| {
        Err(Failure::from(ConfigError {
            key: key.to_owned(),
            reason,
            remedy: remedy.to_owned(),
        }))
    };
    let interval = base.evaluation.interval_steps;
    if interval == 0 || !plan.steps.is_multiple_of(interval) {
        let reason = format!(
            "{interval} does not divide the plan's {} steps: the end would not be measured",
            plan.steps
        );
        return refuse(
            "evaluation.interval_steps",
            reason,
            "choose a divisor, e.g. a twentieth",
        );
    }
    if base.data.held_out_fraction <= 0.0 || base.evaluation.sequences_per_domain_max == 0 {
        let reason = "is 0: there would be nothing to judge by".to_owned();
        return refuse(
            "data.held_out_fraction, evaluation.sequences_per_domain_max",
            reason,
            "set both",
        );
    }
    if base.data.refine.is_some() || base.data.prepared.is_some() {
        let reason = "cases are made of text as it is, and runs would train on other data".to_owned();
        return refuse("data.refine, data.prepared", reason, "leave both out of the base");
    }
    Ok(base)
}

fn damaged(path: &Path, e: &serde_json::Error) -> Failure {
    let cause = format!("cannot be read or written as JSON ({e})");
    Failure::refused(path.display(), cause, "restore the file, or name another --work")
}

/// What is judged, and how, is fixed before the first run: a work folder keeps its first plan.
fn hold_to(plan: &Plan, work: &Path) -> Result<(), Failure> {
    let path = work.join("plan.json");
    let damaged = |e: serde_json::Error| damaged(&path, &e);
    let fixed = plan.fixed().map_err(damaged)?;
    let failed =
        |e: std::io::Error| Failure::io(path.display(), &e, "cannot be read or written", "check its permissions");
    match std::fs::read(&path) {
        Ok(kept) if serde_json::from_slice::<serde_json::Value>(&kept).map_err(damaged)? == fixed => Ok(()),
        Ok(_) => Err(Failure::refused(
            path.display(),
            "is another plan: what is judged here was fixed before the first run",
            "put the plan back, or name another --work for the new one",
        )),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            std::fs::write(&path, serde_json::to_vec_pretty(&fixed).map_err(damaged)?).map_err(failed)
        }
        Err(e) => Err(failed(e)),
    }
}

/// Holds the work folder: two benches would do each other's runs.
fn lock(work: &Path) -> Result<File, Failure> {
    let failed = |e: std::io::Error| Failure::io(work.display(), &e, "cannot be made or locked", "name another --work");
    std::fs::create_dir_all(work).map_err(failed)?;
    let file = File::create(work.join("lock")).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Failure::refused(
            work.display(),
            "is in use by another bench",
            "wait for it, stop it, or name another --work",
        )),
        Err(TryLockError::Error(e)) => Err(failed(e)),
    }
}

fn data(plan: &Plan, base: &Config, work: &Path) -> Result<BTreeMap<String, Ready>, Failure> {
    let corpus = cases::corpus(plan, base)?;
    print(&format!(
        "corpus: {} domains, {} documents, BLAKE3 {}\n",
        corpus.len(),
        corpus.iter().map(|domain| domain.documents.len()).sum::<usize>(),
        cases::hash(&corpus)
    ))?;
    let tokenizer = cases::tokenizer(base, work)?;
    let mut ready = BTreeMap::new();
    for case in plan.cases() {
        let made = cases::make(plan, case, &corpus, base, &tokenizer, work)?;
        let tokens: u64 = made.facts.sizes().iter().sum();
        print(&format!(
            "case {}: {} domains, {tokens} training tokens; {} of {} held-out documents overlap with training text and are \
             left out\n",
            case.name,
            made.domains.len(),
            made.dropped,
            made.held_out_documents
        ))?;
        ready.insert(case.name.clone(), made);
    }
    Ok(ready)
}

/// A config that a run would refuse hours from now is refused now.
fn check_configs(runs: &[CaseRuns<'_>], processes: &Processes<'_>) -> Result<(), Failure> {
    for case in runs {
        for run in case.due(&Finished::new()) {
            processes.config(&run)?;
        }
    }
    Ok(())
}

/// Seconds of a run: the median of those that were done, the plan's figure before there are any.
fn seconds_per_run(plan: &Plan, seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
        .get(sorted.len() / 2)
        .copied()
        .unwrap_or(plan.expected_seconds_per_run)
}

fn duration(seconds: f64) -> String {
    let minutes = (seconds / 60.0).ceil() as u64;
    if minutes < 120 {
        format!("{minutes} min")
    } else {
        format!("{:.1} h", seconds / 3600.0)
    }
}

/// Runs that fit beside each other: what one computes on, it computes on alone.
fn fitting(base: &Config) -> usize {
    let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let of_a_run = u64::from(base.cluster.threads_per_rank) * u64::from(base.cluster.ranks);
    (processors / usize::try_from(of_a_run).unwrap_or(usize::MAX).max(1)).max(1)
}

/// Seconds that so many runs take, `parallel` at once.
fn seconds_of(runs: usize, each: f64, parallel: usize) -> f64 {
    runs.div_ceil(parallel) as f64 * each
}

fn side_by_side(parallel: usize) -> String {
    match parallel {
        1 => "one after another".to_owned(),
        _ => format!("{parallel} at once"),
    }
}

/// Said before anything is made: data take a while, too.
fn whole_plan(plan: &Plan, parallel: usize) -> String {
    let runs = plan.cases().count() * plan.runs_per_case_max();
    let each = plan.expected_seconds_per_run;
    format!(
        "plan {}: {runs} runs at most, about {} at the plan's {each:.0} s a run, {}; the data first\n",
        plan.name,
        duration(seconds_of(runs, each, parallel)),
        side_by_side(parallel)
    )
}

fn estimate(plan: &Plan, runs: &[CaseRuns<'_>], book: &Book, parallel: usize) -> String {
    let finished = book.finished();
    let total: usize = runs.iter().map(|case| case.total(finished)).sum();
    let left = total.saturating_sub(finished.len());
    let each = seconds_per_run(plan, &book.seconds());
    let whence = if book.seconds().is_empty() {
        "the plan expects"
    } else {
        "as those before took"
    };
    format!(
        "{total} runs, {} done before, {left} to do: about {} at {each:.0} s a run, {whence}, {}\n",
        finished.len(),
        duration(seconds_of(left, each, parallel)),
        side_by_side(parallel)
    )
}

/// Finished runs once more, before the rest: what would not hold is better known early.
async fn do_again(
    runs: &[CaseRuns<'_>],
    processes: &Processes<'_>,
    count: usize,
    parallel: usize,
    book: &mut Book,
) -> Result<(), Failure> {
    let program = processes.program();
    let chosen = choose(runs, book, program, count);
    let before = chosen.iter().filter(|run| is_done(book, program, &run.id)).count();
    print(&format!(
        "{} of {} finished runs to do again, {before} of them done again before\n",
        chosen.len(),
        book.finished().len()
    ))?;
    let mut told = |run: &RunId| print(&format!("again {run}: the same trace\n"));
    again(&chosen, &processes.again(), program, parallel, book, &mut told).await
}

async fn go(runs: &[CaseRuns<'_>], processes: &Processes<'_>, parallel: usize, book: &mut Book) -> Result<(), Failure> {
    let began = std::time::Instant::now();
    let before = book.finished().len();
    let mut told = |run: &RunId, book: &Book| {
        let finished = book.finished();
        let total: usize = runs.iter().map(|case| case.total(finished)).sum();
        let done = finished.len();
        // By the clock, so that runs which are done at once count as that.
        let each = began.elapsed().as_secs_f64() / (done - before) as f64;
        let left = duration(total.saturating_sub(done) as f64 * each);
        let end = finished[run].macro_end();
        print(&format!(
            "[{done}/{total}] {run}: {end:.4} bits per byte; {left} left\n"
        ))
    };
    carry_out(runs, processes, parallel, book, &mut told).await
}

fn write_report(work: &Path, runs: &[CaseRuns<'_>], results: &Results, finished: &Finished) -> Result<(), Failure> {
    let figures = work.join("figures");
    let put = |path: PathBuf, text: String| {
        // Under another name first: a reader never finds half of it.
        let fresh = path.with_extension("new");
        std::fs::write(&fresh, text)
            .and_then(|()| std::fs::rename(&fresh, &path))
            .map_err(|e| Failure::io(path.display(), &e, "cannot be written", "free space and try again"))
    };
    std::fs::create_dir_all(&figures)
        .map_err(|e| Failure::io(figures.display(), &e, "cannot be made", "free space and try again"))?;
    for (case, judged) in runs.iter().zip(&results.cases) {
        let arms: Vec<Arm> = judged.arms.iter().map(|arm| arm.arm.clone()).collect();
        let figure = |what, arm: &str| figures.join(report::figure_file(case.name, what, arm));
        put(figure(report::CURVES, ""), figure::curves(case, &arms, finished).draw())?;
        put(
            figure(report::DIFFERENCES, ""),
            figure::differences(case, &arms, finished).draw(),
        )?;
        for controller in results.plan.controllers() {
            if let Some(arm) = arms.iter().find(|arm| arm.label == controller.name) {
                put(
                    figure(report::MIXTURE, &arm.label),
                    figure::mixture(case, arm, finished).draw(),
                )?;
            }
        }
    }
    let json = serde_json::to_string_pretty(results)
        .map_err(|e| Failure::halted("report.json", format!("cannot be made ({e})"), "report this as a bug"))?;
    put(work.join("report.json"), json + "\n")?;
    put(work.join("report.md"), report::markdown(results))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimates_follow_what_was_seen() {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/mixture/small.toml"));
        let plan = Plan::load(path).expect("a good plan");
        assert_eq!(seconds_per_run(&plan, &[]), plan.expected_seconds_per_run);
        assert_eq!(seconds_per_run(&plan, &[9.0, 1.0, 2.0]), 2.0);
        assert_eq!(
            (duration(61.0), duration(119.0 * 60.0), duration(9_000.0)),
            ("2 min".into(), "119 min".into(), "2.5 h".into())
        );
        assert_eq!((seconds_of(7, 60.0, 1), seconds_of(7, 60.0, 2)), (420.0, 240.0));
        let said = |parallel| whole_plan(&plan, parallel);
        assert!(said(1).contains("one after another") && said(3).contains("3 at once"));
        assert_ne!(said(1).split("about").nth(1), said(3).split("about").nth(1));
    }

    /// The plans that ship are whole: their base loads, and it has what a comparison needs.
    #[test]
    fn the_plans_that_ship_are_good() {
        let mut bases = Vec::new();
        for name in ["small", "full"] {
            let path = format!("{}/../../configs/mixture/{name}.toml", env!("CARGO_MANIFEST_DIR"));
            let plan = Plan::load(Path::new(&path)).expect("a good plan");
            let base = base(&plan).expect("a good base");
            assert_eq!(plan.name, name);
            assert_eq!(base.run.steps, plan.steps);
            bases.push(base);
        }
        // The same model, on another corpus.
        assert_eq!((&bases[0].model, &bases[0].batch), (&bases[1].model, &bases[1].batch));
    }
}
