//! Held-out text that training text contains, exactly or nearly: a loss on it measures memory.
//!
//! Text is cut into units: words of letters and digits in lower case, Han characters one by one. A held-out document is
//! compared by its n-grams of units with *all* training text of *all* domains of the case; 13-grams are the usual choice
//! (GPT-3, arXiv 2005.14165, appendix C). White space, punctuation and case make no difference, and neither does where in a
//! document a passage stands. A document of fewer units than an n-gram is compared as a whole with others as short.

use super::Domain;
use crate::mixture::plan::Overlap;
use serde::Serialize;
use std::collections::HashMap;
use tarazed_corpus::{Split, is_han};
use xxhash_rust::xxh3::xxh3_64;

/// A held-out document that is left out of its case.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Overlapping {
    /// Its domain.
    pub domain: String,
    /// Where it came from.
    pub source: String,
    /// Share of its n-grams that stand in training text.
    pub share: f64,
    /// A training document that holds one of them.
    pub like: String,
}

/// A held-out document while training text is compared with it.
struct Candidate<'a> {
    domain: &'a Domain,
    at: usize,
    grams: Vec<u64>,
}

/// Removes held-out documents that overlap with training text, and says which.
#[must_use]
pub fn remove(domains: &mut [Domain], held_out_fraction: f64, rule: &Overlap) -> Vec<Overlapping> {
    let found = find(domains, held_out_fraction, rule);
    for domain in domains {
        domain.documents.retain(|document| {
            let goes = |lost: &Overlapping| lost.domain == domain.name && lost.source == document.source;
            !found.iter().any(goes)
        });
    }
    found
}

fn find(domains: &[Domain], held_out_fraction: f64, rule: &Overlap) -> Vec<Overlapping> {
    let is_held_out = |text: &str| Split::of(&blake3::hash(text.as_bytes()), held_out_fraction) == Split::HeldOut;
    let mut candidates = Vec::new();
    // N-gram of a held-out document to the first training document that holds it. Only ever asked, never iterated.
    let mut seen: HashMap<u64, Option<&str>> = HashMap::new();
    // What is held out of a text that takes another's place is held out of that one, too, and measured there.
    for domain in domains.iter().filter(|domain| !domain.replaces) {
        for (at, document) in domain.documents.iter().enumerate() {
            if is_held_out(&document.text) {
                let mut grams = ngrams(&document.text, rule.units);
                grams.sort_unstable();
                grams.dedup();
                seen.extend(grams.iter().map(|gram| (*gram, None)));
                candidates.push(Candidate { domain, at, grams });
            }
        }
    }
    for document in domains.iter().flat_map(|domain| &domain.documents) {
        if !is_held_out(&document.text) {
            for gram in ngrams(&document.text, rule.units) {
                if let Some(place) = seen.get_mut(&gram) {
                    place.get_or_insert(&document.source);
                }
            }
        }
    }
    candidates
        .iter()
        .filter_map(|candidate| {
            let shared: Vec<&str> = candidate.grams.iter().filter_map(|gram| seen[gram]).collect();
            let share = shared.len() as f64 / candidate.grams.len().max(1) as f64;
            let like = shared.first().filter(|_| share > rule.share_max)?;
            Some(Overlapping {
                domain: candidate.domain.name.clone(),
                source: candidate.domain.documents[candidate.at].source.clone(),
                share,
                like: (*like).to_owned(),
            })
        })
        .collect()
}

/// Hashes of all runs of `units` neighbouring units; of the whole text where it has fewer, of nothing where it has none.
fn ngrams(text: &str, units: usize) -> Vec<u64> {
    let words = unit_hashes(text);
    if words.is_empty() {
        return Vec::new();
    }
    words
        .windows(units.min(words.len()))
        .map(|run| hash_of(run, units))
        .collect()
}

/// A run shorter than an n-gram must not look like one.
fn hash_of(run: &[u64], units: usize) -> u64 {
    let length = if run.len() < units { run.len() as u64 } else { 0 };
    let bytes: Vec<u8> = run
        .iter()
        .chain([&length])
        .flat_map(|word| word.to_le_bytes())
        .collect();
    xxh3_64(&bytes)
}

