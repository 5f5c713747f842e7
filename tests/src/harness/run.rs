//! One `tarazed train` process: watched through its files and its status, harmed from outside, read at the end.

use super::processes::Processes;
use super::project::Train;
use super::{POLL, WAIT, program, trace};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process_group, prlimit};
use serde::Deserialize;
use serde_json::Value;
use std::fs::File;
use std::io::{ErrorKind, PipeReader, Read, Seek, SeekFrom, Write, pipe};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Characters of output shown with a failure.
const TAIL_CHARS: usize = 6_000;
/// Bytes read from a trace's end to find its last step; a line of a test's trace is far shorter.
const LAST_LINE_BYTES: u64 = 16 * 1024;

/// One worker in `tarazed status --json`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub struct WorkerStatus {
    /// Slot.
    pub worker: u32,
    /// Rank in the present generation, if it takes part.
    pub rank: Option<u32>,
    /// Process id; 0 before it is ready.
    pub pid: u32,
    /// Which life.
    pub incarnation: u32,
    /// First lane and one past the last.
    pub lanes: Option<[u32; 2]>,
    /// Steps completed, as last heard.
    pub step: u64,
    /// E.g. `training`.
    pub state: String,
}

/// `tarazed status --json`
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub struct Status {
    /// Whether a controller answered.
    pub live: bool,
    /// Generation; none where no controller answered.
    pub generation: Option<u64>,
    /// Committed steps.
    pub step: u64,
    /// The workers; none where no controller answered.
    pub workers: Vec<WorkerStatus>,
    /// Workers that hold each optimizer shard, primary first.
    #[serde(default)]
    pub shards: Vec<Vec<u32>>,
}

impl Status {
    /// Whether all of `count` workers take part.
    #[must_use]
    pub fn all_train(&self, count: usize) -> bool {
        self.workers.len() == count && self.workers.iter().all(|worker| worker.state == "training")
    }
}

/// How a command of the program ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Exit code; none where a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    pub(super) fn new(status: ExitStatus, stdout: Vec<u8>, stderr: Vec<u8>) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self {
            code: status.code(),
            signal: status.signal(),
            stdout: text(stdout),
            stderr: text(stderr),
        }
    }

    /// The end of what it said.
    #[must_use]
    pub fn tail(&self) -> String {
        format!(
            "--- ended with code {:?}, signal {:?}\n--- standard output\n{}\n--- standard error\n{}",
            self.code,
            self.signal,
            tail(&self.stdout),
            tail(&self.stderr)
        )
    }

    /// Fails unless it ended with this code.
    ///
    /// # Panics
    /// If it did not.
    #[track_caller]
    pub fn assert_code(&self, code: i32) {
        assert_eq!(self.code, Some(code), "exit code\n{}", self.tail());
    }

    /// Fails unless standard error holds `part`.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn assert_says(&self, part: &str) {
        assert!(self.stderr.contains(part), "'{part}' is not said\n{}", self.tail());
    }
}

/// A training run that was started. Ends with whatever is left of it when dropped.
#[derive(Debug)]
pub struct Run {
    child: Child,
    outcome: Option<Outcome>,
    dir: PathBuf,
    folder: PathBuf,
    stdout: PathBuf,
    stderr: PathBuf,
    processes: Processes,
    left: bool,
    began: Instant,
    /// The other end of its output, where nobody reads it.
    _unread: Option<PipeReader>,
}

