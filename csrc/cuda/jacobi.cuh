// One-sided Jacobi: the rotation of two columns, and the bounds under which their squares are safe.
// Algorithm: Hestenes, by the smaller angle. Keeping the larger column first, as LAPACK gesvj does, takes three times
// the sweeps in the orders of parallel rounds.
#pragma once
#include "scale.cuh"

namespace fastlora::cuda {

// A bound on dot^2 / (a b) for columns that count as orthogonal.
template <class T>
__device__ T orthogonality_tolerance(int rows) {
    return 4 * T(rows) * kEpsilon<T> * kEpsilon<T>;
}

// first' = cosine first - sine second, second' = sine first + cosine second. Identity unless `turns`.
template <class T>
struct JacobiRotation {
    T cosine = 1, sine = 0;
    T first, second;  // squared norms, after the rotation
    bool turns;

    __device__ JacobiRotation(T a, T b, T dot, T tolerance) : first(a), second(b) {
        turns = a > kSmallSquare<T> && b > kSmallSquare<T> && dot * dot > tolerance * (a * b);
        if (!turns) return;
        const T difference = b - a, twice = 2 * dot;
        const T root = sqrt(difference * difference + twice * twice);
        const T t = twice / (difference < 0 ? difference - root : difference + root);
        cosine = 1 / sqrt(t * t + 1);
        sine = t * cosine;
        first = a - t * dot;
        second = b + t * dot;
    }
};

// The norm of a column whose entries are x(i), by way of its squared norm: where that is too small to be exact, the
// entries are to be multiplied by `boost` first.
template <class T>
struct ColumnNorm {
    T inverse, norm;
    __device__ ColumnNorm(T square, T boost) {
        const T root = sqrt(square);
        inverse = root > 0 ? 1 / root : T(0);
        norm = root / boost;
    }
};

}  // namespace fastlora::cuda
