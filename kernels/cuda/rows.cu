// Kernels that sum over rows or blocks: RMSNorm, cross-entropy, sums of squares.
//
// How a sum is cut follows from the shape alone (DET-2): thread t of T has chunks t, t + T, ... of a row, sums them in order, and
// the threads' sums meet in a fixed tree. `kernels/src/cuda/table.rs` says what each kernel takes, and `table/launches.rs`
// how it is launched.

#include "common.cuh"

// The chunk at `at` of the norm's input: x, or the rounded sum of x and branch, which is kept.
DEVICE void load_input(const bf16* x, const bf16* branch, bf16* sum, u64 at, u32 length, float (&to)[CHUNK]) {
    load_chunk(x + at, length, to);
    if (branch == nullptr) return;
    float term[CHUNK];
    load_chunk(branch + at, length, term);
#pragma unroll
    for (u32 i = 0; i < CHUNK; ++i) to[i] = to_float(to_bf16(to[i] + term[i]));
    store_chunk(sum + at, length, to);
}

// One block of threads for each row. Rows of up to 8,192 elements are read once.
KERNEL(rms_norm, 1024, 1)(const bf16* x, const bf16* branch, bf16* sum, const bf16* weight, bf16* y, float* inverse_rms,
                          u32 width, float eps) {
    SHARED float scratch[WARP];
    const u64 row = static_cast<u64>(blockIdx.x) * width;
    const u32 chunks = chunks_of(width);
    float first[CHUNK] = {};
    float squares = 0.0f;
    for (u32 chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
        float values[CHUNK];
        load_input(x, branch, sum, row + chunk * CHUNK, chunk_length(width, chunk), values);
#pragma unroll
        for (u32 i = 0; i < CHUNK; ++i) {
            squares = fused(values[i], values[i], squares);
            if (chunk == threadIdx.x) first[i] = values[i];
        }
    }
    const float total = block_sum(squares, scratch);
    const float inverse = 1.0f / sqrtf(total / static_cast<float>(width) + eps);
    const bf16* input = branch == nullptr ? x : sum;
    for (u32 chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
        const u32 length = chunk_length(width, chunk);
        float factors[CHUNK];
        if (chunk != threadIdx.x) load_chunk(input + row + chunk * CHUNK, length, first);
        load_chunk(weight + chunk * CHUNK, length, factors);
#pragma unroll
        for (u32 i = 0; i < CHUNK; ++i) factors[i] = first[i] * inverse * factors[i];
        store_chunk(y + row + chunk * CHUNK, length, factors);
    }
    if (threadIdx.x == 0) inverse_rms[blockIdx.x] = inverse;
}

// Chunks that a thread of rms_norm_backward has under way: one of each of four rows, or two of each of two where rows are long.
constexpr u32 NORM_CHUNKS = 4;

// What a block needs to know to go through rows of a norm's gradient.
struct NormRows {
    const bf16* x;
    const float* inverse_rms;
    const bf16* weight;
    const bf16* y_gradient;
    bf16* x_gradient;
    u32 width;
    float inverse_width;
};

// The weights of this thread's chunk `column`, which come from the cache each time.
template <bool WHOLE> DEVICE void norm_weight(const NormRows& all, u32 column, float (&to)[CHUNK]) {
    const u32 chunk = column * blockDim.x + threadIdx.x;
    u32x4 words = {};
    if (chunk < chunks_of(all.width)) {
        words = load_words<WHOLE>(all.weight + chunk * CHUNK, chunk_length(all.width, chunk));
    }
    hide(words);
    unpack(words, to);
}

// Several sums at once, each the very sum that block_sum makes.
template <u32 COUNT> DEVICE void block_sums(float (&values)[COUNT], float (&scratch)[NORM_CHUNKS][WARP]) {
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
        values[i] = warp_sum(values[i]);
        if (lane_of_warp() == 0) scratch[i][warp_of_block()] = values[i];
    }
    sync_block();
    const bool there = lane_of_warp() < blockDim.x / WARP;
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) values[i] = warp_sum(there ? scratch[i][lane_of_warp()] : 0.0f);
}

