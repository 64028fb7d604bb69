// Runs a grid on the CPU, block after block.
#pragma once
#include <cstring>
#include <mutex>

#include "shared.h"
#include "warp.h"

namespace emulator {

inline void end_thread() {
    Thread* self = block.current;
    --block.alive;
    Warp& warp = block.warps[self->warp()];
    warp.alive &= ~(1u << self->lane());
    for (const Meeting& meeting : warp.meetings)
        if (meeting.arrived && has_lane(meeting.mask, self->lane()))
            fail("a warp operation waits for a lane that has ended");
    // Threads that have ended no longer count at the barrier.
    if (block.alive && int(block.at_barrier.size()) == block.alive) open_barrier();
    run_next();
    std::abort();
}

inline void thread_entry() {
    block.kernel();
    end_thread();
}

inline void start_block(int number) {
    const int count = int(block.threads.size());
    const dim3 grid = block.grid, shape = block.shape;
    ++block.serial;
    block.index = dim3(number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y));
    block.alive = count;
    block.at_barrier.clear();
    block.ready.clear();
    block.next = 0;
    block.votes = 0;
    block.barriers = 0;
    block.warps.assign((count + kWarpSize - 1) / kWarpSize, Warp());
    std::vector<Thread*> all;
    for (int i = 0; i < count; ++i) {
        Thread& thread = block.threads[i];
        thread.number = i;
        thread.barriers = thread.warp_barriers = 0;
        thread.index = dim3(i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y));
        block.warps[thread.warp()].alive |= 1u << thread.lane();
        make_context(thread.context, block.stacks.get() + i * kStackBytes, thread_entry);
        all.push_back(&thread);
    }
    make_ready(all);
}

constexpr size_t kWithoutAsking = 48 * 1024;

// Dynamic shared memory of a launch: what was asked for, or what every kernel has, where its static arrays count.
struct DynamicLimit {
    size_t bytes = kWithoutAsking;
    bool asked = false;
};

// Returns what went wrong, or nothing. Kernels hold only trivial objects: a failed block is abandoned as it is.
inline std::string launch(dim3 grid, dim3 shape, size_t dynamic_bytes, std::function<void()> kernel,
                          DynamicLimit limit = {}) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const size_t count = size_t(shape.x) * shape.y * shape.z;
    if (count == 0 || count > 1024) return "a block has 1 to 1024 threads, not " + std::to_string(count);
    if (dynamic_bytes > shared_limit) return "too much dynamic shared memory: " + std::to_string(dynamic_bytes);
    block.kernel = std::move(kernel);
    block.grid = grid;
    block.shape = shape;
    block.failure.clear();
    block.random.seed(schedule);
    block.threads.resize(count);
    if (block.stack_count < count) {
        block.stacks.reset(new unsigned char[count * kStackBytes]);
        block.stack_count = count;
    }
    start_shared(dynamic_bytes);
    global_words.clear();
    for (int number = 0; number < int(grid.x * grid.y * grid.z); ++number) {
        start_block(number);
        poison_shared();
        block.current = &block.host;
        run_next();
        if (block.failure.empty() && block.alive)
            block.failure = "deadlock: " + std::to_string(block.alive) + " threads wait, " +
                            std::to_string(block.at_barrier.size()) + " of them at __syncthreads";
        if (block.failure.empty() && !shared_guarded()) block.failure = "a write outside shared memory";
        const size_t static_bytes = shared_bytes() - dynamic_bytes;
        if (block.failure.empty() && shared_bytes() > shared_limit)
            block.failure = "too much shared memory: " + std::to_string(shared_bytes());
        if (block.failure.empty() && limit.asked && limit.bytes + static_bytes > shared_limit)
            block.failure = "more shared memory is asked for than a block may have beside its static arrays: " +
                            std::to_string(limit.bytes);
        if (block.failure.empty() && dynamic_bytes + (limit.asked ? 0 : static_bytes) > limit.bytes)
            block.failure = "shared memory that was not asked for: " + std::to_string(shared_bytes());
        if (!block.failure.empty()) return "block " + std::to_string(number) + ": " + block.failure;
    }
    return "";
}

}  // namespace emulator
