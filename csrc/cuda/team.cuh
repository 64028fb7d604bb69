// The threads that solve one matrix: a warp, or a block whose first warp runs what is sequential while the others work
// on columns. The solvers are written once for both.
//   index()   the column of this thread, from 0; negative in a leading warp that owns none
//   leads()   whether this thread is in the warp that runs the sequential part
//   sync()    barrier that also orders memory
//   sum, max  of one value per thread, the same bits in every thread; barriers as well
#pragma once
#include "platform.h"

namespace fastlora::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// T and its machine constants, after csrc/cpu/simd.h.
template <class T>
constexpr T kEpsilon = sizeof(T) == 4 ? T(5.9604644775390625e-8) : T(1.1102230246251565e-16);
template <class T>
constexpr T kTiny = sizeof(T) == 4 ? T(1e-30) : T(1e-280);

__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double inverse_root(double x) { return rsqrt(x); }

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int d = kWarpSize / 2; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
    return x;
}

template <class T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
    for (int d = kWarpSize / 2; d > 0; d /= 2) {
        const T y = __shfl_xor_sync(kAllLanes, x, d);
        x = y > x ? y : x;
    }
    return x;
}

// One warp; matrices of up to 32 columns.
template <class T>
class WarpTeam {
  public:
    __device__ WarpTeam() : lane_(int(threadIdx.x) % kWarpSize) {}
    __device__ int index() const { return lane_; }
    __device__ bool leads() const { return true; }
    __device__ void sync() { __syncwarp(); }
    __device__ T sum(T x) {
        __syncwarp();
        return warp_sum(x);
    }
    __device__ T max(T x) {
        __syncwarp();
        return warp_max(x);
    }

  private:
    int lane_;
};

// A whole block: the leading warp, then a thread per column. `partial` [2][kMaxWarps] alternates its halves, so that a
// result is still there while the next is being written.
template <class T>
class BlockTeam {
  public:
    static constexpr int kMaxWarps = 16;
    __device__ explicit BlockTeam(Traced<T> partial) : partial_(partial) {}
    static __host__ __device__ int threads(int columns) {
        return kWarpSize + (columns + kWarpSize - 1) / kWarpSize * kWarpSize;
    }
    __device__ int index() const { return int(threadIdx.x) - kWarpSize; }
    __device__ bool leads() const { return int(threadIdx.x) < kWarpSize; }
    __device__ void sync() { __syncthreads(); }
    __device__ T sum(T x) {
        exchange(warp_sum(x));
        T total = 0;
        for (int w = 0; w < int(blockDim.x) / kWarpSize; ++w) total += current()[w];
        return total;
    }
    __device__ T max(T x) {
        exchange(warp_max(x));
        T largest = current()[0];
        for (int w = 1; w < int(blockDim.x) / kWarpSize; ++w) {
            const T y = current()[w];
            largest = y > largest ? y : largest;
        }
        return largest;
    }

  private:
    __device__ Traced<T> current() const { return partial_ + turn_ * kMaxWarps; }
    __device__ void exchange(T own) {
        turn_ ^= 1;
        if (threadIdx.x % kWarpSize == 0) current()[threadIdx.x / kWarpSize] = own;
        __syncthreads();
    }

    Traced<T> partial_;
    int turn_ = 0;
};

}  // namespace fastlora::cuda
