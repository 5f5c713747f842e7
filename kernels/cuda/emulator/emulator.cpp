// Runs the kernels on the host: every CUDA thread is a fibre, so barriers, shuffles and tensor core products mean what they mean on
// a GPU.
//
// What it reports as an error of the launch: a barrier or a warp's operation that not all reach, or reach from different places;
// a thread that ends with copies or a group's products under way; operands that an instruction would not take (alignment, shared
// memory, descriptors); a group's product of what was not published to it, without the fence before it, or with registers that
// changed meanwhile; a block larger than a kernel's bound. What makes wrong numbers, for the tests to see: shared memory is poisoned with NaN before each
// block, the target of an asynchronous copy until its thread has waited; threads and blocks run in any wanted order, so
// what depends on it differs. Accesses outside of dynamic shared memory fault, and the handler names kernel and thread.

#include "engine.hpp"
#include "group.hpp"

#include "../attention.cuh"

#include <algorithm>
#include <csignal>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#ifdef TARAZED_EMULATOR_SWITCH
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size emulator_switch, .-emulator_switch
)");
#endif

namespace pointwise {
#include "../pointwise.cu"
}
namespace rows {
#include "../rows.cu"
}
namespace optimizer {
#include "../optimizer.cu"
}
namespace attention_forward {
#include "../attention_forward.cu"
}
namespace attention_backward {
#include "../attention_backward.cu"
}
namespace faults {
#include "faults.cu"
}

extern "C" u8 __start_emulated_shared[] __attribute__((visibility("hidden")));
extern "C" u8 __stop_emulated_shared[] __attribute__((visibility("hidden")));

namespace emulator {

Place place;

namespace {

// What every fibre runs.
void body() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &engine().scheduler.bottom, &engine().scheduler.bytes);
#endif
    Engine& e = engine();
    e.kernel->invoke(e.arguments);
    if (!e.running->copies.empty()) fail("ended with asynchronous copies under way");
    if (!warp_of(*e.running).products.empty()) fail("ended with a group's products under way");
    e.running->state = State::Done;
    ++e.done;
    yield();
    std::abort();
}

void shuffle(Warp& warp) {
    u8 values[LANES][8];
    for (u32 lane = 0; lane < LANES; ++lane) {
        std::memcpy(values[lane], warp.operands[lane].in[0], warp.operands[lane].number >> 8);
    }
    for (u32 lane = 0; lane < LANES; ++lane) {
        const Operands& own = warp.operands[lane];
        std::memcpy(own.out, values[(lane ^ (own.number & 0xFF)) % LANES], own.number >> 8);
    }
}

void vote(Warp& warp) {
    u32 votes = 0;
    for (u32 lane = 0; lane < LANES; ++lane) votes |= static_cast<u32>(warp.operands[lane].number != 0) << lane;
    for (u32 lane = 0; lane < LANES; ++lane) std::memcpy(warp.operands[lane].out, &votes, sizeof votes);
}

void load(Warp& warp, bool transposed) {
    for (u32 lane = 0; lane < LANES; ++lane) {
        const void* row = warp.operands[lane].in[0];
        if (!engine().shared.holds(row, 16)) fail("ldmatrix reads outside of dynamic shared memory");
        if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) fail("ldmatrix reads a row that is not aligned to 16 bytes");
    }
    for (u32 matrix = 0; matrix < 4; ++matrix) {
        // Each matrix is one phase: its eight rows of 16 bytes should meet all 32 banks.
        u32 banks = 0;
        for (u32 row = 0; row < 8; ++row) {
            const auto address = reinterpret_cast<std::uintptr_t>(warp.operands[8 * matrix + row].in[0]);
            banks |= 1u << (address / 16 % 8);
        }
        engine().bank_conflicts += 8 - count_bits(banks);
        u16 elements[8][8];
        for (u32 row = 0; row < 8; ++row) std::memcpy(elements[row], warp.operands[8 * matrix + row].in[0], 16);
        for (u32 lane = 0; lane < LANES; ++lane) {
            const u32 row = lane / 4, column = lane % 4 * 2;
            const u16 low = transposed ? elements[column][row] : elements[row][column];
            const u16 high = transposed ? elements[column + 1][row] : elements[row][column + 1];
            static_cast<u32*>(warp.operands[lane].out)[matrix] = low | static_cast<u32>(high) << 16;
        }
    }
}

