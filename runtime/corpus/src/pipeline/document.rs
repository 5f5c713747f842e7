//! Documents on their way through the pipeline: where they come from, what came of them, and how they lie in a piece.

use crate::error::CorpusError;
use crate::refine::{BenchmarkItem, Dropped, boundary_below};
use std::io::Read;
use std::path::Path;

/// Where a document comes from, in one number whose order is that of reading: domain, source file, record. Of copies, the one
/// with the smallest stays.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct DocumentId(pub(crate) u64);

const RECORD_BITS: u32 = 32;
const SOURCE_BITS: u32 = 22;
/// Source files of one domain.
pub(crate) const SOURCES_MAX: u64 = 1 << SOURCE_BITS;
/// Records of one source file.
pub(crate) const RECORDS_MAX: u64 = (1 << RECORD_BITS) - 1;
/// Domains; the config allows fewer.
const DOMAINS_MAX: u64 = 1 << (64 - SOURCE_BITS - RECORD_BITS);

impl DocumentId {
    /// # Panics
    /// If a part is beyond its limit, which the reader has checked.
    pub(crate) fn new(domain: usize, source: u32, record: u64) -> Self {
        assert!((domain as u64) < DOMAINS_MAX && u64::from(source) < SOURCES_MAX && record <= RECORDS_MAX);
        Self((domain as u64) << (SOURCE_BITS + RECORD_BITS) | u64::from(source) << RECORD_BITS | record)
    }

    pub(crate) const fn domain(self) -> usize {
        (self.0 >> (SOURCE_BITS + RECORD_BITS)) as usize
    }

    pub(crate) const fn source(self) -> u32 {
        ((self.0 >> RECORD_BITS) & (SOURCES_MAX - 1)) as u32
    }

    /// From 1.
    pub(crate) const fn record(self) -> u64 {
        self.0 & RECORDS_MAX
    }
}

/// A document as the pipeline hands it on.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Refined {
    pub(crate) id: DocumentId,
    /// The text, cleaned; of a document left out by itself, its beginning.
    pub(crate) text: String,
    /// Hash and length of its text as it came, or of its bytes where there was no text.
    pub(crate) original: [u8; 32],
    pub(crate) original_bytes: u64,
    /// Whether cleaning changed it.
    pub(crate) is_changed: bool,
    /// Why it is left out.
    pub(crate) dropped: Option<Reason>,
}

/// Why a document is left out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Reason {
    pub(crate) rule: Dropped,
    /// The figure that broke the rule, or what is wrong.
    pub(crate) detail: String,
    pub(crate) item: Option<BenchmarkItem>,
    /// The document that it is a copy of.
    pub(crate) copy_of: Option<DocumentId>,
}

/// Bytes of a record without its texts.
const HEAD_BYTES: usize = 8 + 8 + 32 + 1 + 1 + 4 + 4 + 4 + 2;
const DETAIL_BYTES_MAX: usize = 1024;

