// Householder reduction of one symmetric matrix to tridiagonal form, A = Q T Q', and the product with Q.
//   a [n, ld] row-major, lower triangle read; on return row m holds reflector u_m in columns 0 .. m-1, its last
//   entry one, and zeros behind. H_m = I - tau_m u_m u_m', Q = H_(n-1) ... H_2.
// Rows are eliminated from the last, so that what is left starts at an aligned corner. The rank-2 update of one
// step is fused with the matrix-vector product of the next: each step reads and writes the triangle once.
// Q is applied in blocks, H_m ... H_(m+b-1) = I - Y T Y' (compact WY), as matrix products.
// Algorithm: LAPACK sytd2 (upper) and larft / larfb.   Floor: 4/3 n^3 flops to reduce, 2 n^3 to apply.
#pragma once
#include "lanes_interleave.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {

constexpr int kReflectorBlock = 16;

// Rows hold whole vectors and one more: products write up to a vector past a row's end, and row starts do not
// fall on the same cache sets.
template <class T>
inline size_t padded_row(int n) {
    return size_t(padded<T>(n)) + 2 * kLanes<T>;
}

template <class T>
struct Reduced {
    T* a;                     // [n rounded up to 4, ld]: four rows are updated at a time
    T *diagonal, *off, *tau;  // [ld]

    void carve(Arena& arena, int n, size_t ld) {
        a = arena.take<T>((n + 3) / 4 * 4 * ld);
        diagonal = arena.take<T>(ld);
        off = arena.take<T>(ld);
        tau = arena.take<T>(ld);
    }
};

template <class T>
struct HouseholderWork {
    T *u, *v, *w, *y;          // [ld]: zero behind the rows in use
    T *block, *gram, *factor;  // [n + lanes, kReflectorBlock], [kReflectorBlock, kReflectorBlock] twice
    T *projected, *reflected;  // [n, kReflectorBlock]

    void carve(Arena& arena, int n, size_t ld) {
        u = arena.take<T>(ld);
        v = arena.take<T>(ld);
        w = arena.take<T>(ld);
        y = arena.take<T>(ld);
        block = arena.take<T>((n + kLanes<T>)*kReflectorBlock);
        gram = arena.take<T>(kReflectorBlock * kReflectorBlock);
        factor = arena.take<T>(kReflectorBlock * kReflectorBlock);
        projected = arena.take<T>(n * kReflectorBlock);
        reflected = arena.take<T>(n * kReflectorBlock);
    }
};

// Over whole vectors: entries behind n are zero.
template <class T>
inline T padded_dot(const T* a, const T* b, int n) {
    constexpr int lanes = kLanes<T>;
    Vec<T> s0{}, s1{};
    int i = 0;
    for (; i + lanes < n; i += 2 * lanes) {
        s0 += load(a + i) * load(b + i);
        s1 += load(a + i + lanes) * load(b + i + lanes);
    }
    if (i < n) s0 += load(a + i) * load(b + i);
    return sum_lanes<T>(s0 + s1);
}

// to[r] += the sum over the lanes of s[r], r < 4.
template <class T>
inline void add_four_sums(const Vec<T>* s, T* to) {
    constexpr int lanes = kLanes<T>;
    if constexpr (lanes < 4) {
        for (int r = 0; r < 4; ++r) to[r] += sum_lanes<T>(s[r]);
    } else {
        using Lanes = typename MakeIndices<lanes>::type;
        const Vec<T> even = zip_low<T>(s[0], s[2], Lanes{}) + zip_high<T>(s[0], s[2], Lanes{});
        const Vec<T> odd = zip_low<T>(s[1], s[3], Lanes{}) + zip_high<T>(s[1], s[3], Lanes{});
        const Vec<T> all = zip_low<T>(even, odd, Lanes{}) + zip_high<T>(even, odd, Lanes{});  // s0 s1 s2 s3 s0 ...
        T parts[lanes];
        store(parts, all);
        for (int r = 0; r < 4; ++r) {
            T sum = parts[r];
            for (int b = r + 4; b < lanes; b += 4) sum += parts[b];
            to[r] += sum;
        }
    }
}

