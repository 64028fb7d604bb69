// Eigenvalues and eigenvectors of a batch of symmetric matrices, A = V diag(w) V'.
//   a [batch, n, n] row-major, lower triangle read     values [batch, n] ascending
//   vectors [batch, n, n]: row j is eigenvector j; its entry of largest magnitude (the first of equals) is positive
//   info [batch]: 0 done, 1 NaN or infinity in the matrix (its results are NaN), 2 not converged
// Scale by a power of two, reduce to tridiagonal form (tridiagonal.cuh), diagonalise, rank, write. Up to n = 16 by
// implicit QL on Q (ql.cuh). Up to 128 by divide and conquer: the leaves by QL, one lane each (leaves.cuh), joined
// (divide.cuh), and then the reflectors on what comes of it, which wait in the memory of the vectors. Above, and where
// shared memory has no room for the matrix, by QL on Q again.
// A warp a matrix up to n = 32, up to kMatricesPerBlock in a block with one more warp for their leaves; a block a
// matrix in shared memory while it fits; then a block a matrix in the memory of its vectors, which L2 holds. Nothing is
// summed in an order that the batch or the place in it decides.
#pragma once
#include "divide.cuh"
#include "fastlora/cuda.h"
#include "permute.cuh"

namespace fastlora::cuda {

constexpr int kWarpEighLargest = 32;
template <class T>
constexpr int kMatricesPerBlock = sizeof(T) == 4 ? 8 : 7;  // of which registers hold two blocks
constexpr int kEighThreads = kWarpSize + kEighLargest;

// What a solver keeps in shared memory beside the matrix: vectors of T, then integers.
template <class T>
struct EighWork {
    Tridiagonal<T> tri;
    Rotations<T> rotations;
    Divide<T> divide;
    Traced<T> sign;     // [n]
    Traced<int> order;  // [n]: vector of each rank
    Traced<int> finite;

    // Without what dividing takes, if the matrix is not.
    static __host__ __device__ int vectors(int n, bool divided) {
        return (divided ? 8 + 2 * kTileColumns : 7) * vector_step(n);
    }
    static __host__ __device__ int integers(int n, bool divided) {
        return (divided ? 4 : 1) * vector_step(n) + vector_step(4 * leaves(n) + 1);
    }

