// Singular value decompositions by a block a matrix: a warp a pair of columns, its lanes along them. The rounds of a
// tournament pair every two columns once a sweep, with one barrier between rounds. Both matrices are in shared memory
// while they fit; else X is in the memory of its vectors, and V in that of its own, which L2 holds.
// Floor: per sweep columns^2 / 2 pairs, for each a read for the dot product, a read and a write of 2 rows + 2 columns
// elements, and 5 shuffles; 6 to 9 sweeps. Bound by shared memory.
#pragma once
#include "permute.cuh"
#include "svd_warp.cuh"

namespace fastlora::cuda {

constexpr int kSvdBlockWarps = 8;  // at most
constexpr int kSvdBlockThreads = kSvdBlockWarps * kWarpSize;

// Odd: neighbouring lanes on neighbouring columns then reach different banks.
__host__ __device__ inline int odd(int n) { return n | 1; }

template <class T>
struct SvdWork {
    int rows, columns;  // long and short side
    Traced<T> x, v;     // [columns][x_step], [columns][v_step]: A V, or A' V, and V by columns
    int x_step, v_step;
    Traced<T> value, sign;        // [columns]: squared norms, then singular values
    Traced<int> order, is_short;  // [columns]: column of each rank; whether it is too short for its squares

    static __host__ __device__ size_t bytes(int rows, int columns, bool with_matrices) {
        const size_t elements =
            2 * size_t(columns) + (with_matrices ? size_t(columns) * (odd(rows) + odd(columns)) : 0);
        const size_t bytes = elements * sizeof(T) + 2 * columns * sizeof(int);
        return (bytes + sizeof(double) - 1) / sizeof(double) * sizeof(double);
    }
};

template <class T>
__device__ __forceinline__ void rotate_columns(Traced<T> a, Traced<T> b, const JacobiRotation<T>& r, int n, int lane) {
    for (int k = lane; k < n; k += kWarpSize) {
        const T x = a[k], y = b[k];
        a[k] = r.cosine * x - r.sine * y;
        b[k] = r.sine * x + r.cosine * y;
    }
}

// Makes a pair of columns orthogonal, by one warp; returns whether they turned.
template <class T>
__device__ bool rotate_pair(const SvdWork<T>& w, int first, int second, T tolerance, int lane) {
    const Traced<T> a = w.x + first * w.x_step, b = w.x + second * w.x_step;
    const JacobiRotation<T> r(w.value[first], w.value[second], row_dot(a, b, w.rows), tolerance);
    if (!r.turns) return false;
    rotate_columns(a, b, r, w.rows, lane);
    rotate_columns(w.v + first * w.v_step, w.v + second * w.v_step, r, w.columns, lane);
    __syncwarp();
    if (lane == 0) {
        w.value[first] = r.first;
        w.value[second] = r.second;
    }
    return true;
}

template <class T>
__device__ bool jacobi_sweep(const SvdWork<T>& w, T tolerance) {
    const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
    for (int c = warp; c < w.columns; c += int(blockDim.x) / kWarpSize) {
        const Traced<T> x = w.x + c * w.x_step;
        const T square = row_dot(x, x, w.rows);
        if (lane == 0) w.value[c] = square;
    }
    return tournament_sweep(whole_block(), w.columns, kWarpSize, [&](int first, int second, bool is_pair) {
        return is_pair && rotate_pair(w, first, second, tolerance, lane);
    });
}

// Turns columns into directions and singular values, and finds the sign of each, by a warp a column. Norms of v have
// drifted by rounding, and x = A v with them.
template <class T>
__device__ void normalise_columns(const SvdWork<T>& w, bool sign_of_v) {
    const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
    for (int c = warp; c < w.columns; c += int(blockDim.x) / kWarpSize) {
        const Traced<T> x = w.x + c * w.x_step, v = w.v + c * w.v_step;
        T square = row_dot(x, x, w.rows);
        const bool weak = square <= kSmallSquare<T>;
        const T boost = weak ? kBoost<T> : T(1);
        if (weak) {
            for (int k = lane; k < w.rows; k += kWarpSize) x[k] *= boost;
            square = row_dot(x, x, w.rows);
        }
        const ColumnNorm<T> norm(square, boost);
        for (int k = lane; k < w.rows; k += kWarpSize) x[k] *= norm.inverse;
        const T drift = 1 / sqrt(row_dot(v, v, w.columns));
        for (int k = lane; k < w.columns; k += kWarpSize) v[k] *= drift;
        __syncwarp();
        const bool negative = sign_of_v ? leads_negative(v, w.columns) : leads_negative(x, w.rows);
        if (lane == 0) {
            w.value[c] = norm.norm * drift;
            w.sign[c] = negative ? T(-1) : T(1);
            w.is_short[c] = weak;
        }
    }
    __syncthreads();
}

// Writes the singular values in descending order, equal ones as they stand, and leaves w.order.
template <class T>
__device__ void rank_columns(const SvdWork<T>& w, const Scale<T>& scale, T* __restrict__ s) {
    for (int c = int(threadIdx.x); c < w.columns; c += int(blockDim.x)) {
        const T key = w.value[c];
        int rank = 0;
        for (int i = 0; i < w.columns; ++i) {
            const T other = w.value[i];
            rank += other > key || (other == key && i < c);
        }
        w.order[rank] = c;
        s[rank] = scale.undo(key);
    }
    __syncthreads();
}

// Row r of out [columns, length] = column order[r], with its sign.
template <class T>
__device__ void write_sorted(const SvdWork<T>& w, Traced<T> x, int step, int length, Traced<T> out, bool in_place) {
    if (in_place) {
        for (int k = int(threadIdx.x); k < length; k += int(blockDim.x))
            permute_rows(x + k, step, w.columns, w.order, w.sign);
        return;
    }
    for (int r = 0; r < w.columns; ++r) {
        const int c = w.order[r];
        const T sign = w.sign[c];
        for (int k = int(threadIdx.x); k < length; k += int(blockDim.x))
            out[r * length + k] = x[c * step + k] * sign + T(0);
    }
}

template <class T>
__device__ void fill_nan(Traced<T> out, int count) {
    for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) out[i] = T(NAN);
}

