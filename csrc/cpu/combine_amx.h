// The strips of a combine task on matrix tiles (AMX), for bfloat16 factors and results.
// A coefficient is the sum of three bfloat16 numbers, to 2^-27 of itself, so a product with a stored value is three
// exact products, summed in float32. A factor of rank 16 or less fills a tile's depth of 32 twice, which takes the
// first two numbers in one product of tiles and the third in another; a larger one takes a product a number and 32 of
// its rank.
#pragma once
#include "amx.h"
#include "combine_strips.h"

namespace fastlora::FASTLORA_ISA {

#if defined(__AMX_BF16__)

static_assert(kTileB<float> == kTileSide);
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
            const Reach reach = reach_of(job, f);
            if (reach.first < 0) continue;
            Own own{};
            own.depth = job.rank(f);
            own.twice = own.depth <= kTileSide;
            own.chunks = (own.depth + kTileDepth - 1) / kTileDepth;
            own.parts = own.twice ? 2 : 3;
            own.widths = (reach.last - reach.first + kTileSide - 1) / kTileSide;
            own.tiles = arena.take<Tile>(own.chunks * own.parts * own.widths);
            deepest = max_(deepest, own.chunks);
            if (fill) {
                fill_tiles(strips.strip[s], own);
                own_[s] = own;
            }
            ++s;
        }
        source_ = arena.take<Tile>(deepest * (rows_ ? kTogether * kMost : 1));
        return true;
    }

    // Within the life of a TileUnit: results [count, stride] (B side, count <= kTileSide) or [.., stride] with columns
    // [first, first + count) (A side) += all strips; is_fresh: the first one reaches all of them, which start with it.
    void add_strips(const CombineJob& job, const Strips<float>& strips, int64_t first, int count, float* results,
                    int64_t stride, bool is_fresh) const {
        for (int64_t s = 0, n = 1; s < strips.count; s += n, is_fresh = false) {
            const Strip<float>& strip = strips.strip[s];
            if (rows_) {
                n = strips_together(strips, s);
                add_columns(job, &strip, own_ + s, int(n), first, count, results + strip.out * stride, stride,
                            is_fresh);
            } else {
                add_rows(own_[s], job.factors[strip.factor], first, count, results + strip.out, stride, is_fresh);
            }
        }
    }

  private:
    struct Own {
        int64_t depth, chunks, parts, widths;
        bool twice;   // the factor fills a tile's depth twice
        Tile* tiles;  // [chunk, part, width]
    };

    static constexpr int kMost = 4;      // results at a time, as tile registers
    static constexpr int kTogether = 2;  // A side: strips whose products are summed before the results are touched

    static bool has_tiny_coefficient(const CombineJob& job, const Term& term) {
        if (!term.coefficient) return false;
        for (int64_t p = 0; p < job.rank(term.factor); ++p)
            for (int64_t q = 0; q < term.columns; ++q) {
                const double c = abs_(coefficient(job, term, p, q));
                if (c != 0.0 && c < 0x1p-90) return true;  // its last part would be subnormal
            }
        return false;
    }

    // The coefficients as tiles, from the three numbers that sum up to each.
    void fill_tiles(const Strip<float>& strip, Own& own) const {
        __builtin_memset(own.tiles, 0, sizeof(Tile) * own.chunks * own.parts * own.widths);
        for (int64_t w = 0; w < own.widths; ++w)
            for (int64_t c = 0; c < own.chunks; ++c) {
                Tile* const tiles = own.tiles + c * own.parts * own.widths + w;
                for (int64_t k = c * kTileDepth; k < min_(own.depth, (c + 1) * kTileDepth); k += 2) {
                    const float* values = strip.values + k * strip.stride + w * kTileSide;
                    __m512 even = _mm512_loadu_ps(values);
                    __m512 odd = k + 1 < own.depth ? _mm512_loadu_ps(values + strip.stride) : _mm512_setzero_ps();
                    for (int part = 0; part < 3; ++part) {
                        const int64_t place = own.twice ? part / 2 : part;
                        const int64_t row = k % kTileDepth / 2 + (own.twice && part == 1 ? kTileSide / 2 : 0);
                        _mm512_store_si512(tiles[place * own.widths].pair[row],
                                           interleave_words(take_part(even), take_part(odd)));
                    }
                }
                if (!rows_) continue;
                // On the A side they are the left factor.
                for (int64_t place = 0; place < own.parts; ++place) {
                    const Tile pairs = tiles[place * own.widths];
                    transpose_pairs(pairs, tiles[place * own.widths]);
                }
            }
    }

    // x rounded to bfloat16, which is taken from x.
    static __m256i take_part(__m512& x) {
        const __m256i part = (__m256i)_mm512_cvtneps_pbh(x);
        x -= (__m512)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, part), 16);
        return part;
    }

    // B side: up to 16 rows of the factor with all coefficients.
    void add_rows(const Own& own, const Matrix& m, int64_t first, int count, float* results, int64_t stride,
                  bool is_fresh) const {
        const uint16_t* p = reinterpret_cast<const uint16_t*>(m.data) + first * m.stride;
        for (int64_t c = 0; c < own.chunks; ++c, p += kTileDepth) {
            const int depth = int(min_<int64_t>(kTileDepth, own.depth - c * kTileDepth));
            if (own.twice)
                pack_rows_twice(p, m.stride, count, depth, source_[c]);
            else
                pack_rows(p, m.stride, count, depth, source_[c]);
        }
        tile_load<4>(source_, 64);
        for (int64_t w = 0; w < own.widths; w += kMost)
            with_count<1, kMost>(own.widths - w, [&](auto n) {
                const auto place = [&](int i) { return results + (w + i) * kTileSide; };
                start<n>(place, stride, is_fresh);
                for (int64_t c = 0; c < own.chunks; ++c) {
                    if (own.chunks > 1) tile_load<4>(source_ + c, 64);
                    for (int64_t part = 0; part < own.parts; ++part) {
                        const Tile* tiles = own.tiles + (c * own.parts + part) * own.widths + w;
                        for_each<n>([&](auto i) {
                            tile_load<5 + i % 3>(tiles + i, 64);
                            tile_product<i, 4, 5 + i % 3>();
                        });
                    }
                }
                for_each<n>([&](auto i) { tile_store<i>(place(i), stride * 4); });
            });
    }

    // How many strips from s on go into the same results.
    static int64_t strips_together(const Strips<float>& strips, int64_t s) {
        const Strip<float>& first = strips.strip[s];
        int64_t end = s + 1;
        while (end < strips.count && end - s < kTogether && strips.strip[end].out == first.out &&
               strips.strip[end].width == first.width)
            ++end;
        return end - s;
    }

    // A side: some columns of `n` factors, with all their coefficients.
    void add_columns(const CombineJob& job, const Strip<float>* strips, const Own* own, int n, int64_t first, int count,
                     float* results, int64_t stride, bool is_fresh) const {
        constexpr int block = kMost * kTileSide;
        for (int at = 0; at < count; at += block) {
            const int columns = min_(block, count - at);
            Tile* to = source_;
            for (int s = 0; s < n; ++s)
                to = pack_columns(own[s], job.factors[strips[s].factor], first + at, columns, to);
            for (int64_t w = 0; w < own->widths; ++w)
                with_count<1, kMost>((columns + kTileSide - 1) / kTileSide, [&](auto k) {
                    const auto place = [&](int i) { return results + w * kTileSide * stride + at + i * kTileSide; };
                    start<k>(place, stride, is_fresh);
                    const Tile* from = source_;
                    for (int s = 0; s < n; ++s)
                        for (int64_t c = 0; c < own[s].chunks; ++c, from += kMost)
                            for (int64_t part = 0; part < own[s].parts; ++part) {
                                tile_load<4>(own[s].tiles + (c * own[s].parts + part) * own[s].widths + w, 64);
                                for_each<k>([&](auto i) {
                                    tile_load<5 + i % 3>(from + i, 64);
                                    tile_product<i, 4, 5 + i % 3>();
                                });
                            }
                    for_each<k>([&](auto i) { tile_store<i>(place(i), stride * 4); });
                });
        }
    }

    // The tiles B [chunk, kMost] of some columns of a factor; returns where the next ones go.
    static Tile* pack_columns(const Own& own, const Matrix& m, int64_t first, int columns, Tile* to) {
        const uint16_t* p = reinterpret_cast<const uint16_t*>(m.data) + first;
        const bool follows = first + 2 * kMost * kTileSide <= m.cols;
        for (int64_t c = 0; c < own.chunks; ++c, to += kMost, p += kTileDepth * m.stride) {
            const int depth = int(min_<int64_t>(kTileDepth, own.depth - c * kTileDepth));
            if (columns == kMost * kTileSide && own.twice)
                pack_block<true>(p, m.stride, depth, follows, to);
            else if (columns == kMost * kTileSide)
                pack_block<false>(p, m.stride, depth, follows, to);
            else
                for (int b = 0; b * kTileSide < columns; ++b) {
                    const int width = min_(kTileSide, columns - b * kTileSide);
                    if (own.twice)
                        pack_pairs<true>(p + b * kTileSide, m.stride, depth, width, to[b]);
                    else
                        pack_pairs(p + b * kTileSide, m.stride, depth, width, to[b]);
                }
        }
        return to;
    }

    // kMost tiles B side by side, row by row: pieces of lines would leave L1 before the rest of them is needed. What
    // follows behind them is asked for on the way, into L2: rows are often a power of two apart, which share few sets.
    template <bool kTwice>
    static void pack_block(const uint16_t* p, int64_t stride, int depth, bool follows, Tile* to) {
        constexpr int rows = kTwice ? kTileSide / 2 : kTileSide, block = kMost * kTileSide;
        for (int i = 0; i < rows; ++i, p += 2 * stride) {
            const int there = min_(2, max_(0, depth - 2 * i));  // of two rows
            for (int r = 0; r < there && follows; ++r)
                for (int j = 0; j < block; j += 32) __builtin_prefetch(p + r * stride + block + j, 0, 2);
            for (int b = 0; b < kMost; ++b) {
                const uint16_t* q = p + b * kTileSide;
                const __m256i none = _mm256_setzero_si256();
                const __m512i pairs =
                    interleave_words(there > 0 ? load_words(q) : none, there > 1 ? load_words(q + stride) : none);
                _mm512_store_si512(to[b].pair[i], pairs);
                if constexpr (kTwice) _mm512_store_si512(to[b].pair[i + rows], pairs);
            }
        }
    }

    // The tile A of up to 16 rows and `depth` <= 16 columns, which fill both halves.
    static void pack_rows_twice(const uint16_t* p, int64_t stride, int rows, int depth, Tile& out) {
        const __mmask16 columns = first_lanes(depth);
        for (int i = 0; i < kTileSide; ++i, p += stride) {
            const __m256i row = i < rows ? load_words(p, columns) : _mm256_setzero_si256();
            _mm512_store_si512(out.pair[i], _mm512_maskz_broadcast_i64x4(0xff, row));
        }
    }

    // Sums start from the results so far, or from zero.
    template <int kCount, class Place>
    static void start(Place place, int64_t stride, bool is_fresh) {
        if (is_fresh)
            for_each<kCount>([](auto i) { tile_zero<i>(); });
        else
            for_each<kCount>([&](auto i) { tile_load<i>(place(i), stride * 4); });
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
    void add_strips(const CombineJob&, const Strips<float>&, int64_t, int, float*, int64_t, bool) const {}
};

#endif

}  // namespace fastlora::FASTLORA_ISA
