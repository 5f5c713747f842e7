//! What happened in a simulation, in order, as lines and as one hash: two runs of a seed must give the same.

use std::sync::{Arc, Mutex, PoisonError};
use tokio::time::Instant;

/// The record of one simulation; clones write to the same one.
#[derive(Clone)]
pub struct History(Arc<Mutex<Inner>>);

struct Inner {
    began: Instant,
    hasher: blake3::Hasher,
    events: u64,
    /// Kept only where a person wants to read them.
    lines: Option<Vec<String>>,
}

impl History {
    /// A record that begins now; `keep` for reading it afterwards.
    #[must_use]
    pub fn new(keep: bool) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            began: Instant::now(),
            hasher: blake3::Hasher::new(),
            events: 0,
            lines: keep.then(Vec::new),
        })))
    }

    fn with<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Virtual milliseconds since the beginning.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.with(|inner| inner.began.elapsed().as_millis() as u64)
    }

    /// Something happened.
    pub fn note(&self, what: &str) {
        self.with(|inner| {
            let now_us = inner.began.elapsed().as_micros() as u64;
            inner.events += 1;
            inner.hasher.update(&now_us.to_le_bytes());
            inner.hasher.update(what.as_bytes());
            inner.hasher.update(b"\n");
            if let Some(lines) = &mut inner.lines {
                lines.push(format!("{:>10.3} ms  {what}", now_us as f64 / 1e3));
            }
        });
    }

    /// Bytes moved: hashed, shown only by their length.
    pub fn bytes(&self, what: &str, bytes: &[u8]) {
        self.with(|inner| {
            let now_us = inner.began.elapsed().as_micros() as u64;
            inner.events += 1;
            inner.hasher.update(&now_us.to_le_bytes());
            inner.hasher.update(what.as_bytes());
            inner.hasher.update(bytes);
        });
    }

    /// Hash of everything so far, and how many events that was.
    #[must_use]
    pub fn digest(&self) -> (String, u64) {
        self.with(|inner| (inner.hasher.finalize().to_hex().to_string(), inner.events))
    }

    /// The lines, where they were kept.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.with(|inner| inner.lines.clone().unwrap_or_default())
    }
}

/// The first thing that happened and must never happen.
#[derive(Debug)]
pub struct Failure {
    history: History,
    first: Mutex<Option<String>>,
}

impl Failure {
    /// None yet.
    #[must_use]
    pub fn new(history: History) -> Arc<Self> {
        let first = Mutex::default();
        Arc::new(Self { history, first })
    }

    /// Something must never happen and has.
    pub fn set(&self, what: &str) {
        self.history.note(&format!("FAILURE: {what}"));
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| what.to_owned());
    }

    /// What went wrong first, if anything did.
    #[must_use]
    pub fn get(&self) -> Option<String> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl std::fmt::Debug for History {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("History")
    }
}
