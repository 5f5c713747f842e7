//! What was left out and why, with samples: `report.json` for programs, `report.md` for people. Both are functions of the data
//! set's inputs: no times, no paths but names below a domain's own.

use super::document::{DocumentId, Reason, Refined};
use super::pieces::excerpt;
use crate::error::CorpusError;
use crate::files::write_file;
use crate::manifest::FileManifest;
use crate::refine::{BenchmarkItem, Dropped, Shared, mix, program};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

/// File names in a data set's folder.
const REPORT_FILE: &str = "report.json";
const REPORT_TEXT_FILE: &str = "report.md";
/// Samples of one reason in one domain.
const SAMPLES_MAX: usize = 5;
/// Characters of a sample in `report.md`.
const SHOWN_CHARACTERS: usize = 120;
/// Benchmark items that are listed by themselves.
const ITEMS_SHOWN_MAX: usize = 1000;

/// The whole report.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    program: String,
    benchmarks: Vec<BenchmarkReport>,
    domains: Vec<DomainReport>,
}

/// What was found of one benchmark set.
#[derive(Debug, Serialize)]
struct BenchmarkReport {
    name: String,
    items: u64,
    /// Items that are too short to be looked for.
    items_too_short: u64,
    /// Items found in some document.
    items_found: u64,
    documents_left_out: u64,
    /// The first of them: line in the set, documents.
    found: Vec<(u32, u64)>,
}

/// One domain.
#[derive(Debug, Serialize)]
pub(crate) struct DomainReport {
    name: String,
    documents: u64,
    kept: u64,
    /// Kept documents that cleaning changed.
    changed: u64,
    bytes: u64,
    kept_bytes: u64,
    /// By reason, in a fixed order.
    left_out: BTreeMap<Dropped, ReasonReport>,
    #[serde(skip)]
    items: BTreeMap<BenchmarkItem, u64>,
}

/// One reason in one domain.
#[derive(Debug, Default, Serialize)]
struct ReasonReport {
    documents: u64,
    bytes: u64,
    /// Where rule and threshold come from.
    #[serde(skip_serializing_if = "str::is_empty")]
    rule_source: &'static str,
    samples: Vec<Sample>,
}

/// One document that was left out.
#[derive(Debug, Serialize)]
struct Sample {
    source: String,
    record: u64,
    bytes: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    detail: String,
    /// Where the document is that it is a copy of.
    #[serde(skip_serializing_if = "Option::is_none")]
    copy_of: Option<String>,
    text: String,
    /// Decides which samples are kept.
    #[serde(skip)]
    order: u64,
}

impl DomainReport {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            documents: 0,
            kept: 0,
            changed: 0,
            bytes: 0,
            kept_bytes: 0,
            left_out: BTreeMap::new(),
            items: BTreeMap::new(),
        }
    }

    /// Counts a document in; `place` names documents for people.
    pub(crate) fn add(&mut self, document: &Refined, place: &dyn Fn(DocumentId) -> String) {
        self.documents += 1;
        self.bytes += document.original_bytes;
        let Some(reason) = &document.dropped else {
            self.kept += 1;
            self.changed += u64::from(document.is_changed);
            self.kept_bytes += document.text.len() as u64;
            return;
        };
        if let Some(item) = reason.item {
            *self.items.entry(item).or_default() += 1;
        }
        let report = self.left_out.entry(reason.rule).or_default();
        report.rule_source = reason.rule.source();
        report.documents += 1;
        report.bytes += document.original_bytes;
        report.sample(document, reason, place);
    }

    /// Documents, and those that are kept.
    pub(crate) const fn counts(&self) -> (u64, u64) {
        (self.documents, self.kept)
    }

    /// The reasons that left most out, for a message.
    pub(crate) fn main_reasons(&self) -> String {
        let mut reasons: Vec<_> = self
            .left_out
            .iter()
            .map(|(rule, report)| (report.documents, rule.name()))
            .collect();
        reasons.sort_by(|a, b| b.cmp(a));
        let shown: Vec<_> = reasons
            .iter()
            .take(4)
            .map(|(count, name)| format!("{count} by {name}"))
            .collect();
        format!("{} documents, all left out: {}", self.documents, shown.join(", "))
    }
}

impl ReasonReport {
    /// Keeps the few documents whose mixed places are smallest: an even choice that depends on nothing else.
    fn sample(&mut self, document: &Refined, reason: &Reason, place: &dyn Fn(DocumentId) -> String) {
        let order = mix(document.id.0);
        if self.samples.len() == SAMPLES_MAX && self.samples.last().is_some_and(|last| last.order <= order) {
            return;
        }
        let whole = place(document.id);
        let sample = Sample {
            source: whole
                .rsplit_once(':')
                .map_or(whole.clone(), |(source, _)| source.to_owned()),
            record: document.id.record(),
            bytes: document.original_bytes,
            detail: reason.detail.clone(),
            copy_of: reason.copy_of.map(place),
            text: excerpt(&document.text),
            order,
        };
        let at = self.samples.partition_point(|other| other.order < order);
        self.samples.insert(at, sample);
        self.samples.truncate(SAMPLES_MAX);
    }
}

