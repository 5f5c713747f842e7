//! Refining, through the public API alone: what is kept and left out, that memory, threads and kills change nothing, and that
//! every token has its lineage.

// A test fails by panicking.
#![allow(clippy::unwrap_used)]

mod fixture;

use fixture::{Fixture, chinese, domain, english, files, records};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use tarazed_corpus::{
    CorpusError, DocumentRecord, Dropped, PrepareEvent, PrepareRequest, Split, TokenStore, adopt, find_data_set,
    prepare, prepare_refined, refine_text,
};
use tarazed_domain::DomainIndex;
use tarazed_domain::config::{DomainConfig, DuplicateScope, Language, SourceFormat};

/// A domain's version is a function of what its text is made from, whatever stands beside it.
#[test]
fn data_sets_that_share_a_domain_show_the_same_version_for_it() {
    let mut fixture = Fixture::new();
    let versions = |fixture: &Fixture, held_out_fraction: f64| -> Vec<String> {
        let out = tempfile::tempdir().unwrap();
        let request = PrepareRequest {
            held_out_fraction,
            ..fixture.request()
        };
        let prepared = prepare_refined(&request, Some(&fixture.refine), false, out.path(), &mut |_| ()).unwrap();
        let domains = prepared.manifest.domains.iter();
        domains.map(|domain| domain.version.clone().unwrap()).collect()
    };
    let first = versions(&fixture, 0.1);
    assert_ne!(first[0], first[1]);
    assert_eq!(versions(&fixture, 0.2), first);
    // Who else is exempt decides nothing here.
    fixture.refine.quality.exempt.push("book".to_owned());
    let exempt = versions(&fixture, 0.1);
    assert_eq!(exempt[0], first[0]);
    assert_ne!(exempt[1], first[1]);
    fixture.refine.quality.exempt.clear();
    // Alone, under another name and in another place.
    let book = fixture.domains.remove(1);
    let moved = fixture.folder.path().join("moved");
    std::fs::rename(&book.path, &moved).unwrap();
    let web = std::mem::replace(&mut fixture.domains, vec![domain("buch", &moved, Language::Zh)]);
    assert_eq!(versions(&fixture, 0.1), first[1..]);
    // Other rules, other text, another reading of it.
    fixture.refine.quality.off.push("zh_bullets".to_owned());
    assert_ne!(versions(&fixture, 0.1), first[1..]);
    fixture.refine.quality.off.clear();
    std::fs::write(moved.join("c.txt"), chinese(71)).unwrap();
    assert_ne!(versions(&fixture, 0.1), first[1..]);
    fixture.domains = web;
    assert_eq!(versions(&fixture, 0.1), first[..1]);
}

/// DATA-3: every document is in the index with its fate, and no text left out is in the tokens.
#[test]
fn every_kind_of_bad_document_is_left_out_and_listed() {
    let fixture = Fixture::new();
    let prepared = fixture.prepare();
    let web = records(&prepared, 0);
    let fates: Vec<_> = web[60..].iter().map(|record| record.dropped).collect();
    assert_eq!(
        fates,
        [
            Some(Dropped::Duplicate),
            None,
            Some(Dropped::NearDuplicate),
            Some(Dropped::Contaminated),
            Some(Dropped::GopherWords),
            Some(Dropped::Language),
            None,
            Some(Dropped::Empty),
            Some(Dropped::InvalidUtf8),
            Some(Dropped::BadRecord),
            Some(Dropped::NoText),
            Some(Dropped::TooLarge),
            Some(Dropped::Contaminated),
        ]
    );
    assert!(web[..60].iter().all(|record| record.kept.is_some()), "{web:?}");
    let refined = |at: usize| web[at].refined.clone().unwrap();
    assert_eq!(refined(60).copy_of.unwrap().record, 4, "the fourth line is english(3)");
    assert_eq!(refined(62).copy_of.unwrap().record, 6);
    assert!(
        refined(63).detail.starts_with("gsm8k, line 1"),
        "{}",
        refined(63).detail
    );
    assert!(refined(66).original_blake3.is_some() && refined(0).original_blake3.is_none());
    let book = records(&prepared, 1);
    let fates: Vec<_> = book[50..].iter().map(|record| record.dropped).collect();
    assert_eq!(
        fates,
        [
            Some(Dropped::NearDuplicate),
            Some(Dropped::Language),
            Some(Dropped::Contaminated),
            Some(Dropped::Contaminated),
            None,
            Some(Dropped::InvalidUtf8)
        ]
    );
    for (record, item) in [
        (&web[72], "gsm8k, line 1"),
        (&book[52], "cmath, line 1"),
        (&book[53], "gsm8k, line 1"),
    ] {
        let detail = record.refined.clone().unwrap().detail;
        assert!(detail.starts_with(item), "{detail}");
    }
    // What the tokens say.
    let store = TokenStore::open(&prepared.folder, 1).unwrap();
    let tokenizer = store.tokenizer().unwrap();
    let mut all = String::new();
    for split in Split::ALL {
        let mut tokens = vec![0; prepared.manifest.domains[0].split(split).tokens as usize];
        store.tokens(DomainIndex(0), split, 0, &mut tokens).unwrap();
        all.push_str(&tokenizer.decode(&tokens).unwrap());
    }
    assert!(all.contains("it’s café time now") && !all.contains("NATALIA") && !all.contains("Too short"));
}