// This thread's chunks of the gradient that a few rows' is added to, whole and aligned ones. Beyond the row `to` stays as it is.
template <u32 ROWS, u32 COLUMNS>
DEVICE void load_norm_gradient(const NormRows& all, u32 row, u32x4 (&to)[ROWS][COLUMNS]) {
    const u32 chunks = chunks_of(all.width);
#pragma unroll
    for (u32 c = 0; c < COLUMNS; ++c) {
        const u32 chunk = c * blockDim.x + threadIdx.x;
        if (chunk >= chunks) continue;
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
            const u64 at = static_cast<u64>(row + r) * all.width + chunk * CHUNK;
            to[r][c] = load_words<true>(all.x_gradient + at, CHUNK);
        }
    }
}

// A few rows' gradients, each element read once and kept as it was read; `sums` takes their shares of the weight's gradient, in the
// rows' order. Thread t of T has chunks t and t + T. How many rows go together decides no bit.
template <u32 ROWS, u32 COLUMNS, bool WHOLE>
DEVICE void norm_rows(const NormRows& all, u32 row, float (&sums)[COLUMNS][CHUNK],
                      float (&scratch)[NORM_CHUNKS][WARP]) {
    const u32 chunks = chunks_of(all.width);
    u32x4 x[ROWS][COLUMNS] = {}, dy[ROWS][COLUMNS] = {}, dx[ROWS][COLUMNS] = {};
    float inverse[ROWS], dot[ROWS] = {};
#pragma unroll
    for (u32 r = 0; r < ROWS; ++r) {
        inverse[r] = all.inverse_rms[row + r];
#pragma unroll
        for (u32 c = 0; c < COLUMNS; ++c) {
            const u32 chunk = c * blockDim.x + threadIdx.x;
            if (chunk >= chunks) continue;
            const u64 at = static_cast<u64>(row + r) * all.width + chunk * CHUNK;
            const u32 length = chunk_length(all.width, chunk);
            x[r][c] = load_words<WHOLE>(all.x + at, length);
            dy[r][c] = load_words<WHOLE>(all.y_gradient + at, length);
        }
    }
#pragma unroll
    for (u32 c = 0; c < COLUMNS; ++c) {
        float factor[CHUNK];
        norm_weight<WHOLE>(all, c, factor);
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
            float normal[CHUNK], slope[CHUNK];
            unpack(x[r][c], normal);
            unpack(dy[r][c], slope);
#pragma unroll
            for (u32 i = 0; i < CHUNK; ++i) {
                normal[i] *= inverse[r];
                dot[r] = fused(slope[i] * factor[i], normal[i], dot[r]);
                sums[c][i] = fused(slope[i], normal[i], sums[c][i]);
            }
        }
    }
    // Before the barrier, so that they arrive behind it; where they are not aligned, when they are needed.
    if (WHOLE) load_norm_gradient<ROWS, COLUMNS>(all, row, dx);
    block_sums(dot, scratch);
#pragma unroll
    for (u32 r = 0; r < ROWS; ++r) dot[r] *= all.inverse_width;
#pragma unroll
    for (u32 c = 0; c < COLUMNS; ++c) {
        const u32 chunk = c * blockDim.x + threadIdx.x;
        if (chunk >= chunks) continue;
        float factor[CHUNK];
        norm_weight<WHOLE>(all, c, factor);
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
            hide(x[r][c]);
            hide(dy[r][c]);
            hide(dx[r][c]);
            const u64 at = static_cast<u64>(row + r) * all.width + chunk * CHUNK;
            const u32 length = chunk_length(all.width, chunk);
            float normal[CHUNK], slope[CHUNK], to[CHUNK];
            unpack(x[r][c], normal);
            unpack(dy[r][c], slope);
            unpack(WHOLE ? dx[r][c] : load_words<WHOLE>(all.x_gradient + at, length), to);
#pragma unroll
            for (u32 i = 0; i < CHUNK; ++i) {
                const float change = fused(-(normal[i] * inverse[r]), dot[r], slope[i] * factor[i]);
                to[i] = fused(change, inverse[r], to[i]);
            }
            if (WHOLE) {
                store_words(all.x_gradient + at, pack(to));
            } else {
                store_chunk(all.x_gradient + at, length, to);
            }
        }
    }
}

