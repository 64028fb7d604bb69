// The threads that work on one matrix together, and the small matrix operations they share.
// Matrices are addressed by two strides, so that a transpose costs nothing.
#pragma once
#include "team.cuh"

namespace fastlora::cuda {

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
    const int tile_rows = (m + 1) / 2, tiles = tile_rows * ((n + 1) / 2);
    for (int tile = crew.rank; tile < tiles; tile += crew.size) {
        const int i0 = tile % tile_rows, j0 = 2 * (tile / tile_rows);
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
    }
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
