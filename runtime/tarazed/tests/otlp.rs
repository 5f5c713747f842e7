//! A real OTLP collector sees the spans and metrics of a run; one that is absent or mute costs nothing but them.
#![cfg(feature = "otlp")]

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{RecvStream, server};
use http::{HeaderMap, HeaderValue, Request, Response};
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use std::time::{Duration, Instant};
use tarazed::telemetry::{self, FLUSH_TIMEOUT_MS, Role, Settings, StepSample, traceparent};
use tarazed_domain::{Incarnation, WorkerId};
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// A gRPC message stands behind one byte (0: not compressed) and its length.
const PREFIX_BYTES: usize = 5;

enum Seen {
    Spans(ExportTraceServiceRequest),
    Metrics(ExportMetricsServiceRequest),
}

/// A collector on plain HTTP/2. A server out of `tonic` would do, but its features would be those of the tests alone: the
/// first `cargo run` and the tests would build most of the tree each for themselves.
async fn collector() -> (String, UnboundedReceiver<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (sender, seen) = unbounded_channel();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let sender = sender.clone();
            tokio::spawn(async move {
                let mut connection = server::handshake(socket).await.expect("HTTP/2");
                while let Some(Ok((request, respond))) = connection.accept().await {
                    tokio::spawn(answer(request, respond, sender.clone()));
                }
            });
        }
    });
    (format!("http://{address}"), seen)
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>, sender: UnboundedSender<Seen>) {
    let path = request.uri().path().to_owned();
    let mut body = request.into_body();
    let mut received = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.expect("a whole request");
        body.flow_control().release_capacity(data.len()).expect("credit");
        received.extend_from_slice(&data);
    }
    let (prefix, message) = received.split_at(PREFIX_BYTES);
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
    assert_eq!((prefix[0], length as usize), (0, message.len()), "one plain message");
    let seen = match path.as_str() {
        "/opentelemetry.proto.collector.trace.v1.TraceService/Export" => {
            Seen::Spans(Message::decode(message).expect("spans"))
        }
        "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export" => {
            Seen::Metrics(Message::decode(message).expect("metrics"))
        }
        other => panic!("{other} is no OTLP export"),
    };
    // An error means that the test is over.
    let _ = sender.send(seen);
    let head = Response::builder().header("content-type", "application/grpc");
    let mut stream = respond
        .send_response(head.body(()).expect("a response"), false)
        .expect("sent");
    stream
        .send_data(Bytes::from_static(&[0; PREFIX_BYTES]), false)
        .expect("an empty message");
    let trailers = HeaderMap::from_iter([(
        http::HeaderName::from_static("grpc-status"),
        HeaderValue::from_static("0"),
    )]);
    stream.send_trailers(trailers).expect("sent");
}

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

/// A step on one rank, and a recovery that another process began.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_sees_spans_metrics_and_who_sent_them() {
    let (endpoint, mut seen) = collector().await;
    let (dispatch, telemetry) = telemetry::build(&settings(endpoint, 3)).expect("built");
    assert!(telemetry.exports());
    let carried = tracing::dispatcher::with_default(&dispatch, || {
        let step = tracing::info_span!(target: "tarazed_train::step", "step", step = 7);
        let carried = step.in_scope(|| {
            tracing::info_span!(target: "h2::client", "not ours").in_scope(|| ());
            traceparent::current().expect("an exported span has an identity")
        });
        let child = tracing::info_span!(target: "tarazed_actors::recovery", "recovery");
        assert!(traceparent::adopt(&child, &carried));
        child.in_scope(|| ());
        carried
    });
    telemetry.metrics().step(&StepSample {
        step: 7,
        step_ms: 12.5,
        tokens_per_s: 9_000.0,
        loss: 5.25,
        grad_norm: 1.5,
    });
    telemetry.metrics().recovery(40.0);
    telemetry.metrics().checkpoint(80.0);
    tokio::task::spawn_blocking(|| telemetry.shutdown())
        .await
        .expect("flushed");

    let mut spans: Vec<Span> = Vec::new();
    let mut metrics: Vec<String> = Vec::new();
    while let Ok(request) = seen.try_recv() {
        match request {
            Seen::Spans(request) => {
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
            Seen::Metrics(request) => {
                let scopes = request.resource_metrics.into_iter().flat_map(|sent| sent.scope_metrics);
                metrics.extend(scopes.flat_map(|scope| scope.metrics).map(|metric| metric.name));
            }
        }
    }
    let mut names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["recovery", "step"], "our spans, and not the transport's");
    let find = |name: &str| spans.iter().find(|span| span.name == name).expect("seen");
    let (step, recovery) = (find("step"), find("recovery"));
    assert_eq!(attribute(&step.attributes, "step"), Some(Value::IntValue(7)));
    assert_eq!(recovery.trace_id, step.trace_id);
    assert_eq!(recovery.parent_span_id, step.span_id);
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    assert_eq!(carried, format!("00-{}-{}-01", hex(&step.trace_id), hex(&step.span_id)));
    metrics.sort_unstable();
    assert_eq!(
        metrics,
        [
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
