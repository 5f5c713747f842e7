//! Appending to files from a thread of its own, so that no handler waits for a disk (SUP-4).

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use tarazed_domain::StepsCompleted;
use tarazed_store::{Digest, TraceHead};

/// What became of a trace line.
#[derive(Debug)]
pub enum Appended {
    /// It lies in the file; the head names the file's prefix through it.
    Written(TraceHead),
    /// It could not be written: file, cause and remedy.
    Failed(String),
}

/// The writer of `trace.jsonl`. The file is synced before any checkpoint that names it is committed.
pub struct TraceAppender(Sender<(StepsCompleted, String, bool)>);

impl TraceAppender {
    /// Opens the trace at its end. `report` is called from the writer's thread for each line.
    ///
    /// # Errors
    /// If the file cannot be opened or read.
    pub fn open(path: PathBuf, report: impl Fn(Appended) + Send + 'static) -> std::io::Result<Self> {
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(&path)?;
        let mut before = Vec::new();
        file.read_to_end(&mut before)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&before);
        let length = before.len() as u64;
        let (sender, receiver) = channel();
        let writer = TraceThread {
            file,
            path,
            hasher,
            length,
        };
        std::thread::Builder::new()
            .name("trace".to_owned())
            .spawn(move || writer.run(&receiver, &report))?;
        Ok(Self(sender))
    }

    /// Queues a line. `durable` lines are synced to the disk.
    pub fn append(&self, step: StepsCompleted, text: String, durable: bool) {
        // An error means that the thread ended after it reported a failure.
        let _ = self.0.send((step, text, durable));
    }
}

struct TraceThread {
    file: File,
    path: PathBuf,
    hasher: blake3::Hasher,
    length: u64,
}

impl TraceThread {
    fn run(mut self, lines: &Receiver<(StepsCompleted, String, bool)>, report: &dyn Fn(Appended)) {
        while let Ok((step, mut text, durable)) = lines.recv() {
            text.push('\n');
            let written = self.file.write_all(text.as_bytes());
            let synced = if durable {
                written.and_then(|()| self.file.sync_data())
            } else {
                written
            };
            if let Err(error) = synced {
                // A part of a line is cut off again, so that what was acknowledged stays whole.
                let _ = self.file.set_len(self.length);
                report(Appended::Failed(describe(&self.path, &error)));
                return;
            }
            self.hasher.update(text.as_bytes());
            self.length += text.len() as u64;
            report(Appended::Written(TraceHead {
                step,
                length_bytes: self.length,
                blake3: Digest(*self.hasher.finalize().as_bytes()),
                last_line: text.trim_end().to_owned(),
            }));
        }
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
                let mut file = OpenOptions::new().create(true).append(true).open(&path);
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

    /// Queues a line.
    pub fn append(&self, value: &serde_json::Value) {
        // An error means that the log could not be opened, which was said.
        let _ = self.0.send(value.to_string());
    }
}