/// Each count in data.json, report.json and the index is the same, and the report shows samples.
#[test]
fn the_report_says_what_the_index_says() {
    let fixture = Fixture::new();
    let prepared = fixture.prepare();
    let files = files(&prepared.folder);
    let report: serde_json::Value = serde_json::from_slice(&files["report.json"]).unwrap();
    for (index, domain) in prepared.manifest.domains.iter().enumerate() {
        let mut counts: BTreeMap<Dropped, u64> = BTreeMap::new();
        let records = records(&prepared, index);
        records
            .iter()
            .filter_map(|record| record.dropped)
            .for_each(|rule| *counts.entry(rule).or_default() += 1);
        assert_eq!(domain.dropped, counts);
        let told = &report["domains"][index];
        assert_eq!(told["documents"].as_u64(), Some(records.len() as u64));
        assert_eq!(
            told["kept"].as_u64(),
            Some(records.iter().filter(|record| record.kept.is_some()).count() as u64)
        );
        for (rule, count) in counts {
            let reason = &told["left_out"][rule.name()];
            assert_eq!(reason["documents"].as_u64(), Some(count), "{rule:?}");
            assert_eq!(reason["samples"].as_array().unwrap().len() as u64, count.min(5));
        }
    }
    for (index, expected) in [("gsm8k", 1, 3), ("cmath", 1, 1)].into_iter().enumerate() {
        let set = &report["benchmarks"][index];
        let told = (
            set["name"].as_str().unwrap(),
            set["items_found"].as_u64().unwrap(),
            set["documents_left_out"].as_u64().unwrap(),
        );
        assert_eq!(told, expected);
    }
    let text = String::from_utf8(files["report.md"].clone()).unwrap();
    for expected in [
        "| gsm8k | 1 | 0 | 1 | 3 |",
        "| cmath | 2 | 0 | 1 | 1 |",
        "near_duplicate",
        "copy of web/web.jsonl.gz:6",
        "Rae et al. 2021",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

/// DET-1: memory and threads decide how the work is cut up, and nothing else.
#[test]
fn memory_and_threads_change_nothing() {
    let mut fixture = Fixture::new();
    let expected = files(&fixture.prepare().folder);
    // Pieces of a few documents each.
    fixture.refine.memory_bytes_max = 16 * 4096;
    for threads in [1, 2, 7] {
        let out = tempfile::tempdir().unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut pieces = 0;
        let prepared = pool
            .install(|| {
                fixture.prepare_in(out.path(), &mut |event| {
                    pieces += u32::from(matches!(event, PrepareEvent::Refining { .. }))
                })
            })
            .unwrap();
        assert!(pieces > 10, "{pieces}");
        assert!(files(&prepared.folder) == expected, "{threads} threads");
        let left: Vec<_> = std::fs::read_dir(out.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "nothing but the data set stays: {left:?}");
    }
}

/// Wherever a process ends, the next one goes on to the same bytes, and does not do again what was finished.
#[test]
fn a_killed_process_is_gone_on_with() {
    let mut fixture = Fixture::new();
    fixture.refine.memory_bytes_max = 16 * 8192;
    let expected = files(&fixture.prepare().folder);
    let count = |out: &Path| {
        let mut events = Vec::new();
        let prepared = fixture.prepare_in(out, &mut |event| events.push(event)).unwrap();
        (prepared, events)
    };
    let all = count(tempfile::tempdir().unwrap().path()).1.len();
    let pieces = |events: &[PrepareEvent]| {
        events
            .iter()
            .filter(|event| matches!(event, PrepareEvent::Refining { .. }))
            .count()
    };
    for killed_at in 1..all {
        let out = tempfile::tempdir().unwrap();
        let mut told = 0;
        // A panic leaves the files as a kill does: nothing is tidied up.
        let killed = catch_unwind(AssertUnwindSafe(|| {
            let _ = fixture.prepare_in(out.path(), &mut |_| {
                told += 1;
                assert!(told < killed_at, "killed on purpose");
            });
        }));
        assert!(killed.is_err(), "event {killed_at} of {all}");
        let (prepared, events) = count(out.path());
        assert!(files(&prepared.folder) == expected, "killed at event {killed_at}");
        assert!(pieces(&events) <= all, "{events:?}");
        if killed_at > all / 2 {
            let first = events.iter().find_map(|event| match event {
                PrepareEvent::Refining { documents, .. } => Some(*documents),
                _ => None,
            });
            assert!(
                first.is_none_or(|documents| documents > 10),
                "begun anew after {killed_at} of {all}: {events:?}"
            );
        }
    }
}

/// Domains that were tokens already when a process was killed are taken as they are, if they are whole.
#[test]
fn finished_domains_are_not_made_anew() {
    let fixture = Fixture::new();
    let expected = files(&fixture.prepare().folder);
    for harm in [false, true] {
        let out = tempfile::tempdir().unwrap();
        let mut domains = 0;
        let killed = catch_unwind(AssertUnwindSafe(|| {
            let _ = fixture.prepare_in(out.path(), &mut |event| {
                domains += u32::from(matches!(event, PrepareEvent::DomainFinished { .. }));
                assert!(domains < 2, "killed on purpose");
            });
        }));
        assert!(killed.is_err());
        let partial = std::fs::read_dir(out.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|path| path.extension().is_some_and(|e| e == "partial"))
            .unwrap();
        let shards = ["000-web.train.00000.tokens", "001-book.train.00000.tokens"];
        let numbers = |folder: &Path| shards.map(|name| std::fs::metadata(folder.join(name)).unwrap().ino());
        let before = numbers(&partial);
        if harm {
            let path = partial.join(shards[1]);
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[200] ^= 1;
            std::fs::write(&path, bytes).unwrap();
        }
        let prepared = fixture.prepare_in(out.path(), &mut |_| {}).unwrap();
        assert!(files(&prepared.folder) == expected);
        let after = numbers(&prepared.folder);
        assert_eq!(after[0], before[0], "the first domain's file is the very file");
        // A new file may get the number of the one that went.
        assert!(harm || after[1] == before[1]);
    }
}

/// A piece that was damaged between two processes is made again.
#[test]
fn damaged_work_is_not_believed() {
    let mut fixture = Fixture::new();
    fixture.refine.memory_bytes_max = 16 * 8192;
    let expected = files(&fixture.prepare().folder);
    for ending in ["docs", "keys", "json", "table"] {
        let out = tempfile::tempdir().unwrap();
        let killed = catch_unwind(AssertUnwindSafe(|| {
            let _ = fixture.prepare_in(out.path(), &mut |event| {
                assert!(!matches!(event, PrepareEvent::TokenizerReady { .. }))
            });
        }));
        assert!(killed.is_err());
        let work = std::fs::read_dir(out.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|path| path.extension().is_some_and(|e| e == "work"))
            .unwrap();
        let mut harmed = 0;
        for entry in std::fs::read_dir(&work).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == ending) && !path.ends_with("plan.json") {
                let mut bytes = std::fs::read(&path).unwrap();
                if let Some(byte) = bytes.last_mut() {
                    *byte ^= 1;
                    harmed += 1;
                }
                std::fs::write(&path, bytes).unwrap();
            }
        }
        assert!(harmed > 0, "{ending}");
        let prepared = fixture.prepare_in(out.path(), &mut |_| {}).unwrap();
        assert!(files(&prepared.folder) == expected, "{ending}");
    }
}

