//! Where documents come from: files and folders of JSON lines, parquet or plain text, in a fixed order.

use crate::error::CorpusError;
use crate::parquet_source;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor};
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use tarazed_domain::config::{DomainConfig, SourceFormat};

/// Bytes of one document.
pub(crate) const DOCUMENT_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// Folders within folders.
const DEPTH_MAX: usize = 64;

/// One source file, its format resolved.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct SourceFile {
    pub(crate) path: PathBuf,
    /// Relative to the domain's path; what provenance names.
    pub(crate) name: String,
    pub(crate) format: SourceFormat,
    pub(crate) bytes: u64,
    modified: Option<SystemTime>,
}

/// One document as read.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) text: String,
    /// Line or row in its file, from 1.
    pub(crate) record: u64,
}

/// The files of a domain, sorted by name; hidden ones (a leading dot) are left out.
///
/// # Errors
/// [`CorpusError::MissingPath`], [`CorpusError::EmptyDomain`], [`CorpusError::Unreadable`].
pub(crate) fn list(domain: &DomainConfig) -> Result<Vec<SourceFile>, CorpusError> {
    let root = &domain.path;
    let metadata = match std::fs::metadata(root) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(CorpusError::MissingPath {
                domain: domain.name.clone(),
                path: root.clone(),
            });
        }
        other => other.map_err(CorpusError::unreadable(root))?,
    };
    let mut files = Vec::new();
    if metadata.is_dir() {
        walk(root, "", 0, domain.format, &mut files)?;
    } else {
        files.push(source_file(root, crate::files::file_name(root), domain.format)?);
    }
    if files.is_empty() {
        return Err(CorpusError::EmptyDomain {
            domain: domain.name.clone(),
            path: root.clone(),
            found: "the folder holds no file".to_owned(),
            remedy: "put its files there or correct data.domains.path",
        });
    }
    Ok(files)
}

