//! `tarazed node`: stands for one host of a run whose ranks run on several.

use crate::exit::{Exit, Failure};
use crate::outlet::last_words;
use crate::signals;
use crate::telemetry::{self, ENDPOINT_VARIABLE, Role, Settings};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tarazed_actors::node::host::{self, NodeEnd, NodeFailed, NodeNotice, NodeOptions};
use tarazed_actors::run_folder::RunPaths;
use tarazed_domain::config::{NodeConfig, TelemetryConfig};
use tokio::sync::watch;

/// Options of `tarazed node`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run folder, which this host shares with the controller's.
    #[arg(long, value_name = "DIR")]
    run_dir: PathBuf,
    /// Which of the config's [[cluster.nodes]] this host is.
    #[arg(long, value_name = "NAME")]
    name: String,
    /// Where other hosts reach this one's ranks; what the config says where it is absent.
    #[arg(long, value_name = "IP")]
    address: Option<IpAddr>,
    /// How long to wait for a controller, in seconds, while no rank of this host lives.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    wait: u64,
}

/// Runs the command.
///
/// # Errors
/// Refused where this host can be no node of the run; transient where no controller came; stopped after a signal; else as the
/// run ended.
pub fn run(args: &Args) -> Result<Exit, Failure> {
    let (sender, stop) = watch::channel(false);
    let asked = move || {
        // An error means that the node has ended.
        let _ = sender.send(true);
    };
    signals::listen(asked, || {
        last_words("tarazed: stopped at once by a second signal");
        std::process::exit(i32::from(Exit::Transient.code()));
    })?;
    if !NodeConfig::is_name(&args.name) {
        return Err(Failure::refused(
            "--name",
            "is no name of a node",
            "give one of the config's [[cluster.nodes]]",
        ));
    }
    let program = std::env::current_exe().map_err(|e| {
        Failure::refused(
            "this program",
            format!("cannot find itself ({e})"),
            "start it by its path",
        )
    })?;
    // Its file in the run folder comes with the ranks' own: until a controller has made that folder, nothing is written.
    let telemetry = telemetry::init(&Settings {
        role: Role::Controller,
        run: format!("node {}", args.name),
        endpoint: telemetry::endpoint(&TelemetryConfig::default(), std::env::var(ENDPOINT_VARIABLE).ok()),
        log_file: None,
    })?;
    let name = args.name.clone();
    let ended = host::run(NodeOptions {
        run_dir: std::path::absolute(&args.run_dir).unwrap_or_else(|_| args.run_dir.clone()),
        name: args.name.clone(),
        address: args.address,
        program,
        wait: Duration::from_secs(args.wait),
        stop,
        notify: Arc::new(move |notice| last_words(&format!("node {name}: {}", line(notice)))),
    });
    telemetry.shutdown();
    conclude(ended, args)
}

fn line(notice: NodeNotice) -> String {
    match notice {
        NodeNotice::Waiting => "waiting for a controller".to_owned(),
        NodeNotice::Linked { address, generation } => {
            format!("linked to the controller at {address} (generation {generation})")
        }
        NodeNotice::Unlinked(reason) => format!("the controller is away ({reason}); its ranks train on meanwhile"),
        NodeNotice::Life(member, text) => format!("{member} {text}"),
        NodeNotice::Leaving(reason) => format!("all ranks of this host end: {reason}"),
    }
}

fn conclude(ended: Result<NodeEnd, NodeFailed>, args: &Args) -> Result<Exit, Failure> {
    let failure = |exit: Exit, message: String| Err(Failure { exit, message });
    match ended {
        Ok(NodeEnd::RunOver(0)) => Ok(Exit::Done),
        Ok(NodeEnd::RunOver(code)) => {
            let exit = Exit::from_code(code);
            failure(exit, format!("the run ended with code {code}; its controller says why"))
        }
        Ok(NodeEnd::Drained) => failure(
            Exit::Stopped,
            "by a signal; the run goes on without this host, and the same command brings it back".to_owned(),
        ),
        Ok(NodeEnd::Abandoned) => Err(Failure::transient(
            RunPaths::new(&args.run_dir).dir().display(),
            format!(
                "no controller with nodes came to be in charge of it within {} s",
                args.wait
            ),
            "start `tarazed train` with [[cluster.nodes]] on this run folder, or wait longer with --wait",
        )),
        Ok(NodeEnd::Refused(message)) => failure(Exit::Refused, message),
        Ok(NodeEnd::GaveWay(message)) => failure(Exit::Transient, message),
        Err(failed) => Err(Failure::transient(failed.what, failed.cause, failed.remedy)),
    }
}
