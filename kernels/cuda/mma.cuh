// Tiles of bf16 in shared memory and their products on the tensor cores.
//
// A tile has rows of `D` elements, D = 32, 64 or 128, in pieces of 16 bytes. Eight rows of 64 elements are a panel of 1024 bytes:
// piece p of row r lies at place p ^ (r % 8) of the row's 128 bytes, so that the eight rows that one phase of `ldmatrix` reads
// lie in different banks. That is also the layout that PTX ISA, "wgmma", calls swizzled by 128 bytes. Rows of 128 elements
// have two panels, one behind the other; rows of 32 are half as long and have a swizzle of their own.
//
// Products are of warps, by `mma.sync`, or of groups of four warps, by `wgmma`, which reads tiles from shared memory itself.
// Only Hopper has the latter; heads of 32 elements stay with the former there, too.
//
// Fragments are those of PTX ISA, "mma.m16n8k16": with g = lane / 4 and t = lane % 4, a lane holds of C rows g and g + 8,
// columns 2t and 2t + 1, as c[0], c[1] (row g) and c[2], c[3] (row g + 8). Two neighbouring C tiles, rounded to bf16, are
// one A fragment: so weights go from one product into the next without leaving their registers.
#pragma once

#include "common.cuh"

// Rows of an A fragment, columns of a C tile, terms of one product.
constexpr u32 FRAGMENT_ROWS = 16;
constexpr u32 FRAGMENT_COLUMNS = 8;
constexpr u32 FRAGMENT_TERMS = 16;

// One row fragment's accumulators: `COLUMNS` columns wide.
template <u32 COLUMNS> using Accumulators = float[COLUMNS / FRAGMENT_COLUMNS][4];
// The same values as A fragments.
template <u32 COLUMNS> using Weights = u32[COLUMNS / FRAGMENT_TERMS][4];

constexpr u32 PANEL_ROWS = 8;
constexpr u32 PANEL_COLUMNS = 64;
constexpr u32 PANEL_BYTES = 1024;

template <u32 D> struct Tile {
    static constexpr u32 PIECES = D / CHUNK;
    u8* memory;

    DEVICE u8* piece(u32 row, u32 index) const {
        if constexpr (D < PANEL_COLUMNS) {
            return memory + row * (D * 2) + (index ^ (row / 2 % PIECES)) * 16;
        } else {
            constexpr u32 PANELS = D / PANEL_COLUMNS;
            const u32 panel = row / PANEL_ROWS * (PANELS - 1) + index / 8;
            return memory + panel * PANEL_BYTES + row * 128 + (index ^ row) % 8 * 16;
        }
    }

    // Where row `row` begins, the first of a panel.
    DEVICE u8* panel(u32 row) const { return memory + bytes(row); }

    // The bytes of `rows` rows.
    static DEVICE constexpr u32 bytes(u32 rows) { return rows * D * 2; }
};

// Whether products of tiles D wide are those of groups of warps.
template <u32 D> constexpr bool MULTIPLIES_IN_GROUPS = GROUP_PRODUCTS && D >= PANEL_COLUMNS;

// How the rows that a block owns are shared among its warps: each has `FRAGMENTS` fragments of 16 rows.
template <u32 D, typename Tiling, bool GROUPED_ = MULTIPLIES_IN_GROUPS<D>> struct Share {
    static constexpr bool GROUPED = GROUPED_;
    static constexpr u32 FRAGMENTS = Tiling::FRAGMENTS;
    // Warps that multiply together.
    static constexpr u32 WARPS = GROUPED ? 4 : 1;
    // From one fragment of a warp to its next, and rows of the warps that multiply together.
    static constexpr u32 STEP = WARPS * FRAGMENT_ROWS;
    static constexpr u32 ROWS = FRAGMENTS * STEP;

    // The first of the rows of the warps that this one multiplies with.
    static DEVICE u32 first() { return Tiling::WARPS == WARPS ? 0 : warp_of_block() / WARPS * ROWS; }
    // The first row of this warp's fragment `m`.
    static DEVICE u32 fragment(u32 m) { return first() + m * STEP + warp_of_block() % WARPS * FRAGMENT_ROWS; }
};

