//! Preparing text against datatrove, English and Chinese: rules and near copies, and text to tokens, on the same JSON lines and as
//! many cores, alternating in one run. The clock runs from the files to the files.
//!
//! Refining, ours does more (cleaning, languages, exact copies); the peer has no such stage here. In Chinese the steps are the same
//! and their units are not: it cuts words with jieba, where ours goes by characters. Tokens come from the same `tokenizer.json`.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Deserialize;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use tarazed_corpus::{PrepareRequest, prepare, refine_text, train_tokenizer};
use tarazed_domain::config::{DomainConfig, Language, RefineConfig, SourceFormat, TokenizerConfig};
use tarazed_tests::figures::{self, Figures, Summary};
use tarazed_tests::peer::Peer;

/// Entries of the tokenizer that both sides take.
const VOCABULARY: usize = 8192;
/// Text that it is trained on.
const TRAIN_BYTES_MAX: u64 = 4_000_000;

/// What is timed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum Step {
    /// Rules and near copies.
    Refine,
    /// Text to tokens, without any rule.
    Tokens,
}

impl Step {
    const fn name(self) -> &'static str {
        match self {
            Self::Refine => "refine",
            Self::Tokens => "tokens",
        }
    }
}

#[derive(Parser)]
#[command(about = "Times refining and tokenising text against datatrove")]
struct Arguments {
    /// English JSON lines with a field `text`; made from the corpus that ships where it is absent.
    #[arg(long)]
    input: Option<PathBuf>,
    /// The same in Chinese.
    #[arg(long)]
    input_zh: Option<PathBuf>,
    /// Steps that are timed.
    #[arg(long, value_delimiter = ',', default_value = "refine,tokens")]
    steps: Vec<Step>,
    /// MB of text to make of each language.
    #[arg(long, default_value_t = 32)]
    megabytes: u64,
    /// Python with datatrove; without it ours alone is timed.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Threads of ours, processes of theirs.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Timed rounds, after one that warms up.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Write the results here as JSON, too.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Ready {
    version: String,
}

#[derive(Deserialize)]
struct Answer {
    seconds: f64,
    /// Documents kept, or tokens.
    count: u64,
    peak_kib: u64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    println!("{}", figures::machine());
    println!("commit {}, load average {}", figures::commit(), figures::load_average());
    rayon::ThreadPoolBuilder::new()
        .num_threads(arguments.threads)
        .build_global()?;
    let place = tempfile::tempdir().context("no folder for the inputs")?;
    let inputs = place.path().join("inputs");
    let mut texts = Vec::new();
    for (language, given) in [(Language::En, &arguments.input), (Language::Zh, &arguments.input_zh)] {
        let text = Text::make(language, given.as_deref(), &arguments, &inputs)?;
        println!(
            "{}: {} documents, {:.1} MB of text in {} files",
            language.name(),
            text.documents,
            text.bytes as f64 / 1e6,
            arguments.threads
        );
        texts.push(text);
    }
    let tokenizer = place.path().join("tokenizer.json");
    let domains: Vec<DomainConfig> = texts.iter().map(Text::domain).collect();
    std::fs::write(&tokenizer, train_tokenizer(&domains, VOCABULARY, TRAIN_BYTES_MAX)?.1)?;
    let mut peer = arguments
        .python
        .as_ref()
        .map(|python| start(python, &inputs, place.path(), arguments.threads, &tokenizer))
        .transpose()?;
    let mut figures = Figures::new("data");
    let mut peak_kib = 0;
    for text in &texts {
        for &step in &arguments.steps {
            let mut timed = Timed::default();
            for round in 0..=arguments.rounds {
                let name = format!("{}-{}-{round}", step.name(), text.language.name());
                let ours = run_ours(step, text, &tokenizer, &place.path().join(format!("ours-{name}")))?;
                let theirs = match &mut peer {
                    Some((peer, _)) => {
                        let answer: Answer = peer.ask(&format!("{} {} {name}", step.name(), text.language.name()))?;
                        peak_kib = peak_kib.max(answer.peak_kib);
                        Some((answer.seconds, answer.count))
                    }
                    None => None,
                };
                // The first warms up.
                timed.add(round > 0, ours, theirs);
            }
            let version = peer.as_ref().map_or("nobody", |(_, version)| version);
            figures = timed.report(step, text, version, figures);
        }
    }
    println!(
        "peak memory: ours {} MiB in all, theirs {} MiB in the largest process",
        own_peak_mib(),
        peak_kib / 1024
    );
    println!("load average at the end {}", figures::load_average());
    if let Some(path) = arguments.json {
        std::fs::write(path, serde_json::to_string_pretty(&figures.with_context())?)?;
    }
    Ok(())
}

