//! One life of a controller: `tarazed train` as a child process, started as a scheduler would start it.

use super::processes::{Processes, pid};
use rustix::process::{Signal, kill_process};
use std::fs::{File, OpenOptions};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Characters of output shown with a verdict.
const TAIL_CHARS: usize = 4_000;
/// Between two looks at a child that is waited for.
const POLL: Duration = Duration::from_millis(5);
/// Starts the program with writes beyond a limit on file sizes failing instead of ending it, as on a full disk.
const LIMITED: &str = "trap '' XFSZ && exec \"$0\" \"$@\"";

/// How a run is started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The program.
    pub program: PathBuf,
    /// The training config.
    pub config: PathBuf,
    /// `--set` overrides.
    pub set: Vec<String>,
    /// Run folder.
    pub run_dir: PathBuf,
    /// `--ranks`
    pub ranks: u32,
    /// `--steps`
    pub steps: Option<u64>,
    /// Variables for the store.
    pub env: Vec<(String, String)>,
    /// Where its temporary files and its output go.
    pub folder: PathBuf,
    /// Signals of file size limits are ignored.
    pub ignores_file_limits: bool,
}

impl Launch {
    /// The outputs of all lives of this run, one after the other.
    #[must_use]
    pub fn output(&self, name: &str) -> PathBuf {
        let run = self.run_dir.file_name().unwrap_or_default().to_string_lossy();
        self.folder.join(format!("{run}.{name}"))
    }

    fn command(&self) -> Command {
        let mut command = if self.ignores_file_limits {
            let mut shell = Command::new("sh");
            shell.args(["-c", LIMITED]).arg(&self.program);
            shell
        } else {
            Command::new(&self.program)
        };
        command.arg("train").arg(&self.config);
        for item in &self.set {
            command.args(["--set", item]);
        }
        command.arg("--run-dir").arg(&self.run_dir);
        command.args(["--ranks", &self.ranks.to_string()]);
        if let Some(steps) = self.steps {
            command.args(["--steps", &steps.to_string()]);
        }
        command
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .env("TMPDIR", self.folder.join("tmp"))
            .env_remove("RUST_LOG")
            .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT")
            .process_group(0);
        command
    }

    /// Starts it.
    ///
    /// # Errors
    /// If the program or its output files cannot be had.
    pub fn start(&self) -> Result<Life, String> {
        let open = |name: &str| -> Result<File, String> {
            let path = self.output(name);
            let opened = OpenOptions::new().create(true).append(true).open(&path);
            opened.map_err(|e| format!("{}: {e}", path.display()))
        };
        std::fs::create_dir_all(self.folder.join("tmp")).map_err(|e| format!("{}: {e}", self.folder.display()))?;
        let mut command = self.command();
        command.stdout(open("out")?).stderr(open("err")?);
        let child = command
            .spawn()
            .map_err(|e| format!("{}: {e}", self.program.display()))?;
        Ok(Life {
            child,
            ended: None,
            processes: Processes::of(&self.run_dir),
            error: self.output("err"),
            left: false,
        })
    }

    /// Runs it to its end, which must be code 0 within `limit`.
    ///
    /// # Errors
    /// How it ended otherwise.
    pub fn complete(&self, limit: Duration) -> Result<(), String> {
        let mut life = self.start()?;
        let deadline = Instant::now() + limit;
        loop {
            match life.ended() {
                Some(End::Code(0)) => return Ok(()),
                Some(end) => {
                    return Err(format!(
                        "{} ended with {end:?}\n{}",
                        self.run_dir.display(),
                        life.tail()
                    ));
                }
                None if Instant::now() > deadline => {
                    return Err(format!("{} does not end within {limit:?}", self.run_dir.display()));
                }
                None => std::thread::sleep(POLL),
            }
        }
    }
}

/// How a controller's process ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// A controller's process. Dropped, it is killed together with whatever ranks its run folder has.
#[derive(Debug)]
pub struct Life {
    child: Child,
    ended: Option<End>,
    processes: Processes,
    error: PathBuf,
    left: bool,
}

impl Life {
    /// Ranks that outlive this controller are the next one's to meet.
    pub const fn leave(&mut self) {
        self.left = true;
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<End> {
        if self.ended.is_none()
            && let Ok(Some(status)) = self.child.try_wait()
        {
            self.ended = Some(match (status.code(), status.signal()) {
                (Some(code), _) => End::Code(code),
                (None, signal) => End::Signal(signal.unwrap_or(0)),
            });
        }
        self.ended
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to its process; false where it has ended.
    pub fn signal(&mut self, signal: Signal) -> bool {
        // Once it is reaped, its number may be another's.
        self.ended().is_none() && pid(self.child.id()).is_some_and(|pid| kill_process(pid, signal).is_ok())
    }

    /// The end of what it said on standard error.
    #[must_use]
    pub fn tail(&self) -> String {
        tail(&self.error)
    }
}

/// The end of a text file.
fn tail(path: &Path) -> String {
    let text = String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
    let start = text.char_indices().rev().nth(TAIL_CHARS - 1).map_or(0, |(at, _)| at);
    text[start..].to_owned()
}

impl Drop for Life {
    fn drop(&mut self) {
        if self.ended().is_none() {
            self.signal(Signal::KILL);
            // Its end is certain by now; an error means that it was reaped before.
            let _ = self.child.wait();
        }
        if self.left {
            return;
        }
        // What starts just now shows at the next look; SIGKILL is obeyed at once.
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.processes.kill_all() > 0 && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
    }
}
