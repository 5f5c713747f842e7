//! Refining text against datatrove: the same rules and the same near-copies on the same JSON lines, on as many cores,
//! alternating in one run. Ours does more (cleaning, languages, exact copies); the peer has no such stage here. The clock runs from the files to the files.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Deserialize;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use tarazed_corpus::refine_text;
use tarazed_domain::config::{DomainConfig, Language, RefineConfig, SourceFormat};
use tarazed_tests::figures::{self, Figures, Summary};
use tarazed_tests::peer::Peer;

#[derive(Parser)]
#[command(about = "Times refining text against datatrove")]
struct Arguments {
    /// English JSON lines with a field `text`; made from the corpus that ships where it is absent.
    #[arg(long)]
    input: Option<PathBuf>,
    /// MB of text to make.
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
    kept: u64,
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
    std::fs::create_dir(&inputs)?;
    let (documents, bytes) = make_inputs(&arguments, &inputs)?;
    println!(
        "{documents} documents, {:.1} MB of text in {} files",
        bytes as f64 / 1e6,
        arguments.threads
    );
    let mut peer = arguments
        .python
        .as_ref()
        .map(|python| start(python, &inputs, place.path(), arguments.threads))
        .transpose()?;
    let (mut ours, mut theirs, mut kept) = (Vec::new(), Vec::new(), (0, 0));
    let mut peak_kib = 0;
    for round in 0..=arguments.rounds {
        let (seconds, count) = run_ours(&inputs, &place.path().join(format!("ours-{round}")))?;
        kept.0 = count;
        if round > 0 {
            ours.push(seconds);
        }
        let Some((peer, _)) = &mut peer else { continue };
        let answer: Answer = peer.ask(&format!("run {round}"))?;
        (kept.1, peak_kib) = (answer.kept, answer.peak_kib);
        if round > 0 {
            theirs.push(answer.seconds);
        }
    }
    let figures = report(
        bytes,
        &ours,
        &theirs,
        kept,
        peer.as_ref().map_or("nobody", |(_, version)| version),
    );
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

fn start(python: &Path, inputs: &Path, work: &Path, processes: usize) -> Result<(Peer, String)> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/datatrove_peer.py");
    let mut command = Command::new(python);
    command
        .arg(script)
        .arg(inputs)
        .arg(work.join("theirs"))
        .arg(processes.to_string());
    let mut peer = Peer::start("datatrove", &mut command)?;
    let Ready { version } = peer.answer()?;
    Ok((peer, version))
}

fn run_ours(inputs: &Path, out: &Path) -> Result<(f64, u64)> {
    let domains = [DomainConfig {
        name: "text".to_owned(),
        path: inputs.to_owned(),
        format: SourceFormat::Auto,
        language: Language::En,
        weight: 1.0,
        text_field: "text".to_owned(),
    }];
    let started = Instant::now();
    let counts = refine_text(&domains, &RefineConfig::default(), out, &mut |_| {})?;
    Ok((
        started.elapsed().as_secs_f64(),
        counts.iter().map(|(_, kept)| kept).sum(),
    ))
}

fn report(bytes: u64, ours: &[f64], theirs: &[f64], kept: (u64, u64), peer: &str) -> Figures {
    let mine = Summary::of(ours);
    let rate = |seconds: f64| bytes as f64 / seconds / 1e6;
    println!(
        "ours    {:>7.2} MB/s, {} kept  (seconds {mine})",
        rate(mine.median),
        kept.0
    );
    let mut figures = Figures::new("data")
        .number("megabytes", bytes as f64 / 1e6)
        .summary("ours_s", mine);
    if !theirs.is_empty() {
        let peers = Summary::of(theirs);
        let ratio = Summary::of(
            &theirs
                .iter()
                .zip(ours)
                .map(|(theirs, ours)| theirs / ours)
                .collect::<Vec<_>>(),
        );
        println!(
            "{peer}  {:>7.2} MB/s, {} kept  (seconds {peers})",
            rate(peers.median),
            kept.1
        );
        println!("throughput of ours over theirs, by round: {ratio}");
        figures = figures.summary("theirs_s", peers).summary("ratio", ratio);
    }
    figures
}

/// One file for each thread, so that the peer can cut its work up. Without an input, documents of sentences of the corpus that
/// ships, in a mixed order; every tenth is a near copy of the one before.
fn make_inputs(arguments: &Arguments, folder: &Path) -> Result<(u64, u64)> {
    let texts = match &arguments.input {
        Some(path) => read_texts(path)?,
        None => mixed_texts(arguments.megabytes * 1_000_000)?,
    };
    ensure!(!texts.is_empty(), "no text");
    let share = texts.len().div_ceil(arguments.threads);
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

/// Characters of a sentence that is taken: what is shorter is a heading, what is longer a table.
const SENTENCE_CHARACTERS: std::ops::RangeInclusive<usize> = 40..=300;

/// Sentences of prose; with program text in them most documents would fall at one of the first rules, on both sides.
fn sentences() -> Result<Vec<String>> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/corpus");
    let mut found = Vec::new();
    for name in ["book-en.jsonl", "help-en.jsonl", "manual-en.jsonl"] {
        for text in read_texts(&corpus.join(name))? {
            let text = text.replace('\n', " ");
            let prose = |sentence: &&str| {
                let plain = sentence.chars().filter(|c| c.is_alphabetic() || *c == ' ').count();
                let length = sentence.chars().count();
                SENTENCE_CHARACTERS.contains(&length) && sentence.ends_with(". ") && plain * 10 >= length * 9
            };
            found.extend(
                text.split_inclusive(". ")
                    .filter(prose)
                    .map(|sentence| sentence.trim_end().to_owned()),
            );
        }
    }
    Ok(found)
}

fn mixed_texts(bytes: u64) -> Result<Vec<String>> {
    let sentences = sentences()?;
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
            Some(last) if texts.len() % 10 == 9 => format!("{last} And so it ends."),
            _ => {
                let (count, paragraph) = (20 + draw(40), 3 + draw(4));
                let space = |i: usize| if i % paragraph == paragraph - 1 { "\n" } else { " " };
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
