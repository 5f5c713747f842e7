//! Where documents come from: files and folders of JSON lines, parquet or plain text, in a fixed order.

use crate::error::CorpusError;
use crate::input::{self, Packing};
use crate::parquet_source;
use crate::refine::Dropped;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor};
use std::fmt;
use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;
use tarazed_domain::config::{DomainConfig, SourceFormat};

/// Bytes of one document.
pub(crate) const DOCUMENT_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// What of a line of JSON is not its text, at most; texts are allowed two bytes for each of theirs, as escaped Han need it.
const LINE_BYTES_BESIDE_TEXT: u64 = 64 * 1024;
/// Times as many bytes as a packed file has, its text is taken to have.
const UNPACKED_PER_PACKED_BYTE: u64 = 4;
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

/// One document as it lies in its file: reading it further takes time, and may fail for it alone.
#[derive(Debug)]
pub(crate) struct RawDocument {
    pub(crate) content: RawContent,
    /// Line or row in its file, from 1.
    pub(crate) record: u64,
}

/// What lies in the file.
#[derive(Debug)]
pub(crate) enum RawContent {
    /// A line of JSON.
    Line(Vec<u8>),
    /// The text itself.
    Text(Vec<u8>),
    /// More bytes than are read.
    TooLarge,
}

impl RawContent {
    /// Bytes held.
    pub(crate) const fn bytes(&self) -> &[u8] {
        match self {
            Self::Line(bytes) | Self::Text(bytes) => bytes.as_slice(),
            Self::TooLarge => &[],
        }
    }

    /// The text, or why there is none.
    pub(crate) fn text(self, field: &str, bytes_max: u64) -> Result<String, (Dropped, String)> {
        let utf8 = |bytes: Vec<u8>| {
            String::from_utf8(bytes).map_err(|e| {
                (
                    Dropped::InvalidUtf8,
                    format!("at byte {}", e.utf8_error().valid_up_to()),
                )
            })
        };
        let text = match self {
            Self::TooLarge => return Err((Dropped::TooLarge, format!("more than {bytes_max} bytes"))),
            Self::Text(bytes) => utf8(bytes)?,
            Self::Line(bytes) => {
                let line = utf8(bytes)?;
                match text_field(line.trim_start_matches('\u{feff}'), field) {
                    Ok(Field::Text(text)) => text,
                    Ok(Field::NotText) => return Err((Dropped::NoText, format!("'{field}' is not a string"))),
                    Ok(Field::Absent) => return Err((Dropped::NoText, format!("no field '{field}'"))),
                    Err(e) => return Err((Dropped::BadRecord, e.to_string())),
                }
            }
        };
        if text.len() as u64 > bytes_max {
            return Err((Dropped::TooLarge, format!("{} bytes", text.len())));
        }
        Ok(text)
    }
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
        if domain.format == SourceFormat::Megatron {
            let index = root.with_extension("idx");
            files.push(source_file(&index, crate::files::file_name(&index), domain.format)?);
        }
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
        SourceFormat::Auto => match Packing::of(path) {
            (_, Some("jsonl" | "ndjson")) => SourceFormat::Jsonl,
            (Packing::Plain, Some("parquet")) => SourceFormat::Parquet,
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
    /// Bytes of its text, or about so many where it is packed.
    pub(crate) fn text_bytes_about(&self) -> u64 {
        match Packing::of(&self.path).0 {
            Packing::Plain => self.bytes,
            Packing::Gzip | Packing::Zstandard => self.bytes * UNPACKED_PER_PACKED_BYTE,
        }
    }

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
            SourceFormat::Megatron | SourceFormat::Llmc => Err(CorpusError::TokensWithoutText {
                path: self.path.clone(),
                purpose: "to train a tokenizer on",
                remedy: "set data.tokenizer.path to the tokenizer.json that the tokens were made with",
            }),
        }
    }

    /// Hands every document to `sink` as it lies in the file, in the file's order, until that says false. Documents of more
    /// than `bytes_max` bytes of text are named and passed over; `read` counts bytes of the file.
    ///
    /// # Errors
    /// What makes the whole file unreadable, or the sink's own error.
    pub(crate) fn raw_documents(
        &self,
        text_field: &str,
        bytes_max: u64,
        read: &AtomicU64,
        sink: &mut dyn FnMut(RawDocument) -> Result<bool, CorpusError>,
    ) -> Result<(), CorpusError> {
        match self.format {
            SourceFormat::Jsonl => self.raw_lines(2 * bytes_max + LINE_BYTES_BESIDE_TEXT, read, sink),
            SourceFormat::Parquet => {
                parquet_source::values(&self.path, text_field, &mut |record, bytes| {
                    let content = if bytes.len() as u64 > bytes_max {
                        RawContent::TooLarge
                    } else {
                        RawContent::Text(bytes.to_vec())
                    };
                    sink(RawDocument { content, record })
                })?;
                read.fetch_add(self.bytes, Ordering::Relaxed);
                Ok(())
            }
            SourceFormat::Text | SourceFormat::Auto => {
                let mut bytes = Vec::new();
                input::open(&self.path, Some(read))
                    .map(|file| file.take(bytes_max + 1))?
                    .read_to_end(&mut bytes)
                    .map_err(CorpusError::unreadable(&self.path))?;
                let content = if bytes.len() as u64 > bytes_max {
                    RawContent::TooLarge
                } else {
                    RawContent::Text(bytes)
                };
                sink(RawDocument { content, record: 1 }).map(drop)
            }
            SourceFormat::Megatron | SourceFormat::Llmc => Err(CorpusError::tokens_to_refine(&self.path)),
        }
    }

    fn raw_lines(
        &self,
        bytes_max: u64,
        read: &AtomicU64,
        sink: &mut dyn FnMut(RawDocument) -> Result<bool, CorpusError>,
    ) -> Result<(), CorpusError> {
        let mut reader = input::open(&self.path, Some(read))?;
        for record in 1.. {
            let mut line = Vec::new();
            let count = (&mut reader)
                .take(bytes_max + 1)
                .read_until(b'\n', &mut line)
                .map_err(CorpusError::unreadable(&self.path))?;
            if count == 0 {
                break;
            }
            let content = if count as u64 > bytes_max && line.last() != Some(&b'\n') {
                skip_line(&mut reader).map_err(CorpusError::unreadable(&self.path))?;
                RawContent::TooLarge
            } else if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            } else {
                RawContent::Line(line)
            };
            if !sink(RawDocument { content, record })? {
                break;
            }
        }
        Ok(())
    }

    fn text(&self, sink: &mut dyn FnMut(Document) -> Result<(), CorpusError>) -> Result<(), CorpusError> {
        let mut bytes = Vec::with_capacity(self.bytes.min(DOCUMENT_BYTES_MAX) as usize);
        input::open(&self.path, None)?
            .take(DOCUMENT_BYTES_MAX + 1)
            .read_to_end(&mut bytes)
            .map_err(CorpusError::unreadable(&self.path))?;
        if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
            return Err(self.too_large("it".to_owned()));
        }
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
        let mut reader = input::open(&self.path, None)?;
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
        let parsed = text_field(line, field);
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

