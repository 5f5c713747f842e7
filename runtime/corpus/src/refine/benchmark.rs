//! Decontamination: which documents hold a piece of a benchmark's item.
//!
//! Each text of an item is cut into groups, and a document that holds one group of any item is contaminated:
//! - **words**: 13 words in a row, as in GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C), on letters and digits in
//!   lower case, so that punctuation, case and line breaks are no difference;
//! - **letters**: 50 letters and digits in a row whatever stands between them, so that joined and cut words are none either;
//! - **Han**: 20 characters in a row, for texts of which a third is Han, where there are no words to count.
//!
//! A shorter text is one group by itself if it has at least 8 words, 30 letters or 12 characters; what is shorter still could
//! stand anywhere, and is counted as too short to be looked for.
//!
//! Every group is looked for by its beginning, of that least length, so that one pass over a document finds groups of all
//! lengths: a bit table says whether a beginning may be known, a map whose it is, and the hash of the whole group decides.

use super::fold::Folded;
use super::table::{Runs, mix, power};
use crate::error::CorpusError;
use crate::source;
use std::collections::HashMap;
use tarazed_domain::config::{BenchmarkConfig, DecontaminateConfig};

const WORDS_MIN: usize = 8;
const LETTERS_MIN: usize = 30;
const HAN_MIN: usize = 12;

/// All benchmark sets, ready to look for.
#[derive(Debug)]
pub(crate) struct Benchmarks {
    sets: Vec<BenchmarkSet>,
    words: Groups,
    letters: Groups,
    han: Groups,
}

/// One set.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct BenchmarkSet {
    pub(crate) name: String,
    /// Items of the set.
    pub(crate) items: u64,
    /// Items without a text that is long enough to be looked for.
    pub(crate) too_short: u64,
}

/// What a document holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct BenchmarkItem {
    /// Position of the set.
    pub(crate) set: u32,
    /// Line of its file, from 1.
    pub(crate) line: u32,
}

impl Benchmarks {
    /// Reads the sets of a config.
    ///
    /// # Errors
    /// [`CorpusError::Unreadable`], [`CorpusError::Benchmark`].
    pub(crate) fn load(config: &DecontaminateConfig) -> Result<Self, CorpusError> {
        let mut builder = Builder::new(config);
        for set in &config.sets {
            builder.add_file(set)?;
        }
        Ok(builder.finish())
    }

    /// The sets, in the config's order.
    pub(crate) fn sets(&self) -> &[BenchmarkSet] {
        &self.sets
    }

    /// Whether there is anything to look for.
    pub(crate) const fn is_empty(&self) -> bool {
        self.sets.is_empty()
    }

    /// The item of which a document holds the most groups (of equals, the first), and how many.
    pub(super) fn find(&self, folded: &Folded, runs: &mut Runs) -> Option<(BenchmarkItem, usize)> {
        let mut found: Vec<BenchmarkItem> = Vec::new();
        if !self.words.is_empty() {
            runs.set(folded.words.iter().copied());
            self.words.find(runs, &mut found);
        }
        if !(self.letters.is_empty() && self.han.is_empty()) {
            runs.set(folded.characters.iter().map(|&c| mix(u64::from(c))));
            self.letters.find(runs, &mut found);
            self.han.find(runs, &mut found);
        }
        found.sort_unstable();
        let counted = found.chunk_by(|a, b| a == b).map(|group| (group[0], group.len()));
        counted.max_by(|(a, a_count), (b, b_count)| a_count.cmp(b_count).then(b.cmp(a)))
    }
}

struct Builder {
    sets: Vec<BenchmarkSet>,
    words: GroupsBuilder,
    letters: GroupsBuilder,
    han: GroupsBuilder,
    folded: Folded,
    runs: Runs,
}

