//! The data of a case: the base config's corpus, changed as the plan says, without held-out text that overlaps with
//! training text, written as files of its own and made into a data set once for all of its runs.
//!
//! Everything is a function of the corpus' texts and the plan, and is made again at every start: what lies in the work
//! folder must then be the same bytes, or the bench is refused. The corpus is held in memory.

mod generate;
mod overlap;

pub use generate::generate;
pub use overlap::Overlapping;

use super::measure::{DomainFacts, Facts};
use super::plan::{Case, Plan};
use crate::exit::Failure;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use tarazed_corpus::{DomainManifest, PrepareRequest, ScoredText, Split, TokenStore, each_text};
use tarazed_domain::config::{Config, DomainConfig, Language, SourceFormat, TokenizerConfig};

/// What a case's files were made from.
pub const PROVENANCE_FILE: &str = "PROVENANCE.json";
/// Dropped documents that a report names one by one; all are in the provenance.
const REPORTED_MAX: usize = 8;

/// A text and where it came from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Document {
    /// The text.
    pub text: String,
    /// `domain:file:record`.
    pub source: String,
}

/// A domain of a case.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its language, for reports.
    pub language: Language,
    /// Whether runs are judged by its held-out text.
    pub judged: bool,
    /// How it was made; empty where it is the corpus' own.
    pub made: String,
    /// The first step (from 0) that trains on it.
    pub from_step: u64,
    /// Its documents, in order.
    pub documents: Vec<Document>,
}

impl Domain {
    fn texts(&self) -> impl Iterator<Item = &str> {
        self.documents.iter().map(|document| document.text.as_str())
    }
}

/// Reads the domains of the base config.
///
/// # Errors
/// As the corpus is refused by a run.
pub fn read_corpus(base: &Config) -> Result<Vec<Domain>, Failure> {
    let read = |config: &DomainConfig| {
        let mut documents = Vec::new();
        each_text(config, &mut |text| {
            documents.push(Document {
                source: format!("{}:{}:{}", config.name, text.file, text.record),
                text: text.text,
            });
        })?;
        Ok(Domain {
            name: config.name.clone(),
            language: config.language,
            judged: true,
            made: String::new(),
            from_step: 0,
            documents,
        })
    };
    base.data.domains.iter().map(read).collect()
}

/// A case whose data is ready.
#[derive(Clone, PartialEq, Debug)]
pub struct Ready {
    /// Its domains, as configs of runs have them; weights are 1.
    pub domains: Vec<DomainConfig>,
    /// What comes while runs train; the last of its facts.
    pub late: Option<Late>,
    /// Its tokenizer: the same for all cases.
    pub tokenizer: PathBuf,
    /// The folder that holds its data set.
    pub data: PathBuf,
    /// Sizes and yardsticks.
    pub facts: Facts,
    /// Held-out documents that were left out, in all.
    pub dropped: usize,
    /// The first few of them.
    pub dropped_examples: Vec<Overlapping>,
    /// Held-out documents before that.
    pub held_out_documents: usize,
}

/// A domain that comes while runs train.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Late {
    /// Its name.
    pub name: String,
    /// The first step (from 0) that trains on it.
    pub from_step: u64,
    /// The folder that holds its data set.
    pub data: PathBuf,
}

/// Makes the tokenizer that all cases share: the base config's, or one trained on the training text of the corpus.
///
/// # Errors
/// As a run's data is refused.
pub fn tokenizer(base: &Config, work: &Path) -> Result<PathBuf, Failure> {
    if let Some(path) = &base.data.tokenizer.path {
        return Ok(path.clone());
    }
    let request = PrepareRequest {
        domains: &base.data.domains,
        tokenizer: &base.data.tokenizer,
        model_vocabulary: base.model.vocabulary,
        held_out_fraction: base.data.held_out_fraction,
        context: base.model.context,
    };
    let prepared = tarazed_corpus::prepare(&request, &work.join("base"), &mut |_| ())?;
    Ok(prepared.tokenizer_path)
}

