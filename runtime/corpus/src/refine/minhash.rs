//! Near copies: MinHash signatures cut into bands (Broder 1997, "On the resemblance and containment of documents"; banding as
//! in Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4).
//!
//! A document is the set of its shingles: groups of `words` words, or of `characters` characters where a third of its letters
//! are Han. A signature has `bands * rows` values, each the least of one hash function over the set; two documents agree in
//! a value with probability s, their Jaccard similarity. They meet where they agree in all rows of some band:
//!
//! ```text
//! P(meet) = 1 - (1 - s^rows)^bands         14 bands of 8 rows:  s = 0.5: 0.05   0.6: 0.21   0.7: 0.56   0.8: 0.92   0.9: 1.00
//! ```
//! The S-curve is steepest near `(1 / bands)^(1 / rows)`, 0.72 there. More rows make meeting rarer, more bands more common.
//!
//! A document is a near copy where it meets an **earlier** one. So a copy has a witness, and whether a document stays does not
//! depend on what comes after it. The witness may itself be left out as a copy: of a chain in which each is like the one before,
//! the first alone stays, as with connected components. Unlike with these, two documents that are only both like a third both
//! stay where the third comes after them.

use super::fold::Folded;
use super::table::{Runs, mix, power};
use tarazed_domain::config::DuplicatesConfig;

/// Makes the bands of documents.
#[derive(Debug)]
pub(crate) struct Sketcher {
    rows: usize,
    words: usize,
    characters: usize,
    /// One hash function a value: an offset and an odd factor.
    offsets: Vec<u32>,
    factors: Vec<u32>,
}

impl Sketcher {
    /// With the shape of a config.
    pub(crate) fn new(config: &DuplicatesConfig) -> Self {
        let values = u64::from(config.bands) * u64::from(config.rows);
        let words = |salt: u64| (0..values).map(move |i| (mix(i ^ mix(salt)) >> 32) as u32);
        Self {
            rows: config.rows as usize,
            words: config.words as usize,
            characters: config.characters as usize,
            offsets: words(0x7461_7261_7a65_6431).collect(),
            factors: words(0x7461_7261_7a65_6432).map(|factor| factor | 1).collect(),
        }
    }

    /// One key for each band, in order; none for a text without a letter or digit. Documents meet where the same band has the
    /// same key.
    pub(super) fn bands(&self, folded: &Folded, runs: &mut Runs) -> Vec<u64> {
        let by_characters = folded.is_unspaced();
        let length = if by_characters {
            runs.set(folded.characters.iter().map(|&c| mix(u64::from(c))));
            self.characters
        } else {
            runs.set(folded.words.iter().copied());
            self.words
        };
        if runs.len() == 0 {
            return Vec::new();
        }
        // What is shorter than a shingle is one.
        let length = length.min(runs.len());
        let power = power(length);
        let mut least = vec![u32::MAX; self.offsets.len()];
        for start in 0..=runs.len() - length {
            self.lower(&mut least, (runs.hash(start, length, power) >> 32) as u32);
        }
        let kind = u64::from(by_characters);
        least
            .chunks_exact(self.rows)
            .map(|rows| {
                rows.iter()
                    .fold(kind, |key, &row| mix(key ^ u64::from(row)).wrapping_add(1))
            })
            .collect()
    }

