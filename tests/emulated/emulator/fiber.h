// Stacks of their own for the threads of a block, and the switch from one to another.
#pragma once
#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

constexpr size_t kStackBytes = 128 * 1024;

#if defined(__x86_64__)

struct Context {
    void* stack_pointer = nullptr;
};

// Saves the registers that a call preserves and takes those of the other side. `noipa`: the compiler must not look
// inside and conclude that other registers survive.
__attribute__((naked, noinline, noipa)) inline void exchange_stacks(void** /*from*/, void* /*to*/) {
    asm volatile(
        "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15; movq %rsp, (%rdi); movq %rsi, %rsp;"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

inline void switch_context(Context& from, Context& to) { exchange_stacks(&from.stack_pointer, to.stack_pointer); }

// `entry` never returns.
inline void make_context(Context& context, unsigned char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + kStackBytes) & ~uintptr_t(15));
    *--top = nullptr;  // keeps the stack aligned as at a call
    *--top = reinterpret_cast<void*>(entry);
    context.stack_pointer = top - 6;
}

#else

struct Context {
    ucontext_t saved;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }

inline void make_context(Context& context, unsigned char* stack, void (*entry)()) {
    getcontext(&context.saved);
    context.saved.uc_stack.ss_sp = stack;
    context.saved.uc_stack.ss_size = kStackBytes;
    context.saved.uc_link = nullptr;
    makecontext(&context.saved, entry, 0);
}

#endif

}  // namespace emulator
