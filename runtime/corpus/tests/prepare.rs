//! Preparing and reading back, through the public API alone.

// A test fails by panicking.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use tarazed_corpus::{
    CorpusError, DataManifest, MANIFEST_FILE, PrepareEvent, PrepareRequest, Prepared, Split, TokenStore, Tokenizer,
    prepare, prepare_again,
};
use tarazed_domain::DomainIndex;
use tarazed_domain::config::{DomainConfig, Language, SourceFormat, TokenizerConfig};

const CONTEXT: usize = 32;

fn domain(name: &str, path: &Path, language: Language) -> DomainConfig {
    DomainConfig {
        name: name.to_owned(),
        path: path.to_owned(),
        format: SourceFormat::Auto,
        language,
        weight: 1.0,
        text_field: "text".to_owned(),
    }
}

fn english(i: usize) -> String {
    format!(
        "Step {i} was committed because rank {} passed its barrier, and {} others held its gradients.",
        i % 7,
        i * 3
    )
}

fn chinese(i: usize) -> String {
    format!(
        "第{i}步已经提交,因为第{}号进程通过了屏障。</s> 🦅\t其余{}个进程保存了梯度。",
        i % 5,
        i + 2
    )
}

/// Two domains: JSON lines (with an empty text and a repeated one) and a folder of texts.
struct Fixture {
    folder: tempfile::TempDir,
    domains: Vec<DomainConfig>,
    tokenizer: TokenizerConfig,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut lines: String = (0..300)
            .map(|i| serde_json::json!({"id": i, "text": english(i)}).to_string() + "\n")
            .collect();
        lines.push_str("{\"text\":\" \\n\"}\n");
        lines.push_str(&serde_json::json!({ "text": english(5) }).to_string());
        std::fs::write(folder.path().join("web.jsonl"), lines).unwrap();
        let books = folder.path().join("books/part");
        std::fs::create_dir_all(&books).unwrap();
        for i in 0..200 {
            std::fs::write(books.join(format!("{i:03}.txt")), chinese(i)).unwrap();
        }
        let domains = vec![
            domain("web / en", &folder.path().join("web.jsonl"), Language::En),
            domain("book-zh", &folder.path().join("books"), Language::Zh),
        ];
        let tokenizer = TokenizerConfig {
            path: None,
            vocabulary: 400,
            train_bytes_max: 1 << 20,
        };
        Self {
            folder,
            domains,
            tokenizer,
        }
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn request(&self) -> PrepareRequest<'_> {
        PrepareRequest {
            domains: &self.domains,
            tokenizer: &self.tokenizer,
            model_vocabulary: 512,
            held_out_fraction: 0.1,
            context: CONTEXT,
        }
    }

    fn prepare(&self) -> Result<(Prepared, Vec<PrepareEvent>), CorpusError> {
        let mut events = Vec::new();
        prepare(&self.request(), &self.out(), &mut |event| {
            assert!(!event.to_string().is_empty());
            events.push(event);
        })
        .map(|prepared| (prepared, events))
    }
}

/// All tokens that a split's sequences cover, checking on the way that neighbours share one token.
fn covered(store: &TokenStore, domain: DomainIndex, split: Split, context: usize) -> Vec<u32> {
    let mut stream: Vec<u32> = Vec::new();
    let mut sequence = vec![0; context + 1];
    for index in 0..store.sequences(domain, split) {
        store.fill(domain, split, index, &mut sequence).unwrap();
        if let Some(last) = stream.last() {
            assert_eq!(*last, sequence[0], "the last target is the next input");
            stream.pop();
        }
        stream.extend_from_slice(&sequence);
    }
    stream
}

fn documents_of(tokenizer: &Tokenizer, stream: &[u32]) -> Vec<String> {
    stream
        .split(|t| *t == tokenizer.end_of_document())
        .map(|d| tokenizer.decode(d).unwrap())
        .collect()
}

