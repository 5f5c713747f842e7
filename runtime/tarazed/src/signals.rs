//! SIGTERM, SIGINT and SIGUSR1 (Slurm's warning): all of them ask for an orderly end, and a second one for one at once.

use crate::exit::Failure;
use tokio::signal::unix::{SignalKind, signal};

/// Hears signals from now on: before anything else is done, since one that finds nobody listening ends the process with no code
/// of the contract. `first` and `second` run on a thread of their own.
///
/// # Errors
/// Transient where the system refuses.
pub fn listen(first: impl FnOnce() + Send + 'static, second: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure::transient("signals", format!("cannot be heard ({e})"), "try again");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    let entered = runtime.enter();
    let mut signals = Vec::new();
    for kind in [
        SignalKind::terminate(),
        SignalKind::interrupt(),
        SignalKind::user_defined1(),
    ] {
        signals.push(signal(kind).map_err(failed)?);
    }
    drop(entered);
    let listen = move || {
        runtime.block_on(async move {
            next(&mut signals).await;
            first();
            next(&mut signals).await;
            second();
        });
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(listen)
        .map_err(failed)?;
    Ok(())
}

async fn next(signals: &mut [tokio::signal::unix::Signal]) {
    let [terminate, interrupt, user] = signals else { return };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = user.recv() => {}
    }
}