// Fragments as PTX ISA, "Matrix fragments for mma.m16n8k16", lays them out.
void multiply(Warp& warp) {
    float a[16][16], b[16][8];
    for (u32 lane = 0; lane < LANES; ++lane) {
        const u32 g = lane / 4, t = lane % 4;
        const auto* a_words = static_cast<const u32*>(warp.operands[lane].in[0]);
        const auto* b_words = static_cast<const u32*>(warp.operands[lane].in[1]);
        for (u32 half = 0; half < 2; ++half) {
            a[g][2 * t + half] = half_of(a_words[0], half);
            a[g + 8][2 * t + half] = half_of(a_words[1], half);
            a[g][2 * t + 8 + half] = half_of(a_words[2], half);
            a[g + 8][2 * t + 8 + half] = half_of(a_words[3], half);
            b[2 * t + half][g] = half_of(b_words[0], half);
            b[2 * t + 8 + half][g] = half_of(b_words[1], half);
        }
    }
    for (u32 lane = 0; lane < LANES; ++lane) {
        const u32 g = lane / 4, t = lane % 4;
        auto* c = static_cast<float*>(warp.operands[lane].out);
        for (u32 i = 0; i < 4; ++i) {
            double sum = c[i];
            for (u32 k = 0; k < 16; ++k) sum += static_cast<double>(a[g + i / 2 * 8][k]) * b[k][2 * t + i % 2];
            c[i] = static_cast<float>(sum);
        }
    }
}

void perform(Warp& warp) {
    switch (warp.what) {
    case Together::Sync:
        break;
    case Together::Shuffle:
        return shuffle(warp);
    case Together::Vote:
        return vote(warp);
    case Together::LoadMatrices:
        return load(warp, false);
    case Together::LoadMatricesTransposed:
        return load(warp, true);
    case Together::MultiplyAdd:
        return multiply(warp);
    case Together::BeginProducts:
        warp.begun = true;
        return step(warp, 0, 0);
    case Together::MultiplyGroup:
        return start_product(warp);
    case Together::CommitProducts:
        ++warp.batches;
        return step(warp, 0, 0);
    case Together::WaitForProducts:
        return wait_for_products(warp);
    }
}

// The order in which a block's threads run, and how many of them take turns before the next have theirs.
struct Schedule {
    std::vector<u32> order;
    u32 run;
};

// Runs one block's fibres until all are done. Returns false where that cannot be, and says why.
bool run_block(const Schedule& schedule) {
    Engine& e = engine();
    e.at_barrier = e.done = 0;
    e.warps.assign(e.warps.size(), Warp{});
    e.groups.assign((e.warps.size() + GROUP_WARPS - 1) / GROUP_WARPS, Group{});
    e.unpublished.assign(e.unpublished.size(), false);
    std::memset(__start_emulated_shared, POISON, static_cast<std::size_t>(__stop_emulated_shared - __start_emulated_shared));
    e.shared.poison();
    for (u32 number : schedule.order) {
        Thread& thread = *e.threads[number];
        thread.state = State::Ready;
        thread.copies.clear();
        thread.groups = 0;
        thread.written.clear();
        const Index& size = place.threads;
        thread.index = {number % size.x, number / size.x % size.y, number / size.x / size.y};
        thread.stack->begin(thread.execution, body);
    }
    while (e.done < e.count) {
        bool moved = false;
        for (u32 first = 0; first < e.count; first += schedule.run) {
            // A run of threads goes on until none of it can, then the next.
            bool again = true;
            while (again) {
                again = false;
                for (u32 at = first; at < first + schedule.run; ++at) {
                    Thread& thread = *e.threads[schedule.order[at]];
                    if (thread.state != State::Ready) continue;
                    again = moved = true;
                    e.running = &thread;
                    place.thread = thread.index;
                    switch_to(e.scheduler, thread.execution);
                    if (!e.error.empty()) return false;
                }
            }
        }
        if (moved) continue;
        std::string waiting;
        for (const auto& thread : e.threads) {
            if (thread->state == State::AtBarrier || thread->state == State::WithWarp) waiting = text(thread->site);
        }
        e.error = std::string(e.kernel->name) + ", block " + text(place.block) + ": " + std::to_string(e.done) + " of " +
                  std::to_string(e.count) + " threads ended, " + std::to_string(e.at_barrier) +
                  " wait at a barrier, and none can go on; one waits at " + waiting;
        return false;
    }
    for (const Warp& warp : e.warps) {
        const auto number = static_cast<std::size_t>(&warp - e.warps.data());
        if (warp.steps == e.groups[number / GROUP_WARPS].steps.size()) continue;
        e.error = std::string(e.kernel->name) + ", block " + text(place.block) +
                  ": not all warps of a group came to its product at " +
                  text(e.groups[number / GROUP_WARPS].steps[warp.steps].site);
        return false;
    }
    return true;
}