fn walk(
    folder: &Path,
    prefix: &str,
    depth: usize,
    format: SourceFormat,
    files: &mut Vec<SourceFile>,
) -> Result<(), CorpusError> {
    if depth > DEPTH_MAX {
        let source = std::io::Error::other(format!(
            "more than {DEPTH_MAX} folders deep; a link to a parent folder?"
        ));
        return Err(CorpusError::Unreadable {
            path: folder.to_owned(),
            source,
        });
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(CorpusError::unreadable(folder))? {
        let name = entry.map_err(CorpusError::unreadable(folder))?.file_name();
        if !name.as_encoded_bytes().starts_with(b".") {
            names.push(name);
        }
    }
    // The order of a directory is the file system's; ours must not be (DET-1).
    names.sort_by(|a, b| a.as_encoded_bytes().cmp(b.as_encoded_bytes()));
    for name in names {
        let path = folder.join(&name);
        let shown = format!("{prefix}{}", name.to_string_lossy());
        let metadata = std::fs::metadata(&path).map_err(CorpusError::unreadable(&path))?;
        if metadata.is_dir() {
            walk(&path, &format!("{shown}/"), depth + 1, format, files)?;
        } else if metadata.is_file() {
            files.push(source_file(&path, shown, format)?);
        }
    }
    Ok(())
}

fn source_file(path: &Path, name: String, format: SourceFormat) -> Result<SourceFile, CorpusError> {
    let metadata = std::fs::metadata(path).map_err(CorpusError::unreadable(path))?;
    let format = match format {
        SourceFormat::Auto => match path.extension().and_then(|e| e.to_str()) {
            Some("jsonl" | "ndjson") => SourceFormat::Jsonl,
            Some("parquet") => SourceFormat::Parquet,
            _ => SourceFormat::Text,
        },
        named => named,
    };
    Ok(SourceFile {
        path: path.to_owned(),
        name,
        format,
        bytes: metadata.len(),
        modified: metadata.modified().ok(),
    })
}

impl SourceFile {
    /// Refuses a file that was written to since it was listed: its hash would not be that of the text read.
    pub(crate) fn check_unchanged(&self) -> Result<(), CorpusError> {
        let now = std::fs::metadata(&self.path).map_err(CorpusError::unreadable(&self.path))?;
        if now.len() != self.bytes || now.modified().ok() != self.modified {
            return Err(CorpusError::SourceChanged {
                path: self.path.clone(),
            });
        }
        Ok(())
    }

    /// Hands every document to `sink`, in the file's order.
    ///
    /// # Errors
    /// The first unreadable record, or the sink's own error.
    pub(crate) fn documents(
        &self,
        text_field: &str,
        sink: &mut dyn FnMut(Document) -> Result<(), CorpusError>,
    ) -> Result<(), CorpusError> {
        match self.format {
            SourceFormat::Jsonl => self.jsonl(text_field, sink),
            SourceFormat::Parquet => parquet_source::documents(&self.path, text_field, sink),
            SourceFormat::Text | SourceFormat::Auto => self.text(sink),
        }
    }

    fn text(&self, sink: &mut dyn FnMut(Document) -> Result<(), CorpusError>) -> Result<(), CorpusError> {
        if self.bytes > DOCUMENT_BYTES_MAX {
            return Err(self.too_large("it".to_owned()));
        }
        let mut bytes = Vec::with_capacity(self.bytes as usize);
        File::open(&self.path)
            .and_then(|file| file.take(DOCUMENT_BYTES_MAX + 1).read_to_end(&mut bytes))
            .map_err(CorpusError::unreadable(&self.path))?;
        let text = String::from_utf8(bytes).map_err(|e| CorpusError::InvalidUtf8 {
            path: self.path.clone(),
            offset: e.utf8_error().valid_up_to().to_string(),
        })?;
        sink(Document {
            text: without_mark(text),
            record: 1,
        })
    }

    fn jsonl(
        &self,
        text_field: &str,
        sink: &mut dyn FnMut(Document) -> Result<(), CorpusError>,
    ) -> Result<(), CorpusError> {
        let file = File::open(&self.path).map_err(CorpusError::unreadable(&self.path))?;
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let mut line = Vec::new();
        let (mut number, mut offset) = (0_u64, 0_u64);
        loop {
            line.clear();
            number += 1;
            let read = (&mut reader)
                .take(DOCUMENT_BYTES_MAX + 1)
                .read_until(b'\n', &mut line)
                .map_err(CorpusError::unreadable(&self.path))? as u64;
            if read == 0 {
                return Ok(());
            }
            if read > DOCUMENT_BYTES_MAX {
                return Err(self.too_large(format!("line {number}")));
            }
            let text = std::str::from_utf8(&line).map_err(|e| CorpusError::InvalidUtf8 {
                path: self.path.clone(),
                offset: format!("{} (line {number})", offset + e.valid_up_to() as u64),
            })?;
            let text = if number == 1 {
                text.trim_start_matches('\u{feff}')
            } else {
                text
            };
            if !text.trim().is_empty() {
                let text = self.field(text, text_field, number)?;
                sink(Document { text, record: number })?;
            }
            offset += read;
        }
    }

    fn field(&self, line: &str, field: &str, number: u64) -> Result<String, CorpusError> {
        let mut json = serde_json::Deserializer::from_str(line);
        let parsed = TextField { field }
            .deserialize(&mut json)
            .and_then(|value| json.end().map(|()| value));
        let missing = |reason: String| CorpusError::MissingField {
            path: self.path.clone(),
            line: number,
            reason,
        };
        match parsed {
            Ok(Field::Text(text)) => Ok(text),
            Ok(Field::NotText) => Err(missing(format!("the field '{field}' is not a string"))),
            Ok(Field::Absent) => Err(missing(format!("has no field '{field}'"))),
            Err(e) => Err(CorpusError::BadRecord {
                path: self.path.clone(),
                line: number,
                reason: e.to_string(),
            }),
        }
    }

    fn too_large(&self, place: String) -> CorpusError {
        CorpusError::DocumentTooLarge {
            path: self.path.clone(),
            place,
            limit_bytes: DOCUMENT_BYTES_MAX,
        }
    }
}

/// A byte order mark is the file's, not the text's.
fn without_mark(text: String) -> String {
    match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    }
}

enum Field {
    Text(String),
    NotText,
    Absent,
}

/// Picks one string out of a JSON object without building the rest of it.
struct TextField<'a> {
    field: &'a str,
}

