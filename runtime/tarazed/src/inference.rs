//! Text from a checkpoint: weights out of the store, the model on the processor, one token at a time.
//!
//! For looking at a run, not for serving: every token runs the whole context again. The same checkpoint, prompt and
//! [`Sampling`] give the same text.

use crate::exit::Failure;
use crate::source::{Opened, Source};
use futures::StreamExt;
use tarazed_corpus::Tokenizer;
use tarazed_domain::StepsCompleted;
use tarazed_domain::config::Config;
use tarazed_kernels::{CpuDevice, Device, DeviceError, Precision, ViewMut};
use tarazed_model::{Model, ModelError, Workspace};

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
    /// The run's config.
    pub config: Config,
    /// Which checkpoint.
    pub step: StepsCompleted,
}

impl Inference {
    /// Reads the checkpoint that was named.
    ///
    /// # Errors
    /// By cause: no run or store, no such checkpoint, a store that does not answer, bytes that fail their hash.
    pub async fn open(source: &Source) -> Result<Self, Failure> {
        Self::load(source.open().await?).await
    }

    /// Reads a checkpoint that was found.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn load(opened: Opened) -> Result<Self, Failure> {
        let device = CpuDevice::new();
        let weights = load_weights(&opened, &device).await?;
        let Opened {
            manifest,
            config,
            layout,
            tokenizer,
            ..
        } = opened;
        let model = Model::new(&config.model, &layout, device).map_err(|e| model_failure(&e))?;
        let workspace = model.workspace(1).map_err(|e| model_failure(&e))?;
        Ok(Self {
            model,
            weights,
            workspace,
            tokenizer,
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
        let mut tokens = vec![self.tokenizer.end_of_document()];
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
        let end = self.tokenizer.end_of_document();
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

async fn load_weights(opened: &Opened, device: &CpuDevice) -> Result<Buffer, Failure> {
    let device_failure = |e: DeviceError| model_failure(&ModelError::Device(e));
    let mut weights = device
        .alloc(opened.layout.flat_elements(), Precision::Working)
        .map_err(device_failure)?;
    let mut stream = device.stream().map_err(device_failure)?;
    let mut parts = std::pin::pin!(opened.store.read_weights(&opened.manifest));
    while let Some(part) = parts.next().await {
        let part = match part {
            Ok(part) => part,
            Err(error) => return Err(opened.unread(error).await),
        };
        let into = ViewMut::at(&mut weights, part.first_element as usize);
        device.upload(&mut stream, &part.values, into).map_err(device_failure)?;
    }
    device.synchronize(&mut stream).map_err(device_failure)?;
    Ok(weights)
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
