// Gradient of causal attention with grouped heads (Dao 2023, arXiv 2307.08691, algorithm 2), in two passes that make the scores
// anew: one by keys, one by queries. A single pass would have to add to gradients that other blocks of threads add to, in
// whatever order they come; two passes cost seven products where one costs five, and need no atomics (DET-2).
//
// With P the weights, dO the output's gradient and delta the rows' dot product of O and dO:
//   dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - delta),  dQ = scale · dS K,  dK = scale · dSᵀ Q.
// Keys and values of a group are read by several query heads. Each of these has a block of threads of its own, or a model with few
// key heads would keep few of a device's multiprocessors busy; a kernel of its own then adds a group's gradients in order.

#include "attention.cuh"

// Lanes for each token and head: one for each chunk of the longest head. Eight where they are enough. `delta_tokens` in
// `kernels/src/cuda/table/launches.rs` has the same rule.
DEVICE u32 delta_lanes(u32 head_dim) { return head_dim <= 8 * CHUNK ? 8 : 16; }

// Some lanes of a warp for each token and head.
KERNEL(attention_delta, 256, 1)(const bf16* out, const bf16* out_gradient, float* delta, u32 context, u32 heads,
                                u32 head_dim) {
    const u32 lanes = delta_lanes(head_dim), chunk = threadIdx.x % lanes;
    const u32 token = blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes, head = blockIdx.y, sequence = blockIdx.z;
    const AttentionShape shape = {context, heads, heads, head_dim, 1.0f};
    float dot = 0.0f;
    if (token < context && chunk < chunks_of(head_dim)) {
        const u32 length = chunk_length(head_dim, chunk);
        float value[CHUNK], slope[CHUNK];
        load_chunk(shape.outputs(out, sequence, head).row(token) + chunk * CHUNK, length, value);
        load_chunk(shape.outputs(out_gradient, sequence, head).row(token) + chunk * CHUNK, length, slope);
#pragma unroll
        for (u32 i = 0; i < CHUNK; ++i) dot = fused(value[i], slope[i], dot);
    }
    for (u32 distance = lanes / 2; distance > 0; distance /= 2) dot += shuffle_xor(dot, distance);
    if (token < context && chunk == 0) delta[shape.statistics(sequence, head) + token] = dot;
}

// Rows of a passing tile that are multiplied at once, where each fragment of a warp has `sums` registers of sums: scores and slopes
// of all fragments must fit beside these, and without groups fragments of the operands and their addresses, too.
template <typename Own> DEVICE constexpr u32 part_of(u32 others, u32 sums) {
    return Own::GROUPED && Own::FRAGMENTS * (sums + others) <= 192 ? others : 32;
}

// scores = rows · columnsᵀ and slopes = slope_rows · slope_columnsᵀ, for a warp's own rows.
template <typename Own, u32 COLUMNS, u32 D>
DEVICE void multiply_both(Accumulators<COLUMNS> (&scores)[Own::FRAGMENTS], Tile<D> rows, Tile<D> columns,
                          Accumulators<COLUMNS> (&slopes)[Own::FRAGMENTS], Tile<D> slope_rows, Tile<D> slope_columns) {
    constexpr u32 M = Own::FRAGMENTS;
    clear<M, COLUMNS>(scores);
    multiply_transposed<M, COLUMNS, D>(scores, rows, Own::first(), columns);
    clear<M, COLUMNS>(slopes);
    multiply_transposed<M, COLUMNS, D>(slopes, slope_rows, Own::first(), slope_columns);
}

// A passing tile of queries with the gradients of their outputs and both statistics.
template <u32 D> struct QueryTile {
    Tile<D> queries, slopes;
    // In units of ln 2.
    float* log_sum_exp;
    float* delta;

    // The same from row `row` on.
    DEVICE QueryTile from(u32 row) const {
        return {{queries.panel(row)}, {slopes.panel(row)}, log_sum_exp + row, delta + row};
    }
};

