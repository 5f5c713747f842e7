//! The few numbers of a run that a dashboard follows, as OpenTelemetry instruments; each is free without a collector.

/// What one committed step reports.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct StepSample {
    /// Steps completed.
    pub step: u64,
    /// Time of the step, in milliseconds.
    pub step_ms: f64,
    /// Tokens per second of all ranks.
    pub tokens_per_s: f64,
    /// Training loss, in nats per token.
    pub loss: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// How long the oldest line has waited that no checkpoint covers, in seconds, where that is known.
    pub durability_lag_s: Option<f64>,
}

#[cfg(feature = "otlp")]
mod instruments {
    use super::StepSample;
    use opentelemetry::KeyValue;
    use opentelemetry::metrics::{Gauge, Histogram, Meter};
    use std::sync::Arc;
    use tarazed_protocol::data::signals::Signals;

    /// Upper bounds of the histograms' buckets, in milliseconds: from a quickstart's step to a restore of hours.
    const BOUNDS_MS: [f64; 15] = [
        5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 3e4, 1e5, 6e5, 3.6e6,
    ];

    #[derive(Debug)]
    struct Instruments {
        step: Gauge<u64>,
        step_ms: Histogram<f64>,
        tokens_per_s: Gauge<f64>,
        loss: Gauge<f64>,
        grad_norm: Gauge<f64>,
        noise_scale: Gauge<f64>,
        bits_per_byte: Gauge<f64>,
        recovery_ms: Histogram<f64>,
        checkpoint_ms: Histogram<f64>,
        durability_lag_s: Gauge<f64>,
    }

    /// The instruments of one process.
    #[derive(Clone, Debug, Default)]
    pub struct Metrics(Option<Arc<Instruments>>);

    impl Metrics {
        pub(crate) fn over(meter: &Meter) -> Self {
            let histogram = |name: &'static str, text: &'static str| {
                let builder = meter.f64_histogram(name).with_unit("ms").with_description(text);
                builder.with_boundaries(BOUNDS_MS.to_vec()).build()
            };
            let gauge = |name: &'static str, unit: &'static str, text: &'static str| {
                meter.f64_gauge(name).with_unit(unit).with_description(text).build()
            };
            Self(Some(Arc::new(Instruments {
                step: meter
                    .u64_gauge("tarazed.step")
                    .with_description("Steps completed")
                    .build(),
                step_ms: histogram("tarazed.step.duration", "Time of a step"),
                tokens_per_s: gauge("tarazed.throughput", "{token}/s", "Tokens per second of all ranks"),
                loss: gauge("tarazed.loss", "nat", "Training loss per token"),
                grad_norm: gauge("tarazed.grad_norm", "1", "Gradient norm before clipping"),
                noise_scale: gauge(
                    "tarazed.gradient_noise_scale",
                    "{token}",
                    "Simple gradient noise scale, smoothed",
                ),
                bits_per_byte: gauge(
                    "tarazed.bits_per_byte",
                    "bit/By",
                    "Loss per byte of text, by domain or language and by split; training smoothed, held out as last evaluated",
                ),
                recovery_ms: histogram("tarazed.recovery.duration", "From a failure to training again"),
                checkpoint_ms: histogram(
                    "tarazed.checkpoint.duration",
                    "From a rank's first word that it saves, before its snapshot, to the commit record",
                ),
                durability_lag_s: gauge(
                    "tarazed.checkpoint.durability_lag",
                    "s",
                    "How long the oldest step has waited that no checkpoint covers",
                ),
            })))
        }

        /// A committed step.
        pub fn step(&self, sample: &StepSample) {
            let Some(instruments) = &self.0 else { return };
            instruments.step.record(sample.step, &[]);
            instruments.step_ms.record(sample.step_ms, &[]);
            instruments.tokens_per_s.record(sample.tokens_per_s, &[]);
            instruments.loss.record(sample.loss, &[]);
            instruments.grad_norm.record(sample.grad_norm, &[]);
            if let Some(lag_s) = sample.durability_lag_s {
                instruments.durability_lag_s.record(lag_s, &[]);
            }
        }

        /// How long the oldest line has waited that no checkpoint covers, in seconds: also where no step is committed.
        pub fn durability_lag(&self, lag_s: f64) {
            if let Some(instruments) = &self.0 {
                instruments.durability_lag_s.record(lag_s, &[]);
            }
        }

        /// What the closed loop saw in a committed step; what is not known is not reported.
        pub fn signals(&self, signals: &Signals) {
            let Some(instruments) = &self.0 else { return };
            if let Some(scale) = signals.gradient_noise.and_then(|noise| noise.scale_tokens) {
                instruments.noise_scale.record(scale, &[]);
            }
            let record = |of: &'static str, name: &str, split: &'static str, value: Option<f64>| {
                if let Some(value) = value {
                    let attributes = [KeyValue::new(of, name.to_owned()), KeyValue::new("split", split)];
                    instruments.bits_per_byte.record(value, &attributes);
                }
            };
            for domain in &signals.domains {
                record("domain", &domain.name, "train", domain.train_bits_per_byte);
                record("domain", &domain.name, "heldout", domain.heldout_bits_per_byte);
            }
            for language in &signals.languages {
                let name = language.language.name();
                record("language", name, "heldout", language.heldout_bits_per_byte);
            }
        }

        /// A recovery, in milliseconds.
        pub fn recovery(&self, recovery_ms: f64) {
            if let Some(instruments) = &self.0 {
                instruments.recovery_ms.record(recovery_ms, &[]);
            }
        }

        /// A committed checkpoint, in milliseconds; 0 where it is not known, which is not reported.
        pub fn checkpoint(&self, checkpoint_ms: f64) {
            if let Some(instruments) = self.0.as_ref().filter(|_| checkpoint_ms > 0.0) {
                instruments.checkpoint_ms.record(checkpoint_ms, &[]);
            }
        }
    }
}

#[cfg(not(feature = "otlp"))]
mod instruments {
    use super::StepSample;
    use tarazed_protocol::data::signals::Signals;

    /// No instruments: built without the feature `otlp`.
    #[derive(Clone, Debug, Default)]
    pub struct Metrics;

    impl Metrics {
        /// A committed step.
        pub const fn step(&self, _: &StepSample) {}
        /// How long the oldest line has waited that no checkpoint covers, in seconds.
        pub const fn durability_lag(&self, _: f64) {}
        /// What the closed loop saw in a committed step.
        pub const fn signals(&self, _: &Signals) {}
        /// A recovery, in milliseconds.
        pub const fn recovery(&self, _: f64) {}
        /// A committed checkpoint, in milliseconds.
        pub const fn checkpoint(&self, _: f64) {}
    }
}

pub use instruments::Metrics;
