//! The plan: everything about a comparison that must be fixed before the first run. Pure but for reading the file.

use super::statistics::{Bootstrap, PAIRS_MAX};
use crate::exit::Failure;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Candidates of a sweep, seeds, cases and controllers of a plan at most, each.
const COUNT_MAX: usize = 1_000;
const RESAMPLES_MAX: usize = 10_000_000;
/// Text that comes is announced in a decision point before its step.
const LATE_STEP_MIN: u64 = 2;

/// A comparison of mixtures.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// What people call it.
    pub name: String,
    /// The config of every run; relative to the plan. Its domains are those of the cases' corpus.
    pub base: PathBuf,
    /// Overrides of the base, as `train --set` has them.
    #[serde(default)]
    pub set: Vec<String>,
    /// Optimizer updates of each run; a multiple of `evaluation.interval_steps`, so that the end is measured.
    pub steps: u64,
    /// Rank processes of each run; decides no number.
    pub ranks: u32,
    /// What a run takes on the machine that the plan was made for: for the first estimate alone.
    pub expected_seconds_per_run: f64,
    /// Seeds of initial weights and sample order.
    pub seeds: Seeds,
    /// What is judged.
    #[serde(default)]
    pub metrics: Metrics,
    /// How it is judged.
    #[serde(default)]
    pub statistics: Statistics,
    /// When a held-out document is too much like training text.
    #[serde(default)]
    pub overlap: Overlap,
    /// Where the corpus comes from, where it does not ship.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub corpus: Option<Corpus>,
    /// The static arms.
    #[serde(default, rename = "static")]
    pub statics: Statics,
    /// The adaptive arms.
    #[serde(default)]
    pub controllers: Vec<Controller>,
    /// The data that they meet.
    pub cases: Vec<Case>,
}

/// `[seeds]`: nothing is judged on a seed that anything was chosen on.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seeds {
    /// The best static mixture is chosen on these.
    pub tuning: Vec<u64>,
    /// All arms are compared on these.
    pub judging: Vec<u64>,
}

/// A number that a run is judged by; all in bits per byte of held-out text but the last, which is in tokens. Less is better.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// At the end, the mean over the judged domains.
    #[default]
    Macro,
    /// At the end, the mean weighted by the bytes of the domains' training text.
    Natural,
    /// At the end, of the domain that is worst.
    Worst,
    /// Mean over the course of training of the mean over the judged domains: the area under its curve over tokens, divided
    /// by the tokens.
    Area,
    /// Training tokens until the mean over the judged domains is at the target.
    TokensToTarget,
}

impl Metric {
    /// All, in the order of reports.
    pub const ALL: [Self; 5] = [
        Self::Macro,
        Self::Natural,
        Self::Worst,
        Self::Area,
        Self::TokensToTarget,
    ];

    /// What people read.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Macro => "macro, bits per byte at the end",
            Self::Natural => "natural-weighted, bits per byte at the end",
            Self::Worst => "worst domain, bits per byte at the end",
            Self::Area => "area under the macro curve, mean bits per byte",
            Self::TokensToTarget => "tokens to the target",
        }
    }
}

/// Where a run has reached its target.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Target {
    /// So many bits per byte, mean over the judged domains.
    BitsPerByte(f64),
    /// Where the run of this static arm with the same seed ends.
    EndOf(NamedStatic),
}

/// `[metrics]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// The sweep is decided by it, and verdicts are on it alone.
    pub primary: Metric,
    /// For [`Metric::TokensToTarget`].
    pub target: Target,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            primary: Metric::Macro,
            target: Target::EndOf(NamedStatic::Natural),
        }
    }
}

/// `[statistics]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Statistics {
    /// Seed of the resampling.
    pub seed: u64,
    /// Resamples of each interval.
    pub resamples: usize,
    /// Coverage of the intervals.
    pub confidence: f64,
}

impl Default for Statistics {
    fn default() -> Self {
        Self {
            seed: 1,
            resamples: 100_000,
            confidence: 0.95,
        }
    }
}

