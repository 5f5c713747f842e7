//! A rank whose actors stand still while its device thread lives: what a deadlock among them is to others. Chaos runs ask for
//! it; nothing else does.

use super::RankError;
use std::sync::Arc;
use std::time::Duration;
use tarazed_train::harm::{Hang, Part, stand_still};
use tarazed_train::progress::Progress;
use tokio::runtime::Handle;

/// Between looks at how far the device thread is.
const LOOK: Duration = Duration::from_millis(1);

/// Blocks every worker of the actors' runtime for good, once the device thread has come to the step; if that is asked for.
pub(super) fn arm(hang: Option<Hang>, progress: &Arc<Progress>, runtime: &Handle) -> Result<(), RankError> {
    let Some(hang) = hang.filter(|hang| hang.part == Part::Runtime) else {
        return Ok(());
    };
    let (progress, runtime) = (Arc::clone(progress), runtime.clone());
    let watch = move || {
        while progress.step().next() < hang.step {
            std::thread::sleep(LOOK);
        }
        tracing::warn!("the actors stand still on purpose");
        // Asked for from outside, so that each worker takes one: what a worker asks for waits for that worker alone.
        for _ in 0..runtime.metrics().num_workers() {
            runtime.spawn(async { stand_still() });
        }
    };
    let spawned = std::thread::Builder::new().name("hang".to_owned()).spawn(watch);
    spawned.map(drop).map_err(|e| RankError::because("hang thread")(&e))
}
