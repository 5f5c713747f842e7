//! `tarazed train`: from a config file to the exit code of a run.
//!
//! This file resolves options, opens the run folder, turns notices into lines and serves the dashboard; the run itself is
//! [`tarazed_actors::controller`]'s.

use crate::dashboard::{self, Dashboard};
use crate::exit::{Exit, Failure};
use crate::outlet::last_words;
use crate::progress::Incident;
use crate::screen::{Screen, languages_of};
use crate::signals;
use crate::telemetry::{self, ENDPOINT_VARIABLE, Role, Settings};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use tarazed_actors::controller::{self, Notice, Outcome, RunError, RunOptions};
use tarazed_actors::rank::DeviceChoice;
use tarazed_actors::run_folder::{Existing, FolderError, Occupied, RunFolder, Trouble};
use tarazed_domain::StepsCompleted;
use tarazed_domain::config::{ClusterDevice, Config};
use tokio::sync::watch;

/// Options of `tarazed train`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Config file.
    config: PathBuf,
    /// Override a key, e.g. --set batch.lanes=16.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Run folder; runs/<run.name> where neither this nor run.dir names one.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Rank processes; the numbers do not depend on it.
    #[arg(long, value_name = "N")]
    ranks: Option<u32>,
    /// Stop after this step with a checkpoint; the schedule still aims at run.steps.
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// The run folder must hold the run to go on with.
    #[arg(long, conflicts_with = "fresh")]
    resume: bool,
    /// The run folder must hold no run.
    #[arg(long)]
    fresh: bool,
    /// Put another controller that holds the run folder out of charge, and go on with its ranks: for one that stands
    /// still, since one that is dead holds nothing.
    #[arg(long, conflicts_with = "fresh")]
    take_over: bool,
    /// Where the run's page is served; port 0 is any free one. Whoever knows its address, which is printed, may look.
    #[arg(long, value_name = "ADDRESS:PORT|off", default_value = dashboard::PLACE)]
    dashboard: String,
}

impl Args {
    /// The config with the options in it.
    fn resolve(&self) -> Result<Config, Failure> {
        let mut config = Config::load_for(&self.config, &self.set, self.ranks)?;
        if let Some(dir) = &self.run_dir {
            config.set_dir(dir)?;
        }
        if self.steps == Some(0) {
            return Err(Failure::refused("--steps", "is 0", "stop after at least 1 step"));
        }
        config.cluster.device = device(&config)?.resolved();
        Ok(config)
    }

    const fn occupied(&self) -> Occupied {
        if self.take_over {
            Occupied::TakeOver
        } else {
            Occupied::Refuse
        }
    }

    const fn existing(&self) -> Existing {
        match (self.resume, self.fresh) {
            (true, _) => Existing::Resume,
            (_, true) => Existing::Fresh,
            _ => Existing::ResumeOrBegin,
        }
    }
}

/// Runs the command.
///
/// # Errors
/// By what the run says: refused before it began, halted, transient or stopped.
pub fn run(args: &Args) -> Result<Exit, Failure> {
    // Before anything else: a signal that finds nobody listening ends the process with no code of the contract.
    let heard = Arc::new(Heard::default());
    let stop = stop_on_signals(Arc::clone(&heard))?;
    let place = dashboard::place(&args.dashboard)?;
    let config = args.resolve()?;
    let folder = RunFolder::open_as(&config, args.existing(), args.occupied()).map_err(folder_failure)?;
    let (attempt, config_file) = (folder.attempt(), folder.paths.config());
    let ended = train(args, place, config, folder, &heard, stop);
    // A new run that is refused leaves nothing behind, and neither does one that failed before there was anything to keep.
    if let Err(failure) = &ended
        && (failure.exit == Exit::Refused || !config_file.exists())
    {
        attempt.undo();
    }
    ended
}

