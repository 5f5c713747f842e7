// Kernels that are wrong on purpose, each in one way: what the emulator must notice. They are compiled for it alone.

#include "../common.cuh"

// Only the first warp comes to the barrier.
KERNEL(fault_missed_barrier, 1024, 1)(float* out) {
    if (warp_of_block() == 0) sync_block();
    out[threadIdx.x] = 1.0f;
}

// All come to a barrier, and not to the same one.
KERNEL(fault_two_barriers, 1024, 1)(float* out) {
    if (warp_of_block() == 0) {
        sync_block();
    } else {
        sync_block();
    }
    out[threadIdx.x] = 1.0f;
}

// Half of a warp exchanges values.
KERNEL(fault_half_warp, 1024, 1)(float* out) {
    if (lane_of_warp() < WARP / 2) out[threadIdx.x] = shuffle_xor(1.0f, 1);
}

// One half exchanges values while the other votes.
KERNEL(fault_divergence, 1024, 1)(float* out) {
    if (lane_of_warp() < WARP / 2) {
        out[threadIdx.x] = shuffle_xor(1.0f, 1);
    } else {
        out[threadIdx.x] = static_cast<float>(vote(true));
    }
}

// Reads what nobody wrote.
KERNEL(fault_unwritten, 1024, 1)(float* out) {
    SHARED float values[1024];
    DYNAMIC_SHARED(dynamic);
    out[threadIdx.x] = values[threadIdx.x] + reinterpret_cast<const float*>(dynamic)[threadIdx.x];
}

// Reads its neighbour's value without a barrier.
KERNEL(fault_race, 1024, 1)(float* out) {
    SHARED float values[1024];
    values[threadIdx.x] = 0.0f;
    sync_block();
    values[threadIdx.x] = static_cast<float>(threadIdx.x);
    out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

// Reads what it asked to be copied, without waiting.
KERNEL(fault_no_wait, 1024, 1)(float* out) {
    DYNAMIC_SHARED(dynamic);
    float* values = reinterpret_cast<float*>(dynamic) + 4 * threadIdx.x;
    const float before[4] = {out[threadIdx.x], 0.0f, 0.0f, 0.0f};
    for (u32 i = 0; i < 4; ++i) values[i] = before[i];
    copy_async_16(values, out + threadIdx.x / 4 * 4, true);
    copy_async_commit();
    out[threadIdx.x] = values[0];
    copy_async_wait<0>();
}

// Ends while a copy is under way.
KERNEL(fault_left_copy, 1024, 1)(float* out) {
    DYNAMIC_SHARED(dynamic);
    copy_async_16(dynamic + 16 * threadIdx.x, out + threadIdx.x / 4 * 4, true);
}

// Copies to an address that the instruction does not take.
KERNEL(fault_alignment, 1024, 1)(float* out) {
    DYNAMIC_SHARED(dynamic);
    copy_async_16(dynamic + 4, out, true);
    copy_async_wait<0>();
}

// Writes behind its dynamic shared memory.
KERNEL(fault_beyond, 1024, 1)(float* out) {
    DYNAMIC_SHARED(dynamic);
    reinterpret_cast<float*>(dynamic)[4 * blockDim.x + threadIdx.x] = out[threadIdx.x];
}

// Reads eight rows that all lie in the same banks.
KERNEL(fault_banks, 1024, 1)(float* out) {
    DYNAMIC_SHARED(dynamic);
    u32 rows[4];
    load_matrices(rows, dynamic + lane_of_warp() % 8 * 128);
    out[threadIdx.x] = static_cast<float>(rows[0]);
}
