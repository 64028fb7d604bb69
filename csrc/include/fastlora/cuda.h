// CUDA entry points: addresses on the current device in, CUDA error number out (0: success), stream last. Nothing is
// allocated and nothing waits for the device.
#pragma once
#include <cstdint>

#include "fastlora/kernels.h"

namespace fastlora::cuda {

// The largest matrices that the kernels take.
constexpr int kEighLargest = 256;       // n
constexpr int kSvdLargest = 256;        // min(p, q)
constexpr int kSvdLongest = 4096;       // max(p, q)
constexpr int kChainLargestRank = 256;  // r, in the workspace; what fits on chip is the device's
constexpr int kChainLargestMean = 512;  // k·r, for the mean

// Number of devices in *count; a machine without a driver gives an error, not a crash.
int device_count(int* count);

// Whether this build has code that the current device runs; 10·major + minor of its compute capability.
int device_code(int* architecture);

const char* error_message(int error);

// Batched solvers of float or double matrices; info as in kernels.h, shapes in csrc/cuda/eigh.cuh and svd.cu.
int eigh(const void* a, void* values, void* vectors, int32_t* info, int64_t batch, int n, bool is_double, void* stream);
int svd(const void* a, void* ut, void* s, void* vt, int32_t* info, int64_t batch, int p, int q, bool is_double,
        void* stream);

// Arguments as on the CPU, with addresses on the device; `threads` is not read. Every output is written. `workspace`:
// chain_workspace bytes on the device; none where a module fits on chip.
int chain(const ChainArgs& args, void* workspace, void* stream);
int chain_workspace(const ChainArgs& args, int64_t* bytes);

// Arguments of the coefficients kernel, a row of 8-byte fields: see csrc/cuda/coefficients.cuh.
struct CoefficientArgs {
    const double* projected;  // [g, k, k, r, r]: blocks i <= j
    const double* other;      // [g, k, r, r]
    const double* basis;      // [g, k, r, w]; those of the first `movers` are read
    const double* scaling;    // [g, k]
    const double* strength;   // [g, k]
    double* H;                // [g, k, w, r]
    double* norms;            // [g, k]
    double* shared;           // [g, k]
    double* removal;          // [g, k, movers, r, r], the last two with these strides:
    double* mixing;           // [g, k, w, r], likewise
    int64_t groups, k, r, w, movers;
    int64_t removal_row, removal_column, mixing_row, mixing_column;
};

int coefficients(const CoefficientArgs& args, void* stream);

}  // namespace fastlora::cuda
