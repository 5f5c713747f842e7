//! How much text an evaluation scores: what turns its losses from nats per token into bits per byte.

use super::TokenStore;
use crate::documents::DocumentRecord;
use crate::error::CorpusError;
use crate::files::hash_file;
use crate::split::Split;
use std::io::BufRead;
use tarazed_domain::ids::DomainIndex;

/// The part of a domain's held-out text that an evaluation scores.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct ScoredText {
    /// Tokens that are targets.
    pub tokens: u64,
    /// UTF-8 bytes of the text behind them: `loss nats / ln 2 * tokens / text_bytes` are bits per byte. Of a document that is
    /// scored in part, the same share of its bytes as of its tokens.
    pub text_bytes: f64,
}

impl TokenStore {
    /// By domain, the text that an evaluation of the first `held_out_sequences_max` held-out sequences scores. Reads the
    /// index of documents: for reports, not for training.
    ///
    /// # Errors
    /// [`CorpusError::CorruptCache`] or [`CorpusError::Unreadable`], if an index is not what `data.json` says.
    pub fn scored_text(&self, held_out_sequences_max: u64) -> Result<Vec<ScoredText>, CorpusError> {
        self.by_domain(held_out_sequences_max, |domain, tokens| {
            let described = &self.manifest.domain(domain).documents;
            let path = self.folder.join(&described.name);
            let (bytes, hash) = hash_file(&path)?;
            if bytes != described.bytes || hash.to_hex().as_str() != described.blake3 {
                let reason = "its length or hash is not what data.json says";
                return Err(CorpusError::corrupt(&path, reason));
            }
            self.text_bytes(domain, tokens)
        })
    }

    /// The same, at the cost of that text alone: each index is read no further than it goes, so nobody has looked at its hash.
    /// For what is shown while a run begins and goes on.
    ///
    /// # Errors
    /// As [`TokenStore::scored_text`].
    pub fn scored_text_so_far(&self, held_out_sequences_max: u64) -> Result<Vec<ScoredText>, CorpusError> {
        self.by_domain(held_out_sequences_max, |domain, tokens| self.text_bytes(domain, tokens))
    }

    fn by_domain(
        &self,
        held_out_sequences_max: u64,
        text_bytes: impl Fn(DomainIndex, u64) -> Result<f64, CorpusError>,
    ) -> Result<Vec<ScoredText>, CorpusError> {
        (0..self.manifest.domains.len())
            .map(|index| {
                let domain = DomainIndex(index as u16);
                let sequences = self.sequences(domain, Split::HeldOut).min(held_out_sequences_max);
                let tokens = sequences * self.context as u64;
                let text_bytes = if tokens > 0 { text_bytes(domain, tokens)? } else { 0.0 };
                Ok(ScoredText { tokens, text_bytes })
            })
            .collect()
    }

