// Whitening, the first stage of chain (chain.cpp): T_i and the singular values of every update.
// Gram blocks are padded with zeros to the largest rank. Every update is computed at its own rank, rounded up to a
// multiple of kSizes: for adapters of ranks 8 and 16, a quarter of the operations for those of rank 8. Updates of one
// size are solved together, on which no result depends.
#pragma once
#include "parallel.h"
#include "table.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {

constexpr int kSizes = 8;

// c [m, n] = op(a) · b with row-major operands; a is [m, k], or [k, m] when transposed.
inline void multiply(int m, int n, int k, const double* a, int64_t a_stride, bool a_transposed, const double* b,
                     int64_t b_stride, double* c, int64_t c_stride) {
    const int64_t a_p = a_transposed ? a_stride : 1, a_i = a_transposed ? 1 : a_stride;
    if (n % kLanes<double> == 0) {
        product<double, true>(m, n, k, a, a_p, a_i, b, b_stride, c, c_stride);
        return;
    }
    for (int i = 0; i < m; ++i) {
        double* row = c + i * c_stride;
        for (int j = 0; j < n; ++j) row[j] = 0.0;
        for (int p = 0; p < k; ++p) {
            const double left = a[p * a_p + i * a_i];
            const double* right = b + p * b_stride;
            for (int j = 0; j < n; ++j) row[j] += left * right[j];
        }
    }
}

// One of the N = groups · k updates.
struct ChainMember {
    int64_t n;       // its size: T and the blocks are zero from there on
    int64_t place;   // among all, those of one size together
    int64_t value;   // where its eigenvalues start,
    int64_t matrix;  // and its matrices [n, n]
};

struct ChainBuffers {
    ChainMember* member;                      // [N]
    EighBatch<double>* batches;               // [sizes]
    double *values, *vectors, *core;          // [N, n], [N, n, n] of the eigendecompositions, and what these are of
    double* root;                             // L [n, n], then T [r, r]: N of them, r² apart
    double *powers, *floor;                   // [N, r] of the balance, [N] below which σ is noise
    double *chain, *left, *singular, *right;  // [groups, ·]: chain matrix, its left vectors, values, right vectors
    int32_t *info_a, *info_b;                 // [N], by place
    int32_t* info_chain;                      // [groups]
};

inline int64_t sizes_up_to(int64_t r) { return (r + kSizes - 1) / kSizes + 1; }

inline size_t lay_out(char* base, const ChainArgs& a, ChainBuffers& b) {
    Arena arena(base);
    const size_t n = size_t(a.groups * a.k), r = size_t(a.r), w = size_t(a.width), g = size_t(a.groups);
    b.member = arena.take<ChainMember>(n);
    b.batches = arena.take<EighBatch<double>>(size_t(sizes_up_to(a.r)));
    b.values = arena.take<double>(n * r);
    b.vectors = arena.take<double>(n * r * r);
    b.core = arena.take<double>(n * r * r);
    b.root = arena.take<double>(n * r * r);
    b.powers = arena.take<double>(n * r);
    b.floor = arena.take<double>(n);
    b.chain = arena.take<double>(g * w * w);
    b.left = arena.take<double>(g * w * w);
    b.singular = arena.take<double>(g * w);
    b.right = arena.take<double>(a.kind == kMean ? 0 : g * w * w);
    b.info_a = arena.take<int32_t>(n);
    b.info_b = arena.take<int32_t>(n);
    b.info_chain = arena.take<int32_t>(g);
    return arena.used();
}

// G_ij [r, r] of the projected side; only blocks i <= j are filled in.
inline const double* block(const ChainArgs& a, int64_t group, int64_t i, int64_t j) {
    return a.left + ((group * a.k + i) * a.k + j) * a.r * a.r;
}

inline const double* own_block(const ChainArgs& a, int64_t i) { return block(a, i / a.k, i % a.k, i % a.k); }

// The rows of both Gram matrices up to the last one that is not zero, rounded up.
inline int64_t size_of(const double* left, const double* right, int64_t r) {
    const auto is_zero = [&](int64_t row) {
        for (int64_t j = row; j >= 0; --j)
            if (left[row * r + j] != 0.0 || right[row * r + j] != 0.0) return false;
        return true;
    };
    int64_t n = r;
    while (n > 0 && is_zero(n - 1)) --n;
    return min_(r, (n + kSizes - 1) / kSizes * kSizes);
}

