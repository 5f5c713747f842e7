//! Conformance, parity, end to end and tidy tests (floor 6).

pub mod figures;
pub mod harness;
pub mod peer;
