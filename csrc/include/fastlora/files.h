// Writing to open files.
#pragma once
#include <cstdint>

namespace fastlora {

// All bytes at an offset: 0, or the errno of what went wrong.
int write_all(int file, const char* data, int64_t bytes, int64_t offset);

}  // namespace fastlora
