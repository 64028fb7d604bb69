// The arithmetic of few neighbouring rows and columns of a matrix in Hessenberg or Schur form, which cpu/schur.cpp and
// cuda/schur.cuh share: shifts, the standard form of a 2x2 block, and what exchanges two neighbouring blocks.
//   S: a matrix with at(i, j), for which rotate(s, k, turn) applies a Turn to rows and columns k and k + 1
//   Memory: what doubles are kept in
// Reductions, reflections and bulges stay apart: who computes which entry, and in which order, is what differs.
// Algorithm: LAPACK lahqr, lanv2, laexc.
#pragma once
#if defined(FASTLORA_ISA)
#include "../cpu/simd.h"
#define FASTLORA_ROLLED
#else
#include "../cuda/scalar.cuh"
#define FASTLORA_ROLLED _Pragma("unroll 1")
#endif

namespace fastlora::FASTLORA_ROOM {

constexpr int kStepsPerValue = 30;  // double-shift steps that a matrix is allowed

struct Block {
    double a, b, c, d;  // rows (a, b) and (c, d)
};

template <class S>
FASTLORA_INLINE Block block_at(const S& s, int k) {
    return {s.at(k, k), s.at(k, k + 1), s.at(k + 1, k), s.at(k + 1, k + 1)};
}

struct Shifts {
    double re1, re2, im_square;  // the imaginary parts are the roots of im_square, with opposite signs
};

// Eigenvalues of a 2x2 block; two real ones are both replaced by the one nearer to its last corner.
FASTLORA_INLINE Shifts shifts_of(const Block& m) {
    const double mean = 0.5 * (m.a + m.d), half = 0.5 * (m.a - m.d), square = sum_of_products(half, half, m.b, m.c);
    if (square < 0) return {mean, mean, -square};
    const double root = sqrt_(square), upper = mean + root, lower = mean - root;
    const double nearest = abs_(upper - m.d) < abs_(lower - m.d) ? upper : lower;
    return {nearest, nearest, 0.0};
}

// The block whose shifts the step number `tries` on rows low .. high takes: the last one, but where the usual shifts
// cycle an unrelated one, from the two ends in turn.
template <class S>
FASTLORA_INLINE Block shift_block(const S& s, int low, int high, int tries) {
    if (tries % 10 != 0) return block_at(s, high - 1);
    const bool top = tries % 20 == 10;
    const double corner = top ? s.at(low, low) : s.at(high, high);
    const double off = top ? abs_(s.at(low + 1, low)) + abs_(s.at(low + 2, low + 1))
                           : abs_(s.at(high, high - 1)) + abs_(s.at(high - 1, high - 2));
    return {0.75 * off + corner, -0.4375 * off, off, 0.75 * off + corner};
}

// The rotation [cosine sine; -sine cosine] of a 2x2 block as a similarity, and what becomes of the block.
struct Turn {
    double cosine, sine;
    Block block;
};

// Real eigenvalues: to upper triangular form. The first column of the rotation is the eigenvector (z, c) of the
// eigenvalue d + z.
FASTLORA_INLINE Turn splitting(const Block& m) {
    const double half = 0.5 * (m.a - m.d);
    const double z = half + copy_sign(sqrt_(max_(0.0, half * half + m.b * m.c)), half);
    const double length = hypot_(z, m.c);
    return {z / length, m.c / length, {m.d + z, m.b - m.c, 0.0, z != 0 ? m.d - m.b * m.c / z : m.d}};
}

// A pair: to equal diagonal entries.
FASTLORA_INLINE Turn balancing(const Block& m) {
    const double sum = m.b + m.c, difference = m.a - m.d, length = hypot_(sum, difference);
    const double cosine = sqrt_(0.5 * (1 + abs_(sum) / length));
    const double sine = -copy_sign(difference / (2 * length * cosine), sum);
    const double aa = m.a * cosine + m.b * sine, bb = m.b * cosine - m.a * sine;
    const double cc = m.c * cosine + m.d * sine, dd = m.d * cosine - m.c * sine;
    const double mean = 0.5 * (m.a + m.d);
    return {cosine, sine, {mean, bb * cosine + dd * sine, cc * cosine - aa * sine, mean}};
}

// Two single eigenvalues change places.
FASTLORA_INLINE Turn exchanging(const Block& m) {
    const double y = m.d - m.a, length = hypot_(m.b, y);
    return {length > 0 ? m.b / length : 0.0, length > 0 ? y / length : 1.0, {m.d, m.b, m.c, m.a}};
}

// Gives the 2x2 block at k equal diagonal entries, or splits it if its eigenvalues are real; the second pass is for a
// nearly equal pair that rounding has turned real.
template <class S>
FASTLORA_INLINE void standardise(const S& s, int k) {
    FASTLORA_ROLLED
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

// Solves m x = b, order <= 4, by elimination with complete pivoting; pivots below `floor` are raised to it.
// m [4, 4], b [4], x [4], column_of [4].
template <class Memory>
FASTLORA_INLINE void solve_small(Memory m, Memory b, Memory x, Memory column_of, int order, double floor) {
    FASTLORA_ROLLED
    for (int k = 0; k < order; ++k) column_of[k] = k;
    FASTLORA_ROLLED
    for (int k = 0; k < order; ++k) {
        int row = k, column = k;
        FASTLORA_ROLLED
        for (int i = k; i < order; ++i) FASTLORA_ROLLED
        for (int j = k; j < order; ++j)
            if (abs_(double(m[4 * i + j])) > abs_(double(m[4 * row + column]))) row = i, column = j;
        FASTLORA_ROLLED
        for (int j = 0; j < order; ++j) {
            const double t = m[4 * k + j];
            m[4 * k + j] = m[4 * row + j];
            m[4 * row + j] = t;
        }
        const double t = b[k];
        b[k] = b[row];
        b[row] = t;
        FASTLORA_ROLLED
        for (int i = 0; i < order; ++i) {
            const double u = m[4 * i + k];
            m[4 * i + k] = m[4 * i + column];
            m[4 * i + column] = u;
        }
        const double c = column_of[k];
        column_of[k] = column_of[column];
        column_of[column] = c;
        if (abs_(double(m[4 * k + k])) < floor) m[4 * k + k] = floor;
        FASTLORA_ROLLED
        for (int i = k + 1; i < order; ++i) {
            const double factor = m[4 * i + k] / m[4 * k + k];
            FASTLORA_ROLLED
            for (int j = k; j < order; ++j) m[4 * i + j] -= factor * m[4 * k + j];
            b[i] -= factor * b[k];
        }
    }
    FASTLORA_ROLLED
    for (int k = order - 1; k >= 0; --k) {
        FASTLORA_ROLLED
        for (int j = k + 1; j < order; ++j) b[k] -= m[4 * k + j] * b[j];
        b[k] = b[k] / m[4 * k + k];
    }
    FASTLORA_ROLLED
    for (int k = 0; k < order; ++k) x[int(column_of[k])] = b[k];
}

// Of lower_subspace, then of the subspace [2, 4] itself.
constexpr int kSubspaceWork = 28, kSwapScratch = kSubspaceWork + 8;

// Columns [-X; I] with T11 X - X T22 = T12 span the invariant subspace of the lower block T22 of the blocks of sizes n1
// at k and n2 behind it: subspace [2, 4], a column a row. work: kSubspaceWork.
template <class S, class Memory>
FASTLORA_INLINE void lower_subspace(const S& s, int k, int n1, int n2, Memory subspace, Memory work) {
    const int order = n1 * n2, k2 = k + n1;
    const Memory m = work, b = work + 16, x = work + 20;
    double largest = 0;
    FASTLORA_ROLLED
    for (int i = 0; i < n1 + n2; ++i) FASTLORA_ROLLED
    for (int j = 0; j < n1 + n2; ++j) largest = max_(largest, abs_(s.at(k + i, k + j)));
    FASTLORA_ROLLED
    for (int i = 0; i < 16; ++i) m[i] = 0;
    FASTLORA_ROLLED
    for (int i = 0; i < n1; ++i) {
        FASTLORA_ROLLED
        for (int j = 0; j < n2; ++j) {
            const int at = i * n2 + j;
            b[at] = s.at(k + i, k2 + j);
            FASTLORA_ROLLED
            for (int l = 0; l < n1; ++l) m[4 * at + l * n2 + j] += s.at(k + i, k + l);
            FASTLORA_ROLLED
            for (int l = 0; l < n2; ++l) m[4 * at + i * n2 + l] -= s.at(k2 + l, k2 + j);
        }
    }
    solve_small(m, b, x, work + 24, order, max_(kEpsilon<double> * largest, 1e-290));
    FASTLORA_ROLLED
    for (int j = 0; j < n2; ++j) {
        FASTLORA_ROLLED
        for (int i = 0; i < n1; ++i) subspace[4 * j + i] = -x[i * n2 + j];
        FASTLORA_ROLLED
        for (int i = 0; i < n2; ++i) subspace[4 * j + n1 + i] = i == j ? 1.0 : 0.0;
        FASTLORA_ROLLED
        for (int i = n1 + n2; i < 4; ++i) subspace[4 * j + i] = 0;
    }
}

}  // namespace fastlora::FASTLORA_ROOM
