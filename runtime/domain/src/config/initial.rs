//! `[model.initial]`: the weights that a run begins with, where they are not those of its seed.

use super::{ConfigError, absolute, validate};
use crate::ids::StepsCompleted;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The key, as messages name it.
const FROM: &str = "model.initial.from";

/// `[model.initial]`: a checkpoint whose master weights a run begins with, of any run with the same parameter layout, or imported.
/// Both moments begin at zero, and so do steps.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitialConfig {
    /// `STORE` or `STORE@STEP`: a folder, relative to the config file, or a URL. It says where the checkpoint lies and nothing of
    /// what it holds, so it is no part of the run's identity.
    pub from: String,
    /// BLAKE3 of the checkpoint's manifest, in hex: it pins every byte, since a manifest has the hash of each object.
    #[serde(with = "hex")]
    pub blake3: [u8; 32],
}

impl InitialConfig {
    /// The store, and the step where one is named. `@` and digits at the very end are a step, whatever a folder is called: one whose
    /// own name ends like that is written with a slash behind it.
    #[must_use]
    pub fn place(&self) -> (&str, Option<StepsCompleted>) {
        let split = self.from.rsplit_once('@');
        let split = split.filter(|(place, step)| !place.is_empty() && step.bytes().all(|byte| byte.is_ascii_digit()));
        match split.and_then(|(place, step)| Some((place, step.parse().ok()?))) {
            Some((place, step)) => (place, Some(StepsCompleted(step))),
            None => (&self.from, None),
        }
    }

    /// The hash in hex.
    #[must_use]
    pub fn digest(&self) -> String {
        hex::of(&self.blake3)
    }

    /// Makes a folder absolute.
    pub(super) fn resolve(&mut self, folder: &Path) -> Result<(), ConfigError> {
        self.from = self.from.trim().to_owned();
        if self.from.is_empty() || self.from.contains("://") {
            return Ok(());
        }
        let (place, step) = self.place();
        let place = absolute(FROM, &folder.join(place))?;
        let step = step.map_or_else(String::new, |step| format!("@{step}"));
        self.from = format!("{}{step}", place.to_string_lossy());
        Ok(())
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if self.from.is_empty() {
            let remedy = "name the store that holds the checkpoint, or leave [model.initial] out";
            return Err(ConfigError::new(FROM, "is empty", remedy));
        }
        validate::store_scheme(FROM, &self.from)
    }
}

/// 32 bytes as 64 hex digits.
mod hex {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn of(bytes: &[u8; 32]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// None for what is not 64 hex digits.
    fn parse(text: &str) -> Option<[u8; 32]> {
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
        }
        Some(bytes)
    }

    pub(super) fn serialize<S: Serializer>(bytes: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&of(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(deserializer)?;
        parse(&text).ok_or_else(|| {
            Error::custom(
                "the hash of a manifest is 64 hex digits, as `tarazed checkpoint show` and `tarazed import` print it",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn initial(from: &str) -> InitialConfig {
        InitialConfig {
            from: from.to_owned(),
            blake3: [0xAB; 32],
        }
    }

    #[test]
    fn a_step_may_stand_behind_the_store() {
        for (from, place, step) in [
            ("/runs/a/store", "/runs/a/store", None),
            ("/runs/a/store@120", "/runs/a/store", Some(120)),
            ("s3://bucket/run@0", "s3://bucket/run", Some(0)),
            ("/runs/me@home", "/runs/me@home", None),
            ("/runs/a@7/", "/runs/a@7/", None),
            ("/runs/a@7@0", "/runs/a@7", Some(0)),
            ("/runs/a@", "/runs/a@", None),
            ("@7", "@7", None),
            ("/runs/a@+7", "/runs/a@+7", None),
            ("/runs/a@99999999999999999999", "/runs/a@99999999999999999999", None),
            ("s3://key:secret@bucket/run", "s3://key:secret@bucket/run", None),
        ] {
            assert_eq!(initial(from).place(), (place, step.map(StepsCompleted)), "{from}");
        }
    }

    #[test]
    fn folders_are_relative_to_the_file_and_urls_to_nothing() {
        let resolved = |from: &str| {
            let mut initial = initial(from);
            initial.resolve(Path::new("/configs")).expect("a good path");
            initial.from
        };
        for (from, to) in [
            (" ../imported@0 ", "/configs/../imported@0"),
            ("imported", "/configs/imported"),
            ("a@7/", "/configs/a@7/"),
            ("/data/imported@12", "/data/imported@12"),
            ("s3://bucket/run@7", "s3://bucket/run@7"),
        ] {
            assert_eq!(resolved(from), to);
            assert_eq!(resolved(to), to, "what is resolved stays");
        }
    }

    #[test]
    fn what_names_no_store_is_refused_without_its_secrets() {
        for (from, said) in [
            ("", "model.initial.from: is empty; "),
            ("ftp://me:secret@host/x", "model.initial.from: no store speaks ftp://; "),
        ] {
            let refused = initial(from).check().expect_err("refused").to_string();
            assert!(refused.starts_with(said) && !refused.contains("secret"), "{refused}");
        }
        initial("gs://bucket/run").check().expect("a good URL");
    }
}
