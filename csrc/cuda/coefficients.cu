// The launch of coefficients.cuh.
#include "coefficients.cuh"
#include "launch.h"

namespace fastlora::cuda {

int coefficients(const CoefficientArgs& a, void* stream) {
    if (a.groups == 0 || a.k == 0) return cudaSuccess;
    if (a.movers < 1 || a.movers > a.k || a.r < 1 || a.w < 1) return cudaErrorInvalidValue;
    const int threads = a.k * kWarpSize < kCoefficientThreads ? int(a.k) * kWarpSize : kCoefficientThreads;
    return launch_kernel(coefficients_kernel, a.groups, threads, 0, stream, a);
}

}  // namespace fastlora::cuda
