//! [`CudaDevice`]: every operation of [`Device`] over the kernels of [`super::table`].
//!
//! Working precision is bf16, full is f32; every sum is f32 or wider. Views that do not fit their buffers are programmer
//! errors and panic, as on the CPU; a buffer of the other precision than a kernel takes is refused.

use super::bf16;
use super::context::Context;
use super::driver::{Address, DeviceFacts, Driver, GemmKey, GemmPlan, MemoryState};
use super::gemm;
use super::memory::{Allocation, CudaBuffer, CudaTokens};
use super::stream::{CudaStream, Scratch};
use super::table::{self, Element, Entry, Kind, Launch, Value};
use crate::cpu::AdamwScalars;
use crate::device::*;
use crate::hash::BlockHash;
use std::sync::Arc;

/// Elements of logits made at a time, 1 GiB of them: each chunk of rows reads and writes the head's whole gradient, so there
/// should be few.
pub const LOGITS_ELEMENTS: usize = 1 << 29;
/// Bytes of a token id.
const TOKEN_BYTES: usize = size_of::<u32>();
/// Sums of one block hash.
const HASH_SUMS: usize = 2;
/// Bytes of one of them.
const SUM_BYTES: usize = size_of::<u64>();

/// A CUDA device. Clones share it.
pub struct CudaDevice<D: Driver> {
    context: Arc<Context<D>>,
}

impl<D: Driver> Clone for CudaDevice<D> {
    fn clone(&self) -> Self {
        Self {
            context: Arc::clone(&self.context),
        }
    }
}

impl<D: Driver> std::fmt::Debug for CudaDevice<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaDevice({})", self.facts().name)
    }
}

impl<D: Driver> CudaDevice<D> {
    /// Takes a device into use: makes its kernels ready.
    ///
    /// # Errors
    /// [`DeviceError::Failed`], with the compiler's log where a kernel does not compile.
    pub fn new(driver: D) -> Result<Self, DeviceError> {
        let context = Arc::new(Context::new(driver)?);
        Ok(Self { context })
    }

    /// What is known of it.
    #[must_use]
    pub fn facts(&self) -> &DeviceFacts {
        self.context.driver().facts()
    }

    /// Its driver.
    #[must_use]
    pub fn driver(&self) -> &D {
        self.context.driver()
    }

    /// Its memory as it stands.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub fn memory(&self) -> Result<MemoryState, DeviceError> {
        self.context.ask("memory", Driver::memory)
    }

    /// The matrix products planned so far, each with its algorithm: for reports, which compare them between machines.
    #[must_use]
    pub fn plans(&self) -> Vec<(GemmKey, Arc<GemmPlan>)> {
        self.context.plans()
    }

    /// Milliseconds that `work` takes on the device, from its first operation to its last.
    ///
    /// # Errors
    /// Those of `work`; [`DeviceError::Failed`].
    pub fn measure(
        &self,
        stream: &mut CudaStream<D>,
        work: impl FnOnce(&mut CudaStream<D>) -> Result<(), DeviceError>,
    ) -> Result<f32, DeviceError> {
        const OPERATION: &str = "measure";
        let start = super::event::Event::new(&self.context)?;
        let end = super::event::Event::new(&self.context)?;
        start.record(OPERATION, stream.id())?;
        work(stream)?;
        end.record(OPERATION, stream.id())?;
        end.synchronize(OPERATION)?;
        self.context
            .ask(OPERATION, |driver| driver.elapsed_ms(start.id(), end.id()))
    }

    pub(super) const fn context(&self) -> &Arc<Context<D>> {
        &self.context
    }

    fn buffer(&self, len: usize, element: Element) -> Result<CudaBuffer<D>, DeviceError> {
        let bytes = len.saturating_mul(element.bytes());
        let memory = Arc::new(Allocation::zeroed(&self.context, bytes)?);
        Ok(CudaBuffer { memory, len, element })
    }
}