// Starts to load a tile of queries of one head, from token `query` on. A query that is not there has weight 2^(0 - inf) = 0
// everywhere.
template <u32 D, u32 QUERIES, u32 THREADS>
DEVICE void load_queries(QueryTile<D> to, const bf16* qkv, const bf16* out_gradient, const float* log_sum_exp,
                         const float* delta, const AttentionShape& shape, u32 head, u32 query) {
    const u32 sequence = blockIdx.z;
    load_tile<D, QUERIES, THREADS>(to.queries, shape.queries(qkv, sequence, head), query, shape.context);
    load_tile<D, QUERIES, THREADS>(to.slopes, shape.outputs(out_gradient, sequence, head), query, shape.context);
    static_assert(QUERIES <= THREADS);
    const u32 token = query + threadIdx.x;
    if (threadIdx.x < QUERIES) {
        const u64 at = shape.statistics(sequence, head) + token;
        const bool there = token < shape.context;
        to.log_sum_exp[threadIdx.x] = there ? log_sum_exp[at] * LOG2_E : INFINITE;
        to.delta[threadIdx.x] = there ? delta[at] : 0.0f;
    }
}

// From one fragment's scores and slopes, [keys, queries], to the weights P and their gradient dS, in place. `key` and `query` are
// the first of the fragment's and of the tile's.
template <u32 QUERIES>
DEVICE void weigh_keys(Accumulators<QUERIES>& scores, Accumulators<QUERIES>& slopes, const float* log_sum_exp,
                       const float* delta, u32 key, u32 query, bool masked, float scale_log2) {
    const u32 lane = lane_of_warp();
#pragma unroll
    for (u32 n = 0; n < QUERIES / FRAGMENT_COLUMNS; ++n) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 row = key + i / 2 * 8 + lane / 4, column = n * FRAGMENT_COLUMNS + lane % 4 * 2 + i % 2;
            const float weight = exp2_fast(fused(scores[n][i], scale_log2, -log_sum_exp[column]));
            scores[n][i] = masked && row > query + column ? 0.0f : weight;
            slopes[n][i] = scores[n][i] * (slopes[n][i] - delta[column]);
        }
    }
}

// One warp's share of some queries, from query `query` on; `first_key` is the first of the block's.
template <u32 D, u32 QUERIES>
DEVICE void add_queries(Accumulators<D> (&key_sums)[Tilings<D>::Keys::FRAGMENTS],
                        Accumulators<D> (&value_sums)[Tilings<D>::Keys::FRAGMENTS], Tile<D> keys, Tile<D> values,
                        QueryTile<D> tile, u32 first_key, u32 query, float scale_log2) {
    using Own = Share<D, typename Tilings<D>::Keys>;
    constexpr u32 M = Own::FRAGMENTS;
    Accumulators<QUERIES> scores[M], slopes[M];
    Weights<QUERIES> weights[M], weight_slopes[M];
    const bool masked = first_key + Own::fragment(M - 1) + FRAGMENT_ROWS > query + 1;
    const auto weigh = [&](u32 m) {
        weigh_keys<QUERIES>(scores[m], slopes[m], tile.log_sum_exp, tile.delta, first_key + Own::fragment(m), query, masked,
                            scale_log2);
        round_weights<QUERIES>(scores[m], weights[m]);
        round_weights<QUERIES>(slopes[m], weight_slopes[m]);
    };
    if constexpr (Own::GROUPED) {
        const auto hold = [&](u32 m) {
            hold_in_place(value_sums[m]);
            hold_in_place(key_sums[m]);
            hold_in_place(weights[m]);
            hold_in_place(weight_slopes[m]);
        };
        overlap_products<M>(
            [&](u32 m) {
                const u32 row = Own::first() + m * Own::STEP;
                start_transposed<QUERIES, D>(scores[m], keys, row, tile.queries);
                start_transposed<QUERIES, D>(slopes[m], values, row, tile.slopes);
            },
            [&](u32 m) {
                hold_in_place(scores[m]);
                hold_in_place(slopes[m]);
                weigh(m);
                hold(m);
            },
            [&](u32 m) {
                start_weights<QUERIES, D>(value_sums[m], weights[m], tile.slopes);
                start_weights<QUERIES, D>(key_sums[m], weight_slopes[m], tile.queries);
            });
#pragma unroll
        for (u32 m = 0; m < M; ++m) hold(m);
    } else {
        multiply_both<Own, QUERIES, D>(scores, keys, tile.queries, slopes, values, tile.slopes);
#pragma unroll
        for (u32 m = 0; m < M; ++m) weigh(m);
        multiply_weights<M, QUERIES, D>(value_sums, weights, tile.slopes);
        multiply_weights<M, QUERIES, D>(key_sums, weight_slopes, tile.queries);
    }
}

