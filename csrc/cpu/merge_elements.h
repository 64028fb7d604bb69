// Elements of updates, formed anew wherever they are needed, with the same bits each time:
//   x_i[a, b] = sum over p = 0, 1, ... of T(T(s_i) B_i[a, p]) * A_i[p, b],   each step one fused multiply-add in T.
// A thread works on a band of rows and a panel of columns: their factors are converted once and stay in the L2 cache.
// From there it forms groups of 8 rows, whose elements of all adapters fit the L1 cache.
#pragma once
#include "parallel.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {

constexpr int kBand = 256;  // rows whose B is kept
constexpr int kPanel = 64;  // columns whose A is kept
constexpr int kGroup = 8;   // rows that are formed at once

template <class T>
inline T next_above(T x) {
    using I = typename IntegerOf<T>::type;
    return finite_(x) ? __builtin_bit_cast(T, I(__builtin_bit_cast(I, x) + 1)) : x;  // x >= 0
}

template <class T>
class Elements {
  public:
    explicit Elements(const MergeArgs& args, int panel = kPanel, int64_t keep = 0)
        : args_(args), panel_(panel), kept_(keep ? keep : args.k) {}

    // False where there is no memory.
    bool reserve(Workspace& workspace) {
        Arena measure(nullptr);
        lay_out(measure, false);
        if (!workspace.reserve(measure.used())) return false;
        Arena arena(workspace.data());
        lay_out(arena, true);
        return true;
    }

    void set_rows(int64_t row, int rows) {
        row_ = row;
        T* out = left_;
        for (int64_t i = 0; i < args_.k; ++i) {
            const Matrix& B = args_.factors[2 * i];
            const T scale = T(args_.scales[i]);
            read_block<T>(B, row, 0, rows, int(B.cols), out, B.cols);
            for (int64_t j = 0; j < rows * B.cols; ++j) out[j] *= scale;
            out += kBand * B.cols;
        }
    }

    // Columns beyond the last are zero.
    void set_columns(int64_t column, int columns) {
        column_ = column;
        columns_ = columns;
        T* out = right_;
        for (int64_t i = 0; i < args_.k; ++i) {
            const Matrix& A = args_.factors[2 * i + 1];
            read_block<T>(A, 0, column, int(A.rows), columns, out, panel_);
            for (int64_t p = 0; columns < panel_ && p < A.rows; ++p)
                for (int j = columns; j < panel_; ++j) out[p * panel_ + j] = T(0);
            out += A.rows * panel_;
        }
    }

    // x_i of `rows` <= 8 rows from `row` of the band on, into place `at`: [rows, panel].
    T* form(int64_t i, int row, int rows, int64_t at) {
        const int64_t before = starts_[i];
        const int r = int(args_.factors[2 * i].cols);
        T* out = x(at);
        const T* left = left_ + kBand * before + int64_t(row) * r;
        product<T, true>(rows, panel_, r, left, 1, r, right_ + before * panel_, panel_, out, panel_);
        return out;
    }
    T* form(int64_t i, int row, int rows) { return form(i, row, rows, i); }

    T* x(int64_t at) const { return x_ + at * kGroup * panel_; }
    int64_t row() const { return row_; }        // of the band
    int64_t column() const { return column_; }  // of the panel
    int columns() const { return columns_; }
    int panel() const { return panel_; }

  private:
    void lay_out(Arena& arena, bool filled) {
        int64_t ranks = 0;
        starts_ = arena.take<int64_t>(size_t(args_.k));
        for (int64_t i = 0; i < args_.k; ++i) {
            if (filled) starts_[i] = ranks;
            ranks += args_.factors[2 * i].cols;
        }
        left_ = arena.take<T>(size_t(kBand * ranks));
        right_ = arena.take<T>(size_t(ranks * panel_));
        x_ = arena.take<T>(size_t(kept_ * kGroup * panel_));
    }

    const MergeArgs& args_;
    int panel_;
    int64_t kept_;
    int64_t* starts_ = nullptr;  // [k]: ranks before
    T *left_ = nullptr, *right_ = nullptr, *x_ = nullptr;
    int64_t row_ = 0, column_ = 0;
    int columns_ = 0;
};

// Pieces of a module that threads take: a band of rows and a stretch of panels.
struct Pieces {
    int64_t n, m, width;  // width: columns of a piece
    int64_t across() const { return max_<int64_t>((m + width - 1) / width, 1); }
    int64_t count() const { return (n + kBand - 1) / kBand * across(); }
    int64_t row(int64_t piece) const { return piece / across() * kBand; }
    int rows(int64_t piece) const { return int(min_<int64_t>(kBand, n - row(piece))); }
    int64_t column(int64_t piece) const { return piece % across() * width; }
    int64_t columns(int64_t piece) const { return min_(width, m - column(piece)); }
};

// f(row of the band, rows) for every group of a piece, panel by panel; the columns are those of `elements`.
template <class T, class F>
inline void for_groups(Elements<T>& elements, int64_t column, int64_t columns, int rows, const F& f) {
    for (int64_t c = column; c < column + columns; c += elements.panel()) {
        elements.set_columns(c, int(min_<int64_t>(elements.panel(), column + columns - c)));
        for (int g = 0; g < rows; g += kGroup) f(g, min_(kGroup, rows - g));
    }
}

}  // namespace fastlora::FASTLORA_ISA
