//! Token files of other programs, read as they are and written: Megatron's `.bin` with `.idx`, and llm.c's `.bin`
//! (docs/FORMATS.md). Every size in a header is checked against the files before anything is read by it.

mod llmc;
mod megatron;

pub use megatron::MegatronWriter;

use crate::error::CorpusError;
use crate::source::SourceFile;
use crate::tokenizer::Tokenizer;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use tarazed_domain::config::SourceFormat;

/// Tokens of one document; a longer one is refused.
const DOCUMENT_TOKENS_MAX: u64 = 64 << 20;
const BUFFER_BYTES: usize = 1 << 20;

/// Hands the tokens of every document of a file to `sink`, numbered from 1, without the token that ends it. Documents without
/// tokens are handed on empty.
///
/// # Errors
/// [`CorpusError::BadTokens`] where the file is not what its header says, or holds a token that the tokenizer has not.
pub(crate) fn documents(
    file: &SourceFile,
    tokenizer: &Tokenizer,
    sink: &mut dyn FnMut(u64, Vec<u32>) -> Result<(), CorpusError>,
) -> Result<(), CorpusError> {
    let (vocabulary, end) = (tokenizer.vocabulary(), tokenizer.end_of_document());
    let path = &file.path;
    let mut checked = |record: u64, mut tokens: Vec<u32>| {
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
            let reason = format!("document {record} holds token {token}, and the tokenizer has {vocabulary} entries");
            return Err(bad(path, reason));
        }
        if tokens.last() == Some(&end) {
            tokens.pop();
        }
        sink(record, tokens)
    };
    match (file.format, path.extension().and_then(|ending| ending.to_str())) {
        (SourceFormat::Llmc, _) => llmc::documents(path, end, &mut checked),
        (_, Some("bin")) => megatron::documents(path, &mut checked),
        // Read with its `.bin`.
        (_, Some("idx")) => Ok(()),
        _ => Err(bad(path, "is neither .bin nor .idx".to_owned())),
    }
}

fn bad(path: &Path, reason: String) -> CorpusError {
    CorpusError::BadTokens {
        path: path.to_owned(),
        reason,
    }
}

/// A part of a file, read front to back.
struct Column {
    file: BufReader<File>,
}

impl Column {
    fn open(path: &Path, offset: u64) -> Result<Self, CorpusError> {
        let mut file = File::open(path).map_err(CorpusError::unreadable(path))?;
        file.seek(SeekFrom::Start(offset))
            .map_err(CorpusError::unreadable(path))?;
        Ok(Self {
            file: BufReader::with_capacity(BUFFER_BYTES, file),
        })
    }

    fn bytes<const N: usize>(&mut self, path: &Path) -> Result<[u8; N], CorpusError> {
        let mut bytes = [0; N];
        self.file
            .read_exact(&mut bytes)
            .map_err(CorpusError::unreadable(path))?;
        Ok(bytes)
    }

    /// `count` tokens of `width` bytes each.
    fn tokens(&mut self, path: &Path, count: u64, width: usize) -> Result<Vec<u32>, CorpusError> {
        let mut bytes = vec![0; count as usize * width];
        self.file
            .read_exact(&mut bytes)
            .map_err(CorpusError::unreadable(path))?;
        let token = |raw: &[u8]| match *raw {
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => unreachable!("two or four bytes, by the header"),
        };
        Ok(bytes.chunks_exact(width).map(token).collect())
    }
}
