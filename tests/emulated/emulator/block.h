// One block of threads in flight: who may run next, who waits at the barrier, and what went wrong.
// Threads change only at barriers and warp operations, in an order that the schedule chooses.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

constexpr int kWarpSize = 32;

struct Thread {
    Context context;
    dim3 index;
    int number = 0;
    int barriers = 0, warp_barriers = 0;  // that it has come to
    int lane() const { return number % kWarpSize; }
    int warp() const { return number / kWarpSize; }
};

// One warp operation that some lanes of a mask have reached.
struct Meeting {
    uint32_t mask = 0, arrived = 0;
    int64_t what = 0;  // operation and line
    std::vector<Thread*> waiting;
    uint64_t given[kWarpSize];
    int source[kWarpSize];  // lane that a shuffle reads
};

struct Warp {
    std::vector<Meeting> meetings;  // of disjoint masks
    uint32_t alive = 0;
    uint64_t taken[kWarpSize];
    // Warp barriers passed: of all lanes, and of each pair of lanes.
    uint32_t barriers = 0, whole = 0, common[kWarpSize][kWarpSize] = {};
};

// 0: by thread number, 1: from the last, others: shuffled by this seed.
inline int schedule = 0;

// Every thread walks through this one of its barriers, counted from 0, as if the source did not have it; -1: none.
inline int skipped_barrier = -1, skipped_warp_barrier = -1;

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Thread*> ready, at_barrier;
    size_t next = 0;
    Thread host;
    Thread* current = nullptr;
    dim3 shape, grid, index;
    int alive = 0;
    int64_t serial = 0;          // of all blocks ever run
    uint32_t barriers = 0;       // __syncthreads passed
    int votes = 0, counted = 0;  // of __syncthreads_count
    std::string failure;
    std::function<void()> kernel;
    std::mt19937 random;
    std::unique_ptr<unsigned char[]> stacks;
    size_t stack_count = 0;
};

inline Block block;

inline void run(Thread* thread) {
    Thread* before = block.current;
    if (thread == before) return;
    block.current = thread;
    switch_context(before->context, thread->context);
}

// Gives up the block: control goes back to the host, and no thread runs again.
inline void fail(const std::string& reason) {
    if (block.failure.empty()) block.failure = reason;
    run(&block.host);
}

inline void make_ready(std::vector<Thread*>& threads) {
    if (schedule == 1) std::reverse(threads.begin(), threads.end());
    if (schedule > 1) std::shuffle(threads.begin(), threads.end(), block.random);
    block.ready.insert(block.ready.end(), threads.begin(), threads.end());
    threads.clear();
}

inline void run_next() {
    if (block.next == block.ready.size()) return run(&block.host);
    Thread* thread = block.ready[block.next++];
    if (block.next > 4096) {
        block.ready.erase(block.ready.begin(), block.ready.begin() + block.next);
        block.next = 0;
    }
    run(thread);
}

inline void open_barrier() {
    block.counted = block.votes;
    block.votes = 0;
    ++block.barriers;
    make_ready(block.at_barrier);
}

inline int block_barrier(bool vote) {
    if (block.current->barriers++ == skipped_barrier) return vote;
    block.votes += vote;
    block.at_barrier.push_back(block.current);
    if (int(block.at_barrier.size()) == block.alive) open_barrier();
    run_next();
    return block.counted;
}

}  // namespace emulator
