//! The others' side: `tests/bench/store_peers.py`, which stores or fetches when told to.

use anyhow::Result;
use serde::Deserialize;
use std::path::Path;
use std::process::Command;
use tarazed_tests::peer::Peer;

/// Bytes of a part, as ours has them.
const PART_BYTES: u64 = tarazed_store::limits::PART_BYTES;

/// Another tool, at the same place.
pub struct Other {
    peer: Peer,
    version: String,
    is_dcp: bool,
}

#[derive(Deserialize)]
struct Ready {
    version: String,
}

/// What one command took.
#[derive(Deserialize)]
pub struct Answer {
    pub seconds: f64,
    /// How long the caller of a save in the background waits.
    pub stall: Option<f64>,
}

impl Other {
    pub fn start(python: &Path, inputs: &Path, store: &str, shards: u32) -> Result<Self> {
        let is_dcp = !store.starts_with("s3://");
        let name = if is_dcp { "dcp" } else { "boto3" };
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/store_peers.py");
        let mut command = Command::new(python);
        command.arg(script).arg(name).arg(inputs);
        match is_dcp {
            true => command.arg(Path::new(store).join("peer")),
            false => command.arg(store).arg(PART_BYTES.to_string()),
        };
        let mut peer = Peer::start(name, command.arg(shards.to_string()))?;
        let Ready { version } = peer.answer()?;
        Ok(Self { peer, version, is_dcp })
    }

    pub fn version(&self) -> &str {
        &self.version
    }

    /// Whether it can save in the background.
    pub const fn has_background(&self) -> bool {
        self.is_dcp
    }

    pub fn run(&mut self, command: &str, name: usize) -> Result<Answer> {
        self.peer.ask(&format!("{command} {name}"))
    }
}