impl Builder {
    fn new(config: &DecontaminateConfig) -> Self {
        Self {
            sets: Vec::new(),
            words: GroupsBuilder::new(WORDS_MIN, config.words as usize),
            letters: GroupsBuilder::new(LETTERS_MIN, config.letters as usize),
            han: GroupsBuilder::new(HAN_MIN, config.han_characters as usize),
            folded: Folded::default(),
            runs: Runs::default(),
        }
    }

    fn add_file(&mut self, config: &BenchmarkConfig) -> Result<(), CorpusError> {
        let lines = source::read_lines(&config.path)?;
        let is_json = crate::input::is_json_lines(&config.path);
        self.sets.push(BenchmarkSet {
            name: config.name.clone(),
            items: 0,
            too_short: 0,
        });
        for (index, line) in lines.iter().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let texts = if is_json {
                texts_of(line, &config.fields).map_err(|reason| CorpusError::Benchmark {
                    path: config.path.clone(),
                    reason: format!("line {}: {reason}", index + 1),
                })?
            } else {
                vec![line.clone()]
            };
            self.add(index as u32 + 1, &texts);
        }
        match self.sets.last() {
            Some(set) if set.items > 0 => Ok(()),
            _ => Err(CorpusError::Benchmark {
                path: config.path.clone(),
                reason: "holds no item".to_owned(),
            }),
        }
    }

    /// One item of the newest set.
    fn add(&mut self, line: u32, texts: &[String]) {
        let item = BenchmarkItem {
            set: self.sets.len() as u32 - 1,
            line,
        };
        let mut groups = 0;
        for text in texts {
            self.folded.set(text);
            self.runs.set(self.folded.characters.iter().map(|&c| mix(u64::from(c))));
            if self.folded.is_unspaced() {
                groups += self.han.add(&self.runs, item);
            } else {
                groups += self.letters.add(&self.runs, item);
                self.runs.set(self.folded.words.iter().copied());
                groups += self.words.add(&self.runs, item);
            }
        }
        if let Some(set) = self.sets.last_mut() {
            set.items += 1;
            set.too_short += u64::from(groups == 0);
        }
    }

    fn finish(self) -> Benchmarks {
        Benchmarks {
            sets: self.sets,
            words: self.words.finish(),
            letters: self.letters.finish(),
            han: self.han.finish(),
        }
    }
}

/// The texts of a JSON object: those of the named fields, or every string in it however deep.
fn texts_of(line: &str, fields: &[String]) -> Result<Vec<String>, String> {
    let value: serde_json::Value = serde_json::from_str(line).map_err(|e| format!("not a JSON object ({e})"))?;
    let object = value.as_object().ok_or("not a JSON object")?;
    let mut texts = Vec::new();
    if fields.is_empty() {
        object.values().for_each(|value| strings(value, &mut texts));
    }
    for field in fields {
        let value = object.get(field).ok_or_else(|| format!("has no field '{field}'"))?;
        strings(value, &mut texts);
    }
    Ok(texts)
}

fn strings(value: &serde_json::Value, found: &mut Vec<String>) {
    match value {
        serde_json::Value::String(text) => found.push(text.clone()),
        serde_json::Value::Array(list) => list.iter().for_each(|value| strings(value, found)),
        serde_json::Value::Object(object) => object.values().for_each(|value| strings(value, found)),
        _ => {}
    }
}

/// Hash of a group's beginning, then the group.
type Beginning = (u64, Group);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Group {
    hash: u64,
    length: u32,
    item: BenchmarkItem,
}

struct GroupsBuilder {
    least: usize,
    most: usize,
    found: Vec<Beginning>,
}

impl GroupsBuilder {
    const fn new(least: usize, most: usize) -> Self {
        Self {
            least,
            most,
            found: Vec::new(),
        }
    }

    /// Takes the groups of a text in; how many.
    fn add(&mut self, runs: &Runs, item: BenchmarkItem) -> usize {
        let Some(length) = Some(runs.len().min(self.most)).filter(|&length| length >= self.least) else {
            return 0;
        };
        let (whole, beginning) = (power(length), power(self.least));
        let count = runs.len() - length + 1;
        self.found.extend((0..count).map(|start| {
            let group = Group {
                hash: runs.hash(start, length, whole),
                length: length as u32,
                item,
            };
            (runs.hash(start, self.least, beginning), group)
        }));
        count
    }

