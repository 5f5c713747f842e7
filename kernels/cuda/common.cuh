// What several kernels share: chunks of a row, sums and maxima over a block, the exponential function.
#pragma once

#include "platform.cuh"

// Elements that a thread handles together, 16 bytes: in kernels over bf16, and where f32 takes part. Neighbouring threads then have
// neighbouring 16 bytes, and each of a warp's accesses covers whole lines.
constexpr u32 CHUNK = 8;
constexpr u32 QUAD = 4;

constexpr float NOT_A_NUMBER = __builtin_bit_cast(float, 0x7FFFFFFFu);
constexpr float INFINITE = __builtin_bit_cast(float, 0x7F800000u);
constexpr float LOG2_E = 1.44269504088896340736f;

DEVICE u32 chunks_of(u32 width) { return (width + CHUNK - 1) / CHUNK; }

// Elements of chunk `index` of a row.
DEVICE u32 chunk_length(u32 width, u32 index) {
    const u32 left = width - index * CHUNK;
    return left < CHUNK ? left : CHUNK;
}

// Whether so many bytes can be moved at once.
template <u32 BYTES = 16> DEVICE bool is_aligned(const void* pointer) {
    return reinterpret_cast<u64>(pointer) % BYTES == 0;
}

DEVICE void unpack(u32 pair, float& low, float& high) {
    low = bits_to_float(pair << 16);
    high = bits_to_float(pair & 0xFFFF0000u);
}

DEVICE void unpack(const u32x4& words, float (&to)[CHUNK]) {
    unpack(words.x, to[0], to[1]);
    unpack(words.y, to[2], to[3]);
    unpack(words.z, to[4], to[5]);
    unpack(words.w, to[6], to[7]);
}

// A chunk as it lies in memory, two elements to a word: what waits for its use takes half the registers that way. Elements beyond
// `length` have the bits `beyond`. The caller may know that a chunk is whole and aligned: such loads have no branches, so
// that a loop's are all under way together.
template <bool WHOLE> DEVICE u32x4 load_words(const bf16* from, u32 length, u32 beyond = 0) {
    if (WHOLE || (length == CHUNK && is_aligned(from))) return *reinterpret_cast<const u32x4*>(from);
    u32 bits[CHUNK];
#pragma unroll
    for (u32 i = 0; i < CHUNK; ++i) bits[i] = i < length ? from[i].bits : beyond;
    return {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16, bits[6] | bits[7] << 16};
}

// A chunk of `length` elements in global memory, at most N; those beyond are zero. The fast way and the slow one give the same
// values.
template <u32 N> DEVICE void load_chunk(const bf16* from, u32 length, float (&to)[N]) {
    static_assert(N == CHUNK || N == QUAD);
    if (length == N && is_aligned<2 * N>(from)) {
        if constexpr (N == CHUNK) {
            unpack(*reinterpret_cast<const u32x4*>(from), to);
        } else {
            const u32x2 words = *reinterpret_cast<const u32x2*>(from);
            unpack(words.x, to[0], to[1]);
            unpack(words.y, to[2], to[3]);
        }
        return;
    }
#pragma unroll
    for (u32 i = 0; i < N; ++i) to[i] = i < length ? to_float(from[i]) : 0.0f;
}

template <u32 N> DEVICE void load_chunk(const float* from, u32 length, float (&to)[N]) {
    static_assert(N % QUAD == 0);
    if (length == N && is_aligned(from)) {
        const u32x4* words = reinterpret_cast<const u32x4*>(from);
#pragma unroll
        for (u32 i = 0; i < N / QUAD; ++i) {
            const u32x4 quad = words[i];
            to[4 * i] = bits_to_float(quad.x);
            to[4 * i + 1] = bits_to_float(quad.y);
            to[4 * i + 2] = bits_to_float(quad.z);
            to[4 * i + 3] = bits_to_float(quad.w);
        }
        return;
    }
#pragma unroll
    for (u32 i = 0; i < N; ++i) to[i] = i < length ? from[i] : 0.0f;
}

DEVICE u32x4 pack(const float (&from)[CHUNK]) {
    return {pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3]), pack_bf16(from[4], from[5]),
            pack_bf16(from[6], from[7])};
}

template <u32 N> DEVICE void store_chunk(bf16* to, u32 length, const float (&from)[N]) {
    static_assert(N == CHUNK || N == QUAD);
    if (length == N && is_aligned<2 * N>(to)) {
        if constexpr (N == CHUNK) {
            store_words(to, pack(from));
        } else {
            store_words(to, u32x2{pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3])});
        }
        return;
    }
#pragma unroll
    for (u32 i = 0; i < N; ++i) {
        if (i < length) to[i] = to_bf16(from[i]);
    }
}

DEVICE u32x4 quad_words(float a, float b, float c, float d) {
    return {float_to_bits(a), float_to_bits(b), float_to_bits(c), float_to_bits(d)};
}

template <u32 N> DEVICE void store_chunk(float* to, u32 length, const float (&from)[N]) {
    static_assert(N % QUAD == 0);
    if (length == N && is_aligned(to)) {
#pragma unroll
        for (u32 i = 0; i < N; i += QUAD) {
            store_words(to + i, quad_words(from[i], from[i + 1], from[i + 2], from[i + 3]));
        }
        return;
    }
#pragma unroll
    for (u32 i = 0; i < N; ++i) {
        if (i < length) to[i] = from[i];
    }
}

// The sum over a warp, in each of its lanes: lanes add their neighbours' at distances 16, 8, 4, 2, 1, so that all have the
// same sum of the same terms.
template <typename T> DEVICE T warp_sum(T value) {
#pragma unroll
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
    return value;
}

// The sum over a block of whole warps, in each of its threads. `scratch` holds one value for each warp of the largest block,
// and may be used again only behind a barrier that follows this call.
template <typename T> DEVICE T block_sum(T value, T (&scratch)[WARP]) {
    value = warp_sum(value);
    if (lane_of_warp() == 0) scratch[warp_of_block()] = value;
    sync_block();
    return warp_sum(lane_of_warp() < blockDim.x / WARP ? scratch[lane_of_warp()] : T(0));
}

// e^x as the CPU kernels have it, operation for operation (`kernels/src/cpu/exponential.rs` names range, error and source of
// the coefficients), hence with the same bits.
DEVICE float exponential(float x) {
    const float largest = 88.0f, smallest = -87.0f;
    const float below = largest < x ? largest : x;
    const float held = smallest > below ? smallest : below;
    const float n = rintf(held * LOG2_E);
    const float r = fused(-n, -2.1219444e-4f, fused(-n, 0.6933594f, held));
    float p = 1.9875691e-4f;
    p = fused(p, r, 1.3981999e-3f);
    p = fused(p, r, 8.333452e-3f);
    p = fused(p, r, 4.1665796e-2f);
    p = fused(p, r, 1.6666665e-1f);
    p = fused(p, r, 0.5f);
    const float value = fused(p, r * r, r + 1.0f);
    const float scaled = value * bits_to_float(static_cast<u32>(static_cast<int>(n) + 127) << 23);
    return x < smallest ? 0.0f : scaled;
}

// 1 / (1 + e^-x), as the CPU kernels have it.
DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exponential(0.0f - x)); }
