// The gram pass of bfloat16 factors on matrix tiles (AMX).
// The long dimension is walked in stretches of a few tile depths, the factors one after the other: a factor's stretch
// is packed into tiles of 16 of its columns, as tiles A, and as tiles B for the factors after it, while the next
// factor's is asked for. On the way come the products of its tiles A with its own tiles B and with those of earlier
// factors, which are kept while a later block needs them, so that the tiles at work stay in L1. A few stretches are
// summed in float32 (a product of tiles sums its 32 terms in two short chains), and these sums in float64.
#pragma once
#include "amx.h"
#include "table.h"

#if defined(__AMX_BF16__)

namespace fastlora::FASTLORA_ISA {

class GramTiles {
  public:
    static bool takes(const GramTask& task, const Matrix* factors) {
        for (int64_t f = 0; f < task.factors; ++f)
            if (factors[f].dtype != int64_t(DType::bf16)) return false;
        return task.factors > 0;
    }

    GramTiles(const GramTask& task, const Matrix* factors, const GramBlock* blocks)
        : task_(task), factors_(factors), blocks_(blocks) {}

    // False when there is no memory to be had.
    bool run(Workspace& workspace) {
        if (!workspace.reserve(lay_out(nullptr))) return false;
        lay_out(workspace.data());
        sort_products();
        const int64_t n = task_.rows ? factors_[0].cols : factors_[0].rows, step = steps_ * kTileDepth;
        {
            const TileUnit unit;
            for (int64_t first = 0; first < n; first += step) {
                const Stretch own{first, int(min_(step, n - first)), first % kInSum == 0,
                                  (first + step) % kInSum == 0 || first + step >= n};
                for (int64_t f = 0; f < task_.factors; ++f)
                    for (int64_t t = 0; t < tiles(f); ++t) add_tile(f, t, own);
            }
        }
        for (int64_t p = 0; p < n_products_; ++p) write(products_[p]);
        return true;
    }

  private:
    // A 16 x 16 piece of a block: tile A `row` of the later factor times tile B `column` of the earlier one.
    struct Product {
        int64_t block, row, column;
        const Tile* right;  // [kSteps]
        float* part;        // the float32 sum
        double* sums;
    };

    // A stretch of the long dimension, and whether it is the first or last one of a float32 sum.
    struct Stretch {
        int64_t first;
        int count;
        bool starts, ends;
    };

    static constexpr int kSteps = 4;    // tile depths of a stretch, at most
    static constexpr int kInSum = 256;  // terms of a float32 sum
    static constexpr int kMost = 6;     // products at a time; two of eight registers are for the factors
    static constexpr int64_t kSums = kTileSide * kTileSide;

    int64_t rank(int64_t f) const { return task_.rows ? factors_[f].rows : factors_[f].cols; }
    int64_t tiles(int64_t f) const { return (rank(f) + kTileSide - 1) / kTileSide; }
    int64_t later(const GramBlock& b) const { return max_(b.left, b.right); }
    int64_t earlier(const GramBlock& b) const { return min_(b.left, b.right); }

    // Visits the pieces of every block; of a symmetric one those on and below its diagonal, whose tiles B come first.
    template <class Visit>
    void each_piece(Visit visit) const {
        for (int64_t b = 0; b < task_.blocks; ++b) {
            const int64_t f = later(blocks_[b]), g = earlier(blocks_[b]);
            for (int64_t row = 0; row < tiles(f); ++row)
                for (int64_t column = 0; column < (f == g ? row + 1 : tiles(g)); ++column) visit(b, f, g, row, column);
        }
    }