impl<D: Driver> View<'_, CudaBuffer<D>> {
    /// Where it begins. The stream's next work uses it.
    ///
    /// # Panics
    /// If `len` elements do not lie within the buffer.
    pub(super) fn within(&self, stream: &mut CudaStream<D>, len: usize) -> Address {
        let buffer = self.buffer;
        let end = self.offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= buffer.len),
            "{len} elements from {} on, in a buffer of {}",
            self.offset,
            buffer.len
        );
        stream.uses(&buffer.memory);
        buffer.memory.address().further(self.offset * buffer.element.bytes())
    }
}

/// One launch in the making: arguments in the table's order.
struct Call<'a, D: Driver> {
    stream: &'a mut CudaStream<D>,
    operation: &'static str,
    launch: Launch,
    values: Vec<Value>,
    refused: Option<DeviceError>,
}

impl<'a, D: Driver> Call<'a, D> {
    fn new(stream: &'a mut CudaStream<D>, operation: &'static str, launch: Launch) -> Self {
        Self {
            stream,
            operation,
            launch,
            values: Vec::with_capacity(launch.entry.arguments.len()),
            refused: None,
        }
    }

    /// A tensor of `len` elements.
    fn tensor(mut self, view: View<'_, CudaBuffer<D>>, len: usize) -> Self {
        let argument = &self.launch.entry.arguments[self.values.len()];
        if !matches!(argument.kind, Kind::Pointer { element, .. } if element == view.buffer.element) {
            let (operation, name) = (self.operation, argument.name);
            self.refused.get_or_insert_with(|| DeviceError::Unsupported {
                operation,
                cause: format!(
                    "{name} is {:?}, and the kernel takes {:?}",
                    view.buffer.element, argument.kind
                ),
            });
        }
        let address = view.within(self.stream, len);
        self.address(address)
    }

    /// A tensor that there may not be.
    fn optional(self, view: Option<View<'_, CudaBuffer<D>>>, len: usize) -> Self {
        match view {
            Some(view) => self.tensor(view, len),
            None => self.value(Value::Pointer(0)),
        }
    }

    /// `len` token ids from `offset` on.
    fn tokens(self, tokens: &CudaTokens<D>, offset: usize, len: usize) -> Self {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= tokens.len),
            "{len} ids from {offset} on, in a buffer of {}",
            tokens.len
        );
        self.stream.uses(&tokens.memory);
        self.address(tokens.memory.address().further(offset * TOKEN_BYTES))
    }

    /// Scratch memory of the stream, or a tensor already checked.
    fn address(self, address: Address) -> Self {
        self.value(Value::Pointer(address.0))
    }

    fn value(mut self, value: Value) -> Self {
        self.values.push(value);
        self
    }

    /// Dimensions, which the kernels take as 32 bits.
    fn sizes(mut self, sizes: &[usize]) -> Self {
        for &size in sizes {
            match u32::try_from(size) {
                Ok(size) => self.values.push(Value::U32(size)),
                Err(_) => {
                    self.values.push(Value::U32(0));
                    let operation = self.operation;
                    self.refused.get_or_insert_with(|| DeviceError::Unsupported {
                        operation,
                        cause: format!("a dimension of {size} does not fit 32 bits"),
                    });
                }
            }
        }
        self
    }

    fn long(self, size: usize) -> Self {
        self.value(Value::U64(size as u64))
    }

    fn factors(mut self, factors: &[f32]) -> Self {
        self.values.extend(factors.iter().map(|&factor| Value::F32(factor)));
        self
    }

    fn run(self) -> Result<(), DeviceError> {
        if let Some(refused) = self.refused {
            return Err(refused);
        }
        // SAFETY: every tensor was checked to lie within its buffer for the length that the table states, scratch has the
        // length that it was asked for, and both are freed only when the device is done.
        unsafe { self.stream.launch(self.operation, &self.launch, &self.values) }
    }
}

type In<'a, D> = View<'a, CudaBuffer<D>>;
type Out<'a, D> = ViewMut<'a, CudaBuffer<D>>;
type Done = Result<(), DeviceError>;

