// Singular value decompositions in registers: a lane a column, kSize (16 or 32) lanes a matrix, so one or two matrices
// a warp. Round s pairs lane l with lane l ^ s: every pair of columns meets once in kSize - 1 rounds. Both lanes of a
// pair compute the same dot product and rotation.
//   columns = min(p, q) and rows = max(p, q), both up to kSize: x is A, or A' where p < q
// Floor: per sweep and matrix (kSize - 1) 2 kSize shuffles of a warp's lanes, which bound it, and 5 kSize multiply-adds
// for each; 5 to 8 sweeps.
#pragma once
#include "complete.cuh"
#include "fastlora/cuda.h"
#include "jacobi.cuh"

namespace fastlora::cuda {

constexpr int kSvdWarps = 2;  // of a block

template <class T>
struct SvdArrays {
    const T* a;     // [batch, p, q]
    T* ut;          // [batch, m, p]
    T* s;           // [batch, m]
    T* vt;          // [batch, m, q]
    int32_t* info;  // [batch]
    int64_t batch;
    int p, q;
};

template <class T, int kSize>
__device__ __forceinline__ T column_square(const T (&x)[kSize]) {
    T sum[4] = {};
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum[i % 4] += x[i] * x[i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// x = own * x + other * (x of the lane `difference` away)
template <class T, int kSize>
__device__ __forceinline__ void rotate_with(T (&x)[kSize], T own, T other, int difference) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = own * x[i] + other * __shfl_xor_sync(kAllLanes, x[i], difference);
}

// One sweep over all pairs; returns whether this lane's column turned.
template <class T, int kSize>
__device__ bool jacobi_sweep(T (&x)[kSize], T (&v)[kSize], int lane, T tolerance) {
    bool turned = false;
    T square = column_square(x);
    for (int difference = 1; difference < kSize; ++difference) {
        T y[kSize], sum[4] = {};
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            y[i] = __shfl_xor_sync(kAllLanes, x[i], difference);
            sum[i % 4] += x[i] * y[i];
        }
        const T dot = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        const T other = __shfl_xor_sync(kAllLanes, square, difference);
        const bool first = lane < (lane ^ difference);
        const JacobiRotation<T> r(first ? square : other, first ? other : square, dot, tolerance);
        if (!__any_sync(kAllLanes, r.turns)) continue;
        turned |= r.turns;
        const T towards = first ? -r.sine : r.sine;
#pragma unroll
        for (int i = 0; i < kSize; ++i) x[i] = r.cosine * x[i] + towards * y[i];
        rotate_with(v, r.cosine, towards, difference);
        square = first ? r.first : r.second;
    }
    return turned;
}

// The sign of the entry of largest magnitude, the first of equals.
template <class T, int kSize>
__device__ T leading_sign(const T (&x)[kSize]) {
    T largest = 0, entry = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
        const T size = fabs(x[i]);
        entry = size > largest ? x[i] : entry;
        largest = size > largest ? size : largest;
    }
    return entry < 0 ? T(-1) : T(1);
}

// Row rank of out [count, length] = the column of the lane of that rank, times its factor, by way of shared memory so
// that neighbouring lanes write neighbouring addresses. `out` is null for a matrix that is not there.
template <class T, int kSize>
__device__ void write_rows(const T (&x)[kSize], T factor, int rank, int lane, int count, int length, Traced<T> stage,
                           Traced<T> out, bool exists) {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
        if (rank < count && i < length) stage[rank * length + i] = x[i] * factor + T(0);
    __syncwarp();
    for (int i = lane; exists && i < count * length; i += kSize) out[i] = stage[i];
    __syncwarp();
}