    size_t lay_out(char* base) {
        Arena arena(base);
        first_tile_ = arena.take<int64_t>(task_.factors + 1);
        int64_t* last_use = arena.take<int64_t>(task_.factors);
        int64_t* slot = arena.take<int64_t>(task_.factors);
        int64_t* taken_until = arena.take<int64_t>(task_.factors);
        kept_ = arena.take<Tile*>(task_.factors);
        int64_t total = 0, widest = 0;
        n_products_ = 0;
        for (int64_t f = 0; f < task_.factors; ++f) {
            total += tiles(f);
            widest = max_(widest, tiles(f));
        }
        each_piece([&](int64_t, int64_t, int64_t, int64_t, int64_t) { ++n_products_; });
        first_product_ = arena.take<int64_t>(total + 2);
        products_ = arena.take<Product>(n_products_);
        sums_ = arena.take<double>(n_products_ * kSums);
        parts_ = arena.take<float>(n_products_ * kSums);
        left_ = arena.take<Tile>(widest * kSteps);
        // Every factor may need a slot of its own; how many there are is known when there is memory to count them in.
        slots_ = arena.take<Tile>(task_.factors * widest * kSteps);
        if (!base) return arena.used();

        first_tile_[0] = 0;
        for (int64_t f = 0; f < task_.factors; ++f) {
            first_tile_[f + 1] = first_tile_[f] + tiles(f);
            last_use[f] = taken_until[f] = -1;
        }
        for (int64_t b = 0; b < task_.blocks; ++b) {
            int64_t& last = last_use[earlier(blocks_[b])];
            last = max_(last, later(blocks_[b]));
        }
        for (int64_t f = 0; f < task_.factors; ++f) {
            kept_[f] = nullptr;
            if (last_use[f] < 0) continue;
            slot[f] = 0;
            while (taken_until[slot[f]] >= f) ++slot[f];
            taken_until[slot[f]] = last_use[f];
            kept_[f] = slots_ + slot[f] * widest * kSteps;
        }
        __builtin_memset(sums_, 0, sizeof(double) * n_products_ * kSums);
        // Short stretches where tiles wait for later factors.
        steps_ = n_products_ > total ? kSteps / 2 : kSteps;
        return arena.used();
    }

    // Products by their tile A.
    void sort_products() {
        const int64_t total = first_tile_[task_.factors];
        for (int64_t t = 0; t < total + 2; ++t) first_product_[t] = 0;
        each_piece(
            [&](int64_t, int64_t f, int64_t, int64_t row, int64_t) { ++first_product_[first_tile_[f] + row + 2]; });
        for (int64_t t = 2; t < total + 2; ++t) first_product_[t] += first_product_[t - 1];
        each_piece([&](int64_t b, int64_t f, int64_t g, int64_t row, int64_t column) {
            const int64_t p = first_product_[first_tile_[f] + row + 1]++;
            products_[p] = {b, row, column, kept_[g] + column * kSteps, parts_ + p * kSums, sums_ + p * kSums};
        });
    }

    // One tile of a factor, packed along a stretch and multiplied with what is needed of it and before it.
    void add_tile(int64_t f, int64_t tile, Stretch stretch) {
        const int64_t at = first_tile_[f] + tile, end = first_product_[at + 1];
        const Product* p = products_ + first_product_[at];
        with_count<0, kMost>(products_ + end - p, [&](auto n) { pack_and_multiply<n>(f, tile, p, stretch); });
        for (p += kMost; p < products_ + end; p += kMost)
            with_count<0, kMost>(products_ + end - p, [&](auto n) {
                start<n>(p, stretch);
                for (int s = 0; s < steps_of(stretch); ++s) multiply<n>(p, tile, s);
                finish<n>(p, stretch);
            });
    }

    static int steps_of(Stretch stretch) { return (stretch.count + kTileDepth - 1) / kTileDepth; }

    // Tiles are packed a step before they are multiplied: what was just stored is slow to load as a tile.
    template <int kCount>
    __attribute__((noinline)) void pack_and_multiply(int64_t f, int64_t tile, const Product* p, Stretch stretch) {
        start<kCount>(p, stretch);
        const Source from = source(f, tile, stretch.first);
        const int steps = steps_of(stretch);
        for (int s = 0; s < steps; ++s) {
            Tile spare;
            Tile &left = left_[tile * kSteps + s], &right = kept_[f] ? kept_[f][tile * kSteps + s] : spare;
            pack(from, s * kTileDepth, min_(kTileDepth, stretch.count - s * kTileDepth), left, right);
            if (s > 0) multiply<kCount>(p, tile, s - 1);
        }
        multiply<kCount>(p, tile, steps - 1);
        finish<kCount>(p, stretch);
    }

    // The sums of `kCount` products stay in tile registers 0 to kCount - 1.
    template <int kCount>
    static void start(const Product* p, Stretch stretch) {
        for_each<kCount>([&](auto i) {
            if (stretch.starts)
                tile_zero<i>();
            else
                tile_load<i>(p[i].part, 64);
        });
    }