    fn finish(mut self) -> Groups {
        self.found.sort_unstable();
        self.found.dedup();
        let bits = (self.found.len() * 16).next_power_of_two().max(64);
        let mut maybe = vec![0_u64; bits / 64];
        let mut beginnings: HashMap<u64, (u32, u32)> = HashMap::new();
        for (index, (beginning, _)) in self.found.iter().enumerate() {
            let bit = *beginning as usize & (bits - 1);
            maybe[bit / 64] |= 1 << (bit % 64);
            beginnings.entry(*beginning).or_insert((index as u32, 0)).1 += 1;
        }
        let mut lengths: Vec<u32> = self.found.iter().map(|(_, group)| group.length).collect();
        lengths.sort_unstable();
        lengths.dedup();
        Groups {
            least: self.least,
            maybe,
            beginnings,
            powers: lengths
                .into_iter()
                .map(|length| (length, power(length as usize)))
                .collect(),
            groups: self.found.into_iter().map(|(_, group)| group).collect(),
        }
    }
}

/// Groups by their beginnings.
#[derive(Debug)]
struct Groups {
    /// Units of a beginning.
    least: usize,
    /// A bit for each beginning that there may be.
    maybe: Vec<u64>,
    /// Where in `groups` those of a beginning stand, and how many. Only ever asked, never walked (DET-1).
    beginnings: HashMap<u64, (u32, u32)>,
    powers: HashMap<u32, u64>,
    groups: Vec<Group>,
}

impl Groups {
    const fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    fn find(&self, runs: &Runs, found: &mut Vec<BenchmarkItem>) {
        if self.groups.is_empty() || runs.len() < self.least {
            return;
        }
        let (power, mask) = (power(self.least), self.maybe.len() * 64 - 1);
        for start in 0..=runs.len() - self.least {
            let beginning = runs.hash(start, self.least, power);
            let bit = beginning as usize & mask;
            if self.maybe[bit / 64] >> (bit % 64) & 1 == 0 {
                continue;
            }
            let Some(&(first, count)) = self.beginnings.get(&beginning) else {
                continue;
            };
            for group in &self.groups[first as usize..(first + count) as usize] {
                let length = group.length as usize;
                if start + length <= runs.len() && runs.hash(start, length, self.powers[&group.length]) == group.hash {
                    found.push(group.item);
                }
            }
        }
    }
}

/// What the recipe says of a set: its name, its file's hash, whether that is read as JSON lines, and its fields.
type SetIdentity<'a> = (&'a str, String, bool, &'a [String]);