impl Refined {
    /// Appends the document as it lies in a piece: little-endian, lengths first.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let reason = self.dropped.as_ref();
        // One more than the position of the rule: files in which they stand otherwise have another recipe.
        let rule = reason.map_or(0, |reason| {
            1 + Dropped::ALL.iter().position(|&rule| rule == reason.rule).unwrap_or(0) as u8
        });
        let item = reason
            .and_then(|reason| reason.item)
            .map_or((0, 0), |item| (item.set, item.line));
        let detail = reason.map_or("", |reason| reason.detail.as_str());
        let detail = &detail[..boundary_below(detail, DETAIL_BYTES_MAX)];
        out.extend_from_slice(&self.id.0.to_le_bytes());
        out.extend_from_slice(&self.original_bytes.to_le_bytes());
        out.extend_from_slice(&self.original);
        out.extend_from_slice(&[rule, u8::from(self.is_changed)]);
        out.extend_from_slice(&item.0.to_le_bytes());
        out.extend_from_slice(&item.1.to_le_bytes());
        out.extend_from_slice(&(self.text.len() as u32).to_le_bytes());
        out.extend_from_slice(&(detail.len() as u16).to_le_bytes());
        out.extend_from_slice(self.text.as_bytes());
        out.extend_from_slice(detail.as_bytes());
    }

    /// Reads one document.
    ///
    /// # Errors
    /// [`CorpusError::CorruptCache`].
    pub(crate) fn decode(path: &Path, from: &mut impl Read) -> Result<Self, CorpusError> {
        let corrupt = |e: std::io::Error| CorpusError::corrupt(path, format!("cannot be read ({e})"));
        let mut head = [0; HEAD_BYTES];
        from.read_exact(&mut head).map_err(corrupt)?;
        let (id, rest) = take::<8>(&head);
        let (original_bytes, rest) = take::<8>(rest);
        let (original, rest) = take::<32>(rest);
        let ([rule, is_changed], rest) = take::<2>(rest);
        let (set, rest) = take::<4>(rest);
        let (line, rest) = take::<4>(rest);
        let (text_bytes, rest) = take::<4>(rest);
        let (detail_bytes, _) = take::<2>(rest);
        let mut string = |bytes: usize| {
            let mut text = vec![0; bytes];
            from.read_exact(&mut text).map_err(corrupt)?;
            String::from_utf8(text).map_err(|_| CorpusError::corrupt(path, "holds a text that is not UTF-8"))
        };
        let text = string(u32::from_le_bytes(text_bytes) as usize)?;
        let detail = string(usize::from(u16::from_le_bytes(detail_bytes)))?;
        let line = u32::from_le_bytes(line);
        let dropped = match rule {
            0 => None,
            number => {
                let rule = Dropped::ALL.get(usize::from(number) - 1).copied();
                Some(Reason {
                    rule: rule.ok_or_else(|| CorpusError::corrupt(path, "names a rule that there is not"))?,
                    detail,
                    item: (line > 0).then(|| BenchmarkItem {
                        set: u32::from_le_bytes(set),
                        line,
                    }),
                    copy_of: None,
                })
            }
        };
        Ok(Self {
            id: DocumentId(u64::from_le_bytes(id)),
            text,
            original,
            original_bytes: u64::from_le_bytes(original_bytes),
            is_changed: is_changed != 0,
            dropped,
        })
    }
}

/// The first bytes of a head, and what follows. The head's length is the sum of its fields'.
fn take<const N: usize>(bytes: &[u8]) -> ([u8; N], &[u8]) {
    let (field, rest) = bytes.split_at(N);
    let mut taken = [0; N];
    taken.copy_from_slice(field);
    (taken, rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Identifiers keep their parts, and their order is that of the parts.
        #[test]
        fn identifiers_are_ordered_places(
            a in (0..256_usize, 0..SOURCES_MAX as u32, 0..=RECORDS_MAX),
            b in (0..256_usize, 0..SOURCES_MAX as u32, 0..=RECORDS_MAX),
        ) {
            let id = DocumentId::new(a.0, a.1, a.2);
            prop_assert_eq!((id.domain(), id.source(), id.record()), a);
            prop_assert_eq!(id.cmp(&DocumentId::new(b.0, b.1, b.2)), a.cmp(&b));
        }

        /// Documents read back as they were written, one after another.
        #[test]
        fn documents_read_back(
            texts in prop::collection::vec((any::<String>(), any::<u32>(), any::<bool>(), 0..Dropped::ALL.len() * 2, ".{0,40}"), 0..6),
        ) {
            let documents: Vec<Refined> = texts.into_iter().map(|(text, number, is_changed, rule, detail)| Refined {
                id: DocumentId(u64::from(number)),
                original: *blake3::hash(text.as_bytes()).as_bytes(),
                original_bytes: text.len() as u64,
                text,
                is_changed,
                dropped: Dropped::ALL.get(rule).map(|&rule| Reason {
                    rule,
                    detail,
                    item: (number % 2 == 1).then_some(BenchmarkItem { set: 3, line: number }),
                    copy_of: None,
                }),
            }).collect();
            let mut bytes = Vec::new();
            documents.iter().for_each(|document| document.encode(&mut bytes));
            let mut rest = bytes.as_slice();
            for document in documents {
                prop_assert_eq!(Refined::decode(Path::new("x"), &mut rest).unwrap(), document);
            }
            prop_assert!(rest.is_empty());
            // A file that ends early is an error.
            if !bytes.is_empty() {
                let mut cut = &bytes[..bytes.len() - 1];
                let last = std::iter::from_fn(|| Some(Refined::decode(Path::new("x"), &mut cut))).find(Result::is_err);
                prop_assert!(last.is_some());
            }
        }
    }
}
