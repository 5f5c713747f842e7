//! From the domains of a config to a data set in a folder named after its inputs.
//!
//! Straight line: list sources, hash them, and if the folder of that hash is there, done. Otherwise, under a lock on the
//! parent folder: tokenizer, then each domain (split, encode, write), then the manifest, all in a `.partial` folder that
//! is renamed when everything in it is synced. A failure at any point leaves no data set, and the partial folder of a
//! process that died is removed by the next one. With refinement, what the pipeline has finished lies in a `.work` folder
//! until the data set is whole, and a process that was killed goes on from there.

mod build;
mod events;
mod resume;

pub(crate) use build::{check_vocabulary, domain_stem, place_text};
pub(crate) use events::Milestones;
pub use events::{PrepareEvent, Stage};

use crate::error::CorpusError;
use crate::files::{hash_file, hash_file_telling, sync_folder};
use crate::manifest::{DataManifest, MANIFEST_FILE, SourceManifest};
use crate::pipeline::{Checked, Pipeline};
use crate::refine;
use crate::source::{self, SourceFile};
use crate::tokenizer::TOKENIZER_FILE;
use rayon::prelude::*;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use tarazed_domain::config::{DomainConfig, RefineConfig, TokenizerConfig};

/// Part of every recipe: raise it when the same inputs give other tokens or other figures.
const PROGRAM: &str = "tarazed-corpus 2, tokenizers 0.23.2";
/// Bytes hashed between two words of it, at least.
const HASHED_BYTES_TOLD: u64 = 256 << 20;
const PARTIAL: &str = ".partial";
const WORK: &str = ".work";

/// What to prepare. There is no seed: runs of any seed see the same tokens and the same held-out text.
#[derive(Clone, Copy, Debug)]
pub struct PrepareRequest<'a> {
    /// The domains, in the config's order.
    pub domains: &'a [DomainConfig],
    /// How text becomes tokens.
    pub tokenizer: &'a TokenizerConfig,
    /// Rows of the model's embedding.
    pub model_vocabulary: usize,
    /// Share of documents held out of training.
    pub held_out_fraction: f64,
    /// Context length: each split must hold one sequence. The tokens do not depend on it.
    pub context: usize,
}

/// A data set that is ready.
#[derive(Clone, PartialEq, Debug)]
pub struct Prepared {
    /// Its folder, for [`crate::TokenStore::open`].
    pub folder: PathBuf,
    /// Its manifest.
    pub manifest: DataManifest,
    /// Its `tokenizer.json`.
    pub tokenizer_path: PathBuf,
}

/// One domain with its files and their hashes.
pub(crate) struct DomainInput<'a> {
    pub(crate) config: &'a DomainConfig,
    pub(crate) files: Vec<SourceFile>,
    pub(crate) sources: Vec<SourceManifest>,
}

/// Makes the data set of `request` in a folder under `out_dir`, or finds it there. `progress` hears of each stage.
///
/// # Errors
/// A [`CorpusError`] with place and remedy; then nothing was left behind.
pub fn prepare(
    request: &PrepareRequest<'_>,
    out_dir: &Path,
    progress: &mut dyn FnMut(PrepareEvent),
) -> Result<Prepared, CorpusError> {
    prepare_refined(request, None, false, out_dir, progress)
}

/// Like [`prepare`], for a run that has trained on a data set under `out_dir`: where there are data sets and none is that
/// of `request`, the sources or what is made of them have changed since, and nothing is written. Where all of them were
/// deleted, the data set is made anew.
///
/// # Errors
/// [`CorpusError::OtherData`]; else as [`prepare`].
pub fn prepare_again(
    request: &PrepareRequest<'_>,
    out_dir: &Path,
    progress: &mut dyn FnMut(PrepareEvent),
) -> Result<Prepared, CorpusError> {
    prepare_refined(request, None, true, out_dir, progress)
}