// Gradients of a block of keys and values, over all queries of one head that see them: to the columns of keys and values, or where
// other heads read the same ones, to this head's columns of `gradient`, rows of [keys of all query heads | values of all].
template <u32 D>
DEVICE void attention_keys(const bf16* qkv, const bf16* out_gradient, const float* log_sum_exp, const float* delta,
                           bf16* gradient, const AttentionShape& shape) {
    using T = typename Tilings<D>::Keys;
    using Own = Share<D, T>;
    constexpr u32 M = T::FRAGMENTS, QUERIES = T::OTHERS, PART = part_of<Own>(QUERIES, D);
    DYNAMIC_TILES(dynamic);
    const Tile<D> keys = {dynamic};
    const Tile<D> values = {keys.memory + Tile<D>::bytes(T::OWN)};
    u8* passing = values.memory + Tile<D>::bytes(T::OWN);
    float* statistics = reinterpret_cast<float*>(passing + Tile<D>::bytes(4 * QUERIES));
    // Two, in turn: one arrives while the other is used.
    const auto tile = [&](u32 index) -> QueryTile<D> {
        u8* from = passing + index % 2 * Tile<D>::bytes(2 * QUERIES);
        float* numbers = statistics + index % 2 * (2 * QUERIES);
        return {{from}, {from + Tile<D>::bytes(QUERIES)}, numbers, numbers + QUERIES};
    };

    // The first keys are seen by most queries: they begin first, as they come.
    const u32 first_key = blockIdx.x * T::OWN, head = blockIdx.y, kv_head = head / shape.group(), sequence = blockIdx.z;
    const auto start = [&](u32 index, u32 query) {
        load_queries<D, QUERIES, T::THREADS>(tile(index), qkv, out_gradient, log_sum_exp, delta, shape, head, query);
    };
    load_tile<D, T::OWN, T::THREADS>(keys, shape.keys(qkv, sequence, kv_head), first_key, shape.context);
    load_tile<D, T::OWN, T::THREADS>(values, shape.values(qkv, sequence, kv_head), first_key, shape.context);
    start(first_key / QUERIES, first_key);
    copy_async_commit();

    Accumulators<D> key_sums[M], value_sums[M];
    clear<M, D>(key_sums);
    clear<M, D>(value_sums);
    // From the first query that sees one of these keys to the last.
    for (u32 query = first_key; query < shape.context; query += QUERIES) {
        const u32 index = query / QUERIES;
        finish_copies();
        // Everybody's part of this tile is here, and everybody is done with the one before, whose place is taken now.
        sync_block();
        if (query + QUERIES < shape.context) start(index + 1, query + QUERIES);
        copy_async_commit();
#pragma unroll 1
        for (u32 part = 0; part < QUERIES; part += PART) {
            if (first_key + Own::first() >= query + part + PART) continue;
            add_queries<D, PART>(key_sums, value_sums, keys, values, tile(index).from(part), first_key, query + part,
                                 shape.scale * LOG2_E);
        }
    }
    float factors[M][2], ones[M][2];
#pragma unroll
    for (u32 m = 0; m < M; ++m) {
        factors[m][0] = factors[m][1] = shape.scale;
        ones[m][0] = ones[m][1] = 1.0f;
    }
    const AttentionShape to = shape.group() == 1 ? shape : shape.of_key_heads(shape.heads);
    store_rows<Own, D>(key_sums, factors, keys, to.keys(gradient, sequence, head), first_key, shape.context);
    store_rows<Own, D>(value_sums, ones, values, to.values(gradient, sequence, head), first_key, shape.context);
}

