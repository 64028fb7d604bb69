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
// bounds it: a chain of dependent steps does, 7 sweeps of r-1 rounds, then 10 bulges per eigenvalue. For 224
// modules of k = 8, r = 16: two blocks of 8 warps a multiprocessor by registers, 71 KB of shared memory each, so all
// modules at once; predicted 0.13 ms on an H100 (docs/gpu_kernels.md).
#pragma once
#include "chain_whitening.cuh"
#include "schur.cuh"

namespace fastlora::cuda {

// A module with a bad block reports it and shares nothing.
__device__ __forceinline__ void refuse(const Module& m) {
#pragma unroll 1
    for (int e = int(threadIdx.x); e < m.l.k * m.l.r; e += int(blockDim.x))
        m.a.sigma[m.group * m.l.k * m.l.r + e] = NAN;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < m.l.k; i += int(blockDim.x)) m.a.kept[m.group * m.l.k + i] = 0;
    if (threadIdx.x != 0) return;
    m.a.shared[m.group] = 0;
    m.a.info[m.group] = kNonFinite;
}

// Largest magnitude of the first `rows` of n columns, infinity if there is a NaN; `largest` [n]: scratch.
__device__ __forceinline__ double largest_entry(Crew crew, Doubles x, int rows, int n, int ld, Doubles largest) {
#pragma unroll 1
    for (int j = crew.rank; j < n; j += crew.size) {
        double own = 0;
#pragma unroll 2
        for (int i = 0; i < rows; ++i) own = fmax(own, magnitude_or_infinity<double>(x[j * ld + i]));
        largest[j] = own;
    }
    crew.sync();
    double all = 0;
#pragma unroll 2
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
        for_entries(crew, n, n,
                    [&](int row, int column) { matrix[column * ld + row] = scale * matrix[column * ld + row]; });
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
    for_entries(crew, n, n, [&](int j, int i) { s.set(i, j, scale * product[j * ld + i]); });
    int count = 0;
    const bool converged = ordered_schur(s, scale * m.a.threshold, {re, im, m.solver(2), m.solver(3)}, &count);
    if (!converged) return {kNotConverged, 0};
#pragma unroll 1
    for (int j = crew.rank; j < n; j += crew.size) set_value(m, descending_rank(re, n, j), back * re[j], back * im[j]);
    return {kOk, count};
}

// M = (1/k)[U_iᵀU_j] of order k·r, by columns, every crew some of its blocks.
__device__ __forceinline__ void fill_mean(const Module& m) {
    const Crew crew = m.whitener(), block = whole_block();
    const int own = crew.block ? 0 : int(threadIdx.x) / kWarpSize, k = m.l.k, r = m.l.r, ld = m.l.order_ld;
    const Doubles matrix = m.chain();
    for (int i = 0; i < k; ++i) {
        for_entries(block, r, r, [&](int q, int p) {
            matrix[(i * r + q) * ld + i * r + p] = p == q && p < m.kept()[i] ? 1.0 / k : 0.0;
        });
    }
    int turn = 0;
    for (int i = 0; i < k; ++i) {
        for (int j = i + 1; j < k; ++j) {
            if (own >= m.l.crews || turn++ % m.l.crews != own) continue;
            overlap(m, crew, i, j, m.whitened(i), m.whitened(j), m.root(own), m.columns(own));
            crew.sync();
            for_entries(crew, r, r, [&](int p, int q) {
                const double value = m.root(own)[q * m.l.ld + p] / k;
                matrix[(j * r + q) * ld + i * r + p] = value;
                matrix[(i * r + p) * ld + j * r + q] = value;
            });
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

// kOnChip: the block's memory is shared memory; else a slice of `workspace`. kSmallProduct: as of Module.
template <bool kOnChip, bool kSmallProduct>
__global__ void __launch_bounds__(kChainThreads, kOnChip ? 2 : 1)
    chain_kernel(ChainArgs a, ChainLayout l, double* workspace) {
    double* slice = workspace + int64_t(blockIdx.x) * l.total;
    const Doubles memory = kOnChip ? dynamic_shared<double>() : Doubles(slice);
    const Ints integers = (kOnChip ? dynamic_shared<int>() : Ints(reinterpret_cast<int*>(slice))) + 2 * l.integers;
    if constexpr (kOnChip) {
        chain_module({a, l, memory, integers, int64_t(blockIdx.x), kSmallProduct});
    } else {
        for (int64_t group = blockIdx.x; group < a.groups; group += gridDim.x) {
            chain_module({a, l, memory, integers, group, kSmallProduct});
            __syncthreads();
        }
    }
}

}  // namespace fastlora::cuda
