//! `tarazed data prepare|refine|inspect|decontaminate|export|add`: text to data sets, and questions about them.

use crate::exit::{Exit, Failure};
use crate::outlet::last_words;
use crate::output::{print, print_json, short};
use serde::Serialize;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use tarazed_corpus::{
    CorpusError, DataManifest, DocumentRecord, DomainManifest, MegatronWriter, PrepareEvent, PrepareRequest, Searched,
    Split, TokenStore, decontaminate, find_data_set, prepare_refined, refine_text,
};
use tarazed_domain::DomainIndex;
use tarazed_domain::config::{
    BenchmarkConfig, DataFile, DecontaminateConfig, DomainConfig, Language, RefineConfig, SourceFormat,
};

/// `tarazed data …`
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Clean, filter, deduplicate, decontaminate and tokenise the domains of a config; a run takes the result by data.prepared.
    Prepare(Prepare),
    /// Refine as `prepare` does, and write the text that is kept instead of tokens.
    Refine(Prepare),
    /// Show what a data set holds, what was left out and why, or where a token comes from.
    Inspect(Inspect),
    /// Look for text of benchmark sets in source files; with --out, write what is free of it.
    Decontaminate(Decontaminate),
    /// Write the tokens of a domain as Megatron reads them.
    Export(Export),
    /// Bring domains of a prepared data set into a running training, or replace the text of some, from a stated step on.
    Add(super::data_add::Args),
}

/// Options of `tarazed data prepare`.
#[derive(Debug, clap::Args)]
pub struct Prepare {
    /// A run's config, or a file with a [data] section alone. Without [data.refine] in it, the defaults of that section hold.
    config: PathBuf,
    /// Override a key, e.g. --set data.refine.quality.enabled=false.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Folder for the result; a data set gets a folder of its own in it, named after its inputs. What is there already is found,
    /// and what was begun is gone on with.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print the events as JSON lines, on standard output.
    #[arg(long)]
    json: bool,
}