/// Reads the sets' files for the recipe: their hashes say which sets they are. The ending of a file's name is no part of its
/// content, and decides what its items are.
pub(crate) fn hash_sets(config: &DecontaminateConfig) -> Result<Vec<SetIdentity<'_>>, CorpusError> {
    let mut found = Vec::with_capacity(config.sets.len());
    for set in &config.sets {
        let (_, hash) = crate::files::hash_file(&set.path)?;
        let is_json = crate::input::is_json_lines(&set.path);
        found.push((
            set.name.as_str(),
            hash.to_hex().to_string(),
            is_json,
            set.fields.as_slice(),
        ));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const QUESTIONS: [&str; 4] = [
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did \
         Natalia sell altogether in April and May?",
        "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. How much did she earn?",
        "小明有四十八个苹果,他把其中的一半分给了同学,又买了十二个,请问他现在一共有多少个苹果?",
        "Yes or no?",
    ];

    fn benchmarks(questions: &[&str]) -> Benchmarks {
        let mut builder = Builder::new(&DecontaminateConfig::default());
        builder.sets.push(BenchmarkSet {
            name: "questions".to_owned(),
            items: 0,
            too_short: 0,
        });
        for (index, question) in questions.iter().enumerate() {
            builder.add(index as u32 + 1, &[(*question).to_owned()]);
        }
        builder.finish()
    }

    fn find(benchmarks: &Benchmarks, text: &str) -> Option<u32> {
        let mut folded = Folded::default();
        folded.set(text);
        benchmarks
            .find(&folded, &mut Runs::default())
            .map(|(item, _)| item.line)
    }

    #[test]
    fn items_are_found_however_they_are_written() {
        let benchmarks = benchmarks(&QUESTIONS);
        assert_eq!((benchmarks.sets()[0].items, benchmarks.sets()[0].too_short), (4, 1));
        for (index, question) in QUESTIONS[..3].iter().enumerate() {
            let line = index as u32 + 1;
            let embedded = format!("Some words before.\n\n{question}\n\nAnd what follows it.");
            let shouted = question.to_uppercase().replace(['.', ',', '?'], " -- ");
            let joined: String = question.chars().filter(|c| !c.is_whitespace()).collect();
            let spaced: String = question.chars().flat_map(|c| [c, ' ']).collect();
            let broken: String = question
                .chars()
                .enumerate()
                .flat_map(|(i, c)| [Some(c), (i % 9 == 8).then_some('\n')])
                .flatten()
                .collect();
            for text in [*question, &embedded, &shouted, &joined, &spaced, &broken] {
                assert_eq!(find(&benchmarks, text), Some(line), "{text}");
            }
        }
        // A part is enough, and other texts of the same kind are not touched.
        assert_eq!(
            find(
                &benchmarks,
                "and then she sold half as many clips in May. How many clips did Natalia"
            ),
            Some(1)
        );
        for clean in [
            "Natalia sold clips to her friends. Weng earns money for babysitting. Yes or no?",
            "小明有三个梨,他把其中的一个分给了同学。",
            "",
        ] {
            assert_eq!(find(&benchmarks, clean), None, "{clean}");
        }
    }

    #[test]
    fn a_set_is_read_by_fields_or_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gsm.jsonl");
        let line = serde_json::json!({"id": 7, "question": QUESTIONS[0], "more": {"choices": [QUESTIONS[1]]}});
        std::fs::write(&path, format!("{line}\n\n")).unwrap();
        let set = |fields: &[&str]| BenchmarkConfig {
            name: "gsm".to_owned(),
            path: path.clone(),
            fields: fields.iter().map(|&f| f.to_owned()).collect(),
        };
        let load = |set| {
            let config = DecontaminateConfig {
                sets: vec![set],
                ..DecontaminateConfig::default()
            };
            Benchmarks::load(&config)
        };
        let all = load(set(&[])).unwrap();
        assert_eq!([find(&all, QUESTIONS[0]), find(&all, QUESTIONS[1])], [Some(1), Some(1)]);
        let one = load(set(&["question"])).unwrap();
        assert_eq!([find(&one, QUESTIONS[0]), find(&one, QUESTIONS[1])], [Some(1), None]);
        assert!(
            load(set(&["no"]))
                .unwrap_err()
                .to_string()
                .contains("has no field 'no'")
        );
        std::fs::write(&path, "[1]\n").unwrap();
        assert!(
            load(set(&[]))
                .unwrap_err()
                .to_string()
                .contains("line 1: not a JSON object")
        );
        std::fs::write(&path, "\n").unwrap();
        assert!(load(set(&[])).unwrap_err().to_string().contains("holds no item"));
    }

    proptest! {
        /// An item put anywhere into any text is found.
        #[test]
        fn a_planted_item_is_found(before in "[a-z中文 .]{0,60}", after in "[a-z中文 .]{0,60}", pick in 0..3_usize) {
            let benchmarks = benchmarks(&QUESTIONS);
            let text = format!("{before} {} {after}", QUESTIONS[pick]);
            prop_assert_eq!(find(&benchmarks, &text), Some(pick as u32 + 1));
        }
    }
}
