use super::super::measure::tests::facts;
use super::super::plan::Plan;
use super::super::plan::tests::plan;
use super::super::schedule::tests::{Fake, do_all, runs};
use super::super::schedule::{CaseRuns, recall};
use super::*;
use crate::exit::Exit;

/// A folder for a file, and the comparison that it keeps.
struct Bench {
    folder: tempfile::TempDir,
    plan: Plan,
    facts: Facts,
}

impl Bench {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("a temporary folder"),
            plan: plan(),
            facts: facts(),
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("outcomes.jsonl")
    }

    fn text(&self) -> String {
        std::fs::read_to_string(self.path()).expect("the file")
    }

    fn write(&self, text: &[u8]) {
        std::fs::write(self.path(), text).expect("written");
    }

    fn cases(&self) -> [CaseRuns<'_>; 2] {
        ["plain", "noise"].map(|name| runs(&self.plan, name, &self.facts))
    }

    /// What a call begins with.
    fn open(&self, fake: &Fake) -> Result<Book, Failure> {
        let header = Header::of(&self.plan, &self.cases()).expect("a header");
        let mut book = Book::open(&self.path(), header)?;
        recall(&self.cases(), fake, &mut book)?;
        Ok(book)
    }

    /// A whole call, which stops after so many runs.
    fn call(&self, patience: Option<usize>) -> (Book, Fake) {
        let fake = Fake {
            patience,
            ..Fake::of("first")
        };
        let mut book = self.open(&fake).expect("a good file");
        book.begin().expect("written");
        let ended = do_all(&self.cases(), &fake, 2, &mut book);
        assert_eq!(ended.is_ok(), patience.is_none());
        (book, fake)
    }
}

/// BOOK-1, over four calls.
#[test]
fn runs_that_the_file_holds_are_not_done_again() {
    let bench = Bench::new();
    let mut expected = Book::default();
    do_all(&bench.cases(), &Fake::of("first"), 1, &mut expected).expect("done");
    let mut calls = Vec::new();
    // Nothing is left between two calls but the file.
    for patience in [Some(3), Some(20), None, None] {
        let (book, fake) = bench.call(patience);
        calls.extend(fake.done.take());
        assert_eq!(book.finished().len(), calls.len());
        if patience.is_none() {
            assert_eq!(book.finished(), expected.finished());
            assert_eq!(
                (book.programs(), book.seconds()),
                (expected.programs(), expected.seconds())
            );
        }
    }
    calls.sort();
    assert!(calls.iter().eq(expected.finished().keys()), "each once");
    assert_eq!(bench.text().lines().count(), 1 + calls.len());
}

/// A run in the folder that the file lacks is added to it; a call that only looks writes nothing.
#[test]
fn runs_that_are_found_elsewhere_are_added() {
    let bench = Bench::new();
    let fake = Fake::of("first");
    do_all(&bench.cases(), &fake, 1, &mut Book::default()).expect("done");
    let only_looks = bench.open(&fake).expect("nothing there");
    assert_eq!(only_looks.finished().len(), fake.done.borrow().len());
    drop(only_looks);
    assert!(!bench.path().exists());
    let mut book = bench.open(&fake).expect("nothing there");
    book.begin().expect("written");
    drop(book);
    assert_eq!(bench.text().lines().count(), 1 + fake.done.borrow().len());
    assert_eq!(bench.call(None).1.done.take(), []);
}

#[test]
fn two_benches_do_not_share_a_file() {
    let bench = Bench::new();
    let (book, _) = bench.call(Some(1));
    let refused = bench.open(&Fake::of("first")).expect_err("in use");
    assert!(refused.message.contains("is in use by another bench"), "{refused}");
    drop(book);
    bench.open(&Fake::of("first")).expect("free");
}

