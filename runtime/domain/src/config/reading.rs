//! A config's text and what overrides make of it. Where they do not read, the message says whose fault it is: the file's,
//! with its line, or an override's, as it was given.

use super::ConfigError;
use serde::de::DeserializeOwned;
use std::path::Path;

const FILE_REMEDY: &str = "correct the file; README.md explains each key";
const OVERRIDE_REMEDY: &str = "correct the override; README.md explains each key";

/// The text of a config file; `remedy` is for one that is not there.
pub(super) fn text_of(path: &Path, remedy: &str) -> Result<String, ConfigError> {
    let refused = |reason: String, remedy: &str| ConfigError::new(path.display().to_string(), reason, remedy);
    let bytes = std::fs::read(path).map_err(|e| refused(format!("cannot be read ({e})"), remedy))?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        refused(format!("invalid UTF-8 at byte {at}"), "convert it to UTF-8")
    })
}

/// A config file and the overrides that go on top of it.
pub(super) struct Source<'a> {
    /// Stands for the file in messages.
    name: &'a str,
    text: &'a str,
    overrides: &'a [String],
    file: toml::Table,
    merged: toml::Table,
}

impl<'a> Source<'a> {
    pub(super) fn new(text: &'a str, name: &'a str, overrides: &'a [String]) -> Result<Self, ConfigError> {
        let file: toml::Table = toml::from_str(text)
            .map_err(|e| ConfigError::new(name, e.to_string().trim_end().to_owned(), FILE_REMEDY))?;
        let mut merged = file.clone();
        for item in overrides {
            apply_override(&mut merged, item)?;
        }
        Ok(Self {
            name,
            text,
            overrides,
            file,
            merged,
        })
    }

    /// Refuses a section that is not among those known.
    pub(super) fn only(&self, sections: &[&str]) -> Result<(), ConfigError> {
        let Some(unknown) = self.merged.keys().find(|key| !sections.contains(&key.as_str())) else {
            return Ok(());
        };
        let fault = Fault {
            key: unknown.clone(),
            is_missing: false,
            message: format!("unknown section '{unknown}'"),
            snippet: String::new(),
        };
        Err(self.refused(&fault, self.file.contains_key(unknown)))
    }

    /// What the file says with its overrides.
    pub(super) fn read<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        if self.overrides.is_empty() {
            return toml::from_str(self.text).map_err(|e| self.in_file(&Fault::of(e)));
        }
        toml::from_str(&self.merged.to_string()).map_err(|e| {
            let mut fault = Fault::of(e);
            let alone = toml::from_str::<T>(self.text).err().map(Fault::of);
            if let Some(alone) = alone.filter(|alone| alone.key == fault.key && alone.message == fault.message) {
                return self.refused(&alone, true);
            }
            // The lines of what was merged are in no file.
            fault.snippet.clear();
            self.refused(&fault, false)
        })
    }

    /// Blames the newest override that can have made a fault, else the file.
    fn refused(&self, fault: &Fault, is_in_file: bool) -> ConfigError {
        let Some(item) = self.blamed(fault, is_in_file) else {
            return self.in_file(fault);
        };
        let reason = if fault.is_missing {
            fault.said()
        } else {
            format!("{}: {}", fault.key, fault.message)
        };
        ConfigError::new(format!("--set {item}"), reason, fault.remedy(OVERRIDE_REMEDY))
    }

    fn blamed(&self, fault: &Fault, is_in_file: bool) -> Option<&'a String> {
        let overrides = self.overrides;
        let newest = |is_it: &dyn Fn(&str) -> bool| overrides.iter().rev().find(|item| is_it(key_of(item)));
        let whole = newest(&|key| is_in(&fault.key, key));
        whole.or_else(|| {
            // An override below what is wrong made it only where the file alone does not have it. A key is missing because
            // of an override only in a section that the file does not have.
            let (section, is_files) = match (fault.is_missing, fault.key.rsplit_once('.')) {
                (false, _) => (fault.key.as_str(), is_in_file),
                (true, Some((section, _))) => (section, has(&self.file, section)),
                (true, None) => return None,
            };
            if is_files || section.is_empty() {
                return None;
            }
            newest(&|key| is_in(key, section))
        })
    }

    fn in_file(&self, fault: &Fault) -> ConfigError {
        let Fault { key, snippet, .. } = fault;
        // Where no line shows it, the key says where it is.
        let reason = if snippet.is_empty() && !fault.is_missing && !key.is_empty() {
            format!("{key}: {}", fault.message)
        } else {
            format!("{snippet}{}", fault.said())
        };
        ConfigError::new(self.name, reason, fault.remedy(FILE_REMEDY))
    }
}

