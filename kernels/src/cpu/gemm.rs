//! Matrix product on one thread.
//!
//! Why it is written here: the order of a sum is part of the numbers (DET-1). General GEMM libraries choose blocking along
//! `k` from the cache sizes they find, and take other paths for other shapes, so the same binary gives other bits on
//! another CPU. Here each element of C is, for each run of [`K_BLOCK`] terms in order, one chain of fused multiply-adds
//! from zero, added to C as `alpha · chain + C`. That is all that decides bits; rows, columns, packing, tiles and
//! instruction sets do not.
//!
//! Blocks of A and B are packed into panels (Goto and van de Geijn 2008); a tile of [`TILE_ROWS`] by [`TILE_COLUMNS`] of C
//! lives in registers.

use super::lanes::{Isa, LANES, Lanes, multiversion};
use super::memory::CpuBuffer;
use crate::device::{DeviceError, Gemm};

/// Rows of a register tile.
pub(crate) const TILE_ROWS: usize = 12;
/// Columns of a register tile: two vectors.
pub(crate) const TILE_COLUMNS: usize = 2 * LANES;
/// Terms of one chain of multiply-adds. Part of the numbers: changing it changes bits.
pub(crate) const K_BLOCK: usize = 512;
/// Rows of A packed at a time.
const ROW_BLOCK: usize = 1024;
/// Columns of B packed at a time: with [`K_BLOCK`] it fits a 1 MiB second-level cache.
const COLUMN_BLOCK: usize = 256;

/// Packing memory of one thread.
#[derive(Debug)]
pub(crate) struct GemmScratch {
    a: CpuBuffer,
    b: CpuBuffer,
}

impl GemmScratch {
    /// None yet: it grows with the products that are asked for, up to one block of each operand.
    pub(crate) fn new() -> Result<Self, DeviceError> {
        Ok(Self {
            a: CpuBuffer::zeroed(0)?,
            b: CpuBuffer::zeroed(0)?,
        })
    }

    /// Room for one block of each operand of `call`.
    ///
    /// # Errors
    /// If the system has no memory for it.
    pub(crate) fn reserve(&mut self, call: &Gemm) -> Result<(), DeviceError> {
        let depth = call.k.min(K_BLOCK);
        let a = packed_elements(call.m.min(ROW_BLOCK), depth, TILE_ROWS);
        let b = packed_elements(call.n.min(COLUMN_BLOCK), depth, TILE_COLUMNS);
        for (buffer, elements) in [(&mut self.a, a), (&mut self.b, b)] {
            if buffer.len() < elements {
                *buffer = CpuBuffer::zeroed(elements)?;
            }
        }
        Ok(())
    }
}

/// The operands of one call, checked to lie inside their slices.
struct Operands<'a> {
    a: &'a [f32],
    b: &'a [f32],
    c: &'a mut [f32],
}

/// `C = alpha · op(A) · op(B)`, or `C += …`.
///
/// # Panics
/// If an operand's slice is too short for its shape.
pub(crate) fn gemm(isa: Isa, scratch: &mut GemmScratch, call: &Gemm, a: &[f32], b: &[f32], c: &mut [f32]) {
    let stored = |rows: usize, columns: usize, stride: usize| {
        assert!(stride >= columns, "rows of an operand overlap");
        if rows == 0 || columns == 0 {
            0
        } else {
            (rows - 1) * stride + columns
        }
    };
    let (m, n, k) = (call.m, call.n, call.k);
    let a_len = if call.a_transposed {
        stored(k, m, call.a_stride)
    } else {
        stored(m, k, call.a_stride)
    };
    let b_len = if call.b_transposed {
        stored(n, k, call.b_stride)
    } else {
        stored(k, n, call.b_stride)
    };
    let operands = Operands {
        a: &a[..a_len],
        b: &b[..b_len],
        c: &mut c[..stored(m, n, call.c_stride)],
    };
    if k == 0 && !call.accumulate {
        for row in operands.c.chunks_mut(call.c_stride.max(1)) {
            let len = n.min(row.len());
            row[..len].fill(0.0);
        }
    }
    gemm_blocks(isa, scratch, call, operands);
}