impl<D: Driver> Device for CudaDevice<D> {
    type Buffer = CudaBuffer<D>;
    type Tokens = CudaTokens<D>;
    type Stream = CudaStream<D>;

    fn device_type(&self) -> String {
        self.facts().device_type()
    }

    fn logits_elements(&self) -> usize {
        LOGITS_ELEMENTS
    }

    fn stream(&self) -> Result<CudaStream<D>, DeviceError> {
        CudaStream::new(&self.context)
    }

    fn alloc(&self, len: usize, precision: Precision) -> Result<CudaBuffer<D>, DeviceError> {
        self.buffer(len, element(precision))
    }

    fn alloc_tokens(&self, len: usize) -> Result<CudaTokens<D>, DeviceError> {
        let bytes = len.saturating_mul(TOKEN_BYTES);
        let memory = Arc::new(Allocation::zeroed(&self.context, bytes)?);
        Ok(CudaTokens { memory, len })
    }

    fn len(&self, buffer: &CudaBuffer<D>) -> usize {
        buffer.len
    }

    fn upload(&self, stream: &mut CudaStream<D>, from: &[f32], to: Out<'_, D>) -> Done {
        let to = to.read();
        let (address, element) = (to.within(stream, from.len()), to.buffer.element);
        let width = element.bytes();
        let fill = |start: usize, piece: &mut [u8]| {
            let values = &from[start / width..];
            for (bytes, &value) in piece.chunks_exact_mut(width).zip(values) {
                match element {
                    Element::Bf16 => bytes.copy_from_slice(&bf16::round(value).to_ne_bytes()),
                    _ => bytes.copy_from_slice(&value.to_ne_bytes()),
                }
            }
        };
        // SAFETY: the view was checked to lie within its buffer, which is freed only when the device is done.
        unsafe { stream.send(address, from.len() * width, fill) }
    }

    fn download(&self, stream: &mut CudaStream<D>, from: In<'_, D>, to: &mut [f32]) -> Done {
        let (address, element) = (from.within(stream, to.len()), from.buffer.element);
        let width = element.bytes();
        let bytes = to.len() * width;
        let take = |start: usize, piece: &[u8]| {
            let values = to[start / width..].iter_mut();
            for (value, bytes) in values.zip(piece.chunks_exact(width)) {
                *value = match *bytes {
                    [a, b] => bf16::widen(u16::from_ne_bytes([a, b])),
                    [a, b, c, d] => f32::from_ne_bytes([a, b, c, d]),
                    _ => unreachable!("elements have two or four bytes"),
                };
            }
        };
        // SAFETY: as above.
        unsafe { stream.fetch("download", address, bytes, take) }
    }

    fn upload_tokens(&self, stream: &mut CudaStream<D>, from: &[u32], to: &mut CudaTokens<D>) -> Done {
        assert!(from.len() <= to.len, "{} ids for a buffer of {}", from.len(), to.len);
        let fill = |start: usize, piece: &mut [u8]| {
            let ids = &from[start / TOKEN_BYTES..];
            for (bytes, id) in piece.chunks_exact_mut(TOKEN_BYTES).zip(ids) {
                bytes.copy_from_slice(&id.to_ne_bytes());
            }
        };
        // SAFETY: the ids were checked to fit the buffer, which is freed only when the device is done.
        unsafe { stream.send(to.memory.address(), from.len() * TOKEN_BYTES, fill) }
    }

    fn synchronize(&self, stream: &mut CudaStream<D>) -> Done {
        stream.synchronize("synchronize")
    }

    fn zero(&self, stream: &mut CudaStream<D>, x: Out<'_, D>, len: usize) -> Done {
        let x = x.read();
        let address = x.within(stream, len);
        // SAFETY: the view was checked to lie within its buffer, which is freed only when the device is done.
        unsafe { stream.zero(address, len * x.buffer.element.bytes()) }
    }

