// What the kernels take from the compiler: types, qualifiers, and the few instructions that C++ has no name for.
//
// The same sources are compiled by NVRTC for a GPU, where this file is all that they see, and by a host compiler for the
// emulator, which brings a header of its own with the same names.
#pragma once

#ifdef TARAZED_EMULATOR
#include "emulator/device.hpp"
#else

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
// An entry point, the threads of its largest block, and the blocks that one multiprocessor must be able to hold.
#define KERNEL(name, threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks) name
#define SHARED __shared__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) u8 name[]
// Begins where the swizzled tiles that `multiply_group` reads may begin.
#define DYNAMIC_TILES(name) extern __shared__ __align__(1024) u8 name[]

// Whether this is for an architecture with products of groups of four warps (`wgmma`). Only `sm_90a` has them: neither the cards
// before it nor those after it do.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool GROUP_PRODUCTS = true;
#else
constexpr bool GROUP_PRODUCTS = false;
#endif

// Brain float: the upper half of an f32.
struct bf16 {
    u16 bits;
};

struct alignas(16) u32x4 {
    u32 x, y, z, w;
};

struct alignas(8) u32x2 {
    u32 x, y;
};

DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 float_to_bits(float x) { return __float_as_uint(x); }

// a · b + c, rounded once.
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// Rounds to nearest even; every NaN becomes the same NaN.
DEVICE bf16 to_bf16(float x) {
    bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
}

// Two at once, `low` in the lower half.
DEVICE u32 pack_bf16(float low, float high) {
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

// 2^x to about two units in the last place; 0 for minus infinity.
DEVICE float exp2_fast(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

DEVICE float shuffle_xor(float x, u32 lanes) { return __shfl_xor_sync(0xFFFFFFFFu, x, lanes); }
DEVICE double shuffle_xor(double x, u32 lanes) { return __shfl_xor_sync(0xFFFFFFFFu, x, lanes); }
DEVICE u64 shuffle_xor(u64 x, u32 lanes) { return __shfl_xor_sync(0xFFFFFFFFu, x, lanes); }
// What lane `lane` has, in all lanes.
DEVICE u32 broadcast(u32 x, u32 lane) { return __shfl_sync(0xFFFFFFFFu, x, lane); }
// Which lanes of the warp say yes.
DEVICE u32 vote(bool yes) { return __ballot_sync(0xFFFFFFFFu, yes); }
DEVICE u32 count_bits(u32 x) { return __popc(x); }

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

// Adds modulo 2^64. The only atomic operation: integer sums have no order (DET-2).
DEVICE void atomic_add(u64* to, u64 value) { atomicAdd(to, value); }

// Address of shared memory as the instructions below want it.
DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// Stores 16 or 8 bytes to global memory at once. An assignment of the same words is taken apart where a branch beside it stores them
// one by one: the compiler merges the two, and a warp's stores then take four times as many instructions.
DEVICE void store_words(void* to, u32x4 words) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(to)), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
}

DEVICE void store_words(void* to, u32x2 words) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};"
                 :
                 : "l"(__cvta_generic_to_global(to)), "r"(words.x), "r"(words.y)
                 : "memory");
}

// Stores 16 bytes to shared memory.
DEVICE void store_shared(void* to, u32x4 words) { *static_cast<u32x4*>(to) = words; }

// Hides from the compiler that these are the words that they were. What it made of them it then makes again where it is next
// needed, and does not keep in twice as many registers meanwhile.
DEVICE void hide(u32x4& words) { asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w)); }

// Starts to copy 16 bytes from global to shared memory, past the first-level cache; zeros where `present` is false.
// PTX ISA, "cp.async".
DEVICE void copy_async_16(void* to, const void* from, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(present ? 16 : 0)
                 : "memory");
}