    template <int kCount>
    void multiply(const Product* p, int64_t tile, int s) const {
        if constexpr (kCount > 0) tile_load<6>(left_ + tile * kSteps + s, 64);
        for_each<kCount>([&](auto i) {
            tile_load<7>(p[i].right + s, 64);
            tile_product<i, 6, 7>();
        });
    }

    template <int kCount>
    static void finish(const Product* p, Stretch stretch) {
        for_each<kCount>([&](auto i) { tile_store<i>(p[i].part, 64); });
        if (!stretch.ends) return;
        for (int i = 0; i < kCount; ++i)
            for (int j = 0; j < kSums; j += 8) {
                const __m512d wide = _mm512_maskz_cvtps_pd(0xff, _mm256_load_ps(p[i].part + j));
                _mm512_store_pd(p[i].sums + j, _mm512_add_pd(_mm512_load_pd(p[i].sums + j), wide));
            }
    }

    // Where a stretch of a tile lies: 16 or less columns (B side) or rows (A side), and what is needed soon.
    struct Source {
        const uint16_t *data, *ahead;
        int64_t stride;
        int width;
    };

    Source source(int64_t f, int64_t tile, int64_t first) const {
        const Matrix& m = factors_[f];
        const int64_t at = tile * kTileSide;
        const auto place = [&](const Matrix& x, int64_t position) {
            return reinterpret_cast<const uint16_t*>(x.data) +
                   (task_.rows ? at * x.stride + position : position * x.stride + at);
        };
        Source own{place(m, first), place(m, first), m.stride, int(min_<int64_t>(kTileSide, rank(f) - at))};
        // The same piece of one of the next factors, which may be in the next stretch; nothing where it looks
        // different.
        const int64_t next = (f + kSteps / steps_) % task_.factors, step = steps_ * kTileDepth;
        const int64_t position = first + (f + kSteps / steps_) / task_.factors * step;
        const Matrix& other = factors_[next];
        const int64_t length = task_.rows ? other.cols : other.rows;
        if (other.stride == m.stride && rank(next) == rank(f) && position + step <= length)
            own.ahead = place(other, position);
        return own;
    }

    // The tiles of `depth` positions from `position` of a stretch on.
    void pack(const Source& from, int position, int depth, Tile& left, Tile& right) const {
        if (task_.rows) {
            // Into L2: rows are often a power of two apart, which share few sets of L1.
            for (int i = 0; i < from.width; ++i) __builtin_prefetch(from.ahead + i * from.stride + position, 0, 2);
            pack_rows(from.data + position, from.stride, from.width, depth, left);
            transpose_pairs(left, right);
        } else {
            const int64_t offset = position * from.stride;
            pack_pairs(from.data + offset, from.stride, depth, from.width, right, from.ahead + offset);
            transpose_pairs(right, left);
        }
    }

    // The sums are those of the later factor's columns (rows) by the earlier one's.
    void write(const Product& p) const {
        const GramBlock& block = blocks_[p.block];
        double* out = reinterpret_cast<double*>(block.out);
        const int64_t row = p.row * kTileSide, column = p.column * kTileSide;
        const int64_t m = min_<int64_t>(kTileSide, rank(later(block)) - row);
        const int64_t n = min_<int64_t>(kTileSide, rank(earlier(block)) - column);
        if (block.left >= block.right)
            for (int64_t i = 0; i < m; ++i)
                for (int64_t j = 0; j < n; ++j) out[(row + i) * block.stride + column + j] = p.sums[i * kTileSide + j];
        if (block.left <= block.right)
            for (int64_t j = 0; j < n; ++j)
                for (int64_t i = 0; i < m; ++i) out[(column + j) * block.stride + row + i] = p.sums[i * kTileSide + j];
    }

    const GramTask& task_;
    const Matrix* factors_;
    const GramBlock* blocks_;
    int64_t* first_tile_ = nullptr;     // [factors + 1]
    int64_t* first_product_ = nullptr;  // [tiles + 1]
    Product* products_ = nullptr;
    float* parts_ = nullptr;  // [products, 16, 16]
    double* sums_ = nullptr;  // [products, 16, 16]
    int64_t n_products_ = 0, steps_ = kSteps;
    Tile* left_ = nullptr;   // tiles A of the factor at work, [tile, kSteps]
    Tile* slots_ = nullptr;  // tiles B of factors that later ones need
    Tile** kept_ = nullptr;  // [factors]: a factor's tiles B, [tile, kSteps], or null
};

}  // namespace fastlora::FASTLORA_ISA

#endif
