// Householder reduction of a symmetric matrix to tridiagonal form, T = Q' A Q, and Q, in place; a thread a column.
// The rank-2 update of one step is fused with the matrix-vector product of the next, so that a step reads and writes
// the trailing matrix once. Algorithm: LAPACK sytd2 and org2l.
// Floor: 8/3 n^3 flops; 3 accesses to `matrix` and to the vectors per 3 multiply-adds, so bound by them.
#pragma once
#include "scale.cuh"

namespace fastlora::cuda {

constexpr int kInFlight = 4;  // rows loaded before the first is used

template <class T>
struct Tridiagonal {
    int n;
    Traced<T> matrix;  // [n, ld], both triangles; the Householder vectors, then Q
    int ld;
    Traced<T> diagonal, off, tau;  // [n]; H_j = I - tau_j v_j v_j', Q = H_0 H_1 ... H_(n-3)
    Traced<T> work;                // [4 n]
};

// The reflector that maps (head, tail) to (beta, 0). Norms below sqrt(kTiny) count as zero: their squares could
// underflow, and the matrix is scaled to norm 1/2 or more.
template <class T>
struct Reflector {
    T beta = 0, tau = 0, inverse = 0;
    __device__ Reflector(T head, T tail_square) {
        const T square = head * head + tail_square;
        if (!(square > kTiny<T>)) return;
        const T norm = sqrt(square);
        beta = head >= 0 ? -norm : norm;
        inverse = 1 / (head - beta);
        tau = (beta - head) / beta;
    }
};

// One symmetric update A -= v w' + w v' that the matrix still lacks, and this thread's entries of it.
template <class T>
struct PendingUpdate {
    Traced<T> v, w;
    T own_v, own_w;
};

// Column t of the trailing rows `first`.. : applies the update and returns its product with u.
template <class T>
__device__ T update_and_multiply(const Tridiagonal<T>& m, int t, int first, bool pending, const PendingUpdate<T>& old,
                                 Traced<T> u) {
    T sum[kInFlight] = {};
    for (int k = first; k < m.n; k += kInFlight) {
        T x[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) x[i] = k + i < m.n ? T(m.matrix[(k + i) * m.ld + t]) : T(0);
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if (k + i >= m.n) break;
            if (pending) {
                x[i] = x[i] - old.v[k + i] * old.own_w - old.w[k + i] * old.own_v;
                m.matrix[(k + i) * m.ld + t] = x[i];
            }
            sum[i] += x[i] * u[k + i];
        }
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class T, class Group>
__device__ void tridiagonalise(const Tridiagonal<T>& m, Group& group) {
    const int n = m.n, t = group.index();
    PendingUpdate<T> old{m.work, m.work + 2 * n, 0, 0};
    bool pending = false;
    int turn = 0;
    for (int j = 0; j < n; ++j) {
        T x = 0;
        if (t >= j && t < n) {
            x = m.matrix[j * m.ld + t];
            if (pending) x = x - old.v[j] * old.own_w - old.w[j] * old.own_v;
        }
        if (t == j) m.diagonal[j] = x;
        if (t == j + 1 && t < n) m.off[j] = x;
        if (j + 2 >= n) continue;

        const T tail = group.sum(t > j + 1 && t < n ? x * x : T(0));
        const Reflector<T> reflector(m.off[j], tail);
        const T v = t == j + 1 ? T(1) : t > j + 1 ? x * reflector.inverse : T(0);
        const Traced<T> new_v = m.work + turn * n, new_w = new_v + 2 * n;
        if (t > j && t < n) m.matrix[j * m.ld + t] = new_v[t] = v;
        group.sync();
        if (t == j + 1) {
            m.off[j] = reflector.beta;
            m.tau[j] = reflector.tau;
        }
        if (!pending && reflector.tau == 0) continue;

        T y = 0;
        if (t > j && t < n) y = update_and_multiply(m, t, j + 1, pending, old, new_v);
        const T dot = group.sum(t > j && t < n ? y * v : T(0));
        // w = tau (y - tau/2 (y'v) v)
        const T w = reflector.tau * (y - T(0.5) * reflector.tau * dot * v);
        if (t > j && t < n) new_w[t] = w;
        old = {new_v, new_w, v, w};
        pending = reflector.tau != 0;
        turn ^= 1;
        group.sync();
    }
    group.sync();
}

// Column t of rows first.. : x -= v * factor; returns the product of the new column with u.
template <class T>
__device__ T reflect_and_multiply(const Tridiagonal<T>& m, int t, int first, Traced<T> v, T factor, Traced<T> u) {
    T sum[kInFlight] = {};
    for (int k = first; k < m.n; k += kInFlight) {
        T x[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) x[i] = k + i < m.n ? T(m.matrix[(k + i) * m.ld + t]) : T(0);
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if (k + i >= m.n) break;
            x[i] = x[i] - v[k + i] * factor;
            m.matrix[(k + i) * m.ld + t] = x[i];
            sum[i] += x[i] * u[k + i];
        }
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Turns the Householder vectors, row j of the matrix from j + 1 on, into Q. Rows and columns up to j are those of the
// identity while reflector j is applied, so Q grows from the corner over the vectors that are used up. Vectors reach
// the other threads through three buffers: a thread may still be in the step before.
template <class T, class Group>
__device__ void form_q(const Tridiagonal<T>& m, Group& group) {
    const int n = m.n, t = group.index();
    const bool owns = t >= 0 && t < n;
    T product = 0;  // of column t with the vector to come
    if (owns && n >= 3) {
        product = m.matrix[(n - 3) * m.ld + t];
        m.work[(n - 3) % 3 * n + t] = product;
    }
    for (int i = n < 2 ? 0 : n - 2; owns && i < n; ++i)
        if (t >= n - 2) m.matrix[i * m.ld + t] = T(i == t);
    for (int j = n - 3; j >= 0; --j) {
        const Traced<T> v = m.work + j % 3 * n, next = m.work + (j + 2) % 3 * n;
        if (owns) next[t] = j > 0 && t >= j ? T(m.matrix[(j - 1) * m.ld + t]) : T(0);
        group.sync();
        if (!owns || t < j) continue;
        if (t > j) {
            product = reflect_and_multiply(m, t, j + 1, v, m.tau[j] * product, next);
        } else {
            for (int i = j + 1; i < n; ++i) m.matrix[i * m.ld + t] = 0;
            product = next[j];
        }
        m.matrix[j * m.ld + t] = T(t == j);
    }
    group.sync();
}

}  // namespace fastlora::cuda