// Sums of the gradients that a group's query heads made for its keys and values, in the heads' order. One block of threads for each
// row of tokens.
KERNEL(attention_group_sums, 256, 1)(const bf16* of_heads, bf16* qkv_gradient, u32 heads, u32 kv_heads, u32 head_dim) {
    const AttentionShape shape = {1, heads, kv_heads, head_dim, 1.0f}, from = shape.of_key_heads(heads);
    const u32 chunks = chunks_of(head_dim), group = shape.group();
    const bf16* row = of_heads + static_cast<u64>(blockIdx.x) * from.qkv_stride();
    bf16* to = qkv_gradient + static_cast<u64>(blockIdx.x) * shape.qkv_stride() + shape.out_stride();
    // Keys' heads, then values': both rows have them in this order.
    for (u32 index = threadIdx.x; index < 2 * kv_heads * chunks; index += blockDim.x) {
        const u32 kv_head = index / chunks, chunk = index % chunks, length = chunk_length(head_dim, chunk);
        float sum[CHUNK] = {};
        for (u32 head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            float term[CHUNK];
            load_chunk(row + head * head_dim + chunk * CHUNK, length, term);
#pragma unroll
            for (u32 i = 0; i < CHUNK; ++i) sum[i] += term[i];
        }
        store_chunk(to + kv_head * head_dim + chunk * CHUNK, length, sum);
    }
}

// A row fragment's statistics: rows g and g + 8.
template <u32 M> struct RowStatistics {
    // In units of ln 2.
    float log_sum_exp[M][2];
    float delta[M][2];
};

template <typename Own>
DEVICE RowStatistics<Own::FRAGMENTS> load_statistics(const float* log_sum_exp, const float* delta, u64 from, u32 query,
                                                     u32 context) {
    RowStatistics<Own::FRAGMENTS> rows;
#pragma unroll
    for (u32 m = 0; m < Own::FRAGMENTS; ++m) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 row = query + Own::fragment(m) + half * 8 + lane_of_warp() / 4;
            const bool there = row < context;
            rows.log_sum_exp[m][half] = there ? log_sum_exp[from + row] * LOG2_E : INFINITE;
            rows.delta[m][half] = there ? delta[from + row] : 0.0f;
        }
    }
    return rows;
}

// From one fragment's scores and slopes, [queries, keys], to the gradient dS of the weights, in the place of the slopes. `query` and
// `key` are the first of the fragment's and of the tile's.
template <u32 KEYS>
DEVICE void weigh_queries(const Accumulators<KEYS>& scores, Accumulators<KEYS>& slopes, const float (&log_sum_exp)[2],
                          const float (&delta)[2], u32 query, u32 key, bool masked, float scale_log2) {
    const u32 lane = lane_of_warp();
#pragma unroll
    for (u32 n = 0; n < KEYS / FRAGMENT_COLUMNS; ++n) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 row = query + i / 2 * 8 + lane / 4;
            const u32 column = key + n * FRAGMENT_COLUMNS + lane % 4 * 2 + i % 2;
            const float exponent = fused(scores[n][i], scale_log2, -log_sum_exp[i / 2]);
            const float weight = masked && column > row ? 0.0f : exp2_fast(exponent);
            slopes[n][i] = weight * (slopes[n][i] - delta[i / 2]);
        }
    }
}

