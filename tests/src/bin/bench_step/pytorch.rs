//! PyTorch's side: a process that runs one step when told to.

use crate::ours::Ours;
use crate::{BenchConfig, Timed};
use anyhow::{Context, Result};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Deserialize;
use std::path::Path;
use std::process::Command;
use tarazed_tests::peer::Peer;

/// A running `pytorch_step.py`.
pub struct PyTorch {
    peer: Peer,
    /// Config and inputs; removed with this.
    _folder: tempfile::TempDir,
}

#[derive(Deserialize)]
struct Ready {
    torch: String,
    micro_batch: usize,
    calibration_seconds: serde_json::Value,
}

#[derive(Deserialize)]
struct Answer {
    seconds: f64,
    cpu_seconds: f64,
    loss: f64,
    gradient_norm: f64,
    peak_mib: u64,
}

impl PyTorch {
    /// Starts the process, gives it the weights and batches that ours has, and waits until it is warm.
    pub fn start(
        python: &Path,
        mode: &str,
        config: &BenchConfig,
        threads: usize,
        ours: &Ours,
        tokens: &[Vec<u32>],
    ) -> Result<Self> {
        let folder = tempfile::tempdir().context("cannot make a folder for the inputs")?;
        write_inputs(folder.path(), config, threads, ours, tokens)?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/pytorch_step.py");
        let mut command = Command::new(python);
        command
            .arg(script)
            .arg(folder.path())
            .arg(mode)
            .env("OMP_NUM_THREADS", threads.to_string());
        let mut peer = Peer::start(&format!("torch {mode}"), &mut command)?;
        eprintln!(
            "starting torch {mode} (timing micro-batches{}) …",
            if mode == "compiled" { ", compiling" } else { "" }
        );
        let ready: Ready = peer.answer()?;
        println!(
            "torch {} {mode}: micro-batch {}, the fastest of {} (seconds without the update)",
            ready.torch, ready.micro_batch, ready.calibration_seconds
        );
        Ok(Self { peer, _folder: folder })
    }

    /// `torch eager` or `torch compiled`.
    pub fn name(&self) -> &str {
        self.peer.name()
    }

    /// One update on the batch of that round.
    pub fn step(&mut self, round: usize) -> Result<Timed> {
        let answer: Answer = self.peer.ask(&format!("step {round}"))?;
        Ok(Timed {
            seconds: answer.seconds,
            cpu_seconds: answer.cpu_seconds,
            loss: answer.loss,
            gradient_norm: answer.gradient_norm,
            peak_mib: answer.peak_mib,
        })
    }
}

/// Every divisor of the global batch from the lane's micro-batch upwards that doubles it: what PyTorch may choose from.
fn micro_batch_candidates(config: &BenchConfig) -> Vec<usize> {
    let sequences = config.sequences();
    let first = config.batch.micro_batch_sequences as usize;
    let doubled = std::iter::successors(Some(first), |n| Some(n * 2)).take_while(|n| *n <= sequences);
    doubled.filter(|n| sequences.is_multiple_of(*n)).collect()
}

fn write_inputs(folder: &Path, config: &BenchConfig, threads: usize, ours: &Ours, tokens: &[Vec<u32>]) -> Result<()> {
    let json = serde_json::json!({
        "model": config.model,
        "optimizer": config.optimizer,
        "threads": threads,
        "micro_batch_candidates": micro_batch_candidates(config),
    });
    std::fs::write(folder.join("config.json"), json.to_string()).context("cannot write the inputs")?;
    let bytes: Vec<u8> = ours.initial().iter().flat_map(|value| value.to_le_bytes()).collect();
    let token_bytes: Vec<u8> = tokens.iter().flatten().flat_map(|token| token.to_le_bytes()).collect();
    let token_shape = vec![tokens.len(), config.sequences(), config.model.context + 1];
    let mut tensors = vec![(
        "tokens".to_owned(),
        TensorView::new(Dtype::U32, token_shape, &token_bytes)?,
    )];
    for slot in ours.layout().tensors() {
        let range = slot.range();
        let view = TensorView::new(Dtype::F32, slot.shape.clone(), &bytes[range.start * 4..range.end * 4])?;
        tensors.push((slot.name.clone(), view));
    }
    safetensors::serialize_to_file(tensors, None, &folder.join("inputs.safetensors")).context("cannot write the inputs")
}
