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

// Ids that a block of threads looks through at a time.
constexpr u32 SEARCH = 256;
// Rows whose loads are under way together.
constexpr u32 ROWS_AHEAD = 4;

// Adds the listed rows to `sum`, strictly in the list's order; loads run ahead of the additions.
DEVICE void add_rows(float (&sum)[CHUNK], const bf16* column, u32 width, u32 length, const u32* rows, u32 count) {
    u32 at = 0;
    for (; at + ROWS_AHEAD <= count; at += ROWS_AHEAD) {
        float terms[ROWS_AHEAD][CHUNK];
#pragma unroll
        for (u32 row = 0; row < ROWS_AHEAD; ++row) {
            load_chunk(column + static_cast<u64>(rows[at + row]) * width, length, terms[row]);
        }
#pragma unroll
        for (u32 row = 0; row < ROWS_AHEAD; ++row) {
#pragma unroll
            for (u32 i = 0; i < CHUNK; ++i) sum[i] += terms[row][i];
        }
    }
    for (; at < count; ++at) {
        float term[CHUNK];
        load_chunk(column + static_cast<u64>(rows[at]) * width, length, term);
#pragma unroll
        for (u32 i = 0; i < CHUNK; ++i) sum[i] += term[i];
    }
}

// Lists the places from `first` to `first + SEARCH` that hold `token`, in their order. Returns how many there are. The list is written
// behind the first of two barriers, so that everybody has read the last one.
DEVICE u32 list_places(const u32* tokens, u32 token_count, u32 token, u32 first, u32* list, u32 (&counts)[WARP]) {
    const u32 place = first + threadIdx.x, warp = warp_of_block();
    const bool here = place < token_count && tokens[place] == token;
    const u32 votes = vote(here);
    if (lane_of_warp() == 0) counts[warp] = count_bits(votes);
    sync_block();
    u32 before = 0, total = 0;
    for (u32 other = 0; other < SEARCH / WARP; ++other) {
        before += other < warp ? counts[other] : 0;
        total += counts[other];
    }
    if (here) list[before + count_bits(votes & ((1u << lane_of_warp()) - 1))] = place;
    sync_block();
    return total;
}

// Each id has a block of threads, but only that of its first place works: it adds all rows of that id in order of place, so
// nobody else writes that row of the table, and the additions are those of the CPU kernel. Looking for the places reads
// ids for each block, all `token_count` for one that works and those up to its id's nearest earlier place for one that does
// not: at worst the square of their number in all, for each run of columns. They are expected to come from the cache and to
// take little time beside the rows, which is not measured.
KERNEL(embed_backward, 256, 1)(const u32* tokens, const bf16* out_gradient, float* table_gradient, u32 token_count,
                               u32 vocabulary, u32 width) {
    SHARED u32 list[SEARCH];
    SHARED u32 counts[WARP];
    const u32 own = blockIdx.x, token = tokens[own];
    if (token >= vocabulary) return;
    // The nearest places first: a frequent id is found among them.
    const u32 own_run = own / SEARCH * SEARCH;
    for (u32 run = own_run + SEARCH; run > 0; run -= SEARCH) {
        const u32 found = list_places(tokens, token_count, token, run - SEARCH, list, counts);
        if (found > 0 && list[0] < own) return;
    }
    const u32 chunk = blockIdx.y * blockDim.x + threadIdx.x;
    const bool works = chunk < chunks_of(width);
    const u32 length = works ? chunk_length(width, chunk) : 0;
    const u32 column = works ? chunk * CHUNK : 0;
    float* to = table_gradient + static_cast<u64>(token) * width + column;
    float sum[CHUNK];
    load_chunk(static_cast<const float*>(to), length, sum);
    for (u32 run = own_run; run < token_count; run += SEARCH) {
        const u32 found = list_places(tokens, token_count, token, run, list, counts);
        add_rows(sum, out_gradient + column, width, length, list, found);
    }
    store_chunk(to, length, sum);
}
