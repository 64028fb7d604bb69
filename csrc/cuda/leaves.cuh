// The leaves of tridiagonal matrices by implicit QL: each a row of at most kLeaf, solved by a lane of its own. The
// leading warp of the block has those of all matrices, one sweep of each at a time; meanwhile the threads of a matrix
// apply the rotations of the sweeps before to the rows of its vectors.
// Floor: about 1.1 kLeaf^2 rotations one after another, for all leaves of a block at once.
#pragma once
#include "ql.cuh"

namespace fastlora::cuda {

constexpr int kLeaf = 16;

__host__ __device__ inline int leaves(int n) { return (n + kLeaf - 1) / kLeaf; }
__device__ __forceinline__ int leaf_size(int n, int leaf) {
    return n - leaf * kLeaf < kLeaf ? n - leaf * kLeaf : kLeaf;
}

// The first block of [0, n) without a negligible off-diagonal at or after `from`, by one thread; negligible ones on the
// way become zero.
template <class T>
__device__ bool find_block_alone(Traced<T> d, Traced<T> e, int n, int from, int& first, int& last) {
    first = -1;
    last = n - 1;
    for (int i = from; i < n - 1; ++i) {
        const T off = e[i];
        if (!is_negligible(off, T(d[i]), T(d[i + 1]))) {
            if (first < 0) first = i;
            continue;
        }
        if (off != 0) e[i] = 0;
        if (first >= 0) {
            last = i;
            break;
        }
    }
    return first >= 0;
}

// What a lane of the leading warp keeps of its leaf; a lane without one has size 0.
template <class T>
struct LeafLane {
    int size, from;
    Traced<T> diagonal, off, cosine, sine;  // of the leaf; the second half of the rotations is `half` further on
    int half;
    Traced<int> range;  // of its sweep, and `range_half` further on of the next
    int range_half;

    // Computes sweep k, or says that none is left. Whether there was one.
    __device__ bool sweep(int k) {
        if (size == 0) return false;
        int first, last;
        const bool found = find_block_alone(diagonal, off, size, from, first, last);
        if (found) from = first;
        const bool sweeps = found && k < kMaxSweepsPerValue * size;
        const int second = k % 2;
        if (sweeps) sweep_block(diagonal, off, first, last, cosine + second * half, sine + second * half);
        range[second * range_half] = sweeps ? first : found ? kGivenUp : kConverged;
        range[second * range_half + 1] = last;
        return sweeps;
    }
};

// Every thread of the block calls it, the lanes of the leading warp with `lane`. The thread's own row of vectors is at
// `row`, with its leaf's entries at `leaf` · kLeaf; `rotations` and `range` are those of its matrix. `running` [2].
// Leaves the eigenvalues of the leaves in the diagonal, unsorted; returns the half that has the last states.
template <class T>
__device__ int solve_leaves(bool leads, LeafLane<T>& lane, Traced<int> running, bool owns, Traced<T> row, int leaf,
                            const Rotations<T>& rotations, int n) {
    const int range_half = 2 * leaves(n);
    for (int k = 0;; ++k) {
        const int half = k % 2;
        if (leads) {
            const bool any = __any_sync(kAllLanes, lane.sweep(k));
            if (threadIdx.x == 0) running[half] = any;
        }
        // One barrier a sweep: the other half is written next, which everyone has read before coming here.
        __syncthreads();
        if (!running[half]) return half;
        if (!owns) continue;
        const int first = rotations.range[half * range_half + 2 * leaf];
        const int last = rotations.range[half * range_half + 2 * leaf + 1], base = leaf * kLeaf;
        if (first >= 0)
            rotate_component(row + base, 1, first, last, rotations.cosine + half * n + base,
                             rotations.sine + half * n + base);
    }
}

}  // namespace fastlora::cuda
