//! Writing to standard output without panicking where the reader has gone (`tarazed plan … | head`).

use crate::exit::Failure;
use std::io::{ErrorKind, Write};

/// Prints `text` to standard output. A closed pipe is an ordinary end.
///
/// # Errors
/// A transient [`Failure`] where standard output cannot be written for another reason, a full disk for instance.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(Failure::transient(
            "standard output",
            format!("cannot be written ({e})"),
            "free space or redirect it elsewhere, and try again",
        )),
        _ => Ok(()),
    }
}

/// Prints `value` as indented JSON and a line end.
///
/// # Errors
/// As [`print`].
pub fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    match serde_json::to_string_pretty(value) {
        Ok(text) => print(&(text + "\n")),
        Err(e) => Err(Failure::halted(
            "JSON output",
            format!("cannot be made ({e})"),
            "report this as a bug",
        )),
    }
}