impl Run {
    /// Starts the command.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(train: &Train) -> Self {
        let create = |name| Stdio::from(File::create(train.output(name)).expect("an output file"));
        Self::start_on(train, [create("stdout"), create("stderr")], None)
    }

    /// Starts the command on a terminal that stands still: both outputs are one full pipe that nobody reads, so that
    /// nothing it says can be known.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start_unheard(train: &Train) -> Self {
        let (unread, mut full) = pipe().expect("a pipe");
        rustix::io::ioctl_fionbio(&full, true).expect("a pipe that says when it is full");
        let filled = loop {
            // One byte at a time: at the end not a single one must fit.
            if let Err(error) = full.write(b".") {
                break error;
            }
        };
        assert_eq!(filled.kind(), ErrorKind::WouldBlock, "the pipe is full");
        rustix::io::ioctl_fionbio(&full, false).expect("a pipe that blocks");
        let both = [full.try_clone().expect("a descriptor"), full].map(Stdio::from);
        for name in ["stdout", "stderr"] {
            File::create(train.output(name)).expect("an empty output file");
        }
        Self::start_on(train, both, Some(unread))
    }

    fn start_on(train: &Train, [out, error]: [Stdio; 2], unread: Option<PipeReader>) -> Self {
        let (stdout, stderr) = (train.output("stdout"), train.output("stderr"));
        let mut command = train.command();
        command.stdout(out).stderr(error).process_group(0);
        let child = command.spawn().expect("the program starts");
        let folder = command.get_current_dir().expect("set by the project").to_owned();
        Self {
            child,
            outcome: None,
            dir: train.run_dir().to_owned(),
            folder,
            stdout,
            stderr,
            processes: Processes::of(train.run_dir()),
            left: false,
            began: Instant::now(),
            _unread: unread,
        }
    }

    /// The run folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its rank processes.
    #[must_use]
    pub const fn processes(&self) -> &Processes {
        &self.processes
    }

    /// How the process ended, if it has.
    ///
    /// # Panics
    /// If its output cannot be read back.
    pub fn ended(&mut self) -> Option<&Outcome> {
        if self.outcome.is_none()
            && let Some(status) = self.child.try_wait().expect("a child can be waited for")
        {
            let read = |path: &Path| std::fs::read(path).expect("its output");
            self.outcome = Some(Outcome::new(status, read(&self.stdout), read(&self.stderr)));
        }
        self.outcome.as_ref()
    }

    /// Waits for the end of the process.
    ///
    /// # Panics
    /// If it does not come within [`WAIT`].
    #[track_caller]
    pub fn finish(&mut self) -> Outcome {
        self.finish_within(WAIT)
    }

    /// Waits for the end of the process.
    ///
    /// # Panics
    /// If it does not come within `limit`.
    #[track_caller]
    pub fn finish_within(&mut self, limit: Duration) -> Outcome {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(outcome) = self.ended() {
                return outcome.clone();
            }
            assert!(Instant::now() < deadline, "the run does not end\n{}", self.tail());
            std::thread::sleep(POLL);
        }
    }

    /// Waits until `look` finds what it looks for.
    ///
    /// # Panics
    /// If the run ends before, or [`WAIT`] has passed.
    #[track_caller]
    pub fn wait_for<T>(&mut self, what: &str, mut look: impl FnMut(&mut Self) -> Option<T>) -> T {
        let deadline = Instant::now() + WAIT;
        loop {
            // Asked before the look: whatever it did last must count.
            let ended = self.ended().is_some();
            if let Some(found) = look(self) {
                return found;
            }
            assert!(!ended, "the run ended before {what}\n{}", self.tail());
            assert!(Instant::now() < deadline, "no {what} within {WAIT:?}\n{}", self.tail());
            std::thread::sleep(POLL);
        }
    }

    /// Waits until `step` is committed.
    #[track_caller]
    pub fn wait_for_step(&mut self, step: u64) {
        self.wait_for(&format!("step {step}"), |run| (run.step() >= step).then_some(()));
    }

    /// Waits until the status is as `wanted`.
    #[track_caller]
    pub fn wait_for_status(&mut self, what: &str, wanted: impl Fn(&Status) -> bool) -> Status {
        self.wait_for(what, |run| run.try_status().filter(&wanted))
    }

    /// The newest committed step, from the end of `trace.jsonl`.
    ///
    /// # Panics
    /// If the trace is there and cannot be read.
    #[must_use]
    pub fn step(&self) -> u64 {
        let Ok(mut file) = File::open(self.dir.join("trace.jsonl")) else {
            return 0;
        };
        let length = file.metadata().expect("a file").len();
        file.seek(SeekFrom::Start(length.saturating_sub(LAST_LINE_BYTES)))
            .expect("a place in the file");
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).expect("the trace's end");
        let text = String::from_utf8_lossy(&bytes);
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let line = whole.lines().next_back().unwrap_or("{}");
        let line: Value = serde_json::from_str(line).expect("a trace line is JSON");
        line["step"].as_u64().unwrap_or(0)
    }

    /// `tarazed status --json`; none where the run folder is not there yet or the controller just ends.
    #[must_use]
    pub fn try_status(&self) -> Option<Status> {
        let output = Command::new(program::tarazed())
            .args(["status", "--json", "--run-dir"])
            .arg(&self.dir)
            .output()
            .expect("the program runs");
        if !output.status.success() {
            return None;
        }
        let status = serde_json::from_slice(&output.stdout);
        Some(status.unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stdout))))
    }

    /// `tarazed status --json` of a run that must answer.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    #[track_caller]
    pub fn status(&self) -> Status {
        self.try_status()
            .unwrap_or_else(|| panic!("status does not answer\n{}", self.tail()))
    }

    /// SIGKILL to a worker's process as `status` names it; its pid, or none where it has no process just now.
    pub fn kill_rank(&self, worker: u32) -> Option<u32> {
        let status = self.try_status()?;
        let found = status.workers.iter().find(|candidate| candidate.worker == worker)?;
        self.processes.signal(found.pid, Signal::KILL).then_some(found.pid)
    }

    /// From now on a worker's process can open no further file or socket; false where it has no process just now.
    ///
    /// # Panics
    /// If the process is gone meanwhile.
    pub fn starve_of_descriptors(&self, worker: u32) -> bool {
        let Some(status) = self.try_status() else { return false };
        let Some(found) = status.workers.iter().find(|candidate| candidate.worker == worker) else {
            return false;
        };
        let limit = Rlimit {
            current: Some(1),
            maximum: getrlimit(Resource::Nofile).maximum,
        };
        let set = prlimit(Pid::from_raw(found.pid as i32), Resource::Nofile, limit);
        assert!(set.is_ok(), "{set:?}: no limit for worker {worker}\n{}", self.tail());
        true
    }

    /// From now on no file of the run can grow beyond `bytes`; for a run [`Train::on_small_disk`].
    ///
    /// # Panics
    /// If its processes are gone.
    pub fn fill_disk(&self, bytes: u64) {
        let limit = Rlimit {
            current: Some(bytes),
            maximum: getrlimit(Resource::Fsize).maximum,
        };
        let ranks = self.processes.ranks().into_iter().map(|pid| Pid::from_raw(pid as i32));
        for pid in ranks.chain([Some(self.pid())]) {
            let set = prlimit(pid, Resource::Fsize, limit);
            assert!(set.is_ok(), "{set:?}: no limit for {pid:?}\n{}", self.tail());
        }
    }

    /// Leaves ranks that outlive their controller alone when this is dropped: the next [`Run`] on the folder sees to
    /// them.
    pub const fn leave(&mut self) {
        self.left = true;
    }

    /// Sends a signal to the controller's process.
    ///
    /// # Panics
    /// If it has ended.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        // Once it is reaped, its number may be another's.
        assert!(self.outcome.is_none(), "the run has ended\n{}", self.tail());
        let sent = rustix::process::kill_process(self.pid(), signal);
        assert!(sent.is_ok(), "{sent:?}: {signal:?} did not arrive\n{}", self.tail());
    }

    /// SIGSTOP to the controller, and waits until each of its threads stands still: the signal is sent before it is heard, and
    /// until then a thread may finish what it was writing.
    pub fn hold_still(&mut self) {
        self.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.child.id());
        self.wait_for("a stopped controller", |_| {
            let stands_still = |task: std::io::Result<std::fs::DirEntry>| {
                let stat = std::fs::read_to_string(task.ok()?.path().join("stat")).ok()?;
                // Behind the name, which may hold anything: the state.
                Some(stat.rsplit_once(')')?.1.trim_start().starts_with('T'))
            };
            let all = std::fs::read_dir(&tasks)
                .ok()?
                .all(|task| stands_still(task) == Some(true));
            all.then_some(())
        });
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// The trace as it is now.
    #[must_use]
    pub fn trace(&self) -> Vec<u8> {
        std::fs::read(self.dir.join("trace.jsonl")).unwrap_or_default()
    }

    /// The weight trajectory as it is now.
    #[must_use]
    pub fn weights(&self) -> Vec<u8> {
        std::fs::read(self.dir.join("weights.jsonl")).unwrap_or_default()
    }

    /// The whole lines of a JSON-lines file of the run folder.
    ///
    /// # Panics
    /// If one is not JSON.
    #[must_use]
    pub fn json_lines(&self, name: &str) -> Vec<Value> {
        let bytes = std::fs::read(self.dir.join(name)).unwrap_or_default();
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        trace::lines(&bytes[..whole])
    }

    /// Events of one kind.
    #[must_use]
    pub fn events(&self, kind: &str) -> Vec<Value> {
        let mut events = self.json_lines("events.jsonl");
        events.retain(|event| event["kind"] == kind);
        events
    }

    /// Step of the newest checkpoint so far; 0 for none.
    #[must_use]
    pub fn newest_checkpoint(&self) -> u64 {
        let steps = self.events("checkpoint").into_iter();
        steps
            .filter_map(|event| event["checkpoint_step"].as_u64())
            .max()
            .unwrap_or(0)
    }

    /// Whether it has said anything: from then on it hears signals.
    #[must_use]
    pub fn has_spoken(&self) -> bool {
        std::fs::metadata(&self.stdout).is_ok_and(|file| file.len() > 0)
    }

    /// The end of what the run said so far.
    #[must_use]
    pub fn tail(&self) -> String {
        let read = |path: &Path| tail(&String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default())).to_owned();
        format!(
            "--- {} in {}, {} ms after its start\n--- standard output\n{}\n--- standard error\n{}\n--- events.jsonl\n{}",
            self.child.id(),
            self.folder.display(),
            self.began.elapsed().as_millis(),
            read(&self.stdout),
            read(&self.stderr),
            read(&self.dir.join("events.jsonl"))
        )
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if self.ended().is_none() {
            // The group is the controller's; ranks lead groups of their own.
            let _ = kill_process_group(self.pid(), Signal::KILL);
            let _ = self.child.wait();
        }
        if self.left && !std::thread::panicking() {
            return;
        }
        // What starts just now shows at the next look.
        let deadline = Instant::now() + WAIT;
        while !self.processes.ranks().is_empty() && Instant::now() < deadline {
            self.processes.kill_all();
            std::thread::sleep(POLL);
        }
    }
}

fn tail(text: &str) -> &str {
    let start = text.char_indices().rev().nth(TAIL_CHARS - 1).map_or(0, |(at, _)| at);
    &text[start..]
}