/// Like [`prepare`], or like [`prepare_again`] where `is_again`, with the text refined as `refine` says, if it does. A process
/// that is killed in the middle leaves what it has finished in `out_dir`, and the next call with the same inputs goes on from
/// there to the same bytes.
///
/// # Errors
/// As theirs; and [`CorpusError::Benchmark`], [`CorpusError::UnknownRule`], [`CorpusError::TokensWithoutText`]. Where the same
/// call may do better later, what is finished stays for it.
pub fn prepare_refined(
    request: &PrepareRequest<'_>,
    refine: Option<&RefineConfig>,
    is_again: bool,
    out_dir: &Path,
    progress: &mut dyn FnMut(PrepareEvent),
) -> Result<Prepared, CorpusError> {
    assert!(!request.domains.is_empty() && request.context > 0, "a validated config");
    let checked = refine.map(|config| Checked::new(config, request.domains)).transpose()?;
    let inputs = read_inputs(request.domains, progress)?;
    let recipe = recipe(request, &inputs, checked.as_ref().map(Checked::text))?;
    let versions: Vec<String> = inputs
        .iter()
        .map(|input| domain_version(input, checked.as_ref()))
        .collect();
    let folder = out_dir.join(&recipe[..16]);
    let work = out_dir.join(format!("{}{WORK}", &recipe[..16]));
    // Without the lock: a data set that is there is whole, and ranks that start together need not queue for it.
    if folder.join(MANIFEST_FILE).exists() {
        let prepared = reuse(request, &folder, &recipe, progress)?;
        // Where the lock is taken, somebody may be at it, who removes it, or the next one does.
        if let Some(held) = work.exists().then(|| File::open(out_dir).ok()).flatten()
            && held.try_lock().is_ok()
        {
            remove_left(&work);
        }
        return Ok(prepared);
    }
    if is_again && holds_any(out_dir) {
        return Err(CorpusError::OtherData {
            folder: out_dir.to_owned(),
        });
    }
    let was_there = out_dir.exists();
    std::fs::create_dir_all(out_dir).map_err(CorpusError::write(out_dir))?;
    let lock = lock(out_dir, progress)?;
    if folder.join(MANIFEST_FILE).exists() {
        remove_left(&work);
        return reuse(request, &folder, &recipe, progress);
    }
    let partial = out_dir.join(format!("{}{PARTIAL}", &recipe[..16]));
    // Refined domains that are done are found again in it.
    remove_stale(out_dir, refine.is_some().then_some(partial.as_path()))?;
    if !partial.exists() {
        std::fs::create_dir(&partial).map_err(CorpusError::write(&partial))?;
    }
    let built = checked
        .as_ref()
        .map(|checked| Pipeline::run_for(&recipe, checked, &inputs, &work, progress))
        .transpose()
        .and_then(|pipeline| {
            let text = build::Text {
                inputs: &inputs,
                versions: &versions,
                refined: pipeline.as_ref().zip(checked.as_ref().map(Checked::text)),
            };
            let manifest = build::build(request, &text, &recipe, &partial, progress)?;
            manifest.check_context(request.context)?;
            sync_folder(&partial)?;
            std::fs::rename(&partial, &folder).map_err(CorpusError::write(&folder))?;
            sync_folder(out_dir)
        });
    if let Err(error) = built {
        let keeps_work = refine.is_some() && error.keeps_work();
        if refine.is_some() && !keeps_work {
            // The same inputs do no better, and others have another name.
            let _ = std::fs::remove_dir_all(&work);
        }
        // Best effort: what stays is never taken for a data set, and the next run removes it.
        if !keeps_work {
            let _ = std::fs::remove_dir_all(&partial);
        }
        if !was_there {
            // Fails, as it should, where the pipeline has left work to go on with.
            let _ = std::fs::remove_dir(out_dir);
        }
        return Err(error);
    }
    if refine.is_some() {
        // The data set is whole; what stays of the work would only take room.
        std::fs::remove_dir_all(&work).map_err(CorpusError::write(&work))?;
    }
    drop(lock);
    let prepared = open(request, &folder, &recipe)?;
    progress(PrepareEvent::Finished {
        folder,
        version: prepared.manifest.version.clone(),
    });
    Ok(prepared)
}

