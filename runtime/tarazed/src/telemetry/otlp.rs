//! The exporters: spans and metrics over OTLP/gRPC, away from the step.

use super::{FLUSH_TIMEOUT_MS, Role, Settings};
use crate::exit::Failure;
use opentelemetry::KeyValue;
use opentelemetry::metrics::{Meter, MeterProvider};
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SdkTracer, SdkTracerProvider, SpanData, SpanExporter,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::runtime::Runtime;
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::registry::Registry;

/// Longest time one export may take.
const EXPORT_TIMEOUT_MS: u64 = 3_000;
/// Time between exports of spans.
const SPAN_INTERVAL_MS: u64 = 1_000;
/// Time between exports of metrics.
const METRIC_INTERVAL_MS: u64 = 5_000;
/// Spans that wait; more are dropped.
const SPANS_WAITING_MAX: usize = 8_192;

/// Running exporters of one process.
#[derive(Debug)]
pub(super) struct Exporters {
    spans: SdkTracerProvider,
    metrics: SdkMeterProvider,
    meter: Meter,
    /// Where the connection lives: one thread, apart from the runtime of the actors.
    runtime: Option<Runtime>,
}

impl Exporters {
    /// Starts them; nothing is sent before the first span ends, and no connection is waited for.
    pub(super) fn start(
        settings: &Settings,
        endpoint: &str,
    ) -> Result<(Self, OpenTelemetryLayer<Registry, SdkTracer>), Failure> {
        let bad = |error: &dyn std::fmt::Display| {
            Failure::refused(
                "telemetry.otlp_endpoint",
                format!("'{endpoint}' cannot be used ({error})"),
                "name an OTLP/gRPC collector, e.g. http://127.0.0.1:4317, or unset it",
            )
        };
        if !(endpoint.starts_with("http://") || endpoint.starts_with("https://")) {
            return Err(bad(&"it starts neither with http:// nor with https://"));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("otlp")
            .enable_all()
            .build()
            .map_err(|e| {
                Failure::transient(
                    "threads",
                    format!("cannot be started ({e})"),
                    "free resources and try again",
                )
            })?;
        let entered = runtime.enter();
        let timeout = Duration::from_millis(EXPORT_TIMEOUT_MS);
        let span_exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(timeout)
            .build()
            .map_err(|e| bad(&e))?;
        let metric_exporter = opentelemetry_otlp::MetricExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(timeout)
            .build()
            .map_err(|e| bad(&e))?;
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(SPANS_WAITING_MAX)
            .with_scheduled_delay(Duration::from_millis(SPAN_INTERVAL_MS))
            .build();
        let watched = Watched {
            exporter: span_exporter,
            endpoint: endpoint.to_owned(),
            failing: AtomicBool::new(false),
        };
        let processor = BatchSpanProcessor::builder(watched).with_batch_config(batches).build();
        let resource = resource(settings);
        let spans = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_resource(resource.clone())
            .build();
        let reader = PeriodicReader::builder(metric_exporter)
            .with_interval(Duration::from_millis(METRIC_INTERVAL_MS))
            .build();
        let metrics = SdkMeterProvider::builder()
            .with_reader(reader)
            .with_resource(resource)
            .build();
        drop(entered);
        let layer = tracing_opentelemetry::layer().with_tracer(spans.tracer("tarazed"));
        let meter = metrics.meter("tarazed");
        let exporters = Self {
            spans,
            metrics,
            meter,
            runtime: Some(runtime),
        };
        Ok((exporters, layer))
    }

    pub(super) const fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Flushes and stops within [`FLUSH_TIMEOUT_MS`]. On a thread of its own: the calls block, the metrics one without
    /// heeding any limit.
    pub(super) fn shutdown(self) {
        let (done, flushed) = std::sync::mpsc::channel();
        let limit = Duration::from_millis(FLUSH_TIMEOUT_MS);
        let (spans, metrics) = (self.spans.clone(), self.metrics.clone());
        let flush = move || {
            // Neither result helps anybody now: a collector that fails was already reported.
            let _ = spans.shutdown_with_timeout(limit);
            let _ = metrics.shutdown_with_timeout(limit);
            let _ = done.send(());
        };
        let started = std::thread::Builder::new().name("otlp-flush".to_owned()).spawn(flush);
        if started.is_ok() && flushed.recv_timeout(limit).is_err() {
            tracing::warn!(target: "tarazed::telemetry", "the collector did not take the last spans in {FLUSH_TIMEOUT_MS} ms");
        }
    }
}

impl Drop for Exporters {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn resource(settings: &Settings) -> Resource {
    let process = settings.role.process_name();
    let mut attributes = vec![
        KeyValue::new(
            "service.instance.id",
            format!("{}/{process}/{}", settings.run, std::process::id()),
        ),
        KeyValue::new("tarazed.run", settings.run.clone()),
        KeyValue::new("tarazed.process", process),
    ];
    if let Role::Rank(worker, incarnation) = settings.role {
        attributes.push(KeyValue::new("tarazed.worker", i64::from(worker.0)));
        attributes.push(KeyValue::new("tarazed.incarnation", i64::from(incarnation.0)));
    }
    // The builder also heeds OTEL_RESOURCE_ATTRIBUTES.
    Resource::builder()
        .with_service_name("tarazed")
        .with_attributes(attributes)
        .build()
}

/// Says once when a collector stops answering, and once when it answers again.
#[derive(Debug)]
struct Watched<E> {
    exporter: E,
    endpoint: String,
    failing: AtomicBool,
}

impl<E: SpanExporter> SpanExporter for Watched<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.exporter.export(batch).await;
        let failed_before = self.failing.swap(result.is_err(), Ordering::Relaxed);
        match &result {
            Err(error) if !failed_before => tracing::warn!(
                target: "tarazed::telemetry",
                "collector {} fails ({error}); the run goes on, spans are dropped until it answers",
                self.endpoint
            ),
            Ok(()) if failed_before => {
                tracing::warn!(target: "tarazed::telemetry", "collector {} answers again", self.endpoint);
            }
            _ => {}
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
