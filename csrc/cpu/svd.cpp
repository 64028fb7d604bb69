// Singular values and vectors of a batch of matrices, A = U diag(s) V'.
//   a [batch, p, q] row-major, m = min(p, q)     s [batch, m] descending
//   ut [batch, m, p]: row j is left vector j
//   vt [batch, m, q]: row j is right vector j; its entry of largest magnitude (first of equals) is positive
// kLanes matrices at a time, one per lane: one-sided Jacobi rotates the columns of A (of A' when p < q) until
// they are orthogonal to working precision; their norms are s, their directions the vectors of the long side,
// and the accumulated rotations those of the short side. Large matrices start from an eigendecomposition
// (precondition.h). Small singular values of graded columns keep their relative accuracy. Columns that are zero,
// or too small for their squares, get directions from Gram-Schmidt.
// A matrix with a NaN or an infinity becomes zero in its lane and NaN in the output.
// Algorithm: Hestenes / LAPACK gesvj, row-cyclic, keeping the larger column first.
// Floor: per sweep m^2/2 pairs of 8 p' + 6 m flops, p' = max(p, q); 5 to 8 sweeps, or 1 to 3 after a start. Bound
// by L2 from m = 64.
#include "lanes_interleave.h"
#include "parallel.h"
#include "precondition.h"
#include "table.h"

namespace fastlora::FASTLORA_ISA {
namespace {

// From this short side a start from A'A is faster than the sweeps it saves.
template <class T>
constexpr int kPreconditionFrom = sizeof(T) == 4 ? 48 : 32;

template <class T>
struct SvdWork {
    int rows, columns;      // long and short side
    size_t x_step, v_step;  // odd: see eigh.cpp
    Vec<T>* x;              // [columns][x_step]: the matrix, column by column
    Vec<T>* v;              // [columns][v_step]: the rotations, column by column
    Vec<T>* square;         // [columns]: squared norms, then minus the singular values
    Vec<T>* sign;           // [columns]
    Mask<T>* weak;          // [columns]: columns whose direction Gram-Schmidt must check
    Mask<T>* rank;          // [columns]
    T* coverage;            // [rows]
    bool preconditioned;
    PreconditionWork start;