std::vector<u32> order_of(u32 count, u64 order) {
    std::vector<u32> numbers(count);
    for (u32 number = 0; number < count; ++number) numbers[number] = order == 1 ? count - 1 - number : number;
    if (order > 1) std::shuffle(numbers.begin(), numbers.end(), std::mt19937_64(order));
    return numbers;
}

// Either warp by warp, each as far as it gets: what one warp does must not need that another has not gone on. Or all threads in turn,
// in an order that mixes the warps.
Schedule schedule_of(u32 count, u64 order) {
    if (order > 1 && order % 2 == 0) return {order_of(count, order), count};
    std::vector<u32> threads;
    for (u32 warp : order_of(count / LANES, order)) {
        for (u32 lane : order_of(LANES, order)) threads.push_back(warp * LANES + lane);
    }
    return {threads, LANES};
}

template <typename... A, std::size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

template <typename... A> void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>{});
}

#define ENTRY(unit, name) {#name, unit::name##_threads, [](void** arguments) { call(unit::name, arguments); }}
const Kernel KERNELS[] = {
    ENTRY(pointwise, convert_f32_bf16),
    ENTRY(pointwise, convert_bf16_f32),
    ENTRY(pointwise, add_f32),
    ENTRY(pointwise, add_bf16),
    ENTRY(pointwise, add_f32_bf16),
    ENTRY(pointwise, rope),
    ENTRY(pointwise, swiglu),
    ENTRY(pointwise, swiglu_backward),
    ENTRY(pointwise, embed),
    ENTRY(pointwise, embed_sort),
    ENTRY(pointwise, embed_order),
    ENTRY(pointwise, embed_backward),
    ENTRY(rows, rms_norm),
    ENTRY(rows, rms_norm_backward),
    ENTRY(rows, rms_norm_backward_wide),
    ENTRY(rows, rms_norm_weight_gradient),
    ENTRY(rows, cross_entropy),
    ENTRY(rows, square_sums),
    ENTRY(optimizer, adamw),
    ENTRY(optimizer, block_hashes),
    ENTRY(attention_forward, attention_32),
    ENTRY(attention_forward, attention_64),
    ENTRY(attention_forward, attention_128),
    ENTRY(attention_backward, attention_delta),
    ENTRY(attention_backward, attention_group_sums),
    ENTRY(attention_backward, attention_keys_32),
    ENTRY(attention_backward, attention_keys_64),
    ENTRY(attention_backward, attention_keys_128),
    ENTRY(attention_backward, attention_queries_32),
    ENTRY(attention_backward, attention_queries_64),
    ENTRY(attention_backward, attention_queries_128),
    ENTRY(faults, fault_missed_barrier),
    ENTRY(faults, fault_two_barriers),
    ENTRY(faults, fault_half_warp),
    ENTRY(faults, fault_divergence),
    ENTRY(faults, fault_unwritten),
    ENTRY(faults, fault_race),
    ENTRY(faults, fault_no_wait),
    ENTRY(faults, fault_left_copy),
    ENTRY(faults, fault_alignment),
    ENTRY(faults, fault_beyond),
    ENTRY(faults, fault_banks),
    ENTRY(faults, fault_group_none),
    ENTRY(faults, fault_group_unpublished),
    ENTRY(faults, fault_group_unfenced),
    ENTRY(faults, fault_group_unfinished),
    ENTRY(faults, fault_group_weights),
    ENTRY(faults, fault_group_one_warp),
    ENTRY(faults, fault_group_base),
    ENTRY(faults, fault_group_early),
};