    // Takes as many elements at `memory` and integers at `numbers`, both at multiples of 16 bytes.
    __device__ EighWork(int n, Traced<T> matrix, int ld, Traced<T> memory, Traced<int> numbers, bool divided) {
        const int s = vector_step(n);
        const Traced<T> work = memory + 3 * s;
        const Traced<int> range = numbers + (divided ? 4 * s : s);
        tri = {n, matrix, ld, memory, memory + s, memory + 2 * s, work};
        rotations = {work, work + 2 * s, range};
        sign = work;
        order = numbers;
        finite = range + 4 * leaves(n);
        // What is joined takes the place of what is reduced and rotated.
        divide = {n,
                  matrix,
                  ld,
                  memory,
                  memory + s,
                  work,
                  work + s,
                  work + 2 * s,
                  work + 3 * s,
                  work + 4 * s,
                  work + 5 * s,
                  numbers,
                  numbers + s,
                  numbers + 2 * s,
                  numbers + 3 * s};
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

// Whether the matrix is finite; else its results are NaN. Leaves its scale.
template <class T, class Group>
__device__ bool scale_matrix(const T* __restrict__ a, T* __restrict__ values, T* __restrict__ vectors, int32_t* info,
                             const EighWork<T>& work, Scale<T>& scale, Group& group) {
    const int n = work.tri.n, t = group.index();
    const T largest = largest_in_lower(a, n, group);
    if (largest - largest == 0) {
        scale = choose_scale(largest, 0);
        return true;
    }
    if (t >= 0 && t < n) values[t] = T(NAN);
    for (int i = 0; t >= 0 && t < n && i < n; ++i) vectors[i * n + t] = T(NAN);
    if (t == 0) *info = kNonFinite;
    return false;
}

// To tridiagonal form, and vectors to begin with: Q, or of a matrix that is divided the identity; its reflectors then
// wait in `vectors`.
template <class T, class Group>
__device__ void reduce(const T* __restrict__ a, T* vectors, const EighWork<T>& work, const Scale<T>& scale,
                       Group& group) {
    const int n = work.tri.n, t = group.index();
    load_symmetric(a, scale, work.tri, group);
    tridiagonalise(work.tri, group);
    if (!divides(n)) return form_q(work.tri, group);
    for (int j = 0; j < n - 2 && j < t; ++j)
        if (t < n) vectors[j * n + t] = work.tri.matrix[j * work.tri.ld + t];
    group.sync();
    tear(work.divide, t);
}

// Values and vectors in order, from the tridiagonal matrix's.
template <int kWidest, class T, class Group>
__device__ void finish(T* __restrict__ values, T* vectors, int32_t* info, const EighWork<T>& work,
                       const Scale<T>& scale, bool converged, Group& group) {
    const int t = group.index();
    if (divides(work.tri.n)) {
        converged &= join_leaves<kWidest>(work.divide, group);
        apply_reflectors(work.tri, vectors, work.divide.tile, work.divide.z, group);
    }
    rank_and_sign(work, scale, 1, work.tri.ld, values, group);
    if (t >= 0 && t < work.tri.n) write_vectors(work, t, vectors);
    if (t == 0) *info = converged ? kOk : kNotConverged;
}

// Whether the last sweeps of a matrix's leaves left them converged.
template <class T>
__device__ bool leaves_converged(const EighWork<T>& work, int half) {
    const int count = leaves(work.tri.n);
    bool converged = true;
    for (int leaf = 0; leaf < count; ++leaf) converged &= work.rotations.range[2 * (half * count + leaf)] == kConverged;
    return converged;
}

template <class T>
__device__ LeafLane<T> leaf_lane(const EighWork<T>& work, int leaf, bool is_leaf) {
    const int n = work.tri.n, base = leaf * kLeaf, count = leaves(n);
    return {is_leaf ? leaf_size(n, leaf) : 0,
            0,
            work.tri.diagonal + base,
            work.tri.off + base,
            work.rotations.cosine + base,
            work.rotations.sine + base,
            n,
            work.rotations.range + 2 * leaf,
            2 * count};
}

// By QL on the whole matrix. kInPlace: it is in the memory of the vectors, and is transposed for the rotations so that
// neighbouring threads touch neighbouring addresses.
template <bool kInPlace, class T, class Group>
__device__ void solve_whole(const T* __restrict__ a, T* __restrict__ values, T* __restrict__ vectors, int32_t* info,
                            const EighWork<T>& work, Group& group) {
    const int n = work.tri.n, ld = work.tri.ld, t = group.index();
    const bool owns = t >= 0 && t < n;
    Scale<T> scale;
    if (!scale_matrix(a, values, vectors, info, work, scale, group)) return;
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
    const bool divided = with_matrix && divides(n);
    const size_t elements = EighWork<T>::vectors(n, divided) + (with_matrix ? vector_step(n * padded(n)) : 0);
    return elements * sizeof(T) + EighWork<T>::integers(n, divided) * sizeof(int);
}

// Of one matrix of eigh_warp_kernel, in elements: 16 bytes more than all banks hold, so that lanes that have a matrix
// each read different ones.
template <class T>
__host__ __device__ int eigh_share(int n) {
    constexpr int kBanks = 128 / sizeof(T), kMore = 16 / sizeof(T);
    return (int(eigh_shared_bytes<T>(n, true) / sizeof(T)) - kMore + kBanks - 1) / kBanks * kBanks + kMore;
}

template <class T>
__device__ EighWork<T> eigh_work(int n, Traced<T> memory, Traced<int> end) {
    const bool divided = divides(n);
    const Traced<int> numbers = end - EighWork<T>::integers(n, divided);
    return {n, memory, padded(n), memory + vector_step(n * padded(n)), numbers, divided};
}

template <class T>
__global__ void __launch_bounds__((kMatricesPerBlock<T> + 1) * kWarpSize, 2)
    eigh_warp_kernel(const T* __restrict__ a, T* __restrict__ values, T* vectors, int32_t* info, int64_t batch, int n) {
    FASTLORA_SHARED(int, running, 2);
    const bool leads = threadIdx.x < kWarpSize;
    const int lane = int(threadIdx.x) % kWarpSize, count = leaves(n), words = int(sizeof(T) / sizeof(int));
    // A lane of the leading warp has a leaf, the other warps a matrix each.
    const int matrices = int(blockDim.x) / kWarpSize - 1;
    const int own = leads ? lane / count : int(threadIdx.x) / kWarpSize - 1;
    const int slot = own < matrices ? own : 0;
    const int64_t at = int64_t(blockIdx.x) * matrices + slot;
    const bool is_there = own < matrices && at < batch;
    const int share = eigh_share<T>(n);
    const EighWork<T> work =
        eigh_work<T>(n, dynamic_shared<T>() + slot * share, dynamic_shared<int>() + (slot + 1) * share * words);
    WarpGroup<T> group;
    Scale<T> scale{};
    bool solves = false;
    if (!leads && is_there) {
        solves = scale_matrix(a + at * n * n, values + at * n, vectors + at * n * n, info + at, work, scale, group);
        if (lane == 0) work.finite[0] = solves;
        if (solves) reduce(a + at * n * n, vectors + at * n * n, work, scale, group);
    }
    __syncthreads();
    LeafLane<T> leaf = leaf_lane(work, lane % count, leads && is_there && work.finite[0] != 0);
    const int half = solve_leaves(leads, leaf, Traced<int>(running), solves && lane < n,
                                  work.tri.matrix + lane * work.tri.ld, lane / kLeaf, work.rotations, n);
    if (solves)
        finish<kWarpEighLargest / 2>(values + at * n, vectors + at * n * n, info + at, work, scale,
                                     leaves_converged(work, half), group);
}

// A block a matrix in shared memory that is divided, of n up to 2 · kWidest.
template <class T, int kWidest>
__global__ void __launch_bounds__(kWarpSize + 2 * kWidest, 1)
    eigh_divide_kernel(const T* __restrict__ a, T* __restrict__ values, T* vectors, int32_t* info, int n) {
    FASTLORA_SHARED(T, partial, 2 * BlockGroup<T>::kMaxWarps);
    FASTLORA_SHARED(int, running, 2);
    const int64_t at = blockIdx.x;
    a += at * n * n, values += at * n, vectors += at * n * n, info += at;
    const EighWork<T> work =
        eigh_work<T>(n, dynamic_shared<T>(), dynamic_shared<int>() + int(eigh_shared_bytes<T>(n, true) / sizeof(int)));
    BlockGroup<T> group(partial);
    Scale<T> scale;
    if (!scale_matrix(a, values, vectors, info, work, scale, group)) return;
    reduce(a, vectors, work, scale, group);
    group.sync();
    const int t = group.index(), row = t < 0 ? 0 : t, lane = int(threadIdx.x) % kWarpSize;
    const bool is_leaf = group.leads() && lane < leaves(n);
    LeafLane<T> leaf = leaf_lane(work, is_leaf ? lane : 0, is_leaf);
    const int half = solve_leaves(group.leads(), leaf, Traced<int>(running), t >= 0 && t < n,
                                  work.tri.matrix + row * work.tri.ld, row / kLeaf, work.rotations, n);
    finish<kWidest>(values, vectors, info, work, scale, leaves_converged(work, half), group);
}

// A block a matrix that is not divided; kInPlace: in the memory of its vectors, else in shared memory.
template <class T, bool kInPlace>
__global__ void __launch_bounds__(kEighThreads, 1)
    eigh_block_kernel(const T* __restrict__ a, T* __restrict__ values, T* __restrict__ vectors, int32_t* info, int n) {
    FASTLORA_SHARED(T, partial, 2 * BlockGroup<T>::kMaxWarps);
    const int64_t at = blockIdx.x;
    T* const out = vectors + at * n * n;
    const Traced<T> memory = dynamic_shared<T>();
    const int ld = kInPlace ? n : padded(n);
    const Traced<int> end = dynamic_shared<int>() + int(eigh_shared_bytes<T>(n, !kInPlace) / sizeof(int));
    const EighWork<T> work(n, kInPlace ? Traced<T>(out) : memory, ld, kInPlace ? memory : memory + vector_step(n * ld),
                           end - EighWork<T>::integers(n, false), false);
    BlockGroup<T> group(partial);
    solve_whole<kInPlace>(a + at * n * n, values + at * n, out, info + at, work, group);
}

}  // namespace fastlora::cuda
