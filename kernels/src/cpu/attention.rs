//! Causal attention, streaming over blocks of keys, with register tiles of the matrix product.
//!
//! Forward (Dao et al. 2022, arXiv 2205.14135, algorithm 1): for [`QUERY_BLOCK`] queries, scores against [`KEY_BLOCK`]
//! keys at a time, with a running maximum and sum. Backward makes the scores again from the kept log-sum-exp. A score
//! tile above the diagonal is never made. Block sizes are part of the numbers (DET-1): they decide where a sum is cut.

use super::exponential::exp;
use super::gemm::{TILE_COLUMNS, Tile, pack_across, pack_along};
use super::lanes::{LANES, Lanes, multiversion};
use super::memory::CpuBuffer;
use super::pointwise::{for_lanes, get, set};
use crate::device::{Attention, DeviceError};

/// Queries worked on together.
const QUERY_BLOCK: usize = 32;
/// Keys worked on together.
const KEY_BLOCK: usize = 128;

/// Rows of a tile here: it divides both blocks.
const TILE_ROWS: usize = 8;

/// Scratch of one thread; grows to the largest shape it has seen.
#[derive(Debug, Default)]
pub(crate) struct AttentionScratch {
    memory: Option<CpuBuffer>,
}

/// Sizes of one head's operands, padded to whole tiles.
#[derive(Clone, Copy)]
struct Sizes {
    /// Elements of a head.
    depth: usize,
    /// The same, padded to whole panels.
    padded_depth: usize,
    /// Keys.
    keys: usize,
    /// The same, padded to whole panels.
    padded_keys: usize,
}

impl Sizes {
    fn new(call: &Attention) -> Self {
        Self {
            depth: call.head_dim,
            padded_depth: call.head_dim.next_multiple_of(TILE_COLUMNS),
            keys: call.context,
            padded_keys: call.context.next_multiple_of(TILE_COLUMNS),
        }
    }

    /// Elements of a packed `[keys, depth]` operand, either way round.
    const fn head(self) -> usize {
        self.padded_keys * self.padded_depth
    }

    /// Keys from `first_key` on that some of the `rows` queries from `query` on see, at most a block of keys.
    #[inline(always)]
    fn visible(self, query: usize, first_key: usize, rows: usize) -> usize {
        (query + rows).min(self.keys).saturating_sub(first_key).min(KEY_BLOCK)
    }

    /// Elements of a packed `[queries of a block, depth]` operand.
    const fn block(self) -> usize {
        QUERY_BLOCK * self.padded_depth
    }
}

/// Cuts `len` elements from the front of `memory`.
fn take<'a>(memory: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (front, rest) = std::mem::take(memory).split_at_mut(len);
    *memory = rest;
    front
}

impl AttentionScratch {
    fn slice(&mut self, len: usize) -> Result<&mut [f32], DeviceError> {
        let short = self.memory.as_ref().is_none_or(|memory| memory.len() < len);
        if short {
            self.memory = None;
            self.memory = Some(CpuBuffer::zeroed(len)?);
        }
        Ok(self.memory.as_deref_mut().unwrap_or_default())
    }
}

/// The operands of a forward pass, in whole-tensor slices.
struct Forward<'a> {
    qkv: &'a [f32],
    out: &'a mut [f32],
    log_sum_exp: &'a mut [f32],
}

/// The operands of a backward pass.
struct Backward<'a> {
    qkv: &'a [f32],
    out: &'a [f32],
    log_sum_exp: &'a [f32],
    out_gradient: &'a [f32],
    qkv_gradient: &'a mut [f32],
}

fn check(call: &Attention) {
    assert!(
        call.kv_heads > 0 && call.heads.is_multiple_of(call.kv_heads),
        "heads come in whole groups"
    );
    assert!(call.context > 0 && call.head_dim > 0, "attention over nothing");
}