/// Makes a case's files and its data set below `work`, or finds them there.
///
/// # Errors
/// Refused where the case cannot be made, or where the folder holds another; else as files fail.
pub fn make(
    plan: &Plan,
    case: &Case,
    corpus: &[Domain],
    base: &Config,
    tokenizer: &Path,
    work: &Path,
) -> Result<Ready, Failure> {
    let fraction = base.data.held_out_fraction;
    let mut domains = generate(&case.change, corpus, fraction, &format!("cases.{}", case.name))?;
    let is_held_out = |text: &&str| Split::of(&blake3::hash(text.as_bytes()), fraction) == Split::HeldOut;
    let held_out_documents = domains.iter().flat_map(Domain::texts).filter(is_held_out).count();
    let dropped = overlap::remove(&mut domains, fraction, &plan.overlap);
    if let Some(bare) = domains
        .iter()
        .find(|domain| !domain.texts().any(|text| is_held_out(&text)))
    {
        let lost = dropped.iter().filter(|lost| lost.domain == bare.name).count();
        return Err(Failure::refused(
            format!("cases.{}", case.name),
            format!(
                "domain '{}' has no held-out document left; {lost} overlap with training text",
                bare.name
            ),
            "choose another domain, raise data.held_out_fraction, or raise overlap.share_max",
        ));
    }
    let folder = work.join("cases").join(&case.name);
    let domain_configs = write(case, &domains, &dropped, plan, &folder.join("text"))?;
    let early = domains.iter().filter(|domain| domain.from_step == 0).count();
    let sets = [(&domain_configs[..early], "data"), (&domain_configs[early..], "later")];
    let (mut facts, mut versions) = (Vec::with_capacity(domains.len()), Vec::new());
    for (configs, name) in sets.into_iter().filter(|(configs, _)| !configs.is_empty()) {
        let made = prepare(configs, base, tokenizer, &folder.join(name))?;
        let (_, rest) = domains.split_at(facts.len());
        facts.extend(
            rest.iter()
                .zip(made.domains)
                .map(|(domain, (manifest, scored))| DomainFacts {
                    name: domain.name.clone(),
                    judged: domain.judged,
                    from_step: domain.from_step,
                    made: domain.made.clone(),
                    train_documents: manifest.train.documents,
                    train_tokens: manifest.train.tokens,
                    train_bytes: manifest.train.text_bytes,
                    scored_tokens: scored.tokens,
                    scored_bytes: scored.text_bytes,
                }),
        );
        versions.push(made.version);
    }
    let late = domains.get(early).map(|late| Late {
        name: late.name.clone(),
        from_step: late.from_step,
        data: folder.join("later"),
    });
    Ok(Ready {
        facts: Facts {
            data_version: versions.join(" "),
            domains: facts,
        },
        domains: domain_configs[..early].to_vec(),
        late,
        tokenizer: tokenizer.to_owned(),
        data: folder.join("data"),
        dropped: dropped.len(),
        dropped_examples: dropped.into_iter().take(REPORTED_MAX).collect(),
        held_out_documents,
    })
}

/// A data set of a case.
struct Made {
    version: String,
    /// Its domains, and of each the held-out text that evaluations score.
    domains: Vec<(DomainManifest, ScoredText)>,
}

fn prepare(domains: &[DomainConfig], base: &Config, tokenizer: &Path, out: &Path) -> Result<Made, Failure> {
    let request = PrepareRequest {
        domains,
        tokenizer: &TokenizerConfig {
            path: Some(tokenizer.to_owned()),
            ..base.data.tokenizer.clone()
        },
        model_vocabulary: base.model.vocabulary,
        held_out_fraction: base.data.held_out_fraction,
        context: base.model.context,
    };
    let prepared = tarazed_corpus::prepare(&request, out, &mut |_| ())?;
    let store = TokenStore::open(&prepared.folder, base.model.context)?;
    let scored = store.scored_text(u64::from(base.evaluation.sequences_per_domain_max))?;
    Ok(Made {
        version: prepared.manifest.version.clone(),
        domains: prepared.manifest.domains.into_iter().zip(scored).collect(),
    })
}

/// One file of a case, as its provenance names it.
#[derive(Serialize)]
struct FileProvenance {
    file: String,
    blake3: String,
    domain: String,
    made: String,
    documents: usize,
    text_bytes: usize,
}

/// Writes the texts by one rename, or checks that they are there, byte for byte.
fn write(
    case: &Case,
    domains: &[Domain],
    dropped: &[Overlapping],
    plan: &Plan,
    folder: &Path,
) -> Result<Vec<DomainConfig>, Failure> {
    let mut files = BTreeMap::new();
    let (mut provenance, mut configs) = (Vec::new(), Vec::new());
    for (index, domain) in domains.iter().enumerate() {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
        let stem: String = domain.name.chars().map(plain).take(64).collect();
        let name = format!("{index:03}-{stem}.jsonl");
        let line = |document: &Document| {
            serde_json::json!({"text": document.text, "source": document.source}).to_string() + "\n"
        };
        let text: String = domain.documents.iter().map(line).collect();
        provenance.push(FileProvenance {
            file: name.clone(),
            blake3: blake3::hash(text.as_bytes()).to_hex().to_string(),
            domain: domain.name.clone(),
            made: domain.made.clone(),
            documents: domain.documents.len(),
            text_bytes: domain.texts().map(str::len).sum(),
        });
        configs.push(DomainConfig {
            name: domain.name.clone(),
            path: folder.join(&name),
            format: SourceFormat::Jsonl,
            language: domain.language,
            weight: 1.0,
            text_field: "text".to_owned(),
        });
        files.insert(name, text);
    }
    let all = serde_json::json!({
        "case": case.name,
        "change": case.change,
        "overlap": plan.overlap,
        "files": provenance,
        "held_out_documents_left_out": dropped,
    });
    files.insert(PROVENANCE_FILE.to_owned(), format!("{all:#}\n"));
    put(folder, &files)?;
    Ok(configs)
}

