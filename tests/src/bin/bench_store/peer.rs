//! The others' side: a process that stores or fetches when told to.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Bytes of a part, as ours has them.
const PART_BYTES: u64 = tarazed_store::limits::PART_BYTES_MIN;

/// A running `store_peers.py`.
pub struct Peer {
    child: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    version: String,
    is_dcp: bool,
}

#[derive(Deserialize)]
struct Ready {
    version: String,
}

/// What one command took.
#[derive(Deserialize)]
pub struct Answer {
    pub seconds: f64,
    /// How long the caller of a save in the background waits.
    pub stall: Option<f64>,
}

impl Peer {
    pub fn start(python: &Path, inputs: &Path, store: &str, shards: u32) -> Result<Self> {
        let is_dcp = !store.starts_with("s3://");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/store_peers.py");
        let mut command = Command::new(python);
        command
            .arg(script)
            .arg(if is_dcp { "dcp" } else { "boto3" })
            .arg(inputs);
        match is_dcp {
            true => command.arg(Path::new(store).join("peer")),
            false => command.arg(store).arg(PART_BYTES.to_string()),
        };
        let mut child = command
            .arg(shards.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}; see tests/bench/README.md", python.display()))?;
        let commands = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("the peer has no output")?);
        let mut peer = Self {
            child,
            commands,
            answers,
            version: String::new(),
            is_dcp,
        };
        let ready: Ready = peer.answer()?;
        peer.version = ready.version;
        Ok(peer)
    }

    pub fn version(&self) -> &str {
        &self.version
    }

    /// Whether it can save in the background.
    pub const fn has_background(&self) -> bool {
        self.is_dcp
    }

    pub fn run(&mut self, command: &str, name: usize) -> Result<Answer> {
        let commands = self.commands.as_mut().context("the peer has no input")?;
        writeln!(commands, "{command} {name}").context("the peer is gone")?;
        commands.flush().context("the peer is gone")?;
        self.answer()
    }

    fn answer<T: for<'a> Deserialize<'a>>(&mut self) -> Result<T> {
        let mut line = String::new();
        self.answers.read_line(&mut line).context("the peer is gone")?;
        ensure!(!line.is_empty(), "the peer ended early; its error stands above");
        serde_json::from_str(&line).with_context(|| format!("the peer said: {line}"))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // End of input ends the script; if it does not listen any more, it is ended. Nothing is left to report to.
        self.commands = None;
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
