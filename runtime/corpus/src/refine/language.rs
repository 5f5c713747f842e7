//! Which language a document is in: scripts are counted, and text in Latin letters goes to `whichlang` (a linear model over
//! hashed character groups for sixteen languages, compiled in; MIT).
//!
//! A document is judged by windows spread evenly over it, so that its cost does not grow with its length and a page in two
//! languages shows as one. A window is Chinese where Han characters, each counted for three Latin letters, are at least half
//! of it and there is hardly any kana. Where Latin letters lead, it is English if function words that only English has are
//! frequent, which the model does not see in manuals full of names and options; else `whichlang` decides. Chinese is not asked of
//! the model: in technical text most *letters* of a Chinese page are Latin.

use super::boundary_below;
use super::fold::{is_han, is_kana};
use tarazed_domain::config::Language;

const WINDOWS_MAX: usize = 8;
const WINDOW_BYTES: usize = 512;
/// Letters below which a window has no vote.
const LETTERS_MIN: usize = 8;
/// Latin letters that say as much as one Han character: bilingual texts of equal content have two to four.
const LATIN_PER_HAN: usize = 3;

/// Function words of English that no other language in Latin letters writes alike.
const ENGLISH_WORDS: [&str; 20] = [
    "the", "and", "that", "with", "for", "this", "from", "which", "are", "not", "when", "you", "will", "been", "have",
    "should", "would", "into", "these", "than",
];
/// A window is English with so many different ones, and so many of a hundred words; running text has twenty.
const ENGLISH_WORDS_MIN: u32 = 2;
const ENGLISH_WORDS_PERCENT_MIN: usize = 8;

/// What a document was found to be.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Identified {
    /// Three-letter code of the language most windows are in, by ISO 639-3; `und` where none had a vote.
    pub(crate) code: &'static str,
    /// Share of the windows with a vote that are in it.
    pub(crate) share: f64,
    english: f64,
    chinese: f64,
}

impl Identified {
    /// Share of windows in a language of the config; program text is no language.
    pub(crate) const fn share_of(&self, language: Language) -> f64 {
        match language {
            Language::En => self.english,
            Language::Zh => self.chinese,
            Language::Code => 1.0,
        }
    }
}

/// Identifies a document's language.
pub(crate) fn identify(text: &str) -> Identified {
    let mut votes: Vec<(&'static str, usize)> = Vec::with_capacity(4);
    let mut all = 0_usize;
    for window in windows(text) {
        let Some(code) = vote(window) else { continue };
        all += 1;
        match votes.iter_mut().find(|(known, _)| *known == code) {
            Some((_, count)) => *count += 1,
            None => votes.push((code, 1)),
        }
    }
    let share = |count: usize| count as f64 / all.max(1) as f64;
    let of = |code: &str| {
        votes
            .iter()
            .find(|(known, _)| *known == code)
            .map_or(0.0, |(_, count)| share(*count))
    };
    // The first of equals, in the order in which they came.
    let winner = votes.iter().rev().max_by_key(|(_, count)| *count).copied();
    Identified {
        code: winner.map_or("und", |(code, _)| code),
        share: winner.map_or(0.0, |(_, count)| share(count)),
        english: of("eng"),
        chinese: of("zho"),
    }
}

/// At most so many pieces of a text, evenly over it, cut between characters.
fn windows(text: &str) -> impl Iterator<Item = &str> {
    let count = text.len().div_ceil(WINDOW_BYTES).clamp(1, WINDOWS_MAX);
    let room = text.len().saturating_sub(WINDOW_BYTES);
    (0..count).map(move |index| {
        let start = if count == 1 { 0 } else { room * index / (count - 1) };
        let start = boundary_below(text, start);
        &text[start..boundary_below(text, start + WINDOW_BYTES)]
    })
}

fn vote(window: &str) -> Option<&'static str> {
    let (mut latin, mut han, mut kana, mut other) = (0, 0, 0, 0);
    for c in window.chars() {
        match c {
            _ if c.is_ascii_alphabetic() => latin += 1,
            _ if c.is_ascii() => {}
            _ if is_han(c) => han += 1,
            _ if is_kana(c) => kana += 1,
            '\u{c0}'..='\u{24f}' | '\u{1e00}'..='\u{1eff}' if c.is_alphabetic() => latin += 1,
            _ if c.is_alphabetic() => other += 1,
            _ => {}
        }
    }
    let unspaced = (han + kana) * LATIN_PER_HAN;
    if latin + unspaced + other < LETTERS_MIN {
        return None;
    }
    if unspaced >= latin + other && unspaced > 0 {
        // Japanese prose is a third to two thirds kana; Chinese text has a name in it at most.
        return Some(if kana * 10 > han { "jpn" } else { "zho" });
    }
    if latin > other && has_english_words(window) {
        return Some("eng");
    }
    if latin > other {
        // Said to be Chinese or Japanese in Latin letters, it is neither and no other language of the model.
        return match whichlang::detect_language(window).three_letter_code() {
            "cmn" | "jpn" | "kor" => Some("und"),
            code => Some(code),
        };
    }
    Some(whichlang::detect_language(window).three_letter_code())
}