fn put(folder: &Path, files: &BTreeMap<String, String>) -> Result<(), Failure> {
    if folder.exists() {
        for (name, text) in files {
            let path = folder.join(name);
            if std::fs::read(&path).ok().as_deref() != Some(text.as_bytes()) {
                return Err(Failure::refused(
                    path.display(),
                    "is not what this plan makes of this corpus: one of them has changed since",
                    "put it back, or name another --work",
                ));
            }
        }
        return Ok(());
    }
    let partial = folder.with_extension("partial");
    let failed = |e: std::io::Error| Failure::io(folder.display(), &e, "cannot be written", "free space and try again");
    if partial.exists() {
        std::fs::remove_dir_all(&partial).map_err(failed)?;
    }
    std::fs::create_dir_all(&partial).map_err(failed)?;
    for (name, text) in files {
        std::fs::write(partial.join(name), text).map_err(failed)?;
        File::open(partial.join(name))
            .and_then(|file| file.sync_all())
            .map_err(failed)?;
    }
    std::fs::rename(&partial, folder).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mixture::plan::tests::plan;

    /// Text that repeats itself everywhere leaves nothing to judge by, and that is said.
    #[test]
    fn a_domain_without_held_out_text_of_its_own_is_refused() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let base = super::super::tests::base(folder.path());
        let mut corpus = read_corpus(&base).expect("a corpus");
        for (i, document) in corpus[1].documents.iter_mut().enumerate() {
            document.text = "天地玄黄".repeat(20 + i);
        }
        let plan = plan();
        let refused =
            make(&plan, &plan.cases[0], &corpus, &base, Path::new("none"), folder.path()).expect_err("refused");
        assert!(
            refused.message.contains("domain 'zh' has no held-out document left"),
            "{}",
            refused.message
        );
        assert!(!folder.path().join("cases").exists());
    }

    /// Two domains, two cases: files, data sets and yardsticks are there, and a second making finds the same.
    #[test]
    fn a_case_is_made_once_and_found_again() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let base = super::super::tests::base(folder.path());
        let work = folder.path().join("work");
        let corpus = read_corpus(&base).expect("a corpus");
        let tokenizer = tokenizer(&base, &work).expect("a tokenizer");
        let plan = plan();
        let make = |case: usize| make(&plan, &plan.cases[case], &corpus, &base, &tokenizer, &work);
        let (plain, noise) = (make(0).expect("a case"), make(1).expect("a case"));
        assert_eq!(plain, make(0).expect("the same case"));
        assert_eq!((plain.domains.len(), noise.domains.len()), (2, 3));
        for facts in plain.facts.domains.iter().chain(&noise.facts.domains) {
            assert!(
                facts.train_tokens > 0 && facts.scored_tokens > 0 && facts.scored_bytes > 0.0,
                "{facts:?}"
            );
            assert_eq!(facts.judged, facts.name != "noise");
        }
        // The noise is for training; what is judged is the same text by the same tokenizer.
        assert_eq!(plain.facts.domains[..], noise.facts.domains[..2]);
        let provenance = std::fs::read_to_string(work.join("cases/noise/text").join(PROVENANCE_FILE));
        let provenance: serde_json::Value = serde_json::from_str(&provenance.expect("a file")).expect("JSON");
        assert_eq!(provenance["change"]["kind"], "noise");
        assert_eq!(provenance["files"].as_array().map(Vec::len), Some(3));
        assert!(plain.late.is_none() && plain.domains.len() == 2);
        // A text that was edited meanwhile is not taken for the case's.
        std::fs::write(work.join("cases/plain/text/000-web.jsonl"), "{\"text\":\"x\"}\n").expect("written");
        let refused = make(0).expect_err("refused");
        assert!(refused.message.contains("000-web.jsonl"), "{}", refused.message);
    }

    /// A late domain has a data set of its own, with the tokens and the held-out text that it has among the others.
    #[test]
    fn a_late_domain_has_a_data_set_of_its_own() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let base = super::super::tests::base(folder.path());
        let work = folder.path().join("work");
        let corpus = read_corpus(&base).expect("a corpus");
        let tokenizer = tokenizer(&base, &work).expect("a tokenizer");
        let plan = plan();
        let make = |case: usize| make(&plan, &plan.cases[case], &corpus, &base, &tokenizer, &work).expect("a case");
        let (plain, late) = (make(0), make(2));
        assert_eq!(late, make(2));
        let names: Vec<&str> = late.domains.iter().map(|domain| domain.name.as_str()).collect();
        assert_eq!(names, ["zh"]);
        let coming = late.late.as_ref().expect("a late domain");
        assert_eq!((coming.name.as_str(), coming.from_step), ("web", 20));
        assert_ne!(coming.data, late.data);
        // What is known of each is the same, but for when it comes.
        for (name, from_step) in [("zh", 0), ("web", 20)] {
            let of = |ready: &Ready| ready.facts.domains.iter().find(|facts| facts.name == name).cloned();
            let (before, now) = (of(&plain).expect("facts"), of(&late).expect("facts"));
            assert_eq!(now.from_step, from_step);
            let made = before.made.clone();
            assert_eq!(
                DomainFacts {
                    from_step: 0,
                    made,
                    ..now
                },
                before
            );
        }
        assert_eq!(late.facts.domains[1].name, "web", "it is the last of all");
    }
}
