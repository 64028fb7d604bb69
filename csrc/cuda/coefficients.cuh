// coefficients: from the basis of a module to the coefficients of its shared and unique parts, MATH (7)-(10), float64.
//   H_i = Σ_j basis_jᵀ G_ji [w, r],   ‖ΔW_i‖² = s_i² Σ G_ii ∘ A_i,   ‖ΔW_i^shared‖² = s_i² Σ (H_i A_i) ∘ H_i,
//   removal_ij = -strength_i basis_j H_i [r, r],   mixing_i = ω_i s_i H_i,   ω_i = ‖ΔW_i^shared‖ / Σ_j ‖ΔW_j^shared‖
// A block a module, a warp an adapter; ω needs the norms of all, after the one barrier. Blocks i <= j are read.
// Bytes: 8 (2 r² + r w + 2 r w + movers r²) an adapter, in L2 after the chain: 18 KB at r = w = 16, 33 MB and 10 µs for
// 224 modules of 8. Operations: 2 r² w (2 movers + 1) an adapter. No shared memory.
#pragma once
#include "fastlora/cuda.h"
#include "groups.cuh"

namespace fastlora::cuda {

constexpr int kCoefficientThreads = 256;

// Block (j, i), which lies transposed at (i, j) where j > i.
__device__ __forceinline__ View<const double*> block_of(const CoefficientArgs& a, int64_t group, int j, int i) {
    const int r = int(a.r), low = j < i ? j : i, high = j < i ? i : j;
    const double* data = a.projected + ((group * a.k + low) * a.k + high) * r * r;
    return j <= i ? by_rows(data, r) : by_columns(data, r);
}

// ‖·‖ from a sum over the lanes, which rounding may have left below zero; NaN stays.
__device__ __forceinline__ double norm_of(double part, double scaling) {
    const double square = warp_sum(part);
    return sqrt(square < 0 ? 0.0 : square) * fabs(scaling);
}

__device__ __forceinline__ void reduce_adapter(const CoefficientArgs& a, int64_t group, int i) {
    const Crew crew = own_warp();
    const int r = int(a.r), w = int(a.w), movers = int(a.movers);
    const int64_t adapter = group * a.k + i;
    const Doubles h = a.H + adapter * w * r;
    for (int j = 0; j < movers; ++j) {
        const double* basis = a.basis + (group * a.k + j) * r * w;
        multiply(crew, w, r, r, by_columns(basis, w), block_of(a, group, j, i),
                 [=](int t, int q, double y) { h[t * r + q] = j > 0 ? h[t * r + q] + y : y; });
    }
    crew.sync();
    const View<const double*> own = block_of(a, group, i, i), other = by_rows(a.other + adapter * r * r, r);
    double whole = 0, inside = 0;
    for (int e = crew.rank; e < r * r; e += crew.size) whole += own.data[e] * other.data[e];
    multiply(crew, w, r, r, by_rows(h, r), other, [&](int t, int q, double y) { inside += y * h[t * r + q]; });
    const double norm = norm_of(whole, a.scaling[adapter]), shared = norm_of(inside, a.scaling[adapter]);
    if (crew.rank == 0) {
        a.norms[adapter] = norm;
        Doubles(a.shared)[adapter] = shared;
    }
    const double factor = -a.strength[adapter];
    for (int j = 0; j < movers; ++j) {
        double* out = a.removal + (adapter * movers + j) * r * r;
        const double* basis = a.basis + (group * a.k + j) * r * w;
        const int64_t row = a.removal_row, column = a.removal_column;
        multiply(crew, r, r, w, by_rows(basis, w), by_rows(h, r),
                 [=](int p, int q, double y) { out[p * row + q * column] = factor * y; });
    }
}

__device__ __forceinline__ void mix_adapter(const CoefficientArgs& a, int64_t group, int i) {
    const Crew crew = own_warp();
    const int64_t adapter = group * a.k + i, size = a.w * a.r;
    const Doubles shared = a.shared + group * a.k, h = a.H + adapter * size;
    double total = 0;
    for (int j = 0; j < int(a.k); ++j) total += shared[j];
    const double omega = total > 0 ? shared[i] / total * a.scaling[adapter] : 0.0;
    double* out = a.mixing + adapter * size;
    for (int64_t e = crew.rank; e < size; e += crew.size)
        out[e / a.r * a.mixing_row + e % a.r * a.mixing_column] = omega * h[e];
}

__global__ void __launch_bounds__(kCoefficientThreads) coefficients_kernel(CoefficientArgs a) {
    const int warps = int(blockDim.x) / kWarpSize, warp = int(threadIdx.x) / kWarpSize;
    for (int i = warp; i < int(a.k); i += warps) reduce_adapter(a, blockIdx.x, i);
    __syncthreads();
    for (int i = warp; i < int(a.k); i += warps) mix_adapter(a, blockIdx.x, i);
}

}  // namespace fastlora::cuda