// One warp's share of some keys, from key `key` on; `first_query` is the first of the block's.
template <u32 D, u32 KEYS>
DEVICE void add_keys(Accumulators<D> (&sums)[Tilings<D>::Queries::FRAGMENTS],
                     const RowStatistics<Tilings<D>::Queries::FRAGMENTS>& rows, Tile<D> queries, Tile<D> out_slopes,
                     Tile<D> keys, Tile<D> values, u32 first_query, u32 key, float scale_log2) {
    using Own = Share<D, typename Tilings<D>::Queries>;
    constexpr u32 M = Own::FRAGMENTS;
    Accumulators<KEYS> scores[M], slopes[M];
    Weights<KEYS> weights[M];
    const auto weigh = [&](u32 m) {
        const u32 query = first_query + Own::fragment(m);
        const bool masked = key + KEYS > query + 1;
        weigh_queries<KEYS>(scores[m], slopes[m], rows.log_sum_exp[m], rows.delta[m], query, key, masked, scale_log2);
        round_weights<KEYS>(slopes[m], weights[m]);
    };
    if constexpr (Own::GROUPED) {
        const auto hold = [&](u32 m) {
            hold_in_place(sums[m]);
            hold_in_place(weights[m]);
        };
        overlap_products<M>(
            [&](u32 m) {
                const u32 row = Own::first() + m * Own::STEP;
                start_transposed<KEYS, D>(scores[m], queries, row, keys);
                start_transposed<KEYS, D>(slopes[m], out_slopes, row, values);
            },
            [&](u32 m) {
                hold_in_place(scores[m]);
                hold_in_place(slopes[m]);
                weigh(m);
                hold(m);
            },
            [&](u32 m) { start_weights<KEYS, D>(sums[m], weights[m], keys); });
#pragma unroll
        for (u32 m = 0; m < M; ++m) hold(m);
    } else {
        multiply_both<Own, KEYS, D>(scores, queries, keys, slopes, out_slopes, values);
#pragma unroll
        for (u32 m = 0; m < M; ++m) weigh(m);
        multiply_weights<M, KEYS, D>(sums, weights, keys);
    }
}

// Gradients of a block of queries, over all keys that they see.
template <u32 D>
DEVICE void attention_queries(const bf16* qkv, const bf16* out_gradient, const float* log_sum_exp, const float* delta,
                              bf16* qkv_gradient, const AttentionShape& shape) {
    using T = typename Tilings<D>::Queries;
    using Own = Share<D, T>;
    constexpr u32 M = T::FRAGMENTS, KEYS = T::OTHERS, PART = part_of<Own>(KEYS, D / 2);
    DYNAMIC_TILES(dynamic);
    const Tile<D> queries = {dynamic};
    const Tile<D> out_slopes = {queries.memory + Tile<D>::bytes(T::OWN)};
    u8* passing = out_slopes.memory + Tile<D>::bytes(T::OWN);
    const auto keys = [&](u32 index) -> Tile<D> { return {passing + index % 2 * Tile<D>::bytes(2 * KEYS)}; };
    const auto values = [&](u32 index) -> Tile<D> { return {keys(index).memory + Tile<D>::bytes(KEYS)}; };

    const u32 first_query = (gridDim.x - 1 - blockIdx.x) * T::OWN;
    const u32 head = blockIdx.y, sequence = blockIdx.z, kv_head = head / shape.group();
    const u32 seen = first_query + T::OWN < shape.context ? first_query + T::OWN : shape.context;
    const u32 all = (seen + KEYS - 1) / KEYS;
    const auto start = [&](u32 index) {
        load_tile<D, KEYS, T::THREADS>(keys(index), shape.keys(qkv, sequence, kv_head), index * KEYS, shape.context);
        load_tile<D, KEYS, T::THREADS>(values(index), shape.values(qkv, sequence, kv_head), index * KEYS, shape.context);
    };
    load_tile<D, T::OWN, T::THREADS>(queries, shape.queries(qkv, sequence, head), first_query, shape.context);
    load_tile<D, T::OWN, T::THREADS>(out_slopes, shape.outputs(out_gradient, sequence, head), first_query, shape.context);
    start(0);
    copy_async_commit();

    const RowStatistics<M> rows =
        load_statistics<Own>(log_sum_exp, delta, shape.statistics(sequence, head), first_query, shape.context);
    Accumulators<D> sums[M];
    clear<M, D>(sums);
    for (u32 index = 0; index < all; ++index) {
        finish_copies();
        sync_block();
        if (index + 1 < all) start(index + 1);
        copy_async_commit();
#pragma unroll 1
        for (u32 part = 0; part < KEYS; part += PART) {
            if (index * KEYS + part >= first_query + Own::first() + Own::ROWS) break;
            add_keys<D, PART>(sums, rows, queries, out_slopes, {keys(index).panel(part)}, {values(index).panel(part)},
                              first_query, index * KEYS + part, shape.scale * LOG2_E);
        }
    }
    float factors[M][2];
#pragma unroll
    for (u32 m = 0; m < M; ++m) factors[m][0] = factors[m][1] = shape.scale;
    store_rows<Own, D>(sums, factors, queries, shape.queries(qkv_gradient, sequence, head), first_query, shape.context);
}

