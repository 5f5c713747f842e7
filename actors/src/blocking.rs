//! Work that blocks, beside the actors (SUP-4).
//!
//! On a runtime with one thread there is nothing to run beside: the work is done in place, so that a simulation in virtual
//! time stays a function of its seed.

use tokio::runtime::{Handle, RuntimeFlavor};

/// Runs `work` where it holds up nobody and waits for its result.
///
/// # Errors
/// A message if it panicked.
pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    if is_alone() {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())
}

/// Runs `work` where it holds up nobody, and does not wait: `then` gets its result, or a message if it panicked.
pub fn detach<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
    then: impl FnOnce(Result<T, String>) + Send + 'static,
) {
    if is_alone() {
        then(Ok(work()));
    } else {
        let work = tokio::task::spawn_blocking(work);
        tokio::spawn(async move { then(work.await.map_err(|e| e.to_string())) });
    }
}

fn is_alone() -> bool {
    matches!(Handle::current().runtime_flavor(), RuntimeFlavor::CurrentThread)
}