/// What does not read.
struct Fault {
    /// Dotted; of a list of tables without the place in the list.
    key: String,
    is_missing: bool,
    /// The reader's words.
    message: String,
    /// The line at fault, as the reader shows it; empty where it knows none.
    snippet: String,
}

impl Fault {
    fn of(mut error: toml::de::Error) -> Self {
        let message = error.message().to_owned();
        let shown = error.to_string();
        let snippet = shown.rfind(&message).map_or("", |at| &shown[..at]).to_owned();
        // Without its text the error ends with the key that it arose in; nothing else of it says that.
        error.set_input(None);
        let shown = error.to_string();
        let arose_in = shown.trim_end().rsplit_once("\nin `");
        let arose_in = arose_in.and_then(|(_, key)| key.strip_suffix('`')).unwrap_or_default();
        let named = |start: &str| message.strip_prefix(start)?.split('`').next();
        let missing = named("missing field `");
        // A key that is missing or not known is none that the reader was in.
        let key = match missing.or_else(|| named("unknown field `")) {
            Some(field) if arose_in.is_empty() => field.to_owned(),
            Some(field) => format!("{arose_in}.{field}"),
            None => arose_in.to_owned(),
        };
        Self {
            is_missing: missing.is_some(),
            key,
            snippet,
            message,
        }
    }

    fn said(&self) -> String {
        if self.is_missing {
            format!("missing key `{}`", self.key)
        } else {
            self.message.clone()
        }
    }

    fn remedy(&self, usual: &'static str) -> &'static str {
        if self.is_missing && matches!(self.key.as_str(), "data" | "data.domains") {
            "name at least one [[data.domains]]"
        } else {
            usual
        }
    }
}

/// The key that an override sets.
fn key_of(item: &str) -> &str {
    item.split_once('=').map_or(item, |(key, _)| key).trim()
}

/// Whether a dotted key is `section`, or lies in it.
fn is_in(key: &str, section: &str) -> bool {
    key.strip_prefix(section)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Whether there is something at a dotted key.
fn has(table: &toml::Table, key: &str) -> bool {
    let mut parts = key.split('.');
    let first = parts.next().and_then(|part| table.get(part));
    parts.fold(first, |here, part| here?.get(part)).is_some()
}

fn apply_override(table: &mut toml::Table, item: &str) -> Result<(), ConfigError> {
    let remedy = "write --set section.key=value";
    let Some((key, value)) = item.split_once('=') else {
        return Err(ConfigError::new(format!("--set {item}"), "has no '='", remedy));
    };
    let value = parse_value(value.trim());
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let last = parts.pop().filter(|part| !part.is_empty());
    let Some(last) = last else {
        return Err(ConfigError::new(format!("--set {item}"), "names no key", remedy));
    };
    let mut here = table;
    for part in parts {
        let entry = here
            .entry(part)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()));
        let toml::Value::Table(inner) = entry else {
            return Err(ConfigError::new(
                format!("--set {item}"),
                format!("'{part}' is not a section"),
                remedy,
            ));
        };
        here = inner;
    }
    here.insert(last.to_owned(), value);
    Ok(())
}

/// A TOML value where the text is one, a string otherwise.
fn parse_value(text: &str) -> toml::Value {
    toml::from_str::<toml::Table>(&format!("v = {text}"))
        .ok()
        .and_then(|mut table| table.remove("v"))
        .unwrap_or_else(|| toml::Value::String(text.to_owned()))
}
