//! Data sets that enter a run that has begun: linked by the hash of their content, and refused where they do not fit.

// A test fails by panicking.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use tarazed_corpus::{
    CorpusError, PrepareRequest, Prepared, TokenStore, adopt_later, find_data_set, later_folder, prepare,
};
use tarazed_domain::config::{DomainConfig, Language, SourceFormat, TokenizerConfig};

const CONTEXT: usize = 8;

/// A data set of one domain of text that `word` runs through.
fn made(folder: &Path, word: &str, tokenizer: Option<PathBuf>, held_out_fraction: f64) -> Prepared {
    let path = folder.join(format!("{word}.jsonl"));
    let lines: String = (0..60)
        .map(|i| {
            serde_json::json!({"text": format!("The {word} number {i} is followed by {word} {}. ", i * 7)}).to_string()
                + "\n"
        })
        .collect();
    std::fs::write(&path, lines).unwrap();
    let domains = [DomainConfig {
        name: word.to_owned(),
        path,
        format: SourceFormat::Auto,
        language: Language::En,
        weight: 1.0,
        text_field: "text".to_owned(),
    }];
    let request = PrepareRequest {
        domains: &domains,
        tokenizer: &TokenizerConfig {
            path: tokenizer,
            vocabulary: 300,
            ..TokenizerConfig::default()
        },
        model_vocabulary: 300,
        held_out_fraction,
        context: CONTEXT,
    };
    prepare(
        &request,
        &folder.join(format!("made-{word}-{held_out_fraction}")),
        &mut |_| {},
    )
    .unwrap()
}

#[test]
fn a_data_set_enters_by_the_hash_of_its_content() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let first = made(folder.path(), "garden", None, 0.2);
    std::fs::create_dir(&run).unwrap();
    let like = Some(first.tokenizer_path.clone());
    let more = made(folder.path(), "harbour", like.clone(), 0.2);
    let enter = |set: &Prepared, context| adopt_later(&set.folder, &first.manifest, context, &run);
    let manifest = enter(&more, CONTEXT).unwrap();
    assert_eq!(manifest, more.manifest);
    let link = later_folder(&run, &manifest.version);
    assert_eq!(TokenStore::open(&link, CONTEXT).unwrap().manifest(), &more.manifest);
    assert!(
        find_data_set(&run).is_err(),
        "it is not taken for the one that the run began with"
    );
    assert_eq!(enter(&more, CONTEXT).unwrap(), manifest, "a second time");

    // A link to what has moved away is made again; something else in its place is not believed.
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(folder.path().join("gone"), &link).unwrap();
    enter(&more, CONTEXT).unwrap();
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(&first.folder, &link).unwrap();
    assert!(matches!(enter(&more, CONTEXT), Err(CorpusError::CorruptCache { .. })));
    std::fs::remove_file(&link).unwrap();

    let refused = |set: &Prepared, part: &str| {
        let error = enter(set, CONTEXT).unwrap_err();
        assert!(
            matches!(error, CorpusError::Unfit { .. }) && error.to_string().contains(part),
            "{error}"
        );
        assert!(std::fs::read_dir(&run).unwrap().next().is_none(), "nothing was linked");
    };
    refused(&made(folder.path(), "island", None, 0.2), "another tokenizer");
    refused(&made(folder.path(), "journey", like.clone(), 0.1), "holds out 0.1");
    // To hold out more is to train on less.
    enter(&made(folder.path(), "kitchen", like, 0.4), CONTEXT).unwrap();
    assert!(matches!(enter(&more, 1 << 20), Err(CorpusError::TooShort { .. })));
}
