//! Writing to a terminal that may stand still (Ctrl-S, a paused pager, a pipe that nobody reads) without waiting for it.
//!
//! An [`Outlet`] is a thread that writes, behind a bounded queue. Whoever has something to say never blocks; when the
//! queue is full the oldest item that may be missed gives way, then the oldest of all, and the writer is told how many.
//! [`last_words`] is for what is said outside of any queue, before a process ends.
//!
//! Deliberately absent: a wait without a bound. What a terminal misses, the files of the run folder hold.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Items that wait in one outlet at most.
pub const ITEMS_WAITING_MAX: usize = 256;
/// Longest wait at the end for a terminal to take what waits, in milliseconds.
pub const DRAIN_TIMEOUT_MS: u64 = 1_000;
/// Longest wait for standard error to take a last message, in milliseconds.
const LAST_WORDS_TIMEOUT_MS: u64 = 1_000;

/// A thread that writes what is put into its queue. Dropping it ends the thread once the queue is empty.
#[derive(Debug)]
pub struct Outlet<T> {
    queue: Arc<Queue<T>>,
}

/// Where items are put; cheap to clone.
#[derive(Debug)]
pub struct Feed<T> {
    queue: Arc<Queue<T>>,
}

impl<T> Clone for Feed<T> {
    fn clone(&self) -> Self {
        Self {
            queue: Arc::clone(&self.queue),
        }
    }
}

#[derive(Debug)]
struct Queue<T> {
    /// Whether an item may be missed.
    expendable: fn(&T) -> bool,
    waiting: Mutex<Waiting<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct Waiting<T> {
    items: VecDeque<T>,
    /// Items dropped since the writer was last told, but for those that may be missed.
    dropped: u64,
    /// The writer has taken an item and is not done with it.
    writing: bool,
    closed: bool,
}

impl<T: Send + 'static> Outlet<T> {
    /// Starts the thread `name`. `write` gets each item, and how many were dropped since the one before; `expendable`
    /// says which items give way first and uncounted.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(
        name: &str,
        expendable: fn(&T) -> bool,
        mut write: impl FnMut(u64, T) + Send + 'static,
    ) -> std::io::Result<Self> {
        let queue = Arc::new(Queue {
            expendable,
            waiting: Mutex::new(Waiting {
                items: VecDeque::new(),
                dropped: 0,
                writing: false,
                closed: false,
            }),
            changed: Condvar::new(),
        });
        let outlet = Self {
            queue: Arc::clone(&queue),
        };
        let run = move || {
            while let Some((dropped, item)) = queue.take() {
                write(dropped, item);
            }
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(run)?;
        Ok(outlet)
    }

    /// Where items are put.
    #[must_use]
    pub fn feed(&self) -> Feed<T> {
        Feed {
            queue: Arc::clone(&self.queue),
        }
    }

    /// Waits until everything is written, `timeout` at most; whether it is.
    #[must_use]
    pub fn drain(&self, timeout: Duration) -> bool {
        let busy = |waiting: &mut Waiting<T>| waiting.writing || !waiting.items.is_empty();
        let waited = self
            .queue
            .changed
            .wait_timeout_while(self.queue.lock(), timeout, busy)
            .unwrap_or_else(PoisonError::into_inner);
        !waited.1.timed_out()
    }
}

impl<T> Drop for Outlet<T> {
    fn drop(&mut self) {
        self.queue.lock().closed = true;
        self.queue.changed.notify_all();
    }
}

impl<T> Feed<T> {
    /// Queues an item; never blocks. After the end it is forgotten: nobody writes it any more.
    pub fn put(&self, item: T) {
        let mut waiting = self.queue.lock();
        if waiting.closed {
            return;
        }
        if waiting.items.len() >= ITEMS_WAITING_MAX {
            let expendable = waiting.items.iter().position(self.queue.expendable);
            waiting.items.remove(expendable.unwrap_or(0));
            waiting.dropped += u64::from(expendable.is_none());
        }
        waiting.items.push_back(item);
        self.queue.changed.notify_all();
    }
}

