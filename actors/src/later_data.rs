//! Data sets that enter a running training: from the folder of one to the decision that names it, and back.
//!
//! A decision holds what the order of samples needs ([`DomainEdition`]); the data set holds it too. Whoever takes one for the
//! other compares them first: a person's command makes the decision ([`editions`]), the controller looks whether it fits before
//! it can stand in the trace ([`check`]), and a rank does before it reads a token of it ([`open`]).

use std::path::Path;
use tarazed_corpus::{DataManifest, Split, TokenStore, TokenizerManifest, is_same_tokenizer, later_folder};
use tarazed_domain::DomainIndex;
use tarazed_domain::config::LaterConfig;
use tarazed_protocol::data::decision::{DataChange, DomainEdition};

/// What `manifest` brings a run whose domains have these names: those of `wanted`, or all of it where that is empty. A name
/// that the run has must be among `replaced`, and all of these must be brought.
///
/// # Errors
/// What does not fit, with the remedy.
pub fn editions(
    manifest: &DataManifest,
    context: usize,
    names: &[String],
    wanted: &[String],
    replaced: &[String],
) -> Result<Vec<DomainEdition>, String> {
    let held = |name: &String| manifest.domains.iter().any(|domain| domain.name == *name);
    if let Some(missing) = wanted.iter().chain(replaced).find(|name| !held(name)) {
        let held: Vec<&str> = manifest.domains.iter().map(|domain| domain.name.as_str()).collect();
        return Err(format!(
            "'{missing}' is not in the data set, which holds {}",
            held.join(", ")
        ));
    }
    if let Some(unknown) = replaced.iter().find(|name| !names.contains(name)) {
        return Err(format!(
            "'{unknown}' cannot be replaced, since the run has only {}; leave --replace out to add it",
            names.join(", ")
        ));
    }
    let taken = |name: &String| wanted.is_empty() || wanted.contains(name) || replaced.contains(name);
    let mut next = names.len();
    let mut editions = Vec::new();
    for (index, domain) in manifest
        .domains
        .iter()
        .enumerate()
        .filter(|(_, domain)| taken(&domain.name))
    {
        let at = match names.iter().position(|name| *name == domain.name) {
            Some(at) if replaced.contains(&domain.name) => at,
            Some(_) => {
                return Err(format!(
                    "the run has a domain '{0}' already; say --replace {0}, or name with --domain what else is to enter",
                    domain.name
                ));
            }
            None => {
                next += 1;
                next - 1
            }
        };
        let number = |at: usize| u16::try_from(at).map_err(|_| format!("'{}' is one domain too many", domain.name));
        editions.push(DomainEdition {
            name: domain.name.clone(),
            domain: number(at)?,
            index: number(index)?,
            language: domain.language.name().to_owned(),
            train_sequences: domain.train.sequences(context),
            train_tokens: domain.train.tokens,
        });
    }
    Ok(editions)
}

/// The change of the data that the config plans, of a data set for a run whose domains have these names then. Its shares are
/// those that the config states; where it states none, none.
///
/// # Errors
/// As [`editions`].
pub fn planned(
    manifest: &DataManifest,
    context: usize,
    names: &[String],
    later: &LaterConfig,
) -> Result<DataChange, String> {
    let wanted: Vec<String> = later.domains.iter().chain(&later.replace).cloned().collect();
    let change = DataChange {
        version: manifest.version.clone(),
        domains: editions(manifest, context, names, &wanted, &later.replace)?,
        weights: Vec::new(),
    };
    // In the order of the data set, which need not be that of the config.
    let new = change.new_domains(names.len());
    let weights = new
        .filter_map(|edition| later.shares.get(&edition.name).copied())
        .collect();
    Ok(DataChange { weights, ..change })
}

/// Whether the run folder's `data` holds the data set of a change, made with the run's tokenizer, and it is as the change says.
///
/// # Errors
/// A message naming the data set, where it was looked for and what is wrong with it.
pub fn check(
    data: &Path,
    context: usize,
    tokenizer: Option<&TokenizerManifest>,
    change: &DataChange,
) -> Result<(), String> {
    if !change.names_hash() {
        return Err(format!("'{}' is no version of a data set", change.version));
    }
    let folder = later_folder(data, &change.version);
    let manifest = DataManifest::load(&folder).map_err(|e| missing(&folder, change, &e))?;
    if tokenizer.is_some_and(|tokenizer| !is_same_tokenizer(tokenizer, &manifest.tokenizer)) {
        return Err(format!(
            "{}: was made with another tokenizer than the run's data",
            folder.display()
        ));
    }
    compare(&folder, context, &manifest, change)
}

/// The data set of a change, open for reading; as [`check`].
///
/// # Errors
/// As [`check`].
pub fn open(data: &Path, context: usize, change: &DataChange) -> Result<TokenStore, String> {
    check(data, context, None, change)?;
    let folder = later_folder(data, &change.version);
    TokenStore::open(&folder, context).map_err(|e| missing(&folder, change, &e))
}

fn missing(folder: &Path, change: &DataChange, error: &dyn std::fmt::Display) -> String {
    let names: Vec<&str> = change.domains.iter().map(|edition| edition.name.as_str()).collect();
    format!(
        "data set {}, from which the domains {} came, is not at {} ({error}); put it, or a link to it, there again",
        change.version,
        names.join(", "),
        folder.display()
    )
}