#[test]
fn copies_are_looked_for_across_domains_or_within() {
    let mut fixture = Fixture::new();
    let lines = |texts: &[String]| {
        texts
            .iter()
            .map(|text| serde_json::json!({ "text": text }).to_string() + "\n")
            .collect::<String>()
    };
    let (a, b) = (
        fixture.folder.path().join("a.jsonl"),
        fixture.folder.path().join("b.jsonl"),
    );
    let texts: Vec<String> = (0..40).map(english).collect();
    std::fs::write(&a, lines(&texts)).unwrap();
    let mut others: Vec<String> = (40..80).map(english).collect();
    others.extend([texts[1].clone(), format!("{} And more.", texts[2]), others[0].clone()]);
    std::fs::write(&b, lines(&others)).unwrap();
    fixture.domains = vec![domain("a", &a, Language::En), domain("b", &b, Language::En)];
    for (exact, near, expected) in [
        (DuplicateScope::Across, DuplicateScope::Across, [2, 1]),
        (DuplicateScope::Within, DuplicateScope::Within, [1, 0]),
        (DuplicateScope::Off, DuplicateScope::Off, [0, 0]),
        (DuplicateScope::Off, DuplicateScope::Across, [0, 3]),
        (DuplicateScope::Across, DuplicateScope::Off, [2, 0]),
    ] {
        fixture.refine.duplicates.exact = exact;
        fixture.refine.duplicates.near = near;
        let out = tempfile::tempdir().unwrap();
        let prepared = fixture.prepare_in(out.path(), &mut |_| {}).unwrap();
        let dropped = &prepared.manifest.domains[1].dropped;
        let found = [Dropped::Duplicate, Dropped::NearDuplicate].map(|rule| dropped.get(&rule).copied().unwrap_or(0));
        assert_eq!(found, expected, "{exact:?} {near:?}");
        assert!(
            prepared.manifest.domains[0].dropped.is_empty(),
            "the first domain keeps its own"
        );
    }
}