impl<'de> DeserializeSeed<'de> for TextField<'_> {
    type Value = Field;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Field, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TextField<'_> {
    type Value = Field;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Field, A::Error> {
        let mut found = Field::Absent;
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            if key != self.field {
                map.next_value::<IgnoredAny>()?;
            } else if matches!(found, Field::Absent) {
                found = match map.next_value::<serde_json::Value>()? {
                    serde_json::Value::String(text) => Field::Text(text),
                    _ => Field::NotText,
                };
            } else {
                return Err(A::Error::custom(format!("the field '{key}' occurs twice")));
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tarazed_domain::config::Language;

    pub(crate) fn domain(path: &Path) -> DomainConfig {
        DomainConfig {
            name: "web".to_owned(),
            path: path.to_owned(),
            format: SourceFormat::Auto,
            language: Language::En,
            weight: 1.0,
            text_field: "text".to_owned(),
        }
    }

    fn read(path: &Path) -> Result<Vec<String>, CorpusError> {
        let mut texts = Vec::new();
        for file in list(&domain(path))? {
            file.documents("text", &mut |d| {
                texts.push(d.text);
                Ok(())
            })?;
        }
        Ok(texts)
    }

    #[test]
    fn a_folder_is_walked_in_name_order_each_file_by_its_ending() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir_all(at("b/deep")).unwrap();
        std::fs::write(at("c.txt"), "\u{feff}three").unwrap();
        std::fs::write(at("b/deep/x.md"), "two").unwrap();
        std::fs::write(
            at("a.jsonl"),
            "{\"text\":\"one\"}\n\n{\"id\":{\"text\":1},\"text\":\"一\\n\\u4e8c\"}\r\n",
        )
        .unwrap();
        std::fs::write(at(".hidden"), "no").unwrap();
        assert_eq!(read(folder.path()).unwrap(), ["one", "一\n二", "two", "three"]);
        let names: Vec<_> = list(&domain(folder.path()))
            .unwrap()
            .into_iter()
            .map(|f| f.name)
            .collect();
        assert_eq!(names, ["a.jsonl", "b/deep/x.md", "c.txt"]);
    }

    #[test]
    fn bad_input_is_named_by_file_and_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        let cases: [(&[u8], &str); 8] = [
            (b"{\"text\":\"a\"}\n{\"text\":\n", "a.jsonl:2: not a JSON object"),
            (b"[1]\n", "a.jsonl:1: not a JSON object"),
            (b"{\"text\":\"a\"} x\n", "a.jsonl:1: not a JSON object"),
            (
                b"{\"text\":\"a\",\"text\":\"b\"}\n",
                "a.jsonl:1: not a JSON object (the field 'text' occurs twice",
            ),
            (
                b"\n{\"body\":\"a\"}\n",
                "a.jsonl:2: has no field 'text'; set data.domains.text_field",
            ),
            (b"{\"text\":7}\n", "a.jsonl:1: the field 'text' is not a string"),
            (
                b"{\"text\":\"a\"}\n{\"text\":\"\xff\"}\n",
                "a.jsonl: invalid UTF-8 at byte 22 (line 2)",
            ),
            (b"{\"text\":\"\\ud800\"}\n", "a.jsonl:1: not a JSON object"),
        ];
        for (bytes, message) in cases {
            std::fs::write(&path, bytes).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        let text = folder.path().join("a.txt");
        std::fs::write(&text, b"caf\xe9 au lait").unwrap();
        assert!(
            read(&text)
                .unwrap_err()
                .to_string()
                .contains("a.txt: invalid UTF-8 at byte 3;")
        );
        let missing = read(&folder.path().join("nowhere")).unwrap_err().to_string();
        assert!(missing.contains("no such file or folder (domain 'web')"), "{missing}");
        let empty = folder.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        assert!(matches!(read(&empty), Err(CorpusError::EmptyDomain { .. })));
    }

    #[test]
    fn a_file_that_changes_meanwhile_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, "one").unwrap();
        let files = list(&domain(&path)).unwrap();
        files[0].check_unchanged().unwrap();
        std::fs::write(&path, "three").unwrap();
        assert!(matches!(
            files[0].check_unchanged(),
            Err(CorpusError::SourceChanged { .. })
        ));
    }
}
