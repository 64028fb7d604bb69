// difference_products in bfloat16 tiles of AMX.
#pragma once
#include "amx.h"
#include "difference_panel.h"
#include "tile.h"

#if defined(__AMX_BF16__)

namespace fastlora::FASTLORA_ISA {
namespace {

bool has_type(const Matrix* m, DType type) { return m && m->dtype == int64_t(type); }

template <class E>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<BF16> = true;

template <int kParts>
struct SumOf {
    using type = double;
};
template <>
struct SumOf<1> {
    using type = float;
};

// In bfloat16 tiles. kParts: of how many bfloat16 numbers `right` is the sum: 1, or 2. With 1, D and the images that
// are returned are rounded likewise. With 2, both are sums of 3, which is all that float32 holds, and preimages of
// panels are added in float64: products are those of float32 with sums of 32 rows.
template <int kParts>
struct Tiles {
    using Unit = TileUnit;
    using Sum = typename SumOf<kParts>::type;
    static constexpr int kFine = kParts == 1 ? 1 : 3;  // of how many D and the images are
    static constexpr int kDeep = 8;  // blocks of 32 columns that are formed at once: they stay in the first-level cache
    static constexpr int kChunk = kDeep * kTileDepth;
    static constexpr int kSquare = kTileSide * kTileSide;

    const DifferenceArgs& args;
    int64_t blocks, sides;     // tiles of m, of width
    DType type;                // in which rows are read: of both where that is half precision, else float32
    double* total;             // [blocks, 2, sides, 16 of width, 16 of m]
    Tile* right;               // [blocks, kParts, sides]
    Sum* part;                 // as total
    Tile *rows, *pairs;        // [kDeep, kFine, 2], [blocks, kFine, 2]
    Tile* turned;              // [sides, kFine]: images, transposed
    float* images;             // [sides, 2, 16, 16]
    float *fresh, *one, *two;  // [2, kChunk]: two rows of D's matrices

    explicit Tiles(const DifferenceArgs& a)
        : args(a), blocks((a.m + kTileDepth - 1) / kTileDepth), sides((a.width + kTileSide - 1) / kTileSide) {
        const bool is_alike = (!a.old || a.old->dtype == a.current->dtype) && is_half(*a.current);
        type = is_alike ? DType(a.current->dtype) : DType::f32;
    }

    size_t lay_out_shared(char* base) {
        Arena arena(base);
        total = args.preimages ? arena.take<double>(size_t(sums())) : nullptr;
        right = args.right ? arena.take<Tile>(size_t(blocks * kParts * sides)) : nullptr;
        return arena.used();
    }
    size_t lay_out_own(char* base) {
        Arena arena(base);
        part = args.preimages ? arena.take<Sum>(size_t(sums())) : nullptr;
        rows = arena.take<Tile>(kDeep * kFine * 2);
        pairs = args.preimages ? arena.take<Tile>(size_t(blocks * kFine * 2)) : nullptr;
        turned = arena.take<Tile>(size_t(sides * kFine));
        images = arena.take<float>(size_t(sides * 2 * kSquare));
        fresh = arena.take<float>(kSquare);
        one = arena.take<float>(2 * kChunk);
        two = arena.take<float>(2 * kChunk);
        return arena.used();
    }

    int64_t sums() const { return blocks * 2 * sides * kSquare; }
    int64_t packs() const { return args.right ? blocks : 0; }
    int64_t columns() const { return blocks; }

    // The column, within its block, of a value in a row of `rows`: words of two bfloat16 are taken apart into their
    // lower and upper halves.
    int column_of(int place) const { return type != DType::bf16 ? place : place < 16 ? 2 * place : 2 * place - 31; }

    // Up to 16 values from and to float64, zeros behind them.
    static __m512 loaded(const double* p, int64_t count) {
        alignas(64) float x[kTileSide] = {};
        if (count >= kTileSide)
            for (int i = 0; i < kTileSide; ++i) x[i] = float(p[i]);
        else
            for (int i = 0; i < count; ++i) x[i] = float(p[i]);
        return _mm512_load_ps(x);
    }
    static void stored(__m512 x, double* p, int64_t count) {
        alignas(64) float all[kTileSide];
        _mm512_store_ps(all, x);
        if (count >= kTileSide)
            for (int i = 0; i < kTileSide; ++i) p[i] = double(all[i]);
        else
            for (int i = 0; i < count; ++i) p[i] = double(all[i]);
    }
    static __m512 widened(__m256i halves) {
        return (__m512)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, halves), 16);
    }
    static __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
    // to [count] += from, a multiple of 8
    static void add_to(double* to, const float* from, int count) {
        for (int i = 0; i < count; i += 8)
            store<double>(to + i, load<double>(to + i) + Single::load_vector<double>((const F32*)(from + i)));
    }

