//! One training step against PyTorch's: the same model, weights and batches, alternated in one run.
//!
//! Each round runs one step of ours, one of PyTorch eager and one of PyTorch compiled, in an order that rotates, so that
//! a machine that slows down or is shared slows all three. The losses are printed side by side and must agree, or the
//! sides did not do the same work and the numbers are refused. See `tests/bench/README.md`.
//!
//! Ours is the very step of a run of one rank: block hashes, the hash of the whole state and the trace line included,
//! though PyTorch has nothing of the kind. What this does not measure: data, checkpoints, more than one rank.

mod ours;
mod pytorch;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use ours::Ours;
use pytorch::PyTorch;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;
use tarazed_domain::config::{BatchConfig, ModelConfig, OptimizerConfig};
use tarazed_tests::figures;

/// Batches that the steps cycle through.
const BATCH_COUNT: usize = 4;
/// Relative difference of losses above which the sides are not doing the same work: far above rounding, far below what
/// one wrong update makes.
const LOSS_DIFFERENCE_MAX: f64 = 1e-3;
/// Rest between steps, in which the other side's OpenMP threads stop spinning.
const REST: Duration = Duration::from_millis(100);

#[derive(Parser)]
#[command(about = "Times one training step, ours against PyTorch eager and compiled, alternated in one run")]
struct Arguments {
    /// Python with torch and safetensors; without it, ours alone is timed.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Configs to measure; of each the sections model, batch and optimizer are read.
    #[arg(long = "config")]
    configs: Vec<PathBuf>,
    /// Timed rounds; one more comes before them to warm up.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Threads of each side.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// PyTorch modes.
    #[arg(long, value_delimiter = ',', default_value = "eager,compiled")]
    modes: Vec<String>,
    /// Write the results here as JSON, too.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// The sections of a config that decide a step's work.
#[derive(Deserialize)]
struct BenchConfig {
    model: ModelConfig,
    batch: BatchConfig,
    optimizer: OptimizerConfig,
}

impl BenchConfig {
    const fn sequences(&self) -> usize {
        (self.batch.lanes * self.batch.sequences_per_lane) as usize
    }
}

/// One timed step.
struct Timed {
    seconds: f64,
    /// Processor time of all threads; less moved by company on the machine than the time that passed.
    cpu_seconds: f64,
    loss: f64,
    gradient_norm: f64,
    /// Peak resident memory of the process so far.
    peak_mib: u64,
}

/// One contender's steps, warm-up first.
struct Column {
    name: String,
    steps: Vec<Timed>,
}

/// Seconds of one contender, warm-up left out.
#[derive(Serialize)]
struct Summary {
    name: String,
    median_s: f64,
    min_s: f64,
    max_s: f64,
    /// Median processor time of all threads.
    cpu_s: f64,
    /// Median over rounds of its time over ours in the same round.
    ratio_to_ours: f64,
    peak_mib: u64,
}

#[derive(Serialize)]
struct Measurement {
    config: String,
    parameters: usize,
    tokens_per_step: usize,
    load_average: [String; 2],
    contenders: Vec<Summary>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(
        arguments.rounds > 0 && arguments.threads > 0,
        "--rounds and --threads must be at least 1"
    );
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let configs = if arguments.configs.is_empty() {
        vec![
            root.join("configs/quickstart.toml"),
            root.join("tests/bench/larger.toml"),
        ]
    } else {
        arguments.configs.clone()
    };
    println!("machine   {}", figures::machine());
    println!("commit    {}", figures::commit());
    println!("threads   {} on each side, exact fp32\n", arguments.threads);
    let mut measurements = Vec::new();
    for path in configs {
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let config: BenchConfig = toml::from_str(&text).with_context(|| format!("in {}", path.display()))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        measurements.push(measure(&arguments, &name, &config)?);
    }
    if let Some(path) = &arguments.json {
        let report = serde_json::json!({
            "machine": figures::machine(), "commit": figures::commit(), "threads": arguments.threads, "measurements": measurements,
        });
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Runs all contenders on one config and prints its table.
fn measure(arguments: &Arguments, name: &str, config: &BenchConfig) -> Result<Measurement> {
    let tokens = batches(config);
    let mut ours = Ours::new(config, arguments.threads, &tokens)?;
    let mut others = Vec::new();
    if let Some(python) = &arguments.python {
        for mode in &arguments.modes {
            others.push(PyTorch::start(python, mode, config, arguments.threads, &ours, &tokens)?);
        }
    }
    let load_before = figures::load_average();
    let names = std::iter::once("tarazed".to_owned()).chain(others.iter().map(|other| other.name().to_owned()));
    let mut columns: Vec<Column> = names
        .map(|name| Column {
            name,
            steps: Vec::new(),
        })
        .collect();
    for round in 0..=arguments.rounds {
        for turn in 0..columns.len() {
            let who = (round + turn) % columns.len();
            let step = match who {
                0 => ours.step(round % BATCH_COUNT)?,
                other => others[other - 1].step(round)?,
            };
            columns[who].steps.push(step);
            std::thread::sleep(REST);
        }
    }
    let measurement = Measurement {
        config: name.to_owned(),
        parameters: ours.parameter_count(),
        tokens_per_step: config.sequences() * config.model.context,
        load_average: [load_before, figures::load_average()],
        contenders: columns.iter().map(|column| summary(column, &columns[0])).collect(),
    };
    print_table(config, &measurement, &columns);
    check_losses(&columns)?;
    Ok(measurement)
}

fn summary(column: &Column, ours: &Column) -> Summary {
    let seconds: Vec<f64> = column.steps.iter().skip(1).map(|step| step.seconds).collect();
    let ratios: Vec<f64> = seconds
        .iter()
        .zip(ours.steps.iter().skip(1))
        .map(|(s, o)| s / o.seconds)
        .collect();
    Summary {
        name: column.name.clone(),
        median_s: median(&seconds),
        min_s: seconds.iter().copied().fold(f64::INFINITY, f64::min),
        max_s: seconds.iter().copied().fold(0.0, f64::max),
        cpu_s: median(
            &column
                .steps
                .iter()
                .skip(1)
                .map(|step| step.cpu_seconds)
                .collect::<Vec<_>>(),
        ),
        ratio_to_ours: median(&ratios),
        peak_mib: column.steps.last().map_or(0, |step| step.peak_mib),
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        (sorted[middle - 1] + sorted[middle]) / 2.0
    }
}

fn print_table(config: &BenchConfig, measurement: &Measurement, columns: &[Column]) {
    let (model, batch) = (&config.model, &config.batch);
    println!(
        "{}: layers {}, hidden {}, ffn {}, heads {}/{}, context {}, vocabulary {}: {:.2}M parameters",
        measurement.config,
        model.layers,
        model.hidden,
        model.ffn,
        model.heads,
        model.kv_heads,
        model.context,
        model.vocabulary,
        measurement.parameters as f64 / 1e6
    );
    println!(
        "  {} lanes x {} sequences, ours in micro-batches of {}: {} tokens a step; load average before {} after {}",
        batch.lanes,
        batch.sequences_per_lane,
        batch.micro_batch_sequences,
        measurement.tokens_per_step,
        measurement.load_average[0],
        measurement.load_average[1]
    );
    println!("\n  step          median s    min s    max s    cpu s   tokens/s   time/ours   peak MiB");
    for s in &measurement.contenders {
        println!(
            "  {:<12} {:>9.3} {:>8.3} {:>8.3} {:>8.2} {:>10.0} {:>11.2} {:>10}",
            s.name,
            s.median_s,
            s.min_s,
            s.max_s,
            s.cpu_s,
            measurement.tokens_per_step as f64 / s.median_s,
            s.ratio_to_ours,
            s.peak_mib
        );
    }
    println!("\n  loss and gradient norm by step (the first is the warm-up)");
    for round in 0..columns[0].steps.len() {
        let cells = columns.iter().map(|column| {
            let step = &column.steps[round];
            format!("{:.6} {:.5}", step.loss, step.gradient_norm)
        });
        println!("  {round:>3}  {}", cells.collect::<Vec<_>>().join("   "));
    }
    println!();
}

/// Refuses the measurement where the sides did not do the same work.
fn check_losses(columns: &[Column]) -> Result<()> {
    for column in &columns[1..] {
        for (round, (theirs, ours)) in column.steps.iter().zip(&columns[0].steps).enumerate() {
            let difference = ((theirs.loss - ours.loss) / ours.loss).abs();
            if difference.is_nan() || difference > LOSS_DIFFERENCE_MAX {
                bail!(
                    "round {round}: {} has loss {} and ours is {}: not the same work, so the times say nothing",
                    column.name,
                    theirs.loss,
                    ours.loss
                );
            }
        }
    }
    Ok(())
}

/// Uniform token ids, `[sequences, context + 1]` each, by a counter-based generator.
fn batches(config: &BenchConfig) -> Vec<Vec<u32>> {
    let len = config.sequences() * (config.model.context + 1);
    let token = |counter: usize| {
        let mut z = (counter as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % config.model.vocabulary as u64) as u32
    };
    (0..BATCH_COUNT)
        .map(|batch| (batch * len..(batch + 1) * len).map(token).collect())
        .collect()
}
