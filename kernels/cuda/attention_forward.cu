// Causal attention with grouped heads, forward: streaming softmax over tiles of keys (Dao 2023, arXiv 2307.08691, algorithm 1).
//
// A block of threads has 128 queries of one head, each warp 32 of them: two row fragments, so that what a warp reads of keys and
// values from shared memory serves twice. Tiles of 64 keys and values pass through shared memory; the values of a tile arrive
// while its scores are made, the next keys meanwhile and while values are used. Scores, weights and sums stay in registers; sums
// are f32, weights are rounded to bf16 for their product with the values.
//
// Where the four warps multiply as a group, the products of one fragment run while the other's weights are made.

#include "attention.cuh"

// Running maximum and sum of the scores of two rows for each row fragment: rows g and g + 8. A lane's sum is that of its own
// columns until the end.
template <u32 M> struct Running {
    float largest[M][2];
    float sum[M][2];
};

// Scores of a row fragment that a query must not see become minus infinity. `query` and `key` are the first of the fragment's and
// of the tile's.
template <u32 KEYS> DEVICE void mask_scores(Accumulators<KEYS>& scores, u32 query, u32 key) {
    const u32 lane = lane_of_warp();
#pragma unroll
    for (u32 n = 0; n < KEYS / FRAGMENT_COLUMNS; ++n) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 row = query + i / 2 * 8 + lane / 4;
            const u32 column = key + n * FRAGMENT_COLUMNS + lane % 4 * 2 + i % 2;
            if (column > row) scores[n][i] = -INFINITE;
        }
    }
}

// Turns one row fragment's scores into weights against the new maximum, and rescales what came before. Key 0, which every query
// sees, is in the first tile: so a maximum is never that of nothing.
template <u32 KEYS, u32 D>
DEVICE void weigh_rows(Accumulators<KEYS>& scores, Accumulators<D>& sums, float (&largest)[2], float (&sum)[2],
                       float scale_log2) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        float now = largest[half];
#pragma unroll
        for (u32 n = 0; n < KEYS / FRAGMENT_COLUMNS; ++n) {
            now = fmaxf(now, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
        }
        now = fmaxf(now, shuffle_xor(now, 1));
        now = fmaxf(now, shuffle_xor(now, 2));
        const float factor = exp2_fast((largest[half] - now) * scale_log2);
        const float shift = now * scale_log2;
        largest[half] = now;
        float added = 0.0f;
#pragma unroll
        for (u32 n = 0; n < KEYS / FRAGMENT_COLUMNS; ++n) {
#pragma unroll
            for (u32 i = 2 * half; i < 2 * half + 2; ++i) {
                scores[n][i] = exp2_fast(fused(scores[n][i], scale_log2, -shift));
                added += scores[n][i];
            }
        }
        sum[half] = fused(sum[half], factor, added);
#pragma unroll
        for (u32 n = 0; n < D / FRAGMENT_COLUMNS; ++n) {
            sums[n][2 * half] *= factor;
            sums[n][2 * half + 1] *= factor;
        }
    }
}

// The same with the mask and the rounding: from one row fragment's scores against the tile from key `key` on.
template <u32 KEYS, u32 D>
DEVICE void weigh(Accumulators<KEYS>& scores, Weights<KEYS>& weights, Accumulators<D>& sums, float (&largest)[2],
                  float (&sum)[2], u32 query, u32 key, float scale_log2) {
    if (key + KEYS > query + 1) mask_scores<KEYS>(scores, query, key);
    weigh_rows<KEYS, D>(scores, sums, largest, sum, scale_log2);
    round_weights<KEYS>(scores, weights);
}

// The whole rows' sums, the factors that make means of the sums of values, and the log-sum-exp. `query` is the first of the
// block's.
template <u32 D, typename T>
DEVICE void finish(Running<T::FRAGMENTS>& running, float (&factors)[T::FRAGMENTS][2], float* log_sum_exp, u32 query,
                   const AttentionShape& shape) {
    const u32 lane = lane_of_warp();
#pragma unroll
    for (u32 m = 0; m < T::FRAGMENTS; ++m) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            float sum = running.sum[m][half];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            factors[m][half] = 1.0f / sum;
            const u32 row = query + Share<D, T>::fragment(m) + half * 8 + lane / 4;
            if (lane % 4 == 0 && row < shape.context) {
                log_sum_exp[row] = fused(running.largest[m][half], shape.scale, logf(sum));
            }
        }
    }
}

