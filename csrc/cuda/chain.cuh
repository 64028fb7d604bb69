// chain: from the Gram blocks of one module to its shared directions, MATH (1)-(6), by one block in one launch.
//   whitening  Gᴬ = L Lᵀ, Gᴮ = K Kᵀ, LᵀK = V Σ Qᵀ, T = L V Σ⁻¹      MATH (3): U = B T is orthonormal, σ are those of BA
//   product    M = (U₁ᵀU₂)…(U_{k-1}ᵀU_k)(U_kᵀU₁)                    MATH (5), real Schur form; k <= 2: as palindrome
//   palindrome M = C Cᵀ, C = (U₁ᵀU₂)…(U_{k-1}ᵀU_k)                  from the singular values and left vectors of C
//   mean       M = (1/k) [U_iᵀU_j] = F Fᵀ                            symmetric, order k·r, from those of F
// Pivoted Cholesky factors and one-sided Jacobi take the place of the CPU's eigendecompositions: LᵀK has the condition
// number of what it stands for and not its square, and left vectors need no accumulated rotations.
// Everything is float64. Whitenings run side by side, a warp each, where r <= 32; else the block does one at a time.
// A module that does not fit shared memory is done in global memory, a slice for each block of the grid.
// A module reads k (k+3)/2 blocks once and takes about 53 k r³ + 25 r³ operations (mean: 50 (k r)³ more). Neither
// bounds it: a chain of dependent steps does, 7 sweeps of r-1 rounds, then 10 bulges per eigenvalue. 224 modules of k =
// 8, r = 16: two blocks of 8 warps a multiprocessor by registers, 71 KB of shared memory each, all modules at once.
#pragma once
#include "chain_layout.h"
#include "ordered_schur.cuh"
#include "pivoted_cholesky.cuh"
#include "scale.cuh"

namespace fastlora::cuda {

// Below it, z = Σ U_i y_i/√(kλ) is the difference of nearly equal vectors, and no direction.
constexpr double kLeastMean = 1e-10;

// One module in the memory of its block.
struct Module {
    const ChainArgs& a;
    const ChainLayout& l;
    Doubles memory;
    Ints integers;
    int64_t group;

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

