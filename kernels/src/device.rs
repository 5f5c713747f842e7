//! The operations a device offers, and the shapes they take.
//!
//! Matrices are row-major. `[a, b]` in a comment is a shape with `b` contiguous. Every operation overwrites its outputs
//! unless its comment says that it adds. An output never aliases an input, except where an operation works in place.
//! Views that do not fit their buffers are programmer errors and panic; only the device itself fails with an error.

// An operation names its operands one by one; bundles of them would be read in one place only.
#![allow(clippy::too_many_arguments, clippy::type_complexity)]

use crate::hash::BlockHash;
use tarazed_domain::BlockIndex;

/// A device that could not do its work.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DeviceError {
    /// Reconfigure: the memory is not there.
    #[error(
        "{}; lower batch.micro_batch_sequences, model.context or cluster.threads_per_rank, or use more ranks",
        shortage(*.needed_bytes, *.memory)
    )]
    OutOfMemory {
        /// Size of the allocation that failed.
        needed_bytes: usize,
        /// The device's memory just then, where the device says.
        memory: Option<MemoryState>,
    },
    /// Reconfigure the host: memory that a device copies from and to is not there, or may not be pinned.
    #[error(
        "out of pinned host memory: {needed_bytes} bytes more were needed; raise the limits on this process's memory and on locked memory (`ulimit -l`), or run fewer ranks on this host"
    )]
    OutOfPinnedMemory {
        /// Size of the allocation that failed.
        needed_bytes: usize,
    },
    /// Halt this rank: the device does not answer any more, or answered with an error that outlives the call.
    #[error("device failed in {operation}: {cause}; the rank must be replaced")]
    Failed {
        /// What was being done.
        operation: &'static str,
        /// What the device said.
        cause: String,
    },
    /// Reconfigure: this device cannot do the operation at that shape.
    #[error("{operation} is not available at this shape: {cause}")]
    Unsupported {
        /// What was asked for.
        operation: &'static str,
        /// The limit that it hits.
        cause: String,
    },
}

/// A device's memory at a moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryState {
    /// Free, bytes.
    pub free_bytes: usize,
    /// In all, bytes.
    pub total_bytes: usize,
}

fn shortage(needed_bytes: usize, memory: Option<MemoryState>) -> String {
    let there_is = memory.map_or_else(String::new, |memory| {
        let MemoryState {
            free_bytes,
            total_bytes,
        } = memory;
        format!(", and {free_bytes} of the device's {total_bytes} were free")
    });
    format!("out of device memory: {needed_bytes} bytes more were needed{there_is}")
}

impl DeviceError {
    /// What was wanted of the device's memory and what there was, without a remedy: for whoever knows a better one.
    #[must_use]
    pub fn shortage(&self) -> Option<String> {
        match self {
            Self::OutOfMemory { needed_bytes, memory } => Some(shortage(*needed_bytes, *memory)),
            _ => None,
        }
    }
}

/// How a buffer's elements are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Precision {
    /// The device's working precision, for weights and activations: f32 on the CPU, bf16 on a GPU.
    Working,
    /// f32 on every device: gradients, master weights, moments, statistics, losses.
    Full,
}

/// A read-only tensor: a buffer from `offset` (elements) on.
#[derive(Debug)]
pub struct View<'a, B> {
    /// The buffer.
    pub buffer: &'a B,
    /// First element.
    pub offset: usize,
}

impl<B> Clone for View<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B> Copy for View<'_, B> {}

impl<'a, B> View<'a, B> {
    /// The buffer from `offset` on.
    pub const fn at(buffer: &'a B, offset: usize) -> Self {
        Self { buffer, offset }
    }
}

impl<B> View<'_, B> {
    /// The same tensor from `elements` further on.
    #[must_use]
    pub const fn further(self, elements: usize) -> Self {
        Self {
            buffer: self.buffer,
            offset: self.offset + elements,
        }
    }
}

impl<'a, B> From<&'a B> for View<'a, B> {
    fn from(buffer: &'a B) -> Self {
        Self::at(buffer, 0)
    }
}

/// A tensor to write: a buffer from `offset` (elements) on.
#[derive(Debug)]
pub struct ViewMut<'a, B> {
    /// The buffer.
    pub buffer: &'a mut B,
    /// First element.
    pub offset: usize,
}