/// BOOK-3: cut at every byte, the file keeps its whole lines.
#[test]
fn a_line_that_broke_off_is_cut() {
    let bench = Bench::new();
    drop(bench.call(Some(2)));
    let whole = bench.text().into_bytes();
    let lines = |bytes: &[u8]| bytes.iter().filter(|byte| **byte == b'\n').count();
    assert!(lines(&whole) >= 3);
    for cut in 0..=whole.len() {
        bench.write(&whole[..cut]);
        let mut book = bench.open(&Fake::of("first")).expect("a good file");
        // A line that lacks its end alone is one.
        let is_ended = |at: usize| whole.get(at) == Some(&b'\n') && cut == at;
        let runs = (lines(&whole[..cut]) + usize::from(is_ended(cut))).saturating_sub(1);
        assert_eq!(book.finished().len(), runs, "cut to {cut} bytes");
        book.begin().expect("written");
        drop(book);
        let text = bench.text().into_bytes();
        assert_eq!(lines(&text), 1 + runs);
        assert!(whole.starts_with(&text) && text.ends_with(b"\n"), "cut to {cut} bytes");
    }
    // Nobody else's file is cut.
    bench.write(b"dear diary");
    let refused = bench.open(&Fake::of("first")).expect_err("another file");
    assert!(
        refused.message.contains("does not begin as a file of outcomes"),
        "{refused}"
    );
    assert_eq!(bench.text(), "dear diary");
}

/// BOOK-2.
#[test]
fn lines_of_another_comparison_are_refused() {
    let bench = Bench::new();
    drop(bench.call(None));
    let text = bench.text();
    let lines: Vec<&str> = text.lines().collect();
    let place = |arm: &str, seed: u64| {
        let is_it = |line: &&str| line.contains(&format!("\"case\":\"noise\",\"arm\":\"{arm}\",\"seed\":{seed}}}"));
        lines.iter().position(is_it).expect("a line")
    };
    let changed = |at: usize, from: &str, to: &str| {
        let mut lines: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        assert!(lines[at].contains(from), "{from}");
        lines[at] = lines[at].replacen(from, to, 1);
        lines.join("\n") + "\n"
    };
    let without = |at: usize| [&lines[..at], &lines[at + 1..]].concat().join("\n") + "\n";
    let (uniform, ado) = (place("uniform", 101), place("ado", 2));
    let config = |line: &str| {
        let at = line.find("\"config\":\"").expect("a config") + 10;
        line[at..at + 64].to_owned()
    };
    let named = |at: usize, run: &str| format!("line {} (noise / {run})", at + 1);
    for (text, parts) in [
        (
            changed(0, "\"version\":1", "\"version\":2"),
            ["line 1", "says format version 2"],
        ),
        (
            changed(0, "\"plan\":\"", "\"plan\":\"0"),
            ["line 1", "is of another plan (0"],
        ),
        (
            changed(0, "\"noise\":\"v\"", "\"noise\":\"w\""),
            ["line 1", "other data of case 'noise' (w, not v)"],
        ),
        (without(0), ["line 1", "does not say of which plan it is"]),
        (format!("{}\n{text}", lines[0]), ["line 2", "as line 1 does"]),
        (
            changed(uniform, "\"data_version\":\"v\"", "\"data_version\":\"w\""),
            [&named(uniform, "uniform / seed 101"), "is of other data"],
        ),
        (
            changed(uniform, &config(lines[uniform]), &"0".repeat(64)),
            [&named(uniform, "uniform / seed 101"), "is of another config"],
        ),
        (
            changed(uniform, "\"arm\":\"uniform\"", "\"arm\":\"other\""),
            [&named(uniform, "other / seed 101"), "is of no run of this plan"],
        ),
        (
            changed(uniform, "\"end\":", "\"ends\":"),
            [&format!("line {}", uniform + 1), "is none of this format"],
        ),
        (
            format!("{text}{}\n", lines[uniform]),
            [&format!("line {}", lines.len() + 1), "stands twice"],
        ),
        (without(ado), ["noise / ado-", "made of another which is missing"]),
    ] {
        bench.write(text.as_bytes());
        let refused = bench.open(&Fake::of("first")).expect_err(parts[1]);
        assert_eq!(refused.exit, Exit::Refused);
        assert!(
            parts.iter().all(|part| refused.message.contains(part)),
            "{parts:?}: {refused}"
        );
        assert!(refused.message.contains("; "), "it says what to do: {refused}");
        assert_eq!(bench.text(), text, "nothing is lost");
    }
}