/// See `Device::attention`.
pub(super) fn attention(
    isa: super::lanes::Isa,
    scratch: &mut AttentionScratch,
    call: &Attention,
    qkv: &[f32],
    out: &mut [f32],
    log_sum_exp: &mut [f32],
) -> Result<(), DeviceError> {
    check(call);
    let sizes = Sizes::new(call);
    let needed = 2 * sizes.head() + 2 * sizes.block() + QUERY_BLOCK * KEY_BLOCK;
    let memory = scratch.slice(needed)?;
    let rows = call.rows();
    let tensors = Forward {
        qkv: &qkv[..rows * call.qkv_width()],
        out: &mut out[..rows * call.out_width()],
        log_sum_exp: &mut log_sum_exp[..rows * call.heads],
    };
    forward(isa, call, sizes, memory, tensors);
    Ok(())
}

/// See `Device::attention_backward`.
pub(super) fn attention_backward(
    isa: super::lanes::Isa,
    scratch: &mut AttentionScratch,
    call: &Attention,
    (qkv, out, log_sum_exp, out_gradient): (&[f32], &[f32], &[f32], &[f32]),
    qkv_gradient: &mut [f32],
) -> Result<(), DeviceError> {
    check(call);
    let sizes = Sizes::new(call);
    let needed = 5 * sizes.head() + 5 * sizes.block() + 2 * QUERY_BLOCK * KEY_BLOCK;
    let memory = scratch.slice(needed)?;
    let rows = call.rows();
    let tensors = Backward {
        qkv: &qkv[..rows * call.qkv_width()],
        out: &out[..rows * call.out_width()],
        log_sum_exp: &log_sum_exp[..rows * call.heads],
        out_gradient: &out_gradient[..rows * call.out_width()],
        qkv_gradient: &mut qkv_gradient[..rows * call.qkv_width()],
    };
    backward(isa, call, sizes, memory, tensors);
    Ok(())
}