fn train(
    args: &Args,
    place: Option<SocketAddr>,
    config: Config,
    folder: RunFolder,
    heard: &Arc<Heard>,
    stop: watch::Receiver<bool>,
) -> Result<Exit, Failure> {
    let last_step = StepsCompleted(args.steps.unwrap_or(config.run.steps).min(config.run.steps));
    let program = std::env::current_exe().map_err(|e| {
        Failure::refused(
            "this program",
            format!("cannot find itself ({e})"),
            "start it by its path",
        )
    })?;
    if !folder.resumed {
        super::checkpoint::try_remote(&config.checkpoint.store)?;
        crate::initial::check(&config)?;
    }
    let telemetry = telemetry::init(&Settings {
        role: Role::Controller,
        run: config.run.name.clone(),
        endpoint: telemetry::endpoint(&config.telemetry, std::env::var(ENDPOINT_VARIABLE).ok()),
        log_file: Some(folder.paths.logs().join("controller.log")),
    })?;
    let dir = config.run.dir.clone();
    let screen = Screen::start(&config, last_step, telemetry.metrics().clone())?;
    let dashboard = place.and_then(|place| open_dashboard(place, &config, last_step, &screen));
    let publish = dashboard.as_ref().map(Dashboard::publisher);
    if let Some(dashboard) = &dashboard {
        // Nobody else has set it.
        let _ = heard.page.set(dashboard.address());
    }
    if let (false, Some(publish)) = (folder.resumed, &publish) {
        publish.notify_one();
    }
    let stale = crate::run_folder::RunFolder::new(&dir).dashboard_url();
    let (show, hear) = (screen.listener(), Arc::clone(heard));
    let ended = controller::run(RunOptions {
        config,
        program,
        last_step,
        folder,
        notify: Arc::new(move |notice| {
            hear.on(&notice);
            match (&notice, &publish) {
                (Notice::Opened { .. }, Some(publish)) => publish.notify_one(),
                // A life that was killed has left the address of its page, and this one has none.
                (Notice::Opened { .. }, None) => _ = std::fs::remove_file(&stale),
                _ => {}
            }
            show(notice);
        }),
        stop,
    });
    drop(dashboard);
    let shown = screen.finish();
    telemetry.shutdown();
    let exit = conclude(ended, heard, args.fresh)?;
    if !shown {
        last_words(
            "tarazed: standard output takes nothing, so the end of the run is not shown; its files hold everything",
        );
    } else if exit == Exit::Done
        && let Err(failure) = crate::finale::tell(crate::output::short(&dir), &args.config)
    {
        last_words(&format!(
            "tarazed: the run is done, but its end cannot be shown: {}",
            failure.message
        ));
    }
    Ok(exit)
}

/// The run's page, where it can be served; what became of it is said, and training goes on either way.
fn open_dashboard(place: SocketAddr, config: &Config, last_step: StepsCompleted, screen: &Screen) -> Option<Dashboard> {
    let run = dashboard::Run {
        folder: crate::run_folder::RunFolder::new(&config.run.dir),
        last_step: last_step.0,
        languages: languages_of(config),
    };
    let dashboard = match Dashboard::start(place, run) {
        Ok(dashboard) => dashboard,
        Err(failure) => {
            screen.say(Incident::Warning(format!("no dashboard: {}", failure.message)));
            return None;
        }
    };
    screen.say(Incident::Stage(format!("dashboard {}", dashboard.url())));
    if !place.ip().is_loopback() {
        let text =
            "the dashboard can be reached from other machines over plain HTTP: its address is all that guards it";
        screen.say(Incident::Warning(text.to_owned()));
    }
    Some(dashboard)
}

/// What ranks will compute on, ready for them.
fn device(config: &Config) -> Result<DeviceChoice, Failure> {
    let found = DeviceChoice::of(config);
    if let Ok(found) = &found {
        found.takes(config)?;
    }
    let choice = found.and_then(|choice| choice.prepare().map(|()| choice));
    if choice == Ok(DeviceChoice::Cpu)
        && config.cluster.device == ClusterDevice::Auto
        && let Some(cause) = DeviceChoice::unused_device()
    {
        last_words(&format!("tarazed: computing on processors: {cause}"));
    }
    choice.map_err(|refused| {
        let remedy = format!("set it to \"cpu\", or {}", refused.remedy);
        Failure::refused("cluster.device", refused.cause, remedy)
    })
}

/// What the run has said so far, for a signal and for the last message.
#[derive(Default)]
struct Heard {
    /// The store is claimed: from here on the run itself hears a signal.
    opened: AtomicBool,
    /// Step of the newest checkpoint of this life; 0 for none.
    checkpoint: AtomicU64,
    /// Where the page is, and the file that says so.
    page: OnceLock<dashboard::Address>,
}

impl Heard {
    fn on(&self, notice: &Notice) {
        match notice {
            Notice::Opened { .. } => self.opened.store(true, Ordering::SeqCst),
            Notice::Checkpoint { step, .. } => self.checkpoint.store(step.0, Ordering::SeqCst),
            _ => {}
        }
    }
}

/// A value that turns true at the first SIGTERM, SIGINT or SIGUSR1. One that comes before the run is opened ends the
/// process at once: nothing is to be saved, and data sets and records appear whole or not at all. So does a second one:
/// the run resumes from its last checkpoint.
fn stop_on_signals(heard: Arc<Heard>) -> Result<watch::Receiver<bool>, Failure> {
    let (sender, receiver) = watch::channel(false);
    let first = move || {
        if !heard.opened.load(Ordering::SeqCst) {
            let message = "by a signal before training began; the same command begins again".to_owned();
            let exit = Exit::Stopped;
            last_words(&Failure { exit, message }.to_string());
            heard.page.get().into_iter().for_each(dashboard::Address::withdraw);
            std::process::exit(i32::from(exit.code()));
        }
        // Nobody listens any more where the run has just ended.
        let _ = sender.send(true);
    };
    signals::listen(first, || {
        last_words("tarazed: stopped at once by a second signal; the run resumes from its last checkpoint");
        std::process::exit(i32::from(Exit::Transient.code()));
    })?;
    Ok(receiver)
}

