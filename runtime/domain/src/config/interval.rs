//! `checkpoint.interval`: how often by the clock.

use crate::limits::{CHECKPOINT_EVERY_MS_MAX, CHECKPOINT_EVERY_MS_MIN};
use serde::{Deserialize, Serialize};

/// How often a checkpoint is made by the clock, besides `checkpoint.interval_steps`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum CheckpointInterval {
    /// Not by the clock: `"off"`.
    #[default]
    Off,
    /// As Young and Daly advise for the losses and costs that were seen: `"auto"`.
    Auto,
    /// So many milliseconds: `"90s"`, `"10m"`, `"2h"`.
    EveryMs(u64),
}

const EXPECTED: &str = "expected \"off\", \"auto\", or a time such as \"90s\", \"10m\", \"2h\"";

impl TryFrom<String> for CheckpointInterval {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let unit_ms = match text.chars().last() {
            _ if text == "off" => return Ok(Self::Off),
            _ if text == "auto" => return Ok(Self::Auto),
            Some('s') => 1_000,
            Some('m') => 60_000,
            Some('h') => 3_600_000,
            _ => return Err(format!("{text:?}: {EXPECTED}")),
        };
        let number = &text[..text.len() - 1];
        let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        let interval_ms = number.parse::<u64>().ok().filter(|_| is_number);
        let interval_ms = interval_ms.map(|number| number.saturating_mul(unit_ms));
        match interval_ms {
            None => Err(format!("{text:?}: {EXPECTED}")),
            Some(ms) if !(CHECKPOINT_EVERY_MS_MIN..=CHECKPOINT_EVERY_MS_MAX).contains(&ms) => Err(format!(
                "{text:?}: choose between {} s and {} h",
                CHECKPOINT_EVERY_MS_MIN / 1_000,
                CHECKPOINT_EVERY_MS_MAX / 3_600_000
            )),
            Some(ms) => Ok(Self::EveryMs(ms)),
        }
    }
}

impl From<CheckpointInterval> for String {
    fn from(interval: CheckpointInterval) -> Self {
        match interval {
            CheckpointInterval::Off => "off".to_owned(),
            CheckpointInterval::Auto => "auto".to_owned(),
            CheckpointInterval::EveryMs(ms) if ms.is_multiple_of(3_600_000) => format!("{}h", ms / 3_600_000),
            CheckpointInterval::EveryMs(ms) if ms.is_multiple_of(60_000) => format!("{}m", ms / 60_000),
            CheckpointInterval::EveryMs(ms) => format!("{}s", ms / 1_000),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_as_the_same() {
        for (text, interval) in [
            ("off", CheckpointInterval::Off),
            ("auto", CheckpointInterval::Auto),
            ("5s", CheckpointInterval::EveryMs(5_000)),
            ("90s", CheckpointInterval::EveryMs(90_000)),
            ("10m", CheckpointInterval::EveryMs(600_000)),
            ("24h", CheckpointInterval::EveryMs(86_400_000)),
        ] {
            assert_eq!(CheckpointInterval::try_from(text.to_owned()), Ok(interval));
            assert_eq!(String::from(interval), text);
        }
        let hour = CheckpointInterval::try_from("60m".to_owned());
        assert_eq!(hour, Ok(CheckpointInterval::EveryMs(3_600_000)));
    }

    #[test]
    fn all_else_is_refused_with_what_to_write() {
        for text in [
            "",
            "m",
            "10",
            "-1m",
            "+1m",
            "1.5h",
            "10 m",
            "0s",
            "0h",
            "25h",
            "99999999999999999999h",
            "Auto",
            "1é",
        ] {
            let refused = CheckpointInterval::try_from(text.to_owned()).unwrap_err();
            assert!(
                refused.contains("\"10m\"") || refused.contains("choose between"),
                "{refused}"
            );
        }
    }
}