    fn copy(&self, stream: &mut CudaStream<D>, from: In<'_, D>, to: Out<'_, D>, len: usize) -> Done {
        let to = to.read();
        let entry = match (from.buffer.element, to.buffer.element) {
            (Element::F32, Element::Bf16) => &table::CONVERT_F32_BF16,
            (Element::Bf16, Element::F32) => &table::CONVERT_BF16_F32,
            (same, _) => {
                let (source, target) = (from.within(stream, len), to.within(stream, len));
                // SAFETY: both views were checked to lie within their buffers, which are freed only when the device is
                // done; they are different buffers, as one of them is borrowed exclusively.
                return unsafe { stream.copy(target, source, len * same.bytes()) };
            }
        };
        Call::new(stream, "copy", table::elementwise(entry, len)?)
            .tensor(from, len)
            .tensor(to, len)
            .long(len)
            .run()
    }

    fn prepare_gemm(&self, call: &Gemm, result: Precision) -> Done {
        // A product without terms or results asks for no algorithm.
        if call.m == 0 || call.n == 0 || call.k == 0 {
            return self.context.check("gemm");
        }
        let key = gemm::key(call, element(Precision::Working), element(result));
        self.context.plan(&key).map(drop)
    }

    fn gemm(&self, stream: &mut CudaStream<D>, call: &Gemm, a: In<'_, D>, b: In<'_, D>, c: Out<'_, D>) -> Done {
        gemm::product(stream, call, a, b, c.read())
    }

    fn rms_norm(
        &self,
        stream: &mut CudaStream<D>,
        call: &Norm,
        x: In<'_, D>,
        branch: Option<(In<'_, D>, Out<'_, D>)>,
        weight: In<'_, D>,
        y: Out<'_, D>,
        inverse_rms: Out<'_, D>,
    ) -> Done {
        let len = call.rows * call.width;
        let (branch, sum) = branch.unzip();
        Call::new(stream, "rms_norm", table::rms_norm(call)?)
            .tensor(x, len)
            .optional(branch, len)
            .optional(sum.as_ref().map(ViewMut::read), len)
            .tensor(weight, call.width)
            .tensor(y.read(), len)
            .tensor(inverse_rms.read(), call.rows)
            .sizes(&[call.width])
            .factors(&[call.eps])
            .run()
    }

    fn rms_norm_backward(
        &self,
        stream: &mut CudaStream<D>,
        call: &Norm,
        x: In<'_, D>,
        inverse_rms: In<'_, D>,
        weight: In<'_, D>,
        y_gradient: In<'_, D>,
        x_gradient: Out<'_, D>,
        weight_gradient: Out<'_, D>,
    ) -> Done {
        const OPERATION: &str = "rms_norm_backward";
        let len = call.rows * call.width;
        let (partials, rows_each) = table::norm_partials(call.rows);
        let scratch = stream.scratch(Scratch::Partials, partials * call.width * size_of::<f32>())?;
        Call::new(stream, OPERATION, table::rms_norm_backward(call)?)
            .tensor(x, len)
            .tensor(inverse_rms, call.rows)
            .tensor(weight, call.width)
            .tensor(y_gradient, len)
            .tensor(x_gradient.read(), len)
            .address(scratch)
            .sizes(&[call.rows, rows_each, call.width])
            .run()?;
        Call::new(stream, OPERATION, table::rms_norm_weight_gradient(call)?)
            .address(scratch)
            .tensor(weight_gradient.read(), call.width)
            .sizes(&[partials, call.width])
            .run()
    }

    fn rope(&self, stream: &mut CudaStream<D>, call: &Rope, table: In<'_, D>, inverse: bool, x: Out<'_, D>) -> Done {
        assert!(call.head_dim.is_multiple_of(2), "rotation pairs the halves of a head");
        assert!(
            call.heads * call.head_dim <= call.stride,
            "heads reach beyond their row"
        );
        Call::new(stream, "rope", table::rope(call)?)
            .tensor(x.read(), call.rows * call.stride)
            .tensor(table, call.context * call.head_dim)
            .sizes(&[call.context, call.heads, call.head_dim, call.stride])
            .factors(&[if inverse { -1.0 } else { 1.0 }])
            .run()
    }

