//! The data of a case: the base config's corpus, changed as the plan says, without held-out text that overlaps with
//! training text, written as files of its own and made into a data set once for all of its runs.
//!
//! Everything is a function of the corpus' texts and the plan, and is made again at every start: what lies in the work
//! folder must then be the same bytes, or the bench is refused. The corpus is held in memory.

mod generate;
mod overlap;

pub use generate::generate;
pub use overlap::Overlapping;

use super::measure::{DomainFacts, Facts, LaterText};
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
const CORPUS_CONTEXT: &str = "tarazed bench mixture v1 corpus";

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
    /// Whether it is other text of the domain of its name, in the place of what that one has before.
    pub replaces: bool,
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
            replaces: false,
            documents,
        })
    };
    base.data.domains.iter().map(read).collect()
}

/// The corpus that a plan asks for.
///
/// # Errors
/// Refused where it is not made, or is another; else as [`read_corpus`].
pub fn corpus(plan: &Plan, base: &Config) -> Result<Vec<Domain>, Failure> {
    let Some(wanted) = &plan.corpus else {
        return read_corpus(base);
    };
    if let Some(domain) = base.data.domains.iter().find(|domain| !domain.path.exists()) {
        return Err(Failure::refused(
            domain.path.display(),
            "is not there: the corpus of this plan is made by a command, and does not ship",
            format!("make it: {}", wanted.make),
        ));
    }
    let corpus = read_corpus(base)?;
    let found = hash(&corpus);
    match &wanted.blake3 {
        Some(pinned) if *pinned != found => Err(Failure::refused(
            "corpus.blake3",
            format!("the corpus that is there has {found}, not {pinned}"),
            format!("make the one of the plan: {}", wanted.make),
        )),
        _ => Ok(corpus),
    }
}

