//! The passes: forward, loss, backward, as straight lines over a device.

use crate::weights::{LayerWeights, Weights};
use crate::workspace::{Activations, Scratch, Workspace};
use std::sync::atomic::{AtomicBool, Ordering};
use tarazed_domain::ParameterLayout;
use tarazed_domain::config::ModelConfig;
use tarazed_kernels::{
    Attention, Device, DeviceError, Embedding, Gemm, HeadLoss, Norm, Precision, Rope, View, ViewMut, head_rows,
};

/// A pass that gave no result.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The abort flag was set; the gradient buffer holds a part of a sum and must be dropped or zeroed.
    #[error("the pass was aborted; its gradients are partial and must not be used")]
    Aborted,
    /// Halt or reconfigure, as the device says.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Reconfigure: the input does not fit this model or workspace.
    #[error("bad input to the model: {cause}; {remedy}")]
    Input {
        /// What does not fit.
        cause: String,
        /// What to do about it.
        remedy: &'static str,
    },
}

impl ModelError {
    pub(crate) fn input(cause: String, remedy: &'static str) -> Self {
        Self::Input { cause, remedy }
    }
}

/// Aquila2 on one device. It holds no weights; they are passed to each pass.
pub struct Model<D: Device> {
    device: D,
    config: ModelConfig,
    weights: Weights,
    /// Cosines and sines, `[context, head_dim]`.
    rotation: D::Buffer,
}

/// Shape of one pass.
#[derive(Clone, Copy)]
struct Shape {
    sequences: usize,
    length: usize,
}

impl Shape {
    const fn rows(self) -> usize {
        self.sequences * self.length
    }
}

fn check_abort(abort: &AtomicBool) -> Result<(), ModelError> {
    if abort.load(Ordering::Relaxed) {
        return Err(ModelError::Aborted);
    }
    Ok(())
}

/// Cosines and sines of each position, in f64 with the `libm` crate: the system's last bits differ between versions.
fn rotation_table(config: &ModelConfig) -> Vec<f32> {
    let half = config.head_dim() / 2;
    let mut table = Vec::with_capacity(config.context * 2 * half);
    for position in 0..config.context {
        let angle = |index: usize| {
            let exponent = -2.0 * index as f64 / config.head_dim() as f64;
            position as f64 * libm::pow(config.rope_theta, exponent)
        };
        table.extend((0..half).map(|index| libm::cos(angle(index)) as f32));
        table.extend((0..half).map(|index| libm::sin(angle(index)) as f32));
    }
    table
}

impl<D: Device> Model<D> {
    /// The model of a config, over the flat space of `layout` (made by [`crate::parameter_layout`]).
    ///
    /// # Errors
    /// [`ModelError::Device`] if its tables do not fit, [`ModelError::Input`] if the layout is another model's.
    pub fn new(config: &ModelConfig, layout: &ParameterLayout, device: D) -> Result<Self, ModelError> {
        let weights = Weights::find(config, layout)?;
        let table = rotation_table(config);
        let mut rotation = device.alloc(table.len(), Precision::Full)?;
        let mut stream = device.stream()?;
        device.upload(&mut stream, &table, ViewMut::from(&mut rotation))?;
        device.synchronize(&mut stream)?;
        Ok(Self {
            device,
            config: config.clone(),
            weights,
            rotation,
        })
    }

    /// The device.
    pub const fn device(&self) -> &D {
        &self.device
    }

    /// Rows of logits made at a time in a pass over `rows` rows.
    fn head_rows(&self, rows: usize) -> usize {
        head_rows(self.device.logits_elements(), self.config.vocabulary, rows)
    }

    /// Memory for passes of at most `sequences` sequences, one for each compute thread.
    ///
    /// # Errors
    /// [`ModelError::Device`] with the size that did not fit.
    pub fn workspace(&self, sequences: usize) -> Result<Workspace<D>, ModelError> {
        Ok(Workspace::new(&self.device, &self.config, sequences)?)
    }

    /// Makes every matrix product of passes over `sequences` sequences ready. Shorter micro-batches, which evaluations and a
    /// ramped batch have, make theirs ready when they come.
    ///
    /// # Errors
    /// [`ModelError::Device`]: the device does not take one of them.
    pub fn prepare(&self, sequences: usize) -> Result<(), ModelError> {
        for (call, result) in self.products(sequences * self.config.context) {
            self.device.prepare_gemm(&call, result)?;
        }
        Ok(())
    }

