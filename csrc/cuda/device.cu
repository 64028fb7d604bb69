// What the CUDA runtime says: which devices there are, and what an error number means.
#include "fastlora/cuda.h"
#include "platform.h"

namespace fastlora::cuda {

int device_count(int* count) {
    *count = 0;
    return static_cast<int>(cudaGetDeviceCount(count));
}

const char* error_message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fastlora::cuda
