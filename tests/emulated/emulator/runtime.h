// The part of the CUDA runtime that launchers use.
#pragma once
#include "launch.h"

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };

namespace emulator {

inline std::string last_failure;

template <class... Parameters, class... Arguments>
int launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t dynamic_bytes, void*,
                  Arguments... arguments) {
    if (blocks < 1 || blocks > INT32_MAX) return cudaErrorInvalidValue;
    last_failure = launch(dim3(unsigned(blocks)), dim3(unsigned(threads)), dynamic_bytes,
                          [=] { kernel(static_cast<Parameters>(arguments)...); });
    return last_failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulator

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = int(emulator::shared_limit);
    return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure ? emulator::last_failure.c_str() : "invalid value";
}
