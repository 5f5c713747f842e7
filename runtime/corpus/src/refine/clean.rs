//! Unicode cleaning: the same text in one form, without what no reader sees.
//!
//! 1. [Misread UTF-8](super::mojibake) is turned back.
//! 2. Dropped: byte order marks, control characters but tab and line feed, zero-width and direction marks, soft hyphens,
//!    noncharacters, and U+FFFD, which is counted.
//! 3. Line ends of every kind become line feeds; spaces of other widths become spaces, but for U+3000, which Chinese text
//!    indents with.
//! 4. Normalisation form C (Unicode Standard Annex 15).
//! 5. White space at the ends of lines goes, as do empty lines around the text; in prose, several empty lines become one.
//!
//! Cleaning clean text changes nothing.

use super::mojibake;
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

/// A text as it goes on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Cleaned {
    /// The text.
    pub(crate) text: String,
    /// Replacement characters (U+FFFD) that were dropped: bytes that somebody could not decode.
    pub(crate) replaced: u64,
}

/// Passes after which a text is taken as it is. Each pass that changes something else than its form makes the text shorter;
/// what was misread twice needs three.
const PASSES_MAX: usize = 8;

/// Cleans a text; `is_prose` says whether empty lines may be thinned out.
pub(crate) fn clean(text: &str, is_prose: bool) -> Cleaned {
    let mut replaced = 0;
    let mut current: Option<String> = None;
    for _ in 0..PASSES_MAX {
        let before = current.as_deref().unwrap_or(text);
        let repaired = mojibake::repair(before);
        let was_repaired = repaired.is_some();
        let (filtered, dropped) = filter(repaired.as_deref().unwrap_or(before));
        replaced += dropped;
        let normal = normalise(filtered);
        let done = !was_repaired && normal.len() == before.len() && normal == before;
        current = Some(normal);
        if done {
            break;
        }
    }
    Cleaned {
        text: lay_out(current.as_deref().unwrap_or(text), is_prose),
        replaced,
    }
}

enum Fate {
    Keep(char),
    Drop,
    Replacement,
}

const fn fate(c: char) -> Fate {
    match c {
        '\n' | '\t' => Fate::Keep(c),
        // A carriage return before a line feed is dropped by the caller.
        '\r' | '\u{b}' | '\u{c}' | '\u{85}' | '\u{2028}' | '\u{2029}' => Fate::Keep('\n'),
        '\u{0}'..='\u{1f}' | '\u{7f}'..='\u{9f}' => Fate::Drop,
        '\u{a0}' | '\u{1680}' | '\u{2000}'..='\u{200a}' | '\u{202f}' | '\u{205f}' => Fate::Keep(' '),
        '\u{ad}' | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' => Fate::Drop,
        '\u{2060}' | '\u{2066}'..='\u{2069}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' => Fate::Drop,
        '\u{fffd}' => Fate::Replacement,
        '\u{fdd0}'..='\u{fdef}' => Fate::Drop,
        _ if c as u32 & 0xfffe == 0xfffe => Fate::Drop,
        _ => Fate::Keep(c),
    }
}

fn filter(text: &str) -> (String, u64) {
    let mut out = String::with_capacity(text.len());
    let mut replaced = 0;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '\r' && chars.peek() == Some(&'\n') {
            continue;
        }
        match fate(c) {
            Fate::Keep(c) => out.push(c),
            Fate::Drop => {}
            Fate::Replacement => replaced += 1,
        }
    }
    (out, replaced)
}

fn normalise(text: String) -> String {
    // These neither change nor combine with each other; the quick check of the standard looks each of them up.
    let inert = |c: char| {
        matches!(c, '\0'..='\u{2ff}' | '\u{4e00}'..='\u{9fff}' | '\u{2010}'..='\u{2027}' | '\u{3000}'..='\u{3028}'
            | '\u{3030}'..='\u{3096}' | '\u{30a0}'..='\u{30ff}' | '\u{ff00}'..='\u{ffef}')
    };
    if text.is_ascii() || text.chars().all(inert) || is_nfc_quick(text.chars()) == IsNormalized::Yes {
        return text;
    }
    text.nfc().collect()
}

fn lay_out(text: &str, is_prose: bool) -> String {
    let mut out = String::with_capacity(text.len());
    let mut empty = 0_usize;
    for line in text.split('\n').map(str::trim_end) {
        if line.is_empty() {
            empty += 1;
            continue;
        }
        if !out.is_empty() {
            let breaks = if is_prose { empty.min(1) } else { empty } + 1;
            (0..breaks).for_each(|_| out.push('\n'));
        }
        empty = 0;
        out.push_str(line);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prose(text: &str) -> String {
        clean(text, true).text
    }

    #[test]
    fn invisible_things_go_and_text_stays() {
        for (text, expected) in [
            ("\u{feff}one\r\ntwo\rthree\u{2028}four", "one\ntwo\nthree\nfour"),
            ("a\u{0}b\u{7}c\u{200b}d\u{ad}e\u{202e}f\u{9f}g", "abcdefg"),
            ("wide\u{a0}and\u{2003}narrow\u{202f}spaces", "wide and narrow spaces"),
            ("\n\n  indented\n\n\n\nlast \t\n\n", "  indented\n\nlast"),
            (
                "\u{3000}\u{3000}段落。\u{3000}\n第二段。",
                "\u{3000}\u{3000}段落。\n第二段。",
            ),
            ("cafe\u{301} \u{212b} \u{1100}\u{1161}", "café Å 가"),
            ("itâ€™s cafÃ©", "it’s café"),
            ("\u{fdd0}\u{ffff}x", "x"),
            (" \n\t\n", ""),
        ] {
            assert_eq!(prose(text), expected);
        }
        let replaced = clean("a\u{fffd}\u{fffd}b", true);
        assert_eq!((replaced.text.as_str(), replaced.replaced), ("ab", 2));
    }

    #[test]
    fn program_text_keeps_its_empty_lines() {
        let text = "def f():\n    return 1\n\n\n\ndef g():\n\treturn 2";
        assert_eq!(clean(text, false).text, text);
        assert_eq!(clean("x = 1  \r\n\r\n\r\ny\r\n", false).text, "x = 1\n\n\ny");
    }

    /// Text that was misread twice is turned back twice.
    #[test]
    fn what_one_pass_uncovers_the_next_one_cleans() {
        assert_eq!(prose("cafÃƒÂ©"), "café");
        assert_eq!(prose("A\u{303}\u{200b}©"), "é");
    }

    proptest! {
        /// Cleaning twice is cleaning once, whatever the text.
        #[test]
        fn clean_text_is_left_alone(text in any::<String>(), is_prose in any::<bool>()) {
            let once = clean(&text, is_prose);
            let twice = clean(&once.text, is_prose);
            prop_assert_eq!(&twice.text, &once.text);
            prop_assert_eq!(twice.replaced, 0);
        }

        /// The same from the characters that the rules are about.
        #[test]
        fn clean_text_of_hard_characters_is_left_alone(text in "[ \n\r\tAaeÃÂâ€™äåé©\u{303}\u{301}\u{200b}\u{a0}\u{ad}\u{feff}\u{fffd}\u{80}\u{99}\u{3000}中¯»¿½]{0,24}") {
            let once = prose(&text);
            prop_assert_eq!(prose(&once), once);
        }

        /// What is ordinary comes through as it was.
        #[test]
        fn ordinary_text_is_kept(text in "[a-zA-Z0-9,.!?中文字符。,!]{1,40}") {
            prop_assert_eq!(prose(&text), text);
        }
    }
}
