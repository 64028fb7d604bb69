// Matrix tiles of AMX: 16 x 16 float32 sums of products of bfloat16 pairs.
//   C[i, j] += sum over k < 32 of A[i, k] * B[k, j]
// A holds 16 rows of 32 values. B holds pairs: its row p is (B[2p, 0], B[2p + 1, 0]), (B[2p, 1], B[2p + 1, 1]), ...
// so that the tile B of a matrix is the tile A of its transpose with words of 32 bits transposed.
// Products are exact. Subnormal values count as zero, also those of float32 sums; sums round to nearest, even.
#pragma once
#include "simd.h"

#if defined(__AMX_BF16__)

namespace fastlora::FASTLORA_ISA {

constexpr int kTileSide = 16;
constexpr int kTileDepth = 32;  // values along the sum

struct alignas(64) Tile {
    uint32_t pair[kTileSide][kTileSide];
};

// The tile registers of a thread: all eight 16 x 64 bytes while this lives, if they are needed.
class TileUnit {
  public:
    explicit TileUnit(bool needed = true) : needed_(needed) {
        if (!needed) return;
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = kTileSide;
        __asm__ volatile("ldtilecfg %0" : : "m"(shape));
    }
    TileUnit(const TileUnit&) = delete;
    TileUnit& operator=(const TileUnit&) = delete;
    ~TileUnit() {
        if (needed_) __asm__ volatile("tilerelease");
    }

  private:
    bool needed_;
};

template <int kRegister>
inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kRegister));
}
template <int kRegister>
inline void tile_load(const void* from, int64_t row_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(kRegister) : "memory");
}
template <int kRegister>
inline void tile_store(void* to, int64_t row_bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(kRegister) : "memory");
}
// C += A B for tile registers.
template <int kC, int kA, int kB>
inline void tile_product() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

// Calls f with the integers 0 to kCount - 1 as constants: registers have no run-time numbers.
template <int kIndex>
struct Constant {
    constexpr operator int() const { return kIndex; }
};
template <int kCount, class F>
inline void for_each(F f) {
    if constexpr (kCount > 0) {
        for_each<kCount - 1>(f);
        f(Constant<kCount - 1>{});
    }
}

// Calls f with a count as a constant: kLeast for less, kMost for more.
template <int kLeast, int kMost, class F>
inline void with_count(int64_t count, F f) {
    if constexpr (kMost > kLeast) {
        if (count < kMost) return with_count<kLeast, kMost - 1>(count, f);
    }
    f(Constant<kMost>{});
}

// Up to 16 values at any address, zeros behind them.
inline __m256i load_words(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i load_words(const uint16_t* p, __mmask16 mask) { return _mm256_maskz_loadu_epi16(mask, p); }

inline __mmask16 first_lanes(int64_t count) {
    return count >= kTileSide ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
}

// (a0, b0), (a1, b1), ... of a, then b
inline __m512i interleave_halves(__m512i both) {
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_maskz_permutexvar_epi16(~__mmask32(0), _mm512_load_si512(order), both);
}
inline __m512i interleave_words(__m256i a, __m256i b) {
    return interleave_halves(_mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(a), b, 1));
}

// out = from with its 32-bit words transposed. Quarters of rows are gathered by loads, which leaves two in-lane stages.
inline void transpose_pairs(const Tile& from, Tile& out) {
    for (int g = 0; g < 4; ++g) {
        __m512i quarter[4];  // lane l of quarter[q]: columns 4g to 4g + 3 of row 4l + q
        for (int q = 0; q < 4; ++q) {
            const auto piece = [&](int l) {
                return _mm_load_si128(reinterpret_cast<const __m128i*>(&from.pair[4 * l + q][4 * g]));
            };
            __m512i x = _mm512_castsi128_si512(piece(0));
            x = _mm512_maskz_inserti32x4(0xffff, x, piece(1), 1);
            x = _mm512_maskz_inserti32x4(0xffff, x, piece(2), 2);
            quarter[q] = _mm512_maskz_inserti32x4(0xffff, x, piece(3), 3);
        }
        const __m512i low01 = _mm512_maskz_unpacklo_epi32(0xffff, quarter[0], quarter[1]);
        const __m512i high01 = _mm512_maskz_unpackhi_epi32(0xffff, quarter[0], quarter[1]);
        const __m512i low23 = _mm512_maskz_unpacklo_epi32(0xffff, quarter[2], quarter[3]);
        const __m512i high23 = _mm512_maskz_unpackhi_epi32(0xffff, quarter[2], quarter[3]);
        _mm512_store_si512(out.pair[4 * g], _mm512_maskz_unpacklo_epi64(0xff, low01, low23));
        _mm512_store_si512(out.pair[4 * g + 1], _mm512_maskz_unpackhi_epi64(0xff, low01, low23));
        _mm512_store_si512(out.pair[4 * g + 2], _mm512_maskz_unpacklo_epi64(0xff, high01, high23));
        _mm512_store_si512(out.pair[4 * g + 3], _mm512_maskz_unpackhi_epi64(0xff, high01, high23));
    }
}

// The tile B of `depth` <= 32 rows (stride apart) and `width` <= 16 columns of a stored matrix, zeros beyond; with
// kTwice of `depth` <= 16 rows, which fill both halves. What lies `ahead` in the same way is asked for if it is whole.
template <bool kTwice = false>
inline void pack_pairs(const uint16_t* p, int64_t stride, int depth, int width, Tile& out,
                       const uint16_t* ahead = nullptr) {
    constexpr int rows = kTwice ? kTileSide / 2 : kTileSide;
    const auto put = [&](int row, __m512i pairs) {
        _mm512_store_si512(out.pair[row], pairs);
        if constexpr (kTwice) _mm512_store_si512(out.pair[row + rows], pairs);
    };
    int i = 0;
    if (!kTwice && ahead && stride == kTileSide && width == kTileSide && depth == kTileDepth) {
        for (; i < rows; ++i, p += 2 * stride, ahead += 2 * stride) {
            __builtin_prefetch(ahead);
            put(i, interleave_halves(_mm512_loadu_si512(p)));
        }
        return;
    }
    if (width == kTileSide) {
        for (; 2 * i + 2 <= depth; ++i, p += 2 * stride)
            put(i, interleave_words(load_words(p), load_words(p + stride)));
    }
    const __mmask16 columns = first_lanes(width);
    for (; 2 * i + 2 <= depth; ++i, p += 2 * stride)
        put(i, interleave_words(load_words(p, columns), load_words(p + stride, columns)));
    if (2 * i < depth) put(i++, interleave_words(load_words(p, columns), _mm256_setzero_si256()));
    for (; i < rows; ++i) put(i, _mm512_setzero_si512());
}

// The tile A of up to 16 rows and `depth` <= 32 columns of a stored matrix, zeros beyond.
inline void pack_rows(const uint16_t* p, int64_t stride, int rows, int depth, Tile& out) {
    const __mmask32 columns = depth >= kTileDepth ? ~__mmask32(0) : (__mmask32(1) << depth) - 1;
    if (rows == kTileSide && depth == kTileDepth) {
        for (int i = 0; i < kTileSide; ++i, p += stride) _mm512_store_si512(out.pair[i], _mm512_loadu_si512(p));
        return;
    }
    for (int i = 0; i < kTileSide; ++i, p += stride)
        _mm512_store_si512(out.pair[i], i < rows ? _mm512_maskz_loadu_epi16(columns, p) : _mm512_setzero_si512());
}

}  // namespace fastlora::FASTLORA_ISA

#endif
