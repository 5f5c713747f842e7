//! Every decoder that takes bytes from outside, given any bytes.
//!
//! One module for each target: `run` gives it bytes and asserts what must hold whatever they are; `seeds` makes good inputs
//! with the real encoders, so that no blob is kept. Where a checksum or MAC stands before the contents, `run` also gives the
//! decoder the same bytes under a right one: a fuzzer would never guess it, and what lies behind must hold as well.
//!
//! - Nothing panics, overflows (checks are on) or asks for memory beyond the limit that `chaos/fuzz/run` sets.
//! - What is believed is written again as it was read.
//! - What the data plane refuses is counted, once.

pub mod control;
pub mod files;
pub mod network;
pub mod stored;

pub use control::message;
#[cfg(feature = "all")]
pub use control::status_request;
pub use files::{config, trace_line};
#[cfg(feature = "all")]
pub use files::{data_manifest, hugging_face, token_shard};
#[cfg(feature = "all")]
pub use network::{envelope, link_handshake};
pub use network::{frame, handshake};
pub use stored::{manifest, record, shard_header};

use std::path::Path;

/// Names the folder that a target writes its seeds into, instead of running.
const SEEDS_VARIABLE: &str = "TARAZED_FUZZ_SEEDS";

/// What each target does first.
///
/// # Panics
/// If the seeds cannot be written.
pub fn begin(seeds: &dyn Fn() -> Vec<Vec<u8>>) {
    let Some(folder) = std::env::var_os(SEEDS_VARIABLE) else {
        return;
    };
    for (index, seed) in seeds().iter().enumerate() {
        std::fs::write(Path::new(&folder).join(format!("seed-{index}")), seed).expect("a seed is written");
    }
    std::process::exit(0);
}
