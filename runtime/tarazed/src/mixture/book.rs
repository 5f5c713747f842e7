//! What is known of the runs that are finished: their outcomes, how they were done, and the file that keeps both.
//!
//! - **BOOK-1** A run that the file holds is not done again, and nothing else of it need be there.
//! - **BOOK-2** A line is taken only for the run that the plan asks for: of this plan, this data, this config. Whatever else
//!   stands in the file is refused, and nothing of it is lost.
//! - **BOOK-3** A run is in the file, on the disk, before anybody hears of it. A line that was being written when the bench
//!   died, or when the disk was full, is cut off; it was never taken for one.
//! - **BOOK-4** All runs are of one device type: numbers are a function of it, too (DET-1).
//! - **BOOK-5** A run that was done again with another trace ends the comparison: that is kept, and nothing goes on behind it.
//!
//! Nothing is written before [`Book::begin`].

use super::measure::Facts;
use super::record::{Again, Header, Line, Proof, Recorded, VERSION};
use super::schedule::{Finished, RunId, RunSpec, Whole};
use crate::exit::Failure;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

const ANOTHER_FILE: &str = "put it back, or name another file with --outcomes";

/// The finished runs.
#[derive(Default, Debug)]
pub struct Book {
    finished: Finished,
    proofs: BTreeMap<RunId, Proof>,
    again: Vec<Again>,
    /// The first run that was done again and came out otherwise.
    difference: Option<Failure>,
    /// Lines of the file, each with its number, that are not taken up yet.
    recorded: BTreeMap<RunId, (usize, Recorded)>,
    outcomes: Option<Outcomes>,
}

/// The file.
#[derive(Debug)]
struct Outcomes {
    path: PathBuf,
    header: Header,
    /// None where it is not there yet.
    file: Option<File>,
    bytes: Vec<u8>,
    has_begun: bool,
    /// How long the file is, in whole lines; none when it could not be brought back to that.
    length: Option<u64>,
    /// Lines that came before it began.
    waiting: Vec<Line>,
}

impl Book {
    /// A book that is kept in a file, with what stands there.
    ///
    /// # Errors
    /// Refused where the file is of another plan or other data, or is none; else as files fail.
    pub fn open(path: &Path, header: Header) -> Result<Self, Failure> {
        let outcomes = Outcomes::open(path, header)?;
        let mut book = Self::default();
        for (at, text) in outcomes.lines()?.into_iter().enumerate() {
            book.read(&outcomes, at + 1, text)?;
        }
        book.outcomes = Some(outcomes);
        Ok(book)
    }

    fn read(&mut self, outcomes: &Outcomes, number: usize, text: &str) -> Result<(), Failure> {
        let refuse = |what: &str, cause: String, remedy: &str| {
            let place = format!("{} line {number}{what}", outcomes.path.display());
            Err(Failure::refused(place, cause, remedy))
        };
        let restore = "restore the file, or remove the line, and those of runs made of it, to do that run again";
        let line = match serde_json::from_str::<Line>(text) {
            Ok(line) => line,
            Err(e) => return refuse("", format!("is none of this format ({e})"), restore),
        };
        match line {
            Line::Plan(header) if number == 1 => match outcomes.header.difference(&header) {
                Some(cause) => refuse("", cause, ANOTHER_FILE),
                None => Ok(()),
            },
            _ if number == 1 => refuse("", "does not say of which plan it is".to_owned(), restore),
            Line::Plan(_) => refuse("", "says of which plan it is, as line 1 does".to_owned(), restore),
            Line::Run(recorded) => {
                let what = format!(" ({})", recorded.run);
                let theirs = outcomes.header.cases.get(&recorded.run.case);
                if theirs != Some(&recorded.proof.data_version) {
                    return refuse(&what, "is of other data than line 1 names".to_owned(), restore);
                }
                if self.recorded.contains_key(&recorded.run) {
                    return refuse(&what, "stands twice".to_owned(), restore);
                }
                let mut others = self.recorded.values();
                if let Some(cause) = others
                    .next()
                    .and_then(|(_, other)| of_another_device(&recorded.proof, &other.proof))
                {
                    return refuse(&what, cause, restore);
                }
                self.recorded.insert(recorded.run.clone(), (number, *recorded));
                Ok(())
            }
            Line::Again(again) => {
                let what = format!(" ({})", again.run);
                let Some((_, first)) = self.recorded.get(&again.run) else {
                    return refuse(&what, "is of a run that no line before has".to_owned(), restore);
                };
                let difference = difference(&first.proof, &again);
                self.keep(again, difference);
                Ok(())
            }
        }
    }

