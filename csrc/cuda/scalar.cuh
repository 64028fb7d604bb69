// float64 scalars: quick roots and quotients of full precision, and exact scaling.
#pragma once
#include <math.h>
#include <string.h>

#include "groups.cuh"

namespace fastlora::cuda {

#if !defined(__CUDA_ARCH__)
// What the special function unit leaves of a number.
__device__ __forceinline__ double keep_high_word(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= ~uint64_t(0xffffffff);
    memcpy(&x, &bits, sizeof bits);
    return x;
}
#endif

// The special function unit reads the high word alone: about 20 good bits, over the whole range of normal numbers.
__device__ __forceinline__ double rough_reciprocal(double x) {
#if defined(__CUDA_ARCH__)
    double y;
    asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
    return y;
#else
    return keep_high_word(1.0 / x);
#endif
}

__device__ __forceinline__ double rough_inverse_root(double x) {
#if defined(__CUDA_ARCH__)
    double y;
    asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
    return y;
#else
    return keep_high_word(1.0 / sqrt(x));
#endif
}

// 1/x and 1/sqrt(x) to a few units in the last place, for x and 1/x well inside the normal range, x > 0 for the root.
// One step of third order: with y = (1 + e)/x, e of 20 bits, 1/x = y (1 - e + e² - ...).
__device__ __forceinline__ double quick_reciprocal(double x) {
    const double y = rough_reciprocal(x), e = fma(-x, y, 1.0);
    return fma(y, fma(e, e, e), y);
}

__device__ __forceinline__ double quick_inverse_root(double x) {
    const double y = rough_inverse_root(x), e = fma(-x * y, y, 1.0);
    return fma(y * e, fma(0.375, e, 0.5), y);
}

// 2^power in two factors, as it may itself be out of range. Products are exact unless they are.
struct PowerOfTwo {
    double half, rest;
    __device__ explicit PowerOfTwo(int power) : half(ldexp(1.0, power / 2)), rest(ldexp(1.0, power - power / 2)) {}
    __device__ double operator*(double x) const { return x * half * rest; }
};

// Under the names that common/small_blocks.h has for them.
__device__ __forceinline__ double abs_(double x) { return fabs(x); }
__device__ __forceinline__ double sqrt_(double x) { return sqrt(x); }
__device__ __forceinline__ double max_(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ double hypot_(double x, double y) { return hypot(x, y); }
__device__ __forceinline__ double sum_of_products(double a, double b, double c, double d) { return fma(a, b, c * d); }

}  // namespace fastlora::cuda