template <bool kInPlace, class T>
__device__ void solve_svd(const T* __restrict__ a, Traced<T> along, T* __restrict__ s, Traced<T> across, int32_t* info,
                          bool tall, const SvdWork<T>& w, BlockGroup<T>& group) {
    const int rows = w.rows, columns = w.columns, threads = int(blockDim.x);
    T largest = 0;
    for (int i = int(threadIdx.x); i < rows * columns; i += threads)
        largest = fmax(largest, magnitude_or_infinity(a[i]));
    largest = group.max(largest);
    if (!(largest - largest == 0)) {
        fill_nan(along, rows * columns);
        fill_nan(across, columns * columns);
        for (int i = int(threadIdx.x); i < columns; i += threads) s[i] = T(NAN);
        if (threadIdx.x == 0) *info = kNonFinite;
        return;
    }
    const Scale<T> scale = choose_scale(largest, largest_exponent<T>(int64_t(rows) * columns));
    for (int i = int(threadIdx.x); i < rows * columns; i += threads) {
        const int row = tall ? i / columns : i % rows, column = tall ? i % columns : i / rows;
        w.x[column * w.x_step + row] = scale.apply(a[i]);
    }
    for (int i = int(threadIdx.x); i < columns * columns; i += threads)
        w.v[i / columns * w.v_step + i % columns] = T(i / columns == i % columns);
    __syncthreads();

    const T tolerance = orthogonality_tolerance<T>(rows);
    bool turned = true;
    for (int sweep = 0; sweep < kMaxJacobiSweeps && turned; ++sweep) turned = jacobi_sweep(w, tolerance);
    normalise_columns(w, tall);
    rank_columns(w, scale, s);
    write_sorted(w, w.x, w.x_step, rows, along, kInPlace);
    write_sorted(w, w.v, w.v_step, columns, across, kInPlace);
    __syncthreads();

    if (threadIdx.x == 0) *info = turned ? kNotConverged : kOk;
    if (threadIdx.x >= kWarpSize) return;
    int first_weak = columns;
    for (int r = columns - 1; r >= 0; --r)
        if (w.is_short[w.order[r]]) first_weak = r;
    if (first_weak < columns) complete_weak(along, across, first_weak, columns, rows, tall);
}

template <class T, bool kInPlace>
__global__ void __launch_bounds__(kSvdBlockThreads, 2) svd_block_kernel(SvdArrays<T> arrays) {
    FASTLORA_SHARED(T, partial, 2 * BlockGroup<T>::kMaxWarps);
    const bool tall = arrays.p >= arrays.q;
    const int rows = tall ? arrays.p : arrays.q, columns = tall ? arrays.q : arrays.p;
    const int64_t at = blockIdx.x;
    const Traced<T> ut = arrays.ut + at * columns * arrays.p, vt = arrays.vt + at * columns * arrays.q;
    const Traced<T> along = tall ? ut : vt, across = tall ? vt : ut;
    const Traced<T> memory = dynamic_shared<T>();
    const int x_step = kInPlace ? rows : odd(rows), v_step = kInPlace ? columns : odd(columns);
    const Traced<T> value = kInPlace ? memory : memory + columns * (x_step + v_step);
    const Traced<int> numbers =
        dynamic_shared<int>() + int(SvdWork<T>::bytes(rows, columns, !kInPlace) / sizeof(int)) - 2 * columns;
    const SvdWork<T> work{rows,
                          columns,
                          kInPlace ? along : memory,
                          kInPlace ? across : memory + columns * x_step,
                          x_step,
                          v_step,
                          value,
                          value + columns,
                          numbers,
                          numbers + columns};
    BlockGroup<T> group(partial);
    solve_svd<kInPlace>(arrays.a + at * rows * columns, along, arrays.s + at * columns, across, arrays.info + at, tall,
                        work, group);
}

}  // namespace fastlora::cuda
