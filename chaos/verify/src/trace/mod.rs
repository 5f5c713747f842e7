//! Did a run train on every sample exactly once? Reads traces, configs and data sets, and nothing else.
//!
//! - Every line: its keys, spelling and bits; steps from 1 without a gap; tokens; losses by domain against the loss.
//! - Every line's `data`, recomputed from seed, domains, mixture and the decisions of the lines before it (DATA-2); so the
//!   step trained on those samples and no others.
//! - Every sample of every epoch marked: none twice, none left out (DATA-1).
//! - Every change of the data: that its data set lies in the run folder and is what the decision says.
//! - Rollbacks: each goes back to a line whose state stands, and names the very draws that are without effect.
//! - The data sets themselves, from the tokens' chunks up to the version that stands in `data`.
//! - Two traces: byte for byte the same on the steps that both hold (LOOP-1, DET-1).
//!
//! What it does not do: it computes no loss, no learning rate and no decision; whether those are right, it cannot say. It
//! reads no text, so whether tokens are those of the sources is the data manifest's word.

mod back;
mod batch;
mod config;
mod data;
mod later;
mod line;
mod order;
mod walk;

use crate::json::to_hex;
use crate::report::{Findings, Unusable};
use config::Config;
use data::DataSet;
use later::Later;
use line::{DomainLoss, Line};
use serde_json::json;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use walk::{Usage, Walk};

/// Bytes of one line: decisions over 256 domains fit many times.
const LINE_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Missing steps that are gone through, to prove what comes after them; a larger gap ends the check.
const GAP_STEPS_MAX: u64 = 1_000_000;
/// Relative distance of a line's loss from the mean over its domains, which the line gives rounded.
const LOSS_TOLERANCE: f64 = 1e-12;

/// What was found in one run.
pub struct RunReport {
    run_dir: PathBuf,
    findings: Findings,
    lines: u64,
    data_folder: PathBuf,
    data_bytes: u64,
    usage: Vec<Usage>,
}

pub struct TraceReport {
    runs: Vec<RunReport>,
    /// Of two runs: common lines, and the first that differs.
    common: Option<(u64, Option<u64>)>,
}

impl TraceReport {
    pub fn is_clean(&self) -> bool {
        let differs = self.common.is_some_and(|(_, first)| first.is_some());
        !differs && self.runs.iter().all(|run| run.findings.count() == 0)
    }

    pub fn print(&self) -> String {
        let mut text = String::new();
        for run in &self.runs {
            text += &format!("{}: {} lines\n", run.run_dir.display(), run.lines);
            text += &format!("data  {}: {} bytes hashed\n", run.data_folder.display(), run.data_bytes);
            for usage in &run.usage {
                text += &format!(
                    "domain  {}: {} samples proved; {} whole epochs of {}, each sample once, and {} of the next\n",
                    usage.name, usage.samples, usage.whole_epochs, usage.samples_per_epoch, usage.of_last_epoch
                );
            }
            text += &run.findings.to_string();
            text += &format!("{} findings\n", run.findings.count());
        }
        match self.common {
            Some((common, None)) => text += &format!("both traces are the same on their {common} common lines\n"),
            Some((common, Some(line))) => {
                text += &format!("BAD trace.jsonl: of {common} common lines, line {line} is the first that differs\n")
            }
            None => {}
        }
        text
    }

    pub fn json(&self) -> serde_json::Value {
        let run = |run: &RunReport| {
            let usage = run.usage.iter().map(|usage| {
                json!({
                    "domain": usage.name, "samples": usage.samples, "samples_per_epoch": usage.samples_per_epoch,
                    "whole_epochs": usage.whole_epochs, "of_last_epoch": usage.of_last_epoch,
                })
            });
            json!({
                "run_dir": run.run_dir, "lines": run.lines, "data_bytes": run.data_bytes, "domains": usage.collect::<Vec<_>>(),
                "finding_count": run.findings.count(), "findings": run.findings.json(),
            })
        };
        json!({
            "ok": self.is_clean(), "runs": self.runs.iter().map(run).collect::<Vec<_>>(),
            "common_lines": self.common.map(|(common, _)| common),
            "first_difference": self.common.and_then(|(_, first)| first),
        })
    }
}

