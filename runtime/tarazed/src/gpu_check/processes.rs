//! Whole runs of several rank processes on one device, through `tarazed train` itself: the promise, and how long a lost rank
//! holds a run up.
//!
//! Four runs of one small config: two in which a rank is killed by SIGKILL, the second with a spare held ready; one in which
//! nothing happens; and one with a single process, which all others are compared with, line by line (DET-1). Ranks exchange
//! over sockets, through the host. Where NCCL is there, a fifth run exchanges over it, its ranks sharing the device, and one of
//! them is killed.
//!
//! Times are wall-clock, from just before the signal to what the run's own files say, looked at every `LOOK_EVERY`. They are
//! reported beside their bounds, and fail nothing: a shared machine may be slow.

use super::{CheckFailed, Found, VISIBLE_VARIABLE};
use crate::commands::status;
use crate::run_folder::RunFolder;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tarazed_domain::config::ClusterDevice;

/// What is run.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// What the ranks compute on.
    pub device: ClusterDevice,
    /// Rank processes.
    pub ranks: u32,
    /// Steps before a rank is killed, and after all are back.
    pub steps: u64,
    /// A run that does not get on within this time has failed.
    pub patience: Duration,
    /// What [`super::VISIBLE_VARIABLE`] is to be for the runs, so that all ranks share the device that is checked.
    pub visible: Option<String>,
    /// Version of the NCCL that the run over it loads, or why there is none.
    pub nccl: Result<String, String>,
}

impl Sizes {
    /// Three processes on the CUDA device.
    #[must_use]
    pub fn standard(nccl: Result<String, String>) -> Self {
        Self {
            device: ClusterDevice::Cuda,
            ranks: 3,
            steps: 20,
            patience: Duration::from_secs(60),
            visible: None,
            nccl,
        }
    }
}

const CHECK: &str = "processes";
/// The config's file in the folder.
const CONFIG: &str = "processes.toml";
/// Between looks at a run's files; times are late by up to as much.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// From the kill to the next commit where the lost rank's process must start anew, and where a spare takes its place.
const BOUNDS_MS: [u64; 2] = [10_000, 2_000];
/// Bytes of a run's output that are told with its failure.
const TAIL_BYTES: usize = 2_000;

/// Runs them. `folder` is used for them, and must hold nothing. Fails where a run does not come to its end, or its trace is
/// another's; the folder then says more. What the runs over sockets gave is not lost where that over NCCL fails.
pub fn check(program: &Path, folder: &Path, sizes: &Sizes) -> Found {
    let (mut value, one) = match over_sockets(program, folder, sizes) {
        Ok(found) => found,
        Err(failure) => return Err(failure).into(),
    };
    let mut failures = Vec::new();
    value["killed_over_nccl"] = match &sizes.nccl {
        Err(absence) => json!(format!("not run: {absence}")),
        Ok(version) => match over_nccl(program, folder, sizes, &one) {
            Ok(times) => {
                let mut report = times.report(BOUNDS_MS[0]);
                report["version"] = json!(version);
                report["same_trace"] = json!(true);
                report
            }
            Err(failure) => {
                let text = json!(format!("failed: {}", failure.cause));
                failures.push(failure);
                text
            }
        },
    };
    Found {
        value: Some(value),
        failures,
    }
}