multiversion!(fn gemm_blocks(scratch: &mut GemmScratch, call: &Gemm, operands: Operands<'_>) = gemm_blocks_on);

#[inline(always)]
fn gemm_blocks_on<V: Lanes>(scratch: &mut GemmScratch, call: &Gemm, operands: Operands<'_>) {
    let Operands { a, b, c } = operands;
    for row in (0..call.m).step_by(ROW_BLOCK) {
        let rows = ROW_BLOCK.min(call.m - row);
        for k in (0..call.k).step_by(K_BLOCK) {
            let depth = K_BLOCK.min(call.k - k);
            if call.a_transposed {
                pack_across::<V, TILE_ROWS>(
                    &a[k * call.a_stride + row..],
                    call.a_stride,
                    rows,
                    depth,
                    &mut scratch.a,
                );
            } else {
                pack_along::<V, TILE_ROWS>(
                    &a[row * call.a_stride + k..],
                    call.a_stride,
                    rows,
                    depth,
                    &mut scratch.a,
                );
            }
            for column in (0..call.n).step_by(COLUMN_BLOCK) {
                let columns = COLUMN_BLOCK.min(call.n - column);
                if call.b_transposed {
                    let from = &b[column * call.b_stride + k..];
                    pack_along::<V, TILE_COLUMNS>(from, call.b_stride, columns, depth, &mut scratch.b);
                } else {
                    let from = &b[k * call.b_stride + column..];
                    pack_across::<V, TILE_COLUMNS>(from, call.b_stride, columns, depth, &mut scratch.b);
                }
                let block = Block {
                    rows,
                    columns,
                    depth,
                    stride: call.c_stride,
                    alpha: call.alpha,
                    accumulate: call.accumulate || k > 0,
                };
                multiply_panels::<V>(&block, &scratch.a, &scratch.b, &mut c[row * call.c_stride + column..]);
            }
        }
    }
}

/// Runs packed at a time into panels of `W` runs: a vector, or a whole panel that is narrower.
const fn packed_together(width: usize) -> usize {
    if width < LANES { width } else { LANES }
}

/// Elements of a panel: behind a narrow one is room for the lanes too many of its last store.
pub(crate) const fn panel_elements(depth: usize, width: usize) -> usize {
    depth * width + packed_together(width).next_multiple_of(LANES) - packed_together(width)
}

/// Elements of all panels of `runs` runs.
const fn packed_elements(runs: usize, depth: usize, width: usize) -> usize {
    runs.div_ceil(width) * panel_elements(depth, width)
}

/// Packs `runs` rows of `depth` contiguous terms into panels of `W` rows, `[panel][term][W]`; missing rows are zero.
#[inline(always)]
pub(crate) fn pack_along<V: Lanes, const W: usize>(
    from: &[f32],
    stride: usize,
    runs: usize,
    depth: usize,
    to: &mut [f32],
) {
    let last = (runs - 1) * stride + depth;
    assert!(last <= from.len() && packed_elements(runs, depth, W) <= to.len());
    let together = packed_together(W);
    for run in (0..runs.next_multiple_of(W)).step_by(together) {
        let rows = together.min(runs.saturating_sub(run));
        for term in (0..depth).step_by(LANES) {
            let terms = LANES.min(depth - term);
            let start = run * stride + term;
            // SAFETY: the last row's last term is inside `from`, and all panels fit `to`, by the assertion.
            unsafe {
                if rows == together && terms == LANES {
                    pack_square::<V, W>(from.as_ptr().add(start), stride, run, term, depth, to);
                } else {
                    // Behind the last row there is nothing to read, only zeros to put.
                    let rows_from = from.get(start..).unwrap_or_default();
                    pack_edge::<V, W>(rows_from, stride, (rows, terms), run, term, depth, to);
                }
            }
        }
    }
}

/// Sixteen terms of a whole group of rows: loops of constant length, so that nothing leaves the registers.
///
/// # Safety
/// The rows and terms are readable, and `to` holds [`packed_elements`].
#[inline(always)]
unsafe fn pack_square<V: Lanes, const W: usize>(
    from: *const f32,
    stride: usize,
    run: usize,
    term: usize,
    depth: usize,
    to: &mut [f32],
) {
    let mut block = [V::splat(0.0); LANES];
    let mut row = 0;
    while row < packed_together(W) {
        // SAFETY: the caller's promise.
        block[row] = unsafe { V::load_at(from.add(row * stride)) };
        row += 1;
    }
    V::transpose(&mut block);
    let mut column = 0;
    while column < LANES {
        // SAFETY: the caller's promise.
        unsafe { put::<V, W>(block[column], run, term + column, depth, to) };
        column += 1;
    }
}

/// Fewer rows or terms.
///
/// # Safety
/// `to` holds [`packed_elements`].
#[inline(always)]
unsafe fn pack_edge<V: Lanes, const W: usize>(
    from: &[f32],
    stride: usize,
    (rows, terms): (usize, usize),
    run: usize,
    term: usize,
    depth: usize,
    to: &mut [f32],
) {
    let mut block = [V::splat(0.0); LANES];
    for (row, to) in block.iter_mut().enumerate().take(rows) {
        *to = V::load_part(&from[row * stride..row * stride + terms]);
    }
    V::transpose(&mut block);
    for (column, values) in block.into_iter().enumerate().take(terms) {
        // SAFETY: the caller's promise.
        unsafe { put::<V, W>(values, run, term + column, depth, to) };
    }
}

/// Packs `runs` columns of `depth` terms, each term's columns contiguous, into panels of `W` columns.
#[inline(always)]
pub(crate) fn pack_across<V: Lanes, const W: usize>(
    from: &[f32],
    stride: usize,
    runs: usize,
    depth: usize,
    to: &mut [f32],
) {
    let last = (depth - 1) * stride + runs;
    assert!(last <= from.len() && packed_elements(runs, depth, W) <= to.len());
    let together = packed_together(W);
    // Several panels at a time, so that a term's cache lines are read once; a narrow panel's last load passes its end.
    let at_a_time = PANELS_ACROSS * W;
    let mut run = 0;
    while run + at_a_time + LANES <= runs + together {
        for term in 0..depth {
            // SAFETY: the last vector ends inside the term's columns, and all panels fit `to`, by the assertion.
            unsafe { pack_term::<V, W>(from.as_ptr().add(term * stride + run), run, term, depth, to) };
        }
        run += at_a_time;
    }
    for run in (run..runs.next_multiple_of(W)).step_by(together) {
        for term in 0..depth {
            let start = term * stride + run;
            let columns = together.min(runs.saturating_sub(run));
            let values = if columns == LANES {
                // SAFETY: sixteen columns of the term are left.
                unsafe { V::load_at(from.as_ptr().add(start)) }
            } else if columns > 0 {
                V::load_part(&from[start..start + columns])
            } else {
                V::splat(0.0)
            };
            // SAFETY: all panels fit `to`, by the assertion.
            unsafe { put::<V, W>(values, run, term, depth, to) };
        }
    }
}

/// Panels packed together where columns are contiguous.
const PANELS_ACROSS: usize = 4;

/// One term of [`PANELS_ACROSS`] whole panels, in loops of constant length.
///
/// # Safety
/// The columns are readable, up to the end of the last vector; `to` holds [`packed_elements`].
#[inline(always)]
unsafe fn pack_term<V: Lanes, const W: usize>(from: *const f32, run: usize, term: usize, depth: usize, to: &mut [f32]) {
    let mut column = 0;
    while column < PANELS_ACROSS * W {
        // SAFETY: the caller's promise.
        unsafe { put::<V, W>(V::load_at(from.add(column)), run + column, term, depth, to) };
        column += packed_together(W);
    }
}

/// Puts the runs of one term into their panel. Where panels are narrower than a vector, the lanes too many lie where the
/// next term is put later.
///
/// # Safety
/// `to` holds [`packed_elements`].
#[inline(always)]
unsafe fn put<V: Lanes, const W: usize>(values: V, run: usize, term: usize, depth: usize, to: &mut [f32]) {
    let at = run / W * panel_elements(depth, W) + term * W + run % W;
    // SAFETY: the caller's promise.
    unsafe { values.store_at(to.as_mut_ptr().add(at)) };
}

/// One block of C and what to do with it.
struct Block {
    rows: usize,
    columns: usize,
    depth: usize,
    stride: usize,
    alpha: f32,
    accumulate: bool,
}

#[inline(always)]
fn multiply_panels<V: Lanes>(block: &Block, a: &[f32], b: &[f32], c: &mut [f32]) {
    let depth = block.depth;
    assert!(packed_elements(block.rows, depth, TILE_ROWS) <= a.len());
    assert!(packed_elements(block.columns, depth, TILE_COLUMNS) <= b.len());
    assert!((block.rows - 1) * block.stride + block.columns <= c.len());
    for row in (0..block.rows).step_by(TILE_ROWS) {
        let rows = TILE_ROWS.min(block.rows - row);
        for column in (0..block.columns).step_by(TILE_COLUMNS) {
            let columns = TILE_COLUMNS.min(block.columns - column);
            // SAFETY: panels and the tile lie inside their slices, by the assertions.
            unsafe {
                let a = a.as_ptr().add(row / TILE_ROWS * panel_elements(depth, TILE_ROWS));
                let b = b.as_ptr().add(column * depth);
                let c = c.as_mut_ptr().add(row * block.stride + column);
                let tile = Tile {
                    rows,
                    columns,
                    stride: block.stride,
                    alpha: block.alpha,
                    accumulate: block.accumulate,
                };
                tile.multiply::<V>(depth, (a, 1, TILE_ROWS), (b, TILE_COLUMNS), c);
            }
        }
    }
}

/// One register tile of C: at most [`TILE_ROWS`] by [`TILE_COLUMNS`].
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub rows: usize,
    pub columns: usize,
    /// Elements between rows of C.
    pub stride: usize,
    pub alpha: f32,
    pub accumulate: bool,
}

impl Tile {
    /// Multiplies `depth` terms. `a` is (pointer, elements between rows, elements between terms), `b` is (pointer, elements
    /// between terms).
    ///
    /// # Safety
    /// Readable: the tile's rows of A, up to a multiple of four, and all [`TILE_COLUMNS`] columns of B. Writable: the tile
    /// of C. At most [`TILE_ROWS`] rows and [`TILE_COLUMNS`] columns.
    #[inline(always)]
    pub unsafe fn multiply<V: Lanes>(
        self,
        depth: usize,
        a: (*const f32, usize, usize),
        b: (*const f32, usize),
        c: *mut f32,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            if V::WIDE_TILE {
                match self.rows {
                    ..=4 => self.part::<V, 4, 2>(0, 0, depth, a, b, c),
                    5..=8 => self.part::<V, 8, 2>(0, 0, depth, a, b, c),
                    _ => self.part::<V, 12, 2>(0, 0, depth, a, b, c),
                }
                return;
            }
            let mut column = 0;
            while column < self.columns {
                if self.rows > 8 {
                    self.part::<V, 6, 1>(0, column, depth, a, b, c);
                    self.part::<V, 6, 1>(6, column, depth, a, b, c);
                } else {
                    self.part::<V, 4, 1>(0, column, depth, a, b, c);
                    if self.rows > 4 {
                        self.part::<V, 4, 1>(4, column, depth, a, b, c);
                    }
                }
                column += LANES;
            }
        }
    }

    /// `R` rows and `C` vectors of the tile.
    ///
    /// # Safety
    /// As [`Tile::multiply`].
    #[inline(always)]
    unsafe fn part<V: Lanes, const R: usize, const C: usize>(
        self,
        row: usize,
        column: usize,
        depth: usize,
        a: (*const f32, usize, usize),
        b: (*const f32, usize),
        c: *mut f32,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let sums = chains::<V, R, C>(depth, (a.0.add(row * a.1), a.1, a.2), (b.0.add(column), b.1));
            self.write::<V, R, C>(sums, row, column, c);
        }
    }

    /// Adds or puts the sums of a part.
    ///
    /// # Safety
    /// The tile of C is writable.
    #[inline(always)]
    unsafe fn write<V: Lanes, const R: usize, const C: usize>(
        self,
        sums: [[V; C]; R],
        row: usize,
        column: usize,
        c: *mut f32,
    ) {
        let alpha = V::splat(self.alpha);
        // SAFETY: the caller's promise.
        let c = unsafe { c.add(row * self.stride + column) };
        if self.rows < row + R || self.columns < column + C * LANES {
            // SAFETY: as above.
            unsafe { self.write_edge(&sums, row, column, c) };
            return;
        }
        // Loops of constant length, so that the sums stay in registers.
        let mut r = 0;
        while r < R {
            let mut v = 0;
            while v < C {
                // SAFETY: the part is whole.
                unsafe {
                    let to = c.add(r * self.stride + v * LANES);
                    if self.accumulate {
                        alpha.fma(sums[r][v], V::load_at(to)).store_at(to);
                    } else {
                        alpha.mul(sums[r][v]).store_at(to);
                    }
                }
                v += 1;
            }
            r += 1;
        }
    }

    /// A part that passes the edge of C; `c` points at the part.
    ///
    /// # Safety
    /// The tile of C is writable.
    #[inline(always)]
    unsafe fn write_edge<V: Lanes, const R: usize, const C: usize>(
        self,
        sums: &[[V; C]; R],
        row: usize,
        column: usize,
        c: *mut f32,
    ) {
        let alpha = V::splat(self.alpha);
        for (r, sums) in sums.iter().enumerate().take(self.rows.saturating_sub(row)) {
            for (v, &sum) in sums.iter().enumerate() {
                let columns = self.columns.saturating_sub(column + v * LANES).min(LANES);
                // SAFETY: these columns of the row lie inside C.
                let to = unsafe { std::slice::from_raw_parts_mut(c.add(r * self.stride + v * LANES), columns) };
                let value = if self.accumulate {
                    alpha.fma(sum, V::load_part(to))
                } else {
                    alpha.mul(sum)
                };
                value.store_part(to);
            }
        }
    }
}

/// `R` rows by `C` vectors of chains of fused multiply-adds, from zero, in order of terms.
///
/// # Safety
/// Readable: `R` rows of A and `C` vectors of B for each term.
#[inline(always)]
unsafe fn chains<V: Lanes, const R: usize, const C: usize>(
    depth: usize,
    (a, a_row, a_term): (*const f32, usize, usize),
    (b, b_term): (*const f32, usize),
) -> [[V; C]; R] {
    let mut sums = [[V::splat(0.0); C]; R];
    for term in 0..depth {
        // SAFETY: the caller's promise.
        unsafe {
            let a = a.add(term * a_term);
            let b = b.add(term * b_term);
            let mut vectors = [V::splat(0.0); C];
            let mut v = 0;
            while v < C {
                vectors[v] = V::load_at(b.add(v * LANES));
                v += 1;
            }
            let mut r = 0;
            while r < R {
                let factor = V::splat(*a.add(r * a_row));
                let mut v = 0;
                while v < C {
                    sums[r][v] = factor.fma(vectors[v], sums[r][v]);
                    v += 1;
                }
                r += 1;
            }
        }
    }
    sums
}
