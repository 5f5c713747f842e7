// The engine's state: a block's threads and warps, its shared memory, and what has been said of it so far.
#pragma once

#include "fibre.hpp"

#include "../platform.cuh"

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace emulator {
namespace {

constexpr u32 LANES = 32;
constexpr u32 GROUP_WARPS = 4;
constexpr u8 POISON = 0xFF;

// A copy that was asked for and has not been waited for.
struct Copy {
    void* to;
    const void* from;
    bool present;
    u64 group;
};

enum class State { Ready, AtBarrier, WithWarp, Done };

struct Thread {
    Execution execution;
    std::unique_ptr<Stack> stack = std::make_unique<Stack>();
    State state = State::Done;
    Index index{};
    Site site;
    std::vector<Copy> copies;
    u64 groups = 0;
    // Pieces of 16 bytes of shared memory that it wrote since it last published.
    std::vector<u32> written;
};

// A warp's share of a group's product that was started and not waited for. Nothing is done before the wait: so it shows where
// operands change too early, or a result is used.
struct Product {
    GroupProduct what;
    float* c[LANES];
    const u32* at[LANES];
    u32 weights[LANES][4];
    u64 batch;
};

// What one of a group's warps did: all four must do the same.
struct Step {
    Together what;
    Site site;
    u64 a, b;
};

struct Group {
    std::vector<Step> steps;
};

struct Warp {
    u32 arrived = 0;
    Together what{};
    Site site;
    Operands operands[LANES];
    std::vector<Product> products;
    u64 batches = 0;
    // Steps of its group's that it has done, and whether a fence stands before its next product.
    std::size_t steps = 0;
    bool begun = false;
};

// Shared memory whose ends are guarded by pages that may not be touched.
class Shared {
  public:
    static constexpr std::size_t MOST = 256 * 1024;

    Shared() {
        const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        void* memory = mmap(nullptr, MOST + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) std::abort();
        first_ = static_cast<u8*>(memory) + page;
        page_ = page;
    }

    void resize(std::size_t bytes) {
        const std::size_t pages = (bytes + page_ - 1) / page_ * page_;
        if (mprotect(first_, MOST, PROT_NONE) != 0) std::abort();
        if (pages > 0 && mprotect(first_ + MOST - pages, pages, PROT_READ | PROT_WRITE) != 0) std::abort();
        bytes_ = bytes;
    }

    // A GPU's dynamic shared memory begins at a multiple of 16 at least, of 1024 where products of groups need it, and ends here
    // at the guard or as near to it as that allows.
    static constexpr std::size_t ALIGNMENT = GROUP_PRODUCTS ? 1024 : 16;
    u8* begin() const { return first_ + MOST - (bytes_ + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }
    // Where an address in the 256 KiB that descriptors can name is, and the other way round.
    u8* at(u32 address) const { return first_ + address; }
    u32 address(const void* at) const { return static_cast<u32>(static_cast<const u8*>(at) - first_); }
    bool holds(const void* at, std::size_t bytes) const {
        const auto* byte = static_cast<const u8*>(at);
        return byte >= begin() && byte + bytes <= first_ + MOST;
    }
    void poison() {
        if (bytes_ > 0) std::memset(begin(), POISON, static_cast<std::size_t>(first_ + MOST - begin()));
    }

  private:
    u8* first_;
    std::size_t page_;
    std::size_t bytes_ = 0;
};

struct Kernel {
    const char* name;
    u32 threads_max;
    void (*invoke)(void** arguments);
};

struct Engine {
    std::mutex lock;
    Execution scheduler;
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Warp> warps;
    std::vector<Group> groups;
    Shared shared;
    // For each piece of 16 bytes of shared memory, whether what is there was published to products of groups.
    std::vector<bool> unpublished = std::vector<bool>(Shared::MOST / 16);
    Thread* running = nullptr;
    const Kernel* kernel = nullptr;
    void** arguments = nullptr;
    u32 at_barrier = 0, done = 0, count = 0;
    // Rows that `ldmatrix` read from banks that another row of the same phase took, since it was last asked.
    u64 bank_conflicts = 0;
    std::string error;
};

Engine& engine() {
    static Engine engine;
    return engine;
}

std::string text(const Site& site) {
    const std::string file = site.file_name();
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

bool same(const Site& a, const Site& b) {
    return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string text(const Index& index) {
    return std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z);
}

// Back to the scheduler, until it comes back.
void yield() {
    Engine& e = engine();
    Thread* self = e.running;
    switch_to(self->execution, e.scheduler);
}

[[noreturn]] void fail(const std::string& what) {
    Engine& e = engine();
    e.error = std::string(e.kernel->name) + ", block " + text(place.block) + ", thread " + text(place.thread) + ": " + what;
    yield();
    std::abort();
}

u32 number_of(const Index& index, const Index& size) { return index.x + size.x * (index.y + size.y * index.z); }

Warp& warp_of(const Thread& thread) { return engine().warps[number_of(thread.index, place.threads) / LANES]; }

float half_of(u32 pair, u32 half) { return bits_to_float(half == 0 ? pair << 16 : pair & 0xFFFF0000u); }

} // namespace
} // namespace emulator
