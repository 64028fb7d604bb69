// Orthonormal rows in place of those that are too short to have a direction, by one warp. Rare, so made for clarity:
// a lane keeps to its own entries, and reads the rows again where a table would save it.
#pragma once
#include "groups.cuh"

namespace fastlora::cuda {

// An entry and its place, for searches across a warp: the better of two, the first of equals.
template <class T>
struct Found {
    T value;
    int at;
};

// The largest `value` over the lanes of a warp.
template <class T>
__device__ Found<T> warp_first_largest(Found<T> own) {
#pragma unroll
    for (int d = kWarpSize / 2; d > 0; d /= 2) {
        const T value = __shfl_xor_sync(kAllLanes, own.value, d);
        const int at = __shfl_xor_sync(kAllLanes, own.at, d);
        if (value > own.value || (value == own.value && at < own.at)) own = {value, at};
    }
    return own;
}

// Whether the entry of largest magnitude, the first of equals, is negative.
template <class T>
__device__ bool leads_negative(Traced<T> row, int n) {
    Found<T> own{T(-1), n};
    T entry = 0;
    for (int k = int(threadIdx.x) % kWarpSize; k < n; k += kWarpSize) {
        const T x = row[k];
        if (fabs(x) > own.value) own = {T(fabs(x)), k}, entry = x;
    }
    const int at = warp_first_largest(own).at;
    return __any_sync(kAllLanes, at == own.at && entry < 0);
}

template <class T>
__device__ void negate(Traced<T> row, int n) {
    for (int k = int(threadIdx.x) % kWarpSize; k < n; k += kWarpSize) row[k] = T(0) - row[k];
}

template <class T>
__device__ T row_dot(Traced<T> a, Traced<T> b, int n) {
    T sum = 0;
    for (int k = int(threadIdx.x) % kWarpSize; k < n; k += kWarpSize) sum += a[k] * b[k];
    return warp_sum(sum);
}

// Makes row `at` orthogonal to the rows before it, by Gram-Schmidt twice. Returns the squared norm left.
template <class T>
__device__ T orthogonalise_row(Traced<T> rows, int at, int n) {
    const Traced<T> row = rows + int64_t(at) * n;
    for (int pass = 0; pass < 2; ++pass) {
        for (int i = 0; i < at; ++i) {
            const Traced<T> before = rows + int64_t(i) * n;
            const T factor = row_dot(row, before, n);
            for (int k = int(threadIdx.x) % kWarpSize; k < n; k += kWarpSize) row[k] -= factor * before[k];
        }
    }
    return row_dot(row, row, n);
}

// The unit vector least covered by the first `count` orthonormal rows.
template <class T>
__device__ int least_covered(Traced<T> rows, int count, int n) {
    Found<T> own{T(-INFINITY), n};
    for (int k = int(threadIdx.x) % kWarpSize; k < n; k += kWarpSize) {
        T coverage = 0;
        for (int i = 0; i < count; ++i) {
            const T x = rows[int64_t(i) * n + k];
            coverage += x * x;
        }
        if (-coverage > own.value) own = {-coverage, k};
    }
    return warp_first_largest(own).at;
}

// Rows 0 .. first-1 of `rows` [count, n] are orthonormal; makes all of them so. A later row that holds a direction
// keeps it, less its part along the rows before; one that has none takes the unit vector least covered by them.
template <class T>
__device__ void complete_rows(Traced<T> rows, int first, int count, int n) {
    for (int at = first; at < count; ++at) {
        const Traced<T> row = rows + int64_t(at) * n;
        T left = orthogonalise_row(rows, at, n);
        if (!(left > T(0.25))) {
            const int least = least_covered(rows, at, n);
            for (int k = int(threadIdx.x) % kWarpSize; k < n; k += kWarpSize) row[k] = T(k == least);
            left = orthogonalise_row(rows, at, n);
        }
        const T inverse = 1 / sqrt(left);
        for (int k = int(threadIdx.x) % kWarpSize; k < n; k += kWarpSize) row[k] = row[k] * inverse + T(0);
    }
}

// The weak end of a decomposition, by one warp: rows first_weak.. of the long side are completed; where they carry the
// sign rule, a row and its partner on the short side are turned together.
template <class T>
__device__ void complete_weak(Traced<T> along, Traced<T> across, int first_weak, int columns, int rows, bool tall) {
    complete_rows(along, first_weak, columns, rows);
    for (int j = first_weak; !tall && j < columns; ++j) {
        const Traced<T> row = along + int64_t(j) * rows;
        if (!leads_negative(row, rows)) continue;
        negate(row, rows);
        negate(across + int64_t(j) * columns, columns);
    }
}

}  // namespace fastlora::cuda
