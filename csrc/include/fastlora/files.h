// Reading and writing at places of open files.
#pragma once
#include <cstdint>

namespace fastlora {

// All bytes at an offset: 0, or the errno of what went wrong.
int write_all(int file, const char* data, int64_t bytes, int64_t offset);

constexpr int kEndOfFile = -1;

// As many bytes from an offset: 0, kEndOfFile where there are fewer, or the errno of what went wrong.
int read_all(int file, char* data, int64_t bytes, int64_t offset);

}  // namespace fastlora