#[test]
fn wrong_input_is_an_error_with_its_place() {
    let mut fixture = Fixture::new();
    let path = fixture.folder.path().join("x.jsonl");
    let refused = |fixture: &Fixture| {
        let out = fixture.folder.path().join("refused");
        fixture.prepare_in(&out, &mut |_| {}).unwrap_err().to_string()
    };
    std::fs::write(&path, "{\"body\":\"a\"}\n{\"body\":\"b\"}\n").unwrap();
    fixture.domains[0] = domain("web", &path, Language::En);
    let error = refused(&fixture);
    assert!(
        error.contains("x.jsonl:1: no line of the file has a string in the field 'text'"),
        "{error}"
    );
    std::fs::write(&path, "{\"text\":\"Too short.\"}\n").unwrap();
    let error = refused(&fixture);
    assert!(error.contains("all left out: 1 by gopher_words"), "{error}");
    fixture.refine.quality.off.push("gopher".to_owned());
    assert!(refused(&fixture).contains("'gopher' is no quality rule"));
    fixture.refine.quality.off.clear();
    fixture.refine.decontaminate.sets[0].path = "/no/such/set.jsonl".into();
    assert!(refused(&fixture).contains("/no/such/set.jsonl"));
    // Tokens among the text: said with a remedy that has an effect.
    let mut fixture = Fixture::new();
    fixture.domains[1].format = SourceFormat::Megatron;
    let error = refused(&fixture);
    assert!(
        error.contains("book: holds tokens") && error.contains("a config of their own, without data.refine"),
        "{error}"
    );
    // A packed file that was cut is no shorter text.
    let mut fixture = Fixture::new();
    let packed = fixture.folder.path().join("web.jsonl.gz");
    let bytes = std::fs::read(&packed).unwrap();
    std::fs::write(&packed, &bytes[..bytes.len() / 2]).unwrap();
    fixture.refine.quality.enabled = false;
    assert!(refused(&fixture).contains("web.jsonl.gz: cannot be read"));
}

