// Eigensystem of one symmetric tridiagonal matrix by divide and conquer.
// The matrix is torn into leaves of kLeaf rows, which implicit QL solves one per lane (lanes_ql.h), those of several
// matrices at once where one does not fill the lanes. Two solved neighbours T1, T2 with coupling b are
// diag(T1, T2) + |b| u u', so in the basis of their vectors D + rho z z' (large_secular.h). Entries of z that are
// negligible, and pairs of equal d, deflate: their vectors stay as they are. The others are combined by two matrix
// products, since each old vector lives in one half.
// Algorithm: Cuppen 1981, LAPACK stedc / laed2.   Floor: without deflation 4/3 n^3 flops, and 12 n^2 quotients.
#pragma once
#include "lanes_ql.h"
#include "large_householder.h"
#include "large_secular.h"

namespace fastlora::FASTLORA_ISA {

constexpr int kLeaf = 16;

// One matrix, and its eigensystem once solved.
template <class T>
struct Spectrum {
    T* values;     // [n]: the diagonal, then the eigenvalues
    const T* off;  // [n - 1]
    T* vectors;    // [n, ld]: row i is a vector, of the block its row belongs to
    int* order;    // [n]: the rows of a block by ascending value
    bool converged;
};

template <class T>
struct DivideWork {
    T *top, *bottom;                                 // [n, ld]: the halves of the vectors to be combined
    T* weights;                                      // [n, ld]: of each old vector (row) in each new one
    T *poles, *squares, *z, *roots, *refit;          // [ld]
    int *merged, *kept, *dropped, *position;         // [n]
    unsigned char* halves;                           // [n]: kTop | kBottom, where the vector is not zero
    Vec<T>*leaf_diagonal, *leaf_off, *leaf_vectors;  // [kLeaf], [kLeaf], [kLeaf, kLeaf + 1]
    SweepQueue<T> queue;