/// Verifies one run folder or two.
pub fn verify(run_dirs: &[PathBuf]) -> Result<TraceReport, Unusable> {
    let runs = run_dirs
        .iter()
        .map(|run_dir| verify_run(run_dir))
        .collect::<Result<_, _>>()?;
    let common = match run_dirs {
        [a, b] => Some(compare(a, b)?),
        _ => None,
    };
    Ok(TraceReport { runs, common })
}

/// The lines of a trace, one at a time.
struct Lines {
    reader: BufReader<File>,
    path: PathBuf,
    number: u64,
}

enum NextLine {
    Whole(Vec<u8>),
    /// The last line has no end.
    Torn,
    End,
}

impl Lines {
    fn open(run_dir: &Path) -> Result<Self, Unusable> {
        let path = run_dir.join("trace.jsonl");
        let file = File::open(&path).map_err(|why| Unusable(format!("{}: {why}", path.display())))?;
        Ok(Self {
            reader: BufReader::new(file),
            path,
            number: 0,
        })
    }

    fn next(&mut self) -> Result<NextLine, Unusable> {
        let unusable = |why: String| Unusable(format!("{} line {}: {why}", self.path.display(), self.number + 1));
        let mut bytes = Vec::new();
        let limit = LINE_BYTES_MAX as u64 + 1;
        let mut limited = self.reader.by_ref().take(limit);
        limited
            .read_until(b'\n', &mut bytes)
            .map_err(|why| unusable(why.to_string()))?;
        if bytes.len() as u64 == limit {
            return Err(unusable(format!("more than {LINE_BYTES_MAX} bytes")));
        }
        if bytes.is_empty() {
            return Ok(NextLine::End);
        }
        self.number += 1;
        Ok(match bytes.pop() {
            Some(b'\n') => NextLine::Whole(bytes),
            _ => NextLine::Torn,
        })
    }
}

/// Common lines, and the first that differs.
fn compare(a: &Path, b: &Path) -> Result<(u64, Option<u64>), Unusable> {
    let (mut a, mut b) = (Lines::open(a)?, Lines::open(b)?);
    let (mut common, mut first) = (0, None);
    while let (NextLine::Whole(one), NextLine::Whole(other)) = (a.next()?, b.next()?) {
        common += 1;
        if one != other && first.is_none() {
            first = Some(common);
        }
    }
    Ok((common, first))
}

fn verify_run(run_dir: &Path) -> Result<RunReport, Unusable> {
    let config = Config::load(&run_dir.join("config.toml"))?;
    let mut findings = Findings::default();
    let set = choose(run_dir, &config, &mut findings)?;
    let data_bytes = set.check_files(&mut findings);
    let mut check = TraceCheck {
        walk: Walk::new(&config, &set.domains, set.version)?,
        config: &config,
        later: Later::new(run_dir.join("data"), config.context, set.tokenizer()),
        findings: &mut findings,
    };
    let mut lines = Lines::open(run_dir)?;
    loop {
        match lines.next()? {
            NextLine::Whole(bytes) => {
                if !check.line(lines.number, &bytes) {
                    break;
                }
            }
            NextLine::Torn => check
                .findings
                .add(name(lines.number), "it breaks off: its writer died within it"),
            NextLine::End => break,
        }
    }
    if lines.number == 0 {
        return Err(Unusable(format!("{}: no line", lines.path.display())));
    }
    let usage = check.walk.usage();
    let data_bytes = data_bytes + check.later.hashed;
    Ok(RunReport {
        run_dir: run_dir.to_owned(),
        findings,
        lines: lines.number,
        data_folder: set.folder,
        data_bytes,
        usage,
    })
}

