// What kernels find without a header on a GPU: thread indices, barriers, warp operations, arithmetic.
// Square roots and quotients are the host's, so the last bits need not be those of a GPU.
#pragma once
#include <cmath>

#include "launch.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

#define threadIdx (emulator::block.current->index)
#define blockIdx (emulator::block.index)
#define blockDim (emulator::block.shape)
#define gridDim (emulator::block.grid)

inline void __syncthreads() { emulator::block_barrier(false); }
inline int __syncthreads_count(int vote) { return emulator::block_barrier(vote != 0); }
inline int __syncthreads_or(int vote) { return __syncthreads_count(vote) != 0; }
inline int __syncthreads_and(int vote) { return __syncthreads_count(vote == 0) == 0; }

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) { emulator::warp_barrier(mask, line); }

namespace emulator {

inline int own_lane() { return block.current->lane(); }

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
    const int group = emulator::own_lane() & ~(width - 1);
    return emulator::shuffle(mask, line, value, group | (source & (width - 1)));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int difference, int width = 32, int line = __builtin_LINE()) {
    const int lane = emulator::own_lane(), other = lane ^ difference;
    return emulator::shuffle(mask, line, value, other / width == lane / width ? other : lane);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = 32, int line = __builtin_LINE()) {
    const int lane = emulator::own_lane();
    return emulator::shuffle(mask, line, value, lane % width + distance < width ? lane + distance : lane);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = 32, int line = __builtin_LINE()) {
    const int lane = emulator::own_lane();
    return emulator::shuffle(mask, line, value, lane % width >= distance ? lane - distance : lane);
}

inline unsigned __ballot_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
    return emulator::ballot(mask, line, vote != 0);
}
inline int __any_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
    return emulator::ballot(mask, line, vote != 0) != 0;
}
inline int __all_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
    return emulator::ballot(mask, line, vote != 0) == mask;
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
