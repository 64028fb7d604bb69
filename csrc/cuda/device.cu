// Whether this build's device code runs on the machine at hand.
#include <cuda_runtime.h>

#include "fastlora/cuda.h"

namespace fastlora::cuda {

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) self_test_kernel(int* out, int count) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i < count) out[i] = i + 1;
}

}  // namespace

int device_count(int* count) {
    *count = 0;
    return static_cast<int>(cudaGetDeviceCount(count));
}

int self_test(int* out, int count, void* stream) {
    if (count == 0) return 0;
    self_test_kernel<<<(count + kThreads - 1) / kThreads, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(out, count);
    return static_cast<int>(cudaGetLastError());
}

const char* error_message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fastlora::cuda