fn has_english_words(window: &str) -> bool {
    let (mut words, mut found, mut different) = (0, 0, 0_u32);
    for word in window
        .split(|c: char| !c.is_alphabetic())
        .filter(|word| !word.is_empty())
    {
        words += 1;
        if let Some(at) = ENGLISH_WORDS.iter().position(|known| word.eq_ignore_ascii_case(known)) {
            found += 1;
            different |= 1 << at;
        }
    }
    different.count_ones() >= ENGLISH_WORDS_MIN && found * 100 >= words * ENGLISH_WORDS_PERCENT_MIN
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn plain_texts_are_known() {
        for (text, code) in [
            (
                "The controller supervises one rank process per slot, and a lost rank is replaced.",
                "eng",
            ),
            ("控制器监督每个槽位上的一个进程,丢失的进程会被替换。", "zho"),
            (
                "使用 ls -l 命令可以列出当前目录 (current directory) 下的所有文件和权限。",
                "zho",
            ),
            (
                "Der Kontrolleur überwacht einen Prozess je Platz, und ein verlorener wird ersetzt.",
                "deu",
            ),
            (
                "Le contrôleur surveille un processus par emplacement et remplace celui qui est perdu.",
                "fra",
            ),
            (
                "コントローラはスロットごとに一つのプロセスを監視し、失われたものを置き換えます。",
                "jpn",
            ),
            (
                "Контроллер следит за процессом в каждом слоте и заменяет потерянный процесс.",
                "rus",
            ),
            ("12345 67890 --- ###", "und"),
            ("", "und"),
        ] {
            assert_eq!(identify(text).code, code, "{text}");
        }
    }

    /// A page in two languages is seen as one.
    #[test]
    fn shares_of_mixed_text_are_seen() {
        let english = "The controller supervises one rank process per slot, and a lost rank is replaced. ".repeat(50);
        let chinese = "控制器监督每个槽位上的一个进程,丢失的进程会被替换,训练继续进行。".repeat(40);
        let mixed = identify(&format!("{english}\n{chinese}"));
        for language in [Language::En, Language::Zh] {
            let share = mixed.share_of(language);
            assert!((0.25..=0.75).contains(&share), "{language:?} {share}");
        }
        assert!(identify(&english).share_of(Language::En) > 0.99);
        assert!(identify(&chinese).share_of(Language::Zh) > 0.99);
    }

    /// Texts of the corpus that ships, of a file.
    fn shipped(name: &str) -> Vec<String> {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/corpus");
        let lines = std::fs::read_to_string(folder.join(name)).unwrap();
        let text = |line: &str| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["text"]
                .as_str()
                .unwrap()
                .to_owned()
        };
        lines.lines().map(text).collect()
    }

    /// Accuracy on real text, whole documents and single windows of 200 characters, and on text mixed of both languages. Figures
    /// are printed; the bounds are a little below what was measured.
    #[test]
    fn the_shipped_corpus_is_identified() {
        let share = |right: usize, all: usize| right as f64 / all as f64;
        for (files, language) in [
            (
                &[
                    "book-en.jsonl",
                    "help-en.jsonl",
                    "manual-en.jsonl",
                    "knowledge-en.jsonl",
                ][..],
                Language::En,
            ),
            (
                &["book-zh.jsonl", "help-zh.jsonl", "manual-zh.jsonl", "classic-zh.jsonl"],
                Language::Zh,
            ),
        ] {
            for file in files {
                let texts = shipped(file);
                let right = texts
                    .iter()
                    .filter(|text| identify(text).share_of(language) >= 0.5)
                    .count();
                let pieces: Vec<String> = texts
                    .iter()
                    .map(|text| text.chars().skip(100).take(200).collect::<String>())
                    .filter(|piece: &String| piece.chars().count() == 200)
                    .collect();
                let right_pieces = pieces
                    .iter()
                    .filter(|text| identify(text).share_of(language) >= 0.5)
                    .count();
                let (whole, short) = (share(right, texts.len()), share(right_pieces, pieces.len().max(1)));
                println!(
                    "{file}: documents {whole:.4} of {}, pieces {short:.4} of {}",
                    texts.len(),
                    pieces.len()
                );
                // Of the manuals some are tables of card names and lists of files, without a sentence in any language.
                let least = if *file == "manual-en.jsonl" { 0.88 } else { 0.97 };
                assert!(whole >= least, "{file}: {whole}");
                assert!(short >= 0.90, "{file}: {short}");
            }
        }
        // Half English, half Chinese by bytes: neither is more than three quarters of it.
        let (english, chinese) = (shipped("book-en.jsonl"), shipped("book-zh.jsonl"));
        let mixed: Vec<Identified> = english
            .iter()
            .zip(&chinese)
            .filter(|(a, b)| a.len() > 3000 && b.len() > 3000)
            .map(|(a, b)| {
                identify(&format!(
                    "{}\n{}",
                    &a[..a.floor_char_boundary(3000)],
                    &b[..b.floor_char_boundary(3000)]
                ))
            })
            .collect();
        let fair = mixed
            .iter()
            .filter(|found| {
                [Language::En, Language::Zh]
                    .iter()
                    .all(|&l| (0.25..=0.75).contains(&found.share_of(l)))
            })
            .count();
        println!("mixed: {fair} of {} seen as both", mixed.len());
        assert!(mixed.len() > 20 && share(fair, mixed.len()) >= 0.95);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in any::<String>()) {
            let found = identify(&text);
            prop_assert!((0.0..=1.0).contains(&found.share));
            prop_assert!(found.share_of(Language::En) + found.share_of(Language::Zh) <= 1.0 + 1e-9);
        }

        /// Windows cover short texts whole, and lie inside any.
        #[test]
        fn windows_are_pieces(text in "[a中é\n]{0,3000}") {
            let pieces: Vec<&str> = windows(&text).collect();
            prop_assert!(pieces.len() <= WINDOWS_MAX);
            prop_assert!(pieces.iter().all(|piece| piece.len() <= WINDOW_BYTES + 3));
            if text.len() <= WINDOW_BYTES {
                prop_assert_eq!(pieces.concat(), text);
            }
        }
    }
}
