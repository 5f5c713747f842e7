//! How each shape launches the kernels of the table: grid, block and shared memory, and how large the scratch is.
//!
//! Sizes that a kernel must agree on stand in its source, too; tests compare them.
//!
//! Invariants
//! - **DET-2** grid, block and shared memory are functions of the call's shape alone.
//! - Widths of rows and dimensions of the grid have 32 bits; what does not fit is refused as [`DeviceError::Unsupported`].

use super::*;
use crate::device::{Attention, CrossEntropy, DeviceError, Norm, Rope};

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

/// Elements that one thread handles at a time, in every kernel over rows.
pub(super) const CHUNK: usize = 8;
/// Bytes of a chunk in working precision.
const CHUNK_BYTES: usize = CHUNK * Element::Bf16.bytes();
/// Threads of a block of an element-wise kernel.
pub(super) const THREADS: usize = 256;
/// Threads of a block, at most.
const THREADS_MAX: usize = 1024;
/// Threads of a warp.
pub(super) const WARP: usize = 32;
/// Places whose keys a block of [`EMBED_SORT`] sorts.
pub(super) const SORTED: usize = 1024;
/// Elements of a parameter block that one block of threads updates.
pub(super) const OPTIMIZER_TILE: usize = 8192;
/// Chunks that a thread of [`RMS_NORM_BACKWARD`] has under way: one of each of four rows, or two of each of two.
pub(super) const NORM_CHUNKS: usize = 4;
/// Threads for a row of which each has one chunk, at most: beyond, two chunks and half the threads leave room for a second block.
const NORM_THREADS_ONE_CHUNK: usize = 256;
/// Threads of its blocks, at most.
const NORM_THREADS_MAX: usize = 512;
/// Runs of rows that a norm's weight gradient is cut into, at most; each costs a row of f32 written and read.
pub(super) const NORM_PARTIALS_MAX: usize = 2048;
/// Runs that there should be before they grow longer than [`NORM_CHUNKS`] rows: about two for each multiprocessor of a large card.
const NORM_PARTIALS_WANTED: usize = 256;
/// Rows from which on a run has no need to be longer: its partial is then a sixteenth of what its rows move, and short runs
/// keep all multiprocessors busy to the end.
const NORM_ROWS_ENOUGH: usize = 16;
/// Threads of a block of [`CROSS_ENTROPY`], at most.
const LOGITS_THREADS_MAX: usize = 512;
/// Shared memory that it keeps logits in, at most: two blocks fit a multiprocessor from A100 on, and one any supported card.
pub(super) const LOGITS_KEPT_BYTES: usize = 80 * 1024;
/// Columns that a block of [`RMS_NORM_WEIGHT_GRADIENT`] sums.
pub(super) const SECTOR: usize = 8;
/// Strands in which it sums each of them.
pub(super) const STRANDS: usize = 64;
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
    pub(super) const fn forward_bytes(&self) -> u32 {
        self.rows(self.forward[1] + 3 * self.forward[2])
    }

    /// Shared memory of the keys' gradient: keys, values, two tiles of queries and of output gradients, and of their
    /// statistics.
    pub(super) const fn keys_bytes(&self) -> u32 {
        self.rows(2 * self.keys[1] + 4 * self.keys[2]) + 4 * self.keys[2] * 4
    }

    /// Shared memory of the queries' gradient: queries, output gradients, two tiles of keys and of values.
    pub(super) const fn queries_bytes(&self) -> u32 {
        self.rows(2 * self.queries[1] + 4 * self.queries[2])
    }
}

/// Index of the smallest head that holds this call's.
pub(super) fn head_size(operation: &'static str, call: &Attention) -> Result<usize, DeviceError> {
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
/// `delta_lanes` in `attention_backward.cu` has the same rule, and a test compares them.
pub(super) const fn delta_tokens(head_dim: usize) -> usize {
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