// Closes a group of this thread's copies.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `PENDING` of this thread's newest groups are under way.
template <int PENDING> DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8×8 matrices of bf16 from shared memory, lanes 8i to 8i+7 naming the rows of matrix i. Lane l gets elements
// (l / 4, 2 · (l % 4)) and the next of each. PTX ISA, "ldmatrix".
DEVICE void load_matrices(u32 (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, each matrix transposed.
DEVICE void load_matrices_transposed(u32 (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a · b, a: 16×16 and b: 16×8 of bf16, c: 16×8 of f32, in the fragments of PTX ISA, "mma.m16n8k16".
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What follows is for architectures with GROUP_PRODUCTS only.

// Makes what this thread wrote to shared memory, or copied there and waited for, visible to the group products of all who pass a
// barrier with it afterwards.
DEVICE void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders a group's registers before its products: needed where any of those that they read or add to were written.
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a batch of the group's products.
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `PENDING` of the group's newest batches are under way.
template <int PENDING> DEVICE void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The compiler moves no use of these registers across this line, in either direction.
template <u32 N> DEVICE void hold_in_place(float (&c)[N][4]) {
#pragma unroll
    for (u32 n = 0; n < N; ++n) {
        asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
    }
}

template <u32 N> DEVICE void hold_in_place(u32 (&a)[N][4]) {
#pragma unroll
    for (u32 n = 0; n < N; ++n) {
        asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
    }
}

#define GROUP_C1(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define GROUP_C4(n) GROUP_C1(n), GROUP_C1(n + 1), GROUP_C1(n + 2), GROUP_C1(n + 3)
#define GROUP_C8(n) GROUP_C4(n), GROUP_C4(n + 4)
#define GROUP_C16(n) GROUP_C8(n), GROUP_C8(n + 8)
#define GROUP_LIST_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define GROUP_LIST_32                                                                                                  \
    GROUP_LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GROUP_LIST_64                                                                                                  \
    GROUP_LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "  \
                  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Starts c = a · bᵀ, or c += a · bᵀ if `add`: the four warps of a group have 16 rows each of a and c, a: 64×16, b: N×16, both of
// bf16 in shared memory, where their rows' terms are neighbours; `describe` made their names. c is whole after the wait for the
// batch. Fragments of c are those of `multiply_add`. PTX ISA, "wgmma.mma_async".
#define GROUP_SHARED(N, LIST, C, A, B, ADD)                                                                            \
    DEVICE void multiply_group(float (&c)[N / 8][4], u64 a, u64 b, bool add) {                                         \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                              \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST "}, " A ", " B                  \
                     ", add, 1, 1, 0, 0;\n}"                                                                           \
                     : C(0)                                                                                            \
                     : "l"(a), "l"(b), "r"(static_cast<u32>(add)));                                                    \
    }
GROUP_SHARED(32, GROUP_LIST_16, GROUP_C4, "%16", "%17", "%18")
GROUP_SHARED(64, GROUP_LIST_32, GROUP_C8, "%32", "%33", "%34")

// Starts c += a · b, a: 64×16 in registers, in fragments of `multiply_add`; b: 16×N in shared memory, where the columns of each of
// its 16 terms are neighbours. a must keep its values until the wait for the batch.
#define GROUP_WEIGHTS(N, LIST, C, A, B)                                                                                \
    DEVICE void multiply_group(float (&c)[N / 8][4], const u32 (&a)[4], u64 b) {                                       \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST "}, {" A "}, " B                \
                     ", 1, 1, 1, 1;"                                                                                   \
                     : C(0)                                                                                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
    }
GROUP_WEIGHTS(64, GROUP_LIST_32, GROUP_C8, "%32, %33, %34, %35", "%36")
GROUP_WEIGHTS(128, GROUP_LIST_64, GROUP_C16, "%64, %65, %66, %67", "%68")

#endif

constexpr u32 WARP = 32;

DEVICE float to_float(bf16 x) { return bits_to_float(static_cast<u32>(x.bits) << 16); }

DEVICE u32 lane_of_warp() { return threadIdx.x % WARP; }
DEVICE u32 warp_of_block() { return threadIdx.x / WARP; }