KERNEL(attention_keys_32, 128, 2)(const bf16* qkv, const bf16* out_gradient, const float* log_sum_exp, const float* delta,
                                  bf16* gradient, u32 context, u32 heads, u32 kv_heads, u32 head_dim, float scale) {
    attention_keys<32>(qkv, out_gradient, log_sum_exp, delta, gradient, {context, heads, kv_heads, head_dim, scale});
}

KERNEL(attention_keys_64, 128, 2)(const bf16* qkv, const bf16* out_gradient, const float* log_sum_exp, const float* delta,
                                  bf16* gradient, u32 context, u32 heads, u32 kv_heads, u32 head_dim, float scale) {
    attention_keys<64>(qkv, out_gradient, log_sum_exp, delta, gradient, {context, heads, kv_heads, head_dim, scale});
}

KERNEL(attention_keys_128, 256, 1)(const bf16* qkv, const bf16* out_gradient, const float* log_sum_exp, const float* delta,
                                   bf16* gradient, u32 context, u32 heads, u32 kv_heads, u32 head_dim, float scale) {
    attention_keys<128>(qkv, out_gradient, log_sum_exp, delta, gradient, {context, heads, kv_heads, head_dim, scale});
}

KERNEL(attention_queries_32, 128, 2)(const bf16* qkv, const bf16* out_gradient, const float* log_sum_exp,
                                     const float* delta, bf16* qkv_gradient, u32 context, u32 heads, u32 kv_heads,
                                     u32 head_dim, float scale) {
    attention_queries<32>(qkv, out_gradient, log_sum_exp, delta, qkv_gradient, {context, heads, kv_heads, head_dim, scale});
}

KERNEL(attention_queries_64, 128, 2)(const bf16* qkv, const bf16* out_gradient, const float* log_sum_exp,
                                     const float* delta, bf16* qkv_gradient, u32 context, u32 heads, u32 kv_heads,
                                     u32 head_dim, float scale) {
    attention_queries<64>(qkv, out_gradient, log_sum_exp, delta, qkv_gradient, {context, heads, kv_heads, head_dim, scale});
}

KERNEL(attention_queries_128, 128, 2)(const bf16* qkv, const bf16* out_gradient, const float* log_sum_exp,
                                      const float* delta, bf16* qkv_gradient, u32 context, u32 heads, u32 kv_heads,
                                      u32 head_dim, float scale) {
    attention_queries<128>(qkv, out_gradient, log_sum_exp, delta, qkv_gradient, {context, heads, kv_heads, head_dim, scale});
}
