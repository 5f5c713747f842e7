//! The table of CUDA kernels: which entry points there are, and what they take.
//!
//! It is plain data and pure functions. Whoever compiles reads [`SOURCES`], [`HEADERS`] and [`OPTIONS`]; whoever launches takes a
//! [`Launch`] from one of the functions in `launches.rs`, which are re-exported here, and passes one [`Value`] for each of the
//! entry's arguments, in their order.
//!
//! Invariants
//! - **DET-2** No kernel adds floats atomically; how a sum is cut follows from the shape. The only atomics add 64-bit integers,
//!   whose sum has no order.
//! - A pointer needs no more alignment than its element. Kernels read and write 16 bytes at a time where a row's address
//!   and length allow it; which thread works on which element does not depend on that, so alignment changes no bit.
//! - Where a tensor may pass 2³¹ elements, the kernel's index has 64 bits.
//!
//! Setting memory to zero, and copying without conversion, are the driver's own operations and have no entry.

mod launches;

pub use launches::*;

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

#[cfg(test)]
mod tests;
