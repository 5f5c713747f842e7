//! Floor 5, to come: a simulator that runs the pure machines of `tarazed-protocol` in virtual time, fault injection on real
//! processes, and verifiers of traces and buckets.
//!
//! There is nothing in it yet; the crate holds the floor. Until it comes, the machines are tested beside their code
//! (`runtime/protocol/src/coordinator/tests.rs`), real processes are killed, stopped and cut off in
//! `tests/tests/end_to_end/`, traces are compared by `tarazed trace diff`, and stores are checked by
//! `tarazed checkpoint verify`.