fn start(python: &Path, inputs: &Path, work: &Path, processes: usize, tokenizer: &Path) -> Result<(Peer, String)> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/datatrove_peer.py");
    let mut command = Command::new(python);
    command
        .arg(script)
        .arg(inputs)
        .arg(work.join("theirs"))
        .arg(processes.to_string())
        .arg(tokenizer);
    let mut peer = Peer::start("datatrove", &mut command)?;
    let Ready { version } = peer.answer()?;
    Ok((peer, version))
}

/// Seconds, and documents kept or tokens without those that end documents.
fn run_ours(step: Step, text: &Text, tokenizer: &Path, out: &Path) -> Result<(f64, u64)> {
    let domains = [text.domain()];
    let started = Instant::now();
    let count = match step {
        Step::Refine => {
            let counts = refine_text(&domains, &RefineConfig::default(), out, &mut |_| {})?;
            counts.iter().map(|(_, kept)| kept).sum()
        }
        Step::Tokens => {
            let config = TokenizerConfig {
                path: Some(tokenizer.to_owned()),
                vocabulary: 0,
                train_bytes_max: TRAIN_BYTES_MAX,
            };
            let request = PrepareRequest {
                domains: &domains,
                tokenizer: &config,
                model_vocabulary: VOCABULARY,
                held_out_fraction: 0.0,
                context: 1,
            };
            let prepared = prepare(&request, out, &mut |_| {})?;
            let splits = prepared.manifest.domains.iter().map(|domain| &domain.train);
            splits.map(|split| split.tokens - split.documents).sum()
        }
    };
    Ok((started.elapsed().as_secs_f64(), count))
}

/// What the rounds of one step on one text took.
#[derive(Default)]
struct Timed {
    ours_s: Vec<f64>,
    theirs_s: Vec<f64>,
    ours: u64,
    theirs: u64,
}

impl Timed {
    fn add(&mut self, counts: bool, ours: (f64, u64), theirs: Option<(f64, u64)>) {
        self.ours = ours.1;
        self.theirs = theirs.map_or(0, |(_, count)| count);
        if counts {
            self.ours_s.push(ours.0);
            self.theirs_s.extend(theirs.map(|(seconds, _)| seconds));
        }
    }

    fn report(&self, step: Step, text: &Text, peer: &str, figures: Figures) -> Figures {
        let name = |rest: &str| format!("{}_{}_{rest}", step.name(), text.language.name());
        let what = match step {
            Step::Refine => "documents kept",
            Step::Tokens => "tokens",
        };
        println!("{} {}:", step.name(), text.language.name());
        let rate = |seconds: f64| text.bytes as f64 / seconds / 1e6;
        let ours = Summary::of(&self.ours_s);
        println!(
            "  ours    {:>7.2} MB/s, {} {what}  (seconds {ours})",
            rate(ours.median),
            self.ours
        );
        let mut figures = figures
            .number(&name("megabytes"), text.bytes as f64 / 1e6)
            .summary(&name("ours_s"), ours);
        if !self.theirs_s.is_empty() {
            let theirs = Summary::of(&self.theirs_s);
            let ratios: Vec<f64> = self
                .theirs_s
                .iter()
                .zip(&self.ours_s)
                .map(|(theirs, ours)| theirs / ours)
                .collect();
            let ratio = Summary::of(&ratios);
            println!(
                "  {peer}  {:>7.2} MB/s, {} {what}  (seconds {theirs})",
                rate(theirs.median),
                self.theirs
            );
            println!("  throughput of ours over theirs, by round: {ratio}");
            figures = figures
                .summary(&name("theirs_s"), theirs)
                .summary(&name("ratio"), ratio);
        }
        figures
    }
}

/// Text of one language, in a folder of its own.
struct Text {
    language: Language,
    folder: PathBuf,
    documents: u64,
    bytes: u64,
}

impl Text {
    fn make(language: Language, given: Option<&Path>, arguments: &Arguments, inputs: &Path) -> Result<Self> {
        let folder = inputs.join(language.name());
        std::fs::create_dir_all(&folder)?;
        let texts = match given {
            Some(path) => read_texts(path)?,
            None => mixed_texts(language, arguments.megabytes * 1_000_000)?,
        };
        let (documents, bytes) = write_texts(&texts, arguments.threads, &folder)?;
        Ok(Self {
            language,
            folder,
            documents,
            bytes,
        })
    }

