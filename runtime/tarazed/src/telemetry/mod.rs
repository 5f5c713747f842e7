//! Logs, spans and metrics: where they go, and that they never get in a run's way.
//!
//! - Log lines go to a file in the run folder, and warnings to standard error too; `RUST_LOG` chooses others for both.
//! - Spans and metrics go to an OTLP collector where `telemetry.otlp_endpoint` or `OTEL_EXPORTER_OTLP_ENDPOINT` names
//!   one. Without one no exporter, no queue and no thread exists, and a span costs a level check.
//! - The controller's lines for standard error wait in a bounded queue: a terminal that stands still blocks nobody.
//! - A collector that is down, slow or gone costs spans, never a step: spans wait in a bounded queue and are dropped when
//!   it is full, exports run on a thread of their own with a time limit, and the flush at exit is bounded.
//!
//! Metrics go through the OpenTelemetry metrics API (see [`Metrics`]): it shares transport and resource with the spans
//! and adds features of crates that are there anyway, no new dependency.
//!
//! Deliberately absent: nothing here is read back. The trace, `metrics.jsonl` and `events.jsonl` in the run folder are
//! the truth; a collector is a convenience.

mod metrics;
#[cfg(feature = "otlp")]
mod otlp;

pub use metrics::{Metrics, StepSample};

use crate::exit::{Exit, Failure, is_full};
use crate::outlet::{DRAIN_TIMEOUT_MS, Feed, Outlet, last_words};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;
use tarazed_domain::config::TelemetryConfig;
use tarazed_domain::{Incarnation, WorkerId};
use tracing::Dispatch;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::Registry;

/// The standard variable that names a collector.
pub const ENDPOINT_VARIABLE: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
/// Longest wait for a collector at exit.
pub const FLUSH_TIMEOUT_MS: u64 = 2_000;

/// Which process this is, for resource attributes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The controller, or a command of its own.
    Controller,
    /// One life of a worker.
    Rank(WorkerId, Incarnation),
}

impl Role {
    /// Name of the process in logs and file names: `controller`, `worker-3`.
    #[must_use]
    pub fn process_name(self) -> String {
        match self {
            Self::Controller => "controller".to_owned(),
            Self::Rank(worker, _) => format!("worker-{worker}"),
        }
    }
}

/// What to set up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which process this is.
    pub role: Role,
    /// Name of the run.
    pub run: String,
    /// Collector, from [`endpoint`]; none for no export.
    pub endpoint: Option<String>,
    /// Log file; its folder is created. For a rank, the file that its node agent sends its standard error to: log lines go
    /// there that way, so that they and whatever else the process says stand in order.
    pub log_file: Option<PathBuf>,
}

/// The collector that config and environment name: the config first; empty counts as none.
#[must_use]
pub fn endpoint(config: &TelemetryConfig, variable: Option<String>) -> Option<String> {
    Some(config.otlp_endpoint.trim().to_owned())
        .filter(|endpoint| !endpoint.is_empty())
        .or(variable)
        .map(|endpoint| endpoint.trim().to_owned())
        .filter(|endpoint| !endpoint.is_empty())
}

/// The running exporters, if any, and what waits for standard error. Call [`Telemetry::shutdown`] at exit; dropping it
/// may lose what waits.
#[derive(Debug, Default)]
pub struct Telemetry {
    #[cfg(feature = "otlp")]
    exporters: Option<otlp::Exporters>,
    metrics: Metrics,
    /// Log lines on their way to standard error; none where they are written at once.
    stderr: Option<Outlet<Vec<u8>>>,
}

impl Telemetry {
    /// The instruments; they cost nothing without a collector.
    #[must_use]
    pub const fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Whether a collector was named.
    #[must_use]
    pub const fn exports(&self) -> bool {
        #[cfg(feature = "otlp")]
        return self.exporters.is_some();
        #[cfg(not(feature = "otlp"))]
        return false;
    }

