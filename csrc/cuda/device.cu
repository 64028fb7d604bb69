// Whether this build's device code runs on the machine at hand.
#include "fastlora/cuda.h"
#include "platform.h"

namespace fastlora::cuda {

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) self_test_kernel(int* out, int count) {
    const int i = int(blockIdx.x) * kThreads + int(threadIdx.x);
    if (i < count) out[i] = i + 1;
}

}  // namespace

int device_count(int* count) {
    *count = 0;
    return static_cast<int>(cudaGetDeviceCount(count));
}

int self_test(int* out, int count, void* stream) {
    if (count == 0) return 0;
    return launch_kernel(self_test_kernel, (count + kThreads - 1) / kThreads, kThreads, 0, stream, out, count);
}

const char* error_message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fastlora::cuda