/// Settings that change the text change the data set; memory does not; and without refinement nothing is as it was not before.
#[test]
fn the_name_of_a_data_set_follows_what_decides_its_text() {
    let mut fixture = Fixture::new();
    let first = fixture.prepare();
    fixture.refine.memory_bytes_max *= 2;
    assert_eq!(fixture.prepare(), first);
    fixture.refine.duplicates.bands = 10;
    assert_ne!(fixture.prepare().folder, first.folder);
    let set = fixture.refine.decontaminate.sets[0].path.clone();
    fixture.refine.duplicates.bands = 14;
    std::fs::write(
        &set,
        format!(
            "{}\n{}",
            std::fs::read_to_string(&set).unwrap(),
            "{\"question\":\"Yes?\"}"
        ),
    )
    .unwrap();
    assert_ne!(fixture.prepare().folder, first.folder);
    // The same bytes are other items under another ending.
    let before = fixture.prepare();
    let text = set.with_extension("txt");
    std::fs::copy(&set, &text).unwrap();
    fixture.refine.decontaminate.sets[0].path = text;
    assert_ne!(fixture.prepare().folder, before.folder);
}

/// What is wrong with the settings is said before the sources are read, which may take hours.
#[test]
fn settings_are_checked_before_any_source_is_read() {
    let harms: [fn(&mut Fixture); 3] = [
        |fixture| fixture.refine.quality.off.push("gopher".to_owned()),
        |fixture| std::fs::write(&fixture.refine.decontaminate.sets[0].path, "[1]\n").unwrap(),
        |fixture| fixture.domains[0].format = SourceFormat::Llmc,
    ];
    for harm in harms {
        let mut fixture = Fixture::new();
        harm(&mut fixture);
        let out = fixture.folder.path().join("out");
        let mut told = Vec::new();
        let error = fixture.prepare_in(&out, &mut |event| told.push(event)).unwrap_err();
        assert!(told.is_empty() && !out.exists(), "{error}: {told:?}");
        let error = refine_text(&fixture.domains, &fixture.refine, &out, &mut |event| told.push(event)).unwrap_err();
        assert!(told.is_empty() && !out.exists(), "{error}: {told:?}");
    }
}

/// Work that was done for another text field is not taken for this one's, whether its process failed or was killed.
#[test]
fn a_corrected_text_field_is_asked_anew() {
    for is_killed in [false, true] {
        let mut fixture = Fixture::new();
        let out = fixture.folder.path().join("text");
        let work = fixture.folder.path().join("text.work");
        let path = fixture.folder.path().join("body.jsonl");
        let lines: String = (0..40)
            .map(|i| serde_json::json!({ "text": english(i), "body": english(100 + i) }).to_string() + "\n")
            .collect();
        std::fs::write(&path, lines).unwrap();
        fixture.domains = vec![domain("web", &path, Language::En)];
        fixture.domains[0].text_field = if is_killed { "text" } else { "bdoy" }.to_owned();
        let first = catch_unwind(AssertUnwindSafe(|| {
            refine_text(&fixture.domains, &fixture.refine, &out, &mut |event| {
                assert!(
                    !is_killed || !matches!(event, PrepareEvent::Refining { .. }),
                    "killed on purpose"
                );
            })
        }));
        match first {
            Ok(refused) => {
                let error = refused.unwrap_err();
                assert!(matches!(error, CorpusError::MissingField { .. }), "{error}");
                assert!(!work.exists(), "the same inputs do no better");
            }
            Err(_) => assert!(is_killed && work.exists()),
        }
        assert!(!out.exists() && !fixture.folder.path().join("text.partial").exists());
        fixture.domains[0].text_field = "body".to_owned();
        let counts = refine_text(&fixture.domains, &fixture.refine, &out, &mut |_| {}).unwrap();
        assert_eq!(counts, [(40, 40)]);
        let text = std::fs::read_to_string(out.join("000-web.jsonl")).unwrap();
        assert!(text.contains(&english(100)) && !text.contains(&english(0)));
        assert!(!work.exists());
    }
}

