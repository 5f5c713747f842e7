//! The table of CUDA kernels: which entry points there are, what they take, and how each shape launches them.
//!
//! It is plain data and pure functions. Whoever compiles reads [`SOURCES`], [`HEADERS`] and [`OPTIONS`]; whoever launches takes a
//! [`Launch`] from one of the functions below and passes one [`Value`] for each of the entry's arguments, in their order.
//!
//! Invariants
//! - **DET-2** grid, block and shared memory are functions of the call's shape alone. No kernel adds floats atomically; how
//!   a sum is cut follows from the shape. The only atomics add 64-bit integers, whose sum has no order.
//! - A pointer needs no more alignment than its element. Kernels read and write 16 bytes at a time where a row's address
//!   and length allow it; which thread works on which element does not depend on that, so alignment changes no bit.
//! - Where a tensor may pass 2³¹ elements, the kernel's index has 64 bits. Widths of rows and dimensions of the grid have 32.
//!
//! Setting memory to zero, and copying without conversion, are the driver's own operations and have no entry.

use crate::device::{Attention, CrossEntropy, DeviceError, Norm, Rope};

/// One translation unit; every entry in it is `extern "C"`.
#[derive(Debug, PartialEq, Eq)]
pub struct Source {
    /// Name of its file under `kernels/cuda/`.
    pub file: &'static str,
    /// Its text.
    pub text: &'static str,
}

macro_rules! source {
    ($file:literal) => {
        Source {
            file: $file,
            text: include_str!(concat!("../../cuda/", $file)),
        }
    };
}

/// Conversions, additions, rotation, SwiGLU, embedding.
pub static POINTWISE: Source = source!("pointwise.cu");
/// RMSNorm, cross-entropy, sums of squares.
pub static ROWS: Source = source!("rows.cu");
/// AdamW and the block hashes.
pub static OPTIMIZER: Source = source!("optimizer.cu");
/// Attention, forward.
pub static ATTENTION_FORWARD: Source = source!("attention_forward.cu");
/// Attention, backward.
pub static ATTENTION_BACKWARD: Source = source!("attention_backward.cu");

/// Every translation unit; each becomes one module.
pub static SOURCES: [&Source; 5] = [&POINTWISE, &ROWS, &OPTIMIZER, &ATTENTION_FORWARD, &ATTENTION_BACKWARD];

/// What the sources include, under the names by which they do.
pub static HEADERS: [Source; 4] = [
    source!("platform.cuh"),
    source!("common.cuh"),
    source!("mma.cuh"),
    source!("attention.cuh"),
];

/// Options of every compilation, besides the architecture. Contraction is off: a kernel that fuses a multiplication with an
/// addition says so, hence its rounding is that of the source, on every compiler.
pub const OPTIONS: [&str; 3] = ["--std=c++20", "--fmad=false", "--restrict"];

/// Type of a tensor's elements.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Element {
    /// Brain float, 16 bits: [`crate::Precision::Working`].
    Bf16,
    /// [`crate::Precision::Full`].
    F32,
    /// Sums of squares.
    F64,
    /// Token ids.
    U32,
    /// Sums of hashes.
    U64,
}

impl Element {
    /// Bytes of one, and the alignment that a pointer needs.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 | Self::U32 => 4,
            Self::F64 | Self::U64 => 8,
        }
    }
}

/// What a kernel does with a tensor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Reads it.
    Read,
    /// Overwrites all of it.
    Write,
    /// Reads and overwrites it, or adds to it.
    Update,
}

/// Type of an argument.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A device address.
    Pointer {
        /// Of what.
        element: Element,
        /// For what.
        access: Access,
        /// Whether it may be null; its comment says what null means.
        optional: bool,
    },
    /// `unsigned int`.
    U32,
    /// `unsigned long long`.
    U64,
    /// `float`.
    F32,
}

/// One parameter of a kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Argument {
    /// As in the source.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// Shape of a tensor, or meaning of a number.
    pub meaning: &'static str,
}

/// One argument's value.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Value {
    /// A device address, byte-exact: buffer and offset in one.
    Pointer(u64),
    /// See [`Kind::U32`].
    U32(u32),
    /// See [`Kind::U64`].
    U64(u64),
    /// See [`Kind::F32`].
    F32(f32),
}

impl Value {
    /// Whether this value may stand for an argument of that kind: type, null and alignment.
    #[must_use]
    pub fn fits(self, kind: Kind) -> bool {
        match (self, kind) {
            (Self::Pointer(0), Kind::Pointer { optional, .. }) => optional,
            (Self::Pointer(at), Kind::Pointer { element, .. }) => at.is_multiple_of(element.bytes() as u64),
            (Self::U32(_), Kind::U32) | (Self::U64(_), Kind::U64) | (Self::F32(_), Kind::F32) => true,
            _ => false,
        }
    }
}

/// One kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its symbol.
    pub name: &'static str,
    /// Where it is compiled.
    pub source: &'static Source,
    /// What it takes, in order.
    pub arguments: &'static [Argument],
}

/// How one call is launched. `shared_bytes` above 48 KiB must be allowed for the function first
/// (`CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Launch {
    /// The kernel.
    pub entry: &'static Entry,
    /// Blocks of threads.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

impl Launch {
    /// Whether there is nothing to do: a driver refuses such a grid, so it must not be launched.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }
}