// One block's run of rows, in their order. Its weight gradient grows in registers: a thread's columns are its own.
template <u32 COLUMNS>
DEVICE void norm_run(const NormRows& all, float* partial, u32 first, u32 end, float (&scratch)[2][NORM_CHUNKS][WARP]) {
    constexpr u32 ROWS = NORM_CHUNKS / COLUMNS;
    const u32 chunks = chunks_of(all.width);
    float sums[COLUMNS][CHUNK] = {};
    const bool whole = all.width % CHUNK == 0 && is_aligned(all.x) && is_aligned(all.weight) &&
                       is_aligned(all.y_gradient) && is_aligned(all.x_gradient);
    // Two halves of the scratch, in turn: one barrier for each step is then enough.
    u32 row = first, turn = 0;
    for (; whole && end - row >= ROWS; row += ROWS, turn ^= 1) {
        norm_rows<ROWS, COLUMNS, true>(all, row, sums, scratch[turn]);
    }
    for (; row < end; ++row, turn ^= 1) {
        norm_rows<1, COLUMNS, false>(all, row, sums, scratch[turn]);
    }
#pragma unroll
    for (u32 c = 0; c < COLUMNS; ++c) {
        const u32 chunk = c * blockDim.x + threadIdx.x;
        if (chunk < chunks) store_chunk(partial + chunk * CHUNK, chunk_length(all.width, chunk), sums[c]);
    }
}

// One block of threads for each run of rows. What limits it is how much is under way: each thread has twelve loads, and where rows
// are short, several blocks share a multiprocessor, so that some load while others wait at the barrier.
KERNEL(rms_norm_backward, 512, 1)(const bf16* x, const float* inverse_rms, const bf16* weight, const bf16* y_gradient,
                                  bf16* x_gradient, float* partials, u32 rows, u32 rows_per_partial, u32 width) {
    SHARED float scratch[2][NORM_CHUNKS][WARP];
    const u32 first = blockIdx.x * rows_per_partial;
    const u32 end = rows - first < rows_per_partial ? rows : first + rows_per_partial;
    float* partial = partials + static_cast<u64>(blockIdx.x) * width;
    const float inverse_width = 1.0f / static_cast<float>(width);
    const NormRows all = {x, inverse_rms, weight, y_gradient, x_gradient, width, inverse_width};
    const u32 columns = (chunks_of(width) + blockDim.x - 1) / blockDim.x;
    if (columns == 1) {
        norm_run<1>(all, partial, first, end, scratch);
    } else {
        norm_run<2>(all, partial, first, end, scratch);
    }
}

// The sums of a chunk's columns in shared memory: all first quads, then all second ones, so that a warp's accesses meet every bank
// once.
DEVICE void load_sums(const float* sums, u32 chunks, u32 chunk, float (&to)[CHUNK]) {
    const u32x4* quads = reinterpret_cast<const u32x4*>(sums);
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const u32x4 quad = quads[half * chunks + chunk];
        to[QUAD * half] = bits_to_float(quad.x);
        to[QUAD * half + 1] = bits_to_float(quad.y);
        to[QUAD * half + 2] = bits_to_float(quad.z);
        to[QUAD * half + 3] = bits_to_float(quad.w);
    }
}

DEVICE void store_sums(float* sums, u32 chunks, u32 chunk, const float (&from)[CHUNK]) {
    u32x4* quads = reinterpret_cast<u32x4*>(sums);
    quads[chunk] = quad_words(from[0], from[1], from[2], from[3]);
    quads[chunks + chunk] = quad_words(from[4], from[5], from[6], from[7]);
}

// Adds one row's share to the sums of the weight's gradient, and returns this thread's part of the dot product that the input's
// gradient needs. A thread's columns are its own, so the sums need no barrier.
DEVICE float norm_row_sums(const bf16* x, const bf16* weight, const bf16* dy, float inverse, u32 width, float* sums) {
    float dot = 0.0f;
    for (u32 chunk = threadIdx.x; chunk < chunks_of(width); chunk += blockDim.x) {
        const u32 at = chunk * CHUNK, length = chunk_length(width, chunk);
        float normal[CHUNK], slope[CHUNK], factor[CHUNK], sum[CHUNK];
        load_chunk(x + at, length, normal);
        load_chunk(dy + at, length, slope);
        load_chunk(weight + at, length, factor);
        load_sums(sums, chunks_of(width), chunk, sum);
#pragma unroll
        for (u32 i = 0; i < CHUNK; ++i) {
            normal[i] *= inverse;
            dot = fused(slope[i] * factor[i], normal[i], dot);
            sum[i] = fused(slope[i], normal[i], sum[i]);
        }
        store_sums(sums, chunks_of(width), chunk, sum);
    }
    return dot;
}