impl Report {
    pub(crate) fn new(shared: &Shared, domains: Vec<DomainReport>) -> Self {
        let mut items: BTreeMap<BenchmarkItem, u64> = BTreeMap::new();
        for (item, count) in domains.iter().flat_map(|domain| &domain.items) {
            *items.entry(*item).or_default() += count;
        }
        let benchmarks = shared.benchmarks().sets().iter().enumerate().map(|(index, set)| {
            let found: Vec<(u32, u64)> = items
                .iter()
                .filter(|(item, _)| item.set as usize == index)
                .map(|(item, count)| (item.line, *count))
                .collect();
            BenchmarkReport {
                name: set.name.clone(),
                items: set.items,
                items_too_short: set.too_short,
                items_found: found.len() as u64,
                documents_left_out: found.iter().map(|(_, count)| count).sum(),
                found: found.into_iter().take(ITEMS_SHOWN_MAX).collect(),
            }
        });
        Self {
            program: program(),
            benchmarks: benchmarks.collect(),
            domains,
        }
    }

    /// Writes both files.
    pub(crate) fn write(&self, folder: &Path) -> Result<(FileManifest, FileManifest), CorpusError> {
        Ok((
            write_file(&folder.join(REPORT_FILE), self.to_json().as_bytes())?,
            write_file(&folder.join(REPORT_TEXT_FILE), self.to_markdown().as_bytes())?,
        ))
    }

    fn to_json(&self) -> String {
        // Strings, numbers and maps with names for keys: this has a JSON form.
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// For people.
    fn to_markdown(&self) -> String {
        let mut out = String::from("# What was left out, and why\n\n");
        out.push_str("| domain | documents | kept | MB | MB kept | changed by cleaning |\n|---|---|---|---|---|---|\n");
        let mega = |bytes: u64| bytes as f64 / 1e6;
        for domain in &self.domains {
            let share = 100.0 * domain.kept as f64 / domain.documents.max(1) as f64;
            // Writing to a string does not fail.
            let _ = writeln!(
                out,
                "| {} | {} | {} ({share:.1}%) | {:.2} | {:.2} | {} |",
                cell(&domain.name),
                domain.documents,
                domain.kept,
                mega(domain.bytes),
                mega(domain.kept_bytes),
                domain.changed
            );
        }
        self.benchmarks_to(&mut out);
        for domain in &self.domains {
            domain.to_markdown(&mut out);
        }
        let _ = writeln!(out, "\nMade by {}.", self.program);
        out
    }

    fn benchmarks_to(&self, out: &mut String) {
        if self.benchmarks.is_empty() {
            return;
        }
        out.push_str("\n## Benchmark sets\n\n| set | items | too short to look for | found | documents left out |\n|---|---|---|---|---|\n");
        for set in &self.benchmarks {
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {} |",
                cell(&set.name),
                set.items,
                set.items_too_short,
                set.items_found,
                set.documents_left_out
            );
        }
    }
}

impl DomainReport {
    fn to_markdown(&self, out: &mut String) {
        if self.left_out.is_empty() {
            return;
        }
        let _ = write!(
            out,
            "\n## {}\n\n| reason | documents | MB | rule from |\n|---|---|---|---|\n",
            cell(&self.name)
        );
        for (rule, report) in &self.left_out {
            let _ = writeln!(
                out,
                "| {} | {} | {:.2} | {} |",
                rule.name(),
                report.documents,
                report.bytes as f64 / 1e6,
                report.rule_source
            );
        }
        out.push('\n');
        for (rule, report) in &self.left_out {
            for sample in &report.samples {
                let copy = sample
                    .copy_of
                    .as_ref()
                    .map_or(String::new(), |place| format!(" copy of {place};"));
                let detail = if sample.detail.is_empty() {
                    String::new()
                } else {
                    format!(" {};", sample.detail)
                };
                let shown: String = sample.text.chars().take(SHOWN_CHARACTERS).collect();
                let _ = writeln!(
                    out,
                    "- **{}** {}:{}:{copy}{detail} `{}`",
                    rule.name(),
                    cell(&sample.source),
                    sample.record,
                    cell(&shown).replace('`', "'")
                );
            }
        }
    }
}

/// Text that stays in its cell of a table.
fn cell(text: &str) -> String {
    text.replace(['\n', '\r', '\t'], " ").replace('|', "\\|")
}
