//! A run as a process: this program's own `train`, in a folder of its own, on the case's data set.

use super::cases::{Late, Ready};
use super::measure::{Outcome, Unfit};
use super::plan::Plan;
use super::record::Proof;
use super::schedule::{RunId, RunSpec, Runner, Whole};
use crate::exit::{Exit, Failure};
use crate::run_folder::RunFolder;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tarazed_actors::rank::device_type;
use tarazed_domain::config::{ClusterDevice, Config, LaterConfig};
use tarazed_protocol::trace::parse_whole_lines;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// What the bench notes in a run's folder when the run is whole.
const NOTE_FILE: &str = "bench.json";
/// Where runs are done again, below the work folder.
const AGAIN_FOLDER: &str = "again";
/// Weight of a domain without weight: a config has none, and a batch none of it.
const WEIGHT_LEAST: f64 = 1e-9;
/// Tries of a run that fails for now (exit code 33).
const TRIES_MAX: u32 = 3;
/// Between looks at a run folder that another process holds.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// About a whole run; no metric comes from it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    /// Version of the data that it was trained on.
    data_version: String,
    /// BLAKE3 of the program that ended it.
    program: String,
    /// Its time from start to end; less where an earlier life did a part.
    seconds: f64,
    /// What it computed on; a note without it is of this machine.
    #[serde(default)]
    device: Option<String>,
}

/// Whether a signal has asked for the end. Whoever waits for a run waits for this, too: several do at once.
pub type Stop = watch::Receiver<bool>;

/// The runtime that runs are waited for on, and the ear for signals, which end runs in order from here on.
///
/// # Errors
/// If signals cannot be heard.
pub fn listen() -> Result<(Runtime, Stop), Failure> {
    let no_signals = |e: std::io::Error| Failure::transient("signals", format!("cannot be heard ({e})"), "try again");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(no_signals)?;
    let entered = runtime.enter();
    let hear = |kind: SignalKind| signal(kind).map_err(no_signals);
    let mut terminate = hear(SignalKind::terminate())?;
    let mut interrupt = hear(SignalKind::interrupt())?;
    let mut user = hear(SignalKind::user_defined1())?;
    let (tell, stop) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = user.recv() => {}
        }
        tell.send_replace(true);
    });
    drop(entered);
    Ok((runtime, stop))
}

/// Runs as processes.
#[derive(Clone, Debug)]
pub struct Processes<'a> {
    plan: &'a Plan,
    base: &'a Config,
    cases: &'a BTreeMap<String, Ready>,
    work: &'a Path,
    /// Whether runs are done in `again/`, each from nothing.
    is_again: bool,
    program: PathBuf,
    program_hash: String,
    stop: Stop,
}

impl<'a> Processes<'a> {
    /// A runner for these cases below `work`.
    ///
    /// # Errors
    /// If this program cannot be found.
    pub fn new(
        plan: &'a Plan,
        base: &'a Config,
        cases: &'a BTreeMap<String, Ready>,
        work: &'a Path,
        stop: Stop,
    ) -> Result<Self, Failure> {
        let no_program = |e: std::io::Error| {
            let cause = format!("cannot find or read itself ({e})");
            Failure::refused("this program", cause, "start it by its path")
        };
        let program = std::env::current_exe().map_err(no_program)?;
        let mut hasher = blake3::Hasher::new();
        File::open(&program)
            .and_then(|file| hasher.update_reader(file).map(drop))
            .map_err(no_program)?;
        Ok(Self {
            plan,
            base,
            cases,
            work,
            is_again: false,
            program,
            program_hash: hasher.finalize().to_hex().to_string(),
            stop,
        })
    }

    /// The same program, which does runs again, from nothing and in a folder of their own.
    #[must_use]
    pub fn again(&self) -> Self {
        Self {
            is_again: true,
            ..self.clone()
        }
    }

    /// BLAKE3 of the program.
    #[must_use]
    pub fn program(&self) -> &str {
        &self.program_hash
    }

