//! Finished runs, done once more: does another program, or another machine, find the same, bit for bit (DET-1)?
//!
//! Which ones is decided by hashes alone, of the program that does them and of their ids: nobody picks those that would agree.
//! A bench that was stopped goes on with the same: what this program has done again counts first. One that comes out otherwise
//! ends the comparison (BOOK-5).

use super::book::Book;
use super::record::Again;
use super::schedule::{CaseRuns, RunId, RunSpec, Runner, Whole, side_by_side};
use crate::exit::Failure;
use std::collections::BTreeSet;

const CONTEXT: &str = "tarazed bench mixture again v1";

/// The finished runs that this program (its hash) is to do again, `count` where there are as many: those that it has done again
/// before, then those that another program did; they are spread over the cases, and one of them at least adapts its mixture, if any does.
#[must_use]
pub fn choose(cases: &[CaseRuns<'_>], book: &Book, program: &str, count: usize) -> Vec<RunSpec> {
    let before: BTreeSet<&RunId> = done_by(book, program).collect();
    let mut all = Vec::new();
    for case in cases {
        let finished = case.all(book.finished()).into_iter().filter_map(|run| {
            let is_own = book.proof(&run.id)?.program == program;
            Some(((!before.contains(&run.id), is_own), rank(program, &run.id), run))
        });
        for kind in [(false, false), (false, true), (true, false), (true, true)] {
            let mut group: Vec<_> = finished.clone().filter(|(of, ..)| *of == kind).collect();
            group.sort_by_key(|(_, rank, _)| *rank);
            // The first of each case come before the second of any.
            let turns = group.into_iter().enumerate();
            all.extend(turns.map(|(turn, (_, rank, run))| ((kind, turn, rank), run)));
        }
    }
    all.sort_by_key(|(order, _)| *order);
    let mut all: Vec<RunSpec> = all.into_iter().map(|(_, run)| run).collect();
    let rest = all.split_off(count.min(all.len()));
    if !all.iter().any(RunSpec::is_adaptive)
        && let (Some(last), Some(adaptive)) = (all.last_mut(), rest.into_iter().find(RunSpec::is_adaptive))
    {
        *last = adaptive;
    }
    all
}

fn rank(program: &str, run: &RunId) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    hasher.update(program.as_bytes());
    hasher.update(run.to_string().as_bytes());
    *hasher.finalize().as_bytes()
}

/// Whether this program has done the run again before.
#[must_use]
pub fn is_done(book: &Book, program: &str, run: &RunId) -> bool {
    done_by(book, program).any(|done| done == run)
}

fn done_by<'a>(book: &'a Book, program: &'a str) -> impl Iterator<Item = &'a RunId> {
    let lines = book.again().iter().filter(move |line| line.program == program);
    lines.map(|line| &line.run)
}

/// Does those of these runs again that this program has not yet, compares whole traces by their hashes, and writes down what came
/// out. `told` hears of each.
///
/// # Errors
/// Halted where a trace is another; else as [`Runner::run`]. What was equal stays in the book.
pub async fn again(
    chosen: &[RunSpec],
    runner: &impl Runner,
    program: &str,
    parallel: usize,
    book: &mut Book,
    told: &mut dyn FnMut(&RunId) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let due = |book: &Book, begun: &BTreeSet<RunId>| {
        let mut left = chosen.iter().filter(|run| !is_done(book, program, &run.id));
        left.find(|run| !begun.contains(&run.id)).cloned()
    };
    let mut done = |book: &mut Book, run: &RunId, whole: Whole| {
        let line = compared(book, run, &whole)?;
        book.add_again(line)?;
        told(run)
    };
    side_by_side(runner, parallel, book, &due, &mut done).await
}

