// Householder reduction of a symmetric matrix to tridiagonal form, T = Q' A Q, and Q, in place; a thread a column.
// The rank-2 update of one step is fused with the matrix-vector product of the next, so that a step reads and writes
// the trailing matrix once. Algorithm: LAPACK sytd2 and org2l.
// Floor: 8/3 n^3 flops; 2 accesses to `matrix` and 3/4 to the vectors for 3 multiply-adds, so bound by them.
#pragma once
#include "scale.cuh"

namespace fastlora::cuda {

constexpr int kInFlight = 4;  // rows loaded before the first is used
constexpr int kStage = 8;     // reflectors applied at once

// From one vector in shared memory to the next: all begin at a multiple of 16 bytes.
__host__ __device__ constexpr int vector_step(int n) { return (n + 3) / 4 * 4; }

template <class T>
struct Tridiagonal {
    int n;
    Traced<T> matrix;  // [n, ld], both triangles; the Householder vectors, then Q
    int ld;
    Traced<T> diagonal, off, tau;  // [n]; H_j = I - tau_j v_j v_j', Q = H_0 H_1 ... H_(n-3)
    Traced<T> work;                // [4][vector_step(n)]
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

// Column t of the trailing rows `first`.. : applies the update and returns its product with u, which is zero before
// `first`, so that rows can be taken from a multiple of four on.
template <class T>
__device__ T update_and_multiply(const Tridiagonal<T>& m, int t, int first, bool pending, const PendingUpdate<T>& old,
                                 Traced<T> u) {
    T sum[kInFlight] = {};
    for (int k = first / kInFlight * kInFlight; k < m.n; k += kInFlight) {
        T x[kInFlight], factor[kInFlight], v[kInFlight], w[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) x[i] = k + i < m.n ? T(m.matrix[(k + i) * m.ld + t]) : T(0);
        load_four(u + k, factor);
        if (pending) {
            load_four(old.v + k, v);
            load_four(old.w + k, w);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if (k + i >= m.n) break;
            if (pending && k + i >= first) {
                x[i] = x[i] - v[i] * old.own_w - w[i] * old.own_v;
                m.matrix[(k + i) * m.ld + t] = x[i];
            }
            sum[i] += x[i] * factor[i];
        }
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class T, class Group>
__device__ void tridiagonalise(const Tridiagonal<T>& m, Group& group) {
    const int n = m.n, t = group.index(), step = vector_step(n);
    PendingUpdate<T> old{m.work, m.work + 2 * step, 0, 0};
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
        const Traced<T> new_v = m.work + turn * step, new_w = new_v + 2 * step;
        if (t >= 0 && t < n) new_v[t] = v;
        if (t > j && t < n) m.matrix[j * m.ld + t] = v;
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
        if (t >= 0 && t < n) new_w[t] = w;
        old = {new_v, new_w, v, w};
        pending = reflector.tau != 0;
        turn ^= 1;
        group.sync();
    }
}

// Column t of rows first.. : x -= v * factor; returns the product of the new column with u. Of the rows before, from a
// multiple of four on, those are zero where u or v is not.
template <class T>
__device__ T reflect_and_multiply(const Tridiagonal<T>& m, int t, int first, Traced<T> v, T factor, Traced<T> u) {
    T sum[kInFlight] = {};
    for (int k = first / kInFlight * kInFlight; k < m.n; k += kInFlight) {
        T x[kInFlight], own[kInFlight], next[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) x[i] = k + i < m.n ? T(m.matrix[(k + i) * m.ld + t]) : T(0);
        load_four(v + k, own);
        load_four(u + k, next);
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if (k + i >= m.n) break;
            x[i] = x[i] - own[i] * factor;
            m.matrix[(k + i) * m.ld + t] = x[i];
            sum[i] += x[i] * next[i];
        }
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Turns the Householder vectors, row j of the matrix from j + 1 on, into Q. Rows and columns up to j are those of the
// identity while reflector j is applied, so Q grows from the corner over the vectors that are used up. Vectors reach
// the other threads through three buffers: a thread may still be in the step before.
template <class T, class Group>
__device__ void form_q(const Tridiagonal<T>& m, Group& group) {
    const int n = m.n, t = group.index(), step = vector_step(n);
    const bool owns = t >= 0 && t < n;
    group.sync();   // vectors of the reduction have been read
    T product = 0;  // of column t with the vector to come
    if (owns && n >= 3) {
        product = t < n - 2 ? T(0) : T(m.matrix[(n - 3) * m.ld + t]);
        m.work[(n - 3) % 3 * step + t] = product;
    }
    for (int i = n < 2 ? 0 : n - 2; owns && i < n; ++i)
        if (t >= n - 2) m.matrix[i * m.ld + t] = T(i == t);
    for (int j = n - 3; j >= 0; --j) {
        const Traced<T> v = m.work + j % 3 * step, next = m.work + (j + 2) % 3 * step;
        if (owns) next[t] = j > 0 && t >= j ? T(m.matrix[(j - 1) * m.ld + t]) : T(0);
        group.sync();
        if (!owns || t < j) continue;
        m.matrix[j * m.ld + t] = T(t == j);
        if (t > j) {
            product = reflect_and_multiply(m, t, j + 1, v, m.tau[j] * product, next);
        } else {
            for (int i = j + 1; i < n; ++i) m.matrix[i * m.ld + t] = 0;
            product = next[j];
        }
    }
    group.sync();
}

// Brings reflectors last, last - 1, ... and zeros to stage [n][kStage]: a row a thread.
template <class T>
__device__ void stage_reflectors(const T* reflectors, int n, int t, int last, Traced<T> stage) {
    for (int half = 0; half < kStage; half += 4) {
        T v[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int j = last - half - c;
            v[c] = j >= 0 && t > j ? reflectors[j * n + t] : T(0);
        }
        store_four(stage + t * kStage + half, v);
    }
}

// The products of every two of the staged reflectors: of c and d < c at c (c - 1) / 2 + d, by a lane each.
template <class T>
__device__ void multiply_reflectors(Traced<T> stage, int first, int n, int lane, Traced<T> products) {
    int c = 1;
    while (c * (c + 1) / 2 <= lane) ++c;
    if (c >= kStage) return;
    const int d = lane - c * (c - 1) / 2;
    T sum[2] = {};
    for (int i = first; i < n; i += 2) {
        sum[0] += stage[i * kStage + c] * stage[i * kStage + d];
        if (i + 1 < n) sum[1] += stage[(i + 1) * kStage + c] * stage[(i + 1) * kStage + d];
    }
    products[lane] = sum[0] + sum[1];
}

// x becomes Q x for each column x of the matrix, a thread a column. `reflectors` [n - 2, n]: row j is v_j from j + 1
// on. kStage of them take two reads and a write of x, by their products with it and with each other: the same as one
// after another, up to rounding. `stage` [n][kStage]; `products` [kStage (kStage - 1) / 2].
template <class T, class Group>
__device__ void apply_reflectors(const Tridiagonal<T>& m, const T* reflectors, Traced<T> stage, Traced<T> products,
                                 Group& group) {
    const int n = m.n, t = group.index();
    const bool owns = t >= 0 && t < n;
    for (int last = n - 3; last >= 0; last -= kStage) {
        const int first = last < kStage ? 1 : last - kStage + 2;  // row that none reaches before
        if (last < n - 3) group.sync();                           // the ones before have been used
        if (owns) stage_reflectors(reflectors, n, t, last, stage);
        group.sync();
        if (group.leads()) multiply_reflectors(stage, first, n, int(threadIdx.x) % kWarpSize, products);
        T along[kStage] = {};
        for (int i = first; owns && i < n; ++i) {
            const T x = m.matrix[i * m.ld + t];
            T low[4], high[4];
            load_four(stage + i * kStage, low);
            load_four(stage + i * kStage + 4, high);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                along[c] += low[c] * x;
                along[c + 4] += high[c] * x;
            }
        }
        group.sync();
        if (!owns) continue;
#pragma unroll
        for (int c = 0; c < kStage; ++c) {
#pragma unroll
            for (int d = 0; d < c; ++d) along[c] -= products[c * (c - 1) / 2 + d] * along[d];
            along[c] *= c <= last ? T(m.tau[last - c]) : T(0);
        }
        for (int i = first; i < n; ++i) {
            T x = m.matrix[i * m.ld + t], low[4], high[4];
            load_four(stage + i * kStage, low);
            load_four(stage + i * kStage + 4, high);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                x -= low[c] * along[c];
                x -= high[c] * along[c + 4];
            }
            m.matrix[i * m.ld + t] = x;
        }
    }
    group.sync();
}

}  // namespace fastlora::cuda
