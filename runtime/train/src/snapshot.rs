//! Snapshots between updates (DESIGN.md section 7).
//!
//! The state is immutable between updates, so a snapshot copies while the next forward and backward run. A ticket is drawn
//! on the device thread before it goes on, and the next update waits until every ticket is given back: the copy is of
//! exactly the step it is named after, however late its thread was scheduled.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Counts snapshots that still copy.
#[derive(Debug, Default)]
pub struct SnapshotGate {
    copying: Mutex<usize>,
    done: Condvar,
}

/// One shard's snapshot under way; ends when dropped, however its copying ends.
#[derive(Debug)]
pub struct SnapshotTicket(Arc<SnapshotGate>);

impl SnapshotGate {
    /// Announces a snapshot before the update that it must precede.
    #[must_use]
    pub fn ticket(self: &Arc<Self>) -> SnapshotTicket {
        *self.copying.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        SnapshotTicket(Arc::clone(self))
    }

    /// Waits until no snapshot copies. Bounded by the copy of one rank's shards in memory.
    pub fn wait(&self) {
        let mut copying = self.copying.lock().unwrap_or_else(PoisonError::into_inner);
        while *copying > 0 {
            copying = self.done.wait(copying).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for SnapshotTicket {
    fn drop(&mut self) {
        *self.0.copying.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.done.notify_all();
    }
}