// A -= v w' + w v' on the rows 0 .. m-1 of the lower triangle, then y = A u. Four rows at a time.
template <bool kPending, class T>
void update_and_multiply(T* a, size_t ld, int m, const T* v, const T* w, const T* u, T* y) {
    constexpr int lanes = kLanes<T>;
    const Mask<T> lane = lane_numbers<T>();
    for (int i = 0; i < m; i += lanes) store(y + i, Vec<T>{});
    for (int c = 0; c < m; c += 4) {
        T* row = a + c * ld;
        Vec<T> vc[4], wc[4], uc[4], sum[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            vc[r] = splat(v[c + r]);
            wc[r] = splat(w[c + r]);
            uc[r] = splat(u[c + r]);
            sum[r] = Vec<T>{};
        }
        int i = 0;
        for (; i + lanes <= c; i += lanes) {
            const Vec<T> vi = load(v + i), wi = load(w + i), ui = load(u + i);
            Vec<T> yi = load(y + i);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                Vec<T> x = load(row + r * ld + i);
                if constexpr (kPending) {
                    x -= vi * wc[r];
                    x -= wi * vc[r];
                    store(row + r * ld + i, x);
                }
                yi += x * uc[r];
                sum[r] += x * ui;
            }
            store(y + i, yi);
        }
        for (; i < c + 4; i += lanes) {  // across the diagonal
            const Vec<T> vi = load(v + i), wi = load(w + i), ui = load(u + i);
            Vec<T> yi = load(y + i);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                Vec<T> x = load(row + r * ld + i);
                if constexpr (kPending) {
                    x -= vi * wc[r];
                    x -= wi * vc[r];
                    store(row + r * ld + i, x);
                }
                const Mask<T> column = lane + i;
                yi += (Mask<T>)(column < c + r) ? x * uc[r] : Vec<T>{};
                sum[r] += (Mask<T>)(column <= c + r) ? x * ui : Vec<T>{};
            }
            store(y + i, yi);
        }
        add_four_sums<T>(sum, y + c);
    }
    for (int i = m; i < (m + 3) / 4 * 4; ++i) y[i] = 0;
}

// Makes u, which holds columns 0 .. m-1 of row m, the reflector that leaves beta in column m-1. Norms below
// sqrt(kTiny) count as zero: their squares could underflow, and the matrix is scaled to norm one or more.
template <class T>
inline void make_reflector(T* u, int m, T* beta, T* tau) {
    const T head = u[m - 1];
    u[m - 1] = 0;
    const T tail = padded_dot(u, u, m), square = tail + head * head;
    *beta = head;
    *tau = 0;
    T inverse = 0;
    if (tail > kTiny<T>) {
        *beta = head >= 0 ? -sqrt_(square) : sqrt_(square);
        *tau = (*beta - head) / *beta;
        inverse = 1 / (head - *beta);
    }
    for (int i = 0; i < m; i += kLanes<T>) store(u + i, load(u + i) * splat(inverse));
    u[m - 1] = 1;
}

