//! What a case does to a corpus: pure functions of its documents, the plan's keys and the share held out.

use super::{Document, Domain};
use crate::exit::Failure;
use crate::mixture::plan::Change;
use crate::mixture::random::Random;
use std::collections::{BTreeMap, BTreeSet};
use tarazed_corpus::Split;
use tarazed_domain::config::Language;

/// The corpus with `change` made. `key` stands for the case in messages.
///
/// # Errors
/// Refused where the change names a domain that is not there, or leaves nothing of one.
pub fn generate(change: &Change, corpus: &[Domain], held_out_fraction: f64, key: &str) -> Result<Vec<Domain>, Failure> {
    let position = |name: &str| {
        let found = corpus.iter().position(|domain| domain.name == name);
        found.ok_or_else(|| {
            let known: Vec<&str> = corpus.iter().map(|domain| domain.name.as_str()).collect();
            let cause = format!("no domain of the base config is called '{name}'");
            Failure::refused(key, cause, format!("name one of {}", known.join(", ")))
        })
    };
    let mut domains = corpus.to_vec();
    match change {
        Change::None => {}
        Change::Noise { share, seed } => domains.push(noise(corpus, *share, *seed)),
        Change::Duplicate { of } => domains.push(copy(&corpus[position(of)?])),
        Change::Tiny { of, documents, seed } => {
            let domain = &mut domains[position(of)?];
            *domain = fewer(domain, Keep::Documents(*documents), *seed, held_out_fraction);
        }
        Change::Skew { ratio, seed } => {
            let last = corpus.len().saturating_sub(1).max(1) as f64;
            for (at, domain) in domains.iter_mut().enumerate() {
                let share = libm::pow(*ratio, -(at as f64) / last);
                *domain = fewer(domain, Keep::Share(share), *seed, held_out_fraction);
            }
        }
        Change::Difficulty { of } => {
            let cut: BTreeSet<usize> = of.iter().map(|name| position(name)).collect::<Result<_, _>>()?;
            domains = halves(corpus, &cut);
        }
        Change::Late { of, from_step } => {
            let mut late = domains.remove(position(of)?);
            if domains.is_empty() {
                return Err(Failure::refused(
                    key,
                    "leaves no domain to begin with",
                    "give the base config a second domain",
                ));
            }
            late.from_step = *from_step;
            late.made = format!("the corpus' own, from step {from_step} on");
            domains.push(late);
        }
        Change::Shift { of, from_step } => {
            let at = position(of)?;
            let (easy, hard) = shifted(&corpus[at], *from_step, held_out_fraction);
            domains[at] = easy;
            domains.push(hard);
        }
    }
    check_distinct(&domains, key)?;
    Ok(domains)
}

fn check_distinct(domains: &[Domain], key: &str) -> Result<(), Failure> {
    let mut seen = BTreeSet::new();
    for domain in domains {
        if !domain.replaces && !seen.insert(domain.name.as_str()) {
            let cause = format!("makes a second domain '{}'", domain.name);
            return Err(Failure::refused(key, cause, "rename that domain of the base config"));
        }
        if domain.documents.is_empty() {
            let cause = format!("leaves no document of domain '{}'", domain.name);
            return Err(Failure::refused(key, cause, "choose a larger domain"));
        }
    }
    Ok(())
}

