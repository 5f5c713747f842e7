//! Megatron's indexed data set: tokens of all sequences in `NAME.bin`, and in `NAME.idx` where they are.
//!
//! ```text
//! 0    "MMIDIDX\0\0"                         34            lengths of sequences in tokens: i32 each
//! 9    version u64: 1                        … + 4 S       their first bytes in .bin: i64 each
//! 17   type u8: 8 is u16, 4 is i32           … + 8 S       for each document its first sequence, and S at the end: i64 each
//! 18   sequences S u64                       … + 8 D       (with images: a mode of each sequence, u8)
//! 26   entries of the document table D u64
//! ```

use super::{Column, DOCUMENT_TOKENS_MAX, bad};
use crate::error::CorpusError;
use crate::files::HashingFile;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
const VERSION: u64 = 1;
const HEADER_BYTES: u64 = 34;
const U16: u8 = 8;
const I32: u8 = 4;

struct Index {
    path: PathBuf,
    width: usize,
    sequences: u64,
    documents: u64,
}

impl Index {
    /// Reads the header, and checks it against the lengths of both files.
    fn open(bin: &Path) -> Result<Self, CorpusError> {
        let path = bin.with_extension("idx");
        let length = std::fs::metadata(&path).map_err(CorpusError::unreadable(&path))?.len();
        if length < HEADER_BYTES {
            return Err(bad(&path, format!("{length} bytes are no header")));
        }
        let mut header = Column::open(&path, 0)?;
        if &header.bytes::<9>(&path)? != MAGIC {
            return Err(bad(&path, "wrong magic".to_owned()));
        }
        let version = u64::from_le_bytes(header.bytes(&path)?);
        if version != VERSION {
            return Err(bad(
                &path,
                format!("version {version}, and this program reads {VERSION}"),
            ));
        }
        let [kind] = header.bytes(&path)?;
        let width = match kind {
            U16 => 2,
            I32 => 4,
            other => {
                return Err(bad(
                    &path,
                    format!("numbers of type {other}; tokens are of 8 (u16) or 4 (i32)"),
                ));
            }
        };
        let index = Self {
            width,
            sequences: u64::from_le_bytes(header.bytes(&path)?),
            documents: u64::from_le_bytes(header.bytes(&path)?),
            path,
        };
        let tables = |modes: u64| {
            let of_sequences = index.sequences.checked_mul(12 + modes)?;
            let of_documents = index.documents.checked_mul(8)?;
            HEADER_BYTES.checked_add(of_sequences)?.checked_add(of_documents)
        };
        if index.documents == 0 || ![tables(0), tables(1)].contains(&Some(length)) {
            let reason = format!(
                "{length} bytes do not hold {} sequences and {} entries of documents",
                index.sequences, index.documents
            );
            return Err(bad(&index.path, reason));
        }
        Ok(index)
    }

    /// The three tables.
    fn tables(&self) -> Result<[Column; 3], CorpusError> {
        let lengths = HEADER_BYTES;
        let places = lengths + 4 * self.sequences;
        Ok([
            Column::open(&self.path, lengths)?,
            Column::open(&self.path, places)?,
            Column::open(&self.path, places + 8 * self.sequences)?,
        ])
    }

    /// Walks all tables once: sequences follow each other in the file and fill it, documents follow each other and have all
    /// sequences.
    fn check(&self, bin: &Path) -> Result<(), CorpusError> {
        let [mut lengths, mut places, mut documents] = self.tables()?;
        let mut end = 0_u64;
        for sequence in 0..self.sequences {
            let length = i32::from_le_bytes(lengths.bytes(&self.path)?);
            let place = i64::from_le_bytes(places.bytes(&self.path)?);
            let Ok(length) = u64::try_from(length) else {
                return Err(bad(&self.path, format!("sequence {sequence} has {length} tokens")));
            };
            if u64::try_from(place) != Ok(end) {
                return Err(bad(
                    &self.path,
                    format!("sequence {sequence} begins at byte {place} instead of {end}"),
                ));
            }
            end += length * self.width as u64;
        }
        let length = std::fs::metadata(bin).map_err(CorpusError::unreadable(bin))?.len();
        if end != length {
            return Err(bad(bin, format!("{length} bytes instead of the {end} of its index")));
        }
        let mut last = 0;
        for document in 0..self.documents {
            let first = i64::from_le_bytes(documents.bytes(&self.path)?);
            let is_first = document > 0 || first == 0;
            match u64::try_from(first) {
                Ok(first) if is_first && (last..=self.sequences).contains(&first) => last = first,
                _ => {
                    return Err(bad(
                        &self.path,
                        format!("document {document} begins at sequence {first}"),
                    ));
                }
            }
        }
        if last != self.sequences {
            return Err(bad(
                &self.path,
                format!("{} sequences are in no document", self.sequences - last),
            ));
        }
        Ok(())
    }
}

