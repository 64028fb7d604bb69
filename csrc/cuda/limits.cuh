// What the device in use allows a block.
#pragma once
#include "platform.h"

namespace fastlora::cuda {

constexpr size_t kStaticShared = 1024;  // more than any kernel's static arrays take

inline int largest_shared(int* bytes) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

}  // namespace fastlora::cuda
