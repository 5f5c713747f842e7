//! The corpus that ships with the project, prepared as the quickstart does it.

// A test fails by panicking.
#![allow(clippy::unwrap_used)]

use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tarazed_corpus::{DroppedRecord, PrepareRequest, Split, TokenStore, prepare, refine_text};
use tarazed_domain::DomainIndex;
use tarazed_domain::config::{DomainConfig, Language, RefineConfig, SourceFormat, TokenizerConfig};

const VOCABULARY: usize = 4096;
const CONTEXT: usize = 256;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/corpus")
}

fn provenance() -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(corpus().join("PROVENANCE.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn domains() -> Vec<DomainConfig> {
    provenance()
        .iter()
        .map(|entry| {
            let file = entry["file"].as_str().unwrap();
            DomainConfig {
                name: file.trim_end_matches(".jsonl").to_owned(),
                path: corpus().join(file),
                format: SourceFormat::Auto,
                language: serde_json::from_value::<Language>(entry["language"].clone()).unwrap(),
                weight: 1.0,
                text_field: "text".to_owned(),
            }
        })
        .collect()
}

fn texts(path: &Path) -> Vec<String> {
    let file = std::fs::read_to_string(path).unwrap();
    let text = |line: &str| {
        serde_json::from_str::<serde_json::Value>(line).unwrap()["text"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    file.lines().map(text).collect()
}

/// Every domain fills sequences in both splits, both languages are there, and two preparations agree bit for bit (DET-1:
/// the tokenizer's training too, on real text and on all threads).
#[test]
fn it_fills_sequences_in_every_domain_and_is_reproducible() {
    let domains = domains();
    assert!(domains.len() >= 6);
    let tokenizer = TokenizerConfig {
        path: None,
        vocabulary: VOCABULARY,
        train_bytes_max: 64 << 20,
    };
    let request = PrepareRequest {
        domains: &domains,
        tokenizer: &tokenizer,
        model_vocabulary: VOCABULARY,
        held_out_fraction: 0.03,
        context: CONTEXT,
    };
    let out = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let prepared = prepare(&request, out.path(), &mut |event| {
        println!("{:6.2} s  {event}", started.elapsed().as_secs_f64())
    });
    let prepared = prepared.unwrap();
    let manifest = &prepared.manifest;
    assert_eq!(manifest.tokenizer.vocabulary, VOCABULARY);
    let started = Instant::now();
    let again = prepare(&request, out.path(), &mut |event| println!("{event}")).unwrap();
    println!("reused in {:.1} ms", started.elapsed().as_secs_f64() * 1e3);
    assert_eq!(again, prepared);
    let started = Instant::now();
    let store = TokenStore::open(&prepared.folder, CONTEXT).unwrap();
    println!("opened and checked in {:.1} ms", started.elapsed().as_secs_f64() * 1e3);

    let mut languages = HashSet::new();
    for (index, domain) in manifest.domains.iter().enumerate() {
        let index = DomainIndex(index as u16);
        languages.insert(domain.language);
        println!(
            "{:14} {:4} documents {:5}+{:3}, tokens {:7}+{:6}, bytes a token {:.2}, unigram entropy {:.3} (own {:.3})",
            domain.name,
            domain.language.name(),
            domain.train.documents,
            domain.held_out.documents,
            domain.train.tokens,
            domain.held_out.tokens,
            domain.held_out.text_bytes as f64 / domain.held_out.tokens as f64,
            domain.unigram_entropy_nats.unwrap(),
            domain.unigram_entropy_own_nats.unwrap(),
        );
        assert!(store.sequences(index, Split::Train) >= 200, "{}", domain.name);
        assert!(store.sequences(index, Split::HeldOut) >= 4, "{}", domain.name);
        assert!(
            domain.dropped.is_empty(),
            "{}: the script leaves nothing to drop",
            domain.name
        );
    }
    for language in &manifest.languages {
        println!("{:?}", language);
    }
    assert!(languages.contains(&Language::En) && languages.contains(&Language::Zh));

    let elsewhere = tempfile::tempdir().unwrap();
    let second = prepare(&request, elsewhere.path(), &mut |_| ()).unwrap();
    assert_eq!(second.manifest, prepared.manifest);
    assert_eq!(
        std::fs::read(&second.tokenizer_path).unwrap(),
        std::fs::read(&prepared.tokenizer_path).unwrap()
    );
}

/// What the rules make of some domains, as rows of a table: documents, those kept, and what the others broke.
fn refined(domains: &[DomainConfig], config: &RefineConfig, note: &str) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("text");
    let counts = refine_text(domains, config, &out, &mut |_| ()).unwrap();
    let rows = domains.iter().zip(counts).enumerate();
    let rows = rows.map(|(index, (domain, (documents, kept)))| {
        let dropped = std::fs::read_to_string(out.join(format!("{index:03}-{}.dropped.jsonl", domain.name))).unwrap();
        let mut reasons: BTreeMap<&str, u64> = BTreeMap::new();
        for line in dropped.lines() {
            let record: DroppedRecord = serde_json::from_str(line).unwrap();
            *reasons.entry(record.dropped.name()).or_default() += 1;
        }
        assert_eq!(reasons.values().sum::<u64>(), documents - kept, "{}", domain.name);
        let mut reasons: Vec<_> = reasons.into_iter().collect();
        reasons.sort_by_key(|(name, count)| (std::cmp::Reverse(*count), *name));
        let reasons: Vec<String> = reasons
            .iter()
            .map(|(name, count)| format!("`{name}` {count}"))
            .collect();
        format!(
            "| `{}`{note} | {documents} | {kept} | {} |",
            domain.name,
            reasons.join(", ")
        )
    });
    rows.collect()
}

/// What the default rules make of the corpus that ships is what docs/DATA.md says of it, domain by domain.
#[test]
fn what_the_default_rules_leave_of_it_is_documented() {
    let page = include_str!("../../../docs/DATA.md");
    let mut config = RefineConfig::default();
    let mut rows = refined(&domains(), &config, "");
    config.quality.exempt = ["classic-zh", "knowledge-en"].map(str::to_owned).to_vec();
    let mut exempt = domains();
    exempt.retain(|domain| config.quality.exempt.contains(&domain.name));
    rows.extend(refined(&exempt, &config, ", exempt"));
    let missing = rows.iter().filter(|row| !page.contains(row.as_str())).count();
    assert_eq!(missing, 0, "docs/DATA.md has other rows than:\n{}", rows.join("\n"));
}

/// What PROVENANCE.json says of a file is true of the file that ships, byte for byte.
#[test]
fn each_file_is_the_one_that_its_provenance_describes() {
    for entry in provenance() {
        let name = entry["file"].as_str().unwrap();
        let path = corpus().join(name);
        let sha256 = hex(&Sha256::digest(std::fs::read(&path).unwrap()));
        assert_eq!(entry["sha256"].as_str(), Some(sha256.as_str()), "{name}");
        let texts = texts(&path);
        assert_eq!(entry["documents"].as_u64(), Some(texts.len() as u64), "{name}");
        let bytes: usize = texts.iter().map(String::len).sum();
        assert_eq!(entry["text_bytes"].as_u64(), Some(bytes as u64), "{name}");
    }
    let mut shipped: Vec<String> = std::fs::read_dir(corpus())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".jsonl"))
        .collect();
    let mut described: Vec<String> = provenance()
        .iter()
        .map(|entry| entry["file"].as_str().unwrap().to_owned())
        .collect();
    shipped.sort();
    described.sort();
    assert_eq!(shipped, described);
}

