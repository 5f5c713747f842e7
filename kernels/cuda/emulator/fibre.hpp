// A stack of its own and a way to and from it. On x86-64 a switch is a dozen instructions; elsewhere it is `swapcontext`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <sys/mman.h>
#include <unistd.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

// Where an execution stands while another one runs.
struct Execution {
#ifdef __x86_64__
    void* stack_pointer = nullptr;
#else
    ucontext_t context{};
#endif
    // What the address sanitizer wants to know of a stack.
    void* fake_stack = nullptr;
    const void* bottom = nullptr;
    std::size_t bytes = 0;
};

#ifdef __x86_64__
extern "C" void emulator_switch(void** save, void* load);
#endif

// Leaves `from`, which goes on from here when somebody switches back to it.
inline void switch_to(Execution& from, Execution& to) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
#endif
#ifdef __x86_64__
    emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// A stack with a page behind it that may not be touched.
class Stack {
  public:
    static constexpr std::size_t BYTES = 128 * 1024;

    Stack() {
        const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        void* memory = mmap(nullptr, BYTES + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) std::abort();
        memory_ = static_cast<char*>(memory) + page;
    }
    // Stacks live as long as the program: a launch that failed leaves them in use.
    Stack(const Stack&) = delete;

    // Sets `to` to begin `entry` on this stack.
    void begin(Execution& to, void (*entry)()) {
        to.bottom = memory_;
        to.bytes = BYTES;
        to.fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
        // A fibre never returns from its first function, whose frame stays marked.
        __asan_unpoison_memory_region(memory_, BYTES);
#endif
#ifdef __x86_64__
        // Six registers that the switch restores, where it returns to, and a return address that is never used.
        auto* top = reinterpret_cast<void**>(memory_ + BYTES);
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(entry);
        for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
        to.stack_pointer = top;
#else
        getcontext(&to.context);
        to.context.uc_stack.ss_sp = memory_;
        to.context.uc_stack.ss_size = BYTES;
        to.context.uc_link = nullptr;
        makecontext(&to.context, entry, 0);
#endif
    }

  private:
    char* memory_;
};

} // namespace emulator