// Names the thread whose access faulted, then lets the fault take its course.
void on_fault(int signal, siginfo_t* info, void*) {
    char line[256];
    const int length = std::snprintf(line, sizeof line, "emulator: %s, block %u,%u,%u, thread %u,%u,%u: access to %p\n",
                                     engine().kernel->name, place.block.x, place.block.y, place.block.z, place.thread.x,
                                     place.thread.y, place.thread.z, info->si_addr);
    [[maybe_unused]] const auto written = write(2, line, static_cast<std::size_t>(length));
    std::signal(signal, SIG_DFL);
}

// The handler in place while a launch runs.
class Faults {
  public:
    Faults() {
        stack_t stack{};
        stack.ss_sp = memory_;
        stack.ss_size = sizeof memory_;
        sigaltstack(&stack, &stack_before_);
        struct sigaction action {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &before_);
    }
    ~Faults() {
        sigaction(SIGSEGV, &before_, nullptr);
        sigaltstack(&stack_before_, nullptr);
    }
    Faults(const Faults&) = delete;

  private:
    struct sigaction before_ {};
    stack_t stack_before_{};
    alignas(16) char memory_[32 * 1024];
};

std::string check(const Kernel* kernel, const char* name, const Index& block, u32 shared_bytes) {
    if (kernel == nullptr) return std::string("there is no kernel ") + name;
    const u64 threads = u64(block.x) * block.y * block.z;
    if (threads == 0 || threads % LANES != 0) return std::string(name) + ": blocks are whole warps";
    if (threads > kernel->threads_max) {
        return std::string(name) + ": " + std::to_string(threads) + " threads, where its bound is " +
               std::to_string(kernel->threads_max);
    }
    if (shared_bytes > Shared::MOST) return std::string(name) + ": too much shared memory";
    return {};
}

} // namespace

u8* dynamic_shared() { return engine().shared.begin(); }

void sync_block(const Site& site) {
    Engine& e = engine();
    Thread* self = e.running;
    self->site = site;
    ++e.at_barrier;
    if (e.at_barrier < e.count) {
        self->state = State::AtBarrier;
        return yield();
    }
    e.at_barrier = 0;
    for (u32 number = 0; number < e.count; ++number) {
        Thread& thread = *e.threads[number];
        if (!same(thread.site, site)) {
            fail("a barrier at " + text(site) + " meets one at " + text(thread.site));
        }
        thread.state = State::Ready;
    }
}

void together(Together what, const Operands& operands, const Site& site) {
    Engine& e = engine();
    Thread* self = e.running;
    const u32 number = number_of(self->index, place.threads), first = number / LANES * LANES;
    Warp& warp = e.warps[number / LANES];
    if (warp.arrived == 0) {
        warp.what = what;
        warp.site = site;
    } else if (warp.what != what || !same(warp.site, site)) {
        fail("lanes of a warp diverge: " + text(site) + " meets " + text(warp.site));
    }
    self->site = site;
    warp.operands[number - first] = operands;
    ++warp.arrived;
    if (warp.arrived < LANES) {
        self->state = State::WithWarp;
        return yield();
    }
    warp.arrived = 0;
    perform(warp);
    for (u32 lane = 0; lane < LANES; ++lane) e.threads[first + lane]->state = State::Ready;
}

