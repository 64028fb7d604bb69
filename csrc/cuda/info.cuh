// What a batched solver reports for each matrix, as Info in kernels.h.
#pragma once
#include <cstdint>

namespace fastlora::cuda {

enum Info : int32_t { kOk = 0, kNonFinite = 1, kNotConverged = 2 };

}  // namespace fastlora::cuda