multiversion!(fn forward(call: &Attention, sizes: Sizes, memory: &mut [f32], tensors: Forward<'_>) = forward_on);
multiversion!(fn backward(call: &Attention, sizes: Sizes, memory: &mut [f32], tensors: Backward<'_>) = backward_on);

/// A matrix to multiply from the left: elements between its rows, and between its terms.
#[derive(Clone, Copy)]
struct Left<'a> {
    from: &'a [f32],
    row: usize,
    term: usize,
}

/// `c[rows, panels · 32] (+)= left[rows, terms] · right`, with `right` in panels of 32 columns, `panel` elements apart.
/// Rows are whole tiles; a tile beyond the true rows works on padding.
#[inline(always)]
fn product<V: Lanes>(
    (rows, terms, panels): (usize, usize, usize),
    left: Left<'_>,
    (right, panel): (&[f32], usize),
    (c, stride): (&mut [f32], usize),
    accumulate: bool,
) {
    if rows == 0 || terms == 0 || panels == 0 {
        return;
    }
    assert!(rows.is_multiple_of(TILE_ROWS));
    assert!((rows - 1) * left.row + (terms - 1) * left.term < left.from.len());
    assert!((panels - 1) * panel + terms * TILE_COLUMNS <= right.len());
    assert!((rows - 1) * stride + panels * TILE_COLUMNS <= c.len());
    let tile = Tile {
        rows: TILE_ROWS,
        columns: TILE_COLUMNS,
        stride,
        alpha: 1.0,
        accumulate,
    };
    for row in (0..rows).step_by(TILE_ROWS) {
        for index in 0..panels {
            // SAFETY: by the assertions, the tile's rows, terms and columns lie inside their slices.
            unsafe {
                let a = left.from.as_ptr().add(row * left.row);
                let b = right.as_ptr().add(index * panel);
                let c = c.as_mut_ptr().add(row * stride + index * TILE_COLUMNS);
                tile.multiply::<V>(terms, (a, left.row, left.term), (b, TILE_COLUMNS), c);
            }
        }
    }
}

/// Copies `rows` rows of `depth`, times `factor`, into dense rows; rows up to a whole block become zero.
#[inline(always)]
fn copy_rows<V: Lanes>(from: &[f32], stride: usize, rows: usize, depth: usize, factor: f32, to: &mut [f32]) {
    let factor = V::splat(factor);
    for row in 0..rows {
        let from = &from[row * stride..row * stride + depth];
        let to = &mut to[row * depth..(row + 1) * depth];
        for_lanes!(depth, |range, whole| {
            set(get::<V>(from, &range, whole).mul(factor), to, &range, whole);
        });
    }
    to[rows * depth..QUERY_BLOCK * depth].fill(0.0);
}

/// Scores of one block of queries against one block of keys, below the diagonal and up to whole panels; the part of a
/// row's last panels that it may not see becomes minus infinity.
#[inline(always)]
fn scores<V: Lanes>(
    sizes: Sizes,
    (query, queries, first_key): (usize, usize, usize),
    scaled_queries: &[f32],
    keys: &[f32],
    to: &mut [f32],
) {
    for row in (0..queries).step_by(TILE_ROWS) {
        let panels = sizes.visible(query + row, first_key, TILE_ROWS).div_ceil(TILE_COLUMNS);
        let left = Left {
            from: &scaled_queries[row * sizes.depth..],
            row: sizes.depth,
            term: 1,
        };
        let panel = sizes.depth * TILE_COLUMNS;
        let right = &keys[first_key / TILE_COLUMNS * panel..];
        let tile = &mut to[row * KEY_BLOCK..];
        product::<V>(
            (TILE_ROWS, sizes.depth, panels),
            left,
            (right, panel),
            (&mut *tile, KEY_BLOCK),
            false,
        );
        for r in 0..TILE_ROWS {
            let seen = sizes.visible(query + row + r, first_key, 1);
            tile[r * KEY_BLOCK + seen..r * KEY_BLOCK + panels * TILE_COLUMNS].fill(f32::NEG_INFINITY);
        }
    }
}

#[inline(always)]
fn forward_on<V: Lanes>(call: &Attention, sizes: Sizes, memory: &mut [f32], tensors: Forward<'_>) {
    let Forward { qkv, out, log_sum_exp } = tensors;
    let (width, depth) = (call.qkv_width(), call.head_dim);
    let mut memory = memory;
    let keys = take(&mut memory, sizes.head());
    let values = take(&mut memory, sizes.head());
    let queries = take(&mut memory, sizes.block());
    let sums = take(&mut memory, sizes.block());
    let tile = take(&mut memory, QUERY_BLOCK * KEY_BLOCK);
    for sequence in 0..call.sequences {
        let qkv = &qkv[sequence * call.context * width..(sequence + 1) * call.context * width];
        let out = &mut out[sequence * call.context * call.out_width()..];
        for kv_head in 0..call.kv_heads {
            let key_at = (call.heads + kv_head) * depth;
            let value_at = key_at + call.kv_heads * depth;
            pack_along::<V, TILE_COLUMNS>(&qkv[key_at..], width, call.context, depth, keys);
            pack_across_columns::<V>(&qkv[value_at..], width, call.context, depth, sizes.padded_keys, values);
            let group = call.heads / call.kv_heads;
            for head in kv_head * group..(kv_head + 1) * group {
                for query in (0..call.context).step_by(QUERY_BLOCK) {
                    let rows = QUERY_BLOCK.min(call.context - query);
                    copy_rows::<V>(
                        &qkv[query * width + head * depth..],
                        width,
                        rows,
                        depth,
                        call.scale(),
                        queries,
                    );
                    let statistics = query_block::<V>(sizes, (query, rows), queries, (keys, values), sums, tile);
                    let to = &mut out[query * call.out_width() + head * depth..];
                    finish_rows::<V>(sizes, rows, &statistics, sums, to, call.out_width());
                    let at = (sequence * call.heads + head) * call.context + query;
                    for row in 0..rows {
                        log_sum_exp[at + row] = statistics.log_sum_exp(row);
                    }
                }
            }
        }
    }
}

/// Packs `[keys, depth]` rows into panels of 32 of their columns, `padded_keys · 32` elements apart.
#[inline(always)]
fn pack_across_columns<V: Lanes>(
    from: &[f32],
    stride: usize,
    keys: usize,
    depth: usize,
    padded_keys: usize,
    to: &mut [f32],
) {
    for (index, column) in (0..depth).step_by(TILE_COLUMNS).enumerate() {
        let columns = TILE_COLUMNS.min(depth - column);
        let to = &mut to[index * padded_keys * TILE_COLUMNS..];
        pack_across::<V, TILE_COLUMNS>(&from[column..], stride, columns, keys, to);
    }
}

/// Running maximum and sum of each query's scores.
struct Statistics {
    largest: [f32; QUERY_BLOCK],
    sum: [f32; QUERY_BLOCK],
}

impl Statistics {
    fn log_sum_exp(&self, row: usize) -> f32 {
        (f64::from(self.largest[row]) + libm::log(f64::from(self.sum[row]))) as f32
    }
}

/// Sums of weighted values of one block of queries over all the keys that it may see, unnormalised.
#[inline(always)]
fn query_block<V: Lanes>(
    sizes: Sizes,
    (query, rows): (usize, usize),
    queries: &[f32],
    (keys, values): (&[f32], &[f32]),
    sums: &mut [f32],
    tile: &mut [f32],
) -> Statistics {
    let mut statistics = Statistics {
        largest: [f32::NEG_INFINITY; QUERY_BLOCK],
        sum: [0.0; QUERY_BLOCK],
    };
    let padded = sizes.padded_depth;
    sums[..QUERY_BLOCK * padded].fill(0.0);
    let padded_rows = rows.next_multiple_of(TILE_ROWS);
    for first_key in (0..query + rows).step_by(KEY_BLOCK) {
        scores::<V>(sizes, (query, padded_rows, first_key), queries, keys, tile);
        weigh_rows::<V>(sizes, (query, rows, first_key), &mut statistics, tile, sums);
        for row in (0..padded_rows).step_by(TILE_ROWS) {
            let terms = sizes.visible(query + row, first_key, TILE_ROWS);
            let left = Left {
                from: &tile[row * KEY_BLOCK..],
                row: KEY_BLOCK,
                term: 1,
            };
            let panel = sizes.padded_keys * TILE_COLUMNS;
            let right = &values[first_key * TILE_COLUMNS..];
            let to = (&mut sums[row * padded..], padded);
            product::<V>(
                (TILE_ROWS, terms, padded / TILE_COLUMNS),
                left,
                (right, panel),
                to,
                true,
            );
        }
    }
    statistics
}

/// Turns rows of scores into weights against a new maximum, and rescales what came before.
#[inline(always)]
fn weigh_rows<V: Lanes>(
    sizes: Sizes,
    (query, rows, first_key): (usize, usize, usize),
    statistics: &mut Statistics,
    tile: &mut [f32],
    sums: &mut [f32],
) {
    let padded = sizes.padded_depth;
    let mut factors = [0.0; QUERY_BLOCK];
    let before = statistics.largest;
    for row in 0..rows {
        let tile_row = row / TILE_ROWS * TILE_ROWS;
        let seen = sizes
            .visible(query + tile_row, first_key, TILE_ROWS)
            .next_multiple_of(LANES);
        let scores = &tile[row * KEY_BLOCK..row * KEY_BLOCK + seen];
        let mut largest = V::splat(before[row]);
        for_lanes!(seen, |range, whole| {
            largest = largest.max(get(scores, &range, whole));
        });
        statistics.largest[row] = largest.largest();
    }
    for at in (0..QUERY_BLOCK).step_by(LANES) {
        let range = at..at + LANES;
        let change = get::<V>(&before, &range, true).sub(get(&statistics.largest, &range, true));
        set(exp(change), &mut factors, &range, true);
    }
    for row in 0..rows {
        let tile_row = row / TILE_ROWS * TILE_ROWS;
        let seen = sizes
            .visible(query + tile_row, first_key, TILE_ROWS)
            .next_multiple_of(LANES);
        let scores = &mut tile[row * KEY_BLOCK..row * KEY_BLOCK + seen];
        let shift = V::splat(statistics.largest[row]);
        let mut sum = V::splat(0.0);
        for_lanes!(seen, |range, whole| {
            let weight = exp(get::<V>(scores, &range, whole).sub(shift));
            sum = sum.add(weight);
            set(weight, scores, &range, whole);
        });
        statistics.sum[row] = statistics.sum[row].mul_add(factors[row], sum.sum());
        if first_key > 0 {
            let factor = V::splat(factors[row]);
            let sums = &mut sums[row * padded..(row + 1) * padded];
            for_lanes!(padded, |range, whole| {
                set(get::<V>(sums, &range, whole).mul(factor), sums, &range, whole);
            });
        }
    }
}

/// Normalises the sums into the output.
#[inline(always)]
fn finish_rows<V: Lanes>(
    sizes: Sizes,
    rows: usize,
    statistics: &Statistics,
    sums: &[f32],
    to: &mut [f32],
    stride: usize,
) {
    for row in 0..rows {
        let factor = V::splat(1.0 / statistics.sum[row]);
        let sums = &sums[row * sizes.padded_depth..];
        let to = &mut to[row * stride..row * stride + sizes.depth];
        for_lanes!(sizes.depth, |range, whole| {
            set(get::<V>(sums, &range, whole).mul(factor), to, &range, whole);
        });
    }
}

/// One key head's packed operands and gradient sums.
struct KeyHead<'a> {
    /// `[keys panel][depth][32]`, for scores.
    keys_across: &'a mut [f32],
    /// The same of the values, for the gradient of the weights.
    values_across: &'a mut [f32],
    /// `[depth panel][keys][32]`, for the gradient of the queries.
    keys_along: &'a mut [f32],
    /// Sums `[keys, padded_depth]`.
    key_gradient: &'a mut [f32],
    value_gradient: &'a mut [f32],
}

/// One block of queries: dense rows, panels, and tiles.
struct QueryBlock<'a> {
    scaled: &'a mut [f32],
    scaled_panels: &'a mut [f32],
    gradient: &'a mut [f32],
    gradient_panels: &'a mut [f32],
    /// Sums `[queries, padded_depth]` of the query gradient.
    sums: &'a mut [f32],
    weights: &'a mut [f32],
    slopes: &'a mut [f32],
}

#[inline(always)]
fn backward_on<V: Lanes>(call: &Attention, sizes: Sizes, memory: &mut [f32], tensors: Backward<'_>) {
    let mut memory = memory;
    let mut key_head = KeyHead {
        keys_across: take(&mut memory, sizes.head()),
        values_across: take(&mut memory, sizes.head()),
        keys_along: take(&mut memory, sizes.head()),
        key_gradient: take(&mut memory, sizes.head()),
        value_gradient: take(&mut memory, sizes.head()),
    };
    let mut block = QueryBlock {
        scaled: take(&mut memory, sizes.block()),
        scaled_panels: take(&mut memory, sizes.block()),
        gradient: take(&mut memory, sizes.block()),
        gradient_panels: take(&mut memory, sizes.block()),
        sums: take(&mut memory, sizes.block()),
        weights: take(&mut memory, QUERY_BLOCK * KEY_BLOCK),
        slopes: take(&mut memory, QUERY_BLOCK * KEY_BLOCK),
    };
    let (width, out_width, depth) = (call.qkv_width(), call.out_width(), call.head_dim);
    let group = call.heads / call.kv_heads;
    for sequence in 0..call.sequences {
        let first = sequence * call.context;
        let qkv = &tensors.qkv[first * width..(first + call.context) * width];
        let out = &tensors.out[first * out_width..(first + call.context) * out_width];
        let out_gradient = &tensors.out_gradient[first * out_width..(first + call.context) * out_width];
        let qkv_gradient = &mut tensors.qkv_gradient[first * width..(first + call.context) * width];
        for kv_head in 0..call.kv_heads {
            let key_at = (call.heads + kv_head) * depth;
            let value_at = key_at + call.kv_heads * depth;
            let kh = &mut key_head;
            pack_along::<V, TILE_COLUMNS>(&qkv[key_at..], width, call.context, depth, kh.keys_across);
            pack_along::<V, TILE_COLUMNS>(&qkv[value_at..], width, call.context, depth, kh.values_across);
            pack_across_columns::<V>(
                &qkv[key_at..],
                width,
                call.context,
                depth,
                sizes.padded_keys,
                kh.keys_along,
            );
            kh.key_gradient.fill(0.0);
            kh.value_gradient.fill(0.0);
            for head in kv_head * group..(kv_head + 1) * group {
                let at = (sequence * call.heads + head) * call.context;
                let log_sum_exp = &tensors.log_sum_exp[at..at + call.context];
                for query in (0..call.context).step_by(QUERY_BLOCK) {
                    let rows = QUERY_BLOCK.min(call.context - query);
                    let from = &qkv[query * width + head * depth..];
                    let out_from = query * out_width + head * depth;
                    let gradient = &out_gradient[out_from..];
                    block.load::<V>(sizes, rows, (from, width, call.scale()), (gradient, out_width));
                    let deltas = deltas::<V>(rows, depth, &out[out_from..], gradient, out_width);
                    let kept = (&log_sum_exp[query..query + rows], &deltas);
                    backward_block::<V>(sizes, (query, rows), kept, &mut key_head, &mut block);
                    let to = &mut qkv_gradient[query * width + head * depth..];
                    write_rows::<V>((rows, depth), block.sums, sizes.padded_depth, call.scale(), to, width);
                }
            }
            let padded = sizes.padded_depth;
            let rows = (call.context, depth);
            write_rows::<V>(
                rows,
                key_head.key_gradient,
                padded,
                1.0,
                &mut qkv_gradient[key_at..],
                width,
            );
            write_rows::<V>(
                rows,
                key_head.value_gradient,
                padded,
                1.0,
                &mut qkv_gradient[value_at..],
                width,
            );
        }
    }
}

impl QueryBlock<'_> {
    /// Loads scaled queries and output gradients of one block, as rows and as panels.
    #[inline(always)]
    fn load<V: Lanes>(
        &mut self,
        sizes: Sizes,
        rows: usize,
        (queries, stride, scale): (&[f32], usize, f32),
        (gradient, gradient_stride): (&[f32], usize),
    ) {
        let depth = sizes.depth;
        copy_rows::<V>(queries, stride, rows, depth, scale, self.scaled);
        copy_rows::<V>(gradient, gradient_stride, rows, depth, 1.0, self.gradient);
        pack_across_columns::<V>(self.scaled, depth, QUERY_BLOCK, depth, QUERY_BLOCK, self.scaled_panels);
        pack_across_columns::<V>(
            self.gradient,
            depth,
            QUERY_BLOCK,
            depth,
            QUERY_BLOCK,
            self.gradient_panels,
        );
        self.sums.fill(0.0);
    }
}

