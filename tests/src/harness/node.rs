//! `tarazed node` processes: hosts of a run, on one machine, at addresses of their own.

use super::processes::Processes;
use super::program::tarazed;
use super::run::Outcome;
use super::{POLL, Project, WAIT};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// One host: its node process, and which ranks are its.
#[derive(Debug)]
pub struct Node {
    child: Child,
    name: String,
    address: String,
    run_dir: PathBuf,
    output: PathBuf,
    outcome: Option<Outcome>,
}

impl Node {
    /// Starts the node of this name, whose ranks listen at this address, for the run of this name.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(project: &Project, run: &str, name: &str, address: &str) -> Self {
        Self::start_with(project, run, name, address, &[])
    }

    /// As [`Node::start`], with further arguments.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start_with(project: &Project, run: &str, name: &str, address: &str, more: &[&str]) -> Self {
        Self::start_by(Command::new(tarazed()), project, run, name, address, more)
    }

    /// As [`Node::start`], in a network namespace of this name, and told its address itself.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start_by_address(namespace: &str, project: &Project, run: &str, name: &str, address: &str) -> Self {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]).arg(tarazed());
        Self::start_by(command, project, run, name, address, &["--address", address])
    }

    fn start_by(mut command: Command, project: &Project, run: &str, name: &str, address: &str, more: &[&str]) -> Self {
        let run_dir = project.run_dir(run);
        let begun = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let output = project
            .path()
            .join(format!("node-{name}-{}.out", begun.map_or(0, |since| since.as_nanos())));
        let child = command
            .args(["node", "--name", name, "--run-dir"])
            .arg(&run_dir)
            .args(more)
            .current_dir(project.path())
            .env("TMPDIR", project.temporary())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&output).expect("an output file"))
            .spawn()
            .expect("the program starts");
        Self {
            child,
            name: name.to_owned(),
            address: address.to_owned(),
            run_dir,
            output,
            outcome: None,
        }
    }

    /// What it said so far.
    #[must_use]
    pub fn said(&self) -> String {
        let text = std::fs::read_to_string(&self.output).unwrap_or_default();
        format!("--- node {}\n{text}", self.name)
    }

    /// The ranks that run here.
    #[must_use]
    pub fn ranks(&self) -> Vec<u32> {
        Processes::of(&self.run_dir).ranks_with("--address", &self.address)
    }

    /// A signal to the node's process alone.
    ///
    /// # Panics
    /// If it is gone.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("it is a child, and not reaped");
    }

    /// The whole host is lost: node and ranks, at once.
    ///
    /// # Panics
    /// If the node is gone already.
    pub fn lose(&mut self) {
        self.signal(Signal::KILL);
        let processes = Processes::of(&self.run_dir);
        for pid in self.ranks() {
            // One that is gone by now is what was wanted.
            let _ = processes.signal(pid, Signal::KILL);
        }
        self.finish();
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it does not come within [`WAIT`].
    #[track_caller]
    pub fn finish(&mut self) -> Outcome {
        let deadline = Instant::now() + WAIT;
        loop {
            if let Some(outcome) = &self.outcome {
                return outcome.clone();
            }
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                let stderr = std::fs::read(&self.output).unwrap_or_default();
                self.outcome = Some(Outcome::new(status, Vec::new(), stderr));
                continue;
            }
            assert!(Instant::now() < deadline, "the node does not end\n{}", self.said());
            std::thread::sleep(POLL);
        }
    }

    /// Waits until it has said this.
    ///
    /// # Panics
    /// If it ends before, or does not within [`WAIT`].
    #[track_caller]
    pub fn wait_for_words(&mut self, words: &str) {
        let deadline = Instant::now() + WAIT;
        while !self.said().contains(words) {
            let ended = self.child.try_wait().expect("a child can be waited for");
            assert!(
                ended.is_none(),
                "the node ended before it said '{words}'\n{}",
                self.said()
            );
            assert!(Instant::now() < deadline, "'{words}' is not said\n{}", self.said());
            std::thread::sleep(POLL);
        }
    }

    /// Its run's folder.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // One that has ended by now is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
