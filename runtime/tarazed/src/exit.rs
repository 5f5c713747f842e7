//! Exit codes, a contract for schedulers (DESIGN.md section 11), and the one error type of the commands.
//!
//! A failure prints one message: what (a config key, a file or an option), cause, remedy.

use std::fmt;
use std::process::ExitCode;
pub use tarazed_actors::run_folder::{is_full, is_of_the_place};
use tarazed_corpus::CorpusError;
use tarazed_domain::config::ConfigError;

/// How a command ended, for whoever started it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// 0: done.
    Done,
    /// 2: refused (bad config, bad input, a folder in use); the same command does no better. A new run leaves nothing behind,
    /// one that was there keeps all it had.
    Refused,
    /// 3: halted with a diagnosis; a person is needed (DET-3, SUP-3): a full disk, too, does not empty itself.
    Halted,
    /// 33: a transient failure; retry.
    Transient,
    /// 34: stopped by a signal, after a last checkpoint where there was anything to save.
    Stopped,
}

impl Exit {
    /// The number the process exits with.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Refused => 2,
            Self::Halted => 3,
            Self::Transient => 33,
            Self::Stopped => 34,
        }
    }

    /// The exit that a code stands for; a code outside the contract asks for a person.
    #[must_use]
    pub const fn from_code(code: u8) -> Self {
        match code {
            0 => Self::Done,
            2 => Self::Refused,
            33 => Self::Transient,
            34 => Self::Stopped,
            _ => Self::Halted,
        }
    }

    /// The word in front of a failure's message.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Refused => "refused",
            Self::Halted => "halted",
            Self::Transient => "failed for now",
            Self::Stopped => "stopped",
        }
    }

    /// For `main`.
    #[must_use]
    pub fn exit_code(self) -> ExitCode {
        ExitCode::from(self.code())
    }
}

/// Why a command did not finish, and the exit code that says what to do about it.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// `what: cause; remedy`.
    pub message: String,
}

impl Failure {
    /// Refused, never retry: exit code 2.
    #[must_use]
    pub fn refused(what: impl fmt::Display, cause: impl fmt::Display, remedy: impl fmt::Display) -> Self {
        Self::new(Exit::Refused, what, cause, remedy)
    }

    /// Halted with a diagnosis: exit code 3.
    #[must_use]
    pub fn halted(what: impl fmt::Display, cause: impl fmt::Display, remedy: impl fmt::Display) -> Self {
        Self::new(Exit::Halted, what, cause, remedy)
    }

    /// For an operation of the system that failed: halted where its disk is full, transient otherwise.
    #[must_use]
    pub fn io(
        what: impl fmt::Display,
        error: &std::io::Error,
        cause: impl fmt::Display,
        remedy: impl fmt::Display,
    ) -> Self {
        let exit = if is_full(error) { Exit::Halted } else { Exit::Transient };
        Self::new(exit, what, format!("{cause} ({error})"), remedy)
    }

    /// Transient: exit code 33.
    #[must_use]
    pub fn transient(what: impl fmt::Display, cause: impl fmt::Display, remedy: impl fmt::Display) -> Self {
        Self::new(Exit::Transient, what, cause, remedy)
    }

    /// With an exit code of the caller's choice.
    #[must_use]
    pub fn new(exit: Exit, what: impl fmt::Display, cause: impl fmt::Display, remedy: impl fmt::Display) -> Self {
        Self {
            exit,
            message: format!("{what}: {cause}; {remedy}"),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tarazed: {}: {}", self.exit.word(), self.message)
    }
}

impl std::error::Error for Failure {}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self {
            exit: Exit::Refused,
            message: error.to_string(),
        }
    }
}

impl From<CorpusError> for Failure {
    fn from(error: CorpusError) -> Self {
        let exit = match error {
            CorpusError::Write { ref source, .. } if is_full(source) => Exit::Halted,
            CorpusError::SourceChanged { .. } | CorpusError::Write { .. } => Exit::Transient,
            CorpusError::CorruptCache { .. } => Exit::Halted,
            _ => Exit::Refused,
        };
        let message = error.to_string();
        Self { exit, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_codes_are_the_contract() {
        let codes: Vec<u8> = [Exit::Done, Exit::Refused, Exit::Halted, Exit::Transient, Exit::Stopped]
            .into_iter()
            .map(Exit::code)
            .collect();
        assert_eq!(codes, [0, 2, 3, 33, 34]);
        assert!(codes.iter().all(|&code| Exit::from_code(code).code() == code));
        assert_eq!(Exit::from_code(101), Exit::Halted);
    }

    /// Whatever meets a full disk, it halts: no retry makes room.
    #[test]
    fn a_full_disk_halts_wherever_it_is_met() {
        let full = || std::io::Error::from_raw_os_error(28);
        let failing = || std::io::Error::from_raw_os_error(5);
        let write = |source| {
            Failure::from(CorpusError::Write {
                path: "data.json".into(),
                source,
            })
        };
        let print = |error| Failure::io("standard output", &error, "cannot be written", "free space");
        for (met, exit) in [
            (write(full()), Exit::Halted),
            (write(failing()), Exit::Transient),
            (print(full()), Exit::Halted),
            (print(failing()), Exit::Transient),
        ] {
            assert_eq!(met.exit, exit, "{met}");
        }
    }

    #[test]
    fn a_failure_says_what_why_and_what_to_do() {
        let failure = Failure::refused("batch.lanes", "is 0", "set it to at least 1");
        assert_eq!(
            failure.to_string(),
            "tarazed: refused: batch.lanes: is 0; set it to at least 1"
        );
    }
}
