//! llm.c's token files: a header of 256 i32 (magic, version, number of tokens, zeros), then tokens.
//!
//! Magic 20240520 with version 1 has two bytes a token (GPT-2's vocabulary), 20240801 with version 7 four (Llama 3's). Documents
//! are not marked but by the token that ends, or in these files begins, each: they are cut there.

use super::{Column, DOCUMENT_TOKENS_MAX, bad};
use crate::error::CorpusError;
use std::path::Path;

const HEADER_BYTES: u64 = 1024;
/// Magic, version, bytes of a token.
const KINDS: [(i32, i32, u64); 2] = [(20_240_520, 1, 2), (20_240_801, 7, 4)];
/// Tokens read at once.
const BLOCK_TOKENS: u64 = 64 * 1024;

/// Every document, from 1, cut at `end`.
pub(super) fn documents(
    path: &Path,
    end: u32,
    sink: &mut dyn FnMut(u64, Vec<u32>) -> Result<(), CorpusError>,
) -> Result<(), CorpusError> {
    let length = std::fs::metadata(path).map_err(CorpusError::unreadable(path))?.len();
    if length < HEADER_BYTES {
        return Err(bad(path, format!("{length} bytes are no header")));
    }
    let mut header = Column::open(path, 0)?;
    let mut number = || header.bytes(path).map(i32::from_le_bytes);
    let (magic, version, count) = (number()?, number()?, number()?);
    let kind = KINDS.iter().find(|(m, v, _)| (*m, *v) == (magic, version));
    let Some(&(_, _, width)) = kind else {
        return Err(bad(
            path,
            format!("magic {magic} with version {version} is not of llm.c's token files"),
        ));
    };
    let count = u64::try_from(count).map_err(|_| bad(path, format!("{count} tokens")))?;
    if length != HEADER_BYTES + count * width {
        return Err(bad(
            path,
            format!("{length} bytes do not hold {count} tokens of {width} bytes"),
        ));
    }
    let mut tokens = Column::open(path, HEADER_BYTES)?;
    let (mut left, mut record, mut document) = (count, 0, Vec::new());
    while left > 0 {
        let now = left.min(BLOCK_TOKENS);
        left -= now;
        for token in tokens.tokens(path, now, width as usize)? {
            if token != end {
                document.push(token);
                continue;
            }
            if !document.is_empty() {
                record += 1;
                sink(record, std::mem::take(&mut document))?;
            }
        }
        if document.len() as u64 > DOCUMENT_TOKENS_MAX {
            let reason = format!("more than {DOCUMENT_TOKENS_MAX} tokens without token {end}, which ends a document");
            return Err(bad(path, reason));
        }
    }
    if !document.is_empty() {
        sink(record + 1, document)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(magic: i32, version: i32, count: i32, tokens: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES as usize];
        for (slot, number) in bytes.chunks_exact_mut(4).zip([magic, version, count]) {
            slot.copy_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(tokens);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Vec<Vec<u32>>, CorpusError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        std::fs::write(&path, bytes).unwrap();
        let mut found = Vec::new();
        documents(&path, 9, &mut |_, tokens| {
            found.push(tokens);
            Ok(())
        })?;
        Ok(found)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Documents come back whether the mark stands before or behind them.
        #[test]
        fn documents_are_cut_at_their_mark(texts in prop::collection::vec(prop::collection::vec(10..500_u32, 1..30), 0..20), before in any::<bool>(), wide in any::<bool>()) {
            let mut tokens = Vec::new();
            for text in &texts {
                tokens.extend(before.then_some(9));
                tokens.extend(text);
                tokens.extend((!before).then_some(9));
            }
            let bytes: Vec<u8> = tokens.iter().flat_map(|token: &u32| token.to_le_bytes()[..if wide { 4 } else { 2 }].to_vec()).collect();
            let (magic, version) = if wide { (20_240_801, 7) } else { (20_240_520, 1) };
            prop_assert_eq!(read(&file(magic, version, tokens.len() as i32, &bytes)).unwrap(), texts);
        }
    }

    #[test]
    fn wrong_headers_are_refused_before_anything_is_read_by_them() {
        for (bytes, message) in [
            (vec![0; 10], "10 bytes are no header"),
            (file(20_240_520, 2, 1, &[1, 0]), "magic 20240520 with version 2"),
            (file(20_240_520, 1, 2, &[1, 0]), "do not hold 2 tokens"),
            (file(20_240_520, 1, -1, &[]), "-1 tokens"),
            (file(20_240_801, 7, i32::MAX, &[1, 0]), "do not hold 2147483647 tokens"),
        ] {
            let error = read(&bytes).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