// Adds to a row's gradient, given the mean of the row's dot product. What it reads again is in the cache.
DEVICE void norm_row_gradient(const bf16* x, const bf16* weight, const bf16* dy, bf16* dx, float inverse, float mean,
                              u32 width) {
    for (u32 chunk = threadIdx.x; chunk < chunks_of(width); chunk += blockDim.x) {
        const u32 at = chunk * CHUNK, length = chunk_length(width, chunk);
        float normal[CHUNK], slope[CHUNK], factor[CHUNK], to[CHUNK];
        load_chunk(x + at, length, normal);
        load_chunk(dy + at, length, slope);
        load_chunk(weight + at, length, factor);
        load_chunk(static_cast<const bf16*>(dx + at), length, to);
#pragma unroll
        for (u32 i = 0; i < CHUNK; ++i) {
            const float change = fused(-(normal[i] * inverse), mean, slope[i] * factor[i]);
            to[i] = fused(change, inverse, to[i]);
        }
        store_chunk(dx + at, length, to);
    }
}

// As rms_norm_backward, for rows that do not fit its registers: one row at a time, and the run's weight gradient grows in shared
// memory.
KERNEL(rms_norm_backward_wide, 1024, 1)(const bf16* x, const float* inverse_rms, const bf16* weight,
                                        const bf16* y_gradient, bf16* x_gradient, float* partials, u32 rows,
                                        u32 rows_per_partial, u32 width) {
    DYNAMIC_SHARED(dynamic);
    // Two, in turn: one barrier for each row is then enough.
    SHARED float scratch[2][WARP];
    float* sums = reinterpret_cast<float*>(dynamic);
    const float zeros[CHUNK] = {};
    for (u32 chunk = threadIdx.x; chunk < chunks_of(width); chunk += blockDim.x) {
        store_sums(sums, chunks_of(width), chunk, zeros);
    }
    const u32 first = blockIdx.x * rows_per_partial;
    const u32 end = rows - first < rows_per_partial ? rows : first + rows_per_partial;
    for (u32 row = first; row < end; ++row) {
        const u64 at = static_cast<u64>(row) * width;
        const float inverse = inverse_rms[row];
        const float dot = norm_row_sums(x + at, weight, y_gradient + at, inverse, width, sums);
        const float mean = block_sum(dot, scratch[row % 2]) / static_cast<float>(width);
        norm_row_gradient(x + at, weight, y_gradient + at, x_gradient + at, inverse, mean, width);
    }
    float* to = partials + static_cast<u64>(blockIdx.x) * width;
    for (u32 chunk = threadIdx.x; chunk < chunks_of(width); chunk += blockDim.x) {
        float sum[CHUNK];
        load_sums(sums, chunks_of(width), chunk, sum);
        store_chunk(to + chunk * CHUNK, chunk_length(width, chunk), sum);
    }
}

// Columns that a block sums: a sector of memory. And strands that it sums each of them in: a thread for each.
constexpr u32 SECTOR = 8;
constexpr u32 STRANDS = 64;

// Strand s sums partials s, s + 64, ... in order; a warp's four strands of a column meet in a tree, the warps' sums in order.
KERNEL(rms_norm_weight_gradient, 512, 1)(const float* partials, float* weight_gradient, u32 partial_count, u32 width) {
    constexpr u32 WARPS = STRANDS * SECTOR / WARP;
    SHARED float scratch[WARPS][SECTOR];
    const u32 own = threadIdx.x % SECTOR, column = blockIdx.x * SECTOR + own;
    float sum = 0.0f;
    if (column < width) {
#pragma unroll 8
        for (u32 partial = threadIdx.x / SECTOR; partial < partial_count; partial += STRANDS) {
            sum += partials[static_cast<u64>(partial) * width + column];
        }
    }
#pragma unroll
    for (u32 lanes = WARP / 2; lanes >= SECTOR; lanes /= 2) sum += shuffle_xor(sum, lanes);
    if (lane_of_warp() < SECTOR) scratch[warp_of_block()][own] = sum;
    sync_block();
    if (threadIdx.x >= SECTOR || column >= width) return;
    for (u32 warp = 1; warp < WARPS; ++warp) sum += scratch[warp][own];
    weight_gradient[column] += sum;
}