/// BLAKE3 of a corpus: of its domains' names and texts, in order.
#[must_use]
pub fn hash(corpus: &[Domain]) -> String {
    let mut hasher = blake3::Hasher::new_derive_key(CORPUS_CONTEXT);
    for domain in corpus {
        hasher.update(&(domain.documents.len() as u64).to_le_bytes());
        for part in std::iter::once(domain.name.as_str()).chain(domain.texts()) {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
    }
    hasher.finalize().to_hex().to_string()
}

/// A case whose data is ready.
#[derive(Clone, PartialEq, Debug)]
pub struct Ready {
    /// Its domains, as configs of runs have them; weights are 1.
    pub domains: Vec<DomainConfig>,
    /// What comes while runs train: the last of its facts, or other text of one of its domains.
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

/// Text that comes while runs train.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Late {
    /// The name of its domain.
    pub name: String,
    /// The first step (from 0) that trains on it.
    pub from_step: u64,
    /// Whether runs have that domain before, with other text.
    pub replaces: bool,
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
    let measured = domains.iter().filter(|domain| !domain.replaces);
    let held_out_documents = measured.flat_map(Domain::texts).filter(is_held_out).count();
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
    let sets = [("data", 0..early), ("later", early..domains.len())];
    let (mut facts, mut versions) = (Vec::with_capacity(domains.len()), Vec::new());
    for (name, which) in sets.into_iter().filter(|(_, which)| !which.is_empty()) {
        let made = prepare(&domain_configs[which.clone()], base, tokenizer, &folder.join(name))?;
        for (domain, (manifest, scored)) in domains[which].iter().zip(made.domains) {
            take_in(&mut facts, domain, &manifest, scored);
        }
        versions.push(made.version);
    }
    let late = domains.get(early).map(|late| Late {
        name: late.name.clone(),
        from_step: late.from_step,
        replaces: late.replaces,
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

/// What a data set says of a domain of it, which is one of the case's or other text of one.
fn take_in(facts: &mut Vec<DomainFacts>, domain: &Domain, manifest: &DomainManifest, scored: ScoredText) {
    let train = &manifest.train;
    let same = facts
        .iter_mut()
        .find(|known| domain.replaces && known.name == domain.name);
    if let Some(known) = same {
        known.later = Some(LaterText {
            from_step: domain.from_step,
            made: domain.made.clone(),
            train_documents: train.documents,
            train_tokens: train.tokens,
            train_bytes: train.text_bytes,
        });
        return;
    }
    facts.push(DomainFacts {
        name: domain.name.clone(),
        judged: domain.judged,
        from_step: domain.from_step,
        made: domain.made.clone(),
        train_documents: train.documents,
        train_tokens: train.tokens,
        train_bytes: train.text_bytes,
        later: None,
        scored_tokens: scored.tokens,
        scored_bytes: scored.text_bytes,
    });
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
    use crate::mixture::plan::{Change, Corpus};

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

    /// A shift has the hard text in a data set of its own; what is measured is what is measured without it.
    #[test]
    fn a_shift_has_its_second_text_in_a_data_set_of_its_own() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let base = super::super::tests::base(folder.path());
        let work = folder.path().join("work");
        let corpus = read_corpus(&base).expect("a corpus");
        let tokenizer = tokenizer(&base, &work).expect("a tokenizer");
        let plan = plan();
        let shift = Case {
            name: "shift".to_owned(),
            change: Change::Shift {
                of: "web".to_owned(),
                from_step: 20,
            },
            ..plan.cases[0].clone()
        };
        let make = |case: &Case| make(&plan, case, &corpus, &base, &tokenizer, &work).expect("a case");
        let (plain, shifted) = (make(&plan.cases[0]), make(&shift));
        assert_eq!(shifted, make(&shift));
        let coming = shifted.late.as_ref().expect("another text");
        assert_eq!(
            (coming.name.as_str(), coming.from_step, coming.replaces),
            ("web", 20, true)
        );
        assert_eq!(shifted.domains.len(), 2);
        assert_eq!(shifted.held_out_documents, plain.held_out_documents);
        assert_eq!(shifted.dropped, plain.dropped);
        let [before, now] = [&plain, &shifted].map(|ready| &ready.facts.domains);
        assert_eq!((now.len(), &now[1]), (2, &before[1]));
        let later = now[0].later.as_ref().expect("another text");
        assert_eq!(later.from_step, 20);
        assert!(later.train_tokens > 0 && now[0].train_tokens > 0);
        // Both halves are all there is; how large it is, no arm sees.
        let documents = now[0].train_documents + later.train_documents;
        assert_eq!(documents, before[0].train_documents);
        let size = |facts: &DomainFacts| (facts.tokens(), facts.bytes());
        assert_eq!(size(&now[0]), size(&before[0]));
        assert_eq!(now[0].scored_tokens, before[0].scored_tokens);
        assert_eq!(now[0].scored_bytes.to_bits(), before[0].scored_bytes.to_bits());
        assert_eq!(shifted.facts.data_version.split(' ').count(), 2);
    }

    /// A plan whose corpus does not ship says how it is made, and takes no other.
    #[test]
    fn a_corpus_that_is_not_made_or_is_another_is_refused() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let base = super::super::tests::base(folder.path());
        let asking = |blake3: Option<String>| Plan {
            corpus: Some(Corpus {
                make: "python3 make.py".to_owned(),
                blake3,
            }),
            ..plan()
        };
        let whole = corpus(&asking(None), &base).expect("a corpus");
        assert_eq!(whole, corpus(&plan(), &base).expect("the same"));
        let pin = hash(&whole);
        assert_eq!(corpus(&asking(Some(pin.clone())), &base).expect("the same"), whole);
        let mut other = whole.clone();
        other[0].documents.swap(0, 1);
        assert_ne!(hash(&other), pin);
        let refused = corpus(&asking(Some(hash(&other))), &base).expect_err("another");
        for part in [pin.as_str(), "make the one of the plan: python3 make.py"] {
            assert!(refused.message.contains(part), "{}", refused.message);
        }
        std::fs::remove_file(folder.path().join("zh.jsonl")).expect("removed");
        let refused = corpus(&asking(None), &base).expect_err("not there");
        for part in ["zh.jsonl: is not there", "make it: python3 make.py"] {
            assert!(refused.message.contains(part), "{}", refused.message);
        }
    }
}
