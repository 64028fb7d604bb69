// Launches, and what the device in use allows a block of shared memory.
#pragma once
#include <mutex>
#include <set>
#include <utility>

#include "platform.h"

namespace fastlora::cuda {

constexpr size_t kStaticShared = 1024;  // more than the static arrays of any kernel that takes dynamic memory

// An error that is returned is told there: CUDA keeps it too, and whoever asks for it after a launch of his own, as
// torch does, would take it for his.
inline int returned(int error) {
    if (error) cudaGetLastError();
    return error;
}

// Bytes of shared memory that a block may have, static arrays included.
inline int largest_shared(int* bytes) {
    int device = 0;
    if (const int error = cudaGetDevice(&device)) return error;
    return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Without asking, a kernel has 48 KB less its static arrays. Each may have all that the device in use gives, which is
// asked for once: a limit of every launch's own would be taken back by the launch of another thread.
inline int allow_shared(const void* kernel) {
    static std::mutex lock;
    static std::set<std::pair<const void*, int>> allowed;
    int device = 0, largest = 0;
    if (const int error = cudaGetDevice(&device)) return error;
    const std::lock_guard<std::mutex> guard(lock);
    if (allowed.count({kernel, device})) return cudaSuccess;
    if (const int error = largest_shared(&largest)) return error;
    if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               largest - static_cast<int>(kStaticShared)))
        return error;
    allowed.insert({kernel, device});
    return cudaSuccess;
}

// CUDA error number.
template <class... Parameters, class... Arguments>
int launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t dynamic_bytes, void* stream,
                  Arguments... arguments) {
    if (blocks < 1 || blocks > INT32_MAX) return cudaErrorInvalidValue;
    if (dynamic_bytes > 0)
        if (const int error = allow_shared(reinterpret_cast<const void*>(kernel))) return returned(error);
    return returned(start_kernel<Parameters...>(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                                                dynamic_bytes, stream, static_cast<Parameters>(arguments)...));
}

}  // namespace fastlora::cuda