/// Two processes that write to the same place: the second waits, finds the first one's text, and leaves it alone.
#[test]
fn text_that_another_process_wrote_meanwhile_is_left_alone() {
    let fixture = Fixture::new();
    let out = fixture.folder.path().join("text");
    let mut held = Some(std::fs::File::open(fixture.folder.path()).unwrap());
    held.as_ref().unwrap().lock().unwrap();
    let mut told = Vec::new();
    let error = refine_text(&fixture.domains, &fixture.refine, &out, &mut |event| {
        if matches!(event, PrepareEvent::Waiting { .. }) {
            std::fs::create_dir(&out).unwrap();
            std::fs::write(out.join("report.json"), "theirs").unwrap();
            held.take();
        }
        told.push(event);
    })
    .unwrap_err();
    assert!(
        matches!(&error, CorpusError::Write { source, .. } if source.kind() == std::io::ErrorKind::AlreadyExists),
        "{error}"
    );
    assert_eq!(told.len(), 1, "nothing was read for it: {told:?}");
    assert_eq!(std::fs::read_to_string(out.join("report.json")).unwrap(), "theirs");
    assert!(!fixture.folder.path().join("text.work").exists());
}

/// A source that cannot be read for a while (a network folder, a permission) costs no finished work.
#[test]
fn work_outlives_a_read_that_failed() {
    let mut fixture = Fixture::new();
    fixture.refine.memory_bytes_max = 16 * 8192;
    let expected = files(&fixture.prepare().folder);
    let (path, away) = (
        fixture.folder.path().join("book/a.jsonl"),
        fixture.folder.path().join("away"),
    );
    let out = fixture.folder.path().join("again");
    let failed = fixture.prepare_in(&out, &mut |event| {
        if matches!(event, PrepareEvent::Refining { .. }) && path.exists() {
            std::fs::rename(&path, &away).unwrap();
        }
    });
    assert!(matches!(failed, Err(CorpusError::Unreadable { .. })), "{failed:?}");
    std::fs::rename(&away, &path).unwrap();
    let mut first = None;
    let prepared = fixture
        .prepare_in(&out, &mut |event| {
            if let PrepareEvent::Refining { documents, .. } = event {
                first.get_or_insert(documents);
            }
        })
        .unwrap();
    assert!(first.is_some_and(|documents| documents > 10), "begun anew: {first:?}");
    assert!(files(&prepared.folder) == expected);
    let names: Vec<_> = std::fs::read_dir(&out)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(names, [prepared.folder]);
}

/// A process that is killed between the last two steps leaves a whole data set and its work: the next one removes that.
#[test]
fn work_of_a_whole_data_set_is_removed() {
    let fixture = Fixture::new();
    let prepared = fixture.prepare();
    let name = prepared.folder.file_name().unwrap().to_str().unwrap();
    let work = prepared.folder.with_file_name(format!("{name}.work"));
    let leave = || {
        std::fs::create_dir(&work).unwrap();
        std::fs::write(work.join("copies.table"), "left").unwrap();
    };
    leave();
    assert_eq!(fixture.prepare(), prepared);
    assert!(!work.exists());
    // Not under the hands of a process that is still at it, and nobody waits for that.
    leave();
    let held = std::fs::File::open(prepared.folder.parent().unwrap()).unwrap();
    held.lock().unwrap();
    assert_eq!(fixture.prepare(), prepared);
    assert!(work.exists());
}