    fn folder(&self, run: &RunId) -> PathBuf {
        let below = if self.is_again { AGAIN_FOLDER } else { "" };
        self.work.join(below).join(run.folder())
    }

    /// The config of a run.
    ///
    /// # Errors
    /// As a config is refused: by a controller's keys.
    pub fn config(&self, run: &RunSpec) -> Result<Config, Failure> {
        let ready = &self.cases[&run.id.case];
        let mut config = self.base.clone();
        config.run.name = format!("{}-{}-{}", run.id.case, run.id.arm, run.id.seed);
        config.run.seed = run.id.seed;
        config.data.tokenizer.path = Some(ready.tokenizer.clone());
        config.data.domains.clone_from(&ready.domains);
        for (domain, weight) in config.data.domains.iter_mut().zip(&run.mixture) {
            domain.weight = weight.max(WEIGHT_LEAST);
        }
        config.data.later = ready.late.iter().map(|late| later(late, &run.mixture)).collect();
        // A run of a minute is done again rather than resumed.
        config.checkpoint.store.clear();
        config.checkpoint.interval_steps = 0;
        config.checkpoint.keep_last = 1;
        config.set_dir(&self.folder(&run.id))?;
        let set = match &ready.late {
            _ if !run.set.is_empty() => run.set.clone(),
            None => vec!["mixture.controller=static".to_owned()],
            Some(late) => static_with(late),
        };
        Ok(Config::parse(
            &config.to_toml()?,
            &format!("config of {}", run.id),
            &set,
            self.work,
        )?)
    }