/// The four runs over sockets. Returns their report, and the trace of the single process.
fn over_sockets(program: &Path, folder: &Path, sizes: &Sizes) -> Result<(Value, Trace), CheckFailed> {
    write_project(folder, sizes).map_err(|e| failed(format!("{}: {e}", folder.display())))?;
    let start = |name: &str, ranks: u32, spares: u32, steps: Option<u64>| {
        let plan = RunPlan {
            name,
            ranks,
            spares,
            steps,
            over_nccl: false,
        };
        Run::start(program, folder, &plan, sizes)
    };
    let mut killed = Vec::new();
    for (name, spares) in [("killed", 0), ("killed-with-a-spare", 1)] {
        let mut run = start(name, sizes.ranks, spares, None)?;
        let times = kill_one(&mut run, sizes, spares)?;
        run.stop()?;
        killed.push((name, times, Trace::read(&run.folder)?));
    }
    // As far as the longest of them came, so that all of each is compared.
    let steps = killed.iter().map(|(_, _, trace)| trace.steps()).max().unwrap_or(0);
    let whole = |name: &str, ranks: u32| -> Result<Trace, CheckFailed> {
        let mut run = start(name, ranks, 0, Some(steps))?;
        run.finish()?;
        Trace::read(&run.folder)
    };
    let one = whole("one-process", 1)?;
    let several = whole("several-processes", sizes.ranks)?;
    several.same_as(&one)?;
    for (_, _, trace) in &killed {
        trace.same_as(&one)?;
    }
    let [cold, warm] = [&killed[0].1, &killed[1].1];
    let report = json!({
        "ranks": sizes.ranks, "steps_compared": steps, "data_plane": "sockets",
        "same_traces": ["one process", "several processes", "a rank killed", "a rank killed, with a spare"],
        "killed": cold.report(BOUNDS_MS[0]), "killed_with_a_spare": warm.report(BOUNDS_MS[1]),
    });
    Ok((report, one))
}

/// The run over NCCL, of which a rank is killed; its trace is `one`'s, as far as that goes.
fn over_nccl(program: &Path, folder: &Path, sizes: &Sizes, one: &Trace) -> Result<Times, CheckFailed> {
    let plan = RunPlan {
        name: "killed-over-nccl",
        ranks: sizes.ranks,
        spares: 0,
        steps: None,
        over_nccl: true,
    };
    let mut run = Run::start(program, folder, &plan, sizes)?;
    let times = kill_one(&mut run, sizes, 0)?;
    run.stop()?;
    Trace::read(&run.folder)?.no_longer_than(one).same_as(one)?;
    Ok(times)
}

fn failed(cause: String) -> CheckFailed {
    CheckFailed::because(CHECK)(cause)
}

/// From just before the signal.
struct Times {
    next_commit: Duration,
    all_ranks: Duration,
    /// Committed steps that were done again, as the run says.
    steps_lost: u64,
}

impl Times {
    fn report(&self, bound_ms: u64) -> Value {
        let next_ms = self.next_commit.as_millis() as u64;
        json!({
            "kill_to_next_commit_ms": next_ms, "bound_ms": bound_ms, "within_bound": next_ms <= bound_ms,
            "kill_to_all_ranks_ms": self.all_ranks.as_millis() as u64, "steps_lost": self.steps_lost,
        })
    }
}

/// Kills the last rank of a run that trains with all its ranks, and waits until all are back and train.
fn kill_one(run: &mut Run, sizes: &Sizes, spares: u32) -> Result<Times, CheckFailed> {
    let (ranks, steps) = (u64::from(sizes.ranks), sizes.steps);
    let all_at_work = |event: &Value| event["kind"] == "generation" && event["ranks"] == ranks;
    let ready = (sizes.ranks + spares) as usize;
    run.wait_for("all processes", |run| {
        (run.events("rank_ready").len() >= ready).then_some(())
    })?;
    let began = run.wait_for("a world of all ranks", |run| {
        run.lines("events.jsonl").into_iter().rfind(all_at_work)
    })?;
    run.wait_for_step(began["base"].as_u64().unwrap_or(0) + steps)?;
    let pid = run.pid_of(sizes.ranks - 1)?;
    let before = run.lines("events.jsonl").len();
    let since = Instant::now();
    kill_process(pid, Signal::KILL).map_err(|e| failed(format!("rank process {pid:?} cannot be killed: {e}")))?;
    let later = |run: &Run, wanted: &dyn Fn(&Value) -> bool| {
        run.lines("events.jsonl")
            .into_iter()
            .skip(before)
            .find(|event| wanted(event))
    };
    let next = run.wait_for("the generation after the kill", |run| {
        later(run, &|event| event["kind"] == "generation")
    })?;
    run.wait_for_step(next["base"].as_u64().unwrap_or(0) + 1)?;
    let next_commit = since.elapsed();
    let whole = run.wait_for("all ranks again", |run| later(run, &all_at_work))?;
    let all_ranks = since.elapsed();
    run.wait_for_step(whole["base"].as_u64().unwrap_or(0) + steps)?;
    let recovered = run.wait_for("the end of the recovery", |run| {
        later(run, &|event| event["kind"] == "recovered")
    })?;
    Ok(Times {
        next_commit,
        all_ranks,
        steps_lost: recovered["steps_lost"].as_u64().unwrap_or(0),
    })
}

