//! The CPU device.
//!
//! One call runs on one thread, by design (DET-2): a rank's threads work on different lanes. All arithmetic is f32 with
//! explicit fused multiply-adds over sixteen virtual lanes (`lanes`), so AVX-512, AVX2 and portable code give the same
//! bits, and so do all addresses (DET-1). Error bounds against exact arithmetic are stated, and checked, in
//! [`crate::conformance`].

// Lanes and rows are counted: an iterator over one of several arrays would hide which.
#![allow(clippy::needless_range_loop)]

mod attention;
mod exponential;
mod gemm;
mod lanes;
mod memory;
mod optimizer;
mod pointwise;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use memory::CpuBuffer;
pub(crate) use optimizer::AdamwScalars;

use crate::device::*;
use crate::hash::BlockHash;
use lanes::Isa;

/// The CPU as a device. Buffers are f32 whatever their precision.
#[derive(Clone, Copy, Debug)]
pub struct CpuDevice {
    isa: Isa,
}

/// Scratch memory of one thread.
#[derive(Debug)]
pub struct CpuStream {
    gemm: gemm::GemmScratch,
    attention: attention::AttentionScratch,
    /// One row of sums.
    row: Vec<f32>,
}

impl Default for CpuDevice {
    fn default() -> Self {
        Self::new()
    }
}

impl CpuDevice {
    /// The device with the best instruction set that this machine has.
    #[must_use]
    pub fn new() -> Self {
        Self {
            isa: Isa::available()[0],
        }
    }

    /// One device for each instruction set that this machine can run; all give the same bits.
    #[must_use]
    pub fn all_instruction_sets() -> Vec<Self> {
        Isa::available().into_iter().map(|isa| Self { isa }).collect()
    }

    /// Name of the instruction set in use, for reports; it decides speed alone.
    #[must_use]
    pub const fn instruction_set(&self) -> &'static str {
        self.isa.name()
    }
}

impl<'a> View<'a, CpuBuffer> {
    /// `len` elements.
    fn elements(self, len: usize) -> &'a [f32] {
        &self.buffer[self.offset..self.offset + len]
    }

    fn rest(self) -> &'a [f32] {
        &self.buffer[self.offset..]
    }
}

impl<'a> ViewMut<'a, CpuBuffer> {
    /// `len` elements.
    fn elements(self, len: usize) -> &'a mut [f32] {
        &mut self.buffer[self.offset..self.offset + len]
    }

    fn rest(self) -> &'a mut [f32] {
        &mut self.buffer[self.offset..]
    }
}

type In<'a> = View<'a, CpuBuffer>;
type Out<'a> = ViewMut<'a, CpuBuffer>;
type Done = Result<(), DeviceError>;

/// Elements of logits made at a time: what stays in a processor's caches.
pub const LOGITS_ELEMENTS: usize = 1 << 20;

impl Device for CpuDevice {
    type Buffer = CpuBuffer;
    type Tokens = Vec<u32>;
    type Stream = CpuStream;

    fn device_type(&self) -> String {
        "cpu-f32".to_owned()
    }

    fn logits_elements(&self) -> usize {
        LOGITS_ELEMENTS
    }

    fn stream(&self) -> Result<CpuStream, DeviceError> {
        Ok(CpuStream {
            gemm: gemm::GemmScratch::new()?,
            attention: attention::AttentionScratch::default(),
            row: Vec::new(),
        })
    }

    fn alloc(&self, len: usize, _: Precision) -> Result<CpuBuffer, DeviceError> {
        CpuBuffer::zeroed(len)
    }

    fn alloc_tokens(&self, len: usize) -> Result<Vec<u32>, DeviceError> {
        let mut tokens = Vec::new();
        let needed_bytes = len.saturating_mul(size_of::<u32>());
        tokens
            .try_reserve_exact(len)
            .map_err(|_| memory::out_of_memory(needed_bytes))?;
        tokens.resize(len, 0);
        Ok(tokens)
    }

    fn len(&self, buffer: &CpuBuffer) -> usize {
        buffer.len()
    }

    fn upload(&self, _: &mut CpuStream, from: &[f32], to: Out<'_>) -> Done {
        to.elements(from.len()).copy_from_slice(from);
        Ok(())
    }

