// Small kernels, most of them wrong in one way, and the same without the mistake.
#include "samples.h"

#include <map>

#include "emulator.h"

namespace emulator {
namespace {

constexpr int kThreads = 64;

// Every thread reads its neighbour's value.
template <bool kBarrier>
__global__ void neighbours(float* out) {
    FASTLORA_SHARED(float, values, kThreads);
    const int t = int(threadIdx.x);
    values[t] = float(t);
    if (kBarrier) __syncthreads();
    out[t] = values[(t + 1) % kThreads];
}

// The same within a warp: a shuffle between the write and the read orders nothing.
template <bool kBarrier>
__global__ void neighbours_in_warp(float* out) {
    const Traced<float> values = dynamic_shared<float>();
    const int t = int(threadIdx.x), next = t / 32 * 32 + (t + 1) % 32;
    values[t] = float(t);
    const float other = __shfl_xor_sync(0xffffffffu, float(t), 1);
    if (kBarrier) __syncwarp();
    out[t] = values[next] + other;
}

// The second barrier is missing: a fast thread overwrites what a slow one has yet to read.
template <bool kBarrier>
__global__ void overwriting(float* out) {
    FASTLORA_SHARED(float, value, 1);
    float sum = 0;
    for (int i = 0; i < 3; ++i) {
        if (int(threadIdx.x) == i) value[0] = float(i);
        __syncthreads();
        sum += value[0];
        if (kBarrier) __syncthreads();
    }
    out[threadIdx.x] = sum;
}

__global__ void half_at_the_barrier(float* out) {
    if (threadIdx.x < 16)
        __syncthreads();
    else
        out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.f, 1);
}

__global__ void divergent_shuffles(float* out) {
    if (threadIdx.x < 16)
        out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.f, 1);
    else
        out[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1.f, 1);
}

__global__ void outside_its_mask(float* out) { out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.f, 1); }

__global__ void ended_lane(float* out) {
    if (threadIdx.x % 32 == 31) return;
    __syncwarp();
    out[threadIdx.x] = 0;
}

// Half warps by themselves are fine.
__global__ void half_warps(float* out) {
    const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
    float x = float(threadIdx.x);
    for (int d = 8; d > 0; d /= 2) x += __shfl_xor_sync(mask, x, d, 16);
    out[threadIdx.x] = x;
}

__global__ void outside_shared(float* out) {
    FASTLORA_SHARED(float, values, kThreads);
    values[threadIdx.x + 1] = 0;
    out[threadIdx.x] = 0;
}

// Shared memory that nobody wrote is NaN in every block, also after a block that wrote it.
__global__ void poison(float* out) {
    FASTLORA_SHARED(float, fixed, kThreads);
    const Traced<float> dynamic = dynamic_shared<float>();
    const int t = int(threadIdx.x);
    const float x = fixed[t], y = dynamic[t];
    out[t] = x == x || y == y ? -1.f : 0.f;
    fixed[t] = dynamic[t] = 1;
}

// Blocks that write to one word of global memory.
__global__ void shared_by_blocks(float* out) {
    const Traced<float> to = out;
    to[threadIdx.x] = 1;
}

struct Sample {
    void (*kernel)(float*);
    int blocks = 1;
    size_t dynamic_bytes = kThreads * sizeof(float);
};

const std::map<std::string, Sample> kSamples = {
    {"barrier", {neighbours<true>}},
    {"no barrier", {neighbours<false>}},
    {"warp barrier", {neighbours_in_warp<true>}},
    {"no warp barrier", {neighbours_in_warp<false>}},
    {"two barriers", {overwriting<true>}},
    {"second barrier missing", {overwriting<false>}},
    {"half at the barrier", {half_at_the_barrier}},
    {"divergent shuffles", {divergent_shuffles}},
    {"outside its mask", {outside_its_mask}},
    {"ended lane", {ended_lane}},
    {"half warps", {half_warps}},
    {"outside shared", {outside_shared}},
    {"poison", {poison, 3}},
    {"shared by blocks", {shared_by_blocks, 2}},
    {"48 KB", {half_warps, 1, kWithoutAsking}},
    {"48 KB and static arrays", {neighbours<true>, 1, kWithoutAsking}},
};

}  // namespace

std::string run_sample(const std::string& name) {
    static float out[kThreads];
    const Sample& sample = kSamples.at(name);
    std::string failure =
        launch(dim3(sample.blocks), dim3(kThreads), sample.dynamic_bytes, [&] { sample.kernel(out); });
    for (const float x : out)
        if (failure.empty() && x < 0) failure = "shared memory was not poisoned";
    return failure;
}

}  // namespace emulator