#[test]
fn the_splits_are_a_partition_of_the_distinct_texts() {
    let fixture = Fixture::new();
    let (prepared, _) = fixture.prepare().unwrap();
    let store = TokenStore::open(&prepared.folder, CONTEXT).unwrap();
    let tokenizer = store.tokenizer().unwrap();
    for (index, texts) in [
        (0, (0..300).map(english).collect::<BTreeSet<_>>()),
        (1, (0..200).map(chinese).collect()),
    ] {
        let mut found = BTreeSet::new();
        let mut complete = 0;
        for split in Split::ALL {
            let figures = prepared.manifest.domains[index].split(split);
            // With one input a sequence, sequences cover every token.
            let one = TokenStore::open(&prepared.folder, 1).unwrap();
            let stream = covered(&one, DomainIndex(index as u16), split, 1);
            assert_eq!(stream.len() as u64, figures.tokens);
            assert!(
                stream
                    .iter()
                    .all(|t| (*t as usize) < prepared.manifest.tokenizer.vocabulary)
            );
            let mut documents = documents_of(&tokenizer, &stream);
            assert_eq!(
                documents.pop().as_deref(),
                Some(""),
                "the stream ends with an end-of-document token"
            );
            assert_eq!(documents.len() as u64, figures.documents);
            assert_eq!(
                documents.iter().map(|d| d.len() as u64).sum::<u64>(),
                figures.text_bytes
            );
            complete += documents.len();
            found.extend(documents);
        }
        assert_eq!(found, texts);
        assert_eq!(complete, texts.len(), "no text twice, none in both splits");
        let held_out = prepared.manifest.domains[index].held_out.documents;
        assert!((5..60).contains(&held_out), "{held_out}");
    }
    let dropped: Vec<u64> = prepared.manifest.domains[0].dropped.values().copied().collect();
    assert_eq!(dropped, [1, 1], "one empty, one duplicate");
}

#[test]
fn sequences_tile_the_stream_at_any_context() {
    let fixture = Fixture::new();
    let (prepared, _) = fixture.prepare().unwrap();
    let whole = covered(
        &TokenStore::open(&prepared.folder, 1).unwrap(),
        DomainIndex(1),
        Split::Train,
        1,
    );
    for context in [2, 7, 32, 100, 255] {
        let store = TokenStore::open(&prepared.folder, context).unwrap();
        let stream = covered(&store, DomainIndex(1), Split::Train, context);
        assert_eq!(stream, whole[..stream.len()]);
        assert!(
            whole.len() - stream.len() <= context,
            "only the rest past the last whole sequence is unused"
        );
    }
}

/// DET-1: same sources, same bytes in every file, wherever the folders lie and however many threads there are.
#[test]
fn data_sets_are_reproducible_bit_for_bit() {
    let (a, b) = (Fixture::new(), Fixture::new());
    let (first, events) = a.prepare().unwrap();
    assert!(matches!(events.last(), Some(PrepareEvent::Finished { .. })));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(7).build().unwrap();
    let (second, _) = pool.install(|| b.prepare()).unwrap();
    assert_eq!(first.manifest, second.manifest);
    let names = |folder: &Path| {
        let mut names: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(&first.folder), names(&second.folder));
    for name in names(&first.folder) {
        let read = |folder: &Path| std::fs::read(folder.join(&name)).unwrap();
        assert!(read(&first.folder) == read(&second.folder), "{name:?} differs");
    }
}

#[test]
fn a_finished_data_set_is_reused_and_a_changed_source_makes_another() {
    let mut fixture = Fixture::new();
    let (first, _) = fixture.prepare().unwrap();
    let (again, events) = fixture.prepare().unwrap();
    assert_eq!(first, again);
    assert!(matches!(events.last(), Some(PrepareEvent::Reused { .. })));
    // Weights do not touch tokens.
    fixture.domains[0].weight = 7.0;
    assert_eq!(fixture.prepare().unwrap().0, first);
    let text = fixture.folder.path().join("books/part/000.txt");
    std::fs::write(&text, chinese(0).replace('步', "部")).unwrap();
    let (changed, events) = fixture.prepare().unwrap();
    assert!(matches!(events.last(), Some(PrepareEvent::Finished { .. })));
    assert_ne!(changed.manifest.version, first.manifest.version);
    assert_ne!(changed.folder, first.folder);
    // The old one is still there for whoever reads it.
    TokenStore::open(&first.folder, CONTEXT).unwrap();
    std::fs::write(&text, chinese(0)).unwrap();
    assert_eq!(fixture.prepare().unwrap().0, first);
}

