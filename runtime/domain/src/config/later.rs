//! `[[data.later]]`: domains that a run does not begin with, and other text of those that it has, at a stated step.

use super::validate::require;
use super::{Config, ConfigError, ControllerKind};
use crate::limits::DOMAINS_MAX;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// `[[data.later]]`: what `tarazed data add` does, planned. It is decided in the first decision point's line.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaterConfig {
    /// The first step (from 0) that trains on it.
    pub step: u64,
    /// A data set made with the run's tokenizer. It must stay where it is. Relative to the config file.
    pub prepared: PathBuf,
    /// Domains of it that are new to the run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<String>,
    /// Domains of the run whose text those of the same name in the data set replace.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub replace: Vec<String>,
    /// Share of each new domain in the mixture from then on; the others have the rest, in their proportions. Their shares by
    /// training tokens where it is left out.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub shares: BTreeMap<String, f64>,
}

impl LaterConfig {
    /// The part that decides numbers: the data set's content is in the trace.
    pub(super) fn identity(&self) -> String {
        let Self {
            step,
            prepared: _,
            domains,
            replace,
            shares,
        } = self;
        format!("{step}:{domains:?}:{replace:?}:{shares:?}")
    }
}

pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    let later = &config.data.later;
    if later.is_empty() {
        return Ok(());
    }
    require!(
        config.mixture.controller != ControllerKind::Schedule,
        "data.later",
        "stages speak of the domains of [[data.domains]], and mixture.controller is \"schedule\"",
        "set another controller, or leave one of them out"
    );
    require!(
        config.mixture.decides() || config.policy.decides(),
        "data.later",
        "is decided at a decision point, and this run has none",
        "set policy.persons = true, or a mixture.controller that decides"
    );
    let first = config.mixture.first_point().unwrap_or(u64::MAX);
    let mut earliest = first.saturating_add(config.mixture.lag_steps);
    let mut names: BTreeSet<&String> = config.data.domains.iter().map(|domain| &domain.name).collect();
    for (index, change) in later.iter().enumerate() {
        let key = |field: &str| format!("data.later[{index}].{field}");
        require!(
            change.step >= earliest,
            key("step"),
            format!("is {}, and the first that can be decided is {earliest}", change.step),
            "begin it later, lower mixture.start_steps or mixture.interval_steps, or put the changes in order"
        );
        earliest = change.step.saturating_add(1);
        require!(
            !change.domains.is_empty() || !change.replace.is_empty(),
            key("domains"),
            "brings nothing",
            "name domains of the data set, here or in replace"
        );
        for (at, name) in change.replace.iter().enumerate() {
            require!(
                names.contains(name) && !change.replace[..at].contains(name),
                key("replace"),
                format!("'{name}' is no domain that the run has then, or stands twice"),
                "name domains of the run, and new ones in domains"
            );
        }
        for name in &change.domains {
            require!(
                !name.is_empty() && names.insert(name),
                key("domains"),
                format!("'{name}' is empty, or names a domain that the run has already"),
                "name what is to be replaced in replace"
            );
        }
        check_shares(change, &key("shares"))?;
    }
    require!(
        names.len() <= DOMAINS_MAX,
        "data.later",
        format!("{} domains in all are more than {DOMAINS_MAX}", names.len()),
        "bring fewer"
    );
    Ok(())
}

fn check_shares(change: &LaterConfig, key: &str) -> Result<(), ConfigError> {
    let shares = &change.shares;
    require!(
        shares.is_empty() || shares.keys().eq(change.domains.iter().collect::<BTreeSet<_>>()),
        key,
        "are not those of the new domains",
        "give a share for each of domains and for no other, or leave all out"
    );
    require!(
        shares.values().all(|share| share.is_finite() && *share > 0.0) && shares.values().sum::<f64>() < 1.0,
        key,
        "are no shares",
        "give positive ones that leave something to the domains of the run, e.g. 0.1"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const CONFIG: &str = "[run]\nname = \"tiny\"\nseed = 7\nsteps = 300\n\
        [model]\nlayers = 1\nhidden = 16\nffn = 16\nheads = 2\nkv_heads = 1\ncontext = 16\nvocabulary = 300\ninit_std = 0.02\n\
        [batch]\nlanes = 2\nsequences_per_lane = 1\nmicro_batch_sequences = 1\n\
        [optimizer]\nlearning_rate = 1e-3\nschedule = { kind = \"constant\", warmup_steps = 2 }\nblock_elements = 1024\n\
        [mixture]\ncontroller = \"ado\"\nstart_steps = 100\ninterval_steps = 50\nlag_steps = 8\n\
        [[data.domains]]\nname = \"web\"\npath = \"web.jsonl\"\nlanguage = \"en\"\nweight = 1\n\
        [[data.domains]]\nname = \"zh\"\npath = \"zh.jsonl\"\nlanguage = \"zh\"\nweight = 1\n\
        [[data.later]]\nstep = 200\nprepared = \"more\"\ndomains = [\"code\"]\nreplace = [\"zh\"]\nshares = { code = 0.2 }\n";

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, "run.toml", &[], Path::new("/somewhere"))
    }

    #[test]
    fn what_comes_later_is_part_of_a_run() {
        let config = parse(CONFIG).expect("a good config");
        let later = &config.data.later[0];
        assert_eq!(later.prepared, Path::new("/somewhere/more"));
        let again = parse(&config.to_toml().expect("TOML")).expect("it reads back");
        assert_eq!(again, config);
        let identity = |from: &str, to: &str| parse(&CONFIG.replace(from, to)).expect("good").identity();
        assert_eq!(identity("\"more\"", "\"elsewhere\""), config.identity());
        for (from, to) in [
            ("step = 200", "step = 201"),
            ("0.2 }", "0.3 }"),
            ("replace = [\"zh\"]", ""),
        ] {
            assert_ne!(identity(from, to), config.identity(), "{from}");
        }
        let without = CONFIG.split("[[data.later]]").next().expect("a part");
        assert!(!parse(without).expect("good").identity().contains("later"));
    }

    #[test]
    fn what_cannot_come_is_refused_by_key() {
        for (from, to, part) in [
            (
                "step = 200",
                "step = 107",
                "data.later[0].step: is 107, and the first that can be decided is 108",
            ),
            ("[\"code\"]", "[\"web\"]", "data.later[0].domains: 'web'"),
            (
                "replace = [\"zh\"]",
                "replace = [\"book\"]",
                "data.later[0].replace: 'book'",
            ),
            (
                "replace = [\"zh\"]",
                "replace = [\"zh\", \"zh\"]",
                "data.later[0].replace: 'zh'",
            ),
            (
                "{ code = 0.2 }",
                "{ code = 1.0 }",
                "data.later[0].shares: are no shares",
            ),
            ("{ code = 0.2 }", "{ zh = 0.2 }", "data.later[0].shares: are not those"),
            ("controller = \"ado\"", "controller = \"static\"", "this run has none"),
        ] {
            let refused = parse(&CONFIG.replace(from, to)).expect_err(part).to_string();
            assert!(refused.contains(part), "{refused}");
        }
    }
}
