//! Text from a checkpoint: weights out of the store, the model on the processor, one token at a time.
//!
//! For looking at a run, not for serving: every token runs the whole context again. The same checkpoint, prompt and
//! [`Sampling`] give the same text.

use crate::commands::checkpoint;
use crate::exit::Failure;
use futures::TryStreamExt;
use std::path::Path;
use tarazed_actors::run_folder::RunPaths;
use tarazed_corpus::{DataManifest, MANIFEST_FILE, TokenStore, Tokenizer};
use tarazed_domain::config::Config;
use tarazed_domain::{Generation, StepsCompleted};
use tarazed_kernels::{CpuDevice, Device, DeviceError, Precision, ViewMut};
use tarazed_model::{Model, ModelError, Workspace};
use tarazed_store::{CheckpointStore, Digest, Manifest, Restorable, WriterId};

type Buffer = <CpuDevice as Device>::Buffer;

/// How the next token is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f64,
    /// Only this many of the likeliest tokens may be drawn; 0 for all.
    pub top_k: usize,
    /// Of the draws.
    pub seed: u64,
    /// Tokens to make at most; an end of document ends earlier.
    pub tokens_max: usize,
}

/// How likely a text is behind another.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Scored {
    /// In nats.
    pub log_likelihood: f64,
    /// Tokens that were scored.
    pub tokens: usize,
    /// The text before was too long, and its beginning left out.
    pub cut: bool,
}

/// A model at one checkpoint with its tokenizer.
pub struct Inference {
    model: Model<CpuDevice>,
    weights: Buffer,
    workspace: Workspace<CpuDevice>,
    tokenizer: Tokenizer,
    /// The run's data set, for prompts.
    pub data: TokenStore,
    /// The run's config.
    pub config: Config,
    /// Which checkpoint.
    pub step: StepsCompleted,
}

impl Inference {
    /// Reads the checkpoint of `step`, or the newest valid one, of the run in `dir`.
    ///
    /// # Errors
    /// By cause: no run, no such checkpoint, a store that does not answer, bytes that fail their hash.
    pub async fn open(dir: &Path, step: Option<StepsCompleted>) -> Result<Self, Failure> {
        let paths = RunPaths::new(dir);
        if !paths.config().is_file() {
            return Err(Failure::refused(
                dir.display(),
                "holds no run (no config.toml)",
                "name a run folder: generating needs its config and its tokenizer",
            ));
        }
        let config = Config::load(&paths.config(), &[])?;
        let writer = WriterId::fresh(Generation(0));
        let store = CheckpointStore::open_existing(&paths.store_location(&config), writer)
            .await
            .map_err(checkpoint::failure)?;
        let found = find(&store, step).await?;
        for warning in &found.warnings {
            eprintln!("tarazed: {warning}");
        }
        let manifest = found.manifest;
        let data = data_of(&paths.data(), &manifest, config.model.context)?;
        let tokenizer = data.tokenizer()?;

        let layout = tarazed_model::parameter_layout(&config.model, config.optimizer.block_elements);
        let device = CpuDevice::new();
        let weights = load_weights(&store, &manifest, &device, layout.flat_elements()).await?;
        let model = Model::new(&config.model, &layout, device).map_err(|e| model_failure(&e))?;
        let workspace = model.workspace(1).map_err(|e| model_failure(&e))?;
        Ok(Self {
            model,
            weights,
            workspace,
            tokenizer,
            data,
            config,
            step: manifest.step,
        })
    }

    /// Tokens of a prompt.
    ///
    /// # Errors
    /// Refused where the tokenizer cannot encode it or it is empty.
    pub fn encode(&self, prompt: &str) -> Result<Vec<u32>, Failure> {
        let tokens = self.tokenizer.encode(prompt)?;
        if tokens.is_empty() {
            return Err(Failure::refused("--prompt", "is empty", "give the beginning of a text"));
        }
        Ok(tokens)
    }

    /// Log-likelihood of `continuation` behind `before`, which begins a document: `Σ log p(token | those before it)`, in nats.
    /// Where both do not fit into the context, the beginning of `before` is left out, which the second value says.
    ///
    /// # Errors
    /// Refused where the continuation alone does not fit. If the tokenizer or the device fails.
    pub fn log_likelihood(&mut self, before: &str, continuation: &str) -> Result<Scored, Failure> {
        let mut tokens = vec![self.data.manifest().tokenizer.end_of_document];
        tokens.extend(self.tokenizer.encode(before)?);
        let scored = self.tokenizer.encode(continuation)?;
        let context = self.config.model.context;
        if scored.is_empty() || scored.len() > context {
            let cause = format!("{} tokens, where 1 to {context} fit into the context", scored.len());
            return Err(Failure::refused("a continuation", cause, "shorten it"));
        }
        tokens.extend(&scored);
        let cut = tokens.len().saturating_sub(context + 1);
        let losses = self
            .model
            .token_losses(&self.weights, &mut self.workspace, &tokens[cut..])
            .map_err(|e| model_failure(&e))?;
        let losses = &losses[losses.len() - scored.len()..];
        Ok(Scored {
            log_likelihood: -losses.iter().fold(0.0, |sum, &loss| sum + f64::from(loss)),
            tokens: scored.len(),
            cut: cut > 0,
        })
    }