template <class T, int kSize>
__global__ void __launch_bounds__(kSvdWarps* kWarpSize, 1) svd_warp_kernel(SvdArrays<T> arrays) {
    constexpr int kMatrices = kWarpSize / kSize;  // of a warp
    FASTLORA_SHARED(T, stages, kSvdWarps * kMatrices * kSize * kSize);
    const int slot = int(threadIdx.x) / kSize, lane = int(threadIdx.x) % kSize;
    const int64_t at = int64_t(blockIdx.x) * (kSvdWarps * kMatrices) + slot;
    const bool exists = at < arrays.batch, tall = arrays.p >= arrays.q;
    const int rows = tall ? arrays.p : arrays.q, columns = tall ? arrays.q : arrays.p;
    const int row_step = tall ? columns : 1, column_step = tall ? 1 : rows;
    const T* __restrict__ a = arrays.a + at * rows * columns;

    T x[kSize], v[kSize], largest = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
        x[i] = exists && i < rows && lane < columns ? a[i * row_step + lane * column_step] : T(0);
        v[i] = T(i == lane);
        largest = fmax(largest, magnitude_or_infinity(x[i]));
    }
#pragma unroll
    for (int d = kSize / 2; d > 0; d /= 2) largest = fmax(largest, __shfl_xor_sync(kAllLanes, largest, d));
    const bool finite = largest - largest == 0;
    const Scale<T> scale = choose_scale(finite ? largest : T(0), largest_exponent<T>(int64_t(rows) * columns));
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = finite ? scale.apply(x[i]) : T(0);

    // A matrix that is done sees only identities while its neighbour in the warp goes on.
    const T tolerance = orthogonality_tolerance<T>(rows);
    bool turned = true;
    for (int sweep = 0; sweep < kMaxJacobiSweeps && __any_sync(kAllLanes, turned); ++sweep)
        turned = jacobi_sweep(x, v, lane, tolerance);

    // Norms of v have drifted by rounding, and x = A v with them.
    const T square = column_square(x);
    const bool weak = square <= kSmallSquare<T>;
    const T boost = weak ? kBoost<T> : T(1);
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] *= boost;
    const ColumnNorm<T> norm(weak ? column_square(x) : square, boost);
    const T drift = 1 / sqrt(column_square(v));
    const T value = norm.norm * drift;

    const T key = lane < columns ? value : T(-1);
    const unsigned group = kSize == kWarpSize ? kAllLanes : 0xffffu << (slot % kMatrices * kSize);
    int rank = 0, first_weak = columns;
    for (int i = 0; i < kSize; ++i) {
        const T other = __shfl_sync(kAllLanes, key, i, kSize);
        rank += other > key || (other == key && i < lane);
    }
    for (int i = 0; i < kSize; ++i) {
        const int other = __shfl_sync(kAllLanes, weak ? rank : columns, i, kSize);
        first_weak = other < first_weak ? other : first_weak;
    }
    const bool failed = (__ballot_sync(kAllLanes, turned) & group) != 0;

    const T sign = tall ? leading_sign(v) : leading_sign(x);
    const T bad = finite ? T(0) : T(NAN);
    const Traced<T> ut = arrays.ut + at * columns * arrays.p, vt = arrays.vt + at * columns * arrays.q;
    const Traced<T> along = tall ? ut : vt, across = tall ? vt : ut;
    const Traced<T> stage = stages + slot * kSize * kSize;
    write_rows(x, norm.inverse * sign + bad, rank, lane, columns, rows, stage, along, exists);
    write_rows(v, drift * sign + bad, rank, lane, columns, columns, stage, across, exists);
    if (exists && lane < columns) arrays.s[at * columns + rank] = scale.undo(value) + bad;
    if (exists && lane == 0) arrays.info[at] = !finite ? kNonFinite : failed ? kNotConverged : kOk;

    // The whole warp completes one matrix after the other.
    for (int m = 0; m < kMatrices; ++m) {
        const int own = exists && finite ? first_weak : columns;
        const int first = __shfl_sync(kAllLanes, own, m * kSize);
        if (first == columns) continue;
        const int64_t away = m - slot % kMatrices;
        complete_weak(along + away * columns * rows, across + away * columns * columns, first, columns, rows, tall);
    }
}

}  // namespace fastlora::cuda