/// Sum over a head of output times output gradient, for each query.
#[inline(always)]
fn deltas<V: Lanes>(rows: usize, depth: usize, out: &[f32], gradient: &[f32], stride: usize) -> [f32; QUERY_BLOCK] {
    let mut deltas = [0.0; QUERY_BLOCK];
    for row in 0..rows {
        let at = row * stride..row * stride + depth;
        let (out, gradient) = (&out[at.clone()], &gradient[at]);
        let mut sum = V::splat(0.0);
        for_lanes!(depth, |range, whole| {
            sum = get::<V>(out, &range, whole).fma(get(gradient, &range, whole), sum);
        });
        deltas[row] = sum.sum();
    }
    deltas
}

/// One block of queries against all the keys that it may see.
#[inline(always)]
fn backward_block<V: Lanes>(
    sizes: Sizes,
    (query, rows): (usize, usize),
    (log_sum_exp, deltas): (&[f32], &[f32; QUERY_BLOCK]),
    head: &mut KeyHead<'_>,
    block: &mut QueryBlock<'_>,
) {
    let padded = sizes.padded_depth;
    let depth_panels = padded / TILE_COLUMNS;
    let padded_rows = rows.next_multiple_of(TILE_ROWS);
    for first_key in (0..query + rows).step_by(KEY_BLOCK) {
        let place = (query, padded_rows, first_key);
        scores::<V>(sizes, place, block.scaled, head.keys_across, block.weights);
        // Gradient of the weights; what lies above the diagonal is multiplied by a weight of zero below.
        scores::<V>(sizes, place, block.gradient, head.values_across, block.slopes);
        for row in 0..padded_rows {
            let tile_row = row / TILE_ROWS * TILE_ROWS;
            let seen = sizes.visible(query + tile_row, first_key, TILE_ROWS);
            let padded_seen = seen.next_multiple_of(TILE_COLUMNS);
            let at = row * KEY_BLOCK..row * KEY_BLOCK + padded_seen;
            let (weights, slopes) = (&mut block.weights[at.clone()], &mut block.slopes[at]);
            let real = if row < rows {
                sizes.visible(query + row, first_key, 1)
            } else {
                0
            };
            weigh_slopes::<V>(
                real,
                log_sum_exp.get(row).copied().unwrap_or(0.0),
                deltas[row],
                weights,
                slopes,
            );
        }
        for row in (0..padded_rows).step_by(TILE_ROWS) {
            let terms = sizes.visible(query + row, first_key, TILE_ROWS);
            let left = Left {
                from: &block.slopes[row * KEY_BLOCK..],
                row: KEY_BLOCK,
                term: 1,
            };
            let right = (
                &head.keys_along[first_key * TILE_COLUMNS..],
                sizes.padded_keys * TILE_COLUMNS,
            );
            let to = (&mut block.sums[row * padded..], padded);
            product::<V>((TILE_ROWS, terms, depth_panels), left, right, to, true);
        }
        let keys = sizes.visible(query, first_key, rows).next_multiple_of(TILE_ROWS);
        for key in (0..keys).step_by(TILE_ROWS) {
            // Queries before this tile of keys see none of it.
            let skipped = (first_key + key).saturating_sub(query) / TILE_ROWS * TILE_ROWS;
            let place = (TILE_ROWS, padded_rows - skipped, depth_panels);
            let panel = QUERY_BLOCK * TILE_COLUMNS;
            let rows_of = |from| Left {
                from,
                row: 1,
                term: KEY_BLOCK,
            };
            let at = skipped * KEY_BLOCK + key;
            let to = (first_key + key) * padded;
            let right = (&block.scaled_panels[skipped * TILE_COLUMNS..], panel);
            let sums = (&mut head.key_gradient[to..], padded);
            product::<V>(place, rows_of(&block.slopes[at..]), right, sums, true);
            let right = (&block.gradient_panels[skipped * TILE_COLUMNS..], panel);
            let sums = (&mut head.value_gradient[to..], padded);
            product::<V>(place, rows_of(&block.weights[at..]), right, sums, true);
        }
    }
}