// One tile's share of the sums of values. `values_come` makes the values be there; `first_query` and `key` are the first of the
// block's and of the tile's.
template <u32 D, typename T, typename F>
DEVICE void add_tile(Accumulators<D> (&sums)[T::FRAGMENTS], Running<T::FRAGMENTS>& running, Tile<D> queries, Tile<D> keys,
                     Tile<D> values, u32 first_query, u32 key, float scale_log2, F values_come) {
    constexpr u32 M = T::FRAGMENTS, KEYS = T::OTHERS;
    using Own = Share<D, T>;
    Accumulators<KEYS> scores[M];
    Weights<KEYS> weights[M];
    if constexpr (Own::GROUPED) {
        static_assert(T::WARPS == Own::WARPS, "all warps see every tile");
        overlap_products<M>(
            [&](u32 m) { start_transposed<KEYS, D>(scores[m], queries, m * Own::STEP, keys); },
            [&](u32 m) {
                hold_in_place(scores[m]);
                weigh<KEYS, D>(scores[m], weights[m], sums[m], running.largest[m], running.sum[m],
                               first_query + Own::fragment(m), key, scale_log2);
                if (m == 0) values_come();
                hold_in_place(sums[m]);
                hold_in_place(weights[m]);
            },
            [&](u32 m) { start_weights<KEYS, D>(sums[m], weights[m], values); });
#pragma unroll
        for (u32 m = 0; m < M; ++m) {
            hold_in_place(sums[m]);
            hold_in_place(weights[m]);
        }
    } else {
        const bool sees = key < first_query + Own::first() + Own::ROWS;
        if (sees) {
            clear<M, KEYS>(scores);
            multiply_transposed<M, KEYS, D>(scores, queries, Own::first(), keys);
#pragma unroll
            for (u32 m = 0; m < M; ++m) {
                weigh<KEYS, D>(scores[m], weights[m], sums[m], running.largest[m], running.sum[m],
                               first_query + Own::fragment(m), key, scale_log2);
            }
        }
        values_come();
        if (sees) multiply_weights<M, KEYS, D>(sums, weights, values);
    }
}

template <u32 D>
DEVICE void attention(const bf16* qkv, bf16* out, float* log_sum_exp, const AttentionShape& shape) {
    using T = typename Tilings<D>::Forward;
    constexpr u32 M = T::FRAGMENTS, KEYS = T::OTHERS;
    DYNAMIC_TILES(dynamic);
    const Tile<D> queries = {dynamic};
    const Tile<D> values = {queries.memory + Tile<D>::bytes(T::OWN)};
    // Two, in turn: one arrives while the other is used.
    const auto keys = [&](u32 key) -> Tile<D> {
        return {values.memory + Tile<D>::bytes(KEYS) + key / KEYS % 2 * Tile<D>::bytes(KEYS)};
    };

    // The last queries see most keys: they begin first.
    const u32 first_query = (gridDim.x - 1 - blockIdx.x) * T::OWN;
    const u32 head = blockIdx.y, sequence = blockIdx.z, kv_head = head / shape.group();
    const HeadRows<const bf16> key_rows = shape.keys(qkv, sequence, kv_head);
    const HeadRows<const bf16> value_rows = shape.values(qkv, sequence, kv_head);
    const u32 seen = first_query + T::OWN < shape.context ? first_query + T::OWN : shape.context;

    load_tile<D, T::OWN, T::THREADS>(queries, shape.queries(qkv, sequence, head), first_query, shape.context);
    load_tile<D, KEYS, T::THREADS>(keys(0), key_rows, 0, shape.context);
    copy_async_commit();

    Accumulators<D> sums[M];
    clear<M, D>(sums);
    Running<M> running;
#pragma unroll
    for (u32 m = 0; m < M; ++m) {
        running.largest[m][0] = running.largest[m][1] = -INFINITE;
        running.sum[m][0] = running.sum[m][1] = 0.0f;
    }
    for (u32 key = 0; key < seen; key += KEYS) {
        // The keys are here, and everybody is done with the tiles before, whose places are taken now.
        finish_copies();
        sync_block();
        load_tile<D, KEYS, T::THREADS>(values, value_rows, key, shape.context);
        copy_async_commit();
        if (key + KEYS < seen) load_tile<D, KEYS, T::THREADS>(keys(key + KEYS), key_rows, key + KEYS, shape.context);
        copy_async_commit();
        add_tile<D, T>(sums, running, queries, keys(key), values, first_query, key, shape.scale * LOG2_E, [] {
            finish_copies<1>();
            sync_block();
        });
    }
    float factors[M][2];
    finish<D, T>(running, factors, log_sum_exp + shape.statistics(sequence, head), first_query, shape);
    store_rows<Share<D, T>, D>(sums, factors, queries, shape.outputs(out, sequence, head), first_query, shape.context);
}

KERNEL(attention_32, 128, 2)(const bf16* qkv, bf16* out, float* log_sum_exp, u32 context, u32 heads, u32 kv_heads,
                             u32 head_dim, float scale) {
    attention<32>(qkv, out, log_sum_exp, {context, heads, kv_heads, head_dim, scale});
}

KERNEL(attention_64, 128, GROUP_PRODUCTS ? 3 : 2)(const bf16* qkv, bf16* out, float* log_sum_exp, u32 context,
                                                  u32 heads, u32 kv_heads, u32 head_dim, float scale) {
    attention<64>(qkv, out, log_sum_exp, {context, heads, kv_heads, head_dim, scale});
}

KERNEL(attention_128, 128, 2)(const bf16* qkv, bf16* out, float* log_sum_exp, u32 context, u32 heads, u32 kv_heads,
                              u32 head_dim, float scale) {
    attention<128>(qkv, out, log_sum_exp, {context, heads, kv_heads, head_dim, scale});
}