    /// What is judged.
    #[must_use]
    pub const fn finished(&self) -> &Finished {
        &self.finished
    }

    /// How a finished run was done.
    #[must_use]
    pub fn proof(&self, run: &RunId) -> Option<&Proof> {
        self.proofs.get(run)
    }

    /// Runs that were done once more, with the same trace.
    #[must_use]
    pub fn again(&self) -> &[Again] {
        &self.again
    }

    /// Times of runs, for estimates.
    #[must_use]
    pub fn seconds(&self) -> Vec<f64> {
        self.proofs.values().map(|proof| proof.seconds).collect()
    }

    /// Hashes of the programs that ended runs.
    #[must_use]
    pub fn programs(&self) -> BTreeSet<String> {
        self.proofs.values().map(|proof| proof.program.clone()).collect()
    }

    /// Whether the file holds the run, and it is not taken up yet.
    #[must_use]
    pub fn holds(&self, run: &RunId) -> bool {
        self.recorded.contains_key(run)
    }

    /// Takes up a run that the file holds, where it is the one that is meant: of this config (its hash) and this data (BOOK-2).
    ///
    /// # Errors
    /// Refused where it is another, naming it.
    pub fn take_up(&mut self, run: &RunSpec, config: &str, facts: &Facts) -> Result<(), Failure> {
        let Some((number, recorded)) = self.recorded.remove(&run.id) else {
            return Ok(());
        };
        let cause = if recorded.proof.config != config {
            "is of another config: the plan's base has changed since"
        } else if recorded.proof.data_version != facts.data_version || recorded.outcome.end.len() != facts.domains.len()
        {
            "is of other data: the corpus has changed since"
        } else {
            self.proofs.insert(run.id.clone(), recorded.proof);
            self.finished.insert(run.id.clone(), recorded.outcome);
            return Ok(());
        };
        Err(self.refusal(number, &run.id, cause, ANOTHER_FILE))
    }

    /// Called when all that can be taken up is.
    ///
    /// # Errors
    /// Refused where a line is left, naming it.
    pub fn expect_no_more(&self) -> Result<(), Failure> {
        let Some((run, (number, _))) = self.recorded.iter().min_by_key(|(_, (number, _))| number) else {
            return Ok(());
        };
        let cause = "is of no run of this plan, or of one that is made of another which is missing";
        let remedy = "restore the file, or remove the line";
        Err(self.refusal(*number, run, cause, remedy))
    }

    fn refusal(&self, number: usize, run: &RunId, cause: &str, remedy: &str) -> Failure {
        let path = self
            .outcomes
            .as_ref()
            .map(|outcomes| outcomes.path.display().to_string());
        let place = format!("{} line {number} ({run})", path.unwrap_or_default());
        Failure::refused(place, cause, remedy)
    }

    fn keep(&mut self, again: Again, difference: Option<Failure>) {
        match difference {
            None => self.again.push(again),
            Some(difference) => self.difference = self.difference.take().or(Some(difference)),
        }
    }

    /// Whether a run came out otherwise when it was done again.
    #[must_use]
    pub const fn is_contradicted(&self) -> bool {
        self.difference.is_some()
    }

    /// From here on the file is written: what broke off at its end is cut, and runs that were found elsewhere are added.
    ///
    /// # Errors
    /// Halted where a run came out otherwise when it was done again; else as files fail.
    pub fn begin(&mut self) -> Result<(), Failure> {
        if let Some(difference) = &self.difference {
            return Err(difference.clone());
        }
        match &mut self.outcomes {
            Some(outcomes) => outcomes.begin(),
            None => Ok(()),
        }
    }