// Rows of one head in global memory: row r begins at from + r · stride and has `head_dim` elements.
template <typename T> struct HeadRows {
    T* from;
    u32 stride;
    u32 head_dim;

    DEVICE T* row(u32 index) const { return from + static_cast<u64>(index) * stride; }

    // Whether every piece of every row may be moved as 16 bytes.
    DEVICE bool aligned() const { return is_aligned(from) && stride % CHUNK == 0 && head_dim % CHUNK == 0; }
};

// One piece of a row whose address allows no 16 bytes at once; elements beyond `length` are zeros.
DEVICE void gather_piece(u8* to, const bf16* from, u32 length) {
    u32 words[CHUNK / 2];
#pragma unroll
    for (u32 i = 0; i < CHUNK / 2; ++i) {
        const u32 low = 2 * i < length ? from[2 * i].bits : 0, high = 2 * i + 1 < length ? from[2 * i + 1].bits : 0;
        words[i] = low | high << 16;
    }
    store_shared(to, u32x4{words[0], words[1], words[2], words[3]});
}

// Waits for this thread's copies, all but those of the `PENDING` newest groups: behind a barrier they are there for everybody.
template <int PENDING = 0> DEVICE void finish_copies() {
    copy_async_wait<PENDING>();
    if constexpr (GROUP_PRODUCTS) publish_to_products();
}

// Starts to load rows `first` to `first + ROWS` (of `limit` there are) into a tile; rows and columns that are not there become
// zeros. All `THREADS` threads take part. The tile is whole behind `finish_copies` and a barrier.
template <u32 D, u32 ROWS, u32 THREADS>
DEVICE void load_tile(Tile<D> tile, HeadRows<const bf16> rows, u32 first, u32 limit) {
    constexpr u32 PIECES = Tile<D>::PIECES;
    static_assert(ROWS * PIECES % THREADS == 0 && THREADS % PIECES == 0, "a thread has one piece of every so many rows");
    const u32 piece = threadIdx.x % PIECES, own = threadIdx.x / PIECES;
    const bool in_head = piece * CHUNK < rows.head_dim;
    if (rows.aligned()) {
#pragma unroll 4
        for (u32 row = own; row < ROWS; row += THREADS / PIECES) {
            const bool present = in_head && first + row < limit;
            const bf16* from = rows.row(present ? first + row : 0) + (present ? piece * CHUNK : 0);
            copy_async_16(tile.piece(row, piece), from, present);
        }
        return;
    }
    const u32 length = in_head ? chunk_length(rows.head_dim, piece) : 0;
#pragma unroll 1
    for (u32 row = own; row < ROWS; row += THREADS / PIECES) {
        gather_piece(tile.piece(row, piece), rows.row(first + row) + piece * CHUNK, first + row < limit ? length : 0);
    }
}

// The A fragment of rows `row` to `row + 16` and terms `term` to `term + 16`.
template <u32 D> DEVICE void load_left(u32 (&to)[4], Tile<D> tile, u32 row, u32 term) {
    const u32 lane = lane_of_warp();
    load_matrices(to, tile.piece(row + lane % 16, term / CHUNK + lane / 16));
}

// The B fragments of two C tiles from a tile whose rows are C's columns: to[0..2] of columns `column` on, to[2..4] of those
// eight further on.
template <u32 D> DEVICE void load_right(u32 (&to)[4], Tile<D> tile, u32 column, u32 term) {
    const u32 lane = lane_of_warp();
    load_matrices(to, tile.piece(column + lane % 8 + lane / 16 * 8, term / CHUNK + lane / 8 % 2));
}

// The same from a tile whose rows are the product's terms.
template <u32 D> DEVICE void load_right_transposed(u32 (&to)[4], Tile<D> tile, u32 term, u32 column) {
    const u32 lane = lane_of_warp();
    load_matrices_transposed(to, tile.piece(term + lane % 16, column / CHUNK + lane / 16));
}