fn unit_hashes(text: &str) -> Vec<u64> {
    let mut hashes = Vec::new();
    let mut word = String::new();
    let mut end = |word: &mut String| {
        if !word.is_empty() {
            hashes.push(xxh3_64(word.as_bytes()));
            word.clear();
        }
    };
    for c in text.chars() {
        if is_han(c) {
            end(&mut word);
            word.push(c);
            end(&mut word);
        } else if c.is_alphanumeric() {
            word.extend(c.to_lowercase());
        } else {
            end(&mut word);
        }
    }
    end(&mut word);
    hashes
}

#[cfg(test)]
mod tests {
    use super::super::Document;
    use super::*;
    use proptest::prelude::*;
    use tarazed_domain::config::Language;

    const FRACTION: f64 = 0.3;
    const RULE: Overlap = Overlap {
        units: 5,
        share_max: 0.2,
    };

    fn domain(name: &str, texts: &[String]) -> Domain {
        let document = |(at, text): (usize, &String)| Document {
            text: text.clone(),
            source: format!("{name}:{at}"),
        };
        Domain {
            name: name.to_owned(),
            language: Language::Zh,
            judged: true,
            made: String::new(),
            from_step: 0,
            replaces: false,
            documents: texts.iter().enumerate().map(document).collect(),
        }
    }

    /// A text on the wanted side of the split, made by counting on behind it.
    fn on(side: Split, text: &str) -> String {
        (0..)
            .map(|i| format!("{text} {i}"))
            .find(|text| Split::of(&blake3::hash(text.as_bytes()), FRACTION) == side)
            .expect("half of all texts or so")
    }

    const PASSAGE: &str = "a lane is a fixed set of sequences summed left to right in single precision";

    #[test]
    fn near_copies_are_found_across_domains_and_layouts() {
        let training = [
            on(Split::Train, PASSAGE),
            on(Split::Train, "天地玄黄宇宙洪荒日月盈昃辰宿列张"),
        ];
        let held_out = [
            on(
                Split::HeldOut,
                "A LANE is, a fixed\n\nset of sequences; summed left-to-right in single precision!",
            ),
            on(
                Split::HeldOut,
                "the optimizer shards are spread over all of the ranks evenly",
            ),
            on(Split::HeldOut, "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。"),
        ];
        let mut domains = [domain("web", &training), domain("other", &held_out)];
        let found = remove(&mut domains, FRACTION, &RULE);
        let lost: Vec<(&str, &str)> = found.iter().map(|f| (f.source.as_str(), f.like.as_str())).collect();
        assert_eq!(lost, [("other:0", "web:0"), ("other:2", "web:1")]);
        assert!(found.iter().all(|found| found.share > 0.5), "{found:?}");
        assert_eq!((domains[0].documents.len(), domains[1].documents.len()), (2, 1));
    }

    #[test]
    fn a_phrase_in_common_is_no_copy() {
        let own: String = (0..60).map(|i| format!("word{i} ")).collect();
        let texts = [
            on(Split::Train, PASSAGE),
            on(Split::HeldOut, &format!("{own} is a fixed set of sequences")),
        ];
        let mut domains = [domain("web", &texts)];
        assert_eq!(remove(&mut domains, FRACTION, &RULE), []);
        assert_eq!(domains[0].documents.len(), 2);
    }

    #[test]
    fn short_texts_are_compared_as_a_whole() {
        assert_eq!(ngrams("One two.", 5), ngrams("one  TWO", 5));
        assert_ne!(ngrams("one two", 5), ngrams("one two three", 5));
        assert!(ngrams("…! ", 5).is_empty());
        // As many units as an n-gram and one fewer are told apart.
        assert_ne!(ngrams("a b c d e", 5), ngrams("a b c d", 5));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        /// Whatever is held out and stands in training text as it is, goes; nothing that is trained on ever does.
        #[test]
        fn an_exact_copy_never_stays(words in prop::collection::vec("[a-z]{1,6}", 8..40), cut in 0..3_usize) {
            let text = words[cut..].join(" ");
            let copied = on(Split::HeldOut, &text);
            let mut domains = [domain("web", &[on(Split::Train, &copied)]), domain("copy", &[copied])];
            let found = remove(&mut domains, FRACTION, &RULE);
            prop_assert_eq!(found.len(), 1);
            prop_assert!(domains[1].documents.is_empty());
            prop_assert_eq!(domains[0].documents.len(), 1);
        }
    }
}