    /// Sends what waits, for at most [`FLUSH_TIMEOUT_MS`], and stops the exporters; then standard error has
    /// [`DRAIN_TIMEOUT_MS`] to take what waits for it.
    pub fn shutdown(self) {
        #[cfg(feature = "otlp")]
        if let Some(exporters) = self.exporters {
            exporters.shutdown();
        }
        if let Some(stderr) = self.stderr {
            // What it does not take stands in the log file.
            let _ = stderr.drain(Duration::from_millis(DRAIN_TIMEOUT_MS));
        }
    }
}

/// Sets up logs and exporters for the whole process.
///
/// # Errors
/// Refused where the endpoint cannot be one, or the log file cannot be opened; halted where the disk is full.
///
/// # Panics
/// If it was called before: one process has one subscriber.
pub fn init(settings: &Settings) -> Result<Telemetry, Failure> {
    let (dispatch, telemetry) = build(settings)?;
    let set = tracing::dispatcher::set_global_default(dispatch);
    assert!(set.is_ok(), "telemetry is set up once in a process");
    if let Some(log_file) = &settings.log_file {
        crate::panics::set_log_file(log_file.clone());
    }
    Ok(telemetry)
}

/// Builds what [`init`] installs.
///
/// # Errors
/// As [`init`].
pub fn build(settings: &Settings) -> Result<(Dispatch, Telemetry), Failure> {
    let wanted = wanted_levels(std::env::var("RUST_LOG").ok().as_deref());
    let (stderr, writer) = standard_error(settings.role)?;
    let mut layers: Vec<Box<dyn Layer<Registry> + Send + Sync>> = vec![
        tracing_subscriber::fmt::layer()
            .with_writer(writer)
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .with_filter(wanted.clone().unwrap_or_else(|| on_stderr(settings.role)))
            .boxed(),
    ];
    if let Some(path) = &settings.log_file
        && settings.role == Role::Controller
    {
        let file = open_log(path)?;
        layers.push(
            tracing_subscriber::fmt::layer()
                .with_writer(Mutex::new(file))
                .with_ansi(false)
                .with_filter(wanted.unwrap_or_else(|| own(LevelFilter::INFO)))
                .boxed(),
        );
    }
    let mut telemetry = match &settings.endpoint {
        None => Telemetry::default(),
        Some(endpoint) => add_exporters(&mut layers, settings, endpoint)?,
    };
    telemetry.stderr = stderr;
    Ok((Dispatch::new(tracing_subscriber::registry().with(layers)), telemetry))
}

/// Where log lines for standard error go. A rank's is a file, which takes them at once, so that they outlive whatever
/// ends it; the controller's may be a terminal, and no thread of a run waits for one.
fn standard_error(role: Role) -> Result<(Option<Outlet<Vec<u8>>>, BoxMakeWriter), Failure> {
    if role != Role::Controller {
        return Ok((None, BoxMakeWriter::new(std::io::stderr)));
    }
    let write = |_dropped, line: Vec<u8>| {
        // Where standard error is gone, the log file has the line.
        let _ = std::io::stderr().write_all(&line);
    };
    let outlet = Outlet::start("stderr", |_| false, write).map_err(|e| {
        Failure::transient(
            "threads",
            format!("cannot be started ({e})"),
            "free resources and try again",
        )
    })?;
    let feed = outlet.feed();
    Ok((Some(outlet), BoxMakeWriter::new(move || LineWriter(feed.clone()))))
}

/// Queues each line: a log line comes in one write.
struct LineWriter(Feed<Vec<u8>>);

