//! A real OTLP collector sees the spans and metrics of a run; one that is absent or mute costs nothing but them.

use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::metrics::v1::{metric, number_data_point};
use opentelemetry_proto::tonic::trace::v1::Span;
use std::time::{Duration, Instant};
use tarazed::telemetry::{self, FLUSH_TIMEOUT_MS, Role, Settings, StepSample};
use tarazed_domain::{Incarnation, WorkerId};
use tarazed_tests::harness::{Collector, Export};
use tokio::net::TcpListener;

fn settings(endpoint: String, worker: u32) -> Settings {
    Settings {
        role: Role::Rank(WorkerId(worker), Incarnation(2)),
        run: "otlp-test".to_owned(),
        endpoint: Some(endpoint),
        log_file: None,
    }
}

fn attribute(attributes: &[KeyValue], key: &str) -> Option<Value> {
    attributes
        .iter()
        .find(|a| a.key == key)
        .and_then(|a| a.value.clone()?.value)
}

/// A step on one rank, and a span within it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_sees_spans_metrics_and_who_sent_them() {
    let collector = Collector::start();
    let (dispatch, telemetry) = telemetry::build(&settings(collector.endpoint().to_owned(), 3)).expect("built");
    assert!(telemetry.exports());
    tracing::dispatcher::with_default(&dispatch, || {
        tracing::info_span!(target: "tarazed_train::step", "step", step = 7).in_scope(|| {
            tracing::info_span!(target: "h2::client", "not ours").in_scope(|| ());
            tracing::info_span!(target: "tarazed_train::step", "barrier").in_scope(|| ());
        });
    });
    telemetry.metrics().step(&StepSample {
        step: 7,
        step_ms: 12.5,
        tokens_per_s: 9_000.0,
        loss: 5.25,
        grad_norm: 1.5,
        durability_lag_s: Some(2.5),
    });
    telemetry.metrics().recovery(40.0);
    telemetry.metrics().checkpoint(80.0);
    tokio::task::spawn_blocking(|| telemetry.shutdown())
        .await
        .expect("flushed");

    let mut spans: Vec<Span> = Vec::new();
    let mut metrics: Vec<String> = Vec::new();
    for export in collector.take() {
        match export {
            Export::Spans(request) => {
                for sent in request.resource_spans {
                    let resource = sent.resource.expect("a resource").attributes;
                    let text = |key| attribute(&resource, key);
                    assert_eq!(text("service.name"), Some(Value::StringValue("tarazed".to_owned())));
                    assert_eq!(text("tarazed.run"), Some(Value::StringValue("otlp-test".to_owned())));
                    assert_eq!(text("tarazed.worker"), Some(Value::IntValue(3)));
                    assert_eq!(text("tarazed.incarnation"), Some(Value::IntValue(2)));
                    spans.extend(sent.scope_spans.into_iter().flat_map(|scope| scope.spans));
                }
            }
            Export::Metrics(request) => {
                let scopes = request.resource_metrics.into_iter().flat_map(|sent| sent.scope_metrics);
                metrics.extend(scopes.flat_map(|scope| scope.metrics).map(|metric| metric.name));
            }
        }
    }
    let mut names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["barrier", "step"], "our spans, and not the transport's");
    let find = |name: &str| spans.iter().find(|span| span.name == name).expect("seen");
    let (step, barrier) = (find("step"), find("barrier"));
    assert_eq!(attribute(&step.attributes, "step"), Some(Value::IntValue(7)));
    assert_eq!(barrier.trace_id, step.trace_id);
    assert_eq!(barrier.parent_span_id, step.span_id);
    metrics.sort_unstable();
    assert_eq!(
        metrics,
        [
            "tarazed.checkpoint.durability_lag",
            "tarazed.checkpoint.duration",
            "tarazed.grad_norm",
            "tarazed.loss",
            "tarazed.recovery.duration",
            "tarazed.step",
            "tarazed.step.duration",
            "tarazed.throughput",
        ]
    );
}

/// How far durability lags is told in a stall, too, when no step is committed; and a checkpoint whose time is not known has none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_sees_the_lag_without_a_step() {
    let collector = Collector::start();
    let (_dispatch, telemetry) = telemetry::build(&settings(collector.endpoint().to_owned(), 0)).expect("built");
    telemetry.metrics().durability_lag(3.0);
    telemetry.metrics().durability_lag(7.5);
    telemetry.metrics().checkpoint(0.0);
    tokio::task::spawn_blocking(|| telemetry.shutdown())
        .await
        .expect("flushed");
    let mut last = None;
    for export in collector.take() {
        let Export::Metrics(request) = export else { continue };
        let scopes = request.resource_metrics.into_iter().flat_map(|sent| sent.scope_metrics);
        for metric in scopes.flat_map(|scope| scope.metrics) {
            assert_eq!(metric.name, "tarazed.checkpoint.durability_lag");
            let Some(metric::Data::Gauge(gauge)) = metric.data else {
                panic!("no gauge")
            };
            last = gauge.data_points.into_iter().next_back().and_then(|point| point.value);
        }
    }
    assert_eq!(last, Some(number_data_point::Value::AsDouble(7.5)));
}

/// Neither a dead port nor a server that accepts and says nothing holds up the run or its end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_collector_never_blocks() {
    let dead = {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        listener.local_addr().expect("an address")
    };
    let mute = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    for address in [dead, mute.local_addr().expect("an address")] {
        let (dispatch, telemetry) = telemetry::build(&settings(format!("http://{address}"), 0)).expect("built");
        let start = Instant::now();
        tracing::dispatcher::with_default(&dispatch, || {
            for step in 0..20_000 {
                tracing::info_span!(target: "tarazed_train::step", "step", step).in_scope(|| ());
            }
        });
        telemetry.metrics().recovery(1.0);
        tokio::task::spawn_blocking(|| telemetry.shutdown())
            .await
            .expect("ended");
        // 20,000 spans take milliseconds; the bound is for a loaded machine, and far below any hang.
        let limit = Duration::from_millis(FLUSH_TIMEOUT_MS) + Duration::from_secs(20);
        assert!(start.elapsed() < limit, "{address}: {:?}", start.elapsed());
    }
}

#[test]
fn an_endpoint_that_cannot_be_one_is_refused() {
    for bad in ["localhost:4317", "http://", "http://a b", "ftp://host"] {
        let refused = telemetry::build(&settings(bad.to_owned(), 0))
            .map(|_| ())
            .expect_err(bad);
        assert_eq!(refused.exit.code(), 2, "{bad}");
        assert!(refused.message.starts_with("telemetry.otlp_endpoint: "), "{refused}");
    }
    let secure = telemetry::build(&settings("https://127.0.0.1:4317".to_owned(), 0));
    assert!(secure.is_ok(), "TLS is built in: {:?}", secure.map(|_| ()).err());
}