    __device__ bool mean() const { return a.kind == kMean; }
    __device__ bool symmetric() const { return a.kind != kProduct || l.k <= 2; }
    // Who whitens, and who solves for the order of the chain's matrix.
    __device__ Crew whitener() const { return l.r > kWarpRank ? whole_block() : own_warp(); }
    __device__ Crew solving() const { return l.order > kWarpRank ? whole_block() : own_warp(); }
    __device__ bool solves() const { return l.order > kWarpRank || threadIdx.x < kWarpSize; }
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
    for (int e = int(threadIdx.x); e < 2 * m.l.width; e += int(blockDim.x)) values[e] = 0.0;
    return __syncthreads_or(bad) == 0;
}

// A module with a bad block reports it and shares nothing.
__device__ __forceinline__ void refuse(const Module& m) {
    for (int e = int(threadIdx.x); e < m.l.k * m.l.r; e += int(blockDim.x))
        m.a.sigma[m.group * m.l.k * m.l.r + e] = NAN;
    for (int i = int(threadIdx.x); i < m.l.k; i += int(blockDim.x)) m.a.kept[m.group * m.l.k + i] = 0;
    if (threadIdx.x != 0) return;
    m.a.shared[m.group] = 0;
    m.a.info[m.group] = kNonFinite;
}

// Columns `order` by descending norm; sigma [n]: the norms. What is too small to be a direction has norm zero.
__device__ __forceinline__ void rank_columns(Crew crew, Doubles squares, int n, Ints order, Doubles sigma) {
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

__device__ __forceinline__ void load_columns(Crew crew, const double* block, int r, PowerOfTwo scale, Doubles to,
                                             int ld) {
    for (int e = crew.rank; e < r * r; e += crew.size) to[e / r * ld + e % r] = scale * block[e];
}

// T of adapter i in slot `slot`, by columns; those behind the kept ones are zero. False if not converged.
__device__ __forceinline__ bool whiten(const Module& m, Crew crew, int own, int i, int slot) {
    const int r = m.l.r, ld = m.l.ld;
    const int left_power = m.exponents()[i], right_power = m.exponents()[m.l.k + i];
    const Doubles root = m.root(own), x = m.columns(own), t = m.whitened(slot), vector = m.vectors(own);
    const Ints order = m.order(own);
    load_columns(crew, m.right(i), r, PowerOfTwo(-2 * right_power), root, ld);
    load_columns(crew, m.left(i, i), r, PowerOfTwo(-2 * left_power), t, ld);
    crew.sync();
    pivoted_cholesky(crew, 2, r, ld, root, t, vector, order);
    multiply(crew, r, r, r, by_rows(root, ld), by_columns(t, ld), [=](int p, int j, double y) { x[j * ld + p] = y; });
    crew.sync();
    const bool converged = orthogonalise(crew, x, r, r, ld, vector);
    const Doubles sigma = vector + r;
    rank_columns(crew, vector, r, order, sigma);

    const int64_t adapter = m.group * m.l.k + i;
    const PowerOfTwo scale(left_power + right_power), back(-left_power);
    const int kept = directions_kept(m.a, sigma, scale, m.a.floor[adapter]);
    for (int j = crew.rank; j < r; j += crew.size) m.a.sigma[adapter * r + j] = scale * sigma[j];
    if (crew.rank == 0) {
        m.kept()[i] = kept;
        m.a.kept[adapter] = kept;
    }
    const auto directions = [=](int p, int j) -> double { return x[order[j] * ld + p]; };
    multiply(crew, r, kept, r, by_columns(root, ld), directions, [=](int p, int j, double y) {
        const double s = sigma[j];
        t[j * ld + p] = back * (y / (s * s));
    });
    for (int e = kept * r + crew.rank; e < r * r; e += crew.size) t[e / r * ld + e % r] = 0.0;
    return converged;
}

// U_iᵀU_j = T_iᵀ G_ij T_j, i < j, MATH (2), by columns into `root`, which with `scratch` the crew has for itself.
__device__ __forceinline__ void overlap(const Module& m, Crew crew, int i, int j, Doubles ti, Doubles tj, Doubles root,
                                        Doubles scratch) {
    const int r = m.l.r, ld = m.l.ld;
    const double* block = m.left(i, j);
    for (int e = crew.rank; e < r * r; e += crew.size) root[e / r * ld + e % r] = block[e];
    crew.sync();
    multiply(crew, r, r, r, by_rows(root, ld), by_columns(tj, ld),
             [=](int p, int q, double y) { scratch[q * ld + p] = y; });
    crew.sync();
    multiply(crew, r, r, r, by_rows(ti, ld), by_columns(scratch, ld),
             [=](int p, int q, double y) { root[q * ld + p] = y; });
}

__device__ __forceinline__ void copy(Crew crew, const Module& m, Doubles from, Doubles to) {
    for (int e = crew.rank; e < m.l.r * m.l.ld; e += crew.size) {
        const int row = e % m.l.ld;
        if (row < m.l.r) to[e] = from[e];
    }
}

// C = C (U_{i-1}ᵀU_i) for the adapters from `begin` on, whose overlaps the crews hold. C ends where it was.
__device__ __forceinline__ void multiply_chain(const Module& m, int begin, int count) {
    const Crew block = whole_block();
    const int r = m.l.r, ld = m.l.ld;
    const Doubles chain = m.chain(), spare = m.columns(0);
    bool moved = false;
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
        for (int e = block.rank; e < m.l.r * ld; e += block.size)
            if (e % ld < m.l.r) chain[e] = e % ld == e / ld && e / ld < kept ? 1.0 : 0.0;
    }
    return __syncthreads_or(failed) == 0;
}

// Largest magnitude of the first `rows` of n columns, infinity if there is a NaN; `largest` [n]: scratch.
__device__ __forceinline__ double largest_entry(Crew crew, Doubles x, int rows, int n, int ld, Doubles largest) {
    for (int j = crew.rank; j < n; j += crew.size) {
        double own = 0;
        for (int i = 0; i < rows; ++i) own = fmax(own, magnitude_or_infinity<double>(x[j * ld + i]));
        largest[j] = own;
    }
    crew.sync();
    double all = 0;
    for (int j = 0; j < n; ++j) all = fmax(all, largest[j]);
    crew.sync();
    return all;
}

__device__ __forceinline__ void set_value(const Module& m, int j, double re, double im) {
    double* value = m.a.values + (m.group * m.l.width + j) * 2;
    value[0] = re + 0.0;
    value[1] = im + 0.0;
}

// What a solver found: an Info, and how many directions are shared.
struct Outcome {
    int info, count;
};

// C, or F of the mean's M = F Fᵀ: its squared singular values are the eigenvalues, its left vectors the eigenvectors.
__device__ __forceinline__ Outcome solve_symmetric(const Module& m, Crew crew) {
    const int n = m.l.order, ld = m.l.order_ld;
    const Doubles matrix = m.chain(), squares = m.solver(0), sigma = m.solver(1);
    const double largest = largest_entry(crew, matrix, n, n, ld, squares);
    if (isinf(largest)) return {kNonFinite, 0};
    int power = 0;
    if (m.mean()) {
        pivoted_cholesky(crew, 1, n, ld, matrix, matrix, squares, m.solver_order());
    } else {
        if (largest > 0) frexp(largest, &power);
        const PowerOfTwo scale(-power);
        for (int e = crew.rank; e < n * n; e += crew.size) {
            const int at = e / n * ld + e % n;
            matrix[at] = scale * matrix[at];
        }
        crew.sync();
    }
    const bool converged = orthogonalise(crew, matrix, n, n, ld, squares);
    rank_columns(crew, squares, n, m.solver_order(), sigma);
    if (!converged) return {kNotConverged, 0};
    int count = 0;
    const int values = m.mean() ? n : int(m.kept()[0]);
    const PowerOfTwo back(power);
    const double least = m.mean() ? fmax(m.a.threshold, kLeastMean) : m.a.threshold;
    for (int j = 0; j < values; ++j) {
        const double s = back * sigma[j];
        if (s * s > least) count = j + 1;
        if (j % crew.size == crew.rank) set_value(m, j, s * s, 0.0);
    }
    return {kOk, count};
}

// M = C · (U_kᵀU₁) in the first crew's whitened matrix, which T_1 has left.
__device__ __forceinline__ void close_chain(const Module& m) {
    const Crew block = whole_block();
    const int r = m.l.r, ld = m.l.ld;
    const Doubles product = m.whitened(0);
    overlap(m, block, 0, m.l.k - 1, m.first(), m.carry(), m.root(0), m.columns(0));
    __syncthreads();
    multiply(block, r, r, r, by_columns(m.chain(), ld), by_rows(m.root(0), ld),
             [=](int p, int q, double y) { product[q * ld + p] = y; });
    __syncthreads();
}

// The invariant subspace of M, from the ordered real Schur form of its kept corner; Qᵀ in the first crew's root.
__device__ __forceinline__ Outcome solve_product(const Module& m, Crew crew) {
    const int ld = m.l.ld, n = m.kept()[0];
    if (n == 0) return {kOk, 0};
    const Doubles product = m.whitened(0), re = m.solver(0), im = m.solver(1);
    const double largest = largest_entry(crew, product, n, n, ld, re);
    if (isinf(largest)) return {kNonFinite, 0};
    int power = 0;
    if (largest > 0) frexp(largest, &power);
    const PowerOfTwo scale(-power), back(power);
    const Schur s{crew, m.columns(0), m.root(0), n, n | 1};
    for (int e = crew.rank; e < n * n; e += crew.size) {
        const int i = e / n, j = e % n;
        s.set(i, j, scale * product[j * ld + i]);
    }
    int count = 0;
    const bool converged = ordered_schur(s, scale * m.a.threshold, {re, im, m.solver(2), m.solver(3)}, &count);
    if (!converged) return {kNotConverged, 0};
    for (int j = crew.rank; j < n; j += crew.size) set_value(m, descending_rank(re, n, j), back * re[j], back * im[j]);
    return {kOk, count};
}

// M = (1/k)[U_iᵀU_j] of order k·r, by columns, every crew some of its blocks.
__device__ __forceinline__ void fill_mean(const Module& m) {
    const Crew crew = m.whitener(), block = whole_block();
    const int own = crew.block ? 0 : int(threadIdx.x) / kWarpSize, k = m.l.k, r = m.l.r, ld = m.l.order_ld;
    const Doubles matrix = m.chain();
    for (int e = block.rank; e < k * r * r; e += block.size) {
        const int i = e / (r * r), p = e / r % r, q = e % r;
        matrix[(i * r + q) * ld + i * r + p] = p == q && p < m.kept()[i] ? 1.0 / k : 0.0;
    }
    int turn = 0;
    for (int i = 0; i < k; ++i) {
        for (int j = i + 1; j < k; ++j) {
            if (own >= m.l.crews || turn++ % m.l.crews != own) continue;
            overlap(m, crew, i, j, m.whitened(i), m.whitened(j), m.root(own), m.columns(own));
            crew.sync();
            for (int e = crew.rank; e < r * r; e += crew.size) {
                const int p = e % r, q = e / r;
                const double value = m.root(own)[q * m.l.ld + p] / k;
                matrix[(j * r + q) * ld + i * r + p] = value;
                matrix[(i * r + p) * ld + j * r + q] = value;
            }
            crew.sync();
        }
    }
    __syncthreads();
}

// basis_i = T_i Y_i: Z = Σ B_i basis_i for the first `count` directions.
__device__ __forceinline__ void write_basis(const Module& m, int count) {
    const Crew block = whole_block();
    const int r = m.l.r, ld = m.l.ld, width = m.l.width;
    const Doubles sigma = m.solver(1);
    const Ints order = m.solver_order();
    if (m.symmetric()) {
        const Doubles matrix = m.chain();
        const int order_ld = m.l.order_ld;
        const double root = sqrt(double(m.l.k));
        const bool mean = m.mean();
        for (int i = 0; i < (mean ? m.l.k : 1); ++i) {
            double* out = m.basis(i);
            const auto vectors = [=](int p, int j) -> double { return matrix[order[j] * order_ld + i * r + p]; };
            multiply(block, r, count, r, by_columns(mean ? m.whitened(i) : m.first(), ld), vectors,
                     [=](int p, int j, double y) {
                         const double s = sigma[j];                               // columns are s · vector
                         out[p * width + j] = mean ? y / (s * s * root) : y / s;  // √(kλ) = √k · s
                     });
        }
        return;
    }
    double* out = m.basis(0);
    const int n = m.kept()[0];
    multiply(block, r, count, n, by_columns(m.first(), ld), by_columns(m.root(0), n | 1),
             [=](int p, int j, double y) { out[p * width + j] = y; });
}

__device__ __forceinline__ void chain_module(const Module& m) {
    if (!survey(m)) return refuse(m);
    const bool whitened = whiten_all(m);
    if (m.mean()) fill_mean(m);
    if (!m.symmetric()) close_chain(m);
    // The solver's crew leaves its outcome where the exponents were.
    const Ints outcome = m.exponents();
    if (m.solves()) {
        const Crew crew = m.solving();
        const Outcome found = !whitened       ? Outcome{kNotConverged, 0}
                              : m.symmetric() ? solve_symmetric(m, crew)
                                              : solve_product(m, crew);
        if (crew.rank == 0) {
            outcome[0] = found.info;
            outcome[1] = found.count;
            m.a.info[m.group] = found.info;
            m.a.shared[m.group] = found.count;
        }
    }
    __syncthreads();
    if (outcome[0] == kOk) write_basis(m, outcome[1]);
}

// kOnChip: the block's memory is shared memory; else a slice of `workspace`.
template <bool kOnChip>
__global__ void __launch_bounds__(kChainThreads, kOnChip ? 2 : 1)
    chain_kernel(ChainArgs a, ChainLayout l, double* workspace) {
    double* slice = workspace + int64_t(blockIdx.x) * l.total;
    const Doubles memory = kOnChip ? dynamic_shared<double>() : Doubles(slice);
    const Ints integers = (kOnChip ? dynamic_shared<int>() : Ints(reinterpret_cast<int*>(slice))) + 2 * l.integers;
    if constexpr (kOnChip) {
        chain_module({a, l, memory, integers, int64_t(blockIdx.x)});
    } else {
        for (int64_t group = blockIdx.x; group < a.groups; group += gridDim.x) {
            chain_module({a, l, memory, integers, group});
            __syncthreads();
        }
    }
}

}  // namespace fastlora::cuda