/// The data set that the first line was made from; where none was, the first that can be read, whose lines then fail.
fn choose(run_dir: &Path, config: &Config, findings: &mut Findings) -> Result<DataSet, Unusable> {
    let first = match Lines::open(run_dir)?.next()? {
        NextLine::Whole(bytes) => Line::parse(&bytes).ok(),
        _ => None,
    };
    let mut fallback = None;
    for folder in data::find(run_dir)? {
        match DataSet::load(&folder, config.context) {
            Err(why) => findings.add(folder.join("data.json").display().to_string(), why),
            Ok(set) => {
                let plan = Walk::new(config, &set.domains, set.version)
                    .map(|mut walk| walk.plan(&mut Findings::default()).data);
                if plan.is_ok_and(|data| first.as_ref().is_some_and(|line| line.data == data)) {
                    return Ok(set);
                }
                fallback.get_or_insert(set);
            }
        }
    }
    fallback.ok_or_else(|| Unusable(format!("{}: no data set can be read: {findings}", run_dir.display())))
}

fn name(number: u64) -> String {
    format!("trace.jsonl line {number}")
}

/// Checks line after line.
struct TraceCheck<'a> {
    config: &'a Config,
    later: Later,
    walk: Walk,
    findings: &'a mut Findings,
}

impl TraceCheck<'_> {
    /// One line; `false` if nothing behind it can be checked.
    fn line(&mut self, number: u64, bytes: &[u8]) -> bool {
        let due = self.walk.next_line();
        let mut line = match Line::parse(bytes) {
            Ok(line) => line,
            Err(why) => {
                self.findings.add(name(number), why);
                self.skip();
                return true;
            }
        };
        if line.step < due {
            self.findings.add(
                name(number),
                format!("step {} stands again, where step {due} must stand", line.step),
            );
            return true;
        }
        if line.step > due {
            let gap = line.step - due;
            self.findings.add(
                name(number),
                format!(
                    "step {} where step {due} must stand: {gap} steps are missing",
                    line.step
                ),
            );
            if gap > GAP_STEPS_MAX {
                self.findings
                    .add(name(number), "the gap is too wide to go on behind it");
                return false;
            }
            (0..gap).for_each(|_| self.skip());
        }
        for problem in self.within(&line) {
            self.findings.add(name(number), problem);
        }
        let shares = self.walk.mixture().shares;
        let plan = self.walk.plan(self.findings);
        let proved = plan.data == line.data;
        if !proved {
            let problem = format!(
                "data is {}, its samples give {}",
                to_hex(&line.data),
                to_hex(&plan.data)
            );
            self.findings.add(name(number), problem);
        }
        self.walk.settle(&plan, proved, self.findings);
        for problem in self.against_plan(&line, &shares, &plan.counts) {
            self.findings.add(name(number), problem);
        }
        for change in line
            .decisions
            .iter_mut()
            .filter_map(|decision| decision.change.as_mut())
        {
            if let Err(why) = self.later.look_up(change, self.findings) {
                self.findings.add(name(number), why);
            }
        }
        if let Err(why) = self.walk.decide(self.config, line.step, &line.decisions) {
            self.findings.add(name(number), why);
        }
        true
    }

    /// A step of which there is no line that can be read: what it trained on is not proved.
    fn skip(&mut self) {
        let plan = self.walk.plan(self.findings);
        self.walk.settle(&plan, false, self.findings);
    }

    /// What must hold within a line.
    fn within(&self, line: &Line) -> Vec<String> {
        let mut problems = Vec::new();
        let tokens = self.walk.tokens_with_next(self.config);
        if tokens != line.tokens {
            problems.push(format!("{} tokens, and its batches hold {tokens}", line.tokens));
        }
        if !line.loss.is_finite() || !line.grad_norm.is_finite() {
            problems.push("a loss or norm that is not finite: no step commits with one".into());
        }
        if !(line.lr >= 0.0 && line.lr.is_finite()) {
            problems.push(format!("a learning rate of {}", line.lr));
        }
        let (sum, tokens) = line.domains.iter().fold((0.0, 0_u64), |(sum, tokens), (_, domain)| {
            (
                sum + domain.loss * domain.tokens as f64,
                tokens.saturating_add(domain.tokens),
            )
        });
        let mean = sum / tokens as f64;
        if (mean - line.loss).abs() > LOSS_TOLERANCE * line.loss.abs().max(1.0) || mean.is_nan() {
            problems.push(format!("loss {}, the mean over its domains is {mean}", line.loss));
        }
        problems
    }

    /// Mixture, training tokens and held-out tokens, by domain, against what the step must have had.
    fn against_plan(&self, line: &Line, shares: &[f64], counts: &[u32]) -> Vec<String> {
        let mut problems = Vec::new();
        let names = self.walk.held_out().map(|(name, _)| name);
        let mixture = line
            .mixture
            .iter()
            .map(|(name, share)| (name.as_str(), share.to_bits()));
        if !names
            .clone()
            .zip(shares.iter().map(|share| share.to_bits()))
            .eq(mixture)
        {
            problems.push(format!("mixture {:?}, in force are {shares:?}", line.mixture));
        }
        let trained = |count: u64| count.saturating_mul(self.config.context);
        let due: Vec<(&str, u64)> = names
            .clone()
            .zip(counts.iter().map(|count| trained(u64::from(*count))))
            .collect();
        problems.extend(tokens_differ("training", &line.domains, due));
        let evaluated = |(name, held_out): (_, u64)| (name, trained(held_out.min(self.config.held_out_sequences_max)));
        let due: Vec<(&str, u64)> = self.walk.held_out().map(evaluated).collect();
        let any = due.iter().any(|(_, tokens)| *tokens > 0);
        match (&line.heldout, self.config.is_evaluation(line.step) && any) {
            (Some(heldout), true) => problems.extend(tokens_differ("held-out", heldout, due)),
            (None, false) => {}
            (Some(_), false) => problems.push("held-out losses where no evaluation is due".into()),
            (None, true) => problems.push("no held-out losses where an evaluation is due".into()),
        }
        problems
    }
}

