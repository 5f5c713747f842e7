//! Data sets made beforehand: finding one in a folder, and taking it for a run.

use crate::error::CorpusError;
use crate::manifest::{DataManifest, MANIFEST_FILE};
use crate::prepare::{
    PrepareEvent, PrepareRequest, Prepared, check_vocabulary, holds_any, is_recipe_name, recipe_folder,
};
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