    /// Takes up a run that is finished, and writes it down (BOOK-3).
    ///
    /// # Errors
    /// Refused where it is of another device type than the others; else as files fail.
    pub fn add(&mut self, run: &RunId, whole: Whole) -> Result<(), Failure> {
        let Whole { outcome, proof } = whole;
        let others = self.recorded.values().map(|(_, other)| &other.proof);
        let other = self.proofs.values().chain(others).next();
        if let Some(cause) = other.and_then(|other| of_another_device(&proof, other)) {
            let remedy = "set cluster.device in the plan's base to that of the others, or begin anew";
            return Err(Failure::refused(run, cause, remedy));
        }
        if let Some(outcomes) = &mut self.outcomes {
            outcomes.write(Line::Run(Box::new(Recorded {
                run: run.clone(),
                proof: proof.clone(),
                outcome: outcome.clone(),
            })))?;
        }
        self.finished.insert(run.clone(), outcome);
        self.proofs.insert(run.clone(), proof);
        Ok(())
    }

    /// Writes down that a finished run was done again.
    ///
    /// # Errors
    /// Halted where its trace was another (BOOK-5); else as files fail.
    pub fn add_again(&mut self, again: Again) -> Result<(), Failure> {
        let first = self.proofs.get(&again.run);
        let difference = first.and_then(|first| difference(first, &again));
        if let Some(outcomes) = &mut self.outcomes {
            outcomes.write(Line::Again(again.clone()))?;
        }
        self.keep(again, difference.clone());
        difference.map_or(Ok(()), Err)
    }
}

/// Why a run cannot stand beside another; none where it can.
fn of_another_device(proof: &Proof, other: &Proof) -> Option<String> {
    (proof.device != other.device).then(|| {
        format!(
            "was done on {}, others on {}: numbers are a function of the device type, too",
            proof.device, other.device
        )
    })
}

/// What is to be said of a run that came out otherwise; none where the traces are the same.
fn difference(first: &Proof, again: &Again) -> Option<Failure> {
    (first.trace != again.trace).then(|| {
        let cause = format!(
            "done again, it has another trace: {} by program {} on {}, first {} by program {} on {}",
            again.trace, again.program, again.device, first.trace, first.program, first.device
        );
        let remedy =
            "runs of these two programs cannot stand in one comparison: begin anew, with another --work and --outcomes";
        Failure::halted(&again.run, cause, remedy)
    })
}

impl Header {
    /// Why lines under another header are not for this one; none where it is the same.
    fn difference(&self, other: &Self) -> Option<String> {
        if other.version != VERSION {
            return Some(format!(
                "says format version {}, and this program knows {VERSION}",
                other.version
            ));
        }
        if other.plan != self.plan {
            let (theirs, ours) = (&other.plan, &self.plan);
            return Some(format!(
                "says that all is of another plan ({theirs}, not {ours}): what is judged was fixed before the first run"
            ));
        }
        let names = self.cases.keys().chain(other.cases.keys());
        let differs = |name: &&String| self.cases.get(*name) != other.cases.get(*name);
        let case = names.into_iter().find(differs)?;
        let version = |header: &Self| header.cases.get(case).cloned().unwrap_or_else(|| "none".to_owned());
        let (theirs, ours) = (version(other), version(self));
        Some(format!(
            "says other data of case '{case}' ({theirs}, not {ours}): the corpus has changed since"
        ))
    }
}

impl Outcomes {
    /// Opens and reads the file, where it is there, and holds it: two benches would record each other's runs twice.
    fn open(path: &Path, header: Header) -> Result<Self, Failure> {
        let failed = |e: std::io::Error| {
            let remedy = "check its permissions, or name another file with --outcomes";
            Failure::io(path.display(), &e, "cannot be opened or read", remedy)
        };
        let mut bytes = Vec::new();
        let file = match OpenOptions::new().read(true).append(true).open(path) {
            Ok(mut file) => {
                hold(path, &file)?;
                file.read_to_end(&mut bytes).map_err(failed)?;
                Some(file)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(failed(e)),
        };
        Ok(Self {
            path: path.to_owned(),
            header,
            file,
            bytes,
            has_begun: false,
            length: Some(0),
            waiting: Vec::new(),
        })
    }

    /// Bytes of whole lines: what follows broke off. A last line that lacks its end alone is whole: an editor may have left
    /// that out.
    fn whole(&self) -> &[u8] {
        let end = self
            .bytes
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1);
        match serde_json::from_slice::<Line>(&self.bytes[end..]) {
            Ok(_) => &self.bytes,
            Err(_) => &self.bytes[..end],
        }
    }