/// Random text: every character drawn by itself with the corpus' frequencies, documents as long as the corpus' (in
/// characters), until there are `share` times its bytes. No context predicts it, so its loss has a floor that no training
/// lowers.
fn noise(corpus: &[Domain], share: f64, seed: u64) -> Domain {
    let texts: Vec<&str> = corpus.iter().flat_map(Domain::texts).collect();
    let mut counts: BTreeMap<char, u64> = BTreeMap::new();
    for c in texts.iter().flat_map(|text| text.chars()) {
        *counts.entry(c).or_default() += 1;
    }
    // Characters with the sum of the counts up to and with them: a draw is a search.
    let mut total = 0;
    let table: Vec<(u64, char)> = counts
        .into_iter()
        .map(|(c, count)| {
            total += count;
            (total, c)
        })
        .collect();
    let wanted = share * texts.iter().map(|text| text.len() as f64).sum::<f64>();
    let mut random = Random::of(seed, "noise");
    let (mut documents, mut bytes) = (Vec::new(), 0);
    while total > 0 && (bytes as f64) < wanted {
        let length = texts[random.index(0..texts.len())].chars().count();
        let text: String = (0..length)
            .map(|_| {
                let at = random.index(0..total as usize) as u64;
                table[table.partition_point(|(below, _)| *below <= at)].1
            })
            .collect();
        bytes += text.len();
        let source = format!("noise:{seed}:{}", documents.len() + 1);
        if !text.is_empty() {
            documents.push(Document { text, source });
        }
    }
    Domain {
        name: "noise".to_owned(),
        language: Language::En,
        judged: false,
        made: format!("characters drawn with the corpus' frequencies, seed {seed}, {share} of its bytes"),
        from_step: 0,
        replaces: false,
        documents,
    }
}

fn copy(domain: &Domain) -> Domain {
    Domain {
        name: format!("{}-copy", domain.name),
        judged: false,
        made: format!("a copy of {}", domain.name),
        ..domain.clone()
    }
}

/// How many training documents stay.
#[derive(Clone, Copy)]
enum Keep {
    Documents(usize),
    Share(f64),
}

/// Some training documents chosen by a hash of their text, and all held-out ones, so that it is measured as before.
fn fewer(domain: &Domain, keep: Keep, seed: u64, held_out_fraction: f64) -> Domain {
    let mut training: Vec<([u8; 32], usize)> = Vec::new();
    let mut kept = BTreeSet::new();
    let mut seen = BTreeSet::new();
    for (at, document) in domain.documents.iter().enumerate() {
        let hash = blake3::hash(document.text.as_bytes());
        if !seen.insert(*hash.as_bytes()) {
            continue;
        }
        if Split::of(&hash, held_out_fraction) == Split::HeldOut {
            kept.insert(at);
            continue;
        }
        let mut hasher = blake3::Hasher::new_derive_key("tarazed bench mixture v1 tiny domain");
        hasher.update(&seed.to_le_bytes());
        hasher.update(hash.as_bytes());
        training.push((*hasher.finalize().as_bytes(), at));
    }
    training.sort_unstable();
    let documents = match keep {
        Keep::Documents(documents) => documents.min(training.len()),
        Keep::Share(share) => (share * training.len() as f64).ceil() as usize,
    };
    kept.extend(training.iter().take(documents).map(|(_, at)| *at));
    Domain {
        made: format!(
            "{documents} of {} training documents of {}, seed {seed}, and all held-out ones",
            training.len(),
            domain.name
        ),
        documents: kept.iter().map(|at| domain.documents[*at].clone()).collect(),
        ..domain.clone()
    }
}

/// Each domain of `cut` in two of about equal bytes: the documents that are easier to predict, and the harder ones.
fn halves(corpus: &[Domain], cut: &BTreeSet<usize>) -> Vec<Domain> {
    let mut domains = Vec::new();
    for (at, domain) in corpus.iter().enumerate() {
        if !cut.contains(&at) {
            domains.push(domain.clone());
            continue;
        }
        let easy = easy_half(domain);
        for (name, wanted) in [("easy", true), ("hard", false)] {
            let chosen = (0..domain.documents.len()).filter(|document| easy.contains(document) == wanted);
            domains.push(Domain {
                name: format!("{}-{name}", domain.name),
                made: format!("the {name} half of {}, by character bigrams", domain.name),
                documents: chosen.map(|document| domain.documents[document].clone()).collect(),
                ..domain.clone()
            });
        }
    }
    domains
}

