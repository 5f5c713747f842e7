//! A disk that fills up. Alone in its process: the limit on file sizes that stands in for the full disk is the process's.

// A test fails by panicking.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use tarazed_corpus::{CorpusError, PrepareRequest, TokenStore, prepare};
use tarazed_domain::config::{DomainConfig, Language, SourceFormat, TokenizerConfig};

fn limit_file_size(bytes: libc::rlim_t) {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: both calls get a valid pointer to a struct that outlives them; ignoring SIGXFSZ installs no handler.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit), 0);
        limit.rlim_cur = bytes.min(limit.rlim_max);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
    }
}

fn files(folder: &Path) -> usize {
    std::fs::read_dir(folder).map_or(0, Iterator::count)
}

/// Writing fails at every size in turn, in whichever file that hits: the error names a file and its remedy, nothing stays,
/// and with room again the same call succeeds.
#[test]
fn a_full_disk_leaves_no_data_set_and_the_next_run_makes_it() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("web.jsonl");
    let lines: String = (0..4000)
        .map(|i| {
            serde_json::json!({ "text": format!("Document {i} says {}.", "one two three ".repeat(1 + i % 9)) })
                .to_string()
                + "\n"
        })
        .collect();
    std::fs::write(&source, lines).unwrap();
    let domains = [DomainConfig {
        name: "web".to_owned(),
        path: source,
        format: SourceFormat::Auto,
        language: Language::En,
        weight: 1.0,
        text_field: "text".to_owned(),
    }];
    let tokenizer = TokenizerConfig {
        path: None,
        vocabulary: 300,
        train_bytes_max: 1 << 20,
    };
    let request = PrepareRequest {
        domains: &domains,
        tokenizer: &tokenizer,
        model_vocabulary: 300,
        held_out_fraction: 0.05,
        context: 16,
    };
    let out = folder.path().join("data");
    for limit in [0, 100, 1_000, 5_000, 20_000, 100_000] {
        limit_file_size(limit);
        let result = prepare(&request, &out, &mut |_| ());
        limit_file_size(libc::rlim_t::MAX);
        let error = result.unwrap_err();
        assert!(matches!(error, CorpusError::Write { .. }), "{error}");
        assert!(error.to_string().contains("free space"), "{error}");
        assert_eq!(files(&out), 0, "at {limit} bytes");
    }
    let prepared = prepare(&request, &out, &mut |_| ()).unwrap();
    TokenStore::open(&prepared.folder, 16).unwrap();
    let largest = std::fs::read_dir(&prepared.folder)
        .unwrap()
        .map(|e| e.unwrap().metadata().unwrap().len())
        .max();
    assert!(largest > Some(100_000), "the limits above must each hit some file");
}
