//! Refining: what happens to one document before its text becomes tokens, as pure functions of the text and the settings.
//!
//! [`Refiner::judge`] is the straight line: [clean](clean), [benchmarks](benchmark), [language](language), quality ([english],
//! [chinese]); what is left gets the keys by which copies meet ([minhash]). Comparing documents with each other is the
//! pipeline's. Benchmarks come before what judges a text by its length or language, so that an item that stands alone is
//! reported as what it is.
//!
//! Nothing here reads a file but the benchmark sets, knows a thread or a clock, or remembers a document.

mod benchmark;
mod chinese;
mod clean;
mod english;
mod fold;
mod language;
mod minhash;
mod mojibake;
mod repetition;
mod rules;
mod table;

pub(crate) use benchmark::{BenchmarkItem, Benchmarks, hash_sets};
pub use fold::is_han;
pub(crate) use rules::Broken;
pub use rules::{Dropped, ReasonKind};
pub(crate) use table::mix;

use crate::error::CorpusError;
use minhash::Sketcher;
use rules::RuleSet;
use std::sync::Arc;
use tarazed_domain::config::{DomainConfig, DuplicateScope, Language, RefineConfig};
use xxhash_rust::xxh3::xxh3_128;

/// Part of the recipe of every refined data set: the number goes up when the same text and settings give another outcome.
/// Tables of the Unicode standard are part of the outcome, those of normalisation and those of the standard library.
pub(crate) fn program() -> String {
    let (a, b, c) = unicode_normalization::UNICODE_VERSION;
    let (d, e, f) = char::UNICODE_VERSION;
    format!("tarazed-refine 3, whichlang 0.1.1, Unicode {a}.{b}.{c} and {d}.{e}.{f}")
}

/// One character lost in so many is too much.
const REPLACED_PER_CHARACTERS_MAX: u64 = 1000;
/// Scratch memory that is kept from one document to the next.
const SCRATCH_BYTES_KEPT: usize = 16 << 20;

/// Memory that the judging of one document after another uses; it decides nothing.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    counter: table::Counter,
    words: repetition::Words,
    runs: table::Runs,
    folded: fold::Folded,
}

impl Scratch {
    /// Gives back what a giant document took.
    fn trim(&mut self) {
        if self.counter.bytes() + self.words.bytes() + self.runs.bytes() + self.folded.bytes() > SCRATCH_BYTES_KEPT {
            *self = Self::default();
        }
    }
}

/// What came of a document by itself.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Verdict {
    /// It goes on, unless it is a copy.
    Kept(Kept),
    /// It is left out.
    Dropped(Broken, Option<BenchmarkItem>),
}

/// A document that goes on.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Kept {
    /// Its text, cleaned.
    pub(crate) text: String,
    /// Whether cleaning changed it.
    pub(crate) is_changed: bool,
    /// Hash of the text: exact copies have the same.
    pub(crate) exact: u128,
    /// Near copies share at least one of these, in the same place; empty where they are not looked for.
    pub(crate) bands: Vec<u64>,
}

/// The benchmark item of which a text, as it came, holds the most groups, and how many.
pub(crate) fn find_item(benchmarks: &Benchmarks, text: &str, scratch: &mut Scratch) -> Option<(BenchmarkItem, usize)> {
    scratch.folded.set(text);
    let found = benchmarks.find(&scratch.folded, &mut scratch.runs);
    scratch.trim();
    found
}

/// What all domains share.
#[derive(Debug)]
pub(crate) struct Shared {
    benchmarks: Benchmarks,
    sketcher: Option<Sketcher>,
}

impl Shared {
    /// Reads what the settings name.
    ///
    /// # Errors
    /// A benchmark set that cannot be read.
    pub(crate) fn load(config: &RefineConfig) -> Result<Arc<Self>, CorpusError> {
        let near = config.duplicates.near != DuplicateScope::Off;
        Ok(Arc::new(Self {
            benchmarks: Benchmarks::load(&config.decontaminate)?,
            sketcher: near.then(|| Sketcher::new(&config.duplicates)),
        }))
    }