/// Scores become weights `p = e^(score - log_sum_exp)`; gradients of weights become gradients of scores,
/// `p · (slope - delta)`; from `real` on, both become zero.
#[inline(always)]
fn weigh_slopes<V: Lanes>(real: usize, log_sum_exp: f32, delta: f32, weights: &mut [f32], slopes: &mut [f32]) {
    let (shift, delta) = (V::splat(log_sum_exp), V::splat(delta));
    for_lanes!(real, |range, whole| {
        let weight = exp(get::<V>(weights, &range, whole).sub(shift));
        let slope = weight.mul(get::<V>(slopes, &range, whole).sub(delta));
        set(weight, weights, &range, whole);
        set(slope, slopes, &range, whole);
    });
    weights[real..].fill(0.0);
    slopes[real..].fill(0.0);
}

/// Writes padded rows of sums, times `factor`, to their place.
#[inline(always)]
fn write_rows<V: Lanes>(
    (rows, depth): (usize, usize),
    sums: &[f32],
    padded: usize,
    factor: f32,
    to: &mut [f32],
    stride: usize,
) {
    let factor = V::splat(factor);
    for row in 0..rows {
        let sums = &sums[row * padded..row * padded + depth];
        let to = &mut to[row * stride..row * stride + depth];
        for_lanes!(depth, |range, whole| {
            set(get::<V>(sums, &range, whole).mul(factor), to, &range, whole);
        });
    }
}