/// That a run was done again is kept, and only of a run that is there with that trace.
#[test]
fn lines_of_runs_that_were_done_again_are_kept() {
    let bench = Bench::new();
    let (mut book, _) = bench.call(Some(3));
    let (run, proof) = book.proofs.iter().next().expect("a run");
    let again = Again {
        run: run.clone(),
        program: "second".to_owned(),
        device: "cpu".to_owned(),
        trace: proof.trace.clone(),
    };
    book.add_again(again.clone()).expect("written");
    drop(book);
    let book = bench.open(&Fake::of("first")).expect("a good file");
    assert_eq!(book.again(), std::slice::from_ref(&again));
    drop(book);
    let text = bench.text();
    let mut elsewhere = again.clone();
    elsewhere.run.seed = 999;
    bench.write((text.clone() + &Line::Again(elsewhere).print().expect("a line")).as_bytes());
    let refused = bench.open(&Fake::of("first")).expect_err("no such run");
    assert!(
        refused.message.contains("of a run that no line before has"),
        "{refused}"
    );

    // BOOK-5: what came out otherwise is kept, and nothing goes on behind it.
    bench.write(text.as_bytes());
    let mut book = bench.open(&Fake::of("first")).expect("a good file");
    book.begin().expect("nothing differs");
    let other = Again {
        trace: "0".repeat(64),
        ..again
    };
    let halted = book.add_again(other).expect_err("another trace");
    assert_eq!(halted.exit, Exit::Halted);
    drop(book);
    let mut book = bench.open(&Fake::of("first")).expect("a good file");
    assert_eq!(book.begin().expect_err("it ends here").message, halted.message);
}

/// BOOK-3: what a full disk leaves of a line is no line, and whoever writes next does not write behind it.
#[test]
fn a_line_that_found_no_room_is_cut_off() {
    let bench = Bench::new();
    let (mut book, _) = bench.call(Some(2));
    let text = bench.text();
    let outcomes = book.outcomes.as_mut().expect("a file");
    // A file that cannot be written, under the same name: the write fails, and the length is put right.
    let reader = File::open(bench.path()).expect("the file");
    let writer = outcomes.file.replace(reader).expect("a file");
    assert!(outcomes.append("half a").is_err());
    assert_eq!(outcomes.length, None, "not even cut");
    assert!(
        outcomes
            .append("more")
            .expect_err("no more")
            .message
            .contains("half a line")
    );
    outcomes.length = Some(text.len() as u64);
    outcomes.file = Some(writer);
    outcomes.append("{}\n").expect("written");
    assert_eq!(bench.text(), text + "{}\n");
}

/// A file that was put in the place of the one that is written, by a checkout or an editor.
#[test]
fn another_file_under_the_same_name_is_noticed() {
    let bench = Bench::new();
    let (mut book, _) = bench.call(Some(2));
    let text = bench.text();
    std::fs::remove_file(bench.path()).expect("removed");
    bench.write(text.as_bytes());
    let fake = Fake::of("first");
    let halted = do_all(&bench.cases(), &fake, 1, &mut book).expect_err("another file");
    assert!(
        halted.message.contains("another file than the one that was opened"),
        "{halted}"
    );
    assert_eq!(bench.text(), text);
}

/// BOOK-4.
#[test]
fn runs_of_another_device_are_refused() {
    let bench = Bench::new();
    let (mut book, _) = bench.call(Some(3));
    let (run, proof) = book.proofs.iter().next().expect("a run");
    let (mut other, mut proof) = (run.clone(), proof.clone());
    other.seed = 7;
    proof.device = "cuda".to_owned();
    let outcome = book.finished().values().next().expect("a run").clone();
    let refused = book.add(&other, Whole { outcome, proof }).expect_err("a GPU's");
    assert!(refused.message.contains("was done on cuda, others on cpu"), "{refused}");
    drop(book);
    let text = bench.text();
    let at = text.rfind("\"device\":\"cpu\"").expect("the last run's");
    bench.write((text[..at].to_owned() + &text[at..].replace("\"cpu\"", "\"cuda\"")).as_bytes());
    let refused = bench.open(&Fake::of("first")).expect_err("a GPU's");
    assert!(refused.message.contains("was done on cuda, others on cpu"), "{refused}");
}