    fn attention(
        &self,
        stream: &mut CudaStream<D>,
        call: &Attention,
        qkv: In<'_, D>,
        out: Out<'_, D>,
        log_sum_exp: Out<'_, D>,
    ) -> Done {
        check_heads(call);
        Call::new(stream, "attention", table::attention(call)?)
            .tensor(qkv, call.rows() * call.qkv_width())
            .tensor(out.read(), call.rows() * call.out_width())
            .tensor(log_sum_exp.read(), call.rows() * call.heads)
            .sizes(&[call.context, call.heads, call.kv_heads, call.head_dim])
            .factors(&[call.scale()])
            .run()
    }

    fn attention_backward(
        &self,
        stream: &mut CudaStream<D>,
        call: &Attention,
        qkv: In<'_, D>,
        out: In<'_, D>,
        log_sum_exp: In<'_, D>,
        out_gradient: In<'_, D>,
        qkv_gradient: Out<'_, D>,
    ) -> Done {
        const OPERATION: &str = "attention_backward";
        check_heads(call);
        let (rows, qkv_len, out_len) = (
            call.rows() * call.heads,
            call.rows() * call.qkv_width(),
            call.rows() * call.out_width(),
        );
        let delta = stream.scratch(Scratch::Partials, rows * size_of::<f32>())?;
        Call::new(stream, OPERATION, table::attention_delta(call)?)
            .tensor(out, out_len)
            .tensor(out_gradient, out_len)
            .address(delta)
            .sizes(&[call.context, call.heads, call.head_dim])
            .run()?;
        let shared = table::head_gradient_elements(call);
        let of_heads = match shared {
            0 => None,
            elements => Some(stream.scratch(Scratch::HeadGradients, elements * Element::Bf16.bytes())?),
        };
        let passes = [
            (table::attention_keys(call)?, of_heads),
            (table::attention_queries(call)?, None),
        ];
        for (launch, scratch) in passes {
            let call_so_far = Call::new(stream, OPERATION, launch)
                .tensor(qkv, qkv_len)
                .tensor(out_gradient, out_len)
                .tensor(log_sum_exp, rows)
                .address(delta);
            let with_target = match scratch {
                Some(address) => call_so_far.address(address),
                None => call_so_far.tensor(qkv_gradient.read(), qkv_len),
            };
            with_target
                .sizes(&[call.context, call.heads, call.kv_heads, call.head_dim])
                .factors(&[call.scale()])
                .run()?;
        }
        let Some(of_heads) = of_heads else { return Ok(()) };
        Call::new(stream, OPERATION, table::attention_group_sums(call)?)
            .address(of_heads)
            .tensor(qkv_gradient.read(), qkv_len)
            .sizes(&[call.heads, call.kv_heads, call.head_dim])
            .run()
    }

    fn swiglu(
        &self,
        stream: &mut CudaStream<D>,
        rows: usize,
        width: usize,
        gate_up: In<'_, D>,
        out: Out<'_, D>,
    ) -> Done {
        let len = rows * width;
        Call::new(stream, "swiglu", table::swiglu(&table::SWIGLU, rows, width)?)
            .tensor(gate_up, 2 * len)
            .tensor(out.read(), len)
            .sizes(&[width])
            .run()
    }

    fn swiglu_backward(
        &self,
        stream: &mut CudaStream<D>,
        rows: usize,
        width: usize,
        gate_up: Out<'_, D>,
        out_gradient: Out<'_, D>,
    ) -> Done {
        let len = rows * width;
        let launch = table::swiglu(&table::SWIGLU_BACKWARD, rows, width)?;
        Call::new(stream, "swiglu_backward", launch)
            .tensor(gate_up.read(), 2 * len)
            .tensor(out_gradient.read(), len)
            .sizes(&[width])
            .run()
    }

