//! Why a document is left out: every reason by its name, its source and what it says.

use serde::{Deserialize, Serialize};

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident $name:literal, $kind:ident, $source:literal;)+) => {
        /// Why a document was left out. In reports and indexes by its name.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        pub enum Dropped {
            $($(#[doc = $doc])+ #[serde(rename = $name)] $variant,)+
        }

        impl Dropped {
            /// All reasons, in a fixed order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The name in files and reports.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// What kind of reason it is.
            #[must_use]
            pub const fn kind(self) -> ReasonKind {
                match self { $(Self::$variant => ReasonKind::$kind,)+ }
            }

            /// Where rule and threshold come from.
            #[must_use]
            pub const fn source(self) -> &'static str {
                match self { $(Self::$variant => $source,)+ }
            }
        }
    };
}

/// What kind of reason a document was left out for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReasonKind {
    /// It could not be read.
    Input,
    /// It came before.
    Copy,
    /// It is in another language.
    Language,
    /// A quality rule, which a config can turn off by name.
    Quality,
    /// It holds text of a benchmark.
    Benchmark,
}

reasons! {
    /// Nothing but white space, or a null.
    Empty "empty", Input, "";
    /// The exact text came before.
    Duplicate "duplicate", Copy, "";
    /// Bytes that are not UTF-8.
    InvalidUtf8 "invalid_utf8", Input, "";
    /// A line that is not a JSON object.
    BadRecord "bad_record", Input, "";
    /// A JSON object without a string in the text field.
    NoText "no_text", Input, "";
    /// More bytes than `data.refine.document_bytes_max`.
    TooLarge "too_large", Input, "";
    /// More than one character in a thousand was lost before the text came here (U+FFFD).
    Undecoded "undecoded", Input, "";
    /// Too little of it is in its domain's language.
    Language "language", Language, "";
    /// Not between 50 and 100,000 words.
    GopherWords "gopher_words", Quality, "Rae et al. 2021 (Gopher), appendix A.1.1, quality filtering";
    /// A mean word length outside 3 to 10 characters.
    GopherWordLength "gopher_word_length", Quality, "Rae et al. 2021 (Gopher), appendix A.1.1, quality filtering";
    /// More than one hash sign, or more than one ellipsis, for ten words.
    GopherSymbols "gopher_symbols", Quality, "Rae et al. 2021 (Gopher), appendix A.1.1, quality filtering";
    /// More than 90% of the lines begin with a bullet.
    GopherBullets "gopher_bullets", Quality, "Rae et al. 2021 (Gopher), appendix A.1.1, quality filtering";
    /// More than 30% of the lines end with an ellipsis.
    GopherEllipses "gopher_ellipses", Quality, "Rae et al. 2021 (Gopher), appendix A.1.1, quality filtering";
    /// Fewer than 80% of the words have a letter.
    GopherLetters "gopher_letters", Quality, "Rae et al. 2021 (Gopher), appendix A.1.1, quality filtering";
    /// Fewer than two of: the, be, to, of, and, that, have, with.
    GopherStopWords "gopher_stop_words", Quality, "Rae et al. 2021 (Gopher), appendix A.1.1, quality filtering";
    /// More than 30% of the lines, or 20% of the characters, are in lines that came before.
    GopherRepeatedLines "gopher_repeated_lines", Quality, "Rae et al. 2021 (Gopher), table A1";
    /// More than 30% of the paragraphs, or 20% of the characters, are in paragraphs that came before.
    GopherRepeatedParagraphs "gopher_repeated_paragraphs", Quality, "Rae et al. 2021 (Gopher), table A1";
    /// The most frequent group of 2, 3 or 4 words holds more than 20, 18 or 16% of the characters.
    GopherTopGroup "gopher_top_group", Quality, "Rae et al. 2021 (Gopher), table A1";
    /// Groups of 5 to 10 words that came before hold more than 15 to 10% of the characters.
    GopherRepeatedGroups "gopher_repeated_groups", Quality, "Rae et al. 2021 (Gopher), table A1";
    /// Fewer than three sentences.
    C4Sentences "c4_sentences", Quality, "Raffel et al. 2020 (C4), section 2.2";
    /// "lorem ipsum".
    C4LoremIpsum "c4_lorem_ipsum", Quality, "Raffel et al. 2020 (C4), section 2.2";
    /// A curly bracket, which program text has and prose has not.
    C4CurlyBracket "c4_curly_bracket", Quality, "Raffel et al. 2020 (C4), section 2.2";
    /// At most 12% of the lines end with punctuation.
    FinewebLinePunctuation "fineweb_line_punctuation", Quality, "Penedo et al. 2024 (FineWeb), section 3.6";
    /// At least 67% of the lines are shorter than 30 characters.
    FinewebShortLines "fineweb_short_lines", Quality, "Penedo et al. 2024 (FineWeb), section 3.6";
    /// At least 10% of the characters are in repeated lines.
    FinewebRepeatedLines "fineweb_repeated_lines", Quality, "Penedo et al. 2024 (FineWeb), section 3.6";
    /// Not between 200 and 200,000 characters, white space not counted.
    ZhCharacters "zh_characters", Quality, "lower end: Chen et al. 2023 (ChineseWebText); upper end: counterpart of gopher_words, a word is two characters";
    /// Fewer than 30% of the characters are Han.
    ZhHan "zh_han", Quality, "Chen et al. 2023 (ChineseWebText)";
    /// Lines of fewer than 10 characters on average.
    ZhLineLength "zh_line_length", Quality, "Chen et al. 2023 (ChineseWebText)";
    /// More than one hash sign, or more than one ellipsis, for twenty characters.
    ZhSymbols "zh_symbols", Quality, "counterpart of gopher_symbols: a word is two characters";
    /// More than 90% of the lines begin with a bullet.
    ZhBullets "zh_bullets", Quality, "gopher_bullets, by lines and not by words";
    /// More than 30% of the lines end with an ellipsis.
    ZhEllipses "zh_ellipses", Quality, "gopher_ellipses, by lines and not by words";
    /// At most 12% of the lines end with punctuation, Chinese or Western.
    ZhLinePunctuation "zh_line_punctuation", Quality, "counterpart of fineweb_line_punctuation, with Chinese marks";
    /// More than 30% of the lines, or 20% of the characters, are in lines that came before.
    ZhRepeatedLines "zh_repeated_lines", Quality, "gopher_repeated_lines, by lines and not by words";
    /// More than half of the groups of 13 characters stand in it more than once.
    ZhRepeatedGroups "zh_repeated_groups", Quality, "Chen et al. 2023 (ChineseWebText)";
    /// It holds a piece of a benchmark set.
    Contaminated "contaminated", Benchmark, "";
    /// A near copy of it came before, by MinHash.
    NearDuplicate "near_duplicate", Copy, "Broder 1997; bands as in Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4";
}