    void pack(int64_t block) {
        for (int64_t side = 0; side < sides; ++side)
            for (int p = 0; p < kTileSide; ++p) {
                __m512 x[2];
                for (int i = 0; i < 2; ++i) {
                    const int64_t row = block * kTileDepth + column_of(2 * p + i);
                    x[i] = row < args.m ? loaded(args.right + row * args.width + side * 16, args.width - side * 16)
                                        : _mm512_setzero_ps();
                }
                for (int piece = 0; piece < kParts; ++piece) {
                    const __m256i a = rounded(x[0]), b = rounded(x[1]);
                    _mm512_store_si512(right[(block * kParts + piece) * sides + side].pair[p], interleave_words(a, b));
                    x[0] -= widened(a), x[1] -= widened(b);
                }
            }
    }

    void start() {
        if (part) __builtin_memset(part, 0, sizeof(Sum) * size_t(sums()));
        __builtin_memset(two, 0, sizeof(float) * 2 * kChunk);
    }

    // One row of 32 values of D as bfloat16: rounded, or as three that add up to them.
    static void split(__m512 low, __m512 high, __m512i* out) {
        for (int piece = 0; piece + 1 < kFine; ++piece) {
            // Rounded by its bits: half is added to what is cut off.
            const __m512i half = _mm512_set1_epi32(0x8000), mask = _mm512_set1_epi32(int(0xffff0000u));
            const __m512 l = (__m512)(_mm512_add_epi32((__m512i)low, half) & mask);
            const __m512 h = (__m512)(_mm512_add_epi32((__m512i)high, half) & mask);
            out[piece] = (__m512i)_mm512_cvtne2ps_pbh(h, l);
            low -= l, high -= h;
        }
        out[kFine - 1] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }

    static Vec<double> squares(__m512 x) {
        using Half = typename Bits<double>::Float;
        const auto v = (Vec<float>)x;
        const Vec<double> low = from_float<double>((Half)__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7));
        const Vec<double> high = from_float<double>((Half)__builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
        return low * low + high * high;
    }

    // Values of a row of two matrices: 32 columns as two vectors.
    template <class E>
    static void differences(const void* current, const void* old, int block, __m512& low, __m512& high) {
        const auto* a = (const typename E::Stored*)current + kTileDepth * block;
        const auto* b = (const typename E::Stored*)old + kTileDepth * block;
        if constexpr (kIsBf16<E>) {
            const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
            const __m512i mask = _mm512_set1_epi32(int(0xffff0000u));
            low = (__m512)_mm512_maskz_slli_epi32(0xffff, x, 16) - (__m512)_mm512_maskz_slli_epi32(0xffff, y, 16);
            high = (__m512)(x & mask) - (__m512)(y & mask);
        } else {
            low = (__m512)(E::template load_vector<float>(a) - E::template load_vector<float>(b));
            high = (__m512)(E::template load_vector<float>(a + 16) - E::template load_vector<float>(b + 16));
        }
    }