/// Domains without tokens are left out of a line; all others stand in config order.
fn tokens_differ(what: &str, found: &[(String, DomainLoss)], mut due: Vec<(&str, u64)>) -> Option<String> {
    due.retain(|(_, tokens)| *tokens > 0);
    let same = found
        .iter()
        .map(|(name, domain)| (name.as_str(), domain.tokens))
        .eq(due.iter().copied());
    let shown: Vec<_> = found.iter().map(|(name, domain)| (name, domain.tokens)).collect();
    (!same).then(|| format!("{what} tokens {shown:?}, due are {due:?}"))
}

#[cfg(test)]
mod tests {
    use super::line::tests::handmade;
    use super::walk::tests::{config, domains};
    use super::*;

    /// Lines of a run without decisions, made by hand around the recipe's own hashes.
    fn lines(count: u64) -> Vec<String> {
        let mut walk = Walk::new(&config(), &domains(), [1; 32]).unwrap();
        let mut findings = Findings::default();
        (1..=count)
            .map(|step| {
                let plan = walk.plan(&mut findings);
                let named = ["a", "b"].iter().zip(&plan.counts).filter(|(_, count)| **count > 0);
                let domains: Vec<String> = named
                    .map(|(name, count)| format!(r#""{name}":{{"loss":2.5,"tokens":{}}}"#, count * 16))
                    .collect();
                let rest = format!(
                    r#""mixture":{{"a":0.75,"b":0.25}},"domains":{{{}}},"decisions":[]"#,
                    domains.join(",")
                );
                handmade(step, step * 64, &to_hex(&plan.data), &rest)
            })
            .collect()
    }

    fn said(lines: &[String]) -> String {
        let (config, domains) = (config(), domains());
        let mut findings = Findings::default();
        let mut check = TraceCheck {
            walk: Walk::new(&config, &domains, [1; 32]).unwrap(),
            config: &config,
            later: Later::new(PathBuf::new(), 16, [0; 32]),
            findings: &mut findings,
        };
        for (number, line) in (1..).zip(lines) {
            check.line(number, line.as_bytes());
        }
        findings.to_string()
    }

    fn edited(from: &str, to: &str) -> String {
        let mut lines = lines(12);
        assert!(lines[4].contains(from), "{}", lines[4]);
        lines[4] = lines[4].replacen(from, to, 1);
        said(&lines)
    }

    #[test]
    fn a_whole_trace_has_no_finding() {
        assert_eq!(said(&lines(40)), "");
    }

    #[test]
    fn lost_repeated_and_swapped_lines_are_named() {
        let mut lost = lines(12);
        lost.remove(4);
        let text = said(&lost);
        assert!(
            text.contains("line 5: step 6 where step 5 must stand: 1 steps are missing"),
            "{text}"
        );
        assert!(text.contains("samples are in no line that proves their use"), "{text}");
        let mut repeated = lines(12);
        repeated.insert(5, repeated[4].clone());
        let text = said(&repeated);
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains("line 6: step 5 stands again"), "{text}");
        let mut swapped = lines(12);
        swapped.swap(4, 5);
        assert!(said(&swapped).contains("line 5: step 6 where step 5"));
        let mut far = lines(6);
        far[4] = far[4].replacen("\"step\":5", "\"step\":99999999999", 1);
        assert!(said(&far).contains("too wide"));
    }

    #[test]
    fn every_field_that_can_be_checked_is() {
        for (from, to, part) in [
            (
                "\"tokens\":320",
                "\"tokens\":321",
                "321 tokens, and its batches hold 320",
            ),
            ("\"data\":\"", "\"data\":\"x", "data: "),
            ("\"lr\":0.001", "\"lr\":-0.001", "a learning rate of -0.001"),
            ("\"a\":0.75", "\"a\":0.5", "mixture "),
            ("\"tokens\":48", "\"tokens\":32", "training tokens "),
            (
                "{\"loss\":2.5,\"tokens\":48",
                "{\"loss\":2.6,\"tokens\":48",
                "the mean over its domains is",
            ),
            (
                "\"decisions\"",
                "\"heldout\":{\"a\":{\"loss\":1.0,\"tokens\":16}},\"decisions\"",
                "where no evaluation is due",
            ),
            (
                "\"decisions\":[]",
                "\"decisions\":[{\"id\":1,\"line\":5,\"effective\":9,\"kind\":\"pin\",\"by\":{\"person\":\"p\"},\"reason\":\"\"}]",
                "no decision point",
            ),
            (
                "2.5,\"loss_bits\":\"0x4004000000000000\"",
                "null,\"loss_bits\":\"0x7ff8000000000000\"",
                "not finite",
            ),
        ] {
            let text = edited(from, to);
            assert!(
                text.contains(&format!("line 5: {part}")) || text.contains(part),
                "{from}: {text}"
            );
            assert!(text.contains("line 5"), "{from}: {text}");
        }
        let other = lines(12)[5].clone();
        let hash = other.split('"').nth(7).unwrap().to_owned();
        let own = lines(12)[4].split('"').nth(7).unwrap().to_owned();
        assert!(edited(&own, &hash).contains("its samples give"));
    }

    #[test]
    fn two_traces_are_compared_byte_for_byte() {
        let write = |lines: &[String]| {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("trace.jsonl"), lines.join("\n") + "\n").unwrap();
            folder
        };
        let (long, short) = (write(&lines(9)), write(&lines(6)));
        assert_eq!(compare(long.path(), short.path()).unwrap(), (6, None));
        let mut other = lines(6);
        other[3] = other[3].replace("0.001", "0.002");
        assert_eq!(compare(long.path(), write(&other).path()).unwrap(), (6, Some(4)));
    }

    #[test]
    fn a_line_without_an_end_is_told_from_a_whole_one() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("trace.jsonl"), "{}\n{\"st").unwrap();
        let mut lines = Lines::open(folder.path()).unwrap();
        assert!(matches!(lines.next(), Ok(NextLine::Whole(bytes)) if bytes == b"{}"));
        assert!(matches!(lines.next(), Ok(NextLine::Torn)));
        assert!(matches!(lines.next(), Ok(NextLine::End)));
    }
}
