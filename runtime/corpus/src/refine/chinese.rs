//! Quality rules for Chinese, by characters where the English ones go by words: Chinese is written without spaces, so
//! "words between white space" are whole sentences, and C4's terminal punctuation knows none of its marks.
//!
//! Length, length of lines, share of Han and repeated groups are the rules of EvalWeb, which made ChineseWebText (Chen et al. 2023,
//! arXiv 2311.01149). Of the others, where the counterpart of an English threshold is not that threshold itself, a Chinese word is
//! taken for two characters. White space is never counted. The first broken rule counts; cheap rules come first.

use super::Scratch;
use super::english::{BULLETS, nonempty};
use super::fold::is_han;
use super::repetition;
use super::rules::{Broken, Dropped, RuleSet};
use super::table::{mix, power};

const CHARACTERS: std::ops::RangeInclusive<usize> = 200..=200_000;
const HAN_MIN: f64 = 0.3;
const LINE_CHARACTERS_MIN: f64 = 10.0;
const SYMBOLS_PER_CHARACTER_MAX: f64 = 0.05;
const BULLET_LINES_MAX: f64 = 0.9;
const ELLIPSIS_LINES_MAX: f64 = 0.3;
const PUNCTUATED_LINES_MIN: f64 = 0.12;
const REPEATED_PIECES_MAX: f64 = 0.30;
const REPEATED_CHARACTERS_MAX: f64 = 0.20;
/// Characters in a group, and the share of groups that may stand in a text more than once.
const GROUP_CHARACTERS: usize = 13;
const REPEATED_GROUPS_MAX: f64 = 0.5;
/// Marks that end a line of prose.
const PUNCTUATION: [char; 22] = [
    '。', '！', '？', '；', '：', '…', '”', '’', '」', '』', '）', '》', '】', '、', '，', '.', '!', '?', '"', ';',
    ':', ')',
];

/// The first rule that a text breaks.
pub(super) fn judge(text: &str, rules: &RuleSet, scratch: &mut Scratch) -> Result<(), Broken> {
    let figures = Figures::of(text);
    figures.check(rules)?;
    let Scratch { counter, runs, .. } = scratch;
    let repeated = repetition::pieces(counter, figures.lines, nonempty(text, "\n"));
    rules.check(
        Dropped::ZhRepeatedLines,
        repeated.pieces > REPEATED_PIECES_MAX || repeated.characters > REPEATED_CHARACTERS_MAX,
        || format!("lines {:.2}, characters {:.2}", repeated.pieces, repeated.characters),
    )?;
    if rules.is_on(Dropped::ZhRepeatedGroups) {
        runs.set(
            text.chars()
                .filter(|c| !c.is_whitespace())
                .map(|c| mix(u64::from(c as u32))),
        );
        let groups = (runs.len() + 1).saturating_sub(GROUP_CHARACTERS);
        counter.reset(groups);
        let power = power(GROUP_CHARACTERS);
        // A group's first place is counted when its second is found: all places of a group that comes again count.
        let again: usize = (0..groups)
            .map(|start| match counter.add(runs.hash(start, GROUP_CHARACTERS, power)) {
                0 => 0,
                1 => 2,
                _ => 1,
            })
            .sum();
        let share = again as f64 / groups.max(1) as f64;
        rules.check(Dropped::ZhRepeatedGroups, share > REPEATED_GROUPS_MAX, || {
            format!("{share:.2} of the groups of {GROUP_CHARACTERS} characters")
        })?;
    }
    Ok(())
}

#[derive(Debug, Default)]
struct Figures {
    characters: usize,
    han: usize,
    hashes: usize,
    ellipses: usize,
    lines: usize,
    bullets: usize,
    ellipsis_lines: usize,
    punctuated: usize,
}

impl Figures {
    fn of(text: &str) -> Self {
        let mut figures = Self::default();
        for line in nonempty(text, "\n") {
            figures.lines += 1;
            figures.bullets += usize::from(line.starts_with(BULLETS));
            figures.ellipsis_lines += usize::from(line.ends_with("...") || line.ends_with('…'));
            figures.punctuated += usize::from(line.ends_with(PUNCTUATION));
            for c in line.chars().filter(|c| !c.is_whitespace()) {
                figures.characters += 1;
                figures.han += usize::from(is_han(c));
                figures.hashes += usize::from(matches!(c, '#' | '＃'));
            }
            // Chinese text writes one ellipsis as two signs.
            let signs = line.matches('…').count();
            figures.ellipses += signs.div_ceil(2) + line.matches("...").count();
        }
        figures
    }