impl Write for LineWriter {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        self.0.put(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(feature = "otlp")]
fn add_exporters(
    layers: &mut Vec<Box<dyn Layer<Registry> + Send + Sync>>,
    settings: &Settings,
    endpoint: &str,
) -> Result<Telemetry, Failure> {
    let (exporters, layer) = otlp::Exporters::start(settings, endpoint)?;
    // The transport's own spans stay out: exporting them would make new ones for ever.
    layers.push(layer.with_filter(own(LevelFilter::INFO)).boxed());
    Ok(Telemetry {
        metrics: Metrics::over(exporters.meter()),
        exporters: Some(exporters),
        stderr: None,
    })
}

#[cfg(not(feature = "otlp"))]
fn add_exporters(
    _: &mut Vec<Box<dyn Layer<Registry> + Send + Sync>>,
    _: &Settings,
    endpoint: &str,
) -> Result<Telemetry, Failure> {
    Err(Failure::refused(
        "telemetry.otlp_endpoint",
        format!("'{endpoint}' is set, and this program was built without the feature `otlp`"),
        "build it with default features, or unset it",
    ))
}

fn only(level: LevelFilter) -> Targets {
    Targets::new().with_default(level)
}

fn on_stderr(role: Role) -> Targets {
    match role {
        Role::Controller => only(LevelFilter::WARN),
        Role::Rank(..) => own(LevelFilter::INFO),
    }
}

/// This project's crates alone, warnings from the rest.
fn own(level: LevelFilter) -> Targets {
    only(LevelFilter::WARN).with_target("tarazed", level)
}

/// `RUST_LOG`, e.g. `info` or `tarazed_actors=debug,warn`; one that cannot be read is said and ignored.
fn wanted_levels(variable: Option<&str>) -> Option<Targets> {
    let text = variable.filter(|text| !text.trim().is_empty())?;
    text.parse()
        .inspect_err(|error| last_words(&format!("tarazed: RUST_LOG={text} is ignored: {error}")))
        .ok()
}

fn open_log(path: &Path) -> Result<std::fs::File, Failure> {
    let folder = path.parent().unwrap_or_else(|| Path::new("."));
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::OpenOptions::new().create(true).append(true).open(path))
        .map_err(|e| {
            Failure::new(
                if is_full(&e) { Exit::Halted } else { Exit::Refused },
                path.display(),
                format!("cannot be opened for the log ({e})"),
                "check the run folder's permissions and free space",
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(dir: &Path) -> Settings {
        Settings {
            role: Role::Controller,
            run: "test".to_owned(),
            endpoint: None,
            log_file: Some(dir.join("log/controller.log")),
        }
    }

    #[test]
    fn the_config_names_the_collector_before_the_environment_does() {
        let config = |endpoint: &str| TelemetryConfig {
            otlp_endpoint: endpoint.to_owned(),
        };
        let variable = || Some("http://b:4317".to_owned());
        assert_eq!(
            endpoint(&config("http://a:4317 "), variable()).as_deref(),
            Some("http://a:4317")
        );
        assert_eq!(endpoint(&config(""), variable()).as_deref(), Some("http://b:4317"));
        assert_eq!(endpoint(&config(" "), Some(String::new())), None);
        assert_eq!(endpoint(&config(""), None), None);
    }

    #[test]
    fn without_a_collector_there_is_a_log_file_and_no_exporter() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (dispatch, telemetry) = build(&settings(dir.path())).expect("built");
        assert!(!telemetry.exports());
        telemetry.metrics().recovery(12.0); // goes nowhere, and may
        tracing::dispatcher::with_default(&dispatch, || {
            tracing::info!(target: "tarazed_actors::root", "generation 1");
            tracing::info!(target: "h2::client", "somebody else's detail");
            tracing::info_span!(target: "tarazed_train::step", "step").in_scope(|| ());
        });
        let log = std::fs::read_to_string(dir.path().join("log/controller.log")).expect("a log");
        assert!(log.contains("generation 1"), "{log}");
        assert!(!log.contains("somebody else"), "{log}");
    }

    #[test]
    fn an_unreadable_rust_log_is_ignored() {
        assert!(wanted_levels(Some("tarazed=loudly")).is_none());
        assert!(wanted_levels(Some("")).is_none());
        assert!(wanted_levels(Some("tarazed=debug,warn")).is_some());
    }

    #[test]
    fn a_log_that_cannot_be_opened_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(dir.path().join("log"), "a file in the way").expect("a file");
        let refused = build(&settings(dir.path()))
            .map(|_| ())
            .expect_err("no folder can be made");
        assert!(refused.message.contains("controller.log"), "{refused}");
    }
}