constexpr u32 TWO_MINUS_INFINITE = 0xFF80FF80u;

// Chunks of a row of logits that a thread has under way.
constexpr u32 LOGIT_CHUNKS = 4;

// What two parts of a row have in common: the largest logit times log2 e, and the sum of 2^(logit · log2 e - largest). All terms of
// a sum are measured against the very same number, which the loss takes back, so that its rounding is none of the sum's; likewise
// the loss divides by log2 e as it is rounded here.
struct Softmax {
    float largest, sum;
};

// What terms are measured against. Where every logit is minus infinity they are zero against any number, and against that one they
// would not be.
DEVICE float base_of(float largest) { return largest == -INFINITE ? 0.0f : largest; }

// e^logit against `base`, by the hardware's own exponential: about two units in the last place.
DEVICE float exponential_against(float logit, float base) { return exp2_fast(fused(logit, LOG2_E, -base)); }

// Symmetric, so that both lanes of an exchange have the same bits. A part without logits is (-inf, 0).
DEVICE Softmax merge(Softmax a, Softmax b) {
    const float largest = fmaxf(a.largest, b.largest), base = base_of(largest);
    return {largest, a.sum * exp2_fast(a.largest - base) + b.sum * exp2_fast(b.largest - base)};
}

DEVICE Softmax warp_softmax(Softmax part) {
#pragma unroll
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) {
        part = merge(part, {shuffle_xor(part.largest, lanes), shuffle_xor(part.sum, lanes)});
    }
    return part;
}

// The whole row's, in every thread.
DEVICE Softmax block_softmax(Softmax part, Softmax (&scratch)[WARP]) {
    part = warp_softmax(part);
    if (lane_of_warp() == 0) scratch[warp_of_block()] = part;
    sync_block();
    const bool there = lane_of_warp() < blockDim.x / WARP;
    return warp_softmax(there ? scratch[lane_of_warp()] : Softmax{-INFINITE, 0.0f});
}

// A row of logits. The first `kept_chunks` of its chunks stay in shared memory when they have been read, each for the thread that read
// it; the others have to come from the cache again.
struct Logits {
    bf16* row;
    u32x4* kept;
    u32 vocabulary, kept_chunks;
};

// Chunk `first` and the next ones of this thread; minus infinity beyond the row.
template <bool WHOLE> DEVICE void load_logits(const Logits& logits, u32 first, bool again, u32x4 (&words)[LOGIT_CHUNKS]) {
#pragma unroll
    for (u32 i = 0; i < LOGIT_CHUNKS; ++i) {
        const u32 chunk = first + i * blockDim.x;
        words[i] = {TWO_MINUS_INFINITE, TWO_MINUS_INFINITE, TWO_MINUS_INFINITE, TWO_MINUS_INFINITE};
        if (again && chunk < logits.kept_chunks) {
            words[i] = logits.kept[chunk];
        } else if (chunk < chunks_of(logits.vocabulary)) {
            const bf16* from = logits.row + chunk * CHUNK;
            words[i] = load_words<WHOLE>(from, chunk_length(logits.vocabulary, chunk), TWO_MINUS_INFINITE >> 16);
        }
    }
}

// This thread's part of the row. The sum moves to another base once for several chunks.
template <bool WHOLE> DEVICE Softmax part_of_row(const Logits& logits) {
    const u32 chunks = chunks_of(logits.vocabulary);
    Softmax part = {-INFINITE, 0.0f};
    for (u32 first = threadIdx.x; first < chunks; first += LOGIT_CHUNKS * blockDim.x) {
        u32x4 words[LOGIT_CHUNKS];
        load_logits<WHOLE>(logits, first, false, words);
        float largest = -INFINITE;
#pragma unroll
        for (u32 i = 0; i < LOGIT_CHUNKS; ++i) {
            const u32 chunk = first + i * blockDim.x;
            if (chunk < logits.kept_chunks) logits.kept[chunk] = words[i];
            float values[CHUNK];
            unpack(words[i], values);
            // What is not a number is passed over here, and the sum takes it.
#pragma unroll
            for (u32 k = 0; k < CHUNK; ++k) largest = fmaxf(largest, values[k]);
        }
        largest = fmaxf(part.largest, largest * LOG2_E);
        const float base = base_of(largest);
        part = {largest, part.sum * exp2_fast(part.largest - base)};
#pragma unroll
        for (u32 i = 0; i < LOGIT_CHUNKS; ++i) {
            if (first + i * blockDim.x >= chunks) continue;
            float terms[CHUNK];
            unpack(words[i], terms);
#pragma unroll
            for (u32 k = 0; k < CHUNK; ++k) terms[k] = exponential_against(terms[k], base);
            part.sum += ((terms[0] + terms[1]) + (terms[2] + terms[3])) + ((terms[4] + terms[5]) + (terms[6] + terms[7]));
        }
    }
    return part;
}

