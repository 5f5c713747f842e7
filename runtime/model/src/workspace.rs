//! Activations and scratch of one compute thread, allocated once.

use tarazed_domain::config::ModelConfig;
use tarazed_kernels::{Device, DeviceError, Precision, head_rows_most};

/// What the backward pass needs of one layer.
pub(crate) struct Activations<D: Device> {
    /// Residual stream on entry, `[rows, hidden]`.
    pub input: D::Buffer,
    pub input_inverse_rms: D::Buffer,
    pub input_normed: D::Buffer,
    /// Rotated queries and keys, and values.
    pub qkv: D::Buffer,
    pub attended: D::Buffer,
    pub log_sum_exp: D::Buffer,
    /// Residual stream between attention and MLP.
    pub middle: D::Buffer,
    pub middle_inverse_rms: D::Buffer,
    pub middle_normed: D::Buffer,
    /// `[rows, 2 · ffn]`; the backward pass replaces it by its gradient.
    pub gate_up: D::Buffer,
}

/// What the backward pass needs behind the last layer.
pub(crate) struct Last<D: Device> {
    pub input: D::Buffer,
    pub inverse_rms: D::Buffer,
}

/// Memory that no layer keeps.
pub(crate) struct Scratch<D: Device> {
    /// Output of a branch before it joins the residual stream; gradient of attention's output on the way back.
    pub branch: D::Buffer,
    /// `[rows, ffn]`
    pub inner: D::Buffer,
    /// Hidden states before the head.
    pub normed: D::Buffer,
    pub normed_gradient: D::Buffer,
    /// Gradient of the residual stream.
    pub gradient: D::Buffer,
    pub qkv_gradient: D::Buffer,
    /// `[head rows, vocabulary]`
    pub logits: D::Buffer,
}

/// Activations and scratch of one compute thread.
pub struct Workspace<D: Device> {
    pub(crate) stream: D::Stream,
    pub(crate) sequences: usize,
    pub(crate) inputs: D::Tokens,
    pub(crate) targets: D::Tokens,
    pub(crate) host_tokens: Vec<u32>,
    pub(crate) host_losses: Vec<f32>,
    pub(crate) losses: D::Buffer,
    pub(crate) layers: Vec<Activations<D>>,
    pub(crate) last: Last<D>,
    pub(crate) scratch: Scratch<D>,
}

/// Rows of logits that a workspace for passes over at most `sequences` sequences holds, on a device that makes
/// `logits_elements` at a time. Fewer rows than all may be one longer chunk, so it is the longest of any.
#[must_use]
pub fn logits_rows(logits_elements: usize, config: &ModelConfig, sequences: usize) -> usize {
    head_rows_most(logits_elements, config.vocabulary).min(sequences * config.context)
}

impl<D: Device> Workspace<D> {
    pub(crate) fn new(device: &D, config: &ModelConfig, sequences: usize) -> Result<Self, DeviceError> {
        let rows = sequences * config.context;
        let longest = logits_rows(device.logits_elements(), config, sequences);
        let working = |width: usize| device.alloc(rows * width, Precision::Working);
        let full = |width: usize| device.alloc(rows * width, Precision::Full);
        let (hidden, ffn) = (config.hidden, config.ffn);
        let attended = config.heads * config.head_dim();
        let qkv = (config.heads + 2 * config.kv_heads) * config.head_dim();
        let layer = |_| {
            Ok(Activations {
                input: working(hidden)?,
                input_inverse_rms: full(1)?,
                input_normed: working(hidden)?,
                qkv: working(qkv)?,
                attended: working(attended)?,
                log_sum_exp: full(config.heads)?,
                middle: working(hidden)?,
                middle_inverse_rms: full(1)?,
                middle_normed: working(hidden)?,
                gate_up: working(2 * ffn)?,
            })
        };
        Ok(Self {
            stream: device.stream()?,
            sequences,
            inputs: device.alloc_tokens(rows)?,
            targets: device.alloc_tokens(rows)?,
            host_tokens: Vec::with_capacity(rows),
            host_losses: vec![0.0; rows],
            losses: full(1)?,
            layers: (0..config.layers).map(layer).collect::<Result<_, DeviceError>>()?,
            last: Last {
                input: working(hidden)?,
                inverse_rms: full(1)?,
            },
            scratch: Scratch {
                branch: working(hidden.max(attended))?,
                inner: working(ffn)?,
                normed: working(hidden)?,
                normed_gradient: working(hidden)?,
                gradient: working(hidden)?,
                qkv_gradient: working(qkv)?,
                logits: device.alloc(longest * config.vocabulary, Precision::Working)?,
            },
        })
    }

    /// The thread's stream, for the device operations around a pass.
    pub const fn stream(&mut self) -> &mut D::Stream {
        &mut self.stream
    }
}