/// Every document of `bin`, from 1.
pub(super) fn documents(
    bin: &Path,
    sink: &mut dyn FnMut(u64, Vec<u32>) -> Result<(), CorpusError>,
) -> Result<(), CorpusError> {
    let index = Index::open(bin)?;
    index.check(bin)?;
    let [mut lengths, _, mut documents] = index.tables()?;
    let mut tokens = Column::open(bin, 0)?;
    let mut first: u64 = u64::from_le_bytes(documents.bytes(&index.path)?);
    for document in 1..index.documents {
        let next = u64::from_le_bytes(documents.bytes(&index.path)?);
        let mut count = 0;
        for _ in first..next {
            count += u64::from(u32::from_le_bytes(lengths.bytes(&index.path)?));
        }
        if count > DOCUMENT_TOKENS_MAX {
            let reason = format!("document {document} has {count} tokens, and {DOCUMENT_TOKENS_MAX} are the most");
            return Err(bad(bin, reason));
        }
        sink(document, tokens.tokens(bin, count, index.width)?)?;
        first = next;
    }
    Ok(())
}

/// Writes documents as Megatron reads them, each one sequence. Keeps four bytes in memory for each document.
pub struct MegatronWriter {
    bin: HashingFile,
    index: PathBuf,
    width: usize,
    lengths: Vec<i32>,
}

impl MegatronWriter {
    /// Begins `prefix.bin`; `prefix.idx` follows at the end. Tokens take two bytes for vocabularies up to 65,500, as Megatron
    /// has it, else four.
    ///
    /// # Errors
    /// [`CorpusError::Write`], also where either file is there.
    pub fn create(prefix: &Path, vocabulary: usize) -> Result<Self, CorpusError> {
        let with = |ending: &str| {
            let mut name = prefix.as_os_str().to_owned();
            name.push(ending);
            PathBuf::from(name)
        };
        let index = with(".idx");
        if index.exists() {
            return Err(CorpusError::write(&index)(std::io::ErrorKind::AlreadyExists.into()));
        }
        Ok(Self {
            bin: HashingFile::create(&with(".bin"))?,
            index,
            width: if vocabulary < 65_500 { 2 } else { 4 },
            lengths: Vec::new(),
        })
    }

    /// Appends a document, with the token that ends it where it should have one.
    ///
    /// # Errors
    /// [`CorpusError::Write`].
    ///
    /// # Panics
    /// If a token is beyond the vocabulary, or the document beyond 2^31 tokens.
    pub fn push(&mut self, tokens: &[u32]) -> Result<(), CorpusError> {
        let mut bytes = Vec::with_capacity(tokens.len() * self.width);
        for &token in tokens {
            assert!(
                self.width == 4 || token <= u32::from(u16::MAX),
                "token {token} outside the vocabulary"
            );
            bytes.extend_from_slice(&token.to_le_bytes()[..self.width]);
        }
        assert!(i32::try_from(tokens.len()).is_ok(), "a document of 2^31 tokens");
        self.lengths.push(tokens.len() as i32);
        self.bin.write(&bytes)
    }

