//! Many small worlds with failures ever more often: the points of the figure.
//!
//! A point's world is small, so that it takes a second; its rates are the published ones times whatever gives the wanted
//! time between failures. Causes keep their shares, hosts and switches their sizes. Spares are plenty: where failures come
//! each minute and a repair takes hours, the stock of spares would be all that one sees.

use super::cost::Cost;
use super::fleet::Layout;
use super::run;
use super::setup::{Protection, Setup};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Ranks of a point's world: 128 hosts behind 4 switches.
pub const SWEEP_RANKS: u32 = 1_024;
/// Failures of a point, about: its goodput is then good to a percent or so.
const SWEEP_FAULTS: f64 = 500.0;
/// Longest simulated time of a point.
const SWEEP_DAYS_MAX: f64 = 2_000.0;
/// Times between failures (seconds).
pub const SWEEP_MTBF_S: [f64; 11] = [
    100.0, 200.0, 400.0, 800.0, 1_827.0, 3_600.0, 7_200.0, 14_400.0, 28_800.0, 57_600.0, 115_200.0,
];
/// Threads that the sweep may use.
const SWEEP_THREADS: usize = 2;

const MS_PER_DAY: f64 = 86_400_000.0;

/// A way to protect the state, as the figure shows it.
#[derive(Clone, Copy, Debug)]
pub struct Series {
    /// For the legend.
    pub name: &'static str,
    /// It.
    pub protection: Protection,
    /// Whether the textbook's formula is about it.
    pub has_formula: bool,
}

/// All ways that are compared.
pub const SERIES: [Series; 4] = [
    Series {
        name: "checkpoint and restart, 60 s standstill",
        protection: Protection {
            replicas: 1,
            layout: Layout::Packed,
            snapshot_ms: 60_000,
            upload_ms: 0,
        },
        has_formula: true,
    },
    Series {
        name: "checkpoint and restart, 0.5 s standstill, 30 s upload",
        protection: Protection {
            replicas: 1,
            layout: Layout::Packed,
            snapshot_ms: 500,
            upload_ms: 30_000,
        },
        has_formula: true,
    },
    Series {
        name: "two live copies, neighbours share a host",
        protection: Protection {
            replicas: 2,
            layout: Layout::Packed,
            snapshot_ms: 500,
            upload_ms: 30_000,
        },
        has_formula: false,
    },
    Series {
        name: "two live copies, neighbours on different hosts",
        protection: Protection {
            replicas: 2,
            layout: Layout::Striped,
            snapshot_ms: 500,
            upload_ms: 30_000,
        },
        has_formula: false,
    },
];

/// One simulated point.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Point {
    /// Place in [`SERIES`].
    pub series: usize,
    /// Expected time between failures (seconds).
    pub mtbf_s: f64,
    /// What came of it.
    pub goodput: f64,
}

/// The world of a point.
#[must_use]
pub fn setup_of(seed: u64, series: usize, mtbf_s: f64, cost: &Cost) -> Setup {
    let days = (mtbf_s * SWEEP_FAULTS / 86_400.0).min(SWEEP_DAYS_MAX);
    let mut setup = Setup::new(SWEEP_RANKS, (days * MS_PER_DAY) as u64, seed);
    setup.rate_factor = Cost::mtbf_ms(SWEEP_RANKS, 1.0) / (mtbf_s * 1e3);
    setup.protection = SERIES[series].protection;
    setup.cost = cost.clone();
    setup.spare_hosts = 2 * SWEEP_RANKS;
    setup
}

/// All points, on some threads.
///
/// # Errors
/// What went wrong in one of them.
pub fn sweep(seed: u64, cost: &Cost) -> Result<Vec<Point>, String> {
    let wanted: Vec<(usize, f64)> = (0..SERIES.len())
        .flat_map(|series| SWEEP_MTBF_S.map(|mtbf_s| (series, mtbf_s)))
        .collect();
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Ok(Vec::new())));
    let work = || {
        while let Some(&(series, mtbf_s)) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
            let report = run(setup_of(seed, series, mtbf_s, cost)).and_then(|report| match &report.failure {
                Some(failure) => Err(format!("{} at {mtbf_s} s: {failure}", SERIES[series].name)),
                None => Ok(Point {
                    series,
                    mtbf_s,
                    goodput: report.goodput(),
                }),
            });
            let mut found = found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            match (&mut *found, report) {
                (Ok(points), Ok(point)) => points.push(point),
                (Ok(_), Err(error)) => *found = Err(error),
                (Err(_), _) => {}
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..SWEEP_THREADS {
            scope.spawn(work);
        }
    });
    let mut points: Vec<Point> = found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)?;
    // Threads finish in any order; the figure's text must not show it.
    points.sort_by(|a, b| {
        (a.series, a.mtbf_s)
            .partial_cmp(&(b.series, b.mtbf_s))
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    Ok(points)
}