    /// What is in a run's folder, with what its note says; none where its trace has not come to its end.
    fn whole(&self, run: &RunSpec, note: Note) -> Result<Option<Whole>, Failure> {
        let folder = RunFolder::new(self.folder(&run.id));
        let path = folder.trace();
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Failure::io(path.display(), &e, "cannot be read", "check the disk")),
        };
        let remedy = "remove the run's folder to do it again, or name another --work";
        let refuse = |cause: String| Failure::refused(folder.dir().display(), cause, remedy);
        let (lines, _) = parse_whole_lines(&bytes).map_err(|e| refuse(e.to_string()))?;
        let outcome = match Outcome::read(&lines, &self.cases[&run.id.case].facts, self.plan.steps) {
            Ok(outcome) => outcome,
            Err(Unfit::Unfinished { .. }) => return Ok(None),
            Err(other) => return Err(refuse(other.to_string())),
        };
        let theirs = Config::load(&folder.config(), &[])?;
        if theirs.identity() != self.config(run)?.identity() {
            return Err(refuse(
                "holds a run of another config: the plan has changed since".to_owned(),
            ));
        }
        let proof = Proof {
            config: digest(&theirs),
            data_version: note.data_version,
            program: note.program,
            device: note.device.unwrap_or_else(|| device(&theirs)),
            seconds: note.seconds,
            trace: blake3::hash(&bytes).to_hex().to_string(),
        };
        Ok(Some(Whole { outcome, proof }))
    }

    /// Removes the folder of a run: what an earlier bench did there would be found, and not done again.
    async fn remove(&self, run: &RunSpec) -> Result<(), Failure> {
        let folder = self.folder(&run.id);
        wait_until_free(&folder.join("lock"), &mut self.stop.clone()).await?;
        match std::fs::remove_dir_all(&folder) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Failure::io(
                folder.display(),
                &e,
                "cannot be removed",
                "remove it by hand",
            )),
            _ => Ok(()),
        }
    }

    /// Makes the folder of a run and its config file.
    fn prepare(&self, run: &RunSpec) -> Result<PathBuf, Failure> {
        let folder = self.folder(&run.id);
        let failed =
            |e: std::io::Error| Failure::io(folder.display(), &e, "cannot be made", "free space and try again");
        std::fs::create_dir_all(&folder).map_err(failed)?;
        let data = folder.join("data");
        if !data.exists() {
            // From runs/<case>/<arm>/seed-<n>/ to cases/<case>/data: the work folder may be moved.
            let up = if self.is_again { "../../../../.." } else { "../../../.." };
            let target = Path::new(up).join("cases").join(&run.id.case).join("data");
            // One whose target was gone would stand in the way.
            let _ = std::fs::remove_file(&data);
            std::os::unix::fs::symlink(target, &data).map_err(failed)?;
        }
        let config = folder.with_extension("toml");
        std::fs::write(&config, self.config(run)?.to_toml()?).map_err(failed)?;
        Ok(config)
    }

    /// One life of the run's process, to its end.
    async fn live(&self, run: &RunSpec, config: &Path) -> Result<ExitStatus, Failure> {
        let folder = self.folder(&run.id);
        let log = folder.with_extension("log");
        let failed =
            |e: std::io::Error| Failure::io(log.display(), &e, "cannot be written", "free space and try again");
        let out = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(failed)?;
        let errors = out.try_clone().map_err(failed)?;
        let mut command = tokio::process::Command::new(&self.program);
        // A group of its own: a Ctrl-C reaches the bench alone, which then ends the run in order.
        command
            .arg("train")
            .arg(config)
            // Nobody looks at one of so many.
            .args(["--dashboard", "off"])
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(errors)
            .process_group(0);
        let mut stop = self.stop.clone();
        wait_until_free(&folder.join("lock"), &mut stop).await?;
        if *stop.borrow() {
            return Err(stopped());
        }
        let mut child = command.spawn().map_err(|e| {
            Failure::transient(
                "a run",
                format!("cannot be started ({e})"),
                "free resources and try again",
            )
        })?;
        let lost = |e: std::io::Error| Failure::transient("a run", format!("was lost sight of ({e})"), "try again");
        tokio::select! {
            status = child.wait() => return status.map_err(lost),
            () = until(&mut stop) => {}
        }
        let pid = child
            .id()
            .and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed()));
        if let Some(pid) = pid {
            // It may have ended just now.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let status = child.wait().await.map_err(lost)?;
        // One that came to its end all the same is kept.
        if status.success() { Ok(status) } else { Err(stopped()) }
    }

    fn note(&self, run: &RunSpec, note: &Note) -> Result<(), Failure> {
        let folder = RunFolder::new(self.folder(&run.id));
        let path = folder.dir().join(NOTE_FILE);
        let failed =
            |e: std::io::Error| Failure::io(path.display(), &e, "cannot be written", "free space and try again");
        let fresh = path.with_extension("json.new");
        let text = serde_json::json!(note).to_string() + "\n";
        std::fs::write(&fresh, text)
            .and_then(|()| std::fs::rename(&fresh, &path))
            .map_err(failed)?;
        // Its trace says all that is asked of it; hundreds of checkpoints would fill the disk.
        match std::fs::remove_dir_all(folder.store()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(failed(e)),
            _ => Ok(()),
        }
    }
}

/// What comes late, in the config of a run of this mixture: a new domain with its share of the mixture, which is of all domains,
/// or other text of one that keeps its weight.
fn later(late: &Late, mixture: &[f64]) -> LaterConfig {
    let (step, prepared, name) = (late.from_step, late.data.clone(), late.name.clone());
    if late.replaces {
        return LaterConfig {
            step,
            prepared,
            domains: Vec::new(),
            replace: vec![name],
            shares: BTreeMap::new(),
        };
    }
    let sum: f64 = mixture.iter().sum();
    let share = mixture.last().map_or(0.0, |weight| weight / sum);
    LaterConfig {
        step,
        prepared,
        domains: vec![name.clone()],
        replace: Vec::new(),
        shares: BTreeMap::from([(name, share.clamp(WEIGHT_LEAST, 1.0 - WEIGHT_LEAST))]),
    }
}