template <class T>
void tridiagonalise(const Reduced<T>& t, int n, size_t ld, const HouseholderWork<T>& h) {
    constexpr int lanes = kLanes<T>;
    for (size_t i = n * ld; i < (n + 3) / 4 * 4 * ld; ++i) t.a[i] = 0;
    for (size_t i = 0; i < ld; ++i) h.u[i] = h.v[i] = h.w[i] = h.y[i] = t.off[i] = t.tau[i] = 0;
    bool pending = false;
    for (int m = n - 1; m >= 0; --m) {
        T* row = t.a + m * ld;
        const Vec<T> vm = splat(h.v[m]), wm = splat(h.w[m]);
        if (pending)
            for (int i = 0; i <= m; i += lanes) store(row + i, load(row + i) - load(h.v + i) * wm - load(h.w + i) * vm);
        h.v[m] = h.w[m] = 0;
        t.diagonal[m] = row[m];
        if (m == 1) t.off[0] = row[0];
        if (m < 2) continue;
        for (int i = 0; i < m; i += lanes) store(h.u + i, load(row + i));
        for (int i = m; i < m + 4 + lanes; i += lanes) store(h.u + i, Vec<T>{});
        make_reflector(h.u, m, &t.off[m - 1], &t.tau[m]);
        for (int i = 0; i < m + 4; i += lanes) store(row + i, load(h.u + i));
        const T tau = t.tau[m];
        if (tau == 0) {
            if (pending)
                for (int c = 0; c < m; ++c) {
                    const Vec<T> vc = splat(h.v[c]), wc = splat(h.w[c]);
                    T* other = t.a + c * ld;
                    for (int i = 0; i <= c; i += lanes)
                        store(other + i, load(other + i) - load(h.v + i) * wc - load(h.w + i) * vc);
                }
            pending = false;
            continue;
        }
        if (pending)
            update_and_multiply<true>(t.a, ld, m, h.v, h.w, h.u, h.y);
        else
            update_and_multiply<false>(t.a, ld, m, h.v, h.w, h.u, h.y);
        // w = tau (y - tau/2 (y'u) u)
        const Vec<T> scale = splat(tau), correction = splat(-tau * tau * padded_dot(h.y, h.u, m) / 2);
        for (int i = 0; i < m; i += lanes) {
            const Vec<T> ui = load(h.u + i);
            store(h.w + i, load(h.y + i) * scale + correction * ui);
            store(h.v + i, ui);
        }
        pending = true;
    }
}

// block [length, kReflectorBlock] = the transposed rows a [count, ld]; the columns behind `count` are zero.
template <class T>
inline void transpose_rows(const T* a, size_t ld, int count, int length, T* block) {
    constexpr int lanes = kLanes<T>;
    for (int p = 0; p < length; p += lanes) {
        for (int r = 0; r < kReflectorBlock; r += lanes) {
            Vec<T> x[lanes];
            for (int b = 0; b < lanes; ++b) x[b] = r + b < count ? load(a + (r + b) * ld + p) : Vec<T>{};
            transpose<T>(x);
            for (int b = 0; b < lanes; ++b) store(block + (p + b) * kReflectorBlock + r, x[b]);
        }
    }
}

// x [n, ld] = x Q'. The rows of x are vectors in the basis of T, and become vectors in the basis of A.
template <class T>
void apply_q(const Reduced<T>& t, int n, size_t ld, const HouseholderWork<T>& h, T* x) {
    constexpr int b = kReflectorBlock;
    for (int m = 2; m < n; m += b) {
        const int count = min_(b, n - m), length = m + count - 1;
        const T *rows = t.a + m * ld, *tau = t.tau + m;
        bool any = false;
        for (int i = 0; i < count; ++i) any |= tau[i] != 0;
        if (!any) continue;
        transpose_rows(rows, ld, count, length, h.block);
        product<T, true>(count, count, length, h.block, b, 1, h.block, b, h.gram, b);
        // factor = -T; T is the inverse of diag(1 / tau) + the strict upper triangle of Y'Y, row by row from the last
        for (int i = count - 1; i >= 0; --i) {
            Vec<T> row[b / kLanes<T>] = {};
            for (int l = i + 1; l < count; ++l)
                for (int v = 0; v < b / kLanes<T>; ++v)
                    row[v] += h.gram[i * b + l] * load(h.factor + l * b + v * kLanes<T>);
            T* to = h.factor + i * b;
            for (int v = 0; v < b / kLanes<T>; ++v) store(to + v * kLanes<T>, row[v] * -tau[i]);
            to[i] = -tau[i];
        }
        product<T, true>(n, count, length, x, 1, ld, h.block, b, h.projected, b);
        product<T, true>(n, count, count, h.projected, 1, b, h.factor, b, h.reflected, b);
        product<T, false>(n, length, count, h.reflected, 1, b, rows, ld, x, ld);
    }
}

}  // namespace fastlora::FASTLORA_ISA