impl<'a, B> ViewMut<'a, B> {
    /// The buffer from `offset` on.
    pub const fn at(buffer: &'a mut B, offset: usize) -> Self {
        Self { buffer, offset }
    }
}

impl<B> ViewMut<'_, B> {
    /// The same tensor from `elements` further on, for a shorter time.
    pub const fn further(&mut self, elements: usize) -> ViewMut<'_, B> {
        ViewMut {
            buffer: self.buffer,
            offset: self.offset + elements,
        }
    }

    /// The same tensor to read, for a shorter time.
    pub const fn read(&self) -> View<'_, B> {
        View {
            buffer: self.buffer,
            offset: self.offset,
        }
    }
}

impl<'a, B> From<&'a mut B> for ViewMut<'a, B> {
    fn from(buffer: &'a mut B) -> Self {
        Self::at(buffer, 0)
    }
}

/// `C = alpha · op(A) · op(B)`, or `C += …`, with `C: [m, n]` row-major.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Gemm {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Length of each sum.
    pub k: usize,
    /// A is stored `[k, m]` instead of `[m, k]`.
    pub a_transposed: bool,
    /// B is stored `[n, k]` instead of `[k, n]`.
    pub b_transposed: bool,
    /// Elements between A's stored rows.
    pub a_stride: usize,
    /// Elements between B's stored rows.
    pub b_stride: usize,
    /// Elements between C's rows.
    pub c_stride: usize,
    /// Factor of the product.
    pub alpha: f32,
    /// Add to C instead of overwriting it.
    pub accumulate: bool,
}

impl Gemm {
    /// `C = A · Bᵀ` of dense operands, `A: [m, k]`, `B: [n, k]`: a linear layer's forward pass.
    #[must_use]
    pub const fn forward(m: usize, n: usize, k: usize) -> Self {
        Self {
            m,
            n,
            k,
            a_transposed: false,
            b_transposed: true,
            a_stride: k,
            b_stride: k,
            c_stride: n,
            alpha: 1.0,
            accumulate: false,
        }
    }

    /// `C = A · B` of dense operands, `A: [m, k]`, `B: [k, n]`: the gradient into a linear layer's input.
    #[must_use]
    pub const fn input_gradient(m: usize, n: usize, k: usize) -> Self {
        Self {
            b_transposed: false,
            b_stride: n,
            ..Self::forward(m, n, k)
        }
    }

    /// `C += Aᵀ · B` of dense operands, `A: [k, m]`, `B: [k, n]`: the gradient into a linear layer's weight.
    #[must_use]
    pub const fn weight_gradient(m: usize, n: usize, k: usize) -> Self {
        Self {
            a_transposed: true,
            a_stride: m,
            b_transposed: false,
            b_stride: n,
            accumulate: true,
            ..Self::forward(m, n, k)
        }
    }
}

/// RMSNorm over rows (Zhang and Sennrich 2019, arXiv 1910.07467): `y = x / sqrt(mean(x²) + eps) · w`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Norm {
    /// Rows.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
    /// Epsilon.
    pub eps: f32,
}

/// Rotary embedding (Su et al. 2021, arXiv 2104.09864), rotate-half layout: element `i` of a head pairs with
/// `i + head_dim / 2`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rope {
    /// Rows (tokens); the position of row `r` is `r % context`.
    pub rows: usize,
    /// Positions of one sequence.
    pub context: usize,
    /// Heads to rotate, from the start of each row: the query heads and the key heads.
    pub heads: usize,
    /// Elements of a head; even.
    pub head_dim: usize,
    /// Elements between rows.
    pub stride: usize,
}

