// The panels of difference_products.
#pragma once
#include "simd.h"

namespace fastlora::FASTLORA_ISA {

constexpr int kPanel = 32;  // rows

struct Panel {
    int64_t row;
    int rows;
};

}  // namespace fastlora::FASTLORA_ISA