    /// The products of a pass over so many rows, forward and backward, each with its result's precision.
    fn products(&self, rows: usize) -> Vec<(Gemm, Precision)> {
        let (c, head_rows) = (&self.config, self.head_rows(rows));
        let attention = self.attention(Shape {
            sequences: 1,
            length: c.context,
        });
        let mut layers = vec![
            (rows, attention.qkv_width(), c.hidden),
            (rows, c.hidden, attention.out_width()),
            (rows, 2 * c.ffn, c.hidden),
            (rows, c.hidden, c.ffn),
            (head_rows, c.vocabulary, c.hidden),
        ];
        // The last rows of logits may be fewer.
        if !rows.is_multiple_of(head_rows) {
            layers.push((rows % head_rows, c.vocabulary, c.hidden));
        }
        let passes = |(rows, outputs, inputs)| {
            [
                (Gemm::forward(rows, outputs, inputs), Precision::Working),
                (Gemm::input_gradient(rows, inputs, outputs), Precision::Working),
                (Gemm::weight_gradient(outputs, inputs, rows), Precision::Full),
            ]
        };
        layers.into_iter().flat_map(passes).collect()
    }

    /// One micro-batch, forward and backward. `tokens` holds `sequences` runs of `context + 1` ids. **Adds** to
    /// `gradients` the gradient of `loss_scale` times the sum of all token losses, and returns each sequence's sum of
    /// token losses (nats), summed in token order.
    ///
    /// # Errors
    /// [`ModelError::Aborted`] soon after `abort` is set; [`ModelError::Input`], [`ModelError::Device`].
    pub fn forward_backward(
        &self,
        weights: &D::Buffer,
        gradients: &mut D::Buffer,
        workspace: &mut Workspace<D>,
        tokens: &[u32],
        loss_scale: f32,
        abort: &AtomicBool,
    ) -> Result<Vec<f64>, ModelError> {
        let shape = self.load(workspace, tokens)?;
        self.trunk(weights, workspace, shape, abort)?;
        self.head(weights, workspace, shape, Some((gradients, loss_scale)))?;
        self.backward(weights, gradients, workspace, shape, abort)?;
        self.sum_losses(workspace, shape)
    }

    /// Like [`Model::forward_backward`], losses only: the same bits.
    ///
    /// # Errors
    /// As there.
    pub fn losses(
        &self,
        weights: &D::Buffer,
        workspace: &mut Workspace<D>,
        tokens: &[u32],
        abort: &AtomicBool,
    ) -> Result<Vec<f64>, ModelError> {
        let shape = self.load(workspace, tokens)?;
        self.trunk(weights, workspace, shape, abort)?;
        self.head(weights, workspace, shape, None)?;
        self.sum_losses(workspace, shape)
    }

    /// Loss of each of 2 to `context + 1` tokens but the first, in nats, given those before it; of `context + 1` tokens the
    /// same bits as [`Model::losses`] sums.
    ///
    /// # Errors
    /// [`ModelError::Input`] for too few tokens or too many, [`ModelError::Device`].
    pub fn token_losses(
        &self,
        weights: &D::Buffer,
        workspace: &mut Workspace<D>,
        tokens: &[u32],
    ) -> Result<Vec<f32>, ModelError> {
        let context = self.config.context;
        if tokens.len() < 2 || tokens.len() > context + 1 {
            let cause = format!("{} tokens, where 2 to {} are possible", tokens.len(), context + 1);
            return Err(ModelError::input(cause, "give the last `model.context + 1` tokens"));
        }
        self.check_ids(tokens)?;
        let length = tokens.len() - 1;
        let shape = Shape { sequences: 1, length };
        let stream = &mut workspace.stream;
        self.device
            .upload_tokens(stream, &tokens[..length], &mut workspace.inputs)?;
        self.device
            .upload_tokens(stream, &tokens[1..], &mut workspace.targets)?;
        self.trunk(weights, workspace, shape, &AtomicBool::new(false))?;
        self.head(weights, workspace, shape, None)?;
        let mut losses = vec![0.0; length];
        self.device
            .download(&mut workspace.stream, View::from(&workspace.losses), &mut losses)?;
        Ok(losses)
    }