/// Nobody is given a text without its licence: every package a file was made from is named with licence and copyright, each
/// licence's text is there, and README.md's table has package and version.
#[test]
fn every_package_names_its_licence_and_the_texts_are_there() {
    let readme = std::fs::read_to_string(corpus().join("README.md")).unwrap();
    for entry in provenance() {
        let name = entry["file"].as_str().unwrap();
        let named: HashSet<&str> = entry["packages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|package| package["package"].as_str().unwrap())
            .collect();
        for line in std::fs::read_to_string(corpus().join(name)).unwrap().lines() {
            let document: serde_json::Value = serde_json::from_str(line).unwrap();
            let package = document["source"].as_str().unwrap().split(':').next().unwrap();
            assert!(named.contains(package), "{name}: {package} is not named");
        }
        for package in entry["packages"].as_array().unwrap() {
            let text = |key: &str| package[key].as_str().filter(|text| !text.is_empty()).unwrap();
            let (package, version) = (text("package"), text("version"));
            assert!(!text("copyright").is_empty());
            assert_eq!(text("sha256").len(), 64, "{package}");
            assert!(
                readme.contains(&format!("{package} {version}")),
                "README.md: {package} {version}"
            );
            for id in text("licence")
                .split([' ', '(', ')'])
                .filter(|id| !matches!(*id, "" | "AND" | "OR"))
            {
                let file = id.trim_end_matches("-or-later").trim_end_matches("-only");
                let path = corpus().join("licences").join(format!("{file}.txt"));
                assert!(path.is_file(), "{package}: {id} has no {}", path.display());
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Held-out text is not training text in other words: of the 24-character pieces of a document, only few stand in any other
/// document of the corpus, whatever its domain.
#[test]
fn no_document_is_a_near_copy_of_another() {
    let mut seen: HashSet<u64> = HashSet::new();
    let mut all = 0_usize;
    let mut repeated = 0_usize;
    for domain in domains() {
        for text in texts(&domain.path) {
            let bare: Vec<char> = text.chars().filter(|c| !c.is_whitespace()).collect();
            let pieces: HashSet<u64> = bare
                .windows(24)
                .map(|piece| {
                    let text: String = piece.iter().collect();
                    let hash = blake3::hash(text.as_bytes());
                    u64::from_le_bytes(hash.as_bytes()[..8].try_into().unwrap())
                })
                .filter(|hash| hash % 8 == 0)
                .collect();
            let again = pieces.iter().filter(|piece| seen.contains(piece)).count();
            assert!(
                pieces.len() < 20 || again * 10 < pieces.len() * 6,
                "{}: {}",
                domain.name,
                &text[..text.len().min(200)]
            );
            all += pieces.len();
            repeated += again;
            seen.extend(pieces);
        }
    }
    println!(
        "{:.1}% of the corpus's 24-character pieces occur in an earlier document",
        repeated as f64 / all as f64 * 100.0
    );
    assert!(repeated * 10 < all, "{repeated} of {all}");
}