/// Runs that began before text could be refined find their data under the same name and version: made by an earlier program from
/// the same texts.
#[test]
fn data_sets_that_are_not_refined_are_those_of_earlier_programs() {
    let folder = tempfile::tempdir().unwrap();
    let word = |i: usize| ["lane", "step", "rank", "trace", "shard"][i % 5];
    let lines: String = (0..400)
        .map(|i| {
            format!(
                "{{\"text\":\"The {} of {} {i} and {}.\"}}\n",
                word(i),
                word(i / 5),
                word(i / 25)
            )
        })
        .collect();
    let path = folder.path().join("web.jsonl");
    std::fs::write(&path, lines).unwrap();
    let domains = [domain("web", &path, Language::En)];
    let tokenizer = TokenizerConfig::default();
    let request = PrepareRequest {
        domains: &domains,
        tokenizer: &tokenizer,
        model_vocabulary: 300,
        held_out_fraction: 0.1,
        context: 16,
    };
    let prepared = prepare(&request, &folder.path().join("data"), &mut |_| {}).unwrap();
    assert!(prepared.manifest.recipe.starts_with("c7e4b0285b4f828dcbc6fee2f8c839cb"));
    assert!(
        prepared
            .manifest
            .version
            .starts_with("c621f2b2b43bb293ffec156d68f4b684")
    );
}

/// A run does not go on with other data than it began with; what was deleted is made anew.
#[test]
fn a_run_that_goes_on_gets_its_own_data_set_or_none() {
    let mut fixture = Fixture::new();
    let again = |fixture: &Fixture| prepare_again(&fixture.request(), &fixture.out(), &mut |_| {});
    let first = again(&fixture).unwrap();
    fixture.domains[0].weight = 0.5;
    assert_eq!(again(&fixture).unwrap(), first, "a weight is no matter of the data");
    let refused = |fixture: &Fixture| {
        let before = std::fs::read_dir(fixture.out()).unwrap().count();
        let error = again(fixture).unwrap_err();
        assert!(matches!(error, CorpusError::OtherData { .. }), "{error}");
        assert!(error.to_string().contains("holds other data"), "{error}");
        assert_eq!(std::fs::read_dir(fixture.out()).unwrap().count(), before, "written");
    };
    fixture.domains[1].language = Language::En;
    refused(&fixture);
    fixture.domains[1].language = Language::Zh;
    let text = fixture.folder.path().join("books/more.txt");
    std::fs::write(&text, english(1)).unwrap();
    refused(&fixture);
    std::fs::remove_file(text).unwrap();
    std::fs::remove_dir_all(&first.folder).unwrap();
    std::fs::create_dir(fixture.out().join(format!("{}.partial", "0".repeat(16)))).unwrap();
    assert_eq!(again(&fixture).unwrap(), first, "nothing whole was there");
}

/// DATA-3: from any token back to the line of the file it came from.
#[test]
fn every_token_traces_back_to_its_document() {
    let fixture = Fixture::new();
    let (prepared, _) = fixture.prepare().unwrap();
    let store = TokenStore::open(&prepared.folder, 1).unwrap();
    let stream = covered(&store, DomainIndex(0), Split::HeldOut, 1);
    let tokenizer = store.tokenizer().unwrap();
    let source = std::fs::read_to_string(fixture.folder.path().join("web.jsonl")).unwrap();
    for position in (0..stream.len()).step_by(17) {
        let record = store
            .document_at(DomainIndex(0), Split::HeldOut, position as u64)
            .unwrap()
            .unwrap();
        let line = source.lines().nth(record.record as usize - 1).unwrap();
        let object: serde_json::Value = serde_json::from_str(line).unwrap();
        let kept = record.kept.unwrap();
        let tokens = &stream[kept.start as usize..(kept.start + kept.tokens) as usize - 1];
        assert_eq!(object["text"].as_str().unwrap(), tokenizer.decode(tokens).unwrap());
    }
    assert_eq!(
        store
            .document_at(DomainIndex(0), Split::HeldOut, stream.len() as u64)
            .unwrap(),
        None
    );
}

#[test]
fn entropies_are_those_of_the_tokens() {
    let fixture = Fixture::new();
    let (prepared, _) = fixture.prepare().unwrap();
    let store = TokenStore::open(&prepared.folder, 1).unwrap();
    let vocabulary = prepared.manifest.tokenizer.vocabulary;
    for (index, domain) in prepared.manifest.domains.iter().enumerate() {
        let mut counts = vec![1.0_f64; vocabulary];
        let train = covered(&store, DomainIndex(index as u16), Split::Train, 1);
        train.iter().for_each(|t| counts[*t as usize] += 1.0);
        let total: f64 = counts.iter().sum();
        let held_out = covered(&store, DomainIndex(index as u16), Split::HeldOut, 1);
        let nats: f64 = held_out
            .iter()
            .map(|t| -(counts[*t as usize] / total).ln())
            .sum::<f64>()
            / held_out.len() as f64;
        // Each domain is alone in its language here.
        assert!((domain.unigram_entropy_nats.unwrap() - nats).abs() < 1e-9);
        assert!((domain.unigram_entropy_own_nats.unwrap() - nats).abs() < 1e-9);
        assert!((prepared.manifest.languages[index].unigram_entropy_nats.unwrap() - nats).abs() < 1e-9);
    }
}

