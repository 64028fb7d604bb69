// The threads that work on one matrix together: a group, which a kernel is compiled for, or a crew, chosen as it runs;
// and the small matrix operations that a crew shares.
// A group is a warp, or a block whose first warp runs what is sequential while the others work on columns. Solvers are
// written once for both:
//   index()   the column of this thread, from 0; negative in a leading warp that owns none
//   leads()   whether this thread is in the warp that runs the sequential part
//   sync()    barrier that also orders memory
//   sum, max  of one value per thread, the same bits in every thread; barriers as well
#pragma once
#include "../common/numbers.h"
#include "platform.h"

namespace fastlora::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

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
class WarpGroup {
  public:
    __device__ WarpGroup() : lane_(int(threadIdx.x) % kWarpSize) {}
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
class BlockGroup {
  public:
    static constexpr int kMaxWarps = 16;
    __device__ explicit BlockGroup(Traced<T> partial) : partial_(partial) {}
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

using Doubles = Traced<double>;
using Ints = Traced<int>;

// One warp, or the whole block. Every member calls the functions that take a crew, in the same order.
struct Crew {
    int rank, size;  // of the calling thread
    bool block;

    __device__ void sync() const {
        if (block)
            __syncthreads();
        else
            __syncwarp();
    }
    __device__ bool any(bool x) const { return block ? __syncthreads_or(x) != 0 : __any_sync(kAllLanes, x) != 0; }
};

__device__ __forceinline__ Crew whole_block() {
    return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), true};
}
__device__ __forceinline__ Crew own_warp() { return {static_cast<int>(threadIdx.x) % kWarpSize, kWarpSize, false}; }

// f(row, column) for every entry of a matrix, a column after the other, shared out among the members. Steps instead of
// divisions: code that runs once is as long as it takes to fetch. kAhead entries are on their way at once.
template <int kAhead = 1, class F>
__device__ __forceinline__ void for_entries(Crew crew, int rows, int columns, F f) {
    const int columns_on = crew.size / rows, rows_on = crew.size % rows;
    int row = crew.rank % rows;
#pragma unroll kAhead
    for (int column = crew.rank / rows; column < columns; column += columns_on) {
        f(row, column);
        row += rows_on;
        if (row >= rows) row -= rows, ++column;
    }
}

template <class Pointer>
struct View {
    Pointer data;
    int row, column;  // elements between rows and between columns

    __device__ double operator()(int i, int j) const { return data[i * row + j * column]; }
};

template <class Pointer>
__device__ __forceinline__ View<Pointer> by_columns(Pointer data, int ld) {
    return {data, 1, ld};
}

template <class Pointer>
__device__ __forceinline__ View<Pointer> by_rows(Pointer data, int ld) {
    return {data, ld, 1};
}

// c [m, n] = a [m, k] · b [k, n], element by element through store(i, j, value), in tiles of 2 x 2: one load for every
// multiplication. What is stored overlaps neither.
template <class A, class B, class Store>
__device__ __forceinline__ void multiply(Crew crew, int m, int n, int k, A a, B b, Store store) {
    const int tile_rows = (m + 1) / 2;
    for_entries(crew, tile_rows, (n + 1) / 2, [&](int i0, int tile_column) {
        const int j0 = 2 * tile_column;
        const bool two_rows = i0 + tile_rows < m, two_columns = j0 + 1 < n;
        const int i1 = two_rows ? i0 + tile_rows : i0, j1 = two_columns ? j0 + 1 : j0;
        double c00 = 0, c01 = 0, c10 = 0, c11 = 0;
#pragma unroll 2
        for (int p = 0; p < k; ++p) {
            const double a0 = a(i0, p), a1 = a(i1, p), b0 = b(p, j0), b1 = b(p, j1);
            c00 += a0 * b0;
            c01 += a0 * b1;
            c10 += a1 * b0;
            c11 += a1 * b1;
        }
        store(i0, j0, c00);
        if (two_columns) store(i0, j1, c01);
        if (two_rows) store(i1, j0, c10);
        if (two_rows && two_columns) store(i1, j1, c11);
    });
}

// Position of x[i] among x [n] in descending order; of equals the first stays first.
__device__ __forceinline__ int descending_rank(Doubles x, int n, int i) {
    const double own = x[i];
    int rank = 0;
    for (int j = 0; j < n; ++j) {
        const double other = x[j];
        rank += other > own || (other == own && j < i);
    }
    return rank;
}

}  // namespace fastlora::cuda
