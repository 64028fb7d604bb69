// What the kernels need of CUDA, under names that a test's emulator can also give: the same .cuh and .cu files are
// compiled by nvcc for a GPU and by a C++ compiler for the emulator.
//   Traced<T>                         pointer to memory that threads exchange: T* on a GPU; the emulator watches it
//   FASTLORA_SHARED(T, name, count)   a static array in shared memory
//   dynamic_shared<T>()               the dynamic shared memory
//   start_kernel(kernel, blocks, threads, dynamic bytes, stream, arguments...)   CUDA error number; see launch.h
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
int start_kernel(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t dynamic_bytes, void* stream,
                 Parameters... arguments) {
    void* addresses[] = {const_cast<void*>(static_cast<const volatile void*>(&arguments))...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), addresses,
                            dynamic_bytes, static_cast<cudaStream_t>(stream));
}

#endif
