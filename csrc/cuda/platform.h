// What the kernels need of CUDA, under names that a test's emulator can also give: the same .cuh and .cu files are
// compiled by nvcc for a GPU and by a C++ compiler for the emulator.
//   Traced<T>                         pointer to memory that threads exchange: T* on a GPU; the emulator watches it
//   FASTLORA_SHARED(T, name, count)   a static array in shared memory
//   dynamic_shared<T>()               the dynamic shared memory
//   launch_kernel(kernel, blocks, threads, dynamic bytes, stream, arguments...)   CUDA error number
#pragma once
#include <cstdint>

#if !defined(__CUDACC__)

#include "emulator.h"

#else

#include <cuda_runtime.h>

template <class T>
using Traced = T*;

#define FASTLORA_SHARED(T, name, count) __shared__ T name[count]

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char fastlora_dynamic_shared[];
    return reinterpret_cast<T*>(fastlora_dynamic_shared);
}

template <class... Parameters>
int launch_typed(const void* kernel, int64_t blocks, int threads, size_t dynamic_bytes, void* stream,
                 Parameters... arguments) {
    constexpr size_t kWithoutAsking = 48 * 1024;
    if (blocks < 1 || blocks > INT32_MAX) return cudaErrorInvalidValue;
    if (dynamic_bytes > kWithoutAsking) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_bytes));
        if (error != cudaSuccess) return error;
    }
    void* addresses[] = {const_cast<void*>(static_cast<const volatile void*>(&arguments))...};
    return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                            addresses, dynamic_bytes, static_cast<cudaStream_t>(stream));
}

template <class... Parameters, class... Arguments>
int launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t dynamic_bytes, void* stream,
                  Arguments... arguments) {
    return launch_typed<Parameters...>(reinterpret_cast<const void*>(kernel), blocks, threads, dynamic_bytes, stream,
                                       static_cast<Parameters>(arguments)...);
}

#endif
