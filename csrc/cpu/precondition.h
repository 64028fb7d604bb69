// A start for one-sided Jacobi on large matrices: with A'A = V diag V' in float64, the columns of A V are
// orthogonal up to the rounding of A'A, so that a sweep or two are left of six to eight. V is orthogonal to
// working precision whatever the rounding, so the small singular values of graded columns stay accurate.
// After Drmac & Veselic 2008, who start from QR.   Floor: 3 p m^2 flops and an eigendecomposition, p >= m.
#pragma once
#include "large_eigh.h"

namespace fastlora::FASTLORA_ISA {

struct PreconditionWork {
    int rows, columns;         // long and short side
    size_t row_ld, column_ld;  // of rows that hold one entry per row, and per column
    double* by_rows;           // [rows, column_ld]: A, the long side first
    double* by_columns;        // [columns, row_ld]
    double* gram;              // [columns, column_ld]
    double* product;           // [columns, row_ld]
    double *values, *vectors;  // [columns], [columns, columns]
    LargeEighWork<double> eigh;

    void carve(Arena& arena, int long_side, int short_side) {
        rows = long_side;
        columns = short_side;
        row_ld = padded_row<double>(rows);
        column_ld = padded_row<double>(columns);
        by_rows = arena.take<double>(rows * column_ld);
        by_columns = arena.take<double>(columns * row_ld);
        gram = arena.take<double>(columns * column_ld);
        product = arena.take<double>(columns * row_ld);
        values = arena.take<double>(columns);
        vectors = arena.take<double>(size_t(columns) * columns);
        arena.take<char>(0);
        eigh.carve(arena, columns, 1);
    }
};

// to [columns, rows] = the transposed from [rows, columns]; both rows hold whole vectors.
inline void transpose_matrix(const double* from, size_t from_ld, int rows, int columns, double* to, size_t to_ld) {
    constexpr int lanes = kLanes<double>;
    for (int i = 0; i < rows; i += lanes) {
        for (int j = 0; j < columns; j += lanes) {
            Vec<double> x[lanes];
            for (int b = 0; b < lanes; ++b)
                x[b] =
                    i + b < rows ? load_first(from + (i + b) * from_ld + j, min_(lanes, columns - j)) : Vec<double>{};
            transpose<double>(x);
            for (int b = 0; b < min_(lanes, columns - j); ++b) store(to + (j + b) * to_ld + i, x[b]);
        }
    }
}

// The lower triangle of gram = A'A.
inline void lower_gram(PreconditionWork& w) {
    constexpr int panel = 3 * kLanes<double>;
    for (int j = 0; j < w.columns; j += panel)
        product<double, true>(w.columns - j, min_(panel, w.columns - j), w.rows, w.by_rows + j, w.column_ld, 1,
                              w.by_rows + j, w.column_ld, w.gram + j * w.column_ld + j, w.column_ld);
}

// Whether A'A is diagonal to rounding. Squares that underflow count as zero: any V will do as a start.
inline bool has_orthogonal_columns(const PreconditionWork& w) {
    bool orthogonal = true;
    for (int i = 1; i < w.columns && orthogonal; ++i) {
        const double* row = w.gram + i * w.column_ld;
        const double bound = kEpsilon<double> * kEpsilon<double> * row[i];
        for (int j = 0; j < i; ++j) orthogonal &= row[j] * row[j] <= bound * w.gram[j * w.column_ld + j];
    }
    return orthogonal;
}

// a [p, q], times scale[0] * scale[1]. Row k of x [columns, rows] becomes column k of A V, row k of v
// [columns, columns] column k of V, by descending norm; V is the identity, reversed, where nothing is to be gained.
template <class T>
void precondition(const T* a, const T* scale, bool tall, PreconditionWork& w, T* x, T* v) {
    const int rows = w.rows, columns = w.columns;
    const double factor = double(scale[0]) * double(scale[1]);
    double* stored = tall ? w.by_rows : w.by_columns;
    const size_t ld = tall ? w.column_ld : w.row_ld;
    const int height = tall ? rows : columns, width = tall ? columns : rows;
    for (int i = 0; i < height; ++i) {
        double* row = stored + i * ld;
        for (int j = 0; j < width; ++j) row[j] = double(a[size_t(i) * width + j]) * factor;
        for (size_t j = width; j < ld; ++j) row[j] = 0;
    }
    if (tall)
        transpose_matrix(w.by_rows, w.column_ld, rows, columns, w.by_columns, w.row_ld);
    else
        transpose_matrix(w.by_columns, w.row_ld, columns, rows, w.by_rows, w.column_ld);

    lower_gram(w);
    int32_t info = kNotConverged;
    if (!has_orthogonal_columns(w))
        eigh_large<double>(w.gram, w.column_ld, w.values, w.vectors, &info, 1, columns, w.eigh);
    const bool turned = info == kOk;
    if (turned)
        product<double, true>(columns, rows, columns, w.vectors, 1, columns, w.by_columns, w.row_ld, w.product,
                              w.row_ld);
    const double* result = turned ? w.product : w.by_columns;
    for (int k = 0; k < columns; ++k) {
        const int from = columns - 1 - k;
        for (int i = 0; i < rows; ++i) x[size_t(k) * rows + i] = T(result[from * w.row_ld + i]);
        for (int c = 0; c < columns; ++c)
            v[size_t(k) * columns + c] = turned ? T(w.vectors[size_t(from) * columns + c]) : T(c == from);
    }
}

}  // namespace fastlora::FASTLORA_ISA
