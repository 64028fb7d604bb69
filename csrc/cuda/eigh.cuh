// Eigenvalues and eigenvectors of a batch of symmetric matrices, A = V diag(w) V'.
//   a [batch, n, n] row-major, lower triangle read     values [batch, n] ascending
//   vectors [batch, n, n]: row j is eigenvector j; its entry of largest magnitude (the first of equals) is positive
//   info [batch]: 0 done, 1 NaN or infinity in the matrix (its results are NaN), 2 not converged
// Scale by a power of two, reduce to tridiagonal form (tridiagonal.cuh), diagonalise by implicit QL (ql.cuh), rank,
// write. A warp a matrix up to n = 32; a block a matrix in shared memory while it fits; then a block a matrix in the
// memory of its vectors, which L2 holds. All three do the same arithmetic, in an order that n alone decides.
#pragma once
#include "fastlora/cuda.h"
#include "permute.cuh"
#include "ql.cuh"

namespace fastlora::cuda {

constexpr int kWarpEighLargest = 32;
constexpr int kWarpsPerBlock = 2;
constexpr int kEighThreads = kWarpSize + kEighLargest;

// What a solver keeps in shared memory beside the matrix: vectors of T, then integers.
template <class T>
struct EighWork {
    Tridiagonal<T> tri;
    Rotations<T> rotations;
    Traced<T> sign;     // [n]
    Traced<int> order;  // [n]: vector of each rank

    static __host__ __device__ int vectors(int n) { return 7 * n; }
    static __host__ __device__ int integers(int n) { return n + 4; }

