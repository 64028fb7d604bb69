// Powers of two that bring a matrix to the middle of the range, and back.
#pragma once
#include <math.h>

#include "groups.cuh"

namespace fastlora::cuda {

// Two factors each: 2^k itself may overflow.
template <class T>
struct Scale {
    T up[2], down[2];
    __device__ T apply(T x) const { return x * up[0] * up[1]; }
    __device__ T undo(T x) const { return x * down[0] * down[1]; }
};

// Brings `largest` (finite) into [2^(exponent-1), 2^exponent).
template <class T>
__device__ Scale<T> choose_scale(T largest, int exponent) {
    if (!(largest > 0)) return {{1, 1}, {1, 1}};
    int power;
    frexp(largest, &power);
    const int shift = exponent - power, half = shift / 2;
    return {{ldexp(T(1), half), ldexp(T(1), shift - half)}, {ldexp(T(1), -half), ldexp(T(1), half - shift)}};
}

// |x|, and infinity where x is infinite or NaN: a maximum of these tells whether all are finite.
template <class T>
__device__ __forceinline__ T magnitude_or_infinity(T x) {
    return x - x == 0 ? fabs(x) : T(INFINITY);
}

}  // namespace fastlora::cuda
