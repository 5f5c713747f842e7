//! A storm as it is written down: one TOML file, every key known, every relation checked before anything starts.

use super::kind::Kind;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// World sizes that a storm may cycle through; each has ports of its own.
pub const RANKS_MAX: u32 = 16;
/// Copies of one card in the deck of faults.
const WEIGHT_MAX: u32 = 1_000;
/// Mebibytes of the small disk, which lies in memory.
const DISK_MIB_MAX: u64 = 8_192;

/// One storm.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Names the work folder.
    pub name: String,
    /// The training config, relative to the scenario's file.
    pub config: PathBuf,
    /// Overrides of its keys, as `--set` takes them.
    #[serde(default)]
    pub set: Vec<String>,
    /// What is drawn, and in which order, is a function of this; what it meets is not.
    pub seed: u64,
    /// World sizes; each life of the controller takes the next one.
    pub worlds: Vec<u32>,
    /// When the storm is over.
    pub until: Until,
    /// How faults follow each other.
    pub pace: Pace,
    /// Faults and how often each lies in the deck that they are dealt from.
    pub faults: BTreeMap<Kind, u32>,
    /// Faults at the moment at which a phase of recovery is entered.
    #[serde(default)]
    pub second: Vec<Second>,
    /// What must have been reached for the storm to pass, besides equal traces.
    #[serde(default)]
    pub goal: Goal,
    /// Steps of each fault-free stretch that goodput is measured against.
    #[serde(default = "calm_steps")]
    pub calm_steps: u64,
    /// No new line for this long is a verdict of its own.
    #[serde(default = "patience_s")]
    pub patience_s: u64,
    /// Size of the disk that the run folder lies on, in mebibytes of memory.
    #[serde(default = "disk_mib")]
    pub disk_mib: u64,
    /// An S3 server behind the fault-injecting proxy; the storm's own one where this is absent. Credentials are those of the
    /// environment then.
    #[serde(default)]
    pub store_upstream: Option<String>,
}

const fn calm_steps() -> u64 {
    120
}
const fn patience_s() -> u64 {
    120
}
const fn disk_mib() -> u64 {
    512
}

/// When no further fault is injected; the run then goes on to a quiet end.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Until {
    /// After so many faults done.
    pub faults: Option<u64>,
    /// After so many minutes.
    pub minutes: Option<f64>,
    /// Lines of the whole run at most; the run ends by itself there.
    pub steps: Option<u64>,
}

/// Exactly one of these.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pace {
    /// Independent arrivals with this mean rate.
    pub per_hour: Option<f64>,
    /// One every so often.
    pub every_ms: Option<u64>,
    /// The next one this long (least, most) after the first new line since the last one.
    pub after_line_ms: Option<[u64; 2]>,
}

/// A phase of recovery, as `events.jsonl` shows that it was entered.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// A loss was seen: survivors are being fenced (`rank_lost`).
    Fence,
    /// No copy of a shard is left: a checkpoint is being looked for (`state_lost`).
    Locate,
    /// A generation begins from live copies: mesh, finish, copy (`generation`).
    Begin,
    /// A generation begins from a checkpoint (`generation`, restored).
    Restore,
    /// A newcomer is ready and about to be admitted (`rank_ready` after the first generation).
    Admit,
    /// A checkpoint was committed (`checkpoint`).
    Checkpoint,
    /// A controller was started (no event: the storm starts it).
    Claim,
}

/// A second fault.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Second {
    /// When.
    pub on: Phase,
    /// What.
    pub kind: Kind,
    /// The share of such moments that gets it.
    pub share: f64,
}

/// What a storm must reach.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Goal {
    /// Least share of fault-free steps.
    pub goodput_min: Option<f64>,
    /// Least number of faults done.
    pub faults_min: u64,
    /// Least number of kinds among them.
    pub kinds_min: u64,
    /// Least number of controllers killed.
    pub controller_kills_min: u64,
    /// Least number of faults done an hour.
    pub per_hour_min: Option<f64>,
    /// Every worker of the largest world must have been hit.
    pub no_rank_immune: bool,
}