/// A small model's config and text.
fn write_project(folder: &Path, sizes: &Sizes) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let words = ["lane", "step", "rank", "trace", "shard", "block", "tree"];
    let word = |index: usize| words[index % words.len()];
    let document = |i: usize| {
        let text = format!(
            "The {} of {} {i}, and the {} behind it.",
            word(i),
            word(i / 7),
            word(i / 49)
        );
        format!("{}\n", json!({ "text": text }))
    };
    std::fs::write(folder.join("text.jsonl"), (0..600).map(document).collect::<String>())?;
    let device = match sizes.device {
        ClusterDevice::Cpu => "cpu",
        ClusterDevice::Auto => "auto",
        ClusterDevice::Cuda => "cuda",
    };
    // Longer than any check lasts, so that no run ends before it is told to.
    let config = format!(
        "[run]\nname = \"processes\"\nseed = 7\nsteps = 1000000\n\
         [model]\nlayers = 2\nhidden = 64\nffn = 128\nheads = 2\nkv_heads = 1\ncontext = 32\nvocabulary = 320\ninit_std = 0.02\n\
         [batch]\nlanes = 8\nsequences_per_lane = 1\nmicro_batch_sequences = 1\n\
         [optimizer]\nlearning_rate = 1e-3\nschedule = {{ kind = \"constant\", warmup_steps = 2 }}\nblock_elements = 1024\n\
         shards = 8\nreplicas = 2\n\
         [data]\nheld_out_fraction = 0.1\n\
         [[data.domains]]\nname = \"text\"\npath = \"text.jsonl\"\nlanguage = \"en\"\nweight = 1.0\n\
         [checkpoint]\ninterval_steps = 100\n\
         [cluster]\ndevice = \"{device}\"\n"
    );
    std::fs::write(folder.join(CONFIG), config)
}

/// Which run to start.
struct RunPlan<'a> {
    name: &'a str,
    ranks: u32,
    spares: u32,
    /// Where it ends by itself.
    steps: Option<u64>,
    /// Whether its ranks exchange over NCCL and nothing else.
    over_nccl: bool,
}

/// A run as a process.
struct Run {
    child: Child,
    folder: PathBuf,
    log: PathBuf,
    patience: Duration,
    /// Rank processes seen so far, for the end: they outlive their controller.
    ranks: Vec<Pid>,
    ended: Option<ExitStatus>,
}

