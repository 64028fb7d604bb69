// Products of float32 columns in bfloat16 tiles of AMX, for similarity.
// A value is the sum of three bfloat16 numbers, high, middle and low, so a product of two is nine exact ones. The six
// largest are summed: the other three are below 2^-21 of it together, of either sign. Floor: six sixteenths of the time
// that vectors take.
#pragma once
#include "amx.h"
#include "similarity_bands.h"

#if defined(__AMX_BF16__)

namespace fastlora::FASTLORA_ISA {

class TileProducts {
  public:
    using Unit = TileUnit;

    // Memory for bands of up to `widest` columns of two stacks; the size of it.
    size_t lay_out(char* base, int64_t widest) {
        Arena arena(base);
        constexpr size_t tiles = kDepth / kTileDepth * kParts;
        for (Left& left : left_) left = {arena.take<Tile>(tiles * size_t(groups_of(widest))), -1};
        right_ = arena.take<Tile>(tiles * kTogether / kTileSide);
        block_ = arena.take<float>(size_t(rows_of(widest) * stride_of(widest)));
        return arena.used();
    }

    // Of results, whose rows are whole tiles as well.
    static int64_t stride_of(int64_t width) { return groups_of(width) * kTileSide + 3 * kTileSide; }
    static int64_t rows_of(int64_t width) { return groups_of(width) * kTileSide; }

    // out [a.width, b.stride] = the columns of a, transposed, times those of b, in stack 0 or 1
    void operator()(int which, const Stack& stack, const Band& a, const Band& b, float* out) {
        Left& left = left_[which];
        const int64_t groups = groups_of(a.width);
        for (int64_t row = 0; row < stack.length || row == 0; row += kDepth) {
            const int64_t depth = min_(kDepth, stack.length - row), blocks = (depth + kTileDepth - 1) / kTileDepth;
            if (left.first != a.first || row || depth < stack.length)
                pack<true>(stack, a.column, a.width, row, depth, left.tiles);
            left.first = a.first;
            float* const to = row ? block_ : out;
            for (int64_t j = 0; j < b.width; j += kTogether) {
                const int64_t columns = min_(kTogether, b.width - j);
                pack<false>(stack, b.column + j, columns, row, depth, right_);
                with_count<1, 2>(groups_of(columns), [&](auto n) {
                    for (int64_t i = 0; i < groups; i += 2)
                        with_count<1, 2>(groups - i, [&](auto m) {
                            multiply<decltype(m){}, decltype(n){}>(left.tiles + i, groups, right_, blocks,
                                                                   to + i * kTileSide * b.stride + j, b.stride);
                        });
                });
            }
            if (!row) continue;
            for (int64_t i = 0; i < a.width; ++i)
                for (int64_t j = 0; j < b.width; ++j) out[i * b.stride + j] += to[i * b.stride + j];
        }
    }

  private:
    static constexpr int64_t kDepth = 384;  // rows in a block of a product: one band of two stacks stays in the cache
    static constexpr int64_t kTogether = 2 * kTileSide;  // columns of b at a time, which all of a meet
    static constexpr int kParts = 3;

    // Tiles A of the band that starts at an adapter: of all rows of a short stack, which is packed once.
    struct Left {
        Tile* tiles;  // [block of 32 rows, part, group of 16 columns]
        int64_t first;
    };

    static int64_t groups_of(int64_t width) { return (width + kTileSide - 1) / kTileSide; }

    // Rows [row, row + depth) of some columns as tiles A (kLeft) or B, zeros beyond.
    template <bool kLeft>
    static void pack(const Stack& stack, int64_t first, int64_t width, int64_t row, int64_t depth, Tile* out) {
        const int64_t groups = groups_of(width);
        for (int64_t d = 0; d < depth; d += kTileDepth, out += kParts * groups)
            for (int64_t g = 0; g < groups; ++g) {
                const float* const from = stack.data + (row + d) * stack.width + first + g * kTileSide;
                const int64_t rows = min_<int64_t>(kTileDepth, depth - d);
                take_parts(from, stack.width, rows, first_lanes(width - g * kTileSide), out + g, groups);
                if (!kLeft) continue;
                for (int p = 0; p < kParts; ++p) {
                    const Tile pairs = out[p * groups + g];
                    transpose_pairs(pairs, out[p * groups + g]);
                }
            }
    }

    // The three tiles B, `apart` from one another, of up to 32 rows of 16 values. The first part is cut off, which
    // never makes an infinity of it; the second is rounded, which makes the third half as large, and of either sign.
    static void take_parts(const float* p, int64_t stride, int64_t rows, __mmask16 columns, Tile* out, int64_t apart) {
        const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xffff0000u));
        const auto cut = [&](__m512& x, __m512i add) {
            const __m512i part = ((__m512i)x + add) & upper;
            x -= (__m512)part;
            return part;
        };
        for (int64_t q = 0; q < kTileSide; ++q, p += 2 * stride) {
            __m512 x = _mm512_setzero_ps(), y = x;
            if (2 * q < rows) x = _mm512_maskz_loadu_ps(columns, p);
            if (2 * q + 1 < rows) y = _mm512_maskz_loadu_ps(columns, p + stride);
            const auto put = [&](int part, __m512i even, __m512i odd) {
                _mm512_store_si512(out[part * apart].pair[q], odd | _mm512_maskz_srli_epi32(0xffff, even, 16));
            };
            const __m512i x0 = cut(x, __m512i{}), y0 = cut(y, __m512i{}), x1 = cut(x, half), y1 = cut(y, half);
            put(0, x0, y0), put(1, x1, y1), put(2, (__m512i)x, (__m512i)y);
        }
    }

    // 16 kM rows and 16 kN columns of out, from tiles A and B of all their rows. Sums of what is small come first.
    template <int kM, int kN>
    static void multiply(const Tile* a, int64_t groups, const Tile* b, int64_t blocks, float* out, int64_t stride) {
        constexpr int kA = 4, kB = 6;  // registers; the first four are for sums
        const auto left = [&](int64_t block, int part) {
            for_each<kM>([&](auto i) { tile_load<kA + i>(a + (block * kParts + part) * groups + i, sizeof *a->pair); });
        };
        const auto right = [&](int64_t block, int part) {
            for_each<kN>([&](auto j) { tile_load<kB + j>(b + (block * kParts + part) * kN + j, sizeof *b->pair); });
        };
        const auto each = [](auto f) { for_each<kM>([&](auto i) { for_each<kN>([&](auto j) { f(i, j); }); }); };
        const auto add = [&] {
            each([](auto i, auto j) {
                constexpr int m = decltype(i)(), n = decltype(j)();
                tile_product<2 * m + n, kA + m, kB + n>();
            });
        };
        each([](auto i, auto j) { tile_zero<2 * decltype(i)() + decltype(j)()>(); });
        for (int64_t d = 0; d < blocks; ++d) {
            left(d, 0), right(d, 2), add();
            right(d, 1), add();
            left(d, 1), add();
            right(d, 0), add();
            left(d, 2), add();
        }
        for (int64_t d = 0; d < blocks; ++d) left(d, 0), right(d, 0), add();
        each([&](auto i, auto j) {
            constexpr int m = decltype(i)(), n = decltype(j)();
            tile_store<2 * m + n>(out + m * kTileSide * stride + n * kTileSide, int64_t(sizeof *out) * stride);
        });
    }

    Left left_[2];
    Tile* right_;
    float* block_;
};

}  // namespace fastlora::FASTLORA_ISA

#endif
