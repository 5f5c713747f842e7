//! The other side of a benchmark: a script that does one thing for each line it is told, and answers in JSON.

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A running script; ended with this.
pub struct Peer {
    name: String,
    child: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts `command`, which is called `name` in errors.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(name: &str, command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name}; see tests/bench/README.md"))?;
        let commands = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("a peer without output")?);
        Ok(Self {
            name: name.to_owned(),
            child,
            commands,
            answers,
        })
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tells it one line, and waits for the answer.
    ///
    /// # Errors
    /// If it is gone, or answers something else.
    pub fn ask<T: DeserializeOwned>(&mut self, line: &str) -> Result<T> {
        let gone = || format!("{} is gone", self.name);
        let commands = self.commands.as_mut().with_context(gone)?;
        writeln!(commands, "{line}").with_context(gone)?;
        commands.flush().with_context(gone)?;
        self.answer()
    }

    /// Waits for its next line.
    ///
    /// # Errors
    /// If it is gone, or says something else.
    pub fn answer<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        let read = self.answers.read_line(&mut line);
        read.with_context(|| format!("{} is gone", self.name))?;
        ensure!(!line.is_empty(), "{} ended early; its error stands above", self.name);
        serde_json::from_str(&line).with_context(|| format!("{} said: {line}", self.name))
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
