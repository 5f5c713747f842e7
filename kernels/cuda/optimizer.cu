// AdamW in one pass with both 128-bit block hashes (STEP-4), and the hashes alone.
//
// The update is the CPU kernel's, operation for operation, each an IEEE operation on one element: with equal gradients both give
// the same bits (`kernels/src/cpu/optimizer.rs`). The hashes are sums modulo 2^64, which have no order; their definition is
// `kernels/src/hash.rs`.

#include "common.cuh"

// Elements of a parameter block that one block of threads goes through; a multiple of QUAD, so that no pair of words is cut.
constexpr u64 OPTIMIZER_TILE = 8192;
constexpr u32 THREADS = 256;

constexpr u32 POSITION_FACTOR = 0x9E3779B1u;
constexpr u32 MIX_FACTOR_1 = 0x7FEB352Du;
constexpr u32 MIX_FACTOR_2 = 0x846CA68Bu;
constexpr u32 KEY_MASK_FIRST = 0x7FFFFFFFu;
constexpr u32 KEY_MASK_SECOND = 0x80000000u;

// What the keys of a block derive from.
struct Seeds {
    u32 first, second;
};

DEVICE Seeds block_seeds(u32 block) {
    u64 z = (static_cast<u64>(block) + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    return {static_cast<u32>(z), static_cast<u32>(z >> 32)};
}

DEVICE u32 position_key(Seeds seeds, u32 position) {
    u32 z = position * POSITION_FACTOR + seeds.first;
    z = ((z ^ (z >> 16)) * MIX_FACTOR_1) ^ seeds.second;
    z = (z ^ (z >> 15)) * MIX_FACTOR_2;
    return z ^ (z >> 16);
}

struct HashSums {
    u64 first, second;
};

// Adds the products of one array's neighbouring words under their keys. `factor_1` and `factor_2` are the array's. A last odd
// word has a partner that is zero and keyed; pairs beyond it do not count.
DEVICE void hash_quad(HashSums& sums, const u32 (&keys)[QUAD], const float (&values)[QUAD], u32 length, u32 factor_1,
                       u32 factor_2) {
#pragma unroll
    for (u32 i = 0; i < QUAD; i += 2) {
        if (i < length) {
            const u32 left = float_to_bits(values[i]);
            const u32 right = i + 1 < length ? float_to_bits(values[i + 1]) : 0;
            const u32 a = left + ((keys[i] * factor_1) & KEY_MASK_FIRST);
            const u32 b = right + ((keys[i + 1] * factor_1) & KEY_MASK_FIRST);
            sums.first += static_cast<u64>(a) * b;
            const u32 c = left + ((keys[i] * factor_2) | KEY_MASK_SECOND);
            const u32 d = right + ((keys[i + 1] * factor_2) | KEY_MASK_SECOND);
            sums.second += static_cast<u64>(c) * d;
        }
    }
}

struct State {
    float master[QUAD], first_moment[QUAD], second_moment[QUAD];
};

DEVICE void hash_state(HashSums& sums, const u32 (&keys)[QUAD], const State& state, u32 length) {
    hash_quad(sums, keys, state.master, length, 0x2C1B3C6Du, 0x297A2D39u);
    hash_quad(sums, keys, state.first_moment, length, 0x9ACD5B91u, 0xC2B2AE35u);
    hash_quad(sums, keys, state.second_moment, length, 0x85EBCA6Bu, 0xCC9E2D51u);
}

DEVICE void quad_keys(Seeds seeds, u64 position, u32 (&keys)[QUAD]) {
#pragma unroll
    for (u32 i = 0; i < QUAD; ++i) keys[i] = position_key(seeds, static_cast<u32>(position) + i);
}

DEVICE void load_state(const float* master, const float* first_moment, const float* second_moment, u64 at, u32 length,
                       State& to) {
    load_chunk(master + at, length, to.master);
    load_chunk(first_moment + at, length, to.first_moment);
    load_chunk(second_moment + at, length, to.second_moment);
}

// Adds a block of threads' sums to a parameter block's.
DEVICE void add_sums(HashSums sums, u64* to, u64 (&scratch)[2][WARP]) {
    const u64 first = block_sum(sums.first, scratch[0]);
    const u64 second = block_sum(sums.second, scratch[1]);
    if (threadIdx.x == 0) {
        atomic_add(to, first);
        atomic_add(to + 1, second);
    }
}

struct AdamwScalars {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, keep, step_size, inverse_root_correction, eps, gradient_scale;
};

// One quad's update.
DEVICE void update(const AdamwScalars& s, const float (&gradient)[QUAD], State& state) {
#pragma unroll
    for (u32 i = 0; i < QUAD; ++i) {
        const float g = gradient[i] * s.gradient_scale;
        const float m = fused(g, s.one_minus_beta1, state.first_moment[i] * s.beta1);
        const float v = fused(g * s.one_minus_beta2, g, state.second_moment[i] * s.beta2);
        const float denominator = fused(sqrtf(v), s.inverse_root_correction, s.eps);
        state.master[i] = fused(-s.step_size, m / denominator, state.master[i] * s.keep);
        state.first_moment[i] = m;
        state.second_moment[i] = v;
    }
}

// Grid: parameter blocks by tiles of them.
KERNEL(adamw, 256, 2)(const float* gradient, float* master, float* first_moment, float* second_moment, bf16* working,
                      u64* hash_sums, u32 first_block, u64 block_elements, float beta1, float one_minus_beta1, float beta2,
                      float one_minus_beta2, float keep, float step_size, float inverse_root_correction, float eps,
                      float gradient_scale) {
    SHARED u64 scratch_before[2][WARP];
    SHARED u64 scratch_after[2][WARP];
    const AdamwScalars scalars = {beta1, one_minus_beta1, beta2, one_minus_beta2, keep, step_size, inverse_root_correction,
                                  eps, gradient_scale};
    const Seeds seeds = block_seeds(first_block + blockIdx.x);
    const u64 start = blockIdx.x * block_elements, tile = blockIdx.y * OPTIMIZER_TILE;
    const u64 end = block_elements - tile < OPTIMIZER_TILE ? block_elements : tile + OPTIMIZER_TILE;
    HashSums before = {}, after = {};
    for (u64 position = tile + threadIdx.x * QUAD; position < end; position += THREADS * QUAD) {
        const u64 at = start + position;
        const u32 length = end - position < QUAD ? static_cast<u32>(end - position) : QUAD;
        float slope[QUAD];
        State state;
        u32 keys[QUAD];
        load_chunk(gradient + at, length, slope);
        load_state(master, first_moment, second_moment, at, length, state);
        quad_keys(seeds, position, keys);
        hash_state(before, keys, state, length);
        update(scalars, slope, state);
        hash_state(after, keys, state, length);
        store_chunk(master + at, length, state.master);
        store_chunk(first_moment + at, length, state.first_moment);
        store_chunk(second_moment + at, length, state.second_moment);
        if (working != nullptr) store_chunk(working + at, length, state.master);
    }
    u64* sums = hash_sums + static_cast<u64>(blockIdx.x) * 4;
    add_sums(before, sums, scratch_before);
    add_sums(after, sums + 2, scratch_after);
}

// Grid: parameter blocks by tiles of them.
KERNEL(block_hashes, 256, 2)(const float* master, const float* first_moment, const float* second_moment, u64* hash_sums,
                             u32 first_block, u64 block_elements) {
    SHARED u64 scratch[2][WARP];
    const Seeds seeds = block_seeds(first_block + blockIdx.x);
    const u64 start = blockIdx.x * block_elements, tile = blockIdx.y * OPTIMIZER_TILE;
    const u64 end = block_elements - tile < OPTIMIZER_TILE ? block_elements : tile + OPTIMIZER_TILE;
    HashSums sums = {};
    for (u64 position = tile + threadIdx.x * QUAD; position < end; position += THREADS * QUAD) {
        const u32 length = end - position < QUAD ? static_cast<u32>(end - position) : QUAD;
        State state;
        u32 keys[QUAD];
        load_state(master, first_moment, second_moment, start + position, length, state);
        quad_keys(seeds, position, keys);
        hash_state(sums, keys, state, length);
    }
    add_sums(sums, hash_sums + static_cast<u64>(blockIdx.x) * 2, scratch);
}
