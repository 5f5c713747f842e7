//! What a collector sees of a run: the spans of its steps, its checkpoints and its recoveries, and its metrics.

use crate::common::assert_undisturbed;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::Span;
use std::collections::{BTreeMap, BTreeSet};
use tarazed_tests::harness::{Collector, Export, Project, Run};

const STEPS: u64 = 120;

#[derive(Default)]
struct Seen {
    /// By process: `controller`, `worker-0`, ….
    spans: BTreeMap<String, Vec<Span>>,
    metrics: BTreeSet<String>,
}

/// What a collector of OTLP/gRPC got, by process and name.
fn seen(exports: Vec<Export>) -> Seen {
    let mut seen = Seen::default();
    for export in exports {
        match export {
            Export::Spans(request) => {
                for sent in request.resource_spans {
                    let resource = sent.resource.unwrap_or_default();
                    let Some(Value::StringValue(process)) = attribute(&resource.attributes, "tarazed.process") else {
                        panic!("spans of an unnamed process: {resource:?}");
                    };
                    let spans = sent.scope_spans.into_iter().flat_map(|scope| scope.spans);
                    seen.spans.entry(process).or_default().extend(spans);
                }
            }
            Export::Metrics(request) => {
                let sent = request.resource_metrics.into_iter();
                let metrics = sent.flat_map(|sent| sent.scope_metrics).flat_map(|scope| scope.metrics);
                seen.metrics.extend(metrics.map(|metric| metric.name));
            }
        }
    }
    seen
}

fn attribute(attributes: &[KeyValue], key: &str) -> Option<Value> {
    let found = attributes.iter().find(|attribute| attribute.key == key)?;
    found.value.clone()?.value
}

/// A number; unsigned ones of 64 bits come as text.
fn number(span: &Span, key: &str) -> Option<u64> {
    match attribute(&span.attributes, key)? {
        Value::IntValue(number) => u64::try_from(number).ok(),
        Value::StringValue(text) => text.parse().ok(),
        _ => None,
    }
}

fn named<'a>(spans: &'a [Span], name: &'a str) -> impl Iterator<Item = &'a Span> {
    spans.iter().filter(move |span| span.name == name)
}

/// Fails unless some span of this name lies within one of the name `parent`.
#[track_caller]
fn assert_within(spans: &[Span], name: &str, parent: &str) {
    let within = named(spans, name).any(|span| named(spans, parent).any(|p| p.span_id == span.parent_span_id));
    let names: BTreeSet<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    assert!(within, "no '{name}' within a '{parent}'; seen: {names:?}");
}

/// A run that loses a rank shows the phases of its steps, its checkpoints from snapshot to commit, and its recovery from
/// the loss to the first line after it; and the trace is the one of a run that nobody watches.
#[test]
fn a_collector_sees_steps_checkpoints_and_a_recovery() {
    let collector = Collector::start();
    let endpoint = collector.endpoint();
    let project = Project::tiny_with(&[("telemetry.otlp_endpoint", &format!("\"{endpoint}\""))]);
    let mut run = Run::start(&project.train("watched").ranks(2).steps(STEPS));
    run.wait_for_step(10);
    run.wait_for("a rank to kill", |run| run.kill_rank(1));
    assert_undisturbed(&mut run, STEPS, "watched by a collector");
    let recovered = run.events("recovered");
    assert_eq!(recovered.len(), 1, "{}", run.tail());
    for field in ["detection_ms", "recovery_ms", "steps_lost", "rank", "worker"] {
        assert!(recovered[0][field].is_u64(), "{field}: {}", recovered[0]);
    }

    let seen = seen(collector.take());
    let controller = &seen.spans["controller"];
    let survivor = &seen.spans["worker-0"];
    for phase in ["compute", "reduce", "forward", "barrier", "update", "gather"] {
        assert_within(survivor, phase, "step");
    }
    let steps: BTreeSet<u64> = named(survivor, "step")
        .filter_map(|span| number(span, "step"))
        .collect();
    assert!(steps.contains(&STEPS), "every process flushes at its end: {steps:?}");
    for name in ["snapshot", "upload", "begin"] {
        assert!(named(survivor, name).next().is_some(), "no '{name}' of worker 0");
    }
    assert!(named(survivor, "begin").count() >= 2, "one for each generation");
    assert!(named(controller, "commit").next().is_some(), "no 'commit'");
    let [recovery] = named(controller, "recovery").collect::<Vec<_>>()[..] else {
        panic!("not one recovery: {controller:?}");
    };
    assert_eq!(
        (number(recovery, "worker"), number(recovery, "steps_lost")),
        (Some(1), Some(0))
    );
    let lasted_ms = recovery
        .end_time_unix_nano
        .saturating_sub(recovery.start_time_unix_nano)
        / 1_000_000;
    // Two clocks, so to the millisecond they may differ.
    assert!(
        lasted_ms + 10 >= recovered[0]["recovery_ms"].as_u64().expect("a number"),
        "{lasted_ms} ms, and the event says {}",
        recovered[0]
    );
    let metrics: Vec<&str> = seen.metrics.iter().map(String::as_str).collect();
    assert_eq!(
        metrics,
        [
            "tarazed.bits_per_byte",
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
