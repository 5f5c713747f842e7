// Kernels whose outputs are functions of few inputs each: conversions, additions, rotation, SwiGLU, embedding.
//
// All are bound by memory. A thread handles 16 bytes at a time where addresses allow. `kernels/src/cuda/table.rs` says what each
// takes and how it is launched.

#include "common.cuh"

// Threads of a block of an element-wise kernel, and quads that each of them handles.
constexpr u32 ELEMENT_THREADS = 256;
constexpr u32 ELEMENT_QUADS = 2;

// Applies `combine` to this thread's quads of `len` elements.
template <typename Combine> DEVICE void for_quads(u64 len, Combine combine) {
#pragma unroll
    for (u32 i = 0; i < ELEMENT_QUADS; ++i) {
        const u64 quad = (static_cast<u64>(blockIdx.x) * ELEMENT_QUADS + i) * ELEMENT_THREADS + threadIdx.x;
        const u64 at = quad * QUAD;
        if (at < len) combine(at, len - at < QUAD ? static_cast<u32>(len - at) : QUAD);
    }
}

template <typename From, typename To> DEVICE void convert(const From* from, To* to, u64 len) {
    for_quads(len, [&](u64 at, u32 length) {
        float values[QUAD];
        load_chunk(from + at, length, values);
        store_chunk(to + at, length, values);
    });
}

KERNEL(convert_f32_bf16, 256, 1)(const float* from, bf16* to, u64 len) { convert(from, to, len); }

KERNEL(convert_bf16_f32, 256, 1)(const bf16* from, float* to, u64 len) { convert(from, to, len); }

template <typename X, typename Y> DEVICE void add(X* x, const Y* y, u64 len) {
    for_quads(len, [&](u64 at, u32 length) {
        float sum[QUAD], term[QUAD];
        load_chunk(static_cast<const X*>(x + at), length, sum);
        load_chunk(y + at, length, term);
#pragma unroll
        for (u32 i = 0; i < QUAD; ++i) sum[i] += term[i];
        store_chunk(x + at, length, sum);
    });
}

KERNEL(add_f32, 256, 1)(float* x, const float* y, u64 len) { add(x, y, len); }

KERNEL(add_bf16, 256, 1)(bf16* x, const bf16* y, u64 len) { add(x, y, len); }

KERNEL(add_f32_bf16, 256, 1)(float* x, const bf16* y, u64 len) { add(x, y, len); }

// One block of threads for each row; a thread rotates eight pairs of a head at a time.
KERNEL(rope, 256, 1)(bf16* x, const float* table, u32 context, u32 heads, u32 head_dim, u32 stride, float sign) {
    const u32 half = head_dim / 2, chunks = chunks_of(half);
    bf16* row = x + static_cast<u64>(blockIdx.x) * stride;
    const float* cosines = table + static_cast<u64>(blockIdx.x % context) * head_dim;
    for (u32 index = threadIdx.x; index < heads * chunks; index += blockDim.x) {
        const u32 head = index / chunks, chunk = index % chunks, length = chunk_length(half, chunk);
        bf16* low_at = row + head * head_dim + chunk * CHUNK;
        float low[CHUNK], high[CHUNK], cosine[CHUNK], sine[CHUNK];
        load_chunk(static_cast<const bf16*>(low_at), length, low);
        load_chunk(static_cast<const bf16*>(low_at + half), length, high);
        load_chunk(cosines + chunk * CHUNK, length, cosine);
        load_chunk(cosines + half + chunk * CHUNK, length, sine);
#pragma unroll
        for (u32 i = 0; i < CHUNK; ++i) {
            const float a = low[i], b = high[i], s = sine[i] * sign;
            low[i] = fused(-b, s, a * cosine[i]);
            high[i] = fused(a, s, b * cosine[i]);
        }
        store_chunk(low_at, length, low);
        store_chunk(low_at + half, length, high);
    }
}

