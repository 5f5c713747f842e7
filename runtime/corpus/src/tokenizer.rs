//! Byte-level BPE: trained here in Aquila2's form, or loaded from any `tokenizer.json`.
//!
//! Form (Aquila2 report, arXiv 2408.07410, tokenizer section, and its public vocabulary): GPT-2's pre-tokenisation pattern
//! over `\p{L}` and `\p{N}`, no prefix space, `<|endoftext|>` at 0, the 256 bytes, the merges, and eight special tokens
//! last, `[CLS]` and `</s>` the very last two. Any text round-trips, as every byte is an entry.
//!
//! A special token is only ever made by the program: text that spells `</s>` is encoded as text.

use crate::error::CorpusError;
use std::path::Path;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, PreTokenizerWrapper};

/// Name of the tokenizer in a data set's folder.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// GPT-2's pattern.
const PATTERN: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const PAD: &str = "<|endoftext|>";
/// Aquila2's special tokens, in order; the last ends a document.
const SPECIALS: [&str; 8] = [
    "<|startofpiece|>",
    "<|endofpiece|>",
    "<|LDWANG|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "[CLS]",
    "</s>",
];
/// Names under which foreign tokenizers end a document, where no `tokenizer_config.json` says.
const ENDS: [&str; 5] = ["</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eot_id|>"];
/// Smallest vocabulary: pad, bytes, specials.
const VOCABULARY_MIN: usize = 1 + 256 + SPECIALS.len();
/// Longer texts are encoded in pieces, to bound memory.
const PIECE_BYTES: usize = 1 << 20;

