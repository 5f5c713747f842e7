//! Counters that other threads read: progress for hang detection, refusals for diagnosis. No clock here: a watcher
//! samples twice and compares.

use std::sync::atomic::{AtomicU64, Ordering};

/// What one mesh has moved so far. Written by the device thread, read by any.
#[derive(Debug, Default)]
pub struct ProgressCounter {
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
    operations_started: AtomicU64,
    operations_completed: AtomicU64,
}

/// One reading of a [`ProgressCounter`]. The rank is inside an operation if more were started than completed; it hangs
/// there if two readings, far enough apart, are equal.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ProgressSample {
    /// Payload bytes handed to the transport.
    pub bytes_sent: u64,
    /// Payload bytes received.
    pub bytes_received: u64,
    /// Exchanges entered.
    pub operations_started: u64,
    /// Exchanges completed without error.
    pub operations_completed: u64,
}

impl ProgressCounter {
    /// Reads all counters. Relaxed: each is exact, the set is not one instant.
    #[must_use]
    pub fn sample(&self) -> ProgressSample {
        ProgressSample {
            bytes_sent: self.bytes_sent.load(Ordering::Relaxed),
            bytes_received: self.bytes_received.load(Ordering::Relaxed),
            operations_started: self.operations_started.load(Ordering::Relaxed),
            operations_completed: self.operations_completed.load(Ordering::Relaxed),
        }
    }

    /// Payload bytes were handed to the transport.
    pub fn sent(&self, bytes: usize) {
        self.bytes_sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Payload bytes came in.
    pub fn received(&self, bytes: usize) {
        self.bytes_received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// An operation began.
    pub fn started(&self) {
        self.operations_started.fetch_add(1, Ordering::Relaxed);
    }

    /// An operation came to its end.
    pub fn completed(&self) {
        self.operations_completed.fetch_add(1, Ordering::Relaxed);
    }
}

macro_rules! refusals {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Why something that came in was refused.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Refusal { $($(#[$doc])* $name,)* }

        impl Refusal {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];
        }
    };
}

refusals! {
    /// A connection of an older generation (SUP-2).
    StaleGeneration,
    /// A connection of a generation this rank has not heard of yet; its dialer tries again.
    FutureGeneration,
    /// A connection without the run's token.
    Unauthenticated,
    /// A connection that does not speak this protocol, or closed in the middle of the handshake.
    Garbage,
    /// A connection of another protocol version.
    Version,
    /// A connection meant for another rank, from a rank outside the roster, or with another roster.
    Roster,
    /// A connection that did not finish its handshake in time, or was pushed out by newer ones.
    Slow,
    /// A frame of another generation (SUP-2).
    FrameGeneration,
    /// A frame with wrong bytes: checksum, magic, fields, routing.
    FrameCorrupt,
    /// A frame repeated, or out of order.
    FrameSequence,
    /// A frame longer than the limit or than its message.
    FrameOversized,
    /// A frame with another tag or message length than the one due.
    FrameUnexpected,
}

/// How often each [`Refusal`] happened. One set per [`crate::Listener`], across its generations.
#[derive(Debug)]
pub struct RefusalCounters([AtomicU64; Refusal::ALL.len()]);

impl Default for RefusalCounters {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl RefusalCounters {
    /// How often this happened.
    #[must_use]
    pub fn get(&self, refusal: Refusal) -> u64 {
        self.0[refusal as usize].load(Ordering::Relaxed)
    }

    /// All refusals together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// What was refused so far, with its numbers; none where nothing was.
    #[must_use]
    pub fn told(&self) -> Option<String> {
        let counted = Refusal::ALL.iter().map(|refusal| (refusal, self.get(*refusal)));
        let told: Vec<String> = counted
            .filter(|(_, count)| *count > 0)
            .map(|(refusal, count)| format!("{refusal:?} {count}"))
            .collect();
        (!told.is_empty()).then(|| told.join(", "))
    }

    pub(crate) fn count(&self, refusal: Refusal) {
        self.0[refusal as usize].fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_refused_is_told_by_its_reason() {
        let refusals = RefusalCounters::default();
        assert_eq!(refusals.told(), None);
        refusals.count(Refusal::FrameCorrupt);
        refusals.count(Refusal::StaleGeneration);
        refusals.count(Refusal::FrameCorrupt);
        assert_eq!(refusals.told().as_deref(), Some("StaleGeneration 1, FrameCorrupt 2"));
        assert_eq!(refusals.total(), 3);
    }
}
