//! Conformance, parity, end to end and tidy tests (floor 6).
