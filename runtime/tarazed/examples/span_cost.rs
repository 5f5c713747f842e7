//! What a span costs a rank that exports none: the mean of a million, under the very subscriber that a rank has.
//!
//! `cargo run --release -p tarazed --example span_cost`; docs/BENCHMARKS.md says what it gave.

use std::hint::black_box;
use std::time::Instant;
use tarazed::telemetry::{Role, Settings, build};
use tarazed_domain::{Incarnation, WorkerId};

const SPANS: u32 = 1_000_000;

fn main() {
    let settings = Settings {
        role: Role::Rank(WorkerId(0), Incarnation(0)),
        run: "span-cost".to_owned(),
        endpoint: None,
        log_file: None,
    };
    let (dispatch, _telemetry) = match build(&settings) {
        Ok(built) => built,
        Err(failure) => panic!("{failure:?}"),
    };
    tracing::dispatcher::with_default(&dispatch, || {
        let began = Instant::now();
        for step in 0..SPANS {
            let _span = tracing::info_span!("compute", step = black_box(step)).entered();
        }
        let mean_ns = began.elapsed().as_nanos() as f64 / f64::from(SPANS);
        println!("{mean_ns:.0} ns for a span that nobody exports");
    });
}
