// What the attention kernels share: their tiles, where heads lie, and the causal mask.
//
// The layout is that of `Device::attention`: rows of [query heads | key heads | value heads], query head h reading key head
// h / (heads / kv_heads). A head shorter than a kernel's D is padded with zeros in shared memory, which adds nothing.
#pragma once

#include "mma.cuh"

// Tiles for heads of up to D elements; `ATTENTION_TILES` in `kernels/src/cuda/table/launches.rs` has the same numbers. A
// block of threads owns a run of tokens whose sums stay in registers, and passes tiles of the others through shared memory.
template <u32 WARPS_, u32 OWN_, u32 OTHERS_> struct Tiling {
    static constexpr u32 WARPS = WARPS_;
    static constexpr u32 THREADS = WARPS_ * WARP;
    // Tokens of a block of threads, of a warp, and row fragments of a warp.
    static constexpr u32 OWN = OWN_;
    static constexpr u32 WARP_OWN = OWN_ / WARPS_;
    static constexpr u32 FRAGMENTS = WARP_OWN / FRAGMENT_ROWS;
    // Tokens of a passing tile.
    static constexpr u32 OTHERS = OTHERS_;
};

template <u32 D> struct Tilings;
template <> struct Tilings<32> {
    using Forward = Tiling<4, 128, 64>;
    using Keys = Tiling<4, 128, 32>;
    using Queries = Tiling<4, 128, 32>;
};
template <> struct Tilings<64> {
    using Forward = Tiling<4, 128, 64>;
    using Keys = Tiling<4, 128, 64>;
    using Queries = Tiling<4, 128, 64>;
};
template <> struct Tilings<128> {
    using Forward = Tiling<4, 128, 64>;
    using Keys = Tiling<8, 128, 32>;
    using Queries = Tiling<4, 128, 32>;
};

// Shape of a call, and where its heads lie.
struct AttentionShape {
    u32 context, heads, kv_heads, head_dim;
    float scale;

    // Rows that hold nothing but so many heads' keys and values.
    DEVICE AttentionShape of_key_heads(u32 count) const { return {context, 0, count, head_dim, scale}; }
    DEVICE u32 group() const { return heads / kv_heads; }
    DEVICE u32 qkv_stride() const { return (heads + 2 * kv_heads) * head_dim; }
    DEVICE u32 out_stride() const { return heads * head_dim; }

    // Head `column` of a sequence's rows of queries, keys and values.
    template <typename T> DEVICE HeadRows<T> in_qkv(T* qkv, u32 sequence, u32 column) const {
        T* from = qkv + static_cast<u64>(sequence) * context * qkv_stride() + static_cast<u64>(column) * head_dim;
        return {from, qkv_stride(), head_dim};
    }
    template <typename T> DEVICE HeadRows<T> queries(T* qkv, u32 sequence, u32 head) const {
        return in_qkv(qkv, sequence, head);
    }
    template <typename T> DEVICE HeadRows<T> keys(T* qkv, u32 sequence, u32 kv_head) const {
        return in_qkv(qkv, sequence, heads + kv_head);
    }
    template <typename T> DEVICE HeadRows<T> values(T* qkv, u32 sequence, u32 kv_head) const {
        return in_qkv(qkv, sequence, heads + kv_heads + kv_head);
    }
    template <typename T> DEVICE HeadRows<T> outputs(T* out, u32 sequence, u32 head) const {
        T* from = out + static_cast<u64>(sequence) * context * out_stride() + static_cast<u64>(head) * head_dim;
        return {from, out_stride(), head_dim};
    }
    // Where a head's statistics begin, one for each token.
    DEVICE u64 statistics(u32 sequence, u32 head) const {
        return (static_cast<u64>(sequence) * heads + head) * context;
    }
};