    void carve(Arena& arena, int p, int q) {
        rows = max_(p, q);
        columns = min_(p, q);
        x_step = size_t(rows) | 1;
        v_step = size_t(columns) | 1;
        x = arena.take<Vec<T>>(columns * x_step);
        v = arena.take<Vec<T>>(columns * v_step);
        square = arena.take<Vec<T>>(columns);
        sign = arena.take<Vec<T>>(columns);
        weak = arena.take<Mask<T>>(columns);
        rank = arena.take<Mask<T>>(columns);
        coverage = arena.take<T>(rows);
        preconditioned = columns >= kPreconditionFrom<T>;
        if (preconditioned) start.carve(arena, rows, columns);
    }
};

template <class T>
struct Givens {
    Vec<T> cosine, sine;
};

// Both dot products below sum in the same order: which of them a lane gets depends on its neighbours.
template <class T>
inline Vec<T> column_dot(const Vec<T>* a, const Vec<T>* b, int n) {
    Vec<T> s0{}, s1{}, s2{}, s3{};
    int i = 0;
    for (; i + 3 < n; i += 4) {
        s0 += a[i] * b[i];
        s1 += a[i + 1] * b[i + 1];
        s2 += a[i + 2] * b[i + 2];
        s3 += a[i + 3] * b[i + 3];
    }
    for (; i < n; ++i) s0 += a[i] * b[i];
    return (s0 + s1) + (s2 + s3);
}

template <class T>
inline Vec<T> rotate_entry(Vec<T>& a, Vec<T>& b, Givens<T> r) {
    const Vec<T> x = a, y = b;
    a = r.cosine * x - r.sine * y;
    b = r.sine * x + r.cosine * y;
    return a;
}

template <class T>
inline void rotate_columns(Vec<T>* a, Vec<T>* b, Givens<T> r, int n) {
    for (int i = 0; i < n; ++i) rotate_entry<T>(a[i], b[i], r);
}

// Rotates (a, b) and returns the dot product of the new a with `next`.
template <class T>
inline Vec<T> rotate_and_dot(Vec<T>* a, Vec<T>* b, const Vec<T>* next, Givens<T> r, int n) {
    Vec<T> s0{}, s1{}, s2{}, s3{};
    int i = 0;
    for (; i + 3 < n; i += 4) {
        s0 += rotate_entry<T>(a[i], b[i], r) * next[i];
        s1 += rotate_entry<T>(a[i + 1], b[i + 1], r) * next[i + 1];
        s2 += rotate_entry<T>(a[i + 2], b[i + 2], r) * next[i + 2];
        s3 += rotate_entry<T>(a[i + 3], b[i + 3], r) * next[i + 3];
    }
    for (; i < n; ++i) s0 += rotate_entry<T>(a[i], b[i], r) * next[i];
    return (s0 + s1) + (s2 + s3);
}

// The rotation that makes two columns with squared norms a, b and dot product d orthogonal, the larger
// first, in the lanes of `turns`; updates the norms.
template <class T>
inline Givens<T> orthogonalising(Vec<T>& a, Vec<T>& b, Vec<T> d, Mask<T> turns) {
    const Vec<T> zero{}, one = splat<T>(1);
    const Vec<T> difference = b - a, twice = turns ? d * T(2) : one;
    const Vec<T> root = sqrt(difference * difference + twice * twice);
    const Vec<T> t = turns ? twice / (difference < zero ? difference - root : difference + root) : zero;
    const Vec<T> cosine = inverse_sqrt(t * t + one), sine = t * cosine;
    const Vec<T> first = turns ? a - t * d : a, second = turns ? b + t * d : b;
    const Mask<T> swaps = (Mask<T>)(first < second) & turns;
    a = swaps ? second : first;
    b = swaps ? first : second;
    return {swaps ? sine : cosine, swaps ? -cosine : sine};
}

// One sweep over all pairs. Returns the lanes that turned. v follows one pair behind x: that work hides the
// latency of the next rotation's roots and quotients.
template <class T>
Mask<T> jacobi_sweep(SvdWork<T>& w, Vec<T> tolerance) {
    const int rows = w.rows, columns = w.columns;
    const Vec<T> small = splat<T>(kSmallSquare<T>);
    Mask<T> turned{};
    for (int c = 0; c < columns; ++c) {
        const Vec<T>* x = w.x + c * w.x_step;
        w.square[c] = column_dot<T>(x, x, rows);
    }
    for (int p = 0; p + 1 < columns; ++p) {
        Vec<T>*xp = w.x + p * w.x_step, *vp = w.v + p * w.v_step;
        Vec<T> dot = column_dot<T>(xp, xp + w.x_step, rows);
        Vec<T>* behind = nullptr;
        Givens<T> pending{};
        for (int q = p + 1; q < columns; ++q) {
            Vec<T>* xq = w.x + q * w.x_step;
            const Vec<T>* next = q + 1 < columns ? xq + w.x_step : xp;
            Vec<T>&a = w.square[p], &b = w.square[q];
            const Mask<T> strong = (Mask<T>)(a > small) & (Mask<T>)(b > small);
            const Mask<T> turns = strong & (Mask<T>)(dot * dot > tolerance * (a * b));
            if (!any_mask(turns)) {
                dot = column_dot<T>(xp, next, rows);
                continue;
            }
            turned |= turns;
            const Givens<T> r = orthogonalising<T>(a, b, dot, turns);
            if (behind) rotate_columns<T>(vp, behind, pending, columns);
            dot = rotate_and_dot<T>(xp, xq, next, r, rows);
            behind = w.v + q * w.v_step;
            pending = r;
        }
        if (behind) rotate_columns<T>(vp, behind, pending, columns);
    }
    return turned;
}

// Turns columns into directions and singular values (in w.square, negated for ranking). The norms of v have
// drifted by rounding, and x = A v with them.
template <class T>
void normalise(SvdWork<T>& w) {
    const Vec<T> zero{}, one = splat<T>(1), boost = splat<T>(kBoost<T>);
    for (int c = 0; c < w.columns; ++c) {
        Vec<T>*x = w.x + c * w.x_step, *v = w.v + c * w.v_step;
        Vec<T> square = column_dot<T>(x, x, w.rows);
        const Mask<T> weak = w.weak[c] = (Mask<T>)(square <= kSmallSquare<T>);
        if (any_mask(weak)) {
            for (int i = 0; i < w.rows; ++i) x[i] = weak ? x[i] * boost : x[i];
            const Vec<T> boosted = column_dot<T>(x, x, w.rows);
            square = weak ? boosted : square;
        }
        const Vec<T> norm = sqrt(square);
        const Mask<T> nonzero = (Mask<T>)(norm > zero);
        const Vec<T> inverse = nonzero ? one / (nonzero ? norm : one) : zero;
        for (int i = 0; i < w.rows; ++i) x[i] *= inverse;
        const Vec<T> drift = one / sqrt(column_dot<T>(v, v, w.columns));
        for (int i = 0; i < w.columns; ++i) v[i] *= drift;
        w.square[c] = -(weak ? norm / boost : norm) * drift;
    }
}

// sign[c] = sign of the entry of largest magnitude of column c.
template <class T>
void choose_signs(const Vec<T>* x, size_t step, int rows, int columns, Vec<T>* sign) {
    for (int c = 0; c < columns; ++c) {
        Vec<T> largest{}, chosen{};
        for (int i = 0; i < rows; ++i) {
            const Vec<T> value = x[c * step + i], size = abs<T>(value);
            const Mask<T> larger = (Mask<T>)(size > largest);
            largest = larger ? size : largest;
            chosen = larger ? value : chosen;
        }
        sign[c] = chosen < Vec<T>{} ? splat<T>(-1) : splat<T>(1);
    }
}

template <class T>
inline T row_dot(const T* a, const T* b, int n) {
    Vec<T> sum{};
    for (int i = 0; i < n; i += kLanes<T>) {
        const int width = min_(kLanes<T>, n - i);
        sum += load_first(a + i, width) * load_first(b + i, width);
    }
    T total = 0;
    for (int b = 0; b < kLanes<T>; ++b) total += sum[b];
    return total;
}

// to += factor * from
template <class T>
inline void add_row(T* to, const T* from, T factor, int n) {
    for (int i = 0; i < n; i += kLanes<T>) {
        const int width = min_(kLanes<T>, n - i);
        store_first(to + i, load_first(to + i, width) + load_first(from + i, width) * splat(factor), width);
    }
}

// Makes row `at` orthogonal to the rows before it, by Gram-Schmidt twice. Returns the squared norm left.
template <class T>
inline T orthogonalise_row(T* rows, int at, int n) {
    T* row = rows + size_t(at) * n;
    for (int pass = 0; pass < 2; ++pass) {
        for (int i = 0; i < at; ++i) {
            const T* before = rows + size_t(i) * n;
            add_row(row, before, -row_dot(row, before, n), n);
        }
    }
    return row_dot(row, row, n);
}

// Rows 0 .. first-1 of `rows` [count, n] are orthonormal; makes all of them so. A later row that holds a
// direction keeps it, less its part along the rows before; one that has none takes the unit vector least
// covered by them.
template <class T>
void complete_rows(T* rows, int first, int count, int n, T* coverage) {
    for (int k = 0; k < n; ++k) coverage[k] = 0;
    for (int i = 0; i < first; ++i)
        for (int k = 0; k < n; ++k) coverage[k] += rows[size_t(i) * n + k] * rows[size_t(i) * n + k];
    for (int at = first; at < count; ++at) {
        T* row = rows + size_t(at) * n;
        T left = orthogonalise_row(rows, at, n);
        if (!(left > T(0.25))) {
            int least = 0;
            for (int k = 1; k < n; ++k) least = coverage[k] < coverage[least] ? k : least;
            for (int k = 0; k < n; ++k) row[k] = T(k == least);
            left = orthogonalise_row(rows, at, n);
        }
        const T inverse = 1 / sqrt_(left);
        for (int k = 0; k < n; ++k) {
            row[k] = row[k] * inverse + T(0);
            coverage[k] += row[k] * row[k];
        }
    }
}

template <class T>
inline bool leads_negative(const T* row, int n) {
    int at = 0;
    for (int k = 1; k < n; ++k) at = abs_(row[k]) > abs_(row[at]) ? k : at;
    return row[at] < 0;
}

template <class T>
inline void negate(T* row, int n) {
    for (int k = 0; k < n; ++k) row[k] = T(0) - row[k];
}

template <class T>
void solve_group(const T* a, T* ut, T* s, T* vt, int32_t* info, int count, int p, int q, SvdWork<T>& w) {
    const bool tall = p >= q;
    const int rows = w.rows, columns = w.columns;
    Group<T> group = interleave<T>(a, count, p, q, false, w.x, tall ? 1 : w.x_step, tall ? w.x_step : 1);
    Vec<T> scale[2];
    choose_scale<T>(group, largest_exponent<T>(int64_t(p) * q), scale);
    T *along = tall ? ut : vt, *across = tall ? vt : ut;
    if (w.preconditioned) {
        const size_t size = size_t(columns) * rows, square = size_t(columns) * columns;
        for (int b = 0; b < count; ++b) {
            const T factor[2] = {scale[0][b], scale[1][b]};
            if (group.non_finite[b]) {
                for (size_t i = 0; i < size; ++i) along[b * size + i] = 0;
                for (size_t i = 0; i < square; ++i) across[b * square + i] = T(i % (columns + 1) == 0);
            } else {
                precondition<T>(a + b * size, factor, tall, w.start, along + b * size, across + b * square);
            }
        }
        interleave<T>(along, count, columns, rows, false, w.x, w.x_step, 1);
        interleave<T>(across, count, columns, columns, false, w.v, w.v_step, 1);
    } else {
        for (int c = 0; c < columns; ++c) {
            Vec<T>*x = w.x + c * w.x_step, *v = w.v + c * w.v_step;
            for (int i = 0; i < rows; ++i) x[i] = scaled<T>(x[i], scale, group.non_finite);
            for (int i = 0; i < columns; ++i) v[i] = splat<T>(i == c);
        }
    }

    const Vec<T> tolerance = splat<T>(4 * T(rows) * kEpsilon<T> * kEpsilon<T>);
    Mask<T> turned = ~Mask<T>{};
    for (int sweep = 0; sweep < kMaxJacobiSweeps && any_mask(turned); ++sweep) turned = jacobi_sweep<T>(w, tolerance);
    normalise<T>(w);

    rank_ascending<T>(w.square, w.rank, columns);
    for (int c = 0; c < columns; ++c) w.square[c] = -w.square[c];
    if (tall)
        choose_signs<T>(w.v, w.v_step, columns, columns, w.sign);
    else
        choose_signs<T>(w.x, w.x_step, rows, columns, w.sign);
    deinterleave_values<T>(w.square, group, w.rank, columns, s);
    deinterleave<T>(w.x, w.x_step, 1, w.sign, w.rank, count, columns, rows, along);
    deinterleave<T>(w.v, w.v_step, 1, w.sign, w.rank, count, columns, columns, across);

    for (int b = 0; b < count; ++b) {
        T* long_rows = along + size_t(b) * columns * rows;
        T* short_rows = across + size_t(b) * columns * columns;
        info[b] = group.non_finite[b] ? kNonFinite : turned[b] ? kNotConverged : kOk;
        if (info[b] == kNonFinite) {
            fill_nan(s + size_t(b) * columns, columns);
            fill_nan(long_rows, size_t(columns) * rows);
            fill_nan(short_rows, size_t(columns) * columns);
            continue;
        }
        int first_weak = columns;
        for (int c = 0; c < columns; ++c)
            if (w.weak[c][b]) first_weak = min_(first_weak, int(w.rank[c][b]));
        if (first_weak < columns) complete_rows(long_rows, first_weak, columns, rows, w.coverage);
        for (int j = first_weak; !tall && j < columns; ++j) {
            if (!leads_negative(long_rows + size_t(j) * rows, rows)) continue;
            negate(long_rows + size_t(j) * rows, rows);
            negate(short_rows + size_t(j) * columns, columns);
        }
    }
}

}  // namespace

template <class T>
int svd(const T* a, T* ut, T* s, T* vt, int32_t* info, int64_t batch, int p, int q, int threads) {
    if (batch == 0 || p == 0 || q == 0) return kDone;
    const int64_t groups = (batch + kLanes<T> - 1) / kLanes<T>, m = min_(p, q);
    threads = int(min_<int64_t>(threads, groups));
    int status = kDone;
    Queue queue(groups);
    on_team(threads, [&](int, int) {
        Workspace memory;
        SvdWork<T> work;
        Arena needed(nullptr);
        work.carve(needed, p, q);
        if (!memory.reserve(needed.used())) return set_shared<int>(status, kOutOfMemory);
        Arena arena(memory.data());
        work.carve(arena, p, q);
        queue.take([&](int64_t g) {
            const int64_t at = g * kLanes<T>;
            const int count = int(min_<int64_t>(kLanes<T>, batch - at));
            solve_group<T>(a + at * p * q, ut + at * m * p, s + at * m, vt + at * m * q, info + at, count, p, q, work);
        });
    });
    return status;
}

template int svd(const float*, float*, float*, float*, int32_t*, int64_t, int, int, int);
template int svd(const double*, double*, double*, double*, int32_t*, int64_t, int, int, int);

}  // namespace fastlora::FASTLORA_ISA