    pub(crate) const fn benchmarks(&self) -> &Benchmarks {
        &self.benchmarks
    }
}

fn rules_of(config: &RefineConfig) -> Result<RuleSet, CorpusError> {
    RuleSet::without(&config.quality.off).map_err(|name| CorpusError::UnknownRule { name })
}

/// Refuses rules that there are not.
///
/// # Errors
/// [`CorpusError::UnknownRule`].
pub(crate) fn check_rules(config: &RefineConfig) -> Result<(), CorpusError> {
    rules_of(config).map(drop)
}

/// Judges the documents of one domain.
#[derive(Debug)]
pub(crate) struct Refiner {
    language: Language,
    /// Least share of the domain's language, where it is asked for.
    share_min: Option<f64>,
    rules: Option<RuleSet>,
    shared: Arc<Shared>,
}

impl Refiner {
    /// For the documents of `domain`.
    ///
    /// # Errors
    /// [`CorpusError::UnknownRule`].
    pub(crate) fn new(config: &RefineConfig, domain: &DomainConfig, shared: &Arc<Shared>) -> Result<Self, CorpusError> {
        let is_prose = domain.language != Language::Code;
        let asks_language = is_prose && config.language.enabled && !config.language.exempt.contains(&domain.name);
        let asks_quality = is_prose && config.quality.enabled && !config.quality.exempt.contains(&domain.name);
        let rules = rules_of(config)?;
        Ok(Self {
            language: domain.language,
            share_min: asks_language.then_some(config.language.share_min),
            rules: asks_quality.then_some(rules),
            shared: Arc::clone(shared),
        })
    }

    /// Judges one document, by itself.
    pub(crate) fn judge(&self, text: &str, scratch: &mut Scratch) -> Verdict {
        let verdict = match self.refine(text, scratch) {
            Ok(kept) => Verdict::Kept(kept),
            Err((broken, item)) => Verdict::Dropped(broken, item),
        };
        scratch.trim();
        verdict
    }

    fn refine(&self, text: &str, scratch: &mut Scratch) -> Result<Kept, (Broken, Option<BenchmarkItem>)> {
        let cleaned = clean::clean(text, self.language != Language::Code);
        let out = |rule, detail: String| (Broken { rule, detail }, None);
        if cleaned.text.trim().is_empty() {
            return Err(out(Dropped::Empty, String::new()));
        }
        let characters = repetition::characters(&cleaned.text) as u64;
        if cleaned.replaced * REPLACED_PER_CHARACTERS_MAX > characters {
            return Err(out(
                Dropped::Undecoded,
                format!("{} of {characters} characters", cleaned.replaced),
            ));
        }
        self.refuse_benchmarks(&cleaned.text, scratch)?;
        if let Some(share_min) = self.share_min {
            let found = language::identify(&cleaned.text);
            if found.share_of(self.language) < share_min {
                return Err(out(
                    Dropped::Language,
                    format!("{} in {:.2} of it", found.code, found.share),
                ));
            }
        }
        if let Some(rules) = &self.rules {
            let judged = match self.language {
                Language::En => english::judge(&cleaned.text, rules, scratch),
                Language::Zh => chinese::judge(&cleaned.text, rules, scratch),
                Language::Code => Ok(()),
            };
            judged.map_err(|broken| (broken, None))?;
        }
        Ok(self.keep(cleaned.text, text, scratch))
    }

    /// A text that holds an item of a benchmark is left out, whatever else is wrong with it.
    fn refuse_benchmarks(&self, text: &str, scratch: &mut Scratch) -> Result<(), (Broken, Option<BenchmarkItem>)> {
        let benchmarks = &self.shared.benchmarks;
        if benchmarks.is_empty() {
            return Ok(());
        }
        scratch.folded.set(text);
        let Some((item, groups)) = benchmarks.find(&scratch.folded, &mut scratch.runs) else {
            return Ok(());
        };
        let set = &benchmarks.sets()[item.set as usize].name;
        let broken = Broken {
            rule: Dropped::Contaminated,
            detail: format!("{set}, line {}: {groups} groups", item.line),
        };
        Err((broken, Some(item)))
    }

