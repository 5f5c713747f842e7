//! What token frequencies alone give on the text that an evaluation scores.
//!
//! `data.json` holds that figure for *all* held-out text. An evaluation scores the first few sequences of each domain, so a
//! comparison with its losses needs the figure of those sequences, target by target: it is computed here, when asked for,
//! from the tokens themselves.

use crate::entropy::Unigram;
use crate::error::CorpusError;
use crate::split::Split;
use crate::store::TokenStore;
use std::collections::BTreeMap;
use tarazed_domain::config::Language;
use tarazed_domain::ids::DomainIndex;

/// Training tokens of one language that are counted. Of a longer text every n-th sequence of each of its domains is taken:
/// frequencies are as good, and the end of a run does not read its whole data set.
const COUNTED_TOKENS_MAX: u64 = 32 * 1024 * 1024;

/// A loss that token frequencies alone give.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct UnigramLoss {
    /// Mean over the tokens, in nats per token.
    pub loss: f64,
    /// Targets that it was taken over.
    pub tokens: u64,
}

impl TokenStore {
    /// By domain, the loss of the first `held_out_sequences_max` held-out sequences, which are those that an evaluation
    /// scores, under the add-one smoothed token frequencies of the training text of the domain's language. None for a domain
    /// without a held-out sequence.
    ///
    /// # Errors
    /// [`CorpusError::CorruptCache`] if tokens cannot be read or fail their hash.
    pub fn unigram_losses(&self, held_out_sequences_max: u64) -> Result<Vec<Option<UnigramLoss>>, CorpusError> {
        self.unigram_losses_from(held_out_sequences_max, COUNTED_TOKENS_MAX)
    }

    fn unigram_losses_from(
        &self,
        held_out_sequences_max: u64,
        counted_tokens_max: u64,
    ) -> Result<Vec<Option<UnigramLoss>>, CorpusError> {
        let training = self.training_frequencies(counted_tokens_max)?;
        self.domains()
            .map(|(domain, language)| {
                let count = self.sequences(domain, Split::HeldOut).min(held_out_sequences_max);
                let targets = self.count(domain, Split::HeldOut, 0..count, |sequence| &sequence[1..])?;
                let loss = training[&language].cross_entropy_nats(&targets);
                Ok(loss.map(|loss| UnigramLoss {
                    loss,
                    tokens: count * self.context() as u64,
                }))
            })
            .collect()
    }

    /// Token counts of each language's training text, or of an even sample of it.
    fn training_frequencies(&self, counted_tokens_max: u64) -> Result<BTreeMap<Language, Unigram>, CorpusError> {
        let mut tokens: BTreeMap<Language, u64> = BTreeMap::new();
        for (domain, language) in self.domains() {
            *tokens.entry(language).or_default() += self.manifest().domain(domain).split(Split::Train).tokens;
        }
        let vocabulary = self.manifest().tokenizer.vocabulary;
        let mut counts: BTreeMap<Language, Unigram> = BTreeMap::new();
        for (domain, language) in self.domains() {
            let every = tokens[&language].div_ceil(counted_tokens_max).max(1) as usize;
            let sequences = (0..self.sequences(domain, Split::Train)).step_by(every);
            // Neighbours share a token, the last target of one being the first input of the next: inputs alone are counted.
            let found = self.count(domain, Split::Train, sequences, |sequence| &sequence[..self.context()])?;
            counts
                .entry(language)
                .or_insert_with(|| Unigram::new(vocabulary))
                .merge(&found);
        }
        Ok(counts)
    }

    fn domains(&self) -> impl Iterator<Item = (DomainIndex, Language)> {
        let domains = self.manifest().domains.iter().enumerate();
        domains.map(|(index, domain)| (DomainIndex(index as u16), domain.language))
    }