impl Scenario {
    /// Reads and checks a scenario; its training config becomes a path from the root.
    ///
    /// # Errors
    /// What is wrong, with the key.
    pub fn load(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let mut scenario: Self = toml::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
        let folder = path.parent().unwrap_or_else(|| Path::new("."));
        let config = folder.join(&scenario.config);
        scenario.config = std::fs::canonicalize(&config).map_err(|e| format!("config: {}: {e}", config.display()))?;
        scenario.check().map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(scenario)
    }

    fn check(&self) -> Result<(), String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let say = |good: bool, what: &str| if good { Ok(()) } else { Err(what.to_owned()) };
        say(
            !self.name.is_empty() && self.name.chars().all(plain),
            "name: use letters, digits, '-' and '_'",
        )?;
        let worlds = !self.worlds.is_empty() && self.worlds.iter().all(|size| (1..=RANKS_MAX).contains(size));
        say(worlds, &format!("worlds: name sizes in 1..={RANKS_MAX}"))?;
        let paces = [
            self.pace.per_hour.is_some(),
            self.pace.every_ms.is_some(),
            self.pace.after_line_ms.is_some(),
        ];
        say(
            paces.iter().filter(|is| **is).count() == 1,
            "pace: name one of per_hour, every_ms, after_line_ms",
        )?;
        say(
            self.pace.per_hour.is_none_or(|rate| rate > 0.0 && rate.is_finite()),
            "pace.per_hour: choose a positive rate",
        )?;
        say(
            self.pace.after_line_ms.is_none_or(|[least, most]| least <= most),
            "pace.after_line_ms: name the least, then the most",
        )?;
        let until = &self.until;
        say(
            until.faults.is_some() || until.minutes.is_some() || until.steps.is_some(),
            "until: name faults, minutes or steps",
        )?;
        say(
            until.minutes.is_none_or(|minutes| minutes > 0.0 && minutes.is_finite()),
            "until.minutes: choose a positive number",
        )?;
        let weights = self.faults.values().all(|weight| *weight <= WEIGHT_MAX);
        say(
            weights && self.faults.values().any(|weight| *weight > 0),
            &format!("faults: give at least one kind a weight in 1..={WEIGHT_MAX}"),
        )?;
        let shares = self.second.iter().all(|second| (0.0..=1.0).contains(&second.share));
        say(shares, "second.share: choose a share in 0..=1")?;
        say(self.calm_steps >= 20, "calm_steps: at least 20 tell a rate")?;
        say(
            (8..=DISK_MIB_MAX).contains(&self.disk_mib),
            &format!("disk_mib: choose 8..={DISK_MIB_MAX}"),
        )
    }

    /// The largest world.
    #[must_use]
    pub fn largest(&self) -> u32 {
        self.worlds.iter().copied().max().unwrap_or(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenarios() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios")
    }

    #[test]
    fn the_shipped_scenarios_are_good_and_rich() {
        for name in ["short", "storm", "kill15", "two_thousand"] {
            let scenario = Scenario::load(&scenarios().join(format!("{name}.toml"))).expect("a good scenario");
            assert_eq!(scenario.name, name);
        }
        let long = Scenario::load(&scenarios().join("two_thousand.toml")).expect("a good scenario");
        assert!(long.faults.len() >= 15 && long.until.faults >= Some(2_000));
        assert_eq!(long.worlds.iter().copied().max(), Some(8));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_key() {
        let good = std::fs::read_to_string(scenarios().join("short.toml")).expect("a file");
        let folder = tempfile::tempdir().expect("a folder");
        let config = scenarios().join("small.toml");
        std::fs::copy(config, folder.path().join("small.toml")).expect("copied");
        for (from, to, says) in [
            ("worlds = [", "worlds = [0, ", "worlds"),
            ("[until]", "[until]\nhours = 3", "hours"),
            ("[pace]", "[pace]\nper_hour = 5.0", "pace"),
            ("[faults]", "[faults]\nkill_moon = 1", "kill_moon"),
            ("name = \"", "name = \"../", "name"),
        ] {
            assert!(good.contains(from), "{from}");
            let path = folder.path().join("bad.toml");
            std::fs::write(&path, good.replacen(from, to, 1)).expect("written");
            let refused = Scenario::load(&path).expect_err("refused");
            assert!(refused.contains(says), "{says}: {refused}");
        }
    }
}