    /// Logits after the last of 1 to `context` tokens.
    ///
    /// # Errors
    /// [`ModelError::Input`] for no tokens or too many, [`ModelError::Device`].
    pub fn next_logits(
        &self,
        weights: &D::Buffer,
        workspace: &mut Workspace<D>,
        tokens: &[u32],
    ) -> Result<Vec<f32>, ModelError> {
        let length = tokens.len();
        if length == 0 || length > self.config.context {
            let cause = format!("{length} tokens, where 1 to {} are possible", self.config.context);
            return Err(ModelError::input(cause, "give the last `model.context` tokens"));
        }
        self.check_ids(tokens)?;
        let shape = Shape { sequences: 1, length };
        self.device
            .upload_tokens(&mut workspace.stream, tokens, &mut workspace.inputs)?;
        self.trunk(weights, workspace, shape, &AtomicBool::new(false))?;
        let (hidden, vocabulary) = (self.config.hidden, self.config.vocabulary);
        let ws = workspace;
        self.device.gemm(
            &mut ws.stream,
            &Gemm::forward(1, vocabulary, hidden),
            View::at(&ws.scratch.normed, (length - 1) * hidden),
            View::at(weights, self.weights.head),
            ViewMut::from(&mut ws.scratch.logits),
        )?;
        let mut logits = vec![0.0; vocabulary];
        self.device
            .download(&mut ws.stream, View::from(&ws.scratch.logits), &mut logits)?;
        Ok(logits)
    }

    fn check_ids(&self, tokens: &[u32]) -> Result<(), ModelError> {
        match tokens.iter().find(|&&token| token as usize >= self.config.vocabulary) {
            None => Ok(()),
            Some(token) => Err(ModelError::input(
                format!("token id {token} in a vocabulary of {}", self.config.vocabulary),
                "prepare the data with this model's tokenizer",
            )),
        }
    }

    /// Splits runs of `context + 1` ids into inputs and targets, on the device.
    fn load(&self, workspace: &mut Workspace<D>, tokens: &[u32]) -> Result<Shape, ModelError> {
        let length = self.config.context;
        let sequences = tokens.len() / (length + 1);
        if sequences == 0 || sequences > workspace.sequences || !tokens.len().is_multiple_of(length + 1) {
            let cause = format!(
                "{} ids, where 1 to {} runs of {} were expected",
                tokens.len(),
                workspace.sequences,
                length + 1
            );
            return Err(ModelError::input(
                cause,
                "make the workspace for as many sequences as a micro-batch has",
            ));
        }
        self.check_ids(tokens)?;
        let host = &mut workspace.host_tokens;
        for (first, to) in [(0, &mut workspace.inputs), (1, &mut workspace.targets)] {
            host.clear();
            for run in tokens.chunks_exact(length + 1) {
                host.extend_from_slice(&run[first..first + length]);
            }
            self.device.upload_tokens(&mut workspace.stream, host, to)?;
        }
        Ok(Shape { sequences, length })
    }

    const fn norm(&self, shape: Shape) -> Norm {
        Norm {
            rows: shape.rows(),
            width: self.config.hidden,
            eps: self.config.norm_eps as f32,
        }
    }

    const fn attention(&self, shape: Shape) -> Attention {
        Attention {
            sequences: shape.sequences,
            context: shape.length,
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            head_dim: self.config.head_dim(),
        }
    }

    const fn rope(&self, shape: Shape) -> Rope {
        let attention = self.attention(shape);
        Rope {
            rows: shape.rows(),
            context: shape.length,
            heads: self.config.heads + self.config.kv_heads,
            head_dim: self.config.head_dim(),
            stride: attention.qkv_width(),
        }
    }

    const fn embedding(&self, shape: Shape) -> Embedding {
        Embedding {
            tokens: shape.rows(),
            vocabulary: self.config.vocabulary,
            width: self.config.hidden,
        }
    }