impl Statistics {
    /// As the statistics take it.
    #[must_use]
    pub const fn bootstrap(&self) -> Bootstrap {
        Bootstrap {
            confidence: self.confidence,
            resamples: self.resamples,
            seed: self.seed,
        }
    }
}

/// `[overlap]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Overlap {
    /// Length of an n-gram: words, and single characters of Chinese.
    pub units: usize,
    /// A held-out document goes where a larger share of its n-grams stands in training text.
    pub share_max: f64,
}

impl Default for Overlap {
    fn default() -> Self {
        Self {
            units: 13,
            share_max: 0.1,
        }
    }
}

/// `[corpus]`: text that a command makes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Corpus {
    /// The command, from the root of the project: for whoever has not made it yet.
    pub make: String,
    /// BLAKE3 of the texts, as the bench says it: another corpus is refused. Any is taken where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blake3: Option<String>,
}

/// A static mixture with a name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NamedStatic {
    /// By size in tokens.
    Natural,
    /// All the same.
    Uniform,
    /// By the square root of size.
    Sqrt,
    /// As even as a cap on epochs allows (arXiv 2304.09151).
    Unimax,
}

impl NamedStatic {
    /// All.
    pub const ALL: [Self; 4] = [Self::Natural, Self::Uniform, Self::Sqrt, Self::Unimax];

    /// The name of the arm.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Natural => "natural",
            Self::Uniform => "uniform",
            Self::Sqrt => "sqrt",
            Self::Unimax => "unimax",
        }
    }

    /// Whether an arm has one of these names.
    #[must_use]
    pub fn is_name(arm: &str) -> bool {
        Self::ALL.iter().any(|named| named.name() == arm)
    }
}

/// `[static]`: what the best static mixture is chosen from, besides the named ones, which always take part.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Statics {
    /// Cap of UniMax on passes over a domain.
    pub unimax_epochs_max: f64,
    /// Candidates in proportion to these powers of size.
    pub powers: Vec<f64>,
    /// Candidates drawn at random from all mixtures.
    pub points: usize,
    /// Seed of those.
    pub seed: u64,
}

impl Default for Statics {
    fn default() -> Self {
        Self {
            unimax_epochs_max: 4.0,
            powers: Vec::new(),
            points: 8,
            seed: 1,
        }
    }
}

/// `[[controllers]]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Controller {
    /// Name of the arm.
    pub name: String,
    /// Config keys that turn it on, as `train --set` has them.
    pub set: Vec<String>,
    /// The mixture it starts from, and is drawn to if it has such a tendency.
    #[serde(default = "natural")]
    pub initial: NamedStatic,
    /// Whether it takes part.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

const fn natural() -> NamedStatic {
    NamedStatic::Natural
}
const fn yes() -> bool {
    true
}

/// `[[cases]]`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// Name.
    pub name: String,
    /// What is done to the corpus.
    pub change: Change,
    /// Whether it takes part.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// What is done to the corpus; domains that are added are trained on and never judged.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Change {
    /// Nothing.
    None,
    /// One more domain: random text with the character frequencies of the corpus.
    Noise {
        /// Its bytes over those of the corpus.
        share: f64,
        /// Of the text.
        seed: u64,
    },
    /// One more domain: a copy of another, under another name.
    Duplicate {
        /// The domain that is copied.
        of: String,
    },
    /// One domain has few training documents, so that it repeats.
    Tiny {
        /// The domain.
        of: String,
        /// Training documents that it keeps; its held-out ones stay.
        documents: usize,
        /// Of the choice.
        seed: u64,
    },
    /// Domains of very different size: from the first to the last, each keeps a smaller share of its training documents, in
    /// equal ratios; all keep their held-out ones.
    Skew {
        /// Share of the first over share of the last.
        ratio: f64,
        /// Of the choice.
        seed: u64,
    },
    /// Domains are cut in two by difficulty, easy and hard documents: who learns easy ones first can say so with these.
    Difficulty {
        /// The domains.
        of: Vec<String>,
    },
    /// A domain arrives during the run, in all arms alike.
    Late {
        /// The domain.
        of: String,
        /// The first step (from 0) that trains on it.
        from_step: u64,
    },
    /// The training text of a domain becomes harder during the run: first its easy half, then its hard half in place of that.
    Shift {
        /// The domain.
        of: String,
        /// The first step (from 0) that trains on the hard half.
        from_step: u64,
    },
}

