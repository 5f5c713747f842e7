//! Simulator, fault injection and verifiers (floor 5).
