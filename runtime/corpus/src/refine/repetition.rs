//! How much of a text came before in the same text: the measures of Gopher's repetition rules (Rae et al. 2021, arXiv
//! 2112.11446, appendix A.1.1, table A1).

use super::table::{Counter, Runs, power};
use xxhash_rust::xxh3::xxh3_64;

/// Repeated pieces (lines, paragraphs) of a text.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(super) struct Repeated {
    /// Share of the pieces that came before.
    pub(super) pieces: f64,
    /// Share of the characters that stand in them.
    pub(super) characters: f64,
}

/// Counts pieces that came before; `pieces` are what is left after trimming, with empty ones left out.
pub(super) fn pieces<'a>(counter: &mut Counter, count_max: usize, pieces: impl Iterator<Item = &'a str>) -> Repeated {
    counter.reset(count_max);
    let (mut all, mut all_characters, mut repeated, mut repeated_characters) = (0_usize, 0_usize, 0_usize, 0_usize);
    for piece in pieces {
        let length = characters(piece);
        all += 1;
        all_characters += length;
        if counter.add(xxh3_64(piece.as_bytes())) > 0 {
            repeated += 1;
            repeated_characters += length;
        }
    }
    let share = |part: usize, whole: usize| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
    Repeated {
        pieces: share(repeated, all),
        characters: share(repeated_characters, all_characters),
    }
}

/// Characters of a text; the bytes that begin one are counted.
pub(super) fn characters(text: &str) -> usize {
    text.bytes().filter(|byte| byte & 0xc0 != 0x80).count()
}

/// Words of a text as its rules of repetition see them.
#[derive(Debug, Default)]
pub(super) struct Words {
    runs: Runs,
    /// `ends[i]` is the number of characters of the first `i` words.
    ends: Vec<u64>,
}

impl Words {
    /// Takes words in, with their lengths in characters.
    pub(super) fn set<'a>(&mut self, words: impl Iterator<Item = (&'a str, u32)>) {
        let Self { runs, ends } = self;
        ends.clear();
        ends.push(0);
        let mut end = 0;
        runs.set(words.map(|(word, length)| {
            end += u64::from(length);
            ends.push(end);
            xxh3_64(word.as_bytes())
        }));
    }

    /// Characters of all words.
    pub(super) fn characters(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Share of the characters that the most frequent group of `length` words holds; of equally frequent groups, the longest.
    /// Zero where none comes twice.
    pub(super) fn top_group(&self, counter: &mut Counter, length: usize) -> f64 {
        let count = (self.runs.len() + 1).saturating_sub(length);
        counter.reset(count);
        let power = power(length);
        let (mut most, mut longest) = (1_u32, 0_u64);
        for start in 0..count {
            let times = counter.add(self.runs.hash(start, length, power)) + 1;
            let held = self.ends[start + length] - self.ends[start];
            if times > most {
                (most, longest) = (times, held);
            } else if times == most && times > 1 {
                longest = longest.max(held);
            }
        }
        if most < 2 {
            return 0.0;
        }
        (u64::from(most) * longest) as f64 / self.characters().max(1) as f64
    }

    /// Share of the characters that stand in groups of `length` words that came before, none counted twice.
    pub(super) fn repeated_groups(&self, counter: &mut Counter, length: usize) -> f64 {
        let count = (self.runs.len() + 1).saturating_sub(length);
        counter.reset(count);
        let power = power(length);
        let (mut repeated, mut counted_to) = (0_u64, 0_usize);
        for start in 0..count {
            if counter.add(self.runs.hash(start, length, power)) > 0 {
                let from = start.max(counted_to);
                counted_to = start + length;
                repeated += self.ends[counted_to] - self.ends[from];
            }
        }
        repeated as f64 / self.characters().max(1) as f64
    }

    /// Bytes held.
    pub(super) const fn bytes(&self) -> usize {
        self.runs.bytes() + self.ends.capacity() * size_of::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{HashMap, HashSet};

    fn words(text: &str) -> Words {
        let mut words = Words::default();
        words.set(text.split_whitespace().map(|word| (word, characters(word) as u32)));
        words
    }

    #[test]
    fn repeated_lines_are_counted_with_their_characters() {
        let found = pieces(&mut Counter::default(), 4, ["abc", "de", "abc", "中文"].into_iter());
        assert_eq!((found.pieces, found.characters), (0.25, 0.3));
        assert_eq!(pieces(&mut Counter::default(), 0, [].into_iter()), Repeated::default());
    }

    proptest! {
        /// Against the definitions, word by word.
        #[test]
        fn shares_are_those_of_the_definition(picks in prop::collection::vec(0..4_usize, 0..60), length in 2..6_usize) {
            let list: Vec<&str> = picks.iter().map(|&pick| ["a", "bb", "ccc", "中文字符"][pick]).collect();
            let found = words(&list.join(" "));
            let size = |words: &[&str]| words.iter().map(|word| characters(word)).sum::<usize>();
            let all = size(&list).max(1) as f64;
            let mut counts: HashMap<&[&str], usize> = HashMap::new();
            let mut marked = vec![false; list.len()];
            let mut seen: HashSet<&[&str]> = HashSet::new();
            for start in 0..(list.len() + 1).saturating_sub(length) {
                let group = &list[start..start + length];
                *counts.entry(group).or_default() += 1;
                if !seen.insert(group) {
                    marked[start..start + length].fill(true);
                }
            }
            let most = counts.values().copied().max().unwrap_or(0);
            let longest = counts.iter().filter(|(_, count)| **count == most).map(|(group, _)| size(group)).max();
            let top = if most < 2 { 0.0 } else { (most * longest.unwrap_or(0)) as f64 / all };
            let repeated: usize = list.iter().zip(&marked).filter(|(_, marked)| **marked).map(|(word, _)| characters(word)).sum();
            let mut counter = Counter::default();
            prop_assert!((found.top_group(&mut counter, length) - top).abs() < 1e-12);
            prop_assert!((found.repeated_groups(&mut counter, length) - repeated as f64 / all).abs() < 1e-12);
        }
    }
}
