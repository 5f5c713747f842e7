//! Appending to files from a thread of its own, so that no handler waits for a disk (SUP-4).

use super::TraceHeads;
use crate::run_folder::RunPaths;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use tarazed_domain::{Mutant, StepsCompleted};
use tarazed_protocol::trace::TraceLine;
use tarazed_store::{Digest, TraceHead};

/// What became of a trace line.
#[derive(Debug)]
pub enum Appended {
    /// It lies in the file; the head names the file's prefix through it.
    Written(TraceHead),
    /// Everything written before the request of this step lies on the disk.
    Synced(StepsCompleted),
    /// It could not be written: file, cause and remedy.
    Failed(String),
}

/// What the writer of the trace is asked for.
#[derive(Debug)]
pub enum TraceRequest {
    /// A line of the trace, answered with [`Appended::Written`].
    Append(StepsCompleted, String),
    /// A line of `weights.jsonl`, not answered. Asked for before the trace line of its step, it lies before that one does.
    Weights(String),
    /// A sync of both, answered with [`Appended::Synced`] of this step.
    Sync(StepsCompleted),
}

/// Where trace lines go, and what goes with them. Answers come back in order.
pub trait TraceSink: Send + Sync {
    /// Queues a request.
    fn request(&self, request: TraceRequest);
}

/// The writer of `trace.jsonl`. A checkpoint that names the file's prefix is committed only after a sync.
pub struct TraceAppender(Sender<TraceRequest>);

impl TraceAppender {
    /// Opens the trace at its end, as [`TraceFile::open`] does. `report` is called from the writer's thread for each answer.
    ///
    /// # Errors
    /// If a file cannot be opened or read.
    pub fn open(
        paths: &RunPaths,
        weights_bytes: u64,
        report: impl Fn(Appended) + Send + 'static,
    ) -> std::io::Result<Self> {
        let writer = TraceFile::open(paths, weights_bytes)?;
        let (sender, receiver) = channel();
        std::thread::Builder::new()
            .name("trace".to_owned())
            .spawn(move || writer.run(&receiver, &report))?;
        Ok(Self(sender))
    }
}

impl TraceSink for TraceAppender {
    fn request(&self, request: TraceRequest) {
        // An error means that the thread ended after it reported a failure.
        let _ = self.0.send(request);
    }
}

/// Heads of the trace in `path` for each whole line from `base` on: what a manifest of one of these steps names.
///
/// # Errors
/// If the file cannot be read.
pub fn heads_from(path: &Path, base: StepsCompleted, lines: &[TraceLine]) -> std::io::Result<TraceHeads> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        read => read?,
    };
    let mut hasher = blake3::Hasher::new();
    let mut length_bytes = 0;
    let mut heads = TraceHeads::new();
    for (line, text) in lines.iter().zip(bytes.split_inclusive(|byte| *byte == b'\n')) {
        hasher.update(text);
        length_bytes += text.len() as u64;
        if line.step >= base {
            let last_line = String::from_utf8_lossy(text).trim_end().to_owned();
            let head = TraceHead {
                step: line.step,
                length_bytes,
                blake3: Digest(*hasher.finalize().as_bytes()),
                last_line,
            };
            heads.insert(line.step, head);
        }
    }
    Ok(heads)
}

/// `trace.jsonl` and `weights.jsonl`, open at their ends.
pub struct TraceFile {
    file: File,
    path: PathBuf,
    hasher: blake3::Hasher,
    length: u64,
    /// Open from the beginning: one opened later could be that of a controller that took over.
    weights: File,
    weights_path: PathBuf,
    /// Bytes of it that are committed or were written since.
    weights_length: u64,
    /// More lies behind them, which a life before this one wrote and did not commit.
    has_uncommitted_weights: bool,
}