// c[m] += left · rightᵀ for `M` row fragments from row `row` on; right has `COLUMNS` rows, both are D wide. Terms are unrolled
// by two only: the addresses of all steps held at once do not fit beside the accumulators.
template <u32 M, u32 COLUMNS, u32 D>
DEVICE void multiply_transposed(Accumulators<COLUMNS> (&c)[M], Tile<D> left, u32 row, Tile<D> right) {
#pragma unroll 2
    for (u32 term = 0; term < D; term += FRAGMENT_TERMS) {
        u32 a[M][4];
#pragma unroll
        for (u32 m = 0; m < M; ++m) load_left(a[m], left, row + m * FRAGMENT_ROWS, term);
#pragma unroll
        for (u32 column = 0; column < COLUMNS; column += 2 * FRAGMENT_COLUMNS) {
            u32 b[4];
            load_right(b, right, column, term);
#pragma unroll
            for (u32 m = 0; m < M; ++m) {
                multiply_add(c[m][column / FRAGMENT_COLUMNS], a[m], b[0], b[1]);
                multiply_add(c[m][column / FRAGMENT_COLUMNS + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// c[m] += weights[m] · right; right has `TERMS` rows of D columns.
template <u32 M, u32 TERMS, u32 D>
DEVICE void multiply_weights(Accumulators<D> (&c)[M], const Weights<TERMS> (&weights)[M], Tile<D> right) {
#pragma unroll
    for (u32 term = 0; term < TERMS; term += FRAGMENT_TERMS) {
#pragma unroll
        for (u32 column = 0; column < D; column += 2 * FRAGMENT_COLUMNS) {
            u32 b[4];
            load_right_transposed(b, right, term, column);
#pragma unroll
            for (u32 m = 0; m < M; ++m) {
                multiply_add(c[m][column / FRAGMENT_COLUMNS], weights[m][term / FRAGMENT_TERMS], b[0], b[1]);
                multiply_add(c[m][column / FRAGMENT_COLUMNS + 1], weights[m][term / FRAGMENT_TERMS], b[2], b[3]);
            }
        }
    }
}

// The names by which group products know panels of shared memory (PTX ISA, "wgmma", matrix descriptors, swizzled by 128 bytes).
// `leading` is from the first 64 columns of a transposed operand to the next, `stride` from eight rows to the next.
DEVICE u64 describe(const u8* panel, u32 leading, u32 stride) {
    const u64 swizzled_by_128 = 1;
    return (shared_address(panel) >> 4) | static_cast<u64>(leading >> 4) << 16 | static_cast<u64>(stride >> 4) << 32 |
           swizzled_by_128 << 62;
}

// Starts c = left · rightᵀ for the 64 rows of a group from row `row` on; right has `COLUMNS` rows, both are D wide.
template <u32 COLUMNS, u32 D>
DEVICE void start_transposed(Accumulators<COLUMNS>& c, Tile<D> left, u32 row, Tile<D> right) {
    const u64 a = describe(left.panel(row), 0, Tile<D>::bytes(PANEL_ROWS));
    const u64 b = describe(right.memory, 0, Tile<D>::bytes(PANEL_ROWS));
#pragma unroll
    for (u32 term = 0; term < D; term += FRAGMENT_TERMS) {
        const u32 at = term / PANEL_COLUMNS * PANEL_BYTES + term % PANEL_COLUMNS * 2;
        multiply_group(c, a + (at >> 4), b + (at >> 4), term > 0);
    }
}

// Starts c += weights · right; right has `TERMS` rows of D columns.
template <u32 TERMS, u32 D>
DEVICE void start_weights(Accumulators<D>& c, const Weights<TERMS>& weights, Tile<D> right) {
    const u64 b = describe(right.memory, PANEL_BYTES, Tile<D>::bytes(PANEL_ROWS));
#pragma unroll
    for (u32 term = 0; term < TERMS; term += FRAGMENT_TERMS) {
        multiply_group(c, weights[term / FRAGMENT_TERMS], b + (Tile<D>::bytes(term) >> 4));
    }
}

// The order of a group's products for its row fragments, so that the tensor cores have work while weights are made. For each fragment,
// `start` begins the products that `weigh` turns into weights, and `add` begins those of the weights.
template <u32 FRAGMENTS, typename Start, typename Weigh, typename Add>
DEVICE void overlap_products(Start start, Weigh weigh, Add add) {
    begin_products();
#pragma unroll
    for (u32 m = 0; m < FRAGMENTS; ++m) {
        start(m);
        commit_products();
    }
#pragma unroll
    for (u32 m = 0; m < FRAGMENTS; ++m) {
        // Batches begun since this fragment's first: those of the fragments behind it, and the weights' of the ones before it.
        wait_for_products<FRAGMENTS - 1>();
        weigh(m);
        begin_products();
        add(m);
        commit_products();
    }
    wait_for_products<0>();
}

// Rounds C tiles to A fragments.
template <u32 COLUMNS> DEVICE void round_weights(const Accumulators<COLUMNS>& c, Weights<COLUMNS>& to) {
#pragma unroll
    for (u32 pair = 0; pair < COLUMNS / FRAGMENT_TERMS; ++pair) {
        to[pair][0] = pack_bf16(c[2 * pair][0], c[2 * pair][1]);
        to[pair][1] = pack_bf16(c[2 * pair][2], c[2 * pair][3]);
        to[pair][2] = pack_bf16(c[2 * pair + 1][0], c[2 * pair + 1][1]);
        to[pair][3] = pack_bf16(c[2 * pair + 1][2], c[2 * pair + 1][3]);
    }
}

template <u32 M, u32 COLUMNS> DEVICE void clear(Accumulators<COLUMNS> (&c)[M]) {
#pragma unroll
    for (u32 m = 0; m < M; ++m) {
#pragma unroll
        for (u32 n = 0; n < COLUMNS / FRAGMENT_COLUMNS; ++n) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
        }
    }
}

// Writes a warp's fragments, each row times its factor, through the warp's own rows of a tile to rows `first` on of global memory.
// Nobody reads the tile any more. factors[m][0] is that of row g, factors[m][1] of row g + 8.
template <typename Share, u32 D>
DEVICE void store_rows(const Accumulators<D> (&c)[Share::FRAGMENTS], const float (&factors)[Share::FRAGMENTS][2],
                       Tile<D> tile, HeadRows<bf16> to, u32 first, u32 limit) {
    constexpr u32 PIECES = Tile<D>::PIECES, M = Share::FRAGMENTS;
    const u32 lane = lane_of_warp();
    if constexpr (Share::GROUPED) {
        sync_block();
    } else {
        sync_warp();
    }
#pragma unroll
    for (u32 m = 0; m < M; ++m) {
        const u32 row = Share::fragment(m);
#pragma unroll
        for (u32 n = 0; n < D / FRAGMENT_COLUMNS; ++n) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                u8* at = tile.piece(row + half * 8 + lane / 4, n) + lane % 4 * 4;
                const float factor = factors[m][half];
                *reinterpret_cast<u32*>(at) = pack_bf16(c[m][n][2 * half] * factor, c[m][n][2 * half + 1] * factor);
            }
        }
    }
    sync_warp();
    const bool aligned = to.aligned();
    for (u32 index = lane; index < M * FRAGMENT_ROWS * PIECES; index += WARP) {
        const u32 number = index / PIECES, piece = index % PIECES;
        const u32 line = Share::fragment(number / FRAGMENT_ROWS) + number % FRAGMENT_ROWS;
        if (first + line >= limit || piece * CHUNK >= to.head_dim) continue;
        const u8* from = tile.piece(line, piece);
        bf16* at = to.row(first + line) + piece * CHUNK;
        if (aligned) {
            store_words(at, *reinterpret_cast<const u32x4*>(from));
        } else {
            const u32 length = chunk_length(to.head_dim, piece);
#pragma unroll 1
            for (u32 i = 0; i < length; ++i) at[i] = reinterpret_cast<const bf16*>(from)[i];
        }
    }
}
