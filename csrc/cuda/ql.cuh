// Implicit QL on a symmetric tridiagonal matrix, with vectors. One thread runs the recurrence of a sweep and leaves its
// rotations in shared memory; every thread applies them to its own component of the vectors, in a block while the next
// sweep is being computed. Algorithm: EISPACK imtql2 / LAPACK steqr.
// Floor: about 0.85 n^2 rotations one after another, some 75 cycles each in float32; 3 n^3 multiply-adds.
#pragma once
#include "scalar.cuh"
#include "tridiagonal.cuh"

namespace fastlora::cuda {

constexpr int kMaxSweepsPerValue = 40;
enum SweepState : int { kConverged = -1, kGivenUp = -2 };

// 1 / sqrt(x) to a unit or two in the last place, for normal x.
__device__ __forceinline__ float inverse_root(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return rsqrtf(x);
#endif
}
__device__ __forceinline__ double inverse_root(double x) { return quick_inverse_root(x); }

template <class T>
struct Rotations {
    Traced<T> cosine, sine;  // [2][n]: sweep k is in half k % 2
    Traced<int> range;       // [2][2]: first and last index of the sweep, or a SweepState
};

template <class T>
__device__ __forceinline__ bool is_negligible(T off, T above, T below) {
    return fabs(off) <= kEpsilon<T> * (fabs(above) + fabs(below)) + kEpsilon<T> * T(1e-3);
}

// The first block without a negligible off-diagonal at or after `from`; negligible ones become zero. For one warp.
template <class T>
__device__ bool find_block(const Tridiagonal<T>& m, int from, int& first, int& last) {
    const int lane = int(threadIdx.x) % kWarpSize;
    first = -1;
    last = m.n - 1;
    for (int base = from; base < m.n - 1; base += kWarpSize) {
        const int i = base + lane;
        bool cut = true;
        if (i < m.n - 1) {
            cut = is_negligible(T(m.off[i]), T(m.diagonal[i]), T(m.diagonal[i + 1]));
            if (cut) m.off[i] = 0;
        }
        const unsigned cuts = __ballot_sync(kAllLanes, cut);
        unsigned ends = cuts;
        if (first < 0) {
            if (cuts == kAllLanes) continue;
            const int bit = __ffs(int(~cuts)) - 1;
            first = base + bit;
            ends = cuts >> bit << bit;
        }
        if (ends) {
            last = base + __ffs(int(ends)) - 1;
            break;
        }
    }
    return first >= 0;
}

// One sweep with Wilkinson's shift over the block first .. last of the diagonal d and the off-diagonal e, for one
// thread.
template <class T>
__device__ void sweep_block(Traced<T> d, Traced<T> e, int first, int last, Traced<T> cosine, Traced<T> sine) {
    const T top = d[first], coupling = e[first];
    const T ratio = (d[first + 1] - top) / (coupling * T(2)), root = sqrt(ratio * ratio + T(1));
    T upper = d[last];  // d[i + 1]
    T g = upper - top + coupling / (ratio + (ratio >= 0 ? root : -root));
    T s = 1, c = 1, p = 0;
    T d_next = d[last - 1], e_next = e[last - 1];
    for (int i = last - 1; i >= first; --i) {
        const T di = d_next, ei = e_next;
        const int ahead = i > first ? i - 1 : first;
        d_next = d[ahead];  // before the stores below, which do not change them
        e_next = e[ahead];
        const T f = s * ei, b = c * ei;
        const T square = f * f + g * g;
        const T inverse = inverse_root(square);
        const T correction = T(0.5) - T(0.5) * square * inverse * inverse;
        const bool turns = square > kTiny<T>;
        const T scaled_f = f * inverse, scaled_g = g * inverse, length = square * inverse;
        s = turns ? scaled_f + scaled_f * correction : T(0);
        c = turns ? scaled_g + scaled_g * correction : T(1);
        if (i + 1 < last) e[i + 1] = turns ? length + length * correction : T(0);
        const T shifted = upper - p;
        const T r = (di - shifted) * s + c * (b * T(2));
        p = s * r;
        d[i + 1] = shifted + p;
        g = c * r - b;
        cosine[i] = c;
        sine[i] = s;
        upper = di;
    }
    d[first] = upper - p;
    e[first] = g;
}

// Component t of the vectors: entry c is at vectors[c * step].
template <class T>
__device__ void rotate_component(Traced<T> vectors, int step, int first, int last, Traced<T> cosine, Traced<T> sine) {
    T carried = vectors[last * step];
    for (int i = last - 1; i >= first; i -= kInFlight) {
        T x[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) x[k] = i - k >= first ? T(vectors[(i - k) * step]) : T(0);
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            if (i - k < first) break;
            const T c = cosine[i - k], s = sine[i - k];
            vectors[(i - k + 1) * step] = s * x[k] + c * carried;
            carried = c * x[k] - s * carried;
        }
    }
    vectors[first * step] = carried;
}

// Computes sweep k, or finds that none is left; for the leading warp. `from` only grows.
template <class T>
__device__ void next_sweep(const Tridiagonal<T>& m, const Rotations<T>& rotations, int k, int& from) {
    const int half = k % 2;
    int first, last;
    const bool found = find_block(m, from, first, last);
    __syncwarp();
    if (found) from = first;
    if (threadIdx.x % kWarpSize != 0) return;
    const bool sweeps = found && k < kMaxSweepsPerValue * m.n;
    if (sweeps) sweep_block(m.diagonal, m.off, first, last, rotations.cosine + half * m.n, rotations.sine + half * m.n);
    rotations.range[2 * half] = sweeps ? first : found ? kGivenUp : kConverged;
    rotations.range[2 * half + 1] = last;
}

// Leaves the eigenvalues, unsorted, in m.diagonal; `component` points to this thread's component of vector 0, and
// `step` elements on is that of the next vector. Returns whether it converged.
template <class T, class Group>
__device__ bool diagonalise(const Tridiagonal<T>& m, const Rotations<T>& rotations, Traced<T> component, int step,
                            Group& group) {
    const int t = group.index();
    int from = 0;
    for (int k = 0;; ++k) {
        const int half = k % 2;
        if (group.leads()) next_sweep(m, rotations, k, from);
        // One barrier a sweep: the other half is written next, which everyone has read before coming here.
        group.sync();
        const int first = rotations.range[2 * half], last = rotations.range[2 * half + 1];
        if (first < 0) return first == kConverged;
        if (t >= 0 && t < m.n)
            rotate_component(component, step, first, last, rotations.cosine + half * m.n, rotations.sine + half * m.n);
    }
}

}  // namespace fastlora::cuda