/// A broken rule, with the figure that broke it.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Broken {
    pub(crate) rule: Dropped,
    pub(crate) detail: String,
}

/// The quality rules that are applied.
#[derive(Clone, Debug)]
pub(crate) struct RuleSet {
    off: Vec<Dropped>,
}

impl RuleSet {
    /// All but the named ones; an unknown name is given back.
    pub(crate) fn without(off: &[String]) -> Result<Self, String> {
        let known = |name: &String| {
            let quality = Dropped::ALL.iter().filter(|rule| rule.kind() == ReasonKind::Quality);
            quality
                .copied()
                .find(|rule| rule.name() == name)
                .ok_or_else(|| name.clone())
        };
        let off = off.iter().map(known).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { off })
    }

    /// Breaks `rule` where it is applied and `is_broken`; the detail is made only then.
    pub(crate) fn check(&self, rule: Dropped, is_broken: bool, detail: impl FnOnce() -> String) -> Result<(), Broken> {
        if is_broken && !self.off.contains(&rule) {
            return Err(Broken { rule, detail: detail() });
        }
        Ok(())
    }

    /// Whether a rule is applied.
    pub(crate) fn is_on(&self, rule: Dropped) -> bool {
        !self.off.contains(&rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_to_one_and_the_old_ones_stay() {
        let names: std::collections::BTreeSet<_> = Dropped::ALL.iter().map(|rule| rule.name()).collect();
        assert_eq!(names.len(), Dropped::ALL.len());
        for rule in Dropped::ALL {
            let json = serde_json::to_string(rule).unwrap();
            assert_eq!(json, format!("\"{}\"", rule.name()));
            assert_eq!(serde_json::from_str::<Dropped>(&json).unwrap(), *rule);
            assert_eq!(
                rule.kind() == ReasonKind::Quality,
                !rule.source().is_empty() && *rule != Dropped::NearDuplicate
            );
        }
        assert_eq!(
            (Dropped::Empty.name(), Dropped::Duplicate.name()),
            ("empty", "duplicate")
        );
        // Indexes of older data sets are ordered by these two.
        assert_eq!(Dropped::ALL[..2], [Dropped::Empty, Dropped::Duplicate]);
    }

    #[test]
    fn every_reason_is_documented() {
        let page = include_str!("../../../../docs/DATA.md");
        for rule in Dropped::ALL {
            assert!(
                page.contains(&format!("| `{}` |", rule.name())),
                "docs/DATA.md does not explain {}",
                rule.name()
            );
        }
    }

    #[test]
    fn only_quality_rules_can_be_turned_off() {
        let rules = RuleSet::without(&["c4_curly_bracket".to_owned()]).unwrap();
        assert!(!rules.is_on(Dropped::C4CurlyBracket) && rules.is_on(Dropped::C4Sentences));
        assert!(rules.check(Dropped::C4CurlyBracket, true, String::new).is_ok());
        assert!(rules.check(Dropped::C4Sentences, true, String::new).is_err());
        for name in ["contaminated", "empty", "no_such_rule"] {
            assert_eq!(RuleSet::without(&[name.to_owned()]).unwrap_err(), name);
        }
    }
}
