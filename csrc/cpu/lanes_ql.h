// Implicit QL on interleaved symmetric tridiagonal matrices, with eigenvectors.
// Each lane works on its own unreduced block (first, last): a sweep runs down the union of the blocks, and
// lanes outside theirs get identity rotations. Rotations are kept and applied to the vectors many sweeps at a
// time, two sweeps in one pass over a row.
// A rotation is three shears, t = sine / (1 + cosine): x -= t y, y += s x, x -= t y. With cosine >= 0 this is
// stable, takes three multiply-adds for four, and is exact for the identity.
// Algorithm: EISPACK imtql2 / LAPACK steqr.   Floor: about 1.7 n^2 rotations, so 5 n^3 multiply-adds.
#pragma once
#include "lanes_interleave.h"

namespace fastlora::FASTLORA_ISA {

template <class T>
struct Rotation {
    Vec<T> sine;
    Vec<T> shear;  // sine / (1 + cosine)
};

constexpr int kMaxSweeps = 64;
constexpr int kMaxSweepsPerValue = 40;

// Sweeps not yet applied. Sweep k rotates columns (i, i+1) by rotations[k * stride + i], i = high-1 .. low.
template <class T>
struct SweepQueue {
    Rotation<T>* rotations;
    int stride;
    int capacity;
    int count = 0;
    int low[kMaxSweeps], high[kMaxSweeps];
    Rotation<T>* sweep(int k) const { return rotations + size_t(k) * stride; }
};

// As many sweeps as fit in a share of the L2 cache: each flush streams all of q.
inline int sweep_capacity(int n, int vector_bytes) {
    const int fitting = 640 * 1024 / (2 * n * vector_bytes);
    return max_(4, min_(kMaxSweeps, fitting)) / 2 * 2;
}

// One row step: columns (i, i+1), where `carried` enters as column i+1; returns the finished column i+1.
template <class T>
inline Vec<T> rotate(Vec<T> left, Vec<T>& carried, Rotation<T> r) {
    const Vec<T> x = left - r.shear * carried;
    const Vec<T> y = carried + r.sine * x;
    carried = x - r.shear * y;
    return y;
}

// Two sweeps of the same range over kRows rows of q; the second follows one column behind the first.
template <int kRows, class T>
inline void apply_two(Vec<T>* q, size_t ld, const Rotation<T>* first, const Rotation<T>* second, int low, int high) {
    Vec<T> a[kRows], b[kRows];
    for (int r = 0; r < kRows; ++r) {
        Vec<T>* row = q + r * ld;
        a[r] = row[high];
        b[r] = rotate<T>(row[high - 1], a[r], first[high - 1]);
    }
    for (int i = high - 2; i >= low; --i) {
        const Rotation<T> ra = first[i], rb = second[i + 1];
        for (int r = 0; r < kRows; ++r) {
            Vec<T>* row = q + r * ld;
            const Vec<T> middle = rotate<T>(row[i], a[r], ra);
            row[i + 2] = rotate<T>(middle, b[r], rb);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        Vec<T>* row = q + r * ld;
        row[low + 1] = rotate<T>(a[r], b[r], second[low]);
        row[low] = b[r];
    }
}

template <int kRows, class T>
inline void apply_one(Vec<T>* q, size_t ld, const Rotation<T>* sweep, int low, int high) {
    for (int r = 0; r < kRows; ++r) {
        Vec<T>* row = q + r * ld;
        Vec<T> a = row[high];
        for (int i = high - 1; i >= low; --i) row[i + 1] = rotate<T>(row[i], a, sweep[i]);
        row[low] = a;
    }
}

template <int kRows, class T>
inline void apply_queue(Vec<T>* q, size_t ld, const SweepQueue<T>& queue) {
    int k = 0;
    for (; k + 1 < queue.count; k += 2)
        apply_two<kRows, T>(q, ld, queue.sweep(k), queue.sweep(k + 1), queue.low[k], queue.high[k]);
    if (k < queue.count) apply_one<kRows, T>(q, ld, queue.sweep(k), queue.low[k], queue.high[k]);
}

// Widens two sweeps to a common range.
template <class T>
inline void align_pair(SweepQueue<T>& queue, int k) {
    const int low = min_(queue.low[k], queue.low[k + 1]), high = max_(queue.high[k], queue.high[k + 1]);
    for (int s = k; s < k + 2; ++s) {
        Rotation<T>* sweep = queue.sweep(s);
        for (int i = low; i < queue.low[s]; ++i) sweep[i] = Rotation<T>{};
        for (int i = queue.high[s]; i < high; ++i) sweep[i] = Rotation<T>{};
        queue.low[s] = low;
        queue.high[s] = high;
    }
}

template <class T>
void flush(SweepQueue<T>& queue, Vec<T>* q, size_t ld, int rows) {
    constexpr int kRows = 4;
    for (int k = 0; k + 1 < queue.count; k += 2) align_pair(queue, k);
    int row = 0;
    for (; row + kRows <= rows; row += kRows) apply_queue<kRows, T>(q + row * ld, ld, queue);
    for (; row < rows; ++row) apply_queue<1, T>(q + row * ld, ld, queue);
    queue.count = 0;
}

template <class T>
inline int smallest_lane(Mask<T> x) {
    int r = int(x[0]);
    for (int b = 1; b < kLanes<T>; ++b) r = min_(r, int(x[b]));
    return r;
}
template <class T>
inline int largest_lane(Mask<T> x) {
    int r = int(x[0]);
    for (int b = 1; b < kLanes<T>; ++b) r = max_(r, int(x[b]));
    return r;
}

// The unreduced block each lane works on, with Wilkinson's shift for it.
template <class T>
struct Blocks {
    Mask<T> first{}, last{}, active{};
    Vec<T> start{};  // d[last] - shift, the first bulge
};

// Cuts negligible off-diagonals from `from` on, moves finished lanes to their next block and sets its shift.
template <class T>
inline void find_blocks(const Vec<T>* d, Vec<T>* e, int n, int from, Blocks<T>& blocks) {
    const Vec<T> zero{}, one = splat<T>(1);
    const Vec<T> epsilon = splat<T>(kEpsilon<T>), floor = splat<T>(kEpsilon<T> * T(1e-3));
    Mask<T> first = blocks.first, last = Mask<T>{} + (n - 1), found{};
    Vec<T> top = zero, second = zero, bottom = d[n - 1], coupling = zero;
    for (int i = from; i < n - 1; ++i) {
        const Mask<T> cut = (Mask<T>)(abs<T>(e[i]) <= epsilon * (abs<T>(d[i]) + abs<T>(d[i + 1])) + floor);
        e[i] = cut ? zero : e[i];
        Mask<T> here = (Mask<T>)(first == i);
        first -= here & cut;
        here &= ~cut;
        top = here ? d[i] : top;
        second = here ? d[i + 1] : second;
        coupling = here ? e[i] : coupling;
        const Mask<T> ends = cut & ~found & (Mask<T>)(first < i);
        last = ends ? Mask<T>{} + i : last;
        bottom = ends ? d[i] : bottom;
        found |= ends;
    }
    blocks.first = first;
    blocks.last = last;
    blocks.active = (Mask<T>)(first < n - 1);
    const Vec<T> safe = blocks.active ? coupling : one;
    const Vec<T> g = (second - top) / (safe * T(2)), root = sqrt(g * g + one);
    blocks.start = bottom - top + safe / (g + (g >= zero ? root : -root));
}

// One QL sweep of every active lane over its block; rotations [low, high) of `sweep` are written. Outside its
// block a lane computes on, but stores identity rotations and leaves d and e alone. (An idle lane has an empty
// block at n - 1.)
template <class T>
inline void sweep_blocks(Vec<T>* d, Vec<T>* e, const Blocks<T>& blocks, int low, int high, Rotation<T>* sweep) {
    const Vec<T> zero{}, one = splat<T>(1);
    Vec<T> g = zero, s = one, c = one, p = zero;
    for (int i = high - 1; i >= low; --i) {
        const Mask<T> starts = (Mask<T>)(blocks.last == i + 1), finishes = (Mask<T>)(blocks.first == i);
        const Mask<T> on = (Mask<T>)(blocks.last > i) & (Mask<T>)(blocks.first <= i);
        g = starts ? blocks.start : g;
        s = starts ? one : s;
        c = starts ? one : c;
        p = starts ? zero : p;
        const Vec<T> f = s * e[i], b = c * e[i];
        const Vec<T> square = f * f + g * g;
        const Mask<T> turns = (Mask<T>)(square > kTiny<T>);
        const InverseSqrt<T> inverse = inverse_sqrt_parts(square);
        const Vec<T> signed_inverse = negate_where_negative<T>(inverse.y, g);  // keeps the cosine >= 0
        const Vec<T> sine = f * signed_inverse, cosine = g * signed_inverse, length = square * signed_inverse;
        s = turns ? sine + sine * inverse.t : zero;
        c = turns ? cosine + cosine * inverse.t : one;
        const Vec<T> above = turns ? length + length * inverse.t : zero;
        const Vec<T> kept = starts ? e[i + 1] : above;
        e[i + 1] = on ? kept : e[i + 1];
        const Vec<T> shifted = d[i + 1] - p;
        const Vec<T> r = (d[i] - shifted) * s + c * (b * T(2));
        p = s * r;
        d[i + 1] = on ? shifted + p : d[i + 1];
        g = c * r - b;
        sweep[i].sine = on ? s : zero;
        sweep[i].shear = on ? s * reciprocal<T>(one + c) : zero;
        d[i] = finishes ? d[i] - p : d[i];
        e[i] = finishes ? g : e[i];
    }
}

// Diagonalises (d, e), applying the rotations to the columns of q [rows, n] (q[i * ld + c]); e holds n
// entries. On return d holds the eigenvalues, unsorted. Returns the lanes that did not converge.
template <class T>
Mask<T> diagonalise(Vec<T>* d, Vec<T>* e, int n, Vec<T>* q, size_t ld, int rows, SweepQueue<T>& queue) {
    Blocks<T> blocks;
    int low = 0;
    e[n - 1] = Vec<T>{};
    for (int iteration = 0; iteration < kMaxSweepsPerValue * n; ++iteration) {
        find_blocks<T>(d, e, n, low, blocks);
        if (!any_mask(blocks.active)) break;
        low = smallest_lane<T>(blocks.first);
        const int high = largest_lane<T>(blocks.active ? blocks.last : Mask<T>{});
        sweep_blocks<T>(d, e, blocks, low, high, queue.sweep(queue.count));
        queue.low[queue.count] = low;
        queue.high[queue.count] = high;
        if (++queue.count == queue.capacity) flush(queue, q, ld, rows);
    }
    if (queue.count > 0) flush(queue, q, ld, rows);
    return blocks.active;
}

}  // namespace fastlora::FASTLORA_ISA