// Places of updates of one size one after another, the largest first; returns how many sizes there are.
inline int place_members(const ChainArgs& a, const ChainBuffers& b) {
    const int64_t members = a.groups * a.k;
    int64_t place = 0, value = 0, matrix = 0;
    int sizes = 0;
    for (int64_t n = a.r; n > 0; n = (n - 1) / kSizes * kSizes) {
        const int64_t first = place;
        b.batches[sizes] = {b.core + matrix, b.values + value, b.vectors + matrix, nullptr, 0, int(n)};
        for (int64_t i = 0; i < members; ++i) {
            ChainMember& own = b.member[i];
            if (own.n != n) continue;
            own.place = place++, own.value = value, own.matrix = matrix;
            value += n, matrix += n * n;
        }
        if (place > first) b.batches[sizes++].batch = place - first;
        if (place == members) break;
    }
    for (int64_t i = 0; i < members; ++i) {  // all zero: nothing is solved
        ChainMember& own = b.member[i];
        if (own.n > 0) continue;
        own.place = place++, own.value = value, own.matrix = matrix;
        b.info_a[own.place] = b.info_b[own.place] = kOk;
    }
    return sizes;
}

inline int solve(const ChainArgs& a, const ChainBuffers& b, int sizes, int32_t* info) {
    for (int s = 0; s < sizes; info += b.batches[s++].batch) b.batches[s].info = info;
    return eigh_of_sizes<double>(b.batches, sizes, int(a.threads));
}

// D and D⁻¹ Gᴬ D⁻¹ of one adapter, from [n, n] of a Gram matrix [r, r]. Rows that are not far shorter than the longest
// keep their bits.
inline void balance(const double* gram, int64_t r, int64_t n, double* powers, double* balanced) {
    double longest = 0.0, greatest = 1.0;
    for (int64_t j = 0; j < n; ++j) longest = max_(longest, gram[j * r + j]);
    for (int64_t j = 0; j < n; ++j) {
        double square = gram[j * r + j], power = 1.0;
        while (square > 0.0 && square < kUnbalanced * longest && power > kLeastPower)
            square /= kUnbalanced, power *= kPower;
        powers[j] = power;
        greatest = max_(greatest, 1.0 / power);
    }
    for (int64_t i = 0; i < n; ++i) {
        __builtin_memcpy(balanced + i * n, gram + i * r, sizeof(double) * n);
        for (int64_t j = 0; j < n && greatest > 1.0; ++j) balanced[i * n + j] = gram[i * r + j] / powers[i] / powers[j];
    }
}

// What the arithmetic leaves of a σ that is zero: kArithmetic √(r ε) ‖B'‖ ‖A'‖, where A' has rows of length one. The
// squares of these norms are bounded by sums of rows of the Gram matrices, [n, n] of [r, r].
inline double arithmetic_noise(const double* left, const double* right, int64_t r, int64_t n, double* lengths,
                               double* inverse) {
    double widest_left = 0.0, widest_right = 0.0;
    int rank = 0;
    for (int64_t i = 0; i < n; ++i) {
        lengths[i] = sqrt_(max_(right[i * r + i], 0.0));
        inverse[i] = lengths[i] > 0.0 ? 1.0 / lengths[i] : 0.0;
        rank += lengths[i] > 0.0;
    }
    for (int64_t i = 0; i < n; ++i) {
        double of_left = 0.0, of_right = 0.0;
        for (int64_t j = 0; j < n; ++j) {
            of_left += abs_(left[i * r + j]) * lengths[j];
            of_right += abs_(right[i * r + j]) * inverse[j];
        }
        widest_left = max_(widest_left, of_left * lengths[i]);
        widest_right = max_(widest_right, of_right * inverse[i]);
    }
    return kArithmetic * sqrt_(rank * 2 * kEpsilon<double>) * sqrt_(widest_left) * sqrt_(widest_right);
}

