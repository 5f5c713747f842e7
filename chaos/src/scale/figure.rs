//! Goodput against the time between failures: simulated points, the textbook's curves, and points measured on real runs.

use super::report::Report;
use super::setup::Setup;
use std::path::Path;

pub struct Point;
pub struct Measured;
pub fn read_measured(_: &Path) -> Result<Vec<Measured>, String> { Ok(vec![]) }
pub fn sweep(_: &Setup) -> Result<Vec<Point>, String> { Ok(vec![]) }
pub fn draw(_: &Setup, _: &Report, _: &[Point], _: &[Measured]) -> String { String::new() }
