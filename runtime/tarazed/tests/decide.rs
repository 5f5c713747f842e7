//! `tarazed decide` on live runs: what it says of a request is what the trace holds in the end.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// For whatever must happen at some time.
const DEADLINE: Duration = Duration::from_secs(120);

fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tarazed"));
    command.args(args).current_dir(folder);
    command
}

fn tarazed(folder: &Path, args: &[&str]) -> Output {
    command(folder, args).output().expect("the program runs")
}

/// A run that would take days, and a controller that may decide with every `interval_steps`.
struct Run {
    folder: tempfile::TempDir,
    controller: Child,
}

impl Run {
    fn start(interval_steps: u64) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let text: String = (0..200)
            .map(|i| format!("{{\"text\":\"Line {i} of {} lines.\"}}\n", i * 7 % 11))
            .collect();
        std::fs::write(folder.path().join("web.jsonl"), text).expect("written");
        let config = format!(
            "[run]\nname = \"tiny\"\nseed = 7\nsteps = 100000000\n\
            [model]\nlayers = 1\nhidden = 16\nffn = 16\nheads = 2\nkv_heads = 1\ncontext = 16\nvocabulary = 300\ninit_std = 0.02\n\
            [batch]\nlanes = 2\nsequences_per_lane = 1\nmicro_batch_sequences = 1\n\
            [optimizer]\nlearning_rate = 1e-3\nschedule = {{ kind = \"constant\", warmup_steps = 2 }}\nblock_elements = 1024\n\
            [policy]\npersons = true\n\
            [mixture]\nstart_steps = 1\ninterval_steps = {interval_steps}\nlag_steps = 4\n\
            [data]\nheld_out_fraction = 0.1\n\
            [[data.domains]]\nname = \"web\"\npath = \"web.jsonl\"\nlanguage = \"en\"\nweight = 1.0\n"
        );
        std::fs::write(folder.path().join("run.toml"), config).expect("written");
        let args = ["train", "run.toml", "--ranks", "1", "--run-dir", "out"];
        let controller = command(folder.path(), &args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program runs");
        let run = Self { folder, controller };
        let begun = Instant::now();
        while run.pids().is_empty() || run.lines().is_empty() {
            assert!(begun.elapsed() < DEADLINE, "it does not train");
            std::thread::sleep(Duration::from_millis(50));
        }
        run
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Of the ranks, where the controller answers.
    fn pids(&self) -> Vec<u64> {
        let output = tarazed(self.path(), &["status", "--run-dir", "out", "--json"]);
        let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let workers = status["workers"].as_array().cloned().unwrap_or_default();
        workers.iter().filter_map(|worker| worker["pid"].as_u64()).collect()
    }

    /// Whole lines of the trace.
    fn lines(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path().join("out/trace.jsonl")).unwrap_or_default();
        let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        lines.map(|line| serde_json::from_str(line).expect("a line")).collect()
    }
}

impl Drop for Run {
    /// An error means that it has ended.
    fn drop(&mut self) {
        let _ = self.controller.kill();
        let _ = self.controller.wait();
    }
}

/// LOOP-2: the command comes back when the line is there, and the run does what was decided.
#[test]
fn a_decision_is_told_when_it_stands_in_the_trace() {
    let mut run = Run::start(5);
    let args = ["decide", "out", "force", "stop", "--reason", "enough", "--by", "ada"];
    let output = tarazed(run.path(), &args);
    let (told, errors) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    assert_eq!(output.status.code(), Some(0), "{told}{errors}");
    assert!(told.starts_with("waits in the controller's memory for line "), "{told}");
    let held: Vec<Value> = run.lines();
    let decisions = held
        .iter()
        .flat_map(|line| line["decisions"].as_array().cloned().unwrap_or_default());
    let decision = decisions.into_iter().next().expect("it stands in the trace");
    assert_eq!(
        (&decision["reason"], &decision["by"]["person"]),
        (&json!("enough"), &json!("ada"))
    );
    let promised = format!(
        "decided: number {} in line {}, it acts from step {} on\n",
        decision["id"], decision["line"], decision["effective"]
    );
    assert!(told.ends_with(&promised), "{told}{promised}");
    assert_eq!(run.controller.wait().expect("an end").code(), Some(0));
    let last = run.lines().pop().expect("a line");
    assert_eq!(last["step"], decision["effective"]);
}

/// A request that waits goes with the controller, and whoever asked is told.
#[test]
fn a_request_that_is_lost_is_said_to_be_lost() {
    let mut run = Run::start(50_000_000);
    let ranks = run.pids();
    let pin = ["decide", "out", "pin", "--reason", "calm", "--by", "ada"];
    let no_wait = tarazed(run.path(), &[&pin[..1], &["--no-wait"], &pin[1..]].concat());
    let told = String::from_utf8_lossy(&no_wait.stdout).into_owned();
    assert_eq!(no_wait.status.code(), Some(0), "{told}");
    assert!(told.contains("it is lost if the controller ends before"), "{told}");
    let release = ["decide", "out", "release", "--reason", "go on", "--by", "ada"];
    let mut waiting = command(run.path(), &release)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program runs");
    let mut told = String::new();
    let mut output = BufReader::new(waiting.stdout.take().expect("a pipe"));
    output.read_line(&mut told).expect("a line");
    assert!(
        told.starts_with("waits in the controller's memory for line 50000000 "),
        "{told}"
    );
    run.controller.kill().expect("a signal is sent");
    run.controller.wait().expect("an end");
    for pid in ranks {
        // An error means that it has ended.
        let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
    }
    let status = waiting.wait().expect("an end");
    let mut errors = String::new();
    waiting
        .stderr
        .take()
        .expect("a pipe")
        .read_to_string(&mut errors)
        .expect("text");
    assert_eq!(status.code(), Some(33), "{errors}");
    assert!(
        errors.contains("the request is lost: the controller ended before line 50000000")
            && errors.contains("ask again"),
        "{errors}"
    );
}