/// One string of a line of JSON.
fn text_field(line: &str, field: &str) -> Result<Field, serde_json::Error> {
    let mut json = serde_json::Deserializer::from_str(line);
    let value = TextField { field }.deserialize(&mut json)?;
    json.end().map(|()| value)
}

/// Passes over the rest of a line without keeping it.
fn skip_line(reader: &mut dyn BufRead) -> std::io::Result<()> {
    loop {
        let buffer = reader.fill_buf()?;
        let (count, is_done) = match buffer.iter().position(|&b| b == b'\n') {
            Some(at) => (at + 1, true),
            None => (buffer.len(), buffer.is_empty()),
        };
        reader.consume(count);
        if is_done {
            return Ok(());
        }
    }
}

/// All lines of a small file, packed or not.
///
/// # Errors
/// [`CorpusError::Unreadable`], also where it is not UTF-8.
pub(crate) fn read_lines(path: &Path) -> Result<Vec<String>, CorpusError> {
    let mut text = String::new();
    input::open(path, None)?
        .read_to_string(&mut text)
        .map_err(CorpusError::unreadable(path))?;
    Ok(without_mark(text).lines().map(str::to_owned).collect())
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

    /// What is wrong with one document is that document's alone, when it is read as it lies.
    #[test]
    fn raw_documents_are_wrong_one_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        let long = "x".repeat(500);
        let huge = "x".repeat(2 * 400 + LINE_BYTES_BESIDE_TEXT as usize);
        let lines: Vec<Vec<u8>> = vec![
            "\u{feff}{\"text\":\"one\"}".into(),
            b"".to_vec(),
            b"{\"text\":\"caf\xe9\"}".to_vec(),
            b"not JSON".to_vec(),
            b"{\"body\":\"a\"}".to_vec(),
            format!("{{\"text\":\"{long}\"}}").into_bytes(),
            format!("{{\"text\":\"{huge}\"}}").into_bytes(),
            "{\"text\":\"二\"}".into(),
        ];
        std::fs::write(&path, lines.join(&b'\n')).unwrap();
        let mut found = Vec::new();
        let read = AtomicU64::new(0);
        list(&domain(&path)).unwrap()[0]
            .raw_documents("text", 400, &read, &mut |raw| {
                found.push((raw.record, raw.content.text("text", 400).map_err(|(rule, _)| rule)));
                Ok(true)
            })
            .unwrap();
        let expected = [
            (1, Ok("one".to_owned())),
            (3, Err(Dropped::InvalidUtf8)),
            (4, Err(Dropped::BadRecord)),
            (5, Err(Dropped::NoText)),
            (6, Err(Dropped::TooLarge)),
            (7, Err(Dropped::TooLarge)),
            (8, Ok("二".to_owned())),
        ];
        assert_eq!(found, expected);
        assert_eq!(read.into_inner(), std::fs::metadata(&path).unwrap().len());
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