/// Whether a whole data set is there, of whatever inputs.
pub(crate) fn holds_any(out_dir: &Path) -> bool {
    let entries = std::fs::read_dir(out_dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| is_recipe_name(&entry.file_name().to_string_lossy()))
        .any(|entry| entry.path().join(MANIFEST_FILE).exists())
}

/// The folder of a recipe's data set; none where the recipe is no hash.
pub(crate) fn recipe_folder(out_dir: &Path, recipe: &str) -> Option<PathBuf> {
    recipe
        .get(..16)
        .filter(|name| is_recipe_name(name))
        .map(|name| out_dir.join(name))
}

pub(crate) fn is_recipe_name(name: &str) -> bool {
    name.len() == 16 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Lists and hashes the sources of all domains.
pub(crate) fn read_inputs<'a>(
    domains: &'a [DomainConfig],
    progress: &mut dyn FnMut(PrepareEvent),
) -> Result<Vec<DomainInput<'a>>, CorpusError> {
    let mut inputs = Vec::with_capacity(domains.len());
    let (mut files_all, mut bytes_all) = (0, 0);
    // All are looked for before the first is read: a wrong path is said at once.
    let listed = domains.iter().map(source::list).collect::<Result<Vec<_>, _>>()?;
    let whole = listed.iter().flatten().map(|file| file.bytes).sum();
    let mut milestones = Milestones::new(whole, HASHED_BYTES_TOLD);
    for (config, files) in domains.iter().zip(listed) {
        let sources = hash_files(&files, &mut |bytes| {
            if let Some(bytes) = milestones.add(bytes) {
                progress(PrepareEvent::Hashing {
                    bytes,
                    bytes_all: whole,
                });
            }
        })?;
        files_all += files.len() as u64;
        bytes_all += files.iter().map(|f| f.bytes).sum::<u64>();
        inputs.push(DomainInput { config, files, sources });
    }
    progress(PrepareEvent::Hashed {
        files: files_all,
        bytes: bytes_all,
    });
    Ok(inputs)
}