const fn pointer(name: &'static str, element: Element, access: Access, meaning: &'static str) -> Argument {
    let kind = Kind::Pointer {
        element,
        access,
        optional: false,
    };
    Argument { name, kind, meaning }
}

const fn input(name: &'static str, element: Element, shape: &'static str) -> Argument {
    pointer(name, element, Access::Read, shape)
}

const fn output(name: &'static str, element: Element, shape: &'static str) -> Argument {
    pointer(name, element, Access::Write, shape)
}

const fn update(name: &'static str, element: Element, shape: &'static str) -> Argument {
    pointer(name, element, Access::Update, shape)
}

const fn or_null(argument: Argument) -> Argument {
    let Kind::Pointer { element, access, .. } = argument.kind else {
        panic!("only a pointer may be null")
    };
    let kind = Kind::Pointer {
        element,
        access,
        optional: true,
    };
    Argument { kind, ..argument }
}

const fn u32(name: &'static str, meaning: &'static str) -> Argument {
    let kind = Kind::U32;
    Argument { name, kind, meaning }
}

const fn u64(name: &'static str, meaning: &'static str) -> Argument {
    let kind = Kind::U64;
    Argument { name, kind, meaning }
}

const fn f32(name: &'static str, meaning: &'static str) -> Argument {
    let kind = Kind::F32;
    Argument { name, kind, meaning }
}

