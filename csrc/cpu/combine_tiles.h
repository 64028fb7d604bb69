// The strips of a combine task on matrix tiles (AMX), for bfloat16 factors and results.
// A coefficient is the sum of three bfloat16 numbers, to 2^-27 of itself, so a product with a stored value is three
// exact products, summed in float32. A factor of rank 16 or less fills a tile's depth of 32 twice, which takes the
// first two numbers in one product of tiles and the third in another; a larger one takes a product a number and 32 of
// its rank.
#pragma once
#include "amx.h"
#include "strips.h"

namespace fastlora::FASTLORA_ISA {

#if defined(__AMX_BF16__)

constexpr int64_t kResultMargin = kTileSide;  // rows of results behind the last one that tiles may write zeros to

class CombineTiles {
  public:
    static bool takes(const CombineJob& job) {
        for (int64_t f = 0; f < job.task->factors; ++f)
            if (job.factors[f].dtype != int64_t(DType::bf16)) return false;
        for (int64_t o = 0; o < job.task->outputs; ++o) {
            if (job.matrix(o).dtype != int64_t(DType::bf16)) return false;
            for (int64_t t = 0; t < job.outputs[o].terms; ++t)
                if (has_tiny_coefficient(job, job.terms[job.outputs[o].first_term + t])) return false;
        }
        return true;
    }

    // Takes memory for the coefficients' tiles and, where there is some, fills them. False where tiles are no gain.
    bool lay_out(Arena& arena, bool fill, const CombineJob& job, const Strips<float>& strips) {
        rows_ = job.task->rows;
        own_ = arena.take<Own>(job.task->factors);
        int64_t deepest = 1, s = 0;
        for (int64_t f = 0; f < job.task->factors; ++f) {
            int64_t first = -1, last = 0;
            each_term(job, f, [&](const Term& term, int64_t out) {
                first = first < 0 ? out : min_(first, out);
                last = max_(last, out + term.columns);
            });
            if (first < 0) continue;
            Own own{};
            own.depth = job.rank(f);
            own.twice = own.depth <= kTileSide;
            own.chunks = (own.depth + kTileDepth - 1) / kTileDepth;
            own.parts = own.twice ? 2 : 3;
            own.widths = (last - first + kTileSide - 1) / kTileSide;
            own.tiles = arena.take<Tile>(own.chunks * own.parts * own.widths);
            deepest = max_(deepest, own.chunks);
            if (fill) {
                fill_tiles(strips.strip[s], own);
                own_[s] = own;
            }
            ++s;
        }
        source_ = arena.take<Tile>(deepest * (rows_ ? kMost : 1));
        copy_ = arena.take<uint16_t>(rows_ ? deepest * kTileDepth * kCopyStride : 0);
        return true;
    }

    // Within the life of a TileUnit: results [count, stride] (B side) or [.., stride] with columns [first, first +
    // count) (A side) += strip
    void add_strip(const CombineJob& job, const Strips<float>& strips, int64_t s, int64_t first, int count,
                   float* results, int64_t stride, bool is_fresh) const {
        const Strip<float>& strip = strips.strip[s];
        const Own& own = own_[s];
        const Matrix& m = job.factors[strip.factor];
        if (rows_)
            add_columns(own, m, first, count, results + strip.out * stride, stride, is_fresh);
        else
            add_rows(own, m, first, count, results + strip.out, stride, is_fresh);
    }

  private:
    struct Own {
        int64_t depth, chunks, parts, widths;
        bool twice;   // the factor fills a tile's depth twice
        Tile* tiles;  // [chunk, part, width]
    };

    static constexpr int kMost = 4;
    static constexpr int kCopyStride = kTileA<float> + 32;

    static bool has_tiny_coefficient(const CombineJob& job, const Term& term) {
        if (!term.coefficient) return false;
        for (int64_t p = 0; p < job.rank(term.factor); ++p)
            for (int64_t q = 0; q < term.columns; ++q) {
                const double c = abs_(coefficient(job, term, p, q));
                if (c != 0.0 && c < 0x1p-90) return true;  // its last part would be subnormal
            }
        return false;
    }

    void fill_tiles(const Strip<float>& strip, Own& own) const {
        __builtin_memset(own.tiles, 0, sizeof(Tile) * own.chunks * own.parts * own.widths);
        for (int64_t k = 0; k < own.depth; ++k)
            for (int64_t j = 0; j < strip.width; ++j) {
                float left = strip.values[k * strip.stride + j];
                for (int part = 0; part < 3; ++part) {
                    const uint16_t bits = to_bf16(left);
                    left -= from_bf16(bits);
                    const int64_t c = k / kTileDepth, place = own.twice ? part / 2 : part;
                    const int64_t depth = k % kTileDepth + (own.twice && part == 1 ? kTileSide : 0);
                    Tile& tile = own.tiles[(c * own.parts + place) * own.widths + j / kTileSide];
                    const int side = int(j % kTileSide);
                    uint16_t* words = reinterpret_cast<uint16_t*>(tile.pair);
                    // A tile A is [side, depth]; a tile B holds pairs along the depth.
                    words[rows_ ? side * kTileDepth + depth : depth / 2 * kTileDepth + 2 * side + depth % 2] = bits;
                }
            }
    }