    /// Bytes of the text behind the held-out tokens `1..=tokens`: the very first is no target. Documents lie in the order of
    /// the index, one behind the other.
    fn text_bytes(&self, domain: DomainIndex, tokens: u64) -> Result<f64, CorpusError> {
        let path = self.folder.join(&self.manifest.domain(domain).documents.name);
        let file = std::fs::File::open(&path).map_err(CorpusError::unreadable(&path))?;
        let (mut sum, mut covered) = (0.0, 0);
        for line in std::io::BufReader::new(file).lines() {
            let line = line.map_err(CorpusError::unreadable(&path))?;
            let record: DocumentRecord = serde_json::from_str(&line)
                .map_err(|e| CorpusError::corrupt(&path, format!("cannot be parsed ({e})")))?;
            let Some(kept) = record
                .kept
                .filter(|kept| kept.split == Split::HeldOut && kept.tokens > 0)
            else {
                continue;
            };
            if kept.start != covered {
                let reason = format!("its held-out documents leave a gap at token {covered}");
                return Err(CorpusError::corrupt(&path, reason));
            }
            covered = kept.start.saturating_add(kept.tokens);
            let first = kept.start.max(1);
            let last = covered.min(tokens.saturating_add(1));
            let scored = last.saturating_sub(first);
            sum += record.text_bytes as f64 * scored as f64 / kept.tokens as f64;
            if covered > tokens {
                return Ok(sum);
            }
        }
        let reason = format!("its held-out documents end at token {covered}, before {tokens}");
        Err(CorpusError::corrupt(&path, reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PrepareRequest, prepare};
    use tarazed_domain::config::{DomainConfig, Language, SourceFormat, TokenizerConfig};

    /// Documents of one letter each, so a token has the same bytes everywhere in a document.
    #[test]
    fn bytes_are_those_of_the_targets_that_are_scored() {
        const CONTEXT: usize = 16;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.jsonl");
        let text: String = (0..300)
            .map(|i| format!("{{\"text\":\"{}\"}}\n", "天a".repeat(5 + i % 7) + &i.to_string()))
            .collect();
        std::fs::write(&path, text).unwrap();
        let domains = [DomainConfig {
            name: "web".to_owned(),
            path,
            format: SourceFormat::Auto,
            language: Language::En,
            weight: 1.0,
            text_field: "text".to_owned(),
        }];
        let request = PrepareRequest {
            domains: &domains,
            tokenizer: &TokenizerConfig {
                path: None,
                vocabulary: 300,
                train_bytes_max: 1 << 20,
            },
            model_vocabulary: 300,
            held_out_fraction: 0.2,
            context: CONTEXT,
        };
        let prepared = prepare(&request, &folder.path().join("data"), &mut |_| ()).unwrap();
        let store = TokenStore::open(&prepared.folder, CONTEXT).unwrap();
        let whole = &prepared.manifest.domains[0].held_out;
        let all = store.scored_text(u64::MAX).unwrap()[0];
        assert_eq!(all.tokens, whole.sequences(CONTEXT) * CONTEXT as u64);
        // All but the first token and the unfinished sequence at the end: a few documents of some 40 bytes.
        let expected = whole.text_bytes as f64 * all.tokens as f64 / whole.tokens as f64;
        assert!(all.text_bytes < whole.text_bytes as f64);
        assert!((all.text_bytes - expected).abs() < 80.0, "{all:?} of {whole:?}");
        // The text is alike throughout, so a part of it has about its share of the bytes.
        let part = store.scored_text(3).unwrap()[0];
        assert_eq!(part.tokens, 3 * CONTEXT as u64);
        let expected = all.text_bytes * part.tokens as f64 / all.tokens as f64;
        assert!((part.text_bytes / expected - 1.0).abs() < 0.25, "{part:?}, {expected}");
        assert_eq!(store.scored_text(0).unwrap()[0], ScoredText::default());
        for sequences_max in [0, 1, 3, u64::MAX] {
            let whole = store.scored_text(sequences_max).unwrap();
            assert_eq!(
                store.scored_text_so_far(sequences_max).unwrap(),
                whole,
                "{sequences_max}"
            );
        }

        // What is not as it was written is no count: neither a gap in what is read nor, for reports, anything behind it.
        let index = prepared.folder.join(&prepared.manifest.domains[0].documents.name);
        let text = std::fs::read_to_string(&index).unwrap();
        let is_held_out = |line: &&str| {
            let record: DocumentRecord = serde_json::from_str(line).unwrap();
            record.kept.is_some_and(|kept| kept.split == Split::HeldOut)
        };
        let first = text.lines().find(is_held_out).unwrap();
        std::fs::write(&index, text.replacen(&format!("{first}\n"), "", 1)).unwrap();
        for refused in [store.scored_text(1), store.scored_text_so_far(1)] {
            assert!(matches!(refused, Err(CorpusError::CorruptCache { .. })), "{refused:?}");
        }
        let last = text.lines().next_back().unwrap();
        std::fs::write(&index, &text[..text.len() - last.len() - 1]).unwrap();
        assert!(store.scored_text(1).is_err() && store.scored_text_so_far(1).is_ok());
    }
}