    /// Embedding and all layers, up to the normalised hidden states.
    fn trunk(
        &self,
        weights: &D::Buffer,
        workspace: &mut Workspace<D>,
        shape: Shape,
        abort: &AtomicBool,
    ) -> Result<(), ModelError> {
        let Workspace {
            stream,
            inputs,
            layers,
            last,
            scratch,
            ..
        } = workspace;
        let table = View::at(weights, self.weights.embedding);
        // A residual stream entry for each layer, and one behind the last.
        let Some(first) = layers.first_mut() else {
            return Err(ModelError::input("no layer".to_owned(), "set model.layers"));
        };
        self.device.embed(
            stream,
            &self.embedding(shape),
            table,
            inputs,
            ViewMut::from(&mut first.input),
        )?;
        for index in 0..layers.len() {
            check_abort(abort)?;
            let (done, rest) = layers.split_at_mut(index);
            let Some(layer) = rest.first_mut() else { break };
            let before = done.last().map(|before| &before.middle);
            self.layer(
                weights,
                stream,
                (before, layer),
                scratch,
                shape,
                &self.weights.layers[index],
            )?;
        }
        check_abort(abort)?;
        let Some(before) = layers.last() else { return Ok(()) };
        self.device.rms_norm(
            stream,
            &self.norm(shape),
            View::from(&before.middle),
            Some((View::from(&scratch.branch), ViewMut::from(&mut last.input))),
            View::at(weights, self.weights.norm),
            ViewMut::from(&mut scratch.normed),
            ViewMut::from(&mut last.inverse_rms),
        )?;
        Ok(())
    }

    /// One layer. The branch of the layer before waits in `scratch.branch`, to be added on the way in; this layer's MLP
    /// leaves its own there.
    fn layer(
        &self,
        weights: &D::Buffer,
        stream: &mut D::Stream,
        (before, layer): (Option<&D::Buffer>, &mut Activations<D>),
        scratch: &mut Scratch<D>,
        shape: Shape,
        at: &LayerWeights,
    ) -> Result<(), DeviceError> {
        let (d, c, rows) = (&self.device, &self.config, shape.rows());
        let weight = |offset| View::at(weights, offset);
        let attention = self.attention(shape);
        let branch = View::from(&scratch.branch);
        let inverse_rms = ViewMut::from(&mut layer.input_inverse_rms);
        let (x, sum) = match before {
            None => (View::from(&layer.input), None),
            Some(before) => (View::from(before), Some((branch, ViewMut::from(&mut layer.input)))),
        };
        let to = ViewMut::from(&mut layer.input_normed);
        d.rms_norm(
            stream,
            &self.norm(shape),
            x,
            sum,
            weight(at.input_norm),
            to,
            inverse_rms,
        )?;

        let qkv = Gemm::forward(rows, attention.qkv_width(), c.hidden);
        let normed = View::from(&layer.input_normed);
        d.gemm(stream, &qkv, normed, weight(at.qkv), ViewMut::from(&mut layer.qkv))?;
        let table = View::from(&self.rotation);
        d.rope(stream, &self.rope(shape), table, false, ViewMut::from(&mut layer.qkv))?;
        let to = (
            ViewMut::from(&mut layer.attended),
            ViewMut::from(&mut layer.log_sum_exp),
        );
        d.attention(stream, &attention, View::from(&layer.qkv), to.0, to.1)?;
        let out = Gemm::forward(rows, c.hidden, attention.out_width());
        let attended = View::from(&layer.attended);
        d.gemm(
            stream,
            &out,
            attended,
            weight(at.out),
            ViewMut::from(&mut scratch.branch),
        )?;

        d.rms_norm(
            stream,
            &self.norm(shape),
            View::from(&layer.input),
            Some((View::from(&scratch.branch), ViewMut::from(&mut layer.middle))),
            weight(at.middle_norm),
            ViewMut::from(&mut layer.middle_normed),
            ViewMut::from(&mut layer.middle_inverse_rms),
        )?;
        let gate_up = Gemm::forward(rows, 2 * c.ffn, c.hidden);
        let normed = View::from(&layer.middle_normed);
        d.gemm(
            stream,
            &gate_up,
            normed,
            weight(at.gate_up),
            ViewMut::from(&mut layer.gate_up),
        )?;
        let to = ViewMut::from(&mut scratch.inner);
        d.swiglu(stream, rows, c.ffn, View::from(&layer.gate_up), to)?;
        let down = Gemm::forward(rows, c.hidden, c.ffn);
        let inner = View::from(&scratch.inner);
        d.gemm(
            stream,
            &down,
            inner,
            weight(at.down),
            ViewMut::from(&mut scratch.branch),
        )
    }

