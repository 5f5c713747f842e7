//! What can go wrong, by what the caller does next. Every message names the key, the cause and the remedy, and no
//! credential: of what a server answers only its code and its sentence are repeated (`answer.rs`), and [`Redactor`] removes
//! whatever the environment holds as a secret.

use crate::answer::{self, ACCESS, ClockAhead, Remedy};
use std::error::Error as StdError;
use std::io::ErrorKind;
use std::sync::{Arc, PoisonError, RwLock};

/// Why the store did not do what was asked; the variant says what to do next.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StoreError {
    /// The store did not answer or asked to slow down. Nothing acknowledged is lost; the same call may be made again.
    #[error("{operation} {key}: {cause}; nothing acknowledged is lost: try again")]
    Retry {
        /// What was tried.
        operation: &'static str,
        /// On which object.
        key: String,
        /// What the store said.
        cause: String,
    },
    /// No space. Nothing acknowledged is lost, and what was half written does not count; free space, then try again.
    #[error(
        "{key}: no space left in {location} ({cause}); checkpoints already committed are whole: free space there or lower \
         checkpoint.keep_last, then try again"
    )]
    Full {
        /// Folder or URL of the store.
        location: String,
        /// The object that did not fit.
        key: String,
        /// What the system said.
        cause: String,
    },
    /// The store cannot be used as configured: location, credentials, permissions, or a store unfit for checkpoints.
    #[error("store {location}: {cause}; {remedy}")]
    Reconfigure {
        /// Folder or URL of the store.
        location: String,
        /// What is wrong.
        cause: String,
        /// What to change.
        remedy: String,
    },
    /// Another controller has claimed the store (CKPT-3): this one must stop writing and deleting at once.
    #[error(
        "{key}: generation {by} holds the store now; this controller is fenced and must stop (nothing was written)"
    )]
    Fenced {
        /// The record that fences.
        key: String,
        /// The generation that holds the store now.
        by: u64,
    },
    /// An object is not what its hash says (CKPT-4). Use an older checkpoint, and look for the cause.
    #[error("{key}: {why}; use an older checkpoint and find out what changed the object")]
    Corrupt {
        /// The bad object.
        key: String,
        /// What is wrong with it.
        why: String,
    },
    /// There is no such object, checkpoint or store.
    #[error("{what}: not found; {remedy}")]
    NotFound {
        /// What was looked for.
        what: String,
        /// Where to look next.
        remedy: String,
    },
    /// The request contradicts itself or the store's contents: a defect of the caller. Nothing was written.
    #[error("refused: {why}")]
    Refused {
        /// What does not add up.
        why: String,
    },
}

impl StoreError {
    pub(crate) fn corrupt(key: impl ToString, why: impl ToString) -> Self {
        Self::Corrupt {
            key: key.to_string(),
            why: why.to_string(),
        }
    }

    pub(crate) fn refused(why: impl ToString) -> Self {
        Self::Refused { why: why.to_string() }
    }

    /// Whether the object itself is bad, so that an older checkpoint must serve.
    #[must_use]
    pub const fn is_bad_object(&self) -> bool {
        matches!(self, Self::Corrupt { .. } | Self::NotFound { .. })
    }
}

fn on_one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The store's name in messages, and the secrets that must not appear in any.
#[derive(Clone, Debug)]
pub(crate) struct Redactor {
    pub(crate) location: Arc<str>,
    /// Shared by all clones: keys of a profile that are renewed on disk join them.
    secrets: Arc<RwLock<Vec<String>>>,
    /// As the store's own clock shows it.
    pub(crate) clock: ClockAhead,
}

/// Environment variables whose values never appear in a message.
const SECRET_VARIABLES: [&str; 17] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_MASTER_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_ENCRYPTION_KEY",
    "AZURE_CLIENT_SECRET",
    "AZURE_FABRIC_SESSION_TOKEN",
    "GOOGLE_BEARER_TOKEN",
];
/// Shorter values are no secrets, and removing them would garble messages.
const SECRET_CHARS_MIN: usize = 8;

impl Redactor {
    pub(crate) fn new(location: &str) -> Self {
        let secrets = SECRET_VARIABLES.iter().filter_map(|name| std::env::var(name).ok());
        Self::with_secrets(location, secrets)
    }

    /// Also knows these secrets from now on, wherever it was cloned to.
    #[cfg_attr(not(feature = "s3"), expect(dead_code, reason = "folders have no secrets"))]
    pub(crate) fn learn(&self, more: impl Iterator<Item = String>) {
        let mut secrets = self.secrets.write().unwrap_or_else(PoisonError::into_inner);
        for secret in more.filter(|value| value.len() >= SECRET_CHARS_MIN) {
            if !secrets.contains(&secret) {
                secrets.push(secret);
            }
        }
    }

    fn with_secrets(location: &str, secrets: impl Iterator<Item = String>) -> Self {
        Self {
            location: location.into(),
            secrets: Arc::new(RwLock::new(
                secrets.filter(|value| value.len() >= SECRET_CHARS_MIN).collect(),
            )),
            clock: ClockAhead::default(),
        }
    }

    /// The message without secrets, on one line.
    pub(crate) fn clean(&self, message: &str) -> String {
        let mut message = on_one_line(message);
        for secret in self.secrets.read().unwrap_or_else(PoisonError::into_inner).iter() {
            // A key of several lines is quoted on one.
            message = message.replace(on_one_line(secret).as_str(), "***");
        }
        message
    }

