//! The documents of a domain as they stand in its sources: for programs that make other domains of them.

use crate::error::CorpusError;
use crate::source;
use tarazed_domain::config::DomainConfig;

/// One document of a source file, nothing left out and nothing changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SourceText {
    /// Name of the file, relative to the domain's path.
    pub file: String,
    /// Its line or row in that file, from 1.
    pub record: u64,
    /// The text.
    pub text: String,
}

/// Every document of a domain, in the order in which a data set is made of them. Empty ones and copies are among them.
///
/// # Errors
/// A [`CorpusError`] naming the file; also where one changes meanwhile.
pub fn each_text(domain: &DomainConfig, sink: &mut dyn FnMut(SourceText)) -> Result<(), CorpusError> {
    for file in source::list(domain)? {
        file.documents(&domain.text_field, &mut |document| {
            sink(SourceText {
                file: file.name.clone(),
                record: document.record,
                text: document.text,
            });
            Ok(())
        })?;
        file.check_unchanged()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tarazed_domain::config::{Language, SourceFormat};

    #[test]
    fn documents_come_in_order_and_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("b.jsonl"), "{\"text\":\"three\"}\n").unwrap();
        std::fs::write(
            folder.path().join("a.jsonl"),
            "{\"text\":\" one\"}\n\n{\"text\":\" one\"}\n{\"text\":\"\"}\n",
        )
        .unwrap();
        let domain = DomainConfig {
            name: "web".to_owned(),
            path: folder.path().to_owned(),
            format: SourceFormat::Auto,
            language: Language::En,
            weight: 1.0,
            text_field: "text".to_owned(),
        };
        let mut found = Vec::new();
        each_text(&domain, &mut |text| found.push((text.file, text.record, text.text))).unwrap();
        let expected = [
            ("a.jsonl", 1, " one"),
            ("a.jsonl", 3, " one"),
            ("a.jsonl", 4, ""),
            ("b.jsonl", 1, "three"),
        ];
        let expected = expected.map(|(file, record, text)| (file.to_owned(), record, text.to_owned()));
        assert_eq!(found, expected);
    }
}
