//! A text as a comparison sees it: letters and digits alone, in lower case, so that punctuation, spacing and case are no
//! difference.
//!
//! A *word* is a run of letters and digits; each character of a script that is written without spaces is a word of its own.
//! Full-width forms of ASCII are the ASCII they stand for.

use super::table::mix;

/// What a comparison sees of a text.
#[derive(Debug, Default)]
pub(super) struct Folded {
    /// Hash of each word.
    pub(super) words: Vec<u64>,
    /// All letters and digits in a row.
    pub(super) characters: Vec<u32>,
    /// How many of them are Han.
    pub(super) han: usize,
}

impl Folded {
    /// Takes a text in.
    pub(super) fn set(&mut self, text: &str) {
        self.words.clear();
        self.characters.clear();
        self.han = 0;
        let mut word: Option<u64> = None;
        for c in text.chars() {
            let Some(folded) = fold(c) else {
                self.words.extend(word.take().map(mix));
                continue;
            };
            self.characters.push(folded as u32);
            if folded.is_ascii() || !is_unspaced(folded) {
                word = Some(grow(word.unwrap_or(0), folded));
            } else {
                self.han += usize::from(is_han(folded));
                self.words.extend(word.take().map(mix));
                self.words.push(mix(grow(0, folded)));
            }
        }
        self.words.extend(word.map(mix));
    }

    /// Whether the text is one of characters and not of words: a third of its letters are Han. A Han character stands for
    /// as much text as two or three Latin letters, so such a text says more than half of it in Han.
    pub(super) const fn is_unspaced(&self) -> bool {
        self.han * 3 >= self.characters.len() && self.han > 0
    }

    /// Bytes held.
    pub(super) const fn bytes(&self) -> usize {
        self.words.capacity() * size_of::<u64>() + self.characters.capacity() * size_of::<u32>()
    }
}

fn grow(word: u64, c: char) -> u64 {
    (word.rotate_left(5) ^ u64::from(c as u32)).wrapping_mul(0x517C_C1B7_2722_0A95)
}

/// Lower-case letter or digit; none for what is neither.
fn fold(c: char) -> Option<char> {
    if c.is_ascii() {
        return c.is_ascii_alphanumeric().then(|| c.to_ascii_lowercase());
    }
    if is_han(c) {
        return Some(c);
    }
    match c {
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(c as u32 - 0xfee0).and_then(fold),
        _ if c.is_alphanumeric() => c.to_lowercase().next(),
        _ => None,
    }
}

/// Han characters: the unified ideographs with their extensions and compatibility forms.
pub const fn is_han(c: char) -> bool {
    matches!(c, '\u{4e00}'..='\u{9fff}' | '\u{3400}'..='\u{4dbf}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{323af}')
}

/// Hiragana and katakana, half-width ones too.
pub(super) const fn is_kana(c: char) -> bool {
    matches!(c, '\u{3041}'..='\u{3096}' | '\u{30a1}'..='\u{30fa}' | '\u{ff66}'..='\u{ff9d}')
}

/// Scripts written without spaces between words.
const fn is_unspaced(c: char) -> bool {
    is_han(c) || is_kana(c) || matches!(c, '\u{0e01}'..='\u{0e3a}' | '\u{0e80}'..='\u{0edf}' | '\u{1780}'..='\u{17dd}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folded(text: &str) -> Folded {
        let mut folded = Folded::default();
        folded.set(text);
        folded
    }

    #[test]
    fn case_punctuation_and_width_are_no_difference() {
        let plain = folded("natalia sold 48 clips in april");
        for text in [
            "Natalia sold 48 clips, in April!",
            "\u{ff2e}atalia -- sold (４８) clips... in April",
        ] {
            assert_eq!(folded(text).words, plain.words, "{text}");
            assert_eq!(folded(text).characters, plain.characters, "{text}");
        }
        assert_ne!(folded("natalia sold 48 clips in may").words, plain.words);
        assert_eq!(plain.words.len(), 6);
        // Joined words are other words, and the same characters.
        let joined = folded("nataliasold48clips inapril");
        assert_eq!(joined.characters, plain.characters);
        assert_ne!(joined.words, plain.words);
    }

    #[test]
    fn han_characters_are_words() {
        let text = folded("使用 ls -l 命令,列出文件。");
        assert_eq!(text.words.len(), 10);
        assert_eq!(text.han, 8);
        assert!(text.is_unspaced());
        assert!(!folded("the character 中 means middle").is_unspaced());
        assert!(!folded("").is_unspaced());
    }
}