    /// Text of tokens.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, Failure> {
        Ok(self.tokenizer.decode(tokens)?)
    }

    /// The tokens that follow `prompt`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn continue_from(&mut self, prompt: &[u32], sampling: Sampling) -> Result<Vec<u32>, Failure> {
        let mut tokens = prompt.to_vec();
        let end = self.data.manifest().tokenizer.end_of_document;
        for index in 0..sampling.tokens_max {
            let seen = &tokens[tokens.len().saturating_sub(self.config.model.context)..];
            let mut logits = self
                .model
                .next_logits(&self.weights, &mut self.workspace, seen)
                .map_err(|e| model_failure(&e))?;
            logits.truncate(self.tokenizer.vocabulary()); // rows past it are padding
            let next = draw(&logits, &sampling, uniform(sampling.seed, index as u64));
            if next == end {
                break;
            }
            tokens.push(next);
        }
        Ok(tokens.split_off(prompt.len()))
    }
}

async fn find(store: &CheckpointStore, step: Option<StepsCompleted>) -> Result<Restorable, Failure> {
    let found = match step {
        Some(step) => Some(store.at_step(step).await.map_err(checkpoint::failure)?),
        None => checkpoint::newest_live(store).await?,
    };
    found.ok_or_else(|| {
        Failure::refused(
            store.location(),
            "holds no checkpoint yet",
            "train until the first one, or stop the run with SIGTERM, which makes one",
        )
    })
}

async fn load_weights(
    store: &CheckpointStore,
    manifest: &Manifest,
    device: &CpuDevice,
    flat_elements: usize,
) -> Result<Buffer, Failure> {
    let covered = u64::from(manifest.block_count) * manifest.block_elements;
    if covered != flat_elements as u64 {
        return Err(Failure::refused(
            store.location(),
            format!("the checkpoint holds {covered} values where the run's config needs {flat_elements}"),
            "use the config.toml that the checkpoint was made with",
        ));
    }
    let device_failure = |e: DeviceError| model_failure(&ModelError::Device(e));
    let mut weights = device
        .alloc(flat_elements, Precision::Working)
        .map_err(device_failure)?;
    let mut stream = device.stream().map_err(device_failure)?;
    let mut parts = std::pin::pin!(store.read_weights(manifest));
    while let Some(part) = parts.try_next().await.map_err(checkpoint::failure)? {
        let into = ViewMut::at(&mut weights, part.first_element as usize);
        device.upload(&mut stream, &part.values, into).map_err(device_failure)?;
    }
    device.synchronize(&mut stream).map_err(device_failure)?;
    Ok(weights)
}

/// The data set that the checkpoint was trained on: a run folder may hold others.
fn data_of(data: &Path, manifest: &Manifest, context: usize) -> Result<TokenStore, Failure> {
    let folders = std::fs::read_dir(data)
        .map_err(|e| Failure::refused(data.display(), e, "name a run folder whose data are still there"))?;
    let mut folders: Vec<_> = folders.flatten().map(|entry| entry.path()).collect();
    folders.sort();
    for folder in folders.iter().filter(|folder| folder.join(MANIFEST_FILE).is_file()) {
        let found = DataManifest::load(folder)?;
        if Digest::of(found.version.as_bytes()) == manifest.data {
            return Ok(TokenStore::open(folder, context)?);
        }
    }
    Err(Failure::refused(
        data.display(),
        "the data set that the checkpoint was trained on is not there",
        "start `tarazed train` once with the same config: it makes the data set anew",
    ))
}

fn model_failure(error: &ModelError) -> Failure {
    Failure::transient("model", error, "free memory and try again")
}

/// The id drawn from `logits` by `uniform` in [0, 1).
fn draw(logits: &[f32], sampling: &Sampling, uniform: f64) -> u32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // Ties go to the lower id, so the order is one for all machines.
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if sampling.temperature <= 0.0 {
        return order.first().map_or(0, |&id| id as u32);
    }
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let best = order.first().map_or(0.0, |&id| f64::from(logits[id]));
    let weights: Vec<f64> = order
        .iter()
        .map(|&id| libm::exp((f64::from(logits[id]) - best) / sampling.temperature))
        .collect();
    let mut left = uniform * weights.iter().sum::<f64>();
    for (&id, weight) in order.iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return id as u32;
        }
    }
    order.last().map_or(0, |&id| id as u32)
}

/// The `index`-th number in [0, 1) of a seed (SplitMix64; Steele, Lea and Flood 2014).
fn uniform(seed: u64, index: u64) -> f64 {
    let mut z = seed.wrapping_add((index + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLING: Sampling = Sampling {
        temperature: 1.0,
        top_k: 0,
        seed: 0,
        tokens_max: 1,
    };

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.0, 3.0_f32.ln(), f32::NEG_INFINITY];
        let drawn = |index| draw(&logits, &SAMPLING, uniform(7, index)) as usize;
        let mut counts = [0_u32; 3];
        (0..4000).for_each(|index| counts[drawn(index)] += 1);
        assert!(
            counts[2] == 0 && counts[1].abs_diff(3000) < 120,
            "p = 1/4, 3/4, 0; drawn {counts:?}"
        );
    }

    #[test]
    fn cold_or_narrow_draws_take_the_likeliest() {
        let logits = [1.0, 2.0, 2.0];
        for sampling in [
            Sampling {
                temperature: 0.0,
                ..SAMPLING
            },
            Sampling { top_k: 1, ..SAMPLING },
        ] {
            assert!((0..50).all(|index| draw(&logits, &sampling, uniform(1, index)) == 1));
        }
    }
}
