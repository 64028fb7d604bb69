// Tiles of stored matrices in float64, and the one small matrix product that all passes are made of.
#pragma once
#include "simd.h"

namespace fastlora::FASTLORA_ISA {

// Loads and stores through these may be misaligned: tensors lie at any address of a file.
struct __attribute__((packed)) F32 {
    float value;
};
struct __attribute__((packed)) F64 {
    double value;
};
struct __attribute__((packed)) U16 {
    uint16_t value;
};

inline double from_bf16(uint16_t bits) { return __builtin_bit_cast(float, uint32_t(bits) << 16); }

// Exact; the exponent is rebased by a multiplication, which also handles subnormal halves.
inline double from_f16(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    const float magnitude = __builtin_bit_cast(float, rest << 13) * 0x1p112f;
    const float special = __builtin_bit_cast(float, (rest << 13) | 0x7f800000u);  // infinity or NaN
    const float unsigned_value = rest >= 0x7c00u ? special : magnitude;
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, unsigned_value) | sign);
}

// Rounds to nearest, ties to even.
inline uint16_t to_bf16(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40u;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

inline uint16_t to_f16(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (size >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
    if (size < 0x38800000u) {  // below 2^-14: a multiple of 2^-24; adding 0.5 rounds it in the float's own last bit
        const float shifted = __builtin_bit_cast(float, size) + 0.5f;
        return uint16_t(sign | (__builtin_bit_cast(uint32_t, shifted) - 0x3f000000u));
    }
    return uint16_t(sign | ((size + 0xfffu + ((size >> 13) & 1u) - 0x38000000u) >> 13));
}

// `count` values of row `row` from column `column`, as float64.
inline void read_row(const Matrix& m, int64_t row, int64_t column, int count, double* __restrict out) {
    const int64_t first = row * m.stride + column;
    switch (static_cast<DType>(m.dtype)) {
        case DType::f32: {
            const F32* p = reinterpret_cast<const F32*>(m.data) + first;
            for (int i = 0; i < count; ++i) out[i] = p[i].value;
            break;
        }
        case DType::f64: {
            const F64* p = reinterpret_cast<const F64*>(m.data) + first;
            for (int i = 0; i < count; ++i) out[i] = p[i].value;
            break;
        }
        case DType::bf16: {
            const U16* p = reinterpret_cast<const U16*>(m.data) + first;
            for (int i = 0; i < count; ++i) out[i] = from_bf16(p[i].value);
            break;
        }
        case DType::f16: {
            const U16* p = reinterpret_cast<const U16*>(m.data) + first;
            for (int i = 0; i < count; ++i) out[i] = from_f16(p[i].value);
            break;
        }
    }
}

inline void write_row(const Matrix& m, int64_t row, int64_t column, int count, const double* __restrict in) {
    const int64_t first = row * m.stride + column;
    switch (static_cast<DType>(m.dtype)) {
        case DType::f32: {
            F32* p = reinterpret_cast<F32*>(m.data) + first;
            for (int i = 0; i < count; ++i) p[i].value = float(in[i]);
            break;
        }
        case DType::f64: {
            F64* p = reinterpret_cast<F64*>(m.data) + first;
            for (int i = 0; i < count; ++i) p[i].value = in[i];
            break;
        }
        case DType::bf16: {
            U16* p = reinterpret_cast<U16*>(m.data) + first;
            for (int i = 0; i < count; ++i) p[i].value = to_bf16(float(in[i]));
            break;
        }
        case DType::f16: {
            U16* p = reinterpret_cast<U16*>(m.data) + first;
            for (int i = 0; i < count; ++i) p[i].value = to_f16(float(in[i]));
            break;
        }
    }
}

inline int padded(int64_t n) { return int((n + kLanes<double> - 1) / kLanes<double> * kLanes<double>); }

// tile [count, stride] = rows first .. first + count of a [n, r] matrix, columns r .. padded(r) zero.
inline void read_tile(const Matrix& m, int64_t first, int count, double* tile, int stride) {
    for (int p = 0; p < count; ++p) {
        double* row = tile + int64_t(p) * stride;
        read_row(m, first + p, 0, int(m.cols), row);
        for (int c = int(m.cols); c < stride; ++c) row[c] = 0.0;
    }
}

// The same tile of a [r, n] matrix, transposed: tile [count, stride] with stride = padded(r).
// `scratch` holds kLanes rows of `count` rounded up to kLanes.
inline void read_tile_transposed(const Matrix& m, int64_t first, int count, double* tile, int stride, double* scratch) {
    constexpr int lanes = kLanes<double>;
    const int width = padded(count);
    for (int c0 = 0; c0 < stride; c0 += lanes) {
        for (int c = 0; c < lanes; ++c) {
            double* row = scratch + int64_t(c) * width;
            const int filled = c0 + c < m.rows ? count : 0;
            if (filled) read_row(m, c0 + c, first, count, row);
            for (int p = filled; p < width; ++p) row[p] = 0.0;
        }
        for (int p0 = 0; p0 < count; p0 += lanes) {
            Vec<double> block[lanes];
            for (int c = 0; c < lanes; ++c) block[c] = load<double>(scratch + int64_t(c) * width + p0);
            transpose<double>(block);
            const int rows = min_(lanes, count - p0);
            for (int p = 0; p < rows; ++p) store<double>(tile + int64_t(p0 + p) * stride + c0, block[p]);
        }
    }
}

template <int kRows, int kVectors>
inline void product_block(int k, const double* a, ptrdiff_t a_p, ptrdiff_t a_i, const double* b, ptrdiff_t b_p,
                          double* c, ptrdiff_t c_i) {
    constexpr int lanes = kLanes<double>;
    Vec<double> sum[kRows][kVectors];
    for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVectors; ++v) sum[i][v] = load<double>(c + i * c_i + v * lanes);
    for (int p = 0; p < k; ++p) {
        Vec<double> right[kVectors];
        for (int v = 0; v < kVectors; ++v) right[v] = load<double>(b + p * b_p + v * lanes);
        for (int i = 0; i < kRows; ++i) {
            const Vec<double> left = splat<double>(a[p * a_p + i * a_i]);
            for (int v = 0; v < kVectors; ++v) sum[i][v] += left * right[v];
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVectors; ++v) store<double>(c + i * c_i + v * lanes, sum[i][v]);
}

template <int kVectors>
inline void product_columns(int m, int k, const double* a, ptrdiff_t a_p, ptrdiff_t a_i, const double* b, ptrdiff_t b_p,
                            double* c, ptrdiff_t c_i) {
    constexpr int rows = kVectorBytes == 64 ? 8 : 4;  // sums stay in 32 or 16 registers
    int i = 0;
    for (; i + rows <= m; i += rows) product_block<rows, kVectors>(k, a + i * a_i, a_p, a_i, b, b_p, c + i * c_i, c_i);
    for (; i + 4 <= m; i += 4) product_block<4, kVectors>(k, a + i * a_i, a_p, a_i, b, b_p, c + i * c_i, c_i);
    for (; i < m; ++i) product_block<1, kVectors>(k, a + i * a_i, a_p, a_i, b, b_p, c + i * c_i, c_i);
}

// c[i, j] += sum_p a[p * a_p + i * a_i] * b[p * b_p + j]   for i < m, j < n; n is a multiple of kLanes.
// Every sum runs over p in order, so a value never depends on how m and n are blocked.
inline void product(int m, int n, int k, const double* a, ptrdiff_t a_p, ptrdiff_t a_i, const double* b, ptrdiff_t b_p,
                    double* c, ptrdiff_t c_i) {
    constexpr int lanes = kLanes<double>;
    int j = 0;
    for (; j + 3 * lanes <= n; j += 3 * lanes) product_columns<3>(m, k, a, a_p, a_i, b + j, b_p, c + j, c_i);
    if (j + 2 * lanes <= n) {
        product_columns<2>(m, k, a, a_p, a_i, b + j, b_p, c + j, c_i);
        j += 2 * lanes;
    }
    if (j < n) product_columns<1>(m, k, a, a_p, a_i, b + j, b_p, c + j, c_i);
}

}  // namespace fastlora::FASTLORA_ISA