/// A domain whose text becomes harder: what it is until `from_step`, and what takes its place then. Whatever is held out of
/// either half is held out, and measured, from the beginning: what runs are judged by is that of the whole domain.
fn shifted(domain: &Domain, from_step: u64, held_out_fraction: f64) -> (Domain, Domain) {
    let easy = easy_half(domain);
    let is_held_out = |at: usize| {
        let hash = blake3::hash(domain.documents[at].text.as_bytes());
        Split::of(&hash, held_out_fraction) == Split::HeldOut
    };
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for (at, document) in domain.documents.iter().enumerate() {
        let is_easy = easy.contains(&at);
        if is_easy || is_held_out(at) {
            before.push(document.clone());
        }
        if !is_easy {
            after.push(document.clone());
        }
    }
    let name = &domain.name;
    let easy = Domain {
        made: format!("the easy half of {name}, by character bigrams, until step {from_step}, and all held-out text"),
        documents: before,
        ..domain.clone()
    };
    let hard = Domain {
        made: format!("the hard half of {name}, by character bigrams, from step {from_step} on"),
        from_step,
        replaces: true,
        documents: after,
        ..domain.clone()
    };
    (easy, hard)
}

/// The documents that are easier to predict, up to half of the bytes.
fn easy_half(domain: &Domain) -> BTreeSet<usize> {
    let scores = surprisal(domain);
    let mut order: Vec<usize> = (0..domain.documents.len()).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(a.cmp(&b)));
    let bytes: usize = domain.texts().map(str::len).sum();
    let mut taken = 0;
    let is_in_half = |document: &usize| {
        taken += domain.documents[*document].text.len();
        taken * 2 <= bytes
    };
    order.into_iter().take_while(is_in_half).collect()
}