    /// Head and loss; with gradients, leaves the gradient of the normalised hidden states in `scratch.normed_gradient`.
    fn head(
        &self,
        weights: &D::Buffer,
        workspace: &mut Workspace<D>,
        shape: Shape,
        gradients: Option<(&mut D::Buffer, f32)>,
    ) -> Result<(), ModelError> {
        let ws = workspace;
        let scratch = &mut ws.scratch;
        let call = HeadLoss {
            rows: shape.rows(),
            width: self.config.hidden,
            vocabulary: self.config.vocabulary,
            chunk_rows: self.head_rows(shape.rows()),
            gradient_scale: gradients.as_ref().map_or(0.0, |(_, scale)| *scale),
        };
        let gradients = gradients.map(|(gradients, _)| {
            (
                ViewMut::from(&mut scratch.normed_gradient),
                ViewMut::at(gradients, self.weights.head),
            )
        });
        self.device.head_loss(
            &mut ws.stream,
            &call,
            &ws.targets,
            View::from(&scratch.normed),
            View::at(weights, self.weights.head),
            &mut scratch.logits,
            ViewMut::from(&mut ws.losses),
            gradients,
        )?;
        Ok(())
    }

    /// From `scratch.normed_gradient` back to the embedding.
    fn backward(
        &self,
        weights: &D::Buffer,
        gradients: &mut D::Buffer,
        workspace: &mut Workspace<D>,
        shape: Shape,
        abort: &AtomicBool,
    ) -> Result<(), ModelError> {
        let ws = workspace;
        let (stream, scratch) = (&mut ws.stream, &mut ws.scratch);
        let rows = shape.rows();
        self.device
            .zero(stream, ViewMut::from(&mut scratch.gradient), rows * self.config.hidden)?;
        self.device.rms_norm_backward(
            stream,
            &self.norm(shape),
            View::from(&ws.last.input),
            View::from(&ws.last.inverse_rms),
            View::at(weights, self.weights.norm),
            View::from(&scratch.normed_gradient),
            ViewMut::from(&mut scratch.gradient),
            ViewMut::at(gradients, self.weights.norm),
        )?;
        for (layer, at) in ws.layers.iter_mut().zip(&self.weights.layers).rev() {
            check_abort(abort)?;
            self.mlp_backward(weights, gradients, stream, layer, scratch, shape, at)?;
            self.attention_backward(weights, gradients, stream, layer, scratch, shape, at)?;
        }
        let gradient = View::from(&scratch.gradient);
        let to = ViewMut::at(gradients, self.weights.embedding);
        self.device
            .embed_backward(stream, &self.embedding(shape), &ws.inputs, gradient, to)?;
        Ok(())
    }

    /// The MLP half of a layer. `scratch.gradient` is the gradient of the residual stream behind it, then before it.
    #[allow(clippy::too_many_arguments)]
    fn mlp_backward(
        &self,
        weights: &D::Buffer,
        gradients: &mut D::Buffer,
        stream: &mut D::Stream,
        layer: &mut Activations<D>,
        scratch: &mut Scratch<D>,
        shape: Shape,
        at: &LayerWeights,
    ) -> Result<(), DeviceError> {
        let (d, c, rows) = (&self.device, &self.config, shape.rows());
        let weight = |offset| View::at(weights, offset);
        let into_inner = Gemm::input_gradient(rows, c.ffn, c.hidden);
        let gradient = View::from(&scratch.gradient);
        d.gemm(
            stream,
            &into_inner,
            gradient,
            weight(at.down),
            ViewMut::from(&mut scratch.inner),
        )?;
        let to = (ViewMut::from(&mut layer.gate_up), ViewMut::from(&mut scratch.inner));
        d.swiglu_backward(stream, rows, c.ffn, to.0, to.1)?;
        let into_down = Gemm::weight_gradient(c.hidden, c.ffn, rows);
        let inner = View::from(&scratch.inner);
        d.gemm(stream, &into_down, gradient, inner, ViewMut::at(gradients, at.down))?;

        let gate_up = View::from(&layer.gate_up);
        let into_gate_up = Gemm::weight_gradient(2 * c.ffn, c.hidden, rows);
        let normed = View::from(&layer.middle_normed);
        d.gemm(
            stream,
            &into_gate_up,
            gate_up,
            normed,
            ViewMut::at(gradients, at.gate_up),
        )?;
        let into_normed = Gemm::input_gradient(rows, c.hidden, 2 * c.ffn);
        let to = ViewMut::from(&mut scratch.normed_gradient);
        d.gemm(stream, &into_normed, gate_up, weight(at.gate_up), to)?;
        d.rms_norm_backward(
            stream,
            &self.norm(shape),
            View::from(&layer.middle),
            View::from(&layer.middle_inverse_rms),
            weight(at.middle_norm),
            View::from(&scratch.normed_gradient),
            ViewMut::from(&mut scratch.gradient),
            ViewMut::at(gradients, at.middle_norm),
        )
    }