/// A static run has decision points for what is planned alone: one is early enough.
fn static_with(late: &Late) -> Vec<String> {
    let point = (late.from_step / 2).max(1);
    vec![
        "mixture.controller=static".to_owned(),
        "policy.persons=true".to_owned(),
        format!("mixture.start_steps={point}"),
        format!("mixture.interval_steps={point}"),
        "mixture.lag_steps=1".to_owned(),
    ]
}

fn digest(config: &Config) -> String {
    blake3::hash(config.identity().as_bytes()).to_hex().to_string()
}

/// What this machine computes on under a config. All processors give the same bits; of other devices each kind is a type of
/// its own.
fn device(config: &Config) -> String {
    match config.cluster.device {
        ClusterDevice::Cpu => "cpu".to_owned(),
        ClusterDevice::Auto | ClusterDevice::Cuda => device_type(config),
    }
}

fn stopped() -> Failure {
    Failure::new(
        Exit::Stopped,
        "the bench",
        "was stopped by a signal",
        "the same command goes on",
    )
}

async fn until(stop: &mut Stop) {
    // Whoever tells goes only after having told.
    let _ = stop.wait_for(|told| *told).await;
}

/// A bench that was killed leaves its run going: waits for that one's end.
async fn wait_until_free(lock: &Path, stop: &mut Stop) -> Result<(), Failure> {
    let mut said = false;
    loop {
        let held = File::open(lock).is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)));
        if !held {
            return Ok(());
        }
        if !said {
            eprintln!(
                "waiting for the run of an earlier bench, which holds {}",
                lock.display()
            );
            said = true;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = until(stop) => return Err(stopped()),
        }
    }
}

impl Runner for Processes<'_> {
    fn find(&self, run: &RunSpec) -> Result<Option<Whole>, Failure> {
        // Without a note the run's own process has the last word on whether it is whole, and on this data.
        let Ok(text) = std::fs::read(self.folder(&run.id).join(NOTE_FILE)) else {
            return Ok(None);
        };
        let Ok(note) = serde_json::from_slice::<Note>(&text) else {
            return Ok(None);
        };
        if note.data_version != self.cases[&run.id.case].facts.data_version {
            return Err(Failure::refused(
                self.folder(&run.id).display(),
                "holds a run on other data: the corpus has changed since",
                "put it back, or name another --work",
            ));
        }
        self.whole(run, note)
    }

    fn config_digest(&self, run: &RunSpec) -> Result<String, Failure> {
        Ok(digest(&self.config(run)?))
    }

    async fn run(&self, run: &RunSpec) -> Result<Whole, Failure> {
        if self.is_again {
            self.remove(run).await?;
        }
        let began = Instant::now();
        let config = self.prepare(run)?;
        for _ in 0..TRIES_MAX {
            let status = self.live(run, &config).await?;
            let exit = status
                .code()
                .and_then(|code| u8::try_from(code).ok())
                .map_or(Exit::Halted, Exit::from_code);
            match exit {
                Exit::Done => {
                    let note = Note {
                        data_version: self.cases[&run.id.case].facts.data_version.clone(),
                        program: self.program_hash.clone(),
                        seconds: began.elapsed().as_millis() as f64 / 1000.0,
                        device: Some(device(&self.config(run)?)),
                    };
                    let Some(whole) = self.whole(run, note.clone())? else {
                        let remedy = "keep the folder and report this";
                        return Err(Failure::halted(
                            run.id.to_string(),
                            "ended well with an unfinished trace",
                            remedy,
                        ));
                    };
                    self.note(run, &note)?;
                    return Ok(whole);
                }
                Exit::Transient => {}
                other => return Err(self.ended_badly(run, other, &status.to_string())),
            }
        }
        Err(self.ended_badly(run, Exit::Transient, "exit code 33, several times"))
    }
}

impl Processes<'_> {
    fn ended_badly(&self, run: &RunSpec, exit: Exit, how: &str) -> Failure {
        let log = self.folder(&run.id).with_extension("log");
        let cause = format!("its process ended with {how}");
        let remedy = format!("{} says why; the same command goes on", log.display());
        Failure::new(exit, run.id.to_string(), cause, remedy)
    }
}