fn compare(folder: &Path, context: usize, manifest: &DataManifest, change: &DataChange) -> Result<(), String> {
    if manifest.version != change.version {
        return Err(missing(folder, change, &format!("there is {}", manifest.version)));
    }
    for edition in &change.domains {
        let is_as_said = manifest.domains.get(usize::from(edition.index)).is_some_and(|domain| {
            let training = domain.split(Split::Train);
            domain.name == edition.name
                && domain.language.name() == edition.language
                && training.sequences(context) == edition.train_sequences
                && training.tokens == edition.train_tokens
        });
        if !is_as_said {
            return Err(format!(
                "{}: its domain {} is not '{}' with {} training sequences of {context} tokens, as the decision says",
                folder.display(),
                DomainIndex(edition.index),
                edition.name,
                edition.train_sequences
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tarazed_corpus::{PrepareRequest, Prepared, prepare};
    use tarazed_domain::config::{DomainConfig, Language, SourceFormat, TokenizerConfig};

    const CONTEXT: usize = 8;

    /// A data set of two domains, `code` and `wiki`, linked as a run has it.
    fn data(folder: &Path) -> Prepared {
        let domain = |name: &str, language| {
            let path = folder.join(format!("{name}.jsonl"));
            let line = |i| {
                format!(
                    "{{\"text\":\"The {name} number {i} comes before number {}.\"}}\n",
                    i + 1
                )
            };
            std::fs::write(&path, (0..60).map(line).collect::<String>()).expect("written");
            DomainConfig {
                name: name.to_owned(),
                path,
                format: SourceFormat::Auto,
                language,
                weight: 1.0,
                text_field: "text".to_owned(),
            }
        };
        let request = PrepareRequest {
            domains: &[domain("code", Language::Code), domain("wiki", Language::En)],
            tokenizer: &TokenizerConfig {
                vocabulary: 300,
                ..TokenizerConfig::default()
            },
            model_vocabulary: 300,
            held_out_fraction: 0.2,
            context: CONTEXT,
        };
        let prepared = prepare(&request, &folder.join("made"), &mut |_| {}).expect("a data set");
        std::os::unix::fs::symlink(&prepared.folder, later_folder(folder, &prepared.manifest.version)).expect("a link");
        prepared
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn editions_have_the_places_of_run_and_data_set() {
        let folder = tempfile::tempdir().expect("a folder");
        let manifest = data(folder.path()).manifest;
        let run = names(&["web", "wiki"]);
        let of =
            |wanted: &[&str], replaced: &[&str]| editions(&manifest, CONTEXT, &run, &names(wanted), &names(replaced));
        let both = of(&[], &["wiki"]).expect("both fit");
        let places: Vec<_> = both
            .iter()
            .map(|e| (e.name.as_str(), e.domain, e.index, e.language.as_str()))
            .collect();
        assert_eq!(places, [("code", 2, 0, "code"), ("wiki", 1, 1, "en")]);
        assert_eq!(both[1].train_tokens, manifest.domains[1].train.tokens);
        assert_eq!(of(&["code"], &[]).expect("it fits"), both[..1]);
        assert_eq!(of(&["code"], &["wiki"]).expect("both fit"), both);
        for (wanted, replaced, part) in [
            (&[][..], &[][..], "--replace wiki"),
            (&["wiki"], &[], "--replace wiki"),
            (&["book"], &[], "'book' is not in the data set, which holds code, wiki"),
            (&["code"], &["code"], "'code' cannot be replaced"),
        ] {
            let refused = of(wanted, replaced).expect_err("refused");
            assert!(refused.contains(part), "{refused}");
        }
    }

    #[test]
    fn what_is_not_as_the_decision_says_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let here = folder.path();
        let prepared = data(here);
        let manifest = &prepared.manifest;
        let good = DataChange {
            version: manifest.version.clone(),
            domains: editions(manifest, CONTEXT, &names(&["web"]), &[], &[]).expect("both fit"),
            weights: vec![1.0; 3],
        };
        let tokenizer = &manifest.tokenizer;
        check(here, CONTEXT, Some(tokenizer), &good).expect("it fits");
        assert_eq!(open(here, CONTEXT, &good).expect("it opens").manifest(), manifest);

        let refused = |change: DataChange, part: &str| {
            let error = check(here, CONTEXT, Some(tokenizer), &change).expect_err("refused");
            assert!(error.contains(part), "{error}");
        };
        let with = |edit: fn(&mut DataChange)| {
            let mut change = good.clone();
            edit(&mut change);
            change
        };
        refused(
            with(|change| change.domains[0].train_sequences += 1),
            "is not 'code' with",
        );
        refused(with(|change| change.domains[0].index = 7), "is not 'code' with");
        refused(
            with(|change| change.domains[1].name = "book".into()),
            "is not 'book' with",
        );
        refused(
            with(|change| change.version = "../made".into()),
            "no version of a data set",
        );
        let absent = "0a".repeat(32);
        refused(
            with(|change| change.version = "0a".repeat(32)),
            &format!("data set {absent}, from which the domains code, wiki came, is not at"),
        );
        let mut other = tokenizer.clone();
        other.end_of_document += 1;
        assert!(
            check(here, CONTEXT, Some(&other), &good)
                .expect_err("refused")
                .contains("another tokenizer")
        );
        // Something else under its name is not taken for it.
        let alien = later_folder(here, &absent);
        std::os::unix::fs::symlink(&prepared.folder, alien).expect("a link");
        refused(with(|change| change.version = "0a".repeat(32)), "there is");
    }
}