// Columns of L: eigenvectors of the balanced Gᴬ times the root of their eigenvalue, their rows times D; directions at
// the rounding level are dropped.
inline void take_root(const double* values, const double* vectors, const double* powers, int64_t n, double* root) {
    const double least = n ? values[n - 1] * double(n) * 4 * kEpsilon<double> : 0.0;
    for (int64_t j = 0; j < n; ++j) {
        const double scale = values[j] > least && values[j] > 0.0 ? sqrt_(values[j]) : 0.0;
        for (int64_t i = 0; i < n; ++i) root[i * n + j] = scale == 0.0 ? 0.0 : vectors[j * n + i] * scale * powers[i];
    }
}

// How many of the descending singular values stay: noise floor, then rank, then share of the energy.
inline int64_t directions_kept(const double* sigma, const ChainArgs& a, double floor) {
    const double least = max_(a.rtol * sigma[0], floor);
    int64_t count = 0;
    double total = 0.0, kept = 0.0;
    while (count < a.r && sigma[count] > least && sigma[count] > 0.0) total += sigma[count] * sigma[count], ++count;
    if (a.rank > 0) count = min_(count, a.rank);
    if (a.energy < 1.0) {
        int64_t enough = 0;
        while (enough < count && kept < a.energy * total) kept += sigma[enough] * sigma[enough], ++enough;
        count = enough;
    }
    return count;
}

// T = L V Σ⁻¹ over the kept directions, in place of L; all else of T and σ is zero.
inline void whiten(const ChainArgs& a, int64_t index, const ChainBuffers& b) {
    const ChainMember& own = b.member[index];
    const int64_t r = a.r, n = own.n;
    const double* values = b.values + own.value;
    double *vectors = b.vectors + own.matrix, *scratch = b.core + own.matrix;  // neither is needed any longer
    double *root = b.root + index * r * r, *sigma = a.sigma + index * r;
    for (int64_t j = 0; j < r; ++j) sigma[j] = j < n ? sqrt_(max_(values[n - 1 - j], 0.0)) : 0.0;
    const int64_t kept = directions_kept(sigma, a, max_(a.floor[index], b.floor[index]));
    a.kept[index] = kept;
    for (int64_t p = 0; p < n; ++p)
        for (int64_t j = 0; j < n; ++j) scratch[p * n + j] = j < kept ? vectors[(n - 1 - j) * n + p] : 0.0;
    multiply(int(n), int(n), int(n), root, n, false, scratch, n, vectors, n);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < kept; ++j) root[i * r + j] = vectors[i * n + j] / sigma[j];
        for (int64_t j = kept; j < r; ++j) root[i * r + j] = 0.0;
    }
    for (int64_t i = n * r; i < r * r; ++i) root[i] = 0.0;
}

inline int whiten_all(const ChainArgs& a, const ChainBuffers& b) {
    const int64_t members = a.groups * a.k, r = a.r;
    const int threads = int(a.threads);
    for_stretches(threads, members, [&](int64_t i) {
        const double *gram = own_block(a, i), *other = a.right + i * r * r;
        const int64_t n = b.member[i].n = size_of(gram, other, r);
        b.floor[i] = arithmetic_noise(gram, other, r, n, b.values + i * r, b.powers + i * r);
    });
    const int sizes = place_members(a, b);
    for_stretches(threads, members, [&](int64_t i) {
        const ChainMember& own = b.member[i];
        balance(a.right + i * r * r, r, own.n, b.powers + i * r, b.core + own.matrix);
    });
    int status = solve(a, b, sizes, b.info_a);
    if (status != kDone) return status;
    for_stretches(threads, members, [&](int64_t i) {
        const ChainMember& own = b.member[i];
        const int n = int(own.n);
        double *root = b.root + i * r * r, *core = b.core + own.matrix, *scratch = b.vectors + own.matrix;
        take_root(b.values + own.value, scratch, b.powers + i * r, n, root);
        multiply(n, n, n, own_block(a, i), r, false, root, n, scratch, n);
        multiply(n, n, n, root, n, true, scratch, n, core, n);
    });
    status = solve(a, b, sizes, b.info_b);
    if (status != kDone) return status;
    for_stretches(threads, members, [&](int64_t i) { whiten(a, i, b); });
    return kDone;
}

}  // namespace fastlora::FASTLORA_ISA
