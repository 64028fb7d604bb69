// The stacks of similarity, and the bands of their columns that are multiplied with one another.
#pragma once
#include "simd.h"

namespace fastlora::FASTLORA_ISA {

// Adapters [first, end) and their columns. Products with it have rows of `stride` values.
struct Band {
    int64_t first, end, column, width, stride;
};

// float32 [length, width]
struct Stack {
    const float* data;
    int64_t length, width;
};

}  // namespace fastlora::FASTLORA_ISA
