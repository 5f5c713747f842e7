//! Refining without tokens: the text that is kept, as JSON lines, for whoever trains with something else.

use crate::documents::{DroppedRecord, NamedItem, NamedPlace};
use crate::error::CorpusError;
use crate::files::{HashingFile, sync_folder};
use crate::pipeline::{Checked, DocumentId, DomainReport, Pipeline, Refined, Report};
use crate::prepare::{DomainInput, PrepareEvent, domain_stem, lock, read_inputs};
use crate::refine::program;
use serde::Serialize;
use std::path::{Path, PathBuf};
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
/// must not be there, with an index of what is left out, `NNN-name.dropped.jsonl` ([`DroppedRecord`]), and the reports. Returns how many documents each domain had, and how many are kept. A process that is
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
    refuse_existing(out)?;
    let checked = Checked::new(config, domains)?;
    let parent = out
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or_else(|| Path::new("."));
    std::fs::create_dir_all(parent).map_err(CorpusError::write(parent))?;
    let _lock = lock(parent, progress)?;
    // Whoever held the lock may have made it.
    refuse_existing(out)?;
    let inputs = read_inputs(domains, progress)?;
    let (work, partial) = (beside(out, ".work"), beside(out, ".partial"));
    let written = Pipeline::run_for(&identity(&checked, &inputs), &checked, &inputs, &work, progress)
        .and_then(|pipeline| write(&pipeline, &inputs, &partial));
    let counts = match written {
        Ok(counts) => counts,
        Err(error) => {
            // Best effort: neither is ever taken for the text.
            if !error.keeps_work() {
                let _ = std::fs::remove_dir_all(&work);
            }
            let _ = std::fs::remove_dir_all(&partial);
            return Err(error);
        }
    };
    std::fs::rename(&partial, out).map_err(CorpusError::write(out))?;
    sync_folder(parent)?;
    std::fs::remove_dir_all(&work).map_err(CorpusError::write(&work))?;
    Ok(counts)
}

fn refuse_existing(out: &Path) -> Result<(), CorpusError> {
    if out.exists() {
        return Err(CorpusError::write(out)(std::io::ErrorKind::AlreadyExists.into()));
    }
    Ok(())
}

fn beside(out: &Path, ending: &str) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// Work of other inputs or settings is not gone on with. The folder has no name of its own, so this names all that decides what
/// becomes of a document.
fn identity(checked: &Checked<'_>, inputs: &[DomainInput<'_>]) -> String {
    let domains: Vec<_> = inputs
        .iter()
        .map(|input| {
            let DomainConfig {
                name,
                language,
                text_field,
                ..
            } = input.config;
            (name, language, text_field, &input.sources)
        })
        .collect();
    serde_json::json!([program(), checked.text(), domains]).to_string()
}

/// Writes the text that is kept, and the reports, to a new folder. Returns how many documents each domain had, and how many are
/// kept.
fn write(pipeline: &Pipeline, inputs: &[DomainInput<'_>], folder: &Path) -> Result<Vec<(u64, u64)>, CorpusError> {
    if folder.exists() {
        std::fs::remove_dir_all(folder).map_err(CorpusError::write(folder))?;
    }
    std::fs::create_dir(folder).map_err(CorpusError::write(folder))?;
    let (mut reports, mut counts) = (Vec::new(), Vec::new());
    for (index, input) in inputs.iter().enumerate() {
        let mut report = DomainReport::new(&input.config.name);
        let stem = domain_stem(index, &input.config.name);
        let mut file = HashingFile::create(&folder.join(format!("{stem}.jsonl")))?;
        let mut left_out = HashingFile::create(&folder.join(format!("{stem}.dropped.jsonl")))?;
        pipeline.documents(index, &mut |document| {
            report.add(&document, &|id| crate::prepare::place_text(inputs, id));
            if let Some(record) = dropped_record(pipeline, inputs, &document) {
                return write_line(&mut left_out, &record);
            }
            let line = Line {
                text: &document.text,
                source: &input.sources[document.id.source() as usize].name,
                record: document.id.record(),
            };
            write_line(&mut file, &line)
        })?;
        file.finish()?;
        left_out.finish()?;
        counts.push(report.counts());
        reports.push(report);
    }
    Report::new(pipeline.shared(), reports).write(folder)?;
    sync_folder(folder)?;
    Ok(counts)
}

fn write_line(file: &mut HashingFile, line: &impl Serialize) -> Result<(), CorpusError> {
    // Strings, numbers and names: this has a JSON form.
    let mut bytes = serde_json::to_vec(line).unwrap_or_default();
    bytes.push(b'\n');
    file.write(&bytes)
}

/// What the index says of a document; none where it is kept.
fn dropped_record(pipeline: &Pipeline, inputs: &[DomainInput<'_>], document: &Refined) -> Option<DroppedRecord> {
    let reason = document.dropped.as_ref()?;
    let sets = pipeline.shared().benchmarks().sets();
    Some(DroppedRecord {
        place: named(inputs, document.id),
        blake3: blake3::Hash::from_bytes(document.original).to_hex().to_string(),
        text_bytes: document.original_bytes,
        dropped: reason.rule,
        detail: reason.detail.clone(),
        copy_of: reason.copy_of.map(|id| named(inputs, id)),
        item: reason.item.map(|item| NamedItem {
            set: sets[item.set as usize].name.clone(),
            line: item.line,
        }),
    })
}

fn named(inputs: &[DomainInput<'_>], id: DocumentId) -> NamedPlace {
    let input = &inputs[id.domain()];
    NamedPlace {
        domain: input.config.name.clone(),
        source: input.sources[id.source() as usize].name.clone(),
        record: id.record(),
    }
}