/// Hashes files on all threads; `tell` hears on this one how many bytes were hashed since it last heard.
fn hash_files(files: &[SourceFile], tell: &mut dyn FnMut(u64)) -> Result<Vec<SourceManifest>, CorpusError> {
    let hash = |sender: &mut Sender<u64>, file: &SourceFile| {
        // Whoever listens does so until the last sender is gone.
        let mut say = |bytes| {
            let _ = sender.send(bytes);
        };
        let (bytes, hash) = hash_file_telling(&file.path, &mut say)?;
        if bytes != file.bytes {
            return Err(CorpusError::SourceChanged {
                path: file.path.clone(),
            });
        }
        Ok(SourceManifest {
            name: file.name.clone(),
            format: file.format,
            bytes,
            blake3: hash.to_hex().to_string(),
        })
    };
    std::thread::scope(|scope| {
        let (sender, hashed) = channel();
        let hashing = scope.spawn(move || files.par_iter().map_with(sender, hash).collect());
        hashed.into_iter().for_each(tell);
        hashing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// BLAKE3 (hex) over everything that decides the tokens, and nothing else: no domain's place, no weight, no context.
fn recipe(
    request: &PrepareRequest<'_>,
    inputs: &[DomainInput<'_>],
    refine: Option<&str>,
) -> Result<String, CorpusError> {
    let tokenizer = match &request.tokenizer.path {
        Some(path) => {
            let config = path.with_file_name("tokenizer_config.json");
            let beside = if config.exists() {
                hash_file(&config)?.1.to_hex().to_string()
            } else {
                String::new()
            };
            serde_json::json!({ "file": hash_file(path)?.1.to_hex().as_str(), "config": beside })
        }
        None => serde_json::json!({
            "vocabulary": trained_vocabulary(request),
            "train_bytes_max": request.tokenizer.train_bytes_max,
        }),
    };
    let domains: Vec<_> = inputs
        .iter()
        .map(|input| {
            let c = input.config;
            serde_json::json!([c.name, c.language, c.text_field, input.sources])
        })
        .collect();
    let mut all = serde_json::json!({
        "program": PROGRAM,
        "tokenizer": tokenizer,
        "held_out_fraction_bits": request.held_out_fraction.to_bits(),
        "domains": domains,
    });
    if let Some(settings) = refine {
        all["refine"] = serde_json::json!([refine::program(), settings]);
    }
    Ok(blake3::hash(all.to_string().as_bytes()).to_hex().to_string())
}

/// See [`crate::DomainManifest::version`].
fn domain_version(input: &DomainInput<'_>, refine: Option<&Checked<'_>>) -> String {
    let config = input.config;
    let all = serde_json::json!({
        "program": PROGRAM,
        "language": config.language,
        "text_field": config.text_field,
        "sources": input.sources,
        "refine": refine.map(|checked| [refine::program(), checked.text_for(config)]),
    });
    blake3::hash(all.to_string().as_bytes()).to_hex().to_string()
}

const fn trained_vocabulary(request: &PrepareRequest<'_>) -> usize {
    if request.tokenizer.vocabulary == 0 {
        request.model_vocabulary
    } else {
        request.tokenizer.vocabulary
    }
}

/// Holds the folder for one preparing process; the system lets go when the process ends, however it ends.
pub(crate) fn lock(out_dir: &Path, progress: &mut dyn FnMut(PrepareEvent)) -> Result<File, CorpusError> {
    let file = File::open(out_dir).map_err(CorpusError::write(out_dir))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            progress(PrepareEvent::Waiting {
                folder: out_dir.to_owned(),
            });
            file.lock().map_err(CorpusError::write(out_dir))?;
        }
        Err(std::fs::TryLockError::Error(e)) => return Err(CorpusError::write(out_dir)(e)),
    }
    Ok(file)
}

/// Removes what a process that died while preparing has left. Called with the lock held: nobody else is at it.
fn remove_stale(out_dir: &Path, kept: Option<&Path>) -> Result<(), CorpusError> {
    for entry in std::fs::read_dir(out_dir).map_err(CorpusError::write(out_dir))? {
        let path = entry.map_err(CorpusError::write(out_dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.strip_suffix(PARTIAL).is_some_and(is_recipe_name) && kept != Some(path.as_path()) {
            std::fs::remove_dir_all(&path).map_err(CorpusError::write(&path))?;
        }
    }
    Ok(())
}

/// Removes the work of a data set that is whole: a process was killed between its last two steps. Called with the lock held. Best
/// effort: it only takes room, and the data set may lie where nobody may write any more.
fn remove_left(work: &Path) {
    let _ = std::fs::remove_dir_all(work);
}

fn reuse(
    request: &PrepareRequest<'_>,
    folder: &Path,
    recipe: &str,
    progress: &mut dyn FnMut(PrepareEvent),
) -> Result<Prepared, CorpusError> {
    let prepared = open(request, folder, recipe)?;
    progress(PrepareEvent::Reused {
        folder: folder.to_owned(),
        version: prepared.manifest.version.clone(),
    });
    Ok(prepared)
}

fn open(request: &PrepareRequest<'_>, folder: &Path, recipe: &str) -> Result<Prepared, CorpusError> {
    let manifest = DataManifest::load(folder)?;
    if manifest.recipe != recipe {
        return Err(CorpusError::corrupt(
            &folder.join(MANIFEST_FILE),
            "was made from other inputs",
        ));
    }
    let tokenizer_path = folder.join(TOKENIZER_FILE);
    build::check_vocabulary(&tokenizer_path, manifest.tokenizer.vocabulary, request.model_vocabulary)?;
    manifest.check_context(request.context)?;
    Ok(Prepared {
        folder: folder.to_owned(),
        manifest,
        tokenizer_path,
    })
}
