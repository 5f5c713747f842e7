// What `platform.cuh` gives the kernels on a GPU, on the host: the same names with the meaning that the CUDA programming guide
// and the PTX ISA give them. `emulator.cpp` runs blocks of threads as fibres on top of it.
//
// What differs from a GPU: sums inside one tensor core product are made in f64 and rounded once, where a GPU does not say how it
// sums; `exp2_fast` and `logf` are the host's. All else gives a GPU's bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>

typedef std::uint8_t u8;
typedef std::uint16_t u16;
typedef std::uint32_t u32;
typedef unsigned long long u64;

#define DEVICE inline
#define KERNEL(name, threads, blocks)                                                                                  \
    constexpr u32 name##_threads = threads;                                                                            \
    extern "C" void name
// All static shared memory lies in one section, so that it can be poisoned before each block.
#define SHARED static __attribute__((section("emulated_shared")))
#define DYNAMIC_SHARED(name) u8* const name = emulator::dynamic_shared()
#define DYNAMIC_TILES(name) DYNAMIC_SHARED(name)

// Sources are compiled twice: as for an architecture with products of groups of warps, and as for the others.
#ifdef TARAZED_GROUP_PRODUCTS
constexpr bool GROUP_PRODUCTS = true;
#else
constexpr bool GROUP_PRODUCTS = false;
#endif

struct bf16 {
    u16 bits;
};

struct alignas(16) u32x4 {
    u32 x, y, z, w;
};

struct alignas(8) u32x2 {
    u32 x, y;
};

namespace emulator {

struct Index {
    u32 x, y, z;
};

// Where the running thread is; the engine keeps it up to date.
struct Place {
    Index thread, block, threads, blocks;
};
extern Place place;

using Site = std::source_location;

u8* dynamic_shared();
void sync_block(const Site& site);

// What the lanes of a warp do together.
enum class Together {
    Sync,
    Shuffle,
    Vote,
    LoadMatrices,
    LoadMatricesTransposed,
    MultiplyAdd,
    BeginProducts,
    MultiplyGroup,
    CommitProducts,
    WaitForProducts
};

// One product of a group of warps: its operands' descriptors, or `weights` in the place of the first.
struct GroupProduct {
    u64 a, b;
    const u32* weights;
    u32 columns;
    bool add;
};

// One lane's operands: what it gives, where it wants its result, and a number.
struct Operands {
    const void* in[3];
    void* out;
    u64 number;
};
void together(Together what, const Operands& operands, const Site& site);

u32 shared_address(const void* pointer);
void store_shared(void* to, const void* words);
void publish();

void copy_async(void* to, const void* from, bool present);
void copy_async_commit();
void copy_async_wait(u32 pending);

} // namespace emulator

#define threadIdx (emulator::place.thread)
#define blockIdx (emulator::place.block)
#define blockDim (emulator::place.threads)
#define gridDim (emulator::place.blocks)

inline float bits_to_float(u32 bits) {
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline u32 float_to_bits(float x) {
    u32 result;
    std::memcpy(&result, &x, sizeof result);
    return result;
}

inline float fused(float a, float b, float c) { return std::fma(a, b, c); }

inline bf16 to_bf16(float x) {
    const u32 bits = float_to_bits(x);
    if (x != x) return {0x7FFF};
    return {static_cast<u16>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

inline u32 pack_bf16(float low, float high) { return to_bf16(low).bits | static_cast<u32>(to_bf16(high).bits) << 16; }

inline float exp2_fast(float x) {
    const float result = std::exp2(x);
    return std::fpclassify(result) == FP_SUBNORMAL ? 0.0f : result;
}

template <typename T>
inline T shuffle_xor(T x, u32 lanes, const emulator::Site& site = emulator::Site::current()) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    T result;
    emulator::together(emulator::Together::Shuffle, {{&x}, &result, sizeof(T) << 8 | lanes}, site);
    return result;
}

inline u32 broadcast(u32 x, u32 lane, const emulator::Site& site = emulator::Site::current()) {
    return shuffle_xor(x, threadIdx.x % 32 ^ lane, site);
}

inline u32 vote(bool yes, const emulator::Site& site = emulator::Site::current()) {
    u32 result;
    emulator::together(emulator::Together::Vote, {{}, &result, yes}, site);
    return result;
}

inline u32 count_bits(u32 x) { return static_cast<u32>(__builtin_popcount(x)); }

inline void sync_block(const emulator::Site& site = emulator::Site::current()) { emulator::sync_block(site); }

inline void sync_warp(const emulator::Site& site = emulator::Site::current()) {
    emulator::together(emulator::Together::Sync, {}, site);
}

inline void atomic_add(u64* to, u64 value) { *to += value; }

inline void store_words(void* to, u32x4 words) { *static_cast<u32x4*>(to) = words; }
inline void store_words(void* to, u32x2 words) { *static_cast<u32x2*>(to) = words; }

inline u32 shared_address(const void* pointer) { return emulator::shared_address(pointer); }
inline void store_shared(void* to, u32x4 words) { emulator::store_shared(to, &words); }
inline void hide(u32x4&) {}

inline void copy_async_16(void* to, const void* from, bool present) { emulator::copy_async(to, from, present); }
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int PENDING> inline void copy_async_wait() { emulator::copy_async_wait(PENDING); }

inline void load_matrices(u32 (&to)[4], const void* row, const emulator::Site& site = emulator::Site::current()) {
    emulator::together(emulator::Together::LoadMatrices, {{row}, to, 0}, site);
}

inline void load_matrices_transposed(u32 (&to)[4], const void* row,
                                     const emulator::Site& site = emulator::Site::current()) {
    emulator::together(emulator::Together::LoadMatricesTransposed, {{row}, to, 0}, site);
}

inline void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1,
                         const emulator::Site& site = emulator::Site::current()) {
    const u32 b[2] = {b0, b1};
    emulator::together(emulator::Together::MultiplyAdd, {{a, b}, c, 0}, site);
}

inline void publish_to_products() { emulator::publish(); }

inline void begin_products(const emulator::Site& site = emulator::Site::current()) {
    emulator::together(emulator::Together::BeginProducts, {}, site);
}

inline void commit_products(const emulator::Site& site = emulator::Site::current()) {
    emulator::together(emulator::Together::CommitProducts, {}, site);
}

template <int PENDING> inline void wait_for_products(const emulator::Site& site = emulator::Site::current()) {
    emulator::together(emulator::Together::WaitForProducts, {{}, nullptr, PENDING}, site);
}

template <u32 N> inline void hold_in_place(float (&)[N][4]) {}
template <u32 N> inline void hold_in_place(u32 (&)[N][4]) {}

template <u32 N>
inline void multiply_group(float (&c)[N][4], u64 a, u64 b, bool add,
                           const emulator::Site& site = emulator::Site::current()) {
    const emulator::GroupProduct product = {a, b, nullptr, 8 * N, add};
    emulator::together(emulator::Together::MultiplyGroup, {{&product}, c, 0}, site);
}

template <u32 N>
inline void multiply_group(float (&c)[N][4], const u32 (&a)[4], u64 b,
                           const emulator::Site& site = emulator::Site::current()) {
    const emulator::GroupProduct product = {0, b, a, 8 * N, true};
    emulator::together(emulator::Together::MultiplyGroup, {{&product}, c, 0}, site);
}
