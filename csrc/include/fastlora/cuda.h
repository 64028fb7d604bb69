// CUDA entry points: addresses in, CUDA error number out (0: success), stream last.
#pragma once

namespace fastlora::cuda {

// Number of devices in *count; a machine without a driver gives an error, not a crash.
int device_count(int* count);

// Writes 1 + index to each of `count` ints on the current device: proves that the built code runs there.
int self_test(int* out, int count, void* stream);

const char* error_message(int error);

}  // namespace fastlora::cuda
