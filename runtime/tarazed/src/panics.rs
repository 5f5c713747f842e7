//! A panic is a bug: one line on standard error, the rest in the log, exit code 3.
//!
//! Panics inside actors are caught by their supervisors (SUP-1); the hook still prints the line, so that none is silent.

use crate::exit::{Exit, Failure};
use crate::outlet::last_words;
use std::panic::{AssertUnwindSafe, PanicHookInfo};
use std::path::PathBuf;
use std::sync::RwLock;

static LOG_FILE: RwLock<Option<PathBuf>> = RwLock::new(None);

/// Names the log file that panic messages point to.
pub fn set_log_file(path: PathBuf) {
    *LOG_FILE.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(path);
}

/// Replaces the standard hook for the whole process.
pub fn install() {
    std::panic::set_hook(Box::new(|info| {
        let line = describe(info, std::thread::current().name());
        let log = LOG_FILE
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone();
        match log {
            Some(log) => {
                let backtrace = std::backtrace::Backtrace::force_capture();
                tracing::error!(target: "tarazed::panics", "{line}\n{backtrace}");
                last_words(&format!("{line}; log: {}", log.display()));
            }
            None => last_words(&format!("{line}; no log file was open")),
        }
    }));
}

fn describe(info: &PanicHookInfo<'_>, thread: Option<&str>) -> String {
    let place = info
        .location()
        .map_or_else(|| "unknown place".to_owned(), |l| format!("{}:{}", l.file(), l.line()));
    let payload = info.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let what = text
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    let what = what.replace('\n', " ");
    format!(
        "tarazed: bug: panic in thread '{}' at {place}: {what}",
        thread.unwrap_or("unnamed")
    )
}

/// Runs a command; prints its failure, if any, and turns a panic into [`Exit::Halted`].
pub fn contain(command: impl FnOnce() -> Result<Exit, Failure>) -> Exit {
    match std::panic::catch_unwind(AssertUnwindSafe(command)) {
        Ok(Ok(exit)) => exit,
        Ok(Err(failure)) => {
            last_words(&failure.to_string());
            failure.exit
        }
        Err(_) => Exit::Halted, // the hook has said it
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_halt_and_a_failure_keeps_its_code() {
        assert_eq!(contain(|| panic!("on purpose, for this test")), Exit::Halted);
        assert_eq!(contain(|| Err(Failure::transient("a", "b", "c"))), Exit::Transient);
        assert_eq!(contain(|| Ok(Exit::Stopped)), Exit::Stopped);
    }
}