    void carve(Arena& arena, int n, size_t ld) {
        top = arena.take<T>(n * ld);
        bottom = arena.take<T>(n * ld);
        weights = arena.take<T>(n * ld);
        poles = arena.take<T>(ld);
        squares = arena.take<T>(ld);
        z = arena.take<T>(ld);
        roots = arena.take<T>(ld);
        refit = arena.take<T>(ld);
        merged = arena.take<int>(n);
        kept = arena.take<int>(n);
        dropped = arena.take<int>(n);
        position = arena.take<int>(n);
        halves = arena.take<unsigned char>(n);
        leaf_diagonal = arena.take<Vec<T>>(kLeaf);
        leaf_off = arena.take<Vec<T>>(kLeaf);
        leaf_vectors = arena.take<Vec<T>>(kLeaf * (kLeaf + 1));
        queue.capacity = sweep_capacity(kLeaf, kVectorBytes);
        queue.stride = kLeaf;
        queue.rotations = arena.take<Rotation<T>>(size_t(queue.capacity) * kLeaf);
    }
};

enum : unsigned char { kTop = 1, kBottom = 2 };

template <class T>
inline void sort_rows(const T* d, int* rows, int count) {
    for (int i = 1; i < count; ++i) {
        const int row = rows[i];
        int at = i;
        for (; at > 0 && d[row] < d[rows[at - 1]]; --at) rows[at] = rows[at - 1];
        rows[at] = row;
    }
}

template <class T>
inline void merge_rows(const T* d, const int* a, int a_count, const int* b, int b_count, int* to) {
    int i = 0, j = 0;
    while (i < a_count || j < b_count) {
        const bool from_a = j == b_count || (i < a_count && d[a[i]] <= d[b[j]]);
        *to++ = from_a ? a[i++] : b[j++];
    }
}

// x = c x - s y, y = c y + s x
template <class T>
inline void rotate_rows(T* x, T* y, T c, T s, int n) {
    for (int i = 0; i < n; i += kLanes<T>) {
        const Vec<T> xi = load(x + i), yi = load(y + i);
        store(x + i, xi * c - yi * s);
        store(y + i, yi * c + xi * s);
    }
}

// Copies a row of n entries; whole vectors, the rest of the last one zero.
template <class T>
inline void copy_row(const T* from, T* to, int n) {
    for (int i = 0; i < n; i += kLanes<T>) store(to + i, load_first(from + i, min_(kLanes<T>, n - i)));
}

constexpr int leaves(int n) { return (n + kLeaf - 1) / kLeaf; }

template <class T>
void solve_leaves(Spectrum<T>* spectra, int count, int n, size_t ld, DivideWork<T>& w) {
    constexpr int lanes = kLanes<T>;
    constexpr size_t leaf_ld = kLeaf + 1;
    const int each = leaves(n), widest = min_(kLeaf, n);
    for (int start = 0; start < count * each; start += lanes) {
        const int used = min_(lanes, count * each - start);
        for (int i = 0; i < widest; ++i) {
            w.leaf_diagonal[i] = w.leaf_off[i] = Vec<T>{};
            for (int c = 0; c < widest; ++c) w.leaf_vectors[i * leaf_ld + c] = splat<T>(i == c);
        }
        for (int b = 0; b < used; ++b) {
            const Spectrum<T>& s = spectra[(start + b) / each];
            const int first = (start + b) % each * kLeaf, size = min_(kLeaf, n - first);
            for (int i = 0; i < size; ++i) {
                w.leaf_diagonal[i][b] = s.values[first + i];
                w.leaf_off[i][b] = i + 1 < size ? s.off[first + i] : T(0);
            }
        }
        const Mask<T> failed =
            diagonalise<T>(w.leaf_diagonal, w.leaf_off, widest, w.leaf_vectors, leaf_ld, widest, w.queue);
        for (int b = 0; b < used; ++b) {
            Spectrum<T>& s = spectra[(start + b) / each];
            const int first = (start + b) % each * kLeaf, size = min_(kLeaf, n - first);
            for (int c = 0; c < size; ++c) {
                s.values[first + c] = w.leaf_diagonal[c][b];
                s.order[first + c] = first + c;
                T* row = s.vectors + (first + c) * ld + first;
                for (int i = 0; i < size; ++i) row[i] = w.leaf_vectors[i * leaf_ld + c][b];
            }
            sort_rows(s.values, s.order + first, size);
            s.converged &= !failed[b];
        }
    }
}

// Splits the rows of a block, in `merged` by ascending d, into `kept` and `dropped` (deflated).
// Returns how many are kept.
template <class T>
int deflate(const Spectrum<T>& spectrum, int lo, int size, T rho, size_t ld, DivideWork<T>& w) {
    T* d = spectrum.values;
    T largest = 0;
    for (int i = lo; i < lo + size; ++i) largest = max_(largest, max_(abs_(d[i]), abs_(w.z[i])));
    const T tolerance = 8 * kEpsilon<T> * largest;
    int kept = 0, dropped = 0, last = -1;
    for (int i = 0; i < size; ++i) {
        const int row = w.merged[i];
        if (rho * abs_(w.z[row]) <= tolerance) {
            w.dropped[dropped++] = row;
            continue;
        }
        if (last >= 0) {
            const T norm = sqrt_(w.z[row] * w.z[row] + w.z[last] * w.z[last]);
            const T c = w.z[row] / norm, s = w.z[last] / norm;
            if (abs_((d[row] - d[last]) * c * s) <= tolerance) {
                rotate_rows(spectrum.vectors + last * ld + lo, spectrum.vectors + row * ld + lo, c, s, size);
                const T below = d[last], above = d[row];
                d[last] = below * c * c + above * s * s;
                d[row] = below * s * s + above * c * c;
                w.z[row] = norm;
                w.halves[row] |= w.halves[last];
                w.dropped[dropped++] = last;
            } else {
                w.kept[kept++] = last;
            }
        }
        last = row;
    }
    if (last >= 0) w.kept[kept++] = last;
    return kept;
}

// Joins the solved blocks [lo, mid) and [mid, hi).
template <class T>
void merge_blocks(Spectrum<T>& s, int lo, int mid, int hi, size_t ld, DivideWork<T>& w) {
    T* d = s.values;
    const T coupling = s.off[mid - 1];
    const int size = hi - lo;
    const T half = T(0.70710678118654752440), rho = 2 * abs_(coupling);
    for (int i = lo; i < mid; ++i) w.z[i] = half * s.vectors[i * ld + mid - 1], w.halves[i] = kTop;
    for (int i = mid; i < hi; ++i)
        w.z[i] = (coupling < 0 ? -half : half) * s.vectors[i * ld + mid], w.halves[i] = kBottom;
    merge_rows(d, s.order + lo, mid - lo, s.order + mid, hi - mid, w.merged);
    const int count = deflate(s, lo, size, rho, ld, w);
    const int dropped = size - count;

    // New row order of the old vectors: top only, both halves, bottom only.
    int in_top = 0, in_both = 0;
    for (int j = 0; j < count; ++j)
        in_top += w.halves[w.kept[j]] == kTop, in_both += w.halves[w.kept[j]] == (kTop | kBottom);
    int next[4] = {0, 0, in_top + in_both, in_top};
    T norm = 0;
    for (int j = 0; j < count; ++j) {
        const int row = w.kept[j], at = w.position[j] = next[w.halves[row]]++;
        const T* from = s.vectors + row * ld;
        if (w.halves[row] & kTop) copy_row(from + lo, w.top + at * ld, mid - lo);
        if (w.halves[row] & kBottom) copy_row(from + mid, w.bottom + (at - in_top) * ld, hi - mid);
        w.poles[j] = d[row];
        w.refit[j] = w.z[row];
        w.squares[j] = w.z[row] * w.z[row];
        norm += w.squares[j];
    }
    for (int i = 0; i < dropped; ++i) {
        copy_row(s.vectors + w.dropped[i] * ld + lo, w.top + (count + i) * ld, size);
        w.z[lo + i] = d[w.dropped[i]];
    }

    T* to = s.vectors + lo * ld + lo;
    if (count > 0) {
        w.poles[count] = w.poles[count - 1] + 2 * rho * norm;
        w.squares[count] = 0;
        s.converged &=
            solve_secular<T>({count, 1 / rho, w.poles, w.refit, w.squares, w.position, w.roots, w.weights, ld});
        const int tops = in_top + in_both, bottoms = count - in_top;
        product<T, true>(count, mid - lo, tops, w.weights, ld, 1, w.top, ld, to, ld);
        product<T, true>(count, hi - mid, bottoms, w.weights + in_top * ld, ld, 1, w.bottom, ld, to + mid - lo, ld);
    }
    for (int j = 0; j < count; ++j) d[lo + j] = w.roots[j], w.kept[j] = lo + j;
    for (int i = 0; i < dropped; ++i) {
        d[lo + count + i] = w.z[lo + i];
        w.dropped[i] = lo + count + i;
        copy_row(w.top + (count + i) * ld, to + (count + i) * ld, size);
    }
    sort_rows(d, w.dropped, dropped);
    merge_rows(d, w.kept, count, w.dropped, dropped, s.order + lo);
}

template <class T>
void divide_and_conquer(Spectrum<T>* spectra, int count, int n, size_t ld, DivideWork<T>& w) {
    for (int m = 0; m < count; ++m) {
        Spectrum<T>& s = spectra[m];
        s.converged = true;
        for (size_t i = 0; i < n * ld; ++i) s.vectors[i] = 0;
        for (int cut = kLeaf; cut < n; cut += kLeaf) {
            s.values[cut - 1] -= abs_(s.off[cut - 1]);
            s.values[cut] -= abs_(s.off[cut - 1]);
        }
    }
    solve_leaves<T>(spectra, count, n, ld, w);
    for (int m = 0; m < count; ++m)
        for (int width = kLeaf; width < n; width *= 2)
            for (int lo = 0; lo + width < n; lo += 2 * width)
                merge_blocks<T>(spectra[m], lo, lo + width, min_(lo + 2 * width, n), ld, w);
}

}  // namespace fastlora::FASTLORA_ISA