/// A tokenizer and the facts about it that training needs.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocabulary: usize,
    end_of_document: u32,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocabulary", &self.vocabulary)
            .field("end_of_document", &self.end_of_document)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Loads a `tokenizer.json`. The token that ends a document is the `eos_token` of a `tokenizer_config.json` beside it,
    /// or the first of the usual names that it knows.
    ///
    /// # Errors
    /// [`CorpusError::Unreadable`] or [`CorpusError::Tokenizer`].
    pub fn load(path: &Path) -> Result<Self, CorpusError> {
        let bytes = std::fs::read(path).map_err(CorpusError::unreadable(path))?;
        let named = eos_of_config(path)?;
        Self::from_bytes(path, &bytes, |inner| match &named {
            Some(name) => inner.token_to_id(name).ok_or_else(|| CorpusError::Tokenizer {
                path: path.to_owned(),
                reason: format!("has no token '{name}', the eos_token of the tokenizer_config.json beside it"),
                remedy: "correct tokenizer_config.json",
            }),
            None => ENDS
                .iter()
                .find_map(|name| inner.token_to_id(name))
                .ok_or_else(|| CorpusError::Tokenizer {
                    path: path.to_owned(),
                    reason: format!("has none of the tokens that end a document ({})", ENDS.join(" ")),
                    remedy: "name it as eos_token in a tokenizer_config.json beside it",
                }),
        })
    }

    pub(crate) fn from_bytes(
        path: &Path,
        bytes: &[u8],
        end: impl FnOnce(&tokenizers::Tokenizer) -> Result<u32, CorpusError>,
    ) -> Result<Self, CorpusError> {
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| CorpusError::Tokenizer {
            path: path.to_owned(),
            reason: format!("cannot be read as a tokenizer ({e})"),
            remedy: "give a Hugging Face tokenizer.json, or leave data.tokenizer.path out to train one",
        })?;
        inner.set_encode_special_tokens(true);
        let end_of_document = end(&inner)?;
        // The highest id, not the number of entries: ids may have gaps, and the model needs a row for each.
        let highest = inner
            .get_vocab(true)
            .into_values()
            .max()
            .unwrap_or(0)
            .max(end_of_document);
        Ok(Self {
            inner,
            vocabulary: highest as usize + 1,
            end_of_document,
        })
    }

    /// Trains byte-level BPE on `texts`, at most `vocabulary` entries in all (fewer where the text has fewer pairs), and
    /// returns it with its `tokenizer.json`. Same texts in any order, same bytes, on any number of threads.
    ///
    /// # Errors
    /// [`CorpusError::Tokenizer`].
    pub fn train_bpe(texts: &[String], vocabulary: usize) -> Result<(Self, String), CorpusError> {
        let path = Path::new(TOKENIZER_FILE);
        let failed = |e: tokenizers::Error| CorpusError::Tokenizer {
            path: path.to_owned(),
            reason: format!("cannot be trained ({e})"),
            remedy: "check the domains' text",
        };
        if vocabulary < VOCABULARY_MIN {
            return Err(CorpusError::Tokenizer {
                path: path.to_owned(),
                reason: format!("{vocabulary} entries are too few for byte-level BPE"),
                remedy: "set data.tokenizer.vocabulary (or model.vocabulary) to at least 265: 256 bytes, 9 special tokens",
            });
        }
        let mut inner = tokenizers::Tokenizer::new(BPE::default());
        let split = Split::new(
            SplitPattern::Regex(PATTERN.to_owned()),
            SplitDelimiterBehavior::Isolated,
            false,
        )
        .map_err(failed)?;
        let bytes = ByteLevel::default()
            .add_prefix_space(false)
            .trim_offsets(false)
            .use_regex(false);
        let steps = vec![PreTokenizerWrapper::Split(split), PreTokenizerWrapper::ByteLevel(bytes)];
        inner.with_pre_tokenizer(Some(Sequence::new(steps)));
        inner.with_decoder(Some(bytes));
        let mut trainer = TrainerWrapper::BpeTrainer(
            BpeTrainer::builder()
                .show_progress(false)
                .vocab_size(vocabulary - SPECIALS.len())
                .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
                .special_tokens(vec![AddedToken::from(PAD, true)])
                .build(),
        );
        inner.train(&mut trainer, texts.iter()).map_err(failed)?;
        inner
            .add_special_tokens(SPECIALS.map(|name| AddedToken::from(name, true)))
            .map_err(failed)?;
        let json = inner.to_string(false).map_err(failed)?;
        // What is used is what was written.
        let trained = Self::from_bytes(path, json.as_bytes(), |inner| {
            inner
                .token_to_id(SPECIALS[7])
                .ok_or_else(|| failed("its special tokens are missing".into()))
        })?;
        Ok((trained, json))
    }

    /// Ids of `text`, without an end-of-document token.
    ///
    /// # Errors
    /// [`CorpusError::Tokenizer`], if a loaded tokenizer has no entry for some byte and no unknown token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, CorpusError> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        for piece in pieces(text, PIECE_BYTES) {
            let encoding = self
                .inner
                .encode_fast(piece, false)
                .map_err(|e| CorpusError::Tokenizer {
                    path: TOKENIZER_FILE.into(),
                    reason: format!("cannot encode a text ({e})"),
                    remedy: "use a tokenizer that covers the text, e.g. a byte-level one",
                })?;
            ids.extend_from_slice(encoding.get_ids());
        }
        Ok(ids)
    }

    /// Text of `ids`, special tokens left out; bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`CorpusError::Tokenizer`], if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String, CorpusError> {
        self.inner.decode(ids, true).map_err(|e| CorpusError::Tokenizer {
            path: TOKENIZER_FILE.into(),
            reason: format!("cannot decode ({e})"),
            remedy: "check that the ids come from this tokenizer",
        })
    }

    /// Rows an embedding needs: one more than the highest id, special tokens included.
    #[must_use]
    pub const fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// The token after each document. A prompt starts after one too.
    #[must_use]
    pub const fn end_of_document(&self) -> u32 {
        self.end_of_document
    }

    /// Id of a token by its name.
    #[must_use]
    pub fn token(&self, name: &str) -> Option<u32> {
        self.inner.token_to_id(name)
    }

    /// Name of a token by its id.
    #[must_use]
    pub fn name(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The token that other programs may fill short sequences up with: Aquila2's `<|endoftext|>`, where it is there and ends
    /// no document. Nothing here is trained on it.
    #[must_use]
    pub fn pad(&self) -> Option<u32> {
        self.token(PAD).filter(|&id| id != self.end_of_document)
    }
}

fn eos_of_config(tokenizer: &Path) -> Result<Option<String>, CorpusError> {
    let path = tokenizer.with_file_name("tokenizer_config.json");
    let text = match std::fs::read(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(CorpusError::unreadable(&path))?,
    };
    let config: serde_json::Value = serde_json::from_slice(&text).map_err(|e| CorpusError::Tokenizer {
        path: path.clone(),
        reason: format!("cannot be parsed ({e})"),
        remedy: "correct or remove it",
    })?;
    let eos = &config["eos_token"];
    Ok(eos.as_str().or_else(|| eos["content"].as_str()).map(str::to_owned))
}