/// Causal attention of `sequences` sequences over one buffer of rows `[q heads | k heads | v heads]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attention {
    /// Independent sequences.
    pub sequences: usize,
    /// Tokens of each.
    pub context: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`. Query head `h` reads key head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl Attention {
    /// Tokens in all.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.sequences * self.context
    }

    /// Elements of one row of queries, keys and values.
    #[must_use]
    pub const fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Elements of one row of the output.
    #[must_use]
    pub const fn out_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Factor of the scores, `1 / sqrt(head_dim)`.
    #[must_use]
    pub fn scale(&self) -> f32 {
        (1.0 / (self.head_dim as f64).sqrt()) as f32
    }
}

/// An embedding table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Embedding {
    /// Token ids to read.
    pub tokens: usize,
    /// Rows of the table.
    pub vocabulary: usize,
    /// Elements of a row.
    pub width: usize,
}

/// Softmax cross-entropy of rows of logits.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct CrossEntropy {
    /// Rows of logits.
    pub rows: usize,
    /// Logits of a row.
    pub vocabulary: usize,
    /// First target: row `r` answers for `targets[target_offset + r]`.
    pub target_offset: usize,
    /// Factor of the gradient; `None` leaves the logits alone and makes losses only.
    pub gradient_scale: Option<f32>,
}

/// The head and its loss in one: logits are made, used and dropped in chunks of rows.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct HeadLoss {
    /// Rows of hidden states.
    pub rows: usize,
    /// Elements of a hidden state.
    pub width: usize,
    /// Rows of the head.
    pub vocabulary: usize,
    /// Rows of one chunk; the logits scratch holds `chunk_rows · vocabulary` elements.
    pub chunk_rows: usize,
    /// Factor of the gradient.
    pub gradient_scale: f32,
}

/// Rows of logits at least, however large the vocabulary; chunks are whole multiples of it where they can be.
const HEAD_ROWS_MIN: usize = 64;

/// Rows of one chunk of a head at most.
#[must_use]
pub fn head_rows_most(logits_elements: usize, vocabulary: usize) -> usize {
    (logits_elements / vocabulary.max(1)).max(HEAD_ROWS_MIN)
}

/// Rows of one chunk of a head over `rows` rows, where `logits_elements` are made at a time: as few chunks as that allows, and
/// all about as long, so that none is a matrix product of a few rows.
#[must_use]
pub fn head_rows(logits_elements: usize, vocabulary: usize, rows: usize) -> usize {
    let most = head_rows_most(logits_elements, vocabulary);
    let even = rows.div_ceil(rows.div_ceil(most).max(1));
    even.next_multiple_of(HEAD_ROWS_MIN).min(most).min(rows.max(1))
}

/// One AdamW update (Loshchilov and Hutter 2019, arXiv 1711.05101), in PyTorch's order of operations.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AdamwStep {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// First-moment decay.
    pub beta1: f64,
    /// Second-moment decay.
    pub beta2: f64,
    /// Denominator epsilon.
    pub eps: f64,
    /// Decoupled weight decay of this run of blocks; zero for blocks that do not decay.
    pub weight_decay: f64,
    /// Factor of the gradient: loss scale, mean over tokens and clipping in one.
    pub gradient_scale: f32,
    /// Number of this update, from 1.
    pub step: u64,
}

/// Consecutive fixed blocks of the flat parameter space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Blocks {
    /// Number of the first block.
    pub first: BlockIndex,
    /// Elements of each.
    pub block_elements: usize,
}

impl Blocks {
    /// Number of the block `index` further on.
    #[must_use]
    pub const fn number(&self, index: usize) -> BlockIndex {
        BlockIndex(self.first.0 + index as u32)
    }
}

/// Optimizer state of a run of blocks, full precision.
#[derive(Debug)]
pub struct OptimizerState<'a, B> {
    /// Master weights.
    pub master: ViewMut<'a, B>,
    /// AdamW's first moment.
    pub first_moment: ViewMut<'a, B>,
    /// AdamW's second moment.
    pub second_moment: ViewMut<'a, B>,
}

/// Operations on device memory.
///
/// A device is shared between threads; each thread works through a stream of its own, and operations of one stream run in
/// order. Buffers move between threads once the stream that wrote them is synchronised.
pub trait Device: Send + Sync + 'static {
    /// Flat memory of one precision.
    type Buffer: Send + Sync;
    /// Token ids on the device.
    type Tokens: Send + Sync;
    /// One thread's queue of operations and its scratch memory.
    type Stream: Send;

    /// What DET-4 compares: devices with the same name give the same bits to one binary.
    fn device_type(&self) -> String;

    /// Elements of logits that a head makes at a time. It decides how the head's weight gradient is cut into sums, so it is
    /// part of the device's numbers: see [`head_rows`].
    fn logits_elements(&self) -> usize;

    /// A stream for one thread.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] or [`DeviceError::OutOfPinnedMemory`] if its scratch does not fit.
    fn stream(&self) -> Result<Self::Stream, DeviceError>;

    /// A zeroed buffer of `len` elements.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn alloc(&self, len: usize, precision: Precision) -> Result<Self::Buffer, DeviceError>;

    /// Room for `len` token ids, zeroed.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn alloc_tokens(&self, len: usize) -> Result<Self::Tokens, DeviceError>;

    /// Elements of a buffer.
    fn len(&self, buffer: &Self::Buffer) -> usize;

    /// Copies `from` to the device, rounded to the buffer's precision.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn upload(&self, stream: &mut Self::Stream, from: &[f32], to: ViewMut<'_, Self::Buffer>)
    -> Result<(), DeviceError>;

    /// Copies from the device and waits for it.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn download(
        &self,
        stream: &mut Self::Stream,
        from: View<'_, Self::Buffer>,
        to: &mut [f32],
    ) -> Result<(), DeviceError>;

    /// Copies token ids to the start of `to`.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn upload_tokens(&self, stream: &mut Self::Stream, from: &[u32], to: &mut Self::Tokens) -> Result<(), DeviceError>;

    /// Waits until all that was asked of the stream is done.
    ///
    /// # Errors
    /// [`DeviceError::Failed`], also for an earlier operation that failed late.
    fn synchronize(&self, stream: &mut Self::Stream) -> Result<(), DeviceError>;

    /// Sets `len` elements to zero.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn zero(&self, stream: &mut Self::Stream, x: ViewMut<'_, Self::Buffer>, len: usize) -> Result<(), DeviceError>;

    /// Copies `len` elements, converting where the precisions differ.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn copy(
        &self,
        stream: &mut Self::Stream,
        from: View<'_, Self::Buffer>,
        to: ViewMut<'_, Self::Buffer>,
        len: usize,
    ) -> Result<(), DeviceError>;

    /// Makes a product of operands in working precision ready, so that a shape which the device does not take is refused before
    /// a run's first step, and not in it. Nothing to do on a device that takes every shape.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`], [`DeviceError::Failed`].
    fn prepare_gemm(&self, call: &Gemm, result: Precision) -> Result<(), DeviceError> {
        let _ = (call, result);
        Ok(())
    }

    /// Matrix product; see [`Gemm`].
    ///
    /// # Errors
    /// [`DeviceError::Failed`], [`DeviceError::Unsupported`].
    fn gemm(
        &self,
        stream: &mut Self::Stream,
        call: &Gemm,
        a: View<'_, Self::Buffer>,
        b: View<'_, Self::Buffer>,
        c: ViewMut<'_, Self::Buffer>,
    ) -> Result<(), DeviceError>;

    /// Residual addition and norm in one: `sum = x + branch` (or `sum` is not written and `x` is normalised where there
    /// is no branch), `y = norm(sum) · weight`, `inverse_rms: [rows]` kept for the backward pass.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn rms_norm(
        &self,
        stream: &mut Self::Stream,
        call: &Norm,
        x: View<'_, Self::Buffer>,
        branch: Option<(View<'_, Self::Buffer>, ViewMut<'_, Self::Buffer>)>,
        weight: View<'_, Self::Buffer>,
        y: ViewMut<'_, Self::Buffer>,
        inverse_rms: ViewMut<'_, Self::Buffer>,
    ) -> Result<(), DeviceError>;

    /// Gradient of the norm. `x` is the normalised input (`sum` of the forward pass). **Adds** to `x_gradient` (which
    /// holds what came through the residual) and to `weight_gradient`.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn rms_norm_backward(
        &self,
        stream: &mut Self::Stream,
        call: &Norm,
        x: View<'_, Self::Buffer>,
        inverse_rms: View<'_, Self::Buffer>,
        weight: View<'_, Self::Buffer>,
        y_gradient: View<'_, Self::Buffer>,
        x_gradient: ViewMut<'_, Self::Buffer>,
        weight_gradient: ViewMut<'_, Self::Buffer>,
    ) -> Result<(), DeviceError>;

    /// Rotates heads in place. `table: [context, head_dim]` holds, for each position, `head_dim / 2` cosines and as many
    /// sines; `inverse` rotates back, which is the gradient.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn rope(
        &self,
        stream: &mut Self::Stream,
        call: &Rope,
        table: View<'_, Self::Buffer>,
        inverse: bool,
        x: ViewMut<'_, Self::Buffer>,
    ) -> Result<(), DeviceError>;

    /// Causal attention over `qkv: [rows, qkv_width]` into `out: [rows, out_width]`, streaming over blocks of keys (Dao
    /// et al. 2022, arXiv 2205.14135): no score matrix is ever whole. Keeps the log-sum-exp of each score row,
    /// `[sequences, heads, context]`.
    ///
    /// # Errors
    /// [`DeviceError::Failed`], [`DeviceError::Unsupported`].
    fn attention(
        &self,
        stream: &mut Self::Stream,
        call: &Attention,
        qkv: View<'_, Self::Buffer>,
        out: ViewMut<'_, Self::Buffer>,
        log_sum_exp: ViewMut<'_, Self::Buffer>,
    ) -> Result<(), DeviceError>;

    /// Gradient of [`Device::attention`] into `qkv_gradient: [rows, qkv_width]`; scores are made again from
    /// `log_sum_exp`.
    ///
    /// # Errors
    /// [`DeviceError::Failed`], [`DeviceError::Unsupported`].
    fn attention_backward(
        &self,
        stream: &mut Self::Stream,
        call: &Attention,
        qkv: View<'_, Self::Buffer>,
        out: View<'_, Self::Buffer>,
        log_sum_exp: View<'_, Self::Buffer>,
        out_gradient: View<'_, Self::Buffer>,
        qkv_gradient: ViewMut<'_, Self::Buffer>,
    ) -> Result<(), DeviceError>;

    /// `out = silu(gate) · up` (Shazeer 2020, arXiv 2002.05202) of `gate_up: [rows, 2 · width]`, gate first.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn swiglu(
        &self,
        stream: &mut Self::Stream,
        rows: usize,
        width: usize,
        gate_up: View<'_, Self::Buffer>,
        out: ViewMut<'_, Self::Buffer>,
    ) -> Result<(), DeviceError>;

    /// Gradient of [`Device::swiglu`]: replaces `gate_up` by its gradient, in place, and `out_gradient` by the output
    /// itself, made again (the weight gradient of the next layer needs it).
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn swiglu_backward(
        &self,
        stream: &mut Self::Stream,
        rows: usize,
        width: usize,
        gate_up: ViewMut<'_, Self::Buffer>,
        out_gradient: ViewMut<'_, Self::Buffer>,
    ) -> Result<(), DeviceError>;

    /// Row `tokens[i]` of `table` into row `i` of `out`, for each of the first `call.tokens` ids.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn embed(
        &self,
        stream: &mut Self::Stream,
        call: &Embedding,
        table: View<'_, Self::Buffer>,
        tokens: &Self::Tokens,
        out: ViewMut<'_, Self::Buffer>,
    ) -> Result<(), DeviceError>;

    /// **Adds** row `i` of `out_gradient` to row `tokens[i]` of `table_gradient`, in order of `i`.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn embed_backward(
        &self,
        stream: &mut Self::Stream,
        call: &Embedding,
        tokens: &Self::Tokens,
        out_gradient: View<'_, Self::Buffer>,
        table_gradient: ViewMut<'_, Self::Buffer>,
    ) -> Result<(), DeviceError>;

    /// Losses `[rows]` of `logits: [rows, vocabulary]`, and in place of the logits their gradient,
    /// `gradient_scale · (softmax - one_hot)`.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn cross_entropy(
        &self,
        stream: &mut Self::Stream,
        call: &CrossEntropy,
        targets: &Self::Tokens,
        logits: ViewMut<'_, Self::Buffer>,
        losses: ViewMut<'_, Self::Buffer>,
    ) -> Result<(), DeviceError>;

    /// `x += y`, `len` elements.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn add(
        &self,
        stream: &mut Self::Stream,
        x: ViewMut<'_, Self::Buffer>,
        y: View<'_, Self::Buffer>,
        len: usize,
    ) -> Result<(), DeviceError>;

    /// One inner node of the lane tree (DET-2): `left = left + right`, `len` elements of full precision.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn fold(
        &self,
        stream: &mut Self::Stream,
        left: ViewMut<'_, Self::Buffer>,
        right: View<'_, Self::Buffer>,
        len: usize,
    ) -> Result<(), DeviceError> {
        self.add(stream, left, right, len)
    }

    /// Sum of squares of each block of `block_elements`, one for each element of `sums`: the partials of the gradient
    /// norm. Waits for the answer.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn square_sums(
        &self,
        stream: &mut Self::Stream,
        x: View<'_, Self::Buffer>,
        block_elements: usize,
        sums: &mut [f64],
    ) -> Result<(), DeviceError>;

    /// AdamW over consecutive whole blocks, one pass: reads gradients, updates `master`, `first_moment`,
    /// `second_moment`, writes the working copy where one is given, and the hash of each new block (STEP-4). There is one
    /// block for each element of `hashes`: its hash as it was left goes in, its new one comes out. Returns how many blocks
    /// were not as they were left (DET-3): memory changed by itself, and what was made of it is wrong. Waits for the answer.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn adamw(
        &self,
        stream: &mut Self::Stream,
        step: &AdamwStep,
        blocks: Blocks,
        gradient: View<'_, Self::Buffer>,
        state: OptimizerState<'_, Self::Buffer>,
        working: Option<ViewMut<'_, Self::Buffer>>,
        hashes: &mut [BlockHash],
    ) -> Result<usize, DeviceError>;

    /// The hashes that [`Device::adamw`] would have made of the state as it stands. Waits for the answer.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn block_hashes(
        &self,
        stream: &mut Self::Stream,
        blocks: Blocks,
        master: View<'_, Self::Buffer>,
        first_moment: View<'_, Self::Buffer>,
        second_moment: View<'_, Self::Buffer>,
        hashes: &mut [BlockHash],
    ) -> Result<(), DeviceError>;

    /// Head and loss of `hidden: [rows, width]` with `head: [vocabulary, width]`, chunk by chunk: writes `losses: [rows]`
    /// and `hidden_gradient`, **adds** to `head_gradient`. Holds `chunk_rows` rows of logits, never all.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn head_loss(
        &self,
        stream: &mut Self::Stream,
        call: &HeadLoss,
        targets: &Self::Tokens,
        hidden: View<'_, Self::Buffer>,
        head: View<'_, Self::Buffer>,
        logits: &mut Self::Buffer,
        losses: ViewMut<'_, Self::Buffer>,
        gradients: Option<(ViewMut<'_, Self::Buffer>, ViewMut<'_, Self::Buffer>)>,
    ) -> Result<(), DeviceError> {
        let mut losses = losses;
        let mut gradients = gradients;
        let (width, vocabulary) = (call.width, call.vocabulary);
        for start in (0..call.rows).step_by(call.chunk_rows.max(1)) {
            let rows = call.chunk_rows.min(call.rows - start);
            let chunk = hidden.further(start * width);
            let forward = Gemm::forward(rows, vocabulary, width);
            self.gemm(stream, &forward, chunk, head, ViewMut::from(&mut *logits))?;
            let entropy = CrossEntropy {
                rows,
                vocabulary,
                target_offset: start,
                gradient_scale: gradients.is_some().then_some(call.gradient_scale),
            };
            self.cross_entropy(
                stream,
                &entropy,
                targets,
                ViewMut::from(&mut *logits),
                losses.further(start),
            )?;
            if let Some((into_hidden, into_head)) = &mut gradients {
                let backward = Gemm::input_gradient(rows, width, vocabulary);
                self.gemm(
                    stream,
                    &backward,
                    View::from(&*logits),
                    head,
                    into_hidden.further(start * width),
                )?;
                let weight = Gemm::weight_gradient(vocabulary, width, rows);
                self.gemm(stream, &weight, View::from(&*logits), chunk, into_head.further(0))?;
            }
        }
        Ok(())
    }
}
