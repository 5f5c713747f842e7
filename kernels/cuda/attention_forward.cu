// Causal attention with grouped heads, forward: streaming softmax over tiles of keys (Dao 2023, arXiv 2307.08691, algorithm 1).
//
// A block of threads has 128 queries of one head, each warp 32 of them: two row fragments, so that what a warp reads of keys and
// values from shared memory serves twice. Tiles of 64 keys and values pass through shared memory; the next keys arrive while
// values are used, the values while scores are made. Scores, weights and sums stay in registers; sums are f32, weights are
// rounded to bf16 for their product with the values.

#include "attention.cuh"

// Running maximum and sum of the scores of two rows for each row fragment: rows g and g + 8. A lane's sum is that of its own
// columns until the end.
template <u32 M> struct Running {
    float largest[M][2];
    float sum[M][2];
};

// Scores that a query must not see become minus infinity. `query` and `key` are the first of the warp's and of the tile's.
template <u32 M, u32 KEYS> DEVICE void mask_scores(Accumulators<KEYS> (&scores)[M], u32 query, u32 key) {
    const u32 lane = lane_of_warp();
#pragma unroll
    for (u32 m = 0; m < M; ++m) {
#pragma unroll
        for (u32 n = 0; n < KEYS / FRAGMENT_COLUMNS; ++n) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 row = query + m * FRAGMENT_ROWS + i / 2 * 8 + lane / 4;
                const u32 column = key + n * FRAGMENT_COLUMNS + lane % 4 * 2 + i % 2;
                if (column > row) scores[m][n][i] = -INFINITE;
            }
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

// The whole rows' sums, the factors that make means of the sums of values, and the log-sum-exp.
template <u32 M>
DEVICE void finish(Running<M>& running, float (&factors)[M][2], float* log_sum_exp, u32 query, const AttentionShape& shape) {
    const u32 lane = lane_of_warp();
#pragma unroll
    for (u32 m = 0; m < M; ++m) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            float sum = running.sum[m][half];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            factors[m][half] = 1.0f / sum;
            const u32 row = query + m * FRAGMENT_ROWS + half * 8 + lane / 4;
            if (lane % 4 == 0 && row < shape.context) {
                log_sum_exp[row] = fused(running.largest[m][half], shape.scale, logf(sum));
            }
        }
    }
}

template <u32 D>
DEVICE void attention(const bf16* qkv, bf16* out, float* log_sum_exp, const AttentionShape& shape) {
    using T = typename Tilings<D>::Forward;
    constexpr u32 M = T::FRAGMENTS, KEYS = T::OTHERS;
    DYNAMIC_SHARED(dynamic);
    const Tile<D> queries = {dynamic};
    const Tile<D> keys = {queries.memory + Tile<D>::bytes(T::OWN)};
    const Tile<D> values = {keys.memory + Tile<D>::bytes(KEYS)};

    // The last queries see most keys: they begin first.
    const u32 first_query = (gridDim.x - 1 - blockIdx.x) * T::OWN;
    const u32 head = blockIdx.y, sequence = blockIdx.z, kv_head = head / shape.group();
    const u32 own = warp_of_block() * T::WARP_OWN, query = first_query + own;
    const HeadRows<const bf16> key_rows = shape.keys(qkv, sequence, kv_head);
    const HeadRows<const bf16> value_rows = shape.values(qkv, sequence, kv_head);
    const u32 seen = first_query + T::OWN < shape.context ? first_query + T::OWN : shape.context;
    const float scale_log2 = shape.scale * LOG2_E;

    load_tile<D, T::OWN, T::THREADS>(queries, shape.queries(qkv, sequence, head), first_query, shape.context);
    load_tile<D, KEYS, T::THREADS>(keys, key_rows, 0, shape.context);
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
        copy_async_wait<0>();
        sync_block();
        load_tile<D, KEYS, T::THREADS>(values, value_rows, key, shape.context);
        copy_async_commit();
        const bool sees = key < query + T::WARP_OWN;
        Weights<KEYS> weights[M];
        if (sees) {
            Accumulators<KEYS> scores[M];
            clear<M, KEYS>(scores);
            multiply_transposed<M, KEYS, D>(scores, queries, own, keys);
            if (key + KEYS > query + 1) mask_scores<M, KEYS>(scores, query, key);
#pragma unroll
            for (u32 m = 0; m < M; ++m) {
                weigh_rows<KEYS, D>(scores[m], sums[m], running.largest[m], running.sum[m], scale_log2);
                round_weights<KEYS>(scores[m], weights[m]);
            }
        }
        copy_async_wait<0>();
        sync_block();
        if (key + KEYS < seen) load_tile<D, KEYS, T::THREADS>(keys, key_rows, key + KEYS, shape.context);
        copy_async_commit();
        if (sees) multiply_weights<M, KEYS, D>(sums, weights, values);
    }
    float factors[M][2];
    finish<M>(running, factors, log_sum_exp + shape.statistics(sequence, head), query, shape);
    store_rows<M, D>(sums, factors, queries, own, shape.outputs(out, sequence, head), first_query, shape.context);
}

KERNEL(attention_32, 128, 2)(const bf16* qkv, bf16* out, float* log_sum_exp, u32 context, u32 heads, u32 kv_heads,
                             u32 head_dim, float scale) {
    attention<32>(qkv, out, log_sum_exp, {context, heads, kv_heads, head_dim, scale});
}

KERNEL(attention_64, 128, 2)(const bf16* qkv, bf16* out, float* log_sum_exp, u32 context, u32 heads, u32 kv_heads,
                             u32 head_dim, float scale) {
    attention<64>(qkv, out, log_sum_exp, {context, heads, kv_heads, head_dim, scale});
}

KERNEL(attention_128, 128, 2)(const bf16* qkv, bf16* out, float* log_sum_exp, u32 context, u32 heads, u32 kv_heads,
                              u32 head_dim, float scale) {
    attention<128>(qkv, out, log_sum_exp, {context, heads, kv_heads, head_dim, scale});
}
