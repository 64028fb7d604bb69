// One-sided Jacobi: the tournament in which every two columns meet, and the rotation of two columns.
// Algorithm: Hestenes, by the smaller angle. Keeping the larger column first, as LAPACK gesvj does, takes three times
// the sweeps in the orders of parallel rounds.
#pragma once
#include "scale.cuh"

namespace fastlora::cuda {

// The pair of columns of place `slot` in `round`, of `players` (even): the last stays, the others go round.
__device__ __forceinline__ void tournament_pair(int players, int round, int slot, int& first, int& second) {
    const int circle = players - 1;
    int a = round + slot, b = round - slot;
    a = a >= circle ? a - circle : a;
    b = b < 0 ? b + circle : b;
    if (slot == 0) b = circle;
    first = a < b ? a : b;
    second = a < b ? b : a;
}

// One sweep: every two of n columns meet once, in rounds of disjoint pairs, with a barrier before each round and a vote
// after the last. play(first, second, is_pair), by the `lanes` neighbours that share a pair, says whether the two have
// turned; lanes without a pair call it too, with is_pair false. Returns whether any pair has turned.
template <class Play>
__device__ __forceinline__ bool tournament_sweep(Crew crew, int n, int lanes, Play play) {
    const int players = n + n % 2, pairs = players / 2, at_once = crew.size / lanes, own = crew.rank / lanes;
    bool turned = false;
    for (int round = 0; round < players - 1; ++round) {
        crew.sync();
        for (int slot = own; slot - own < pairs; slot += at_once) {
            int first, second;
            tournament_pair(players, round, slot, first, second);
            turned |= play(first, second, slot < pairs && second < n);
        }
    }
    return crew.any(turned);
}

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