macro_rules! entries {
    ($($(#[$meta:meta])* $ident:ident = $name:literal in $source:ident [$($argument:expr),* $(,)?];)*) => {
        $($(#[$meta])* pub static $ident: Entry = Entry {
            name: $name,
            source: &$source,
            arguments: &[$($argument),*],
        };)*
        /// Every kernel.
        pub static ENTRIES: &[&Entry] = &[$(&$ident),*];
    };
}

use Element::{Bf16, F32, F64, U32, U64};

entries! {
    /// `to = from`, rounded to nearest even.
    CONVERT_F32_BF16 = "convert_f32_bf16" in POINTWISE [
        input("from", F32, "[len]"), output("to", Bf16, "[len]"), u64("len", "elements"),
    ];
    /// `to = from`, exact.
    CONVERT_BF16_F32 = "convert_bf16_f32" in POINTWISE [
        input("from", Bf16, "[len]"), output("to", F32, "[len]"), u64("len", "elements"),
    ];
    /// `x += y`: `Device::add` and the fold of the lane tree.
    ADD_F32 = "add_f32" in POINTWISE [
        update("x", F32, "[len]"), input("y", F32, "[len]"), u64("len", "elements"),
    ];
    /// `x += y`, rounded once.
    ADD_BF16 = "add_bf16" in POINTWISE [
        update("x", Bf16, "[len]"), input("y", Bf16, "[len]"), u64("len", "elements"),
    ];
    /// `x += y`, working precision into full.
    ADD_F32_BF16 = "add_f32_bf16" in POINTWISE [
        update("x", F32, "[len]"), input("y", Bf16, "[len]"), u64("len", "elements"),
    ];
    /// `Device::rope`, in place.
    ROPE = "rope" in POINTWISE [
        update("x", Bf16, "[rows, stride]; the first heads · head_dim elements of a row change"),
        input("table", F32, "[context, head_dim]: cosines, then sines"),
        u32("context", "positions of a sequence"),
        u32("heads", "heads to rotate"),
        u32("head_dim", "even"),
        u32("stride", "elements between rows"),
        f32("sign", "1 to rotate, -1 to rotate back"),
    ];
    /// `Device::swiglu`.
    SWIGLU = "swiglu" in POINTWISE [
        input("gate_up", Bf16, "[rows, 2 · width]"), output("out", Bf16, "[rows, width]"), u32("width", "columns"),
    ];
    /// `Device::swiglu_backward`.
    SWIGLU_BACKWARD = "swiglu_backward" in POINTWISE [
        update("gate_up", Bf16, "[rows, 2 · width]; becomes its gradient"),
        update("out_gradient", Bf16, "[rows, width]; becomes the output"),
        u32("width", "columns"),
    ];
    /// `Device::embed`. An id that is not in the table makes a row of NaN.
    EMBED = "embed" in POINTWISE [
        input("table", Bf16, "[vocabulary, width]"),
        input("tokens", U32, "[tokens]"),
        output("out", Bf16, "[tokens, width]"),
        u32("vocabulary", "rows of the table"),
        u32("width", "columns"),
    ];
    /// `Device::embed_backward`, first: each id with its place, as id · 2³² + place, sorted within runs of 1,024 places. The last run
    /// is filled up with the largest of all keys.
    EMBED_SORT = "embed_sort" in POINTWISE [
        input("tokens", U32, "[tokens]"),
        output("runs", U64, "[sorted_keys(tokens)], scratch"),
        u32("token_count", "ids"),
    ];
    /// `Device::embed_backward`, second: all keys in order.
    EMBED_ORDER = "embed_order" in POINTWISE [
        input("runs", U64, "[sorted_keys(tokens)]"),
        output("order", U64, "[tokens], scratch"),
        u32("token_count", "ids"),
    ];
    /// `Device::embed_backward`, third: the additions of the CPU kernel, in its order. An id that is not in the table adds nothing.
    EMBED_BACKWARD = "embed_backward" in POINTWISE [
        input("order", U64, "[tokens]"),
        input("out_gradient", Bf16, "[tokens, width]"),
        update("table_gradient", F32, "[vocabulary, width]; added to"),
        u32("token_count", "ids"),
        u32("vocabulary", "rows of the table"),
        u32("width", "columns"),
    ];
    /// `Device::rms_norm`. With a branch the norm is that of the rounded sum.
    RMS_NORM = "rms_norm" in ROWS [
        input("x", Bf16, "[rows, width]"),
        or_null(input("branch", Bf16, "[rows, width]; null where there is none, and then sum is, too")),
        or_null(output("sum", Bf16, "[rows, width]: x + branch")),
        input("weight", Bf16, "[width]"),
        output("y", Bf16, "[rows, width]"),
        output("inverse_rms", F32, "[rows]"),
        u32("width", "columns"),
        f32("eps", "epsilon"),
    ];
    /// `Device::rms_norm_backward`, first stage: the input's gradient, and one partial of the weight's for each run of rows.
    RMS_NORM_BACKWARD = "rms_norm_backward" in ROWS [
        NORM_X, INVERSE_RMS, NORM_WEIGHT, Y_GRADIENT, X_GRADIENT, PARTIALS, ROW_COUNT, ROWS_PER_PARTIAL, WIDTH,
    ];
    /// As above, rows of more than 8,192 elements.
    RMS_NORM_BACKWARD_WIDE = "rms_norm_backward_wide" in ROWS [
        NORM_X, INVERSE_RMS, NORM_WEIGHT, Y_GRADIENT, X_GRADIENT, PARTIALS, ROW_COUNT, ROWS_PER_PARTIAL, WIDTH,
    ];
    /// `Device::rms_norm_backward`, second stage: the partials' sums, in order, onto the weight's gradient.
    RMS_NORM_WEIGHT_GRADIENT = "rms_norm_weight_gradient" in ROWS [
        input("partials", F32, "[partials, width]"),
        update("weight_gradient", F32, "[width]; added to"),
        u32("partial_count", "partials"),
        u32("width", "columns"),
    ];
    /// `Device::cross_entropy`. A target that is no logit makes a loss of NaN.
    CROSS_ENTROPY = "cross_entropy" in ROWS [
        update("logits", Bf16, "[rows, vocabulary]; becomes the gradient, or stays"),
        input("targets", U32, "[rows]: the address of the first row's target"),
        output("losses", F32, "[rows]"),
        u32("vocabulary", "logits of a row"),
        u32("kept_chunks", "runs of eight logits of a row that dynamic shared memory holds; see kept_chunks"),
        u32("with_gradient", "1 or 0"),
        f32("gradient_scale", "factor of the gradient"),
    ];
    /// `Device::square_sums`.
    SQUARE_SUMS = "square_sums" in ROWS [
        input("x", F32, "[blocks, block_elements]"),
        output("sums", F64, "[blocks]"),
        u64("block_elements", "elements of a block"),
    ];
    /// `Device::adamw`. **Adds** both hashes' sums to `hash_sums`, which the caller sets to zero before. The scalars are those
    /// of the CPU kernel, rounded once from f64.
    ADAMW = "adamw" in OPTIMIZER [
        input("gradient", F32, "[blocks, block_elements]"),
        update("master", F32, "[blocks, block_elements]"),
        update("first_moment", F32, "[blocks, block_elements]"),
        update("second_moment", F32, "[blocks, block_elements]"),
        or_null(output("working", Bf16, "[blocks, block_elements]; null where no copy is wanted")),
        update("hash_sums", U64, "[blocks, 4]: the sums before (2), and after (2); added to"),
        u32("first_block", "number of the first block"),
        u64("block_elements", "elements of a block"),
        f32("beta1", "first-moment decay"),
        f32("one_minus_beta1", "its complement"),
        f32("beta2", "second-moment decay"),
        f32("one_minus_beta2", "its complement"),
        f32("keep", "1 - learning_rate · weight_decay"),
        f32("step_size", "learning_rate / (1 - beta1^step)"),
        f32("inverse_root_correction", "1 / sqrt(1 - beta2^step)"),
        f32("eps", "denominator epsilon"),
        f32("gradient_scale", "factor of the gradient"),
    ];
    /// `Device::block_hashes`. **Adds** the hash's sums to `hash_sums`, which the caller sets to zero before.
    BLOCK_HASHES = "block_hashes" in OPTIMIZER [
        input("master", F32, "[blocks, block_elements]"),
        input("first_moment", F32, "[blocks, block_elements]"),
        input("second_moment", F32, "[blocks, block_elements]"),
        update("hash_sums", U64, "[blocks, 2]; added to"),
        u32("first_block", "number of the first block"),
        u64("block_elements", "elements of a block"),
    ];
    /// `Device::attention`, heads of up to 32 elements.
    ATTENTION_32 = "attention_32" in ATTENTION_FORWARD [
        QKV, OUT_WRITTEN, LSE_WRITTEN, CONTEXT, HEADS, KV_HEADS, HEAD_DIM, SCALE,
    ];
    /// `Device::attention`, heads of up to 64 elements.
    ATTENTION_64 = "attention_64" in ATTENTION_FORWARD [
        QKV, OUT_WRITTEN, LSE_WRITTEN, CONTEXT, HEADS, KV_HEADS, HEAD_DIM, SCALE,
    ];
    /// `Device::attention`, heads of up to 128 elements.
    ATTENTION_128 = "attention_128" in ATTENTION_FORWARD [
        QKV, OUT_WRITTEN, LSE_WRITTEN, CONTEXT, HEADS, KV_HEADS, HEAD_DIM, SCALE,
    ];
    /// `Device::attention_backward`, first: each row's dot product of output and its gradient.
    ATTENTION_DELTA = "attention_delta" in ATTENTION_BACKWARD [
        OUT, OUT_GRADIENT, output("delta", F32, "[sequences, heads, context], scratch"), CONTEXT, HEADS, HEAD_DIM,
    ];
    /// `Device::attention_backward`, second: gradients of keys and values; heads of up to 32 elements.
    ATTENTION_KEYS_32 = "attention_keys_32" in ATTENTION_BACKWARD [
        QKV, OUT_GRADIENT, LSE, DELTA, KEYS_WRITTEN, CONTEXT, HEADS, KV_HEADS, HEAD_DIM, SCALE,
    ];
    /// As above, heads of up to 64 elements.
    ATTENTION_KEYS_64 = "attention_keys_64" in ATTENTION_BACKWARD [
        QKV, OUT_GRADIENT, LSE, DELTA, KEYS_WRITTEN, CONTEXT, HEADS, KV_HEADS, HEAD_DIM, SCALE,
    ];
    /// As above, heads of up to 128 elements.
    ATTENTION_KEYS_128 = "attention_keys_128" in ATTENTION_BACKWARD [
        QKV, OUT_GRADIENT, LSE, DELTA, KEYS_WRITTEN, CONTEXT, HEADS, KV_HEADS, HEAD_DIM, SCALE,
    ];
    /// `Device::attention_backward`, where heads are grouped: sums of what a group's query heads made for its keys and values.
    ATTENTION_GROUP_SUMS = "attention_group_sums" in ATTENTION_BACKWARD [
        input("of_heads", Bf16, "[sequences, context, 2 heads head_dim], scratch"),
        output("qkv_gradient", Bf16, "as qkv; the columns of keys and values"),
        HEADS, KV_HEADS, HEAD_DIM,
    ];
    /// `Device::attention_backward`, last: gradients of queries; heads of up to 32 elements.
    ATTENTION_QUERIES_32 = "attention_queries_32" in ATTENTION_BACKWARD [
        QKV, OUT_GRADIENT, LSE, DELTA, QUERIES_WRITTEN, CONTEXT, HEADS, KV_HEADS, HEAD_DIM, SCALE,
    ];
    /// As above, heads of up to 64 elements.
    ATTENTION_QUERIES_64 = "attention_queries_64" in ATTENTION_BACKWARD [
        QKV, OUT_GRADIENT, LSE, DELTA, QUERIES_WRITTEN, CONTEXT, HEADS, KV_HEADS, HEAD_DIM, SCALE,
    ];
    /// As above, heads of up to 128 elements.
    ATTENTION_QUERIES_128 = "attention_queries_128" in ATTENTION_BACKWARD [
        QKV, OUT_GRADIENT, LSE, DELTA, QUERIES_WRITTEN, CONTEXT, HEADS, KV_HEADS, HEAD_DIM, SCALE,
    ];
}

const NORM_X: Argument = input("x", Bf16, "[rows, width]");
const INVERSE_RMS: Argument = input("inverse_rms", F32, "[rows]");
const NORM_WEIGHT: Argument = input("weight", Bf16, "[width]");
const Y_GRADIENT: Argument = input("y_gradient", Bf16, "[rows, width]");
const X_GRADIENT: Argument = update("x_gradient", Bf16, "[rows, width]; added to");
const PARTIALS: Argument = output("partials", F32, "[partials, width], scratch; see norm_partials");
const ROW_COUNT: Argument = u32("rows", "rows");
const ROWS_PER_PARTIAL: Argument = u32("rows_per_partial", "rows of each run; see norm_partials");
const WIDTH: Argument = u32("width", "columns");
const QKV: Argument = input("qkv", Bf16, "[sequences, context, (heads + 2 · kv_heads) · head_dim]");
const OUT: Argument = input("out", Bf16, "[sequences, context, heads · head_dim]");
const OUT_WRITTEN: Argument = output("out", Bf16, "[sequences, context, heads · head_dim]");
const OUT_GRADIENT: Argument = input("out_gradient", Bf16, "[sequences, context, heads · head_dim]");
const LSE: Argument = input("log_sum_exp", F32, "[sequences, heads, context]");
const LSE_WRITTEN: Argument = output("log_sum_exp", F32, "[sequences, heads, context]");
const DELTA: Argument = input("delta", F32, "[sequences, heads, context]");
/// The kernels of keys and of queries write disjoint columns of one tensor, and together all of it; where heads are grouped, a sum
/// follows that of keys.
const KEYS_WRITTEN: Argument = output(
    "gradient",
    Bf16,
    "as qkv, the columns of keys and values; where heads are grouped [sequences, context, 2 heads head_dim], scratch",
);
const QUERIES_WRITTEN: Argument = output("qkv_gradient", Bf16, "as qkv; the columns of queries");
const CONTEXT: Argument = u32("context", "tokens of a sequence");
const HEADS: Argument = u32("heads", "query heads");
const KV_HEADS: Argument = u32("kv_heads", "key and value heads");
const HEAD_DIM: Argument = u32("head_dim", "elements of a head");
const SCALE: Argument = f32("scale", "factor of the scores: Attention::scale");

/// Elements that one thread handles at a time, in every kernel over rows.
const CHUNK: usize = 8;
/// Bytes of a chunk in working precision.
const CHUNK_BYTES: usize = CHUNK * Element::Bf16.bytes();
/// Threads of a block of an element-wise kernel.
const THREADS: usize = 256;
/// Threads of a block, at most.
const THREADS_MAX: usize = 1024;
/// Threads of a warp.
const WARP: usize = 32;
/// Places whose keys a block of [`EMBED_SORT`] sorts.
const SORTED: usize = 1024;
/// Elements of a parameter block that one block of threads updates.
const OPTIMIZER_TILE: usize = 8192;
/// Chunks that a thread of [`RMS_NORM_BACKWARD`] has under way: one of each of four rows, or two of each of two.
const NORM_CHUNKS: usize = 4;
/// Threads for a row of which each has one chunk, at most: beyond, two chunks and half the threads leave room for a second block.
const NORM_THREADS_ONE_CHUNK: usize = 256;
/// Threads of its blocks, at most.
const NORM_THREADS_MAX: usize = 512;
/// Runs of rows that a norm's weight gradient is cut into, at most; each costs a row of f32 written and read.
const NORM_PARTIALS_MAX: usize = 2048;
/// Runs that there should be before they grow longer than [`NORM_CHUNKS`] rows: about two for each multiprocessor of a large card.
const NORM_PARTIALS_WANTED: usize = 256;
/// Rows from which on a run has no need to be longer: its partial is then a sixteenth of what its rows move, and short runs
/// keep all multiprocessors busy to the end.
const NORM_ROWS_ENOUGH: usize = 16;
/// Threads of a block of [`CROSS_ENTROPY`], at most.
const LOGITS_THREADS_MAX: usize = 512;
/// Shared memory that it keeps logits in, at most: two blocks fit a multiprocessor from A100 on, and one any supported card.
const LOGITS_KEPT_BYTES: usize = 80 * 1024;
/// Columns that a block of [`RMS_NORM_WEIGHT_GRADIENT`] sums.
const SECTOR: usize = 8;
/// Strands in which it sums each of them.
const STRANDS: usize = 64;
/// Dynamic shared memory that every supported card (compute capability 8.0 on) gives a block.
pub const SHARED_BYTES_MAX: u32 = 99 * 1024;
/// Elements of a row whose norm has a gradient, at most: its weight gradient grows in shared memory, whole chunks of it.
pub const NORM_ELEMENTS_MAX: usize = SHARED_BYTES_MAX as usize / size_of::<f32>() / CHUNK * CHUNK;
/// Blocks of threads along the grid's second and third dimension.
const GRID_YZ_MAX: usize = 65_535;

/// A dimension of a launch or a 32-bit argument.
fn dimension(operation: &'static str, what: &str, value: usize, largest: usize) -> Result<u32, DeviceError> {
    match u32::try_from(value) {
        Ok(fits) if value <= largest => Ok(fits),
        _ => Err(DeviceError::Unsupported {
            operation,
            cause: format!("{value} {what}, where {largest} are possible"),
        }),
    }
}

/// Blocks along the first dimension of a grid.
fn along_x(operation: &'static str, what: &str, blocks: usize) -> Result<u32, DeviceError> {
    dimension(operation, what, blocks, i32::MAX as usize)
}

/// Threads for `items` items of work, whole warps, at most `largest`.
fn threads(items: usize, largest: usize) -> u32 {
    items.next_multiple_of(WARP).clamp(WARP, largest) as u32
}

fn line(entry: &'static Entry, blocks: u32, threads: u32) -> Launch {
    Launch {
        entry,
        grid: [blocks, 1, 1],
        block: [threads, 1, 1],
        shared_bytes: 0,
    }
}

/// An element-wise kernel over `len` elements: [`CONVERT_F32_BF16`], [`CONVERT_BF16_F32`], [`ADD_F32`], [`ADD_BF16`],
/// [`ADD_F32_BF16`].
///
/// # Errors
/// [`DeviceError::Unsupported`] beyond 2⁴² elements.
pub fn elementwise(entry: &'static Entry, len: usize) -> Result<Launch, DeviceError> {
    let blocks = along_x(entry.name, "runs of elements", len.div_ceil(THREADS * CHUNK))?;
    Ok(line(entry, blocks, THREADS as u32))
}

/// [`ROPE`].
///
/// # Errors
/// [`DeviceError::Unsupported`] for more rows than a grid has blocks.
pub fn rope(call: &Rope) -> Result<Launch, DeviceError> {
    let rows = along_x(ROPE.name, "rows", call.rows)?;
    let chunks = call.heads * (call.head_dim / 2).div_ceil(CHUNK);
    Ok(line(&ROPE, rows, threads(chunks, THREADS)))
}

/// [`SWIGLU`] or [`SWIGLU_BACKWARD`]: a block of threads for each row.
///
/// # Errors
/// [`DeviceError::Unsupported`] for more rows than a grid has blocks.
pub fn swiglu(entry: &'static Entry, rows: usize, width: usize) -> Result<Launch, DeviceError> {
    let rows = along_x(entry.name, "rows", rows)?;
    Ok(line(entry, rows, threads(width.div_ceil(CHUNK), THREADS)))
}

/// [`EMBED`]: a block of threads for each id.
///
/// # Errors
/// [`DeviceError::Unsupported`] for more ids than a grid has blocks.
pub fn embed(tokens: usize, width: usize) -> Result<Launch, DeviceError> {
    let tokens = along_x(EMBED.name, "ids", tokens)?;
    Ok(line(&EMBED, tokens, threads(width.div_ceil(CHUNK), THREADS)))
}

/// Keys that [`EMBED_SORT`] makes of so many ids: whole runs of them.
#[must_use]
pub const fn sorted_keys(tokens: usize) -> usize {
    tokens.next_multiple_of(SORTED)
}

/// Scratch memory of the embedding's gradient: sorted runs, and all keys in order.
#[must_use]
pub const fn embed_scratch_bytes(tokens: usize) -> usize {
    (sorted_keys(tokens) + tokens) * Element::U64.bytes()
}

/// [`EMBED_SORT`]: a block of threads for each run of places.
///
/// # Errors
/// [`DeviceError::Unsupported`] for more ids than a grid has blocks.
pub fn embed_sort(tokens: usize) -> Result<Launch, DeviceError> {
    let entry = &EMBED_SORT;
    let runs = along_x(entry.name, "ids", tokens)?.div_ceil(SORTED as u32);
    Ok(line(entry, runs, (SORTED / 2) as u32))
}

/// [`EMBED_ORDER`]: a thread for each key.
///
/// # Errors
/// As [`embed_sort`].
pub fn embed_order(tokens: usize) -> Result<Launch, DeviceError> {
    let entry = &EMBED_ORDER;
    let blocks = along_x(entry.name, "ids", tokens)?.div_ceil(THREADS as u32);
    Ok(line(entry, blocks, THREADS as u32))
}

/// [`EMBED_BACKWARD`]: a block of threads for each key and each run of columns; the block of an id's first key adds all of that id's
/// rows, the others end.
///
/// # Errors
/// [`DeviceError::Unsupported`] for a grid beyond the driver's limits.
pub fn embed_backward(tokens: usize, width: usize) -> Result<Launch, DeviceError> {
    let entry = &EMBED_BACKWARD;
    let tokens = along_x(entry.name, "ids", tokens)?;
    let chunks = width.div_ceil(CHUNK);
    let runs = dimension(entry.name, "runs of columns", chunks.div_ceil(THREADS), GRID_YZ_MAX)?;
    Ok(Launch {
        grid: [tokens, runs, 1],
        ..line(entry, tokens, threads(chunks, THREADS))
    })
}

/// [`RMS_NORM`]: a block of threads for each row.
///
/// # Errors
/// [`DeviceError::Unsupported`] for more rows than a grid has blocks.
pub fn rms_norm(call: &Norm) -> Result<Launch, DeviceError> {
    let rows = along_x(RMS_NORM.name, "rows", call.rows)?;
    Ok(line(&RMS_NORM, rows, threads(call.width.div_ceil(CHUNK), THREADS_MAX)))
}

/// How a norm's weight gradient is cut: (partials, rows of each). The scratch of [`RMS_NORM_BACKWARD`] holds
/// `partials · width` elements of f32. There is no partial without a row.
#[must_use]
pub const fn norm_partials(rows: usize) -> (usize, usize) {
    let wanted = rows.div_ceil(NORM_PARTIALS_WANTED);
    let enough = if wanted < NORM_ROWS_ENOUGH {
        wanted
    } else {
        NORM_ROWS_ENOUGH
    };
    let least = rows.div_ceil(NORM_PARTIALS_MAX);
    let rows_each = if least > enough { least } else { enough };
    // As many as a step of the kernel takes together, where rows are short.
    let rows_each = if rows == 0 {
        NORM_CHUNKS
    } else {
        rows_each.next_multiple_of(NORM_CHUNKS)
    };
    (rows.div_ceil(rows_each), rows_each)
}

/// [`RMS_NORM_BACKWARD`], or [`RMS_NORM_BACKWARD_WIDE`], whose weight gradient grows in shared memory: a block of threads for each
/// run of rows.
///
/// # Errors
/// [`DeviceError::Unsupported`] for rows of more than 25,344 elements.
pub fn rms_norm_backward(call: &Norm) -> Result<Launch, DeviceError> {
    let entry = &RMS_NORM_BACKWARD;
    let (partials, _) = norm_partials(call.rows);
    let partials = along_x(entry.name, "runs of rows", partials)?;
    let elements = call.width.next_multiple_of(CHUNK);
    if elements > NORM_ELEMENTS_MAX {
        return Err(DeviceError::Unsupported {
            operation: entry.name,
            cause: format!(
                "rows of {} elements, where {NORM_ELEMENTS_MAX} are possible",
                call.width
            ),
        });
    }
    let chunks = call.width.div_ceil(CHUNK);
    if chunks <= NORM_THREADS_ONE_CHUNK {
        return Ok(line(entry, partials, threads(chunks, NORM_THREADS_ONE_CHUNK)));
    }
    if chunks <= 2 * NORM_THREADS_MAX {
        return Ok(line(entry, partials, threads(chunks.div_ceil(2), NORM_THREADS_MAX)));
    }
    Ok(Launch {
        shared_bytes: (elements * size_of::<f32>()) as u32,
        ..line(&RMS_NORM_BACKWARD_WIDE, partials, threads(chunks, THREADS_MAX))
    })
}

/// [`RMS_NORM_WEIGHT_GRADIENT`]: eight columns for each block of 8 · 64 threads.
///
/// # Errors
/// [`DeviceError::Unsupported`] for more columns than a grid has blocks.
pub fn rms_norm_weight_gradient(call: &Norm) -> Result<Launch, DeviceError> {
    let entry = &RMS_NORM_WEIGHT_GRADIENT;
    let blocks = along_x(entry.name, "columns", call.width.div_ceil(SECTOR))?;
    Ok(line(entry, blocks, (SECTOR * STRANDS) as u32))
}

/// Runs of eight logits of a row that a block of [`CROSS_ENTROPY`] keeps in shared memory between reading them and making their
/// gradient. The rest it reads again.
#[must_use]
pub fn kept_chunks(call: &CrossEntropy) -> usize {
    let chunks = call.vocabulary.div_ceil(CHUNK);
    if call.gradient_scale.is_some() {
        chunks.min(LOGITS_KEPT_BYTES / CHUNK_BYTES)
    } else {
        0
    }
}

/// [`CROSS_ENTROPY`]: a block of threads for each row.
///
/// # Errors
/// [`DeviceError::Unsupported`] for more rows than a grid has blocks.
pub fn cross_entropy(call: &CrossEntropy) -> Result<Launch, DeviceError> {
    let entry = &CROSS_ENTROPY;
    let rows = along_x(entry.name, "rows", call.rows)?;
    let threads = threads(call.vocabulary.div_ceil(CHUNK), LOGITS_THREADS_MAX);
    Ok(Launch {
        shared_bytes: (kept_chunks(call) * CHUNK_BYTES) as u32,
        ..line(entry, rows, threads)
    })
}

/// [`SQUARE_SUMS`]: a block of threads for each parameter block.
///
/// # Errors
/// [`DeviceError::Unsupported`] for more blocks than a grid has.
pub fn square_sums(blocks: usize) -> Result<Launch, DeviceError> {
    let blocks = along_x(SQUARE_SUMS.name, "blocks", blocks)?;
    Ok(line(&SQUARE_SUMS, blocks, THREADS as u32))
}

/// [`ADAMW`] or [`BLOCK_HASHES`]: several blocks of threads for each parameter block.
///
/// # Errors
/// [`DeviceError::Unsupported`] for parameter blocks of 2²⁹ elements and more, or more of them than a grid has blocks.
pub fn optimizer(entry: &'static Entry, blocks: usize, block_elements: usize) -> Result<Launch, DeviceError> {
    let blocks = along_x(entry.name, "blocks", blocks)?;
    let tiles = block_elements.div_ceil(OPTIMIZER_TILE);
    let tiles = dimension(entry.name, "tiles of a block", tiles, GRID_YZ_MAX)?;
    Ok(Launch {
        grid: [blocks, tiles, 1],
        ..line(entry, blocks, THREADS as u32)
    })
}

/// Tiles of the attention kernels for one size of heads; `attention.cuh` has the same numbers, and a test compares them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AttentionTiles {
    /// Elements of a head, at most: shorter ones are padded with zeros.
    pub head_dim: u32,
    /// Forward: warps, queries of a block of threads, keys of a tile.
    pub forward: [u32; 3],
    /// Keys' gradient: warps, keys of a block of threads, queries of a tile.
    pub keys: [u32; 3],
    /// Queries' gradient: warps, queries of a block of threads, keys of a tile.
    pub queries: [u32; 3],
}

/// The tiles in use, by size of heads.
pub const ATTENTION_TILES: [AttentionTiles; 3] = [
    AttentionTiles {
        head_dim: 32,
        forward: [4, 128, 64],
        keys: [4, 128, 32],
        queries: [4, 128, 32],
    },
    AttentionTiles {
        head_dim: 64,
        forward: [4, 128, 64],
        keys: [4, 128, 64],
        queries: [4, 128, 64],
    },
    AttentionTiles {
        head_dim: 128,
        forward: [4, 128, 64],
        keys: [8, 128, 32],
        queries: [4, 128, 32],
    },
];

/// Elements of a head, at most.
pub const HEAD_ELEMENTS_MAX: usize = ATTENTION_TILES[ATTENTION_TILES.len() - 1].head_dim as usize;

impl AttentionTiles {
    /// Bytes of so many rows of a tile.
    const fn rows(&self, rows: u32) -> u32 {
        rows * self.head_dim * Element::Bf16.bytes() as u32
    }

    /// Shared memory of the forward kernel: queries, one tile of values, two of keys.
    const fn forward_bytes(&self) -> u32 {
        self.rows(self.forward[1] + 3 * self.forward[2])
    }

    /// Shared memory of the keys' gradient: keys, values, two tiles of queries and of output gradients, and of their
    /// statistics.
    const fn keys_bytes(&self) -> u32 {
        self.rows(2 * self.keys[1] + 4 * self.keys[2]) + 4 * self.keys[2] * 4
    }

    /// Shared memory of the queries' gradient: queries, output gradients, two tiles of keys and of values.
    const fn queries_bytes(&self) -> u32 {
        self.rows(2 * self.queries[1] + 4 * self.queries[2])
    }
}

/// Index of the smallest head that holds this call's.
fn head_size(operation: &'static str, call: &Attention) -> Result<usize, DeviceError> {
    ATTENTION_TILES
        .iter()
        .position(|tiles| call.head_dim <= tiles.head_dim as usize)
        .ok_or_else(|| DeviceError::Unsupported {
            operation,
            cause: format!(
                "heads of {} elements, where {HEAD_ELEMENTS_MAX} are possible",
                call.head_dim
            ),
        })
}

/// Grid of one block of threads per `tile` tokens, for `heads` heads.
fn attention_launch(
    entry: &'static Entry,
    call: &Attention,
    heads: usize,
    [warps, tile, _]: [u32; 3],
    shared_bytes: u32,
) -> Result<Launch, DeviceError> {
    let tiles = along_x(entry.name, "tiles of tokens", call.context.div_ceil(tile as usize))?;
    let heads = dimension(entry.name, "heads", heads, GRID_YZ_MAX)?;
    let sequences = dimension(entry.name, "sequences", call.sequences, GRID_YZ_MAX)?;
    Ok(Launch {
        entry,
        grid: [tiles, heads, sequences],
        block: [warps * WARP as u32, 1, 1],
        shared_bytes,
    })
}

/// `Device::attention`: one of [`ATTENTION_32`], [`ATTENTION_64`], [`ATTENTION_128`].
///
/// # Errors
/// [`DeviceError::Unsupported`] for heads of more than 128 elements, or a grid beyond the driver's limits.
pub fn attention(call: &Attention) -> Result<Launch, DeviceError> {
    let size = head_size("attention", call)?;
    let tiles = &ATTENTION_TILES[size];
    let entry = [&ATTENTION_32, &ATTENTION_64, &ATTENTION_128][size];
    attention_launch(entry, call, call.heads, tiles.forward, tiles.forward_bytes())
}

/// Tokens of one head that a block of [`ATTENTION_DELTA`] has: eight lanes for each where they hold a head, else sixteen.
const fn delta_tokens(head_dim: usize) -> usize {
    THREADS / if head_dim <= 8 * CHUNK { 8 } else { 16 }
}

/// [`ATTENTION_DELTA`]: some lanes for each token and head. Its scratch holds `sequences · heads · context` elements of f32.
///
/// # Errors
/// [`DeviceError::Unsupported`] for a grid beyond the driver's limits.
pub fn attention_delta(call: &Attention) -> Result<Launch, DeviceError> {
    let entry = &ATTENTION_DELTA;
    head_size("attention_backward", call)?;
    let tokens = delta_tokens(call.head_dim);
    let blocks = along_x(entry.name, "tokens", call.context.div_ceil(tokens))?;
    let heads = dimension(entry.name, "heads", call.heads, GRID_YZ_MAX)?;
    let sequences = dimension(entry.name, "sequences", call.sequences, GRID_YZ_MAX)?;
    Ok(Launch {
        grid: [blocks, heads, sequences],
        ..line(entry, blocks, THREADS as u32)
    })
}

/// Gradient of keys and values, a block of threads for each query head: one of [`ATTENTION_KEYS_32`], [`ATTENTION_KEYS_64`], [`ATTENTION_KEYS_128`].
///
/// # Errors
/// As [`attention`].
pub fn attention_keys(call: &Attention) -> Result<Launch, DeviceError> {
    let size = head_size("attention_backward", call)?;
    let tiles = &ATTENTION_TILES[size];
    let entry = [&ATTENTION_KEYS_32, &ATTENTION_KEYS_64, &ATTENTION_KEYS_128][size];
    attention_launch(entry, call, call.heads, tiles.keys, tiles.keys_bytes())
}

/// [`ATTENTION_GROUP_SUMS`]: a block of threads for each token. Nothing to do where no heads are grouped.
///
/// # Errors
/// [`DeviceError::Unsupported`] for more tokens than a grid has blocks.
pub fn attention_group_sums(call: &Attention) -> Result<Launch, DeviceError> {
    let entry = &ATTENTION_GROUP_SUMS;
    let rows = if call.heads == call.kv_heads { 0 } else { call.rows() };
    let rows = along_x(entry.name, "tokens", rows)?;
    let chunks = 2 * call.kv_heads * call.head_dim.div_ceil(CHUNK);
    Ok(line(entry, rows, threads(chunks, THREADS)))
}

/// Elements of the scratch in which query heads of a group leave their gradients of keys and values; none where no heads are
/// grouped.
#[must_use]
pub const fn head_gradient_elements(call: &Attention) -> usize {
    if call.heads == call.kv_heads {
        return 0;
    }
    call.rows() * 2 * call.heads * call.head_dim
}

/// Gradient of queries: one of [`ATTENTION_QUERIES_32`], [`ATTENTION_QUERIES_64`], [`ATTENTION_QUERIES_128`].
///
/// # Errors
/// As [`attention`].
pub fn attention_queries(call: &Attention) -> Result<Launch, DeviceError> {
    let size = head_size("attention_backward", call)?;
    let tiles = &ATTENTION_TILES[size];
    let entry = [&ATTENTION_QUERIES_32, &ATTENTION_QUERIES_64, &ATTENTION_QUERIES_128][size];
    attention_launch(entry, call, call.heads, tiles.queries, tiles.queries_bytes())
}

#[cfg(test)]
mod tests;
