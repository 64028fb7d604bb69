// The part of the CUDA runtime that launchers use. A device for every limit of shared memory that tests set.
#pragma once
#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "launch.h"

using cudaStream_t = void*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr {
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor
};
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulator {

inline thread_local std::string last_failure;
inline thread_local cudaError_t last_error = cudaSuccess;  // until cudaGetLastError takes it
inline bool has_code = true;

inline cudaError_t failed(cudaError_t error, const std::string& what) {
    last_failure = what;
    return last_error = error;
}

inline std::mutex attribute_lock;
inline std::map<std::pair<const void*, size_t>, size_t> dynamic_limits;  // by kernel and device
inline std::vector<size_t> settings;                                     // of those limits, in their order

// Dynamic shared memory that a launch of a kernel may have on the device in use.
inline DynamicLimit dynamic_limit(const void* kernel) {
    const std::lock_guard guard(attribute_lock);
    const auto found = dynamic_limits.find({kernel, shared_limit});
    return found == dynamic_limits.end() ? DynamicLimit{std::min(kWithoutAsking, shared_limit), false}
                                         : DynamicLimit{found->second, true};
}

template <class... Parameters>
int start_kernel(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t dynamic_bytes, void*,
                 Parameters... arguments) {
    const std::string failure = launch(
        dim3(blocks), dim3(threads), dynamic_bytes, [=] { kernel(arguments...); },
        dynamic_limit(reinterpret_cast<const void*>(kernel)));
    return failure.empty() ? cudaSuccess : failed(cudaErrorLaunchFailure, failure);
}

}  // namespace emulator

inline cudaError_t cudaGetDevice(int* device) {
    *device = int(emulator::shared_limit);
    return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? int(emulator::shared_limit)
             : attribute == cudaDevAttrComputeCapabilityMajor     ? 9
                                                                  : 0;
    return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
    return emulator::has_code ? cudaSuccess
                              : emulator::failed(cudaErrorNoKernelImageForDevice, "no kernel image for this device");
}

// Other threads have their turn before the one that asked launches.
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || size_t(bytes) > emulator::shared_limit)
        return emulator::failed(cudaErrorInvalidValue,
                                "shared memory that no block may have is asked for: " + std::to_string(bytes));
    {
        const std::lock_guard guard(emulator::attribute_lock);
        emulator::dynamic_limits[{kernel, emulator::shared_limit}] = size_t(bytes);
        emulator::settings.push_back(size_t(bytes));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) { return emulator::last_failure.c_str(); }