    /// The attention half of a layer.
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        &self,
        weights: &D::Buffer,
        gradients: &mut D::Buffer,
        stream: &mut D::Stream,
        layer: &mut Activations<D>,
        scratch: &mut Scratch<D>,
        shape: Shape,
        at: &LayerWeights,
    ) -> Result<(), DeviceError> {
        let (d, c, rows) = (&self.device, &self.config, shape.rows());
        let weight = |offset| View::at(weights, offset);
        let attention = self.attention(shape);
        let gradient = View::from(&scratch.gradient);
        let attended = View::from(&layer.attended);
        let into_out = Gemm::weight_gradient(c.hidden, attention.out_width(), rows);
        d.gemm(stream, &into_out, gradient, attended, ViewMut::at(gradients, at.out))?;
        let into_attended = Gemm::input_gradient(rows, attention.out_width(), c.hidden);
        let to = ViewMut::from(&mut scratch.branch);
        d.gemm(stream, &into_attended, gradient, weight(at.out), to)?;

        let (qkv, log_sum_exp) = (View::from(&layer.qkv), View::from(&layer.log_sum_exp));
        let out_gradient = View::from(&scratch.branch);
        let to = ViewMut::from(&mut scratch.qkv_gradient);
        d.attention_backward(stream, &attention, qkv, attended, log_sum_exp, out_gradient, to)?;
        let table = View::from(&self.rotation);
        d.rope(
            stream,
            &self.rope(shape),
            table,
            true,
            ViewMut::from(&mut scratch.qkv_gradient),
        )?;

        let qkv_gradient = View::from(&scratch.qkv_gradient);
        let into_qkv = Gemm::weight_gradient(attention.qkv_width(), c.hidden, rows);
        let normed = View::from(&layer.input_normed);
        d.gemm(stream, &into_qkv, qkv_gradient, normed, ViewMut::at(gradients, at.qkv))?;
        let into_normed = Gemm::input_gradient(rows, c.hidden, attention.qkv_width());
        let to = ViewMut::from(&mut scratch.normed_gradient);
        d.gemm(stream, &into_normed, qkv_gradient, weight(at.qkv), to)?;
        d.rms_norm_backward(
            stream,
            &self.norm(shape),
            View::from(&layer.input),
            View::from(&layer.input_inverse_rms),
            weight(at.input_norm),
            View::from(&scratch.normed_gradient),
            ViewMut::from(&mut scratch.gradient),
            ViewMut::at(gradients, at.input_norm),
        )
    }

    /// Each sequence's sum of token losses, in f64 and token order. Waits for the device.
    fn sum_losses(&self, workspace: &mut Workspace<D>, shape: Shape) -> Result<Vec<f64>, ModelError> {
        let host = &mut workspace.host_losses[..shape.rows()];
        self.device
            .download(&mut workspace.stream, View::from(&workspace.losses), host)?;
        let sum = |losses: &[f32]| losses.iter().fold(0.0, |sum, &loss| sum + f64::from(loss));
        Ok(host.chunks_exact(shape.length).map(sum).collect())
    }
}