    // B side: 16 rows of the factor at a time with all coefficients.
    void add_rows(const Own& own, const Matrix& m, int64_t first, int count, float* results, int64_t stride,
                  bool is_fresh) const {
        const uint16_t* data = reinterpret_cast<const uint16_t*>(m.data);
        for (int at = 0; at < count; at += kTileSide, results += kTileSide * stride) {
            for (int64_t c = 0; c < own.chunks; ++c) {
                const int64_t from = c * kTileDepth;
                const int depth = int(min_<int64_t>(kTileDepth, own.depth - from));
                pack_rows(data + (first + at) * m.stride + from, m.stride, min_(kTileSide, count - at), depth,
                          source_[c]);
                if (own.twice) repeat_columns(source_[c]);
            }
            for (int64_t w = 0; w < own.widths; w += kMost)
                with_count(min_<int64_t>(kMost, own.widths - w), [&](auto n) {
                    float* to = results + w * kTileSide;
                    start<n>(to, stride, is_fresh);
                    for (int64_t c = 0; c < own.chunks; ++c) {
                        tile_load<4>(source_ + c, 64);
                        for (int64_t part = 0; part < own.parts; ++part) {
                            const Tile* tiles = own.tiles + (c * own.parts + part) * own.widths + w;
                            for_each<n>([&](auto i) {
                                tile_load<5>(tiles + i, 64);
                                tile_product<i, 4, 5>();
                            });
                        }
                    }
                    for_each<n>([&](auto i) { tile_store<i>(to + i * kTileSide, stride * 4); });
                });
        }
    }

    // A side: 16 rows of coefficients at a time with some columns of the factor.
    void add_columns(const Own& own, const Matrix& m, int64_t first, int count, float* results, int64_t stride,
                     bool is_fresh) const {
        copy_rows(m, own.depth, first, count);
        for (int at = 0; at < count; at += kMost * kTileSide) {
            const int blocks = min_(kMost, (count - at + kTileSide - 1) / kTileSide);
            for (int b = 0; b < blocks; ++b) pack_columns(own, at + b * kTileSide, count, source_ + b * own.chunks);
            for (int64_t w = 0; w < own.widths; ++w)
                with_count(blocks, [&](auto n) {
                    float* to = results + w * kTileSide * stride + at;
                    start<n>(to, stride, is_fresh);
                    for (int64_t c = 0; c < own.chunks; ++c)
                        for (int64_t part = 0; part < own.parts; ++part) {
                            tile_load<4>(own.tiles + (c * own.parts + part) * own.widths + w, 64);
                            for_each<n>([&](auto i) {
                                tile_load<5>(source_ + i * own.chunks + c, 64);
                                tile_product<i, 4, 5>();
                            });
                        }
                    for_each<n>([&](auto i) { tile_store<i>(to + i * kTileSide, stride * 4); });
                });
        }
    }

    // Sums start from the results so far, or from zero.
    template <int kCount>
    static void start(const float* results, int64_t stride, bool is_fresh) {
        if (is_fresh)
            for_each<kCount>([](auto i) { tile_zero<i>(); });
        else
            for_each<kCount>([&](auto i) { tile_load<i>(results + i * kTileSide, stride * 4); });
    }

    // Calls f with a count of 1 to kMost as a constant.
    template <class F>
    static void with_count(int64_t count, F f) {
        switch (count) {
            case 1:
                return f(Constant<1>{});
            case 2:
                return f(Constant<2>{});
            case 3:
                return f(Constant<3>{});
            default:
                return f(Constant<kMost>{});
        }
    }

    void pack_columns(const Own& own, int at, int count, Tile* out) const {
        const int width = min_(kTileSide, count - at);
        if (own.twice) return pack_pairs<true>(copy_ + at, kCopyStride, int(own.depth), width, *out);
        for (int64_t c = 0; c < own.chunks; ++c) {
            const int64_t from = c * kTileDepth;
            pack_pairs(copy_ + from * kCopyStride + at, kCopyStride, int(min_<int64_t>(kTileDepth, own.depth - from)),
                       width, out[c]);
        }
    }

    // A stretch of a factor's rows, read whole: piece by piece their lines would leave L1 before they are used up.
    void copy_rows(const Matrix& m, int64_t rows, int64_t first, int count) const {
        const uint16_t* p = reinterpret_cast<const uint16_t*>(m.data) + first;
        for (int64_t i = 0; i < rows; ++i, p += m.stride) {
            // The next tile, in pieces too short for the processor to foresee.
            for (int j = 0; j < count; j += 32) __builtin_prefetch(p + count + j);
            __builtin_memcpy(copy_ + i * kCopyStride, p, 2 * size_t(count));
        }
    }

    // The first 16 columns of a tile A again in the others.
    static void repeat_columns(Tile& tile) {
        for (int i = 0; i < kTileSide; ++i)
            _mm256_store_si256(reinterpret_cast<__m256i*>(&tile.pair[i][kTileSide / 2]),
                               _mm256_load_si256(reinterpret_cast<const __m256i*>(tile.pair[i])));
    }

    bool rows_ = false;
    Own* own_ = nullptr;  // [strips]
    Tile* source_ = nullptr;
    uint16_t* copy_ = nullptr;  // A side: [rank, kCopyStride]
};

#else

constexpr int64_t kResultMargin = 0;

struct TileUnit {
    explicit TileUnit(bool) {}
};

class CombineTiles {
  public:
    static bool takes(const CombineJob&) { return false; }
    bool lay_out(Arena&, bool, const CombineJob&, const Strips<float>&) { return false; }
    void add_strip(const CombineJob&, const Strips<float>&, int64_t, int64_t, int, float*, int64_t, bool) const {}
};

#endif

}  // namespace fastlora::FASTLORA_ISA
