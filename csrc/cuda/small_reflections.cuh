// Reflections and rotations of few neighbouring rows and columns of a matrix in Schur form, by one crew, and what is
// built on them: the standard form of a 2x2 block, and the exchange of two neighbouring blocks.
#pragma once
#include "crew.cuh"
#include "scalar.cuh"

namespace fastlora::cuda {

// h and z of ordered_schur.cuh.
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

struct Block {
    double a, b, c, d;  // rows (a, b) and (c, d)
};

__device__ __forceinline__ Block block_at(const Schur& s, int k) {
    return {s.at(k, k), s.at(k, k + 1), s.at(k + 1, k), s.at(k + 1, k + 1)};
}

// The rotation of a 2x2 block, and what becomes of the block.
struct Turn {
    double cosine, sine;
    Block block;
};

// Applies [cosine sine; -sine cosine] as a similarity of rows and columns (k, k+1); the 2x2 block itself becomes
// turn.block. What the members read to compute these, they have read.
__device__ __forceinline__ void rotate(const Schur& s, int k, const Turn& turn) {
    const double c = turn.cosine, sn = turn.sine;
    s.crew.sync();
    for (int e = s.crew.rank; e < 2 * s.n; e += s.crew.size) {
        if (e < k + 2) continue;
        const Doubles column = (e < s.n ? s.h + e : s.z + (e - s.n)) + k * s.ld;
        const double x = column[0], y = column[s.ld];
        column[0] = c * x + sn * y;
        column[s.ld] = c * y - sn * x;
    }
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

// Real eigenvalues: to upper triangular form. The first column of the rotation is the eigenvector (z, c) of the
// eigenvalue d + z.
__device__ __forceinline__ Turn splitting(const Block& m) {
    const double half = 0.5 * (m.a - m.d);
    const double z = half + copy_sign(sqrt(fmax(0.0, half * half + m.b * m.c)), half);
    const double length = hypot(z, m.c);
    return {z / length, m.c / length, {m.d + z, m.b - m.c, 0.0, z != 0 ? m.d - m.b * m.c / z : m.d}};
}

// A pair: to equal diagonal entries.
__device__ __forceinline__ Turn balancing(const Block& m) {
    const double sum = m.b + m.c, difference = m.a - m.d, length = hypot(sum, difference);
    const double cosine = sqrt(0.5 * (1 + fabs(sum) / length));
    const double sine = -copy_sign(difference / (2 * length * cosine), sum);
    const double aa = m.a * cosine + m.b * sine, bb = m.b * cosine - m.a * sine;
    const double cc = m.c * cosine + m.d * sine, dd = m.d * cosine - m.c * sine;
    const double mean = 0.5 * (m.a + m.d);
    return {cosine, sine, {mean, bb * cosine + dd * sine, cc * cosine - aa * sine, mean}};
}

// Gives the 2x2 block at k equal diagonal entries, or splits it if its eigenvalues are real; the second pass is for a
// nearly equal pair that rounding has turned real.
__device__ __forceinline__ void standardise(const Schur& s, int k) {
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
        const Block m = block_at(s, k);
        const double difference = m.a - m.d;
        const bool real = 0.25 * difference * difference + m.b * m.c >= 0;
        if (m.c == 0 || (!real && difference == 0)) return;
        const Turn turn = real ? splitting(m) : balancing(m);
        rotate(s, k, turn);
        if (real) return;
    }
}

constexpr int kSwapScratch = 36;

// Solves m x = b, order <= 4, by elimination with complete pivoting; pivots below `floor` are raised to it. By one
// member, in memory that the crew shares: m [4, 4], b [4], x [4], column_of [4].
__device__ __forceinline__ void solve_small(Doubles m, Doubles b, Doubles x, Doubles column_of, int order,
                                            double floor) {
    for (int k = 0; k < order; ++k) column_of[k] = k;
    for (int k = 0; k < order; ++k) {
        int row = k, column = k;
        for (int i = k; i < order; ++i)
            for (int j = k; j < order; ++j)
                if (fabs(double(m[4 * i + j])) > fabs(double(m[4 * row + column]))) row = i, column = j;
        for (int j = 0; j < order; ++j) {
            const double t = m[4 * k + j];
            m[4 * k + j] = m[4 * row + j];
            m[4 * row + j] = t;
        }
        const double t = b[k];
        b[k] = b[row];
        b[row] = t;
        for (int i = 0; i < order; ++i) {
            const double u = m[4 * i + k];
            m[4 * i + k] = m[4 * i + column];
            m[4 * i + column] = u;
        }
        const double c = column_of[k];
        column_of[k] = column_of[column];
        column_of[column] = c;
        if (fabs(double(m[4 * k + k])) < floor) m[4 * k + k] = floor;
        for (int i = k + 1; i < order; ++i) {
            const double factor = m[4 * i + k] / m[4 * k + k];
            for (int j = k; j < order; ++j) m[4 * i + j] -= factor * m[4 * k + j];
            b[i] -= factor * b[k];
        }
    }
    for (int k = order - 1; k >= 0; --k) {
        for (int j = k + 1; j < order; ++j) b[k] -= m[4 * k + j] * b[j];
        b[k] = b[k] / m[4 * k + k];
    }
    for (int k = 0; k < order; ++k) x[int(column_of[k])] = b[k];
}

// Columns [-X; I] with T11 X - X T22 = T12 span the invariant subspace of the lower block T22: subspace [2, 4], by one
// member. work [28].
__device__ __forceinline__ void lower_subspace(const Schur& s, int k, int n1, int n2, Doubles subspace, Doubles work) {
    const int order = n1 * n2, k2 = k + n1;
    const Doubles m = work, b = work + 16, x = work + 20;
    double largest = 0;
    for (int i = 0; i < n1 + n2; ++i)
        for (int j = 0; j < n1 + n2; ++j) largest = fmax(largest, fabs(s.at(k + i, k + j)));
    for (int i = 0; i < 16; ++i) m[i] = 0;
    for (int i = 0; i < n1; ++i) {
        for (int j = 0; j < n2; ++j) {
            const int at = i * n2 + j;
            b[at] = s.at(k + i, k2 + j);
            for (int l = 0; l < n1; ++l) m[4 * at + l * n2 + j] += s.at(k + i, k + l);
            for (int l = 0; l < n2; ++l) m[4 * at + i * n2 + l] -= s.at(k2 + l, k2 + j);
        }
    }
    solve_small(m, b, x, work + 24, order, fmax(kEpsilon<double> * largest, 1e-290));
    for (int j = 0; j < n2; ++j) {
        for (int i = 0; i < n1; ++i) subspace[4 * j + i] = -x[i * n2 + j];
        for (int i = 0; i < n2; ++i) subspace[4 * j + n1 + i] = i == j ? 1.0 : 0.0;
        for (int i = n1 + n2; i < 4; ++i) subspace[4 * j + i] = 0;
    }
}

// Two rows and columns change places by rotations alone.
__device__ __forceinline__ void swap_values(const Schur& s, int k) {
    const Block m = block_at(s, k);
    const double y = m.d - m.a, length = hypot(m.b, y);
    rotate(s, k, {length > 0 ? m.b / length : 0.0, length > 0 ? y / length : 1.0, {m.d, m.b, m.c, m.a}});
}

// Swaps the neighbouring blocks of sizes n1 at k and n2 at k + n1. scratch: kSwapScratch.
__device__ __forceinline__ void swap_blocks(const Schur& s, int k, int n1, int n2, Doubles scratch) {
    const int size = n1 + n2;
    if (size == 2) return swap_values(s, k);
    const Doubles subspace = scratch + 28;
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
    for (int e = s.crew.rank; e < n1 * n2; e += s.crew.size) s.set(k + n2 + e / n2, k + e % n2, 0.0);
    s.crew.sync();
#pragma unroll 1
    for (int half = 0; half < 2; ++half)
        if ((half == 0 ? n2 : n1) == 2) standardise(s, half == 0 ? k : k + n2);
}

}  // namespace fastlora::cuda