/// What one refused request leaves behind: nothing.
fn refused(fixture: &Fixture, messages: &[&str]) {
    let error = fixture
        .prepare()
        .map(|(prepared, _)| prepared.folder)
        .unwrap_err()
        .to_string();
    for message in messages {
        assert!(error.contains(message), "'{message}' is not in: {error}");
    }
    assert!(!fixture.out().exists(), "{error}");
}

#[test]
fn bad_input_is_refused_with_place_and_remedy_and_nothing_stays() {
    let mut fixture = Fixture::new();
    let web = fixture.folder.path().join("web.jsonl");
    let good = std::fs::read(&web).unwrap();

    std::fs::write(&web, [&good[..], b"\n{\"body\":\"x\"}\n"].concat()).unwrap();
    refused(
        &fixture,
        &["web.jsonl:303: has no field 'text'", "data.domains.text_field"],
    );
    std::fs::write(&web, [&good[..], b"\n{\"text\": \xc3\x28\n"].concat()).unwrap();
    refused(&fixture, &["web.jsonl: invalid UTF-8 at byte", "(line 303)", "iconv"]);
    std::fs::write(&web, "{\"text\":\"\"}\n\n").unwrap();
    refused(
        &fixture,
        &[
            "domain 'web / en' holds no document (1 files, 1 empty records)",
            "web.jsonl",
        ],
    );
    std::fs::write(&web, "{\"text\":\"hello\"}\n").unwrap();
    refused(
        &fixture,
        &[
            "domain 'web / en': its training split has",
            "needs 33 (model.context + 1)",
            "lower model.context",
        ],
    );
    std::fs::write(&web, serde_json::json!({ "text": english(0).repeat(100) }).to_string()).unwrap();
    refused(
        &fixture,
        &[
            "its held-out split has 0 tokens in 0 documents",
            "data.held_out_fraction",
        ],
    );
    std::fs::remove_file(&web).unwrap();
    refused(
        &fixture,
        &["web.jsonl: no such file or folder (domain 'web / en'); correct data.domains.path"],
    );
    std::fs::write(&web, &good).unwrap();

    fixture.tokenizer.vocabulary = 600;
    refused(
        &fixture,
        &["600 entries and the model 512 rows", "raise model.vocabulary"],
    );
    fixture.tokenizer.vocabulary = 264;
    refused(&fixture, &["at least 265"]);
    let json = fixture.folder.path().join("tokenizer.json");
    fixture.tokenizer.path = Some(json.clone());
    refused(&fixture, &["tokenizer.json: cannot be read"]);
    std::fs::write(&json, "{\"version\":\"1.0\"").unwrap();
    refused(
        &fixture,
        &[
            "tokenizer.json: cannot be read as a tokenizer",
            "leave data.tokenizer.path out",
        ],
    );
    let texts: Vec<String> = (0..100).map(english).collect();
    let large: Vec<String> = ('一'..'倀').map(|c| format!("{c}{c}")).collect();
    std::fs::write(&json, Tokenizer::train_bpe(&large, 700).unwrap().1).unwrap();
    refused(
        &fixture,
        &["tokenizer.json: the tokenizer has", "raise model.vocabulary"],
    );
    std::fs::write(&json, Tokenizer::train_bpe(&texts, 300).unwrap().1).unwrap();
    let (prepared, _) = fixture.prepare().unwrap();
    assert_eq!(prepared.manifest.tokenizer.vocabulary, 300);
    assert_eq!(
        std::fs::read(&prepared.tokenizer_path).unwrap(),
        std::fs::read(&json).unwrap()
    );
}

#[test]
fn a_context_that_does_not_fit_is_refused_on_reuse_too() {
    let fixture = Fixture::new();
    let (prepared, _) = fixture.prepare().unwrap();
    let request = PrepareRequest {
        context: 1 << 20,
        ..fixture.request()
    };
    assert!(matches!(
        prepare(&request, &fixture.out(), &mut |_| ()),
        Err(CorpusError::TooShort { .. })
    ));
    assert!(matches!(
        TokenStore::open(&prepared.folder, 1 << 20),
        Err(CorpusError::TooShort { .. })
    ));
    let request = PrepareRequest {
        model_vocabulary: 399,
        ..fixture.request()
    };
    assert!(matches!(
        prepare(&request, &fixture.out(), &mut |_| ()),
        Err(CorpusError::VocabularyTooLarge { .. })
    ));
}