/// What docs/DATA.md says of near copies: the document that one names may be left out itself, so of a chain the first alone stays.
#[test]
fn of_a_chain_of_near_copies_the_first_stays() {
    let mut fixture = Fixture::new();
    let path = fixture.folder.path().join("chain.jsonl");
    let sentences: Vec<String> = (0..10)
        .flat_map(|i| {
            english(300 + i)
                .split_inclusive('.')
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect();
    let link = |at: usize| sentences[at..at + 50].concat().trim().to_owned();
    let write = |texts: &[String]| {
        let lines = texts
            .iter()
            .map(|text| serde_json::json!({ "text": text }).to_string() + "\n");
        std::fs::write(&path, lines.collect::<String>()).unwrap();
    };
    fixture.domains = vec![domain("web", &path, Language::En)];
    fixture.refine.quality.enabled = false;
    let fates = |fixture: &Fixture, name: &str| {
        let out = fixture.folder.path().join(name);
        let prepared = fixture.prepare_in(&out, &mut |_| {}).unwrap();
        let of = |record: DocumentRecord| record.refined.and_then(|r| r.copy_of).map_or(0, |place| place.record);
        records(&prepared, 0).into_iter().map(of).collect::<Vec<u64>>()
    };
    // Enough that both splits have text.
    let others: Vec<String> = (0..60).map(english).collect();
    let mut chain: Vec<String> = (0..=25).map(link).collect();
    chain.extend(others.iter().cloned());
    write(&chain);
    let found = fates(&fixture, "chain");
    assert!(
        found[0] == 0 && found[1..26].iter().all(|&witness| witness > 0),
        "{found:?}"
    );
    assert!(
        found[25] > 1,
        "the last is like another copy, and not like the first: {found:?}"
    );
    // Without those between them, first and last both stay.
    let mut ends = vec![link(0), link(25)];
    ends.extend(others);
    write(&ends);
    assert_eq!(fates(&fixture, "ends")[..2], [0, 0]);
}

/// A run takes a prepared folder as it is, if it holds the domains that the run names.
#[test]
fn a_prepared_folder_is_adopted() {
    let fixture = Fixture::new();
    let prepared = fixture.prepare();
    let run = tempfile::tempdir().unwrap();
    let data = run.path().join("data");
    let ready = prepared.folder.parent().unwrap();
    assert_eq!(find_data_set(ready).unwrap(), prepared.folder);
    assert_eq!(find_data_set(&prepared.folder).unwrap(), prepared.folder);
    let mut request = fixture.request();
    let take = |request: &PrepareRequest<'_>, from: &Path, again| adopt(request, from, again, &data, &mut |_| {});
    let adopted = take(&request, ready, false).unwrap();
    assert_eq!(adopted.manifest, prepared.manifest);
    assert_eq!(adopted.folder.parent(), Some(data.as_path()));
    TokenStore::open(&adopted.folder, 16).unwrap();
    assert_eq!(
        take(&request, &prepared.folder, true).unwrap(),
        adopted,
        "a second time, and a run that goes on"
    );
    // Others are refused.
    let swapped: Vec<DomainConfig> = fixture.domains.iter().rev().cloned().collect();
    request.domains = &swapped;
    let error = take(&request, ready, false).unwrap_err().to_string();
    assert!(error.contains("holds the domains web (en), book (zh)"), "{error}");
    let mut request = fixture.request();
    request.model_vocabulary = 300;
    assert!(matches!(
        take(&request, ready, false),
        Err(CorpusError::VocabularyTooLarge { .. })
    ));
    let raw = prepare(
        &fixture.request_without_bad_files(),
        &fixture.folder.path().join("raw"),
        &mut |_| {},
    )
    .unwrap();
    assert!(matches!(
        take(&fixture.request(), &raw.folder, true),
        Err(CorpusError::OtherData { .. } | CorpusError::OtherDomains { .. })
    ));
    let none = tempfile::tempdir().unwrap();
    assert!(matches!(find_data_set(none.path()), Err(CorpusError::NoDataSet { .. })));
}

impl Fixture {
    /// The same domains by name and language, over a source that needs no refining.
    fn request_without_bad_files(&self) -> PrepareRequest<'_> {
        let path: PathBuf = self.folder.path().join("plain.jsonl");
        let lines: String = (0..80)
            .map(|i| serde_json::json!({ "text": english(i) }).to_string() + "\n")
            .collect();
        std::fs::write(&path, lines).unwrap();
        let domains = vec![domain("web", &path, Language::En), domain("book", &path, Language::Zh)];
        PrepareRequest {
            domains: Box::leak(domains.into_boxed_slice()),
            ..self.request()
        }
    }
}