/// Bits per byte of each document under the add-one smoothed character bigrams of its domain: a measure of difficulty
/// that needs no model.
fn surprisal(domain: &Domain) -> Vec<f64> {
    let mut pairs: BTreeMap<(char, char), f64> = BTreeMap::new();
    let mut firsts: BTreeMap<char, f64> = BTreeMap::new();
    let mut alphabet = BTreeSet::new();
    let bigrams = |text: &str| text.chars().zip(text.chars().skip(1)).collect::<Vec<_>>();
    for text in domain.texts() {
        alphabet.extend(text.chars());
        for (first, second) in bigrams(text) {
            *pairs.entry((first, second)).or_default() += 1.0;
            *firsts.entry(first).or_default() += 1.0;
        }
    }
    let size = alphabet.len() as f64;
    domain
        .texts()
        .map(|text| {
            let bits: f64 = bigrams(text)
                .iter()
                .map(|pair| -libm::log2((pairs[pair] + 1.0) / (firsts[&pair.0] + size)))
                .sum();
            bits / text.len().max(1) as f64
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRACTION: f64 = 0.2;

    fn domain(name: &str, texts: impl IntoIterator<Item = String>) -> Domain {
        let document = |(at, text): (usize, String)| Document {
            text,
            source: format!("{name}:{at}"),
        };
        Domain {
            name: name.to_owned(),
            language: Language::En,
            judged: true,
            made: String::new(),
            from_step: 0,
            replaces: false,
            documents: texts.into_iter().enumerate().map(document).collect(),
        }
    }

    fn corpus() -> Vec<Domain> {
        vec![
            domain(
                "web",
                (0..200).map(|i| format!("the page {i} of the web is about the number {i}")),
            ),
            domain("zh", (0..100).map(|i| format!("天地玄黄宇宙洪荒第{i}页"))),
        ]
    }

    fn made(change: &Change) -> Vec<Domain> {
        generate(change, &corpus(), FRACTION, "cases.test").expect("a case")
    }

    fn is_held_out(document: &Document) -> bool {
        Split::of(&blake3::hash(document.text.as_bytes()), FRACTION) == Split::HeldOut
    }

    #[test]
    fn noise_has_the_frequencies_of_the_corpus_and_its_share_of_bytes() {
        let change = Change::Noise { share: 3.0, seed: 3 };
        let domains = made(&change);
        assert_eq!(domains[..2], corpus()[..]);
        let noise = &domains[2];
        assert!(!noise.judged && noise.name == "noise");
        let bytes = |domains: &[Domain]| domains.iter().flat_map(Domain::texts).map(str::len).sum::<usize>() as f64;
        let share = bytes(&domains[2..]) / bytes(&domains[..2]);
        assert!((3.0..3.02).contains(&share), "{share}");
        let frequency = |domains: &[Domain], wanted: char| {
            let (mut found, mut all) = (0.0, 0.0);
            for c in domains.iter().flat_map(Domain::texts).flat_map(str::chars) {
                found += f64::from(u8::from(c == wanted));
                all += 1.0;
            }
            found / all
        };
        for c in ['e', '天', '7'] {
            let (is, was) = (frequency(&domains[2..], c), frequency(&domains[..2], c));
            // Some 300 of the rarest are drawn: five standard deviations.
            assert!((is / was - 1.0).abs() < 0.3, "{c}: {is} of {was}");
        }
        assert_eq!(domains, made(&change), "a function of corpus and seed");
        assert_ne!(domains[2], made(&Change::Noise { share: 3.0, seed: 4 })[2]);
    }

    #[test]
    fn a_duplicate_is_the_domain_under_another_name_and_not_judged() {
        let domains = made(&Change::Duplicate { of: "zh".to_owned() });
        assert_eq!(domains[2].documents, domains[1].documents);
        assert_eq!((domains[2].name.as_str(), domains[2].judged), ("zh-copy", false));
    }

    #[test]
    fn a_tiny_domain_keeps_a_few_training_documents_and_all_held_out_ones() {
        let change = |seed| Change::Tiny {
            of: "web".to_owned(),
            documents: 12,
            seed,
        };
        let (all, domains) = (corpus(), made(&change(1)));
        let counts = |domain: &Domain| {
            let held_out = domain.documents.iter().filter(|document| is_held_out(document)).count();
            (domain.documents.len() - held_out, held_out)
        };
        assert_eq!(counts(&domains[0]), (12, counts(&all[0]).1));
        assert!(domains[0].judged && domains[1] == all[1]);
        assert!(
            domains[0]
                .documents
                .iter()
                .all(|document| all[0].documents.contains(document))
        );
        assert_ne!(domains[0].documents, made(&change(2))[0].documents);
    }

    #[test]
    fn skewed_domains_keep_shares_in_equal_ratios_and_their_held_out_text() {
        let mut corpus = corpus();
        corpus.insert(
            1,
            domain("book", (0..300).map(|i| format!("the book {i} has a chapter {i}"))),
        );
        let change = Change::Skew { ratio: 16.0, seed: 2 };
        let domains = generate(&change, &corpus, FRACTION, "cases.test").expect("a case");
        for ((whole, part), share) in corpus.iter().zip(&domains).zip([1.0, 0.25, 0.0625]) {
            let counts = |domain: &Domain| {
                let held_out = domain.documents.iter().filter(|document| is_held_out(document)).count();
                (domain.documents.len() - held_out, held_out)
            };
            let ((all, held_out), (kept, held_out_kept)) = (counts(whole), counts(part));
            assert_eq!(held_out, held_out_kept);
            assert_eq!(kept, (share * all as f64).ceil() as usize, "{}", part.name);
        }
    }

    /// Every second document of the first domain is a jumble of letters.
    fn corpus_with_a_jumble() -> Vec<Domain> {
        let mut corpus = corpus();
        for (at, document) in corpus[0].documents.iter_mut().enumerate().filter(|(at, _)| at % 2 == 1) {
            let mut random = Random::of(at as u64, "jumble");
            document.text = (0..43).map(|_| char::from(b'a' + random.index(0..26) as u8)).collect();
        }
        corpus
    }

    #[test]
    fn difficulty_cuts_a_domain_in_two_by_how_predictable_its_documents_are() {
        let corpus = corpus_with_a_jumble();
        let change = Change::Difficulty {
            of: vec!["web".to_owned()],
        };
        let domains = generate(&change, &corpus, FRACTION, "cases.test").expect("a case");
        let names: Vec<&str> = domains.iter().map(|domain| domain.name.as_str()).collect();
        assert_eq!(names, ["web-easy", "web-hard", "zh"]);
        let together = domains[0].documents.len() + domains[1].documents.len();
        assert_eq!(together, corpus[0].documents.len());
        assert!(
            domains[0]
                .documents
                .iter()
                .all(|document| document.text.starts_with("the page"))
        );
        assert!(domains.iter().all(|domain| domain.judged));
    }

    /// A run has it behind its own domains, with all of its documents.
    #[test]
    fn a_late_domain_is_the_last() {
        let (all, domains) = (
            corpus(),
            made(&Change::Late {
                of: "web".to_owned(),
                from_step: 3,
            }),
        );
        assert_eq!(domains[0], all[1]);
        assert_eq!(domains[1].documents, all[0].documents);
        assert_eq!(
            (domains[1].name.as_str(), domains[1].judged, domains[1].from_step),
            ("web", true, 3)
        );
        let alone = Change::Late {
            of: "web".to_owned(),
            from_step: 3,
        };
        let refused = generate(&alone, &all[..1], FRACTION, "cases.x").expect_err("refused");
        assert!(
            refused.message.contains("no domain to begin with"),
            "{}",
            refused.message
        );
    }

    /// Trained on are the two halves, one after the other; measured is what is held out of both, all the time.
    #[test]
    fn a_shift_puts_the_hard_half_in_the_place_of_the_easy_one() {
        let corpus = corpus_with_a_jumble();
        let change = Change::Shift {
            of: "web".to_owned(),
            from_step: 5,
        };
        let domains = generate(&change, &corpus, FRACTION, "cases.test").expect("a case");
        let known: Vec<(&str, u64, bool)> = domains
            .iter()
            .map(|domain| (domain.name.as_str(), domain.from_step, domain.replaces))
            .collect();
        assert_eq!(known, [("web", 0, false), ("zh", 0, false), ("web", 5, true)]);
        assert_eq!(domains[1], corpus[1]);
        assert!(domains[0].judged);
        let halves = Change::Difficulty {
            of: vec!["web".to_owned()],
        };
        let halves = generate(&halves, &corpus, FRACTION, "cases.test").expect("a case");
        let training = |domain: &Domain| -> Vec<Document> {
            let documents = domain.documents.iter().filter(|document| !is_held_out(document));
            documents.cloned().collect()
        };
        for (half, now) in [(&halves[0], &domains[0]), (&halves[1], &domains[2])] {
            assert_eq!(training(half), training(now), "{}", half.name);
        }
        let held_out = |domain: &Domain| -> Vec<Document> {
            let documents = domain.documents.iter().filter(|document| is_held_out(document));
            documents.cloned().collect()
        };
        assert_eq!(held_out(&domains[0]), held_out(&corpus[0]), "as without a shift");
        assert!(!held_out(&domains[2]).is_empty(), "a data set has held-out text");
        let is_own = |document: &Document| corpus[0].documents.contains(document);
        assert!(domains[2].documents.iter().all(is_own));
    }

    #[test]
    fn what_cannot_be_made_is_refused() {
        for (change, part) in [
            (
                Change::Shift {
                    of: "code".to_owned(),
                    from_step: 3,
                },
                "no domain of the base config is called 'code'",
            ),
            (
                Change::Duplicate { of: "code".to_owned() },
                "no domain of the base config is called 'code'",
            ),
            (
                Change::Late {
                    of: "code".to_owned(),
                    from_step: 3,
                },
                "no domain of the base config is called 'code'",
            ),
        ] {
            let refused = generate(&change, &corpus(), FRACTION, "cases.x").expect_err("refused");
            assert!(refused.message.contains(part), "{}", refused.message);
        }
        let mut taken = corpus();
        taken[1].name = "noise".to_owned();
        let noise = Change::Noise { share: 0.1, seed: 1 };
        let refused = generate(&noise, &taken, FRACTION, "cases.x").expect_err("refused");
        assert!(
            refused.message.contains("a second domain 'noise'"),
            "{}",
            refused.message
        );
    }
}