u32 shared_address(const void* pointer) { return engine().shared.address(pointer); }

// Notes that the running thread wrote 16 bytes of shared memory.
void written(const void* at) {
    Engine& e = engine();
    if (!GROUP_PRODUCTS || !e.shared.holds(at, 16)) return;
    const u32 piece = e.shared.address(at) / 16;
    e.unpublished[piece] = true;
    e.running->written.push_back(piece);
}

void store_shared(void* to, const void* words) {
    std::memcpy(to, words, 16);
    written(to);
}

void publish() {
    Engine& e = engine();
    for (u32 piece : e.running->written) e.unpublished[piece] = false;
    e.running->written.clear();
}

void copy_async(void* to, const void* from, bool present) {
    Engine& e = engine();
    if (!e.shared.holds(to, 16)) fail("cp.async writes outside of dynamic shared memory");
    if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % 16 != 0) {
        fail("cp.async of an address that is not aligned to 16 bytes");
    }
    std::memset(to, POISON, 16);
    e.running->copies.push_back({to, from, present, e.running->groups});
}

void copy_async_commit() { ++engine().running->groups; }

void copy_async_wait(u32 pending) {
    Thread* self = engine().running;
    const auto due = [&](const Copy& copy) { return copy.group + pending < self->groups; };
    for (const Copy& copy : self->copies) {
        if (!due(copy)) continue;
        if (copy.present) {
            std::memcpy(copy.to, copy.from, 16);
        } else {
            std::memset(copy.to, 0, 16);
        }
        written(copy.to);
    }
    std::erase_if(self->copies, due);
}

} // namespace emulator

// How often `ldmatrix` met a bank twice since this was last asked: a number of rows.
extern "C" __attribute__((visibility("default"))) u64 tarazed_emulator_bank_conflicts() {
    emulator::Engine& e = emulator::engine();
    const std::lock_guard guard(e.lock);
    return std::exchange(e.bank_conflicts, 0);
}

// Runs a kernel to its end. `order` is that of blocks and of warps: 0 forward, 1 backward, any other the seed of a random one; even
// seeds mix the threads of all warps, else each warp runs as far as it gets.
// `arguments` points to the values, as for the CUDA driver. Returns 0, or 1 with the cause in `error`, cut to `error_bytes`.
extern "C" __attribute__((visibility("default"))) int tarazed_emulator_launch(const char* name, const u32* grid,
                                                                              const u32* block, u32 shared_bytes,
                                                                              void** arguments, u64 order, char* error,
                                                                              u64 error_bytes) {
    using namespace emulator;
    Engine& e = engine();
    const std::lock_guard guard(e.lock);
    const Faults faults;
    const auto* found = std::find_if(std::begin(KERNELS), std::end(KERNELS),
                                     [&](const Kernel& kernel) { return std::strcmp(kernel.name, name) == 0; });
    e.kernel = found == std::end(KERNELS) ? nullptr : found;
    place.threads = {block[0], block[1], block[2]};
    place.blocks = {grid[0], grid[1], grid[2]};
    e.error = check(e.kernel, name, place.threads, shared_bytes);
    if (e.error.empty()) {
        e.arguments = arguments;
        e.count = block[0] * block[1] * block[2];
        e.warps.assign(e.count / LANES, Warp{});
        while (e.threads.size() < e.count) e.threads.push_back(std::make_unique<Thread>());
        e.shared.resize(shared_bytes);
        const Schedule schedule = schedule_of(e.count, order);
        for (u32 number : order_of(grid[0] * grid[1] * grid[2], order)) {
            place.block = {number % grid[0], number / grid[0] % grid[1], number / grid[0] / grid[1]};
            if (!run_block(schedule)) break;
        }
    }
    if (e.error.empty()) return 0;
    if (error_bytes > 0) {
        std::strncpy(error, e.error.c_str(), error_bytes - 1);
        error[error_bytes - 1] = 0;
    }
    return 1;
}
