// CUDA entry points: addresses on the current device in, CUDA error number out (0: success), stream last. Nothing is
// allocated and nothing waits for the device.
#pragma once
#include <cstdint>

namespace fastlora::cuda {

// Number of devices in *count; a machine without a driver gives an error, not a crash.
int device_count(int* count);

// Writes 1 + index to each of `count` ints on the current device: proves that the built code runs there.
int self_test(int* out, int count, void* stream);

const char* error_message(int error);

// Batched solvers of float or double matrices; info as in kernels.h, shapes in csrc/cuda/eigh.cuh and svd.cu. n, and
// min(p, q), up to 256; max(p, q) up to 4096.
int eigh(const void* a, void* values, void* vectors, int32_t* info, int64_t batch, int n, bool is_double, void* stream);
int svd(const void* a, void* ut, void* s, void* vt, int32_t* info, int64_t batch, int p, int q, bool is_double,
        void* stream);

}  // namespace fastlora::cuda
