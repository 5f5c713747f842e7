//! Writing to standard output without panicking where the reader has gone (`tarazed plan … | head`).

use crate::exit::Failure;
use std::io::{ErrorKind, Write};
use std::path::Path;

/// A path as a person in the working directory would write it.
#[must_use]
pub fn short(path: &Path) -> &Path {
    let below = std::env::current_dir()
        .ok()
        .and_then(|here| path.strip_prefix(here).ok());
    below.filter(|below| !below.as_os_str().is_empty()).unwrap_or(path)
}

/// Prints `text` to standard output. A closed pipe is an ordinary end.
///
/// # Errors
/// A [`Failure`] where standard output cannot be written for another reason: halted where its disk is full, else transient.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(Failure::io(
            "standard output",
            &e,
            "cannot be written",
            "free space or redirect it elsewhere, and try again",
        )),
        _ => Ok(()),
    }
}

/// Prints `value` as indented JSON and a line end.
///
/// # Errors
/// As [`print()`].
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_below_the_working_directory_are_shown_from_there() {
        let here = std::env::current_dir().expect("a working directory");
        assert_eq!(short(&here.join("runs/a")), Path::new("runs/a"));
        assert_eq!(short(&here), here);
        assert_eq!(short(Path::new("/elsewhere/runs/a")), Path::new("/elsewhere/runs/a"));
    }
}
