// The first half of a chain: one module's blocks surveyed and whitened, and the product C of the overlaps.
// Shapes and steps: chain.cuh. Where the matrices lie: chain_layout.h.
#pragma once
#include "chain_layout.h"
#include "pivoted_cholesky.cuh"
#include "scale.cuh"

namespace fastlora::cuda {

// One module in the memory of its block. small_product: known when it is compiled to be the product of more than two
// adapters whose matrices are each a warp's; code for anything else is left out.
struct Module {
    const ChainArgs& a;
    const ChainLayout& l;
    Doubles memory;
    Ints integers;
    int64_t group;
    bool small_product;

    __device__ const double* left(int i, int j) const { return a.left + ((group * l.k + i) * l.k + j) * l.r * l.r; }
    __device__ const double* right(int i) const { return a.right + (group * l.k + i) * l.r * l.r; }
    __device__ double* basis(int i) const { return a.basis + (group * l.k + i) * l.r * l.width; }

    __device__ Doubles root(int crew) const { return memory + (l.own + 2 * int64_t(crew) * l.matrix); }
    __device__ Doubles columns(int crew) const { return root(crew) + l.matrix; }
    __device__ Doubles whitened(int slot) const { return memory + (l.whitened + int64_t(slot) * l.matrix); }
    __device__ Doubles vectors(int crew) const { return memory + (l.vectors + int64_t(2) * l.r * crew); }
    __device__ Doubles first() const { return memory + l.first; }
    __device__ Doubles carry() const { return memory + l.carry; }
    __device__ Doubles chain() const { return memory + l.chain; }
    __device__ Doubles solver(int vector) const { return memory + (l.solver + int64_t(vector) * l.order); }

    __device__ Ints kept() const { return integers; }
    __device__ Ints exponents() const { return integers + l.k; }  // of the left blocks, then of the right ones
    __device__ Ints order(int crew) const { return integers + (3 * l.k + 2 * l.r * crew); }
    __device__ Ints solver_order() const { return integers + (3 * l.k + 2 * l.r * l.crews); }