    fn count(
        &self,
        domain: DomainIndex,
        split: Split,
        sequences: impl Iterator<Item = u64>,
        part: impl Fn(&[u32]) -> &[u32],
    ) -> Result<Unigram, CorpusError> {
        let mut counts = Unigram::new(self.manifest().tokenizer.vocabulary);
        let mut sequence = vec![0; self.context() + 1];
        for index in sequences {
            self.fill(domain, split, index, &mut sequence)?;
            counts.add(part(&sequence));
        }
        Ok(counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PrepareRequest, prepare};
    use tarazed_domain::config::{DomainConfig, SourceFormat, TokenizerConfig};

    const CONTEXT: usize = 16;

    /// Three domains in two languages; `texts` are JSON lines. Some documents are held out, whichever they are.
    fn store(folder: &std::path::Path, texts: [(&str, Language, Vec<String>); 3]) -> TokenStore {
        let domains = texts.map(|(name, language, texts)| {
            let path = folder.join(format!("{name}.jsonl"));
            let line = |text: &String| serde_json::json!({ "text": text }).to_string() + "\n";
            std::fs::write(&path, texts.iter().map(line).collect::<String>()).unwrap();
            DomainConfig {
                name: name.to_owned(),
                path,
                format: SourceFormat::Auto,
                language,
                weight: 1.0,
                text_field: "text".to_owned(),
            }
        });
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
        let prepared = prepare(&request, &folder.join("data"), &mut |_| ()).unwrap();
        TokenStore::open(&prepared.folder, CONTEXT).unwrap()
    }

    /// The text drifts: later documents hold letters that earlier ones do not.
    fn drifting(seed: u32, alphabet: &str) -> Vec<String> {
        let letters: Vec<char> = alphabet.chars().collect();
        let letter = |document: u32, i: u32| {
            let late = (document as usize * letters.len()) / 200;
            letters[(i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 7) as usize % (late + 2).min(letters.len())]
        };
        (0..200)
            .map(|document| (0..60).map(|i| letter(document, document * 60 + i)).collect())
            .collect()
    }

    fn fixture(folder: &std::path::Path) -> TokenStore {
        let en = Language::En;
        let texts = [
            ("web", en, drifting(1, "abcdefghijklmnop")),
            ("zh", Language::Zh, drifting(5, "天地玄黄宇宙洪荒")),
            ("book", en, drifting(9, "ponmlkjihgfe xyz")),
        ];
        store(folder, texts)
    }

    /// By hand: counts in floats, target by target, over the sequences that an evaluation reads.
    fn expected(store: &TokenStore, domain: DomainIndex, sequences_max: u64, every: usize) -> (f64, u64) {
        let manifest = store.manifest();
        let mut counts = vec![1.0_f64; manifest.tokenizer.vocabulary];
        let mut sequence = vec![0; CONTEXT + 1];
        for (index, other) in manifest.domains.iter().enumerate() {
            if other.language == manifest.domain(domain).language {
                let other = DomainIndex(index as u16);
                for index in (0..store.sequences(other, Split::Train)).step_by(every) {
                    store.fill(other, Split::Train, index, &mut sequence).unwrap();
                    sequence[..CONTEXT]
                        .iter()
                        .for_each(|token| counts[*token as usize] += 1.0);
                }
            }
        }
        let total: f64 = counts.iter().sum();
        let (mut sum, mut tokens) = (0.0, 0);
        for index in 0..store.sequences(domain, Split::HeldOut).min(sequences_max) {
            store.fill(domain, Split::HeldOut, index, &mut sequence).unwrap();
            for target in &sequence[1..] {
                sum -= (counts[*target as usize] / total).ln();
                tokens += 1;
            }
        }
        (sum / tokens as f64, tokens)
    }

    #[test]
    fn the_baseline_is_of_the_sequences_that_are_scored() {
        let folder = tempfile::tempdir().unwrap();
        let store = fixture(folder.path());
        for sequences_max in [1, 3, 1_000_000] {
            let losses = store.unigram_losses(sequences_max).unwrap();
            assert_eq!(losses.len(), 3);
            for (index, found) in losses.into_iter().enumerate() {
                let found = found.unwrap();
                let (loss, tokens) = expected(&store, DomainIndex(index as u16), sequences_max, 1);
                assert_eq!(found.tokens, tokens, "domain {index}");
                assert!(
                    (found.loss - loss).abs() < 1e-9,
                    "domain {index}: {} and {loss}",
                    found.loss
                );
            }
        }
        // The figure of all held-out text is another, by far: it may not stand beside a loss of the first sequences.
        let whole = store.manifest().domains[0].unigram_entropy_nats.unwrap();
        let scored = store.unigram_losses(3).unwrap()[0].unwrap().loss;
        assert!((whole - scored).abs() > 0.1, "{whole} and {scored}");
        assert_eq!(store.unigram_losses(0).unwrap(), [None; 3]);
    }

    #[test]
    fn a_long_training_text_is_sampled_evenly() {
        let folder = tempfile::tempdir().unwrap();
        let store = fixture(folder.path());
        let tokens = |index: usize| store.manifest().domains[index].train.tokens;
        let every = (tokens(0) + tokens(2)).div_ceil(1_000) as usize;
        assert!(every > 2);
        let found = store.unigram_losses_from(5, 1_000).unwrap()[2].unwrap();
        let (loss, count) = expected(&store, DomainIndex(2), 5, every);
        assert_eq!(found.tokens, count);
        assert!((found.loss - loss).abs() < 1e-9, "{} and {loss}", found.loss);
    }
}
