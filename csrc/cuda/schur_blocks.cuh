// Reflections and rotations of few neighbouring rows and columns of a matrix in Schur form, by one crew, and the
// exchange of two neighbouring blocks, which is built on them.
#pragma once
#include "../common/small_blocks.h"
#include "groups.cuh"
#include "scalar.cuh"

namespace fastlora::cuda {

// h and z of schur.cuh.
struct Schur {
    Crew crew;
    Doubles h, z;
    int n, ld;
    __device__ double at(int i, int j) const { return h[i * ld + j]; }
    __device__ void set(int i, int j, double x) const { h[i * ld + j] = x; }
};

// Squares below it count as zero: the matrix is scaled to size one.
constexpr double kLeastSquare = 1e-280;

// I - scale · v vᵀ, which maps what it was made from to beta e_0. Entries behind the count are zero.
template <int kCount>
struct SmallReflector {
    double v[kCount];
    double scale, beta;
};

template <int kCount>
__device__ __forceinline__ SmallReflector<kCount> reflector_of(const double (&x)[kCount]) {
    SmallReflector<kCount> r;
    double tail = 0;
#pragma unroll
    for (int i = 1; i < kCount; ++i) tail = fma(x[i], x[i], tail);
#pragma unroll
    for (int i = 0; i < kCount; ++i) r.v[i] = x[i];
    r.beta = x[0];
    r.scale = 0;
    if (tail < kLeastSquare) return r;
    const double square = fma(x[0], x[0], tail);
    r.beta = -copy_sign(square * quick_inverse_root(square), x[0]);
    r.v[0] = x[0] - r.beta;
    r.scale = quick_reciprocal(r.beta * (r.beta - x[0]));
    return r;
}

// Rows first .. first+count-1 of h, columns from .. n-1, and of z, all columns.
template <int kCount>
__device__ __forceinline__ void reflect_rows(const Schur& s, const SmallReflector<kCount>& r, int first, int count,
                                             int from) {
#pragma unroll 1
    for (int e = s.crew.rank; e < 2 * s.n; e += s.crew.size) {
        if (e < from) continue;
        const Doubles column = (e < s.n ? s.h + e : s.z + (e - s.n)) + first * s.ld;
        double x[kCount], sum = 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            x[i] = i < count ? double(column[i * s.ld]) : 0.0;
            sum = fma(r.v[i], x[i], sum);
        }
        sum *= r.scale;
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (i < count) column[i * s.ld] = fma(-sum, r.v[i], x[i]);
    }
}

// Columns first .. first+count-1 of h, rows 0 .. rows-1.
template <int kCount>
__device__ __forceinline__ void reflect_columns(const Schur& s, const SmallReflector<kCount>& r, int first, int count,
                                                int rows) {
#pragma unroll 1
    for (int i = s.crew.rank; i < rows; i += s.crew.size) {
        const Doubles row = s.h + (i * s.ld + first);
        double x[kCount], sum = 0;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            x[j] = j < count ? double(row[j]) : 0.0;
            sum = fma(r.v[j], x[j], sum);
        }
        sum *= r.scale;
#pragma unroll
        for (int j = 0; j < kCount; ++j)
            if (j < count) row[j] = fma(-sum, r.v[j], x[j]);
    }
}

// Applies [cosine sine; -sine cosine] as a similarity of rows and columns (k, k+1); the 2x2 block itself becomes
// turn.block. What the members read to compute these, they have read.
__device__ __forceinline__ void rotate(const Schur& s, int k, const Turn& turn) {
    const double c = turn.cosine, sn = turn.sine;
    s.crew.sync();
#pragma unroll 1
    for (int e = s.crew.rank; e < 2 * s.n; e += s.crew.size) {
        if (e < k + 2) continue;
        const Doubles column = (e < s.n ? s.h + e : s.z + (e - s.n)) + k * s.ld;
        const double x = column[0], y = column[s.ld];
        column[0] = c * x + sn * y;
        column[s.ld] = c * y - sn * x;
    }
#pragma unroll 1
    for (int i = s.crew.rank; i < k; i += s.crew.size) {
        const double x = s.at(i, k), y = s.at(i, k + 1);
        s.set(i, k, c * x + sn * y);
        s.set(i, k + 1, c * y - sn * x);
    }
    if (s.crew.rank == 0) {
        s.set(k, k, turn.block.a);
        s.set(k, k + 1, turn.block.b);
        s.set(k + 1, k, turn.block.c);
        s.set(k + 1, k + 1, turn.block.d);
    }
    s.crew.sync();
}

// Swaps the neighbouring blocks of sizes n1 at k and n2 at k + n1. scratch: kSwapScratch.
__device__ __forceinline__ void swap_blocks(const Schur& s, int k, int n1, int n2, Doubles scratch) {
    const int size = n1 + n2;
    if (size == 2) return rotate(s, k, exchanging(block_at(s, k)));
    const Doubles subspace = scratch + kSubspaceWork;
    if (s.crew.rank == 0) lower_subspace(s, k, n1, n2, subspace, scratch);
    s.crew.sync();
    double x[4], next[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[i] = subspace[i];
        next[i] = n2 == 2 ? double(subspace[4 + i]) : 0.0;
    }
    for (int j = 0; j < n2; ++j) {
        const SmallReflector<4> r = reflector_of(x);
        reflect_rows(s, r, k + j, size - j, k);
        s.crew.sync();
        reflect_columns(s, r, k + j, size - j, k + size);
        s.crew.sync();
        double sum = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) sum = fma(r.v[i], next[i], sum);
#pragma unroll
        for (int i = 0; i < 3; ++i) x[i] = fma(-r.scale * sum, r.v[i + 1], next[i + 1]);
        x[3] = 0;
    }
#pragma unroll 1
    for (int e = s.crew.rank; e < n1 * n2; e += s.crew.size) s.set(k + n2 + e / n2, k + e % n2, 0.0);
    s.crew.sync();
#pragma unroll 1
    for (int half = 0; half < 2; ++half)
        if ((half == 0 ? n2 : n1) == 2) standardise(s, half == 0 ? k : k + n2);
}

}  // namespace fastlora::cuda
