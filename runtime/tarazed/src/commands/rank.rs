//! `tarazed rank`: one rank process. Started by the node agent, not by people, so it is hidden.

use crate::exit::{Exit, Failure};
use crate::telemetry::{self, ENDPOINT_VARIABLE, Role, Settings};
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use tarazed_actors::node::Lifeline;
use tarazed_actors::rank::{self, RankArgs, RankExit};
use tarazed_actors::run_folder::RunPaths;
use tarazed_domain::config::Config;
use tarazed_domain::{Incarnation, WorkerId};

/// Options of `tarazed rank`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run folder.
    #[arg(long)]
    run_dir: PathBuf,
    /// Folder of the prepared data set; the run folder says which where it is absent.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Address of the controller's hub; the run folder says which where it is absent.
    #[arg(long)]
    controller: Option<String>,
    /// Folder for the data plane's sockets.
    #[arg(long)]
    sockets: Option<PathBuf>,
    /// Where other hosts reach this one.
    #[arg(long)]
    address: Option<IpAddr>,
    /// The first worker of this host.
    #[arg(long, default_value_t = 0)]
    first_worker: u32,
    /// Which slot this process fills.
    #[arg(long)]
    worker: u32,
    /// Which life of it.
    #[arg(long)]
    incarnation: u32,
    /// Standard input is the agent's pipe, by which it sees a sudden end.
    #[arg(long)]
    lifeline: bool,
}

/// Environment variable of chaos runs: bits to flip, `WORKER.INCARNATION=STEP:PLACE:SHARD:ELEMENT:BIT`, separated by commas.
const HARM_VARIABLE: &str = "TARAZED_CHAOS_FLIP";

/// Environment variable of chaos runs: what is to stand still, `WORKER.INCARNATION=STEP:PART`, separated by commas.
const HANG_VARIABLE: &str = "TARAZED_CHAOS_HANG";

/// What such a variable asks of this life of this worker.
fn asked_of<T: FromStr<Err = String>>(args: &Args, variable: &str) -> Result<Option<T>, Failure> {
    let who = format!("{}.{}", args.worker, args.incarnation);
    let text = std::env::var(variable).unwrap_or_default();
    let mine = text
        .split(',')
        .filter_map(|entry| entry.split_once('='))
        .find(|(name, _)| *name == who);
    mine.map(|(_, asked)| asked.parse::<T>())
        .transpose()
        .map_err(|e| Failure::refused(variable, e, "it is for chaos runs: leave it unset"))
}

/// Runs a rank process to its end.
///
/// # Errors
/// Transient: the node agent counts it as a lost rank and starts another.
pub fn run(args: Args) -> Result<Exit, Failure> {
    // It was started by another name (`controller::root`); `pkill tarazed` and `top` are to know it. Nothing depends on it.
    let _ = std::fs::write("/proc/self/comm", env!("CARGO_PKG_NAME"));
    let paths = RunPaths::new(&args.run_dir);
    let config = Config::load(&paths.config(), &[])?;
    let role = Role::Rank(WorkerId(args.worker), Incarnation(args.incarnation));
    let telemetry = telemetry::init(&Settings {
        role,
        run: config.run.name,
        endpoint: telemetry::endpoint(&config.telemetry, std::env::var(ENDPOINT_VARIABLE).ok()),
        log_file: Some(paths.logs().join(format!("{}.log", role.process_name()))),
    })?;
    // Dropped at the very end: it says that the process ends by itself.
    let _lifeline = args.lifeline.then(Lifeline::hold);
    let who = format!("worker {} (incarnation {})", args.worker, args.incarnation);
    let (harm, hang) = (asked_of(&args, HARM_VARIABLE)?, asked_of(&args, HANG_VARIABLE)?);
    let ended = rank::run(&RankArgs {
        run_dir: args.run_dir,
        data: args.data,
        controller: args.controller,
        sockets: args.sockets,
        address: args.address,
        first_worker: args.first_worker,
        worker: args.worker,
        incarnation: args.incarnation,
        memory_hint: crate::plan::memory_hint,
        harm,
        hang,
    });
    telemetry.shutdown();
    match ended {
        Ok(RankExit::Left) => Ok(Exit::Done),
        Ok(RankExit::ControllerLost) => Ok(Exit::Transient),
        Err(error) => Err(Failure::transient(who, error, "its node agent starts another")),
    }
}