    /// Sorts an error of the object store by what the caller does next.
    pub(crate) fn sort(&self, operation: &'static str, key: &str, error: &object_store::Error) -> StoreError {
        use object_store::Error as E;
        let said = root_cause(error);
        let cause = self.clean(&answer::concise(&said));
        let reconfigure = |remedy: &str| StoreError::Reconfigure {
            location: self.location.to_string(),
            cause: format!("{operation} {key}: {cause}"),
            remedy: remedy.to_string(),
        };
        if let Some(kind) = io_kind(error) {
            match kind {
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                    return StoreError::Full {
                        location: self.location.to_string(),
                        key: key.to_string(),
                        cause,
                    };
                }
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                    return reconfigure("give this user write access there, or choose another checkpoint.store");
                }
                ErrorKind::NotADirectory | ErrorKind::IsADirectory => {
                    return reconfigure("something that is no checkpoint store is in the way: choose another folder");
                }
                _ => {}
            }
        }
        let again = || StoreError::Retry {
            operation,
            key: key.to_string(),
            cause: cause.clone(),
        };
        // Before what it may have answered: it is not the store that did not let us in.
        let is_role = ["/latest/api/token", "169.254.169.254", "169.254.170."];
        if !matches!(error, E::NotFound { .. }) && is_role.iter().any(|place| cause.contains(place)) {
            return reconfigure(
                "no credentials in the environment and no instance role answered: set AWS_ACCESS_KEY_ID and \
                 AWS_SECRET_ACCESS_KEY (or a web identity), or run where an instance role is granted",
            );
        }
        match answer::remedy(&said, &self.clock) {
            Some(Remedy::Change(remedy)) => return reconfigure(&remedy),
            Some(Remedy::Again) => return again(),
            None => {}
        }
        match error {
            E::NotFound { .. } => StoreError::NotFound {
                what: format!("{key} in {}", self.location),
                remedy: "the object was deleted or never written".to_string(),
            },
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => reconfigure(ACCESS),
            E::NotImplemented { .. } | E::NotSupported { .. } | E::UnknownConfigurationKey { .. } => {
                reconfigure("use a store that supports create-if-absent writes and strongly consistent listing")
            }
            E::InvalidPath { .. } => reconfigure("correct checkpoint.store"),
            _ if cause.contains("builder error") || cause.contains("relative URL") => {
                reconfigure("correct checkpoint.store")
            }
            _ => again(),
        }
    }
}

/// The kind of the I/O error at the bottom of an error, if there is one.
fn io_kind(error: &(dyn StdError + 'static)) -> Option<ErrorKind> {
    let mut next = Some(error);
    let mut found = None;
    while let Some(current) = next {
        if let Some(io) = current.downcast_ref::<std::io::Error>() {
            found = Some(io.kind());
        }
        next = current.source();
    }
    found
}

/// The error's message, with its sources where the message leaves them out.
fn root_cause(error: &(dyn StdError + 'static)) -> String {
    let mut message = error.to_string();
    let mut next = error.source();
    while let Some(current) = next {
        let text = current.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        next = current.source();
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(source: impl Into<Box<dyn StdError + Send + Sync>>) -> object_store::Error {
        object_store::Error::Generic {
            store: "test",
            source: source.into(),
        }
    }

    #[test]
    fn a_full_disk_names_the_place_and_the_remedy() {
        let redactor = Redactor::with_secrets("/data/run/store", std::iter::empty());
        let full = generic(std::io::Error::from_raw_os_error(28));
        let error = redactor.sort("write", "shards/x", &full);
        assert!(matches!(&error, StoreError::Full { location, .. } if location == "/data/run/store"));
        assert!(error.to_string().contains("free space"), "{error}");
    }

    #[test]
    fn no_secret_in_any_message() {
        let secrets = ["hunter2hunter2", "-----BEGIN KEY-----\nabc\ndef\n-----END KEY-----\n"].map(str::to_string);
        let redactor = Redactor::with_secrets("s3://bucket", secrets.into_iter());
        assert_eq!(
            redactor.clean("key -----BEGIN KEY-----\nabc\ndef\n-----END KEY----- is bad"),
            "key *** is bad"
        );
        let error = redactor.sort("read", "k", &generic("signature of hunter2hunter2\n was wrong"));
        assert_eq!(
            error,
            StoreError::Retry {
                operation: "read",
                key: "k".into(),
                cause: "Generic test error: signature of *** was wrong".into()
            }
        );
    }

    #[test]
    fn a_missing_bucket_is_a_matter_of_configuration() {
        let redactor = Redactor::with_secrets("s3://bucket", std::iter::empty());
        let missing = object_store::Error::NotFound {
            path: "k".into(),
            source: "404: <Code>NoSuchBucket</Code>".into(),
        };
        assert!(matches!(
            redactor.sort("write", "k", &missing),
            StoreError::Reconfigure { .. }
        ));
    }

    #[test]
    fn a_listing_that_is_refused_is_no_reason_to_try_again() {
        let redactor = Redactor::with_secrets("s3://bucket", std::iter::empty());
        let answer =
            |text: &str| redactor.sort("list", "commits", &generic(format!("Server returned non-2xx: {text}")));
        for (text, remedy) in [
            (
                "403 Forbidden: <Error><Code>SignatureDoesNotMatch</Code>",
                "check the credentials",
            ),
            ("404 Not Found: <Code>NoSuchBucket</Code>", "create the bucket"),
        ] {
            let error = answer(text);
            assert!(matches!(&error, StoreError::Reconfigure { .. }), "{error:?}");
            assert!(error.to_string().contains(remedy), "{error}");
        }
        assert!(matches!(answer("503 Slow Down"), StoreError::Retry { .. }));
    }
}
