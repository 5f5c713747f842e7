//! Refining without tokens: the text that is kept, as JSON lines, for whoever trains with something else.

use crate::error::CorpusError;
use crate::files::{HashingFile, sync_folder};
use crate::pipeline::{self, Pipeline, Report};
use crate::prepare::{PrepareEvent, domain_stem, lock, read_inputs};
use crate::refine::program;
use serde::Serialize;
use std::path::Path;
use tarazed_domain::config::{DomainConfig, RefineConfig};

/// One line of the text.
#[derive(Serialize)]
struct Line<'a> {
    text: &'a str,
    /// Its source file, relative to the domain's path, and its line or row in it.
    source: &'a str,
    record: u64,
}

/// Refines the text of `domains` as [`crate::prepare_refined`] does, and writes what is kept to `NNN-name.jsonl` in `out`, which
/// must not be there, with the reports. Returns how many documents each domain had, and how many are kept. A process that is
/// killed leaves `out.work` beside it, from which the next one goes on.
///
/// # Errors
/// As [`crate::prepare_refined`]; [`CorpusError::Write`] also where `out` is there.
pub fn refine_text(
    domains: &[DomainConfig],
    config: &RefineConfig,
    out: &Path,
    progress: &mut dyn FnMut(PrepareEvent),
) -> Result<Vec<(u64, u64)>, CorpusError> {
    if out.exists() {
        return Err(CorpusError::write(out)(std::io::ErrorKind::AlreadyExists.into()));
    }
    let beside = |ending: &str| {
        let mut name = out.as_os_str().to_owned();
        name.push(ending);
        std::path::PathBuf::from(name)
    };
    let parent = out
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or_else(|| Path::new("."));
    std::fs::create_dir_all(parent).map_err(CorpusError::write(parent))?;
    let _lock = lock(parent, progress)?;
    let inputs = read_inputs(domains, progress)?;
    // Work of other inputs or settings is not gone on with.
    let sources: Vec<_> = inputs
        .iter()
        .map(|input| (&input.config.name, input.config.language, &input.sources))
        .collect();
    let identity = serde_json::json!([program(), pipeline::settings_text(config)?, sources]).to_string();
    let work = beside(".work");
    let pipeline = Pipeline::run_for(&identity, config, &inputs, &work, progress)?;
    let partial = beside(".partial");
    if partial.exists() {
        std::fs::remove_dir_all(&partial).map_err(CorpusError::write(&partial))?;
    }
    std::fs::create_dir(&partial).map_err(CorpusError::write(&partial))?;
    let (mut reports, mut counts) = (Vec::new(), Vec::new());
    for (index, input) in inputs.iter().enumerate() {
        let mut report = pipeline::DomainReport::new(&input.config.name);
        let path = partial.join(format!("{}.jsonl", domain_stem(index, &input.config.name)));
        let mut file = HashingFile::create(&path)?;
        pipeline.documents(index, &mut |document| {
            report.add(&document, &|id| crate::prepare::place_text(&inputs, id));
            if document.dropped.is_some() {
                return Ok(());
            }
            let line = Line {
                text: &document.text,
                source: &input.sources[document.id.source() as usize].name,
                record: document.id.record(),
            };
            // Strings and a number: this has a JSON form.
            let mut bytes = serde_json::to_vec(&line).unwrap_or_default();
            bytes.push(b'\n');
            file.write(&bytes)
        })?;
        file.finish()?;
        counts.push(report.counts());
        reports.push(report);
    }
    Report::new(pipeline.shared(), reports).write(&partial)?;
    sync_folder(&partial)?;
    std::fs::rename(&partial, out).map_err(CorpusError::write(out))?;
    sync_folder(parent)?;
    std::fs::remove_dir_all(&work).map_err(CorpusError::write(&work))?;
    Ok(counts)
}