    fn embed(
        &self,
        stream: &mut CudaStream<D>,
        call: &Embedding,
        table: In<'_, D>,
        tokens: &CudaTokens<D>,
        out: Out<'_, D>,
    ) -> Done {
        Call::new(stream, "embed", table::embed(call.tokens, call.width)?)
            .tensor(table, call.vocabulary * call.width)
            .tokens(tokens, 0, call.tokens)
            .tensor(out.read(), call.tokens * call.width)
            .sizes(&[call.vocabulary, call.width])
            .run()
    }

    fn embed_backward(
        &self,
        stream: &mut CudaStream<D>,
        call: &Embedding,
        tokens: &CudaTokens<D>,
        out_gradient: In<'_, D>,
        table_gradient: Out<'_, D>,
    ) -> Done {
        const OPERATION: &str = "embed_backward";
        let count = call.tokens;
        let runs = stream.scratch(Scratch::Partials, table::embed_scratch_bytes(count))?;
        let order = runs.further(table::sorted_keys(count) * Element::U64.bytes());
        Call::new(stream, OPERATION, table::embed_sort(count)?)
            .tokens(tokens, 0, count)
            .address(runs)
            .sizes(&[count])
            .run()?;
        Call::new(stream, OPERATION, table::embed_order(count)?)
            .address(runs)
            .address(order)
            .sizes(&[count])
            .run()?;
        Call::new(stream, OPERATION, table::embed_backward(count, call.width)?)
            .address(order)
            .tensor(out_gradient, count * call.width)
            .tensor(table_gradient.read(), call.vocabulary * call.width)
            .sizes(&[count, call.vocabulary, call.width])
            .run()
    }

    fn cross_entropy(
        &self,
        stream: &mut CudaStream<D>,
        call: &CrossEntropy,
        targets: &CudaTokens<D>,
        logits: Out<'_, D>,
        losses: Out<'_, D>,
    ) -> Done {
        let with_gradient = usize::from(call.gradient_scale.is_some());
        Call::new(stream, "cross_entropy", table::cross_entropy(call)?)
            .tensor(logits.read(), call.rows * call.vocabulary)
            .tokens(targets, call.target_offset, call.rows)
            .tensor(losses.read(), call.rows)
            .sizes(&[call.vocabulary, table::kept_chunks(call), with_gradient])
            .factors(&[call.gradient_scale.unwrap_or(0.0)])
            .run()
    }

