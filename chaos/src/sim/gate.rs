//! A process that is stopped and goes on again: SIGSTOP and SIGCONT.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Notify;

/// What everything that a process does passes. While it is closed nothing comes in, no time passes inside, and what was
/// under way waits for its next move.
#[derive(Default)]
pub struct Gate {
    closed: AtomicBool,
    opened: Notify,
}

impl Gate {
    /// Whether the process stands still.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Closes it for a while; false if it is closed already.
    pub fn close_for(self: &Arc<Self>, time: Duration, opened: impl FnOnce() + Send + 'static) -> bool {
        if self.closed.swap(true, Ordering::Relaxed) {
            return false;
        }
        let me = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(time).await;
            me.closed.store(false, Ordering::Relaxed);
            opened();
            me.opened.notify_waiters();
        });
        true
    }

    /// Waits while it is closed; says whether it was.
    pub async fn passed(&self) -> bool {
        let mut waited = false;
        loop {
            let opened = self.opened.notified();
            if !self.is_closed() {
                return waited;
            }
            waited = true;
            opened.await;
        }
    }
}