impl Plan {
    /// Reads a plan and checks it.
    ///
    /// # Errors
    /// Refused: the file, or the key at fault, with what to do.
    pub fn load(path: &Path) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            let cause = format!("cannot be read ({e})");
            Failure::refused(
                path.display(),
                cause,
                "give the path of a plan, e.g. configs/mixture/small.toml",
            )
        })?;
        let mut plan = Self::parse(&text, &path.display().to_string())?;
        let folder = path.parent().unwrap_or_else(|| Path::new(""));
        plan.base = folder.join(&plan.base);
        Ok(plan)
    }

    /// Like [`Plan::load`], from text; `base` stays as it stands.
    ///
    /// # Errors
    /// As [`Plan::load`].
    pub fn parse(text: &str, name: &str) -> Result<Self, Failure> {
        let plan: Self = toml::from_str(text).map_err(|e| {
            let cause = e.to_string().trim_end().to_owned();
            Failure::refused(name, cause, "correct the plan; docs/MIXTURE.md explains each key")
        })?;
        plan.check()?;
        Ok(plan)
    }

    /// The cases that take part, in order.
    pub fn cases(&self) -> impl Iterator<Item = &Case> {
        self.cases.iter().filter(|case| case.enabled)
    }

    /// The controllers that take part, in order.
    pub fn controllers(&self) -> impl Iterator<Item = &Controller> {
        self.controllers.iter().filter(|controller| controller.enabled)
    }

    /// What is fixed before the first run, as data. Keys that decide no finding may change; so may the base, whose config every run
    /// is compared with, and the corpus, which the versions of the cases' data speak for.
    ///
    /// # Errors
    /// None that a plan which was checked could cause.
    pub fn fixed(&self) -> Result<serde_json::Value, serde_json::Error> {
        let mut fixed = serde_json::to_value(self)?;
        if let Some(keys) = fixed.as_object_mut() {
            for free in ["base", "corpus", "ranks", "expected_seconds_per_run"] {
                keys.remove(free);
            }
        }
        Ok(fixed)
    }

    /// Static candidates of each case.
    #[must_use]
    pub const fn candidates(&self) -> usize {
        NamedStatic::ALL.len() + self.statics.powers.len() + self.statics.points
    }

    /// Runs of one case: every candidate on every tuning seed; on every judging seed `static_judged` static mixtures, and each
    /// controller with the two mixtures frozen after it.
    #[must_use]
    pub fn runs_per_case(&self, candidates: usize, static_judged: usize) -> usize {
        let judged = static_judged + 3 * self.controllers().count();
        candidates * self.seeds.tuning.len() + judged * self.seeds.judging.len()
    }

    /// The most that it can be: no two candidates have the same weights, and the best one has no name.
    #[must_use]
    pub fn runs_per_case_max(&self) -> usize {
        self.runs_per_case(self.candidates(), NamedStatic::ALL.len() + 1)
    }

    fn check(&self) -> Result<(), Failure> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let refuse = |key: &str, cause: &str, remedy: &str| Err(Failure::refused(key, cause, remedy));
        if self.steps == 0 || self.ranks == 0 {
            return refuse("steps, ranks", "one of them is 0", "set both to at least 1");
        }
        if !positive(self.expected_seconds_per_run) {
            return refuse("expected_seconds_per_run", "is not positive", "set e.g. 45");
        }
        let statistics = &self.statistics;
        if !(1..=RESAMPLES_MAX).contains(&statistics.resamples) {
            return refuse("statistics.resamples", "is not in 1..=10000000", "set e.g. 100000");
        }
        if !(0.5..1.0).contains(&statistics.confidence) {
            return refuse("statistics.confidence", "is not in 0.5..1", "set e.g. 0.95");
        }
        if self.overlap.units == 0 || !(0.0..=1.0).contains(&self.overlap.share_max) {
            return refuse(
                "overlap",
                "is no n-gram length and share",
                "set e.g. units = 13, share_max = 0.1",
            );
        }
        if !positive(self.statics.unimax_epochs_max) {
            return refuse("static.unimax_epochs_max", "is not positive", "set e.g. 4");
        }
        let powers = &self.statics.powers;
        if powers.len() + self.statics.points > COUNT_MAX || powers.iter().any(|power| !(-4.0..=4.0).contains(power)) {
            return refuse(
                "static",
                "powers are outside -4..=4, or there are more than 1000 candidates",
                "give fewer or smaller ones",
            );
        }
        if let Target::BitsPerByte(target) = self.metrics.target
            && !positive(target)
        {
            return refuse(
                "metrics.target",
                "is not positive",
                "give bits per byte, or a static arm's name",
            );
        }
        self.check_seeds()?;
        self.check_names()?;
        self.check_changes()
    }

    fn check_seeds(&self) -> Result<(), Failure> {
        let Seeds { tuning, judging } = &self.seeds;
        let all: BTreeSet<u64> = tuning.iter().chain(judging).copied().collect();
        if all.len() != tuning.len() + judging.len() {
            return Err(Failure::refused(
                "seeds",
                "a seed stands twice",
                "choose on some seeds and judge on others",
            ));
        }
        if tuning.is_empty() || judging.is_empty() || judging.len() > PAIRS_MAX || tuning.len() > COUNT_MAX {
            return Err(Failure::refused(
                "seeds",
                format!("{} to choose on and {} to judge on", tuning.len(), judging.len()),
                format!("give at least one of each, and at most {PAIRS_MAX} to judge on"),
            ));
        }
        Ok(())
    }

    fn check_names(&self) -> Result<(), Failure> {
        if self.cases().count() == 0 {
            return Err(Failure::refused("cases", "none takes part", "enable one"));
        }
        let cases = self.cases.iter().map(|case| (&case.name, case.enabled, &case.reason));
        let controllers = self.controllers.iter().map(|c| (&c.name, c.enabled, &c.reason));
        check_names("cases", cases)?;
        check_names("controllers", controllers)?;
        // Names of arms are names of folders: a controller may not have that of another arm.
        for controller in &self.controllers {
            let name = &controller.name;
            let taken = NamedStatic::is_name(name)
                || ["sweep-", "power-"].iter().any(|stem| name.starts_with(stem))
                || ["-mean", "-final"].iter().any(|end| name.ends_with(end));
            if taken || name == "best-static" {
                return Err(Failure::refused(
                    format!("controllers.{name}"),
                    "is, or looks like, the name of a static arm",
                    "give it another",
                ));
            }
        }
        Ok(())
    }

    fn check_changes(&self) -> Result<(), Failure> {
        for case in self.cases() {
            let key = format!("cases.{}", case.name);
            match &case.change {
                Change::Noise { share, .. } if !(share.is_finite() && *share > 0.0 && *share <= 10.0) => {
                    return Err(Failure::refused(key, "share is not in 0..=10", "set e.g. 0.15"));
                }
                Change::Skew { ratio, .. } if !(ratio.is_finite() && *ratio >= 1.0) => {
                    return Err(Failure::refused(key, "ratio is less than 1", "set e.g. 20"));
                }
                Change::Tiny { documents: 0, .. } => {
                    return Err(Failure::refused(key, "documents is 0", "keep a few dozen"));
                }
                Change::Difficulty { of } if of.is_empty() => {
                    return Err(Failure::refused(key, "names no domain", "name one or more in `of`"));
                }
                Change::Late { from_step, .. } | Change::Shift { from_step, .. }
                    if !(LATE_STEP_MIN..self.steps).contains(from_step) =>
                {
                    return Err(Failure::refused(
                        key,
                        format!("from_step is not in {LATE_STEP_MIN}..{}", self.steps),
                        "let the text come while a run trains, e.g. after a third of it",
                    ));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Plain names, each once, and a reason for whatever is left out: a comparison says what it does not show.
fn check_names<'a>(key: &str, items: impl Iterator<Item = (&'a String, bool, &'a String)>) -> Result<(), Failure> {
    let mut seen = BTreeSet::new();
    for (name, enabled, reason) in items {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
            return Err(Failure::refused(
                format!("{key} '{name}'"),
                "is not a plain name",
                "use lower-case letters, digits and '-'",
            ));
        }
        if !seen.insert(name) || seen.len() > COUNT_MAX {
            return Err(Failure::refused(
                format!("{key} '{name}'"),
                "stands twice",
                "give each its own name",
            ));
        }
        if !enabled && reason.trim().is_empty() {
            return Err(Failure::refused(
                format!("{key}.{name}.reason"),
                "is missing, and it does not take part",
                "say why",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A plan of two seeds each, one controller, two cases and one that does not take part.
    pub(crate) const TEXT: &str = r#"
        name = "test"
        base = "model.toml"
        steps = 40
        ranks = 1
        expected_seconds_per_run = 2.0
        [seeds]
        tuning = [101, 102]
        judging = [1, 2]
        [statistics]
        resamples = 2000
        [static]
        powers = [0.25]
        points = 2
        [[controllers]]
        name = "ado"
        set = ["mixture.controller=ado"]
        [[cases]]
        name = "plain"
        change = { kind = "none" }
        [[cases]]
        name = "noise"
        change = { kind = "noise", share = 0.2, seed = 5 }
        [[cases]]
        name = "late"
        change = { kind = "late", of = "web", from_step = 20 }
        enabled = false
        reason = "not in every test"
    "#;

    pub(crate) fn plan() -> Plan {
        Plan::parse(TEXT, "test.toml").expect("a good plan")
    }

    #[test]
    fn a_plan_is_read_with_its_defaults() {
        let plan = plan();
        assert_eq!(plan.cases().count(), 2);
        assert_eq!(plan.metrics.primary, Metric::Macro);
        assert_eq!(plan.metrics.target, Target::EndOf(NamedStatic::Natural));
        assert_eq!(plan.controllers[0].initial, NamedStatic::Natural);
        let stated = TEXT.replace("[static]", "[metrics]\ntarget = 2.5\n[static]");
        let stated = Plan::parse(&stated, "test.toml").expect("a good plan");
        assert_eq!(stated.metrics.target, Target::BitsPerByte(2.5));
    }

    #[test]
    fn what_would_spoil_a_comparison_is_refused() {
        for (from, to, part) in [
            ("tuning = [101, 102]", "tuning = [1, 102]", "a seed stands twice"),
            ("judging = [1, 2]", "judging = []", "to judge on"),
            ("steps = 40", "steps = 0", "one of them is 0"),
            ("steps = 40", "steps = 40\nstep = 3", "unknown field"),
            ("name = \"ado\"", "name = \"natural\"", "the name of a static arm"),
            ("name = \"ado\"", "name = \"ado-mean\"", "the name of a static arm"),
            ("name = \"noise\"", "name = \"plain\"", "stands twice"),
            ("name = \"noise\"", "name = \"No ise\"", "is not a plain name"),
            ("share = 0.2", "share = 0.0", "share is not in"),
            ("reason = \"not in every test\"", "", "say why"),
            (
                "from_step = 20 }\n        enabled = false",
                "from_step = 40 }",
                "from_step is not in 2..40",
            ),
            (
                "kind = \"noise\", share = 0.2, seed = 5",
                "kind = \"shift\", of = \"web\", from_step = 1",
                "from_step is not in 2..40",
            ),
            ("points = 2", "points = 2\nunimax_epochs_max = 0.0", "unimax_epochs_max"),
            ("resamples = 2000", "confidence = 95.0", "statistics.confidence"),
        ] {
            let text = TEXT.replacen(from, to, 1);
            assert_ne!(text, TEXT, "{from}");
            let refused = Plan::parse(&text, "test.toml").expect_err(part);
            assert!(refused.message.contains(part), "{}", refused.message);
            assert_eq!(refused.exit, crate::exit::Exit::Refused);
        }
    }
}
