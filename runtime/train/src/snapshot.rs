//! Snapshots between updates (DESIGN.md section 7).
//!
//! The state is immutable between updates, so a snapshot copies while the next forward and backward run. A ticket is drawn
//! on the device thread before it goes on, and the next update waits until every ticket is given back: the copy is of
//! exactly the step it is named after, however late its thread was scheduled.

use crate::waiting::Waiting;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// Between two looks at a gate that nobody announced to be open.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Counts snapshots that still copy.
#[derive(Debug, Default)]
pub struct SnapshotGate {
    copying: Mutex<usize>,
    done: Condvar,
    waiting: Waiting,
}

/// A checkpoint of this rank from its first snapshot to the end of its last upload: it lasts as long as somebody holds it.
/// Each of its shards does, until it is stored or given up.
#[derive(Debug)]
pub struct UploadTicket(());

/// Checkpoints of one rank whose upload is under way.
#[derive(Debug, Default)]
pub struct Uploads(Vec<Weak<UploadTicket>>);

impl Uploads {
    /// One more.
    #[must_use]
    pub fn begin(&mut self) -> Arc<UploadTicket> {
        let ticket = Arc::new(UploadTicket(()));
        self.0.push(Arc::downgrade(&ticket));
        ticket
    }

    /// How many there are.
    pub fn count(&mut self) -> usize {
        self.0.retain(|upload| upload.strong_count() > 0);
        self.0.len()
    }
}

/// One shard's snapshot under way; ends when dropped, however its copying ends.
#[derive(Debug)]
pub struct SnapshotTicket(Arc<SnapshotGate>);

impl SnapshotGate {
    /// An open gate, waited at in this way.
    #[must_use]
    pub fn new(waiting: Waiting) -> Self {
        Self {
            waiting,
            ..Self::default()
        }
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.copying.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces a snapshot before the update that it must precede.
    #[must_use]
    pub fn ticket(self: &Arc<Self>) -> SnapshotTicket {
        *self.lock() += 1;
        SnapshotTicket(Arc::clone(self))
    }

    /// Waits until no snapshot copies. Bounded by the copy of one rank's shards in memory.
    pub fn wait(&self) {
        let mut copying = self.lock();
        while *copying > 0 {
            copying = self
                .waiting
                .until_changed(&self.done, || self.lock(), copying, LOOK_AGAIN);
        }
    }
}

impl Drop for SnapshotTicket {
    fn drop(&mut self) {
        *self.0.lock() -= 1;
        self.0.done.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::Uploads;
    use std::sync::Arc;

    #[test]
    fn an_upload_is_under_way_until_the_last_of_its_shards_is_done() {
        let mut uploads = Uploads::default();
        let shards = vec![uploads.begin(); 3];
        let other = uploads.begin();
        assert_eq!(uploads.count(), 2);
        drop(other);
        let last = Arc::clone(&shards[2]);
        drop(shards);
        assert_eq!(uploads.count(), 1);
        drop(last);
        assert_eq!(uploads.count(), 0);
    }
}