    fn domain(&self) -> DomainConfig {
        DomainConfig {
            name: self.language.name().to_owned(),
            path: self.folder.clone(),
            format: SourceFormat::Auto,
            language: self.language,
            weight: 1.0,
            text_field: "text".to_owned(),
        }
    }
}

/// One file for each thread, so that the peer can cut its work up.
fn write_texts(texts: &[String], threads: usize, folder: &Path) -> Result<(u64, u64)> {
    ensure!(!texts.is_empty(), "no text");
    let share = texts.len().div_ceil(threads);
    for (index, part) in texts.chunks(share).enumerate() {
        let mut file = std::io::BufWriter::new(std::fs::File::create(folder.join(format!("{index:03}.jsonl")))?);
        for (id, text) in part.iter().enumerate() {
            writeln!(
                file,
                "{}",
                serde_json::json!({ "id": format!("{index}-{id}"), "text": text })
            )?;
        }
        file.flush()?;
    }
    Ok((texts.len() as u64, texts.iter().map(|text| text.len() as u64).sum()))
}

fn read_texts(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let read = |line: &str| {
        let value: serde_json::Value = serde_json::from_str(line)?;
        Ok(value["text"].as_str().context("a line without text")?.to_owned())
    };
    text.lines().filter(|line| !line.is_empty()).map(read).collect()
}

/// How prose of the corpus that ships is found, and put together again.
struct Prose {
    files: &'static [&'static str],
    /// What ends a sentence.
    end: &'static str,
    /// Characters of a sentence that is taken: what is shorter is a heading, what is longer a table.
    characters: std::ops::RangeInclusive<usize>,
    /// What stands between two sentences of a paragraph.
    between: &'static str,
    /// What makes a near copy of a document.
    more: &'static str,
}

const ENGLISH: Prose = Prose {
    files: &["book-en.jsonl", "help-en.jsonl", "manual-en.jsonl"],
    end: ". ",
    characters: 40..=300,
    between: " ",
    more: " And so it ends.",
};

const CHINESE: Prose = Prose {
    files: &["book-zh.jsonl", "help-zh.jsonl", "manual-zh.jsonl"],
    end: "。",
    characters: 15..=120,
    between: "",
    more: "故事到此结束。",
};

impl Prose {
    /// Sentences of prose; with program text in them most documents would fall at one of the first rules, on both sides.
    fn sentences(&self) -> Result<Vec<String>> {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/corpus");
        let mut found = Vec::new();
        for name in self.files {
            for text in read_texts(&corpus.join(name))? {
                let text = text.replace('\n', " ");
                let prose = |sentence: &&str| {
                    let plain = sentence.chars().filter(|c| c.is_alphabetic() || *c == ' ').count();
                    let length = sentence.chars().count();
                    self.characters.contains(&length) && sentence.ends_with(self.end) && plain * 10 >= length * 9
                };
                let sentences = text.split_inclusive(self.end).filter(prose);
                found.extend(sentences.map(|sentence| sentence.trim().to_owned()));
            }
        }
        Ok(found)
    }
}

/// Documents of sentences of the corpus that ships, in a mixed order; every tenth is a near copy of the one before.
fn mixed_texts(language: Language, bytes: u64) -> Result<Vec<String>> {
    let prose = if language == Language::Zh { &CHINESE } else { &ENGLISH };
    let sentences = prose.sentences()?;
    ensure!(!sentences.is_empty(), "the corpus that ships has no sentence");
    let mut word = 0x9e37_79b9_7f4a_7c15_u64;
    let mut draw = move |below: usize| {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        (word % below as u64) as usize
    };
    let (mut texts, mut made): (Vec<String>, u64) = (Vec::new(), 0);
    while made < bytes {
        let text = match texts.last() {
            Some(last) if texts.len() % 10 == 9 => format!("{last}{}", prose.more),
            _ => {
                let (count, paragraph) = (20 + draw(40), 3 + draw(4));
                let space = |i: usize| {
                    if i % paragraph == paragraph - 1 {
                        "\n"
                    } else {
                        prose.between
                    }
                };
                (0..count)
                    .map(|i| sentences[draw(sentences.len())].clone() + space(i))
                    .collect()
            }
        };
        made += text.len() as u64;
        texts.push(text);
    }
    Ok(texts)
}

/// Peak resident memory of this process.
fn own_peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib / 1024)
}
