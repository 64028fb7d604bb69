// finite: whether a stored matrix holds neither NaN nor infinity. Bound by reading it once.
#include "table.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {
namespace {

// `exponent`: the bits that are all set in NaN and infinity.
template <class Word>
bool rows_are_finite(const Matrix& m, Word exponent) {
    struct __attribute__((packed)) Stored {
        Word bits;
    };
    for (int64_t i = 0; i < m.rows; ++i) {
        const Stored* row = reinterpret_cast<const Stored*>(m.data) + i * m.stride;
        Word bad = 0;
        for (int64_t j = 0; j < m.cols; ++j) bad |= Word((row[j].bits & exponent) == exponent);
        if (bad) return false;
    }
    return true;
}

}  // namespace

bool finite(const Matrix& matrix) {
    switch (static_cast<DType>(matrix.dtype)) {
        case DType::f32:
            return rows_are_finite<uint32_t>(matrix, 0x7f800000u);
        case DType::f64:
            return rows_are_finite<uint64_t>(matrix, 0x7ff0000000000000u);
        case DType::f16:
            return rows_are_finite<uint16_t>(matrix, 0x7c00u);
        case DType::bf16:
            return rows_are_finite<uint16_t>(matrix, 0x7f80u);
        case DType::bytes:
            return true;
    }
    return false;
}

}  // namespace fastlora::FASTLORA_ISA