    /// Writes the index; both files are on disk then.
    ///
    /// # Errors
    /// [`CorpusError::Write`].
    pub fn finish(self) -> Result<(), CorpusError> {
        self.bin.finish()?;
        let mut index = HashingFile::create(&self.index)?;
        let count = self.lengths.len() as u64;
        index.write(MAGIC)?;
        index.write(&VERSION.to_le_bytes())?;
        index.write(&[if self.width == 2 { U16 } else { I32 }])?;
        index.write(&count.to_le_bytes())?;
        index.write(&(count + 1).to_le_bytes())?;
        for length in &self.lengths {
            index.write(&length.to_le_bytes())?;
        }
        let mut place = 0_i64;
        for length in &self.lengths {
            index.write(&place.to_le_bytes())?;
            place += i64::from(*length) * self.width as i64;
        }
        for document in 0..=count {
            index.write(&document.to_le_bytes())?;
        }
        index.finish().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(bin: &Path) -> Result<Vec<Vec<u32>>, CorpusError> {
        let mut found = Vec::new();
        documents(bin, &mut |record, tokens| {
            found.push(tokens);
            assert_eq!(record, found.len() as u64);
            Ok(())
        })?;
        Ok(found)
    }

    fn write(folder: &Path, texts: &[Vec<u32>], vocabulary: usize) -> PathBuf {
        let prefix = folder.join("a.train");
        let mut writer = MegatronWriter::create(&prefix, vocabulary).unwrap();
        texts.iter().for_each(|tokens| writer.push(tokens).unwrap());
        writer.finish().unwrap();
        folder.join("a.train.bin")
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn what_is_written_reads_back(texts in prop::collection::vec(prop::collection::vec(0..60_000_u32, 0..20), 0..20), wide in any::<bool>()) {
            let folder = tempfile::tempdir().unwrap();
            let bin = write(folder.path(), &texts, if wide { 100_008 } else { 60_000 });
            prop_assert_eq!(std::fs::metadata(&bin).unwrap().len() as usize, texts.concat().len() * if wide { 4 } else { 2 });
            prop_assert_eq!(read(&bin).unwrap(), texts);
        }

        /// Whatever is done to a byte of the index, it is read as something or refused, and never more than the file is read.
        #[test]
        fn a_damaged_index_is_survived(at in 0..200_usize, value in any::<u8>(), cut in 0..200_usize) {
            let folder = tempfile::tempdir().unwrap();
            let bin = write(folder.path(), &[vec![1, 2, 3], vec![], vec![4; 9]], 100);
            let index = bin.with_extension("idx");
            let whole = std::fs::read(&index).unwrap();
            let mut bytes = whole.clone();
            let at = at % bytes.len();
            bytes[at] = value;
            std::fs::write(&index, &bytes).unwrap();
            if bytes != whole {
                prop_assert!(read(&bin).is_err(), "byte {at} set to {value}");
            }
            std::fs::write(&index, &whole[..cut % whole.len()]).unwrap();
            prop_assert!(read(&bin).is_err());
        }
    }

    /// Bytes as Megatron's own program lays them out, by hand: two documents, the first of two sequences.
    #[test]
    fn a_document_may_have_several_sequences() {
        let folder = tempfile::tempdir().unwrap();
        let bin = folder.path().join("x.bin");
        std::fs::write(&bin, [1_u8, 0, 2, 0, 3, 0, 4, 0]).unwrap();
        let mut index = MAGIC.to_vec();
        index.extend(1_u64.to_le_bytes());
        index.push(8);
        index.extend(3_u64.to_le_bytes());
        index.extend(3_u64.to_le_bytes());
        [1_i32, 2, 1]
            .iter()
            .for_each(|length| index.extend(length.to_le_bytes()));
        [0_i64, 2, 6].iter().for_each(|place| index.extend(place.to_le_bytes()));
        [0_i64, 2, 3].iter().for_each(|first| index.extend(first.to_le_bytes()));
        std::fs::write(bin.with_extension("idx"), &index).unwrap();
        assert_eq!(read(&bin).unwrap(), [vec![1, 2, 3], vec![4]]);
        std::fs::write(&bin, [1_u8, 0, 2, 0]).unwrap();
        assert!(
            read(&bin)
                .unwrap_err()
                .to_string()
                .contains("4 bytes instead of the 8 of its index")
        );
    }
}