// One block of threads for each row of gates and what they let through.
KERNEL(swiglu, 256, 1)(const bf16* gate_up, bf16* out, u32 width) {
    const bf16* gates = gate_up + static_cast<u64>(blockIdx.x) * 2 * width;
    bf16* to = out + static_cast<u64>(blockIdx.x) * width;
    for (u32 chunk = threadIdx.x; chunk < chunks_of(width); chunk += blockDim.x) {
        const u32 at = chunk * CHUNK, length = chunk_length(width, chunk);
        float gate[CHUNK], up[CHUNK];
        load_chunk(gates + at, length, gate);
        load_chunk(gates + width + at, length, up);
#pragma unroll
        for (u32 i = 0; i < CHUNK; ++i) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
        store_chunk(to + at, length, gate);
    }
}

KERNEL(swiglu_backward, 256, 1)(bf16* gate_up, bf16* out_gradient, u32 width) {
    bf16* gates = gate_up + static_cast<u64>(blockIdx.x) * 2 * width;
    bf16* out = out_gradient + static_cast<u64>(blockIdx.x) * width;
    for (u32 chunk = threadIdx.x; chunk < chunks_of(width); chunk += blockDim.x) {
        const u32 at = chunk * CHUNK, length = chunk_length(width, chunk);
        float gate[CHUNK], up[CHUNK], dy[CHUNK];
        load_chunk(static_cast<const bf16*>(gates + at), length, gate);
        load_chunk(static_cast<const bf16*>(gates + width + at), length, up);
        load_chunk(static_cast<const bf16*>(out + at), length, dy);
#pragma unroll
        for (u32 i = 0; i < CHUNK; ++i) {
            const float g = gate[i], u = up[i], s = sigmoid(g), silu = g * s;
            // silu' = s · (1 + g · (1 - s))
            const float slope = s * fused(g, 1.0f - s, 1.0f);
            gate[i] = dy[i] * u * slope;
            up[i] = dy[i] * silu;
            dy[i] = silu * u;
        }
        store_chunk(gates + at, length, gate);
        store_chunk(gates + width + at, length, up);
        store_chunk(out + at, length, dy);
    }
}

// One block of threads for each id. An id that is not in the table makes a row of NaN, which the loss shows.
KERNEL(embed, 256, 1)(const bf16* table, const u32* tokens, bf16* out, u32 vocabulary, u32 width) {
    const u32 token = tokens[blockIdx.x];
    const bf16* from = table + static_cast<u64>(token) * width;
    bf16* to = out + static_cast<u64>(blockIdx.x) * width;
    for (u32 chunk = threadIdx.x; chunk < chunks_of(width); chunk += blockDim.x) {
        const u32 at = chunk * CHUNK, length = chunk_length(width, chunk);
        float values[CHUNK];
        if (token < vocabulary) {
            load_chunk(from + at, length, values);
        } else {
#pragma unroll
            for (u32 i = 0; i < CHUNK; ++i) values[i] = NOT_A_NUMBER;
        }
        store_chunk(to + at, length, values);
    }
}

// An id at its place: id, then place, in one number. Their order is that of the additions, and no two are alike, so that there is one
// way only to sort them.
DEVICE u64 key_of(u32 token, u32 place) { return static_cast<u64>(token) << 32 | place; }
DEVICE u32 token_of(u64 key) { return static_cast<u32>(key >> 32); }
DEVICE u32 place_of(u64 key) { return static_cast<u32>(key); }
constexpr u64 LAST_KEY = ~0ull;

// Places whose keys a block sorts.
constexpr u32 SORTED = 1024;

// First of three kernels of the embedding's gradient: sorts each run of keys by itself (Batcher's bitonic sort: each comparison's two
// places follow from the step alone). Keys beyond the last place come last.
KERNEL(embed_sort, 512, 1)(const u32* tokens, u64* runs, u32 token_count) {
    SHARED u64 keys[SORTED];
    const u32 first = blockIdx.x * SORTED;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const u32 at = half * (SORTED / 2) + threadIdx.x, place = first + at;
        keys[at] = place < token_count ? key_of(tokens[place], place) : LAST_KEY;
    }
    for (u32 size = 2; size <= SORTED; size *= 2) {
        for (u32 stride = size / 2; stride > 0; stride /= 2) {
            sync_block();
            const u32 low = 2 * threadIdx.x - threadIdx.x % stride, high = low + stride;
            const u64 a = keys[low], b = keys[high];
            const bool rising = (low & size) == 0;
            if ((a > b) == rising) {
                keys[low] = b;
                keys[high] = a;
            }
        }
    }
    sync_block();
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const u32 at = half * (SORTED / 2) + threadIdx.x;
        runs[first + at] = keys[at];
    }
}

