// What the kernels need of CUDA, under names that a test's emulator can also give: the same .cuh and .cu files are
// compiled by nvcc for a GPU and by a C++ compiler for the emulator.
//   Traced<T>                         pointer to memory that threads exchange: T* on a GPU; the emulator watches it
//   FASTLORA_SHARED(T, name, count)   a static array in shared memory
//   dynamic_shared<T>()               the dynamic shared memory
//   load_four, store_four             of neighbours at a multiple of 16 bytes, at once
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

__device__ __forceinline__ void load_four(const float* from, float (&to)[4]) {
    const float4 all = *reinterpret_cast<const float4*>(from);
    to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
}
__device__ __forceinline__ void load_four(const int* from, int (&to)[4]) {
    const int4 all = *reinterpret_cast<const int4*>(from);
    to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
}
__device__ __forceinline__ void load_four(const double* from, double (&to)[4]) {
    const double2 low = reinterpret_cast<const double2*>(from)[0], high = reinterpret_cast<const double2*>(from)[1];
    to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
}
__device__ __forceinline__ void store_four(float* to, const float (&from)[4]) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}
__device__ __forceinline__ void store_four(double* to, const double (&from)[4]) {
    reinterpret_cast<double2*>(to)[0] = make_double2(from[0], from[1]);
    reinterpret_cast<double2*>(to)[1] = make_double2(from[2], from[3]);
}

template <class... Parameters>
int start_kernel(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t dynamic_bytes, void* stream,
                 Parameters... arguments) {
    void* addresses[] = {const_cast<void*>(static_cast<const volatile void*>(&arguments))...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), addresses,
                            dynamic_bytes, static_cast<cudaStream_t>(stream));
}

#endif