    fn lines(&self) -> Result<Vec<&str>, Failure> {
        let refuse = |cause| {
            let remedy = "name another file with --outcomes";
            Failure::refused(self.path.display(), cause, remedy)
        };
        let whole = self.whole();
        // Where not even the first line is whole, it has to be the beginning of ours: nobody's file is cut by mistake.
        if whole.is_empty() && !self.first_line()?.as_bytes().starts_with(&self.bytes) {
            return Err(refuse(
                "does not begin as a file of outcomes of this plan and this data",
            ));
        }
        let text = std::str::from_utf8(whole).map_err(|_| refuse("is no text"))?;
        Ok(text.lines().collect())
    }

    fn first_line(&self) -> Result<String, Failure> {
        self.text(&Line::Plan(self.header.clone()))
    }

    fn text(&self, line: &Line) -> Result<String, Failure> {
        let cannot = |e: serde_json::Error| {
            Failure::halted(
                self.path.display(),
                format!("a line cannot be made ({e})"),
                "report this as a bug",
            )
        };
        line.print().map_err(cannot)
    }

    fn failed(&self, e: &std::io::Error) -> Failure {
        Failure::io(self.path.display(), e, "cannot be written", "free space and try again")
    }

    fn begin(&mut self) -> Result<(), Failure> {
        if self.file.is_none() {
            let file = self.create().map_err(|e| self.failed(&e))?;
            hold(&self.path, &file)?;
            self.file = Some(file);
        }
        let whole = self.whole().len();
        let (broken, lacks_end) = (
            self.bytes.len() - whole,
            !self.bytes[..whole].is_empty() && self.bytes[whole - 1] != b'\n',
        );
        if let Some(file) = self.file.as_ref().filter(|_| broken > 0) {
            eprintln!(
                "{}: {broken} bytes at its end broke off, and are cut",
                self.path.display()
            );
            file.set_len(whole as u64).map_err(|e| self.failed(&e))?;
        }
        self.bytes.clear();
        self.length = Some(whole as u64);
        self.has_begun = true;
        if lacks_end {
            self.append("\n")?;
        }
        if whole == 0 {
            self.write(Line::Plan(self.header.clone()))?;
        }
        let waiting = std::mem::take(&mut self.waiting);
        waiting.into_iter().try_for_each(|line| self.write(line))
    }

    fn create(&self) -> std::io::Result<File> {
        let folder = match self.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        std::fs::create_dir_all(folder)?;
        let file = OpenOptions::new().create_new(true).append(true).open(&self.path)?;
        // Its name, too, outlives a power cut.
        File::open(folder)?.sync_all()?;
        Ok(file)
    }

    fn write(&mut self, line: Line) -> Result<(), Failure> {
        if !self.has_begun {
            self.waiting.push(line);
            return Ok(());
        }
        let text = self.text(&line)?;
        self.append(&text)
    }

    /// All of it, or nothing: what a full disk leaves of it is cut off again, or the next line would begin in its middle.
    fn append(&mut self, text: &str) -> Result<(), Failure> {
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        let lost = |cause: &str| {
            Failure::halted(
                self.path.display(),
                cause,
                "the same command goes on: the work folder has what it lacks",
            )
        };
        let Some(length) = self.length else {
            return Err(lost("ends in half a line that could not be cut off"));
        };
        if !is_at(file, &self.path) {
            return Err(lost("is another file than the one that was opened"));
        }
        let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_data());
        match written {
            Ok(()) => {
                self.length = Some(length + text.len() as u64);
                Ok(())
            }
            Err(e) => {
                self.length = file.set_len(length).is_ok().then_some(length);
                Err(self.failed(&e))
            }
        }
    }
}

/// Whether the path still names this file: a checkout of the folder, or an editor, may have put another in its place.
fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(ours), Ok(theirs)) = (file.metadata(), std::fs::metadata(path)) else {
        return false;
    };
    (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino())
}

fn hold(path: &Path, file: &File) -> Result<(), Failure> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(Failure::refused(
            path.display(),
            "is in use by another bench",
            "wait for it, stop it, or name another file with --outcomes",
        )),
        Err(TryLockError::Error(e)) => Err(Failure::io(path.display(), &e, "cannot be locked", "try again")),
    }
}

#[cfg(test)]
mod tests;