    fn add(&self, stream: &mut CudaStream<D>, x: Out<'_, D>, y: In<'_, D>, len: usize) -> Done {
        let x = x.read();
        // A sum in full precision is never rounded to less, so that pair has no kernel: the first one refuses it by name.
        let entry: &'static Entry = match (x.buffer.element, y.buffer.element) {
            (Element::F32, Element::Bf16) => &table::ADD_F32_BF16,
            (Element::Bf16, _) => &table::ADD_BF16,
            _ => &table::ADD_F32,
        };
        Call::new(stream, "add", table::elementwise(entry, len)?)
            .tensor(x, len)
            .tensor(y, len)
            .long(len)
            .run()
    }

    fn square_sums(&self, stream: &mut CudaStream<D>, x: In<'_, D>, block_elements: usize, sums: &mut [f64]) -> Done {
        const OPERATION: &str = "square_sums";
        let bytes = size_of_val(sums);
        let results = stream.scratch(Scratch::Results, bytes)?;
        Call::new(stream, OPERATION, table::square_sums(sums.len())?)
            .tensor(x, block_elements * sums.len())
            .address(results)
            .long(block_elements)
            .run()?;
        let take = |start: usize, piece: &[u8]| {
            let sums = sums[start / SUM_BYTES..].iter_mut();
            for (sum, word) in sums.zip(piece.chunks_exact(SUM_BYTES)) {
                *sum = f64::from_ne_bytes(std::array::from_fn(|byte| word[byte]));
            }
        };
        // SAFETY: the scratch is as long, and lives as long as the stream.
        unsafe { stream.fetch(OPERATION, results, bytes, take) }
    }

    fn adamw(
        &self,
        stream: &mut CudaStream<D>,
        step: &AdamwStep,
        blocks: Blocks,
        gradient: In<'_, D>,
        state: OptimizerState<'_, CudaBuffer<D>>,
        working: Option<Out<'_, D>>,
        hashes: &mut [BlockHash],
    ) -> Result<usize, DeviceError> {
        const OPERATION: &str = "adamw";
        let (count, elements) = (hashes.len(), blocks.block_elements);
        let len = elements * count;
        let scalars = AdamwScalars::new(step);
        let sums = zeroed_sums(stream, 2 * HASH_SUMS * count)?;
        Call::new(stream, OPERATION, table::optimizer(&table::ADAMW, count, elements)?)
            .tensor(gradient, len)
            .tensor(state.master.read(), len)
            .tensor(state.first_moment.read(), len)
            .tensor(state.second_moment.read(), len)
            .optional(working.as_ref().map(ViewMut::read), len)
            .address(sums)
            .sizes(&[blocks.first.0 as usize])
            .long(elements)
            .factors(&scalars.in_order())
            .run()?;
        let sums = fetch_sums(stream, OPERATION, sums, 2 * HASH_SUMS * count)?;
        let mut changed = 0;
        for (hash, sums) in hashes.iter_mut().zip(sums.chunks_exact(2 * HASH_SUMS)) {
            changed += usize::from(BlockHash::from_sums([sums[0], sums[1]]) != *hash);
            *hash = BlockHash::from_sums([sums[2], sums[3]]);
        }
        Ok(changed)
    }

    fn block_hashes(
        &self,
        stream: &mut CudaStream<D>,
        blocks: Blocks,
        master: In<'_, D>,
        first_moment: In<'_, D>,
        second_moment: In<'_, D>,
        hashes: &mut [BlockHash],
    ) -> Done {
        const OPERATION: &str = "block_hashes";
        let (count, elements) = (hashes.len(), blocks.block_elements);
        let len = elements * count;
        let sums = zeroed_sums(stream, HASH_SUMS * count)?;
        Call::new(
            stream,
            OPERATION,
            table::optimizer(&table::BLOCK_HASHES, count, elements)?,
        )
        .tensor(master, len)
        .tensor(first_moment, len)
        .tensor(second_moment, len)
        .address(sums)
        .sizes(&[blocks.first.0 as usize])
        .long(elements)
        .run()?;
        let sums = fetch_sums(stream, OPERATION, sums, HASH_SUMS * count)?;
        for (hash, sums) in hashes.iter_mut().zip(sums.chunks_exact(HASH_SUMS)) {
            *hash = BlockHash::from_sums([sums[0], sums[1]]);
        }
        Ok(())
    }
}

/// How a precision is stored.
const fn element(precision: Precision) -> Element {
    match precision {
        Precision::Working => Element::Bf16,
        Precision::Full => Element::F32,
    }
}

fn check_heads(call: &Attention) {
    assert!(
        call.kv_heads > 0 && call.heads.is_multiple_of(call.kv_heads),
        "key heads divide query heads: {call:?}"
    );
}

/// Zeroed scratch for sums of 64-bit integers.
fn zeroed_sums<D: Driver>(stream: &mut CudaStream<D>, count: usize) -> Result<Address, DeviceError> {
    let bytes = count * SUM_BYTES;
    let sums = stream.scratch(Scratch::Results, bytes)?;
    // SAFETY: the scratch is as long, and lives as long as the stream.
    unsafe { stream.zero(sums, bytes) }?;
    Ok(sums)
}

fn fetch_sums<D: Driver>(
    stream: &mut CudaStream<D>,
    operation: &'static str,
    from: Address,
    count: usize,
) -> Result<Vec<u64>, DeviceError> {
    let mut sums = Vec::with_capacity(count);
    let take = |_: usize, piece: &[u8]| {
        let words = piece.chunks_exact(SUM_BYTES);
        sums.extend(words.map(|word| u64::from_ne_bytes(std::array::from_fn(|byte| word[byte]))));
    };
    // SAFETY: the scratch is as long, and lives as long as the stream.
    unsafe { stream.fetch(operation, from, count * SUM_BYTES, take) }?;
    Ok(sums)
}
