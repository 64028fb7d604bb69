// Where the matrices of one module of a chain lie, in doubles from the start of a block's memory.
#pragma once
#include <cstdint>

#include "fastlora/cuda.h"
#include "orthogonalise.cuh"
#include "schur.cuh"

namespace fastlora::cuda {

constexpr int kChainThreads = 256;
constexpr int kWarpRank = 32;  // up to it one warp whitens an adapter, and solves the chain's matrix

struct ChainLayout {
    int k, r, width, order;  // order of the chain's matrix: k·r for mean, else r
    int crews, threads;      // adapters whitened at a time
    int ld, matrix;          // of r x r matrices by columns, and doubles that one takes
    int order_ld;            // of the mean's matrix
    // Of crew c: L at own + 2 c·matrix, X behind it, vectors [2, r] at vectors + 2 r·c. T of adapter or crew c at
    // whitened.
    int64_t own, whitened, vectors;
    int64_t first, carry, chain;  // T_1, T of the last adapter whitened, and C or the mean's M
    int64_t solver;               // vectors [3, order] and scratch of the swaps
    int64_t integers;             // kept [k], exponents [2 k], order [2 r] of each crew, order [order]
    int64_t total;
};

// Smallest stride of columns from which the pairs of a half-warp, `lanes` of which share a pair, read all banks.
inline int column_stride(int n, int lanes) {
    int ld = n;
    while (lanes <= 8 && ld % (2 * lanes) != lanes) ++ld;
    return ld;
}

inline ChainLayout chain_layout(const ChainArgs& a, int crews) {
    ChainLayout l{};
    const bool mean = a.kind == kMean;
    l.k = int(a.k), l.r = int(a.r), l.width = int(a.width), l.crews = crews;
    l.order = mean ? l.k * l.r : l.r;
    l.threads = l.r > kWarpRank || mean ? kChainThreads : crews * kWarpSize;
    l.ld = l.r > kWarpRank ? l.r | 1 : column_stride(l.r, lanes_of_pair(l.r, kWarpSize));
    l.matrix = l.r * (l.ld > l.r ? l.ld : l.r | 1);
    const int members = l.order > kWarpRank ? l.threads : kWarpSize;
    l.order_ld = mean ? column_stride(l.order, lanes_of_pair(l.order, members)) : l.ld;
    int64_t at = 0;
    const auto take = [&at](int64_t count) {
        const int64_t start = at;
        at += count;
        return start;
    };
    l.own = take(int64_t(2) * crews * l.matrix);
    l.whitened = take(int64_t(mean ? l.k : crews) * l.matrix);
    l.vectors = take(int64_t(2) * crews * l.r);
    l.first = take(mean ? 0 : l.matrix);
    l.carry = take(mean ? 0 : l.matrix);
    l.chain = take(mean ? int64_t(l.order) * l.order_ld : l.matrix);
    l.solver = take(3 * l.order + kSwapScratch);
    l.integers = take((3 * l.k + 2 * l.r * crews + l.order + 1) / 2 + 1);
    l.total = at;
    return l;
}

}  // namespace fastlora::cuda