    fn check(&self, rules: &RuleSet) -> Result<(), Broken> {
        let all = self.characters;
        let share = |count: usize, whole: usize| count as f64 / whole.max(1) as f64;
        rules.check(Dropped::ZhCharacters, !CHARACTERS.contains(&all), || {
            format!("{all} characters")
        })?;
        let han = share(self.han, all);
        rules.check(Dropped::ZhHan, han < HAN_MIN, || format!("{han:.2} of the characters"))?;
        let mean = share(all, self.lines);
        rules.check(Dropped::ZhLineLength, mean < LINE_CHARACTERS_MIN, || {
            format!("{mean:.1} characters a line")
        })?;
        let symbols = share(self.hashes.max(self.ellipses), all);
        rules.check(Dropped::ZhSymbols, symbols > SYMBOLS_PER_CHARACTER_MAX, || {
            format!("{symbols:.3} a character")
        })?;
        let lines = |rule, share: f64, is_broken| rules.check(rule, is_broken, || format!("{share:.2} of the lines"));
        let bullets = share(self.bullets, self.lines);
        lines(Dropped::ZhBullets, bullets, bullets > BULLET_LINES_MAX)?;
        let ellipses = share(self.ellipsis_lines, self.lines);
        lines(Dropped::ZhEllipses, ellipses, ellipses > ELLIPSIS_LINES_MAX)?;
        let punctuated = share(self.punctuated, self.lines);
        lines(
            Dropped::ZhLinePunctuation,
            punctuated,
            punctuated <= PUNCTUATED_LINES_MIN,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refine::repetition::characters;
    use proptest::prelude::*;

    fn broken(text: &str) -> Option<Dropped> {
        let rules = RuleSet::without(&[]).unwrap();
        judge(text, &rules, &mut Scratch::default())
            .err()
            .map(|broken| broken.rule)
    }

    /// Sixteen different sentences of some twenty characters.
    fn prose() -> Vec<String> {
        let (who, what) = (
            ["控制器", "某个进程", "对象存储", "每条通道", "优化器分片"],
            [
                "正在等待屏障通过",
                "保存了自己的梯度",
                "被备用进程替换掉",
                "写下一条新的记录",
                "重新计算校验结果",
            ],
        );
        (0..16)
            .map(|i| {
                format!(
                    "{}{},这是训练运行的第{}步骤。",
                    who[i % 5],
                    what[(i * 3 + i / 5) % 5],
                    [
                        "一", "二", "三", "四", "五", "六", "七", "八", "九", "十", "甲", "乙", "丙", "丁", "戊", "己"
                    ][i]
                )
            })
            .collect()
    }

    #[test]
    fn prose_breaks_no_rule() {
        assert!(characters(&prose().concat()) >= 200);
        assert_eq!(broken(&prose().concat()), None);
        assert_eq!(broken(&prose().join("\n")), None);
    }

    #[test]
    fn every_rule_is_broken_by_its_own_text() {
        let good = prose().concat();
        let lines = prose();
        let cases: [(Dropped, String); 9] = [
            (Dropped::ZhCharacters, "太短了。".to_owned()),
            (Dropped::ZhHan, format!("{good}{}", "abcdefgh12".repeat(100))),
            (
                Dropped::ZhLineLength,
                good.chars()
                    .collect::<Vec<_>>()
                    .chunks(6)
                    .map(|c| c.iter().collect::<String>() + "\n")
                    .collect(),
            ),
            (Dropped::ZhSymbols, format!("{}{good}", "标签#".repeat(24))),
            (
                Dropped::ZhBullets,
                lines.iter().map(|line| format!("• {line}\n")).collect(),
            ),
            (
                Dropped::ZhEllipses,
                lines
                    .iter()
                    .enumerate()
                    .map(|(i, line)| {
                        if i % 2 == 0 {
                            format!("{line}……\n")
                        } else {
                            format!("{line}\n")
                        }
                    })
                    .collect(),
            ),
            (
                Dropped::ZhLinePunctuation,
                lines.iter().map(|line| format!("{line}如此\n")).collect(),
            ),
            (
                Dropped::ZhRepeatedLines,
                format!("{}\n{}", lines.join("\n"), lines[..9].join("\n")),
            ),
            (Dropped::ZhRepeatedGroups, format!("{good}{}", lines[0].repeat(24))),
        ];
        for (rule, text) in cases {
            assert_eq!(broken(&text), Some(rule), "{text}");
        }
    }

    /// A text that is there twice, in one line: each group stands in it twice, but for those across the seam.
    #[test]
    fn a_text_that_is_there_twice_is_left_out() {
        let good = prose().concat();
        let more: String = good.chars().rev().collect();
        assert_eq!(broken(&good.repeat(2)), Some(Dropped::ZhRepeatedGroups));
        assert_eq!(broken(&format!("{good}{more}。")), None);
    }

    proptest! {
        #[test]
        fn any_text_is_judged(text in any::<String>()) {
            let _ = broken(&text);
        }
    }
}
