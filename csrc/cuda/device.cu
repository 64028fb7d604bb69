// What the CUDA runtime says: which devices there are, whether they run this build's code, what an error number means.
#include "fastlora/cuda.h"
#include "launch.h"

namespace fastlora::cuda {

namespace {

// Stands for all kernels, which are compiled for the same architectures; it is never launched.
__global__ void nothing_kernel() {}

}  // namespace

int device_count(int* count) {
    *count = 0;
    return returned(cudaGetDeviceCount(count));
}

int device_code(int* architecture) {
    *architecture = 0;
    int device = 0, major = 0, minor = 0;
    if (const int error = cudaGetDevice(&device)) return returned(error);
    if (const int error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device))
        return returned(error);
    if (const int error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device))
        return returned(error);
    *architecture = 10 * major + minor;
    cudaFuncAttributes found{};
    return returned(cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(nothing_kernel)));
}

const char* error_message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fastlora::cuda
