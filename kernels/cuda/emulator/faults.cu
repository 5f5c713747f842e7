// Kernels that are wrong on purpose, each in one way: what the emulator must notice. They are compiled for it alone.

#include "../mma.cuh"

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

// What follows multiplies in groups: 64 rows and 64 columns of 64 terms, all of them ones, in one tile.
enum class Fault { None, Unpublished, Unfenced, Unfinished, Weights, OneWarp, Base, Early };

template <Fault FAULT> DEVICE void multiply_wrongly(float* out) {
    DYNAMIC_SHARED(dynamic);
    const Tile<64> tile = {dynamic};
    const u32 ones = pack_bf16(1.0f, 1.0f);
    for (u32 piece = threadIdx.x; piece < 64 * 8; piece += blockDim.x) {
        store_shared(tile.piece(piece / 8, piece % 8), u32x4{ones, ones, ones, ones});
    }
    if (FAULT != Fault::Unpublished) publish_to_products();
    sync_block();
    Accumulators<64> c[1];
    clear<1, 64>(c);
    Weights<64> weights;
    for (u32 i = 0; i < 16; ++i) weights[i / 4][i % 4] = ones;
    if (FAULT != Fault::Unfenced) begin_products();
    if (FAULT == Fault::OneWarp && warp_of_block() == 3) return;
    if (FAULT == Fault::Weights) {
        start_weights<64, 64>(c[0], weights, tile);
        commit_products();
        weights[0][0] = 0;
    } else {
        start_transposed<64, 64>(c[0], tile, 0, {tile.memory + (FAULT == Fault::Base ? 128 : 0)});
        commit_products();
    }
    if (FAULT == Fault::Unfinished) return;
    if (FAULT == Fault::Early) out[threadIdx.x] = c[0][0][0];
    wait_for_products<0>();
    if (FAULT != Fault::Early) out[threadIdx.x] = c[0][0][0];
}

KERNEL(fault_group_none, 1024, 1)(float* out) { multiply_wrongly<Fault::None>(out); }
// Multiplies what was stored and not published.
KERNEL(fault_group_unpublished, 1024, 1)(float* out) { multiply_wrongly<Fault::Unpublished>(out); }
// Multiplies without a fence for its registers.
KERNEL(fault_group_unfenced, 1024, 1)(float* out) { multiply_wrongly<Fault::Unfenced>(out); }
// Ends while a product is under way.
KERNEL(fault_group_unfinished, 1024, 1)(float* out) { multiply_wrongly<Fault::Unfinished>(out); }
// Changes a product's registers before the wait.
KERNEL(fault_group_weights, 1024, 1)(float* out) { multiply_wrongly<Fault::Weights>(out); }
// One warp of four stays away.
KERNEL(fault_group_one_warp, 1024, 1)(float* out) { multiply_wrongly<Fault::OneWarp>(out); }
// A tile that begins in the middle of the pattern.
KERNEL(fault_group_base, 1024, 1)(float* out) { multiply_wrongly<Fault::Base>(out); }
// Reads a result before the wait.
KERNEL(fault_group_early, 1024, 1)(float* out) { multiply_wrongly<Fault::Early>(out); }