#[test]
fn nothing_held_out_is_allowed() {
    let fixture = Fixture::new();
    let request = PrepareRequest {
        held_out_fraction: 0.0,
        ..fixture.request()
    };
    let prepared = prepare(&request, &fixture.out(), &mut |_| ()).unwrap();
    let store = TokenStore::open(&prepared.folder, CONTEXT).unwrap();
    assert_eq!(store.sequences(DomainIndex(0), Split::HeldOut), 0);
    assert_eq!(prepared.manifest.languages[0].unigram_entropy_nats, None);
}

#[test]
fn what_a_dead_process_left_is_removed_and_a_second_process_waits() {
    let fixture = Fixture::new();
    std::fs::create_dir_all(fixture.out().join("0123456789abcdef.partial")).unwrap();
    std::fs::write(fixture.out().join("0123456789abcdef.partial/data.json"), "{}").unwrap();
    std::fs::create_dir_all(fixture.out().join("mine.partial")).unwrap();
    let lock = std::fs::File::open(fixture.out()).unwrap();
    lock.lock().unwrap();
    let (waiting, arrived) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let fixture = &fixture;
        let both: Vec<_> = (0..2)
            .map(|_| {
                let waiting = waiting.clone();
                scope.spawn(move || {
                    let mut events = Vec::new();
                    prepare(&fixture.request(), &fixture.out(), &mut |event| {
                        if matches!(event, PrepareEvent::Waiting { .. }) {
                            waiting.send(()).unwrap();
                        }
                        events.push(event);
                    })
                    .map(|prepared| (prepared, events))
                })
            })
            .collect();
        arrived.recv().unwrap();
        arrived.recv().unwrap();
        assert_eq!(
            std::fs::read_dir(fixture.out()).unwrap().count(),
            2,
            "nothing is done without the lock"
        );
        drop(lock);
        let results: Vec<_> = both.into_iter().map(|t| t.join().unwrap().unwrap()).collect();
        assert_eq!(results[0].0, results[1].0);
        let made = |events: &[PrepareEvent]| events.iter().any(|e| matches!(e, PrepareEvent::Finished { .. }));
        assert!(
            made(&results[0].1) != made(&results[1].1),
            "one made it, the other reused it"
        );
    });
    assert!(!fixture.out().join("0123456789abcdef.partial").exists());
    assert!(
        fixture.out().join("mine.partial").exists(),
        "a folder of somebody else stays"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
    /// One flipped bit in any file of a data set that is read for training is refused, and the message says what to delete.
    #[test]
    fn any_flipped_bit_of_a_data_set_is_refused(which in any::<prop::sample::Index>(), place in 0.0..1.0_f64, bit in 0..8_u32) {
        static READY: std::sync::OnceLock<(Fixture, Prepared)> = std::sync::OnceLock::new();
        let (_, prepared) = READY.get_or_init(|| {
            let fixture = Fixture::new();
            let prepared = fixture.prepare().unwrap().0;
            (fixture, prepared)
        });
        let copy = tempfile::tempdir().unwrap();
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&prepared.folder).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
            names.push(entry.file_name());
        }
        names.sort();
        let name = which.get(&names);
        let path = copy.path().join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = (place * bytes.len() as f64) as usize;
        bytes[at] ^= 1_u8 << bit;
        std::fs::write(&path, &bytes).unwrap();
        let everything = || -> Result<(), CorpusError> {
            let store = TokenStore::open(copy.path(), CONTEXT)?;
            store.tokenizer()?;
            for domain in 0..2 {
                store.document_at(DomainIndex(domain), Split::Train, 0)?;
            }
            Ok(())
        };
        match everything() {
            Err(error @ CorpusError::CorruptCache { .. }) => {
                let message = error.to_string();
                prop_assert!(message.contains("delete the folder") && message.contains(name.to_str().unwrap()), "{}", message);
            }
            // White space and a number's spelling in data.json are not its content: then nothing has changed.
            other => {
                prop_assert!(other.is_ok() && name == MANIFEST_FILE, "{:?} of {:?}: {:?}", at, name, other);
                prop_assert_eq!(DataManifest::load(copy.path()).unwrap(), prepared.manifest.clone());
            }
        }
    }
}
