// Reading and writing at places of open files.
#pragma once
#include <cstdint>

namespace fastlora {

// Above it, what is given for a descriptor is the address where a file is mapped whole.
constexpr int64_t kLargestDescriptor = INT32_MAX;

// All bytes at an offset: 0, or the errno of what went wrong. `file`: a descriptor or a mapped file.
int write_all(int64_t file, const char* data, int64_t bytes, int64_t offset);

constexpr int kEndOfFile = -1;

// As many bytes from an offset: 0, kEndOfFile where there are fewer, or the errno of what went wrong.
int read_all(int file, char* data, int64_t bytes, int64_t offset);

}  // namespace fastlora