    /// A text that goes on, with the keys by which copies meet.
    fn keep(&self, text: String, original: &str, scratch: &mut Scratch) -> Kept {
        let Scratch { folded, runs, .. } = scratch;
        let bands = self.shared.sketcher.as_ref().map_or_else(Vec::new, |sketcher| {
            // Where there are benchmarks, it is folded already: no rule uses this part of the scratch memory.
            if self.shared.benchmarks.is_empty() {
                folded.set(&text);
            }
            sketcher.bands(folded, runs)
        });
        Kept {
            is_changed: text != original,
            exact: xxh3_128(text.as_bytes()),
            bands,
            text,
        }
    }
}

/// The last place between characters at or before a byte of the text.
pub(crate) fn boundary_below(text: &str, byte: usize) -> usize {
    (0..=byte.min(text.len()))
        .rev()
        .find(|&at| text.is_char_boundary(at))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::PathBuf;
    use tarazed_domain::config::SourceFormat;

    fn refiner(config: &RefineConfig, language: Language) -> Refiner {
        let domain = DomainConfig {
            name: "web".to_owned(),
            path: PathBuf::new(),
            format: SourceFormat::Auto,
            language,
            weight: 1.0,
            text_field: "text".to_owned(),
        };
        Refiner::new(config, &domain, &Shared::load(config).unwrap()).unwrap()
    }

    fn dropped(refiner: &Refiner, text: &str) -> Option<Dropped> {
        match refiner.judge(text, &mut Scratch::default()) {
            Verdict::Kept(_) => None,
            Verdict::Dropped(broken, _) => Some(broken.rule),
        }
    }

    #[test]
    fn each_stage_drops_its_own() {
        let config = RefineConfig::default();
        let english = refiner(&config, Language::En);
        assert_eq!(dropped(&english, " \u{feff}\n"), Some(Dropped::Empty));
        assert_eq!(dropped(&english, "caf\u{fffd} au lait"), Some(Dropped::Undecoded));
        assert_eq!(
            dropped(&english, "这是一个中文句子,不是英文。"),
            Some(Dropped::Language)
        );
        assert_eq!(
            dropped(&english, "This is an English sentence, and a short one."),
            Some(Dropped::GopherWords)
        );
        let code = refiner(&config, Language::Code);
        assert_eq!(dropped(&code, "int main() { return 0; }"), None);
        let mut exempt = config.clone();
        exempt.quality.exempt.push("web".to_owned());
        assert_eq!(
            dropped(
                &refiner(&exempt, Language::En),
                "This is an English sentence, and a short one."
            ),
            None
        );
        exempt.language.exempt.push("web".to_owned());
        assert_eq!(
            dropped(&refiner(&exempt, Language::En), "这是一个中文句子,不是英文。"),
            None
        );
    }

    #[test]
    fn an_unknown_rule_is_refused() {
        let mut config = RefineConfig::default();
        config.quality.off.push("gopher_wrods".to_owned());
        let domain = refiner(&RefineConfig::default(), Language::En);
        let error = Refiner::new(
            &config,
            &DomainConfig {
                name: "web".to_owned(),
                path: PathBuf::new(),
                format: SourceFormat::Auto,
                language: domain.language,
                weight: 1.0,
                text_field: "text".to_owned(),
            },
            &domain.shared,
        );
        assert!(error.unwrap_err().to_string().contains("gopher_wrods"));
    }

    proptest! {
        /// A verdict depends on the text alone: not on what the scratch memory has seen before (DET-1).
        #[test]
        fn verdicts_do_not_depend_on_what_came_before(before in any::<String>(), text in any::<String>(), zh in any::<bool>()) {
            let mut config = RefineConfig::default();
            config.quality.enabled = false;
            config.language.enabled = false;
            let refiner = refiner(&config, if zh { Language::Zh } else { Language::En });
            let mut scratch = Scratch::default();
            refiner.judge(&before, &mut scratch);
            prop_assert_eq!(refiner.judge(&text, &mut scratch), refiner.judge(&text, &mut Scratch::default()));
        }
    }
}