impl TraceFile {
    /// Opens both at their ends. That of `weights.jsonl` is behind its first `weights_bytes` bytes; what follows is cut off with
    /// the first line of this life, so that a run that is refused after all loses nothing.
    ///
    /// # Errors
    /// If a file cannot be opened or read.
    pub fn open(paths: &RunPaths, weights_bytes: u64) -> std::io::Result<Self> {
        let (path, weights_path) = (paths.trace(), paths.weights());
        let weights = OpenOptions::new().create(true).append(true).open(&weights_path)?;
        let has_uncommitted_weights = weights.metadata()?.len() > weights_bytes;
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(&path)?;
        // The name of a file just made is on the disk only when its folder is.
        if let Some(folder) = path.parent() {
            File::open(folder)?.sync_all()?;
        }
        let mut before = Vec::new();
        file.read_to_end(&mut before)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&before);
        let length = before.len() as u64;
        Ok(Self {
            file,
            path,
            hasher,
            length,
            weights,
            weights_path,
            weights_length: weights_bytes,
            has_uncommitted_weights,
        })
    }

    fn run(mut self, requests: &Receiver<TraceRequest>, report: &dyn Fn(Appended)) {
        while let Ok(request) = requests.recv() {
            match self.perform(request) {
                Ok(done) => done.into_iter().for_each(report),
                Err(cause) => return report(Appended::Failed(cause)),
            }
        }
    }

    /// Does what is asked for.
    ///
    /// # Errors
    /// File, cause and remedy, where it could not be done. A part of a line is cut off again, so that what was acknowledged
    /// stays whole; nothing more can be asked for.
    pub fn perform(&mut self, request: TraceRequest) -> Result<Option<Appended>, String> {
        let done = match request {
            TraceRequest::Append(step, text) => {
                self.cut_weights()?;
                self.append(step, text).map(Some)
            }
            TraceRequest::Weights(text) => return self.append_weights(text).map(|()| None),
            // What goes with the trace first: the trace says what is committed.
            TraceRequest::Sync(step) => self
                .weights
                .sync_data()
                .and_then(|()| self.file.sync_data())
                .map(|()| Some(Appended::Synced(step))),
        };
        done.map_err(|error| {
            let _ = self.file.set_len(self.length);
            describe(&self.path, &error)
        })
    }

    fn append_weights(&mut self, mut text: String) -> Result<(), String> {
        text.push('\n');
        self.cut_weights()?;
        // Looked at before: unlike the trace's, this file may be that of the controller that took over.
        self.check_in_charge().map_err(|error| describe(&self.path, &error))?;
        self.weights.write_all(text.as_bytes()).map_err(|error| {
            let _ = self.weights.set_len(self.weights_length);
            describe(&self.weights_path, &error)
        })?;
        self.weights_length += text.len() as u64;
        Ok(())
    }

    fn cut_weights(&mut self) -> Result<(), String> {
        if !self.has_uncommitted_weights {
            return Ok(());
        }
        self.check_in_charge().map_err(|error| describe(&self.path, &error))?;
        let cut = self.weights.set_len(self.weights_length);
        cut.map_err(|error| describe(&self.weights_path, &error))?;
        self.has_uncommitted_weights = false;
        Ok(())
    }

    fn check_in_charge(&self) -> std::io::Result<()> {
        if crate::run_folder::is_named(&self.file, &self.path) || Mutant::DeposedWrites.is_on() {
            return Ok(());
        }
        Err(std::io::Error::other(
            "another controller took over this run, or the file was moved away",
        ))
    }

    /// Appends a line, in one write.
    ///
    /// # Errors
    /// If not all of it could be written, or the trace is another controller's by now: then nobody may rely on the line.
    fn append(&mut self, step: StepsCompleted, mut text: String) -> std::io::Result<Appended> {
        text.push('\n');
        self.file.write_all(text.as_bytes())?;
        self.check_in_charge()?;
        self.hasher.update(text.as_bytes());
        self.length += text.len() as u64;
        Ok(Appended::Written(TraceHead {
            step,
            length_bytes: self.length,
            blake3: Digest(*self.hasher.finalize().as_bytes()),
            last_line: text.trim_end().to_owned(),
        }))
    }
}

fn describe(path: &Path, error: &std::io::Error) -> String {
    let remedy = if error.kind() == std::io::ErrorKind::StorageFull {
        "free space on that disk and start again: the run resumes, nothing acknowledged is lost"
    } else {
        "check the disk and start again: the run resumes"
    };
    format!("{}: {error}; {remedy}", path.display())
}

/// Opens for appending; a last line that a crash cut short is ended, so that the next one stands alone.
fn open_lines(path: &Path) -> std::io::Result<File> {
    use std::io::{Seek, SeekFrom};
    let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
    if file.seek(SeekFrom::End(0))? > 0 {
        file.seek(SeekFrom::End(-1))?;
        let mut last = [0];
        file.read_exact(&mut last)?;
        if last != *b"\n" {
            file.write_all(b"\n")?;
        }
    }
    Ok(file)
}