    fn download(&self, _: &mut CpuStream, from: In<'_>, to: &mut [f32]) -> Done {
        to.copy_from_slice(from.elements(to.len()));
        Ok(())
    }

    fn upload_tokens(&self, _: &mut CpuStream, from: &[u32], to: &mut Vec<u32>) -> Done {
        to[..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn synchronize(&self, _: &mut CpuStream) -> Done {
        Ok(())
    }

    fn zero(&self, _: &mut CpuStream, x: Out<'_>, len: usize) -> Done {
        x.elements(len).fill(0.0);
        Ok(())
    }

    fn copy(&self, _: &mut CpuStream, from: In<'_>, to: Out<'_>, len: usize) -> Done {
        to.elements(len).copy_from_slice(from.elements(len));
        Ok(())
    }

    fn gemm(&self, stream: &mut CpuStream, call: &Gemm, a: In<'_>, b: In<'_>, c: Out<'_>) -> Done {
        stream.gemm.reserve(call)?;
        gemm::gemm(self.isa, &mut stream.gemm, call, a.rest(), b.rest(), c.rest());
        Ok(())
    }

    fn rms_norm(
        &self,
        _: &mut CpuStream,
        call: &Norm,
        x: In<'_>,
        branch: Option<(In<'_>, Out<'_>)>,
        weight: In<'_>,
        y: Out<'_>,
        inverse_rms: Out<'_>,
    ) -> Done {
        let len = call.rows * call.width;
        let branch = branch.map(|(branch, sum)| (branch.elements(len), sum.elements(len)));
        let (x, weight) = (x.elements(len), weight.elements(call.width));
        let inverse_rms = inverse_rms.elements(call.rows);
        pointwise::rms_norm(self.isa, call, x, branch, weight, y.elements(len), inverse_rms);
        Ok(())
    }

    fn rms_norm_backward(
        &self,
        stream: &mut CpuStream,
        call: &Norm,
        x: In<'_>,
        inverse_rms: In<'_>,
        weight: In<'_>,
        y_gradient: In<'_>,
        x_gradient: Out<'_>,
        weight_gradient: Out<'_>,
    ) -> Done {
        let len = call.rows * call.width;
        stream.row.resize(call.width, 0.0);
        pointwise::rms_norm_backward(
            self.isa,
            call,
            x.elements(len),
            inverse_rms.elements(call.rows),
            weight.elements(call.width),
            y_gradient.elements(len),
            x_gradient.elements(len),
            &mut stream.row,
        );
        pointwise::add(self.isa, weight_gradient.elements(call.width), &stream.row);
        Ok(())
    }

    fn rope(&self, _: &mut CpuStream, call: &Rope, table: In<'_>, inverse: bool, x: Out<'_>) -> Done {
        assert!(call.head_dim.is_multiple_of(2), "rotation pairs the halves of a head");
        let table = table.elements(call.context * call.head_dim);
        pointwise::rope(self.isa, call, table, inverse, x.elements(call.rows * call.stride));
        Ok(())
    }

    fn attention(
        &self,
        stream: &mut CpuStream,
        call: &Attention,
        qkv: In<'_>,
        out: Out<'_>,
        log_sum_exp: Out<'_>,
    ) -> Done {
        let scratch = &mut stream.attention;
        attention::attention(self.isa, scratch, call, qkv.rest(), out.rest(), log_sum_exp.rest())
    }

    fn attention_backward(
        &self,
        stream: &mut CpuStream,
        call: &Attention,
        qkv: In<'_>,
        out: In<'_>,
        log_sum_exp: In<'_>,
        out_gradient: In<'_>,
        qkv_gradient: Out<'_>,
    ) -> Done {
        let scratch = &mut stream.attention;
        let forward = (qkv.rest(), out.rest(), log_sum_exp.rest(), out_gradient.rest());
        attention::attention_backward(self.isa, scratch, call, forward, qkv_gradient.rest())
    }

    fn swiglu(&self, _: &mut CpuStream, rows: usize, width: usize, gate_up: In<'_>, out: Out<'_>) -> Done {
        let len = rows * width;
        pointwise::swiglu(self.isa, rows, width, gate_up.elements(2 * len), out.elements(len));
        Ok(())
    }

    fn swiglu_backward(
        &self,
        _: &mut CpuStream,
        rows: usize,
        width: usize,
        gate_up: Out<'_>,
        out_gradient: Out<'_>,
    ) -> Done {
        let len = rows * width;
        pointwise::swiglu_backward(
            self.isa,
            rows,
            width,
            gate_up.elements(2 * len),
            out_gradient.elements(len),
        );
        Ok(())
    }

    fn embed(&self, _: &mut CpuStream, call: &Embedding, table: In<'_>, tokens: &Vec<u32>, out: Out<'_>) -> Done {
        let table = table.elements(call.vocabulary * call.width);
        let out = out.elements(call.tokens * call.width);
        pointwise::embed(call.width, table, &tokens[..call.tokens], out);
        Ok(())
    }

    fn embed_backward(
        &self,
        _: &mut CpuStream,
        call: &Embedding,
        tokens: &Vec<u32>,
        out_gradient: In<'_>,
        table_gradient: Out<'_>,
    ) -> Done {
        let table = table_gradient.elements(call.vocabulary * call.width);
        let gradient = out_gradient.elements(call.tokens * call.width);
        pointwise::embed_backward(self.isa, call.width, &tokens[..call.tokens], gradient, table);
        Ok(())
    }

    fn cross_entropy(
        &self,
        _: &mut CpuStream,
        call: &CrossEntropy,
        targets: &Vec<u32>,
        logits: Out<'_>,
        losses: Out<'_>,
    ) -> Done {
        let targets = &targets[call.target_offset..call.target_offset + call.rows];
        let logits = logits.elements(call.rows * call.vocabulary);
        pointwise::cross_entropy(self.isa, call, targets, logits, losses.elements(call.rows));
        Ok(())
    }

    fn add(&self, _: &mut CpuStream, x: Out<'_>, y: In<'_>, len: usize) -> Done {
        pointwise::add(self.isa, x.elements(len), y.elements(len));
        Ok(())
    }

    fn square_sums(&self, _: &mut CpuStream, x: In<'_>, block_elements: usize, sums: &mut [f64]) -> Done {
        let x = x.elements(block_elements * sums.len());
        for (block, sum) in x.chunks_exact(block_elements).zip(sums) {
            *sum = optimizer::square_sum(self.isa, block);
        }
        Ok(())
    }

    fn adamw(
        &self,
        _: &mut CpuStream,
        step: &AdamwStep,
        blocks: Blocks,
        gradient: In<'_>,
        state: OptimizerState<'_, CpuBuffer>,
        working: Option<Out<'_>>,
        hashes: &mut [BlockHash],
    ) -> Result<usize, DeviceError> {
        let len = blocks.block_elements * hashes.len();
        let scalars = optimizer::AdamwScalars::new(step);
        let gradient = gradient.elements(len);
        let master = state.master.elements(len);
        let first_moment = state.first_moment.elements(len);
        let second_moment = state.second_moment.elements(len);
        let mut working = working.map(|working| working.elements(len));
        let mut changed = 0;
        for (index, hash) in hashes.iter_mut().enumerate() {
            let range = index * blocks.block_elements..(index + 1) * blocks.block_elements;
            let state = optimizer::BlockState {
                gradient: &gradient[range.clone()],
                master: &mut master[range.clone()],
                first_moment: &mut first_moment[range.clone()],
                second_moment: &mut second_moment[range.clone()],
                working: working.as_deref_mut().map(|working| &mut working[range]),
            };
            let hashes = optimizer::adamw(self.isa, &scalars, blocks.number(index), state);
            changed += usize::from(hashes.before != *hash);
            *hash = hashes.after;
        }
        Ok(changed)
    }

    fn block_hashes(
        &self,
        _: &mut CpuStream,
        blocks: Blocks,
        master: In<'_>,
        first_moment: In<'_>,
        second_moment: In<'_>,
        hashes: &mut [BlockHash],
    ) -> Done {
        let len = blocks.block_elements * hashes.len();
        let (master, first_moment) = (master.elements(len), first_moment.elements(len));
        let second_moment = second_moment.elements(len);
        for (index, hash) in hashes.iter_mut().enumerate() {
            let range = index * blocks.block_elements..(index + 1) * blocks.block_elements;
            *hash = optimizer::block_hash(
                self.isa,
                blocks.number(index),
                &master[range.clone()],
                &first_moment[range.clone()],
                &second_moment[range],
            );
        }
        Ok(())
    }
}