    /// Each value is the least over all shingles of a permutation of 32 bits: one xor, two odd factors and a shift.
    fn lower(&self, least: &mut [u32], shingle: u32) {
        for ((least, offset), factor) in least.iter_mut().zip(&self.offsets).zip(&self.factors) {
            let mut hash = (shingle ^ offset).wrapping_mul(0x85EB_CA6B);
            hash ^= hash >> 15;
            hash = hash.wrapping_mul(*factor);
            *least = (*least).min(hash);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bands(config: &DuplicatesConfig, text: &str) -> Vec<u64> {
        let mut folded = Folded::default();
        folded.set(text);
        Sketcher::new(config).bands(&folded, &mut Runs::default())
    }

    fn meet(config: &DuplicatesConfig, a: &str, b: &str) -> bool {
        bands(config, a).iter().zip(&bands(config, b)).any(|(a, b)| a == b)
    }

    fn words(from: u64, count: u64) -> String {
        (from..from + count)
            .map(|i| format!("w{} ", mix(i) % 100_000))
            .collect()
    }

    /// Two texts of `all` shingles of which `shared` are common: single words, so that the similarity is exact.
    fn pair(seed: u64, shared: u64, own: u64) -> (String, String) {
        let at = seed * 1_000_000;
        let common = words(at, shared);
        (
            common.clone() + &words(at + 100_000, own),
            common + &words(at + 200_000, own),
        )
    }

    /// How often pairs of a similarity meet is what the S-curve says, within four standard deviations.
    #[test]
    fn the_s_curve_is_the_documented_one() {
        let config = DuplicatesConfig {
            words: 1,
            ..DuplicatesConfig::default()
        };
        let pairs = 400_u64;
        for (shared, own) in [(100, 50), (120, 30), (140, 15), (40, 80)] {
            let s = shared as f64 / (shared + 2 * own) as f64;
            let expected = 1.0 - (1.0 - s.powi(8)).powi(14);
            let met = (0..pairs)
                .filter(|&seed| {
                    let (a, b) = pair(seed + shared * 1000, shared, own);
                    meet(&config, &a, &b)
                })
                .count() as f64;
            let deviation = (expected * (1.0 - expected) * pairs as f64).sqrt();
            assert!(
                (met - expected * pairs as f64).abs() <= 4.0 * deviation + 4.0,
                "similarity {s}: {met} of {pairs}, expected {expected}"
            );
        }
    }

    #[test]
    fn copies_that_differ_little_meet_in_both_languages() {
        let config = DuplicatesConfig::default();
        let english = words(1, 300);
        assert_eq!(
            bands(&config, &english),
            bands(&config, &english.to_uppercase().replace(' ', ", "))
        );
        assert!(meet(&config, &english, &english.replacen("w1", "v1", 3)));
        assert!(meet(&config, &english, &format!("{english} and one more sentence.")));
        assert!(!meet(&config, &english, &words(5000, 300)));
        let chinese: String = (0..400_u32)
            .filter_map(|i| char::from_u32(0x4e00 + (mix(u64::from(i)) % 3000) as u32))
            .collect();
        let changed = chinese.replacen(chinese.chars().nth(200).unwrap(), "改", 1) + "完。";
        assert!(meet(&config, &chinese, &changed));
        // Spacing and punctuation are no difference.
        let spaced: String = chinese.chars().flat_map(|c| [c, ' ']).collect();
        assert_eq!(bands(&config, &chinese), bands(&config, &spaced));
        let other: String = (0..400_u32)
            .filter_map(|i| char::from_u32(0x4e00 + (mix(u64::from(i) + 9999) % 3000) as u32))
            .collect();
        assert!(!meet(&config, &chinese, &other));
    }

    #[test]
    fn short_and_empty_texts_have_a_place() {
        let config = DuplicatesConfig::default();
        assert_eq!(bands(&config, "two words").len(), 14);
        assert!(meet(&config, "two words", "Two words!"));
        assert!(!meet(&config, "two words", "other words"));
        assert!(bands(&config, " ... ").is_empty());
        assert!(bands(&config, "").is_empty());
    }

    proptest! {
        /// The order of shingles and how often they come do not matter (their set does).
        #[test]
        fn a_sketch_is_that_of_the_set(picks in prop::collection::vec(0..30_u64, 1..40)) {
            let config = DuplicatesConfig { words: 1, ..DuplicatesConfig::default() };
            let text = |picks: &[u64]| picks.iter().map(|i| format!("w{i} ")).collect::<String>();
            let mut set: Vec<u64> = picks.clone();
            set.sort_unstable();
            set.dedup();
            prop_assert_eq!(bands(&config, &text(&picks)), bands(&config, &text(&set)));
        }
    }
}
