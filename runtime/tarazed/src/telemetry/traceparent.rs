//! Carrying a span's identity in a message: W3C Trace Context, header `traceparent`.
//!
//! The actor layer does not carry it across processes by itself, so a message that should continue a span has a field for
//! it. The functions take and give text, so that crates below this one need no telemetry dependency: they can be handed
//! over as plain function pointers.

use tracing::Span;

/// `traceparent` of the current span; `None` where nothing is exported.
#[must_use]
pub fn current() -> Option<String> {
    of(&Span::current())
}

#[cfg(feature = "otlp")]
mod context {
    use opentelemetry::Context;
    use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
    use tracing::Span;
    use tracing_opentelemetry::OpenTelemetrySpanExt;

    /// `traceparent` of `span`; `None` where it is not exported.
    #[must_use]
    pub fn of(span: &Span) -> Option<String> {
        let context = span.context();
        let span = context.span();
        let identity = span.span_context();
        identity.is_valid().then(|| {
            let (trace, span, flags) = (identity.trace_id(), identity.span_id(), identity.trace_flags());
            format!("00-{trace}-{span}-{flags:02x}")
        })
    }

    /// Makes `span` a child of the span that `traceparent` names; `false` where it names none, or the span has begun
    /// under another parent. Must be called before the span is entered.
    #[must_use]
    pub fn adopt(span: &Span, traceparent: &str) -> bool {
        parse(traceparent).is_some_and(|parent| {
            let context = Context::new().with_remote_span_context(parent);
            span.set_parent(context).is_ok()
        })
    }

    /// Reads version 00, and of later versions the part they share with it.
    fn parse(text: &str) -> Option<SpanContext> {
        let mut fields = text.split('-');
        let (version, trace, span, flags) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let hex = |field: &str, len: usize| {
            field.len() == len && field.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        };
        let known = hex(version, 2) && version != "ff" && (version != "00" || fields.next().is_none());
        if !(known && hex(trace, 32) && hex(span, 16) && hex(flags, 2)) {
            return None;
        }
        let context = SpanContext::new(
            TraceId::from_hex(trace).ok()?,
            SpanId::from_hex(span).ok()?,
            TraceFlags::new(u8::from_str_radix(flags, 16).ok()?),
            true,
            TraceState::default(),
        );
        context.is_valid().then_some(context)
    }

    #[cfg(test)]
    mod tests {
        use super::parse;

        const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

        #[test]
        fn only_well_formed_parents_are_taken() {
            let parent = parse(GOOD).expect("the standard's own example");
            assert!(parent.is_remote() && parent.is_sampled());
            assert_eq!(parent.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
            assert!(parse(&GOOD.replacen("00-", "01-", 1)).is_some(), "a later version");
            assert!(parse(&format!("{}-more", GOOD.replacen("00-", "01-", 1))).is_some());
            for bad in [
                "",
                "00",
                &GOOD.to_uppercase(),
                &GOOD.replacen("00-", "ff-", 1),
                &format!("{GOOD}-more"),
                &GOOD[..54],
                "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
                "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
                "00-4bf92f3577b34da6a3ce929d0e0e473é-00f067aa0ba902b-01",
            ] {
                assert!(parse(bad).is_none(), "{bad}");
            }
        }
    }
}

#[cfg(not(feature = "otlp"))]
mod context {
    use tracing::Span;

    /// Always `None`: built without the feature `otlp`.
    #[must_use]
    pub const fn of(_: &Span) -> Option<String> {
        None
    }

    /// Always `false`: built without the feature `otlp`.
    #[must_use]
    pub const fn adopt(_: &Span, _: &str) -> bool {
        false
    }
}

pub use context::{adopt, of};
