//! Data sets made beforehand: finding one in a folder, and taking it for a run.

use crate::error::CorpusError;
use crate::manifest::{DataManifest, MANIFEST_FILE, TokenizerManifest};
use crate::prepare::{
    PrepareEvent, PrepareRequest, Prepared, check_vocabulary, holds_any, is_recipe_name, recipe_folder,
};
use crate::store::TokenStore;
use crate::tokenizer::TOKENIZER_FILE;
use std::path::{Path, PathBuf};

/// The data set in `folder`: the folder itself, or the only one in it, as `tarazed data prepare --out` leaves it.
///
/// # Errors
/// [`CorpusError::NoDataSet`] where there is none, or several.
pub fn find_data_set(folder: &Path) -> Result<PathBuf, CorpusError> {
    if folder.join(MANIFEST_FILE).exists() {
        return Ok(folder.to_owned());
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(CorpusError::unreadable(folder))? {
        let path = entry.map_err(CorpusError::unreadable(folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if is_recipe_name(&name) && path.join(MANIFEST_FILE).exists() {
            found.push(path);
        }
    }
    found.sort();
    let none = |reason: String| CorpusError::NoDataSet {
        path: folder.to_owned(),
        reason,
    };
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] => Err(none(format!(
            "holds no {MANIFEST_FILE}; give the folder that `tarazed data prepare --out` named"
        ))),
        [first, ..] => Err(none(format!(
            "holds {} data sets; name one of them, e.g. {}",
            found.len(),
            first.display()
        ))),
    }
}

/// Takes the data set in `prepared` for a run with this request: checks that its domains are the request's, and links it into
/// `out_dir` under its own name, so that a run folder names all it needs. With `is_again`, a run that has begun with other data
/// is refused, as by [`crate::prepare_again`]. Nothing of the data is copied or changed.
///
/// # Errors
/// [`CorpusError::NoDataSet`], [`CorpusError::OtherDomains`], [`CorpusError::OtherData`],
/// [`CorpusError::VocabularyTooLarge`], [`CorpusError::TooShort`], [`CorpusError::CorruptCache`] or [`CorpusError::Write`].
pub fn adopt(
    request: &PrepareRequest<'_>,
    prepared: &Path,
    is_again: bool,
    out_dir: &Path,
    progress: &mut dyn FnMut(PrepareEvent),
) -> Result<Prepared, CorpusError> {
    let source = find_data_set(prepared)?;
    let manifest = DataManifest::load(&source)?;
    check_domains(request, prepared, &manifest)?;
    check_vocabulary(
        &source.join(TOKENIZER_FILE),
        manifest.tokenizer.vocabulary,
        request.model_vocabulary,
    )?;
    manifest.check_context(request.context)?;
    let folder = recipe_folder(out_dir, &manifest.recipe)
        .ok_or_else(|| CorpusError::corrupt(&source.join(MANIFEST_FILE), "its recipe is no hash"))?;
    if !folder.join(MANIFEST_FILE).exists() {
        if is_again && holds_any(out_dir) {
            return Err(CorpusError::OtherData {
                folder: out_dir.to_owned(),
            });
        }
        let source = std::path::absolute(&source).map_err(CorpusError::unreadable(&source))?;
        std::fs::create_dir_all(out_dir).map_err(CorpusError::write(out_dir))?;
        // A link to what has moved away since is in the way; a folder is not touched.
        if std::fs::symlink_metadata(&folder).is_ok_and(|m| m.is_symlink()) {
            std::fs::remove_file(&folder).map_err(CorpusError::write(&folder))?;
        }
        std::os::unix::fs::symlink(&source, &folder).map_err(CorpusError::write(&folder))?;
        crate::files::sync_folder(out_dir)?;
    } else if DataManifest::load(&folder)?.version != manifest.version {
        return Err(CorpusError::OtherData {
            folder: out_dir.to_owned(),
        });
    }
    progress(PrepareEvent::Reused {
        folder: source,
        version: manifest.version.clone(),
    });
    Ok(Prepared {
        tokenizer_path: folder.join(TOKENIZER_FILE),
        folder,
        manifest,
    })
}

/// Takes the data set in `prepared` for a run that has begun with the one of `first`, so that some of its domains may enter that
/// run: opens it for sequences of `context` tokens, checks that it speaks of the same tokens and holds out no less, and links it
/// into `out_dir` by the hash of its content, where [`later_folder`] finds it. Nothing of the data is copied or changed.
///
/// # Errors
/// [`CorpusError::NoDataSet`], [`CorpusError::Unfit`], [`CorpusError::TooShort`], [`CorpusError::CorruptCache`] or
/// [`CorpusError::Write`].
pub fn adopt_later(
    prepared: &Path,
    first: &DataManifest,
    context: usize,
    out_dir: &Path,
) -> Result<DataManifest, CorpusError> {
    let source = find_data_set(prepared)?;
    let manifest = TokenStore::open(&source, context)?.manifest().clone();
    check_fit(&source, &manifest, first)?;
    let folder = later_folder(out_dir, &manifest.version);
    if folder.join(MANIFEST_FILE).exists() {
        if DataManifest::load(&folder)?.version == manifest.version {
            return Ok(manifest);
        }
        return Err(CorpusError::corrupt(
            &folder,
            "is named after another data set than it holds",
        ));
    }
    let source = std::path::absolute(&source).map_err(CorpusError::unreadable(&source))?;
    // A link to what has moved away since is in the way; a folder is not touched.
    if std::fs::symlink_metadata(&folder).is_ok_and(|m| m.is_symlink()) {
        std::fs::remove_file(&folder).map_err(CorpusError::write(&folder))?;
    }
    std::os::unix::fs::symlink(&source, &folder).map_err(CorpusError::write(&folder))?;
    crate::files::sync_folder(out_dir)?;
    Ok(manifest)
}

/// Where a run keeps a data set that came later, by its version. No name of a recipe is as long, so it is never taken for the
/// one that the run began with.
#[must_use]
pub fn later_folder(out_dir: &Path, version: &str) -> PathBuf {
    out_dir.join(version)
}

/// Whether two tokenizers give the same tokens: the same file, and the same end of a document.
#[must_use]
pub fn is_same_tokenizer(a: &TokenizerManifest, b: &TokenizerManifest) -> bool {
    (&a.file.blake3, a.vocabulary, a.end_of_document) == (&b.file.blake3, b.vocabulary, b.end_of_document)
}

fn check_fit(source: &Path, manifest: &DataManifest, first: &DataManifest) -> Result<(), CorpusError> {
    let unfit = |reason: String, remedy| CorpusError::Unfit {
        path: source.to_owned(),
        reason,
        remedy,
    };
    if !is_same_tokenizer(&manifest.tokenizer, &first.tokenizer) {
        return Err(unfit(
            format!(
                "was made with another tokenizer ({}) than the run's data ({})",
                manifest.tokenizer.file.blake3, first.tokenizer.file.blake3
            ),
            "prepare it with data.tokenizer.path set to the tokenizer.json of the run's data",
        ));
    }
    // The side of a document is a threshold on a hash of its text: whoever holds out no less trains on nothing that the other
    // measures.
    if manifest.held_out_fraction < first.held_out_fraction {
        return Err(unfit(
            format!(
                "holds out {} of its documents and the run's data {}, so that it may train on text that the run measures",
                manifest.held_out_fraction, first.held_out_fraction
            ),
            "prepare it with data.held_out_fraction as large as the run's",
        ));
    }
    Ok(())
}

fn check_domains(request: &PrepareRequest<'_>, prepared: &Path, manifest: &DataManifest) -> Result<(), CorpusError> {
    let wanted: Vec<_> = request.domains.iter().map(|d| (d.name.as_str(), d.language)).collect();
    let found: Vec<_> = manifest.domains.iter().map(|d| (d.name.as_str(), d.language)).collect();
    if wanted == found {
        return Ok(());
    }
    let list = |domains: &[(&str, tarazed_domain::config::Language)]| {
        let shown: Vec<_> = domains
            .iter()
            .map(|(name, language)| format!("{name} ({})", language.name()))
            .collect();
        shown.join(", ")
    };
    Err(CorpusError::OtherDomains {
        path: prepared.to_owned(),
        found: list(&found),
        wanted: list(&wanted),
    })
}