    // Two rows of a chunk. What comes behind it in memory is asked for.
    template <class E, bool kSquares>
    void form_two(const void* const* current, const void* const* old, int64_t first, int depth, int p, bool ahead,
                  double& square) {
        Vec<double> sum[2] = {};
        for (int block = 0; block < depth; ++block) {
            __m512i out[2][kFine];
            for (int i = 0; i < 2; ++i) {
                __m512 low, high;
                differences<E>(current[i], old[i], block, low, high);
                if (ahead) {
                    constexpr int bytes = kTileDepth * int(sizeof(typename E::Stored));
                    for (int line = 0; line < bytes; line += 64) {
                        __builtin_prefetch((const char*)current[i] + (depth + block) * bytes + line);
                        __builtin_prefetch((const char*)old[i] + (depth + block) * bytes + line);
                    }
                }
                if constexpr (kSquares) sum[0] += squares(low), sum[1] += squares(high);
                split(low, high, out[i]);
            }
            for (int piece = 0; piece < kFine; ++piece) {
                const __m512i a = out[0][piece], b = out[1][piece];
                if (args.right) {
                    Tile& tile = rows[(block * kFine + piece) * 2 + p / 8];
                    _mm512_store_si512(tile.pair[2 * p % 16], a);
                    _mm512_store_si512(tile.pair[2 * p % 16 + 1], b);
                }
                if (pairs) {
                    Tile* tile = pairs + ((first + block) * kFine + piece) * 2;
                    _mm512_store_si512(tile[0].pair[p], _mm512_maskz_unpacklo_epi16(~__mmask32(0), a, b));
                    _mm512_store_si512(tile[1].pair[p], _mm512_maskz_unpackhi_epi16(~__mmask32(0), a, b));
                }
            }
        }
        if constexpr (kSquares) square += sum_lanes<double>(sum[0] + sum[1]);
    }

    // Columns [32 first, ...) of a panel.
    void form(const Panel& panel, int64_t first, int depth, double& square) {
        const int64_t column = first * kTileDepth;
        const int count = int(min_<int64_t>(depth * kTileDepth, args.m - column));
        const bool is_whole = count == depth * kTileDepth;
        const bool is_direct = is_whole && has_type(args.current, type) && (!args.old || has_type(args.old, type));
        const int64_t size = type == DType::f32 ? 4 : 2;
        for (int p = 0; p < kPanel / 2; ++p) {
            const void *current[2], *old[2];
            for (int i = 0; i < 2; ++i) {
                const int64_t row = panel.row + 2 * p + i;
                current[i] = one + i * kChunk, old[i] = two + i * kChunk;
                if (2 * p + i >= panel.rows) {
                    __builtin_memset(one + i * kChunk, 0, sizeof(float) * kChunk);
                    old[i] = current[i];
                } else if (is_direct) {
                    current[i] = (const char*)args.current->data + (row * args.current->stride + column) * size;
                    if (args.old) old[i] = (const char*)args.old->data + (row * args.old->stride + column) * size;
                } else {
                    copy(*args.current, row, column, count, one + i * kChunk);
                    if (args.old) copy(*args.old, row, column, count, two + i * kChunk);
                }
            }
            const bool ahead = is_direct && 2 * p + 1 < panel.rows && column + 2 * kChunk <= args.m;
            const auto form_as = [&](auto e) {
                using E = decltype(e);
                args.square ? form_two<E, true>(current, old, first, depth, p, ahead, square)
                            : form_two<E, false>(current, old, first, depth, p, ahead, square);
            };
            type == DType::bf16 ? form_as(BF16{}) : type == DType::f16 ? form_as(F16{}) : form_as(Single{});
        }
    }

    // Part of a row in that type, zeros behind it.
    void copy(const Matrix& m, int64_t row, int64_t column, int count, float* out) const {
        __builtin_memset(out, 0, sizeof(float) * kChunk);
        const char* from = (const char*)m.data + (row * m.stride + column) * element_size(m);
        if (has_type(&m, type))
            __builtin_memcpy(out, from, size_t(count * element_size(m)));
        else
            read_block<float>(m, row, column, 1, count, out, kChunk);
    }

    // images += D right for the columns of a chunk, kSides x 16 columns of `right` from `side`.
    template <int kSides>
    void multiply(int64_t first, int depth, int64_t side) {
        float* out = images + side * 2 * kSquare;
        for_each<2 * kSides>([&](auto c) {
            if (first)
                tile_load<c>(out + c * kSquare, 64);
            else
                tile_zero<c>();
        });
        const auto load_rows = [&](int block, int piece) {
            for_each<2>([&](auto r) { tile_load<4 + r>(rows + (block * kFine + piece) * 2 + r, 64); });
        };
        const auto load_right = [&](int block, int piece) {
            for_each<kSides>(
                [&](auto s) { tile_load<6 + s>(right + ((first + block) * kParts + piece) * sides + side + s, 64); });
        };
        const auto all = [&] {
            for_each<kSides>([&](auto s) {
                tile_product<2 * s, 4, 6 + s>();
                tile_product<2 * s + 1, 5, 6 + s>();
            });
        };
        for (int block = 0; block < depth; ++block) {
            load_rows(block, 0);
            load_right(block, 0);
            all();
            if constexpr (kParts == 2) {
                load_right(block, 1);
                all();
                load_rows(block, 1);
                all();
                load_right(block, 0);
                all();
                load_rows(block, 2);
                all();
            }
        }
        for_each<2 * kSides>([&](auto c) { tile_store<c>(out + c * kSquare, 64); });
    }

