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
        source_ = arena.take<Tile>(deepest);
        return true;
    }

    // Within the life of a TileUnit: results [count, stride] (B side) or [.., stride] with columns [first, first +
    // count) (A side) += strip
    void add_strip(const CombineJob& job, const Strips<float>& strips, int64_t s, int64_t first, int count,
                   float* results, int64_t stride) const {
        const Strip<float>& strip = strips.strip[s];
        const Own& own = own_[s];
        const Matrix& m = job.factors[strip.factor];
        const uint16_t* data = reinterpret_cast<const uint16_t*>(m.data);
        for (int at = 0; at < count; at += kTileSide) {
            const int side = min_(kTileSide, count - at);
            for (int64_t c = 0; c < own.chunks; ++c) {
                const int64_t from = c * kTileDepth;
                const int depth = int(min_<int64_t>(kTileDepth, own.depth - from));
                if (rows_)
                    pack_pairs(data + from * m.stride + first + at, m.stride, depth, side, source_[c]);
                else
                    pack_rows(data + (first + at) * m.stride + from, m.stride, side, depth, source_[c]);
                if (own.twice) double_up(source_[c]);
            }
            float* to = rows_ ? results + strip.out * stride + at : results + at * stride + strip.out;
            const int64_t next = rows_ ? kTileSide * stride : kTileSide;
            for (int64_t w = 0; w < own.widths; w += kMost) {
                switch (min_<int64_t>(kMost, own.widths - w)) {
                    case 1:
                        add_products<1>(own, w, to + w * next, next, stride);
                        break;
                    case 2:
                        add_products<2>(own, w, to + w * next, next, stride);
                        break;
                    case 3:
                        add_products<3>(own, w, to + w * next, next, stride);
                        break;
                    default:
                        add_products<4>(own, w, to + w * next, next, stride);
                }
            }
        }
    }

  private:
    struct Own {
        int64_t depth, chunks, parts, widths;
        bool twice;   // the factor fills a tile's depth twice
        Tile* tiles;  // [chunk, part, width]
    };

    static constexpr int kMost = 4;

    static bool has_tiny_coefficient(const CombineJob& job, const Term& term) {
        if (!term.coefficient) return false;
        for (int64_t p = 0; p < job.rank(term.factor); ++p)
            for (int64_t q = 0; q < term.columns; ++q) {
                const double c = abs_(coefficient(job, term, p, q));
                if (c != 0.0 && c < 0x1p-90) return true;  // its last part would be subnormal
            }
        return false;
    }

    // part 0, 1 or 2 of x = part 0 + part 1 + part 2
    static uint16_t part_of(double x, int part) {
        for (int i = 0; i < part; ++i) x -= double(from_bf16(to_bf16(float(x))));
        return to_bf16(float(x));
    }

    void fill_tiles(const Strip<float>& strip, Own& own) const {
        __builtin_memset(own.tiles, 0, sizeof(Tile) * own.chunks * own.parts * own.widths);
        for (int64_t k = 0; k < own.depth; ++k)
            for (int64_t j = 0; j < strip.width; ++j)
                for (int part = 0; part < 3; ++part) {
                    const int64_t c = k / kTileDepth, place = own.twice ? part / 2 : part;
                    const int64_t depth = k % kTileDepth + (own.twice && part == 1 ? kTileSide : 0);
                    Tile& tile = own.tiles[(c * own.parts + place) * own.widths + j / kTileSide];
                    const int side = int(j % kTileSide);
                    uint16_t* words = reinterpret_cast<uint16_t*>(tile.pair);
                    // A tile A is [side, depth]; a tile B holds pairs along the depth.
                    words[rows_ ? side * kTileDepth + depth : depth / 2 * kTileDepth + 2 * side + depth % 2] =
                        part_of(strip.values[k * strip.stride + j], part);
                }
    }

    // The first half of the depth again in the second.
    void double_up(Tile& tile) const {
        for (int i = 0; i < (rows_ ? kTileSide / 2 : kTileSide); ++i) {
            if (rows_)
                _mm512_store_si512(tile.pair[i + kTileSide / 2], _mm512_load_si512(tile.pair[i]));
            else
                _mm256_store_si256(reinterpret_cast<__m256i*>(&tile.pair[i][kTileSide / 2]),
                                   _mm256_load_si256(reinterpret_cast<const __m256i*>(tile.pair[i])));
        }
    }

    template <int kCount>
    void add_products(const Own& own, int64_t width, float* to, int64_t next, int64_t stride) const {
        for_each<kCount>([&](auto i) { tile_load<i>(to + i * next, stride * 4); });
        for (int64_t c = 0; c < own.chunks; ++c) {
            tile_load<4>(source_ + c, 64);
            for (int64_t part = 0; part < own.parts; ++part) {
                const Tile* tiles = own.tiles + (c * own.parts + part) * own.widths + width;
                for_each<kCount>([&](auto i) {
                    tile_load<5>(tiles + i, 64);
                    if (rows_)
                        tile_product<i, 5, 4>();
                    else
                        tile_product<i, 4, 5>();
                });
            }
        }
        for_each<kCount>([&](auto i) { tile_store<i>(to + i * next, stride * 4); });
    }

    bool rows_ = false;
    Own* own_ = nullptr;  // [strips]
    Tile* source_ = nullptr;
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
    void add_strip(const CombineJob&, const Strips<float>&, int64_t, int64_t, int, float*, int64_t) const {}
};

#endif

}  // namespace fastlora::FASTLORA_ISA
