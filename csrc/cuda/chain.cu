// Launches of chain.cuh: as many whitenings at a time as fit, on chip where one fits, else in a workspace.
#include "chain.cuh"
#include "fastlora/cuda.h"
#include "launch.h"

namespace fastlora::cuda {

namespace {

constexpr int64_t kWorkspaceBlocks = 132;

int most_crews(const ChainArgs& a) {
    if (a.r > kWarpRank) return 1;
    return int(a.k < kChainThreads / kWarpSize ? a.k : kChainThreads / kWarpSize);
}

// In shared memory of `bytes`, or one of no crews if it does not fit: no more crews than the rounds of whitenings need.
ChainLayout on_chip(const ChainArgs& a, int bytes) {
    for (int crews = most_crews(a); crews > 0; --crews) {
        const ChainLayout l = chain_layout(a, crews);
        if (l.total * int64_t(sizeof(double)) + int64_t(kStaticShared) > bytes) continue;
        const int64_t rounds = (a.k + crews - 1) / crews;
        return chain_layout(a, int((a.k + rounds - 1) / rounds));
    }
    return {};
}

int64_t workspace_blocks(const ChainArgs& a) { return a.groups < kWorkspaceBlocks ? a.groups : kWorkspaceBlocks; }

bool in_range(const ChainArgs& a) {
    const bool mean = a.kind == kMean;
    return a.groups >= 0 && a.k >= 0 && a.r >= 0 && a.r <= kChainLargestRank && a.kind >= 0 && a.kind <= kMean &&
           a.width == (mean ? a.k * a.r : a.r) && (!mean || a.width <= kChainLargestMean);
}

bool is_empty(const ChainArgs& a) { return a.groups == 0 || a.k == 0 || a.r == 0; }

}  // namespace

int chain_workspace(const ChainArgs& a, int64_t* bytes) {
    *bytes = 0;
    if (!in_range(a)) return cudaErrorInvalidValue;
    if (is_empty(a)) return cudaSuccess;
    int largest = 0;
    if (const int error = largest_shared(&largest)) return error;
    if (on_chip(a, largest).crews == 0)
        *bytes = workspace_blocks(a) * chain_layout(a, most_crews(a)).total * int64_t(sizeof(double));
    return cudaSuccess;
}

int chain(const ChainArgs& a, void* workspace, void* stream) {
    if (!in_range(a)) return cudaErrorInvalidValue;
    if (is_empty(a)) return cudaSuccess;
    int largest = 0;
    if (const int error = largest_shared(&largest)) return error;
    const ChainLayout l = on_chip(a, largest);
    if (l.crews > 0) {
        const bool is_small_product = a.kind == kProduct && a.k > 2 && a.r <= kWarpRank;
        return launch_kernel(is_small_product ? chain_kernel<true, true> : chain_kernel<true, false>, a.groups,
                             l.threads, size_t(l.total) * sizeof(double), stream, a, l, static_cast<double*>(nullptr));
    }
    const ChainLayout outside = chain_layout(a, most_crews(a));
    return launch_kernel(chain_kernel<false, false>, workspace_blocks(a), outside.threads, 0, stream, a, outside,
                         static_cast<double*>(workspace));
}

}  // namespace fastlora::cuda
