// Householder reduction of interleaved symmetric matrices to tridiagonal form, T = Q' A Q.
//   a: column c in a[c * ld + i], i >= c (lower triangle); on return column j holds reflector j in rows
//      j+1.., its leading one stored.
//   tri: diagonal [n], off-diagonal [n], reflector factors [n]; H_j = I - tau_j v_j v_j', Q = H_0 H_1 ...
// Algorithm: LAPACK sytd2, with the rank-2 update of step j-1 fused with the matrix-vector product of step j,
// so that each step reads and writes the trailing triangle once, four columns at a time.
// Floor: 4/3 n^3 flops to reduce, as many to form Q.
#pragma once
#include "lanes_interleave.h"

namespace fastlora::FASTLORA_ISA {

template <class T>
struct Tridiagonal {
    Vec<T>* diagonal;
    Vec<T>* off;
    Vec<T>* tau;
};

// One symmetric rank-2 update A -= v w' + w v', pending until the next product needs the values.
template <class T>
struct PendingUpdate {
    const Vec<T>* v;
    const Vec<T>* w;
};

template <class T>
inline void update_column(Vec<T>* column, PendingUpdate<T> old, int c, int from, int to) {
    const Vec<T> vc = old.v[c], wc = old.w[c];
    for (int i = from; i < to; ++i) column[i] -= old.v[i] * wc + old.w[i] * vc;
}

// Turns rows j+1.. of the column into a reflector. Norms below sqrt(kTiny) count as zero: their squares
// could underflow, and the matrix is scaled to norm one or more.
template <class T>
inline void make_reflector(Vec<T>* column, int j, int n, Tridiagonal<T> tri) {
    const Vec<T> zero{}, one = splat<T>(1);
    Vec<T> tail = zero;
    for (int i = j + 2; i < n; ++i) tail += column[i] * column[i];
    const Vec<T> head = column[j + 1], square = head * head + tail, norm = sqrt(square);
    const Mask<T> usable = (Mask<T>)(square > kTiny<T>);
    const Vec<T> beta = head >= zero ? -norm : norm;
    const Vec<T> inverse = usable ? one / (usable ? head - beta : one) : zero;
    tri.off[j] = usable ? beta : zero;
    tri.tau[j] = usable ? (beta - head) / (usable ? beta : one) : zero;
    column[j + 1] = one;
    for (int i = j + 2; i < n; ++i) column[i] *= inverse;
}

// y += (columns c .. c+3 of A, mirrored) u, after the pending update of those columns.
template <bool kPending, class T>
inline void multiply_four(Vec<T>* a, size_t ld, int c, int n, PendingUpdate<T> old, const Vec<T>* u, Vec<T>* y) {
    Vec<T>*a0 = a + c * ld, *a1 = a0 + ld, *a2 = a1 + ld, *a3 = a2 + ld;
    if constexpr (kPending)
        for (int k = 0; k < 4; ++k) update_column<T>(a + (c + k) * ld, old, c + k, c + k, c + 4);
    const Vec<T> u0 = u[c], u1 = u[c + 1], u2 = u[c + 2], u3 = u[c + 3];
    Vec<T> s0 = a0[c] * u0 + a0[c + 1] * u1 + a0[c + 2] * u2 + a0[c + 3] * u3;
    Vec<T> s1 = a0[c + 1] * u0 + a1[c + 1] * u1 + a1[c + 2] * u2 + a1[c + 3] * u3;
    Vec<T> s2 = a0[c + 2] * u0 + a1[c + 2] * u1 + a2[c + 2] * u2 + a2[c + 3] * u3;
    Vec<T> s3 = a0[c + 3] * u0 + a1[c + 3] * u1 + a2[c + 3] * u2 + a3[c + 3] * u3;
    Vec<T> v0{}, v1{}, v2{}, v3{}, w0{}, w1{}, w2{}, w3{};
    if constexpr (kPending) {
        v0 = old.v[c], v1 = old.v[c + 1], v2 = old.v[c + 2], v3 = old.v[c + 3];
        w0 = old.w[c], w1 = old.w[c + 1], w2 = old.w[c + 2], w3 = old.w[c + 3];
    }
    for (int i = c + 4; i < n; ++i) {
        Vec<T> x0 = a0[i], x1 = a1[i], x2 = a2[i], x3 = a3[i], yi = y[i];
        if constexpr (kPending) {
            const Vec<T> vi = old.v[i], wi = old.w[i];
            x0 -= vi * w0, x1 -= vi * w1, x2 -= vi * w2, x3 -= vi * w3;
            x0 -= wi * v0, x1 -= wi * v1, x2 -= wi * v2, x3 -= wi * v3;
            a0[i] = x0, a1[i] = x1, a2[i] = x2, a3[i] = x3;
        }
        const Vec<T> ui = u[i];
        yi += x0 * u0, s0 += x0 * ui;
        yi += x1 * u1, s1 += x1 * ui;
        yi += x2 * u2, s2 += x2 * ui;
        yi += x3 * u3, s3 += x3 * ui;
        y[i] = yi;
    }
    y[c] += s0, y[c + 1] += s1, y[c + 2] += s2, y[c + 3] += s3;
}

// y = A u over rows and columns first .. n-1.
template <bool kPending, class T>
inline void update_and_multiply(Vec<T>* a, size_t ld, int first, int n, PendingUpdate<T> old, const Vec<T>* u,
                                Vec<T>* y) {
    for (int i = first; i < n; ++i) y[i] = Vec<T>{};
    int c = first;
    for (; c + 3 < n; c += 4) multiply_four<kPending, T>(a, ld, c, n, old, u, y);
    for (; c < n; ++c) {
        Vec<T>* column = a + c * ld;
        if constexpr (kPending) update_column<T>(column, old, c, c, n);
        Vec<T> sum = column[c] * u[c];
        for (int i = c + 1; i < n; ++i) {
            y[i] += column[i] * u[c];
            sum += column[i] * u[i];
        }
        y[c] += sum;
    }
}

// `work` holds 2 n vectors. Steps that reflect in no lane, as all of a diagonal matrix, cost next to nothing;
// returns whether any did.
template <class T>
bool tridiagonalise(Vec<T>* a, size_t ld, int n, Tridiagonal<T> tri, Vec<T>* work) {
    Vec<T>*w = work, *y = work + n;
    bool pending = false, any = false;
    for (int j = 0; j < n; ++j) {
        Vec<T>* column = a + j * ld;
        const PendingUpdate<T> old{column - ld, w};
        if (pending && j + 1 < n) update_column<T>(column, old, j, j, n);
        tri.diagonal[j] = column[j];
        tri.off[j] = j + 2 == n ? column[j + 1] : Vec<T>{};
        tri.tau[j] = Vec<T>{};
        if (j + 2 == n && pending) update_column<T>(column + ld, old, n - 1, n - 1, n);  // the last of all
        if (j + 2 >= n) continue;
        make_reflector<T>(column, j, n, tri);
        const Vec<T> tau = tri.tau[j];
        const bool reflects = any_mask((Mask<T>)(tau != Vec<T>{}));
        if (pending)
            update_and_multiply<true, T>(a, ld, j + 1, n, old, column, y);
        else if (reflects)
            update_and_multiply<false, T>(a, ld, j + 1, n, old, column, y);
        any |= reflects;
        pending = reflects;
        if (!reflects) continue;
        // w = tau (y - tau/2 (y'v) v)
        Vec<T> dot{};
        for (int i = j + 1; i < n; ++i) dot += y[i] * column[i];
        const Vec<T> correction = tau * tau * dot * T(-0.5);
        for (int i = j + 1; i < n; ++i) w[i] = y[i] * tau + correction * column[i];
    }
    return any;
}

// Applies H_0 H_1 ... H_last to kColumns columns of q (q[i * ld + column]); the product with the next
// reflector is summed while the present one is applied.
template <int kColumns, class T>
inline void apply_reflectors(const Vec<T>* a, size_t ld, const Vec<T>* tau, int last, int n, Vec<T>* q) {
    if (last < 0) return;
    Vec<T> dot[kColumns];
    for (int t = 0; t < kColumns; ++t) dot[t] = Vec<T>{};
    for (int i = last + 1; i < n; ++i)
        for (int t = 0; t < kColumns; ++t) dot[t] += a[last * ld + i] * q[i * ld + t];
    for (int j = last; j >= 0; --j) {
        const Vec<T>* v = a + j * ld;
        const Vec<T>* next = j > 0 ? v - ld : v;
        Vec<T> next_dot[kColumns];
        for (int t = 0; t < kColumns; ++t) {
            dot[t] *= tau[j];
            next_dot[t] = q[j * ld + t];
        }
        for (int i = j + 1; i < n; ++i) {
            const Vec<T> vi = v[i], ni = next[i];
            for (int t = 0; t < kColumns; ++t) {
                const Vec<T> x = q[i * ld + t] - vi * dot[t];
                q[i * ld + t] = x;
                next_dot[t] += ni * x;
            }
        }
        for (int t = 0; t < kColumns; ++t) dot[t] = next_dot[t];
    }
}

// q (row-major, q[i * ld + c]) = H_0 H_1 ... H_(n-3), the identity unless `reflects`.
template <class T>
void form_q(const Vec<T>* a, size_t ld, const Vec<T>* tau, int n, bool reflects, Vec<T>* q) {
    for (int i = 0; i < n; ++i)
        for (int c = 0; c < n; ++c) q[i * ld + c] = splat<T>(i == c);
    if (!reflects) return;
    int c = 0;
    // Reflector j touches rows below j only, so columns up to c start at reflector c - 1.
    for (; c + 3 < n; c += 4) apply_reflectors<4, T>(a, ld, tau, min_(c + 2, n - 3), n, q + c);
    for (; c < n; ++c) apply_reflectors<1, T>(a, ld, tau, min_(c - 1, n - 3), n, q + c);
}

}  // namespace fastlora::FASTLORA_ISA