fn folder_failure(error: FolderError) -> Failure {
    let exit = match error.trouble {
        Trouble::Unfit => Exit::Refused,
        Trouble::Full => Exit::Halted,
        Trouble::Failing => Exit::Transient,
    };
    Failure::new(exit, error.path, error.cause, error.remedy)
}

fn conclude(ended: Result<Outcome, RunError>, heard: &Heard, fresh: bool) -> Result<Exit, Failure> {
    let outcome = match ended {
        Ok(outcome) => outcome,
        Err(RunError::Folder(error)) => return Err(folder_failure(error)),
        Err(RunError::Store(error)) => return Err(super::checkpoint::failure(error)),
        Err(RunError::Data(error)) => return Err(error.into()),
        Err(RunError::Refused(message)) => {
            return Err(Failure {
                exit: Exit::Refused,
                message,
            });
        }
        Err(RunError::System { what, cause, remedy }) => return Err(Failure::transient(what, cause, remedy)),
    };
    let exit = Exit::from_code(outcome.code);
    let step = outcome.step;
    let message = match exit {
        Exit::Done => return Ok(exit),
        Exit::Stopped => {
            let saved = heard.checkpoint.load(Ordering::SeqCst) == step.0 && step.0 > 0;
            let when = if saved {
                format!("after a checkpoint of step {step}")
            } else {
                format!("at step {step}, with nothing new to save")
            };
            let command = if fresh {
                "the same command without --fresh"
            } else {
                "the same command"
            };
            format!("by a signal {when}; {command} goes on")
        }
        _ => format!("step {step}: {}", outcome.diagnosis),
    };
    Err(Failure { exit, message })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn resolve(more: &[&str]) -> Result<Config, Failure> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/quickstart.toml");
        let line = ["tarazed", "train", path].into_iter().chain(more.iter().copied());
        match Cli::try_parse_from(line).expect("a good command line").command {
            Command::Train(args) => args.resolve(),
            other => panic!("{other:?}"),
        }
    }

    /// DET-1: options that say where and how long must not touch what decides numbers.
    #[test]
    fn placement_and_stop_point_leave_the_identity_alone() {
        let plain = resolve(&[]).expect("a good config").identity();
        for more in [
            &["--ranks", "1"][..],
            &["--ranks", "8"],
            &["--steps", "10"],
            &["--run-dir", "elsewhere"],
            &["--dashboard", "off"],
            &[
                "--set=cluster.transport=tcp",
                "--set=cluster.mesh_port=7000",
                "--set=cluster.mesh_advertise_port=7100",
                "--set=cluster.control_port=7200",
                "--set=cluster.control_advertise_port=7201",
            ],
        ] {
            assert_eq!(resolve(more).expect("a good config").identity(), plain, "{more:?}");
        }
        assert_ne!(
            resolve(&["--set", "run.seed=7"]).expect("a good config").identity(),
            plain
        );
    }

    #[test]
    fn a_stopped_run_says_what_was_saved_and_how_to_go_on() {
        let heard = Heard::default();
        let stopped = |heard: &Heard, fresh| {
            let outcome = Outcome {
                code: 34,
                diagnosis: String::new(),
                step: StepsCompleted(40),
                data: PathBuf::new(),
            };
            let failure = conclude(Ok(outcome), heard, fresh).expect_err("not done");
            assert_eq!(failure.exit, Exit::Stopped);
            failure.to_string()
        };
        assert_eq!(
            stopped(&heard, false),
            "tarazed: stopped: by a signal at step 40, with nothing new to save; the same command goes on"
        );
        heard.on(&Notice::Checkpoint {
            step: StepsCompleted(40),
            took_ms: 3,
        });
        assert_eq!(
            stopped(&heard, true),
            "tarazed: stopped: by a signal after a checkpoint of step 40; the same command without --fresh goes on"
        );
    }

    #[test]
    fn options_are_checked_like_keys() {
        let refused = |more: &[&str]| resolve(more).expect_err("refused").message;
        assert!(refused(&["--ranks", "9"]).starts_with("cluster.ranks: 9 ranks are more than batch.lanes = 8"));
        assert!(refused(&["--ranks", "0"]).starts_with("cluster.ranks: "));
        assert!(refused(&["--steps", "0"]).starts_with("--steps: "));
        assert!(refused(&["--set", "model.layer=2"]).contains("unknown field `layer`"));
        assert!(refused(&["--set", "nothing"]).starts_with("--set nothing: "));
    }
}