/// A file of JSON lines that a run does not depend on: errors are said once and then ignored.
#[derive(Clone)]
pub struct JsonLines(Sender<String>);

impl JsonLines {
    /// Appends to the file at `path`.
    #[must_use]
    pub fn open(path: PathBuf) -> Self {
        let (sender, receiver) = channel::<String>();
        let spawned = std::thread::Builder::new()
            .name("json-lines".to_owned())
            .spawn(move || {
                let mut file = open_lines(&path);
                while let Ok(line) = receiver.recv() {
                    let result = match &mut file {
                        Ok(file) => file.write_all(format!("{line}\n").as_bytes()),
                        Err(_) => Ok(()),
                    };
                    if let Err(error) = result {
                        tracing::warn!("{}", describe(&path, &error));
                        file = Err(error);
                    }
                }
            });
        if let Err(error) = spawned {
            tracing::warn!("no thread for a log: {error}");
        }
        Self(sender)
    }

    /// Keeps nothing.
    #[must_use]
    pub fn nowhere() -> Self {
        Self(channel().0)
    }

    /// Queues a line.
    pub fn append(&self, value: &serde_json::Value) {
        // An error means that the log could not be opened, which was said.
        let _ = self.0.send(value.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines go to their files in the order of the requests; once the trace has another owner nothing goes anywhere.
    #[test]
    fn a_controller_that_lost_its_trace_writes_no_weights() {
        let folder = tempfile::tempdir().expect("a folder");
        let paths = RunPaths::new(folder.path());
        let mut file = TraceFile::open(&paths, 0).expect("opened");
        let weights = |text: &str| TraceRequest::Weights(text.to_owned());
        let line = |step| TraceRequest::Append(StepsCompleted(step), format!("line {step}"));
        assert!(file.perform(weights("one")).expect("written").is_none());
        let written = file.perform(line(1)).expect("written");
        assert!(matches!(written, Some(Appended::Written(head)) if head.step == StepsCompleted(1)));
        let synced = file.perform(TraceRequest::Sync(StepsCompleted(1))).expect("synced");
        assert!(matches!(synced, Some(Appended::Synced(StepsCompleted(1)))));
        std::fs::rename(paths.trace(), folder.path().join("old")).expect("moved");
        std::fs::write(paths.trace(), "line 1\n").expect("its successor's");
        for request in [weights("two"), line(2)] {
            let refused = file.perform(request).expect_err("not in charge");
            assert!(refused.contains("another controller took over"), "{refused}");
        }
        let text = |path| std::fs::read_to_string(path).expect("read");
        assert_eq!(
            (text(paths.weights()), text(paths.trace())),
            ("one\n".to_owned(), "line 1\n".to_owned())
        );
    }

    /// What a life before wrote and did not commit stays until there is a line of this one: the run may be refused till then.
    #[test]
    fn uncommitted_weights_are_cut_off_with_the_first_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let paths = RunPaths::new(folder.path());
        let text = || std::fs::read_to_string(paths.weights()).expect("read");
        for request in [
            TraceRequest::Append(StepsCompleted(1), "line 1".to_owned()),
            TraceRequest::Weights("three".to_owned()),
        ] {
            std::fs::write(paths.weights(), "one\ntwo\nthr").expect("written");
            let mut file = TraceFile::open(&paths, 4).expect("opened");
            file.perform(TraceRequest::Sync(StepsCompleted(0))).expect("synced");
            assert_eq!(text(), "one\ntwo\nthr");
            let adds = matches!(request, TraceRequest::Weights(_));
            file.perform(request).expect("written");
            assert_eq!(text(), if adds { "one\nthree\n" } else { "one\n" });
        }
    }

    /// A line cut short by a crash does not spoil the next one.
    #[test]
    fn lines_after_a_torn_one_stand_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("events.jsonl");
        std::fs::write(&path, "{\"kind\":\"a\"}\n{\"ki").expect("written");
        drop(open_lines(&path).expect("opened"));
        drop(open_lines(&path).expect("opened again"));
        let text = std::fs::read_to_string(&path).expect("read");
        assert_eq!(text, "{\"kind\":\"a\"}\n{\"ki\n");
    }
}
