//! Blocking code on the simulator's one thread.
//!
//! A rank's device thread blocks: on commands, on its peers, on the store. Here it is a coroutine with a stack of its own, a
//! future to the outside; where it would block, [`wait_for`] awaits a future and lets everything else run. So the
//! production code of the step and of a generation's start runs unchanged, in virtual time.

use generator::{Generator, Gn};
use std::cell::RefCell;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

/// Words of a coroutine's stack: two megabytes of address space, of which only what is touched is memory.
const STACK_WORDS: usize = 256 * 1024;

thread_local! {
    /// Wakes the coroutine that runs now.
    static WAKER: RefCell<Option<Waker>> = const { RefCell::new(None) };
}

/// Blocking code as a future. Dropping it unwinds its stack.
pub struct Coroutine {
    generator: Generator<'static, (), ()>,
    stuck: Arc<AtomicBool>,
}

impl Coroutine {
    /// Code that runs on a stack of its own. While `stuck` is set it gets no turn: a thread that hangs.
    pub fn new(stuck: Arc<AtomicBool>, work: impl FnOnce() + Send + 'static) -> Self {
        Self {
            generator: Gn::new_opt(STACK_WORDS, work),
            stuck,
        }
    }
}

impl Future for Coroutine {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.generator.is_done() {
            return Poll::Ready(());
        }
        if self.stuck.load(Ordering::Relaxed) {
            return Poll::Pending; // whoever frees it wakes it
        }
        WAKER.with(|waker| *waker.borrow_mut() = Some(context.waker().clone()));
        self.generator.resume();
        if self.generator.is_done() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }
}

/// Waits inside a coroutine until `future` is done; everything else runs meanwhile.
///
/// # Panics
/// Outside a coroutine: a programmer's error.
pub fn wait_for<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    loop {
        let waker = WAKER.with(|waker| waker.borrow().clone());
        let Some(waker) = waker else {
            panic!("only a coroutine waits like this")
        };
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => give_way(),
        }
    }
}

#[allow(
    deprecated,
    reason = "the scope, which the other form needs, is many calls up in production code"
)]
fn give_way() {
    generator::yield_with(());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::time::Duration;

    fn virtual_time<T>(work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build();
        runtime.expect("a runtime").block_on(work)
    }

    #[test]
    fn blocking_code_takes_turns_in_virtual_time() {
        let said = Arc::new(Mutex::new(Vec::new()));
        let work = |name: &'static str, pause_ms| {
            let said = Arc::clone(&said);
            Coroutine::new(Arc::default(), move || {
                for turn in 0..3 {
                    wait_for(tokio::time::sleep(Duration::from_millis(pause_ms)));
                    said.lock().expect("no panic").push((name, turn));
                }
            })
        };
        virtual_time(async { tokio::join!(work("slow", 30), work("fast", 20)) });
        let said = said.lock().expect("no panic").clone();
        assert_eq!(
            said,
            [
                ("fast", 0),
                ("slow", 0),
                ("fast", 1),
                ("slow", 1),
                ("fast", 2),
                ("slow", 2)
            ]
        );
    }

    #[test]
    fn a_dropped_coroutine_unwinds_and_a_stuck_one_gets_no_turn() {
        struct Flag(Arc<AtomicBool>);
        impl Drop for Flag {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let (unwound, stuck) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(true)));
        let flag = Flag(Arc::clone(&unwound));
        let coroutine = Coroutine::new(Arc::clone(&stuck), move || {
            let _flag = flag;
            wait_for(std::future::pending::<()>());
        });
        virtual_time(async {
            let task = tokio::spawn(coroutine);
            tokio::time::sleep(Duration::from_millis(1)).await;
            task.abort();
            assert!(task.await.is_err());
        });
        assert!(unwound.load(Ordering::Relaxed));
    }
}