// How many keys of a sorted run come before `key`.
DEVICE u32 keys_before(const u64* run, u64 key) {
    u32 before = 0;
#pragma unroll
    for (u32 step = SORTED / 2; step > 0; step /= 2) before += run[before + step - 1] < key ? step : 0;
    return run[SORTED - 1] < key ? SORTED : before;
}

// Second: merges the runs. A key's place in the whole order is the number of keys before it, and each run says how many it has.
// Neighbouring threads have neighbouring keys, and so look at the same few places of a run.
KERNEL(embed_order, 256, 1)(const u64* runs, u64* order, u32 token_count) {
    const u32 own = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 run_count = (token_count + SORTED - 1) / SORTED;
    if (own >= run_count * SORTED) return;
    const u64 key = runs[own];
    if (key == LAST_KEY) return;
    u32 before = 0;
#pragma unroll 4
    for (u32 run = 0; run < run_count; ++run) before += keys_before(runs + run * SORTED, key);
    order[before] = key;
}

// Rows whose loads are under way together.
constexpr u32 ROWS_AHEAD = 16;

// Adds the first `count` of these rows to `sum`, strictly in their order; loads run ahead of the additions. What is not loaded is not
// added, either: a zero would turn a sum of -0 into 0.
template <bool WHOLE>
DEVICE void add_rows(float (&sum)[CHUNK], const bf16* column, u32 width, u32 length, const u32 (&rows)[ROWS_AHEAD],
                     u32 count) {
    u32x4 words[ROWS_AHEAD] = {};
#pragma unroll
    for (u32 i = 0; i < ROWS_AHEAD; ++i) {
        if (i < count) words[i] = load_words<WHOLE>(column + static_cast<u64>(rows[i]) * width, length);
    }
#pragma unroll
    for (u32 i = 0; i < ROWS_AHEAD; ++i) {
        if (i >= count) continue;
        float term[CHUNK];
        unpack(words[i], term);
#pragma unroll
        for (u32 k = 0; k < CHUNK; ++k) sum[k] += term[k];
    }
}

// Third: each key has a block of threads, but only that of an id's first key works: it adds all rows of that id in order of place, so
// nobody else writes that row of the table, and the additions are those of the CPU kernel. Each warp finds the id's next keys for
// itself. An id that is very frequent takes the longest, as its additions cannot be shared out: 16 rows at a time are on their way.
KERNEL(embed_backward, 256, 2)(const u64* order, const bf16* out_gradient, float* table_gradient, u32 token_count,
                               u32 vocabulary, u32 width) {
    const u32 first = blockIdx.x, lane = lane_of_warp();
    u64 key = first + lane < token_count ? order[first + lane] : LAST_KEY;
    const u32 token = token_of(order[first]);
    if (token >= vocabulary || (first > 0 && token_of(order[first - 1]) == token)) return;
    const u32 chunk = blockIdx.y * blockDim.x + threadIdx.x;
    const bool works = chunk < chunks_of(width);
    const u32 length = works ? chunk_length(width, chunk) : 0;
    const bf16* column = out_gradient + (works ? chunk * CHUNK : 0);
    float* to = table_gradient + static_cast<u64>(token) * width + (works ? chunk * CHUNK : 0);
    const bool whole = width % CHUNK == 0 && is_aligned(out_gradient);
    float sum[CHUNK];
    load_chunk(static_cast<const float*>(to), length, sum);
    for (u32 at = first, found = WARP; found == WARP; at += WARP) {
        found = count_bits(vote(token_of(key) == token));
        const u32 place = place_of(key), next = at + WARP + lane;
        if (found == WARP) key = next < token_count ? order[next] : LAST_KEY;
        for (u32 done = 0; done < found; done += ROWS_AHEAD) {
            u32 rows[ROWS_AHEAD];
#pragma unroll
            for (u32 i = 0; i < ROWS_AHEAD; ++i) rows[i] = broadcast(place, done + i);
            if (!works) continue;
            if (whole) {
                add_rows<true>(sum, column, width, length, rows, found - done);
            } else {
                add_rows<false>(sum, column, width, length, rows, found - done);
            }
        }
    }
    store_chunk(to, length, sum);
}