    // images - left, out and, transposed, as kFine of bfloat16.
    void turn(const Panel& panel) {
        for (int64_t side = 0; side < sides; ++side)
            for (int half = 0; half < 2; ++half) {
                Vec<float> x[kTileSide];
                for (int i = 0; i < kTileSide; ++i) {
                    const int at = half * kTileSide + i;
                    const int64_t place = (panel.row + at) * args.width + side * 16, left = args.width - side * 16;
                    x[i] = Vec<float>{};
                    if (at >= panel.rows) continue;
                    if (args.right) x[i] = load<float>(images + ((side * 2 + half) * kTileSide + i) * kTileSide);
                    if (args.left) {
                        const Vec<float> given = (Vec<float>)loaded(args.left + place, left);
                        x[i] = args.right ? x[i] - given : given;
                    }
                    if (pairs && kParts == 1) x[i] = (Vec<float>)widened(rounded((__m512)x[i]));
                    if (args.images) stored((__m512)x[i], args.images + place, left);
                }
                if (!pairs) continue;
                transpose<float>(x);
                for (int i = 0; i < kTileSide; ++i) {
                    __m512 rest = (__m512)x[i];
                    for (int piece = 0; piece < kFine; ++piece) {
                        const __m256i halves = rounded(rest);
                        _mm256_store_si256((__m256i*)&turned[side * kFine + piece].pair[i][8 * half], halves);
                        rest -= widened(halves);
                    }
                }
            }
    }

    // part += images' D, transposed, for kSides x 16 columns of the images from `side`.
    template <int kSides>
    void multiply_back(int64_t side) {
        for_each<kSides * kFine>([&](auto a) { tile_load<2 + a>(turned + side * kFine + a, 64); });
        for (int64_t half = 0; half < 2 * blocks; ++half) {
            const Tile* from = pairs + (half / 2) * kFine * 2 + half % 2;
            for_each<kSides>([&](auto s) {
                Sum* out = part + (half * sides + side + s) * kSquare;
                if constexpr (kParts == 1)
                    tile_load<0>(out, 64);
                else
                    tile_zero<0>();
                for_each<kFine>([&](auto b) {
                    tile_load<1>(from + b * 2, 64);
                    for_each<kFine - b>([&](auto a) { tile_product<0, 2 + s * kFine + a, 1>(); });
                });
                if constexpr (kParts == 1) {
                    tile_store<0>(out, 64);
                } else {
                    tile_store<0>(fresh, 64);
                    add_to(out, fresh, kSquare);
                }
            });
        }
    }

    void take(const Panel& panel, double& square) {
        for (int64_t first = 0; first < blocks; first += kDeep) {
            const int depth = int(min_<int64_t>(kDeep, blocks - first));
            form(panel, first, depth, square);
            for (int64_t side = 0; args.right && side < sides; side += 2)
                side + 1 < sides ? multiply<2>(first, depth, side) : multiply<1>(first, depth, side);
        }
        turn(panel);
        for (int64_t side = 0; pairs && side < sides; side += 2)
            side + 1 < sides ? multiply_back<2>(side) : multiply_back<1>(side);
    }

    void add() {
        for (int64_t i = 0; i < sums(); ++i) total[i] += double(part[i]);
    }

    void write(int64_t block) {
        for (int half = 0; half < 2; ++half)
            for (int c = 0; c < kTileSide; ++c) {
                const int64_t row = block * kTileDepth + column_of(8 * (c / 4) + 4 * half + c % 4);
                if (row >= args.m) continue;
                const double* from = total + (block * 2 + half) * sides * kSquare + c;
                for (int64_t j = 0; j < args.width; ++j) args.preimages[row * args.width + j] = from[j * kTileSide];
            }
    }
};

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

#endif