// The gradient of the sum's logarithm over this thread's chunks.
template <bool WHOLE> DEVICE void store_shares(const Logits& logits, float base, float factor) {
    const u32 chunks = chunks_of(logits.vocabulary);
    for (u32 first = threadIdx.x; first < chunks; first += LOGIT_CHUNKS * blockDim.x) {
        u32x4 words[LOGIT_CHUNKS];
        load_logits<WHOLE>(logits, first, true, words);
#pragma unroll
        for (u32 i = 0; i < LOGIT_CHUNKS; ++i) {
            const u32 chunk = first + i * blockDim.x;
            if (chunk >= chunks) continue;
            float values[CHUNK];
            unpack(words[i], values);
#pragma unroll
            for (u32 k = 0; k < CHUNK; ++k) values[k] = exponential_against(values[k], base) * factor;
            if (WHOLE) {
                store_words(logits.row + chunk * CHUNK, pack(values));
            } else {
                store_chunk(logits.row + chunk * CHUNK, chunk_length(logits.vocabulary, chunk), values);
            }
        }
    }
}

// One block of threads for each row: once over it for maximum and sum, once more for the gradient. Reading and the exponential's unit
// are its limits; shared memory is for that second time, which would come from memory once rows of all blocks do not fit the cache.
KERNEL(cross_entropy, 512, 2)(bf16* logits, const u32* targets, float* losses, u32 vocabulary, u32 kept_chunks,
                              u32 with_gradient, float gradient_scale) {
    DYNAMIC_SHARED(dynamic);
    SHARED Softmax scratch[WARP];
    SHARED float wanted;
    bf16* row = logits + static_cast<u64>(blockIdx.x) * vocabulary;
    const Logits all = {row, reinterpret_cast<u32x4*>(dynamic), vocabulary, kept_chunks};
    const bool whole = vocabulary % CHUNK == 0 && is_aligned(row);
    const u32 target = targets[blockIdx.x];
    if (threadIdx.x == 0) wanted = target < vocabulary ? to_float(row[target]) : NOT_A_NUMBER;
    const Softmax part = block_softmax(whole ? part_of_row<true>(all) : part_of_row<false>(all), scratch);
    const float base = base_of(part.largest);
    if (threadIdx.x == 0) {
        const double powers = log2(static_cast<double>(part.sum)) + static_cast<double>(base);
        losses[blockIdx.x] = static_cast<float>(powers / static_cast<double>(LOG2_E) - static_cast<double>(wanted));
    }
    if (with_gradient == 0) return;
    const float factor = gradient_scale / part.sum;
    if (whole) {
        store_shares<true>(all, base, factor);
    } else {
        store_shares<false>(all, base, factor);
    }
    // The target's own is written twice, by one thread, and so in this order.
    if (target < vocabulary && threadIdx.x == target / CHUNK % blockDim.x) {
        row[target] = to_bf16(exponential_against(wanted, base) * factor - gradient_scale);
    }
}

// One block of threads for each parameter block. A square is exact in f64; thread t sums quads t, t + 256, ... in order.
KERNEL(square_sums, 256, 1)(const float* x, double* sums, u64 block_elements) {
    SHARED double scratch[WARP];
    const float* block = x + blockIdx.x * block_elements;
    double sum = 0.0;
    for (u64 at = threadIdx.x * QUAD; at < block_elements; at += static_cast<u64>(blockDim.x) * QUAD) {
        const u64 left = block_elements - at;
        float values[QUAD];
        load_chunk(block + at, left < QUAD ? static_cast<u32>(left) : QUAD, values);
#pragma unroll
        for (u32 i = 0; i < QUAD; ++i) sum += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    }
    const double total = block_sum(sum, scratch);
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
}