/// Options of `tarazed data inspect`.
#[derive(Debug, clap::Args)]
pub struct Inspect {
    /// A data set's folder, or the folder that `prepare --out` named.
    dir: PathBuf,
    /// Only this domain.
    #[arg(long, value_name = "NAME")]
    domain: Option<String>,
    /// Where this token of the domain comes from: its position in the split's stream.
    #[arg(long, value_name = "N", requires = "domain")]
    token: Option<u64>,
    /// Of the held-out split, not the training split.
    #[arg(long, requires = "token")]
    held_out: bool,
    /// Check the hash of every token first.
    #[arg(long)]
    check: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Options of `tarazed data decontaminate`.
#[derive(Debug, clap::Args)]
pub struct Decontaminate {
    /// Files or folders of JSON lines, parquet or text.
    #[arg(required = true)]
    inputs: Vec<PathBuf>,
    /// A benchmark set: JSON lines, or text with an item a line. May be given several times.
    #[arg(long, value_name = "NAME=FILE", required = true)]
    against: Vec<String>,
    /// JSON or parquet field that holds the text.
    #[arg(long, value_name = "NAME", default_value = "text")]
    text_field: String,
    /// Write documents without benchmark text here, as JSON lines, and an index of the others to FILE.dropped.jsonl.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Options of `tarazed data export`.
#[derive(Debug, clap::Args)]
pub struct Export {
    /// A data set's folder, or the folder that `prepare --out` named.
    dir: PathBuf,
    /// The domain.
    #[arg(long, value_name = "NAME")]
    domain: String,
    /// The held-out split, not the training split.
    #[arg(long)]
    held_out: bool,
    /// PREFIX.bin and PREFIX.idx are written.
    #[arg(long, value_name = "PREFIX")]
    to: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// Refused where config or input must change; halted where a disk is full or a data set is damaged; else transient.
pub fn run(command: &Command) -> Result<Exit, Failure> {
    match command {
        Command::Prepare(args) => prepare(args),
        Command::Refine(args) => refine(args),
        Command::Inspect(args) => inspect(args),
        Command::Decontaminate(args) => look(args),
        Command::Export(args) => export(args),
        Command::Add(args) => super::data_add::run(args),
    }?;
    Ok(Exit::Done)
}

fn load(args: &Prepare) -> Result<DataFile, Failure> {
    let file = DataFile::load(&args.config, &args.set)?;
    if file.data.prepared.is_some() {
        return Err(Failure::refused(
            "data.prepared",
            "names data that are prepared already",
            "leave it out to prepare the domains' own files",
        ));
    }
    Ok(file)
}

impl Prepare {
    /// Events go to standard error, so that standard output has the result alone; as JSON, all go to standard output.
    fn tell(&self, event: &PrepareEvent) {
        if self.json {
            // A reader who has gone wants no more events; the data set is made all the same.
            let _ = print_json_line(event);
        } else {
            last_words(&event.to_string());
        }
    }
}

fn prepare(args: &Prepare) -> Result<(), Failure> {
    let file = load(args)?;
    let request = PrepareRequest {
        domains: &file.data.domains,
        tokenizer: &file.data.tokenizer,
        model_vocabulary: file.model_vocabulary,
        held_out_fraction: file.data.held_out_fraction,
        context: file.context,
    };
    let refine = refine_of(&request, file.data.refine.as_ref())?;
    let prepared = prepare_refined(&request, refine.as_ref(), false, &args.out, &mut |event| {
        args.tell(&event)
    })?;
    if args.json {
        return print_json_line(
            &serde_json::json!({ "folder": prepared.folder, "version": prepared.manifest.version }),
        );
    }
    let mut text = overview(&prepared.manifest, None);
    let _ = writeln!(text, "{}", short(&prepared.folder).display());
    print(&text)
}

fn refine(args: &Prepare) -> Result<(), Failure> {
    let file = load(args)?;
    let config = file.data.refine.clone().unwrap_or_default();
    let counts = refine_text(&file.data.domains, &config, &args.out, &mut |event| args.tell(&event))?;
    let mut text = String::new();
    for (domain, (documents, kept)) in file.data.domains.iter().zip(counts) {
        if args.json {
            print_json_line(&serde_json::json!({ "domain": domain.name, "documents": documents, "kept": kept }))?;
        } else {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{}: {kept} of {documents} documents kept", domain.name);
        }
    }
    print(&text)
}

/// Domains of tokens hold no text to refine; a data set of these alone is taken as it is. Settings for it would do nothing, and
/// whoever named benchmark sets would take the tokens for free of them: that is refused.
fn refine_of(request: &PrepareRequest<'_>, refine: Option<&RefineConfig>) -> Result<Option<RefineConfig>, Failure> {
    let only_tokens = request.domains.iter().all(|domain| domain.format.is_tokens());
    match refine {
        Some(_) if only_tokens => Err(Failure::refused(
            "data.refine",
            "every domain holds tokens, and no text to refine or to search for benchmark sets",
            "leave the section out to take the tokens as they are, or give the domains' text",
        )),
        None if only_tokens => Ok(None),
        refine => Ok(Some(refine.cloned().unwrap_or_default())),
    }
}

fn print_json_line(value: &impl Serialize) -> Result<(), Failure> {
    // Events and names always have a JSON form.
    print(&(serde_json::to_string(value).unwrap_or_default() + "\n"))
}

// --- inspect ----------------------------------------------------------------------------------------------------------

fn inspect(args: &Inspect) -> Result<(), Failure> {
    let folder = find_data_set(&args.dir)?;
    let manifest = DataManifest::load(&folder)?;
    let domain = args.domain.as_ref().map(|name| index_of(&manifest, name)).transpose()?;
    if args.check {
        TokenStore::open(&folder, 1)?.check_all()?;
    }
    if let (Some(domain), Some(token)) = (domain, args.token) {
        let split = split_of(args.held_out);
        let origin = origin(&folder, domain, split, token)?;
        return if args.json {
            print_json(&origin)
        } else {
            print(&origin.to_text())
        };
    }
    match (args.json, domain) {
        (true, Some(domain)) => print_json(manifest.domain(domain)),
        (true, None) => print_json(&manifest),
        (false, domain) => print(&overview(&manifest, domain)),
    }
}

const fn split_of(is_held_out: bool) -> Split {
    if is_held_out { Split::HeldOut } else { Split::Train }
}

fn index_of(manifest: &DataManifest, name: &str) -> Result<DomainIndex, Failure> {
    let at = manifest.domains.iter().position(|domain| domain.name == name);
    let names: Vec<_> = manifest.domains.iter().map(|domain| domain.name.as_str()).collect();
    at.map(|at| DomainIndex(at as u16)).ok_or_else(|| {
        Failure::refused(
            "--domain",
            format!("'{name}' is not in the data set"),
            format!("name one of: {}", names.join(", ")),
        )
    })
}

/// A data set, or one domain of it, for people.
fn overview(manifest: &DataManifest, only: Option<DomainIndex>) -> String {
    let mut text = format!(
        "version {}\ntokenizer {} entries; {}\n",
        manifest.version,
        manifest.tokenizer.vocabulary,
        manifest
            .refinement
            .as_ref()
            .map_or("text as it came", |r| r.program.as_str()),
    );
    let mut rows = vec![
        [
            "domain",
            "language",
            "version",
            "documents",
            "left out",
            "training tokens",
            "held-out tokens",
        ]
        .map(str::to_owned),
    ];
    let shown = |index: usize| only.is_none_or(|only| only.index() == index);
    let domains: Vec<&DomainManifest> = manifest
        .domains
        .iter()
        .enumerate()
        .filter(|(i, _)| shown(*i))
        .map(|(_, d)| d)
        .collect();
    for domain in &domains {
        rows.push([
            domain.name.clone(),
            domain.language.name().to_owned(),
            domain.version.as_deref().map_or("-", brief).to_owned(),
            (domain.train.documents + domain.held_out.documents).to_string(),
            domain.dropped.values().sum::<u64>().to_string(),
            domain.train.tokens.to_string(),
            domain.held_out.tokens.to_string(),
        ]);
    }
    for row in &rows {
        for (column, cell) in row.iter().enumerate() {
            let width = rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
            // Writing to a string does not fail.
            let _ = if column == 0 {
                write!(text, "{cell:width$}")
            } else {
                write!(text, "  {cell:>width$}")
            };
        }
        text.push('\n');
    }
    for domain in domains.iter().filter(|domain| !domain.dropped.is_empty()) {
        let reasons: Vec<_> = domain
            .dropped
            .iter()
            .map(|(rule, count)| format!("{} {count}", rule.name()))
            .collect();
        let _ = writeln!(text, "{} left out: {}", domain.name, reasons.join(", "));
    }
    text
}

/// Enough of a hash to tell versions apart by eye.
fn brief(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

/// Where a token comes from (DATA-3).
#[derive(Debug, Serialize)]
struct Origin {
    domain: String,
    domain_version: Option<String>,
    split: &'static str,
    token: u64,
    id: u32,
    data_version: String,
    refinement: Option<String>,
    source: String,
    source_blake3: String,
    document: DocumentRecord,
    /// The text around it.
    text: String,
}

/// Tokens shown on either side of the one asked for.
const AROUND_TOKENS: u64 = 24;

fn origin(folder: &Path, domain: DomainIndex, split: Split, token: u64) -> Result<Origin, Failure> {
    let store = TokenStore::open(folder, 1)?;
    let manifest = store.manifest();
    let described = manifest.domain(domain);
    let count = described.split(split).tokens;
    if token >= count {
        return Err(Failure::refused(
            "--token",
            format!(
                "is {token}, and the {} split of '{}' has {count} tokens",
                split.name(),
                described.name
            ),
            "give a smaller one",
        ));
    }
    let lost = || CorpusError::NoDataSet {
        path: folder.join(&described.documents.name),
        reason: format!("token {token} is in no document: the index is incomplete; prepare the data again"),
    };
    let document = store.document_at(domain, split, token)?.ok_or_else(lost)?;
    let source = described.sources.get(document.source as usize).ok_or_else(lost)?;
    let kept = document.kept.ok_or_else(lost)?;
    let from = token.saturating_sub(AROUND_TOKENS).max(kept.start);
    let to = (token + AROUND_TOKENS + 1).min(kept.start + kept.tokens);
    let mut around = vec![0; (to - from) as usize];
    store.tokens(domain, split, from, &mut around)?;
    Ok(Origin {
        domain: described.name.clone(),
        domain_version: described.version.clone(),
        split: split.name(),
        token,
        id: around[(token - from) as usize],
        data_version: manifest.version.clone(),
        refinement: manifest
            .refinement
            .as_ref()
            .map(|refinement| refinement.program.clone()),
        source: source.name.clone(),
        source_blake3: source.blake3.clone(),
        text: store.tokenizer()?.decode(&around)?,
        document,
    })
}

impl Origin {
    fn to_text(&self) -> String {
        let document = &self.document;
        let mut text = format!(
            "token {} of the {} split of '{}' is {}\nsource   {}, record {} (file BLAKE3 {})\ndocument BLAKE3 {}, {} bytes\ndata     {}\n",
            self.token,
            self.split,
            self.domain,
            self.id,
            self.source,
            document.record,
            self.source_blake3,
            document.blake3,
            document.text_bytes,
            self.data_version,
        );
        let refined = match (&self.refinement, &document.refined) {
            (Some(program), Some(refined)) => match &refined.original_blake3 {
                Some(original) => format!("{program}; cleaned, before that BLAKE3 {original}"),
                None => format!("{program}; unchanged"),
            },
            _ => "as it came".to_owned(),
        };
        let _ = writeln!(text, "text     {refined}\n\n{}", self.text);
        text
    }
}

// --- decontaminate ----------------------------------------------------------------------------------------------------

fn look(args: &Decontaminate) -> Result<(), Failure> {
    let sets = args.against.iter().map(|item| {
        let (name, path) = item
            .split_once('=')
            .filter(|(name, path)| !name.is_empty() && !path.is_empty())
            .ok_or_else(|| {
                Failure::refused(
                    "--against",
                    format!("'{item}' is no NAME=FILE"),
                    "write e.g. gsm8k=test.jsonl",
                )
            })?;
        Ok(BenchmarkConfig {
            name: name.to_owned(),
            path: path.into(),
            fields: Vec::new(),
        })
    });
    let config = DecontaminateConfig {
        sets: sets.collect::<Result<_, Failure>>()?,
        ..DecontaminateConfig::default()
    };
    let domains: Vec<DomainConfig> = args
        .inputs
        .iter()
        .map(|path| domain_of(path, &args.text_field))
        .collect();
    let document_bytes_max = RefineConfig::default().document_bytes_max;
    let mut out = args.out.as_ref().map(|path| Sorted::create(path)).transpose()?;
    let found = decontaminate(&domains, &config, document_bytes_max, &mut |searched| match &mut out {
        Some(out) => out.push(&searched),
        None => Ok(()),
    })?;
    if let Some(out) = out {
        out.finish()?;
    }
    if args.json {
        return print_json(&found);
    }
    let mut text = String::new();
    for one in &found.found {
        let _ = writeln!(
            text,
            "{}:{}: {} line {}, {} groups",
            one.source, one.record, one.set, one.item, one.groups
        );
    }
    for (name, items, too_short) in &found.sets {
        let _ = writeln!(text, "{name}: {items} items, {too_short} too short to look for");
    }
    let _ = writeln!(
        text,
        "{} documents, {} with benchmark text, {} records not readable",
        found.documents,
        found.found.len(),
        found.unreadable
    );
    print(&text)
}

/// A source that is no domain of a config.
pub(super) fn domain_of(path: &Path, text_field: &str) -> DomainConfig {
    DomainConfig {
        name: path.display().to_string(),
        path: path.to_owned(),
        format: SourceFormat::Auto,
        language: Language::En,
        weight: 1.0,
        text_field: text_field.to_owned(),
    }
}

/// Texts without benchmark text, and an index of the other records beside them.
struct Sorted {
    clean: Lines,
    dropped: Lines,
}

impl Sorted {
    fn create(path: &Path) -> Result<Self, CorpusError> {
        let mut beside = path.as_os_str().to_owned();
        beside.push(".dropped.jsonl");
        Ok(Self {
            clean: Lines::create(path)?,
            dropped: Lines::create(Path::new(&beside))?,
        })
    }

    fn push(&mut self, searched: &Searched<'_>) -> Result<(), CorpusError> {
        match searched {
            Searched::Clean(text) => self.clean.push(&serde_json::json!({ "text": text })),
            Searched::Dropped(record) => self.dropped.push(record),
        }
    }

    /// The index first: whoever finds the texts finds it, too.
    fn finish(self) -> Result<(), CorpusError> {
        self.dropped.finish()?;
        self.clean.finish()
    }
}

/// JSON lines that appear under their name when all of them are there.
struct Lines {
    path: PathBuf,
    file: NewFile,
}

impl Lines {
    fn create(path: &Path) -> Result<Self, CorpusError> {
        let file = NewFile::create(path).map_err(|source| CorpusError::Write {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    fn push(&mut self, value: &impl Serialize) -> Result<(), CorpusError> {
        // Strings, numbers and names: this has a JSON form.
        let line = serde_json::to_string(value).unwrap_or_default();
        writeln!(self.file.writer, "{line}").map_err(|source| CorpusError::Write {
            path: self.path.clone(),
            source,
        })
    }

    fn finish(self) -> Result<(), CorpusError> {
        let Self { path, file } = self;
        file.finish().map_err(|source| CorpusError::Write { path, source })
    }
}

/// A file that must not be there, and appears under its name whole and on disk, or not at all.
pub(super) struct NewFile {
    path: PathBuf,
    partial: PathBuf,
    pub(super) writer: std::io::BufWriter<std::fs::File>,
}

impl NewFile {
    pub(super) fn create(path: &Path) -> std::io::Result<Self> {
        if path.exists() {
            return Err(std::io::ErrorKind::AlreadyExists.into());
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let writer = std::io::BufWriter::new(std::fs::File::create(&partial)?);
        Ok(Self {
            path: path.to_owned(),
            partial,
            writer,
        })
    }

    pub(super) fn finish(mut self) -> std::io::Result<()> {
        self.writer.flush()?;
        self.writer.get_ref().sync_all()?;
        std::fs::rename(&self.partial, &self.path)?;
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        std::fs::File::open(folder.unwrap_or_else(|| Path::new(".")))?.sync_all()
    }
}

impl Drop for NewFile {
    /// Best effort: after a failure what is half written goes; after [`NewFile::finish`] there is nothing under that name.
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.partial);
    }
}

// --- export -----------------------------------------------------------------------------------------------------------

fn export(args: &Export) -> Result<(), Failure> {
    let folder = find_data_set(&args.dir)?;
    let store = TokenStore::open(&folder, 1)?;
    let domain = index_of(store.manifest(), &args.domain)?;
    let split = split_of(args.held_out);
    let mut writer = MegatronWriter::create(&args.to, store.manifest().tokenizer.vocabulary)?;
    let (mut documents, mut tokens) = (0_u64, Vec::new());
    store.documents(domain, &mut |record| {
        if let Some(kept) = record.kept.filter(|kept| kept.split == split) {
            tokens.resize(kept.tokens as usize, 0);
            store.tokens(domain, split, kept.start, &mut tokens)?;
            writer.push(&tokens)?;
            documents += 1;
        }
        Ok(true)
    })?;
    writer.finish()?;
    print(&format!(
        "{}.bin, .idx: {documents} documents, {} tokens\n",
        args.to.display(),
        store.manifest().domain(domain).split(split).tokens
    ))
}