impl Run {
    fn start(program: &Path, folder: &Path, plan: &RunPlan<'_>, sizes: &Sizes) -> Result<Self, CheckFailed> {
        let (dir, log) = (folder.join(plan.name), folder.join(format!("{}.log", plan.name)));
        let cannot = |e: std::io::Error| failed(format!("run {}: {e}", plan.name));
        let out = File::create(&log).map_err(cannot)?;
        let errors = out.try_clone().map_err(cannot)?;
        let mut command = Command::new(program);
        command
            .arg("train")
            .arg(folder.join(CONFIG))
            .arg("--run-dir")
            .arg(&dir)
            .arg("--fresh");
        command.args(["--dashboard", "off"]);
        command.args(["--ranks", &plan.ranks.to_string()]);
        command.args(["--set", &format!("cluster.spares={}", plan.spares)]);
        if plan.over_nccl {
            command.args(["--set", "cluster.collective=nccl", "--set", "cluster.share_gpus=true"]);
        }
        if let Some(visible) = &sizes.visible {
            command.env(VISIBLE_VARIABLE, visible);
        }
        if let Some(steps) = plan.steps {
            command.args(["--steps", &steps.to_string()]);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(errors)
            .spawn()
            .map_err(cannot)?;
        Ok(Self {
            child,
            folder: dir,
            log,
            patience: sizes.patience,
            ranks: Vec::new(),
            ended: None,
        })
    }

    /// The whole lines of a file of the run folder.
    fn lines(&self, name: &str) -> Vec<Value> {
        let text = std::fs::read(self.folder.join(name)).unwrap_or_default();
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let lines = text[..whole].split(|&byte| byte == b'\n');
        lines.filter_map(|line| serde_json::from_slice(line).ok()).collect()
    }

    fn events(&self, kind: &str) -> Vec<Value> {
        let mut events = self.lines("events.jsonl");
        events.retain(|event| event["kind"] == kind);
        events
    }

    fn newest_step(&self) -> u64 {
        let lines = self.lines("trace.jsonl");
        lines.iter().rev().find_map(|line| line["step"].as_u64()).unwrap_or(0)
    }

    /// Looks until something is there, while the run lives.
    fn wait_for<T>(&mut self, what: &str, look: impl Fn(&Self) -> Option<T>) -> Result<T, CheckFailed> {
        let until = Instant::now() + self.patience;
        loop {
            if let Some(found) = look(self) {
                return Ok(found);
            }
            if let Some(status) = self.look_after()? {
                return Err(self.told(&format!("waiting for {what}, and it ended with {status}")));
            }
            if Instant::now() > until {
                return Err(self.told(&format!("{what} did not come within {} s", self.patience.as_secs())));
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn wait_for_step(&mut self, step: u64) -> Result<(), CheckFailed> {
        self.wait_for(&format!("step {step}"), |run| (run.newest_step() >= step).then_some(()))
    }

    /// Its exit, once it has ended.
    fn look_after(&mut self) -> Result<Option<ExitStatus>, CheckFailed> {
        if self.ended.is_none() {
            let looked = self.child.try_wait();
            self.ended = looked.map_err(|e| failed(format!("{}: {e}", self.folder.display())))?;
        }
        Ok(self.ended)
    }

    /// The process of a rank, as the controller says. Which worker it is follows from who was ready first.
    fn pid_of(&mut self, rank: u32) -> Result<Pid, CheckFailed> {
        let answer = status::ask(&RunFolder::new(&self.folder), "status").map_err(|e| failed(e.message))?;
        let workers = answer
            .and_then(|answer| answer["workers"].as_array().cloned())
            .unwrap_or_default();
        let pid = |found: &Value| Pid::from_raw(i32::try_from(found["pid"].as_u64()?).ok()?);
        self.ranks = workers.iter().filter_map(pid).collect();
        let found = workers.iter().find(|found| found["rank"] == rank).and_then(pid);
        found.ok_or_else(|| self.told(&format!("rank {rank} has no process")))
    }

    /// Waits for its own end, which must be a good one.
    fn finish(&mut self) -> Result<(), CheckFailed> {
        self.ends_with(0)
    }

    /// Ends it by a signal, with a last checkpoint.
    fn stop(&mut self) -> Result<(), CheckFailed> {
        if self.look_after()?.is_none() {
            kill_process(Pid::from_child(&self.child), Signal::TERM)
                .map_err(|e| self.told(&format!("cannot be stopped: {e}")))?;
        }
        self.ends_with(34)
    }

    /// A run that gets on is waited for.
    fn ends_with(&mut self, code: i32) -> Result<(), CheckFailed> {
        let (mut step, mut until) = (self.newest_step(), Instant::now() + self.patience);
        loop {
            if let Some(status) = self.look_after()? {
                return match status.code() {
                    Some(found) if found == code => Ok(()),
                    _ => Err(self.told(&format!("ended with {status}, where exit code {code} was due"))),
                };
            }
            let now = self.newest_step();
            if now > step {
                (step, until) = (now, Instant::now() + self.patience);
            }
            if Instant::now() > until {
                return Err(self.told(&format!("stands still at step {step}")));
            }
            std::thread::sleep(LOOK_EVERY * 10);
        }
    }

    fn told(&self, what: &str) -> CheckFailed {
        let said = std::fs::read(&self.log).unwrap_or_default();
        let tail = &said[said.len().saturating_sub(TAIL_BYTES)..];
        let tail = String::from_utf8_lossy(tail);
        failed(format!(
            "run {}: {what}; it said last:\n{}",
            self.folder.display(),
            tail.trim()
        ))
    }
}

impl Drop for Run {
    /// A run that did not come to its end is not left behind, and neither are its ranks.
    fn drop(&mut self) {
        if matches!(self.look_after(), Ok(Some(_))) {
            return;
        }
        // The status is asked once more: ranks may have been replaced since.
        let _ = self.pid_of(0);
        let _ = self.child.kill();
        let _ = self.child.wait();
        for rank in &self.ranks {
            let _ = kill_process(*rank, Signal::KILL);
        }
    }
}

/// The committed lines of a run, as bytes: they are the promise.
struct Trace {
    folder: PathBuf,
    lines: Vec<String>,
}

impl Trace {
    fn read(folder: &Path) -> Result<Self, CheckFailed> {
        let text = std::fs::read_to_string(folder.join("trace.jsonl"))
            .map_err(|e| failed(format!("{}: its trace cannot be read: {e}", folder.display())))?;
        Ok(Self {
            folder: folder.to_owned(),
            lines: text.lines().map(str::to_owned).collect(),
        })
    }

    /// Its newest step; a trace may hold lines that are none.
    fn steps(&self) -> u64 {
        let step = |line: &String| serde_json::from_str::<Value>(line).ok()?["step"].as_u64();
        self.lines.iter().rev().find_map(step).unwrap_or(0)
    }

    /// As many of its lines as the other has, at most.
    fn no_longer_than(mut self, other: &Self) -> Self {
        self.lines.truncate(other.lines.len());
        self
    }

    /// Each of its lines stands in the other, too.
    fn same_as(&self, other: &Self) -> Result<(), CheckFailed> {
        let names = || format!("{} and {}", self.folder.display(), other.folder.display());
        if self.lines.is_empty() || self.lines.len() > other.lines.len() {
            let (few, more) = (self.lines.len(), other.lines.len());
            return Err(failed(format!(
                "{}: {few} lines cannot be compared with {more}",
                names()
            )));
        }
        let pairs = self.lines.iter().zip(&other.lines);
        for (number, (mine, theirs)) in pairs.enumerate() {
            if mine != theirs {
                return Err(failed(format!(
                    "{}: line {} differs (DET-1):\n{mine}\n{theirs}",
                    names(),
                    number + 1
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(lines: &[&str]) -> Trace {
        Trace {
            folder: PathBuf::from("run"),
            lines: lines.iter().map(|&line| line.to_owned()).collect(),
        }
    }

    /// A check that cannot fail proves nothing.
    #[test]
    fn another_trace_is_told_by_its_line() {
        let whole = trace(&["{\"step\":1}", "{\"step\":2}", "{\"step\":3}"]);
        assert!(trace(&["{\"step\":1}", "{\"step\":2}"]).same_as(&whole).is_ok());
        assert_eq!(
            (whole.steps(), trace(&["{\"step\":4}", "{\"lineage\":1}"]).steps()),
            (3, 4)
        );
        let differs = trace(&["{\"step\":1}", "{\"step\":9}"])
            .same_as(&whole)
            .expect_err("differs");
        assert!(differs.cause.contains("line 2 differs (DET-1)"), "{differs}");
        for few in [&[][..], &["{\"step\":1}"; 4]] {
            let refused = trace(few).same_as(&whole).expect_err("nothing to compare");
            assert!(refused.cause.contains("cannot be compared"), "{refused}");
        }
    }

    #[test]
    fn times_stand_beside_their_bounds() {
        let times = Times {
            next_commit: Duration::from_millis(2_001),
            all_ranks: Duration::from_millis(3_000),
            steps_lost: 0,
        };
        let report = times.report(2_000);
        assert_eq!(report["within_bound"], false);
        assert_eq!(report["kill_to_next_commit_ms"], 2_001);
        assert_eq!(times.report(10_000)["within_bound"], true);
    }

    /// What does not train fails the check, with what it said.
    #[test]
    fn a_program_that_does_not_train_fails() {
        let folder = tempfile::tempdir().expect("a folder");
        let sizes = Sizes {
            device: ClusterDevice::Cpu,
            ..Sizes::standard(Err("no library".to_owned()))
        };
        let found = check(Path::new("/bin/false"), folder.path(), &sizes);
        let refused = found.failures.first().expect("it ends at once");
        assert!(refused.cause.contains("it ended with exit status: 1"), "{refused}");
    }
}