    // Takes vectors(n) elements at `memory` and integers(n) at `numbers`.
    __device__ EighWork(int n, Traced<T> matrix, int ld, Traced<T> memory, Traced<int> numbers) {
        const Traced<T> work = memory + 3 * n;
        tri = {n, matrix, ld, memory, memory + n, memory + 2 * n, work};
        rotations = {work, work + 2 * n, numbers + n};
        sign = work;
        order = numbers;
    }
};

// Fills both triangles of the matrix from the lower one of a, scaled.
template <class T, class Group>
__device__ void load_symmetric(const T* __restrict__ a, const Scale<T>& scale, const Tridiagonal<T>& m, Group& group) {
    const int t = group.index();
    for (int i = t < 0 ? m.n : t; i < m.n; ++i) {
        const T x = scale.apply(a[i * m.n + t]);
        m.matrix[i * m.ld + t] = x;
        if (i != t) m.matrix[t * m.ld + i] = x;
    }
    group.sync();
}

template <class T, class Group>
__device__ T largest_in_lower(const T* __restrict__ a, int n, Group& group) {
    const int t = group.index();
    T largest = 0;
    for (int i = t < 0 ? n : t; i < n; ++i) largest = fmax(largest, magnitude_or_infinity(a[i * n + t]));
    return group.max(largest);
}

template <class T>
__device__ void transpose_in_place(const Tridiagonal<T>& m, int t) {
    for (int i = 0; t < m.n && i < t; ++i) {
        const T upper = m.matrix[i * m.ld + t], lower = m.matrix[t * m.ld + i];
        m.matrix[i * m.ld + t] = lower;
        m.matrix[t * m.ld + i] = upper;
    }
}

// Writes the values in ascending order, equal ones as they stand; leaves work.order and the signs of the vectors.
template <class T, class Group>
__device__ void rank_and_sign(const EighWork<T>& work, const Scale<T>& scale, int vector_step, int component_step,
                              T* __restrict__ values, Group& group) {
    const int n = work.tri.n, t = group.index();
    if (t >= 0 && t < n) {
        const T key = work.tri.diagonal[t];
        int rank = 0;
        for (int i = 0; i < n; ++i) {
            const T other = work.tri.diagonal[i];
            rank += other < key || (other == key && i < t);
        }
        work.order[rank] = t;
        values[rank] = scale.undo(key) + T(0);
        const Traced<T> vector = work.tri.matrix + t * vector_step;
        T largest = 0, entry = 0;
        for (int i = 0; i < n; ++i) {
            const T x = vector[i * component_step], size = fabs(x);
            entry = size > largest ? x : entry;
            largest = size > largest ? size : largest;
        }
        work.sign[t] = entry < 0 ? T(-1) : T(1);
    }
    group.sync();
}

// Row r of `vectors` becomes vector order[r]; adding zero turns -0 into +0.
template <class T>
__device__ void write_vectors(const EighWork<T>& work, int t, T* __restrict__ vectors) {
    const int n = work.tri.n;
    for (int r = 0; r < n; ++r) {
        const int c = work.order[r];
        vectors[r * n + t] = work.tri.matrix[t * work.tri.ld + c] * work.sign[c] + T(0);
    }
}

// kInPlace: the matrix is in the memory of the vectors, and is transposed for the rotations so that neighbouring
// threads touch neighbouring addresses.
template <bool kInPlace, class T, class Group>
__device__ void solve_eigh(const T* __restrict__ a, T* __restrict__ values, T* __restrict__ vectors, int32_t* info,
                           const EighWork<T>& work, Group& group) {
    const int n = work.tri.n, ld = work.tri.ld, t = group.index();
    const bool owns = t >= 0 && t < n;
    const T largest = largest_in_lower(a, n, group);
    if (!(largest - largest == 0)) {
        if (owns) values[t] = T(NAN);
        for (int i = 0; owns && i < n; ++i) vectors[i * n + t] = T(NAN);
        if (t == 0) *info = kNonFinite;
        return;
    }
    const Scale<T> scale = choose_scale(largest, 0);
    load_symmetric(a, scale, work.tri, group);
    tridiagonalise(work.tri, group);
    form_q(work.tri, group);
    if (kInPlace && owns) transpose_in_place(work.tri, t);  // the rotations come after a barrier
    const int vector_step = kInPlace ? n : 1, component_step = kInPlace ? 1 : ld;
    const bool converged =
        diagonalise(work.tri, work.rotations, work.tri.matrix + t * component_step, vector_step, group);
    rank_and_sign(work, scale, vector_step, component_step, values, group);
    if (owns) {
        if (kInPlace)
            permute_rows(work.tri.matrix + t, n, n, work.order, work.sign);
        else
            write_vectors(work, t, vectors);
    }
    if (t == 0) *info = converged ? kOk : kNotConverged;
}

// Odd: a column and a row then both spread over all banks.
__host__ __device__ inline int padded(int n) { return n | 1; }

template <class T>
__host__ __device__ size_t eigh_shared_bytes(int n, bool with_matrix) {
    const size_t elements = EighWork<T>::vectors(n) + (with_matrix ? n * padded(n) : 0);
    const size_t bytes = elements * sizeof(T) + EighWork<T>::integers(n) * sizeof(int);
    return (bytes + sizeof(double) - 1) / sizeof(double) * sizeof(double);
}

template <class T>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize, 1)
    eigh_warp_kernel(const T* __restrict__ a, T* __restrict__ values, T* __restrict__ vectors, int32_t* info,
                     int64_t batch, int n) {
    const int warp = int(threadIdx.x) / kWarpSize;
    const int64_t at = int64_t(blockIdx.x) * kWarpsPerBlock + warp;
    if (at >= batch) return;
    const size_t share = eigh_shared_bytes<T>(n, true);
    const Traced<T> memory = dynamic_shared<T>() + warp * int(share / sizeof(T));
    const Traced<int> numbers =
        dynamic_shared<int>() + (warp + 1) * int(share / sizeof(int)) - EighWork<T>::integers(n);
    const EighWork<T> work(n, memory, padded(n), memory + n * padded(n), numbers);
    WarpGroup<T> group;
    solve_eigh<false>(a + at * n * n, values + at * n, vectors + at * n * n, info + at, work, group);
}

template <class T, bool kInPlace>
__global__ void __launch_bounds__(kEighThreads, 1)
    eigh_block_kernel(const T* __restrict__ a, T* __restrict__ values, T* __restrict__ vectors, int32_t* info, int n) {
    FASTLORA_SHARED(T, partial, 2 * BlockGroup<T>::kMaxWarps);
    const int64_t at = blockIdx.x;
    T* const out = vectors + at * n * n;
    const Traced<T> memory = dynamic_shared<T>();
    const int ld = kInPlace ? n : padded(n);
    const Traced<T> matrix = kInPlace ? Traced<T>(out) : memory;
    const Traced<int> numbers =
        dynamic_shared<int>() + int(eigh_shared_bytes<T>(n, !kInPlace) / sizeof(int)) - EighWork<T>::integers(n);
    const EighWork<T> work(n, matrix, ld, kInPlace ? memory : memory + n * ld, numbers);
    BlockGroup<T> group(partial);
    solve_eigh<kInPlace>(a + at * n * n, values + at * n, out, info + at, work, group);
}

}  // namespace fastlora::cuda