    __device__ bool mean() const { return !small_product && a.kind == kMean; }
    __device__ bool symmetric() const { return !small_product && (a.kind != kProduct || l.k <= 2); }
    // Who whitens, and who solves for the order of the chain's matrix.
    __device__ Crew whitener() const { return !small_product && l.r > kWarpRank ? whole_block() : own_warp(); }
    __device__ Crew solving() const { return by_block() ? whole_block() : own_warp(); }
    __device__ bool solves() const { return by_block() || threadIdx.x < kWarpSize; }
    __device__ bool by_block() const { return !small_product && l.order > kWarpRank; }
};

// Half the exponent that brings the largest of a block into [1/2, 2) when it is taken out of the block.
__device__ __forceinline__ int half_exponent(double largest) {
    int power = 0;
    if (largest > 0) frexp(largest, &power);
    return power >> 1;
}

// Reads every block once: whether all are finite, and the exponents of those on the diagonal. Results are zero so far.
__device__ __forceinline__ bool survey(const Module& m) {
    const int warps = int(blockDim.x) / kWarpSize, warp = int(threadIdx.x) / kWarpSize;
    const int lane = int(threadIdx.x) % kWarpSize, entries = m.l.r * m.l.r;
    bool bad = false;
    int turn = 0;
    for (int i = 0; i < m.l.k; ++i) {
        for (int j = i; j <= m.l.k; ++j) {  // the last is the right block
            if (turn++ % warps != warp) continue;
            const double* block = j < m.l.k ? m.left(i, j) : m.right(i);
            double largest = 0;
            for (int e = lane; e < entries; e += kWarpSize) largest = fmax(largest, magnitude_or_infinity(block[e]));
            largest = warp_max(largest);
            bad |= isinf(largest);
            if (lane == 0 && (j == i || j == m.l.k))
                m.exponents()[j == i ? i : m.l.k + i] = half_exponent(isinf(largest) ? 0.0 : largest);
        }
    }
    double* basis = m.basis(0);
    const int64_t size = int64_t(m.l.k) * m.l.r * m.l.width;
    for (int64_t e = threadIdx.x; e < size; e += blockDim.x) basis[e] = 0.0;
    double* values = m.a.values + m.group * m.l.width * 2;
#pragma unroll 1
    for (int e = int(threadIdx.x); e < 2 * m.l.width; e += int(blockDim.x)) values[e] = 0.0;
    return __syncthreads_or(bad) == 0;
}

// Columns `order` by descending norm; sigma [n]: the norms. What is too small to be a direction has norm zero.
__device__ __forceinline__ void rank_columns(Crew crew, Doubles squares, int n, Ints order, Doubles sigma) {
#pragma unroll 1
    for (int j = crew.rank; j < n; j += crew.size) {
        const int place = descending_rank(squares, n, j);
        const double square = squares[j];
        order[place] = j;
        sigma[place] = square > kLeastProduct ? sqrt(square) : 0.0;
    }
    crew.sync();
}

// How many of the descending singular values sigma · scale stay: noise floor, then rank, then share of the energy.
__device__ __forceinline__ int directions_kept(const ChainArgs& a, Doubles sigma, PowerOfTwo scale, double floor) {
    const double least = fmax(a.rtol * (scale * sigma[0]), floor);
    int count = 0;
    double total = 0.0;
    while (count < a.r) {
        const double s = sigma[count];
        if (!(scale * s > least && s > 0.0)) break;
        total += s * s;
        ++count;
    }
    if (a.rank > 0 && a.rank < count) count = int(a.rank);
    if (a.energy < 1.0) {
        int enough = 0;
        double energy = 0.0;
        while (enough < count && energy < a.energy * total) {
            const double s = sigma[enough];
            energy += s * s;
            ++enough;
        }
        count = enough;
    }
    return count;
}

// The exponent of D for a row of A of this squared length, relative to the longest: a power of four near its length,
// which may as well be in the column of B.
__device__ __forceinline__ int balance_exponent(double square, PowerOfTwo scale) {
    int power = 0;
    if (square > 0) frexp(scale * square, &power);
    const int half = (power >> 1) + 1;
    return half < 0 ? half / 2 * 2 : 0;
}

// What the arithmetic leaves of a σ that is zero: kArithmetic √(r ε) ‖B'‖ ‖A'‖, where A' has rows of length one. The
// squares of these norms are bounded by sums of rows of the Gram matrices. lengths [r], sums [2 r]: scratch.
__device__ __forceinline__ double arithmetic_noise(Crew crew, const double* left, const double* right, int r,
                                                   Doubles lengths, Doubles sums) {
#pragma unroll 1
    for (int j = crew.rank; j < r; j += crew.size) lengths[j] = sqrt(fmax(right[j * r + j], 0.0));
    crew.sync();
#pragma unroll 1
    for (int i = crew.rank; i < r; i += crew.size) {
        double of_left = 0.0, of_right = 0.0;
        const double own = lengths[i];
#pragma unroll 2
        for (int j = 0; j < r; ++j) {
            const double other = lengths[j];
            if (!(own > 0.0 && other > 0.0)) continue;
            of_left += fabs(left[i * r + j] * own) * other;
            of_right += fabs(right[i * r + j] * quick_reciprocal(own)) * quick_reciprocal(other);
        }
        sums[i] = of_left;
        sums[r + i] = of_right;
    }
    crew.sync();
    int rank = 0;
    for (int j = 0; j < r; ++j) rank += lengths[j] > 0.0;
    const double noise = kArithmetic * sqrt(rank * 2 * kEpsilon<double>) * sqrt(largest_of(sums, r).size) *
                         sqrt(largest_of(sums + r, r).size);
    crew.sync();
    return noise;
}

// D⁻¹ G D⁻¹ or, with `sign` 1, D G D by columns; the exponents of D are in `balance`.
__device__ __forceinline__ void load_columns(Crew crew, const double* block, int r, PowerOfTwo scale, Ints balance,
                                             int sign, Doubles to, int ld) {
    for_entries<4>(crew, r, r, [&](int row, int column) {
        to[column * ld + row] = ldexp(scale * block[column * r + row], sign * (balance[row] + balance[column]));
    });
}

// T of adapter i in slot `slot`, by columns; those behind the kept ones are zero. False if not converged.
__device__ __forceinline__ bool whiten(const Module& m, Crew crew, int own, int i, int slot) {
    const int r = m.l.r, ld = m.l.ld;
    const int left_power = m.exponents()[i], right_power = m.exponents()[m.l.k + i];
    const Doubles root = m.root(own), x = m.columns(own), t = m.whitened(slot), vector = m.vectors(own);
    const Ints order = m.order(own);
    const int64_t adapter = m.group * m.l.k + i;
    const double noise = arithmetic_noise(crew, m.left(i, i), m.right(i), r, x, vector);
    const Ints balance = order + r;
    const auto find_balance = [&] {
#pragma unroll 1
        for (int j = crew.rank; j < r; j += crew.size)
            balance[j] = balance_exponent(m.right(i)[j * r + j], PowerOfTwo(-2 * right_power));
        crew.sync();
    };
    find_balance();
    load_columns(crew, m.right(i), r, PowerOfTwo(-2 * right_power), balance, -1, root, ld);
    load_columns(crew, m.left(i, i), r, PowerOfTwo(-2 * left_power), balance, 1, t, ld);
    crew.sync();
    pivoted_cholesky(crew, 2, r, ld, root, t, vector, order);
    multiply(crew, r, r, r, by_rows(root, ld), by_columns(t, ld), [=](int p, int j, double y) { x[j * ld + p] = y; });
    const bool converged = orthogonalise(crew, x, r, r, ld, vector);
    const Doubles sigma = vector + r;
    rank_columns(crew, vector, r, order, sigma);

    find_balance();  // the factorisation worked in its place
    const PowerOfTwo scale(left_power + right_power), back(-left_power);
    const int kept = directions_kept(m.a, sigma, scale, fmax(m.a.floor[adapter], noise));
#pragma unroll 1
    for (int j = crew.rank; j < r; j += crew.size) m.a.sigma[adapter * r + j] = scale * sigma[j];
    if (crew.rank == 0) {
        m.kept()[i] = kept;
        m.a.kept[adapter] = kept;
    }
    const auto directions = [=](int p, int j) -> double { return x[order[j] * ld + p]; };
    multiply(crew, r, kept, r, by_columns(root, ld), directions, [=](int p, int j, double y) {
        const double s = sigma[j];
        t[j * ld + p] = ldexp(back * (y / (s * s)), balance[p]);
    });
    for_entries(crew, r, r - kept, [&](int row, int column) { t[(kept + column) * ld + row] = 0.0; });
    return converged;
}

// U_iᵀU_j = T_iᵀ G_ij T_j, i < j, MATH (2), by columns into `root`, which with `scratch` the crew has for itself.
__device__ __forceinline__ void overlap(const Module& m, Crew crew, int i, int j, Doubles ti, Doubles tj, Doubles root,
                                        Doubles scratch) {
    const int r = m.l.r, ld = m.l.ld;
    const double* block = m.left(i, j);
    for_entries<4>(crew, r, r, [&](int row, int column) { root[column * ld + row] = block[column * r + row]; });
    crew.sync();
    multiply(crew, r, r, r, by_rows(root, ld), by_columns(tj, ld),
             [=](int p, int q, double y) { scratch[q * ld + p] = y; });
    crew.sync();
    multiply(crew, r, r, r, by_rows(ti, ld), by_columns(scratch, ld),
             [=](int p, int q, double y) { root[q * ld + p] = y; });
}

__device__ __forceinline__ void copy(Crew crew, const Module& m, Doubles from, Doubles to) {
    const int r = m.l.r, ld = m.l.ld;
    for_entries(crew, r, r, [&](int row, int column) { to[column * ld + row] = from[column * ld + row]; });
}

// C = C (U_{i-1}ᵀU_i) for the adapters from `begin` on, whose overlaps the crews hold. C ends where it was.
__device__ __forceinline__ void multiply_chain(const Module& m, int begin, int count) {
    const Crew block = whole_block();
    const int r = m.l.r, ld = m.l.ld;
    const Doubles chain = m.chain(), spare = m.columns(0);
    bool moved = false;
#pragma unroll 1
    for (int c = 0; c < count; ++c) {
        const int i = begin + c;
        if (i == 0) continue;
        if (i == 1) {
            copy(block, m, m.root(c), chain);
        } else {
            const Doubles from = moved ? spare : chain, to = moved ? chain : spare;
            multiply(block, r, r, r, by_columns(from, ld), by_columns(m.root(c), ld),
                     [=](int p, int q, double y) { to[q * ld + p] = y; });
            moved = !moved;
        }
        __syncthreads();
    }
    if (moved) copy(block, m, spare, chain);
}

// All whitenings and, but for the mean, C = (U₁ᵀU₂)…(U_{k-1}ᵀU_k), for k = 1 the identity on the kept directions.
__device__ __forceinline__ bool whiten_all(const Module& m) {
    const Crew crew = m.whitener(), block = whole_block();
    const int own = crew.block ? 0 : int(threadIdx.x) / kWarpSize, k = m.l.k, crews = m.l.crews;
    bool failed = false;
#pragma unroll 1
    for (int begin = 0; begin < k; begin += crews) {
        const int i = begin + own, count = k - begin < crews ? k - begin : crews;
        const bool busy = own < count;
        if (busy) failed |= !whiten(m, crew, own, i, m.mean() ? i : own);
        __syncthreads();
        if (m.mean()) continue;
        if (begin == 0) copy(block, m, m.whitened(0), m.first());
        if (busy && i > 0) {
            const Doubles before = own > 0 ? m.whitened(own - 1) : m.carry();
            overlap(m, crew, i - 1, i, before, m.whitened(own), m.root(own), m.columns(own));
        }
        __syncthreads();
        multiply_chain(m, begin, count);
        copy(block, m, m.whitened(count - 1), m.carry());
        __syncthreads();
    }
    if (k == 1 && !m.mean()) {
        const Doubles chain = m.chain();
        const int ld = m.l.ld, kept = m.kept()[0];
        for_entries(block, m.l.r, m.l.r, [&](int row, int column) {
            chain[column * ld + row] = row == column && column < kept ? 1.0 : 0.0;
        });
    }
    return __syncthreads_or(failed) == 0;
}

}  // namespace fastlora::cuda