impl<T> Queue<T> {
    fn lock(&self) -> MutexGuard<'_, Waiting<T>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The writer's next item, and how many were dropped before it; none at the end.
    fn take(&self) -> Option<(u64, T)> {
        let mut waiting = self.lock();
        waiting.writing = false;
        self.changed.notify_all();
        loop {
            if let Some(item) = waiting.items.pop_front() {
                waiting.writing = true;
                return Some((std::mem::take(&mut waiting.dropped), item));
            }
            if waiting.closed {
                return None;
            }
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Writes a line to standard error, and goes on without it after [`LAST_WORDS_TIMEOUT_MS`]: a terminal that stands still
/// must not keep a process from ending with its exit code.
pub fn last_words(line: &str) {
    let line = format!("{line}\n");
    let (done, said) = std::sync::mpsc::channel();
    let text = line.clone();
    let say = move || {
        // Where standard error is gone, nobody is there to be told.
        let _ = std::io::stderr().write_all(text.as_bytes());
        let _ = done.send(());
    };
    match std::thread::Builder::new().name("last-words".to_owned()).spawn(say) {
        Ok(_) => {
            // Too late is as good as said: the caller goes on either way.
            let _ = said.recv_timeout(Duration::from_millis(LAST_WORDS_TIMEOUT_MS));
        }
        Err(_) => {
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// An outlet whose writer stands still until it is let go; even numbers may be missed.
    fn stuck() -> (Outlet<u64>, Receiver<(u64, u64)>, Sender<()>, Receiver<()>) {
        let (go, gate) = channel::<()>();
        let (began, beginnings) = channel();
        let (written, writings) = channel();
        let write = move |dropped, item| {
            // Errors mean that the test is over.
            let _ = began.send(());
            let _ = gate.recv();
            let _ = written.send((dropped, item));
        };
        let outlet = Outlet::start("stuck", |item| item % 2 == 0, write).expect("a thread");
        (outlet, writings, go, beginnings)
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_terminal_that_stands_still_holds_up_nobody_and_misses_the_expendable_first() {
        let (outlet, writings, go, beginnings) = stuck();
        let feed = outlet.feed();
        feed.put(0);
        beginnings.recv_timeout(LONG).expect("it is being written");
        // Ten items that must be shown between many that may be missed; all of it returns at once.
        for item in 1..=10 {
            feed.put(2 * item - 1);
            for _ in 0..ITEMS_WAITING_MAX {
                feed.put(2 * item);
            }
        }
        assert_eq!(outlet.queue.lock().items.len(), ITEMS_WAITING_MAX);
        assert!(!outlet.drain(Duration::from_millis(1)), "nothing could be written");
        drop(go); // the terminal goes on
        assert!(outlet.drain(LONG));
        let written: Vec<(u64, u64)> = writings.try_iter().collect();
        let odd: Vec<u64> = written
            .iter()
            .map(|(_, item)| *item)
            .filter(|item| item % 2 == 1)
            .collect();
        assert_eq!(odd, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]);
        assert!(
            written.iter().all(|(dropped, _)| *dropped == 0),
            "only what may be missed"
        );
        assert_eq!(written.last(), Some(&(0, 20)), "the newest");
    }

    #[test]
    fn what_had_to_be_dropped_is_told() {
        let (outlet, writings, go, beginnings) = stuck();
        let feed = outlet.feed();
        feed.put(1);
        beginnings.recv_timeout(LONG).expect("it is being written");
        let count = ITEMS_WAITING_MAX as u64 + 3;
        (0..count).for_each(|item| feed.put(2 * item + 1));
        drop(go);
        assert!(outlet.drain(LONG));
        let written: Vec<(u64, u64)> = writings.try_iter().collect();
        assert_eq!(written[..2], [(0, 1), (3, 7)], "the oldest three are gone");
        assert_eq!(written.len(), 1 + ITEMS_WAITING_MAX);
    }

    #[test]
    fn dropping_it_ends_its_thread_after_what_waits() {
        let (written, writings) = channel();
        let write = move |_, item: u64| {
            let _ = written.send(item);
        };
        let outlet = Outlet::start("short", |_| false, write).expect("a thread");
        let feed = outlet.feed();
        (0..5).for_each(|item| feed.put(item));
        drop(outlet);
        feed.put(5); // nobody hears it
        assert_eq!(
            writings.iter().collect::<Vec<_>>(),
            [0, 1, 2, 3, 4],
            "the thread is gone"
        );
    }
}