fn compared(book: &Book, run: &RunId, whole: &Whole) -> Result<Again, Failure> {
    let (Some(first), Some(outcome)) = (book.proof(run), book.finished().get(run)) else {
        return Err(Failure::halted(run, "was never finished", "report this as a bug"));
    };
    let second = &whole.proof;
    // By their texts: a number that is none equals itself there.
    if first.trace == second.trace && serde_json::to_string(outcome).ok() != serde_json::to_string(&whole.outcome).ok()
    {
        let cause = "done again, it has the trace that is recorded, and another outcome: the record was changed";
        return Err(Failure::halted(run, cause, "restore the file, or remove its line"));
    }
    Ok(Again {
        run: run.clone(),
        program: second.program.clone(),
        device: second.device.clone(),
        trace: second.trace.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::measure::Facts;
    use super::super::measure::tests::facts;
    use super::super::plan::Plan;
    use super::super::plan::tests::plan;
    use super::super::schedule::tests::{Fake, do_all, runs};
    use super::*;
    use crate::exit::Exit;

    fn cases<'a>(plan: &'a Plan, facts: &'a Facts) -> [CaseRuns<'a>; 2] {
        [runs(plan, "plain", facts), runs(plan, "noise", facts)]
    }

    fn whole(cases: &[CaseRuns<'_>], program: &'static str) -> Book {
        let mut book = Book::default();
        do_all(cases, &Fake::of(program), 1, &mut book).expect("done");
        book
    }

    #[test]
    fn the_choice_is_spread_over_cases_and_never_without_an_adaptive_run() {
        let (plan, facts) = (plan(), facts());
        let cases = cases(&plan, &facts);
        let book = whole(&cases, "first");
        let mut seen = BTreeSet::new();
        for program in (0..20).map(|i| format!("program {i}")) {
            for count in [1, 2, 5] {
                let chosen = choose(&cases, &book, &program, count);
                assert_eq!(chosen, choose(&cases, &book, &program, count));
                let ids: BTreeSet<&RunId> = chosen.iter().map(|run| &run.id).collect();
                assert_eq!(ids.len(), count);
                assert!(chosen.iter().any(RunSpec::is_adaptive), "{chosen:?}");
                let of_case: BTreeSet<&str> = ids.iter().map(|run| run.case.as_str()).collect();
                assert!(count < 5 || of_case.len() == 2, "{ids:?}");
                seen.insert(format!("{ids:?}"));
            }
        }
        assert!(seen.len() > 30, "another program picks others: {}", seen.len());
        assert_eq!(choose(&cases, &book, "x", 10_000).len(), book.finished().len());
        assert!(choose(&cases, &Book::default(), "x", 5).is_empty());
    }

    /// What another program did comes first; a program that did all itself may still do some again.
    #[test]
    fn runs_of_other_programs_come_first() {
        let (plan, facts) = (plan(), facts());
        let cases = cases(&plan, &facts);
        let mut book = Book::default();
        let first = Fake {
            patience: Some(10),
            ..Fake::of("first")
        };
        assert!(do_all(&cases, &first, 1, &mut book).is_err());
        do_all(&cases, &Fake::of("second"), 1, &mut book).expect("done");
        let chosen = choose(&cases, &book, "second", 10);
        // The tenth gives way to an adaptive one: the first program had done none.
        let of_first = chosen
            .iter()
            .filter(|run| book.proof(&run.id).is_some_and(|proof| proof.program == "first"));
        assert_eq!(of_first.count(), 9);
        assert!(chosen[9].is_adaptive());
    }

    #[test]
    fn the_same_trace_is_written_down_and_another_halts() {
        let (plan, facts) = (plan(), facts());
        let cases = cases(&plan, &facts);
        let mut book = whole(&cases, "first");
        let chosen = choose(&cases, &book, "second", 6);
        let go = |fake: &Fake, book: &mut Book| {
            futures::executor::block_on(again(&chosen, fake, "second", 2, book, &mut |_| Ok(())))
        };
        // Stopped half way, the same ones are gone on with, each once, and chosen again.
        let stopped = Fake {
            patience: Some(2),
            ..Fake::of("second")
        };
        assert!(go(&stopped, &mut book).is_err());
        assert_eq!(book.again().len(), 2);
        let second = Fake::of("second");
        go(&second, &mut book).expect("the same");
        assert_eq!(second.done.borrow().len(), 4);
        let mut done: Vec<&RunId> = book.again().iter().map(|line| &line.run).collect();
        done.sort();
        let mut asked: Vec<&RunId> = chosen.iter().map(|run| &run.id).collect();
        asked.sort();
        assert_eq!(done, asked);
        let sorted = |mut runs: Vec<RunSpec>| {
            runs.sort_by(|a, b| a.id.cmp(&b.id));
            runs
        };
        assert_eq!(sorted(choose(&cases, &book, "second", 6)), sorted(chosen.clone()));

        // One that computes something else is found out.
        let other = Fake {
            wrong: Some(chosen[3].id.clone()),
            ..Fake::of("third")
        };
        let ended = futures::executor::block_on(again(&chosen, &other, "third", 2, &mut book, &mut |_| Ok(())));
        let failure = ended.expect_err("a difference");
        assert_eq!(failure.exit, Exit::Halted);
        let first = &book.proof(&chosen[3].id).expect("done").trace;
        for part in [
            chosen[3].id.to_string().as_str(),
            "by program third",
            "by program first",
            first,
        ] {
            assert!(failure.message.contains(part), "{part}: {failure}");
        }
        let is_it = |line: &&Again| line.run == chosen[3].id && line.program == "third";
        assert!(book.again().iter().find(is_it).is_none());
        assert!(book.is_contradicted());
        assert_eq!(book.begin().expect_err("the end of it").message, failure.message);
    }
}