/// Cuts a text after lone line breaks between two visible characters, where the pattern above has a boundary anyway, so
/// that the pieces' tokens are the whole's.
fn pieces(text: &str, piece_bytes: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let bytes = rest.as_bytes();
        let visible = |b: u8| b.is_ascii_graphic();
        let cut = (piece_bytes..bytes.len().saturating_sub(1))
            .find(|&i| bytes[i] == b'\n' && visible(bytes[i - 1]) && visible(bytes[i + 1]))
            .map_or(bytes.len(), |i| i + 1);
        let (head, tail) = rest.split_at(cut);
        rest = tail;
        Some(head)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn corpus() -> Vec<String> {
        (0..400)
            .map(|i| {
                format!("The node {i} of the tree is committed.\n训练状态第{i}步已经提交,模型正在学习中文。 don't</s>")
            })
            .collect()
    }

    #[test]
    fn special_tokens_stand_where_aquila2_has_them() {
        let (tokenizer, json) = Tokenizer::train_bpe(&corpus(), 320).unwrap();
        assert_eq!(tokenizer.vocabulary(), 320);
        assert_eq!(tokenizer.token("<|endoftext|>"), Some(0));
        assert_eq!(tokenizer.token("[CLS]"), Some(318));
        assert_eq!(tokenizer.token("</s>"), Some(319));
        assert_eq!(tokenizer.end_of_document(), 319);
        assert_eq!(
            (tokenizer.pad(), tokenizer.name(319).as_deref()),
            (Some(0), Some("</s>"))
        );
        assert_eq!(tokenizer.name(320), None);
        assert!(json.contains("\"Regex\""));
        // A text too small for the vocabulary gives a smaller one, the special tokens still last.
        let (small, _) = Tokenizer::train_bpe(&["ab ab".to_owned()], 4096).unwrap();
        assert!(small.vocabulary() < 300);
        assert_eq!(small.end_of_document() as usize, small.vocabulary() - 1);
        assert!(
            Tokenizer::train_bpe(&corpus(), 264)
                .unwrap_err()
                .to_string()
                .contains("at least 265")
        );
    }

    #[test]
    fn text_that_spells_a_special_token_stays_text() {
        let (tokenizer, _) = Tokenizer::train_bpe(&corpus(), 300).unwrap();
        let text = "a</s>b<|endoftext|>[CLS]";
        let ids = tokenizer.encode(text).unwrap();
        assert!(
            ids.iter().all(|&id| id != tokenizer.end_of_document() && id != 0),
            "{ids:?}"
        );
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        assert_eq!(tokenizer.decode(&[tokenizer.end_of_document()]).unwrap(), "");
    }

    /// DET-1: same texts, same bytes: in another order, and on other numbers of threads.
    #[test]
    fn training_is_deterministic() {
        let mut texts = corpus();
        let expected = Tokenizer::train_bpe(&texts, 600).unwrap().1;
        for threads in [1, 2, 5] {
            texts.rotate_left(37);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(|| Tokenizer::train_bpe(&texts, 600).unwrap().1), expected);
        }
    }

    #[test]
    fn pieces_do_not_change_tokens() {
        let (tokenizer, _) = Tokenizer::train_bpe(&corpus(), 400).unwrap();
        let text = "one two\nthree\n\nfour\n 五\n六 seven's\nrow\tx \ny\n".repeat(50);
        let whole = tokenizer
            .inner
            .encode_fast(text.as_str(), false)
            .unwrap()
            .get_ids()
            .to_vec();
        for size in [1, 2, 7, 100] {
            let mut ids = Vec::new();
            let mut count = 0;
            for piece in pieces(&text, size) {
                ids.extend(tokenizer.encode(piece).unwrap());
                count += 1;
            }
            assert!(count > 10);
            assert_eq!(ids, whole, "pieces of {size}");
        }
    }

    #[test]
    fn foreign_tokenizers_name_their_end_or_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(TOKENIZER_FILE);
        let (_, json) = Tokenizer::train_bpe(&corpus(), 300).unwrap();
        std::fs::write(&path, &json).unwrap();
        assert_eq!(Tokenizer::load(&path).unwrap().end_of_document(), 299);
        let config = folder.path().join("tokenizer_config.json");
        std::fs::write(&config, r#"{"eos_token":{"content":"[CLS]"}}"#).unwrap();
        assert_eq!(Tokenizer::load(&path).unwrap().end_of_document(), 298);
        std::fs::write(&config, r#"{"eos_token":"nope"}"#).unwrap();
        assert!(
            Tokenizer::load(&path)
                .unwrap_err()
                .to_string()
                .contains("no token 'nope'")
        );
        std::fs::write(&path, "{}").unwrap();
        assert!(
            Tokenizer::load(&path)
                .unwrap_err()
                .to_string()
                .contains("cannot be read as a tokenizer")
        );
        assert!(matches!(
            Tokenizer::load(&folder.path().join("no.json")),
            Err(CorpusError::Unreadable { .. })
        ));
    }

    proptest! {
        #[test]
        fn any_text_round_trips(text in "(\\PC|[\\x00-\\x20]|[一-龥]|🦅|👩‍🚀|é){0,60}") {
            static TRAINED: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
            let tokenizer = TRAINED.get_or_init(|| Tokenizer::train_bpe(&corpus(), 400).unwrap().0);
            let ids = tokenizer.encode(&text).unwrap();
            prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
    }
}
